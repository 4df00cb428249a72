//! Who is calling, and what they may do.
//!
//! A handler says in its arguments what it needs: [`Caller`], [`OrganizerCaller`], [`AdminCaller`] or [`InternalCaller`]; one that names none of
//! them is open to all. They stand before those that read path and body, so that a stranger learns nothing of these.
//!
//! With `AUTH_MODE=header` the caller is the UUID in `X-User-ID`, and everyone may do what needs a role. With `AUTH_MODE=jwt` the caller
//! is the `sub` of a bearer token ([`tokens`]), whose signature is held against a shared secret or published keys ([`keys`]).
//! [`Gate`] knows the mode; `layers.rs` puts it beside each request. The first that asks who calls has the token verified, and
//! everyone after that is told what came of it: a layer, too, may take `Result<Caller, Refusal>` as an argument.

mod internal;
mod keys;
mod settings;
pub mod tokens;

use std::fmt;
use std::sync::Arc;

use axum::extract::{FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Deserializer};
use shared_contracts::ids::UserId;
use shared_contracts::problem::{Code, Problem};

use crate::http::error::Error;
use crate::process::lifecycle::Lifecycle;

pub use internal::{INTERNAL_API_KEY, InternalKeys};
pub use settings::{AuthMode, AuthSettings, JwtSettings, KeySource};
use tokens::Verifier;

/// The header that names the user, in `AUTH_MODE=header`.
pub const USER_ID: &str = "x-user-id";

/// What a client should wait while the signing keys can't be had.
const RETRY_AFTER_SECONDS: u32 = 5;

/// What a token says its bearer may do, beyond what everyone may who is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Buys tickets. Everyone who is known may, so this role is for show.
    Customer,
    /// Writes the catalogue and the price tiers.
    Organizer,
    /// Does all that an organizer may, sees all reservations and tickets, and replays events.
    Admin,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Customer, Self::Organizer, Self::Admin];

    /// The name that tokens have for it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Customer => "customer",
            Self::Organizer => "organizer",
            Self::Admin => "admin",
        }
    }
}

impl std::str::FromStr for Role {
    type Err = &'static str;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|role| role.as_str() == name).ok_or("the roles are customer, organizer and admin")
    }
}

/// A set of roles.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Roles(u8);

impl Roles {
    /// Whether one of `wanted` is among them.
    #[must_use]
    pub fn has_any(self, wanted: &[Role]) -> bool {
        wanted.iter().any(|role| self.0 & (1 << *role as u8) != 0)
    }
}

impl FromIterator<Role> for Roles {
    fn from_iter<I: IntoIterator<Item = Role>>(roles: I) -> Self {
        Self(roles.into_iter().fold(0, |set, role| set | (1 << role as u8)))
    }
}

/// As in a token: a list of names, of which the unknown ones are another system's.
impl<'de> Deserialize<'de> for Roles {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let names = Option::<Vec<String>>::deserialize(deserializer)?.unwrap_or_default();
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }
}

/// The user who makes the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// Their id.
    pub user_id: UserId,
    /// What else they may do. None in `AUTH_MODE=header`, where no role is asked for.
    pub roles: Roles,
}

impl Caller {
    /// Whose reservations and tickets they may see and change: their own, or for an admin everyone's (`None`). A statement says
    /// `where … and ($n::uuid is null or user_id = $n)`.
    #[must_use]
    pub fn confined_to(&self) -> Option<UserId> {
        (!self.roles.has_any(&[Role::Admin])).then_some(self.user_id)
    }
}

/// Someone who may write the catalogue and the price tiers: an organizer or an admin.
#[derive(Debug, Clone, Copy)]
pub struct OrganizerCaller;

/// An admin.
#[derive(Debug, Clone, Copy)]
pub struct AdminCaller;

/// Another service of ours, by the key in `X-Internal-Api-Key`.
#[derive(Debug, Clone, Copy)]
pub struct InternalCaller;

/// Why a request is not taken from who makes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// No usable `X-User-ID`.
    NoUserId,
    /// No bearer token.
    NoToken,
    /// A token that is not believed.
    Token(tokens::Fault),
    /// The keys that tokens are signed with have never been had.
    KeysAway,
    /// They are known, and may not; with the roles that may.
    Role(&'static str),
    /// No internal key, or not ours.
    InternalKey,
    /// No gate beside the request: a bug.
    NoGate,
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        let refused = |detail: String| Self::from(Problem::new(Code::Unauthenticated, detail));
        match refusal {
            Refusal::NoUserId => {
                refused("Say who you are: send your user id, a UUID, in the X-User-ID header.".to_owned())
            }
            Refusal::NoToken => {
                refused("Say who you are: send `Authorization: Bearer` and an access token of your login.".to_owned())
            }
            Refusal::Token(fault) => refused(format!("The access token is not taken: {fault}.")),
            Refusal::KeysAway => {
                let detail = "The keys that tokens are signed with can't be had right now. Please try again.";
                let problem = Problem::new(Code::AuthenticationUnavailable, detail).retry_after(RETRY_AFTER_SECONDS);
                let cause = anyhow::anyhow!("no key of JWT_JWKS_URL or JWT_JWKS_FILE is known yet");
                Self::Unavailable { problem: Box::new(problem), cause }
            }
            Refusal::Role(roles) => Self::refused(
                Code::Forbidden,
                format!(
                    "This needs the role {roles}, which your access token does not have. Ask an admin for it, and log in anew."
                ),
            ),
            Refusal::InternalKey => refused(
                "This is for other services: send the value of INTERNAL_API_KEY in the X-Internal-Api-Key header."
                    .to_owned(),
            ),
            Refusal::NoGate => Self::Internal(anyhow::anyhow!("the router is served without layers::wrap")),
        }
    }
}

impl Refusal {
    /// How to do it right, by RFC 9110 and, for tokens, RFC 6750.
    fn challenge(self) -> Option<HeaderValue> {
        let text = match self {
            Self::NoToken => r#"Bearer realm="ticketing""#.to_owned(),
            Self::Token(fault) => {
                format!(r#"Bearer realm="ticketing", error="invalid_token", error_description="{fault}""#)
            }
            Self::Role(_) => r#"Bearer realm="ticketing", error="insufficient_scope""#.to_owned(),
            Self::InternalKey => r#"ApiKey realm="ticketing internal""#.to_owned(),
            Self::NoUserId | Self::KeysAway | Self::NoGate => return None,
        };
        HeaderValue::from_str(&text).ok()
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut response = Error::from(self).into_response();
        if let Some(challenge) = self.challenge() {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
        }
        response
    }
}

/// What decides who is calling. One a listener; cheap to clone.
#[derive(Clone)]
pub struct Gate(Arc<Inner>);

struct Inner {
    /// `None`: whoever calls is who they say.
    tokens: Option<Verifier>,
    internal: internal::Digests,
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
        return Err(Refusal::Token(tokens::Fault::Several));
    }
    let text = value.to_str().map_err(|_| Refusal::Token(tokens::Fault::Malformed))?;
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
