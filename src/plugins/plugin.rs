//! One plugin as the rest of the host sees it: who it is, how it is, and the door its requests go through.

use crate::http::request_end::Traffic;
use crate::http::slots::Slots;
use crate::http::{HttpError, errors};
use crate::license::Code;
use crate::lock::LockExt;
use crate::plugins::discovery::{self, Fingerprint, Found};
use crate::plugins::job::Job;
use crate::plugins::queue::Queue;
use crate::plugins::scaling::{Decision, Scaling};
use crate::process::exit::Exit;
use crate::process::output::PluginLog;
use crate::protocol::metadata::Metadata;
use crate::store::limits::LimitsInForce;
use crate::store::now_ms;
use crate::util::log_throttle::{Repeat, more};
use crossbeam_channel::Sender;
use serde::Serialize;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// How long a request waits for a plugin that is starting or restarting.
pub(crate) const HOLD: Duration = Duration::from_secs(2);

/// `retry-after` in seconds for a plugin that is starting.
pub(crate) const STARTING_RETRY_AFTER: u64 = 2;

/// Longest `retry-after` in seconds: a plugin may wait for years for its licence, and the operator may start it any time.
const MAX_RETRY_AFTER: u64 = 3600;

/// `retry-after` in seconds for a plugin that will not be back by itself soon.
const DOWN_RETRY_AFTER: u64 = 60;

/// Time beyond the longest time limit of the plugins after which the gate takes a request for lost.
const ANSWER_MARGIN: Duration = Duration::from_secs(30);

/// How long the gate waits for an answer, shared with what gives plugins their time limits.
#[derive(Debug, Clone, Default)]
pub(crate) struct AnswerTime {
    /// The longest time limit of the host and its plugins, in milliseconds. It only grows.
    longest: Arc<AtomicU64>,
}

impl AnswerTime {
    /// Makes the gate wait for longer than `time`, which a plugin has from now on.
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
    /// Its process was started and is not ready yet.
    Starting,
    /// It answers requests.
    Ready,
    /// It was told to end.
    Stopping,
    /// It does not run, because the operator wants it so.
    Stopped,
    /// It ended by itself and will be started again.
    BackingOff,
    /// It keeps ending by itself; it is tried now and then.
    CrashLooping,
    /// Starting it again would change nothing.
    Refused,
    /// It has refused its licence: starting it again would change nothing either.
    Unlicensed,
}

impl State {
    /// The state's name, as the API and the events spell it.
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

    /// Whether a process of it answers, or is about to.
    pub(crate) fn has_process(self) -> bool {
        matches!(self, Self::Ready | Self::Starting)
    }

    /// Whether it waits for a cause to be mended, by which it is tried again.
    pub(crate) fn is_refused(self) -> bool {
        matches!(self, Self::Refused | Self::Unlicensed)
    }
}

/// What the operator is told of a plugin.
#[derive(Debug, Clone)]
pub(crate) struct Status {
    /// How it is.
    pub(crate) state: State,
    /// Since when, in milliseconds since 1970-01-01 UTC.
    pub(crate) since: i64,
    /// Why, in a sentence; empty when there is nothing to explain.
    pub(crate) reason: String,
    /// Its process.
    pub(crate) pid: Option<i32>,
    /// The limits that its last process was started with.
    pub(crate) limits: Option<LimitsInForce>,
    /// When it is started again.
    pub(crate) retry_at: Option<Instant>,
    /// How often it has been started again by itself.
    pub(crate) restarts: u64,
    /// Whether it may run.
    pub(crate) enabled: bool,
    /// The last end that nobody asked for.
    pub(crate) last_end: Option<Arc<End>>,
    /// Why the file that lies in its program's place now does not run, where that one was refused and the process before goes on.
    pub(crate) update_refused: Option<String>,
}

/// An end of a plugin's process, or of its start, that nobody asked for.
#[derive(Debug)]
pub(crate) struct End {
    /// When, in milliseconds since 1970-01-01 UTC.
    pub(crate) at: i64,
    /// How.
    pub(crate) exit: Exit,
    /// How and why, in a sentence.
    pub(crate) reason: String,
    /// The last lines it had printed, oldest first.
    pub(crate) lines: Vec<String>,
}

/// What a plugin's supervisor is told: everything that can happen to the plugin.
pub(crate) enum Command {
    /// Start the plugin if it does not run. Told the outcome by the channel's end.
    Start(Sender<()>),
    /// Stop it. Told the end by the channel's.
    Stop(Sender<()>),
    /// Stop it, then start it.
    Restart(Sender<()>),
    /// Stop it, and end the supervisor.
    Quit(Quit),
    /// The operator has changed whether it may run.
    Enabled(bool),
    /// What it is configured with has changed: a plugin that was refused may try again.
    Reconsider,
    /// Its licence has changed: start it with the present one, unless the operator has stopped it. Told the outcome by the channel's end.
    Relicense(Sender<()>),
    /// It could use another connection.
    Grow,
    /// There may be a turn for it to start its process.
    Proceed,
    /// A process has ended.
    Exited { process: u64 },
    /// A process does not do its part.
    Unresponsive {
        process: u64,
        /// In what.
        why: String,
    },
}

/// Why a plugin leaves the registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Quit {
    /// The host stops.
    HostStops,
    /// Its file is gone, or no plugin any more.
    Gone,
    /// Another plugin of its id takes its place, and the requests that wait, once it has ended.
    Replaced,
    /// Its update serves in its place already.
    Updated,
}

/// What the door does with a request.
#[repr(u8)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Admission {
    /// Refuses it: the plugin will not be there soon.
    Shut = 0,
    /// Keeps it for a while: the plugin is about to be there.
    Holding = 1,
    /// Lets it in.
    Open = 2,
}

/// A plugin of the registry.
pub(crate) struct Plugin {
    /// Who it is.
    pub(crate) metadata: Metadata,
    /// What is executed.
    pub(crate) program: PathBuf,
    /// Which file that was when it said who it is: no other is executed.
    pub(crate) fingerprint: Option<Fingerprint>,
    /// Where its processes listen.
    pub(crate) socket: PathBuf,
    /// Requests on their way to it.
    pub(crate) queue: Arc<Queue>,
    /// Connections of clients that it holds.
    pub(crate) slots: Slots,
    /// What it prints.
    pub(crate) log: PluginLog,
    /// Its supervisor.
    pub(crate) control: Sender<Command>,
    /// Requests of its clients that have ended.
    pub(crate) traffic: Traffic,
    /// Requests answered by it.
    pub(crate) answered: AtomicU64,
    /// Requests that it failed: each has a line in its log.
    pub(crate) failed: AtomicU64,
    /// What decides about the number of connections.
    pub(crate) scaling: Scaling,
    /// Connections that are taken by an answer that streams.
    streams: AtomicUsize,
    /// Throttles the warning that streams take every connection.
    streams_full: Mutex<Repeat>,
    admission: AtomicU8,
    status: Mutex<Status>,
    /// The licence on trial that it has refused last, and why.
    refused_license: Mutex<Option<(String, String)>>,
}

impl Plugin {
    /// A plugin whose supervisor is about to begin: one that may run is as good as starting.
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
        let queue = Arc::new(Queue::new(&metadata.id, metadata.concurrency as usize));
        Self {
            metadata,
            program: found.program.clone(),
            fingerprint: found.fingerprint,
            socket,
            queue,
            slots: Slots::default(),
            log,
            control,
            traffic: Traffic::default(),
            answered: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            scaling: Scaling::new(),
            streams: AtomicUsize::new(0),
            streams_full: Mutex::default(),
            admission: AtomicU8::new(admission as u8),
            status: Mutex::new(status),
            refused_license: Mutex::default(),
        }
    }

    /// The plugin's id.
    pub(crate) fn id(&self) -> &str {
        &self.metadata.id
    }

    /// Whether a request that comes now has a chance: looked at before its body is read.
    ///
    /// # Errors
    /// What to answer it with.
    pub(crate) fn admit(&self) -> Result<(), HttpError> {
        if self.admission.load(Ordering::Acquire) == Admission::Shut as u8 {
            return Err(errors::UNAVAILABLE.retry_after(self.retry_after()));
        }
        Ok(())
    }

    /// Takes a request: the plugin answers it, or the host for it. Never waits.
    ///
    /// # Errors
    /// The plugin cannot take it: the request, and what to answer it with.
    pub(crate) fn submit(&self, job: Job) -> Result<(), (Job, HttpError)> {
        if let Err(error) = self.admit() {
            return Err((job, error));
        }
        self.queue.push(job).map_err(|job| (job, errors::CROWDED))?;
        self.fail_if_shut();
        // Without a process there is nothing to grow, and the supervisor says so.
        self.ask_to_grow();
        Ok(())
    }

    /// Takes a request back that a worker had taken: the next worker of the queue serves it, of the next process if there is none.
    pub(crate) fn requeue(&self, job: Job) {
        self.queue.put_back(job);
        self.fail_if_shut();
    }

    /// Fails what waits if the door has been shut. Looked at after each request that is put in: whoever shuts the door then looks at the
    /// queue, so one of the two sees the request.
    fn fail_if_shut(&self) {
        if self.admission.load(Ordering::SeqCst) == Admission::Shut as u8 {
            self.queue.fail_all(errors::UNAVAILABLE.retry_after(self.retry_after()));
        }
    }

    /// Notes that nobody looks after it any more.
    pub(crate) fn abandon(&self, why: &str) {
        log::error!("{}: {why}", self.id());
        self.set_status(Admission::Shut, |status| {
            (status.state, status.since, status.pid, status.retry_at) = (State::Refused, now_ms(), None, None);
            status.reason = why.to_owned();
        });
        self.fail_waiting();
    }

    /// Fails the requests that have waited too long for a process: since they came, or since the last one fell, where that is later.
    pub(crate) fn expire_held(&self, down_since: Option<Instant>) {
        let held = |job: &Job| down_since.map_or(job.arrived(), |since| job.arrived().max(since)).elapsed() >= HOLD;
        self.queue.expire(held, |job| job.fail(errors::UNAVAILABLE.retry_after(STARTING_RETRY_AFTER)));
    }

    /// Fails the requests that wait, and those that come.
    pub(crate) fn fail_waiting(&self) {
        self.admission.store(Admission::Shut as u8, Ordering::SeqCst);
        self.queue.fail_all(errors::UNAVAILABLE.retry_after(self.retry_after()));
    }

    /// Whether a connection is to be closed that the plugin does not need any more. One at a time is.
    pub(crate) fn is_to_shrink(&self) -> bool {
        let decide = || self.scaling.decide(self.queue.len(), self.metadata.concurrency as usize) == Decision::Shrink;
        if !decide() || self.scaling.shrinking.swap(true, Ordering::Relaxed) {
            return false;
        }
        // Another may have been closed since.
        let shrinks = decide();
        self.scaling.shrinking.store(shrinks, Ordering::Relaxed);
        shrinks
    }

    /// Asks for one more connection when the requests that wait could use it.
    pub(crate) fn ask_to_grow(&self) {
        let growing = &self.scaling.growing;
        if self.scaling.decide(self.queue.len(), self.metadata.concurrency as usize) == Decision::Grow
            && !growing.swap(true, Ordering::Relaxed)
            && self.control.try_send(Command::Grow).is_err()
        {
            growing.store(false, Ordering::Relaxed);
        }
    }

    /// Counts an answer that streams, until it is dropped.
    pub(crate) fn count_stream(self: &Arc<Self>) -> CountedStream {
        self.streams.fetch_add(1, Ordering::Relaxed);
        CountedStream(Arc::clone(self))
    }

    /// Whether every connection that the plugin may have is taken by an answer that streams.
    pub(crate) fn is_full_of_streams(&self) -> bool {
        self.streams.load(Ordering::Relaxed) >= self.metadata.concurrency as usize
    }

    /// Why requests cannot be answered soon, where streams are the reason.
    pub(crate) fn congestion(&self) -> Option<String> {
        let most = self.metadata.concurrency;
        self.is_full_of_streams().then(|| {
            let streams = self.streams.load(Ordering::Relaxed);
            format!("{most} of {most} connections busy, {streams} by streams: raise concurrency")
        })
    }

    /// Warns in the host's log, at most once a minute, that streams take every connection.
    pub(crate) fn warn_of_streams(&self, why: &str) {
        let came = self.streams_full.locked().came(Instant::now());
        if let Some(unsaid) = came {
            log::warn!("{}: {why}{}", self.id(), more(unsaid));
        }
    }

    /// Tells the supervisor that a process does not do its part, and in what.
    pub(crate) fn unresponsive(&self, process: u64, why: String) {
        // A supervisor that is gone has no process either.
        drop(self.control.send(Command::Unresponsive { process, why }));
    }

    /// Counts a request that it failed, and writes the line about it to its log.
    pub(crate) fn note_failed(&self, line: &str) {
        self.failed.fetch_add(1, Ordering::Relaxed);
        self.log.note(line);
    }

    /// How the plugin is.
    pub(crate) fn status(&self) -> Status {
        self.lock_status().clone()
    }

    /// Notes that it has refused a licence on trial, and why; `None` forgets it.
    pub(crate) fn note_refused_license(&self, refused: Option<(String, String)>) {
        *self.refused_license.locked() = refused;
    }

    /// Why it has refused a licence on trial, if that is the one it has refused last.
    pub(crate) fn why_refused(&self, token: &str) -> Option<String> {
        let refused = self.refused_license.locked();
        refused.as_ref().filter(|(refused, _)| refused == token).map(|(_, why)| why.clone())
    }

    /// The code by which a plugin of this status has refused its licence, if that is why it does not run.
    pub(crate) fn license_refused(status: &Status) -> Option<Code> {
        match (status.state, status.last_end.as_deref()?.exit) {
            (State::Unlicensed | State::BackingOff, Exit::Unlicensed(code)) => Some(code),
            _ => None,
        }
    }

    /// What the operator can do for a plugin of this status to run; nothing when it does, or is about to.
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

    /// Notes its process, and the limits that this was started with. Only its supervisor does, here and below.
    pub(crate) fn set_process(&self, pid: i32, limits: LimitsInForce) {
        let mut status = self.lock_status();
        (status.pid, status.limits) = (Some(pid), Some(limits));
    }

    /// Notes whether it may run.
    pub(crate) fn set_enabled(&self, enabled: bool) {
        self.lock_status().enabled = enabled;
    }

    /// Counts a start by itself.
    pub(crate) fn count_restart(&self) {
        self.lock_status().restarts += 1;
    }

    /// What was found under this name in the plugins directory when it was accepted.
    pub(crate) fn found(&self, file: &str) -> Found {
        Found { file: file.to_owned(), program: self.program.clone(), fingerprint: self.fingerprint }
    }

    /// Whether the file at its program's place is still the one that said who it is.
    pub(crate) fn is_unchanged(&self) -> bool {
        discovery::fingerprint(&self.program) == self.fingerprint
    }

    /// Notes why the file that lies in its program's place now does not run; none when it is the old one again.
    pub(crate) fn set_update_refused(&self, reason: Option<String>) {
        self.lock_status().update_refused = reason;
    }

    /// Notes an end that nobody asked for.
    pub(crate) fn set_last_end(&self, end: End) {
        self.lock_status().last_end = Some(Arc::new(end));
    }

    /// Changes what is told of the plugin.
    pub(crate) fn set_status(&self, admission: Admission, change: impl FnOnce(&mut Status)) {
        change(&mut self.lock_status());
        self.admission.store(admission as u8, Ordering::SeqCst);
    }

    fn retry_after(&self) -> u64 {
        let status = self.lock_status();
        let until = status.retry_at.map(|at| at.saturating_duration_since(Instant::now()).as_secs() + 1);
        until.unwrap_or(DOWN_RETRY_AFTER).min(MAX_RETRY_AFTER)
    }

    fn lock_status(&self) -> MutexGuard<'_, Status> {
        // A status is plain values: one that was being changed is still one.
        self.status.locked()
    }
}

/// An answer that streams.
pub(crate) struct CountedStream(Arc<Plugin>);

impl Drop for CountedStream {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}
