//! A self-hosted plugin host, which the `plugrack` binary runs. The crate `plugrack-sdk` has the plugin protocol and the Rust SDK.
//!
//! The rooms, from the bottom up; each uses only those below it:
//!
//! * [`util`]: small tools
//! * [`licensing`]: what the host can tell of licences
//! * [`process`]: processes, what they print, and what is left of them
//! * [`system`]: the data directory, limits, sockets
//! * [`http`]: HTTP/1.1, one request, and its responder
//! * [`store`]: the database
//! * [`plugins`]: the registry, supervision, queues and workers
//! * [`api`]: the operator's API
//! * [`gate`]: the network
//! * [`server`]: how `plugrack serve` starts and ends
//! * [`cli`]: the commands

use plugrack_sdk::{license, lock, protocol};

mod api;
mod cli;
mod gate;
#[cfg(test)]
mod hot_paths;
mod http;
mod licensing;
mod plugins;
mod process;
mod server;
mod store;
mod system;
mod util;

/// Runs the `plugrack` command: its whole `main`.
#[must_use]
pub fn main() -> std::process::ExitCode {
    cli::main()
}
