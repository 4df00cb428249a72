//! What browsers are told about every answer: not to guess types, not to show it in frames, not to keep what is
//! personal; and whose pages may ask at all.

use std::time::Duration;

use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use tower_http::cors::CorsLayer;

use crate::admit::limits::Limits;
use crate::admit::rate_limit;
use crate::auth;
use crate::http::request_context::{REQUEST_ID, TRACEPARENT};

/// Answers are data, no pages.
const DATA_POLICY: &str = "default-src 'none'; frame-ancestors 'none'";
/// The Swagger UI: its own files, the styles it makes as it goes, and its images from data URLs; it calls this service
/// alone.
const PAGES_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; \
     font-src 'self'; connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'";
/// Browsers use HTTPS alone for a year.
const HTTPS_ONLY: &str = "max-age=31536000";
/// How long a browser need not ask again whether it may call.
const PREFLIGHT_KEPT: Duration = Duration::from_secs(600);

/// What an answer's headers depend on.
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

    /// Adds them; what a handler has said about caching stands.
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

/// Lets the pages of these origins call from a browser; `None` when there are none, and browsers let nobody else's.
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
