//! A self-hosted plugin host, and what a plugin author needs to write for it.
//!
//! Without default features this crate is the plugin [`protocol`] and the Rust [`sdk`]. The feature `host` adds the server
//! and the operator's commands, which the `plugrack` binary runs.
//!
//! The rooms, from the bottom up; a file uses only the layers below its own:
//!
//! * words: [`protocol`]'s messages and metadata, `license`, `lock`, `repeat`, `restart`, `route`, `standing`, `text`, `time_mark`, and what
//!   the `gate` reads
//! * one resource each: frames, `link`, `threads`, `process`, `remains`, `guard`, `preflight`, `output`, `log_file`, `memory`, `room`, `store`,
//!   `data_dir`, `watch`, `handover`, `http_date`, `exchange`, `config`, the `gate`
//! * the rack: `queue`, `worker`, `plugin`, `supervisor`, `discovery`, `rack`, `host`, `callback`
//! * edges: `http`, `api`, `pages`, `client`
//! * wiring: `server`, `cli`

#[cfg(feature = "license")]
pub mod license;
mod lock;
pub mod protocol;
pub mod sdk;

#[cfg(feature = "host")]
mod api;
#[cfg(feature = "host")]
mod callback;
#[cfg(feature = "host")]
mod cli;
#[cfg(feature = "host")]
mod client;
#[cfg(feature = "host")]
mod config;
#[cfg(feature = "host")]
mod data_dir;
#[cfg(feature = "host")]
mod discovery;
#[cfg(feature = "host")]
mod exchange;
#[cfg(feature = "host")]
mod failure_line;
#[cfg(feature = "host")]
mod gate;
#[cfg(feature = "host")]
mod guard;
#[cfg(feature = "host")]
mod handover;
#[cfg(feature = "host")]
mod host;
#[cfg(feature = "host")]
#[cfg(test)]
mod hot_paths;
#[cfg(feature = "host")]
mod http;
#[cfg(feature = "host")]
mod http_date;
#[cfg(feature = "host")]
mod json_number;
#[cfg(feature = "host")]
mod license_wait;
#[cfg(feature = "host")]
mod link;
#[cfg(feature = "host")]
mod log_file;
#[cfg(feature = "host")]
mod memory;
#[cfg(feature = "host")]
mod output;
#[cfg(feature = "host")]
mod pages;
#[cfg(feature = "host")]
mod pause;
#[cfg(feature = "host")]
mod plugin;
#[cfg(feature = "host")]
mod preflight;
#[cfg(feature = "host")]
mod process;
#[cfg(feature = "host")]
mod quantity;
#[cfg(feature = "host")]
mod queue;
#[cfg(feature = "host")]
mod rack;
#[cfg(feature = "host")]
mod remains;
#[cfg(feature = "host")]
mod repeat;
#[cfg(feature = "host")]
mod restart;
#[cfg(feature = "host")]
mod room;
#[cfg(feature = "host")]
mod route;
#[cfg(feature = "host")]
mod server;
#[cfg(feature = "host")]
mod standing;
#[cfg(feature = "host")]
mod starts;
#[cfg(feature = "host")]
mod store;
#[cfg(feature = "host")]
mod supervisor;
#[cfg(feature = "host")]
mod text;
#[cfg(feature = "host")]
mod threads;
#[cfg(feature = "host")]
mod time_mark;
#[cfg(feature = "host")]
mod utc;
#[cfg(feature = "host")]
mod watch;
#[cfg(feature = "host")]
mod worker;

/// Runs the `plugrack` command: its whole `main`.
#[cfg(feature = "host")]
#[must_use]
pub fn main() -> std::process::ExitCode {
    cli::main()
}
