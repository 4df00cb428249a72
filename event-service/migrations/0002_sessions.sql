-- Sessions, and the one table that says who has a seat.

create extension if not exists btree_gist;

create table sessions (
    session_id  uuid primary key,
    event_id    uuid not null,
    hall_id     uuid not null,
    start_time  timestamptz not null,
    end_time    timestamptz not null,
    base_price  numeric(12, 2) not null,
    currency    text not null,
    -- When seats may be bought; open-ended where null.
    sales_start timestamptz,
    sales_end   timestamptz,
    status      text not null default 'scheduled',
    created_at  timestamptz not null default now(),
    updated_at  timestamptz not null default now(),
    constraint sessions_event_exists foreign key (event_id) references events,
    constraint sessions_hall_exists foreign key (hall_id) references halls,
    constraint sessions_end_after_start check (end_time > start_time),
    constraint sessions_sales_end_after_start check (sales_end > sales_start),
    constraint sessions_base_price_range check (base_price >= 0),
    constraint sessions_currency_form check (currency ~ '^[A-Z]{3}$'),
    constraint sessions_status_known check (status in ('scheduled', 'cancelled')),
    -- A hall holds one performance at a time. Half-open ranges: one may begin when another ends.
    constraint sessions_no_overlap exclude using gist (hall_id with =, tstzrange(start_time, end_time) with &&)
        where (status <> 'cancelled')
);
create index sessions_by_event on sessions (event_id, session_id);

-- Numbers every change of any session seat, so that a reader can ask for what is newer than what it has.
-- A lower number can become visible after a higher one: transactions commit in their own order.
create sequence session_seat_changes;

create table session_seats (
    session_seat_id uuid primary key,
    session_id      uuid not null,
    seat_id         uuid not null,
    price           numeric(12, 2) not null,
    status          text not null default 'available',
    -- Who holds or owns it. Named by every change, so that nobody can move a seat that is not theirs.
    reservation_id  uuid,
    -- When the hold is due. Passing it frees nothing: the Booking Service says what became of the reservation.
    reserved_until  timestamptz,
    change_seq      bigint not null default nextval('session_seat_changes'),
    constraint session_seats_session_exists foreign key (session_id) references sessions,
    constraint session_seats_seat_exists foreign key (seat_id) references seats,
    constraint session_seats_status_known check (status in ('available', 'reserved', 'sold', 'blocked')),
    constraint session_seats_one_per_seat unique (seat_id, session_id),
    -- A held seat has an owner and a deadline, a sold one an owner, a free one neither.
    constraint session_seats_owner_fits_status check (
        case status
            when 'reserved' then reservation_id is not null and reserved_until is not null
            when 'sold' then reservation_id is not null and reserved_until is null
            else reservation_id is null and reserved_until is null
        end
    )
)
-- Room on each page for the next versions of its rows: a seat changes two or three times in its life.
with (fillfactor = 70);
-- A session's seats, and its newest change in one step.
create index session_seats_by_change on session_seats (session_id, change_seq);
-- Reconciliation walks holds in this order; nothing but holds is in here.
create index session_seats_holds_by_deadline on session_seats (reserved_until, session_seat_id) where status = 'reserved';
