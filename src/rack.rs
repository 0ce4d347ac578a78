//! All plugins: found, started, looked up by id and by route, stopped.

use crate::discovery::{self, Fingerprint, Found};
use crate::host::Host;
use crate::output::PluginLog;
use crate::plugin::{Command, Plugin};
use crate::protocol::metadata::Metadata;
use crate::route::Routes;
use crate::store::StoreError;
use crate::supervisor::{COMMANDS, Supervisor};
use crossbeam_channel::{Receiver, Sender, bounded};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

/// Time for all plugins to stop: the 5 s of one, and some for the machine. Docker gives a container 10 s, runit's `sv` 7 s.
const STOP_ALL_TIME: Duration = Duration::from_millis(5800);

/// Time the operator's commands wait for their plugin to settle: a start of 10 s and a stop of 5 s fit.
const SETTLE_TIME: Duration = Duration::from_secs(20);

/// All plugins of the host.
pub(crate) struct Rack {
    host: Arc<Host>,
    dir: PathBuf,
    /// By name in the plugins directory.
    entries: Mutex<BTreeMap<String, Entry>>,
    routes: RwLock<Arc<Routes<Arc<Plugin>>>>,
    /// Held while the directory is looked through, which must not happen twice at once.
    scanning: Mutex<()>,
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

impl Rack {
    /// An empty rack, for the plugins of a directory.
    pub(crate) fn new(host: Arc<Host>, dir: PathBuf) -> Self {
        let routes = RwLock::new(Arc::new(Routes::new(Vec::new())));
        Self { host, dir, entries: Mutex::default(), routes, scanning: Mutex::default() }
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
    pub(crate) fn rescan(&self) -> io::Result<Changes> {
        let _alone = self.scanning.lock().unwrap_or_else(PoisonError::into_inner);
        let found = discovery::scan(&self.dir)?;
        let before = self.entries();
        let is_same = |found: &Found| match before.get(&found.file) {
            Some(Entry::Accepted { fingerprint, .. }) => fingerprint.is_some() && *fingerprint == found.fingerprint,
            _ => false,
        };
        let (same, new): (Vec<_>, Vec<_>) = found.into_iter().partition(is_same);
        let mut after: BTreeMap<String, Entry> =
            same.into_iter().filter_map(|found| before.get(&found.file).map(|entry| (found.file, entry.clone()))).collect();
        let mut changes = Changes::default();
        let answers = discovery::ask_all(new, self.host.stranger_bounds());

        let gone: Vec<_> = before.iter().filter(|(file, _)| !after.contains_key(*file)).collect();
        quit(gone.iter().map(|(_, entry)| *entry), Instant::now() + STOP_ALL_TIME);

        for (found, answer) in answers {
            let was_plugin = matches!(before.get(&found.file), Some(Entry::Accepted { .. }));
            let accepted = answer.map_err(|reason| (None, reason)).and_then(|metadata| match conflict(&after, &metadata) {
                Some(reason) => Err((Some(metadata.id), reason)),
                None => self.accept(&found, metadata.clone()).map_err(|reason| (Some(metadata.id), reason)),
            });
            let entry = match accepted {
                Ok(entry) => {
                    if was_plugin { &mut changes.changed } else { &mut changes.added }.push(found.file.clone());
                    entry
                }
                Err((id, reason)) => {
                    let known = matches!(before.get(&found.file), Some(Entry::Refused { reason: old, .. }) if *old == reason);
                    if !known {
                        log::warn!("{}: refused: {reason}", found.file);
                        self.host.store.note_event(id.as_deref().unwrap_or(&found.file), "refused", &reason);
                    }
                    Entry::Refused { id, reason }
                }
            };
            after.insert(found.file, entry);
        }
        let is_plugin = |file: &String| matches!(after.get(file), Some(Entry::Accepted { .. }));
        let was_accepted = |entry: &Entry| matches!(entry, Entry::Accepted { .. });
        changes.removed = gone
            .into_iter()
            .filter(|(file, entry)| was_accepted(entry) && !is_plugin(file))
            .map(|(file, _)| file.clone())
            .collect();
        changes.refused = after.iter().filter(|(_, entry)| !was_accepted(entry)).map(|(file, _)| file.clone()).collect();
        self.publish(after);
        Ok(changes)
    }

    /// Puts a plugin in the rack, and has it started.
    fn accept(&self, found: &Found, metadata: Metadata) -> Result<Entry, String> {
        let id = metadata.id.clone();
        let enabled = self.host.store.is_enabled(&id).map_err(|error| format!("cannot read whether it is enabled: {error}"))?;
        let (control, commands) = bounded(COMMANDS);
        let log = PluginLog::new(self.host.data.log(&id));
        let plugin = Arc::new(Plugin::new(metadata, found.program.clone(), log, control, enabled));
        let supervisor = Supervisor::new(Arc::clone(&plugin), Arc::clone(&self.host), commands);
        let (alive, ended) = bounded(0);
        let thread = std::thread::Builder::new().name(format!("plugin-{id}"));
        let run = move || {
            supervisor.run();
            drop::<Sender<()>>(alive);
        };
        thread.spawn(run).map_err(|error| format!("cannot start its supervisor: {error}"))?;
        Ok(Entry::Accepted { plugin, fingerprint: found.fingerprint, ended })
    }

    fn publish(&self, entries: BTreeMap<String, Entry>) {
        let accepted = entries.values().filter_map(|entry| match entry {
            Entry::Accepted { plugin, .. } => Some((plugin.metadata.route.clone(), Arc::clone(plugin))),
            Entry::Refused { .. } => None,
        });
        let routes = Arc::new(Routes::new(accepted.collect()));
        *self.routes.write().unwrap_or_else(PoisonError::into_inner) = routes;
        *self.lock() = entries;
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

    /// Stops all plugins, side by side.
    pub(crate) fn stop_all(&self) {
        quit(self.entries().values(), Instant::now() + STOP_ALL_TIME);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a plugin cannot be beside those there are.
fn conflict(entries: &BTreeMap<String, Entry>, metadata: &Metadata) -> Option<String> {
    entries.iter().find_map(|(file, entry)| match entry {
        Entry::Accepted { plugin, .. } if plugin.id() == metadata.id => {
            Some(format!("the id {} is taken by {file}", metadata.id))
        }
        Entry::Accepted { plugin, .. } if plugin.metadata.route == metadata.route => {
            Some(format!("the route {} is taken by {file}", metadata.route))
        }
        _ => None,
    })
}

/// Ends plugins and their supervisors, side by side, and waits for them.
fn quit<'a>(entries: impl Iterator<Item = &'a Entry> + Clone, deadline: Instant) {
    for entry in entries.clone() {
        if let Entry::Accepted { plugin, .. } = entry {
            drop(plugin.control.send(Command::Quit));
        }
    }
    for entry in entries {
        if let Entry::Accepted { plugin, ended, .. } = entry
            && ended.recv_deadline(deadline).is_err_and(|error| error.is_timeout())
        {
            log::error!("{}: it could not be stopped in time", plugin.id());
        }
    }
}
