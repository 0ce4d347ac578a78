//! A client's connection, and the exchange under way on it.

use super::listener::PeerKind;
use super::min_rate::{Rate, ReadRate};
use super::per_address::Counted;
use super::stream::Stream;
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
    /// Nothing of a request has come.
    Idle,
    /// A head is coming.
    Head,
    /// A body is coming, and is collected.
    Body,
    /// The request has come whole, and waits until its route is known.
    Held,
    /// The request has been passed on.
    Running,
    /// What is left to send is sent, then the connection ends.
    Closing,
    /// Everything is sent, and the client has been told. What it still sends is thrown away for a while: the kernel would take the answer
    /// back if the connection ended while the client sends.
    Lingering,
}

/// A client's connection.
pub(super) struct Connection {
    pub(super) stream: Stream,
    /// Where it comes from, as the kernel says; none through a Unix socket.
    pub(super) address: Option<IpAddr>,
    /// Counts for its address: the connection, or for a proxy's client the request whose answer is not taken yet.
    pub(super) counted: Option<Counted>,
    /// What kind of client it has; none when it is only told that there is no place for it.
    pub(super) peer: Option<PeerKind>,
    pub(super) phase: Phase,
    /// Until when the phase may last.
    pub(super) deadline: Option<Instant>,
    /// Bytes that have come and are not used yet.
    pub(super) input: Vec<u8>,
    /// How much of them was searched for the end of a head.
    pub(super) searched: usize,
    /// More may be there to read.
    pub(super) readable: bool,
    /// The client has ended its sending: announced by the kernel, though bytes may stand before the end.
    pub(super) half_closed: bool,
    /// Both directions have ended.
    pub(super) hung_up: bool,
    /// The end of what it sends has been read.
    pub(super) ended: bool,
    /// Bytes to send, of which the first `sent` are gone.
    pub(super) out: Vec<u8>,
    pub(super) sent: usize,
    /// How fast the client reads the answer.
    pub(super) read_rate: ReadRate,
    /// Bytes of the answer that a worker has sent on the direct way.
    pub(super) sent_direct: u64,
    /// The exchange under way.
    pub(super) exchange: Option<Exchange>,
    /// The plugin's slot that this connection holds while the client reads the rest of an answer.
    pub(super) slot: Option<Slot>,
}

/// Who answers a request.
pub(super) enum Destination {
    /// A plugin, whose route has so many bytes.
    Plugin(Arc<Plugin>, usize),
    /// One of the API's threads.
    Api,
    /// The event loop itself, with this answer.
    Here(Prepared),
    /// It is not known yet, since the first scan of the plugins directory is under way.
    Unknown,
}

/// An answer of the host's own.
#[derive(Default)]
pub(super) struct Prepared {
    pub(super) status: u16,
    /// Status line and headers, without those that frame the answer.
    pub(super) head: Vec<u8>,
    pub(super) body: Vec<u8>,
}

/// A request under way, and its answer.
pub(super) struct Exchange {
    pub(super) number: u64,
    pub(super) head: Head,
    /// The canonical head, as the parser has written it; empty once the request was passed on.
    pub(super) request: Vec<u8>,
    pub(super) origin: Origin,
    pub(super) destination: Destination,
    /// When the request's head was complete.
    pub(super) began: Instant,
    /// Bytes that the kernel had been given for the client before.
    pub(super) given_before: u64,
    /// What has come of the body and is not passed on yet; none when the request has no body.
    pub(super) body: Option<Body>,
    /// Where the body goes that is passed on while it comes.
    pub(super) body_sender: Option<BodySender>,
    pub(super) decoder: Option<Decoder>,
    /// Bytes of the body that have come.
    pub(super) received: u64,
    /// Whether the whole request has come.
    pub(super) complete: bool,
    /// How fast the body comes.
    pub(super) body_rate: Rate,
    /// The request's state, once it was passed on.
    pub(super) in_flight: Option<Arc<InFlight>>,
    /// The plugin's slot that the connection holds.
    pub(super) slot: Option<Slot>,
    /// Where the rest of the answer comes from.
    pub(super) pieces: Option<Pieces>,
    /// Whether a piece may be there.
    pub(super) has_pieces: bool,
    /// The beginning of the answer, once the client has got something of it.
    pub(super) answer: Option<Begun>,
    /// Whether the connection ends after the answer.
    pub(super) last: bool,
}

/// Bytes at the front of a buffer that are gone already, from which on it is worth moving the rest there.
const WORN: usize = 64 * 1024;

/// Moves what is left in a buffer to its front, so that one that is never quite empty does not grow.
fn compact(out: &mut Vec<u8>, sent: &mut usize) {
    if *sent >= WORN {
        out.drain(..*sent);
        *sent = 0;
    }
}

impl Exchange {
    /// Whether what is left of the request's body is not wanted any more: the answer has begun without it.
    pub(super) fn is_answered_early(&self) -> bool {
        !self.complete && self.answer.is_some()
    }

    /// Whether the event loop answers by itself, so that a body is only read away.
    pub(super) fn is_answered_here(&self) -> bool {
        matches!(self.destination, Destination::Here(_))
    }

    /// What it says of how its answer is framed.
    pub(super) fn terms(&self) -> Terms {
        Terms { head: self.head.head, old: self.head.old, last: self.last }
    }

    /// Gives up the answer that another thread may be sending. Returns how far it has come: where it is `Over`, the event loop is about to
    /// hear of its end.
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

    /// Whether its client has gone, by the end of its sending behind the request under way. A client of HTTP/1.0, or one that has said that
    /// the connection ends, may end its sending and still read its answer, unless it is a proxy or both directions have ended; for all
    /// others it is the end.
    pub(super) fn is_abandoned(&self) -> bool {
        let may_half_close = || {
            let stays = |exchange: &Exchange| exchange.head.keep_alive;
            self.peer == Some(PeerKind::Public) && !self.exchange.as_ref().is_none_or(stays)
        };
        let is_behind = || self.input.is_empty() && self.stream.is_at_end();
        self.hung_up || (self.half_closed && !may_half_close() && is_behind())
    }

    /// Bytes that wait to be sent.
    pub(super) fn unsent(&self) -> usize {
        self.out.len() - self.sent
    }

    /// Whether everything has been sent.
    pub(super) fn is_flushed(&self) -> bool {
        self.unsent() == 0 && !self.stream.is_unsent()
    }

    /// Whether nothing more is to be sent of an answer that has begun.
    pub(super) fn is_done(&self) -> bool {
        self.is_flushed() && self.exchange.as_ref().is_none_or(|exchange| exchange.answer.is_none())
    }

    /// Sends what waits and these bytes behind it, or keeps them until they can be sent.
    pub(super) fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        // TLS takes less at a time than the socket does, and nothing tells when it would take more: only once the socket is full is
        // it said when there is room again.
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

    /// Sends what waits, as far as it goes.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.send(&[])?;
        if self.out.is_empty() { self.stream.flush() } else { Ok(()) }
    }

    /// Notes what a worker has sent on the direct way.
    pub(super) fn note_sent_direct(&mut self) {
        if let Some(in_flight) = self.exchange.as_ref().and_then(|exchange| exchange.in_flight.as_ref()) {
            self.sent_direct = in_flight.writer.sent();
        }
    }

    /// Bytes that the kernel has been given for the client, those of earlier answers included unless they went the direct way.
    pub(super) fn given(&mut self) -> u64 {
        self.note_sent_direct();
        self.stream.written() + self.sent_direct
    }

    /// Reads what has come. Nothing read means that nothing is there, or that nothing more will come, as `ended` then says.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.read_by(buffer.len(), |stream| stream.read(buffer))
    }

    /// The same, without TLS, to the room there is behind what a buffer holds.
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
                    // Less than asked for is all there was, unless the end stands behind it; TLS may have more of its own.
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

    /// Reads more of its request's body straight to where it stays, if that can be: it has a length, and a place in memory. Gives what
    /// came behind it.
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

    /// Whether the client is to send more of its request's body, and there is room for it.
    pub(super) fn wants_body(&self, window: u64) -> bool {
        self.exchange.as_ref().is_some_and(|exchange| {
            let has_room = || exchange.is_answered_here() || exchange.body.as_ref().is_some_and(|body| body.len() < window);
            !exchange.complete && exchange.answer.is_none() && has_room()
        })
    }
}
