//! Orphans: processes that outlive the one that the host has started. They are found by their uid, by their session, or by a variable of
//! the environment that they were born with, and killed.
//!
//! A process of a plugin without a uid of its own escapes this where it has made a session of its own and has no such variable in its
//! environment any more. So does one that keeps forking faster than it is found; of a plugin with a uid, only where the host is killed.

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

/// Pause between two looks: what was killed needs a moment to go, and may have forked before.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// By what orphans are recognized: one of these is enough.
#[derive(Debug, Default)]
pub(crate) struct Marks {
    /// Sessions that they are in, and when the leader of each was started, see [`started`]. Where that is known, a later session of the
    /// same number is no match.
    pub(crate) sessions: BTreeMap<i32, Option<u64>>,
    /// A variable that they, or those they descend from, were started with, and its value.
    pub(crate) variable: Option<(&'static str, OsString)>,
    /// Uids that nothing else runs under. A process without privileges cannot leave its uid, so none escapes this mark.
    pub(crate) uids: Option<RangeInclusive<u32>>,
}

/// What a search for orphans came to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Search {
    /// How many were killed.
    pub(crate) killed: usize,
    /// Whether none is left.
    pub(crate) complete: bool,
}

/// Kills all processes that bear the marks until there are none, for at most `time`. None are found where there is no `/proc`.
pub(crate) fn end(marks: &Marks, time: Duration) -> Search {
    let deadline = Instant::now() + time;
    let mut killed = BTreeSet::new();
    loop {
        let mut found = false;
        // A process that ends while it is looked at is none. Each is killed before the next is looked at, so that it has no time to fork.
        for orphan in all_processes().into_iter().flatten().filter_map(|process| Orphan::recognize(process.ok()?, marks)) {
            found = true;
            if orphan.kill() {
                killed.insert(orphan.process.pid());
            }
        }
        if !found || Instant::now() >= deadline {
            return Search { killed: killed.len(), complete: !found };
        }
        pause(LOOK_AGAIN);
    }
}

/// Whether any process bears the marks.
pub(crate) fn any(marks: &Marks) -> bool {
    all_processes().into_iter().flatten().any(|process| process.is_ok_and(|process| Orphan::recognize(process, marks).is_some()))
}

/// The uid of a process that runs under one of `uids` as the child of another process of this program's file, and that process's id.
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

/// When a process was started, in clock ticks after the system's start. With its id this tells it from all others.
pub(crate) fn started(pid: i32) -> Option<u64> {
    Some(Process::new(pid).ok()?.stat().ok()?.starttime)
}

/// Children of this process that have ended and were not waited for.
pub(crate) fn zombies_of_this_process() -> Vec<Pid> {
    let Ok(processes) = all_processes() else { return Vec::new() };
    let own = i32::try_from(std::process::id());
    let zombie = |process: Process| process.stat().ok().filter(|stat| stat.state == 'Z' && Ok(stat.ppid) == own);
    processes.filter_map(|process| Pid::from_raw(zombie(process.ok()?)?.pid)).collect()
}

/// A living process that bears a mark.
struct Orphan {
    process: Process,
    started: u64,
    /// No other process can come by this with the same id. None where the kernel, or a seccomp filter of a container, refuses it.
    handle: Option<OwnedFd>,
}

impl Orphan {
    fn recognize(process: Process, marks: &Marks) -> Option<Self> {
        if u32::try_from(process.pid()) == Ok(std::process::id()) {
            return None;
        }
        let stat = alive(&process)?;
        if !marks.uid(&process) && !marks.session(&stat) && !marks.variable(&process) {
            return None;
        }
        let handle = match pidfd_open(Pid::from_raw(process.pid())?, PidfdFlags::empty()) {
            Err(Errno::SRCH) => return None,
            handle => handle.ok(),
        };
        let orphan = Self { process, started: stat.starttime, handle };
        // The handle may be that of a process that has come by the id since.
        orphan.is_same().then_some(orphan)
    }

    /// Whether its id is still its own.
    fn is_same(&self) -> bool {
        alive(&self.process).is_some_and(|stat| stat.starttime == self.started)
    }

    /// Kills it. Without a handle there is a moment between the last look and the signal; in it the process would have to end, be reaped,
    /// and its id be given out again, which the kernel does only once all others have been.
    fn kill(&self) -> bool {
        match self.handle.as_ref().map(|handle| pidfd_send_signal(handle, Signal::KILL)) {
            Some(Ok(())) => true,
            Some(Err(Errno::SRCH)) => false,
            _ => self.is_same() && Pid::from_raw(self.process.pid()).is_some_and(|pid| kill_process(pid, Signal::KILL).is_ok()),
        }
    }
}

impl Marks {
    fn uid(&self, process: &Process) -> bool {
        // The owner of its directory is root's for a process that may not be dumped, so that is not asked.
        let Some(uids) = &self.uids else { return false };
        process.status().is_ok_and(|status| [status.ruid, status.euid, status.suid].iter().any(|uid| uids.contains(uid)))
    }

    fn session(&self, stat: &Stat) -> bool {
        let Some(noted) = self.sessions.get(&stat.session) else { return false };
        let leader = if stat.pid == stat.session { Some(stat.starttime) } else { started(stat.session) };
        // A leader that has gone leaves its number to its session as long as that has a process.
        noted.is_none() || leader.is_none() || leader == *noted
    }

    fn variable(&self, process: &Process) -> bool {
        let Some((name, value)) = &self.variable else { return false };
        let entry = [name.as_bytes(), b"=", value.as_bytes()].concat();
        let mut environment = Vec::new();
        let read = process.open_relative("environ").is_ok_and(|mut file| file.read_to_end(&mut environment).is_ok());
        // A process may have the variable more than once.
        read && environment.split(|byte| *byte == 0).any(|variable| variable == entry)
    }
}

/// How a process is; nothing once it has ended.
fn alive(process: &Process) -> Option<Stat> {
    process.stat().ok().filter(|stat| !matches!(stat.state, 'Z' | 'X'))
}
