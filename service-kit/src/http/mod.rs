//! HTTP: the server, the layers around every request, the extractors and answers of handlers, and the circuit breaker
//! for calls to other services.

pub mod answer;
pub mod circuit;
pub mod client_address;
mod connections;
pub mod error;
pub mod etag;
pub mod extract;
mod json;
pub mod layers;
pub mod openapi;
pub mod query;
pub mod request_context;
mod rules;
mod security_headers;
pub mod server;
pub mod tls;
