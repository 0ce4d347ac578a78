//! The gate's warnings by topic, each at most once a minute with a count.

use crate::util::log_throttle::{LogThrottle, suppressed_note};
use std::time::{Duration, Instant};

/// Time without an event after which its end is logged.
const CLEAR_AFTER: Duration = Duration::from_secs(10);

/// What a warning is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LogTopic {
    /// The limit of connections is reached.
    Connections,
    /// The limit of connections of one address is reached.
    Address,
    /// Bodies fit neither in memory nor on disk.
    Bodies,
    /// Files, threads or memory have run out.
    Resources,
    /// The limit of tunnels is reached.
    Tunnels,
    /// Messages of WebSocket take too much memory.
    Sockets,
}

/// All topics.
const TOPICS: [LogTopic; 6] =
    [LogTopic::Connections, LogTopic::Address, LogTopic::Bodies, LogTopic::Resources, LogTopic::Tunnels, LogTopic::Sockets];

/// The throttles of all topics.
#[derive(Debug, Default)]
pub(super) struct LogTopics {
    throttles: [LogThrottle; TOPICS.len()],
    last: [Option<Instant>; TOPICS.len()],
}

impl LogTopics {
    /// Notes an event, and logs it where a line is due.
    pub(super) fn hit(&mut self, topic: LogTopic, now: Instant, what: impl FnOnce() -> String) {
        self.last[topic as usize] = Some(now);
        if let Some(suppressed) = self.throttles[topic as usize].hit(now) {
            log::warn!("{}{}", what(), suppressed_note(suppressed));
        }
    }

    /// Logs the topics without an event for a while as over.
    pub(super) fn log_ends(&mut self, now: Instant) {
        for topic in TOPICS {
            if self.last[topic as usize].is_some_and(|last| now.duration_since(last) >= CLEAR_AFTER) {
                self.last[topic as usize] = None;
                if let Some(suppressed) = self.throttles[topic as usize].clear() {
                    log::info!("{}: over, {suppressed} more came", topic.name());
                }
            }
        }
    }

    /// Whether the end of a topic is still to be logged.
    pub(super) fn is_open(&self) -> bool {
        self.last.iter().any(Option::is_some)
    }
}

impl LogTopic {
    fn name(self) -> &'static str {
        match self {
            Self::Connections => "too many connections",
            Self::Address => "too many connections from one address",
            Self::Bodies => "no room for bodies",
            Self::Resources => "a lack of files, threads or memory",
            Self::Tunnels => "tunnels refused",
            Self::Sockets => "no room for messages of WebSocket",
        }
    }
}
