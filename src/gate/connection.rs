//! A client's connection, and the exchange under way on it.

use super::listener::PeerKind;
use super::min_rate::{Rate, ReadRate};
use super::stream::Stream;
use super::tunnel::Tunnel;
use super::websocket::WebSocket;
use crate::http::InFlight;
use crate::http::body::Body;
use crate::http::body_stream::BodySender;
use crate::http::direct_writer::Progress;
use crate::http::framing::Terms;
use crate::http::parse::chunked::Decoder;
use crate::http::parse::request_head::{Framing, Head};
use crate::http::request::Origin;
use crate::http::response_channel::{Begun, Pieces};
use crate::http::slots::Slot;
use crate::plugins::plugin::Plugin;
use crate::util::key_counts::Counted;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

slotmap::new_key_type! {
    /// Names a connection among those there are; never one that came later.
    pub(super) struct ConnectionKey;
}

/// What a connection is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// No byte of a request has arrived.
    Idle,
    /// Part of a head has arrived.
    Head,
    /// The head is complete, and the body is being collected.
    Body,
    /// The request is complete, and waits until the plugins are known.
    Held,
    /// The request is in its queue or being answered.
    Running,
    /// The connection ends once the rest of the output has been sent.
    Closing,
    /// All output has been sent, and the sending side is shut down. Input is discarded for a while: if the connection were closed while the
    /// client sends, the kernel would reset it and the client would lose the answer.
    Lingering,
    /// The client and an application speak another protocol through the connection.
    Tunnel,
    /// The client and a plugin exchange messages through the connection.
    WebSocket,
}

/// A client's connection.
pub(super) struct Connection {
    pub(super) stream: Stream,
    /// The peer's address; none for a Unix socket.
    pub(super) address: Option<IpAddr>,
    /// What counts for the address: the connection itself, or, behind a proxy, the request until its answer has been sent.
    pub(super) counted: Option<Counted<IpAddr>>,
    /// The kind of peer; none for a connection that is only told that the host is full.
    pub(super) peer: Option<PeerKind>,
    pub(super) phase: Phase,
    /// When the phase ends at the latest.
    pub(super) deadline: Option<Instant>,
    /// Input that was received and not processed.
    pub(super) input: Vec<u8>,
    /// Number of its bytes that were searched for the end of a head.
    pub(super) searched: usize,
    /// Whether a read may find more.
    pub(super) readable: bool,
    /// Whether the kernel has announced the end of the client's sending. Unread bytes may precede it.
    pub(super) half_closed: bool,
    /// Whether both directions have ended.
    pub(super) hung_up: bool,
    /// Whether the end of its sending was read.
    pub(super) ended: bool,
    /// Output; the first `sent` bytes were sent.
    pub(super) out: Vec<u8>,
    pub(super) sent: usize,
    /// How fast the client reads the answer.
    pub(super) read_rate: ReadRate,
    /// Bytes of the answer that a worker has sent directly.
    pub(super) sent_direct: u64,
    /// The exchange under way.
    pub(super) exchange: Option<Exchange>,
    /// What it is connected with, in the phase `Tunnel`.
    pub(super) tunnel: Option<Box<Tunnel>>,
    /// The client's end of a socket, in the phase `WebSocket`.
    pub(super) websocket: Option<Box<WebSocket>>,
    /// The plugin's slot that this connection holds while the client reads the rest of an answer.
    pub(super) slot: Option<Slot>,
}

/// Who answers a request.
pub(super) enum Destination {
    /// A plugin, and the length of its route in bytes.
    Plugin(Arc<Plugin>, usize),
    /// One of the API's threads.
    Api,
    /// The event loop, with a prepared answer.
    Here(Prepared),
    /// Unknown until the first scan of the plugins directory has ended.
    Unknown,
}

/// A complete answer of the host.
#[derive(Default)]
pub(super) struct Prepared {
    pub(super) status: u16,
    /// Status line and headers, without those of the framing.
    pub(super) head: Vec<u8>,
    pub(super) body: Vec<u8>,
}

/// A request under way, and its answer.
pub(super) struct Exchange {
    pub(super) number: u64,
    pub(super) head: Head,
    /// The head in the parser's canonical form; empty once the request was submitted.
    pub(super) request: Vec<u8>,
    pub(super) origin: Origin,
    pub(super) destination: Destination,
    /// When the request's head was complete.
    pub(super) began: Instant,
    /// Bytes that had been passed to the kernel on this connection before.
    pub(super) given_before: u64,
    /// The part of the body that was received and not passed on; none if the request has no body.
    pub(super) body: Option<Body>,
    /// The channel for a body that is passed on while it arrives.
    pub(super) body_sender: Option<BodySender>,
    pub(super) decoder: Option<Decoder>,
    /// Bytes of the body received so far.
    pub(super) received: u64,
    /// Whether the request was received completely.
    pub(super) complete: bool,
    /// The rate at which the body arrives.
    pub(super) body_rate: Rate,
    /// The state of the request, once it was submitted.
    pub(super) in_flight: Option<Arc<InFlight>>,
    /// The plugin's slot that the connection holds.
    pub(super) slot: Option<Slot>,
    /// The source of the rest of the answer.
    pub(super) pieces: Option<Pieces>,
    /// Whether it may have a piece ready.
    pub(super) has_pieces: bool,
    /// What is known of the answer, once part of it has been sent.
    pub(super) answer: Option<Begun>,
    /// Whether the connection ends after the answer.
    pub(super) last: bool,
}

/// Number of processed bytes at the front of a buffer from which on the rest is moved to the front.
const WORN: usize = 64 * 1024;

/// Moves the unprocessed rest of a buffer to its front, so that a buffer that is never empty does not grow.
fn compact(out: &mut Vec<u8>, sent: &mut usize) {
    if *sent >= WORN {
        out.drain(..*sent);
        *sent = 0;
    }
}

impl Exchange {
    /// Whether the rest of the request's body is not needed, because the answer has begun without it.
    pub(super) fn is_answered_early(&self) -> bool {
        !self.complete && self.answer.is_some()
    }

    /// Whether the event loop itself answers, so that a body is only discarded.
    pub(super) fn is_answered_here(&self) -> bool {
        matches!(self.destination, Destination::Here(_))
    }

    /// How its answer is to be framed.
    pub(super) fn terms(&self) -> Terms {
        Terms { head: self.head.head, old: self.head.old, last: self.last }
    }

    /// Abandons an answer that a worker may be sending. Returns its progress; after `Over` the event loop is about to receive its end.
    pub(super) fn cancel(&mut self) -> Progress {
        let direct = self.in_flight.as_ref().map_or(Progress::Untouched, |in_flight| in_flight.cancel());
        match (direct, self.answer.is_some(), self.pieces.is_some()) {
            (Progress::Over, _, false) => Progress::Over,
            (Progress::Untouched, false, _) => Progress::Untouched,
            _ => Progress::Begun,
        }
    }
}

impl Connection {
    pub(super) fn new(stream: Stream, address: Option<IpAddr>, peer: Option<PeerKind>, deadline: Instant) -> Self {
        Self {
            stream,
            address,
            counted: None,
            peer,
            phase: Phase::Idle,
            deadline: Some(deadline),
            input: Vec::new(),
            searched: 0,
            readable: true,
            half_closed: false,
            hung_up: false,
            ended: false,
            out: Vec::new(),
            sent: 0,
            read_rate: ReadRate::default(),
            sent_direct: 0,
            exchange: None,
            tunnel: None,
            websocket: None,
            slot: None,
        }
    }

    /// The client has taken the whole answer, or there was none: nothing counts for it any more but the connection itself.
    pub(super) fn release(&mut self) {
        self.slot = None;
        if self.peer == Some(PeerKind::Proxy) {
            self.counted = None;
        }
    }

    /// Whether something that it has sent may be there.
    pub(super) fn has_input(&self) -> bool {
        self.readable || !self.input.is_empty()
    }

    /// Whether the client has gone: it has ended its sending after the request under way. A client that speaks HTTP/1.0, or has sent
    /// `connection: close`, may end its sending and still read the answer, unless it is a proxy or both directions have ended. For all
    /// others the end of sending is the end.
    pub(super) fn is_abandoned(&self) -> bool {
        let may_half_close = || {
            let stays = |exchange: &Exchange| exchange.head.keep_alive;
            self.peer == Some(PeerKind::Public) && !self.exchange.as_ref().is_none_or(stays)
        };
        let is_behind = || self.input.is_empty() && self.stream.is_at_end();
        self.hung_up || (self.half_closed && !may_half_close() && is_behind())
    }

    /// The unsent output.
    pub(super) fn unsent(&self) -> usize {
        self.out.len() - self.sent
    }

    /// Whether all output has been sent.
    pub(super) fn is_flushed(&self) -> bool {
        self.unsent() == 0 && !self.stream.is_unsent()
    }

    /// Whether more could be sent if the client took it.
    pub(super) fn waits_to_send(&self) -> bool {
        let in_flight = || self.exchange.as_ref().and_then(|exchange| exchange.in_flight.as_ref());
        !self.is_flushed() || in_flight().is_some_and(|in_flight| in_flight.writer.is_full())
    }

    /// Whether an answer that has begun has been sent completely.
    pub(super) fn is_done(&self) -> bool {
        self.is_flushed() && self.exchange.as_ref().is_none_or(|exchange| exchange.answer.is_none())
    }

    /// Sends the unsent output and then these bytes. Keeps what the socket does not take.
    pub(super) fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        // TLS takes less at a time than the socket, without an event when it would take more. Only a full socket raises an event when there
        // is room again.
        while self.unsent() > 0 || !rest.is_empty() {
            match self.stream.write(&self.out[self.sent..], rest) {
                Ok(n) => {
                    let waited = n.min(self.unsent());
                    self.sent += waited;
                    rest = &rest[n - waited..];
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        if self.unsent() == 0 {
            self.out.clear();
            self.sent = 0;
        }
        self.queue(rest);
        Ok(())
    }

    /// Keeps bytes until they can be sent.
    pub(super) fn queue(&mut self, bytes: &[u8]) {
        compact(&mut self.out, &mut self.sent);
        self.out.extend_from_slice(bytes);
    }

    /// Sends as much of the output as the socket takes.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.send(&[])?;
        if self.out.is_empty() { self.stream.flush() } else { Ok(()) }
    }

    /// Counts bytes that a worker has sent directly.
    pub(super) fn note_sent_direct(&mut self) {
        if let Some(in_flight) = self.exchange.as_ref().and_then(|exchange| exchange.in_flight.as_ref()) {
            self.sent_direct = in_flight.writer.sent();
        }
    }

    /// Bytes passed to the kernel on this connection, including earlier answers except those that were sent directly.
    pub(super) fn given(&mut self) -> u64 {
        self.note_sent_direct();
        self.stream.written() + self.sent_direct
    }

    /// Reads available input. If none was read, `ended` tells whether the input has ended.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.read_by(buffer.len(), |stream| stream.read(buffer))
    }

    /// Reads into the spare capacity of a buffer, without TLS.
    pub(super) fn read_to(&mut self, buffer: &mut Vec<u8>) -> io::Result<usize> {
        self.read_by(buffer.capacity() - buffer.len(), |stream| stream.read_to(buffer))
    }

    fn read_by(&mut self, most: usize, mut read: impl FnMut(&mut Stream) -> io::Result<usize>) -> io::Result<usize> {
        loop {
            if self.ended {
                self.readable = false;
                return Ok(0);
            }
            match read(&mut self.stream) {
                Ok(0) => self.ended = true,
                Ok(n) => {
                    // A short read has taken all input, apart from a possible end. TLS may hold more.
                    self.readable = n == most || self.half_closed || self.stream.is_tls();
                    return Ok(n);
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock => {
                        self.readable = false;
                        return Ok(0);
                    }
                    _ => return Err(error),
                },
            }
        }
    }

    /// Reads the request's body directly into its buffer, if the body has a length and a place in memory. Returns what was read beyond it.
    pub(super) fn read_to_body(&mut self) -> Option<io::Result<Vec<u8>>> {
        let exchange = self.exchange.as_mut().filter(|exchange| exchange.decoder.is_none())?;
        let mut body = exchange.body.take_if(|_| !self.stream.is_tls())?;
        let held = body.len();
        let read = body.read_from(|block| self.read_to(block).map(drop));
        let come = body.len() - held;
        if let Some(exchange) = &mut self.exchange {
            exchange.received += come;
            exchange.complete = exchange.head.framing == Framing::Length(exchange.received);
            if come > 0 {
                exchange.body_rate.progress(usize::try_from(come).unwrap_or(usize::MAX));
            }
            exchange.body = Some(body);
        }
        read.transpose()
    }

    /// Whether more of the request's body is expected, and there is room for it.
    pub(super) fn wants_body(&self, window: u64) -> bool {
        self.exchange.as_ref().is_some_and(|exchange| {
            let has_room = || exchange.is_answered_here() || exchange.body.as_ref().is_some_and(|body| body.len() < window);
            !exchange.complete && exchange.answer.is_none() && has_room()
        })
    }
}
