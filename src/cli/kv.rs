//! `plugrack kv`: a plugin's keys and values.

use super::console::{Console, Given, NOT_FOUND, failure, items, print_bytes, word};
use crate::cli::api_client::{ApiClient, segment};
use crate::plugins::job::MAX_KV_TIME;
use crate::util::escape;
use anyhow::Result;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use clap::Subcommand;
use serde_json::{Value, json};
use std::io::{self, IsTerminal};
use std::time::Duration;

/// Keys in one page of a list: the API's maximum.
const PAGE: u32 = 1000;

/// How much longer the command waits for the host than the host waits for a plugin, so that the host's answer arrives.
const MARGIN: Duration = Duration::from_secs(30);

#[derive(Debug, Subcommand)]
pub(super) enum Kv {
    /// Print the exact value of a key
    Get {
        /// Read the store itself, without the plugin
        #[arg(long)]
        direct: bool,
        /// The plugin's id
        id: String,
        key: String,
    },
    /// Write a value
    Set {
        /// Write to the store itself, without the plugin
        #[arg(long)]
        direct: bool,
        /// The plugin's id
        id: String,
        key: String,
        #[command(flatten)]
        value: Given,
    },
    /// Delete a key
    Delete {
        /// Delete from the store itself, without the plugin
        #[arg(long)]
        direct: bool,
        /// The plugin's id
        id: String,
        key: String,
    },
    /// List the keys in the store; works whether the plugin runs or not
    List {
        /// The plugin's id
        id: String,
        /// Only list keys with this prefix
        #[arg(long, default_value = "")]
        prefix: String,
    },
}

impl Kv {
    pub(super) fn run(self, console: &Console) -> Result<()> {
        let api = console.api()?;
        let call = |method: &str, id: &str, key: &str, direct: bool, body: &[u8]| {
            let path = format!("/plugins/{}/kv/{}?direct={direct}", segment(id), segment(key));
            api.call_within(MAX_KV_TIME + MARGIN, method, &path, body)
        };
        match self {
            Self::Get { direct, id, key } => print_value(console, &call("GET", &id, &key, direct, b"")?),
            Self::Set { direct, id, key, value } => {
                let answer = call("PUT", &id, &key, direct, &value.bytes()?)?;
                console.print(&answer, |_| String::new())
            }
            Self::Delete { direct, id, key } => {
                let answer = call("DELETE", &id, &key, direct, b"")?;
                if answer["found"] == false {
                    return Err(failure(NOT_FOUND, format!("the plugin {id} has no key {key:?}")));
                }
                console.print(&answer, |_| String::new())
            }
            Self::List { id, prefix } => list(console, &api, &id, &prefix),
        }
    }
}

/// Prints a value: raw bytes to a file or a pipe, escaped text to a terminal.
fn print_value(console: &Console, answer: &Value) -> Result<()> {
    if console.json {
        return console.print(answer, |_| String::new());
    }
    let mut value = match answer["value_base64"].as_str() {
        Some(base64) => BASE64.decode(base64)?,
        None => answer["value"].as_str().unwrap_or_default().into(),
    };
    if io::stdout().is_terminal() {
        let lines = value.split(|byte| *byte == b'\n').map(|line| {
            let mut shown = String::new();
            escape::escape(&mut shown, line);
            shown
        });
        value = lines.collect::<Vec<_>>().join("\n").into_bytes();
        value.push(b'\n');
    }
    print_bytes(&value)
}

fn list(console: &Console, api: &ApiClient, id: &str, prefix: &str) -> Result<()> {
    let mut keys = Vec::new();
    let mut after = None;
    loop {
        let after_part = after.map(|after: String| format!("&after={}", segment(&after))).unwrap_or_default();
        let path = format!("/plugins/{}/kv?limit={PAGE}&prefix={}{after_part}", segment(id), segment(prefix));
        let page = api.call("GET", &path, b"")?;
        keys.extend(items(&page["keys"]).cloned());
        after = page["next"].as_str().map(str::to_owned);
        if after.is_none() {
            break;
        }
    }
    console.print(&json!({ "keys": keys }), |answer| {
        let line = |entry: &Value| {
            let expires = word(&entry["expires_at"]);
            let until = if expires.is_empty() { String::new() } else { format!(", expires {expires}") };
            format!("{}  {} bytes, revision {}{until}\n", word(&entry["key"]), entry["size"], entry["rev"])
        };
        items(&answer["keys"]).map(line).collect()
    })
}
