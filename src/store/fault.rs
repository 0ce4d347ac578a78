//! Store errors: one sentence for the operator, and a code for plugins.

use super::{MAX_LOG, READER_TIME, READERS, WRITE_QUEUE, schema};
use crate::lock::LockExt;
use crate::util::log_throttle::LogThrottle;
use rusqlite::ffi::{self, ErrorCode};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;
use uuid::Uuid;

/// An error of the store.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum StoreError {
    /// The database was written by a newer version of this program.
    #[error(
        "the database has schema version {found}, and this plugrack supports versions up to {}: install a newer plugrack",
        schema::VERSION
    )]
    Newer {
        /// The schema version of the database.
        found: i64,
    },
    /// A database of another program.
    #[error("the file is not a plugrack database")]
    Foreign,
    /// The file cannot be created or opened.
    #[error("{0}")]
    File(Arc<std::io::Error>),
    /// The instance id was changed by hand.
    #[error("the instance id in the database, {0:?}, is not a UUID")]
    BadInstanceId(String),
    /// SQLite would treat the empty file as a new database, and remove the log that holds all data.
    #[error(
        "plugrack.db is missing or empty, and its log plugrack.db-wal is not: restore both from a backup, \
         or move plugrack.db-wal away to start with an empty database"
    )]
    LeftLog,
    /// `instance-id` shows that there was a database.
    #[error(
        "plugrack.db is missing or empty, and according to instance-id beside it, it was the database of instance {named}: \
         restore all files of a backup, or remove instance-id to start as a new instance"
    )]
    Missing {
        /// The instance that `instance-id` names.
        named: Uuid,
    },
    /// The database has tables but no instance id, which was in the missing log.
    #[error(
        "plugrack.db has no instance id, most likely because it was copied without its log plugrack.db-wal: \
         restore all files of a backup, or remove plugrack.db and instance-id to start as a new instance"
    )]
    NoIdentity,
    /// A database of another installation.
    #[error(
        "plugrack.db is the database of instance {found}, and instance-id beside it names {named}: \
         restore both from the same backup, or remove instance-id to continue as {found}"
    )]
    OtherIdentity {
        /// The instance id in the database.
        found: Uuid,
        /// The instance id in the file.
        named: Uuid,
    },
    /// The file `instance-id` does not hold an instance id.
    #[error(
        "the file instance-id beside plugrack.db does not hold an instance id: remove it, and the next start writes it again"
    )]
    BadIdentityFile,
    /// The database is older than the one that the log was begun on, or the log is older.
    #[error(
        "plugrack.db and its log plugrack.db-wal do not belong together, most likely because one of them is an older copy: \
         restore both from the same backup, or move plugrack.db-wal away to continue with plugrack.db, without the changes in the log"
    )]
    OtherLog,
    /// An open file is no longer at its path.
    #[error(
        "plugrack.db{end} was removed or replaced while the host runs, so the host writes nothing: \
         put the same file back, or stop the host{} and start it again",
        if end.is_empty() { ", restore all files of a backup," } else { "" }
    )]
    Gone {
        /// The end of the file's name: empty, `-wal` or `-shm`.
        end: &'static str,
    },
    /// The queue of the writer is full.
    #[error("the store is busy: {WRITE_QUEUE} changes are waiting; try again")]
    Busy,
    /// All readers are in use, and none finishes in time.
    #[error("the store is busy: all {READERS} readers have been in use for {} s; try again", READER_TIME.as_secs())]
    BusyReading,
    /// Another program holds a lock.
    #[error(
        "another program has locked plugrack.db for more than {} s: end that program (fuser plugrack.db names it), then try again",
        schema::BUSY_TIMEOUT.as_secs()
    )]
    Locked,
    /// Another program's read prevents checkpoints.
    #[error(
        "plugrack.db-wal has grown to {} MiB because another program's read of plugrack.db does not end: \
         end that program (fuser plugrack.db names it), then try again",
        MAX_LOG / 1024 / 1024
    )]
    LongRead,
    /// No space left.
    #[error("the disk that plugrack.db is on is full: free space there, then try again")]
    Full,
    /// The disk fails, or its file system became read-only while the file was open.
    #[error(
        "the disk that plugrack.db is on fails ({0}): see the kernel log (dmesg), and check whether the file system is now read-only"
    )]
    Disk(Arc<rusqlite::Error>),
    /// The file is corrupt.
    #[error(
        "plugrack.db is damaged ({0}): stop the host, then restore a backup, \
         or save what can be read with: sqlite3 plugrack.db .recover | sqlite3 saved.db"
    )]
    Damaged(Arc<rusqlite::Error>),
    /// A fault of this program.
    #[error("a change to plugrack.db panicked, which is a fault of plugrack's: its log has the reason")]
    Panicked,
    /// The store is closing, or its writer has failed.
    #[error("the store is closed")]
    Closed,
    /// Any other error of SQLite.
    #[error("{0}")]
    Sqlite(Arc<rusqlite::Error>),
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        match &error {
            rusqlite::Error::SqliteFailure(failure, _) => match (failure.code, failure.extended_code) {
                // The file with the log's index (-shm) could not grow.
                (ErrorCode::DiskFull, _) | (_, ffi::SQLITE_IOERR_SHMSIZE) => Self::Full,
                (ErrorCode::DatabaseBusy, _) => Self::Locked,
                (ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase, _) => Self::Damaged(Arc::new(error)),
                (ErrorCode::SystemIoFailure, _) => Self::Disk(Arc::new(error)),
                _ => Self::Sqlite(Arc::new(error)),
            },
            // The schema's types are strict, so this program did not write a value of another type.
            rusqlite::Error::FromSqlConversionFailure(..)
            | rusqlite::Error::InvalidColumnType(..)
            | rusqlite::Error::IntegralValueOutOfRange(..)
            | rusqlite::Error::Utf8Error(..) => Self::Damaged(Arc::new(error)),
            _ => Self::Sqlite(Arc::new(error)),
        }
    }
}

impl StoreError {
    /// The code of the plugin protocol.
    pub(crate) fn code(&self) -> &'static str {
        match self {
            Self::Full => "no_space",
            Self::Busy | Self::BusyReading | Self::Locked | Self::LongRead => "busy",
            _ => "internal",
        }
    }

    /// Whether a plugin may see the message and not only the code. SQLite's own messages may name internals of the database.
    pub(crate) fn is_public(&self) -> bool {
        matches!(self.code(), "no_space" | "busy") || matches!(self, Self::Disk(_) | Self::Damaged(_) | Self::Gone { .. })
    }

    /// True if a successful write proves that the fault has cleared; corruption does not clear.
    fn ends_with_a_write(&self) -> bool {
        matches!(
            self,
            Self::Busy | Self::BusyReading | Self::Locked | Self::LongRead | Self::Full | Self::Disk(_) | Self::Gone { .. }
        )
    }
}

/// An error that may wrap a store error.
pub(crate) trait MaybeFault {
    /// The store error, if it is one.
    fn fault(&self) -> Option<&StoreError>;
}

impl MaybeFault for StoreError {
    fn fault(&self) -> Option<&StoreError> {
        Some(self)
    }
}

/// Throttles log lines by kind of fault. Each line names the database's path.
#[derive(Default)]
pub(super) struct FaultLog {
    kinds: Mutex<Vec<(StoreError, LogThrottle)>>,
}

impl FaultLog {
    /// Logs a fault of the database at `path`, unless it is suppressed.
    pub(super) fn hit(&self, path: &Path, error: &StoreError) {
        let mut kinds = self.kinds.locked();
        let same = |(known, _): &(StoreError, _)| std::mem::discriminant(known) == std::mem::discriminant(error);
        let at = kinds.iter().position(same).unwrap_or_else(|| {
            kinds.push((error.clone(), LogThrottle::default()));
            kinds.len() - 1
        });
        match kinds[at].1.hit(Instant::now()) {
            Some(0) => log::error!("{}: {error}", path.display()),
            Some(suppressed) => log::error!("{}: {error} ({suppressed} more failures since the last such line)", path.display()),
            None => {}
        }
    }

    /// Records a synced write, and logs faults that it proves over.
    pub(super) fn written(&self, path: &Path) {
        let mut kinds = self.kinds.locked();
        for (_, throttle) in kinds.iter_mut().filter(|(error, _)| error.ends_with_a_write()) {
            if let Some(suppressed) = throttle.clear() {
                log::info!("{}: writes work again ({suppressed} more failures since the last such line)", path.display());
            }
        }
    }
}
