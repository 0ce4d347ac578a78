//! How many connections the host keeps to a plugin: a pure decision, and the counters that it is based on.

use std::num::NonZero;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

/// Average time for a request below which a plugin is quick: its requests are pipelined over few connections, since more of either would
/// only wait for each other.
pub(crate) const QUICK: Duration = Duration::from_millis(1);

/// Connections that a quick plugin needs while its requests cause head-of-line blocking: one makes progress while another waits.
const BLOCKING_CONNECTIONS: usize = 2;

/// Number of processors from which a quick plugin always gets [`BLOCKING_CONNECTIONS`]. One connection keeps fewer processors busy, and a
/// second would only make smaller batches.
const MANY_PROCESSORS: usize = 4;

/// Connections for each processor that a quick plugin needs if its requests are not pipelined: enough that one is always on its way while
/// others are being answered.
const UNPIPELINED_CONNECTIONS: usize = 4;

/// How long a plugin counts as blocking after the last request that blocked others.
const BLOCKING_TIME: Duration = Duration::from_secs(1);

/// Processors that the host may use.
static PROCESSORS: LazyLock<usize> = LazyLock::new(|| available_parallelism().map_or(1, NonZero::get));

/// The input of the decision.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stats {
    /// Requests that wait.
    pub(crate) waiting: usize,
    /// Connections that wait for a request.
    pub(crate) idle: usize,
    /// Connections that are open, or about to be.
    pub(crate) connections: usize,
    /// Connections that one long answer occupies: a stream, or an answer that is slow to begin.
    pub(crate) stalled: usize,
    /// Most connections that the plugin may have.
    pub(crate) most: usize,
    /// Average time for a request.
    pub(crate) pace: Duration,
    /// Whether requests have recently held up those behind them on a connection (head-of-line blocking).
    pub(crate) blocking: bool,
    /// Processors that the host may use.
    pub(crate) processors: usize,
    /// Which requests a worker sends before it has answered others.
    pub(crate) batches: Batches,
}

/// Which requests a worker sends before it has answered others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Batches {
    /// None.
    None,
    /// Safe ones, each on a connection of its own. All others occupy a worker each.
    Apart,
    /// Safe ones, on one connection.
    Pipelined,
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
    let needed = match stats {
        Stats { batches: Batches::None, processors, .. } | Stats { batches: Batches::Apart, blocking: true, processors, .. } => {
            UNPIPELINED_CONNECTIONS * processors
        }
        Stats { blocking: true, .. } | Stats { processors: MANY_PROCESSORS.., .. } => BLOCKING_CONNECTIONS,
        _ => 1,
    };
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

/// The counters of one plugin. They are read one by one, so a decision may be one request late.
#[derive(Debug)]
pub(crate) struct Scaling {
    /// Connections that wait for a request.
    pub(crate) idle: AtomicUsize,
    /// Connections that are open, or about to be.
    pub(crate) connections: AtomicUsize,
    /// Connections that one long answer occupies.
    pub(crate) stalled: AtomicUsize,
    /// Another connection has been asked for.
    pub(crate) growing: AtomicBool,
    /// A connection is about to be closed.
    pub(crate) shrinking: AtomicBool,
    /// Average time for a request, in microseconds.
    pace: AtomicU64,
    batches: Batches,
    created: Instant,
    /// Until when the plugin counts as blocking, in milliseconds after `created`.
    blocking_until: AtomicU64,
}

impl Scaling {
    /// The counts of a plugin that has no connection.
    pub(crate) fn new(batches: Batches) -> Self {
        let (idle, connections, stalled, growing, shrinking, pace, blocking_until) = Default::default();
        Self { idle, connections, stalled, growing, shrinking, pace, batches, created: Instant::now(), blocking_until }
    }

    /// Number of workers that share the time in which they are answered. An application answers several requests in the time for one, and
    /// with many workers that time shows how many they are rather than how quick it is.
    pub(crate) fn side_by_side(&self) -> u32 {
        let [idle, connections, stalled] =
            [&self.idle, &self.connections, &self.stalled].map(|count| count.load(Ordering::Relaxed));
        let at_work = connections.saturating_sub(idle + stalled).max(1);
        if self.batches == Batches::Apart { u32::try_from(at_work).unwrap_or(u32::MAX) } else { 1 }
    }

    /// Records the recent average time for a request.
    pub(crate) fn set_pace(&self, pace: Duration) {
        self.pace.store(u64::try_from(pace.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Records a request that holds up others on its connection: it is not pipelined, its answer is large, or it takes long.
    pub(crate) fn note_blocking(&self) {
        let until = self.created.elapsed() + BLOCKING_TIME;
        self.blocking_until.store(until.as_millis().try_into().unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Decides with this number of waiting requests, and at most `most` connections.
    pub(crate) fn decide(&self, waiting: usize, most: usize) -> Decision {
        let [idle, connections, stalled] =
            [&self.idle, &self.connections, &self.stalled].map(|count| count.load(Ordering::Relaxed));
        let pace = Duration::from_micros(self.pace.load(Ordering::Relaxed));
        let blocking = self.created.elapsed() < Duration::from_millis(self.blocking_until.load(Ordering::Relaxed));
        decide(&Stats {
            waiting,
            idle,
            connections,
            stalled,
            most,
            pace,
            blocking,
            processors: *PROCESSORS,
            batches: self.batches,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOW: Duration = Duration::from_millis(5);
    const FAST: Duration = Duration::from_micros(100);

    #[test]
    fn a_plugin_has_as_many_connections_as_its_requests_can_use() {
        // Waiting, idle, connections, stalled, pace, blocking, processors.
        for (waiting, idle, connections, stalled, pace, blocking, processors, expected) in [
            // A slow plugin gets another connection whenever requests wait, up to its most.
            (1, 0, 1, 0, SLOW, false, 2, Decision::Grow),
            (1, 1, 2, 0, SLOW, false, 2, Decision::Stay),
            (0, 0, 1, 0, SLOW, false, 2, Decision::Stay),
            (50, 0, 8, 0, SLOW, false, 2, Decision::Stay),
            (0, 8, 8, 0, SLOW, false, 2, Decision::Stay),
            // A quick one has one connection, or two if requests are blocking or there are many processors.
            (50, 0, 1, 0, FAST, false, 2, Decision::Stay),
            (50, 0, 1, 0, FAST, true, 2, Decision::Grow),
            (50, 0, 1, 0, FAST, false, 4, Decision::Grow),
            (50, 0, 2, 0, FAST, true, 4, Decision::Stay),
            (50, 0, 2, 0, FAST, false, 2, Decision::Shrink),
            (0, 3, 3, 0, FAST, true, 2, Decision::Shrink),
            // Connections occupied by streams do not count.
            (1, 0, 3, 3, FAST, false, 2, Decision::Grow),
            (1, 0, 4, 3, FAST, false, 2, Decision::Stay),
            (0, 2, 5, 3, FAST, false, 2, Decision::Shrink),
            (1, 0, 8, 8, FAST, false, 2, Decision::Stay),
            // Between quick and slow nothing changes, so that the number does not oscillate.
            (50, 0, 1, 0, QUICK / 2, false, 2, Decision::Stay),
            (0, 8, 8, 0, QUICK / 2, false, 2, Decision::Stay),
        ] {
            let stats =
                Stats { waiting, idle, connections, stalled, most: 8, pace, blocking, processors, batches: Batches::Pipelined };
            assert_eq!(decide(&stats), expected, "{stats:?}");
        }
    }

    #[test]
    fn a_quick_plugin_without_pipelining_has_some_connections_for_each_processor() {
        for (waiting, connections, pace, expected) in [
            (50, 7, FAST, Decision::Grow),
            (50, 8, FAST, Decision::Stay),
            (50, 9, FAST, Decision::Shrink),
            (50, 8, SLOW, Decision::Grow),
            (50, 64, SLOW, Decision::Stay),
            (0, 4, FAST, Decision::Stay),
        ] {
            let (idle, stalled, blocking) = (0, 0, false);
            let stats =
                Stats { waiting, idle, connections, stalled, most: 64, pace, blocking, processors: 2, batches: Batches::None };
            assert_eq!(decide(&stats), expected, "{stats:?}");
            // An application too, while it gets requests that are not sent in batches.
            let stats = Stats { blocking: true, batches: Batches::Apart, ..stats };
            assert_eq!(decide(&stats), expected, "{stats:?}");
        }
    }

    #[test]
    fn a_quick_application_that_only_gets_safe_requests_has_one_connection_that_moves() {
        for (connections, stalled, expected) in [(1, 0, Decision::Stay), (1, 1, Decision::Grow), (2, 0, Decision::Shrink)] {
            let (waiting, idle, most, pace, blocking, processors) = (50, 0, 64, FAST, false, 2);
            let stats = Stats { waiting, idle, connections, stalled, most, pace, blocking, processors, batches: Batches::Apart };
            assert_eq!(decide(&stats), expected, "{stats:?}");
        }
    }

    #[test]
    fn the_workers_of_an_application_share_the_time_of_its_answers() {
        for (batches, expected) in [(Batches::Apart, 5), (Batches::Pipelined, 1), (Batches::None, 1)] {
            let scaling = Scaling::new(batches);
            assert_eq!(scaling.side_by_side(), 1);
            scaling.connections.store(10, Ordering::Relaxed);
            scaling.idle.store(3, Ordering::Relaxed);
            scaling.stalled.store(2, Ordering::Relaxed);
            assert_eq!(scaling.side_by_side(), expected);
        }
    }

    #[test]
    fn the_decision_uses_the_counters() {
        let scaling = Scaling::new(Batches::Pipelined);
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
