//! The command line: what can be said to plugrack, and what it prints.

mod license;

use crate::client::{ApiClient, segment};
use crate::config::{DEFAULT_DATA, Serve};
use crate::data_dir::DataDir;
use crate::guard;
use crate::log_file;
use crate::pause::pause;
use crate::process;
use crate::server;
use crate::standing;
use crate::store::Store;
use crate::store::identity::read_instance_id;
use crate::store::kv::Limits;
use crate::text;
use anyhow::{Context, Result, bail};
use clap::builder::styling::{AnsiColor, Style};
use clap::{Args, Parser, Subcommand};
use serde_json::Value;
use std::borrow::Cow;
use std::io::{self, BufRead, IsTerminal, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use uuid::Uuid;

/// How often `logs -f` looks for more.
const FOLLOW_PAUSE: Duration = Duration::from_millis(200);

/// Most bytes of a licence, or of a word, that are read from standard input: more than any licence has, so that the host can say so.
const MAX_INPUT: u64 = 64 * 1024;

/// The word that a new instance id wants typed.
const ROTATE: &str = "rotate";

/// Hosts plugins: executables in any language, each on the web under its own route.
#[derive(Debug, Parser)]
#[command(version, about, long_about = None, max_term_width = 100, after_help = "\
Begin with:
  plugrack serve --data ./var            start a host; put plugins in ./var/plugins
  curl http://127.0.0.1:8080/            see them
  plugrack --data ./var list             see how they are")]
struct Cli {
    /// The host's directory: database, logs, token, sockets
    #[arg(long, global = true, value_name = "DIR", env = "PLUGRACK_DATA", default_value = DEFAULT_DATA)]
    data: PathBuf,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the host, until SIGTERM or SIGINT; SIGHUP looks for new plugins
    Serve(Box<Serve>),
    /// Print the instance id, whether the host runs or not
    Instance {
        #[command(subcommand)]
        action: Option<InstanceAction>,
    },
    /// List the plugins and how they are
    List(Output),
    /// Show all about one plugin
    Show {
        /// Its id, or the name of a file that was refused
        id: String,
        #[command(flatten)]
        output: Output,
    },
    /// Start a plugin that is stopped, or waiting after a crash
    Start(OnePlugin),
    /// Stop a plugin, until it is started or the host is
    Stop(OnePlugin),
    /// Stop a plugin and start it again, with its present settings
    Restart(OnePlugin),
    /// Let a plugin run, now and after every start of the host
    Enable(OnePlugin),
    /// Stop a plugin, and keep it from running until it is enabled
    Disable(OnePlugin),
    /// Print the last lines a plugin has printed
    Logs {
        /// Its id
        id: String,
        /// Go on with what it prints from now on
        #[arg(short, long)]
        follow: bool,
        /// How many lines
        #[arg(short = 'n', long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(0..=10_000))]
        lines: u32,
    },
    /// Read and write a plugin's keys, as the plugin lets them be
    Kv {
        /// The plugin's id
        id: String,
        #[command(subcommand)]
        action: KvAction,
    },
    /// Read and write the settings a plugin is started with
    Config {
        /// The plugin's id
        id: String,
        #[command(subcommand)]
        action: ConfigAction,
    },
    /// Licences of plugins
    License {
        #[command(subcommand)]
        action: LicenseAction,
    },
    /// Look for plugins that were added, replaced or removed; fails where an update is refused
    Rescan(Output),
    /// Give an id, with the keys, settings and licence kept under it, to another file in the plugins directory
    Adopt {
        /// The plugin's id
        id: String,
        /// The name of the file in the plugins directory
        file: String,
        #[command(flatten)]
        output: Output,
    },
    /// List what plugins that are gone have left: keys, settings, licences, files
    Gone(Output),
    /// Delete what a plugin that is gone has left
    Forget {
        /// Its id
        id: String,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Debug, Args)]
struct Output {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct OnePlugin {
    /// Its id
    id: String,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Subcommand)]
enum KvAction {
    /// Print a value, just as it is
    Get {
        key: String,
        #[command(flatten)]
        output: Output,
    },
    /// Write a value
    Set {
        key: String,
        /// The value; - reads it from standard input
        #[arg(allow_hyphen_values = true)]
        value: String,
    },
    /// Remove a key
    Delete { key: String },
    /// List the keys in the store
    List {
        /// Only keys that begin with this
        #[arg(long, default_value = "")]
        prefix: String,
        #[command(flatten)]
        output: Output,
    },
}

#[derive(Debug, Subcommand)]
enum InstanceAction {
    /// Make a new instance id, such as for a copy that is to be an installation of its own
    Rotate {
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Debug, Subcommand)]
enum LicenseAction {
    #[command(flatten)]
    Plugin(PluginLicense),
    #[command(flatten)]
    Vendor(license::Vendor),
}

/// What an operator does with the licences of plugins.
#[derive(Debug, Subcommand)]
enum PluginLicense {
    /// Give a plugin the licence that its vendor has issued, and start it with that
    Set {
        /// The plugin's id
        id: String,
        /// The licence; - reads it from standard input
        token: String,
        /// Set it whatever the host judges, and keep it if the plugin refuses it
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        output: Output,
    },
    /// Show how a plugin stands with its licence, and what the licence says
    Show {
        /// The plugin's id
        id: String,
        #[command(flatten)]
        output: Output,
    },
    /// Take the licence of a plugin away
    Remove {
        /// The plugin's id
        id: String,
        #[command(flatten)]
        output: Output,
    },
}

#[derive(Debug, Subcommand)]
enum ConfigAction {
    /// Print one setting, or all of them
    Get { key: Option<String> },
    /// Change a setting; a value that is not JSON is taken as a string
    Set {
        key: String,
        #[arg(allow_hyphen_values = true)]
        value: String,
    },
    /// Remove a setting
    Unset { key: String },
}

/// The whole program. Exit codes: 0 done, 1 failed, 2 not understood.
pub(crate) fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    match arguments.next() {
        Some(role) if role == process::SHIM => return process::shim_main(arguments),
        Some(role) if role == process::SWEEPER => return process::sweeper_main(arguments),
        Some(role) if role == guard::GUARD => {
            log_to_stderr();
            return guard::guard_main(arguments);
        }
        _ => {}
    }
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        // `plugrack list | head` is not an error.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // Where standard error is gone there is nobody to tell.
            drop(writeln!(io::stderr(), "plugrack: {}", text::shown(&format!("{error:#}"))));
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

fn run(cli: Cli) -> Result<()> {
    let api = || ApiClient::new(&DataDir::open(&cli.data)?);
    match cli.command {
        Command::Serve(settings) => {
            log_to_stderr();
            server::serve(&cli.data, &settings)
        }
        Command::Instance { action } => {
            let data = DataDir::open(&cli.data)?;
            let database = data.database();
            if !database.exists() {
                bail!("there is no instance at {} yet: it is made when the host first runs", cli.data.display());
            }
            match action {
                Some(InstanceAction::Rotate { yes }) => rotate(&data, yes),
                None => {
                    let id = read_instance_id(&database).with_context(|| format!("cannot read {}", database.display()))?;
                    print(&format!("{id}\n"))
                }
            }
        }
        Command::List(output) => output.print(&api()?.call("GET", "/plugins", b"")?, list),
        Command::Show { id, output } => output.print(&api()?.call("GET", &format!("/plugins/{}", segment(&id)), b"")?, show),
        Command::Start(plugin) => plugin.command(&api()?, "start"),
        Command::Stop(plugin) => plugin.command(&api()?, "stop"),
        Command::Restart(plugin) => plugin.command(&api()?, "restart"),
        Command::Enable(plugin) => plugin.command(&api()?, "enable"),
        Command::Disable(plugin) => plugin.command(&api()?, "disable"),
        Command::Logs { id, follow, lines } => logs(&DataDir::open(&cli.data)?, &id, follow, lines as usize),
        Command::Kv { id, action } => kv(&api()?, &id, action),
        Command::Config { id, action } => config(&api()?, &id, action),
        Command::License { action: LicenseAction::Vendor(action) } => action.run(),
        Command::License { action: LicenseAction::Plugin(action) } => license(&api()?, action),
        Command::Rescan(output) => rescan(&api()?, &output),
        Command::Adopt { id, file, output } => {
            let body = serde_json::json!({"file": file}).to_string();
            let answer = api()?.call("POST", &format!("/plugins/{}/adopt", segment(&id)), body.as_bytes())?;
            output.print(&answer, |plugin| format!("{id}: {}\n", state(plugin)))
        }
        Command::Gone(output) => output.print(&api()?.call("GET", "/gone", b"")?, gone),
        Command::Forget { id, yes } => forget(&api()?, &id, yes),
    }
}

/// The host's log. It quotes what plugins say, and may be on a terminal.
fn log_to_stderr() {
    let mut log = env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info"));
    log.format(|out, record| {
        let (time, level, what) = (out.timestamp(), record.level(), record.args().to_string());
        let style = out.default_level_style(level);
        writeln!(out, "[{time} {style}{level:<5}{style:#} {}] {}", record.target(), text::shown(&what))
    });
    log.init();
}

fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

impl Output {
    /// Prints an answer: as it is, or as `plain` puts it.
    fn print(&self, answer: &Value, plain: impl FnOnce(&Value) -> String) -> Result<()> {
        print(&if self.json { text::shown_json(&format!("{answer:#}\n")) } else { plain(answer) })
    }
}

impl OnePlugin {
    fn command(&self, api: &ApiClient, verb: &str) -> Result<()> {
        let answer = api.call("POST", &format!("/plugins/{}/{verb}", segment(&self.id)), b"")?;
        self.output.print(&answer, |plugin| format!("{}: {}\n", self.id, state(plugin)))?;
        let running = matches!(verb, "start" | "restart" | "enable");
        if running && answer["state"] != "ready" {
            bail!("{} is not ready: plugrack logs {} may say more", self.id, self.id);
        }
        Ok(())
    }
}

/// The state of a plugin and why it is in it, in a line.
fn state(plugin: &Value) -> String {
    let state = word(&plugin["state"]);
    let colour = match &*state {
        "ready" => AnsiColor::Green.on_default(),
        "crash_looping" | "refused" | "unlicensed" => AnsiColor::Red.on_default(),
        "stopped" => Style::new(),
        _ => AnsiColor::Yellow.on_default(),
    };
    // Only for people, and not for those who want none: https://no-color.org
    let plain = !io::stdout().is_terminal() || std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let style = if plain { Style::new() } else { colour };
    let (state, reason) = (state.replace('_', " "), word(&plugin["reason"]));
    let separator = if reason.is_empty() { "" } else { ": " };
    let update = match word(&plugin["update_refused"]) {
        refused if refused.is_empty() => String::new(),
        refused => format!(", update refused: {refused}"),
    };
    format!("{style}{state}{style:#}{separator}{reason}{update}")
}

/// A JSON string's text, fit to be shown; empty for what is none.
fn word(value: &Value) -> Cow<'_, str> {
    text::shown(value.as_str().unwrap_or_default())
}

fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn list(answer: &Value) -> String {
    let heading = ["ID", "VERSION", "ROUTE", "LICENSE", "STATE"].map(str::to_owned);
    let row = |plugin: &Value| {
        let id = if plugin["id"].is_null() { "file" } else { "id" };
        let [id, version, route, license] = [id, "version", "route", "license"].map(|name| word(&plugin[name]).into_owned());
        [id, version, route, license, state(plugin)]
    };
    let rows: Vec<[String; 5]> = std::iter::once(heading).chain(items(&answer["plugins"]).map(row)).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let (id, version, route, license) = (width(0), width(1), width(2), width(3));
    rows.iter().map(|[a, b, c, d, e]| format!("{a:id$}  {b:version$}  {c:route$}  {d:license$}  {e}\n")).collect()
}

fn show(plugin: &Value) -> String {
    let mut out = String::new();
    let mut line = |name: &str, value: &str| {
        if !value.is_empty() {
            out.push_str(&format!("{name:<13}{value}\n"));
        }
    };
    let (metadata, process) = (&plugin["metadata"], &plugin["process"]);
    line("id", &word(&plugin["id"]));
    for name in ["name", "version", "route"] {
        line(name, &word(&plugin[name]));
    }
    for name in ["description", "author", "homepage"] {
        line(name, &word(&metadata[name]));
    }
    line("state", &state(plugin));
    line("license", &word(&plugin["license"]));
    line("enabled", if plugin["enabled"] == true { "yes" } else { "no" });
    if let Some(since) = process["since"].as_i64() {
        line("since", &time(since));
    }
    if let Some(seconds) = process["retry_in"].as_f64().or(plugin["retry_in"].as_f64()) {
        line("next try", &format!("in {seconds:.1} s"));
    }
    line("what to do", &word(&plugin["advice"]));
    for (name, field) in [
        ("pid", "pid"),
        ("restarts", "restarts"),
        ("answered", "answered"),
        ("waiting", "waiting"),
        ("connections", "connections"),
    ] {
        line(name, &process[field].as_i64().map(|number| number.to_string()).unwrap_or_default());
    }
    line("file", &word(&plugin["file"]));
    line("program", &word(&process["program"]));
    line("log", &word(&process["log"]));
    let events = items(&plugin["events"]).map(|event| {
        let (kind, detail) = (word(&event["kind"]), word(&event["detail"]));
        let separator = if detail.is_empty() { "" } else { ": " };
        format!("  {}  {kind}{separator}{detail}\n", time(event["at"].as_i64().unwrap_or_default()))
    });
    let end = &plugin["last_end"];
    let lines = items(&end["lines"]).map(|line| format!("  {}\n", word(line)));
    let sections = [
        (
            format!("last end, {}: {}; what it had printed\n", time(end["at"].as_i64().unwrap_or_default()), word(&end["exit"])),
            lines.collect(),
        ),
        ("events, newest first\n".to_owned(), events.collect::<String>()),
    ];
    for (heading, lines) in sections {
        if !lines.is_empty() {
            out.push_str(&heading);
            out.push_str(&lines);
        }
    }
    out
}

/// Milliseconds since 1970 as a time of day, UTC.
fn time(ms: i64) -> String {
    jiff::Timestamp::from_millisecond(ms).map(|time| format!("{time:.3}")).unwrap_or_default()
}

fn changes(answer: &Value) -> String {
    let mut out = String::new();
    for kind in ["added", "changed", "removed", "refused"] {
        let names: Vec<_> = items(&answer[kind]).map(word).collect();
        if !names.is_empty() {
            out.push_str(&format!("{kind}: {}\n", names.join(", ")));
        }
    }
    let news = items(&answer["updates_refused"]).next().is_some();
    if out.is_empty() && !news { "nothing has changed\n".into() } else { out }
}

/// Looks for changes. An update that is refused is a failure: what was put there does not run.
fn rescan(api: &ApiClient, output: &Output) -> Result<()> {
    let answer = api.call("POST", "/rescan", b"")?;
    output.print(&answer, changes)?;
    let refused: Vec<_> = items(&answer["updates_refused"])
        .map(|update| format!("{}: update refused, the process before goes on: {}", word(&update["id"]), word(&update["reason"])))
        .collect();
    if refused.is_empty() { Ok(()) } else { bail!("{}", refused.join("; ")) }
}

fn gone(answer: &Value) -> String {
    let row = |left: &Value| {
        let mut has = vec![format!("{} keys, {} bytes", left["keys"], left["bytes"]), format!("{} settings", left["settings"])];
        has.extend((left["license"] == true).then(|| "a licence".into()));
        has.extend((left["files"] == true).then(|| "files".into()));
        let file = word(&left["file"]);
        let file = if file.is_empty() { String::new() } else { format!("  (was the file {file})") };
        format!("{}: {}{file}\n", word(&left["id"]), has.join(", "))
    };
    let kept: String = items(&answer["gone"]).filter(|left| left["kept"] == true).map(row).collect();
    if kept.is_empty() { "nothing is left of plugins that are gone\n".into() } else { kept }
}

fn forget(api: &ApiClient, id: &str, yes: bool) -> Result<()> {
    if !yes {
        print(&format!("type {id} to delete its keys, settings, licence, log and files, which cannot be undone: "))?;
        let mut typed = String::new();
        io::stdin().lock().take(MAX_INPUT).read_line(&mut typed)?;
        if typed.trim() != id {
            bail!("the id {id} was not typed, and nothing was deleted (--yes does it without asking)");
        }
    }
    api.call("DELETE", &format!("/gone/{}", segment(id)), b"").map(drop)
}

/// Reads the log itself, so that it can be read when the host does not run.
fn logs(data: &DataDir, id: &str, follow: bool, lines: usize) -> Result<()> {
    // What a file printed that has not said who it is is under the name of the file.
    if id.is_empty() || id.starts_with('.') || id.contains('/') {
        bail!("{id:?} is not a plugin's id, nor the name of a file in the plugins directory");
    }
    let path = data.log(id);
    if !path.exists() && !data.plugin_data(id).exists() {
        bail!("there is no plugin {id}, or it was never started");
    }
    let (last, mut follower) = log_file::tail(&path, lines).with_context(|| format!("cannot read {}", path.display()))?;
    for line in last {
        print(&format!("{line}\n"))?;
    }
    if !follow {
        return Ok(());
    }
    loop {
        match follower.next_line().with_context(|| format!("cannot read {}", path.display()))? {
            Some(line) => print(&format!("{line}\n"))?,
            None => pause(FOLLOW_PAUSE),
        }
    }
}

fn kv(api: &ApiClient, id: &str, action: KvAction) -> Result<()> {
    let path = |key: &str| format!("/plugins/{}/kv/{}", segment(id), segment(key));
    match action {
        KvAction::Get { key, output } => {
            let answer = api.call("GET", &path(&key), b"")?;
            if output.json {
                return output.print(&answer, |_| String::new());
            }
            let mut value = match answer["value_base64"].as_str() {
                Some(base64) => base64::Engine::decode(&base64::engine::general_purpose::STANDARD, base64)?,
                None => answer["value"].as_str().unwrap_or_default().into(),
            };
            let mut out = io::stdout().lock();
            if out.is_terminal() {
                // A value is shown on lines of its own, and cannot harm the terminal.
                let lines = value.split(|byte| *byte == b'\n').map(|line| {
                    let mut shown = String::new();
                    text::escape(&mut shown, line);
                    shown
                });
                value = lines.collect::<Vec<_>>().join("\n").into_bytes();
                value.push(b'\n');
            }
            out.write_all(&value)?;
            Ok(out.flush()?)
        }
        KvAction::Set { key, value } => {
            let mut bytes = value.into_bytes();
            if bytes == b"-" {
                bytes.clear();
                io::stdin().lock().read_to_end(&mut bytes)?;
            }
            api.call("PUT", &path(&key), &bytes).map(drop)
        }
        KvAction::Delete { key } => match api.call("DELETE", &path(&key), b"")?["found"].as_bool() {
            Some(false) => bail!("the plugin {id} has no key {key:?}"),
            _ => Ok(()),
        },
        KvAction::List { prefix, output } => {
            let mut keys = Vec::new();
            let mut after = None;
            loop {
                let after_part = after.map(|after: String| format!("&after={}", segment(&after))).unwrap_or_default();
                let page = api.call(
                    "GET",
                    &format!("/plugins/{}/kv?limit=1000&prefix={}{after_part}", segment(id), segment(&prefix)),
                    b"",
                )?;
                keys.extend(items(&page["keys"]).cloned());
                after = page["next"].as_str().map(str::to_owned);
                if after.is_none() {
                    break;
                }
            }
            output.print(&Value::Array(keys), |keys| {
                let line =
                    |entry: &Value| format!("{}  {} bytes, revision {}\n", word(&entry["key"]), entry["size"], entry["rev"]);
                items(keys).map(line).collect()
            })
        }
    }
}

fn license(api: &ApiClient, action: PluginLicense) -> Result<()> {
    let path = |id: &str| format!("/plugins/{}/license", segment(id));
    let stands = |id: &str, answer: &Value| match word(&answer["license"]) {
        license if license.is_empty() => format!("{id}: not checked, since it is {}\n", state(answer)),
        license => format!("{id}: {license}; {}\n", state(answer)),
    };
    match action {
        PluginLicense::Set { id, token, force, output } => {
            let token = if token == "-" { io::read_to_string(io::stdin().lock().take(MAX_INPUT))? } else { token };
            let query = if force { "?force=true" } else { "" };
            let answer = api.call("PUT", &format!("{}{query}", path(&id)), token.as_bytes())?;
            let (license, state, reason) = (word(&answer["license"]), word(&answer["state"]), word(&answer["reason"]));
            if !license.starts_with("refused") && ["ready", "stopped"].contains(&&*state) {
                return output.print(&answer, |answer| stands(&id, answer));
            }
            let problem = format!("the licence of {id} is set, and the plugin is {}", state.replace('_', " "));
            if output.json {
                // The reason is in it.
                output.print(&answer, |_| String::new())?;
                bail!("{problem}");
            }
            let separator = if reason.is_empty() { "" } else { ": " };
            bail!("{problem}{separator}{reason}; see: plugrack show {id}")
        }
        PluginLicense::Show { id, output } => output.print(&api.call("GET", &path(&id), b"")?, |answer| {
            let claims = &answer["claims"];
            let grace = claims["grace_days"].as_u64().filter(|days| *days > 0).map(|days| format!("{days} days"));
            let instances: Vec<_> = items(&claims["inst"]).map(word).collect();
            let previous = match word(&answer["previous"]) {
                previous if previous.is_empty() => String::new(),
                previous => format!("{previous}, kept until {id} has accepted this one"),
            };
            let mut out = stands(&id, answer);
            for (name, value) in [
                ("token", word(&answer["token"])),
                ("previous", previous.into()),
                ("license id", word(&claims["jti"])),
                ("customer", word(&claims["sub"])),
                ("instances", instances.join(", ").into()),
                ("expires", word(&claims["exp"])),
                ("grace", grace.unwrap_or_default().into()),
            ] {
                if !value.is_empty() {
                    out.push_str(&format!("{name:<13}{value}\n"));
                }
            }
            out
        }),
        PluginLicense::Remove { id, output } => output.print(&api.call("DELETE", &path(&id), b"")?, |answer| stands(&id, answer)),
    }
}

/// Makes a new instance id, where no host runs on the directory.
fn rotate(data: &DataDir, yes: bool) -> Result<()> {
    let _lock = data.lock()?;
    let database = data.database();
    let cannot = || format!("cannot change {}", database.display());
    // No key is written meanwhile, so that it does not matter how many there may be.
    let limits = Limits { keys: u64::MAX, bytes: u64::MAX };
    let store = Store::open(&database, limits).with_context(cannot)?;
    let old = store.instance_id().with_context(cannot)?;
    for (plugin, token) in store.licenses().with_context(cannot)? {
        if standing::names(&token, &old.to_string()) {
            print(&format!("the licence of {plugin} is for {old}, and will no longer match\n"))?;
        }
    }
    if !yes {
        print(&format!("type {ROTATE} to make a new instance id, which cannot be undone: "))?;
        let mut typed = String::new();
        io::stdin().lock().take(MAX_INPUT).read_line(&mut typed)?;
        if typed.trim() != ROTATE {
            bail!("the word {ROTATE} was not typed, and nothing was changed (--yes does it without asking)");
        }
    }
    let id = Uuid::new_v4();
    store.rotate(id).with_context(cannot)?;
    print(&format!("{id}\n"))
}

fn config(api: &ApiClient, id: &str, action: ConfigAction) -> Result<()> {
    let path = format!("/plugins/{}/config", segment(id));
    let answer = match action {
        ConfigAction::Get { key: None } => {
            return print(&text::shown_json(&format!("{:#}\n", api.call("GET", &path, b"")?["config"])));
        }
        ConfigAction::Get { key: Some(key) } => {
            let answer = api.call("GET", &path, b"")?;
            return match answer["config"].get(&key) {
                Some(value) => print(&text::shown_json(&format!("{value}\n"))),
                None => bail!("the plugin {id} has no setting {key:?}"),
            };
        }
        ConfigAction::Set { key, value } => {
            let value = serde_json::from_str(&value).unwrap_or(Value::String(value));
            api.call("PUT", &format!("{path}/{}", segment(&key)), value.to_string().as_bytes())?
        }
        ConfigAction::Unset { key } => api.call("DELETE", &format!("{path}/{}", segment(&key)), b"")?,
    };
    match answer["restart_needed"].as_bool() {
        Some(true) => print(&format!("{id} has it from its next start on: plugrack restart {id}\n")),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
