//! Money and multipliers as exact decimals. The services never compute an amount with binary floats.
//!
//! In JSON both are numbers. Reading takes the shortest text of the number, which equals what the client wrote for
//! up to 15 digits. The limits below stay under that.

use std::fmt;
use std::str::FromStr;

use rust_decimal::{Decimal, RoundingStrategy};
use serde::de::{Deserialize, Deserializer, Error, Visitor};
use serde::{Serialize, Serializer};
use serde_json::value::RawValue;
use utoipa::openapi::schema::{ObjectBuilder, Type};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

/// An amount of money, 0.00 to 9,999,999,999.99, with two decimals. A separate field names its currency.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, sqlx::Type)]
#[sqlx(transparent)]
pub struct Money(Decimal);

impl Money {
    /// The amount 0.00.
    pub const ZERO: Self = Self(Decimal::ZERO);
    /// The largest amount that `numeric(12,2)` holds: 9,999,999,999.99.
    const MAX: Decimal = Decimal::from_parts(0xD4A5_0FFF, 0xE8, 0, false, 2);

    /// Converts `amount`. Returns `None` if it is negative, too large or has more than two decimals.
    #[must_use]
    pub fn new(amount: Decimal) -> Option<Self> {
        let exact = amount.round_dp(2) == amount;
        (exact && !amount.is_sign_negative() && amount <= Self::MAX).then(|| Self(two_decimals(amount)))
    }

    /// The sum of `amounts`, or `None` if it exceeds the largest amount.
    pub fn total(amounts: impl IntoIterator<Item = Self>) -> Option<Self> {
        Self::new(amounts.into_iter().map(|money| money.0).sum())
    }

    /// This price multiplied by a price tier's factor, rounded to cents with halves away from zero.
    /// Returns `None` if the product exceeds the largest amount.
    #[must_use]
    pub fn times(self, multiplier: Multiplier) -> Option<Self> {
        let product = self.0.checked_mul(multiplier.0)?;
        Self::new(product.round_dp_with_strategy(2, RoundingStrategy::MidpointAwayFromZero))
    }
}

fn two_decimals(mut amount: Decimal) -> Decimal {
    amount.rescale(2);
    amount
}

impl fmt::Display for Money {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        two_decimals(self.0).fmt(f)
    }
}

impl Serialize for Money {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        raw_number(self.to_string(), serializer)
    }
}

impl<'de> Deserialize<'de> for Money {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let amount = deserializer.deserialize_any(DecimalVisitor)?;
        Self::new(amount).ok_or_else(|| {
            D::Error::custom(format_args!(
                "{amount} is not an amount between 0.00 and {} with at most two decimals",
                Self::MAX
            ))
        })
    }
}

impl PartialSchema for Money {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .schema_type(Type::Number)
            .description(Some("An amount of money with two decimals"))
            .minimum(Some(0.0))
            .maximum(Some(9_999_999_999.99))
            .multiple_of(Some(0.01))
            .examples([100.00])
            .into()
    }
}

impl ToSchema for Money {}

/// A price tier's factor, above 0 and up to 1,000, with at most four decimals (`1.0`, `2.5`, `0.8`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, sqlx::Type)]
#[sqlx(transparent)]
pub struct Multiplier(Decimal);

impl Multiplier {
    const MAX: Decimal = Decimal::ONE_THOUSAND;

    /// Converts `factor`. Returns `None` if it is out of range or has more than four decimals.
    #[must_use]
    pub fn new(factor: Decimal) -> Option<Self> {
        let exact = factor.round_dp(4) == factor;
        (exact && factor > Decimal::ZERO && factor <= Self::MAX).then_some(Self(factor))
    }
}

impl Serialize for Multiplier {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut factor = self.0.normalize();
        if factor.scale() == 0 {
            factor.rescale(1);
        }
        raw_number(factor.to_string(), serializer)
    }
}

impl<'de> Deserialize<'de> for Multiplier {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let factor = deserializer.deserialize_any(DecimalVisitor)?;
        Self::new(factor).ok_or_else(|| {
            D::Error::custom(format_args!(
                "{factor} is not a multiplier above 0 and up to {} with at most four decimals",
                Self::MAX
            ))
        })
    }
}

impl PartialSchema for Multiplier {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .schema_type(Type::Number)
            .description(Some("A factor by which seat prices are multiplied, with at most four decimals"))
            .minimum(Some(0.0001))
            .maximum(Some(1_000.0))
            .multiple_of(Some(0.0001))
            .examples([1.0])
            .into()
    }
}

impl ToSchema for Multiplier {}

/// An ISO 4217 currency code: three capital letters. The default is USD.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, sqlx::Type)]
#[serde(transparent)]
#[sqlx(transparent)]
pub struct Currency(String);

impl Default for Currency {
    fn default() -> Self {
        Self("USD".into())
    }
}

impl fmt::Display for Currency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<'de> Deserialize<'de> for Currency {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let code = String::deserialize(deserializer)?;
        if code.len() == 3 && code.bytes().all(|b| b.is_ascii_uppercase()) {
            Ok(Self(code))
        } else {
            Err(D::Error::custom("a currency is an ISO 4217 code of three capital letters, like USD"))
        }
    }
}

impl PartialSchema for Currency {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .schema_type(Type::String)
            .description(Some("An ISO 4217 currency code: three capital letters"))
            .pattern(Some("^[A-Z]{3}$"))
            .examples(["USD"])
            .into()
    }
}

impl ToSchema for Currency {}

/// Writes `text` as a JSON number. A float would lose the trailing zero of `100.00`.
fn raw_number<S: Serializer>(text: String, serializer: S) -> Result<S::Ok, S::Error> {
    RawValue::from_string(text).map_err(serde::ser::Error::custom)?.serialize(serializer)
}

struct DecimalVisitor;

impl Visitor<'_> for DecimalVisitor {
    type Value = Decimal;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a decimal number")
    }

    fn visit_u64<E: Error>(self, n: u64) -> Result<Decimal, E> {
        Ok(n.into())
    }

    fn visit_i64<E: Error>(self, n: i64) -> Result<Decimal, E> {
        Ok(n.into())
    }

    fn visit_f64<E: Error>(self, n: f64) -> Result<Decimal, E> {
        self.visit_str(&n.to_string())
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Decimal, E> {
        Decimal::from_str(text).map_err(|_| E::invalid_value(serde::de::Unexpected::Str(text), &self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn money(json: &str) -> Money {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn money_is_written_as_a_number_with_two_decimals() {
        for (read, written) in
            [("100", "100.00"), ("0.1", "0.10"), ("0", "0.00"), ("\"7.5\"", "7.50"), ("9999999999.99", "9999999999.99")]
        {
            assert_eq!(serde_json::to_string(&money(read)).unwrap(), written);
        }
    }

    #[test]
    fn every_cent_up_to_a_thousand_survives_a_round_trip() {
        for cents in 0..100_000_i64 {
            let text = format!("{}.{:02}", cents / 100, cents % 100);
            assert_eq!(serde_json::to_string(&money(&text)).unwrap(), text);
        }
    }

    #[test]
    fn invalid_amounts_are_rejected() {
        for bad in ["-0.01", "0.001", "10000000000", "1e30", "\"x\"", "true", "null"] {
            assert!(serde_json::from_str::<Money>(bad).is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn a_tier_price_rounds_halves_up() {
        let times =
            |price: &str, factor: &str| money(price).times(serde_json::from_str(factor).unwrap()).unwrap().to_string();
        assert_eq!(times("100", "1.5"), "150.00");
        assert_eq!(times("0.05", "0.5"), "0.03");
        assert_eq!(times("33.33", "0.3333"), "11.11");
        assert!(money("9999999999.99").times(serde_json::from_str("2").unwrap()).is_none());
    }

    #[test]
    fn a_sum_is_exact_and_bounded() {
        assert_eq!(Money::total([money("0.10"), money("0.20")]).unwrap().to_string(), "0.30");
        assert_eq!(Money::total([]).unwrap(), Money::ZERO);
        assert!(Money::total([money("9999999999.99"), money("0.01")]).is_none());
    }

    #[test]
    fn a_multiplier_is_written_with_at_least_one_decimal() {
        let written = |json: &str| serde_json::to_string(&serde_json::from_str::<Multiplier>(json).unwrap()).unwrap();
        assert_eq!((written("1"), written("1.0"), written("2.25")), ("1.0".into(), "1.0".into(), "2.25".into()));
        for bad in ["0", "-1", "1000.1", "0.00001"] {
            assert!(serde_json::from_str::<Multiplier>(bad).is_err(), "{bad} was accepted");
        }
    }
}
