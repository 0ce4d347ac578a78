//! The events of each plugin.

use super::{Store, StoreError, now_ms};
use crate::util::utc;
use rusqlite::params;
use serde::Serialize;
use std::time::Duration;

/// Events kept for each plugin; older ones are deleted.
const KEPT: i64 = 200;

/// Longest detail in bytes.
const MAX_DETAIL: usize = 2048;

/// Longest time that a read waits for queued events to be committed. A commit takes milliseconds; a failing store must not keep the
/// operator from seeing the events there are.
const SETTLE_TIME: Duration = Duration::from_millis(500);

/// An event of a plugin.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Event {
    /// Milliseconds since 1970-01-01 UTC.
    #[serde(serialize_with = "utc::serialize")]
    pub(crate) at: i64,
    /// Kind, one word: started, ready, crashed, …
    pub(crate) kind: String,
    /// Detail, one sentence.
    pub(crate) detail: String,
}

impl Store {
    /// Records an event without waiting for the commit. If it cannot be written it is lost; the host's log has it too.
    pub(crate) fn note_event(&self, plugin: &str, kind: &str, detail: &str) {
        let (owner, kind, at) = (plugin.to_owned(), kind.to_owned(), now_ms());
        let mut detail = detail.to_owned();
        detail.truncate(detail.floor_char_boundary(MAX_DETAIL));
        let noted = self.begin(move |connection| {
            let sql = "INSERT INTO events (plugin, at, kind, detail) VALUES (?1, ?2, ?3, ?4)";
            connection.prepare_cached(sql)?.execute(params![owner, at, kind, detail])?;
            let oldest = "SELECT seq FROM events WHERE plugin = ?1 ORDER BY seq DESC LIMIT 1 OFFSET ?2";
            let sql = format!("DELETE FROM events WHERE plugin = ?1 AND seq <= ({oldest})");
            connection.prepare_cached(&sql)?.execute(params![owner, KEPT])?;
            Ok::<_, StoreError>(())
        });
        if let Err(error) = noted {
            log::debug!("{plugin}: an event was not recorded: {error}");
        }
    }

    /// The latest events of a plugin, newest first. Waits up to [`SETTLE_TIME`] for events that were just recorded.
    pub(crate) fn events(&self, plugin: &str, most: u32) -> Result<Vec<Event>, StoreError> {
        if let Ok(noted) = self.begin(|_| Ok::<_, StoreError>(())) {
            noted.wait_at_most(SETTLE_TIME);
        }
        self.read(|connection| {
            let mut statement =
                connection.prepare_cached("SELECT at, kind, detail FROM events WHERE plugin = ?1 ORDER BY seq DESC LIMIT ?2")?;
            let event = |row: &rusqlite::Row<'_>| Ok(Event { at: row.get(0)?, kind: row.get(1)?, detail: row.get(2)? });
            Ok(statement.query_map(params![plugin, most], event)?.collect::<Result<_, _>>()?)
        })
    }
}
