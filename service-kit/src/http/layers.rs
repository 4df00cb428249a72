//! What wraps every request: its id, its log line, its time limit, an answer in our form whatever happens inside, and
//! its compression.

use std::any::Any;
use std::net::IpAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{DefaultBodyLimit, MatchedPath, Request, State};
use axum::http::{HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::{Next, from_fn_with_state, map_response};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Router};
use futures::{FutureExt, StreamExt, future, stream};
use http_body_util::BodyExt;
use shared_contracts::problem::{Code, Problem};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower_http::CompressionLevel;
use tower_http::compression::CompressionLayer;
use tower_http::compression::predicate::{NotForContentType, Predicate, SizeAbove};
use tracing::Instrument;
use uuid::Uuid;

use crate::admit::bulkheads::{self, Bulkheads, Classify, Permit};
use crate::admit::limits::{BODY_BYTES_MAX, Limits};
use crate::admit::rate_limit::{Limiter, RateLimited};
use crate::auth::{self, Authenticator};
use crate::http::client_address::Peer;
use crate::http::error::{Cause, Error};
use crate::http::etag;
use crate::http::request_context::{CONTEXT, REQUEST_ID, RequestContext, TIMEOUT_MS};
use crate::http::security_headers::{self, Audience};
use crate::observe::traces;
use crate::process::common::Common;
use crate::process::lifecycle::Lifecycle;

/// A body up to here is read before its request has a place; larger ones are few, and have one meanwhile.
const ORDINARY_BODY_BYTES_MAX: usize = 32 * 1024;
/// Larger bodies on their way at a time: so many places are the most that clients can keep by sending slowly.
const LARGE_BODIES_MAX: usize = 64;
/// The longest head of a request, its path included.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// The longest that the work behind a request goes on without its client: a database host that vanished without a word
/// must not keep connections for ever. What is cut off there is rolled back or healed like a crash.
const WORK_TIMEOUT: Duration = Duration::from_secs(60);
/// How long one who calls too often waits to hear so. It costs nothing but the wait, and without it a crowd that asks
/// again at once would keep the processor busy with refusals.
const REFUSAL_TIME: Duration = Duration::from_millis(200);
/// Shorter answers fit into one packet as they are.
const COMPRESSED_BYTES_MIN: u64 = 1400;

/// What [`handle`] needs.
#[derive(Clone)]
struct Guard {
    lifecycle: Lifecycle,
    classify: Classify,
    bulkheads: Arc<Bulkheads>,
    limiter: Option<Arc<Limiter>>,
    limits: Arc<Limits>,
    large_bodies: Arc<Semaphore>,
    /// The longest a client waits. What changes state goes on to its end all the same.
    time_max: Duration,
}

/// Wraps a service's finished router.
pub fn wrap(
    router: Router,
    lifecycle: &Lifecycle,
    settings: &Common,
    classify: Classify,
    limiter: Option<Arc<Limiter>>,
) -> Router {
    let guard = Guard {
        lifecycle: lifecycle.clone(),
        classify,
        bulkheads: Arc::new(Bulkheads::new(settings.requests_in_flight_max)),
        limiter,
        limits: Arc::new(settings.limits.clone()),
        large_bodies: Arc::new(Semaphore::new(LARGE_BODIES_MAX)),
        time_max: settings.request_time_max,
    };
    let wrapped = router
        .fallback(no_such_path)
        .method_not_allowed_fallback(no_such_method)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(CompressionLayer::new().quality(CompressionLevel::Fastest).compress_when(worth_compressing()))
        .layer(map_response(etag::name_coding))
        .layer(from_fn_with_state(guard, handle))
        .layer(Extension(Authenticator::open(&settings.auth, lifecycle)));
    match security_headers::cors(&settings.limits) {
        Some(cors) => wrapped.layer(cors),
        None => wrapped,
    }
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
    let trace = traces::RequestSpan::of(context.traceparent.take(), &method, &route);
    context.traceparent.clone_from(&trace.traceparent);
    let trace_id = trace.traceparent.as_deref().and_then(traces::trace_id);
    // As high as the highest line in it, so that none is without its request.
    let span = tracing::error_span!("request", %method, route, request_id, trace_id);

    let audience = Audience::of(&request, &guard.limits);
    let (request, places) = match guard.admit(request).await {
        Ok(admitted) => admitted,
        // Not logged one by one: of these there may be thousands a second.
        Err(refusal) => {
            if matches!(refusal, Rejected::TooOften(_)) {
                tokio::time::sleep(REFUSAL_TIME).await;
            }
            let response = CONTEXT.sync_scope(context, || refusal.into_response());
            trace.answered(response.status());
            return finish(response, &request_id, audience);
        }
    };
    let work = async move {
        let answer = caught(async { written(next.run(request).await).await }).await;
        drop(places);
        answer
    };
    let work = traces::within(trace.context(), CONTEXT.scope(context.clone(), work)).instrument(span.clone());
    let answer = async {
        if method.is_safe() {
            work.await
        } else {
            // A client that hangs up must not stop a change half-way: the work has a task of its own.
            let bounded = tokio::time::timeout(patience.unwrap_or(WORK_TIMEOUT), work);
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
    let cause = response.extensions().get::<Cause>().map(|cause| &*cause.0);
    span.in_scope(|| log(response.status().as_u16(), cause));
    finish(response, &request_id, audience)
}

/// Does one of many calls that came in one body as if it had come by itself: for the request and in the trace that it
/// names.
///
/// # Errors
/// The problem to answer it with; what caused it is in the log.
pub async fn on_behalf_of<T>(
    request_id: Option<String>,
    traceparent: Option<String>,
    route: &'static str,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Problem> {
    let trace = traces::RequestSpan::of(traceparent, &Method::POST, route);
    let request_id = request_id.unwrap_or_else(|| Uuid::now_v7().to_string());
    let trace_id = trace.traceparent.as_deref().and_then(traces::trace_id);
    let span = tracing::error_span!("request", method = %Method::POST, route, request_id, trace_id);
    let context = RequestContext { request_id, traceparent: trace.traceparent.clone() };
    let work = traces::within(trace.context(), CONTEXT.scope(context, work)).instrument(span.clone());
    let done = AssertUnwindSafe(work).catch_unwind().await;
    let (status, answer, cause) = match done.unwrap_or_else(|panic| Err(panicked(&*panic))) {
        Ok(answer) => (200, Ok(answer), None),
        Err(error) => {
            let (problem, cause) = error.into_problem();
            (problem.status, Err(problem), cause)
        }
    };
    trace.answered(StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR));
    span.in_scope(|| log(status, cause.as_ref()));
    answer
}

fn finish(mut response: Response, request_id: &str, audience: Audience) -> Response {
    audience.tell(response.headers_mut());
    if let Ok(value) = HeaderValue::from_str(request_id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

/// What a request has while it is worked on.
type Permits = (Permit, Option<OwnedSemaphorePermit>);

/// A request that was not begun.
enum Rejected {
    TooOften(Box<RateLimited>),
    Away(Error),
}

impl Rejected {
    fn into_response(self) -> Response {
        match self {
            Self::TooOften(refused) => refused.into_response(),
            Self::Away(error) => error.into_response(),
        }
    }
}

impl Guard {
    /// Lets a request in, if it is not one too many and there is a place. Its body comes first: a client that sends
    /// slowly must not have a place meanwhile.
    async fn admit(&self, mut request: Request) -> Result<(Request, Permits), Rejected> {
        let path = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
        let class = bulkheads::request_class(self.classify, request.method(), path);
        if head_bytes(&request) > HEAD_BYTES_MAX {
            let detail = format!("Path and header fields take more than {HEAD_BYTES_MAX} bytes together; send less.");
            return Err(Rejected::Away(Error::refused(Code::HeadersTooLarge, detail)));
        }
        if let Some(limiter) = self.limiter.as_ref().filter(|limiter| limiter.limits(class)) {
            let peer = request.extensions().get().map_or(IpAddr::from([0, 0, 0, 0]), |Peer(peer)| *peer);
            let address = self.limits.proxies.client(peer, request.headers());
            let user = auth::user_of(&mut request).await;
            limiter.check(class, user, address).map_err(Rejected::TooOften)?;
        }
        let (request, is_whole) =
            read_ordinary_body(request, self.limits.body_time_max).await.map_err(Rejected::Away)?;
        let large = if is_whole { None } else { Some(Arc::clone(&self.large_bodies).try_acquire_owned()) };
        match (self.bulkheads.enter(class).await, large.transpose()) {
            (Ok(place), Ok(large)) => Ok((request, (place, large))),
            _ => {
                let detail = "More requests are being worked on than the service can keep up with. Nothing was done; come again.";
                Err(Rejected::Away(Problem::new(Code::Overloaded, detail).retry_after(1).into()))
            }
        }
    }
}

fn head_bytes(request: &Request) -> usize {
    let uri = request.uri();
    let path = uri.path().len() + uri.query().unwrap_or_default().len();
    request.headers().iter().fold(path, |sum, (name, value)| sum + name.as_str().len() + value.len())
}

/// The request with its body in hand, and whether that is all of it: what is larger than most is left where it is.
async fn read_ordinary_body(request: Request, time_max: Duration) -> Result<(Request, bool), Error> {
    let size = request.body().size_hint();
    if request.body().is_end_stream() {
        return Ok((request, true));
    }
    if size.lower() > ORDINARY_BODY_BYTES_MAX as u64 {
        return Ok((request, false));
    }
    let (parts, mut body) = request.into_parts();
    let mut bytes = Vec::new();
    let read = async {
        while bytes.len() <= ORDINARY_BODY_BYTES_MAX {
            match body.frame().await.transpose() {
                Ok(Some(frame)) => bytes.extend_from_slice(frame.data_ref().map_or(&[], |data| data)),
                Ok(None) => return Ok(true),
                Err(_) => return Err(Error::refused(Code::BadRequest, "The body broke off before its end.")),
            }
        }
        Ok(false)
    };
    let is_whole = tokio::time::timeout(time_max, read).await.map_err(|_| {
        let detail = format!("The body did not arrive within {} ms. Nothing was done.", time_max.as_millis());
        Error::refused(Code::RequestTimeout, detail)
    })??;
    let body = if is_whole {
        Body::from(bytes)
    } else {
        let begun = stream::once(future::ready(Ok::<_, axum::Error>(Bytes::from(bytes))));
        Body::from_stream(begun.chain(body.into_data_stream()))
    };
    Ok((Request::from_parts(parts, body), is_whole))
}

/// An answer that is compressed as it is sent, compressed: that is work, and belongs to the time in which the request
/// has its place.
async fn written(response: Response) -> Response {
    if !response.headers().contains_key(header::CONTENT_ENCODING) || response.body().size_hint().exact().is_some() {
        return response;
    }
    let (mut parts, mut body) = response.into_parts();
    let mut bytes = Vec::new();
    while let Some(frame) = body.frame().await {
        match frame {
            Ok(frame) => bytes.extend_from_slice(frame.data_ref().map_or(&[], |data| data)),
            Err(error) => return Error::Internal(anyhow::Error::from(error)).into_response(),
        }
        // Others want to go on meanwhile.
        tokio::task::yield_now().await;
    }
    parts.headers.remove(header::TRANSFER_ENCODING);
    Response::from_parts(parts, Body::from(bytes))
}

/// How long another service said that it waits. What is cut off by it is rolled back, or as harmless as a lost answer.
/// Clients can't cut work off so.
fn patience_of(request: &Request) -> Option<Duration> {
    let millis =
        request.headers().get(TIMEOUT_MS).filter(|_| request.uri().path().starts_with(bulkheads::INTERNAL_PATHS))?;
    Some(Duration::from_millis(millis.to_str().ok()?.parse().ok()?))
}

async fn caught(answer: impl Future<Output = Response>) -> Response {
    AssertUnwindSafe(answer).catch_unwind().await.unwrap_or_else(|panic| panicked(&*panic).into_response())
}

fn panicked(panic: &(dyn Any + Send)) -> Error {
    let said =
        panic.downcast_ref::<&str>().map(|text| (*text).to_owned()).or_else(|| panic.downcast_ref::<String>().cloned());
    Error::Internal(anyhow::anyhow!("panic: {}", said.unwrap_or_default()))
}

/// Operators filter the lines of requests by this name (`LOG_LEVEL=info,service_kit::layers=debug`).
const LOG_TARGET: &str = "service_kit::layers";

/// The one log line of a request; causes are written here and nowhere else.
fn log(status: u16, cause: Option<&anyhow::Error>) {
    let cause = cause.map(|cause| format!("{cause:#}"));
    match status {
        503 => tracing::warn!(target: LOG_TARGET, status, cause, "Request turned away"),
        500.. => tracing::error!(target: LOG_TARGET, status, cause, "Request failed"),
        _ => tracing::debug!(target: LOG_TARGET, status, "Request done"),
    }
}
