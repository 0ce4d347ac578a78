//! Plugins in the form of the API.

use super::first_page::FirstPage;
use crate::http::request_end::TrafficCounts;
use crate::license::{Claims, unverified};
use crate::licensing::status::{LicenseStatus, license_status, shown};
use crate::plugins::discovery::Outlook;
use crate::plugins::plugin::{End, Plugin, State, Status};
use crate::plugins::registry::{Entry, Registry, Rejected};
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

/// Number of events shown with a plugin.
const SHOWN_EVENTS: u32 = 20;

/// A plugin in the list.
#[derive(Debug, Serialize)]
pub(crate) struct Summary {
    /// The id; for a refused file the one in its metadata, if that was read.
    id: Option<String>,
    /// The name in the plugins directory.
    file: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    route: Option<String>,
    /// The host names that it lists.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    host: Vec<String>,
    state: State,
    /// Time of the last change of the state.
    #[serde(serialize_with = "utc::serialize")]
    since: i64,
    /// The reason of the state; empty if there is nothing to explain.
    reason: String,
    /// Time of the next start, or of the next `--metadata` call.
    #[serde(serialize_with = "utc::serialize_some")]
    retry_at: Option<i64>,
    enabled: bool,
    /// Why the new file was refused, while the old process keeps running.
    #[serde(skip_serializing_if = "Option::is_none")]
    update_refused: Option<String>,
    /// The status of its licence; none for a refused file.
    license: Option<LicenseStatus>,
    #[serde(skip_serializing_if = "Option::is_none")]
    process: Option<Process>,
}

/// A plugin's licence. The token is never shown in full.
#[derive(Debug, Serialize)]
pub(crate) struct License {
    id: String,
    license: LicenseStatus,
    state: State,
    /// The reason of the state.
    reason: String,
    /// The start of the token.
    token: Option<String>,
    /// The claims of the token, which only the plugin can verify.
    claims: Option<Claims>,
    /// The start of the previous token, which is kept until the plugin accepts this one.
    #[serde(skip_serializing_if = "Option::is_none")]
    previous: Option<String>,
}

/// An unexpected end of a plugin's process.
#[derive(Debug, Serialize)]
struct LastEnd {
    /// Time of the end.
    #[serde(serialize_with = "utc::serialize")]
    at: i64,
    /// Exit code or signal, in words.
    exit: String,
    /// How it ended and why.
    reason: String,
    /// Its last lines of output, oldest first.
    lines: Vec<String>,
}

/// A plugin in full.
#[derive(Debug, Serialize)]
pub(crate) struct Details {
    #[serde(flatten)]
    summary: Summary,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<Metadata>,
    /// Its URL; none if the host listens on a Unix socket, or if the plugin has wildcards alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    url: Option<String>,
    /// What the operator can do to make it run; empty if there is nothing to do.
    advice: String,
    /// The check of its first page, if that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) first_page: Option<FirstPage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_end: Option<LastEnd>,
    /// The latest events, newest first.
    events: Vec<Event>,
}

/// A plugin's process.
#[derive(Debug, Serialize)]
struct Process {
    pid: Option<i32>,
    /// Resident memory in bytes of all processes in its session.
    memory: Option<u64>,
    /// Automatic restarts.
    restarts: u64,
    /// Number of requests answered.
    answered: u64,
    /// Number of requests that it failed.
    failed: u64,
    /// Number of waiting requests.
    waiting: usize,
    /// Number of open connections to it.
    connections: usize,
    /// Why requests cannot be answered soon, where all connections are taken by streams.
    #[serde(skip_serializing_if = "Option::is_none")]
    congestion: Option<String>,
    /// Requests of clients that have ended since the host started, by how they did.
    requests: TrafficCounts,
    program: String,
    log: String,
}

/// All entries of the plugins directory, by name.
pub(crate) fn list(registry: &Registry) -> Vec<Summary> {
    // If they cannot be read, the plugins are shown without them.
    let tokens = registry.context().store.licenses().unwrap_or_default();
    let memory = oom::by_session();
    let summary = |(file, entry)| match entry {
        Entry::Accepted { plugin, .. } => {
            let token = tokens.get(plugin.id()).map(String::as_str);
            accepted(registry, file, &plugin, plugin.status(), token, &memory)
        }
        Entry::Refused { id, rejected, .. } => refused(file, &id, &rejected),
    };
    registry.entries().into_iter().map(summary).collect()
}

/// One plugin, by its id, or by its file name if it was refused. `base` is the URL of the host.
pub(crate) fn one(registry: &Registry, id: &str, base: Option<&str>) -> Result<Option<Details>, StoreError> {
    let Some((file, entry)) = registry.find(id) else { return Ok(None) };
    let events = || registry.events(&file, &entry, SHOWN_EVENTS);
    let details = match &entry {
        Entry::Accepted { plugin, .. } => {
            // Reads the status once, so that everything shown is of one moment, and the events after it, so that they include its own.
            let status = plugin.status();
            let events = events()?;
            let token = registry.context().store.license(plugin.id())?;
            let (advice, last_end) = (plugin.advice(&status), status.last_end.as_deref().map(last_end));
            Details {
                summary: accepted(registry, file, plugin, status, token.as_deref(), &oom::by_session()),
                metadata: Some(plugin.metadata.clone()),
                url: base.and_then(|base| url(base, &plugin.metadata)),
                advice,
                first_page: None,
                last_end,
                events,
            }
        }
        Entry::Refused { id, rejected, .. } => {
            let events = events()?;
            let advice = match rejected.retry_at {
                Some(_) => "nothing: the host tries again by itself; to try now: plugrack rescan".into(),
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
                first_page: None,
                last_end: (!rejected.printed.is_empty()).then_some(end),
                events,
            }
        }
    };
    Ok(Some(details))
}

/// The URL of a plugin: by its route, or else by its first exact host name.
fn url(base: &str, metadata: &Metadata) -> Option<String> {
    if let Some(route) = &metadata.route {
        return Some(format!("{base}{route}"));
    }
    let name = metadata.exact_host()?;
    let (scheme, authority) = base.split_once("://")?;
    let port = authority.rsplit_once(':').map_or("", |(_, port)| port);
    match (scheme, port) {
        ("http", "80") | ("https", "443") => Some(format!("{scheme}://{name}/")),
        _ => Some(format!("{scheme}://{name}:{port}/")),
    }
}

/// The status of a plugin's licence.
pub(crate) fn license(registry: &Registry, plugin: &Plugin) -> Result<License, StoreError> {
    let Given { token, previous } = registry.context().store.given_license(plugin.id())?;
    let status = plugin.status();
    Ok(License {
        id: plugin.id().to_owned(),
        license: current_license_status(registry, &status, token.as_deref()),
        state: status.state,
        reason: status.reason,
        token: token.as_deref().map(shown),
        claims: token.as_deref().and_then(unverified),
        previous: previous.and_then(|previous| previous.token).as_deref().map(shown),
    })
}

fn current_license_status(registry: &Registry, status: &Status, token: Option<&str>) -> LicenseStatus {
    let refused = Plugin::license_refused(status).map(|code| (code, status.reason.as_str()));
    license_status(token, refused, status.state == State::Ready, registry.context().license_clock.now())
}

fn refused(file: String, id: &Option<String>, rejected: &Rejected) -> Summary {
    Summary {
        id: id.clone(),
        file,
        name: None,
        version: None,
        route: None,
        host: Vec::new(),
        // A plugin with metadata does not wait for a `--metadata` call.
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

/// Converts a future instant to wall clock time.
fn clock_time(at: Instant) -> i64 {
    let wait = at.saturating_duration_since(Instant::now()).as_millis();
    now_ms().saturating_add(i64::try_from(wait).unwrap_or(i64::MAX))
}

fn accepted(
    registry: &Registry,
    file: String,
    plugin: &Plugin,
    status: Status,
    token: Option<&str>,
    memory: &BTreeMap<i32, u64>,
) -> Summary {
    let (metadata, license) = (plugin.metadata.clone(), current_license_status(registry, &status, token));
    let process = process(registry, plugin, &status, memory);
    Summary {
        id: Some(metadata.id),
        file,
        name: Some(metadata.name),
        version: Some(metadata.version),
        route: metadata.route,
        host: metadata.host,
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

fn process(registry: &Registry, plugin: &Plugin, status: &Status, memory: &BTreeMap<i32, u64>) -> Process {
    Process {
        pid: status.pid,
        // Each plugin process leads its own session.
        memory: status.pid.and_then(|pid| memory.get(&pid).copied()),
        restarts: status.restarts,
        answered: plugin.answered.load(Ordering::Relaxed),
        failed: plugin.failed.load(Ordering::Relaxed),
        waiting: plugin.queue.len(),
        connections: plugin.scaling.connections.load(Ordering::Relaxed),
        congestion: plugin.congestion(),
        requests: plugin.traffic.counts(),
        program: plugin.program.display().to_string(),
        log: registry.context().data.log(plugin.id()).display().to_string(),
    }
}
