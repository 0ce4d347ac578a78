//! A client's connection as the gate sees it, and the request that is under way on it.

use super::backend::BackendKey;
use super::body::Body;
use super::chunked::Decoder;
use super::crowd::Counted;
use super::door::Guest;
use super::head::{Framing, Head};
use super::outlet::{Outlet, Progress};
use super::pace::{Pace, Uptake};
use super::refusal::{Asker, prefers_html};
use super::response::{Framed, Terms};
use super::slots::Slot;
use super::stream::Stream;
use memchr::memchr;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

slotmap::new_key_type! {
    /// Names a client among those there are; never one that came later.
    pub(super) struct ClientKey;
}

/// What a connection is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Nothing of a request has come.
    Idle,
    /// A head is coming.
    Head,
    /// A body is being collected.
    Body,
    /// A request waits for a connection to the host.
    Waiting,
    /// The host has the request.
    Running,
    /// What is left to send is sent, then the connection ends.
    Closing,
    /// Everything is sent, and the client has been told. What it still sends is thrown away, for a while: it might lose its answer if
    /// the connection were ended while it sends.
    Lingering,
}

/// A client's connection.
pub(super) struct Client {
    pub(super) stream: Stream,
    /// From where it comes, as the kernel says; none through a Unix socket.
    pub(super) address: Option<IpAddr>,
    /// Counts for its address: the connection, or for a proxy's client the request whose answer is not taken yet.
    pub(super) counted: Option<Counted>,
    /// As whom it came; none when it is only being turned away.
    pub(super) guest: Option<Guest>,
    pub(super) phase: Phase,
    /// Until when the phase may last.
    pub(super) deadline: Option<Instant>,
    /// Bytes that have come and are not used yet.
    pub(super) input: Vec<u8>,
    /// How much of them was searched for the end of a head.
    pub(super) searched: usize,
    /// More may be there to read.
    pub(super) readable: bool,
    /// The end of what it sends has been announced, or come behind what is there to read.
    pub(super) half_closed: bool,
    /// It will send nothing more.
    pub(super) ended: bool,
    /// Bytes to send, of which the first `sent` are gone.
    pub(super) out: Vec<u8>,
    pub(super) sent: usize,
    /// How fast the client reads the answer.
    pub(super) uptake: Uptake,
    /// Bytes of the answer that a worker has sent straight to the client.
    pub(super) sent_straight: u64,
    /// The request under way.
    pub(super) exchange: Option<Exchange>,
    /// The plugin's slot that this connection holds while the client reads the rest of an answer.
    pub(super) slot: Option<Slot>,
}

/// A request under way, and its answer.
pub(super) struct Exchange {
    pub(super) head: Head,
    /// The canonical head, as [`super::head::read`] wrote it.
    pub(super) request: Vec<u8>,
    /// What has come of the body and is not passed on yet; none when the request has no body.
    pub(super) body: Option<Body>,
    pub(super) decoder: Option<Decoder>,
    /// Bytes of the body that have come.
    pub(super) received: u64,
    /// Whether the whole request has come.
    pub(super) complete: bool,
    /// How the body comes.
    pub(super) coming: Pace,
    pub(super) backend: Option<BackendKey>,
    /// The way by which its answer may go straight to the client.
    pub(super) outlet: Option<Arc<Outlet>>,
    /// Whether the client has got something of the answer.
    pub(super) answered: bool,
    /// Whether the answer goes out in chunks.
    pub(super) chunked: bool,
    /// Whether the connection ends after the answer.
    pub(super) last: bool,
}

/// Bytes at the front of a buffer that are gone already, from which on it is worth moving the rest there.
const WORN: usize = 64 * 1024;

/// Moves what is left in a buffer to its front, so that one that is never quite empty does not grow.
pub(super) fn compact(out: &mut Vec<u8>, sent: &mut usize) {
    if *sent >= WORN {
        out.drain(..*sent);
        *sent = 0;
    }
}

impl Exchange {
    /// The first line of the canonical head, and the others.
    pub(super) fn lines(&self) -> (&[u8], &[u8]) {
        self.request.split_at(memchr(b'\n', &self.request).map_or(0, |end| end + 1))
    }

    /// What is known of the request where it is refused.
    pub(super) fn asker(&self) -> Asker<'static> {
        // What is canonical is ASCII, a header a line.
        let head = std::str::from_utf8(&self.request).unwrap_or_default();
        let accept = head.split_terminator("\r\n").filter_map(|line| line.strip_prefix("accept: "));
        let is_safe = self.head.head || self.request.starts_with(b"GET ");
        Asker { html: prefers_html(accept), is_safe, id: None }
    }

    /// Whether what is left of the request's body is not wanted any more: the answer has begun without it.
    pub(super) fn is_abandoned(&self) -> bool {
        self.answered && !self.complete
    }

    /// What it says of how its answer is framed.
    pub(super) fn terms(&self) -> Terms {
        Terms { head: self.head.head, old: self.head.old, last: self.last }
    }

    /// Takes back the way straight to the client, unless the answer has been begun there. Says whether it has been begun, by whomever.
    pub(super) fn take_back_unused(&self) -> bool {
        self.answered || self.outlet.as_ref().is_some_and(|outlet| outlet.take_back_unused() != Progress::Untouched)
    }

    /// Takes back the way straight to the client. False where it has an answer on it that is whole, of which the gate is about to hear.
    pub(super) fn take_back(&mut self) -> bool {
        let progress = self.outlet.take().map_or(Progress::Untouched, |outlet| outlet.take_back());
        self.answered |= progress == Progress::Begun;
        progress != Progress::Over
    }
}

impl Client {
    pub(super) fn new(stream: Stream, address: Option<IpAddr>, guest: Option<Guest>, deadline: Instant) -> Self {
        Self {
            stream,
            address,
            counted: None,
            guest,
            phase: Phase::Idle,
            deadline: Some(deadline),
            input: Vec::new(),
            searched: 0,
            readable: true,
            half_closed: false,
            ended: false,
            out: Vec::new(),
            sent: 0,
            uptake: Uptake::default(),
            sent_straight: 0,
            exchange: None,
            slot: None,
        }
    }

    /// Its request goes this way through the host, and its answer is to begin until then.
    pub(super) fn pass_on(&mut self, way: BackendKey, until: Instant) {
        self.phase = Phase::Running;
        self.deadline = Some(until);
        if let Some(exchange) = &mut self.exchange {
            exchange.backend = Some(way);
        }
    }

    /// The answer to its request has begun, framed like this.
    pub(super) fn begin_answer(&mut self, framed: Framed) {
        self.deadline = None;
        if let Some(exchange) = &mut self.exchange {
            exchange.answered = true;
            (exchange.chunked, exchange.last) = (framed.chunked, framed.last);
        }
    }

    /// Lends the way straight to it for the answer to its request, which has come whole and `alone` or not, where nothing else is to be
    /// sent there.
    pub(super) fn lend(&mut self, alone: bool) -> Option<Arc<Outlet>> {
        if !self.is_flushed() {
            return None;
        }
        let exchange = self.exchange.as_mut()?;
        let outlet = Arc::new(Outlet::new(self.stream.share()?, exchange.terms(), alone));
        exchange.outlet = Some(Arc::clone(&outlet));
        Some(outlet)
    }

    /// The whole answer has been taken, or there was none: nothing counts for it any more but the connection itself.
    pub(super) fn release(&mut self) {
        self.slot = None;
        if self.guest == Some(Guest::Proxy) {
            self.counted = None;
        }
    }

    /// Whether something that it has sent may be there.
    pub(super) fn has_input(&self) -> bool {
        self.readable || !self.input.is_empty()
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
        self.is_flushed() && self.exchange.as_ref().is_none_or(|exchange| !exchange.answered)
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

    /// Notes what a worker has sent straight to the client.
    pub(super) fn note_sent_straight(&mut self) {
        if let Some(outlet) = self.exchange.as_ref().and_then(|exchange| exchange.outlet.as_ref()) {
            self.sent_straight = outlet.sent();
        }
    }

    /// Bytes that the kernel has been given for the client, those of earlier answers included unless they went straight there.
    pub(super) fn given(&mut self) -> u64 {
        self.note_sent_straight();
        self.stream.written() + self.sent_straight
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
                exchange.coming.progress(usize::try_from(come).unwrap_or(usize::MAX));
            }
            exchange.body = Some(body);
        }
        read.transpose()
    }

    /// Whether the client is to send more of its request's body, and there is room for it.
    pub(super) fn wants_body(&self, window: u64) -> bool {
        self.exchange.as_ref().is_some_and(|exchange| {
            !exchange.complete && !exchange.is_abandoned() && exchange.body.as_ref().is_some_and(|body| body.len() < window)
        })
    }
}
