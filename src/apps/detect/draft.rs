//! A proposed manifest, as TOML for people and as JSON for programs.

use crate::util::escape;
use serde_json::{Map, Value, json};
use std::fmt::Write;

/// Rightmost column of the comments, in characters, so that most lines fit a terminal.
const COLUMN: usize = 40;

/// A key of a manifest.
struct Entry {
    key: &'static str,
    value: Value,
    /// What a guess is based on; empty if the value is none.
    why: String,
}

/// A proposed manifest.
pub(crate) struct Draft {
    /// The kind of application, for people: `Flask`.
    pub(crate) application: &'static str,
    /// What shows that the directory holds one.
    pub(crate) evidence: String,
    /// What the operator should know or do, beyond the manifest.
    pub(crate) hints: Vec<String>,
    identity: Vec<Entry>,
    plugin: Vec<Entry>,
    run: Vec<Entry>,
}

impl Draft {
    /// A manifest of a kind, with nothing else in it.
    pub(super) fn new(application: &'static str, kind: &'static str, evidence: impl Into<String>) -> Self {
        let run = vec![Entry { key: "kind", value: kind.into(), why: String::new() }];
        Self { application, evidence: evidence.into(), hints: Vec::new(), identity: Vec::new(), plugin: Vec::new(), run }
    }

    /// Sets a key that says which plugin it is. Those come first.
    pub(super) fn identify(&mut self, key: &'static str, value: impl Into<Value>, why: impl Into<String>) {
        self.identity.push(Entry { key, value: value.into(), why: why.into() });
    }

    /// Sets another key of the plugin.
    pub(super) fn plugin(mut self, key: &'static str, value: impl Into<Value>, why: impl Into<String>) -> Self {
        self.plugin.push(Entry { key, value: value.into(), why: why.into() });
        self
    }

    /// Sets a key of the table `run`.
    pub(super) fn run(mut self, key: &'static str, value: impl Into<Value>, why: impl Into<String>) -> Self {
        self.run.push(Entry { key, value: value.into(), why: why.into() });
        self
    }

    /// Adds a hint.
    pub(super) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    /// The manifest as TOML. Each guess has a comment.
    pub(crate) fn toml(&self) -> String {
        let mut out = format!("# Proposed by plugrack detect for {}: {}\n", self.application, escape::shown(&self.evidence));
        put_entries(&mut out, self.identity.iter().chain(&self.plugin));
        out.push_str("\n[run]\n");
        put_entries(&mut out, self.run.iter());
        out
    }

    /// The manifest as JSON, with the TOML in it.
    pub(crate) fn json(&self) -> Value {
        let pair = |entry: &Entry| (entry.key.to_owned(), entry.value.clone());
        let run: Map<_, _> = self.run.iter().map(pair).collect();
        let mut manifest: Map<_, _> = self.identity.iter().chain(&self.plugin).map(pair).collect();
        manifest.insert("run".to_owned(), run.into());
        json!({
            "application": self.application,
            "evidence": self.evidence,
            "manifest": manifest,
            "toml": self.toml(),
            "hints": self.hints,
        })
    }
}

fn put_entries<'a>(out: &mut String, entries: impl Iterator<Item = &'a Entry> + Clone) {
    let lines: Vec<String> = entries.clone().map(|entry| format!("{} = {}", entry.key, value(&entry.value))).collect();
    // Comments stand in one column, but a line that is much longer than the others does not push theirs away.
    let width = lines.iter().map(|line| line.chars().count()).filter(|width| *width <= COLUMN).max().unwrap_or(0);
    for (line, entry) in lines.iter().zip(entries) {
        // Writing to memory does not fail.
        match entry.why.as_str() {
            "" => writeln!(out, "{line}"),
            why => writeln!(out, "{line:<width$}  # {}", escape::shown(why)),
        }
        .ok();
    }
}

/// A value as TOML.
fn value(json: &Value) -> String {
    match json {
        Value::String(text) => string(text),
        Value::Array(items) => format!("[{}]", items.iter().map(value).collect::<Vec<_>>().join(", ")),
        Value::Object(table) => {
            let pairs: Vec<String> = table.iter().map(|(key, item)| format!("{key} = {}", value(item))).collect();
            format!("{{ {} }}", pairs.join(", "))
        }
        // Numbers and booleans are written alike in both.
        other => other.to_string(),
    }
}

/// A basic string of TOML. What a terminal would not show is escaped.
fn string(text: &str) -> String {
    let mut out = String::from('"');
    for c in text.chars() {
        let is_hidden = c.is_control() || *escape::shown(c.encode_utf8(&mut [0; 4])) != *c.encode_utf8(&mut [0; 4]);
        // Writing to memory does not fail.
        match (c, u32::from(c)) {
            ('"' | '\\', _) => write!(out, "\\{c}"),
            (_, number @ ..=0xffff) if is_hidden => write!(out, "\\u{number:04X}"),
            (_, number) if is_hidden => write!(out, "\\U{number:08X}"),
            _ => write!(out, "{c}"),
        }
        .ok();
    }
    out.push('"');
    out
}
