//! Events: what is put on. An event takes place in sessions.

use axum::Json;
use axum::extract::State;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use service_kit::answer::Created;
use service_kit::error::{Error, Result};
use service_kit::extract::{ApiJson, ApiPath, ApiQuery};
use service_kit::{openapi, refusals};
use shared_contracts::ids::{EventId, OrganizerId};
use shared_contracts::page::{Page, PageQuery};
use shared_contracts::problem::Code;
use sqlx::{FromRow, PgPool};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::error::of_constraint;

/// An event.
#[derive(Debug, Serialize, FromRow, ToSchema)]
pub struct Event {
    event_id: EventId,
    organizer_id: OrganizerId,
    title: String,
    description: Option<String>,
    event_type: EventType,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
}

/// What kind of event.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, sqlx::Type, ToSchema)]
#[serde(rename_all = "snake_case")]
#[sqlx(type_name = "text", rename_all = "snake_case")]
#[expect(missing_docs, reason = "the names say it")]
pub enum EventType {
    Concert,
    Sport,
    Movie,
    Theatre,
    Conference,
    Other,
}

/// A new event.
#[derive(Debug, Deserialize, ToSchema)]
pub struct CreateEvent {
    organizer_id: OrganizerId,
    #[schema(min_length = 1, max_length = 200, example = "Winter Concert")]
    title: String,
    #[schema(max_length = 5000, example = "Two hours, one break")]
    description: Option<String>,
    event_type: EventType,
}

/// Which events to list.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct EventFilter {
    /// Only this organizer's.
    organizer_id: Option<OrganizerId>,
    /// Only of this type.
    event_type: Option<EventType>,
}

refusals!(CreateRefusals: openapi::BODY, &[Code::OrganizerNotFound]);
refusals!(GetRefusals: &[Code::EventNotFound, Code::ValidationFailed]);
refusals!(ListRefusals: &[Code::ValidationFailed]);

/// Create an event
#[utoipa::path(post, path = "/api/v1/events", tag = "2 Events", request_body = CreateEvent,
    responses((status = 201, description = "Made", body = Event), CreateRefusals))]
pub(crate) async fn create_event(
    State(db): State<PgPool>,
    ApiJson(new): ApiJson<CreateEvent>,
) -> Result<Created<Event>> {
    let event: Event = sqlx::query_as(
        "insert into events (event_id, organizer_id, title, description, event_type) values ($1, $2, $3, $4, $5) returning *",
    )
    .bind(EventId::new())
    .bind(new.organizer_id)
    .bind(new.title)
    .bind(new.description)
    .bind(new.event_type)
    .fetch_one(&db)
    .await
    .map_err(of_constraint)?;
    Ok(Created { location: format!("/api/v1/events/{}", event.event_id), body: event })
}

/// List events, oldest first
#[utoipa::path(get, path = "/api/v1/events", tag = "2 Events", params(PageQuery, EventFilter),
    responses((status = 200, description = "A page", body = Page<Event>), ListRefusals))]
pub(crate) async fn list_events(
    State(db): State<PgPool>,
    ApiQuery(page): ApiQuery<PageQuery>,
    ApiQuery(filter): ApiQuery<EventFilter>,
) -> Result<Json<Page<Event>>> {
    let rows: Vec<Event> = sqlx::query_as(
        "select * from events
         where event_id > $1 and ($3::uuid is null or organizer_id = $3) and ($4::text is null or event_type = $4)
         order by event_id limit $2",
    )
    .bind(page.cursor.unwrap_or(Uuid::nil()))
    .bind(page.rows_to_read())
    .bind(filter.organizer_id)
    .bind(filter.event_type)
    .fetch_all(&db)
    .await?;
    Ok(Json(Page::from_rows(rows, &page, |row| row.event_id.as_uuid())))
}

/// Get an event
#[utoipa::path(get, path = "/api/v1/events/{event_id}", tag = "2 Events", params(("event_id" = EventId, Path)),
    responses((status = 200, description = "The event", body = Event), GetRefusals))]
pub(crate) async fn get_event(State(db): State<PgPool>, ApiPath(id): ApiPath<EventId>) -> Result<Json<Event>> {
    let found = sqlx::query_as("select * from events where event_id = $1").bind(id).fetch_optional(&db).await?;
    found.map(Json).ok_or_else(|| Error::refused(Code::EventNotFound, format!("No event has the id {id}.")))
}
