//! Whether the kernel has been killing for want of memory.

use procfs::vmstat;
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

/// Zero where the kernel does not say.
fn count() -> i64 {
    vmstat().ok().and_then(|counters| counters.get(COUNTER).copied()).unwrap_or(0)
}
