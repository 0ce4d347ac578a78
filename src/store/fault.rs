//! Why the store could not do something: for the operator in one sentence, for a plugin as a code.

use super::{MAX_LOG, READER_TIME, READERS, WRITE_QUEUE, schema};
use crate::lock::LockExt;
use crate::repeat::Repeat;
use rusqlite::ffi::{self, ErrorCode};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;
use uuid::Uuid;

/// Why the store could not do something.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum StoreError {
    /// A database of a later version of this program.
    #[error("the database has schema version {found}, this program knows {} at most: install a newer plugrack", schema::VERSION)]
    Newer {
        /// Its version.
        found: i64,
    },
    /// Somebody else's database.
    #[error("the file is not a plugrack database")]
    Foreign,
    /// The file cannot be made or opened.
    #[error("{0}")]
    File(Arc<std::io::Error>),
    /// An identity that somebody has changed by hand.
    #[error("the instance id in the database, {0:?}, is not a UUID")]
    BadInstanceId(String),
    /// SQLite would take the empty file for a new database, and remove the log that has all the data.
    #[error(
        "plugrack.db is missing or empty, and its log plugrack.db-wal is not: restore both from a backup, \
         or move plugrack.db-wal away to begin with an empty database"
    )]
    LeftLog,
    /// There was a database before.
    #[error(
        "plugrack.db is missing or empty, and instance-id beside it says that it was the database of instance {named}: \
         restore all files of a backup, or remove instance-id to begin as a new instance"
    )]
    Missing {
        /// The instance it was of.
        named: Uuid,
    },
    /// A database with tables and without an identity: it was in the log.
    #[error(
        "plugrack.db has no instance id, most likely because it was copied without its log plugrack.db-wal: \
         restore all files of a backup, or remove plugrack.db and instance-id to begin as a new instance"
    )]
    NoIdentity,
    /// A database of another installation.
    #[error(
        "plugrack.db is the database of instance {found}, and instance-id beside it names {named}: \
         restore both from the same backup, or remove instance-id to go on as {found}"
    )]
    OtherIdentity {
        /// The identity in the database.
        found: Uuid,
        /// The one in the file.
        named: Uuid,
    },
    /// The file beside the database holds something else.
    #[error("the file instance-id beside plugrack.db names no instance: remove it, and the next start writes it again")]
    BadIdentityFile,
    /// An older database than the log beside it was begun on, or an older log.
    #[error(
        "plugrack.db and its log plugrack.db-wal do not belong together, most likely because one of them is an older copy: \
         restore both from the same backup, or move plugrack.db-wal away to go on with plugrack.db as it is, without what the log has"
    )]
    OtherLog,
    /// A file that is open is no longer at its path.
    #[error(
        "plugrack.db{end} was removed or replaced while the host runs, so nothing is written: \
         put the same file back, or stop the host{} and start it again",
        if end.is_empty() { ", restore all files of a backup," } else { "" }
    )]
    Gone {
        /// What its name ends with.
        end: &'static str,
    },
    /// The writer has more to do than it can.
    #[error("the store is busy: more than {WRITE_QUEUE} changes wait; try again")]
    Busy,
    /// As many read as may at once, and none of them comes to its end.
    #[error("the store is busy: all {READERS} readers have been in use for {} s; try again", READER_TIME.as_secs())]
    BusyReading,
    /// Another program has a lock.
    #[error(
        "plugrack.db is locked by another program for longer than {} s: end that program (fuser plugrack.db names it), then try again",
        schema::BUSY_TIMEOUT.as_secs()
    )]
    Locked,
    /// Another program's read keeps the log from being written back.
    #[error(
        "plugrack.db-wal has grown to {} MiB because another program reads plugrack.db without end: \
         end that program (fuser plugrack.db names it), then try again",
        MAX_LOG / 1024 / 1024
    )]
    LongRead,
    /// No space left.
    #[error("the disk that plugrack.db is on is full: free space there, then try again")]
    Full,
    /// A disk that fails, or that has been made read-only while the file was open.
    #[error(
        "the disk that plugrack.db is on fails ({0}): see the kernel's log (dmesg), and whether its file system is now read-only"
    )]
    Disk(Arc<rusqlite::Error>),
    /// A file that is no longer what was written.
    #[error(
        "plugrack.db is damaged ({0}): stop the host, then restore a backup, \
         or save what can be read with: sqlite3 plugrack.db .recover | sqlite3 saved.db"
    )]
    Damaged(Arc<rusqlite::Error>),
    /// A fault of this program.
    #[error("a change to plugrack.db panicked, which is a fault of plugrack's: its log has the reason")]
    Panicked,
    /// The store is closing or has failed.
    #[error("the store is closed")]
    Closed,
    /// SQLite's own word.
    #[error("{0}")]
    Sqlite(Arc<rusqlite::Error>),
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        match &error {
            rusqlite::Error::SqliteFailure(failure, _) => match (failure.code, failure.extended_code) {
                // The file beside the database that holds the log's index could not grow.
                (ErrorCode::DiskFull, _) | (_, ffi::SQLITE_IOERR_SHMSIZE) => Self::Full,
                (ErrorCode::DatabaseBusy, _) => Self::Locked,
                (ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase, _) => Self::Damaged(Arc::new(error)),
                (ErrorCode::SystemIoFailure, _) => Self::Disk(Arc::new(error)),
                _ => Self::Sqlite(Arc::new(error)),
            },
            // The schema's types are strict, so a value of another one was not written by this program.
            rusqlite::Error::FromSqlConversionFailure(..)
            | rusqlite::Error::InvalidColumnType(..)
            | rusqlite::Error::IntegralValueOutOfRange(..)
            | rusqlite::Error::Utf8Error(..) => Self::Damaged(Arc::new(error)),
            _ => Self::Sqlite(Arc::new(error)),
        }
    }
}

impl StoreError {
    /// The protocol's code.
    pub(crate) fn code(&self) -> &'static str {
        match self {
            Self::Full => "no_space",
            Self::Busy | Self::BusyReading | Self::Locked | Self::LongRead => "busy",
            _ => "internal",
        }
    }

    /// Whether a plugin may be told more than the code. SQLite's own word may name what is inside of the database.
    pub(crate) fn is_public(&self) -> bool {
        matches!(self.code(), "no_space" | "busy") || matches!(self, Self::Disk(_) | Self::Damaged(_) | Self::Gone { .. })
    }

    /// Whether a write that succeeds shows that it is over. Damage stays where it is.
    fn ends_with_a_write(&self) -> bool {
        matches!(
            self,
            Self::Busy | Self::BusyReading | Self::Locked | Self::LongRead | Self::Full | Self::Disk(_) | Self::Gone { .. }
        )
    }
}

/// An error that may come from the store.
pub(crate) trait MaybeFault {
    /// The store's part in it.
    fn fault(&self) -> Option<&StoreError>;
}

impl MaybeFault for StoreError {
    fn fault(&self) -> Option<&StoreError> {
        Some(self)
    }
}

/// The kinds of trouble that have come so far, each with how often. Their log lines name the database's path.
#[derive(Default)]
pub(super) struct Troubles {
    kinds: Mutex<Vec<(StoreError, Repeat)>>,
}

impl Troubles {
    /// Notes a trouble with the database at `path`.
    pub(super) fn came(&self, path: &Path, error: &StoreError) {
        let mut kinds = self.kinds.locked();
        let same = |(known, _): &(StoreError, _)| std::mem::discriminant(known) == std::mem::discriminant(error);
        let at = kinds.iter().position(same).unwrap_or_else(|| {
            kinds.push((error.clone(), Repeat::default()));
            kinds.len() - 1
        });
        match kinds[at].1.came(Instant::now()) {
            Some(0) => log::error!("{}: {error}", path.display()),
            Some(unsaid) => log::error!("{}: {error} ({unsaid} more failures since this was last said)", path.display()),
            None => {}
        }
    }

    /// Notes that a write was synced.
    pub(super) fn written(&self, path: &Path) {
        let mut kinds = self.kinds.locked();
        for (_, repeat) in kinds.iter_mut().filter(|(error, _)| error.ends_with_a_write()) {
            if let Some(unsaid) = repeat.over() {
                log::info!("{}: it is written again ({unsaid} more failures since the last was said)", path.display());
            }
        }
    }
}
