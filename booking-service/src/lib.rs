//! The Booking Service: price tiers, reservations, payment and tickets.
//!
//! Read `migrations/` first, then [`app`], which shows every route on one screen. The layers, from the top down; no
//! file uses a file of a layer above its own:
//!
//! 1. Entry points: `main`, [`app`], [`worker`].
//! 2. The steps of each request and task: [`workflows`], and below them `tickets`, [`replay`], [`audit`],
//!    [`price_tiers`].
//! 3. The state that all of these share: [`state`].
//! 4. The one authority on the state of a reservation, with rows and batches only: [`reservations`]. Beside it,
//!    [`metrics`].
//! 5. One tool for each outside system, and what needs no other layer: [`outbox`], [`payments`], [`seat_locks`],
//!    [`event_client`], [`idempotency`], [`tier_cache`], [`settings`], [`schema`].

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
