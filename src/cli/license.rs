//! `plugrack license set`, `show` and `remove`: what an operator does with the licences of plugins.

use super::console::{Console, items, state, token, word};
use crate::client::segment;
use anyhow::{Result, bail};
use clap::Subcommand;
use serde_json::Value;

#[derive(Debug, Subcommand)]
pub(super) enum License {
    /// Give a plugin the licence that its vendor has issued, and start it with that
    Set {
        /// The plugin's id
        id: String,
        /// The licence; - reads it from standard input
        token: String,
        /// Set it whatever the host judges, and keep it if the plugin refuses it
        #[arg(long)]
        force: bool,
    },
    /// Show the status of a plugin's licence, and what the licence says
    Show {
        /// The plugin's id
        id: String,
    },
    /// Remove the licence of a plugin
    Remove {
        /// The plugin's id
        id: String,
    },
}

impl License {
    pub(super) fn run(self, console: &Console) -> Result<()> {
        let api = console.api()?;
        let path = |id: &str| format!("/plugins/{}/license", segment(id));
        match self {
            Self::Set { id, token: given, force } => {
                let query = if force { "?force=true" } else { "" };
                let answer = api.call("PUT", &format!("{}{query}", path(&id)), token(given)?.as_bytes())?;
                report_set(console, &id, &answer)
            }
            Self::Show { id } => console.print(&api.call("GET", &path(&id), b"")?, |answer| details(&id, answer)),
            Self::Remove { id } => console.print(&api.call("DELETE", &path(&id), b"")?, |answer| status(&id, answer)),
        }
    }
}

/// Prints what came of a licence that was set. A plugin that does not run with it is a failure.
fn report_set(console: &Console, id: &str, answer: &Value) -> Result<()> {
    let (license, state, reason) = (word(&answer["license"]), word(&answer["state"]), word(&answer["reason"]));
    if !license.starts_with("refused") && ["ready", "stopped"].contains(&&*state) {
        return console.print(answer, |answer| status(id, answer));
    }
    let problem = format!("the licence of {id} is set, and the plugin is {}", state.replace('_', " "));
    if console.json {
        // The reason is in it.
        console.print(answer, |_| String::new())?;
        bail!("{problem}");
    }
    let separator = if reason.is_empty() { "" } else { ": " };
    bail!("{problem}{separator}{reason}; see: plugrack show {id}")
}

fn status(id: &str, answer: &Value) -> String {
    match word(&answer["license"]) {
        license if license.is_empty() => format!("{id}: not checked, since it is {}\n", state(answer)),
        license => format!("{id}: {license}; {}\n", state(answer)),
    }
}

fn details(id: &str, answer: &Value) -> String {
    let claims = &answer["claims"];
    let grace = claims["grace_days"].as_u64().filter(|days| *days > 0).map(|days| format!("{days} days"));
    let instances: Vec<_> = items(&claims["inst"]).map(word).collect();
    let previous = match word(&answer["previous"]) {
        previous if previous.is_empty() => String::new(),
        previous => format!("{previous}, kept until {id} has accepted this one"),
    };
    let mut out = status(id, answer);
    for (name, value) in [
        ("token", word(&answer["token"])),
        ("previous", previous.into()),
        ("license id", word(&claims["jti"])),
        ("customer", word(&claims["sub"])),
        ("instances", instances.join(", ").into()),
        ("expires", word(&claims["exp"])),
        ("grace", grace.unwrap_or_default().into()),
    ] {
        if !value.is_empty() {
            out.push_str(&format!("{name:<13}{value}\n"));
        }
    }
    out
}
