//! What is wrong with JSON that is not of its form, by the path of the field and not in a parser's words.
//!
//! Messages are read by serde straight into their structs. Only when that fails is the JSON read again here, as a value, to find the
//! sentence that its author needs.

use super::values::whole;
use serde_json::{Map, Number, Value};
use std::borrow::Cow;

/// Characters of a text, or bytes of what is no text, that are quoted.
const EXCERPT: usize = 40;

/// The form of a field.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Form {
    /// An integer within these bounds, however it is written: `200`, `200.0` and `2e2` are the same.
    Integer(i64, u64),
    /// `true` or `false`.
    Bool,
    /// A string.
    Text,
    /// A string for which a check holds, and what it is called.
    TextOf(fn(&str) -> bool, &'static str),
    /// One of these strings.
    Word(&'static [&'static str]),
    /// An array of strings.
    Texts,
    /// An array of `[name, value]` pairs of strings.
    Pairs,
}

/// A field of a JSON object.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Field {
    name: &'static str,
    form: Form,
    required: bool,
}

impl Field {
    /// One that must be there.
    pub(crate) const fn required(name: &'static str, form: Form) -> Self {
        Self { name, form, required: true }
    }

    /// One that may be left out.
    pub(crate) const fn optional(name: &'static str, form: Form) -> Self {
        Self { name, form, required: false }
    }
}

/// The first of the `fields` that is not of its form in an object, which is called `of`. `null` is the same as no field.
pub(crate) fn fault(of: &str, fields: &[Field], object: &Map<String, Value>) -> Option<String> {
    fields.iter().find_map(|field| {
        let path = format!("{of}.{}", field.name);
        match object.get(field.name) {
            None if field.required => Some(format!("{path} is missing: it must be {}", field.form.described())),
            Some(Value::Null) if field.required => {
                Some(format!("{path} is null, which is the same as missing: it must be {}", field.form.described()))
            }
            None | Some(Value::Null) => None,
            Some(value) => field.form.fault(&path, value),
        }
    })
}

/// Why text is not JSON at all. `what` it was meant to be is named.
pub(crate) fn not_json(what: &str, text: &str, error: &serde_json::Error) -> String {
    let begins = excerpt(text);
    if error.is_eof() {
        return format!("{what} ends inside its JSON after {} bytes: it begins with {begins}", text.len());
    }
    let before: usize = text.split_inclusive('\n').take(error.line().saturating_sub(1)).map(str::len).sum();
    let at = (before + error.column()).min(text.len());
    format!("{what} is not JSON at byte {at} of {}: it begins with {begins}", text.len())
}

/// A parser's word on JSON in which each field by itself is of its form: a field is there twice, or a string is no text.
pub(crate) fn other_fault(of: &str, error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.strip_prefix("duplicate field `").and_then(|rest| rest.split('`').next()) {
        Some(name) => format!("{of}.{name} is given twice"),
        None => format!("{of} is not of the form that the protocol gives it"),
    }
}

/// The beginning of a text, quoted for people.
pub(crate) fn excerpt(text: &str) -> String {
    let cut: String = text.chars().take(EXCERPT).collect();
    let more = if cut.len() < text.len() { "…" } else { "" };
    format!("\"{}{more}\"", cut.escape_debug())
}

/// The beginning of what may be no text, quoted for people.
pub(crate) fn excerpt_of_bytes(bytes: &[u8]) -> String {
    let cut = &bytes[..bytes.len().min(EXCERPT)];
    let more = if cut.len() < bytes.len() { "…" } else { "" };
    format!("\"{}{more}\"", cut.escape_ascii())
}

/// A value as it is named to people: short, whatever it is.
pub(crate) fn shown(value: &Value) -> Cow<'static, str> {
    match value {
        Value::Null => "null".into(),
        Value::Bool(bool) => bool.to_string().into(),
        Value::Number(number) => number.to_string().chars().take(EXCERPT).collect::<String>().into(),
        Value::String(text) if text.chars().nth(EXCERPT).is_some() => {
            format!("the string {} of {} bytes", excerpt(text), text.len()).into()
        }
        Value::String(text) => format!("the string {}", excerpt(text)).into(),
        Value::Array(array) => format!("an array of {}", array.len()).into(),
        Value::Object(_) => "an object".into(),
    }
}

impl Form {
    fn described(self) -> String {
        match self {
            Self::Integer(least, most) => format!("an integer from {least} to {most}"),
            Self::Bool => "true or false".into(),
            Self::Text => "a string".into(),
            Self::TextOf(_, called) => called.into(),
            Self::Texts => "an array of strings".into(),
            Self::Word(words) => format!("one of {}", words.join(", ")),
            Self::Pairs => "an array of [name, value] pairs".into(),
        }
    }

    /// What is wrong with a value at a path, if anything.
    fn fault(self, path: &str, value: &Value) -> Option<String> {
        let holds = match (self, value) {
            (Self::Integer(least, most), Value::Number(number)) => {
                integer(number).is_some_and(|number| (i128::from(least)..=i128::from(most)).contains(&number))
            }
            (Self::Bool, Value::Bool(_)) | (Self::Text, Value::String(_)) => true,
            (Self::TextOf(holds, _), Value::String(text)) => holds(text),
            (Self::Texts, Value::Array(texts)) => {
                let path = |at| format!("{path}[{at}]");
                return texts.iter().enumerate().find_map(|(at, text)| Self::Text.fault(&path(at), text));
            }
            (Self::Word(words), Value::String(text)) => words.contains(&text.as_str()),
            (Self::Pairs, Value::Array(pairs)) => {
                return pairs.iter().enumerate().find_map(|(at, pair)| pair_fault(&format!("{path}[{at}]"), pair));
            }
            _ => false,
        };
        (!holds).then(|| format!("{path} must be {}, got {}", self.described(), shown(value)))
    }
}

/// The integer that a number of JSON stands for, if it does.
pub(crate) fn integer(number: &Number) -> Option<i128> {
    let plain = number.as_u64().map(i128::from).or_else(|| number.as_i64().map(i128::from));
    plain.or_else(|| number.as_f64().and_then(whole))
}

/// What is wrong with a pair of strings, if anything.
fn pair_fault(path: &str, pair: &Value) -> Option<String> {
    match pair.as_array().map(Vec::as_slice) {
        Some([name, value]) => {
            [(0, name), (1, value)].into_iter().find_map(|(at, text)| Form::Text.fault(&format!("{path}[{at}]"), text))
        }
        _ => Some(format!("{path} must be a [name, value] pair, got {}", shown(pair))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const FIELDS: [Field; 7] = [
        Field::required("number", Form::Integer(-5, 10)),
        Field::optional("flag", Form::Bool),
        Field::optional("text", Form::Text),
        Field::optional("word", Form::Word(&["get", "set"])),
        Field::optional("pairs", Form::Pairs),
        Field::optional("short", Form::TextOf(|text| text.len() < 50, "a text of at most 49 bytes")),
        Field::optional("texts", Form::Texts),
    ];

    #[test]
    fn the_first_field_that_is_not_of_its_form_is_named() {
        let long = "x".repeat(100);
        for (object, expected) in [
            (json!({}), "m.number is missing: it must be an integer from -5 to 10"),
            (json!({"number": null}), "m.number is null, which is the same as missing: it must be an integer from -5 to 10"),
            (json!({"number": "1"}), "m.number must be an integer from -5 to 10, got the string \"1\""),
            (json!({"number": 1.5}), "m.number must be an integer from -5 to 10, got 1.5"),
            (json!({"number": 11.0}), "m.number must be an integer from -5 to 10, got 11.0"),
            (json!({"number": 11}), "m.number must be an integer from -5 to 10, got 11"),
            (json!({"number": -6}), "m.number must be an integer from -5 to 10, got -6"),
            (json!({"number": 1, "flag": 1}), "m.flag must be true or false, got 1"),
            (json!({"number": 1, "texts": "a"}), "m.texts must be an array of strings, got the string \"a\""),
            (json!({"number": 1, "texts": ["a", null]}), "m.texts[1] must be a string, got null"),
            (
                json!({"number": 1, "short": "x".repeat(50)}),
                &format!("m.short must be a text of at most 49 bytes, got the string \"{}…\" of 50 bytes", "x".repeat(EXCERPT)),
            ),
            (json!({"number": 1, "text": ["a"]}), "m.text must be a string, got an array of 1"),
            (json!({"number": 1, "word": "put"}), "m.word must be one of get, set, got the string \"put\""),
            (json!({"number": 1, "pairs": {}}), "m.pairs must be an array of [name, value] pairs, got an object"),
            (json!({"number": 1, "pairs": [["a", "b"], ["c"]]}), "m.pairs[1] must be a [name, value] pair, got an array of 1"),
            (json!({"number": 1, "pairs": [["a", 2]]}), "m.pairs[0][1] must be a string, got 2"),
            (
                json!({"number": long}),
                &format!("m.number must be an integer from -5 to 10, got the string \"{}…\" of 100 bytes", "x".repeat(EXCERPT)),
            ),
        ] {
            assert_eq!(fault("m", &FIELDS, object.as_object().unwrap()).as_deref(), Some(expected), "{object}");
        }
        for good in [
            json!({"number": -5}),
            json!({"number": 10, "flag": true, "text": null, "word": "set", "pairs": [], "more": 1, "short": "", "texts": ["a"]}),
            json!({"number": 1e1, "flag": null, "word": null, "pairs": null, "texts": null}),
            json!({"number": -0.0}),
        ] {
            assert_eq!(fault("m", &FIELDS, good.as_object().unwrap()), None, "{good}");
        }
    }

    #[test]
    fn what_is_not_json_is_quoted_from_its_beginning() {
        for (text, expected) in [
            ("{nope}", "the head is not JSON at byte 2 of 6: it begins with \"{nope}\""),
            ("{\"a\":\n1,\n x}", "the head is not JSON at byte 11 of 12: it begins with \"{\\\"a\\\":\\n1,\\n x}\""),
            ("{\"a\":1", "the head ends inside its JSON after 6 bytes: it begins with \"{\\\"a\\\":1\""),
            ("", "the head ends inside its JSON after 0 bytes: it begins with \"\""),
        ] {
            let error = serde_json::from_str::<Value>(text).unwrap_err();
            assert_eq!(not_json("the head", text, &error), expected);
        }
        assert_eq!(excerpt_of_bytes(b"{\xff"), "\"{\\xff\"");
    }
}
