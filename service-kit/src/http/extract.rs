//! Extractors for bodies and path parameters. They check the input, and refuse it with a problem document that names
//! every fault.
//!
//! The rules of a body are defined once, as the schema of its type. The OpenAPI document shows this schema, and the
//! extractors validate bodies against it. An edit (`PATCH`) is a JSON merge patch (RFC 7396); its result is validated
//! against the schema of a new resource.

use std::collections::HashSet;

use axum::body::Bytes;
use axum::extract::path::ErrorKind;
use axum::extract::rejection::{BytesRejection, FailedToBufferBody, PathRejection};
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use shared_contracts::problem::{Code, FieldError, Problem};
use utoipa::ToSchema;

use crate::admit::limits::BODY_BYTES_MAX;
use crate::http::error::{Error, Result};
use crate::http::json;
use crate::http::rules::{FAULTS_MAX, Rules};

/// A JSON body, validated against the schema of `T`.
#[derive(Debug)]
pub struct ApiJson<T>(pub T);

/// A JSON body as it arrived, for handlers that must check its bytes before [`parse_foreign`] reads it. A signature is an
/// example.
#[derive(Debug)]
pub struct RawJson(pub Bytes);

/// A JSON body that may be absent or `null`: the value is then `T`'s default.
#[derive(Debug)]
pub struct OptionalJson<T>(pub T);

/// The members of a resource that an edit changes. Members that it does not name stay as they are; `null` clears one.
#[derive(Debug)]
pub struct ApiPatch(Map<String, Value>);

/// The parameters in the path. One that can't be parsed is answered with `422`.
#[derive(Debug)]
pub struct ApiPath<T>(pub T);

impl<T: DeserializeOwned + ToSchema + Send + 'static, S: Send + Sync> FromRequest<S> for ApiJson<T> {
    type Rejection = Error;

    async fn from_request(request: Request, state: &S) -> Result<Self> {
        let body = read_json(request, state).await?;
        if body.len() <= BODY_BYTES_MAX {
            return parse(&body).map(Self);
        }
        // Parsing a hall of 100,000 seats takes long, and would delay the bookings on this thread.
        tokio::task::spawn_blocking(move || parse(&body))
            .await
            .map_err(|error| Error::Internal(error.into()))?
            .map(Self)
    }
}

impl<S: Send + Sync> FromRequest<S> for RawJson {
    type Rejection = Error;

    async fn from_request(request: Request, state: &S) -> Result<Self> {
        read_json(request, state).await.map(Self)
    }
}

impl<S: Send + Sync> FromRequest<S> for ApiPatch {
    type Rejection = Error;

    async fn from_request(request: Request, state: &S) -> Result<Self> {
        let mut patch = json::read(&read_json(request, state).await?)?;
        let faults = json::clean(&mut patch);
        match patch {
            _ if !faults.is_empty() => Err(Problem::validation(faults).into()),
            Value::Object(members) => Ok(Self(members)),
            _ => Err(Error::invalid(FieldError::at("", "is not an object with the members to change"))),
        }
    }
}

impl ApiPatch {
    /// Applies the edit to `current`, and validates the result against the rules for a new resource.
    ///
    /// A member that `current` has and a new resource does not is only read. It may stand in the edit, so that a client
    /// can send back what it has read. `status` must then be what it is: whoever changes it expects an effect.
    ///
    /// # Errors
    /// `422` with every fault.
    pub fn apply<T: DeserializeOwned + ToSchema + 'static>(self, current: &impl Serialize) -> Result<T> {
        let rules = Rules::of_body::<T>().map_err(Error::Internal)?;
        let mut faults = Vec::new();
        let mut edited = serde_json::to_value(current).map_err(|error| Error::Internal(error.into()))?;
        if let Value::Object(members) = &mut edited {
            for (name, value) in self.0 {
                match members.get(&name) {
                    _ if rules.has_member(&name) => {
                        members.insert(name, value);
                    }
                    Some(present) if name == "status" && *present != value => {
                        let detail = format!("is {present}, and an edit can't change it; a call of its own does");
                        faults.push(FieldError::at("/status", detail));
                    }
                    Some(_) => {}
                    None => faults.push(rules.unknown_member(&name)),
                }
            }
            members.retain(|name, _| rules.has_member(name));
        }
        checked(edited, faults)
    }

    /// Accepts `alias` as a second name of the member `name`. If both are given, `name` counts.
    #[must_use]
    pub fn with_alias(mut self, alias: &str, name: &str) -> Self {
        if !self.0.contains_key(name)
            && let Some(value) = self.0.remove(alias)
        {
            self.0.insert(name.to_owned(), value);
        }
        self
    }
}

impl<T: DeserializeOwned + ToSchema + Default + 'static, S: Send + Sync> FromRequest<S> for OptionalJson<T> {
    type Rejection = Error;

    async fn from_request(request: Request, state: &S) -> Result<Self> {
        let declared = is_json(request.headers());
        let body = read_body(request, state).await?;
        match (matches!(&*body, b"" | b"null"), declared) {
            (true, _) => Ok(Self(T::default())),
            (false, true) => parse(&body).map(Self),
            (false, false) => Err(Error::refused(
                Code::UnsupportedMediaType,
                "Send JSON, with the header `Content-Type: application/json`, or no body.",
            )),
        }
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let Some(content_type) = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()) else {
        return false;
    };
    let essence = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"))
}

async fn read_json<S: Send + Sync>(request: Request, state: &S) -> Result<Bytes> {
    let declared = is_json(request.headers());
    let body = read_body(request, state).await?;
    declared.then_some(body).ok_or_else(|| {
        Error::refused(Code::UnsupportedMediaType, "Send JSON, with the header `Content-Type: application/json`.")
    })
}

async fn read_body<S: Send + Sync>(request: Request, state: &S) -> Result<Bytes> {
    let coding = request.headers().get(header::CONTENT_ENCODING);
    if coding.is_some_and(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"identity")) {
        let detail = "A compressed body is not read; send it without `Content-Encoding`.";
        return Err(Error::refused(Code::UnsupportedMediaType, detail));
    }
    Bytes::from_request(request, state).await.map_err(|rejection| match rejection {
        BytesRejection::FailedToBufferBody(FailedToBufferBody::LengthLimitError(_)) => {
            Error::refused(Code::BodyTooLarge, "The body is larger than this call takes; split it into several calls.")
        }
        _ => Error::refused(Code::BadRequest, "The body broke off before its end."),
    })
}

/// Parses a client's body, and validates it against the schema of its type.
///
/// # Errors
/// `400`: the body is not JSON, or has a member twice. `422` with every fault.
fn parse<T: DeserializeOwned + ToSchema + 'static>(body: &[u8]) -> Result<T> {
    let mut value = json::read(body)?;
    let faults = json::clean(&mut value);
    checked(value, faults)
}

/// Parses a payment provider's body, and validates it against the schema of its type.
///
/// # Errors
/// `400`: the body is not JSON. `422` with every fault.
pub fn parse_foreign<T: DeserializeOwned + ToSchema + 'static>(body: &[u8]) -> Result<T> {
    let mut value = json::read_foreign(body)?;
    let faults = json::clean(&mut value);
    checked(value, faults)
}

fn checked<T: DeserializeOwned + ToSchema + 'static>(mut value: Value, mut faults: Vec<FieldError>) -> Result<T> {
    let rules = Rules::of_body::<T>().map_err(Error::Internal)?;
    rules.empty_to_null(&mut value);
    faults.extend(rules.faults(&value));
    if !faults.is_empty() {
        // One fault per place: an empty name is too short, and that it also matches no pattern helps nobody.
        let mut places = HashSet::new();
        faults.retain(|fault| places.insert(fault.pointer.clone()));
        faults.truncate(FAULTS_MAX);
        return Err(Problem::validation(faults).into());
    }
    serde_path_to_error::deserialize(value).map_err(|error| {
        let pointer = error.path().to_string().replace(['.', '['], "/").replace(']', "");
        Error::invalid(FieldError::at(
            if pointer == "/" { String::new() } else { format!("/{pointer}") },
            error.inner().to_string(),
        ))
    })
}

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for ApiPath<T> {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self> {
        let rejection = match Path::from_request_parts(parts, state).await {
            Ok(Path(value)) => return Ok(Self(value)),
            Err(rejection) => rejection,
        };
        let PathRejection::FailedToDeserializePathParams(failure) = &rejection else {
            return Err(Error::Internal(anyhow::anyhow!("the route has no path parameters: {rejection}")));
        };
        let (name, detail) = match failure.kind() {
            ErrorKind::ParseErrorAtKey { key, value, expected_type } => {
                (key.clone(), format!("{value:?} is not of type {expected_type}"))
            }
            ErrorKind::DeserializeError { key, value, message } => {
                (key.clone(), format!("{value:?} can't be used: {message}"))
            }
            ErrorKind::InvalidUtf8InPathParam { key } => (key.clone(), "is not UTF-8".to_owned()),
            other => ("path".to_owned(), other.to_string()),
        };
        Err(Error::invalid(FieldError::parameter(name, detail)))
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use serde_json::json;

    use super::*;

    #[derive(Debug, Deserialize, ToSchema)]
    #[serde(deny_unknown_fields)]
    struct Order {
        #[schema(min_length = 1, max_length = 5)]
        name: String,
        #[schema(minimum = 1)]
        count: u32,
        #[schema(max_length = 3)]
        note: Option<String>,
        lines: Vec<Line>,
    }

    #[derive(Debug, Deserialize, ToSchema)]
    #[serde(deny_unknown_fields)]
    struct Line {
        id: uuid::Uuid,
        colour: Option<String>,
    }

    fn faults(body: &str) -> Vec<String> {
        match parse::<Order>(body.as_bytes()) {
            Err(Error::Refused(problem)) => problem.errors.into_iter().filter_map(|error| error.pointer).collect(),
            other => panic!("expected a refusal, got {other:?}"),
        }
    }

    #[test]
    fn every_fault_is_named_at_once_by_its_pointer() {
        let mut found = faults(r#"{"name":"","count":0,"note":"long","lines":[{"id":"x"},{}]}"#);
        found.sort();
        assert_eq!(found, ["/count", "/lines/0/id", "/lines/1/id", "/name", "/note"]);
    }

    #[test]
    fn a_member_that_does_not_exist_is_named_with_the_one_that_was_meant() {
        let body = r#"{"name":"a","count":1,"cuont":2,"lines":[{"id":"019ac1c0-0000-7000-8000-000000000001","colors":"","x":1}]}"#;
        let Err(Error::Refused(problem)) = parse::<Order>(body.as_bytes()) else { panic!("accepted") };
        let mut found: Vec<_> =
            problem.errors.into_iter().map(|error| (error.pointer.unwrap_or_default(), error.detail)).collect();
        found.sort();
        let found: Vec<_> = found.iter().map(|(place, detail)| (place.as_str(), detail.as_str())).collect();
        assert_eq!(
            found,
            [
                ("/cuont", "there is no such member; did you mean `count`?"),
                ("/lines/0/colors", "there is no such member; did you mean `colour`?"),
                ("/lines/0/x", "there is no such member"),
            ]
        );
    }

    #[test]
    fn an_empty_text_means_null_where_null_may_stand() {
        let body =
            r#"{"name":"a","count":1,"note":"  ","lines":[{"id":"019ac1c0-0000-7000-8000-000000000001","colour":""}]}"#;
        let order: Order = parse(body.as_bytes()).unwrap();
        assert_eq!((order.note, order.lines[0].colour.as_deref()), (None, None));
        assert_eq!(faults(r#"{"name":"","count":1,"lines":[]}"#), ["/name"]);
    }

    #[test]
    fn strings_are_trimmed_before_they_are_measured() {
        let order: Order =
            parse(br#"{"name":"  abc  ","count":1,"lines":[{"id":"019ac1c0-0000-7000-8000-000000000001"}]}"#).unwrap();
        assert_eq!((order.name.as_str(), order.lines.len()), ("abc", 1));
        assert_eq!(order.lines[0].id.get_version_num(), 7);
    }

    #[test]
    fn a_whole_number_may_be_written_with_a_point() {
        let order: Order = parse(br#"{"name":"abc","count":2.0,"lines":[]}"#).unwrap();
        assert_eq!(order.count, 2);
        assert_eq!(faults(r#"{"name":"abc","count":2.5,"lines":[]}"#), ["/count"]);
    }

    #[test]
    fn a_nul_character_is_refused_wherever_it_stands() {
        let line = r#"{"id":"019ac1c0-0000-7000-8000-000000000001","colour":"\u0000"}"#;
        let body = format!(r#"{{"name":"a\u0000b","count":1,"lines":[{},{line}]}}"#, line.replace("\\u0000", ""));
        assert_eq!(faults(&body), ["/lines/1/colour", "/name"]);
    }

    #[test]
    fn an_edit_changes_what_it_names_and_is_held_against_the_rules_of_a_new_one() {
        #[derive(Debug, Deserialize, ToSchema)]
        #[serde(deny_unknown_fields)]
        struct Room {
            #[schema(min_length = 1)]
            name: String,
            note: Option<String>,
        }
        let current = json!({ "id": 7, "status": "open", "name": "Hall", "note": "old" });
        let edit = |patch: Value| ApiPatch(patch.as_object().unwrap().clone()).apply::<Room>(&current);
        let edited = edit(json!({ "note": null, "id": 8, "status": "open" })).unwrap();
        assert_eq!((edited.name.as_str(), edited.note), ("Hall", None));
        assert_eq!(edit(json!({ "note": "" })).unwrap().note, None);
        for (bad, place, detail) in [
            (json!({ "name": null }), "/name", ""),
            (json!({ "name": "" }), "/name", ""),
            (
                json!({ "status": "closed" }),
                "/status",
                "is \"open\", and an edit can't change it; a call of its own does",
            ),
            (json!({ "naem": "A" }), "/naem", "there is no such member; did you mean `name`?"),
            (json!({ "colour": 1 }), "/colour", "there is no such member"),
        ] {
            let Err(Error::Refused(problem)) = edit(bad) else { panic!("accepted") };
            assert_eq!(problem.errors[0].pointer.as_deref(), Some(place));
            assert!(problem.errors[0].detail.contains(detail), "{:?}", problem.errors);
        }
    }

    #[test]
    fn what_is_not_json_is_not_a_validation_fault() {
        let Err(Error::Refused(problem)) = parse::<Order>(b"{") else { panic!("accepted") };
        assert_eq!(problem.code, Code::MalformedJson);
    }
}
