//! Every call to the Event Service. Each has a time limit, is retried within a budget, and returns an outcome instead
//! of an HTTP status. After many failures in a row the circuit opens, and calls fail at once instead of waiting.
//!
//! All calls are harmless when repeated; those that change seats are so because they name the reservation. No answer
//! means "unknown": a `reserve` without an answer may have held the seats.
//!
//! The `reserve` calls of concurrent bookings share one HTTP request.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use chrono::{DateTime, Utc};
use futures::future::join_all;
use reqwest::header::HeaderValue;
use reqwest::{Client, Method, RequestBuilder, StatusCode};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use service_kit::auth::{INTERNAL_API_KEY, InternalKeys};
use service_kit::http::circuit::Circuit;
use service_kit::http::error::Error;
use service_kit::http::request_context;
use service_kit::http::tls::Trust;
use service_kit::observe::traces;
use service_kit::postgres::batch::{BatchConfig, Batcher};
use service_kit::process::lifecycle::Lifecycle;
use shared_contracts::ids::{ReservationId, SessionId, SessionSeatId};
use shared_contracts::page::Page;
use shared_contracts::problem::{Code, Problem};
use shared_contracts::seat::SeatConflict;
use shared_contracts::seat_api::{
    CALLS_MAX, Call, CallAnswer, Calls, CancelledSessions, Hold, LookUpRequest, OverdueHolds, OwnedSeat, OwnedSeats,
    ReleaseRequest, ReserveRequest, SEATS_PER_CALL_MAX, SeatsChanged, SeatsFreed, SeatsOfReservation, SessionTimes,
    TimeCursor,
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// The time limit of one try. Three tries with their pauses stay well below the time limit of a buyer's request.
const TRY_TIME_MAX: Duration = Duration::from_millis(1000);
/// The time limit for connecting; a host that is up accepts within a millisecond.
const CONNECT_TIME_MAX: Duration = Duration::from_millis(300);
/// The most tries of one call, the first included.
const TRIES: usize = 3;
/// The most idle connections kept open for later calls.
const IDLE_CONNECTIONS_MAX: usize = 64;

/// How holds are batched. Normally one batch is in flight. If the Event Service stops answering, another batch starts
/// every 20 ms, so ten batches detect the failure.
const BATCHES: BatchConfig = BatchConfig {
    workers: 16,
    linger: Duration::ZERO,
    overlap_after: Duration::from_millis(20),
    batch_max: CALLS_MAX,
    queue_capacity: 1024,
    // Covers three tries with their pauses, and three more for calls that are then repeated one by one.
    timeout: Duration::from_secs(8),
};

/// The client of the Event Service. Clones share its connections, circuit and batches.
#[derive(Debug, Clone)]
pub struct EventClient {
    wire: Wire,
    holds: Arc<Batcher<Call<ReserveRequest>, ServiceAnswer<SeatsChanged>>>,
}

/// Sends the HTTP requests, with retries and the circuit breaker.
#[derive(Debug, Clone)]
struct Wire {
    http: Client,
    base: String,
    /// The internal API key; `None` if the deployment sets no key.
    key: Option<HeaderValue>,
    circuit: Arc<Circuit>,
}

/// The outcome of a change that applies to all of its seats or to none.
#[derive(Debug)]
pub enum SeatChange {
    /// All seats have the requested state.
    Done(SeatsChanged),
    /// Nothing was changed; these seats are the reason.
    Refused(Vec<SeatConflict>),
}

/// An answer of the Event Service: a result, or the problem document of a refusal.
#[derive(Debug)]
enum ServiceAnswer<T> {
    Success(T),
    Refused(Box<Problem>),
}

/// [`CallAnswers`](shared_contracts::seat_api::CallAnswers) whose answers are not parsed yet.
#[derive(Debug, Deserialize)]
struct Several {
    answers: Vec<Box<RawValue>>,
}

/// The ids of the request that a call is made for.
#[derive(Debug, Default)]
struct Origin {
    request_id: Option<String>,
    traceparent: Option<String>,
}

impl Origin {
    /// The ids of the request that this task serves.
    fn here() -> Self {
        Self { request_id: request_context::request_id(), traceparent: traces::traceparent() }
    }
}

impl<T> ServiceAnswer<T> {
    fn status(&self) -> StatusCode {
        match self {
            Self::Success(_) => StatusCode::OK,
            Self::Refused(problem) => StatusCode::from_u16(problem.status).unwrap_or(StatusCode::CONFLICT),
        }
    }
}

type Failure = anyhow::Error;

impl EventClient {
    /// A client for the Event Service at `base`, such as `http://event-service:8000`.
    ///
    /// # Errors
    /// The HTTP client can't be built, or the key is not a valid header value.
    pub fn new(base: &str, keys: &InternalKeys, trust: &Trust, lifecycle: &Lifecycle) -> anyhow::Result<Self> {
        let http = trust
            .http_client()
            // A redirect must not lead from HTTPS to plain HTTP.
            .https_only(base.starts_with("https:"))
            .connect_timeout(CONNECT_TIME_MAX)
            .timeout(TRY_TIME_MAX)
            .tcp_nodelay(true)
            .pool_max_idle_per_host(IDLE_CONNECTIONS_MAX)
            .build()?;
        let key = keys.current().map(|key| HeaderValue::from_str(key.reveal())).transpose()?;
        let key = key.map(|mut key| {
            key.set_sensitive(true);
            key
        });
        let circuit = Arc::new(Circuit::new("the Event Service"));
        let wire = Wire { http, base: base.trim_end_matches('/').to_owned(), key, circuit };
        let own = wire.clone();
        let hold = move |calls| own.clone().send_batch(calls);
        Ok(Self { wire, holds: Arc::new(Batcher::start(lifecycle, BATCHES, hold)) })
    }

    /// Holds all seats for the reservation, or none. The answer has their prices if the request asks for them.
    ///
    /// # Errors
    /// The session is cancelled. With prices: the session does not exist or is not on sale. Or the Event Service does
    /// not answer; then the seats may be held.
    pub async fn reserve(&self, session: SessionId, request: ReserveRequest) -> Result<SeatChange, Error> {
        changed(self.reserve_in_batch(session, request).await?)
    }

    /// Frees those of the seats that the reservation holds.
    ///
    /// # Errors
    /// The Event Service does not answer.
    pub async fn release(
        &self,
        session: SessionId,
        reservation_id: ReservationId,
        seats: &[SessionSeatId],
    ) -> Result<(), Error> {
        let request = SeatsOfReservation { reservation_id, session_seat_ids: seats.to_vec() };
        self.change(&format!("sessions/{session}/seats/release"), &request).await.map(drop)
    }

    /// Frees those of the seats that their reservations hold, in any sessions. If one call fails, for example because a
    /// seat is locked, the other calls still follow. They stop when the circuit opens.
    ///
    /// # Errors
    /// The Event Service does not answer, or is too old to know this call. Some of the seats may be free.
    pub async fn release_all(&self, holds: &[Hold]) -> Result<(), Error> {
        let mut outcome = Ok(());
        for holds in holds.chunks(SEATS_PER_CALL_MAX) {
            let request = ReleaseRequest { holds: holds.to_vec() };
            let released = match self.wire.call::<SeatsFreed>(Method::POST, "seats/release", Some(&request)).await {
                Ok(ServiceAnswer::Success(_)) => Ok(()),
                Ok(ServiceAnswer::Refused(problem)) => Err(unexpected(&problem)),
                Err(failure) => Err(unavailable(failure)),
            };
            outcome = outcome.and(released);
            if !self.wire.circuit.is_closed() {
                break;
            }
        }
        outcome
    }

    /// Sells to the reservation the seats that it holds.
    ///
    /// # Errors
    /// The Event Service does not answer.
    pub async fn confirm(
        &self,
        session: SessionId,
        reservation_id: ReservationId,
        seats: &[SessionSeatId],
    ) -> Result<SeatChange, Error> {
        let request = SeatsOfReservation { reservation_id, session_seat_ids: seats.to_vec() };
        self.change(&format!("sessions/{session}/seats/confirm"), &request).await
    }

    /// A page of the holds that are due before `before`, oldest first.
    ///
    /// # Errors
    /// The Event Service does not answer.
    pub async fn holds_before(
        &self,
        before: DateTime<Utc>,
        cursor: Option<TimeCursor>,
        limit: u16,
    ) -> Result<OverdueHolds, Error> {
        let before = before.to_rfc3339_opts(chrono::SecondsFormat::Micros, true);
        self.page(&format!("holds/overdue?before={before}&limit={limit}"), cursor).await
    }

    /// A page of the cancelled sessions, in the order of their cancellation.
    ///
    /// # Errors
    /// The Event Service does not answer.
    pub async fn cancelled_sessions(&self, cursor: Option<TimeCursor>, limit: u16) -> Result<CancelledSessions, Error> {
        self.page(&format!("sessions/cancelled?limit={limit}"), cursor).await
    }

    /// A page of the held and sold seats, in the order of their ids.
    ///
    /// # Errors
    /// The Event Service does not answer.
    pub async fn owned_seats(&self, after: Uuid, limit: u16) -> Result<Page<OwnedSeat>, Error> {
        self.page(&format!("seats/owned?cursor={after}&limit={limit}"), None).await
    }

    /// When the session takes place, as it stands now.
    ///
    /// # Errors
    /// The Event Service does not answer, is too old to know this call, or does not know the session.
    pub async fn session_times(&self, session: SessionId) -> Result<SessionTimes, Error> {
        let path = format!("sessions/{session}");
        match self.wire.call(Method::GET, &path, None::<&()>).await.map_err(unavailable)? {
            ServiceAnswer::Success(times) => Ok(times),
            // Nothing is decided without the times, and a newer Event Service may answer later.
            ServiceAnswer::Refused(problem) => {
                Err(unavailable(anyhow!("the Event Service has no times of session {session}: {}", problem.code)))
            }
        }
    }

    /// Those of `seats` that are held or sold.
    ///
    /// # Errors
    /// The Event Service does not answer.
    pub async fn look_up(&self, seats: &[SessionSeatId]) -> Result<Vec<OwnedSeat>, Error> {
        let request = LookUpRequest { session_seat_ids: seats.to_vec() };
        match self.wire.call::<OwnedSeats>(Method::POST, "seats/look-up", Some(&request)).await.map_err(unavailable)? {
            ServiceAnswer::Success(owned) => Ok(owned.items),
            ServiceAnswer::Refused(problem) => Err(unexpected(&problem)),
        }
    }

    async fn page<T: DeserializeOwned>(&self, path: &str, cursor: Option<TimeCursor>) -> Result<T, Error> {
        let cursor = cursor.map(|cursor| format!("&cursor={cursor}")).unwrap_or_default();
        match self.wire.call(Method::GET, &format!("{path}{cursor}"), None::<&()>).await.map_err(unavailable)? {
            ServiceAnswer::Success(page) => Ok(page),
            ServiceAnswer::Refused(problem) => Err(unexpected(&problem)),
        }
    }

    /// Checks that the circuit is closed. It opens after many failures in a row, and then calls fail at once.
    ///
    /// # Errors
    /// The circuit is open.
    pub fn circuit(&self) -> anyhow::Result<()> {
        anyhow::ensure!(self.wire.circuit.is_closed(), "the circuit to the Event Service is open");
        Ok(())
    }

    /// While the circuit is open, probes whether the Event Service answers again. Ends when `stopping` is cancelled.
    ///
    /// # Errors
    /// None. The result fits the signature of a task of the process.
    pub async fn watch(&self, stopping: CancellationToken) -> anyhow::Result<()> {
        stopping.run_until_cancelled(self.wire.circuit.keep_probing(|| self.ping())).await;
        Ok(())
    }

    /// Checks that the seat API works, by the Event Service's internal health check.
    ///
    /// # Errors
    /// The seat API does not work, or does not answer.
    pub async fn ping(&self) -> anyhow::Result<()> {
        self.wire.request(Method::GET, &self.wire.url_of("health")).send().await?.error_for_status()?;
        Ok(())
    }

    async fn change(&self, path: &str, request: &impl Serialize) -> Result<SeatChange, Error> {
        changed(self.wire.call(Method::POST, path, Some(request)).await.map_err(unavailable)?)
    }

    /// Requests a hold in the next batch. Its span in the trace includes the wait for the batch.
    async fn reserve_in_batch(
        &self,
        session_id: SessionId,
        body: ReserveRequest,
    ) -> Result<ServiceAnswer<SeatsChanged>, Error> {
        let url = self.wire.url_of(&reserve_path(session_id));
        let answered = traces::call(&Method::POST, &url, async {
            let Origin { request_id, traceparent } = Origin::here();
            let answer = self.holds.call(Call { session_id, request_id, traceparent, body }).await;
            let answer = answer.map_err(without_answer)?;
            Ok::<_, Error>((answer.status(), answer))
        });
        Ok(answered.await?.1)
    }
}

/// The error of a hold whose batch failed or took too long, or whose process is stopping: not the database gave no
/// answer, but the Event Service.
fn without_answer(error: Error) -> Error {
    match error {
        Error::OutcomeUnknown(cause) => unavailable(cause),
        other => other,
    }
}

/// The path of a request for one hold, outside a batch.
fn reserve_path(session: SessionId) -> String {
    format!("sessions/{session}/seats/reserve")
}

fn changed(answer: ServiceAnswer<SeatsChanged>) -> Result<SeatChange, Error> {
    match answer {
        ServiceAnswer::Success(changed) => Ok(SeatChange::Done(changed)),
        ServiceAnswer::Refused(problem) if matches!(problem.code, Code::SeatUnavailable | Code::SeatNotFound) => {
            Ok(SeatChange::Refused(problem.seats))
        }
        // The client gets these problems unchanged, because the Event Service knows the session.
        ServiceAnswer::Refused(problem)
            if matches!(
                problem.code,
                Code::SessionNotFound | Code::SessionCancelled | Code::SalesNotStarted | Code::SalesEnded
            ) =>
        {
            Err(Error::Refused(problem))
        }
        ServiceAnswer::Refused(problem) => Err(unexpected(&problem)),
    }
}

impl Wire {
    fn url_of(&self, path: &str) -> String {
        format!("{}/api/internal/{path}", self.base)
    }

    fn request(&self, method: Method, url: &str) -> RequestBuilder {
        let request = self.http.request(method, url);
        match &self.key {
            Some(key) => request.header(INTERNAL_API_KEY, key),
            None => request,
        }
    }

    /// Makes the calls in one HTTP request. A single call is made alone. Calls that the Event Service refuses as a
    /// whole are repeated one by one.
    async fn send_batch(self, calls: Vec<Call<ReserveRequest>>) -> Vec<Result<ServiceAnswer<SeatsChanged>, Error>> {
        let calls = Calls { calls };
        let count = calls.calls.len();
        let send_alone = async |call: &Call<ReserveRequest>| {
            let origin = Origin { request_id: call.request_id.clone(), traceparent: call.traceparent.clone() };
            let path = reserve_path(call.session_id);
            let try_once = || self.try_once(Method::POST, &path, Some(&origin), Some(&call.body));
            self.circuit.call(TRIES, try_once).await.map_err(unavailable)
        };
        if count == 1 {
            return join_all(calls.calls.iter().map(send_alone)).await;
        }
        let nobody = Origin::default();
        // Each answer is parsed on its own, so that an unknown form of one does not fail the others.
        let try_once = || self.try_once::<Several>(Method::POST, "seats/reserve", Some(&nobody), Some(&calls));
        let mut error = match self.circuit.call(TRIES, try_once).await {
            Ok(ServiceAnswer::Success(Several { answers })) if answers.len() == count => {
                let each = calls.calls.iter().zip(answers).map(async |(call, answer)| {
                    match serde_json::from_str(answer.get()) {
                        Ok(CallAnswer { done: Some(done), .. }) => Ok(ServiceAnswer::Success(done)),
                        // The Event Service failed for this call alone, so a retry may succeed.
                        Ok(CallAnswer { refused: Some(problem), .. }) if problem.status >= 500 => {
                            send_alone(call).await
                        }
                        Ok(CallAnswer { refused: Some(problem), .. }) => Ok(ServiceAnswer::Refused(Box::new(problem))),
                        _ => Err(unavailable(anyhow!("the answer does not have the agreed form: {answer}"))),
                    }
                });
                return join_all(each).await;
            }
            Ok(ServiceAnswer::Success(_)) => {
                Error::Internal(anyhow!("the Event Service sent more or fewer answers than calls"))
            }
            Ok(ServiceAnswer::Refused(_)) => return join_all(calls.calls.iter().map(send_alone)).await,
            Err(failure) => unavailable(failure),
        };
        calls.calls.iter().map(|_| Err(error.for_another())).collect()
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<ServiceAnswer<T>, Failure> {
        self.circuit.call(TRIES, || self.try_once(method.clone(), path, None, body)).await
    }

    /// One try, for the request of `origin`, or for the current request if `origin` is `None`.
    async fn try_once<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        origin: Option<&Origin>,
        body: Option<&impl Serialize>,
    ) -> Result<ServiceAnswer<T>, Failure> {
        let url = self.url_of(path);
        let mut request = self.request(method.clone(), &url);
        // The time limit of this try, because nothing waits for a later answer.
        request = request.header(request_context::TIMEOUT_MS, TRY_TIME_MAX.as_millis().to_string());
        if let Some(body) = body {
            request = request.json(body);
        }
        let exchange = traces::call(&method, &url, async {
            // Read inside the span, so that `traceparent` names this try.
            let here = if origin.is_none() { Origin::here() } else { Origin::default() };
            let Origin { request_id, traceparent } = origin.unwrap_or(&here);
            if let Some(id) = request_id {
                request = request.header(request_context::REQUEST_ID, id);
            }
            if let Some(traceparent) = traceparent {
                request = request.header(request_context::TRACEPARENT, traceparent);
            }
            let response = request.send().await.context("no answer")?;
            anyhow::Ok((response.status(), response.bytes().await.context("the connection failed during the answer")?))
        });
        let (status, bytes) = exchange.await?;
        if status.is_success() {
            return Ok(ServiceAnswer::Success(
                serde_json::from_slice(&bytes).context("the answer does not have the agreed form")?,
            ));
        }
        if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
            anyhow::bail!("the Event Service answered {status}");
        }
        Ok(ServiceAnswer::Refused(Box::new(
            serde_json::from_slice(&bytes).context("the refusal is not a problem document")?,
        )))
    }
}

fn unavailable(cause: Failure) -> Error {
    let detail =
        "Seats can't be checked or held right now. Seats that this call may have held are released. Please try again.";
    Error::Unavailable { problem: Box::new(Problem::new(Code::EventServiceUnavailable, detail).retry_after(2)), cause }
}

/// The error for an older Event Service, which holds seats without returning their prices.
pub(crate) fn older() -> Error {
    unavailable(anyhow!("the Event Service is an older version: upgrade it before the Booking Service"))
}

fn unexpected(problem: &Problem) -> Error {
    Error::Internal(anyhow::anyhow!("the Event Service refused with {}: {}", problem.code, problem.detail))
}

#[cfg(test)]
mod tests {
    use service_kit::postgres::batch::no_answer;

    use super::*;

    #[test]
    fn a_hold_without_an_answer_names_the_event_service() {
        let error = without_answer(no_answer());
        let is_named = |problem: &Problem| problem.code == Code::EventServiceUnavailable;
        assert!(matches!(&error, Error::Unavailable { problem, .. } if is_named(problem)), "{error:?}");
    }
}
