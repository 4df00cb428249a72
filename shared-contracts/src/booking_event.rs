//! The events that the Booking Service publishes, and the names of the exchange and queue that both services use.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::ids::{MessageId, ReservationId, SessionId, SessionSeatId, TicketId, UserId};
use crate::money::{Currency, Money};

/// The default name of the topic exchange.
pub const EXCHANGE: &str = "ticketing_events";
/// The default name of the Event Service's queue.
pub const QUEUE: &str = "event_service_queue";
/// Raise this when an older consumer could misread a message. Such a consumer dead-letters it instead.
pub const SCHEMA_VERSION: u32 = 1;

/// What happened. The value is also the message's routing key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
pub enum BookingEventType {
    /// The customer paid, and the seats are sold.
    #[serde(rename = "reservation.confirmed")]
    Confirmed,
    /// The customer did not pay in time, and the seats are free.
    #[serde(rename = "reservation.expired")]
    Expired,
    /// The customer cancelled before paying, or the session was cancelled. The seats are free.
    #[serde(rename = "reservation.cancelled")]
    Cancelled,
    /// A ticket was refunded, and its seat is free.
    #[serde(rename = "ticket.refunded")]
    TicketRefunded,
}

impl BookingEventType {
    /// Every type. The Event Service binds its queue to all of them.
    pub const ALL: [Self; 4] = [Self::Confirmed, Self::Expired, Self::Cancelled, Self::TicketRefunded];

    /// The type as it stands in the message and in its routing key.
    #[must_use]
    pub const fn routing_key(self) -> &'static str {
        match self {
            Self::Confirmed => "reservation.confirmed",
            Self::Expired => "reservation.expired",
            Self::Cancelled => "reservation.cancelled",
            Self::TicketRefunded => "ticket.refunded",
        }
    }
}

/// One committed change of a reservation.
///
/// A message is delivered at least once and in any order. `event_id` identifies repeats, and `sequence` gives the
/// order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BookingEvent {
    /// Identifies the message; a message that is published again keeps it.
    pub event_id: MessageId,
    /// What happened to the reservation.
    pub event_type: BookingEventType,
    /// The [`SCHEMA_VERSION`] of the service that wrote the message.
    pub schema_version: u32,
    /// When the change was made, by the clock of the Booking Service's database.
    pub occurred_at: DateTime<Utc>,
    /// The reservation that changed.
    pub reservation_id: ReservationId,
    /// The customer of the reservation.
    pub user_id: UserId,
    /// The session of the seats.
    pub session_id: SessionId,
    /// The session seats that this change sells or frees.
    pub session_seat_ids: Vec<SessionSeatId>,
    /// Counts the changes of this reservation; a later change has a higher number.
    pub sequence: i64,
    /// The tickets that were issued (`reservation.confirmed`) or refunded (`ticket.refunded`); absent otherwise.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ticket_ids: Vec<TicketId>,
    /// The amount paid (`reservation.confirmed`) or refunded (`ticket.refunded`); absent otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub amount: Option<Money>,
    /// The currency of `amount`; absent where `amount` is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub currency: Option<Currency>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_event_type_is_its_routing_key() {
        for event_type in BookingEventType::ALL {
            assert_eq!(serde_json::to_value(event_type).unwrap(), event_type.routing_key());
        }
    }
}
