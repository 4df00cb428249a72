-- For readers that follow a session's changes. Numbers from a sequence become visible in another order than they were drawn, so
-- "newer than the last number seen" can miss one. Transaction ids tell exactly: "of a transaction that was not visible in the
-- snapshot of my last look" misses none. The number stays: it orders the changes of one seat, as it is drawn while that seat's
-- row is locked.

alter table session_seats add column change_xid xid8 not null default pg_current_xact_id();
create index session_seats_by_change_xid on session_seats (session_id, change_xid);
drop index session_seats_by_change;
