//! What the Booking Service announces, applied to the seats: at least once delivered, exactly once done, in any order.
//!
//! The inbox row and the change of the seats are one transaction, and the message is acknowledged after its commit. A message
//! that comes again finds its inbox row; one that comes late finds its seats already beyond it.

use std::sync::Arc;

use anyhow::{Context, anyhow, bail};
use service_kit::amqp::{Incoming, Verdict};
use service_kit::crash::crash_point;
use service_kit::database;
use service_kit::error::{Error, Result};
use shared_contracts::booking_event::{BookingEvent, BookingEventType, SCHEMA_VERSION};
use shared_contracts::ids::SessionSeatId;
use sqlx::{PgConnection, PgPool};

use crate::session_seats::{self, ChangeOutcome, GivenBack};

/// Applies one message and says what became of it.
pub async fn handle(db: PgPool, incoming: Arc<Incoming>) -> Verdict {
    let event = match parse(&incoming) {
        Ok(event) => event,
        Err(error) => return Verdict::Poison(error),
    };
    match apply(&db, &event).await {
        Ok(Applied::Changed | Applied::Stale) => Verdict::Done,
        Ok(Applied::Repeat) => {
            tracing::info!(message_id = %event.event_id, "Message known already; nothing to do");
            Verdict::Done
        }
        Ok(Applied::Conflict(reason)) => Verdict::Poison(anyhow!(reason)),
        Err(Error::Database(error)) if database::is_unavailable(&error) => Verdict::Unavailable(error.into()),
        Err(error) => Verdict::Failed(error.into()),
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

/// Applies an event in one transaction with its inbox row.
///
/// # Errors
/// The database failed; nothing was applied.
pub async fn apply(db: &PgPool, event: &BookingEvent) -> Result<Applied> {
    let mut tx = database::begin(db).await?;
    if !enter(&mut tx, event).await? {
        return Ok(Applied::Repeat);
    }
    let mut seats: Vec<SessionSeatId> = event.session_seat_ids.clone();
    seats.sort_unstable();
    seats.dedup();
    let applied = match event.event_type {
        BookingEventType::Confirmed => match session_seats::confirm(&mut tx, event.reservation_id, &seats).await? {
            ChangeOutcome::Done => Applied::Changed,
            ChangeOutcome::Refused(conflicts) if heard_of_later(&mut tx, event).await? => {
                tracing::info!(reservation_id = %event.reservation_id, seats = conflicts.len(), "Confirmation came after what followed it");
                confirm_the_rest(&mut tx, event, &seats, &conflicts).await?
            }
            ChangeOutcome::Refused(conflicts) => {
                return Ok(Applied::Conflict(format!(
                    "reservation {} is confirmed but does not hold {conflicts:?}",
                    event.reservation_id
                )));
            }
        },
        BookingEventType::Expired | BookingEventType::Cancelled => {
            session_seats::release(&mut tx, event.reservation_id, &seats).await?;
            Applied::Changed
        }
        BookingEventType::TicketRefunded => {
            let pairs: Vec<_> = seats.iter().map(|seat| (event.reservation_id, *seat)).collect();
            session_seats::free(&mut tx, &pairs, GivenBack::HeldOrSold).await?;
            Applied::Changed
        }
    };
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
    conflicts: &[shared_contracts::seat_api::SeatConflict],
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

/// Writes the inbox row; false when it is there already.
async fn enter(tx: &mut PgConnection, event: &BookingEvent) -> Result<bool> {
    let entered =
        sqlx::query("insert into inbox (message_id, event_type, reservation_id, sequence) values ($1, $2, $3, $4) on conflict do nothing")
            .bind(event.event_id)
            .bind(event.event_type.routing_key())
            .bind(event.reservation_id)
            .bind(event.sequence)
            .execute(tx)
            .await?
            .rows_affected();
    Ok(entered == 1)
}

async fn heard_of_later(tx: &mut PgConnection, event: &BookingEvent) -> Result<bool> {
    let heard = sqlx::query_scalar("select exists (select from inbox where reservation_id = $1 and sequence > $2)")
        .bind(event.reservation_id)
        .bind(event.sequence)
        .fetch_one(tx)
        .await?;
    Ok(heard)
}
