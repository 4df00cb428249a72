//! Holding seats: what a buyer may have, and the batches in which it is held.

pub(crate) mod availability;
pub mod batch;
