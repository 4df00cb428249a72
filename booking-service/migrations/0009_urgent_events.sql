-- Expired reservations apart from all other events that wait: their seats are on sale again before the message, so that a hall of them
-- that ends at once must not keep back what others have paid for.

drop index outbox_pending;
create index outbox_pending on outbox ((event_type = 'reservation.expired'), coalesce(tried_at, created_at), id) where published_at is null;
