//! What the Booking Service announces on the broker, and the names both sides meet under.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::ids::{MessageId, ReservationId, SessionId, SessionSeatId, TicketId, UserId};
use crate::money::{Currency, Money};

/// Default topic exchange.
pub const EXCHANGE: &str = "ticketing_events";
/// Default queue of the Event Service.
pub const QUEUE: &str = "event_service_queue";
/// Raised when a consumer of an older version could misread a message; it then sets the message aside.
pub const SCHEMA_VERSION: u32 = 1;

/// What happened; also the message's routing key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
pub enum BookingEventType {
    /// Paid: the seats are sold.
    #[serde(rename = "reservation.confirmed")]
    Confirmed,
    /// Not paid in time: the seats are free.
    #[serde(rename = "reservation.expired")]
    Expired,
    /// Given up by the customer: the seats are free.
    #[serde(rename = "reservation.cancelled")]
    Cancelled,
    /// A ticket was given back: its seat is free.
    #[serde(rename = "ticket.refunded")]
    TicketRefunded,
}

impl BookingEventType {
    /// Every type: what the Event Service's queue is bound to.
    pub const ALL: [Self; 4] = [Self::Confirmed, Self::Expired, Self::Cancelled, Self::TicketRefunded];

    /// The type's name on the wire.
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
/// Delivered at least once and in any order: `event_id` tells a repeat, `sequence` tells what came first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BookingEvent {
    /// The message's identity, kept when it is published again.
    pub event_id: MessageId,
    /// What happened.
    pub event_type: BookingEventType,
    /// [`SCHEMA_VERSION`] of the writer.
    pub schema_version: u32,
    /// When the change was made, by the Booking database's clock.
    pub occurred_at: DateTime<Utc>,
    /// Whose change it is.
    pub reservation_id: ReservationId,
    /// The customer.
    pub user_id: UserId,
    /// The session.
    pub session_id: SessionId,
    /// The seats that this change is about.
    pub session_seat_ids: Vec<SessionSeatId>,
    /// Rises with each change of this reservation.
    pub sequence: i64,
    /// `reservation.confirmed`, `ticket.refunded`: the tickets made or given back.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ticket_ids: Vec<TicketId>,
    /// `reservation.confirmed`: what was paid; `ticket.refunded`: what was given back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub amount: Option<Money>,
    /// The currency of `amount`.
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
