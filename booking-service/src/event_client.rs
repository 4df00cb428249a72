//! Every call to the Event Service: bounded in time, tried again within a budget, with outcomes instead of statuses.
//! When it fails again and again the circuit opens, and callers hear so at once instead of waiting.
//!
//! All calls are harmless when repeated, the changing ones because they name the reservation. No answer means
//! "unknown": a `reserve` without an answer may have taken the seats.
//!
//! The call of every booking leaves together with those of other bookings that come at the same time.

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
    ReleaseRequest, ReserveRequest, SEATS_PER_CALL_MAX, SeatsChanged, SeatsFreed, SeatsOfReservation, TimeCursor,
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// One try. Three of them with their pauses stay well under what a buyer's request may take.
const TRY_TIME_MAX: Duration = Duration::from_millis(1000);
/// A connection to a host that is there is made in a millisecond.
const CONNECT_TIME_MAX: Duration = Duration::from_millis(300);
/// Tries of one call.
const TRIES: usize = 3;
/// Idle connections kept for the next booking.
const IDLE_CONNECTIONS_MAX: usize = 64;

/// Holds that leave together. A service that has fallen silent is found out by ten of them, one every 20 ms; there is one on
/// its way otherwise.
const BATCHES: BatchConfig = BatchConfig {
    workers: 16,
    linger: Duration::ZERO,
    overlap_after: Duration::from_millis(20),
    batch_max: CALLS_MAX,
    queue_capacity: 1024,
    // Three tries with their pauses, and those of calls that are made by themselves after all.
    timeout: Duration::from_secs(8),
};

/// The way to the Event Service.
#[derive(Debug, Clone)]
pub struct EventClient {
    wire: Wire,
    holds: Arc<Batcher<Call<ReserveRequest>, ServiceAnswer<SeatsChanged>>>,
}

/// What makes the exchanges.
#[derive(Debug, Clone)]
struct Wire {
    http: Client,
    base: String,
    /// What the Event Service knows us by.
    key: Option<HeaderValue>,
    circuit: Arc<Circuit>,
}

/// What became of a change that needs all its seats.
#[derive(Debug)]
pub enum SeatChange {
    /// All seats are as asked for.
    Done(SeatsChanged),
    /// Nothing was changed, because of these.
    Refused(Vec<SeatConflict>),
}

/// The Event Service answered with a problem.
#[derive(Debug)]
enum ServiceAnswer<T> {
    Success(T),
    Refused(Box<Problem>),
}

/// [`CallAnswers`](shared_contracts::seat_api::CallAnswers) that are still to be read.
#[derive(Debug, Deserialize)]
struct Several {
    answers: Vec<Box<RawValue>>,
}

/// The request that a call is made for.
#[derive(Debug, Default)]
struct Origin {
    request_id: Option<String>,
    traceparent: Option<String>,
}

impl Origin {
    /// The present one.
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
    /// The HTTP client can't be made.
    pub fn new(base: &str, keys: &InternalKeys, trust: &Trust, lifecycle: &Lifecycle) -> anyhow::Result<Self> {
        let http = trust
            .http_client()
            // No redirect leads out of TLS.
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
        let hold = move |calls| own.clone().together(calls);
        Ok(Self { wire, holds: Arc::new(Batcher::start(lifecycle, BATCHES, hold)) })
    }

    /// Holds all seats for the reservation, or none; with their prices if they are asked for.
    ///
    /// # Errors
    /// There is no such session or it is not on sale, both when prices are asked for; it is cancelled; or the Event Service does not
    /// answer: the seats may be held.
    pub async fn reserve(&self, session: SessionId, request: ReserveRequest) -> Result<SeatChange, Error> {
        changed(self.in_company(session, request).await?)
    }

    /// Frees what the reservation holds of the seats.
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

    /// Frees those of the seats that their reservations hold, of any sessions. When one call fails, because somebody has locked a seat,
    /// the others are made all the same, unless the service answers nobody.
    ///
    /// # Errors
    /// The Event Service does not answer, or is one that does not know this call: some of them may be free.
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

    /// A page of the sessions that were cancelled, in the order in which they were.
    ///
    /// # Errors
    /// The Event Service does not answer.
    pub async fn cancelled_sessions(&self, cursor: Option<TimeCursor>, limit: u16) -> Result<CancelledSessions, Error> {
        self.page(&format!("sessions/cancelled?limit={limit}"), cursor).await
    }

    /// A page of the seats that someone holds or owns, in the order of their ids.
    ///
    /// # Errors
    /// The Event Service does not answer.
    pub async fn owned_seats(&self, after: Uuid, limit: u16) -> Result<Page<OwnedSeat>, Error> {
        self.page(&format!("seats/owned?cursor={after}&limit={limit}"), None).await
    }

    /// Those of `seats` that someone holds or owns.
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

    /// Whether calls are let through: after many failures in a row nobody is kept waiting for the next.
    ///
    /// # Errors
    /// They are not.
    pub fn circuit(&self) -> anyhow::Result<()> {
        anyhow::ensure!(self.wire.circuit.is_closed(), "the circuit to the Event Service is open");
        Ok(())
    }

    /// Looks, while the circuit is open, whether the Event Service is well again. Ends at `stopping`.
    ///
    /// # Errors
    /// None.
    pub async fn watch(&self, stopping: CancellationToken) -> anyhow::Result<()> {
        stopping.run_until_cancelled(self.wire.circuit.keep_probing(|| self.ping())).await;
        Ok(())
    }

    /// Whether the seat API can do its work.
    ///
    /// # Errors
    /// It can't, or does not answer.
    pub async fn ping(&self) -> anyhow::Result<()> {
        self.wire.request(Method::GET, &self.wire.url_of("health")).send().await?.error_for_status()?;
        Ok(())
    }

    async fn change(&self, path: &str, request: &impl Serialize) -> Result<SeatChange, Error> {
        changed(self.wire.call(Method::POST, path, Some(request)).await.map_err(unavailable)?)
    }

    /// Asks for a hold together with those who come at the same time. Its step in the trace has the wait for them in it.
    async fn in_company(
        &self,
        session_id: SessionId,
        body: ReserveRequest,
    ) -> Result<ServiceAnswer<SeatsChanged>, Error> {
        let url = self.wire.url_of(&alone(session_id));
        let answered = traces::call(&Method::POST, &url, async {
            let Origin { request_id, traceparent } = Origin::here();
            let answer = self.holds.call(Call { session_id, request_id, traceparent, body }).await;
            let answer = answer.map_err(|error| match error {
                // The call was given up, or the process stops.
                Error::Database(error) => unavailable(error.into()),
                other => other,
            })?;
            Ok::<_, Error>((answer.status(), answer))
        });
        Ok(answered.await?.1)
    }
}

/// Where a hold is asked for by itself.
fn alone(session: SessionId) -> String {
    format!("sessions/{session}/seats/reserve")
}

fn changed(answer: ServiceAnswer<SeatsChanged>) -> Result<SeatChange, Error> {
    match answer {
        ServiceAnswer::Success(changed) => Ok(SeatChange::Done(changed)),
        ServiceAnswer::Refused(problem) if matches!(problem.code, Code::SeatUnavailable | Code::SeatNotFound) => {
            Ok(SeatChange::Refused(problem.seats))
        }
        // These are the client's to hear of, in the words of who knows the session.
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

    /// Makes calls in one exchange. When there is only one, or the Event Service finds fault with all of them together, it is asked for each
    /// by itself.
    async fn together(self, calls: Vec<Call<ReserveRequest>>) -> Vec<Result<ServiceAnswer<SeatsChanged>, Error>> {
        let calls = Calls { calls };
        let count = calls.calls.len();
        let by_itself = async |call: &Call<ReserveRequest>| {
            let origin = Origin { request_id: call.request_id.clone(), traceparent: call.traceparent.clone() };
            let path = alone(call.session_id);
            let try_once = || self.try_once(Method::POST, &path, Some(&origin), Some(&call.body));
            self.circuit.call(TRIES, try_once).await.map_err(unavailable)
        };
        if count == 1 {
            return join_all(calls.calls.iter().map(by_itself)).await;
        }
        let nobody = Origin::default();
        // Each answer is read by itself: one that has a newer form must not cost the others theirs.
        let try_once = || self.try_once::<Several>(Method::POST, "seats/reserve", Some(&nobody), Some(&calls));
        let mut error = match self.circuit.call(TRIES, try_once).await {
            Ok(ServiceAnswer::Success(Several { answers })) if answers.len() == count => {
                let each = calls.calls.iter().zip(answers).map(async |(call, answer)| {
                    match serde_json::from_str(answer.get()) {
                        Ok(CallAnswer { done: Some(done), .. }) => Ok(ServiceAnswer::Success(done)),
                        // What failed for this one alone may go well now.
                        Ok(CallAnswer { refused: Some(problem), .. }) if problem.status >= 500 => by_itself(call).await,
                        Ok(CallAnswer { refused: Some(problem), .. }) => Ok(ServiceAnswer::Refused(Box::new(problem))),
                        _ => Err(unavailable(anyhow!("the answer has another form than agreed: {answer}"))),
                    }
                });
                return join_all(each).await;
            }
            Ok(ServiceAnswer::Success(_)) => {
                Error::Internal(anyhow!("the Event Service answered another number of calls"))
            }
            Ok(ServiceAnswer::Refused(_)) => return join_all(calls.calls.iter().map(by_itself)).await,
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

    /// One try, for the request that is named, or else for the present one.
    async fn try_once<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        origin: Option<&Origin>,
        body: Option<&impl Serialize>,
    ) -> Result<ServiceAnswer<T>, Failure> {
        let url = self.url_of(path);
        let mut request = self.request(method.clone(), &url);
        // Past it nobody listens to the answer.
        request = request.header(request_context::TIMEOUT_MS, TRY_TIME_MAX.as_millis().to_string());
        if let Some(body) = body {
            request = request.json(body);
        }
        let exchange = traces::call(&method, &url, async {
            // In here, as the present step of the trace is this try.
            let here = if origin.is_none() { Origin::here() } else { Origin::default() };
            let Origin { request_id, traceparent } = origin.unwrap_or(&here);
            if let Some(id) = request_id {
                request = request.header(request_context::REQUEST_ID, id);
            }
            if let Some(traceparent) = traceparent {
                request = request.header(request_context::TRACEPARENT, traceparent);
            }
            let response = request.send().await.context("no answer")?;
            anyhow::Ok((response.status(), response.bytes().await.context("the answer broke off")?))
        });
        let (status, bytes) = exchange.await?;
        if status.is_success() {
            return Ok(ServiceAnswer::Success(
                serde_json::from_slice(&bytes).context("the answer has another form than agreed")?,
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
        "Seats can't be looked at or held right now. What this call may have held is given back. Please try again.";
    Error::Unavailable { problem: Box::new(Problem::new(Code::EventServiceUnavailable, detail).retry_after(2)), cause }
}

/// The Event Service held seats and told no prices.
pub(crate) fn older() -> Error {
    unavailable(anyhow!("the Event Service is older than this one: it must be replaced first"))
}

fn unexpected(problem: &Problem) -> Error {
    Error::Internal(anyhow::anyhow!("the Event Service refused with {}: {}", problem.code, problem.detail))
}
