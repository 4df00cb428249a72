//! The load test: buyers by the thousand on a running system.
//!
//! In the order of reading: `scenarios/` (what buyers do), `arrivals.rs` (how they come), `bench.rs` (one measurement), `measure.rs`
//! (latencies and outcomes), `processes.rs` (CPU time), `databases.rs` (flushes), `sale.rs` (what is sold), `http.rs` (a connection),
//! `system.rs` (what is driven), `audit.rs` (were the promises kept), `report.rs`, `html.rs`, `plot.rs`, `compare.rs` (two systems in turn).
//!
//! It has one thread, whose CPU time is shown apart: it shares the machine with what it measures, and threads that wake each other
//! would cost more than they give.

pub mod arrivals;
pub mod audit;
pub mod bench;
pub mod compare;
pub mod databases;
pub mod html;
pub mod http;
pub mod measure;
pub mod measured;
pub mod plot;
pub mod processes;
pub mod report;
pub mod sale;
pub mod scenarios;
pub mod system;
