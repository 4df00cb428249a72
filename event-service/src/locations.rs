//! Locations: where halls are.

use axum::Json;
use axum::extract::State;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use service_kit::answer::Created;
use service_kit::error::{Error, Result};
use service_kit::extract::{ApiJson, ApiPath, ApiQuery};
use service_kit::{openapi, refusals};
use shared_contracts::ids::LocationId;
use shared_contracts::page::{Page, PageQuery};
use shared_contracts::problem::{Code, FieldError};
use sqlx::{FromRow, PgPool};
use utoipa::ToSchema;
use uuid::Uuid;

/// A location.
#[derive(Debug, Serialize, FromRow, ToSchema)]
pub struct Location {
    location_id: LocationId,
    name: String,
    address: String,
    city: String,
    country: String,
    /// IANA time zone: when a session begins on the wall clock there.
    timezone: String,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
}

/// A new location.
#[derive(Debug, Deserialize, ToSchema)]
pub struct CreateLocation {
    #[schema(min_length = 1, max_length = 200, example = "Old Mill")]
    name: String,
    #[schema(min_length = 1, max_length = 500, example = "1 Mill Lane")]
    address: String,
    #[schema(min_length = 1, max_length = 200, example = "Berlin")]
    city: String,
    #[schema(min_length = 1, max_length = 200, example = "Germany")]
    country: String,
    /// An IANA time zone.
    #[schema(min_length = 1, max_length = 64, example = "Europe/Berlin")]
    timezone: String,
}

refusals!(CreateRefusals: openapi::BODY);
refusals!(GetRefusals: &[Code::LocationNotFound, Code::ValidationFailed]);
refusals!(ListRefusals: &[Code::ValidationFailed]);

/// Create a location
#[utoipa::path(post, path = "/api/v1/locations", tag = "3 Locations", request_body = CreateLocation,
    responses((status = 201, description = "Made", body = Location), CreateRefusals))]
pub(crate) async fn create_location(
    State(db): State<PgPool>,
    ApiJson(new): ApiJson<CreateLocation>,
) -> Result<Created<Location>> {
    if new.timezone.parse::<chrono_tz::Tz>().is_err() {
        return Err(Error::invalid(FieldError::at("/timezone", "is not an IANA time zone like Europe/Berlin")));
    }
    let location: Location = sqlx::query_as(
        "insert into locations (location_id, name, address, city, country, timezone) values ($1, $2, $3, $4, $5, $6) returning *",
    )
    .bind(LocationId::new())
    .bind(new.name)
    .bind(new.address)
    .bind(new.city)
    .bind(new.country)
    .bind(new.timezone)
    .fetch_one(&db)
    .await?;
    Ok(Created { location: format!("/api/v1/locations/{}", location.location_id), body: location })
}

/// List locations, oldest first
#[utoipa::path(get, path = "/api/v1/locations", tag = "3 Locations", params(PageQuery),
    responses((status = 200, description = "A page", body = Page<Location>), ListRefusals))]
pub(crate) async fn list_locations(
    State(db): State<PgPool>,
    ApiQuery(page): ApiQuery<PageQuery>,
) -> Result<Json<Page<Location>>> {
    let rows: Vec<Location> =
        sqlx::query_as("select * from locations where location_id > $1 order by location_id limit $2")
            .bind(page.cursor.unwrap_or(Uuid::nil()))
            .bind(page.rows_to_read())
            .fetch_all(&db)
            .await?;
    Ok(Json(Page::from_rows(rows, &page, |row| row.location_id.as_uuid())))
}

/// Get a location
#[utoipa::path(get, path = "/api/v1/locations/{location_id}", tag = "3 Locations", params(("location_id" = LocationId, Path)),
    responses((status = 200, description = "The location", body = Location), GetRefusals))]
pub(crate) async fn get_location(State(db): State<PgPool>, ApiPath(id): ApiPath<LocationId>) -> Result<Json<Location>> {
    let found = sqlx::query_as("select * from locations where location_id = $1").bind(id).fetch_optional(&db).await?;
    found.map(Json).ok_or_else(|| not_found(id))
}

pub(crate) fn not_found(id: LocationId) -> Error {
    Error::refused(Code::LocationNotFound, format!("No location has the id {id}."))
}
