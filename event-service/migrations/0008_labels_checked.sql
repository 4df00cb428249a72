-- Reads the table while others go on reading and writing it.
alter table seats validate constraint seats_row_length;
alter table seats validate constraint seats_number_length;
