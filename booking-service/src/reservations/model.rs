//! The reservation model: its rows, the queries that read them, and the errors for a reservation that a request can't
//! see or change.

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

/// The SQL condition on who may see a reservation: its owner (`$2`), or anyone for an admin (`$2` is null). Nobody sees
/// the row of an abandoned booking, which has no owner.
macro_rules! owned {
    () => {
        "(user_id = $2 or $2::uuid is null and user_id <> '00000000-0000-0000-0000-000000000000')"
    };
}
pub(super) use owned;

/// The time limit of a booking, from reading the clock to writing the reservation's row. The database refuses the row
/// after that. So reconciliation, with a margin, may treat an older hold without a row as abandoned.
pub(crate) const BOOKING_TIME_MAX: Duration = Duration::from_secs(5);

/// How long one confirmation may ask the provider before reconciliation may settle it: longer than any answer takes.
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
    /// When the booking began; the hold time counts from here.
    pub booking_time: DateTime<Utc>,
    /// When the reservation expires unless it is paid; not after the session's end.
    pub expiry_time: DateTime<Utc>,
    /// When the session ends, as it was when the seats were reserved. Nothing is paid after that. Null for
    /// reservations of an older version.
    #[serde(default)]
    pub end_time: Option<DateTime<Utc>>,
    /// The number of seats.
    pub seats_count: i32,
    /// The price of all its seats together.
    pub total_amount: Money,
    /// The currency of all its amounts.
    pub currency: Currency,
    /// The state of the reservation.
    pub status: ReservationStatus,
    /// One item for each reserved seat.
    #[sqlx(skip)]
    pub items: Vec<ReservationItem>,
    /// When the reservation was stored.
    pub created_at: DateTime<Utc>,
    /// When the reservation last changed.
    pub updated_at: DateTime<Utc>,
    /// The seconds left to pay for the reservation; 0 when it is not active.
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
    /// The price tier whose multiplier the price includes.
    pub price_tier_id: PriceTierId,
    /// The seat's section; null if it has none.
    #[serde(default)]
    #[schema(max_length = 64)]
    pub section: Option<String>,
    /// The seat's row.
    pub row_number: Label,
    /// The seat's number.
    pub seat_number: Label,
    /// The seat's price times the tier's multiplier.
    pub price: Money,
    /// The discount on the price; always 0 in this version.
    pub discount_amount: Money,
    /// The amount to pay for this seat.
    pub final_price: Money,
}

/// The state of a reservation, as clients see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, sqlx::Type, ToSchema)]
#[serde(rename_all = "snake_case")]
#[sqlx(type_name = "text", rename_all = "snake_case")]
pub enum ReservationStatus {
    /// Its seats are held; it may be paid.
    Active,
    /// Paid: its seats are sold.
    Confirmed,
    /// The customer did not pay in time.
    Expired,
    /// Cancelled by the customer, or with its session.
    Cancelled,
    /// All its tickets were refunded.
    Refunded,
}

/// The columns of [`Reservation`], for `query_as`. `confirming` shows as `active`, and an active reservation past its
/// time as `expired`.
pub(super) const COLUMNS: &str = "id, user_id, session_id, booking_time, expiry_time, end_time, seats_count, total_amount, currency,
    case when status = 'confirming' then 'active' when status = 'active' and expiry_time <= now() then 'expired' else status end as status,
    created_at, updated_at,
    case when status in ('active', 'confirming') then greatest(0, floor(extract(epoch from expiry_time - now())))::int8 else 0 end
        as time_remaining_seconds";

/// What follows `select` for [`Line`]s, the `from` included: the rows of the query `own`, which selects [`COLUMNS`], with
/// those of their items.
pub(super) const LINES_OF_OWN: &str = "own.*, item.id as item_id, session_seat_id, price_tier_id, section, row_number, seat_number, price, discount_amount, final_price
    from own join reservation_items item on item.reservation_id = own.id";

/// A reservation joined with one of its items.
#[derive(Debug, FromRow)]
pub(super) struct Line {
    #[sqlx(flatten)]
    pub(super) reservation: Reservation,
    #[sqlx(flatten)]
    pub(super) item: ReservationItem,
}

/// Groups lines into reservations. The lines of one reservation must follow each other.
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

/// Reads the reservation if it is this owner's, or anyone's if `owner` is `None`. Otherwise the error is [`not_found`].
pub(crate) async fn find(db: &PgPool, id: ReservationId, owner: Option<UserId>) -> Result<Reservation> {
    let sql = format!(
        "with own as (select {COLUMNS} from reservations where id = $1 and {}) select {LINES_OF_OWN} order by item.id",
        owned!()
    );
    let lines: Vec<Line> = sqlx::query_as(sqlx::AssertSqlSafe(sql)).bind(id).bind(owner).fetch_all(db).await?;
    gather(lines).pop().ok_or_else(|| not_found(id))
}

/// Reads up to `limit` of the owner's reservations with ids below `before`, newest first; with `status`, only those in
/// that state.
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
         select {LINES_OF_OWN} order by own.id desc, item.id"
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

/// A reservation's state, and whether its expiry time is still to come.
#[derive(Debug, Clone, Copy, FromRow)]
pub(crate) struct Standing {
    #[sqlx(rename = "status")]
    pub(crate) state: ReservationState,
    pub(crate) in_time: bool,
    /// Whether its session has ended.
    pub(crate) is_over: bool,
}

/// Reads the state of the reservation if it is this owner's, or anyone's if `owner` is `None`.
pub(crate) async fn standing(db: &PgPool, id: ReservationId, owner: Option<UserId>) -> Result<Standing> {
    let sql = concat!(
        "select status, expiry_time > clock_timestamp() as in_time, coalesce(end_time <= clock_timestamp(), false) as is_over from reservations where id = $1 and ",
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
    let states = sqlx::query!("select id, status from reservations where id = any($1)", ids as _).fetch_all(db).await?;
    Ok(states.into_iter().map(|row| (row.id, row.status)).collect())
}

/// A hold of a seat, and the seat's session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionHold {
    /// The session of the held seat.
    pub session_id: SessionId,
    /// The seat and the reservation that holds it.
    pub hold: Hold,
}

/// The error for an id that is unknown or another user's. Clients can't tell the two apart.
pub(crate) fn not_found(id: ReservationId) -> Error {
    Error::refused(Code::ReservationNotFound, format!("You have no reservation with the id {id}."))
}

/// The error for a payment after the session's end.
pub(crate) fn session_over(detail: &str) -> Error {
    Error::refused(Code::SessionOver, detail)
}

/// The error for a step that the reservation's state does not allow. An `active` reservation here has run out of time.
pub(crate) fn refusal(state: ReservationState) -> Error {
    let (code, detail) = match state {
        ReservationState::Active | ReservationState::Expired => {
            (Code::ReservationExpired, "This reservation has expired; its seats are on sale again. Make a new one.")
        }
        ReservationState::Confirming => {
            (Code::ConfirmationInProgress, "A payment for it is in progress. Read the reservation again in a moment.")
        }
        ReservationState::Confirmed => (Code::ReservationConfirmed, "It is paid. Refund its tickets instead."),
        ReservationState::Cancelled => {
            (Code::ReservationCancelled, "This reservation was cancelled; its seats are on sale again. Make a new one.")
        }
        ReservationState::Refunded => {
            (Code::ReservationRefunded, "Its tickets were refunded and its seats are on sale again. Make a new one.")
        }
    };
    let problem = Problem::new(code, detail);
    if state == ReservationState::Confirming { problem.retry_after(2).into() } else { problem.into() }
}
