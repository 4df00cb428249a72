//! Step 5 of a booking: the reservation, its items and the kept answer, all or nothing, unless it is too late by the database's clock.
//! Those that come to it at the same time are one statement and one commit.

use std::collections::HashMap;

use axum::http::StatusCode;
use chrono::{DateTime, TimeDelta, Utc};
use service_kit::coalesce::{Coalescer, Lanes, together_or_alone};
use service_kit::database::{self, broken_constraint};
use service_kit::error::Result;
use service_kit::lifecycle::Lifecycle;
use shared_contracts::ids::{ReservationId, SessionId, UserId};
use shared_contracts::money::{Currency, Money};
use shared_contracts::problem::{Code, Problem};
use sqlx::{PgConnection, PgPool};

use super::create::BOOKING_TIME_MAX;
use super::{Reservation, ReservationItem, ReservationStatus};
use crate::idempotency::Claim;

const LANES: Lanes = Lanes::usual(BOOKING_TIME_MAX);

/// A reservation to be written.
#[derive(Debug, Clone)]
pub(crate) struct NewReservation {
    pub(super) id: ReservationId,
    pub(super) user_id: UserId,
    pub(super) session_id: SessionId,
    pub(super) booking_time: DateTime<Utc>,
    pub(super) expiry_time: DateTime<Utc>,
    pub(super) items: Vec<ReservationItem>,
    pub(super) total_amount: Money,
    pub(super) currency: Currency,
}

type Written = Result<Reservation>;

/// The desk; one a process.
#[derive(Debug)]
pub(crate) struct WriteDesk {
    orders: Coalescer<(NewReservation, Claim), Reservation>,
}

impl WriteDesk {
    /// Opens it. It closes when nobody can ask any more.
    pub(crate) fn open(db: PgPool, lifecycle: &Lifecycle) -> Self {
        Self { orders: Coalescer::start(lifecycle, LANES, move |orders| write_batch(db.clone(), orders)) }
    }

    /// Writes the reservation and keeps the answer under the claim's key.
    ///
    /// # Errors
    /// It was too late, another attempt has the key, or the database failed: then it may be written or not.
    pub(super) async fn write(&self, new: NewReservation, claim: Claim) -> Written {
        self.orders.call((new, claim)).await
    }
}

async fn write_batch(db: PgPool, orders: Vec<(NewReservation, Claim)>) -> Vec<Written> {
    // One that has lost its key is refused, and with it the whole batch.
    let db = &db;
    together_or_alone(orders, |orders| async move { write_together(db, &orders).await.map(Some) }).await
}

async fn write_together(db: &PgPool, orders: &[(NewReservation, Claim)]) -> Result<Vec<Written>> {
    if !orders.iter().any(|(_, claim)| claim.has_key()) {
        // One statement commits by itself.
        return insert(&mut *db.acquire().await?, orders).await;
    }
    let mut tx = database::begin(db).await?;
    let written = insert(&mut tx, orders).await?;
    let answers = orders.iter().zip(&written).filter_map(|((_, claim), written)| Some((claim, written.as_ref().ok()?)));
    Claim::finish_all(&mut tx, StatusCode::CREATED, answers).await?;
    tx.commit().await?;
    Ok(written)
}

async fn insert(connection: &mut PgConnection, orders: &[(NewReservation, Claim)]) -> Result<Vec<Written>> {
    let lines = || orders.iter().flat_map(|(new, _)| new.items.iter().map(move |item| (new.id, item)));
    let inserted = sqlx::query_as(
        "with given as materialized (
             select * from unnest($1::uuid[], $2::uuid[], $3::uuid[], $4::timestamptz[], $5::timestamptz[], $6::int4[], $7::numeric[], $8::text[])
                 as r (id, user_id, session_id, booking_time, expiry_time, seats_count, total_amount, currency)
         ),
         made as (
             insert into reservations (id, user_id, session_id, status, booking_time, expiry_time, seats_count, total_amount, currency)
             select id, user_id, session_id, 'active', booking_time, expiry_time, seats_count, total_amount, currency
             from given where clock_timestamp() < least(booking_time + $9, expiry_time)
             returning id, created_at, expiry_time
         ),
         lines as (
             insert into reservation_items (id, reservation_id, session_seat_id, price_tier_id, row_number, seat_number, price, discount_amount, final_price)
             select line.id, made.id, session_seat_id, price_tier_id, row_number, seat_number, price, discount_amount, final_price
             from made join unnest($10::uuid[], $11::uuid[], $12::uuid[], $13::uuid[], $14::text[], $15::text[], $16::numeric[], $17::numeric[], $18::numeric[])
                  as line (id, reservation_id, session_seat_id, price_tier_id, row_number, seat_number, price, discount_amount, final_price)
                  on line.reservation_id = made.id
         )
         select id, created_at, greatest(0, floor(extract(epoch from expiry_time - created_at)))::int8 from made",
    )
    .bind(orders.iter().map(|(new, _)| new.id).collect::<Vec<_>>())
    .bind(orders.iter().map(|(new, _)| new.user_id).collect::<Vec<_>>())
    .bind(orders.iter().map(|(new, _)| new.session_id).collect::<Vec<_>>())
    .bind(orders.iter().map(|(new, _)| new.booking_time).collect::<Vec<_>>())
    .bind(orders.iter().map(|(new, _)| new.expiry_time).collect::<Vec<_>>())
    .bind(orders.iter().map(|(new, _)| new.items.len() as i32).collect::<Vec<_>>())
    .bind(orders.iter().map(|(new, _)| new.total_amount).collect::<Vec<_>>())
    .bind(orders.iter().map(|(new, _)| new.currency.clone()).collect::<Vec<_>>())
    .bind(TimeDelta::from_std(BOOKING_TIME_MAX).unwrap_or(TimeDelta::MAX))
    .bind(lines().map(|(_, item)| item.id).collect::<Vec<_>>())
    .bind(lines().map(|(id, _)| id).collect::<Vec<_>>())
    .bind(lines().map(|(_, item)| item.session_seat_id).collect::<Vec<_>>())
    .bind(lines().map(|(_, item)| item.price_tier_id).collect::<Vec<_>>())
    .bind(lines().map(|(_, item)| item.row_number.as_str()).collect::<Vec<_>>())
    .bind(lines().map(|(_, item)| item.seat_number.as_str()).collect::<Vec<_>>())
    .bind(lines().map(|(_, item)| item.price).collect::<Vec<_>>())
    .bind(lines().map(|(_, item)| item.discount_amount).collect::<Vec<_>>())
    .bind(lines().map(|(_, item)| item.final_price).collect::<Vec<_>>())
    .fetch_all(connection)
    .await;
    let made: Vec<(ReservationId, DateTime<Utc>, i64)> = match inserted {
        // Reconciliation was here first and gave this booking up.
        Err(error) if orders.len() == 1 && broken_constraint(&error) == Some("reservations_pkey") => Vec::new(),
        other => other?,
    };
    let made: HashMap<ReservationId, (DateTime<Utc>, i64)> =
        made.into_iter().map(|(id, created_at, remaining)| (id, (created_at, remaining))).collect();
    Ok(orders.iter().map(|(new, _)| new.written(made.get(&new.id).copied())).collect())
}

impl NewReservation {
    /// As it stands in the database, if it does.
    fn written(&self, made: Option<(DateTime<Utc>, i64)>) -> Written {
        let Some((created_at, time_remaining_seconds)) = made else {
            let problem = Problem::new(
                Code::DeadlineExceeded,
                "The booking took too long and was given up; nothing is held. Please try again.",
            );
            return Err(problem.retry_after(1).into());
        };
        Ok(Reservation {
            id: self.id,
            user_id: self.user_id,
            session_id: self.session_id,
            booking_time: self.booking_time,
            expiry_time: self.expiry_time,
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
