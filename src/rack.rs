//! All plugins: found, started, looked up by id and by route, stopped.

use crate::discovery::{self, Fingerprint, Found, Refusal};
use crate::host::Host;
use crate::output::PluginLog;
use crate::plugin::{Command, Plugin, Quit, State};
use crate::protocol::metadata::Metadata;
use crate::room;
use crate::route::Routes;
use crate::store::StoreError;
use crate::supervisor::{COMMANDS, HOLD_TICK, Supervisor};
use crossbeam_channel::{Receiver, Sender, bounded};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

/// Time for plugins to stop: the 5 s of one, and some for the machine. Docker gives a container 10 s, runit's `sv` 7 s.
pub(crate) const STOP_ALL_TIME: Duration = Duration::from_millis(5800);

/// Time the operator's commands wait for their plugin to settle: a start of 10 s and a stop of 5 s fit.
const SETTLE_TIME: Duration = Duration::from_secs(20);

/// Stack of a supervisor in bytes: it reads its settings from the database, and starts processes.
const SUPERVISOR_STACK: usize = 512 * 1024;

/// Most new refusals that one look logs and records one by one: more are one line, so that a directory of other things floods neither
/// the log nor the store's queue of 1024 changes.
const SAID_REFUSALS: usize = 1000;

/// All plugins of the host.
pub(crate) struct Rack {
    host: Arc<Host>,
    dir: PathBuf,
    /// By name in the plugins directory.
    entries: Mutex<BTreeMap<String, Entry>>,
    routes: RwLock<Arc<Routes<Arc<Plugin>>>>,
    /// Held while the directory is looked through, which must not happen twice at once.
    scanning: Mutex<()>,
    /// Closed once the first look is over.
    known: Receiver<()>,
    /// Set when no plugin is to be added any more.
    closing: AtomicBool,
    /// Whether something could not be asked who it is for want of files, threads or memory.
    wanting: AtomicBool,
}

/// Something in the plugins directory.
#[derive(Clone)]
pub(crate) enum Entry {
    /// A plugin.
    Accepted {
        /// The plugin.
        plugin: Arc<Plugin>,
        /// Which file it is.
        fingerprint: Option<Fingerprint>,
        /// Closes when its supervisor has ended.
        ended: Receiver<()>,
    },
    /// What cannot be one.
    Refused {
        /// Which file it is.
        found: Found,
        /// The plugin that it was before, whose route it still has, though nobody answers there.
        was: Option<Arc<Plugin>>,
        /// The id it gave itself, if it got that far.
        id: Option<String>,
        /// Why, in a sentence.
        reason: String,
    },
}

/// What a look through the plugins directory has changed, by name in the directory.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Changes {
    /// New plugins.
    pub(crate) added: Vec<String>,
    /// Plugins whose file is another one now.
    pub(crate) changed: Vec<String>,
    /// Plugins whose file is gone, or refused now.
    pub(crate) removed: Vec<String>,
    /// What is refused, whether new or not.
    pub(crate) refused: Vec<String>,
}

/// A look through the plugins directory, under way.
struct Look {
    /// What was there before.
    before: BTreeMap<String, Entry>,
    /// Plugins that are gone from the directory or another file now: each lives on until its file is looked at, one that comes before
    /// takes its id or route, or the look ends.
    stale: BTreeSet<String>,
    /// Plugins that were told to quit, and what closes at their end.
    leaving: Vec<(Arc<Plugin>, Receiver<()>)>,
    changes: Changes,
    /// Refusals that were not there before.
    refusals: usize,
}

impl Rack {
    /// An empty rack, for the plugins of a directory. Whoever closes `known` says that the first look is over.
    pub(crate) fn new(host: Arc<Host>, dir: PathBuf, known: Receiver<()>) -> Self {
        let routes = RwLock::new(Arc::new(Routes::new(Vec::new())));
        let (entries, scanning, closing, wanting) = Default::default();
        Self { host, dir, entries, routes, scanning, known, closing, wanting }
    }

    /// Lets the mark of time go on, and with each day looks for licences that are about to expire.
    pub(crate) fn keep_time(&self) {
        self.host.time.keep(&self.host.store);
        if self.host.time.is_new_day() {
            for entry in self.entries().into_values() {
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
        self.known.recv_timeout(wait).is_err_and(|error| error.is_disconnected())
    }

    /// Whether something could not be asked who it is for want of files, threads or memory, so that another look is worth it.
    pub(crate) fn is_wanting(&self) -> bool {
        self.wanting.load(Ordering::Relaxed)
    }

    /// Whether a file that was refused, or whose plugin is, has changed since, so that another look is worth it.
    pub(crate) fn is_mended(&self) -> bool {
        // What is looked at is on a disk: the list is not held meanwhile.
        self.entries().values().any(|entry| match entry {
            Entry::Accepted { plugin, fingerprint, .. } => {
                plugin.status().state.is_refused() && *fingerprint != discovery::fingerprint(&plugin.program)
            }
            Entry::Refused { found, .. } => found.fingerprint != discovery::fingerprint(&found.program),
        })
    }

    /// What all of the rack shares.
    pub(crate) fn host(&self) -> &Host {
        &self.host
    }

    /// Which plugin answers for which route.
    pub(crate) fn routes(&self) -> Arc<Routes<Arc<Plugin>>> {
        Arc::clone(&self.routes.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Everything in the plugins directory, by name there.
    pub(crate) fn entries(&self) -> BTreeMap<String, Entry> {
        self.lock().clone()
    }

    /// What a name means: the plugin with that id, else what was refused under that file name, else what was refused with that id.
    /// Given with its name in the plugins directory.
    pub(crate) fn find(&self, name: &str) -> Option<(String, Entry)> {
        let entries = self.lock();
        let means = |(file, entry): &(&String, &Entry), rank| match entry {
            Entry::Accepted { plugin, .. } => rank == 0 && plugin.id() == name,
            Entry::Refused { id, .. } => (rank == 1 && *file == name) || (rank == 2 && id.as_deref() == Some(name)),
        };
        let found = (0..3).find_map(|rank| entries.iter().find(|entry| means(entry, rank)));
        found.map(|(file, entry)| (file.clone(), entry.clone()))
    }

    /// Looks through the plugins directory: starts what is new, stops what is gone, and replaces what is another file now.
    ///
    /// Each is taken in as soon as it and all before it by name have said who they are, so the first by name has its id and route
    /// whoever answers first.
    pub(crate) fn rescan(&self) -> io::Result<Changes> {
        let _alone = self.scanning.lock().unwrap_or_else(PoisonError::into_inner);
        let mut found = discovery::scan(&self.dir)?;
        self.wanting.store(false, Ordering::Relaxed);
        let before = self.entries();
        let names: BTreeSet<String> = found.iter().map(|found| found.file.clone()).collect();
        found.retain(|found| match before.get(&found.file) {
            Some(Entry::Accepted { fingerprint, .. }) => fingerprint.is_none() || *fingerprint != found.fingerprint,
            _ => true,
        });
        let others: BTreeSet<&String> = found.iter().map(|found| &found.file).collect();
        let is_stale = |file: &&String| others.contains(file) || !names.contains(*file);
        let plugins = before.iter().filter(|(_, entry)| entry.is_plugin()).map(|(file, _)| file);
        let stale = plugins.filter(is_stale).cloned().collect();
        let mut look = Look { before, stale, leaving: Vec::new(), changes: Changes::default(), refusals: 0 };
        discovery::ask_all(found, self.host.stranger_bounds(), |found, answer| self.settle(&mut look, found, answer));

        let Look { before, stale, mut leaving, mut changes, refusals } = look;
        if refusals > SAID_REFUSALS {
            log::warn!("{} more are refused: plugrack list has the reasons", refusals - SAID_REFUSALS);
        }
        let mut entries = self.lock();
        leaving.extend(stale.iter().filter_map(|file| entries.remove(file)?.quit(Quit::Gone)));
        entries.retain(|file, _| names.contains(file));
        self.publish(&entries);
        let is_plugin = |file: &String| entries.get(file).is_some_and(Entry::is_plugin);
        let were_plugins = before.iter().filter(|(_, entry)| entry.is_plugin()).map(|(file, _)| file);
        changes.removed = were_plugins.filter(|file| !is_plugin(file)).cloned().collect();
        changes.refused = entries.iter().filter(|(_, entry)| !entry.is_plugin()).map(|(file, _)| file.clone()).collect();
        drop(entries);
        let deadline = Instant::now() + STOP_ALL_TIME;
        for (plugin, ended) in leaving {
            await_end(&plugin, &ended, deadline);
        }
        Ok(changes)
    }

    /// Takes in one thing of the plugins directory, by what it said to who it is.
    fn settle(&self, look: &mut Look, found: Found, answer: Result<Metadata, Refusal>) {
        let enabled = |id: &str| {
            self.host.store.is_enabled(id).map_err(|error| format!("cannot read whether it is enabled: {error}").into())
        };
        let mut answer = answer.map_err(|refusal| (None, refusal)).and_then(|metadata| match enabled(&metadata.id) {
            Ok(enabled) => Ok((metadata, enabled)),
            Err(refusal) => Err((Some(metadata.id), refusal)),
        });
        let mut entries = self.lock();
        if self.closing.load(Ordering::Acquire) {
            return;
        }
        let was_plugin = look.before.get(&found.file).is_some_and(Entry::is_plugin);
        let mut in_way = vec![found.file.clone()];
        if let Ok((metadata, _)) = &answer {
            let (stale, rest): (Vec<_>, Vec<_>) = entries
                .iter()
                .filter_map(|(file, entry)| Some((file, entry.conflict(file, metadata)?)))
                .partition(|(file, _)| look.stale.contains(*file));
            match rest.into_iter().next() {
                Some((_, reason)) => answer = Err((Some(metadata.id.clone()), reason.into())),
                None => in_way.extend(stale.into_iter().map(|(file, _)| file.clone())),
            }
        }
        let id = answer.as_ref().ok().map(|(metadata, _)| metadata.id.clone());
        let mut was = match entries.get(&found.file) {
            Some(Entry::Accepted { plugin, .. }) => Some(Arc::clone(plugin)),
            Some(Entry::Refused { was, .. }) => was.clone(),
            None => None,
        };
        let quitting = in_way.iter().filter(|file| look.stale.remove(*file));
        look.leaving.extend(quitting.filter_map(|file| {
            let entry = entries.remove(file)?;
            let same = matches!(&entry, Entry::Accepted { plugin, .. } if Some(plugin.id()) == id.as_deref());
            entry.quit(if same { Quit::Replaced } else { Quit::Gone })
        }));
        let accepted = answer.and_then(|(metadata, enabled)| {
            let id = metadata.id.clone();
            let count = entries.values().filter(|entry| entry.is_plugin()).count();
            if let Err(reason) = self.host.room.check(count) {
                return Err((Some(id), Refusal { reason, for_want: true }));
            }
            let same = look.leaving.iter().filter(|(plugin, _)| plugin.id() == id).cloned().collect();
            self.accept(&found, metadata, enabled, same).map_err(|refusal| (Some(id), refusal))
        });
        let entry = accepted.unwrap_or_else(|(id, Refusal { reason, for_want })| {
            self.wanting.fetch_or(for_want, Ordering::Relaxed);
            let known = matches!(look.before.get(&found.file), Some(Entry::Refused { reason: old, .. }) if *old == reason);
            look.refusals += usize::from(!known);
            if !known && look.refusals <= SAID_REFUSALS {
                log::warn!("{}: refused: {reason}", found.file);
                self.host.store.note_event(id.as_deref().unwrap_or(&found.file), "refused", &reason);
            }
            // Nobody takes over what waits for those that were to be replaced.
            let waiting = look.leaving.iter().filter(|(plugin, _)| Some(plugin.id()) == id.as_deref());
            waiting.for_each(|(plugin, _)| plugin.fail_waiting());
            Entry::Refused { found: found.clone(), was: was.take(), id, reason }
        });
        let is_plugin = entry.is_plugin();
        if is_plugin {
            if was_plugin { &mut look.changes.changed } else { &mut look.changes.added }.push(found.file.clone());
        }
        entries.insert(found.file, entry);
        if is_plugin || was_plugin {
            self.publish(&entries);
        }
    }

    /// Puts a plugin in the rack, and has it started once those with its id that are to end have ended.
    fn accept(
        &self,
        found: &Found,
        metadata: Metadata,
        enabled: bool,
        before: Vec<(Arc<Plugin>, Receiver<()>)>,
    ) -> Result<Entry, Refusal> {
        let id = metadata.id.clone();
        let (control, commands) = bounded(COMMANDS);
        let log = PluginLog::new(self.host.data.log(&id));
        let plugin = Arc::new(Plugin::new(metadata, found.program.clone(), log, control, enabled));
        let supervisor = Supervisor::new(Arc::clone(&plugin), Arc::clone(&self.host), commands);
        let (alive, ended) = bounded(0);
        let waiting = Arc::clone(&plugin);
        let run = move || {
            let deadline = Instant::now() + STOP_ALL_TIME;
            for (old, ended) in before {
                // Requests are held meanwhile, though no longer than any.
                while Instant::now() < deadline && ended.recv_timeout(HOLD_TICK).is_err_and(|error| error.is_timeout()) {
                    waiting.expire_held(None);
                }
                old.queue.move_to(&waiting.queue);
            }
            // Its process ends with it; a plugin that nobody looks after must not seem to run.
            if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| supervisor.run())).is_err() {
                waiting
                    .abandon("the host itself failed to look after it, which is a fault of plugrack's: its log has the reason");
            }
            drop::<Sender<()>>(alive);
        };
        let thread = std::thread::Builder::new().name(format!("plugin-{id}")).stack_size(SUPERVISOR_STACK);
        thread.spawn(run).map_err(|error| {
            let (reason, for_want) = room::explain("cannot start its supervisor", &error);
            Refusal { reason, for_want }
        })?;
        Ok(Entry::Accepted { plugin, fingerprint: found.fingerprint, ended })
    }

    fn publish(&self, entries: &BTreeMap<String, Entry>) {
        let plugins =
            || entries.values().filter_map(|entry| if let Entry::Accepted { plugin, .. } = entry { Some(plugin) } else { None });
        let taken: BTreeSet<&str> = plugins().map(|plugin| plugin.metadata.route.as_str()).collect();
        let were = entries.values().filter_map(|entry| if let Entry::Refused { was, .. } = entry { was.as_ref() } else { None });
        let were = were.filter(|plugin| !taken.contains(plugin.metadata.route.as_str()));
        let lead = |plugin: &Arc<Plugin>| (plugin.metadata.route.clone(), Arc::clone(plugin));
        let routes = Arc::new(Routes::new(plugins().chain(were).map(lead).collect()));
        *self.routes.write().unwrap_or_else(PoisonError::into_inner) = routes;
    }

    /// Gives a plugin a command, and waits until it is settled.
    pub(crate) fn command(&self, plugin: &Plugin, command: impl FnOnce(Sender<()>) -> Command) {
        let (done, settled) = bounded(0);
        if plugin.control.send(command(done)).is_ok() {
            // It ends by the channel's end, or is told as it is by then.
            settled.recv_timeout(SETTLE_TIME).unwrap_or_default();
        }
    }

    /// Notes whether a plugin may run, and starts or stops it.
    pub(crate) fn set_enabled(&self, plugin: &Plugin, enabled: bool) -> Result<(), StoreError> {
        self.host.store.set_enabled(plugin.id(), enabled)?;
        self.host.store.note_event(plugin.id(), if enabled { "enabled" } else { "disabled" }, "by the operator");
        // A supervisor that is gone belongs to a plugin that is.
        drop(plugin.control.send(Command::Enabled(enabled)));
        self.command(plugin, if enabled { Command::Start } else { Command::Stop });
        Ok(())
    }

    /// Stops all plugins, side by side, until a deadline, and adds none any more.
    pub(crate) fn stop_all(&self, deadline: Instant) {
        let entries = self.lock();
        self.closing.store(true, Ordering::Release);
        let leaving: Vec<_> = entries.values().filter_map(|entry| entry.quit(Quit::HostStops)).collect();
        drop(entries);
        for (plugin, ended) in leaving {
            await_end(&plugin, &ended, deadline);
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
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

    /// Tells a plugin and its supervisor to end; gives it and what closes at its end.
    fn quit(&self, quit: Quit) -> Option<(Arc<Plugin>, Receiver<()>)> {
        let Self::Accepted { plugin, ended, .. } = self else { return None };
        // A supervisor that is gone has nothing to end.
        drop(plugin.control.send(Command::Quit(quit)));
        Some((Arc::clone(plugin), ended.clone()))
    }
}

/// Waits for the end of a plugin that was told to quit.
fn await_end(plugin: &Plugin, ended: &Receiver<()>, deadline: Instant) {
    if ended.recv_deadline(deadline).is_err_and(|error| error.is_timeout()) {
        log::error!("{}: it could not be stopped in time", plugin.id());
    }
}
