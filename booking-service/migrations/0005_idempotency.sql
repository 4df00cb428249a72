-- Answers kept by Idempotency-Key, so that a request that is repeated has its effect once and gets the same answer.
-- Scoped by user: nobody can read another's answers by guessing keys.

create table idempotency_keys (
    user_id      uuid not null,
    -- The OpenAPI operation id; one key may serve different calls.
    operation    text not null,
    key          text not null,
    -- SHA-256 of the path parameters and the body: another request under the same key is a client's mistake.
    fingerprint  bytea not null,
    -- Who works on it; for a reservation, its id. Only this attempt may finish the key.
    attempt      uuid not null,
    -- Until when that attempt may still be at work. After it, the next request under the key takes over.
    locked_until timestamptz not null,
    -- The kept answer; null while the attempt is at work.
    status       smallint,
    answer       text,
    created_at   timestamptz not null default now(),
    primary key (user_id, operation, key),
    constraint idempotency_keys_answer_is_whole check ((status is null) = (answer is null))
);
-- Keys are deleted in this order, 24 hours after their first use.
create index idempotency_keys_by_age on idempotency_keys (created_at);
