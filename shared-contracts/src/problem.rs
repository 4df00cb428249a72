//! The errors that clients receive: RFC 9457 problem documents with a stable `code`.
//!
//! One list of [`Code`]s gives the documentation, the OpenAPI enum and the status codes.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::openapi::schema::{ObjectBuilder, Type};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use crate::seat::SeatConflict;

/// The content type of every error answer.
pub const CONTENT_TYPE: &str = "application/problem+json";

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $status:literal $text:literal $title:literal;)*) => {
        /// The kind of error, for programs. Each code has one status and one title, wherever it is reported.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum Code {
            $($(#[$doc])* #[serde(rename = $text)] $name,)*
        }

        impl Code {
            /// All codes in the order of their status.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// The HTTP status of this code.
            #[must_use]
            pub const fn status(self) -> u16 {
                match self { $(Self::$name => $status),* }
            }

            /// The code as it is written in the document, in snake case.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text),* }
            }

            /// The title of this code: a short sentence for people.
            #[must_use]
            pub const fn title(self) -> &'static str {
                match self { $(Self::$name => $title),* }
            }
        }
    };
}

codes! {
    /// The body is not valid JSON.
    MalformedJson = 400 "malformed_json" "The body is not valid JSON";
    /// The request is not valid HTTP, or its body broke off.
    BadRequest = 400 "bad_request" "The request can't be read";
    /// The request has no valid credentials.
    Unauthenticated = 401 "unauthenticated" "The caller is not authenticated";
    /// The payment provider declined the charge. The seats stay held until the reservation expires.
    PaymentDeclined = 402 "payment_declined" "The payment was declined";
    /// The caller is authenticated but not allowed to do this.
    Forbidden = 403 "forbidden" "The caller is not allowed to do this";
    /// No resource exists at this path.
    NotFound = 404 "not_found" "There is nothing at this path";
    /// No organizer has this id.
    OrganizerNotFound = 404 "organizer_not_found" "The organizer does not exist";
    /// No event has this id.
    EventNotFound = 404 "event_not_found" "The event does not exist";
    /// No location has this id.
    LocationNotFound = 404 "location_not_found" "The location does not exist";
    /// No hall has this id.
    HallNotFound = 404 "hall_not_found" "The hall does not exist";
    /// No session has this id.
    SessionNotFound = 404 "session_not_found" "The session does not exist";
    /// A requested seat is not in this session; `seats` names it.
    SeatNotFound = 404 "seat_not_found" "A seat does not exist in this session";
    /// No price tier has this id, or it does not apply to this session.
    PriceTierNotFound = 404 "price_tier_not_found" "The price tier does not exist";
    /// The caller has no reservation with this id.
    ReservationNotFound = 404 "reservation_not_found" "The reservation does not exist";
    /// The caller has no ticket with this id.
    TicketNotFound = 404 "ticket_not_found" "The ticket does not exist";
    /// No payment has this id.
    PaymentNotFound = 404 "payment_not_found" "The payment does not exist";
    /// The path exists, but not with this method.
    MethodNotAllowed = 405 "method_not_allowed" "The method is not allowed here";
    /// The body did not arrive in time.
    RequestTimeout = 408 "request_timeout" "The request did not arrive in time";
    /// A requested seat is held, sold or blocked; `seats` names it.
    SeatUnavailable = 409 "seat_unavailable" "A seat is not available";
    /// The session's sales have not begun.
    SalesNotStarted = 409 "sales_not_started" "Sales have not begun";
    /// The session's sales have ended, or the session has begun.
    SalesEnded = 409 "sales_ended" "Sales have ended";
    /// The organizer cancelled the session.
    SessionCancelled = 409 "session_cancelled" "The session is cancelled";
    /// The session has ended: it can't be cancelled, and nothing of it can be paid any more.
    SessionOver = 409 "session_over" "The session is over";
    /// The hall has another session at that time.
    SessionOverlap = 409 "session_overlap" "The hall has another session at that time";
    /// The hall already has a seat with these labels.
    SeatExists = 409 "seat_exists" "The hall already has a seat with these labels";
    /// The hall would have more seats than its capacity.
    HallFull = 409 "hall_full" "The seats exceed the hall's capacity";
    /// The hall has no seats yet, so a session in it would have nothing to sell.
    HallHasNoSeats = 409 "hall_has_no_seats" "The hall has no seats";
    /// Other resources depend on this one; `detail` says which.
    ResourceInUse = 409 "resource_in_use" "The resource is in use";
    /// The reservation was cancelled.
    ReservationCancelled = 409 "reservation_cancelled" "The reservation was cancelled";
    /// The reservation is already paid.
    ReservationConfirmed = 409 "reservation_confirmed" "The reservation is already confirmed";
    /// All tickets of the reservation were refunded.
    ReservationRefunded = 409 "reservation_refunded" "The reservation was refunded";
    /// A payment for this reservation is in progress.
    ConfirmationInProgress = 409 "confirmation_in_progress" "A payment is in progress";
    /// An earlier request with the same Idempotency-Key is still in progress.
    IdempotencyKeyInFlight = 409 "idempotency_key_in_flight" "A request with this Idempotency-Key is in progress";
    /// The caller has reached the limit on open reservations.
    TooManyReservations = 409 "too_many_reservations" "Too many open reservations";
    /// The request would exceed the limit on seats for one customer in this session.
    TooManySeats = 409 "too_many_seats" "Too many seats in this session";
    /// The session has begun, so its buyers can't give tickets back any more.
    RefundClosed = 409 "refund_closed" "Tickets of this session can't be given back any more";
    /// The ticket was already used.
    TicketUsed = 409 "ticket_used" "The ticket was already used";
    /// The reservation was not paid in time and has ended.
    ReservationExpired = 410 "reservation_expired" "The reservation has expired";
    /// The ticket was refunded, so it has no code any more.
    TicketRefunded = 410 "ticket_refunded" "The ticket was refunded";
    /// `If-Match` names a version that is not the current one.
    PreconditionFailed = 412 "precondition_failed" "The resource has changed";
    /// The body is larger than this operation accepts.
    BodyTooLarge = 413 "body_too_large" "The body is too large";
    /// The `Content-Type` does not declare JSON.
    UnsupportedMediaType = 415 "unsupported_media_type" "The content type is not supported";
    /// The request is invalid; `errors` lists everything that is wrong with it.
    ValidationFailed = 422 "validation_failed" "The request is invalid";
    /// The Idempotency-Key was used for a different request.
    IdempotencyKeyReused = 422 "idempotency_key_reused" "The Idempotency-Key was used for a different request";
    /// The caller sent more requests than its rate limit allows; `Retry-After` says when to try again.
    RateLimited = 429 "rate_limited" "Too many requests";
    /// The header fields are larger than the service accepts.
    HeadersTooLarge = 431 "headers_too_large" "The header fields are too large";
    /// An unexpected error in the service.
    InternalError = 500 "internal_error" "The service failed unexpectedly";
    /// The service has not yet loaded the keys that verify access tokens.
    AuthenticationUnavailable = 503 "authentication_unavailable" "Access tokens can't be verified";
    /// The service can't use its database.
    DatabaseUnavailable = 503 "database_unavailable" "The database is unavailable";
    /// The Booking Service can't reach the Event Service.
    EventServiceUnavailable = 503 "event_service_unavailable" "The Event Service can't be reached";
    /// The service can't reach the message broker.
    BrokerUnavailable = 503 "broker_unavailable" "The message broker can't be reached";
    /// The payment provider did not answer. The service keeps asking it for the outcome of the charge.
    PaymentUnavailable = 503 "payment_unavailable" "The payment provider did not answer";
    /// The service has reached its limit on open seat map streams.
    TooManyWatchers = 503 "too_many_watchers" "Too many seat map streams are open";
    /// The service is processing too many requests and did not start this one.
    Overloaded = 503 "overloaded" "The service is overloaded";
    /// The request took longer than its time limit. It may have taken effect.
    DeadlineExceeded = 503 "deadline_exceeded" "The request took too long";
}

// Written by hand: the derived schema would show the Rust names, because it can't see the macro's `rename`.
impl PartialSchema for Code {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .schema_type(Type::String)
            .description(Some("The kind of error, for programs"))
            .enum_values(Some(Self::ALL.iter().map(|code| code.as_str())))
            .into()
    }
}

impl ToSchema for Code {}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One thing that is wrong with a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FieldError {
    /// The place in the body, as a JSON pointer (RFC 6901); absent if the error is not in the body.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "/seats/0/price_tier_id")]
    pub pointer: Option<String>,
    /// The name of the path parameter, query parameter or header; absent if the error is in the body.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameter: Option<String>,
    /// What is wrong, in words.
    pub detail: String,
}

impl FieldError {
    /// An error in the body, at this JSON pointer.
    pub fn at(pointer: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { pointer: Some(pointer.into()), parameter: None, detail: detail.into() }
    }

    /// An error in a path parameter, query parameter or header.
    pub fn parameter(name: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { pointer: None, parameter: Some(name.into()), detail: detail.into() }
    }
}

/// A problem document (RFC 9457), extended by `code`, `errors`, `seats` and `retry_after_seconds`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// The kind of problem as a URI: `urn:ticketing:problem:` and the code.
    #[schema(example = "urn:ticketing:problem:seat_unavailable")]
    pub r#type: String,
    /// The kind of problem in words; the same for every problem with this `code`.
    pub title: String,
    /// The HTTP status of the answer.
    #[schema(minimum = 400, maximum = 599)]
    pub status: u16,
    /// What happened this time, and what the client can do about it.
    pub detail: String,
    /// This occurrence: `urn:uuid:` and the request's id. Absent if that id is not a UUID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<String>,
    /// The kind of problem, for programs.
    pub code: Code,
    /// Everything that is wrong with the request; only with `validation_failed`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<FieldError>,
    /// The seats that stopped the request; only with `seat_unavailable` and `seat_not_found`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub seats: Vec<SeatConflict>,
    /// The time after which to try again, in seconds. The `Retry-After` header has the same value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_seconds: Option<u32>,
}

impl Problem {
    /// A problem with this code. `detail` says what happened and what the client can do.
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        Self {
            r#type: format!("urn:ticketing:problem:{code}"),
            title: code.title().into(),
            status: code.status(),
            detail: detail.into(),
            instance: None,
            code,
            errors: Vec::new(),
            seats: Vec::new(),
            retry_after_seconds: None,
        }
    }

    /// A `validation_failed` problem with all errors found.
    #[must_use]
    pub fn validation(errors: Vec<FieldError>) -> Self {
        let found = if errors.len() == 1 { "1 error".into() } else { format!("{} errors", errors.len()) };
        Self {
            errors,
            ..Self::new(Code::ValidationFailed, format!("The request has {found}; `errors` lists all of them."))
        }
    }

    /// Adds the seats that stopped the request.
    #[must_use]
    pub fn with_seats(self, seats: Vec<SeatConflict>) -> Self {
        Self { seats, ..self }
    }

    /// Adds the time after which to try again, in seconds.
    #[must_use]
    pub fn retry_after(self, seconds: u32) -> Self {
        Self { retry_after_seconds: Some(seconds), ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_serializes_to_its_name() {
        for code in Code::ALL {
            assert_eq!(serde_json::to_value(code).unwrap(), code.as_str());
            assert!((400..600).contains(&code.status()), "{code}");
        }
    }
}
