//! Identifiers: each resource has its own type, so that a seat can't be passed as a session seat.
//!
//! All are UUIDs of version 7 (RFC 9562). They rise with time, so indexes store new rows next to each other.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $example:literal) => {
        $(#[$doc])*
        #[derive(
            Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, sqlx::Type, ToSchema,
        )]
        #[serde(transparent)]
        #[sqlx(transparent)]
        #[schema(value_type = Uuid, example = $example)]
        pub struct $name(Uuid);

        impl $name {
            /// Creates an id with the current time in its first 48 bits.
            #[expect(clippy::new_without_default, reason = "each call returns a different id")]
            #[must_use]
            pub fn new() -> Self {
                Self(Uuid::now_v7())
            }

            /// The UUID without its type, for logs, AMQP properties and page cursors.
            #[must_use]
            pub const fn as_uuid(self) -> Uuid {
                self.0
            }
        }

        impl From<Uuid> for $name {
            fn from(id: Uuid) -> Self {
                Self(id)
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }

        impl std::str::FromStr for $name {
            type Err = uuid::Error;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                text.parse().map(Self)
            }
        }
    };
}

id!(
    /// Identifies an organizer, which puts events on.
    OrganizerId, "019ac1c0-0000-7000-8000-000000000001");
id!(
    /// Identifies an event: a show, match or talk that takes place in one or more sessions.
    EventId, "019ac1c0-0000-7000-8000-000000000002");
id!(
    /// Identifies a location: the address of a venue.
    LocationId, "019ac1c0-0000-7000-8000-000000000003");
id!(
    /// Identifies a hall: a room with seats at a location.
    HallId, "019ac1c0-0000-7000-8000-000000000004");
id!(
    /// Identifies a seat: a chair in a hall.
    SeatId, "019ac1c0-0000-7000-8000-000000000005");
id!(
    /// Identifies a session: one performance of an event in a hall.
    SessionId, "019ac1c0-0000-7000-8000-000000000006");
id!(
    /// Identifies a session seat: a seat in one session, which is what is sold.
    SessionSeatId, "019ac1c0-0000-7000-8000-000000000007");
id!(
    /// Identifies a price tier: a named multiplier on seat prices.
    PriceTierId, "019ac1c0-0000-7000-8000-000000000008");
id!(
    /// Identifies a reservation. The seat locks, holds and retries of a reservation also carry this id.
    ReservationId, "019ac1c0-0000-7000-8000-000000000009");
id!(
    /// Identifies one line of a reservation, which is one seat.
    ReservationItemId, "019ac1c0-0000-7000-8000-00000000000a");
id!(
    /// Identifies a ticket: the right to use one session seat.
    TicketId, "019ac1c0-0000-7000-8000-00000000000b");
id!(
    /// Identifies one attempt to charge for a reservation. The payment provider receives it as the idempotency key.
    PaymentId, "019ac1c0-0000-7000-8000-00000000000c");
id!(
    /// Identifies a customer.
    UserId, "019ac1c0-0000-7000-8000-00000000000d");
id!(
    /// Identifies a message on the broker: its `event_id` and its AMQP `message_id`.
    MessageId, "019ac1c0-0000-7000-8000-00000000000e");
