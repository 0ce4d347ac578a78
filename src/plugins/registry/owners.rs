//! Whose an id is, and what plugins that are gone have left.

use super::rescan::Later;
use super::{Entry, Rack, Rejected, STOP_ALL_TIME, await_end};
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

/// Most ids of plugins that are gone whose keys, settings, licences or files are kept. Beyond it a file with a new id is refused: nothing
/// is deleted that the operator has not said to delete, and a program that changes its id all the time fills no disk.
const MAX_GONE: usize = 1000;

/// Most ids of plugins that are gone, and names of files, of which only events, a log and an empty directory are left. The oldest go first.
const MAX_TRACES: usize = 100;

/// What a plugin that is gone has left.
#[derive(Debug, Serialize)]
pub(crate) struct LeftBehind {
    #[serde(flatten)]
    holding: Holding,
    /// Whether its own directory has anything in it.
    files: bool,
    /// Whether it is kept until the operator says otherwise. Events, a log and an empty directory alone are not.
    kept: bool,
}

impl LeftBehind {
    /// Whether it is what the plugin with this id has left.
    pub(crate) fn is_of(&self, id: &str) -> bool {
        self.holding.id == id
    }
}

impl Rack {
    /// Checks what the database says of a plugin: whether it may run, and whether its id belongs to this file. The second value says whether
    /// the id had no owner.
    pub(super) fn admit(&self, found: &Found, metadata: &Metadata) -> Result<(bool, bool), Refusal> {
        let cannot = |error: StoreError| Refusal::passing(format!("cannot read whose id it has: {error}"));
        let id = &metadata.id;
        let owner = self.host.store.owner(id).map_err(cannot)?;
        let enabled = self.host.store.is_enabled(id).map_err(cannot)?;
        let Some(file) = &owner.file else {
            if self.gone.load(Ordering::Relaxed) >= MAX_GONE {
                let most = format!("{MAX_GONE} plugins that are gone have left keys, settings or files, and no more are kept");
                return Err(Refusal::passing(format!("{most}: plugrack gone lists them, plugrack forget ID deletes one")));
            }
            return Ok((enabled, true));
        };
        if *file == found.file || !(owner.has_data || self.has_files(id)) {
            return Ok((enabled, false));
        }
        let is_there = self.lock().names.contains(file);
        let known = self.host.store.program(file).map_err(cannot)?.fingerprint;
        let is_renamed = || found.fingerprint.zip(known).is_some_and(|(found, known)| found.is_file_of(&known));
        if !is_there && is_renamed() {
            return Ok((enabled, false));
        }
        let gone = if is_there { "" } else { ", which is gone" };
        Err(Refusal::lasting(format!(
            "the id {id} belongs to the file {file}{gone}: if {0} is to have its keys, settings and licence, plugrack adopt {id} {0}",
            found.file
        )))
    }

    /// Whether a plugin's own directory has anything in it.
    fn has_files(&self, id: &str) -> bool {
        fs::read_dir(self.host.data.plugin_data(id)).is_ok_and(|mut entries| entries.next().is_some())
    }

    /// What plugins that are gone have left, by id.
    ///
    /// # Errors
    /// The database cannot be read.
    pub(crate) fn left_behind(&self) -> Result<Vec<LeftBehind>, StoreError> {
        let held = self.host.store.holdings()?;
        let present = self.present();
        let left = |holding: Holding| {
            let (files, data) = (self.has_files(&holding.id), holding.has_data());
            LeftBehind { files, kept: files || data, holding }
        };
        Ok(held.into_iter().filter(|holding| !present.contains(&holding.id)).map(left).collect())
    }

    /// The ids of all that is in the plugins directory, and the names of what has none.
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

    /// Counts what plugins that are gone have left, and deletes the oldest of what nobody would miss.
    pub(super) fn tidy(&self) {
        let files: Vec<String> = self.lock().names.iter().cloned().collect();
        let tidied = self.host.store.keep_programs(files).and_then(|()| self.left_behind());
        // The store has logged why it cannot be read or written, and the next look tries again.
        let Ok(left) = tidied else { return };
        self.gone.store(left.iter().filter(|left| left.kept).count(), Ordering::Relaxed);
        let mut traces: Vec<_> = left.into_iter().filter(|left| !left.kept).collect();
        traces.sort_by_key(|left| left.holding.seen);
        let spare = traces.len().saturating_sub(MAX_TRACES);
        for left in &traces[..spare] {
            if let Err(error) = self.delete(&left.holding.id) {
                log::warn!("{}: what it has left cannot be deleted: {error}", left.holding.id);
            }
        }
    }

    /// Deletes all that a plugin that is gone has left: its keys, settings, licence, events, log and directory.
    ///
    /// # Errors
    /// A sentence: the plugin is there, or something cannot be deleted.
    pub(crate) fn forget(&self, id: &str) -> Result<(), String> {
        if self.present().contains(id) {
            return Err(format!("the plugin {id} is in the plugins directory: remove its file and run plugrack rescan first"));
        }
        self.delete(id).map_err(|error| format!("what {id} has left cannot be deleted: {error}"))?;
        self.tidy();
        Ok(())
    }

    fn delete(&self, id: &str) -> io::Result<()> {
        self.host.store.forget(id).map_err(io::Error::other)?;
        self.host.data.remove_plugin(id)
    }

    /// Gives an id, with all that is kept under it, to a file. The plugin that had it is stopped.
    ///
    /// # Errors
    /// A sentence: there is no such file, or the database cannot be written.
    pub(crate) fn adopt(self: &Arc<Self>, id: &str, file: &str) -> Result<(), String> {
        if !self.dir.join(file).exists() || file.contains('/') || file.starts_with('.') {
            return Err(format!("there is no {file} in the plugins directory {}", self.dir.display()));
        }
        self.host.store.set_owner(id, file).map_err(|error| format!("cannot note whose id it is: {error}"))?;
        self.host.store.note_event(id, "adopted", &format!("the operator gave the id to the file {file}"));
        let mut later = Later::default();
        let mut state = self.lock();
        let had = |entry: &Entry| matches!(entry, Entry::Accepted { plugin, .. } if plugin.id() == id);
        let before = state.entries.iter().find(|(other, entry)| *other != file && had(entry)).map(|(other, _)| other.clone());
        let mut leaving = None;
        if let Some((other, entry)) = before.and_then(|before| Arc::make_mut(&mut state.entries).remove_entry(&before)) {
            leaving = later.quit(&entry, Quit::Gone);
            let found = entry.found(&other);
            let reason = format!("the operator gave its id {id} to the file {file} (plugrack adopt)");
            let rejected = Rejected::new(&found, Refusal::lasting(reason), None);
            Arc::make_mut(&mut state.entries)
                .insert(other, Entry::Refused { found, was: None, id: Some(id.to_owned()), rejected });
            self.publish(&state.entries);
        }
        drop(state);
        drop(later);
        let deadline = Instant::now() + STOP_ALL_TIME;
        leaving.iter().for_each(|(plugin, ended)| await_end(plugin, ended, deadline));
        self.rescan().map(drop).map_err(|error| format!("the plugins directory cannot be read: {error}"))
    }
}
