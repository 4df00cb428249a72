//! Organizers: the people and companies that put on events.

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
use shared_contracts::ids::OrganizerId;
use shared_contracts::page::{Page, PageQuery};
use shared_contracts::problem::Code;
use sqlx::{PgConnection, PgPool};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::error::{in_use, organizer_not_found};

/// A person or company that puts on events.
#[derive(Debug, Serialize, ToSchema)]
pub struct Organizer {
    organizer_id: OrganizerId,
    name: String,
    description: Option<String>,
    contact_email: Option<String>,
    contact_phone: Option<String>,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
    #[serde(skip)]
    version: i64,
}

/// Body of the call that creates an organizer.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateOrganizer {
    #[schema(min_length = 1, max_length = 200, pattern = r"\S", format = "title", example = "City Stage")]
    name: String,
    #[schema(max_length = 5000, format = "prose", example = "Concerts and plays since 1987")]
    description: Option<String>,
    #[schema(max_length = 254, format = "idn-email", example = "box-office@example.com")]
    contact_email: Option<String>,
    #[schema(max_length = 50, format = "title", example = "+49 30 1234567")]
    contact_phone: Option<String>,
}

patch_body!(UpdateOrganizer: CreateOrganizer, { "contact_phone": "+49 30 7654321" });

problems!(CreateRefusals: openapi::BODY);
problems!(GetRefusals: &[Code::OrganizerNotFound, Code::ValidationFailed]);
problems!(UpdateRefusals: openapi::EDIT, &[Code::OrganizerNotFound]);
problems!(DeleteRefusals: &[Code::OrganizerNotFound, Code::ResourceInUse, Code::PreconditionFailed, Code::ValidationFailed]);
problems!(ListRefusals: &[Code::ValidationFailed]);

/// Create an organizer
#[utoipa::path(post, path = "/api/v1/organizers", tag = "1 Organizers", security((), ("bearer" = ["organizer", "admin"])), request_body = CreateOrganizer,
    responses((status = 201, description = "Created", body = Organizer, headers(("Location" = String), ("ETag" = String)), links(
        ("get" = (operation_id = "get_organizer", parameters(("organizer_id" = "$response.body#/organizer_id")))),
        ("update" = (operation_id = "update_organizer", parameters(("organizer_id" = "$response.body#/organizer_id")))),
        ("delete" = (operation_id = "delete_organizer", parameters(("organizer_id" = "$response.body#/organizer_id")))),
        ("events" = (operation_id = "list_events", parameters(("organizer_id" = "$response.body#/organizer_id")))),
    )), CreateRefusals))]
pub(crate) async fn create_organizer(
    State(db): State<PgPool>,
    _: OrganizerCaller,
    ApiJson(new): ApiJson<CreateOrganizer>,
) -> Result<Created<Editable<Organizer>>> {
    let organizer = sqlx::query_as!(
        Organizer,
        "insert into organizers (organizer_id, name, description, contact_email, contact_phone) values ($1, $2, $3, $4, $5) returning *",
        OrganizerId::new() as _,
        new.name,
        new.description,
        new.contact_email,
        new.contact_phone,
    )
    .fetch_one(&db)
    .await?;
    Ok(Created { location: format!("/api/v1/organizers/{}", organizer.organizer_id), body: organizer.editable() })
}

/// List organizers, oldest first
#[utoipa::path(get, path = "/api/v1/organizers", tag = "1 Organizers", params(PageQuery),
    responses((status = 200, description = "A page", body = Page<Organizer>), ListRefusals))]
pub(crate) async fn list_organizers(
    State(db): State<PgPool>,
    ApiQuery(page, _): ApiQuery<PageQuery>,
) -> Result<Json<Page<Organizer>>> {
    let rows = sqlx::query_as!(
        Organizer,
        "select * from organizers where organizer_id > $1 order by organizer_id limit $2",
        page.cursor.unwrap_or(Uuid::nil()),
        page.rows_to_read(),
    )
    .fetch_all(&db)
    .await?;
    Ok(Json(Page::from_rows(rows, &page, |row| row.organizer_id.as_uuid())))
}

/// Get an organizer
#[utoipa::path(get, path = "/api/v1/organizers/{organizer_id}", tag = "1 Organizers", params(("organizer_id" = OrganizerId, Path)),
    responses((status = 200, description = "The organizer", body = Organizer, headers(("ETag" = String))), GetRefusals))]
pub(crate) async fn get_organizer(
    State(db): State<PgPool>,
    ApiPath(id): ApiPath<OrganizerId>,
) -> Result<Editable<Organizer>> {
    let found = sqlx::query_as!(Organizer, "select * from organizers where organizer_id = $1", id as _)
        .fetch_optional(&db)
        .await?;
    found.map(Organizer::editable).ok_or_else(|| organizer_not_found(id))
}

/// Change an organizer
#[utoipa::path(patch, path = "/api/v1/organizers/{organizer_id}", tag = "1 Organizers", security((), ("bearer" = ["organizer", "admin"])), request_body = UpdateOrganizer,
    params(("organizer_id" = OrganizerId, Path), IfMatchHeader),
    responses((status = 200, description = "Changed", body = Organizer, headers(("ETag" = String))), UpdateRefusals))]
pub(crate) async fn update_organizer(
    State(db): State<PgPool>,
    _: OrganizerCaller,
    ApiPath(id): ApiPath<OrganizerId>,
    if_match: IfMatch,
    patch: ApiPatch,
) -> Result<Editable<Organizer>> {
    let mut tx = database::begin(&db).await?;
    let edited: CreateOrganizer = patch.apply(&lock(&mut tx, id, &if_match).await?)?;
    let organizer = sqlx::query_as!(
        Organizer,
        "update organizers set name = $2, description = $3, contact_email = $4, contact_phone = $5, version = version + 1, updated_at = now()
         where organizer_id = $1 returning *",
        id as _,
        edited.name,
        edited.description,
        edited.contact_email,
        edited.contact_phone,
    )
    .fetch_one(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(organizer.editable())
}

/// Delete an organizer
///
/// Refused while the organizer has events: delete those first, or move them to another organizer.
#[utoipa::path(delete, path = "/api/v1/organizers/{organizer_id}", tag = "1 Organizers", security((), ("bearer" = ["organizer", "admin"])),
    params(("organizer_id" = OrganizerId, Path), IfMatchHeader), responses((status = 204, description = "Deleted"), DeleteRefusals))]
pub(crate) async fn delete_organizer(
    State(db): State<PgPool>,
    _: OrganizerCaller,
    ApiPath(id): ApiPath<OrganizerId>,
    if_match: IfMatch,
) -> Result<StatusCode> {
    let mut tx = database::begin(&db).await?;
    lock(&mut tx, id, &if_match).await?;
    let events = sqlx::query_scalar!(r#"select count(*) as "count!" from events where organizer_id = $1"#, id as _)
        .fetch_one(&mut *tx)
        .await?;
    in_use(events, "event", "Delete its events, or give them to another organizer, first.")?;
    sqlx::query!("delete from organizers where organizer_id = $1", id as _).execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

impl Organizer {
    fn editable(self) -> Editable<Self> {
        Editable { version: self.version, body: self }
    }
}

/// Locks the row for an edit. Until the transaction ends, no other request changes it or adds an event to it.
async fn lock(tx: &mut PgConnection, id: OrganizerId, if_match: &IfMatch) -> Result<Organizer> {
    let found = sqlx::query_as!(Organizer, "select * from organizers where organizer_id = $1 for update", id as _)
        .fetch_optional(tx)
        .await?;
    let organizer = found.ok_or_else(|| organizer_not_found(id))?;
    if_match.check(organizer.version)?;
    Ok(organizer)
}
