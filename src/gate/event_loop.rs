//! The gate's one thread: it waits for what happens on any connection, and does what can be done about it at once.

use super::backend::{Backend, BackendKey};
use super::body::Stock;
use super::client::{Client, ClientKey, Phase};
use super::clients::LEAST_WINDOW;
use super::crowd::Crowd;
use super::door::{Door, Guest};
use super::mailbox::{Inbox, MAX_WHOLE};
use super::pace::{Filling, ReadTerms, idle_time};
use super::refusal;
use super::sock_diag::SockDiag;
use super::stream::Stream;
use super::trouble::{Trouble, Troubles};
use super::{Backing, Limits, Loss, Networks, Order};
use crate::room;
use crossbeam_channel::{Receiver, Sender};
use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustls::ServerConfig;
use slotmap::{Key, KeyData, SlotMap};
use std::collections::VecDeque;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often deadlines are looked at.
pub(super) const SWEEP: Duration = Duration::from_millis(100);

/// How many times within `--write-timeout` the kernel is asked what a slow client has not read: a few system calls each time.
const LOOKS: u32 = 10;

/// Longest time a reverse proxy may read nothing of an answer, if it has read enough before. It reads in bursts, whenever the buffer of its own
/// client has room, and gives up a client that has stopped after 60 s (`send_timeout` of nginx), which must come first.
const PROXY_PAUSE: Duration = Duration::from_secs(75);

/// How often the host is asked for an answer on a fresh connection, so that one that takes none is found before it is needed.
pub(super) const PROBE_EVERY: Duration = Duration::from_secs(10);

/// Connections taken at a time, before those there are get their turn.
const ACCEPTS: usize = 64;

/// Connections that are told that there is no place for them and watched until they end, beyond those that may be there; more are
/// told and ended at once.
const MAX_TURNED_AWAY: usize = 64;

/// Events taken at a time.
const EVENTS: usize = 256;

/// Time a client has to see its answer, and to stop sending, before its connection is ended.
pub(super) const LINGER: Duration = Duration::from_secs(1);

/// Time an idle connection is kept once the host stops: a request that is on its way is answered.
const FAREWELL: Duration = Duration::from_millis(250);

/// Time for connections that are being made to come to a door that lets nobody else in: a way there and back.
const SETTLE: Duration = Duration::from_millis(100);

/// Connections of the operator's commands, beside those of clients.
pub(super) const OPERATORS: usize = 16;

/// Buffers that are kept for the next who needs one.
const KEPT_BUFFERS: usize = 32;

/// Largest buffer that is kept.
const KEPT_BUFFER: usize = MAX_WHOLE;

/// Reads for one connection at a time, before the others get their turn.
pub(super) const TURN: usize = 16;

/// Bytes read first of what may be a request: most heads are shorter, and a body's bytes that come along have to be moved.
pub(super) const FIRST_READ: usize = 4 * 1024;

/// Bytes read at a time.
pub(super) const SCRATCH: usize = 64 * 1024;

/// What an event is about, in the top bits of its number's lower half, which no key's index reaches.
const KIND_SHIFT: u64 = 28;
const KIND_MASK: u64 = 0xf << KIND_SHIFT;
const CLIENT: u64 = 1;
const BACKEND: u64 = 2;
const DOOR: u64 = 3;
const BELL: u64 = 4;

/// What is told of each connection, each time once.
const INCOMING: EventFlags = EventFlags::IN.union(EventFlags::RDHUP).union(EventFlags::ET);

/// Whose turn it is again, behind the others.
pub(super) enum Again {
    Client(ClientKey),
    Backend(BackendKey),
}

/// What decides how long an idle connection is kept at this moment.
struct IdleTerms {
    longest: Duration,
    all: Filling,
    crowd: Crowd,
    per_address: u32,
}

impl IdleTerms {
    fn time(&self, client: &Client) -> Duration {
        let address = client.address.filter(|_| client.guest == Some(Guest::Anybody));
        let here = |address| Filling { taken: self.crowd.of(address).into(), most: self.per_address.into() };
        idle_time(self.longest, self.all, address.map(here))
    }
}

/// The gate at work.
pub(super) struct EventLoop {
    pub(super) epoll: OwnedFd,
    orders: Receiver<Order>,
    pub(super) inbox: Inbox,
    pub(super) lost: Sender<Loss>,
    pub(super) limits: Limits,
    pub(super) backing: Backing,
    doors: Vec<Door>,
    /// Which of them have somebody waiting.
    knocking: Vec<bool>,
    pub(super) clients: SlotMap<ClientKey, Client>,
    /// How many of them came as anybody, as the operator, and are only being turned away.
    anybody: usize,
    operators: usize,
    turned_away: usize,
    pub(super) crowd: Crowd,
    /// Where trusted proxies come from.
    pub(super) proxies: Networks,
    pub(super) backends: SlotMap<BackendKey, Backend>,
    /// The one that many requests go over, and how many requests have gone over it whose answers are not here.
    pub(super) shared: Option<BackendKey>,
    pub(super) aboard: usize,
    /// Those that are free, the one used last at the end.
    pub(super) free: Vec<BackendKey>,
    /// When the last of them came free.
    pub(super) freed: Instant,
    /// The one that is being opened.
    pub(super) opening: Option<BackendKey>,
    /// When one was opened last, and until when none is after one that failed.
    pub(super) opened: Instant,
    pub(super) open_after: Instant,
    /// Clients and connections to the host that have had their turn, though there is more to do.
    pub(super) again: Vec<Again>,
    /// Clients whose requests wait for one, with when they began to.
    pub(super) waiting: VecDeque<(ClientKey, Instant)>,
    pub(super) stock: Arc<Stock>,
    pub(super) troubles: Troubles,
    sock_diag: SockDiag,
    /// Where what clients send is read to, and what the host answers.
    pub(super) scratch: Vec<u8>,
    pub(super) answers: Vec<u8>,
    pub(super) buffers: Vec<Vec<u8>>,
    /// A file that is given up to tell a client that there are no more.
    reserve: Option<OwnedFd>,
    pub(super) now: Instant,
    swept: Instant,
    pub(super) next_sweep: Instant,
    /// The host stops: who waits to hear that all requests are being answered.
    pub(super) draining: Option<Sender<()>>,
    pub(super) is_draining: bool,
    /// When the doors are closed for good.
    close_doors_at: Option<Instant>,
    ending: Option<(Instant, Sender<()>)>,
}

impl EventLoop {
    pub(super) fn new(
        doors: Vec<Door>,
        backing: Backing,
        limits: Limits,
        proxies: Networks,
        lost: Sender<Loss>,
        orders: Receiver<Order>,
        inbox: Inbox,
    ) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        // Each ring is an event of its own, so nothing need be read there.
        epoll::add(&epoll, &**inbox.bell(), EventData::new_u64(BELL << KIND_SHIFT), EventFlags::IN | EventFlags::ET)?;
        for (index, door) in doors.iter().enumerate() {
            let data = EventData::new_u64((DOOR << KIND_SHIFT) | index as u64);
            epoll::add(&epoll, door, data, EventFlags::IN | EventFlags::ET)?;
        }
        let now = Instant::now();
        // What is read ahead of a body is no more than this, and one read and what was left of the one before it beyond.
        let most = limits.body_buffer.max(LEAST_WINDOW) + 2 * LEAST_WINDOW;
        let stock = Stock::new(limits.body_memory, limits.body_disk, backing.spool.clone(), most);
        Ok(Self {
            epoll,
            orders,
            inbox,
            lost,
            limits,
            backing,
            knocking: vec![true; doors.len()],
            doors,
            clients: SlotMap::with_key(),
            anybody: 0,
            operators: 0,
            turned_away: 0,
            crowd: Crowd::default(),
            proxies,
            backends: SlotMap::with_key(),
            shared: None,
            aboard: 0,
            free: Vec::new(),
            freed: now,
            opening: None,
            opened: now,
            open_after: now,
            again: Vec::new(),
            waiting: VecDeque::new(),
            stock,
            troubles: Troubles::default(),
            sock_diag: SockDiag::open(),
            scratch: vec![0; SCRATCH],
            answers: vec![0; SCRATCH],
            buffers: Vec::new(),
            reserve: room::spare_file().ok(),
            now,
            swept: now,
            next_sweep: now,
            draining: None,
            is_draining: false,
            close_doors_at: None,
            ending: None,
        })
    }

    /// Works until it is told to end.
    pub(super) fn run(mut self) -> io::Result<()> {
        let mut events = Vec::with_capacity(EVENTS);
        loop {
            self.flush_shared();
            self.inbox.bell().go_to_sleep();
            let timeout = self.timeout();
            events.clear();
            match epoll::wait(&self.epoll, spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            self.inbox.bell().wake_up();
            self.now = Instant::now();
            for event in &events {
                let (flags, data) = (event.flags, event.data.u64());
                let key = KeyData::from_ffi(data & !KIND_MASK);
                match (data & KIND_MASK) >> KIND_SHIFT {
                    CLIENT => self.client_ready(key.into(), flags),
                    BACKEND => self.backend_ready(key.into(), flags),
                    DOOR => {
                        let index = usize::try_from(data & !KIND_MASK).unwrap_or(usize::MAX);
                        if let Some(knocking) = self.knocking.get_mut(index) {
                            *knocking = true;
                        }
                    }
                    _ => {}
                }
            }
            self.obey();
            self.take_parcels();
            for again in std::mem::take(&mut self.again) {
                match again {
                    Again::Client(key) => self.drive(key),
                    Again::Backend(key) => self.relay(key),
                }
            }
            self.accept();
            self.serve_waiting();
            if !events.is_empty() {
                self.next_sweep = self.next_sweep.min(self.now + SWEEP);
            }
            if self.now >= self.next_sweep {
                self.sweep();
            }
            if let Some((deadline, _)) = &self.ending
                && (self.now >= *deadline || self.clients.values().all(Client::is_done))
            {
                return Ok(());
            }
        }
    }

    /// How long to wait for events; none where there is nothing to wait for but them.
    fn timeout(&self) -> Option<Timespec> {
        let now = Instant::now();
        let mut wait = self.next_sweep.saturating_duration_since(now);
        let knocking = self.knocking.iter().any(|knocking| *knocking) && self.reserve.is_some();
        if knocking || !self.again.is_empty() || !self.inbox.is_empty() || !self.orders.is_empty() {
            wait = Duration::ZERO;
        } else if let Some(grow_at) = self.grow_at() {
            wait = wait.min(grow_at.saturating_duration_since(now));
        }
        Timespec::try_from(wait).ok()
    }

    /// Does what it was told to.
    fn obey(&mut self) {
        while let Ok(order) = self.orders.try_recv() {
            match order {
                Order::Moved(socket) => {
                    self.backing.socket = socket;
                    self.open_after = self.now;
                    if let Some(key) = self.opening {
                        self.drop_backend(key);
                    }
                }
                Order::Certificate(config) => self.set_certificate(&config),
                Order::Drain(drained) => self.drain(drained),
                Order::End(deadline, ended) => {
                    self.ending = Some((deadline, ended));
                    let keys: Vec<_> = self.clients.keys().collect();
                    for key in keys {
                        // What was asked is not answered any more.
                        if let Some(client) = self.clients.get(key) {
                            match (client.phase, &client.exchange) {
                                // The plugins have ended, so what is left of an answer that has begun is in the host: it goes on while
                                // there is time.
                                (Phase::Closing | Phase::Lingering, _) => {}
                                (_, Some(exchange)) if exchange.answered => {}
                                (Phase::Idle, _) => self.close(key),
                                _ => self.refuse(key, refusal::STOPPING),
                            }
                        }
                    }
                }
            }
        }
    }

    fn set_certificate(&mut self, config: &Arc<ServerConfig>) {
        for door in &mut self.doors {
            if let Some(tls) = &mut door.tls {
                *tls = Arc::clone(config);
            }
        }
    }

    /// Lets nobody else in than who is on the way, and each connection end with the answer it waits for.
    fn drain(&mut self, drained: Sender<()>) {
        self.draining = Some(drained);
        self.is_draining = true;
        self.doors.iter().for_each(Door::stop);
        self.close_doors_at = Some(self.now + SETTLE);
        // Each answer that begins from now on says that it is the last.
        for exchange in self.clients.values().filter_map(|client| client.exchange.as_ref()) {
            exchange.take_back_unused();
        }
        let farewell = self.now + FAREWELL;
        for client in self.clients.values_mut().filter(|client| client.phase == Phase::Idle) {
            client.deadline = client.deadline.map(|deadline| deadline.min(farewell));
        }
        self.next_sweep = self.now + SWEEP;
    }

    /// Takes what waits at the doors, and closes them.
    fn close_doors(&mut self) {
        self.close_doors_at = None;
        self.knocking.fill(true);
        while self.knocking.iter().any(|knocking| *knocking) && self.reserve.is_some() {
            self.accept();
        }
        self.doors.clear();
        self.knocking.clear();
    }

    // --- Doors --------------------------------------------------------------------------------------------

    /// Takes connections that wait.
    fn accept(&mut self) {
        for index in 0..self.doors.len() {
            for _ in 0..ACCEPTS {
                if !self.knocking[index] {
                    break;
                }
                match self.doors[index].accept() {
                    Ok(Some((socket, address))) => self.enter(index, socket, address),
                    Ok(None) => self.knocking[index] = false,
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

    /// Gives up the file in reserve to tell who waits at a door that there is no other. False when there is none in reserve either.
    fn turn_away_at(&mut self, index: usize, error: &io::Error) -> bool {
        if self.reserve.take().is_none() {
            return false;
        }
        match self.doors[index].accept() {
            Ok(Some((socket, _))) => {
                self.troubles.came(Trouble::Resources, self.now, || room::explain("a connection was not taken", error).0);
                tell(&socket, &refusal::answer(refusal::FULL, false, None));
            }
            Ok(None) => self.knocking[index] = false,
            Err(_) => {}
        }
        self.reserve = room::spare_file().ok();
        self.reserve.is_some()
    }

    /// Lets a connection in, or tells it that there is no place.
    fn enter(&mut self, door: usize, socket: OwnedFd, address: Option<IpAddr>) {
        let guest = match (self.doors[door].guest, address) {
            (Guest::Anybody, Some(address)) if self.proxies.contain(address) => Guest::Proxy,
            (guest, _) => guest,
        };
        let most = self.limits.max_connections as usize;
        let here = address.map_or(0, |address| self.crowd.of(address));
        let full = match guest {
            Guest::Operator => (self.operators >= OPERATORS).then_some(Trouble::Connections),
            _ if self.anybody >= most => Some(Trouble::Connections),
            Guest::Anybody if here >= self.limits.max_connections_per_address => Some(Trouble::Address),
            _ => None,
        };
        let tls = self.doors[door].tls.clone();
        if let Some(trouble) = full {
            let per_address = self.limits.max_connections_per_address;
            self.troubles.came(trouble, self.now, || match (trouble, address) {
                (Trouble::Address, Some(address)) => {
                    format!(
                        "{address} has {per_address} connections, and another was refused (serve --max-connections-per-address)"
                    )
                }
                _ => format!("all {most} connections are taken, and another was refused (serve --max-connections)"),
            });
            // Whoever expects TLS would take it for noise.
            if tls.is_none() {
                self.turn_away(socket);
            }
            return;
        }
        // Of a connection with TLS the handshake comes first, and has a time of its own.
        let deadline = self.now + self.limits.head_timeout;
        let Some(key) = self.admit(Some(guest), socket, tls.as_ref(), address, deadline) else { return };
        match guest {
            Guest::Operator => self.operators += 1,
            _ => self.anybody += 1,
        }
        if guest == Guest::Anybody {
            self.clients[key].counted = address.map(|address| self.crowd.count(address));
        }
        if tls.is_none() {
            self.clients[key].deadline = Some(self.idle_until(&self.clients[key]));
        }
        // Most clients have sent their request by now.
        self.drive(key);
    }

    fn admit(
        &mut self,
        guest: Option<Guest>,
        socket: OwnedFd,
        tls: Option<&Arc<ServerConfig>>,
        address: Option<IpAddr>,
        deadline: Instant,
    ) -> Option<ClientKey> {
        let stream = Stream::new(socket, tls).ok()?;
        let key = self.clients.insert(Client::new(stream, address, guest, deadline));
        match epoll::add(&self.epoll, &self.clients[key].stream, event_data(CLIENT, key.data()), INCOMING | EventFlags::OUT) {
            Ok(()) => Some(key),
            Err(error) => {
                self.troubles.came(Trouble::Resources, self.now, || room::explain("a connection was not taken", &error.into()).0);
                self.clients.remove(key);
                None
            }
        }
    }

    /// Tells a connection that there is no place for it.
    fn turn_away(&mut self, socket: OwnedFd) {
        let answer = refusal::answer(refusal::FULL, false, None);
        if self.turned_away >= MAX_TURNED_AWAY {
            return tell(&socket, &answer);
        }
        if let Some(key) = self.admit(None, socket, None, None, self.now + LINGER) {
            self.turned_away += 1;
            let client = &mut self.clients[key];
            client.phase = Phase::Closing;
            if client.send(&answer).is_err() {
                return self.close(key);
            }
            self.drive(key);
        }
    }

    /// Until when an idle connection is kept from now on.
    pub(super) fn idle_until(&self, client: &Client) -> Instant {
        self.now + self.idle_terms().time(client)
    }

    fn idle_terms(&self) -> IdleTerms {
        let longest = self.limits.idle_timeout;
        IdleTerms {
            longest: if self.is_draining { longest.min(FAREWELL) } else { longest },
            all: Filling { taken: self.anybody as u64, most: self.limits.max_connections.into() },
            crowd: self.crowd.clone(),
            per_address: self.limits.max_connections_per_address,
        }
    }

    /// Ends a client's connection now.
    pub(super) fn close(&mut self, key: ClientKey) {
        let Some(mut client) = self.clients.remove(key) else { return };
        if client.phase == Phase::Idle {
            // A client that has gone already need not hear it.
            client.stream.say_end().unwrap_or_default();
        }
        match client.guest {
            None => self.turned_away -= 1,
            Some(Guest::Operator) => self.operators -= 1,
            Some(_) => self.anybody -= 1,
        }
        if let Some(mut exchange) = client.exchange {
            exchange.take_back();
            if let Some(backend) = exchange.backend {
                self.drop_backend(backend);
            }
            self.keep_buffer(exchange.request);
        }
        self.keep_buffer(client.input);
        self.keep_buffer(client.out);
    }

    // --- Time ---------------------------------------------------------------------------------------------

    /// Looks after everything that has a deadline.
    fn sweep(&mut self) {
        // No more than a look takes to come round: when nothing was due for long, nobody was waited for all that time.
        let passed = (self.now - self.swept).min(2 * SWEEP);
        self.swept = self.now;
        let mut next = (self.opened + PROBE_EVERY).max(self.now + SWEEP);
        let window = self.window();
        let mut late = Vec::new();
        let mut unseen = Vec::new();
        let look_every = (self.limits.write_timeout / LOOKS).max(SWEEP);
        let idle_terms = self.idle_terms();
        for (key, client) in &mut self.clients {
            if client.phase == Phase::Idle {
                // Places may have become fewer since it became idle.
                let until = self.now + idle_terms.time(client);
                client.deadline = client.deadline.map(|deadline| deadline.min(until));
            }
            let waits_to_send = !client.is_flushed();
            let terms = ReadTerms {
                patience: self.limits.write_timeout,
                rate: self.limits.min_rate,
                longest_pause: if client.guest == Some(Guest::Proxy) { PROXY_PAUSE } else { Duration::ZERO },
            };
            if waits_to_send {
                client.uptake.wait(passed);
                if client.uptake.is_due(look_every) {
                    let unread = self.sock_diag.unread(client.stream.file());
                    if unread.is_none() {
                        unseen.push(key);
                    }
                    let given = client.given();
                    client.uptake.look(given, unread, &terms);
                }
            }
            let wants_body = client.wants_body(window) && !client.readable;
            if wants_body && let Some(exchange) = &mut client.exchange {
                exchange.coming.wait(passed);
            }
            let stalled = waits_to_send && client.uptake.is_too_slow(&terms);
            let slow = wants_body
                && client
                    .exchange
                    .as_ref()
                    .is_some_and(|exchange| exchange.coming.is_too_slow(self.limits.body_timeout, self.limits.min_rate));
            if stalled || slow || client.deadline.is_some_and(|deadline| self.now >= deadline) {
                late.push((key, stalled, slow));
            }
            if waits_to_send || wants_body {
                next = self.now + SWEEP;
            } else if let Some(deadline) = client.deadline {
                next = next.min(deadline.max(self.now + SWEEP / 10));
            }
        }
        for (key, stalled, slow) in late {
            if stalled {
                self.cut(key);
            } else if slow {
                self.refuse(key, refusal::SLOW_BODY);
            } else {
                self.out_of_time(key);
            }
        }
        for key in unseen {
            // The kernel tells nothing, so only what it takes shows that the client reads. It has room long before it says so.
            self.client_ready(key, EventFlags::OUT);
        }
        if self.close_doors_at.is_some_and(|at| self.now >= at) {
            self.close_doors();
        }
        self.sweep_backends();
        self.troubles.look(self.now);
        if self.reserve.is_none() {
            self.reserve = room::spare_file().ok();
        }
        if self.close_doors_at.is_none() && self.draining.is_some() {
            let unanswered = self.clients.values().any(|client| match client.phase {
                Phase::Idle | Phase::Head | Phase::Body | Phase::Waiting => true,
                Phase::Running => client.exchange.as_ref().is_some_and(|exchange| !exchange.answered),
                Phase::Closing | Phase::Lingering => false,
            });
            if !unanswered {
                self.draining = None;
            }
        }
        if self.opening.is_some() || self.draining.is_some() || self.ending.is_some() || self.reserve.is_none() {
            next = next.min(self.now + SWEEP);
        } else if self.troubles.is_open() {
            next = next.min(self.now + Duration::from_secs(1));
        }
        if let Some(until) = self.spare_until() {
            next = next.min(until.max(self.now + SWEEP));
        }
        self.next_sweep = next;
    }

    /// A phase has lasted too long.
    fn out_of_time(&mut self, key: ClientKey) {
        match self.clients.get(key).map(|client| client.phase) {
            Some(Phase::Head) => self.refuse(key, refusal::SLOW_HEAD),
            Some(Phase::Waiting) => {
                self.troubles.came(Trouble::Places, self.now, || {
                    "a request found no free place inside the host in time (serve --place-timeout)".into()
                });
                self.refuse(key, refusal::CROWDED);
            }
            Some(Phase::Running) => self.refuse(key, refusal::NO_ANSWER),
            _ => self.close(key),
        }
    }

    // --- Buffers ------------------------------------------------------------------------------------------

    /// An empty buffer.
    pub(super) fn buffer(&mut self) -> Vec<u8> {
        self.buffers.pop().unwrap_or_default()
    }

    /// Keeps a buffer for the next who needs one.
    pub(super) fn keep_buffer(&mut self, mut buffer: Vec<u8>) {
        if buffer.capacity() > 0 && buffer.capacity() <= KEPT_BUFFER && self.buffers.len() < KEPT_BUFFERS {
            buffer.clear();
            self.buffers.push(buffer);
        }
    }

    /// Has what comes on a connection to the host told. That more may be sent is only told once a send has not gone all the way: of a
    /// Unix socket it would be each time that the other side has read.
    pub(super) fn watch_backend(&self, socket: &OwnedFd, key: BackendKey) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, socket, event_data(BACKEND, key.data()), INCOMING)?)
    }

    /// Has it told when more may be sent, where less than all could be.
    pub(super) fn watch_room(&mut self, key: BackendKey) {
        let Some(backend) = self.backends.get_mut(key).filter(|backend| !backend.writable && !backend.told_writable) else {
            return;
        };
        if let Some(socket) = &backend.socket {
            // It is watched, so this changes no more than for what.
            let told = epoll::modify(&self.epoll, socket, event_data(BACKEND, key.data()), INCOMING | EventFlags::OUT);
            backend.told_writable = told.is_ok();
        }
    }
}

/// Gives a connection that ends now an answer. What has come of a request is read away: the kernel would take the answer back else.
fn tell(socket: &OwnedFd, answer: &[u8]) {
    rustix::net::send(socket, answer, rustix::net::SendFlags::NOSIGNAL).unwrap_or_default();
    rustix::net::shutdown(socket, rustix::net::Shutdown::Write).unwrap_or_default();
    let mut request = [0; 4096];
    for _ in 0..TURN {
        if rustix::io::read(socket, &mut request).unwrap_or_default() < request.len() {
            return;
        }
    }
}

/// What an event is known by.
fn event_data(kind: u64, key: KeyData) -> EventData {
    EventData::new_u64(key.as_ffi() | kind << KIND_SHIFT)
}
