//! The web side: tiny_http receives the gate's requests, the dispatcher sends each where it belongs, and [`TinyClient`] answers.
//!
//! The dispatcher is one thread, the only one that calls `recv`, and it waits for nothing else. What may take time is done by
//! others: plugins' requests by their workers, the operator's API by the desk.

use crate::api::Api;
use crate::exchange::{BodyLength, Client, Failed, Job, Method, WebJob, named};
use crate::gate::head::{Refusal, obs_text};
use crate::gate::mailbox::{Left, Mailbox, PIECE};
use crate::gate::refusal::{self, Asker, METHODS, RETRY_AFTER, Rendered, prefers_html};
use crate::gate::reply::Reply;
use crate::gate::response::{Answer, put_size};
use crate::gate::slots::NoSlot;
use crate::gate::{GATE_HEADER, Gate, KEY, LENGTH_HEADER, Loss, MARK, Origin};
use crate::http_date;
use crate::pages;
use crate::pause::pause;
use crate::plugin::{HOLD, STARTING_RETRY_AFTER};
use crate::process::small_thread;
use crate::protocol::message::{HOP_BY_HOP, Headers, Http, Response, Text};
use crate::rack::Rack;
use crate::repeat::more;
use crate::room;
use crate::route::Target;
use crossbeam_channel::{Receiver, Sender, bounded};
use std::fs::{self, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use subtle::ConstantTimeEq;
use tiny_http::{ReadWrite, Request, Server, StatusCode};
use uuid::Uuid;

/// Times tiny_http may be found dead within [`FAILURE_WINDOW`] before the host gives up, so that its supervisor starts it afresh.
const MAX_FAILURES: usize = 3;

/// Threads that tiny_http starts with, and one that hands its requests out. Without them it would panic, or be dead from the start.
const LIBRARY_THREADS: usize = 6;

/// How long to wait before another is tried to be started where one could not be.
const START_RETRY: Duration = Duration::from_millis(200);

/// The time in which [`MAX_FAILURES`] are too many.
const FAILURE_WINDOW: Duration = Duration::from_secs(60);

/// Threads for the operator's API: a command that waits for its plugin takes one.
const DESK_THREADS: usize = 4;

/// Requests that may wait for the API.
const DESK_QUEUE: usize = 64;

/// Requests for what is not known that may wait for the end of the first look for plugins.
const MAX_LOBBY: usize = 1024;

/// How often these are looked after.
const LOBBY_TICK: Duration = Duration::from_millis(20);

/// Status of the interim answer before one that comes before the end of the request's body (102, Processing).
const INTERIM: u16 = 102;

/// Headers that room is set aside for, the host's own included: as many as browsers send.
const HEADERS: usize = 20;

/// Bytes that are set aside for the head of an answer, which few are longer than.
const HEAD_ROOM: usize = 512;

/// The side of the host that the gate talks to.
pub(crate) struct Front {
    /// Where it listens, with a number behind it once another tiny_http had to take over.
    socket: PathBuf,
    /// What the gate is known by.
    key: String,
    /// Where it takes answers.
    mailbox: Arc<Mailbox>,
    max_body: u64,
    /// Set when no new request is to be taken.
    closing: AtomicBool,
    /// When tiny_http was found dead of late.
    failures: Mutex<Vec<Instant>>,
    /// How many of them there have been.
    servers: AtomicU64,
    /// Closed when it has failed for good.
    alive: Mutex<Option<Sender<()>>>,
    /// A request's id is this and its number.
    id_prefix: String,
    numbers: AtomicU64,
}

impl Front {
    /// A front that will listen on a Unix socket. The channel closes when it has failed for good.
    pub(crate) fn new(socket: PathBuf, max_body: u64, mailbox: Mailbox) -> (Self, Receiver<()>) {
        let random = || Uuid::new_v4().simple().to_string();
        let (alive, failed) = bounded(0);
        let front = Self {
            socket,
            key: random()[..KEY].to_owned(),
            mailbox: Arc::new(mailbox),
            max_body,
            closing: AtomicBool::new(false),
            failures: Mutex::default(),
            servers: AtomicU64::new(0),
            alive: Mutex::new(Some(alive)),
            id_prefix: random()[..12].to_owned(),
            numbers: AtomicU64::new(1),
        };
        (front, failed)
    }

    /// What the gate is known by.
    pub(crate) fn key(&self) -> &str {
        &self.key
    }

    /// Answers requests, on threads of its own, until told to close. One plugin may hold `per_plugin` connections of clients.
    pub(crate) fn serve(self: &Arc<Self>, rack: &Arc<Rack>, api: &Arc<Api>, per_plugin: u32) -> io::Result<Serving> {
        let (desk, at_desk) = bounded::<TinyClient>(DESK_QUEUE);
        for number in 1..=DESK_THREADS {
            let (api, queue) = (Arc::clone(api), at_desk.clone());
            std::thread::Builder::new().name(format!("desk-{number}")).spawn(move || attend(&api, &queue))?;
        }
        let lobby = Mutex::new(Some(Vec::new()));
        let dispatcher = Arc::new(Dispatcher {
            front: Arc::clone(self),
            rack: Arc::clone(rack),
            per_plugin: per_plugin as usize,
            desk,
            lobby,
        });
        let porter = Arc::clone(&dispatcher);
        std::thread::Builder::new().name("lobby".into()).spawn(move || porter.attend_lobby())?;
        let socket = Arc::clone(&dispatcher).start()?;
        Ok(Serving { dispatcher, socket })
    }

    /// Notes that tiny_http is dead, and says whether to go on with another. A death while there are no threads is not counted:
    /// a fresh start of the host would have no more of them.
    fn go_on_after(&self, why: &str) -> bool {
        if room::spare_threads(LIBRARY_THREADS).is_err() {
            return true;
        }
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        failures.retain(|at| now.duration_since(*at) < FAILURE_WINDOW);
        failures.push(now);
        if failures.len() < MAX_FAILURES {
            log::warn!("the HTTP library takes no connections any more ({why}): another takes its place");
            return true;
        }
        log::error!("the HTTP library has failed {MAX_FAILURES} times within {} s: {why}", FAILURE_WINDOW.as_secs());
        self.give_up();
        false
    }

    /// Ends the host, for its supervisor to start it afresh.
    fn give_up(&self) {
        *self.alive.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Takes no new request from now on; each is answered that the host stops.
    pub(crate) fn close(&self) {
        self.closing.store(true, Ordering::Release);
    }

    /// Binds the next of its sockets, which only this user can connect to.
    fn bind(&self) -> io::Result<(UnixListener, PathBuf)> {
        let number = self.servers.fetch_add(1, Ordering::Relaxed) + 1;
        let socket = if number == 1 { self.socket.clone() } else { self.socket.with_extension(format!("{number}.sock")) };
        let listener = UnixListener::bind(&socket)?;
        fs::set_permissions(&socket, Permissions::from_mode(0o600))?;
        Ok((listener, socket))
    }
}

/// A front that answers, and the way to keep it so.
pub(crate) struct Serving {
    dispatcher: Arc<Dispatcher>,
    socket: PathBuf,
}

impl Serving {
    /// Where the gate is to connect to.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Puts another tiny_http in place of one that the gate finds dead, on a thread of its own. Connections it has are served on. Where
    /// another cannot be started, as without files or threads, it is tried again for a while.
    pub(crate) fn keep(mut self, gate: Arc<Gate>, losses: Receiver<Loss>) -> io::Result<()> {
        let keep = move || {
            for Loss::Backing(socket, why) in losses {
                // The gate may tell more than once of the same death, until it has heard of the next.
                if socket != self.socket {
                    continue;
                }
                if !self.dispatcher.front.go_on_after(&why) {
                    return;
                }
                let Some(socket) = self.start_again() else { break };
                self.socket.clone_from(&socket);
                gate.moved(socket);
            }
            // The gate has ended, or can reach nobody: nobody could ask anything any more.
            self.dispatcher.front.give_up();
        };
        small_thread("front").spawn(keep)?;
        Ok(())
    }

    /// Starts another tiny_http, as soon as one can be. Nothing when that took too long.
    fn start_again(&self) -> Option<PathBuf> {
        let deadline = Instant::now() + FAILURE_WINDOW;
        let mut is_said = false;
        loop {
            // It panics without threads, of which others may have taken the last just now.
            let started = catch_unwind(AssertUnwindSafe(|| Arc::clone(&self.dispatcher).start()));
            let error = match started {
                Ok(Ok(socket)) => return Some(socket),
                Ok(Err(error)) => error,
                Err(_) => io::Error::other("it panicked"),
            };
            if !std::mem::replace(&mut is_said, true) {
                log::error!("{}", room::explain("no other HTTP library could be started, which is tried again", &error).0);
            }
            if Instant::now() >= deadline {
                log::error!("{}", room::explain("no HTTP library could be started", &error).0);
                return None;
            }
            pause(START_RETRY);
        }
    }
}

struct Dispatcher {
    front: Arc<Front>,
    rack: Arc<Rack>,
    /// Connections that one plugin may hold.
    per_plugin: usize,
    desk: Sender<TinyClient>,
    /// Requests for what is not known, by their arrival, while the first look for plugins is under way; none afterwards.
    lobby: Mutex<Option<Vec<(Instant, TinyClient)>>>,
}

impl Dispatcher {
    /// Starts a tiny_http, and gives its requests to a thread. Says where it listens.
    fn start(self: Arc<Self>) -> io::Result<PathBuf> {
        room::spare_threads(LIBRARY_THREADS)?;
        let (listener, socket) = self.front.bind()?;
        let server = Server::from_listener(listener, None).map_err(|error| io::Error::other(error.to_string()))?;
        std::thread::Builder::new().name("dispatcher".into()).spawn(move || self.run(&server))?;
        Ok(socket)
    }

    fn run(&self, server: &Server) {
        loop {
            match server.recv() {
                Ok(request) => {
                    // A panic while one request is handled must not end the thread that hands out all others.
                    if catch_unwind(AssertUnwindSafe(|| self.receive(request))).is_err() {
                        log::error!("a request made the dispatcher panic");
                    }
                }
                // It accepts no more, which the gate will find. It is kept for the connections it has.
                Err(error) => log::warn!("{}", room::explain("the HTTP library has stopped accepting", &error).0),
            }
        }
    }

    /// Takes a request from the gate.
    fn receive(&self, request: Request) {
        let Some(passed) = Passed::check(&request, &self.front.key) else {
            // Somebody of the host's own user has found the socket: tiny_http answers 500.
            return drop(request);
        };
        let body = body_length(&request, passed.length, self.front.max_body);
        let mut client = TinyClient::new(request, passed, body.unwrap_or(BodyLength::Unknown), &self.front);
        match body {
            Ok(_) => self.dispatch(client),
            Err(failed) => client.fail(failed),
        }
    }

    /// Sends a request where it belongs. Never waits.
    fn dispatch(&self, mut client: TinyClient) {
        let ClientState::Asking(request) = &client.state else { return };
        if self.front.closing.load(Ordering::Acquire) {
            return client.fail(Failed::Unavailable { retry_after: RETRY_AFTER });
        }
        let (path, _) = split(request);
        // Asked before the routes are, which are all there are if it is so.
        let known = self.rack.is_known(Duration::ZERO);
        let routes = self.rack.routes();
        match routes.resolve(path) {
            Target::Plugin { plugin, mount, .. } => {
                let (plugin, method) = (Arc::clone(plugin), Method::named(request.method().as_str()));
                match (plugin.slots.take(self.per_plugin), client.passed.slot_at) {
                    (Ok(slot), Some(address)) => self.front.mailbox.occupy(address, slot),
                    (Ok(_), None) => {}
                    (Err(NoSlot(unsaid)), _) => {
                        if let Some(unsaid) = unsaid {
                            log::warn!(
                                "{} holds {} connections, and another request for it was refused (serve --max-connections-per-plugin){}",
                                plugin.id(),
                                self.per_plugin,
                                more(unsaid)
                            );
                        }
                        return client.refuse_connection();
                    }
                }
                let body = client.left.map_or(BodyLength::Unknown, BodyLength::Known);
                client.mount = mount.len();
                let (client, arrived) = (Box::new(client), Instant::now());
                plugin.submit(Job::Web(WebJob { method, body, client, arrived, alone: false, loss: None }));
            }
            Target::Api(_) => {
                if let Err(full) = self.desk.try_send(client) {
                    full.into_inner().fail(Failed::Overloaded);
                }
            }
            Target::Server => client.respond(204, "text/plain", b"", &[("allow", METHODS)]),
            Target::Nothing if !known => self.keep(client),
            _ if client.left != Some(0) => client.fail(Failed::NotFound),
            Target::Index | Target::Health if !matches!(request.method().as_str(), "GET" | "HEAD") => {
                client.fail(Failed::MethodNotAllowed);
            }
            Target::Health => client.respond(200, "text/plain; charset=utf-8", b"ok\n", &[]),
            Target::Index => {
                let (kind, page) = pages::index(&self.rack, client.prefers_html());
                client.respond(200, kind, page.as_bytes(), &pages::HEADERS);
            }
            Target::Nothing if path == pages::ICON_PATH => match request.method().as_str() {
                "GET" | "HEAD" => client.respond(200, pages::ICON_TYPE, pages::ICON.as_bytes(), &pages::ICON_HEADERS),
                _ => client.fail(Failed::MethodNotAllowed),
            },
            Target::Nothing => client.fail(Failed::NotFound),
        }
    }

    /// Keeps a request for what is not known yet, while the first look for plugins is under way.
    fn keep(&self, mut client: TinyClient) {
        match self.lobby.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            Some(lobby) if lobby.len() < MAX_LOBBY => return lobby.push((Instant::now(), client)),
            Some(_) => return client.fail(Failed::Overloaded),
            None => {}
        }
        // The look has ended just now, so this time it is known.
        self.dispatch(client);
    }

    /// Sends the requests in the lobby on as their plugins become known, those that have waited too long away, and the rest on at the
    /// end of the first look.
    fn attend_lobby(&self) {
        let mut known = false;
        while !known {
            known = self.rack.is_known(LOBBY_TICK);
            let routes = self.rack.routes();
            let is_due = |(arrived, client): &mut (Instant, TinyClient)| {
                let path = client.request().map(|request| split(request).0).unwrap_or_default();
                arrived.elapsed() >= HOLD || !matches!(routes.resolve(path), Target::Nothing)
            };
            let due = {
                let mut lobby = self.lobby.lock().unwrap_or_else(PoisonError::into_inner);
                if known {
                    lobby.take().unwrap_or_default()
                } else {
                    lobby.iter_mut().flat_map(|kept| kept.extract_if(.., is_due)).collect()
                }
            };
            for (arrived, mut client) in due {
                if arrived.elapsed() >= HOLD && !known {
                    client.fail(Failed::Unavailable { retry_after: STARTING_RETRY_AFTER });
                } else {
                    self.dispatch(client);
                }
            }
        }
    }
}

/// What the gate says of a request, see [`crate::gate`].
struct Passed {
    /// Where the request is from, unless the mailbox has that.
    origin: Option<Origin>,
    /// The body's length where the head does not say it otherwise.
    length: Option<u64>,
    /// Where the rest of the request is, and where the answer is to be put, unless they go over the connection.
    address: Option<u64>,
    /// The mailbox's entry that holds the plugin's slot for its connection.
    slot_at: Option<u64>,
}

impl Passed {
    /// Reads it; nothing when the request does not come from the gate.
    fn check(request: &Request, key: &str) -> Option<Self> {
        if let Some((_, said)) = request.url().split_once(MARK) {
            let (given, said) = said.split_at_checked(KEY)?;
            is_same(given, key).then_some(())?;
            let (address, length) = said.split_once('.').map_or((said, None), |(address, length)| (address, Some(length)));
            let length = length.and_then(|length| length.parse().ok());
            let address = Some(u64::from_str_radix(address, 16).ok()?);
            return Some(Self { origin: None, length, address, slot_at: address });
        }
        let mut words = header(request, GATE_HEADER)?.split(' ');
        is_same(words.next()?, key).then_some(())?;
        let https = words.next()? == "https";
        let address = words.next().and_then(|address| address.parse().ok());
        let length = words.next().and_then(|length| length.parse().ok());
        let slot_at = words.next().and_then(|address| u64::from_str_radix(address, 16).ok());
        Some(Self { origin: Some(Origin { address, https }), length, address: None, slot_at })
    }
}

/// Compares keys in the same time wherever they differ.
fn is_same(given: &str, key: &str) -> bool {
    given.as_bytes().ct_eq(key.as_bytes()).into()
}

/// The API's threads.
fn attend(api: &Api, queue: &Receiver<TinyClient>) {
    for mut client in queue {
        let handled = catch_unwind(AssertUnwindSafe(|| {
            let Some(request) = client.request() else { return };
            let (method, url) = (request.method().as_str().to_owned(), target(request).to_owned());
            let authorization = client.header("authorization");
            let reply = api.handle(&method, &url, authorization.as_deref(), &mut client);
            let headers: Vec<_> = [("cache-control", "no-store")].into_iter().chain(reply.header).collect();
            client.respond(reply.status, "application/json", reply.body.as_bytes(), &headers);
        }));
        if handled.is_err() {
            log::error!("a request made the API panic");
        }
    }
}

/// How much body a request has, as the gate has found it; `declared` is that which its own framing does not say.
fn body_length(request: &Request, declared: Option<u64>, max_body: u64) -> Result<BodyLength, Failed> {
    match (header(request, "transfer-encoding"), declared.or(request.body_length().map(|length| length as u64))) {
        (_, Some(length)) if length > max_body => Err(Failed::TooLarge),
        (_, Some(length)) => Ok(BodyLength::Known(length)),
        (Some(_), None) => Ok(BodyLength::Unknown),
        (None, None) => Ok(BodyLength::Known(0)),
    }
}

/// The headers that `connection` names as belonging to this hop.
fn connection_options<'a>(headers: &'a Headers<'_>) -> Vec<&'a str> {
    let options = headers.iter().filter(|(name, _)| name.eq_ignore_ascii_case("connection"));
    options.flat_map(|(_, value)| value.split(',')).map(str::trim).collect()
}

/// Whether a header is one of those between the gate and the host.
fn is_gates(name: &str) -> bool {
    name.get(..GATE_HEADER.len()).is_some_and(|beginning| beginning.eq_ignore_ascii_case(GATE_HEADER))
}

/// The request id in the lines of a canonical head.
fn request_id_in(lines: &[u8]) -> Option<String> {
    const LINE: &[u8] = b"\nx-request-id: ";
    // The first line is the host's.
    let value = &lines[memchr::memmem::find(lines, LINE)? + LINE.len()..];
    let end = memchr::memchr(b'\r', value)?;
    String::from_utf8(value[..end].to_vec()).ok()
}

/// The target of a request, without what the gate says.
fn target(request: &Request) -> &str {
    request.url().split_once(MARK).map_or(request.url(), |(target, _)| target)
}

/// A request's path, and what follows the `?`.
fn split(request: &Request) -> (&str, Option<&str>) {
    let target = target(request);
    target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)))
}

fn header<'a>(request: &'a Request, name: &'static str) -> Option<&'a str> {
    request.headers().iter().find(|header| header.field.equiv(name)).map(|header| header.value.as_str())
}

/// How a request that has failed is refused, and after how many seconds it may be tried again.
fn refusal_of(failed: Failed) -> (Refusal, Option<u64>) {
    match failed {
        Failed::BadBody => (refusal::BAD_BODY, None),
        Failed::NotFound => (refusal::NOT_FOUND, None),
        Failed::MethodNotAllowed => (refusal::METHOD_NOT_ALLOWED, None),
        Failed::TooLarge => (refusal::TOO_LARGE, None),
        Failed::HeadTooLarge => (refusal::HEAD_TOO_LARGE, None),
        Failed::BadGateway => (refusal::BAD_GATEWAY, None),
        Failed::Unavailable { retry_after } => (refusal::UNAVAILABLE, Some(retry_after)),
        Failed::Overloaded => (refusal::CROWDED, Some(RETRY_AFTER)),
        Failed::Timeout => (refusal::TIMEOUT, None),
    }
}

/// A client, as the gate stands for it: with its request or, once it is being answered, its answer.
pub(crate) struct TinyClient {
    state: ClientState,
    passed: Passed,
    front: Arc<Front>,
    /// The request's number.
    number: u64,
    /// Bytes of the path that are the plugin's route.
    mount: usize,
    /// The request id that a trusted proxy has given it; the gate lets no other pass.
    given_id: Option<String>,
    /// What the gate has left with the request, once that was asked for, see [`TinyClient::take_left`].
    taken: Option<Option<Left>>,
    head: bool,
    /// Bytes of the body still allowed.
    allowance: u64,
    /// Whether nothing of the request's body is left on the connection.
    read: bool,
    /// How much of it that is, where it is known.
    left: Option<u64>,
    chunked: bool,
    /// Whether the client's connection is to end after the answer.
    last: bool,
}

/// The first of an answer's body.
struct Beginning<'a> {
    /// Bytes of the body, where that is known.
    length: Option<u64>,
    first: &'a [u8],
    /// Nothing follows.
    whole: bool,
}

enum ClientState {
    Asking(Box<Request>),
    /// Answering another way than on the request's connection.
    Replying(Reply),
    /// Answering on the request's connection.
    Answering(Box<dyn Write + Send>),
    /// Answering while part of the request's body is left, which tiny_http must not take for the next request.
    Early(Box<dyn ReadWrite + Send>),
    Answered,
}

impl TinyClient {
    fn new(request: Request, passed: Passed, body: BodyLength, front: &Arc<Front>) -> Self {
        Self {
            head: request.method().as_str() == "HEAD",
            front: Arc::clone(front),
            number: front.numbers.fetch_add(1, Ordering::Relaxed),
            mount: 0,
            // Only the headers of one with a connection of its own come with it.
            given_id: header(&request, "x-request-id").map(str::to_owned),
            taken: None,
            allowance: front.max_body,
            read: passed.address.is_some() || body == BodyLength::Known(0),
            passed,
            left: match body {
                BodyLength::Known(length) => Some(length),
                BodyLength::Unknown => None,
            },
            chunked: false,
            last: false,
            state: ClientState::Asking(Box::new(request)),
        }
    }

    /// The request, while it is not answered.
    pub(crate) fn request(&self) -> Option<&Request> {
        match &self.state {
            ClientState::Asking(request) => Some(request),
            _ => None,
        }
    }

    /// Sends a whole answer of the host's own.
    fn respond(&mut self, status: u16, content_type: &str, body: &[u8], headers: &[(&str, &str)]) {
        let mut head = status_line(status);
        for (name, value) in [("content-type", content_type)].iter().chain(headers) {
            put_header(&mut head, name, value);
        }
        self.respond_with(status, head, body);
    }

    /// Sends the rest of a whole answer of the host's own, whose head so far is its status line and headers.
    fn respond_with(&mut self, status: u16, mut head: Vec<u8>, body: &[u8]) {
        http_date::put_line(&mut head);
        let body = Beginning { length: Some(body.len() as u64), first: if self.head { b"" } else { body }, whole: true };
        // A client that has gone needs no answer.
        drop(self.begin(status, head, &body));
    }

    /// Refuses a request because its plugin holds as many connections as it may. The connection ends, so that it is free for other plugins' clients.
    fn refuse_connection(mut self) {
        self.last = true;
        self.refuse(refusal::PLUGIN_FULL, Some(RETRY_AFTER), None);
    }

    /// Answers with one of the host's own errors, in the form that the client prefers. `retry_after` is in seconds.
    fn refuse(&mut self, refused: Refusal, retry_after: Option<u64>, allow: Option<&str>) {
        let Some(request) = self.request() else { return };
        let is_safe = matches!(request.method().as_str(), "GET" | "HEAD");
        let (html, id) = (self.prefers_html(), self.request_id());
        let Rendered { headers, body } = refusal::render(refused, retry_after, Some(Asker { html, is_safe, id: Some(&id) }));
        let mut head = status_line(refused.status);
        for (name, value) in
            headers.iter().map(|(name, value)| (*name, value.as_str())).chain(allow.map(|allow| ("allow", allow)))
        {
            put_header(&mut head, name, value);
        }
        self.respond_with(refused.status, head, body.as_bytes());
    }

    /// Whether an error or a page of the host's own is to be HTML.
    fn prefers_html(&mut self) -> bool {
        self.take_left();
        let headers = self.headers();
        prefers_html(headers.iter().filter(|(name, _)| **name == *"accept").map(|(_, value)| &**value))
    }

    /// Begins an answer with its head, but for the lines that frame it, and the first of its body.
    fn begin(&mut self, status: u16, mut head: Vec<u8>, body: &Beginning<'_>) -> io::Result<()> {
        let over_connection = self.leave();
        if let Some(address) = self.passed.address {
            // Only the gate can end the connection, so it frames the answer.
            let outlet = if self.last { None } else { self.take_left().and_then(|left| left.outlet.take()) };
            let answer = Answer { status, length: body.length, chunked: false, close: self.last };
            let reply = Reply::begin(&self.front.mailbox, address, outlet, (answer, head), body.first, body.whole)?;
            if !body.whole {
                self.state = ClientState::Replying(reply);
            }
            return Ok(());
        }
        self.state = over_connection;
        if !self.read {
            // What is not read of a body cannot be told from a next request, so this answer is the last: the gate ends the connection.
            put_header(&mut head, "connection", "close");
        }
        // The end of one that breaks off is told by its chunks alone.
        self.chunked = !body.whole && !self.head;
        if let Some(length) = body.length {
            put_header(&mut head, if self.chunked { LENGTH_HEADER } else { "content-length" }, &length.to_string());
        }
        if self.chunked {
            put_header(&mut head, "transfer-encoding", "chunked");
        }
        head.extend_from_slice(b"\r\n");
        self.put_piece(&mut head, body.first, body.whole);
        let sent = self.connection().and_then(|out| send(out, &head));
        if body.whole {
            self.finish();
        }
        sent
    }

    /// Where an answer is written to that goes over the request's connection.
    fn connection(&mut self) -> io::Result<&mut dyn Write> {
        match &mut self.state {
            ClientState::Answering(out) => Ok(out.as_mut()),
            ClientState::Early(stream) => Ok(stream),
            _ => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// What the gate has left with the request, and until it is asked for the first time may take back; nothing where it has, since the
    /// client has gone, and where the request has come over a connection of its own.
    fn take_left(&mut self) -> Option<&mut Left> {
        let address = self.passed.address?;
        if self.taken.is_none() {
            let left = self.front.mailbox.take_left(address);
            self.given_id = left.as_ref().and_then(|left| request_id_in(&left.headers));
            self.taken = Some(left);
        }
        self.taken.as_mut()?.as_mut()
    }

    /// The request's headers as the gate has let them pass, once what it has left was taken.
    fn headers(&self) -> Headers<'_> {
        let mut headers = Headers::with_capacity(HEADERS);
        let mut put = |name, value| headers.push((Text::from(name), obs_text(value).into()));
        if let Some(Some(left)) = &self.taken {
            // What is canonical is ASCII, a header a line.
            let lines = std::str::from_utf8(&left.headers).unwrap_or_default().split_terminator('\n');
            let lines = lines.filter_map(|line| line.trim_end_matches('\r').split_once(':'));
            lines.for_each(|(name, value)| put(name, value.trim_start_matches(' ')));
        } else if let ClientState::Asking(request) = &self.state {
            let each = request.headers().iter().map(|header| (header.field.as_str().as_str(), header.value.as_str()));
            each.filter(|(name, _)| *name != GATE_HEADER).for_each(|(name, value)| put(name, value));
        }
        headers
    }

    /// The request's `x-request-id`: that which a trusted proxy has given it, once what the gate has left was taken, or its own.
    fn request_id(&self) -> String {
        self.given_id.clone().unwrap_or_else(|| format!("{}-{:x}", self.front.id_prefix, self.number))
    }

    /// A header of the request.
    fn header(&mut self, name: &str) -> Option<String> {
        self.take_left();
        self.headers().into_iter().find(|(each, _)| **each == *name).map(|(_, value)| value.to_string())
    }

    /// Lets go of the request; gives what it can be answered by on its connection.
    fn leave(&mut self) -> ClientState {
        match std::mem::replace(&mut self.state, ClientState::Answered) {
            ClientState::Asking(request) if self.read => ClientState::Answering(request.into_writer()),
            // The only way to have both sides of a connection from tiny_http. It sends an interim answer of this status, which the
            // gate passes over.
            ClientState::Asking(request) => {
                let interim = tiny_http::Response::empty(StatusCode(INTERIM));
                ClientState::Early(request.upgrade("close", interim))
            }
            other => other,
        }
    }

    /// The answer has come to its end, or is broken off.
    fn finish(&mut self) {
        if let ClientState::Early(mut stream) = std::mem::replace(&mut self.state, ClientState::Answered) {
            // The gate has seen that the answer is the last and sends no more of the body, so the end of what it has sent is near.
            let mut rest = [0; 16 * 1024];
            while stream.read(&mut rest).is_ok_and(|n| n > 0) {}
        }
    }
}

impl Client for TinyClient {
    fn message(&mut self) -> Option<Http<'_>> {
        let Origin { address, https } = match self.passed.origin {
            Some(origin) => origin,
            None => self.take_left()?.origin,
        };
        let mut headers = self.headers();
        headers.retain(|(name, _)| !matches!(&**name, "transfer-encoding" | "x-request-id"));
        let ClientState::Asking(request) = &self.state else { return None };
        let (path, query) = split(request);
        let (mount, path) = path.split_at_checked(self.mount)?;
        let remote = address.map(|address| address.to_string()).unwrap_or_default();
        if let Some(length) = self.passed.length {
            headers.push(("content-length".into(), length.to_string().into()));
        }
        headers.push(("x-forwarded-for".into(), remote.clone().into()));
        headers.push(("x-forwarded-proto".into(), if https { "https" } else { "http" }.into()));
        headers.push(("x-forwarded-prefix".into(), mount.into()));
        headers.push(("x-request-id".into(), self.request_id().into()));
        Some(Http {
            id: 0,
            method: request.method().as_str().into(),
            path: if path.is_empty() { "/" } else { path }.into(),
            query: query.map(Into::into),
            mount: mount.into(),
            headers,
            remote: remote.into(),
            more: false,
        })
    }

    fn read_body(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == Some(0) || self.request().is_none() {
            return Ok(0);
        }
        let n = match &mut self.state {
            ClientState::Asking(request) if self.passed.address.is_none() => request.as_reader().read(buffer)?,
            _ => self.take_left().and_then(|left| left.body.as_mut()).map_or(Ok(0), |body| body.read(buffer))?,
        };
        if n == 0 && self.left.is_some() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left = self.left.map(|left| left.saturating_sub(n as u64));
        self.read |= n == 0 || self.left == Some(0);
        match self.allowance.checked_sub(n as u64) {
            Some(left) => self.allowance = left,
            None => return Err(io::ErrorKind::FileTooLarge.into()),
        }
        Ok(n)
    }

    fn whole_body(&mut self, most: usize) -> Option<Vec<u8>> {
        let length = self.left.filter(|length| *length <= self.allowance.min(most as u64))?;
        let body = self.take_left()?.body.as_mut().filter(|body| body.len() == length)?;
        let bytes = body.take_whole()?;
        self.left = Some(0);
        self.read = true;
        Some(bytes)
    }

    fn answer(&mut self, response: &Response<'_>, first: &[u8], rest: usize) -> io::Result<()> {
        let mut head = status_line(response.status);
        let (mut length, mut has_date) = (None, false);
        let named = connection_options(&response.headers);
        for (name, value) in &response.headers {
            let is = |other: &str| name.eq_ignore_ascii_case(other);
            if is("content-length") {
                length = value.parse().ok();
            } else if !HOP_BY_HOP.into_iter().any(is) && !is_gates(name) && !named.iter().any(|option| is(option)) {
                has_date |= is("date");
                put_header(&mut head, name, value);
            }
        }
        if !has_date {
            http_date::put_line(&mut head);
        }
        let bodiless = self.head || response.is_bodiless();
        let size = first.len() + rest;
        if length.is_none() && !response.more && (!bodiless || size > 0) {
            length = Some(size as u64);
        }
        let whole = rest == 0 && !response.more;
        self.begin(response.status, head, &Beginning { length, first: if bodiless { b"" } else { first }, whole })
    }

    fn has_room_within(&self, time: Duration) -> bool {
        if let ClientState::Replying(reply) = &self.state { reply.has_room_within(time) } else { true }
    }

    fn piece(&mut self, bytes: &[u8], last: bool) -> io::Result<()> {
        let bytes = if self.head { b"" } else { bytes };
        if let ClientState::Replying(reply) = &mut self.state {
            return reply.piece(bytes, last);
        }
        let mut piece = Vec::new();
        self.put_piece(&mut piece, bytes, last);
        let sent = self.connection().and_then(|out| send(out, &piece));
        if last {
            self.finish();
        }
        sent
    }

    fn buffer(&mut self) -> Vec<u8> {
        let mut buffer = self.front.mailbox.used_buffer();
        buffer.resize(PIECE, 0);
        buffer
    }

    fn filled(&mut self, buffer: Vec<u8>, length: usize, last: bool) -> io::Result<()> {
        match &mut self.state {
            // It goes on as it is.
            ClientState::Replying(reply) if !self.head => reply.filled(buffer, length, last),
            _ => self.piece(&buffer[..length], last),
        }
    }

    fn cut(&mut self) {
        if let ClientState::Replying(_) = self.state {
            // The gate sees that nothing more comes, and breaks off with its client.
            self.state = ClientState::Answered;
        } else {
            // It sees so when this comes, which is not the beginning of a chunk.
            drop(self.connection().and_then(|out| send(out, b"!\r\n")));
            self.finish();
        }
    }

    fn name(&self) -> String {
        let (method, path) = self.request().map_or(("", ""), |request| (request.method().as_str(), split(request).0));
        format!("{method} {} (request {})", named(path), self.request_id())
    }

    fn fail(&mut self, failed: Failed) {
        let (refused, retry_after) = refusal_of(failed);
        self.refuse(refused, retry_after, (failed == Failed::MethodNotAllowed).then_some("GET, HEAD"));
    }
}

impl TinyClient {
    /// Appends a piece of the body as it goes on the wire.
    fn put_piece(&self, out: &mut Vec<u8>, bytes: &[u8], last: bool) {
        if !self.chunked {
            return out.extend_from_slice(bytes);
        }
        if !bytes.is_empty() {
            put_size(out, bytes.len());
            out.extend_from_slice(bytes);
            out.extend_from_slice(b"\r\n");
        }
        if last {
            out.extend_from_slice(b"0\r\n\r\n");
        }
    }
}

impl Drop for TinyClient {
    fn drop(&mut self) {
        if matches!(self.state, ClientState::Asking(_)) {
            self.fail(Failed::BadGateway);
        }
    }
}

/// One write, for head and body together, and nothing held back.
fn send(out: &mut dyn Write, bytes: &[u8]) -> io::Result<()> {
    out.write_all(bytes)?;
    out.flush()
}

/// The first line of an answer.
fn status_line(status: u16) -> Vec<u8> {
    let mut head = Vec::with_capacity(HEAD_ROOM);
    let reason = StatusCode(status).default_reason_phrase();
    // To memory, which takes all.
    write!(head, "HTTP/1.1 {status} {reason}\r\n").unwrap_or_default();
    head
}

/// Appends a header line, its name in lower case. Each character of a value is one byte (see `Response::check`).
fn put_header(head: &mut Vec<u8>, name: &str, value: &str) {
    let start = head.len();
    head.extend_from_slice(name.as_bytes());
    head[start..].make_ascii_lowercase();
    head.extend_from_slice(b": ");
    let value = value.trim_matches([' ', '\t']);
    if value.is_ascii() {
        head.extend_from_slice(value.as_bytes());
    } else {
        head.extend(value.chars().map(|c| u8::try_from(u32::from(c)).unwrap_or(b'?')));
    }
    head.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gate::fuzzing::LIMITS;
    use crate::gate::head;
    use proptest::prelude::*;
    use std::os::unix::net::UnixStream;

    const VERSION: &[u8] = b" HTTP/1.1\r\n";

    /// What the gate makes of a request, if it lets it pass.
    fn passed(input: &[u8]) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        head::read(input, LIMITS, None, &mut 0, &mut out).ok()??;
        out.extend_from_slice(b"\r\n");
        Some(out)
    }

    /// Many requests go over one connection, so one that tiny_http did not take would be at the expense of all.
    fn assert_taken(heads: &[Vec<u8>]) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("http.sock");
        let server = Server::from_listener(UnixListener::bind(&path).unwrap(), None).unwrap();
        let mut gate = UnixStream::connect(&path).unwrap();
        // As they are, and with nothing but their first line, as those go that have come whole.
        let first_line = |head: &Vec<u8>| {
            let end = head.windows(VERSION.len()).position(|end| end == VERSION).unwrap();
            [&head[..end], b"#0123456789abcdef100000001.7", VERSION, b"\r\n"].concat()
        };
        let marked: Vec<_> = heads.iter().map(first_line).collect();
        for head in heads.iter().chain(&marked) {
            gate.write_all(head).unwrap();
            let shown = || head.escape_ascii().to_string();
            let request =
                server.recv_timeout(Duration::from_secs(20)).unwrap().unwrap_or_else(|| panic!("not taken: {}", shown()));
            let line = format!("{} {} HTTP/1.1\r\n", request.method().as_str(), request.url());
            assert!(head.starts_with(line.as_bytes()), "{line:?} of {}", shown());
            let lines = head.iter().filter(|&&byte| byte == b'\n').count();
            assert_eq!(request.headers().len(), lines - 2, "{}", shown());
            drop(request.into_writer());
        }
        gate.set_nonblocking(true).unwrap();
        assert_eq!(gate.read(&mut [0; 1]).unwrap_err().kind(), io::ErrorKind::WouldBlock, "something was answered there");
    }

    #[test]
    fn what_the_fuzzer_has_found_to_pass_the_gate_tiny_http_takes() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus/head");
        let inputs = fs::read_dir(corpus).unwrap().map(|entry| fs::read(entry.unwrap().path()).unwrap());
        let heads: Vec<_> = inputs.filter_map(|input| passed(&input)).collect();
        assert!(heads.len() > 20, "{}", heads.len());
        assert_taken(&heads);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_passes_the_gate_tiny_http_takes(
            requests in prop::collection::vec((
                "(GET|POST|HEAD|OPTIONS|[A-Za-z!#$%&'*+.^_`|~-]{1,9})",
                "(/[!-~\u{80}-\u{ff}]{0,20}|\\*|http://[a-z]{1,5}/[!-~]{0,9})",
                prop::collection::vec("[A-Za-z0-9!#$%&'*+.^_`|~-]{1,9}:[ -~\t\u{a0}-\u{ff}]{0,20}", 0..8),
            ), 1..40),
        ) {
            let head = |(method, target, headers): &(String, String, Vec<String>)| {
                let headers: String = headers.iter().map(|line| format!("{line}\r\n")).collect();
                let text = format!("{method} {target} HTTP/1.1\r\nhost: a\r\n{headers}\r\n");
                passed(&text.chars().map(|c| u8::try_from(u32::from(c)).unwrap()).collect::<Vec<_>>())
            };
            assert_taken(&requests.iter().filter_map(head).collect::<Vec<_>>());
        }
    }
}
