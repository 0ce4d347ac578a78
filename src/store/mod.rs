//! The database: one writer thread, and a few readers. `schema.sql` is its shape.
//!
//! Every change goes to the writer, which runs all that wait in one transaction and answers after the commit is synced. So a
//! caller that got its answer knows that the change is on disk, and many callers share one sync. A change that fails is undone
//! alone, by a savepoint where it has several steps; when the commit itself fails nobody's change is acknowledged. When no
//! transaction can be begun, all that wait are refused together, so that nobody waits longer than for one try.

mod config;
pub(crate) mod events;
mod fault;
pub(crate) mod kv;
pub(crate) mod licenses;
pub(crate) mod programs;
mod schema;
pub(crate) mod settings;
mod uids;

pub(crate) use fault::{MaybeFault, StoreError};

use fault::Troubles;
use kv::{Accounts, Limits};

use crate::data_dir::private_file;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use rusqlite::{Connection, OpenFlags};
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Changes that may wait for the writer; more is answered with `busy`. A few milliseconds' worth.
const WRITE_QUEUE: usize = 1024;

/// Most changes in one transaction, so that the first of them does not wait long for the last.
const MAX_BATCH: usize = 256;

/// Size in bytes of the write-ahead log from which on nothing is written until it is written back to the database. It comes to
/// this only while another program reads without end: a backup is done long before. Four plugins' keys and values by default.
const MAX_WAL: u64 = 256 * 1024 * 1024;

/// How often expired keys are removed; until then they are merely not seen.
const SWEEP_EVERY: Duration = Duration::from_secs(60);

/// Most connections for reading: reads are short, and the machine is small. To open one takes longer than many reads.
const READERS: usize = 4;

/// Time a read waits for one of them, after which it is answered with `busy`.
const READER_TIME: Duration = Duration::from_secs(5);

/// The transaction that the writer makes changes in.
pub(crate) struct Transaction<'a> {
    connection: &'a Connection,
    accounts: Accounts,
}

/// A change to be made in a transaction, or to be refused when there is none.
struct Change {
    /// Whether it leaves something to be undone where it fails. A savepoint costs more than a small write.
    savepoint: bool,
    make: Box<Make>,
}

type Make = dyn FnOnce(Result<&mut Transaction<'_>, &StoreError>) -> Made + Send;

/// A change that was made.
struct Made {
    /// Whether it is to be kept: it did all of what it should.
    keep: bool,
    /// What the store itself did to it.
    fault: Option<StoreError>,
    reply: Reply,
}

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
    readers: Mutex<Readers>,
    reader_freed: Condvar,
    limits: Limits,
    troubles: Arc<Troubles>,
}

/// The connections for reading.
#[derive(Default)]
struct Readers {
    idle: Vec<Connection>,
    /// All there are, idle or in use.
    open: usize,
}

/// The right to one of them, and the connection while nobody reads on it.
struct Reader<'a> {
    inner: &'a Inner,
    connection: Option<Connection>,
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        let mut readers = self.inner.lock_readers();
        match self.connection.take() {
            Some(connection) => readers.idle.push(connection),
            None => readers.open -= 1,
        }
        drop(readers);
        self.inner.reader_freed.notify_one();
    }
}

/// The outcome of a change, to be had once it is committed.
pub(crate) struct Ticket<T, E> {
    // Not of crossbeam's: those spin before they sleep, which a commit always outlasts.
    outcome: oneshot::Receiver<Result<T, E>>,
}

impl<T, E: From<StoreError>> Ticket<T, E> {
    /// Waits for the commit. It comes: the writer answers everything it took, and its end closes the channel. While the database
    /// is locked it takes a try at most, [`schema::BUSY_TIMEOUT`] for the log and the same for the transaction.
    pub(crate) fn wait(self) -> Result<T, E> {
        self.outcome.recv().unwrap_or_else(|_| Err(StoreError::Closed.into()))
    }

    /// Waits for the commit as long as `time`, whatever comes of it.
    fn wait_at_most(self, time: Duration) {
        drop(self.outcome.recv_timeout(time));
    }
}

impl Store {
    /// Opens the database at `path`, makes it on first run, and starts its writer.
    pub(crate) fn open(path: &Path, limits: Limits) -> Result<Self, StoreError> {
        let length = |path: &Path| fs::metadata(path).map_or(0, |file| file.len());
        if length(path) == 0 && length(&wal(path)) > 0 {
            return Err(StoreError::LeftLog);
        }
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
        let troubles = Arc::new(Troubles::default());
        let writer = Writer { connection, path: path.to_owned(), queue, limits, troubles: Arc::clone(&troubles) };
        let thread = std::thread::Builder::new().name("store-writer".into());
        let writer = thread.spawn(move || writer.run()).map_err(|error| StoreError::File(Arc::new(error)))?;
        let (changes, writer) = (Some(changes), Some(writer));
        let inner = Inner {
            path: path.to_owned(),
            changes,
            writer,
            readers: Mutex::default(),
            reader_freed: Condvar::new(),
            limits,
            troubles,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Hands a change to the writer without waiting for it. Dropping the ticket does not drop the change.
    pub(crate) fn begin<T, E>(
        &self,
        change: impl FnOnce(&Connection) -> Result<T, E> + Send + 'static,
    ) -> Result<Ticket<T, E>, StoreError>
    where
        T: Send + 'static,
        E: From<StoreError> + MaybeFault + Send + 'static,
    {
        self.begin_change(true, |transaction| change(transaction.connection))
    }

    /// The same for a change that says itself whether it needs a savepoint.
    fn begin_change<T, E>(
        &self,
        savepoint: bool,
        change: impl FnOnce(&mut Transaction<'_>) -> Result<T, E> + Send + 'static,
    ) -> Result<Ticket<T, E>, StoreError>
    where
        T: Send + 'static,
        E: From<StoreError> + MaybeFault + Send + 'static,
    {
        let (reply, outcome) = oneshot::channel();
        let make = Box::new(move |transaction: Result<&mut Transaction<'_>, &StoreError>| {
            let result = transaction.map_err(|refused| refused.clone().into()).and_then(change);
            let fault = result.as_ref().err().and_then(E::fault).cloned();
            let keep = result.is_ok();
            let reply: Reply = Box::new(move |failed| {
                let result = match failed {
                    Some(error) if keep => Err(error.clone().into()),
                    _ => result,
                };
                // The caller may have gone; the change stands all the same.
                drop(reply.send(result));
            });
            Made { keep, fault, reply }
        });
        let changes = self.inner.changes.as_ref().ok_or(StoreError::Closed)?;
        changes.try_send(Change { savepoint, make }).map_err(|error| {
            let error = if error.is_full() { StoreError::Busy } else { StoreError::Closed };
            self.inner.troubles.came(&self.inner.path, &error);
            error
        })?;
        Ok(Ticket { outcome })
    }

    /// Makes a change and waits until it is committed and synced.
    pub(crate) fn write<T, E>(&self, change: impl FnOnce(&Connection) -> Result<T, E> + Send + 'static) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<StoreError> + MaybeFault + Send + 'static,
    {
        self.begin(change)?.wait()
    }

    /// Waits until all that was begun before is committed.
    pub(crate) fn sync(&self) -> Result<(), StoreError> {
        self.write(|_| Ok(()))
    }

    /// Reads from what is committed.
    pub(crate) fn read<T>(&self, read: impl FnOnce(&Connection) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let result = self.inner.read(read);
        if let Err(error) = &result {
            self.inner.troubles.came(&self.inner.path, error);
        }
        result
    }
}

impl Inner {
    fn lock_readers(&self) -> MutexGuard<'_, Readers> {
        // A panic while the list was held leaves a list all the same.
        self.readers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next reader that is free, or the right to open one.
    fn reader(&self) -> Result<Reader<'_>, StoreError> {
        let none = |readers: &mut Readers| readers.idle.is_empty() && readers.open >= READERS;
        let waited = self.reader_freed.wait_timeout_while(self.lock_readers(), READER_TIME, none);
        let (mut readers, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            return Err(StoreError::BusyReading);
        }
        let connection = readers.idle.pop();
        readers.open += usize::from(connection.is_none());
        Ok(Reader { inner: self, connection })
    }

    fn read<T>(&self, read: impl FnOnce(&Connection) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let mut reader = self.reader()?;
        // One that failed is not put back.
        let connection = reader.connection.take().map_or_else(|| self.open_reader(), Ok)?;
        let result = read(&connection)?;
        reader.connection = Some(connection);
        Ok(result)
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

/// The writer thread's.
struct Writer {
    connection: Connection,
    path: PathBuf,
    queue: Receiver<Change>,
    limits: Limits,
    troubles: Arc<Troubles>,
}

impl Writer {
    /// One transaction for all changes that wait, until the last sender is gone.
    fn run(&self) {
        let mut next_sweep = Instant::now() + SWEEP_EVERY;
        loop {
            match self.queue.recv_deadline(next_sweep) {
                Ok(first) => self.write(first),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if Instant::now() >= next_sweep {
                let limits = self.limits;
                let sweep = move |transaction: Result<&mut Transaction<'_>, &StoreError>| {
                    let swept = transaction.map_err(Clone::clone).and_then(|transaction| kv::sweep_all(transaction, limits));
                    // Where it failed what has expired is merely not seen, and the next one removes it.
                    Made { keep: swept.is_ok(), fault: swept.err(), reply: Box::new(|_| {}) }
                };
                self.write(Change { savepoint: true, make: Box::new(sweep) });
                next_sweep = Instant::now() + SWEEP_EVERY;
            }
        }
    }

    /// Commits a change, together with those that wait behind it, and tells their callers.
    fn write(&self, first: Change) {
        if let Err(error) = self.begin() {
            // All of them, and not this one alone: the next would wait as long again.
            for change in std::iter::once(first).chain(self.queue.try_iter().take(WRITE_QUEUE)) {
                self.troubles.came(&self.path, &error);
                ((change.make)(Err(&error)).reply)(None);
            }
            return;
        }
        let mut replies = Vec::new();
        let done = self.commit(std::iter::once(first).chain(self.queue.try_iter().take(MAX_BATCH - 1)), &mut replies);
        match &done {
            Ok(true) => self.troubles.written(&self.path),
            Ok(false) => {}
            Err(error) => {
                replies.iter().for_each(|_| self.troubles.came(&self.path, error));
                if !self.connection.is_autocommit()
                    && let Err(error) = self.connection.execute_batch("ROLLBACK")
                {
                    self.troubles.came(&self.path, &error.into());
                }
            }
        }
        for reply in replies {
            reply(done.as_ref().err());
        }
    }

    /// Begins a transaction, once the log is not too long.
    fn begin(&self) -> Result<(), StoreError> {
        if fs::metadata(wal(&self.path)).is_ok_and(|log| log.len() > MAX_WAL) {
            let blocked: bool = self.connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0))?;
            if blocked {
                return Err(StoreError::LongRead);
            }
        }
        self.execute("BEGIN IMMEDIATE")
    }

    /// Runs changes in the transaction and commits. Every change it ran has its reply in `replies`, also on an error; the rest is
    /// still in the queue. Says whether anything was written.
    fn commit(&self, batch: impl Iterator<Item = Change>, replies: &mut Vec<Reply>) -> Result<bool, StoreError> {
        let mut transaction = Transaction { connection: &self.connection, accounts: Accounts::default() };
        let mut written = false;
        for Change { savepoint, make } in batch {
            let accounts = savepoint.then(|| transaction.accounts.clone());
            if savepoint {
                self.execute("SAVEPOINT change")?;
            }
            let before = self.connection.total_changes();
            let Made { keep, fault, reply } = make(Ok(&mut transaction));
            replies.push(reply);
            if let Some(fault) = fault {
                // Of a full or failing disk SQLite may undo the whole transaction by itself.
                if self.connection.is_autocommit() {
                    return Err(fault);
                }
                self.troubles.came(&self.path, &fault);
            }
            written |= keep && self.connection.total_changes() > before;
            if let Some(accounts) = accounts {
                if !keep {
                    self.execute("ROLLBACK TO change")?;
                    transaction.accounts = accounts;
                }
                self.execute("RELEASE change")?;
            }
        }
        transaction.save_accounts()?;
        self.execute("COMMIT")?;
        Ok(written)
    }

    fn execute(&self, sql: &str) -> Result<(), StoreError> {
        self.connection.prepare_cached(sql)?.execute([])?;
        Ok(())
    }
}

/// The write-ahead log of a database.
fn wal(database: &Path) -> PathBuf {
    let mut name = database.as_os_str().to_owned();
    name.push("-wal");
    name.into()
}

/// Milliseconds since 1970-01-01 UTC, as the database keeps time.
pub(crate) fn now_ms() -> i64 {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(elapsed.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    #[test]
    fn many_read_by_a_few_connections_and_one_that_fails_makes_room_for_another() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("plugrack.db"), Limits { keys: 1, bytes: 1 }).unwrap();
        let (reading, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let read = |fails: bool| {
            store.read(|connection| {
                most.fetch_max(reading.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                let one: i64 = connection.query_row("SELECT 1", [], |row| row.get(0))?;
                thread::yield_now();
                reading.fetch_sub(1, Ordering::SeqCst);
                if fails { Err(StoreError::Closed) } else { Ok(one) }
            })
        };
        thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| (0..50).for_each(|number| assert_eq!(read(number % 5 == 0).is_err(), number % 5 == 0)));
            }
        });
        assert!(most.into_inner() <= READERS);
        let readers = store.inner.lock_readers();
        assert!(readers.open == readers.idle.len() && readers.open <= READERS, "{} of {}", readers.idle.len(), readers.open);
    }
}
