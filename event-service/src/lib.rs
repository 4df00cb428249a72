//! The Event Service: the catalogue, seat maps, and the one authority on who has a seat.
//!
//! Start with `migrations/`, then [`app`], which shows every route on one screen; then one resource, say [`catalogue::organizers`].
//! [`session_seats`] is the deep module: who has a seat, and the only writer of that table. Two thin ways lead into it:
//! [`internal_api`] (REST, from the Booking Service; [`holds::batch`] brings together what comes at the same time) and [`booking_consumer`] (its events, from RabbitMQ).
//! [`metrics`] has all that is counted. This service never calls the Booking Service.

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
