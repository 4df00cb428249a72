//! Sessions: one performance of an event in a hall, created together with its session seats.

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
use shared_contracts::ids::{EventId, HallId, SessionId};
use shared_contracts::money::{Currency, Money};
use shared_contracts::page::{Page, PageQuery};
use shared_contracts::problem::Code;
use shared_contracts::seat_api::{CancelledSession, TimeCursor};
use sqlx::{FromRow, PgConnection, PgPool};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::error::{in_use, of_constraint, session_not_found};
use crate::sale::SessionStatus;
use crate::session_seats;

/// One performance of an event in a hall.
#[derive(Debug, Serialize, FromRow, ToSchema)]
pub struct Session {
    session_id: SessionId,
    event_id: EventId,
    hall_id: HallId,
    start_time: DateTime<Utc>,
    end_time: DateTime<Utc>,
    /// A seat's price before the price tier's multiplier.
    base_price: Money,
    currency: Currency,
    /// When sales begin; null if they began when the session was created.
    sales_start: Option<DateTime<Utc>>,
    /// When sales end; null if they end when the session begins.
    sales_end: Option<DateTime<Utc>>,
    status: SessionStatus,
    /// The number of its session seats.
    seats_count: i64,
    /// The number of its session seats that are free; 0 once the session is cancelled.
    available_seats_count: i64,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
    #[serde(skip)]
    version: i64,
}

/// Body of the call that creates a session.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(example = json!({
    "event_id": "019ac1c0-0000-7000-8000-000000000002", "hall_id": "019ac1c0-0000-7000-8000-000000000004",
    "start_time": "2030-12-01T19:00:00Z", "end_time": "2030-12-01T21:00:00Z", "base_price": 100.00, "currency": "USD",
}))]
pub struct CreateSession {
    event_id: EventId,
    hall_id: HallId,
    /// RFC 3339 time with an offset. Answers give it in UTC.
    #[schema(example = "2030-12-01T19:00:00Z")]
    start_time: DateTime<Utc>,
    /// Later than `start_time`. Another session of the hall may begin at exactly this time.
    #[schema(example = "2030-12-01T21:00:00Z")]
    end_time: DateTime<Utc>,
    /// A seat's price before the price tier's multiplier.
    base_price: Money,
    /// `USD` if omitted.
    #[serde(default)]
    currency: Currency,
    /// When sales begin; at once if omitted.
    sales_start: Option<DateTime<Utc>>,
    /// When sales end. If omitted, or later than `start_time`, sales end when the session begins.
    sales_end: Option<DateTime<Utc>>,
}

patch_body!(UpdateSession: CreateSession, { "sales_end": "2030-12-01T18:30:00Z" });

/// Filters of the list of sessions. All that are given must match.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct SessionFilter {
    /// Only sessions of this event.
    #[param(inline)]
    event_id: Option<EventId>,
    /// Only sessions in this hall.
    #[param(inline)]
    hall_id: Option<HallId>,
    /// Only sessions that begin at this time or later.
    from: Option<DateTime<Utc>>,
    /// Only sessions that begin before this time.
    to: Option<DateTime<Utc>>,
}

problems!(CreateRefusals: openapi::BODY, &[Code::EventNotFound, Code::HallNotFound, Code::SessionOverlap, Code::HallHasNoSeats]);
problems!(GetRefusals: &[Code::SessionNotFound, Code::ValidationFailed]);
problems!(UpdateRefusals: openapi::EDIT, &[
    Code::SessionNotFound, Code::EventNotFound, Code::HallNotFound, Code::SessionOverlap, Code::HallHasNoSeats, Code::ResourceInUse, Code::SessionCancelled,
]);
problems!(CancelRefusals: &[Code::SessionNotFound, Code::PreconditionFailed, Code::ValidationFailed]);
problems!(DeleteRefusals: &[Code::SessionNotFound, Code::ResourceInUse, Code::PreconditionFailed, Code::ValidationFailed]);
problems!(ListRefusals: &[Code::ValidationFailed]);

/// Create a session and its session seats
///
/// Creates one session seat for each seat that the hall has now, all or nothing. Two sessions in one hall can't
/// overlap.
#[utoipa::path(post, path = "/api/v1/sessions", tag = "5 Sessions", security((), ("bearer" = ["organizer", "admin"])), request_body = CreateSession,
    responses((status = 201, description = "Created", body = Session, headers(("Location" = String), ("ETag" = String)), links(
        ("get" = (operation_id = "get_session", parameters(("session_id" = "$response.body#/session_id")))),
        ("update" = (operation_id = "update_session", parameters(("session_id" = "$response.body#/session_id")))),
        ("cancel" = (operation_id = "cancel_session", parameters(("session_id" = "$response.body#/session_id")))),
        ("delete" = (operation_id = "delete_session", parameters(("session_id" = "$response.body#/session_id")))),
        ("seat_map" = (operation_id = "get_seat_map", parameters(("session_id" = "$response.body#/session_id")))),
    )), CreateRefusals))]
pub(crate) async fn create_session(
    State(db): State<PgPool>,
    _: OrganizerCaller,
    ApiJson(new): ApiJson<CreateSession>,
) -> Result<Created<Editable<Session>>> {
    let session_id = SessionId::new();
    let mut tx = database::begin(&db).await?;
    sqlx::query(
        "insert into sessions (session_id, event_id, hall_id, start_time, end_time, base_price, currency, sales_start, sales_end)
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
    )
    .bind(session_id)
    .bind(new.event_id)
    .bind(new.hall_id)
    .bind(new.start_time)
    .bind(new.end_time)
    .bind(new.base_price)
    .bind(new.currency)
    .bind(new.sales_start)
    .bind(new.sales_end)
    .execute(&mut *tx)
    .await
    .map_err(of_constraint)?;
    make_seats(&mut tx, session_id, new.base_price).await?;
    let session = find(&mut tx, session_id).await?;
    tx.commit().await?;
    Ok(Created { location: format!("/api/v1/sessions/{session_id}"), body: session.editable() })
}

async fn make_seats(tx: &mut PgConnection, session_id: SessionId, base_price: Money) -> Result<()> {
    if session_seats::create_for_session(tx, session_id, base_price).await? == 0 {
        return Err(Error::refused(Code::HallHasNoSeats, "This hall has no seats to sell; create seats first."));
    }
    Ok(())
}

/// List sessions with their free seats, oldest first
#[utoipa::path(get, path = "/api/v1/sessions", tag = "5 Sessions", params(PageQuery, SessionFilter),
    responses((status = 200, description = "A page", body = Page<Session>), ListRefusals))]
pub(crate) async fn list_sessions(
    State(db): State<PgPool>,
    ApiQuery(page, filter): ApiQuery<PageQuery, SessionFilter>,
) -> Result<Json<Page<Session>>> {
    let rows: Vec<Session> = sqlx::query_as(
        "select s.*, counts.* from (
             select * from sessions
             where session_id > $1 and ($3::uuid is null or event_id = $3) and ($4::uuid is null or hall_id = $4)
               and ($5::timestamptz is null or start_time >= $5) and ($6::timestamptz is null or start_time < $6)
             order by session_id limit $2
         ) s cross join lateral (
             select count(*) as seats_count, count(*) filter (where status = 'available' and s.status = 'scheduled') as available_seats_count
             from session_seats where session_id = s.session_id
         ) counts order by session_id",
    )
    .bind(page.cursor.unwrap_or(Uuid::nil()))
    .bind(page.rows_to_read())
    .bind(filter.event_id)
    .bind(filter.hall_id)
    .bind(filter.from)
    .bind(filter.to)
    .fetch_all(&db)
    .await?;
    Ok(Json(Page::from_rows(rows, &page, |row| row.session_id.as_uuid())))
}

/// Get a session
///
/// The `ETag` changes with an edit of the session. It does not change with the counts of seats.
#[utoipa::path(get, path = "/api/v1/sessions/{session_id}", tag = "5 Sessions", params(("session_id" = SessionId, Path)),
    responses((status = 200, description = "The session", body = Session, headers(("ETag" = String))), GetRefusals))]
pub(crate) async fn get_session(
    State(db): State<PgPool>,
    ApiPath(session_id): ApiPath<SessionId>,
) -> Result<Editable<Session>> {
    find(&mut *db.acquire().await?, session_id).await.map(Session::editable)
}

/// Change a session
///
/// Event, hall and currency can change only while no seat is reserved or sold; session seats get new ids then. A new
/// price applies to reservations made from now on.
#[utoipa::path(patch, path = "/api/v1/sessions/{session_id}", tag = "5 Sessions", security((), ("bearer" = ["organizer", "admin"])), request_body = UpdateSession,
    params(("session_id" = SessionId, Path), IfMatchHeader),
    responses((status = 200, description = "Changed", body = Session, headers(("ETag" = String))), UpdateRefusals))]
pub(crate) async fn update_session(
    State(db): State<PgPool>,
    _: OrganizerCaller,
    ApiPath(session_id): ApiPath<SessionId>,
    if_match: IfMatch,
    patch: ApiPatch,
) -> Result<Editable<Session>> {
    let mut tx = database::begin(&db).await?;
    let current = lock(&mut tx, session_id, &if_match).await?;
    if current.status == SessionStatus::Cancelled {
        return Err(Error::refused(Code::SessionCancelled, "A cancelled session can't be changed; create a new one."));
    }
    let edited: CreateSession = patch.apply(&current)?;
    // Another event or currency gives new ids too: a buyer who saw the old offer must not hold its seats.
    let remade =
        current.hall_id != edited.hall_id || current.event_id != edited.event_id || current.currency != edited.currency;
    if remade {
        // An edit of a seat locks that seat before its session seats; so does this.
        let seats = "select from seats where hall_id = $1 order by seat_id for key share";
        sqlx::query(seats).bind(edited.hall_id).execute(&mut *tx).await?;
        session_seats::remove_unowned(&mut tx, session_id).await?;
        let owned = session_seats::owned(&mut tx, session_id).await?;
        in_use(
            owned,
            "reserved or sold seat",
            "Event, hall and currency can change only while no seat is reserved or sold.",
        )?;
    }
    sqlx::query(
        "update sessions set event_id = $2, hall_id = $3, start_time = $4, end_time = $5, base_price = $6, currency = $7,
             sales_start = $8, sales_end = $9, version = version + 1, updated_at = now()
         where session_id = $1",
    )
    .bind(session_id)
    .bind(edited.event_id)
    .bind(edited.hall_id)
    .bind(edited.start_time)
    .bind(edited.end_time)
    .bind(edited.base_price)
    .bind(edited.currency)
    .bind(edited.sales_start)
    .bind(edited.sales_end)
    .execute(&mut *tx)
    .await
    .map_err(of_constraint)?;
    if remade {
        make_seats(&mut tx, session_id, edited.base_price).await?;
    } else if current.base_price != edited.base_price {
        session_seats::set_price(&mut tx, session_id, edited.base_price).await?;
    }
    let session = find(&mut tx, session_id).await?;
    tx.commit().await?;
    Ok(session.editable())
}

/// Cancel a session
///
/// Takes the session off sale at once. Within seconds, the Booking Service ends its reservations and refunds its
/// tickets. Repeating the call is safe.
#[utoipa::path(post, path = "/api/v1/sessions/{session_id}/cancel", tag = "5 Sessions", security((), ("bearer" = ["organizer", "admin"])),
    params(("session_id" = SessionId, Path), IfMatchHeader),
    responses((status = 200, description = "Cancelled", body = Session, headers(("ETag" = String))), CancelRefusals))]
pub(crate) async fn cancel_session(
    State(db): State<PgPool>,
    _: OrganizerCaller,
    ApiPath(session_id): ApiPath<SessionId>,
    if_match: IfMatch,
) -> Result<Editable<Session>> {
    let mut tx = database::begin(&db).await?;
    if lock(&mut tx, session_id, &if_match).await?.status != SessionStatus::Cancelled {
        let cancel =
            "update sessions set status = 'cancelled', cancelled_at = now(), version = version + 1, updated_at = now()
                      where session_id = $1";
        sqlx::query(cancel).bind(session_id).execute(&mut *tx).await?;
    }
    session_seats::block_free(&mut tx, session_id).await?;
    let session = find(&mut tx, session_id).await?;
    tx.commit().await?;
    Ok(session.editable())
}

/// Delete a session and its session seats
///
/// Refused while seats are reserved or sold: cancel the session first, which refunds the buyers, and delete it after
/// that.
#[utoipa::path(delete, path = "/api/v1/sessions/{session_id}", tag = "5 Sessions", security((), ("bearer" = ["organizer", "admin"])),
    params(("session_id" = SessionId, Path), IfMatchHeader), responses((status = 204, description = "Deleted"), DeleteRefusals))]
pub(crate) async fn delete_session(
    State(db): State<PgPool>,
    _: OrganizerCaller,
    ApiPath(session_id): ApiPath<SessionId>,
    if_match: IfMatch,
) -> Result<StatusCode> {
    let mut tx = database::begin(&db).await?;
    lock(&mut tx, session_id, &if_match).await?;
    session_seats::remove_unowned(&mut tx, session_id).await?;
    let owned = session_seats::owned(&mut tx, session_id).await?;
    in_use(owned, "reserved or sold seat", "Cancel the session first, and delete it when its seats are free.")?;
    sqlx::query("delete from sessions where session_id = $1").bind(session_id).execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

impl Session {
    fn editable(self) -> Editable<Self> {
        Editable { version: self.version, body: self }
    }
}

/// Locks the session for an edit. Until the transaction ends, no other request changes it; its seats are not locked.
async fn lock(tx: &mut PgConnection, session_id: SessionId, if_match: &IfMatch) -> Result<Session> {
    sqlx::query("select from sessions where session_id = $1 for update").bind(session_id).execute(&mut *tx).await?;
    let session = find(tx, session_id).await?;
    if_match.check(session.version)?;
    Ok(session)
}

/// Sessions cancelled after `after`, in the order of their cancellation. The Booking Service asks for them.
pub(crate) async fn cancelled_after(
    connection: &mut PgConnection,
    after: Option<TimeCursor>,
    limit: i64,
) -> Result<Vec<CancelledSession>> {
    let cancelled = sqlx::query_as(
        "select session_id, cancelled_at from sessions
         where status = 'cancelled'
           and (cancelled_at, session_id) > (coalesce($1, '-infinity'::timestamptz), coalesce($2, '00000000-0000-0000-0000-000000000000'::uuid))
         order by cancelled_at, session_id limit $3",
    )
    .bind(after.map(|cursor| cursor.time))
    .bind(after.map(|cursor| cursor.id))
    .bind(limit)
    .fetch_all(connection)
    .await?;
    Ok(cancelled)
}

async fn find(connection: &mut PgConnection, session_id: SessionId) -> Result<Session> {
    let found = sqlx::query_as(
        "select s.*, counts.* from sessions s cross join lateral (
             select count(*) as seats_count, count(*) filter (where status = 'available' and s.status = 'scheduled') as available_seats_count
             from session_seats where session_id = s.session_id
         ) counts where session_id = $1",
    )
    .bind(session_id)
    .fetch_optional(connection)
    .await?;
    found.ok_or_else(|| session_not_found(session_id))
}
