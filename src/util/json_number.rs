//! Numbers in JSON that not every parser keeps: integers that a 64-bit float cannot count to, and more digits than it holds. Pure.

/// Largest integer that all JSON parsers keep: 2^53 - 1, JavaScript's `MAX_SAFE_INTEGER`.
const MAX_SAFE_INTEGER: u64 = (1 << 53) - 1;

/// Most characters of a number that a message shows.
const MAX_SHOWN: usize = 40;

/// A sentence about the first number in a JSON text that not every JSON parser keeps exactly, if there is one. The text need not be valid.
pub(crate) fn inexact(json: &str) -> Option<String> {
    let number = numbers(json).find(|number| !is_exact(number))?;
    // A number is ASCII, so that it can be cut anywhere.
    let shown = if number.len() > MAX_SHOWN { format!("{}…", &number[..MAX_SHOWN]) } else { number.to_owned() };
    Some(format!("not every JSON parser keeps the number {shown}: leave out --json to keep it as text, or send a JSON string"))
}

/// The numbers outside of strings.
fn numbers(json: &str) -> impl Iterator<Item = &str> {
    let mut rest = json;
    std::iter::from_fn(move || {
        loop {
            rest = &rest[rest.find(|c: char| c == '"' || c == '-' || c.is_ascii_digit())?..];
            if rest.starts_with('"') {
                rest = &rest[string_length(rest)..];
                continue;
            }
            let is_part = |c: char| c.is_ascii_digit() || matches!(c, '+' | '-' | '.' | 'e' | 'E');
            let number;
            (number, rest) = rest.split_at(rest.find(|c| !is_part(c)).unwrap_or(rest.len()));
            return Some(number);
        }
    })
}

/// The length in bytes of the string that a text begins with, quotes included.
fn string_length(text: &str) -> usize {
    let mut escaped = false;
    let end = text.bytes().skip(1).position(|byte| {
        let ends = byte == b'"' && !escaped;
        escaped = byte == b'\\' && !escaped;
        ends
    });
    end.map_or(text.len(), |end| end + 2)
}

/// Whether every parser reads the same number. What is no number is the JSON parser's to refuse.
fn is_exact(number: &str) -> bool {
    let digits = number.trim_start_matches('-');
    if !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return digits.parse::<u64>().is_ok_and(|integer| integer <= MAX_SAFE_INTEGER);
    }
    let Ok(float) = number.parse::<f64>() else { return true };
    float.is_finite() && decimal(number) == decimal(&format!("{float:e}"))
}

/// A decimal number in its one normal form: its digits without zeros at either end, and the power of ten of the last of them.
fn decimal(number: &str) -> Option<(String, i64)> {
    let (mantissa, exponent) =
        number.trim_start_matches('-').split_once(['e', 'E']).unwrap_or((number.trim_start_matches('-'), "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = format!("{whole}{fraction}");
    let digits = digits.trim_start_matches('0');
    let significant = digits.trim_end_matches('0');
    if significant.is_empty() {
        return Some((String::new(), 0));
    }
    let zeros = i64::try_from(digits.len() - significant.len()).ok()?;
    let exponent = exponent.parse::<i64>().ok()?.checked_sub(i64::try_from(fraction.len()).ok()?)?;
    Some((significant.to_owned(), exponent.checked_add(zeros)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_a_parser_may_change_is_found_wherever_it_is() {
        for kept in [
            "0",
            "-0",
            "42",
            "9007199254740991",
            "-9007199254740991",
            "0.1",
            "1.10",
            "-1.5e3",
            "1e22",
            "1E-7",
            "0.000",
            "1e308",
            r#""823475887319941131""#,
            r#"{"1e400": "\"1e400\\", "a": [1, 2.5]}"#,
            "[true, null]",
            "5e-324",
        ] {
            assert_eq!(inexact(kept), None, "{kept}");
        }
        for (json, number) in [
            ("9007199254740992", "9007199254740992"),
            ("-9007199254740992", "-9007199254740992"),
            ("12345678901234567890123", "12345678901234567890123"),
            ("1e400", "1e400"),
            ("1e-400", "1e-400"),
            ("0.12345678901234567890", "0.12345678901234567890"),
            ("9007199254740993.0", "9007199254740993.0"),
            (r#"{"a\\": [1, {"b": 823475887319941131}], "c": 1e999}"#, "823475887319941131"),
        ] {
            let sentence = inexact(json).unwrap_or_else(|| panic!("{json} is taken"));
            assert!(
                sentence.starts_with(&format!("not every JSON parser keeps the number {number}: leave out --json")),
                "{sentence}"
            );
        }
        let long = inexact(&"7".repeat(16_000)).unwrap();
        assert!(long.contains(&format!("{}…:", "7".repeat(MAX_SHOWN))), "{long}");
    }

    #[test]
    fn a_text_that_is_no_json_is_left_to_its_parser() {
        for text in ["1.2.3", "--", "1e", "\"1e400", "-", "e5"] {
            assert_eq!(inexact(text), None, "{text}");
        }
    }
}
