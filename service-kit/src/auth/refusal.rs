//! Why a request is not taken from its caller: what is wrong with its token, its roles or its key, and the answer that
//! says so.

use std::fmt;

use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use shared_contracts::problem::{Code, Problem};

use crate::http::error::Error;

/// What a client should wait while the signing keys can't be had.
const RETRY_AFTER_SECONDS: u32 = 5;

/// What is wrong with a token, in words that fit into a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenError {
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

impl fmt::Display for TokenError {
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

/// Why a request is not taken from who makes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AuthError {
    /// No usable `X-User-ID`.
    NoUserId,
    /// No bearer token.
    NoToken,
    /// A token that is not believed.
    Token(TokenError),
    /// The keys that tokens are signed with have never been had.
    KeysAway,
    /// They are known, and may not; with the roles that may.
    Role(&'static str),
    /// No internal key, or not ours.
    InternalKey,
    /// The router is served without its layers: a bug.
    NotWrapped,
}

impl From<AuthError> for Error {
    fn from(refusal: AuthError) -> Self {
        let refused = |detail: String| Self::from(Problem::new(Code::Unauthenticated, detail));
        match refusal {
            AuthError::NoUserId => {
                refused("Say who you are: send your user id, a UUID, in the X-User-ID header.".to_owned())
            }
            AuthError::NoToken => {
                refused("Say who you are: send `Authorization: Bearer` and an access token of your login.".to_owned())
            }
            AuthError::Token(fault) => refused(format!("The access token is not taken: {fault}.")),
            AuthError::KeysAway => {
                let detail = "The keys that tokens are signed with can't be had right now. Please try again.";
                let problem = Problem::new(Code::AuthenticationUnavailable, detail).retry_after(RETRY_AFTER_SECONDS);
                let cause = anyhow::anyhow!("no key of JWT_JWKS_URL or JWT_JWKS_FILE is known yet");
                Self::Unavailable { problem: Box::new(problem), cause }
            }
            AuthError::Role(roles) => Self::refused(
                Code::Forbidden,
                format!(
                    "This needs the role {roles}, which your access token does not have. Ask an admin for it, and log in anew."
                ),
            ),
            AuthError::InternalKey => refused(
                "This is for other services: send the value of INTERNAL_API_KEY in the X-Internal-Api-Key header."
                    .to_owned(),
            ),
            AuthError::NotWrapped => Self::Internal(anyhow::anyhow!("the router is served without layers::wrap")),
        }
    }
}

impl AuthError {
    /// How to do it right, by RFC 9110 and, for tokens, RFC 6750.
    fn challenge(self) -> Option<HeaderValue> {
        let text = match self {
            Self::NoToken => r#"Bearer realm="ticketing""#.to_owned(),
            Self::Token(fault) => {
                format!(r#"Bearer realm="ticketing", error="invalid_token", error_description="{fault}""#)
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
