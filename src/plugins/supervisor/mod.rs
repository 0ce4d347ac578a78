//! The supervisor of one plugin: a thread that owns the plugin's process, state and workers.
//!
//! Everything that happens to a plugin arrives as a [`Command`]. Only [`Supervisor::enter`] changes the state, and it records each
//! change as an event. The thread lives as long as the plugin is registered, because the kernel kills its children when it ends.

mod start;
mod stop;

use crate::apps::http_connection::HttpConnection;
use crate::apps::manifest::Listen;
use crate::apps::probe::Probe;
use crate::http::errors;
use crate::licensing::wait::LicenseWait;
use crate::plugins::attempt::Search;
use crate::plugins::connection::frames::FrameConnection;
use crate::plugins::context::Context;
use crate::plugins::plugin::{Admission, Command, HOLD, Plugin, Quit, STARTING_RETRY_AFTER, State};
use crate::plugins::process_state::ProcessState;
use crate::plugins::restart_policy::{History, Run};
use crate::plugins::start_turns::Turn;
use crate::process::Process;
use crate::process::exit::Exit;
use crate::protocol::message::Failure;
use crate::store::licenses::Given;
use crate::store::limits::LimitsInForce;
use crate::store::now_ms;
use crate::system::rlimits::{self, PluginSlot};
use crate::util::log_throttle::{LogThrottle, suppressed_note};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use signal_hook::consts::SIGKILL;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Commands that may wait for a supervisor. It takes them between its steps, some of which wait for the database or for the end of a
/// process, for seconds at most.
pub(crate) const COMMANDS: usize = 64;

/// Time for a plugin to exit after `shutdown`.
const SHUTDOWN_TIME: Duration = Duration::from_secs(3);

/// Time from SIGTERM to SIGKILL, after that.
const TERMINATE_TIME: Duration = Duration::from_secs(2);

/// Time for a plugin to exit after it answered `init` with an error.
const LEAVE_TIME: Duration = Duration::from_secs(2);

/// Time for a starting process to exit after its first connection closed: its exit code and last output explain more.
const START_SETTLE_TIME: Duration = Duration::from_secs(1);

/// How both the kernel's out-of-memory killer and an operator's `kill -9` end a process.
const KILLED: Exit = Exit::Signal(SIGKILL);

/// Interval at which a plugin whose file was replaced checks whether the old file is back.
const FILE_CHECK_PAUSE: Duration = Duration::from_secs(1);

/// Interval at which an application that the host does not start is looked at, and time after which it is tried again.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Pause between attempts to connect to a starting plugin.
const CONNECT_PAUSE: Duration = Duration::from_millis(5);

/// Interval at which requests that wait for a start are checked for expiry.
pub(crate) const HOLD_TICK: Duration = Duration::from_millis(100);

/// Stack size of a worker in bytes: its buffers are on the heap.
const WORKER_STACK: usize = 512 * 1024;

/// The number of the next process of any plugin. Unique in this run of the host, so that a supervisor that takes over after a panic
/// ignores commands about its predecessor's processes.
static NEXT_PROCESS_NUMBER: AtomicU64 = AtomicU64::new(1);

/// The phase of a supervisor.
enum Phase {
    /// No process.
    Down { retry_at: Option<Instant> },
    /// A process that is not ready yet. `told` is set if it refused `init`, `broken` if the connection failed, with the reason.
    Starting { running: Running, contact: Contact, deadline: Instant, told: Option<Failure>, broken: Option<String> },
    /// A ready process.
    Ready { running: Running },
    /// A process that was told to end.
    Stopping { running: Running, terminate_at: Option<Instant>, kill_at: Instant, then: Then },
}

/// How the host finds out whether a process is ready.
enum Contact {
    /// It does not: there is no process, or none that listens.
    None,
    /// By `init`, on a connection that is there once the process listens.
    Init(Option<Box<FrameConnection>>),
    /// By a connection, or a request.
    Probe(Box<Probe>),
}

/// A process and its resources.
struct Running {
    /// None if the host starts none.
    process: Option<Process>,
    state: Arc<ProcessState>,
    /// Dropping it stops the workers.
    stop: Option<Sender<()>>,
    started: Instant,
    /// Whether the process has answered `init` with `ready`.
    ready: bool,
    limits: LimitsInForce,
    /// The turn to start, held until the process is ready.
    turn: Option<Turn>,
    _slot: PluginSlot,
}

impl Running {
    fn pid(&self) -> Option<i32> {
        self.process.as_ref().map(Process::pid)
    }

    /// How far the process has come.
    fn so_far(&self) -> Run {
        Run { uptime: self.started.elapsed(), ready: self.ready, work: self.state.work() }
    }
}

/// What follows once a process that was told to end has ended.
enum Then {
    Stay,
    Start,
    /// Treat it as a fault of the process.
    Fault(Exit, String),
    /// Treat it as a lack of capacity.
    WaitForCapacity(String),
}

/// The supervisor of one plugin.
pub(crate) struct Supervisor {
    plugin: Arc<Plugin>,
    context: Arc<Context>,
    commands: Receiver<Command>,
    phase: Phase,
    history: History,
    /// Throttles the log line about connections that cannot be opened.
    growth: LogThrottle,
    /// Why the plugin is being removed from the registry, if it is.
    quitting: Option<Quit>,
    /// Since when there is no ready process.
    down_since: Option<Instant>,
    /// Whether the plugin waits for its turn to start.
    waits_for_turn: bool,
    /// Whether the last start failed for lack of capacity.
    wants_capacity: bool,
    /// The licence that the current process got in `init`.
    given: Given,
    /// The wait for a licence that the plugin refused as not valid yet.
    license_wait: Option<LicenseWait>,
    /// Callers that wait until the plugin is ready or down.
    waiting: Vec<Sender<()>>,
    /// Whether an update has taken over from the plugin.
    updated: bool,
    /// The socket that the host has made for the plugin. It outlives its processes, so that connections wait for the next one.
    listener: Option<OwnedFd>,
    /// When to look whether an application that the host does not start still listens.
    look_at: Option<Instant>,
    /// The search for where the application listens, if it is free to choose.
    search: Option<Search>,
    /// Gets the outcome of an update's first start. If that fails, there is no second one.
    trial: Option<Trial>,
    /// Set if no other supervisor is to take over after a panic, because the plugin is being removed from the registry.
    leaves: Arc<AtomicBool>,
}

/// Callback with the outcome of an update's trial: ready, or the reason why not.
pub(crate) type Trial = Box<dyn FnOnce(Result<(), String>) + Send>;

impl Supervisor {
    /// Creates the supervisor of a plugin that does not run yet. An update on `trial` is started once, beside the plugin it replaces.
    /// After a panic of [`Supervisor::run`], `leaves` says whether the plugin is being removed from the registry, so that nothing takes
    /// over.
    pub(crate) fn new(
        plugin: Arc<Plugin>,
        context: Arc<Context>,
        commands: Receiver<Command>,
        trial: Option<Trial>,
        leaves: Arc<AtomicBool>,
    ) -> Self {
        let phase = Phase::Down { retry_at: None };
        let (history, waiting) = (History::default(), Vec::new());
        let is_attached = plugin.run().is_some_and(|run| matches!(run.listen, Listen::Attached(_)));
        let search = context.attempt.as_ref().filter(|attempt| attempt.is_free).map(|_| Search::default());
        Self {
            plugin,
            context,
            commands,
            phase,
            history,
            growth: LogThrottle::default(),
            quitting: None,
            down_since: None,
            waits_for_turn: false,
            wants_capacity: false,
            given: Given::default(),
            license_wait: None,
            waiting,
            updated: false,
            listener: None,
            look_at: is_attached.then(Instant::now),
            search,
            trial,
            leaves,
        }
    }

    /// Starts the plugin if it is enabled, and supervises it until told to quit.
    pub(crate) fn run(mut self) {
        if self.plugin.status().enabled {
            self.start();
        } else {
            self.enter(State::Stopped, Admission::Shut, "stopped", "disabled by the operator");
        }
        loop {
            let command = match self.next_wake() {
                Some(wake) => self.commands.recv_deadline(wake),
                None => self.commands.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match command {
                Ok(command) => self.obey(command),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => self.quitting = Some(Quit::Gone),
            }
            self.step();
            if self.quitting.is_some() && matches!(self.phase, Phase::Down { .. }) {
                return;
            }
        }
    }

    /// The next deadline, if there is one.
    fn next_wake(&self) -> Option<Instant> {
        let now = Instant::now();
        let phase = match &self.phase {
            Phase::Down { retry_at } => *retry_at,
            Phase::Starting { contact: Contact::Init(None) | Contact::Probe(_), .. } => Some(now + CONNECT_PAUSE),
            Phase::Starting { broken: Some(_), deadline, .. } => Some(*deadline),
            // In this phase `step` waits on the connection.
            Phase::Starting { .. } => Some(now),
            Phase::Ready { .. } => self.look_at,
            Phase::Stopping { terminate_at, kill_at, .. } => Some(terminate_at.unwrap_or(*kill_at)),
        };
        let held = (!matches!(self.phase, Phase::Ready { .. }) && self.holds()).then_some(now + HOLD_TICK);
        [phase, held].into_iter().flatten().min()
    }

    /// Whether requests may wait for the plugin to become ready.
    fn holds(&self) -> bool {
        match &self.phase {
            Phase::Down { retry_at } => retry_at.is_some_and(|at| at.saturating_duration_since(Instant::now()) < HOLD),
            Phase::Stopping { then, .. } => !matches!(then, Then::Stay),
            _ => true,
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            // The plugin will not start again. Dropping the channel tells the caller that it has settled.
            Command::Start(_) | Command::Restart(_) | Command::Relicense(_) | Command::Reconsider if self.quitting.is_some() => {}
            Command::Start(done) => {
                self.waiting.push(done);
                match &mut self.phase {
                    Phase::Down { .. } => {
                        self.history = History::default();
                        self.start();
                    }
                    Phase::Stopping { .. } => self.stop("started again by the operator", Then::Start),
                    Phase::Starting { .. } => {}
                    Phase::Ready { .. } => self.waiting.clear(),
                }
            }
            Command::Stop(done) => {
                self.waiting.push(done);
                self.stop("stopped by the operator", Then::Stay);
            }
            Command::Restart(done) => {
                self.waiting.push(done);
                self.history = History::default();
                if matches!(self.phase, Phase::Down { .. }) {
                    self.start();
                } else {
                    self.stop("restarted by the operator", Then::Start);
                }
            }
            Command::Quit(quit) => {
                self.quitting = Some(quit);
                self.updated |= quit == Quit::Updated;
                let why = match quit {
                    Quit::HostStops => "the host stops",
                    Quit::Gone => "its file is gone, or refused",
                    Quit::Replaced => "its file was replaced",
                    Quit::Updated => "its update serves in its place",
                };
                self.stop(why, Then::Stay);
            }
            Command::Enabled(enabled) => self.plugin.set_enabled(enabled),
            Command::Reconsider => {
                let status = self.plugin.status();
                if status.state.is_refused() && status.enabled {
                    self.start();
                }
            }
            Command::Relicense(done) => {
                let stopped = self.plugin.status().state == State::Stopped;
                match &mut self.phase {
                    Phase::Stopping { then: Then::Stay, .. } => {}
                    Phase::Stopping { then, .. } => {
                        self.waiting.push(done);
                        *then = Then::Start;
                    }
                    Phase::Down { .. } if stopped => {}
                    Phase::Down { .. } => {
                        self.waiting.push(done);
                        self.history = History::default();
                        self.start();
                    }
                    Phase::Starting { .. } | Phase::Ready { .. } => {
                        self.waiting.push(done);
                        self.stop("its licence has changed", Then::Start);
                    }
                }
            }
            Command::Grow => match &self.phase {
                Phase::Ready { running }
                    if self.plugin.scaling.connections.load(Ordering::Relaxed) < self.plugin.metadata.concurrency as usize =>
                {
                    if let Err(error) = self.spawn_worker(&running.state, None, false)
                        && let Some(suppressed) = self.growth.hit(Instant::now())
                    {
                        let said = rlimits::explain("the host cannot open another connection to it", &error).0;
                        log::warn!("{}: {said}{}", self.plugin.id(), suppressed_note(suppressed));
                    }
                }
                _ => self.plugin.scaling.growing.store(false, Ordering::Relaxed),
            },
            Command::Proceed => {
                if self.waits_for_turn && matches!(self.phase, Phase::Down { .. }) {
                    self.start();
                }
            }
            Command::Exited { process } => self.exited(process),
            Command::Drained { process } => self.drained(process),
            Command::Unresponsive { process, why } => {
                if matches!(&self.phase, Phase::Ready { running } if running.state.number == process) {
                    self.fault(Exit::Fault, why);
                }
            }
        }
    }

    /// Advances the current phase, and handles deadlines that have passed.
    fn step(&mut self) {
        let now = Instant::now();
        match &mut self.phase {
            Phase::Down { retry_at: Some(at) } if now >= *at && self.quitting.is_none() => {
                let (time, wait) = (
                    self.context.license_clock.now(),
                    self.license_wait.filter(|_| self.plugin.status().state == State::Unlicensed),
                );
                if let Some(early) = wait.filter(|wait| wait.is_early(time)) {
                    self.phase = Phase::Down { retry_at: Some(now + early.pause(time)) };
                    return;
                }
                if !self.waits_for_turn && wait.is_none() {
                    self.plugin.count_restart();
                }
                self.start();
            }
            Phase::Starting { .. } => self.go_on_starting(now),
            Phase::Stopping { running, terminate_at, kill_at, .. } => {
                if terminate_at.is_some_and(|at| now >= at) {
                    *terminate_at = None;
                    running.process.iter().for_each(Process::terminate);
                } else if now >= *kill_at {
                    *kill_at = now + TERMINATE_TIME;
                    match &running.process {
                        Some(process) => process.kill(),
                        None => {
                            let number = running.state.number;
                            self.exited(number);
                        }
                    }
                }
            }
            Phase::Ready { running } if self.look_at.is_some_and(|at| now >= at) => {
                self.look_at = Some(now + LOOK_EVERY);
                let endpoint = running.state.endpoint.clone();
                if let Err(error) = HttpConnection::open(&endpoint, None, true) {
                    self.fault(Exit::Fault, format!("nobody listens on {endpoint}: {error}"));
                }
            }
            Phase::Down { .. } | Phase::Ready { .. } => {}
        }
        if !matches!(self.phase, Phase::Ready { .. }) && self.holds() {
            // Requests that waited for the previous process get the same time as new ones.
            self.plugin.expire_held(self.down_since);
        }
    }

    /// Changes the state. Nothing else does.
    fn enter(&mut self, state: State, admission: Admission, kind: &str, reason: &str) {
        let id = self.plugin.id();
        let (pid, retry_at) = match &self.phase {
            // The expected start; the phase has the next check of the clock.
            Phase::Down { retry_at } => {
                let time = self.context.license_clock.now();
                let wait = self.license_wait.filter(|_| state == State::Unlicensed && retry_at.is_some());
                (None, wait.and_then(|wait| Instant::now().checked_add(wait.left(time))).or(*retry_at))
            }
            Phase::Starting { running, .. } | Phase::Ready { running } | Phase::Stopping { running, .. } => (running.pid(), None),
        };
        // First the event, so that whoever sees the state also sees its event. Changes of an update on trial, and of the process it
        // replaces, are not events of the plugin.
        let is_aside = self.has_sibling() && state != State::Ready;
        if !is_aside {
            self.context.store.note_event(id, kind, reason);
        }
        self.plugin.set_status(admission, |status| {
            (status.state, status.since, status.pid, status.retry_at) = (state, now_ms(), pid, retry_at);
            status.reason.clear();
            status.reason.push_str(reason);
        });
        if state == State::Ready {
            self.license_wait = None;
            self.down_since = None;
        } else {
            self.down_since.get_or_insert_with(Instant::now);
        }
        let level = match state {
            State::BackingOff | State::CrashLooping | State::Refused | State::Unlicensed => log::Level::Warn,
            _ => log::Level::Info,
        };
        let separator = if reason.is_empty() { "" } else { ": " };
        let which = match (self.updated, &self.trial) {
            (true, _) => " (the old process)",
            (false, Some(_)) => " (the update)",
            (false, None) => "",
        };
        log::log!(level, "{id}{which}: {kind}{separator}{reason}");
        if admission == Admission::Shut {
            self.plugin.queue.fail_all(errors::UNAVAILABLE.retry_after(STARTING_RETRY_AFTER));
        }
        if !matches!(state, State::Starting | State::Stopping) {
            self.waiting.clear();
            self.end_trial(state, reason);
        }
    }

    /// Reports the outcome of an update's trial. A failed update is not started again.
    fn end_trial(&mut self, state: State, reason: &str) {
        let Some(trial) = self.trial.take() else { return };
        if state == State::Ready {
            return trial(Ok(()));
        }
        self.phase = Phase::Down { retry_at: None };
        self.quitting = Some(Quit::Gone);
        trial(Err(reason.to_owned()));
    }
}

impl Drop for Supervisor {
    /// After a panic: ends the process, and tells the registry of an update on trial that it has failed.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        if self.quitting.is_some() || self.trial.is_some() {
            self.leaves.store(true, Ordering::Relaxed);
        }
        match std::mem::replace(&mut self.phase, Phase::Down { retry_at: None }) {
            Phase::Down { .. } => {}
            Phase::Starting { running, .. } | Phase::Ready { running } | Phase::Stopping { running, .. } => {
                self.finish(running);
            }
        }
        if let Some(trial) = self.trial.take() {
            trial(Err("its supervisor failed, which is a bug in plugrack: the host's log has the reason".into()));
        }
    }
}
