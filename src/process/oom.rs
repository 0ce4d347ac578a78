//! Memory: the kernel's out-of-memory kills, and the resident memory of each session.

use procfs::process::all_processes;
use procfs::{page_size, vmstat};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, Ordering};

/// The kernel's count of out-of-memory kills, in `/proc/vmstat`: of the whole machine, containers included.
const COUNTER: &str = "oom_kill";

/// Detects out-of-memory kills since the last reset.
pub(crate) struct OomMonitor {
    seen: AtomicI64,
}

impl OomMonitor {
    /// Starts from the current count.
    pub(crate) fn new() -> Self {
        Self { seen: AtomicI64::new(count()) }
    }

    /// Forgets earlier kills.
    pub(crate) fn reset(&self) {
        self.seen.store(count(), Ordering::Relaxed);
    }

    /// Whether the kernel has killed a process for lack of memory since the last reset.
    pub(crate) fn has_killed(&self) -> bool {
        count() > self.seen.load(Ordering::Relaxed)
    }
}

/// Resident memory in bytes of all processes of each session, by the session's id. A page that processes share counts for each of them.
/// Empty if there is no `/proc`.
pub(crate) fn by_session() -> BTreeMap<i32, u64> {
    let mut sessions = BTreeMap::new();
    // Skips processes that end meanwhile.
    for stat in all_processes().into_iter().flatten().filter_map(|process| process.ok()?.stat().ok()) {
        *sessions.entry(stat.session).or_default() += stat.rss * page_size();
    }
    sessions
}

/// Zero if the kernel does not report it.
fn count() -> i64 {
    vmstat().ok().and_then(|counters| counters.get(COUNTER).copied()).unwrap_or(0)
}
