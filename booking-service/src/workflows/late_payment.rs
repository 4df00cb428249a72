//! Payments that the provider takes its time with: what follows when it says how they ended, in time or too late.
//!
//! ```text
//!  the provider says   reservation active   expired                                      cancelled
//!  captured            confirmed            booked again and confirmed, if its seats     the money is given back
//!                                           are still free; else the money is given back
//!  not captured        stays until it ends  the payment has ended too
//!  still working       nothing              the charge is called off
//! ```
//!
//! A notice is only the reason to ask: what counts is what the provider says when it is asked. So notices may be lost, doubled,
//! late or in the wrong order, and this may run at any time, any number of times.

use service_kit::crash::crash_point;
use service_kit::error::{Error, Result};
use shared_contracts::ids::{PaymentId, ReservationId, UserId};
use shared_contracts::money::Money;
use shared_contracts::transitions::{PaymentState, ReservationState};
use sqlx::FromRow;
use uuid::Uuid;

use super::confirm::{Concluded, complete, conclude};
use super::create::book_again;
use super::end::settle_now;
use crate::payments::ChargeOutcome;
use crate::reservations::model::find;
use crate::state::App;

/// How long one process may work on booking again before another takes over: longer than that takes.
const REBOOKING_SECONDS: f64 = 30.0;
/// How often the provider is asked about a charge that it works on, in case that its notice is lost.
const ASK_AGAIN_SECONDS: f64 = 30.0;

/// A payment and what became of the reservation that it is for.
#[derive(Debug, FromRow)]
struct Payment {
    id: PaymentId,
    reservation_id: ReservationId,
    amount: Money,
    #[sqlx(rename = "status")]
    state: PaymentState,
    rebooked_as: Option<ReservationId>,
    user_id: UserId,
    #[sqlx(rename = "reservation_status")]
    reservation: ReservationState,
}

/// Asks the provider about a payment, and commits what follows.
///
/// # Errors
/// The provider, the database or the Event Service does not answer; the next call goes on where this one ended.
pub(crate) async fn follow_up(app: &App, id: PaymentId) -> Result<()> {
    match follow_up_once(app, id).await? {
        // The reservation ended between the look at it and the change, so there is another thing to do now.
        Concluded::ByOthers => follow_up_once(app, id).await.map(drop),
        _ => Ok(()),
    }
}

async fn follow_up_once(app: &App, id: PaymentId) -> Result<Concluded> {
    let payment: Payment = sqlx::query_as(
        "select p.id, reservation_id, p.amount, p.status, rebooked_as, user_id, r.status as reservation_status
         from payments p join reservations r on r.id = p.reservation_id where p.id = $1",
    )
    .bind(id)
    .fetch_one(&app.db)
    .await?;
    let outcome = app.payments.look_up(id).await?;
    match (payment.state, payment.reservation) {
        // The request that charges has not heard the answer yet.
        (PaymentState::Pending, _) => conclude(app, payment.reservation_id, id, outcome).await,
        (PaymentState::Processing, ReservationState::Active) => match outcome {
            ChargeOutcome::Captured => conclude(app, payment.reservation_id, id, outcome).await,
            ChargeOutcome::Declined => decline(app, id).await,
            ChargeOutcome::Processing | ChargeOutcome::Unknown => Ok(Concluded::Processing),
        },
        (PaymentState::Processing, _) => match app.payments.cancel(id, payment.amount).await? {
            ChargeOutcome::Captured => came_too_late(app, payment).await,
            _ => decline(app, id).await,
        },
        (PaymentState::Declined, _) if outcome == ChargeOutcome::Captured => give_back(app, id).await,
        (PaymentState::Declined | PaymentState::Captured | PaymentState::Voided, _) => Ok(Concluded::ByOthers),
    }
}

async fn decline(app: &App, id: PaymentId) -> Result<Concluded> {
    sqlx::query(
        "update payments set status = 'declined', updated_at = now() where id = $1 and status || '' = 'processing'",
    )
    .bind(id)
    .execute(&app.db)
    .await?;
    Ok(Concluded::NotCharged)
}

/// The money is there and the reservation is not. Who let it expire gets the seats all the same, if nobody else has them.
async fn came_too_late(app: &App, payment: Payment) -> Result<Concluded> {
    if payment.reservation != ReservationState::Expired {
        return give_back(app, payment.id).await;
    }
    // Booked again by an attempt that died before it could confirm.
    if let Some(again) = payment.rebooked_as
        && let Ok(again) = find(&app.db, again, Some(payment.user_id)).await
        && again.time_remaining_seconds > 0
    {
        return complete(app, again, payment.id).await;
    }
    let again = ReservationId::new();
    if !claim_rebooking(app, payment.id, again).await? {
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
            give_back(app, payment.id).await
        }
        Err(error) => Err(error),
    }
}

/// One at a time books again: else two attempts would take the seats from each other. Made before the first outside effect, the
/// new id also tells a crash's survivors what to look for.
async fn claim_rebooking(app: &App, id: PaymentId, again: ReservationId) -> Result<bool> {
    let claimed = sqlx::query(
        "update payments set rebooked_as = $2, rebooking_since = now(), updated_at = now()
         where id = $1 and status || '' = 'processing' and (rebooked_as is null or rebooking_since < now() - make_interval(secs => $3))",
    )
    .bind(id)
    .bind(again)
    .bind(REBOOKING_SECONDS)
    .execute(&app.db)
    .await?;
    Ok(claimed.rows_affected() == 1)
}

/// What was captured for nothing is owed from here on, once.
async fn give_back(app: &App, id: PaymentId) -> Result<Concluded> {
    let owed: Option<(Uuid, PaymentId, Money)> = sqlx::query_as(
        "with late as (
             update payments set status = 'voided', updated_at = now() where id = $1 and status || '' in ('processing', 'declined')
             returning id, amount
         )
         insert into refunds (id, payment_id, amount) select id, id, amount from late returning id, payment_id, amount",
    )
    .bind(id)
    .fetch_optional(&app.db)
    .await?;
    if let Some((refund, charge, amount)) = owed {
        settle_now(app, refund, charge, amount).await;
    }
    Ok(Concluded::SeatLost)
}

/// Payments that the provider works on and has to be asked about: their reservation has ended, or no notice came for a while.
///
/// # Errors
/// The database failed.
pub(crate) async fn take_processing(app: &App, limit: i64) -> Result<Vec<PaymentId>> {
    let taken = sqlx::query_scalar(
        "with due as materialized (
             select p.id from payments p join reservations r on r.id = p.reservation_id
             where p.status = 'processing'
               and (p.updated_at < now() - make_interval(secs => $2) or (r.status <> 'active' and r.updated_at > p.updated_at))
             order by p.updated_at limit $1 for update of p skip locked
         )
         update payments p set updated_at = now() from due where p.id = due.id returning p.id",
    )
    .bind(limit)
    .bind(ASK_AGAIN_SECONDS)
    .fetch_all(&app.db)
    .await?;
    Ok(taken)
}
