//! Plugins as the operator is shown them.

use crate::http::request_end::TrafficCounts;
use crate::license::{Claims, unverified};
use crate::licensing::status::{LicenseStatus, shown, standing};
use crate::plugins::discovery::Outlook;
use crate::plugins::plugin::{End, Plugin, State, Status};
use crate::plugins::registry::{Entry, Rack, Rejected};
use crate::process::oom;
use crate::protocol::metadata::Metadata;
use crate::store::events::Event;
use crate::store::licenses::Given;
use crate::store::{StoreError, now_ms};
use crate::util::utc;
use serde::Serialize;
use std::collections::BTreeMap;
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
    /// Since when it is in that state.
    #[serde(serialize_with = "utc::serialize")]
    since: i64,
    /// Why it is in that state; empty when there is nothing to explain.
    reason: String,
    /// When it is started, or its file asked, again.
    #[serde(serialize_with = "utc::serialize_some")]
    retry_at: Option<i64>,
    enabled: bool,
    /// Why the file that lies there now does not run, where the process of the one before goes on.
    #[serde(skip_serializing_if = "Option::is_none")]
    update_refused: Option<String>,
    /// The status of its licence; none of a file that was refused.
    license: Option<LicenseStatus>,
    #[serde(skip_serializing_if = "Option::is_none")]
    process: Option<Process>,
}

/// A plugin's licence, of which the token is never shown whole.
#[derive(Debug, Serialize)]
pub(crate) struct License {
    id: String,
    license: LicenseStatus,
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
    /// When.
    #[serde(serialize_with = "utc::serialize")]
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
    /// Where it is on the web; none where the host listens on a Unix socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    url: Option<String>,
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
    /// Resident memory in bytes of all processes in its session.
    memory: Option<u64>,
    /// Starts by itself.
    restarts: u64,
    /// Requests answered.
    answered: u64,
    /// Requests that it failed.
    failed: u64,
    /// Requests waiting.
    waiting: usize,
    /// Connections open to it.
    connections: usize,
    /// Why requests cannot be answered soon, where all connections are taken by streams.
    #[serde(skip_serializing_if = "Option::is_none")]
    congestion: Option<String>,
    /// Requests of clients that have ended since the host started, by how they did.
    requests: TrafficCounts,
    program: String,
    log: String,
}

/// All there is in the plugins directory, by name there.
pub(crate) fn list(rack: &Rack) -> Vec<Summary> {
    // Where they cannot be read the plugins are shown all the same.
    let tokens = rack.host().store.licenses().unwrap_or_default();
    let memory = oom::by_session();
    let summary = |(file, entry)| match entry {
        Entry::Accepted { plugin, .. } => {
            let token = tokens.get(plugin.id()).map(String::as_str);
            accepted(rack, file, &plugin, plugin.status(), token, &memory)
        }
        Entry::Refused { id, rejected, .. } => refused(file, &id, &rejected),
    };
    rack.entries().into_iter().map(summary).collect()
}

/// One plugin, by its id or, when it was refused, by the name of its file. `base` is the URL of the host.
pub(crate) fn one(rack: &Rack, id: &str, base: Option<&str>) -> Result<Option<Details>, StoreError> {
    let Some((file, entry)) = rack.find(id) else { return Ok(None) };
    let events = || rack.events(&file, &entry, SHOWN_EVENTS);
    let details = match &entry {
        Entry::Accepted { plugin, .. } => {
            // One look at the status, so that all that is shown is of one moment, and the events after it, so that its own is there.
            let status = plugin.status();
            let events = events()?;
            let token = rack.host().store.license(plugin.id())?;
            let (advice, last_end) = (plugin.advice(&status), status.last_end.as_deref().map(last_end));
            Details {
                summary: accepted(rack, file, plugin, status, token.as_deref(), &oom::by_session()),
                metadata: Some(plugin.metadata.clone()),
                url: base.map(|base| format!("{base}{}", plugin.metadata.route)),
                advice,
                last_end,
                events,
            }
        }
        Entry::Refused { id, rejected, .. } => {
            let events = events()?;
            let advice = match rejected.retry_at {
                Some(_) => "wait: the file is asked again by itself; plugrack rescan asks it now".into(),
                None => "fix or remove its file, then: plugrack rescan".into(),
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
                url: None,
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
        id: plugin.id().to_owned(),
        license: stands(rack, &status, token.as_deref()),
        state: status.state,
        reason: status.reason,
        token: token.as_deref().map(shown),
        claims: token.as_deref().and_then(unverified),
        previous: previous.and_then(|previous| previous.token).as_deref().map(shown),
    })
}

fn stands(rack: &Rack, status: &Status, token: Option<&str>) -> LicenseStatus {
    let refused = Plugin::license_refused(status).map(|code| (code, status.reason.as_str()));
    standing(token, refused, status.state == State::Ready, rack.host().time.now())
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
        since: rejected.at,
        reason: rejected.reason.clone(),
        retry_at: rejected.retry_at.map(clock_time),
        enabled: true,
        update_refused: None,
        license: None,
        process: None,
    }
}

/// A moment to come, by the clock.
fn clock_time(at: Instant) -> i64 {
    let wait = at.saturating_duration_since(Instant::now()).as_millis();
    now_ms().saturating_add(i64::try_from(wait).unwrap_or(i64::MAX))
}

fn accepted(
    rack: &Rack,
    file: String,
    plugin: &Plugin,
    status: Status,
    token: Option<&str>,
    memory: &BTreeMap<i32, u64>,
) -> Summary {
    let (metadata, license) = (plugin.metadata.clone(), stands(rack, &status, token));
    let process = process(rack, plugin, &status, memory);
    Summary {
        id: Some(metadata.id),
        file,
        name: Some(metadata.name),
        version: Some(metadata.version),
        route: Some(metadata.route),
        state: status.state,
        since: status.since,
        reason: status.reason,
        retry_at: status.retry_at.map(clock_time),
        enabled: status.enabled,
        update_refused: status.update_refused,
        license: Some(license),
        process: Some(process),
    }
}

fn last_end(end: &End) -> LastEnd {
    LastEnd { at: end.at, exit: end.exit.to_string(), reason: end.reason.clone(), lines: end.lines.clone() }
}

fn process(rack: &Rack, plugin: &Plugin, status: &Status, memory: &BTreeMap<i32, u64>) -> Process {
    Process {
        pid: status.pid,
        // Each process of a plugin is started as the leader of a session.
        memory: status.pid.and_then(|pid| memory.get(&pid).copied()),
        restarts: status.restarts,
        answered: plugin.answered.load(Ordering::Relaxed),
        failed: plugin.failed.load(Ordering::Relaxed),
        waiting: plugin.queue.len(),
        connections: plugin.scaling.connections.load(Ordering::Relaxed),
        congestion: plugin.congestion(),
        requests: plugin.traffic.counts(),
        program: plugin.program.display().to_string(),
        log: rack.host().data.log(plugin.id()).display().to_string(),
    }
}
