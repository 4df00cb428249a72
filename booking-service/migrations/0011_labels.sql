-- Labels of up to 32 characters, as the Event Service has them. Not checked against present rows here: every shorter
-- label fits, and 0012 checks without blocking anybody.
alter table reservation_items
    drop constraint reservation_items_row_length,
    drop constraint reservation_items_number_length,
    add constraint reservation_items_row_length check (char_length(row_number) between 1 and 32) not valid,
    add constraint reservation_items_number_length check (char_length(seat_number) between 1 and 32) not valid;
alter table tickets
    drop constraint tickets_row_length,
    drop constraint tickets_number_length,
    add constraint tickets_row_length check (char_length(row_number) between 1 and 32) not valid,
    add constraint tickets_number_length check (char_length(seat_number) between 1 and 32) not valid;
