//! A directory of somebody else's: a bounded part of it is read, and nothing outside.

use rustix::fs::{Dir, FileType, Mode, OFlags, ResolveFlags, fstat, openat2};
use rustix::io::Errno;
use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// Most bytes read of a file: many times what a manifest or a main module has.
const MAX_BYTES: u64 = 256 * 1024;

/// Most files read: all that is looked for, and some modules in packages.
pub(super) const MAX_FILES: u32 = 64;

/// Most names read of a directory.
pub(super) const MAX_NAMES: usize = 2000;

/// Most directories listed, and most subdirectories searched in one of them.
const MAX_DIRECTORIES: u32 = 32;

/// Most notes kept: more would hide what matters.
const MAX_NOTES: usize = 16;

/// Directories that hold what others have written. Names with a dot in front are passed over as well.
const NOT_ENTERED: [&str; 7] = ["node_modules", "venv", "env", "vendor", "target", "__pycache__", "site-packages"];

/// A directory whose files are read within limits. Links are followed only inside.
pub(super) struct Files {
    root: OwnedFd,
    files_left: Cell<u32>,
    directories_left: Cell<u32>,
    notes: RefCell<Vec<String>>,
}

impl Files {
    /// Opens a directory.
    ///
    /// # Errors
    /// It is none, or cannot be opened.
    pub(super) fn open(directory: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(directory, flags, Mode::empty())?;
        // A kernel without openat2 is an error here, and not an empty directory later.
        openat2(&root, ".", flags, Mode::empty(), ResolveFlags::BENEATH)?;
        Ok(Self {
            root,
            files_left: Cell::new(MAX_FILES),
            directories_left: Cell::new(MAX_DIRECTORIES),
            notes: RefCell::default(),
        })
    }

    /// What could not be read, and why.
    pub(super) fn notes(self) -> Vec<String> {
        self.notes.into_inner()
    }

    /// Notes what the operator should know of the directory's files, once.
    pub(super) fn note(&self, note: String) {
        let mut notes = self.notes.borrow_mut();
        if notes.len() < MAX_NOTES && !notes.contains(&note) {
            notes.push(note);
        }
    }

    fn open_beneath(&self, path: &str, flags: OFlags) -> Option<OwnedFd> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        match openat2(&self.root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
            Ok(file) => Some(file),
            Err(Errno::NOENT | Errno::NOTDIR) => None,
            Err(Errno::XDEV) => {
                self.note(format!("{path} is a link that leads out of the directory, and was not followed"));
                None
            }
            Err(error) => {
                self.note(format!("{path} cannot be opened: {}", io::Error::from(error)));
                None
            }
        }
    }

    /// The type of a file, and whether it may be executed. Opening for its path alone touches neither FIFO nor device.
    fn kind(&self, path: &str, flags: OFlags) -> Option<(FileType, bool)> {
        let status = fstat(self.open_beneath(path, flags | OFlags::PATH)?).ok()?;
        Some((FileType::from_raw_mode(status.st_mode), status.st_mode & 0o111 != 0))
    }

    /// Whether there is a file of any type, or a link to anything.
    pub(super) fn holds(&self, path: &str) -> bool {
        self.kind(path, OFlags::NOFOLLOW).is_some()
    }

    /// Whether it is a regular file. Anything else but a directory is noted.
    pub(super) fn is_file(&self, path: &str) -> bool {
        match self.kind(path, OFlags::empty()) {
            Some((FileType::RegularFile, _)) => true,
            None | Some((FileType::Directory, _)) => false,
            Some(_) => {
                self.note(format!("{path} is not a regular file, and was not read"));
                false
            }
        }
    }

    /// Whether it is a directory.
    pub(super) fn is_directory(&self, path: &str) -> bool {
        matches!(self.kind(path, OFlags::empty()), Some((FileType::Directory, _)))
    }

    /// Whether it is a regular file that may be executed.
    pub(super) fn is_program(&self, path: &str) -> bool {
        self.kind(path, OFlags::empty()) == Some((FileType::RegularFile, true))
    }

    /// Whether it is a program, or a link to one outside, as `python` is in a virtualenv.
    pub(super) fn is_program_or_link(&self, path: &str) -> bool {
        matches!(self.kind(path, OFlags::NOFOLLOW), Some((FileType::RegularFile, true) | (FileType::Symlink, _)))
    }

    /// The beginning of a regular file, with � for what is not UTF-8; none if there is no such file, or if enough were read.
    pub(super) fn text(&self, path: &str) -> Option<String> {
        if !self.is_file(path) {
            return None;
        }
        let Some(left) = self.files_left.get().checked_sub(1) else {
            self.note(format!("{MAX_FILES} files were read, and {path} is beyond that limit"));
            return None;
        };
        self.files_left.set(left);
        // A file that has become a FIFO since is opened without waiting for a writer, and is refused by its type.
        let file = self.open_beneath(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY)?;
        let status = fstat(file.as_fd()).ok()?;
        if FileType::from_raw_mode(status.st_mode) != FileType::RegularFile {
            return None;
        }
        if u64::try_from(status.st_size).is_ok_and(|size| size > MAX_BYTES) {
            self.note(format!("{path} is larger than {} KiB, and only its beginning was read", MAX_BYTES / 1024));
        }
        let mut bytes = Vec::new();
        if let Err(error) = File::from(file).take(MAX_BYTES).read_to_end(&mut bytes) {
            self.note(format!("{path} cannot be read: {error}"));
            return None;
        }
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The names in a directory, in order; those that are not UTF-8 are left out.
    pub(super) fn names(&self, path: &str) -> Vec<String> {
        let Some(left) = self.directories_left.get().checked_sub(1) else { return Vec::new() };
        self.directories_left.set(left);
        let Some(entries) =
            self.open_beneath(path, OFlags::RDONLY | OFlags::DIRECTORY).and_then(|file| Dir::read_from(file).ok())
        else {
            return Vec::new();
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().to_str().ok().map(str::to_owned));
        let mut names: Vec<String> = names.filter(|name| name != "." && name != "..").take(MAX_NAMES + 1).collect();
        if names.len() > MAX_NAMES {
            self.note(format!("{path} has more than {MAX_NAMES} names, and the others were not looked at"));
            names.truncate(MAX_NAMES);
        }
        names.sort();
        names
    }

    /// The subdirectories that may hold the application's own code.
    pub(super) fn packages(&self) -> Vec<String> {
        let names = self.names(".").into_iter();
        let own = names.filter(|name| !name.starts_with('.') && !NOT_ENTERED.contains(&name.as_str()));
        own.filter(|name| self.is_directory(name)).take(MAX_DIRECTORIES as usize).collect()
    }
}
