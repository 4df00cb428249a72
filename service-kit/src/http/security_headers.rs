//! The headers of every answer for browsers: they must not guess types, show the answer in frames, or store what is
//! personal. Also CORS: the origins whose pages may call.

use std::time::Duration;

use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use tower_http::cors::CorsLayer;

use crate::admit::limits::Limits;
use crate::admit::rate_limit;
use crate::auth;
use crate::http::request_context::{REQUEST_ID, TRACEPARENT};

/// The policy of data: it loads nothing, and no page may frame it.
const DATA_POLICY: &str = "default-src 'none'; frame-ancestors 'none'";
/// The policy of Swagger UI: its own files, the styles that it creates at run time, and its images from data URLs. An
/// image that a call returns, such as a ticket's QR code, has a blob URL. The page calls this service only.
const PAGES_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; \
     font-src 'self'; connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'";
/// Browsers use HTTPS only, for a year.
const HTTPS_ONLY: &str = "max-age=31536000";
/// How long a browser may reuse the answer to a preflight request.
const PREFLIGHT_KEPT: Duration = Duration::from_secs(600);

/// The facts that decide the headers of an answer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Audience {
    is_personal: bool,
    is_page: bool,
    is_https_only: bool,
}

impl Audience {
    pub(crate) fn of(request: &Request, limits: &Limits) -> Self {
        let headers = request.headers();
        Self {
            is_personal: headers.contains_key(auth::USER_ID) || headers.contains_key(header::AUTHORIZATION),
            is_page: request.uri().path().starts_with("/docs"),
            is_https_only: limits.is_https_only,
        }
    }

    /// Adds the headers. A header that the handler has set, such as `Cache-Control`, stays as it is.
    pub(crate) fn tell(self, headers: &mut HeaderMap) {
        let mut add = |name: HeaderName, value| {
            headers.entry(name).or_insert(HeaderValue::from_static(value));
        };
        add(header::X_CONTENT_TYPE_OPTIONS, "nosniff");
        add(header::REFERRER_POLICY, "no-referrer");
        add(header::CONTENT_SECURITY_POLICY, if self.is_page { PAGES_POLICY } else { DATA_POLICY });
        if self.is_personal {
            add(header::CACHE_CONTROL, "no-store");
        }
        if self.is_https_only {
            add(header::STRICT_TRANSPORT_SECURITY, HTTPS_ONLY);
        }
    }
}

/// Lets pages of the set origins call from a browser. `None` when no origin is set: browsers then let only pages of
/// this service call.
pub(crate) fn cors(limits: &Limits) -> Option<CorsLayer> {
    if limits.cors_allowed_origins.is_empty() {
        return None;
    }
    let name = HeaderName::from_static;
    let sent = [
        header::CONTENT_TYPE,
        header::AUTHORIZATION,
        header::IF_MATCH,
        header::IF_NONE_MATCH,
        name(auth::USER_ID),
        name("idempotency-key"),
        name("last-event-id"),
        REQUEST_ID,
        TRACEPARENT,
    ];
    let shown = [
        header::ETAG,
        header::LOCATION,
        header::RETRY_AFTER,
        name("idempotency-replayed"),
        REQUEST_ID,
        rate_limit::POLICY,
        rate_limit::LIMIT,
    ];
    Some(
        CorsLayer::new()
            .allow_origin(limits.cors_allowed_origins.clone())
            .allow_methods([Method::GET, Method::POST, Method::PATCH, Method::DELETE])
            .allow_headers(sent)
            .expose_headers(shown)
            .max_age(PREFLIGHT_KEPT),
    )
}
