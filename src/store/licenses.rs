//! The licence of each plugin: a token that is kept and handed over, and never shown whole.
//!
//! A new licence is on trial until the plugin has accepted it. Meanwhile the previous one is kept in the setting
//! `license_before:PLUGIN`, written and removed in the same transaction as the licence itself, so that no crash loses it.

use super::{Store, StoreError};
use rusqlite::{Connection, OptionalExtension, params};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What a plugin had before a licence that is on trial.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub(crate) struct Previous {
    /// The licence; `None` if it had none.
    pub(crate) token: Option<String>,
    /// Whether the plugin ran with it, or without any, when the new licence was set.
    pub(crate) ran: bool,
}

/// The licence that a plugin is to be started with.
#[derive(Debug, Default)]
pub(crate) struct Given {
    /// The licence; `None` if it has none.
    pub(crate) token: Option<String>,
    /// What it had before, if the licence is on trial.
    pub(crate) previous: Option<Previous>,
}

/// The name of the setting that keeps what a plugin had before.
pub(super) fn previous_key(plugin: &str) -> String {
    format!("license_before:{plugin}")
}

fn token_of(connection: &Connection, plugin: &str) -> Result<Option<String>, StoreError> {
    let mut statement = connection.prepare_cached("SELECT token FROM licenses WHERE plugin = ?1")?;
    Ok(statement.query_row([plugin], |row| row.get(0)).optional()?)
}

/// A value that somebody has changed by hand to another form counts as none.
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

    /// The licence of a plugin, and what it had before if that licence is on trial: both of one moment.
    pub(crate) fn given_license(&self, plugin: &str) -> Result<Given, StoreError> {
        self.read(|connection| {
            // Two statements see one state of the database in a transaction alone.
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

    /// Sets the licence of a plugin for good, in the place of the one it had and of one on trial.
    pub(crate) fn set_license(&self, plugin: &str, token: &str) -> Result<(), StoreError> {
        let (plugin, token) = (plugin.to_owned(), token.to_owned());
        self.write(move |connection| {
            put_previous(connection, &plugin, None)?;
            put_token(connection, &plugin, Some(&token))
        })
    }

    /// Sets the licence of a plugin on trial: what the plugin had is kept until [`Store::accept_license`] or
    /// [`Store::reject_license`] decides. `ran` is whether the plugin runs with what it has.
    ///
    /// There is no trial, and the licence is set for good, if the plugin has neither a licence nor runs without one, and if the
    /// licence is the one that it has.
    pub(crate) fn try_license(&self, plugin: &str, token: &str, ran: bool) -> Result<(), StoreError> {
        let (plugin, token) = (plugin.to_owned(), token.to_owned());
        self.write(move |connection| {
            let current = token_of(connection, &plugin)?;
            // Where one is on trial already, the licence before that one is the last that was known to be good.
            let kept = match previous_of(connection, &plugin)? {
                Some(previous) => previous,
                None => Previous { token: current, ran },
            };
            let is_trial = kept.token.as_deref() != Some(&*token) && (kept.token.is_some() || kept.ran);
            put_previous(connection, &plugin, is_trial.then_some(&kept))?;
            put_token(connection, &plugin, Some(&token))
        })
    }

    /// Ends the trial of a licence that its plugin has accepted.
    pub(crate) fn accept_license(&self, plugin: &str, token: &str) -> Result<(), StoreError> {
        let (plugin, token) = (plugin.to_owned(), token.to_owned());
        self.write(move |connection| {
            // If another one has been set meanwhile, it is on trial, and this one is what the plugin gets back.
            let is_current = token_of(connection, &plugin)?.as_deref() == Some(&*token);
            let is_trial = previous_of(connection, &plugin)?.is_some();
            let accepted = (is_trial && !is_current).then_some(Previous { token: Some(token), ran: true });
            put_previous(connection, &plugin, accepted.as_ref())
        })
    }

    /// Gives a plugin back what it had before a licence on trial that it has refused. Says whether it did: not if another licence
    /// has been set meanwhile.
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

    /// Removes the licence of a plugin, and the one before it if it is on trial. Says whether there was one.
    pub(crate) fn unset_license(&self, plugin: &str) -> Result<bool, StoreError> {
        let plugin = plugin.to_owned();
        self.remove(move |connection| {
            put_previous(connection, &plugin, None)?;
            Ok(connection.execute("DELETE FROM licenses WHERE plugin = ?1", [&plugin])? > 0)
        })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::kv::Limits;

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
                let store = Store::open(&path, Limits { keys: 1, bytes: 1 }).unwrap();
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
