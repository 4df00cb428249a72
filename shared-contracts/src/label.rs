//! Seat labels: `row_number` and `seat_number` are names on chairs, such as `12b`, not quantities.

use std::fmt;

use serde::Serialize;
use serde::de::{Deserialize, Deserializer, Error, Visitor};
use utoipa::openapi::schema::{ObjectBuilder, SchemaFormat, SchemaType, Type};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use crate::text;

/// The length limit of a label in characters. A check constraint of the `seats` table has the same limit.
pub const LABEL_CHARS_MAX: usize = 32;

/// A row's or seat's label: 1 to 32 characters (`"1"`, `"A"`, `"12b"`) in Unicode's form NFC, none of them invisible.
///
/// Answers contain it as a JSON string. Requests may also send a JSON integer, which means its decimal text.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, sqlx::Type)]
#[serde(transparent)]
#[sqlx(transparent)]
pub struct Label(String);

impl Label {
    /// Trims `text` and converts it. Returns `None` if the rest is empty, longer than 32 characters, or has a character
    /// that nobody sees.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let text = text::normalized(text);
        let chars = text.chars().count();
        let fits = (1..=LABEL_CHARS_MAX).contains(&chars) && text::fault_in_label(&text).is_none();
        fits.then(|| Self(text.into_owned()))
    }

    /// The label as text, without surrounding spaces.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The label of row or seat `n` of a grid, counted from 1.
    #[must_use]
    pub fn of_number(n: u32) -> Self {
        Self(n.to_string())
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<'de> Deserialize<'de> for Label {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct LabelVisitor;
        impl Visitor<'_> for LabelVisitor {
            type Value = Label;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a label of 1 to {LABEL_CHARS_MAX} characters, or an integer")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Label, E> {
                Label::parse(text).ok_or_else(|| E::invalid_value(serde::de::Unexpected::Str(text), &self))
            }

            fn visit_u64<E: Error>(self, n: u64) -> Result<Label, E> {
                self.visit_str(&n.to_string())
            }

            fn visit_i64<E: Error>(self, n: i64) -> Result<Label, E> {
                self.visit_str(&n.to_string())
            }
        }
        deserializer.deserialize_any(LabelVisitor)
    }
}

impl PartialSchema for Label {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .schema_type(SchemaType::from_iter([Type::String, Type::Integer]))
            .description(Some(
                "The label of a row or seat. Answers contain a string; requests may also send an integer",
            ))
            .min_length(Some(1))
            .max_length(Some(LABEL_CHARS_MAX))
            .format(Some(SchemaFormat::Custom("label".to_owned())))
            .minimum(Some(0))
            .maximum(Some(9_999_999_999_999_999_u64))
            .examples(["12"])
            .into()
    }
}

impl ToSchema for Label {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_json_integer_means_its_decimal_text() {
        let label: Label = serde_json::from_str("12").unwrap();
        assert_eq!(label.as_str(), "12");
        assert_eq!(serde_json::to_string(&label).unwrap(), "\"12\"");
    }

    #[test]
    fn labels_are_trimmed_and_bounded() {
        assert_eq!(serde_json::from_str::<Label>("\" 12b \"").unwrap().as_str(), "12b");
        for bad in ["\"\"", "\"   \"", "\"123456789012345678901234567890123\"", "\"1\u{200b}\"", "1.5", "true", "null"]
        {
            assert!(serde_json::from_str::<Label>(bad).is_err(), "{bad} was accepted");
        }
    }
}
