//! The Booking Service's tests, as one binary. Each test runs both services in this process, with its own databases,
//! exchange and queue. At the end it audits both databases: whatever the test did, the promises must hold.
#![expect(clippy::unwrap_used, reason = "a test fails by a panic")]

mod processes;
mod support;

mod audit;
mod auth;
mod booking;
mod cancel;
mod chaos;
mod confirm;
mod crash;
mod crash_points;
mod english;
mod event_client;
mod expiry;
mod fair_use;
mod floors;
mod idempotency;
mod input;
mod metrics;
mod openapi;
mod order_model;
mod outages;
mod outbox;
mod payment_webhook;
mod price_tiers;
mod problems;
mod races;
mod reconcile;
mod refund;
mod secrets;
mod session_cancelled;
mod session_end;
mod settings_reference;
mod sql_data;
mod tidy;
mod tls;
mod traces;
mod unwinding;
