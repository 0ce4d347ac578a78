//! The data directory: where everything is that the host keeps, who may read it, and the lock that lets only one host in.

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

/// The mode of a directory for its owner alone.
const PRIVATE: u32 = 0o700;

/// The mode of a directory that others can pass through, to what is theirs inside, and not list.
const PASSABLE: u32 = 0o711;

/// Most bytes set aside: as many as a transaction of deletes may take in the database's log.
const RESERVE: u64 = 4 * 1024 * 1024;

/// Fewest bytes set aside, on a small disk: what a start needs. The index of the database's log is 32 KiB (SQLite's smallest), 64 KiB are
/// held for the log, and there are a few small files.
const MIN_RESERVE: u64 = 128 * 1024;

/// The part of the whole disk that is set aside at most.
const RESERVE_SHARE: u64 = 64;

/// What the reserve begins with, so that no other file of this name is taken for it.
const RESERVE_HEAD: &[u8] = b"plugrack: space for a full disk\n";

/// The empty file in the run directory that says that the host has made it.
const RUN_MARKER: &str = ".plugrack";

/// The name of the lock's file, in the data directory and in the directory of `--run`.
const LOCK: &str = "lock";

/// The name of the host's socket for the plugins' calls.
const HOST_SOCKET: &str = "host.sock";

/// The name of the host's socket for the operator's commands.
const API_SOCKET: &str = "api.sock";

/// Longest content of `run-dir` in bytes: the longest path (`PATH_MAX`, without its closing zero) and a line end.
const MAX_RUN_DIR: u64 = 4096;

/// Longest content of the lock's file in bytes: a process id and a line end.
const MAX_LOCK: u64 = 16;

/// Time in which a host that is ending may still hold the lock, or answer at its socket.
const ENDING_TIME: Duration = Duration::from_millis(500);

/// Pause between two tries in that time.
const ENDING_PAUSE: Duration = Duration::from_millis(20);

/// Keeps a pipe that is where a file should be from blocking the one who opens it.
const NONBLOCK: i32 = OFlags::NONBLOCK.bits().cast_signed();

/// Has a link at the end of a path refused.
const NOFOLLOW: i32 = OFlags::NOFOLLOW.bits().cast_signed();

/// Paths of the host's files: below the data directory, and below the directory of `--run` where one is given. All are absolute.
#[derive(Debug, Clone)]
pub(crate) struct DataDir {
    root: PathBuf,
    /// Where sockets and what else holds only while the host runs are.
    run: PathBuf,
}

/// Held by the host that uses a data directory; freed by the kernel however the host ends.
#[derive(Debug)]
pub(crate) struct Lock {
    files: Vec<LockFile>,
}

impl Lock {
    /// The locked files: that of the data directory, and, with `--run`, that of its directory before it.
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

/// What became of the lock.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Held {
    /// It is held.
    Still,
    /// Its file was removed or replaced, and the one that is there now is held.
    Again,
    /// Another process holds the file that is there now.
    ByAnother,
}

impl LockFile {
    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Looks whether the file at the path is the one that is locked, and locks what is there otherwise.
    ///
    /// # Errors
    /// The file cannot be made or read.
    pub(crate) fn keep(&mut self) -> io::Result<Held> {
        let ours = self.file.metadata()?;
        if fs::symlink_metadata(&self.path).is_ok_and(|found| (found.dev(), found.ino()) == (ours.dev(), ours.ino())) {
            return Ok(Held::Still);
        }
        let mut file = open_lock(&self.path)?;
        // A host that is about to be refused, or a command, may hold it for a moment.
        let deadline = Instant::now() + ENDING_TIME;
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if Instant::now() >= deadline => return Ok(Held::ByAnother),
                Err(TryLockError::WouldBlock) => pause(ENDING_PAUSE),
                Err(TryLockError::Error(error)) => return Err(error),
            }
        }
        // The id is for people; what counts is the lock.
        write_pid(&mut file).ok();
        self.file = file;
        Ok(Held::Again)
    }
}

/// Opens the lock's file. One that is something else is left as it is.
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
    /// Opens a data directory, and makes it with mode 0700 where it is missing. So it does with the directory of `--run`.
    pub(crate) fn create(path: &Path, run: Option<&Path>) -> Result<Self> {
        make_private_dir(path)
            .with_context(|| format!("cannot make the data directory {} (choose another with --data)", path.display()))?;
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

    /// Whether the sockets are in a directory of `--run`.
    fn is_elsewhere(&self) -> bool {
        self.run != self.spool()
    }

    /// The file that says where the sockets are when they are not in `run`.
    fn run_dir_file(&self) -> PathBuf {
        self.root.join("run-dir")
    }

    /// The directory that `run-dir` names, if there is such a file.
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
                bail!("{} does not hold the path that plugrack writes there: remove it, and restart the host", path.display())
            }
        }
    }

    /// Tells the operator's commands, and other hosts, where the sockets are. Only for the holder of the lock.
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

    /// Whether `run-dir` says where the sockets of this host are.
    pub(crate) fn is_announced(&self) -> Result<bool> {
        Ok(self.named_run()?.as_ref() == Some(&self.run).filter(|_| self.is_elsewhere()))
    }

    /// The other host, in words, that runs where `run-dir` says.
    pub(crate) fn other_host(&self) -> Result<Option<String>> {
        let Some(named) = self.named_run()?.filter(|named| *named != self.run) else { return Ok(None) };
        let process = match lock_holder(&named.join(LOCK)) {
            Some(pid) => format!(" (process {pid})"),
            None if is_served(&named) => String::new(),
            None => return Ok(None),
        };
        Ok(Some(format!("another plugrack{process} runs on {} with --run {}", self.root.display(), named.display())))
    }

    /// The sockets for plugins' calls of hosts that may have run on this data directory before, with other settings.
    ///
    /// # Errors
    /// `run-dir` cannot be read.
    pub(crate) fn former_host_sockets(&self) -> Result<Vec<PathBuf>> {
        let former = [Some(self.spool()), self.named_run()?];
        Ok(former.into_iter().flatten().filter(|run| *run != self.run).map(|run| run.join(HOST_SOCKET)).collect())
    }

    /// Opens a data directory that must be there, as the last host on it was set.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let root = canonical_root(path)?;
        let mut data = Self { run: root.join("run"), root };
        if let Some(named) = data.named_run()? {
            data.run = named;
        }
        Ok(data)
    }

    /// Sets who may pass: other users, where plugins run as users of their own, and nobody otherwise. Only for the holder of the lock.
    pub(crate) fn set_modes(&self, shared: bool) -> io::Result<()> {
        let mode = if shared { PASSABLE } else { PRIVATE };
        for dir in [self.run(), self.spool(), self.logs(), self.all_plugin_data()] {
            let dir = open(&dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
            fchmod(dir, Mode::from_raw_mode(mode))?;
        }
        // What is inside is closed by itself. So the operator's own mode is kept, but for what the line below has opened.
        let found = fs::metadata(&self.root)?.mode() & 0o7777;
        let wanted = if shared {
            found | (PASSABLE & !PRIVATE)
        } else {
            Some(found).filter(|found| *found != PASSABLE).unwrap_or(PRIVATE)
        };
        fs::set_permissions(&self.root, Permissions::from_mode(wanted))
    }

    /// Takes the directory for this process, and with it the directory of `--run`.
    ///
    /// With `--run` the lock of that directory is the one that counts. That of the data directory is held as well where its file
    /// system can, so that a host without `--run`, or with another one, is refused whatever happens to `run-dir`.
    pub(crate) fn lock(&self) -> Result<Lock> {
        let mut files = Vec::new();
        // A command finds none after a boot, where the directory was in memory.
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
        // One that started at the same time may have written its directory meanwhile.
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

    /// The process that holds the lock, as its file has it; none where nobody does.
    pub(crate) fn holder(&self) -> Option<String> {
        [&self.run, &self.root].into_iter().find_map(|directory| lock_holder(&directory.join(LOCK)))
    }

    /// The database.
    pub(crate) fn database(&self) -> PathBuf {
        self.root.join("plugrack.db")
    }

    /// Sockets and what else holds only while the host runs.
    pub(crate) fn run(&self) -> PathBuf {
        self.run.clone()
    }

    /// Where bodies of requests are kept that are too large for memory: always on the disk of the data directory, since the directory
    /// of `--run` may be in memory. It is the run directory unless `--run` is given.
    pub(crate) fn spool(&self) -> PathBuf {
        self.root.join("run")
    }

    /// The host's socket for the plugins' calls.
    pub(crate) fn host_socket(&self) -> PathBuf {
        self.run.join(HOST_SOCKET)
    }

    /// The host's socket for the operator's commands.
    pub(crate) fn api_socket(&self) -> PathBuf {
        self.run.join(API_SOCKET)
    }

    /// The address the host listens on, as a file.
    pub(crate) fn listen(&self) -> PathBuf {
        self.run().join("listen")
    }

    /// A plugin's directory among the sockets. An id has no dot, so that no plugin's is the host's own file.
    fn plugin_run(&self, id: &str) -> PathBuf {
        self.run().join(format!("{id}.d"))
    }

    /// Where a plugin listens; an update that is started beside it, at a socket with a number.
    pub(crate) fn plugin_socket(&self, id: &str, update: Option<u64>) -> PathBuf {
        self.plugin_run(id).join(update.map_or("sock".to_owned(), |number| format!("sock.{number}")))
    }

    /// Makes a plugin's own directories, where they are missing, and names them.
    pub(crate) fn make_plugin_dirs(&self, id: &str) -> io::Result<[PathBuf; 2]> {
        let dirs = [self.plugin_data(id), self.plugin_run(id)];
        dirs.iter().try_for_each(|dir| make_private_dir(dir))?;
        Ok(dirs)
    }

    /// Removes a plugin's directory among the sockets.
    pub(crate) fn remove_plugin_run(&self, id: &str) -> io::Result<()> {
        remove_from_run(&self.run, self.plugin_run(id))
    }

    /// Deletes a plugin's own directory and its log. What is not there is deleted already.
    pub(crate) fn remove_plugin(&self, id: &str) -> io::Result<()> {
        self.remove_plugin_run(id)?;
        let missing = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
        // A link is not followed.
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

    /// The log files.
    pub(crate) fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }

    /// The log of a plugin.
    pub(crate) fn log(&self, id: &str) -> PathBuf {
        self.logs().join(format!("{id}.log"))
    }

    /// A plugin's own directory.
    pub(crate) fn plugin_data(&self, id: &str) -> PathBuf {
        self.all_plugin_data().join(id)
    }

    /// Where all of these are.
    fn all_plugin_data(&self) -> PathBuf {
        self.root.join("plugin-data")
    }

    /// Where plugins are looked for unless told otherwise.
    pub(crate) fn plugins(&self) -> PathBuf {
        self.root.join("plugins")
    }

    /// Removes what hosts have left in the run directory and beside it, and links, but nothing that they lead to. What else is there
    /// stays, and so does what cannot be removed of a plugin's own; both are logged. Only for the holder of the lock.
    pub(crate) fn sweep_run(&self) -> io::Result<()> {
        sweep(&self.run, self.is_elsewhere())?;
        if self.is_elsewhere() { sweep(&self.spool(), false) } else { Ok(()) }
    }

    /// The same at the end of the host, which leaves the directories empty, but for the lock. One that is gone, or is another one by
    /// now, is left alone.
    pub(crate) fn leave_run(&self) -> io::Result<()> {
        leave(&self.run, self.is_elsewhere())?;
        if self.is_elsewhere() { leave(&self.spool(), false) } else { Ok(()) }
    }

    /// The space that is set aside on the disk. Only for the holder of the lock.
    pub(crate) fn reserve(&self) -> Reserve {
        Reserve::in_directory(&self.root)
    }

    /// The operator's token, made on first run.
    pub(crate) fn admin_token(&self) -> Result<String> {
        match self.read_admin_token() {
            Ok(token) => Ok(token),
            Err(error) if error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::NotFound) => {
                // Two random UUIDs are 244 random bits.
                let token = format!("{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple());
                let path = self.root.join("admin-token");
                self.write_whole(&path, format!("{token}\n").as_bytes())
                    .with_context(|| format!("cannot write {}", path.display()))?;
                Ok(token)
            }
            Err(error) => Err(error),
        }
    }

    /// Writes a file of the data directory beside its path and renames it, so that it is there whole or not at all.
    fn write_whole(&self, path: &Path, content: &[u8]) -> io::Result<()> {
        let mut file = tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o600)).tempfile_in(&self.root)?;
        file.write_all(content)?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        Ok(())
    }

    /// The operator's token, which a host has made.
    pub(crate) fn read_admin_token(&self) -> Result<String> {
        let path = self.root.join("admin-token");
        let mut file = File::open(&path).with_context(|| format!("cannot read the operator's token {}", path.display()))?;
        let mode = file.metadata()?.mode();
        if mode & 0o077 != 0 {
            bail!("{} may be read by others (mode {:03o}): chmod 600 it", path.display(), mode & 0o777);
        }
        let mut token = String::new();
        file.read_to_string(&mut token)?;
        match token.trim() {
            "" => bail!("{} is empty: remove it, and the next start makes a new one", path.display()),
            token => Ok(token.to_owned()),
        }
    }
}

/// Space that is set aside on a disk, for the start of a host and for deletes when the disk is full.
#[derive(Debug)]
pub(crate) struct Reserve {
    path: PathBuf,
    bytes: u64,
}

impl Reserve {
    /// That of a data directory.
    pub(crate) fn in_directory(directory: &Path) -> Self {
        let bytes = match statvfs(directory) {
            Ok(disk) => (disk.f_blocks.saturating_mul(disk.f_frsize) / RESERVE_SHARE).clamp(MIN_RESERVE, RESERVE),
            Err(_) => MIN_RESERVE,
        };
        Self { path: directory.join("reserve"), bytes }
    }

    /// Gives it back. Where that fails, what needs the space says so.
    pub(crate) fn release(&self) {
        self.open(false).and_then(|file| file.set_len(0)).ok();
    }

    /// Sets it aside again, or as much of it as there is space for.
    pub(crate) fn keep(&self) {
        let Ok(file) = self.open(true) else { return };
        let mut bytes = self.bytes;
        while let Err(error) = fallocate(&file, FallocateFlags::empty(), 0, bytes) {
            match error {
                Errno::INTR => {}
                Errno::NOSPC | Errno::DQUOT if bytes > MIN_RESERVE / 8 => bytes -= bytes / 8,
                Errno::NOSPC | Errno::DQUOT => break,
                // The file system cannot, so it is written.
                _ => {
                    file.write_all_at(&vec![0; usize::try_from(self.bytes).unwrap_or(0)], 0).ok();
                    break;
                }
            }
        }
        file.write_all_at(RESERVE_HEAD, 0).ok();
    }

    /// Opens the file, where it is what a host has made.
    fn open(&self, create: bool) -> io::Result<File> {
        let mut options = private_file();
        let file = options.create(create).truncate(false).read(true).write(true).custom_flags(NOFOLLOW).open(&self.path)?;
        let metadata = file.metadata()?;
        let mut head = [0; RESERVE_HEAD.len()];
        let length = usize::try_from(metadata.len()).unwrap_or(usize::MAX).min(head.len());
        file.read_exact_at(&mut head[..length], 0)?;
        // An earlier version wrote zeros alone; one that a full disk cut short has the beginning of the head at most.
        let ours = RESERVE_HEAD.starts_with(&head[..length]) || metadata.len() <= MIN_RESERVE && head == [0; RESERVE_HEAD.len()];
        if metadata.is_file() && ours { Ok(file) } else { Err(ErrorKind::AlreadyExists.into()) }
    }
}

/// A data directory as an absolute path.
fn canonical_root(path: &Path) -> Result<PathBuf> {
    fs::canonicalize(path).with_context(|| {
        format!("there is no data directory at {} (name the host's with --data or PLUGRACK_DATA)", path.display())
    })
}

/// Makes the directory of `--run` where it is missing, and gives its absolute path.
fn make_run_dir(root: &Path, given: &Path) -> Result<PathBuf> {
    // Without a slash at the end, behind which a link would be followed.
    let given: PathBuf = given.components().collect();
    if given.is_symlink() {
        bail!(
            "--run {} is a symbolic link, which plugrack does not follow there: name the directory that it leads to",
            given.display()
        );
    }
    let cannot = || format!("cannot make the directory {} (choose another with --run)", given.display());
    make_private_dir(&given).with_context(cannot)?;
    let run = fs::canonicalize(&given).with_context(cannot)?;
    if run.starts_with(root) && run != root.join("run") {
        bail!("--run {} is in the data directory: choose a directory outside it, or leave the setting out", given.display());
    }
    Ok(run)
}

/// Makes a run directory, or checks that the one that is there is the host's own to empty. The option is the one that names it.
fn claim_run(run: &Path, option: &str) -> Result<()> {
    make_private_dir(run).with_context(|| format!("cannot make {}", run.display()))?;
    let marker = run.join(RUN_MARKER);
    if fs::symlink_metadata(&marker).is_ok_and(|file| file.is_file()) {
        return Ok(());
    }
    let names = fs::read_dir(run)
        .and_then(|entries| entries.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>())
        .with_context(|| format!("cannot read {}", run.display()))?;
    // Of a host of a version that made no marker, and was killed: it always had this socket.
    let former = names.iter().any(|name| name == HOST_SOCKET) && names.iter().all(|name| is_made_by_host(name));
    if let Some(name) = names.first().filter(|_| !former) {
        bail!(
            "{} has files that plugrack did not make, such as {}, and plugrack empties that directory: \
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

/// Locks a directory, which an option names. Nothing where its file system has no locks. A host that has lost this lock still answers
/// in the run directory.
fn lock_one(directory: &Path, run: &Path, option: &str) -> Result<Option<LockFile>> {
    let path = directory.join(LOCK);
    let cannot = || format!("cannot write {}", path.display());
    let mut file = open_lock(&path).with_context(cannot)?;
    // A command may look at it just now (`holder`), and a host that is ending may still answer.
    let deadline = Instant::now() + ENDING_TIME;
    loop {
        let late = Instant::now() >= deadline;
        let is_served = is_served(run);
        match file.try_lock() {
            Ok(()) if !is_served => break,
            // The lock of the host that runs was removed. It takes this one, which must not look as if it were held.
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
                "another plugrack answers at {}, though its lock was removed: stop it, or choose another {option}",
                run.join(API_SOCKET).display()
            );
        }
        pause(ENDING_PAUSE);
    }
    write_pid(&mut file).with_context(cannot)?;
    Ok(Some(LockFile { path, file }))
}

/// The process that holds a lock, as its file has it; none where nobody does.
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

/// Whether a host answers at the socket for the operator's commands in a run directory.
fn is_served(run: &Path) -> bool {
    let Ok(address) = SocketAddrUnix::new(run.join(API_SOCKET)) else { return false };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let connected =
        socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).and_then(|socket| connect(socket, &address));
    // The second: it has its hands full.
    matches!(connected, Ok(()) | Err(Errno::AGAIN))
}

/// Removes what hosts have left in a run directory, but not its marker, nor its lock, where it has one.
fn sweep(run: &Path, has_lock: bool) -> io::Result<()> {
    let found = fs::read_dir(run)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    for path in found {
        let name = path.file_name().unwrap_or_default();
        if name == RUN_MARKER || has_lock && name == LOCK {
            continue;
        }
        if !is_made_by_host(name) && !path.is_symlink() {
            log::warn!("{} was not made by plugrack, and stays", path.display());
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

/// Removes what a host has left in a run directory that is still the one it has made.
fn leave(run: &Path, has_lock: bool) -> io::Result<()> {
    let marker = run.join(RUN_MARKER);
    if !fs::symlink_metadata(&marker).is_ok_and(|file| file.is_file()) || run.is_symlink() {
        return Ok(());
    }
    sweep(run, has_lock)?;
    // Where something is left, such as the lock, the next host finds by the marker that the directory is the host's.
    if fs::read_dir(run)?.count() == 1 { fs::remove_file(marker) } else { Ok(()) }
}

/// Removes what is at a path in a run directory, if anything is.
///
/// A plugin may have filled its directory there. So each directory inside is moved up into the run directory before it is looked
/// into: no depth is too much, and where plugins have no way to write none of them can put a link in its place.
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

/// Whether hosts make things of this name in the run directory: sockets, the address, directories of plugins, and for a moment those
/// that are being removed and files of bodies.
fn is_made_by_host(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    matches!(&*name, RUN_MARKER | "listen" | "listen.new")
        || name.starts_with(".tmp")
        || [".sock", ".d", ".gone"].iter().any(|end| name.ends_with(end))
}

/// Refuses a link where the host changes modes and owners, and removes what is inside.
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

/// Whether the path of a socket fits an address.
///
/// # Errors
/// A sentence that names the path, the limit and the way out.
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

/// Makes a directory that only its owner can enter, with its parents.
pub(crate) fn make_private_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(PRIVATE).create(path)
}

/// Options for a file that only its owner can read.
pub(crate) fn private_file() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.mode(0o600);
    options
}
