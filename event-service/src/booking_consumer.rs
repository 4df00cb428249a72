//! Applies the events of the Booking Service to the seats: delivered at least once, applied exactly once, in any order.
//!
//! One transaction writes the inbox row and changes the seats; the consumer acknowledges the message after the commit.
//! A repeated message finds its inbox row. A late message finds seats that a later event has already changed.

use std::collections::HashSet;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use service_kit::amqp::{Incoming, Verdict};
use service_kit::http::error::{Error, Result};
use service_kit::observe::traces;
use service_kit::postgres::batch::{BatchConfig, Batcher};
use service_kit::postgres::database::{self, BatchPool};
use service_kit::process::crash::crash_point;
use service_kit::process::lifecycle::Lifecycle;
use shared_contracts::booking_event::{BookingEvent, BookingEventType, SCHEMA_VERSION};
use shared_contracts::ids::{MessageId, SessionSeatId};
use shared_contracts::seat::SeatConflict;
use shared_contracts::seat_api::Hold;
use sqlx::{PgConnection, PgPool};

use crate::metrics::EventMetrics;
use crate::session_seats::{self, ChangeOutcome, Releasable};

/// RabbitMQ delivers a published batch in pieces, so the consumer waits 10 ms to collect them. Buyers do not wait for
/// this: a paid seat belongs to its owner already, and the map shows it as sold a moment later.
const BATCH_CONFIG: BatchConfig =
    BatchConfig { linger: Duration::from_millis(10), ..BatchConfig::with_timeout(Duration::from_secs(15)) };

/// Applies messages in batches, because the commit is the largest cost when a sale opens.
pub struct Applier {
    events: Batcher<BookingEvent, Applied>,
    metrics: EventMetrics,
}

impl Applier {
    /// Starts the batch workers. They end when the applier is dropped.
    #[must_use]
    pub fn start(batch_db: BatchPool, db: PgPool, metrics: EventMetrics, lifecycle: &Lifecycle) -> Self {
        let work = move |events| apply_batch(batch_db.clone(), db.clone(), events);
        Self { events: Batcher::start(lifecycle, BATCH_CONFIG, work), metrics }
    }

    /// Applies one message and tells the consumer how to acknowledge it.
    pub async fn handle(&self, incoming: &Incoming) -> Verdict {
        let event = match parse(incoming) {
            Ok(event) => event,
            Err(error) => return Verdict::Poison(error),
        };
        let message_id = event.event_id;
        // The seats of an expired reservation are free before its message comes, so nothing waits for it.
        let waited_since = (event.event_type != BookingEventType::Expired).then_some(event.occurred_at);
        match traces::step("session_seats.apply", self.events.call(event)).await {
            Ok(Applied::Changed) => {
                self.metrics.count_message("applied", waited_since);
                Verdict::Done
            }
            Ok(Applied::Stale) => {
                self.metrics.count_message("stale", waited_since);
                Verdict::Done
            }
            Ok(Applied::Repeat) => {
                self.metrics.count_message("duplicate", waited_since);
                tracing::info!(%message_id, "Message known already; nothing to do");
                Verdict::Done
            }
            Ok(Applied::Conflict(reason)) => Verdict::Poison(anyhow!(reason)),
            Err(Error::Database(error)) if database::is_unavailable(&error) => Verdict::Unavailable(error.into()),
            Err(error) => Verdict::Failed(error.into()),
        }
    }
}

fn parse(incoming: &Incoming) -> anyhow::Result<BookingEvent> {
    let event: BookingEvent = serde_json::from_slice(&incoming.body).context("the body is not a booking event")?;
    if event.schema_version > SCHEMA_VERSION {
        bail!(
            "schema version {} is newer than {SCHEMA_VERSION}: deploy the Event Service first, then send the message again",
            event.schema_version
        );
    }
    Ok(event)
}

/// The effect of an event.
#[derive(Debug, PartialEq, Eq)]
pub enum Applied {
    /// The event changed its seats, or they were already as it says.
    Changed,
    /// The event was applied before.
    Repeat,
    /// A later event of the same reservation was applied first, so its seats have moved on.
    Stale,
    /// The event contradicts the seats, for this reason: an operator must check it.
    Conflict(String),
}

/// Applies a batch of events in one transaction, or one by one if any of them needs a decision of its own.
async fn apply_batch(batch_db: BatchPool, db: PgPool, events: Vec<BookingEvent>) -> Vec<Result<Applied>> {
    if let Ok(Some(applied)) = apply_in_one_transaction(&batch_db, &events).await {
        return applied.into_iter().map(Ok).collect();
    }
    // In order, because an event of a reservation may build on an earlier one.
    let mut applied = Vec::with_capacity(events.len());
    for event in &events {
        applied.push(apply(&db, event).await);
    }
    applied
}

/// `None`, with nothing changed, if a confirmation does not find its seats: only applying it alone tells why.
async fn apply_in_one_transaction(db: &BatchPool, events: &[BookingEvent]) -> Result<Option<Vec<Applied>>> {
    let mut tx = db.begin().await?;
    let mut inserted = insert_inbox_rows(tx.connection()?, events).await?;
    // The batch may hold the same message twice; only the first counts as fresh.
    let fresh: Vec<bool> = events.iter().map(|event| inserted.remove(&event.event_id)).collect();
    let of_type = |types: &'static [BookingEventType]| {
        let fresh = events.iter().zip(&fresh).filter(|(_, fresh)| **fresh).map(|(event, _)| event);
        fresh.filter(|event| types.contains(&event.event_type))
    };
    let confirmed: Vec<_> =
        of_type(&[BookingEventType::Confirmed]).map(|event| (event.reservation_id, seats_of(event))).collect();
    let ended: Vec<_> = of_type(&[BookingEventType::Expired, BookingEventType::Cancelled]).flat_map(holds_of).collect();
    let refunded: Vec<_> = of_type(&[BookingEventType::TicketRefunded]).flat_map(holds_of).collect();
    if [confirmed.is_empty(), ended.is_empty(), refunded.is_empty()].iter().filter(|none| !**none).count() > 1 {
        let seats: Vec<_> = events.iter().flat_map(|event| event.session_seat_ids.iter().copied()).collect();
        session_seats::lock(tx.connection()?, &seats).await?;
    }
    if !confirmed.is_empty() {
        let orders: Vec<_> = confirmed.iter().map(|(owner, seats)| (*owner, seats.as_slice())).collect();
        let outcomes = session_seats::confirm_each(tx.connection()?, &orders).await?;
        if outcomes.iter().any(|outcome| *outcome != ChangeOutcome::Done) {
            tx.rollback().await?;
            return Ok(None);
        }
    }
    for (holds, releasable) in [(ended, Releasable::Held), (refunded, Releasable::HeldOrSold)] {
        if !holds.is_empty() {
            session_seats::free(tx.connection()?, &holds, releasable).await?;
        }
    }
    crash_point("consumer.applying");
    tx.commit().await?;
    crash_point("consumer.applied");
    Ok(Some(fresh.into_iter().map(|fresh| if fresh { Applied::Changed } else { Applied::Repeat }).collect()))
}

fn seats_of(event: &BookingEvent) -> Vec<SessionSeatId> {
    let mut seats = event.session_seat_ids.clone();
    seats.sort_unstable();
    seats.dedup();
    seats
}

fn holds_of(event: &BookingEvent) -> Vec<Hold> {
    let hold = |seat: &SessionSeatId| Hold { reservation_id: event.reservation_id, session_seat_id: *seat };
    event.session_seat_ids.iter().map(hold).collect()
}

/// Applies an event in one transaction with its inbox row.
///
/// # Errors
/// The database failed; nothing was applied.
pub async fn apply(db: &PgPool, event: &BookingEvent) -> Result<Applied> {
    let mut tx = database::begin(db).await?;
    if insert_inbox_rows(&mut tx, std::slice::from_ref(event)).await?.is_empty() {
        return Ok(Applied::Repeat);
    }
    let seats = seats_of(event);
    let applied = match event.event_type {
        BookingEventType::Confirmed => match session_seats::confirm(&mut tx, event.reservation_id, &seats).await? {
            ChangeOutcome::Done => Applied::Changed,
            ChangeOutcome::Refused(conflicts) if has_later_event(&mut tx, event).await? => {
                tracing::info!(reservation_id = %event.reservation_id, seats = conflicts.len(), "Confirmation came after a later event of its reservation");
                confirm_remaining(&mut tx, event, &seats, &conflicts).await?
            }
            ChangeOutcome::Refused(conflicts) => Applied::Conflict(format!(
                "reservation {} is confirmed but does not hold {conflicts:?}",
                event.reservation_id
            )),
        },
        BookingEventType::Expired | BookingEventType::Cancelled => {
            session_seats::free(&mut tx, &holds_of(event), Releasable::Held).await?;
            Applied::Changed
        }
        BookingEventType::TicketRefunded => {
            session_seats::free(&mut tx, &holds_of(event), Releasable::HeldOrSold).await?;
            Applied::Changed
        }
    };
    if matches!(applied, Applied::Conflict(_)) {
        // Without its inbox row, so that it can be applied after an operator has checked it and requeued it.
        return Ok(applied);
    }
    crash_point("consumer.applying");
    tx.commit().await?;
    crash_point("consumer.applied");
    Ok(applied)
}

/// Sells the remaining seats of a confirmation that came after the refund of one of its tickets.
async fn confirm_remaining(
    tx: &mut PgConnection,
    event: &BookingEvent,
    seats: &[SessionSeatId],
    conflicts: &[SeatConflict],
) -> Result<Applied> {
    let gone = |id: &SessionSeatId| conflicts.iter().any(|conflict| conflict.session_seat_id == *id);
    let rest: Vec<_> = seats.iter().copied().filter(|id| !gone(id)).collect();
    match session_seats::confirm(tx, event.reservation_id, &rest).await? {
        ChangeOutcome::Done => Ok(Applied::Stale),
        ChangeOutcome::Refused(conflicts) => {
            Ok(Applied::Conflict(format!("reservation {} does not hold {conflicts:?}", event.reservation_id)))
        }
    }
}

/// Writes inbox rows, and returns the ids of those that are new.
async fn insert_inbox_rows(tx: &mut PgConnection, events: &[BookingEvent]) -> Result<HashSet<MessageId>> {
    let inserted = sqlx::query_scalar!(
        "insert into inbox (message_id, event_type, reservation_id, sequence)
         select * from unnest($1::uuid[], $2::text[], $3::uuid[], $4::int8[]) on conflict do nothing returning message_id",
        events.iter().map(|event| event.event_id).collect::<Vec<_>>() as _,
        events.iter().map(|event| event.event_type.routing_key()).collect::<Vec<_>>() as _,
        events.iter().map(|event| event.reservation_id).collect::<Vec<_>>() as _,
        events.iter().map(|event| event.sequence).collect::<Vec<_>>() as _,
    )
    .fetch_all(tx)
    .await?;
    Ok(inserted.into_iter().collect())
}

async fn has_later_event(tx: &mut PgConnection, event: &BookingEvent) -> Result<bool> {
    let exists = sqlx::query_scalar!(
        r#"select exists (select from inbox where reservation_id = $1 and sequence > $2) as "exists!""#,
        event.reservation_id as _,
        event.sequence,
    )
    .fetch_one(tx)
    .await?;
    Ok(exists)
}
