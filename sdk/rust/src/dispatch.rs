//! What is done about each message of a connection, in their order.

use super::answer::answer;
use super::connection::{Connection, End};
use super::context::Context;
use super::kv::KvError;
use super::operation::Operation;
use super::request::{BodyError, Request};
use super::response::Response;
use super::server::{Server, Slot};
use super::{Error, log, websocket};
use crate::protocol::message::{Failure, Http, Kv, Message, Pong, is_error_code};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Serves a connection until it is over.
pub(super) fn serve(slot: &Slot, connection: &mut Connection) -> Result<(), End> {
    let server = &slot.server;
    let mut head = Vec::new();
    let mut is_first = true;
    loop {
        match (connection.receive(&mut head)?, server.context()) {
            (Message::Init(init), _) => server.init(*init, connection)?,
            (Message::Http(message), Some(context)) => http(server, context, connection, *message)?,
            (Message::Kv(message), Some(context)) => kv(server, context, connection, &message)?,
            (Message::SocketOpen(open), Some(context)) if is_first && server.handlers.websocket.any() => {
                slot.carries_sockets();
                return websocket::serve(server, context, connection, *open);
            }
            (Message::Ping(ping), Some(_)) => connection.send(&Pong { id: ping.id }, &[])?,
            (Message::Shutdown(_), Some(context)) => {
                context.stop();
                return connection.flush();
            }
            (message, _) => return Err(End::Fault(format!("{} is out of place", message.kind()))),
        }
        is_first = false;
    }
}

fn http(server: &Server, context: &Context, connection: &mut Connection, message: Http<'_>) -> Result<(), End> {
    let mut request = Request::new(message, connection, context);
    let response = match catch_unwind(AssertUnwindSafe(|| server.in_turn(|| (server.handlers.http)(&mut request)))) {
        Ok(Ok(response)) => response,
        Ok(Err(error)) => failed(&request, &error),
        // The panic hook has written the message.
        Err(_) => Response::internal_error(),
    };
    answer(request, response)
}

/// The response for a handler that failed.
fn failed(request: &Request<'_>, error: &Error) -> Response {
    if let Some(too_large @ BodyError::TooLarge(_)) = error.downcast_ref() {
        return Response::text(too_large.to_string()).status(413);
    }
    log(format_args!("{} {}: {}", request.method(), request.path(), reason(error)));
    Response::internal_error()
}

/// An error with all that has led to it, for the plugin's log.
pub(super) fn reason(error: &Error) -> String {
    let mut reason = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        reason.push_str(": ");
        reason.push_str(&error.to_string());
        source = error.source();
    }
    reason
}

fn kv(server: &Server, context: &Context, connection: &mut Connection, message: &Kv) -> Result<(), End> {
    let id = message.id;
    let outcome = match Operation::new(&message.op, connection.body()) {
        None => Err(KvError::refused("bad_request", "a plugin is asked for get, set and delete alone")),
        Some(operation) => {
            let performed = catch_unwind(AssertUnwindSafe(|| server.in_turn(|| (server.handlers.kv)(context, operation))));
            performed.unwrap_or_else(|_| Err(KvError::refused("internal", "the plugin failed")))
        }
    };
    match outcome {
        Ok(outcome) => {
            let (head, value) = outcome.into_result(id, message.op.name());
            if let Some(error) = connection.reply(id, &head, &value)? {
                log(format_args!("an operator's request for a key cannot be answered: {error}"));
            }
            Ok(())
        }
        Err(KvError::Refused { code, message, index }) => {
            if !is_error_code(&code) {
                log(format_args!("{code:?} is no code for an operator, who is told internal: a code is [a-z][a-z0-9_]{{0,63}}"));
            }
            connection.send(&Failure { index, ..Failure::new(id, &code, &message) }, &[])
        }
        Err(KvError::Io(error)) => {
            log(format_args!("the host's store cannot be reached: {error}"));
            let message = format!("the plugin cannot reach the host's store: {error}");
            connection.send(&Failure::new(id, "internal", &message), &[])
        }
    }
}
