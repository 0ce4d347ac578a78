//! The clients' side of the gate: requests are read, collected and refused, answers are sent.

use super::body::{Body, Full};
use super::chunked::{Broken, Decoder};
use super::client::{ClientKey, Exchange, Phase};
use super::door::Guest;
use super::event_loop::{Again, EventLoop, FIRST_READ, LINGER, SCRATCH, TURN};
use super::head::{self, Framing, Head, Refusal};
use super::pace::{Pace, Uptake};
use super::refusal;
use super::trouble::Trouble;
use rustix::event::epoll::EventFlags;
use std::net::IpAddr;

/// Least that is read ahead of a body that is passed on as it comes.
pub(super) const LEAST_WINDOW: u64 = SCRATCH as u64;

/// What can be done next for a client.
enum Step {
    /// Something more, at once.
    Again,
    /// Nothing, until something happens.
    Wait,
}

impl EventLoop {
    /// Something has happened on a client's connection.
    pub(super) fn client_ready(&mut self, key: ClientKey, flags: EventFlags) {
        let Some(client) = self.clients.get_mut(key) else { return };
        if flags.intersects(EventFlags::ERR) {
            return self.close(key);
        }
        if flags.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP) {
            client.readable = true;
        }
        client.half_closed |= flags.intersects(EventFlags::RDHUP | EventFlags::HUP);
        if flags.contains(EventFlags::OUT) && !client.is_flushed() {
            if client.flush().is_err() {
                return self.close(key);
            }
            if let Some(backend) = client.exchange.as_ref().and_then(|exchange| exchange.backend) {
                // It may have been held back for this client.
                self.relay(backend);
            }
        }
        self.drive(key);
    }

    /// Does for a client all that can be done now.
    pub(super) fn drive(&mut self, key: ClientKey) {
        for _ in 0..TURN {
            let Some(client) = self.clients.get(key) else { return };
            let step = match client.phase {
                Phase::Idle | Phase::Head => self.read_head(key),
                Phase::Body => self.collect(key),
                Phase::Running => self.stream_body(key),
                Phase::Waiting => Step::Wait,
                Phase::Closing => self.finish(key),
                Phase::Lingering => self.discard(key),
            };
            match step {
                Step::Again => {}
                Step::Wait => return,
            }
        }
        self.again.push(Again::Client(key));
    }

    /// How much of a body is read ahead of what takes it.
    pub(super) fn window(&self) -> u64 {
        self.limits.body_buffer.max(LEAST_WINDOW)
    }

    fn head_limits(&self) -> head::Limits {
        let bytes = usize::try_from(self.limits.max_head).unwrap_or(usize::MAX);
        head::Limits { bytes, headers: self.limits.max_headers.into() }
    }

    fn read_head(&mut self, key: ClientKey) -> Step {
        let limits = self.head_limits();
        let mut request = self.buffer();
        let Self { clients, proxies, .. } = self;
        let Some(client) = clients.get_mut(key) else { return Step::Wait };
        // One answer after the other: what was asked next waits until the client has taken this one.
        if !client.is_flushed() {
            self.keep_buffer(request);
            return Step::Wait;
        }
        client.release();
        if !client.input.is_empty() {
            let proxies = (client.guest == Some(Guest::Proxy)).then_some(&*proxies);
            match head::read(&client.input, limits, proxies, &mut client.searched, &mut request) {
                Ok(Some((head, used))) => {
                    client.input.drain(..used);
                    client.searched = 0;
                    self.begin(key, head, request);
                    return Step::Again;
                }
                Ok(None) => {}
                Err(refused) => {
                    self.keep_buffer(request);
                    self.refuse(key, refused);
                    return Step::Again;
                }
            }
        }
        self.keep_buffer(request);
        self.read_on(key, limits.bytes)
    }

    /// Reads more of a head.
    fn read_on(&mut self, key: ClientKey, most: usize) -> Step {
        let Self { clients, scratch, .. } = self;
        let Some(client) = clients.get_mut(key) else { return Step::Wait };
        if !client.readable {
            if client.input.is_empty() && client.input.capacity() > 0 {
                // What is idle holds no buffer.
                let input = std::mem::take(&mut client.input);
                self.keep_buffer(input);
            }
            return Step::Wait;
        }
        // No more than a head and a byte is ever needed to judge it.
        let first = if client.input.is_empty() { FIRST_READ } else { SCRATCH };
        let most = (most + 1).saturating_sub(client.input.len()).min(first);
        let was_handshaking = client.stream.is_handshaking();
        let read = client.read(&mut scratch[..most]);
        if was_handshaking && !client.stream.is_handshaking() && client.phase == Phase::Idle {
            let until = self.idle_until(&self.clients[key]);
            self.clients[key].deadline = Some(until);
        }
        let Self { clients, scratch, now, limits, .. } = self;
        let Some(client) = clients.get_mut(key) else { return Step::Wait };
        match read {
            Ok(0) if client.ended => {
                if client.phase == Phase::Idle {
                    self.close(key);
                } else {
                    self.refuse(key, refusal::BAD_HEAD);
                }
                Step::Wait
            }
            Ok(0) => Step::Wait,
            Ok(n) => {
                if client.input.capacity() == 0 {
                    client.input = self.buffers.pop().unwrap_or_default();
                }
                client.input.extend_from_slice(&scratch[..n]);
                if client.phase == Phase::Idle && is_begun(&client.input) {
                    client.phase = Phase::Head;
                    client.deadline = Some(*now + limits.head_timeout);
                }
                Step::Again
            }
            Err(_) => {
                self.close(key);
                Step::Wait
            }
        }
    }

    /// A head has come: what to do about its body.
    fn begin(&mut self, key: ClientKey, head: Head, request: Vec<u8>) {
        let too_large = matches!(head.framing, Framing::Length(length) if length > self.limits.max_body);
        let body = match head.framing {
            Framing::None | Framing::Length(0) => None,
            Framing::Length(length) => Some(Body::new(&self.stock, length)),
            Framing::Chunked => Some(Body::new(&self.stock, 0)),
        };
        let decoder = (head.framing == Framing::Chunked).then(Decoder::new);
        let last = !head.keep_alive || self.is_draining;
        let continues = head.expects_continue;
        let forwarded_for = head.forwarded_for;
        let complete = body.is_none();
        let client = &mut self.clients[key];
        client.deadline = None;
        client.uptake = Uptake::new(client.stream.written());
        client.sent_straight = 0;
        let go_on = continues && client.input.is_empty() && !too_large;
        client.exchange = Some(Exchange {
            head,
            request,
            body,
            decoder,
            received: 0,
            complete,
            coming: Pace::default(),
            backend: None,
            outlet: None,
            answered: false,
            chunked: false,
            last,
        });
        client.phase = Phase::Body;
        if client.stream.is_plain_http() {
            self.refuse(key, refusal::PLAIN_HTTP);
        } else if !self.count_behind_proxy(key, forwarded_for) {
            self.refuse(key, refusal::ADDRESS_FULL);
        } else if too_large {
            self.refuse(key, refusal::TOO_LARGE);
        } else if go_on && self.clients[key].send(b"HTTP/1.1 100 Continue\r\n\r\n").is_err() {
            self.close(key);
        }
    }

    /// Counts a request that a proxy has passed on for the address of the client behind it, where that is known. False where that has
    /// as many as it may.
    fn count_behind_proxy(&mut self, key: ClientKey, address: Option<IpAddr>) -> bool {
        let (Some(client), Some(address)) = (self.clients.get_mut(key), address) else { return true };
        if client.guest != Some(Guest::Proxy) {
            return true;
        }
        let most = self.limits.max_connections_per_address;
        if self.crowd.of(address) < most {
            client.counted = Some(self.crowd.count(address));
            return true;
        }
        self.troubles.came(Trouble::Address, self.now, || {
            format!(
                "{address} has {most} requests under way through a proxy, and another was refused (serve --max-connections-per-address)"
            )
        });
        false
    }

    /// Collects a body; once there is enough of it the request is passed on.
    fn collect(&mut self, key: ClientKey) -> Step {
        if !self.read_body(key) {
            return Step::Again;
        }
        let window = self.limits.body_buffer;
        let Some(client) = self.clients.get_mut(key) else { return Step::Wait };
        let ready = client
            .exchange
            .as_ref()
            .is_some_and(|exchange| exchange.complete || exchange.body.as_ref().is_some_and(|body| body.len() >= window));
        if ready {
            client.phase = Phase::Waiting;
            self.place(key);
            return Step::Again;
        }
        if client.has_input() { Step::Again } else { Step::Wait }
    }

    /// Passes on what comes of a body whose request the host has already.
    fn stream_body(&mut self, key: ClientKey) -> Step {
        let Some(client) = self.clients.get(key) else { return Step::Wait };
        let Some(exchange) = &client.exchange else { return Step::Wait };
        if exchange.complete {
            if let Some(outlet) = exchange.outlet.as_ref().filter(|_| client.has_input()) {
                outlet.await_end();
            }
            return Step::Wait;
        }
        if exchange.is_abandoned() {
            // It is read away, so that the client comes to read its answer.
            return self.discard(key);
        }
        if !self.read_body(key) {
            return Step::Again;
        }
        let backend = self.clients.get(key).and_then(|client| client.exchange.as_ref()).and_then(|exchange| exchange.backend);
        if let Some(backend) = backend {
            self.send_body(backend);
        }
        // There may be room again.
        let window = self.window();
        if self.clients.get(key).is_some_and(|client| client.wants_body(window) && client.has_input()) {
            Step::Again
        } else {
            Step::Wait
        }
    }

    /// Reads once what has come of a body, if there is room for it. False when the connection goes on with something else.
    fn read_body(&mut self, key: ClientKey) -> bool {
        let window = self.window();
        let Some(client) = self.clients.get_mut(key) else { return false };
        if !client.wants_body(window) {
            return true;
        }
        let mut bytes = std::mem::take(&mut client.input);
        if bytes.is_empty() {
            if !client.readable {
                client.input = bytes;
                return true;
            }
            if let Some(read) = client.read_to_body() {
                return match read {
                    Ok(beyond) => self.keep_body(key, Ok(0), beyond),
                    Err(_) => {
                        self.close(key);
                        false
                    }
                };
            }
            let mut scratch = std::mem::take(&mut self.scratch);
            let read = client.read(&mut scratch);
            let taken = match read {
                Ok(0) => Ok(0),
                Ok(n) => self.take_body(key, &scratch[..n]).inspect(|used| {
                    // What follows the body is the next request.
                    bytes.extend_from_slice(&scratch[*used..n]);
                }),
                Err(_) => {
                    self.scratch = scratch;
                    self.close(key);
                    return false;
                }
            };
            self.scratch = scratch;
            return self.keep_body(key, taken.map(|_| 0), bytes);
        }
        let taken = self.take_body(key, &bytes);
        self.keep_body(key, taken, bytes)
    }

    /// Goes on after bytes of a body: `bytes`, of which so many were taken, are left. False when the connection goes on with something
    /// else.
    fn keep_body(&mut self, key: ClientKey, taken: Result<usize, Refusal>, mut bytes: Vec<u8>) -> bool {
        let Some(client) = self.clients.get_mut(key) else { return false };
        let refused = match taken {
            Ok(used) => {
                bytes.drain(..used);
                client.input = bytes;
                let broken = client.ended && client.exchange.as_ref().is_some_and(|exchange| !exchange.complete);
                broken.then_some(refusal::BAD_BODY)
            }
            Err(refused) => Some(refused),
        };
        if let Some(refused) = refused {
            self.refuse(key, refused);
        }
        refused.is_none()
    }

    /// Puts bytes of a body where they belong; says how many were the body's.
    fn take_body(&mut self, key: ClientKey, bytes: &[u8]) -> Result<usize, Refusal> {
        let max_body = self.limits.max_body;
        let Some(exchange) = self.clients.get_mut(key).and_then(|client| client.exchange.as_mut()) else {
            return Ok(bytes.len());
        };
        let Some(body) = &mut exchange.body else { return Ok(0) };
        exchange.coming.progress(bytes.len());
        let kept = match (&mut exchange.decoder, exchange.head.framing) {
            (Some(decoder), _) => {
                let mut used = 0;
                loop {
                    if used == bytes.len() || exchange.complete {
                        break Ok(used);
                    }
                    let step = match decoder.step(&bytes[used..]) {
                        Ok(step) => step,
                        Err(Broken::Malformed | Broken::TooLarge) => return Err(refusal::BAD_BODY),
                    };
                    used += step.used;
                    exchange.received += step.data.len() as u64;
                    exchange.complete = step.ended;
                    // A chunk is refused by the size it announces: its data may never come.
                    if exchange.received.saturating_add(decoder.announced()) > max_body {
                        return Err(refusal::TOO_LARGE);
                    }
                    if let Err(full) = body.push(step.data) {
                        break Err(full);
                    }
                }
            }
            (None, Framing::Length(length)) => {
                let left = usize::try_from(length - exchange.received).unwrap_or(usize::MAX);
                let used = left.min(bytes.len());
                exchange.received += used as u64;
                exchange.complete = exchange.received == length;
                body.push(&bytes[..used]).map(|()| used)
            }
            (None, _) => Ok(0),
        };
        kept.map_err(|full| {
            let (refused, what) = match full {
                Full::Disk => (refusal::NO_SPACE, "there is no space left on the disk for them".to_owned()),
                Full::Stock => (refusal::NO_ROOM, "--body-memory and --body-disk are used up".to_owned()),
                Full::Failed(error) => (refusal::NO_ROOM, crate::room::explain("a temporary file failed", &error).0),
            };
            self.troubles.came(Trouble::Bodies, self.now, || format!("bodies of requests are refused: {what}"));
            refused
        })
    }

    /// Answers with the gate's own word; the connection ends after it. What the client has got of another answer is broken off.
    pub(super) fn refuse(&mut self, key: ClientKey, refused: Refusal) {
        let Some(client) = self.clients.get_mut(key) else { return };
        if !client.exchange.as_mut().is_none_or(Exchange::take_back) {
            return;
        }
        if client.exchange.as_ref().is_some_and(|exchange| exchange.answered) {
            return self.cut(key);
        }
        let head_request = client.exchange.as_ref().is_some_and(|exchange| exchange.head.head);
        let asker = client.exchange.as_ref().map(Exchange::asker);
        let answer = refusal::answer(refused, head_request, asker);
        if let Some(exchange) = client.exchange.take() {
            if let Some(backend) = exchange.backend {
                self.drop_backend(backend);
            }
            self.keep_buffer(exchange.request);
        }
        let client = &mut self.clients[key];
        client.phase = Phase::Closing;
        client.deadline = None;
        client.input.clear();
        if client.send(&answer).is_err() {
            return self.close(key);
        }
        self.drive(key);
    }

    /// Breaks a connection off, so that the client can see that its answer is not whole.
    pub(super) fn cut(&mut self, key: ClientKey) {
        if let Some(client) = self.clients.get(key) {
            // One that is broken already needs no breaking.
            client.stream.break_off().unwrap_or_default();
            self.close(key);
        }
    }

    /// Sends what is left, then tells the client that nothing more comes.
    fn finish(&mut self, key: ClientKey) -> Step {
        let Some(client) = self.clients.get_mut(key) else { return Step::Wait };
        if client.flush().is_err() {
            self.close(key);
            return Step::Wait;
        }
        if !client.is_flushed() {
            // A client that still sends may not read before it has sent all.
            return self.discard(key);
        }
        client.release();
        if client.ended || client.stream.end_sending().is_err() {
            self.close(key);
            return Step::Wait;
        }
        client.phase = Phase::Lingering;
        client.deadline = Some(self.now + LINGER);
        Step::Again
    }

    /// Throws away what comes.
    fn discard(&mut self, key: ClientKey) -> Step {
        let Self { clients, scratch, .. } = self;
        let Some(client) = clients.get_mut(key) else { return Step::Wait };
        if !client.readable {
            return Step::Wait;
        }
        match client.read(scratch) {
            Ok(0) if client.ended => {
                if client.phase == Phase::Lingering {
                    self.close(key);
                }
                Step::Wait
            }
            Ok(_) => Step::Again,
            Err(_) => {
                self.close(key);
                Step::Wait
            }
        }
    }

    /// An answer has been passed on to its end: the client may go on, or its connection ends.
    pub(super) fn answered(&mut self, key: ClientKey) {
        let Some(client) = self.clients.get(key) else { return };
        let idle = self.idle_until(client);
        let client = &mut self.clients[key];
        if !client.is_flushed() {
            // Only the request, which ends here, knows it.
            client.note_sent_straight();
        }
        if let Some(exchange) = client.exchange.take() {
            // Where the answer had begun before the host was to stop, the client was not told that it is the last: it is idle for a while.
            let last = exchange.last || !exchange.complete;
            client.phase = if last { Phase::Closing } else { Phase::Idle };
            client.deadline = (!last).then_some(idle);
            self.keep_buffer(exchange.request);
        }
        let client = &mut self.clients[key];
        if client.phase == Phase::Idle && is_begun(&client.input) {
            client.phase = Phase::Head;
            client.deadline = Some(self.now + self.limits.head_timeout);
        }
        if client.out.is_empty() {
            let out = std::mem::take(&mut client.out);
            self.keep_buffer(out);
        }
        self.drive(key);
    }
}

/// Whether a request has begun with these bytes. Some old clients send an empty line after a body, which is nothing (RFC 9112, section 2.2).
fn is_begun(input: &[u8]) -> bool {
    !matches!(input, b"" | b"\r" | b"\r\n")
}
