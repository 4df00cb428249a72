//! What the process tells its operators: logs, traces and metrics.

pub mod metrics;
pub mod telemetry;
pub mod traces;
