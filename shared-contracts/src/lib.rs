//! What the Event Service and the Booking Service must agree on, and nothing else.
//!
//! Read in this order: the nouns ([`ids`], [`label`], [`money`]), the calls between the services ([`seat_api`]),
//! the events on the broker ([`booking_event`]), what may become of a seat, a reservation and a payment ([`transitions`]), and the
//! two shapes that every client meets ([`problem`], [`page`]).
//! There is no logic here beyond reading and writing these shapes and those tables; neither service is known to this crate.

pub mod booking_event;
pub mod ids;
pub mod label;
pub mod money;
pub mod page;
pub mod problem;
pub mod seat_api;
pub mod transitions;
