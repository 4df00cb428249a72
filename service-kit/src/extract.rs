//! What a handler is given: body, path and query, read and checked, or a problem document that names every fault.
//!
//! A body's rules stand once, as the schema of its type: the OpenAPI document shows it, and here bodies are held against it.

use std::any::TypeId;
use std::collections::HashMap;
use std::sync::{Arc, LazyLock, RwLock};

use anyhow::Context;
use axum::body::Bytes;
use axum::extract::path::ErrorKind;
use axum::extract::rejection::{BytesRejection, FailedToBufferBody, PathRejection};
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use jsonschema::error::ValidationErrorKind;
use jsonschema::{ValidationError, Validator};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use shared_contracts::problem::{Code, FieldError, Problem};
use utoipa::ToSchema;

use crate::error::{Error, Result};

/// The most faults that one answer lists; a list of 100,000 bad seats would help nobody.
const FAULTS_MAX: usize = 50;
/// The longest piece of a client's input that a fault quotes.
const QUOTE_CHARS_MAX: usize = 160;

/// A JSON body.
#[derive(Debug)]
pub struct ApiJson<T>(pub T);

/// A JSON body that may be left out: `T`'s default then.
#[derive(Debug)]
pub struct OptionalJson<T>(pub T);

/// The parameters in the path.
#[derive(Debug)]
pub struct ApiPath<T>(pub T);

/// The parameters after the `?`.
#[derive(Debug)]
pub struct ApiQuery<T>(pub T);

impl<T: DeserializeOwned + ToSchema + 'static, S: Send + Sync> FromRequest<S> for ApiJson<T> {
    type Rejection = Error;

    async fn from_request(request: Request, state: &S) -> Result<Self> {
        let declared = is_json(request.headers());
        let body = read_body(request, state).await?;
        if !declared {
            return Err(Error::refused(
                Code::UnsupportedMediaType,
                "Send JSON, with the header `Content-Type: application/json`.",
            ));
        }
        parse(&body).map(Self)
    }
}

impl<T: DeserializeOwned + ToSchema + Default + 'static, S: Send + Sync> FromRequest<S> for OptionalJson<T> {
    type Rejection = Error;

    async fn from_request(request: Request, state: &S) -> Result<Self> {
        let declared = is_json(request.headers());
        let body = read_body(request, state).await?;
        match (body.is_empty(), declared) {
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

async fn read_body<S: Send + Sync>(request: Request, state: &S) -> Result<Bytes> {
    Bytes::from_request(request, state).await.map_err(|rejection| match rejection {
        BytesRejection::FailedToBufferBody(FailedToBufferBody::LengthLimitError(_)) => {
            Error::refused(Code::BodyTooLarge, "The body is larger than this call takes; split it into several calls.")
        }
        _ => Error::refused(Code::BadRequest, "The body broke off before its end."),
    })
}

fn parse<T: DeserializeOwned + ToSchema + 'static>(body: &[u8]) -> Result<T> {
    let mut value: Value = serde_json::from_slice(body)
        .map_err(|error| Error::refused(Code::MalformedJson, format!("The body is not JSON: {error}.")))?;
    let mut faults = Vec::new();
    clean(&mut value, &mut String::new(), &mut faults);
    let validator = validator_of::<T>().map_err(Error::Internal)?;
    faults.extend(validator.iter_errors(&value).take(FAULTS_MAX).flat_map(|error| faults_of(&error)));
    if !faults.is_empty() {
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

/// Trims every string and refuses NUL, which PostgreSQL can't store.
fn clean(value: &mut Value, pointer: &mut String, faults: &mut Vec<FieldError>) {
    let length = pointer.len();
    match value {
        Value::String(text) => {
            if text.contains('\0') {
                faults.push(FieldError::at(pointer.clone(), "a NUL character is not allowed"));
            }
            if text.trim().len() < text.len() {
                *text = text.trim().to_owned();
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter_mut().enumerate() {
                pointer.push_str(&format!("/{index}"));
                clean(item, pointer, faults);
                pointer.truncate(length);
            }
        }
        Value::Object(members) => {
            for (name, member) in members {
                pointer.push('/');
                pointer.push_str(&escaped(name));
                clean(member, pointer, faults);
                pointer.truncate(length);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

fn escaped(name: &str) -> String {
    name.replace('~', "~0").replace('/', "~1")
}

fn faults_of(error: &ValidationError<'_>) -> Vec<FieldError> {
    let pointer = error.instance_path().to_string();
    match error.kind() {
        ValidationErrorKind::Required { property } => {
            let name = property.as_str().unwrap_or_default();
            vec![FieldError::at(format!("{pointer}/{}", escaped(name)), "is required")]
        }
        // An optional member is "null or this": what is wrong with "this" is what the client wants to hear.
        ValidationErrorKind::AnyOf { context } | ValidationErrorKind::OneOfNotValid { context } => {
            let of_right_type = context.iter().find(|branch| {
                branch.iter().all(|inner| {
                    !(matches!(inner.kind(), ValidationErrorKind::Type { .. })
                        && inner.instance_path() == error.instance_path())
                })
            });
            match of_right_type {
                Some(branch) => branch.iter().flat_map(faults_of).collect(),
                None => vec![FieldError::at(pointer, "has none of the forms that are allowed here")],
            }
        }
        _ => {
            let said = error.to_string();
            let detail = if said.chars().count() > QUOTE_CHARS_MAX { error.masked().to_string() } else { said };
            vec![FieldError::at(pointer, detail)]
        }
    }
}

/// The validator of a body's type, made from its OpenAPI schema when it is first needed.
fn validator_of<T: ToSchema + 'static>() -> anyhow::Result<Arc<Validator>> {
    static VALIDATORS: LazyLock<RwLock<HashMap<TypeId, Arc<Validator>>>> = LazyLock::new(RwLock::default);
    let poisoned = || anyhow::anyhow!("a thread panicked while it made a validator");
    if let Some(validator) = VALIDATORS.read().map_err(|_| poisoned())?.get(&TypeId::of::<T>()) {
        return Ok(Arc::clone(validator));
    }
    let mut components = Vec::new();
    T::schemas(&mut components);
    let components: serde_json::Map<String, Value> = components
        .into_iter()
        .map(|(name, schema)| Ok((name, serde_json::to_value(schema)?)))
        .collect::<std::result::Result<_, serde_json::Error>>()?;
    let mut schema = json!({ "components": { "schemas": components } });
    if let (Value::Object(root), Value::Object(own)) = (&mut schema, serde_json::to_value(T::schema())?) {
        root.extend(own);
    }
    let validator = jsonschema::draft202012::options()
        .should_validate_formats(true)
        .build(&schema)
        .map_err(|error| anyhow::anyhow!("{error}"))
        .with_context(|| format!("the schema of {} can't be compiled", T::name()))?;
    let validator = Arc::new(validator);
    VALIDATORS.write().map_err(|_| poisoned())?.insert(TypeId::of::<T>(), Arc::clone(&validator));
    Ok(validator)
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

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for ApiQuery<T> {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self> {
        Query::try_from_uri(&parts.uri).map(|Query(value)| Self(value)).map_err(|rejection| {
            let said = std::error::Error::source(&rejection).map_or_else(|| rejection.to_string(), ToString::to_string);
            let (name, detail) = said.split_once(": ").unwrap_or(("query", &said));
            Error::invalid(FieldError::parameter(name, detail))
        })
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
        #[expect(dead_code, reason = "only its rule is of interest")]
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
    fn a_nul_character_is_refused() {
        assert_eq!(faults(r#"{"name":"a\u0000b","count":1,"lines":[]}"#), ["/name"]);
    }

    #[test]
    fn what_is_not_json_is_not_a_validation_fault() {
        let Err(Error::Refused(problem)) = parse::<Order>(b"{") else { panic!("accepted") };
        assert_eq!(problem.code, Code::MalformedJson);
    }
}
