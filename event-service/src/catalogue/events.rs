//! Events: a concert, a match, a play. Each of its performances is a session.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use service_kit::auth::OrganizerCaller;
use service_kit::http::answer::Created;
use service_kit::http::error::Result;
use service_kit::http::etag::{Editable, IfMatch, IfMatchHeader};
use service_kit::http::extract::{ApiJson, ApiPatch, ApiPath};
use service_kit::http::openapi;
use service_kit::http::query::ApiQuery;
use service_kit::postgres::database;
use service_kit::{patch_body, problems};
use shared_contracts::ids::{EventId, OrganizerId};
use shared_contracts::page::{Page, PageQuery};
use shared_contracts::problem::Code;
use sqlx::{PgConnection, PgPool};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::error::{event_not_found, in_use, of_constraint};

/// A concert, match, play or the like. Each of its performances is a session.
#[derive(Debug, Serialize, ToSchema)]
pub struct Event {
    event_id: EventId,
    organizer_id: OrganizerId,
    title: String,
    description: Option<String>,
    event_type: EventType,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
    #[serde(skip)]
    version: i64,
}

/// The kind of event.
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

/// Body of the call that creates an event.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateEvent {
    organizer_id: OrganizerId,
    #[schema(min_length = 1, max_length = 200, pattern = r"\S", format = "title", example = "Winter Concert")]
    title: String,
    #[schema(max_length = 5000, format = "prose", example = "Two hours, one break")]
    description: Option<String>,
    event_type: EventType,
}

patch_body!(UpdateEvent: CreateEvent, { "title": "Winter Concert, extended" });

/// Filters of the list of events. All that are given must match.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct EventFilter {
    /// Only events of this organizer.
    #[param(inline)]
    organizer_id: Option<OrganizerId>,
    /// Only events of this type.
    #[param(inline)]
    event_type: Option<EventType>,
    /// Only events whose title or description contains all of these words. Parts of words match, and letter case is
    /// ignored.
    #[param(max_length = 100, example = "winter")]
    q: Option<String>,
}

problems!(CreateRefusals: openapi::BODY, &[Code::OrganizerNotFound]);
problems!(GetRefusals: &[Code::EventNotFound, Code::ValidationFailed]);
problems!(UpdateRefusals: openapi::EDIT, &[Code::EventNotFound, Code::OrganizerNotFound]);
problems!(DeleteRefusals: &[Code::EventNotFound, Code::ResourceInUse, Code::PreconditionFailed, Code::ValidationFailed]);
problems!(ListRefusals: &[Code::ValidationFailed]);

/// Create an event
#[utoipa::path(post, path = "/api/v1/events", tag = "2 Events", security((), ("bearer" = ["organizer", "admin"])), request_body = CreateEvent,
    responses((status = 201, description = "Created", body = Event, headers(("Location" = String), ("ETag" = String)), links(
        ("get" = (operation_id = "get_event", parameters(("event_id" = "$response.body#/event_id")))),
        ("update" = (operation_id = "update_event", parameters(("event_id" = "$response.body#/event_id")))),
        ("delete" = (operation_id = "delete_event", parameters(("event_id" = "$response.body#/event_id")))),
        ("sessions" = (operation_id = "list_sessions", parameters(("event_id" = "$response.body#/event_id")))),
    )), CreateRefusals))]
pub(crate) async fn create_event(
    State(db): State<PgPool>,
    _: OrganizerCaller,
    ApiJson(new): ApiJson<CreateEvent>,
) -> Result<Created<Editable<Event>>> {
    let event = sqlx::query_as!(
        Event,
        "insert into events (event_id, organizer_id, title, description, event_type) values ($1, $2, $3, $4, $5) returning *",
        EventId::new() as _,
        new.organizer_id as _,
        new.title,
        new.description,
        new.event_type as _,
    )
    .fetch_one(&db)
    .await
    .map_err(of_constraint)?;
    Ok(Created { location: format!("/api/v1/events/{}", event.event_id), body: event.editable() })
}

/// List events, oldest first
#[utoipa::path(get, path = "/api/v1/events", tag = "2 Events", params(PageQuery, EventFilter),
    responses((status = 200, description = "A page", body = Page<Event>), ListRefusals))]
pub(crate) async fn list_events(
    State(db): State<PgPool>,
    ApiQuery(page, filter): ApiQuery<PageQuery, EventFilter>,
) -> Result<Json<Page<Event>>> {
    let words: Option<Vec<String>> = filter.q.map(|text| text.split_whitespace().map(like_pattern).collect());
    let rows = sqlx::query_as!(
        Event,
        "select * from events
         where event_id > $1 and ($3::uuid is null or organizer_id = $3) and ($4::text is null or event_type = $4)
           and ($5::text[] is null or (title || ' ' || coalesce(description, '')) ilike all ($5))
         order by event_id limit $2",
        page.cursor.unwrap_or(Uuid::nil()),
        page.rows_to_read(),
        filter.organizer_id as _,
        filter.event_type as _,
        words.as_deref(),
    )
    .fetch_all(&db)
    .await?;
    Ok(Json(Page::from_rows(rows, &page, |row| row.event_id.as_uuid())))
}

/// A pattern that finds `word` anywhere. It escapes the characters that `like` treats as wildcards.
fn like_pattern(word: &str) -> String {
    format!("%{}%", word.replace('\\', r"\\").replace('%', r"\%").replace('_', r"\_"))
}

/// Get an event
#[utoipa::path(get, path = "/api/v1/events/{event_id}", tag = "2 Events", params(("event_id" = EventId, Path)),
    responses((status = 200, description = "The event", body = Event, headers(("ETag" = String))), GetRefusals))]
pub(crate) async fn get_event(State(db): State<PgPool>, ApiPath(id): ApiPath<EventId>) -> Result<Editable<Event>> {
    let found = sqlx::query_as!(Event, "select * from events where event_id = $1", id as _).fetch_optional(&db).await?;
    found.map(Event::editable).ok_or_else(|| event_not_found(id))
}

/// Change an event
#[utoipa::path(patch, path = "/api/v1/events/{event_id}", tag = "2 Events", security((), ("bearer" = ["organizer", "admin"])), request_body = UpdateEvent,
    params(("event_id" = EventId, Path), IfMatchHeader),
    responses((status = 200, description = "Changed", body = Event, headers(("ETag" = String))), UpdateRefusals))]
pub(crate) async fn update_event(
    State(db): State<PgPool>,
    _: OrganizerCaller,
    ApiPath(id): ApiPath<EventId>,
    if_match: IfMatch,
    patch: ApiPatch,
) -> Result<Editable<Event>> {
    let mut tx = database::begin(&db).await?;
    let edited: CreateEvent = patch.apply(&lock(&mut tx, id, &if_match).await?)?;
    let event = sqlx::query_as!(
        Event,
        "update events set organizer_id = $2, title = $3, description = $4, event_type = $5, version = version + 1, updated_at = now()
         where event_id = $1 returning *",
        id as _,
        edited.organizer_id as _,
        edited.title,
        edited.description,
        edited.event_type as _,
    )
    .fetch_one(&mut *tx)
    .await
    .map_err(of_constraint)?;
    tx.commit().await?;
    Ok(event.editable())
}

/// Delete an event
///
/// One that has sessions stays: delete those first.
#[utoipa::path(delete, path = "/api/v1/events/{event_id}", tag = "2 Events", security((), ("bearer" = ["organizer", "admin"])),
    params(("event_id" = EventId, Path), IfMatchHeader), responses((status = 204, description = "Deleted"), DeleteRefusals))]
pub(crate) async fn delete_event(
    State(db): State<PgPool>,
    _: OrganizerCaller,
    ApiPath(id): ApiPath<EventId>,
    if_match: IfMatch,
) -> Result<StatusCode> {
    let mut tx = database::begin(&db).await?;
    lock(&mut tx, id, &if_match).await?;
    let sessions = sqlx::query_scalar!(r#"select count(*) as "count!" from sessions where event_id = $1"#, id as _)
        .fetch_one(&mut *tx)
        .await?;
    in_use(sessions, "session", "Delete its sessions first.")?;
    sqlx::query!("delete from events where event_id = $1", id as _).execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

impl Event {
    fn editable(self) -> Editable<Self> {
        Editable { version: self.version, body: self }
    }
}

/// Locks the row for an edit. Until the transaction ends, no other request changes it or adds a session to it.
async fn lock(tx: &mut PgConnection, id: EventId, if_match: &IfMatch) -> Result<Event> {
    let found = sqlx::query_as!(Event, "select * from events where event_id = $1 for update", id as _)
        .fetch_optional(tx)
        .await?;
    let event = found.ok_or_else(|| event_not_found(id))?;
    if_match.check(event.version)?;
    Ok(event)
}
