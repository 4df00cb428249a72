//! Halls and their seats: one at a time, as a grid, or as a list.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use service_kit::answer::Created;
use service_kit::database;
use service_kit::error::{Error, Result};
use service_kit::extract::{ApiJson, ApiPath, ApiQuery};
use service_kit::{openapi, refusals};
use shared_contracts::ids::{HallId, LocationId, SeatId};
use shared_contracts::label::Label;
use shared_contracts::page::{Page, PageQuery};
use shared_contracts::problem::{Code, FieldError};
use sqlx::{FromRow, PgConnection, PgPool};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::error::of_constraint;
use crate::locations;

/// The most seats made by one call: a stadium, in about 2 s and one transaction.
pub const SEATS_PER_CALL_MAX: usize = 100_000;
/// The largest body of the bulk call: 100,000 seats of some 150 bytes.
pub const BULK_BODY_BYTES_MAX: usize = 24 * 1024 * 1024;

/// A hall.
#[derive(Debug, Serialize, FromRow, ToSchema)]
pub struct Hall {
    hall_id: HallId,
    location_id: LocationId,
    name: String,
    /// The most seats it may have.
    capacity: i32,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
}

/// A new hall.
#[derive(Debug, Deserialize, ToSchema)]
pub struct CreateHall {
    #[schema(min_length = 1, max_length = 200, example = "Great Hall")]
    name: String,
    #[schema(minimum = 1, maximum = 200_000, example = 2000)]
    capacity: i32,
}

/// A seat: a chair in a hall.
#[derive(Debug, Serialize, FromRow, ToSchema)]
pub struct Seat {
    seat_id: SeatId,
    hall_id: HallId,
    row_number: Label,
    seat_number: Label,
    section: Option<String>,
    seat_type: SeatType,
    x: Option<f64>,
    y: Option<f64>,
}

/// What kind of seat.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, sqlx::Type, ToSchema)]
#[serde(rename_all = "snake_case")]
#[sqlx(type_name = "text", rename_all = "snake_case")]
#[expect(missing_docs, reason = "the names say it")]
pub enum SeatType {
    #[default]
    Regular,
    Vip,
    Premium,
    Wheelchair,
    Companion,
    Standing,
}

/// A new seat.
#[derive(Debug, Deserialize, ToSchema)]
pub struct CreateSeat {
    row_number: Label,
    seat_number: Label,
    /// `regular` when left out.
    #[serde(default)]
    seat_type: SeatType,
    #[schema(max_length = 64, example = "Stalls")]
    section: Option<String>,
    /// Where to draw it, in any unit.
    x: Option<f64>,
    /// Where to draw it, in any unit.
    y: Option<f64>,
}

/// New seats: either a grid (`rows` and `seats_per_row`, labelled from 1) or a list (`seats`).
#[derive(Debug, Deserialize, ToSchema)]
#[schema(example = json!({ "rows": 40, "seats_per_row": 50, "section": "Stalls", "seat_type": "regular" }))]
pub struct CreateSeats {
    /// Grid: how many rows.
    #[schema(minimum = 1, maximum = 100_000)]
    rows: Option<u32>,
    /// Grid: how many seats in each.
    #[schema(minimum = 1, maximum = 100_000)]
    seats_per_row: Option<u32>,
    /// Grid: the section of all its seats.
    #[schema(max_length = 64)]
    section: Option<String>,
    /// Grid: the type of all its seats; `regular` when left out.
    seat_type: Option<SeatType>,
    /// List: the seats.
    #[schema(min_items = 1, max_items = 100_000)]
    seats: Option<Vec<CreateSeat>>,
}

/// How many seats were made.
#[derive(Debug, Serialize, ToSchema)]
pub struct SeatsCreated {
    created: usize,
}

refusals!(CreateHallRefusals: openapi::BODY, &[Code::LocationNotFound]);
refusals!(ListHallsRefusals: &[Code::LocationNotFound, Code::ValidationFailed]);
refusals!(GetHallRefusals: &[Code::HallNotFound, Code::ValidationFailed]);
refusals!(CreateSeatRefusals: openapi::BODY, &[Code::HallNotFound, Code::SeatExists, Code::HallFull]);

/// Create a hall
#[utoipa::path(post, path = "/api/v1/locations/{location_id}/halls", tag = "4 Halls and seats", request_body = CreateHall,
    params(("location_id" = LocationId, Path)), responses((status = 201, description = "Made", body = Hall), CreateHallRefusals))]
pub(crate) async fn create_hall(
    State(db): State<PgPool>,
    ApiPath(location_id): ApiPath<LocationId>,
    ApiJson(new): ApiJson<CreateHall>,
) -> Result<Created<Hall>> {
    let hall: Hall =
        sqlx::query_as("insert into halls (hall_id, location_id, name, capacity) values ($1, $2, $3, $4) returning *")
            .bind(HallId::new())
            .bind(location_id)
            .bind(new.name)
            .bind(new.capacity)
            .fetch_one(&db)
            .await
            .map_err(of_constraint)?;
    Ok(Created { location: format!("/api/v1/halls/{}", hall.hall_id), body: hall })
}

/// List a location's halls, oldest first
#[utoipa::path(get, path = "/api/v1/locations/{location_id}/halls", tag = "4 Halls and seats",
    params(("location_id" = LocationId, Path), PageQuery), responses((status = 200, description = "A page", body = Page<Hall>), ListHallsRefusals))]
pub(crate) async fn list_halls(
    State(db): State<PgPool>,
    ApiPath(location_id): ApiPath<LocationId>,
    ApiQuery(page): ApiQuery<PageQuery>,
) -> Result<Json<Page<Hall>>> {
    let rows: Vec<Hall> =
        sqlx::query_as("select * from halls where location_id = $3 and hall_id > $1 order by hall_id limit $2")
            .bind(page.cursor.unwrap_or(Uuid::nil()))
            .bind(page.rows_to_read())
            .bind(location_id)
            .fetch_all(&db)
            .await?;
    if rows.is_empty() {
        let known: bool = sqlx::query_scalar("select exists (select from locations where location_id = $1)")
            .bind(location_id)
            .fetch_one(&db)
            .await?;
        known.then_some(()).ok_or_else(|| locations::not_found(location_id))?;
    }
    Ok(Json(Page::from_rows(rows, &page, |row| row.hall_id.as_uuid())))
}

/// Get a hall
#[utoipa::path(get, path = "/api/v1/halls/{hall_id}", tag = "4 Halls and seats", params(("hall_id" = HallId, Path)),
    responses((status = 200, description = "The hall", body = Hall), GetHallRefusals))]
pub(crate) async fn get_hall(State(db): State<PgPool>, ApiPath(id): ApiPath<HallId>) -> Result<Json<Hall>> {
    let found = sqlx::query_as("select * from halls where hall_id = $1").bind(id).fetch_optional(&db).await?;
    found.map(Json).ok_or_else(|| not_found(id))
}

/// Create one seat
///
/// Sessions made before do not get it.
#[utoipa::path(post, path = "/api/v1/halls/{hall_id}/seats", tag = "4 Halls and seats", request_body = CreateSeat,
    params(("hall_id" = HallId, Path)), responses((status = 201, description = "Made", body = Seat), CreateSeatRefusals))]
pub(crate) async fn create_seat(
    State(db): State<PgPool>,
    ApiPath(hall_id): ApiPath<HallId>,
    ApiJson(new): ApiJson<CreateSeat>,
) -> Result<Created<Seat>> {
    let mut tx = database::begin(&db).await?;
    let seat_ids = insert_seats(&mut tx, hall_id, vec![new]).await?;
    let seat: Seat =
        sqlx::query_as("select * from seats where seat_id = any($1)").bind(seat_ids).fetch_one(&mut *tx).await?;
    tx.commit().await?;
    Ok(Created { location: format!("/api/v1/halls/{hall_id}/seats"), body: seat })
}

/// Create many seats at once, as a grid or as a list
///
/// Up to 100,000 seats; all of them or none. Sessions made before do not get them.
#[utoipa::path(post, path = "/api/v1/halls/{hall_id}/seats/bulk", tag = "4 Halls and seats", request_body = CreateSeats,
    params(("hall_id" = HallId, Path)), responses((status = 201, description = "Made", body = SeatsCreated), CreateSeatRefusals))]
pub(crate) async fn create_seats(
    State(db): State<PgPool>,
    ApiPath(hall_id): ApiPath<HallId>,
    ApiJson(new): ApiJson<CreateSeats>,
) -> Result<(StatusCode, Json<SeatsCreated>)> {
    let seats = new.into_list()?;
    let mut tx = database::begin(&db).await?;
    let created = insert_seats(&mut tx, hall_id, seats).await?.len();
    tx.commit().await?;
    Ok((StatusCode::CREATED, Json(SeatsCreated { created })))
}

/// List a hall's seats in the order in which they were made
#[utoipa::path(get, path = "/api/v1/halls/{hall_id}/seats", tag = "4 Halls and seats", params(("hall_id" = HallId, Path), PageQuery),
    responses((status = 200, description = "A page", body = Page<Seat>), GetHallRefusals))]
pub(crate) async fn list_seats(
    State(db): State<PgPool>,
    ApiPath(hall_id): ApiPath<HallId>,
    ApiQuery(page): ApiQuery<PageQuery>,
) -> Result<Json<Page<Seat>>> {
    let rows: Vec<Seat> =
        sqlx::query_as("select * from seats where hall_id = $3 and seat_id > $1 order by seat_id limit $2")
            .bind(page.cursor.unwrap_or(Uuid::nil()))
            .bind(page.rows_to_read())
            .bind(hall_id)
            .fetch_all(&db)
            .await?;
    if rows.is_empty() {
        let known: bool = sqlx::query_scalar("select exists (select from halls where hall_id = $1)")
            .bind(hall_id)
            .fetch_one(&db)
            .await?;
        known.then_some(()).ok_or_else(|| not_found(hall_id))?;
    }
    Ok(Json(Page::from_rows(rows, &page, |row| row.seat_id.as_uuid())))
}

impl CreateSeats {
    fn into_list(self) -> Result<Vec<CreateSeat>> {
        let (rows, per_row) = match (self.seats, self.rows, self.seats_per_row) {
            (Some(seats), None, None) => return Ok(seats),
            (None, Some(rows), Some(per_row)) => (rows, per_row),
            (None, Some(_), None) => {
                return Err(Error::invalid(FieldError::at("/seats_per_row", "is required for a grid")));
            }
            (None, None, Some(_)) => {
                return Err(Error::invalid(FieldError::at("/rows", "is required for a grid")));
            }
            _ => {
                return Err(Error::invalid(FieldError::at("", "give either `seats`, or `rows` and `seats_per_row`")));
            }
        };
        if u64::from(rows) * u64::from(per_row) > SEATS_PER_CALL_MAX as u64 {
            return Err(Error::invalid(FieldError::at(
                "/rows",
                format!("rows times seats_per_row may be {SEATS_PER_CALL_MAX} at most"),
            )));
        }
        let seat_type = self.seat_type.unwrap_or_default();
        let seat = |row, number| CreateSeat {
            row_number: Label::of_number(row),
            seat_number: Label::of_number(number),
            seat_type,
            section: self.section.clone(),
            x: None,
            y: None,
        };
        Ok((1..=rows)
            .flat_map(|row| (1..=per_row).map(move |number| (row, number)))
            .map(|(row, number)| seat(row, number))
            .collect())
    }
}

/// Adds seats within the hall's capacity. The hall's row is locked first, so that two calls can't both find room for their own.
async fn insert_seats(tx: &mut PgConnection, hall_id: HallId, seats: Vec<CreateSeat>) -> Result<Vec<SeatId>> {
    let capacity: Option<i32> = sqlx::query_scalar("select capacity from halls where hall_id = $1 for no key update")
        .bind(hall_id)
        .fetch_optional(&mut *tx)
        .await?;
    let capacity = i64::from(capacity.ok_or_else(|| not_found(hall_id))?);
    let present: i64 =
        sqlx::query_scalar("select count(*) from seats where hall_id = $1").bind(hall_id).fetch_one(&mut *tx).await?;
    if present + seats.len() as i64 > capacity {
        let detail =
            format!("The hall has {present} of {capacity} seats; {} more do not fit. No seat was made.", seats.len());
        return Err(Error::refused(Code::HallFull, detail));
    }
    let seat_ids: Vec<SeatId> = seats.iter().map(|_| SeatId::new()).collect();
    let column =
        |label: fn(&CreateSeat) -> &Label| -> Vec<&str> { seats.iter().map(|seat| label(seat).as_str()).collect() };
    sqlx::query(
        "insert into seats (seat_id, hall_id, row_number, seat_number, section, seat_type, x, y)
         select seat_id, $1, row_number, seat_number, section, seat_type, x, y
         from unnest($2::uuid[], $3::text[], $4::text[], $5::text[], $6::text[], $7::float8[], $8::float8[])
              as new (seat_id, row_number, seat_number, section, seat_type, x, y)",
    )
    .bind(hall_id)
    .bind(&seat_ids)
    .bind(column(|seat| &seat.row_number))
    .bind(column(|seat| &seat.seat_number))
    .bind(seats.iter().map(|seat| seat.section.as_deref()).collect::<Vec<_>>())
    .bind(seats.iter().map(|seat| seat.seat_type).collect::<Vec<_>>())
    .bind(seats.iter().map(|seat| seat.x).collect::<Vec<_>>())
    .bind(seats.iter().map(|seat| seat.y).collect::<Vec<_>>())
    .execute(tx)
    .await
    .map_err(of_constraint)?;
    Ok(seat_ids)
}

fn not_found(id: HallId) -> Error {
    Error::refused(Code::HallNotFound, format!("No hall has the id {id}."))
}
