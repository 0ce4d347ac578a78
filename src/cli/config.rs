//! `plugrack config`: the settings that a plugin gets when it starts.

use super::console::{Console, Given, NOT_FOUND, failure};
use crate::cli::api_client::segment;
use crate::util::escape;
use anyhow::{Context, Result};
use clap::Subcommand;
use serde::de::IgnoredAny;
use serde_json::Value;

#[derive(Debug, Subcommand)]
pub(super) enum Config {
    /// Print one setting or all of them, as JSON
    Get {
        /// The plugin's id
        id: String,
        key: Option<String>,
        /// Print a string setting as plain text, without quotes
        #[arg(long, requires = "key", conflicts_with = "json")]
        raw: bool,
    },
    /// Change a setting. The value is text, whatever it looks like, or JSON with --json
    Set {
        /// The plugin's id
        id: String,
        key: String,
        #[command(flatten)]
        value: Given,
    },
    /// Remove a setting
    Unset {
        /// The plugin's id
        id: String,
        key: String,
    },
}

impl Config {
    pub(super) fn run(self, console: &Console) -> Result<()> {
        let api = console.api()?;
        let path = |id: &str| format!("/plugins/{}/config", segment(id));
        match self {
            Self::Get { id, key, raw } => {
                let answer = api.call("GET", &path(&id), b"")?;
                let settings = &answer["config"];
                let setting = match &key {
                    None => settings,
                    Some(key) => {
                        settings.get(key).ok_or_else(|| failure(NOT_FOUND, format!("the plugin {id} has no setting {key:?}")))?
                    }
                };
                console.print(setting, |setting| match setting {
                    Value::String(string) if raw => format!("{}\n", escape::shown(string)),
                    Value::Object(_) if key.is_none() => escape::shown_json(&format!("{setting:#}\n")),
                    _ => escape::shown_json(&format!("{setting}\n")),
                })
            }
            Self::Set { id, key, value } => {
                let setting = if console.json {
                    let json = value.bytes()?;
                    // Sent as typed: a parser could round numbers before the host can refuse them.
                    serde_json::from_slice::<IgnoredAny>(&json).context("the value is not JSON (without --json it is text)")?;
                    json
                } else {
                    Value::String(value.text()?).to_string().into_bytes()
                };
                let answer = api.call("PUT", &format!("{}/{}", path(&id), segment(&key)), &setting)?;
                console.print(&answer, |answer| hint(&id, answer))
            }
            Self::Unset { id, key } => {
                let answer = api.call("DELETE", &format!("{}/{}", path(&id), segment(&key)), b"")?;
                console.print(&answer, |answer| hint(&id, answer))
            }
        }
    }
}

/// The command that applies a change, if one is needed.
pub(super) fn hint(id: &str, answer: &Value) -> String {
    match answer["restart_needed"].as_bool() {
        Some(true) => format!("saved; to apply: plugrack restart {id}\n"),
        _ => String::new(),
    }
}
