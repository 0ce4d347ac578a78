//! Disk space held for the database, so that deletes work on a full disk.
//!
//! - **Blocks for the database file** are allocated before the commit of a transaction that grows it. So a checkpoint never needs
//!   space, and the log can always restart.
//! - **Blocks for the log** are allocated as soon as it is empty. So changes that do not grow the database fit, such as a delete, or a
//!   write to pages that a delete freed.
//! - **The reserve** is released for deletes that need more.
//!
//! On a copy-on-write file system, overwriting needs new blocks despite the preallocation; there only the reserve helps.

use super::{StoreError, wal};
use crate::system::data_dir::Reserve;
use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate, open, statvfs};
use rustix::io::{Errno, retry_on_intr};
use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes allocated ahead for a growing database, so that not every commit has to allocate.
const STEP: u64 = 256 * 1024;

/// Bytes held for the log: enough for some fifty deletes in one transaction, or for a set of a medium value.
const LOG: u64 = 1024 * 1024;

/// Fewest bytes held for the log on a small disk: enough for a few deletes.
const MIN_LOG: u64 = 64 * 1024;

/// Largest fraction of the disk that is held for the log: 1/32.
const LOG_SHARE: u64 = 32;

/// The disk space held for a database.
pub(super) struct Space {
    /// Closed after all connections, because closing it releases this process's POSIX locks on the file.
    database: Arc<File>,
    log: PathBuf,
    log_bytes: u64,
    reserve: Reserve,
    /// Bytes of the database file that have allocated blocks.
    claimed: u64,
}

impl Space {
    /// For the database at `path`, open as `database`.
    pub(super) fn new(path: &Path, database: Arc<File>) -> Self {
        let directory = path.parent().filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let log_bytes = match statvfs(directory) {
            Ok(disk) => (disk.f_blocks.saturating_mul(disk.f_frsize) / LOG_SHARE).clamp(MIN_LOG, LOG),
            Err(_) => MIN_LOG,
        };
        Self { database, log: wal::path(path), log_bytes, reserve: Reserve::in_directory(directory), claimed: 0 }
    }

    /// Allocates blocks for a database of `bytes`.
    ///
    /// # Errors
    /// There is no space for them.
    pub(super) fn claim(&mut self, bytes: u64) -> Result<(), StoreError> {
        if bytes <= self.claimed {
            return Ok(());
        }
        let ahead = bytes.next_multiple_of(STEP);
        self.claimed = match hold(&self.database, ahead) {
            Ok(()) => ahead,
            Err(Errno::NOSPC | Errno::DQUOT) => match hold(&self.database, bytes) {
                Err(Errno::NOSPC | Errno::DQUOT) => return Err(StoreError::Full),
                _ => bytes,
            },
            // The file system does not support it.
            Err(_) => u64::MAX,
        };
        Ok(())
    }

    /// Records a checkpoint, which truncates the database file and so releases blocks beyond its end.
    pub(super) fn checkpointed(&mut self) {
        self.claimed = self.database.metadata().map_or(0, |file| file.len());
    }

    /// Allocates blocks for the empty log; fewer if the disk has fewer.
    pub(super) fn hold_log(&self) {
        let Ok(log) = open(&self.log, OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()) else { return };
        let mut bytes = self.log_bytes;
        while bytes >= MIN_LOG / 4 && matches!(hold(&log, bytes), Err(Errno::NOSPC | Errno::DQUOT)) {
            bytes /= 2;
        }
    }

    /// Releases the reserve, for the log.
    pub(super) fn release(&self) {
        self.reserve.release();
    }

    /// Refills the reserve, as far as there is space.
    pub(super) fn refill(&self) {
        self.reserve.keep();
    }
}

/// Allocates blocks for the first bytes of a file without changing its size.
fn hold(file: impl AsFd, bytes: u64) -> Result<(), Errno> {
    retry_on_intr(|| fallocate(&file, FallocateFlags::KEEP_SIZE, 0, bytes))
}
