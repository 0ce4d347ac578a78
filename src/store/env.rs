//! The environment variables that the operator has set for each plugin.

use super::{Store, StoreError};
use rusqlite::{OptionalExtension, params};

impl Store {
    /// All variables of a plugin, by name.
    pub(crate) fn env(&self, plugin: &str) -> Result<Vec<(String, String)>, StoreError> {
        self.read(|connection| {
            let mut statement = connection.prepare_cached("SELECT name, value FROM env WHERE plugin = ?1 ORDER BY name")?;
            let variables = statement.query_map([plugin], |row| Ok((row.get(0)?, row.get(1)?)))?;
            Ok(variables.collect::<Result<_, _>>()?)
        })
    }

    /// The names of a plugin's variables.
    pub(crate) fn env_names(&self, plugin: &str) -> Result<Vec<String>, StoreError> {
        self.read(|connection| {
            let mut statement = connection.prepare_cached("SELECT name FROM env WHERE plugin = ?1 ORDER BY name")?;
            let names = statement.query_map([plugin], |row| row.get(0))?;
            Ok(names.collect::<Result<_, _>>()?)
        })
    }

    /// The value of one variable.
    pub(crate) fn env_value(&self, plugin: &str, name: &str) -> Result<Option<String>, StoreError> {
        self.read(|connection| {
            let mut statement = connection.prepare_cached("SELECT value FROM env WHERE plugin = ?1 AND name = ?2")?;
            Ok(statement.query_row([plugin, name], |row| row.get(0)).optional()?)
        })
    }

    /// Sets a variable and returns true, unless the plugin's variables would grow beyond `most` bytes in total, counted as a process
    /// gets them (`NAME=VALUE` and a NUL).
    pub(crate) fn set_env(&self, plugin: &str, name: &str, value: &str, most: usize) -> Result<bool, StoreError> {
        let (plugin, name, value) = (plugin.to_owned(), name.to_owned(), value.to_owned());
        self.write(move |connection| {
            let sql = "SELECT coalesce(sum(size), 0), coalesce(sum(size) FILTER (WHERE name != ?2), 0) FROM
                       (SELECT name, octet_length(name) + octet_length(value) + 2 AS size FROM env WHERE plugin = ?1)";
            let sizes = |row: &rusqlite::Row<'_>| Ok((row.get::<_, usize>(0)?, row.get::<_, usize>(1)?));
            let (before, others) = connection.query_row(sql, params![plugin, name], sizes)?;
            if others + name.len() + value.len() + 2 > most.max(before) {
                return Ok(false);
            }
            let sql =
                "INSERT INTO env (plugin, name, value) VALUES (?1, ?2, ?3) ON CONFLICT DO UPDATE SET value = excluded.value";
            connection.execute(sql, params![plugin, name, value])?;
            Ok(true)
        })
    }

    /// Removes a variable. True if it was set.
    pub(crate) fn unset_env(&self, plugin: &str, name: &str) -> Result<bool, StoreError> {
        let (plugin, name) = (plugin.to_owned(), name.to_owned());
        self.remove(move |connection| {
            Ok(connection.execute("DELETE FROM env WHERE plugin = ?1 AND name = ?2", params![plugin, name])? > 0)
        })
    }
}
