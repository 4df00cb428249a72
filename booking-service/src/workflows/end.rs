//! Ends reservations other than by payment: cancel, expire, refund.
//!
//! | way | in one transaction | after the commit |
//! | --- | --- | --- |
//! | cancel | `active → cancelled`, event | free the seats, remove their locks |
//! | expire | `active → expired` for many, events | free the seats, remove their locks |
//! | refund a ticket | ticket, reservation, refund, event | remove the lock, ask the provider for the money |
//!
//! No call leaves the process between `begin` and `commit`.

use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use service_kit::auth::Caller;
use service_kit::http::error::{Error, Result};
use service_kit::http::extract::{ApiPath, OptionalJson};
use service_kit::http::openapi;
use service_kit::observe::traces;
use service_kit::postgres::database;
use service_kit::problems;
use service_kit::process::crash::crash_point;
use shared_contracts::ids::{ReservationId, TicketId, UserId};
use shared_contracts::problem::{Code, FieldError};
use shared_contracts::transitions::{ReservationState, ReservationStep, Transition};
use utoipa::ToSchema;

use super::after_commit::{announce_settled, free_now};
use super::refunds::refund_now;
use crate::reservations::endings;
use crate::reservations::model::{self, Reservation, Standing, find, refusal};
use crate::reservations::tickets::{self, Ticket};
use crate::state::App;

problems!(CancelRefusals: &[
    Code::Unauthenticated, Code::ReservationNotFound, Code::ReservationConfirmed, Code::ReservationCancelled, Code::ReservationRefunded,
    Code::ConfirmationInProgress, Code::ReservationExpired, Code::ValidationFailed,
]);
problems!(RefundRefusals: openapi::BODY, &[
    Code::Unauthenticated, Code::TicketNotFound, Code::TicketUsed, Code::RefundClosed, Code::EventServiceUnavailable,
]);

/// Why a ticket is refunded.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RefundTicket {
    /// Required of an admin once the session has begun.
    #[schema(max_length = 500, format = "title", example = "The stage collapsed")]
    reason: Option<String>,
}

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
    let Some(event) = endings::cancel(&mut tx, id, caller.confined_to()).await? else {
        drop(tx);
        return Err(why_refused(&app, caller.confined_to(), id, ReservationStep::Cancel).await?);
    };
    tx.commit().await?;
    crash_point("cancel.committed");
    // The event frees the seats in any case. This call frees them before the customer receives the answer.
    if let Err(error) = app.event_service.release(event.session_id, id, &event.session_seat_ids).await {
        tracing::info!(%error, "The event will free the cancelled seats");
    }
    announce_settled(&app, &[event]).await;
    find(&app.db, id, caller.confined_to()).await.map(Json)
}

/// Ends up to `limit` reservations whose time is over, oldest first, and returns how many.
///
/// Several workers share the work: each skips the rows that another has locked.
///
/// # Errors
/// The database failed; none of this batch was ended.
pub async fn expire_due(app: &App, limit: u32) -> Result<usize> {
    let mut tx = database::begin(&app.db).await?;
    let ids = endings::lock_due(&mut tx, limit).await?;
    if ids.is_empty() {
        return Ok(0);
    }
    let events = traces::root("reservations.expire", async {
        let events = endings::expire(&mut tx, &ids).await?;
        crash_point("expire.ending");
        tx.commit().await?;
        crash_point("expire.committed");
        free_now(app, &events).await;
        Ok(events)
    });
    let events = events.await?;
    announce_settled(app, &events).await;
    Ok(events.len())
}

/// Refund a ticket
///
/// The price is refunded once and the seat goes back on sale. Repeating the request gives the same answer. Buyers may
/// give a ticket back until its session begins, and admins after that, too, with a `reason`.
#[utoipa::path(post, path = "/api/v1/tickets/{id}/refund", tag = "3 Tickets", request_body = Option<RefundTicket>, params(("id" = TicketId, Path)), security(("user_id" = []), ("bearer" = [])),
    responses((status = 200, description = "Refunded", body = Ticket), RefundRefusals))]
pub(crate) async fn refund_ticket(
    State(app): State<App>,
    caller: Caller,
    ApiPath(id): ApiPath<TicketId>,
    OptionalJson(body): OptionalJson<RefundTicket>,
) -> Result<Json<Ticket>> {
    let ticket = tickets::find(&app.db, id, caller.confined_to()).await?;
    if ticket.status == tickets::TicketStatus::Active {
        must_be_refundable(&app, &caller, &ticket, body.reason.as_deref()).await?;
    }
    let mut tx = database::begin(&app.db).await?;
    let Some(ticket) = tickets::refund(&mut tx, id, caller.confined_to()).await? else {
        drop(tx);
        let ticket = tickets::find(&app.db, id, caller.confined_to()).await?;
        return match ticket.status {
            tickets::TicketStatus::Refunded => Ok(Json(ticket)),
            _ => Err(Error::refused(Code::TicketUsed, "A ticket that has been used can't be refunded.")),
        };
    };
    let (events, owed) = endings::refund_tickets(&mut tx, std::slice::from_ref(&ticket)).await?;
    tx.commit().await?;
    crash_point("refund.committed");
    announce_settled(&app, &events).await;
    for refund in owed {
        refund_now(&app, refund).await;
    }
    Ok(Json(ticket))
}

/// Refuses a refund after the session's beginning, by the time that the session has now. An admin may refund all the
/// same, with a reason.
async fn must_be_refundable(app: &App, caller: &Caller, ticket: &Ticket, reason: Option<&str>) -> Result<()> {
    let begins = app.event_service.session_times(ticket.session_id).await?.start_time;
    let has_begun = sqlx::query_scalar!(r#"select now() >= $1 as "has_begun!""#, begins).fetch_one(&app.db).await?;
    match (has_begun, caller.confined_to(), reason) {
        (false, _, _) => Ok(()),
        (true, Some(_), _) => {
            let detail = "The session has begun, so its tickets can't be given back any more. Ask the organizer.";
            Err(Error::refused(Code::RefundClosed, detail))
        }
        (true, None, None) => Err(Error::invalid(FieldError::at("/reason", "is required once the session has begun"))),
        (true, None, Some(reason)) => {
            tracing::info!(ticket_id = %ticket.id, admin = %caller.user_id, reason, "A ticket is refunded after the session's beginning");
            Ok(())
        }
    }
}

/// Finds out why a conditional update did not match the reservation. With an `owner`, only that user's reservation
/// counts.
async fn why_refused(app: &App, owner: Option<UserId>, id: ReservationId, step: ReservationStep) -> Result<Error> {
    let Standing { state, in_time, .. } = model::standing(&app.db, id, owner).await?;
    Ok(match state.after(step, in_time) {
        // The reservation's state allows the step now, so the update met a payment that has failed since.
        Transition::Changed(_) => refusal(ReservationState::Confirming),
        Transition::Unchanged | Transition::Refused => refusal(state),
    })
}
