//! The kit's tests against real servers, as one binary. `./test.sh` starts the servers; see `service_kit::testing`.
#![expect(clippy::unwrap_used, reason = "a test fails by a panic")]

mod database;
mod publisher;
