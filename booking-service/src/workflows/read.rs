//! Reads a customer's reservations: one by its id, or a page of all.

use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use service_kit::auth::Caller;
use service_kit::http::error::Result;
use service_kit::http::extract::ApiPath;
use service_kit::http::query::ApiQuery;
use service_kit::problems;
use shared_contracts::ids::ReservationId;
use shared_contracts::page::{Page, PageQuery};
use shared_contracts::problem::Code;
use sqlx::PgPool;
use utoipa::IntoParams;
use uuid::Uuid;

use crate::reservations::model::{self, Reservation, ReservationStatus};

/// Which reservations to list.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct ReservationFilter {
    /// Only reservations in this state.
    #[param(inline)]
    status: Option<ReservationStatus>,
}

problems!(GetRefusals: &[Code::Unauthenticated, Code::ReservationNotFound, Code::ValidationFailed]);
problems!(ListRefusals: &[Code::Unauthenticated, Code::ValidationFailed]);

/// Get a reservation
#[utoipa::path(get, path = "/api/v1/reservations/{id}", tag = "2 Reservations", params(("id" = ReservationId, Path)), security(("user_id" = []), ("bearer" = [])),
    responses((status = 200, description = "The reservation", body = Reservation), GetRefusals))]
pub(crate) async fn get_reservation(
    State(db): State<PgPool>,
    caller: Caller,
    ApiPath(id): ApiPath<ReservationId>,
) -> Result<Json<Reservation>> {
    model::find(&db, id, caller.confined_to()).await.map(Json)
}

/// List the caller's reservations, newest first
#[utoipa::path(get, path = "/api/v1/reservations", tag = "2 Reservations", params(PageQuery, ReservationFilter), security(("user_id" = []), ("bearer" = [])),
    responses((status = 200, description = "A page", body = Page<Reservation>), ListRefusals))]
pub(crate) async fn list_reservations(
    State(db): State<PgPool>,
    caller: Caller,
    ApiQuery(page, filter): ApiQuery<PageQuery, ReservationFilter>,
) -> Result<Json<Page<Reservation>>> {
    let before = page.cursor.unwrap_or(Uuid::max());
    let rows = model::list(&db, caller.user_id, before, page.rows_to_read(), filter.status).await?;
    Ok(Json(Page::from_rows(rows, &page, |row| row.id.as_uuid())))
}
