//! Sessions: one performance of an event in a hall, created together with its session seats.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use chrono::{DateTime, Datelike, Utc};
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
use shared_contracts::problem::{Code, FieldError, Problem};
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
    /// Whether a seat can be bought now.
    on_sale: bool,
    /// Why no seat can be bought now; null while the session is on sale.
    off_sale_reason: Option<OffSaleReason>,
    /// When sales begin or began.
    on_sale_from: DateTime<Utc>,
    /// The number of its session seats.
    seats_count: i64,
    /// The number of its session seats that can be bought now; 0 while the session is not on sale.
    available_seats_count: i64,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
    #[serde(skip)]
    version: i64,
    /// The database's time of this reading.
    #[serde(skip)]
    read_at: DateTime<Utc>,
}

/// Why no seat of a session can be bought.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, sqlx::Type, ToSchema)]
#[serde(rename_all = "snake_case")]
#[sqlx(type_name = "text", rename_all = "snake_case")]
pub enum OffSaleReason {
    /// The organizer has cancelled the session.
    Cancelled,
    /// Its sales are over.
    Ended,
    /// Its sales have not begun.
    NotStarted,
    /// No seat is free.
    SoldOut,
}

/// Body of the call that creates a session.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
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
    /// When sales end; when the session begins if omitted. It may lie inside the session.
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
problems!(CancelRefusals: &[Code::SessionNotFound, Code::SessionOver, Code::PreconditionFailed, Code::ValidationFailed]);
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
    let now: DateTime<Utc> = sqlx::query_scalar("select now()").fetch_one(&mut *tx).await?;
    new.check(None, now)?;
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
    let sql = with_sale(
        "select * from sessions
         where session_id > $1 and ($3::uuid is null or event_id = $3) and ($4::uuid is null or hall_id = $4)
           and ($5::timestamptz is null or start_time >= $5) and ($6::timestamptz is null or start_time < $6)
         order by session_id limit $2",
    );
    let rows: Vec<Session> = sqlx::query_as(sqlx::AssertSqlSafe(sql))
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
    edited.check(Some(&current), current.read_at)?;
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
/// tickets. Repeating the call is safe. A session that has ended can't be cancelled.
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
    let current = lock(&mut tx, session_id, &if_match).await?;
    if current.status != SessionStatus::Cancelled {
        if current.is_over() {
            let detail = "This session has taken place, so it can't be cancelled. Its buyers keep their tickets.";
            return Err(Error::refused(Code::SessionOver, detail));
        }
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
/// Refused while seats are reserved or sold. If the session does not take place, cancel it first, which refunds the
/// buyers, and delete it after that. A session that has taken place stays with its sold seats.
#[utoipa::path(delete, path = "/api/v1/sessions/{session_id}", tag = "5 Sessions", security((), ("bearer" = ["organizer", "admin"])),
    params(("session_id" = SessionId, Path), IfMatchHeader), responses((status = 204, description = "Deleted"), DeleteRefusals))]
pub(crate) async fn delete_session(
    State(db): State<PgPool>,
    _: OrganizerCaller,
    ApiPath(session_id): ApiPath<SessionId>,
    if_match: IfMatch,
) -> Result<StatusCode> {
    let mut tx = database::begin(&db).await?;
    let current = lock(&mut tx, session_id, &if_match).await?;
    session_seats::remove_unowned(&mut tx, session_id).await?;
    let owned = session_seats::owned(&mut tx, session_id).await?;
    let remedy = match current.is_over() {
        true => "It has taken place, so it stays as the record of what was sold.",
        false => "Cancel the session first, and delete it when its seats are free.",
    };
    in_use(owned, "reserved or sold seat", remedy)?;
    sqlx::query("delete from sessions where session_id = $1").bind(session_id).execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

impl Session {
    fn editable(self) -> Editable<Self> {
        Editable { version: self.version, body: self }
    }

    fn is_over(&self) -> bool {
        self.end_time <= self.read_at
    }
}

impl CreateSession {
    /// Checks the times of a new session, or of one that is edited, at `now` by the database's clock.
    fn check(&self, current: Option<&Session>, now: DateTime<Utc>) -> Result<()> {
        let times = [
            ("/start_time", Some(self.start_time)),
            ("/end_time", Some(self.end_time)),
            ("/sales_start", self.sales_start),
            ("/sales_end", self.sales_end),
        ];
        let mut faults: Vec<FieldError> = times
            .into_iter()
            .filter(|(_, time)| time.is_some_and(|time| !(0..=LAST_YEAR).contains(&time.year())))
            .map(|(place, _)| FieldError::at(place, format!("is not within the years 0 to {LAST_YEAR} in UTC")))
            .collect();
        if self.end_time <= now && current.is_none_or(|current| current.end_time != self.end_time) {
            faults.push(FieldError::at("/end_time", "is in the past; a session must not be over before it is sold"));
        }
        let closes = self.sales_end.unwrap_or(self.end_time).min(self.end_time);
        if self.sales_start.is_some_and(|opens| opens >= closes) {
            faults.push(FieldError::at("/sales_start", "must be earlier than sales_end and the session's end"));
        }
        if faults.is_empty() { Ok(()) } else { Err(Problem::validation(faults).into()) }
    }
}

/// The last year that RFC 3339 can write.
const LAST_YEAR: i32 = 9999;

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
    let sql = with_sale("select * from sessions where session_id = $1");
    let found = sqlx::query_as(sqlx::AssertSqlSafe(sql)).bind(session_id).fetch_optional(connection).await?;
    found.ok_or_else(|| session_not_found(session_id))
}

/// Adds to these rows of `sessions` what of them is on sale now.
fn with_sale(sessions: &str) -> String {
    format!(
        "select s.*, seats_count, on_sale_from, clock_timestamp() as read_at, off_sale_reason,
             off_sale_reason is null as on_sale, case when off_sale_reason is null then free_count else 0 end as available_seats_count
         from ({sessions}) s
         cross join lateral (
             select count(*) as seats_count, count(*) filter (where status = 'available') as free_count
             from session_seats where session_id = s.session_id
         ) counts
         cross join lateral (select coalesce(s.sales_start, s.created_at) as on_sale_from) opening
         cross join lateral (
             select case
                 when s.status = 'cancelled' then 'cancelled'
                 when now() >= session_sales_close(s.start_time, s.end_time, s.sales_end) then 'ended'
                 when now() < on_sale_from then 'not_started'
                 when free_count = 0 then 'sold_out'
             end as off_sale_reason
         ) sale
         order by session_id"
    )
}
