//! The Booking Service: price tiers, reservations, payment and tickets.
//!
//! Read `migrations/` first, then [`app`], which shows every route on one screen. No file uses a file of a floor above its own:
//!
//! | floor | files |
//! | --- | --- |
//! | ways in | `main`, [`app`], [`worker`] |
//! | what happens, step by step | [`workflows`], `tickets`, [`replay`], [`audit`], [`price_tiers`] |
//! | what all of them share | [`state`] |
//! | the authority on what became of a reservation: rows and batches | [`reservations`], [`metrics`] |
//! | one tool for each outside thing | [`outbox`], [`payments`], [`seat_locks`], [`event_client`], [`idempotency`], [`tier_cache`], [`settings`], [`schema`] |

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
