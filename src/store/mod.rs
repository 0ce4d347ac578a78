//! The database: one writer thread and a few readers. `schema.sql` is its schema.
//!
//! Group commit: the writer runs all waiting changes in one transaction and answers their callers after the commit is synced. So an
//! answered change is on disk, and many callers share one sync. A failed change is rolled back alone, by a savepoint if it has several
//! steps. If the commit fails, no change is acknowledged. If no transaction can begin, all waiting changes are refused together, so
//! each waits for one attempt at most.
//!
//! On a full disk the writer checkpoints the log to gain space, and repeats the changes; those that free space may use the reserve
//! (`space.rs`). The writer also decides when to checkpoint (`wal.rs`), and acknowledges nothing once a database file is gone
//! (`presence.rs`).

mod config;
mod env;
pub(crate) mod events;
mod fault;
pub(crate) mod identity;
pub(crate) mod kv;
pub(crate) mod licenses;
pub(crate) mod limits;
mod presence;
pub(crate) mod programs;
mod schema;
mod settings;
mod space;
mod uids;
mod wal;

pub(crate) use fault::{MaybeFault, StoreError};

use crate::lock::{LockExt, unpoisoned};
use fault::FaultLog;
use kv::{Accounts, Quota};

use presence::Presence;
use space::Space;
use wal::{Reset, Schedule};

use crate::util::threads;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use rusqlite::{Connection, OpenFlags};
use std::fs::{self, File};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Changes that may wait for the writer; further ones are `busy`. The writer works off this many in milliseconds.
const WRITE_QUEUE: usize = 1024;

/// Most changes in one transaction, so that the first one does not wait long for the last.
const MAX_BATCH: usize = 256;

/// Size in bytes of the write-ahead log at which writes stop until a checkpoint succeeds. Only a read of another program that does
/// not end lets the log grow this far; a backup finishes long before. It is the default quota of four plugins.
const MAX_LOG: u64 = 256 * 1024 * 1024;

/// Failures of changes run alone, after their common transaction failed on a full disk, before the rest is refused. One large change
/// must not fail the small ones, and not every change may cost a checkpoint.
const MAX_ALONE: usize = 4;

/// Interval at which expired keys are removed; until then reads hide them.
const SWEEP_EVERY: Duration = Duration::from_secs(60);

/// Most reader connections: reads are short and the machine is small. Opening one takes longer than many reads.
const READERS: usize = 4;

/// Time that a read waits for a reader connection; then it is `busy`.
const READER_TIME: Duration = Duration::from_secs(5);

/// The writer's transaction.
pub(crate) struct Transaction<'a> {
    connection: &'a Connection,
    accounts: Accounts,
}

/// An order to the writer.
enum Order {
    Change(Change),
    /// Checkpoint the log, then signal that this was tried.
    Checkpoint(oneshot::Sender<Result<(), StoreError>>),
}

/// A change to run in a transaction, or to refuse without one.
struct Change {
    /// Whether a failure may leave partial effects, so that it needs a savepoint. A savepoint costs more than a small write.
    savepoint: bool,
    /// Whether it only frees space, so that it may use the reserve.
    frees: bool,
    task: Box<dyn Task>,
}

/// The work of a change. It may run again in another transaction after the disk was full.
trait Task: Send {
    /// Runs the change.
    fn make(&mut self, transaction: &mut Transaction<'_>) -> Made;
    /// Tells the caller the outcome of the commit, or why there was none.
    fn reply(self: Box<Self>, failed: Option<&StoreError>);
}

/// The effect of a change that ran.
struct Made {
    /// Whether to keep it: false if it stopped part way.
    keep: bool,
    /// The error of the store, if it failed.
    fault: Option<StoreError>,
}

/// A change whose caller waits for its result.
struct Awaited<T, E, F> {
    change: F,
    made: Option<Result<T, E>>,
    outcome: oneshot::Sender<Result<T, E>>,
}

impl<T, E, F> Task for Awaited<T, E, F>
where
    T: Send,
    E: From<StoreError> + MaybeFault + Send,
    F: FnMut(&mut Transaction<'_>) -> Result<T, E> + Send,
{
    fn make(&mut self, transaction: &mut Transaction<'_>) -> Made {
        let result = (self.change)(transaction);
        let made = Made { keep: result.is_ok(), fault: result.as_ref().err().and_then(E::fault).cloned() };
        self.made = Some(result);
        made
    }

    fn reply(self: Box<Self>, failed: Option<&StoreError>) {
        let result = match (self.made, failed) {
            (Some(Err(own)), _) => Err(own),
            (_, Some(error)) => Err(error.clone().into()),
            (Some(done), None) => done,
            (None, None) => Err(StoreError::Closed.into()),
        };
        // The caller may be gone; the change stands.
        drop(self.outcome.send(result));
    }
}

/// Removes expired keys. A failure is harmless: reads hide them, and the next run removes them.
struct Sweep(Quota);

impl Task for Sweep {
    fn make(&mut self, transaction: &mut Transaction<'_>) -> Made {
        let swept = kv::sweep_all(transaction, self.0);
        Made { keep: swept.is_ok(), fault: swept.err() }
    }

    fn reply(self: Box<Self>, _: Option<&StoreError>) {}
}

/// The open database. Cheap to clone; dropping the last clone writes the queued changes and closes the file.
#[derive(Clone)]
pub(crate) struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    path: PathBuf,
    orders: Option<Sender<Order>>,
    writer: Option<JoinHandle<()>>,
    readers: Mutex<Readers>,
    reader_freed: Condvar,
    quota: Quota,
    fault_log: Arc<FaultLog>,
    presence: Arc<Presence>,
    /// Dropped last, see [`Space`].
    _database: Arc<File>,
}

/// The reader connections.
#[derive(Default)]
struct Readers {
    idle: Vec<Connection>,
    /// Number of connections, idle or in use.
    open: usize,
}

/// A permit for one reader, and its connection while no read uses it.
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

/// The pending outcome of a change.
pub(crate) struct Ticket<T, E> {
    // Not a crossbeam channel: its receivers spin before they sleep, and a commit always takes longer.
    outcome: oneshot::Receiver<Result<T, E>>,
}

impl<T, E: From<StoreError>> Ticket<T, E> {
    /// Waits for the commit. The wait ends: the writer answers every change, and its exit closes the channel. While the database is
    /// locked the writer makes one attempt, of [`schema::BUSY_TIMEOUT`] for the log and the same for the transaction.
    pub(crate) fn wait(self) -> Result<T, E> {
        self.outcome.recv().unwrap_or_else(|_| Err(StoreError::Closed.into()))
    }

    /// Waits for the commit for at most `time`, and ignores the outcome.
    fn wait_at_most(self, time: Duration) {
        drop(self.outcome.recv_timeout(time));
    }
}

impl Store {
    /// Opens the database at `path`, or creates it, and starts its writer.
    ///
    /// # Errors
    /// The database cannot be opened, or does not belong to the files beside it.
    pub(crate) fn open(path: &Path, quota: Quota) -> Result<Self, StoreError> {
        // SQLite places the log beside the target of a symbolic link.
        let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let path = target.as_path();
        let (mut connection, database) = identity::open(path)?;
        let database = Arc::new(database);
        let log_pages = Arc::new(AtomicU32::new(0));
        let pages = Arc::clone(&log_pages);
        connection.wal_hook(Some(move |_: &mut rusqlite::hooks::Wal, length| {
            pages.store(u32::try_from(length).unwrap_or(0), Ordering::Relaxed);
            Ok(())
        }))?;
        let page_size = connection.pragma_query_value(None, "page_size", |row| row.get(0))?;
        let (orders, queue) = bounded(WRITE_QUEUE);
        let fault_log = Arc::new(FaultLog::default());
        let presence = Arc::new(Presence::of(path));
        let mut writer = Writer {
            connection,
            path: path.to_owned(),
            queue,
            quota,
            fault_log: Arc::clone(&fault_log),
            presence: Arc::clone(&presence),
            space: Space::new(path, Arc::clone(&database)),
            schedule: Schedule::new(Instant::now()),
            log_pages,
            page_size,
            begins_log: false,
            saved: false,
        };
        // From here on the file differs from every earlier copy, and is complete. A failure on a full disk does not prevent the start,
        // since reads and deletes still work.
        if !writer.checkpoint(Reset::Empty).unwrap_or(false) {
            writer.schedule.wrote(Instant::now());
        }
        let thread = std::thread::Builder::new().name("store-writer".into());
        // A change may panic. If the writer itself does, nobody can tell which changes were made.
        let writer = threads::vital(thread, move || writer.run()).map_err(|error| StoreError::File(Arc::new(error)))?;
        let (orders, writer) = (Some(orders), Some(writer));
        let inner = Inner {
            path: path.to_owned(),
            orders,
            writer,
            readers: Mutex::default(),
            reader_freed: Condvar::new(),
            quota,
            fault_log,
            presence,
            _database: database,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The path of the database.
    fn path(&self) -> &Path {
        &self.inner.path
    }

    /// Queues a change without waiting for it. Dropping the ticket does not cancel the change.
    pub(crate) fn begin<T, E>(
        &self,
        change: impl FnOnce(&Connection) -> Result<T, E> + Send + 'static,
    ) -> Result<Ticket<T, E>, StoreError>
    where
        T: Send + 'static,
        E: From<StoreError> + MaybeFault + Send + 'static,
    {
        // A change that can run only once is not repeated after the disk was full.
        let mut change = Some(change);
        self.begin_change(true, false, move |transaction| match change.take() {
            Some(change) => change(transaction.connection),
            None => Err(StoreError::Full.into()),
        })
    }

    /// The same for a change with its own flags for the savepoint and for freeing space. On a full disk it runs again in another
    /// transaction.
    fn begin_change<T, E>(
        &self,
        savepoint: bool,
        frees: bool,
        change: impl FnMut(&mut Transaction<'_>) -> Result<T, E> + Send + 'static,
    ) -> Result<Ticket<T, E>, StoreError>
    where
        T: Send + 'static,
        E: From<StoreError> + MaybeFault + Send + 'static,
    {
        let (reply, outcome) = oneshot::channel();
        let task = Box::new(Awaited { change, made: None, outcome: reply });
        self.order(Order::Change(Change { savepoint, frees, task }))?;
        Ok(Ticket { outcome })
    }

    fn order(&self, order: Order) -> Result<(), StoreError> {
        let orders = self.inner.orders.as_ref().ok_or(StoreError::Closed)?;
        orders.try_send(order).map_err(|error| {
            let error = if error.is_full() { StoreError::Busy } else { StoreError::Closed };
            self.inner.fault_log.hit(&self.inner.path, &error);
            error
        })
    }

    /// Runs a change and waits until it is committed and synced.
    pub(crate) fn write<T, E>(&self, change: impl FnOnce(&Connection) -> Result<T, E> + Send + 'static) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<StoreError> + MaybeFault + Send + 'static,
    {
        self.begin(change)?.wait()
    }

    /// Runs a change that only removes data, and waits until it is committed and synced. It works on a full disk.
    pub(crate) fn remove<T, E>(&self, mut change: impl FnMut(&Connection) -> Result<T, E> + Send + 'static) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<StoreError> + MaybeFault + Send + 'static,
    {
        self.begin_change(true, true, move |transaction| change(transaction.connection))?.wait()
    }

    /// Waits until all earlier changes are committed and checkpointed, so that the database file alone is complete. A long read may
    /// prevent the checkpoint, which is not an error: the log stays beside the file.
    pub(crate) fn finish(&self) -> Result<(), StoreError> {
        let (reply, outcome) = oneshot::channel();
        self.order(Order::Checkpoint(reply))?;
        Ticket { outcome }.wait()
    }

    /// Checks that the database's files are still there, for times without writes. If one is gone, logs that, and the writer saves what
    /// it can.
    pub(crate) fn check_files(&self) {
        if let Err(error) = self.inner.presence.check() {
            self.inner.fault_log.hit(&self.inner.path, &error);
            // The change only serves to have the writer notice; it is refused.
            drop(self.begin(|_| Ok::<_, StoreError>(())));
        }
    }

    /// Reads committed data.
    pub(crate) fn read<T>(&self, read: impl FnOnce(&Connection) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let result = self.inner.read(read);
        if let Err(error) = &result {
            self.inner.fault_log.hit(&self.inner.path, error);
        }
        result
    }
}

impl Inner {
    fn lock_readers(&self) -> MutexGuard<'_, Readers> {
        self.readers.locked()
    }

    /// The next free reader, or a permit to open one.
    fn reader(&self) -> Result<Reader<'_>, StoreError> {
        let none = |readers: &mut Readers| readers.idle.is_empty() && readers.open >= READERS;
        let waited = self.reader_freed.wait_timeout_while(self.lock_readers(), READER_TIME, none);
        let (mut readers, waited) = unpoisoned(waited);
        if waited.timed_out() {
            return Err(StoreError::BusyReading);
        }
        let connection = readers.idle.pop();
        readers.open += usize::from(connection.is_none());
        Ok(Reader { inner: self, connection })
    }

    fn read<T>(&self, read: impl FnOnce(&Connection) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let mut reader = self.reader()?;
        // A connection that failed is dropped.
        let connection = reader.connection.take().map_or_else(|| self.open_reader(), Ok)?;
        let result = read(&connection)?;
        reader.connection = Some(connection);
        Ok(result)
    }

    fn open_reader(&self) -> Result<Connection, StoreError> {
        // SQLite could open, or even create, another file than the one in use.
        self.presence.check()?;
        let connection = wal::open(&self.path, OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
        schema::prepare_reader(&connection)?;
        Ok(connection)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(writer) = self.writer.take() {
            // A panic of it has ended the process.
            writer.join().ok();
        }
    }
}

/// The state of the writer thread.
struct Writer {
    connection: Connection,
    path: PathBuf,
    queue: Receiver<Order>,
    quota: Quota,
    fault_log: Arc<FaultLog>,
    presence: Arc<Presence>,
    space: Space,
    schedule: Schedule,
    /// Pages in the log as of the last commit.
    log_pages: Arc<AtomicU32>,
    /// Page size in bytes.
    page_size: u64,
    /// Whether the next transaction is the first in its log.
    begins_log: bool,
    /// Whether the log was saved to the database after a file was lost.
    saved: bool,
}

impl Writer {
    /// Runs transactions of all waiting changes, until the last sender is gone.
    fn run(mut self) {
        let mut next_sweep = Instant::now() + SWEEP_EVERY;
        let mut next = None;
        loop {
            let wake = self.schedule.due().map_or(next_sweep, |due| due.min(next_sweep));
            match next.take().map_or_else(|| self.queue.recv_deadline(wake), Ok) {
                Ok(Order::Change(first)) => next = self.write(first),
                Ok(Order::Checkpoint(reply)) => {
                    // A full disk was logged, and the changes are safe in the log.
                    let done = self.try_checkpoint(Reset::Empty).or_else(|error| match error {
                        StoreError::Full => Ok(false),
                        error => Err(error),
                    });
                    drop(reply.send(done.map(drop)));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if next.is_none() && Instant::now() >= next_sweep {
                next = self.write(Change { savepoint: true, frees: true, task: Box::new(Sweep(self.quota)) });
                next_sweep = Instant::now() + SWEEP_EVERY;
            }
            let log = u64::from(self.log_pages.load(Ordering::Relaxed)) * self.page_size;
            if let Some(reset) = self.schedule.decide(Instant::now(), log) {
                // The error was logged; the next checkpoint tries again.
                self.try_checkpoint(reset).ok();
            }
        }
        self.try_checkpoint(Reset::Empty).ok();
    }

    /// Commits a change together with those queued behind it, and tells their callers. Returns the order that followed them, if it is
    /// of another kind.
    fn write(&mut self, first: Change) -> Option<Order> {
        let mut next = None;
        let mut batch = vec![first];
        while batch.len() < MAX_BATCH {
            match self.queue.try_recv() {
                Ok(Order::Change(change)) => batch.push(change),
                other => {
                    next = other.ok();
                    break;
                }
            }
        }
        while !batch.is_empty() {
            if let Err(error) = self.begin() {
                self.refuse_all(batch, &error);
                break;
            }
            let (ran, done) = self.commit(&mut batch);
            // Changes that did not run are tried in a transaction of their own.
            let rest = batch.split_off(ran);
            match done {
                Err(StoreError::Full) => self.write_on_a_full_disk(batch),
                done => {
                    self.note(&done, batch.len());
                    batch.into_iter().for_each(|change| change.task.reply(done.as_ref().err()));
                }
            }
            batch = rest;
        }
        next
    }

    /// Refuses these changes and all queued ones, which would otherwise wait for the same timeout again.
    fn refuse_all(&mut self, batch: Vec<Change>, error: &StoreError) {
        if matches!(error, StoreError::Gone { .. }) {
            self.save();
        }
        let waiting = self.queue.try_iter().take(WRITE_QUEUE).collect::<Vec<_>>();
        for order in batch.into_iter().map(Order::Change).chain(waiting) {
            match order {
                Order::Change(change) => {
                    self.fault_log.hit(&self.path, error);
                    change.task.reply(Some(error));
                }
                Order::Checkpoint(reply) => drop(reply.send(Err(error.clone()))),
            }
        }
    }

    /// Repeats changes after the disk was found full: together after a checkpoint, then each alone, so that a large one does not fail the
    /// others. Changes that only free space run first, and may use the reserve.
    fn write_on_a_full_disk(&mut self, mut batch: Vec<Change>) {
        let mut done = Err(StoreError::Full);
        if self.make_room() {
            done = self.begin().and_then(|()| self.commit(&mut batch).1);
        }
        if !matches!(done, Err(StoreError::Full)) {
            self.note(&done, batch.len());
            return batch.into_iter().for_each(|change| change.task.reply(done.as_ref().err()));
        }
        let (freeing, others): (Vec<_>, Vec<_>) = batch.into_iter().partition(|change| change.frees);
        let mut failed = 0;
        if !freeing.is_empty() {
            self.space.release();
            for change in freeing {
                self.write_alone(change);
            }
            self.make_room();
            self.space.refill();
        }
        for change in others {
            if failed < MAX_ALONE {
                failed += usize::from(!self.write_alone(change));
            } else {
                self.fault_log.hit(&self.path, &StoreError::Full);
                change.task.reply(Some(&StoreError::Full));
            }
        }
    }

    /// Runs one change in a transaction of its own, and once more after a checkpoint. True if it was committed.
    fn write_alone(&mut self, change: Change) -> bool {
        let mut alone = vec![change];
        let mut done = self.begin().and_then(|()| self.commit(&mut alone).1);
        if matches!(done, Err(StoreError::Full)) && self.make_room() {
            done = self.begin().and_then(|()| self.commit(&mut alone).1);
        }
        if let Err(error) = &done {
            self.fault_log.hit(&self.path, error);
        }
        alone.into_iter().for_each(|change| change.task.reply(done.as_ref().err()));
        done.is_ok()
    }

    /// Frees the space of the log. True if there was any.
    fn make_room(&mut self) -> bool {
        self.presence.log_length() > 0 && self.checkpoint(Reset::Empty).unwrap_or(false)
    }

    /// Logs the outcome of this many changes.
    fn note(&self, done: &Result<bool, StoreError>, changes: usize) {
        match done {
            Ok(true) => self.fault_log.written(&self.path),
            Ok(false) => {}
            Err(error) => (0..changes).for_each(|_| self.fault_log.hit(&self.path, error)),
        }
    }

    /// Begins a transaction, unless the log is too long.
    fn begin(&mut self) -> Result<(), StoreError> {
        self.presence.check()?;
        self.saved = false;
        if self.presence.log_length() > MAX_LOG {
            let blocked: bool = self.connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0))?;
            if blocked {
                return Err(StoreError::LongRead);
            }
            self.emptied();
        }
        self.execute("BEGIN IMMEDIATE")
    }

    /// Runs changes in the transaction and commits. Returns how many ran, which is all unless one ended the transaction, and whether
    /// anything was written. After an error the transaction is over.
    fn commit(&mut self, batch: &mut [Change]) -> (usize, Result<bool, StoreError>) {
        let mut ran = 0;
        let done = self.make_all(batch, &mut ran);
        if done.is_err()
            && !self.connection.is_autocommit()
            && let Err(error) = self.connection.execute_batch("ROLLBACK")
        {
            self.fault_log.hit(&self.path, &error.into());
        }
        // Committed to a removed file, the change would be lost when the host ends.
        (ran, done.and_then(|written| self.presence.check().map(|()| written)))
    }

    fn make_all(&mut self, batch: &mut [Change], ran: &mut usize) -> Result<bool, StoreError> {
        let mut transaction = Transaction { connection: &self.connection, accounts: Accounts::default() };
        let mut written = false;
        for Change { savepoint, task, .. } in batch {
            *ran += 1;
            let accounts = savepoint.then(|| transaction.accounts.clone());
            if *savepoint {
                self.execute("SAVEPOINT change")?;
            }
            let before = self.connection.total_changes();
            // The transaction is rolled back with all that the change has left half done.
            let made = catch_unwind(AssertUnwindSafe(|| task.make(&mut transaction)));
            let Made { keep, fault } = made.map_err(|_| StoreError::Panicked)?;
            if let Some(fault) = fault {
                // On a full or failing disk SQLite may roll back the whole transaction by itself.
                if self.connection.is_autocommit() {
                    return Err(fault);
                }
                self.fault_log.hit(&self.path, &fault);
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
        if written {
            if self.begins_log {
                wal::mark(&self.connection, true)?;
            }
            let pages: u64 = self.connection.prepare_cached("PRAGMA page_count")?.query_row([], |row| row.get(0))?;
            self.space.claim(pages * self.page_size)?;
        }
        self.execute("COMMIT")?;
        if written {
            self.begins_log = false;
            self.schedule.wrote(Instant::now());
        }
        Ok(written)
    }

    /// Checkpoints the log, and logs a failure.
    fn try_checkpoint(&mut self, reset: Reset) -> Result<bool, StoreError> {
        let done = self.presence.check().and_then(|()| self.checkpoint(reset));
        if let Err(error) = &done {
            self.fault_log.hit(&self.path, error);
            if matches!(error, StoreError::Gone { .. }) {
                self.save();
            }
            self.schedule.checkpointed(Instant::now(), false);
        }
        done
    }

    /// Checkpoints the log. True if it restarts empty; a read under way or another program's lock may prevent that.
    fn checkpoint(&mut self, reset: Reset) -> Result<bool, StoreError> {
        self.connection.busy_timeout(wal::BUSY_TIMEOUT)?;
        let done = self.mark().and_then(|()| wal::checkpoint(&self.connection, reset));
        self.connection.busy_timeout(schema::BUSY_TIMEOUT)?;
        self.space.checkpointed();
        let complete = match done {
            Err(StoreError::Locked) => false,
            done => done?,
        };
        self.schedule.checkpointed(Instant::now(), complete);
        if complete {
            match reset {
                Reset::Empty => self.emptied(),
                Reset::Reuse => self.begins_log = true,
            }
            self.log_pages.store(0, Ordering::Relaxed);
        }
        Ok(complete)
    }

    /// Adds a mark before a checkpoint. On a full disk the existing mark has to do: then only an older copy of this very log goes
    /// undetected.
    fn mark(&self) -> Result<(), StoreError> {
        if self.begins_log {
            return Ok(());
        }
        let mark = || {
            self.execute("BEGIN IMMEDIATE")?;
            wal::mark(&self.connection, false)?;
            self.execute("COMMIT")
        };
        let marked = mark();
        if !self.connection.is_autocommit() {
            self.connection.execute_batch("ROLLBACK")?;
        }
        if matches!(marked, Err(StoreError::Full)) { Ok(()) } else { marked }
    }

    /// Records that the log's file is empty.
    fn emptied(&mut self) {
        self.begins_log = true;
        self.space.hold_log();
    }

    /// After a file was lost, writes the log, which may exist only as an open file here, to the database, if that is still in place.
    /// Once for each loss.
    fn save(&mut self) {
        if self.saved || self.presence.is_database_gone() || !wal::is_base_of(&self.path, &self.connection) {
            return;
        }
        self.saved = true;
        match wal::checkpoint(&self.connection, Reset::Reuse) {
            Ok(true) => {
                self.begins_log = true;
                log::warn!("{} has all acknowledged changes: restart the host", self.path.display());
            }
            Ok(false) => log::warn!("{} does not have all changes of its log, because a read is under way", self.path.display()),
            Err(error) => self.fault_log.hit(&self.path, &error),
        }
    }

    fn execute(&self, sql: &str) -> Result<(), StoreError> {
        self.connection.prepare_cached(sql)?.execute([])?;
        Ok(())
    }
}

/// Milliseconds since 1970-01-01 UTC, the database's form of time.
pub(crate) fn now_ms() -> i64 {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(elapsed.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::util::threads::testing;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    #[test]
    fn a_panic_of_the_writer_ends_the_process() {
        if testing::is_alone() {
            let dir = tempfile::tempdir().unwrap();
            let store = Store::open(&dir.path().join("plugrack.db"), Quota { keys: 1, bytes: 1 }).unwrap();
            // The outcome of a change that nobody waits for is dropped by the writer.
            struct Bomb;
            impl Drop for Bomb {
                fn drop(&mut self) {
                    panic!("in the writer");
                }
            }
            let (end, ended) = bounded::<()>(0);
            store.begin(move |_| Ok::<_, StoreError>(ended.recv().is_err())).unwrap();
            drop(store.begin(|_| Ok::<_, StoreError>(Bomb)).unwrap());
            drop(end);
            // The process ends although this thread would go on.
            crossbeam_channel::never::<()>().recv_timeout(Duration::from_secs(60)).ok();
            return;
        }
        testing::assert_ended(&testing::alone("store::tests::a_panic_of_the_writer_ends_the_process"), "store-writer");
    }

    #[test]
    fn a_change_that_panics_fails_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("plugrack.db"), Quota { keys: 1, bytes: 1 }).unwrap();
        let config = |store: &Store| store.config("p").unwrap().into_iter().map(|(key, _)| key).collect::<Vec<_>>();
        let insert = "INSERT INTO config (plugin, key, value) VALUES ('p', ?1, '1')";
        let panicked: Result<(), StoreError> = store.write(move |connection| {
            connection.execute(insert, ["half"])?;
            panic!("in a change");
        });
        assert!(matches!(panicked, Err(StoreError::Panicked)), "{panicked:?}");
        store.write(move |connection| Ok::<_, StoreError>(connection.execute(insert, ["whole"])?)).unwrap();
        assert_eq!(config(&store), ["whole"]);
    }

    #[test]
    fn many_read_by_a_few_connections_and_one_that_fails_makes_room_for_another() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("plugrack.db"), Quota { keys: 1, bytes: 1 }).unwrap();
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
