//! The steps of a payment, in order, each with what settles it after a crash:
//!
//! | step | where | after a crash |
//! | --- | --- | --- |
//! | 0 claim the `Idempotency-Key` | own database | the next request takes over |
//! | 1 lease: `active → confirming`, and the payment's row | own database | the provider is asked |
//! | 2 charge, once for each payment id | payment provider | the provider is asked |
//! | 3a captured: `confirmed`, with tickets and event | own database | the provider is asked |
//! | 3b declined or processing: back to `active` | own database | the provider is asked |
//! | 3c captured, but a seat has another ticket: `expired` | own database | the refund is pending |
//! | 4 keep the answer, tell the relay, remove the seat locks | own database, Redis | a repeat reads the reservation |
//!
//! "The provider is asked" once the lease has run out: `reconcile.rs` asks what became of the charge and does step 3
//! by the answer. Step 1 and 3a are batches (`reservations/payment.rs`); an outcome that comes later than step 3b
//! comes by notice (`late_payment.rs`).
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

use super::after_commit::{announce_end, free_now};
use super::refunds::refund_now;
use crate::idempotency::{self, Claimed, IdempotencyKey};
use crate::metrics::MeasuredStep;
use crate::payments::ChargeOutcome;
use crate::reservations::model::{self, LEASE_SECONDS, Reservation, Standing, find, refusal};
use crate::reservations::payment::{Completion, LeaseRequest, Paid};
use crate::reservations::payment_outcomes;
use crate::reservations::tickets::{self, Ticket};
use crate::state::App;

/// How to pay.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct ConfirmReservation {
    /// The payment provider's token for the customer's means of payment. With the mock provider, ids that begin with `pay_decline`,
    /// `pay_timeout_charged` or `pay_timeout_lost` do what they say, `pay_async` is decided by a notice to the webhook; any other, or
    /// none, pays.
    #[schema(min_length = 1, max_length = 200, example = "pay_demo")]
    payment_id: Option<String>,
}

/// Whether a reservation is paid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PaymentStatus {
    /// The money is taken.
    Completed,
    /// The provider works on it; look at the reservation in a while.
    Processing,
}

/// A reservation that is paid, or about to be.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct ConfirmedReservation {
    /// The reservation as it is after this call.
    #[serde(flatten)]
    pub reservation: Reservation,
    /// Whether the money is taken.
    pub payment_status: PaymentStatus,
    /// Identifies the payment; also the provider's idempotency key.
    pub payment_id: PaymentId,
    /// One for each seat once it is paid; their QR codes are at `/api/v1/tickets/{id}`.
    pub tickets: Vec<Ticket>,
}

problems!(ConfirmRefusals: openapi::BODY, &[
    Code::Unauthenticated, Code::PaymentDeclined, Code::ReservationNotFound, Code::ReservationCancelled, Code::ReservationRefunded,
    Code::ConfirmationInProgress, Code::SeatUnavailable, Code::ReservationExpired, Code::PaymentUnavailable, Code::IdempotencyKeyInFlight, Code::IdempotencyKeyReused,
]);

/// Pay for a reservation and get its tickets
///
/// Repeating it gives the same answer and charges nothing more; with an `Idempotency-Key` that is true of a refusal too.
/// The seats become `sold` at the Event Service a moment later. A provider that takes its time is answered with `202`: the
/// reservation becomes `confirmed` when the provider's notice comes, and asking again tells how far it is.
#[utoipa::path(post, path = "/api/v1/reservations/{id}/confirm", tag = "2 Reservations", request_body = Option<ConfirmReservation>,
    params(("id" = ReservationId, Path),
        ("Idempotency-Key" = Option<String>, Header, description = "A fresh UUID for each new request; the same one when it is repeated", max_length = 255)),
    security(("user_id" = []), ("bearer" = [])), responses((status = 200, description = "Paid", body = ConfirmedReservation, links(
        ("ticket" = (operation_id = "get_ticket", parameters(("id" = "$response.body#/tickets/0/id")))),
        ("qr" = (operation_id = "get_ticket_qr", parameters(("id" = "$response.body#/tickets/0/id")))),
        ("refund" = (operation_id = "refund_ticket", parameters(("id" = "$response.body#/tickets/0/id")))),
        ("tickets" = (operation_id = "list_tickets", parameters(("user_id" = "$response.body#/user_id")))),
    )), (status = 202, description = "The payment provider works on it", body = ConfirmedReservation), ConfirmRefusals))]
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
    // An attempt that died needs no undo: the reservation's own state tells whether it is paid, or is being asked about.
    let paid = if claim.previous_was_answered {
        // Its payment is the provider's matter, or was: there is only to be told what has become of it.
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
                // It is another key's, and this one has tried nothing yet.
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

/// The paid reservation, whether this call paid for it or an earlier one.
async fn pay(
    app: &App,
    owner: Option<UserId>,
    id: ReservationId,
    key: PaymentId,
    payment_id: Option<&str>,
) -> Result<ConfirmedReservation> {
    let request = LeaseRequest { id, owner, key, payment_id: payment_id.map(str::to_owned) };
    let Some(reservation) = app.metrics.step(MeasuredStep::Lease, app.payment_batches.lease(request)).await? else {
        // If it could be paid now, a payment had it when the lease was asked for, and has come to nothing since.
        return paid_before(app, owner, id, refusal(ReservationState::Confirming)).await;
    };
    let amount = reservation.total_amount;
    crash_point("confirm.leased");
    // An error is an unknown outcome too: the charge may have been made.
    let charging = async { app.payments.charge(key, amount, payment_id).await.map_err(Error::Internal) };
    let outcome = app.metrics.step(MeasuredStep::Charge, charging).await.unwrap_or_else(|error| {
        let error = anyhow::Error::from(error);
        tracing::warn!(error = format!("{error:#}"), payment_id = %key, "The payment provider gave no answer");
        ChargeOutcome::Unknown
    });
    app.metrics.charged(outcome);
    crash_point("confirm.charged");
    let concluded = match outcome {
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
            let detail = "A seat of this reservation has another owner. That must not happen and is being looked into; your money is given back.";
            Err(Error::refused(Code::SeatUnavailable, detail))
        }
        // The lease ran out meanwhile and the recovery settled it, by the provider's word.
        Concluded::AlreadySettled => paid_before(app, owner, id, declined()).await,
    }
}

/// What an earlier call, or the recovery, has made of the reservation; `unpaid` when it still waits for a payment.
async fn paid_before(
    app: &App,
    owner: Option<UserId>,
    id: ReservationId,
    unpaid: Error,
) -> Result<ConfirmedReservation> {
    let Standing { state, in_time } = model::standing(&app.db, id, owner).await?;
    let live = payment_outcomes::live(&app.db, id).await?;
    match (state, live) {
        (ReservationState::Confirmed, Some(key)) => {
            Ok(answer(find(&app.db, id, owner).await?, key, tickets::of_reservation(&app.db, id).await?))
        }
        (ReservationState::Active, Some(key)) => Ok(answer(find(&app.db, id, owner).await?, key, Vec::new())),
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
    let detail = "The payment provider gave no answer. What became of the charge is being asked for: look at the reservation in half a minute. It will not be charged twice.";
    Problem::new(Code::PaymentUnavailable, detail).retry_after(LEASE_SECONDS as u32)
}

/// What became of a confirmation.
#[derive(Debug)]
pub(crate) enum Concluded {
    /// `confirmed`, with its tickets.
    Paid(Box<Paid>),
    /// `active` again: nothing was charged.
    NotCharged,
    /// `active` again, and the provider will tell what becomes of the charge.
    Processing,
    /// Still `confirming`: nobody knows what became of the charge.
    Unknown,
    /// The money is owed back: the reservation has ended, and its seats can't be had any more.
    SeatLost,
    /// Others had settled it before.
    AlreadySettled,
}

/// `confirming → confirmed | active | expired`, or `active → confirmed` for a payment that the provider took its time with, by what the
/// provider said; nothing while that is unknown.
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

/// `active | confirming → confirmed`: the provider has the money.
pub(super) async fn complete(app: &App, reservation: Reservation, key: PaymentId) -> Result<Concluded> {
    let id = reservation.id;
    match app.metrics.step(MeasuredStep::Complete, app.payment_batches.complete(reservation, key)).await? {
        Completion::Paid(paid) => {
            announce_end(app, std::slice::from_ref(&paid.event)).await;
            Ok(Concluded::Paid(paid))
        }
        Completion::SeatLost => void_and_refund(app, id, key).await,
        Completion::AlreadySettled => Ok(Concluded::AlreadySettled),
    }
}

/// `confirming | active → expired` for a charge that was captured but can't become tickets.
async fn void_and_refund(app: &App, id: ReservationId, key: PaymentId) -> Result<Concluded> {
    let mut tx = database::begin(&app.db).await?;
    let Some((events, owed)) = payment_outcomes::void_and_refund(&mut tx, id, key).await? else {
        return Ok(Concluded::AlreadySettled);
    };
    tx.commit().await?;
    free_now(app, &events).await;
    tracing::error!(reservation_id = %id, payment_id = %key, "A paid seat has another ticket; the money is given back, and someone must look");
    announce_end(app, &events).await;
    refund_now(app, owed).await;
    Ok(Concluded::SeatLost)
}
