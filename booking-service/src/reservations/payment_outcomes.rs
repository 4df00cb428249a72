//! The changes of a payment other than its success: a lease that ends without a charge, and a charge whose outcome
//! comes later or too late.

use service_kit::http::error::Result;
use shared_contracts::booking_event::{BookingEvent, BookingEventType};
use shared_contracts::ids::{PaymentId, ReservationId, UserId};
use shared_contracts::money::Money;
use shared_contracts::transitions::{PaymentState, ReservationState};
use sqlx::{PgConnection, PgPool};

use super::events::{Changed, append_events};
use super::model::LEASE_SECONDS;
use super::refunds::PendingRefund;

/// How long one process may take to book seats again before another takes over. A booking takes less time than this.
const REBOOKING_SECONDS: f64 = 30.0;
/// How often the worker asks the provider about a charge that is processing, in case its notice was lost.
const ASK_AGAIN_SECONDS: f64 = 30.0;

/// A payment, and the state of the reservation that it is for.
#[derive(Debug)]
pub(crate) struct Payment {
    pub(crate) id: PaymentId,
    pub(crate) reservation_id: ReservationId,
    pub(crate) amount: Money,
    pub(crate) state: PaymentState,
    pub(crate) rebooked_as: Option<ReservationId>,
    pub(crate) user_id: UserId,
    pub(crate) reservation: ReservationState,
}

/// A payment whose lease has run out.
#[derive(Debug)]
pub(crate) struct StuckPayment {
    pub(crate) reservation_id: ReservationId,
    pub(crate) id: PaymentId,
    pub(crate) amount: Money,
}

/// Reads a payment and the state of its reservation.
///
/// # Errors
/// There is none, or the database failed.
pub(crate) async fn find(db: &PgPool, id: PaymentId) -> Result<Payment> {
    let payment = sqlx::query_as!(
        Payment,
        "select p.id, reservation_id, p.amount, p.status as state, rebooked_as, user_id, r.status as reservation
         from payments p join reservations r on r.id = p.reservation_id where p.id = $1",
        id as _,
    )
    .fetch_one(db)
    .await?;
    Ok(payment)
}

/// The reservation's payment that is captured, or that the provider is processing.
///
/// # Errors
/// The database failed.
pub(crate) async fn live(db: &PgPool, id: ReservationId) -> Result<Option<PaymentId>> {
    let payment = sqlx::query_scalar!(
        "select id from payments where reservation_id = $1 and status in ('processing', 'captured')",
        id as _,
    )
    .fetch_optional(db)
    .await?;
    Ok(payment)
}

/// `confirming → active`, and the payment becomes `payment`: `declined`, or `processing` while the provider works on
/// it. Returns false if the payment was settled before.
///
/// # Errors
/// The database failed.
pub(crate) async fn release_lease(
    db: &PgPool,
    id: ReservationId,
    key: PaymentId,
    payment: PaymentState,
) -> Result<bool> {
    let changed = sqlx::query!(
        "with told as (update payments set status = $3, updated_at = now() where id = $2 and status || '' = 'pending' returning reservation_id)
         update reservations set status = 'active', confirming_until = null, updated_at = now()
         where id = $1 and status || '' = 'confirming' and id in (select reservation_id from told)",
        id as _,
        key as _,
        payment as _,
    )
    .execute(db)
    .await?;
    Ok(changed.rows_affected() == 1)
}

/// `confirming | active → expired` for a captured charge that can't become tickets. Stores the refund. Returns `None`
/// if the payment was settled before.
///
/// # Errors
/// The database failed.
pub(crate) async fn void_and_refund(
    tx: &mut PgConnection,
    id: ReservationId,
    key: PaymentId,
) -> Result<Option<(Vec<BookingEvent>, PendingRefund)>> {
    let changed = sqlx::query_as!(
        Changed,
        r#"with lost as (
             update payments set status = 'voided', updated_at = now()
             where id = $2 and status || '' in ('pending', 'processing') and (reservation_id = $1 or rebooked_as = $1) returning id, amount
         ),
         owed as (insert into refunds (id, payment_id, amount) select id, id, amount from lost)
         update reservations set status = 'expired', confirming_until = null, sequence = sequence + 1, updated_at = now()
         where id = $1 and status || '' in ('active', 'confirming') and exists (select from lost)
         returning id, user_id, session_id, sequence, now() as "changed_at!", total_amount, currency"#,
        id as _,
        key as _,
    )
    .fetch_optional(&mut *tx)
    .await?;
    let Some(changed) = changed else {
        return Ok(None);
    };
    let refund = PendingRefund { id: key.as_uuid(), payment_id: key, amount: changed.total_amount };
    Ok(Some((append_events(tx, BookingEventType::Expired, &[changed]).await?, refund)))
}

/// Takes over confirmations whose lease has run out and renews the lease, so that no two workers settle one at the same
/// time.
///
/// # Errors
/// The database failed.
pub(crate) async fn take_over_leases(db: &PgPool, limit: i64) -> Result<Vec<StuckPayment>> {
    let taken = sqlx::query_as!(
        StuckPayment,
        "with stuck as materialized (
             select id from reservations where status = 'confirming' and confirming_until < now()
             order by confirming_until limit $1 for update skip locked
         ),
         taken as (
             update reservations r set confirming_until = now() + make_interval(secs => $2) from stuck where r.id = stuck.id returning r.id
         )
         select taken.id as reservation_id, p.id, p.amount
         from taken join payments p on p.reservation_id = taken.id and p.status = 'pending'",
        limit,
        LEASE_SECONDS,
    )
    .fetch_all(db)
    .await?;
    Ok(taken)
}

/// `processing → declined`. Changes nothing if the payment is in another state.
///
/// # Errors
/// The database failed.
pub(crate) async fn decline(db: &PgPool, id: PaymentId) -> Result<()> {
    sqlx::query!(
        "update payments set status = 'declined', updated_at = now() where id = $1 and status || '' = 'processing'",
        id as _,
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Claims the right to book the seats again under the id `again`; false if another attempt has it. Without the claim,
/// two attempts would take the seats from each other. The claim is committed before any outside effect, so that after a
/// crash a later attempt finds the new reservation by this id.
///
/// # Errors
/// The database failed.
pub(crate) async fn claim_rebooking(db: &PgPool, id: PaymentId, again: ReservationId) -> Result<bool> {
    let claimed = sqlx::query!(
        "update payments set rebooked_as = $2, rebooking_since = now(), updated_at = now()
         where id = $1 and status || '' = 'processing' and (rebooked_as is null or rebooking_since < now() - make_interval(secs => $3))",
        id as _,
        again as _,
        REBOOKING_SECONDS,
    )
    .execute(db)
    .await?;
    Ok(claimed.rows_affected() == 1)
}

/// `processing | declined → voided` for a charge that was captured but buys nothing. Stores the refund, once.
///
/// # Errors
/// The database failed.
pub(crate) async fn void_late(db: &PgPool, id: PaymentId) -> Result<Option<PendingRefund>> {
    let owed = sqlx::query_as!(
        PendingRefund,
        "with late as (
             update payments set status = 'voided', updated_at = now() where id = $1 and status || '' in ('processing', 'declined')
             returning id, amount
         )
         insert into refunds (id, payment_id, amount) select id, id, amount from late returning id, payment_id, amount",
        id as _,
    )
    .fetch_optional(db)
    .await?;
    Ok(owed)
}

/// Takes payments to ask the provider about: their reservation has ended, or there was no news for
/// [`ASK_AGAIN_SECONDS`]. Marks them as asked now.
///
/// # Errors
/// The database failed.
pub(crate) async fn take_processing(db: &PgPool, limit: i64) -> Result<Vec<PaymentId>> {
    let taken = sqlx::query_scalar!(
        "with due as materialized (
             select p.id from payments p join reservations r on r.id = p.reservation_id
             where p.status = 'processing'
               and (p.updated_at < now() - make_interval(secs => $2) or (r.status <> 'active' and r.updated_at > p.updated_at))
             order by p.updated_at limit $1 for update of p skip locked
         )
         update payments p set updated_at = now() from due where p.id = due.id returning p.id",
        limit,
        ASK_AGAIN_SECONDS,
    )
    .fetch_all(db)
    .await?;
    Ok(taken)
}
