//! Plugins as the operator is shown them.

use crate::discovery::Outlook;
use crate::license::{Claims, unverified};
use crate::plugin::{End, Plugin, State, Status};
use crate::protocol::metadata::Metadata;
use crate::rack::{Entry, Rack, Rejected};
use crate::standing::{shown, standing};
use crate::store::StoreError;
use crate::store::events::Event;
use crate::store::licenses::Given;
use serde::Serialize;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Events shown with a plugin.
const SHOWN_EVENTS: u32 = 20;

/// A plugin in the list.
#[derive(Debug, Serialize)]
pub(crate) struct Summary {
    /// Its id; that it gave itself, where it was refused later than that.
    id: Option<String>,
    /// Its name in the plugins directory.
    file: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    route: Option<String>,
    state: State,
    /// Why it is in that state; empty when there is nothing to explain.
    reason: String,
    enabled: bool,
    /// Why the file that lies there now does not run, where the process of the one before goes on.
    #[serde(skip_serializing_if = "Option::is_none")]
    update_refused: Option<String>,
    /// How it stands with its licence, see [`standing`].
    license: Option<String>,
}

/// A plugin's licence, of which the token is never shown whole.
#[derive(Debug, Serialize)]
pub(crate) struct License {
    license: Option<String>,
    state: State,
    /// Why it is in that state.
    reason: String,
    /// The beginning of the token.
    token: Option<String>,
    /// What the token says of itself, which only the plugin can verify.
    claims: Option<Claims>,
    /// The beginning of the token before it, which is kept until the plugin has accepted this one.
    #[serde(skip_serializing_if = "Option::is_none")]
    previous: Option<String>,
}

/// An end of a plugin's process that nobody asked for.
#[derive(Debug, Serialize)]
struct LastEnd {
    /// When, in milliseconds since 1970-01-01 UTC.
    at: i64,
    /// How: exit code or signal, in words.
    exit: String,
    /// How and why.
    reason: String,
    /// The last lines it had printed, oldest first.
    lines: Vec<String>,
}

/// A plugin in full.
#[derive(Debug, Serialize)]
pub(crate) struct Details {
    #[serde(flatten)]
    summary: Summary,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<Metadata>,
    #[serde(skip_serializing_if = "Option::is_none")]
    process: Option<Process>,
    /// Seconds until a file that has not said who it is is asked again.
    #[serde(skip_serializing_if = "Option::is_none")]
    retry_in: Option<f32>,
    /// What the operator can do for it to run; empty when there is nothing to do.
    advice: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_end: Option<LastEnd>,
    /// Newest first.
    events: Vec<Event>,
}

/// A plugin's process.
#[derive(Debug, Serialize)]
struct Process {
    pid: Option<i32>,
    /// Since when it is in its state, in milliseconds since 1970-01-01 UTC.
    since: i64,
    /// Seconds until it is started again.
    retry_in: Option<f32>,
    /// Starts by itself.
    restarts: u64,
    /// Requests answered.
    answered: u64,
    /// Requests waiting.
    waiting: usize,
    /// Connections open to it.
    connections: usize,
    program: String,
    log: String,
}

/// All there is in the plugins directory, by name there.
pub(crate) fn list(rack: &Rack) -> Vec<Summary> {
    // Where they cannot be read the plugins are shown all the same.
    let tokens = rack.host().store.licenses().unwrap_or_default();
    let summary = |(file, entry)| match entry {
        Entry::Accepted { plugin, .. } => {
            let token = tokens.get(plugin.id()).map(String::as_str);
            accepted(rack, file, &plugin, plugin.status(), token)
        }
        Entry::Refused { id, rejected, .. } => refused(file, &id, &rejected),
    };
    rack.entries().into_iter().map(summary).collect()
}

/// One plugin, by its id or, when it was refused, by the name of its file.
pub(crate) fn one(rack: &Rack, id: &str) -> Result<Option<Details>, StoreError> {
    let Some((file, entry)) = rack.find(id) else { return Ok(None) };
    let events = || rack.host().store.events(id, SHOWN_EVENTS);
    let details = match &entry {
        Entry::Accepted { plugin, .. } => {
            // One look at the status, so that all that is shown is of one moment, and the events after it, so that its own is there.
            let status = plugin.status();
            let events = events()?;
            let token = rack.host().store.license(plugin.id())?;
            let (metadata, process) = (Some(plugin.metadata.clone()), Some(process(rack, plugin, &status)));
            let (advice, last_end) = (plugin.advice(&status), status.last_end.as_deref().map(last_end));
            Details {
                summary: accepted(rack, file, plugin, status, token.as_deref()),
                metadata,
                process,
                retry_in: None,
                advice,
                last_end,
                events,
            }
        }
        Entry::Refused { id, rejected, .. } => {
            let events = events()?;
            let advice = match rejected.retry_at {
                Some(_) => {
                    "nothing, unless it stays so: the file is asked again by itself, and at once by plugrack rescan".into()
                }
                None => "correct or remove its file: it is then looked at again".into(),
            };
            let end = LastEnd {
                at: rejected.at,
                exit: "refused".into(),
                reason: rejected.reason.clone(),
                lines: rejected.printed.to_vec(),
            };
            Details {
                summary: refused(file, id, rejected),
                metadata: None,
                process: None,
                retry_in: rejected.retry_at.map(seconds_until),
                advice,
                last_end: (!rejected.printed.is_empty()).then_some(end),
                events,
            }
        }
    };
    Ok(Some(details))
}

/// How a plugin stands with its licence.
pub(crate) fn license(rack: &Rack, plugin: &Plugin) -> Result<License, StoreError> {
    let Given { token, previous } = rack.host().store.given_license(plugin.id())?;
    let status = plugin.status();
    Ok(License {
        license: stands(rack, &status, token.as_deref()),
        state: status.state,
        reason: status.reason,
        token: token.as_deref().map(shown),
        claims: token.as_deref().and_then(unverified),
        previous: previous.and_then(|previous| previous.token).as_deref().map(shown),
    })
}

fn stands(rack: &Rack, status: &Status, token: Option<&str>) -> Option<String> {
    standing(token, Plugin::license_refused(status), status.state == State::Ready, rack.host().time.now())
}

fn refused(file: String, id: &Option<String>, rejected: &Rejected) -> Summary {
    Summary {
        id: id.clone(),
        file,
        name: None,
        version: None,
        route: None,
        // What has said who it is waits for nothing of its own.
        state: if rejected.outlook == Outlook::Failing && id.is_none() { State::BackingOff } else { State::Refused },
        reason: rejected.reason.clone(),
        enabled: true,
        update_refused: None,
        license: None,
    }
}

fn seconds_until(at: Instant) -> f32 {
    at.saturating_duration_since(Instant::now()).as_secs_f32()
}

fn accepted(rack: &Rack, file: String, plugin: &Plugin, status: Status, token: Option<&str>) -> Summary {
    let (metadata, license) = (plugin.metadata.clone(), stands(rack, &status, token));
    Summary {
        id: Some(metadata.id),
        file,
        name: Some(metadata.name),
        version: Some(metadata.version),
        route: Some(metadata.route),
        state: status.state,
        reason: status.reason,
        enabled: status.enabled,
        update_refused: status.update_refused,
        license,
    }
}

fn last_end(end: &End) -> LastEnd {
    LastEnd { at: end.at, exit: end.exit.to_string(), reason: end.reason.clone(), lines: end.lines.clone() }
}

fn process(rack: &Rack, plugin: &Plugin, status: &Status) -> Process {
    Process {
        pid: status.pid,
        since: status.since,
        retry_in: status.retry_at.map(seconds_until),
        restarts: status.restarts,
        answered: plugin.answered.load(Ordering::Relaxed),
        waiting: plugin.queue.len(),
        connections: plugin.connections.load(Ordering::Relaxed),
        program: plugin.program.display().to_string(),
        log: rack.host().data.log(plugin.id()).display().to_string(),
    }
}
