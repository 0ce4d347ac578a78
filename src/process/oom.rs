//! Memory of the machine: whether the kernel has been killing for want of it, and how much the processes of a session have.

use procfs::process::all_processes;
use procfs::{page_size, vmstat};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, Ordering};

/// The kernel's count of such kills, in `/proc/vmstat`: of the whole machine, containers included.
const COUNTER: &str = "oom_kill";

/// The count as it was not long ago.
pub(crate) struct Memory {
    seen: AtomicI64,
}

impl Memory {
    /// Begins with the present count.
    pub(crate) fn new() -> Self {
        Self { seen: AtomicI64::new(count()) }
    }

    /// Notes the present count: what follows is what happens from now on.
    pub(crate) fn look(&self) {
        self.seen.store(count(), Ordering::Relaxed);
    }

    /// Whether the kernel has killed for want of memory since the last look.
    pub(crate) fn ran_out(&self) -> bool {
        count() > self.seen.load(Ordering::Relaxed)
    }
}

/// Resident memory in bytes of all processes of each session, by the session's id. A page that processes share counts for each of them.
/// Empty where there is no `/proc`.
pub(crate) fn by_session() -> BTreeMap<i32, u64> {
    let mut sessions = BTreeMap::new();
    // A process that ends while it is looked at has none.
    for stat in all_processes().into_iter().flatten().filter_map(|process| process.ok()?.stat().ok()) {
        *sessions.entry(stat.session).or_default() += stat.rss * page_size();
    }
    sessions
}

/// Zero where the kernel does not say.
fn count() -> i64 {
    vmstat().ok().and_then(|counters| counters.get(COUNTER).copied()).unwrap_or(0)
}
