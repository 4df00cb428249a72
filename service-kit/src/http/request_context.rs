//! What code at any depth may want to know of the present request without being handed it: its id and its trace
//! context.

use axum::http::{HeaderMap, HeaderName};
use uuid::Uuid;

/// The request's id, in and out.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The W3C trace context; see `observe/traces.rs`.
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// How long the caller waits for its answer, in milliseconds: a service passes its own deadline on with it.
pub const TIMEOUT_MS: HeaderName = HeaderName::from_static("x-timeout-ms");

/// The longest request id that is taken over from the client.
const REQUEST_ID_BYTES_MAX: usize = 128;

/// What the rest of a request's path may want to know of it without being handed it.
#[derive(Debug, Clone)]
pub(crate) struct RequestContext {
    pub(crate) request_id: String,
    pub(crate) traceparent: Option<String>,
}

tokio::task_local! {
    pub(crate) static CONTEXT: RequestContext;
}

/// The id of the request that is being handled.
#[must_use]
pub fn request_id() -> Option<String> {
    CONTEXT.try_with(|context| context.request_id.clone()).ok()
}

/// The trace context of the request that is being handled; `traces::traceparent` adds the present step.
pub(crate) fn traceparent() -> Option<String> {
    CONTEXT.try_with(|context| context.traceparent.clone()).ok().flatten()
}

impl RequestContext {
    /// The context of a request with these headers; it gets an id of its own unless it brings a usable one.
    pub(crate) fn of(headers: &HeaderMap) -> Self {
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
