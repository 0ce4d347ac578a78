//! A connection to an application that speaks HTTP/1.1 (RFC 9112): requests are written, responses are read and checked.
//!
//! Whatever the application sends, its answer is one: what follows a complete response closes the connection, and a response that can be
//! read in two ways is refused.

mod body;
pub(in crate::apps) mod head;
mod upload;

use crate::apps::endpoint::Endpoint;
use crate::http::Request;
use crate::http::body::Body;
use crate::http::framing::{ResponseHead, put_chunk_size};
use crate::http::parse::chunked::Decoder;
use crate::http::prefix::Mount;
use crate::http::request::BodyLength;
use crate::util::escape;
use crate::util::send_buffer::{SendBuffer, poll_ready};
use crate::util::threads::timespec;
use head::{Fields, begins_interim, begins_well, could_be_response, is_whole_head, response_lines, write_head};
use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::RecvFlags;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};
use upload::Upload;

/// Interval at which a wait calls `interrupted`. Deadlines are kept to this precision.
const TICK: Duration = Duration::from_millis(100);

/// Time after which a wait calls `interrupted` for the first time: whoever waits longer holds up others.
const SLOW: Duration = Duration::from_millis(10);

/// Largest head of a response in bytes, as in nginx with all its buffers.
pub(crate) const MAX_HEAD: usize = 64 * 1024;

/// Most header lines of a response.
const MAX_HEADERS: usize = 256;

/// Most interim responses (1xx) to one request. An application sends one or two.
const MAX_INTERIM: u32 = 16;

/// Bytes to read at once.
const READ: usize = 16 * 1024;

/// Most bytes of a streaming body that are passed on as one piece.
const PIECE: usize = 64 * 1024;

/// Buffers, in bytes, that an idle connection keeps.
const KEPT: usize = 32 * 1024;

/// Longest excerpt of invalid input in messages, in bytes.
const EXCERPT: usize = 60;

/// A connection to an application.
pub(crate) struct HttpConnection {
    /// None if it is not open.
    stream: Option<OwnedFd>,
    /// Whether the route stays in the path, so that the application's own references are right.
    keeps_route: bool,
    outgoing: SendBuffer,
    /// Bytes received; those before `start` were consumed.
    input: Vec<u8>,
    start: usize,
    /// Data of a streaming body.
    piece: Vec<u8>,
    /// Whether the body of the request under way is chunked.
    sends_chunked: bool,
    /// Requests sent on this connection.
    requests: u64,
    /// Interim responses to the current request.
    interim: u32,
    /// Whether the current request asks for another protocol.
    upgrades: bool,
    framing: Framing,
    /// The application has closed its end.
    ended: bool,
    /// The connection can be used for another request.
    kept: bool,
    /// The rest of the request's body, if it is sent while its answer is received.
    upload: Option<Upload>,
    /// What was wrong with an interim response that was taken before the response was due.
    fault: Option<Fault>,
}

/// How the rest of a response's body arrives.
enum Framing {
    /// It has none, or it was received.
    None,
    /// So many bytes.
    Length(u64),
    Chunked(Decoder),
    /// Until the application closes the connection.
    Close,
}

/// Why a wait ended before its bytes arrived.
#[derive(Debug)]
pub(crate) enum Stopped {
    Deadline,
    Interrupted,
    Lost(io::Error),
}

/// The beginning of a response.
pub(crate) struct Response {
    pub(crate) head: ResponseHead,
    /// Whether it is a stream of server-sent events.
    pub(crate) events: bool,
}

/// What was received where a response was due.
pub(crate) enum Head {
    /// The head of a response.
    Response(Response),
    /// An interim response, as bytes for the client.
    Interim(Vec<u8>),
    /// An interim response that is not for the client.
    Ignored,
    /// The application has switched to another protocol: its response as bytes for the client. [`HttpConnection::take_stream`] gives the
    /// rest.
    Upgraded(Vec<u8>),
}

/// What is wrong with a response, as a sentence about the application.
pub(crate) type Fault = String;

impl HttpConnection {
    /// A connection that is not open.
    pub(crate) fn closed(keeps_route: bool) -> Self {
        Self {
            stream: None,
            keeps_route,
            outgoing: SendBuffer::default(),
            input: Vec::new(),
            start: 0,
            piece: Vec::new(),
            sends_chunked: false,
            requests: 0,
            interim: 0,
            upgrades: false,
            framing: Framing::None,
            ended: false,
            kept: true,
            upload: None,
            fault: None,
        }
    }

    /// Connects to an application. If it has a `uid` of its own, the listener must have it too. Fails at once if nobody listens.
    pub(crate) fn open(endpoint: &Endpoint, uid: Option<u32>, keeps_route: bool) -> io::Result<Self> {
        let stream = endpoint.connect(uid)?;
        rustix::io::ioctl_fionbio(&stream, false)?;
        rustix::net::sockopt::set_socket_timeout(&stream, rustix::net::sockopt::Timeout::Recv, Some(SLOW))?;
        Ok(Self { stream: Some(stream), ..Self::closed(keeps_route) })
    }

    /// Whether it is open.
    pub(crate) fn is_open(&self) -> bool {
        self.stream.is_some()
    }

    /// Closes it.
    pub(crate) fn close(&mut self) {
        *self = Self::closed(self.keeps_route);
    }

    fn stream(&self) -> io::Result<BorrowedFd<'_>> {
        self.stream.as_ref().map(AsFd::as_fd).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// Appends a request to the send buffer, with its body or, if there is `more`, the beginning of it.
    pub(crate) fn queue_request(&mut self, request: &Request, more: bool, body: Vec<u8>) {
        self.requests += 1;
        self.interim = 0;
        if self.requests == 1 && self.has_input() {
            // An answer before the request may be followed by another one, which nothing may take for its own.
            self.kept = false;
        }
        self.upgrades = request.upgrade;
        self.sends_chunked = request.length == BodyLength::Unknown && more;
        let length = match request.length {
            BodyLength::Known(length) => request.declares_body.then_some(length),
            BodyLength::Unknown => (!more).then_some(body.len() as u64),
        };
        let out = self.outgoing.bytes();
        write_head(request, length, self.sends_chunked, self.keeps_route, out);
        if self.sends_chunked {
            put_chunk(out, &body);
        } else {
            self.outgoing.set_tail(body);
        }
    }

    /// Appends a `GET` of the host's own to the send buffer.
    pub(crate) fn queue_get(&mut self, path: &str) {
        self.requests += 1;
        self.interim = 0;
        let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nuser-agent: plugrack\r\nconnection: close\r\n\r\n");
        self.outgoing.bytes().extend_from_slice(request.as_bytes());
    }

    /// Appends a piece of the request's body.
    pub(crate) fn queue_piece(&mut self, piece: &[u8], more: bool) {
        let out = self.outgoing.bytes();
        if self.sends_chunked {
            put_chunk(out, piece);
            if !more {
                out.extend_from_slice(b"0\r\n\r\n");
            }
        } else {
            out.extend_from_slice(piece);
        }
    }

    /// Sends the rest of the request's body while its answer is received, unless the answer is an error, for which it is not needed. False
    /// if it is not sent.
    pub(crate) fn send_aside(&mut self, body: Body) -> bool {
        let queued = self.outgoing.take_unsent();
        let Some(stream) = self.stream.as_ref().filter(|_| begins_well(&self.input[self.start..])) else { return false };
        self.upload = Upload::start(stream, queued, body, self.sends_chunked).ok();
        self.upload.is_some()
    }

    /// The rest of the request's body is not sent, so no other request can follow.
    pub(crate) fn abort_body(&mut self) {
        self.kept = false;
    }

    /// Number of bytes in the send buffer.
    pub(crate) fn unsent(&self) -> usize {
        self.outgoing.unsent()
    }

    /// Whether no byte of the send buffer was sent.
    pub(crate) fn is_unsent(&self) -> bool {
        self.outgoing.is_untouched()
    }

    /// Sends what the application takes now. True if everything was sent.
    pub(crate) fn send_some(&mut self) -> io::Result<bool> {
        if self.unsent() == 0 {
            return Ok(true);
        }
        let stream = self.stream.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        self.outgoing.send_to(stream)
    }

    /// Waits up to `time` until the stream is ready. A hang-up or an error counts as readable, so that the next read reports it.
    pub(crate) fn poll(&self, interest: PollFlags, time: Duration) -> PollFlags {
        self.stream().map_or(PollFlags::IN, |stream| poll_ready(stream, interest, time))
    }

    /// Whether something was received that is not read yet, or the application has closed the connection.
    pub(crate) fn has_input(&self) -> bool {
        self.holds_bytes() || self.ended || self.poll(PollFlags::IN, Duration::ZERO).contains(PollFlags::IN)
    }

    /// Whether bytes were received that are not consumed. Costs no system call.
    pub(crate) fn holds_bytes(&self) -> bool {
        self.start < self.input.len()
    }

    /// The bytes that were received and not consumed, shortened and escaped for messages, and their number.
    pub(crate) fn excerpt(&self) -> (usize, String) {
        let bytes = &self.input[self.start..];
        let mut text = String::new();
        escape::escape(&mut text, &bytes[..bytes.len().min(EXCERPT)]);
        (bytes.len(), text)
    }

    /// Reads what arrived, without a wait. False if nothing did.
    pub(crate) fn read_now(&mut self) -> io::Result<bool> {
        match self.receive(RecvFlags::DONTWAIT) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            received => received.map(|()| true),
        }
    }

    fn receive(&mut self, flags: RecvFlags) -> io::Result<()> {
        if self.start == self.input.len() {
            self.input.clear();
            self.start = 0;
        } else if self.start >= READ {
            self.input.drain(..self.start);
            self.start = 0;
        }
        self.input.reserve(READ);
        let stream = self.stream.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        let (_, received) = rustix::net::recv(stream, spare_capacity(&mut self.input), flags)?;
        self.ended = received == 0;
        Ok(())
    }

    /// Sends, and waits until `ready` gives a value from what was received, or the application has closed the connection.
    fn wait<T>(
        &mut self,
        deadline: Instant,
        interrupted: impl Fn() -> bool,
        mut ready: impl FnMut(&mut Self) -> Option<T>,
    ) -> Result<Option<T>, Stopped> {
        // An application that sends byte by byte must not keep the caller from looking up.
        let mut look_up = Instant::now() + TICK;
        let mut is_slow = false;
        loop {
            if let Some(value) = ready(self) {
                return Ok(Some(value));
            }
            if self.ended {
                return Ok(None);
            }
            let received = match self.send_some() {
                Ok(true) if is_slow => {
                    self.poll(PollFlags::IN, TICK);
                    self.receive(RecvFlags::DONTWAIT)
                }
                // A blocking read, of a short time.
                Ok(true) => self.receive(RecvFlags::empty()),
                Ok(false) if self.poll(PollFlags::IN | PollFlags::OUT, TICK).contains(PollFlags::IN) => {
                    self.receive(RecvFlags::DONTWAIT)
                }
                Ok(false) => Err(io::ErrorKind::WouldBlock.into()),
                // The application may have answered before it stopped reading.
                Err(error) => {
                    self.kept = false;
                    match self.receive(RecvFlags::DONTWAIT) {
                        Ok(()) if !self.ended => {
                            self.outgoing.clear();
                            Ok(())
                        }
                        _ => Err(error),
                    }
                }
            };
            let now = Instant::now();
            is_slow = received.is_err();
            match received {
                Ok(()) if now < look_up => {}
                Err(error) if !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                    return Err(Stopped::Lost(error));
                }
                _ if interrupted() => return Err(Stopped::Interrupted),
                _ if now >= deadline => return Err(Stopped::Deadline),
                _ => look_up = now + TICK,
            }
        }
    }

    /// Waits until [`HttpConnection::has_head`], or the application has closed the connection.
    pub(crate) fn wait_head(&mut self, deadline: Instant, interrupted: impl Fn() -> bool) -> Result<(), Stopped> {
        self.wait(deadline, interrupted, |this| this.has_head().then_some(())).map(drop)
    }

    /// Whether the head of a response was received, or something that is none.
    pub(crate) fn has_head(&self) -> bool {
        let input = &self.input[self.start..];
        self.fault.is_some() || input.len() > MAX_HEAD || is_whole_head(input) || !could_be_response(input)
    }

    /// Takes an interim response (1xx) that came before the response was due: its bytes for the client, empty if it is not for the client.
    /// None if something else came.
    pub(crate) fn take_interim(&mut self) -> Option<Vec<u8>> {
        if self.fault.is_some() || !self.has_head() || !begins_interim(&self.input[self.start..]) {
            return None;
        }
        match self.take_head(None, false) {
            Ok(Head::Interim(head)) => Some(head),
            Ok(Head::Ignored) => Some(Vec::new()),
            Ok(Head::Response(_) | Head::Upgraded(_)) => None,
            Err(fault) => {
                self.fault = Some(fault);
                None
            }
        }
    }

    /// Whether a request may be sent once more if this connection was lost: it had served others, and nothing of an answer came.
    pub(crate) fn was_kept(&self) -> bool {
        self.requests > 1 && !self.holds_bytes()
    }

    /// Whether the application has closed the connection.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended
    }

    /// Takes the head that [`HttpConnection::wait_head`] has received. `mount` maps its references, `head_request` says that it has no
    /// body.
    ///
    /// # Errors
    /// What is wrong with it. The connection is not usable then.
    pub(crate) fn take_head(&mut self, mount: Option<Mount<'_>>, head_request: bool) -> Result<Head, Fault> {
        if let Some(fault) = self.fault.take() {
            return Err(fault);
        }
        let input = &self.input[self.start..];
        if !could_be_response(input) {
            let (_, excerpt) = self.excerpt();
            return Err(format!("its response is not valid HTTP, and begins with \"{excerpt}\""));
        }
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut parsed = httparse::Response::new(&mut headers);
        let used = match parsed.parse(&input[..input.len().min(MAX_HEAD)]) {
            Ok(httparse::Status::Complete(used)) => used,
            Ok(httparse::Status::Partial) if input.len() >= MAX_HEAD => {
                return Err(format!("the head of its response has more than {MAX_HEAD} bytes"));
            }
            Ok(httparse::Status::Partial) => {
                return Err(format!("it closed the connection after {} bytes of the head of its response", input.len()));
            }
            Err(httparse::Error::TooManyHeaders) => {
                return Err(format!("its response has more than {MAX_HEADERS} header lines"));
            }
            Err(error) => {
                let (_, excerpt) = self.excerpt();
                return Err(format!("its response is not valid HTTP ({error}), and begins with \"{excerpt}\""));
            }
        };
        let (status, version) = (parsed.code.unwrap_or_default(), parsed.version.unwrap_or_default());
        let fields = Fields::read(parsed.headers)?;
        let is_interim = (100..200).contains(&status);
        let lines = response_lines(status, parsed.reason, parsed.headers, mount, !is_interim);
        let events = fields.is_events;
        self.start += used;
        if is_interim {
            self.interim += 1;
            return match status {
                101 if self.upgrades => match fields.upgrade {
                    Some(protocol) => {
                        let protocol = String::from_utf8_lossy(&protocol);
                        let end = format!("connection: upgrade\r\nupgrade: {protocol}\r\n\r\n");
                        Ok(Head::Upgraded([&lines[..], end.as_bytes()].concat()))
                    }
                    None => Err("it switched to another protocol without naming it in upgrade".into()),
                },
                101 => Err("it switched to another protocol, which the request did not ask for".into()),
                _ if self.interim > MAX_INTERIM => Err(format!("it sent more than {MAX_INTERIM} interim responses")),
                100 => Ok(Head::Ignored),
                _ => Ok(Head::Interim([&lines[..], b"\r\n"].concat())),
            };
        }
        if !(200..=599).contains(&status) {
            return Err(format!("the status of its response is {status}, and must be 100-599"));
        }
        let is_bodiless = head_request || matches!(status, 204 | 304);
        self.framing = match (fields.is_chunked, fields.length) {
            (true, Some(_)) => return Err("its response has both content-length and transfer-encoding".into()),
            _ if is_bodiless => Framing::None,
            (true, None) => Framing::Chunked(Decoder::new()),
            (false, Some(length)) => Framing::Length(length),
            (false, None) => Framing::Close,
        };
        let keeps_alive = if version == 0 { fields.keep_alive } else { !fields.close };
        // HTTP/1.0 has no chunks, so something on the way may have read them as another response (RFC 9112, section 6.1).
        let is_clear = version > 0 || !fields.is_chunked;
        self.kept &= keeps_alive && is_clear && !matches!(self.framing, Framing::Close);
        let length = if status == 204 { None } else { fields.length };
        Ok(Head::Response(Response { head: ResponseHead { status, lines, length }, events }))
    }

    /// Whether another request can follow a complete response.
    pub(crate) fn is_kept(&self) -> bool {
        self.kept && !self.ended && self.unsent() == 0 && self.upload.as_ref().is_none_or(Upload::is_done)
    }

    /// Gives up the socket after a switch to another protocol, with what was received behind the response.
    pub(crate) fn take_stream(&mut self) -> Option<(OwnedFd, Vec<u8>)> {
        let early = self.input.split_off(self.start);
        Some((self.stream.take()?, early))
    }

    /// Frees memory that an idle connection does not need.
    pub(crate) fn release(&mut self) {
        if !self.holds_bytes() {
            self.input.clear();
            self.start = 0;
            self.input.shrink_to(KEPT);
        }
        self.outgoing.shrink_to(KEPT);
        self.piece = Vec::new();
    }
}

/// Waits up to `time` until something has arrived on any of these connections, and says of each whether it has. One that is lost counts as
/// such.
pub(crate) fn poll_all(connections: &[&HttpConnection], time: Duration) -> Vec<bool> {
    let streams: io::Result<Vec<BorrowedFd<'_>>> = connections.iter().map(|connection| connection.stream()).collect();
    // What is not open has nothing to wait for.
    let Ok(streams) = streams else { return vec![true; connections.len()] };
    let mut fds: Vec<_> = streams.iter().map(|stream| PollFd::new(stream, PollFlags::IN)).collect();
    let polled = poll(&mut fds, Some(&timespec(time))).is_ok();
    fds.iter().map(|fd| polled && !fd.revents().is_empty()).collect()
}

/// Appends a chunk of a request's body; nothing if it is empty, since that would end the body.
fn put_chunk(out: &mut Vec<u8>, bytes: &[u8]) {
    if !bytes.is_empty() {
        put_chunk_size(out, bytes.len());
        out.extend_from_slice(bytes);
        out.extend_from_slice(b"\r\n");
    }
}
