//! Admission of requests: the limits that operators set, how often a caller may call, and how many requests of a class
//! run at once.

pub mod bulkheads;
pub mod limits;
pub mod rate_limit;
