//! The Event Service's tests in one binary. Each test has its own database, exchange and queue.
#![expect(clippy::unwrap_used, reason = "a test fails by a panic")]

mod support;

mod auth;
mod booking_consumer;
mod catalogue;
mod database;
mod dead_letters;
mod editing;
mod input;
mod internal_api;
mod limits;
mod openapi;
mod paging;
mod problems;
mod seat_maps;
mod seat_model;
mod seat_stream;
mod session_seats;
mod sessions;
mod sql_data;
mod tls;
