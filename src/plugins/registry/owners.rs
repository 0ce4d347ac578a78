//! Ownership of ids, and the data of removed plugins.

use super::rescan::Deferred;
use super::{Entry, Registry, Rejected, STOP_ALL_TIME, await_end};
use crate::plugins::discovery::{Found, Refusal};
use crate::plugins::plugin::Quit;
use crate::protocol::metadata::Metadata;
use crate::store::StoreError;
use crate::store::programs::Holding;
use serde::Serialize;
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Most removed plugins whose keys, settings, licences or files are kept. Beyond that a file with a new id is refused: the host deletes no
/// data without the operator, and a program that keeps changing its id cannot fill the disk.
const MAX_GONE: usize = 1000;

/// Most removed plugins and file names of which only events, a log and an empty directory are kept. The oldest are deleted first.
const MAX_TRACES: usize = 100;

/// The data of a removed plugin.
#[derive(Debug, Serialize)]
pub(crate) struct LeftBehind {
    #[serde(flatten)]
    holding: Holding,
    /// Whether its data directory has any files.
    files: bool,
    /// Whether the data is kept until the operator deletes it. Events, a log and an empty directory alone are not.
    kept: bool,
}

impl LeftBehind {
    /// Whether this is the data of the plugin with this id.
    pub(crate) fn is_of(&self, id: &str) -> bool {
        self.holding.id == id
    }
}

impl Registry {
    /// Checks a plugin against the database. Returns whether it is enabled, and whether its id had no owner.
    ///
    /// # Errors
    /// The id belongs to another file, or there are too many removed plugins.
    pub(super) fn admit(&self, found: &Found, metadata: &Metadata) -> Result<(bool, bool), Refusal> {
        let cannot = |error: StoreError| Refusal::passing(format!("cannot read the owner of its id: {error}"));
        let id = &metadata.id;
        let owner = self.context.store.owner(id).map_err(cannot)?;
        let enabled = self.context.store.is_enabled(id).map_err(cannot)?;
        let Some(file) = &owner.file else {
            if self.gone.load(Ordering::Relaxed) >= MAX_GONE {
                let most = format!("there is data of {MAX_GONE} removed plugins, which is the limit");
                return Err(Refusal::passing(format!("{most}: plugrack gone lists it, plugrack forget ID deletes that of one")));
            }
            return Ok((enabled, true));
        };
        if *file == found.file || !(owner.has_data || self.has_files(id)) {
            return Ok((enabled, false));
        }
        let is_there = self.lock().names.contains(file);
        let known = self.context.store.program(file).map_err(cannot)?.fingerprint;
        let is_renamed = || found.fingerprint.zip(known).is_some_and(|(found, known)| found.is_file_of(&known));
        if !is_there && is_renamed() {
            return Ok((enabled, false));
        }
        let gone = if is_there { "" } else { ", which is gone" };
        Err(Refusal::lasting(format!(
            "the id {id} belongs to the file {file}{gone}; to give it and its data to {0}: plugrack adopt {id} {0}",
            found.file
        )))
    }

    /// Whether a plugin's data directory has any files.
    fn has_files(&self, id: &str) -> bool {
        fs::read_dir(self.context.data.plugin_data(id)).is_ok_and(|mut entries| entries.next().is_some())
    }

    /// The data of removed plugins, by id.
    ///
    /// # Errors
    /// The database cannot be read.
    pub(crate) fn left_behind(&self) -> Result<Vec<LeftBehind>, StoreError> {
        let held = self.context.store.holdings()?;
        let present = self.present();
        let left = |holding: Holding| {
            let (files, data) = (self.has_files(&holding.id), holding.has_data());
            LeftBehind { files, kept: files || data, holding }
        };
        Ok(held.into_iter().filter(|holding| !present.contains(&holding.id)).map(left).collect())
    }

    /// The ids of all entries of the plugins directory, and the names of entries without one.
    fn present(&self) -> BTreeSet<String> {
        let state = self.lock();
        let names = state.entries.iter().flat_map(|(file, entry)| match entry {
            Entry::Accepted { plugin, .. } => vec![plugin.id().to_owned()],
            Entry::Refused { was, id, .. } => {
                let was = was.as_ref().map(|was| was.id().to_owned());
                [Some(file.clone()), id.clone(), was].into_iter().flatten().collect()
            }
        });
        let trials = state.trials.values().map(|(plugin, _)| plugin.id().to_owned());
        names.chain(trials).collect()
    }

    /// Counts removed plugins, and deletes the oldest of those without data worth keeping.
    pub(super) fn tidy(&self) {
        let files: Vec<String> = self.lock().names.iter().cloned().collect();
        let tidied = self.context.store.keep_programs(files).and_then(|()| self.left_behind());
        // The store has logged the failure, and the next scan tries again.
        let Ok(left) = tidied else { return };
        self.gone.store(left.iter().filter(|left| left.kept).count(), Ordering::Relaxed);
        let mut traces: Vec<_> = left.into_iter().filter(|left| !left.kept).collect();
        traces.sort_by_key(|left| left.holding.seen);
        let spare = traces.len().saturating_sub(MAX_TRACES);
        for left in &traces[..spare] {
            if let Err(error) = self.delete(&left.holding.id) {
                log::warn!("{}: its data cannot be deleted: {error}", left.holding.id);
            }
        }
    }

    /// Deletes all data of a removed plugin: keys, settings, licence, events, log and directory.
    ///
    /// # Errors
    /// One sentence: the plugin still exists, or something cannot be deleted.
    pub(crate) fn forget(&self, id: &str) -> Result<(), String> {
        if self.present().contains(id) {
            return Err(format!("the plugin {id} is in the plugins directory: first remove its file and run plugrack rescan"));
        }
        self.delete(id).map_err(|error| format!("the data of {id} cannot be deleted: {error}"))?;
        self.tidy();
        Ok(())
    }

    fn delete(&self, id: &str) -> io::Result<()> {
        self.context.store.forget(id).map_err(io::Error::other)?;
        self.context.data.remove_plugin(id)
    }

    /// Gives an id with all its data to a file. Stops the plugin that had the id.
    ///
    /// # Errors
    /// One sentence: there is no such file, or the database cannot be written.
    pub(crate) fn adopt(self: &Arc<Self>, id: &str, file: &str) -> Result<(), String> {
        if !self.dir.join(file).exists() || file.contains('/') || file.starts_with('.') {
            return Err(format!("there is no {file} in the plugins directory {}", self.dir.display()));
        }
        self.context.store.set_owner(id, file).map_err(|error| format!("cannot store the new owner of the id: {error}"))?;
        self.context.store.note_event(id, "adopted", &format!("the operator gave the id to the file {file}"));
        let mut deferred = Deferred::default();
        let mut state = self.lock();
        let had = |entry: &Entry| matches!(entry, Entry::Accepted { plugin, .. } if plugin.id() == id);
        let before = state.entries.iter().find(|(other, entry)| *other != file && had(entry)).map(|(other, _)| other.clone());
        let mut leaving = None;
        if let Some((other, entry)) = before.and_then(|before| Arc::make_mut(&mut state.entries).remove_entry(&before)) {
            leaving = deferred.quit(&entry, Quit::Gone);
            let found = entry.found(&other);
            let reason = format!("the operator gave its id {id} to the file {file} (plugrack adopt)");
            let rejected = Rejected::new(&found, Refusal::lasting(reason), None);
            Arc::make_mut(&mut state.entries)
                .insert(other, Entry::Refused { found, was: None, id: Some(id.to_owned()), rejected });
            self.publish(&state.entries);
        }
        drop(state);
        drop(deferred);
        let deadline = Instant::now() + STOP_ALL_TIME;
        leaving.iter().for_each(|(plugin, ended)| await_end(plugin, ended, deadline));
        self.rescan().map(drop).map_err(|error| format!("the plugins directory cannot be read: {error}"))
    }
}
