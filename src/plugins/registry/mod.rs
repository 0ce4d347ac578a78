//! The registry of plugins: finds, starts, updates and stops them, and looks them up by id, route and host name.
//!
//! A scan is one pass over the plugins directory; the operator's `rescan` command starts one. It reads the metadata of each new or
//! changed file, several in parallel, and processes each answer as it arrives. It finishes with the last answer. A plugin whose file
//! has changed keeps running until its update is ready: the update starts beside it, and then takes over its route and requests.

mod owners;
mod rescan;

pub(crate) use rescan::ScanReason;

use rescan::ScanState;

use crate::lock::{LockExt, unpoisoned};
use crate::plugins::context::Context;
use crate::plugins::discovery::{self, Fingerprint, Found, MetadataCalls, Outlook, Refusal};
use crate::plugins::host_names::local_id;
use crate::plugins::plugin::{Command, Plugin, Quit, State};
use crate::plugins::routes::Routes;
use crate::plugins::supervisor::{COMMANDS, HOLD_TICK, Supervisor, Trial};
use crate::process::output::PluginLog;
use crate::protocol::metadata::Metadata;
use crate::store::events::Event;
use crate::store::{StoreError, now_ms};
use crate::system::rlimits;
use crate::util::threads;
use crossbeam_channel::{Receiver, Sender, bounded};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, RwLock};
use std::time::{Duration, Instant};

/// Time for all plugins to stop: the 5 s of one, and a margin for a slow machine. Docker allows 10 s, runit's `sv` 7 s.
pub(crate) const STOP_ALL_TIME: Duration = Duration::from_millis(5800);

/// Time that an operator's command waits for its plugin to settle: enough for a start of 10 s and a stop of 5 s.
const SETTLE_TIME: Duration = Duration::from_secs(20);

/// Stack size of a supervisor in bytes: it reads settings from the database, and starts processes.
const SUPERVISOR_STACK: usize = 512 * 1024;

/// All plugins of the host.
pub(crate) struct Registry {
    context: Arc<Context>,
    dir: PathBuf,
    state: Mutex<ScanState>,
    /// Signals that a scan has finished.
    scan_finished: Condvar,
    /// Whether the first scan has finished, readable without the lock.
    scanned: AtomicBool,
    routes: RwLock<Arc<Routes<Arc<Plugin>>>>,
    /// Host names that the plugins had when the host stopped. They are not the host's while the first scan is under way.
    expected_names: Vec<String>,
    metadata_calls: MetadataCalls,
    /// Set when the host stops, after which no plugin is added.
    closing: AtomicBool,
    /// Number of updates so far, used to number their sockets.
    updates: AtomicU64,
    /// Number of removed plugins with data, as last counted.
    gone: AtomicUsize,
    /// Held while a plugin is enabled or disabled, so that the database and the supervisor see the changes in the same order.
    enabling: Mutex<()>,
}

/// An entry of the plugins directory.
#[derive(Clone)]
pub(crate) enum Entry {
    /// A plugin.
    Accepted {
        /// The running or stopped plugin.
        plugin: Arc<Plugin>,
        /// Closes when the supervisor has ended.
        ended: Receiver<()>,
        /// The current file, if it was replaced and refused.
        rejected: Option<Rejected>,
    },
    /// A refused file.
    Refused {
        /// The file as the scan found it.
        found: Found,
        /// The plugin that the file was before. Its route answers 503.
        was: Option<Arc<Plugin>>,
        /// The id in its metadata, if that was read.
        id: Option<String>,
        /// The reason, and the output.
        rejected: Rejected,
    },
}

/// A file that was refused.
#[derive(Debug, Clone)]
pub(crate) struct Rejected {
    fingerprint: Option<Fingerprint>,
    /// The reason, one sentence.
    pub(crate) reason: String,
    /// How long the refusal lasts.
    pub(crate) outlook: Outlook,
    /// The output of its `--metadata` call.
    pub(crate) printed: Arc<Vec<String>>,
    /// Time of the refusal, in milliseconds since 1970-01-01 UTC.
    pub(crate) at: i64,
    /// Consecutive refusals for a reason that may pass.
    failures: u32,
    /// When the host retries.
    pub(crate) retry_at: Option<Instant>,
}

impl Rejected {
    fn new(found: &Found, refusal: Refusal, before: Option<&Self>) -> Self {
        let Refusal { reason, outlook, printed } = refusal;
        let may_pass = outlook != Outlook::Lasting;
        let before = before.filter(|before| before.fingerprint == found.fingerprint).map_or(0, |before| before.failures);
        let failures = if may_pass { before.saturating_add(1) } else { 0 };
        // The first byte of a random UUID serves as the random number.
        let random = f64::from(uuid::Uuid::new_v4().as_bytes()[0]) / 255.0;
        let retry_at = may_pass.then(|| Instant::now() + discovery::retry_after(failures, random));
        Self { fingerprint: found.fingerprint, reason, outlook, printed: Arc::new(printed), at: now_ms(), failures, retry_at }
    }
}

/// A plugin, and a channel that closes when its supervisor has ended.
type Supervised = (Arc<Plugin>, Receiver<()>);

impl Registry {
    /// An empty registry for a plugins directory.
    pub(crate) fn new(context: Arc<Context>, dir: PathBuf) -> Self {
        let expected_names = names_before(&context, &dir);
        let mut routes = Routes::new(Vec::new());
        expected_names.iter().for_each(|name| routes.expect(name));
        let routes = RwLock::new(Arc::new(routes));
        let (state, scan_finished, scanned, closing, updates, gone, enabling) = Default::default();
        let metadata_calls = MetadataCalls::new();
        Self {
            context,
            dir,
            state,
            scan_finished,
            scanned,
            routes,
            expected_names,
            metadata_calls,
            closing,
            updates,
            gone,
            enabling,
        }
    }

    /// Advances the licence clock, and once a day checks for licences that expire soon.
    pub(crate) fn advance_license_clock(&self) {
        self.context.license_clock.advance(&self.context.store);
        if self.context.license_clock.is_new_day() {
            for entry in self.share().values() {
                if let Entry::Accepted { plugin, .. } = entry
                    && plugin.status().state == State::Ready
                {
                    self.context.warn_of_license(plugin.id());
                }
            }
        }
    }

    /// Waits up to `wait` for the first scan to finish. True if it has.
    pub(crate) fn is_scanned(&self, wait: Duration) -> bool {
        self.scanned.load(Ordering::Acquire) || (!wait.is_zero() && self.wait_for_scan(1, Instant::now() + wait).is_some())
    }

    /// Whether a refused file, or the file of a refused plugin, has changed or is due for a retry, so that a scan is worthwhile.
    pub(crate) fn needs_scan(&self) -> bool {
        let now = Instant::now();
        let is_time = |rejected: &Rejected| rejected.retry_at.is_some_and(|at| now >= at);
        // Without the lock, because this reads the disk.
        self.share().values().any(|entry| match entry {
            Entry::Accepted { plugin, rejected: Some(rejected), .. } => {
                is_time(rejected) || rejected.fingerprint != discovery::fingerprint(&plugin.program)
            }
            Entry::Accepted { plugin, .. } => plugin.status().state.is_refused() && !plugin.is_unchanged(),
            Entry::Refused { found, rejected, .. } => {
                is_time(rejected) || found.fingerprint != discovery::fingerprint(&found.program)
            }
        })
    }

    /// When the next file is due for a retry.
    pub(crate) fn next_retry(&self) -> Option<Instant> {
        let state = self.lock();
        let rejected = |entry: &Entry| match entry {
            Entry::Accepted { rejected, .. } => rejected.as_ref()?.retry_at,
            Entry::Refused { rejected, .. } => rejected.retry_at,
        };
        state.entries.iter().filter(|(file, _)| !state.pending.contains(*file)).filter_map(|(_, entry)| rejected(entry)).min()
    }

    /// The plugins directory.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The context that all plugins share.
    pub(crate) fn context(&self) -> &Context {
        &self.context
    }

    /// The plugins by route.
    pub(crate) fn routes(&self) -> Arc<Routes<Arc<Plugin>>> {
        Arc::clone(&*unpoisoned(self.routes.read()))
    }

    /// A copy of everything in the plugins directory, by name there. It is made without the lock.
    pub(crate) fn entries(&self) -> BTreeMap<String, Entry> {
        (*self.share()).clone()
    }

    /// A snapshot of the entries, without a copy.
    fn share(&self) -> Arc<BTreeMap<String, Entry>> {
        Arc::clone(&self.lock().entries)
    }

    /// Resolves a name: the plugin with that id, else the file refused under that name, else the file refused with that id. Returned with
    /// its name in the plugins directory.
    pub(crate) fn find(&self, name: &str) -> Option<(String, Entry)> {
        let entries = self.share();
        let means = |(file, entry): &(&String, &Entry), rank| match entry {
            Entry::Accepted { plugin, .. } => rank == 0 && plugin.id() == name,
            Entry::Refused { id, .. } => (rank == 1 && *file == name) || (rank == 2 && id.as_deref() == Some(name)),
        };
        let found = (0..3).find_map(|rank| entries.iter().find(|entry| means(entry, rank)));
        found.map(|(file, entry)| (file.clone(), entry.clone()))
    }

    /// The events of an entry, newest first; none where it has no history of its own.
    ///
    /// # Errors
    /// The database cannot be read.
    pub(crate) fn events(&self, file: &str, entry: &Entry, most: u32) -> Result<Vec<Event>, StoreError> {
        let history = match entry {
            Entry::Accepted { plugin, .. } => Some(plugin.id().to_owned()),
            Entry::Refused { was, .. } => history(&self.share(), file, was.as_deref()),
        };
        history.map_or(Ok(Vec::new()), |history| self.context.store.events(&history, most))
    }

    /// Registers a plugin, and starts it once other plugins with its id have ended.
    fn accept(&self, found: &Found, metadata: Metadata, enabled: bool, before: Vec<Supervised>) -> Result<Entry, Refusal> {
        let (id, log) = (metadata.id.clone(), PluginLog::new(self.context.data.log(&metadata.id)));
        if let Some(attempt) = &self.context.attempt {
            log.copy_to(attempt.lines.clone());
        }
        let (plugin, ended) = self.supervise(found, metadata, log, None, enabled, before)?;
        self.context.store.note_owner(&id, &found.file);
        Ok(Entry::Accepted { plugin, ended, rejected: None })
    }

    /// Starts a plugin's supervisor: at once for an update on trial, with its number; otherwise after the plugins `before` it have ended.
    fn supervise(
        &self,
        found: &Found,
        metadata: Metadata,
        log: PluginLog,
        update: Option<(u64, Trial)>,
        enabled: bool,
        before: Vec<Supervised>,
    ) -> Result<Supervised, Refusal> {
        let id = metadata.id.clone();
        let (number, mut trial) = update.unzip();
        let (control, commands) = bounded(COMMANDS);
        let socket = self.context.data.plugin_socket(&id, number);
        let plugin = Arc::new(Plugin::new(metadata, found, socket, log, control, enabled));
        let (context, leaves) = (Arc::clone(&self.context), Arc::new(AtomicBool::new(false)));
        let (alive, ended) = bounded(0);
        let waiting = Arc::clone(&plugin);
        let run = move || {
            let deadline = Instant::now() + STOP_ALL_TIME;
            for (old, ended) in before {
                // Requests wait meanwhile, for the usual hold time.
                while Instant::now() < deadline && ended.recv_timeout(HOLD_TICK).is_err_and(|error| error.is_timeout()) {
                    waiting.expire_held(None);
                }
                old.queue.succeed(Arc::clone(&waiting.queue));
            }
            // A panic ends its process too, and the next supervisor starts another.
            let supervise = || {
                if !leaves.load(Ordering::Relaxed) {
                    let (plugin, context, commands) = (Arc::clone(&waiting), Arc::clone(&context), commands.clone());
                    Supervisor::new(plugin, context, commands, trial.take(), Arc::clone(&leaves)).run();
                }
            };
            if !threads::persist(supervise) {
                waiting.abandon("its supervisor failed, which is a bug in plugrack: the host's log has the reason");
            }
            waiting.queue.forward_waiting();
            drop::<Sender<()>>(alive);
        };
        let thread = std::thread::Builder::new().name(format!("plugin-{id}")).stack_size(SUPERVISOR_STACK);
        thread.spawn(run).map_err(|error| Refusal::passing(rlimits::explain("cannot start its supervisor", &error).0))?;
        Ok((plugin, ended))
    }

    /// Publishes the routes and the host names of all plugins. A plugin that was refused keeps those that no other plugin has.
    fn publish(&self, entries: &BTreeMap<String, Entry>) {
        let accepted =
            entries.values().filter_map(|entry| if let Entry::Accepted { plugin, .. } = entry { Some(plugin) } else { None });
        let were = entries.values().filter_map(|entry| if let Entry::Refused { was, .. } = entry { was.as_ref() } else { None });
        let plugins: Vec<&Arc<Plugin>> = accepted.chain(were).collect();
        let mut by_route = BTreeMap::new();
        for plugin in &plugins {
            if let Some(route) = &plugin.metadata.route {
                by_route.entry(route.clone()).or_insert_with(|| Arc::clone(plugin));
            }
        }
        let mut routes = Routes::new(by_route.into_iter().collect());
        plugins.iter().for_each(|plugin| routes.add_plugin(plugin.id(), &plugin.metadata.host, plugin));
        if !self.scanned.load(Ordering::Acquire) {
            self.expected_names.iter().for_each(|name| routes.expect(name));
        }
        *unpoisoned(self.routes.write()) = Arc::new(routes);
    }

    /// Sends a command to a plugin, and waits until it has settled.
    pub(crate) fn command(&self, plugin: &Plugin, command: impl FnOnce(Sender<()>) -> Command) {
        let (done, settled) = bounded(0);
        let deadline = Instant::now() + SETTLE_TIME;
        if plugin.control.send_deadline(command(done), deadline).is_ok() {
            // Ends when the channel closes; at the deadline the caller gets the state of that moment.
            settled.recv_deadline(deadline).ok();
        }
    }

    /// Enables or disables a plugin, and starts or stops it.
    pub(crate) fn set_enabled(&self, plugin: &Plugin, enabled: bool) -> Result<(), StoreError> {
        let noting = self.enabling.locked();
        self.context.store.set_enabled(plugin.id(), enabled)?;
        self.context.store.note_event(plugin.id(), if enabled { "enabled" } else { "disabled" }, "by the operator");
        // The supervisor is gone only if the plugin is.
        drop(plugin.control.send_timeout(Command::Enabled(enabled), SETTLE_TIME));
        drop(noting);
        self.command(plugin, if enabled { Command::Start } else { Command::Stop });
        Ok(())
    }

    /// Stops all plugins in parallel until a deadline, and prevents new ones.
    pub(crate) fn stop_all(&self, deadline: Instant) {
        let mut state = self.lock();
        self.closing.store(true, Ordering::Release);
        let trials = std::mem::take(&mut state.trials).into_values();
        let plugins = state.entries.values().filter_map(Entry::supervised);
        // Old processes of updates may still have requests to answer.
        let leaving: Vec<_> = plugins.chain(state.last.leaving.iter().cloned()).chain(trials).collect();
        drop(state);
        let quit = || Command::Quit(Quit::HostStops);
        // One whose supervisor is busy must not hold up the others.
        let busy = leaving.iter().filter(|(plugin, _)| plugin.control.try_send(quit()).is_err_and(|error| error.is_full()));
        let busy: Vec<_> = busy.collect();
        // The supervisor may already be gone.
        busy.into_iter().for_each(|(plugin, _)| drop(plugin.control.send_deadline(quit(), deadline)));
        for (plugin, ended) in leaving {
            await_end(&plugin, &ended, deadline);
        }
    }

    fn lock(&self) -> MutexGuard<'_, ScanState> {
        self.state.locked()
    }
}

impl Entry {
    /// This entry in the form of a scan result.
    fn found(&self, file: &str) -> Found {
        match self {
            Self::Accepted { plugin, .. } => plugin.found(file),
            Self::Refused { found, .. } => found.clone(),
        }
    }

    fn is_plugin(&self) -> bool {
        matches!(self, Self::Accepted { .. })
    }

    /// Why another plugin conflicts with this one, if it does.
    fn conflict(&self, file: &str, metadata: &Metadata) -> Option<String> {
        let Self::Accepted { plugin, .. } = self else { return None };
        let own = &plugin.metadata;
        if own.id == metadata.id {
            return Some(format!("the id {} is taken by {file}", metadata.id));
        }
        if let Some(route) = metadata.route.as_ref().filter(|route| own.route.as_ref() == Some(route)) {
            return Some(format!("the route {route} is taken by {file}"));
        }
        let listed = metadata.host.iter().find(|name| own.host.contains(name) || local_id(name) == Some(&own.id));
        // On loopback the name is the other plugin's by its id.
        let name = listed.or_else(|| own.host.iter().find(|name| local_id(name) == Some(&metadata.id)))?;
        Some(format!("the host name {name} is taken by {file}"))
    }

    /// The plugin, and what closes when its supervisor has ended.
    fn supervised(&self) -> Option<Supervised> {
        let Self::Accepted { plugin, ended, .. } = self else { return None };
        Some((Arc::clone(plugin), ended.clone()))
    }
}

/// The name under which the events of a refused file are kept: the id of the plugin that it `was`, or else the file's name. None while
/// another plugin has that id.
fn history(entries: &BTreeMap<String, Entry>, file: &str, was: Option<&Plugin>) -> Option<String> {
    let name = was.map_or(file, Plugin::id);
    let is_other = |(other, entry): (&String, &Entry)| {
        other != file && matches!(entry, Entry::Accepted { plugin, .. } if plugin.id() == name)
    };
    (!entries.iter().any(is_other)).then(|| name.to_owned())
}

/// The host names that the files of a plugins directory had when they were last asked.
fn names_before(context: &Context, dir: &Path) -> Vec<String> {
    // A directory or a database that cannot be read is reported where it is needed.
    let found = discovery::list(dir).unwrap_or_default();
    let metadata = |found: &Found| Metadata::parse(context.store.program(&found.file).ok()?.metadata?.as_bytes()).ok();
    found.iter().filter_map(metadata).flat_map(|metadata| metadata.host).collect()
}

/// Waits until a plugin that was told to quit has ended.
fn await_end(plugin: &Plugin, ended: &Receiver<()>, deadline: Instant) {
    if ended.recv_deadline(deadline).is_err_and(|error| error.is_timeout()) {
        log::error!("{}: it could not be stopped in time", plugin.id());
    }
}
