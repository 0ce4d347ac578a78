//! The store over HTTP/1.1: a connection of a caller, from its first request to its end.

use super::http_operation::{self, Form, Operation, Refused, Response};
use super::{Closed, MAX_REPLIES, Pending, send, wait_for};
use crate::http::errors;
use crate::http::framing::{Terms, frame, host_head};
use crate::http::parse::chunked::{Broken, Decoder};
use crate::http::parse::request_head::{self, Framing, HeadLimits};
use crate::plugins::connection::RELEASE_AFTER;
use crate::protocol::message::MAX_BODY;
use crate::store::Store;
use rustix::event::PollFlags;
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Largest head in bytes, as it is for clients by default. The longest key takes 1536 bytes of it when all of it is encoded.
const MAX_HEAD: usize = 16 * 1024;

/// Most headers, as it is for clients by default.
const MAX_HEADERS: usize = 64;

/// Time for a head to arrive whole, from its first byte on.
const HEAD_TIME: Duration = Duration::from_secs(10);

/// Time for a body to arrive whole, from the end of its head on. A caller on the same machine sends the longest one in milliseconds.
const BODY_TIME: Duration = Duration::from_secs(30);

/// Time in which the rest of a refused request is discarded, so that its sender reads the response instead of a failed write.
const DISCARD_TIME: Duration = Duration::from_secs(2);

/// Bytes received at once.
const READ_SIZE: usize = 16 * 1024;

/// Asks a client for the body that it holds back.
const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// Serves one connection until it closes. Requests that were sent ahead are under way together, and are answered in order.
pub(super) fn serve(stream: &UnixStream, store: &Store, plugin: &str) -> Result<(), Closed> {
    let mut requests = Reader::new(stream);
    let mut pending = Pending::new(store, plugin);
    let mut replies = Replies { stream, bytes: Vec::new() };
    loop {
        match requests.next() {
            Ok(Next::Request(Request { operation, terms, body })) => {
                match operation.and_then(|operation| http_operation::check_body(&operation.op, &body).map(|()| operation)) {
                    Ok(Operation { op, form }) => pending.begin((form, terms), op, &body),
                    Err(refused) => {
                        replies.put_answers(&mut pending);
                        replies.put(refused.into(), terms);
                    }
                }
                if terms.last {
                    return replies.send(&mut pending);
                }
                if pending.is_much() || replies.bytes.len() >= MAX_REPLIES {
                    replies.send(&mut pending)?;
                }
            }
            Ok(Next::Expected) => {
                replies.put_answers(&mut pending);
                replies.bytes.extend_from_slice(CONTINUE);
                replies.send(&mut pending)?;
            }
            Ok(Next::Incomplete) => {
                replies.send(&mut pending)?;
                match requests.receive() {
                    Ok(true) => {}
                    Ok(false) => return Ok(()),
                    Err(Fault::Broken(error)) => return Err(error.into()),
                    Err(Fault::Refused(refused)) => return replies.end(&mut pending, refused),
                }
            }
            Err(refused) => return replies.end(&mut pending, refused),
        }
    }
}

/// Responses that are ready to be sent.
struct Replies<'a> {
    stream: &'a UnixStream,
    bytes: Vec<u8>,
}

/// The operations of a connection, each with what its response depends on.
type Operations<'a> = Pending<'a, (Form, Terms)>;

impl Replies<'_> {
    fn put(&mut self, response: Response, terms: Terms) {
        let Response { status, headers, body } = response;
        let mut head = host_head(status, headers.iter().map(|(name, value)| (*name, value.as_ref())));
        let framed = frame(&mut head, status, Some(body.len() as u64), terms);
        self.bytes.append(&mut head);
        if !framed.bodiless {
            self.bytes.extend_from_slice(&body);
        }
    }

    /// Waits for the operations under way and appends their responses.
    fn put_answers(&mut self, pending: &mut Operations<'_>) {
        for ((form, terms), answer) in pending.answers() {
            self.put(form.response(answer), terms);
        }
    }

    /// Sends all that is under way.
    fn send(&mut self, pending: &mut Operations<'_>) -> Result<(), Closed> {
        self.put_answers(pending);
        send(self.stream, &self.bytes)?;
        self.bytes.clear();
        self.bytes.shrink_to(READ_SIZE);
        Ok(())
    }

    /// Refuses what cannot be read any further, after the answers to all before it.
    fn end(&mut self, pending: &mut Operations<'_>, refused: Refused) -> Result<(), Closed> {
        let message = refused.message.clone();
        self.put_answers(pending);
        self.put(refused.into(), Terms { head: false, old: false, last: true });
        self.send(pending)?;
        // A peer that has gone has nothing left to read.
        discard(self.stream, Instant::now() + DISCARD_TIME).ok();
        Err(Closed::Http(message))
    }
}

/// Ends the sending side, and discards what arrives until the peer has ended its own.
pub(super) fn discard(mut stream: &UnixStream, deadline: Instant) -> io::Result<()> {
    stream.shutdown(Shutdown::Write)?;
    let mut discarded = [0; READ_SIZE];
    while wait_for(stream, PollFlags::IN, Some(deadline))? && stream.read(&mut discarded)? > 0 {}
    Ok(())
}

/// A request that has arrived whole.
struct Request {
    operation: Result<Operation, Refused>,
    terms: Terms,
    body: Vec<u8>,
}

/// What has been received.
enum Next {
    Request(Request),
    /// The body of the next request is held back until the host asks for it.
    Expected,
    /// The next request is not whole.
    Incomplete,
}

/// Why nothing more can be received.
enum Fault {
    Refused(Refused),
    Broken(io::Error),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Broken(error)
    }
}

/// A request whose head is read.
struct Incoming {
    request: Request,
    rest: Rest,
}

/// What is to come of a body.
enum Rest {
    Bytes(usize),
    Chunks(Decoder),
}

/// Reads requests from a connection.
struct Reader<'a> {
    stream: &'a UnixStream,
    /// Received bytes; those before `start` are read.
    buffer: Vec<u8>,
    start: usize,
    /// How far the head was searched for its end.
    searched: usize,
    incoming: Option<Incoming>,
    /// When the head or the body must be whole. None between two requests.
    deadline: Option<Instant>,
}

impl<'a> Reader<'a> {
    fn new(stream: &'a UnixStream) -> Self {
        Self { stream, buffer: Vec::new(), start: 0, searched: 0, incoming: None, deadline: None }
    }

    /// The next request, as far as it has been received. After an error nothing more can be read.
    fn next(&mut self) -> Result<Next, Refused> {
        if self.incoming.is_none()
            && let Some(next) = self.begin()?
        {
            return Ok(next);
        }
        self.body()
    }

    /// Reads the head of the next request. Gives what keeps its body from being read, if anything.
    fn begin(&mut self) -> Result<Option<Next>, Refused> {
        let received = &self.buffer[self.start..];
        match received.first() {
            None => return Ok(Some(Next::Incomplete)),
            Some(0) => {
                let message = "the connection began with HTTP: frames need a connection of their own";
                return Err(Refused::new(400, "bad_request", message));
            }
            Some(_) => {}
        }
        let limits = HeadLimits { bytes: MAX_HEAD, headers: MAX_HEADERS };
        let mut canonical = Vec::new();
        let read = request_head::read(received, limits, None, &mut self.searched, &mut canonical)?;
        let Some((head, length)) = read else { return Ok(Some(Next::Incomplete)) };
        (self.start, self.searched) = (self.start + length, 0);
        let rest = match head.framing {
            Framing::None => Rest::Bytes(0),
            Framing::Length(length) => {
                Rest::Bytes(usize::try_from(length).ok().filter(|length| *length <= MAX_BODY).ok_or_else(too_large)?)
            }
            Framing::Chunked => Rest::Chunks(Decoder::new()),
        };
        let operation = http_operation::read(&canonical);
        let waits = head.expects_continue && self.start == self.buffer.len();
        // The body of a refused request is not asked for, so it is unknown whether it follows.
        let operation = if waits { Ok(operation?) } else { operation };
        let terms = Terms { head: head.head, old: head.old, last: !head.keep_alive };
        self.incoming = Some(Incoming { request: Request { operation, terms, body: Vec::new() }, rest });
        self.deadline = Some(Instant::now() + BODY_TIME);
        Ok(waits.then_some(Next::Expected))
    }

    fn body(&mut self) -> Result<Next, Refused> {
        let Some(Incoming { request, rest }) = &mut self.incoming else { return Ok(Next::Incomplete) };
        let ended = match rest {
            Rest::Bytes(left) => {
                let received = &self.buffer[self.start..];
                let received = &received[..received.len().min(*left)];
                request.body.extend_from_slice(received);
                self.start += received.len();
                *left -= received.len();
                *left == 0
            }
            Rest::Chunks(decoder) => loop {
                let step = decoder.step(&self.buffer[self.start..]).map_err(|broken| match broken {
                    Broken::Malformed => errors::BAD_BODY.into(),
                    Broken::TooLarge => Refused::new(413, "too_large", "the extensions or trailers of the chunks are too large"),
                })?;
                if request.body.len() + step.data.len() > MAX_BODY || decoder.announced() > MAX_BODY as u64 {
                    return Err(too_large());
                }
                request.body.extend_from_slice(step.data);
                self.start += step.used;
                if step.ended || step.used == 0 {
                    break step.ended;
                }
            },
        };
        if !ended {
            return Ok(Next::Incomplete);
        }
        self.deadline = None;
        Ok(self.incoming.take().map_or(Next::Incomplete, |incoming| Next::Request(incoming.request)))
    }

    /// Receives more. False when the stream has ended between two requests.
    fn receive(&mut self) -> Result<bool, Fault> {
        self.buffer.drain(..self.start);
        self.start = 0;
        let is_begun = self.incoming.is_some() || !self.buffer.is_empty();
        if is_begun {
            let deadline = *self.deadline.get_or_insert_with(|| Instant::now() + HEAD_TIME);
            if !wait_for(self.stream, PollFlags::IN, Some(deadline))? {
                let slow = if self.incoming.is_some() { errors::SLOW_BODY } else { errors::SLOW_HEAD };
                return Err(Fault::Refused(slow.into()));
            }
        } else if !wait_for(self.stream, PollFlags::IN, Some(Instant::now() + RELEASE_AFTER))? {
            self.buffer = Vec::new();
            wait_for(self.stream, PollFlags::IN, None)?;
        }
        let received = self.buffer.len();
        self.buffer.resize(received + READ_SIZE, 0);
        let mut stream = self.stream;
        let read = loop {
            match stream.read(&mut self.buffer[received..]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => break read?,
            }
        };
        self.buffer.truncate(received + read);
        match (read, is_begun) {
            (0, false) => Ok(false),
            (0, true) if self.incoming.is_some() => Err(Fault::Refused(errors::BAD_BODY.into())),
            (0, true) => Err(Fault::Refused(errors::BAD_HEAD.into())),
            _ => Ok(true),
        }
    }
}

fn too_large() -> Refused {
    Refused::new(413, "too_large", format!("the body is over the limit of {MAX_BODY} bytes"))
}
