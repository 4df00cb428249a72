//! What a reservation is: its rows, how they are read, and the answers for one that a request can't have or change.

use std::collections::HashMap;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use service_kit::http::error::{Error, Result};
use shared_contracts::ids::{PriceTierId, ReservationId, ReservationItemId, SessionId, SessionSeatId, UserId};
use shared_contracts::label::Label;
use shared_contracts::money::{Currency, Money};
use shared_contracts::problem::{Code, Problem};
use shared_contracts::seat_api::Hold;
use shared_contracts::transitions::ReservationState;
use sqlx::{FromRow, PgExecutor, PgPool};
use utoipa::ToSchema;
use uuid::Uuid;

/// The condition of who may see a reservation: its owner (`$2`), or for an admin (null) anyone. What a booking abandoned before it wrote
/// it is nobody's, and there for nobody.
macro_rules! owned {
    () => {
        "(user_id = $2 or $2::uuid is null and user_id <> '00000000-0000-0000-0000-000000000000')"
    };
}
pub(super) use owned;

/// From the look at the clock to the reservation's row. Past it the row is not written any more, so that after this time
/// (and a margin) reconciliation may take a hold without a row for abandoned.
pub(crate) const BOOKING_TIME_MAX: Duration = Duration::from_secs(5);

/// How long one confirmation may ask the provider before others may settle it: longer than any answer takes.
pub(crate) const LEASE_SECONDS: f64 = 30.0;

/// A customer's order of seats of one session.
#[derive(Debug, Clone, Serialize, Deserialize, FromRow, ToSchema)]
pub struct Reservation {
    /// Identifies the reservation; a UUIDv7.
    pub id: ReservationId,
    /// The customer that made the reservation.
    pub user_id: UserId,
    /// The session whose seats are reserved.
    pub session_id: SessionId,
    /// When it was made.
    pub booking_time: DateTime<Utc>,
    /// When it ends unless it is paid.
    pub expiry_time: DateTime<Utc>,
    /// How many seats.
    pub seats_count: i32,
    /// What it costs.
    pub total_amount: Money,
    /// In which currency.
    pub currency: Currency,
    /// What became of it.
    pub status: ReservationStatus,
    /// One item for each reserved seat.
    #[sqlx(skip)]
    pub items: Vec<ReservationItem>,
    /// When its row was made.
    pub created_at: DateTime<Utc>,
    /// When its row last changed.
    pub updated_at: DateTime<Utc>,
    /// How long it may still be paid; 0 when it is not active.
    pub time_remaining_seconds: i64,
}

/// One seat of a reservation.
#[derive(Debug, Clone, Serialize, Deserialize, FromRow, ToSchema)]
pub struct ReservationItem {
    /// Identifies the item; a UUIDv7.
    #[sqlx(rename = "item_id")]
    pub id: ReservationItemId,
    /// The reserved seat of the session.
    pub session_seat_id: SessionSeatId,
    /// The tier that made its price.
    pub price_tier_id: PriceTierId,
    /// The seat's row.
    pub row_number: Label,
    /// The seat's number.
    pub seat_number: Label,
    /// The seat's price times the tier's multiplier.
    pub price: Money,
    /// What is taken off it.
    pub discount_amount: Money,
    /// What is to be paid.
    pub final_price: Money,
}

/// What became of a reservation, as clients see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, sqlx::Type, ToSchema)]
#[serde(rename_all = "snake_case")]
#[sqlx(type_name = "text", rename_all = "snake_case")]
pub enum ReservationStatus {
    /// Its seats are held; it may be paid.
    Active,
    /// Paid: its seats are sold.
    Confirmed,
    /// Not paid in time.
    Expired,
    /// Given up by the customer.
    Cancelled,
    /// All its tickets were given back.
    Refunded,
}

/// The columns of [`Reservation`], for `query_as`. An active one past its time is shown as what it is about to be.
pub(super) const COLUMNS: &str = "id, user_id, session_id, booking_time, expiry_time, seats_count, total_amount, currency,
    case when status = 'confirming' then 'active' when status = 'active' and expiry_time <= now() then 'expired' else status end as status,
    created_at, updated_at,
    case when status in ('active', 'confirming') then greatest(0, floor(extract(epoch from expiry_time - now())))::int8 else 0 end
        as time_remaining_seconds";

/// The columns of [`Line`], out of `own` with those of [`COLUMNS`] and of the items beside it.
pub(super) const LINES: &str = "own.*, item.id as item_id, session_seat_id, price_tier_id, row_number, seat_number, price, discount_amount, final_price
    from own join reservation_items item on item.reservation_id = own.id";

/// One of a reservation's items, beside it.
#[derive(Debug, FromRow)]
pub(super) struct Line {
    #[sqlx(flatten)]
    pub(super) reservation: Reservation,
    #[sqlx(flatten)]
    pub(super) item: ReservationItem,
}

/// Reservations out of their lines, in which those of one follow each other.
pub(super) fn gather(lines: Vec<Line>) -> Vec<Reservation> {
    let mut gathered: Vec<Reservation> = Vec::new();
    for Line { reservation, item } in lines {
        match gathered.last_mut() {
            Some(last) if last.id == reservation.id => last.items.push(item),
            _ => gathered.push(Reservation { items: vec![item], ..reservation }),
        }
    }
    gathered
}

/// The reservation, if it is this owner's; anyone's, when none is given.
pub(crate) async fn find(db: &PgPool, id: ReservationId, owner: Option<UserId>) -> Result<Reservation> {
    let sql = format!(
        "with own as (select {COLUMNS} from reservations where id = $1 and {}) select {LINES} order by item.id",
        owned!()
    );
    let lines: Vec<Line> = sqlx::query_as(sqlx::AssertSqlSafe(sql)).bind(id).bind(owner).fetch_all(db).await?;
    gather(lines).pop().ok_or_else(|| not_found(id))
}

/// Up to `limit` of the owner's reservations with ids below `before`, newest first; with `status`, only those in that state.
pub(crate) async fn list(
    db: &PgPool,
    owner: UserId,
    before: Uuid,
    limit: i64,
    status: Option<ReservationStatus>,
) -> Result<Vec<Reservation>> {
    let sql = format!(
        "with own as (
             select * from (select {COLUMNS} from reservations where user_id = $1 and id < $2) all_own
             where $4::text is null or status = $4 order by id desc limit $3
         )
         select {LINES} order by own.id desc, item.id"
    );
    let lines: Vec<Line> = sqlx::query_as(sqlx::AssertSqlSafe(sql))
        .bind(owner)
        .bind(before)
        .bind(limit)
        .bind(status)
        .fetch_all(db)
        .await?;
    Ok(gather(lines))
}

/// A reservation's state, and whether its time is not over yet.
#[derive(Debug, Clone, Copy, FromRow)]
pub(crate) struct Standing {
    #[sqlx(rename = "status")]
    pub(crate) state: ReservationState,
    pub(crate) in_time: bool,
}

/// How the reservation stands, if it is this owner's; anyone's, when none is given.
pub(crate) async fn standing(db: &PgPool, id: ReservationId, owner: Option<UserId>) -> Result<Standing> {
    let sql = concat!(
        "select status, expiry_time > clock_timestamp() as in_time from reservations where id = $1 and ",
        owned!()
    );
    let found: Option<Standing> = sqlx::query_as(sql).bind(id).bind(owner).fetch_optional(db).await?;
    found.ok_or_else(|| not_found(id))
}

/// The states of those of `ids` that exist.
pub(crate) async fn states(
    db: impl PgExecutor<'_>,
    ids: &[ReservationId],
) -> Result<HashMap<ReservationId, ReservationState>> {
    let states: Vec<(ReservationId, ReservationState)> =
        sqlx::query_as("select id, status from reservations where id = any($1)").bind(ids).fetch_all(db).await?;
    Ok(states.into_iter().collect())
}

/// A hold of a seat, and the seat's session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionHold {
    /// The session of the held seat.
    pub session_id: SessionId,
    /// The seat and the reservation that holds it.
    pub hold: Hold,
}

/// The answer for an id that is unknown or another user's: the two can't be told apart.
pub(crate) fn not_found(id: ReservationId) -> Error {
    Error::refused(Code::ReservationNotFound, format!("You have no reservation with the id {id}."))
}

/// The answer to who wants more of a reservation than its state allows. One that is active has run out of time.
pub(crate) fn refusal(state: ReservationState) -> Error {
    let (code, detail) = match state {
        ReservationState::Active | ReservationState::Expired => {
            (Code::ReservationExpired, "Its time is over and its seats are on sale again. Reserve anew.")
        }
        ReservationState::Confirming => {
            (Code::ConfirmationInProgress, "A payment for it is under way. Look at the reservation in a moment.")
        }
        ReservationState::Confirmed => (Code::ReservationConfirmed, "It is paid. Give its tickets back instead."),
        ReservationState::Cancelled => {
            (Code::ReservationCancelled, "It was cancelled and its seats are on sale again. Reserve anew.")
        }
        ReservationState::Refunded => {
            (Code::ReservationRefunded, "Its tickets were given back and its seats are on sale again. Reserve anew.")
        }
    };
    let problem = Problem::new(code, detail);
    if state == ReservationState::Confirming { problem.retry_after(2).into() } else { problem.into() }
}
