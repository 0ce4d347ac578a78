//! The licence of each plugin: a token that is stored and handed to the plugin, and never shown in full.
//!
//! A new licence is on trial until the plugin accepts it. Meanwhile the setting `license_before:PLUGIN` holds the previous one. Both
//! change in one transaction, so that no crash loses the previous licence.

use super::{Store, StoreError};
use rusqlite::{Connection, OptionalExtension, params};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What a plugin had before the licence on trial.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub(crate) struct Previous {
    /// The previous licence; `None` if there was none.
    pub(crate) token: Option<String>,
    /// Whether the plugin ran with it, or without any, when the new licence was set.
    pub(crate) ran: bool,
}

/// The licence for a plugin's next start.
#[derive(Debug, Default)]
pub(crate) struct Given {
    /// The licence; `None` if there is none.
    pub(crate) token: Option<String>,
    /// What the plugin had before, if the licence is on trial.
    pub(crate) previous: Option<Previous>,
}

/// Name of the setting that holds a plugin's previous licence.
pub(super) fn previous_key(plugin: &str) -> String {
    format!("license_before:{plugin}")
}

fn token_of(connection: &Connection, plugin: &str) -> Result<Option<String>, StoreError> {
    let mut statement = connection.prepare_cached("SELECT token FROM licenses WHERE plugin = ?1")?;
    Ok(statement.query_row([plugin], |row| row.get(0)).optional()?)
}

/// A value that was malformed by hand counts as none.
fn previous_of(connection: &Connection, plugin: &str) -> Result<Option<Previous>, StoreError> {
    let mut statement = connection.prepare_cached("SELECT value FROM settings WHERE key = ?1")?;
    let value: Option<String> = statement.query_row([previous_key(plugin)], |row| row.get(0)).optional()?;
    Ok(value.and_then(|value| serde_json::from_str(&value).ok()))
}

fn put_token(connection: &Connection, plugin: &str, token: Option<&str>) -> Result<(), StoreError> {
    let sql = match token {
        Some(_) => {
            "INSERT INTO licenses (plugin, token) VALUES (?1, ?2)
             ON CONFLICT DO UPDATE SET token = excluded.token, warned = NULL"
        }
        None => "DELETE FROM licenses WHERE plugin = ?1 AND ?2 IS NULL",
    };
    connection.execute(sql, params![plugin, token])?;
    Ok(())
}

fn put_previous(connection: &Connection, plugin: &str, previous: Option<&Previous>) -> Result<(), StoreError> {
    let value = previous.map(|previous| serde_json::json!(previous).to_string());
    let sql = match value {
        Some(_) => "INSERT INTO settings (key, value) VALUES (?1, ?2) ON CONFLICT DO UPDATE SET value = excluded.value",
        None => "DELETE FROM settings WHERE key = ?1 AND ?2 IS NULL",
    };
    connection.execute(sql, params![previous_key(plugin), value])?;
    Ok(())
}

impl Store {
    /// The licence of a plugin.
    pub(crate) fn license(&self, plugin: &str) -> Result<Option<String>, StoreError> {
        self.read(|connection| token_of(connection, plugin))
    }

    /// The licence of a plugin and, if it is on trial, the previous one, in one consistent read.
    pub(crate) fn given_license(&self, plugin: &str) -> Result<Given, StoreError> {
        self.read(|connection| {
            // Only inside a transaction do two statements see the same state.
            let transaction = connection.unchecked_transaction()?;
            Ok(Given { token: token_of(&transaction, plugin)?, previous: previous_of(&transaction, plugin)? })
        })
    }

    /// All licences, by plugin.
    pub(crate) fn licenses(&self) -> Result<BTreeMap<String, String>, StoreError> {
        self.read(|connection| {
            let mut statement = connection.prepare_cached("SELECT plugin, token FROM licenses")?;
            Ok(statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect::<Result<_, _>>()?)
        })
    }

    /// Sets a plugin's licence without a trial. Replaces the previous one, and one on trial.
    pub(crate) fn set_license(&self, plugin: &str, token: &str) -> Result<(), StoreError> {
        let (plugin, token) = (plugin.to_owned(), token.to_owned());
        self.write(move |connection| {
            put_previous(connection, &plugin, None)?;
            put_token(connection, &plugin, Some(&token))
        })
    }

    /// Sets a plugin's licence on trial: the previous one is kept until [`Store::accept_license`] or [`Store::reject_license`] decides.
    /// `ran` is whether the plugin runs with what it has.
    ///
    /// Sets the licence without a trial if the plugin already has it, or if it has no licence and does not run without one.
    pub(crate) fn try_license(&self, plugin: &str, token: &str, ran: bool) -> Result<(), StoreError> {
        let (plugin, token) = (plugin.to_owned(), token.to_owned());
        self.write(move |connection| {
            let current = token_of(connection, &plugin)?;
            // If a trial is already under way, the licence before it is the last known good one.
            let kept = match previous_of(connection, &plugin)? {
                Some(previous) => previous,
                None => Previous { token: current, ran },
            };
            let is_trial = kept.token.as_deref() != Some(&*token) && (kept.token.is_some() || kept.ran);
            put_previous(connection, &plugin, is_trial.then_some(&kept))?;
            put_token(connection, &plugin, Some(&token))
        })
    }

    /// Ends a trial after the plugin accepted the licence.
    pub(crate) fn accept_license(&self, plugin: &str, token: &str) -> Result<(), StoreError> {
        let (plugin, token) = (plugin.to_owned(), token.to_owned());
        self.write(move |connection| {
            // If another licence was set meanwhile, that one is on trial, and this one becomes the previous one.
            let is_current = token_of(connection, &plugin)?.as_deref() == Some(&*token);
            let is_trial = previous_of(connection, &plugin)?.is_some();
            let accepted = (is_trial && !is_current).then_some(Previous { token: Some(token), ran: true });
            put_previous(connection, &plugin, accepted.as_ref())
        })
    }

    /// Restores the previous licence after the plugin refused the one on trial. False, and no change, if another licence was set
    /// meanwhile.
    pub(crate) fn reject_license(&self, plugin: &str, token: &str) -> Result<bool, StoreError> {
        let (plugin, token) = (plugin.to_owned(), token.to_owned());
        self.write(move |connection| {
            let is_current = token_of(connection, &plugin)?.as_deref() == Some(&*token);
            let Some(previous) = previous_of(connection, &plugin)?.filter(|_| is_current) else { return Ok(false) };
            put_previous(connection, &plugin, None)?;
            put_token(connection, &plugin, previous.token.as_deref())?;
            Ok(true)
        })
    }

    /// Removes a plugin's licence and, during a trial, the previous one. True if there was one.
    pub(crate) fn unset_license(&self, plugin: &str) -> Result<bool, StoreError> {
        let plugin = plugin.to_owned();
        self.remove(move |connection| {
            put_previous(connection, &plugin, None)?;
            Ok(connection.execute("DELETE FROM licenses WHERE plugin = ?1", [&plugin])? > 0)
        })
    }

    /// Logs a warning about a plugin's licence once on each `day`, in days since 1970-01-01 UTC. Does not wait. If the database cannot
    /// record the warning, it is not logged; the store logs why.
    pub(crate) fn warn_of_license(&self, plugin: &str, day: i64, warning: String) {
        let plugin = plugin.to_owned();
        let noted = self.begin(move |connection| {
            let sql = "UPDATE licenses SET warned = ?2 WHERE plugin = ?1 AND warned IS NOT ?2";
            if connection.execute(sql, params![plugin, day])? > 0 {
                log::warn!("{plugin}: {warning}");
            }
            Ok::<_, StoreError>(())
        });
        // Dropping the ticket does not cancel the change, and a failure is logged.
        drop(noted);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::kv::Quota;

    /// Each step, then the licence and the one before it.
    #[test]
    fn what_a_plugin_had_is_kept_until_it_has_accepted_another() {
        enum Step {
            Set(&'static str),
            Try(&'static str, bool),
            Accept(&'static str),
            Reject(&'static str, bool),
            Unset,
        }
        use Step::{Accept, Reject, Set, Try, Unset};
        type Kept = Option<(Option<&'static str>, bool)>;
        type Steps = [(Step, Option<&'static str>, Kept)];
        let cases: [(&str, &Steps); 10] = [
            (
                "accepted",
                &[
                    (Set("a"), Some("a"), None),
                    (Try("b", true), Some("b"), Some((Some("a"), true))),
                    (Accept("b"), Some("b"), None),
                ],
            ),
            (
                "refused",
                &[
                    (Set("a"), Some("a"), None),
                    (Try("b", true), Some("b"), Some((Some("a"), true))),
                    (Reject("b", true), Some("a"), None),
                ],
            ),
            (
                "a second one while the first is on trial",
                &[
                    (Set("a"), Some("a"), None),
                    (Try("b", true), Some("b"), Some((Some("a"), true))),
                    (Try("c", false), Some("c"), Some((Some("a"), true))),
                    (Reject("b", false), Some("c"), Some((Some("a"), true))),
                    (Reject("c", true), Some("a"), None),
                ],
            ),
            (
                "the first is accepted after the second was set",
                &[
                    (Set("a"), Some("a"), None),
                    (Try("b", false), Some("b"), Some((Some("a"), false))),
                    (Try("c", false), Some("c"), Some((Some("a"), false))),
                    (Accept("b"), Some("c"), Some((Some("b"), true))),
                    (Reject("c", true), Some("b"), None),
                ],
            ),
            ("none, and it did not run", &[(Try("b", false), Some("b"), None), (Reject("b", false), Some("b"), None)]),
            ("none, and it ran", &[(Try("b", true), Some("b"), Some((None, true))), (Reject("b", true), None, None)]),
            ("the same", &[(Set("a"), Some("a"), None), (Try("a", true), Some("a"), None)]),
            (
                "the one before, by hand",
                &[
                    (Set("a"), Some("a"), None),
                    (Try("b", true), Some("b"), Some((Some("a"), true))),
                    (Try("a", false), Some("a"), None),
                ],
            ),
            (
                "by force",
                &[
                    (Set("a"), Some("a"), None),
                    (Try("b", true), Some("b"), Some((Some("a"), true))),
                    (Set("c"), Some("c"), None),
                    (Accept("c"), Some("c"), None),
                ],
            ),
            (
                "removed",
                &[
                    (Set("a"), Some("a"), None),
                    (Try("b", true), Some("b"), Some((Some("a"), true))),
                    (Unset, None, None),
                    (Reject("b", false), None, None),
                ],
            ),
        ];
        let dir = tempfile::tempdir().unwrap();
        for (number, (name, steps)) in cases.iter().enumerate() {
            let home = dir.path().join(number.to_string());
            std::fs::create_dir(&home).unwrap();
            let path = home.join("plugrack.db");
            for (step, token, kept) in *steps {
                // Opened anew each time: all of it is on the disk.
                let store = Store::open(&path, Quota { keys: 1, bytes: 1 }).unwrap();
                match step {
                    Set(token) => store.set_license("p", token).unwrap(),
                    Try(token, ran) => store.try_license("p", token, *ran).unwrap(),
                    Accept(token) => store.accept_license("p", token).unwrap(),
                    Reject(token, expected) => assert_eq!(store.reject_license("p", token).unwrap(), *expected, "{name}"),
                    Unset => assert!(store.unset_license("p").unwrap(), "{name}"),
                }
                let given = store.given_license("p").unwrap();
                assert_eq!(given.token.as_deref(), *token, "{name}");
                let previous = given.previous.map(|previous| (previous.token, previous.ran));
                assert_eq!(previous, kept.map(|(token, ran)| (token.map(str::to_owned), ran)), "{name}");
                assert_eq!(store.given_license("q").unwrap().token, None);
            }
        }
    }
}
