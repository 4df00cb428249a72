//! Holding seats: which seats a buyer can have, and the batches that hold them.

pub(crate) mod availability;
pub mod batch;
