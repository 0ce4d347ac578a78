//! Resource limits of this process: open files, threads and memory, the number of plugins and clients that they allow, and how to raise
//! them.
//!
//! A host without a free file or thread could answer nobody, so it runs only as many plugins as leave some to its clients.

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

/// Files that the host itself needs: about 16 at rest (listeners, the database and its readers, signals), and as many during `--metadata`
/// calls.
const HOST_FILES: u64 = 48;

/// Files of a plugin: its log, its output, and two connections.
const PLUGIN_FILES: u64 = 4;

/// Files of a client connection: its socket, and a temporary file for a body that does not fit in memory.
const CLIENT_FILES: u64 = 2;

/// Threads and processes that the host itself needs: 20 at rest, and those of `--metadata` calls.
const HOST_TASKS: u64 = 64;

/// Threads and processes of a plugin: its supervisor, three that wait (for output, exit and requests), and a few of its own.
const PLUGIN_TASKS: u64 = 8;

/// Address space that the host itself needs, in bytes. With glibc nearly all of it is reserved, unused, by the allocator for each of about
/// 16 threads (951 MiB were measured); otherwise it is stacks.
const HOST_MEMORY: u64 = if cfg!(target_env = "gnu") { 1280 << 20 } else { 192 << 20 };

/// Address space of a plugin in bytes: the stacks of its four threads, and the memory that they use.
const PLUGIN_MEMORY: u64 = 2 << 20;

/// Share of the tasks, in quarters, for running plugins. The rest is for the supervisors of plugins that wait for capacity.
const RUNNING_QUARTERS: u64 = 3;

/// The host warns at its start if it can run fewer plugins than this: a small installation has tens of them.
const FEW_PLUGINS: u64 = 100;

/// Interval at which a plugin that waits for capacity is retried: short for an operator, and long enough that hundreds of waiting plugins
/// cost nothing.
pub(crate) const CAPACITY_RETRY: Duration = Duration::from_secs(5);

/// How to raise the limit of open files.
const MORE_FILES: &str = "raise it with ulimit -n, or LimitNOFILE= of a systemd unit";

/// How to raise the limit of threads and processes.
const MORE_TASKS: &str = "raise it with ulimit -u, TasksMax= of a systemd unit, or the container's limit of pids";

/// How to raise the limit of the address space.
const MORE_MEMORY: &str =
    "raise it with ulimit -v, and limit memory by MemoryMax= of a systemd unit or the container's limit instead";

/// The capacity of this process.
#[derive(Debug)]
pub(crate) struct Capacity {
    /// Most plugins that run.
    plugins: u64,
    /// Most plugins with a supervisor, running or not.
    known: u64,
    /// Most client connections.
    clients: u64,
    limit: Limit,
    /// The limit of open files that this process was started with, and the highest that it may have; none is no limit.
    files: [Option<u64>; 2],
    taken: Arc<AtomicUsize>,
}

/// The limit that bounds the capacity.
#[derive(Debug, Clone, Copy)]
enum Limit {
    Files(u64),
    Tasks(u64),
    Memory(u64),
    None,
}

/// A running plugin's share of the capacity, released when dropped.
#[derive(Debug)]
pub(crate) struct PluginSlot {
    taken: Arc<AtomicUsize>,
}

impl Capacity {
    /// Raises the limits as far as this process may, and derives the capacity from them.
    ///
    /// # Errors
    /// One sentence: the limits do not suffice for the host itself.
    pub(crate) fn measure() -> Result<Self, String> {
        let started_with = getrlimit(Resource::Nofile).current;
        let files = raised(Resource::Nofile, "open files");
        // Root is exempt from the user's limit of tasks, but not from the control group's.
        let user = if geteuid().is_root() { None } else { raised(Resource::Nproc, "threads and processes") };
        let tasks = [user, group_limit()].into_iter().flatten().min();
        // Half of the files beyond the host's own is for plugins, and half for clients.
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

    /// One sentence if the capacity is small.
    pub(crate) fn warning(&self) -> Option<String> {
        let few = self.plugins < FEW_PLUGINS;
        few.then(|| {
            format!(
                "{}, which allows {} plugins and about {} clients: {}",
                self.limit,
                self.plugins,
                self.clients,
                self.limit.more()
            )
        })
    }

    /// Default limit of open files of a plugin: the one that the host was started with. None is no limit.
    pub(crate) fn plugin_files(&self) -> Option<u64> {
        self.files[0]
    }

    /// Highest limit of open files that a plugin can have; none is no limit.
    pub(crate) fn most_files(&self) -> Option<u64> {
        self.files[1]
    }

    /// The number of client connections to allow if `wanted` are configured.
    pub(crate) fn connections(&self, wanted: u32) -> u32 {
        wanted.min(u32::try_from(self.clients).unwrap_or(u32::MAX).max(1))
    }

    /// Checks that one more plugin can be supervised beside `known`, running or not.
    ///
    /// # Errors
    /// One sentence that names the limit and how to raise it.
    pub(crate) fn check(&self, known: usize) -> Result<(), String> {
        if (known as u64) < self.known {
            return Ok(());
        }
        Err(format!("no capacity: at most {} plugins can be supervised, since {}: {}", self.known, self.limit, self.limit.more()))
    }

    /// Takes a slot for a plugin to run.
    ///
    /// # Errors
    /// One sentence that names the limit and how to raise it.
    pub(crate) fn enter(&self) -> Result<PluginSlot, String> {
        let taken = self.taken.fetch_add(1, Ordering::Relaxed);
        // Dropped below if there is no capacity.
        let slot = PluginSlot { taken: Arc::clone(&self.taken) };
        if (taken as u64) < self.plugins {
            return Ok(slot);
        }
        Err(format!("no capacity: {taken} plugins run, which is the most, since {}: {}", self.limit, self.limit.more()))
    }
}

impl Drop for PluginSlot {
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

/// Raises a limit as far as this process may, and returns it; none is no limit.
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

/// The limit of tasks of this process's control group (v1 or v2); none if there is none, or it cannot be read.
fn group_limit() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let limits = groups.lines().filter_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        let root = match controllers {
            "" => "/sys/fs/cgroup",
            _ if controllers.split(',').any(|name| name == "pids") => "/sys/fs/cgroup/pids",
            _ => return None,
        };
        // Inside a container, its own group is the root of the visible tree.
        let own = [format!("{root}{path}/pids.max"), format!("{root}/pids.max")];
        own.iter().find_map(|file| fs::read_to_string(file).ok())?.trim().parse().ok()
    });
    limits.min()
}

/// A file descriptor to hold in reserve. An eventfd, because it needs no file system: an empty root has no file to open.
pub(crate) fn spare_file() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC)?)
}

/// Checks that `count` more threads can be started.
///
/// # Errors
/// They cannot.
pub(crate) fn spare_threads(count: usize) -> io::Result<()> {
    let (end, ended) = bounded::<()>(0);
    // All exist at the same time, and end when the channel closes.
    let wait = |ended: Receiver<()>| move || ended.recv().unwrap_or_default();
    let spawned: Vec<_> = (0..count).map(|_| small_thread("spare").spawn(wait(ended.clone()))).collect();
    drop(end);
    // Joined, so that their slots are free when this returns.
    let outcomes = spawned.into_iter().map(|spawned| spawned.map(|thread| thread.join().unwrap_or_default()));
    outcomes.fold(Ok(()), io::Result::and)
}

/// One sentence about a failure, and whether a resource limit caused it, in which case the sentence says what to raise.
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
