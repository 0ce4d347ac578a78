//! Text of others, made fit to be shown to people: no I/O.
//!
//! What a plugin prints or says of itself may hold anything. Shown as it is, it could move a terminal's cursor, turn the
//! direction of what stands beside it, forge a line, or hide a part of itself. So all of that is shown by its number.

use std::borrow::Cow;
use std::fmt::Write;

/// Whether a character does something else than being seen: controls, line ends, and what Unicode has for invisible format
/// (its category Cf, as far as that is invisible), for private use, and for no use at all.
///
/// The joiners U+200C and U+200D stay: emoji and several scripts are written with them, and they move nothing.
fn is_hidden(c: char) -> bool {
    let ranges = matches!(c,
        '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}' | '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
        | '\u{e000}'..='\u{f8ff}' | '\u{fdd0}'..='\u{fdef}' | '\u{feff}' | '\u{fff0}'..='\u{fffb}'
        | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e0fff}' | '\u{f0000}'..);
    c.is_control() || ranges || u32::from(c) & 0xfffe == 0xfffe
}

/// Appends bytes as a line's text: what is hidden as `\xNN` or `\u{N}`, what is not UTF-8 as `\xNN`. Tabs stay.
pub(crate) fn escape(out: &mut String, bytes: &[u8]) {
    // Writing to a string does not fail.
    let hex = |out: &mut String, number: u32| {
        write!(out, "\\x{number:02x}").ok();
    };
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\t' => out.push(c),
                c if c.is_ascii_control() => hex(out, c.into()),
                c if is_hidden(c) => {
                    write!(out, "\\u{{{:x}}}", u32::from(c)).ok();
                }
                c => out.push(c),
            }
        }
        chunk.invalid().iter().for_each(|byte| hex(out, (*byte).into()));
    }
}

/// Text as part of a line. What was escaped stays as it is.
pub(crate) fn shown(text: &str) -> Cow<'_, str> {
    if !text.contains(|c| c != '\t' && is_hidden(c)) {
        return text.into();
    }
    let mut out = String::with_capacity(text.len() + 16);
    escape(&mut out, text.as_bytes());
    out.into()
}

/// Text as HTML, in an element or an attribute.
pub(crate) fn html(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// JSON with what is hidden in its strings by JSON's own escapes: the same value, and as safe to look at.
pub(crate) fn shown_json(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        // Line ends stand between the values alone.
        if c != '\n' && is_hidden(c) {
            c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| {
                write!(out, "\\u{unit:04x}").ok();
            });
        } else {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_hidden_is_shown_by_its_number_and_all_else_stays() {
        for (text, expected) in [
            ("plain ☕ naïve\ttab", "plain ☕ naïve\ttab"),
            ("👩\u{200d}👧 می\u{200c}خواهم ❤\u{fe0f} e\u{301}", "👩\u{200d}👧 می\u{200c}خواهم ❤\u{fe0f} e\u{301}"),
            (r"C:\x \u{1}", r"C:\x \u{1}"),
            ("\x1b[31m\r\n\0\x07\x7f", r"\x1b[31m\x0d\x0a\x00\x07\x7f"),
            ("\u{80}\u{9b}\u{ad}", r"\u{80}\u{9b}\u{ad}"),
            ("\u{202a}\u{202e}\u{2066}\u{2069}\u{200f}\u{61c}", r"\u{202a}\u{202e}\u{2066}\u{2069}\u{200f}\u{61c}"),
            ("\u{2028}\u{2029}\u{200b}\u{2060}\u{feff}", r"\u{2028}\u{2029}\u{200b}\u{2060}\u{feff}"),
            ("\u{fffe}\u{fdd0}\u{1ffff}\u{10ffff}\u{e000}\u{f0000}", r"\u{fffe}\u{fdd0}\u{1ffff}\u{10ffff}\u{e000}\u{f0000}"),
            ("\u{e0041}\u{fff9}\u{1d173}", r"\u{e0041}\u{fff9}\u{1d173}"),
        ] {
            assert_eq!(shown(text), expected);
            assert_eq!(shown(&shown(text)), expected, "once more changes nothing");
            let json = shown_json(&format!("[\n{}\n]", serde_json::Value::from(text)));
            assert!(!json.contains(|c| c != '\n' && is_hidden(c)), "{json}");
            assert_eq!(serde_json::from_str::<[String; 1]>(&json).unwrap(), [text]);
        }
        let mut out = String::new();
        escape(&mut out, b"a\xff\xc3b\xed\xa0\x80");
        assert_eq!(out, r"a\xff\xc3b\xed\xa0\x80");
    }
}
