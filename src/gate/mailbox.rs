//! How the host's threads hand answers to the gate, which is the same process: no connection lies between them.
//!
//! An answer is for the request that was passed on under an address. The gate gives each address out once, so what comes for a request
//! that is over, as when its client has gone, is nobody's and dropped.

use crossbeam_channel::{Receiver, Sender, unbounded};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

/// Largest answer in bytes, head and body, that is handed over whole. A larger one has a connection of its own, so that a slow client
/// holds up the plugin and not the host's memory.
pub(crate) const MAX_WHOLE: usize = 64 * 1024;

/// An answer, as it goes on the wire.
pub(crate) enum Parcel {
    /// All of it.
    Whole(Vec<u8>),
    /// Where it comes from.
    Stream(OwnedFd),
}

/// Where answers are put. Each request has one at most, and there are no more requests than clients, so no more wait than that.
pub(crate) struct Mailbox {
    parcels: Sender<(u64, Parcel)>,
    bell: Arc<Bell>,
}

/// Where the gate finds them.
pub(crate) struct Inbox {
    parcels: Receiver<(u64, Parcel)>,
    bell: Arc<Bell>,
}

/// Wakes the gate, where it sleeps: most of the time it is awake, and nothing need be said.
pub(super) struct Bell {
    file: OwnedFd,
    asleep: AtomicBool,
}

/// A mailbox and its other side.
///
/// # Errors
/// There is no file for the bell.
pub(crate) fn mailbox() -> io::Result<(Mailbox, Inbox)> {
    let (sender, parcels) = unbounded();
    let file = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
    let bell = Arc::new(Bell { file, asleep: AtomicBool::new(false) });
    Ok((Mailbox { parcels: sender, bell: Arc::clone(&bell) }, Inbox { parcels, bell }))
}

impl Mailbox {
    /// Hands an answer over. Without a gate nobody waits for it.
    pub(crate) fn put(&self, address: u64, parcel: Parcel) {
        if self.parcels.send((address, parcel)).is_ok() {
            self.bell.ring();
        }
    }
}

impl Inbox {
    /// What wakes the gate.
    pub(super) fn bell(&self) -> &Arc<Bell> {
        &self.bell
    }

    /// The next answer.
    pub(super) fn take(&self) -> Option<(u64, Parcel)> {
        self.parcels.try_recv().ok()
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.parcels.is_empty()
    }
}

impl Bell {
    /// To be called after something was put where the gate looks before it sleeps.
    pub(super) fn ring(&self) {
        // Either this thread sees the gate asleep, or the gate, which looks after it has said so, sees what was put.
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::Relaxed) {
            // It can only fail once it has been rung 2^64 times.
            rustix::io::write(&self.file, &1_u64.to_ne_bytes()).unwrap_or_default();
        }
    }

    /// Says that the gate is about to sleep, before it looks for the last time.
    pub(super) fn go_to_sleep(&self) {
        self.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Says that it is awake.
    pub(super) fn wake_up(&self) {
        self.asleep.store(false, Ordering::Relaxed);
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
