-- Reservations, their items, payments and tickets. The row in `reservations` is the only authority on what became of one.

create table reservations (
    id               uuid primary key,
    user_id          uuid not null,
    session_id       uuid not null,
    status           text not null,
    booking_time     timestamptz not null,
    -- When the hold ends unless it is paid; judged by this database's clock alone.
    expiry_time      timestamptz not null,
    seats_count      integer not null,
    total_amount     numeric(12, 2) not null,
    currency         text not null,
    -- Rises with each announced change; receivers tell by it what came first.
    sequence         bigint not null default 0,
    -- While the payment provider is asked: until when nobody else may end the reservation.
    confirming_until timestamptz,
    created_at       timestamptz not null default now(),
    updated_at       timestamptz not null default now(),
    constraint reservations_status_known
        check (status in ('active', 'confirming', 'confirmed', 'expired', 'cancelled', 'refunded')),
    constraint reservations_lease_fits_status check ((status = 'confirming') = (confirming_until is not null)),
    constraint reservations_expiry_after_booking check (expiry_time > booking_time),
    constraint reservations_seats_range check (seats_count >= 1)
);
-- Expiry walks these, oldest first; nothing but active ones is in here.
create index reservations_active_by_expiry on reservations (expiry_time) where status = 'active';
-- Confirmations whose lease may have run out.
create index reservations_confirming_by_lease on reservations (confirming_until) where status = 'confirming';
-- A customer's own, newest first.
create index reservations_by_user on reservations (user_id, id desc);

create table reservation_items (
    id              uuid primary key,
    reservation_id  uuid not null,
    session_seat_id uuid not null,
    price_tier_id   uuid not null,
    -- As the Event Service named them when the seat was reserved.
    row_number      text not null,
    seat_number     text not null,
    -- The Event Service's price times the tier's multiplier, at that moment.
    price           numeric(12, 2) not null,
    discount_amount numeric(12, 2) not null,
    final_price     numeric(12, 2) not null,
    constraint reservation_items_reservation_exists foreign key (reservation_id) references reservations,
    constraint reservation_items_seat_once unique (reservation_id, session_seat_id),
    constraint reservation_items_price_adds_up check (final_price = price - discount_amount and final_price >= 0)
);

-- One row an attempt to charge. The id is the idempotency key towards the provider, so asking twice never charges twice.
create table payments (
    id             uuid primary key,
    reservation_id uuid not null,
    -- What the client gave to pay with.
    payment_id     text,
    amount         numeric(12, 2) not null,
    currency       text not null,
    -- pending: the provider was or will be asked, and its answer is not known.
    status         text not null,
    created_at     timestamptz not null default now(),
    updated_at     timestamptz not null default now(),
    constraint payments_reservation_exists foreign key (reservation_id) references reservations,
    constraint payments_status_known check (status in ('pending', 'captured', 'declined', 'voided'))
);
-- A reservation is paid at most once, and asked about at most once at a time.
create unique index payments_one_live_per_reservation on payments (reservation_id) where status in ('pending', 'captured');
create index payments_by_reservation on payments (reservation_id);

create table tickets (
    id                  uuid primary key,
    reservation_id      uuid not null,
    reservation_item_id uuid not null,
    user_id             uuid not null,
    session_id          uuid not null,
    session_seat_id     uuid not null,
    row_number          text not null,
    seat_number         text not null,
    price               numeric(12, 2) not null,
    status              text not null default 'active',
    created_at          timestamptz not null default now(),
    updated_at          timestamptz not null default now(),
    constraint tickets_reservation_exists foreign key (reservation_id) references reservations,
    constraint tickets_one_per_item unique (reservation_item_id),
    constraint tickets_status_known check (status in ('active', 'used', 'refunded'))
);
-- The last net under "no seat twice": whatever else fails, a seat has one ticket that admits.
create unique index tickets_one_live_per_seat on tickets (session_seat_id) where status <> 'refunded';
create index tickets_by_user on tickets (user_id, id);
create index tickets_by_reservation on tickets (reservation_id);

-- Money to be given back: written with the change that causes it, settled with the provider afterwards, once by its key.
create table refunds (
    -- What it is for, and the idempotency key towards the provider: a ticket's id, or the payment's for all of it.
    id         uuid primary key,
    payment_id uuid not null,
    amount     numeric(12, 2) not null,
    status     text not null default 'pending',
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    constraint refunds_payment_exists foreign key (payment_id) references payments,
    constraint refunds_status_known check (status in ('pending', 'settled'))
);
create index refunds_pending on refunds (created_at) where status = 'pending';
