//! What every command shares: where the host is, and how an answer is printed.

use crate::client::ApiClient;
use crate::data_dir::DataDir;
use crate::text;
use anyhow::{Context, Result, bail};
use clap::builder::styling::{AnsiColor, Style};
use serde_json::Value;
use std::borrow::Cow;
use std::fs::File;
use std::io::{self, BufRead, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};

/// Most bytes that are read of a licence, or of a word typed at a prompt: more than any licence has, so that the host can say so.
const MAX_WORD: u64 = 64 * 1024;

/// Most bytes that are read of a value: one more than the largest value of the store, so that the host can refuse it by its limit.
const MAX_INPUT: u64 = crate::protocol::message::MAX_VALUE as u64 + 1;

/// Stands on a command line for standard input.
const STANDARD_INPUT: &str = "-";

/// One run of the program: the data directory that the command is about, and the form of its output.
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

    /// The API of the host that runs on the data directory.
    pub(super) fn api(&self) -> Result<ApiClient> {
        ApiClient::new(&self.data()?)
    }

    /// Prints an answer of the API: the JSON itself, or the text that `plain` makes of it.
    pub(super) fn print(&self, answer: &Value, plain: impl FnOnce(&Value) -> String) -> Result<()> {
        print(&if self.json { text::shown_json(&format!("{answer:#}\n")) } else { plain(answer) })
    }
}

/// Prints text as it is.
pub(super) fn print(text: &str) -> Result<()> {
    print_bytes(text.as_bytes())
}

/// Prints bytes as they are.
pub(super) fn print_bytes(bytes: &[u8]) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    Ok(out.flush()?)
}

/// A licence as given on the command line, or from standard input where that is `-`.
pub(super) fn token(given: String) -> Result<String> {
    if given != STANDARD_INPUT {
        return Ok(given);
    }
    let mut bytes = Vec::new();
    io::stdin().lock().take(MAX_WORD).read_to_end(&mut bytes).context("cannot read the licence from standard input")?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// A value as given on the command line, from a file, or from standard input where it is `-`: exactly its bytes.
pub(super) fn value(given: Option<String>, file: Option<&Path>) -> Result<Vec<u8>> {
    let read = |input: &mut dyn Read, name: &str| {
        let mut bytes = Vec::new();
        input.take(MAX_INPUT).read_to_end(&mut bytes).with_context(|| format!("cannot read {name}"))?;
        Ok(bytes)
    };
    match (given, file) {
        (_, Some(path)) => {
            let name = path.display().to_string();
            read(&mut File::open(path).with_context(|| format!("cannot read {name}"))?, &name)
        }
        (Some(given), None) if given != STANDARD_INPUT => Ok(given.into_bytes()),
        _ => read(&mut io::stdin().lock(), "standard input"),
    }
}

/// A text as given on the command line, from a file, or from standard input where it is `-`: exactly as it came.
///
/// # Errors
/// It cannot be read, or is not UTF-8.
pub(super) fn text_value(given: Option<String>, file: Option<&Path>) -> Result<String> {
    let is_read = given.as_deref().is_none_or(|given| given == STANDARD_INPUT);
    let text =
        String::from_utf8(value(given, file)?).ok().context("the value is not UTF-8 text: encode it, for example in base64")?;
    // Editors and `echo` end a line, and few secrets do.
    if is_read && text.ends_with('\n') {
        writeln!(io::stderr(), "plugrack: the value ends with a line break, which is kept: printf %s TEXT writes none")?;
    }
    Ok(text)
}

/// Has the operator type a word before something that cannot be undone.
///
/// # Errors
/// Another word was typed.
pub(super) fn confirm(word: &str, what: &str) -> Result<()> {
    print(&format!("type {word} to {what}, which cannot be undone: "))?;
    let mut typed = String::new();
    io::stdin().lock().take(MAX_WORD).read_line(&mut typed)?;
    if typed.trim() != word {
        bail!("{word} was not typed, and nothing was changed (--yes does not ask)");
    }
    Ok(())
}

/// A JSON string's text, fit to be shown; empty for a value that is no string.
pub(super) fn word(value: &Value) -> Cow<'_, str> {
    text::shown(value.as_str().unwrap_or_default())
}

/// The items of a JSON array; none for a value that is no array.
pub(super) fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// Whether output is for a person who wants colours, see <https://no-color.org>.
fn is_coloured() -> bool {
    io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// The state of a plugin and why it is in it, in a line.
pub(super) fn state(plugin: &Value) -> String {
    let state = word(&plugin["state"]);
    let colour = match &*state {
        "ready" => AnsiColor::Green.on_default(),
        "crash_looping" | "refused" | "unlicensed" => AnsiColor::Red.on_default(),
        "stopped" => Style::new(),
        _ => AnsiColor::Yellow.on_default(),
    };
    let style = if is_coloured() { colour } else { Style::new() };
    let (state, reason) = (state.replace('_', " "), word(&plugin["reason"]));
    let separator = if reason.is_empty() { "" } else { ": " };
    let update = match word(&plugin["update_refused"]) {
        refused if refused.is_empty() => String::new(),
        refused => format!(", update refused: {refused}"),
    };
    format!("{style}{state}{style:#}{separator}{reason}{update}")
}

/// Milliseconds since 1970 as a time of day, UTC.
pub(super) fn time(ms: i64) -> String {
    jiff::Timestamp::from_millisecond(ms).map(|time| format!("{time:.3}")).unwrap_or_default()
}
