//! The instance id: a row in the database, and a file beside it that shows whether the database is the right one.
//!
//! The database gets its id in the transaction that creates its tables, and the file is written after that. So a file without a
//! database, or a database without an id, means that something was lost, and not that this is a first start.

use super::{StoreError, schema, wal};
use crate::system::data_dir::private_file;
use rusqlite::{Connection, OpenFlags, OptionalExtension, params};
use std::fs::{File, Permissions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use uuid::Uuid;

/// The name of the file beside the database.
pub(super) const FILE: &str = "instance-id";

/// The setting that holds the instance id.
const INSTANCE_ID: &str = "instance_id";

/// Most bytes to read of the file: two ids, and room for line ends that an editor added.
const MAX_FILE: u64 = 256;

/// Reads the instance id from the database at `path`, possibly while a host runs.
///
/// # Errors
/// The database cannot be read, or has no instance id.
pub(crate) fn read_instance_id(path: &Path) -> Result<String, StoreError> {
    let connection = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    if schema::check(&connection)? == 0 {
        return Err(StoreError::NoIdentity);
    }
    find(&connection)?.ok_or(StoreError::NoIdentity)
}

/// Stores the instance id of a new database.
pub(super) fn insert(connection: &Connection) -> rusqlite::Result<()> {
    let id = Uuid::new_v4().to_string();
    connection.execute("INSERT INTO settings (key, value) VALUES (?1, ?2)", params![INSTANCE_ID, id])?;
    Ok(())
}

/// Replaces the instance id of a database.
pub(super) fn replace(connection: &Connection, id: Uuid) -> rusqlite::Result<()> {
    connection.execute("UPDATE settings SET value = ?2 WHERE key = ?1", params![INSTANCE_ID, id.to_string()])?;
    Ok(())
}

/// The instance id of a database.
pub(super) fn read(connection: &Connection) -> Result<Uuid, StoreError> {
    let text = find(connection)?.ok_or(StoreError::NoIdentity)?;
    Uuid::parse_str(&text).map_err(|_| StoreError::BadInstanceId(text))
}

fn find(connection: &Connection) -> rusqlite::Result<Option<String>> {
    connection.query_row("SELECT value FROM settings WHERE key = ?1", [INSTANCE_ID], |row| row.get(0)).optional()
}

/// The file that names the instance id. While the id changes, the file names both.
pub(super) struct IdentityFile {
    path: PathBuf,
    named: Vec<Uuid>,
}

impl IdentityFile {
    /// Reads the file beside a database; a missing file names no id.
    pub(super) fn beside(database: &Path) -> Result<Self, StoreError> {
        let path = database.with_file_name(FILE);
        let mut text = String::new();
        match File::open(&path).and_then(|file| file.take(MAX_FILE).read_to_string(&mut text)) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Self { path, named: Vec::new() }),
            Err(error) if error.kind() != ErrorKind::InvalidData => {
                let error = io::Error::new(error.kind(), format!("{}: {error}", path.display()));
                return Err(StoreError::File(Arc::new(error)));
            }
            _ => {}
        }
        let named: Result<Vec<_>, _> = text.split_ascii_whitespace().map(Uuid::parse_str).collect();
        match named {
            Ok(named) if !named.is_empty() => Ok(Self { path, named }),
            _ => Err(StoreError::BadIdentityFile),
        }
    }

    /// Checks a database before any change: an empty one must have no file beside it, and any other must have an id that the file
    /// names.
    pub(super) fn check(&self, connection: &Connection) -> Result<(), StoreError> {
        if schema::check(connection)? == 0 {
            return self.check_missing();
        }
        let found = read(connection)?;
        match self.named.first() {
            Some(named) if !self.named.contains(&found) => Err(StoreError::OtherIdentity { found, named: *named }),
            _ => Ok(()),
        }
    }

    /// Checks whether a database may be missing.
    pub(super) fn check_missing(&self) -> Result<(), StoreError> {
        self.named.first().map_or(Ok(()), |named| Err(StoreError::Missing { named: *named }))
    }

    /// Rewrites the file to name only the database's id.
    pub(super) fn settle(&mut self, id: Uuid) -> io::Result<()> {
        if self.named == [id] { Ok(()) } else { self.write(&[id]) }
    }

    /// Writes the file atomically and durably.
    pub(super) fn write(&mut self, ids: &[Uuid]) -> io::Result<()> {
        let directory = self.path.parent().filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut file = tempfile::Builder::new().permissions(Permissions::from_mode(0o600)).tempfile_in(directory)?;
        for id in ids {
            writeln!(file, "{id}")?;
        }
        file.as_file().sync_all()?;
        file.persist(&self.path)?;
        File::open(directory)?.sync_all()?;
        self.named = ids.to_vec();
        Ok(())
    }
}

/// Opens the database for the first time in this process: checks that it belongs here, creates it at the first start, and migrates
/// it. Close the returned file after all connections to it.
pub(super) fn open(path: &Path) -> Result<(Connection, File), StoreError> {
    let mut file = IdentityFile::beside(path)?;
    if wal::length(path) == 0 {
        if wal::length(&wal::path(path)) > 0 {
            return Err(StoreError::LeftLog);
        }
        file.check_missing()?;
    } else if !wal::belong_together(path) {
        return Err(StoreError::OtherLog);
    }
    // SQLite would make it readable by all; its other files inherit this file's mode.
    let made = private_file().create(true).truncate(false).read(true).write(true).open(path);
    let made = made.and_then(|file| file.set_permissions(Permissions::from_mode(0o600)).map(|()| file));
    let database = made.map_err(|error| StoreError::File(Arc::new(error)))?;
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut connection = wal::open(path, flags)?;
    connection.busy_timeout(schema::BUSY_TIMEOUT)?;
    // Comes first: it checks that the file is a plugrack database.
    file.check(&connection)?;
    schema::migrate(&mut connection)?;
    schema::prepare(&connection)?;
    let id = read(&connection)?;
    // A full disk must not prevent the start of a host that has run before. The next start tries again.
    if let Err(error) = file.settle(id) {
        log::warn!("cannot write {}: {error}", file.path.display());
    }
    Ok((connection, database))
}

/// Replaces the instance id. At every moment the file names the id that the database has.
pub(super) fn rotate(
    database: &Path,
    old: Uuid,
    new: Uuid,
    commit: impl FnOnce() -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let mut file = IdentityFile::beside(database)?;
    let failed = |error| StoreError::File(Arc::new(error));
    file.write(&[old, new]).map_err(failed)?;
    commit()?;
    file.write(&[new]).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;
    use crate::store::kv::Quota;
    use std::fs;

    fn open_store(path: &Path) -> Result<Store, String> {
        Store::open(path, Quota { keys: 10, bytes: 1000 }).map_err(|error| error.to_string())
    }

    /// Wherever a change of the identity is broken off, the next start finds one of the two, and the file names it alone.
    #[test]
    fn a_change_of_the_identity_that_is_broken_off_locks_nobody_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("plugrack.db");
        let old = open_store(&path).unwrap().instance_id().unwrap();
        let new = Uuid::new_v4();
        let named = || fs::read_to_string(path.with_file_name(FILE)).unwrap();
        IdentityFile::beside(&path).unwrap().write(&[old, new]).unwrap();
        assert_eq!(open_store(&path).unwrap().instance_id().unwrap(), old);
        assert_eq!(named(), format!("{old}\n"));

        IdentityFile::beside(&path).unwrap().write(&[old, new]).unwrap();
        replace(&Connection::open(&path).unwrap(), new).unwrap();
        assert_eq!(open_store(&path).unwrap().instance_id().unwrap(), new);
        assert_eq!(named(), format!("{new}\n"));

        let newer = Uuid::new_v4();
        open_store(&path).unwrap().rotate(newer).unwrap();
        assert_eq!(open_store(&path).unwrap().instance_id().unwrap(), newer);
        assert_eq!(named(), format!("{newer}\n"));
    }

    #[test]
    fn a_first_run_that_is_broken_off_goes_on_and_a_loss_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("plugrack.db");
        let side = path.with_file_name(FILE);
        // Before SQLite has written anything, and before the file beside it is there.
        fs::write(&path, "").unwrap();
        let id = open_store(&path).unwrap().instance_id().unwrap();
        fs::remove_file(&side).unwrap();
        assert_eq!(open_store(&path).unwrap().instance_id().unwrap(), id);
        assert_eq!(fs::read_to_string(&side).unwrap(), format!("{id}\n"));

        let whole = fs::read(&path).unwrap();
        let refused = || open_store(&path).err().unwrap();
        fs::remove_file(&path).unwrap();
        assert!(refused().starts_with("plugrack.db is missing or empty"), "{}", refused());
        fs::write(&path, "").unwrap();
        assert!(refused().contains(&id.to_string()) && refused().contains("remove instance-id"), "{}", refused());
        fs::write(&path, &whole).unwrap();
        fs::write(&side, format!("{}\n", Uuid::new_v4())).unwrap();
        assert!(refused().contains("is the database of instance"), "{}", refused());
        for wrong in [&b""[..], b"not an id", b"\xff\xff"] {
            fs::write(&side, wrong).unwrap();
            assert!(refused().starts_with("the file instance-id"), "{}", refused());
        }
        fs::remove_file(&side).unwrap();
        assert_eq!(open_store(&path).unwrap().instance_id().unwrap(), id);

        let connection = Connection::open(&path).unwrap();
        connection.execute("DELETE FROM settings WHERE key = 'instance_id'", []).unwrap();
        drop(connection);
        assert!(refused().starts_with("plugrack.db has no instance id"), "{}", refused());
        fs::remove_file(&side).unwrap();
        assert!(refused().starts_with("plugrack.db has no instance id"), "{}", refused());
    }
}
