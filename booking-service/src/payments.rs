//! The payment provider, behind a handful of calls. The only one so far is a mock that behaves like the real thing
//! where it hurts: it remembers every charge by its idempotency key, it declines, it can fall silent before or after
//! taking the money, and it can take its time and send a notice of the outcome (`workflows/payment_webhook.rs`).
//!
//! A payment's id is the idempotency key: asking twice under one key charges once. When an answer did not come, the
//! provider is asked what became of the charge, never asked to charge again.

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

/// A `payment_id` that begins so is always declined.
pub const ALWAYS_DECLINED: &str = "pay_decline";
/// A `payment_id` that begins so is charged, but the provider's answer is lost.
pub const CHARGED_WITHOUT_ANSWER: &str = "pay_timeout_charged";
/// A `payment_id` that begins so never reaches the provider.
pub const LOST_ON_THE_WAY: &str = "pay_timeout_lost";
/// A `payment_id` that begins so is taken on; its outcome comes by notice.
pub const ASYNCHRONOUS: &str = "pay_async";

/// What became of a charge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChargeOutcome {
    /// The money is taken.
    Captured,
    /// The provider said no, or will never take it.
    Declined,
    /// The provider works on it and will send a notice.
    Processing,
    /// No answer: the money may be taken or not.
    Unknown,
}

/// A charge as the mock's ledger remembers it: its key, its amount, its state.
type Charge = (PaymentId, Money, &'static str);

/// Takes and returns money. This version has the mock one only.
#[derive(Debug)]
pub struct PaymentProvider {
    ledger: PgPool,
    /// Charges that come at the same time are written together: the mock is to cost as little of this database as it can.
    charges: Batcher<Charge, ChargeOutcome>,
    success_rate: f64,
}

const BATCHES: BatchConfig = BatchConfig::with_timeout(Duration::from_secs(10)).with_linger();

impl PaymentProvider {
    /// The mock provider: captures `success_rate` of all charges; keeps its ledger in tables of its own. Charges go by `desk_ledger`, as they
    /// come by the thousand, and the rest by `ledger`.
    #[must_use]
    pub fn mock(ledger: PgPool, desk_ledger: BatchPool, success_rate: f64, lifecycle: &Lifecycle) -> Self {
        let charges = Batcher::start(lifecycle, BATCHES, move |charges| remember_all(desk_ledger.clone(), charges));
        Self { ledger, charges, success_rate }
    }

    /// Takes the money, once for each key.
    ///
    /// # Errors
    /// The provider can't be reached; as after [`ChargeOutcome::Unknown`], look the charge up.
    pub async fn charge(
        &self,
        key: PaymentId,
        amount: Money,
        payment_id: Option<&str>,
    ) -> anyhow::Result<ChargeOutcome> {
        let means = payment_id.unwrap_or_default();
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

    /// What became of the charge under this key; unknown when the provider has never heard of it.
    ///
    /// # Errors
    /// The provider can't be reached.
    pub async fn look_up(&self, key: PaymentId) -> anyhow::Result<ChargeOutcome> {
        let state: Option<String> =
            sqlx::query_scalar("select state from mock_provider_charges where idempotency_key = $1")
                .bind(key)
                .fetch_optional(&self.ledger)
                .await
                .context("the mock provider's ledger can't be read")?;
        Ok(state.map_or(ChargeOutcome::Unknown, |state| outcome_of(&state)))
    }

    /// What became of the charge under this key. One that the provider never heard of is made impossible, so that a
    /// request still on its way can't take money for a reservation that has been given up.
    ///
    /// # Errors
    /// The provider can't be reached.
    pub async fn settle_unknown(&self, key: PaymentId, amount: Money) -> anyhow::Result<ChargeOutcome> {
        self.remember(key, amount, "voided").await
    }

    /// Calls off a charge that has not been captured; what became of it then.
    ///
    /// # Errors
    /// The provider can't be reached.
    pub async fn cancel(&self, key: PaymentId, amount: Money) -> anyhow::Result<ChargeOutcome> {
        self.decide(key, "voided").await?;
        self.settle_unknown(key, amount).await
    }

    /// Takes a notice for what happened in the world: the mock has no other side that could have sent it. With a real provider
    /// this does nothing, as what counts is what it says when it is asked.
    ///
    /// # Errors
    /// The provider can't be reached.
    pub async fn noticed(&self, key: PaymentId, captured: bool) -> anyhow::Result<()> {
        self.decide(key, if captured { "captured" } else { "declined" }).await
    }

    /// Ends the work on a charge, if it is still worked on.
    async fn decide(&self, key: PaymentId, state: &str) -> anyhow::Result<()> {
        sqlx::query("update mock_provider_charges set state = $2 where idempotency_key = $1 and state = 'processing'")
            .bind(key)
            .bind(state)
            .execute(&self.ledger)
            .await
            .context("the mock provider's ledger can't be written")?;
        Ok(())
    }

    /// Gives money of a captured charge back, once for each key.
    ///
    /// # Errors
    /// The provider can't be reached or knows no such charge.
    pub async fn refund(&self, key: Uuid, charge: PaymentId, amount: Money) -> anyhow::Result<()> {
        sqlx::query("insert into mock_provider_refunds (idempotency_key, charge_key, amount) values ($1, $2, $3) on conflict do nothing")
            .bind(key)
            .bind(charge)
            .bind(amount)
            .execute(&self.ledger)
            .await
            .context("the mock provider's ledger can't be written")?;
        Ok(())
    }

    /// Writes the key's first outcome, or finds the one that is there.
    async fn remember(&self, key: PaymentId, amount: Money, state: &'static str) -> anyhow::Result<ChargeOutcome> {
        self.charges.call((key, amount, state)).await.context("the mock provider's ledger can't be written")
    }
}

async fn remember_all(ledger: BatchPool, charges: Vec<Charge>) -> Vec<Result<ChargeOutcome>> {
    let ledger = &ledger;
    // One key twice in a statement is refused by the database; then each is written by itself.
    batch_or_each(charges, |charges| async move { remember(ledger, &charges).await.map(Some) }).await
}

async fn remember(ledger: &BatchPool, charges: &[Charge]) -> Result<Vec<Result<ChargeOutcome>>> {
    let mut connection = ledger.acquire().await?;
    let known: Vec<(PaymentId, String)> = sqlx::query_as(
        "insert into mock_provider_charges (idempotency_key, amount, state)
         select * from unnest($1::uuid[], $2::numeric[], $3::text[])
         on conflict (idempotency_key) do update set state = mock_provider_charges.state returning idempotency_key, state",
    )
    .bind(charges.iter().map(|(key, ..)| *key).collect::<Vec<_>>())
    .bind(charges.iter().map(|(_, amount, _)| *amount).collect::<Vec<_>>())
    .bind(charges.iter().map(|(.., state)| *state).collect::<Vec<_>>())
    .fetch_all(&mut *connection)
    .await?;
    ledger.release(connection);
    let known: HashMap<PaymentId, ChargeOutcome> =
        known.into_iter().map(|(key, state)| (key, outcome_of(&state))).collect();
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
