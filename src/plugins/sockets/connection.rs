//! The connection for the sockets of a process. One thread reads frames from it, and another sends what is in the queue.

use crate::http::framing::ResponseHead;
use crate::http::prefix::Mount;
use crate::http::response_channel::OtherProtocol;
use crate::http::websocket::{Closing, GONE, SocketEnd, SocketQueue, SocketReturn, ToClient, ToPlugin, cost, offered_protocols};
use crate::http::{HttpError, Request, errors};
use crate::lock::LockExt;
use crate::plugins::connection::frames::answered_with;
use crate::plugins::plugin::{Plugin, STARTING_RETRY_AFTER};
use crate::plugins::process_state::{ProcessState, UnacceptedConnection};
use crate::protocol::frame::{Frame, FrameReader, ReadError, encode, encode_head};
use crate::protocol::message::{
    MAX_REFUSAL, Message, Response, SOCKET_CREDIT, Shutdown, SocketAccept, SocketClose, SocketCredit, SocketMessage,
};
use crate::util::threads::small_thread;
use crossbeam_channel::{Receiver, Sender, after, bounded, never, select};
use std::collections::HashMap;
use std::io::{self, Write};
use std::net::Shutdown as Direction;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tungstenite::Message::{Binary, Text};
use tungstenite::{Bytes, Utf8Bytes};

/// Interval at which it is checked whether clients that wait for the plugin's answer have gone, or have waited too long.
const TICK: Duration = Duration::from_millis(100);

/// Time in which a plugin takes nothing, after which its connection is given up.
const WRITE_TIME: Duration = Duration::from_secs(60);

/// Time for clients to be told that their sockets close, before the connection ends with `shutdown`.
const CLOSE_TIME: Duration = Duration::from_secs(1);

/// Bytes of frames that are sent in one write.
const BATCH: usize = 64 * 1024;

/// The code of a socket whose plugin breaks the protocol or ends (RFC 6455, section 7.4.1: internal error).
const FAULT: u16 = 1011;

/// A client that asks for a socket.
pub(super) struct Opening {
    pub(super) request: Request,
    /// What it gets as `sec-websocket-accept`.
    pub(super) accept_key: String,
    /// When the plugin must have answered.
    pub(super) deadline: Instant,
}

/// A socket that the plugin has accepted.
struct Open {
    back: SocketReturn,
    /// What the plugin may still send.
    credit: i64,
    /// Whether the plugin has broken the protocol, so that the socket is being closed.
    has_failed: bool,
}

/// The sockets by their ids.
#[derive(Default)]
struct Table {
    /// Those that the plugin has not answered yet.
    openings: HashMap<u64, Box<Opening>>,
    open: HashMap<u64, Open>,
    last_id: u64,
    /// Whether no more are taken.
    ended: bool,
}

/// The connection.
pub(super) struct SocketConnection {
    plugin: Arc<Plugin>,
    process: Arc<ProcessState>,
    stream: UnixStream,
    queue: Arc<SocketQueue>,
    table: Mutex<Table>,
}

impl SocketConnection {
    /// Opens the connection, and starts its threads.
    pub(super) fn start(plugin: &Arc<Plugin>, process: &Arc<ProcessState>) -> io::Result<Arc<Self>> {
        let unaccepted = UnacceptedConnection::new(process);
        let stream = process.connect()?;
        stream.set_write_timeout(Some(WRITE_TIME))?;
        let (queue, queued) = SocketQueue::new();
        let (plugin, process) = (Arc::clone(plugin), Arc::clone(process));
        let connection = Arc::new(Self { plugin, process, stream, queue, table: Mutex::default() });
        let (alive, ended) = bounded(0);
        let name = |what: &str| format!("{what} {}", connection.plugin.id());
        let reader = Arc::clone(&connection);
        small_thread(name("ws-in")).spawn(move || reader.read(unaccepted, alive))?;
        let writer = Arc::clone(&connection);
        let started = small_thread(name("ws-out")).spawn(move || writer.write(&queued, &ended));
        if let Err(error) = started {
            connection.break_off();
            return Err(error);
        }
        Ok(connection)
    }

    /// Asks the plugin whether it takes a socket. Gives the client back if the connection has ended.
    pub(super) fn open(&self, opening: Box<Opening>) -> Result<(), Box<Opening>> {
        let mut table = self.table.locked();
        if table.ended {
            return Err(opening);
        }
        let id = table.last_id + 1;
        let mut frame = Vec::new();
        let encoded = encode_head(&mut frame, 0, |out| {
            opening.request.encode_open(id, SOCKET_CREDIT, out);
            Ok(())
        });
        if encoded.is_err() {
            opening.request.fail(errors::HEAD_TOO_LARGE);
            return Ok(());
        }
        table.last_id = id;
        table.openings.insert(id, opening);
        self.queue.put(id, ToPlugin::Open(frame));
        Ok(())
    }

    // --- From the plugin ------------------------------------------------------------------------------------

    /// Reads frames until the connection ends, and then ends what is left of it.
    fn read(&self, unaccepted: UnacceptedConnection, _alive: Sender<()>) {
        let mut unaccepted = Some(unaccepted);
        let mut frames = FrameReader::new(&self.stream);
        let why = loop {
            match frames.read() {
                Ok(frame) => {
                    unaccepted = None;
                    if let Err(fault) = self.take(frame) {
                        break format!("protocol error: {fault}");
                    }
                }
                Err(ReadError::Io(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break error.to_string(),
            }
        };
        drop(unaccepted);
        self.end(&why);
    }

    /// Handles a frame.
    ///
    /// # Errors
    /// What is wrong with it, so that the connection ends.
    fn take(&self, frame: Frame<'_>) -> Result<(), String> {
        let message = frame.message().map_err(|malformed| malformed.to_string())?;
        let id = message.id();
        let mut table = self.table.locked();
        if id == 0 || id > table.last_id {
            return Err(format!("{} came, but the host has opened no such socket", message.named()));
        }
        if let Some(opening) = table.openings.remove(&id) {
            match message {
                Message::SocketAccept(accept) => table.open.extend(self.accept(&accept, *opening).map(|open| (id, open))),
                Message::Response(response) => self.refuse(&response, frame.body, *opening),
                Message::Error(failure) => self.fail(*opening, &answered_with(&failure)),
                other => {
                    let fault = format!("{} came where the answer to ws_open was due", other.named());
                    self.fail(*opening, &format!("protocol error: {fault}"));
                    return Err(fault);
                }
            }
        } else if let Some(open) = table.open.get_mut(&id).filter(|open| !open.has_failed) {
            match message {
                Message::SocketMessage(message) => self.message(message, frame.body, open),
                Message::SocketCredit(more) => open.back.put(ToClient::Credit(more.bytes)),
                Message::SocketClose(close) => self.close(&close, open),
                other => return Err(format!("{} is out of place", other.named())),
            }
        }
        // Otherwise the plugin does not know yet that the socket ends.
        Ok(())
    }

    /// The plugin takes a socket: the client gets its response, and the event loop the socket.
    fn accept(&self, accept: &SocketAccept<'_>, opening: Opening) -> Option<Open> {
        ProcessState::set_flag(&self.process.served);
        match response_head(accept, &opening, self.process.rewrites) {
            Ok(head) => {
                let mut request = opening.request;
                let back = request.responder.socket_return();
                let end = SocketEnd::new(accept.id, Arc::clone(&self.queue), back.clone());
                let credit = accept.credit.unwrap_or(SOCKET_CREDIT);
                request.responder.upgrade(head, OtherProtocol::WebSocket { end, credit });
                Some(Open { back, credit: 0_i64.saturating_add_unsigned(SOCKET_CREDIT), has_failed: false })
            }
            Err(fault) => {
                self.fail(opening, &format!("protocol error: {fault}"));
                self.queue.put(accept.id, ToPlugin::Close(Closing::with(FAULT)));
                None
            }
        }
    }

    /// The plugin refuses a socket with a response.
    fn refuse(&self, response: &Response<'_>, body: &[u8], opening: Opening) {
        let size = body.len();
        ProcessState::set_flag(&self.process.served);
        let fault = match response.check(size, false) {
            Err(bad) => Some(bad.to_string()),
            Ok(_) if response.more => {
                Some("the body of a response that refuses a socket comes with it, and does not go on".into())
            }
            Ok(_) if response.status < 300 => {
                Some(format!("a response that refuses a socket has a status of 300-599, got {}", response.status))
            }
            Ok(_) if size > MAX_REFUSAL => {
                Some(format!("the body of a response that refuses a socket has at most {MAX_REFUSAL} bytes, got {size}"))
            }
            Ok(_) => None,
        };
        if let Some(fault) = fault {
            return self.fail(opening, &format!("protocol error: {fault}"));
        }
        let mut request = opening.request;
        let head = ResponseHead::of(response, self.process.rewrites.then(|| Mount::of(&request)));
        // The client may have gone.
        request.responder.answer(head, body, 0, false).ok();
    }

    /// The plugin sends a message to a client.
    fn message(&self, message: SocketMessage, body: &[u8], open: &mut Open) {
        if open.credit <= 0 {
            return self.fail_socket(message.id, "a message came without credit", open);
        }
        let bytes = Bytes::copy_from_slice(body);
        let whole = if message.text { Utf8Bytes::try_from(bytes).map(Text) } else { Ok(Binary(bytes)) };
        match whole {
            Ok(whole) => {
                open.credit -= cost(body.len());
                open.back.put(ToClient::Message(whole));
            }
            Err(_) => self.fail_socket(message.id, "a text message is not UTF-8", open),
        }
    }

    /// The plugin closes a socket.
    fn close(&self, close: &SocketClose<'_>, open: &mut Open) {
        if close.has_code_to_send() {
            let code = close.code.unwrap_or(NORMAL);
            open.back.put(ToClient::Close(Closing { code: Some(code), reason: close.reason.to_string() }));
        } else {
            let code = close.code.unwrap_or_default();
            self.fail_socket(close.id, &format!("ws_close.code {code} is not one that a plugin may send"), open);
        }
    }

    /// Has a socket closed because the plugin breaks the protocol on it. The event loop then ends it here as well.
    fn fail_socket(&self, id: u64, fault: &str, open: &mut Open) {
        open.has_failed = true;
        self.plugin.note_failed(&format!("protocol error: {fault} (the socket with id {id})"));
        open.back.put(ToClient::Fail(FAULT));
    }

    /// Fails a client that asks for a socket, because of a fault of the plugin's.
    fn fail(&self, opening: Opening, why: &str) {
        self.plugin.note_failed(&format!("{}: {why}", opening.request.name()));
        opening.request.fail(errors::BAD_GATEWAY);
    }

    /// The connection has ended.
    fn end(&self, why: &str) {
        self.break_off();
        let (is_expected, openings, open) = {
            let mut table = self.table.locked();
            // After `close_all` no more were taken.
            let is_expected = std::mem::replace(&mut table.ended, true);
            (is_expected, std::mem::take(&mut table.openings), std::mem::take(&mut table.open))
        };
        if !is_expected {
            self.plugin.log.note(&format!("the connection for WebSocket has ended, and {} sockets with it: {why}", open.len()));
        }
        for opening in openings.into_values() {
            self.fail(*opening, &format!("the connection for WebSocket has ended: {why}"));
        }
        for open in open.values() {
            open.back.put(if is_expected { ToClient::Restart } else { ToClient::Fail(FAULT) });
        }
    }

    /// Ends both directions, which ends both threads.
    fn break_off(&self) {
        // It may have ended already.
        self.stream.shutdown(Direction::Both).ok();
    }

    // --- To the plugin --------------------------------------------------------------------------------------

    /// Sends what is put into the queue, until the connection ends or the process is to stop.
    fn write(&self, queue: &Receiver<(u64, ToPlugin)>, ended: &Receiver<()>) {
        let mut batch = Batch::default();
        // When the connection ends at the latest, once the process is to stop.
        let mut stops_at: Option<Instant> = None;
        loop {
            let tick = if self.expire() || stops_at.is_some() { after(TICK) } else { never() };
            let stop = if stops_at.is_some() { &never() } else { &self.process.stop };
            select! {
                recv(queue) -> order => match order {
                    Ok((id, order)) => self.encode(id, order, &mut batch),
                    Err(_) => return,
                },
                recv(stop) -> _ => {
                    if self.process.ended.load(Ordering::Acquire) {
                        // It has ended by itself, which the reader is about to see.
                        return self.break_off();
                    }
                    stops_at = Some(Instant::now() + CLOSE_TIME);
                    self.close_all();
                },
                recv(ended) -> _ => return,
                recv(tick) -> _ => {},
            }
            while batch.out.len() < BATCH
                && let Ok((id, order)) = queue.try_recv()
            {
                self.encode(id, order, &mut batch);
            }
            let is_over = |at: Instant| self.table.locked().open.is_empty() || Instant::now() >= at;
            let is_last = stops_at.is_some_and(is_over);
            if is_last {
                // The plugin then ends the connection.
                encode(&mut batch.out, &Shutdown { id: 0 }, &[]).ok();
            }
            if !self.send(&mut batch) || is_last {
                return;
            }
        }
    }

    /// Appends a frame to those that are sent together.
    fn encode(&self, id: u64, order: ToPlugin, batch: &mut Batch) {
        batch.size += order.size();
        let encoded = match order {
            ToPlugin::Open(frame) => {
                batch.out.extend_from_slice(&frame);
                Ok(())
            }
            ToPlugin::Message { text, bytes } => encode(&mut batch.out, &SocketMessage { id, text }, &bytes),
            ToPlugin::Credit(bytes) => {
                if let Some(open) = self.table.locked().open.get_mut(&id) {
                    open.credit = open.credit.saturating_add_unsigned(bytes);
                }
                encode(&mut batch.out, &SocketCredit { id, bytes }, &[])
            }
            ToPlugin::Close(Closing { code, reason }) => {
                self.table.locked().open.remove(&id);
                encode(&mut batch.out, &SocketClose { id, code, reason: reason.into() }, &[])
            }
        };
        // Messages of clients are within the limit of a frame, and everything else is small.
        encoded.ok();
    }

    /// Sends the frames. False if the connection has ended.
    fn send(&self, batch: &mut Batch) -> bool {
        let sent = (&self.stream).write_all(&batch.out);
        batch.out.clear();
        batch.out.shrink_to(BATCH);
        self.queue.sent(std::mem::take(&mut batch.size));
        if sent.is_err() {
            self.break_off();
        }
        sent.is_ok()
    }

    /// Fails the clients whose time is over, and drops those that have gone. True if others wait for the plugin's answer.
    fn expire(&self) -> bool {
        let now = Instant::now();
        let is_over = |opening: &Opening| now >= opening.deadline || opening.request.responder.is_cancelled();
        let (over, others) = {
            let mut table = self.table.locked();
            let over: Vec<_> = table.openings.extract_if(|_, opening| is_over(opening)).collect();
            (over, !table.openings.is_empty())
        };
        for (id, opening) in over {
            if !opening.request.responder.is_cancelled() {
                let time = self.process.request_timeout.as_secs_f32();
                self.plugin.note_failed(&format!("{}: {time} s passed before it answered ws_open", opening.request.name()));
            }
            self.give_up(id, *opening, errors::TIMEOUT);
        }
        others
    }

    /// The process is to stop: each socket closes.
    fn close_all(&self) {
        let openings = {
            let mut table = self.table.locked();
            table.ended = true;
            table.open.values().for_each(|open| open.back.put(ToClient::Restart));
            std::mem::take(&mut table.openings)
        };
        for (id, opening) in openings {
            self.give_up(id, *opening, errors::UNAVAILABLE.retry_after(STARTING_RETRY_AFTER));
        }
    }

    /// Refuses a client that the plugin has not answered, and tells the plugin.
    fn give_up(&self, id: u64, opening: Opening, error: HttpError) {
        self.queue.put(id, ToPlugin::Close(Closing::with(GONE)));
        opening.request.fail(error);
    }
}

/// Frames that are sent in one write.
#[derive(Default)]
struct Batch {
    out: Vec<u8>,
    /// What they count for the limit of the queue.
    size: usize,
}

/// The code of an end without a particular reason (RFC 6455, section 7.4.1).
const NORMAL: u16 = 1000;

/// The response that tells a client that it has its socket.
///
/// # Errors
/// What is wrong with the plugin's answer.
fn response_head(accept: &SocketAccept<'_>, opening: &Opening, rewrites: bool) -> Result<Vec<u8>, String> {
    let headers = accept.headers.iter().filter(|(name, _)| {
        let name = name.to_ascii_lowercase();
        name != "content-length" && !name.starts_with("sec-websocket-")
    });
    // No plugin may answer 101 by itself, so the rules for headers are those of another response without a body.
    let mut response = Response { id: accept.id, status: 204, headers: headers.cloned().collect(), more: false };
    response.check(0, false).map_err(|bad| bad.to_string())?;
    response.status = 101;
    let lines = ResponseHead::of(&response, rewrites.then(|| Mount::of(&opening.request))).lines;
    let protocol = match &accept.protocol {
        Some(chosen) if offered_protocols(&opening.request).any(|offered| *offered == **chosen) => {
            format!("sec-websocket-protocol: {}\r\n", &**chosen)
        }
        Some(chosen) => return Err(format!("ws_accept.protocol {:?} is not one that the client offers", &**chosen)),
        None => String::new(),
    };
    let accept_key = &opening.accept_key;
    let end = format!("connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: {accept_key}\r\n{protocol}\r\n");
    Ok([&lines[..], end.as_bytes()].concat())
}
