//! Price tiers: named factors on seat prices.

use axum::Json;
use axum::extract::State;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use service_kit::answer::Created;
use service_kit::error::{Error, Result};
use service_kit::extract::{ApiJson, ApiPath, ApiQuery};
use service_kit::{openapi, refusals};
use shared_contracts::ids::{PriceTierId, SessionId};
use shared_contracts::money::Multiplier;
use shared_contracts::page::{Page, PageQuery};
use shared_contracts::problem::{Code, FieldError};
use sqlx::FromRow;
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::app::App;

/// A price tier.
#[derive(Debug, Serialize, FromRow, ToSchema)]
pub struct PriceTier {
    id: PriceTierId,
    /// The one session it serves; all of them when null.
    session_id: Option<SessionId>,
    name: String,
    base_multiplier: Multiplier,
    description: Option<String>,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
}

/// A new price tier.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(example = json!({ "name": "Standard", "base_multiplier": 1.0, "description": "Standard pricing" }))]
pub struct CreatePriceTier {
    #[schema(min_length = 1, max_length = 100, example = "Standard")]
    name: String,
    /// The factor on the seat's price. Required, under this name or the next.
    base_multiplier: Option<Multiplier>,
    /// Another name for `base_multiplier`.
    multiplier: Option<Multiplier>,
    #[schema(max_length = 1000, example = "Standard pricing")]
    description: Option<String>,
    /// The one session to serve; all of them when left out.
    session_id: Option<SessionId>,
}

/// Which tiers to list.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct TierFilter {
    /// Only those that serve this session: its own and those of all sessions.
    session_id: Option<SessionId>,
}

refusals!(CreateRefusals: openapi::BODY);
refusals!(GetRefusals: &[Code::PriceTierNotFound, Code::ValidationFailed]);
refusals!(ListRefusals: &[Code::ValidationFailed]);

/// Create a price tier
#[utoipa::path(post, path = "/api/v1/admin/price-tiers", tag = "1 Price tiers", request_body = CreatePriceTier,
    responses((status = 201, description = "Made", body = PriceTier), CreateRefusals))]
pub(crate) async fn create_price_tier(
    State(app): State<App>,
    ApiJson(new): ApiJson<CreatePriceTier>,
) -> Result<Created<PriceTier>> {
    let Some(base_multiplier) = new.base_multiplier.or(new.multiplier) else {
        return Err(Error::invalid(FieldError::at("/base_multiplier", "is required")));
    };
    let tier: PriceTier = sqlx::query_as(
        "insert into price_tiers (id, session_id, name, base_multiplier, description) values ($1, $2, $3, $4, $5) returning *",
    )
    .bind(PriceTierId::new())
    .bind(new.session_id)
    .bind(new.name)
    .bind(base_multiplier)
    .bind(new.description)
    .fetch_one(&app.db)
    .await?;
    Ok(Created { location: format!("/api/v1/admin/price-tiers/{}", tier.id), body: tier })
}

/// List price tiers, oldest first
#[utoipa::path(get, path = "/api/v1/admin/price-tiers", tag = "1 Price tiers", params(PageQuery, TierFilter),
    responses((status = 200, description = "A page", body = Page<PriceTier>), ListRefusals))]
pub(crate) async fn list_price_tiers(
    State(app): State<App>,
    ApiQuery(page): ApiQuery<PageQuery>,
    ApiQuery(filter): ApiQuery<TierFilter>,
) -> Result<Json<Page<PriceTier>>> {
    let rows: Vec<PriceTier> = sqlx::query_as(
        "select * from price_tiers where id > $1 and ($3::uuid is null or session_id is null or session_id = $3) order by id limit $2",
    )
    .bind(page.cursor.unwrap_or(Uuid::nil()))
    .bind(page.rows_to_read())
    .bind(filter.session_id)
    .fetch_all(&app.db)
    .await?;
    Ok(Json(Page::from_rows(rows, &page, |row| row.id.as_uuid())))
}

/// Get a price tier
#[utoipa::path(get, path = "/api/v1/admin/price-tiers/{id}", tag = "1 Price tiers", params(("id" = PriceTierId, Path)),
    responses((status = 200, description = "The tier", body = PriceTier), GetRefusals))]
pub(crate) async fn get_price_tier(
    State(app): State<App>,
    ApiPath(id): ApiPath<PriceTierId>,
) -> Result<Json<PriceTier>> {
    let found = sqlx::query_as("select * from price_tiers where id = $1").bind(id).fetch_optional(&app.db).await?;
    found.map(Json).ok_or_else(|| Error::refused(Code::PriceTierNotFound, format!("No price tier has the id {id}.")))
}
