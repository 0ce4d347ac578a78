//! The database: one writer thread, and a few readers. `schema.sql` is its shape.
//!
//! Every change goes to the writer, which runs all that wait in one transaction and answers after the commit is synced. So a
//! caller that got its answer knows that the change is on disk, and many callers share one sync. A change that fails is undone
//! alone, by a savepoint; when the commit itself fails nobody's change is acknowledged.

mod config;
pub(crate) mod events;
pub(crate) mod kv;
mod schema;
pub(crate) mod settings;
mod uids;

use kv::Limits;

use crate::data_dir::private_file;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use rusqlite::{Connection, OpenFlags};
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Changes that may wait for the writer; more is answered with `busy`. A few milliseconds' worth.
const WRITE_QUEUE: usize = 1024;

/// Most changes in one transaction, so that the first of them does not wait long for the last.
const MAX_BATCH: usize = 256;

/// How often expired keys are removed; until then they are merely not seen.
const SWEEP_EVERY: Duration = Duration::from_secs(60);

/// Connections kept open for reading: reads are short, and the machine is small.
const READERS: usize = 4;

/// Why the store could not do something.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum StoreError {
    /// A database of a later version of this program.
    #[error("the database has schema version {found}, this program knows {} at most: install a newer plugrack", schema::VERSION)]
    Newer {
        /// Its version.
        found: i64,
    },
    /// Somebody else's database.
    #[error("the file is not a plugrack database")]
    Foreign,
    /// The file cannot be made or opened.
    #[error("{0}")]
    File(Arc<std::io::Error>),
    /// An identity that somebody has changed by hand.
    #[error("the instance id in the database, {0:?}, is not a UUID")]
    BadInstanceId(String),
    /// The writer has more to do than it can.
    #[error("the store is busy")]
    Busy,
    /// The store is closing or has failed.
    #[error("the store is closed")]
    Closed,
    /// SQLite's own word.
    #[error("{0}")]
    Sqlite(Arc<rusqlite::Error>),
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(Arc::new(error))
    }
}

/// A change to be made in the writer's transaction. It says whether to keep it, and how to tell its caller of the commit.
type Change = Box<dyn FnOnce(&Connection) -> (bool, Reply) + Send>;

/// Tells a caller the outcome of the commit.
type Reply = Box<dyn FnOnce(Option<&StoreError>) + Send>;

/// The open database. Cheap to clone; when the last clone goes, what is queued is written and the file is closed.
#[derive(Clone)]
pub(crate) struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    path: PathBuf,
    changes: Option<Sender<Change>>,
    writer: Option<JoinHandle<()>>,
    readers: Mutex<Vec<Connection>>,
    limits: Limits,
}

/// The outcome of a change, to be had once it is committed.
pub(crate) struct Ticket<T, E> {
    outcome: Receiver<Result<T, E>>,
}

impl<T, E: From<StoreError>> Ticket<T, E> {
    /// Waits for the commit. It comes: the writer answers everything it took, and its end closes the channel.
    pub(crate) fn wait(self) -> Result<T, E> {
        self.outcome.recv().unwrap_or_else(|_| Err(StoreError::Closed.into()))
    }
}

impl Store {
    /// Opens the database at `path`, makes it on first run, and starts its writer.
    pub(crate) fn open(path: &Path, limits: Limits) -> Result<Self, StoreError> {
        // SQLite would make it readable by all; its other files take over the mode of this one.
        let file = private_file()
            .create(true)
            .append(true)
            .open(path)
            .and_then(|file| file.set_permissions(Permissions::from_mode(0o600)));
        file.map_err(|error| StoreError::File(Arc::new(error)))?;
        let mut connection = Connection::open(path)?;
        // First, for it finds out whether the file is ours to change.
        schema::migrate(&mut connection)?;
        schema::prepare(&connection)?;
        let (changes, queue) = bounded(WRITE_QUEUE);
        let writer = std::thread::Builder::new()
            .name("store-writer".into())
            .spawn(move || write_all(&connection, &queue, limits))
            .map_err(|_| StoreError::Closed)?;
        let (changes, writer) = (Some(changes), Some(writer));
        let inner = Inner { path: path.to_owned(), changes, writer, readers: Mutex::default(), limits };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Hands a change to the writer without waiting for it. Dropping the ticket does not drop the change.
    pub(crate) fn begin<T, E>(
        &self,
        change: impl FnOnce(&Connection) -> Result<T, E> + Send + 'static,
    ) -> Result<Ticket<T, E>, StoreError>
    where
        T: Send + 'static,
        E: From<StoreError> + Send + 'static,
    {
        let (reply, outcome) = bounded(1);
        let change: Change = Box::new(move |connection| {
            let result = change(connection);
            let keep = result.is_ok();
            let tell: Reply = Box::new(move |failed| {
                let result = match failed {
                    Some(error) if keep => Err(error.clone().into()),
                    _ => result,
                };
                // The caller may have gone; the change stands all the same.
                drop(reply.try_send(result));
            });
            (keep, tell)
        });
        let changes = self.inner.changes.as_ref().ok_or(StoreError::Closed)?;
        changes.try_send(change).map_err(|error| if error.is_full() { StoreError::Busy } else { StoreError::Closed })?;
        Ok(Ticket { outcome })
    }

    /// Makes a change and waits until it is committed and synced.
    pub(crate) fn write<T, E>(&self, change: impl FnOnce(&Connection) -> Result<T, E> + Send + 'static) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<StoreError> + Send + 'static,
    {
        self.begin(change)?.wait()
    }

    /// Waits until all that was begun before is committed.
    pub(crate) fn sync(&self) -> Result<(), StoreError> {
        self.write(|_| Ok(()))
    }

    /// Reads from what is committed.
    pub(crate) fn read<T, E: From<StoreError>>(&self, read: impl FnOnce(&Connection) -> Result<T, E>) -> Result<T, E> {
        let idle = self.inner.lock_readers().pop();
        let connection = match idle {
            Some(connection) => connection,
            None => self.inner.open_reader().map_err(StoreError::from)?,
        };
        let result = read(&connection);
        let mut readers = self.inner.lock_readers();
        if readers.len() < READERS {
            readers.push(connection);
        }
        result
    }
}

impl Inner {
    fn lock_readers(&self) -> std::sync::MutexGuard<'_, Vec<Connection>> {
        // A panic while the list was held leaves a list all the same.
        self.readers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open_reader(&self) -> rusqlite::Result<Connection> {
        let connection =
            Connection::open_with_flags(&self.path, OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
        schema::prepare_reader(&connection)?;
        Ok(connection)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.changes = None;
        if self.writer.take().is_some_and(|writer| writer.join().is_err()) {
            log::error!("the store's writer panicked");
        }
    }
}

/// The writer thread: one transaction for all changes that wait, until the last sender is gone.
fn write_all(connection: &Connection, queue: &Receiver<Change>, limits: Limits) {
    let mut next_sweep = Instant::now() + SWEEP_EVERY;
    loop {
        match queue.recv_deadline(next_sweep) {
            Ok(first) => write_batch(connection, std::iter::once(first).chain(queue.try_iter().take(MAX_BATCH - 1))),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        if Instant::now() >= next_sweep {
            let sweep: Change = Box::new(move |connection| {
                let swept = kv::sweep_all(connection, limits);
                (
                    swept.is_ok(),
                    Box::new(move |_| swept.unwrap_or_else(|error| log::warn!("store: expired keys were not removed: {error}"))),
                )
            });
            write_batch(connection, std::iter::once(sweep));
            next_sweep = Instant::now() + SWEEP_EVERY;
        }
    }
}

/// Commits changes together and tells their callers.
fn write_batch(connection: &Connection, batch: impl Iterator<Item = Change>) {
    let mut replies = Vec::new();
    let failed = commit(connection, batch, &mut replies).err().map(StoreError::from);
    if let Some(error) = &failed {
        log::error!("store: {error}: {} changes were not written", replies.len());
        if !connection.is_autocommit() {
            connection.execute_batch("ROLLBACK").unwrap_or_else(|error| log::error!("store: {error}"));
        }
    }
    for reply in replies {
        reply(failed.as_ref());
    }
}

/// Runs changes in one transaction, each in a savepoint of its own, and commits. Every change it ran has its reply in
/// `replies`, also on an error; the rest of the batch is dropped, which closes its callers' channels.
fn commit(connection: &Connection, batch: impl Iterator<Item = Change>, replies: &mut Vec<Reply>) -> rusqlite::Result<()> {
    let execute = |sql| connection.prepare_cached(sql)?.execute([]).map(drop);
    execute("BEGIN IMMEDIATE")?;
    for change in batch {
        execute("SAVEPOINT change")?;
        let (keep, reply) = change(connection);
        replies.push(reply);
        if !keep {
            execute("ROLLBACK TO change")?;
        }
        execute("RELEASE change")?;
    }
    execute("COMMIT")
}

/// Milliseconds since 1970-01-01 UTC, as the database keeps time.
pub(crate) fn now_ms() -> i64 {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(elapsed.as_millis()).unwrap_or(i64::MAX)
}
