//! The write-ahead log: when to checkpoint it, and whether a log and a database belong together.
//!
//! SQLite replays any log that lies beside a database. Over a different database, such as an older copy, the replay mixes pages of two
//! states. So the `settings` table holds a list of random marks. The first transaction of each log resets the list to the database's
//! last mark and adds a new one; each checkpoint adds one before it starts. So the last mark of the database, read without its log,
//! must be in the log's list.

use super::{StoreError, schema};
use rusqlite::{Connection, OpenFlags, OptionalExtension, params};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Size in bytes of the log that triggers a checkpoint, and to which SQLite truncates the log when it restarts.
pub(super) const LIMIT: u64 = 8 * 1024 * 1024;

/// Time without a write after which a checkpoint empties the log, so that the database file of an idle host is complete.
const IDLE_TIME: Duration = Duration::from_secs(3);

/// Longest time until a change reaches the database file during continuous writes.
const MAX_AGE: Duration = Duration::from_secs(30);

/// Pause after a checkpoint that another program's read left incomplete.
const RETRY_PAUSE: Duration = Duration::from_secs(5);

/// Time a checkpoint waits for another program's lock and for reads under way. Short, because writes wait meanwhile; the host's own
/// reads take milliseconds.
pub(super) const BUSY_TIMEOUT: Duration = Duration::from_millis(200);

/// Most marks in one log: two, and one for each incomplete checkpoint. Beyond that the last mark stays.
const MAX_MARKS: usize = 16;

/// The setting that holds the marks, separated by spaces, oldest first.
const MARKS: &str = "log_marks";

/// Placeholder for the mark of a database that has none yet.
const NO_MARK: &str = "-";

/// What a checkpoint does to the log's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reset {
    /// SQLite overwrites it from the start. The file keeps its blocks, which makes the next syncs cheaper.
    Reuse,
    /// SQLite truncates it to zero.
    Empty,
}

/// When a checkpoint is due. Pure: time is passed in.
#[derive(Debug)]
pub(super) struct Schedule {
    /// Time of the first write that is not in the database file.
    began: Option<Instant>,
    last_write: Instant,
    not_before: Instant,
}

impl Schedule {
    pub(super) fn new(now: Instant) -> Self {
        Self { began: None, last_write: now, not_before: now }
    }

    /// Records a committed write.
    pub(super) fn wrote(&mut self, now: Instant) {
        self.began.get_or_insert(now);
        self.last_write = now;
    }

    /// When a checkpoint is due; none while the database file is complete.
    pub(super) fn due(&self) -> Option<Instant> {
        self.began.map(|began| (self.last_write + IDLE_TIME).min(began + MAX_AGE).max(self.not_before))
    }

    /// Whether a checkpoint of a log of `bytes` is due at `now`, and of which kind.
    pub(super) fn decide(&self, now: Instant, bytes: u64) -> Option<Reset> {
        let due = self.due().is_some_and(|due| now >= due);
        let long = self.began.is_some() && bytes >= LIMIT && now >= self.not_before;
        let idle = now.saturating_duration_since(self.last_write) >= IDLE_TIME;
        (due || long).then_some(if idle { Reset::Empty } else { Reset::Reuse })
    }

    /// Records the outcome of a checkpoint.
    pub(super) fn checkpointed(&mut self, now: Instant, complete: bool) {
        if complete {
            self.began = None;
        } else {
            self.began.get_or_insert(now);
            self.not_before = now + RETRY_PAUSE;
        }
    }
}

/// Path of the log of the database at `database`.
pub(super) fn path(database: &Path) -> PathBuf {
    let mut name = database.as_os_str().to_owned();
    name.push("-wal");
    name.into()
}

/// The size of a file in bytes; 0 if it is missing.
pub(super) fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |file| file.len())
}

/// Opens a connection that does not checkpoint when it closes. Otherwise SQLite would also remove whatever file is then at the log's
/// path.
pub(super) fn open(path: &Path, flags: OpenFlags) -> rusqlite::Result<Connection> {
    let connection = Connection::open_with_flags(path, flags)?;
    connection.set_db_config(rusqlite::config::DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    Ok(connection)
}

/// Adds a mark in the open transaction. With `first` the transaction is the first of its log.
pub(super) fn mark(connection: &Connection, first: bool) -> Result<(), StoreError> {
    let mut marks = marks(connection)?;
    if first {
        marks.drain(..marks.len() - 1);
    }
    if marks.len() < MAX_MARKS {
        marks.push(Uuid::new_v4().simple().to_string());
        let sql = "INSERT INTO settings (key, value) VALUES (?1, ?2) ON CONFLICT DO UPDATE SET value = excluded.value";
        connection.prepare_cached(sql)?.execute(params![MARKS, marks.join(" ")])?;
    }
    Ok(())
}

/// The marks that a connection sees, at least one.
fn marks(connection: &Connection) -> rusqlite::Result<Vec<String>> {
    let mut statement = connection.prepare_cached("SELECT value FROM settings WHERE key = ?1")?;
    let text: Option<String> = statement.query_row([MARKS], |row| row.get(0)).optional()?;
    let mut marks: Vec<String> = text.iter().flat_map(|text| text.split_ascii_whitespace()).map(str::to_owned).collect();
    if marks.is_empty() {
        marks.push(NO_MARK.into());
    }
    Ok(marks)
}

/// Checkpoints the log and resets it. True if it was complete and the log restarts; a read under way may prevent that.
pub(super) fn checkpoint(connection: &Connection, reset: Reset) -> Result<bool, StoreError> {
    let step = |mode: &str| {
        let sql = format!("PRAGMA wal_checkpoint({mode})");
        let complete = |row: &rusqlite::Row<'_>| Ok(row.get::<_, i64>(0)? == 0 && row.get::<_, i64>(1)? == row.get::<_, i64>(2)?);
        connection.query_row(&sql, [], complete)
    };
    // Does most of the work without waiting. Reads that start after it do not need the log.
    Ok(step("PASSIVE")? && step(if reset == Reset::Empty { "TRUNCATE" } else { "RESTART" })?)
}

/// Whether a database and the log beside it belong together. Unreadable files pass, and fail later.
pub(super) fn belong_together(database: &Path) -> bool {
    if length(&path(database)) == 0 {
        return true;
    }
    match (marks_without_log(database), marks_with_log(database)) {
        (Ok(alone), Ok(together)) => alone.last().is_some_and(|last| together.contains(last)),
        _ => true,
    }
}

/// The marks in the database file, without its log.
pub(super) fn marks_without_log(database: &Path) -> rusqlite::Result<Vec<String>> {
    let bytes = std::os::unix::ffi::OsStrExt::as_bytes(database.as_os_str());
    let name = percent_encoding::percent_encode(bytes, percent_encoding::NON_ALPHANUMERIC);
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    // Immutable: SQLite looks for no log, and takes no lock.
    marks(&Connection::open_with_flags(format!("file:{name}?immutable=1"), flags)?)
}

/// The marks after the log is replayed, in memory only.
fn marks_with_log(database: &Path) -> rusqlite::Result<Vec<String>> {
    let connection = open(database, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
    connection.busy_timeout(schema::BUSY_TIMEOUT)?;
    marks(&connection)
}

/// Whether the database file is the one that a connection's log was begun on.
pub(super) fn is_base_of(database: &Path, connection: &Connection) -> bool {
    match (marks_without_log(database), marks(connection)) {
        (Ok(alone), Ok(together)) => alone.last().is_some_and(|last| together.contains(last)),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_is_due_when_idle_when_old_and_when_long_and_never_without_a_write() {
        type Step = (u64, Option<Reset>);
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        // Writes in ms from the start; the log's bytes; when asked, what is decided.
        let cases: [(&str, &[u64], u64, &[Step]); 5] = [
            ("nothing was written", &[], LIMIT, &[(0, None), (100_000, None)]),
            ("idle", &[1000], 1, &[(1000, None), (3999, None), (4000, Some(Reset::Empty))]),
            ("long", &[1000], LIMIT, &[(1000, Some(Reset::Reuse))]),
            ("one write after another", &[0, 2000, 4000], 1, &[(5000, None), (7000, Some(Reset::Empty))]),
            ("they never cease", &[0, 10_000, 20_000, 29_999], 1, &[(29_999, None), (30_000, Some(Reset::Reuse))]),
        ];
        for (name, writes, bytes, steps) in cases {
            let mut schedule = Schedule::new(start);
            writes.iter().for_each(|write| schedule.wrote(at(*write)));
            for (ms, decided) in steps {
                assert_eq!(schedule.decide(at(*ms), bytes), *decided, "{name}, at {ms} ms");
            }
        }
    }

    #[test]
    fn one_that_was_stopped_short_is_tried_again_later_and_one_that_was_done_is_not() {
        let start = Instant::now();
        let mut schedule = Schedule::new(start);
        schedule.wrote(start);
        let idle = start + IDLE_TIME;
        schedule.checkpointed(idle, false);
        assert_eq!(schedule.due(), Some(idle + RETRY_PAUSE));
        assert_eq!(schedule.decide(idle, LIMIT), None);
        schedule.checkpointed(idle + RETRY_PAUSE, true);
        assert_eq!(schedule.due(), None);
    }
}
