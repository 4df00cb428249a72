-- Labels of up to 32 characters, and one key for labels that look the same.

-- Not checked against present rows here: every shorter label fits, and 0008 checks without blocking anybody.
alter table seats
    drop constraint seats_row_length,
    drop constraint seats_number_length,
    add constraint seats_row_length check (char_length(row_number) between 1 and 32) not valid,
    add constraint seats_number_length check (char_length(seat_number) between 1 and 32) not valid,
    -- What section, row and number look like; the service computes it (shared_contracts::text). Null until it has, and
    -- for a seat that looked like another one before this migration.
    add column folded_label text;

-- All rows are null now, so this takes one scan of the table.
create unique index seats_looks_once on seats (hall_id, folded_label) where folded_label is not null;
-- What is left to fill. It becomes empty, up to the seats that look alike.
create index seats_unfolded on seats (seat_id) where folded_label is null;

-- An older version of the service that still runs changes labels and not their key. The key is filled again.
create function forget_folded_label() returns trigger language plpgsql as $$
begin
    new.folded_label := null;
    return new;
end $$;
create trigger seats_relabelled before update of section, row_number, seat_number on seats
    for each row when (
        new.folded_label is not distinct from old.folded_label
        and (new.section, new.row_number, new.seat_number) is distinct from (old.section, old.row_number, old.seat_number)
    ) execute function forget_folded_label();
