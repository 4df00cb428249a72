//! The payment provider: charges, refunds and queries of a charge. The only one so far is a mock with the failures of a
//! real one. It remembers every charge by its idempotency key, and it can decline. It can fail to answer before or
//! after it captures the money. It can also decide later and send a notice of the outcome
//! (`workflows/payment_webhook.rs`).
//!
//! A payment's id is the idempotency key: two requests under one key charge once. If an answer is lost, the service
//! queries the charge's outcome and does not charge again.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::Context;
use service_kit::http::error::Result;
use service_kit::postgres::batch::{BatchConfig, Batcher, batch_or_each};
use service_kit::postgres::database::BatchPool;
use service_kit::process::lifecycle::Lifecycle;
use shared_contracts::ids::PaymentId;
use shared_contracts::money::Money;
use sqlx::PgPool;
use uuid::Uuid;

/// The mock declines every charge whose `payment_id` begins with this.
pub const ALWAYS_DECLINED: &str = "pay_decline";
/// The mock captures a charge whose `payment_id` begins with this, but its answer is lost.
pub const CHARGED_WITHOUT_ANSWER: &str = "pay_timeout_charged";
/// A charge whose `payment_id` begins with this never reaches the mock.
pub const LOST_ON_THE_WAY: &str = "pay_timeout_lost";
/// The mock accepts a charge whose `payment_id` begins with this, and a notice brings the outcome.
pub const ASYNCHRONOUS: &str = "pay_async";

/// The outcome of a charge, as far as the service knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChargeOutcome {
    /// The provider has taken the money.
    Captured,
    /// The provider declined the charge or will never make it.
    Declined,
    /// The provider has not decided yet and will send a notice.
    Processing,
    /// No answer: the money may be taken or not.
    Unknown,
}

/// A row of the mock's ledger: key, amount, and state (`captured`, `declined`, `processing` or `voided`).
type Charge = (PaymentId, Money, &'static str);

/// Charges and refunds. This version has only the mock provider.
#[derive(Debug)]
pub struct PaymentProvider {
    ledger: PgPool,
    /// Batches the writes of charges, so that the mock costs this database as little as possible.
    charges: Batcher<Charge, ChargeOutcome>,
    success_rate: f64,
}

const BATCHES: BatchConfig = BatchConfig::with_timeout(Duration::from_secs(10)).with_linger();

impl PaymentProvider {
    /// The mock provider: it captures `success_rate` (0 to 1) of all charges and keeps its ledger in tables of its own.
    /// The many charges use the connections of `batch_ledger`, everything else those of `ledger`.
    #[must_use]
    pub fn mock(ledger: PgPool, batch_ledger: BatchPool, success_rate: f64, lifecycle: &Lifecycle) -> Self {
        let charges = Batcher::start(lifecycle, BATCHES, move |charges| remember_all(batch_ledger.clone(), charges));
        Self { ledger, charges, success_rate }
    }

    /// Charges `amount`, once per key. `means` is the provider's token for the customer's means of payment, which clients
    /// send as `payment_id`.
    ///
    /// # Errors
    /// The provider can't be reached. As after [`ChargeOutcome::Unknown`], query the outcome by [`Self::look_up`].
    pub async fn charge(&self, key: PaymentId, amount: Money, means: Option<&str>) -> anyhow::Result<ChargeOutcome> {
        let means = means.unwrap_or_default();
        if means.starts_with(LOST_ON_THE_WAY) {
            return Ok(ChargeOutcome::Unknown);
        }
        let declined = means.starts_with(ALWAYS_DECLINED) || rand::random::<f64>() >= self.success_rate;
        let state = match declined {
            true => "declined",
            false if means.starts_with(ASYNCHRONOUS) => "processing",
            false => "captured",
        };
        let outcome = self.remember(key, amount, state).await?;
        Ok(if means.starts_with(CHARGED_WITHOUT_ANSWER) { ChargeOutcome::Unknown } else { outcome })
    }

    /// The outcome of the charge under this key; `Unknown` if the provider has no such charge.
    ///
    /// # Errors
    /// The provider can't be reached.
    pub async fn look_up(&self, key: PaymentId) -> anyhow::Result<ChargeOutcome> {
        let state = sqlx::query_scalar!("select state from mock_provider_charges where idempotency_key = $1", key as _)
            .fetch_optional(&self.ledger)
            .await
            .context("the mock provider's ledger can't be read")?;
        Ok(state.map_or(ChargeOutcome::Unknown, |state| outcome_of(&state)))
    }

    /// The outcome of the charge under this key. If the provider has no such charge, this voids the key. So a delayed
    /// request can't take money for a reservation that the service has given up.
    ///
    /// # Errors
    /// The provider can't be reached.
    pub async fn settle_unknown(&self, key: PaymentId, amount: Money) -> anyhow::Result<ChargeOutcome> {
        self.remember(key, amount, "voided").await
    }

    /// Voids a charge that is still processing or has not reached the provider, and returns its outcome.
    ///
    /// # Errors
    /// The provider can't be reached.
    pub async fn cancel(&self, key: PaymentId, amount: Money) -> anyhow::Result<ChargeOutcome> {
        self.decide(key, "voided").await?;
        self.settle_unknown(key, amount).await
    }

    /// Writes the outcome of a notice into the mock's ledger, because the mock has no other source for it. With a real
    /// provider this does nothing: only the provider's answer to a query counts.
    ///
    /// # Errors
    /// The provider can't be reached.
    pub async fn noticed(&self, key: PaymentId, captured: bool) -> anyhow::Result<()> {
        self.decide(key, if captured { "captured" } else { "declined" }).await
    }

    /// Sets the final state of a charge that is still processing; any other charge stays as it is.
    async fn decide(&self, key: PaymentId, state: &str) -> anyhow::Result<()> {
        sqlx::query!(
            "update mock_provider_charges set state = $2 where idempotency_key = $1 and state = 'processing'",
            key as _,
            state,
        )
        .execute(&self.ledger)
        .await
        .context("the mock provider's ledger can't be written")?;
        Ok(())
    }

    /// Refunds `amount` of a captured charge, once per key.
    ///
    /// # Errors
    /// The provider can't be reached or knows no such charge.
    pub async fn refund(&self, key: Uuid, charge: PaymentId, amount: Money) -> anyhow::Result<()> {
        sqlx::query!(
            "insert into mock_provider_refunds (idempotency_key, charge_key, amount) values ($1, $2, $3) on conflict do nothing",
            key,
            charge as _,
            amount as _,
        )
        .execute(&self.ledger)
        .await
        .context("the mock provider's ledger can't be written")?;
        Ok(())
    }

    /// Writes the key's first state, or reads the state that is already stored.
    async fn remember(&self, key: PaymentId, amount: Money, state: &'static str) -> anyhow::Result<ChargeOutcome> {
        self.charges.call((key, amount, state)).await.context("the mock provider's ledger can't be written")
    }
}

async fn remember_all(ledger: BatchPool, charges: Vec<Charge>) -> Vec<Result<ChargeOutcome>> {
    let ledger = &ledger;
    // The database refuses a statement that has one key twice; then each charge is written on its own.
    batch_or_each(charges, |charges| async move { remember(ledger, &charges).await.map(Some) }).await
}

async fn remember(ledger: &BatchPool, charges: &[Charge]) -> Result<Vec<Result<ChargeOutcome>>> {
    let mut connection = ledger.acquire().await?;
    let known = sqlx::query!(
        "insert into mock_provider_charges (idempotency_key, amount, state)
         select * from unnest($1::uuid[], $2::numeric[], $3::text[])
         on conflict (idempotency_key) do update set state = mock_provider_charges.state returning idempotency_key, state",
        charges.iter().map(|(key, ..)| *key).collect::<Vec<_>>() as _,
        charges.iter().map(|(_, amount, _)| *amount).collect::<Vec<_>>() as _,
        charges.iter().map(|(.., state)| *state).collect::<Vec<_>>() as _,
    )
    .fetch_all(&mut *connection)
    .await?;
    ledger.release(connection);
    let known: HashMap<PaymentId, ChargeOutcome> =
        known.into_iter().map(|charge| (charge.idempotency_key, outcome_of(&charge.state))).collect();
    let outcome = |(key, ..): &Charge| Ok(known.get(key).copied().unwrap_or(ChargeOutcome::Unknown));
    Ok(charges.iter().map(outcome).collect())
}

fn outcome_of(state: &str) -> ChargeOutcome {
    match state {
        "captured" => ChargeOutcome::Captured,
        "processing" => ChargeOutcome::Processing,
        _ => ChargeOutcome::Declined,
    }
}
