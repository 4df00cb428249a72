//! Reservations: the customer's orders, and the one authority on what became of each. Only this folder writes `reservations`.
//!
//! ```text
//!           confirm            captured
//!  active ─────────▶ confirming ───────▶ confirmed ──▶ refunded   (all its tickets given back)
//!  │ │ │ ▲                │                  ▲
//!  │ │ │ └─ not captured ─┘                  │
//!  │ │ │    (yet)                            │
//!  │ │ └──── captured after all, by notice ──┘
//!  │ └──▶ expired       (its time is over: the worker, or whoever wants its seats)
//!  └────▶ cancelled     (by the customer, or with its session)
//! ```
//!
//! The same as a table, payments with it, is `shared-contracts/src/transitions.rs`; the statements here are held against it.
//! Each arrow is one conditional update judged by this database's clock; of confirm, cancel and expire one wins and the others
//! get the right error. `confirming` is a lease: while the payment provider is asked nobody else may end the reservation, and a
//! lease that has run out is settled by asking the provider what became of the charge. Clients see it as `active`. A provider that
//! takes its time leaves the reservation `active` and tells by notice how the charge ended (`late_payment.rs`).
//!
//! Statements that look one row up by its id write `status || ''`: with the bare column the planner may take the partial index of
//! that status instead of the key and read every active reservation for one (seen: 2.07 ms instead of 0.1 ms with 3,000 of them).

/// The condition of who may see a reservation: its owner (`$2`), or for an admin (null) anyone. What a booking abandoned before it wrote
/// it is nobody's, and there for nobody.
macro_rules! owned {
    () => {
        "(user_id = $2 or $2::uuid is null and user_id <> '00000000-0000-0000-0000-000000000000')"
    };
}

pub mod confirm;
pub mod create;
pub mod finish;
pub mod late_payment;
pub(crate) mod lock_owners;
pub(crate) mod pay_desk;
pub mod session_cancelled;
#[cfg(test)]
mod testing;
pub(crate) mod tickets;
pub(crate) mod write_desk;

use axum::Json;
use axum::extract::State;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use service_kit::auth::Caller;
use service_kit::error::{Error, Result};
use service_kit::extract::ApiPath;
use service_kit::query::ApiQuery;
use service_kit::refusals;
use shared_contracts::ids::{PriceTierId, ReservationId, ReservationItemId, SessionId, SessionSeatId, UserId};
use shared_contracts::label::Label;
use shared_contracts::money::{Currency, Money};
use shared_contracts::page::{Page, PageQuery};
use shared_contracts::problem::Code;
use sqlx::{FromRow, PgPool};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

/// A reservation.
#[derive(Debug, Clone, Serialize, Deserialize, FromRow, ToSchema)]
pub struct Reservation {
    /// Its id.
    pub id: ReservationId,
    /// The customer.
    pub user_id: UserId,
    /// The session.
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
    /// Its seats.
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
    /// Its id.
    #[sqlx(rename = "item_id")]
    pub id: ReservationItemId,
    /// The seat.
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
const COLUMNS: &str = "id, user_id, session_id, booking_time, expiry_time, seats_count, total_amount, currency,
    case when status = 'confirming' then 'active' when status = 'active' and expiry_time <= now() then 'expired' else status end as status,
    created_at, updated_at,
    case when status in ('active', 'confirming') then greatest(0, floor(extract(epoch from expiry_time - now())))::int8 else 0 end
        as time_remaining_seconds";

/// The columns of [`Line`], out of `own` with those of [`COLUMNS`] and of the items beside it.
const LINES: &str = "own.*, item.id as item_id, session_seat_id, price_tier_id, row_number, seat_number, price, discount_amount, final_price
    from own join reservation_items item on item.reservation_id = own.id";

/// One of a reservation's items, beside it.
#[derive(Debug, FromRow)]
struct Line {
    #[sqlx(flatten)]
    reservation: Reservation,
    #[sqlx(flatten)]
    item: ReservationItem,
}

/// Reservations out of their lines, in which those of one follow each other.
fn gather(lines: Vec<Line>) -> Vec<Reservation> {
    let mut gathered: Vec<Reservation> = Vec::new();
    for Line { reservation, item } in lines {
        match gathered.last_mut() {
            Some(last) if last.id == reservation.id => last.items.push(item),
            _ => gathered.push(Reservation { items: vec![item], ..reservation }),
        }
    }
    gathered
}

/// Which reservations to list.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct ReservationFilter {
    /// Only those in this state.
    #[param(inline)]
    status: Option<ReservationStatus>,
}

refusals!(GetRefusals: &[Code::Unauthenticated, Code::ReservationNotFound, Code::ValidationFailed]);
refusals!(ListRefusals: &[Code::Unauthenticated, Code::ValidationFailed]);

/// Get a reservation
#[utoipa::path(get, path = "/api/v1/reservations/{id}", tag = "2 Reservations", params(("id" = ReservationId, Path)), security(("user_id" = []), ("bearer" = [])),
    responses((status = 200, description = "The reservation", body = Reservation), GetRefusals))]
pub(crate) async fn get_reservation(
    State(db): State<PgPool>,
    caller: Caller,
    ApiPath(id): ApiPath<ReservationId>,
) -> Result<Json<Reservation>> {
    find(&db, id, caller.confined_to()).await.map(Json)
}

/// List the caller's reservations, newest first
#[utoipa::path(get, path = "/api/v1/reservations", tag = "2 Reservations", params(PageQuery, ReservationFilter), security(("user_id" = []), ("bearer" = [])),
    responses((status = 200, description = "A page", body = Page<Reservation>), ListRefusals))]
pub(crate) async fn list_reservations(
    State(db): State<PgPool>,
    caller: Caller,
    ApiQuery(page, filter): ApiQuery<PageQuery, ReservationFilter>,
) -> Result<Json<Page<Reservation>>> {
    let sql = format!(
        "with own as (
             select * from (select {COLUMNS} from reservations where user_id = $1 and id < $2) all_own
             where $4::text is null or status = $4 order by id desc limit $3
         )
         select {LINES} order by own.id desc, item.id"
    );
    let lines: Vec<Line> = sqlx::query_as(sqlx::AssertSqlSafe(sql))
        .bind(caller.user_id)
        .bind(page.cursor.unwrap_or(Uuid::max()))
        .bind(page.rows_to_read())
        .bind(filter.status)
        .fetch_all(&db)
        .await?;
    Ok(Json(Page::from_rows(gather(lines), &page, |row| row.id.as_uuid())))
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

/// The answer for an id that is unknown or another user's: the two can't be told apart.
pub(crate) fn not_found(id: ReservationId) -> Error {
    Error::refused(Code::ReservationNotFound, format!("You have no reservation with the id {id}."))
}
