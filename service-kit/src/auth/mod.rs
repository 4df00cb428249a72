//! The caller of a request, and what the caller may do.
//!
//! A handler names in its arguments what it needs: [`Caller`], [`OrganizerCaller`], [`AdminCaller`] or
//! [`InternalCaller`]. A handler that names none of them is open to all. These arguments stand before path and body, so
//! that an unknown caller learns nothing of either.
//!
//! - `AUTH_MODE=header`: the caller is the UUID in `X-User-ID`, and no role is required.
//! - `AUTH_MODE=jwt`: the caller is the `sub` of a bearer token. Its signature is verified with a shared secret or
//!   published keys.
//!
//! [`Authenticator`] knows the mode; `http/layers.rs` stores it with each request. The first extractor verifies the
//! token and stores the outcome with the request, so later ones do not verify again. A layer may also take
//! `Result<Caller, AuthError>` as an argument.

mod authenticator;
mod caller;
mod internal;
mod jwk_set;
mod key_ring;
mod refusal;
mod settings;
pub mod tokens;
mod verifier;

pub(crate) use authenticator::user_of;
pub use authenticator::{AdminCaller, Authenticator, InternalCaller, OrganizerCaller, USER_ID};
pub use caller::{Caller, Role, Roles};
pub use internal::{INTERNAL_API_KEY, InternalKeys};
pub use refusal::{AuthError, TokenError};
pub use settings::{AuthMode, AuthSettings, JwtSettings, KeySource};
