//! Changes the owner of a directory tree: of everything in it that belongs to the old owner, and of nothing else.
//!
//! The tree is under a plugin's control, so its content is not trusted. No link is followed, each file is checked and changed by the same
//! descriptor, and a file with another hard link, maybe outside the tree, is refused.

use rustix::fs::{AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, Stat, Uid, chownat, fchmod, fstat, openat};
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// Most levels of directories below the top: each takes two open files and some of the stack.
const MAX_DEPTH: usize = 100;

/// Flags to open a directory entry itself, even if it is a link.
const ITSELF: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Makes the user `to` and its group the owner of a directory with mode 0700, and of everything in it that belongs to the old owner. Leaves
/// the content as it is if the directory already belongs to `to`. With `from`, changes only a directory of that user.
///
/// Meanwhile the directory belongs to root, has mode 0, and its group is the old owner's. So an interrupted change is recognised and
/// resumed.
///
/// # Errors
/// One sentence: which file cannot be changed, and what to do.
pub(crate) fn chown_tree(directory: &Path, from: Option<u32>, to: u32) -> Result<(), String> {
    let failed = |error: io::Error| format!("cannot change the owner of {} to uid {to}: {error}", directory.display());
    let open = || -> io::Result<_> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let top = openat(CWD, directory, flags, Mode::empty())?;
        let stat = fstat(&top)?;
        Ok((top, stat))
    };
    let (top, stat) = open().map_err(failed)?;
    let interrupted = stat.st_uid == 0 && stat.st_mode & 0o7777 == 0;
    let former = if interrupted { stat.st_gid } else { stat.st_uid };
    if from.is_some_and(|from| from != former) {
        return Ok(());
    }
    let finish = || -> io::Result<()> {
        own(&top, to, to)?;
        Ok(fchmod(&top, Mode::RWXU)?)
    };
    if former == to && !interrupted {
        return finish().map_err(failed);
    }
    let close = || -> io::Result<()> {
        own(&top, 0, former)?;
        Ok(fchmod(&top, Mode::empty())?)
    };
    close().map_err(failed)?;
    Tree { from: former, to, device: stat.st_dev }.contents(&top, directory, 1)?;
    finish().map_err(failed)
}

fn own(fd: impl AsFd, user: u32, group: u32) -> io::Result<()> {
    Ok(chownat(fd, c"", Some(Uid::from_raw(user)), Some(Gid::from_raw(group)), AtFlags::EMPTY_PATH)?)
}

struct Tree {
    from: u32,
    to: u32,
    device: u64,
}

impl Tree {
    fn contents(&self, directory: &OwnedFd, path: &Path, depth: usize) -> Result<(), String> {
        let failed =
            |error: rustix::io::Errno| format!("cannot change the owner of {} to uid {}: {error}", path.display(), self.to);
        if depth > MAX_DEPTH {
            return Err(format!(
                "{} is more than {MAX_DEPTH} directories deep, so its owner is not changed to uid {}: move it away",
                path.display(),
                self.to
            ));
        }
        for entry in Dir::read_from(directory).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry.file_name() != c"." && entry.file_name() != c".." {
                self.entry(directory, entry.file_name(), &path.join(name(entry.file_name())), depth)?;
            }
        }
        Ok(())
    }

    fn entry(&self, directory: &OwnedFd, name: &CStr, path: &Path, depth: usize) -> Result<(), String> {
        let failed = |error: io::Error| format!("cannot change the owner of {} to uid {}: {error}", path.display(), self.to);
        let entry = match openat(directory, name, ITSELF, Mode::empty()) {
            // Removed since it was listed.
            Err(rustix::io::Errno::NOENT) => return Ok(()),
            entry => entry.map_err(|error| failed(error.into()))?,
        };
        let stat: Stat = fstat(&entry).map_err(|error| failed(error.into()))?;
        if stat.st_uid != self.from || stat.st_dev != self.device {
            return Ok(());
        }
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                let inside = openat(&entry, c".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
                self.contents(&inside.map_err(|error| failed(error.into()))?, path, depth + 1)?;
            }
            FileType::RegularFile if stat.st_nlink > 1 => {
                return Err(format!(
                    "{} has another hard link, so its owner is not changed to uid {}: replace it with a copy",
                    path.display(),
                    self.to
                ));
            }
            FileType::RegularFile | FileType::Symlink => {}
            // The owner of a device could access its hardware. Sockets and pipes are created again.
            _ => return Ok(()),
        }
        own(&entry, self.to, self.to).map_err(failed)
    }
}

fn name(name: &CStr) -> &std::ffi::OsStr {
    std::os::unix::ffi::OsStrExt::from_bytes(name.to_bytes())
}
