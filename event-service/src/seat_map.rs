//! A session's seats with their states: as a bare array, and as a map with a version and an ETag.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, Utc};
use serde::Serialize;
use service_kit::coalesce::{Coalescer, Lanes};
use service_kit::error::{Error, Result};
use service_kit::extract::ApiPath;
use service_kit::lifecycle::Lifecycle;
use service_kit::{etag, refusals};
use sha2::{Digest, Sha256};
use shared_contracts::ids::{HallId, SeatId, SessionId, SessionSeatId};
use shared_contracts::label::Label;
use shared_contracts::money::Money;
use shared_contracts::problem::Code;
use shared_contracts::seat_api::SeatStatus;
use sqlx::{FromRow, PgConnection, PgPool};
use utoipa::ToSchema;

use crate::seats::SeatType;
use crate::{session_seats, sessions};

/// A seat in a session.
#[derive(Debug, Serialize, FromRow, ToSchema)]
pub struct SessionSeat {
    session_seat_id: SessionSeatId,
    seat_id: SeatId,
    row_number: Label,
    seat_number: Label,
    section: Option<String>,
    seat_type: SeatType,
    /// Before the price tier's multiplier.
    price: Money,
    status: SeatStatus,
    /// While it is reserved: when that reservation ends unless it is paid.
    reserved_until: Option<DateTime<Utc>>,
}

/// All seats of a session.
#[derive(Debug, Serialize, ToSchema)]
pub struct SeatMap {
    session_id: SessionId,
    hall_id: HallId,
    /// Rises with each change of a seat.
    version: i64,
    seats: Vec<SessionSeat>,
}

refusals!(Refusals: &[Code::SessionNotFound, Code::ValidationFailed]);

/// A session's seats
#[utoipa::path(get, path = "/api/v1/sessions/{session_id}/seats", tag = "5 Sessions", params(("session_id" = SessionId, Path)),
    responses((status = 200, description = "All its seats", body = Vec<SessionSeat>), Refusals))]
pub(crate) async fn list_session_seats(
    State(maps): State<Arc<SeatMaps>>,
    ApiPath(session_id): ApiPath<SessionId>,
) -> Result<Response> {
    let Made { body, .. } = maps.make(session_id, Form::Array).await?;
    Ok(([JSON], body).into_response())
}

/// A session's seat map
///
/// Send the `ETag` of an earlier answer as `If-None-Match`; `304` says that nothing has changed since. Compressed with zstd, br or gzip,
/// whichever the client names in `Accept-Encoding`. To be told of changes as they happen, open `…/seat-map/stream` and then load this.
#[utoipa::path(get, path = "/api/v1/sessions/{session_id}/seat-map", tag = "5 Sessions",
    params(("session_id" = SessionId, Path), ("If-None-Match" = Option<String>, Header, description = "The ETag of an earlier answer")),
    responses((status = 200, description = "The map", body = SeatMap, headers(("ETag" = String))), (status = 304, description = "Unchanged", headers(("ETag" = String))), Refusals))]
pub(crate) async fn get_seat_map(
    State(maps): State<Arc<SeatMaps>>,
    ApiPath(session_id): ApiPath<SessionId>,
    headers: HeaderMap,
) -> Result<Response> {
    let Made { body, tag } = maps.make(session_id, Form::Map).await?;
    let fresh = (header::CACHE_CONTROL, "no-cache");
    if let Some(known) = etag::known(&headers, &tag) {
        return Ok((StatusCode::NOT_MODIFIED, [fresh], [(header::ETAG, known)]).into_response());
    }
    Ok(([fresh, JSON], [(header::ETAG, tag)], body).into_response())
}

const JSON: (HeaderName, &str) = (header::CONTENT_TYPE, "application/json");

/// How the seats of a session are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Form {
    /// As a bare array.
    Array,
    /// As a [`SeatMap`].
    Map,
}

/// An answer's bytes and the tag of their content. Of the content, not of the version: changes can become visible in another order than
/// they were numbered.
#[derive(Debug, Clone)]
pub(crate) struct Made {
    body: Bytes,
    tag: String,
}

/// Where all who want to see seats come together: those who come while a map is being made wait for the next one, which is made once
/// for all of them. So each sees every change that was committed before it asked, and a crowd costs no more than a few.
#[derive(Debug)]
pub(crate) struct SeatMaps {
    wanted: Coalescer<(SessionId, Form), Made>,
}

/// A map is made once for all who are in line, so there may be many of them.
const LANES: Lanes = Lanes { batch_max: 1024, ..Lanes::usual(Duration::from_secs(15)) };

impl SeatMaps {
    /// Starts it; it ends when nobody can ask any more.
    pub(crate) fn start(db: PgPool, lifecycle: &Lifecycle) -> Self {
        Self { wanted: Coalescer::start(lifecycle, LANES, move |wanted| make_all(db.clone(), wanted)) }
    }

    async fn make(&self, session_id: SessionId, form: Form) -> Result<Made> {
        self.wanted.call((session_id, form)).await
    }
}

async fn make_all(db: PgPool, wanted: Vec<(SessionId, Form)>) -> Vec<Result<Made>> {
    let mut made: HashMap<(SessionId, Form), Result<Made>> = HashMap::new();
    for wanted in &wanted {
        if !made.contains_key(wanted) {
            made.insert(*wanted, make(&db, *wanted).await);
        }
    }
    let share = |made: Option<&Result<Made>>| match made {
        Some(Ok(made)) => Ok(made.clone()),
        Some(Err(error)) => Err(error.for_another()),
        None => Err(sqlx::Error::WorkerCrashed.into()),
    };
    wanted.iter().map(|wanted| share(made.get(wanted))).collect()
}

async fn make(db: &PgPool, (session_id, form): (SessionId, Form)) -> Result<Made> {
    let mut connection = db.acquire().await?;
    let hall_id: Option<HallId> = sqlx::query_scalar("select hall_id from sessions where session_id = $1")
        .bind(session_id)
        .fetch_optional(&mut *connection)
        .await?;
    let hall_id = hall_id.ok_or_else(|| sessions::not_found(session_id))?;
    // Seats after version: a change in between then shows in the seats, and in the version of the next answer.
    let version = session_seats::version(&mut connection, session_id).await?;
    let seats = seats_of(&mut connection, session_id).await?;
    drop(connection);
    let body = match form {
        Form::Array => serde_json::to_vec(&seats),
        Form::Map => serde_json::to_vec(&SeatMap { session_id, hall_id, version, seats }),
    };
    let body = body.map_err(|error| Error::Internal(error.into()))?;
    let tag = format!("\"{}\"", hex::encode(Sha256::digest(&body)));
    Ok(Made { body: body.into(), tag })
}

async fn seats_of(connection: &mut PgConnection, session_id: SessionId) -> Result<Vec<SessionSeat>> {
    let seats = sqlx::query_as(
        "select session_seat_id, seat_id, row_number, seat_number, section, seat_type, price, status, reserved_until
         from session_seats join seats using (seat_id) where session_id = $1 order by seat_id",
    )
    .bind(session_id)
    .fetch_all(connection)
    .await?;
    Ok(seats)
}
