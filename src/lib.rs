//! A self-hosted plugin host, which the `plugrack` binary runs. The crate `plugrack-sdk` has the plugin protocol and the Rust SDK.
//!
//! The rooms, from the bottom up; a file uses only the layers below its own:
//!
//! * words: `repeat`, `restart`, `route`, `standing`, `text`, `time_mark`, and what
//!   the `gate` reads
//! * one resource each: `link`, `process`, `remains`, `guard`, `preflight`, `output`, `log_file`, `memory`, `room`, `store`,
//!   `data_dir`, `watch`, `handover`, `http_date`, `exchange`, `config`, the `gate`
//! * the rack: `queue`, `worker`, `plugin`, `supervisor`, `discovery`, `rack`, `host`, `callback`
//! * edges: `http`, `api`, `pages`, `client`
//! * wiring: `server`, `cli`

use plugrack_sdk::{license, protocol};

mod api;
mod callback;
mod cli;
mod client;
mod config;
mod data_dir;
mod discovery;
mod failure_line;
mod gate;
mod guard;
mod handover;
mod host;
#[cfg(test)]
mod hot_paths;
mod http;
mod job;
mod json_number;
mod license_wait;
mod link;
mod log_file;
mod memory;
mod output;
mod pause;
mod plugin;
mod preflight;
mod process;
mod quantity;
mod queue;
mod rack;
mod remains;
mod repeat;
mod restart;
mod room;
mod route;
mod scaling;
mod server;
mod standing;
mod starts;
mod store;
mod supervisor;
mod text;
mod time_mark;
mod unix_socket;
mod utc;
mod watch;
mod worker;

/// Runs the `plugrack` command: its whole `main`.
#[must_use]
pub fn main() -> std::process::ExitCode {
    cli::main()
}
