//! `plugrack limits`: limits of one plugin that override the host's defaults.

use super::config::hint;
use super::console::{Console, word};
use crate::cli::api_client::segment;
use crate::store::limits::Limit;
use anyhow::Result;
use clap::Subcommand;
use clap::builder::PossibleValuesParser;
use serde_json::Value;

#[derive(Debug, Subcommand)]
pub(super) enum LimitsCommand {
    /// Print the limits that apply to a plugin, or one of them
    Get {
        /// The plugin's id
        id: String,
        /// The limit's name
        #[arg(value_parser = names())]
        name: Option<String>,
    },
    /// Set a limit; it takes effect at the plugin's next start
    Set {
        /// The plugin's id
        id: String,
        /// The limit's name
        #[arg(value_parser = names())]
        name: String,
        /// A number of open files; a start timeout from 1ms to 1h; a request timeout from 1ms to 24h
        #[arg(allow_hyphen_values = true)]
        value: String,
    },
    /// Remove a limit, so that the host's default applies
    Unset {
        /// The plugin's id
        id: String,
        /// The limit's name
        #[arg(value_parser = names())]
        name: String,
    },
}

fn names() -> PossibleValuesParser {
    Limit::ALL.map(Limit::name).into()
}

impl LimitsCommand {
    pub(super) fn run(self, console: &Console) -> Result<()> {
        let api = console.api()?;
        let path = |id: &str| format!("/plugins/{}/limits", segment(id));
        match self {
            Self::Get { id, name: Some(name) } => {
                let answer = api.call("GET", &format!("{}/{name}", path(&id)), b"")?;
                console.print(&answer, |limit| format!("{}\n", row(&id, limit)))
            }
            Self::Get { id, name: None } => {
                let answer = api.call("GET", &path(&id), b"")?;
                console.print(&answer, |answer| {
                    let rows = Limit::ALL.map(|limit| (limit.name(), row(&id, &answer["limits"][limit.name()])));
                    rows.map(|(name, row)| format!("{name:<16} {row}\n")).concat()
                })
            }
            Self::Set { id, name, value } => {
                let answer = api.call("PUT", &format!("{}/{name}", path(&id)), value.as_bytes())?;
                console.print(&answer, |answer| hint(&id, answer))
            }
            Self::Unset { id, name } => {
                let answer = api.call("DELETE", &format!("{}/{name}", path(&id)), b"")?;
                console.print(&answer, |answer| hint(&id, answer))
            }
        }
    }
}

/// A limit's value and its origin.
fn row(id: &str, limit: &Value) -> String {
    let origin = if limit["default"] == true { "the host's default" } else { "set for this plugin" };
    let running = match limit.get("running") {
        Some(running) => format!("; {} until plugrack restart {id}", shown(running)),
        None => String::new(),
    };
    format!("{:<8} {origin}{running}", shown(&limit["value"]))
}

fn shown(value: &Value) -> String {
    match value {
        Value::Null => "no limit".into(),
        Value::String(_) => word(value).into_owned(),
        value => value.to_string(),
    }
}
