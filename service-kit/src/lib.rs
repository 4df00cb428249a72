//! The plumbing around a service's own routes, written once. It knows nothing of seats or reservations.
//!
//! In the order in which a process and then a request meet them: [`settings`] and [`telemetry`] at start,
//! [`lifecycle`] around everything that runs, [`database`] and [`amqp`] (with its acks and [`dead_letters`]) and, for other services, [`circuit`] as the ways out ([`coalesce`] sends what comes together on its way together), [`server`] as the way in, which takes no more than [`limits`] says, all of them by [`tls`] where that is wished;
//! there [`layers`] wraps each request, after [`rate_limit`] (by [`client_address`], where nothing better is known) and [`lanes`] have let it in, [`extract`], [`query`] and [`auth`] read it, [`answer`], [`etag`] and [`error`] say what came
//! of it,
//! [`openapi`] describes it, [`health`] tells others how the process is, [`metrics`] what it has done, and [`traces`] what caused what. Tests have the process die at places that [`crash`] names.

mod acks;
pub mod amqp;
pub mod answer;
pub mod auth;
pub mod circuit;
pub mod client_address;
pub mod coalesce;
mod connections;
pub mod crash;
pub mod database;
pub mod dead_letters;
pub mod error;
pub mod etag;
pub mod extract;
pub mod health;
pub mod lanes;
pub mod layers;
pub mod lifecycle;
pub mod limits;
pub mod metrics;
pub mod openapi;
pub mod query;
pub mod rate_limit;
mod security_headers;
pub mod server;
pub mod settings;
pub mod telemetry;
#[cfg(feature = "testing")]
pub mod testing;
pub mod tls;
pub mod traces;
