-- Reads the tables while others go on reading and writing them.
alter table reservation_items validate constraint reservation_items_row_length;
alter table reservation_items validate constraint reservation_items_number_length;
alter table tickets validate constraint tickets_row_length;
alter table tickets validate constraint tickets_number_length;
