//! The start of a plugin's process: it is prepared, started, and asked until it is ready; then it gets its workers.

use super::{
    Contact, LEAVE_TIME, LOOK_EVERY, NEXT_PROCESS_NUMBER, Phase, Running, START_SETTLE_TIME, Supervisor, Then, WORKER_STACK,
};
use crate::apps::endpoint::Endpoint;
use crate::apps::manifest::Kind;

use crate::licensing::status;
use crate::plugins::attempt::Place;
use crate::plugins::connection::application::ApplicationConnection;
use crate::plugins::connection::frames::{FIRST_ID, FrameConnection};
use crate::plugins::connection::{PluginConnection, WaitError};
use crate::plugins::context::Owner;
use crate::plugins::launch::{self, Prepared};
use crate::plugins::plugin::{Admission, Command, End, Plugin, State};
use crate::plugins::process_state::ProcessState;
use crate::plugins::restart_policy::Run;
use crate::plugins::sockets::Sockets;
use crate::plugins::start_turns::{TURN_CHECK, Turn};
use crate::plugins::worker::{FileWorker, ScriptWorker, Worker};
use crate::process::Process;
use crate::process::exit::Exit;
use crate::process::listeners::{self, Listening};
use crate::protocol::message::{Failure, HostInfo, Init, Message, PROTOCOL_VERSION, WRONG_PROTOCOL};
use crate::protocol::metadata::BelowRoute;
use crate::store::licenses::Given;
use crate::store::{StoreError, now_ms};
use crate::system::data_dir::check_socket_path;
use crate::system::rlimits::{self, CAPACITY_RETRY};
use crossbeam_channel::bounded;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

impl Supervisor {
    /// Starts a process.
    pub(super) fn start(&mut self) {
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
                let contact = match running.state.kind() {
                    Kind::Native => Contact::Init(None),
                    Kind::Http | Kind::FastCgi => Contact::Probe(Box::default()),
                    Kind::Cgi | Kind::Static => Contact::None,
                };
                self.phase = Phase::Starting { running, contact, deadline, told: None, broken: None };
                if std::mem::take(&mut self.wants_capacity) {
                    self.enter(State::Starting, Admission::Holding, "starting", "");
                }
            }
            Err((Exit::NoCapacity, why)) => self.wait_for_capacity(&why),
            Err((exit, why)) => self.down(exit, Run::default(), &why),
        }
    }

    /// There are not enough files, threads or memory for the plugin. That is not its fault, so it is retried until there are.
    pub(super) fn wait_for_capacity(&mut self, why: &str) {
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
        let limits = self.context.limits(id, self.plugin.run()).map_err(unreadable)?;
        bounds.open_files = limits.open_files;
        let variables = self.context.store.env(id).map_err(unreadable)?;
        bounds.variables.extend(variables.into_iter().map(|(name, value)| (name.into(), value.into())));
        let uid = bounds.uid;
        self.remove_run().map_err(|error| passing("cannot remove its old socket", error))?;
        let directories = data.make_plugin_dirs(id).map_err(|error| passing("cannot make its directories", error))?;
        self.context.chown_dirs(id, uid, &directories).map_err(no_user)?;
        let number = NEXT_PROCESS_NUMBER.fetch_add(1, Ordering::Relaxed);
        self.given = Given::default();
        self.plugin.log.begin(uid);
        let (stop, stopped) = bounded(0);
        let (alive, exited) = bounded::<()>(0);
        let init = self.init(FIRST_ID).map_err(|error| (Exit::NotStarted, format!("cannot read its settings: {error}")))?;
        let Prepared { launch, endpoint, scripts } =
            launch::prepare(&self.plugin, &self.context, &init, &mut self.listener, &mut bounds)?;
        let id = self.plugin.id();
        let process = launch.map(|launch| {
            let start = || Process::start(&launch, &bounds, &self.plugin.log, id);
            self.context.sessions.enter(Owner::new(id, uid, &self.plugin.log), start, Process::pid)
        });
        let process = process.transpose().map_err(|error| passing("cannot start its process", error))?;
        let state = ProcessState {
            number,
            endpoint,
            found: OnceLock::new(),
            scripts,
            manifest: self.plugin.manifest.clone(),
            rewrites: self.plugin.metadata.below_route == BelowRoute::Rewrite,
            uid,
            stop: stopped,
            exited,
            exit: OnceLock::new(),
            asked: AtomicBool::new(false),
            served: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            sockets: Sockets::default(),
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
        let Some(process) = &running.process else { return Ok(running) };
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
        match process.on_exit(id, tell) {
            Ok(()) => Ok(running),
            Err(error) => {
                self.finish(running);
                Err(passing("cannot watch its process", error))
            }
        }
    }

    /// Advances a start: connects, sends `init`, waits for `ready`, each for one tick at most.
    pub(super) fn go_on_starting(&mut self, now: Instant) {
        match &mut self.phase {
            Phase::Starting { contact: Contact::None, .. } => return self.ready(),
            Phase::Starting { contact: Contact::Probe(_), .. } => return self.probe(now),
            Phase::Starting { contact: Contact::Init(None), .. } => return self.try_init(now),
            _ => {}
        }
        let Phase::Starting { contact: Contact::Init(Some(open)), deadline, told, broken, .. } = &mut self.phase else { return };
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
            Err(error) => Err(format!("its first connection ended before it was ready: {error}")),
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

    /// Asks an application whether it is ready.
    fn probe(&mut self, now: Instant) {
        let Phase::Starting { running, contact: Contact::Probe(probe), deadline, .. } = &mut self.phase else { return };
        let state = &running.state;
        if let (Some(search), Some(process), None) = (&mut self.search, &running.process, state.found.get())
            && let Some(found) = search.step(process.pid(), &self.plugin.socket, &state.endpoint, now)
        {
            state.found.set(found).ok();
        }
        let path = state.run().and_then(|run| run.ready.as_deref());
        if probe.step(state.endpoint(), state.listener_uid(), path) {
            if let Some(attempt) = &self.context.attempt {
                attempt.place.set(Place { offered: state.endpoint.clone(), used: state.endpoint().clone() }).ok();
            }
            return self.ready();
        }
        if now >= *deadline {
            let last = probe.last().map(|last| format!(" ({last})")).unwrap_or_default();
            let endpoint = state.endpoint();
            let hint = running.process.as_ref().map(|process| elsewhere(process.pid(), endpoint)).unwrap_or_default();
            let what = match path {
                Some(path) if probe.was_accepted() => format!("{path} has no good answer{last}"),
                _ if self.search.is_some() && state.found.get().is_none() => {
                    format!("it listens neither on $PORT ({endpoint}) nor on $PLUGRACK_SOCKET, nor on any other address")
                }
                _ => format!("it does not listen on {endpoint}{last}{hint}"),
            };
            self.too_late(&what);
        }
    }

    /// Connects to a starting process and sends `init`, if it already listens.
    fn try_init(&mut self, now: Instant) {
        let Phase::Starting { running, deadline, .. } = &self.phase else { return };
        let Ok(mut opened) = FrameConnection::connect(&running.state) else {
            if now >= *deadline {
                let socket = self.plugin.socket.display().to_string();
                self.too_late(&format!("it does not listen on its socket {socket} (PLUGRACK_SOCKET)"));
            }
            return;
        };
        let init = self.init(opened.next_id());
        match init.and_then(|init| opened.queue(&init, &[]).map_err(|error| error.to_string())) {
            Ok(()) => {
                if let Phase::Starting { contact, .. } = &mut self.phase {
                    *contact = Contact::Init(Some(Box::new(opened)));
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
    pub(super) fn fault(&mut self, exit: Exit, why: String) {
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
            Phase::Starting { mut running, contact, .. } => {
                running.ready = true;
                running.turn = None;
                let connection =
                    if let Contact::Init(connection) = contact { connection.map(|connection| *connection) } else { None };
                let working = self.spawn_worker(&running.state, connection, true);
                self.look_at = self.look_at.map(|_| Instant::now() + LOOK_EVERY);
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

    /// Starts a worker: the `first` of a process, on the connection that was used for `init` if there is one, or another.
    pub(super) fn spawn_worker(
        &self,
        state: &Arc<ProcessState>,
        connection: Option<FrameConnection>,
        first: bool,
    ) -> std::io::Result<()> {
        let (plugin, state) = (Arc::clone(&self.plugin), Arc::clone(state));
        plugin.scaling.connections.fetch_add(1, Ordering::Relaxed);
        let thread = std::thread::Builder::new().name(format!("worker-{}", plugin.id())).stack_size(WORKER_STACK);
        let spawned = thread.spawn(move || {
            let counted = CountedConnection { plugin: &plugin, state: &state };
            match state.kind() {
                Kind::Native => work::<FrameConnection>(&plugin, &state, connection, first),
                Kind::Static => work_on_files(&plugin, &state, first),
                Kind::FastCgi | Kind::Cgi => work_by_scripts(&plugin, &state, first),
                Kind::Http => work::<ApplicationConnection>(&plugin, &state, None, first),
            }
            drop(counted);
        });
        if spawned.is_err() {
            self.plugin.scaling.connections.fetch_sub(1, Ordering::Relaxed);
            self.plugin.scaling.growing.store(false, Ordering::Relaxed);
        }
        spawned.map(drop)
    }
}

/// Where the processes of a session listen instead of at an address, as the end of a sentence.
fn elsewhere(session: i32, due: &Endpoint) -> String {
    let found = listeners::of_session(session).into_iter().map(|listening| match listening {
        Listening::Tcp(address) => Endpoint::Tcp(address),
        Listening::Unix(path) => Endpoint::Unix(path),
    });
    let others: Vec<_> = found.filter(|found| found != due).map(|found| found.to_string()).collect();
    if others.is_empty() {
        return String::new();
    }
    let give = match due {
        Endpoint::Unix(_) => "{socket}",
        Endpoint::Tcp(_) => "{port} or $PORT",
    };
    format!("; it listens on {}: give {give} to its command", others.join(" and "))
}

/// Runs a worker of a static site until it ends.
fn work_on_files(plugin: &Arc<Plugin>, state: &Arc<ProcessState>, first: bool) {
    let worker = FileWorker::open(Arc::clone(plugin), Arc::clone(state), first);
    plugin.scaling.growing.store(false, Ordering::Relaxed);
    match worker {
        Ok(worker) => worker.run(),
        Err(error) => plugin.unresponsive(state.number, format!("its root cannot be opened: {error}")),
    }
}

/// Runs a worker that has scripts answer until it ends.
fn work_by_scripts(plugin: &Arc<Plugin>, state: &Arc<ProcessState>, first: bool) {
    let worker = ScriptWorker::open(Arc::clone(plugin), Arc::clone(state), first);
    plugin.scaling.growing.store(false, Ordering::Relaxed);
    match worker {
        Ok(worker) => worker.run(),
        Err(error) => plugin.unresponsive(state.number, format!("its root cannot be opened: {error}")),
    }
}

/// Runs a worker until it ends.
fn work<C: PluginConnection>(plugin: &Arc<Plugin>, state: &Arc<ProcessState>, connection: Option<C>, first: bool) {
    let connection = connection.or_else(|| if first { C::prepare(state).ok() } else { None });
    let worker = match connection {
        Some(connection) => Some(Worker::new(Arc::clone(plugin), Arc::clone(state), connection)),
        None => Worker::connect(Arc::clone(plugin), Arc::clone(state)),
    };
    plugin.scaling.growing.store(false, Ordering::Relaxed);
    plugin.ask_to_grow();
    if let Some(worker) = worker {
        worker.run();
    }
}

/// Counts a worker among its plugin's connections until it ends, even by a panic.
struct CountedConnection<'a> {
    plugin: &'a Plugin,
    state: &'a ProcessState,
}

impl Drop for CountedConnection<'_> {
    fn drop(&mut self) {
        let others = self.plugin.scaling.connections.fetch_sub(1, Ordering::Relaxed) - 1;
        self.plugin.scaling.shrinking.store(false, Ordering::Relaxed);
        if std::thread::panicking() {
            self.plugin.unresponsive(self.state.number, "a worker panicked".into());
        }
        if others == 0 && self.state.stopping.load(Ordering::Relaxed) && self.state.kind() != Kind::Native {
            // A plugin of the plugin protocol was sent `shutdown`; an application waits for a signal.
            drop(self.plugin.control.send(Command::Drained { process: self.state.number }));
        }
    }
}

/// The reason in a plugin's `error` reply to `init`.
pub(super) fn refusal(told: &Failure) -> Option<Exit> {
    match status::refusal(told) {
        Some((code, _)) => Some(Exit::Unlicensed(code)),
        None => (told.code == WRONG_PROTOCOL).then_some(Exit::Incompatible),
    }
}

pub(super) fn told_text(told: &Failure) -> String {
    status::refusal(told).map_or_else(|| format!("{} ({})", told.message, told.code), |(_, sentence)| sentence)
}
