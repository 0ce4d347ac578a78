//! One plugin as the rest of the host sees it: its metadata, its status, and the admission of its requests.

use crate::apps::manifest::{Kind, Manifest, Run};
use crate::http::request_end::Traffic;
use crate::http::slots::Slots;
use crate::http::{HttpError, errors};
use crate::license::Code;
use crate::lock::LockExt;
use crate::plugins::discovery::{self, Fingerprint, Found};
use crate::plugins::job::Job;
use crate::plugins::queue::Queue;
use crate::plugins::scaling::{Batches, Decision, Scaling};
use crate::process::exit::Exit;
use crate::process::output::PluginLog;
use crate::protocol::metadata::{Metadata, WEBSOCKET};
use crate::store::limits::LimitsInForce;
use crate::store::now_ms;
use crate::util::log_throttle::{LogThrottle, suppressed_note};
use crossbeam_channel::Sender;
use serde::Serialize;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// How long a request waits for a plugin that is starting or restarting.
pub(crate) const HOLD: Duration = Duration::from_secs(2);

/// `retry-after` in seconds for a plugin that is starting.
pub(crate) const STARTING_RETRY_AFTER: u64 = 2;

/// Longest `retry-after` in seconds. A plugin may wait for its licence for years, but the operator may start it at any time.
const MAX_RETRY_AFTER: u64 = 3600;

/// `retry-after` in seconds for a plugin that will not restart by itself soon.
const DOWN_RETRY_AFTER: u64 = 60;

/// Time that the gate waits beyond the longest time limit of all plugins before it gives up a request.
const ANSWER_MARGIN: Duration = Duration::from_secs(30);

/// How long the gate waits for an answer. Shared by the gate and whatever sets time limits of plugins.
#[derive(Debug, Clone, Default)]
pub(crate) struct AnswerTime {
    /// The longest time limit of the host and all plugins, in milliseconds. It only grows.
    longest: Arc<AtomicU64>,
}

impl AnswerTime {
    /// Makes the gate wait longer than `time`, a new time limit of a plugin.
    pub(crate) fn outlast(&self, time: Duration) {
        self.longest.fetch_max(time.as_millis().try_into().unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// How long the gate waits.
    pub(crate) fn get(&self) -> Duration {
        Duration::from_millis(self.longest.load(Ordering::Relaxed)) + ANSWER_MARGIN
    }
}

/// The state of a plugin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum State {
    /// Its process is not ready yet.
    Starting,
    /// It answers requests.
    Ready,
    /// It was told to end.
    Stopping,
    /// It does not run, by order of the operator.
    Stopped,
    /// Its process exited unexpectedly; a restart follows after a backoff.
    BackingOff,
    /// Its process keeps failing; it is restarted at long intervals.
    CrashLooping,
    /// A restart would change nothing.
    Refused,
    /// It has refused its licence; a restart would change nothing.
    Unlicensed,
}

impl State {
    /// The name in the API and in events.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::BackingOff => "backing_off",
            Self::CrashLooping => "crash_looping",
            Self::Refused => "refused",
            Self::Unlicensed => "unlicensed",
        }
    }

    /// Whether a process of the plugin is ready or starting.
    pub(crate) fn has_process(self) -> bool {
        matches!(self, Self::Ready | Self::Starting)
    }

    /// Whether the plugin stays down until the cause of its refusal is fixed.
    pub(crate) fn is_refused(self) -> bool {
        matches!(self, Self::Refused | Self::Unlicensed)
    }
}

/// The status of a plugin, as shown to the operator.
#[derive(Debug, Clone)]
pub(crate) struct Status {
    pub(crate) state: State,
    /// Time of the last change of state, in milliseconds since 1970-01-01 UTC.
    pub(crate) since: i64,
    /// The reason for the state, one sentence; empty if there is nothing to explain.
    pub(crate) reason: String,
    pub(crate) pid: Option<i32>,
    /// The limits of its last process.
    pub(crate) limits: Option<LimitsInForce>,
    /// Time of the next restart.
    pub(crate) retry_at: Option<Instant>,
    /// Number of automatic restarts.
    pub(crate) restarts: u64,
    /// Whether the operator lets it run.
    pub(crate) enabled: bool,
    /// The last unexpected end.
    pub(crate) last_end: Option<Arc<End>>,
    /// Why the file that replaced its program was refused, while the old process keeps running.
    pub(crate) update_refused: Option<String>,
}

/// An unexpected end of a plugin's process, or a failed start.
#[derive(Debug)]
pub(crate) struct End {
    /// Time of the end, in milliseconds since 1970-01-01 UTC.
    pub(crate) at: i64,
    pub(crate) exit: Exit,
    /// The exit and its cause, one sentence.
    pub(crate) reason: String,
    /// The last lines of output, oldest first.
    pub(crate) lines: Vec<String>,
}

/// A command to a plugin's supervisor: everything that can happen to the plugin. A `Sender` in a command is dropped once the plugin has
/// settled.
pub(crate) enum Command {
    /// Start the plugin if it does not run.
    Start(Sender<()>),
    /// Stop it.
    Stop(Sender<()>),
    /// Stop it, then start it.
    Restart(Sender<()>),
    /// Stop it, and end the supervisor.
    Quit(Quit),
    /// The operator has enabled or disabled it.
    Enabled(bool),
    /// Its configuration has changed, so a refused plugin is retried.
    Reconsider,
    /// Its licence has changed: restart it with the current one, unless the operator has stopped it.
    Relicense(Sender<()>),
    /// Open another connection.
    Grow,
    /// A turn to start its process may be free.
    Proceed,
    /// The process with this number has ended.
    Exited { process: u64 },
    /// All workers of the process with this number have ended, because it is to stop.
    Drained { process: u64 },
    /// The process with this number does not respond.
    Unresponsive {
        process: u64,
        /// What it fails to do, one sentence.
        why: String,
    },
}

/// Why a plugin is removed from the registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Quit {
    /// The host stops.
    HostStops,
    /// Its file is gone, or was refused.
    Gone,
    /// Another plugin with its id takes over, with the waiting requests, once this one has ended.
    Replaced,
    /// Its update has already taken over.
    Updated,
}

/// What happens to a new request for a plugin.
#[repr(u8)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Admission {
    /// It is refused: the plugin will not be ready soon.
    Shut = 0,
    /// It is held for [`HOLD`] at most: the plugin should be ready soon.
    Holding = 1,
    /// It is served.
    Open = 2,
}

/// A plugin of the registry.
pub(crate) struct Plugin {
    pub(crate) metadata: Metadata,
    /// The path of the executable, or of the manifest.
    pub(crate) program: PathBuf,
    /// The manifest, if it has one.
    pub(crate) manifest: Option<Arc<Manifest>>,
    /// The fingerprint of the file that printed the metadata. No other file is executed.
    pub(crate) fingerprint: Option<Fingerprint>,
    /// The path of the socket on which its processes listen.
    pub(crate) socket: PathBuf,
    pub(crate) queue: Arc<Queue>,
    /// Client connections that it occupies.
    pub(crate) slots: Slots,
    pub(crate) log: PluginLog,
    /// Commands to its supervisor.
    pub(crate) control: Sender<Command>,
    /// Statistics of finished requests.
    pub(crate) traffic: Traffic,
    /// Number of requests that it answered.
    pub(crate) answered: AtomicU64,
    /// Number of requests that it failed. Each has a line in its log.
    pub(crate) failed: AtomicU64,
    /// Decides on the number of connections.
    pub(crate) scaling: Scaling,
    /// Number of connections occupied by streaming answers.
    streams: AtomicUsize,
    /// Whether the line of [`Plugin::note_upgrade`] was written.
    upgrade_noted: AtomicBool,
    /// Throttles the warning that streams occupy every connection.
    streams_full: Mutex<LogThrottle>,
    admission: AtomicU8,
    status: Mutex<Status>,
    /// The last licence on trial that it refused, and why.
    refused_license: Mutex<Option<(String, String)>>,
}

impl Plugin {
    /// A plugin whose supervisor is about to start. An enabled one counts as starting.
    pub(crate) fn new(
        metadata: Metadata,
        found: &Found,
        socket: PathBuf,
        log: PluginLog,
        control: Sender<Command>,
        enabled: bool,
    ) -> Self {
        let (state, admission) = if enabled { (State::Starting, Admission::Holding) } else { (State::Stopped, Admission::Shut) };
        let status = Status {
            state,
            since: now_ms(),
            reason: String::new(),
            pid: None,
            limits: None,
            retry_at: None,
            restarts: 0,
            enabled,
            last_end: None,
            update_refused: None,
        };
        let manifest = found.manifest.as_ref().and_then(|manifest| manifest.as_ref().ok()).map(Arc::clone);
        let batches = match manifest.as_ref().map_or(Kind::Native, |manifest| manifest.run.kind) {
            Kind::Native => Batches::Pipelined,
            Kind::Http => Batches::Apart,
            _ => Batches::None,
        };
        let queue = Arc::new(Queue::new(&metadata.id, metadata.concurrency as usize));
        Self {
            metadata,
            program: found.program.clone(),
            manifest,
            fingerprint: found.fingerprint,
            socket,
            queue,
            slots: Slots::default(),
            log,
            control,
            traffic: Traffic::default(),
            answered: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            scaling: Scaling::new(batches),
            streams: AtomicUsize::new(0),
            upgrade_noted: AtomicBool::new(false),
            streams_full: Mutex::default(),
            admission: AtomicU8::new(admission as u8),
            status: Mutex::new(status),
            refused_license: Mutex::default(),
        }
    }

    pub(crate) fn id(&self) -> &str {
        &self.metadata.id
    }

    /// How its manifest says that it runs, if it has one.
    pub(crate) fn run(&self) -> Option<&Run> {
        self.manifest.as_ref().map(|manifest| &manifest.run)
    }

    /// How the host speaks to it.
    pub(crate) fn kind(&self) -> Kind {
        self.run().map_or(Kind::Native, |run| run.kind)
    }

    /// Checks, before the body of a new request is read, that the plugin may serve it.
    ///
    /// # Errors
    /// The answer to the request.
    pub(crate) fn admit(&self) -> Result<(), HttpError> {
        if self.admission.load(Ordering::Acquire) == Admission::Shut as u8 {
            return Err(self.unavailable());
        }
        Ok(())
    }

    /// Enqueues a request, which the plugin answers, or the host in its place. Never blocks.
    ///
    /// # Errors
    /// The plugin cannot take the request: the request, and the answer to it.
    pub(crate) fn submit(&self, job: Job) -> Result<(), (Job, HttpError)> {
        if let Err(error) = self.admit() {
            return Err((job, error));
        }
        self.queue.push(job).map_err(|job| (job, errors::CROWDED))?;
        self.fail_if_shut();
        // Without a ready process the supervisor ignores this.
        self.ask_to_grow();
        Ok(())
    }

    /// Re-queues a request that a worker had taken. The next free worker serves it, if need be of the next process.
    pub(crate) fn requeue(&self, job: Job) {
        self.queue.put_back(job);
        self.fail_if_shut();
    }

    /// Fails the waiting requests if the admission is shut. Checked after each push: whoever shuts the admission empties the queue
    /// afterwards, so one of the two threads sees the request.
    fn fail_if_shut(&self) {
        if self.admission.load(Ordering::SeqCst) == Admission::Shut as u8 {
            self.queue.fail_all(self.unavailable());
        }
    }

    /// Marks the plugin as refused, because its supervisor failed.
    pub(crate) fn abandon(&self, why: &str) {
        log::error!("{}: {why}", self.id());
        self.set_status(Admission::Shut, |status| {
            (status.state, status.since, status.pid, status.retry_at) = (State::Refused, now_ms(), None, None);
            status.reason = why.to_owned();
        });
        self.fail_waiting();
    }

    /// Fails the requests that have waited for a process for [`HOLD`], since their arrival or `down_since`, whichever is later.
    pub(crate) fn expire_held(&self, down_since: Option<Instant>) {
        let held = |job: &Job| down_since.map_or(job.arrived(), |since| job.arrived().max(since)).elapsed() >= HOLD;
        self.queue.expire(held, |job| job.fail(errors::UNAVAILABLE.retry_after(STARTING_RETRY_AFTER)));
    }

    /// Fails all waiting requests, and refuses new ones.
    pub(crate) fn fail_waiting(&self) {
        self.admission.store(Admission::Shut as u8, Ordering::SeqCst);
        self.queue.fail_all(self.unavailable());
    }

    /// Whether the caller is to close its connection, because the plugin needs fewer. Only one closes at a time.
    pub(crate) fn is_to_shrink(&self) -> bool {
        let decide = || self.scaling.decide(self.queue.len(), self.metadata.concurrency as usize) == Decision::Shrink;
        if !decide() || self.scaling.shrinking.swap(true, Ordering::Relaxed) {
            return false;
        }
        // Another may have closed in the meantime.
        let shrinks = decide();
        self.scaling.shrinking.store(shrinks, Ordering::Relaxed);
        shrinks
    }

    /// Asks the supervisor for another connection if the waiting requests could use one.
    pub(crate) fn ask_to_grow(&self) {
        let growing = &self.scaling.growing;
        if self.scaling.decide(self.queue.len(), self.metadata.concurrency as usize) == Decision::Grow
            && !growing.swap(true, Ordering::Relaxed)
            && self.control.try_send(Command::Grow).is_err()
        {
            growing.store(false, Ordering::Relaxed);
        }
    }

    /// Counts a streaming answer until the guard is dropped.
    pub(crate) fn count_stream(self: &Arc<Self>) -> CountedStream {
        self.streams.fetch_add(1, Ordering::Relaxed);
        CountedStream(Arc::clone(self))
    }

    /// Whether streaming answers occupy every connection that the plugin may have.
    pub(crate) fn is_full_of_streams(&self) -> bool {
        self.streams.load(Ordering::Relaxed) >= self.metadata.concurrency as usize
    }

    /// Explains why requests have to wait, if streams occupy every connection.
    pub(crate) fn congestion(&self) -> Option<String> {
        let most = self.metadata.concurrency;
        self.is_full_of_streams().then(|| {
            let streams = self.streams.load(Ordering::Relaxed);
            format!("{most} of {most} connections busy, {streams} by streams: raise concurrency")
        })
    }

    /// Warns in the host's log, at most once a minute, that streams occupy every connection.
    pub(crate) fn warn_of_streams(&self, why: &str) {
        let hit = self.streams_full.locked().hit(Instant::now());
        if let Some(suppressed) = hit {
            log::warn!("{}: {why}{}", self.id(), suppressed_note(suppressed));
        }
    }

    /// Tells the supervisor that a process does not respond, and why.
    pub(crate) fn unresponsive(&self, process: u64, why: String) {
        // A supervisor that has ended has no process.
        drop(self.control.send(Command::Unresponsive { process, why }));
    }

    /// Counts a request that the plugin failed, and logs the line about it in its log.
    pub(crate) fn note_failed(&self, line: &str) {
        self.failed.fetch_add(1, Ordering::Relaxed);
        self.log.note(line);
    }

    /// Whether it takes the messages of WebSockets.
    pub(crate) fn speaks_websocket(&self) -> bool {
        self.kind() == Kind::Native && self.metadata.speaks.iter().any(|name| name == WEBSOCKET)
    }

    /// Notes in the plugin's log, once, that a client asked for another protocol such as WebSocket, which the plugin does not speak.
    pub(crate) fn note_upgrade(&self) {
        if !self.upgrade_noted.swap(true, Ordering::Relaxed) {
            self.log.note("a client asked for WebSocket or another protocol, which applications (kind = \"http\") speak, and plugins that name websocket in speaks");
        }
    }

    /// A copy of the status.
    pub(crate) fn status(&self) -> Status {
        self.lock_status().clone()
    }

    /// Records a refused licence on trial, and the reason; `None` clears it.
    pub(crate) fn note_refused_license(&self, refused: Option<(String, String)>) {
        *self.refused_license.locked() = refused;
    }

    /// Why the plugin refused this licence on trial, if it was the last one it refused.
    pub(crate) fn why_refused(&self, token: &str) -> Option<String> {
        let refused = self.refused_license.locked();
        refused.as_ref().filter(|(refused, _)| refused == token).map(|(_, why)| why.clone())
    }

    /// The code by which a plugin with this status refused its licence, if that is why it does not run.
    pub(crate) fn license_refused(status: &Status) -> Option<Code> {
        match (status.state, status.last_end.as_deref()?.exit) {
            (State::Unlicensed | State::BackingOff, Exit::Unlicensed(code)) => Some(code),
            _ => None,
        }
    }

    /// What the operator can do to make a plugin with this status run; empty if it runs or is starting.
    pub(crate) fn advice(&self, status: &Status) -> String {
        let id = self.id();
        match (status.state, &status.last_end) {
            (State::Stopped, _) if !status.enabled => format!("plugrack enable {id} lets it run"),
            (State::Stopped, _) => format!("plugrack start {id} starts it"),
            (State::Unlicensed, _) if status.retry_at.is_some() => {
                "nothing: it starts by itself when its licence is valid, or ask its vendor for one that is".into()
            }
            (State::BackingOff | State::CrashLooping | State::Refused | State::Unlicensed, Some(end)) => end.exit.advice(id),
            _ => String::new(),
        }
    }

    /// Records the process and its limits. Only the supervisor calls this and the following setters.
    pub(crate) fn set_process(&self, pid: Option<i32>, limits: LimitsInForce) {
        let mut status = self.lock_status();
        (status.pid, status.limits) = (pid, Some(limits));
    }

    pub(crate) fn set_enabled(&self, enabled: bool) {
        self.lock_status().enabled = enabled;
    }

    /// Counts an automatic restart.
    pub(crate) fn count_restart(&self) {
        self.lock_status().restarts += 1;
    }

    /// The scan result by which the plugin was accepted, under this file name.
    pub(crate) fn found(&self, file: &str) -> Found {
        let manifest = self.manifest.as_ref().map(|manifest| Ok(Arc::clone(manifest)));
        Found { file: file.to_owned(), program: self.program.clone(), fingerprint: self.fingerprint, manifest }
    }

    /// Whether the program is still the file that printed the metadata.
    pub(crate) fn is_unchanged(&self) -> bool {
        discovery::fingerprint(&self.program) == self.fingerprint
    }

    /// Records why the file that replaced the program was refused; none once the old file is back.
    pub(crate) fn set_update_refused(&self, reason: Option<String>) {
        self.lock_status().update_refused = reason;
    }

    /// Records an unexpected end.
    pub(crate) fn set_last_end(&self, end: End) {
        self.lock_status().last_end = Some(Arc::new(end));
    }

    /// Changes the status, then the admission.
    pub(crate) fn set_status(&self, admission: Admission, change: impl FnOnce(&mut Status)) {
        change(&mut self.lock_status());
        self.admission.store(admission as u8, Ordering::SeqCst);
    }

    /// The answer to requests while the plugin does not run.
    fn unavailable(&self) -> HttpError {
        errors::UNAVAILABLE.retry_after(self.retry_after())
    }

    fn retry_after(&self) -> u64 {
        let status = self.lock_status();
        let until = status.retry_at.map(|at| at.saturating_duration_since(Instant::now()).as_secs() + 1);
        until.unwrap_or(DOWN_RETRY_AFTER).min(MAX_RETRY_AFTER)
    }

    fn lock_status(&self) -> MutexGuard<'_, Status> {
        self.status.locked()
    }
}

/// Counts a streaming answer while it exists.
pub(crate) struct CountedStream(Arc<Plugin>);

impl Drop for CountedStream {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}
