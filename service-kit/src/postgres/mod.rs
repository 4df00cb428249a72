//! PostgreSQL: the connection pools, and calls that share one statement and one commit.

pub mod batch;
pub mod database;
