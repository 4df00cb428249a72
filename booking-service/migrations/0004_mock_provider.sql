-- The mock payment provider's own ledger. A real provider remembers a charge when the process that asked for it has died;
-- so does this one. It is written in transactions of its own, never in those of a reservation.

create table mock_provider_charges (
    idempotency_key uuid primary key,
    amount          numeric(12, 2) not null,
    -- voided: it will never be captured under this key.
    state           text not null,
    created_at      timestamptz not null default now(),
    constraint mock_provider_charges_state_known check (state in ('captured', 'declined', 'voided'))
);

create table mock_provider_refunds (
    idempotency_key uuid primary key,
    charge_key      uuid not null,
    amount          numeric(12, 2) not null,
    created_at      timestamptz not null default now(),
    constraint mock_provider_refunds_charge_exists foreign key (charge_key) references mock_provider_charges
);
