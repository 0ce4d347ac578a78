//! How much room this process has: the limits of open files, threads and memory, how many plugins and clients fit, and what to raise.
//!
//! A host whose plugins have taken the last file or thread could answer nobody, so only as many plugins run as leave some to its clients.

use crate::util::threads::small_thread;
use crossbeam_channel::{Receiver, bounded};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;
use rustix::process::{Resource, Rlimit, geteuid, getrlimit, setrlimit};
use std::fmt;
use std::fs;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Files the host needs for itself: some 16 at rest (listeners, the database and its readers, signals), and as many while plugins are
/// asked for their metadata.
const HOST_FILES: u64 = 48;

/// Files of a plugin: its log, what it prints, and two connections.
const PLUGIN_FILES: u64 = 4;

/// Files of a client's connection: its own, and a temporary file for a body that does not fit in memory.
const CLIENT_FILES: u64 = 2;

/// Threads and processes the host needs for itself: 20 at rest, and those that ask plugins for their metadata.
const HOST_TASKS: u64 = 64;

/// Threads and processes of a plugin: its supervisor, three that wait (for output, its end, requests), and a few of its own.
const PLUGIN_TASKS: u64 = 8;

/// Address space the host needs for itself, in bytes: nearly all of it is what glibc's allocator sets aside for each of some 16 threads
/// without using it (951 MiB were measured), and without that allocator it is stacks.
const HOST_MEMORY: u64 = if cfg!(target_env = "gnu") { 1280 << 20 } else { 192 << 20 };

/// Address space of a plugin in bytes: the stacks of its four threads, and what they use.
const PLUGIN_MEMORY: u64 = 2 << 20;

/// Share of the tasks, in quarters, that running plugins may take; the rest is for the supervisors of those that wait for room.
const RUNNING_QUARTERS: u64 = 3;

/// Room for fewer plugins than this is said at the start: a small registry has tens of them.
const FEW_PLUGINS: u64 = 100;

/// After how long a plugin for which there was no room is tried again: soon enough not to be waited for, and seldom enough that
/// hundreds of them cost nothing.
pub(crate) const ROOM_RETRY: Duration = Duration::from_secs(5);

/// How to have more open files.
const MORE_FILES: &str = "raise it with ulimit -n, or LimitNOFILE= of a systemd unit";

/// How to have more threads and processes.
const MORE_TASKS: &str = "raise it with ulimit -u, TasksMax= of a systemd unit, or the container's limit of pids";

/// How to have more address space.
const MORE_MEMORY: &str =
    "raise it with ulimit -v, and limit memory by MemoryMax= of a systemd unit or the container's limit instead";

/// The room of this process.
#[derive(Debug)]
pub(crate) struct Room {
    /// Plugins that fit.
    plugins: u64,
    /// Plugins for which there may be a supervisor, running or not.
    known: u64,
    /// Connections of clients that fit.
    clients: u64,
    limit: Limit,
    /// Open files that this process was started with, and the most it may have; none is no limit.
    files: [Option<u64>; 2],
    taken: Arc<AtomicUsize>,
}

/// What leaves the least room.
#[derive(Debug, Clone, Copy)]
enum Limit {
    Files(u64),
    Tasks(u64),
    Memory(u64),
    None,
}

/// A plugin's place in the room, given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Seat {
    taken: Arc<AtomicUsize>,
}

impl Room {
    /// Raises the limits as far as the system lets this process, and measures what they leave.
    ///
    /// # Errors
    /// A sentence, when the host itself does not fit.
    pub(crate) fn measure() -> Result<Self, String> {
        let started_with = getrlimit(Resource::Nofile).current;
        let files = raised(Resource::Nofile, "open files");
        // The limit of the user's tasks is not for root, that of the control group is.
        let user = if geteuid().is_root() { None } else { raised(Resource::Nproc, "threads and processes") };
        let tasks = [user, group_limit()].into_iter().flatten().min();
        // Half of what is not the host's own is for plugins, and half for clients.
        let of_files = files.map_or(u64::MAX, |files| files.saturating_sub(HOST_FILES) / 2 / PLUGIN_FILES);
        let free = tasks.map(|tasks| tasks.saturating_sub(HOST_TASKS));
        let of_tasks = free.map_or(u64::MAX, |free| free * RUNNING_QUARTERS / 4 / PLUGIN_TASKS);
        let memory = getrlimit(Resource::As).current;
        if let Some(memory) = memory.filter(|memory| *memory < HOST_MEMORY) {
            let (has, needs) = (memory >> 20, HOST_MEMORY >> 20);
            return Err(format!(
                "the address space is limited to {has} MiB, and the host needs {needs}, most of it unused: {MORE_MEMORY}"
            ));
        }
        let of_memory = memory.map_or(u64::MAX, |memory| (memory - HOST_MEMORY) / PLUGIN_MEMORY);
        let limits =
            [(of_files, files.map(Limit::Files)), (of_tasks, tasks.map(Limit::Tasks)), (of_memory, memory.map(Limit::Memory))];
        let (plugins, limit) = limits.into_iter().min_by_key(|(plugins, _)| *plugins).unwrap_or((u64::MAX, None));
        let limit = limit.unwrap_or(Limit::None);
        let clients = files.map_or(u64::MAX, |files| files.saturating_sub(HOST_FILES) / 2 / CLIENT_FILES);
        let known = free.map_or(u64::MAX, |free| plugins.saturating_add(free / 4));
        Ok(Self { plugins, known, clients, limit, files: [started_with, files], taken: Arc::default() })
    }

    /// A sentence about a room that is small.
    pub(crate) fn warning(&self) -> Option<String> {
        let few = self.plugins < FEW_PLUGINS;
        few.then(|| {
            format!(
                "{}, which is room for {} plugins and some {} clients: {}",
                self.limit,
                self.plugins,
                self.clients,
                self.limit.more()
            )
        })
    }

    /// Open files of a plugin unless the operator has set another number: what the host itself was started with. None is no limit.
    pub(crate) fn plugin_files(&self) -> Option<u64> {
        self.files[0]
    }

    /// Most open files that a plugin can have; none is no limit.
    pub(crate) fn most_files(&self) -> Option<u64> {
        self.files[1]
    }

    /// How many connections of clients there is room for, of so many.
    pub(crate) fn connections(&self, wanted: u32) -> u32 {
        wanted.min(u32::try_from(self.clients).unwrap_or(u32::MAX).max(1))
    }

    /// Whether there may be one more plugin beside so many, running or not.
    ///
    /// # Errors
    /// A sentence that names the limit and how to raise it.
    pub(crate) fn check(&self, known: usize) -> Result<(), String> {
        if (known as u64) < self.known {
            return Ok(());
        }
        Err(format!(
            "no room: no more than {} plugins can be looked after, since {}: {}",
            self.known,
            self.limit,
            self.limit.more()
        ))
    }

    /// Takes a place for a plugin.
    ///
    /// # Errors
    /// A sentence that names the limit and how to raise it.
    pub(crate) fn enter(&self) -> Result<Seat, String> {
        let taken = self.taken.fetch_add(1, Ordering::Relaxed);
        // Given back at once when there is none.
        let seat = Seat { taken: Arc::clone(&self.taken) };
        if (taken as u64) < self.plugins {
            return Ok(seat);
        }
        Err(format!("no room: {taken} plugins run, and no more fit, since {}: {}", self.limit, self.limit.more()))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.taken.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Limit {
    fn more(self) -> &'static str {
        match self {
            Self::Files(_) => MORE_FILES,
            Self::Tasks(_) => MORE_TASKS,
            Self::Memory(_) => MORE_MEMORY,
            Self::None => "",
        }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Files(files) => write!(f, "open files are limited to {files}"),
            Self::Tasks(tasks) => write!(f, "threads and processes are limited to {tasks}"),
            Self::Memory(bytes) => write!(f, "the address space is limited to {} MiB", bytes >> 20),
            Self::None => f.write_str("nothing is limited"),
        }
    }
}

/// Raises a limit to the most this process may have, and gives it; none is no limit.
fn raised(resource: Resource, name: &str) -> Option<u64> {
    let limit = getrlimit(resource);
    match setrlimit(resource, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        Ok(()) => limit.maximum,
        Err(error) => {
            log::warn!("the limit of {name} cannot be raised: {error}");
            limit.current
        }
    }
}

/// The limit of tasks of this process's control group, in either version of these; none where it has none, or cannot be read.
fn group_limit() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let limits = groups.lines().filter_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        let root = match controllers {
            "" => "/sys/fs/cgroup",
            _ if controllers.split(',').any(|name| name == "pids") => "/sys/fs/cgroup/pids",
            _ => return None,
        };
        // Inside of a container its own group is the root of what can be seen.
        let own = [format!("{root}{path}/pids.max"), format!("{root}/pids.max")];
        own.iter().find_map(|file| fs::read_to_string(file).ok())?.trim().parse().ok()
    });
    limits.min()
}

/// A file that takes a place and nothing else, not even a name: an empty root has none to open.
pub(crate) fn spare_file() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC)?)
}

/// Whether there are so many more threads to be had.
///
/// # Errors
/// There are not.
pub(crate) fn spare_threads(count: usize) -> io::Result<()> {
    let (end, ended) = bounded::<()>(0);
    // They are there at once, and end with the channel.
    let wait = |ended: Receiver<()>| move || ended.recv().unwrap_or_default();
    let spawned: Vec<_> = (0..count).map(|_| small_thread("spare").spawn(wait(ended.clone()))).collect();
    drop(end);
    // Gone before others are to take their place.
    let outcomes = spawned.into_iter().map(|spawned| spawned.map(|thread| thread.join().unwrap_or_default()));
    outcomes.fold(Ok(()), io::Result::and)
}

/// A sentence about what failed by an error, and whether that was for want of room, in which case the sentence says what to raise.
pub(crate) fn explain(what: &str, error: &io::Error) -> (String, bool) {
    use rustix::io::Errno;
    let more = match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::MFILE) => format!("the limit of open files of the host is reached: {MORE_FILES}"),
        Some(Errno::NFILE) => "the limit of open files of the whole system is reached: raise it with sysctl fs.file-max".into(),
        Some(Errno::AGAIN) => {
            format!("the limit of threads and processes is reached: {MORE_TASKS}, or that of memory with ulimit -v")
        }
        Some(Errno::NOMEM) => {
            "there is no memory left: raise the limit with ulimit -v, MemoryMax= of a systemd unit, or the container's limit"
                .into()
        }
        _ => return (format!("{what}: {error}"), false),
    };
    (format!("{what}, {more}"), true)
}
