//! Space on the disk that is held for the database, so that one that is full is no dead end.
//!
//! - **Blocks for the database file** are allocated before a transaction that lets it grow is committed. So writing the log back
//!   never needs space, and the log can always begin again.
//! - **Blocks for the log** are allocated as soon as it was emptied. So what lets the database not grow, such as a delete, or a write
//!   to pages that a delete has freed, fits there.
//! - **The reserve** is given back for deletes that need more.
//!
//! On a file system that copies on write, blocks that are allocated do not help to overwrite others: there only the reserve does.

use super::{StoreError, wal};
use crate::system::data_dir::Reserve;
use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate, open, statvfs};
use rustix::io::{Errno, retry_on_intr};
use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes allocated ahead of a database that grows, so that not every commit has to.
const STEP: u64 = 256 * 1024;

/// Bytes held for the log: some fifty deletes in one transaction, or a set of a value that is not the largest.
const LOG: u64 = 1024 * 1024;

/// Fewest bytes held for the log on a small disk: a few deletes.
const MIN_LOG: u64 = 64 * 1024;

/// The part of the whole disk that is held for the log at most.
const LOG_SHARE: u64 = 32;

/// The space that is held for a database.
pub(super) struct Space {
    /// Closed after all connections, since closing it gives up the locks that this process has on the file.
    database: Arc<File>,
    log: PathBuf,
    log_bytes: u64,
    reserve: Reserve,
    /// Bytes of the database file that have blocks.
    claimed: u64,
}

impl Space {
    /// For the database at `path`, which is open as `database`.
    pub(super) fn new(path: &Path, database: Arc<File>) -> Self {
        let directory = path.parent().filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let log_bytes = match statvfs(directory) {
            Ok(disk) => (disk.f_blocks.saturating_mul(disk.f_frsize) / LOG_SHARE).clamp(MIN_LOG, LOG),
            Err(_) => MIN_LOG,
        };
        Self { database, log: wal::path(path), log_bytes, reserve: Reserve::in_directory(directory), claimed: 0 }
    }

    /// Allocates blocks for a database of so many bytes.
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
            // The file system cannot.
            Err(_) => u64::MAX,
        };
        Ok(())
    }

    /// Notes that SQLite has written the log back, and with that given back what was allocated beyond the end of the database.
    pub(super) fn checkpointed(&mut self) {
        self.claimed = self.database.metadata().map_or(0, |file| file.len());
    }

    /// Holds blocks for the log, which is empty; fewer where there are fewer.
    pub(super) fn hold_log(&self) {
        let Ok(log) = open(&self.log, OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()) else { return };
        let mut bytes = self.log_bytes;
        while bytes >= MIN_LOG / 4 && matches!(hold(&log, bytes), Err(Errno::NOSPC | Errno::DQUOT)) {
            bytes /= 2;
        }
    }

    /// Gives the reserve to the log.
    pub(super) fn release(&self) {
        self.reserve.release();
    }

    /// Fills the reserve again, as far as there is space.
    pub(super) fn refill(&self) {
        self.reserve.keep();
    }
}

/// Allocates the blocks of the first bytes of a file, and leaves its size as it is.
fn hold(file: impl AsFd, bytes: u64) -> Result<(), Errno> {
    retry_on_intr(|| fallocate(&file, FallocateFlags::KEEP_SIZE, 0, bytes))
}
