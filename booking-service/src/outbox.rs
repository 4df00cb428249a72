//! The outbox: a change writes its event in the same transaction. The relay publishes the event afterwards, until the
//! broker has confirmed it.
//!
//! Only this file writes `outbox`.

use chrono::{DateTime, Utc};
use service_kit::amqp::{Outgoing, Published, Publisher};
use service_kit::observe::traces;
use service_kit::postgres::database::BatchPool;
use service_kit::process::crash::crash_point;
use shared_contracts::booking_event::BookingEvent;
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

/// The most events published in one batch; their rows are locked meanwhile.
pub const BATCH_MAX: i64 = 100;

/// Writes events, in the transaction of the changes that they announce.
///
/// # Errors
/// The database failed.
pub async fn append(tx: &mut PgConnection, events: &[BookingEvent]) -> Result<(), sqlx::Error> {
    let cause = traces::traceparent();
    append_caused_by(tx, events, |_| cause.clone()).await
}

/// The same for events of several requests: `cause` returns the trace context of each event's request.
///
/// # Errors
/// The database failed.
pub async fn append_caused_by(
    tx: &mut PgConnection,
    events: &[BookingEvent],
    cause: impl Fn(&BookingEvent) -> Option<String>,
) -> Result<(), sqlx::Error> {
    // As text, because a JSON tree would turn the money into a float.
    let mut payloads = Vec::with_capacity(events.len());
    for event in events {
        payloads.push(serde_json::to_string(event).map_err(|error| sqlx::Error::Encode(error.into()))?);
    }
    sqlx::query!(
        "insert into outbox (id, event_type, reservation_id, sequence, payload, traceparent)
         select id, event_type, reservation_id, sequence, payload::jsonb, traceparent
         from unnest($1::uuid[], $2::text[], $3::uuid[], $4::int8[], $5::text[], $6::text[])
             as new (id, event_type, reservation_id, sequence, payload, traceparent)",
        events.iter().map(|event| event.event_id).collect::<Vec<_>>() as _,
        events.iter().map(|event| event.event_type.routing_key()).collect::<Vec<_>>() as _,
        events.iter().map(|event| event.reservation_id).collect::<Vec<_>>() as _,
        &events.iter().map(|event| event.sequence).collect::<Vec<_>>(),
        &payloads,
        events.iter().map(cause).collect::<Vec<_>>() as _,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// A stored event, as the relay and a replay read it.
pub(crate) struct StoredEvent {
    pub(crate) id: Uuid,
    pub(crate) event_type: String,
    pub(crate) payload: sqlx::types::Json<Box<serde_json::value::RawValue>>,
    pub(crate) traceparent: Option<String>,
    pub(crate) created_at: DateTime<Utc>,
}

/// The result of one batch of the relay.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Relayed {
    /// Events that the broker has confirmed.
    pub published: usize,
    /// Events that the broker did not confirm; they stay in the outbox.
    pub left: usize,
}

/// Which events a batch takes. Neither kind waits for the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// All events but those of expired reservations. The relay publishes them at once, and full batches without a
    /// pause.
    Urgent,
    /// Events of expired reservations, in one batch every 200 ms. Their seats are on sale again without the event
    /// (`workflows/after_commit.rs`). So when a whole hall expires at once, the machine serves buyers first.
    Expired,
}

/// Publishes the oldest pending events and marks those that the broker confirmed.
///
/// The rows stay locked while the broker confirms, bounded by the publisher's time-out. So two relays share the work,
/// and a relay that dies frees its rows. An event that was published but not marked is published again under the same
/// id.
///
/// # Errors
/// The database or the broker does not answer; nothing is lost.
pub async fn relay_batch(db: &BatchPool, publisher: &Publisher, wanted: Wanted) -> anyhow::Result<Relayed> {
    // Before the transaction, so that a broker that is away costs no database connection and no row locks.
    publisher.connect_if_needed().await?;
    let mut tx = db.begin().await?;
    let pending = sqlx::query_as!(
        StoredEvent,
        "select id, event_type, payload, traceparent, created_at from outbox
         where published_at is null and (event_type = 'reservation.expired') = $2
         order by coalesce(tried_at, created_at), id limit $1 for update skip locked",
        BATCH_MAX,
        wanted == Wanted::Expired,
    )
    .fetch_all(tx.connection()?)
    .await?;
    if pending.is_empty() {
        tx.rollback().await?;
        return Ok(Relayed::default());
    }
    let batch: Vec<Outgoing> = pending.into_iter().map(StoredEvent::into_message).collect();
    let outcomes = publisher.publish(&batch).await?;
    crash_point("relay.published");
    let mut confirmed = Vec::with_capacity(batch.len());
    for (message, outcome) in batch.iter().zip(outcomes) {
        match outcome {
            Published::Confirmed => {
                confirmed.push(message.message_id);
                let trace_id = message.traceparent.as_deref().and_then(traces::trace_id);
                tracing::info!(routing_key = message.routing_key, message_id = %message.message_id, trace_id, "Published event");
            }
            Published::Unroutable => {
                tracing::error!(
                    routing_key = message.routing_key,
                    "No queue is bound for this event; it stays in the outbox. Is the Event Service up?"
                );
            }
            Published::Refused => tracing::warn!(
                routing_key = message.routing_key,
                "The broker refused this event; it stays in the outbox"
            ),
        }
    }
    sqlx::query!("update outbox set published_at = now() where id = any($1)", &confirmed)
        .execute(tx.connection()?)
        .await?;
    if confirmed.len() < batch.len() {
        let all: Vec<Uuid> = batch.iter().map(|message| message.message_id).collect();
        sqlx::query!("update outbox set tried_at = now() where id = any($1) and published_at is null", &all)
            .execute(tx.connection()?)
            .await?;
    }
    tx.commit().await?;
    Ok(Relayed { published: confirmed.len(), left: batch.len() - confirmed.len() })
}

impl StoredEvent {
    /// The message that carries this event to the broker.
    pub(crate) fn into_message(self) -> Outgoing {
        Outgoing {
            message_id: self.id,
            routing_key: self.event_type,
            body: self.payload.0.get().as_bytes().to_vec(),
            timestamp: self.created_at.timestamp().unsigned_abs(),
            traceparent: self.traceparent,
        }
    }
}

/// The events that wait for the broker.
#[derive(Debug, Clone, Copy)]
pub struct Backlog {
    /// The number of events; counting stops at [`BACKLOG_COUNTED_MAX`].
    pub pending: i64,
    /// How many seconds the oldest of the counted events has waited; 0 if none waits. Events of expired reservations do
    /// not count, because they leave at a limited rate.
    pub oldest_age_seconds: f64,
}

/// Counting stops at this number of events, so that it stays cheap when the broker is away for a day.
pub const BACKLOG_COUNTED_MAX: i64 = 10_000;

/// Counts the events that wait for the broker now.
///
/// # Errors
/// The database failed.
pub async fn backlog(db: &PgPool) -> Result<Backlog, sqlx::Error> {
    sqlx::query_as!(
        Backlog,
        r#"select count(*) as "pending!",
                coalesce(greatest(0, extract(epoch from now() - min(created_at) filter (where event_type <> 'reservation.expired'))), 0)::float8
                    as "oldest_age_seconds!"
         from (
             select created_at, event_type from outbox where published_at is null
             order by (event_type = 'reservation.expired'), coalesce(tried_at, created_at), id limit $1
         ) waiting"#,
        BACKLOG_COUNTED_MAX,
    )
    .fetch_one(db)
    .await
}
