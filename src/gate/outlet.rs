//! The way straight to a client: the thread that has an answer sends it, and the gate need not be woken for it.
//!
//! The gate lends a client's socket with a request, and writes nothing there until it has it back: once the answer has been sent, or
//! the client did not take all of it at once, or the gate takes it back because the answer is not wanted any more.

use super::response::Terms;
use rustix::fd::OwnedFd;
use rustix::io::retry_on_intr;
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
use std::io::IoSlice;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How far an answer has come on this way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// Nothing of it has been sent.
    Untouched,
    /// Something of it.
    Begun,
    /// All of it, or nothing more is: what is to be done about it lies in the mailbox, or will in a moment.
    Over,
}

/// The gate has its socket back: nothing can be sent this way any more.
#[derive(Debug)]
pub(crate) struct TakenBack;

/// A way that is lent for one answer.
pub(crate) struct Outlet {
    terms: Terms,
    alone: bool,
    lent: Mutex<Lent>,
    awaited: AtomicBool,
}

struct Lent {
    socket: Option<Arc<OwnedFd>>,
    progress: Progress,
    /// Bytes sent.
    sent: u64,
}

impl Outlet {
    pub(super) fn new(socket: Arc<OwnedFd>, terms: Terms, alone: bool) -> Self {
        let lent = Mutex::new(Lent { socket: Some(socket), progress: Progress::Untouched, sent: 0 });
        Self { terms, alone, lent, awaited: AtomicBool::new(false) }
    }

    /// Whether no other request was under way when this one was passed on.
    pub(super) fn is_alone(&self) -> bool {
        self.alone
    }

    /// How the answer is to be framed.
    pub(super) fn terms(&self) -> Terms {
        self.terms
    }

    /// Sends bytes of an answer, as many as the client takes at once; where those are not all of them, or are the `last`, this was the
    /// last that goes this way. An error of the connection counts as bytes not taken: the gate will find it.
    pub(super) fn send(&self, parts: &[&[u8]; 3], last: bool) -> Result<usize, TakenBack> {
        let total: usize = parts.iter().map(|part| part.len()).sum();
        // Held for no longer than a call that does not wait.
        let mut lent = self.lock();
        let socket = lent.socket.as_ref().ok_or(TakenBack)?;
        let parts = parts.map(IoSlice::new);
        let send = || sendmsg(socket, &parts, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL);
        let sent = retry_on_intr(send).unwrap_or(0);
        lent.progress = Progress::Begun;
        lent.sent += sent as u64;
        if sent < total || last {
            lent.progress = Progress::Over;
            lent.socket = None;
        }
        Ok(sent)
    }

    /// Bytes that have been sent this way.
    pub(super) fn sent(&self) -> u64 {
        self.lock().sent
    }

    /// Says that something waits for the end of the answer.
    pub(super) fn await_end(&self) {
        self.awaited.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Whether something does, as far as was said before what has been put in the mailbox could be taken there.
    pub(super) fn is_awaited(&self) -> bool {
        fence(Ordering::SeqCst);
        self.awaited.load(Ordering::Relaxed)
    }

    /// Takes the socket back, unless an answer has been begun on it.
    pub(super) fn take_back_unused(&self) -> Progress {
        let mut lent = self.lock();
        if lent.progress == Progress::Untouched {
            lent.socket = None;
        }
        lent.progress
    }

    /// Takes the socket back, whatever has been sent.
    pub(super) fn take_back(&self) -> Progress {
        let mut lent = self.lock();
        lent.socket = None;
        lent.progress
    }

    fn lock(&self) -> MutexGuard<'_, Lent> {
        self.lent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
