//! What the gate has trouble with, said in the log once a minute with a count and not once a request.

use crate::repeat::{Repeat, more};
use std::time::{Duration, Instant};

/// Time without a trouble after which it is said to be over.
const OVER_AFTER: Duration = Duration::from_secs(10);

/// A kind of trouble.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trouble {
    /// There are as many connections as there may be.
    Connections,
    /// One address has as many as it may have.
    Address,
    /// No connection to the host came free in time.
    Places,
    /// Bodies do not fit in memory, nor on disk.
    Bodies,
    /// Files or memory have run out.
    Resources,
    /// The host's answer cannot be passed on.
    Answers,
}

/// All kinds.
const KINDS: [Trouble; 6] =
    [Trouble::Connections, Trouble::Address, Trouble::Places, Trouble::Bodies, Trouble::Resources, Trouble::Answers];

/// What the gate has had trouble with of late.
#[derive(Debug, Default)]
pub(super) struct Troubles {
    repeats: [Repeat; KINDS.len()],
    last: [Option<Instant>; KINDS.len()],
}

impl Troubles {
    /// Notes a trouble, and says so where that is due.
    pub(super) fn came(&mut self, kind: Trouble, now: Instant, what: impl FnOnce() -> String) {
        self.last[kind as usize] = Some(now);
        if let Some(unsaid) = self.repeats[kind as usize].came(now) {
            log::warn!("{}{}", what(), more(unsaid));
        }
    }

    /// Says of what has not come for a while that it is over.
    pub(super) fn look(&mut self, now: Instant) {
        for kind in KINDS {
            if self.last[kind as usize].is_some_and(|last| now.duration_since(last) >= OVER_AFTER) {
                self.last[kind as usize] = None;
                if let Some(unsaid) = self.repeats[kind as usize].over() {
                    log::info!("{}: over, {unsaid} more came", kind.name());
                }
            }
        }
    }

    /// Whether the end of a trouble is still to be said.
    pub(super) fn is_open(&self) -> bool {
        self.last.iter().any(Option::is_some)
    }
}

impl Trouble {
    fn name(self) -> &'static str {
        match self {
            Self::Connections => "too many connections",
            Self::Address => "too many connections from one address",
            Self::Places => "too many requests at once",
            Self::Bodies => "no room for bodies",
            Self::Resources => "a lack of files, threads or memory",
            Self::Answers => "answers that cannot be passed on",
        }
    }
}
