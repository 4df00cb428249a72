//! Reservations: the customers' orders. This folder is the only authority on their state, and the only writer of the
//! `reservations` table.
//!
//! ```text
//!           confirm            captured
//!  active ─────────▶ confirming ───────▶ confirmed ──▶ refunded   (all its tickets refunded)
//!  │ │ │ ▲                │                  ▲
//!  │ │ │ └─ not captured ─┘                  │
//!  │ │ │    (yet)                            │
//!  │ │ └──── captured later, by notice ──────┘
//!  │ └──▶ expired       (its time is over: by the worker, or by a buyer that wants its seats)
//!  └────▶ cancelled     (by the customer, or with its session)
//! ```
//!
//! `shared-contracts/src/transitions.rs` has the same states and those of payments as a table; the tests compare these
//! statements with it. Each arrow is one conditional update judged by this database's clock; of confirm, cancel and
//! expire one wins and the others get the right error.
//!
//! `confirming` is a lease: while this service asks the payment provider, nothing else may end the reservation. Once a
//! lease has run out, reconciliation settles it by asking the provider for the outcome of the charge. Clients see
//! `confirming` as `active`. If the provider does not decide at once, the reservation becomes `active` again, and a
//! notice reports how the charge ended (`workflows/late_payment.rs`).
//!
//! # `status || ''`
//!
//! Statements that find a row by its id compare `status || ''` instead of `status`. With the bare column the planner
//! may take the partial index of that status instead of the key, and read every active reservation for one (measured:
//! 2.07 ms instead of 0.1 ms with 3,000 of them). No index has the expression, so the key is the only way left. The
//! same is true for `payments`.
//!
//! This folder calls neither HTTP, Redis nor RabbitMQ, and does not use the workflows above it: `tests/it/tidy.rs`
//! checks that.

pub(crate) mod ended;
pub(crate) mod endings;
mod events;
pub(crate) mod insert;
pub mod model;
pub(crate) mod payment;
pub(crate) mod payment_outcomes;
pub(crate) mod refunds;
#[cfg(test)]
mod testing;
pub(crate) mod tickets;
