//! What wraps every request: its id, its log line, its time limit, an answer in our form whatever happens inside, and its compression.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri};
use axum::middleware::{Next, from_fn_with_state, map_response};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Router};
use futures::FutureExt;
use shared_contracts::problem::{Code, Problem};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError};
use tower_http::CompressionLevel;
use tower_http::compression::CompressionLayer;
use tower_http::compression::predicate::{NotForContentType, Predicate, SizeAbove};
use tracing::Instrument;
use uuid::Uuid;

use crate::auth::Gate;
use crate::error::{Cause, Error};
use crate::etag;
use crate::lifecycle::Lifecycle;
use crate::metrics::METRICS_PATH;
use crate::settings::Common;
use crate::traces;

/// The request's id, in and out.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The W3C trace context; see `traces.rs`.
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// How long the caller waits for its answer, in milliseconds: a service passes its own deadline on with it.
pub const TIMEOUT_MS: HeaderName = HeaderName::from_static("x-timeout-ms");

/// What only other services call.
const INTERNAL_PATHS: &str = "/api/internal/";

/// Where others ask how the process is.
const HEALTH_PATHS: &str = "/health";

/// The largest body of an ordinary call; one that takes more says so at its route.
pub const BODY_BYTES_MAX: usize = 256 * 1024;
/// The longest that the work behind a request goes on without its client: a database host that vanished without a word must not
/// keep connections for ever. What is cut off there is rolled back or healed like a crash.
const WORK_TIME_MAX: Duration = Duration::from_secs(60);
/// Shorter answers fit into one packet as they are.
const COMPRESSED_BYTES_MIN: u64 = 1400;
/// The longest request id that is taken over from the client.
const REQUEST_ID_BYTES_MAX: usize = 128;

/// What the rest of a request's path may want to know of it without being handed it.
#[derive(Debug, Clone)]
struct RequestContext {
    request_id: String,
    traceparent: Option<String>,
}

tokio::task_local! {
    static CONTEXT: RequestContext;
}

/// The id of the request that is being handled.
#[must_use]
pub fn request_id() -> Option<String> {
    CONTEXT.try_with(|context| context.request_id.clone()).ok()
}

/// The trace context of the request that is being handled; [`traces::traceparent`] knows its present step.
pub(crate) fn traceparent() -> Option<String> {
    CONTEXT.try_with(|context| context.traceparent.clone()).ok().flatten()
}

/// What [`handle`] needs.
#[derive(Clone)]
struct Guard {
    lifecycle: Lifecycle,
    places: Arc<Semaphore>,
    /// The longest a client waits. What changes state goes on to its end all the same.
    time_max: Duration,
}

/// Wraps a service's finished router.
pub fn wrap(router: Router, lifecycle: &Lifecycle, limits: &Common) -> Router {
    let guard = Guard {
        lifecycle: lifecycle.clone(),
        places: Arc::new(Semaphore::new(limits.requests_in_flight_max)),
        time_max: limits.request_time_max,
    };
    router
        .fallback(no_such_path)
        .method_not_allowed_fallback(no_such_method)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(CompressionLayer::new().quality(CompressionLevel::Fastest).compress_when(worth_compressing()))
        .layer(map_response(etag::name_coding))
        .layer(from_fn_with_state(guard, handle))
        .layer(Extension(Gate::open(&limits.auth, lifecycle)))
}

/// Seat maps and lists, not the short answers on a booking's way, nor what is packed already.
fn worth_compressing() -> impl Predicate {
    SizeAbove::new(COMPRESSED_BYTES_MIN).and(NotForContentType::IMAGES).and(NotForContentType::SSE)
}

async fn no_such_path(uri: Uri) -> Error {
    Error::refused(Code::NotFound, format!("There is nothing at {}; the paths are listed at /docs.", uri.path()))
}

async fn no_such_method(method: Method, uri: Uri) -> Error {
    Error::refused(Code::MethodNotAllowed, format!("{method} is not a method of {}; see /docs.", uri.path()))
}

async fn handle(State(guard): State<Guard>, request: Request, next: Next) -> Response {
    let mut context = RequestContext::of(request.headers());
    let request_id = context.request_id.clone();
    let patience = patience_of(&request).filter(|patience| *patience < guard.time_max);
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().map_or("-", |path| path.as_str()).to_owned();
    let trace = traces::Incoming::of(context.traceparent.take(), &method, &route);
    context.traceparent.clone_from(&trace.traceparent);
    let trace_id = trace.traceparent.as_deref().and_then(traces::trace_id);
    // As high as the highest line in it, so that none is without its request.
    let span = tracing::error_span!("request", %method, route, request_id, trace_id);

    let Ok(place) = place_for(&guard.places, &request) else {
        let detail =
            "More requests are being worked on than the service can keep up with. Nothing was done; come again.";
        let error = Error::from(Problem::new(Code::Overloaded, detail).retry_after(1));
        // Not logged one by one: of these there may be thousands a second.
        trace.answered(StatusCode::SERVICE_UNAVAILABLE);
        return with_id(CONTEXT.sync_scope(context, || error.into_response()), &request_id);
    };
    let work = async move {
        let answer = caught(next.run(request)).await;
        drop(place);
        answer
    };
    let work = traces::within(trace.context(), CONTEXT.scope(context.clone(), work)).instrument(span.clone());
    let answer = async {
        if method.is_safe() {
            work.await
        } else {
            // A client that hangs up must not stop a change half-way: the work has a task of its own.
            let bounded = tokio::time::timeout(patience.unwrap_or(WORK_TIME_MAX), work);
            let done = guard.lifecycle.spawn_work(bounded).await.map_err(anyhow::Error::from);
            done.and_then(|answer| answer.map_err(anyhow::Error::from))
                .unwrap_or_else(|error| Error::Internal(error).into_response())
        }
    };
    let time_max = patience.unwrap_or(guard.time_max);
    let response = tokio::time::timeout(time_max, answer).await.unwrap_or_else(|_| {
        let detail = format!(
            "No answer within {} ms. The call may still take effect; look before you repeat it.",
            time_max.as_millis()
        );
        let error = Error::from(Problem::new(Code::DeadlineExceeded, detail).retry_after(5));
        CONTEXT.sync_scope(context, || error.into_response())
    });

    trace.answered(response.status());
    span.in_scope(|| log(&response));
    with_id(response, &request_id)
}

fn with_id(mut response: Response, request_id: &str) -> Response {
    if let Ok(value) = HeaderValue::from_str(request_id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

/// A place among the requests in flight; who looks after the process needs none, or a busy one would be taken for a dead one.
fn place_for(places: &Arc<Semaphore>, request: &Request) -> Result<Option<OwnedSemaphorePermit>, TryAcquireError> {
    let path = request.uri().path();
    if path.starts_with(HEALTH_PATHS) || path == METRICS_PATH {
        return Ok(None);
    }
    Arc::clone(places).try_acquire_owned().map(Some)
}

/// How long another service said that it waits. What is cut off by it is rolled back, or as harmless as a lost answer. Clients can't
/// cut work off so.
fn patience_of(request: &Request) -> Option<Duration> {
    let millis = request.headers().get(TIMEOUT_MS).filter(|_| request.uri().path().starts_with(INTERNAL_PATHS))?;
    Some(Duration::from_millis(millis.to_str().ok()?.parse().ok()?))
}

async fn caught(answer: impl Future<Output = Response>) -> Response {
    AssertUnwindSafe(answer).catch_unwind().await.unwrap_or_else(|panic| {
        let said = panic
            .downcast_ref::<&str>()
            .map(|text| (*text).to_owned())
            .or_else(|| panic.downcast_ref::<String>().cloned());
        Error::Internal(anyhow::anyhow!("panic: {}", said.unwrap_or_default())).into_response()
    })
}

/// The one log line of a request; causes are written here and nowhere else.
fn log(response: &Response) {
    let status = response.status().as_u16();
    let cause = response.extensions().get::<Cause>().map(|cause| format!("{:#}", cause.0));
    match status {
        503 => tracing::warn!(status, cause, "Request turned away"),
        500.. => tracing::error!(status, cause, "Request failed"),
        _ => tracing::debug!(status, "Request done"),
    }
}

impl RequestContext {
    fn of(headers: &HeaderMap) -> Self {
        let text = |name: &HeaderName| {
            let value = headers.get(name)?.to_str().ok()?;
            (!value.is_empty() && value.len() <= REQUEST_ID_BYTES_MAX).then(|| value.to_owned())
        };
        Self {
            request_id: text(&REQUEST_ID).unwrap_or_else(|| Uuid::now_v7().to_string()),
            traceparent: text(&TRACEPARENT),
        }
    }
}
