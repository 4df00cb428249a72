//! Reading JSON text: a member that stands twice is refused, and every text is brought into one form before the rules
//! are applied.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use shared_contracts::problem::{Code, FieldError};
use shared_contracts::text;

use crate::http::error::{Error, Result};

/// 2^53: below it, a float holds every whole number exactly.
const WHOLE_FLOATS_BELOW: f64 = 9_007_199_254_740_992.0;
/// Some editors and spreadsheets begin a file with it. RFC 8259 lets a reader skip it.
const BYTE_ORDER_MARK: &[u8] = "\u{FEFF}".as_bytes();

/// Reads a client's JSON text.
///
/// # Errors
/// `400`: it is not JSON, or an object in it has a member twice. Readers would disagree on which of the two counts.
pub(crate) fn read(body: &[u8]) -> Result<Value> {
    let body = without_mark(body);
    serde_json::from_slice(body).map(|Unambiguous(value)| value).map_err(|error| {
        let fault = if error.is_data() { "can't be used" } else { "is not JSON" };
        Error::refused(Code::MalformedJson, format!("The body {fault}: {error}."))
    })
}

/// Reads a JSON text of a payment provider, whose form is not ours to judge. Of a member that stands twice the last
/// counts.
///
/// # Errors
/// `400`: it is not JSON.
pub(crate) fn read_foreign(body: &[u8]) -> Result<Value> {
    serde_json::from_slice(without_mark(body))
        .map_err(|error| Error::refused(Code::MalformedJson, format!("The body is not JSON: {error}.")))
}

fn without_mark(body: &[u8]) -> &[u8] {
    body.strip_prefix(BYTE_ORDER_MARK).unwrap_or(body)
}

/// A JSON value in which no object has a member twice.
struct Unambiguous(Value);

impl<'de> Deserialize<'de> for Unambiguous {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_any(UnambiguousVisitor)
    }
}

struct UnambiguousVisitor;

impl<'de> Visitor<'de> for UnambiguousVisitor {
    type Value = Unambiguous;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> std::result::Result<Unambiguous, E> {
        Ok(Unambiguous(value.into()))
    }

    fn visit_i64<E>(self, number: i64) -> std::result::Result<Unambiguous, E> {
        Ok(Unambiguous(number.into()))
    }

    fn visit_u64<E>(self, number: u64) -> std::result::Result<Unambiguous, E> {
        Ok(Unambiguous(number.into()))
    }

    fn visit_f64<E>(self, number: f64) -> std::result::Result<Unambiguous, E> {
        Ok(Unambiguous(number.into()))
    }

    fn visit_str<E>(self, text: &str) -> std::result::Result<Unambiguous, E> {
        Ok(Unambiguous(text.into()))
    }

    fn visit_string<E>(self, text: String) -> std::result::Result<Unambiguous, E> {
        Ok(Unambiguous(text.into()))
    }

    fn visit_unit<E>(self) -> std::result::Result<Unambiguous, E> {
        Ok(Unambiguous(Value::Null))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> std::result::Result<Unambiguous, A::Error> {
        let mut values = Vec::new();
        while let Some(Unambiguous(value)) = items.next_element()? {
            values.push(value);
        }
        Ok(Unambiguous(values.into()))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> std::result::Result<Unambiguous, A::Error> {
        let mut object = Map::new();
        while let Some(name) = members.next_key::<String>()? {
            let Unambiguous(value) = members.next_value()?;
            if object.contains_key(&name) {
                return Err(A::Error::custom(format_args!("the member {name:?} stands twice")));
            }
            object.insert(name, value);
        }
        Ok(Unambiguous(object.into()))
    }
}

/// Trims every text, brings it into Unicode's form NFC, and turns whole numbers into integers: `2.0` is an integer in
/// JSON Schema, but not in serde. Reports NUL characters, which PostgreSQL can't store.
pub(crate) fn clean(value: &mut Value) -> Vec<FieldError> {
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
            let one_form = text::normalized(text);
            if matches!(one_form, Cow::Owned(_)) || one_form.len() < text.len() {
                *text = one_form.into_owned();
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

/// A member's name as a part of a JSON pointer (RFC 6901).
pub(crate) fn escaped(name: &str) -> String {
    name.replace('~', "~0").replace('/', "~1")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refusal(body: &str) -> String {
        match read(body.as_bytes()) {
            Err(Error::Refused(problem)) => {
                assert_eq!(problem.code, Code::MalformedJson);
                problem.detail
            }
            other => panic!("expected a refusal, got {other:?}"),
        }
    }

    #[test]
    fn a_member_that_stands_twice_is_refused_at_every_depth() {
        for body in [r#"{"a":1,"a":1}"#, r#"[{"b":{"a":null,"a":2}}]"#, r#"{"a":1,"\u0061":2}"#] {
            assert!(refusal(body).contains("the member \"a\" stands twice"), "{body}: {}", refusal(body));
        }
        assert_eq!(read(br#"{"a":{"a":1},"b":{"a":2}}"#).unwrap(), json!({ "a": { "a": 1 }, "b": { "a": 2 } }));
        assert_eq!(read_foreign(br#"{"a":1,"a":2}"#).unwrap(), json!({ "a": 2 }));
    }

    #[test]
    fn every_kind_of_value_is_read_as_it_is() {
        let text = r#"[null,true,-1,18446744073709551615,1.5,"a\nb",[],{}]"#;
        assert_eq!(read(text.as_bytes()).unwrap(), serde_json::from_str::<Value>(text).unwrap());
    }

    #[test]
    fn a_byte_order_mark_is_skipped_once() {
        assert_eq!(read("\u{FEFF}{}".as_bytes()).unwrap(), json!({}));
        assert!(refusal("\u{FEFF}\u{FEFF}{}").contains("is not JSON"));
    }

    #[test]
    fn texts_are_compared_in_one_form() {
        let mut value = json!([" Cafe\u{301} ", "plain", 2.0]);
        assert_eq!(clean(&mut value), []);
        assert_eq!(value, json!(["Caf\u{e9}", "plain", 2]));
    }
}
