//! Ends the reservations of a cancelled session: cancels active ones, and refunds the tickets of paid ones.

use std::collections::BTreeSet;

use service_kit::http::error::Result;
use service_kit::postgres::database;
use shared_contracts::ids::SessionId;
use sqlx::PgPool;

use super::after_commit::announce_settled;
use crate::reservations::{endings, tickets};
use crate::state::App;

/// Those of `sessions` that still have reservations to end: active ones, ones being paid, and ones with tickets that
/// admit.
pub(crate) async fn with_live_reservations(db: &PgPool, sessions: &BTreeSet<SessionId>) -> Result<BTreeSet<SessionId>> {
    let live: Vec<SessionId> = sqlx::query_scalar!(
        r#"select session_id as "session_id!: _" from unnest($1::uuid[]) as cancelled (session_id)
         where exists (
             select from reservations r
             where r.session_id = cancelled.session_id and status in ('active', 'confirming', 'confirmed')
               and (status <> 'confirmed' or exists (select from tickets t where t.reservation_id = r.id and t.status = 'active'))
         )"#,
        sessions.iter().copied().collect::<Vec<_>>() as _,
    )
    .fetch_all(db)
    .await?;
    Ok(live.into_iter().collect())
}

/// Ends up to `limit` active reservations of the session and as many paid ones, and returns how many. It leaves a
/// reservation that is being paid.
///
/// Several workers share the work: each skips the rows that another has locked.
pub(crate) async fn end_reservations(app: &App, session_id: SessionId, limit: i64) -> Result<usize> {
    Ok(cancel_active(app, session_id, limit).await? + refund_paid(app, session_id, limit).await?)
}

async fn cancel_active(app: &App, session_id: SessionId, limit: i64) -> Result<usize> {
    let mut tx = database::begin(&app.db).await?;
    let events = endings::cancel_of_session(&mut tx, session_id, limit).await?;
    tx.commit().await?;
    announce_settled(app, &events).await;
    Ok(events.len())
}

/// Stores the refunds. The same round of reconciliation has the provider pay them.
async fn refund_paid(app: &App, session_id: SessionId, limit: i64) -> Result<usize> {
    let mut tx = database::begin(&app.db).await?;
    let paid = endings::lock_paid_of_session(&mut tx, session_id, limit).await?;
    if paid.is_empty() {
        return Ok(0);
    }
    let refunded = tickets::refund_all(&mut tx, &paid).await?;
    let (events, _) = endings::refund_tickets(&mut tx, &refunded).await?;
    tx.commit().await?;
    announce_settled(app, &events).await;
    Ok(events.len())
}
