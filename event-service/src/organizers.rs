//! Organizers: who puts events on.

use axum::Json;
use axum::extract::State;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use service_kit::answer::Created;
use service_kit::error::{Error, Result};
use service_kit::extract::{ApiJson, ApiPath, ApiQuery};
use service_kit::{openapi, refusals};
use shared_contracts::ids::OrganizerId;
use shared_contracts::page::{Page, PageQuery};
use shared_contracts::problem::Code;
use sqlx::{FromRow, PgPool};
use utoipa::ToSchema;
use uuid::Uuid;

/// An organizer.
#[derive(Debug, Serialize, FromRow, ToSchema)]
pub struct Organizer {
    organizer_id: OrganizerId,
    name: String,
    description: Option<String>,
    contact_email: Option<String>,
    contact_phone: Option<String>,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
}

/// A new organizer.
#[derive(Debug, Deserialize, ToSchema)]
pub struct CreateOrganizer {
    #[schema(min_length = 1, max_length = 200, example = "City Stage")]
    name: String,
    #[schema(max_length = 5000, example = "Concerts and plays since 1987")]
    description: Option<String>,
    #[schema(max_length = 254, format = "email", example = "box-office@example.com")]
    contact_email: Option<String>,
    #[schema(max_length = 50, example = "+49 30 1234567")]
    contact_phone: Option<String>,
}

refusals!(CreateRefusals: openapi::BODY);
refusals!(GetRefusals: &[Code::OrganizerNotFound, Code::ValidationFailed]);
refusals!(ListRefusals: &[Code::ValidationFailed]);

/// Create an organizer
#[utoipa::path(post, path = "/api/v1/organizers", tag = "1 Organizers", request_body = CreateOrganizer,
    responses((status = 201, description = "Made", body = Organizer), CreateRefusals))]
pub(crate) async fn create_organizer(
    State(db): State<PgPool>,
    ApiJson(new): ApiJson<CreateOrganizer>,
) -> Result<Created<Organizer>> {
    let organizer: Organizer = sqlx::query_as(
        "insert into organizers (organizer_id, name, description, contact_email, contact_phone) values ($1, $2, $3, $4, $5) returning *",
    )
    .bind(OrganizerId::new())
    .bind(new.name)
    .bind(new.description)
    .bind(new.contact_email)
    .bind(new.contact_phone)
    .fetch_one(&db)
    .await?;
    Ok(Created { location: format!("/api/v1/organizers/{}", organizer.organizer_id), body: organizer })
}

/// List organizers, oldest first
#[utoipa::path(get, path = "/api/v1/organizers", tag = "1 Organizers", params(PageQuery),
    responses((status = 200, description = "A page", body = Page<Organizer>), ListRefusals))]
pub(crate) async fn list_organizers(
    State(db): State<PgPool>,
    ApiQuery(page): ApiQuery<PageQuery>,
) -> Result<Json<Page<Organizer>>> {
    let rows: Vec<Organizer> =
        sqlx::query_as("select * from organizers where organizer_id > $1 order by organizer_id limit $2")
            .bind(page.cursor.unwrap_or(Uuid::nil()))
            .bind(page.rows_to_read())
            .fetch_all(&db)
            .await?;
    Ok(Json(Page::from_rows(rows, &page, |row| row.organizer_id.as_uuid())))
}

/// Get an organizer
#[utoipa::path(get, path = "/api/v1/organizers/{organizer_id}", tag = "1 Organizers", params(("organizer_id" = OrganizerId, Path)),
    responses((status = 200, description = "The organizer", body = Organizer), GetRefusals))]
pub(crate) async fn get_organizer(
    State(db): State<PgPool>,
    ApiPath(id): ApiPath<OrganizerId>,
) -> Result<Json<Organizer>> {
    let found = sqlx::query_as("select * from organizers where organizer_id = $1").bind(id).fetch_optional(&db).await?;
    found.map(Json).ok_or_else(|| Error::refused(Code::OrganizerNotFound, format!("No organizer has the id {id}.")))
}
