//! The steps of a booking, in order, each with its undo:
//!
//! | step | where | undo |
//! | --- | --- | --- |
//! | 0 price tiers and the clock, at most a second old (`tier_cache.rs`) | own database | none needed |
//! | 1 seat locks, all or none; they stay after success | Redis | unlock |
//! | 2 check that the session is on sale and the seats are free | Event Service | none needed |
//! | 3 read the prices | Event Service | none needed |
//! | 4 hold, all or none | Event Service | release |
//! | 5 write the reservation, its items and the stored answer (`reservations/insert.rs`) | own database | none: the last step |
//!
//! Steps 2 to 4 are one request, `POST …/seats/reserve`; `price_and_reserve` in event-service/src/internal_api.rs
//! answers it. Step 5 is one statement, which also applies the limits per customer. A new reservation has no event: the
//! Event Service knows the hold already.
//!
//! This service makes the reservation's id first: it is the locks' token, the hold's owner and the key of every retry.
//! A process that dies between 4 and 5 leaves a hold without a reservation; `reconcile.rs` frees it once step 5 has
//! become impossible.

use std::collections::HashMap;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use service_kit::auth::Caller;
use service_kit::http::answer::Created;
use service_kit::http::error::{Error, Result};
use service_kit::http::extract::ApiJson;
use service_kit::http::openapi;
use service_kit::problems;
use service_kit::process::crash::crash_point;
use shared_contracts::ids::{PriceTierId, ReservationId, ReservationItemId, SessionId, SessionSeatId, UserId};
use shared_contracts::label::Label;
use shared_contracts::money::{Currency, Money, Multiplier};
use shared_contracts::problem::{Code, FieldError, Problem};
use shared_contracts::seat::{SeatConflict, SeatStatus};
use shared_contracts::seat_api::{Hold, Pricing, ReserveRequest, SeatPrice};
use utoipa::ToSchema;

use super::settle_holds::settle;
use crate::event_client::{self, SeatChange};
use crate::idempotency::{self, Claim, Claimed, IdempotencyKey};
use crate::metrics::MeasuredStep;
use crate::reservations::endings::abandon_unwritten;
use crate::reservations::insert::{FairUse, NewReservation};
use crate::reservations::model::{Reservation, ReservationItem, SessionHold, find, session_over};
use crate::seat_locks::{LockOutcome, holds_of};
use crate::state::App;

/// A request to reserve seats of one session.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateReservation {
    session_id: SessionId,
    /// Up to `MAX_SEATS_PER_RESERVATION` (10 unless set otherwise), each once.
    #[schema(min_items = 1, max_items = 100)]
    seats: Vec<WantedSeat>,
}

/// One wanted seat and its price tier.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct WantedSeat {
    session_seat_id: SessionSeatId,
    price_tier_id: PriceTierId,
    /// The row in the seat map. The request fails if this is not the seat's row, so that nobody books a seat that they
    /// did not see.
    row_number: Label,
    /// The seat number in the seat map. The request fails if this is not the seat's number.
    seat_number: Label,
    /// The section in the seat map. If it is given and is not the seat's, the request fails.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 64, format = "label", example = "Stalls")]
    section: Option<String>,
}

problems!(Refusals: openapi::BODY, &[
    Code::Unauthenticated, Code::SessionNotFound, Code::SessionCancelled, Code::SalesNotStarted, Code::SalesEnded, Code::SeatNotFound, Code::PriceTierNotFound, Code::SeatUnavailable, Code::EventServiceUnavailable,
    Code::IdempotencyKeyInFlight, Code::IdempotencyKeyReused, Code::TooManyReservations, Code::TooManySeats,
]);

/// Reserve seats: all of them or none
///
/// The seats are held until `expiry_time`; confirm the reservation before then. Take `session_seat_id`, `row_number`
/// and `seat_number` from the Event Service's seat map. With an `Idempotency-Key`, a repeated request gets the answer
/// of the first.
#[utoipa::path(post, path = "/api/v1/reservations", tag = "2 Reservations", request_body = CreateReservation, security(("user_id" = []), ("bearer" = [])),
    params(("Idempotency-Key" = Option<String>, Header, description = "A fresh UUID for each new request; the same one when it is repeated", max_length = 255)),
    responses((status = 201, description = "Held", body = Reservation, headers(("Location" = String)), links(
        ("get" = (operation_id = "get_reservation", parameters(("id" = "$response.body#/id")))),
        ("confirm" = (operation_id = "confirm_reservation", parameters(("id" = "$response.body#/id")))),
        ("cancel" = (operation_id = "cancel_reservation", parameters(("id" = "$response.body#/id")))),
    )), Refusals))]
pub(crate) async fn create_reservation(
    State(app): State<App>,
    caller: Caller,
    key: IdempotencyKey,
    ApiJson(wanted): ApiJson<CreateReservation>,
) -> Result<Response> {
    validate(&wanted, app.rules.seats_max)?;
    let id = ReservationId::new();
    let mut claim =
        match idempotency::claim(&app.db, caller.user_id, "create_reservation", key, id.as_uuid(), &wanted).await? {
            Claimed::Work(claim) => claim,
            Claimed::Answer(answer) => return Ok(answer),
        };
    crash_point("booking.claimed");
    let booked = book(&app, id, caller.user_id, wanted, &mut claim).await;
    app.metrics.booked(&booked);
    match booked {
        Ok(made) => {
            Ok(Created { location: format!("/api/v1/reservations/{}", made.id), body: Json(made) }.into_response())
        }
        Err(error) => {
            match &error {
                Error::Refused(problem) if problem.status < 500 && !is_refused_last(problem.code) => {
                    claim.reject(&app.db, &error).await
                }
                // This attempt may have left a hold, which the next attempt must not take for another buyer's.
                _ => claim.hand_over(&app.db, claim.previous_attempt.unwrap_or(id.as_uuid())).await,
            }
            Err(error)
        }
    }
}

/// Runs the steps of the table above.
async fn book(
    app: &App,
    id: ReservationId,
    user_id: UserId,
    wanted: CreateReservation,
    claim: &mut Claim,
) -> Result<Reservation> {
    let draft = Draft::begin(app, id, user_id, wanted).await?;
    if let Some(earlier) = claim.previous_attempt {
        give_up(app, &draft, earlier.into()).await?;
        claim.previous_attempt = None;
    }
    app.metrics.step(MeasuredStep::Lock, lock_seats(app, &draft)).await?;
    crash_point("booking.locked");
    let booked = hold_and_write(app, &draft, claim).await;
    crash_point("booking.written");
    if booked.is_err() {
        app.locks.release(draft.session_id, &holds_of(draft.id, &draft.seat_ids)).await;
    }
    booked
}

/// Frees the hold and the locks of an earlier attempt under the same Idempotency-Key. That attempt wrote no
/// reservation: otherwise its answer would be stored.
async fn give_up(app: &App, draft: &Draft, earlier: ReservationId) -> Result<()> {
    app.event_service.release(draft.session_id, earlier, &draft.seat_ids).await?;
    app.locks.release(draft.session_id, &holds_of(earlier, &draft.seat_ids)).await;
    Ok(())
}

/// A booking whose reservation is not written yet.
struct Draft {
    id: ReservationId,
    user_id: UserId,
    session_id: SessionId,
    seats: Vec<WantedSeat>,
    seat_ids: Vec<SessionSeatId>,
    multipliers: HashMap<PriceTierId, Multiplier>,
    /// When the booking began, by the clock of this service's database, like every time here.
    booking_time: DateTime<Utc>,
    expiry_time: DateTime<Utc>,
}

fn validate(wanted: &CreateReservation, seats_max: usize) -> Result<()> {
    let mut faults = Vec::new();
    if wanted.seats.len() > seats_max {
        faults.push(FieldError::at(
            "/seats",
            format!("names {} seats; one reservation takes {seats_max} at most", wanted.seats.len()),
        ));
    }
    for (index, seat) in wanted.seats.iter().enumerate() {
        if wanted.seats[..index].iter().any(|earlier| earlier.session_seat_id == seat.session_seat_id) {
            faults.push(FieldError::at(format!("/seats/{index}/session_seat_id"), "is named twice"));
        }
    }
    if faults.is_empty() { Ok(()) } else { Err(Problem::validation(faults).into()) }
}

impl Draft {
    fn holds(&self) -> Vec<SessionHold> {
        let holds = holds_of(self.id, &self.seat_ids).into_iter();
        holds.map(|hold| SessionHold { session_id: self.session_id, hold }).collect()
    }

    fn priced(&self, order: PricedOrder, fair_use: FairUse) -> NewReservation {
        let PricedOrder { items, total_amount, currency, end_time } = order;
        let Self { id, user_id, session_id, booking_time, .. } = *self;
        // No hold outlives its session.
        let expiry_time = end_time.map_or(self.expiry_time, |end| end.min(self.expiry_time));
        NewReservation {
            id,
            user_id,
            session_id,
            booking_time,
            expiry_time,
            end_time,
            items,
            total_amount,
            currency,
            fair_use,
        }
    }

    /// Step 0: reads the price tiers and the clock.
    async fn begin(app: &App, id: ReservationId, user_id: UserId, wanted: CreateReservation) -> Result<Self> {
        let tier_ids: Vec<PriceTierId> = wanted.seats.iter().map(|seat| seat.price_tier_id).collect();
        let tiers = app.tiers.tiers_and_clock(&app.db, wanted.session_id, &tier_ids);
        let (booking_time, multipliers) = app.metrics.step(MeasuredStep::Tiers, tiers).await?;
        if let Some(id) = tier_ids.iter().find(|id| !multipliers.contains_key(id)) {
            return Err(Error::refused(
                Code::PriceTierNotFound,
                format!("No price tier of this session has the id {id}."),
            ));
        };
        Ok(Self {
            id,
            user_id,
            session_id: wanted.session_id,
            seat_ids: wanted.seats.iter().map(|seat| seat.session_seat_id).collect(),
            seats: wanted.seats,
            multipliers,
            booking_time,
            expiry_time: booking_time + app.rules.hold_interval(),
        })
    }
}

/// Step 1: locks the seats. This comes before the costlier steps: when a sale opens, most buyers get no further. Undo:
/// [`SeatLocks::release`](crate::seat_locks::SeatLocks::release).
async fn lock_seats(app: &App, draft: &Draft) -> Result<()> {
    let acquire = || app.locks.acquire(draft.session_id, &draft.seat_ids, draft.id, app.rules.hold_time);
    let outcome = acquire().await;
    app.metrics.locked(&outcome);
    let LockOutcome::Busy(mut busy) = outcome else {
        return Ok(());
    };
    // Another booking is in progress or has the seats, or a lock has outlived its reservation. A lock outlives a
    // reservation that ended while Redis was unavailable, that was paid, or whose process died. This function removes
    // such a lock, so that it does not cost a sale.
    let ended = app.ended_reservations.ended(busy.iter().map(|hold| hold.reservation_id).collect()).await?;
    for owner in &ended {
        app.locks.release(draft.session_id, &holds_of(*owner, &draft.seat_ids)).await;
    }
    busy.retain(|hold| !ended.contains(&hold.reservation_id));
    if busy.is_empty() {
        match acquire().await {
            LockOutcome::Busy(others) => busy = others,
            _ => return Ok(()),
        }
    }
    Err(seats_unavailable(
        busy.into_iter().map(|hold| SeatConflict::new(hold.session_seat_id, Some(SeatStatus::Reserved))).collect(),
    ))
}

/// Steps 2 to 5: holds the seats, prices them and writes the reservation. Frees the seats if the prices fail.
async fn hold_and_write(app: &App, draft: &Draft, claim: &Claim) -> Result<Reservation> {
    let pricing = hold(app, draft, true).await?;
    let priced = pricing.ok_or_else(event_client::older).and_then(|pricing| price(draft, &pricing));
    match priced {
        Ok(order) => write(app, draft, order, FairUse::Counted, claim).await,
        Err(error) => {
            release(app, draft).await;
            Err(error)
        }
    }
}

/// Repeats steps 4 and 5 at the old prices for a reservation that expired before its payment came. The new reservation
/// has its own id, so that a late message about the old one can't free its seats. It needs no seat locks: step 4 alone
/// decides.
pub(super) async fn book_again(app: &App, id: ReservationId, ended: Reservation) -> Result<Reservation> {
    let seat_ids: Vec<SessionSeatId> = ended.items.iter().map(|item| item.session_seat_id).collect();
    // The Event Service may not have received the event of the old reservation's end yet.
    app.event_service.release(ended.session_id, ended.id, &seat_ids).await?;
    let booking_time = sqlx::query_scalar!(r#"select now() as "now!""#).fetch_one(&app.db).await?;
    if ended.end_time.is_some_and(|end| end <= booking_time) {
        return Err(session_over("The session is over, so its seats can't be booked again."));
    }
    let draft = Draft {
        id,
        user_id: ended.user_id,
        session_id: ended.session_id,
        seats: Vec::new(),
        seat_ids,
        multipliers: HashMap::new(),
        booking_time,
        expiry_time: booking_time + app.rules.hold_interval(),
    };
    let items = ended.items.into_iter().map(|item| ReservationItem { id: ReservationItemId::new(), ..item }).collect();
    let end_time = ended.end_time;
    let order = PricedOrder { items, total_amount: ended.total_amount, currency: ended.currency, end_time };
    hold(app, &draft, false).await?;
    // The reservation is paid already, so no limit per customer may refuse it.
    write(app, &draft, order, FairUse::Exempt, &Claim::without_key(ended.user_id)).await
}

/// Step 5 of the table: writes the reservation, or undoes the hold.
async fn write(app: &App, draft: &Draft, order: PricedOrder, use_of: FairUse, claim: &Claim) -> Result<Reservation> {
    let writing = app.inserts.insert(draft.priced(order, use_of), claim.clone());
    let error = match app.metrics.step(MeasuredStep::Write, writing).await {
        Ok(reservation) => return Ok(reservation),
        Err(error) => error,
    };
    if matches!(&error, Error::Refused(problem) if is_refused_last(problem.code)) {
        // The database has answered that the statement wrote nothing.
        release(app, draft).await;
        return Err(error);
    }
    // A lost connection may have lost only the answer. The seats stay held until it is certain that there is no row.
    match abandon_unwritten(&app.db, &draft.holds()).await {
        Ok(()) => match find(&app.db, draft.id, Some(draft.user_id)).await {
            Ok(written) => return Ok(written),
            Err(Error::Refused(_)) => release(app, draft).await,
            Err(_) => {}
        },
        Err(unknown) => {
            tracing::warn!(%unknown, reservation_id = %draft.id, "Reconciliation will find out whether this reservation was written")
        }
    }
    Err(error)
}

/// Whether it is step 5 that refuses with this code, when the seats are held already.
fn is_refused_last(code: Code) -> bool {
    matches!(code, Code::TooManyReservations | Code::TooManySeats)
}

/// The items of a booking with their prices, and their total.
struct PricedOrder {
    items: Vec<ReservationItem>,
    total_amount: Money,
    currency: Currency,
    /// When the session ends.
    end_time: Option<DateTime<Utc>>,
}

/// After step 4: calculates the price of each seat. If a label differs from the Event Service's, the client saw another seat,
/// and the request fails.
fn price(draft: &Draft, pricing: &Pricing) -> Result<PricedOrder> {
    let prices: HashMap<SessionSeatId, &SeatPrice> =
        pricing.seats.iter().map(|price| (price.session_seat_id, price)).collect();
    let mut items = Vec::with_capacity(draft.seats.len());
    let mut faults = Vec::new();
    for (index, seat) in draft.seats.iter().enumerate() {
        let (Some(price), Some(multiplier)) =
            (prices.get(&seat.session_seat_id), draft.multipliers.get(&seat.price_tier_id))
        else {
            return Err(seats_not_found(vec![seat.session_seat_id]));
        };
        let labels = [
            ("row_number", &seat.row_number, &price.row_number),
            ("seat_number", &seat.seat_number, &price.seat_number),
        ];
        for (name, given, real) in labels {
            if given != real {
                faults.push(FieldError::at(
                    format!("/seats/{index}/{name}"),
                    format!("this seat's {name} is \"{real}\""),
                ));
            }
        }
        // An older client sends no section.
        if let (Some(given), real) = (&seat.section, &price.section)
            && real.as_ref() != Some(given)
        {
            let real = real.as_ref().map_or("no section".to_owned(), |real| format!("section \"{real}\""));
            faults.push(FieldError::at(format!("/seats/{index}/section"), format!("this seat has {real}")));
        }
        let Some(final_price) = price.price.times(*multiplier) else {
            return Err(Error::invalid(FieldError::at(
                format!("/seats/{index}/price_tier_id"),
                "makes the price larger than can be charged",
            )));
        };
        items.push(ReservationItem {
            id: ReservationItemId::new(),
            session_seat_id: seat.session_seat_id,
            price_tier_id: seat.price_tier_id,
            section: price.section.clone(),
            row_number: price.row_number.clone(),
            seat_number: price.seat_number.clone(),
            price: final_price,
            discount_amount: Money::ZERO,
            final_price,
        });
    }
    if !faults.is_empty() {
        return Err(Problem::validation(faults).into());
    }
    let Some(total_amount) = Money::total(items.iter().map(|item| item.final_price)) else {
        return Err(Error::invalid(FieldError::at("/seats", "cost more in total than can be charged")));
    };
    Ok(PricedOrder { items, total_amount, currency: pricing.currency.clone(), end_time: pricing.end_time })
}

/// Steps 2 to 4: asks the Event Service to hold the seats. Returns their prices if `with_prices` is set. Undo:
/// [`release`].
async fn hold(app: &App, draft: &Draft, with_prices: bool) -> Result<Option<Pricing>> {
    let pricing = app.metrics.step(MeasuredStep::Reserve, reserve_or_settle_overdue(app, draft, with_prices)).await?;
    crash_point("booking.reserved");
    Ok(pricing)
}

/// Reserves the seats. If every seat in the way is held past its time, settles those holds and tries once more, so that
/// a dead worker costs no sale.
async fn reserve_or_settle_overdue(app: &App, draft: &Draft, with_prices: bool) -> Result<Option<Pricing>> {
    let conflicts = match request_hold(app, draft, with_prices).await? {
        SeatChange::Done(held) => return Ok(held.pricing),
        SeatChange::Refused(conflicts) => conflicts,
    };
    let overdue: Option<Vec<SessionHold>> = conflicts
        .iter()
        .map(|seat| {
            let session_seat_id = seat.session_seat_id;
            let hold = seat.overdue_reservation_id.map(|reservation_id| Hold { reservation_id, session_seat_id })?;
            Some(SessionHold { session_id: draft.session_id, hold })
        })
        .collect();
    let Some(overdue) = overdue else {
        return Err(refusal(conflicts));
    };
    settle(app, &overdue).await?;
    match request_hold(app, draft, with_prices).await? {
        SeatChange::Done(held) => Ok(held.pricing),
        SeatChange::Refused(conflicts) => Err(refusal(conflicts)),
    }
}

async fn request_hold(app: &App, draft: &Draft, with_prices: bool) -> Result<SeatChange> {
    let Draft { id: reservation_id, session_id, expiry_time: reserved_until, .. } = *draft;
    let session_seat_ids = draft.seat_ids.clone();
    let request = ReserveRequest { reservation_id, session_seat_ids, reserved_until, with_prices };
    let outcome = app.event_service.reserve(session_id, request).await;
    match &outcome {
        // A refusal releases nothing, because refusals come by the thousand before a sale opens. An earlier try may
        // have held the seats and lost its answer before the sale ended; then reconciliation frees them.
        Err(Error::Refused(_)) => {}
        // Without an answer the seats may be held, so they are released. If the Event Service answers no call, this
        // booking does not wait for it again; reconciliation frees the seats.
        Err(_) if app.event_service.circuit().is_ok() => release(app, draft).await,
        Err(_) | Ok(_) => {}
    }
    outcome
}

async fn release(app: &App, draft: &Draft) {
    if let Err(error) = app.event_service.release(draft.session_id, draft.id, &draft.seat_ids).await {
        tracing::warn!(%error, reservation_id = %draft.id, "Seats may stay held until reconciliation frees them");
    }
}

fn refusal(conflicts: Vec<SeatConflict>) -> Error {
    let unknown: Vec<_> =
        conflicts.iter().filter(|seat| seat.status.is_none()).map(|seat| seat.session_seat_id).collect();
    if unknown.is_empty() {
        // The reservation that holds a seat is known to the services only, so the answer omits it.
        seats_unavailable(
            conflicts.into_iter().map(|seat| SeatConflict::new(seat.session_seat_id, seat.status)).collect(),
        )
    } else {
        seats_not_found(unknown)
    }
}

fn seats_unavailable(seats: Vec<SeatConflict>) -> Error {
    Problem::new(
        Code::SeatUnavailable,
        "The seats listed are taken, so none was reserved. Choose others from the seat map.",
    )
    .with_seats(seats)
    .into()
}

fn seats_not_found(ids: Vec<SessionSeatId>) -> Error {
    let seats = ids.into_iter().map(|id| SeatConflict::new(id, None)).collect();
    Problem::new(
        Code::SeatNotFound,
        "The seats listed do not exist in this session, so none was reserved. Take the ids from its seat map.",
    )
    .with_seats(seats)
    .into()
}
