//! The two changes of a reservation that is paid: the lease before the provider is asked, and the completion after the
//! provider has captured the charge. Simultaneous payments share a batch; each succeeds or fails on its own.

use std::collections::HashMap;
use std::time::Duration;

use chrono::{DateTime, Utc};
use service_kit::http::error::Result;
use service_kit::observe::traces;
use service_kit::postgres::batch::{BatchConfig, Batcher, batch_or_each};
use service_kit::postgres::database::{self, BatchPool};
use service_kit::process::crash::crash_point;
use service_kit::process::lifecycle::Lifecycle;
use shared_contracts::booking_event::{BookingEvent, BookingEventType};
use shared_contracts::ids::{PaymentId, ReservationId, UserId};
use sqlx::FromRow;

use super::events::Changed;
use super::model::{COLUMNS, LEASE_SECONDS, LINES_OF_OWN, Line, Reservation, ReservationStatus, gather};
use super::tickets::{self, Ticket};
use crate::outbox;

const BATCHES: BatchConfig = BatchConfig::with_timeout(Duration::from_secs(10)).with_linger();

/// A request for the lease of a reservation, which its owner is about to pay.
#[derive(Debug, Clone)]
pub(crate) struct LeaseRequest {
    pub(crate) id: ReservationId,
    /// The required owner; `None` accepts anyone's reservation.
    pub(crate) owner: Option<UserId>,
    /// The payment's new id, which is also the provider's idempotency key.
    pub(crate) key: PaymentId,
    /// The provider's token for the customer's means of payment.
    pub(crate) payment_id: Option<String>,
}

/// A charge that the provider has captured.
#[derive(Debug, Clone)]
struct Captured {
    /// The reservation as read when its payment began, or later.
    reservation: Reservation,
    key: PaymentId,
    /// The trace that the event continues. The batch runs in a task that belongs to no request's trace.
    traceparent: Option<String>,
}

/// A reservation that has just been paid.
#[derive(Debug)]
pub(crate) struct Paid {
    pub(crate) reservation: Reservation,
    pub(crate) tickets: Vec<Ticket>,
    pub(crate) event: BookingEvent,
}

/// The result of completing a captured charge.
#[derive(Debug)]
pub(crate) enum Completion {
    /// `confirmed`, with its tickets.
    Paid(Box<Paid>),
    /// One of its seats has a live ticket already; nothing was changed.
    SeatLost,
    /// The session has ended; nothing was changed.
    SessionOver,
    /// Another process had settled the payment before; nothing was changed.
    AlreadySettled,
}

/// Batches leases and completions; one per process.
#[derive(Debug)]
pub(crate) struct PaymentBatcher {
    leases: Batcher<LeaseRequest, Option<Reservation>>,
    completions: Batcher<Captured, Completion>,
}

impl PaymentBatcher {
    /// Starts the batch workers. They end when the last `PaymentBatcher` is dropped.
    pub(crate) fn open(db: BatchPool, lifecycle: &Lifecycle) -> Self {
        let own = db.clone();
        Self {
            leases: Batcher::start(lifecycle, BATCHES, move |requests| lease_all(own.clone(), requests)),
            completions: Batcher::start(lifecycle, BATCHES, move |captured| complete_all(db.clone(), captured)),
        }
    }

    /// `active → confirming`, together with the payment's row, in one statement that is its own transaction. After a
    /// crash from here on, reconciliation settles the payment by asking the provider. Returns the reservation, whose
    /// total is to be charged. Returns `None` if it is not that owner's, is not active, is out of time, or has a payment
    /// that the provider is processing.
    ///
    /// # Errors
    /// The database failed; the lease may be taken all the same.
    pub(crate) async fn lease(&self, request: LeaseRequest) -> Result<Option<Reservation>> {
        self.leases.call(request).await
    }

    /// `confirming | active → confirmed`, together with the captured payment, the tickets and the event: one transaction
    /// for `payments`, `reservations`, `tickets` and `outbox`.
    ///
    /// # Errors
    /// The database failed; the reservation may be confirmed all the same.
    pub(crate) async fn complete(&self, reservation: Reservation, key: PaymentId) -> Result<Completion> {
        self.completions.call(Captured { reservation, key, traceparent: traces::traceparent() }).await
    }
}

async fn lease_all(db: BatchPool, requests: Vec<LeaseRequest>) -> Vec<Result<Option<Reservation>>> {
    let db = &db;
    batch_or_each(requests, |requests| async move { lease_batch(db, &requests).await.map(Some) }).await
}

/// A line of a reservation, and the payment that got its lease.
#[derive(FromRow)]
struct LeasedLine {
    key: PaymentId,
    #[sqlx(flatten)]
    line: Line,
}

/// Takes the leases of a batch. Of two payments for the same reservation, one gets the lease: a statement changes a row
/// only once.
///
/// The check for a `processing` payment is written so that the planner must use the index by reservation. The term
/// `status || ''` keeps it from the partial index of `processing` payments. `offset 0` keeps the subquery from becoming
/// a join that reads them all. Otherwise a plan that was cached while no payment was `processing` would scan all of
/// them for each batch.
async fn lease_batch(db: &BatchPool, requests: &[LeaseRequest]) -> Result<Vec<Result<Option<Reservation>>>> {
    let mut connection = db.acquire().await?;
    let sql = format!(
        "with given as materialized (
             select * from unnest($1::uuid[], $2::uuid[], $3::uuid[], $4::text[]) as given (id, owner, key, payment_id)
         ),
         locked as materialized (
             select r.id, key from reservations r join given using (id) where given.owner is null or r.user_id = given.owner order by r.id for no key update of r
         ),
         leased as (
             update reservations r set status = 'confirming', confirming_until = now() + make_interval(secs => $5), updated_at = now()
             from given join locked using (id, key)
             where r.id = given.id and r.status || '' = 'active' and r.expiry_time > clock_timestamp()
               and not exists (
                   select from payments where reservation_id = r.id and status in ('pending', 'processing', 'captured') and status || '' = 'processing' offset 0
               )
             returning r.*, key, payment_id
         ),
         asked as (
             insert into payments (id, reservation_id, payment_id, amount, currency, status)
             select key, id, payment_id, total_amount, currency, 'pending' from leased
         ),
         own as (select {COLUMNS}, key from leased)
         select {LINES_OF_OWN} order by own.id, item.id"
    );
    let lines: Vec<LeasedLine> = sqlx::query_as(sqlx::AssertSqlSafe(sql))
        .bind(requests.iter().map(|request| request.id).collect::<Vec<_>>())
        .bind(requests.iter().map(|request| request.owner).collect::<Vec<_>>())
        .bind(requests.iter().map(|request| request.key).collect::<Vec<_>>())
        .bind(requests.iter().map(|request| request.payment_id.as_deref()).collect::<Vec<_>>())
        .bind(LEASE_SECONDS)
        .fetch_all(&mut *connection)
        .await?;
    db.release(connection);
    let owners: HashMap<PaymentId, ReservationId> =
        lines.iter().map(|leased| (leased.key, leased.line.reservation.id)).collect();
    let leased = gather(lines.into_iter().map(|leased| leased.line).collect()).into_iter();
    let mut leased: HashMap<ReservationId, Reservation> = leased.map(|leased| (leased.id, leased)).collect();
    Ok(requests.iter().map(|request| Ok(owners.get(&request.key).and_then(|id| leased.remove(id)))).collect())
}

async fn complete_all(db: BatchPool, captured: Vec<Captured>) -> Vec<Result<Completion>> {
    let db = &db;
    batch_or_each(captured, |captured| async move { complete_batch(db, &captured).await }).await
}

/// A reservation that became `confirmed`, and how many payments of the batch became `captured`.
struct PaidRow {
    id: ReservationId,
    sequence: i64,
    /// When the transaction began, by the database's clock.
    changed_at: DateTime<Utc>,
    payments: i64,
}

/// Completes a batch of captured charges. For `status || ''`, see `reservations/mod.rs`.
async fn complete_batch(db: &BatchPool, captured: &[Captured]) -> Result<Option<Vec<Result<Completion>>>> {
    let mut tx = db.begin().await?;
    let paid = sqlx::query_as!(
        PaidRow,
        r#"with given as materialized (select * from unnest($1::uuid[], $2::uuid[]) as given (id, key)),
         locked as materialized (select p.id from payments p join given on p.id = given.key order by p.id for no key update of p),
         paid as materialized (
             update payments p set status = 'captured', reservation_id = given.id, updated_at = now()
             from given join locked on locked.id = given.key
             where p.id = given.key and p.status || '' in ('pending', 'processing') and (p.reservation_id = given.id or p.rebooked_as = given.id)
             returning p.reservation_id as id
         ),
         owners as materialized (select r.id from reservations r join paid using (id) order by r.id for no key update of r)
         update reservations r set status = 'confirmed', confirming_until = null, sequence = sequence + 1, updated_at = now()
         from owners where r.id = owners.id and r.status || '' in ('active', 'confirming') and (r.end_time is null or r.end_time > clock_timestamp())
         returning r.id, sequence, now() as "changed_at!", (select count(*) from paid) as "payments!""#,
        captured.iter().map(|captured| captured.reservation.id).collect::<Vec<_>>() as _,
        captured.iter().map(|captured| captured.key).collect::<Vec<_>>() as _,
    )
    .fetch_all(tx.connection()?)
    .await?;
    // A payment whose reservation has ended must not be committed, and must not roll back the others. `None` makes the
    // caller retry each payment alone.
    if paid.first().is_some_and(|row| row.payments != paid.len() as i64) {
        tx.rollback().await?;
        return Ok(None);
    }
    let Some(now) = paid.first().map(|row| row.changed_at) else {
        tx.rollback().await?;
        return unpaid(db, captured).await.map(Some);
    };
    let sequences: HashMap<ReservationId, i64> = paid.into_iter().map(|row| (row.id, row.sequence)).collect();
    let reservations = captured.iter().map(|captured| &captured.reservation);
    let reservations: Vec<&Reservation> =
        reservations.filter(|reservation| sequences.contains_key(&reservation.id)).collect();
    let tickets = match tickets::issue(tx.connection()?, &reservations, now).await {
        Err(error)
            if captured.len() == 1 && database::broken_constraint(&error) == Some("tickets_one_live_per_seat") =>
        {
            return Ok(Some(vec![Ok(Completion::SeatLost)]));
        }
        issued => issued?,
    };
    let completed = |captured: &Captured| {
        let sequence = *sequences.get(&captured.reservation.id)?;
        Some(captured.paid(sequence, now, &tickets))
    };
    let completed: Vec<Option<Paid>> = captured.iter().map(completed).collect();
    let events: Vec<BookingEvent> = completed.iter().flatten().map(|paid| paid.event.clone()).collect();
    let causes: HashMap<ReservationId, &Captured> =
        captured.iter().map(|captured| (captured.reservation.id, captured)).collect();
    let cause = |event: &BookingEvent| causes.get(&event.reservation_id)?.traceparent.clone();
    outbox::append_caused_by(tx.connection()?, &events, cause).await?;
    crash_point("confirm.completing");
    tx.commit().await?;
    crash_point("confirm.completed");
    let completion =
        |paid: Option<Paid>| paid.map_or(Completion::AlreadySettled, |paid| Completion::Paid(Box::new(paid)));
    Ok(Some(completed.into_iter().map(completion).map(Ok).collect()))
}

/// Why none of these charges paid for its reservation.
async fn unpaid(db: &BatchPool, captured: &[Captured]) -> Result<Vec<Result<Completion>>> {
    let mut connection = db.acquire().await?;
    let over = sqlx::query_scalar!(
        "select id from reservations where id = any($1) and status || '' in ('active', 'confirming') and end_time <= clock_timestamp()",
        captured.iter().map(|captured| captured.reservation.id).collect::<Vec<_>>() as _,
    )
    .fetch_all(&mut *connection)
    .await?;
    db.release(connection);
    let completion = |captured: &Captured| match over.contains(&captured.reservation.id) {
        true => Completion::SessionOver,
        false => Completion::AlreadySettled,
    };
    Ok(captured.iter().map(completion).map(Ok).collect())
}

impl Captured {
    /// The confirmed reservation with its tickets and its event.
    fn paid(&self, sequence: i64, now: DateTime<Utc>, issued: &[Ticket]) -> Paid {
        let reservation = Reservation {
            status: ReservationStatus::Confirmed,
            updated_at: now,
            time_remaining_seconds: 0,
            ..self.reservation.clone()
        };
        let tickets: Vec<Ticket> =
            issued.iter().filter(|ticket| ticket.reservation_id == reservation.id).cloned().collect();
        let Reservation { id, user_id, session_id, total_amount, .. } = reservation;
        let currency = reservation.currency.clone();
        let changed = Changed { id, user_id, session_id, sequence, changed_at: now, total_amount, currency };
        let event = BookingEvent {
            session_seat_ids: tickets.iter().map(|ticket| ticket.session_seat_id).collect(),
            ticket_ids: tickets.iter().map(|ticket| ticket.id).collect(),
            amount: Some(total_amount),
            currency: Some(reservation.currency.clone()),
            ..changed.event(BookingEventType::Confirmed)
        };
        Paid { reservation, tickets, event }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reservations::model::find;
    use crate::reservations::testing::{self, reservation};
    use crate::schema::MIGRATIONS;

    /// Other users ask in the same batch, before and after the owner.
    #[tokio::test]
    async fn a_lease_is_its_owners_whoever_else_asks_for_it() {
        let url = service_kit::testing::database("booking", &MIGRATIONS).await;
        let db = BatchPool::new(&url, "test").unwrap();
        let (id, owner) = (ReservationId::new(), UserId::new());
        reservation(&db, id, owner, "active").await;
        let request = |owner| LeaseRequest { id, owner: Some(owner), key: PaymentId::new(), payment_id: None };
        let requests = [UserId::new(), owner, UserId::new()].map(request).to_vec();
        let key = requests[1].key;
        let leased: Vec<_> = lease_all(db.clone(), requests).await.into_iter().map(Result::unwrap).collect();
        assert!(matches!(&leased[..], [None, Some(leased), None] if leased.user_id == owner), "{leased:?}");
        let payments: Vec<PaymentId> =
            sqlx::query_scalar("select id from payments").fetch_all(db.pool()).await.unwrap();
        assert_eq!(payments, [key]);
    }

    /// A slow provider leaves thousands of payments `processing`.
    #[tokio::test]
    async fn a_lease_reads_no_payments_of_others_even_by_a_plan_from_before_there_were_any() {
        let url = service_kit::testing::database("booking", &MIGRATIONS).await;
        let db = BatchPool::new(&url, "test").unwrap();
        for is_waited_for in [false, true] {
            let id = ReservationId::new();
            reservation(&db, id, UserId::new(), "active").await;
            if is_waited_for {
                let processing = "insert into payments (id, reservation_id, amount, currency, status) values (gen_random_uuid(), $1, 100, 'USD', 'processing')";
                for _ in 0..50 {
                    let other = ReservationId::new();
                    reservation(&db, other, UserId::new(), "active").await;
                    sqlx::query(processing).bind(other).execute(db.pool()).await.unwrap();
                }
            }
            let request = LeaseRequest { id, owner: None, key: PaymentId::new(), payment_id: None };
            let leased = lease_all(db.clone(), vec![request]).await;
            assert!(matches!(&leased[..], [Ok(Some(_))]), "{leased:?}");
        }
        // The pool hands out first the connection that counted the reads.
        let mut connection = db.acquire().await.unwrap();
        sqlx::query("select pg_stat_force_next_flush()").execute(&mut *connection).await.unwrap();
        let read = "select idx_tup_read from pg_stat_user_indexes where indexrelname = 'payments_processing'";
        let read: i64 = sqlx::query_scalar(read).fetch_one(&mut *connection).await.unwrap();
        assert_eq!(read, 0);
    }

    /// A reservation may expire after it was read and before its payment is completed.
    #[tokio::test]
    async fn a_payment_whose_reservation_has_ended_is_left_as_it_is_and_spoils_no_other() {
        let url = service_kit::testing::database("booking", &MIGRATIONS).await;
        let db = BatchPool::new(&url, "test").unwrap();
        let [alive, ended] = [(); 2].map(|()| (ReservationId::new(), PaymentId::new()));
        for ((id, key), reservation, payment) in [(alive, "confirming", "pending"), (ended, "expired", "processing")] {
            testing::reservation(&db, id, UserId::new(), reservation).await;
            let charged =
                "insert into payments (id, reservation_id, amount, currency, status) values ($1, $2, 100, 'USD', $3)";
            sqlx::query(charged).bind(key).bind(id).bind(payment).execute(db.pool()).await.unwrap();
        }
        let mut captured = Vec::new();
        for (id, key) in [ended, alive] {
            let reservation = find(db.pool(), id, None).await.unwrap();
            captured.push(Captured { reservation, key, traceparent: None });
        }
        let completed = complete_all(db.clone(), captured).await;
        assert!(matches!(completed[..], [Ok(Completion::AlreadySettled), Ok(Completion::Paid(_))]), "{completed:?}");
        let payments: Vec<(PaymentId, String)> =
            sqlx::query_as("select id, status from payments order by id").fetch_all(db.pool()).await.unwrap();
        assert_eq!(payments, [(alive.1, "captured".to_owned()), (ended.1, "processing".to_owned())]);
    }
}
