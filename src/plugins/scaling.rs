//! How many connections the host keeps to a plugin. The decision is pure; what it is made from is counted here.

use std::num::NonZero;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

/// Average time for a request below which a plugin is quick: its requests are pipelined over few connections, since more of either would
/// only wait for each other.
pub(crate) const QUICK: Duration = Duration::from_millis(1);

/// Connections that a quick plugin needs where its requests are uneven: one goes on while another waits.
const UNEVEN_CONNECTIONS: usize = 2;

/// Processors from which on a quick plugin gets so many in any case. Fewer are busy with one connection, and a second would only make
/// smaller batches.
const MANY_PROCESSORS: usize = 4;

/// How long a plugin's requests count as uneven after the last that were.
const UNEVEN_TIME: Duration = Duration::from_secs(1);

/// Processors that the host may use.
static PROCESSORS: LazyLock<usize> = LazyLock::new(|| available_parallelism().map_or(1, NonZero::get));

/// What decides about a plugin's connections.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stats {
    /// Requests that wait.
    pub(crate) waiting: usize,
    /// Connections that wait for a request.
    pub(crate) idle: usize,
    /// Connections that are open, or about to be.
    pub(crate) connections: usize,
    /// Connections that one answer takes for long: a stream, or an answer that is slow to begin.
    pub(crate) stalled: usize,
    /// Connections that the plugin may have.
    pub(crate) most: usize,
    /// Average time for a request.
    pub(crate) pace: Duration,
    /// Requests have kept others on their connection waiting of late.
    pub(crate) uneven: bool,
    /// Processors that the host may use.
    pub(crate) processors: usize,
}

/// What to do about a plugin's connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Open one more.
    Grow,
    /// Keep them.
    Stay,
    /// Close one.
    Shrink,
}

/// Decides whether a plugin has too few connections or too many.
pub(crate) fn decide(stats: &Stats) -> Decision {
    let needed = if stats.uneven || stats.processors >= MANY_PROCESSORS { UNEVEN_CONNECTIONS } else { 1 };
    let moving = stats.connections.saturating_sub(stats.stalled);
    let is_busy = stats.waiting > stats.idle && stats.connections < stats.most;
    if is_busy && (stats.pace >= QUICK || moving < needed) {
        Decision::Grow
    } else if stats.pace < QUICK / 2 && moving > needed {
        Decision::Shrink
    } else {
        Decision::Stay
    }
}

/// The counts of one plugin. They are read one by one, so a decision may be a request late.
#[derive(Debug)]
pub(crate) struct Scaling {
    /// Connections that wait for a request.
    pub(crate) idle: AtomicUsize,
    /// Connections that are open, or about to be.
    pub(crate) connections: AtomicUsize,
    /// Connections that one answer takes for long.
    pub(crate) stalled: AtomicUsize,
    /// Another connection has been asked for.
    pub(crate) growing: AtomicBool,
    /// A connection is about to be closed.
    pub(crate) shrinking: AtomicBool,
    /// Average time for a request, in microseconds.
    pace: AtomicU64,
    /// When the plugin became known, and until how many milliseconds after that its requests count as uneven.
    known: Instant,
    uneven_until: AtomicU64,
}

impl Scaling {
    /// The counts of a plugin that has no connection.
    pub(crate) fn new() -> Self {
        let (idle, connections, stalled, growing, shrinking, pace, uneven_until) = Default::default();
        Self { idle, connections, stalled, growing, shrinking, pace, known: Instant::now(), uneven_until }
    }

    /// Notes the average time for a request of late.
    pub(crate) fn set_pace(&self, pace: Duration) {
        self.pace.store(u64::try_from(pace.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Notes a request that keeps others on its connection waiting: it goes alone, its answer is large, or it takes long.
    pub(crate) fn note_uneven(&self) {
        let until = self.known.elapsed() + UNEVEN_TIME;
        self.uneven_until.store(until.as_millis().try_into().unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// What to do now, where so many requests wait and the plugin may have `most` connections.
    pub(crate) fn decide(&self, waiting: usize, most: usize) -> Decision {
        let [idle, connections, stalled] =
            [&self.idle, &self.connections, &self.stalled].map(|count| count.load(Ordering::Relaxed));
        let pace = Duration::from_micros(self.pace.load(Ordering::Relaxed));
        let uneven = self.known.elapsed() < Duration::from_millis(self.uneven_until.load(Ordering::Relaxed));
        decide(&Stats { waiting, idle, connections, stalled, most, pace, uneven, processors: *PROCESSORS })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOW: Duration = Duration::from_millis(5);
    const FAST: Duration = Duration::from_micros(100);

    #[test]
    fn a_plugin_has_as_many_connections_as_its_requests_can_use() {
        // Waiting, idle, connections, stalled, pace, uneven, processors.
        for (waiting, idle, connections, stalled, pace, uneven, processors, expected) in [
            // A slow plugin gets another connection whenever requests wait, up to its most.
            (1, 0, 1, 0, SLOW, false, 2, Decision::Grow),
            (1, 1, 2, 0, SLOW, false, 2, Decision::Stay),
            (0, 0, 1, 0, SLOW, false, 2, Decision::Stay),
            (50, 0, 8, 0, SLOW, false, 2, Decision::Stay),
            (0, 8, 8, 0, SLOW, false, 2, Decision::Stay),
            // A quick one has one connection, or two where requests are uneven or processors many.
            (50, 0, 1, 0, FAST, false, 2, Decision::Stay),
            (50, 0, 1, 0, FAST, true, 2, Decision::Grow),
            (50, 0, 1, 0, FAST, false, 4, Decision::Grow),
            (50, 0, 2, 0, FAST, true, 4, Decision::Stay),
            (50, 0, 2, 0, FAST, false, 2, Decision::Shrink),
            (0, 3, 3, 0, FAST, true, 2, Decision::Shrink),
            // Connections that streams take count for none.
            (1, 0, 3, 3, FAST, false, 2, Decision::Grow),
            (1, 0, 4, 3, FAST, false, 2, Decision::Stay),
            (0, 2, 5, 3, FAST, false, 2, Decision::Shrink),
            (1, 0, 8, 8, FAST, false, 2, Decision::Stay),
            // Between quick and slow nothing changes, so that it does not swing.
            (50, 0, 1, 0, QUICK / 2, false, 2, Decision::Stay),
            (0, 8, 8, 0, QUICK / 2, false, 2, Decision::Stay),
        ] {
            let stats = Stats { waiting, idle, connections, stalled, most: 8, pace, uneven, processors };
            assert_eq!(decide(&stats), expected, "{stats:?}");
        }
    }

    #[test]
    fn counts_are_what_is_decided_by() {
        let scaling = Scaling::new();
        scaling.connections.store(1, Ordering::Relaxed);
        scaling.set_pace(SLOW);
        assert_eq!((scaling.decide(1, 8), scaling.decide(1, 1)), (Decision::Grow, Decision::Stay));
        scaling.set_pace(FAST);
        scaling.connections.store(4, Ordering::Relaxed);
        assert_eq!(scaling.decide(0, 8), Decision::Shrink);
        scaling.stalled.store(3, Ordering::Relaxed);
        assert_ne!(scaling.decide(0, 8), Decision::Shrink);
    }
}
