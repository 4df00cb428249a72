//! The layers around every request: its id, its log line, its time limit and its compression. Whatever happens inside,
//! the client gets an answer in our form.

use std::any::Any;
use std::net::IpAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{DefaultBodyLimit, MatchedPath, Request, State};
use axum::http::{HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::{Next, from_fn_with_state, map_request, map_response};
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

/// A body of at most this size is read before its request gets a permit. The few larger ones are read while their
/// requests hold one.
const ORDINARY_BODY_BYTES_MAX: usize = 32 * 1024;
/// Larger bodies that may be received at a time. Clients that send slowly can keep at most this many permits.
const LARGE_BODIES_MAX: usize = 64;
/// The longest head of a request that is accepted: path, query and header fields.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// The longest that the work of a request continues without its client. A database host that vanished silently must not
/// keep connections for ever. Work that is cut off is rolled back, or repaired as after a crash.
const WORK_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a caller over its rate limit waits for its `429`. The wait costs nothing. Without it, a crowd that calls
/// again at once would keep the processor busy with refusals.
const REFUSAL_TIME: Duration = Duration::from_millis(200);
/// Shorter answers fit into one packet uncompressed.
const COMPRESSED_BYTES_MIN: u64 = 1400;

/// The state of [`handle`], cloned for every request.
#[derive(Clone)]
struct Guard {
    lifecycle: Lifecycle,
    classify: Classify,
    bulkheads: Arc<Bulkheads>,
    limiter: Option<Arc<Limiter>>,
    limits: Arc<Limits>,
    large_bodies: Arc<Semaphore>,
    /// The longest that a client waits for its answer. A request that changes state continues after that, for up to
    /// [`WORK_TIMEOUT`].
    time_max: Duration,
}

/// Adds the layers to a service's finished router: CORS if it is set, the authenticator, admission, compression, the
/// body limit and the fallbacks.
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
        .layer(map_request(accept_some_coding))
        .layer(from_fn_with_state(guard, handle))
        .layer(Extension(Authenticator::open(&settings.auth, lifecycle)));
    match security_headers::cors(&settings.limits) {
        Some(cors) => wrapped.layer(cors),
        None => wrapped,
    }
}

/// Compresses seat maps and lists. Leaves out the short answers of a booking, images (which are compressed already) and
/// event streams.
fn worth_compressing() -> impl Predicate {
    SizeAbove::new(COMPRESSED_BYTES_MIN).and(NotForContentType::IMAGES).and(NotForContentType::SSE)
}

/// The codings that the compression layer can give.
const CODINGS: [&str; 4] = ["br", "gzip", "x-gzip", "zstd"];

/// Drops an `Accept-Encoding` that excludes every answer we could give, also the plain one. The compression layer would
/// answer it with `406` after the handler has run, and a change would have taken effect behind an error. RFC 9110 lets a
/// server disregard such a header.
async fn accept_some_coding(mut request: Request) -> Request {
    let given = request.headers().get_all(header::ACCEPT_ENCODING).iter().filter_map(|value| value.to_str().ok());
    let given: Vec<(String, bool)> = given.flat_map(|value| value.split(',')).filter_map(coding).collect();
    let is_accepted = |name: &str| given.iter().find(|(given, _)| given == name).map(|(_, accepted)| *accepted);
    let others = is_accepted("*");
    let is_plain_excluded = is_accepted("identity").or(others) == Some(false);
    if is_plain_excluded && !CODINGS.into_iter().any(|name| is_accepted(name).or(others) == Some(true)) {
        request.headers_mut().remove(header::ACCEPT_ENCODING);
    }
    request
}

/// A coding of `Accept-Encoding`, and whether its weight is above 0.
fn coding(entry: &str) -> Option<(String, bool)> {
    let (name, weight) = entry.split_once(';').unwrap_or((entry, "q=1"));
    let weight: f32 = weight.trim().to_ascii_lowercase().strip_prefix("q=")?.parse().ok()?;
    Some((name.trim().to_ascii_lowercase(), weight > 0.0))
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
    // An error span, so that at every log level each line inside it names its request.
    let span = tracing::error_span!("request", %method, route, request_id, trace_id);

    let audience = Audience::of(&request, &guard.limits);
    let (request, places) = match guard.admit(request).await {
        Ok(admitted) => admitted,
        // Not logged one by one: there may be thousands of these a second.
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
            "No answer within {} ms. The call may still take effect; check before you repeat it.",
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

/// Performs one of several calls that arrived in one body, as if it were a request of its own. Request id and trace are
/// those that it names.
///
/// # Errors
/// The problem to answer the call with. Its cause is in the log.
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

/// What a request holds while it is processed: its permit, and a second one if its body is large.
type Permits = (Permit, Option<OwnedSemaphorePermit>);

/// Why a request was not started.
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
    /// Admits a request if it is within its rate limit and a permit is free. Reads its body first: a client that sends
    /// slowly must not hold a permit meanwhile.
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
                let detail = "The service is processing as many requests as it can. Nothing was done; try again.";
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

/// Reads a body of ordinary size, and returns whether it is complete. The rest of a larger body stays unread.
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

/// Finishes the compression of an answer that would otherwise be compressed while it is sent. That takes CPU time, so
/// it belongs to the time in which the request holds its permit.
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
        // Lets other tasks run between two chunks.
        tokio::task::yield_now().await;
    }
    parts.headers.remove(header::TRANSFER_ENCODING);
    Response::from_parts(parts, Body::from(bytes))
}

/// How long another service waits, as its `X-Timeout-Ms` says. Work that this deadline cuts off is rolled back, or is
/// as harmless as a lost answer. The header counts on internal paths only, so clients can't cut off work.
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

/// Writes the one log line of a request. Causes are logged here and nowhere else.
fn log(status: u16, cause: Option<&anyhow::Error>) {
    let cause = cause.map(|cause| format!("{cause:#}"));
    match status {
        503 => tracing::warn!(target: LOG_TARGET, status, cause, "Request turned away"),
        500.. => tracing::error!(target: LOG_TARGET, status, cause, "Request failed"),
        _ => tracing::debug!(target: LOG_TARGET, status, "Request done"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_an_accept_encoding_that_excludes_everything_is_dropped() {
        for (given, is_kept) in [
            ("gzip", true),
            ("deflate", true),
            ("identity;q=0, br", true),
            ("*;q=0, gzip;q=0.1", true),
            ("deflate;q=0", true),
            ("deflate, *;q=0", false),
            ("identity;q=0", false),
            ("*;Q=0.000", false),
            ("gzip;q=0, br;q=0, zstd;q=0, identity;q=0", false),
        ] {
            let request = Request::builder().header(header::ACCEPT_ENCODING, given).body(Body::empty()).unwrap();
            let request = accept_some_coding(request).await;
            assert_eq!(request.headers().contains_key(header::ACCEPT_ENCODING), is_kept, "{given}");
        }
    }
}
