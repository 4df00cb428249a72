//! The key by which our services recognize each other.
//!
//! Keys are compared by their SHA-256 digests, in constant time. Neither the time of an answer nor the length of a key
//! reveals anything about the key.

use axum::http::{HeaderName, HeaderValue};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use crate::process::settings::{Secret, SettingsReader};

/// The header with the key.
pub const INTERNAL_API_KEY: HeaderName = HeaderName::from_static("x-internal-api-key");

/// A shorter key could be guessed; production refuses it.
const KEY_BYTES_MIN: usize = 16;

/// `INTERNAL_API_KEY`, and `INTERNAL_API_KEY_PREVIOUS` while the key is being changed. When none is set, no key is
/// required.
#[derive(Debug, Clone, Default)]
pub struct InternalKeys {
    current: Option<Secret>,
    previous: Option<Secret>,
}

impl InternalKeys {
    /// Accepts these keys, the current one first.
    #[must_use]
    pub fn new(current: &str, previous: Option<&str>) -> Self {
        Self { current: Some(current.into()), previous: previous.map(Into::into) }
    }

    pub(super) fn read(reader: &mut SettingsReader) -> Self {
        let mut read = |name: &str| {
            let key = reader.optional(name)?;
            // A key that can't stand in a header would never match.
            if HeaderValue::from_str(&key).is_err() || key.trim() != key {
                reader.fault(format!("{name} has characters that an HTTP header can't carry, or spaces around it"));
            }
            if key.len() < KEY_BYTES_MIN {
                let length = key.len();
                reader.refuse_in_production(format!(
                    "{name} has {length} bytes and could be guessed; use {KEY_BYTES_MIN} at least, from `openssl rand -hex 32`"
                ));
            }
            Some(Secret::from(key.as_str()))
        };
        let keys = Self { current: read("INTERNAL_API_KEY"), previous: read("INTERNAL_API_KEY_PREVIOUS") };
        if keys.current.is_none() {
            reader.refuse_in_production(
                "INTERNAL_API_KEY is not set, so anyone who reaches /api/internal may change seats; \
                 set the same key for both services, from `openssl rand -hex 32`",
            );
            if keys.previous.is_some() {
                reader.fault("INTERNAL_API_KEY_PREVIOUS is set without INTERNAL_API_KEY");
            }
        }
        keys
    }

    /// The key to send; `None` when none is required.
    #[must_use]
    pub fn current(&self) -> Option<&Secret> {
        self.current.as_ref()
    }

    /// Whether a key is required.
    #[must_use]
    pub fn are_set(&self) -> bool {
        self.current.is_some()
    }

    pub(super) fn digests(&self) -> Digests {
        let digest = |key: &Secret| Sha256::digest(key.reveal()).into();
        Digests(self.current.iter().chain(&self.previous).map(digest).collect())
    }
}

/// The digests that a given key is compared with.
pub(super) struct Digests(Vec<[u8; 32]>);

impl Digests {
    /// Whether the given key is one of ours, or none is required.
    pub(super) fn admit(&self, given: Option<&HeaderValue>) -> bool {
        if self.0.is_empty() {
            return true;
        }
        let Some(given) = given else { return false };
        let given: [u8; 32] = Sha256::digest(given.as_bytes()).into();
        self.0.iter().fold(Choice::from(0), |found, known| found | known.ct_eq(&given)).into()
    }
}
