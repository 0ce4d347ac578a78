//! WebSocket with a client (RFC 6455), for plugins that speak the plugin protocol: the event loop exchanges frames with the client, and
//! whole messages with the plugin's connection for sockets.
//!
//! A socket has no thread. A client from which the plugin takes nothing more is not read, and neither is one that does not read itself.

use super::connection::{Connection, ConnectionKey, Phase};
use super::event_loop::EventLoop;
use super::log_topics::LogTopic;
use super::requests::Step;
use crate::http::websocket::{Closing, SocketEnd, ToClient, cost};
use crate::protocol::message::{MAX_BODY, MAX_CLOSE_REASON, SOCKET_CREDIT};
use std::io::{self, Read, Write};
use std::time::Duration;
use tungstenite::protocol::frame::coding::CloseCode;
use tungstenite::protocol::{CloseFrame, Role, WebSocketConfig, WebSocketContext};
use tungstenite::{Bytes, Error, Message, Utf8Bytes};

/// Time for a client to answer a close frame.
const CLOSE_TIME: Duration = Duration::from_secs(5);

/// Unsent bytes from which on a client is not read: its pings would fill the memory with pongs, and it gets no more of what it asks for.
const MAX_UNSENT: usize = 64 * 1024;

/// Bytes of the buffer from which frames are read. Each socket has one, so it is small.
const READ_BUFFER: usize = 8 * 1024;

/// Bytes of a control frame of a client, in addition to its payload: two, and the mask (RFC 6455, section 5.2).
const CONTROL_HEAD: usize = 6;

/// Credit of a plugin that is returned together, so that not each message costs one.
const RETURNED: u64 = SOCKET_CREDIT / 4;

/// The client's end of a socket.
pub(super) struct WebSocket {
    context: WebSocketContext,
    plugin: SocketEnd,
    /// What the plugin still takes.
    credit: i64,
    /// The cost of the plugin's messages that the client has not taken, or whose credit was not returned yet.
    owed: u64,
    /// Unsent bytes when it was last looked.
    unsent: usize,
    /// Bytes that were received of messages that are not whole.
    partial: usize,
    /// Bytes that count for `--websocket-memory`.
    counted: u64,
    /// Whether the client has sent or taken anything since the last ping.
    heard: bool,
}

/// How a step on a socket has ended.
enum Turn {
    /// There may be more to do at once.
    Again,
    /// Nothing more can be done now.
    Wait,
    /// Everything was said: the connection ends after its output.
    Over,
    /// The connection is lost.
    Lost,
}

/// The connection, as WebSocket reads and writes it.
struct Wire<'a> {
    connection: &'a mut Connection,
    /// Bytes read.
    read: usize,
}

impl<'a> Wire<'a> {
    fn new(connection: &'a mut Connection) -> Self {
        Self { connection, read: 0 }
    }
}

impl Read for Wire<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let connection = &mut *self.connection;
        let n = if connection.input.is_empty() {
            if !connection.readable {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            match connection.read(buffer)? {
                0 if !connection.ended => return Err(io::ErrorKind::WouldBlock.into()),
                n => n,
            }
        } else {
            // What the client has sent behind its request.
            let n = connection.input.len().min(buffer.len());
            buffer[..n].copy_from_slice(&connection.input[..n]);
            connection.input.drain(..n);
            n
        };
        self.read += n;
        Ok(n)
    }
}

impl Write for Wire<'_> {
    /// Takes everything: what the client does not take is kept, and bounded by the credit of the plugin.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.connection.send(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl WebSocket {
    fn new(plugin: SocketEnd, credit: u64) -> Self {
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_BUFFER)
            .write_buffer_size(0)
            .max_message_size(Some(MAX_BODY))
            .max_frame_size(Some(MAX_BODY));
        Self {
            context: WebSocketContext::new(Role::Server, Some(config)),
            plugin,
            credit: 0_i64.saturating_add_unsigned(credit),
            owed: 0,
            unsent: 0,
            partial: 0,
            counted: 0,
            heard: true,
        }
    }

    /// Whether a close frame was sent or received.
    fn is_closing(&self) -> bool {
        !self.context.can_write()
    }

    /// Sends what waits, returns credit to the plugin, and takes one frame or message from the client.
    fn turn(&mut self, connection: &mut Connection) -> Turn {
        if connection.flush().is_err() {
            return Turn::Lost;
        }
        self.note_unsent(connection.unsent());
        let is_read = self.is_closing() || (self.credit > 0 && self.plugin.has_room());
        if connection.unsent() >= MAX_UNSENT || !is_read {
            return Turn::Wait;
        }
        let mut wire = Wire::new(connection);
        let read = self.context.read(&mut wire);
        self.heard |= wire.read > 0;
        self.partial += wire.read;
        match read {
            Ok(Message::Text(text)) => self.pass_on(true, text.into()),
            Ok(Message::Binary(bytes)) => self.pass_on(false, bytes),
            Ok(Message::Ping(payload) | Message::Pong(payload)) => {
                self.partial = self.partial.saturating_sub(payload.len() + CONTROL_HEAD);
                self.flush(connection)
            }
            Ok(Message::Close(frame)) => {
                let closing = frame.map_or_else(Closing::default, |frame| Closing {
                    code: Some(frame.code.into()),
                    reason: frame.reason.as_str().to_owned(),
                });
                self.plugin.close(closing);
                self.flush(connection)
            }
            // Only what is read is a message.
            Ok(Message::Frame(_)) => Turn::Again,
            Err(Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => Turn::Wait,
            Err(Error::Io(_)) => Turn::Lost,
            Err(Error::ConnectionClosed | Error::AlreadyClosed) => Turn::Over,
            Err(_) if connection.ended => Turn::Lost,
            Err(Error::Utf8(_)) => self.fail(connection, CloseCode::Invalid, "the text is not UTF-8"),
            Err(Error::Capacity(_)) => self.fail(connection, CloseCode::Size, "the message is over the limit of 1 MiB"),
            Err(error) => self.fail(connection, CloseCode::Protocol, &error.to_string()),
        }
    }

    /// Passes a message of the client on to the plugin.
    fn pass_on(&mut self, text: bool, bytes: Bytes) -> Turn {
        // What follows the message in the buffer is small.
        self.partial = 0;
        // Of a socket that closes, what the plugin does not take is dropped, so that the client's close frame is reached.
        if self.credit > 0 {
            self.credit -= cost(bytes.len());
            self.plugin.message(text, bytes);
        }
        Turn::Again
    }

    /// Sends pongs, and the answer to a close frame.
    fn flush(&mut self, connection: &mut Connection) -> Turn {
        match self.context.flush(&mut Wire::new(connection)) {
            Ok(()) => Turn::Again,
            Err(Error::ConnectionClosed | Error::AlreadyClosed) => Turn::Over,
            Err(_) => Turn::Lost,
        }
    }

    /// Closes a socket because of an error of the client, without waiting for its answer.
    fn fail(&mut self, connection: &mut Connection, code: CloseCode, reason: &str) -> Turn {
        self.plugin.close(Closing { code: Some(code.into()), reason: reason.to_owned() });
        match self.send_close(connection, code, reason) {
            Ok(()) => Turn::Over,
            Err(_) => Turn::Lost,
        }
    }

    fn send_close(&mut self, connection: &mut Connection, code: CloseCode, reason: &str) -> Result<(), Error> {
        let reason = Utf8Bytes::from(&reason[..reason.floor_char_boundary(MAX_CLOSE_REASON)]);
        self.context.close(&mut Wire::new(connection), Some(CloseFrame { code, reason }))
    }

    /// Sends a message of the plugin. False if the connection is lost.
    fn send(&mut self, connection: &mut Connection, message: Message) -> bool {
        self.owed += u64::try_from(cost(message.len())).unwrap_or(u64::MAX);
        let sent = self.context.write(&mut Wire::new(connection), message);
        self.note_unsent(connection.unsent());
        // Nothing is sent behind a close frame.
        matches!(sent, Ok(()) | Err(Error::Protocol(_) | Error::ConnectionClosed | Error::AlreadyClosed))
    }

    /// Returns the credit of messages that the client has taken.
    fn note_unsent(&mut self, unsent: usize) {
        self.heard |= unsent < self.unsent;
        self.unsent = unsent;
        let taken = self.owed.saturating_sub(unsent as u64);
        if taken >= RETURNED {
            self.owed -= taken;
            self.plugin.credit(taken);
        }
    }

    /// Counts what the socket holds in memory now instead of what it held before, in a sum for all sockets.
    fn count(&mut self, sum: u64) -> u64 {
        let held = (self.partial + self.unsent) as u64;
        sum - std::mem::replace(&mut self.counted, held) + held
    }
}

impl EventLoop {
    /// Makes a connection a socket of a plugin, after the plugin's response.
    pub(super) fn open_socket(&mut self, key: ConnectionKey, plugin: SocketEnd, credit: u64) {
        let deadline = self.now + self.limits.websocket_ping;
        let Some(connection) = self.connections.get_mut(key) else { return };
        connection.phase = Phase::WebSocket;
        connection.deadline = Some(deadline);
        connection.websocket = Some(Box::new(WebSocket::new(plugin, credit)));
        if self.is_draining {
            self.close_socket(key, CloseCode::Away);
        }
    }

    /// Does one thing for a socket.
    pub(super) fn serve_socket(&mut self, key: ConnectionKey) -> Step {
        let Some(connection) = self.connections.get_mut(key) else { return Step::Wait };
        let Some(mut socket) = connection.websocket.take() else { return Step::Wait };
        let mut turn = socket.turn(connection);
        self.socket_memory = socket.count(self.socket_memory);
        if socket.partial > READ_BUFFER && self.is_socket_memory_used_up() {
            turn = socket.fail(&mut self.connections[key], CloseCode::Again, "there is no room for the message now");
        }
        let connection = &mut self.connections[key];
        connection.websocket = Some(socket);
        match turn {
            Turn::Again => Step::Again,
            Turn::Wait => Step::Wait,
            Turn::Over => {
                self.end_socket(key);
                Step::Again
            }
            Turn::Lost => {
                self.close(key);
                Step::Wait
            }
        }
    }

    /// Passes on to a client what its plugin has for it.
    pub(super) fn take_for_socket(&mut self, key: ConnectionKey, what: ToClient) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        let Some(mut socket) = connection.websocket.take() else { return };
        let mut is_lost = false;
        match what {
            ToClient::Message(message) => {
                is_lost = !socket.send(connection, message);
                self.socket_memory = socket.count(self.socket_memory);
                if socket.unsent > MAX_UNSENT && self.is_socket_memory_used_up() {
                    // It would not read a close frame either.
                    socket.plugin.close(Closing::with(CloseCode::Again.into()));
                    is_lost = true;
                }
            }
            ToClient::Credit(bytes) => socket.credit = socket.credit.saturating_add_unsigned(bytes),
            ToClient::Room => socket.plugin.hear_of_room(),
            ToClient::Close(Closing { code, reason }) => {
                let code = code.map_or(CloseCode::Normal, CloseCode::from);
                is_lost = socket.send_close(connection, code, &reason).is_err();
                connection.deadline = Some(self.now + CLOSE_TIME);
            }
            ToClient::Restart | ToClient::Fail(_) => {
                let code = match what {
                    ToClient::Fail(code) => code.into(),
                    _ if self.is_draining => CloseCode::Away,
                    _ => CloseCode::Restart,
                };
                connection.websocket = Some(socket);
                return self.close_socket(key, code);
            }
        }
        self.connections[key].websocket = Some(socket);
        if is_lost {
            return self.close(key);
        }
        self.look_again_at(key);
        self.drive(key);
    }

    /// Pings a client, or ends its socket if nothing came since the last ping, or no answer to a close frame.
    pub(super) fn socket_is_due(&mut self, key: ConnectionKey) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        let Some(mut socket) = connection.websocket.take() else { return };
        if socket.is_closing() || !std::mem::take(&mut socket.heard) {
            connection.websocket = Some(socket);
            return self.close(key);
        }
        connection.deadline = Some(self.now + self.limits.websocket_ping);
        let pinged = socket.context.write(&mut Wire::new(connection), Message::Ping(Bytes::new()));
        let flushed = pinged.and_then(|()| socket.context.flush(&mut Wire::new(connection)));
        connection.websocket = Some(socket);
        if flushed.is_err() {
            self.close(key);
        }
    }

    /// Closes all sockets, because the host stops.
    pub(super) fn close_sockets(&mut self) {
        let sockets = self.connections.iter().filter(|(_, connection)| connection.phase == Phase::WebSocket);
        let keys: Vec<_> = sockets.map(|(key, _)| key).collect();
        for key in keys {
            self.close_socket(key, CloseCode::Away);
        }
    }

    /// Everything was said on a socket: its connection ends after the output.
    fn end_socket(&mut self, key: ConnectionKey) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        connection.phase = Phase::Closing;
        connection.deadline = Some(self.now + CLOSE_TIME);
        let socket = connection.websocket.take();
        self.forget_socket(socket);
    }

    /// A socket is no more.
    pub(super) fn forget_socket(&mut self, socket: Option<Box<WebSocket>>) {
        if let Some(socket) = socket {
            self.socket_memory -= socket.counted;
            self.tunnels -= 1;
        }
    }

    /// Whether sockets hold more than `--websocket-memory`.
    fn is_socket_memory_used_up(&mut self) -> bool {
        let most = self.limits.websocket_memory;
        let is_used_up = self.socket_memory > most;
        if is_used_up {
            self.log_topics.hit(LogTopic::Sockets, self.now, || {
                "messages of WebSocket take more memory than serve --websocket-memory allows, and a socket was closed".to_owned()
            });
        }
        is_used_up
    }

    /// Has the next sweep look at a connection whose deadline has become an earlier one.
    fn look_again_at(&mut self, key: ConnectionKey) {
        if let Some(deadline) = self.connections.get(key).and_then(|connection| connection.deadline) {
            self.next_sweep = self.next_sweep.min(deadline);
        }
    }

    /// Closes a socket from the host's side, and tells the plugin so at once.
    fn close_socket(&mut self, key: ConnectionKey, code: CloseCode) {
        let deadline = self.now + CLOSE_TIME;
        let Some(connection) = self.connections.get_mut(key) else { return };
        let Some(mut socket) = connection.websocket.take() else { return };
        socket.plugin.close(Closing::with(code.into()));
        let is_lost = socket.send_close(connection, code, "").is_err();
        connection.websocket = Some(socket);
        connection.deadline = Some(deadline);
        if is_lost {
            return self.close(key);
        }
        self.look_again_at(key);
        self.drive(key);
    }
}
