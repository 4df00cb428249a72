//! The outbox: an event is written in the transaction of its change, and published afterwards until the broker has it.
//!
//! Only this file writes `outbox`.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use service_kit::amqp::{Outgoing, Published, Publisher};
use service_kit::crash::crash_point;
use service_kit::database::DeskPool;
use service_kit::traces;
use shared_contracts::booking_event::{BookingEvent, BookingEventType};
use sqlx::{FromRow, PgConnection, PgPool};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::replay::ReplayRequest;
use crate::state::Shared;

/// Events published in one go, and rows locked meanwhile.
pub const BATCH_MAX: i64 = 100;
/// One batch with all its waits: a database that vanished without a word must not stop the relay for ever.
const RELAY_TIME_MAX: Duration = Duration::from_secs(30);
/// How often the relay looks without being nudged: events of other processes, and of a time without a broker.
const POLL_INTERVAL: Duration = Duration::from_millis(200);
/// How far a service's clock, which ids are made by, may be ahead of the database's.
const CLOCKS_APART_MAX: TimeDelta = TimeDelta::minutes(10);
/// From one batch to the next, so that a broker and a consumer who are busy have fewer and larger ones: the first 10 ms
/// were a fourteenth of a journey's work, and the others as much (measured). What comes after a quiet time leaves at once.
const GATHER_TIME: Duration = Duration::from_millis(25);
/// How long it leaves a broker alone that just failed.
const PAUSE_AFTER_FAULT: Duration = Duration::from_secs(1);

/// Writes events, in the transaction of the changes that they announce.
///
/// # Errors
/// The database failed.
pub async fn append(tx: &mut PgConnection, events: &[BookingEvent]) -> Result<(), sqlx::Error> {
    let cause = traces::traceparent();
    append_caused_by(tx, events, |_| cause.clone()).await
}

/// The same for events that several requests have caused: `cause` tells each event's trace context.
///
/// # Errors
/// The database failed.
pub async fn append_caused_by(
    tx: &mut PgConnection,
    events: &[BookingEvent],
    cause: impl Fn(&BookingEvent) -> Option<String>,
) -> Result<(), sqlx::Error> {
    // As text: a JSON tree would make a float of the money.
    let mut payloads = Vec::with_capacity(events.len());
    for event in events {
        payloads.push(serde_json::to_string(event).map_err(|error| sqlx::Error::Encode(error.into()))?);
    }
    sqlx::query(
        "insert into outbox (id, event_type, reservation_id, sequence, payload, traceparent)
         select id, event_type, reservation_id, sequence, payload::jsonb, traceparent
         from unnest($1::uuid[], $2::text[], $3::uuid[], $4::int8[], $5::text[], $6::text[])
             as new (id, event_type, reservation_id, sequence, payload, traceparent)",
    )
    .bind(events.iter().map(|event| event.event_id).collect::<Vec<_>>())
    .bind(events.iter().map(|event| event.event_type.routing_key()).collect::<Vec<_>>())
    .bind(events.iter().map(|event| event.reservation_id).collect::<Vec<_>>())
    .bind(events.iter().map(|event| event.sequence).collect::<Vec<_>>())
    .bind(payloads)
    .bind(events.iter().map(cause).collect::<Vec<_>>())
    .execute(tx)
    .await?;
    Ok(())
}

#[derive(FromRow)]
struct Pending {
    id: Uuid,
    event_type: String,
    payload: sqlx::types::Json<Box<serde_json::value::RawValue>>,
    traceparent: Option<String>,
    created_at: DateTime<Utc>,
}

/// What one batch came to.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Relayed {
    /// Events that the broker has confirmed.
    pub published: usize,
    /// Events that it did not take; they stay.
    pub left: usize,
}

/// Which events a relay takes. Neither kind waits for the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// All but those of expired reservations: at once, and full batches one after the other.
    Urgent,
    /// Those of expired reservations: a batch each [`POLL_INTERVAL`]. Their seats are on sale again without the message (`finish.rs`), and
    /// when a hall of them ends at once, those who buy need the machine more.
    Expired,
}

/// Publishes the oldest pending events and marks those that the broker confirmed.
///
/// The rows stay locked while the broker confirms (bounded by the publisher's time-out), so that two relays share the work
/// and a relay that dies frees its rows. An event that was published but not marked is published again under the same id.
///
/// # Errors
/// The database or the broker does not answer; nothing is lost.
pub async fn relay_batch(db: &DeskPool, publisher: &Publisher, wanted: Wanted) -> anyhow::Result<Relayed> {
    // Before the transaction: a broker that is away must not cost a connection and row locks.
    publisher.connect_if_needed().await?;
    let mut tx = db.begin().await?;
    let pending: Vec<Pending> = sqlx::query_as(
        "select id, event_type, payload, traceparent, created_at from outbox
         where published_at is null and (event_type = 'reservation.expired') = $2
         order by coalesce(tried_at, created_at), id limit $1 for update skip locked",
    )
    .bind(BATCH_MAX)
    .bind(wanted == Wanted::Expired)
    .fetch_all(tx.connection()?)
    .await?;
    if pending.is_empty() {
        tx.rollback().await?;
        return Ok(Relayed::default());
    }
    let batch: Vec<Outgoing> = pending.into_iter().map(Pending::into_message).collect();
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
    sqlx::query("update outbox set published_at = now() where id = any($1)")
        .bind(&confirmed)
        .execute(tx.connection()?)
        .await?;
    if confirmed.len() < batch.len() {
        let all: Vec<Uuid> = batch.iter().map(|message| message.message_id).collect();
        let sql = "update outbox set tried_at = now() where id = any($1) and published_at is null";
        sqlx::query(sql).bind(all).execute(tx.connection()?).await?;
    }
    tx.commit().await?;
    Ok(Relayed { published: confirmed.len(), left: batch.len() - confirmed.len() })
}

impl Pending {
    fn into_message(self) -> Outgoing {
        Outgoing {
            message_id: self.id,
            routing_key: self.event_type,
            body: self.payload.0.get().as_bytes().to_vec(),
            timestamp: self.created_at.timestamp().unsigned_abs(),
            traceparent: self.traceparent,
        }
    }
}

/// Events that wait.
#[derive(Debug, Clone, Copy, FromRow)]
pub struct Backlog {
    /// How many, counted to [`BACKLOG_COUNTED_MAX`].
    pub pending: i64,
    /// How long the oldest of those counted has waited; of the urgent ones alone, as a hall of expired reservations takes its time.
    pub oldest_age_seconds: f64,
}

/// How many waiting events are counted: a broker that is away for a day must not make the counting a burden, too.
pub const BACKLOG_COUNTED_MAX: i64 = 10_000;

/// What waits for the broker now.
///
/// # Errors
/// The database failed.
pub async fn backlog(db: &PgPool) -> Result<Backlog, sqlx::Error> {
    sqlx::query_as(
        "select count(*) as pending,
                coalesce(greatest(0, extract(epoch from now() - min(created_at) filter (where event_type <> 'reservation.expired'))), 0)::float8
                    as oldest_age_seconds
         from (
             select created_at, event_type from outbox where published_at is null
             order by (event_type = 'reservation.expired'), coalesce(tried_at, created_at), id limit $1
         ) waiting",
    )
    .bind(BACKLOG_COUNTED_MAX)
    .fetch_one(db)
    .await
}

/// A page of published events, in the order of their ids, which is nearly that of their commits.
///
/// # Errors
/// The database failed.
pub async fn published(db: &PgPool, wanted: &ReplayRequest, limit: i64) -> Result<Vec<Outgoing>, sqlx::Error> {
    // Ids begin with the time at which they were made, shortly before the commit: they are the index by time.
    let not_before = wanted.from.map_or(Uuid::nil(), |from| first_id_of(from - CLOCKS_APART_MAX));
    let events: Vec<Pending> = sqlx::query_as(
        "select id, event_type, payload, traceparent, created_at from outbox
         where id > greatest($1, $2) and published_at is not null
           and ($3::timestamptz is null or created_at >= $3) and ($4::timestamptz is null or created_at < $4)
           and ($5::text is null or event_type = $5) and ($6::uuid is null or reservation_id = $6)
         order by id limit $7",
    )
    .bind(wanted.cursor.unwrap_or(Uuid::nil()))
    .bind(not_before)
    .bind(wanted.from)
    .bind(wanted.to)
    .bind(wanted.event_type.map(BookingEventType::routing_key))
    .bind(wanted.reservation_id)
    .bind(limit)
    .fetch_all(db)
    .await?;
    Ok(events.into_iter().map(Pending::into_message).collect())
}

/// The lowest UUIDv7 of a time.
fn first_id_of(time: DateTime<Utc>) -> Uuid {
    let millis = u128::try_from(time.timestamp_millis()).unwrap_or(0);
    Uuid::from_u128((millis & 0xFFFF_FFFF_FFFF) << 80)
}

/// Relays until `stopping`: urgent events at once when nudged, and both kinds every [`POLL_INTERVAL`].
///
/// # Errors
/// None; faults are logged and tried again.
pub async fn relay(app: &Shared, stopping: CancellationToken) -> anyhow::Result<()> {
    let mut faulty = false;
    // When each kind is looked for next.
    let mut urgent_at = Instant::now();
    let mut expired_at = urgent_at;
    while !stopping.is_cancelled() {
        let mut fault = false;
        for (wanted, at) in [(Wanted::Urgent, &mut urgent_at), (Wanted::Expired, &mut expired_at)] {
            if Instant::now() < *at {
                continue;
            }
            let relayed = tokio::time::timeout(RELAY_TIME_MAX, relay_batch(&app.desk_db, &app.publisher, wanted)).await;
            let relayed = relayed.map_err(anyhow::Error::from).flatten();
            relayed.iter().for_each(|relayed| app.metrics.relayed(*relayed));
            let pause = match relayed {
                // What some of the batch could not do, others behind them can.
                Ok(Relayed { published, left }) if left == 0 || published > 0 => {
                    let is_full = (published + left) as i64 == BATCH_MAX;
                    if is_full && wanted == Wanted::Urgent { Duration::ZERO } else { POLL_INTERVAL }
                }
                Ok(_) => PAUSE_AFTER_FAULT,
                Err(error) => {
                    if !faulty && !fault {
                        tracing::warn!(
                            error = format!("{error:#}"),
                            "Events can't be published; they wait in the outbox"
                        );
                    }
                    fault = true;
                    PAUSE_AFTER_FAULT
                }
            };
            *at = Instant::now() + pause;
        }
        faulty = fault;
        // Who comes meanwhile leaves together with those after them. A full batch has company enough.
        if urgent_at > Instant::now() {
            tokio::time::sleep(GATHER_TIME).await;
        }
        tokio::select! {
            () = stopping.cancelled() => {}
            () = app.outbox_nudge.notified(), if !faulty => urgent_at = Instant::now(),
            () = tokio::time::sleep_until(urgent_at.min(expired_at)) => {}
        }
    }
    Ok(())
}
