//! What every part of the rack shares: the identity, the data directory, the store, and which process belongs to which plugin.

use crate::data_dir::DataDir;
use crate::guard::Guard;
use crate::memory::Memory;
use crate::store::Store;
use std::collections::HashMap;
use std::io;
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
    /// Time a plugin has to become ready.
    pub(crate) start_timeout: Duration,
    /// Time a plugin has to begin an answer.
    pub(crate) request_timeout: Duration,
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
