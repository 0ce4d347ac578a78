//! `plugrack license set`, `show` and `remove`: the operator's commands for licences.

use super::clock::{self, Clock};
use super::console::{self, Console, failure, fields, items, reason, token, word};
use crate::cli::api_client::segment;
use anyhow::Result;
use clap::Subcommand;
use serde_json::Value;

/// Code for a licence that its plugin refused, as in the API.
const REFUSED: &str = "license_refused";

#[derive(Debug, Subcommand)]
pub(super) enum License {
    /// Set a plugin's licence, and start the plugin with it
    Set {
        /// The plugin's id
        id: String,
        /// The token; - reads it from standard input
        token: String,
        /// Skip the host's checks, and keep the licence even if the plugin refuses it
        #[arg(long)]
        force: bool,
    },
    /// Show the status and contents of plugins' licences
    Show {
        /// Ids of plugins
        #[arg(required = true, value_name = "ID")]
        ids: Vec<String>,
    },
    /// Show the time by which licences are judged
    Clock {
        #[command(subcommand)]
        action: Option<Clock>,
    },
    /// Remove a plugin's licence
    Remove {
        /// The plugin's id
        id: String,
    },
}

impl License {
    pub(super) fn run(self, console: &Console) -> Result<()> {
        let path = |id: &str| format!("/plugins/{}/license", segment(id));
        let api = || console.api();
        match self {
            Self::Set { id, token: given, force } => {
                let query = if force { "?force=true" } else { "" };
                let answer = api()?.call("PUT", &format!("{}{query}", path(&id)), token(given)?.as_bytes())?;
                report_set(console, &id, &answer)
            }
            Self::Show { ids } => {
                let api = api()?;
                console.each(&ids, |id| Ok(api.call("GET", &path(id), b"")?), |_, _| Ok(()), details)
            }
            Self::Remove { id } => console.print(&api()?.call("DELETE", &path(&id), b"")?, |answer| status(&id, answer)),
            Self::Clock { action } => clock::run(console, action.as_ref()),
        }
    }
}

/// Prints the outcome of `license set`, which is a failure if the plugin does not run with the licence.
fn report_set(console: &Console, id: &str, answer: &Value) -> Result<()> {
    let state = word(&answer["state"]);
    let is_refused = !answer["license"]["code"].is_null() && !is_pending(answer);
    if is_pending(answer) || !is_refused && ["ready", "stopped"].contains(&&*state) {
        return console.print(answer, |answer| status(id, answer));
    }
    let rejected = if is_refused {
        format!("{id} rejected the licence, which stays set")
    } else {
        format!("the licence of {id} is set, and the plugin is {state}")
    };
    if console.json {
        // The answer includes the reason.
        console.print(answer, |_| String::new())?;
        return Err(failure(REFUSED, rejected));
    }
    let reason = reason(answer);
    let separator = if reason.is_empty() { "" } else { ": " };
    Err(failure(REFUSED, format!("{rejected}{separator}{reason}; see: plugrack show {id}")))
}

/// Whether the plugin waits until its licence becomes valid.
fn is_pending(answer: &Value) -> bool {
    answer["license"]["state"] == "pending"
}

fn status(id: &str, answer: &Value) -> String {
    match word(&answer["license"]["state"]) {
        _ if is_pending(answer) => {
            format!(
                "{id}: the licence is set and becomes valid at {}; {id} then starts by itself\n",
                word(&answer["claims"]["nbf"])
            )
        }
        state if state == "unchecked" => format!("{id}: not checked, because the plugin is {}\n", console::state(answer)),
        // The reason of the state includes the code and its message.
        _ if !answer["license"]["code"].is_null() => format!("{id}: {}\n", console::state(answer)),
        _ => format!("{id}: {}; {}\n", console::license(&answer["license"]), console::state(answer)),
    }
}

fn details(id: &str, answer: &Value) -> String {
    let claims = &answer["claims"];
    let grace = claims["grace_days"].as_u64().filter(|days| *days > 0).map(|days| format!("{days} days"));
    let instances: Vec<_> = items(&claims["inst"]).map(word).collect();
    let previous = match word(&answer["previous"]) {
        previous if previous.is_empty() => String::new(),
        previous => format!("{previous}, kept until {id} accepts the new one"),
    };
    let text = |value: &Value| word(value).into_owned();
    let lines = [
        ("token", text(&answer["token"])),
        ("previous", previous),
        ("license id", text(&claims["jti"])),
        ("customer", text(&claims["sub"])),
        ("instances", instances.join(", ")),
        ("expires", text(&claims["exp"])),
        ("grace", grace.unwrap_or_default()),
    ];
    status(id, answer) + &fields("", &lines)
}
