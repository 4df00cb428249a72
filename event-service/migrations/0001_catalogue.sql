-- The catalogue: who puts on what, and where. Lists are ordered by id: ids are UUIDv7, so that is the order of creation.
-- Length limits stand here and in the request types; a client meets those first.

create table organizers (
    organizer_id  uuid primary key,
    name          text not null,
    description   text,
    contact_email text,
    contact_phone text,
    created_at    timestamptz not null default now(),
    updated_at    timestamptz not null default now(),
    constraint organizers_name_length check (char_length(name) between 1 and 200)
);

create table events (
    event_id     uuid primary key,
    organizer_id uuid not null,
    title        text not null,
    description  text,
    event_type   text not null,
    created_at   timestamptz not null default now(),
    updated_at   timestamptz not null default now(),
    constraint events_organizer_exists foreign key (organizer_id) references organizers,
    constraint events_title_length check (char_length(title) between 1 and 200),
    constraint events_type_known check (event_type in ('concert', 'sport', 'movie', 'theatre', 'conference', 'other'))
);
-- For the foreign key's own check, and for an organizer's events in order of creation.
create index events_by_organizer on events (organizer_id, event_id);

create table locations (
    location_id uuid primary key,
    name        text not null,
    address     text not null,
    city        text not null,
    country     text not null,
    -- An IANA zone; the service checks it against its own list, as a check constraint can't.
    timezone    text not null,
    created_at  timestamptz not null default now(),
    updated_at  timestamptz not null default now(),
    constraint locations_name_length check (char_length(name) between 1 and 200)
);

create table halls (
    hall_id     uuid primary key,
    location_id uuid not null,
    name        text not null,
    -- The most seats it may have. Held by a lock on this row while seats are added.
    capacity    integer not null,
    created_at  timestamptz not null default now(),
    updated_at  timestamptz not null default now(),
    constraint halls_location_exists foreign key (location_id) references locations,
    constraint halls_name_length check (char_length(name) between 1 and 200),
    constraint halls_capacity_range check (capacity between 1 and 200000)
);
create index halls_by_location on halls (location_id, hall_id);

create table seats (
    seat_id     uuid primary key,
    hall_id     uuid not null,
    -- Labels, not quantities: "12b" is a seat number.
    row_number  text not null,
    seat_number text not null,
    section     text,
    seat_type   text not null,
    -- Where to draw it; any unit the organizer likes.
    x           double precision,
    y           double precision,
    constraint seats_hall_exists foreign key (hall_id) references halls,
    constraint seats_row_length check (char_length(row_number) between 1 and 16),
    constraint seats_number_length check (char_length(seat_number) between 1 and 16),
    constraint seats_type_known check (seat_type in ('regular', 'vip', 'premium', 'wheelchair', 'companion', 'standing')),
    -- Two chairs with the same labels could not be told apart on a ticket. A missing section counts as one.
    constraint seats_labels_once unique nulls not distinct (hall_id, section, row_number, seat_number)
);
-- A hall's seats in order of creation.
create index seats_by_hall on seats (hall_id, seat_id);
