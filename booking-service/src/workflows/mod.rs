//! The workflows of the Booking Service. Each module is one operation, step by step, and calls one module for each
//! external system. It begins and commits its transactions, except those of batches: `reservations/` does.

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
