//! The Event Service: the catalogue, the seat maps, and the one authority on which reservation has a seat.
//!
//! Read `migrations/` first, then [`app`] with every route on one screen, then one resource such as
//! [`catalogue::organizers`]. The modules, from the top down; none uses one above it:
//!
//! - [`app`]: the routes, and the start of the service; [`state`]: what handlers share.
//! - [`internal_api`]: REST calls of the Booking Service. [`booking_consumer`]: its events, from RabbitMQ.
//! - [`seat_map`]: the map of a session, and the stream of its changes.
//! - [`catalogue`]: organizers, events, locations, halls, seats and sessions.
//! - [`holds`]: availability, and the batches that hold seats.
//! - [`session_seats`]: the authority, and the only writer of its table; `sale`: whether a session is on sale.
//! - [`metrics`], [`settings`], `error`, `seen_snapshot`.
//!
//! This service never calls the Booking Service.

pub mod app;
pub mod booking_consumer;
pub mod catalogue;
mod error;
pub mod holds;
pub mod internal_api;
pub mod metrics;
mod sale;
pub mod seat_map;
mod seen_snapshot;
pub mod session_seats;
pub mod settings;
pub mod state;
