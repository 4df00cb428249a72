-- Messages whose effect is committed. A row is written in the transaction of its effect, so a message that comes
-- again (the broker delivers at least once) has none.

create table inbox (
    message_id     uuid primary key,
    event_type     text not null,
    reservation_id uuid not null,
    -- Rises with each change of the reservation: tells a late message from a conflicting one.
    sequence       bigint not null,
    received_at    timestamptz not null default now()
);
create index inbox_by_reservation on inbox (reservation_id, sequence);
