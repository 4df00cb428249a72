-- Editing: versions for If-Match, the limits that until now only the request types had, and the way to a session's reservations.

alter table price_tiers
    add column version bigint not null default 1,
    add constraint price_tiers_description_length check (char_length(description) <= 1000);

alter table tickets
    add constraint tickets_row_length check (char_length(row_number) between 1 and 16),
    add constraint tickets_number_length check (char_length(seat_number) between 1 and 16);

alter table reservation_items
    add constraint reservation_items_row_length check (char_length(row_number) between 1 and 16),
    add constraint reservation_items_number_length check (char_length(seat_number) between 1 and 16);

-- A cancelled session's reservations that are still to be ended. Nothing else is in here.
create index reservations_live_by_session on reservations (session_id, id) where status in ('active', 'confirming', 'confirmed');
