//! Identifies the caller: a user by header or token, another service by key. It also has the extractors that handlers
//! name.

use std::fmt;
use std::sync::Arc;

use axum::extract::{FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use shared_contracts::ids::UserId;

use super::caller::{Caller, Role, Roles};
use super::internal::{Digests, INTERNAL_API_KEY};
use super::refusal::{AuthError, TokenError};
use super::settings::{AuthMode, AuthSettings};
use super::verifier::Verifier;
use crate::process::lifecycle::Lifecycle;

/// The header that names the user, in `AUTH_MODE=header`.
pub const USER_ID: &str = "x-user-id";

/// Lets only organizers and administrators in; an extractor for handlers that write the catalogue and the price tiers.
#[derive(Debug, Clone, Copy)]
pub struct OrganizerCaller;

/// Lets only administrators in; an extractor for handlers.
#[derive(Debug, Clone, Copy)]
pub struct AdminCaller;

/// Lets only other services of ours in, by the key in `X-Internal-Api-Key`; an extractor for handlers.
#[derive(Debug, Clone, Copy)]
pub struct InternalCaller;

/// Identifies callers. Each listener has one; cheap to clone.
#[derive(Clone)]
pub struct Authenticator(Arc<Inner>);

struct Inner {
    /// `None` in `AUTH_MODE=header`, where the `X-User-ID` of any caller is trusted.
    tokens: Option<Verifier>,
    internal: Digests,
}

impl fmt::Debug for Authenticator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Authenticator")
    }
}

/// The outcome of identifying the caller, stored with the request.
#[derive(Clone, Copy)]
struct Identified(Result<Caller, AuthError>);

impl Authenticator {
    /// Creates an authenticator. Published keys are kept fresh until `lifecycle` stops.
    #[must_use]
    pub fn open(settings: &AuthSettings, lifecycle: &Lifecycle) -> Self {
        let tokens = match &settings.mode {
            AuthMode::Header => None,
            AuthMode::Jwt(jwt) => Some(Verifier::open(jwt, lifecycle)),
        };
        Self(Arc::new(Inner { tokens, internal: settings.internal_keys.digests() }))
    }

    async fn identify(&self, headers: &HeaderMap) -> Result<Caller, AuthError> {
        match &self.0.tokens {
            None => named_by_header(headers).ok_or(AuthError::NoUserId),
            Some(verifier) => verifier.verify(bearer_token(headers)?).await,
        }
    }

    /// Checks that the caller has one of these roles. With `AUTH_MODE=header`, every caller passes.
    async fn allows(parts: &mut Parts, roles: &[Role], names: &'static str) -> Result<(), AuthError> {
        if Self::of(parts)?.0.tokens.is_none() {
            return Ok(());
        }
        identify(parts).await?.roles.has_any(roles).then_some(()).ok_or(AuthError::Role(names))
    }

    fn of(parts: &Parts) -> Result<&Self, AuthError> {
        parts.extensions.get::<Self>().ok_or(AuthError::NotWrapped)
    }
}

/// Identifies the caller, once for each request.
async fn identify(parts: &mut Parts) -> Result<Caller, AuthError> {
    if let Some(Identified(known)) = parts.extensions.get::<Identified>() {
        return *known;
    }
    let identified = Authenticator::of(parts)?.identify(&parts.headers).await;
    parts.extensions.insert(Identified(identified));
    identified
}

/// The id of the request's user, if the request proves one. Rate limits count by it.
pub(crate) async fn user_of(request: &mut Request) -> Option<UserId> {
    let authenticator = request.extensions().get::<Authenticator>()?.clone();
    let identified = authenticator.identify(request.headers()).await;
    request.extensions_mut().insert(Identified(identified));
    identified.ok().map(|caller| caller.user_id)
}

fn named_by_header(headers: &HeaderMap) -> Option<Caller> {
    let user_id: UserId = headers.get(USER_ID)?.to_str().ok()?.trim().parse().ok()?;
    // The nil UUID is no user: it owns what was abandoned.
    (!user_id.as_uuid().is_nil()).then_some(Caller { user_id, roles: Roles::default() })
}

/// The one token of a request. Another scheme counts as no token. Two headers are an error, because only one of them
/// can be meant.
fn bearer_token(headers: &HeaderMap) -> Result<&str, AuthError> {
    let mut given = headers.get_all(header::AUTHORIZATION).iter();
    let (Some(value), more) = (given.next(), given.next()) else {
        return Err(AuthError::NoToken);
    };
    if more.is_some() {
        return Err(AuthError::Token(TokenError::Several));
    }
    let text = value.to_str().map_err(|_| AuthError::Token(TokenError::Malformed))?;
    let (scheme, token) = text.trim().split_once(' ').unwrap_or((text, ""));
    if !scheme.eq_ignore_ascii_case("bearer") || token.is_empty() {
        return Err(AuthError::NoToken);
    }
    Ok(token.trim())
}

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = AuthError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, AuthError> {
        identify(parts).await
    }
}

impl<S: Sync> FromRequestParts<S> for OrganizerCaller {
    type Rejection = AuthError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, AuthError> {
        Authenticator::allows(parts, &[Role::Organizer, Role::Admin], "organizer or admin").await.map(|()| Self)
    }
}

impl<S: Sync> FromRequestParts<S> for AdminCaller {
    type Rejection = AuthError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, AuthError> {
        Authenticator::allows(parts, &[Role::Admin], "admin").await.map(|()| Self)
    }
}

impl<S: Sync> FromRequestParts<S> for InternalCaller {
    type Rejection = AuthError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, AuthError> {
        let given = parts.headers.get(&INTERNAL_API_KEY);
        Authenticator::of(parts)?.0.internal.admit(given).then_some(Self).ok_or(AuthError::InternalKey)
    }
}
