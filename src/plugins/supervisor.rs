//! The supervisor of one plugin: a thread that owns the plugin's process, state and workers.
//!
//! Everything that happens to a plugin arrives as a [`Command`]. Only [`Supervisor::enter`] changes the state, and it records each
//! change as an event. The thread lives as long as the plugin is registered, because the kernel kills its children when it ends.

use crate::http::errors;
use crate::license::{Code, Time, unverified};
use crate::licensing::status;
use crate::licensing::wait::LicenseWait;
use crate::plugins::connection::{Connection, FIRST_ID, WaitError};
use crate::plugins::context::{Context, HOST_SOCKET_VARIABLE, Owner};
use crate::plugins::plugin::{Admission, Command, End, HOLD, Plugin, Quit, STARTING_RETRY_AFTER, State};
use crate::plugins::restart_policy::{Decision, History, Run};
use crate::plugins::start_turns::{TURN_CHECK, Turn};
use crate::plugins::worker::{ProcessState, Worker};
use crate::process::exit::Exit;
use crate::process::failure_line::failure_line;
use crate::process::preflight;
use crate::process::{Process, Reach, SOCKET_VARIABLE};
use crate::protocol::message::{Failure, HostInfo, Init, Message, PROTOCOL_VERSION, WRONG_PROTOCOL};
use crate::store::licenses::Given;
use crate::store::limits::LimitsInForce;
use crate::store::{StoreError, now_ms};
use crate::system::data_dir::check_socket_path;
use crate::system::rlimits::{self, CAPACITY_RETRY, PluginSlot};
use crate::util::log_throttle::{LogThrottle, suppressed_note};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use signal_hook::consts::SIGKILL;
use std::ffi::OsStr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
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
    /// A process that is not ready yet. `connection` is set once it listens, `told` if it refused `init`, `broken` if the
    /// connection failed, with the reason.
    Starting {
        running: Running,
        connection: Option<Connection>,
        deadline: Instant,
        told: Option<Failure>,
        broken: Option<String>,
    },
    /// A ready process.
    Ready { running: Running },
    /// A process that was told to end.
    Stopping { running: Running, terminate_at: Option<Instant>, kill_at: Instant, then: Then },
}

/// A process and its resources.
struct Running {
    process: Process,
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
    fn pid(&self) -> i32 {
        self.process.pid()
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
            Phase::Starting { connection: None, .. } => Some(now + CONNECT_PAUSE),
            Phase::Starting { broken: Some(_), deadline, .. } => Some(*deadline),
            // In this phase `step` waits on the connection.
            Phase::Starting { .. } => Some(now),
            Phase::Ready { .. } => None,
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
                    if let Err(error) = self.spawn_worker(&running.state, None)
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
                    running.process.terminate();
                } else if now >= *kill_at {
                    *kill_at = now + TERMINATE_TIME;
                    running.process.kill();
                }
            }
            Phase::Down { .. } | Phase::Ready { .. } => {}
        }
        if !matches!(self.phase, Phase::Ready { .. }) && self.holds() {
            // Requests that waited for the previous process get the same time as new ones.
            self.plugin.expire_held(self.down_since);
        }
    }

    /// Starts a process.
    fn start(&mut self) {
        if self.quitting.is_some() {
            return;
        }
        self.phase = Phase::Down { retry_at: None };
        // A plugin that already waits for capacity or its turn changes its state only once.
        if !self.wants_capacity && !self.waits_for_turn {
            self.enter(State::Starting, Admission::Holding, "starting", "");
        }
        let now = Instant::now();
        let Some(turn) = self.context.starts.take(&self.plugin.control, now) else {
            self.waits_for_turn = true;
            self.phase = Phase::Down { retry_at: Some(now + TURN_CHECK) };
            return;
        };
        self.waits_for_turn = false;
        match self.spawn(turn) {
            Ok(running) => {
                let deadline = running.started + running.limits.start_timeout;
                self.plugin.set_process(running.pid(), running.limits);
                self.phase = Phase::Starting { running, connection: None, deadline, told: None, broken: None };
                if std::mem::take(&mut self.wants_capacity) {
                    self.enter(State::Starting, Admission::Holding, "starting", "");
                }
            }
            Err((Exit::NoCapacity, why)) => self.wait_for_capacity(&why),
            Err((exit, why)) => self.down(exit, Run::default(), &why),
        }
    }

    /// There are not enough files, threads or memory for the plugin. That is not its fault, so it is retried until there are.
    fn wait_for_capacity(&mut self, why: &str) {
        let said = std::mem::replace(&mut self.wants_capacity, true) && self.plugin.status().reason == why;
        let retry_at = Some(Instant::now() + CAPACITY_RETRY);
        self.phase = Phase::Down { retry_at };
        if said {
            self.plugin.set_status(Admission::Shut, |status| status.retry_at = retry_at);
        } else {
            self.plugin.set_last_end(End { at: now_ms(), exit: Exit::NoCapacity, reason: why.to_owned(), lines: Vec::new() });
            self.enter(State::BackingOff, Admission::Shut, "no_room", why);
        }
        self.waiting.clear();
    }

    fn spawn(&mut self, turn: Turn) -> Result<Running, (Exit, String)> {
        let unfit = |why: String| (Exit::Unfit, why);
        if !self.plugin.is_unchanged() {
            self.context.request_scan();
            return Err((Exit::Changed, Exit::Changed.to_string()));
        }
        preflight::check(&self.plugin.program).map_err(unfit)?;
        let (data, id) = (&self.context.data, self.plugin.id());
        check_socket_path(&self.plugin.socket).map_err(unfit)?;
        let slot = self.context.capacity.enter().map_err(|why| (Exit::NoCapacity, why))?;
        let passing = |what: &str, error: std::io::Error| match rlimits::explain(what, &error) {
            (why, true) => (Exit::NoCapacity, why),
            (why, false) => (Exit::NotStarted, why),
        };
        let no_user = |why: String| (Exit::NoUser, why);
        let mut bounds = self.context.plugin_bounds(id).map_err(no_user)?;
        let unreadable = |error: StoreError| (Exit::NotStarted, format!("cannot read its environment and limits: {error}"));
        let limits = self.context.limits(id).map_err(unreadable)?;
        bounds.open_files = limits.open_files;
        let variables = self.context.store.env(id).map_err(unreadable)?;
        bounds.variables.extend(variables.into_iter().map(|(name, value)| (name.into(), value.into())));
        let uid = bounds.uid;
        let (home, socket) = (data.plugin_data(id), self.plugin.socket.clone());
        self.remove_run().map_err(|error| passing("cannot remove its old socket", error))?;
        let directories = data.make_plugin_dirs(id).map_err(|error| passing("cannot make its directories", error))?;
        self.context.chown_dirs(id, uid, &directories).map_err(no_user)?;
        let number = NEXT_PROCESS_NUMBER.fetch_add(1, Ordering::Relaxed);
        self.given = Given::default();
        self.plugin.log.begin(uid);
        let (stop, stopped) = bounded(0);
        let (alive, exited) = bounded::<()>(0);
        let host_socket = data.host_socket();
        let version = PROTOCOL_VERSION.to_string();
        let env: [(&str, &OsStr); 5] = [
            (SOCKET_VARIABLE, socket.as_os_str()),
            (HOST_SOCKET_VARIABLE, host_socket.as_os_str()),
            ("PLUGRACK_PROTOCOL", version.as_ref()),
            ("PLUGRACK_PLUGIN_ID", id.as_ref()),
            ("HOME", home.as_os_str()),
        ];
        let start = || Process::start(&self.plugin.program, &home, &env, &bounds, &self.plugin.log, id);
        let owner = Owner::new(id, uid, &self.plugin.log);
        let process = self
            .context
            .sessions
            .enter(owner, start, Process::pid)
            .map_err(|error| passing("cannot start its process", error))?;
        let state = ProcessState {
            number,
            socket,
            uid,
            stop: stopped,
            exited,
            exit: OnceLock::new(),
            asked: AtomicBool::new(false),
            served: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            unaccepted: AtomicUsize::new(0),
            request_timeout: limits.request_timeout,
        };
        let state = Arc::new(state);
        let running = Running {
            process,
            state: Arc::clone(&state),
            stop: Some(stop),
            started: Instant::now(),
            ready: false,
            limits,
            turn: Some(turn),
            _slot: slot,
        };
        let control = self.plugin.control.clone();
        let tell = move |exit: Option<Exit>| {
            // First wakes the workers, which fail the requests of the dead process; the supervisor may be busy.
            if let Some(exit) = exit {
                state.exit.set(exit).ok();
            }
            state.ended.store(true, Ordering::Release);
            drop(alive);
            // The supervisor may be gone.
            drop(control.send(Command::Exited { process: number }));
        };
        match running.process.on_exit(id, tell) {
            Ok(()) => Ok(running),
            Err(error) => {
                self.finish(running);
                Err(passing("cannot watch its process", error))
            }
        }
    }

    /// Advances a start: connects, sends `init`, waits for `ready`, each for one tick at most.
    fn go_on_starting(&mut self, now: Instant) {
        if matches!(&self.phase, Phase::Starting { connection: None, .. }) {
            return self.try_init(now);
        }
        let Phase::Starting { connection: Some(open), deadline, told, broken, .. } = &mut self.phase else { return };
        if now >= *deadline {
            return match (told.take(), broken.take()) {
                (Some(told), _) => self.fault(refusal(&told).unwrap_or(Exit::Fault), told_text(&told)),
                (None, Some(broken)) => self.fault(Exit::Fault, broken),
                (None, None) => {
                    let unfinished = open.unfinished().map(|unfinished| format!(": {unfinished}")).unwrap_or_default();
                    self.too_late(&format!("it did not answer init{unfinished}"));
                }
            };
        }
        if broken.is_some() {
            return;
        }
        let reply = match open.wait(now, || false) {
            Ok(()) => open
                .take()
                .map_err(|error| format!("its first connection ended before it was ready: {error}"))
                .and_then(|frame| frame.message().map_err(|error| format!("its answer to init is not valid: {error}"))),
            Err(WaitError::Deadline | WaitError::Interrupted) => return,
            Err(WaitError::Broken(error)) => Err(format!("its first connection ended before it was ready: {error}")),
        };
        match reply {
            Ok(Message::Ready(ready)) if ready.id == FIRST_ID => self.ready(),
            Ok(Message::Error(error)) if error.id == FIRST_ID => {
                *told = Some(error);
                *deadline = now.checked_add(LEAVE_TIME).map_or(*deadline, |leave| leave.min(*deadline));
            }
            Ok(other) => {
                let what = format!("it answered init with {} (id {}), not with ready (id {FIRST_ID})", other.kind(), other.id());
                self.fault(Exit::Fault, what);
            }
            // An exiting process closes its connection a moment before its exit code, which explains more, is known.
            Err(error) => {
                *broken = Some(error);
                *deadline = now.checked_add(START_SETTLE_TIME).map_or(*deadline, |settled| settled.min(*deadline));
            }
        }
    }

    /// Connects to a starting process and sends `init`, if it already listens.
    fn try_init(&mut self, now: Instant) {
        let Phase::Starting { running, deadline, .. } = &self.phase else { return };
        let Ok(mut opened) = Connection::connect(&running.state.socket, running.state.uid) else {
            if now >= *deadline {
                let socket = running.state.socket.display().to_string();
                self.too_late(&format!("it does not listen on its socket {socket} (PLUGRACK_SOCKET)"));
            }
            return;
        };
        let init = self.init(opened.next_id());
        match init.and_then(|init| opened.queue(&init, &[]).map_err(|error| error.to_string())) {
            Ok(()) => {
                if let Phase::Starting { connection, .. } = &mut self.phase {
                    *connection = Some(opened);
                }
            }
            Err(error) => self.fault(Exit::Fault, format!("cannot send it init: {error}")),
        }
    }

    fn too_late(&mut self, what: &str) {
        let Phase::Starting { running, .. } = &self.phase else { return };
        self.fault(Exit::Fault, format!("it was not ready within {} s: {what}", running.limits.start_timeout.as_secs_f32()));
    }

    /// Ends a faulty process.
    fn fault(&mut self, exit: Exit, why: String) {
        self.stop(&why.clone(), Then::Fault(exit, why));
    }

    fn init(&mut self, id: u64) -> Result<Init, String> {
        self.given = self.context.store.given_license(self.plugin.id()).map_err(|error| error.to_string())?;
        let (data, plugin) = (&self.context.data, self.plugin.id());
        let text = |path: PathBuf| path.to_string_lossy().into_owned();
        Ok(Init {
            id,
            protocol: PROTOCOL_VERSION,
            instance_id: self.context.instance_id.to_string(),
            plugin_id: plugin.to_owned(),
            socket_path: text(self.plugin.socket.clone()),
            host_socket: text(data.host_socket()),
            log_path: text(data.log(plugin)),
            data_dir: text(data.plugin_data(plugin)),
            license: self.given.token.clone(),
            not_before_time: self.context.license_clock.mark(),
            config: self.context.store.config(plugin).map_err(|error| error.to_string())?,
            host: HostInfo { name: env!("CARGO_PKG_NAME").into(), version: env!("CARGO_PKG_VERSION").into() },
        })
    }

    fn ready(&mut self) {
        if !self.plugin.is_unchanged() {
            self.context.request_scan();
            return self.fault(Exit::Changed, Exit::Changed.to_string());
        }
        if let Given { token: Some(token), previous: Some(_) } = std::mem::take(&mut self.given) {
            // If this fails, the store has logged why, and the licence is on trial again at the next start.
            self.context.store.accept_license(self.plugin.id(), &token).ok();
        }
        match std::mem::replace(&mut self.phase, Phase::Down { retry_at: None }) {
            Phase::Starting { mut running, connection: Some(connection), .. } => {
                running.ready = true;
                running.turn = None;
                let working = self.spawn_worker(&running.state, Some(connection));
                self.phase = Phase::Ready { running };
                match working {
                    Ok(()) => {
                        self.enter(State::Ready, Admission::Open, "ready", "");
                        self.context.warn_of_license(self.plugin.id());
                    }
                    Err(error) => {
                        let (why, _) = rlimits::explain("cannot start its worker", &error);
                        self.stop(&why.clone(), Then::WaitForCapacity(why));
                    }
                }
            }
            phase => self.phase = phase,
        }
    }

    /// Starts a worker with an open connection, or one that opens its own.
    fn spawn_worker(&self, state: &Arc<ProcessState>, connection: Option<Connection>) -> std::io::Result<()> {
        let (plugin, state) = (Arc::clone(&self.plugin), Arc::clone(state));
        plugin.scaling.connections.fetch_add(1, Ordering::Relaxed);
        let thread = std::thread::Builder::new().name(format!("worker-{}", plugin.id())).stack_size(WORKER_STACK);
        let spawned = thread.spawn(move || {
            let counted = CountedConnection { plugin: &plugin, state: &state };
            let worker = match connection {
                Some(connection) => Some(Worker::new(Arc::clone(&plugin), Arc::clone(&state), connection)),
                None => Worker::connect(Arc::clone(&plugin), Arc::clone(&state)),
            };
            plugin.scaling.growing.store(false, Ordering::Relaxed);
            plugin.ask_to_grow();
            if let Some(worker) = worker {
                worker.run();
            }
            drop(counted);
        });
        if spawned.is_err() {
            self.plugin.scaling.connections.fetch_sub(1, Ordering::Relaxed);
            self.plugin.scaling.growing.store(false, Ordering::Relaxed);
        }
        spawned.map(drop)
    }

    /// Makes the process end, if there is one: through its workers, which send `shutdown`, or by a signal if it is not ready or faulty.
    fn stop(&mut self, why: &str, then: Then) {
        let admission = if matches!(then, Then::Stay) { self.shut() } else { Admission::Holding };
        let now = Instant::now();
        match std::mem::replace(&mut self.phase, Phase::Down { retry_at: None }) {
            Phase::Down { .. } => self.stopped(why),
            Phase::Starting { running, .. } => self.stopping(running, now, admission, why, then),
            Phase::Ready { running } if matches!(then, Then::Fault(..) | Then::WaitForCapacity(_)) => {
                self.stopping(running, now, admission, why, then)
            }
            Phase::Ready { running } => {
                // The update already serves, so requests under way may take the full request timeout.
                let time = if self.updated { running.limits.request_timeout.max(SHUTDOWN_TIME) } else { SHUTDOWN_TIME };
                self.stopping(running, now + time, admission, why, then);
            }
            Phase::Stopping { running, terminate_at, kill_at, .. } => {
                // When the host stops, the longer time of an updated process is cut to that of all others.
                let terminate_at = terminate_at.map(|at| at.min(now + SHUTDOWN_TIME));
                let kill_at = kill_at.min(now + SHUTDOWN_TIME + TERMINATE_TIME);
                self.phase = Phase::Stopping { running, terminate_at, kill_at, then };
                // Requests that wait for a process that will not come now are answered; later ones may be held again.
                self.enter(State::Stopping, admission, "stopping", why);
            }
        }
    }

    fn stopping(&mut self, mut running: Running, terminate_at: Instant, admission: Admission, why: &str, then: Then) {
        running.state.stopping.store(true, Ordering::Relaxed);
        running.stop = None;
        self.phase = Phase::Stopping { running, terminate_at: Some(terminate_at), kill_at: terminate_at + TERMINATE_TIME, then };
        self.enter(State::Stopping, admission, "stopping", why);
    }

    /// Handles the end of a process, expected or not.
    fn exited(&mut self, number: u64) {
        let current = match &self.phase {
            Phase::Down { .. } => None,
            Phase::Starting { running, .. } | Phase::Ready { running } | Phase::Stopping { running, .. } => {
                Some(running.state.number)
            }
        };
        if current != Some(number) {
            return;
        }
        let (running, told, broken, then) = match std::mem::replace(&mut self.phase, Phase::Down { retry_at: None }) {
            Phase::Starting { running, told, broken, .. } => (running, told, broken, None),
            Phase::Ready { running } => (running, None, None, None),
            Phase::Stopping { running, then, .. } => (running, None, None, Some(then)),
            Phase::Down { .. } => return,
        };
        let run = running.so_far();
        let exit = self.finish(running);
        match then {
            Some(Then::Stay) => self.stopped(&exit.to_string()),
            Some(Then::Start) => {
                self.context.store.note_event(self.plugin.id(), "stopped", &exit.to_string());
                self.start();
            }
            Some(Then::WaitForCapacity(why)) if self.quitting.is_none() => self.wait_for_capacity(&why),
            Some(Then::WaitForCapacity(why)) => self.stopped(&why),
            Some(Then::Fault(exit, why)) => self.down(exit, run, &why),
            None => {
                let exit = match told.as_ref().and_then(refusal) {
                    Some(refusal) => refusal,
                    None if exit == KILLED && self.context.oom.has_killed() => Exit::OutOfMemory,
                    None => exit,
                };
                let words = told.as_ref().map(told_text).or_else(|| self.last_words()).or(broken);
                let why = match words {
                    // The exit already says everything.
                    Some(words) if matches!(exit, Exit::Unlicensed(_)) => words,
                    Some(words) => format!("{exit}: {words}"),
                    None if !run.ready && matches!(exit, Exit::Code(_) | Exit::Signal(_)) => {
                        format!("{exit} before it was ready")
                    }
                    None => exit.to_string(),
                };
                self.down(exit, run, &why);
            }
        }
    }

    /// Cleans up after a process has ended: its workers, orphans and socket.
    fn finish(&self, running: Running) -> Exit {
        let Running { process, state, stop, .. } = running;
        state.stopping.store(true, Ordering::Relaxed);
        state.ended.store(true, Ordering::Relaxed);
        drop(stop);
        let session = process.pid();
        let reach = match state.uid {
            // When all plugins end, the watchdog kills the orphans of all of them at once.
            // Otherwise another process of the plugin may run under the same uid.
            Some(uid) if self.quitting == Some(Quit::HostStops) && !self.has_sibling() => Reach::UidUnseen(uid),
            _ if self.quitting == Some(Quit::HostStops) => Reach::Group,
            Some(uid) if !self.has_sibling() => Reach::Uid(uid),
            _ => Reach::Marked,
        };
        let exit =
            self.context.sessions.leave(session, matches!(reach, Reach::Group | Reach::UidUnseen(_)), || process.reap(reach));
        // If the socket stays, the next start removes it.
        drop(self.remove_run());
        exit
    }

    /// Whether another process of the plugin may run: its update, or the process that this update replaces.
    fn has_sibling(&self) -> bool {
        self.trial.is_some() || self.updated
    }

    /// Removes the plugin's files in the run directory; only its socket if another process of it may use the rest.
    fn remove_run(&self) -> std::io::Result<()> {
        if !self.has_sibling() {
            return self.context.data.remove_plugin_run(self.plugin.id());
        }
        match std::fs::remove_file(&self.plugin.socket) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// The line of the process's output that says why it ended.
    fn last_words(&self) -> Option<String> {
        let lines = self.plugin.log.recent();
        let texts: Vec<&str> = lines.iter().filter_map(|line| line.split_once(' ')).map(|(_, text)| text).collect();
        failure_line(&texts).map(|text| text.chars().take(300).collect())
    }

    /// Handles an unexpected end: decides what follows, and keeps the evidence.
    fn down(&mut self, exit: Exit, run: Run, why: &str) {
        if self.quitting.is_some() {
            return self.stopped(why);
        }
        if exit == Exit::Changed {
            // The registry will replace this plugin or refuse the file. Until then the supervisor keeps checking.
            self.phase = Phase::Down { retry_at: Some(Instant::now() + FILE_CHECK_PAUSE) };
            self.plugin.set_last_end(End { at: now_ms(), exit, reason: why.to_owned(), lines: Vec::new() });
            return self.enter(State::BackingOff, Admission::Holding, "changed", why);
        }
        let begins = self.license_begins(exit);
        if self.rejected_license(exit, begins.is_some(), why) {
            return self.start();
        }
        let time = self.context.license_clock.now();
        self.license_wait = begins.map(|begins| LicenseWait::refused(begins, self.license_wait, time));
        // The first byte of a random UUID serves as the random number.
        let random = f64::from(uuid::Uuid::new_v4().as_bytes()[0]) / 255.0;
        let (state, kind, wait) = match self.history.ended(exit, run, random) {
            Decision::Retry(wait) => (State::BackingOff, "crashed", Some(wait)),
            Decision::CrashLoop(wait) => (State::CrashLooping, "crash_looping", Some(wait)),
            Decision::Refuse if matches!(exit, Exit::Unlicensed(_)) => {
                (State::Unlicensed, "unlicensed", self.license_wait.map(|wait| wait.pause(time)))
            }
            Decision::Refuse => (State::Refused, "refused", None),
        };
        let retry_at = wait.map(|wait| Instant::now() + wait);
        self.phase = Phase::Down { retry_at };
        self.plugin.set_last_end(End { at: now_ms(), exit, reason: why.to_owned(), lines: self.plugin.log.recent() });
        // The note follows the last lines in the log, so it does not repeat the last of them.
        let exit_text = exit.to_string();
        let said = if why.starts_with(&exit_text) { &exit_text } else { why };
        self.plugin.log.note(&format!("{kind}: {said}"));
        let admission = if self.holds() { Admission::Holding } else { Admission::Shut };
        self.enter(state, admission, kind, why);
    }

    /// The start of validity, from its token, of a licence that the process refused as not valid yet.
    fn license_begins(&self, exit: Exit) -> Option<Time> {
        let token = self.given.token.as_deref().filter(|_| exit == Exit::Unlicensed(Code::NotYetValid))?;
        unverified(token)?.nbf
    }

    /// Restores the plugin's previous licence if it ended because of one on trial, unless that only becomes valid later.
    fn rejected_license(&mut self, exit: Exit, begins_later: bool, why: &str) -> bool {
        let Given { token: Some(token), previous: Some(previous) } = std::mem::take(&mut self.given) else { return false };
        let id = self.plugin.id();
        // If this fails, the store has logged why, and the licence stays on trial.
        let restored = status::rejects_trial(exit, previous.ran, begins_later)
            && self.context.store.reject_license(id, &token).unwrap_or(false);
        if restored {
            self.plugin.note_refused_license(Some((token, why.to_owned())));
            self.plugin.set_last_end(End { at: now_ms(), exit, reason: why.to_owned(), lines: self.plugin.log.recent() });
            self.context.store.note_event(id, "license_restored", why);
            let verdict = status::verdict(why);
            log::warn!("{id}: it {verdict} its new licence, and is started with the previous one: {why}");
        }
        restored
    }

    /// The plugin was stopped on purpose.
    fn stopped(&mut self, why: &str) {
        (self.wants_capacity, self.waits_for_turn, self.license_wait) = (false, false, None);
        self.phase = Phase::Down { retry_at: None };
        self.enter(State::Stopped, self.shut(), "stopped", why);
    }

    /// The admission of a plugin that will not start again, unless another one takes over.
    fn shut(&self) -> Admission {
        if self.updated || self.quitting == Some(Quit::Replaced) { Admission::Holding } else { Admission::Shut }
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
            Phase::Starting { running, .. } | Phase::Ready { running } | Phase::Stopping { running, .. } => {
                (Some(running.pid()), None)
            }
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

/// Counts a worker among its plugin's connections until it ends, even by a panic.
struct CountedConnection<'a> {
    plugin: &'a Plugin,
    state: &'a ProcessState,
}

impl Drop for CountedConnection<'_> {
    fn drop(&mut self) {
        self.plugin.scaling.connections.fetch_sub(1, Ordering::Relaxed);
        self.plugin.scaling.shrinking.store(false, Ordering::Relaxed);
        if std::thread::panicking() {
            self.plugin.unresponsive(self.state.number, "a worker panicked".into());
        }
    }
}

/// The reason in a plugin's `error` reply to `init`.
fn refusal(told: &Failure) -> Option<Exit> {
    match status::refusal(told) {
        Some((code, _)) => Some(Exit::Unlicensed(code)),
        None => (told.code == WRONG_PROTOCOL).then_some(Exit::Incompatible),
    }
}

fn told_text(told: &Failure) -> String {
    status::refusal(told).map_or_else(|| format!("{} ({})", told.message, told.code), |(_, sentence)| sentence)
}
