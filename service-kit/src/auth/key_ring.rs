//! The issuer's published keys (a JWK set, RFC 7517), kept fresh without a restart.
//!
//! Requests read the current set without a lock. A file is read again when it has changed; a URL is fetched every five
//! minutes. A token with an unknown key id may be the first after a change of keys, so it waits for one more read.
//! Unknown key ids cause at most one read a minute (one a second for a file), regardless of the callers. When a read
//! fails, the known keys stay.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use arc_swap::ArcSwap;
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use reqwest::{Url, header, redirect};
use tokio::sync::{Mutex, Semaphore};
use tokio_util::sync::CancellationToken;

use super::jwk_set::{self, SET_BYTES_MAX};
use super::refusal::{AuthError, TokenError};
use super::settings::{JwtSettings, KeySource};
use crate::http::tls::Trust;
use crate::process::lifecycle::Lifecycle;

#[cfg(all(test, feature = "testing"))]
#[expect(clippy::unwrap_used, reason = "a test fails by a panic")]
mod tests;

/// The time limit for the whole fetch of a key set.
const FETCH_TIMEOUT: Duration = Duration::from_secs(3);
/// The pause between refreshes while no key is known.
const STARTING_PAUSE: Duration = Duration::from_secs(1);
/// Requests that may wait for a read at a time. A flood of made-up key ids must not take all permits of the service.
const WAITING_MAX: usize = 32;

/// How often the keys are read.
#[derive(Debug, Clone, Copy)]
struct Pace {
    /// The pause after a read that succeeded.
    usual: Duration,
    /// The pause after a read that failed.
    after_failure: Duration,
    /// The least pause between two reads for unknown key ids.
    unknown_key: Duration,
}

impl Pace {
    const FILE: Self = Self::of(1, 1, 1);
    const URL: Self = Self::of(300, 15, 60);

    const fn of(usual: u64, after_failure: u64, unknown_key: u64) -> Self {
        let seconds = Duration::from_secs;
        Self { usual: seconds(usual), after_failure: seconds(after_failure), unknown_key: seconds(unknown_key) }
    }
}

/// A key, and the rules for a token that it has signed.
#[derive(Debug)]
pub(super) struct Key {
    pub(super) algorithm: Algorithm,
    pub(super) decoding: DecodingKey,
    pub(super) validation: Validation,
}

impl Key {
    pub(super) fn new(algorithm: Algorithm, decoding: DecodingKey, rules: &JwtSettings) -> Self {
        let mut validation = Validation::new(algorithm);
        validation.leeway = rules.leeway.as_secs();
        validation.validate_nbf = true;
        validation.set_issuer(&[&rules.issuer]);
        validation.set_audience(&[&rules.audience]);
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        Self { algorithm, decoding, validation }
    }
}

/// The keys of one read, with their ids.
type KeySet = Vec<(Option<String>, Arc<Key>)>;

/// A file's state when it was read: inode, length, and modification time in seconds and nanoseconds.
type Mark = (u64, u64, i64, i64);

/// The keys that tokens are verified with, refreshed from their source.
pub(super) struct KeyRing {
    rules: JwtSettings,
    pace: Pace,
    set: ArcSwap<KeySet>,
    /// When an unknown key id last caused a read.
    asked: Mutex<Option<Instant>>,
    waiting: Semaphore,
}

impl KeyRing {
    pub(super) fn open(rules: JwtSettings, lifecycle: &Lifecycle) -> Arc<Self> {
        let pace = if let KeySource::File(_) = rules.keys { Pace::FILE } else { Pace::URL };
        Self::open_at(pace, rules, lifecycle)
    }

    fn open_at(pace: Pace, rules: JwtSettings, lifecycle: &Lifecycle) -> Arc<Self> {
        let ring = Arc::new(Self {
            rules,
            pace,
            set: ArcSwap::default(),
            asked: Mutex::new(None),
            waiting: Semaphore::new(WAITING_MAX),
        });
        lifecycle.spawn("signing keys", Arc::clone(&ring).keep_fresh(lifecycle.token().clone()));
        ring
    }

    /// The key with this id, if it is for this algorithm.
    pub(super) async fn find(&self, kid: Option<&str>, algorithm: Algorithm) -> Result<Arc<Key>, AuthError> {
        // A set has no key for any other algorithm, so a read would not help.
        if !matches!(algorithm, Algorithm::RS256 | Algorithm::ES256 | Algorithm::EdDSA) {
            return Err(AuthError::Token(TokenError::Algorithm));
        }
        match self.find_known(kid, algorithm) {
            Err(AuthError::Token(TokenError::UnknownKey) | AuthError::KeysAway) => {
                self.refresh_for_unknown().await;
                self.find_known(kid, algorithm)
            }
            known => known,
        }
    }

    fn find_known(&self, kid: Option<&str>, algorithm: Algorithm) -> Result<Arc<Key>, AuthError> {
        let set = self.set.load();
        let named: Vec<&Arc<Key>> = match kid {
            Some(kid) => set.iter().filter(|(id, _)| id.as_deref() == Some(kid)).map(|(_, key)| key).collect(),
            // A token that names no key is accepted only if there is exactly one key.
            None => set.iter().map(|(_, key)| key).filter(|_| set.len() == 1).collect(),
        };
        match named.iter().find(|key| key.algorithm == algorithm) {
            Some(key) => Ok(Arc::clone(key)),
            None if set.is_empty() => Err(AuthError::KeysAway),
            None if named.is_empty() => Err(AuthError::Token(TokenError::UnknownKey)),
            None => Err(AuthError::Token(TokenError::Algorithm)),
        }
    }

    async fn refresh_for_unknown(&self) {
        let Ok(_place) = self.waiting.try_acquire() else { return };
        // Concurrent callers share the refresh in progress.
        let mut asked = self.asked.lock().await;
        if asked.is_none_or(|at| at.elapsed() >= self.pace.unknown_key) {
            *asked = Some(Instant::now());
            self.refresh().await;
        }
    }

    /// Reads the keys, and replaces the set if at least one is usable. Returns whether the read succeeded.
    async fn refresh(&self) -> bool {
        let read = match &self.rules.keys {
            KeySource::File(path) => jwk_set::read_file(path),
            KeySource::Url(url) => {
                fetch(url, &self.rules.trust).await.with_context(|| format!("{url} can't be fetched"))
            }
            KeySource::Secret(_) => return true,
        };
        match read.and_then(|text| self.parse(&text)) {
            Ok(set) => {
                tracing::debug!(keys = set.len(), "Signing keys read");
                self.set.store(Arc::new(set));
                true
            }
            Err(error) => {
                let kept = self.set.load().len();
                tracing::warn!(
                    error = format!("{error:#}"),
                    kept,
                    "The signing keys can't be read; those that are known stay"
                );
                false
            }
        }
    }

    fn parse(&self, text: &str) -> anyhow::Result<KeySet> {
        let keys = jwk_set::parse(text)?.into_iter();
        Ok(keys.map(|(kid, algorithm, key)| (kid, Arc::new(Key::new(algorithm, key, &self.rules)))).collect())
    }

    async fn keep_fresh(self: Arc<Self>, stopping: CancellationToken) -> anyhow::Result<()> {
        let mut seen: Option<Mark> = None;
        loop {
            let mark = self.mark();
            // A file that has not changed is not read; a URL has no mark.
            let fresh = if mark.is_some() && mark == seen { true } else { self.refresh().await };
            seen = mark.filter(|_| fresh);
            let pause = match fresh {
                true => self.pace.usual,
                // Until then no token can be verified.
                false if self.set.load().is_empty() => STARTING_PAUSE,
                false => self.pace.after_failure,
            };
            if stopping.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                return Ok(());
            }
        }
    }

    fn mark(&self) -> Option<Mark> {
        let KeySource::File(path) = &self.rules.keys else { return None };
        let file = fs::metadata(path).ok()?;
        Some((file.ino(), file.len(), file.mtime(), file.mtime_nsec()))
    }
}

async fn fetch(url: &Url, trust: &Trust) -> anyhow::Result<String> {
    // Only the operator decides where the keys are. A redirect would let the server decide.
    let client = trust.http_client().timeout(FETCH_TIMEOUT).redirect(redirect::Policy::none()).build()?;
    let mut answer =
        client.get(url.clone()).header(header::ACCEPT, "application/jwk-set+json, application/json").send().await?;
    ensure!(answer.status().is_success(), "it answered {}", answer.status());
    let mut body = Vec::new();
    while let Some(piece) = answer.chunk().await? {
        ensure!(body.len() + piece.len() <= SET_BYTES_MAX, "it sends more than {SET_BYTES_MAX} bytes");
        body.extend_from_slice(&piece);
    }
    Ok(String::from_utf8(body)?)
}
