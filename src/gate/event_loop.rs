//! The gate's one thread: it waits for what happens on any connection, and does what can be done about it at once.

use super::connection::{Connection, ConnectionKey, Phase};
use super::listener::{Listener, PeerKind};
use super::log_topics::{LogTopic, LogTopics};
use super::min_rate::{Filling, ReadLimits, idle_time};
use super::per_address::PerAddress;
use super::requests::LEAST_WINDOW;
use super::router::Router;
use super::sock_diag::SockDiag;
use super::stream::Stream;
use super::{ClientLimits, Order, Settings};
use crate::http::body::BodySpace;
use crate::http::errors;
use crate::http::proxies::Networks;
use crate::http::request_end::Outcome;
use crate::http::response_channel::{MAX_WHOLE, ResponseChannel, Responses};
use crate::plugins::plugin::{AnswerTime, STARTING_RETRY_AFTER};
use crate::system::rlimits;
use crossbeam_channel::{Receiver, Sender};
use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustls::ServerConfig;
use slotmap::{Key, KeyData, SlotMap};
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Letters of the random part that all request ids of one run begin with: 48 bits, so that no two runs share it.
const ID_PREFIX: usize = 12;

/// Interval at which deadlines are checked.
pub(super) const SWEEP: Duration = Duration::from_millis(100);

/// Samples of a slow client's unread bytes within `--write-timeout`; each takes a few system calls.
const SAMPLES: u32 = 10;

/// Longest time a reverse proxy may read nothing of an answer, if it has read enough before. It reads in bursts, whenever the buffer of its own
/// client has room, and gives up a client that has stopped after 60 s (`send_timeout` of nginx), which must come first.
const PROXY_PAUSE: Duration = Duration::from_secs(75);

/// Longest time between two checks of deadlines.
const LONGEST_SWEEP: Duration = Duration::from_secs(10);

/// Interval at which requests that arrived before the end of the first scan are routed again.
const HELD_TICK: Duration = Duration::from_millis(20);

/// Connections accepted before the existing ones get their turn.
const ACCEPTS: usize = 64;

/// Connections beyond `--max-connections` that get a 503 and are then watched until the client closes. Further ones are closed at once.
const MAX_TURNED_AWAY: usize = 64;

/// Events fetched per call.
const EVENTS: usize = 256;

/// Time in which a client has to read the last answer and stop sending, before its connection is closed.
pub(super) const LINGER: Duration = Duration::from_secs(1);

/// Time for which an idle connection is kept once the host stops, so that a request on its way is still answered.
const FAREWELL: Duration = Duration::from_millis(250);

/// Time for connections that are being established to reach a listener that accepts no others: one round trip.
const ACCEPT_GRACE: Duration = Duration::from_millis(100);

/// Buffers kept for reuse.
const KEPT_BUFFERS: usize = 32;

/// Largest buffer kept for reuse, in bytes.
const KEPT_BUFFER: usize = MAX_WHOLE;

/// Reads from one connection before the others get their turn.
pub(super) const TURN: usize = 16;

/// Size of the first read of a request, in bytes: most heads are shorter, and bytes of a body that are read with the head have to be
/// copied.
pub(super) const FIRST_READ: usize = 4 * 1024;

/// Size of further reads, in bytes.
pub(super) const SCRATCH: usize = 64 * 1024;

/// Kind of an event, in the top bits of the lower half of its number. No key's index reaches them.
const KIND_SHIFT: u64 = 28;
const KIND_MASK: u64 = 0xf << KIND_SHIFT;
const CONNECTION: u64 = 1;
const LISTENER: u64 = 2;
const WAKER: u64 = 3;
const APPLICATION: u64 = 4;

/// Events that are watched on each connection, edge-triggered.
pub(super) const INCOMING: EventFlags = EventFlags::IN.union(EventFlags::RDHUP).union(EventFlags::ET);

/// The current load, which decides how long an idle connection is kept.
struct IdleTerms {
    longest: Duration,
    all: Filling,
    counts: PerAddress,
    per_address: u32,
}

impl IdleTerms {
    fn time(&self, connection: &Connection) -> Duration {
        let address = connection.address.filter(|_| connection.peer == Some(PeerKind::Public));
        let here = |address| Filling { taken: self.counts.of(address).into(), most: self.per_address.into() };
        idle_time(self.longest, self.all, address.map(here))
    }
}

/// The gate at work.
pub(super) struct EventLoop {
    pub(super) epoll: OwnedFd,
    orders: Receiver<Order>,
    pub(super) channel: Arc<ResponseChannel>,
    pub(super) responses: Responses,
    pub(super) limits: ClientLimits,
    pub(super) answer_time: AnswerTime,
    pub(super) router: Arc<Router>,
    /// What the ids of this run's requests begin with, and the number of the last request.
    pub(super) id_prefix: Arc<str>,
    pub(super) last_number: u64,
    listeners: Vec<Listener>,
    /// Which of them have connections to accept.
    pending: Vec<bool>,
    pub(super) connections: SlotMap<ConnectionKey, Connection>,
    /// How many of them are clients', and how many are being refused.
    clients: usize,
    turned_away: usize,
    /// How many of them are tunnels, or the sockets of plugins.
    pub(super) tunnels: usize,
    /// Bytes of messages that these sockets hold.
    pub(super) socket_memory: u64,
    pub(super) per_address: PerAddress,
    /// Networks of trusted proxies.
    pub(super) proxies: Networks,
    /// Requests that were submitted and are not answered.
    pub(super) in_flight: usize,
    /// Connections whose requests wait for the first scan.
    pub(super) held: Vec<ConnectionKey>,
    /// Connections that have had their turn and have more to do.
    pub(super) again: Vec<ConnectionKey>,
    pub(super) body_space: Arc<BodySpace>,
    pub(super) log_topics: LogTopics,
    sock_diag: SockDiag,
    /// Buffer for reads.
    pub(super) scratch: Vec<u8>,
    pub(super) buffers: Vec<Vec<u8>>,
    /// A spare file descriptor, given up to refuse a client when there are no others.
    reserve: Option<OwnedFd>,
    pub(super) now: Instant,
    swept: Instant,
    pub(super) next_sweep: Instant,
    /// Set when the host stops: tells the waiting thread that all requests are being answered.
    draining: Option<Sender<()>>,
    pub(super) is_draining: bool,
    /// When the listeners are closed.
    close_listeners_at: Option<Instant>,
    ending: Option<(Instant, Sender<()>)>,
}

impl EventLoop {
    pub(super) fn new(
        listeners: Vec<Listener>,
        settings: Settings,
        router: Arc<Router>,
        orders: Receiver<Order>,
        channel: Arc<ResponseChannel>,
        responses: Responses,
    ) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        // Each wake is an event of its own, so nothing need be read there.
        epoll::add(&epoll, &**responses.waker(), EventData::new_u64(WAKER << KIND_SHIFT), EventFlags::IN | EventFlags::ET)?;
        for (index, listener) in listeners.iter().enumerate() {
            let data = EventData::new_u64((LISTENER << KIND_SHIFT) | index as u64);
            epoll::add(&epoll, listener, data, EventFlags::IN | EventFlags::ET)?;
        }
        let now = Instant::now();
        let Settings { limits, proxies, spool, answer_time } = settings;
        // A body that is passed on while it arrives occupies at most this, one read, and the rest of the read before it.
        let most = limits.body_buffer.max(LEAST_WINDOW) + 2 * LEAST_WINDOW;
        let body_space = BodySpace::new(limits.body_memory, limits.body_disk, spool, most);
        Ok(Self {
            epoll,
            orders,
            channel,
            responses,
            limits,
            answer_time,
            router,
            id_prefix: Uuid::new_v4().simple().to_string()[..ID_PREFIX].into(),
            last_number: 0,
            pending: vec![true; listeners.len()],
            listeners,
            connections: SlotMap::with_key(),
            clients: 0,
            turned_away: 0,
            tunnels: 0,
            socket_memory: 0,
            per_address: PerAddress::default(),
            proxies,
            in_flight: 0,
            held: Vec::new(),
            again: Vec::new(),
            body_space,
            log_topics: LogTopics::default(),
            sock_diag: SockDiag::open(),
            scratch: vec![0; SCRATCH],
            buffers: Vec::new(),
            reserve: rlimits::spare_file().ok(),
            now,
            swept: now,
            next_sweep: now,
            draining: None,
            is_draining: false,
            close_listeners_at: None,
            ending: None,
        })
    }

    /// Works until it is told to end.
    pub(super) fn run(mut self) -> io::Result<()> {
        let mut events = Vec::with_capacity(EVENTS);
        loop {
            self.responses.waker().go_to_sleep();
            let timeout = self.timeout();
            events.clear();
            match epoll::wait(&self.epoll, spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            self.responses.waker().wake_up();
            self.now = Instant::now();
            // Before the events, so that a client that closes after its answer does not count as one that left before.
            self.take_responses();
            for event in &events {
                let (flags, data) = (event.flags, event.data.u64());
                match (data & KIND_MASK) >> KIND_SHIFT {
                    CONNECTION => self.connection_ready(KeyData::from_ffi(data & !KIND_MASK).into(), flags),
                    APPLICATION => self.application_ready(KeyData::from_ffi(data & !KIND_MASK).into(), flags),
                    LISTENER => {
                        let index = usize::try_from(data & !KIND_MASK).unwrap_or(usize::MAX);
                        if let Some(pending) = self.pending.get_mut(index) {
                            *pending = true;
                        }
                    }
                    _ => {}
                }
            }
            self.obey();
            self.accept();
            for key in std::mem::take(&mut self.again) {
                self.relay(key);
                self.drive(key);
            }
            self.route_held();
            if !events.is_empty() {
                self.next_sweep = self.next_sweep.min(self.now + SWEEP);
            }
            if self.now >= self.next_sweep {
                self.sweep();
            }
            if let Some((deadline, _)) = &self.ending
                && (self.now >= *deadline || self.connections.values().all(Connection::is_done))
            {
                return Ok(());
            }
        }
    }

    /// How long to wait for events.
    fn timeout(&self) -> Option<Timespec> {
        let mut wait = self.next_sweep.saturating_duration_since(Instant::now());
        let pending = self.pending.iter().any(|pending| *pending) && self.reserve.is_some();
        if pending || !self.again.is_empty() || !self.responses.is_empty() || !self.orders.is_empty() {
            wait = Duration::ZERO;
        } else if !self.held.is_empty() {
            wait = wait.min(HELD_TICK);
        }
        Timespec::try_from(wait).ok()
    }

    /// Executes the orders of other threads.
    fn obey(&mut self) {
        while let Ok(order) = self.orders.try_recv() {
            match order {
                Order::Certificates(config) => self.set_certificates(&config),
                Order::Drain(drained) => self.drain(drained),
                Order::End(deadline, ended) => {
                    self.ending = Some((deadline, ended));
                    let keys: Vec<_> = self.connections.keys().collect();
                    for key in keys {
                        let Some(connection) = self.connections.get(key) else { continue };
                        match (connection.phase, &connection.exchange) {
                            // The plugins have ended, so the rest of each answer is in the host. It is sent while there is time.
                            (Phase::Closing | Phase::Lingering, _) => {}
                            (_, Some(exchange)) if exchange.answer.is_some() => {}
                            (Phase::Idle | Phase::Tunnel | Phase::WebSocket, _) => self.close(key),
                            _ => self.refuse(key, errors::STOPPING),
                        }
                    }
                }
            }
        }
    }

    fn set_certificates(&mut self, config: &Arc<ServerConfig>) {
        for listener in &mut self.listeners {
            if let Some(tls) = &mut listener.tls {
                *tls = Arc::clone(config);
            }
        }
    }

    /// Accepts only the connections that are being made, and has each connection end with the answer it waits for.
    fn drain(&mut self, drained: Sender<()>) {
        self.draining = Some(drained);
        self.is_draining = true;
        self.listeners.iter().for_each(Listener::stop);
        self.close_listeners_at = Some(self.now + ACCEPT_GRACE);
        // Each answer that begins from now on says that it is the connection's last.
        for exchange in self.connections.values().filter_map(|connection| connection.exchange.as_ref()) {
            if let Some(in_flight) = &exchange.in_flight {
                in_flight.writer.set_last(true);
            }
        }
        let farewell = self.now + FAREWELL;
        for connection in self.connections.values_mut().filter(|connection| connection.phase == Phase::Idle) {
            connection.deadline = connection.deadline.map(|deadline| deadline.min(farewell));
        }
        self.close_sockets();
        self.next_sweep = self.now + SWEEP;
    }

    /// Accepts what waits at the listeners, and closes them.
    fn close_listeners(&mut self) {
        self.close_listeners_at = None;
        self.pending.fill(true);
        while self.pending.iter().any(|pending| *pending) && self.reserve.is_some() {
            self.accept();
        }
        self.listeners.clear();
        self.pending.clear();
    }

    // --- Listeners ------------------------------------------------------------------------------------------

    /// Takes connections that wait.
    fn accept(&mut self) {
        for index in 0..self.listeners.len() {
            for _ in 0..ACCEPTS {
                if !self.pending[index] {
                    break;
                }
                match self.listeners[index].accept() {
                    Ok(Some((socket, address))) => self.enter(index, socket, address),
                    Ok(None) => self.pending[index] = false,
                    // Also where nobody waits: the kernel wants the file first.
                    Err(error) => {
                        if !self.turn_away_at(index, &error.into()) {
                            return;
                        }
                    }
                }
            }
        }
    }

    /// Uses the reserve file descriptor to refuse a connection that waits at a listener. False if there is no reserve.
    fn turn_away_at(&mut self, index: usize, error: &io::Error) -> bool {
        if self.reserve.take().is_none() {
            return false;
        }
        match self.listeners[index].accept() {
            Ok(Some((socket, _))) => {
                self.log_topics.hit(LogTopic::Resources, self.now, || rlimits::explain("a connection was not taken", error).0);
                tell(&socket, &errors::last_answer(errors::FULL, false, None));
            }
            Ok(None) => self.pending[index] = false,
            Err(_) => {}
        }
        self.reserve = rlimits::spare_file().ok();
        self.reserve.is_some()
    }

    /// Accepts a connection, or refuses it at a limit.
    fn enter(&mut self, listener: usize, socket: OwnedFd, address: Option<IpAddr>) {
        let peer = match (self.listeners[listener].peer, address) {
            (PeerKind::Public, Some(address)) if self.proxies.contain(address) => PeerKind::Proxy,
            (peer, _) => peer,
        };
        let most = self.limits.max_connections as usize;
        let per_address = self.limits.max_connections_per_address;
        let here = address.map_or(0, |address| self.per_address.of(address));
        let full = match peer {
            _ if self.clients >= most => Some(LogTopic::Connections),
            PeerKind::Public if here >= per_address => Some(LogTopic::Address),
            _ => None,
        };
        let tls = self.listeners[listener].tls.clone();
        if let Some(topic) = full {
            self.log_topics.hit(topic, self.now, || match (topic, address) {
                (LogTopic::Address, Some(address)) => {
                    format!(
                        "{address} has {per_address} connections, and another was refused (serve --max-connections-per-address)"
                    )
                }
                _ => format!("all {most} connections are taken, and another was refused (serve --max-connections)"),
            });
            // A client that expects TLS could not read it.
            if tls.is_none() {
                self.turn_away(socket);
            }
            return;
        }
        // The TLS handshake comes first, and has a time limit of its own.
        let deadline = self.now + self.limits.head_timeout;
        let Some(key) = self.admit(Some(peer), socket, tls.as_ref(), address, deadline) else { return };
        self.clients += 1;
        if peer == PeerKind::Public {
            self.connections[key].counted = address.and_then(|address| self.per_address.count(address, per_address));
        }
        if tls.is_none() {
            self.connections[key].deadline = Some(self.idle_until(&self.connections[key]));
        }
        // Most clients have sent their request by now. It is read once all that wait were accepted: a client that is answered here might
        // connect again, and be accepted before the end of its last connection is seen.
        self.again.push(key);
    }

    fn admit(
        &mut self,
        peer: Option<PeerKind>,
        socket: OwnedFd,
        tls: Option<&Arc<ServerConfig>>,
        address: Option<IpAddr>,
        deadline: Instant,
    ) -> Option<ConnectionKey> {
        let stream = Stream::new(socket, tls).ok()?;
        let key = self.connections.insert(Connection::new(stream, address, peer, deadline));
        match epoll::add(
            &self.epoll,
            &self.connections[key].stream,
            event_data(CONNECTION, key.data()),
            INCOMING | EventFlags::OUT,
        ) {
            Ok(()) => Some(key),
            Err(error) => {
                self.log_topics
                    .hit(LogTopic::Resources, self.now, || rlimits::explain("a connection was not taken", &error.into()).0);
                self.connections.remove(key);
                None
            }
        }
    }

    /// Refuses a connection.
    fn turn_away(&mut self, socket: OwnedFd) {
        let answer = errors::last_answer(errors::FULL, false, None);
        if self.turned_away >= MAX_TURNED_AWAY {
            return tell(&socket, &answer);
        }
        if let Some(key) = self.admit(None, socket, None, None, self.now + LINGER) {
            self.turned_away += 1;
            let connection = &mut self.connections[key];
            connection.phase = Phase::Closing;
            if connection.send(&answer).is_err() {
                return self.close(key);
            }
            self.drive(key);
        }
    }

    /// Until when an idle connection is kept from now on.
    pub(super) fn idle_until(&self, connection: &Connection) -> Instant {
        self.now + self.idle_terms().time(connection)
    }

    fn idle_terms(&self) -> IdleTerms {
        let longest = self.limits.idle_timeout;
        IdleTerms {
            longest: if self.is_draining { longest.min(FAREWELL) } else { longest },
            all: Filling { taken: self.clients as u64, most: self.limits.max_connections.into() },
            counts: self.per_address.clone(),
            per_address: self.limits.max_connections_per_address,
        }
    }

    /// Ends a connection now.
    pub(super) fn close(&mut self, key: ConnectionKey) {
        self.end_exchange(key, Outcome::Cancelled);
        let Some(mut connection) = self.connections.remove(key) else { return };
        if connection.phase == Phase::Idle {
            // A client that has gone already need not hear it.
            connection.stream.say_end().ok();
        }
        match connection.peer {
            None => self.turned_away -= 1,
            Some(_) => self.clients -= 1,
        }
        self.tunnels -= usize::from(connection.tunnel.is_some());
        self.forget_socket(connection.websocket.take());
        self.keep_buffer(connection.input);
        self.keep_buffer(connection.out);
    }

    // --- Time ---------------------------------------------------------------------------------------------

    /// Checks all deadlines.
    fn sweep(&mut self) {
        self.look_after_connections();
        if self.close_listeners_at.is_some_and(|at| self.now >= at) {
            self.close_listeners();
        }
        self.log_topics.log_ends(self.now);
        if self.reserve.is_none() {
            self.reserve = rlimits::spare_file().ok();
        }
        if self.close_listeners_at.is_none() && self.draining.is_some() {
            let unanswered = self.connections.values().any(|connection| match connection.phase {
                Phase::Idle | Phase::Head | Phase::Body | Phase::Held => true,
                Phase::Running => connection.exchange.as_ref().is_some_and(|exchange| exchange.answer.is_none()),
                Phase::Closing | Phase::Lingering | Phase::Tunnel | Phase::WebSocket => false,
            });
            if !unanswered {
                self.draining = None;
            }
        }
        if self.draining.is_some() || self.ending.is_some() || self.reserve.is_none() {
            self.next_sweep = self.next_sweep.min(self.now + SWEEP);
        } else if self.log_topics.is_open() {
            self.next_sweep = self.next_sweep.min(self.now + Duration::from_secs(1));
        }
    }

    /// Holds each connection to its deadline and to the least rates, and says when that is due again.
    fn look_after_connections(&mut self) {
        // At most one interval: after a long time without deadlines, no client was waited for all that time.
        let passed = (self.now - self.swept).min(2 * SWEEP);
        self.swept = self.now;
        let mut next = self.now + LONGEST_SWEEP;
        let window = self.window();
        let mut late = Vec::new();
        let mut unseen = Vec::new();
        let sample_interval = (self.limits.write_timeout / SAMPLES).max(SWEEP);
        let idle_terms = self.idle_terms();
        for (key, connection) in &mut self.connections {
            if connection.phase == Phase::Idle {
                // The number of connections may have grown since it became idle.
                let until = self.now + idle_terms.time(connection);
                connection.deadline = connection.deadline.map(|deadline| deadline.min(until));
            }
            // Whoever reads nothing from a tunnel or a socket holds up that one alone.
            let waits_to_send = connection.waits_to_send() && !matches!(connection.phase, Phase::Tunnel | Phase::WebSocket);
            let limits = ReadLimits {
                patience: self.limits.write_timeout,
                rate: self.limits.min_rate,
                longest_pause: if connection.peer == Some(PeerKind::Proxy) { PROXY_PAUSE } else { Duration::ZERO },
            };
            if waits_to_send {
                connection.read_rate.wait(passed);
                if connection.read_rate.is_due(sample_interval) {
                    let unread = self.sock_diag.unread(connection.stream.file());
                    if unread.is_none() {
                        unseen.push(key);
                    }
                    let given = connection.given();
                    connection.read_rate.sample(given, unread, &limits);
                }
            }
            let wants_body = connection.wants_body(window) && !connection.readable;
            if wants_body && let Some(exchange) = &mut connection.exchange {
                exchange.body_rate.wait(passed);
            }
            let is_slow_reader = waits_to_send && connection.read_rate.is_too_slow(&limits);
            let is_slow_sender = wants_body
                && connection
                    .exchange
                    .as_ref()
                    .is_some_and(|exchange| exchange.body_rate.is_too_slow(self.limits.body_timeout, self.limits.min_rate));
            if is_slow_reader || is_slow_sender || connection.deadline.is_some_and(|deadline| self.now >= deadline) {
                late.push((key, is_slow_reader, is_slow_sender));
            }
            if waits_to_send || wants_body {
                next = self.now + SWEEP;
            } else if let Some(deadline) = connection.deadline {
                next = next.min(deadline.max(self.now + SWEEP / 10));
            }
        }
        self.next_sweep = next;
        for (key, is_slow_reader, is_slow_sender) in late {
            if is_slow_reader {
                self.cut(key);
            } else if is_slow_sender {
                self.refuse(key, errors::SLOW_BODY);
            } else {
                self.out_of_time(key);
            }
        }
        for key in unseen {
            // Without socket diagnostics only the bytes that the kernel takes show that the client reads. The kernel has room long before
            // it raises an event.
            self.connection_ready(key, EventFlags::OUT);
        }
    }

    /// A phase has lasted too long.
    fn out_of_time(&mut self, key: ConnectionKey) {
        match self.connections.get(key).map(|connection| connection.phase) {
            Some(Phase::Head) => self.refuse(key, errors::SLOW_HEAD),
            Some(Phase::Held) => self.refuse(key, errors::UNAVAILABLE.retry_after(STARTING_RETRY_AFTER)),
            Some(Phase::Running) => self.refuse(key, errors::NO_ANSWER),
            Some(Phase::WebSocket) => self.socket_is_due(key),
            _ => self.close(key),
        }
    }

    // --- Buffers ------------------------------------------------------------------------------------------

    /// An empty buffer.
    pub(super) fn buffer(&mut self) -> Vec<u8> {
        self.buffers.pop().unwrap_or_default()
    }

    /// Keeps a buffer for reuse.
    pub(super) fn keep_buffer(&mut self, mut buffer: Vec<u8>) {
        if buffer.capacity() > 0 && buffer.capacity() <= KEPT_BUFFER && self.buffers.len() < KEPT_BUFFERS {
            buffer.clear();
            self.buffers.push(buffer);
        }
    }
}

/// Sends an answer on a connection that is closed afterwards. Before the close the input is read: the kernel would reset a connection with
/// unread input, and the client would lose the answer.
fn tell(socket: &OwnedFd, answer: &[u8]) {
    rustix::net::send(socket, answer, rustix::net::SendFlags::NOSIGNAL).ok();
    rustix::net::shutdown(socket, rustix::net::Shutdown::Write).ok();
    let mut request = [0; 4096];
    for _ in 0..TURN {
        if rustix::io::read(socket, &mut request).unwrap_or_default() < request.len() {
            return;
        }
    }
}

/// What an event of a tunnel's application is known by.
pub(super) fn application_event(key: ConnectionKey) -> EventData {
    event_data(APPLICATION, key.data())
}

/// What an event is known by.
fn event_data(kind: u64, key: KeyData) -> EventData {
    EventData::new_u64(key.as_ffi() | kind << KIND_SHIFT)
}
