//! The licence of each plugin: a token that is kept and handed over, and never shown whole.

use super::{Store, StoreError};
use rusqlite::{OptionalExtension, params};
use std::collections::BTreeMap;

impl Store {
    /// The licence of a plugin.
    pub(crate) fn license(&self, plugin: &str) -> Result<Option<String>, StoreError> {
        self.read(|connection| {
            let mut statement = connection.prepare_cached("SELECT token FROM licenses WHERE plugin = ?1")?;
            Ok(statement.query_row([plugin], |row| row.get(0)).optional()?)
        })
    }

    /// All licences, by plugin.
    pub(crate) fn licenses(&self) -> Result<BTreeMap<String, String>, StoreError> {
        self.read(|connection| {
            let mut statement = connection.prepare_cached("SELECT plugin, token FROM licenses")?;
            Ok(statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect::<Result<_, _>>()?)
        })
    }

    /// Sets the licence of a plugin, in the place of the one it had.
    pub(crate) fn set_license(&self, plugin: &str, token: &str) -> Result<(), StoreError> {
        let (plugin, token) = (plugin.to_owned(), token.to_owned());
        self.write(move |connection| {
            let sql = "INSERT INTO licenses (plugin, token) VALUES (?1, ?2)
                       ON CONFLICT DO UPDATE SET token = excluded.token, warned = NULL";
            connection.execute(sql, params![plugin, token])?;
            Ok(())
        })
    }

    /// Removes the licence of a plugin, and says whether there was one.
    pub(crate) fn unset_license(&self, plugin: &str) -> Result<bool, StoreError> {
        let plugin = plugin.to_owned();
        self.remove(move |connection| Ok(connection.execute("DELETE FROM licenses WHERE plugin = ?1", [&plugin])? > 0))
    }

    /// Warns in the log of the end of a plugin's licence, unless that was done on this day, in days since 1970-01-01 UTC. Does not
    /// wait for it; a warning that cannot be noted is not given, and the store says why.
    pub(crate) fn warn_of_license(&self, plugin: &str, day: i64, warning: String) {
        let plugin = plugin.to_owned();
        let noted = self.begin(move |connection| {
            let sql = "UPDATE licenses SET warned = ?2 WHERE plugin = ?1 AND warned IS NOT ?2";
            if connection.execute(sql, params![plugin, day])? > 0 {
                log::warn!("{plugin}: {warning}");
            }
            Ok::<_, StoreError>(())
        });
        // Dropping the ticket leaves the change, and what refuses it has been logged.
        drop(noted);
    }
}
