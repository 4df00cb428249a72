//! Settles payments whose outcome the provider decides later, in time or too late.
//!
//! ```text
//!  provider's answer   reservation active   expired                                      cancelled
//!  captured            confirmed            booked again and confirmed, if its seats     the money is refunded
//!                                           are still free; else the money is refunded
//!  not captured        stays until it ends  the payment is declined
//!  still processing    nothing              the charge is cancelled
//! ```
//!
//! A notice is only the reason to ask: the provider's answer decides. So notices may be lost, repeated, late or in the
//! wrong order, and this workflow may run at any time and any number of times.

use service_kit::http::error::{Error, Result};
use service_kit::process::crash::crash_point;
use shared_contracts::ids::{PaymentId, ReservationId};
use shared_contracts::transitions::{PaymentState, ReservationState};

use super::confirm::{Concluded, complete, conclude};
use super::create::book_again;
use super::refunds::refund_now;
use crate::payments::provider::ChargeOutcome;
use crate::reservations::model::find;
use crate::reservations::payment_outcomes::{self, Payment};
use crate::state::App;

/// Asks the provider about a payment, and commits what its answer requires.
///
/// # Errors
/// The provider, the database or the Event Service does not answer; the next call continues where this one ended.
pub(crate) async fn follow_up(app: &App, id: PaymentId) -> Result<()> {
    match follow_up_once(app, id).await? {
        // The reservation ended between the read and the update, so its new state needs another step.
        Concluded::AlreadySettled => follow_up_once(app, id).await.map(drop),
        _ => Ok(()),
    }
}

async fn follow_up_once(app: &App, id: PaymentId) -> Result<Concluded> {
    let payment = payment_outcomes::find(&app.db, id).await?;
    let outcome = app.provider.look_up(id).await?;
    match (payment.state, payment.reservation) {
        // The request that charges has not received the provider's answer yet.
        (PaymentState::Pending, _) => conclude(app, payment.reservation_id, id, outcome).await,
        (PaymentState::Processing, ReservationState::Active) => match outcome {
            ChargeOutcome::Captured => conclude(app, payment.reservation_id, id, outcome).await,
            ChargeOutcome::Declined => decline(app, id).await,
            ChargeOutcome::Processing | ChargeOutcome::Unknown => Ok(Concluded::Processing),
        },
        (PaymentState::Processing, _) => match app.provider.cancel(id, payment.amount).await? {
            ChargeOutcome::Captured => came_too_late(app, payment).await,
            _ => decline(app, id).await,
        },
        (PaymentState::Declined, _) if outcome == ChargeOutcome::Captured => void_and_refund(app, id).await,
        (PaymentState::Declined | PaymentState::Captured | PaymentState::Voided, _) => Ok(Concluded::AlreadySettled),
    }
}

async fn decline(app: &App, id: PaymentId) -> Result<Concluded> {
    payment_outcomes::decline(&app.db, id).await?;
    Ok(Concluded::NotCharged)
}

/// Handles a charge that was captured after its reservation had ended. If the reservation expired, the buyer still gets
/// the seats if they are free.
async fn came_too_late(app: &App, payment: Payment) -> Result<Concluded> {
    if payment.reservation != ReservationState::Expired {
        return void_and_refund(app, payment.id).await;
    }
    // An earlier attempt booked the seats again, and died before it could confirm them.
    if let Some(again) = payment.rebooked_as
        && let Ok(again) = find(&app.db, again, Some(payment.user_id)).await
        && again.time_remaining_seconds > 0
    {
        return complete(app, again, payment.id).await;
    }
    let again = ReservationId::new();
    if !payment_outcomes::claim_rebooking(&app.db, payment.id, again).await? {
        return Ok(Concluded::Processing);
    }
    let ended = find(&app.db, payment.reservation_id, Some(payment.user_id)).await?;
    match book_again(app, again, ended).await {
        Ok(again) => {
            tracing::info!(payment_id = %payment.id, expired = %payment.reservation_id, again = %again.id, "A payment came too late and its seats were still free");
            crash_point("late_payment.booked_again");
            complete(app, again, payment.id).await
        }
        Err(Error::Refused(problem)) if problem.status < 500 => {
            tracing::info!(payment_id = %payment.id, code = %problem.code, "A payment came too late and its seats are gone");
            void_and_refund(app, payment.id).await
        }
        Err(error) => Err(error),
    }
}

/// Voids a charge that was captured but buys nothing, and refunds it. A repeated call refunds nothing more.
async fn void_and_refund(app: &App, id: PaymentId) -> Result<Concluded> {
    if let Some(owed) = payment_outcomes::void_late(&app.db, id).await? {
        refund_now(app, owed).await;
    }
    Ok(Concluded::SeatLost)
}
