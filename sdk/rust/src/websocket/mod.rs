//! WebSocket: messages both ways with a client, for as long as it stays.
//!
//! A plugin that names a handler for WebSockets gets them below its route or host names, beside its web requests. The host does the
//! handshake, the fragments, the pings and the limits: a plugin sees whole messages.
//!
//! ```no_run
//! use plugrack_sdk::websocket::{Acceptance, Opening};
//! use plugrack_sdk::{Plugin, Response};
//! use std::process::ExitCode;
//!
//! fn main() -> ExitCode {
//!     Plugin::new("chat", "Chat", "1.0.0", "💬", "/chat")
//!         .on_websocket_open(|socket| match socket.path() {
//!             "/room" => Opening::from(Acceptance::new().header("set-cookie", "seen=1")),
//!             _ => Opening::from(Response::text("there is one room, /room\n").status(404)),
//!         })
//!         .on_websocket(|socket, message| socket.context().broadcast(message).map(drop))
//!         .on_websocket_close(|socket, close| eprintln!("{} has left: {:?}", socket.remote(), close.code))
//!         .serve(|_| Response::html("<!doctype html><title>Chat</title>"))
//! }
//! ```
//!
//! The handlers of one socket are called one after the other, in the order of its messages, those of several sockets side by side:
//! on at most as many threads as the plugin's [concurrency](crate::Plugin::concurrency), beside those of web requests. With a
//! concurrency of 1 no two handlers run at the same time, whatever they handle.
//!
//! Each side has credit for what it may send, so nothing piles up. [`Socket::send`] waits while a client reads slowly, and
//! [`Context::broadcast`](crate::Context::broadcast) closes the sockets of such clients. A message of a client makes room for
//! another when its handler has returned.

mod connection;
mod handlers;
mod message;
mod opening;
mod outgoing;
mod registry;
mod socket;
mod workers;

pub(crate) use connection::serve;
pub use handlers::HandlerResult;
pub(crate) use handlers::Handlers;
pub use message::{Close, CloseError, Message, SendError};
pub use opening::{Acceptance, IntoOpening, Opening};
pub(crate) use registry::{Registry, broadcast};
pub use socket::Socket;
pub(crate) use workers::Workers;
