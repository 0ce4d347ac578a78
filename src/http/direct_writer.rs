//! Lets a worker write an answer directly to the client's socket, without waking the event loop.
//!
//! The event loop grants the socket with a request, and writes nothing to it until the grant ends: when the answer has been sent, when the
//! client did not take all of a write, or when the event loop revokes it because the request was cancelled.
//!
//! A file may be sent without a copy, and without the end of the grant when the client does not take all of it: then the worker waits, since
//! the event loop must not touch a file, which may be on a slow disk.

use super::framing::Terms;
use crate::lock::LockExt;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{BorrowedFd, OwnedFd};
use rustix::fs::sendfile;
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
use std::io::IoSlice;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

/// How much of an answer was sent directly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// None of it.
    Untouched,
    /// Part of it.
    Begun,
    /// No more is sent directly: the rest is in the response channel, or will be in a moment.
    Over,
}

/// The socket was revoked, so nothing can be sent directly.
#[derive(Debug)]
pub(crate) struct Revoked;

/// Grants a worker a client's socket for one answer, with the framing of that answer.
pub(crate) struct DirectWriter {
    head: bool,
    old: bool,
    alone: bool,
    state: Mutex<State>,
    awaited: AtomicBool,
}

struct State {
    /// None if the event loop has not granted the socket, as with TLS, or has revoked it.
    socket: Option<Arc<OwnedFd>>,
    last: bool,
    progress: Progress,
    /// Bytes sent.
    sent: u64,
    /// Whether the client did not take all of a file, so that the worker waits for it.
    full: bool,
}

impl DirectWriter {
    /// A writer for the answer to a request with these terms, over `socket` if it is granted. `alone` says that no other request was in
    /// flight when this one was submitted.
    pub(crate) fn new(socket: Option<Arc<OwnedFd>>, terms: Terms, alone: bool) -> Self {
        let state = Mutex::new(State { socket, last: terms.last, progress: Progress::Untouched, sent: 0, full: false });
        Self { head: terms.head, old: terms.old, alone, state, awaited: AtomicBool::new(false) }
    }

    /// Whether no other request was in flight when this one was submitted.
    pub(super) fn is_alone(&self) -> bool {
        self.alone
    }

    /// How an answer that begins now is to be framed.
    pub(super) fn terms(&self) -> Terms {
        Terms { head: self.head, old: self.old, last: self.lock().last }
    }

    /// Sets whether the connection ends after an answer that begins from now on.
    pub(crate) fn set_last(&self, last: bool) {
        self.lock().last = last;
    }

    /// Sends as many bytes of an answer as the client takes at once. The grant ends if those are not all, or are the `last`. With
    /// `file_follows` the kernel may hold them back until the file comes. An error of the connection counts as bytes not taken; the event
    /// loop finds it by itself.
    ///
    /// # Errors
    /// The socket was not granted, or was revoked.
    pub(super) fn send(&self, parts: &[&[u8]; 3], last: bool, file_follows: bool) -> Result<usize, Revoked> {
        let total: usize = parts.iter().map(|part| part.len()).sum();
        // The lock is held during a call that does not block.
        let mut state = self.lock();
        let socket = state.socket.as_ref().ok_or(Revoked)?;
        let parts = parts.map(IoSlice::new);
        let more = if file_follows { SendFlags::MORE } else { SendFlags::empty() };
        let send = || sendmsg(socket, &parts, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL | more);
        let sent = retry_on_intr(send).unwrap_or(0);
        state.progress = Progress::Begun;
        state.sent += sent as u64;
        state.full = false;
        if sent < total || last {
            state.progress = Progress::Over;
            state.socket = None;
        }
        Ok(sent)
    }

    /// Sends bytes of a file, within an answer that has begun, without a copy: as many as the client takes at once. The grant ends if the
    /// `last` were sent. Returns the number of bytes, or none if the file has to be read and sent as bytes, which shows why. The calling
    /// thread waits for the file system.
    pub(super) fn send_file(&self, file: BorrowedFd<'_>, mut offset: u64, length: usize, last: bool) -> Option<usize> {
        let socket = self.begun_socket()?;
        // Without the lock, for which the event loop would wait as long. Whoever revokes the socket of an answer that has begun sends nothing
        // more over it, so that bytes which are still sent now do no harm.
        let sent = match retry_on_intr(|| sendfile(&socket, file, Some(&mut offset), length)) {
            Err(Errno::AGAIN) => 0,
            Ok(0) | Err(_) => return None,
            Ok(sent) => sent,
        };
        let mut state = self.lock();
        state.socket.as_ref()?;
        state.sent += sent as u64;
        state.full = sent < length;
        if last && sent == length {
            state.progress = Progress::Over;
            state.socket = None;
        }
        Some(sent)
    }

    /// Waits until the client takes more of a file; false if that takes longer than `time`.
    pub(super) fn has_room_within(&self, time: Duration) -> bool {
        let Some(socket) = self.begun_socket() else { return true };
        let (mut socket, time) = ([PollFd::new(&socket, PollFlags::OUT)], Timespec::try_from(time).ok());
        retry_on_intr(|| poll(&mut socket, time.as_ref())) != Ok(0)
    }

    /// Whether the worker waits for the client to take more of a file.
    pub(crate) fn is_full(&self) -> bool {
        self.lock().full
    }

    /// The socket, while an answer is sent over it.
    fn begun_socket(&self) -> Option<Arc<OwnedFd>> {
        let state = self.lock();
        state.socket.clone().filter(|_| state.progress == Progress::Begun)
    }

    /// Bytes sent directly.
    pub(crate) fn sent(&self) -> u64 {
        self.lock().sent
    }

    /// Requests that the event loop is woken at the end of the answer, because it has something to do then.
    pub(crate) fn await_end(&self) {
        self.awaited.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Whether the event loop is to be woken at the end. Call this after the end was put into the response channel: either this sees the
    /// flag, or the event loop, which checks the channel after it has set the flag, sees the end.
    pub(super) fn is_awaited(&self) -> bool {
        fence(Ordering::SeqCst);
        self.awaited.load(Ordering::Relaxed)
    }

    /// Revokes the socket, whatever has been sent.
    pub(crate) fn revoke(&self) -> Progress {
        let mut state = self.lock();
        (state.socket, state.full) = (None, false);
        state.progress
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.locked()
    }
}
