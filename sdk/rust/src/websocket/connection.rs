//! The connection for all sockets: one thread reads its messages and passes them on, and never waits for a handler.

use super::message::{Close, Message};
use super::opening::Acceptance;
use super::outgoing::Outgoing;
use super::socket::{Event, Socket};
use crate::connection::{Connection, End};
use crate::context::Context;
use crate::lock::LockExt;
use crate::protocol::message::{self, SocketClose, SocketCredit, SocketMessage, SocketOpen};
use crate::server::Server;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// How long the end of a connection waits for handlers, and for the host to take what they have sent: as long as the host gives a
/// plugin from `shutdown` to SIGKILL.
const END_TIME: Duration = Duration::from_secs(5);

/// Stack of the thread that writes, in bytes. It runs no code of the plugin.
const WRITER_STACK: usize = 64 * 1024;

/// What the threads that deal with a connection's sockets share.
#[derive(Default)]
pub(super) struct Line {
    pub(super) outgoing: Outgoing,
    /// The sockets about which the host may still send, by their ids.
    sockets: Mutex<HashMap<u64, Socket>>,
}

impl Line {
    /// Forgets a socket about which the host sends nothing more.
    pub(super) fn forget(&self, id: u64) -> Option<Socket> {
        self.sockets.locked().remove(&id)
    }

    fn socket(&self, message: &message::Message<'_>) -> Result<Socket, End> {
        let unknown = || End::Fault(format!("{} is about no socket that is open", message.named()));
        self.sockets.locked().get(&message.id()).cloned().ok_or_else(unknown)
    }
}

/// Serves a connection whose first message has asked for a socket, until it is over.
pub(crate) fn serve(
    server: &Arc<Server>,
    context: &Context,
    connection: &mut Connection,
    first: SocketOpen<'_>,
) -> Result<(), End> {
    let line = Arc::new(Line::default());
    let stream = connection.stream();
    let (out, to) = (Arc::clone(&line), Arc::clone(&stream));
    let writing = thread::Builder::new().name("sockets".to_owned()).stack_size(WRITER_STACK);
    let writing = writing.spawn(move || out.outgoing.write(&to));
    let writing = writing.map_err(|error| End::Fault(format!("cannot start a thread for WebSockets: {error}")))?;
    let mut reading = Reading { server, context, line: &line };
    let ended = reading.open(first).and_then(|()| reading.read(connection));
    let left = std::mem::take(&mut *line.sockets.locked());
    for socket in left.into_values() {
        reading.end(&socket, Close::lost());
    }
    if ended.is_ok() {
        server.workers.wait_until_idle(END_TIME);
    }
    line.outgoing.finish(&stream, END_TIME);
    // A panic of the writer has been written by its hook.
    writing.join().ok();
    ended
}

/// The reading thread's view of its connection.
struct Reading<'a> {
    server: &'a Arc<Server>,
    context: &'a Context,
    line: &'a Arc<Line>,
}

impl Reading<'_> {
    /// Passes messages on, until the host tells the connection to end.
    fn read(&mut self, connection: &mut Connection) -> Result<(), End> {
        let mut head = Vec::new();
        loop {
            match connection.receive(&mut head)? {
                message::Message::SocketOpen(open) => self.open(*open)?,
                ref named @ message::Message::SocketMessage(SocketMessage { text, .. }) => {
                    let socket = self.line.socket(named)?;
                    let body = connection.take_body();
                    let message = if text {
                        let not_text = |_| End::Fault(format!("the text of {} is not UTF-8", named.named()));
                        Message::Text(String::from_utf8(body).map_err(not_text)?)
                    } else {
                        Message::Binary(body)
                    };
                    let is_ready = socket.receive(message).map_err(|fault| End::Fault(format!("{} {fault}", named.named())))?;
                    self.schedule(is_ready, &socket);
                }
                ref named @ message::Message::SocketCredit(SocketCredit { bytes, .. }) => {
                    self.line.socket(named)?.add_credit(bytes)
                }
                message::Message::SocketClose(SocketClose { id, code, reason }) => {
                    // One that the plugin has refused is forgotten, and the host may not have known it yet.
                    if let Some(socket) = self.line.forget(id) {
                        self.end(&socket, Close { code, reason: reason.to_string() });
                    }
                }
                message::Message::Shutdown(_) => {
                    self.context.stop();
                    return Ok(());
                }
                other => return Err(End::Fault(format!("{} is out of place among WebSockets", other.kind()))),
            }
        }
    }

    /// Takes in a new socket. Without an open handler it is accepted at once.
    fn open(&mut self, open: SocketOpen<'_>) -> Result<(), End> {
        let id = open.id;
        let socket = Socket::new(open, self.context, self.line);
        if self.line.sockets.locked().insert(id, socket.clone()).is_some() {
            return Err(End::Fault(format!("ws_open came with the id {id} of another socket")));
        }
        if self.server.handlers.websocket.open.is_some() {
            self.schedule(socket.push(Event::Open), &socket);
            return Ok(());
        }
        Ok(socket.accept(Acceptance::new())?)
    }

    fn end(&self, socket: &Socket, close: Close) {
        self.schedule(socket.end(close), socket);
    }

    fn schedule(&self, is_ready: bool, socket: &Socket) {
        if is_ready {
            self.server.workers.push(self.server, socket.clone());
        }
    }
}
