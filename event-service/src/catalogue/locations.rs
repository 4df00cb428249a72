//! Locations: the places of halls, each with its time zone.

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
use shared_contracts::ids::LocationId;
use shared_contracts::page::{Page, PageQuery};
use shared_contracts::problem::Code;
use sqlx::{PgConnection, PgPool};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::error::{in_use, location_not_found};

/// A place with one or more halls.
#[derive(Debug, Serialize, ToSchema)]
pub struct Location {
    location_id: LocationId,
    name: String,
    address: String,
    city: String,
    country: String,
    /// IANA time zone of the place. Use it to show session times, which the API gives in UTC, in local time.
    timezone: String,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
    #[serde(skip)]
    version: i64,
}

/// Body of the call that creates a location.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateLocation {
    #[schema(min_length = 1, max_length = 200, pattern = r"\S", format = "title", example = "Old Mill")]
    name: String,
    #[schema(min_length = 1, max_length = 500, pattern = r"\S", format = "title", example = "1 Mill Lane")]
    address: String,
    #[schema(min_length = 1, max_length = 200, pattern = r"\S", format = "title", example = "Berlin")]
    city: String,
    #[schema(min_length = 1, max_length = 200, pattern = r"\S", format = "title", example = "Germany")]
    country: String,
    /// IANA time zone of the place.
    #[schema(min_length = 1, max_length = 64, format = "iana-time-zone", example = "Europe/Berlin")]
    timezone: String,
}

patch_body!(UpdateLocation: CreateLocation, { "address": "2 Mill Lane" });

problems!(CreateRefusals: openapi::BODY);
problems!(GetRefusals: &[Code::LocationNotFound, Code::ValidationFailed]);
problems!(UpdateRefusals: openapi::EDIT, &[Code::LocationNotFound]);
problems!(DeleteRefusals: &[Code::LocationNotFound, Code::ResourceInUse, Code::PreconditionFailed, Code::ValidationFailed]);
problems!(ListRefusals: &[Code::ValidationFailed]);

/// Create a location
#[utoipa::path(post, path = "/api/v1/locations", tag = "3 Locations", security((), ("bearer" = ["organizer", "admin"])), request_body = CreateLocation,
    responses((status = 201, description = "Created", body = Location, headers(("Location" = String), ("ETag" = String)), links(
        ("get" = (operation_id = "get_location", parameters(("location_id" = "$response.body#/location_id")))),
        ("update" = (operation_id = "update_location", parameters(("location_id" = "$response.body#/location_id")))),
        ("delete" = (operation_id = "delete_location", parameters(("location_id" = "$response.body#/location_id")))),
        ("create_hall" = (operation_id = "create_hall", parameters(("location_id" = "$response.body#/location_id")))),
    )), CreateRefusals))]
pub(crate) async fn create_location(
    State(db): State<PgPool>,
    _: OrganizerCaller,
    ApiJson(new): ApiJson<CreateLocation>,
) -> Result<Created<Editable<Location>>> {
    let location = sqlx::query_as!(
        Location,
        "insert into locations (location_id, name, address, city, country, timezone) values ($1, $2, $3, $4, $5, $6) returning *",
        LocationId::new() as _,
        new.name,
        new.address,
        new.city,
        new.country,
        new.timezone,
    )
    .fetch_one(&db)
    .await?;
    Ok(Created { location: format!("/api/v1/locations/{}", location.location_id), body: location.editable() })
}

/// List locations, oldest first
#[utoipa::path(get, path = "/api/v1/locations", tag = "3 Locations", params(PageQuery),
    responses((status = 200, description = "A page", body = Page<Location>), ListRefusals))]
pub(crate) async fn list_locations(
    State(db): State<PgPool>,
    ApiQuery(page, _): ApiQuery<PageQuery>,
) -> Result<Json<Page<Location>>> {
    let rows = sqlx::query_as!(
        Location,
        "select * from locations where location_id > $1 order by location_id limit $2",
        page.cursor.unwrap_or(Uuid::nil()),
        page.rows_to_read(),
    )
    .fetch_all(&db)
    .await?;
    Ok(Json(Page::from_rows(rows, &page, |row| row.location_id.as_uuid())))
}

/// Get a location
#[utoipa::path(get, path = "/api/v1/locations/{location_id}", tag = "3 Locations", params(("location_id" = LocationId, Path)),
    responses((status = 200, description = "The location", body = Location, headers(("ETag" = String))), GetRefusals))]
pub(crate) async fn get_location(
    State(db): State<PgPool>,
    ApiPath(id): ApiPath<LocationId>,
) -> Result<Editable<Location>> {
    let found = sqlx::query_as!(Location, "select * from locations where location_id = $1", id as _)
        .fetch_optional(&db)
        .await?;
    found.map(Location::editable).ok_or_else(|| location_not_found(id))
}

/// Change a location
#[utoipa::path(patch, path = "/api/v1/locations/{location_id}", tag = "3 Locations", security((), ("bearer" = ["organizer", "admin"])), request_body = UpdateLocation,
    params(("location_id" = LocationId, Path), IfMatchHeader),
    responses((status = 200, description = "Changed", body = Location, headers(("ETag" = String))), UpdateRefusals))]
pub(crate) async fn update_location(
    State(db): State<PgPool>,
    _: OrganizerCaller,
    ApiPath(id): ApiPath<LocationId>,
    if_match: IfMatch,
    patch: ApiPatch,
) -> Result<Editable<Location>> {
    let mut tx = database::begin(&db).await?;
    let edited: CreateLocation = patch.apply(&lock(&mut tx, id, &if_match).await?)?;
    let location = sqlx::query_as!(
        Location,
        "update locations set name = $2, address = $3, city = $4, country = $5, timezone = $6, version = version + 1, updated_at = now()
         where location_id = $1 returning *",
        id as _,
        edited.name,
        edited.address,
        edited.city,
        edited.country,
        edited.timezone,
    )
    .fetch_one(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(location.editable())
}

/// Delete a location
///
/// Refused while the location has halls: delete those first.
#[utoipa::path(delete, path = "/api/v1/locations/{location_id}", tag = "3 Locations", security((), ("bearer" = ["organizer", "admin"])),
    params(("location_id" = LocationId, Path), IfMatchHeader), responses((status = 204, description = "Deleted"), DeleteRefusals))]
pub(crate) async fn delete_location(
    State(db): State<PgPool>,
    _: OrganizerCaller,
    ApiPath(id): ApiPath<LocationId>,
    if_match: IfMatch,
) -> Result<StatusCode> {
    let mut tx = database::begin(&db).await?;
    lock(&mut tx, id, &if_match).await?;
    let halls = sqlx::query_scalar!(r#"select count(*) as "count!" from halls where location_id = $1"#, id as _)
        .fetch_one(&mut *tx)
        .await?;
    in_use(halls, "hall", "Delete its halls first.")?;
    sqlx::query!("delete from locations where location_id = $1", id as _).execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

impl Location {
    fn editable(self) -> Editable<Self> {
        Editable { version: self.version, body: self }
    }
}

/// Locks the row for an edit. Until the transaction ends, no other request changes it or adds a hall to it.
async fn lock(tx: &mut PgConnection, id: LocationId, if_match: &IfMatch) -> Result<Location> {
    let found = sqlx::query_as!(Location, "select * from locations where location_id = $1 for update", id as _)
        .fetch_optional(tx)
        .await?;
    let location = found.ok_or_else(|| location_not_found(id))?;
    if_match.check(location.version)?;
    Ok(location)
}
