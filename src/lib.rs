//! A self-hosted plugin host, which the `plugrack` binary runs. The crate `plugrack-sdk` has the plugin protocol and the Rust SDK.
//!
//! The modules, from the bottom up. Each uses only those below it:
//!
//! * `util`: small tools without a domain
//! * `licensing`: what the host knows of licences
//! * `process`: child processes, their output and their orphans
//! * `system`: the data directory, limits, sockets
//! * `http`: HTTP/1.1, one request, and its responder
//! * `store`: the database
//! * `apps`: applications that do not speak the plugin protocol, and their manifests
//! * `plugins`: the registry, supervision, queues and workers
//! * `api`: the operator's API
//! * `gate`: the HTTP server for the network
//! * `server`: start and stop of `plugrack serve`
//! * `cli`: the commands

use plugrack_sdk::{license, lock, protocol};

mod api;
mod apps;
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
