//! Halls: rooms with seats, at a location.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use service_kit::auth::OrganizerCaller;
use service_kit::http::answer::Created;
use service_kit::http::error::{Error, Result};
use service_kit::http::etag::{Editable, IfMatch, IfMatchHeader};
use service_kit::http::extract::{ApiJson, ApiPatch, ApiPath};
use service_kit::http::openapi;
use service_kit::http::query::ApiQuery;
use service_kit::postgres::database;
use service_kit::{patch_body, problems};
use shared_contracts::ids::{HallId, LocationId};
use shared_contracts::page::{Page, PageQuery};
use shared_contracts::problem::Code;
use sqlx::{PgConnection, PgPool};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::catalogue::seats;
use crate::error::{hall_not_found, in_use, location_not_found, of_constraint};

/// A room with seats, at a location.
#[derive(Debug, Serialize, ToSchema)]
pub struct Hall {
    hall_id: HallId,
    location_id: LocationId,
    name: String,
    /// The maximum number of seats.
    capacity: i32,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
    #[serde(skip)]
    version: i64,
}

/// Body of the call that creates a hall.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateHall {
    #[schema(min_length = 1, max_length = 200, pattern = r"\S", format = "title", example = "Great Hall")]
    name: String,
    #[schema(minimum = 1, maximum = 200_000, example = 2000)]
    capacity: i32,
}

patch_body!(UpdateHall: CreateHall, { "capacity": 2500 });

problems!(CreateRefusals: openapi::BODY, &[Code::LocationNotFound]);
problems!(ListRefusals: &[Code::LocationNotFound, Code::ValidationFailed]);
problems!(GetRefusals: &[Code::HallNotFound, Code::ValidationFailed]);
problems!(UpdateRefusals: openapi::EDIT, &[Code::HallNotFound, Code::HallFull]);
problems!(DeleteRefusals: &[Code::HallNotFound, Code::ResourceInUse, Code::PreconditionFailed, Code::ValidationFailed]);

/// Create a hall
#[utoipa::path(post, path = "/api/v1/locations/{location_id}/halls", tag = "4 Halls and seats", security((), ("bearer" = ["organizer", "admin"])), request_body = CreateHall,
    params(("location_id" = LocationId, Path)), responses((status = 201, description = "Created", body = Hall, headers(("Location" = String), ("ETag" = String)), links(
        ("get" = (operation_id = "get_hall", parameters(("hall_id" = "$response.body#/hall_id")))),
        ("update" = (operation_id = "update_hall", parameters(("hall_id" = "$response.body#/hall_id")))),
        ("delete" = (operation_id = "delete_hall", parameters(("hall_id" = "$response.body#/hall_id")))),
        ("create_seats" = (operation_id = "create_seats", parameters(("hall_id" = "$response.body#/hall_id")))),
    )), CreateRefusals))]
pub(crate) async fn create_hall(
    State(db): State<PgPool>,
    _: OrganizerCaller,
    ApiPath(location_id): ApiPath<LocationId>,
    ApiJson(new): ApiJson<CreateHall>,
) -> Result<Created<Editable<Hall>>> {
    let hall = sqlx::query_as!(
        Hall,
        "insert into halls (hall_id, location_id, name, capacity) values ($1, $2, $3, $4) returning *",
        HallId::new() as _,
        location_id as _,
        new.name,
        new.capacity,
    )
    .fetch_one(&db)
    .await
    .map_err(of_constraint)?;
    Ok(Created { location: format!("/api/v1/halls/{}", hall.hall_id), body: hall.editable() })
}

/// List a location's halls, oldest first
#[utoipa::path(get, path = "/api/v1/locations/{location_id}/halls", tag = "4 Halls and seats",
    params(("location_id" = LocationId, Path), PageQuery), responses((status = 200, description = "A page", body = Page<Hall>), ListRefusals))]
pub(crate) async fn list_halls(
    State(db): State<PgPool>,
    ApiPath(location_id): ApiPath<LocationId>,
    ApiQuery(page, _): ApiQuery<PageQuery>,
) -> Result<Json<Page<Hall>>> {
    let rows = sqlx::query_as!(
        Hall,
        "select * from halls where location_id = $3 and hall_id > $1 order by hall_id limit $2",
        page.cursor.unwrap_or(Uuid::nil()),
        page.rows_to_read(),
        location_id as _,
    )
    .fetch_all(&db)
    .await?;
    if rows.is_empty() {
        let known = sqlx::query_scalar!(
            r#"select exists (select from locations where location_id = $1) as "known!""#,
            location_id as _,
        )
        .fetch_one(&db)
        .await?;
        known.then_some(()).ok_or_else(|| location_not_found(location_id))?;
    }
    Ok(Json(Page::from_rows(rows, &page, |row| row.hall_id.as_uuid())))
}

/// Get a hall
#[utoipa::path(get, path = "/api/v1/halls/{hall_id}", tag = "4 Halls and seats", params(("hall_id" = HallId, Path)),
    responses((status = 200, description = "The hall", body = Hall, headers(("ETag" = String))), GetRefusals))]
pub(crate) async fn get_hall(State(db): State<PgPool>, ApiPath(id): ApiPath<HallId>) -> Result<Editable<Hall>> {
    let found = sqlx::query_as!(Hall, "select * from halls where hall_id = $1", id as _).fetch_optional(&db).await?;
    found.map(Hall::editable).ok_or_else(|| hall_not_found(id))
}

/// Change a hall
///
/// The capacity must be at least the number of seats that the hall has.
#[utoipa::path(patch, path = "/api/v1/halls/{hall_id}", tag = "4 Halls and seats", security((), ("bearer" = ["organizer", "admin"])), request_body = UpdateHall,
    params(("hall_id" = HallId, Path), IfMatchHeader),
    responses((status = 200, description = "Changed", body = Hall, headers(("ETag" = String))), UpdateRefusals))]
pub(crate) async fn update_hall(
    State(db): State<PgPool>,
    _: OrganizerCaller,
    ApiPath(id): ApiPath<HallId>,
    if_match: IfMatch,
    patch: ApiPatch,
) -> Result<Editable<Hall>> {
    let mut tx = database::begin(&db).await?;
    let edited: CreateHall = patch.apply(&lock(&mut tx, id, &if_match).await?)?;
    let present = seats::count(&mut tx, id).await?;
    if present > i64::from(edited.capacity) {
        let detail = format!("The hall has {present} seats; its capacity can't be smaller than that.");
        return Err(Error::refused(Code::HallFull, detail));
    }
    let hall = sqlx::query_as!(
        Hall,
        "update halls set name = $2, capacity = $3, version = version + 1, updated_at = now() where hall_id = $1 returning *",
        id as _,
        edited.name,
        edited.capacity,
    )
    .fetch_one(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(hall.editable())
}

/// Delete a hall and its seats
///
/// Refused while sessions take place in the hall: delete those first, or move them to another hall.
#[utoipa::path(delete, path = "/api/v1/halls/{hall_id}", tag = "4 Halls and seats", security((), ("bearer" = ["organizer", "admin"])),
    params(("hall_id" = HallId, Path), IfMatchHeader), responses((status = 204, description = "Deleted"), DeleteRefusals))]
pub(crate) async fn delete_hall(
    State(db): State<PgPool>,
    _: OrganizerCaller,
    ApiPath(id): ApiPath<HallId>,
    if_match: IfMatch,
) -> Result<StatusCode> {
    let mut tx = database::begin(&db).await?;
    lock(&mut tx, id, &if_match).await?;
    let sessions = sqlx::query!(
        r#"select count(*) as "count!", count(*) filter (where end_time <= now()) as "over!" from sessions where hall_id = $1"#,
        id as _,
    )
    .fetch_one(&mut *tx)
    .await?;
    let remedy = match sessions.over {
        0 => "Delete its sessions, or move them to another hall, first.",
        _ => "Sessions that have taken place stay as the record of what was sold, and so does their hall.",
    };
    in_use(sessions.count, "session", remedy)?;
    seats::delete_all(&mut tx, id).await?;
    sqlx::query!("delete from halls where hall_id = $1", id as _).execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

impl Hall {
    fn editable(self) -> Editable<Self> {
        Editable { version: self.version, body: self }
    }
}

/// Locks the row for an edit. Until the transaction ends, no other request changes it, or adds a seat or a session to
/// it.
async fn lock(tx: &mut PgConnection, id: HallId, if_match: &IfMatch) -> Result<Hall> {
    let found =
        sqlx::query_as!(Hall, "select * from halls where hall_id = $1 for update", id as _).fetch_optional(tx).await?;
    let hall = found.ok_or_else(|| hall_not_found(id))?;
    if_match.check(hall.version)?;
    Ok(hall)
}
