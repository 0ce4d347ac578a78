//! What every part of the rack shares: the identity, the data directory, the store, and which process belongs to which plugin.

use crate::data_dir::DataDir;
use crate::room::Room;
use crate::store::Store;
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use uuid::Uuid;

/// Shared by all that serves plugins.
pub(crate) struct Host {
    /// The identity of this installation.
    pub(crate) instance_id: Uuid,
    /// Where everything is.
    pub(crate) data: DataDir,
    /// The database.
    pub(crate) store: Store,
    /// Which session is which plugin's.
    pub(crate) sessions: Sessions,
    /// How many plugins fit.
    pub(crate) room: Room,
    /// Time a plugin has to become ready.
    pub(crate) start_timeout: Duration,
    /// Time a plugin has to begin an answer.
    pub(crate) request_timeout: Duration,
}

/// Sessions of running plugins, by the process id that leads them.
#[derive(Default)]
pub(crate) struct Sessions {
    plugins: Mutex<HashMap<i32, Arc<str>>>,
}

impl Sessions {
    /// Starts a process by `start`, and notes its session as `plugin`'s before anyone can ask for it.
    pub(crate) fn enter<P>(
        &self,
        plugin: &str,
        start: impl FnOnce() -> io::Result<P>,
        pid: impl FnOnce(&P) -> i32,
    ) -> io::Result<P> {
        let mut plugins = self.lock();
        let process = start()?;
        plugins.insert(pid(&process), plugin.into());
        Ok(process)
    }

    /// Forgets a session whose leader has ended.
    pub(crate) fn leave(&self, session: i32) {
        self.lock().remove(&session);
    }

    /// The plugin a session belongs to.
    pub(crate) fn plugin(&self, session: i32) -> Option<Arc<str>> {
        self.lock().get(&session).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<i32, Arc<str>>> {
        self.plugins.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
