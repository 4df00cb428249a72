//! The code that every service needs around its own routes. It knows nothing of seats or reservations.
//!
//! The modules, in the order in which a process and then a request use them:
//!
//! - [`process`]: settings, start and stop, health, and crash points for tests.
//! - `production`: the settings that production refuses.
//! - [`observe`]: logs, traces and metrics.
//! - [`postgres`]: connection pools, and calls that share one statement and one commit.
//! - [`amqp`]: publishing with confirms, consuming with acknowledgements, dead letters.
//! - [`http`]: the server, TLS, the layers around every request, extractors, answers, errors, OpenAPI, and a circuit
//!   breaker.
//! - [`admit`]: limits, rate limits and bulkheads, which decide whether a request is accepted.
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
