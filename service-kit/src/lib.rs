//! The plumbing around a service's own routes, written once. It knows nothing of seats or reservations.
//!
//! In the order in which a process and then a request meet the modules:
//!
//! - [`process`]: settings, start and stop, health, and places at which tests let the process die.
//! - `production`: what production demands of settings.
//! - [`observe`]: logs, traces and metrics.
//! - [`postgres`]: connection pools, and calls that share one statement and one commit.
//! - [`amqp`]: publishing with confirms, consuming with acknowledgements, dead letters.
//! - [`http`]: the server, TLS, the layers around every request, extractors, answers, errors, OpenAPI, and a circuit
//!   breaker.
//! - [`admit`]: limits, rate limits and bulkheads, which decide whether a request is let in.
//! - [`auth`]: who is calling, and what they may do.
//! - `testing` (with the feature of this name): databases, broken connections, logins and random sequences for tests.

pub mod admit;
pub mod amqp;
pub mod auth;
pub mod http;
pub mod observe;
pub mod postgres;
pub mod process;
mod production;
#[cfg(feature = "testing")]
pub mod testing;
