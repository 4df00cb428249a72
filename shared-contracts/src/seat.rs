//! A session seat as both the internal calls and the problems show it: its status, and why it stopped a call.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::ids::{ReservationId, SessionSeatId};

/// Whether a session seat can be bought, and if not, why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, sqlx::Type, ToSchema)]
#[serde(rename_all = "snake_case")]
#[sqlx(type_name = "text", rename_all = "snake_case")]
pub enum SeatStatus {
    /// Nobody: on sale.
    Available,
    /// Held for a reservation until that reservation is confirmed, cancelled or expired.
    Reserved,
    /// Owned by a confirmed reservation.
    Sold,
    /// Kept off sale by the organizer.
    Blocked,
}

impl SeatStatus {
    /// As it stands in documents and in the database.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Available => "available",
            Self::Reserved => "reserved",
            Self::Sold => "sold",
            Self::Blocked => "blocked",
        }
    }
}

/// A seat that stopped a `reserve` or `confirm`, in the `seats` member of the `409` problem.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SeatConflict {
    /// The session seat that can't be had.
    pub session_seat_id: SessionSeatId,
    /// Its present state; absent when no such seat exists in the session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<SeatStatus>,
    /// On internal calls only: the reservation that holds the seat past its time and may be settled on the spot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overdue_reservation_id: Option<ReservationId>,
}

impl SeatConflict {
    /// A seat in this state, if there is such a seat.
    #[must_use]
    pub fn new(session_seat_id: SessionSeatId, status: Option<SeatStatus>) -> Self {
        Self { session_seat_id, status, overdue_reservation_id: None }
    }
}
