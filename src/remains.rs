//! What plugins leave behind: processes that outlive the one that the host has started, found by their session or by a variable of
//! the environment that they were born with, and ended.
//!
//! A process escapes this that has made a session of its own and has cleared its environment as well; so does one that keeps
//! forking faster than it is found.

use crate::pause::pause;
use procfs::process::{Process, all_processes};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// Pause between two looks: what was killed needs a moment to go, and may have forked before.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// By what processes are recognized: one of the two is enough.
pub(crate) struct Marks {
    /// Sessions that they are in.
    pub(crate) sessions: BTreeSet<i32>,
    /// A variable that they, or those they descend from, were started with, and its value.
    pub(crate) variable: (&'static str, OsString),
}

impl Marks {
    /// Those of a plugin, or of all, started with this variable.
    pub(crate) fn variable(name: &'static str, value: &OsStr) -> Self {
        Self { sessions: BTreeSet::new(), variable: (name, value.to_owned()) }
    }
}

/// Kills all that bear the marks until there are none, for at most `time`. Gives how many were killed; none are found where
/// there is no `/proc`.
pub(crate) fn end(marks: &Marks, time: Duration) -> usize {
    let deadline = Instant::now() + time;
    let mut killed = BTreeSet::new();
    loop {
        let found = find(marks);
        for (pid, handle) in &found {
            if pidfd_send_signal(handle, Signal::KILL).is_ok() {
                killed.insert(*pid);
            }
        }
        if found.is_empty() || Instant::now() >= deadline {
            return killed.len();
        }
        pause(LOOK_AGAIN);
    }
}

/// Children of this process that have ended and were not waited for.
pub(crate) fn zombies_of_this_process() -> Vec<Pid> {
    let Ok(processes) = all_processes() else { return Vec::new() };
    let own = i32::try_from(std::process::id());
    let zombie = |process: Process| process.stat().ok().filter(|stat| stat.state == 'Z' && Ok(stat.ppid) == own);
    processes.filter_map(|process| Pid::from_raw(zombie(process.ok()?)?.pid)).collect()
}

/// Living processes that bear the marks, each with a handle that no other process can come by with the same id.
fn find(marks: &Marks) -> Vec<(i32, OwnedFd)> {
    let Ok(processes) = all_processes() else { return Vec::new() };
    // A process that ends while it is looked at is none.
    processes.filter_map(|process| marked(&process.ok()?, marks)).collect()
}

fn marked(process: &Process, marks: &Marks) -> Option<(i32, OwnedFd)> {
    let pid = process.pid();
    if u32::try_from(pid) == Ok(std::process::id()) {
        return None;
    }
    // Before it is looked at: what is read after this is read of the very process.
    let handle = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
    let stat = process.stat().ok()?;
    if matches!(stat.state, 'Z' | 'X') {
        return None;
    }
    let (name, value) = &marks.variable;
    let bears = || process.environ().ok().and_then(|environment| Some(environment.get(OsStr::new(name))? == value));
    (marks.sessions.contains(&stat.session) || bears() == Some(true)).then_some((pid, handle))
}
