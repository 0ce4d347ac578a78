//! The database: one writer thread, and a few readers. `schema.sql` is its shape.
//!
//! Every change goes to the writer, which runs all that wait in one transaction and answers after the commit is synced. So a
//! caller that got its answer knows that the change is on disk, and many callers share one sync. A change that fails is undone
//! alone, by a savepoint where it has several steps; when the commit itself fails nobody's change is acknowledged. When no
//! transaction can be begun, all that wait are refused together, so that nobody waits longer than for one try.
//!
//! When the disk is full the writer writes the log back, which gives space, and makes the changes once more; those that free space
//! may use the reserve (`space.rs`). The writer also decides when the log is written back at all (`wal.rs`), and acknowledges
//! nothing once a file of the database is gone (`presence.rs`).

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
use fault::Troubles;
use kv::{Accounts, Limits};

use presence::Presence;
use space::Space;
use wal::{Reset, Schedule};

use crate::threads;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use rusqlite::{Connection, OpenFlags};
use std::fs::{self, File};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Changes that may wait for the writer; more is answered with `busy`. A few milliseconds' worth.
const WRITE_QUEUE: usize = 1024;

/// Most changes in one transaction, so that the first of them does not wait long for the last.
const MAX_BATCH: usize = 256;

/// Size in bytes of the write-ahead log from which on nothing is written until it is written back to the database. It comes to
/// this only while another program reads without end: a backup is done long before. Four plugins' keys and values by default.
const MAX_LOG: u64 = 256 * 1024 * 1024;

/// Changes that are tried on their own once a transaction of several has failed because the disk is full, and fail again, before the
/// rest is refused: one that is too large must not take the small ones with it, and not each may cost a checkpoint.
const MAX_ALONE: usize = 4;

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

/// What the writer is told to do.
enum Order {
    Change(Change),
    /// To write the log back, and to say that this was tried.
    Checkpoint(oneshot::Sender<Result<(), StoreError>>),
}

/// A change to be made in a transaction, or to be refused when there is none.
struct Change {
    /// Whether it leaves something to be undone where it fails. A savepoint costs more than a small write.
    savepoint: bool,
    /// Whether it does nothing but free space, so that it may use the reserve.
    frees: bool,
    task: Box<dyn Task>,
}

/// The work of a change. It may be done again in another transaction when the disk was full.
trait Task: Send {
    /// Does it.
    fn make(&mut self, transaction: &mut Transaction<'_>) -> Made;
    /// Tells the caller the outcome: that of the commit, or why there was none.
    fn reply(self: Box<Self>, failed: Option<&StoreError>);
}

/// A change that was made.
struct Made {
    /// Whether it is to be kept: it did all of what it should.
    keep: bool,
    /// What the store itself did to it.
    fault: Option<StoreError>,
}

/// A change that somebody waits for.
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
        // The caller may have gone; the change stands all the same.
        drop(self.outcome.send(result));
    }
}

/// The removal of what has expired. Where it fails that is merely not seen, and the next one removes it.
struct Sweep(Limits);

impl Task for Sweep {
    fn make(&mut self, transaction: &mut Transaction<'_>) -> Made {
        let swept = kv::sweep_all(transaction, self.0);
        Made { keep: swept.is_ok(), fault: swept.err() }
    }

    fn reply(self: Box<Self>, _: Option<&StoreError>) {}
}

/// The open database. Cheap to clone; when the last clone goes, what is queued is written and the file is closed.
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
    limits: Limits,
    troubles: Arc<Troubles>,
    presence: Arc<Presence>,
    /// Closed last, see [`Space`].
    _database: Arc<File>,
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
    ///
    /// # Errors
    /// It cannot be opened, or is not the one that belongs to the files beside it.
    pub(crate) fn open(path: &Path, limits: Limits) -> Result<Self, StoreError> {
        // SQLite has the log beside the file that a link leads to.
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
        let troubles = Arc::new(Troubles::default());
        let presence = Arc::new(Presence::of(path));
        let mut writer = Writer {
            connection,
            path: path.to_owned(),
            queue,
            limits,
            troubles: Arc::clone(&troubles),
            presence: Arc::clone(&presence),
            space: Space::new(path, Arc::clone(&database)),
            schedule: Schedule::new(Instant::now()),
            log_pages,
            page_size,
            begins_log: false,
            saved: false,
        };
        // From here on the file differs from every copy that was made before, and has all there is. A full disk prevents neither
        // reading nor deleting, so it does not prevent the start.
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
            limits,
            troubles,
            presence,
            _database: database,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Where the database is.
    fn path(&self) -> &Path {
        &self.inner.path
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
        // One that cannot be made twice is not made again once the disk was full.
        let mut change = Some(change);
        self.begin_change(true, false, move |transaction| match change.take() {
            Some(change) => change(transaction.connection),
            None => Err(StoreError::Full.into()),
        })
    }

    /// The same for a change that says itself whether it needs a savepoint, and whether it does nothing but free space. On a full disk
    /// it is made again in another transaction.
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
            self.inner.troubles.came(&self.inner.path, &error);
            error
        })
    }

    /// Makes a change and waits until it is committed and synced.
    pub(crate) fn write<T, E>(&self, change: impl FnOnce(&Connection) -> Result<T, E> + Send + 'static) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<StoreError> + MaybeFault + Send + 'static,
    {
        self.begin(change)?.wait()
    }

    /// Makes a change that does nothing but remove something, and waits until it is committed and synced. It is done at any fill of
    /// the disk.
    pub(crate) fn remove<T, E>(&self, mut change: impl FnMut(&Connection) -> Result<T, E> + Send + 'static) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<StoreError> + MaybeFault + Send + 'static,
    {
        self.begin_change(true, true, move |transaction| change(transaction.connection))?.wait()
    }

    /// Waits until all that was begun before is committed, and written back from the log, so that the database file alone is
    /// everything. A read without end keeps the log; that is no error, as the log stays beside the file.
    pub(crate) fn finish(&self) -> Result<(), StoreError> {
        let (reply, outcome) = oneshot::channel();
        self.order(Order::Checkpoint(reply))?;
        Ticket { outcome }.wait()
    }

    /// Looks whether the database's files are still there, for a time in which nobody writes. Where one is gone the log says so, and
    /// the writer saves what it can.
    pub(crate) fn look(&self) {
        if let Err(error) = self.inner.presence.check() {
            self.inner.troubles.came(&self.inner.path, &error);
            // It is refused, and that is what it is for.
            drop(self.begin(|_| Ok::<_, StoreError>(())));
        }
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
        self.readers.locked()
    }

    /// The next reader that is free, or the right to open one.
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
        // One that failed is not put back.
        let connection = reader.connection.take().map_or_else(|| self.open_reader(), Ok)?;
        let result = read(&connection)?;
        reader.connection = Some(connection);
        Ok(result)
    }

    fn open_reader(&self) -> Result<Connection, StoreError> {
        // SQLite would open, or even make, another file than the others have open.
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

/// The writer thread's.
struct Writer {
    connection: Connection,
    path: PathBuf,
    queue: Receiver<Order>,
    limits: Limits,
    troubles: Arc<Troubles>,
    presence: Arc<Presence>,
    space: Space,
    schedule: Schedule,
    /// Pages in the log as of the last commit.
    log_pages: Arc<AtomicU32>,
    /// Bytes of a page.
    page_size: u64,
    /// Whether the next transaction is the first one of a log.
    begins_log: bool,
    /// Whether the log has been written back since one of the files is gone.
    saved: bool,
}

impl Writer {
    /// One transaction for all changes that wait, until the last sender is gone.
    fn run(mut self) {
        let mut next_sweep = Instant::now() + SWEEP_EVERY;
        let mut next = None;
        loop {
            let wake = self.schedule.due().map_or(next_sweep, |due| due.min(next_sweep));
            match next.take().map_or_else(|| self.queue.recv_deadline(wake), Ok) {
                Ok(Order::Change(first)) => next = self.write(first),
                Ok(Order::Checkpoint(reply)) => {
                    // A full disk has been logged, and what is only in the log is as safe there.
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
                next = self.write(Change { savepoint: true, frees: true, task: Box::new(Sweep(self.limits)) });
                next_sweep = Instant::now() + SWEEP_EVERY;
            }
            let log = u64::from(self.log_pages.load(Ordering::Relaxed)) * self.page_size;
            if let Some(reset) = self.schedule.decide(Instant::now(), log) {
                // What went wrong has been logged, and it is tried again.
                self.try_checkpoint(reset).ok();
            }
        }
        self.try_checkpoint(Reset::Empty).ok();
    }

    /// Commits a change, together with those that wait behind it, and tells their callers. Gives the order that came behind them, if it
    /// was another one.
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
            // What the writer did not come to is tried in a transaction of its own.
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

    /// Refuses changes, and all that wait: the next one would wait as long as these did.
    fn refuse_all(&mut self, batch: Vec<Change>, error: &StoreError) {
        if matches!(error, StoreError::Gone { .. }) {
            self.save();
        }
        let waiting = self.queue.try_iter().take(WRITE_QUEUE).collect::<Vec<_>>();
        for order in batch.into_iter().map(Order::Change).chain(waiting) {
            match order {
                Order::Change(change) => {
                    self.troubles.came(&self.path, error);
                    change.task.reply(Some(error));
                }
                Order::Checkpoint(reply) => drop(reply.send(Err(error.clone()))),
            }
        }
    }

    /// Makes changes once more, now that the disk was found full: together after the log was written back, and then each alone, so that
    /// one that needs much does not take the others with it. What only frees space comes first, and may use the reserve.
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
                self.troubles.came(&self.path, &StoreError::Full);
                change.task.reply(Some(&StoreError::Full));
            }
        }
    }

    /// Makes one change in a transaction of its own, a second time after the log was written back. Says whether it was committed.
    fn write_alone(&mut self, change: Change) -> bool {
        let mut alone = vec![change];
        let mut done = self.begin().and_then(|()| self.commit(&mut alone).1);
        if matches!(done, Err(StoreError::Full)) && self.make_room() {
            done = self.begin().and_then(|()| self.commit(&mut alone).1);
        }
        if let Err(error) = &done {
            self.troubles.came(&self.path, error);
        }
        alone.into_iter().for_each(|change| change.task.reply(done.as_ref().err()));
        done.is_ok()
    }

    /// Gives the log's space back. Says whether there was any.
    fn make_room(&mut self) -> bool {
        self.presence.log_length() > 0 && self.checkpoint(Reset::Empty).unwrap_or(false)
    }

    /// Tells the log what became of so many changes.
    fn note(&self, done: &Result<bool, StoreError>, changes: usize) {
        match done {
            Ok(true) => self.troubles.written(&self.path),
            Ok(false) => {}
            Err(error) => (0..changes).for_each(|_| self.troubles.came(&self.path, error)),
        }
    }

    /// Begins a transaction, once the log is not too long.
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

    /// Runs changes in the transaction and commits. Says how many it ran, which is all of them unless one ended the transaction, and
    /// whether anything was written. On an error there is no transaction any more.
    fn commit(&mut self, batch: &mut [Change]) -> (usize, Result<bool, StoreError>) {
        let mut ran = 0;
        let done = self.make_all(batch, &mut ran);
        if done.is_err()
            && !self.connection.is_autocommit()
            && let Err(error) = self.connection.execute_batch("ROLLBACK")
        {
            self.troubles.came(&self.path, &error.into());
        }
        // Were it committed and a file gone, the change would be lost with the host's end.
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

    /// Writes the log back, and logs why it cannot be.
    fn try_checkpoint(&mut self, reset: Reset) -> Result<bool, StoreError> {
        let done = self.presence.check().and_then(|()| self.checkpoint(reset));
        if let Err(error) = &done {
            self.troubles.came(&self.path, error);
            if matches!(error, StoreError::Gone { .. }) {
                self.save();
            }
            self.schedule.checkpointed(Instant::now(), false);
        }
        done
    }

    /// Writes the log back. Says whether it begins anew, which a read that is under way may prevent, and so may another program's lock.
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

    /// Marks the database that is about to get what the log has. A full disk may have no space for it, and then the mark that is there
    /// does: without a fresh one only an older copy of this very log could not be told.
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

    /// Notes that the log's file has no length any more.
    fn emptied(&mut self) {
        self.begins_log = true;
        self.space.hold_log();
    }

    /// Now that one of the files is gone: writes what the log has, which may be open here alone, to the database, where that is the one
    /// still. Once for each loss.
    fn save(&mut self) {
        if self.saved || self.presence.is_database_gone() || !wal::is_base_of(&self.path, &self.connection) {
            return;
        }
        self.saved = true;
        match wal::checkpoint(&self.connection, Reset::Reuse) {
            Ok(true) => {
                self.begins_log = true;
                log::warn!("{} has all that was acknowledged: restart the host", self.path.display());
            }
            Ok(false) => log::warn!("{} cannot get all that its log has, because it is being read", self.path.display()),
            Err(error) => self.troubles.came(&self.path, &error),
        }
    }

    fn execute(&self, sql: &str) -> Result<(), StoreError> {
        self.connection.prepare_cached(sql)?.execute([])?;
        Ok(())
    }
}

/// Milliseconds since 1970-01-01 UTC, as the database keeps time.
pub(crate) fn now_ms() -> i64 {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(elapsed.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::threads::testing;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    #[test]
    fn a_panic_of_the_writer_ends_the_process() {
        if testing::is_alone() {
            let dir = tempfile::tempdir().unwrap();
            let store = Store::open(&dir.path().join("plugrack.db"), Limits { keys: 1, bytes: 1 }).unwrap();
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
        let store = Store::open(&dir.path().join("plugrack.db"), Limits { keys: 1, bytes: 1 }).unwrap();
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
