//! Identifiers: one type a noun, so that a seat can't be passed as a session seat.
//!
//! All are UUIDs of version 7 (RFC 9562): they rise with time, so new rows land side by side in their indexes.

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
            /// A new id, of this moment.
            #[expect(clippy::new_without_default, reason = "a default id would be a different one at each call")]
            #[must_use]
            pub fn new() -> Self {
                Self(Uuid::now_v7())
            }

            /// The bare UUID, for places that know no nouns: logs, AMQP properties, page cursors.
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
    /// Who puts events on.
    OrganizerId, "019ac1c0-0000-7000-8000-000000000001");
id!(
    /// A show, match or talk; it takes place in sessions.
    EventId, "019ac1c0-0000-7000-8000-000000000002");
id!(
    /// A venue's address.
    LocationId, "019ac1c0-0000-7000-8000-000000000003");
id!(
    /// A room with seats, at a location.
    HallId, "019ac1c0-0000-7000-8000-000000000004");
id!(
    /// A chair in a hall.
    SeatId, "019ac1c0-0000-7000-8000-000000000005");
id!(
    /// One performance of an event in a hall.
    SessionId, "019ac1c0-0000-7000-8000-000000000006");
id!(
    /// A chair in a session: the thing that is sold.
    SessionSeatId, "019ac1c0-0000-7000-8000-000000000007");
id!(
    /// A multiplier on seat prices.
    PriceTierId, "019ac1c0-0000-7000-8000-000000000008");
id!(
    /// A customer's order. Also the seat lock's token, the hold's owner and the key of every retry.
    ReservationId, "019ac1c0-0000-7000-8000-000000000009");
id!(
    /// One seat line of a reservation.
    ReservationItemId, "019ac1c0-0000-7000-8000-00000000000a");
id!(
    /// The right to sit on one session seat.
    TicketId, "019ac1c0-0000-7000-8000-00000000000b");
id!(
    /// One attempt to charge for a reservation; the idempotency key towards the payment provider.
    PaymentId, "019ac1c0-0000-7000-8000-00000000000c");
id!(
    /// A customer.
    UserId, "019ac1c0-0000-7000-8000-00000000000d");
id!(
    /// An event message on the broker: its `event_id` and AMQP `message_id`.
    MessageId, "019ac1c0-0000-7000-8000-00000000000e");
