//! What becomes of the reservations of a session that was cancelled: the state machine's own ways out, for all of them.

use std::collections::BTreeSet;

use service_kit::database;
use service_kit::error::Result;
use shared_contracts::booking_event::BookingEventType;
use shared_contracts::ids::{ReservationId, SessionId};
use sqlx::PgPool;

use super::end::{Changed, announce_all, announce_end, give_back};
use crate::reservations::tickets;
use crate::state::App;

/// Those of `sessions` that have reservations which still have to be ended: active ones, those being paid, and tickets that admit.
pub(crate) async fn with_live_reservations(db: &PgPool, sessions: &BTreeSet<SessionId>) -> Result<BTreeSet<SessionId>> {
    let live: Vec<SessionId> = sqlx::query_scalar(
        "select session_id from unnest($1::uuid[]) as cancelled (session_id)
         where exists (
             select from reservations r
             where r.session_id = cancelled.session_id and status in ('active', 'confirming', 'confirmed')
               and (status <> 'confirmed' or exists (select from tickets t where t.reservation_id = r.id and t.status = 'active'))
         )",
    )
    .bind(sessions.iter().copied().collect::<Vec<_>>())
    .fetch_all(db)
    .await?;
    Ok(live.into_iter().collect())
}

/// Ends up to `limit` active reservations of the session and as many paid ones, and returns how many. One that is being paid is left.
///
/// Copies of the worker share the work: each skips what another has in hand.
pub(crate) async fn end_reservations(app: &App, session_id: SessionId, limit: i64) -> Result<usize> {
    Ok(cancel_active(app, session_id, limit).await? + refund_paid(app, session_id, limit).await?)
}

async fn cancel_active(app: &App, session_id: SessionId, limit: i64) -> Result<usize> {
    let mut tx = database::begin(&app.db).await?;
    let cancelled: Vec<Changed> = sqlx::query_as(
        "with live as materialized (
             select id from reservations where session_id = $1 and status = 'active' order by id limit $2 for update skip locked
         )
         update reservations r set status = 'cancelled', sequence = sequence + 1, updated_at = now()
         from live where r.id = live.id
         returning r.id, user_id, session_id, sequence, now() as changed_at, total_amount, currency",
    )
    .bind(session_id)
    .bind(limit)
    .fetch_all(&mut *tx)
    .await?;
    let events = announce_all(&mut tx, BookingEventType::Cancelled, &cancelled).await?;
    tx.commit().await?;
    announce_end(app, &events).await;
    Ok(events.len())
}

/// The money is owed from here on; the same round of reconciliation has the provider give it back.
async fn refund_paid(app: &App, session_id: SessionId, limit: i64) -> Result<usize> {
    let mut tx = database::begin(&app.db).await?;
    let paid: Vec<ReservationId> = sqlx::query_scalar(
        "select id from reservations r
         where session_id = $1 and status = 'confirmed'
           and exists (select from tickets t where t.reservation_id = r.id and t.status = 'active')
         order by id limit $2 for no key update skip locked",
    )
    .bind(session_id)
    .bind(limit)
    .fetch_all(&mut *tx)
    .await?;
    if paid.is_empty() {
        return Ok(0);
    }
    let refunded = tickets::refund_all(&mut tx, &paid).await?;
    let (events, _) = give_back(&mut tx, &refunded).await?;
    tx.commit().await?;
    announce_end(app, &events).await;
    Ok(events.len())
}
