//! What every part of the rack shares: the identity, the data directory, the store, and which process belongs to which plugin.

use crate::data_dir::DataDir;
use crate::guard::Guard;
use crate::handover::hand_over;
use crate::memory::Memory;
use crate::process::Bounds;
use crate::room::Room;
use crate::store::Store;
use std::collections::HashMap;
use std::io;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use uuid::Uuid;

/// The variable that tells a plugin where the host listens to it.
pub(crate) const HOST_SOCKET_VARIABLE: &str = "PLUGRACK_HOST_SOCKET";

/// Shared by all that serves plugins.
pub(crate) struct Host {
    /// The identity of this installation.
    pub(crate) instance_id: Uuid,
    /// Where everything is.
    pub(crate) data: DataDir,
    /// The database.
    pub(crate) store: Store,
    /// Whether memory has run out.
    pub(crate) memory: Memory,
    /// Which session is which plugin's.
    pub(crate) sessions: Sessions,
    /// The uids of plugins, where each has its own. The first is that of the calls by which plugins say who they are.
    pub(crate) plugin_uids: Option<RangeInclusive<u32>>,
    /// Most memory of a plugin's process in bytes.
    pub(crate) plugin_memory: Option<u64>,
    /// How many plugins fit.
    pub(crate) room: Room,
    /// Time a plugin has to become ready.
    pub(crate) start_timeout: Duration,
    /// Time a plugin has to begin an answer.
    pub(crate) request_timeout: Duration,
}

impl Host {
    /// How a program is bound that has not said yet which plugin it is.
    pub(crate) fn stranger_bounds(&self) -> Bounds {
        Bounds { uid: self.plugin_uids.as_ref().map(|uids| *uids.start()), memory: self.plugin_memory }
    }

    /// How a plugin is bound; the uid of its own that it gets with this is its own for good.
    ///
    /// # Errors
    /// One sentence: there is no uid for it.
    pub(crate) fn plugin_bounds(&self, plugin: &str) -> Result<Bounds, String> {
        let uid = match &self.plugin_uids {
            None => None,
            Some(uids) => match self.store.uid(plugin, &(uids.start() + 1..=*uids.end())) {
                Ok(Some(uid)) => Some(uid),
                Ok(None) => {
                    let (first, last) = (uids.start(), uids.end());
                    return Err(format!("all uids of --plugin-uids {first}-{last} are other plugins': make the range longer"));
                }
                Err(error) => return Err(format!("cannot read or note its uid: {error}")),
            },
        };
        Ok(Bounds { uid, memory: self.plugin_memory })
    }

    /// Makes directories of a plugin those of its user `uid`; those of the host's own, where it has none now and had one before.
    ///
    /// # Errors
    /// One sentence: what cannot be handed over, and why.
    pub(crate) fn hand_over(&self, plugin: &str, uid: Option<u32>, directories: &[PathBuf]) -> Result<(), String> {
        let (from, to) = match uid {
            Some(uid) => (None, uid),
            None => match self.store.last_uid(plugin).map_err(|error| format!("cannot read its uid: {error}"))? {
                Some(last) => (Some(last), rustix::process::geteuid().as_raw()),
                None => return Ok(()),
            },
        };
        directories.iter().try_for_each(|directory| hand_over(directory, from, to))
    }
}

/// Sessions of running plugins, by the process id that leads them.
pub(crate) struct Sessions {
    plugins: Mutex<HashMap<i32, Arc<str>>>,
    guard: Guard,
}

impl Sessions {
    /// No session yet. All that come are told to the guard.
    pub(crate) fn new(guard: Guard) -> Self {
        Self { plugins: Mutex::default(), guard }
    }

    /// Starts a process by `start`, and notes its session as `plugin`'s before anyone can ask for it.
    pub(crate) fn enter<P>(
        &self,
        plugin: &str,
        start: impl FnOnce() -> io::Result<P>,
        pid: impl FnOnce(&P) -> i32,
    ) -> io::Result<P> {
        let mut plugins = self.lock();
        let process = start()?;
        let session = pid(&process);
        self.guard.add(session);
        plugins.insert(session, plugin.into());
        Ok(process)
    }

    /// Forgets a session whose leader has ended. Where something of it may be `left`, the guard still sees to that.
    pub(crate) fn leave(&self, session: i32, left: bool) {
        self.lock().remove(&session);
        if !left {
            self.guard.remove(session);
        }
    }

    /// Ends what is left of all of them.
    pub(crate) fn finish(&self) {
        self.guard.finish();
    }

    /// The plugin a session belongs to.
    pub(crate) fn plugin(&self, session: i32) -> Option<Arc<str>> {
        self.lock().get(&session).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<i32, Arc<str>>> {
        self.plugins.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
