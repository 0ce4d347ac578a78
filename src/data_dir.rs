//! The data directory: where everything is that the host keeps, who may read it, and the lock that lets only one host in.

use anyhow::{Context, Result, bail};
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Longest path of a Unix socket in bytes: `sun_path` of `sockaddr_un` is 108 with the closing zero, see unix(7).
const MAX_SOCKET_PATH: usize = 107;

/// The mode of a directory for its owner alone.
const PRIVATE: u32 = 0o700;

/// The mode of a directory that others can pass through, to what is theirs inside, and not list.
const PASSABLE: u32 = 0o711;

/// Bytes set aside so that a host can start on a full disk: 32 KiB for the index of the database's log (SQLite's smallest), and
/// a few small files.
const RESERVE: usize = 64 * 1024;

/// Paths below the data directory. All are absolute.
#[derive(Debug, Clone)]
pub(crate) struct DataDir {
    root: PathBuf,
}

/// Held by the host that uses a data directory; freed by the kernel however the host ends.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

impl DataDir {
    /// Opens a data directory, and makes it with mode 0700 where it is missing.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        make_private_dir(path)
            .with_context(|| format!("cannot make the data directory {} (choose another with --data)", path.display()))?;
        let data = Self::open(path)?;
        check_socket_path(&data.host_socket()).map_err(anyhow::Error::msg)?;
        for dir in [data.run(), data.logs(), data.plugin_data("")] {
            make_private_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        Ok(data)
    }

    /// Opens a data directory that must be there.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let root = fs::canonicalize(path).with_context(|| {
            format!("there is no data directory at {} (name the host's with --data or PLUGRACK_DATA)", path.display())
        })?;
        Ok(Self { root })
    }

    /// Sets who may pass: other users, where plugins run as users of their own, and nobody otherwise. Only for the holder of the lock.
    pub(crate) fn set_modes(&self, shared: bool) -> io::Result<()> {
        let mode = if shared { PASSABLE } else { PRIVATE };
        for dir in [self.run(), self.logs(), self.plugin_data("")] {
            fs::set_permissions(dir, Permissions::from_mode(mode))?;
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

    /// Takes the directory for this process.
    pub(crate) fn lock(&self) -> Result<Lock> {
        let path = self.root.join("lock");
        let cannot = || format!("cannot write {}", path.display());
        let opened = private_file().create(true).truncate(false).read(true).write(true).open(&path);
        let mut file = opened.with_context(cannot)?;
        match file.try_lock() {
            Ok(()) => {
                file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).with_context(cannot)?;
                Ok(Lock { _file: file })
            }
            Err(TryLockError::WouldBlock) => {
                let mut pid = String::new();
                file.read_to_string(&mut pid)?;
                bail!(
                    "another plugrack (process {}) runs on {}: stop it, or choose another --data",
                    pid.trim(),
                    self.root.display()
                )
            }
            Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
        }
    }

    /// The database.
    pub(crate) fn database(&self) -> PathBuf {
        self.root.join("plugrack.db")
    }

    /// Sockets and what else holds only while the host runs.
    pub(crate) fn run(&self) -> PathBuf {
        self.root.join("run")
    }

    /// The host's socket for the plugins' calls.
    pub(crate) fn host_socket(&self) -> PathBuf {
        self.run().join("host.sock")
    }

    /// The host's socket for the operator's commands.
    pub(crate) fn api_socket(&self) -> PathBuf {
        self.run().join("api.sock")
    }

    /// The host's socket for its own gate.
    pub(crate) fn http_socket(&self) -> PathBuf {
        self.run().join("http.sock")
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
        self.remove_from_run(self.plugin_run(id))
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
        self.root.join("plugin-data").join(id)
    }

    /// Where plugins are looked for unless told otherwise.
    pub(crate) fn plugins(&self) -> PathBuf {
        self.root.join("plugins")
    }

    /// Empties the run directory. What cannot be removed of a plugin's own stays, and is said. Only for the holder of the lock.
    pub(crate) fn sweep_run(&self) -> io::Result<()> {
        let found = fs::read_dir(self.run())?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
        for path in found {
            match self.remove_from_run(path.clone()) {
                Err(error) if !path.is_dir() => return Err(error),
                Err(error) => log::warn!("{} cannot be removed: {error}", path.display()),
                Ok(()) => {}
            }
        }
        Ok(())
    }

    /// Removes what is at a path in the run directory, if anything is.
    ///
    /// A plugin may have filled its directory there. So each directory inside is moved up into the run directory before it is looked
    /// into: no depth is too much, and where plugins have no way to write none of them can put a link in its place.
    fn remove_from_run(&self, path: PathBuf) -> io::Result<()> {
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
                    let moved = self.run().join(format!("{}.gone", Uuid::new_v4()));
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

    /// Gives back what an earlier host has set aside on the disk. Only for the holder of the lock.
    pub(crate) fn free_reserve(&self) {
        // Where it is not there, or cannot be removed, what needs the space says so.
        fs::remove_file(self.reserve()).unwrap_or_default();
    }

    /// Sets space aside for the next start, as much as there is up to [`RESERVE`].
    pub(crate) fn keep_reserve(&self) {
        let file = private_file().create(true).truncate(true).write(true).open(self.reserve());
        file.and_then(|mut file| file.write_all(&[0; RESERVE])).unwrap_or_default();
    }

    fn reserve(&self) -> PathBuf {
        self.root.join("reserve")
    }

    /// The operator's token, made on first run.
    pub(crate) fn admin_token(&self) -> Result<String> {
        match self.read_admin_token() {
            Ok(token) => Ok(token),
            Err(error) if error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::NotFound) => {
                // Two random UUIDs are 244 random bits.
                let token = format!("{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple());
                let path = self.root.join("admin-token");
                self.write_admin_token(&path, &token).with_context(|| format!("cannot write {}", path.display()))?;
                Ok(token)
            }
            Err(error) => Err(error),
        }
    }

    /// Writes it beside and renames it, so that a token is there whole or not at all.
    fn write_admin_token(&self, path: &Path, token: &str) -> io::Result<()> {
        let mut file = tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o600)).tempfile_in(&self.root)?;
        writeln!(file, "{token}")?;
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

/// Whether the path of a socket fits an address.
///
/// # Errors
/// A sentence that names the path, the limit and the way out.
pub(crate) fn check_socket_path(path: &Path) -> Result<(), String> {
    match path.as_os_str().len() {
        0..=MAX_SOCKET_PATH => Ok(()),
        length => Err(format!(
            "the socket {} has a path of {length} bytes, over the system's limit of {MAX_SOCKET_PATH}: use a shorter --data",
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
