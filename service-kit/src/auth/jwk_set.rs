//! Parses published keys, a JWK set (RFC 7517), and selects those that can verify tokens.

use std::fs;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, ensure};
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyAlgorithm, KeyOperations, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey};
use serde::Deserialize;
use serde_json::Value;

/// The most keys that are used of a set. Sets have two or three.
const KEYS_MAX: usize = 64;
/// The largest set that is read. A key is one or two kilobytes, its certificates included.
pub(super) const SET_BYTES_MAX: usize = 256 * 1024;

/// A key to verify with: its id, if it has one, and the one algorithm that it is for.
pub(super) type UsableKey = (Option<String>, Algorithm, DecodingKey);

/// Checks that the file has a usable key. The start calls it, so that a fault is reported at once.
pub(super) fn check_file(path: &Path) -> anyhow::Result<()> {
    parse(&read_file(path)?).map(drop)
}

const NO_KEY: &str = "it has no public key for RS256, ES256 (P-256) or EdDSA (Ed25519)";

/// Reads a file with a key set. A file of more than [`SET_BYTES_MAX`] is an error.
pub(super) fn read_file(path: &Path) -> anyhow::Result<String> {
    let mut text = String::new();
    let file = fs::File::open(path).with_context(|| format!("{} can't be read", path.display()))?;
    file.take(SET_BYTES_MAX as u64 + 1).read_to_string(&mut text)?;
    ensure!(text.len() <= SET_BYTES_MAX, "it has more than {SET_BYTES_MAX} bytes");
    Ok(text)
}

#[derive(Deserialize)]
struct PublishedSet {
    keys: Vec<Value>,
}

/// The usable keys of a set. A set without any is an error.
pub(super) fn parse(text: &str) -> anyhow::Result<Vec<UsableKey>> {
    let published: PublishedSet = serde_json::from_str(text).context("it is not a JWK set")?;
    let keys: Vec<UsableKey> = published.keys.iter().filter_map(usable).take(KEYS_MAX).collect();
    ensure!(!keys.is_empty(), "{NO_KEY}");
    Ok(keys)
}

/// The key with its id and its algorithm, if it can verify tokens. A set may have other keys, and keys of future kinds.
/// A symmetric key is never accepted, because a published key is no secret.
pub(super) fn usable(published: &Value) -> Option<UsableKey> {
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
