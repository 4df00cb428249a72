//! The two changes that a payment makes here: the lease before the provider is asked, and everything that follows its yes. Those that come
//! at the same time are one transaction, each judged for itself.

use std::collections::HashMap;
use std::time::Duration;

use service_kit::coalesce::{Coalescer, Lanes, together_or_alone};
use service_kit::crash::crash_point;
use service_kit::database::{self, DeskPool};
use service_kit::error::Result;
use service_kit::lifecycle::Lifecycle;
use service_kit::traces;
use shared_contracts::booking_event::{BookingEvent, BookingEventType};
use shared_contracts::ids::{PaymentId, ReservationId, UserId};
use shared_contracts::money::Money;
use sqlx::FromRow;

use super::confirm::LEASE_SECONDS;
use super::finish::Changed;
use super::{Reservation, find_all};
use crate::outbox;
use crate::tickets::{self, Ticket};

const LANES: Lanes = Lanes::usual(Duration::from_secs(10));

/// Who wants to pay for what.
#[derive(Debug, Clone)]
pub(super) struct Order {
    pub(super) id: ReservationId,
    /// Whose it must be; anyone's, when none is given.
    pub(super) owner: Option<UserId>,
    /// The payment's new id, under which the provider will be asked.
    pub(super) key: PaymentId,
    /// The provider's token for the customer's means of payment.
    pub(super) payment_id: Option<String>,
}

/// A charge that the provider has captured.
#[derive(Debug, Clone)]
struct Captured {
    id: ReservationId,
    key: PaymentId,
    /// The trace that its event goes on with: the work is done for many at once, in a task that belongs to none.
    traceparent: Option<String>,
}

/// A reservation that has just been paid.
#[derive(Debug)]
pub(crate) struct Paid {
    pub(super) reservation: Reservation,
    pub(super) tickets: Vec<Ticket>,
    pub(super) event: BookingEvent,
}

/// What a captured charge came to.
#[derive(Debug)]
pub(super) enum Completion {
    /// `confirmed`, with its tickets.
    Paid(Box<Paid>),
    /// One of its seats has a live ticket already; nothing was changed.
    SeatLost,
    /// Others had settled it before; nothing was changed.
    ByOthers,
}

/// The desk; one a process.
#[derive(Debug)]
pub(crate) struct PayDesk {
    orders: Coalescer<Order, Option<Money>>,
    captured: Coalescer<Captured, Completion>,
}

impl PayDesk {
    /// Opens it. It closes when nobody can ask any more.
    pub(crate) fn open(db: DeskPool, lifecycle: &Lifecycle) -> Self {
        let own = db.clone();
        Self {
            orders: Coalescer::start(lifecycle, LANES, move |orders| lease_all(own.clone(), orders)),
            captured: Coalescer::start(lifecycle, LANES, move |captured| complete_all(db.clone(), captured)),
        }
    }

    /// `active → confirming`, with the payment's row, so that a crash from here on is settled by asking the provider. The amount to be
    /// charged; `None` when the reservation is not that owner's, not active, out of time, or has a payment that the provider works on.
    ///
    /// # Errors
    /// The database failed: the lease may have been taken.
    pub(super) async fn lease(&self, order: Order) -> Result<Option<Money>> {
        self.orders.call(order).await
    }

    /// `confirming | active → confirmed`, with the tickets and the event.
    ///
    /// # Errors
    /// The database failed: it may be paid.
    pub(super) async fn complete(&self, id: ReservationId, key: PaymentId) -> Result<Completion> {
        self.captured.call(Captured { id, key, traceparent: traces::traceparent() }).await
    }
}

async fn lease_all(db: DeskPool, orders: Vec<Order>) -> Vec<Result<Option<Money>>> {
    let db = &db;
    together_or_alone(orders, |orders| async move { lease(db, &orders).await.map(Some) }).await
}

/// Of two payments for the same reservation one gets the lease: a row is changed once in a statement.
async fn lease(db: &DeskPool, orders: &[Order]) -> Result<Vec<Result<Option<Money>>>> {
    let mut connection = db.take().await?;
    let leased: Vec<(PaymentId, Money)> = sqlx::query_as(
        "with given as materialized (
             select * from unnest($1::uuid[], $2::uuid[], $3::uuid[], $4::text[]) as given (id, owner, key, payment_id)
         ),
         locked as materialized (
             select r.id from reservations r join given using (id) where given.owner is null or r.user_id = given.owner order by r.id for no key update of r
         ),
         leased as (
             update reservations r set status = 'confirming', confirming_until = now() + make_interval(secs => $5), updated_at = now()
             from given join locked using (id)
             where r.id = given.id and r.status || '' = 'active' and r.expiry_time > clock_timestamp()
               and not exists (select from payments where reservation_id = r.id and status = 'processing')
             returning r.id, total_amount, currency, key, payment_id
         )
         insert into payments (id, reservation_id, payment_id, amount, currency, status)
         select key, id, payment_id, total_amount, currency, 'pending' from leased
         returning id, amount",
    )
    .bind(orders.iter().map(|order| order.id).collect::<Vec<_>>())
    .bind(orders.iter().map(|order| order.owner).collect::<Vec<_>>())
    .bind(orders.iter().map(|order| order.key).collect::<Vec<_>>())
    .bind(orders.iter().map(|order| order.payment_id.as_deref()).collect::<Vec<_>>())
    .bind(LEASE_SECONDS)
    .fetch_all(&mut *connection)
    .await?;
    db.keep(connection);
    let leased: HashMap<PaymentId, Money> = leased.into_iter().collect();
    Ok(orders.iter().map(|order| Ok(leased.get(&order.key).copied())).collect())
}

async fn complete_all(db: DeskPool, captured: Vec<Captured>) -> Vec<Result<Completion>> {
    let db = &db;
    together_or_alone(captured, |captured| async move { complete(db, &captured).await }).await
}

/// A reservation that was changed, and how many payments of the batch were.
#[derive(FromRow)]
struct PaidRow {
    #[sqlx(flatten)]
    changed: Changed,
    payments: i64,
}

async fn complete(db: &DeskPool, captured: &[Captured]) -> Result<Option<Vec<Result<Completion>>>> {
    let mut tx = database::begin(db.pool()).await?;
    let rows: Vec<PaidRow> = sqlx::query_as(
        "with given as materialized (select * from unnest($1::uuid[], $2::uuid[]) as given (id, key)),
         locked as materialized (select p.id from payments p join given on p.id = given.key order by p.id for no key update of p),
         paid as materialized (
             update payments p set status = 'captured', reservation_id = given.id, updated_at = now()
             from given join locked on locked.id = given.key
             where p.id = given.key and p.status || '' in ('pending', 'processing') and (p.reservation_id = given.id or p.rebooked_as = given.id)
             returning p.reservation_id as id
         ),
         owners as materialized (select r.id from reservations r join paid using (id) order by r.id for no key update of r)
         update reservations r set status = 'confirmed', confirming_until = null, sequence = sequence + 1, updated_at = now()
         from owners where r.id = owners.id and r.status || '' in ('active', 'confirming')
         returning r.id, user_id, session_id, sequence, now() as changed_at, seats_count, total_amount, currency,
             (select count(*) from paid) as payments",
    )
    .bind(captured.iter().map(|captured| captured.id).collect::<Vec<_>>())
    .bind(captured.iter().map(|captured| captured.key).collect::<Vec<_>>())
    .fetch_all(&mut *tx)
    .await?;
    // A payment without its reservation must not be committed, nor the others be rolled back with it.
    if rows.first().is_some_and(|row| row.payments != rows.len() as i64) {
        return Ok(None);
    }
    if rows.is_empty() {
        return Ok(Some(captured.iter().map(|_| Ok(Completion::ByOthers)).collect()));
    }
    let changed: Vec<Changed> = rows.into_iter().map(|row| row.changed).collect();
    let seats: Vec<_> = changed.iter().map(|changed| (changed.id, changed.seats_count)).collect();
    let mut issued = match tickets::issue(&mut tx, &seats).await {
        Err(error)
            if captured.len() == 1 && database::broken_constraint(&error) == Some("tickets_one_live_per_seat") =>
        {
            return Ok(Some(vec![Ok(Completion::SeatLost)]));
        }
        issued => issued?,
    };
    let events: Vec<BookingEvent> = changed
        .iter()
        .map(|changed| {
            let own = || issued.get(&changed.id).into_iter().flatten();
            BookingEvent {
                session_seat_ids: own().map(|ticket| ticket.session_seat_id).collect(),
                ticket_ids: own().map(|ticket| ticket.id).collect(),
                amount: Some(changed.total_amount),
                currency: Some(changed.currency.clone()),
                ..changed.event(BookingEventType::Confirmed)
            }
        })
        .collect();
    let causes: HashMap<ReservationId, &Captured> = captured.iter().map(|captured| (captured.id, captured)).collect();
    let cause = |event: &BookingEvent| causes.get(&event.reservation_id)?.traceparent.clone();
    outbox::append_caused_by(&mut tx, &events, cause).await?;
    let reservations = find_all(&mut tx, changed.iter().map(|changed| changed.id).collect(), None).await?;
    crash_point("confirm.completing");
    tx.commit().await?;
    crash_point("confirm.completed");
    let mut events: HashMap<ReservationId, BookingEvent> =
        events.into_iter().map(|event| (event.reservation_id, event)).collect();
    let mut reservations: HashMap<ReservationId, Reservation> =
        reservations.into_iter().map(|reservation| (reservation.id, reservation)).collect();
    let completion = |id: &ReservationId| match (reservations.remove(id), issued.remove(id), events.remove(id)) {
        (Some(reservation), Some(tickets), Some(event)) => {
            Completion::Paid(Box::new(Paid { reservation, tickets, event }))
        }
        _ => Completion::ByOthers,
    };
    Ok(Some(captured.iter().map(|captured| &captured.id).map(completion).map(Ok).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::app::MIGRATIONS;

    /// Between the look at a reservation and its payment's completion it may have expired.
    #[tokio::test]
    async fn a_payment_whose_reservation_has_ended_is_left_as_it_is_and_spoils_no_other() {
        let url = service_kit::testing::database("booking", &MIGRATIONS).await;
        let db = DeskPool::new(&url, "test").unwrap();
        let [alive, ended] = [(); 2].map(|()| (ReservationId::new(), PaymentId::new()));
        for ((id, key), reservation, payment) in [(alive, "confirming", "pending"), (ended, "expired", "processing")] {
            sqlx::query(
                "with made as (
                     insert into reservations (id, user_id, session_id, status, confirming_until, booking_time, expiry_time, seats_count, total_amount, currency)
                     values ($1, gen_random_uuid(), gen_random_uuid(), $3, case $3 when 'confirming' then now() end, now(), now() + interval '1 hour', 1, 100, 'USD')
                 ),
                 line as (
                     insert into reservation_items (id, reservation_id, session_seat_id, price_tier_id, row_number, seat_number, price, discount_amount, final_price)
                     values (gen_random_uuid(), $1, gen_random_uuid(), gen_random_uuid(), '1', '1', 100, 0, 100)
                 )
                 insert into payments (id, reservation_id, amount, currency, status) values ($2, $1, 100, 'USD', $4)",
            )
            .bind(id)
            .bind(key)
            .bind(reservation)
            .bind(payment)
            .execute(db.pool())
            .await
            .unwrap();
        }
        let captured = |(id, key)| Captured { id, key, traceparent: None };
        let completed = complete_all(db.clone(), [ended, alive].map(captured).to_vec()).await;
        assert!(matches!(completed[..], [Ok(Completion::ByOthers), Ok(Completion::Paid(_))]), "{completed:?}");
        let payments: Vec<(PaymentId, String)> =
            sqlx::query_as("select id, status from payments order by id").fetch_all(db.pool()).await.unwrap();
        assert_eq!(payments, [(alive.1, "captured".to_owned()), (ended.1, "processing".to_owned())]);
    }
}
