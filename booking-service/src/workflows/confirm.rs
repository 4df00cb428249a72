//! The steps of a payment, in order, each with what settles it after a crash:
//!
//! | step | writes | after a crash |
//! | --- | --- | --- |
//! | 0 claim the `Idempotency-Key`; nothing without one | `idempotency_keys` | the next request takes over |
//! | 1 lease: `active → confirming` for 30 s, in one statement | `reservations`, `payments` | the provider is asked |
//! | 2 charge, once for each payment id, outside any transaction | the provider | the provider is asked |
//! | 3a captured: `confirmed`, in one transaction | `payments`, `reservations`, `tickets`, `outbox` | the provider is asked |
//! | 3b declined or processing: back to `active` | `payments`, `reservations` | the provider is asked |
//! | 3c captured, but a seat has another ticket: `expired` | `payments`, `reservations`, `outbox` | the refund is pending |
//! | 4 wake the relay, remove the seat locks, store the answer | Redis, `idempotency_keys` | a repeat reads the reservation |
//!
//! The event of step 3a makes the Event Service sell the seats. The relay publishes it from the outbox.
//!
//! "The provider is asked" means that `reconcile.rs` asks it for the outcome of the charge once the lease has run out,
//! and does step 3 by the answer. Steps 1 and 3a run in batches (`reservations/payment.rs`). An outcome that comes
//! later than step 3b comes by notice (`late_payment.rs`).
//!
//! No call leaves the process between `begin` and `commit`. Cancel, expire and this workflow exclude each other by the
//! lease.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use service_kit::auth::Caller;
use service_kit::http::error::{Error, Result};
use service_kit::http::extract::{ApiPath, OptionalJson};
use service_kit::http::openapi;
use service_kit::postgres::database;
use service_kit::problems;
use service_kit::process::crash::crash_point;
use shared_contracts::ids::{PaymentId, ReservationId, UserId};
use shared_contracts::problem::{Code, Problem};
use shared_contracts::transitions::{PaymentState, ReservationState};
use utoipa::ToSchema;

use super::after_commit::{announce_settled, free_now};
use super::refunds::refund_now;
use crate::idempotency::{self, Claimed, IdempotencyKey};
use crate::metrics::MeasuredStep;
use crate::payments::provider::ChargeOutcome;
use crate::reservations::model::{self, LEASE_SECONDS, Reservation, Standing, find, refusal, session_over};
use crate::reservations::payment::{Completion, LeaseRequest, Paid};
use crate::reservations::payment_outcomes;
use crate::reservations::tickets::{self, Ticket};
use crate::state::App;

/// The means of payment for a reservation.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ConfirmReservation {
    /// The payment provider's token for the customer's means of payment. With the mock provider, an id that begins with
    /// `pay_decline` is declined. `pay_timeout_charged` gets no answer and is charged; `pay_timeout_lost` gets no
    /// answer and is not charged. `pay_async` waits for a notice to the webhook. Any other id, or none, pays.
    #[schema(min_length = 1, max_length = 200, example = "pay_demo")]
    payment_id: Option<String>,
}

/// Whether a reservation is paid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PaymentStatus {
    /// The provider has captured the money.
    Completed,
    /// The provider is processing the charge. Read the reservation again later.
    Processing,
}

/// A reservation that is paid, or whose charge the provider is processing.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct ConfirmedReservation {
    /// The reservation as it is after this call.
    #[serde(flatten)]
    pub reservation: Reservation,
    /// Whether the provider has captured the money.
    pub payment_status: PaymentStatus,
    /// Identifies the payment; also the provider's idempotency key.
    pub payment_id: PaymentId,
    /// One ticket for each seat once the reservation is paid; empty before. Their QR codes are at
    /// `/api/v1/tickets/{id}`.
    pub tickets: Vec<Ticket>,
}

problems!(ConfirmRefusals: openapi::BODY, &[
    Code::Unauthenticated, Code::PaymentDeclined, Code::ReservationNotFound, Code::ReservationCancelled, Code::ReservationRefunded,
    Code::ConfirmationInProgress, Code::SeatUnavailable, Code::SessionOver, Code::ReservationExpired, Code::PaymentUnavailable, Code::IdempotencyKeyInFlight, Code::IdempotencyKeyReused,
]);

/// Pay for a reservation and get its tickets
///
/// Repeating the request gives the same answer and charges nothing more; with an `Idempotency-Key`, that is true of a
/// refusal too. The seats become `sold` at the Event Service a moment later. If the provider does not decide at once,
/// the answer is `202`: the reservation becomes `confirmed` when the provider's notice comes. Repeat the request to get
/// its state.
#[utoipa::path(post, path = "/api/v1/reservations/{id}/confirm", tag = "2 Reservations", request_body = Option<ConfirmReservation>,
    params(("id" = ReservationId, Path),
        ("Idempotency-Key" = Option<String>, Header, description = "A fresh UUID for each new request; the same one when it is repeated", max_length = 255)),
    security(("user_id" = []), ("bearer" = [])), responses((status = 200, description = "Paid", body = ConfirmedReservation, links(
        ("ticket" = (operation_id = "get_ticket", parameters(("id" = "$response.body#/tickets/0/id")))),
        ("qr" = (operation_id = "get_ticket_qr", parameters(("id" = "$response.body#/tickets/0/id")))),
        ("refund" = (operation_id = "refund_ticket", parameters(("id" = "$response.body#/tickets/0/id")))),
        ("tickets" = (operation_id = "list_tickets", parameters(("user_id" = "$response.body#/user_id")))),
    )), (status = 202, description = "The payment provider is processing the charge", body = ConfirmedReservation), ConfirmRefusals))]
pub(crate) async fn confirm_reservation(
    State(app): State<App>,
    caller: Caller,
    key: IdempotencyKey,
    ApiPath(id): ApiPath<ReservationId>,
    OptionalJson(body): OptionalJson<ConfirmReservation>,
) -> Result<Response> {
    let attempt = PaymentId::new();
    let claim =
        match idempotency::claim(&app.db, caller.user_id, "confirm_reservation", key, attempt.as_uuid(), &(id, &body))
            .await?
        {
            Claimed::Work(claim) => claim,
            Claimed::Answer(answer) => return Ok(answer),
        };
    // An attempt that died needs no undo: the reservation's state shows whether it is paid, or its charge is being
    // settled.
    let paid = if claim.previous_was_answered {
        // The earlier attempt got `202`, so the provider decides on its payment. This request only reports the outcome.
        paid_before(&app, caller.confined_to(), id, declined()).await
    } else {
        pay(&app, caller.confined_to(), id, attempt, body.payment_id.as_deref()).await
    };
    app.metrics.confirmed(&paid, |answer| answer.payment_status == PaymentStatus::Processing);
    match paid {
        Ok(processing) if processing.payment_status == PaymentStatus::Processing => {
            let payment = processing.payment_id.as_uuid();
            match claim.previous_attempt {
                Some(earlier) if claim.previous_was_answered => claim.hand_over(&app.db, earlier).await,
                earlier if payment == attempt.as_uuid() || earlier == Some(payment) => {
                    claim.hand_over(&app.db, payment).await
                }
                // The payment belongs to another key, and this request has charged nothing.
                _ => claim.release(&app.db).await?,
            }
            Ok((StatusCode::ACCEPTED, Json(processing)).into_response())
        }
        Ok(paid) => {
            if claim.has_key() {
                claim.complete(&mut *app.db.acquire().await?, StatusCode::OK, &paid).await?;
            }
            Ok(Json(paid).into_response())
        }
        Err(error) => {
            claim.reject(&app.db, &error).await;
            Err(error)
        }
    }
}

/// Pays for the reservation. If an earlier call has paid for it, returns that result.
async fn pay(
    app: &App,
    owner: Option<UserId>,
    id: ReservationId,
    key: PaymentId,
    payment_id: Option<&str>,
) -> Result<ConfirmedReservation> {
    let request = LeaseRequest { id, owner, key, payment_id: payment_id.map(str::to_owned) };
    let Some(reservation) = app.metrics.step(MeasuredStep::Lease, app.payment_batches.lease(request)).await? else {
        // If the reservation can be paid now, another payment had the lease a moment ago and has failed since.
        return paid_before(app, owner, id, refusal(ReservationState::Confirming)).await;
    };
    let amount = reservation.total_amount;
    crash_point("confirm.leased");
    // An error is an unknown outcome too: the charge may have been made.
    let charging = async { app.provider.charge(key, amount, payment_id).await.map_err(Error::Internal) };
    let outcome = app.metrics.step(MeasuredStep::Charge, charging).await.unwrap_or_else(|error| {
        let error = anyhow::Error::from(error);
        tracing::warn!(error = format!("{error:#}"), payment_id = %key, "The payment provider gave no answer");
        ChargeOutcome::Unknown
    });
    app.metrics.charged(outcome);
    crash_point("confirm.charged");
    let concluded = match outcome {
        // As in `conclude`, but without reading the reservation again.
        ChargeOutcome::Captured => complete(app, reservation, key).await,
        _ => conclude(app, id, key, outcome).await,
    };
    let concluded =
        concluded.map_err(|error| Error::Unavailable { problem: Box::new(unknown_charge()), cause: error.into() })?;
    match concluded {
        Concluded::Paid(paid) => Ok(answer(paid.reservation, key, paid.tickets)),
        Concluded::NotCharged => Err(declined()),
        Concluded::Processing => Ok(answer(find(&app.db, id, owner).await?, key, Vec::new())),
        Concluded::Unknown => Err(unknown_charge().into()),
        Concluded::SeatLost => {
            let detail = "A seat of this reservation has another owner. This is our error and has been logged; your money is being refunded.";
            Err(Error::refused(Code::SeatUnavailable, detail))
        }
        Concluded::SessionOver => Err(session_over("The session has ended meanwhile; your money is being refunded.")),
        // The lease ran out meanwhile, and reconciliation settled the payment by the provider's answer.
        Concluded::AlreadySettled => paid_before(app, owner, id, declined()).await,
    }
}

/// The result of an earlier call or of reconciliation. Returns the error `unpaid` if the reservation still waits for a
/// payment.
async fn paid_before(
    app: &App,
    owner: Option<UserId>,
    id: ReservationId,
    unpaid: Error,
) -> Result<ConfirmedReservation> {
    let Standing { state, in_time, is_over } = model::standing(&app.db, id, owner).await?;
    let live = payment_outcomes::live(&app.db, id).await?;
    match (state, live) {
        (ReservationState::Confirmed, Some(key)) => {
            Ok(answer(find(&app.db, id, owner).await?, key, tickets::of_reservation(&app.db, id).await?))
        }
        (ReservationState::Active, Some(key)) => Ok(answer(find(&app.db, id, owner).await?, key, Vec::new())),
        (ReservationState::Active | ReservationState::Expired, None) if is_over => {
            Err(session_over("The session is over, so nothing of it can be paid any more. Nothing was charged."))
        }
        (ReservationState::Active, None) if in_time => Err(unpaid),
        (state, _) => Err(refusal(state)),
    }
}

fn answer(reservation: Reservation, payment_id: PaymentId, tickets: Vec<Ticket>) -> ConfirmedReservation {
    let payment_status = if tickets.is_empty() { PaymentStatus::Processing } else { PaymentStatus::Completed };
    ConfirmedReservation { reservation, payment_status, payment_id, tickets }
}

fn declined() -> Error {
    let detail = "The payment was declined and nothing was charged. The seats stay held until the reservation expires; try another payment.";
    Error::refused(Code::PaymentDeclined, detail)
}

fn unknown_charge() -> Problem {
    let detail = "The payment provider gave no answer. The service is asking it for the outcome of the charge: read the reservation again in 30 seconds. You will not be charged twice.";
    Problem::new(Code::PaymentUnavailable, detail).retry_after(LEASE_SECONDS as u32)
}

/// The result of a confirmation.
#[derive(Debug)]
pub(crate) enum Concluded {
    /// `confirmed`, with its tickets.
    Paid(Box<Paid>),
    /// `active` again: nothing was charged.
    NotCharged,
    /// `active` again; the provider will send a notice of the charge's outcome.
    Processing,
    /// Still `confirming`: the outcome of the charge is not known yet.
    Unknown,
    /// The reservation has ended and its seats are lost, so the money is refunded.
    SeatLost,
    /// The money came after the session's end, so it is refunded.
    SessionOver,
    /// Another process had settled the payment before.
    AlreadySettled,
}

/// Applies the provider's answer: `confirming → confirmed | active | expired`, or `active → confirmed` for a payment
/// that the provider decided later. Changes nothing while the outcome is unknown.
pub(crate) async fn conclude(
    app: &App,
    id: ReservationId,
    key: PaymentId,
    outcome: ChargeOutcome,
) -> Result<Concluded> {
    match outcome {
        ChargeOutcome::Unknown => Ok(Concluded::Unknown),
        ChargeOutcome::Declined => release_lease(app, id, key, PaymentState::Declined).await,
        ChargeOutcome::Processing => release_lease(app, id, key, PaymentState::Processing).await,
        ChargeOutcome::Captured => complete(app, find(&app.db, id, None).await?, key).await,
    }
}

async fn release_lease(app: &App, id: ReservationId, key: PaymentId, payment: PaymentState) -> Result<Concluded> {
    let is_released = payment_outcomes::release_lease(&app.db, id, key, payment).await?;
    Ok(match (is_released, payment) {
        (true, PaymentState::Processing) => Concluded::Processing,
        (true, _) => Concluded::NotCharged,
        _ => Concluded::AlreadySettled,
    })
}

/// `active | confirming → confirmed`: the provider has captured the money.
pub(super) async fn complete(app: &App, reservation: Reservation, key: PaymentId) -> Result<Concluded> {
    let id = reservation.id;
    match app.metrics.step(MeasuredStep::Complete, app.payment_batches.complete(reservation, key)).await? {
        Completion::Paid(paid) => {
            announce_settled(app, std::slice::from_ref(&paid.event)).await;
            Ok(Concluded::Paid(paid))
        }
        Completion::SeatLost => void_and_refund(app, id, key, Concluded::SeatLost).await,
        Completion::SessionOver => void_and_refund(app, id, key, Concluded::SessionOver).await,
        Completion::AlreadySettled => Ok(Concluded::AlreadySettled),
    }
}

/// `confirming | active → expired` for a captured charge that buys nothing, because of `reason`. Refunds the charge.
async fn void_and_refund(app: &App, id: ReservationId, key: PaymentId, reason: Concluded) -> Result<Concluded> {
    let mut tx = database::begin(&app.db).await?;
    let Some((events, owed)) = payment_outcomes::void_and_refund(&mut tx, id, key).await? else {
        return Ok(Concluded::AlreadySettled);
    };
    tx.commit().await?;
    free_now(app, &events).await;
    if matches!(reason, Concluded::SessionOver) {
        tracing::info!(reservation_id = %id, payment_id = %key, "A payment came after the session's end, so the money is refunded");
    } else {
        tracing::error!(reservation_id = %id, payment_id = %key, "A paid seat has another ticket, so the money is refunded; investigate");
    }
    announce_settled(app, &events).await;
    refund_now(app, owed).await;
    Ok(reason)
}
