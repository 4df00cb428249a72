//! THE AUTHORITY on who has a seat. Only this file writes `session_seats`.
//!
//! ```text
//!             reserve(r)              confirm(r)
//! available ────────────▶ reserved(r) ──────────▶ sold(r)
//!     ▲                        │                     │
//!     └──── release(r) ────────┘                     │
//!     └──── refund(r) ───────────────────────────────┘
//! ```
//!
//! Each change is one conditional statement that names the reservation. It locks the rows in the order of their ids, so two
//! reservations that want the same seats in another order can't deadlock, and it changes all of them or none.
//! No clock frees a seat: a hold past `reserved_until` stays until the Booking Service says what became of the reservation.
//!
//! Statements look rows up by `session_seat_id` alone and compare `session_id` afterwards: with both as keys, and no
//! statistics yet for a session that has just been made, the planner may read the whole session for one seat.

use chrono::{DateTime, Utc};
use service_kit::error::Result;
use shared_contracts::ids::{ReservationId, SessionId, SessionSeatId};
use shared_contracts::money::Money;
use shared_contracts::seat_api::{HoldCursor, OverdueHold, SeatConflict, SeatStatus};
use sqlx::{FromRow, PgConnection};
use uuid::Uuid;

/// What became of a change that needs all its seats.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChangeOutcome {
    /// All seats are now as asked for, whether by this call or by an earlier one.
    Done,
    /// Nothing was changed: these seats stopped it.
    Refused(Vec<SeatConflict>),
}

/// One seat's state, locked by the statement that reads it.
#[derive(Debug, FromRow)]
struct SeatState {
    session_seat_id: SessionSeatId,
    status: SeatStatus,
    reservation_id: Option<ReservationId>,
    overdue: bool,
    /// Whether this statement changed it.
    changed: bool,
}

/// Makes the session seats of a new session: one for each seat of its hall. Returns how many.
///
/// # Errors
/// The database failed.
pub async fn create_for_session(tx: &mut PgConnection, session_id: SessionId, base_price: Money) -> Result<u64> {
    // The ids are made here and not by the server, which has no UUIDv7 before version 18.
    let seats: Vec<Uuid> = sqlx::query_scalar(
        "select seat_id from seats join sessions using (hall_id) where session_id = $1 order by seat_id",
    )
    .bind(session_id)
    .fetch_all(&mut *tx)
    .await?;
    let ids: Vec<SessionSeatId> = seats.iter().map(|_| SessionSeatId::new()).collect();
    let created = sqlx::query(
        "insert into session_seats (session_seat_id, session_id, seat_id, price)
         select session_seat_id, $3, seat_id, $4 from unnest($1::uuid[], $2::uuid[]) as made (session_seat_id, seat_id)",
    )
    .bind(ids)
    .bind(seats)
    .bind(session_id)
    .bind(base_price)
    .execute(tx)
    .await?
    .rows_affected();
    Ok(created)
}

/// Holds all of `seats` for the reservation, or none. Harmless when repeated by the same reservation.
///
/// # Errors
/// The database failed.
pub async fn reserve(
    connection: &mut PgConnection,
    session_id: SessionId,
    reservation_id: ReservationId,
    seats: &[SessionSeatId],
    reserved_until: DateTime<Utc>,
) -> Result<ChangeOutcome> {
    let states: Vec<SeatState> = sqlx::query_as(
        "with wanted as materialized (
             select session_seat_id, session_id, status, reservation_id, reserved_until
             from session_seats where session_seat_id = any($1)
             order by session_seat_id for no key update
         ),
         judged as materialized (
             select *,
                    session_id = $2 and status = 'available' as free,
                    session_id = $2 and reservation_id = $3 as own
             from wanted
         ),
         changed as (
             update session_seats s
             set status = 'reserved', reservation_id = $3, reserved_until = $4, change_seq = nextval('session_seat_changes')
             from judged j
             where s.session_seat_id = j.session_seat_id and j.free
               and (select count(*) from judged where free or own) = cardinality($1)
             returning s.session_seat_id
         )
         select session_seat_id, status, reservation_id,
                status = 'reserved' and reserved_until < clock_timestamp() as overdue,
                session_seat_id in (select session_seat_id from changed) as changed
         from judged where session_id = $2",
    )
    .bind(seats)
    .bind(session_id)
    .bind(reservation_id)
    .bind(reserved_until)
    .fetch_all(connection)
    .await?;
    let is_held = |state: &SeatState| state.changed || state.reservation_id == Some(reservation_id);
    Ok(all_or_refused(seats, &states, is_held, |state| !is_held(state) && state.status != SeatStatus::Available))
}

/// Frees what the reservation holds of `seats` and returns those. A sold seat, or another's, is left alone.
///
/// # Errors
/// The database failed.
pub async fn release(
    connection: &mut PgConnection,
    reservation_id: ReservationId,
    seats: &[SessionSeatId],
) -> Result<Vec<SessionSeatId>> {
    free(connection, reservation_id, seats, &["reserved"]).await
}

/// Frees what the reservation owns or still holds of `seats` and returns those.
///
/// A hold counts, because a refund may be heard of before the confirmation that it follows; that one then finds nothing to sell.
///
/// # Errors
/// The database failed.
pub async fn refund(
    connection: &mut PgConnection,
    reservation_id: ReservationId,
    seats: &[SessionSeatId],
) -> Result<Vec<SessionSeatId>> {
    free(connection, reservation_id, seats, &["reserved", "sold"]).await
}

async fn free(
    connection: &mut PgConnection,
    reservation_id: ReservationId,
    seats: &[SessionSeatId],
    from: &[&str],
) -> Result<Vec<SessionSeatId>> {
    let freed = sqlx::query_scalar(
        "with owned as materialized (
             select session_seat_id, status, reservation_id from session_seats where session_seat_id = any($1)
             order by session_seat_id for no key update
         )
         update session_seats s
         set status = 'available', reservation_id = null, reserved_until = null, change_seq = nextval('session_seat_changes')
         from owned o
         where s.session_seat_id = o.session_seat_id and o.reservation_id = $2 and o.status = any($3)
         returning s.session_seat_id",
    )
    .bind(seats)
    .bind(reservation_id)
    .bind(from)
    .fetch_all(connection)
    .await?;
    Ok(freed)
}

/// Sells to the reservation all of `seats`, which it must hold, or none. Harmless when repeated.
///
/// # Errors
/// The database failed.
pub async fn confirm(
    connection: &mut PgConnection,
    reservation_id: ReservationId,
    seats: &[SessionSeatId],
) -> Result<ChangeOutcome> {
    let states: Vec<SeatState> = sqlx::query_as(
        "with wanted as materialized (
             select session_seat_id, status, reservation_id
             from session_seats where session_seat_id = any($1)
             order by session_seat_id for no key update
         ),
         changed as (
             update session_seats s
             set status = 'sold', reserved_until = null, change_seq = nextval('session_seat_changes')
             from wanted w
             where s.session_seat_id = w.session_seat_id and w.reservation_id = $2 and w.status = 'reserved'
               and (select count(*) from wanted where reservation_id = $2) = cardinality($1)
             returning s.session_seat_id
         )
         select session_seat_id, status, reservation_id, false as overdue,
                session_seat_id in (select session_seat_id from changed) as changed
         from wanted",
    )
    .bind(seats)
    .bind(reservation_id)
    .fetch_all(connection)
    .await?;
    let is_sold = |state: &SeatState| {
        state.reservation_id == Some(reservation_id) && (state.changed || state.status == SeatStatus::Sold)
    };
    let is_owned = |state: &SeatState| state.reservation_id == Some(reservation_id);
    Ok(all_or_refused(seats, &states, is_sold, |state| !is_owned(state)))
}

fn all_or_refused(
    seats: &[SessionSeatId],
    states: &[SeatState],
    is_done: impl Fn(&SeatState) -> bool,
    stopped_it: impl Fn(&SeatState) -> bool,
) -> ChangeOutcome {
    if states.len() == seats.len() && states.iter().all(is_done) {
        return ChangeOutcome::Done;
    }
    let unknown = seats.iter().filter(|id| !states.iter().any(|state| state.session_seat_id == **id));
    let unknown = unknown.map(|id| SeatConflict { session_seat_id: *id, status: None, overdue_reservation_id: None });
    let taken = states.iter().filter(|state| stopped_it(state)).map(|state| SeatConflict {
        session_seat_id: state.session_seat_id,
        status: Some(state.status),
        overdue_reservation_id: state.reservation_id.filter(|_| state.overdue),
    });
    ChangeOutcome::Refused(unknown.chain(taken).collect())
}

/// One seat as `check-availability` sees it.
#[derive(Debug, FromRow)]
pub struct SeatLook {
    /// The seat.
    pub session_seat_id: SessionSeatId,
    /// Who has it.
    pub status: SeatStatus,
    /// Held past its time.
    pub overdue: bool,
}

/// Looks at seats of a session without changing or locking anything; unknown ones are left out.
///
/// # Errors
/// The database failed.
pub async fn look(
    connection: &mut PgConnection,
    session_id: SessionId,
    seats: &[SessionSeatId],
) -> Result<Vec<SeatLook>> {
    let looks = sqlx::query_as(
        "select session_seat_id, status, status = 'reserved' and reserved_until < clock_timestamp() as overdue
         from (select * from session_seats where session_seat_id = any($1) offset 0) s
         where session_id = $2",
    )
    .bind(seats)
    .bind(session_id)
    .fetch_all(connection)
    .await?;
    Ok(looks)
}

/// Holds that are due before `before` (now, when absent), oldest first, after `after`.
///
/// # Errors
/// The database failed.
pub async fn holds_before(
    connection: &mut PgConnection,
    before: Option<DateTime<Utc>>,
    after: Option<HoldCursor>,
    limit: i64,
) -> Result<Vec<OverdueHold>> {
    let holds = sqlx::query_as(
        "select reservation_id, session_id, session_seat_id, reserved_until from session_seats
         where status = 'reserved' and reserved_until < coalesce($1, now())
           and (reserved_until, session_seat_id) > (coalesce($2, '-infinity'::timestamptz), coalesce($3, '00000000-0000-0000-0000-000000000000'::uuid))
         order by reserved_until, session_seat_id limit $4",
    )
    .bind(before)
    .bind(after.map(|cursor| cursor.reserved_until))
    .bind(after.map(|cursor| cursor.session_seat_id))
    .bind(limit)
    .fetch_all(connection)
    .await?;
    Ok(holds)
}
