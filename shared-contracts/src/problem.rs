//! Errors as clients meet them: RFC 9457 problem documents with a stable `code`.
//!
//! The list of [`Code`]s is the documentation, the OpenAPI enum and the table of status codes at once.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::openapi::schema::{ObjectBuilder, Type};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use crate::seat_api::SeatConflict;

/// The content type of every error.
pub const CONTENT_TYPE: &str = "application/problem+json";

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $status:literal $text:literal $title:literal;)*) => {
        /// What went wrong, for programs. The status and title belong to the code, never to the place that reports it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum Code {
            $($(#[$doc])* #[serde(rename = $text)] $name,)*
        }

        impl Code {
            /// All codes, in the order of their status.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// The HTTP status.
            #[must_use]
            pub const fn status(self) -> u16 {
                match self { $(Self::$name => $status),* }
            }

            /// The code as it stands in the document.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text),* }
            }

            /// A short sentence for people.
            #[must_use]
            pub const fn title(self) -> &'static str {
                match self { $(Self::$name => $title),* }
            }
        }
    };
}

codes! {
    /// The body is not JSON.
    MalformedJson = 400 "malformed_json" "The body is not valid JSON";
    /// The request can't be read at the level of HTTP.
    BadRequest = 400 "bad_request" "The request can't be read";
    /// The caller did not say who they are.
    Unauthenticated = 401 "unauthenticated" "The caller is not known";
    /// The payment provider declined; the hold stays until it expires.
    PaymentDeclined = 402 "payment_declined" "The payment was declined";
    /// The caller is known and may not do this.
    Forbidden = 403 "forbidden" "The caller may not do this";
    /// No such path.
    NotFound = 404 "not_found" "There is nothing at this path";
    /// No such organizer.
    OrganizerNotFound = 404 "organizer_not_found" "The organizer does not exist";
    /// No such event.
    EventNotFound = 404 "event_not_found" "The event does not exist";
    /// No such location.
    LocationNotFound = 404 "location_not_found" "The location does not exist";
    /// No such hall.
    HallNotFound = 404 "hall_not_found" "The hall does not exist";
    /// No such session.
    SessionNotFound = 404 "session_not_found" "The session does not exist";
    /// A seat asked for is not in this session.
    SeatNotFound = 404 "seat_not_found" "A seat does not exist in this session";
    /// No such price tier, or not for this session.
    PriceTierNotFound = 404 "price_tier_not_found" "The price tier does not exist";
    /// No such reservation of this caller.
    ReservationNotFound = 404 "reservation_not_found" "The reservation does not exist";
    /// No such ticket of this caller.
    TicketNotFound = 404 "ticket_not_found" "The ticket does not exist";
    /// No such charge.
    PaymentNotFound = 404 "payment_not_found" "The payment does not exist";
    /// The path exists, the method does not.
    MethodNotAllowed = 405 "method_not_allowed" "The method is not allowed here";
    /// The body did not come in time.
    RequestTimeout = 408 "request_timeout" "The request did not arrive in time";
    /// A seat is held or sold; `seats` names it.
    SeatUnavailable = 409 "seat_unavailable" "A seat is not available";
    /// The session's sales have not begun.
    SalesNotStarted = 409 "sales_not_started" "Sales have not begun";
    /// The session's sales are over, or it has begun.
    SalesEnded = 409 "sales_ended" "Sales are over";
    /// The session does not take place.
    SessionCancelled = 409 "session_cancelled" "The session is cancelled";
    /// The hall already has a session at that time.
    SessionOverlap = 409 "session_overlap" "The hall has another session at that time";
    /// The hall already has a seat with these labels.
    SeatExists = 409 "seat_exists" "The hall already has such a seat";
    /// More seats than the hall's capacity.
    HallFull = 409 "hall_full" "The hall's capacity is exceeded";
    /// The hall has no seats yet, so there is nothing to sell in a session.
    HallHasNoSeats = 409 "hall_has_no_seats" "The hall has no seats";
    /// Something else depends on it; `detail` says what.
    ResourceInUse = 409 "resource_in_use" "The resource is in use";
    /// The reservation was cancelled.
    ReservationCancelled = 409 "reservation_cancelled" "The reservation was cancelled";
    /// The reservation is paid already.
    ReservationConfirmed = 409 "reservation_confirmed" "The reservation is confirmed";
    /// The reservation's tickets were given back.
    ReservationRefunded = 409 "reservation_refunded" "The reservation was refunded";
    /// A payment for this reservation is under way.
    ConfirmationInProgress = 409 "confirmation_in_progress" "The payment is being made";
    /// A request with the same Idempotency-Key is at work.
    IdempotencyKeyInFlight = 409 "idempotency_key_in_flight" "A request with this Idempotency-Key is at work";
    /// The caller has as many open reservations as one may have.
    TooManyReservations = 409 "too_many_reservations" "Too many reservations are open";
    /// The caller has as many seats of this session as one may have.
    TooManySeats = 409 "too_many_seats" "Too many seats of this session";
    /// The ticket has been used.
    TicketUsed = 409 "ticket_used" "The ticket was used";
    /// The hold has ended.
    ReservationExpired = 410 "reservation_expired" "The reservation has expired";
    /// `If-Match` names another version than the present one.
    PreconditionFailed = 412 "precondition_failed" "The resource was changed meanwhile";
    /// The body is larger than this call takes.
    BodyTooLarge = 413 "body_too_large" "The body is too large";
    /// The body is not declared as JSON.
    UnsupportedMediaType = 415 "unsupported_media_type" "The content type is not supported";
    /// The request was understood and breaks a rule; `errors` names every fault.
    ValidationFailed = 422 "validation_failed" "The request breaks a rule";
    /// The Idempotency-Key was used with another request.
    IdempotencyKeyReused = 422 "idempotency_key_reused" "The Idempotency-Key was used with another request";
    /// More requests than anyone may make in this time.
    RateLimited = 429 "rate_limited" "Too many requests";
    /// The header fields are larger than the service takes.
    HeadersTooLarge = 431 "headers_too_large" "The header fields are too large";
    /// A bug on our side.
    InternalError = 500 "internal_error" "Something went wrong on our side";
    /// The keys that access tokens are signed with have not been had yet.
    AuthenticationUnavailable = 503 "authentication_unavailable" "Access tokens can't be checked";
    /// The service's own database can't be reached.
    DatabaseUnavailable = 503 "database_unavailable" "The database can't be reached";
    /// The Event Service can't be reached.
    EventServiceUnavailable = 503 "event_service_unavailable" "The Event Service can't be reached";
    /// The message broker can't be reached.
    BrokerUnavailable = 503 "broker_unavailable" "The message broker can't be reached";
    /// The payment provider gave no answer; the charge's fate is being asked for.
    PaymentUnavailable = 503 "payment_unavailable" "The payment provider gave no answer";
    /// As many streams are open as the service can feed.
    TooManyWatchers = 503 "too_many_watchers" "Too many streams are open";
    /// Too many requests are being worked on; this one was not begun.
    Overloaded = 503 "overloaded" "The service is overloaded";
    /// The request took longer than the service allows.
    DeadlineExceeded = 503 "deadline_exceeded" "The request took too long";
}

// By hand: the derived schema would show the Rust names, as it can't see what a macro renames them to.
impl PartialSchema for Code {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .schema_type(Type::String)
            .description(Some("What went wrong, for programs"))
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

/// One fault of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FieldError {
    /// Where in the body, as a JSON pointer (RFC 6901).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "/seats/0/price_tier_id")]
    pub pointer: Option<String>,
    /// Which path or query parameter or header, when the fault is not in the body.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameter: Option<String>,
    /// What is wrong with it.
    pub detail: String,
}

impl FieldError {
    /// A fault in the body.
    pub fn at(pointer: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { pointer: Some(pointer.into()), parameter: None, detail: detail.into() }
    }

    /// A fault of a path or query parameter or a header.
    pub fn parameter(name: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { pointer: None, parameter: Some(name.into()), detail: detail.into() }
    }
}

/// An error document (RFC 9457), with the members of our own that help a client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// The kind of problem as a URI: `urn:ticketing:problem:` and the code.
    #[schema(example = "urn:ticketing:problem:seat_unavailable")]
    pub r#type: String,
    /// The kind of problem in words.
    pub title: String,
    /// The HTTP status.
    #[schema(minimum = 400, maximum = 599)]
    pub status: u16,
    /// What happened this time, and what to do about it.
    pub detail: String,
    /// This occurrence: `urn:uuid:` and the request's id when that is a UUID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<String>,
    /// The kind of problem for programs.
    pub code: Code,
    /// `validation_failed`: every fault of the request.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<FieldError>,
    /// `seat_unavailable`, `seat_not_found`: the seats that stopped the request.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub seats: Vec<SeatConflict>,
    /// When to try again, in seconds; also in the `Retry-After` header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_seconds: Option<u32>,
}

impl Problem {
    /// A problem of this kind; `detail` says what happened and what the client can do.
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

    /// `422` with every fault found.
    #[must_use]
    pub fn validation(errors: Vec<FieldError>) -> Self {
        let faults = if errors.len() == 1 { "1 fault".into() } else { format!("{} faults", errors.len()) };
        Self {
            errors,
            ..Self::new(Code::ValidationFailed, format!("The request has {faults}; `errors` lists all of them."))
        }
    }

    /// The same problem, naming the seats that stopped the request.
    #[must_use]
    pub fn with_seats(self, seats: Vec<SeatConflict>) -> Self {
        Self { seats, ..self }
    }

    /// The same problem, telling when to try again.
    #[must_use]
    pub fn retry_after(self, seconds: u32) -> Self {
        Self { retry_after_seconds: Some(seconds), ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_code_is_written_as_it_is_named() {
        for code in Code::ALL {
            assert_eq!(serde_json::to_value(code).unwrap(), code.as_str());
            assert!((400..600).contains(&code.status()), "{code}");
        }
    }
}
