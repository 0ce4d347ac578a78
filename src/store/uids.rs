//! The uid of each plugin: assigned at its first start, and kept.

use super::{Store, StoreError};
use rusqlite::{OptionalExtension, params};
use std::ops::RangeInclusive;

impl Store {
    /// The uid of a plugin: its current one if that is in the range, else the lowest that no plugin has, which is assigned to it. None
    /// if the range is used up.
    pub(crate) fn uid(&self, plugin: &str, range: &RangeInclusive<u32>) -> Result<Option<u32>, StoreError> {
        if let Some(uid) = self.last_uid(plugin)?.filter(|uid| range.contains(uid)) {
            return Ok(Some(uid));
        }
        let (plugin, range) = (plugin.to_owned(), range.clone());
        self.write(move |connection| {
            let mut taken = connection.prepare_cached("SELECT uid FROM plugins WHERE uid BETWEEN ?1 AND ?2 ORDER BY uid")?;
            let taken = taken.query_map([range.start(), range.end()], |row| row.get(0))?.collect::<Result<Vec<u32>, _>>()?;
            let free = range.enumerate().find(|(place, uid)| taken.get(*place) != Some(uid)).map(|(_, uid)| uid);
            if let Some(uid) = free {
                let sql = "INSERT INTO plugins (id, uid) VALUES (?1, ?2) ON CONFLICT (id) DO UPDATE SET uid = excluded.uid";
                connection.execute(sql, params![plugin, uid])?;
                // Plugins take precedence over files that only answer `--metadata`.
                connection.execute("UPDATE programs SET uid = NULL WHERE uid = ?1", [uid])?;
            }
            Ok(free)
        })
    }

    /// The plugin's last uid, even outside the current range.
    pub(crate) fn last_uid(&self, plugin: &str) -> Result<Option<u32>, StoreError> {
        self.read(|connection| {
            let mut statement = connection.prepare_cached("SELECT uid FROM plugins WHERE id = ?1")?;
            Ok(statement.query_row([plugin], |row| row.get(0)).optional()?.flatten())
        })
    }
}
