//! The command line: what can be typed, and where each command is carried out.

mod config;
mod console;
mod env;
mod instance;
mod kv;
mod license;
mod limits;
mod logs;
mod plugins;
mod vendor;

use crate::config::{DEFAULT_DATA, Serve};
use crate::guard;
use crate::process;
use crate::server;
use crate::text;
use anyhow::Result;
use clap::{Parser, Subcommand};
use console::Console;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

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

    /// Print JSON; for config set: the value is JSON, too
    #[arg(long, global = true)]
    json: bool,

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
    List,
    /// Show all about one plugin
    Show {
        /// Its id, or the name of a file that was refused
        id: String,
    },
    /// Start plugins that are stopped, or waiting after a crash
    Start(Plugins),
    /// Stop plugins, until they are started or the host restarts
    Stop(Plugins),
    /// Stop plugins and start them again, with their present settings
    Restart(Plugins),
    /// Let plugins run, now and after every start of the host
    Enable(Plugins),
    /// Stop plugins, and keep them from running until they are enabled
    Disable(Plugins),
    /// Print the last lines that a plugin has printed
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
    /// Read and write the keys of a plugin, by way of the plugin or in the store itself
    Kv {
        #[command(subcommand)]
        action: kv::Kv,
    },
    /// Read and write the settings that a plugin is started with
    Config {
        #[command(subcommand)]
        action: config::Config,
    },
    /// Set environment variables of a plugin
    Env {
        #[command(subcommand)]
        action: env::Env,
    },
    /// Set limits of a plugin in place of the host's: open files and times
    Limits {
        #[command(subcommand)]
        action: limits::Limits,
    },
    /// Set, show, issue and inspect licences
    License {
        #[command(subcommand)]
        action: LicenseAction,
    },
    /// Look for plugins that were added, replaced or removed; fails where an update is refused
    Rescan,
    /// Give an id, with the keys, settings and licence kept under it, to another file in the plugins directory
    Adopt {
        /// The plugin's id
        id: String,
        /// The name of the file in the plugins directory
        file: String,
    },
    /// List what plugins that are gone have left: keys, settings, licences, files
    Gone,
    /// Delete what a plugin that is gone has left
    Forget {
        /// Its id
        id: String,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

/// The plugins that a command is about.
#[derive(Debug, clap::Args)]
struct Plugins {
    /// Ids of plugins
    #[arg(required = true, value_name = "ID")]
    ids: Vec<String>,
}

#[derive(Debug, Subcommand)]
enum InstanceAction {
    /// Make a new instance id, for example for a copy that is to be an installation of its own
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
    let Cli { data, json, command } = Cli::parse();
    match run(command, &Console { data, json }) {
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

fn run(command: Command, console: &Console) -> Result<()> {
    match command {
        Command::Serve(settings) => {
            log_to_stderr();
            server::serve(&console.data, &settings)
        }
        Command::Instance { action: None } => instance::show(console),
        Command::Instance { action: Some(InstanceAction::Rotate { yes }) } => instance::rotate(console, yes),
        Command::List => plugins::list(console),
        Command::Show { id } => plugins::show(console, &id),
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
        Command::License { action: LicenseAction::Vendor(action) } => action.run(),
        Command::Rescan => plugins::rescan(console),
        Command::Adopt { id, file } => plugins::adopt(console, &id, &file),
        Command::Gone => plugins::gone(console),
        Command::Forget { id, yes } => plugins::forget(console, &id, yes),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
