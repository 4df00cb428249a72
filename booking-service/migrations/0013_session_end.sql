-- What a buyer holds says which section it is in and when its session ends. Both are null for older rows.
alter table reservations add column end_time timestamptz;
alter table reservation_items
    add column section text,
    add constraint reservation_items_section_length check (char_length(section) <= 64) not valid;
alter table tickets
    add column section text,
    add constraint tickets_section_length check (char_length(section) <= 64) not valid;
