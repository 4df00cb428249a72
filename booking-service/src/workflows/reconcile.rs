//! Reconciliation: finds what a crash, a lost message or a lost answer left half-done, and finishes it.
//!
//! It works only from the current content of the databases, so recovery after a crash is an ordinary round. It reads
//! holds from the Event Service and judges them by the reservations here, which are the only authority on them.

use std::collections::{BTreeSet, HashSet};
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use service_kit::http::error::Result;
use shared_contracts::ids::{ReservationId, SessionId};
use shared_contracts::seat_api::{Hold, OverdueHold, TimeCursor};
use uuid::Uuid;

use super::settle_holds::{Healed, settle};
use super::{confirm, late_payment, payment_webhook, refunds, session_cancelled};
use crate::reservations::model::{BOOKING_TIME_MAX, SessionHold};
use crate::reservations::payment_outcomes::{self, StuckPayment};
use crate::reservations::refunds as refund_rows;
use crate::state::App;

/// The age at which a hold without a reservation counts as abandoned: twice the time in which its row may be written.
pub const ABANDONED_AFTER: Duration = Duration::from_secs(2 * BOOKING_TIME_MAX.as_secs());
/// How long after the start of its booking a hold may still appear: a `reserve` request may arrive after its caller has
/// given up.
const LATE_HOLD_MAX: TimeDelta = TimeDelta::seconds(60);
/// How long past its time a hold is left to the expiry worker. Settling the same holds here as well would double the
/// time that the end of 100,000 simultaneous holds takes.
const EXPIRY_TIME_USUAL: Duration = Duration::from_secs(10);
/// Holds read at a time.
const HOLDS_PER_PAGE: u16 = 500;
/// How long after its cancellation a session is checked again. A booking that began before the cancellation takes far
/// less time.
const LATE_BOOKING_MAX: TimeDelta = TimeDelta::minutes(10);
/// Cancelled sessions read at a time.
const SESSIONS_PER_PAGE: u16 = 500;
/// Reservations of a cancelled session ended in one transaction.
const ENDED_PER_BATCH: i64 = 100;
/// Payments and refunds settled at a time.
const PAYMENTS_PER_BATCH: i64 = 50;

/// The progress of the walks that continue from one round to the next.
#[derive(Debug, Default)]
pub struct Sweep {
    /// How long past its time a hold is left to the expiry worker.
    grace: TimeDelta,
    /// The walk over fresh holds: it has covered holds that are due before this time. It checks a hold once the hold is
    /// old enough, and again for `LATE_HOLD_MAX` after.
    looked_until: Option<DateTime<Utc>>,
    /// The walk over cancelled sessions: the latest cancellation read. The first round reads all sessions, later rounds
    /// only the latest.
    cancelled_until: Option<DateTime<Utc>>,
    /// Cancelled sessions that may still have reservations to end.
    ending: BTreeSet<SessionId>,
}

impl Sweep {
    /// A sweep beside the expiry worker, which gets `EXPIRY_TIME_USUAL` to end holds first.
    #[must_use]
    pub fn beside_expiry() -> Self {
        Self { grace: TimeDelta::from_std(EXPIRY_TIME_USUAL).unwrap_or_default(), ..Self::default() }
    }
}

/// Runs one round over the holds: those past their time, then those that have become old enough since the last round.
///
/// # Errors
/// A database or the Event Service does not answer; the next round goes on.
pub async fn reconcile_once(app: &App, sweep: &mut Sweep) -> Result<Healed> {
    let now = sqlx::query_scalar!(r#"select now() as "now!""#).fetch_one(&app.db).await?;
    let mut healed = Healed::default();

    healed.add(walk(app, now - sweep.grace, None).await?);

    // A hold is due one hold time after its booking began, so this asks for bookings that began long enough ago.
    let grace = TimeDelta::from_std(ABANDONED_AFTER).unwrap_or(TimeDelta::MAX);
    let old_enough = now + (app.rules.hold_interval() - grace).max(TimeDelta::zero());
    let from = sweep.looked_until.map_or(now, |until| now.max(until - LATE_HOLD_MAX));
    healed.add(walk(app, old_enough, Some(TimeCursor { time: from, id: Uuid::nil() })).await?);
    sweep.looked_until = Some(old_enough);
    app.metrics.healed(healed.released, healed.confirmed);
    if healed.released + healed.confirmed > 0 {
        tracing::info!(released = healed.released, confirmed = healed.confirmed, "Reconciliation put seats right");
    }
    Ok(healed)
}

/// Settles all holds that are due before `before`, from `cursor` on.
async fn walk(app: &App, before: DateTime<Utc>, mut cursor: Option<TimeCursor>) -> Result<Healed> {
    let mut healed = Healed::default();
    loop {
        let page = app.event_service.holds_before(before, cursor, HOLDS_PER_PAGE).await?;
        match settle_holds(app, &page.items).await {
            Ok(settled) => healed.add(settled),
            // A failing page must not hide the pages behind it.
            Err(error) => {
                tracing::warn!(error = format!("{:#}", anyhow::Error::from(error)), "Some holds are not settled yet")
            }
        }
        cursor = page.next_cursor.and_then(|next| next.parse().ok());
        if cursor.is_none() {
            return Ok(healed);
        }
    }
}

async fn settle_holds(app: &App, holds: &[OverdueHold]) -> Result<Healed> {
    // Nearly all holds belong to live reservations. Those cost only this one query, without a lock.
    // `reservations/mod.rs` explains `status || ''`.
    let under_way: HashSet<ReservationId> = sqlx::query_scalar!(
        "select id from reservations
         where id = any($1) and (status || '' = 'confirming' or status || '' = 'active' and expiry_time > clock_timestamp())",
        holds.iter().map(|hold| hold.reservation_id).collect::<Vec<_>>() as _,
    )
    .fetch_all(&app.db)
    .await?
    .into_iter()
    .collect();
    let seats: Vec<SessionHold> = holds
        .iter()
        .filter(|hold| !under_way.contains(&hold.reservation_id))
        .map(|hold| SessionHold {
            session_id: hold.session_id,
            hold: Hold { reservation_id: hold.reservation_id, session_seat_id: hold.session_seat_id },
        })
        .collect();
    let mut healed = settle(app, &seats).await?;
    healed.left += holds.len() - seats.len();
    Ok(healed)
}

/// Ends the reservations of cancelled sessions: cancels active ones and refunds the tickets of paid ones. Returns how
/// many.
///
/// The Event Service never calls this service, so the worker asks it for cancelled sessions. A payment in progress is
/// left to finish, and a later round refunds it.
///
/// # Errors
/// The database or the Event Service does not answer; a later round goes on.
pub async fn end_cancelled_sessions(app: &App, sweep: &mut Sweep) -> Result<usize> {
    let mut cursor = sweep.cancelled_until.map(|until| TimeCursor { time: until - LATE_BOOKING_MAX, id: Uuid::nil() });
    loop {
        let page = app.event_service.cancelled_sessions(cursor, SESSIONS_PER_PAGE).await?;
        sweep.ending.extend(page.items.iter().map(|session| session.session_id));
        sweep.cancelled_until = page.items.last().map(|session| session.cancelled_at).or(sweep.cancelled_until);
        cursor = page.next_cursor.and_then(|next| next.parse().ok());
        if cursor.is_none() {
            break;
        }
    }
    sweep.ending = session_cancelled::with_live_reservations(&app.db, &sweep.ending).await?;
    let mut ended = Ok(0);
    for session_id in &sweep.ending {
        // A failing session must not keep the buyers of the others from their money.
        match end_cancelled_session(app, *session_id).await {
            Ok(count) => ended = ended.map(|ended| ended + count),
            Err(error) => ended = Err(error),
        }
    }
    ended
}

async fn end_cancelled_session(app: &App, session_id: SessionId) -> Result<usize> {
    let mut ended = 0;
    loop {
        let batch = session_cancelled::end_reservations(app, session_id, ENDED_PER_BATCH).await?;
        if batch == 0 {
            return Ok(ended);
        }
        tracing::info!(%session_id, reservations = batch, "Ended reservations of a cancelled session");
        ended += batch;
    }
}

/// Settles confirmations whose lease has run out, by asking the provider for the outcome of the charge. Returns how
/// many.
///
/// # Errors
/// The database or the provider does not answer; the new lease runs out, and a later round settles them.
pub async fn settle_payments(app: &App) -> Result<usize> {
    let stuck = payment_outcomes::take_over_leases(&app.db, PAYMENTS_PER_BATCH).await?;
    let mut settled = Ok(stuck.len());
    for payment in stuck {
        // A failing payment must not keep other buyers from their tickets.
        if let Err(error) = settle_payment(app, payment).await {
            settled = Err(error);
        }
    }
    settled
}

async fn settle_payment(app: &App, payment: StuckPayment) -> Result<()> {
    let StuckPayment { reservation_id: id, id: key, amount } = payment;
    let outcome = app.provider.settle_unknown(key, amount).await?;
    let concluded = confirm::conclude(app, id, key, outcome).await?;
    tracing::info!(reservation_id = %id, ?outcome, ?concluded, "Settled a payment of unknown fate");
    Ok(())
}

/// Processes stored notices, and asks the provider about charges that it is processing. Returns how many of both
/// succeeded.
///
/// # Errors
/// The database, the provider or the Event Service does not answer; a later round goes on.
pub async fn follow_up_payments(app: &App) -> Result<usize> {
    let mut followed = payment_webhook::handle_waiting(app, PAYMENTS_PER_BATCH).await;
    for id in payment_outcomes::take_processing(&app.db, PAYMENTS_PER_BATCH).await? {
        // A failing payment must not keep other buyers from their tickets.
        match late_payment::follow_up(app, id).await {
            Ok(()) => followed = followed.map(|count| count + 1),
            Err(error) => followed = Err(error),
        }
    }
    followed
}

/// Has the provider pay all pending refunds. Returns how many it paid.
///
/// # Errors
/// The database does not answer. A refund that fails is logged and stays pending for a later round.
pub async fn settle_refunds(app: &App) -> Result<usize> {
    let mut settled = 0;
    let mut after = Uuid::nil();
    loop {
        // Ordered by id, so that a failing refund is tried only once in a round.
        let owed = refund_rows::pending(&app.db, after, PAYMENTS_PER_BATCH).await?;
        let Some(last) = owed.last() else {
            return Ok(settled);
        };
        after = last.id;
        for refund in owed {
            match refunds::settle_refund(app, refund).await {
                Ok(()) => settled += 1,
                Err(error) => {
                    tracing::warn!(error = format!("{:#}", anyhow::Error::from(error)), refund = %refund.id, "A refund is not settled yet")
                }
            }
        }
    }
}
