//! The cached `--metadata` answer of each file in the plugins directory, and the owner file of each plugin id.

use super::licenses::previous_key;
use super::{Store, StoreError, now_ms};
use crate::util::utc;
use rusqlite::{OptionalExtension, params};
use serde::Serialize;
use std::ops::RangeInclusive;

/// A file's last `--metadata` answer.
#[derive(Debug, Clone, Default)]
pub(crate) struct Program {
    /// Fingerprint of the file, opaque text of the caller; none if the file never answered.
    pub(crate) fingerprint: Option<String>,
    /// The answer, as JSON.
    pub(crate) metadata: Option<String>,
}

/// The owner of an id.
#[derive(Debug, Clone, Default)]
pub(crate) struct Owner {
    /// Name of the file in the plugins directory; none if the id is free.
    pub(crate) file: Option<String>,
    /// Whether the database holds keys, settings, environment variables, limits or a licence under the id.
    pub(crate) has_data: bool,
}

/// The data stored under an id.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Holding {
    /// The plugin's id, or the name of a file that never became a plugin.
    pub(crate) id: String,
    /// The file that the id belongs to.
    pub(crate) file: Option<String>,
    /// When the plugin was last accepted, in milliseconds since 1970-01-01 UTC.
    #[serde(serialize_with = "utc::serialize_some")]
    pub(crate) seen: Option<i64>,
    /// Number of keys in the key-value store.
    pub(crate) keys: u64,
    /// Total bytes of these keys and their values.
    pub(crate) bytes: u64,
    /// Number of settings.
    pub(crate) settings: u64,
    /// Number of environment variables.
    pub(crate) env: u64,
    /// Number of limits.
    pub(crate) limits: u64,
    /// Whether there is a licence.
    pub(crate) license: bool,
}

impl Holding {
    /// Whether there is any data that the operator or the plugin would miss.
    pub(crate) fn has_data(&self) -> bool {
        self.keys > 0 || self.settings > 0 || self.env > 0 || self.limits > 0 || self.license
    }
}

impl Store {
    /// The stored answer of a file.
    pub(crate) fn program(&self, file: &str) -> Result<Program, StoreError> {
        self.read(|connection| {
            let mut statement = connection.prepare_cached("SELECT fingerprint, metadata FROM programs WHERE file = ?1")?;
            let program = |row: &rusqlite::Row<'_>| Ok(Program { fingerprint: row.get(0)?, metadata: row.get(1)? });
            Ok(statement.query_row([file], program).optional()?.unwrap_or_default())
        })
    }

    /// Stores a file's answer without waiting for the commit. If it is lost, the host asks the file again.
    pub(crate) fn note_program(&self, file: &str, fingerprint: String, metadata: String) {
        let file = file.to_owned();
        let noted = self.begin(move |connection| {
            let sql = "INSERT INTO programs (file, fingerprint, metadata) VALUES (?1, ?2, ?3)
                       ON CONFLICT (file) DO UPDATE SET fingerprint = excluded.fingerprint, metadata = excluded.metadata";
            connection.prepare_cached(sql)?.execute(params![file, fingerprint, metadata])?;
            Ok::<_, StoreError>(())
        });
        drop(noted);
    }

    /// Removes the answers of files that are no longer in the plugins directory.
    pub(crate) fn keep_programs(&self, files: Vec<String>) -> Result<(), StoreError> {
        self.write(move |connection| {
            let files = serde_json::Value::from(files).to_string();
            connection.execute("DELETE FROM programs WHERE file NOT IN (SELECT value FROM json_each(?1))", [files])?;
            Ok(())
        })
    }

    /// The uid under which a file answers `--metadata`: its current one if that is in the range, else the highest that no plugin and no
    /// other file has. Plugins get theirs from the lower end. None if no uid is free.
    pub(crate) fn program_uid(&self, file: &str, range: &RangeInclusive<u32>) -> Result<Option<u32>, StoreError> {
        let (file, range) = (file.to_owned(), range.clone());
        let own = self.read(|connection| {
            let mut statement = connection.prepare_cached("SELECT uid FROM programs WHERE file = ?1")?;
            Ok(statement.query_row([&file], |row| row.get::<_, Option<u32>>(0)).optional()?.flatten())
        })?;
        if own.is_some_and(|uid| range.contains(&uid)) {
            return Ok(own);
        }
        self.write(move |connection| {
            let taken = "SELECT uid FROM plugins WHERE uid BETWEEN ?1 AND ?2
                         UNION SELECT uid FROM programs WHERE uid BETWEEN ?1 AND ?2 ORDER BY uid DESC";
            let mut taken = connection.prepare_cached(taken)?;
            let taken = taken.query_map([range.start(), range.end()], |row| row.get(0))?.collect::<Result<Vec<u32>, _>>()?;
            let free = range.rev().enumerate().find(|(place, uid)| taken.get(*place) != Some(uid)).map(|(_, uid)| uid);
            if let Some(uid) = free {
                let sql = "INSERT INTO programs (file, uid) VALUES (?1, ?2) ON CONFLICT (file) DO UPDATE SET uid = excluded.uid";
                connection.execute(sql, params![file, uid])?;
            }
            Ok(free)
        })
    }

    /// The owner of an id.
    pub(crate) fn owner(&self, plugin: &str) -> Result<Owner, StoreError> {
        self.read(|connection| {
            let mut statement = connection.prepare_cached("SELECT file, kv_keys > 0 FROM plugins WHERE id = ?1")?;
            let row = |row: &rusqlite::Row<'_>| Ok((row.get(0)?, row.get(1)?));
            let (file, keys): (Option<String>, bool) = statement.query_row([plugin], row).optional()?.unwrap_or_default();
            let others =
                "SELECT EXISTS (SELECT 1 FROM config WHERE plugin = ?1) OR EXISTS (SELECT 1 FROM licenses WHERE plugin = ?1)
                     OR EXISTS (SELECT 1 FROM env WHERE plugin = ?1) OR EXISTS (SELECT 1 FROM limits WHERE plugin = ?1)";
            let others: bool = connection.prepare_cached(others)?.query_row([plugin], |row| row.get(0))?;
            Ok(Owner { file, has_data: keys || others })
        })
    }

    /// Whether anything but events is stored under an id: its plugin was accepted once, or the operator has set something for it.
    pub(crate) fn knows(&self, plugin: &str) -> Result<bool, StoreError> {
        self.read(|connection| {
            let sql = "SELECT EXISTS (SELECT 1 FROM plugins WHERE id = ?1) OR EXISTS (SELECT 1 FROM config WHERE plugin = ?1)
                           OR EXISTS (SELECT 1 FROM licenses WHERE plugin = ?1) OR EXISTS (SELECT 1 FROM env WHERE plugin = ?1)
                           OR EXISTS (SELECT 1 FROM limits WHERE plugin = ?1)";
            Ok(connection.prepare_cached(sql)?.query_row([plugin], |row| row.get(0))?)
        })
    }

    /// Records a file as the owner of an id, and that its plugin was accepted now. Does not wait for the commit: the plugin's own writes
    /// come after it.
    pub(crate) fn note_owner(&self, plugin: &str, file: &str) {
        drop(self.begin(own(plugin, file)));
    }

    /// Makes a file the owner of an id.
    pub(crate) fn set_owner(&self, plugin: &str, file: &str) -> Result<(), StoreError> {
        self.write(own(plugin, file))
    }

    /// The data stored under each id, of present and removed plugins, by id.
    pub(crate) fn holdings(&self) -> Result<Vec<Holding>, StoreError> {
        self.read(|connection| {
            let sql = "SELECT id, file, seen, coalesce(kv_keys, 0), coalesce(kv_bytes, 0),
                              (SELECT count(*) FROM config WHERE plugin = id), (SELECT count(*) FROM env WHERE plugin = id),
                              (SELECT count(*) FROM limits WHERE plugin = id), EXISTS (SELECT 1 FROM licenses WHERE plugin = id)
                       FROM (SELECT id FROM plugins UNION SELECT plugin FROM config UNION SELECT plugin FROM licenses
                             UNION SELECT plugin FROM env UNION SELECT plugin FROM limits
                             UNION SELECT DISTINCT plugin FROM events) LEFT JOIN plugins USING (id) ORDER BY id";
            let mut statement = connection.prepare_cached(sql)?;
            let holding = |row: &rusqlite::Row<'_>| {
                let (id, file, seen, keys, bytes) = (row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?);
                let (settings, env, limits, license) = (row.get(5)?, row.get(6)?, row.get(7)?, row.get(8)?);
                Ok(Holding { id, file, seen, keys, bytes, settings, env, limits, license })
            };
            Ok(statement.query_map([], holding)?.collect::<Result<_, _>>()?)
        })
    }

    /// Deletes all data under an id.
    pub(crate) fn forget(&self, plugin: &str) -> Result<(), StoreError> {
        let plugin = plugin.to_owned();
        self.remove(move |connection| {
            for sql in [
                "DELETE FROM kv WHERE plugin = ?1",
                "DELETE FROM config WHERE plugin = ?1",
                "DELETE FROM env WHERE plugin = ?1",
                "DELETE FROM limits WHERE plugin = ?1",
                "DELETE FROM licenses WHERE plugin = ?1",
                "DELETE FROM events WHERE plugin = ?1",
                "DELETE FROM plugins WHERE id = ?1",
            ] {
                connection.execute(sql, [&plugin])?;
            }
            connection.execute("DELETE FROM settings WHERE key = ?1", [previous_key(&plugin)])?;
            Ok(())
        })
    }
}

fn own(plugin: &str, file: &str) -> impl FnOnce(&rusqlite::Connection) -> Result<(), StoreError> + Send + 'static {
    let (plugin, file) = (plugin.to_owned(), file.to_owned());
    move |connection| {
        let sql = "INSERT INTO plugins (id, file, seen) VALUES (?1, ?2, ?3)
                   ON CONFLICT (id) DO UPDATE SET file = excluded.file, seen = excluded.seen";
        connection.prepare_cached(sql)?.execute(params![plugin, file, now_ms()])?;
        Ok(())
    }
}
