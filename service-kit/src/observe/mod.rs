//! The process's output for its operators: logs, traces and metrics.

pub mod metrics;
pub mod telemetry;
pub mod traces;
