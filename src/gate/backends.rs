//! The host's side of the gate: its connections to the host, the requests that go out on them, and the answers that come back.

use super::backend::{Backend, BackendKey, Reading, Use};
use super::body::Body;
use super::chunked::Decoder;
use super::client::{Client, ClientKey, Exchange, Phase, compact};
use super::door::Guest;
use super::event_loop::{Again, EventLoop, OPERATORS, PROBE_EVERY, SWEEP, TURN};
use super::head::Framing;
use super::mailbox::{Left, Next, Parcel, Then};
use super::response::{self, Answer, Framed, Malformed, put};
use super::slots::Slot;
use super::trouble::Trouble;
use super::{GATE_HEADER, Loss, MARK, Origin, refusal};
use crate::room;
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};
use slotmap::{Key, KeyData};
use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

/// Connections to the host that are opened as soon as a request waits: more of them than that make quick plugins no quicker.
const QUICK: usize = 32;

/// How long a request waits, while none of them comes free, before another is opened: all of them are then taken by answers that are
/// slow to come. They are opened one by one: a burst is what the library behind cannot take.
const GROW_AFTER: Duration = Duration::from_millis(2);

/// How long it waits while others come free all the time, and it is just not its turn yet.
const GROW_AT_LAST: Duration = Duration::from_millis(50);

/// How long one is kept that is not used, and how many are kept all the same.
const KEEP: Duration = Duration::from_secs(3);
const KEPT: usize = 4;

/// Pause after one that could not be opened, such as for want of files.
const OPEN_PAUSE: Duration = Duration::from_millis(100);

/// Time for a new connection to be answered on, after which nobody is there.
const OPEN_TIME: Duration = Duration::from_secs(3);

/// Bytes of a body that are put in one write.
const PIECE: usize = 64 * 1024;

/// Largest body that is announced by its length: the library behind allocates what is left of one that is not read to its end. Larger
/// ones go in chunks.
const LARGEST_ANNOUNCED: u64 = 16 << 20;

/// Why an answer is not whole that was whole as far as it came.
const BROKE_OFF: &str = "it broke off";

/// What ends the first line of a canonical head.
const VERSION: &[u8] = b" HTTP/1.1\r\n";

/// Answers taken from the mailbox at a time, before the connections get their turn.
const PARCELS: usize = 256;

/// Files that a connection takes: its own, the library's two, and that with which the library waits for the next. With fewer left the
/// library would take no more connections for ever, so it is not asked to.
const FILES: usize = 4;

impl EventLoop {
    /// Gives a request a connection to the host, or has it wait for one.
    pub(super) fn place(&mut self, key: ClientKey) {
        if self.board(key) {
            return;
        }
        let Some(client) = self.clients.get_mut(key) else { return };
        client.deadline = Some(self.now + self.limits.place_timeout);
        if client.guest == Some(Guest::Operator) {
            // Whoever waits for one of the clients' places must not stand in the way of those that are the operator's.
            self.waiting.push_front((key, self.now));
        } else {
            self.waiting.push_back((key, self.now));
        }
        self.serve_waiting();
    }

    /// Whether there is a place inside for a request of this client: the last of them are the operator's alone.
    fn has_place(&self, key: ClientKey) -> bool {
        let is_operator = |key: ClientKey| self.clients.get(key).is_some_and(|client| client.guest == Some(Guest::Operator));
        let is_anybody =
            |backend: &&Backend| matches!(backend.user, Use::Busy(client) if !backend.aboard && !is_operator(client));
        // Seldom are so many in use that they have to be counted.
        self.connections() - self.free.len() < self.backing.most
            || is_operator(key)
            || self.backends.values().filter(is_anybody).count() < self.backing.most
    }

    /// How many connections there are for one request at a time.
    fn connections(&self) -> usize {
        self.backends.len() - self.aboard - usize::from(self.shared.is_some())
    }

    /// Gives connections that are free to requests that wait, and opens another where that is due.
    pub(super) fn serve_waiting(&mut self) {
        if self.shared.is_none()
            && let Some(key) = self.free.pop()
        {
            self.backends[key].user = Use::Shared;
            self.shared = Some(key);
        }
        while let Some((key, _)) = self.waiting.front() {
            let key = *key;
            if self.clients.get(key).is_none_or(|client| client.phase != Phase::Waiting) || self.board(key) {
                self.waiting.pop_front();
            } else if !self.has_place(key) {
                break;
            } else if let Some(backend) = self.free.pop() {
                self.waiting.pop_front();
                self.start(key, backend);
            } else {
                break;
            }
        }
        if self.grow_at().is_some_and(|at| at <= self.now) {
            self.open();
        }
    }

    /// When another connection is to be opened, if one is.
    pub(super) fn grow_at(&self) -> Option<Instant> {
        if self.opening.is_some() || self.connections() >= self.backing.most + OPERATORS {
            return None;
        }
        if self.connections() < KEPT && !self.is_draining {
            return Some(self.open_after);
        }
        let (_, since) = self.waiting.front().filter(|(key, _)| self.has_place(*key))?;
        let due = match self.connections() {
            0..QUICK => *since,
            _ => (*since + GROW_AT_LAST).min(self.freed.max(*since) + GROW_AFTER),
        };
        Some(due.max(self.open_after))
    }

    /// Opens a connection, and asks on it whether somebody is there.
    fn open(&mut self) {
        self.opened = self.now;
        self.next_sweep = self.next_sweep.min(self.now + SWEEP);
        let opened = room::spare_files(FILES).and_then(|()| Backend::open(&self.backing.socket, self.now + OPEN_TIME));
        let opened = opened.and_then(|backend| {
            let key = self.backends.insert(backend);
            self.opening = Some(key);
            if let Some(socket) = &self.backends[key].socket {
                self.watch_backend(socket, key)?;
            }
            let backend = &mut self.backends[key];
            write!(backend.out, "GET /healthz HTTP/1.1\r\nhost:\r\n{GATE_HEADER}: {} http - -\r\n\r\n", self.backing.key)?;
            backend.flush()
        });
        if let Err(error) = opened {
            if let Some(key) = self.opening.take() {
                self.drop_backend(key);
            }
            self.open_after = self.now + OPEN_PAUSE;
            let is_gone = matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound);
            self.troubles.came(Trouble::Resources, self.now, || {
                room::explain("the host could not be reached from its own gate", &error).0
            });
            if is_gone {
                self.tell_loss(error.to_string());
            }
        }
    }

    /// Says that nobody is there any more.
    fn tell_loss(&mut self, what: String) {
        // Full: it has been said, and is being seen to.
        self.lost.try_send(Loss::Backing(self.backing.socket.clone(), what)).unwrap_or_default();
    }

    /// Passes on a request that is still coming.
    fn start(&mut self, key: ClientKey, backend_key: BackendKey) {
        let answer_by = self.now + self.backing.answer_time.get();
        let Some(client) = self.clients.get_mut(key) else { return };
        let Some(backend) = self.backends.get_mut(backend_key) else { return };
        client.pass_on(backend_key, answer_by);
        backend.user = Use::Busy(key);
        backend.reading = Reading::Head;
        backend.searched = 0;
        backend.chunked = put_head(&mut backend.out, client, &self.backing.key, backend_key);
        backend.entered = true;
        self.inbox.leave(backend_key.data().as_ffi(), None);
        backend.whole = false;
        // There may be room for more of its body.
        self.again.push(Again::Client(key));
        self.send_body(backend_key);
    }

    /// Passes a request that has come whole on over the shared connection, if there is one. It goes out with those that come in this turn.
    fn board(&mut self, key: ClientKey) -> bool {
        let (Some(shared_key), Some(client)) = (self.shared, self.clients.get_mut(key)) else { return false };
        let Some(exchange) = client.exchange.as_mut().filter(|exchange| exchange.complete) else { return false };
        let address = self.backends.insert(Backend::aboard(key));
        self.aboard += 1;
        let body = exchange.body.take().filter(|body| !body.is_empty());
        let (first, headers) = exchange.lines();
        let headers = headers.to_vec();
        let shared = &mut self.backends[shared_key];
        compact(&mut shared.out, &mut shared.sent);
        let length = (exchange.head.framing != Framing::None).then_some(exchange.received);
        put_first_line(&mut shared.out, first, &self.backing.key, address, length);
        // Once the host stops, each answer says that it is the connection's last, which the gate sees to.
        let outlet = if self.is_draining { None } else { client.lend(self.aboard == 1) };
        self.inbox.leave(address.data().as_ffi(), Some(Left { headers, origin: origin(client), body, outlet }));
        client.pass_on(address, self.now + self.backing.answer_time.get());
        true
    }

    /// Sends what goes over the shared connection.
    pub(super) fn flush_shared(&mut self) {
        let Some(key) = self.shared else { return };
        match self.backends.get_mut(key).map_or(Ok(()), Backend::flush) {
            Ok(()) => self.watch_room(key),
            Err(_) => self.lose_shared(),
        }
    }

    /// The shared connection has ended: what went over it may or may not have come to the host.
    fn lose_shared(&mut self) {
        let Some(key) = self.shared.take() else { return };
        self.drop_backend(key);
        // Those that did are answered, some of them already.
        self.take_parcels();
        let is_begun = |user| match user {
            Use::Busy(client) => {
                self.clients.get(client).and_then(|client| client.exchange.as_ref()).is_some_and(Exchange::take_back_unused)
            }
            _ => false,
        };
        let unanswered = self.backends.iter().filter(|(_, backend)| backend.aboard && !is_begun(backend.user));
        let lost: Vec<_> = unanswered.map(|(key, backend)| (key, backend.user)).collect();
        for (key, user) in lost {
            if let Use::Busy(client) = user {
                self.lost_answer(key, Some(client), &"the connection ended that it was asked for on");
            }
        }
    }

    /// Takes answers from the mailbox.
    pub(super) fn take_parcels(&mut self) {
        for _ in 0..PARCELS {
            let Some((address, parcel)) = self.inbox.take() else { return };
            self.take_parcel(KeyData::from_ffi(address).into(), parcel);
        }
    }

    /// Takes an answer to a request that went over the shared connection, if it is still waited for.
    fn take_parcel(&mut self, key: BackendKey, parcel: Parcel) {
        let Some(backend) = self.backends.get_mut(key).filter(|backend| backend.aboard) else { return };
        let Use::Busy(client) = backend.user else { return };
        match (parcel, &backend.pieces) {
            (Parcel::Answer { answer, bytes, body_at, rest }, None) => {
                let is_whole = rest.is_none();
                backend.pieces = rest;
                if answer.close
                    && let Some(exchange) = self.clients.get_mut(client).and_then(|client| client.exchange.as_mut())
                {
                    exchange.last = true;
                }
                let mut head = self.buffer();
                head.extend_from_slice(&bytes[..body_at]);
                self.begin_answer(client, &answer, head);
                self.pass(Some(client), &bytes[body_at..], is_whole);
                self.inbox.give_back(bytes);
                if is_whole { self.end_answer(key, Some(client)) } else { self.relay(key) }
            }
            (Parcel::More, Some(pieces)) => {
                pieces.hear();
                backend.readable = true;
                self.relay(key);
            }
            (Parcel::Straight { framed, left, then }, None) => {
                self.went_straight(client, framed, &left);
                match then {
                    Then::Straight => {}
                    Then::Pieces(pieces) => {
                        if let Some(backend) = self.backends.get_mut(key) {
                            backend.pieces = Some(pieces);
                            self.relay(key);
                        }
                    }
                    Then::Ended => self.end_answer(key, Some(client)),
                    Then::Broken => self.lost_answer(key, Some(client), &BROKE_OFF),
                }
            }
            // There is one answer to a request.
            _ => {}
        }
    }

    /// Notes that an answer has been begun straight to a client; sends what was left.
    fn went_straight(&mut self, key: ClientKey, framed: Framed, left: &[u8]) {
        let Some(client) = self.clients.get_mut(key) else { return };
        client.begin_answer(framed);
        if !left.is_empty() && client.send(left).is_err() {
            self.close(key);
        }
    }

    /// Sends what there is of a request, and more of its body, as far as the host takes it.
    pub(super) fn send_body(&mut self, key: BackendKey) {
        let Some(backend) = self.backends.get_mut(key) else { return };
        let Use::Busy(client_key) = backend.user else { return };
        let Some(exchange) = self.clients.get_mut(client_key).and_then(|client| client.exchange.as_mut()) else { return };
        let outcome = loop {
            if !backend.whole
                && backend.unsent() < PIECE
                && let Some(body) = &mut exchange.body
            {
                if !body.is_empty() {
                    let piece = usize::try_from(body.len()).unwrap_or(PIECE).min(PIECE);
                    if let Err(error) = put_piece(backend, body, piece) {
                        break Err(error);
                    }
                } else if exchange.complete {
                    backend.whole = true;
                    if backend.chunked {
                        backend.out.extend_from_slice(b"0\r\n\r\n");
                    }
                }
            }
            if let Err(error) = backend.flush() {
                break Err(error);
            }
            let more = !backend.whole && exchange.body.as_ref().is_some_and(|body| !body.is_empty() || exchange.complete);
            if !backend.writable || !more {
                break Ok(());
            }
        };
        self.watch_room(key);
        if let Err(error) = outcome {
            log::debug!("a request could not be passed on: {error}");
            // Its answer may have come all the same.
            self.relay(key);
            if self.backends.get(key).is_some_and(|backend| backend.user == Use::Busy(client_key)) {
                self.refuse(client_key, refusal::LOST);
            }
        }
    }

    /// Something has happened on a connection to the host.
    pub(super) fn backend_ready(&mut self, key: BackendKey, flags: EventFlags) {
        let Some(backend) = self.backends.get_mut(key) else { return };
        backend.readable |= flags.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR);
        backend.writable |= flags.contains(EventFlags::OUT);
        let busy = match backend.user {
            Use::Busy(client) => Some(client),
            Use::Opening(_) => None,
            Use::Free(_) | Use::Shared => {
                // Nothing is to come there but its end; the event may be that of an answer which has been read.
                if !backend.readable || is_silent(backend) {
                    backend.readable = false;
                } else if backend.user == Use::Shared {
                    self.lose_shared();
                } else {
                    self.drop_backend(key);
                }
                return;
            }
        };
        if busy.is_some() && backend.writable && !backend.is_sent() {
            self.send_body(key);
        }
        self.relay(key);
        if let Some(client) = busy {
            // There may be room for more of its body.
            self.drive(client);
        }
    }

    /// Reads what the host has sent and passes it on, as far as the client takes it.
    pub(super) fn relay(&mut self, key: BackendKey) {
        let mut scratch = std::mem::take(&mut self.answers);
        if scratch.is_empty() {
            // It is in use: one answer has led to another.
            return self.again.push(Again::Backend(key));
        }
        let mut turns = 0;
        while let Some(backend) = self.backends.get_mut(key) {
            let client = match backend.user {
                Use::Busy(client) => Some(client),
                Use::Opening(_) => None,
                Use::Free(_) | Use::Shared => break,
            };
            // As long as something waits for the client, what follows waits where it is.
            let held = client.and_then(|client| self.clients.get(client)).is_some_and(|client| client.unsent() > 0);
            if !backend.readable || held {
                break;
            }
            if turns == TURN {
                self.again.push(Again::Backend(key));
                break;
            }
            turns += 1;
            let taken = match (&backend.pieces, &backend.socket) {
                (Some(pieces), _) => match pieces.next() {
                    Next::Piece(piece) => {
                        self.pass(client, &piece, false);
                        self.inbox.give_back(piece);
                        Ok(())
                    }
                    Next::Nothing => {
                        backend.readable = false;
                        continue;
                    }
                    Next::End => {
                        self.pass(client, &[], true);
                        self.end_answer(key, client);
                        Ok(())
                    }
                    Next::Broken => Err(Malformed(BROKE_OFF)),
                },
                (None, Some(socket)) => match rustix::io::read(socket, &mut *scratch) {
                    Ok(0) => Err(Malformed("its connection ended")),
                    Ok(n) => {
                        backend.readable = n == scratch.len();
                        self.take_answer(key, client, &scratch[..n])
                    }
                    Err(Errno::AGAIN) => {
                        backend.readable = false;
                        continue;
                    }
                    Err(Errno::INTR) => continue,
                    Err(error) => {
                        self.lost_answer(key, client, &error);
                        break;
                    }
                },
                (None, None) => break,
            };
            if let Err(Malformed(what)) = taken {
                self.lost_answer(key, client, &what);
                break;
            }
        }
        self.answers = scratch;
    }

    /// An answer cannot be had, or not to its end.
    fn lost_answer(&mut self, key: BackendKey, client: Option<ClientKey>, why: &dyn std::fmt::Display) {
        match client {
            Some(client) if self.clients.contains_key(client) => {
                self.troubles.came(Trouble::Answers, self.now, || format!("an answer could not be passed on: {why}"));
                self.refuse(client, refusal::LOST);
            }
            Some(_) => self.drop_backend(key),
            None => {
                self.drop_backend(key);
                self.tell_loss(format!("a new connection was not answered: {why}"));
            }
        }
    }

    /// Takes bytes that the host has sent.
    fn take_answer(&mut self, key: BackendKey, client: Option<ClientKey>, bytes: &[u8]) -> Result<(), Malformed> {
        // What has come of a head before stands before it.
        let mut gathered = self.backends.get_mut(key).map(|backend| std::mem::take(&mut backend.input)).unwrap_or_default();
        let mut rest = bytes;
        if !gathered.is_empty() {
            gathered.extend_from_slice(bytes);
            rest = &gathered;
        }
        while self.backends.get(key).is_some_and(|backend| matches!(backend.reading, Reading::Head)) {
            let Some(used) = self.take_head(key, client, rest)? else {
                if let Some(backend) = self.backends.get_mut(key) {
                    backend.input = rest.to_vec();
                }
                return Ok(());
            };
            rest = &rest[used..];
            if rest.is_empty() {
                break;
            }
        }
        self.take_pieces(key, client, rest)
    }

    /// Takes the head of an answer; says how many bytes it was, if it is whole.
    fn take_head(&mut self, key: BackendKey, client_key: Option<ClientKey>, bytes: &[u8]) -> Result<Option<usize>, Malformed> {
        let mut head = self.buffer();
        let Some(backend) = self.backends.get_mut(key) else { return Ok(Some(bytes.len())) };
        let Some((answer, used)) = response::read(bytes, &mut backend.searched, &mut head)? else {
            self.keep_buffer(head);
            return Ok(None);
        };
        backend.searched = 0;
        if answer.status < 200 {
            self.keep_buffer(head);
            return Ok(Some(used));
        }
        backend.spent |= answer.close;
        let Some(client_key) = client_key else {
            self.keep_buffer(head);
            return if answer.status == 200 && !answer.chunked {
                self.backends[key].reading = Reading::Length(answer.length.unwrap_or(0));
                Ok(Some(used))
            } else {
                Err(Malformed("the host does not know its own gate"))
            };
        };
        let Some(client) = self.clients.get_mut(client_key) else { return Ok(Some(bytes.len())) };
        let Some(exchange) = &mut client.exchange else { return Ok(Some(bytes.len())) };
        let has_body = answer.has_body(exchange.head.head);
        backend.reading = match (has_body, answer.chunked, answer.length) {
            (false, ..) => Reading::Length(0),
            (true, true, length) => Reading::Chunks(Decoder::new(), length),
            (true, false, Some(length)) => Reading::Length(length),
            (true, false, None) => return Err(Malformed("it has no length")),
        };
        if answer.close && !backend.is_sent() {
            // The host wants no more of the body, and waits to hear that no more comes.
            backend.whole = true;
            backend.out.clear();
            backend.sent = 0;
            if let Some(socket) = &backend.socket {
                shutdown(socket, Shutdown::Write).unwrap_or_default();
            }
            exchange.body = None;
        }
        self.begin_answer(client_key, &answer, head);
        Ok(Some(used))
    }

    /// Frames the head of an answer; it goes out with the first of the body.
    fn begin_answer(&mut self, key: ClientKey, answer: &Answer, mut head: Vec<u8>) {
        let draining = self.is_draining;
        let Some(client) = self.clients.get_mut(key) else { return };
        let Some(exchange) = &mut client.exchange else { return };
        exchange.last |= !exchange.complete || draining;
        let framed = response::frame(&mut head, answer, exchange.terms());
        client.begin_answer(framed);
        if client.out.is_empty() {
            let empty = std::mem::replace(&mut client.out, head);
            self.keep_buffer(empty);
        } else {
            client.out.extend_from_slice(&head);
            self.keep_buffer(head);
        }
    }

    /// Takes bytes of an answer's body.
    fn take_pieces(&mut self, key: BackendKey, client: Option<ClientKey>, bytes: &[u8]) -> Result<(), Malformed> {
        let mut rest = bytes;
        let ended = loop {
            let Some(backend) = self.backends.get_mut(key) else { return Ok(()) };
            match &mut backend.reading {
                Reading::Head => break false,
                Reading::Length(left) => {
                    let n = usize::try_from(*left).unwrap_or(usize::MAX).min(rest.len());
                    let (piece, beyond) = rest.split_at(n);
                    *left -= n as u64;
                    let ended = *left == 0;
                    if ended && !beyond.is_empty() {
                        // What comes without having been asked for is nobody's.
                        backend.spent = true;
                    }
                    self.pass(client, piece, ended);
                    break ended;
                }
                Reading::Chunks(decoder, declared) => {
                    if rest.is_empty() {
                        self.pass(client, &[], false);
                        break false;
                    }
                    let step = decoder.step(rest).map_err(|_| Malformed(BROKE_OFF))?;
                    if let Some(left) = declared {
                        *left = left.checked_sub(step.data.len() as u64).ok_or(Malformed("it is longer than was declared"))?;
                        if step.ended && *left > 0 {
                            return Err(Malformed("it is shorter than was declared"));
                        }
                    }
                    rest = &rest[step.used..];
                    if step.ended {
                        backend.spent |= !rest.is_empty();
                    }
                    if !step.data.is_empty() || step.ended {
                        self.pass(client, step.data, step.ended);
                    }
                    if step.ended {
                        break true;
                    }
                }
            }
        };
        if ended {
            self.end_answer(key, client);
        }
        Ok(())
    }

    /// Passes bytes of a body on to a client.
    fn pass(&mut self, client_key: Option<ClientKey>, bytes: &[u8], ended: bool) {
        let Some(client_key) = client_key else { return };
        let Some(client) = self.clients.get_mut(client_key) else { return };
        let chunked = client.exchange.as_ref().is_some_and(|exchange| exchange.chunked);
        let sent = if chunked {
            if !bytes.is_empty() {
                response::put_size(&mut client.out, bytes.len());
                client.queue(bytes);
                client.out.extend_from_slice(b"\r\n");
            }
            if ended {
                client.out.extend_from_slice(b"0\r\n\r\n");
            }
            client.flush()
        } else {
            client.send(bytes)
        };
        if sent.is_err() {
            self.close(client_key);
        }
    }

    /// An answer has come to its end.
    fn end_answer(&mut self, key: BackendKey, client: Option<ClientKey>) {
        let slot = self.leave_entry(key);
        if let Some(backend) = self.backends.get_mut(key) {
            if self.opening == Some(key) {
                self.opening = None;
            }
            if backend.spent || !backend.is_sent() {
                self.drop_backend(key);
            } else {
                backend.user = Use::Free(self.now);
                self.freed = self.now;
                backend.reading = Reading::Head;
                self.free.push(key);
            }
        }
        if let Some(client) = client {
            if let Some(client) = self.clients.get_mut(client) {
                // The connection counts for the plugin until the client has taken the answer.
                client.slot = slot.filter(|_| !client.is_flushed());
                if let Some(exchange) = &mut client.exchange {
                    exchange.backend = None;
                }
            }
            self.answered(client);
        }
        self.serve_waiting();
    }

    /// Ends a connection to the host.
    pub(super) fn drop_backend(&mut self, key: BackendKey) {
        if self.opening == Some(key) {
            self.opening = None;
        }
        self.leave_entry(key);
        let Some(backend) = self.backends.remove(key) else { return };
        self.aboard -= usize::from(backend.aboard);
        if matches!(backend.user, Use::Free(_)) {
            self.free.retain(|free| *free != key);
        }
    }

    /// Removes a request's entry from the mailbox; gives the plugin's slot that its connection held.
    fn leave_entry(&mut self, key: BackendKey) -> Option<Slot> {
        let backend = self.backends.get_mut(key)?;
        std::mem::take(&mut backend.entered).then(|| self.inbox.withdraw(key.data().as_ffi())).flatten()
    }

    /// Until when the one that has been free for longest is kept, if it is not needed.
    pub(super) fn spare_until(&self) -> Option<Instant> {
        let longest = self.free.first().filter(|_| self.free.len() > KEPT)?;
        match self.backends.get(*longest)?.user {
            Use::Free(since) => Some(since + KEEP),
            Use::Opening(_) | Use::Busy(_) | Use::Shared => None,
        }
    }

    /// Looks after connections that are not answered on, or not needed, and after the host itself.
    pub(super) fn sweep_backends(&mut self) {
        if let Some(key) = self.opening
            && self.backends.get(key).is_some_and(|backend| matches!(backend.user, Use::Opening(until) if self.now >= until))
        {
            self.drop_backend(key);
            self.tell_loss(format!("a new connection was not answered for {} s", OPEN_TIME.as_secs()));
        }
        while self.spare_until().is_some_and(|until| until <= self.now)
            && let Some(key) = self.free.first().copied()
        {
            self.drop_backend(key);
        }
        if self.opening.is_none() && self.now - self.opened >= PROBE_EVERY && !self.is_draining {
            // The host is asked on a fresh connection, which then takes the place of an older one.
            if self.free.len() >= KEPT
                && let Some(oldest) = self.free.first().copied()
            {
                self.drop_backend(oldest);
            }
            if self.connections() < self.backing.most + OPERATORS {
                self.open();
            }
        }
    }
}

/// Appends what goes over the shared connection of a request that has come whole, with the length of the body where it has one.
fn put_first_line(out: &mut Vec<u8>, first: &[u8], gate: &str, address: BackendKey, length: Option<u64>) {
    out.extend_from_slice(first.strip_suffix(VERSION).unwrap_or(first));
    put(out, format_args!("{MARK}{gate}{:x}", address.data().as_ffi()));
    if let Some(length) = length {
        put(out, format_args!(".{length}"));
    }
    out.extend_from_slice(VERSION);
    out.extend_from_slice(b"\r\n");
}

/// Appends the head of a client's request as the host gets it over a connection of its own, and says whether its body is to follow in
/// chunks.
fn put_head(out: &mut Vec<u8>, client: &Client, gate: &str, entry: BackendKey) -> bool {
    let Some(exchange) = &client.exchange else { return false };
    out.extend_from_slice(&exchange.request);
    let (length, chunked) = match exchange.head.framing {
        Framing::None => (None, false),
        Framing::Length(length) if length <= LARGEST_ANNOUNCED => {
            put(out, format_args!("content-length: {length}\r\n"));
            (None, false)
        }
        Framing::Length(length) => (Some(length), true),
        Framing::Chunked => (None, true),
    };
    if chunked {
        out.extend_from_slice(b"transfer-encoding: chunked\r\n");
    }
    let Origin { address, https } = origin(client);
    put(out, format_args!("{GATE_HEADER}: {gate} {} ", if https { "https" } else { "http" }));
    match address {
        Some(address) => put(out, format_args!("{address} ")),
        None => out.extend_from_slice(b"- "),
    }
    match length {
        Some(length) => put(out, format_args!("{length} ")),
        None => out.extend_from_slice(b"- "),
    }
    put(out, format_args!("{:x}\r\n\r\n", entry.data().as_ffi()));
    chunked
}

/// Where a client's request is from: by its own word where it is a proxy.
fn origin(client: &Client) -> Origin {
    match (client.guest, &client.exchange) {
        (Some(Guest::Proxy), Some(Exchange { head, .. })) => Origin {
            address: head.forwarded_for.or(client.address),
            https: head.forwarded_https.unwrap_or_else(|| client.stream.is_tls()),
        },
        _ => Origin { address: client.address, https: client.stream.is_tls() },
    }
}

/// Whether nothing has come on a connection, its end neither.
fn is_silent(backend: &Backend) -> bool {
    backend.socket.as_ref().is_some_and(|socket| rustix::io::read(socket, &mut [0; 1]) == Err(Errno::AGAIN))
}

/// Puts a piece of a body behind what waits to be sent.
fn put_piece(backend: &mut Backend, body: &mut Body, most: usize) -> io::Result<()> {
    compact(&mut backend.out, &mut backend.sent);
    // In chunks its size stands before it, and is known only afterwards: what is taken may be less than there is.
    let mut piece = vec![0; most];
    let taken = body.read(&mut piece)?;
    if backend.chunked {
        response::put_size(&mut backend.out, taken);
    }
    backend.out.extend_from_slice(&piece[..taken]);
    if backend.chunked {
        backend.out.extend_from_slice(b"\r\n");
    }
    Ok(())
}
