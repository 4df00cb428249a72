//! Why a caller is refused: what is wrong with its token, its roles or its key, and the answer that says so.

use std::fmt;

use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use shared_contracts::problem::{Code, Problem};

use crate::http::error::Error;

/// `Retry-After` while no signing key is known.
const RETRY_AFTER_SECONDS: u32 = 5;

/// What is wrong with a token, in words that fit into the `WWW-Authenticate` header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenError {
    /// More than one `Authorization` header.
    Several,
    /// It is not a signed token, or its type is unknown.
    Malformed,
    /// Its algorithm is not that of its key.
    Algorithm,
    /// No known key has its key id.
    UnknownKey,
    /// Another key signed it, or it was changed.
    Signature,
    /// Its `exp` has passed.
    Expired,
    /// Its `nbf` is in the future.
    NotYet,
    /// Its `iss` is not `JWT_ISSUER`.
    Issuer,
    /// Its `aud` is not `JWT_AUDIENCE`.
    Audience,
    /// It lacks `exp`, `iss`, `aud` or `sub`.
    MissingClaim,
    /// `sub` is not a user id, or `roles` is not a list of names.
    Claims,
}

impl fmt::Display for TokenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Several => "there is more than one Authorization header",
            Self::Malformed => "it is not a signed JSON web token",
            Self::Algorithm => "its algorithm does not match its key",
            Self::UnknownKey => "its key id (kid) is not among the issuer's keys",
            Self::Signature => "its signature does not match the issuer's keys",
            Self::Expired => "it has expired; get a new one",
            Self::NotYet => "it is not valid yet (nbf)",
            Self::Issuer => "its issuer (iss) is not the one that this service accepts",
            Self::Audience => "its audience (aud) is not this service",
            Self::MissingClaim => "it lacks one of exp, iss, aud and sub",
            Self::Claims => "its sub is not a user id (a UUID), or its roles are not a list of names",
        })
    }
}

/// Why a caller is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AuthError {
    /// No usable `X-User-ID`.
    NoUserId,
    /// No bearer token.
    NoToken,
    /// The token was rejected.
    Token(TokenError),
    /// No signing key has ever been read, so no token can be verified.
    KeysAway,
    /// The caller lacks these roles.
    Role(&'static str),
    /// The internal key is missing or wrong.
    InternalKey,
    /// The router is served without its layers: a bug.
    NotWrapped,
}

impl From<AuthError> for Error {
    fn from(refusal: AuthError) -> Self {
        let refused = |detail: String| Self::from(Problem::new(Code::Unauthenticated, detail));
        match refusal {
            AuthError::NoUserId => {
                refused("This call needs a user: send your user id, a UUID, in the X-User-ID header.".to_owned())
            }
            AuthError::NoToken => refused(
                "This call needs a user: send an access token of your login as `Authorization: Bearer`.".to_owned(),
            ),
            AuthError::Token(error) => refused(format!("The access token was rejected: {error}.")),
            AuthError::KeysAway => {
                let detail = "The keys to verify access tokens are not available right now. Please try again.";
                let problem = Problem::new(Code::AuthenticationUnavailable, detail).retry_after(RETRY_AFTER_SECONDS);
                let cause = anyhow::anyhow!("no key of JWT_JWKS_URL or JWT_JWKS_FILE is known yet");
                Self::Unavailable { problem: Box::new(problem), cause }
            }
            AuthError::Role(roles) => Self::refused(
                Code::Forbidden,
                format!(
                    "This call needs the role {roles}, which your access token lacks. Ask an admin for it, then log in again."
                ),
            ),
            AuthError::InternalKey => refused(
                "This call is for other services: send the value of INTERNAL_API_KEY in the X-Internal-Api-Key header."
                    .to_owned(),
            ),
            AuthError::NotWrapped => Self::Internal(anyhow::anyhow!("the router is served without layers::wrap")),
        }
    }
}

impl AuthError {
    /// The `WWW-Authenticate` challenge, by RFC 9110 and, for tokens, RFC 6750.
    fn challenge(self) -> Option<HeaderValue> {
        let text = match self {
            Self::NoToken => r#"Bearer realm="ticketing""#.to_owned(),
            Self::Token(error) => {
                format!(r#"Bearer realm="ticketing", error="invalid_token", error_description="{error}""#)
            }
            Self::Role(_) => r#"Bearer realm="ticketing", error="insufficient_scope""#.to_owned(),
            Self::InternalKey => r#"ApiKey realm="ticketing internal""#.to_owned(),
            Self::NoUserId | Self::KeysAway | Self::NotWrapped => return None,
        };
        HeaderValue::from_str(&text).ok()
    }
}

impl IntoResponse for AuthError {
    fn into_response(self) -> Response {
        let mut response = Error::from(self).into_response();
        if let Some(challenge) = self.challenge() {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
        }
        response
    }
}
