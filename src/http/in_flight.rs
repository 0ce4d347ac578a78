//! A request that the event loop has passed on: the state that it shares with the thread that answers.
//!
//! While the request waits for a worker it is kept here, so that the event loop can drop it, with its memory, when the client goes or
//! its time is over. A queue only holds [`WaitingRequest`]s, which lead here.

use super::HttpError;
use super::direct_writer::{DirectWriter, Progress};
use super::errors;
use super::request::Request;
use crate::lock::LockExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Instant;

/// What the event loop and the thread that answers share of one request.
pub(crate) struct InFlight {
    /// The direct way to the client.
    pub(crate) writer: DirectWriter,
    /// When the request was passed on.
    pub(crate) arrived: Instant,
    waiting: Mutex<Option<Request>>,
    cancelled: AtomicBool,
    taken_at: OnceLock<Instant>,
}

impl InFlight {
    /// The state of a request that is passed on at `now`, with the direct way to its client.
    pub(crate) fn new(writer: DirectWriter, now: Instant) -> Arc<Self> {
        let (waiting, cancelled, taken_at) = Default::default();
        Arc::new(Self { writer, arrived: now, waiting, cancelled, taken_at })
    }

    /// Gives the answer up: a request that waits is dropped, and whoever has taken it finds out by [`InFlight::is_cancelled`]. Returns how
    /// far an answer has come on the direct way.
    pub(crate) fn cancel(&self) -> Progress {
        // Set first: a worker that puts the request back looks at the flag while it holds the lock.
        self.cancelled.store(true, Ordering::SeqCst);
        let waiting = self.lock().take();
        if let Some(mut request) = waiting {
            request.responder.abandon();
        }
        self.writer.revoke()
    }

    /// Whether nobody waits for the answer any more.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// When a worker took the request for the first time.
    pub(crate) fn taken_at(&self) -> Option<Instant> {
        self.taken_at.get().copied()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Request>> {
        self.waiting.locked()
    }
}

/// A request that waits in a queue. Dropped there, it is answered that the host has lost it.
pub(crate) struct WaitingRequest(Arc<InFlight>);

impl WaitingRequest {
    /// Has a request wait. None, and the request is dropped, when nobody waits for its answer any more.
    pub(crate) fn new(request: Request) -> Option<Self> {
        let in_flight = Arc::clone(request.responder.in_flight());
        let mut waiting = in_flight.lock();
        if in_flight.is_cancelled() {
            drop(waiting);
            let mut request = request;
            request.responder.abandon();
            return None;
        }
        *waiting = Some(request);
        drop(waiting);
        Some(Self(in_flight))
    }

    /// Takes the request at `now`; none when nobody waits for its answer any more.
    pub(crate) fn take(self, now: Instant) -> Option<Request> {
        let request = self.0.lock().take();
        if request.is_some() {
            self.0.taken_at.get_or_init(|| now);
        }
        request
    }

    /// Answers with an error.
    pub(crate) fn fail(self, error: HttpError) {
        let waiting = self.0.lock().take();
        if let Some(request) = waiting {
            request.fail(error);
        }
    }

    /// When the request was passed on.
    pub(crate) fn arrived(&self) -> Instant {
        self.0.arrived
    }

    /// Whether nobody waits for the answer any more.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.0.is_cancelled()
    }
}

impl Drop for WaitingRequest {
    fn drop(&mut self) {
        let waiting = self.0.lock().take();
        if let Some(request) = waiting {
            request.fail(errors::BAD_GATEWAY);
        }
    }
}
