//! Cancellation: a handler learns that nobody waits for its answer any more, even while it neither reads nor writes.
//!
//! The host cancels a request by closing its connection. One thread of the server watches all connections and sets a flag for each
//! that has ended. A handler checks the flag, or waits for it.

use super::context::Context;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Wakes all handlers that wait for a cancellation; each then checks its own flag. One for the whole plugin, since few handlers wait.
#[derive(Debug, Default)]
pub(super) struct Signal {
    lock: Mutex<()>,
    changed: Condvar,
}

impl Signal {
    /// Must be called after a flag has changed.
    pub(super) fn notify(&self) {
        // A handler holds the lock from its check of the flag until it waits, so it cannot miss the notification.
        drop(self.lock.lock());
        self.changed.notify_all();
    }

    /// Waits until `done`, at most for some time, and returns whether it is.
    pub(super) fn wait(&self, time: Duration, done: impl Fn() -> bool) -> bool {
        let guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        let (_guard, _) = self.changed.wait_timeout_while(guard, time, |()| !done()).unwrap_or_else(PoisonError::into_inner);
        done()
    }
}

/// Whether a request is cancelled: its client has gone, its time has passed, or the plugin is to stop ([`Context::is_stopping`]).
///
/// [`Request::cancellation`](super::Request::cancellation) gives one, for a response that streams after its handler has returned.
/// A clone is cheap and may go to any thread. Once cancelled, a request stays cancelled.
#[derive(Debug, Clone)]
pub struct Cancellation {
    ended: Arc<AtomicBool>,
    context: Context,
}

impl Cancellation {
    pub(super) fn new(ended: Arc<AtomicBool>, context: Context) -> Self {
        Self { ended, context }
    }

    /// Whether the request is cancelled by now.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.ended.load(Ordering::Acquire) || self.context.is_stopping()
    }

    /// Waits until the request is cancelled, at most for `time`, and returns whether it is. Use it in place of a sleep.
    #[must_use]
    pub fn cancelled_within(&self, time: Duration) -> bool {
        self.context.signal().wait(time, || self.is_cancelled())
    }
}
