//! The load test: thousands of buyers on a running system.
//!
//! The modules in the order of reading:
//! - `scenarios`: what buyers do
//! - `arrivals`: how buyers arrive
//! - `bench`: one measurement
//! - `measure`: latencies and outcomes
//! - `processes`: CPU time
//! - `databases`: flushes of the databases' logs
//! - `sale`: what is sold
//! - `http`: one connection
//! - `system`: the system under load
//! - `audit`: whether the promises were kept
//! - `report`, `html`, `plot`: the results of a run
//! - `compare`: two systems in turn
//!
//! The generator has one thread, and its CPU time is reported separately. It shares the machine with the system that it
//! measures, and several threads that wake each other would cost more than they gain.

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
