//! Every way out of a reservation's states: confirm, cancel, expire, refund.
//!
//! Each is one conditional update together with its tickets, payment and event in one transaction; the event is published and
//! Redis is told afterwards. No call leaves the process between `begin` and `commit`.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use service_kit::auth::Caller;
use service_kit::error::{Error, Result};
use service_kit::extract::{ApiPath, OptionalJson};
use service_kit::{openapi, refusals};
use shared_contracts::booking_event::{BookingEvent, BookingEventType, SCHEMA_VERSION};
use shared_contracts::ids::{
    MessageId, PaymentId, ReservationId, SessionId, SessionSeatId, TicketId, UserId,
};
use shared_contracts::money::{Currency, Money};
use shared_contracts::problem::{Code, Problem};
use sqlx::{FromRow, PgConnection};
use utoipa::ToSchema;

use super::{Reservation, find, not_found};
use crate::app::App;
use crate::idempotency::{self, Claimed, IdempotencyKey};
use crate::outbox;
use crate::payments::ChargeOutcome;
use crate::reconcile::{self, HeldSeat};
use crate::tickets::{self, Ticket};

/// How long one confirmation may ask the provider before others may settle it: longer than any answer takes.
const LEASE_SECONDS: f64 = 30.0;

/// How to pay.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct ConfirmReservation {
    /// The payment provider's token for the customer's means of payment. With the mock provider, ids that begin with `pay_decline`,
    /// `pay_timeout_charged` or `pay_timeout_lost` do what they say; any other, or none, pays.
    #[schema(min_length = 1, max_length = 200, example = "pay_demo")]
    payment_id: Option<String>,
}

/// A paid reservation.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct ConfirmedReservation {
    /// The reservation.
    #[serde(flatten)]
    pub reservation: Reservation,
    /// Always `completed`.
    pub payment_status: String,
    /// The charge.
    pub payment_id: PaymentId,
    /// One for each seat; their QR codes are at `/api/v1/tickets/{id}`.
    pub tickets: Vec<Ticket>,
}

/// What all updates of this file return: enough for the event.
#[derive(Debug, FromRow)]
struct Changed {
    id: ReservationId,
    user_id: UserId,
    session_id: SessionId,
    sequence: i64,
    /// The database's time of the change.
    changed_at: DateTime<Utc>,
}

/// Why a reservation is not `active`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, sqlx::Type)]
#[sqlx(type_name = "text", rename_all = "snake_case")]
enum StoredStatus {
    Active,
    Confirming,
    Confirmed,
    Expired,
    Cancelled,
    Refunded,
}

refusals!(ConfirmRefusals: openapi::BODY, &[
    Code::Unauthenticated, Code::PaymentDeclined, Code::ReservationNotFound, Code::ReservationCancelled, Code::ReservationRefunded,
    Code::ConfirmationInProgress, Code::ReservationExpired, Code::PaymentUnavailable, Code::IdempotencyKeyInFlight, Code::IdempotencyKeyReused,
]);
refusals!(CancelRefusals: &[
    Code::Unauthenticated, Code::ReservationNotFound, Code::ReservationConfirmed, Code::ReservationCancelled, Code::ReservationRefunded,
    Code::ConfirmationInProgress, Code::ReservationExpired, Code::ValidationFailed,
]);
refusals!(RefundRefusals: &[Code::Unauthenticated, Code::TicketNotFound, Code::TicketUsed, Code::ValidationFailed]);

/// Pay for a reservation and get its tickets
///
/// Repeating it gives the same answer and charges nothing more; with an `Idempotency-Key` that is true of a refusal too.
/// The seats become `sold` at the Event Service a moment later.
#[utoipa::path(post, path = "/api/v1/reservations/{id}/confirm", tag = "2 Reservations", request_body = Option<ConfirmReservation>,
    params(("id" = ReservationId, Path),
        ("Idempotency-Key" = Option<String>, Header, description = "A fresh UUID for each new request; the same one when it is repeated", max_length = 255)),
    security(("user_id" = [])), responses((status = 200, description = "Paid", body = ConfirmedReservation), ConfirmRefusals))]
pub(crate) async fn confirm_reservation(
    State(app): State<App>,
    caller: Caller,
    key: IdempotencyKey,
    ApiPath(id): ApiPath<ReservationId>,
    OptionalJson(body): OptionalJson<ConfirmReservation>,
) -> Result<Response> {
    let attempt = PaymentId::new();
    let claim = match idempotency::claim(
        &app.db,
        caller.user_id,
        "confirm_reservation",
        key,
        attempt.as_uuid(),
        &(id, &body),
    )
    .await?
    {
        Claimed::Work(claim) => claim,
        Claimed::Answer(answer) => return Ok(answer),
    };
    // An attempt that died needs no undo: the reservation's own state tells whether it is paid, or is being asked about.
    let paid = match pay(&app, caller.user_id, id, attempt, body.payment_id.as_deref()).await {
        Ok(()) => confirmed(&app, caller.user_id, id).await,
        Err(error) => Err(error),
    };
    match paid {
        Ok(paid) => {
            claim
                .finish(&mut *app.db.acquire().await?, StatusCode::OK, &paid)
                .await?;
            Ok(Json(paid).into_response())
        }
        Err(error) => {
            claim.refused(&app.db, &error).await;
            Err(error)
        }
    }
}

/// The reservation is paid when this returns, by this call or by an earlier one.
async fn pay(
    app: &App,
    user_id: UserId,
    id: ReservationId,
    key: PaymentId,
    payment_id: Option<&str>,
) -> Result<()> {
    let Some(amount) = take_lease(app, user_id, id, key, payment_id).await? else {
        return match why_not_active(app, user_id, id).await? {
            StoredStatus::Confirmed => Ok(()),
            status => Err(refusal(status)),
        };
    };
    // An error is an unknown outcome too: the charge may have been made.
    let outcome = app.payments.charge(key, amount, payment_id).await.unwrap_or_else(|error| {
        tracing::warn!(error = format!("{error:#}"), payment_id = %key, "The payment provider gave no answer");
        ChargeOutcome::Unknown
    });
    let declined = || {
        let detail = "The payment was declined and nothing was charged. The seats stay held until the reservation expires; try another payment.";
        Err(Error::refused(Code::PaymentDeclined, detail))
    };
    if !conclude(app, id, key, outcome).await? {
        // The lease ran out meanwhile and the recovery settled it, by the provider's word.
        return match why_not_active(app, user_id, id).await? {
            StoredStatus::Confirmed => Ok(()),
            StoredStatus::Active => declined(),
            status => Err(refusal(status)),
        };
    }
    match outcome {
        ChargeOutcome::Captured => Ok(()),
        ChargeOutcome::Declined => declined(),
        ChargeOutcome::Unknown => {
            let detail = "The payment provider gave no answer. What became of the charge is being asked for: look at the reservation in half a minute. It will not be charged twice.";
            Err(Problem::new(Code::PaymentUnavailable, detail)
                .retry_after(LEASE_SECONDS as u32)
                .into())
        }
    }
}

/// `active → confirming`, with the payment's row, so that a crash from here on is settled by asking the provider.
async fn take_lease(
    app: &App,
    user_id: UserId,
    id: ReservationId,
    key: PaymentId,
    payment_id: Option<&str>,
) -> Result<Option<Money>> {
    let taken = sqlx::query_scalar(
        "with leased as (
             update reservations set status = 'confirming', confirming_until = now() + make_interval(secs => $5), updated_at = now()
             where id = $1 and user_id = $2 and status = 'active' and expiry_time > clock_timestamp()
             returning id, total_amount, currency
         )
         insert into payments (id, reservation_id, payment_id, amount, currency, status)
         select $3, id, $4, total_amount, currency, 'pending' from leased
         returning amount",
    )
    .bind(id)
    .bind(user_id)
    .bind(key)
    .bind(payment_id)
    .bind(LEASE_SECONDS)
    .fetch_optional(&app.db)
    .await?;
    Ok(taken)
}

/// `confirming → confirmed | active` by what the provider said; nothing while that is unknown. False when others settled it before.
pub(crate) async fn conclude(
    app: &App,
    id: ReservationId,
    key: PaymentId,
    outcome: ChargeOutcome,
) -> Result<bool> {
    match outcome {
        ChargeOutcome::Unknown => Ok(true),
        ChargeOutcome::Declined => give_lease_back(app, id, key).await,
        ChargeOutcome::Captured => complete(app, id, key).await,
    }
}

async fn give_lease_back(app: &App, id: ReservationId, key: PaymentId) -> Result<bool> {
    let changed = sqlx::query(
        "with declined as (update payments set status = 'declined', updated_at = now() where id = $2 and status = 'pending' returning reservation_id)
         update reservations set status = 'active', confirming_until = null, updated_at = now()
         where id = $1 and status = 'confirming' and id in (select reservation_id from declined)",
    )
    .bind(id)
    .bind(key)
    .execute(&app.db)
    .await?;
    Ok(changed.rows_affected() == 1)
}

async fn complete(app: &App, id: ReservationId, key: PaymentId) -> Result<bool> {
    let mut tx = app.db.begin().await?;
    let changed: Option<Changed> = sqlx::query_as(
        "with paid as (update payments set status = 'captured', updated_at = now() where id = $2 and status = 'pending' returning reservation_id)
         update reservations set status = 'confirmed', confirming_until = null, sequence = sequence + 1, updated_at = now()
         where id = $1 and status = 'confirming' and id in (select reservation_id from paid)
         returning id, user_id, session_id, sequence, now() as changed_at",
    )
    .bind(id)
    .bind(key)
    .fetch_optional(&mut *tx)
    .await?;
    let Some(changed) = changed else { return Ok(false) };
    let issued = tickets::issue(&mut tx, changed.id).await?;
    let event = BookingEvent {
        session_seat_ids: issued.iter().map(|ticket| ticket.session_seat_id).collect(),
        ticket_ids: issued.iter().map(|ticket| ticket.id).collect(),
        amount: Some(issued.iter().map(|ticket| ticket.price).sum()),
        currency: Some(currency_of(&mut tx, changed.id).await?),
        ..changed.event(BookingEventType::Confirmed)
    };
    outbox::append(&mut tx, std::slice::from_ref(&event)).await?;
    tx.commit().await?;
    announce_end(app, &event).await;
    Ok(true)
}

async fn confirmed(app: &App, user_id: UserId, id: ReservationId) -> Result<ConfirmedReservation> {
    let reservation = find(&app.db, id, user_id).await?;
    let payment_id =
        sqlx::query_scalar("select id from payments where reservation_id = $1 and status = 'captured'")
            .bind(id)
            .fetch_one(&app.db)
            .await?;
    let tickets = tickets::of_reservation(&app.db, id).await?;
    Ok(ConfirmedReservation {
        reservation,
        payment_status: "completed".into(),
        payment_id,
        tickets,
    })
}

/// Cancel an active reservation
///
/// Its seats are free at once.
#[utoipa::path(delete, path = "/api/v1/reservations/{id}", tag = "2 Reservations", params(("id" = ReservationId, Path)), security(("user_id" = [])),
    responses((status = 200, description = "Cancelled", body = Reservation), CancelRefusals))]
pub(crate) async fn cancel_reservation(
    State(app): State<App>,
    caller: Caller,
    ApiPath(id): ApiPath<ReservationId>,
) -> Result<Json<Reservation>> {
    let mut tx = app.db.begin().await?;
    let changed: Option<Changed> = sqlx::query_as(
        "update reservations set status = 'cancelled', sequence = sequence + 1, updated_at = now()
         where id = $1 and user_id = $2 and status = 'active' and expiry_time > clock_timestamp()
         returning id, user_id, session_id, sequence, now() as changed_at",
    )
    .bind(id)
    .bind(caller.user_id)
    .fetch_optional(&mut *tx)
    .await?;
    let Some(changed) = changed else {
        drop(tx);
        return Err(refusal(why_not_active(&app, caller.user_id, id).await?));
    };
    let seats = seats_of(&mut tx, &[id]).await?;
    let event = BookingEvent {
        session_seat_ids: seats.into_iter().map(|(_, seat)| seat).collect(),
        ..changed.event(BookingEventType::Cancelled)
    };
    outbox::append(&mut tx, std::slice::from_ref(&event)).await?;
    tx.commit().await?;
    // The event frees the seats in any case; this frees them before the customer hears of it.
    if let Err(error) = app
        .event_service
        .release(event.session_id, id, &event.session_seat_ids)
        .await
    {
        tracing::info!(%error, "The cancelled seats are freed by the event");
    }
    announce_end(&app, &event).await;
    find(&app.db, id, caller.user_id).await.map(Json)
}

/// Ends up to `limit` reservations whose time is over, oldest first, and returns how many.
///
/// Copies of the worker share the work: each skips what another has in hand.
///
/// # Errors
/// The database failed; none of this batch was ended.
pub async fn expire_due(app: &App, limit: u32) -> Result<usize> {
    let due = "select id from reservations where status = 'active' and expiry_time <= now() order by expiry_time limit $1 for update skip locked";
    let mut tx = app.db.begin().await?;
    let ids: Vec<ReservationId> = sqlx::query_scalar(due)
        .bind(i64::from(limit))
        .fetch_all(&mut *tx)
        .await?;
    let events = expire(&mut tx, &ids).await?;
    tx.commit().await?;
    for event in &events {
        announce_end(app, event).await;
    }
    Ok(events.len())
}

/// Ends those of `ids` whose time is over, for someone who wants their seats now.
///
/// # Errors
/// The database failed; none was ended.
pub(crate) async fn expire_these(app: &App, ids: &[ReservationId]) -> Result<()> {
    let mut tx = app.db.begin().await?;
    let events = expire(&mut tx, ids).await?;
    tx.commit().await?;
    for event in &events {
        announce_end(app, event).await;
    }
    Ok(())
}

async fn expire(tx: &mut PgConnection, ids: &[ReservationId]) -> Result<Vec<BookingEvent>> {
    let expired: Vec<Changed> = sqlx::query_as(
        "with due as materialized (select id from reservations where id = any($1) order by id for update)
         update reservations r set status = 'expired', sequence = sequence + 1, updated_at = now()
         from due where r.id = due.id and r.status = 'active' and r.expiry_time <= clock_timestamp()
         returning r.id, user_id, session_id, sequence, now() as changed_at",
    )
    .bind(ids)
    .fetch_all(&mut *tx)
    .await?;
    if expired.is_empty() {
        return Ok(Vec::new());
    }
    let seats = seats_of(tx, ids).await?;
    let events: Vec<BookingEvent> = expired
        .iter()
        .map(|changed| BookingEvent {
            session_seat_ids: seats
                .iter()
                .filter(|(owner, _)| *owner == changed.id)
                .map(|(_, seat)| *seat)
                .collect(),
            ..changed.event(BookingEventType::Expired)
        })
        .collect();
    outbox::append(tx, &events).await?;
    Ok(events)
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
         from unnest($1::uuid[], $2::uuid[]) as hold (id, session_id) order by id
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

/// Takes over confirmations whose lease has run out, for as long again, so that no two workers settle the same one at a time.
///
/// # Errors
/// The database failed.
pub(crate) async fn take_over_leases(
    app: &App,
    limit: i64,
) -> Result<Vec<(ReservationId, PaymentId, Money)>> {
    let taken = sqlx::query_as(
        "with stuck as materialized (
             select id from reservations where status = 'confirming' and confirming_until < now()
             order by confirming_until limit $1 for update skip locked
         ),
         taken as (
             update reservations r set confirming_until = now() + make_interval(secs => $2) from stuck where r.id = stuck.id returning r.id
         )
         select taken.id, p.id, p.amount from taken join payments p on p.reservation_id = taken.id and p.status = 'pending'",
    )
    .bind(limit)
    .bind(LEASE_SECONDS)
    .fetch_all(&app.db)
    .await?;
    Ok(taken)
}

/// Give a ticket back
///
/// The price is refunded once and the seat goes back on sale. Repeating it gives the same answer.
#[utoipa::path(post, path = "/api/v1/tickets/{id}/refund", tag = "3 Tickets", params(("id" = TicketId, Path)), security(("user_id" = [])),
    responses((status = 200, description = "Refunded", body = Ticket), RefundRefusals))]
pub(crate) async fn refund_ticket(
    State(app): State<App>,
    caller: Caller,
    ApiPath(id): ApiPath<TicketId>,
) -> Result<Json<Ticket>> {
    let mut tx = app.db.begin().await?;
    let Some(ticket) = tickets::refund(&mut tx, id, caller.user_id).await? else {
        drop(tx);
        let ticket = tickets::find(&app.db, id, caller.user_id).await?;
        return match ticket.status {
            tickets::TicketStatus::Refunded => Ok(Json(ticket)),
            _ => Err(Error::refused(
                Code::TicketUsed,
                "A ticket that has been used can't be given back.",
            )),
        };
    };
    let changed: Changed = sqlx::query_as(
        "update reservations r set sequence = sequence + 1, updated_at = now(),
             status = case when exists (select from tickets where reservation_id = r.id and status <> 'refunded') then 'confirmed' else 'refunded' end
         where id = $1 and status = 'confirmed' returning id, user_id, session_id, sequence, now() as changed_at",
    )
    .bind(ticket.reservation_id)
    .fetch_one(&mut *tx)
    .await?;
    let charge: PaymentId = sqlx::query_scalar(
        "insert into refunds (ticket_id, payment_id, amount)
         select $1, id, $2 from payments where reservation_id = $3 and status = 'captured' returning payment_id",
    )
    .bind(id)
    .bind(ticket.price)
    .bind(ticket.reservation_id)
    .fetch_one(&mut *tx)
    .await?;
    let event = BookingEvent {
        session_seat_ids: vec![ticket.session_seat_id],
        ticket_ids: vec![id],
        amount: Some(ticket.price),
        currency: Some(currency_of(&mut tx, ticket.reservation_id).await?),
        ..changed.event(BookingEventType::TicketRefunded)
    };
    outbox::append(&mut tx, std::slice::from_ref(&event)).await?;
    tx.commit().await?;
    announce_end(&app, &event).await;
    if let Err(error) = reconcile::settle_refund(&app, id, charge, ticket.price).await {
        tracing::warn!(%error, ticket_id = %id, "The provider will be asked for this refund again");
    }
    Ok(Json(ticket))
}

/// After the commit: the event may leave, and the seats need no lock any more.
async fn announce_end(app: &App, event: &BookingEvent) {
    app.outbox_nudge.notify_one();
    app.locks
        .release(event.session_id, &event.session_seat_ids, event.reservation_id)
        .await;
}

async fn seats_of(
    tx: &mut PgConnection,
    ids: &[ReservationId],
) -> Result<Vec<(ReservationId, SessionSeatId)>> {
    let sql = "select reservation_id, session_seat_id from reservation_items where reservation_id = any($1) order by id";
    Ok(sqlx::query_as(sql).bind(ids).fetch_all(tx).await?)
}

async fn currency_of(tx: &mut PgConnection, id: ReservationId) -> Result<Currency> {
    Ok(
        sqlx::query_scalar("select currency from reservations where id = $1")
            .bind(id)
            .fetch_one(tx)
            .await?,
    )
}

/// The state of a reservation that a conditional update passed over. One that is active has run out of time.
async fn why_not_active(app: &App, user_id: UserId, id: ReservationId) -> Result<StoredStatus> {
    let status: Option<StoredStatus> =
        sqlx::query_scalar("select status from reservations where id = $1 and user_id = $2")
            .bind(id)
            .bind(user_id)
            .fetch_optional(&app.db)
            .await?;
    status.ok_or_else(|| not_found(id))
}

fn refusal(status: StoredStatus) -> Error {
    let (code, detail) = match status {
        StoredStatus::Active | StoredStatus::Expired => (
            Code::ReservationExpired,
            "Its time is over and its seats are on sale again. Reserve anew.",
        ),
        StoredStatus::Confirming => (
            Code::ConfirmationInProgress,
            "A payment for it is under way. Look at the reservation in a moment.",
        ),
        StoredStatus::Confirmed => (
            Code::ReservationConfirmed,
            "It is paid. Give its tickets back instead.",
        ),
        StoredStatus::Cancelled => (
            Code::ReservationCancelled,
            "It was cancelled and its seats are on sale again. Reserve anew.",
        ),
        StoredStatus::Refunded => (
            Code::ReservationRefunded,
            "Its tickets were given back and its seats are on sale again. Reserve anew.",
        ),
    };
    let problem = Problem::new(code, detail);
    if status == StoredStatus::Confirming {
        problem.retry_after(2).into()
    } else {
        problem.into()
    }
}

impl Changed {
    fn event(&self, event_type: BookingEventType) -> BookingEvent {
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
