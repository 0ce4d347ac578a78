//! Sets up a connection: pragmas, and the migration to this program's schema.

use super::{StoreError, identity, wal};
use rusqlite::{Connection, TransactionBehavior};
use std::time::Duration;

/// The version of `schema.sql`, kept in `user_version`.
pub(super) const VERSION: i64 = 1 + MIGRATIONS.len() as i64;

/// Identifies the file as a plugrack database in `application_id`: "plgr".
const APPLICATION_ID: i64 = 0x706c_6772;

/// The schema of a new database.
const SCHEMA: &str = include_str!("../../schema.sql");

/// Migrations from each version to the next, starting with version 1.
const MIGRATIONS: [&str; 4] = [
    "ALTER TABLE plugins ADD COLUMN uid INTEGER; CREATE UNIQUE INDEX plugins_by_uid ON plugins (uid)",
    "CREATE TABLE licenses (plugin TEXT PRIMARY KEY, token TEXT NOT NULL, warned INTEGER) STRICT, WITHOUT ROWID",
    "ALTER TABLE plugins ADD COLUMN file TEXT; ALTER TABLE plugins ADD COLUMN seen INTEGER;
     CREATE TABLE programs (file TEXT PRIMARY KEY, fingerprint TEXT, metadata TEXT CHECK (json_valid(metadata)), uid INTEGER)
         STRICT, WITHOUT ROWID;
     CREATE UNIQUE INDEX programs_by_uid ON programs (uid)",
    "CREATE TABLE env (plugin TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (plugin, name))
         STRICT, WITHOUT ROWID;
     CREATE TABLE limits (plugin TEXT NOT NULL, name TEXT NOT NULL, value INTEGER NOT NULL, PRIMARY KEY (plugin, name))
         STRICT, WITHOUT ROWID",
];

/// How long a connection waits for a lock. Only another program's access, such as a backup's, can hold one for long.
pub(super) const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Page cache of a connection in KiB: the host's memory is budgeted, and the kernel caches the file as well.
const CACHE_KIB: i64 = 1024;

/// Page size of a new database in bytes. The cost of a commit is its pages, and a small value changes one or two: half of SQLite's
/// default makes many sets a third faster. With smaller pages a value of 1 MiB takes three times as long to read, and a key of the
/// maximum length does not fit.
const PAGE_SIZE: i64 = 2048;

/// Sets a connection up for reading and writing.
///
/// `synchronous=FULL` in WAL mode syncs the log at every commit, so acknowledged changes survive power loss.
pub(super) fn prepare(connection: &Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "cache_size", -CACHE_KIB)?;
    connection.pragma_update(None, "journal_size_limit", wal::LIMIT)?;
    // The writer decides when to checkpoint, see `wal.rs`.
    connection.pragma_update(None, "wal_autocheckpoint", 0)?;
    connection.pragma_update(None, "trusted_schema", false)
}

/// Sets a connection up for reading.
pub(super) fn prepare_reader(connection: &Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.pragma_update(None, "cache_size", -CACHE_KIB)?;
    connection.pragma_update(None, "trusted_schema", false)
}

/// Migrates the database to this program's version. Reads the version inside the transaction that changes it, so that two programs
/// that start at once cannot both migrate.
pub(super) fn migrate(connection: &mut Connection) -> Result<(), StoreError> {
    connection.busy_timeout(BUSY_TIMEOUT)?;
    // First checks without writing: a write transaction would modify another program's file.
    if check(connection)? == 0 {
        connection.pragma_update(None, "page_size", PAGE_SIZE)?;
    }
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    match check(&transaction)? {
        VERSION => return Ok(()),
        0 => {
            transaction.execute_batch(SCHEMA)?;
            // In one transaction, so that no plugrack database lacks an instance id.
            identity::insert(&transaction)?;
            transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
        }
        version => {
            for (_, migration) in (1..).zip(MIGRATIONS).filter(|(from, _)| *from >= version) {
                transaction.execute_batch(migration)?;
            }
        }
    }
    transaction.pragma_update(None, "user_version", VERSION)?;
    Ok(transaction.commit()?)
}

/// The version of a plugrack database; 0 if it is still empty.
pub(super) fn check(connection: &Connection) -> Result<i64, StoreError> {
    let pragma = |name| connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
    let tables: i64 = connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
    match (pragma("application_id")?, pragma("user_version")?) {
        (APPLICATION_ID, version) if version > VERSION => Err(StoreError::Newer { found: version }),
        (APPLICATION_ID, version) => Ok(version),
        (0, 0) if tables == 0 => Ok(0),
        _ => Err(StoreError::Foreign),
    }
}
