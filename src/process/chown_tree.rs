//! A directory tree is handed over to another user: what the old owner has in it, and nothing that is somebody else's.
//!
//! A plugin has had the tree in its hands. So no link is followed, what is looked at is what is changed, and a file that has another
//! name too, maybe one where it does not belong, is not given away.

use rustix::fs::{AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, Stat, Uid, chownat, fchmod, fstat, openat};
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// Deepest directory that is entered, counted from the one handed over: each takes two open files and some of the stack.
const MAX_DEPTH: usize = 100;

/// Opens the thing itself, be it a link.
const ITSELF: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Makes the user `to` and its group the owner of a directory that nobody else may enter, and of what is in it of the former owner.
/// Where the directory is `to`'s already, what is in it is left as it is. With `from`, nothing is done but to a directory of that
/// user's.
///
/// While it is handed over the directory is root's, without any mode, and its group tells the former owner: one that was broken off
/// can be told, and goes on.
///
/// # Errors
/// One sentence: what cannot be handed over, and what to do.
pub(crate) fn hand_over(directory: &Path, from: Option<u32>, to: u32) -> Result<(), String> {
    let failed = |error: io::Error| format!("cannot hand {} over to uid {to}: {error}", directory.display());
    let open = || -> io::Result<_> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let top = openat(CWD, directory, flags, Mode::empty())?;
        let stat = fstat(&top)?;
        Ok((top, stat))
    };
    let (top, stat) = open().map_err(failed)?;
    let broken_off = stat.st_uid == 0 && stat.st_mode & 0o7777 == 0;
    let former = if broken_off { stat.st_gid } else { stat.st_uid };
    if from.is_some_and(|from| from != former) {
        return Ok(());
    }
    let finish = || -> io::Result<()> {
        own(&top, to, to)?;
        Ok(fchmod(&top, Mode::RWXU)?)
    };
    if former == to && !broken_off {
        return finish().map_err(failed);
    }
    let close = || -> io::Result<()> {
        own(&top, 0, former)?;
        Ok(fchmod(&top, Mode::empty())?)
    };
    close().map_err(failed)?;
    Handover { from: former, to, device: stat.st_dev }.contents(&top, directory, 1)?;
    finish().map_err(failed)
}

fn own(fd: impl AsFd, user: u32, group: u32) -> io::Result<()> {
    Ok(chownat(fd, c"", Some(Uid::from_raw(user)), Some(Gid::from_raw(group)), AtFlags::EMPTY_PATH)?)
}

struct Handover {
    from: u32,
    to: u32,
    device: u64,
}

impl Handover {
    fn contents(&self, directory: &OwnedFd, path: &Path, depth: usize) -> Result<(), String> {
        let failed = |error: rustix::io::Errno| format!("cannot hand {} over to uid {}: {error}", path.display(), self.to);
        if depth > MAX_DEPTH {
            return Err(format!(
                "{} is more than {MAX_DEPTH} directories deep, and is not handed over to uid {}: move it away",
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
        let failed = |error: io::Error| format!("cannot hand {} over to uid {}: {error}", path.display(), self.to);
        let entry = match openat(directory, name, ITSELF, Mode::empty()) {
            // It is gone since it was listed.
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
                    "{} has another name too (a hard link), and is not handed over to uid {}: put a copy in its place",
                    path.display(),
                    self.to
                ));
            }
            FileType::RegularFile | FileType::Symlink => {}
            // A device would be given away with what is behind it; sockets and pipes are made anew.
            _ => return Ok(()),
        }
        own(&entry, self.to, self.to).map_err(failed)
    }
}

fn name(name: &CStr) -> &std::ffi::OsStr {
    std::os::unix::ffi::OsStrExt::from_bytes(name.to_bytes())
}
