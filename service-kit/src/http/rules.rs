//! The rules for a client's input: the JSON Schema that the OpenAPI document shows, and the faults that a value has by
//! it, in words that name a remedy.

use std::any::TypeId;
use std::collections::HashMap;
use std::sync::{Arc, LazyLock, RwLock};

use anyhow::Context;
use jsonschema::error::ValidationErrorKind;
use jsonschema::{EmailOptions, ValidationError, Validator};
use serde_json::{Map, Value, json};
use shared_contracts::problem::FieldError;
use shared_contracts::text;
use utoipa::ToSchema;

use crate::http::json::escaped;

/// The most faults that one answer lists. A list of 100,000 bad seats would help nobody.
pub(crate) const FAULTS_MAX: usize = 50;
/// The longest piece of a client's input that a fault quotes.
const QUOTE_CHARS_MAX: usize = 160;
/// How alike a wrong name and a known one are at least, from 0 to 1 (Jaro-Winkler), so that the known one is suggested.
const NEAR: f64 = 0.85;

/// The rules of one type.
#[derive(Debug)]
pub(crate) struct Rules {
    schema: Value,
    validator: Validator,
}

impl Rules {
    /// The rules of `T` by its own schema.
    pub(crate) fn of_body<T: ToSchema + 'static>() -> anyhow::Result<Arc<Self>> {
        Self::of::<T>(schema_of::<T>)
    }

    /// The rules of `T`, made of `schema` at first use and kept.
    pub(crate) fn of<T: 'static>(schema: impl FnOnce() -> anyhow::Result<Value>) -> anyhow::Result<Arc<Self>> {
        static KNOWN: LazyLock<RwLock<HashMap<TypeId, Arc<Rules>>>> = LazyLock::new(RwLock::default);
        let poisoned = || anyhow::anyhow!("a thread panicked while it made the rules of a type");
        if let Some(rules) = KNOWN.read().map_err(|_| poisoned())?.get(&TypeId::of::<T>()) {
            return Ok(Arc::clone(rules));
        }
        let schema = schema()?;
        let validator = jsonschema::draft202012::options()
            .should_validate_formats(true)
            // `Box Office <box@example.org>` is a mailbox with a name; no mail program takes it as an address.
            .with_email_options(EmailOptions::default().without_display_text().without_domain_literal())
            .with_format("iana-time-zone", |name| name.parse::<chrono_tz::Tz>().is_ok())
            .with_format("label", |text| text::fault_in_label(text).is_none())
            .with_format("title", |text| text::fault_in_title(text).is_none())
            .with_format("prose", |text| text::fault_in_prose(text).is_none())
            .build(&schema)
            .map_err(|error| anyhow::anyhow!("{error}"))
            .with_context(|| format!("the schema of {} can't be compiled", std::any::type_name::<T>()))?;
        let rules = Arc::new(Self { schema, validator });
        KNOWN.write().map_err(|_| poisoned())?.insert(TypeId::of::<T>(), Arc::clone(&rules));
        Ok(rules)
    }

    /// Whether a body of this type may have the member `name`.
    pub(crate) fn has_member(&self, name: &str) -> bool {
        self.schema["properties"].get(name).is_some()
    }

    /// The fault of a member that this type does not have.
    pub(crate) fn unknown_member(&self, name: &str) -> FieldError {
        unknown(name, String::new(), &self.schema)
    }

    /// Turns an empty text for people into `null` wherever the schema lets `null` stand.
    pub(crate) fn empty_to_null(&self, value: &mut Value) {
        self.empty_to_null_by(&self.schema, value);
    }

    fn empty_to_null_by(&self, schema: &Value, value: &mut Value) {
        let schema = match schema["$ref"].as_str().and_then(|reference| reference.strip_prefix('#')) {
            Some(pointer) => self.schema.pointer(pointer).unwrap_or(&Value::Null),
            None => schema,
        };
        match value {
            Value::Object(members) => {
                for (name, member) in members {
                    let rule = &schema["properties"][name.as_str()];
                    if member == "" && is_optional_text(rule) {
                        *member = Value::Null;
                    } else {
                        self.empty_to_null_by(rule, member);
                    }
                }
            }
            Value::Array(items) => {
                // An optional list is "null or this list".
                let forms = schema["oneOf"].as_array().or_else(|| schema["anyOf"].as_array());
                let list = forms.into_iter().flatten().find(|form| form["items"].is_object()).unwrap_or(schema);
                for item in items {
                    self.empty_to_null_by(&list["items"], item);
                }
            }
            _ => {}
        }
    }

    /// The faults of `value` by these rules; empty if it has none.
    pub(crate) fn faults(&self, value: &Value) -> Vec<FieldError> {
        self.validator.iter_errors(value).take(FAULTS_MAX).flat_map(|error| self.faults_of(&error)).collect()
    }

    fn faults_of(&self, error: &ValidationError<'_>) -> Vec<FieldError> {
        let pointer = error.instance_path().to_string();
        match error.kind() {
            ValidationErrorKind::Required { property } => {
                let name = property.as_str().unwrap_or_default();
                vec![FieldError::at(format!("{pointer}/{}", escaped(name)), "is required")]
            }
            ValidationErrorKind::AdditionalProperties { unexpected } => {
                let path = error.schema_path().to_string();
                let object = path.strip_suffix("/additionalProperties").and_then(|path| self.schema.pointer(path));
                let object = object.unwrap_or(&self.schema);
                unexpected.iter().map(|name| unknown(name, pointer.clone(), object)).collect()
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
                    Some(branch) => branch.iter().flat_map(|error| self.faults_of(error)).collect(),
                    None => vec![FieldError::at(pointer, "matches none of the forms that are allowed here")],
                }
            }
            ValidationErrorKind::Enum { options } => {
                let options: Vec<String> =
                    options.as_array().into_iter().flatten().map(|option| option.to_string()).collect();
                vec![FieldError::at(pointer, format!("{} is none of {}", quoted(error), options.join(", ")))]
            }
            ValidationErrorKind::Format { format } => vec![FieldError::at(pointer, wrong_form(format, error))],
            _ => {
                let said = error.to_string();
                let detail = if said.chars().count() > QUOTE_CHARS_MAX { error.masked().to_string() } else { said };
                vec![FieldError::at(pointer, detail)]
            }
        }
    }
}

/// Whether this is a text for people that may be `null`. An empty id or time is a mistake.
fn is_optional_text(schema: &Value) -> bool {
    let has = |wanted: &str| schema["type"].as_array().is_some_and(|types| types.iter().any(|one| one == wanted));
    let is_prose = schema["format"].as_str().is_none_or(|format| ["label", "title", "prose"].contains(&format));
    has("string") && has("null") && is_prose
}

fn unknown(name: &str, pointer: String, object: &Value) -> FieldError {
    let known = object["properties"].as_object().into_iter().flat_map(Map::keys);
    FieldError::at(format!("{pointer}/{}", escaped(name)), not_known("member", name, known.map(String::as_str)))
}

/// Says that there is no `kind` (member or parameter) of this name, and which one was probably meant.
pub(crate) fn not_known<'a>(kind: &str, name: &str, known: impl Iterator<Item = &'a str>) -> String {
    let likeness = |known: &str| strsim::jaro_winkler(&name.to_lowercase(), known);
    match known.map(|known| (likeness(known), known)).max_by(|a, b| a.0.total_cmp(&b.0)) {
        Some((near, meant)) if near >= NEAR => format!("there is no such {kind}; did you mean `{meant}`?"),
        _ => format!("there is no such {kind}"),
    }
}

fn quoted(error: &ValidationError<'_>) -> String {
    let text = error.instance().to_string();
    if text.chars().count() > QUOTE_CHARS_MAX { "the value".to_owned() } else { text }
}

/// What a text of this format is, and an example.
fn wrong_form(format: &str, error: &ValidationError<'_>) -> String {
    let text = error.instance().as_str().unwrap_or_default().to_owned();
    let right = match format {
        "label" => return text::fault_in_label(&text).unwrap_or_default(),
        "title" => return text::fault_in_title(&text).unwrap_or_default(),
        "prose" => return text::fault_in_prose(&text).unwrap_or_default(),
        "uuid" => "a UUID such as 019ac1c0-0000-7000-8000-000000000001",
        "date-time" => "a time with its offset such as 2030-12-01T19:00:00Z",
        "email" | "idn-email" => "an e-mail address such as box-office@example.com",
        "iana-time-zone" => "a time zone of the IANA list such as Europe/Berlin",
        _ => return format!("{} is not of the format {format}", quoted(error)),
    };
    format!("{} is not {right}", quoted(error))
}

fn schema_of<T: ToSchema>() -> anyhow::Result<Value> {
    let mut components = Vec::new();
    T::schemas(&mut components);
    let components: Map<String, Value> = components
        .into_iter()
        .map(|(name, schema)| Ok((name, serde_json::to_value(schema)?)))
        .collect::<Result<_, serde_json::Error>>()?;
    let mut schema = json!({ "components": { "schemas": components } });
    if let (Value::Object(root), Value::Object(own)) = (&mut schema, serde_json::to_value(T::schema())?) {
        root.extend(own);
    }
    Ok(schema)
}
