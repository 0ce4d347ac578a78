//! Orphans: processes that outlive the one that the host started. They are found by uid, by session, or by an environment variable
//! that they were started with, and killed.
//!
//! A process of a plugin without a uid of its own escapes if it has called setsid and no longer has the variable in its environment. So
//! does a process that forks faster than it is found; with a uid of its own, only if the host is killed.

use crate::util::pause::pause;
use procfs::process::{Process, Stat, all_processes};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::io::Read;
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

/// Pause between two scans: killed processes need a moment to disappear, and may have forked before.
const SCAN_PAUSE: Duration = Duration::from_millis(10);

/// How orphans are recognised: a process that matches one of these is an orphan.
#[derive(Debug, Default)]
pub(crate) struct Selector {
    /// Their sessions, each with the start time of its leader, see [`started`]. If that is known, a later session with the same id does
    /// not match.
    pub(crate) sessions: BTreeMap<i32, Option<u64>>,
    /// A variable, with its value, that they or their ancestors were started with.
    pub(crate) variable: Option<(&'static str, OsString)>,
    /// Uids that nothing else uses. A process without privileges cannot leave its uid, so none escapes this.
    pub(crate) uids: Option<RangeInclusive<u32>>,
}

/// The result of a search for orphans.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Search {
    /// Number of processes killed.
    pub(crate) killed: usize,
    /// Whether no orphan is left.
    pub(crate) complete: bool,
}

/// Kills all matching processes until there are none, for at most `time`. Finds none without `/proc`.
pub(crate) fn kill_all(selector: &Selector, time: Duration) -> Search {
    let deadline = Instant::now() + time;
    let mut killed = BTreeSet::new();
    loop {
        let mut found = false;
        // Skips processes that end during the scan. Kills each match before it examines the next process, so that it has no time to fork.
        for orphan in all_processes().into_iter().flatten().filter_map(|process| Orphan::recognize(process.ok()?, selector)) {
            found = true;
            if orphan.kill() {
                killed.insert(orphan.process.pid());
            }
        }
        if !found || Instant::now() >= deadline {
            return Search { killed: killed.len(), complete: !found };
        }
        pause(SCAN_PAUSE);
    }
}

/// Whether any process matches.
pub(crate) fn any(selector: &Selector) -> bool {
    all_processes()
        .into_iter()
        .flatten()
        .any(|process| process.is_ok_and(|process| Orphan::recognize(process, selector).is_some()))
}

/// A process under one of `uids` whose parent is another process of this executable: its uid, and the parent's process id.
pub(crate) fn used_by_another(uids: &RangeInclusive<u32>) -> Option<(u32, i32)> {
    let file = |pid: i32| fs::metadata(format!("/proc/{pid}/exe")).ok().map(|file| (file.dev(), file.ino()));
    let own_pid = i32::try_from(std::process::id()).ok()?;
    let own = file(own_pid)?;
    all_processes().into_iter().flatten().find_map(|process| {
        let status = process.ok()?.status().ok()?;
        let uid = Some(status.ruid).filter(|uid| uids.contains(uid))?;
        (status.ppid != own_pid && file(status.ppid) == Some(own)).then_some((uid, status.ppid))
    })
}

/// Start time of a process in clock ticks since boot. Together with the process id it identifies the process.
pub(crate) fn started(pid: i32) -> Option<u64> {
    Some(Process::new(pid).ok()?.stat().ok()?.starttime)
}

/// Zombie children of this process.
pub(crate) fn zombies_of_this_process() -> Vec<Pid> {
    let Ok(processes) = all_processes() else { return Vec::new() };
    let own = i32::try_from(std::process::id());
    let zombie = |process: Process| process.stat().ok().filter(|stat| stat.state == 'Z' && Ok(stat.ppid) == own);
    processes.filter_map(|process| Pid::from_raw(zombie(process.ok()?)?.pid)).collect()
}

/// A living process that matches.
struct Orphan {
    process: Process,
    started: u64,
    /// A pidfd, which stays valid when the id is reused. None if the kernel, or a container's seccomp filter, refuses pidfds.
    handle: Option<OwnedFd>,
}

impl Orphan {
    fn recognize(process: Process, selector: &Selector) -> Option<Self> {
        if u32::try_from(process.pid()) == Ok(std::process::id()) {
            return None;
        }
        let stat = alive(&process)?;
        if !selector.uid(&process) && !selector.session(&stat) && !selector.variable(&process) {
            return None;
        }
        let handle = match pidfd_open(Pid::from_raw(process.pid())?, PidfdFlags::empty()) {
            Err(Errno::SRCH) => return None,
            handle => handle.ok(),
        };
        let orphan = Self { process, started: stat.starttime, handle };
        // The pidfd may refer to a process that reused the id in the meantime.
        orphan.is_same().then_some(orphan)
    }

    /// Whether the process still has its id.
    fn is_same(&self) -> bool {
        alive(&self.process).is_some_and(|stat| stat.starttime == self.started)
    }

    /// Kills the process. Without a pidfd, another process is hit only if this one ends, is reaped and its id is reused between the last
    /// check and the signal. The kernel reuses an id only after all others.
    fn kill(&self) -> bool {
        match self.handle.as_ref().map(|handle| pidfd_send_signal(handle, Signal::KILL)) {
            Some(Ok(())) => true,
            Some(Err(Errno::SRCH)) => false,
            _ => self.is_same() && Pid::from_raw(self.process.pid()).is_some_and(|pid| kill_process(pid, Signal::KILL).is_ok()),
        }
    }
}

impl Selector {
    fn uid(&self, process: &Process) -> bool {
        // Not the owner of its /proc directory, because that is root for a non-dumpable process.
        let Some(uids) = &self.uids else { return false };
        process.status().is_ok_and(|status| [status.ruid, status.euid, status.suid].iter().any(|uid| uids.contains(uid)))
    }

    fn session(&self, stat: &Stat) -> bool {
        let Some(noted) = self.sessions.get(&stat.session) else { return false };
        let leader = if stat.pid == stat.session { Some(stat.starttime) } else { started(stat.session) };
        // The id of a leader that has ended stays reserved while its session has a process.
        noted.is_none() || leader.is_none() || leader == *noted
    }

    fn variable(&self, process: &Process) -> bool {
        let Some((name, value)) = &self.variable else { return false };
        let entry = [name.as_bytes(), b"=", value.as_bytes()].concat();
        let mut environment = Vec::new();
        let read = process.open_relative("environ").is_ok_and(|mut file| file.read_to_end(&mut environment).is_ok());
        // A process may have several variables of this name.
        read && environment.split(|byte| *byte == 0).any(|variable| variable == entry)
    }
}

/// The status of a process; none once it has ended.
fn alive(process: &Process) -> Option<Stat> {
    process.stat().ok().filter(|stat| !matches!(stat.state, 'Z' | 'X'))
}
