//! THE AUTHORITY on who has a seat. Only this file writes `session_seats`.
//!
//! ```text
//!             reserve(r)              confirm(r)
//! available ────────────▶ reserved(r) ──────────▶ sold(r)
//!     ▲                        │                     │
//!     └──── free(r) ───────────┘                     │
//!     └──── free(r), refunded ───────────────────────┘
//!
//! available ──▶ blocked      block_free: the session is cancelled. A seat that is freed after that is blocked, too.
//! ```
//!
//! Each change is one conditional statement that names the reservation. `shared-contracts/src/transitions.rs` has the
//! rules, and a test holds random sequences of changes against them. A request changes all of its seats or none, but for
//! `free`. A statement locks its rows in the order of their ids, so two reservations that want the same seats in another
//! order can't deadlock. No clock frees a seat: a hold past `reserved_until` stays until the Booking Service decides the
//! reservation.
//!
//! Each change gives the row a number, `change_seq`, and the id of its transaction, `change_xid`. The number is drawn
//! while the row is locked, so it orders the changes of one seat. The transaction id serves readers that must miss
//! none: `seat_map/stream.rs` and
//! `seat_map/map.rs`.
//!
//! Statements find rows by `session_seat_id` alone and compare `session_id` afterwards. A new session has no statistics
//! yet; with both as keys, the planner may read the whole session for one seat.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use service_kit::http::error::Result;
use shared_contracts::ids::{ReservationId, SeatId, SessionId, SessionSeatId};
use shared_contracts::money::Money;
use shared_contracts::seat::{SeatConflict, SeatStatus};
use shared_contracts::seat_api::{Hold, OverdueHold, OwnedSeat, TimeCursor};
use shared_contracts::transitions::{Seat, SeatStep, Transition};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::seen_snapshot::SeenSnapshot;

/// The outcome of a change that needs all its seats.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChangeOutcome {
    /// All seats are as requested, by this call or by an earlier one.
    Done,
    /// Nothing was changed; these seats conflict.
    Refused(Vec<SeatConflict>),
}

/// A seat before the statement that locks and changes it.
#[derive(Debug)]
struct SeatState {
    session_seat_id: SessionSeatId,
    seat: Seat,
    overdue: bool,
    /// Whether this statement changed it.
    changed: bool,
}

/// Creates the session seats of a new session, one for each seat of its hall, and returns their number.
///
/// # Errors
/// The database failed.
pub async fn create_for_session(tx: &mut PgConnection, session_id: SessionId, base_price: Money) -> Result<u64> {
    // The ids come from here, because PostgreSQL has no UUIDv7 before version 18.
    let seats = sqlx::query_scalar!(
        "select seat_id from seats join sessions using (hall_id) where session_id = $1 order by seat_id",
        session_id as _,
    )
    .fetch_all(&mut *tx)
    .await?;
    let ids: Vec<SessionSeatId> = seats.iter().map(|_| SessionSeatId::new()).collect();
    let created = sqlx::query!(
        "insert into session_seats (session_seat_id, session_id, seat_id, price)
         select session_seat_id, $3, seat_id, $4 from unnest($1::uuid[], $2::uuid[]) as new (session_seat_id, seat_id)",
        ids as _,
        seats as _,
        session_id as _,
        base_price as _,
    )
    .execute(tx)
    .await?
    .rows_affected();
    Ok(created)
}

/// A request of a reservation to hold seats.
#[derive(Debug, Clone)]
pub struct HoldRequest {
    /// The session to which the seats must belong.
    pub session_id: SessionId,
    /// The reservation that will hold the seats.
    pub reservation_id: ReservationId,
    /// The seats, held all or none. No seat may appear twice.
    pub seats: Vec<SessionSeatId>,
    /// The deadline of the hold.
    pub reserved_until: DateTime<Utc>,
}

/// Holds all seats of each request for its reservation, or none of them. Each request succeeds or fails on its own. No
/// seat may be in two requests. Repeating a request is safe.
///
/// # Errors
/// The database failed. The seats may be held all the same, if only its answer was lost.
pub async fn reserve(connection: &mut PgConnection, requests: &[HoldRequest]) -> Result<Vec<ChangeOutcome>> {
    let lines = || {
        requests
            .iter()
            .enumerate()
            .flat_map(|(index, request)| request.seats.iter().map(move |seat| (index, request, *seat)))
    };
    let rows = sqlx::query!(
        r#"with wanted as materialized (
             select * from unnest($1::int4[], $2::uuid[], $3::uuid[], $4::timestamptz[], $5::uuid[])
                 as line (request, session_id, requester, until, session_seat_id)
         ),
         locked as materialized (
             select session_seat_id, session_id, status, reservation_id, reserved_until
             from session_seats where session_seat_id = any($5)
             order by session_seat_id for no key update
         ),
         judged as materialized (
             select *, status = 'available' as free, reservation_id is not distinct from requester as own
             from wanted join locked using (session_seat_id, session_id)
         ),
         whole as materialized (
             select request from wanted left join judged using (request, session_seat_id)
             group by request having bool_and(coalesce(free or own, false))
         ),
         changed as (
             update session_seats s
             set status = 'reserved', reservation_id = j.requester, reserved_until = j.until,
                 change_seq = nextval('session_seat_changes'), change_xid = pg_current_xact_id()
             from judged j join whole using (request)
             where s.session_seat_id = j.session_seat_id and j.free
             returning j.request, s.session_seat_id
         )
         select request as "request!", session_seat_id as "session_seat_id!: SessionSeatId", status, reservation_id,
                status = 'reserved' and reserved_until < clock_timestamp() as "overdue!",
                (request, session_seat_id) in (select request, session_seat_id from changed) as "changed!"
         from judged"#,
        lines().map(|(index, ..)| index as i32).collect::<Vec<_>>() as _,
        lines().map(|(_, request, _)| request.session_id).collect::<Vec<_>>() as _,
        lines().map(|(_, request, _)| request.reservation_id).collect::<Vec<_>>() as _,
        lines().map(|(_, request, _)| request.reserved_until).collect::<Vec<_>>() as _,
        lines().map(|(.., seat)| seat).collect::<Vec<_>>() as _,
    )
    .fetch_all(connection)
    .await?;
    let mut of_request: Vec<Vec<SeatState>> = requests.iter().map(|_| Vec::new()).collect();
    for row in rows {
        of_request[row.request as usize].push(SeatState {
            session_seat_id: row.session_seat_id,
            seat: Seat { status: row.status, reservation_id: row.reservation_id },
            overdue: row.overdue,
            changed: row.changed,
        });
    }
    let outcomes = requests.iter().zip(of_request);
    let outcomes = outcomes
        .map(|(request, states)| all_or_refused(&request.seats, &states, SeatStep::Reserve, request.reservation_id));
    Ok(outcomes.collect())
}

/// The states in which [`free`] frees a seat of its reservation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Releasable {
    /// Held seats. Sold seats stay sold.
    Held,
    /// Held and sold seats. The event of a refund may come before that of the confirmation, which then finds nothing to
    /// sell.
    HeldOrSold,
}

/// Locks the sessions of the seats `$1` against a cancellation, and then the seats. Every transaction locks a session
/// before its seats; the `count(*)` forces that order here.
macro_rules! locked {
    () => {
        "shared as materialized (
             select session_id, status from sessions
             where session_id in (select session_id from session_seats where session_seat_id = any($1))
             order by session_id for share
         ),
         owned as materialized (
             select session_seat_id, status, reservation_id from session_seats
             where session_seat_id = any($1) and (select count(*) from shared) > 0
             order by session_seat_id for no key update
         )"
    };
}

/// Locks the seats, and their sessions against a cancellation, for a transaction of several changes. Each change locks
/// its own seats in order; only locking all of them first puts the whole transaction in order.
///
/// # Errors
/// The database failed.
pub async fn lock(tx: &mut PgConnection, seats: &[SessionSeatId]) -> Result<()> {
    sqlx::query(concat!("with ", locked!(), " select count(*) from owned")).bind(seats).execute(tx).await?;
    Ok(())
}

/// Frees the seats that their reservations still have in a [`Releasable`] state, and returns them. It skips seats that
/// another reservation has by now. This and the cancellation of a session wait for each other; otherwise neither would
/// see the other's change.
///
/// # Errors
/// The database failed.
pub async fn free(connection: &mut PgConnection, holds: &[Hold], releasable: Releasable) -> Result<Vec<SessionSeatId>> {
    let from: &[&str] = match releasable {
        Releasable::Held => &["reserved"],
        Releasable::HeldOrSold => &["reserved", "sold"],
    };
    let freed = sqlx::query_scalar(concat!(
        "with ",
        locked!(),
        " update session_seats s
         set status = case when s.session_id in (select session_id from shared where status = 'cancelled')
                           then 'blocked' else 'available' end,
             reservation_id = null, reserved_until = null,
             change_seq = nextval('session_seat_changes'), change_xid = pg_current_xact_id()
         from owned o join unnest($2::uuid[], $1::uuid[]) as given (reservation_id, session_seat_id) using (reservation_id, session_seat_id)
         where s.session_seat_id = o.session_seat_id and o.status = any($3)
         returning s.session_seat_id"
    ))
    .bind(holds.iter().map(|hold| hold.session_seat_id).collect::<Vec<_>>())
    .bind(holds.iter().map(|hold| hold.reservation_id).collect::<Vec<_>>())
    .bind(from)
    .fetch_all(connection)
    .await?;
    Ok(freed)
}

/// Sells all of `seats`, which the reservation must hold, or none. Repeating it is safe.
///
/// # Errors
/// The database failed.
pub async fn confirm(
    connection: &mut PgConnection,
    reservation_id: ReservationId,
    seats: &[SessionSeatId],
) -> Result<ChangeOutcome> {
    let outcomes = confirm_each(connection, &[(reservation_id, seats)]).await?;
    Ok(outcomes.into_iter().next().unwrap_or(ChangeOutcome::Done))
}

/// Sells each reservation all of its seats, which it must hold, or none of them. Each succeeds or fails on its own,
/// even if two want the same seat. No reservation may be in `orders` twice.
///
/// # Errors
/// The database failed; nothing was changed.
pub async fn confirm_each(
    connection: &mut PgConnection,
    orders: &[(ReservationId, &[SessionSeatId])],
) -> Result<Vec<ChangeOutcome>> {
    let lines = || orders.iter().flat_map(|(owner, seats)| seats.iter().map(|seat| (*owner, *seat)));
    let rows = sqlx::query!(
        r#"with ordered as materialized (
             select * from unnest($1::uuid[], $2::uuid[]) as line (owner, session_seat_id)
         ),
         locked as materialized (
             select session_seat_id, status, reservation_id
             from session_seats where session_seat_id = any($2)
             order by session_seat_id for no key update
         ),
         whole as materialized (
             select owner from ordered left join locked using (session_seat_id)
             group by owner having bool_and(coalesce(reservation_id = owner, false))
         ),
         changed as (
             update session_seats s
             set status = 'sold', reserved_until = null,
                 change_seq = nextval('session_seat_changes'), change_xid = pg_current_xact_id()
             from locked l join whole w on w.owner = l.reservation_id
             where s.session_seat_id = l.session_seat_id and l.status = 'reserved'
             returning s.session_seat_id
         )
         select owner as "owner!: ReservationId", session_seat_id as "session_seat_id!: SessionSeatId", status, reservation_id,
                false as "overdue!",
                reservation_id = owner and session_seat_id in (select session_seat_id from changed) as "changed!"
         from ordered join locked using (session_seat_id)"#,
        lines().map(|(owner, _)| owner).collect::<Vec<_>>() as _,
        lines().map(|(_, seat)| seat).collect::<Vec<_>>() as _,
    )
    .fetch_all(connection)
    .await?;
    let mut of_owner: HashMap<ReservationId, Vec<SeatState>> = HashMap::new();
    for row in rows {
        of_owner.entry(row.owner).or_default().push(SeatState {
            session_seat_id: row.session_seat_id,
            seat: Seat { status: row.status, reservation_id: row.reservation_id },
            overdue: row.overdue,
            changed: row.changed,
        });
    }
    let outcomes = orders.iter().map(|(owner, seats)| {
        let states = of_owner.remove(owner).unwrap_or_default();
        all_or_refused(seats, &states, SeatStep::Confirm, *owner)
    });
    Ok(outcomes.collect())
}

/// Takes all free seats of a cancelled session off sale.
///
/// # Errors
/// The database failed.
pub async fn block_free(tx: &mut PgConnection, session_id: SessionId) -> Result<()> {
    sqlx::query!(
        "with free as materialized (
             select session_seat_id from session_seats where session_id = $1 and status = 'available'
             order by session_seat_id for no key update
         )
         update session_seats s
         set status = 'blocked', change_seq = nextval('session_seat_changes'), change_xid = pg_current_xact_id()
         from free where s.session_seat_id = free.session_seat_id",
        session_id as _,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// Sets the price of all seats of a session. Reservations keep the prices at which they were made.
///
/// # Errors
/// The database failed.
pub async fn set_price(tx: &mut PgConnection, session_id: SessionId, price: Money) -> Result<()> {
    sqlx::query!(
        "with all_seats as materialized (
             select session_seat_id from session_seats where session_id = $1 order by session_seat_id for no key update
         )
         update session_seats s
         set price = $2, change_seq = nextval('session_seat_changes'), change_xid = pg_current_xact_id()
         from all_seats a where s.session_seat_id = a.session_seat_id",
        session_id as _,
        price as _,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// Gives a new change number to a seat in all its sessions, after an edit that changes how maps show it.
///
/// # Errors
/// The database failed.
pub async fn note_change_of(tx: &mut PgConnection, seat_id: SeatId) -> Result<()> {
    sqlx::query!(
        "with shown as materialized (
             select session_seat_id from session_seats where seat_id = $1 order by session_seat_id for no key update
         )
         update session_seats s
         set change_seq = nextval('session_seat_changes'), change_xid = pg_current_xact_id()
         from shown where s.session_seat_id = shown.session_seat_id",
        seat_id as _,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// The number of reserved and sold seats of the session.
///
/// # Errors
/// The database failed.
pub async fn owned(connection: &mut PgConnection, session_id: SessionId) -> Result<i64> {
    let count = sqlx::query_scalar!(
        r#"select count(*) as "count!" from session_seats where session_id = $1 and reservation_id is not null"#,
        session_id as _,
    );
    Ok(count.fetch_one(connection).await?)
}

/// Removes the session's seats that no reservation has. It waits for a hold in progress, whose seats stay; call
/// [`owned`] afterwards to count them.
///
/// # Errors
/// The database failed.
pub async fn remove_unowned(tx: &mut PgConnection, session_id: SessionId) -> Result<()> {
    sqlx::query!(
        "with free as materialized (
             select session_seat_id from session_seats where session_id = $1 and reservation_id is null
             order by session_seat_id for update
         )
         delete from session_seats s using free where s.session_seat_id = free.session_seat_id",
        session_id as _,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// Reserved and sold seats in the order of their ids, after `after`.
///
/// # Errors
/// The database failed.
pub async fn owned_after(connection: &mut PgConnection, after: Uuid, limit: i64) -> Result<Vec<OwnedSeat>> {
    let owned = sqlx::query_as!(
        OwnedSeat,
        r#"select session_seat_id, session_id, status, reservation_id as "reservation_id!" from session_seats
           where session_seat_id > $1 and reservation_id is not null order by session_seat_id limit $2"#,
        after,
        limit,
    )
    .fetch_all(connection)
    .await?;
    Ok(owned)
}

/// Those of `seats`, of any session, that are reserved or sold.
///
/// # Errors
/// The database failed.
pub async fn owned_of(connection: &mut PgConnection, seats: &[SessionSeatId]) -> Result<Vec<OwnedSeat>> {
    let owned = sqlx::query_as!(
        OwnedSeat,
        r#"select session_seat_id, session_id, status, reservation_id as "reservation_id!" from session_seats
           where session_seat_id = any($1) and reservation_id is not null"#,
        seats as _,
    )
    .fetch_all(connection)
    .await?;
    Ok(owned)
}

/// A seat's latest change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeatChange {
    /// The session of the seat.
    pub session_id: SessionId,
    /// The seat that changed.
    pub session_seat_id: SessionSeatId,
    /// The status after the change.
    pub status: SeatStatus,
    /// The change number: a later change of the same seat has a higher one.
    pub version: i64,
}

/// The snapshot of a read, and a change if there is any.
#[derive(Debug)]
struct ChangeRow {
    seen: SeenSnapshot,
    session_id: Option<SessionId>,
    session_seat_id: Option<SessionSeatId>,
    status: Option<SeatStatus>,
    version: Option<i64>,
}

impl ChangeRow {
    fn into_change(self) -> Option<SeatChange> {
        Some(SeatChange {
            session_id: self.session_id?,
            session_seat_id: self.session_seat_id?,
            status: self.status?,
            version: self.version?,
        })
    }
}

/// The latest change of each seat of `sessions` that became visible after the snapshot `from`, in the order of the
/// change numbers, and the snapshot of this read. Without `from`, only the snapshot.
///
/// # Errors
/// The database failed.
pub async fn changes_since(
    connection: &mut PgConnection,
    sessions: &[SessionId],
    from: Option<&SeenSnapshot>,
    limit: i64,
) -> Result<(SeenSnapshot, Vec<SeatChange>)> {
    // One statement, so that the rows belong to the snapshot. The first condition uses the index, and the second is
    // exact.
    let rows = sqlx::query_as!(
        ChangeRow,
        r#"select pg_current_snapshot()::text as "seen!: _", changes.* from (select) as always
           left join lateral (
               select session_id as "session_id?", session_seat_id as "session_seat_id?", status as "status?", change_seq as "version?"
               from session_seats
               where session_id = any($1) and change_xid >= pg_snapshot_xmin($2::pg_snapshot)
                 and not pg_visible_in_snapshot(change_xid, $2::pg_snapshot)
               order by change_seq limit $3
           ) changes on true"#,
        sessions as _,
        from as _,
        limit,
    )
    .fetch_all(connection)
    .await?;
    let seen = rows.first().map(|row| row.seen.clone()).unwrap_or_default();
    let changes = rows.into_iter().filter_map(ChangeRow::into_change);
    Ok((seen, changes.collect()))
}

/// The highest change number of this session; 0 if it has no seats.
///
/// # Errors
/// The database failed.
pub async fn version(connection: &mut PgConnection, session_id: SessionId) -> Result<i64> {
    let version = sqlx::query_scalar!(
        r#"select coalesce(max(change_seq), 0) as "version!" from session_seats where session_id = $1"#,
        session_id as _,
    );
    Ok(version.fetch_one(connection).await?)
}

/// The outcome of a change of `seats`. The statement has decided; the table of transitions tells which seats conflict.
fn all_or_refused(seats: &[SessionSeatId], states: &[SeatState], step: SeatStep, by: ReservationId) -> ChangeOutcome {
    let after = |state: &SeatState| state.seat.after(step, by);
    if states.len() == seats.len() && states.iter().all(|state| state.changed || after(state) == Transition::Unchanged)
    {
        return ChangeOutcome::Done;
    }
    let unknown = seats.iter().filter(|id| !states.iter().any(|state| state.session_seat_id == **id));
    let unknown = unknown.map(|id| SeatConflict::new(*id, None));
    let taken = states.iter().filter(|state| after(state) == Transition::Refused).map(|state| SeatConflict {
        session_seat_id: state.session_seat_id,
        status: Some(state.seat.status),
        overdue_reservation_id: state.seat.reservation_id.filter(|_| state.overdue),
    });
    ChangeOutcome::Refused(unknown.chain(taken).collect())
}

/// Holds that are due before `before` (the present time if `None`), oldest first, after `after`.
///
/// # Errors
/// The database failed.
pub async fn holds_before(
    connection: &mut PgConnection,
    before: Option<DateTime<Utc>>,
    after: Option<TimeCursor>,
    limit: i64,
) -> Result<Vec<OverdueHold>> {
    let holds = sqlx::query_as!(
        OverdueHold,
        r#"select reservation_id as "reservation_id!", session_id, session_seat_id, reserved_until as "reserved_until!"
           from session_seats
           where status = 'reserved' and reserved_until < coalesce($1, now())
             and (reserved_until, session_seat_id) > (coalesce($2, '-infinity'::timestamptz), coalesce($3, '00000000-0000-0000-0000-000000000000'::uuid))
           order by reserved_until, session_seat_id limit $4"#,
        before,
        after.map(|cursor| cursor.time),
        after.map(|cursor| cursor.id),
        limit,
    )
    .fetch_all(connection)
    .await?;
    Ok(holds)
}
