//! A scan of the plugins directory: reads the metadata of new and changed files, then accepts them, refuses them, or tries
//! them as updates.

use super::{Entry, Registry, Rejected, STOP_ALL_TIME, Supervised, await_end, history};
use crate::lock::unpoisoned;
use crate::plugins::context::Context;
use crate::plugins::discovery::{self, Found, Refusal};
use crate::plugins::plugin::{Admission, Command, Plugin, Quit, State};
use crate::plugins::supervisor::Trial;
use crate::process::output::PluginLog;
use crate::protocol::metadata::Metadata;
use crossbeam_channel::bounded;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

/// Time that a `rescan` request waits for its scan: less than the command waits for its answer.
const RESCAN_TIME: Duration = Duration::from_secs(50);

/// Most new refusals that one scan logs and records individually. The rest is one line, so that a directory of unrelated files floods
/// neither the log nor the store's queue of 1024 changes.
const MAX_LOGGED_REFUSALS: usize = 1000;

/// Most lines of a file's `--metadata` output that its log gets.
const MAX_PRINTED: usize = 50;

/// The changes made by a scan, by name in the plugins directory.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Changes {
    /// New plugins.
    pub(crate) added: Vec<String>,
    /// Plugins whose file was replaced.
    pub(crate) changed: Vec<String>,
    /// Plugins whose file is gone or was refused.
    pub(crate) removed: Vec<String>,
    /// Refused files, new or not.
    pub(crate) refused: Vec<String>,
    /// Plugins that keep their old process, because their new file was refused.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) updates_refused: Vec<UpdateRefused>,
}

/// A plugin that keeps its old process.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct UpdateRefused {
    /// The plugin's id.
    id: String,
    /// The name of the file.
    file: String,
    /// Why the new file was refused.
    reason: String,
}

/// Why a scan takes place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ScanReason {
    /// The operator asked for it: refused files are retried.
    Ordered,
    /// A file changed or is due for a retry: all others are left alone.
    Due,
}

/// The result of a finished scan: the changes, and the plugins that it told to quit.
#[derive(Default)]
pub(super) struct Finished {
    changes: Changes,
    pub(super) leaving: Vec<Supervised>,
}

/// The entries of the plugins directory, and the state of the scan under way.
#[derive(Default)]
pub(super) struct ScanState {
    /// By name in the plugins directory. Who reads the list takes a share of it, and does not hold the lock.
    pub(super) entries: Arc<BTreeMap<String, Entry>>,
    /// The names in the directory when the last scan began.
    pub(super) names: BTreeSet<String>,
    /// Files whose `--metadata` call is under way, or whose update is on trial.
    pub(super) pending: BTreeSet<String>,
    /// Updates on trial, by name.
    pub(super) trials: BTreeMap<String, Supervised>,
    /// Number of the last scan that began, and of the last that finished.
    pub(super) begun: u64,
    pub(super) finished: u64,
    /// Number of answers that the scan under way still waits for.
    outstanding: usize,
    /// Whether to log the scan even if nothing has changed.
    ordered: bool,
    /// The plugins before the scan.
    before: BTreeSet<String>,
    /// Plugins whose file is gone or was replaced. Each keeps running until its file is processed, an earlier file takes its id or route,
    /// or the scan ends.
    stale: BTreeSet<String>,
    /// Plugins accepted in this scan under an id without an owner. A new file that sorts before one of them takes over its id or route.
    fresh: BTreeSet<String>,
    /// Plugins that were told to quit, with the channels that close at their end.
    leaving: Vec<Supervised>,
    changes: Changes,
    /// Number of new refusals.
    refusals: usize,
    /// Result of the last finished scan.
    pub(super) last: Arc<Finished>,
}

/// One item that the current scan waits for: a file, or the thread that begins the scan. Dropping it counts the item as done, also during
/// a panic, so that no scan waits for ever. It must not be dropped while the list is locked.
struct Outstanding {
    registry: Arc<Registry>,
    file: Option<String>,
    is_finished: bool,
}

impl Outstanding {
    fn of(registry: &Arc<Registry>, file: Option<&str>) -> Self {
        Self { registry: Arc::clone(registry), file: file.map(str::to_owned), is_finished: true }
    }

    /// Processes the answer of one file.
    fn apply_answer(mut self, found: Found, answer: Result<Metadata, Refusal>) {
        // The scan goes on to wait for the outcome of an update on trial.
        self.is_finished = !self.registry.apply(found, answer, true);
    }

    /// Gives the item up without counting it as done.
    fn leave(mut self) {
        self.is_finished = false;
    }
}

impl Drop for Outstanding {
    fn drop(&mut self) {
        if !self.is_finished {
            return;
        }
        let mut state = self.registry.lock();
        if let Some(file) = &self.file {
            state.pending.remove(file);
        }
        state.outstanding -= 1;
        self.registry.finish_scan(state);
    }
}

/// Work that follows a change of the list and may block on a disk, a supervisor or a client. It runs when this is dropped. A function
/// creates it before it locks the list, so that it is dropped after the lock.
#[derive(Default)]
pub(super) struct Deferred(Vec<Box<dyn FnOnce()>>);

impl Deferred {
    fn push(&mut self, task: impl FnOnce() + 'static) {
        self.0.push(Box::new(task));
    }

    /// Gives a plugin's supervisor a command.
    fn command(&mut self, plugin: &Arc<Plugin>, command: Command) {
        let control = plugin.control.clone();
        // A supervisor that is gone has nothing to do.
        self.push(move || drop(control.send(command)));
    }

    /// Tells the supervisor of an entry's plugin to end. Gives the plugin, and what closes at its end.
    pub(super) fn quit(&mut self, entry: &Entry, quit: Quit) -> Option<Supervised> {
        let supervised = entry.supervised()?;
        self.command(&supervised.0, Command::Quit(quit));
        Some(supervised)
    }

    /// Logs that a file is refused, and records it and what it printed in its `history`, see [`history`].
    fn log_refused(&mut self, context: &Arc<Context>, file: &str, history: Option<String>, rejected: &Rejected) {
        let (context, file, rejected) = (Arc::clone(context), file.to_owned(), rejected.clone());
        self.push(move || {
            let Rejected { reason, retry_at, printed, .. } = &rejected;
            let again = if retry_at.is_some() { " (the host tries again by itself)" } else { "" };
            log::warn!("{file}: refused: {reason}{again}");
            let Some(history) = history else { return };
            context.store.note_event(&history, "refused", reason);
            if !printed.is_empty() {
                let log = PluginLog::new(context.data.log(&history));
                log.note(&format!("{file} --metadata: {reason}"));
                let printed = printed.iter().rev().take(MAX_PRINTED).rev();
                printed.for_each(|line| log.note(&format!("{file} --metadata printed: {line}")));
            }
        });
    }
}

impl Drop for Deferred {
    fn drop(&mut self) {
        self.0.drain(..).for_each(|task| task());
    }
}

impl Registry {
    /// Rescans the plugins directory: starts new plugins, stops removed ones and updates replaced ones. Waits for all of that, except for
    /// the starts of new plugins.
    ///
    /// # Errors
    /// The directory cannot be read, or the scan does not finish in time.
    pub(crate) fn rescan(self: &Arc<Self>) -> io::Result<Changes> {
        let deadline = Instant::now() + RESCAN_TIME;
        let number = self.begin_scan(ScanReason::Ordered)?;
        let Some(last) = self.wait_for_scan(number, deadline) else {
            return Err(io::Error::other("some files have not printed their metadata yet; plugrack list shows the progress"));
        };
        let Finished { changes, leaving } = &*last;
        let deadline = Instant::now() + STOP_ALL_TIME;
        for (plugin, ended) in leaving {
            if plugin.queue.is_succeeded() {
                // A replaced process may take its time to finish its requests.
                ended.recv_deadline(deadline).ok();
            } else {
                await_end(plugin, ended, deadline);
            }
        }
        Ok(changes.clone())
    }

    /// Waits until a scan has finished, and returns the last result; none at the deadline.
    pub(super) fn wait_for_scan(&self, number: u64, deadline: Instant) -> Option<Arc<Finished>> {
        let left = deadline.saturating_duration_since(Instant::now());
        let waited = self.scan_finished.wait_timeout_while(self.lock(), left, |state| state.finished < number);
        let state = unpoisoned(waited).0;
        (state.finished >= number).then(|| Arc::clone(&state.last))
    }

    /// Begins a scan, or has the one under way include the present changes. Returns its number.
    ///
    /// # Errors
    /// The directory cannot be read; then nothing changes.
    pub(crate) fn begin_scan(self: &Arc<Self>, reason: ScanReason) -> io::Result<u64> {
        let found = discovery::list(&self.dir)?;
        let (number, found) = self.lock().begin(found, reason);
        // The scan finishes when all of these have been dropped.
        let begun = Outstanding::of(self, None);
        let found: Vec<_> = found.into_iter().map(|found| (Outstanding::of(self, Some(&found.file)), found)).collect();
        for (outstanding, found) in found {
            self.process(found, outstanding);
        }
        drop(begun);
        Ok(number)
    }

    /// Processes one file: with its cached metadata if the file is unchanged, otherwise by a `--metadata` call on another thread.
    fn process(self: &Arc<Self>, found: Found, outstanding: Outstanding) {
        if let Some(metadata) = self.cached_metadata(&found) {
            return outstanding.apply_answer(found, Ok(metadata));
        }
        let registry = Arc::clone(self);
        self.metadata_calls.run(Box::new(move || {
            let answer = catch_unwind(AssertUnwindSafe(|| registry.call_metadata(&found))).unwrap_or_else(|_| {
                // Without an answer the scan would remove its plugin.
                Err(Refusal::passing("its --metadata call failed by a bug in plugrack: the host's log has the reason"))
            });
            outstanding.apply_answer(found, answer);
        }));
    }

    /// The cached metadata of a file, if the file is unchanged.
    fn cached_metadata(&self, found: &Found) -> Option<Metadata> {
        if found.manifest.is_some() {
            // A manifest is read with the directory.
            return None;
        }
        // If the cache cannot be read, the host calls the file again.
        let program = self.context.store.program(&found.file).ok()?;
        let is_same = program.fingerprint.is_some() && program.fingerprint == self.answer_key(found);
        Metadata::parse(program.metadata.filter(|_| is_same)?.as_bytes()).ok()
    }

    /// Text that identifies everything an answer depends on, including the memory limit, because SDKs reduce `concurrency` under it.
    fn answer_key(&self, found: &Found) -> Option<String> {
        let memory = self.context.plugin_memory.map(|bytes| format!(" {bytes}")).unwrap_or_default();
        Some(found.answer_key()? + &memory)
    }

    /// Runs a file's `--metadata` call, and stores the answer.
    fn call_metadata(&self, found: &Found) -> Result<Metadata, Refusal> {
        found.check_name()?;
        if let Some(manifest) = &found.manifest {
            let manifest = manifest.as_ref().map_err(|why| Refusal::lasting(why.clone()))?;
            return Ok(manifest.metadata.clone());
        }
        let bounds = self.context.program_bounds(&found.file).map_err(Refusal::passing)?;
        let answer_key = self.answer_key(found);
        let metadata = discovery::read_metadata(found, &bounds, self.context.metadata_timeout)?;
        if let (Some(answer_key), Ok(json)) = (answer_key, serde_json::to_string(&metadata)) {
            self.context.store.note_program(&found.file, answer_key, json);
        }
        Ok(metadata)
    }

    /// Puts a plugin's current file into use at once if it was replaced or refused; stops the plugin first. For an operator who starts or
    /// restarts the plugin by its id or file name. True if it did.
    ///
    /// # Errors
    /// Why the file is refused. A running plugin is left as it is.
    pub(crate) fn replace(self: &Arc<Self>, name: &str) -> Result<bool, String> {
        let Some((file, entry)) = self.find(name) else { return Ok(false) };
        if matches!(&entry, Entry::Accepted { plugin, .. } if plugin.is_unchanged()) {
            return Ok(false);
        }
        let found = match &entry {
            Entry::Refused { found, .. } if found.check_name().is_err() => found.clone(),
            _ => discovery::inspect(&self.dir, &file),
        };
        let answer = self.cached_metadata(&found).map_or_else(|| self.call_metadata(&found), Ok);
        self.apply(found, answer, false);
        let mut state = self.lock();
        if state.finished == state.begun {
            // The next scan must not report this change again.
            (state.changes, state.leaving) = (Changes::default(), Vec::new());
        }
        match state.entries.get(&file) {
            Some(Entry::Refused { rejected, .. } | Entry::Accepted { rejected: Some(rejected), .. }) => {
                Err(rejected.reason.clone())
            }
            _ => Ok(true),
        }
    }

    /// Processes one entry of the plugins directory with its metadata or refusal. True if it is now an update on trial, which requires that
    /// the plugin is not to be replaced at once.
    fn apply(self: &Arc<Self>, found: Found, answer: Result<Metadata, Refusal>, may_try: bool) -> bool {
        let mut answer = answer.map_err(|refusal| (None, refusal)).and_then(|metadata| match self.admit(&found, &metadata) {
            Ok(admitted) => Ok((metadata, admitted)),
            Err(refusal) => Err((Some(metadata.id), refusal)),
        });
        // A route that existed before the host started still answers, with 503.
        let before = answer.is_err().then(|| self.placeholder(&found)).flatten();
        let mut deferred = Deferred::default();
        let mut state = self.lock();
        if self.closing.load(Ordering::Acquire) || !state.names.contains(&found.file) {
            return false;
        }
        let ScanState { entries, before: were_plugins, stale, fresh, leaving, changes, refusals, trials, .. } = &mut *state;
        let entries = Arc::make_mut(entries);
        let mut conflicting = Vec::new();
        if let Ok((metadata, _)) = &answer {
            let others = entries.iter().filter(|(file, _)| **file != found.file);
            let conflicts = others.filter_map(|(file, entry)| Some((file, entry.conflict(file, metadata)?)));
            let mut refused = None;
            for (file, reason) in conflicts {
                if stale.contains(file) || (fresh.contains(file) && *file > found.file) {
                    conflicting.push(file.clone());
                } else {
                    refused = Some(reason);
                }
            }
            if let Some(reason) = refused {
                conflicting.clear();
                answer = Err((Some(metadata.id.clone()), Refusal::lasting(reason)));
            }
        }
        let running = match entries.get(&found.file) {
            Some(Entry::Accepted { plugin, .. }) => Some(Arc::clone(plugin)),
            _ => None,
        };
        if running.as_ref().is_some_and(|plugin| plugin.fingerprint.is_some() && plugin.fingerprint == found.fingerprint) {
            stale.remove(&found.file);
            return false;
        }
        if let Some(plugin) = running.as_ref().filter(|plugin| plugin.status().state.has_process()) {
            match answer {
                Err((_, refusal)) => {
                    stale.remove(&found.file);
                    self.refuse_update(&mut state, &found, refusal, &mut deferred);
                    return false;
                }
                Ok((metadata, (true, _))) if may_try && conflicting.is_empty() && plugin.status().state == State::Ready => {
                    stale.remove(&found.file);
                    let (id, from, to) = (plugin.id().to_owned(), plugin.metadata.version.clone(), metadata.version.clone());
                    deferred.push(move || log::info!("{id}: starting version {to} beside version {from}"));
                    return match self.try_update(&found, metadata, plugin) {
                        Ok(trial) => {
                            trials.insert(found.file, trial);
                            true
                        }
                        Err(refusal) => {
                            self.refuse_update(&mut state, &found, refusal, &mut deferred);
                            false
                        }
                    };
                }
                other => answer = other,
            }
        }
        let was_plugin = were_plugins.contains(&found.file);
        let id = answer.as_ref().ok().map(|(metadata, _)| metadata.id.clone());
        let (mut was, rejected_before) = match entries.get(&found.file) {
            Some(Entry::Accepted { plugin, rejected, .. }) => (Some(Arc::clone(plugin)), rejected.clone()),
            Some(Entry::Refused { was, rejected, .. }) => (was.clone().or(before), Some(rejected.clone())),
            None => (before, None),
        };
        let evicted: Vec<(Found, String)> = match &answer {
            Ok((metadata, _)) => conflicting
                .iter()
                .filter(|file| fresh.contains(*file))
                .filter_map(|file| {
                    let loser = entries.get(file)?;
                    Some((loser.found(file), loser.conflict(&found.file, metadata)?))
                })
                .collect(),
            Err(_) => Vec::new(),
        };
        conflicting.push(found.file.clone());
        let mut quit = Vec::new();
        for file in &conflicting {
            stale.remove(file);
            let Some(entry) = entries.remove(file) else { continue };
            let same = matches!(&entry, Entry::Accepted { plugin, .. } if Some(plugin.id()) == id.as_deref());
            quit.extend(deferred.quit(&entry, if same { Quit::Replaced } else { Quit::Gone }));
        }
        let accepted = answer.and_then(|(metadata, (enabled, is_new))| {
            let id = metadata.id.clone();
            let count = entries.values().filter(|entry| entry.is_plugin()).count();
            if let Err(reason) = self.context.capacity.check(count) {
                return Err((Some(id), Refusal::passing(reason)));
            }
            let same = quit.iter().filter(|(plugin, _)| plugin.id() == id).cloned().collect();
            let accepted = self.accept(&found, metadata, enabled, same).map_err(|refusal| (Some(id), refusal))?;
            if is_new {
                fresh.insert(found.file.clone());
            }
            Ok(accepted)
        });
        let entry = accepted.unwrap_or_else(|(id, refusal)| {
            let known = rejected_before.as_ref().is_some_and(|before| before.reason == refusal.reason);
            let rejected = Rejected::new(&found, refusal, rejected_before.as_ref());
            if !known {
                *refusals += 1;
                if *refusals <= MAX_LOGGED_REFUSALS {
                    let history = history(entries, &found.file, was.as_deref());
                    deferred.log_refused(&self.context, &found.file, history, &rejected);
                }
            }
            // No other plugin takes over the requests of the plugins that were to be replaced.
            for (plugin, _) in quit.iter().filter(|(plugin, _)| Some(plugin.id()) == id.as_deref()) {
                let plugin = Arc::clone(plugin);
                deferred.push(move || plugin.fail_waiting());
            }
            if let Some(was) = &was {
                was.set_status(Admission::Shut, |status| status.retry_at = rejected.retry_at);
            }
            Entry::Refused { found: found.clone(), was: was.take(), id, rejected }
        });
        leaving.extend(quit);
        for (loser, reason) in evicted {
            let file = loser.file.clone();
            fresh.remove(&file);
            changes.added.retain(|added| *added != file);
            let rejected = Rejected::new(&loser, Refusal::lasting(reason), None);
            deferred.log_refused(&self.context, &file, history(entries, &file, None), &rejected);
            entries.insert(file, Entry::Refused { found: loser, was: None, id: None, rejected });
        }
        if entry.is_plugin() {
            if was_plugin { &mut changes.changed } else { &mut changes.added }.push(found.file.clone());
        }
        let changes_routes =
            entry.is_plugin() || was_plugin || conflicting.len() > 1 || matches!(&entry, Entry::Refused { was: Some(_), .. });
        entries.insert(found.file, entry);
        if changes_routes {
            self.publish(&state.entries);
        }
        false
    }

    /// The plugin that a file was before the host started. It keeps its route and answers 503.
    fn placeholder(&self, found: &Found) -> Option<Arc<Plugin>> {
        if self.lock().entries.contains_key(&found.file) {
            return None;
        }
        let metadata = self.context.store.program(&found.file).ok()?.metadata?;
        let metadata = Metadata::parse(metadata.as_bytes()).ok()?;
        let owner = self.context.store.owner(&metadata.id).ok()?;
        owner.file.filter(|file| *file == found.file)?;
        let (control, _) = bounded(0);
        let log = PluginLog::new(self.context.data.log(&metadata.id));
        let socket = self.context.data.plugin_socket(&metadata.id, None);
        Some(Arc::new(Plugin::new(metadata, found, socket, log, control, false)))
    }

    /// Records that a plugin keeps its old process, because its new file was refused.
    fn refuse_update(&self, state: &mut ScanState, found: &Found, refusal: Refusal, deferred: &mut Deferred) {
        let entry = Arc::make_mut(&mut state.entries).get_mut(&found.file);
        let Some(Entry::Accepted { plugin, rejected, .. }) = entry else { return };
        let (id, before) = (plugin.id(), rejected.take());
        let refused = Rejected::new(found, refusal, before.as_ref());
        if before.is_none_or(|before| before.reason != refused.reason) {
            let (context, plugin, refused) = (Arc::clone(&self.context), Arc::clone(plugin), refused.clone());
            deferred.push(move || {
                let Rejected { reason, printed, .. } = &refused;
                log::warn!("{}: update refused, the old process keeps running: {reason}", plugin.id());
                context.store.note_event(plugin.id(), "update_refused", reason);
                plugin.log.note(&format!("update refused: {reason}"));
                let printed = printed.iter().rev().take(MAX_PRINTED).rev();
                printed.for_each(|line| plugin.log.note(&format!("--metadata printed: {line}")));
            });
        }
        plugin.set_update_refused(Some(refused.reason.clone()));
        let update = UpdateRefused { id: id.to_owned(), file: found.file.clone(), reason: refused.reason.clone() };
        state.changes.updates_refused.push(update);
        *rejected = Some(refused);
    }

    /// Starts an update beside the plugin that it replaces.
    fn try_update(self: &Arc<Self>, found: &Found, metadata: Metadata, old: &Arc<Plugin>) -> Result<Supervised, Refusal> {
        let number = self.updates.fetch_add(1, Ordering::Relaxed) + 1;
        let log = if metadata.id == old.id() { old.log.beside() } else { PluginLog::new(self.context.data.log(&metadata.id)) };
        let (registry, file) = (Arc::clone(self), found.file.clone());
        let trial: Trial = Box::new(move |outcome| registry.conclude(&file, outcome));
        self.supervise(found, metadata, log, Some((number, trial)), true, Vec::new())
    }

    /// Handles the outcome of an update's first start: the update takes over, or the old process stays.
    fn conclude(self: &Arc<Self>, file: &str, outcome: Result<(), String>) {
        let outstanding = Outstanding::of(self, Some(file));
        let mut deferred = Deferred::default();
        let mut state = self.lock();
        let Some((plugin, ended)) = state.trials.remove(file) else {
            // The host is stopping, and has told the update so.
            drop(state);
            return outstanding.leave();
        };
        let old = match state.entries.get(file) {
            Some(Entry::Accepted { plugin, ended, .. }) => Some((Arc::clone(plugin), ended.clone())),
            _ => None,
        };
        match (outcome, old) {
            (Ok(()), Some((old, old_ended))) => {
                let same = old.id() == plugin.id();
                let (from, to) = (&old.metadata.version, &plugin.metadata.version);
                self.context.store.note_event(plugin.id(), "updated", &format!("from version {from} to {to}"));
                self.context.store.note_owner(plugin.id(), file);
                let entry = Entry::Accepted { plugin: Arc::clone(&plugin), ended, rejected: None };
                Arc::make_mut(&mut state.entries).insert(file.to_owned(), entry);
                self.publish(&state.entries);
                let stopped = old.status().state == State::Stopped;
                if same {
                    old.queue.succeed(Arc::clone(&plugin.queue));
                }
                deferred.command(&old, Command::Quit(if same { Quit::Updated } else { Quit::Gone }));
                if stopped {
                    // The operator has stopped the plugin meanwhile.
                    deferred.command(&plugin, Command::Stop(bounded(0).0));
                }
                state.changes.changed.push(file.to_owned());
                state.leaving.push((old, old_ended));
            }
            (Ok(()), None) => deferred.command(&plugin, Command::Quit(Quit::Gone)),
            (Err(reason), _) => {
                // Its output is in the plugin's log.
                let refused = format!("it did not become ready: {reason} (plugrack restart {} starts it anyway)", plugin.id());
                self.refuse_update(&mut state, &plugin.found(file), Refusal::lasting(refused), &mut deferred);
            }
        }
    }

    /// Finishes the scan under way once it waits for nothing.
    fn finish_scan(self: &Arc<Self>, mut state: MutexGuard<'_, ScanState>) {
        if state.outstanding > 0 || state.finished == state.begun {
            return;
        }
        let mut deferred = Deferred::default();
        let ScanState { entries, names, stale, .. } = &mut *state;
        let entries = Arc::make_mut(entries);
        let gone: Vec<_> =
            std::mem::take(stale).iter().filter_map(|file| deferred.quit(&entries.remove(file)?, Quit::Gone)).collect();
        entries.retain(|file, _| names.contains(file));
        self.publish(entries);
        state.leaving.extend(gone);
        let mut changes = std::mem::take(&mut state.changes);
        let scan = &mut *state;
        let is_plugin = |file: &String| scan.entries.get(file).is_some_and(Entry::is_plugin);
        changes.removed = scan.before.iter().filter(|file| !is_plugin(file)).cloned().collect();
        changes.refused = scan.entries.iter().filter(|(_, entry)| !entry.is_plugin()).map(|(file, _)| file.clone()).collect();
        [&mut changes.added, &mut changes.changed].into_iter().for_each(|files| files.sort());
        let [added, changed, removed] = [&changes.added, &changes.changed, &changes.removed].map(Vec::len);
        let refusals = std::mem::take(&mut scan.refusals);
        if refusals > MAX_LOGGED_REFUSALS {
            deferred.push(move || {
                log::warn!("{} more files are refused; plugrack list has the reasons", refusals - MAX_LOGGED_REFUSALS)
            });
        }
        if std::mem::take(&mut scan.ordered) || added + changed + removed > 0 {
            deferred.push(move || {
                log::info!("scanned the plugins directory: {added} added, {changed} changed, {removed} removed");
            });
        }
        scan.fresh.clear();
        scan.last = Arc::new(Finished { changes, leaving: std::mem::take(&mut scan.leaving) });
        scan.finished = scan.begun;
        self.scanned.store(true, Ordering::Release);
        self.scan_finished.notify_all();
        let is_first = scan.finished == 1;
        // If no thread can be created, the call runs on this one, which then takes the lock itself.
        drop(state);
        drop(deferred);
        if added + changed + removed > 0 || is_first {
            let registry = Arc::clone(self);
            self.metadata_calls.run(Box::new(move || registry.tidy()));
        }
    }
}

impl ScanState {
    /// Begins a scan, or joins the one under way, with the names in the directory. Returns its number, and the entries to process, by
    /// name. The scan also waits for the caller.
    fn begin(&mut self, found: Vec<Found>, reason: ScanReason) -> (u64, Vec<Found>) {
        if self.finished == self.begun {
            self.begun += 1;
            self.before = self.entries.iter().filter(|(_, entry)| entry.is_plugin()).map(|(file, _)| file.clone()).collect();
        }
        self.ordered |= reason == ScanReason::Ordered;
        self.names = found.iter().map(|found| found.file.clone()).collect();
        let found: Vec<Found> = found.into_iter().filter(|found| self.needs_processing(found, reason)).collect();
        let others: BTreeSet<&String> = found.iter().map(|found| &found.file).collect();
        let plugins = self.entries.iter().filter(|(_, entry)| entry.is_plugin()).map(|(file, _)| file);
        let stale = plugins.filter(|file| others.contains(file) || !self.names.contains(*file));
        let stale: Vec<String> = stale.filter(|file| !self.pending.contains(*file)).cloned().collect();
        // Calls already under way belong to the same scan.
        self.stale.retain(|file| self.pending.contains(file));
        self.stale.extend(stale);
        self.pending.extend(found.iter().map(|found| found.file.clone()));
        self.outstanding += found.len() + 1;
        (self.begun, found)
    }

    /// Whether an entry needs processing.
    fn needs_processing(&mut self, found: &Found, reason: ScanReason) -> bool {
        if self.pending.contains(&found.file) {
            return false;
        }
        let is_again = |rejected: &Rejected| {
            reason == ScanReason::Ordered
                || rejected.fingerprint != found.fingerprint
                || rejected.retry_at.is_some_and(|at| Instant::now() >= at)
        };
        match Arc::make_mut(&mut self.entries).get_mut(&found.file) {
            None => true,
            Some(Entry::Accepted { plugin, rejected, .. })
                if found.fingerprint.is_some() && plugin.fingerprint == found.fingerprint =>
            {
                // The file that the plugin runs is back.
                *rejected = None;
                plugin.set_update_refused(None);
                false
            }
            Some(Entry::Accepted { rejected, .. }) => rejected.as_ref().is_none_or(is_again),
            // It may have been refused because of a conflict with a plugin that is gone now.
            Some(Entry::Refused { id, rejected, .. }) => id.is_some() || is_again(rejected),
        }
    }
}
