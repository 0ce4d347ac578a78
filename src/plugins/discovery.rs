//! Scans the plugins directory, and reads each file's metadata by running it with `--metadata`.

use crate::apps::manifest::{self, Manifest};
use crate::lock::{LockExt, unpoisoned};
use crate::process::preflight;
use crate::process::{self, Bounds};
use crate::protocol::metadata::{MAX_METADATA, Metadata};
use crate::system::rlimits;
use crate::util::escape;
use crate::util::threads::small_thread;
use std::collections::{BTreeSet, VecDeque};
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::num::NonZero;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

/// Time for which a `--metadata` call counts as busy. A longer one probably waits for something, so the next call may begin.
const BUSY_TIME: Duration = Duration::from_secs(2);

/// Additional parallel calls beyond the number of processors, while calls take longer than [`BUSY_TIME`].
const OVERDUE: usize = 8;

/// First backoff after a failed call.
const FIRST_RETRY: Duration = Duration::from_secs(1);

/// Longest backoff: each try costs a process, and a disk that is mounted late should be noticed soon.
const MAX_RETRY: Duration = Duration::from_secs(60);

/// Most names in the plugins directory. More indicate a mistake, such as a home directory, and each costs a system call, a line in the
/// list and a few hundred bytes of memory.
const MAX_NAMES: usize = 10_000;

/// Most files beside a plugin's program whose modification time is checked.
const MAX_BESIDE: usize = 1000;

/// Name of the executable in a directory plugin.
const PROGRAM: &str = "plugin";

/// An entry of the plugins directory.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    /// The name in the directory.
    pub(crate) file: String,
    /// The path of the executable, or of the manifest.
    pub(crate) program: PathBuf,
    /// The fingerprint, which changes if the file is replaced; none if the file cannot be examined.
    pub(crate) fingerprint: Option<Fingerprint>,
    /// What the manifest says, or what is wrong with it, if there is one.
    pub(crate) manifest: Option<Result<Arc<Manifest>, String>>,
}

impl Found {
    /// Checks that its name is the name in the directory, and not an escaped form of it.
    ///
    /// # Errors
    /// The name is not UTF-8: API, command line and database could not tell such names apart.
    pub(crate) fn check_name(&self) -> Result<(), Refusal> {
        let path = if self.program.ends_with(&self.file) { Some(self.program.as_path()) } else { self.program.parent() };
        if path.is_some_and(|path| path.ends_with(&self.file)) {
            return Ok(());
        }
        Err(Refusal::lasting("its name in the plugins directory is not UTF-8: rename it (mv), then run plugrack rescan"))
    }

    /// Text that identifies everything a `--metadata` answer depends on: the program and, in a directory, the files beside it.
    pub(crate) fn answer_key(&self) -> Option<String> {
        let fingerprint = self.fingerprint?;
        let beside = self.program.ends_with(PROGRAM).then(|| last_change(&self.program)).flatten().unwrap_or_default();
        Some(format!("{} {}.{}", fingerprint.text(), beside.0, beside.1))
    }
}

/// Identifies a file's content: a replaced file differs in some of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fingerprint {
    device: u64,
    inode: u64,
    size: u64,
    mode: u32,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Fingerprint {
    /// As text. The part before the `/` survives a rename.
    fn text(&self) -> String {
        let Self { device, inode, size, mode, modified, changed } = self;
        format!("{device}:{inode}:{size}:{mode:o}:{}.{}/{}.{}", modified.0, modified.1, changed.0, changed.1)
    }

    /// Whether a text of [`Found::answer_key`] identifies this file, under whatever name.
    pub(crate) fn is_file_of(&self, answer_key: &str) -> bool {
        self.text().split_once('/').map(|(file, _)| file) == answer_key.split_once('/').map(|(file, _)| file)
    }
}

/// Why a file is refused.
#[derive(Debug)]
pub(crate) struct Refusal {
    /// The reason, one sentence.
    pub(crate) reason: String,
    /// Whether the file may be accepted later without a change.
    pub(crate) outlook: Outlook,
    /// The output of its `--metadata` call.
    pub(crate) printed: Vec<String>,
}

/// How long a refusal lasts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outlook {
    /// Until the file changes, or a conflicting file is gone.
    Lasting,
    /// The file cannot be executed. That may change when its interpreter is installed, so the host retries.
    Unfit,
    /// The `--metadata` call failed, so the host retries.
    Failing,
}

impl Refusal {
    /// A refusal that lasts until the file changes.
    pub(crate) fn lasting(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), outlook: Outlook::Lasting, printed: Vec::new() }
    }

    /// A refusal that may pass by itself.
    pub(crate) fn passing(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), outlook: Outlook::Failing, printed: Vec::new() }
    }
}

/// Backoff after this many consecutive failures. `random` is uniform in 0–1.
pub(crate) fn retry_after(failures: u32, random: f64) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    // ±20 %, so that files that failed together are not all retried together.
    (FIRST_RETRY * 2u32.pow(doublings)).min(MAX_RETRY).mul_f64(0.8 + 0.4 * random)
}

/// Lists the plugins directory by name. Ignores names that start with a dot.
///
/// # Errors
/// It cannot be read, or has more names than [`MAX_NAMES`]. A partial list would stop the plugins that are not in it.
pub(crate) fn list(dir: &Path) -> io::Result<Vec<Found>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        if name.as_encoded_bytes().starts_with(b".") {
            continue;
        }
        if names.len() == MAX_NAMES {
            let many = format!(
                "it has more than {MAX_NAMES} names: move files that are not plugins elsewhere, or choose another directory with --plugins"
            );
            return Err(io::Error::other(many));
        }
        names.push(name);
    }
    names.sort();
    let (mut found, mut others) = (Vec::new(), Vec::new());
    for name in names {
        match name.to_str() {
            Some(file) => found.push(inspect(dir, file)),
            None => others.push(name),
        }
    }
    let mut taken: BTreeSet<String> =
        if others.is_empty() { BTreeSet::new() } else { found.iter().map(|found| found.file.clone()).collect() };
    for name in others {
        let file = escaped(&name, &taken);
        taken.insert(file.clone());
        let program = program(dir.join(name));
        found.push(examine(file, program));
    }
    found.sort_by(|a, b| a.file.cmp(&b.file));
    Ok(found)
}

/// A name that is not UTF-8 as text that no other name in the directory has.
fn escaped(name: &OsStr, taken: &BTreeSet<String>) -> String {
    let mut file = String::new();
    escape::escape(&mut file, name.as_encoded_bytes());
    while taken.contains(&file) {
        file.push('?');
    }
    file
}

/// Examines the entry of this name in the plugins directory.
pub(crate) fn inspect(dir: &Path, file: &str) -> Found {
    examine(file.to_owned(), program(dir.join(file)))
}

/// Examines the executable or manifest at a path.
fn examine(file: String, program: PathBuf) -> Found {
    // Before the manifest is read: if it changes meanwhile, the next scan sees that.
    let fingerprint = fingerprint(&program);
    let manifest = program.ends_with(manifest::FILE).then(|| manifest::read(&program).map(Arc::new));
    Found { file, program, fingerprint, manifest }
}

/// The executable of the plugin at a path, or its manifest, which takes precedence.
fn program(path: PathBuf) -> PathBuf {
    if !path.is_dir() {
        return path;
    }
    let manifest = path.join(manifest::FILE);
    if manifest.symlink_metadata().is_ok() { manifest } else { path.join(PROGRAM) }
}

/// The fingerprint of the file at a path; none if it cannot be examined.
pub(crate) fn fingerprint(program: &Path) -> Option<Fingerprint> {
    let metadata = fs::metadata(program).ok()?;
    Some(Fingerprint {
        device: metadata.dev(),
        inode: metadata.ino(),
        size: metadata.size(),
        mode: metadata.mode(),
        modified: (metadata.mtime(), metadata.mtime_nsec()),
        changed: (metadata.ctime(), metadata.ctime_nsec()),
    })
}

/// Latest modification time of the files beside a program, such as its modules and files its metadata may come from.
fn last_change(program: &Path) -> Option<(i64, i64)> {
    let files = fs::read_dir(program.parent()?).ok()?.flatten().take(MAX_BESIDE);
    let files = files.filter(|entry| !entry.file_name().as_encoded_bytes().starts_with(b"."));
    let metadata = files.filter_map(|entry| entry.metadata().ok()).filter(fs::Metadata::is_file);
    metadata.map(|metadata| (metadata.ctime(), metadata.ctime_nsec())).max()
}

/// Runs `--metadata` calls on its own threads: as many in parallel as there are processors, and a few more while calls are slow.
pub(crate) struct MetadataCalls {
    queue: Arc<(Mutex<CallQueue>, Condvar)>,
    at_once: usize,
}

type Call = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct CallQueue {
    waiting: VecDeque<Call>,
    /// Start time of each call under way, by number.
    under_way: Vec<(u64, Instant)>,
    next: u64,
    threads: usize,
}

impl MetadataCalls {
    pub(crate) fn new() -> Self {
        Self { queue: Arc::default(), at_once: available_parallelism().map_or(1, NonZero::get) }
    }

    /// Runs a call and its follow-up on another thread; on this one if no thread can be created.
    pub(crate) fn run(&self, call: Call) {
        let mut queue = self.queue.0.locked();
        queue.waiting.push_back(call);
        if queue.threads < self.at_once + OVERDUE {
            let (shared, at_once) = (Arc::clone(&self.queue), self.at_once);
            let spawned = small_thread("discovery").stack_size(STACK).spawn(move || work(&shared, at_once));
            queue.threads += usize::from(spawned.is_ok());
        }
        if queue.threads == 0 {
            let call = queue.waiting.pop_back();
            drop(queue);
            call.into_iter().for_each(|call| call());
        }
    }
}

/// Stack size in bytes of a thread that runs calls and processes answers.
const STACK: usize = 512 * 1024;

/// Runs calls until none is queued.
fn work((queue, done): &(Mutex<CallQueue>, Condvar), at_once: usize) {
    let mut state = queue.locked();
    while !state.waiting.is_empty() {
        let busy = |state: &CallQueue| state.under_way.iter().filter(|(_, began)| began.elapsed() < BUSY_TIME).count();
        if busy(&state) >= at_once {
            state = unpoisoned(done.wait_timeout(state, BUSY_TIME / 10)).0;
            continue;
        }
        let Some(call) = state.waiting.pop_front() else { break };
        let number = state.next;
        state.next += 1;
        state.under_way.push((number, Instant::now()));
        drop(state);
        // The panic hook logs a panic; the other calls still run.
        drop(std::panic::catch_unwind(std::panic::AssertUnwindSafe(call)));
        state = queue.locked();
        state.under_way.retain(|(under_way, _)| *under_way != number);
        done.notify_all();
    }
    state.threads -= 1;
}

/// Runs a file with `--metadata`, for `time` at most.
pub(crate) fn read_metadata(found: &Found, bounds: &Bounds, time: Duration) -> Result<Metadata, Refusal> {
    if found.program.ends_with(PROGRAM) && !found.program.exists() && !found.program.is_symlink() {
        return Err(Refusal::lasting(format!(
            "the directory has neither an executable file named {PROGRAM} nor a {} inside",
            manifest::FILE
        )));
    }
    preflight::check(&found.program).map_err(Refusal::lasting)?;
    let output = process::output(&found.program, "--metadata", bounds, time, MAX_METADATA)
        .map_err(|error| Refusal::passing(rlimits::explain("cannot start it", &error).0))?;
    let printed = match output {
        Ok(printed) => printed,
        Err(failed) => {
            let outlook = if failed.is_unfit { Outlook::Unfit } else { Outlook::Failing };
            return Err(Refusal { reason: failed.reason, outlook, printed: failed.printed });
        }
    };
    if fingerprint(&found.program) != found.fingerprint {
        return Err(Refusal::passing("its file was replaced during its --metadata call"));
    }
    Metadata::parse(&printed)
        .map_err(|error| Refusal { printed: process::lines(&printed), ..Refusal::lasting(error.to_string()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_file_is_retried_with_exponential_backoff() {
        let pauses: Vec<_> = [1, 2, 3, 4, 5, 6, 7, 8, 100].map(|failures| retry_after(failures, 0.5).as_secs()).into();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        assert_eq!([0.0, 1.0].map(|random| retry_after(1, random).as_millis()), [800, 1200]);
    }

    #[test]
    fn a_file_is_the_same_under_another_name_and_another_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str| fs::write(dir.path().join(name), "#!/bin/sh\n").unwrap();
        write("a");
        write("b");
        let before = inspect(dir.path(), "a").answer_key().unwrap();
        fs::rename(dir.path().join("a"), dir.path().join("c")).unwrap();
        let is_it = |name: &str| inspect(dir.path(), name).fingerprint.unwrap().is_file_of(&before);
        assert!(is_it("c") && !is_it("b"));
    }

    #[test]
    fn files_beside_a_program_are_part_of_its_answer_key() {
        let dir = tempfile::tempdir().unwrap();
        let plugin = dir.path().join("p");
        fs::create_dir(&plugin).unwrap();
        fs::write(plugin.join(PROGRAM), "#!/bin/sh\n").unwrap();
        let (before, program) = (inspect(dir.path(), "p").answer_key(), inspect(dir.path(), "p").fingerprint);
        // The clock of a file system advances in steps of some milliseconds.
        let deadline = Instant::now() + Duration::from_secs(30);
        while inspect(dir.path(), "p").answer_key() == before {
            assert!(Instant::now() < deadline);
            fs::write(plugin.join("module.py"), "VERSION = '2'").unwrap();
        }
        assert_eq!(inspect(dir.path(), "p").fingerprint, program);
    }

    #[test]
    fn slow_calls_do_not_hold_up_the_others() {
        let calls = MetadataCalls::new();
        let (end, ended) = crossbeam_channel::bounded::<()>(0);
        let (tell, told) = crossbeam_channel::unbounded();
        for _ in 0..calls.at_once + 2 {
            let ended = ended.clone();
            calls.run(Box::new(move || {
                ended.recv().ok();
            }));
        }
        for number in 0..3 {
            let tell = tell.clone();
            calls.run(Box::new(move || tell.send(number).unwrap()));
        }
        let answers: Vec<i32> = (0..3).map(|_| told.recv_timeout(Duration::from_secs(60)).unwrap()).collect();
        assert_eq!(answers.len(), 3);
        drop(end);
    }
}
