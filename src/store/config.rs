//! The operator's settings for each plugin: JSON values by key.

use super::{Store, StoreError};
use rusqlite::params;
use serde_json::{Map, Value};

impl Store {
    /// All settings of a plugin, in the form of `init`.
    pub(crate) fn config(&self, plugin: &str) -> Result<Map<String, Value>, StoreError> {
        self.read(|connection| {
            let mut statement = connection.prepare_cached("SELECT key, value FROM config WHERE plugin = ?1 ORDER BY key")?;
            let rows = statement.query_map([plugin], |row| Ok((row.get(0)?, row.get::<_, String>(1)?)))?;
            // The schema's CHECK ensures valid JSON.
            let parse = |(key, json): (String, String)| (key, serde_json::from_str(&json).unwrap_or(Value::Null));
            Ok(rows.map(|row| row.map(parse)).collect::<Result<_, _>>()?)
        })
    }

    /// Sets one setting and returns true, unless the plugin's settings would grow beyond `most` bytes in total, counted as in the head
    /// of `init`.
    pub(crate) fn set_config(&self, plugin: &str, key: &str, value: &Value, most: usize) -> Result<bool, StoreError> {
        let (plugin, key, json) = (plugin.to_owned(), key.to_owned(), value.to_string());
        self.write(move |connection| {
            // Counts "KEY":VALUE and a comma.
            let sql = "SELECT coalesce(sum(size), 0), coalesce(sum(size) FILTER (WHERE key != ?2), 0) FROM
                       (SELECT key, octet_length(json_quote(key)) + octet_length(value) + 2 AS size FROM config WHERE plugin = ?1)";
            let sizes = |row: &rusqlite::Row<'_>| Ok((row.get::<_, usize>(0)?, row.get::<_, usize>(1)?));
            let (before, others) = connection.query_row(sql, params![plugin, key], sizes)?;
            if others + Value::from(key.as_str()).to_string().len() + json.len() + 2 > most.max(before) {
                return Ok(false);
            }
            let sql =
                "INSERT INTO config (plugin, key, value) VALUES (?1, ?2, ?3) ON CONFLICT DO UPDATE SET value = excluded.value";
            connection.execute(sql, params![plugin, key, json])?;
            Ok(true)
        })
    }

    /// Removes one setting. True if it was set.
    pub(crate) fn unset_config(&self, plugin: &str, key: &str) -> Result<bool, StoreError> {
        let (plugin, key) = (plugin.to_owned(), key.to_owned());
        self.remove(move |connection| {
            Ok(connection.execute("DELETE FROM config WHERE plugin = ?1 AND key = ?2", params![plugin, key])? > 0)
        })
    }
}
