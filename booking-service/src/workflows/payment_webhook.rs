//! The payment provider's notices. A notice reports how a charge ended whose outcome came later.
//!
//! A notice counts only with a signature over its time and its body, made with a secret that the provider and this
//! service share. The service stores the notice, then processes it and answers; reconciliation repeats processing that
//! failed. The service does not trust the notice for the outcome: a notice is only the reason to ask the provider
//! (`late_payment.rs`).

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use chrono::{DateTime, Utc};
use hmac::{Hmac, KeyInit, Mac};
use serde::{Deserialize, Serialize};
use service_kit::http::error::{Error, Result};
use service_kit::http::extract::{RawJson, parse_foreign};
use service_kit::http::openapi;
use service_kit::problems;
use service_kit::process::settings::Secret;
use sha2::Sha256;
use shared_contracts::ids::PaymentId;
use shared_contracts::money::{Currency, Money};
use shared_contracts::problem::{Code, FieldError, Problem};
use utoipa::ToSchema;

use super::late_payment::follow_up;
use crate::state::App;

/// The signature header: `t=<seconds since 1970>,v1=<HMAC-SHA256 in hex of "<t>.<body>">`. It has several `v1` while
/// the provider changes its secret.
pub const SIGNATURE: &str = "x-payment-signature";
/// The largest difference between the notice's time and ours, in seconds and in both directions. It limits how long
/// somebody can replay an intercepted notice.
const AGE_SECONDS_MAX: u64 = 300;
/// The number of `v1` signatures that are checked; the service ignores further ones.
const SIGNATURES_MAX: usize = 5;

/// A report of the payment provider on how a charge ended.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct PaymentNotice {
    /// The provider's id of the notice. A repeated notice has the same id.
    #[schema(min_length = 1, max_length = 200, example = "evt_1")]
    event_id: String,
    event_type: PaymentNoticeType,
    /// The charge: the `payment_id` in the answer to the confirm request.
    payment_id: PaymentId,
    /// The charged amount. It must equal the requested amount.
    amount: Money,
    currency: Currency,
    /// When the provider created the notice. The service does not use this time.
    #[serde(default)]
    occurred_at: Option<DateTime<Utc>>,
}

/// How the charge ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, sqlx::Type, ToSchema)]
#[sqlx(type_name = "text")]
pub enum PaymentNoticeType {
    /// The provider has captured the money.
    #[serde(rename = "payment.captured")]
    #[sqlx(rename = "payment.captured")]
    Captured,
    /// The provider has not captured the money, and never will.
    #[serde(rename = "payment.declined")]
    #[sqlx(rename = "payment.declined")]
    Declined,
}

/// The answer to a notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NoticeTaken {
    /// True if the effects of the notice are committed. If false, they follow without another notice.
    pub handled: bool,
    /// True if the service had stored this notice before.
    pub duplicate: bool,
}

problems!(Refusals: openapi::BODY, &[Code::Unauthenticated, Code::PaymentNotFound]);

/// Receive a payment notice
///
/// For the payment provider, which signs the notice: `X-Payment-Signature: t=<seconds since 1970>,v1=<hex>`. `v1` is
/// the HMAC-SHA256 of `<t>.<body>` under the secret in `PAYMENT_WEBHOOK_SECRET`, and `t` is at most 300 seconds from
/// now. Repeating a notice is harmless, and the order of notices does not matter.
#[utoipa::path(post, path = "/api/v1/payments/webhook", tag = "5 Payment provider", request_body = PaymentNotice,
    params(("X-Payment-Signature" = Option<String>, Header, description = "Time and signature")),
    responses((status = 200, description = "Stored", body = NoticeTaken), Refusals))]
pub(crate) async fn take_payment_notice(
    State(app): State<App>,
    headers: HeaderMap,
    RawJson(body): RawJson,
) -> Result<Json<NoticeTaken>> {
    verify(&app, &headers, &body).await?;
    let notice: PaymentNotice = parse_foreign(&body)?;
    must_fit_its_charge(&app, &notice).await?;
    let written = write(&app, &notice).await?;
    if let Written::Handled = written {
        return Ok(Json(NoticeTaken { handled: true, duplicate: true }));
    }
    let handled = match handle(&app, &notice.event_id, notice.payment_id, notice.event_type).await {
        Ok(()) => true,
        Err(error) => {
            let error = format!("{:#}", anyhow::Error::from(error));
            tracing::warn!(error, payment_id = %notice.payment_id, "A payment notice is stored and will be processed again");
            false
        }
    };
    Ok(Json(NoticeTaken { handled, duplicate: written == Written::Before }))
}

async fn verify(app: &App, headers: &HeaderMap, body: &[u8]) -> Result<()> {
    let refused = |detail: &str| Err(Error::refused(Code::Unauthenticated, detail));
    if app.webhook_secrets.is_empty() {
        return refused("No PAYMENT_WEBHOOK_SECRET is set, so no notice can be verified.");
    }
    let Some(signature) = headers.get(SIGNATURE).and_then(|value| value.to_str().ok()).and_then(Signature::parse)
    else {
        return refused(
            "Sign the notice: X-Payment-Signature: t=<seconds since 1970>,v1=<HMAC-SHA256 in hex of \"<t>.<body>\">.",
        );
    };
    // The signature is checked first, so that a caller without the secret learns nothing about our clock.
    if !app.webhook_secrets.iter().any(|secret| signature.is_by(secret, body)) {
        return refused("The signature does not match the body and timestamp.");
    }
    let seconds =
        sqlx::query_scalar!(r#"select extract(epoch from now())::int8 as "seconds!""#).fetch_one(&app.db).await?;
    if seconds.abs_diff(signature.time) > AGE_SECONDS_MAX {
        return refused("The notice's time is more than 300 seconds from now. Send it again with a new signature.");
    }
    Ok(())
}

/// The parsed signature header: its time in seconds since 1970, and its hex digests.
struct Signature<'a> {
    time: i64,
    digests: Vec<&'a str>,
}

impl<'a> Signature<'a> {
    fn parse(header: &'a str) -> Option<Self> {
        let parts = || header.split(',').filter_map(|part| part.trim().split_once('='));
        let time = parts().find(|(name, _)| *name == "t")?.1.parse().ok()?;
        let digests = parts().filter(|(name, _)| *name == "v1").map(|(_, hex)| hex).take(SIGNATURES_MAX).collect();
        Some(Self { time, digests })
    }

    fn is_by(&self, secret: &Secret, body: &[u8]) -> bool {
        let expected = signing(secret, self.time, body);
        // `verify_slice` takes the same time for every wrong answer.
        self.digests.iter().any(|digest| {
            hex::decode(digest)
                .is_ok_and(|digest| expected.as_ref().is_some_and(|mac| mac.clone().verify_slice(&digest).is_ok()))
        })
    }
}

fn signing(secret: &Secret, time: i64, body: &[u8]) -> Option<Hmac<Sha256>> {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.reveal().as_bytes()).ok()?;
    mac.update(time.to_string().as_bytes());
    mac.update(b".");
    mac.update(body);
    Some(mac)
}

/// Signs a notice as the provider does, and returns the header's value. For tests and trials.
#[must_use]
pub fn sign(secret: &Secret, time: i64, body: &[u8]) -> String {
    let digest = signing(secret, time, body).map(|mac| hex::encode(mac.finalize().into_bytes()));
    format!("t={time},v1={}", digest.unwrap_or_default())
}

/// Rejects a notice whose amount or currency differs from the charge's: it must not sell anything.
async fn must_fit_its_charge(app: &App, notice: &PaymentNotice) -> Result<()> {
    let charge = sqlx::query!("select amount, currency from payments where id = $1", notice.payment_id as _)
        .fetch_optional(&app.db)
        .await?;
    let Some(charge) = charge else {
        let detail = format!("There is no charge with the id {}.", notice.payment_id);
        return Err(Error::refused(Code::PaymentNotFound, detail));
    };
    let mut faults = Vec::new();
    if notice.amount != charge.amount {
        faults.push(FieldError::at("/amount", format!("is not the amount of the charge, which is {}", charge.amount)));
    }
    if notice.currency != charge.currency {
        let detail = format!("is not the currency of the charge, which is {}", charge.currency);
        faults.push(FieldError::at("/currency", detail));
    }
    if faults.is_empty() {
        return Ok(());
    }
    tracing::error!(payment_id = %notice.payment_id, event_id = notice.event_id, "A notice does not match its charge; investigate");
    Err(Problem::validation(faults).into())
}

/// Whether a notice is new, was stored before, or was processed before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Written {
    Now,
    Before,
    Handled,
}

async fn write(app: &App, notice: &PaymentNotice) -> Result<Written> {
    let inserted = sqlx::query!(
        "insert into payment_notices (event_id, payment_id, event_type) values ($1, $2, $3) on conflict do nothing",
        notice.event_id,
        notice.payment_id as _,
        notice.event_type as _,
    )
    .execute(&app.db)
    .await?;
    if inserted.rows_affected() == 1 {
        return Ok(Written::Now);
    }
    let handled = sqlx::query_scalar!(
        r#"select handled_at is not null as "handled!" from payment_notices where event_id = $1"#,
        notice.event_id,
    )
    .fetch_one(&app.db)
    .await?;
    Ok(if handled { Written::Handled } else { Written::Before })
}

async fn handle(app: &App, event_id: &str, payment_id: PaymentId, event_type: PaymentNoticeType) -> Result<()> {
    app.provider.noticed(payment_id, event_type == PaymentNoticeType::Captured).await?;
    follow_up(app, payment_id).await?;
    sqlx::query!("update payment_notices set handled_at = now() where event_id = $1", event_id)
        .execute(&app.db)
        .await?;
    Ok(())
}

struct Waiting {
    event_id: String,
    payment_id: PaymentId,
    event_type: PaymentNoticeType,
}

/// Processes notices that were stored but not processed to the end. Returns how many are done now.
///
/// # Errors
/// The database, the payment provider or the Event Service failed; a later round retries.
pub async fn handle_waiting(app: &App, limit: i64) -> Result<usize> {
    // For the first two seconds, the request that brought a notice processes it.
    let waiting = sqlx::query_as!(
        Waiting,
        "select event_id, payment_id, event_type from payment_notices
         where handled_at is null and received_at < now() - interval '2 seconds' order by received_at limit $1",
        limit,
    )
    .fetch_all(&app.db)
    .await?;
    let mut done = Ok(0);
    for Waiting { event_id, payment_id, event_type } in waiting {
        // A failing notice must not keep other buyers from their tickets.
        match handle(app, &event_id, payment_id, event_type).await {
            Ok(()) => done = done.map(|count| count + 1),
            Err(error) => done = Err(error),
        }
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_signed(header: &str, secret: &str, body: &[u8]) -> bool {
        Signature::parse(header).is_some_and(|signature| signature.is_by(&Secret::from(secret), body))
    }

    #[test]
    fn only_these_bytes_at_this_time_under_this_secret_are_signed() {
        let header = sign(&Secret::from("secret"), 1_700_000_000, b"{}");
        assert!(is_signed(&header, "secret", b"{}"));
        assert!(
            is_signed(&format!("v1=00ff, {header} ,v0=x"), "secret", b"{}"),
            "while secrets change, there are several"
        );
        assert!(!is_signed(&header, "other", b"{}"));
        assert!(!is_signed(&header, "secret", b"{ }"));
        assert!(!is_signed(&header.replace("t=17", "t=18"), "secret", b"{}"));
        assert!(!is_signed(&header[..header.len() - 2], "secret", b"{}"), "a piece of the digest is not the digest");
        for bad in ["", "t=1", "v1=00", "t=x,v1=00", "t=1,v1=zz", "t=1,v1="] {
            assert!(!is_signed(bad, "secret", b"{}"), "{bad}");
        }
    }

    /// The expected digest comes from `openssl dgst -sha256 -hmac`.
    #[test]
    fn the_signature_is_that_of_other_tools() {
        assert_eq!(
            sign(&Secret::from("secret"), 1_700_000_000, b"{}"),
            "t=1700000000,v1=b8569b78799ff9e3cbff0fc2d63a33a2b57f3282abd07c37ae5e8e7d79a5f163"
        );
    }
}
