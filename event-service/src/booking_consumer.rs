//! What the Booking Service announces, applied to the seats: at least once delivered, exactly once done, in any order.
//!
//! The inbox row and the change of the seats are one transaction, and the message is acknowledged after its commit. A message
//! that comes again finds its inbox row; one that comes late finds its seats already beyond it.

use std::collections::HashSet;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use service_kit::amqp::{Incoming, Verdict};
use service_kit::coalesce::{Coalescer, Lanes};
use service_kit::crash::crash_point;
use service_kit::database::{self, DeskPool};
use service_kit::error::{Error, Result};
use service_kit::lifecycle::Lifecycle;
use service_kit::traces;
use shared_contracts::booking_event::{BookingEvent, BookingEventType, SCHEMA_VERSION};
use shared_contracts::ids::{MessageId, SessionSeatId};
use shared_contracts::seat_api::{Hold, SeatConflict};
use sqlx::{PgConnection, PgPool};

use crate::metrics::EventMetrics;
use crate::session_seats::{self, ChangeOutcome, Releasable};

/// The relay sends what has gathered, and the broker hands it out in drops. No buyer waits for this: a seat that is paid for is its owner's
/// already, and is shown as sold a moment later.
const BATCH_CONFIG: Lanes = Lanes { gather: Duration::from_millis(10), ..Lanes::usual(Duration::from_secs(15)) };

/// Where messages that come at the same time are applied together: in the minute of an on-sale the commit is what costs most.
pub struct Applier {
    events: Coalescer<BookingEvent, Applied>,
    metrics: EventMetrics,
}

impl Applier {
    /// Starts it; it ends when nobody has messages for it any more.
    #[must_use]
    pub fn start(batch_db: DeskPool, db: PgPool, metrics: EventMetrics, lifecycle: &Lifecycle) -> Self {
        let work = move |events| apply_batch(batch_db.clone(), db.clone(), events);
        Self { events: Coalescer::start(lifecycle, BATCH_CONFIG, work), metrics }
    }

    /// Applies one message and says what became of it.
    pub async fn handle(&self, incoming: &Incoming) -> Verdict {
        let event = match parse(incoming) {
            Ok(event) => event,
            Err(error) => return Verdict::Poison(error),
        };
        let message_id = event.event_id;
        // The seats of an expired reservation are free before the message, which takes its time.
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

/// What became of an event.
#[derive(Debug, PartialEq, Eq)]
pub enum Applied {
    /// Its seats are as it says.
    Changed,
    /// It had been applied before.
    Repeat,
    /// A later event of the same reservation was applied before it, so its seats are already beyond it.
    Stale,
    /// It contradicts the seats: someone must look.
    Conflict(String),
}

/// Applies what came at the same time in one transaction if nothing is unusual about any of it, and one by one otherwise.
async fn apply_batch(batch_db: DeskPool, db: PgPool, events: Vec<BookingEvent>) -> Vec<Result<Applied>> {
    if let Ok(Some(applied)) = apply_together(&batch_db, &events).await {
        return applied.into_iter().map(Ok).collect();
    }
    // In their order: what is said of one reservation may stand on what was said before.
    let mut applied = Vec::with_capacity(events.len());
    for event in &events {
        applied.push(apply(&db, event).await);
    }
    applied
}

/// Nothing, and nothing is changed, when a confirmation does not find its seats: why, only a look at it alone can tell.
async fn apply_together(db: &DeskPool, events: &[BookingEvent]) -> Result<Option<Vec<Applied>>> {
    let mut tx = db.begin().await?;
    let mut entered = enter_all(tx.connection()?, events).await?;
    // A message that came twice is in here twice, too.
    let fresh: Vec<bool> = events.iter().map(|event| entered.remove(&event.event_id)).collect();
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
    if enter_all(&mut tx, std::slice::from_ref(event)).await?.is_empty() {
        return Ok(Applied::Repeat);
    }
    let seats = seats_of(event);
    let applied = match event.event_type {
        BookingEventType::Confirmed => match session_seats::confirm(&mut tx, event.reservation_id, &seats).await? {
            ChangeOutcome::Done => Applied::Changed,
            ChangeOutcome::Refused(conflicts) if heard_of_later(&mut tx, event).await? => {
                tracing::info!(reservation_id = %event.reservation_id, seats = conflicts.len(), "Confirmation came after what followed it");
                confirm_the_rest(&mut tx, event, &seats, &conflicts).await?
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
        // Without its inbox row, so that it is applied when someone has looked and sends it again.
        return Ok(applied);
    }
    crash_point("consumer.applying");
    tx.commit().await?;
    crash_point("consumer.applied");
    Ok(applied)
}

/// A refund of one ticket was heard before the confirmation of all: the other seats are still to be sold.
async fn confirm_the_rest(
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

/// Writes inbox rows; the ids of those that were not there already.
async fn enter_all(tx: &mut PgConnection, events: &[BookingEvent]) -> Result<HashSet<MessageId>> {
    let entered: Vec<MessageId> = sqlx::query_scalar(
        "insert into inbox (message_id, event_type, reservation_id, sequence)
         select * from unnest($1::uuid[], $2::text[], $3::uuid[], $4::int8[]) on conflict do nothing returning message_id",
    )
    .bind(events.iter().map(|event| event.event_id).collect::<Vec<_>>())
    .bind(events.iter().map(|event| event.event_type.routing_key()).collect::<Vec<_>>())
    .bind(events.iter().map(|event| event.reservation_id).collect::<Vec<_>>())
    .bind(events.iter().map(|event| event.sequence).collect::<Vec<_>>())
    .fetch_all(tx)
    .await?;
    Ok(entered.into_iter().collect())
}

async fn heard_of_later(tx: &mut PgConnection, event: &BookingEvent) -> Result<bool> {
    let heard = sqlx::query_scalar("select exists (select from inbox where reservation_id = $1 and sequence > $2)")
        .bind(event.reservation_id)
        .bind(event.sequence)
        .fetch_one(tx)
        .await?;
    Ok(heard)
}
