//! Extractors for bodies and path parameters. They check the input, and refuse it with a problem document that names
//! every fault.
//!
//! The rules of a body are defined once, as the schema of its type. The OpenAPI document shows this schema, and the
//! extractors validate bodies against it. An edit (`PATCH`) is a JSON merge patch (RFC 7396); its result is validated
//! against the schema of a new resource.

use std::any::TypeId;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, LazyLock, RwLock};

use anyhow::Context;
use axum::body::Bytes;
use axum::extract::path::ErrorKind;
use axum::extract::rejection::{BytesRejection, FailedToBufferBody, PathRejection};
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use jsonschema::error::ValidationErrorKind;
use jsonschema::{ValidationError, Validator};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use shared_contracts::problem::{Code, FieldError, Problem};
use utoipa::ToSchema;

use crate::admit::limits::BODY_BYTES_MAX;
use crate::http::error::{Error, Result};

/// The most faults that one answer lists. A list of 100,000 bad seats would help nobody.
const FAULTS_MAX: usize = 50;
/// The longest piece of a client's input that a fault quotes.
const QUOTE_CHARS_MAX: usize = 160;
/// 2^53: below it, a float holds every whole number exactly.
const WHOLE_FLOATS_BELOW: f64 = 9_007_199_254_740_992.0;

/// A JSON body, validated against the schema of `T`.
#[derive(Debug)]
pub struct ApiJson<T>(pub T);

/// A JSON body as it arrived, for handlers that must check its bytes before [`parse`] reads it. A signature is an
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
        let mut patch = read_value(&read_json(request, state).await?)?;
        let faults = clean(&mut patch);
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
    /// # Errors
    /// `422` with every fault.
    pub fn apply<T: DeserializeOwned + ToSchema + 'static>(self, current: &impl Serialize) -> Result<T> {
        let mut edited = serde_json::to_value(current).map_err(|error| Error::Internal(error.into()))?;
        if let Value::Object(members) = &mut edited {
            members.extend(self.0);
        }
        checked(edited, Vec::new())
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
    Bytes::from_request(request, state).await.map_err(|rejection| match rejection {
        BytesRejection::FailedToBufferBody(FailedToBufferBody::LengthLimitError(_)) => {
            Error::refused(Code::BodyTooLarge, "The body is larger than this call takes; split it into several calls.")
        }
        _ => Error::refused(Code::BadRequest, "The body broke off before its end."),
    })
}

fn read_value(body: &[u8]) -> Result<Value> {
    serde_json::from_slice(body)
        .map_err(|error| Error::refused(Code::MalformedJson, format!("The body is not JSON: {error}.")))
}

/// Parses a body, and validates it against the schema of its type.
///
/// # Errors
/// The body is not JSON, or `422` with every fault.
pub fn parse<T: DeserializeOwned + ToSchema + 'static>(body: &[u8]) -> Result<T> {
    let mut value = read_value(body)?;
    let faults = clean(&mut value);
    checked(value, faults)
}

fn checked<T: DeserializeOwned + ToSchema + 'static>(value: Value, mut faults: Vec<FieldError>) -> Result<T> {
    let validator = validator_of::<T>(|| schema_of::<T>()).map_err(Error::Internal)?;
    faults.extend(validator.iter_errors(&value).take(FAULTS_MAX).flat_map(|error| faults_of(&error)));
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

/// Trims every string, and turns whole numbers into integers: `2.0` is an integer in JSON Schema, but not in serde.
/// Reports NUL characters, which PostgreSQL can't store.
fn clean(value: &mut Value) -> Vec<FieldError> {
    let mut faults = Vec::new();
    clean_below(value, &mut faults);
    faults
}

fn clean_below(value: &mut Value, faults: &mut Vec<FieldError>) {
    // The pointer of a fault is built only when there is one.
    let below = |member: &mut Value, faults: &mut Vec<FieldError>, name: &dyn Fn() -> String| {
        let others = faults.len();
        clean_below(member, faults);
        let places = faults[others..].iter_mut().filter_map(|fault| fault.pointer.as_mut());
        places.for_each(|place| place.insert_str(0, &name()));
    };
    match value {
        Value::String(text) => {
            if text.contains('\0') {
                faults.push(FieldError::at(String::new(), "a NUL character is not allowed"));
            }
            if text.trim().len() < text.len() {
                *text = text.trim().to_owned();
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter_mut().enumerate() {
                below(item, faults, &|| format!("/{index}"));
            }
        }
        Value::Object(members) => {
            for (name, member) in members {
                below(member, faults, &|| format!("/{}", escaped(name)));
            }
        }
        Value::Number(number) => {
            let whole = number.as_f64().filter(|float| float.fract() == 0.0 && float.abs() < WHOLE_FLOATS_BELOW);
            if let (true, Some(whole)) = (number.is_f64(), whole) {
                *number = (whole as i64).into();
            }
        }
        Value::Null | Value::Bool(_) => {}
    }
}

fn escaped(name: &str) -> String {
    name.replace('~', "~0").replace('/', "~1")
}

pub(crate) fn faults_of(error: &ValidationError<'_>) -> Vec<FieldError> {
    let pointer = error.instance_path().to_string();
    match error.kind() {
        ValidationErrorKind::Required { property } => {
            let name = property.as_str().unwrap_or_default();
            vec![FieldError::at(format!("{pointer}/{}", escaped(name)), "is required")]
        }
        // An optional member is "null or this". The client needs the faults of "this".
        ValidationErrorKind::AnyOf { context } | ValidationErrorKind::OneOfNotValid { context } => {
            let of_right_type = context.iter().find(|branch| {
                branch.iter().all(|inner| {
                    !(matches!(inner.kind(), ValidationErrorKind::Type { .. })
                        && inner.instance_path() == error.instance_path())
                })
            });
            match of_right_type {
                Some(branch) => branch.iter().flat_map(faults_of).collect(),
                None => vec![FieldError::at(pointer, "matches none of the forms that are allowed here")],
            }
        }
        _ => {
            let said = error.to_string();
            let detail = if said.chars().count() > QUOTE_CHARS_MAX { error.masked().to_string() } else { said };
            vec![FieldError::at(pointer, detail)]
        }
    }
}

/// The validator of a type, built from its schema at first use and cached.
pub(crate) fn validator_of<T: 'static>(
    schema: impl FnOnce() -> anyhow::Result<Value>,
) -> anyhow::Result<Arc<Validator>> {
    static VALIDATORS: LazyLock<RwLock<HashMap<TypeId, Arc<Validator>>>> = LazyLock::new(RwLock::default);
    let poisoned = || anyhow::anyhow!("a thread panicked while it built a validator");
    if let Some(validator) = VALIDATORS.read().map_err(|_| poisoned())?.get(&TypeId::of::<T>()) {
        return Ok(Arc::clone(validator));
    }
    let validator = jsonschema::draft202012::options()
        .should_validate_formats(true)
        .with_format("iana-time-zone", |name| name.parse::<chrono_tz::Tz>().is_ok())
        .build(&schema()?)
        .map_err(|error| anyhow::anyhow!("{error}"))
        .with_context(|| format!("the schema of {} can't be compiled", std::any::type_name::<T>()))?;
    let validator = Arc::new(validator);
    VALIDATORS.write().map_err(|_| poisoned())?.insert(TypeId::of::<T>(), Arc::clone(&validator));
    Ok(validator)
}

fn schema_of<T: ToSchema>() -> anyhow::Result<Value> {
    let mut components = Vec::new();
    T::schemas(&mut components);
    let components: Map<String, Value> = components
        .into_iter()
        .map(|(name, schema)| Ok((name, serde_json::to_value(schema)?)))
        .collect::<std::result::Result<_, serde_json::Error>>()?;
    let mut schema = json!({ "components": { "schemas": components } });
    if let (Value::Object(root), Value::Object(own)) = (&mut schema, serde_json::to_value(T::schema())?) {
        root.extend(own);
    }
    Ok(schema)
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

    use super::*;

    #[derive(Debug, Deserialize, ToSchema)]
    struct Order {
        #[schema(min_length = 1, max_length = 5)]
        name: String,
        #[schema(minimum = 1)]
        count: u32,
        #[expect(dead_code, reason = "only its rule is of interest")]
        #[schema(max_length = 3)]
        note: Option<String>,
        lines: Vec<Line>,
    }

    #[derive(Debug, Deserialize, ToSchema)]
    struct Line {
        id: uuid::Uuid,
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
        let line = r#"{"id":"019ac1c0-0000-7000-8000-000000000001","a/b":"\u0000"}"#;
        let body = format!(r#"{{"name":"a\u0000b","count":1,"lines":[{},{line}]}}"#, line.replace("\\u0000", ""));
        assert_eq!(faults(&body), ["/lines/1/a~1b", "/name"]);
    }

    #[test]
    fn an_edit_changes_what_it_names_and_is_held_against_the_rules_of_a_new_one() {
        #[derive(Debug, Serialize, Deserialize, ToSchema)]
        struct Room {
            #[schema(min_length = 1)]
            name: String,
            note: Option<String>,
        }
        let current = Room { name: "Hall".into(), note: Some("old".into()) };
        let edit = |patch: Value| ApiPatch(patch.as_object().unwrap().clone()).apply::<Room>(&current);
        let edited = edit(json!({ "note": null, "unknown": 1 })).unwrap();
        assert_eq!((edited.name.as_str(), edited.note), ("Hall", None));
        for bad in [json!({ "name": null }), json!({ "name": "" })] {
            let Err(Error::Refused(problem)) = edit(bad) else { panic!("accepted") };
            assert_eq!(problem.errors[0].pointer.as_deref(), Some("/name"));
        }
    }

    #[test]
    fn what_is_not_json_is_not_a_validation_fault() {
        let Err(Error::Refused(problem)) = parse::<Order>(b"{") else { panic!("accepted") };
        assert_eq!(problem.code, Code::MalformedJson);
    }
}
