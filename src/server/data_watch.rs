//! Checks that the running host's files are still in place: the database, the lock, the run directory. The log says within seconds if
//! one of them was removed or replaced.

use crate::store::Store;
use crate::system::data_dir::{DataDir, Held, Lock};
use crate::util::log_throttle::{LogThrottle, suppressed_note};
use crate::util::threads;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Interval of the checks: a handful of system calls that read no disk.
const EVERY: Duration = Duration::from_secs(2);

/// The thread that checks. It holds the lock of the data directory.
pub(crate) struct Watch {
    stop: Sender<()>,
    thread: JoinHandle<Option<Lock>>,
}

impl Watch {
    /// Starts the checks, once the database is open and the host listens. The receiver gets one sentence when the host must end.
    ///
    /// # Errors
    /// The thread cannot be created.
    pub(crate) fn start(data: &DataDir, store: Store, lock: Lock) -> io::Result<(Self, Receiver<String>)> {
        let (stop, stopped) = bounded(0);
        let (sender, must_end) = bounded(1);
        let run = [data.run(), data.host_socket(), data.api_socket()];
        let run: Vec<_> = run.into_iter().filter_map(|path| Some((node(&path)?, path))).collect();
        let data = data.clone();
        let thread = std::thread::Builder::new().name("watch".into());
        // It holds the lock of the data directory, which a panic gives up.
        let thread = threads::vital(thread, move || watch(&data, &store, lock, &run, &stopped, &sender))?;
        Ok((Self { stop, thread }, must_end))
    }

    /// Stops the checks and returns the lock; none if another host has it.
    pub(crate) fn end(self) -> Option<Lock> {
        drop(self.stop);
        self.thread.join().ok().flatten()
    }
}

/// Identifies a file regardless of its path: device and inode.
type Node = (u64, u64);

fn node(path: &Path) -> Option<Node> {
    fs::symlink_metadata(path).ok().map(|file| (file.dev(), file.ino()))
}

/// Restores `run-dir` if it was removed or changed. Describes the other host if one has written its own directory there: without locks
/// on the file system, two hosts that start at the same time may not see each other.
fn keep_announced(data: &DataDir) -> anyhow::Result<Option<String>> {
    if data.is_announced()? {
        return Ok(None);
    }
    if let Some(other) = data.other_host()? {
        return Ok(Some(other));
    }
    data.announce()?;
    log::warn!("run-dir in the data directory was removed or changed while the host runs, and was restored");
    Ok(None)
}

fn watch(
    data: &DataDir,
    store: &Store,
    mut lock: Lock,
    run: &[(Node, PathBuf)],
    stopped: &Receiver<()>,
    must_end: &Sender<String>,
) -> Option<Lock> {
    let (mut no_lock, mut no_name, mut no_run) = (LogThrottle::default(), LogThrottle::default(), LogThrottle::default());
    while stopped.recv_timeout(EVERY) == Err(RecvTimeoutError::Timeout) {
        store.check_files();
        for file in lock.files() {
            let held = file.keep();
            let path = file.path().display();
            match held {
                Ok(Held::Still) => {}
                Ok(Held::Again) => log::warn!("{path} was removed or replaced while the host runs; the new file is locked"),
                Ok(Held::ByAnother) => {
                    let sentence = format!(
                        "{path} was removed or replaced while the host ran, and another plugrack has locked it: this host ends"
                    );
                    must_end.try_send(sentence).ok();
                    return None;
                }
                Err(error) => {
                    if let Some(suppressed) = no_lock.hit(Instant::now()) {
                        log::error!("{path} cannot be locked again: {error}{}", suppressed_note(suppressed));
                    }
                }
            }
        }
        match keep_announced(data) {
            Ok(None) => {}
            Ok(Some(other)) => {
                must_end.try_send(format!("{other}: this host ends")).ok();
                return None;
            }
            Err(error) => {
                if let Some(suppressed) = no_name.hit(Instant::now()) {
                    log::error!("commands may not find the host: {error:#}{}", suppressed_note(suppressed));
                }
            }
        }
        match run.iter().find(|(opened, path)| node(path) != Some(*opened)) {
            Some((_, path)) => {
                if let Some(suppressed) = no_run.hit(Instant::now()) {
                    log::error!(
                        "{} was removed or replaced while the host runs, so commands or plugin calls fail: restart the host{}",
                        path.display(),
                        suppressed_note(suppressed)
                    );
                }
            }
            None => {
                if no_run.clear().is_some() {
                    log::info!("{} is complete again", data.run().display());
                }
            }
        }
    }
    Some(lock)
}
