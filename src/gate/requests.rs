//! Requests: reads, routes, collects, submits and refuses them.

use super::connection::{ConnectionKey, Destination, Exchange, Phase, Prepared};
use super::event_loop::{EventLoop, FIRST_READ, LINGER, SCRATCH, TURN};
use super::listener::PeerKind;
use super::log_topics::LogTopic;
use super::min_rate::{Rate, ReadRate};
use super::router::Routed;
use crate::http::body::{Body, Full};
use crate::http::body_stream::{self, body_stream};
use crate::http::direct_writer::{DirectWriter, Progress};
use crate::http::errors;
use crate::http::framing::{Framed, Terms, frame};
use crate::http::parse::chunked::{Broken, Decoder};
use crate::http::parse::request_head::{self, Framing, Head};
use crate::http::request::{BodyLength, Method, Origin, RequestBody, RequestId, audience, split_head};
use crate::http::request_end::{Outcome, RequestEnd};
use crate::http::responder::Responder;
use crate::http::response_channel::{Address, Begun};
use crate::http::{HttpError, InFlight, Request, WaitingRequest};
use crate::plugins::job::Job;
use crate::plugins::plugin::HOLD;
use rustix::event::epoll::EventFlags;
use slotmap::Key;
use std::io::Read;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

/// Least number of bytes read ahead of a body that is passed on while it arrives.
pub(super) const LEAST_WINDOW: u64 = SCRATCH as u64;

/// Limit of requests that wait for the end of the first scan of the plugins directory.
const MAX_HELD: usize = 1024;

/// How to proceed with a connection.
pub(super) enum Step {
    /// Take the next step at once.
    Again,
    /// Wait for an event.
    Wait,
}

impl EventLoop {
    /// Handles an event of a connection.
    pub(super) fn connection_ready(&mut self, key: ConnectionKey, flags: EventFlags) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        if flags.intersects(EventFlags::ERR) {
            return self.close(key);
        }
        if flags.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP) {
            connection.readable = true;
        }
        connection.half_closed |= flags.intersects(EventFlags::RDHUP | EventFlags::HUP);
        connection.hung_up |= flags.contains(EventFlags::HUP);
        if flags.contains(EventFlags::OUT) && !connection.is_flushed() {
            if connection.flush().is_err() {
                return self.close(key);
            }
            // The answer may have waited for this client to read.
            self.relay(key);
        }
        self.drive(key);
    }

    /// Takes all steps that are possible now for a connection.
    pub(super) fn drive(&mut self, key: ConnectionKey) {
        for _ in 0..TURN {
            let Some(connection) = self.connections.get(key) else { return };
            let step = match connection.phase {
                Phase::Idle | Phase::Head => self.read_head(key),
                Phase::Body => self.collect(key),
                Phase::Held | Phase::Running => self.serve_in_flight(key),
                Phase::Closing => self.finish(key),
                Phase::Lingering => self.discard(key),
                Phase::Tunnel => self.pump(key),
                Phase::WebSocket => self.serve_socket(key),
            };
            match step {
                Step::Again => {}
                Step::Wait => return,
            }
        }
        self.again.push(key);
    }

    /// How many bytes of a body are read ahead of its consumer.
    pub(super) fn window(&self) -> u64 {
        self.limits.body_buffer.max(LEAST_WINDOW)
    }

    fn head_limits(&self) -> request_head::HeadLimits {
        let bytes = usize::try_from(self.limits.max_head).unwrap_or(usize::MAX);
        request_head::HeadLimits { bytes, headers: self.limits.max_headers.into() }
    }

    fn read_head(&mut self, key: ConnectionKey) -> Step {
        let limits = self.head_limits();
        let mut request = self.buffer();
        let Self { connections, proxies, .. } = self;
        let Some(connection) = connections.get_mut(key) else { return Step::Wait };
        // The next request waits until this answer has been sent.
        if !connection.is_flushed() {
            self.keep_buffer(request);
            return Step::Wait;
        }
        connection.release();
        if !connection.input.is_empty() {
            let proxies = (connection.peer == Some(PeerKind::Proxy)).then_some(&*proxies);
            match request_head::read(&connection.input, limits, proxies, &mut connection.searched, &mut request) {
                Ok(Some((head, used))) => {
                    connection.input.drain(..used);
                    connection.searched = 0;
                    self.begin(key, head, request);
                    return Step::Again;
                }
                Ok(None) => {}
                Err(error) => {
                    self.keep_buffer(request);
                    self.refuse(key, error);
                    return Step::Again;
                }
            }
        }
        self.keep_buffer(request);
        self.read_on(key, limits.bytes)
    }

    /// Reads more of a head, and parses it.
    fn read_on(&mut self, key: ConnectionKey, most: usize) -> Step {
        let Self { connections, scratch, .. } = self;
        let Some(connection) = connections.get_mut(key) else { return Step::Wait };
        if !connection.readable {
            if connection.input.is_empty() && connection.input.capacity() > 0 {
                // An idle connection holds no buffer.
                let input = std::mem::take(&mut connection.input);
                self.keep_buffer(input);
            }
            return Step::Wait;
        }
        // A head and one more byte are enough to judge it.
        let first = if connection.input.is_empty() { FIRST_READ } else { SCRATCH };
        let most = (most + 1).saturating_sub(connection.input.len()).min(first);
        let was_handshaking = connection.stream.is_handshaking();
        let read = connection.read(&mut scratch[..most]);
        if was_handshaking && !connection.stream.is_handshaking() && connection.phase == Phase::Idle {
            let until = self.idle_until(&self.connections[key]);
            self.connections[key].deadline = Some(until);
        }
        let Self { connections, scratch, now, limits, .. } = self;
        let Some(connection) = connections.get_mut(key) else { return Step::Wait };
        match read {
            Ok(0) if connection.ended => {
                if connection.phase == Phase::Idle {
                    self.close(key);
                } else {
                    self.refuse(key, errors::BAD_HEAD);
                }
                Step::Wait
            }
            Ok(0) => Step::Wait,
            Ok(n) => {
                if connection.input.capacity() == 0 {
                    connection.input = self.buffers.pop().unwrap_or_default();
                }
                connection.input.extend_from_slice(&scratch[..n]);
                if connection.phase == Phase::Idle && is_begun(&connection.input) {
                    connection.phase = Phase::Head;
                    connection.deadline = Some(*now + limits.head_timeout);
                }
                Step::Again
            }
            Err(_) => {
                self.close(key);
                Step::Wait
            }
        }
    }

    /// Routes a request whose head is complete, and decides how to handle its body.
    fn begin(&mut self, key: ConnectionKey, head: Head, request: Vec<u8>) {
        let too_large = matches!(head.framing, Framing::Length(length) if length > self.limits.max_body);
        let body = match head.framing {
            Framing::None | Framing::Length(0) => None,
            Framing::Length(length) => Some(Body::new(&self.body_space, length)),
            Framing::Chunked => Some(Body::new(&self.body_space, 0)),
        };
        let decoder = (head.framing == Framing::Chunked).then(Decoder::new);
        let last = !head.keep_alive || self.is_draining;
        let (forwarded_for, upgrade) = (head.forwarded_for, head.upgrade);
        let complete = body.is_none();
        self.last_number += 1;
        let number = self.last_number;
        let connection = &mut self.connections[key];
        let origin = match connection.peer {
            Some(PeerKind::Proxy) => Origin {
                address: head.forwarded_for.or(connection.address),
                https: head.forwarded_https.unwrap_or_else(|| connection.stream.is_tls()),
                proxied: true,
            },
            _ => Origin { address: connection.address, https: connection.stream.is_tls(), proxied: false },
        };
        connection.deadline = None;
        connection.read_rate = ReadRate::new(connection.stream.written());
        connection.sent_direct = 0;
        let given_before = connection.stream.written();
        connection.exchange = Some(Exchange {
            number,
            head,
            request,
            origin,
            destination: Destination::Unknown,
            began: self.now,
            given_before,
            body,
            body_sender: None,
            decoder,
            received: 0,
            complete,
            body_rate: Rate::default(),
            in_flight: None,
            slot: None,
            pieces: None,
            has_pieces: false,
            answer: None,
            last,
        });
        connection.phase = Phase::Body;
        if connection.stream.is_plain_http() {
            self.refuse(key, errors::PLAIN_HTTP);
        } else if !self.count_behind_proxy(key, forwarded_for) {
            self.refuse(key, errors::ADDRESS_FULL);
        } else if too_large {
            self.refuse(key, errors::TOO_LARGE);
        } else if upgrade && !self.has_room_for_tunnel() {
            self.refuse(key, errors::TUNNELS_FULL);
        } else if self.route(key) {
            self.ask_for_body(key);
        }
    }

    /// Finds the destination of a request. False if the request was refused.
    fn route(&mut self, key: ConnectionKey) -> bool {
        let Some(exchange) = self.connections.get_mut(key).and_then(|connection| connection.exchange.as_mut()) else {
            return false;
        };
        let id = RequestId { prefix: Arc::clone(&self.id_prefix), number: exchange.number };
        let id = || id.of(&exchange.request, exchange.origin);
        match self.router.route(&exchange.request, exchange.complete, id) {
            Routed::To(destination, slot) => {
                (exchange.destination, exchange.slot) = (destination, slot);
                true
            }
            Routed::Full(error) => {
                self.refuse(key, error);
                false
            }
        }
    }

    /// Tells the client to send its body, or answers at once if the body is not needed.
    fn ask_for_body(&mut self, key: ConnectionKey) {
        let body_buffer = self.limits.body_buffer;
        let Some(connection) = self.connections.get_mut(key) else { return };
        let Some(exchange) = connection.exchange.as_mut().filter(|exchange| !exchange.complete) else { return };
        if let Destination::Here(_) = exchange.destination {
            // A small body that is on its way is discarded, so that the connection can be kept.
            let is_large = matches!(exchange.head.framing, Framing::Length(length) if length > body_buffer);
            if exchange.head.expects_continue || is_large {
                exchange.last = true;
                self.answer_here(key);
            }
        } else if exchange.head.expects_continue
            && connection.input.is_empty()
            && connection.send(b"HTTP/1.1 100 Continue\r\n\r\n").is_err()
        {
            self.close(key);
        }
    }

    /// Counts a request of a proxy for the address of the client behind it, if that is known. False if the client has reached its limit.
    fn count_behind_proxy(&mut self, key: ConnectionKey, address: Option<IpAddr>) -> bool {
        let (Some(connection), Some(address)) = (self.connections.get_mut(key), address) else { return true };
        if connection.peer != Some(PeerKind::Proxy) {
            return true;
        }
        let most = self.limits.max_connections_per_address;
        connection.counted = self.per_address.count(address, most);
        if connection.counted.is_some() {
            return true;
        }
        self.log_topics.hit(LogTopic::Address, self.now, || {
            format!(
                "{address} has {most} requests under way through a proxy, and another was refused (serve --max-connections-per-address)"
            )
        });
        false
    }

    /// Collects a body. Submits the request once enough of it was received.
    fn collect(&mut self, key: ConnectionKey) -> Step {
        if !self.read_body(key) {
            return Step::Again;
        }
        let window = self.limits.body_buffer;
        let Some(connection) = self.connections.get(key) else { return Step::Wait };
        let Some(exchange) = &connection.exchange else { return Step::Wait };
        let is_enough = || !exchange.is_answered_here() && exchange.body.as_ref().is_some_and(|body| body.len() >= window);
        if exchange.complete || is_enough() {
            self.pass_on(key);
            return Step::Again;
        }
        if connection.has_input() { Step::Again } else { Step::Wait }
    }

    /// Submits a request of which enough was received to its destination.
    fn pass_on(&mut self, key: ConnectionKey) {
        let Some(exchange) = self.connections.get(key).and_then(|connection| connection.exchange.as_ref()) else { return };
        match exchange.destination {
            Destination::Here(_) => self.answer_here(key),
            Destination::Plugin(..) | Destination::Api => self.submit(key),
            Destination::Unknown => self.hold(key),
        }
    }

    /// Holds a request until the first scan of the plugins directory has ended.
    fn hold(&mut self, key: ConnectionKey) {
        if self.held.len() >= MAX_HELD {
            return self.refuse(key, errors::CROWDED);
        }
        let deadline = self.now + HOLD;
        let connection = &mut self.connections[key];
        connection.phase = Phase::Held;
        connection.deadline = Some(deadline);
        self.held.push(key);
        self.next_sweep = self.next_sweep.min(deadline);
    }

    /// Routes the held requests again.
    pub(super) fn route_held(&mut self) {
        for key in std::mem::take(&mut self.held) {
            if self.connections.get(key).is_none_or(|connection| connection.phase != Phase::Held) || !self.route(key) {
                continue;
            }
            let is_unknown =
                |exchange: &Exchange| matches!(exchange.destination, Destination::Unknown) && !self.router.is_scanned();
            if self.connections[key].exchange.as_ref().is_some_and(is_unknown) {
                self.held.push(key);
            } else {
                self.pass_on(key);
                self.drive(key);
            }
        }
    }

    /// Puts a request into the queue of its destination. From here on a [`Responder`] answers it, whatever happens.
    fn submit(&mut self, key: ConnectionKey) {
        let deadline = self.now + self.answer_time.get();
        let Some(connection) = self.connections.get_mut(key) else { return };
        let is_flushed = connection.is_flushed();
        let Some(exchange) = &mut connection.exchange else { return };
        // While the host drains, each answer is the last of its connection.
        exchange.last |= self.is_draining;
        let terms = Terms { last: exchange.last || !exchange.complete, ..exchange.terms() };
        let socket = if exchange.complete && is_flushed { connection.stream.share() } else { None };
        self.in_flight += 1;
        let in_flight = InFlight::new(DirectWriter::new(socket, terms, self.in_flight == 1), self.now);
        let address = Address { connection: key.data().as_ffi(), request: exchange.number };
        let (body, length) = match (exchange.complete, exchange.head.framing) {
            (true, _) => {
                let body = exchange.body.take().filter(|body| !body.is_empty());
                (RequestBody::Whole(body), BodyLength::Known(exchange.received))
            }
            (false, framing) => {
                let (sender, receiver) = body_stream(&self.channel, address);
                exchange.body_sender = Some(sender);
                let length = if let Framing::Length(length) = framing { BodyLength::Known(length) } else { BodyLength::Unknown };
                (RequestBody::Stream(receiver), length)
            }
        };
        let head = std::mem::take(&mut exchange.request);
        let request = Request {
            mount: if let Destination::Plugin(_, mount) = exchange.destination { mount } else { 0 },
            method: Method::named(split_head(&head).0),
            head,
            origin: exchange.origin,
            id: RequestId { prefix: Arc::clone(&self.id_prefix), number: exchange.number },
            upgrade: exchange.head.upgrade,
            length,
            declares_body: exchange.head.framing != Framing::None,
            body,
            responder: Responder::new(Arc::clone(&in_flight), Arc::clone(&self.channel), address),
            arrived: self.now,
            alone: false,
            loss: None,
        };
        exchange.in_flight = Some(in_flight);
        connection.phase = Phase::Running;
        connection.deadline = Some(deadline);
        let Some(waiting) = WaitingRequest::new(request) else { return };
        match &exchange.destination {
            Destination::Plugin(plugin, _) => {
                if let Err((job, error)) = plugin.submit(Job::Http(waiting)) {
                    job.fail(error);
                }
            }
            _ => {
                if let Err(waiting) = self.router.submit_to_api(waiting) {
                    waiting.fail(errors::CROWDED);
                }
            }
        }
        self.send_body(key);
    }

    /// Passes on as much of a received body as the worker takes.
    pub(super) fn send_body(&mut self, key: ConnectionKey) {
        let Some(exchange) = self.connections.get_mut(key).and_then(|connection| connection.exchange.as_mut()) else { return };
        while let (Some(sender), Some(body)) = (&exchange.body_sender, &mut exchange.body) {
            if body.is_empty() {
                if exchange.complete {
                    if let Some(sender) = exchange.body_sender.take() {
                        sender.complete();
                    }
                    // The connection can be kept after an answer that begins from now on.
                    if let Some(in_flight) = &exchange.in_flight {
                        in_flight.writer.set_last(exchange.last);
                    }
                }
                return;
            }
            if !sender.has_room() {
                return;
            }
            let mut piece = vec![0; usize::try_from(body.len()).unwrap_or(usize::MAX).min(body_stream::PIECE)];
            match body.read(&mut piece) {
                Ok(length) => {
                    piece.truncate(length);
                    if !sender.put(piece) {
                        // The plugin needs no more of it, and its answer is on the way.
                        exchange.body_sender = None;
                    }
                }
                Err(error) => {
                    self.log_topics.hit(LogTopic::Bodies, self.now, || {
                        crate::system::rlimits::explain("a body that was kept in a temporary file could not be read", &error).0
                    });
                    return self.refuse(key, errors::NO_ROOM);
                }
            }
        }
    }

    /// Serves a request under way or held: reads more of its body, or notices that its client has gone.
    fn serve_in_flight(&mut self, key: ConnectionKey) -> Step {
        let Some(connection) = self.connections.get(key) else { return Step::Wait };
        let Some(exchange) = &connection.exchange else { return Step::Wait };
        if exchange.complete {
            if connection.is_abandoned() {
                self.close(key);
            } else if let Some(in_flight) = exchange.in_flight.as_ref().filter(|_| connection.has_input()) {
                in_flight.writer.await_end();
            }
            return Step::Wait;
        }
        if exchange.is_answered_early() {
            // The rest of the body is discarded, so that the client gets to read its answer.
            return self.discard(key);
        }
        if !self.read_body(key) {
            return Step::Again;
        }
        self.send_body(key);
        // There may be room again.
        let window = self.window();
        if self.connections.get(key).is_some_and(|connection| connection.wants_body(window) && connection.has_input()) {
            Step::Again
        } else {
            Step::Wait
        }
    }

    /// Reads more of a body once, if there is room for it. False if the connection has left this phase.
    fn read_body(&mut self, key: ConnectionKey) -> bool {
        let window = self.window();
        let Some(connection) = self.connections.get_mut(key) else { return false };
        if !connection.wants_body(window) {
            return true;
        }
        let mut bytes = std::mem::take(&mut connection.input);
        if bytes.is_empty() {
            if !connection.readable {
                connection.input = bytes;
                return true;
            }
            if let Some(read) = connection.read_to_body() {
                return match read {
                    Ok(beyond) => self.keep_body(key, Ok(0), beyond),
                    Err(_) => {
                        self.close(key);
                        false
                    }
                };
            }
            let mut scratch = std::mem::take(&mut self.scratch);
            let read = connection.read(&mut scratch);
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

    /// Handles the state after bytes of a body: the rest of `bytes`, beyond those taken, is kept as input. False if the connection has left
    /// this phase.
    fn keep_body(&mut self, key: ConnectionKey, taken: Result<usize, HttpError>, mut bytes: Vec<u8>) -> bool {
        let Some(connection) = self.connections.get_mut(key) else { return false };
        let refused = match taken {
            Ok(used) => {
                bytes.drain(..used);
                connection.input = bytes;
                let broken = connection.ended && connection.exchange.as_ref().is_some_and(|exchange| !exchange.complete);
                broken.then_some(errors::BAD_BODY)
            }
            Err(refused) => Some(refused),
        };
        if let Some(refused) = refused {
            self.refuse(key, refused);
        }
        refused.is_none()
    }

    /// Decodes bytes and appends them to the body. Returns how many of them belong to the body.
    fn take_body(&mut self, key: ConnectionKey, bytes: &[u8]) -> Result<usize, HttpError> {
        let max_body = self.limits.max_body;
        let Some(exchange) = self.connections.get_mut(key).and_then(|connection| connection.exchange.as_mut()) else {
            return Ok(bytes.len());
        };
        let is_kept = !exchange.is_answered_here();
        let Some(body) = &mut exchange.body else { return Ok(0) };
        exchange.body_rate.progress(bytes.len());
        let kept = match (&mut exchange.decoder, exchange.head.framing) {
            (Some(decoder), _) => {
                let mut used = 0;
                loop {
                    if used == bytes.len() || exchange.complete {
                        break Ok(used);
                    }
                    let step = match decoder.step(&bytes[used..]) {
                        Ok(step) => step,
                        Err(Broken::Malformed | Broken::TooLarge) => return Err(errors::BAD_BODY),
                    };
                    used += step.used;
                    exchange.received += step.data.len() as u64;
                    exchange.complete = step.ended;
                    // A chunk is refused by its announced size, before its data arrive.
                    if exchange.received.saturating_add(decoder.announced()) > max_body {
                        return Err(errors::TOO_LARGE);
                    }
                    if is_kept && let Err(full) = body.push(step.data) {
                        break Err(full);
                    }
                }
            }
            (None, Framing::Length(length)) => {
                let left = usize::try_from(length - exchange.received).unwrap_or(usize::MAX);
                let used = left.min(bytes.len());
                exchange.received += used as u64;
                exchange.complete = exchange.received == length;
                if is_kept { body.push(&bytes[..used]).map(|()| used) } else { Ok(used) }
            }
            (None, _) => Ok(0),
        };
        kept.map_err(|full| {
            let (refused, what) = match full {
                Full::Disk => (errors::NO_SPACE, "there is no space left on the disk for them".to_owned()),
                Full::Limit => (errors::NO_ROOM, "--body-memory and --body-disk are used up".to_owned()),
                Full::Failed(error) => (errors::NO_ROOM, crate::system::rlimits::explain("a temporary file failed", &error).0),
            };
            self.log_topics.hit(LogTopic::Bodies, self.now, || format!("bodies of requests are refused: {what}"));
            refused
        })
    }

    /// Sends the answer that was prepared when the request was routed.
    fn answer_here(&mut self, key: ConnectionKey) {
        let (is_draining, now) = (self.is_draining, self.now);
        let Some(connection) = self.connections.get_mut(key) else { return };
        let Some(exchange) = &mut connection.exchange else { return };
        let Destination::Here(prepared) = &mut exchange.destination else { return };
        let Prepared { status, mut head, body } = std::mem::take(prepared);
        exchange.last |= is_draining || !exchange.complete;
        let framed = frame(&mut head, status, Some(body.len() as u64), exchange.terms());
        exchange.answer = Some(Begun { status, at: now, framed });
        if !framed.bodiless {
            head.extend_from_slice(&body);
        }
        connection.deadline = None;
        if connection.send(&head).is_err() {
            return self.close(key);
        }
        self.answered(key);
    }

    /// Answers with an error, and ends the connection. An answer that has begun is aborted instead.
    pub(super) fn refuse(&mut self, key: ConnectionKey, error: HttpError) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        match connection.exchange.as_mut().map_or(Progress::Untouched, Exchange::cancel) {
            Progress::Over => return,
            Progress::Begun => return self.cut(key),
            Progress::Untouched => {}
        }
        let head_request = connection.exchange.as_ref().is_some_and(|exchange| exchange.head.head);
        // The framing is unknown while a head is being read, and after the request was submitted.
        let request = connection.exchange.as_ref().map(|exchange| &exchange.request).filter(|request| !request.is_empty());
        let answer = errors::last_answer(error, head_request, request.map(|request| audience(request, None)));
        if let Some(exchange) = &mut connection.exchange {
            let framed = Framed { chunked: false, bodiless: head_request, last: true };
            exchange.answer = Some(Begun { status: error.status, at: self.now, framed });
        }
        let sent = connection.send(&answer);
        self.end_exchange(key, Outcome::Complete);
        let Some(connection) = self.connections.get_mut(key) else { return };
        connection.phase = Phase::Closing;
        connection.deadline = None;
        connection.input.clear();
        if sent.is_err() {
            return self.close(key);
        }
        self.drive(key);
    }

    /// Resets a connection, so that the client can tell that its answer is incomplete.
    pub(super) fn cut(&mut self, key: ConnectionKey) {
        if let Some(connection) = self.connections.get(key) {
            // It may have ended already.
            connection.stream.break_off().ok();
            self.end_exchange(key, Outcome::Cut);
            self.close(key);
        }
    }

    /// Sends the rest of the output, then shuts down sending.
    fn finish(&mut self, key: ConnectionKey) -> Step {
        let Some(connection) = self.connections.get_mut(key) else { return Step::Wait };
        if connection.flush().is_err() {
            self.close(key);
            return Step::Wait;
        }
        if !connection.is_flushed() {
            // A client may not read before it has sent everything.
            return self.discard(key);
        }
        connection.release();
        if connection.ended || connection.stream.end_sending().is_err() {
            self.close(key);
            return Step::Wait;
        }
        connection.phase = Phase::Lingering;
        connection.deadline = Some(self.now + LINGER);
        Step::Again
    }

    /// Discards input.
    fn discard(&mut self, key: ConnectionKey) -> Step {
        let Self { connections, scratch, .. } = self;
        let Some(connection) = connections.get_mut(key) else { return Step::Wait };
        if !connection.readable {
            return Step::Wait;
        }
        match connection.read(scratch) {
            Ok(0) if connection.ended => {
                if connection.phase == Phase::Lingering {
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

    /// Ends an exchange whose answer is complete, and prepares the connection for the next request or its end. The caller drives the
    /// connection further.
    pub(super) fn answered(&mut self, key: ConnectionKey) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        if !connection.is_flushed() {
            // Only the exchange, which ends here, has it.
            connection.note_sent_direct();
        }
        // If the answer began before the drain, it did not say `connection: close`. So the connection stays idle for a while.
        let last = connection.exchange.as_ref().is_none_or(|exchange| exchange.last || !exchange.complete);
        self.end_exchange(key, Outcome::Complete);
        let Some(connection) = self.connections.get(key) else { return };
        let idle = self.idle_until(connection);
        let connection = &mut self.connections[key];
        connection.phase = if last { Phase::Closing } else { Phase::Idle };
        connection.deadline = (!last).then_some(idle);
        if connection.phase == Phase::Idle && is_begun(&connection.input) {
            connection.phase = Phase::Head;
            connection.deadline = Some(self.now + self.limits.head_timeout);
        }
        if connection.out.is_empty() {
            let out = std::mem::take(&mut connection.out);
            self.keep_buffer(out);
        }
    }

    /// Every exchange ends here, with everything that is known of it.
    pub(super) fn end_exchange(&mut self, key: ConnectionKey, outcome: Outcome) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        let given = connection.given() + connection.unsent() as u64;
        let Some(mut exchange) = connection.exchange.take() else { return };
        // The connection counts for the plugin until the client has taken the answer.
        connection.slot = exchange.slot.take().filter(|_| !connection.is_flushed());
        let outcome = match outcome {
            Outcome::Complete => outcome,
            // The worker has sent the whole answer, and the event loop is about to receive its end.
            _ if exchange.cancel() == Progress::Over => Outcome::Complete,
            _ => outcome,
        };
        let since_it_began = |at: Instant| at.saturating_duration_since(exchange.began);
        let end = RequestEnd {
            outcome,
            status: exchange.answer.map(|answer| answer.status),
            received: exchange.received,
            sent: given.saturating_sub(exchange.given_before),
            queued: exchange.in_flight.as_ref().and_then(|in_flight| in_flight.taken_at()).map(since_it_began),
            first_byte: exchange.answer.map(|answer| since_it_began(answer.at)),
            total: since_it_began(self.now),
            client: exchange.origin.address,
        };
        log::trace!("request {:x} has ended: {end}", exchange.number);
        self.in_flight -= usize::from(exchange.in_flight.is_some());
        if let Destination::Plugin(plugin, _) = &exchange.destination {
            plugin.traffic.count(&end);
        }
        self.keep_buffer(exchange.request);
    }
}

/// Whether these bytes begin a request. Some old clients send an empty line after a body, which is ignored (RFC 9112, section 2.2).
fn is_begun(input: &[u8]) -> bool {
    !matches!(input, b"" | b"\r" | b"\r\n")
}
