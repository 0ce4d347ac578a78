//! Replies on their way to the host: collected while more requests are at hand, and held back for a moment at most.
//!
//! A plugin that is quick gets several requests at a time, and answers them in one write. One of them may be slow all the same, and
//! the replies to those before it must not wait for it: so another thread sends what has been held for too long.

use crate::lock::{LockExt, unpoisoned};
use std::io::{self, IoSlice, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// How long a reply is held while the next request is handled. Those that are quick are done by then.
const HOLD: Duration = Duration::from_millis(1);

/// Replies of one connection.
pub(super) struct Outbox {
    stream: Arc<UnixStream>,
    frames: Mutex<Vec<u8>>,
    /// Whether the [`Flusher`] has been told of them.
    watched: AtomicBool,
}

impl Outbox {
    pub(super) fn new(stream: Arc<UnixStream>) -> Self {
        Self { stream, frames: Mutex::default(), watched: AtomicBool::new(false) }
    }

    /// The frames that are not sent yet, to put others behind them.
    pub(super) fn frames(&self) -> MutexGuard<'_, Vec<u8>> {
        self.frames.locked()
    }

    /// Sends them.
    pub(super) fn flush(&self) -> io::Result<()> {
        if self.frames().is_empty() { Ok(()) } else { self.flush_with(&[]) }
    }

    /// Sends them, and then bytes that are better not copied behind them.
    pub(super) fn flush_with(&self, bytes: &[u8]) -> io::Result<()> {
        let mut frames = self.frames();
        let written = write_both(&self.stream, &frames, bytes);
        frames.clear();
        written
    }
}

/// Writes one behind the other, at once where the host takes it: it wakes once.
pub(super) fn write_both(mut stream: &UnixStream, first: &[u8], second: &[u8]) -> io::Result<()> {
    let written = match stream.write_vectored(&[IoSlice::new(first), IoSlice::new(second)]) {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
        written => written?,
    };
    stream.write_all(first.get(written..).unwrap_or_default())?;
    stream.write_all(&second[written.saturating_sub(first.len())..])
}

/// Sends the replies of all connections that are held for too long.
#[derive(Default)]
pub(super) struct Flusher {
    held: Mutex<Vec<Arc<Outbox>>>,
    came: Condvar,
}

impl Flusher {
    /// Looks after replies that are held from now on.
    pub(super) fn watch(&self, outbox: &Arc<Outbox>) {
        if !outbox.watched.swap(true, Ordering::AcqRel) {
            self.held.locked().push(Arc::clone(outbox));
            self.came.notify_one();
        }
    }

    /// Sends what is held, for ever.
    pub(super) fn run(&self) {
        loop {
            let held = self.held.locked();
            let held = unpoisoned(self.came.wait_while(held, |held| held.is_empty()));
            let (mut held, _) = unpoisoned(self.came.wait_timeout_while(held, HOLD, |_| true));
            let outboxes = std::mem::take(&mut *held);
            drop(held);
            for outbox in outboxes {
                outbox.watched.store(false, Ordering::Release);
                // The connection's own thread finds out likewise.
                drop(outbox.flush());
            }
        }
    }
}
