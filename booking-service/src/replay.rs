//! Replay: events that were published are published again, for a receiver that has lost them.
//!
//! They keep their ids, so whoever has applied one knows it as a repeat: replaying anything, any number of times,
//! changes nothing that is right already. The outbox itself is only read; events that have not left yet are the
//! relay's.

use std::sync::Arc;

use anyhow::bail;
use axum::Json;
use axum::extract::State;
use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};
use service_kit::amqp::{Outgoing, Published, Publisher};
use service_kit::auth::AdminCaller;
use service_kit::http::error::{Error, Result};
use service_kit::http::extract::ApiJson;
use service_kit::http::openapi;
use service_kit::problems;
use shared_contracts::booking_event::BookingEventType;
use shared_contracts::ids::ReservationId;
use shared_contracts::problem::{Code, FieldError, Problem};
use sqlx::PgPool;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::outbox::{BATCH_MAX, StoredEvent};

/// How far a service's clock, which ids are made by, may be ahead of the database's.
const CLOCKS_APART_MAX: TimeDelta = TimeDelta::minutes(10);
/// Events that one call publishes, when it does not say.
const EVENTS_PER_CALL: u16 = 500;
/// What a client should wait while the broker is away.
const RETRY_AFTER_SECONDS: u32 = 5;

/// Which stored events to publish again. At least one of `from` and `reservation_id` is needed.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
#[schema(example = json!({ "from": "2026-01-01T00:00:00Z", "event_type": "reservation.confirmed" }))]
pub struct ReplayRequest {
    /// Those that were committed at this time or later.
    pub from: Option<DateTime<Utc>>,
    /// Those that were committed before this time.
    pub to: Option<DateTime<Utc>>,
    /// Only of this type.
    pub event_type: Option<BookingEventType>,
    /// Only of this reservation.
    pub reservation_id: Option<ReservationId>,
    /// How many in this call; 500 when left out.
    #[schema(minimum = 1, maximum = 1000)]
    pub limit: Option<u16>,
    /// The `next_cursor` of the call before.
    pub cursor: Option<Uuid>,
}

/// What was published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
pub struct Replayed {
    /// Events that the broker has.
    pub published: usize,
    /// Pass it as `cursor` to go on; null when there are no more.
    pub next_cursor: Option<Uuid>,
}

problems!(Refusals: openapi::BODY, &[Code::BrokerUnavailable]);

/// Publish stored events again
///
/// Harmless when repeated: receivers know events by their ids. Events that have not been published yet are left to be.
#[utoipa::path(post, path = "/api/v1/admin/events/replay", tag = "4 Administration", security((), ("bearer" = ["admin"])), request_body = ReplayRequest,
    responses((status = 200, description = "Published", body = Replayed), Refusals))]
pub(crate) async fn replay_events(
    State(db): State<PgPool>,
    State(publisher): State<Arc<Publisher>>,
    _: AdminCaller,
    ApiJson(request): ApiJson<ReplayRequest>,
) -> Result<Json<Replayed>> {
    if request.from.is_none() && request.reservation_id.is_none() {
        return Err(Error::invalid(FieldError::at("/from", "is required, unless reservation_id is given")));
    }
    replay(&db, &publisher, &request).await.map(Json)
}

/// Publishes one page of events.
///
/// # Errors
/// The database or the broker does not answer; what was published before that may be published again.
pub async fn replay(db: &PgPool, publisher: &Publisher, request: &ReplayRequest) -> Result<Replayed> {
    let limit = usize::from(request.limit.unwrap_or(EVENTS_PER_CALL));
    let events = published(db, request, limit as i64).await?;
    let published = publish(publisher, &events).await.map_err(|cause| {
        let detail = "The broker did not take the events. Try again; those that it did take are known by their ids.";
        let problem = Problem::new(Code::BrokerUnavailable, detail).retry_after(RETRY_AFTER_SECONDS);
        Error::Unavailable { problem: Box::new(problem), cause }
    })?;
    let next_cursor = events.last().filter(|_| events.len() == limit).map(|last| last.message_id);
    Ok(Replayed { published, next_cursor })
}

async fn publish(publisher: &Publisher, events: &[Outgoing]) -> anyhow::Result<usize> {
    publisher.connect_if_needed().await?;
    for batch in events.chunks(BATCH_MAX as usize) {
        let outcomes = publisher.publish(batch).await?;
        if let Some(outcome) = outcomes.into_iter().find(|outcome| *outcome != Published::Confirmed) {
            bail!("an event was not taken: {outcome:?}");
        }
    }
    Ok(events.len())
}

/// A page of published events, in the order of their ids, which is nearly that of their commits.
///
/// # Errors
/// The database failed.
async fn published(db: &PgPool, wanted: &ReplayRequest, limit: i64) -> Result<Vec<Outgoing>> {
    // Ids begin with the time at which they were made, shortly before the commit: they are the index by time.
    let not_before = wanted.from.map_or(Uuid::nil(), |from| first_id_of(from - CLOCKS_APART_MAX));
    let events: Vec<StoredEvent> = sqlx::query_as(
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
    Ok(events.into_iter().map(StoredEvent::into_message).collect())
}

/// The lowest UUIDv7 of a time.
fn first_id_of(time: DateTime<Utc>) -> Uuid {
    let millis = u128::try_from(time.timestamp_millis()).unwrap_or(0);
    Uuid::from_u128((millis & 0xFFFF_FFFF_FFFF) << 80)
}
