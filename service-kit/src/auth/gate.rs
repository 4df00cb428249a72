//! Decides who is calling: by header or by token for users, by key for services; and the extractors that handlers name.

use std::fmt;
use std::sync::Arc;

use axum::extract::{FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use shared_contracts::ids::UserId;

use super::caller::{Caller, Role, Roles};
use super::internal::{Digests, INTERNAL_API_KEY};
use super::refusal::{Fault, Refusal};
use super::settings::{AuthMode, AuthSettings};
use super::verifier::Verifier;
use crate::process::lifecycle::Lifecycle;

/// The header that names the user, in `AUTH_MODE=header`.
pub const USER_ID: &str = "x-user-id";

/// Someone who may write the catalogue and the price tiers: an organizer or an admin.
#[derive(Debug, Clone, Copy)]
pub struct OrganizerCaller;

/// An admin.
#[derive(Debug, Clone, Copy)]
pub struct AdminCaller;

/// Another service of ours, by the key in `X-Internal-Api-Key`.
#[derive(Debug, Clone, Copy)]
pub struct InternalCaller;

/// What decides who is calling. One a listener; cheap to clone.
#[derive(Clone)]
pub struct Gate(Arc<Inner>);

struct Inner {
    /// `None`: whoever calls is who they say.
    tokens: Option<Verifier>,
    internal: Digests,
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Gate")
    }
}

/// What came of the look at who is calling, kept beside the request.
#[derive(Clone, Copy)]
struct Verdict(Result<Caller, Refusal>);

impl Gate {
    /// Opens it. Published keys are kept fresh until `lifecycle` stops.
    #[must_use]
    pub fn open(settings: &AuthSettings, lifecycle: &Lifecycle) -> Self {
        let tokens = match &settings.mode {
            AuthMode::Header => None,
            AuthMode::Jwt(jwt) => Some(Verifier::open(jwt, lifecycle)),
        };
        Self(Arc::new(Inner { tokens, internal: settings.internal_keys.digests() }))
    }

    async fn look(&self, headers: &HeaderMap) -> Result<Caller, Refusal> {
        match &self.0.tokens {
            None => named_by_header(headers).ok_or(Refusal::NoUserId),
            Some(verifier) => verifier.verify(bearer_token(headers)?).await,
        }
    }

    /// Whether the caller has one of these roles; everyone has, where callers are known by header.
    async fn allows(parts: &mut Parts, roles: &[Role], names: &'static str) -> Result<(), Refusal> {
        if Self::of(parts)?.0.tokens.is_none() {
            return Ok(());
        }
        identify(parts).await?.roles.has_any(roles).then_some(()).ok_or(Refusal::Role(names))
    }

    fn of(parts: &Parts) -> Result<&Self, Refusal> {
        parts.extensions.get::<Self>().ok_or(Refusal::NoGate)
    }
}

/// Who makes the request; looked at once for each.
async fn identify(parts: &mut Parts) -> Result<Caller, Refusal> {
    if let Some(Verdict(known)) = parts.extensions.get::<Verdict>() {
        return *known;
    }
    let verdict = Gate::of(parts)?.look(&parts.headers).await;
    parts.extensions.insert(Verdict(verdict));
    verdict
}

/// Who makes the request, if that is known; also what rate limits count by.
pub(crate) async fn user_of(request: &mut Request) -> Option<UserId> {
    let gate = request.extensions().get::<Gate>()?.clone();
    let verdict = gate.look(request.headers()).await;
    request.extensions_mut().insert(Verdict(verdict));
    verdict.ok().map(|caller| caller.user_id)
}

fn named_by_header(headers: &HeaderMap) -> Option<Caller> {
    let user_id: UserId = headers.get(USER_ID)?.to_str().ok()?.trim().parse().ok()?;
    // The nil UUID stands for nobody: it owns what was abandoned.
    (!user_id.as_uuid().is_nil()).then_some(Caller { user_id, roles: Roles::default() })
}

/// The one token of a request. Another scheme is no token; two headers are nobody's to choose from.
fn bearer_token(headers: &HeaderMap) -> Result<&str, Refusal> {
    let mut given = headers.get_all(header::AUTHORIZATION).iter();
    let (Some(value), more) = (given.next(), given.next()) else {
        return Err(Refusal::NoToken);
    };
    if more.is_some() {
        return Err(Refusal::Token(Fault::Several));
    }
    let text = value.to_str().map_err(|_| Refusal::Token(Fault::Malformed))?;
    let (scheme, token) = text.trim().split_once(' ').unwrap_or((text, ""));
    if !scheme.eq_ignore_ascii_case("bearer") || token.is_empty() {
        return Err(Refusal::NoToken);
    }
    Ok(token.trim())
}

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Refusal> {
        identify(parts).await
    }
}

impl<S: Sync> FromRequestParts<S> for OrganizerCaller {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Refusal> {
        Gate::allows(parts, &[Role::Organizer, Role::Admin], "organizer or admin").await.map(|()| Self)
    }
}

impl<S: Sync> FromRequestParts<S> for AdminCaller {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Refusal> {
        Gate::allows(parts, &[Role::Admin], "admin").await.map(|()| Self)
    }
}

impl<S: Sync> FromRequestParts<S> for InternalCaller {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Refusal> {
        let given = parts.headers.get(&INTERNAL_API_KEY);
        Gate::of(parts)?.0.internal.admit(given).then_some(Self).ok_or(Refusal::InternalKey)
    }
}
