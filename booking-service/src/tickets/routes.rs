//! The routes that show tickets. A ticket's QR code is drawn when a request asks for it.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use service_kit::auth::Caller;
use service_kit::http::error::{Error, Result};
use service_kit::http::extract::ApiPath;
use service_kit::http::query::ApiQuery;
use service_kit::problems;
use shared_contracts::ids::{TicketId, UserId};
use shared_contracts::page::{Page, PageQuery};
use shared_contracts::problem::Code;
use sqlx::PgPool;
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::code::QrCode;
use crate::reservations::tickets::{self, LIST_MAX, Ticket, TicketLoader, TicketStatus};

/// QR codes that a request draws before it lets others run.
const DRAWN_AT_ONCE: usize = 8;

/// How to draw a QR code.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct QrQuery {
    /// `png` if left out.
    #[param(inline)]
    format: Option<QrFormat>,
}

#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum QrFormat {
    Png,
    Svg,
}

/// The bytes of a PNG image.
#[derive(ToSchema)]
#[schema(value_type = String, format = Binary)]
#[expect(dead_code, reason = "only its description is of interest")]
struct Image(Vec<u8>);

problems!(GetRefusals: &[Code::Unauthenticated, Code::TicketNotFound, Code::ValidationFailed]);
problems!(QrRefusals: &[Code::Unauthenticated, Code::TicketNotFound, Code::TicketRefunded, Code::ValidationFailed]);
problems!(ListRefusals: &[Code::Unauthenticated, Code::TicketNotFound, Code::ValidationFailed]);
problems!(PageRefusals: &[Code::Unauthenticated, Code::ValidationFailed]);

/// List the caller's tickets, newest first
#[utoipa::path(get, path = "/api/v1/tickets", tag = "3 Tickets", params(PageQuery), security(("user_id" = []), ("bearer" = [])),
    responses((status = 200, description = "A page", body = Page<Ticket>), PageRefusals))]
pub(crate) async fn list_own_tickets(
    State(db): State<PgPool>,
    caller: Caller,
    ApiQuery(page, _): ApiQuery<PageQuery>,
) -> Result<Json<Page<Ticket>>> {
    let before = page.cursor.unwrap_or(Uuid::max());
    let rows = tickets::list(&db, caller.user_id, before, page.rows_to_read()).await?;
    let Page { items, next_cursor } = Page::from_rows(rows, &page, |row| row.id.as_uuid());
    Ok(Json(Page { items: with_qr_codes(items).await?, next_cursor }))
}

/// List a user's tickets, newest first
///
/// At most 1,000. If the user has more, the answer has the header `Link` with `rel="next"`, which leads to them. The list
/// of another user is `404`, as if that user did not exist.
#[utoipa::path(get, path = "/api/v1/tickets/user/{user_id}", tag = "3 Tickets", params(("user_id" = UserId, Path)), security(("user_id" = []), ("bearer" = [])),
    responses((status = 200, description = "The tickets", body = Vec<Ticket>, headers(("Link" = Option<String>))), ListRefusals))]
pub(crate) async fn list_tickets(
    State(tickets): State<Arc<TicketLoader>>,
    caller: Caller,
    ApiPath(user_id): ApiPath<UserId>,
) -> Result<Response> {
    if caller.confined_to().is_some_and(|own| own != user_id) {
        return Err(Error::refused(Code::TicketNotFound, format!("You can see no tickets of user {user_id}.")));
    }
    let mut tickets = tickets.of_owner(user_id).await?;
    let has_more = tickets.len() > LIST_MAX;
    tickets.truncate(LIST_MAX);
    let last = tickets.last().map(|ticket| ticket.id).filter(|_| has_more);
    let next = last.map(|last| [(header::LINK, format!("</api/v1/tickets?cursor={last}>; rel=\"next\""))]);
    Ok((next, Json(with_qr_codes(tickets).await?)).into_response())
}

async fn with_qr_codes(tickets: Vec<Ticket>) -> Result<Vec<Ticket>> {
    let mut shown = Vec::with_capacity(tickets.len());
    for ticket in tickets {
        shown.push(with_qr_code(ticket)?);
        if shown.len().is_multiple_of(DRAWN_AT_ONCE) {
            // A thousand codes take tens of milliseconds, and payments must not wait for that.
            tokio::task::yield_now().await;
        }
    }
    Ok(shown)
}

/// Get a ticket
#[utoipa::path(get, path = "/api/v1/tickets/{id}", tag = "3 Tickets", params(("id" = TicketId, Path)), security(("user_id" = []), ("bearer" = [])),
    responses((status = 200, description = "The ticket", body = Ticket), GetRefusals))]
pub(crate) async fn get_ticket(
    State(tickets): State<Arc<TicketLoader>>,
    caller: Caller,
    ApiPath(id): ApiPath<TicketId>,
) -> Result<Json<Ticket>> {
    with_qr_code(tickets.find(id, caller.confined_to()).await?).map(Json)
}

/// Get a ticket's QR code
#[utoipa::path(get, path = "/api/v1/tickets/{id}/qr", tag = "3 Tickets", params(("id" = TicketId, Path), QrQuery), security(("user_id" = []), ("bearer" = [])),
    responses((status = 200, description = "The image", content((inline(Image) = "image/png"), (String = "image/svg+xml"))), QrRefusals))]
pub(crate) async fn get_ticket_qr(
    State(tickets): State<Arc<TicketLoader>>,
    caller: Caller,
    ApiPath(id): ApiPath<TicketId>,
    ApiQuery(query, _): ApiQuery<QrQuery>,
) -> Result<Response> {
    let ticket = tickets.find(id, caller.confined_to()).await?;
    if ticket.status == TicketStatus::Refunded {
        return Err(Error::refused(
            Code::TicketRefunded,
            "This ticket was refunded. It has no code and admits nobody.",
        ));
    }
    let code = code_of(&ticket)?;
    Ok(match query.format.unwrap_or(QrFormat::Png) {
        QrFormat::Png => ([(header::CONTENT_TYPE, "image/png")], code.png()?).into_response(),
        QrFormat::Svg => ([(header::CONTENT_TYPE, "image/svg+xml")], code.svg()).into_response(),
    })
}

/// Makes the ticket's QR code, which contains `TICKET:` and the ticket's id.
fn code_of(ticket: &Ticket) -> Result<QrCode> {
    let content = format!("TICKET:{}", ticket.id);
    QrCode::of(content.as_bytes()).map_err(|error| Error::Internal(error.into()))
}

/// Adds the QR code. A refunded ticket has none.
fn with_qr_code(mut ticket: Ticket) -> Result<Ticket> {
    if ticket.status == TicketStatus::Refunded {
        return Ok(ticket);
    }
    let png = code_of(&ticket)?.png()?;
    ticket.qr_code = Some(format!("data:image/png;base64,{}", BASE64.encode(png)));
    Ok(ticket)
}
