//! Entity tags. An edit with one can't overwrite a change that its author has not seen, and a client need not load
//! again what it has.
//!
//! A tag names the resource's version, or a hash of its content. A compressed answer gets a tag of its own (`"7"`
//! becomes `"7-gzip"`), because RFC 9110 requires different strong tags for different bytes. When a client sends one
//! back, both count as the same.

use axum::Json;
use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use shared_contracts::problem::Code;
use utoipa::IntoParams;

use crate::http::error::{Error, Result};

/// The codings that [`crate::http::layers`] may apply, as the suffixes of a tag.
const CODINGS: [&str; 3] = ["-gzip", "-br", "-zstd"];

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

/// The `If-Match` of an edit: the version that its author has seen. An edit without one overwrites any version.
#[derive(Debug)]
pub struct IfMatch(Vec<String>);

impl<S: Sync> FromRequestParts<S> for IfMatch {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self> {
        Ok(Self(tags(&parts.headers, &header::IF_MATCH)))
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
        if self.0.is_empty() || self.0.iter().any(|tag| tag == "*" || without_coding(tag) == current) {
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
    tags(headers, &header::IF_NONE_MATCH).into_iter().find_map(|tag| {
        let strong = tag.strip_prefix("W/").unwrap_or(&tag);
        match strong {
            "*" => HeaderValue::from_str(current).ok(),
            _ if without_coding(strong) == current => HeaderValue::from_str(strong).ok(),
            _ => None,
        }
    })
}

fn tags(headers: &HeaderMap, name: &HeaderName) -> Vec<String> {
    let values = headers.get_all(name).iter();
    // A value that is not text can't be a tag of ours. It still counts as a condition, because without one any edit is
    // permitted.
    values.flat_map(|value| value.to_str().unwrap_or("?").split(',')).map(|tag| tag.trim().to_owned()).collect()
}

/// Whether the client accepts gzip, and gives no higher weight to `br`, `zstd` or `identity`.
#[must_use]
pub fn prefers_gzip(headers: &HeaderMap) -> bool {
    let (mut gzip, mut any, mut others) = (None, None, 0.0_f32);
    for asked in tags(headers, &header::ACCEPT_ENCODING) {
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

fn without_coding(tag: &str) -> String {
    let Some(bare) = tag.strip_suffix('"') else {
        return tag.to_owned();
    };
    let bare = CODINGS.iter().find_map(|coding| bare.strip_suffix(coding)).unwrap_or(bare);
    format!("{bare}\"")
}

/// Appends the coding to the tag of a compressed answer.
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
    use super::*;

    fn headers(name: HeaderName, value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_static(value))])
    }

    #[test]
    fn an_edit_needs_the_present_version_under_any_of_its_names() {
        let check = |value, version| IfMatch(tags(&headers(header::IF_MATCH, value), &header::IF_MATCH)).check(version);
        for good in ["\"7\"", "\"7-gzip\"", "\"1\", \"7-br\"", "*"] {
            assert!(check(good, 7).is_ok(), "{good}");
        }
        // A weak tag never matches here (RFC 9110, 13.1.1), and a tag without both quotes is not a tag.
        for bad in ["\"6\"", "7", "W/\"7\"", "\"7", "", "\"77\""] {
            assert!(check(bad, 7).is_err(), "{bad}");
        }
        assert!(IfMatch(Vec::new()).check(7).is_ok());
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
    fn what_the_client_has_is_answered_under_the_name_that_it_knows() {
        let known = |value| known(&headers(header::IF_NONE_MATCH, value), "\"abc\"");
        assert_eq!(known("\"x\", W/\"abc-zstd\"").unwrap(), "\"abc-zstd\"");
        assert_eq!(known("*").unwrap(), "\"abc\"");
        assert_eq!(known("\"abd\""), None);
    }
}
