//! Price tiers: named factors on seat prices.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use service_kit::auth::OrganizerCaller;
use service_kit::http::answer::Created;
use service_kit::http::error::{Error, Result};
use service_kit::http::etag::{Editable, IfMatch, IfMatchHeader};
use service_kit::http::extract::{ApiJson, ApiPatch, ApiPath};
use service_kit::http::openapi;
use service_kit::http::query::ApiQuery;
use service_kit::postgres::database;
use service_kit::{patch_body, problems};
use shared_contracts::ids::{PriceTierId, SessionId};
use shared_contracts::money::Multiplier;
use shared_contracts::page::{Page, PageQuery};
use shared_contracts::problem::{Code, FieldError};
use sqlx::{PgConnection, PgPool};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::tier_cache::PriceTierCache;

/// A multiplier for seat prices, such as 0.5 for children.
#[derive(Debug, Serialize, ToSchema)]
pub struct PriceTier {
    id: PriceTierId,
    /// The session that may use the tier; null if every session may.
    session_id: Option<SessionId>,
    name: String,
    base_multiplier: Multiplier,
    description: Option<String>,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
    #[serde(skip)]
    version: i64,
}

/// A new price tier.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({ "name": "Standard", "base_multiplier": 1.0, "description": "Standard pricing" }))]
pub struct CreatePriceTier {
    #[schema(min_length = 1, max_length = 100, pattern = r"\S", format = "title", example = "Standard")]
    name: String,
    /// The factor that multiplies the seat's price. Required, under this name or as `multiplier`.
    base_multiplier: Option<Multiplier>,
    /// Another name for `base_multiplier`.
    multiplier: Option<Multiplier>,
    #[schema(max_length = 1000, format = "prose", example = "Standard pricing")]
    description: Option<String>,
    /// The session that may use the tier; every session if left out.
    session_id: Option<SessionId>,
}

patch_body!(UpdatePriceTier: CreatePriceTier, { "base_multiplier": 1.5 });

/// Which tiers to list.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct TierFilter {
    /// Only tiers that this session may use: its own and those for every session.
    #[param(inline)]
    session_id: Option<SessionId>,
}

problems!(CreateRefusals: openapi::BODY);
problems!(GetRefusals: &[Code::PriceTierNotFound, Code::ValidationFailed]);
problems!(UpdateRefusals: openapi::EDIT, &[Code::PriceTierNotFound]);
problems!(DeleteRefusals: &[Code::PriceTierNotFound, Code::ResourceInUse, Code::PreconditionFailed, Code::ValidationFailed]);
problems!(ListRefusals: &[Code::ValidationFailed]);

/// Create a price tier
#[utoipa::path(post, path = "/api/v1/admin/price-tiers", tag = "1 Price tiers", security((), ("bearer" = ["organizer", "admin"])), request_body = CreatePriceTier,
    responses((status = 201, description = "Created", body = PriceTier, headers(("Location" = String), ("ETag" = String)), links(
        ("get" = (operation_id = "get_price_tier", parameters(("id" = "$response.body#/id")))),
        ("update" = (operation_id = "update_price_tier", parameters(("id" = "$response.body#/id")))),
        ("delete" = (operation_id = "delete_price_tier", parameters(("id" = "$response.body#/id")))),
    )), CreateRefusals))]
pub(crate) async fn create_price_tier(
    State(db): State<PgPool>,
    _: OrganizerCaller,
    ApiJson(new): ApiJson<CreatePriceTier>,
) -> Result<Created<Editable<PriceTier>>> {
    let base_multiplier = new.multiplier()?;
    let tier = sqlx::query_as!(
        PriceTier,
        "insert into price_tiers (id, session_id, name, base_multiplier, description) values ($1, $2, $3, $4, $5) returning *",
        PriceTierId::new() as _,
        new.session_id as _,
        new.name,
        base_multiplier as _,
        new.description,
    )
    .fetch_one(&db)
    .await?;
    Ok(Created { location: format!("/api/v1/admin/price-tiers/{}", tier.id), body: tier.editable() })
}

/// List price tiers, oldest first
#[utoipa::path(get, path = "/api/v1/admin/price-tiers", tag = "1 Price tiers", params(PageQuery, TierFilter),
    responses((status = 200, description = "A page", body = Page<PriceTier>), ListRefusals))]
pub(crate) async fn list_price_tiers(
    State(db): State<PgPool>,
    ApiQuery(page, filter): ApiQuery<PageQuery, TierFilter>,
) -> Result<Json<Page<PriceTier>>> {
    let rows = sqlx::query_as!(
        PriceTier,
        "select * from price_tiers where id > $1 and ($3::uuid is null or session_id is null or session_id = $3) order by id limit $2",
        page.cursor.unwrap_or(Uuid::nil()),
        page.rows_to_read(),
        filter.session_id as _,
    )
    .fetch_all(&db)
    .await?;
    Ok(Json(Page::from_rows(rows, &page, |row| row.id.as_uuid())))
}

/// Get a price tier
#[utoipa::path(get, path = "/api/v1/admin/price-tiers/{id}", tag = "1 Price tiers", params(("id" = PriceTierId, Path)),
    responses((status = 200, description = "The tier", body = PriceTier, headers(("ETag" = String))), GetRefusals))]
pub(crate) async fn get_price_tier(
    State(db): State<PgPool>,
    ApiPath(id): ApiPath<PriceTierId>,
) -> Result<Editable<PriceTier>> {
    let found =
        sqlx::query_as!(PriceTier, "select * from price_tiers where id = $1", id as _).fetch_optional(&db).await?;
    found.map(PriceTier::editable).ok_or_else(|| not_found(id))
}

/// Change a price tier
///
/// A new multiplier applies to later reservations. Another replica may use the old one for one more second.
#[utoipa::path(patch, path = "/api/v1/admin/price-tiers/{id}", tag = "1 Price tiers", security((), ("bearer" = ["organizer", "admin"])), request_body = UpdatePriceTier,
    params(("id" = PriceTierId, Path), IfMatchHeader),
    responses((status = 200, description = "Changed", body = PriceTier, headers(("ETag" = String))), UpdateRefusals))]
pub(crate) async fn update_price_tier(
    State(db): State<PgPool>,
    State(tiers): State<Arc<PriceTierCache>>,
    _: OrganizerCaller,
    ApiPath(id): ApiPath<PriceTierId>,
    if_match: IfMatch,
    patch: ApiPatch,
) -> Result<Editable<PriceTier>> {
    let mut tx = database::begin(&db).await?;
    let current = lock(&mut tx, id, &if_match).await?;
    let edited: CreatePriceTier = patch.with_alias("multiplier", "base_multiplier").apply(&current)?;
    let tier = sqlx::query_as!(
        PriceTier,
        "update price_tiers set session_id = $2, name = $3, base_multiplier = $4, description = $5, version = version + 1, updated_at = now()
         where id = $1 returning *",
        id as _,
        edited.session_id as _,
        edited.name,
        edited.multiplier()? as _,
        edited.description,
    )
    .fetch_one(&mut *tx)
    .await?;
    tx.commit().await?;
    tiers.forget();
    Ok(tier.editable())
}

/// Delete a price tier
///
/// A tier that a reservation uses can't be deleted (`409`).
#[utoipa::path(delete, path = "/api/v1/admin/price-tiers/{id}", tag = "1 Price tiers", security((), ("bearer" = ["organizer", "admin"])),
    params(("id" = PriceTierId, Path), IfMatchHeader), responses((status = 204, description = "Deleted"), DeleteRefusals))]
pub(crate) async fn delete_price_tier(
    State(db): State<PgPool>,
    State(tiers): State<Arc<PriceTierCache>>,
    _: OrganizerCaller,
    ApiPath(id): ApiPath<PriceTierId>,
    if_match: IfMatch,
) -> Result<StatusCode> {
    let mut tx = database::begin(&db).await?;
    lock(&mut tx, id, &if_match).await?;
    // No foreign key and no index support this rare query: every booking would pay for them, and a foreign key would
    // also lock this row. So a booking of the same second may still refer to a deleted tier. Its items have their
    // prices, and nothing else reads the tier.
    let used = sqlx::query_scalar!(
        r#"select exists (select from reservation_items where price_tier_id = $1) as "used!""#,
        id as _,
    )
    .fetch_one(&mut *tx)
    .await?;
    if used {
        return Err(Error::refused(Code::ResourceInUse, "Reservations use this price tier, so it can't be deleted."));
    }
    sqlx::query!("delete from price_tiers where id = $1", id as _).execute(&mut *tx).await?;
    tx.commit().await?;
    tiers.forget();
    Ok(StatusCode::NO_CONTENT)
}

impl CreatePriceTier {
    fn multiplier(&self) -> Result<Multiplier> {
        let given = self.base_multiplier.or(self.multiplier);
        given.ok_or_else(|| Error::invalid(FieldError::at("/base_multiplier", "is required")))
    }
}

impl PriceTier {
    fn editable(self) -> Editable<Self> {
        Editable { version: self.version, body: self }
    }
}

/// Reads the row for an edit and locks it until the transaction ends.
async fn lock(tx: &mut PgConnection, id: PriceTierId, if_match: &IfMatch) -> Result<PriceTier> {
    let found = sqlx::query_as!(PriceTier, "select * from price_tiers where id = $1 for update", id as _)
        .fetch_optional(tx)
        .await?;
    let tier = found.ok_or_else(|| not_found(id))?;
    if_match.check(tier.version)?;
    Ok(tier)
}

fn not_found(id: PriceTierId) -> Error {
    Error::refused(Code::PriceTierNotFound, format!("No price tier has the id {id}."))
}
