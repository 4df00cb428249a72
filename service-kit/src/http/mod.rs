//! HTTP: the server, what wraps every request, what handlers take and answer, and the way to other services.

pub mod answer;
pub mod circuit;
pub mod client_address;
mod connections;
pub mod error;
pub mod etag;
pub mod extract;
pub mod layers;
pub mod openapi;
pub mod query;
pub mod request_context;
mod security_headers;
pub mod server;
pub mod tls;
