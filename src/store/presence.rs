//! Checks that the files of the open database are still at their paths. SQLite keeps writing to a removed file, and all of that is
//! lost when the host ends.

use super::{StoreError, wal};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Suffixes of the database's files: the database, its log, and the log's index.
const FILES: [&str; 3] = ["", "-wal", "-shm"];

/// The files of the open database.
pub(super) struct Presence {
    files: Vec<(PathBuf, &'static str, Option<Node>)>,
}

/// Identifies a file regardless of its path: device and inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Node(u64, u64);

fn node(path: &Path) -> Option<Node> {
    fs::metadata(path).ok().map(|file| Node(file.dev(), file.ino()))
}

impl Presence {
    /// Records the files of a database that was just opened and read.
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

    /// Checks that each file is the one that was opened. Takes microseconds, far less than a sync.
    ///
    /// # Errors
    /// One of them was removed or replaced.
    pub(super) fn check(&self) -> Result<(), StoreError> {
        match self.files.iter().find(|(path, _, opened)| node(path) != *opened) {
            Some((_, end, _)) => Err(StoreError::Gone { end }),
            None => Ok(()),
        }
    }

    /// Whether the database file itself is gone.
    pub(super) fn is_database_gone(&self) -> bool {
        self.files.iter().any(|(path, end, opened)| end.is_empty() && node(path) != *opened)
    }

    /// The size of the log's file in bytes.
    pub(super) fn log_length(&self) -> u64 {
        self.files.get(1).map_or(0, |(path, ..)| wal::length(path))
    }
}
