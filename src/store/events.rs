//! What happened to each plugin.

use super::{Store, StoreError, now_ms};
use crate::util::utc;
use rusqlite::params;
use serde::Serialize;
use std::time::Duration;

/// Events kept for each plugin; older ones are forgotten.
const KEPT: i64 = 200;

/// Longest detail in bytes.
const MAX_DETAIL: usize = 2048;

/// Longest wait for events that are noted and not yet written, before they are read. A commit takes milliseconds; a store that
/// is in trouble must not keep the operator from seeing what there is.
const SETTLE_TIME: Duration = Duration::from_millis(500);

/// Something that happened to a plugin.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Event {
    /// Milliseconds since 1970-01-01 UTC.
    #[serde(serialize_with = "utc::serialize")]
    pub(crate) at: i64,
    /// In a word: started, ready, crashed, …
    pub(crate) kind: String,
    /// In a sentence.
    pub(crate) detail: String,
}

impl Store {
    /// Notes an event, without waiting until it is written. One that cannot be written is lost; the log has what it says too.
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

    /// The last events of a plugin, newest first, those among them that were noted just now, as far as they can be written
    /// within [`SETTLE_TIME`].
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
