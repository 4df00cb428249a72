//! What the Event Service and the Booking Service must agree on, and nothing else.
//!
//! In reading order, each module using only those above it:
//!
//! - [`ids`]: one identifier type for each noun.
//! - [`money`]: exact amounts, multipliers and currencies.
//! - [`text`]: which characters texts may have, and which texts look the same.
//! - [`label`]: the names of rows and seats.
//! - [`page`]: page sizes and cursors of lists.
//! - [`seat`]: the status of a session seat, and a seat that stopped a call.
//! - [`problem`]: the error body of every route, and its codes.
//! - [`seat_api`]: the bodies of the internal calls from the Booking Service to the Event Service.
//! - [`booking_event`]: the messages on the broker.
//! - [`transitions`]: what may become of a seat, a reservation and a payment.
//!
//! The crate only reads and writes these shapes, and holds the tables of the transitions. It knows neither service.

pub mod booking_event;
pub mod ids;
pub mod label;
pub mod money;
pub mod page;
pub mod problem;
pub mod seat;
pub mod seat_api;
pub mod text;
pub mod transitions;
