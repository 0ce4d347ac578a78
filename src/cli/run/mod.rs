//! `plugrack run`: tries one web application at once, with a host of its own that leaves nothing behind.

mod advice;
mod save;

use super::console::{Console, print};
use crate::apps::endpoint::Endpoint;
use crate::apps::manifest::FILE;
use crate::plugins::attempt::{Attempt, Place};
use crate::plugins::plugin::{End, Plugin, State};
use crate::plugins::registry::{Entry, Registry};
use crate::process::check_variable;
use crate::process::exit::Exit;
use crate::process::listeners::{self, Listening};
use crate::process::output::Line;
use crate::server;
use crate::server::options::{Listen, Names, Serve, parse_listen, parse_names};
use crate::system::temporary;
use crate::util::escape;
use crate::util::units::parse_start_time;
use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};
use save::{Draft, Target};
use serde_json::json;
use std::fs;
use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The levels of the log of `run`. The command itself reports what the supervisor would log about the application.
pub(super) const LOGGED: &str = "warn,plugrack::plugins::supervisor=error";

/// The plugin's id, if the manifest is not saved under another name.
const DEFAULT_ID: &str = "app";

/// Lines that wait to be printed, before the application has to wait.
const MAX_LINES: usize = 1024;

/// Interval at which the application's state is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Longest path of the directory for temporary files, in bytes: below a longer one, the path of a socket would exceed the kernel's 107.
const MAX_TEMPORARY: usize = 50;

/// Lines of output that are repeated below the reason why an application was ended.
const LAST_LINES: usize = 5;

/// The arguments of `plugrack run`.
#[derive(Debug, Args)]
#[command(after_help = "\
The application has the whole host, http://127.0.0.1:PORT/, unless --route is given. Where it listens, in this order:
  --port, --socket or --fd says so, or {port} or {socket} stands in COMMAND
  otherwise it gets PORT and PLUGRACK_SOCKET, and the host follows it to wherever it listens
The exit code is that of the application, if it ends by itself; 1 if it never listened.")]
pub(super) struct Run {
    /// It listens on a port that the host chooses: {port} in COMMAND, and the variable PORT
    #[arg(long, group = "place")]
    port: bool,

    /// It listens on a Unix socket: {socket} in COMMAND, and the variable PLUGRACK_SOCKET
    #[arg(long, group = "place")]
    socket: bool,

    /// It gets the listening socket as descriptor 3 (LISTEN_FDS)
    #[arg(long, group = "place")]
    fd: bool,

    /// Serve it below this route, which it does not see [default: the whole host]
    #[arg(long, value_name = "/NAME")]
    route: Option<String>,

    /// Address and port of the host, or unix:PATH; port 0 picks a free port
    #[arg(long, value_name = "ADDR:PORT|unix:PATH", default_value = "127.0.0.1:0", value_parser = parse_listen)]
    listen: Listen,

    /// Once it listens, write the manifest of a plugin NAME that does the same; never overwrites
    #[arg(long, value_name = "NAME")]
    save: Option<String>,

    /// The plugins directory for --save [default: DATA/plugins if there is one, or else the manifest goes into this directory]
    #[arg(long, value_name = "DIR", env = "PLUGRACK_PLUGINS")]
    plugins: Option<PathBuf>,

    /// A variable of its environment; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_variable)]
    env: Vec<(String, String)>,

    /// Variables of this environment that it inherits, besides PATH, LANG and TZ; may be repeated [default: none]
    #[arg(long, value_name = "NAMES", value_parser = parse_names)]
    pass_env: Vec<Names>,

    /// Time for it to listen, up to 1h
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_start_time)]
    start_timeout: Duration,

    /// The command that starts it, and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// How an attempt has ended.
struct Outcome {
    code: u8,
    /// What happened, one sentence.
    sentence: String,
    /// The last lines of output, oldest first, if they may explain it.
    lines: Vec<String>,
}

impl Run {
    /// Tries the application until it ends, or the operator ends it.
    pub(super) fn run(self, console: &Console) -> Result<ExitCode> {
        let directory = std::env::current_dir().context("cannot find the working directory")?;
        let listen = self.place()?;
        let id = self.save.clone().unwrap_or_else(|| DEFAULT_ID.to_owned());
        let draft = Draft {
            id: id.clone(),
            route: self.route.clone(),
            listen: listen.unwrap_or("port"),
            command: self.command,
            env: self.env,
            start_timeout: self.start_timeout,
        };
        let text = draft.text()?;
        let choose = |name: &String| Target::choose(name, self.plugins.as_deref(), &console.data, &directory);
        let target = self.save.as_ref().map(choose).transpose()?;
        let settings = Serve { listen: self.listen, pass_env: self.pass_env, ..Serve::defaults()? };

        let data = make_data_dir(&id, &text).context("cannot make a temporary data directory")?;
        let (lines, received) = bounded(MAX_LINES);
        let is_free = listen.is_none();
        let attempt = Attempt { id, directory, has_origin: self.route.is_none(), is_free, lines, place: OnceLock::new() };
        let follower = Follower { draft, target, is_free, lines: received, json: console.json };
        let (tell, told) = bounded(1);
        let follow = move |registry: &Registry, url: &str| {
            if let Some(outcome) = follower.follow(registry, url) {
                tell.send(outcome).ok();
            }
        };
        let served = server::attempt(data.path(), &settings, attempt, Box::new(follow));
        let removed = remove(data);
        served?;
        let Ok(outcome) = told.try_recv() else { return removed.map(|()| ExitCode::SUCCESS) };
        console.report(None, &anyhow!(outcome.sentence));
        outcome.lines.iter().for_each(|line| say(&format!("    {line}")));
        removed.map(|()| ExitCode::from(outcome.code))
    }

    /// Where the application is told to listen, in the words of a manifest; none if it is free to choose.
    fn place(&self) -> Result<Option<&'static str>> {
        let has = |name: &str| self.command.iter().chain(self.env.iter().map(|(_, value)| value)).any(|word| word.contains(name));
        let given = [(self.port, "{port}", "port"), (self.socket, "{socket}", "socket"), (self.fd, "", "fd")];
        let mut places = given.into_iter().filter(|(option, name, _)| *option || (!name.is_empty() && has(name)));
        match (places.next(), places.next()) {
            (None, _) => Ok(None),
            (Some((_, _, place)), None) => Ok(Some(place)),
            (Some((_, _, one)), Some((_, _, other))) => {
                bail!("the application is told to listen in two places, {one} and {other}: leave one of them out")
            }
        }
    }
}

/// Makes the data directory of a host with one plugin.
fn make_data_dir(id: &str, manifest: &str) -> Result<TempDir> {
    let place = Some(std::env::temp_dir()).filter(|place| place.as_os_str().len() <= MAX_TEMPORARY);
    let data = tempfile::Builder::new().prefix("plugrack-run-").tempdir_in(place.as_deref().unwrap_or(Path::new("/tmp")))?;
    let plugin = data.path().join("plugins").join(id);
    fs::create_dir_all(&plugin)?;
    fs::write(plugin.join(FILE), manifest)?;
    Ok(data)
}

/// Removes the data directory, with what the application has left there.
fn remove(data: TempDir) -> Result<()> {
    let path = data.keep();
    temporary::remove(&path).with_context(|| format!("cannot remove {}, the temporary data directory", path.display()))
}

/// Reads a variable and its value.
fn parse_variable(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("expected NAME=VALUE; --pass-env NAME passes on a variable")?;
    check_variable(name)?;
    Ok((name.to_owned(), value.to_owned()))
}

/// Prints a line on standard error. Nobody can read it if that is closed.
fn say(line: &str) {
    drop(writeln!(io::stderr(), "{line}"));
}

/// Says something about the application.
fn note(what: &str) {
    say(&format!("plugrack: {}", escape::shown(what)));
}

/// Follows the application from its start to its end.
struct Follower {
    draft: Draft,
    /// Where its manifest is written, if it is to be.
    target: Option<Target>,
    is_free: bool,
    lines: Receiver<Line>,
    json: bool,
}

impl Follower {
    /// Prints what the application prints, and where it is reached, until it has ended. Returns nothing if it was ended by the operator.
    fn follow(self, registry: &Registry, url: &str) -> Option<Outcome> {
        let mut look_at = Instant::now();
        let mut is_announced = false;
        loop {
            match self.lines.recv_deadline(look_at) {
                Ok(line) => show(&line),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return None,
            }
            if Instant::now() < look_at {
                continue;
            }
            look_at = Instant::now() + LOOK_EVERY;
            let plugin = match registry.find(&self.draft.id) {
                // The first scan is under way.
                None => continue,
                Some((_, Entry::Accepted { plugin, .. })) => plugin,
                Some((_, Entry::Refused { rejected, .. })) => {
                    return Some(Outcome { code: 1, sentence: rejected.reason, lines: Vec::new() });
                }
            };
            let status = plugin.status();
            // Read after the state: it is set before the application is ready.
            let place = registry.context().attempt.as_ref().and_then(|attempt| attempt.place.get());
            match status.state {
                State::Starting | State::Ready | State::Stopping => {
                    if let Some((place, pid)) = place.zip(status.pid).filter(|_| !is_announced) {
                        is_announced = true;
                        self.announce(&plugin, place, pid, url);
                    }
                }
                State::Stopped => {
                    self.lines.try_iter().for_each(|line| show(&line));
                    return None;
                }
                State::BackingOff | State::CrashLooping | State::Refused | State::Unlicensed => {
                    self.lines.try_iter().for_each(|line| show(&line));
                    let end = status.last_end?;
                    return Some(outcome(&end, place.is_some(), &self.draft.command));
                }
            }
        }
    }

    /// Says where the application is reached, and what is noteworthy about where it listens.
    fn announce(&self, plugin: &Plugin, place: &Place, pid: i32, url: &str) {
        let url = match &self.draft.route {
            _ if url.starts_with("unix:") => url.to_owned(),
            route => format!("{url}{}/", route.as_deref().unwrap_or_default()),
        };
        let line = if self.json { json!({"url": url, "listens": place.used.to_string()}).to_string() } else { url };
        // It may be that nobody reads it.
        print(&format!("{line}\n")).ok();
        let is_own_socket = place.used == Endpoint::Unix(plugin.socket.clone());
        let advice = advice::local_port(&self.draft.command);
        let open = listeners::of_session(pid).into_iter().filter_map(|listening| match listening {
            Listening::Tcp(address) if address.ip().is_unspecified() => Some(address),
            _ => None,
        });
        let open: Vec<_> = open.collect();
        if place.used != place.offered && !is_own_socket {
            let (used, offered) = (&place.used, &place.offered);
            let cure = if open.is_empty() { format!("; {advice}") } else { String::new() };
            note(&format!("it listens on {used}, which is not $PORT ({offered}): requests go there{cure}"));
        }
        if !open.is_empty() {
            let open = open.iter().map(SocketAddr::to_string).collect::<Vec<_>>().join(", ");
            note(&format!("it listens on all interfaces ({open}), so others on the network reach it directly: {advice}"));
        }
        if let Some(target) = &self.target {
            match self.saved(place, is_own_socket, &open).and_then(|draft| target.write(&draft)) {
                Ok(written) => say(&format!("plugrack: {written}")),
                Err(error) => note(&format!("{} was not saved: {error:#}", self.draft.id)),
            }
        }
    }

    /// The draft of what has worked; `open` are the addresses at which the application listens on all interfaces.
    fn saved(&self, place: &Place, is_own_socket: bool, open: &[SocketAddr]) -> Result<Draft> {
        match &place.used {
            _ if !self.is_free || place.used == place.offered => Ok(self.draft.clone()),
            _ if is_own_socket => Ok(Draft { listen: "socket", ..self.draft.clone() }),
            Endpoint::Tcp(address)
                if address.ip() == Ipv4Addr::LOCALHOST || open.iter().any(|open| open.port() == address.port()) =>
            {
                let fixed = || format!("it listens on {address} whatever $PORT is: {}", advice::local_port(&self.draft.command));
                self.draft.with_port_for(address.port()).with_context(fixed)
            }
            used => bail!(
                "it listens on {used}, and the host of a plugin looks for it on 127.0.0.1: {}",
                advice::local_port(&self.draft.command)
            ),
        }
    }
}

/// Prints a line of the application, or a note about it.
fn show(line: &Line) {
    match line {
        Line::Printed(line) => {
            let mut text = String::new();
            escape::escape(&mut text, line);
            say(&text);
        }
        // The start and the end are reported otherwise.
        Line::Note(text) if text == "starting" || text.starts_with("refused: ") || text.starts_with("unlicensed: ") => {}
        Line::Note(text) => note(text),
    }
}

/// What the end of an application comes to, which was ready or not.
fn outcome(end: &End, was_ready: bool, command: &[String]) -> Outcome {
    let name = command.first().map(String::as_str).unwrap_or_default();
    let exit = end.exit;
    let printed: Vec<_> = end.lines.iter().filter_map(|line| Some(line.split_once(' ')?.1.to_owned())).collect();
    let last = printed.iter().rev().find(|line| !line.trim().is_empty());
    // Of an end that looks like success the supervisor says what `stay` below says.
    let reason = end.reason.strip_prefix(&format!("{exit}: ")).filter(|_| exit != Exit::Code(0));
    let words = reason.or(last.map(String::as_str));
    let words = words.map_or_else(|| ", and it has printed nothing".to_owned(), |words| format!(": {words}"));
    let (code, sentence, repeated) = match exit {
        Exit::Code(_) | Exit::Signal(_) | Exit::OutOfMemory | Exit::Unlicensed(_) if was_ready => {
            (code(exit), format!("{name} has ended: {}", end.reason), 0)
        }
        Exit::Code(0) => {
            let stay = "if it went into the background, let it stay in the foreground";
            (1, format!("{name} has ended before it listened: {exit}{words}; {stay}"), 0)
        }
        Exit::Code(_) | Exit::Signal(_) | Exit::OutOfMemory | Exit::Unlicensed(_) => {
            (code(exit), format!("{name} has ended before it listened: {exit}{words}"), 0)
        }
        Exit::Fault if printed.is_empty() => (1, format!("{name} was ended: {}; it has printed nothing", end.reason), 0),
        Exit::Fault => (1, format!("{name} was ended: {}; its last lines:", end.reason), LAST_LINES),
        _ => (1, format!("{name} was not started: {}", end.reason), 0),
    };
    Outcome { code, sentence, lines: printed[printed.len().saturating_sub(repeated)..].to_vec() }
}

/// The exit code that stands for an exit, as in a shell.
fn code(exit: Exit) -> u8 {
    let code = match exit {
        Exit::Code(code) => code,
        Exit::Signal(signal) => 128 + signal,
        Exit::OutOfMemory => 128 + signal_hook::consts::SIGKILL,
        Exit::Unlicensed(_) => 78,
        _ => 1,
    };
    u8::try_from(code).unwrap_or(1)
}
