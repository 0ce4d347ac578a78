//! The plugin's handlers for sockets, and what follows from how they end.

use super::message::{Close, Message, SendError};
use super::opening::Opening;
use super::socket::{Event, Socket};
use crate::dispatch::reason;
use crate::protocol::frame::EncodeError;
use crate::response::{Body, Response};
use crate::server::Server;
use crate::{Error, log};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// The code of a socket whose handler has failed (RFC 6455, section 7.4.1).
const INTERNAL_ERROR: u16 = 1011;

pub(crate) type OpenHandler = dyn Fn(&Socket) -> Result<Opening, Error> + Send + Sync;
pub(crate) type MessageHandler = dyn Fn(&Socket, Message) -> Result<(), Error> + Send + Sync;
pub(crate) type CloseHandler = dyn Fn(&Socket, Close) -> Result<(), Error> + Send + Sync;

/// What the plugin does about sockets.
#[derive(Default)]
pub(crate) struct Handlers {
    pub(crate) open: Option<Box<OpenHandler>>,
    pub(crate) message: Option<Box<MessageHandler>>,
    pub(crate) close: Option<Box<CloseHandler>>,
}

impl Handlers {
    /// Whether there are any, so that the plugin has to do with sockets at all.
    pub(crate) fn any(&self) -> bool {
        self.open.is_some() || self.message.is_some() || self.close.is_some()
    }
}

/// What a handler of messages or of the end may return: nothing, or whether it has failed.
pub trait HandlerResult {
    /// Why the handler failed, if it did.
    ///
    /// # Errors
    /// When the handler failed.
    fn into_result(self) -> Result<(), Error>;
}

impl HandlerResult for () {
    fn into_result(self) -> Result<(), Error> {
        Ok(())
    }
}

impl<E: Into<Error>> HandlerResult for Result<(), E> {
    fn into_result(self) -> Result<(), Error> {
        self.map_err(Into::into)
    }
}

/// Calls the handler for what has come next to a socket.
pub(super) fn handle(server: &Arc<Server>, socket: &Socket) {
    let handlers = &server.handlers.websocket;
    match socket.next() {
        Some(Event::Open) => {
            if let Some(handler) = &handlers.open {
                open(server, socket, handler);
            }
        }
        Some(Event::Message(message)) => {
            let cost = message.cost();
            if let Some(handler) = &handlers.message
                && let Err(failure) = call(server, || handler(socket, message))
            {
                failure.log(socket);
                socket.give_up(INTERNAL_ERROR, "internal error");
            }
            socket.give_credit(cost);
        }
        Some(Event::Close(close)) => {
            if let Some(handler) = &handlers.close
                && let Err(failure) = call(server, || handler(socket, close))
            {
                failure.log(socket);
            }
        }
        None => {}
    }
}

/// Asks the open handler, and answers the host.
fn open(server: &Arc<Server>, socket: &Socket, handler: &OpenHandler) {
    let answered = match call(server, || handler(socket)?.checked(socket)) {
        Ok(Opening::Accept(acceptance)) => socket.accept(acceptance),
        Ok(Opening::Refuse(response)) => refuse(socket, response),
        Err(failure) => {
            failure.log(socket);
            refuse(socket, Response::internal_error())
        }
    };
    if let Err(error) = answered {
        Failure::Error(error.into()).log(socket);
        // Fits a frame.
        refuse(socket, Response::internal_error()).ok();
    }
}

fn refuse(socket: &Socket, response: Response) -> Result<(), EncodeError> {
    let Response { status, headers, body } = response;
    // A checked refusal has no other.
    let body = if let Body::Bytes(body) = &body { &**body } else { &[] };
    socket.refuse(status, headers, body)
}

/// Why a handler has not done its work.
enum Failure {
    Error(Error),
    /// The panic hook has written the message.
    Panic,
}

impl Failure {
    /// Writes the reason to the plugin's log. That a socket is closed is none: its close handler is called.
    fn log(&self, socket: &Socket) {
        match self {
            Self::Error(error) if matches!(error.downcast_ref(), Some(SendError::Closed)) => {}
            Self::Error(error) => log(format_args!("WebSocket {}: {}", socket.path(), reason(error))),
            Self::Panic => log(format_args!("WebSocket {}: the handler panicked", socket.path())),
        }
    }
}

fn call<T>(server: &Server, handler: impl FnOnce() -> Result<T, Error>) -> Result<T, Failure> {
    match catch_unwind(AssertUnwindSafe(|| server.in_turn(handler))) {
        Ok(result) => result.map_err(Failure::Error),
        Err(_) => Err(Failure::Panic),
    }
}
