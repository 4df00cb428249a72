-- Events that were committed with their change and wait to be published. Published rows stay: they can be sent again.

create table outbox (
    -- The event's id and the AMQP message id.
    id             uuid primary key,
    event_type     text not null,
    reservation_id uuid not null,
    sequence       bigint not null,
    payload        jsonb not null,
    -- W3C trace context of the request that made the change; the relay has no request of its own.
    traceparent    text,
    created_at     timestamptz not null default now(),
    published_at   timestamptz,
    -- When the broker last did not take it: the others go first then.
    tried_at       timestamptz,
    constraint outbox_one_per_change unique (reservation_id, sequence)
);
-- What the relay looks for. Not "newer than the last id seen": rows become visible in another order than they were made.
create index outbox_pending on outbox (coalesce(tried_at, created_at), id) where published_at is null;
