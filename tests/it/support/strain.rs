//! What takes from a host that runs: files, threads, space on its disk.

use super::{Server, Site, command};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::PathBuf;
use tempfile::TempDir;

/// Pages of memory, and blocks of the disks here, in bytes.
pub(crate) const PAGE: u64 = 4096;

/// Sets a limit of a running host, as `prlimit` takes it.
pub(crate) fn set_limit(server: &Server, limit: &str) {
    let pid = server.pid().to_string();
    // As the host's own user, since root itself may not do that to others in a container.
    let owner = fs::metadata(format!("/proc/{pid}")).unwrap().uid().to_string();
    let mut set = command("setpriv");
    set.args(["--reuid", &owner, "--regid", &owner, "--clear-groups", "prlimit", "--pid", &pid, limit]);
    let set = set.output().unwrap();
    assert!(set.status.success(), "{limit}: {}", String::from_utf8_lossy(&set.stderr));
}

/// Leaves a running host so many files beyond the last it has open, until it is given more, and the gaps between them: the limit is
/// one of numbers, of which a thread that waits for a connection has taken one that nobody can see.
pub(crate) fn leave_files(server: &Server, more: u64) {
    let files = fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap().map(|file| file.unwrap());
    // What the tests were started with is far up, and they may have left it to the host.
    let own = files.filter(|file| {
        let ours = fs::read_link(format!("/proc/self/fd/{}", file.file_name().to_str().unwrap()));
        fs::read_link(file.path()).is_ok_and(|link| ours.is_err() || link != ours.unwrap())
    });
    let last: Option<u64> = own.map(|file| file.file_name().to_str().unwrap().parse().unwrap()).max();
    set_limit(server, &format!("--nofile={}:", last.unwrap() + 1 + more));
}

/// How many files or threads a host has, as `fd` or `task`.
pub(crate) fn count(server: &Server, what: &str) -> usize {
    fs::read_dir(format!("/proc/{}/{what}", server.pid())).unwrap().count()
}

/// A file system of its own in the place of a site's directory. The host's log is outside of it.
pub(crate) struct Disk {
    at: PathBuf,
    _outside: TempDir,
}

impl Disk {
    /// One in memory. Nothing where the system lets nobody mount any, as in most containers.
    pub(crate) fn in_memory(site: &Site, size: &str) -> Option<Self> {
        let options = format!("size={size},mode=0700");
        Self::mount(site, tempfile::tempdir().unwrap(), &["-t", "tmpfs", "-o", &options, "tmpfs"])
    }

    /// An ext4 of 16 MiB in a file.
    pub(crate) fn in_a_file(site: &Site) -> Option<Self> {
        let outside = tempfile::tempdir().unwrap();
        let image = outside.path().join("image");
        File::create(&image).unwrap().set_len(16 * 1024 * 1024).unwrap();
        let made = command("/usr/sbin/mkfs.ext4").arg("-q").arg(&image).output();
        if !made.is_ok_and(|made| made.status.success()) {
            eprintln!("skipped: there is no mkfs.ext4 here");
            return None;
        }
        Self::mount(site, outside, &["-o", "loop", image.to_str().unwrap()])
    }

    fn mount(site: &Site, outside: TempDir, what: &[&str]) -> Option<Self> {
        let mounted = command("mount").args(what).arg(site.data()).output().unwrap();
        if !mounted.status.success() {
            eprintln!("skipped: no file system can be mounted here: {}", String::from_utf8_lossy(&mounted.stderr));
            return None;
        }
        fs::create_dir(site.plugins()).unwrap();
        symlink(outside.path().join("host.log"), site.data().join("host.log")).unwrap();
        Some(Self { at: site.data().to_owned(), _outside: outside })
    }

    pub(crate) fn remount(&self, how: &str) {
        let output = command("mount").args(["-o", &format!("remount,{how}")]).arg(&self.at).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// Fills it, but for a few pages.
    pub(crate) fn fill(&self, but: u64) {
        let mut filler = File::create(self.at.join("filler")).unwrap();
        while filler.write_all(&[0; 4096]).is_ok() {}
        let full = filler.metadata().unwrap().len();
        filler.set_len((full / PAGE).saturating_sub(but) * PAGE).unwrap();
    }

    pub(crate) fn free(&self) {
        fs::remove_file(self.at.join("filler")).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Lazily: the plugins of a host that was killed may take a moment to end.
        let unmounted = command("umount").arg("--lazy").arg(&self.at).status().unwrap();
        fs::remove_dir_all(&self.at).unwrap_or_default();
        assert!(unmounted.success() || std::thread::panicking());
    }
}
