//! The current request's id and trace context, which code at any depth can read without an argument.

use axum::http::{HeaderMap, HeaderName};
use uuid::Uuid;

/// The header with the request's id, in requests and answers.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The header with the W3C trace context; see `observe/traces.rs`.
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// The header with the time that the caller waits for its answer, in milliseconds. A service passes its own deadline on
/// with it.
pub const TIMEOUT_MS: HeaderName = HeaderName::from_static("x-timeout-ms");

/// The longest request id or trace context that is accepted from the client. A longer one is ignored.
const REQUEST_ID_BYTES_MAX: usize = 128;

/// The id and the trace context of a request.
#[derive(Debug, Clone)]
pub(crate) struct RequestContext {
    pub(crate) request_id: String,
    pub(crate) traceparent: Option<String>,
}

tokio::task_local! {
    pub(crate) static CONTEXT: RequestContext;
}

/// The id of the current request; `None` outside a request.
#[must_use]
pub fn request_id() -> Option<String> {
    CONTEXT.try_with(|context| context.request_id.clone()).ok()
}

/// The trace context of the current request; `traces::traceparent` adds the current step.
pub(crate) fn traceparent() -> Option<String> {
    CONTEXT.try_with(|context| context.traceparent.clone()).ok().flatten()
}

impl RequestContext {
    /// The context of a request with these headers. The request gets a new id unless it brings a usable one.
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
