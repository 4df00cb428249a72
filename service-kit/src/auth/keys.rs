//! The issuer's published keys (a JWK set, RFC 7517), kept fresh without a restart.
//!
//! Requests read the present set without a lock. A file is read again when it has changed; a URL is fetched every five minutes. A token
//! with a key id that nobody knows may be the first after a change of keys, so it waits for one more look, of which there is at most
//! one a minute (a second, for a file) whoever asks. When a look fails, the keys that are there stay.

use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use arc_swap::ArcSwap;
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyAlgorithm, KeyOperations, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey};
use reqwest::{Url, header, redirect};
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::{Mutex, Semaphore};
use tokio_util::sync::CancellationToken;

use super::Refusal;
use super::settings::{JwtSettings, KeySource};
use super::tokens::{Fault, Key};
use crate::http::tls::Trust;
use crate::process::lifecycle::Lifecycle;

#[cfg(all(test, feature = "testing"))]
#[expect(clippy::unwrap_used, reason = "a test fails by a panic")]
mod tests;

/// Sets have two or three keys.
const KEYS_MAX: usize = 64;
/// A key is one or two kilobytes, its certificates included.
const SET_BYTES_MAX: usize = 256 * 1024;
/// One fetch, all of it.
const FETCH_TIME_MAX: Duration = Duration::from_secs(3);
/// Between looks while no key has been had at all.
const STARTING_PAUSE: Duration = Duration::from_secs(1);
/// Requests that wait for a look at a time: who floods us with made-up key ids must not have all places of the service.
const WAITING_MAX: usize = 32;

/// How often to look.
#[derive(Debug, Clone, Copy)]
struct Pace {
    /// By itself.
    usual: Duration,
    /// By itself, after a look that failed.
    after_failure: Duration,
    /// For a key id that nobody knows.
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

/// The keys of one moment, by their ids.
type KeySet = Vec<(Option<String>, Arc<Key>)>;

/// What a file was like when it was read.
type Mark = (u64, u64, i64, i64);

/// The keys.
pub(super) struct KeyRing {
    rules: JwtSettings,
    pace: Pace,
    set: ArcSwap<KeySet>,
    /// When a key id that nobody knows last led to a look.
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
    pub(super) async fn find(&self, kid: Option<&str>, algorithm: Algorithm) -> Result<Arc<Key>, Refusal> {
        // A set has none of the others, so asking again would be in vain.
        if !matches!(algorithm, Algorithm::RS256 | Algorithm::ES256 | Algorithm::EdDSA) {
            return Err(Refusal::Token(Fault::Algorithm));
        }
        match self.look_up(kid, algorithm) {
            Err(Refusal::Token(Fault::UnknownKey) | Refusal::KeysAway) => {
                self.look_again().await;
                self.look_up(kid, algorithm)
            }
            known => known,
        }
    }

    fn look_up(&self, kid: Option<&str>, algorithm: Algorithm) -> Result<Arc<Key>, Refusal> {
        let set = self.set.load();
        let named: Vec<&Arc<Key>> = match kid {
            Some(kid) => set.iter().filter(|(id, _)| id.as_deref() == Some(kid)).map(|(_, key)| key).collect(),
            // A token that names no key can mean only the one that there is.
            None => set.iter().map(|(_, key)| key).filter(|_| set.len() == 1).collect(),
        };
        match named.iter().find(|key| key.algorithm == algorithm) {
            Some(key) => Ok(Arc::clone(key)),
            None if set.is_empty() => Err(Refusal::KeysAway),
            None if named.is_empty() => Err(Refusal::Token(Fault::UnknownKey)),
            None => Err(Refusal::Token(Fault::Algorithm)),
        }
    }

    async fn look_again(&self) {
        let Ok(_place) = self.waiting.try_acquire() else { return };
        // Who comes while someone looks waits for what they see.
        let mut asked = self.asked.lock().await;
        if asked.is_none_or(|at| at.elapsed() >= self.pace.unknown_key) {
            *asked = Some(Instant::now());
            self.refresh().await;
        }
    }

    /// Looks, and takes what is there over if it is of use.
    async fn refresh(&self) -> bool {
        let read = match &self.rules.keys {
            KeySource::File(path) => read_file(path),
            KeySource::Url(url) => {
                fetch(url, &self.rules.trust).await.with_context(|| format!("{url} can't be fetched"))
            }
            KeySource::Secret(_) => return true,
        };
        match read.and_then(|text| parse(&text, &self.rules)) {
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

    async fn keep_fresh(self: Arc<Self>, stopping: CancellationToken) -> anyhow::Result<()> {
        let mut seen: Option<Mark> = None;
        loop {
            let mark = self.mark();
            // A file that has not changed is not read; a URL has no mark.
            let fresh = if mark.is_some() && mark == seen { true } else { self.refresh().await };
            seen = mark.filter(|_| fresh);
            let pause = match fresh {
                true => self.pace.usual,
                // Until then nobody can be known.
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

/// Whether the file has a key that can be used; for the start, where a fault should be said at once.
pub(super) fn check_file(path: &Path) -> anyhow::Result<()> {
    let set: PublishedSet = serde_json::from_str(&read_file(path)?).context("it is no JWK set")?;
    ensure!(set.keys.iter().any(|key| usable(key).is_some()), "{NO_KEY}");
    Ok(())
}

const NO_KEY: &str = "it has no public key for RS256, ES256 (P-256) or EdDSA (Ed25519)";

fn read_file(path: &Path) -> anyhow::Result<String> {
    let mut text = String::new();
    let file = fs::File::open(path).with_context(|| format!("{} can't be read", path.display()))?;
    file.take(SET_BYTES_MAX as u64 + 1).read_to_string(&mut text)?;
    ensure!(text.len() <= SET_BYTES_MAX, "it has more than {SET_BYTES_MAX} bytes");
    Ok(text)
}

async fn fetch(url: &Url, trust: &Trust) -> anyhow::Result<String> {
    // Where the keys are is the operator's word alone: a redirect would be the server's.
    let client = trust.http_client().timeout(FETCH_TIME_MAX).redirect(redirect::Policy::none()).build()?;
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

#[derive(Deserialize)]
struct PublishedSet {
    keys: Vec<Value>,
}

fn parse(text: &str, rules: &JwtSettings) -> anyhow::Result<KeySet> {
    let published: PublishedSet = serde_json::from_str(text).context("it is no JWK set")?;
    let keys = published.keys.iter().filter_map(usable).take(KEYS_MAX);
    let set: KeySet = keys.map(|(kid, algorithm, key)| (kid, Arc::new(Key::new(algorithm, key, rules)))).collect();
    ensure!(!set.is_empty(), "{NO_KEY}");
    Ok(set)
}

/// The key with its id and its algorithm, if it is one to verify with. A set may have others, and keys of kinds to come; a symmetric
/// one is never taken: what is published is no secret.
fn usable(published: &Value) -> Option<(Option<String>, Algorithm, DecodingKey)> {
    let jwk = Jwk::deserialize(published).ok()?;
    let algorithm = match &jwk.algorithm {
        AlgorithmParameters::RSA(_) => Algorithm::RS256,
        AlgorithmParameters::EllipticCurve(key) if key.curve == EllipticCurve::P256 => Algorithm::ES256,
        AlgorithmParameters::OctetKeyPair(key) if key.curve == EllipticCurve::Ed25519 => Algorithm::EdDSA,
        _ => return None,
    };
    let common = &jwk.common;
    let to_verify = common.public_key_use.as_ref().is_none_or(|usage| *usage == PublicKeyUse::Signature)
        && common.key_operations.as_ref().is_none_or(|operations| operations.contains(&KeyOperations::Verify))
        && common.key_algorithm.is_none_or(|named| named == KeyAlgorithm::from(algorithm));
    let key = DecodingKey::from_jwk(&jwk).ok().filter(|_| to_verify)?;
    Some((jwk.common.key_id, algorithm, key))
}
