//! Writes new reservations: step 5 of a booking. The reservation, its items and the stored answer are written together
//! or not at all. Nothing is written if it is too late by the database's clock. Simultaneous requests share one
//! statement and one commit. The statement also applies the limits per customer, under a lock per customer
//! (`reservation_refusals`, migration 0008). It is its own transaction, unless a request of the batch has an answer to
//! store.

use std::collections::HashMap;

use chrono::{DateTime, TimeDelta, Utc};
use service_kit::http::error::Result;
use service_kit::postgres::batch::{BatchConfig, Batcher, batch_or_each};
use service_kit::postgres::database::{BatchPool, broken_constraint};
use service_kit::process::lifecycle::Lifecycle;
use shared_contracts::ids::{ReservationId, SessionId, UserId};
use shared_contracts::money::{Currency, Money};
use shared_contracts::problem::{Code, Problem};
use sqlx::PgConnection;

use super::model::{BOOKING_TIME_MAX, Reservation, ReservationItem, ReservationStatus};
use crate::idempotency::Claim;
use crate::settings::Rules;

const BATCHES: BatchConfig = BatchConfig::with_timeout(BOOKING_TIME_MAX);

/// A reservation to be written.
#[derive(Debug, Clone)]
pub(crate) struct NewReservation {
    pub(crate) id: ReservationId,
    pub(crate) user_id: UserId,
    pub(crate) session_id: SessionId,
    pub(crate) booking_time: DateTime<Utc>,
    pub(crate) expiry_time: DateTime<Utc>,
    /// When the session ends; `None` if the Event Service did not say.
    pub(crate) end_time: Option<DateTime<Utc>>,
    pub(crate) items: Vec<ReservationItem>,
    pub(crate) total_amount: Money,
    pub(crate) currency: Currency,
    pub(crate) fair_use: FairUse,
}

/// Whether the limits per customer apply to a reservation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FairUse {
    /// The limits on one user's reservations and seats apply.
    Counted,
    /// No limit applies, because the reservation is paid already.
    Exempt,
}

type Written = Result<Reservation>;

/// Batches new reservations; one per process.
#[derive(Debug)]
pub(crate) struct ReservationInserter {
    orders: Batcher<(NewReservation, Claim), Reservation>,
}

impl ReservationInserter {
    /// Starts the batch worker. It ends when the last `ReservationInserter` is dropped.
    pub(crate) fn open(db: BatchPool, rules: Rules, lifecycle: &Lifecycle) -> Self {
        Self { orders: Batcher::start(lifecycle, BATCHES, move |orders| write_batch(db.clone(), rules, orders)) }
    }

    /// Writes the reservation and keeps the answer under the claim's key.
    ///
    /// # Errors
    /// It was too late, a limit per customer refused it, another attempt has the key, or the database failed. After a
    /// database error the reservation may be written all the same.
    pub(crate) async fn insert(&self, new: NewReservation, claim: Claim) -> Written {
        self.orders.call((new, claim)).await
    }
}

async fn write_batch(db: BatchPool, rules: Rules, orders: Vec<(NewReservation, Claim)>) -> Vec<Written> {
    // A request that has lost its key fails the whole batch. Each request is then retried alone.
    let db = &db;
    batch_or_each(orders, |orders| async move { write_together(db, rules, &orders).await.map(Some) }).await
}

async fn write_together(db: &BatchPool, rules: Rules, orders: &[(NewReservation, Claim)]) -> Result<Vec<Written>> {
    if !orders.iter().any(|(_, claim)| claim.has_key()) {
        // A single statement needs no explicit transaction.
        let mut connection = db.acquire().await?;
        let written = insert(&mut connection, rules, orders).await?;
        db.release(connection);
        return Ok(written);
    }
    let mut tx = db.begin().await?;
    let written = insert(tx.connection()?, rules, orders).await?;
    let answers = orders.iter().zip(&written).filter_map(|((_, claim), written)| Some((claim, written.as_ref().ok()?)));
    Claim::complete_created(tx.connection()?, answers).await?;
    tx.commit().await?;
    Ok(written)
}

/// What a customer may have beside a reservation of a batch. The customer's earlier reservations in the same batch are
/// subtracted already.
struct Allowance {
    /// The user's advisory lock, of class 8 (`reservation_refusals` in `migrations/0008_fair_use.sql`). The class only
    /// separates these locks from advisory locks of other uses; there are none so far.
    lock_key: i32,
    /// The most other open reservations that the customer may have. `None` switches `seats_max` off too.
    others_max: Option<i64>,
    seats_max: i64,
}

impl Allowance {
    fn beside(new: &NewReservation, earlier: &[&NewReservation], rules: Rules) -> Self {
        let counted = earlier.iter().filter(|other| other.user_id == new.user_id && other.fair_use == FairUse::Counted);
        let others = counted.clone().count() as i64;
        let of_session = counted.filter(|other| other.session_id == new.session_id);
        let seats: usize = of_session.chain([&new]).map(|other| other.items.len()).sum();
        let left = |max: u32, taken: i64| if max == 0 { i64::MAX } else { i64::from(max) - taken };
        let is_limited = rules.open_reservations_max > 0 || rules.seats_per_session_max > 0;
        Self {
            lock_key: lock_key(new.user_id),
            others_max: (is_limited && new.fair_use == FairUse::Counted)
                .then(|| left(rules.open_reservations_max, others + 1)),
            seats_max: left(rules.seats_per_session_max, seats as i64),
        }
    }
}

/// Two users may have the same key; then they only wait for each other.
fn lock_key(user: UserId) -> i32 {
    let bits = user.as_uuid().as_u128();
    (bits ^ bits >> 32 ^ bits >> 64 ^ bits >> 96) as u32 as i32
}

/// The result for one reservation of a batch: its row, or why it may not be written.
#[derive(Debug, Clone)]
struct InsertedRow {
    id: ReservationId,
    created_at: Option<DateTime<Utc>>,
    time_remaining_seconds: Option<i64>,
    /// The problem's code if a limit per customer refused the reservation; null if the row was written.
    refusal: Option<String>,
}

/// Inserts a batch of reservations with their items. The limits per customer and the database's clock decide on each
/// reservation separately.
async fn insert(
    connection: &mut PgConnection,
    rules: Rules,
    orders: &[(NewReservation, Claim)],
) -> Result<Vec<Written>> {
    let news: Vec<&NewReservation> = orders.iter().map(|(new, _)| new).collect();
    let allowances: Vec<Allowance> =
        news.iter().enumerate().map(|(index, new)| Allowance::beside(new, &news[..index], rules)).collect();
    let lines = || news.iter().flat_map(|new| new.items.iter().map(move |item| (new.id, item)));
    let inserted = sqlx::query_as!(
        InsertedRow,
        r#"with given as materialized (
             select r.*, refusal
             from unnest($1::uuid[], $2::uuid[], $3::uuid[], $4::timestamptz[], $5::timestamptz[], $6::int4[], $7::numeric[], $8::text[], $22::timestamptz[]) with ordinality
                 as r (id, user_id, session_id, booking_time, expiry_time, seats_count, total_amount, currency, end_time, place)
             left join reservation_refusals($2, $3, $19::int4[], $1, $20::int8[], $21::int8[]) using (place)
         ),
         made as (
             insert into reservations (id, user_id, session_id, status, booking_time, expiry_time, seats_count, total_amount, currency, end_time)
             select id, user_id, session_id, 'active', booking_time, expiry_time, seats_count, total_amount, currency, end_time
             from given where refusal is null and clock_timestamp() < least(booking_time + $9, expiry_time)
             returning id, created_at, expiry_time
         ),
         lines as (
             insert into reservation_items (id, reservation_id, session_seat_id, price_tier_id, row_number, seat_number, price, discount_amount, final_price, section)
             select line.id, made.id, session_seat_id, price_tier_id, row_number, seat_number, price, discount_amount, final_price, section
             from made join unnest($10::uuid[], $11::uuid[], $12::uuid[], $13::uuid[], $14::text[], $15::text[], $16::numeric[], $17::numeric[], $18::numeric[], $23::text[])
                  as line (id, reservation_id, session_seat_id, price_tier_id, row_number, seat_number, price, discount_amount, final_price, section)
                  on line.reservation_id = made.id
         )
         select id as "id!", created_at, greatest(0, floor(extract(epoch from expiry_time - created_at)))::int8 as time_remaining_seconds, null::text as refusal
         from made
         union all
         select id, null, null, refusal from given where refusal is not null"#,
        news.iter().map(|new| new.id).collect::<Vec<_>>() as _,
        news.iter().map(|new| new.user_id).collect::<Vec<_>>() as _,
        news.iter().map(|new| new.session_id).collect::<Vec<_>>() as _,
        &news.iter().map(|new| new.booking_time).collect::<Vec<_>>(),
        &news.iter().map(|new| new.expiry_time).collect::<Vec<_>>(),
        &news.iter().map(|new| new.items.len() as i32).collect::<Vec<_>>(),
        news.iter().map(|new| new.total_amount).collect::<Vec<_>>() as _,
        news.iter().map(|new| new.currency.clone()).collect::<Vec<_>>() as _,
        TimeDelta::from_std(BOOKING_TIME_MAX).unwrap_or(TimeDelta::MAX) as _,
        lines().map(|(_, item)| item.id).collect::<Vec<_>>() as _,
        lines().map(|(id, _)| id).collect::<Vec<_>>() as _,
        lines().map(|(_, item)| item.session_seat_id).collect::<Vec<_>>() as _,
        lines().map(|(_, item)| item.price_tier_id).collect::<Vec<_>>() as _,
        lines().map(|(_, item)| item.row_number.as_str()).collect::<Vec<_>>() as _,
        lines().map(|(_, item)| item.seat_number.as_str()).collect::<Vec<_>>() as _,
        lines().map(|(_, item)| item.price).collect::<Vec<_>>() as _,
        lines().map(|(_, item)| item.discount_amount).collect::<Vec<_>>() as _,
        lines().map(|(_, item)| item.final_price).collect::<Vec<_>>() as _,
        &allowances.iter().map(|allowance| allowance.lock_key).collect::<Vec<_>>(),
        allowances.iter().map(|allowance| allowance.others_max).collect::<Vec<_>>() as _,
        &allowances.iter().map(|allowance| allowance.seats_max).collect::<Vec<_>>(),
        news.iter().map(|new| new.end_time).collect::<Vec<_>>() as _,
        lines().map(|(_, item)| item.section.as_deref()).collect::<Vec<_>>() as _,
    )
    .fetch_all(connection)
    .await;
    let made: Vec<InsertedRow> = match inserted {
        // Reconciliation has abandoned this booking and written its row already.
        Err(error) if orders.len() == 1 && broken_constraint(&error) == Some("reservations_pkey") => Vec::new(),
        other => other?,
    };
    let made: HashMap<ReservationId, InsertedRow> = made.into_iter().map(|made| (made.id, made)).collect();
    Ok(orders.iter().map(|(new, _)| new.written(made.get(&new.id), rules)).collect())
}

/// The problem for a reservation that a limit per customer refused.
fn refusal(code: &str, rules: Rules) -> Problem {
    if code == Code::TooManySeats.as_str() {
        let seats = rules.seats_per_session_max;
        let detail = format!(
            "One customer may have at most {seats} seats of this session, held and bought together. Nothing was reserved."
        );
        return Problem::new(Code::TooManySeats, detail);
    }
    let open = rules.open_reservations_max;
    let detail =
        format!("One customer may have at most {open} open reservations. Pay for or cancel one; nothing was reserved.");
    Problem::new(Code::TooManyReservations, detail)
}

impl NewReservation {
    /// The reservation as the database has it, or the reason why it was not written.
    fn written(&self, made: Option<&InsertedRow>, rules: Rules) -> Written {
        if let Some(code) = made.and_then(|made| made.refusal.as_deref()) {
            return Err(refusal(code, rules).into());
        }
        let Some((created_at, time_remaining_seconds)) =
            made.and_then(|made| made.created_at.zip(made.time_remaining_seconds))
        else {
            let problem = Problem::new(
                Code::DeadlineExceeded,
                "The booking took too long and was abandoned; nothing is held. Please try again.",
            );
            return Err(problem.retry_after(1).into());
        };
        Ok(Reservation {
            id: self.id,
            user_id: self.user_id,
            session_id: self.session_id,
            booking_time: self.booking_time,
            expiry_time: self.expiry_time,
            end_time: self.end_time,
            seats_count: self.items.len() as i32,
            total_amount: self.total_amount,
            currency: self.currency.clone(),
            status: ReservationStatus::Active,
            items: self.items.clone(),
            created_at,
            updated_at: created_at,
            time_remaining_seconds,
        })
    }
}
