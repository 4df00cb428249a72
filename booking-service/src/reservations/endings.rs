//! The endings of a reservation other than payment: cancelled, expired, abandoned, refunded.
//!
//! Each is one conditional update together with its tickets, its refunds and its event. The caller begins and commits
//! the transaction.

use service_kit::http::error::{Error, Result};
use shared_contracts::booking_event::{BookingEvent, BookingEventType};
use shared_contracts::ids::{ReservationId, SessionId, UserId};
use shared_contracts::money::Money;
use sqlx::{PgConnection, PgPool};

use super::events::{Changed, append_events};
use super::model::{SessionHold, owned};
use super::refunds::PendingRefund;
use super::tickets::Ticket;
use crate::outbox;

/// `active → cancelled` if the reservation is this owner's (anyone's if `owner` is `None`) and its time is not over.
/// Returns `None` if nothing was changed.
///
/// # Errors
/// The database failed.
pub(crate) async fn cancel(
    tx: &mut PgConnection,
    id: ReservationId,
    owner: Option<UserId>,
) -> Result<Option<BookingEvent>> {
    let changed: Option<Changed> = sqlx::query_as(concat!(
        "update reservations set status = 'cancelled', sequence = sequence + 1, updated_at = now()
             where id = $1 and status || '' = 'active' and expiry_time > clock_timestamp() and ",
        owned!(),
        " returning id, user_id, session_id, sequence, now() as changed_at, total_amount, currency"
    ))
    .bind(id)
    .bind(owner)
    .fetch_optional(&mut *tx)
    .await?;
    Ok(append_events(tx, BookingEventType::Cancelled, changed.as_slice()).await?.pop())
}

/// Locks up to `limit` reservations whose time is over, oldest first. It skips those that another process has locked.
///
/// # Errors
/// The database failed.
pub(crate) async fn lock_due(tx: &mut PgConnection, limit: u32) -> Result<Vec<ReservationId>> {
    let due = sqlx::query_scalar!(
        "select id from reservations where status = 'active' and expiry_time <= now() order by expiry_time limit $1 for update skip locked",
        i64::from(limit),
    )
    .fetch_all(tx)
    .await?;
    Ok(due)
}

/// `active → expired` for those of `ids` whose time is over.
///
/// # Errors
/// The database failed.
pub(crate) async fn expire(tx: &mut PgConnection, ids: &[ReservationId]) -> Result<Vec<BookingEvent>> {
    let expired = sqlx::query_as!(
        Changed,
        r#"with due as materialized (
             select id from reservations where id = any($1) and status || '' = 'active' and expiry_time <= clock_timestamp()
             order by id for update
         )
         update reservations r set status = 'expired', sequence = sequence + 1, updated_at = now()
         from due where r.id = due.id and r.status || '' = 'active' and r.expiry_time <= clock_timestamp()
         returning r.id, user_id, session_id, sequence, now() as "changed_at!", total_amount, currency"#,
        ids as _,
    )
    .fetch_all(&mut *tx)
    .await?;
    append_events(tx, BookingEventType::Expired, &expired).await
}

/// Prevents bookings from writing their reservations for these holds: writes each row first, expired and without an
/// owner. Waits for a booking that is committing at the moment, which keeps its row.
///
/// # Errors
/// The database failed.
pub(crate) async fn abandon_unwritten(db: &PgPool, holds: &[SessionHold]) -> Result<()> {
    let abandoned = sqlx::query_scalar!(
        "insert into reservations (id, user_id, session_id, status, booking_time, expiry_time, seats_count, total_amount, currency)
         select distinct on (id) id, '00000000-0000-0000-0000-000000000000', session_id, 'expired', now() - interval '1 second', now(), 1, 0, ''
         from unnest($1::uuid[], $2::uuid[]) as hold (id, session_id)
         where not exists (select from reservations r where r.id = hold.id) order by id
         on conflict (id) do nothing returning id",
        holds.iter().map(|held| held.hold.reservation_id).collect::<Vec<_>>() as _,
        holds.iter().map(|held| held.session_id).collect::<Vec<_>>() as _,
    )
    .fetch_all(db)
    .await?;
    for id in abandoned {
        tracing::warn!(reservation_id = %id, "A booking died before it wrote its reservation; its seats are freed");
    }
    Ok(())
}

/// Applies the effects of refunded tickets, in the transaction that refunded them. A reservation without any other
/// ticket becomes `refunded`, the refunds are stored, and the events are in the outbox.
///
/// # Errors
/// A ticket's reservation is not confirmed and paid, or the database failed.
pub(crate) async fn refund_tickets(
    tx: &mut PgConnection,
    refunded: &[Ticket],
) -> Result<(Vec<BookingEvent>, Vec<PendingRefund>)> {
    let mut owners: Vec<ReservationId> = refunded.iter().map(|ticket| ticket.reservation_id).collect();
    owners.sort_unstable();
    owners.dedup();
    let changed = sqlx::query_as!(
        Changed,
        r#"update reservations r set sequence = sequence + 1, updated_at = now(),
             status = case when exists (select from tickets where reservation_id = r.id and status <> 'refunded') then 'confirmed' else 'refunded' end
         where id = any($1) and status || '' = 'confirmed'
         returning id, user_id, session_id, sequence, now() as "changed_at!", total_amount, currency"#,
        owners as _,
    )
    .fetch_all(&mut *tx)
    .await?;
    let owed = sqlx::query_as!(
        PendingRefund,
        "insert into refunds (id, payment_id, amount)
         select t.id, p.id, t.price from tickets t join payments p on p.reservation_id = t.reservation_id and p.status = 'captured'
         where t.id = any($1) returning id, payment_id, amount",
        refunded.iter().map(|ticket| ticket.id).collect::<Vec<_>>() as _,
    )
    .fetch_all(&mut *tx)
    .await?;
    if (changed.len(), owed.len()) != (owners.len(), refunded.len()) {
        return Err(Error::Internal(anyhow::anyhow!(
            "tickets of {owners:?} are not of confirmed and paid reservations"
        )));
    }
    let events: Vec<BookingEvent> = changed
        .iter()
        .map(|changed| {
            let own = || refunded.iter().filter(|ticket| ticket.reservation_id == changed.id);
            BookingEvent {
                session_seat_ids: own().map(|ticket| ticket.session_seat_id).collect(),
                ticket_ids: own().map(|ticket| ticket.id).collect(),
                amount: Money::total(own().map(|ticket| ticket.price)),
                currency: Some(changed.currency.clone()),
                ..changed.event(BookingEventType::TicketRefunded)
            }
        })
        .collect();
    outbox::append(tx, &events).await?;
    Ok((events, owed))
}

/// `active → cancelled` for up to `limit` reservations of a session. It skips those that another process has locked.
///
/// # Errors
/// The database failed.
pub(crate) async fn cancel_of_session(
    tx: &mut PgConnection,
    session_id: SessionId,
    limit: i64,
) -> Result<Vec<BookingEvent>> {
    let cancelled = sqlx::query_as!(
        Changed,
        r#"with live as materialized (
             select id from reservations where session_id = $1 and status = 'active' order by id limit $2 for update skip locked
         )
         update reservations r set status = 'cancelled', sequence = sequence + 1, updated_at = now()
         from live where r.id = live.id
         returning r.id, user_id, session_id, sequence, now() as "changed_at!", total_amount, currency"#,
        session_id as _,
        limit,
    )
    .fetch_all(&mut *tx)
    .await?;
    append_events(tx, BookingEventType::Cancelled, &cancelled).await
}

/// Locks up to `limit` confirmed reservations of a session with tickets that admit. It skips those that another process
/// has locked.
///
/// # Errors
/// The database failed.
pub(crate) async fn lock_paid_of_session(
    tx: &mut PgConnection,
    session_id: SessionId,
    limit: i64,
) -> Result<Vec<ReservationId>> {
    let paid = sqlx::query_scalar!(
        "select id from reservations r
         where session_id = $1 and status = 'confirmed'
           and exists (select from tickets t where t.reservation_id = r.id and t.status = 'active')
         order by id limit $2 for no key update skip locked",
        session_id as _,
        limit,
    )
    .fetch_all(tx)
    .await?;
    Ok(paid)
}
