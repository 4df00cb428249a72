-- Editing: versions for If-Match, and the limits of every text and amount, which until now only the request types had.

alter table organizers
    add column version bigint not null default 1,
    add constraint organizers_description_length check (char_length(description) <= 5000),
    add constraint organizers_contact_email_length check (char_length(contact_email) <= 254),
    add constraint organizers_contact_email_form check (contact_email like '_%@_%'),
    add constraint organizers_contact_phone_length check (char_length(contact_phone) <= 50);

alter table events
    add column version bigint not null default 1,
    add constraint events_description_length check (char_length(description) <= 5000);

alter table locations
    add column version bigint not null default 1,
    add constraint locations_address_length check (char_length(address) between 1 and 500),
    add constraint locations_city_length check (char_length(city) between 1 and 200),
    add constraint locations_country_length check (char_length(country) between 1 and 200),
    add constraint locations_timezone_length check (char_length(timezone) between 1 and 64);

alter table halls
    add column version bigint not null default 1;

alter table seats
    add column version bigint not null default 1,
    add constraint seats_section_length check (char_length(section) <= 64);

alter table sessions
    add column version bigint not null default 1,
    -- When it was cancelled. The Booking Service asks for those of late, and ends their reservations.
    add column cancelled_at timestamptz;
update sessions set cancelled_at = updated_at where status = 'cancelled';
alter table sessions
    add constraint sessions_cancelled_at_fits_status check ((status = 'cancelled') = (cancelled_at is not null));
create index sessions_cancelled on sessions (cancelled_at, session_id) where status = 'cancelled';

-- Words within titles and descriptions, wherever they stand in a word.
create extension if not exists pg_trgm;
create index events_by_text on events using gin ((title || ' ' || coalesce(description, '')) gin_trgm_ops);
