//! Replay: publishes events again, for a receiver that has lost them.
//!
//! Events keep their ids, so a receiver that has applied one recognizes the repeat. A replay of anything, any number of
//! times, changes nothing that is right already. A replay only reads the outbox. It leaves events that have not been
//! published yet to the relay.

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

/// How far a service's clock, which ids are made by, may be behind the database's.
const CLOCKS_APART_MAX: TimeDelta = TimeDelta::minutes(10);
/// The number of events that one call publishes if it sets no `limit`.
const EVENTS_PER_CALL: u16 = 500;
/// How long a client should wait while the broker is away.
const RETRY_AFTER_SECONDS: u32 = 5;

/// Which stored events to publish again. At least one of `from` and `reservation_id` is needed.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({ "from": "2026-01-01T00:00:00Z", "event_type": "reservation.confirmed" }))]
pub struct ReplayRequest {
    /// Only events that were committed at this time or later.
    pub from: Option<DateTime<Utc>>,
    /// Only events that were committed before this time.
    pub to: Option<DateTime<Utc>>,
    /// Only events of this type.
    pub event_type: Option<BookingEventType>,
    /// Only events of this reservation.
    pub reservation_id: Option<ReservationId>,
    /// The most events to publish in this call; 500 if left out.
    #[schema(minimum = 1, maximum = 1000)]
    pub limit: Option<u16>,
    /// The `next_cursor` of the previous call.
    pub cursor: Option<Uuid>,
}

/// The result of one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
pub struct Replayed {
    /// The number of events that the broker has confirmed.
    pub published: usize,
    /// Send it as `cursor` to continue; null when there are no more.
    pub next_cursor: Option<Uuid>,
}

problems!(Refusals: openapi::BODY, &[Code::BrokerUnavailable]);

/// Publish stored events again
///
/// Harmless when repeated: receivers recognize events by their ids. Events that were never published are left out.
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
/// The database or the broker does not answer. Some events may be published already; a repeat is harmless.
pub async fn replay(db: &PgPool, publisher: &Publisher, request: &ReplayRequest) -> Result<Replayed> {
    let limit = usize::from(request.limit.unwrap_or(EVENTS_PER_CALL));
    let events = published(db, request, limit as i64).await?;
    let published = publish(publisher, &events).await.map_err(|cause| {
        let detail = "The broker did not confirm all events. Try again; receivers know repeated events by their ids.";
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
            bail!("the broker did not confirm an event: {outcome:?}");
        }
    }
    Ok(events.len())
}

/// A page of published events, in the order of their ids, which is nearly that of their commits.
///
/// # Errors
/// The database failed.
async fn published(db: &PgPool, wanted: &ReplayRequest, limit: i64) -> Result<Vec<Outgoing>> {
    // Ids begin with the time at which they were made, shortly before the commit. So the primary key serves as an index
    // by time.
    let not_before = wanted.from.map_or(Uuid::nil(), |from| first_id_of(from - CLOCKS_APART_MAX));
    let events = sqlx::query_as!(
        StoredEvent,
        "select id, event_type, payload, traceparent, created_at from outbox
         where id > greatest($1::uuid, $2) and published_at is not null
           and ($3::timestamptz is null or created_at >= $3) and ($4::timestamptz is null or created_at < $4)
           and ($5::text is null or event_type = $5) and ($6::uuid is null or reservation_id = $6)
         order by id limit $7",
        wanted.cursor.unwrap_or(Uuid::nil()),
        not_before,
        wanted.from,
        wanted.to,
        wanted.event_type.map(BookingEventType::routing_key),
        wanted.reservation_id as _,
        limit,
    )
    .fetch_all(db)
    .await?;
    Ok(events.into_iter().map(StoredEvent::into_message).collect())
}

/// The lowest UUIDv7 of a time.
fn first_id_of(time: DateTime<Utc>) -> Uuid {
    let millis = u128::try_from(time.timestamp_millis()).unwrap_or(0);
    Uuid::from_u128((millis & 0xFFFF_FFFF_FFFF) << 80)
}
