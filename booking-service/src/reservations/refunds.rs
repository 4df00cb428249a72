//! Refunds: money that is owed to a customer. The change that causes one writes it; the payment provider settles it
//! afterwards.

use service_kit::http::error::Result;
use shared_contracts::ids::PaymentId;
use shared_contracts::money::Money;
use sqlx::PgPool;
use uuid::Uuid;

/// A refund that the provider has not confirmed: it was not asked yet, or did not answer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PendingRefund {
    /// The idempotency key towards the provider: the ticket's id, or the payment's id if the whole charge is refunded.
    pub(crate) id: Uuid,
    /// The charge that the provider refunds, in part or in full.
    pub(crate) payment_id: PaymentId,
    pub(crate) amount: Money,
}

/// Up to `limit` pending refunds with ids above `after`, in the order of their ids.
///
/// # Errors
/// The database failed.
pub(crate) async fn pending(db: &PgPool, after: Uuid, limit: i64) -> Result<Vec<PendingRefund>> {
    let refunds = sqlx::query_as!(
        PendingRefund,
        "select id, payment_id, amount from refunds where status = 'pending' and id > $1 order by id limit $2",
        after,
        limit,
    )
    .fetch_all(db)
    .await?;
    Ok(refunds)
}

/// `pending → settled`: the provider has paid the refund.
///
/// # Errors
/// The database failed.
pub(crate) async fn settle(db: &PgPool, id: Uuid) -> Result<()> {
    sqlx::query!("update refunds set status = 'settled', updated_at = now() where id = $1", id).execute(db).await?;
    Ok(())
}
