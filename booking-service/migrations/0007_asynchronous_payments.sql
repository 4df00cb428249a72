-- Payments whose outcome comes later, by the provider's notice (`POST /api/v1/payments/webhook`).

-- processing: the provider has taken the charge on and will tell what becomes of it. The reservation is `active` meanwhile.
alter table payments
    drop constraint payments_status_known,
    add constraint payments_status_known check (status in ('pending', 'processing', 'captured', 'declined', 'voided')),
    -- The reservation that a payment which came too late for its own is to become, when its seats are still free.
    add column rebooked_as uuid,
    -- Since when one process works on that; another takes over when it has died.
    add column rebooking_since timestamptz;

drop index payments_one_live_per_reservation;
create unique index payments_one_live_per_reservation on payments (reservation_id) where status in ('pending', 'processing', 'captured');
-- What reconciliation asks the provider about.
create index payments_processing on payments (updated_at) where status = 'processing';

-- What the provider has told: written before it is worked on, so that it gets its answer at once and nothing told is lost.
create table payment_notices (
    -- The provider's id of it; it may send one many times.
    event_id    text primary key,
    payment_id  uuid not null,
    event_type  text not null,
    received_at timestamptz not null default now(),
    -- When its consequences were committed.
    handled_at  timestamptz,
    constraint payment_notices_payment_exists foreign key (payment_id) references payments,
    constraint payment_notices_event_id_length check (char_length(event_id) between 1 and 200),
    constraint payment_notices_event_type_known check (event_type in ('payment.captured', 'payment.declined'))
);
create index payment_notices_unhandled on payment_notices (received_at) where handled_at is null;

alter table mock_provider_charges
    drop constraint mock_provider_charges_state_known,
    add constraint mock_provider_charges_state_known check (state in ('processing', 'captured', 'declined', 'voided'));
