//! The state of a submitted request, which the event loop shares with the thread that answers.
//!
//! A waiting request is stored here, so that the event loop can drop it and its memory when the client leaves or its time is over. A queue
//! only holds [`WaitingRequest`]s, which refer to it.

use super::HttpError;
use super::direct_writer::{DirectWriter, Progress};
use super::errors;
use super::request::Request;
use crate::lock::LockExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Instant;

/// The shared state of one request.
pub(crate) struct InFlight {
    /// The direct writer to the client.
    pub(crate) writer: DirectWriter,
    /// When the request was submitted.
    pub(crate) arrived: Instant,
    waiting: Mutex<Option<Request>>,
    cancelled: AtomicBool,
    taken_at: OnceLock<Instant>,
}

impl InFlight {
    /// The state of a request that is submitted at `now`.
    pub(crate) fn new(writer: DirectWriter, now: Instant) -> Arc<Self> {
        let (waiting, cancelled, taken_at) = Default::default();
        Arc::new(Self { writer, arrived: now, waiting, cancelled, taken_at })
    }

    /// Cancels the request. A waiting request is dropped; a worker that has taken it sees [`InFlight::is_cancelled`]. Returns how much of
    /// an answer was sent directly.
    pub(crate) fn cancel(&self) -> Progress {
        // Set before the lock: a worker that puts the request back reads the flag while it holds the lock.
        self.cancelled.store(true, Ordering::SeqCst);
        let waiting = self.lock().take();
        if let Some(mut request) = waiting {
            request.responder.abandon();
        }
        self.writer.revoke()
    }

    /// Whether the request was cancelled.
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

/// A request that waits in a queue. If it is dropped there, its client gets 502.
pub(crate) struct WaitingRequest(Arc<InFlight>);

impl WaitingRequest {
    /// Stores a request until a worker takes it. None, and the request is dropped, if it was cancelled.
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

    /// Takes the request at `now`; none if it was cancelled.
    pub(crate) fn take(self, now: Instant) -> Option<Request> {
        let request = self.0.lock().take();
        if request.is_some() {
            self.0.taken_at.get_or_init(|| now);
        }
        request
    }

    /// Answers with an error.
    pub(crate) fn fail(self, error: HttpError) {
        self.fail_if_waiting(error);
    }

    fn fail_if_waiting(&self, error: HttpError) {
        let waiting = self.0.lock().take();
        if let Some(request) = waiting {
            request.fail(error);
        }
    }

    /// When the request was submitted.
    pub(crate) fn arrived(&self) -> Instant {
        self.0.arrived
    }

    /// Whether the request was cancelled.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.0.is_cancelled()
    }
}

impl Drop for WaitingRequest {
    fn drop(&mut self) {
        self.fail_if_waiting(errors::BAD_GATEWAY);
    }
}
