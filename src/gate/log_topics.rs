//! The gate's warnings by topic, each at most once a minute with a count.

use crate::util::log_throttle::{Repeat, more};
use std::time::{Duration, Instant};

/// Time without an event after which its end is logged.
const OVER_AFTER: Duration = Duration::from_secs(10);

/// What a warning is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LogTopic {
    /// There are as many connections as there may be.
    Connections,
    /// One address has as many as it may have.
    Address,
    /// Bodies do not fit in memory, nor on disk.
    Bodies,
    /// Files or memory have run out.
    Resources,
}

/// All topics.
const TOPICS: [LogTopic; 4] = [LogTopic::Connections, LogTopic::Address, LogTopic::Bodies, LogTopic::Resources];

/// The throttles of all topics.
#[derive(Debug, Default)]
pub(super) struct LogTopics {
    repeats: [Repeat; TOPICS.len()],
    last: [Option<Instant>; TOPICS.len()],
}

impl LogTopics {
    /// Notes an event, and logs it where a line is due.
    pub(super) fn hit(&mut self, topic: LogTopic, now: Instant, what: impl FnOnce() -> String) {
        self.last[topic as usize] = Some(now);
        if let Some(unsaid) = self.repeats[topic as usize].came(now) {
            log::warn!("{}{}", what(), more(unsaid));
        }
    }

    /// Logs the end of what has not come for a while.
    pub(super) fn log_ends(&mut self, now: Instant) {
        for topic in TOPICS {
            if self.last[topic as usize].is_some_and(|last| now.duration_since(last) >= OVER_AFTER) {
                self.last[topic as usize] = None;
                if let Some(unsaid) = self.repeats[topic as usize].over() {
                    log::info!("{}: over, {unsaid} more came", topic.name());
                }
            }
        }
    }

    /// Whether the end of something is still to be logged.
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
        }
    }
}
