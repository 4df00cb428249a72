//! Query parameters. The extractor validates them against the schema that the OpenAPI document shows, and names all
//! faults at once.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use axum::Router;
use axum::extract::{FromRequestParts, MatchedPath, Request, State};
use axum::http::Method;
use axum::http::request::Parts;
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use shared_contracts::problem::{FieldError, Problem};
use utoipa::IntoParams;
use utoipa::openapi::path::{Operation, Parameter, ParameterIn};
use utoipa::openapi::{OpenApi, RefOr, Required};

use crate::http::error::{Error, Result};
use crate::http::rules::{FAULTS_MAX, Rules, not_known};

/// The query parameters of one or two types, for example a list's page and its filter.
#[derive(Debug)]
pub struct ApiQuery<A, B = NoMore>(pub A, pub B);

/// Stands for no second type in [`ApiQuery`].
#[derive(Debug, Default, Deserialize, IntoParams)]
pub struct NoMore {}

impl<A, B, S> FromRequestParts<S> for ApiQuery<A, B>
where
    A: DeserializeOwned + IntoParams + 'static,
    B: DeserializeOwned + IntoParams + 'static,
    S: Send + Sync,
{
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self> {
        let query = parts.uri.query().unwrap_or_default();
        let mut faults = Vec::new();
        let (first, second) = (parse::<A>(query, &mut faults)?, parse::<B>(query, &mut faults)?);
        match (first, second) {
            (Some(first), Some(second)) if faults.is_empty() => Ok(Self(first, second)),
            _ => Err(Problem::validation(faults).into()),
        }
    }
}

/// The parameters of one type; `None` when it has added `faults`. Parameters that the type does not have are ignored:
/// they belong to the other type, or to none.
fn parse<T: DeserializeOwned + IntoParams + 'static>(query: &str, faults: &mut Vec<FieldError>) -> Result<Option<T>> {
    let known = T::into_params(|| None);
    let mut given = Map::new();
    for (name, text) in form_urlencoded::parse(query.as_bytes()) {
        let Some(parameter) = known.iter().find(|parameter| parameter.name == name) else {
            continue;
        };
        let text = text.trim();
        if text.contains('\0') {
            faults.push(FieldError::parameter(&*name, "a NUL character is not allowed"));
        }
        if given.insert(name.clone().into_owned(), typed(parameter, text)).is_some() {
            faults.push(FieldError::parameter(&*name, "is given more than once"));
        }
    }
    let given = Value::Object(given);
    let rules = Rules::of::<T>(|| schema_of(&known)).map_err(Error::Internal)?;
    let before = faults.len();
    faults.extend(rules.faults(&given).into_iter().map(|fault| {
        let pointer = fault.pointer.unwrap_or_default();
        FieldError::parameter(pointer.trim_start_matches('/'), fault.detail)
    }));
    if faults.len() > before {
        return Ok(None);
    }
    match serde_path_to_error::deserialize(given) {
        Ok(parsed) => Ok(Some(parsed)),
        Err(error) => {
            faults.push(FieldError::parameter(error.path().to_string(), error.inner().to_string()));
            Ok(None)
        }
    }
}

/// Every parameter arrives as text. One that is declared as a number or a boolean becomes one, if its text permits.
fn typed(parameter: &Parameter, text: &str) -> Value {
    let schema = serde_json::to_value(&parameter.schema).unwrap_or_default();
    let declared = |name: &str| match &schema["type"] {
        Value::Array(types) => types.iter().any(|one| one == name),
        one => one == name,
    };
    let parsed = if declared("integer") {
        text.parse::<i64>().ok().map(Value::from)
    } else if declared("number") {
        text.parse::<f64>().ok().map(Value::from)
    } else if declared("boolean") {
        text.parse::<bool>().ok().map(Value::from)
    } else {
        None
    };
    parsed.unwrap_or_else(|| text.into())
}

fn schema_of(parameters: &[Parameter]) -> anyhow::Result<Value> {
    let properties: Map<String, Value> = parameters
        .iter()
        .map(|parameter| Ok((parameter.name.clone(), serde_json::to_value(&parameter.schema)?)))
        .collect::<serde_json::Result<_>>()?;
    let required: Vec<&str> = parameters
        .iter()
        .filter(|parameter| matches!(parameter.required, Required::True))
        .map(|parameter| parameter.name.as_str())
        .collect();
    Ok(json!({ "type": "object", "properties": properties, "required": required }))
}

/// The names of the query parameters of each operation, by path and method.
type KnownNames = Arc<HashMap<(String, Method), BTreeSet<String>>>;

/// Makes the operations of `document` under `/api/v1` refuse query parameters that they do not have. A misspelt filter
/// would otherwise give an answer to another question.
pub fn strict(routes: Router, document: &OpenApi) -> Router {
    let named = |operation: &Operation| {
        let parameters = operation.parameters.iter().flatten().filter_map(|parameter| match parameter {
            RefOr::T(parameter) => Some(parameter),
            RefOr::Ref(_) => None,
        });
        parameters.filter(|one| one.parameter_in == ParameterIn::Query).map(|one| one.name.clone()).collect()
    };
    let mut known = HashMap::new();
    for (path, item) in document.paths.paths.iter().filter(|(path, _)| path.starts_with("/api/v1/")) {
        let operations = [
            (Method::GET, &item.get),
            (Method::HEAD, &item.get),
            (Method::POST, &item.post),
            (Method::PUT, &item.put),
            (Method::PATCH, &item.patch),
            (Method::DELETE, &item.delete),
        ];
        let operations = operations.into_iter().filter_map(|(method, operation)| Some((method, operation.as_ref()?)));
        known.extend(operations.map(|(method, operation)| ((path.clone(), method), named(operation))));
    }
    routes.layer(from_fn_with_state::<_, KnownNames, (State<KnownNames>, Request)>(Arc::new(known), refuse_unknown))
}

async fn refuse_unknown(State(known): State<KnownNames>, request: Request, next: Next) -> Response {
    let faults = match (request.uri().query(), request.extensions().get::<MatchedPath>()) {
        (Some(query), Some(path)) => known
            .get(&(path.as_str().to_owned(), request.method().clone()))
            .map_or_else(Vec::new, |names| unknown_names(query, names)),
        _ => Vec::new(),
    };
    if faults.is_empty() { next.run(request).await } else { Error::from(Problem::validation(faults)).into_response() }
}

fn unknown_names(query: &str, known: &BTreeSet<String>) -> Vec<FieldError> {
    let given: BTreeSet<String> = form_urlencoded::parse(query.as_bytes()).map(|(name, _)| name.into_owned()).collect();
    let unknown = given.difference(known).take(FAULTS_MAX);
    unknown
        .map(|name| FieldError::parameter(name, not_known("parameter", name, known.iter().map(String::as_str))))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize, IntoParams)]
    #[into_params(parameter_in = Query)]
    struct Wanted {
        #[param(minimum = 1, maximum = 10)]
        rows: Option<u16>,
        #[param(max_length = 3)]
        word: Option<String>,
        id: Option<uuid::Uuid>,
    }

    fn faults(query: &str) -> Vec<String> {
        let mut faults = Vec::new();
        let parsed = parse::<Wanted>(query, &mut faults).unwrap();
        assert_eq!(parsed.is_some(), faults.is_empty(), "{query}");
        faults.into_iter().filter_map(|fault| fault.parameter).collect()
    }

    #[test]
    fn every_fault_is_named_at_once() {
        assert_eq!(faults("rows=0&word=long&id=x&other=1"), ["id", "rows", "word"]);
        assert_eq!(faults("rows=ten"), ["rows"]);
        assert_eq!(faults("rows="), ["rows"]);
    }

    #[test]
    fn a_misspelt_name_is_told_with_the_right_one() {
        let known = BTreeSet::from(["hall_id".to_owned(), "limit".to_owned()]);
        assert_eq!(unknown_names("limit=1&hall_id=x", &known), []);
        let faults = unknown_names("hallId=1&sort=x&hallId=2", &known);
        let faults: Vec<_> =
            faults.iter().map(|fault| (fault.parameter.as_deref().unwrap_or_default(), &*fault.detail)).collect();
        let meant = "there is no such parameter; did you mean `hall_id`?";
        assert_eq!(faults, [("hallId", meant), ("sort", "there is no such parameter")]);
    }

    #[test]
    fn what_is_given_is_read() {
        let mut faults = Vec::new();
        let wanted: Wanted = parse("word=a%20b&rows=10", &mut faults).unwrap().unwrap();
        assert_eq!((wanted.rows, wanted.word.as_deref(), wanted.id), (Some(10), Some("a b"), None));
    }
}
