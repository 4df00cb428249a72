-- Fair use: how much one user may hold open, and have of one session. Checked by the statement that writes the reservation.

-- What a user has, to be counted before more is added. Nothing that has ended is in here.
create index reservations_live_by_user on reservations (user_id) where status in ('active', 'confirming', 'confirmed');

-- Why a reservation may not be written; null when it may. `others_max` and `seats_max` are what the user may have beside it.
--
-- Two reservations of one user at the same time must not both find room. So whoever asks first keeps a lock of this user's own until
-- its commit; and as each statement of a volatile function sees what was committed before that statement began, the next one counts it.
-- `batch` is what the calling statement itself writes: its rows may show here or not, so the caller counts those.
create function reservation_refusal(of_user uuid, of_session uuid, lock_key integer, batch uuid[], others_max bigint, seats_max bigint)
    returns text language plpgsql volatile as $$
declare
    others bigint;
    seats  bigint;
begin
    perform pg_advisory_xact_lock(8, lock_key);
    select count(*) filter (where status <> 'confirmed'), coalesce(sum(seats_count) filter (where session_id = of_session), 0)
    into others, seats
    from reservations
    where user_id = of_user and status in ('active', 'confirming', 'confirmed') and id <> all(batch)
        and (status <> 'active' or expiry_time > clock_timestamp());
    if others > others_max then
        return 'too_many_reservations';
    end if;
    if seats > seats_max then
        -- Those given back again do not count.
        select seats - count(*) into seats
        from reservations r join tickets t on t.reservation_id = r.id
        where r.user_id = of_user and r.session_id = of_session and r.status in ('active', 'confirming', 'confirmed') and t.status = 'refunded';
        if seats > seats_max then
            return 'too_many_seats';
        end if;
    end if;
    return null;
end
$$;
