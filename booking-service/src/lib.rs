//! The Booking Service: price tiers, reservations, payment and tickets.
//!
//! Start with `migrations/`, then [`app`], which shows every route on one screen. [`reservations`] is the deep module: what became
//! of a reservation. `create.rs` is the way in (the steps of a booking, each with its undo), `confirm.rs` the payment, `finish.rs` the other ways out. They use
//! one tool for each outside thing: [`event_client`], [`seat_locks`], [`payments`], [`outbox`]. [`worker`] only says when;
//! [`reconcile`] heals what a crash left between this service and the Event Service, and [`audit`] holds both against the promises; [`metrics`] has all that is counted.

pub mod app;
pub mod audit;
pub mod event_client;
pub mod idempotency;
pub mod metrics;
pub mod outbox;
pub mod payments;
pub mod price_tiers;
pub mod replay;
pub mod reservations;
pub mod schema;
pub mod seat_locks;
pub mod settings;
pub mod state;
mod tickets;
pub mod tier_cache;
pub mod worker;
pub mod workflows;
