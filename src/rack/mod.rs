//! All plugins: found, started, updated, looked up by id and by route, stopped.
//!
//! A look through the plugins directory asks each file that is new or changed who it is, several at once, and takes in each answer as
//! it comes; it is over when all of them are in. A plugin whose file has changed goes on until its update is ready: the update is
//! started beside it, and only then takes its route and its requests.

mod look;
mod owners;

pub(crate) use look::Look;

use look::Looks;

use crate::discovery::{self, Fingerprint, Found, Interviews, Outlook, Refusal};
use crate::host::Host;
use crate::lock::{LockExt, unpoisoned};
use crate::output::PluginLog;
use crate::plugin::{Command, Plugin, Quit, State};
use crate::protocol::metadata::Metadata;
use crate::room;
use crate::route::Routes;
use crate::store::events::Event;
use crate::store::{StoreError, now_ms};
use crate::supervisor::{COMMANDS, HOLD_TICK, Supervisor, Trial};
use crate::threads;
use crossbeam_channel::{Receiver, Sender, bounded};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, RwLock};
use std::time::{Duration, Instant};

/// Time for plugins to stop: the 5 s of one, and some for the machine. Docker gives a container 10 s, runit's `sv` 7 s.
pub(crate) const STOP_ALL_TIME: Duration = Duration::from_millis(5800);

/// Time the operator's commands wait for their plugin to settle: a start of 10 s and a stop of 5 s fit.
const SETTLE_TIME: Duration = Duration::from_secs(20);

/// Stack of a supervisor in bytes: it reads its settings from the database, and starts processes.
const SUPERVISOR_STACK: usize = 512 * 1024;

/// All plugins of the host.
pub(crate) struct Rack {
    host: Arc<Host>,
    dir: PathBuf,
    state: Mutex<Looks>,
    /// Told when a look is over.
    over: Condvar,
    /// Whether one was, so that those who want to know that alone need not wait for the list.
    known: AtomicBool,
    routes: RwLock<Arc<Routes<Arc<Plugin>>>>,
    interviews: Interviews,
    /// Set when no plugin is to be added any more.
    closing: AtomicBool,
    /// Updates so far, by which their sockets are told apart.
    updates: AtomicU64,
    /// Ids of plugins that are gone and that have left something, by the last count.
    gone: AtomicUsize,
    /// Held while it is noted whether a plugin may run, so that the database and the supervisor hear of it in the same order.
    enabling: Mutex<()>,
}

/// Something in the plugins directory.
#[derive(Clone)]
pub(crate) enum Entry {
    /// A plugin.
    Accepted {
        /// The plugin.
        plugin: Arc<Plugin>,
        /// Closes when its supervisor has ended.
        ended: Receiver<()>,
        /// The file that lies there now, where it is another one and was refused.
        rejected: Option<Rejected>,
    },
    /// What cannot be one.
    Refused {
        /// Which file it is.
        found: Found,
        /// The plugin that it was before, whose route it still has, though nobody answers there.
        was: Option<Arc<Plugin>>,
        /// The id it gave itself, if it got that far.
        id: Option<String>,
        /// Why, and what it printed.
        rejected: Rejected,
    },
}

/// A file that was refused.
#[derive(Debug, Clone)]
pub(crate) struct Rejected {
    fingerprint: Option<Fingerprint>,
    /// Why, in a sentence.
    pub(crate) reason: String,
    /// Whether it stays so.
    pub(crate) outlook: Outlook,
    /// What it printed when it was asked who it is.
    pub(crate) printed: Arc<Vec<String>>,
    /// When, in milliseconds since 1970-01-01 UTC.
    pub(crate) at: i64,
    /// How often in a row for a reason that may pass.
    failures: u32,
    /// When it is asked again.
    pub(crate) retry_at: Option<Instant>,
}

impl Rejected {
    fn new(found: &Found, refusal: Refusal, before: Option<&Self>) -> Self {
        let Refusal { reason, outlook, printed } = refusal;
        let may_pass = outlook != Outlook::Lasting;
        let before = before.filter(|before| before.fingerprint == found.fingerprint).map_or(0, |before| before.failures);
        let failures = if may_pass { before.saturating_add(1) } else { 0 };
        // A random UUID's first byte is as good a die as any.
        let random = f64::from(uuid::Uuid::new_v4().as_bytes()[0]) / 255.0;
        let retry_at = may_pass.then(|| Instant::now() + discovery::retry_after(failures, random));
        Self { fingerprint: found.fingerprint, reason, outlook, printed: Arc::new(printed), at: now_ms(), failures, retry_at }
    }
}

/// A plugin, and what closes when its supervisor has ended.
type Supervised = (Arc<Plugin>, Receiver<()>);

impl Rack {
    /// An empty rack, for the plugins of a directory.
    pub(crate) fn new(host: Arc<Host>, dir: PathBuf) -> Self {
        let routes = RwLock::new(Arc::new(Routes::new(Vec::new())));
        let (state, over, known, closing, updates, gone, enabling) = Default::default();
        Self { host, dir, state, over, known, routes, interviews: Interviews::new(), closing, updates, gone, enabling }
    }

    /// Lets the mark of time go on, and with each day looks for licences that are about to expire.
    pub(crate) fn keep_time(&self) {
        self.host.time.keep(&self.host.store);
        if self.host.time.is_new_day() {
            for entry in self.share().values() {
                if let Entry::Accepted { plugin, .. } = entry
                    && plugin.status().state == State::Ready
                {
                    self.host.warn_of_license(plugin.id());
                }
            }
        }
    }

    /// Waits for a time until all that is in the plugins directory is known, and says whether it is.
    pub(crate) fn is_known(&self, wait: Duration) -> bool {
        self.known.load(Ordering::Acquire) || (!wait.is_zero() && self.wait_for_look(1, Instant::now() + wait).is_some())
    }

    /// Whether a file that was refused, or whose plugin is, has changed since or is to be asked again, so that another look is worth it.
    pub(crate) fn is_due(&self) -> bool {
        let now = Instant::now();
        let is_time = |rejected: &Rejected| rejected.retry_at.is_some_and(|at| now >= at);
        // What is looked at is on a disk: the list is not held meanwhile.
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

    /// When the next file is to be asked again.
    pub(crate) fn next_retry(&self) -> Option<Instant> {
        let state = self.lock();
        let rejected = |entry: &Entry| match entry {
            Entry::Accepted { rejected, .. } => rejected.as_ref()?.retry_at,
            Entry::Refused { rejected, .. } => rejected.retry_at,
        };
        state.entries.iter().filter(|(file, _)| !state.asked.contains(*file)).filter_map(|(_, entry)| rejected(entry)).min()
    }

    /// The plugins directory.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// What all of the rack shares.
    pub(crate) fn host(&self) -> &Host {
        &self.host
    }

    /// Which plugin answers for which route.
    pub(crate) fn routes(&self) -> Arc<Routes<Arc<Plugin>>> {
        Arc::clone(&*unpoisoned(self.routes.read()))
    }

    /// A copy of everything in the plugins directory, by name there. It is made without the lock.
    pub(crate) fn entries(&self) -> BTreeMap<String, Entry> {
        (*self.share()).clone()
    }

    /// A snapshot of the same, without a copy.
    fn share(&self) -> Arc<BTreeMap<String, Entry>> {
        Arc::clone(&self.lock().entries)
    }

    /// What a name means: the plugin with that id, else what was refused under that file name, else what was refused with that id.
    /// Given with its name in the plugins directory.
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
        history.map_or(Ok(Vec::new()), |history| self.host.store.events(&history, most))
    }

    /// Puts a plugin in the rack, and has it started once those with its id that are to end have ended.
    fn accept(&self, found: &Found, metadata: Metadata, enabled: bool, before: Vec<Supervised>) -> Result<Entry, Refusal> {
        let (id, log) = (metadata.id.clone(), PluginLog::new(self.host.data.log(&metadata.id)));
        let (plugin, ended) = self.supervise(found, metadata, log, None, enabled, before)?;
        self.host.store.note_owner(&id, &found.file);
        Ok(Entry::Accepted { plugin, ended, rejected: None })
    }

    /// Starts the supervisor of a plugin: for an update on trial, with its number, and else once those `before` it have ended.
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
        let socket = self.host.data.plugin_socket(&id, number);
        let plugin = Arc::new(Plugin::new(metadata, found, socket, log, control, enabled));
        let (host, leaves) = (Arc::clone(&self.host), Arc::new(AtomicBool::new(false)));
        let (alive, ended) = bounded(0);
        let waiting = Arc::clone(&plugin);
        let run = move || {
            let deadline = Instant::now() + STOP_ALL_TIME;
            for (old, ended) in before {
                // Requests are held meanwhile, though no longer than any.
                while Instant::now() < deadline && ended.recv_timeout(HOLD_TICK).is_err_and(|error| error.is_timeout()) {
                    waiting.expire_held(None);
                }
                old.queue.succeed(Arc::clone(&waiting.queue));
            }
            // A panic ends its process too, and the next supervisor starts another.
            let supervise = || {
                if !leaves.load(Ordering::Relaxed) {
                    let (plugin, host, commands) = (Arc::clone(&waiting), Arc::clone(&host), commands.clone());
                    Supervisor::new(plugin, host, commands, trial.take(), Arc::clone(&leaves)).run();
                }
            };
            if !threads::persist(supervise) {
                waiting
                    .abandon("the host itself failed to look after it, which is a fault of plugrack's: its log has the reason");
            }
            waiting.queue.hand_over();
            drop::<Sender<()>>(alive);
        };
        let thread = std::thread::Builder::new().name(format!("plugin-{id}")).stack_size(SUPERVISOR_STACK);
        thread.spawn(run).map_err(|error| Refusal::passing(room::explain("cannot start its supervisor", &error).0))?;
        Ok((plugin, ended))
    }

    fn publish(&self, entries: &BTreeMap<String, Entry>) {
        let plugins =
            || entries.values().filter_map(|entry| if let Entry::Accepted { plugin, .. } = entry { Some(plugin) } else { None });
        let taken: BTreeSet<&str> = plugins().map(|plugin| plugin.metadata.route.as_str()).collect();
        let were = entries.values().filter_map(|entry| if let Entry::Refused { was, .. } = entry { was.as_ref() } else { None });
        let were = were.filter(|plugin| !taken.contains(plugin.metadata.route.as_str()));
        let lead = |plugin: &Arc<Plugin>| (plugin.metadata.route.clone(), Arc::clone(plugin));
        let routes = Arc::new(Routes::new(plugins().chain(were).map(lead).collect()));
        *unpoisoned(self.routes.write()) = routes;
    }

    /// Gives a plugin a command, and waits until it is settled.
    pub(crate) fn command(&self, plugin: &Plugin, command: impl FnOnce(Sender<()>) -> Command) {
        let (done, settled) = bounded(0);
        let deadline = Instant::now() + SETTLE_TIME;
        if plugin.control.send_deadline(command(done), deadline).is_ok() {
            // It ends by the channel's end, or is told as it is by then.
            settled.recv_deadline(deadline).ok();
        }
    }

    /// Notes whether a plugin may run, and starts or stops it.
    pub(crate) fn set_enabled(&self, plugin: &Plugin, enabled: bool) -> Result<(), StoreError> {
        let noting = self.enabling.locked();
        self.host.store.set_enabled(plugin.id(), enabled)?;
        self.host.store.note_event(plugin.id(), if enabled { "enabled" } else { "disabled" }, "by the operator");
        // A supervisor that is gone belongs to a plugin that is.
        drop(plugin.control.send_timeout(Command::Enabled(enabled), SETTLE_TIME));
        drop(noting);
        self.command(plugin, if enabled { Command::Start } else { Command::Stop });
        Ok(())
    }

    /// Stops all plugins, side by side, until a deadline, and adds none any more.
    pub(crate) fn stop_all(&self, deadline: Instant) {
        let mut state = self.lock();
        self.closing.store(true, Ordering::Release);
        let trials = std::mem::take(&mut state.trials).into_values();
        let plugins = state.entries.values().filter_map(Entry::supervised);
        // Those that an update has replaced may still have requests to answer.
        let leaving: Vec<_> = plugins.chain(state.last.leaving.iter().cloned()).chain(trials).collect();
        drop(state);
        let quit = || Command::Quit(Quit::HostStops);
        // One whose supervisor is busy must not hold up the others.
        let busy = leaving.iter().filter(|(plugin, _)| plugin.control.try_send(quit()).is_err_and(|error| error.is_full()));
        let busy: Vec<_> = busy.collect();
        // A supervisor that is gone has nothing to end.
        busy.into_iter().for_each(|(plugin, _)| drop(plugin.control.send_deadline(quit(), deadline)));
        for (plugin, ended) in leaving {
            await_end(&plugin, &ended, deadline);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Looks> {
        self.state.locked()
    }
}

impl Entry {
    /// What was found under this name.
    fn found(&self, file: &str) -> Found {
        match self {
            Self::Accepted { plugin, .. } => plugin.found(file),
            Self::Refused { found, .. } => found.clone(),
        }
    }

    fn is_plugin(&self) -> bool {
        matches!(self, Self::Accepted { .. })
    }

    /// Why a plugin cannot be beside this one.
    fn conflict(&self, file: &str, metadata: &Metadata) -> Option<String> {
        match self {
            Self::Accepted { plugin, .. } if plugin.id() == metadata.id => {
                Some(format!("the id {} is taken by {file}", metadata.id))
            }
            Self::Accepted { plugin, .. } if plugin.metadata.route == metadata.route => {
                Some(format!("the route {} is taken by {file}", metadata.route))
            }
            _ => None,
        }
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

/// Waits for the end of a plugin that was told to quit.
fn await_end(plugin: &Plugin, ended: &Receiver<()>, deadline: Instant) {
    if ended.recv_deadline(deadline).is_err_and(|error| error.is_timeout()) {
        log::error!("{}: it could not be stopped in time", plugin.id());
    }
}
