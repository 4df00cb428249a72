//! The payment provider, behind four calls. The only one so far is a mock that behaves like the real thing where it hurts:
//! it remembers every charge by its idempotency key, it declines, and it can fall silent before or after taking the money.
//!
//! A payment's id is the idempotency key: asking twice under one key charges once. When an answer did not come, the provider
//! is asked what became of the charge, never asked to charge again.

use anyhow::Context;
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

/// What became of a charge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChargeOutcome {
    /// The money is taken.
    Captured,
    /// The provider said no.
    Declined,
    /// No answer: the money may be taken or not.
    Unknown,
}

/// The provider.
#[derive(Debug, Clone)]
pub struct PaymentProvider {
    ledger: PgPool,
    success_rate: f64,
}

impl PaymentProvider {
    /// The mock provider: captures `success_rate` of all charges; keeps its ledger in tables of its own.
    #[must_use]
    pub fn mock(ledger: PgPool, success_rate: f64) -> Self {
        Self { ledger, success_rate }
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
        let state = self.remember(key, amount, if declined { "declined" } else { "captured" }).await?;
        if means.starts_with(CHARGED_WITHOUT_ANSWER) {
            return Ok(ChargeOutcome::Unknown);
        }
        Ok(if state == "captured" { ChargeOutcome::Captured } else { ChargeOutcome::Declined })
    }

    /// What became of the charge under this key. One that the provider never heard of is made impossible, so that a
    /// request still on its way can't take money for a reservation that has been given up.
    ///
    /// # Errors
    /// The provider can't be reached.
    pub async fn settle_unknown(&self, key: PaymentId, amount: Money) -> anyhow::Result<ChargeOutcome> {
        let state = self.remember(key, amount, "voided").await?;
        Ok(if state == "captured" { ChargeOutcome::Captured } else { ChargeOutcome::Declined })
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
    async fn remember(&self, key: PaymentId, amount: Money, state: &str) -> anyhow::Result<String> {
        sqlx::query_scalar(
            "insert into mock_provider_charges (idempotency_key, amount, state) values ($1, $2, $3)
             on conflict (idempotency_key) do update set state = mock_provider_charges.state returning state",
        )
        .bind(key)
        .bind(amount)
        .bind(state)
        .fetch_one(&self.ledger)
        .await
        .context("the mock provider's ledger can't be written")
    }
}
