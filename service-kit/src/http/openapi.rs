//! The OpenAPI document's common parts, and the page that shows it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use axum::extract::Path;
use axum::http::header;
use axum::response::{Html, IntoResponse, Redirect};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Map, Value};
use shared_contracts::problem::{CONTENT_TYPE, Code, Problem};
use utoipa::openapi::example::ExampleBuilder;
use utoipa::openapi::path::{Operation, PathItem};
use utoipa::openapi::schema::ArrayItems;
use utoipa::openapi::security::{
    ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme,
};
use utoipa::openapi::{ContentBuilder, OpenApi, Ref, RefOr, Response, ResponseBuilder, Schema};
use utoipa::{Modify, OpenApi as _, PartialSchema, ToSchema};
use utoipa_swagger_ui::{Config, Url};

use crate::admit::bulkheads;
use crate::auth::AuthSettings;
use crate::http::error::Error;

/// The security schemes: the user by header, the user by token, another service of ours. An operation names in
/// `#[utoipa::path(security(...))]` the schemes that it accepts, with the roles that it needs. `()` means that in some
/// mode it accepts callers without any. [`describe_security`] adds the consequences to its description and its answers.
const USER: &str = "user_id";
const BEARER: &str = "bearer";
const INTERNAL: &str = "internal_key";
/// A response for at most this many codes is named after them. A longer name would not be read.
const CODES_IN_NAME_MAX: usize = 3;

/// The problem codes of any call that takes a JSON body.
pub const BODY: &[Code] =
    &[Code::MalformedJson, Code::BodyTooLarge, Code::UnsupportedMediaType, Code::ValidationFailed];
/// The problem codes of any edit.
pub const EDIT: &[Code] = &[
    Code::MalformedJson,
    Code::PreconditionFailed,
    Code::BodyTooLarge,
    Code::UnsupportedMediaType,
    Code::ValidationFailed,
];
/// The problem codes of every call.
const ALWAYS: &[Code] = &[
    Code::RequestTimeout,
    Code::RateLimited,
    Code::HeadersTooLarge,
    Code::InternalError,
    Code::DatabaseUnavailable,
    Code::DeadlineExceeded,
    Code::Overloaded,
];

/// Declares a type that stands for a set of problems in `#[utoipa::path(responses(...))]`.
#[macro_export]
macro_rules! problems {
    ($name:ident: $($codes:expr),+ $(,)?) => {
        pub(crate) struct $name;

        impl utoipa::IntoResponses for $name {
            fn responses() -> std::collections::BTreeMap<String, utoipa::openapi::RefOr<utoipa::openapi::Response>> {
                $crate::http::openapi::responses_for(&[$($codes),+])
            }
        }
    };
}

/// Declares the body of an edit: the members of a new resource, none of them required, with an example.
#[macro_export]
macro_rules! patch_body {
    ($(#[$doc:meta])* $name:ident: $new:ty, $($example:tt)+) => {
        $(#[$doc])*
        pub(crate) struct $name;

        impl utoipa::PartialSchema for $name {
            fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
                $crate::http::openapi::patch_schema::<$new>(serde_json::json!($($example)+))
            }
        }

        impl utoipa::ToSchema for $name {
            fn schemas(schemas: &mut Vec<(String, utoipa::openapi::RefOr<utoipa::openapi::Schema>)>) {
                <$new as utoipa::ToSchema>::schemas(schemas);
            }
        }
    };
}

/// The schema of an edit: the members of `T`, with which the resource is created, and none of them required.
#[must_use]
pub fn patch_schema<T: PartialSchema>(example: serde_json::Value) -> RefOr<Schema> {
    match T::schema() {
        RefOr::T(Schema::Object(mut object)) => {
            object.required.clear();
            object.description =
                Some("What to change. A member that is left out stays as it is; `null` empties it.".into());
            object.example = Some(example);
            RefOr::T(Schema::Object(object))
        }
        other => other,
    }
}

/// The responses for these codes and those of every call: one for each status, with an example for each code.
#[must_use]
pub fn responses_for(groups: &[&[Code]]) -> BTreeMap<String, RefOr<Response>> {
    let mut by_status: BTreeMap<u16, Vec<Code>> = BTreeMap::new();
    for code in groups.iter().copied().chain([ALWAYS]).flatten() {
        let codes = by_status.entry(code.status()).or_default();
        if !codes.contains(code) {
            codes.push(*code);
        }
    }
    by_status.into_iter().map(|(status, codes)| (status.to_string(), RefOr::T(response_for(&codes)))).collect()
}

fn response_for(codes: &[Code]) -> Response {
    let description = codes.iter().map(|code| format!("`{code}`: {}", code.title())).collect::<Vec<_>>().join("; ");
    let examples = codes.iter().map(|code| {
        let example = serde_json::to_value(Problem::new(*code, code.title())).unwrap_or_default();
        (code.to_string(), RefOr::T(ExampleBuilder::new().value(Some(example)).build()))
    });
    let content =
        ContentBuilder::new().schema(Some(Ref::from_schema_name(Problem::name()))).examples_from_iter(examples).build();
    ResponseBuilder::new().description(description).content(CONTENT_TYPE, content).build()
}

/// The components that every service's document needs.
#[derive(utoipa::OpenApi)]
#[openapi(components(schemas(Problem)), modifiers(&SecuritySchemes))]
struct Common;

struct SecuritySchemes;

impl Modify for SecuritySchemes {
    fn modify(&self, document: &mut OpenApi) {
        let header =
            |name: &str, text: &str| SecurityScheme::ApiKey(ApiKey::Header(ApiKeyValue::with_description(name, text)));
        let token = HttpBuilder::new()
            .scheme(HttpAuthScheme::Bearer)
            .bearer_format("JWT")
            .description(Some("An access token of your login (`AUTH_MODE=jwt`)"))
            .build();
        if let Some(components) = document.components.as_mut() {
            let user = header("X-User-ID", "The acting user's id: any UUID, for local trials (`AUTH_MODE=header`)");
            components.add_security_scheme(USER, user);
            components.add_security_scheme(BEARER, SecurityScheme::Http(token));
            let internal = header("X-Internal-Api-Key", "The key of our services, where `INTERNAL_API_KEY` is set");
            components.add_security_scheme(INTERNAL, internal);
        }
    }
}

/// Completes a service's document with the common components.
#[must_use]
pub fn complete(document: OpenApi) -> OpenApi {
    document.merge_from(Common::openapi())
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    [&mut item.get, &mut item.post, &mut item.put, &mut item.patch, &mut item.delete].into_iter().flatten()
}

/// The schemes that this requirement names, each with the roles that it needs. The library has no accessor for them, so
/// this function reads the serialized form.
fn named_schemes(requirement: &SecurityRequirement) -> BTreeMap<String, Vec<String>> {
    serde_json::to_value(requirement).and_then(serde_json::from_value).unwrap_or_default()
}

/// Adds to each operation the consequences of its security. These are the answers to callers that are unknown or lack
/// the role, and a sentence on the roles.
pub fn describe_security(document: &mut OpenApi) {
    for operation in document.paths.paths.values_mut().flat_map(operations) {
        let schemes: Vec<_> = operation.security.iter().flatten().flat_map(named_schemes).collect();
        if schemes.is_empty() {
            continue;
        }
        let mut codes = vec![Code::Unauthenticated];
        if let Some((_, roles)) = schemes.iter().find(|(_, roles)| !roles.is_empty()) {
            codes.push(Code::Forbidden);
            let roles: Vec<String> = roles.iter().map(|role| format!("`{role}`")).collect();
            let needs = format!("With `AUTH_MODE=jwt` this needs the role {}.", roles.join(" or "));
            let description = operation.description.take().into_iter().chain([needs]).collect::<Vec<_>>();
            operation.description = Some(description.join("\n\n"));
        }
        for code in codes {
            let responses = &mut operation.responses.responses;
            responses.entry(code.status().to_string()).or_insert_with(|| RefOr::T(response_for(&[code])));
        }
    }
}

/// Keeps only the security alternatives that this process accepts, so that a reader knows what to send.
pub fn narrow_security(document: &mut OpenApi, auth: &AuthSettings) {
    let internal = auth.internal_keys.are_set();
    let taken = |scheme: &str| match scheme {
        USER => auth.is_by_header(),
        BEARER => !auth.is_by_header(),
        _ => internal,
    };
    for operation in document.paths.paths.values_mut().flat_map(operations) {
        let Some(alternatives) = operation.security.as_mut() else { continue };
        alternatives.retain(|requirement| named_schemes(requirement).keys().all(|scheme| taken(scheme)));
        // The empty alternative is for modes in which the other schemes are not accepted.
        alternatives.retain(|requirement| !named_schemes(requirement).is_empty());
        if alternatives.is_empty() {
            operation.security = None;
        }
    }
    if let Some(components) = document.components.as_mut() {
        components.security_schemes.retain(|scheme, _| taken(scheme));
    }
}

/// Moves the errors of all operations to `components/responses`, where each is defined once, and refers to them.
/// Written out at each operation, they were seven tenths of a document, and Swagger UI took twice as long to open an
/// operation.
///
/// A response is named after its codes. With more than [`CODES_IN_NAME_MAX`], it is named after the operation and the
/// status.
pub fn share_errors(document: &mut OpenApi) {
    let mut shared: BTreeMap<String, Response> = BTreeMap::new();
    for operation in document.paths.paths.values_mut().flat_map(operations) {
        let id = operation.operation_id.clone().unwrap_or_default();
        for (status, response) in &mut operation.responses.responses {
            let RefOr::T(error) = &*response else { continue };
            let Some(RefOr::T(content)) = error.content.get(CONTENT_TYPE) else { continue };
            let codes: Vec<&str> = content.examples.keys().map(String::as_str).collect();
            let name = match codes.as_slice() {
                few if (1..=CODES_IN_NAME_MAX).contains(&few.len()) => {
                    few.iter().map(|code| pascal_case(code)).collect::<Vec<_>>().join("Or")
                }
                _ => format!("{}{status}", pascal_case(&id)),
            };
            if shared.get(&name).is_none_or(|known| known == error) {
                shared.insert(name.clone(), error.clone());
                *response = RefOr::Ref(Ref::from_response_name(name));
            }
        }
    }
    if let Some(components) = document.components.as_mut() {
        components.responses.extend(shared.into_iter().map(|(name, error)| (name, RefOr::T(error))));
    }
}

/// `seat_not_found` becomes `SeatNotFound`.
fn pascal_case(name: &str) -> String {
    let capital = |word: &str| word[..1].to_uppercase() + &word[1..];
    name.split('_').filter(|word| !word.is_empty()).map(capital).collect()
}

/// Makes the items of a page refer to the schema of the resource. A generic type describes its items once more, and a
/// generated client would have two types for one thing.
pub fn refer_to_items(document: &mut OpenApi) {
    let Some(components) = document.components.as_mut() else { return };
    let known: Vec<String> = components.schemas.keys().cloned().collect();
    for (name, schema) in &mut components.schemas {
        if let (Some(item), RefOr::T(Schema::Object(page))) = (name.strip_prefix("Page_"), schema)
            && known.iter().any(|known| known == item)
            && let Some(RefOr::T(Schema::Array(items))) = page.properties.get_mut("items")
        {
            items.items = ArrayItems::RefOrSchema(Box::new(Ref::from_schema_name(item).into()));
        }
    }
}

/// Describes the paths that begin with `path` a second time, under the name `alias`.
pub fn describe_alias(document: &mut OpenApi, path: &str, alias: &str) {
    let known: Vec<_> = document.paths.paths.iter().map(|(known, item)| (known.clone(), item.clone())).collect();
    for (known, mut item) in known {
        let Some(rest) = known.strip_prefix(path) else { continue };
        for operation in operations(&mut item) {
            operation.operation_id = operation.operation_id.take().map(|id| format!("{id}_by_other_name"));
            operation.description = Some(format!("The same as `{known}`."));
        }
        document.paths.paths.insert(format!("{alias}{rest}"), item);
    }
}

/// Removes the examples of query parameters. Swagger UI fills them into its form, and a list filtered by an example's
/// id is empty. The form of `document` is JSON, because the library's type hides them.
fn empty_filters(document: &mut Value) {
    let items = document["paths"].as_object_mut().into_iter().flat_map(Map::values_mut);
    let operations = items.filter_map(Value::as_object_mut).flat_map(Map::values_mut);
    let parameters = operations.filter_map(|operation| operation.get_mut("parameters")?.as_array_mut()).flatten();
    for parameter in parameters.filter(|parameter| parameter["in"] == "query") {
        for place in ["", "/schema"] {
            if let Some(shown) = parameter.pointer_mut(place).and_then(Value::as_object_mut) {
                shown.retain(|name, _| name != "example" && name != "examples");
            }
        }
    }
}

/// `document` without the calls from service to service, for people who use the interface.
fn for_everyone(document: &Value) -> Value {
    let mut public = document.clone();
    let mut used = BTreeSet::new();
    if let Some(paths) = public["paths"].as_object_mut() {
        paths.retain(|path, _| !path.starts_with(bulkheads::INTERNAL_PATHS));
        let operations = paths.values().filter_map(Value::as_object).flat_map(Map::values);
        used.extend(operations.filter_map(|operation| operation["tags"].as_array()).flatten().map(ToString::to_string));
    }
    if let Some(tags) = public["tags"].as_array_mut() {
        tags.retain(|tag| used.contains(&tag["name"].to_string()));
    }
    let mut referred = BTreeSet::new();
    find_references(&public["paths"], &public, &mut referred);
    for kind in ["schemas", "responses"] {
        if let Some(components) = public["components"][kind].as_object_mut() {
            components.retain(|name, _| referred.contains(&format!("/components/{kind}/{name}")));
        }
    }
    public
}

/// Collects the places in `document` that `part` refers to, directly or through another one.
fn find_references(part: &Value, document: &Value, found: &mut BTreeSet<String>) {
    let reference = part.get("$ref").and_then(Value::as_str).and_then(|reference| reference.strip_prefix('#'));
    if let Some(place) = reference.filter(|place| found.insert((*place).to_owned())) {
        find_references(document.pointer(place).unwrap_or(&Value::Null), document, found);
    }
    match part {
        Value::Object(members) => members.values().for_each(|member| find_references(member, document, found)),
        Value::Array(items) => items.iter().for_each(|item| find_references(item, document, found)),
        _ => {}
    }
}

/// Serves Swagger UI at `/docs/`, with its files inside the binary. `/openapi.json` is the whole document, and
/// `/openapi/public.json` the one without internal calls, which the page shows first. `/` redirects to the page.
pub fn pages(document: &OpenApi) -> Router {
    let page = include_str!("docs/page.html").replace("TITLE", &format!("{} - API", document.info.title));
    let whole = serde_json::to_value(document).unwrap_or_default();
    let mut public = for_everyone(&whole);
    empty_filters(&mut public);
    let mut urls = vec![Url::with_primary("For everyone", "/openapi/public.json", true)];
    if public["paths"].as_object().map(Map::len) < whole["paths"].as_object().map(Map::len) {
        urls.push(Url::new("With the calls between services", "/openapi.json"));
    }
    let config = Config::new(urls)
        .persist_authorization(true)
        .try_it_out_enabled(true)
        .display_request_duration(true)
        .filter(true);
    let config = Arc::new(config);
    Router::new()
        .route("/", get(async || Redirect::temporary("/docs/")))
        .route("/openapi.json", get(async move || Json(whole)))
        .route("/openapi/public.json", get(async move || Json(public)))
        .route("/docs", get(async || Redirect::temporary("/docs/")))
        .route("/docs/", get(async move || Html(page)))
        .route("/docs/page.css", get(async || ([(header::CONTENT_TYPE, "text/css")], include_str!("docs/page.css"))))
        .route("/docs/{*file}", get(async move |Path(file): Path<String>| file_of_swagger_ui(&file, config)))
}

fn file_of_swagger_ui(path: &str, config: Arc<Config<'static>>) -> Result<impl IntoResponse + use<>, Error> {
    let file = utoipa_swagger_ui::serve(path, config).map_err(|error| Error::Internal(anyhow::anyhow!("{error}")))?;
    let file = file.ok_or_else(|| Error::refused(Code::NotFound, "The page has no such file."))?;
    Ok(([(header::CONTENT_TYPE, file.content_type)], file.bytes.into_owned()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_public_document_has_nothing_of_the_internal_calls() {
        let refer =
            |schema: &str| json!({ "schema": { "items": { "$ref": format!("#/components/schemas/{schema}") } } });
        let document = json!({
            "paths": {
                "/api/v1/seats": { "get": { "tags": ["Seats"], "body": refer("Seat") } },
                "/api/internal/holds": { "get": { "tags": ["Internal"], "body": refer("Hold") } },
            },
            "tags": [{ "name": "Seats" }, { "name": "Internal" }],
            "components": { "schemas": { "Seat": refer("Label"), "Label": refer("Label"), "Hold": {} }, "responses": { "Gone": {} } },
        });
        let public = for_everyone(&document);
        let names = |part: &Value| part.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&public["paths"]), ["/api/v1/seats"]);
        assert_eq!(names(&public["components"]["schemas"]), ["Label", "Seat"]);
        assert_eq!((&public["components"]["responses"], &public["tags"]), (&json!({}), &json!([{ "name": "Seats" }])));
    }

    #[test]
    fn filters_begin_empty_and_paths_keep_their_examples() {
        let parameter =
            |place: &str| json!({ "in": place, "example": "x", "schema": { "type": "string", "examples": ["x"] } });
        let mut document =
            json!({ "paths": { "/": { "get": { "parameters": [parameter("query"), parameter("path")] } } } });
        empty_filters(&mut document);
        let shown = &document["paths"]["/"]["get"]["parameters"];
        assert_eq!(shown[0], json!({ "in": "query", "schema": { "type": "string" } }));
        assert_eq!(shown[1], parameter("path"));
    }
}
