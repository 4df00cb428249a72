-- Expired reservations apart from all other events that wait: the worker frees their seats itself, so that a hall of them that ends at once
-- must not keep back what others have paid for.

-- The new one first: reading goes on until the old one is dropped. What writes events waits while the table is read, once.
create index outbox_waiting on outbox ((event_type = 'reservation.expired'), coalesce(tried_at, created_at), id) where published_at is null;
drop index outbox_pending;
