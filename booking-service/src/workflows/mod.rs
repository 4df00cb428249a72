//! What happens, step by step. A workflow begins and commits its transactions, and calls one tool for each outside thing.

pub mod confirm;
pub mod create;
pub mod end;
pub mod late_payment;
pub mod payment_webhook;
pub(crate) mod read;
pub mod reconcile;
pub mod session_cancelled;
