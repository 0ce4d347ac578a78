//! The operator's environment variables and limits of one plugin.

use super::{Api, Call, Handled, Known, Refused, Reply};
use crate::process::check_variable;
use crate::store::limits::{Limit, LimitsInForce};
use crate::util::units::{parse_request_time, parse_start_time, time_text};
use serde_json::{Map, Value, json};
use std::time::Duration;

/// Largest value of an environment variable in bytes. Linux allows four times as much, including the name.
const MAX_ENV_VALUE: usize = 32 * 1024;

/// Largest total size of a plugin's environment variables in bytes, in the form that a process gets. Linux allows a quarter of the stack
/// limit, usually 2 MiB, for all variables and arguments.
const MAX_ENV: usize = 128 * 1024;

/// Smallest limit of open files: with fewer an interpreter cannot load its modules.
const MIN_OPEN_FILES: u64 = 16;

impl Api {
    /// `/api/plugins/ID/env`: the names of a plugin's environment variables, or one of these variables.
    pub(super) fn env(&self, id: &str, name: Option<&str>, call: &Call<'_>) -> Handled {
        let known = self.known(id)?;
        let store = self.store();
        let missing = |name: &str| Refused::new(404, "not_found", format!("no variable {name} is set for the plugin {id}"));
        match (call.method, name) {
            ("GET", None) => Ok(Reply::ok(&json!({"env": store.env_names(&known.id)?}))),
            ("GET", Some(name)) => {
                let value = store.env_value(&known.id, name)?.ok_or_else(|| missing(name))?;
                Ok(Reply::ok(&json!({"name": name, "value": value})))
            }
            ("PUT", Some(name)) => {
                self.set_env(&known, name, &call.body)?;
                self.env_set(&known)
            }
            ("DELETE", Some(name)) if store.unset_env(&known.id, name)? => self.env_set(&known),
            ("DELETE", Some(name)) => Err(missing(name)),
            _ => Err(self.unknown_of(call)),
        }
    }

    fn set_env(&self, known: &Known, name: &str, value: &[u8]) -> Result<(), Refused> {
        check_variable(name).map_err(|why| Refused::new(400, "bad_name", why))?;
        let text = std::str::from_utf8(value).ok().filter(|text| !text.contains('\0'));
        let Some(text) = text else {
            let why = format!("the value of {name} is not UTF-8 text without NUL: encode it, for example in base64");
            return Err(Refused::new(400, "bad_request", why));
        };
        if text.len() > MAX_ENV_VALUE || !self.store().set_env(&known.id, name, text, MAX_ENV)? {
            let why =
                format!("a variable may have {MAX_ENV_VALUE} bytes, and all variables of a plugin {MAX_ENV} bytes in total");
            return Err(Refused::new(413, "too_large", why));
        }
        Ok(())
    }

    fn env_set(&self, known: &Known) -> Handled {
        let restart_needed = known.reconsider();
        Ok(Reply::ok(&json!({"env": self.store().env_names(&known.id)?, "restart_needed": restart_needed})))
    }

    /// `/api/plugins/ID/limits`: the limits that apply to a plugin, or one of them.
    pub(super) fn limits(&self, id: &str, name: Option<&str>, call: &Call<'_>) -> Handled {
        let known = self.known(id)?;
        let limit = match name {
            None => None,
            Some(name) => {
                let names = Limit::ALL.map(Limit::name).join(", ");
                let unknown = || Refused::new(404, "not_found", format!("there is no limit {name:?}; the limits are {names}"));
                Some(Limit::named(name).ok_or_else(unknown)?)
            }
        };
        let store = self.store();
        match (call.method, limit) {
            ("GET", None) => Ok(Reply::ok(&json!({"limits": self.limits_of(&known)?}))),
            ("GET", Some(limit)) => Ok(Reply::ok(&self.limits_of(&known)?[limit.name()])),
            ("PUT", Some(limit)) => {
                let value = self.read_limit(limit, &call.body)?;
                store.set_limit(&known.id, limit, value)?;
                if limit != Limit::OpenFiles {
                    self.registry.context().answer_time.outlast(Duration::from_millis(value));
                }
                self.limits_set(&known)
            }
            ("DELETE", Some(limit)) if store.unset_limit(&known.id, limit)? => self.limits_set(&known),
            ("DELETE", Some(limit)) => {
                let why = format!("the plugin {id} has no {} of its own; the host's default applies", limit.name());
                Err(Refused::new(404, "not_found", why))
            }
            _ => Err(self.unknown_of(call)),
        }
    }

    /// Parses the value of a limit into the store's form.
    fn read_limit(&self, limit: Limit, text: &[u8]) -> Result<u64, Refused> {
        let bad = |why: String| Refused::new(400, "bad_value", format!("{}: {why}", limit.name()));
        let text = std::str::from_utf8(text).map_err(|_| bad("the value is not text".into()))?.trim();
        let time = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        match limit {
            Limit::OpenFiles => {
                let files = text.parse().ok().filter(|files| *files >= MIN_OPEN_FILES);
                let files = files.ok_or_else(|| bad(format!("the value must be a whole number, at least {MIN_OPEN_FILES}")))?;
                match self.registry.context().capacity.most_files() {
                    Some(most) if files > most => Err(bad(format!(
                        "the host itself may have at most {most} open files: raise its hard limit with ulimit -Hn, or with LimitNOFILE= in a systemd unit"
                    ))),
                    _ => Ok(files),
                }
            }
            Limit::StartTimeout => parse_start_time(text).map(time).map_err(bad),
            Limit::RequestTimeout => parse_request_time(text).map(time).map_err(bad),
        }
    }

    fn limits_set(&self, known: &Known) -> Handled {
        known.reconsider();
        let limits = self.registry.context().limits(&known.id, known.run())?;
        let restart_needed = running(known).is_some_and(|running| running != limits);
        Ok(Reply::ok(&json!({"limits": self.limits_of(known)?, "restart_needed": restart_needed})))
    }

    /// The limits of a plugin by name: the value from the next start on, whether that is the host's default, and the value of the running
    /// process if that differs.
    fn limits_of(&self, known: &Known) -> Result<Map<String, Value>, Refused> {
        let context = self.registry.context();
        let (set, limits, running) = (context.store.limits(&known.id)?, context.limits(&known.id, known.run())?, running(known));
        let one = |limit: Limit| {
            let value = shown(limit, &limits);
            let mut one = json!({"value": value, "default": !set.has(limit)});
            if let Some(running) = running.map(|running| shown(limit, &running)).filter(|running| *running != value) {
                one["running"] = running;
            }
            (limit.name().to_owned(), one)
        };
        Ok(Limit::ALL.into_iter().map(one).collect())
    }

    fn unknown_of(&self, call: &Call<'_>) -> Refused {
        let path: Vec<&str> = call.path.iter().map(String::as_str).collect();
        super::unknown(call.method, &path)
    }
}

/// The limits of the running process.
fn running(known: &Known) -> Option<LimitsInForce> {
    let status = known.plugin.as_ref()?.status();
    status.limits.filter(|_| status.state.has_process())
}

/// A limit's value as JSON: a number, or a time as text; null is no limit.
fn shown(limit: Limit, limits: &LimitsInForce) -> Value {
    match limit {
        Limit::OpenFiles => limits.open_files.into(),
        Limit::StartTimeout => time_text(limits.start_timeout).into(),
        Limit::RequestTimeout => time_text(limits.request_timeout).into(),
    }
}
