//! The host's own settings, and whether each plugin is enabled.

use super::{Store, StoreError, identity};
use rusqlite::{OptionalExtension, params};
use uuid::Uuid;

/// The setting that holds the high-water mark of time, in milliseconds since 1970-01-01 UTC.
const LICENSE_CLOCK_MARK: &str = "time_mark";

impl Store {
    /// The instance id of this installation.
    pub(crate) fn instance_id(&self) -> Result<Uuid, StoreError> {
        self.read(identity::read)
    }

    /// Replaces the instance id, in the database and in the file beside it. A kill in between leaves one of the two ids.
    pub(crate) fn rotate(&self, new: Uuid) -> Result<(), StoreError> {
        let old = self.instance_id()?;
        identity::rotate(self.path(), old, new, || self.write(move |connection| Ok(identity::replace(connection, new)?)))
    }

    /// The high-water mark of time; none if it was made unreadable by hand.
    pub(crate) fn license_clock_mark(&self) -> Result<Option<i64>, StoreError> {
        self.read(|connection| {
            let mut statement = connection.prepare_cached("SELECT value FROM settings WHERE key = ?1")?;
            let text: Option<String> = statement.query_row([LICENSE_CLOCK_MARK], |row| row.get(0)).optional()?;
            Ok(text.and_then(|text| text.parse().ok()))
        })
    }

    /// Stores the high-water mark of time.
    pub(crate) fn set_license_clock_mark(&self, mark: i64) -> Result<(), StoreError> {
        self.write(move |connection| {
            let sql = "INSERT INTO settings (key, value) VALUES (?1, ?2) ON CONFLICT DO UPDATE SET value = excluded.value";
            connection.execute(sql, params![LICENSE_CLOCK_MARK, mark.to_string()])?;
            Ok(())
        })
    }

    /// Whether a plugin is enabled, which is the default.
    pub(crate) fn is_enabled(&self, plugin: &str) -> Result<bool, StoreError> {
        self.read(|connection| {
            let mut statement = connection.prepare_cached("SELECT enabled FROM plugins WHERE id = ?1")?;
            Ok(statement.query_row([plugin], |row| row.get(0)).optional()?.unwrap_or(true))
        })
    }

    /// Enables or disables a plugin.
    pub(crate) fn set_enabled(&self, plugin: &str, enabled: bool) -> Result<(), StoreError> {
        let plugin = plugin.to_owned();
        self.write(move |connection| {
            let sql =
                "INSERT INTO plugins (id, enabled) VALUES (?1, ?2) ON CONFLICT (id) DO UPDATE SET enabled = excluded.enabled";
            connection.execute(sql, params![plugin, enabled])?;
            Ok(())
        })
    }
}
