//! The ways out of a reservation's states beside payment: cancel, expire, refund; and what they share with it.
//!
//! Each is one conditional update together with its tickets, payment and event in one transaction; the event is published and
//! Redis is told afterwards. No call leaves the process between `begin` and `commit`.

use std::collections::{BTreeMap, HashMap};

use axum::Json;
use axum::extract::State;
use chrono::{DateTime, Utc};
use service_kit::auth::Caller;
use service_kit::crash::crash_point;
use service_kit::database;
use service_kit::error::{Error, Result};
use service_kit::extract::ApiPath;
use service_kit::{refusals, traces};
use shared_contracts::booking_event::{BookingEvent, BookingEventType, SCHEMA_VERSION};
use shared_contracts::ids::{MessageId, PaymentId, ReservationId, SessionId, SessionSeatId, TicketId, UserId};
use shared_contracts::money::{Currency, Money};
use shared_contracts::problem::Code;
use shared_contracts::seat_api::Hold;
use shared_contracts::transitions::{ReservationState, ReservationStep, Transition};
use sqlx::{FromRow, PgConnection};
use uuid::Uuid;

use super::reconcile::{self, HeldSeat};
use crate::outbox;
use crate::reservations::model::{Reservation, find, not_found, owned, refusal};
use crate::reservations::tickets::{self, Ticket};
use crate::seat_locks::held_by;
use crate::state::App;

/// What all updates of this file return: enough for the event.
#[derive(Debug, FromRow)]
pub(crate) struct Changed {
    pub(crate) id: ReservationId,
    pub(crate) user_id: UserId,
    pub(crate) session_id: SessionId,
    pub(crate) sequence: i64,
    /// The database's time of the change.
    pub(crate) changed_at: DateTime<Utc>,
    pub(crate) total_amount: Money,
    pub(crate) currency: Currency,
}

refusals!(CancelRefusals: &[
    Code::Unauthenticated, Code::ReservationNotFound, Code::ReservationConfirmed, Code::ReservationCancelled, Code::ReservationRefunded,
    Code::ConfirmationInProgress, Code::ReservationExpired, Code::ValidationFailed,
]);
refusals!(RefundRefusals: &[Code::Unauthenticated, Code::TicketNotFound, Code::TicketUsed, Code::ValidationFailed]);

/// Cancel an active reservation
///
/// Its seats are free at once.
#[utoipa::path(delete, path = "/api/v1/reservations/{id}", tag = "2 Reservations", params(("id" = ReservationId, Path)), security(("user_id" = []), ("bearer" = [])),
    responses((status = 200, description = "Cancelled", body = Reservation), CancelRefusals))]
pub(crate) async fn cancel_reservation(
    State(app): State<App>,
    caller: Caller,
    ApiPath(id): ApiPath<ReservationId>,
) -> Result<Json<Reservation>> {
    let mut tx = database::begin(&app.db).await?;
    let changed: Option<Changed> = sqlx::query_as(concat!(
        "update reservations set status = 'cancelled', sequence = sequence + 1, updated_at = now()
             where id = $1 and status || '' = 'active' and expiry_time > clock_timestamp() and ",
        owned!(),
        " returning id, user_id, session_id, sequence, now() as changed_at, total_amount, currency"
    ))
    .bind(id)
    .bind(caller.confined_to())
    .fetch_optional(&mut *tx)
    .await?;
    let Some(changed) = changed else {
        drop(tx);
        return Err(why_refused(&app, caller.confined_to(), id, ReservationStep::Cancel).await?);
    };
    let events = announce_all(&mut tx, BookingEventType::Cancelled, &[changed]).await?;
    tx.commit().await?;
    crash_point("cancel.committed");
    for event in &events {
        // The event frees the seats in any case; this frees them before the customer hears of it.
        if let Err(error) = app.event_service.release(event.session_id, id, &event.session_seat_ids).await {
            tracing::info!(%error, "The cancelled seats are freed by the event");
        }
    }
    announce_end(&app, &events).await;
    find(&app.db, id, caller.confined_to()).await.map(Json)
}

/// Ends up to `limit` reservations whose time is over, oldest first, and returns how many.
///
/// Copies of the worker share the work: each skips what another has in hand.
///
/// # Errors
/// The database failed; none of this batch was ended.
pub async fn expire_due(app: &App, limit: u32) -> Result<usize> {
    let due = "select id from reservations where status = 'active' and expiry_time <= now() order by expiry_time limit $1 for update skip locked";
    let mut tx = database::begin(&app.db).await?;
    let ids: Vec<ReservationId> = sqlx::query_scalar(due).bind(i64::from(limit)).fetch_all(&mut *tx).await?;
    if ids.is_empty() {
        return Ok(0);
    }
    let events = traces::root("reservations.expire", async {
        let events = expire(&mut tx, &ids).await?;
        crash_point("expire.ending");
        tx.commit().await?;
        crash_point("expire.committed");
        free_now(app, &events).await;
        Ok(events)
    });
    let events = events.await?;
    announce_end(app, &events).await;
    Ok(events.len())
}

/// Frees the seats of expired reservations. Their events do so in any case; this does it for many at a time, and while the broker is away.
pub(super) async fn free_now(app: &App, events: &[BookingEvent]) {
    let holds_of = |event: &BookingEvent| {
        let reservation_id = event.reservation_id;
        event.session_seat_ids.clone().into_iter().map(move |session_seat_id| Hold { reservation_id, session_seat_id })
    };
    let holds: Vec<Hold> = events.iter().flat_map(holds_of).collect();
    if let Err(error) = app.event_service.release_all(&holds).await {
        tracing::info!(%error, seats = holds.len(), "These seats are freed by their events");
    }
}

/// Ends those of `ids` whose time is over, for someone who wants their seats now.
///
/// # Errors
/// The database failed; none was ended.
pub(crate) async fn expire_these(app: &App, ids: &[ReservationId]) -> Result<()> {
    let mut tx = database::begin(&app.db).await?;
    let events = expire(&mut tx, ids).await?;
    tx.commit().await?;
    announce_end(app, &events).await;
    Ok(())
}

async fn expire(tx: &mut PgConnection, ids: &[ReservationId]) -> Result<Vec<BookingEvent>> {
    let expired: Vec<Changed> = sqlx::query_as(
        "with due as materialized (
             select id from reservations where id = any($1) and status || '' = 'active' and expiry_time <= clock_timestamp()
             order by id for update
         )
         update reservations r set status = 'expired', sequence = sequence + 1, updated_at = now()
         from due where r.id = due.id and r.status || '' = 'active' and r.expiry_time <= clock_timestamp()
         returning r.id, user_id, session_id, sequence, now() as changed_at, total_amount, currency",
    )
    .bind(ids)
    .fetch_all(&mut *tx)
    .await?;
    announce_all(tx, BookingEventType::Expired, &expired).await
}

/// Makes it impossible that a booking still writes its reservation for one of these holds: the row is written here first, expired
/// and without an owner. A booking that is just committing is waited for, and keeps its row.
///
/// # Errors
/// The database failed.
pub(crate) async fn abandon_unwritten(app: &App, holds: &[HeldSeat]) -> Result<()> {
    let abandoned: Vec<ReservationId> = sqlx::query_scalar(
        "insert into reservations (id, user_id, session_id, status, booking_time, expiry_time, seats_count, total_amount, currency)
         select distinct on (id) id, '00000000-0000-0000-0000-000000000000', session_id, 'expired', now() - interval '1 second', now(), 1, 0, ''
         from unnest($1::uuid[], $2::uuid[]) as hold (id, session_id)
         where not exists (select from reservations r where r.id = hold.id) order by id
         on conflict (id) do nothing returning id",
    )
    .bind(holds.iter().map(|hold| hold.reservation_id).collect::<Vec<_>>())
    .bind(holds.iter().map(|hold| hold.session_id).collect::<Vec<_>>())
    .fetch_all(&app.db)
    .await?;
    for id in abandoned {
        tracing::warn!(reservation_id = %id, "A booking died before it wrote its reservation; its seats are freed");
    }
    Ok(())
}

/// Give a ticket back
///
/// The price is refunded once and the seat goes back on sale. Repeating it gives the same answer.
#[utoipa::path(post, path = "/api/v1/tickets/{id}/refund", tag = "3 Tickets", params(("id" = TicketId, Path)), security(("user_id" = []), ("bearer" = [])),
    responses((status = 200, description = "Refunded", body = Ticket), RefundRefusals))]
pub(crate) async fn refund_ticket(
    State(app): State<App>,
    caller: Caller,
    ApiPath(id): ApiPath<TicketId>,
) -> Result<Json<Ticket>> {
    let mut tx = database::begin(&app.db).await?;
    let Some(ticket) = tickets::refund(&mut tx, id, caller.confined_to()).await? else {
        drop(tx);
        let ticket = tickets::find(&app.db, id, caller.confined_to()).await?;
        return match ticket.status {
            tickets::TicketStatus::Refunded => Ok(Json(ticket)),
            _ => Err(Error::refused(Code::TicketUsed, "A ticket that has been used can't be given back.")),
        };
    };
    let (events, owed) = give_back(&mut tx, std::slice::from_ref(&ticket)).await?;
    tx.commit().await?;
    crash_point("refund.committed");
    announce_end(&app, &events).await;
    for (refund, charge, amount) in owed {
        settle_now(&app, refund, charge, amount).await;
    }
    Ok(Json(ticket))
}

/// A refund's id, the charge that it is of, and the sum.
pub(super) type Owed = (Uuid, PaymentId, Money);

/// What refunded tickets entail, in the transaction that refunded them: a reservation without any other ticket is `refunded`, the
/// money is owed, and the events are in the outbox.
pub(super) async fn give_back(tx: &mut PgConnection, refunded: &[Ticket]) -> Result<(Vec<BookingEvent>, Vec<Owed>)> {
    let mut owners: Vec<ReservationId> = refunded.iter().map(|ticket| ticket.reservation_id).collect();
    owners.sort_unstable();
    owners.dedup();
    let changed: Vec<Changed> = sqlx::query_as(
        "update reservations r set sequence = sequence + 1, updated_at = now(),
             status = case when exists (select from tickets where reservation_id = r.id and status <> 'refunded') then 'confirmed' else 'refunded' end
         where id = any($1) and status || '' = 'confirmed'
         returning id, user_id, session_id, sequence, now() as changed_at, total_amount, currency",
    )
    .bind(&owners)
    .fetch_all(&mut *tx)
    .await?;
    let owed: Vec<Owed> = sqlx::query_as(
        "insert into refunds (id, payment_id, amount)
         select t.id, p.id, t.price from tickets t join payments p on p.reservation_id = t.reservation_id and p.status = 'captured'
         where t.id = any($1) returning id, payment_id, amount",
    )
    .bind(refunded.iter().map(|ticket| ticket.id).collect::<Vec<_>>())
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

/// What is owed is written; the provider is asked at once, and again by reconciliation if it does not answer.
pub(super) async fn settle_now(app: &App, refund: Uuid, charge: PaymentId, amount: Money) {
    if let Err(error) = reconcile::settle_refund(app, refund, charge, amount).await {
        tracing::warn!(%error, %refund, "The provider will be asked for this refund again");
    }
}

/// After the commit: the events may leave, and the seats need no lock any more.
pub(super) async fn announce_end(app: &App, events: &[BookingEvent]) {
    for event in events {
        app.metrics.ended(event.event_type);
    }
    app.outbox_nudge.notify_one();
    let mut held: BTreeMap<SessionId, Vec<(SessionSeatId, ReservationId)>> = BTreeMap::new();
    for event in events {
        held.entry(event.session_id).or_default().extend(held_by(event.reservation_id, &event.session_seat_ids));
    }
    for (session, held) in held {
        app.locks.release(session, &held).await;
    }
}

/// Writes the events of reservations that have ended with all their seats, in the transaction that ended them.
pub(super) async fn announce_all(
    tx: &mut PgConnection,
    event_type: BookingEventType,
    ended: &[Changed],
) -> Result<Vec<BookingEvent>> {
    if ended.is_empty() {
        return Ok(Vec::new());
    }
    let sql =
        "select reservation_id, session_seat_id from reservation_items where reservation_id = any($1) order by id";
    let ids: Vec<ReservationId> = ended.iter().map(|changed| changed.id).collect();
    let mut seats: HashMap<ReservationId, Vec<SessionSeatId>> = HashMap::new();
    for (owner, seat) in sqlx::query_as(sql).bind(ids).fetch_all(&mut *tx).await? {
        seats.entry(owner).or_default().push(seat);
    }
    let events: Vec<BookingEvent> = ended
        .iter()
        .map(|changed| BookingEvent {
            session_seat_ids: seats.remove(&changed.id).unwrap_or_default(),
            ..changed.event(event_type)
        })
        .collect();
    outbox::append(tx, &events).await?;
    Ok(events)
}

/// Why a conditional update passed over the reservation of this owner; anyone's, when none is given.
async fn why_refused(app: &App, owner: Option<UserId>, id: ReservationId, step: ReservationStep) -> Result<Error> {
    let found: Option<(ReservationState, bool)> = sqlx::query_as(concat!(
        "select status, expiry_time > clock_timestamp() from reservations where id = $1 and ",
        owned!()
    ))
    .bind(id)
    .bind(owner)
    .fetch_optional(&app.db)
    .await?;
    let (state, in_time) = found.ok_or_else(|| not_found(id))?;
    Ok(match state.after(step, in_time) {
        // It would be taken now, so what the update met was a payment that has come to nothing since.
        Transition::Changed(_) => refusal(ReservationState::Confirming),
        Transition::AlreadySo | Transition::Refused => refusal(state),
    })
}

impl Changed {
    pub(crate) fn event(&self, event_type: BookingEventType) -> BookingEvent {
        BookingEvent {
            event_id: MessageId::new(),
            event_type,
            schema_version: SCHEMA_VERSION,
            occurred_at: self.changed_at,
            reservation_id: self.id,
            user_id: self.user_id,
            session_id: self.session_id,
            session_seat_ids: Vec::new(),
            sequence: self.sequence,
            ticket_ids: Vec::new(),
            amount: None,
            currency: None,
        }
    }
}
