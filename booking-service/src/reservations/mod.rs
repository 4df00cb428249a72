//! Reservations: the customer's orders, and the one authority on what became of each. Only this folder writes
//! `reservations`.
//!
//! ```text
//!           confirm            captured
//!  active ─────────▶ confirming ───────▶ confirmed ──▶ refunded   (all its tickets given back)
//!  │ │ │ ▲                │                  ▲
//!  │ │ │ └─ not captured ─┘                  │
//!  │ │ │    (yet)                            │
//!  │ │ └──── captured after all, by notice ──┘
//!  │ └──▶ expired       (its time is over: the worker, or whoever wants its seats)
//!  └────▶ cancelled     (by the customer, or with its session)
//! ```
//!
//! The same as a table, payments with it, is `shared-contracts/src/transitions.rs`; the statements here are held
//! against it. Each arrow is one conditional update judged by this database's clock; of confirm, cancel and expire one
//! wins and the others get the right error. `confirming` is a lease: while the payment provider is asked nobody else
//! may end the reservation, and a lease that has run out is settled by asking the provider what became of the charge.
//! Clients see it as `active`. A provider that takes its time leaves the reservation `active` and tells by notice how
//! the charge ended (`workflows/late_payment.rs`).
//!
//! # `status || ''`
//!
//! Statements that find a row by its id compare `status || ''` instead of `status`. With the bare column the planner
//! may take the partial index of that status instead of the key, and read every active reservation for one (seen: 2.07
//! ms instead of 0.1 ms with 3,000 of them). No index has the expression, so the key is the only way left. The same is
//! true of `payments`.
//!
//! This folder calls neither HTTP, Redis nor RabbitMQ, and knows nothing of the workflows above it: `tests/it/tidy.rs`
//! holds it so.

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
