-- Fair use: how much one user may hold open, and have of one session. Checked by the statement that writes the reservation.

-- What a user has, to be counted before more is added. Nothing that has ended is in here.
create index reservations_live_by_user on reservations (user_id) where status in ('active', 'confirming', 'confirmed');

-- Of reservations to be written, the places of those that may not be, and why. `others_max` and `seats_max` are what the user may have
-- beside it; null: whatever there is.
--
-- Two reservations of one user at the same time must not both find room. So whoever asks first keeps a lock of this user's own until
-- its commit; and as each statement of a volatile function sees what was committed before that statement began, the next one counts it.
-- `batch` is what the calling statement itself writes: its rows may show here or not, so the caller counts those.
create function reservation_refusals(users uuid[], sessions uuid[], lock_keys integer[], batch uuid[], others_max bigint[], seats_max bigint[])
    returns table (place bigint, refusal text) language plpgsql volatile as $$
begin
    -- In this order everywhere, so that two who want the same two locks do not wait for each other.
    perform pg_advisory_xact_lock(8, key)
    from (select distinct key from unnest(lock_keys, others_max) as wanted (key, max) where max is not null order by key) keys;
    return query
    select wanted.place,
           case
               when has.others > wanted.others_max then 'too_many_reservations'
               -- Those given back again do not count.
               when has.seats > wanted.seats_max and has.seats - (
                   select count(*) from reservations r join tickets t on t.reservation_id = r.id
                   where r.user_id = wanted.user_id and r.session_id = wanted.session_id
                     and r.status in ('active', 'confirming', 'confirmed') and t.status = 'refunded'
               ) > wanted.seats_max then 'too_many_seats'
           end
    from unnest(users, sessions, reservation_refusals.others_max, reservation_refusals.seats_max) with ordinality
             as wanted (user_id, session_id, others_max, seats_max, place)
    cross join lateral (
        select count(*) filter (where r.status <> 'confirmed') as others,
               coalesce(sum(r.seats_count) filter (where r.session_id = wanted.session_id), 0) as seats
        from reservations r
        where r.user_id = wanted.user_id and r.status in ('active', 'confirming', 'confirmed') and r.id <> all(batch)
          and (r.status <> 'active' or r.expiry_time > clock_timestamp())
    ) has
    where wanted.others_max is not null;
end
$$;
