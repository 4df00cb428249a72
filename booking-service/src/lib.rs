//! The Booking Service: price tiers, reservations, payment and tickets.
//!
//! Read `migrations/` first, then [`app`], which shows every route on one screen. No file uses a file of a floor above
//! its own:
//!
//! 1. Ways in: `main`, [`app`], [`worker`].
//! 2. What happens, step by step: [`workflows`], and `tickets`, [`replay`], [`audit`], [`price_tiers`] below them.
//! 3. What all of them share: [`state`].
//! 4. The authority on what became of a reservation, rows and batches only: [`reservations`]. Beside it, [`metrics`].
//! 5. One tool for each outside thing: [`outbox`], [`payments`], [`seat_locks`], [`event_client`], [`idempotency`],
//!    [`tier_cache`], [`settings`], [`schema`].

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
