//! Entity tags: an edit does not overwrite a change that its author has not seen, and a client does not load again
//! what it already has.
//!
//! A tag names the resource's version, or a hash of its content. A response that is compressed on its way gets a tag of
//! its own (`"7"` becomes `"7-gzip"`), because RFC 9110 wants different strong tags for different bytes. A client may
//! send either back.

use axum::Json;
use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use headers::{ETag, HeaderMapExt, IfNoneMatch};
use serde::Serialize;
use shared_contracts::problem::Code;
use utoipa::IntoParams;

use crate::http::error::{Error, Result};

/// The suffixes of a tag: none, and one for each coding that [`crate::http::layers`] may apply.
const SUFFIXES: [&str; 4] = ["", "-gzip", "-br", "-zstd"];

/// A resource that can be edited: as JSON, with its version as `ETag`.
#[derive(Debug)]
pub struct Editable<T> {
    /// Rises with each edit.
    pub version: i64,
    /// The resource itself, sent as JSON.
    pub body: T,
}

impl<T: Serialize> IntoResponse for Editable<T> {
    fn into_response(self) -> Response {
        ([(header::ETAG, format!("\"{}\"", self.version))], Json(self.body)).into_response()
    }
}

/// The `If-Match` of an edit: the versions that its author has seen. An edit without one overwrites any version.
#[derive(Debug)]
pub struct IfMatch(Option<headers::IfMatch>);

impl<S: Sync> FromRequestParts<S> for IfMatch {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self> {
        // To ignore a header that can't be read would overwrite a change.
        let unreadable = "The If-Match header can't be read. Send the ETag that came with the version you have seen.";
        let seen = parts.headers.typed_try_get();
        seen.map(Self).map_err(|_| Error::refused(Code::PreconditionFailed, unreadable))
    }
}

/// [`IfMatch`] as the OpenAPI document describes it.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "only its description is of interest")]
pub struct IfMatchHeader {
    /// The `ETag` of the version that you have seen; with it, an edit of a newer one is refused.
    #[param(rename = "If-Match", value_type = Option<String>)]
    if_match: Option<String>,
}

impl IfMatch {
    /// Refuses an edit whose author has seen another version.
    ///
    /// # Errors
    /// `412`, with the current `ETag` in its detail.
    pub fn check(&self, version: i64) -> Result<()> {
        let current = format!("\"{version}\"");
        let Some(seen) = &self.0 else { return Ok(()) };
        if tags_of(&current).any(|(_, tag)| seen.precondition_passes(&tag)) {
            return Ok(());
        }
        let detail = format!(
            "It changed after you read it: its ETag is {current} now. Read it again, review it, and repeat your edit."
        );
        Err(Error::refused(Code::PreconditionFailed, detail))
    }
}

/// The tag, as the client sent it, if the client has this content already. The answer is then a `304` with this tag.
#[must_use]
pub fn known(headers: &HeaderMap, current: &str) -> Option<HeaderValue> {
    let known: IfNoneMatch = headers.typed_get()?;
    tags_of(current).find_map(|(text, tag)| (!known.precondition_passes(&tag)).then_some(text))
}

/// The tags under which `current` may have been sent, each also as text.
fn tags_of(current: &str) -> impl Iterator<Item = (HeaderValue, ETag)> {
    let bare = current.strip_suffix('"').unwrap_or(current);
    SUFFIXES.iter().filter_map(move |suffix| {
        let text = format!("{bare}{suffix}\"");
        Some((HeaderValue::from_str(&text).ok()?, text.parse().ok()?))
    })
}

/// Whether the client accepts gzip, and gives no higher weight to `br`, `zstd` or `identity`.
#[must_use]
pub fn prefers_gzip(headers: &HeaderMap) -> bool {
    let (mut gzip, mut any, mut others) = (None, None, 0.0_f32);
    let values = headers.get_all(header::ACCEPT_ENCODING).iter().filter_map(|value| value.to_str().ok());
    for asked in values.flat_map(|value| value.split(',')) {
        let mut parts = asked.split(';').map(str::trim);
        let coding = parts.next().unwrap_or_default();
        let weight = parts.find_map(|part| part.strip_prefix("q=")).unwrap_or("1").parse().unwrap_or(0.0_f32);
        match coding {
            "gzip" => gzip = Some(weight),
            "*" => any = Some(weight),
            "br" | "zstd" | "identity" => others = others.max(weight),
            _ => {}
        }
    }
    gzip.or(any).is_some_and(|gzip| gzip > 0.0 && gzip >= others)
}

/// Appends the coding to the tag of a compressed response.
pub(crate) async fn name_coding(mut response: Response) -> Response {
    let (Some(coding), Some(tag)) =
        (response.headers().get(header::CONTENT_ENCODING), response.headers().get(header::ETAG))
    else {
        return response;
    };
    if let (Ok(coding), Ok(tag)) = (coding.to_str(), tag.to_str())
        && let Some(bare) = tag.strip_suffix('"')
        && let Ok(named) = HeaderValue::from_str(&format!("{bare}-{coding}\""))
    {
        response.headers_mut().insert(header::ETAG, named);
    }
    response
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderName;

    use super::*;

    fn headers(name: HeaderName, value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_static(value))])
    }

    #[test]
    fn an_edit_needs_the_present_version_under_any_of_its_names() {
        let check = |value, version| IfMatch(headers(header::IF_MATCH, value).typed_get()).check(version);
        for good in ["\"7\"", "\"7-gzip\"", "\"1\", \"7-br\"", "*"] {
            assert!(check(good, 7).is_ok(), "{good}");
        }
        // A weak tag never matches here (RFC 9110, 13.1.1), and a tag without both quotes is not a tag.
        for bad in ["\"6\"", "7", "W/\"7\"", "\"7", "", "\"77\""] {
            assert!(check(bad, 7).is_err(), "{bad}");
        }
        assert!(IfMatch(None).check(7).is_ok());
        let mut two_lines = headers(header::IF_MATCH, "\"6\"");
        two_lines.append(header::IF_MATCH, HeaderValue::from_static("\"7\""));
        assert!(IfMatch(two_lines.typed_get()).check(7).is_ok());
    }

    #[test]
    fn gzip_is_for_those_who_like_nothing_better() {
        for wanted in
            ["gzip", "gzip, deflate, br, zstd", "br;q=0.9, gzip", "*", "gzip;q=0.1", "identity;q=0.5, gzip ;q=0.5"]
        {
            assert!(prefers_gzip(&headers(header::ACCEPT_ENCODING, wanted)), "{wanted}");
        }
        for unwanted in
            ["br", "gzip;q=0", "gzip;q=0, *", "gzip;q=0.5, br", "identity, gzip;q=0.5", "identity", "x-gzip;q=x"]
        {
            assert!(!prefers_gzip(&headers(header::ACCEPT_ENCODING, unwanted)), "{unwanted}");
        }
        assert!(!prefers_gzip(&HeaderMap::new()));
    }

    #[test]
    fn content_that_the_client_has_is_named_by_the_tag_that_it_sent() {
        let known = |value| known(&headers(header::IF_NONE_MATCH, value), "\"abc\"");
        assert_eq!(known("\"x\", W/\"abc-zstd\"").unwrap(), "\"abc-zstd\"");
        assert_eq!(known("*").unwrap(), "\"abc\"");
        assert_eq!(known("\"abd\""), None);
    }
}
