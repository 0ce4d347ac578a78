//! `plugrack logs`: a plugin's output.

use super::console::{Console, NOT_FOUND, failure, items, print, reason, word};
use crate::cli::api_client::segment;
use crate::process::log_file;
use crate::util::escape;
use crate::util::pause::pause;
use crate::util::utc;
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::io::{self, Write};
use std::time::Duration;

/// Polling interval of `logs -f`.
const FOLLOW_PAUSE: Duration = Duration::from_millis(200);

/// Prints a log from its file, so that it works without a running host.
pub(super) fn logs(console: &Console, id: &str, follow: bool, lines: usize) -> Result<()> {
    // A file without an id logs under its file name.
    if id.is_empty() || id.starts_with('.') || id.contains('/') {
        let message = format!("{id:?} is neither a plugin's id nor the name of a file in the plugins directory");
        return Err(failure(NOT_FOUND, message));
    }
    let data = console.data()?;
    let path = data.log(id);
    let refused = refused(console, id);
    let was_started = data.plugin_data(id).exists() && refused.is_none();
    if !path.exists() && !was_started {
        return no_log(console, id, refused.as_ref());
    }
    let (last, mut follower) = log_file::tail(&path, lines).with_context(|| format!("cannot read {}", path.display()))?;
    for line in last {
        print_line(console, &line)?;
    }
    if let Some(plugin) = refused.filter(|_| !console.json) {
        writeln!(io::stderr(), "plugrack: {id} is {}; see: plugrack show {id}", word(&plugin["state"]))?;
    }
    if !follow {
        return Ok(());
    }
    loop {
        match follower.next_line().with_context(|| format!("cannot read {}", path.display()))? {
            Some(line) => print_line(console, &line)?,
            None => pause(FOLLOW_PAUSE),
        }
    }
}

fn print_line(console: &Console, line: &str) -> Result<()> {
    if !console.json {
        return print(&format!("{line}\n"));
    }
    let json = match line.split_once(' ').filter(|(time, _)| utc::parse(time).is_some()) {
        Some((time, rest)) => json!({"time": time, "line": rest}),
        None => json!({ "line": line }),
    };
    print(&format!("{}\n", escape::shown_json(&json.to_string())))
}

/// The host's report about a refused file; none if the host does not run or has not refused it.
fn refused(console: &Console, id: &str) -> Option<Value> {
    let plugin = console.api().ok()?.call("GET", &format!("/plugins/{}", segment(id)), b"").ok()?;
    plugin["process"].is_null().then_some(plugin)
}

/// Reports that there is no log. For a refused file, prints the output of its last run.
fn no_log(console: &Console, id: &str, refused: Option<&Value>) -> Result<()> {
    let Some(plugin) = refused else {
        return Err(failure(NOT_FOUND, format!("there is no plugin {id}, or it was never started")));
    };
    for line in items(&plugin["last_end"]["lines"]) {
        print_line(console, &word(line))?;
    }
    let (state, reason) = (word(&plugin["state"]), reason(plugin));
    Err(failure(NOT_FOUND, format!("{id} has no log, because it is {state}: {reason}; see: plugrack show {id}")))
}
