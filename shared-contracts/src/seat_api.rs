//! Bodies of the internal REST calls: the Booking Service asks, the Event Service answers.
//!
//! All of them take session seats, at most [`SEATS_PER_CALL_MAX`], of one session but for [`ReleaseRequest`] and [`LookUpRequest`], and all
//! are harmless when repeated. Holds can be asked for many at a time ([`Calls`]): in the minute of an on-sale an exchange costs more than
//! what it asks for.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::ids::{ReservationId, SessionId, SessionSeatId};
use crate::label::Label;
use crate::money::{Currency, Money};
use crate::problem::Problem;
use crate::seat::SeatStatus;

/// The most session seats that one internal call may name: far above any reservation, far below a slow statement.
pub const SEATS_PER_CALL_MAX: usize = 500;

/// The most calls of one body of [`Calls`]. So many with a hundred seats each stay below the 256 KiB that a body may have.
pub const CALLS_MAX: usize = 32;

/// Body of `check-availability`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct CheckAvailabilityRequest {
    /// The seats asked for.
    #[schema(min_items = 1, max_items = 500)]
    pub session_seat_ids: Vec<SessionSeatId>,
}

/// Answer of `check-availability`: a look, not a promise; only `reserve` decides.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Availability {
    /// Whether every seat asked for is available.
    pub available: bool,
    /// The session that the call is about.
    pub session_id: SessionId,
    /// Each seat asked for that exists in this session.
    pub seats: Vec<SeatAvailability>,
    /// Those that can't be had now, unknown ones among them.
    pub unavailable_seat_ids: Vec<SessionSeatId>,
    /// Those that do not exist in this session.
    #[serde(default)]
    pub unknown_seat_ids: Vec<SessionSeatId>,
}

/// One seat's availability.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct SeatAvailability {
    /// Identifies the seat within its session.
    pub session_seat_id: SessionSeatId,
    /// Whether the seat can be bought, and if not, why.
    pub status: SeatStatus,
    /// Whether it can be reserved.
    pub available: bool,
    /// The seat is held past its time: its reservation may be settled, which frees it.
    #[serde(default)]
    pub overdue: bool,
}

/// Body of `reserve`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ReserveRequest {
    /// The hold's owner; made before the call, so that a repeat is recognised.
    pub reservation_id: ReservationId,
    /// The seats, all of them or none.
    #[schema(min_items = 1, max_items = 500)]
    pub session_seat_ids: Vec<SessionSeatId>,
    /// When the reservation ends unless it is confirmed. Passing it frees no seat by itself: the Booking Service says what becomes of the hold.
    pub reserved_until: DateTime<Utc>,
    /// Whether to look first, as `check-availability` does, and to answer the prices, as `pricing` does: three steps in one exchange.
    /// Without it, the session need not be on sale.
    #[serde(default)]
    pub with_prices: bool,
}

/// Body of `release` and `confirm`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct SeatsOfReservation {
    /// The hold's owner.
    pub reservation_id: ReservationId,
    /// The session seats to change, each once.
    #[schema(min_items = 1, max_items = 500)]
    pub session_seat_ids: Vec<SessionSeatId>,
}

/// A reservation's hold of one seat.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, sqlx::FromRow, ToSchema)]
pub struct Hold {
    /// The reservation that holds the seat.
    pub reservation_id: ReservationId,
    /// The session seat that is held.
    pub session_seat_id: SessionSeatId,
}

/// Body of `seats/release`: holds that end together, of any sessions.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ReleaseRequest {
    /// The holds to release, each once.
    #[schema(min_items = 1, max_items = 500)]
    pub holds: Vec<Hold>,
}

/// Answer of `seats/release`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct SeatsFreed {
    /// The seats that this call freed.
    pub session_seat_ids: Vec<SessionSeatId>,
}

/// Answer of `reserve`, `release` and `confirm`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct SeatsChanged {
    /// The reservation that is to hold the seats.
    pub reservation_id: ReservationId,
    /// The seats that are now as asked for; for `release`, those that this call freed.
    pub session_seat_ids: Vec<SessionSeatId>,
    /// What they cost, for a `reserve` that asked for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pricing: Option<Pricing>,
}

/// A call among others, with what it would have in its path and its header fields.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Call<T> {
    /// The session whose seats are to be held.
    pub session_id: SessionId,
    /// The id of the request that it belongs to, as in `X-Request-Id`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 128, pattern = "^[ -~]*$")]
    pub request_id: Option<String>,
    /// The trace that it belongs to, as in the header field of this name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 128, pattern = "^[ -~]*$")]
    pub traceparent: Option<String>,
    /// What the call alone would have as its body.
    pub body: T,
}

/// Calls of one kind, of any sessions. Each is judged for itself.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Calls<T> {
    /// The calls to make, each judged by itself.
    #[schema(min_items = 1, max_items = 32)]
    pub calls: Vec<Call<T>>,
}

/// What became of one call among others: one of the two.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct CallAnswer<T> {
    /// The body of its `200`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub done: Option<T>,
    /// The problem that it would have been answered with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<Problem>,
}

impl<T> From<Result<T, Problem>> for CallAnswer<T> {
    fn from(answer: Result<T, Problem>) -> Self {
        match answer {
            Ok(done) => Self { done: Some(done), refused: None },
            Err(problem) => Self { done: None, refused: Some(problem) },
        }
    }
}

/// Answers to [`Calls`].
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct CallAnswers<T> {
    /// One a call, in their order.
    pub answers: Vec<CallAnswer<T>>,
}

/// Answer of `pricing`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Pricing {
    /// The session whose prices these are.
    pub session_id: SessionId,
    /// The session's price before seat and tier.
    pub base_price: Money,
    /// The currency of all prices here.
    pub currency: Currency,
    /// When the session ends. An Event Service from before this member leaves it out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end_time: Option<DateTime<Utc>>,
    /// The seats asked for, or all of the session.
    pub seats: Vec<SeatPrice>,
}

/// One seat's price and labels.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct SeatPrice {
    /// The session seat that has this price.
    pub session_seat_id: SessionSeatId,
    /// Its price before the tier's multiplier.
    pub price: Money,
    /// Its row's label.
    pub row_number: Label,
    /// Its own label.
    pub seat_number: Label,
    /// Its section; null if it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub section: Option<String>,
}

/// Answer of `sessions/{session_id}`: when the session takes place, as it stands now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, sqlx::FromRow, ToSchema)]
pub struct SessionTimes {
    /// The session asked for.
    pub session_id: SessionId,
    /// When it begins.
    pub start_time: DateTime<Utc>,
    /// When it ends.
    pub end_time: DateTime<Utc>,
}

/// A hold whose `reserved_until` lies before the moment asked for.
#[derive(Debug, Clone, Serialize, Deserialize, sqlx::FromRow, ToSchema)]
pub struct OverdueHold {
    /// The hold's owner.
    pub reservation_id: ReservationId,
    /// The session of the held seat.
    pub session_id: SessionId,
    /// The session seat that is held.
    pub session_seat_id: SessionSeatId,
    /// The hold's end.
    pub reserved_until: DateTime<Utc>,
}

/// Where a walk over rows in the order of time and id goes on: after this one. As text: `<microseconds since 1970>_<id>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimeCursor {
    /// The row's time.
    pub time: DateTime<Utc>,
    /// The row's id; the nil one stands before all others.
    pub id: Uuid,
}

impl std::fmt::Display for TimeCursor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}_{}", self.time.timestamp_micros(), self.id)
    }
}

impl std::str::FromStr for TimeCursor {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parsed = text.split_once('_').and_then(|(micros, id)| {
            // Seventeen digits reach the year 5138; PostgreSQL's calendar has an end, too.
            let micros = micros.parse().ok().filter(|micros| (0..100_000_000_000_000_000).contains(micros))?;
            Some(Self { time: DateTime::from_timestamp_micros(micros)?, id: id.parse().ok()? })
        });
        parsed.ok_or("is not a next_cursor of this list")
    }
}

/// Answer of `holds/overdue`: oldest first; `next_cursor` goes on after the last.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct OverdueHolds {
    /// Overdue holds, the earliest first.
    pub items: Vec<OverdueHold>,
    /// Pass it as `cursor` for the next page; null on the last.
    pub next_cursor: Option<String>,
}

/// A session that does not take place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, sqlx::FromRow, ToSchema)]
pub struct CancelledSession {
    /// The session that was cancelled.
    pub session_id: SessionId,
    /// When it was cancelled.
    pub cancelled_at: DateTime<Utc>,
}

/// Answer of `sessions/cancelled`: in the order in which they were; `next_cursor` goes on after the last.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct CancelledSessions {
    /// Cancelled sessions, the earliest cancellation first.
    pub items: Vec<CancelledSession>,
    /// Pass it as `cursor` for the next page; null on the last.
    pub next_cursor: Option<String>,
}

/// A seat that someone holds or owns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, sqlx::FromRow, ToSchema)]
pub struct OwnedSeat {
    /// The session seat that has an owner.
    pub session_seat_id: SessionSeatId,
    /// The session of that seat.
    pub session_id: SessionId,
    /// `reserved` or `sold`.
    pub status: SeatStatus,
    /// Whose it is.
    pub reservation_id: ReservationId,
}

/// Body of `seats/look-up`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct LookUpRequest {
    /// The seats asked for, of any session.
    #[schema(min_items = 1, max_items = 500)]
    pub session_seat_ids: Vec<SessionSeatId>,
}

/// Answer of `seats/look-up`: those of the seats that someone holds or owns.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct OwnedSeats {
    /// Owned seats, in the order of their ids.
    pub items: Vec<OwnedSeat>,
}
