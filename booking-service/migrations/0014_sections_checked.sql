-- Reads the tables while others go on reading and writing them.
alter table reservation_items validate constraint reservation_items_section_length;
alter table tickets validate constraint tickets_section_length;
