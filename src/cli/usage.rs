//! The message for an invalid command line.

use super::console::error_line;
use clap::builder::StyledStr;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Command, Error};
use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

/// Code of the error with `--json`.
const CODE: &str = "usage";

/// The global option whose value could be mistaken for a word of the command.
const DATA: &str = "--data";

/// Prints what is wrong with the arguments of `command`, or the requested help.
pub(super) fn explain(mut error: Error, mut command: Command, arguments: &[OsString]) -> ExitCode {
    if error.use_stderr() {
        let words = arguments.iter().filter_map(|argument| argument.to_str());
        command.build();
        complete(&mut error, &mut command, words.collect());
        if arguments.iter().take_while(|argument| *argument != "--").any(|argument| argument == "--json") {
            // Nobody can read an error if standard error is closed.
            drop(writeln!(io::stderr(), "{}", error_line(None, CODE, &sentence(&error))));
            return ExitCode::from(2);
        }
    }
    drop(error.print());
    u8::try_from(error.exit_code()).map_or(ExitCode::FAILURE, ExitCode::from)
}

/// Adds the usage of the command to an error, and a tip if the words seem to be in the wrong order. clap's own usage would list
/// everything already given, environment variables included, as if it were required.
fn complete(error: &mut Error, root: &mut Command, words: Vec<&str>) {
    let mut command = root;
    let mut rest = Vec::new();
    let mut words = words.into_iter().take_while(|word| *word != "--");
    while let Some(word) = words.next() {
        if word == DATA {
            words.next();
        } else if rest.is_empty() && command.find_subcommand(word).is_some() {
            let Some(inner) = command.find_subcommand_mut(word) else { return };
            command = inner;
        } else if !word.starts_with('-') {
            rest.push(word);
        }
    }
    if error.get(ContextKind::Usage).is_some() {
        error.insert(ContextKind::Usage, ContextValue::StyledStr(command.render_usage()));
    }
    if error.kind() == ErrorKind::InvalidSubcommand
        && let Some(name) = command.get_bin_name().filter(|name| name.contains(' '))
    {
        let verbs: Vec<&str> = command.get_subcommands().map(Command::get_name).filter(|verb| *verb != "help").collect();
        let tip = match rest[..] {
            [id, verb, ref more @ ..] if verbs.contains(&verb) => {
                // Values may be secrets, so they are not repeated.
                let more = if more.is_empty() { "" } else { " …" };
                format!("the verb comes before the ID: {name} {verb} {id}{more}")
            }
            _ => format!("usage: {name} VERB, where VERB is one of {}", verbs.join(", ")),
        };
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![StyledStr::from(tip)]));
    }
}

/// The error as one line.
fn sentence(error: &Error) -> String {
    if matches!(error.kind(), ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand | ErrorKind::MissingSubcommand) {
        return "no command given; --help lists the commands".to_owned();
    }
    let text = error.render().to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let lines = text.lines().take_while(|line| !line.starts_with("Usage: ") && !line.starts_with("For more information"));
    let lines = lines.map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>();
    lines.join(" ").replace(" tip: ", "; ")
}
