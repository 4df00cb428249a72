//! Refunds: the provider is asked for what is owed, once for each refund however often this runs.

use service_kit::http::error::Result;
use service_kit::process::crash::crash_point;

use crate::reservations::refunds::{self, PendingRefund};
use crate::state::App;

/// What is owed is written; the provider is asked at once, and again by reconciliation if it does not answer.
pub(super) async fn refund_now(app: &App, owed: PendingRefund) {
    if let Err(error) = settle_refund(app, owed).await {
        tracing::warn!(%error, refund = %owed.id, "The provider will be asked for this refund again");
    }
}

/// Has the provider give one sum back; once, however often it is asked.
///
/// # Errors
/// The database or the provider does not answer; what is owed stays written.
pub(super) async fn settle_refund(app: &App, owed: PendingRefund) -> Result<()> {
    app.payments.refund(owed.id, owed.payment_id, owed.amount).await?;
    crash_point("refund.given_back");
    refunds::settle(&app.db, owed.id).await
}
