//! Shared by all commands: finds the host, and prints answers and errors.

use crate::cli::api_client::{ApiClient, ClientError};
use crate::license::Refusal;
use crate::licensing::status::for_people;
use crate::system::data_dir::DataDir;
use crate::util::escape;
use crate::util::utc;
use anyhow::{Context, Result, bail};
use clap::Args;
use clap::builder::styling::{AnsiColor, Style};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::fs::File;
use std::io::{self, BufRead, IsTerminal, Read, Write};
use std::path::PathBuf;

/// Most bytes to read of a licence or of a typed word: more than any licence has, so that the host can refuse a longer one.
const MAX_WORD: u64 = 64 * 1024;

/// Most bytes to read of a value: one more than the store's maximum, so that the host refuses a larger value.
const MAX_INPUT: u64 = crate::protocol::message::MAX_VALUE as u64 + 1;

/// Means standard input on a command line.
const STANDARD_INPUT: &str = "-";

/// Terminal width if the terminal does not report one.
const DEFAULT_WIDTH: usize = 80;

/// Width of the name column of [`fields`].
const FIELD_WIDTH: usize = 13;

/// Code of an error without a specific one.
const FAILED: &str = "failed";

/// Code for something that does not exist, as in the API.
pub(super) const NOT_FOUND: &str = "not_found";

/// An error that a command itself raises, with a machine-readable code.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
struct Failure {
    code: &'static str,
    message: String,
}

/// A failure that was already reported.
#[derive(Debug, thiserror::Error)]
#[error("some ids failed")]
struct Reported;

/// The data directory and the output format of one command.
pub(super) struct Console {
    /// The data directory, as given.
    pub(super) data: PathBuf,
    /// Whether output is JSON.
    pub(super) json: bool,
}

impl Console {
    /// The data directory.
    pub(super) fn data(&self) -> Result<DataDir> {
        DataDir::open(&self.data)
    }

    /// A client for the API of the host that runs on the data directory.
    pub(super) fn api(&self) -> Result<ApiClient> {
        Ok(ApiClient::new(&self.data()?)?)
    }

    /// Prints an API answer: as JSON with `--json`, otherwise as formatted by `plain`.
    pub(super) fn print(&self, answer: &Value, plain: impl FnOnce(&Value) -> String) -> Result<()> {
        print(&if self.json { escape::shown_json(&format!("{answer:#}\n")) } else { plain(answer) })
    }

    /// Asks the operator to type a word before an irreversible action.
    ///
    /// # Errors
    /// Another word was typed.
    pub(super) fn confirm(&self, word: &str, what: &str) -> Result<()> {
        let prompt = format!("type {word} to {what}, which cannot be undone: ");
        if self.json {
            write!(io::stderr(), "{prompt}")?
        } else {
            print(&prompt)?
        }
        let mut typed = String::new();
        io::stdin().lock().take(MAX_WORD).read_line(&mut typed)?;
        if typed.trim() != word {
            bail!("cancelled: {word} was not typed, and nothing has changed (--yes skips the question)");
        }
        Ok(())
    }

    /// Prints an error as one line on standard error, unless it was already reported.
    pub(super) fn report(&self, id: Option<&str>, error: &anyhow::Error) {
        if error.is::<Reported>() {
            return;
        }
        let (mut code, mut message) = (FAILED, format!("{error:#}"));
        if let Some(failure) = error.downcast_ref::<Failure>() {
            code = failure.code;
        } else if let Some(refusal) = error.downcast_ref::<Refusal>() {
            code = refusal.code.as_str();
        } else if let Some(refused) = error.downcast_ref::<ClientError>() {
            code = refused.code();
            message = if self.json { refused.message() } else { message };
        }
        let line = match id {
            _ if self.json => error_line(id, code, &message),
            Some(id) if !message.contains(id) => format!("plugrack: {id}: {}", escape::shown(&message)),
            _ => format!("plugrack: {}", escape::shown(&message)),
        };
        // Nobody can read an error if standard error is closed.
        drop(writeln!(io::stderr(), "{line}"));
    }

    /// Runs `act` for each id, also after failures, and prints each answer; with `--json` and several ids, as one array.
    /// `check` may count a printed answer as a failure.
    pub(super) fn each(
        &self,
        ids: &[String],
        act: impl Fn(&str) -> Result<Value>,
        check: impl Fn(&str, &Value) -> Result<()>,
        plain: impl Fn(&str, &Value) -> String,
    ) -> Result<()> {
        if let [id] = ids {
            let answer = act(id)?;
            self.print(&answer, |answer| plain(id, answer))?;
            return check(id, &answer);
        }
        let (mut answers, mut failed) = (Vec::new(), false);
        for id in ids {
            let done = act(id).and_then(|answer| {
                let checked = check(id, &answer);
                if self.json {
                    answers.push(answer)
                } else {
                    print(&plain(id, &answer))?
                }
                checked
            });
            if let Err(error) = done {
                if error.is::<io::Error>() {
                    return Err(error);
                }
                failed = true;
                self.report(Some(id), &error);
            }
        }
        if self.json {
            self.print(&Value::Array(answers), |_| String::new())?;
        }
        if failed { Err(Reported.into()) } else { Ok(()) }
    }
}

/// An error with a machine-readable code.
pub(super) fn failure(code: &'static str, message: String) -> anyhow::Error {
    Failure { code, message }.into()
}

/// An error as one line of JSON. `id` is set if the command acts on several plugins.
pub(super) fn error_line(id: Option<&str>, code: &str, message: &str) -> String {
    let mut error = json!({"code": code, "message": message});
    if let Some(id) = id {
        error["id"] = id.into();
    }
    escape::shown_json(&json!({ "error": error }).to_string())
}

/// Width of the output terminal; none if the output is not a terminal.
pub(super) fn terminal_width() -> Option<usize> {
    let out = io::stdout();
    let size = || rustix::termios::tcgetwinsize(&out).ok().map(|size| usize::from(size.ws_col)).filter(|columns| *columns > 0);
    out.is_terminal().then(|| size().unwrap_or(DEFAULT_WIDTH))
}

/// Prints text unchanged.
pub(super) fn print(text: &str) -> Result<()> {
    print_bytes(text.as_bytes())
}

/// Prints bytes unchanged.
pub(super) fn print_bytes(bytes: &[u8]) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    Ok(out.flush()?)
}

/// A licence from the command line, or from standard input if that is `-`.
pub(super) fn token(given: String) -> Result<String> {
    if given != STANDARD_INPUT {
        return Ok(given);
    }
    let mut bytes = Vec::new();
    io::stdin().lock().take(MAX_WORD).read_to_end(&mut bytes).context("cannot read the licence from standard input")?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// A value on the command line, in a file, or on standard input.
#[derive(Debug, Args)]
pub(super) struct Given {
    /// The value; - reads it from standard input, which keeps secrets off the command line
    #[arg(allow_hyphen_values = true, required_unless_present = "file")]
    pub(super) value: Option<String>,
    /// Read the value from this file
    #[arg(long, value_name = "FILE", conflicts_with = "value")]
    pub(super) file: Option<PathBuf>,
}

impl Given {
    /// The exact bytes of the value.
    ///
    /// # Errors
    /// It cannot be read.
    pub(super) fn bytes(self) -> Result<Vec<u8>> {
        let read = |input: &mut dyn Read, name: &str| {
            let mut bytes = Vec::new();
            input.take(MAX_INPUT).read_to_end(&mut bytes).with_context(|| format!("cannot read {name}"))?;
            Ok(bytes)
        };
        match (self.value, self.file) {
            (_, Some(path)) => {
                let name = path.display().to_string();
                read(&mut File::open(path).with_context(|| format!("cannot read {name}"))?, &name)
            }
            (Some(value), None) if value != STANDARD_INPUT => Ok(value.into_bytes()),
            _ => read(&mut io::stdin().lock(), "standard input"),
        }
    }

    /// The value as text. Keeps a trailing line break that was read, and prints a note about it.
    ///
    /// # Errors
    /// It cannot be read, or is not UTF-8.
    pub(super) fn text(self) -> Result<String> {
        let is_read = self.value.as_deref().is_none_or(|value| value == STANDARD_INPUT);
        let text =
            String::from_utf8(self.bytes()?).ok().context("the value is not UTF-8 text: encode it, for example in base64")?;
        // Editors and `echo` add a line break that is rarely part of a secret.
        if is_read && text.ends_with('\n') {
            writeln!(io::stderr(), "plugrack: the value ends with a line break, which is kept; printf %s TEXT writes none")?;
        }
        Ok(text)
    }
}

/// A JSON string's text, escaped for display; empty for any other value.
pub(super) fn word(value: &Value) -> Cow<'_, str> {
    escape::shown(value.as_str().unwrap_or_default())
}

/// The items of a JSON array; none for any other value.
pub(super) fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// Whether to colour output: on a terminal, unless `NO_COLOR` is set (<https://no-color.org>).
fn is_coloured() -> bool {
    io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Text in the colour of a plugin's state, if output is coloured.
pub(super) fn coloured(state: &str, text: &str) -> String {
    let colour = match state {
        "ready" => AnsiColor::Green.on_default(),
        "crash_looping" | "refused" | "unlicensed" => AnsiColor::Red.on_default(),
        "stopped" => Style::new(),
        _ => AnsiColor::Yellow.on_default(),
    };
    let style = if is_coloured() { colour } else { Style::new() };
    format!("{style}{text}{style:#}")
}

/// A plugin's state and its reason, in one line.
pub(super) fn state(plugin: &Value) -> String {
    let (state, reason) = (word(&plugin["state"]), reason(plugin));
    let separator = if reason.is_empty() { "" } else { ": " };
    format!("{}{separator}{reason}", coloured(&state, &state))
}

/// The reason of a plugin's state and of a refused update, for people.
pub(super) fn reason(plugin: &Value) -> String {
    let reason = for_people(&word(&plugin["reason"]));
    let update = match word(&plugin["update_refused"]) {
        refused if refused.is_empty() => String::new(),
        refused => format!("update refused: {refused}"),
    };
    [reason, update].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("; ")
}

/// The status of a licence, for people: `valid`, `expires in 7 days`, `refused (wrong_plugin)`.
pub(super) fn license(license: &Value) -> String {
    let (state, code, message) = (word(&license["state"]), word(&license["code"]), word(&license["message"]));
    match &*state {
        "expiring" => message.into_owned(),
        "unchecked" => "not checked".to_owned(),
        "refused" => format!("refused ({code})"),
        _ => state.into_owned(),
    }
}

/// A time with its age.
pub(super) fn time_and_age(time: &Value, now: i64) -> String {
    let time = word(time);
    match utc::parse(&time) {
        Some(ms) => format!("{time} ({} ago)", utc::age(now - ms)),
        None => time.into_owned(),
    }
}

/// The age of a time; a dash if there is none.
pub(super) fn age(time: &Value, now: i64) -> String {
    utc::parse(&word(time)).map_or("-".to_owned(), |ms| utc::age(now - ms))
}

/// Time remaining until a time: `in 12 s`, `in 5 min`, `now`; empty if there is none.
pub(super) fn wait(time: &Value, now: i64) -> String {
    let Some(ms) = utc::parse(&word(time)) else { return String::new() };
    match (ms - now).max(0).unsigned_abs().div_ceil(1000) {
        0 => "now".to_owned(),
        seconds @ ..120 => format!("in {seconds} s"),
        seconds => format!("in {} min", seconds.div_ceil(60)),
    }
}

/// Indented lines of a name and a value in two columns. Skips fields without a value.
pub(super) fn fields(indent: &str, fields: &[(&str, String)]) -> String {
    let fields = fields.iter().filter(|(_, value)| !value.is_empty());
    fields.map(|(name, value)| format!("{indent}{name:<FIELD_WIDTH$}{value}\n")).collect()
}
