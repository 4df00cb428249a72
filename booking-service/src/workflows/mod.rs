//! What happens, step by step. A workflow begins and commits its transactions, and calls one tool for each outside
//! thing.

pub(crate) mod after_commit;
pub mod confirm;
pub mod create;
pub mod end;
pub mod late_payment;
pub(crate) mod outbox_relay;
pub mod payment_webhook;
pub(crate) mod read;
pub mod reconcile;
pub(crate) mod refunds;
pub mod session_cancelled;
pub mod settle_holds;
