//! The operator's API, under `/api`: JSON, for the holder of the token. See `docs/operations.md`.

mod first_page;
pub(crate) mod operator_socket;
mod settings;
pub(crate) mod view;

use crate::apps::manifest::Run;
use crate::http::errors;
use crate::http::framing::host_head;
use crate::license::{Code, Place, Time, check_unsigned, unverified};
use crate::licensing::clock::CLOCK_NOT_SET;
use crate::licensing::status::{check_form, check_text, for_people, verdict};
use crate::plugins::job::{Job, KvFailure, KvJob, MAX_KV_TIME};
use crate::plugins::plugin::{Command, HOLD, Plugin, State};
use crate::plugins::registry::{Entry, Registry};
use crate::process::log_file;
use crate::protocol::message::{DeleteOp, KvOp, KvResult, ListOp, MAX_KEY, MAX_VALUE, SetOp};
use crate::protocol::metadata::is_plugin_id;
use crate::store::kv::KvError;
use crate::store::{Store, StoreError, now_ms};
use crate::util::json_number;
use crate::util::utc;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use crossbeam_channel::bounded;
use percent_encoding::percent_decode_str;
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant, SystemTime};
use subtle::ConstantTimeEq;

/// Default number of lines of `logs`.
const DEFAULT_LOG_LINES: usize = 100;

/// Limit of lines of a log in one answer.
const MAX_LOG_LINES: usize = 10_000;

/// Margin beyond a plugin's time for an operation on a key. Its worker answers when that time is over.
const KV_MARGIN: Duration = Duration::from_secs(5);

/// Longest key of a setting in bytes.
const MAX_CONFIG_KEY: usize = 128;

/// Largest value of a setting in bytes: all of them must fit the head of `init`.
const MAX_CONFIG_VALUE: usize = 16 * 1024;

/// Largest total size of a plugin's settings in bytes, as JSON in the head of `init`, which also holds the licence.
const MAX_CONFIG: usize = 48 * 1024;

/// Header of an error whose code and message come from a plugin.
pub(crate) const BY_PLUGIN: (&str, &str) = ("x-plugrack-error", "plugin");

/// The API of a registry.
pub(crate) struct Api {
    registry: Arc<Registry>,
    token: String,
    /// The URL of the host, if it has one.
    base: Option<String>,
    /// Number of requests for first pages.
    first_pages: AtomicU64,
}

/// An answer.
pub(crate) struct Reply {
    /// HTTP status.
    pub(crate) status: u16,
    /// JSON, with a line end.
    pub(crate) body: String,
    /// An additional header for this status.
    pub(crate) header: Option<(&'static str, &'static str)>,
}

impl Reply {
    fn ok(value: &impl Serialize) -> Self {
        match serde_json::to_string(value) {
            Ok(body) => Self { status: 200, body: body + "\n", header: None },
            Err(error) => Refused::internal(error).into(),
        }
    }

    /// The headers, without `date` and those of the framing.
    fn headers(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        [("content-type", "application/json"), ("cache-control", "no-store")].into_iter().chain(self.header)
    }

    /// The status line and headers without those of the framing, and the body.
    pub(crate) fn render(self) -> (Vec<u8>, String) {
        (host_head(self.status, self.headers()), self.body)
    }
}

impl From<Refused> for Reply {
    fn from(refused: Refused) -> Self {
        Self { status: refused.status, body: errors::json(&refused.code, &refused.message), header: refused.header }
    }
}

/// A failed request, before it becomes a [`Reply`].
struct Refused {
    status: u16,
    code: String,
    message: String,
    header: Option<(&'static str, &'static str)>,
}

impl Refused {
    fn new(status: u16, code: &str, message: impl Into<String>) -> Self {
        Self { status, code: code.into(), message: message.into(), header: None }
    }

    fn with(self, name: &'static str, value: &'static str) -> Self {
        Self { header: Some((name, value)), ..self }
    }

    fn internal(error: impl std::fmt::Display) -> Self {
        log::error!("api: {error}");
        Self::new(500, "internal", error.to_string())
    }
}

impl From<StoreError> for Refused {
    /// A failure of the store, which has logged it.
    fn from(error: StoreError) -> Self {
        Self::new(status_of(error.code()), error.code(), error.to_string())
    }
}

type Handled = Result<Reply, Refused>;

/// A plugin's id with data in the store, and the plugin itself unless its file is refused or gone.
struct Known {
    id: String,
    plugin: Option<Arc<Plugin>>,
}

/// A parsed request.
struct Call<'a> {
    method: &'a str,
    /// Path segments below `/api`, decoded.
    path: Vec<String>,
    query: HashMap<String, String>,
    body: Vec<u8>,
}

impl Api {
    /// Creates the API of a registry. `base` is the URL of the host, if it has one.
    pub(crate) fn new(registry: Arc<Registry>, token: String, base: Option<String>) -> Self {
        Self { registry, token, base, first_pages: AtomicU64::new(1) }
    }

    /// Checks token, path and method, so that the body of an invalid request need not be sent.
    pub(crate) fn check(&self, method: &str, url: &str, authorization: Option<&str>) -> Option<Reply> {
        let path = url.split_once('?').map_or(url, |(path, _)| path);
        let checked = self.authorize(authorization).and_then(|()| path_of(path)).and_then(|path| {
            let path: Vec<&str> = path.iter().map(String::as_str).collect();
            methods_of(&path).filter(|methods| methods.contains(&method)).map(drop).ok_or_else(|| unknown(method, &path))
        });
        checked.err().map(Reply::from)
    }

    /// Answers a request. `url` is the target as it was sent, `authorization` the header's value.
    pub(crate) fn handle(&self, method: &str, url: &str, authorization: Option<&str>, body: &mut dyn Read) -> Reply {
        self.try_handle(method, url, authorization, body).unwrap_or_else(Reply::from)
    }

    fn store(&self) -> &Store {
        &self.registry.context().store
    }

    fn authorize(&self, authorization: Option<&str>) -> Result<(), Refused> {
        let token =
            authorization.and_then(|value| value.split_once(' ')).filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        if token.is_some_and(|(_, token)| token.trim().as_bytes().ct_eq(self.token.as_bytes()).into()) {
            return Ok(());
        }
        let message =
            "the API needs the header Authorization: Bearer TOKEN, with the token in the file admin-token of the data directory";
        Err(Refused::new(401, "unauthorized", message).with("www-authenticate", "Bearer"))
    }

    fn try_handle(&self, method: &str, url: &str, authorization: Option<&str>, body: &mut dyn Read) -> Handled {
        self.authorize(authorization)?;
        let (path, query) = url.split_once('?').unwrap_or((url, ""));
        let path = path_of(path)?;
        let pair = |pair: &str| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            Ok((decode(&name.replace('+', " "))?, decode(&value.replace('+', " "))?))
        };
        let query = query.split('&').filter(|part| !part.is_empty()).map(pair).collect::<Result<_, Refused>>()?;
        let body = read_body(body)?;
        // The first scan may still be under way.
        self.registry.is_scanned(HOLD);
        self.route(&Call { method, path, query, body })
    }

    fn route(&self, call: &Call<'_>) -> Handled {
        let path: Vec<&str> = call.path.iter().map(String::as_str).collect();
        match (call.method, path.as_slice()) {
            ("GET", ["instance"]) => Ok(self.instance()),
            ("GET", ["plugins"]) => Ok(Reply::ok(&json!({"plugins": view::list(&self.registry)}))),
            ("POST", ["rescan"]) => self.rescan(),
            ("GET", ["license-clock"]) => Ok(Reply::ok(&self.registry.context().license_clock.readings())),
            ("DELETE", ["license-clock"]) => self.reset_license_clock(),
            ("GET", ["gone"]) => Ok(Reply::ok(&json!({"gone": self.registry.left_behind()?}))),
            ("DELETE", ["gone", id]) => self.forget(id),
            ("POST", ["plugins", id, "adopt"]) => self.adopt(id, &call.body),
            ("GET", ["plugins", id]) if call.flag("first_page")? => self.show_with_first_page(id),
            ("GET", ["plugins", id]) => self.show(id),
            ("POST", ["plugins", id, verb @ ("start" | "stop" | "restart" | "enable" | "disable")]) => self.command(id, verb),
            ("GET", ["plugins", id, "logs"]) => self.logs(id, call),
            ("GET", ["plugins", id, "config"]) => self.config(id),
            ("PUT", ["plugins", id, "config", key]) => self.set_config(id, key, &call.body),
            ("DELETE", ["plugins", id, "config", key]) => self.unset_config(id, key),
            (_, ["plugins", id, "env", rest @ ..]) if rest.len() < 2 => self.env(id, rest.first().copied(), call),
            (_, ["plugins", id, "limits", rest @ ..]) if rest.len() < 2 => self.limits(id, rest.first().copied(), call),
            ("GET", ["plugins", id, "license"]) => self.license(&*self.plugin(id)?),
            ("PUT", ["plugins", id, "license"]) => self.set_license(id, call),
            ("DELETE", ["plugins", id, "license"]) => self.unset_license(id),
            ("GET", ["plugins", id, "kv"]) => self.kv_list(id, call),
            ("GET", ["plugins", id, "kv", key]) => self.kv(id, KvOp::Get { key: key_of(key)? }, Vec::new(), call.flag("direct")?),
            ("PUT", ["plugins", id, "kv", key]) => {
                if call.body.len() > MAX_VALUE {
                    return Err(Refused::new(413, "too_large", format!("a value is at most {MAX_VALUE} bytes")));
                }
                let set = SetOp { key: key_of(key)?, ..SetOp::default() };
                self.kv(id, KvOp::Set(set), call.body.clone(), call.flag("direct")?)
            }
            ("DELETE", ["plugins", id, "kv", key]) => {
                let delete = DeleteOp { key: key_of(key)?, if_rev: None };
                self.kv(id, KvOp::Delete(delete), Vec::new(), call.flag("direct")?)
            }
            (_, path) => Err(unknown(call.method, path)),
        }
    }

    fn instance(&self) -> Reply {
        let context = self.registry.context();
        let (id, plugins) = (context.instance_id.to_string(), self.registry.dir().display().to_string());
        Reply::ok(&json!({"instance_id": id, "version": env!("CARGO_PKG_VERSION"), "plugins_dir": plugins}))
    }

    /// Sets the high-water mark of time to the system clock, and starts unlicensed plugins again.
    fn reset_license_clock(&self) -> Handled {
        let context = self.registry.context();
        let before = context.license_clock.readings().mark;
        if !context.license_clock.reset(&context.store)? {
            return Err(Refused::new(409, "clock_not_set", CLOCK_NOT_SET));
        }
        let before = before.map_or("none".to_owned(), utc::rfc3339);
        log::warn!("the operator has reset the high-water mark of time, by which licences are judged: it was {before}");
        for entry in self.registry.entries().into_values() {
            if let Entry::Accepted { plugin, .. } = entry
                && plugin.status().state == State::Unlicensed
            {
                plugin.control.send(Command::Reconsider).ok();
            }
        }
        Ok(Reply::ok(&context.license_clock.readings()))
    }

    fn rescan(&self) -> Handled {
        let changes = self
            .registry
            .rescan()
            .map_err(|error| Refused::internal(format!("the plugins directory cannot be read: {error}")))?;
        Ok(Reply::ok(&changes))
    }

    fn show(&self, id: &str) -> Handled {
        view::one(&self.registry, id, self.base.as_deref())?
            .map(|plugin| Reply::ok(&plugin))
            .ok_or_else(|| no_plugin(&self.registry, id))
    }

    /// Shows a plugin, and requests its first page to check the links.
    fn show_with_first_page(&self, id: &str) -> Handled {
        let base = self.base.as_deref();
        let shown = view::one(&self.registry, id, base)?;
        let mut shown = shown.ok_or_else(|| no_plugin(&self.registry, id))?;
        if let Some((_, Entry::Accepted { plugin, .. })) = self.registry.find(id) {
            shown.first_page = first_page::check(&self.registry, &plugin, base, &self.first_pages);
        }
        Ok(Reply::ok(&shown))
    }

    /// Deletes the data of a plugin that is gone.
    fn forget(&self, id: &str) -> Handled {
        if !self.registry.left_behind()?.iter().any(|left| left.is_of(id)) {
            return Err(Refused::new(404, "not_found", format!("nothing is left of a plugin {id}: plugrack gone lists what is")));
        }
        self.registry.forget(id).map_err(|why| Refused::new(409, "conflict", why))?;
        Ok(Reply::ok(&json!({"forgotten": id})))
    }

    /// Gives an id and its data to a file.
    fn adopt(&self, id: &str, body: &[u8]) -> Handled {
        let body: Value = serde_json::from_slice(body).unwrap_or_default();
        let Some(file) = body["file"].as_str().filter(|_| is_plugin_id(id)) else {
            return Err(Refused::new(400, "bad_request", "the body is {\"file\": NAME}, a name in the plugins directory"));
        };
        self.registry.adopt(id, file).map_err(|why| Refused::new(409, "refused", why))?;
        self.show(id)
    }

    fn command(&self, id: &str, verb: &str) -> Handled {
        let may_run = self.plugin(id).map_or(true, |plugin| plugin.status().enabled);
        if matches!(verb, "start" | "restart") && may_run {
            // The host only executes a file whose metadata it has read, so a replaced or refused file is called with `--metadata` first.
            let replaced = self.registry.replace(id);
            if replaced.map_err(|why| Refused::new(409, "refused", format!("the file of {id} is refused: {why}")))? {
                self.registry.command(&*self.plugin(id)?, Command::Start);
                return self.show(id);
            }
        }
        let plugin = self.plugin(id)?;
        match verb {
            "start" if !plugin.status().enabled => {
                return Err(Refused::new(
                    409,
                    "disabled",
                    format!("the plugin {id} is disabled: enable it, which starts it too"),
                ));
            }
            "start" => self.registry.command(&plugin, Command::Start),
            "stop" => self.registry.command(&plugin, Command::Stop),
            "restart" if !plugin.status().enabled => {
                return Err(Refused::new(
                    409,
                    "disabled",
                    format!("the plugin {id} is disabled: enable it, which starts it too"),
                ));
            }
            "restart" => self.registry.command(&plugin, Command::Restart),
            _ => self.registry.set_enabled(&plugin, verb == "enable")?,
        }
        self.show(id)
    }

    fn logs(&self, id: &str, call: &Call<'_>) -> Handled {
        let plugin = self.plugin(id)?;
        let lines = call.number("lines", DEFAULT_LOG_LINES, 1..=MAX_LOG_LINES)?;
        let (lines, _) = log_file::tail(&self.registry.context().data.log(plugin.id()), lines).map_err(Refused::internal)?;
        Ok(Reply::ok(&json!({"lines": lines})))
    }

    fn config(&self, id: &str) -> Handled {
        let known = self.known(id)?;
        Ok(Reply::ok(&json!({"config": self.store().config(&known.id)?})))
    }

    fn set_config(&self, id: &str, key: &str, body: &[u8]) -> Handled {
        let known = self.known(id)?;
        if !(1..=MAX_CONFIG_KEY).contains(&key.len()) || key.chars().any(char::is_control) {
            return Err(Refused::new(
                400,
                "bad_key",
                format!("a setting's key is 1-{MAX_CONFIG_KEY} bytes without control characters"),
            ));
        }
        // Checked before parsing, which rounds some numbers.
        if let Some(inexact) = std::str::from_utf8(body).ok().and_then(json_number::inexact) {
            return Err(Refused::new(400, "bad_request", inexact));
        }
        let value: Value = serde_json::from_slice(body)
            .map_err(|error| Refused::new(400, "bad_request", format!("the value is not JSON: {error}")))?;
        let fits = value.to_string().len() <= MAX_CONFIG_VALUE && self.store().set_config(&known.id, key, &value, MAX_CONFIG)?;
        if !fits {
            let message = format!("a setting is at most {MAX_CONFIG_VALUE} bytes, and all of a plugin's together {MAX_CONFIG}");
            return Err(Refused::new(413, "too_large", message));
        }
        self.configured(&known)
    }

    fn unset_config(&self, id: &str, key: &str) -> Handled {
        let known = self.known(id)?;
        match self.store().unset_config(&known.id, key)? {
            true => self.configured(&known),
            false => Err(Refused::new(404, "not_found", format!("the plugin {id} has no setting {key:?}"))),
        }
    }

    /// A refused plugin is started again with its new settings. A running one gets them at its next start.
    fn configured(&self, known: &Known) -> Handled {
        let running = known.reconsider();
        Ok(Reply::ok(&json!({"config": self.store().config(&known.id)?, "restart_needed": running})))
    }

    fn license(&self, plugin: &Plugin) -> Handled {
        Ok(Reply::ok(&view::license(&self.registry, plugin)?))
    }

    /// Sets a licence on trial. Checks that need no vendor key come before any write. If the plugin refuses the licence, the previous one
    /// is restored. With `force` the licence is set without checks and for good.
    fn set_license(&self, id: &str, call: &Call<'_>) -> Handled {
        let plugin = self.plugin(id)?;
        let force = call.flag("force")?;
        let bad = |why| Refused::new(400, "bad_license", why);
        let token = if force { check_text(&call.body) } else { check_form(&call.body) }.map_err(bad)?;
        let store = self.store();
        // An earlier refusal of this licence does not count.
        plugin.note_refused_license(None);
        if force {
            store.set_license(id, token)?;
        } else {
            self.check_license(&plugin, token)?;
            store.try_license(id, token, plugin.status().state == State::Ready)?;
        }
        self.relicense(&plugin, "license_set");
        let present = store.license(id)?;
        if force || present.as_deref() == Some(token) {
            return self.license(&plugin);
        }
        let Some(why) = plugin.why_refused(token) else {
            return Err(Refused::new(409, "conflict", format!("another licence has been set for {id} meanwhile")));
        };
        let verb = if plugin.status().state == State::Ready { "runs" } else { "is started" };
        let with = if present.is_some() { "with its previous one" } else { "without one" };
        let outcome = format!("{id} {} the licence and {verb} {with} again: {}", verdict(&why), for_people(&why));
        Err(Refused::new(409, "license_refused", outcome))
    }

    /// Checks a licence without the vendor's key. One that is not valid yet passes if the plugin does not run: it then waits for it.
    fn check_license(&self, plugin: &Plugin, token: &str) -> Result<(), Refused> {
        let (context, id) = (self.registry.context(), plugin.id());
        let place = Place {
            plugin_id: id,
            instance_id: &context.instance_id.to_string(),
            release_date: None,
            now: Time::from(SystemTime::now()),
            not_before_time: Some(context.license_clock.now()),
        };
        let Err(mut refusal) = check_unsigned(Some(token), &place) else { return Ok(()) };
        let begins = unverified(token).and_then(|claims| claims.nbf).filter(|_| refusal.code == Code::NotYetValid);
        if let Some(begins) = begins {
            match check_unsigned(Some(token), &Place { now: begins, not_before_time: None, ..place }) {
                Ok(()) => {
                    let present = context.store.license(id)?;
                    let is_needed = present.is_some_and(|present| check_unsigned(Some(&present), &place).is_ok());
                    if !is_needed && plugin.status().state != State::Ready {
                        return Ok(());
                    }
                }
                Err(then) => refusal = then,
            }
        }
        if refusal.code == Code::Malformed {
            return Err(Refused::new(400, "bad_license", refusal.what));
        }
        let (code, what) = (refusal.code, refusal.what);
        let message = format!("the licence of {id} is unchanged: {what}, or set it all the same with --force ({code})");
        Err(Refused::new(422, code.as_str(), message))
    }

    fn unset_license(&self, id: &str) -> Handled {
        let plugin = self.plugin(id)?;
        if !self.store().unset_license(plugin.id())? {
            return Err(Refused::new(404, "not_found", format!("no licence is set for the plugin {id}")));
        }
        self.relicense(&plugin, "license_removed");
        self.license(&plugin)
    }

    /// Restarts an enabled plugin with its current licence, and waits until it has settled.
    fn relicense(&self, plugin: &Plugin, event: &str) {
        self.store().note_event(plugin.id(), event, "by the operator");
        self.registry.command(plugin, Command::Relicense);
    }

    /// Served from the store, whether the plugin runs or not.
    fn kv_list(&self, id: &str, call: &Call<'_>) -> Handled {
        let known = self.known(id)?;
        let text = |name: &str| call.query.get(name).cloned();
        let list = ListOp {
            prefix: text("prefix").unwrap_or_default(),
            after: text("after"),
            limit: Some(u32::try_from(call.number("limit", 100, 1..=1000)?).unwrap_or(u32::MAX)),
            values: false,
        };
        let answer = self.store().kv(&known.id, KvOp::List(list), &[]).wait().map_err(|error| kv_refused(&error))?;
        let mut keys: Value = serde_json::from_slice(&answer.body).map_err(Refused::internal)?;
        for entry in keys.as_array_mut().into_iter().flatten().filter_map(Value::as_object_mut) {
            if let Some(left) = entry.remove("expires_in_ms").and_then(|left| left.as_i64()) {
                entry.insert("expires_at".to_owned(), utc::rfc3339(now_ms().saturating_add(left)).into());
            }
        }
        Ok(Reply::ok(&json!({"keys": keys, "next": answer.result.next})))
    }

    /// Runs an operation on a key: through the plugin, or directly in the store if it is `direct`.
    fn kv(&self, id: &str, op: KvOp, value: Vec<u8>, direct: bool) -> Handled {
        let known = self.known(id)?;
        let is_read = op.is_read();
        let (key, verb, what) = match &op {
            KvOp::Get { key } => (key.clone(), "get", "read"),
            KvOp::Set(set) => (set.key.clone(), "set", "write to"),
            KvOp::Delete(delete) => (delete.key.clone(), "delete", "delete from"),
            _ => return Err(Refused::internal("an operation that is not the operator's")),
        };
        let itself = format!("{what} the store itself with plugrack kv {verb} --direct {id} KEY");
        let (result, value) = if direct {
            let answer = self.store().kv(&known.id, op, &value).wait().map_err(|error| kv_refused(&error))?;
            (answer.result, answer.body)
        } else {
            let plugin = match &known.plugin {
                Some(plugin) => plugin,
                None => {
                    // Why there was none; it may have been set just now.
                    let refused = self.plugin(id).err();
                    let refused =
                        refused.unwrap_or_else(|| Refused::new(503, "unavailable", format!("the plugin {id} has just come")));
                    return Err(Refused { message: format!("{}; {itself}", refused.message), ..refused });
                }
            };
            self.ask(plugin, op, value, &itself)?
        };
        if is_read && result.found == Some(false) {
            return Err(Refused::new(404, "not_found", format!("the plugin {id} has no key {key:?}")));
        }
        if !is_read {
            return Ok(Reply::ok(&json!({"key": key, "rev": result.rev, "found": result.found})));
        }
        let (name, value) = match String::from_utf8(value) {
            Ok(text) => ("value", text),
            Err(error) => ("value_base64", BASE64.encode(error.into_bytes())),
        };
        Ok(Reply::ok(&json!({"key": key, "rev": result.rev, name: value})))
    }

    /// Sends an operation on a key to a plugin. `itself` describes how to do it without the plugin, for messages.
    fn ask(&self, plugin: &Plugin, op: KvOp, value: Vec<u8>, itself: &str) -> Result<(KvResult, Vec<u8>), Refused> {
        let id = plugin.id();
        let limits = plugin.status().limits.unwrap_or(self.registry.context().default_limits);
        let (reply, answered) = bounded(1);
        if let Err((job, error)) = plugin.submit(Job::Kv(Box::new(KvJob { op, value, reply, arrived: Instant::now() }))) {
            job.fail(error);
        }
        // The worker answers in time; this wait only outlasts it.
        let failed = match answered.recv_timeout(limits.request_timeout.min(MAX_KV_TIME) + KV_MARGIN) {
            Ok(Ok(done)) => return Ok(done),
            Ok(Err(KvFailure::Refused(failure))) => {
                let refused = Refused::new(status_of(&failure.code), &failure.code, failure.message);
                return Err(refused.with(BY_PLUGIN.0, BY_PLUGIN.1));
            }
            Ok(Err(KvFailure::Invalid(why))) => {
                let message = format!("the plugin {id} gave no valid answer: {why}; you can {itself}");
                return Err(Refused::new(502, "bad_gateway", message));
            }
            Ok(Err(KvFailure::Failed(error))) => error,
            Err(_) => errors::TIMEOUT,
        };
        let (status, code, message) = match failed.code {
            "timeout" => (504, "timeout", format!("the plugin {id} did not answer in time: {itself}, or restart the plugin")),
            "unavailable" => (503, "unavailable", format!("the plugin {id} does not run: start it, or {itself}")),
            "overloaded" => (503, "overloaded", format!("the plugin {id} has too much waiting: try again, or {itself}")),
            _ => {
                let log = format!("plugrack logs {id} has the reason");
                (502, "bad_gateway", format!("the plugin {id} gave no valid answer: {log}, and you can {itself}"))
            }
        };
        Err(Refused::new(status, code, message))
    }

    /// Finds a plugin by its id. It may be refused or gone, if the store has data of it.
    fn known(&self, id: &str) -> Result<Known, Refused> {
        let found = self.registry.find(id);
        if let Some((_, Entry::Accepted { plugin, .. })) = found {
            return Ok(Known { id: plugin.id().to_owned(), plugin: Some(plugin) });
        }
        // A file's name is not an id: another plugin may have that id.
        let said = matches!(&found, Some((_, Entry::Refused { id: Some(said), .. })) if said == id);
        if said || self.store().knows(id)? {
            return Ok(Known { id: id.to_owned(), plugin: None });
        }
        self.plugin(id).map(|plugin| Known { id: id.to_owned(), plugin: Some(plugin) })
    }

    fn plugin(&self, id: &str) -> Result<Arc<Plugin>, Refused> {
        match self.registry.find(id) {
            Some((_, Entry::Accepted { plugin, .. })) => Ok(plugin),
            Some((_, Entry::Refused { rejected, .. })) => {
                Err(Refused::new(409, "refused", format!("{id} is refused: {}", rejected.reason)))
            }
            None => Err(no_plugin(&self.registry, id)),
        }
    }
}

impl Known {
    /// How its manifest says that it runs, if it has one.
    fn run(&self) -> Option<&Run> {
        self.plugin.as_ref().and_then(|plugin| plugin.run())
    }

    /// Starts a refused plugin again, because a setting of it has changed. Returns whether a process runs, which gets the setting only
    /// after a restart.
    fn reconsider(&self) -> bool {
        let Some(plugin) = &self.plugin else { return false };
        // If the supervisor is gone, so is the plugin.
        drop(plugin.control.send(Command::Reconsider));
        plugin.status().state.has_process()
    }
}

impl Call<'_> {
    fn flag(&self, name: &str) -> Result<bool, Refused> {
        match self.query.get(name).map(String::as_str) {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(_) => Err(Refused::new(400, "bad_request", format!("{name} is true or false"))),
        }
    }

    fn number(&self, name: &str, default: usize, range: std::ops::RangeInclusive<usize>) -> Result<usize, Refused> {
        match self.query.get(name).map(|text| text.parse()) {
            None => Ok(default),
            Some(Ok(number)) if range.contains(&number) => Ok(number),
            _ => Err(Refused::new(
                400,
                "bad_request",
                format!("{name} is a whole number from {} to {}", range.start(), range.end()),
            )),
        }
    }
}

fn read_body(body: &mut dyn Read) -> Result<Vec<u8>, Refused> {
    let mut bytes = Vec::new();
    // This is the store's limit. That of settings is lower.
    let read = body.take(MAX_VALUE as u64 + 1).read_to_end(&mut bytes);
    read.map_err(|error| Refused::new(400, "bad_request", format!("the body did not come whole: {error}")))?;
    if bytes.len() > MAX_VALUE {
        return Err(Refused::new(413, "too_large", format!("the API takes bodies of at most {MAX_VALUE} bytes")));
    }
    Ok(bytes)
}

/// The segments of a path below `/api`, decoded. The path is split before it is decoded, because a key may contain encoded slashes.
fn path_of(path: &str) -> Result<Vec<String>, Refused> {
    path.strip_prefix("/api").unwrap_or(path).split('/').skip(1).map(decode).collect()
}

/// The methods of a path below `/api`; none if there is no such path.
fn methods_of(path: &[&str]) -> Option<&'static [&'static str]> {
    Some(match path {
        ["instance"] | ["plugins"] | ["plugins", _] | ["plugins", _, "logs" | "config" | "kv" | "env" | "limits"] => &["GET"],
        ["gone"] => &["GET"],
        ["gone", _] => &["DELETE"],
        ["license-clock"] => &["GET", "DELETE"],
        ["rescan"] | ["plugins", _, "start" | "stop" | "restart" | "enable" | "disable" | "adopt"] => &["POST"],
        ["plugins", _, "config", _] => &["PUT", "DELETE"],
        ["plugins", _, "license"] | ["plugins", _, "kv" | "env" | "limits", _] => &["GET", "PUT", "DELETE"],
        _ => return None,
    })
}

/// The error for an unknown path or a wrong method.
fn unknown(method: &str, path: &[&str]) -> Refused {
    let shown = path.join("/");
    let Some(methods) = methods_of(path) else {
        return Refused::new(404, "not_found", format!("there is no /api/{shown}"));
    };
    let message = format!("/api/{shown} takes {}, not {method}", methods.join(", "));
    let allow = match methods {
        ["GET"] => "GET",
        ["POST"] => "POST",
        ["DELETE"] => "DELETE",
        ["GET", "DELETE"] => "GET, DELETE",
        ["PUT", "DELETE"] => "PUT, DELETE",
        _ => "GET, PUT, DELETE",
    };
    Refused::new(405, "method_not_allowed", message).with("allow", allow)
}

fn decode(part: &str) -> Result<String, Refused> {
    let text = percent_decode_str(part).decode_utf8();
    text.map(Into::into).map_err(|_| Refused::new(400, "bad_request", "the path or query is not UTF-8"))
}

fn key_of(key: &str) -> Result<String, Refused> {
    match key.len() {
        1..=MAX_KEY => Ok(key.to_owned()),
        length => Err(Refused::new(400, "bad_key", format!("a key is 1-{MAX_KEY} bytes, this one has {length}"))),
    }
}

fn kv_refused(error: &KvError) -> Refused {
    Refused::new(status_of(error.code()), error.code(), error.to_string())
}

/// The HTTP status for an error code of the protocol. A plugin may use other codes.
fn status_of(code: &str) -> u16 {
    match code {
        "bad_request" | "bad_key" => 400,
        "forbidden" => 403,
        "not_found" => 404,
        "conflict" => 409,
        "too_large" => 413,
        "internal" => 500,
        "busy" => 503,
        "quota" | "no_space" => 507,
        _ => 422,
    }
}

/// No request gets `not found` before the first scan has finished.
fn no_plugin(registry: &Registry, id: &str) -> Refused {
    if registry.is_scanned(Duration::ZERO) {
        return Refused::new(404, "not_found", format!("there is no plugin {id}"));
    }
    let message = format!("the host has just started, and whether there is a plugin {id} is not known yet: try again");
    Refused::new(503, "unavailable", message).with("retry-after", "2")
}
