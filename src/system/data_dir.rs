//! The data directory: the paths and modes of the host's files, and the lock that admits only one host.

use crate::util::pause::pause;
use anyhow::{Context, Result, anyhow, bail};
use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate, fchmod, open, statvfs};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, ErrorKind, Read, Seek, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Longest path of a Unix socket in bytes: `sun_path` of `sockaddr_un` is 108 with the closing zero, see unix(7).
pub(crate) const MAX_SOCKET_PATH: usize = 107;

/// Mode of a directory that only its owner may enter.
const PRIVATE: u32 = 0o700;

/// Mode of a directory that others may pass through to their own files, but not list.
const PASSABLE: u32 = 0o711;

/// Largest reserve in bytes: the log space of a transaction of deletes.
const RESERVE: u64 = 4 * 1024 * 1024;

/// Smallest reserve in bytes, on a small disk: what a start needs. That is 32 KiB for the index of the database's log (SQLite's minimum),
/// 64 KiB held for the log, and a few small files.
const MIN_RESERVE: u64 = 128 * 1024;

/// Largest fraction of the disk that is reserved: 1/64.
const RESERVE_SHARE: u64 = 64;

/// First bytes of the reserve, so that no other file of this name is mistaken for it.
const RESERVE_HEAD: &[u8] = b"plugrack: space for a full disk\n";

/// Empty file that marks a run directory made by the host.
const RUN_MARKER: &str = ".plugrack";

/// Name of the lock file, in the data directory and in the `--run` directory.
const LOCK: &str = "lock";

/// Name of the socket for the plugins' calls.
const HOST_SOCKET: &str = "host.sock";

/// Name of the socket for the operator's commands.
const API_SOCKET: &str = "api.sock";

/// Longest content of `run-dir` in bytes: the longest path (`PATH_MAX`, without its closing zero) and a line end.
const MAX_RUN_DIR: u64 = 4096;

/// Longest content of the lock's file in bytes: a process id and a line end.
const MAX_LOCK: u64 = 16;

/// Time during which a stopping host may still hold the lock or answer at its socket.
const ENDING_TIME: Duration = Duration::from_millis(500);

/// Pause between attempts during that time.
const ENDING_PAUSE: Duration = Duration::from_millis(20);

/// Open flag: a pipe in place of a file must not block the open.
const NONBLOCK: i32 = OFlags::NONBLOCK.bits().cast_signed();

/// Open flag: refuse a symbolic link as the last component of a path.
const NOFOLLOW: i32 = OFlags::NOFOLLOW.bits().cast_signed();

/// Absolute paths of the host's files: in the data directory, and in the `--run` directory if there is one.
#[derive(Debug, Clone)]
pub(crate) struct DataDir {
    root: PathBuf,
    /// The run directory, for sockets and other runtime files.
    run: PathBuf,
}

/// The lock that the host holds on a data directory. The kernel releases it however the host ends.
#[derive(Debug)]
pub(crate) struct Lock {
    files: Vec<LockFile>,
}

impl Lock {
    /// The locked files: with `--run` that of its directory first, then that of the data directory.
    pub(crate) fn files(&mut self) -> &mut [LockFile] {
        &mut self.files
    }
}

/// One locked file.
#[derive(Debug)]
pub(crate) struct LockFile {
    path: PathBuf,
    file: File,
}

/// The result of checking a lock.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Held {
    /// The lock is still held.
    Still,
    /// The file was removed or replaced, and the new file is locked now.
    Again,
    /// The file was removed or replaced, and another process holds the new file.
    ByAnother,
}

impl LockFile {
    /// The path of the lock file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Checks that the file at the path is the locked one, and otherwise locks the file there.
    ///
    /// # Errors
    /// The file cannot be created or read.
    pub(crate) fn keep(&mut self) -> io::Result<Held> {
        let ours = self.file.metadata()?;
        if fs::symlink_metadata(&self.path).is_ok_and(|found| (found.dev(), found.ino()) == (ours.dev(), ours.ino())) {
            return Ok(Held::Still);
        }
        let mut file = open_lock(&self.path)?;
        // A second host that is about to exit, or a command, may hold it for a moment.
        let deadline = Instant::now() + ENDING_TIME;
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if Instant::now() >= deadline => return Ok(Held::ByAnother),
                Err(TryLockError::WouldBlock) => pause(ENDING_PAUSE),
                Err(TryLockError::Error(error)) => return Err(error),
            }
        }
        // The process id is for messages; only the lock counts.
        write_pid(&mut file).ok();
        self.file = file;
        Ok(Held::Again)
    }
}

/// Opens the lock file. Refuses, and does not change, a file that is not a lock.
fn open_lock(path: &Path) -> io::Result<File> {
    let mut options = private_file();
    options.create(true).truncate(false).read(true).write(true).custom_flags(NOFOLLOW);
    let mut file = options.open(path).map_err(|error| match Errno::from_io_error(&error) {
        Some(Errno::LOOP) => {
            io::Error::other("it is a symbolic link (put a file in its place, or choose another --data or --run)")
        }
        _ => error,
    })?;
    let mut text = String::new();
    let known = file.metadata()?.is_file()
        && (&mut file).take(MAX_LOCK + 1).read_to_string(&mut text).is_ok_and(|_| {
            let pid = text.trim_end();
            text.len() as u64 <= MAX_LOCK && pid.bytes().all(|byte| byte.is_ascii_digit())
        });
    file.rewind()?;
    if known { Ok(file) } else { Err(io::Error::other("it is not plugrack's lock (choose another --data or --run)")) }
}

fn write_pid(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    writeln!(file, "{}", std::process::id())
}

impl DataDir {
    /// Opens the data directory and the `--run` directory, and creates each with mode 0700 if missing.
    pub(crate) fn create(path: &Path, run: Option<&Path>) -> Result<Self> {
        make_private_dir(path)
            .with_context(|| format!("cannot create the data directory {} (choose another with --data)", path.display()))?;
        let root = canonical_root(path)?;
        let run = run.map_or_else(|| Ok(root.join("run")), |run| make_run_dir(&root, run))?;
        let data = Self { root, run };
        check_socket_path(&data.host_socket()).map_err(anyhow::Error::msg)?;
        for dir in [data.spool(), data.logs(), data.all_plugin_data()] {
            check_no_link(&dir)?;
        }
        if data.is_elsewhere() {
            claim_run(&data.run, "--run")?;
        }
        claim_run(&data.spool(), "--data")?;
        for dir in [data.logs(), data.all_plugin_data()] {
            make_private_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        Ok(data)
    }

    /// Whether the sockets are in a `--run` directory.
    fn is_elsewhere(&self) -> bool {
        self.run != self.spool()
    }

    /// The file that names the `--run` directory.
    fn run_dir_file(&self) -> PathBuf {
        self.root.join("run-dir")
    }

    /// The directory that `run-dir` names, if that file exists.
    fn named_run(&self) -> Result<Option<PathBuf>> {
        let path = self.run_dir_file();
        let mut bytes = Vec::new();
        match OpenOptions::new().read(true).custom_flags(NOFOLLOW | NONBLOCK).open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            opened => opened.and_then(|file| file.take(MAX_RUN_DIR + 1).read_to_end(&mut bytes)),
        }
        .with_context(|| format!("cannot read {}", path.display()))?;
        let named = bytes.strip_suffix(b"\n").map(|named| PathBuf::from(OsString::from_vec(named.to_vec())));
        match named.filter(|named| named.is_absolute() && bytes.len() as u64 <= MAX_RUN_DIR) {
            Some(named) => Ok(Some(named)),
            None => {
                bail!("{} does not hold an absolute path: remove it, and restart the host", path.display())
            }
        }
    }

    /// Writes `run-dir`, for commands and other hosts. Requires the lock.
    pub(crate) fn announce(&self) -> Result<()> {
        let path = self.run_dir_file();
        if self.is_announced()? {
            return Ok(());
        }
        let done = if self.is_elsewhere() {
            let line = [self.run.as_os_str().as_bytes(), b"\n"].concat();
            self.write_whole(&path, &line)
        } else {
            fs::remove_file(&path)
        };
        done.with_context(|| format!("cannot write {}", path.display()))
    }

    /// Whether `run-dir` names this host's run directory.
    pub(crate) fn is_announced(&self) -> Result<bool> {
        Ok(self.named_run()?.as_ref() == Some(&self.run).filter(|_| self.is_elsewhere()))
    }

    /// Describes the other host that runs in the directory of `run-dir`, if there is one.
    pub(crate) fn other_host(&self) -> Result<Option<String>> {
        let Some(named) = self.named_run()?.filter(|named| *named != self.run) else { return Ok(None) };
        let process = match lock_holder(&named.join(LOCK)) {
            Some(pid) => format!(" (process {pid})"),
            None if is_served(&named) => String::new(),
            None => return Ok(None),
        };
        Ok(Some(format!("another plugrack{process} runs on {} with --run {}", self.root.display(), named.display())))
    }

    /// Host sockets of earlier hosts on this data directory, which may have had other settings.
    ///
    /// # Errors
    /// `run-dir` cannot be read.
    pub(crate) fn former_host_sockets(&self) -> Result<Vec<PathBuf>> {
        let former = [Some(self.spool()), self.named_run()?];
        Ok(former.into_iter().flatten().filter(|run| *run != self.run).map(|run| run.join(HOST_SOCKET)).collect())
    }

    /// Opens an existing data directory with the run directory of its last host.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let root = canonical_root(path)?;
        let mut data = Self { run: root.join("run"), root };
        if let Some(named) = data.named_run()? {
            data.run = named;
        }
        Ok(data)
    }

    /// Sets the directory modes: other users may pass through if plugins have uids of their own. Requires the lock.
    pub(crate) fn set_modes(&self, shared: bool) -> io::Result<()> {
        let mode = if shared { PASSABLE } else { PRIVATE };
        for dir in [self.run(), self.spool(), self.logs(), self.all_plugin_data()] {
            let dir = open(&dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
            fchmod(dir, Mode::from_raw_mode(mode))?;
        }
        // The files inside have modes of their own, so the operator's mode is kept, except for bits that the line below once added.
        let found = fs::metadata(&self.root)?.mode() & 0o7777;
        let wanted = if shared {
            found | (PASSABLE & !PRIVATE)
        } else {
            Some(found).filter(|found| *found != PASSABLE).unwrap_or(PRIVATE)
        };
        fs::set_permissions(&self.root, Permissions::from_mode(wanted))
    }

    /// Locks the data directory for this process, and the `--run` directory.
    ///
    /// With `--run` the lock in that directory is the essential one. The lock in the data directory is held too if its file system has
    /// locks, so that a host without `--run`, or with another one, does not start whatever happens to `run-dir`.
    pub(crate) fn lock(&self) -> Result<Lock> {
        let mut files = Vec::new();
        // The directory may be gone after a boot, if it was in memory.
        if self.is_elsewhere() && self.run.is_dir() {
            files.extend(lock_one(&self.run, &self.run, "--run")?);
        }
        self.refuse_other_host()?;
        match lock_one(&self.root, &self.spool(), "--data")? {
            None if files.is_empty() => bail!(
                "cannot lock {}, because its file system has no locks: set --run to a directory on a local disk or in memory",
                self.root.join(LOCK).display()
            ),
            file => files.extend(file),
        }
        // A host that started at the same time may have written its directory meanwhile.
        self.refuse_other_host()?;
        Ok(Lock { files })
    }

    fn refuse_other_host(&self) -> Result<()> {
        let deadline = Instant::now() + ENDING_TIME;
        while let Some(other) = self.other_host()? {
            if Instant::now() >= deadline {
                bail!("{other}: stop it, or choose another --data");
            }
            pause(ENDING_PAUSE);
        }
        Ok(())
    }

    /// The process id in the lock file; none if nobody holds the lock.
    pub(crate) fn holder(&self) -> Option<String> {
        [&self.run, &self.root].into_iter().find_map(|directory| lock_holder(&directory.join(LOCK)))
    }

    /// The database file.
    pub(crate) fn database(&self) -> PathBuf {
        self.root.join("plugrack.db")
    }

    /// The run directory, for sockets and other runtime files.
    pub(crate) fn run(&self) -> PathBuf {
        self.run.clone()
    }

    /// Directory for request bodies that do not fit in memory: always on the disk of the data directory, because the `--run` directory
    /// may be in memory. Without `--run` it is the run directory.
    pub(crate) fn spool(&self) -> PathBuf {
        self.root.join("run")
    }

    /// The host socket, for the plugins' calls.
    pub(crate) fn host_socket(&self) -> PathBuf {
        self.run.join(HOST_SOCKET)
    }

    /// The socket for the operator's commands.
    pub(crate) fn api_socket(&self) -> PathBuf {
        self.run.join(API_SOCKET)
    }

    /// The file with the address that the host listens on.
    pub(crate) fn listen(&self) -> PathBuf {
        self.run().join("listen")
    }

    /// A plugin's directory in the run directory. Ids have no dot, so it cannot collide with the host's own files.
    fn plugin_run(&self, id: &str) -> PathBuf {
        self.run().join(format!("{id}.d"))
    }

    /// The socket on which a plugin listens; an update beside it has a numbered socket.
    pub(crate) fn plugin_socket(&self, id: &str, update: Option<u64>) -> PathBuf {
        self.plugin_run(id).join(update.map_or("sock".to_owned(), |number| format!("sock.{number}")))
    }

    /// Creates a plugin's own directories if missing, and returns them.
    pub(crate) fn make_plugin_dirs(&self, id: &str) -> io::Result<[PathBuf; 2]> {
        let dirs = [self.plugin_data(id), self.plugin_run(id)];
        dirs.iter().try_for_each(|dir| make_private_dir(dir))?;
        Ok(dirs)
    }

    /// Removes a plugin's directory in the run directory.
    pub(crate) fn remove_plugin_run(&self, id: &str) -> io::Result<()> {
        remove_from_run(&self.run, self.plugin_run(id))
    }

    /// Deletes a plugin's data directory and its log. Missing ones are fine.
    pub(crate) fn remove_plugin(&self, id: &str) -> io::Result<()> {
        self.remove_plugin_run(id)?;
        let missing = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
        // Does not follow a link.
        fs::remove_dir_all(self.plugin_data(id)).or_else(|error| if missing(&error) { Ok(()) } else { Err(error) })?;
        for log in fs::read_dir(self.logs())? {
            let log = log?;
            let is_its = |name: &str| name.strip_prefix(id).is_some_and(|rest| rest == ".log" || rest.starts_with(".log."));
            if log.file_name().to_str().is_some_and(is_its) {
                fs::remove_file(log.path()).or_else(|error| if missing(&error) { Ok(()) } else { Err(error) })?;
            }
        }
        Ok(())
    }

    /// The directory of the log files.
    pub(crate) fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }

    /// The log file of a plugin.
    pub(crate) fn log(&self, id: &str) -> PathBuf {
        self.logs().join(format!("{id}.log"))
    }

    /// A plugin's data directory.
    pub(crate) fn plugin_data(&self, id: &str) -> PathBuf {
        self.all_plugin_data().join(id)
    }

    /// The directory of the plugins' data directories.
    fn all_plugin_data(&self) -> PathBuf {
        self.root.join("plugin-data")
    }

    /// The default plugins directory.
    pub(crate) fn plugins(&self) -> PathBuf {
        self.root.join("plugins")
    }

    /// Removes leftovers of hosts in and beside the run directory, including links but not their targets. Logs, and keeps, other files
    /// and plugin files that cannot be removed. Requires the lock.
    pub(crate) fn sweep_run(&self) -> io::Result<()> {
        sweep(&self.run, self.is_elsewhere())?;
        if self.is_elsewhere() { sweep(&self.spool(), false) } else { Ok(()) }
    }

    /// The same when the host ends, which empties the directories except for the lock. Leaves a directory alone that was replaced
    /// meanwhile.
    pub(crate) fn leave_run(&self) -> io::Result<()> {
        leave(&self.run, self.is_elsewhere())?;
        if self.is_elsewhere() { leave(&self.spool(), false) } else { Ok(()) }
    }

    /// The disk space reserve. Requires the lock.
    pub(crate) fn reserve(&self) -> Reserve {
        Reserve::in_directory(&self.root)
    }

    /// The operator's token, created at the first start.
    pub(crate) fn admin_token(&self) -> Result<String> {
        match self.read_admin_token() {
            Ok(token) => Ok(token),
            Err(error) if error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::NotFound) => {
                // Two random UUIDs have 244 random bits.
                let token = format!("{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple());
                let path = self.root.join("admin-token");
                self.write_whole(&path, format!("{token}\n").as_bytes())
                    .with_context(|| format!("cannot write {}", path.display()))?;
                Ok(token)
            }
            Err(error) => Err(error),
        }
    }

    /// Writes a file of the data directory atomically, by renaming a temporary file.
    fn write_whole(&self, path: &Path, content: &[u8]) -> io::Result<()> {
        let mut file = tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o600)).tempfile_in(&self.root)?;
        file.write_all(content)?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        Ok(())
    }

    /// Reads the operator's token.
    pub(crate) fn read_admin_token(&self) -> Result<String> {
        let path = self.root.join("admin-token");
        let mut file = File::open(&path).with_context(|| format!("cannot read the operator's token {}", path.display()))?;
        let mode = file.metadata()?.mode();
        if mode & 0o077 != 0 {
            bail!("{} is readable by others (mode {:03o}): chmod 600 it", path.display(), mode & 0o777);
        }
        let mut token = String::new();
        file.read_to_string(&mut token)?;
        match token.trim() {
            "" => bail!("{} is empty: remove it, and the next start creates a new one", path.display()),
            token => Ok(token.to_owned()),
        }
    }
}

/// Disk space reserved for a start and for deletes on a full disk.
#[derive(Debug)]
pub(crate) struct Reserve {
    path: PathBuf,
    bytes: u64,
}

impl Reserve {
    /// The reserve of a data directory.
    pub(crate) fn in_directory(directory: &Path) -> Self {
        let bytes = match statvfs(directory) {
            Ok(disk) => (disk.f_blocks.saturating_mul(disk.f_frsize) / RESERVE_SHARE).clamp(MIN_RESERVE, RESERVE),
            Err(_) => MIN_RESERVE,
        };
        Self { path: directory.join("reserve"), bytes }
    }

    /// Releases the space. A failure shows when the space is needed.
    pub(crate) fn release(&self) {
        self.open(false).and_then(|file| file.set_len(0)).ok();
    }

    /// Reserves the space again, or as much as there is.
    pub(crate) fn keep(&self) {
        let Ok(file) = self.open(true) else { return };
        let mut bytes = self.bytes;
        while let Err(error) = fallocate(&file, FallocateFlags::empty(), 0, bytes) {
            match error {
                Errno::INTR => {}
                Errno::NOSPC | Errno::DQUOT if bytes > MIN_RESERVE / 8 => bytes -= bytes / 8,
                Errno::NOSPC | Errno::DQUOT => break,
                // The file system cannot preallocate, so write the bytes.
                _ => {
                    file.write_all_at(&vec![0; usize::try_from(self.bytes).unwrap_or(0)], 0).ok();
                    break;
                }
            }
        }
        file.write_all_at(RESERVE_HEAD, 0).ok();
    }

    /// Opens the reserve file, if a host made it.
    fn open(&self, create: bool) -> io::Result<File> {
        let mut options = private_file();
        let file = options.create(create).truncate(false).read(true).write(true).custom_flags(NOFOLLOW).open(&self.path)?;
        let metadata = file.metadata()?;
        let mut head = [0; RESERVE_HEAD.len()];
        let length = usize::try_from(metadata.len()).unwrap_or(usize::MAX).min(head.len());
        file.read_exact_at(&mut head[..length], 0)?;
        // An earlier version wrote only zeros; on a full disk the head may be truncated.
        let ours = RESERVE_HEAD.starts_with(&head[..length]) || metadata.len() <= MIN_RESERVE && head == [0; RESERVE_HEAD.len()];
        if metadata.is_file() && ours { Ok(file) } else { Err(ErrorKind::AlreadyExists.into()) }
    }
}

/// The absolute path of an existing data directory.
fn canonical_root(path: &Path) -> Result<PathBuf> {
    fs::canonicalize(path).with_context(|| {
        format!("there is no data directory at {} (name the host's data directory with --data or PLUGRACK_DATA)", path.display())
    })
}

/// Creates the `--run` directory if missing, and returns its absolute path.
fn make_run_dir(root: &Path, given: &Path) -> Result<PathBuf> {
    // Without a trailing slash, because that would follow a link.
    let given: PathBuf = given.components().collect();
    if given.is_symlink() {
        bail!("--run {} is a symbolic link, which plugrack does not follow there: name its target", given.display());
    }
    let cannot = || format!("cannot create the directory {} (choose another with --run)", given.display());
    make_private_dir(&given).with_context(cannot)?;
    let run = fs::canonicalize(&given).with_context(cannot)?;
    if run.starts_with(root) && run != root.join("run") {
        bail!("--run {} is inside the data directory: choose a directory outside it, or leave out --run", given.display());
    }
    Ok(run)
}

/// Creates a run directory, or checks that the existing one was made by a host. `option` is the argument that names it.
fn claim_run(run: &Path, option: &str) -> Result<()> {
    make_private_dir(run).with_context(|| format!("cannot make {}", run.display()))?;
    let marker = run.join(RUN_MARKER);
    if fs::symlink_metadata(&marker).is_ok_and(|file| file.is_file()) {
        return Ok(());
    }
    let names = fs::read_dir(run)
        .and_then(|entries| entries.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>())
        .with_context(|| format!("cannot read {}", run.display()))?;
    // A killed host of a version without a marker always left this socket.
    let former = names.iter().any(|name| name == HOST_SOCKET) && names.iter().all(|name| is_made_by_host(name));
    if let Some(name) = names.first().filter(|_| !former) {
        bail!(
            "{} holds files that plugrack did not make, such as {}, and plugrack empties that directory: \
             move them away, or choose another {option}",
            run.display(),
            name.display()
        );
    }
    private_file()
        .create_new(true)
        .write(true)
        .open(&marker)
        .map(drop)
        .or_else(|error| if error.kind() == ErrorKind::AlreadyExists { Ok(()) } else { Err(error) })
        .with_context(|| format!("cannot write {}", marker.display()))
}

/// Locks a directory, which `option` names. None if its file system has no locks. Also fails if a host that lost its lock file still
/// answers in the run directory.
fn lock_one(directory: &Path, run: &Path, option: &str) -> Result<Option<LockFile>> {
    let path = directory.join(LOCK);
    let cannot = || format!("cannot write {}", path.display());
    let mut file = open_lock(&path).with_context(cannot)?;
    // A command may hold it for a moment (`holder`), and a stopping host may still answer.
    let deadline = Instant::now() + ENDING_TIME;
    loop {
        let late = Instant::now() >= deadline;
        let is_served = is_served(run);
        match file.try_lock() {
            Ok(()) if !is_served => break,
            // The running host's lock file was removed. It will lock this new file, so release it.
            Ok(()) => file.unlock()?,
            Err(TryLockError::WouldBlock) if late => {
                let mut pid = String::new();
                file.read_to_string(&mut pid)?;
                bail!(
                    "another plugrack (process {}) runs on {}: stop it, or choose another {option}",
                    pid.trim(),
                    directory.display()
                )
            }
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => match Errno::from_io_error(&error) {
                Some(Errno::NOLCK | Errno::NOTSUP | Errno::NOSYS | Errno::INVAL) => return Ok(None),
                _ => return Err(error).with_context(|| format!("cannot lock {}", path.display())),
            },
        }
        if late {
            bail!(
                "another plugrack answers at {}, although its lock was removed: stop it, or choose another {option}",
                run.join(API_SOCKET).display()
            );
        }
        pause(ENDING_PAUSE);
    }
    write_pid(&mut file).with_context(cannot)?;
    Ok(Some(LockFile { path, file }))
}

/// The process id in a lock file; none if nobody holds the lock.
fn lock_holder(path: &Path) -> Option<String> {
    let mut file = OpenOptions::new().read(true).custom_flags(NOFOLLOW | NONBLOCK).open(path).ok()?;
    match file.try_lock_shared() {
        Err(TryLockError::WouldBlock) => {
            let mut pid = String::new();
            (&mut file).take(MAX_LOCK).read_to_string(&mut pid).ok()?;
            Some(pid.trim().to_owned())
        }
        _ => None,
    }
}

/// Whether a host answers at the command socket in a run directory.
fn is_served(run: &Path) -> bool {
    let Ok(address) = SocketAddrUnix::new(run.join(API_SOCKET)) else { return false };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let connected =
        socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).and_then(|socket| connect(socket, &address));
    // AGAIN: the host is there, and its backlog is full.
    matches!(connected, Ok(()) | Err(Errno::AGAIN))
}

/// Removes leftovers of hosts in a run directory, except its marker and its lock.
fn sweep(run: &Path, has_lock: bool) -> io::Result<()> {
    let found = fs::read_dir(run)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    for path in found {
        let name = path.file_name().unwrap_or_default();
        if name == RUN_MARKER || has_lock && name == LOCK {
            continue;
        }
        if !is_made_by_host(name) && !path.is_symlink() {
            log::warn!("{} was not made by plugrack, so it stays", path.display());
            continue;
        }
        match remove_from_run(run, path.clone()) {
            Err(error) if !path.is_dir() => return Err(error),
            Err(error) => log::warn!("{} cannot be removed: {error}", path.display()),
            Ok(()) => {}
        }
    }
    Ok(())
}

/// Removes a host's leftovers in its run directory, unless the directory was replaced.
fn leave(run: &Path, has_lock: bool) -> io::Result<()> {
    let marker = run.join(RUN_MARKER);
    if !fs::symlink_metadata(&marker).is_ok_and(|file| file.is_file()) || run.is_symlink() {
        return Ok(());
    }
    sweep(run, has_lock)?;
    // If something stays, such as the lock, the marker tells the next host that the directory is a host's.
    if fs::read_dir(run)?.count() == 1 { fs::remove_file(marker) } else { Ok(()) }
}

/// Removes a path in a run directory, if it exists.
///
/// A plugin may have filled its directory there. So each nested directory is first moved up into the run directory: no depth is too
/// much, and plugins, which cannot write there, cannot swap it for a link.
fn remove_from_run(run: &Path, path: PathBuf) -> io::Result<()> {
    let mut left = vec![path];
    while let Some(path) = left.pop() {
        let is_dir = match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            metadata => metadata?.is_dir(),
        };
        if !is_dir {
            fs::remove_file(&path)?;
            continue;
        }
        for entry in fs::read_dir(&path)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                let moved = run.join(format!("{}.gone", Uuid::new_v4()));
                fs::rename(entry.path(), &moved)?;
                left.push(moved);
            } else {
                fs::remove_file(entry.path())?;
            }
        }
        fs::remove_dir(&path)?;
    }
    Ok(())
}

/// Whether hosts use this name in the run directory: sockets, the address, directories of plugins, directories that are being removed,
/// and body files.
fn is_made_by_host(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    matches!(&*name, RUN_MARKER | "listen" | "listen.new")
        || name.starts_with(".tmp")
        || [".sock", ".d", ".gone"].iter().any(|end| name.ends_with(end))
}

/// Refuses a link where the host changes modes and owners and removes contents.
fn check_no_link(path: &Path) -> Result<()> {
    if path.is_symlink() {
        return Err(anyhow!(
            "{} is a symbolic link, which plugrack does not follow there: put a directory or a bind mount in its place, \
             or choose another --data",
            path.display()
        ));
    }
    Ok(())
}

/// Checks that the path of a socket fits in an address.
///
/// # Errors
/// A sentence that names the path, the limit and the fix.
pub(crate) fn check_socket_path(path: &Path) -> Result<(), String> {
    match path.as_os_str().len() {
        0..=MAX_SOCKET_PATH => Ok(()),
        length => Err(format!(
            "the socket {} has a path of {length} bytes, over the system's limit of {MAX_SOCKET_PATH}: use a shorter --data, or set --run to a directory with a short \
             path, such as /run/plugrack-host",
            path.display()
        )),
    }
}

/// Creates a directory that only its owner can enter, and its parents.
pub(crate) fn make_private_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(PRIVATE).create(path)
}

/// Options for a file that only its owner can read.
pub(crate) fn private_file() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.mode(0o600);
    options
}
