//! The command line: its arguments, and the dispatch to each command.

pub(crate) mod api_client;
mod clock;
mod config;
mod console;
mod detect;
mod env;
mod instance;
mod kv;
mod license;
mod limits;
mod logs;
mod plugins;
mod run;
mod table;
mod usage;
mod vendor;

use crate::process;
use crate::process::watchdog;
use crate::server;
use crate::server::options::{DEFAULT_DATA, Serve};
use crate::util::escape;
use anyhow::Result;
use clap::{CommandFactory, Parser, Subcommand};
use console::Console;
use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

/// The program's description in its help.
const ABOUT: &str = "Run many small web applications, in any language, on one server";

/// The command line.
#[derive(Debug, Parser)]
#[command(version, about = ABOUT, long_about = None, max_term_width = 100, after_help = "\
Begin with:
  plugrack serve --data ./var            start a host; put plugins into ./var/plugins
  curl http://127.0.0.1:8080/            list them on the start page
  plugrack --data ./var list             show their status")]
struct Cli {
    /// The host's data directory: database, logs, token, sockets
    #[arg(long, global = true, value_name = "DIR", env = "PLUGRACK_DATA", default_value = DEFAULT_DATA)]
    data: PathBuf,

    /// Print JSON; with config set, also read the value as JSON
    #[arg(long, global = true)]
    json: bool,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the host until SIGTERM or SIGINT. SIGHUP looks for new plugins and re-reads the certificate
    Serve(Box<Serve>),
    /// Try a web application at once, without files: start it, find where it listens, and serve it until it ends or Ctrl-C
    Run(Box<run::Run>),
    /// List plugins and their status
    #[command(aliases = ["ls", "ps", "status"])]
    List {
        /// Print all columns in full; the default if the output is not a terminal
        #[arg(short, long)]
        long: bool,
    },
    /// Show everything about plugins: status, what to do, requests, last exit, events
    Show {
        /// Ids of plugins, or names of files that were refused
        #[arg(required = true, value_name = "ID")]
        ids: Vec<String>,
    },
    /// Show a plugin's log
    Logs {
        /// The plugin's id, or the name of a file that was refused
        id: String,
        /// Keep printing new lines as they arrive
        #[arg(short, long)]
        follow: bool,
        /// Number of lines
        #[arg(short = 'n', long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(0..=10_000))]
        lines: u32,
    },
    /// Start plugins that are stopped or waiting after a crash
    Start(Plugins),
    /// Stop plugins, until you start them or the host restarts
    Stop(Plugins),
    /// Restart plugins with their current settings
    Restart(Plugins),
    /// Start plugins, now and whenever the host starts
    Enable(Plugins),
    /// Stop plugins, and keep them stopped until you enable them again
    Disable(Plugins),
    /// Find new, changed and removed plugins. Fails if the host refuses an update
    #[command(alias = "reload")]
    Rescan,
    /// Read and write a plugin's stored data, through the plugin or directly
    Kv {
        #[command(subcommand)]
        action: kv::Kv,
    },
    /// Read and write a plugin's settings
    Config {
        #[command(subcommand)]
        action: config::Config,
    },
    /// Read and write a plugin's environment variables
    Env {
        #[command(subcommand)]
        action: env::Env,
    },
    /// Read and write a plugin's limits: open files, start timeout, request timeout
    Limits {
        #[command(subcommand)]
        action: limits::LimitsCommand,
    },
    /// Set, show, issue and inspect licences
    License {
        #[command(subcommand)]
        action: LicenseAction,
    },
    /// Print the instance id. Works without a running host
    Instance {
        #[command(subcommand)]
        action: Option<InstanceAction>,
    },
    /// Give an id with its data, settings and licence to another file in the plugins directory
    Adopt {
        /// The plugin's id
        id: String,
        /// The name of the file in the plugins directory
        file: String,
    },
    /// List the data of removed plugins: keys, settings, licences, files
    Gone,
    /// Propose a manifest, plugrack.toml, for an application. Runs nothing, and works without a running host
    Detect(detect::Detect),
    /// Delete the data of removed plugins
    Forget {
        /// Ids of removed plugins
        #[arg(required = true, value_name = "ID")]
        ids: Vec<String>,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

/// The plugins that a command acts on.
#[derive(Debug, clap::Args)]
struct Plugins {
    /// Ids of plugins
    #[arg(required = true, value_name = "ID")]
    ids: Vec<String>,
}

#[derive(Debug, Subcommand)]
enum InstanceAction {
    /// Create a new instance id, for a copy that becomes an installation of its own
    Rotate {
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Debug, Subcommand)]
enum LicenseAction {
    #[command(flatten)]
    Operator(license::License),
    #[command(flatten)]
    Vendor(vendor::Vendor),
}

/// Runs the program. Exit codes: 0 success, 1 failure, 2 invalid command line.
pub(crate) fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    match arguments.next() {
        Some(role) if role == process::SHIM => return process::shim_main(arguments),
        Some(role) if role == process::SWEEPER => return process::sweeper_main(arguments),
        Some(role) if role == watchdog::ARGUMENT => {
            log_to_stderr("info");
            return watchdog::main(arguments);
        }
        _ => {}
    }
    let Cli { data, json, command } = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage::explain(error, Cli::command(), &std::env::args_os().skip(1).collect::<Vec<OsString>>()),
    };
    let console = Console { data, json };
    match run(command, &console) {
        Ok(code) => code,
        // `plugrack list | head` is not an error.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            console.report(None, &error);
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

fn run(command: Command, console: &Console) -> Result<ExitCode> {
    let done = match command {
        Command::Serve(settings) => {
            log_to_stderr("info");
            server::serve(&console.data, &settings)
        }
        Command::Run(arguments) => {
            log_to_stderr(run::LOGGED);
            return arguments.run(console);
        }
        Command::Instance { action: None } => instance::show(console),
        Command::Instance { action: Some(InstanceAction::Rotate { yes }) } => instance::rotate(console, yes),
        Command::List { long } => plugins::list(console, long),
        Command::Show { ids } => plugins::show(console, &ids),
        Command::Start(plugins) => plugins::command(console, &plugins.ids, "start"),
        Command::Stop(plugins) => plugins::command(console, &plugins.ids, "stop"),
        Command::Restart(plugins) => plugins::command(console, &plugins.ids, "restart"),
        Command::Enable(plugins) => plugins::command(console, &plugins.ids, "enable"),
        Command::Disable(plugins) => plugins::command(console, &plugins.ids, "disable"),
        Command::Logs { id, follow, lines } => logs::logs(console, &id, follow, lines as usize),
        Command::Kv { action } => action.run(console),
        Command::Config { action } => action.run(console),
        Command::Env { action } => action.run(console),
        Command::Limits { action } => action.run(console),
        Command::License { action: LicenseAction::Operator(action) } => action.run(console),
        Command::License { action: LicenseAction::Vendor(action) } => action.run(console),
        Command::Rescan => plugins::rescan(console),
        Command::Adopt { id, file } => plugins::adopt(console, &id, &file),
        Command::Gone => plugins::gone(console),
        Command::Detect(detect) => detect.run(console),
        Command::Forget { ids, yes } => plugins::forget(console, &ids, yes),
    };
    done.map(|()| ExitCode::SUCCESS)
}

/// Logs to standard error, which may be a terminal, what `RUST_LOG` says, or else `filter`. Log lines quote plugins, so the text is escaped.
fn log_to_stderr(filter: &str) {
    let mut log = env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(filter));
    log.format(|out, record| {
        let (time, level, what) = (out.timestamp(), record.level(), record.args().to_string());
        let style = out.default_level_style(level);
        writeln!(out, "[{time} {style}{level:<5}{style:#} {}] {}", record.target(), escape::shown(&what))
    });
    log.init();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }
}
