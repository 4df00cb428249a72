//! `Idempotency-Key`: a repeated request has its effect once and gets the same answer.
//!
//! A request claims its key before the work. A booking stores its answer in the transaction of its effect; a payment
//! stores it afterwards, because the reservation itself says that it is paid. While an attempt runs, other requests
//! with the key get `409`. After the attempt has died, the next one takes over. The service keeps
//! answers for 24 hours: successes, and refusals that would be the same again. It does not keep a failure, because the
//! next attempt may succeed. If a failed attempt may have left something behind, the next one gets its id.

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use service_kit::http::error::{Error, Result, problem_response};
use sha2::{Digest, Sha256};
use shared_contracts::ids::UserId;
use shared_contracts::problem::{Code, FieldError, Problem};
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

/// The name of the request header.
pub const HEADER: &str = "idempotency-key";
/// The header of an answer that was stored for an earlier request.
const REPLAYED: &str = "idempotency-replayed";
/// The most characters of a key.
const KEY_CHARS_MAX: usize = 255;
/// Seconds after which another attempt may take over: longer than a booking or a payment may take.
const LOCK_SECONDS: f64 = 35.0;
/// The most keys that one statement deletes.
const DELETED_AT_ONCE: i64 = 1000;

/// The request's key, if it has one. The quoted form of the standard and the bare form mean the same.
#[derive(Debug, Clone)]
pub struct IdempotencyKey(Option<String>);

impl<S: Sync> FromRequestParts<S> for IdempotencyKey {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self> {
        let Some(value) = parts.headers.get(HEADER) else {
            return Ok(Self(None));
        };
        let key = value.to_str().unwrap_or_default().trim();
        let key = key.strip_prefix('"').and_then(|key| key.strip_suffix('"')).unwrap_or(key);
        if key.is_empty() || key.chars().count() > KEY_CHARS_MAX {
            let detail = format!(
                "must be 1 to {KEY_CHARS_MAX} visible ASCII characters; a fresh UUID for each new request will do"
            );
            return Err(Error::invalid(FieldError::parameter("Idempotency-Key", detail)));
        }
        Ok(Self(Some(key.to_owned())))
    }
}

/// The right to do the work of a request.
#[derive(Debug, Clone)]
pub struct Claim {
    user_id: UserId,
    operation: &'static str,
    /// `None` for a request without a key; then there is nothing to store, hand over or release.
    key: Option<String>,
    attempt: Uuid,
    /// The earlier attempt that this one replaces. It died or got no final answer, and may have left something half
    /// done.
    pub previous_attempt: Option<Uuid>,
    /// Whether the earlier attempt ended by [`Self::hand_over`]; false if it died, or if there was none.
    pub previous_was_answered: bool,
}

/// The result of a claim: do the work, or send the stored answer.
pub enum Claimed {
    /// This request must do the work.
    Work(Claim),
    /// An earlier request did the work, and this is its answer.
    Answer(Response),
}

/// Claims the request's key for `attempt`. Every request with this key must have an equal `request`. Without a key, this
/// runs no statement and returns [`Claimed::Work`].
///
/// # Errors
/// Another request with the key is in progress, the key was used with a different request, or the database failed.
pub async fn claim(
    db: &PgPool,
    user_id: UserId,
    operation: &'static str,
    key: IdempotencyKey,
    attempt: Uuid,
    request: &impl Serialize,
) -> Result<Claimed> {
    let mut claim = Claim { key: key.0, attempt, operation, ..Claim::without_key(user_id) };
    if claim.key.is_none() {
        return Ok(Claimed::Work(claim));
    }
    let canonical = serde_json::to_vec(request).map_err(|error| Error::Internal(error.into()))?;
    let fingerprint = Sha256::digest(canonical).to_vec();
    if claim.insert(db, &fingerprint).await? {
        return Ok(Claimed::Work(claim));
    }
    let Some(stored) = claim.find(db).await? else {
        // The other attempt released the key between the two statements.
        return Err(in_flight());
    };
    if stored.fingerprint != fingerprint {
        let detail = "This Idempotency-Key was used with another request. Use a fresh key for each new request.";
        return Err(Error::refused(Code::IdempotencyKeyReused, detail));
    }
    if let (Some(status), Some(answer)) = (stored.status, stored.answer) {
        return replay(status, answer).map(Claimed::Answer);
    }
    if stored.is_running || !claim.take_over(db, stored.attempt).await? {
        return Err(in_flight());
    }
    claim.previous_attempt = Some(stored.attempt);
    claim.previous_was_answered = stored.was_answered;
    Ok(Claimed::Work(claim))
}

fn in_flight() -> Error {
    let detail = "A request with this Idempotency-Key is in progress. Repeat yours in a moment to get its answer.";
    Problem::new(Code::IdempotencyKeyInFlight, detail).retry_after(1).into()
}

fn replay(status: i16, answer: String) -> Result<Response> {
    let status =
        u16::try_from(status).ok().and_then(|status| StatusCode::from_u16(status).ok()).unwrap_or(StatusCode::OK);
    let mut response = if status.is_success() {
        (status, [(header::CONTENT_TYPE, "application/json")], answer.clone()).into_response()
    } else {
        problem_response(serde_json::from_str(&answer).map_err(|error| Error::Internal(error.into()))?)
    };
    if status == StatusCode::CREATED {
        let made: serde_json::Value = serde_json::from_str(&answer).map_err(|error| Error::Internal(error.into()))?;
        let location = format!("/api/v1/reservations/{}", made["id"].as_str().unwrap_or_default());
        response
            .headers_mut()
            .insert(header::LOCATION, HeaderValue::from_str(&location).map_err(|error| Error::Internal(error.into()))?);
    }
    response.headers_mut().insert(REPLAYED, HeaderValue::from_static("true"));
    Ok(response)
}

/// The row of a key that an earlier request has claimed.
struct StoredKey {
    fingerprint: Vec<u8>,
    attempt: Uuid,
    is_running: bool,
    /// The attempt has ended and handed the key over ([`Claim::hand_over`]).
    was_answered: bool,
    status: Option<i16>,
    answer: Option<String>,
}

impl Claim {
    /// A claim for work that no request with a key asks for.
    #[must_use]
    pub fn without_key(user_id: UserId) -> Self {
        Self {
            user_id,
            operation: "",
            key: None,
            attempt: Uuid::nil(),
            previous_attempt: None,
            previous_was_answered: false,
        }
    }

    /// Whether the request has a key, so that its answer must be stored.
    #[must_use]
    pub fn has_key(&self) -> bool {
        self.key.is_some()
    }

    async fn insert(&self, db: &PgPool, fingerprint: &[u8]) -> Result<bool> {
        let inserted = sqlx::query!(
            "insert into idempotency_keys (user_id, operation, key, fingerprint, attempt, locked_until)
             values ($1, $2, $3, $4, $5, now() + make_interval(secs => $6)) on conflict do nothing",
            self.user_id as _,
            self.operation,
            self.key,
            fingerprint,
            self.attempt,
            LOCK_SECONDS,
        )
        .execute(db)
        .await?;
        Ok(inserted.rows_affected() == 1)
    }

    async fn find(&self, db: &PgPool) -> Result<Option<StoredKey>> {
        let row = sqlx::query_as!(
            StoredKey,
            r#"select fingerprint, attempt, locked_until > now() as "is_running!", locked_until = '-infinity' as "was_answered!", status, answer
             from idempotency_keys
             where user_id = $1 and operation = $2 and key = $3"#,
            self.user_id as _,
            self.operation,
            self.key,
        )
        .fetch_optional(db)
        .await?;
        Ok(row)
    }

    async fn take_over(&self, db: &PgPool, previous: Uuid) -> Result<bool> {
        let taken = sqlx::query!(
            "update idempotency_keys set attempt = $4, locked_until = now() + make_interval(secs => $6)
             where user_id = $1 and operation = $2 and key = $3 and attempt = $5 and status is null and locked_until <= now()",
            self.user_id as _,
            self.operation,
            self.key,
            self.attempt,
            previous,
            LOCK_SECONDS,
        )
        .execute(db)
        .await?;
        Ok(taken.rows_affected() == 1)
    }

    /// Stores the answer of a success.
    ///
    /// # Errors
    /// Another attempt has taken over, so a transaction of the effect must not be committed; or the database failed.
    pub async fn complete(&self, tx: &mut PgConnection, status: StatusCode, answer: &impl Serialize) -> Result<()> {
        let answer = serde_json::to_string(answer).map_err(|error| Error::Internal(error.into()))?;
        if self.key.is_some() && !self.keep(tx, status.as_u16(), &answer).await? {
            return Err(in_flight());
        }
        Ok(())
    }

    /// Stores the answers of several requests that have created something (201), in the transaction of their effects.
    ///
    /// # Errors
    /// Another attempt has taken over one of the keys, so the transaction must not be committed; or the database
    /// failed.
    pub async fn complete_created<'a>(
        tx: &mut PgConnection,
        answers: impl Iterator<Item = (&'a Self, &'a (impl Serialize + 'a))>,
    ) -> Result<()> {
        let (mut claims, mut texts) = (Vec::new(), Vec::new());
        for (claim, answer) in answers.filter(|(claim, _)| claim.has_key()) {
            claims.push(claim);
            texts.push(serde_json::to_string(answer).map_err(|error| Error::Internal(error.into()))?);
        }
        let kept = sqlx::query!(
            "update idempotency_keys k set status = $6, answer = given.answer
             from unnest($1::uuid[], $2::text[], $3::text[], $4::uuid[], $5::text[]) as given (user_id, operation, key, attempt, answer)
             where k.user_id = given.user_id and k.operation = given.operation and k.key = given.key and k.attempt = given.attempt
               and k.status is null",
            claims.iter().map(|claim| claim.user_id).collect::<Vec<_>>() as _,
            claims.iter().map(|claim| claim.operation).collect::<Vec<_>>() as _,
            claims.iter().map(|claim| claim.key.as_deref()).collect::<Vec<_>>() as _,
            &claims.iter().map(|claim| claim.attempt).collect::<Vec<_>>(),
            &texts,
            StatusCode::CREATED.as_u16() as i16,
        )
        .execute(tx)
        .await?;
        if kept.rows_affected() as usize == claims.len() { Ok(()) } else { Err(in_flight()) }
    }

    /// Stores a refusal that would be the same again. After any other error it frees the key, so that the next attempt
    /// can do the work.
    pub async fn reject(&self, db: &PgPool, error: &Error) {
        if self.key.is_none() {
            return;
        }
        let kept = match error {
            Error::Refused(problem) if is_final(problem.code) => {
                match (serde_json::to_string(problem), db.acquire().await) {
                    (Ok(answer), Ok(mut connection)) => {
                        self.keep(&mut connection, problem.status, &answer).await.map(drop)
                    }
                    (_, Err(error)) => Err(error.into()),
                    (Err(error), _) => Err(Error::Internal(error.into())),
                }
            }
            _ => match self.previous_attempt.filter(|_| self.previous_was_answered) {
                Some(earlier) => {
                    self.hand_over(db, earlier).await;
                    Ok(())
                }
                None => self.release(db).await,
            },
        };
        if let Err(error) = kept {
            tracing::warn!(%error, "The Idempotency-Key stays locked until its lock expires");
        }
    }

    async fn keep(&self, connection: &mut PgConnection, status: u16, answer: &str) -> Result<bool> {
        let kept = sqlx::query!(
            "update idempotency_keys set status = $5, answer = $6
             where user_id = $1 and operation = $2 and key = $3 and attempt = $4 and status is null",
            self.user_id as _,
            self.operation,
            self.key,
            self.attempt,
            status as i16,
            answer,
        )
        .execute(connection)
        .await?;
        Ok(kept.rows_affected() == 1)
    }

    /// Hands the key to the next request, which gets the id `attempt`. There is no final answer yet, and that attempt
    /// may have left something behind or still be running.
    pub async fn hand_over(&self, db: &PgPool, attempt: Uuid) {
        if self.key.is_none() {
            return;
        }
        let left = sqlx::query!(
            "update idempotency_keys set attempt = $5, locked_until = '-infinity'
             where user_id = $1 and operation = $2 and key = $3 and attempt = $4 and status is null",
            self.user_id as _,
            self.operation,
            self.key,
            self.attempt,
            attempt,
        );
        if let Err(error) = left.execute(db).await {
            tracing::warn!(%error, "The Idempotency-Key stays locked until its lock expires");
        }
    }

    /// Deletes the key, as if no request had sent it.
    ///
    /// # Errors
    /// The database failed; the key stays locked until its lock expires.
    pub async fn release(&self, db: &PgPool) -> Result<()> {
        if self.key.is_none() {
            return Ok(());
        }
        sqlx::query!(
            "delete from idempotency_keys where user_id = $1 and operation = $2 and key = $3 and attempt = $4 and status is null",
            self.user_id as _,
            self.operation,
            self.key,
            self.attempt,
        )
        .execute(db)
        .await?;
        Ok(())
    }
}

/// Whether a refusal is final. A refusal because of a passing state is not stored.
fn is_final(code: Code) -> bool {
    code.status() < 500
        && !matches!(
            code,
            Code::ConfirmationInProgress
                | Code::IdempotencyKeyInFlight
                | Code::IdempotencyKeyReused
                | Code::SalesNotStarted
                | Code::TooManyReservations
                | Code::TooManySeats
        )
}

/// Deletes keys that are older than 24 hours, at most 1,000 per call. Returns how many.
///
/// # Errors
/// The database failed.
pub async fn forget_old(db: &PgPool) -> Result<u64> {
    let deleted = sqlx::query!(
        "delete from idempotency_keys where (user_id, operation, key) in (
             select user_id, operation, key from idempotency_keys where created_at < now() - interval '24 hours'
             order by created_at limit $1 for update skip locked)",
        DELETED_AT_ONCE,
    )
    .execute(db)
    .await?;
    Ok(deleted.rows_affected())
}
