//! Refunds: has the payment provider pay what is owed. Each refund is paid once, however often this runs.

use service_kit::http::error::Result;
use service_kit::process::crash::crash_point;

use crate::reservations::refunds::{self, PendingRefund};
use crate::state::App;

/// Asks the provider for a refund that is already stored. If the provider does not answer, reconciliation asks again.
pub(super) async fn refund_now(app: &App, owed: PendingRefund) {
    if let Err(error) = settle_refund(app, owed).await {
        tracing::warn!(%error, refund = %owed.id, "The provider will be asked for this refund again");
    }
}

/// Has the provider pay one refund. A repeated call pays nothing more, because `owed.id` is the idempotency key.
///
/// # Errors
/// The database or the provider does not answer; the refund stays pending.
pub(super) async fn settle_refund(app: &App, owed: PendingRefund) -> Result<()> {
    app.provider.refund(owed.id, owed.payment_id, owed.amount).await?;
    crash_point("refund.given_back");
    refunds::settle(&app.db, owed.id).await
}
