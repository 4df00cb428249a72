-- Factors on seat prices. A tier without a session serves every session; sessions live in the Event Service's database,
-- so there is no foreign key to them.

create table price_tiers (
    id              uuid primary key,
    session_id      uuid,
    name            text not null,
    base_multiplier numeric(8, 4) not null,
    description     text,
    created_at      timestamptz not null default now(),
    updated_at      timestamptz not null default now(),
    constraint price_tiers_name_length check (char_length(name) between 1 and 100),
    constraint price_tiers_multiplier_range check (base_multiplier > 0 and base_multiplier <= 1000)
);
-- The tiers of one session beside those of all.
create index price_tiers_by_session on price_tiers (session_id, id);
