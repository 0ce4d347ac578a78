//! The root directory of a site, below which every file is opened.
//!
//! The kernel confines each lookup (`openat2` with `RESOLVE_BENEATH`): no `..` and no symbolic link leads out of the root, whatever changes
//! among the files meanwhile. A link is followed while it stays inside; an absolute link never does.

use super::conditional::Version;
use crate::http::HttpError;
use crate::http::errors;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, Stat, fstat, openat, openat2, stat};
use rustix::io::{Errno, pread};
use std::cmp::Ordering;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Interval at which the path of the root is compared with the open directory: a site is often updated by a new directory, or a new target
/// of a link, at the same path.
const RECHECK: Duration = Duration::from_secs(1);

/// Attempts to open a file while the kernel cannot decide whether a `..` of a link leads out, because something is renamed meanwhile.
const ATTEMPTS: u32 = 16;

/// The confinement of each lookup. Magic links are those of `/proc`, which lead to any file.
const CONFINED: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_MAGICLINKS);

/// The descriptor of a directory that is only a starting point. It needs no permission to list it.
const DIRECTORY: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// A file is opened without waiting for the other end of a FIFO, and without becoming a terminal's session.
const FILE: OFlags = OFlags::RDONLY.union(OFlags::NONBLOCK).union(OFlags::NOCTTY).union(OFlags::CLOEXEC);

/// Why devices, sockets and FIFOs are not served.
const SPECIAL: &str = "it is neither a file nor a directory";

/// How a file has changed that ends before the bytes that are to be sent.
pub(super) const BECAME_SHORTER: &str = "the file became shorter";

/// The root directory.
pub(super) struct Root {
    path: PathBuf,
    directory: OwnedFd,
    /// Device and inode of the directory.
    identity: (u64, u64),
    checked: Instant,
}

/// A regular file that is open.
pub(super) struct File {
    descriptor: OwnedFd,
    pub(super) version: Version,
    /// Whether somebody may execute it.
    pub(super) executable: bool,
}

/// What is at a path.
pub(super) enum Entry {
    File(File),
    Directory,
    /// Nothing, so that a page of the site may stand for it.
    Missing,
}

/// Why a path is not served although something is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) error: HttpError,
    /// The reason for the plugin's log, if it is of use there.
    pub(super) why: Option<String>,
}

impl Refusal {
    fn new(error: HttpError, why: impl Into<String>) -> Self {
        Self { error, why: Some(why.into()) }
    }

    /// A refusal without a line in the plugin's log.
    pub(super) fn quiet(error: HttpError) -> Self {
        Self { error, why: None }
    }
}

impl Root {
    /// Opens the directory at this path.
    ///
    /// # Errors
    /// It cannot be opened, or the kernel cannot confine lookups to it. The message is a sentence that names the path.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let fail = |error: Errno, what: &str| {
            io::Error::new(io::Error::from(error).kind(), format!("the root {} {what}: {error}", path.display()))
        };
        let (directory, identity) = open_directory(path).map_err(|error| fail(error, "cannot be opened as a directory"))?;
        match openat2(&directory, ".", DIRECTORY, Mode::empty(), CONFINED) {
            Ok(_) => Ok(Self { path: path.to_owned(), directory, identity, checked: Instant::now() }),
            // Old container profiles answer EPERM to system calls that they do not know.
            Err(error @ (Errno::NOSYS | Errno::PERM)) => Err(fail(
                error,
                "cannot be served, because openat2 is missing, which needs Linux 5.6 and a container that allows it",
            )),
            Err(error) => Err(fail(error, "cannot be searched")),
        }
    }

    /// Changes to the directory that is at the path now. While there is none, the one that is open stays.
    pub(super) fn refresh(&mut self, now: Instant) {
        if now.duration_since(self.checked) < RECHECK {
            return;
        }
        self.checked = now;
        if stat(&self.path).is_ok_and(|found| identity(&found) != self.identity)
            && let Ok((directory, identity)) = open_directory(&self.path)
        {
            (self.directory, self.identity) = (directory, identity);
        }
    }

    /// Opens what is at a path below the root.
    ///
    /// # Errors
    /// It is not served, or cannot be opened.
    pub(super) fn find(&self, path: &[u8]) -> Result<Entry, Refusal> {
        let mut attempts = 0;
        let descriptor = loop {
            attempts += 1;
            match openat2(&self.directory, path, FILE, Mode::empty(), CONFINED) {
                Ok(descriptor) => break descriptor,
                Err(Errno::AGAIN | Errno::INTR) if attempts < ATTEMPTS => {}
                Err(Errno::NOENT | Errno::NOTDIR | Errno::NAMETOOLONG) => return Ok(Entry::Missing),
                Err(error) => return Err(refusal(error)),
            }
        };
        let found = fstat(&descriptor).map_err(refusal)?;
        match FileType::from_raw_mode(found.st_mode) {
            FileType::RegularFile => {
                Ok(Entry::File(File { descriptor, version: version(&found), executable: found.st_mode & 0o111 != 0 }))
            }
            FileType::Directory => Ok(Entry::Directory),
            _ => Err(Refusal::new(errors::NOT_FOUND, SPECIAL)),
        }
    }
}

impl File {
    /// Reads from `offset` on until `buffer` is full or the file ends, and returns the number of bytes.
    ///
    /// # Errors
    /// Those of the file system.
    pub(super) fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() {
            match pread(&self.descriptor, &mut buffer[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(filled)
    }

    /// How the file has changed in place since it was opened. One that only grew has not: the bytes that were there are sent.
    pub(super) fn change(&self) -> Option<&'static str> {
        let now = version(&fstat(&self.descriptor).ok()?);
        match now.size.cmp(&self.version.size) {
            Ordering::Less => Some(BECAME_SHORTER),
            Ordering::Equal if now.modified != self.version.modified => Some("the file was rewritten"),
            _ => None,
        }
    }
}

impl AsFd for File {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

fn refusal(error: Errno) -> Refusal {
    match error {
        Errno::XDEV => Refusal::new(errors::NOT_FOUND, "a symbolic link leads out of the root, or is absolute"),
        Errno::LOOP => Refusal::new(errors::NOT_FOUND, "its symbolic links lead in a circle"),
        // A socket, or a device without a driver.
        Errno::NXIO | Errno::NODEV => Refusal::new(errors::NOT_FOUND, SPECIAL),
        Errno::ACCESS | Errno::PERM => Refusal::new(errors::UNREADABLE, format!("the host may not read it ({error})")),
        Errno::MFILE | Errno::NFILE | Errno::NOMEM => Refusal::new(errors::NO_FILES, format!("it cannot be opened ({error})")),
        Errno::AGAIN | Errno::INTR => {
            Refusal::new(errors::FILE_CHANGED, format!("it could not be opened in {ATTEMPTS} attempts"))
        }
        _ => Refusal::new(errors::BAD_GATEWAY, format!("it cannot be opened ({error})")),
    }
}

fn open_directory(path: &Path) -> Result<(OwnedFd, (u64, u64)), Errno> {
    let directory = openat(CWD, path, DIRECTORY, Mode::empty())?;
    let identity = identity(&fstat(&directory)?);
    Ok((directory, identity))
}

fn identity(found: &Stat) -> (u64, u64) {
    (found.st_dev, found.st_ino)
}

fn version(found: &Stat) -> Version {
    Version {
        size: u64::try_from(found.st_size).unwrap_or_default(),
        inode: found.st_ino,
        modified: (found.st_mtime, found.st_mtime_nsec),
        changed: (found.st_ctime, found.st_ctime_nsec),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_the_system_have_an_answer_and_a_reason() {
        for (error, answer, why) in [
            (Errno::XDEV, errors::NOT_FOUND, "a symbolic link leads out of the root, or is absolute"),
            (Errno::LOOP, errors::NOT_FOUND, "its symbolic links lead in a circle"),
            (Errno::NXIO, errors::NOT_FOUND, SPECIAL),
            (Errno::ACCESS, errors::UNREADABLE, "the host may not read it (Permission denied (os error 13))"),
            (Errno::MFILE, errors::NO_FILES, "it cannot be opened (Too many open files (os error 24))"),
            (Errno::AGAIN, errors::FILE_CHANGED, "it could not be opened in 16 attempts"),
            (Errno::IO, errors::BAD_GATEWAY, "it cannot be opened (Input/output error (os error 5))"),
        ] {
            assert_eq!(refusal(error), Refusal { error: answer, why: Some(why.to_owned()) });
        }
    }
}
