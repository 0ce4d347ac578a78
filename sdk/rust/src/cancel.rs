//! Cancellation: a handler learns that nobody waits for its answer any more, even while it reads and writes nothing.
//!
//! The host cancels a request by closing its connection. The server watches all connections for that with one thread, and records
//! the end of each here; a handler looks at the record, or waits for it.

use super::context::Context;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Wakes all handlers that wait for a cancellation. A plugin has one; the few handlers that it wakes look at their own records.
#[derive(Debug, Default)]
pub(super) struct Signal {
    lock: Mutex<()>,
    changed: Condvar,
}

impl Signal {
    /// To be called after a record has changed.
    pub(super) fn notify(&self) {
        // A handler that has looked at its record before the change holds the lock until it waits.
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

/// Tells whether a request is cancelled: the host has given it up, since its client has gone or its time has passed, or the plugin
/// is to stop ([`Context::is_stopping`]).
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
