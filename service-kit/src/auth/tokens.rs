//! Access tokens: JSON web tokens (RFC 7519), verified by the rules of RFC 8725.
//!
//! The kind of key says which algorithm is believed, never the token: HS256 with the shared secret, and RS256, ES256 or EdDSA as the
//! published key itself is. Verifying is CPU time alone, a hundredth of a millisecond for HS256 and up to a tenth for the others, and
//! waits for no lock.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation, crypto};
use serde::{Deserialize, Serialize};
use shared_contracts::ids::UserId;

use super::keys::KeyRing;
use super::settings::{JwtSettings, KeySource};
use super::{Caller, Refusal, Role, Roles};
use crate::process::lifecycle::Lifecycle;

/// Longer ones are not looked at. Tokens are one or two kilobytes.
const TOKEN_BYTES_MAX: usize = 8 * 1024;
/// The types that an access token may say it is (RFC 7519, RFC 9068).
const TYPES: [&str; 3] = ["jwt", "at+jwt", "application/at+jwt"];

/// What is wrong with a token, in words that fit into a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// More than one `Authorization` header.
    Several,
    /// It is no signed token, or of a kind that is not known.
    Malformed,
    /// The algorithm is not that of the key.
    Algorithm,
    /// Nobody here knows the key.
    UnknownKey,
    /// Someone else signed it, or it was changed.
    Signature,
    /// Its time is over.
    Expired,
    /// Its time has not come.
    NotYet,
    /// Someone else made it.
    Issuer,
    /// It was made for someone else.
    Audience,
    /// It lacks one of the claims that it needs.
    MissingClaim,
    /// `sub` is no user id, or `roles` no list of names.
    Claims,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Several => "there is more than one Authorization header",
            Self::Malformed => "it is no signed JSON web token",
            Self::Algorithm => "it is signed by another algorithm than its key is for",
            Self::UnknownKey => "its key id (kid) is not among the keys of the login",
            Self::Signature => "its signature is not of the key of the login",
            Self::Expired => "it has expired; get a new one",
            Self::NotYet => "it is not valid yet (nbf)",
            Self::Issuer => "it is of another issuer (iss) than is believed here",
            Self::Audience => "it was made for another audience (aud)",
            Self::MissingClaim => "it lacks one of exp, iss, aud and sub",
            Self::Claims => "its sub is no user id (a UUID), or its roles are no list of names",
        })
    }
}

/// A key, and what must be true of a token that it has signed.
#[derive(Debug)]
pub(super) struct Key {
    pub(super) algorithm: Algorithm,
    decoding: DecodingKey,
    validation: Validation,
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
        install_crypto();
        match &settings.keys {
            KeySource::Secret(secret) => {
                let decoding = DecodingKey::from_secret(secret.reveal().as_bytes());
                Self::Secret(Box::new(Key::new(Algorithm::HS256, decoding, settings)))
            }
            KeySource::File(_) | KeySource::Url(_) => Self::Ring(KeyRing::open(settings.clone(), lifecycle)),
        }
    }

    pub(super) async fn verify(&self, token: &str) -> Result<Caller, Refusal> {
        if token.len() > TOKEN_BYTES_MAX {
            return Err(Refusal::Token(Fault::Malformed));
        }
        // An algorithm that the library does not know, such as `none`, ends here.
        let header = jsonwebtoken::decode_header(token).map_err(|_| Refusal::Token(Fault::Malformed))?;
        let known_type = |kind: &str| TYPES.iter().any(|known| known.eq_ignore_ascii_case(kind));
        if header.crit.is_some() || !header.typ.as_deref().is_none_or(known_type) {
            return Err(Refusal::Token(Fault::Malformed));
        }
        match self {
            Self::Secret(key) => hold_against(key, token),
            Self::Ring(ring) => hold_against(&*ring.find(header.kid.as_deref(), header.alg).await?, token),
        }
    }
}

fn hold_against(key: &Key, token: &str) -> Result<Caller, Refusal> {
    let claims = jsonwebtoken::decode::<Claims>(token, &key.decoding, &key.validation).map_err(|error| {
        Refusal::Token(match error.kind() {
            ErrorKind::ExpiredSignature => Fault::Expired,
            ErrorKind::ImmatureSignature => Fault::NotYet,
            ErrorKind::InvalidIssuer => Fault::Issuer,
            ErrorKind::InvalidAudience => Fault::Audience,
            ErrorKind::InvalidSignature => Fault::Signature,
            ErrorKind::InvalidAlgorithm => Fault::Algorithm,
            ErrorKind::MissingRequiredClaim(_) => Fault::MissingClaim,
            ErrorKind::Json(_) | ErrorKind::InvalidClaimFormat(_) => Fault::Claims,
            _ => Fault::Malformed,
        })
    })?;
    let Claims { sub: user_id, roles } = claims.claims;
    // The nil UUID stands for nobody: it owns what was abandoned.
    if user_id.as_uuid().is_nil() {
        return Err(Refusal::Token(Fault::Claims));
    }
    Ok(Caller { user_id, roles })
}

/// The library finds its provider by its crate features; said here, it does not depend on what another crate turns on.
fn install_crypto() {
    if crypto::aws_lc::DEFAULT_PROVIDER.install_default().is_err() {
        tracing::debug!("the crypto provider of tokens had been installed before");
    }
}

#[derive(Serialize)]
struct NewClaims<'a> {
    iss: &'a str,
    aud: &'a str,
    sub: UserId,
    roles: Vec<&'static str>,
    iat: u64,
    exp: u64,
}

/// A token by the shared secret, for local trials.
///
/// # Errors
/// The keys are the issuer's, who alone can make tokens.
pub fn mint(settings: &JwtSettings, user: UserId, roles: &[Role], lifetime: Duration) -> anyhow::Result<String> {
    let KeySource::Secret(secret) = &settings.keys else {
        bail!("tokens can be made with JWT_SECRET only; whoever has the private keys of the JWKS makes these");
    };
    install_crypto();
    let now = jsonwebtoken::get_current_timestamp();
    let claims = NewClaims {
        iss: &settings.issuer,
        aud: &settings.audience,
        sub: user,
        roles: roles.iter().map(|role| role.as_str()).collect(),
        iat: now,
        exp: now.saturating_add(lifetime.as_secs()),
    };
    let key = EncodingKey::from_secret(secret.reveal().as_bytes());
    jsonwebtoken::encode(&Header::new(Algorithm::HS256), &claims, &key).context("the token can't be signed")
}
