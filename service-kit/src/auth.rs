//! Who is calling. In `AUTH_MODE=header`, the one mode of this version, the caller is the UUID in `X-User-ID`.

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use shared_contracts::ids::UserId;
use shared_contracts::problem::Code;

use crate::error::Error;

/// The header that names the user.
pub const USER_ID: &str = "x-user-id";

/// The user who makes the request.
#[derive(Debug, Clone, Copy)]
pub struct Caller {
    /// Their id.
    pub user_id: UserId,
}

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Error> {
        let user_id = parts
            .headers
            .get(USER_ID)
            .and_then(|value| value.to_str().ok())
            .and_then(|text| text.trim().parse().ok())
            // The nil UUID stands for nobody: it owns what was abandoned.
            .filter(|id: &UserId| !id.as_uuid().is_nil());
        user_id.map(|user_id| Self { user_id }).ok_or_else(|| {
            Error::refused(
                Code::Unauthenticated,
                "Say who you are: send your user id, a UUID, in the X-User-ID header.",
            )
        })
    }
}
