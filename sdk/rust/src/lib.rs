//! The Rust SDK of plugrack, a self-hosted plugin host: all that a plugin in Rust needs, on threads and blocking sockets.
//!
//! A plugin describes itself, and serves:
//!
//! ```no_run
//! use plugrack_sdk::{Error, Plugin, Request, Response};
//! use std::process::ExitCode;
//!
//! fn main() -> ExitCode {
//!     Plugin::new("visits", "Visits", "1.0.0", "🔢", "/visits").concurrency(4).serve(visit)
//! }
//!
//! fn visit(request: &mut Request) -> Result<Response, Error> {
//!     if request.method() != "POST" {
//!         return Ok(Response::text("post here\n").status(405).header("allow", "POST"));
//!     }
//!     let visits = request.kv().incr("visits", 1)?;
//!     Ok(Response::text(format!("visit number {visits}\n")))
//! }
//! ```
//!
//! A handler may return anything that is [`IntoResponse`]: text, bytes, a status with either, or a `Result` of these.
//! What it needs from the host it has from its [`Context`]: the operator's settings, its directory, its key-value store.
//!
//! A handler that waits, and a response that streams, should wait with [`Request::cancelled_within`] or [`Cancellation`]: both return
//! as soon as nobody waits for the answer any more. A request that the host has given up makes room for another, also while its
//! handler still runs; at most twice the [concurrency](Plugin::concurrency) handlers run.
//!
//! A plugin that is to have WebSockets names their handlers, see [`websocket`].
//!
//! A proprietary plugin is licensed by `Plugin::licensed`, which needs the feature `license`; `Context::granted` has what its
//! licence grants.
//!
//! Standard output and standard error both go to the plugin's log.
//!
//! The [`protocol`] and, with the feature `license`, the licences of proprietary plugins are here too, for the host has both from
//! this crate.

mod answer;
mod cancel;
mod connection;
mod context;
mod dispatch;
mod group;
mod kv;
#[cfg(feature = "license")]
pub mod license;
#[cfg(feature = "license")]
mod licensed;
#[doc(hidden)]
pub mod lock;
mod operation;
mod outbox;
mod plugin;
mod pool;
pub mod protocol;
mod request;
mod response;
mod server;
#[cfg(test)]
mod tests;
pub mod websocket;

pub use cancel::Cancellation;
pub use context::{Context, Refusal};
pub use kv::{Entry, Kv, KvError, Listed, Page, SetOptions, Write};
#[cfg(feature = "license")]
pub use license::{License, Standing};
pub use operation::{Operation, Outcome};
pub use plugin::Plugin;
pub use protocol::message::{HostInfo, ListOp, WriteOutcome};
pub use protocol::metadata::Metadata;
pub use request::{BodyError, Request};
pub use response::{IntoResponse, Response};

/// Any error: what a handler may fail with.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// Writes a line to the plugin's log. A log that is gone is no reason to fail.
fn log(line: std::fmt::Arguments<'_>) {
    use std::io::Write;
    drop(writeln!(std::io::stderr(), "{line}"));
}
