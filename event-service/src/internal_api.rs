//! The internal seat API, for the Booking Service. Each handler reads a body, calls [`session_seats`] and shapes the
//! answer. `reserve` first reads prices without a lock (`holds/availability.rs`). Then `holds/batch.rs` calls
//! [`session_seats::reserve`] for all requests of the moment, in one statement.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use chrono::{DateTime, Utc};
use futures::future::join_all;
use serde::{Deserialize, Serialize};
use service_kit::auth::InternalCaller;
use service_kit::http::error::{Error, Result};
use service_kit::http::extract::{ApiJson, ApiPath};
use service_kit::http::query::ApiQuery;
use service_kit::http::{layers, openapi};
use service_kit::observe::traces;
use service_kit::problems;
use service_kit::process::crash::crash_point;
use shared_contracts::ids::{ReservationId, SessionId, SessionSeatId};
use shared_contracts::page::{Page, PageQuery};
use shared_contracts::problem::{Code, FieldError, Problem};
use shared_contracts::seat::{SeatConflict, SeatStatus};
use shared_contracts::seat_api::{
    Availability, Call, CallAnswer, CallAnswers, Calls, CancelledSessions, CheckAvailabilityRequest, Hold,
    LookUpRequest, OverdueHolds, OwnedSeat, OwnedSeats, Pricing, ReleaseRequest, ReserveRequest, SEATS_PER_CALL_MAX,
    SeatAvailability, SeatPrice, SeatsChanged, SeatsFreed, SeatsOfReservation, SessionTimes, TimeCursor,
};
use sqlx::PgPool;
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::catalogue::sessions;
use crate::error::session_not_found;
use crate::holds::availability::{AvailabilityLoader, PricedSeat, SessionAvailability};
use crate::holds::batch::HoldBatcher;
use crate::metrics::EventMetrics;
use crate::sale::{self, Sale};
use crate::session_seats::{self, ChangeOutcome, HoldRequest, Releasable};

/// A slow call must not cost the others in its body their answers: the Booking Service waits one second for all of
/// them.
const CALL_TIMEOUT: Duration = Duration::from_millis(700);

/// Rows of a page of holds or cancelled sessions, unless the caller asks for another number.
const WALK_ROWS_DEFAULT: u16 = 500;

problems!(CheckRefusals: openapi::BODY, &[Code::SessionNotFound, Code::SessionCancelled, Code::SalesNotStarted, Code::SalesEnded]);
problems!(ChangeRefusals: openapi::BODY, &[Code::SeatNotFound, Code::SeatUnavailable]);
problems!(ReserveRefusals: openapi::BODY, &[Code::SeatNotFound, Code::SeatUnavailable, Code::SessionNotFound, Code::SessionCancelled, Code::SalesNotStarted, Code::SalesEnded]);
problems!(ReleaseRefusals: openapi::BODY);
problems!(PricingRefusals: &[Code::SessionNotFound, Code::ValidationFailed]);
problems!(ListRefusals: &[Code::ValidationFailed]);

/// Check seat availability
///
/// The answer promises nothing: only `reserve` decides. Refused while the session is not on sale.
#[utoipa::path(post, path = "/api/internal/sessions/{session_id}/seats/check-availability", tag = "6 Internal seat API", security((), ("internal_key" = [])),
    request_body = CheckAvailabilityRequest, params(("session_id" = SessionId, Path)),
    responses((status = 200, description = "The state of each seat", body = Availability), CheckRefusals))]
pub(crate) async fn check_availability(
    _: InternalCaller,
    State(loader): State<Arc<AvailabilityLoader>>,
    ApiPath(session_id): ApiPath<SessionId>,
    ApiJson(request): ApiJson<CheckAvailabilityRequest>,
) -> Result<Json<Availability>> {
    let wanted = as_set(request.session_seat_ids);
    let session = load_open_session(&loader, session_id, wanted.clone()).await?;
    let seats: Vec<_> = session
        .seats
        .iter()
        .map(|seat| SeatAvailability {
            session_seat_id: seat.price.session_seat_id,
            status: seat.status,
            available: seat.status == SeatStatus::Available,
            overdue: seat.overdue,
        })
        .collect();
    let is_known = |id: &SessionSeatId| seats.iter().any(|seat| seat.session_seat_id == *id);
    let unknown_seat_ids: Vec<_> = wanted.into_iter().filter(|id| !is_known(id)).collect();
    let taken = seats.iter().filter(|seat| !seat.available).map(|seat| seat.session_seat_id);
    let unavailable_seat_ids: Vec<_> = taken.chain(unknown_seat_ids.iter().copied()).collect();
    let available = unavailable_seat_ids.is_empty();
    Ok(Json(Availability { available, session_id, seats, unavailable_seat_ids, unknown_seat_ids }))
}

/// A session that is on sale, and those of the wanted seats that belong to it.
async fn load_open_session(
    loader: &AvailabilityLoader,
    session_id: SessionId,
    wanted: Vec<SessionSeatId>,
) -> Result<SessionAvailability> {
    let loaded = traces::step("session_seats.look", loader.load(session_id, wanted)).await?;
    let session = loaded.ok_or_else(|| session_not_found(session_id))?;
    session.sale.must_be_open()?;
    Ok(session)
}

/// The prices of seats that are free, as far as a query without a lock can tell. It spares late buyers the locks of a
/// hold. It passes overdue holds, which the hold itself reports, and seats that this reservation got by an earlier
/// attempt.
async fn price_free_seats(
    loader: &AvailabilityLoader,
    session_id: SessionId,
    reservation_id: ReservationId,
    wanted: &[SessionSeatId],
) -> Result<Pricing> {
    let SessionAvailability { sale, seats } = load_open_session(loader, session_id, wanted.to_vec()).await?;
    let is_taken = |seat: &&PricedSeat| {
        seat.status != SeatStatus::Available && !seat.overdue && seat.reservation_id != Some(reservation_id)
    };
    let is_known = |id: &&SessionSeatId| seats.iter().any(|seat| seat.price.session_seat_id == **id);
    let unknown = wanted.iter().filter(|id| !is_known(id)).map(|id| SeatConflict::new(*id, None));
    let taken =
        seats.iter().filter(is_taken).map(|seat| SeatConflict::new(seat.price.session_seat_id, Some(seat.status)));
    let conflicts: Vec<SeatConflict> = unknown.chain(taken).collect();
    if !conflicts.is_empty() {
        return Err(refusal(conflicts));
    }
    let seats = seats.into_iter().map(|seat| seat.price).collect();
    let Sale { base_price, currency, end_time, .. } = sale;
    Ok(Pricing { session_id, base_price, currency, end_time: Some(end_time), seats })
}

/// Hold seats for a reservation: all or none
///
/// With `with_prices`, first checks that the session is on sale and the seats are free, and answers with the prices.
#[utoipa::path(post, path = "/api/internal/sessions/{session_id}/seats/reserve", tag = "6 Internal seat API", security((), ("internal_key" = [])),
    request_body = ReserveRequest, params(("session_id" = SessionId, Path)),
    responses((status = 200, description = "Held", body = SeatsChanged), ReserveRefusals))]
pub(crate) async fn reserve_seats(
    _: InternalCaller,
    State(loader): State<Arc<AvailabilityLoader>>,
    State(batcher): State<Arc<HoldBatcher>>,
    State(db): State<PgPool>,
    State(metrics): State<EventMetrics>,
    ApiPath(session_id): ApiPath<SessionId>,
    ApiJson(request): ApiJson<ReserveRequest>,
) -> Result<Json<SeatsChanged>> {
    reserve_counted(&loader, &batcher, &db, &metrics, session_id, request).await.map(Json)
}

/// Hold seats for many reservations: all or none for each
///
/// Each call succeeds or fails on its own.
#[utoipa::path(post, path = "/api/internal/seats/reserve", tag = "6 Internal seat API", security((), ("internal_key" = [])),
    request_body = Calls<ReserveRequest>, responses((status = 200, description = "One answer per call, in order", body = CallAnswers<SeatsChanged>), ReleaseRefusals))]
pub(crate) async fn reserve_seats_for_many(
    _: InternalCaller,
    State(loader): State<Arc<AvailabilityLoader>>,
    State(batcher): State<Arc<HoldBatcher>>,
    State(db): State<PgPool>,
    State(metrics): State<EventMetrics>,
    ApiJson(calls): ApiJson<Calls<ReserveRequest>>,
) -> Result<Json<CallAnswers<SeatsChanged>>> {
    let work = |session_id, body| reserve_counted(&loader, &batcher, &db, &metrics, session_id, body);
    answer_each(calls, "/api/internal/seats/reserve", work).await
}

async fn reserve_counted(
    loader: &AvailabilityLoader,
    batcher: &HoldBatcher,
    db: &PgPool,
    metrics: &EventMetrics,
    session_id: SessionId,
    request: ReserveRequest,
) -> Result<SeatsChanged> {
    let held = price_and_reserve(loader, batcher, db, session_id, request).await;
    metrics.count_hold(&held);
    held
}

async fn price_and_reserve(
    loader: &AvailabilityLoader,
    batcher: &HoldBatcher,
    db: &PgPool,
    session_id: SessionId,
    request: ReserveRequest,
) -> Result<SeatsChanged> {
    let ReserveRequest { reservation_id, session_seat_ids, reserved_until, with_prices } = request;
    let seats = as_set(session_seat_ids);
    let pricing = match with_prices {
        true => Some(price_free_seats(loader, session_id, reservation_id, &seats).await?),
        false => None,
    };
    let request = HoldRequest { session_id, reservation_id, seats: seats.clone(), reserved_until };
    let outcome = traces::step("session_seats.reserve", batcher.reserve(request)).await?;
    crash_point("seats.reserved");
    let is_blocked = |conflict: &SeatConflict| conflict.status == Some(SeatStatus::Blocked);
    if matches!(&outcome, ChangeOutcome::Refused(conflicts) if conflicts.iter().any(is_blocked)) {
        // Seats are blocked when their session is cancelled; then the cancellation is the better answer.
        sale::must_not_be_cancelled(&mut *db.acquire().await?, session_id).await?;
    }
    Ok(SeatsChanged { pricing, ..answer(outcome, reservation_id, seats)? })
}

fn call_timed_out() -> Error {
    let detail = "The call timed out. It may have taken effect; repeating it is safe.";
    Error::from(Problem::new(Code::DeadlineExceeded, detail).retry_after(1))
}

/// Answers each call as if it were a request of its own. If all of them failed by the service's fault, the first
/// failure answers the body.
async fn answer_each<T, R, F: Future<Output = Result<R>>>(
    calls: Calls<T>,
    route: &'static str,
    work: impl Fn(SessionId, T) -> F,
) -> Result<Json<CallAnswers<R>>> {
    let done = calls.calls.into_iter().map(|call| {
        let Call { session_id, request_id, traceparent, body } = call;
        let work = tokio::time::timeout(CALL_TIMEOUT, work(session_id, body));
        // Boxed, because the future is large and is moved several times: that was 5 % of the service's work.
        let work = Box::pin(async { work.await.unwrap_or_else(|_| Err(call_timed_out())) });
        layers::on_behalf_of(request_id, traceparent, route, work)
    });
    let done = join_all(done).await;
    let failed = |done: &std::result::Result<R, Problem>| matches!(done, Err(problem) if problem.status >= 500);
    if done.iter().all(failed)
        && let Some(Err(problem)) = done.first()
    {
        return Err(problem.clone().into());
    }
    let answers = done.into_iter().map(CallAnswer::from).collect();
    Ok(Json(CallAnswers { answers }))
}

/// Free a reservation's held seats
///
/// Skips seats that another reservation holds and seats that are sold.
#[utoipa::path(post, path = "/api/internal/sessions/{session_id}/seats/release", tag = "6 Internal seat API", security((), ("internal_key" = [])),
    request_body = SeatsOfReservation, params(("session_id" = SessionId, Path)),
    responses((status = 200, description = "The seats that this call freed", body = SeatsChanged), ReleaseRefusals))]
pub(crate) async fn release_seats(
    _: InternalCaller,
    State(db): State<PgPool>,
    ApiPath(_session_id): ApiPath<SessionId>,
    ApiJson(request): ApiJson<SeatsOfReservation>,
) -> Result<Json<SeatsChanged>> {
    let owner = request.reservation_id;
    let holds: Vec<_> = as_set(request.session_seat_ids)
        .into_iter()
        .map(|session_seat_id| Hold { reservation_id: owner, session_seat_id })
        .collect();
    let session_seat_ids = session_seats::free(&mut *db.acquire().await?, &holds, Releasable::Held).await?;
    Ok(Json(SeatsChanged { reservation_id: owner, session_seat_ids, pricing: None }))
}

/// Free the held seats of many reservations
///
/// For holds that end together. Skips seats that another reservation holds by now and seats that are sold.
#[utoipa::path(post, path = "/api/internal/seats/release", tag = "6 Internal seat API", security((), ("internal_key" = [])),
    request_body = ReleaseRequest, responses((status = 200, description = "The seats that this call freed", body = SeatsFreed), ReleaseRefusals))]
pub(crate) async fn release_seats_of_many(
    _: InternalCaller,
    State(db): State<PgPool>,
    ApiJson(request): ApiJson<ReleaseRequest>,
) -> Result<Json<SeatsFreed>> {
    let session_seat_ids = session_seats::free(&mut *db.acquire().await?, &request.holds, Releasable::Held).await?;
    Ok(Json(SeatsFreed { session_seat_ids }))
}

/// Sell a reservation's held seats: all or none
#[utoipa::path(post, path = "/api/internal/sessions/{session_id}/seats/confirm", tag = "6 Internal seat API", security((), ("internal_key" = [])),
    request_body = SeatsOfReservation, params(("session_id" = SessionId, Path)),
    responses((status = 200, description = "Sold", body = SeatsChanged), ChangeRefusals))]
pub(crate) async fn confirm_seats(
    _: InternalCaller,
    State(db): State<PgPool>,
    ApiPath(_session_id): ApiPath<SessionId>,
    ApiJson(request): ApiJson<SeatsOfReservation>,
) -> Result<Json<SeatsChanged>> {
    let seats = as_set(request.session_seat_ids);
    let outcome = session_seats::confirm(&mut *db.acquire().await?, request.reservation_id, &seats).await?;
    answer(outcome, request.reservation_id, seats).map(Json)
}

fn answer(
    outcome: ChangeOutcome,
    reservation_id: ReservationId,
    session_seat_ids: Vec<SessionSeatId>,
) -> Result<SeatsChanged> {
    match outcome {
        ChangeOutcome::Done => Ok(SeatsChanged { reservation_id, session_seat_ids, pricing: None }),
        ChangeOutcome::Refused(conflicts) => Err(refusal(conflicts)),
    }
}

fn refusal(conflicts: Vec<SeatConflict>) -> Error {
    let (code, detail) = match conflicts.iter().any(|conflict| conflict.status.is_none()) {
        true => (Code::SeatNotFound, "The seats without a status do not exist in this session. No seat was changed."),
        false => (Code::SeatUnavailable, "The seats listed are not free for this reservation. No seat was changed."),
    };
    Problem::new(code, detail).with_seats(conflicts).into()
}

/// The seats to price.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct PricingQuery {
    /// Ids of session seats, separated by commas. All seats of the session if omitted.
    #[param(
        example = "019ac1c0-0000-7000-8000-000000000007",
        max_length = 18_499,
        pattern = "^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}(,[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12})*$"
    )]
    session_seat_ids: Option<String>,
}

/// Get prices and labels of a session's seats
#[utoipa::path(get, path = "/api/internal/sessions/{session_id}/pricing", tag = "6 Internal seat API", security((), ("internal_key" = [])),
    params(("session_id" = SessionId, Path), PricingQuery),
    responses((status = 200, description = "The prices; unknown seats are left out", body = Pricing), PricingRefusals))]
pub(crate) async fn get_pricing(
    _: InternalCaller,
    State(db): State<PgPool>,
    ApiPath(session_id): ApiPath<SessionId>,
    ApiQuery(query, _): ApiQuery<PricingQuery>,
) -> Result<Json<Pricing>> {
    let mut connection = db.acquire().await?;
    let session =
        sqlx::query!("select base_price, currency, end_time from sessions where session_id = $1", session_id as _)
            .fetch_optional(&mut *connection)
            .await?
            .ok_or_else(|| session_not_found(session_id))?;
    let seats = match query.session_seat_ids {
        None => {
            sqlx::query_as!(
                SeatPrice,
                "select session_seat_id, price, row_number, seat_number, section from session_seats join seats using (seat_id)
                 where session_id = $1 order by seat_id",
                session_id as _,
            )
            .fetch_all(&mut *connection)
            .await?
        }
        Some(list) => {
            sqlx::query_as!(
                SeatPrice,
                "select session_seat_id, price, row_number, seat_number, section
                 from (select * from session_seats where session_seat_id = any($1) offset 0) ss join seats using (seat_id)
                 where session_id = $2",
                parse_list(&list)? as _,
                session_id as _,
            )
            .fetch_all(&mut *connection)
            .await?
        }
    };
    let (base_price, currency, end_time) = (session.base_price, session.currency, Some(session.end_time));
    Ok(Json(Pricing { session_id, base_price, currency, end_time, seats }))
}

/// Get the times of a session
#[utoipa::path(get, path = "/api/internal/sessions/{session_id}", tag = "6 Internal seat API", security((), ("internal_key" = [])),
    params(("session_id" = SessionId, Path)),
    responses((status = 200, description = "The times as they stand now", body = SessionTimes), PricingRefusals))]
pub(crate) async fn get_session_times(
    _: InternalCaller,
    State(db): State<PgPool>,
    ApiPath(session_id): ApiPath<SessionId>,
) -> Result<Json<SessionTimes>> {
    let times = sqlx::query_as!(
        SessionTimes,
        "select session_id, start_time, end_time from sessions where session_id = $1",
        session_id as _,
    )
    .fetch_optional(&db)
    .await?;
    times.map(Json).ok_or_else(|| session_not_found(session_id))
}

fn parse_list(list: &str) -> Result<Vec<SessionSeatId>> {
    let fault = |detail: String| Error::invalid(FieldError::parameter("session_seat_ids", detail));
    let ids: Vec<SessionSeatId> = list
        .split(',')
        .map(|id| id.parse().map_err(|error| fault(format!("{id:?} is not a UUID: {error}"))))
        .collect::<Result<_>>()?;
    if ids.len() > SEATS_PER_CALL_MAX {
        return Err(fault(format!("names more than {SEATS_PER_CALL_MAX} seats")));
    }
    Ok(ids)
}

/// The page to read.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct WalkQuery {
    /// The maximum number of rows.
    #[param(minimum = 1, maximum = 1000, default = 500)]
    limit: Option<u16>,
    /// The `next_cursor` of the previous page. Omit it for the first page.
    #[param(pattern = "^[0-9]{1,17}_[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$")]
    cursor: Option<String>,
}

/// Filter of the list of holds.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct HoldsFilter {
    /// Only holds that are due before this time; the present time if omitted. A later time includes holds that still
    /// run.
    before: Option<DateTime<Utc>>,
}

impl WalkQuery {
    fn limit(&self) -> i64 {
        self.limit.unwrap_or(WALK_ROWS_DEFAULT).into()
    }

    fn after(&self) -> Result<Option<TimeCursor>> {
        let after = self.cursor.as_deref().map(str::parse).transpose();
        after.map_err(|error| Error::invalid(FieldError::parameter("cursor", error)))
    }

    /// The cursor of the next page; `None` if this page is not full, so that no more rows exist.
    fn next<T>(&self, items: &[T], of: impl Fn(&T) -> TimeCursor) -> Option<String> {
        items.last().filter(|_| items.len() as i64 == self.limit()).map(|last| of(last).to_string())
    }
}

/// List holds that are due, oldest first
///
/// The Booking Service settles them when it reconciles.
#[utoipa::path(get, path = "/api/internal/holds/overdue", tag = "6 Internal seat API", security((), ("internal_key" = [])), params(WalkQuery, HoldsFilter),
    responses((status = 200, description = "A page", body = OverdueHolds), ListRefusals))]
pub(crate) async fn list_overdue_holds(
    _: InternalCaller,
    State(db): State<PgPool>,
    ApiQuery(walk, filter): ApiQuery<WalkQuery, HoldsFilter>,
) -> Result<Json<OverdueHolds>> {
    let after = walk.after()?;
    let items = session_seats::holds_before(&mut *db.acquire().await?, filter.before, after, walk.limit()).await?;
    let next_cursor =
        walk.next(&items, |last| TimeCursor { time: last.reserved_until, id: last.session_seat_id.as_uuid() });
    Ok(Json(OverdueHolds { items, next_cursor }))
}

/// List cancelled sessions, in the order of their cancellation
///
/// The Booking Service ends their reservations.
#[utoipa::path(get, path = "/api/internal/sessions/cancelled", tag = "6 Internal seat API", security((), ("internal_key" = [])), params(WalkQuery),
    responses((status = 200, description = "A page", body = CancelledSessions), ListRefusals))]
pub(crate) async fn list_cancelled_sessions(
    _: InternalCaller,
    State(db): State<PgPool>,
    ApiQuery(walk, _): ApiQuery<WalkQuery>,
) -> Result<Json<CancelledSessions>> {
    let after = walk.after()?;
    let items = sessions::cancelled_after(&mut *db.acquire().await?, after, walk.limit()).await?;
    let next_cursor = walk.next(&items, |last| TimeCursor { time: last.cancelled_at, id: last.session_id.as_uuid() });
    Ok(Json(CancelledSessions { items, next_cursor }))
}

/// List reserved and sold seats, in the order of their ids
///
/// For the audit of the Booking Service.
#[utoipa::path(get, path = "/api/internal/seats/owned", tag = "6 Internal seat API", security((), ("internal_key" = [])), params(PageQuery),
    responses((status = 200, description = "A page", body = Page<OwnedSeat>), ListRefusals))]
pub(crate) async fn list_owned_seats(
    _: InternalCaller,
    State(db): State<PgPool>,
    ApiQuery(page, _): ApiQuery<PageQuery>,
) -> Result<Json<Page<OwnedSeat>>> {
    let after = page.cursor.unwrap_or(Uuid::nil());
    let rows = session_seats::owned_after(&mut *db.acquire().await?, after, page.rows_to_read()).await?;
    Ok(Json(Page::from_rows(rows, &page, |row| row.session_seat_id.as_uuid())))
}

/// Find the reservations of seats
///
/// For the audit of the Booking Service. The answer omits free seats and unknown ones.
#[utoipa::path(post, path = "/api/internal/seats/look-up", tag = "6 Internal seat API", security((), ("internal_key" = [])), request_body = LookUpRequest,
    responses((status = 200, description = "The reserved and sold seats among them", body = OwnedSeats), ReleaseRefusals))]
pub(crate) async fn look_up_seats(
    _: InternalCaller,
    State(db): State<PgPool>,
    ApiJson(request): ApiJson<LookUpRequest>,
) -> Result<Json<OwnedSeats>> {
    let items = session_seats::owned_of(&mut *db.acquire().await?, &request.session_seat_ids).await?;
    Ok(Json(OwnedSeats { items }))
}

/// The internal health check's answer.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct InternalHealth {
    /// Always `healthy`; an unhealthy service answers with a problem.
    status: &'static str,
    /// Always `event-service`.
    service: &'static str,
}

problems!(HealthRefusals: &[]);

/// Check the health of the seat API
#[utoipa::path(get, path = "/api/internal/health", tag = "6 Internal seat API", security((), ("internal_key" = [])),
    responses((status = 200, description = "Ready", body = InternalHealth), HealthRefusals))]
pub(crate) async fn get_internal_health(_: InternalCaller, State(db): State<PgPool>) -> Result<Json<InternalHealth>> {
    sqlx::query("select 1").execute(&db).await?;
    Ok(Json(InternalHealth { status: "healthy", service: "event-service" }))
}

/// Check the health of the seat API by POST
///
/// For clients that send only POST requests.
#[utoipa::path(post, path = "/api/internal/health", tag = "6 Internal seat API", security((), ("internal_key" = [])),
    responses((status = 200, description = "Ready", body = InternalHealth), HealthRefusals))]
pub(crate) async fn post_internal_health(caller: InternalCaller, db: State<PgPool>) -> Result<Json<InternalHealth>> {
    get_internal_health(caller, db).await
}

fn as_set(mut ids: Vec<SessionSeatId>) -> Vec<SessionSeatId> {
    ids.sort_unstable();
    ids.dedup();
    ids
}
