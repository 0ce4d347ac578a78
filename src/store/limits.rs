//! Limits that the operator has set for a plugin, overriding the host's defaults.

use super::{Store, StoreError};
use rusqlite::params;
use std::time::Duration;

/// A limit that can be set for one plugin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Limit {
    /// Open files of each of its processes.
    OpenFiles,
    /// Time it has to become ready.
    StartTimeout,
    /// Time it has to begin an answer.
    RequestTimeout,
}

impl Limit {
    /// All limits.
    pub(crate) const ALL: [Self; 3] = [Self::OpenFiles, Self::StartTimeout, Self::RequestTimeout];

    /// The name on the command line, in the API and in the database.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::OpenFiles => "open-files",
            Self::StartTimeout => "start-timeout",
            Self::RequestTimeout => "request-timeout",
        }
    }

    /// The limit with this name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|limit| limit.name() == name)
    }
}

/// The limits that are set for a plugin; the host's defaults apply to the others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct PluginLimits {
    /// Open files of each of its processes.
    pub(crate) open_files: Option<u64>,
    /// Time it has to become ready.
    pub(crate) start_timeout: Option<Duration>,
    /// Time it has to begin an answer.
    pub(crate) request_timeout: Option<Duration>,
}

/// The limits that apply to a plugin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LimitsInForce {
    /// Open files of each of its processes; none is no limit.
    pub(crate) open_files: Option<u64>,
    /// Time it has to become ready.
    pub(crate) start_timeout: Duration,
    /// Time it has to begin an answer.
    pub(crate) request_timeout: Duration,
}

impl PluginLimits {
    /// The effective limits: these, and `defaults` for all others.
    pub(crate) fn over(self, defaults: LimitsInForce) -> LimitsInForce {
        LimitsInForce {
            open_files: self.open_files.or(defaults.open_files),
            start_timeout: self.start_timeout.unwrap_or(defaults.start_timeout),
            request_timeout: self.request_timeout.unwrap_or(defaults.request_timeout),
        }
    }

    /// Whether this limit is set.
    pub(crate) fn has(self, limit: Limit) -> bool {
        match limit {
            Limit::OpenFiles => self.open_files.is_some(),
            Limit::StartTimeout => self.start_timeout.is_some(),
            Limit::RequestTimeout => self.request_timeout.is_some(),
        }
    }

    /// Sets a limit from its value in the database: a number, or milliseconds.
    fn note(&mut self, limit: Limit, value: u64) {
        match limit {
            Limit::OpenFiles => self.open_files = Some(value),
            Limit::StartTimeout => self.start_timeout = Some(Duration::from_millis(value)),
            Limit::RequestTimeout => self.request_timeout = Some(Duration::from_millis(value)),
        }
    }
}

impl Store {
    /// The limits that are set for a plugin.
    pub(crate) fn limits(&self, plugin: &str) -> Result<PluginLimits, StoreError> {
        self.read(|connection| {
            let mut limits = PluginLimits::default();
            let mut statement = connection.prepare_cached("SELECT name, value FROM limits WHERE plugin = ?1")?;
            let mut rows = statement.query([plugin])?;
            while let Some(row) = rows.next()? {
                let (name, value): (String, u64) = (row.get(0)?, row.get(1)?);
                if let Some(limit) = Limit::named(&name) {
                    limits.note(limit, value);
                }
            }
            Ok(limits)
        })
    }

    /// The longest time that is set as a limit of any plugin.
    pub(crate) fn longest_time_limit(&self) -> Result<Duration, StoreError> {
        self.read(|connection| {
            let sql = "SELECT coalesce(max(value), 0) FROM limits WHERE name IN (?1, ?2)";
            let names = params![Limit::StartTimeout.name(), Limit::RequestTimeout.name()];
            Ok(Duration::from_millis(connection.query_row(sql, names, |row| row.get(0))?))
        })
    }

    /// Sets a limit of a plugin: a number, or milliseconds.
    pub(crate) fn set_limit(&self, plugin: &str, limit: Limit, value: u64) -> Result<(), StoreError> {
        let plugin = plugin.to_owned();
        self.write(move |connection| {
            let sql = "INSERT INTO limits (plugin, name, value) VALUES (?1, ?2, ?3)
                       ON CONFLICT DO UPDATE SET value = excluded.value";
            connection.execute(sql, params![plugin, limit.name(), value])?;
            Ok(())
        })
    }

    /// Removes a limit of a plugin, and returns whether it was set.
    pub(crate) fn unset_limit(&self, plugin: &str, limit: Limit) -> Result<bool, StoreError> {
        let plugin = plugin.to_owned();
        self.remove(move |connection| {
            Ok(connection.execute("DELETE FROM limits WHERE plugin = ?1 AND name = ?2", params![plugin, limit.name()])? > 0)
        })
    }
}
