//! Access tokens made with the shared secret, for local trials.

use std::time::Duration;

use anyhow::{Context, bail};
use jsonwebtoken::{Algorithm, EncodingKey, Header, crypto};
use serde::Serialize;
use shared_contracts::ids::UserId;

use super::caller::Role;
use super::settings::{JwtSettings, KeySource};

/// Installs the crypto provider of tokens. Otherwise the library would choose it by its crate features, which other
/// crates can change.
pub(super) fn install_crypto() {
    if crypto::aws_lc::DEFAULT_PROVIDER.install_default().is_err() {
        tracing::debug!("the crypto provider of tokens is installed already");
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

/// Signs a token with the shared secret, for local trials.
///
/// # Errors
/// The settings have no shared secret: only the issuer of published keys can sign tokens.
pub fn mint(settings: &JwtSettings, user: UserId, roles: &[Role], lifetime: Duration) -> anyhow::Result<String> {
    let KeySource::Secret(secret) = &settings.keys else {
        bail!("tokens can be made with JWT_SECRET only; with a JWKS, only its issuer can make them");
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
