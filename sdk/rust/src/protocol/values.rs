//! How the value of a field is read: `null` is the same as no field, and an integer may be written as `200`, `200.0` or `2e2`.

use serde::de::{Deserialize, Deserializer, Error, Visitor};
use std::fmt;
use std::marker::PhantomData;

/// 2^64: no integer of a message is as large, whatever its sign.
const BEYOND: f64 = 18_446_744_073_709_551_616.0;

/// The integer that a float stands for, if it stands for one that may fit 64 bits.
pub(crate) fn whole(number: f64) -> Option<i128> {
    #[allow(clippy::cast_possible_truncation, reason = "it is whole, and far within the bounds of the type")]
    let whole = |number: f64| number as i128;
    (number.fract() == 0.0 && number.abs() < BEYOND).then(|| whole(number))
}

/// Reads an integer for `#[serde(deserialize_with)]`. Plain digits stay exact; a number with a fraction or an exponent has to be whole.
///
/// # Errors
/// When the value is not a number, is not whole, or does not fit `T`.
pub fn integer<'de, T: TryFrom<i128>, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
    // Asks for a float: for a `flatten`, serde buffers values and refuses a buffered float where an integer is asked for. Plain digits
    // still reach the visitor as integers.
    deserializer.deserialize_f64(Integer(PhantomData))
}

/// The same, or no field.
pub(crate) fn optional_integer<'de, T: TryFrom<i128>, D: Deserializer<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    struct Whole<T>(T);
    impl<'de, T: TryFrom<i128>> Deserialize<'de> for Whole<T> {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            integer(deserializer).map(Self)
        }
    }
    Ok(Option::<Whole<T>>::deserialize(deserializer)?.map(|Whole(number)| number))
}

/// A value of which `null` is the default.
pub(crate) fn or_default<'de, T: Default + Deserialize<'de>, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

struct Integer<T>(PhantomData<T>);

impl<T: TryFrom<i128>> Integer<T> {
    fn fit<E: Error>(number: i128) -> Result<T, E> {
        T::try_from(number).map_err(|_| E::custom("out of range"))
    }
}

impl<T: TryFrom<i128>> Visitor<'_> for Integer<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an integer")
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<T, E> {
        Self::fit(number.into())
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<T, E> {
        Self::fit(number.into())
    }

    fn visit_f64<E: Error>(self, number: f64) -> Result<T, E> {
        whole(number).map_or_else(|| Err(E::custom("not an integer")), Self::fit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One field of each kind.
    #[derive(Debug, Default, PartialEq, serde::Deserialize)]
    struct Fields {
        #[serde(default, deserialize_with = "integer")]
        count: u64,
        #[serde(default, deserialize_with = "integer")]
        signed: i64,
        #[serde(default, deserialize_with = "optional_integer")]
        maybe: Option<u16>,
        #[serde(default, deserialize_with = "or_default")]
        flag: bool,
    }

    /// The same as serde buffers it.
    #[derive(Debug, PartialEq, serde::Deserialize)]
    struct Buffered {
        #[serde(flatten)]
        fields: Fields,
    }

    #[test]
    fn an_integer_may_be_written_in_any_way_and_plain_digits_are_exact() {
        for (json, count, signed, maybe) in [
            ("{}", 0, 0, None),
            (r#"{"count": 200.0, "signed": -2e2, "maybe": 2e2}"#, 200, -200, Some(200)),
            (r#"{"count": 18446744073709551615, "signed": -9223372036854775808}"#, u64::MAX, i64::MIN, None),
            (r#"{"count": 9007199254740993, "signed": 9223372036854775807, "maybe": null}"#, (1 << 53) + 1, i64::MAX, None),
            (r#"{"count": -0, "signed": -0.0, "maybe": 65535}"#, 0, 0, Some(65535)),
        ] {
            let fields = Fields { count, signed, maybe, flag: false };
            assert_eq!(serde_json::from_str::<Fields>(json).unwrap(), fields, "{json}");
            assert_eq!(serde_json::from_str::<Buffered>(json).unwrap().fields, fields, "{json}");
            let value: serde_json::Value = serde_json::from_str(json).unwrap();
            assert_eq!(serde_json::from_value::<Fields>(value).unwrap(), fields, "{json}");
        }
        for json in [
            r#"{"count": 200.5}"#,
            r#"{"count": "200"}"#,
            r#"{"count": -1}"#,
            r#"{"count": -1.0}"#,
            r#"{"count": 18446744073709551616}"#,
            r#"{"count": 1e300}"#,
            r#"{"count": null}"#,
            r#"{"count": true}"#,
            r#"{"signed": 9223372036854775808}"#,
            r#"{"maybe": 65536}"#,
            r#"{"maybe": 1.5}"#,
            r#"{"flag": 1}"#,
        ] {
            assert!(serde_json::from_str::<Fields>(json).is_err(), "{json}");
            assert!(serde_json::from_str::<Buffered>(json).is_err(), "{json}");
        }
    }

    #[test]
    fn null_is_the_default() {
        assert!(serde_json::from_str::<Fields>(r#"{"flag": true}"#).unwrap().flag);
        assert_eq!(serde_json::from_str::<Fields>(r#"{"flag": null}"#).unwrap(), Fields::default());
    }
}
