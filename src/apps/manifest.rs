//! The manifest of a plugin, `plugrack.toml`: who it is, and how the host runs it and speaks to it. Reading it runs nothing.
//!
//! Each mistake is one sentence with file, line, and what is allowed.

use crate::apps::endpoint::Endpoint;
use crate::apps::static_files::DEFAULT_INDEX;
use crate::process::check_variable;
use crate::protocol::metadata::Metadata;
use crate::util::units::{parse_request_time, parse_start_time};
use serde_json::{Map, Value};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

#[cfg(test)]
mod tests;

/// Name of the manifest in a plugin's directory.
pub(crate) const FILE: &str = "plugrack.toml";

/// Largest manifest in bytes: room for an icon of 32 KiB and the rest.
const MAX_SIZE: u64 = 64 * 1024;

/// Most words of a command, and most variables.
const MAX_ITEMS: usize = 100;

/// Longest word of a command, variable or path in bytes: the kernel's limit of a path.
const MAX_TEXT: usize = 4096;

/// Connections that the host may open to an application, if its manifest does not say.
const CONCURRENCY: u32 = 64;

/// The same for processes of CGI, each of which is a program of its own.
const CGI_CONCURRENCY: u32 = 8;

/// The icon of a plugin whose manifest has none.
const ICON: &str = "📦";

/// The version of a plugin whose manifest has none.
const VERSION: &str = "0";

/// The keys beside the table `run`, which the metadata of the plugin protocol has too.
const METADATA_KEYS: [&str; 15] = [
    "id",
    "name",
    "version",
    "icon",
    "route",
    "host",
    "description",
    "author",
    "homepage",
    "concurrency",
    "protocol",
    "speaks",
    "origins",
    "below_route",
    "trailing_slash",
];

/// Values that may stand in commands and variables.
pub(crate) const PLACEHOLDERS: [&str; 6] = ["socket", "port", "route", "url", "data", "id"];

/// How the host speaks to a plugin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// By the plugin protocol.
    Native,
    /// By HTTP/1.1.
    Http,
    /// By FastCGI.
    FastCgi,
    /// By CGI (RFC 3875): one process for each request.
    Cgi,
    /// Not at all: the host serves its files.
    Static,
}

impl Kind {
    const ALL: [Self; 5] = [Self::Native, Self::Http, Self::FastCgi, Self::Cgi, Self::Static];

    /// The name in a manifest.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Http => "http",
            Self::FastCgi => "fastcgi",
            Self::Cgi => "cgi",
            Self::Static => "static",
        }
    }

    /// The keys of `run` that it may have.
    fn keys(self) -> &'static [&'static str] {
        match self {
            Self::Native => &["kind", "command", "env", "start-timeout", "request-timeout", "open-files"],
            Self::Http => {
                &["kind", "command", "listen", "env", "ready", "start-timeout", "request-timeout", "prefix", "open-files"]
            }
            Self::FastCgi => {
                &["kind", "command", "listen", "env", "start-timeout", "request-timeout", "open-files", "root", "index", "script"]
            }
            Self::Cgi => &["kind", "command", "env", "request-timeout", "open-files", "root", "script"],
            Self::Static => &["kind", "root", "index", "spa", "cache-control"],
        }
    }
}

/// Where an application listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Listen {
    /// On a Unix socket that it makes at `{socket}`.
    Socket,
    /// On a Unix socket that the host makes and hands over as descriptor 3.
    Descriptor,
    /// On a free port of 127.0.0.1 that the host chooses, `{port}`.
    Port,
    /// Elsewhere: it runs already, and the host neither starts nor stops it.
    Attached(Endpoint),
}

/// What an application sees of its route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Prefix {
    /// Nothing: the path begins behind the route.
    Strip,
    /// The whole path.
    Keep,
}

/// The table `run` of a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Run {
    /// The directory of the manifest.
    pub(crate) directory: PathBuf,
    pub(crate) kind: Kind,
    /// The command and its arguments, with placeholders. Empty if the host starts nothing.
    pub(crate) command: Vec<String>,
    pub(crate) listen: Listen,
    /// Variables of its environment, with placeholders.
    pub(crate) env: Vec<(String, String)>,
    /// The path that is asked until the application is ready.
    pub(crate) ready: Option<String>,
    pub(crate) start_timeout: Option<Duration>,
    pub(crate) request_timeout: Option<Duration>,
    pub(crate) open_files: Option<u64>,
    pub(crate) prefix: Prefix,
    /// The directory of scripts or files, absolute.
    pub(crate) root: PathBuf,
    /// The files that stand for their directory.
    pub(crate) index: Vec<String>,
    /// The script that answers every path.
    pub(crate) script: Option<String>,
    /// Whether unknown paths get the index.
    pub(crate) spa: bool,
    /// The `cache-control` of files.
    pub(crate) cache_control: Option<String>,
}

impl Run {
    /// Whether the plugin has a process that the host starts and watches.
    pub(crate) fn has_process(&self) -> bool {
        !self.command.is_empty() && self.kind != Kind::Cgi
    }
}

/// What a manifest says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) metadata: Metadata,
    pub(crate) run: Run,
}

/// Reads the manifest at a path.
///
/// # Errors
/// One sentence: the file cannot be read, or what is wrong with it, and where.
pub(crate) fn read(path: &Path) -> Result<Manifest, String> {
    let cannot = |error: std::io::Error| format!("cannot read {FILE}: {error}");
    let file = File::open(path).map_err(cannot)?;
    if !file.metadata().map_err(cannot)?.is_file() {
        return Err(format!("{FILE} is not a regular file"));
    }
    let mut text = Vec::new();
    file.take(MAX_SIZE + 1).read_to_end(&mut text).map_err(cannot)?;
    if text.len() as u64 > MAX_SIZE {
        return Err(format!("{FILE} has more than {MAX_SIZE} bytes"));
    }
    let text = String::from_utf8(text).map_err(|_| format!("{FILE} is not UTF-8"))?;
    let directory = path.parent().and_then(|directory| std::path::absolute(directory).ok()).unwrap_or_default();
    parse(&text, &directory)
}

/// Reads a manifest in a directory.
///
/// # Errors
/// One sentence: what is wrong, and where.
pub(crate) fn parse(text: &str, directory: &Path) -> Result<Manifest, String> {
    let document = DeTable::parse(text).map_err(|error| {
        let message = error.message().lines().collect::<Vec<_>>().join(", ");
        at(text, error.span(), format_args!("{message}"))
    })?;
    let top = Table { text, name: "", table: document.get_ref() };
    let mut allowed = METADATA_KEYS.to_vec();
    allowed.push("run");
    top.check_keys(&allowed)?;
    let Some(run) = top.table.get("run") else {
        return Err(format!("{FILE} has no table [run], which says how the plugin runs: at least kind, and command or root"));
    };
    let DeValue::Table(table) = run.get_ref() else {
        return Err(top.fault(run, format_args!("run must be a table ([run]), not {}", article(run.get_ref()))));
    };
    let run = read_run(&Table { text, name: "run.", table }, directory)?;
    let metadata = read_metadata(&top, &run)?;
    Ok(Manifest { metadata, run })
}

fn read_metadata(top: &Table<'_>, run: &Run) -> Result<Metadata, String> {
    let mut object = Map::new();
    for (key, value) in top.table {
        if key.get_ref() != "run" {
            object.insert(key.get_ref().to_string(), json(value.get_ref()));
        }
    }
    let Some(Value::String(id)) = object.get("id").cloned() else {
        return match top.table.get("id") {
            Some(id) => Err(top.fault(id, format_args!("id must be a string, not {}", article(id.get_ref())))),
            None => Err(format!("{FILE} has no id: id = \"NAME\", of a-z, 0-9 and -")),
        };
    };
    let concurrency = match run.kind {
        Kind::Native => None,
        Kind::Cgi => Some(CGI_CONCURRENCY),
        Kind::Http | Kind::FastCgi | Kind::Static => Some(CONCURRENCY),
    };
    object.entry("name").or_insert_with(|| id.into());
    object.entry("version").or_insert_with(|| VERSION.into());
    object.entry("icon").or_insert_with(|| ICON.into());
    if let Some(concurrency) = concurrency {
        object.entry("concurrency").or_insert_with(|| concurrency.into());
    }
    if run.kind != Kind::Native {
        // An application that sees its route does not always write it: frameworks that do so in links leave their cookies at `/`.
        object.entry("below_route").or_insert_with(|| "rewrite".into());
    }
    if run.kind != Kind::Native && run.prefix == Prefix::Strip {
        object.entry("trailing_slash").or_insert_with(|| "redirect".into());
    }
    let json = Value::Object(object).to_string();
    Metadata::parse(json.as_bytes()).map_err(|error| {
        let error = error.to_string().replace("metadata.", "");
        // The sentence names the key, and the key has a line.
        let words = || error.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let key = words().find_map(|word| top.table.iter().find(|(key, _)| key.get_ref() == word));
        match key {
            Some((_, value)) => top.fault(value, format_args!("{error}")),
            None => format!("{FILE}: {error}"),
        }
    })
}

fn read_run(run: &Table<'_>, directory: &Path) -> Result<Run, String> {
    let kinds = Kind::ALL.map(Kind::name).join(", ");
    let kind = run.text_of("kind")?.ok_or_else(|| format!("{FILE} has no run.kind: one of {kinds}"))?;
    let (name, value) = kind;
    let kind = Kind::ALL.into_iter().find(|kind| kind.name() == name);
    let kind = kind.ok_or_else(|| run.fault(value, format_args!("run.kind {name:?} is none of {kinds}")))?;
    run.check_keys(kind.keys())?;
    let command = run.texts("command")?;
    let listen = match run.text_of("listen")? {
        None | Some(("socket", _)) => Listen::Socket,
        Some(("fd", _)) => Listen::Descriptor,
        Some(("port", _)) => Listen::Port,
        Some((address, value)) => Listen::Attached(address.parse().map_err(|()| {
            run.fault(
                value,
                format_args!(
                    "run.listen {address:?} is none of \"socket\", \"fd\", \"port\", \"ADDRESS:PORT\" and \"unix:/PATH\""
                ),
            )
        })?),
    };
    let is_attached = matches!(listen, Listen::Attached(_));
    match (kind, command.is_empty()) {
        (Kind::Static | Kind::Cgi, _) => {}
        (_, true) if is_attached => {}
        (_, true) => return Err(format!("{FILE} has no run.command, such as command = [\"gunicorn\", \"app:app\"]")),
        (_, false) if is_attached => {
            let what =
                "run.command and a run.listen that is an address exclude each other: the host does not start what runs already";
            return Err(run.fault(&run.table["command"], format_args!("{what}")));
        }
        (_, false) => {}
    }
    if let Some((value, "")) = run.table.get("command").zip(command.first().map(String::as_str)) {
        return Err(run.fault(value, format_args!("run.command begins with an empty string")));
    }
    if kind == Kind::Static && run.table.get("root").is_none() {
        return Err(format!("{FILE} has no run.root: the directory that is served, such as root = \"public\""));
    }
    let root = run.text_of("root")?.map_or(Path::new("."), |(root, _)| Path::new(root));
    let script = run.text_of("script")?.map(|(script, _)| script.to_owned());
    if kind == Kind::Cgi && command.is_empty() && script.is_none() && run.table.get("root").is_none() {
        return Err(format!("{FILE} needs run.command, run.script or run.root: what answers the requests"));
    }
    let mut env = Vec::new();
    if let Some(value) = run.table.get("env") {
        let DeValue::Table(table) = value.get_ref() else {
            return Err(run.fault(value, format_args!("run.env must be a table, not {}", article(value.get_ref()))));
        };
        let table = Table { text: run.text, name: "run.env.", table };
        for (key, value) in table.table {
            check_variable(key.get_ref()).map_err(|why| run.fault(value, format_args!("{why}")))?;
            let (text, value) = table.text_of(key.get_ref())?.unwrap_or(("", value));
            table.check_placeholders(text, value, &listen)?;
            env.push((key.get_ref().to_string(), text.to_owned()));
        }
        if env.len() > MAX_ITEMS {
            return Err(run.fault(value, format_args!("run.env has {} variables, and may have {MAX_ITEMS}", env.len())));
        }
    }
    if let Some(value) = run.table.get("command") {
        command.iter().try_for_each(|word| run.check_placeholders(word, value, &listen))?;
        let is_of_shell = |word: &String| word.contains("$PORT");
        if command.iter().any(is_of_shell) && !command.iter().any(|word| word == "-c") {
            return Err(run.fault(value, format_args!("no shell replaces $PORT in run.command: write {{port}}")));
        }
    }
    let ready = run.text_of("ready")?;
    if let Some((path, value)) = ready
        && (!path.starts_with('/') || !path.bytes().all(|byte| byte.is_ascii_graphic()))
    {
        return Err(run.fault(value, format_args!("run.ready {path:?} must be a path, such as \"/health\"")));
    }
    let cache_control = run.text_of("cache-control")?;
    if let Some((text, value)) = cache_control
        && !text.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ')
    {
        return Err(run.fault(value, format_args!("run.cache-control {text:?} must be printable ASCII")));
    }
    let prefix = match run.text_of("prefix")? {
        None | Some(("strip", _)) => Prefix::Strip,
        Some(("keep", _)) => Prefix::Keep,
        Some((other, value)) => {
            return Err(run.fault(value, format_args!("run.prefix {other:?} is neither \"strip\" nor \"keep\"")));
        }
    };
    let index = run.text_or_texts("index")?.unwrap_or_else(|| vec![default_index(kind).to_owned()]);
    let time = |key, parse: fn(&str) -> Result<Duration, String>| match run.text_of(key)? {
        None => Ok(None),
        Some((text, value)) => parse(text).map(Some).map_err(|why| run.fault(value, format_args!("run.{key} {text:?}: {why}"))),
    };
    Ok(Run {
        directory: directory.to_owned(),
        kind,
        listen,
        env,
        ready: ready.map(|(path, _)| path.to_owned()),
        start_timeout: time("start-timeout", parse_start_time)?,
        request_timeout: time("request-timeout", parse_request_time)?,
        open_files: run.number("open-files")?,
        prefix,
        root: directory.join(root),
        index,
        script,
        spa: run.flag("spa")?,
        cache_control: cache_control.map(|(text, _)| text.to_owned()),
        command,
    })
}

fn default_index(kind: Kind) -> &'static str {
    if kind == Kind::FastCgi { "index.php" } else { DEFAULT_INDEX }
}

/// A table of the manifest, with the text for line numbers.
struct Table<'a> {
    text: &'a str,
    /// What stands before its keys in messages.
    name: &'a str,
    table: &'a DeTable<'a>,
}

impl<'a> Table<'a> {
    fn fault(&self, value: &Spanned<DeValue<'_>>, what: fmt::Arguments<'_>) -> String {
        at(self.text, Some(value.span()), what)
    }

    /// Checks that all keys are known. The first that is not is named, with where it belongs if it is one of another table.
    fn check_keys(&self, allowed: &[&str]) -> Result<(), String> {
        let unknown = self.table.iter().map(|(key, _)| key).filter(|key| !allowed.contains(&key.get_ref().as_ref()));
        let Some(key) = unknown.min_by_key(|key| key.span().start) else { return Ok(()) };
        let (name, text) = (self.name, key.get_ref());
        let is_of_run = Kind::ALL.iter().any(|kind| kind.keys().contains(&text.as_ref()));
        let fault = |what: fmt::Arguments<'_>| Err(at(self.text, Some(key.span()), what));
        match name {
            "" if is_of_run => fault(format_args!("{text} belongs below [run]")),
            "run." if METADATA_KEYS.contains(&text.as_ref()) => fault(format_args!("{text} belongs above [run]")),
            "" => fault(format_args!("{text} is not a key here, which is one of {}", allowed.join(", "))),
            _ => fault(format_args!("{name}{text} is not a key here: {name}KEY is one of {}", allowed.join(", "))),
        }
    }

    /// The value of a key that is a text.
    fn text_of(&self, key: &str) -> Result<Option<(&'a str, &'a Spanned<DeValue<'a>>)>, String> {
        let Some(value) = self.table.get(key) else { return Ok(None) };
        let DeValue::String(text) = value.get_ref() else {
            let name = self.name;
            return Err(self.fault(value, format_args!("{name}{key} must be a string, not {}", article(value.get_ref()))));
        };
        self.check_text(key, text, value)?;
        Ok(Some((text, value)))
    }

    /// The value of a key that is an array of texts; empty if it is not there.
    fn texts(&self, key: &str) -> Result<Vec<String>, String> {
        let Some(value) = self.table.get(key) else { return Ok(Vec::new()) };
        let wrong = |what: &DeValue<'_>| {
            let name = self.name;
            self.fault(value, format_args!("{name}{key} must be an array of strings ([\"…\", \"…\"]), not {}", article(what)))
        };
        let DeValue::Array(items) = value.get_ref() else { return Err(wrong(value.get_ref())) };
        if items.len() > MAX_ITEMS {
            let name = self.name;
            return Err(self.fault(value, format_args!("{name}{key} has {} strings, and may have {MAX_ITEMS}", items.len())));
        }
        let mut texts = Vec::new();
        for item in items.iter() {
            let DeValue::String(text) = item.get_ref() else { return Err(wrong(item.get_ref())) };
            self.check_text(key, text, item)?;
            texts.push(text.to_string());
        }
        Ok(texts)
    }

    /// The value of a key that is an array of texts, or one text. None if it is not there.
    fn text_or_texts(&self, key: &str) -> Result<Option<Vec<String>>, String> {
        match self.table.get(key).map(Spanned::get_ref) {
            None => Ok(None),
            Some(DeValue::String(_)) => Ok(self.text_of(key)?.map(|(text, _)| vec![text.to_owned()])),
            Some(_) => self.texts(key).map(Some),
        }
    }

    fn check_text(&self, key: &str, text: &str, value: &Spanned<DeValue<'_>>) -> Result<(), String> {
        let name = self.name;
        if text.len() > MAX_TEXT {
            return Err(self.fault(value, format_args!("{name}{key} has {} bytes, and may have {MAX_TEXT}", text.len())));
        }
        if text.contains('\0') {
            return Err(self.fault(value, format_args!("{name}{key} has a NUL character")));
        }
        Ok(())
    }

    /// Checks that what stands in braces is known, if it has the form of a placeholder, and has a value with this `listen`.
    fn check_placeholders(&self, text: &str, value: &Spanned<DeValue<'_>>, listen: &Listen) -> Result<(), String> {
        for name in placeholders(text) {
            let needs = match name {
                "port" if *listen != Listen::Port => "\"port\"",
                "socket" if *listen == Listen::Port => "\"socket\" or \"fd\"",
                _ => "",
            };
            if !needs.is_empty() {
                return Err(self.fault(value, format_args!("{{{name}}} has a value only with run.listen = {needs}")));
            }
            if !PLACEHOLDERS.contains(&name) {
                let known = PLACEHOLDERS.map(|name| format!("{{{name}}}")).join(" ");
                return Err(self.fault(value, format_args!("{{{name}}} is no placeholder: these are {known}")));
            }
        }
        Ok(())
    }

    fn number(&self, key: &str) -> Result<Option<u64>, String> {
        let Some(value) = self.table.get(key) else { return Ok(None) };
        let number = match value.get_ref() {
            DeValue::Integer(number) if number.radix() == 10 => number.as_str().replace('_', "").parse().ok(),
            _ => None,
        };
        let name = self.name;
        let wrong = || self.fault(value, format_args!("{name}{key} must be a whole number of at least 1"));
        number.filter(|number| *number > 0).map(Some).ok_or_else(wrong)
    }

    fn flag(&self, key: &str) -> Result<bool, String> {
        match self.table.get(key).map(|value| (value, value.get_ref())) {
            None => Ok(false),
            Some((_, DeValue::Boolean(flag))) => Ok(*flag),
            Some((value, other)) => {
                let name = self.name;
                Err(self.fault(value, format_args!("{name}{key} must be true or false, not {}", article(other))))
            }
        }
    }
}

/// The names in braces in a text that have the form of a placeholder.
fn placeholders(text: &str) -> impl Iterator<Item = &str> {
    let names = text.split('{').skip(1).filter_map(|rest| Some(rest.split_once('}')?.0));
    let is_misspelt = |name: &str| PLACEHOLDERS.iter().any(|known| known.eq_ignore_ascii_case(name));
    let is_word = |name: &str| !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_lowercase());
    names.filter(move |name| is_word(name) || is_misspelt(name))
}

/// Replaces the placeholders of a text by their values, in one pass, so that no value is taken for a placeholder.
pub(crate) fn expand(text: &str, value: impl Fn(&str) -> Option<String>) -> String {
    let mut expanded = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('{') {
        expanded.push_str(before);
        let found = after.split_once('}').and_then(|(name, behind)| Some((value(name)?, behind)));
        match found {
            Some((value, behind)) => {
                expanded.push_str(&value);
                rest = behind;
            }
            None => {
                expanded.push('{');
                rest = after;
            }
        }
    }
    expanded + rest
}

/// A fault, with its line.
fn at(text: &str, span: Option<Range<usize>>, what: fmt::Arguments<'_>) -> String {
    let line = span.and_then(|span| text.get(..span.start)).map(|before| before.matches('\n').count() + 1);
    line.map_or_else(|| format!("{FILE}: {what}"), |line| format!("{FILE}, line {line}: {what}"))
}

/// The type of a value, with its article.
fn article(value: &DeValue<'_>) -> String {
    let kind = value.type_str();
    let article = if kind.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
    format!("{article} {kind}")
}

/// A value as JSON; numbers that JSON has in no other form, and dates, as text.
fn json(value: &DeValue<'_>) -> Value {
    match value {
        DeValue::String(text) => Value::from(text.as_ref()),
        DeValue::Integer(number) => {
            let number = i64::from_str_radix(&number.as_str().replace('_', ""), number.radix());
            number.map_or(Value::Null, Value::from)
        }
        DeValue::Float(number) => number.as_str().parse::<f64>().map_or(Value::Null, Value::from),
        DeValue::Boolean(flag) => Value::from(*flag),
        DeValue::Datetime(time) => Value::from(time.to_string()),
        DeValue::Array(items) => items.iter().map(|item| json(item.get_ref())).collect(),
        DeValue::Table(table) => table.iter().map(|(key, value)| (key.get_ref().to_string(), json(value.get_ref()))).collect(),
    }
}
