//! Access tokens: JSON web tokens (RFC 7519), verified by the rules of RFC 8725.
//!
//! The kind of key says which algorithm is believed, never the token: HS256 with the shared secret, and RS256, ES256 or
//! EdDSA as the published key itself is. Verifying is CPU time alone, a hundredth of a millisecond for HS256 and up to
//! a tenth for the others, and waits for no lock.

use std::sync::Arc;

use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, DecodingKey};
use serde::Deserialize;
use shared_contracts::ids::UserId;

use super::caller::{Caller, Roles};
use super::key_ring::{Key, KeyRing};
use super::refusal::{AuthError, TokenError};
use super::settings::{JwtSettings, KeySource};
use super::tokens;
use crate::process::lifecycle::Lifecycle;

/// Longer ones are not looked at. Tokens are one or two kilobytes.
const TOKEN_BYTES_MAX: usize = 8 * 1024;
/// The types that an access token may say it is (RFC 7519, RFC 9068).
const TYPES: [&str; 3] = ["jwt", "at+jwt", "application/at+jwt"];

#[derive(Deserialize)]
struct Claims {
    sub: UserId,
    #[serde(default)]
    roles: Roles,
}

/// Holds tokens against the keys.
pub(super) enum Verifier {
    Secret(Box<Key>),
    Ring(Arc<KeyRing>),
}

impl Verifier {
    pub(super) fn open(settings: &JwtSettings, lifecycle: &Lifecycle) -> Self {
        tokens::install_crypto();
        match &settings.keys {
            KeySource::Secret(secret) => {
                let decoding = DecodingKey::from_secret(secret.reveal().as_bytes());
                Self::Secret(Box::new(Key::new(Algorithm::HS256, decoding, settings)))
            }
            KeySource::File(_) | KeySource::Url(_) => Self::Ring(KeyRing::open(settings.clone(), lifecycle)),
        }
    }

    pub(super) async fn verify(&self, token: &str) -> Result<Caller, AuthError> {
        if token.len() > TOKEN_BYTES_MAX {
            return Err(AuthError::Token(TokenError::Malformed));
        }
        // An algorithm that the library does not know, such as `none`, ends here.
        let header = jsonwebtoken::decode_header(token).map_err(|_| AuthError::Token(TokenError::Malformed))?;
        let known_type = |kind: &str| TYPES.iter().any(|known| known.eq_ignore_ascii_case(kind));
        if header.crit.is_some() || !header.typ.as_deref().is_none_or(known_type) {
            return Err(AuthError::Token(TokenError::Malformed));
        }
        match self {
            Self::Secret(key) => hold_against(key, token),
            Self::Ring(ring) => hold_against(&*ring.find(header.kid.as_deref(), header.alg).await?, token),
        }
    }
}

fn hold_against(key: &Key, token: &str) -> Result<Caller, AuthError> {
    let claims = jsonwebtoken::decode::<Claims>(token, &key.decoding, &key.validation).map_err(|error| {
        AuthError::Token(match error.kind() {
            ErrorKind::ExpiredSignature => TokenError::Expired,
            ErrorKind::ImmatureSignature => TokenError::NotYet,
            ErrorKind::InvalidIssuer => TokenError::Issuer,
            ErrorKind::InvalidAudience => TokenError::Audience,
            ErrorKind::InvalidSignature => TokenError::Signature,
            ErrorKind::InvalidAlgorithm => TokenError::Algorithm,
            ErrorKind::MissingRequiredClaim(_) => TokenError::MissingClaim,
            ErrorKind::Json(_) | ErrorKind::InvalidClaimFormat(_) => TokenError::Claims,
            _ => TokenError::Malformed,
        })
    })?;
    let Claims { sub: user_id, roles } = claims.claims;
    // The nil UUID stands for nobody: it owns what was abandoned.
    if user_id.as_uuid().is_nil() {
        return Err(AuthError::Token(TokenError::Claims));
    }
    Ok(Caller { user_id, roles })
}
