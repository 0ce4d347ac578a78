//! Whether the files of the open database are still at their paths. SQLite goes on writing to a file that was removed, and all of
//! that is lost once the host ends.

use super::{StoreError, wal};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// What the names of the database's files end with: itself, its log, and the log's index.
const FILES: [&str; 3] = ["", "-wal", "-shm"];

/// The files of the database that is open.
pub(super) struct Presence {
    files: Vec<(PathBuf, &'static str, Option<Node>)>,
}

/// What tells a file from another one at the same path: device and inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Node(u64, u64);

fn node(path: &Path) -> Option<Node> {
    fs::metadata(path).ok().map(|file| Node(file.dev(), file.ino()))
}

impl Presence {
    /// Notes the files of a database that has just been opened and read.
    pub(super) fn of(database: &Path) -> Self {
        let file = |end: &&'static str| {
            let mut path = database.as_os_str().to_owned();
            path.push(end);
            let path = PathBuf::from(path);
            let node = node(&path);
            (path, *end, node)
        };
        Self { files: FILES.iter().map(file).collect() }
    }

    /// Checks that each file is the one that was opened. A few microseconds, beside a sync.
    ///
    /// # Errors
    /// Which is not.
    pub(super) fn check(&self) -> Result<(), StoreError> {
        match self.files.iter().find(|(path, _, opened)| node(path) != *opened) {
            Some((_, end, _)) => Err(StoreError::Gone { end }),
            None => Ok(()),
        }
    }

    /// Whether it is the database itself that is gone.
    pub(super) fn is_database_gone(&self) -> bool {
        self.files.iter().any(|(path, end, opened)| end.is_empty() && node(path) != *opened)
    }

    /// The size of the log's file in bytes.
    pub(super) fn log_length(&self) -> u64 {
        self.files.get(1).map_or(0, |(path, ..)| wal::length(path))
    }
}
