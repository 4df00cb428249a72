//! The OpenAPI document's common parts, and the page that shows it.

use std::collections::BTreeMap;

use axum::Router;
use axum::response::Redirect;
use axum::routing::get;
use shared_contracts::problem::{CONTENT_TYPE, Code, Problem};
use utoipa::openapi::example::ExampleBuilder;
use utoipa::openapi::schema::ArrayItems;
use utoipa::openapi::security::{ApiKey, ApiKeyValue, SecurityScheme};
use utoipa::openapi::{ContentBuilder, OpenApi, Ref, RefOr, Response, ResponseBuilder, Schema};
use utoipa::{Modify, OpenApi as _, PartialSchema, ToSchema};
use utoipa_swagger_ui::{Config, SwaggerUi};

/// What any call that takes a JSON body may answer.
pub const BODY: &[Code] =
    &[Code::MalformedJson, Code::BodyTooLarge, Code::UnsupportedMediaType, Code::ValidationFailed];
/// What any edit may answer.
pub const EDIT: &[Code] = &[
    Code::MalformedJson,
    Code::PreconditionFailed,
    Code::BodyTooLarge,
    Code::UnsupportedMediaType,
    Code::ValidationFailed,
];
/// What any call may answer.
const ALWAYS: &[Code] = &[Code::InternalError, Code::DatabaseUnavailable, Code::DeadlineExceeded, Code::Overloaded];

/// Declares a type that stands for a set of problems in `#[utoipa::path(responses(...))]`.
#[macro_export]
macro_rules! refusals {
    ($name:ident: $($codes:expr),+ $(,)?) => {
        pub(crate) struct $name;

        impl utoipa::IntoResponses for $name {
            fn responses() -> std::collections::BTreeMap<String, utoipa::openapi::RefOr<utoipa::openapi::Response>> {
                $crate::openapi::responses_for(&[$($codes),+])
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
                $crate::openapi::patch_schema::<$new>(serde_json::json!($($example)+))
            }
        }

        impl utoipa::ToSchema for $name {
            fn schemas(schemas: &mut Vec<(String, utoipa::openapi::RefOr<utoipa::openapi::Schema>)>) {
                <$new as utoipa::ToSchema>::schemas(schemas);
            }
        }
    };
}

/// The schema of an edit of what `T` makes.
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

/// The responses for these codes and those of every call, one a status, with an example a code.
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
#[openapi(components(schemas(Problem)), modifiers(&UserHeader))]
struct Common;

struct UserHeader;

impl Modify for UserHeader {
    fn modify(&self, document: &mut OpenApi) {
        let header = ApiKeyValue::with_description("X-User-ID", "The acting user's id: any UUID, for local trials");
        if let Some(components) = document.components.as_mut() {
            components.add_security_scheme("user_id", SecurityScheme::ApiKey(ApiKey::Header(header)));
        }
    }
}

/// Completes a service's document with the common components.
#[must_use]
pub fn complete(document: OpenApi) -> OpenApi {
    document.merge_from(Common::openapi())
}

/// Lets a page's items be the resource that is described already: generics describe theirs once more, and a generated client
/// would have two types for one thing.
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
        let operations = [&mut item.get, &mut item.post, &mut item.patch, &mut item.delete];
        for operation in operations.into_iter().flatten() {
            operation.operation_id = operation.operation_id.take().map(|id| format!("{id}_by_other_name"));
            operation.description = Some(format!("The same as `{known}`."));
        }
        document.paths.paths.insert(format!("{alias}{rest}"), item);
    }
}

/// `/docs` (Swagger UI, its files inside the binary) and `/openapi.json`; `/` leads to the first.
pub fn pages(document: OpenApi) -> Router {
    let config = Config::default()
        .persist_authorization(true)
        .try_it_out_enabled(true)
        .display_request_duration(true)
        .filter(true);
    let swagger = SwaggerUi::new("/docs").url("/openapi.json", document).config(config);
    Router::from(swagger).route("/", get(async || Redirect::temporary("/docs/")))
}
