//! What is known of a request at its end, and the counters of a plugin's requests.

use std::fmt;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The whole answer was sent.
    Complete,
    /// The answer was aborted after it had begun.
    Cut,
    /// The client left before the answer was complete.
    Cancelled,
}

/// A request that has ended. Times count from the end of its head.
#[derive(Debug)]
pub(crate) struct RequestEnd {
    pub(crate) outcome: Outcome,
    /// The answer's status; none if no answer began.
    pub(crate) status: Option<u16>,
    /// Bytes of the request's body.
    pub(crate) received: u64,
    /// Bytes sent to the client, head and framing included.
    pub(crate) sent: u64,
    /// Time until a worker took the request; none if none did.
    pub(crate) queued: Option<Duration>,
    /// Time until the answer began.
    pub(crate) first_byte: Option<Duration>,
    /// Time until the request ended.
    pub(crate) total: Duration,
    /// The client's address.
    pub(crate) client: Option<IpAddr>,
}

impl fmt::Display for RequestEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { outcome, received, sent, total, .. } = self;
        match self.client {
            Some(client) => write!(f, "{client}: ")?,
            None => f.write_str("-: ")?,
        }
        match self.status {
            Some(status) => write!(f, "{status}")?,
            None => f.write_str("no answer")?,
        }
        write!(f, " {outcome:?}, {received} bytes received, {sent} sent, {total:?}")?;
        for (name, time) in [("queued", self.queued), ("first byte", self.first_byte)] {
            if let Some(time) = time {
                write!(f, ", {name} {time:?}")?;
            }
        }
        Ok(())
    }
}

/// Counters of the requests of one plugin, since the host started.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    /// Answers by the first digit of their status, from 2 to 5.
    answers: [AtomicU64; 4],
    cut: AtomicU64,
    cancelled: AtomicU64,
    received: AtomicU64,
    sent: AtomicU64,
}

/// The counters at one moment.
#[derive(Debug, serde::Serialize)]
pub(crate) struct TrafficCounts {
    /// Answers with a status from 200 to 299.
    pub(crate) success: u64,
    /// Answers with a status from 300 to 399.
    pub(crate) redirect: u64,
    /// Answers with a status from 400 to 499.
    pub(crate) client_error: u64,
    /// Answers with a status from 500 to 599.
    pub(crate) server_error: u64,
    /// Answers that were aborted after they had begun.
    pub(crate) cut: u64,
    /// Requests whose client left before the answer was complete.
    pub(crate) cancelled: u64,
    /// Bytes of request bodies.
    pub(crate) received_bytes: u64,
    /// Bytes sent to clients.
    pub(crate) sent_bytes: u64,
}

impl Traffic {
    /// Counts a request that has ended.
    pub(crate) fn count(&self, end: &RequestEnd) {
        let counter = match end.outcome {
            Outcome::Complete => end.status.and_then(|status| self.answers.get(usize::from(status / 100).checked_sub(2)?)),
            Outcome::Cut => Some(&self.cut),
            Outcome::Cancelled => Some(&self.cancelled),
        };
        for (counter, by) in [(counter, 1), (Some(&self.received), end.received), (Some(&self.sent), end.sent)] {
            if let Some(counter) = counter.filter(|_| by > 0) {
                counter.fetch_add(by, Ordering::Relaxed);
            }
        }
    }

    /// The counters now.
    pub(crate) fn counts(&self) -> TrafficCounts {
        let [success, redirect, client_error, server_error] =
            [0, 1, 2, 3].map(|digit| self.answers[digit].load(Ordering::Relaxed));
        TrafficCounts {
            success,
            redirect,
            client_error,
            server_error,
            cut: self.cut.load(Ordering::Relaxed),
            cancelled: self.cancelled.load(Ordering::Relaxed),
            received_bytes: self.received.load(Ordering::Relaxed),
            sent_bytes: self.sent.load(Ordering::Relaxed),
        }
    }
}
