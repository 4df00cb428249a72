//! Seats: the chairs of a hall, created one at a time, as a grid, or as a list.

use std::collections::HashMap;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
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
use shared_contracts::ids::{HallId, SeatId};
use shared_contracts::label::Label;
use shared_contracts::page::{Page, PageQuery};
use shared_contracts::problem::{Code, FieldError, Problem};
use shared_contracts::text;
use sqlx::{FromRow, PgConnection, PgPool};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::error::{hall_not_found, in_use, of_constraint, seat_not_found};
use crate::session_seats;

/// The maximum number of seats created by one call: a stadium. It takes about 2 s and one transaction.
pub const SEATS_PER_CALL_MAX: usize = 100_000;
/// The most doubles that a refusal names.
const DOUBLES_MAX: usize = 50;
/// The largest body of the bulk call: 100,000 seats of about 150 bytes.
pub const BULK_BODY_BYTES_MAX: usize = 24 * 1024 * 1024;

/// A chair in a hall. A session sells it as a session seat, which has its own id.
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
    #[serde(skip)]
    version: i64,
}

/// The kind of seat.
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

/// Body of the call that creates a seat.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateSeat {
    row_number: Label,
    seat_number: Label,
    /// `regular` if omitted.
    #[serde(default)]
    seat_type: SeatType,
    #[schema(max_length = 64, format = "label", example = "Stalls")]
    section: Option<String>,
    /// Horizontal position on a drawing of the hall, in any unit.
    x: Option<f64>,
    /// Vertical position on a drawing of the hall, in any unit.
    y: Option<f64>,
}

/// Body of the call that creates many seats: either a grid (`rows` and `seats_per_row`, labelled from 1) or a list
/// (`seats`).
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({ "rows": 40, "seats_per_row": 50, "section": "Stalls", "seat_type": "regular" }))]
pub struct CreateSeats {
    /// Grid: the number of rows.
    #[schema(minimum = 1, maximum = 100_000)]
    rows: Option<u32>,
    /// Grid: the number of seats in each row.
    #[schema(minimum = 1, maximum = 100_000)]
    seats_per_row: Option<u32>,
    /// Grid: the section of all its seats.
    #[schema(max_length = 64, format = "label")]
    section: Option<String>,
    /// Grid: the type of all its seats; `regular` if omitted.
    seat_type: Option<SeatType>,
    /// List: the seats.
    #[schema(min_items = 1, max_items = 100_000)]
    seats: Option<Vec<CreateSeat>>,
}

/// The answer to the call that creates many seats.
#[derive(Debug, Serialize, ToSchema)]
pub struct SeatsCreated {
    /// The number of seats created.
    created: usize,
}

patch_body!(UpdateSeat: CreateSeat, { "seat_type": "vip" });

problems!(CreateRefusals: openapi::BODY, &[Code::HallNotFound, Code::SeatExists, Code::HallFull]);
problems!(ListRefusals: &[Code::HallNotFound, Code::ValidationFailed]);
problems!(GetRefusals: &[Code::SeatNotFound, Code::ValidationFailed]);
problems!(UpdateRefusals: openapi::EDIT, &[Code::SeatNotFound, Code::SeatExists, Code::ResourceInUse]);
problems!(DeleteRefusals: &[Code::SeatNotFound, Code::ResourceInUse, Code::PreconditionFailed, Code::ValidationFailed]);

/// Create one seat
///
/// Sessions that exist already do not get this seat.
#[utoipa::path(post, path = "/api/v1/halls/{hall_id}/seats", tag = "4 Halls and seats", security((), ("bearer" = ["organizer", "admin"])), request_body = CreateSeat,
    params(("hall_id" = HallId, Path)), responses((status = 201, description = "Created", body = Seat, headers(("Location" = String), ("ETag" = String)), links(
        ("get" = (operation_id = "get_seat", parameters(("seat_id" = "$response.body#/seat_id")))),
        ("update" = (operation_id = "update_seat", parameters(("seat_id" = "$response.body#/seat_id")))),
        ("delete" = (operation_id = "delete_seat", parameters(("seat_id" = "$response.body#/seat_id")))),
    )), CreateRefusals))]
pub(crate) async fn create_seat(
    State(db): State<PgPool>,
    _: OrganizerCaller,
    ApiPath(hall_id): ApiPath<HallId>,
    ApiJson(new): ApiJson<CreateSeat>,
) -> Result<Created<Editable<Seat>>> {
    let mut tx = database::begin(&db).await?;
    let seat_ids = insert_seats(&mut tx, hall_id, vec![new]).await?;
    let seat: Seat =
        sqlx::query_as("select * from seats where seat_id = any($1)").bind(seat_ids).fetch_one(&mut *tx).await?;
    tx.commit().await?;
    Ok(Created { location: format!("/api/v1/seats/{}", seat.seat_id), body: seat.editable() })
}

/// Create many seats at once, as a grid or as a list
///
/// Creates up to 100,000 seats: all of them or none. Sessions that exist already do not get them.
#[utoipa::path(post, path = "/api/v1/halls/{hall_id}/seats/bulk", tag = "4 Halls and seats", security((), ("bearer" = ["organizer", "admin"])), request_body = CreateSeats,
    params(("hall_id" = HallId, Path)), responses((status = 201, description = "Created", body = SeatsCreated), CreateRefusals))]
pub(crate) async fn create_seats(
    State(db): State<PgPool>,
    _: OrganizerCaller,
    ApiPath(hall_id): ApiPath<HallId>,
    ApiJson(new): ApiJson<CreateSeats>,
) -> Result<(StatusCode, Json<SeatsCreated>)> {
    let seats = new.into_list()?;
    let mut tx = database::begin(&db).await?;
    let created = insert_seats(&mut tx, hall_id, seats).await?.len();
    tx.commit().await?;
    Ok((StatusCode::CREATED, Json(SeatsCreated { created })))
}

/// List a hall's seats, oldest first
#[utoipa::path(get, path = "/api/v1/halls/{hall_id}/seats", tag = "4 Halls and seats", params(("hall_id" = HallId, Path), PageQuery),
    responses((status = 200, description = "A page", body = Page<Seat>), ListRefusals))]
pub(crate) async fn list_seats(
    State(db): State<PgPool>,
    ApiPath(hall_id): ApiPath<HallId>,
    ApiQuery(page, _): ApiQuery<PageQuery>,
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
        known.then_some(()).ok_or_else(|| hall_not_found(hall_id))?;
    }
    Ok(Json(Page::from_rows(rows, &page, |row| row.seat_id.as_uuid())))
}

/// Get a seat
#[utoipa::path(get, path = "/api/v1/seats/{seat_id}", tag = "4 Halls and seats", params(("seat_id" = SeatId, Path)),
    responses((status = 200, description = "The seat", body = Seat, headers(("ETag" = String))), GetRefusals))]
pub(crate) async fn get_seat(State(db): State<PgPool>, ApiPath(id): ApiPath<SeatId>) -> Result<Editable<Seat>> {
    let found: Option<Seat> =
        sqlx::query_as("select * from seats where seat_id = $1").bind(id).fetch_optional(&db).await?;
    found.map(Seat::editable).ok_or_else(|| seat_not_found(id))
}

/// Change a seat
///
/// Its labels (`section`, `row_number`, `seat_number`) are printed on tickets, so they can change only while no session
/// has the seat.
#[utoipa::path(patch, path = "/api/v1/seats/{seat_id}", tag = "4 Halls and seats", security((), ("bearer" = ["organizer", "admin"])), request_body = UpdateSeat,
    params(("seat_id" = SeatId, Path), IfMatchHeader),
    responses((status = 200, description = "Changed", body = Seat, headers(("ETag" = String))), UpdateRefusals))]
pub(crate) async fn update_seat(
    State(db): State<PgPool>,
    _: OrganizerCaller,
    ApiPath(id): ApiPath<SeatId>,
    if_match: IfMatch,
    patch: ApiPatch,
) -> Result<Editable<Seat>> {
    let mut tx = database::begin(&db).await?;
    let current = lock(&mut tx, id, &if_match).await?;
    let edited: CreateSeat = patch.apply(&current)?;
    let relabelled = (&current.row_number, &current.seat_number, &current.section)
        != (&edited.row_number, &edited.seat_number, &edited.section);
    if relabelled {
        must_not_be_in_a_session(&mut tx, id).await?;
    }
    let seat: Seat = sqlx::query_as(
        "update seats set row_number = $2, seat_number = $3, section = $4, seat_type = $5, x = $6, y = $7, folded_label = $8,
             version = version + 1
         where seat_id = $1 returning *",
    )
    .bind(id)
    .bind(&edited.row_number)
    .bind(&edited.seat_number)
    .bind(&edited.section)
    .bind(edited.seat_type)
    .bind(edited.x)
    .bind(edited.y)
    .bind(edited.folded_label())
    .fetch_one(&mut *tx)
    .await
    .map_err(of_constraint)?;
    if current.seat_type != seat.seat_type {
        session_seats::note_change_of(&mut tx, id).await?;
    }
    tx.commit().await?;
    Ok(seat.editable())
}

/// Delete a seat
///
/// Refused while a session has the seat.
#[utoipa::path(delete, path = "/api/v1/seats/{seat_id}", tag = "4 Halls and seats", security((), ("bearer" = ["organizer", "admin"])),
    params(("seat_id" = SeatId, Path), IfMatchHeader), responses((status = 204, description = "Deleted"), DeleteRefusals))]
pub(crate) async fn delete_seat(
    State(db): State<PgPool>,
    _: OrganizerCaller,
    ApiPath(id): ApiPath<SeatId>,
    if_match: IfMatch,
) -> Result<StatusCode> {
    let mut tx = database::begin(&db).await?;
    lock(&mut tx, id, &if_match).await?;
    must_not_be_in_a_session(&mut tx, id).await?;
    sqlx::query("delete from seats where seat_id = $1").bind(id).execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn must_not_be_in_a_session(tx: &mut PgConnection, id: SeatId) -> Result<()> {
    let (sessions, over): (i64, i64) = sqlx::query_as(
        "select count(*), count(*) filter (where end_time <= now())
         from session_seats join sessions using (session_id) where seat_id = $1",
    )
    .bind(id)
    .fetch_one(tx)
    .await?;
    let remedy = match over {
        0 => "Delete the sessions that have this seat first.",
        _ => "A session that has taken place keeps its seats as they were. Create a new seat with the new labels.",
    };
    in_use(sessions, "session", remedy)
}

impl CreateSeat {
    fn folded_label(&self) -> String {
        text::folded_label(self.section.as_deref(), self.row_number.as_str(), self.seat_number.as_str())
    }

    /// The labels as a client knows them.
    fn labels(&self) -> String {
        let section = self.section.as_deref().map(|section| format!("section {section}, ")).unwrap_or_default();
        format!("{section}row {}, seat {}", self.row_number, self.seat_number)
    }
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
                format!("rows times seats_per_row must be at most {SEATS_PER_CALL_MAX}"),
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

/// Adds seats within the hall's capacity. It locks the hall's row first, so that two calls can't exceed the capacity
/// together.
async fn insert_seats(tx: &mut PgConnection, hall_id: HallId, seats: Vec<CreateSeat>) -> Result<Vec<SeatId>> {
    let capacity: Option<i32> = sqlx::query_scalar("select capacity from halls where hall_id = $1 for no key update")
        .bind(hall_id)
        .fetch_optional(&mut *tx)
        .await?;
    let capacity = i64::from(capacity.ok_or_else(|| hall_not_found(hall_id))?);
    let present = count(tx, hall_id).await?;
    if present + seats.len() as i64 > capacity {
        let detail = format!(
            "The hall has {present} of {capacity} seats; {} more do not fit. No seat was created.",
            seats.len()
        );
        return Err(Error::refused(Code::HallFull, detail));
    }
    let folded: Vec<String> = seats.iter().map(CreateSeat::folded_label).collect();
    must_look_different(&seats, &folded)?;
    must_look_new(tx, hall_id, &seats, &folded).await?;
    let seat_ids: Vec<SeatId> = seats.iter().map(|_| SeatId::new()).collect();
    let column =
        |label: fn(&CreateSeat) -> &Label| -> Vec<&str> { seats.iter().map(|seat| label(seat).as_str()).collect() };
    sqlx::query(
        "insert into seats (seat_id, hall_id, row_number, seat_number, section, seat_type, x, y, folded_label)
         select seat_id, $1, row_number, seat_number, section, seat_type, x, y, folded_label
         from unnest($2::uuid[], $3::text[], $4::text[], $5::text[], $6::text[], $7::float8[], $8::float8[], $9::text[])
              as new (seat_id, row_number, seat_number, section, seat_type, x, y, folded_label)",
    )
    .bind(hall_id)
    .bind(&seat_ids)
    .bind(column(|seat| &seat.row_number))
    .bind(column(|seat| &seat.seat_number))
    .bind(seats.iter().map(|seat| seat.section.as_deref()).collect::<Vec<_>>())
    .bind(seats.iter().map(|seat| seat.seat_type).collect::<Vec<_>>())
    .bind(seats.iter().map(|seat| seat.x).collect::<Vec<_>>())
    .bind(seats.iter().map(|seat| seat.y).collect::<Vec<_>>())
    .bind(folded)
    .execute(tx)
    .await
    .map_err(of_constraint)?;
    Ok(seat_ids)
}

/// Refuses two seats of one list that look the same, and names both.
fn must_look_different(seats: &[CreateSeat], folded: &[String]) -> Result<()> {
    let mut known: HashMap<&str, usize> = HashMap::with_capacity(seats.len());
    let mut faults = Vec::new();
    for (index, key) in folded.iter().enumerate() {
        let first = *known.entry(key).or_insert(index);
        if first != index {
            let detail = format!("{} looks like /seats/{first}: {}", seats[index].labels(), seats[first].labels());
            faults.push(FieldError::at(format!("/seats/{index}"), detail));
        }
    }
    refuse_doubles(faults)
}

/// Refuses seats that look like one that the hall has, and names both.
async fn must_look_new(tx: &mut PgConnection, hall_id: HallId, seats: &[CreateSeat], folded: &[String]) -> Result<()> {
    let present: Vec<(String, SeatId)> = sqlx::query_as(
        "select folded_label, seat_id from seats where hall_id = $1 and folded_label = any($2) limit $3",
    )
    .bind(hall_id)
    .bind(folded)
    .bind(DOUBLES_MAX as i64)
    .fetch_all(tx)
    .await?;
    let indexes: HashMap<&str, usize> = folded.iter().enumerate().map(|(index, key)| (key.as_str(), index)).collect();
    let fault = |(key, seat_id): &(String, SeatId)| {
        let index = *indexes.get(key.as_str())?;
        let place = if seats.len() == 1 { String::new() } else { format!("/seats/{index}") };
        Some(FieldError::at(place, format!("{} looks like the seat {seat_id} of this hall", seats[index].labels())))
    };
    refuse_doubles(present.iter().filter_map(fault).collect())
}

fn refuse_doubles(mut faults: Vec<FieldError>) -> Result<()> {
    if faults.is_empty() {
        return Ok(());
    }
    faults.sort_by_key(|fault| {
        fault.pointer.as_deref().and_then(|place| place.rsplit('/').next()?.parse::<usize>().ok())
    });
    faults.truncate(DOUBLES_MAX);
    let detail =
        "Two seats of a hall must not look the same on a ticket. No seat was created; `errors` names the doubles.";
    let mut problem = Problem::new(Code::SeatExists, detail);
    problem.errors = faults;
    Err(problem.into())
}

impl Seat {
    fn editable(self) -> Editable<Self> {
        Editable { version: self.version, body: self }
    }
}

/// Locks the row for an edit. Until the transaction ends, no other request changes it or creates a session with it.
async fn lock(tx: &mut PgConnection, id: SeatId, if_match: &IfMatch) -> Result<Seat> {
    let found: Option<Seat> =
        sqlx::query_as("select * from seats where seat_id = $1 for update").bind(id).fetch_optional(tx).await?;
    let seat = found.ok_or_else(|| seat_not_found(id))?;
    if_match.check(seat.version)?;
    Ok(seat)
}

/// The number of seats that the hall has.
pub(crate) async fn count(tx: &mut PgConnection, hall_id: HallId) -> Result<i64> {
    Ok(sqlx::query_scalar("select count(*) from seats where hall_id = $1").bind(hall_id).fetch_one(tx).await?)
}

/// Deletes all seats of a hall. No session may take place in it.
pub(crate) async fn delete_all(tx: &mut PgConnection, hall_id: HallId) -> Result<()> {
    sqlx::query("delete from seats where hall_id = $1").bind(hall_id).execute(tx).await?;
    Ok(())
}
