//! The web side: tiny_http receives requests, the dispatcher sends each where it belongs, and [`TinyClient`] answers.
//!
//! tiny_http is helped over three of its weaknesses from outside: connections get their timeouts from the listener, a listener
//! with a timeout needs a connection now and then, and one whose accept failed is given to a new tiny_http (`docs/architecture.md`).
//!
//! The dispatcher is one thread, the only one that calls `recv`, and it waits for nothing else. What may take time is done by
//! others: plugins' requests by their workers, the operator's API by the desk, refusals with a body still to be read by ushers.

use crate::api::{self, Api};
use crate::client_socket::ClientSocket;
use crate::exchange::{BodyLength, Client, Failed, Job, WebJob};
use crate::pages;
use crate::pause::pause;
use crate::plugin::{HOLD, STARTING_RETRY_AFTER};
use crate::process::small_thread;
use crate::protocol::message::{HOP_BY_HOP, Headers, Http, Response};
use crate::rack::Rack;
use crate::room;
use crate::route::Target;
use crossbeam_channel::{Receiver, Sender, bounded};
use rustix::net::sockopt;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use tiny_http::{HTTPVersion, Request, Server};
use uuid::Uuid;

/// Time in which a client must send or take something, else its connection is closed. Also how long an idle connection is kept.
const CLIENT_IDLE: Duration = Duration::from_secs(15);

/// How often the host connects to itself. tiny_http can leave a connection of a burst without a thread until one falls free, and
/// stops accepting when no connection came for [`CLIENT_IDLE`]; a connection that is closed at once mends both.
const NUDGE: Duration = Duration::from_secs(1);

/// Time in which one of these connections must be taken after tiny_http has panicked, else its accepting thread is dead.
const PROBE_TIME: Duration = Duration::from_secs(3);

/// How often it does so while requests come: each time one connection that was left without a thread gets one.
const BUSY_NUDGE: Duration = Duration::from_millis(10);

/// How long after a request requests are said to come.
const BUSY_TIME: Duration = Duration::from_secs(2);

/// Time for the host to connect to itself.
const NUDGE_TIME: Duration = Duration::from_secs(1);

/// Pause before accepting is begun again: what it failed for, such as open files, may be there again.
const FAILURE_PAUSE: Duration = Duration::from_secs(1);

/// Failures to accept within [`FAILURE_WINDOW`] after which the host gives up, so that its supervisor starts it afresh.
const MAX_FAILURES: usize = 3;

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

/// Most requests that are refused at once while their body is still to be read away, each on a thread of its own.
const MAX_USHERS: usize = 512;

/// Time a client has to see its answer, and to stop sending a body that nobody wants, before its connection is ended.
const LINGER: Duration = Duration::from_secs(1);

/// Longest wait for more of such a body.
const LINGER_READ: Duration = Duration::from_millis(250);

/// Body length in bytes up to which tiny_http reads a body before it hands the request over.
const PREREAD: u64 = 1024;

/// `retry-after` in seconds of the host's own refusals: what is full empties quickly, if at all.
const OVERLOAD_RETRY_AFTER: u64 = 1;

/// The listening side of the host.
pub(crate) struct Front {
    listener: TcpListener,
    address: SocketAddr,
    max_body: u64,
    /// Set when no new request is to be taken.
    closing: AtomicBool,
    /// Set by each request, and wakes the thread that nudges.
    busy: AtomicBool,
    wake: (Sender<()>, Receiver<()>),
    /// Set by a panic inside tiny_http: the thread that accepts may be the one that died.
    panicked: Arc<AtomicBool>,
    /// When accepting failed of late.
    failures: Mutex<Vec<Instant>>,
    /// Closed when accepting has failed for good.
    alive: Mutex<Option<Sender<()>>>,
    /// A request's id is this and a number.
    id_prefix: String,
    ids: AtomicU64,
}

impl Front {
    /// Begins to listen. The channel closes when accepting has failed for good.
    pub(crate) fn listen(address: SocketAddr, max_body: u64) -> io::Result<(Self, Receiver<()>)> {
        let listener = TcpListener::bind(address)?;
        // Connections inherit these from the listener on Linux; tiny_http gives no other way to them.
        sockopt::set_tcp_nodelay(&listener, true)?;
        for timeout in [sockopt::Timeout::Recv, sockopt::Timeout::Send] {
            sockopt::set_socket_timeout(&listener, timeout, Some(CLIENT_IDLE))?;
        }
        let address = listener.local_addr()?;
        let id_prefix = Uuid::new_v4().simple().to_string()[..12].to_owned();
        let (alive, failed) = bounded(0);
        let front = Self {
            listener,
            address,
            max_body,
            closing: AtomicBool::new(false),
            busy: AtomicBool::new(false),
            wake: bounded(1),
            panicked: Arc::default(),
            failures: Mutex::default(),
            alive: Mutex::new(Some(alive)),
            id_prefix,
            ids: AtomicU64::new(1),
        };
        Ok((front, failed))
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers requests, on threads of its own, until told to close.
    pub(crate) fn serve(self: &Arc<Self>, rack: &Arc<Rack>, api: &Arc<Api>) -> io::Result<()> {
        let (desk, at_desk) = bounded::<TinyClient>(DESK_QUEUE);
        for number in 1..=DESK_THREADS {
            let (api, queue) = (Arc::clone(api), at_desk.clone());
            std::thread::Builder::new().name(format!("desk-{number}")).spawn(move || attend(&api, &queue))?;
        }
        let panicked = Arc::clone(&self.panicked);
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if panic.location().is_some_and(|location| location.file().contains("tiny_http")) {
                panicked.store(true, Ordering::Relaxed);
            }
            hook(panic);
        }));
        let lobby = Mutex::new(Some(Vec::new()));
        let dispatcher = Arc::new(Dispatcher { front: Arc::clone(self), rack: Arc::clone(rack), desk, lobby });
        let porter = Arc::clone(&dispatcher);
        std::thread::Builder::new().name("lobby".into()).spawn(move || porter.attend_lobby())?;
        Arc::clone(&dispatcher).start()?;
        small_thread("nudge").spawn(move || dispatcher.nudge())?;
        Ok(())
    }

    /// Notes a failure to accept, and says whether to go on.
    fn go_on_after(&self, error: &io::Error) -> bool {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        failures.retain(|at| now.duration_since(*at) < FAILURE_WINDOW);
        failures.push(now);
        if failures.len() < MAX_FAILURES {
            log::warn!("{} (it is begun again)", room::explain("accepting connections failed", error).0);
            return true;
        }
        let what = format!("accepting connections failed {MAX_FAILURES} times within {} s", FAILURE_WINDOW.as_secs());
        log::error!("{}", room::explain(&what, error).0);
        *self.alive.lock().unwrap_or_else(PoisonError::into_inner) = None;
        false
    }

    /// Takes no new request from now on; each is answered that the host stops.
    pub(crate) fn close(&self) {
        self.closing.store(true, Ordering::Release);
    }

    fn request_id(&self) -> String {
        format!("{}-{:x}", self.id_prefix, self.ids.fetch_add(1, Ordering::Relaxed))
    }
}

/// Ushers at work, see [`MAX_USHERS`].
static USHERS: AtomicUsize = AtomicUsize::new(0);

struct Dispatcher {
    front: Arc<Front>,
    rack: Arc<Rack>,
    desk: Sender<TinyClient>,
    /// Requests for what is not known, by their arrival, while the first look for plugins is under way; none afterwards.
    lobby: Mutex<Option<Vec<(Instant, Request)>>>,
}

impl Dispatcher {
    /// Gives the listener to a tiny_http, and its requests to a thread.
    fn start(self: Arc<Self>) -> io::Result<()> {
        let listener = self.front.listener.try_clone()?;
        let server = Server::from_listener(listener, None).map_err(|error| io::Error::other(error.to_string()))?;
        std::thread::Builder::new().name("dispatcher".into()).spawn(move || self.run(&server))?;
        Ok(())
    }

    /// Connects to the host now and then, see [`NUDGE`], and finds out by it when connections are accepted no more.
    fn nudge(self: Arc<Self>) {
        let mut address = self.front.address;
        if address.ip().is_unspecified() {
            address.set_ip(if address.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() });
        }
        let mut busy_until = Instant::now();
        let mut last_taken = Instant::now();
        let mut probe: Option<TcpStream> = None;
        loop {
            if Instant::now() < busy_until {
                pause(BUSY_NUDGE);
            } else {
                self.front.wake.1.recv_timeout(NUDGE).unwrap_or_default();
            }
            if self.front.busy.swap(false, Ordering::Relaxed) {
                busy_until = Instant::now() + BUSY_TIME;
            }
            match TcpStream::connect_timeout(&address, NUDGE_TIME).and_then(|stream| {
                stream.shutdown(Shutdown::Write)?;
                stream.set_nonblocking(true)?;
                Ok(stream)
            }) {
                Ok(stream) => probe = probe.or(Some(stream)),
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {}
                // Nothing is known, such as when this process is out of files.
                Err(_) => last_taken = Instant::now(),
            }
            // tiny_http closes a connection that was ended by its client, once it has taken it.
            let open =
                |mut stream: &TcpStream| stream.read(&mut [0]).is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock);
            if !probe.as_ref().is_some_and(open) {
                probe = None;
                last_taken = Instant::now();
            } else if last_taken.elapsed() >= PROBE_TIME && self.front.panicked.swap(false, Ordering::Relaxed) {
                probe = None;
                last_taken = Instant::now();
                if self.front.go_on_after(&io::Error::other("the HTTP library takes none any more")) {
                    Arc::clone(&self).start_again();
                }
            }
        }
    }

    /// Starts anew after a pause, beside the connections there are.
    fn start_again(self: Arc<Self>) {
        let starting = move || {
            pause(FAILURE_PAUSE);
            if let Err(error) = Arc::clone(&self).start()
                && self.front.go_on_after(&error)
            {
                self.start_again();
            }
        };
        if let Err(error) = small_thread("accept-again").spawn(starting) {
            log::error!("accepting connections cannot be begun again: {error}");
        }
    }

    fn run(self: Arc<Self>, server: &Server) {
        loop {
            match server.recv() {
                Ok(request) => {
                    // A panic while one request is handled must not end the thread that hands out all others.
                    if catch_unwind(AssertUnwindSafe(|| self.dispatch(request))).is_err() {
                        log::error!("a request made the dispatcher panic");
                    }
                }
                // This tiny_http accepts no more. It is kept for the connections it has, and another takes the new ones.
                Err(error) => {
                    if self.front.go_on_after(&error) {
                        Arc::clone(&self).start_again();
                    }
                }
            }
        }
    }

    /// Sends a request where it belongs. Never waits.
    fn dispatch(&self, request: Request) {
        if !self.front.busy.swap(true, Ordering::Relaxed) {
            // Full means that it is about to wake.
            self.front.wake.0.try_send(()).unwrap_or_default();
        }
        let body = match body_length(&request, self.front.max_body) {
            Ok(body) => body,
            Err(failed) => return refuse(request, failed),
        };
        if self.front.closing.load(Ordering::Acquire) {
            return refuse(request, Failed::Unavailable { retry_after: OVERLOAD_RETRY_AFTER });
        }
        let target = origin_form(request.url());
        let (path, query) = match target.split_once('?') {
            Some((path, query)) => (path, Some(query)),
            None => (target, None),
        };
        // Asked before the routes are, which are all there are if it is so.
        let known = self.rack.is_known(Duration::ZERO);
        let routes = self.rack.routes();
        match routes.resolve(path) {
            Target::Plugin { plugin, mount, path } => {
                let http = self.message(&request, mount, path, query);
                let plugin = Arc::clone(plugin);
                let client = Box::new(TinyClient::new(request, body, self.front.max_body));
                plugin.submit(Job::Web(Box::new(WebJob { request: http, body, client, arrived: Instant::now(), retries: 0 })));
            }
            Target::Api(_) => {
                let client = TinyClient::new(request, body, self.front.max_body);
                if let Err(full) = self.desk.try_send(client) {
                    full.into_inner().fail(Failed::Overloaded);
                }
            }
            Target::Nothing if !known => self.keep(request),
            _ if body != BodyLength::Known(0) => refuse(request, Failed::NotFound),
            Target::Index | Target::Health if !matches!(request.method().as_str(), "GET" | "HEAD") => {
                refuse(request, Failed::MethodNotAllowed);
            }
            Target::Health => TinyClient::new(request, body, 0).respond(200, "text/plain; charset=utf-8", b"ok\n", &[]),
            Target::Index => {
                let html = header(&request, "accept").is_some_and(|accept| accept.contains("text/html"));
                let (kind, page) = pages::index(&self.rack, html);
                TinyClient::new(request, body, 0).respond(200, kind, page.as_bytes(), &pages::HEADERS);
            }
            Target::Nothing => refuse(request, Failed::NotFound),
        }
    }

    /// Keeps a request for what is not known yet, while the first look for plugins is under way.
    fn keep(&self, request: Request) {
        match self.lobby.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            Some(lobby) if lobby.len() < MAX_LOBBY => return lobby.push((Instant::now(), request)),
            Some(_) => return refuse(request, Failed::Overloaded),
            None => {}
        }
        // The look has ended just now, so this time it is known.
        self.dispatch(request);
    }

    /// Sends the requests in the lobby on as their plugins become known, those that have waited too long away, and the rest on at the
    /// end of the first look.
    fn attend_lobby(&self) {
        let mut known = false;
        while !known {
            known = self.rack.is_known(LOBBY_TICK);
            let routes = self.rack.routes();
            let is_due = |(arrived, request): &mut (Instant, Request)| {
                let path = origin_form(request.url()).split('?').next().unwrap_or_default();
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
            for (arrived, request) in due {
                if arrived.elapsed() >= HOLD && !known {
                    refuse(request, Failed::Unavailable { retry_after: STARTING_RETRY_AFTER });
                } else {
                    self.dispatch(request);
                }
            }
        }
    }

    /// The message for a plugin.
    fn message(&self, request: &Request, mount: &str, path: &str, query: Option<&str>) -> Http {
        let remote = request.remote_addr().map(|address| address.ip().to_canonical().to_string()).unwrap_or_default();
        Http {
            id: 0,
            method: request.method().as_str().to_owned(),
            path: path.to_owned(),
            query: query.map(str::to_owned),
            mount: mount.to_owned(),
            headers: self.headers(request, mount, &remote),
            remote,
            more: false,
        }
    }

    /// The request's headers as a plugin gets them: those of one hop removed, the host's own added.
    fn headers(&self, request: &Request, mount: &str, remote: &str) -> Headers {
        let named =
            connection_options(request.headers().iter().map(|header| (header.field.as_str().as_str(), header.value.as_str())));
        let mut headers = Headers::with_capacity(request.headers().len() + 4);
        for header in request.headers() {
            let name = header.field.as_str().as_str().to_ascii_lowercase();
            let ours =
                matches!(&*name, "expect" | "x-forwarded-for" | "x-forwarded-proto" | "x-forwarded-prefix" | "x-request-id");
            if !ours && !HOP_BY_HOP.contains(&&*name) && !named.contains(&name) {
                headers.push((name, header.value.as_str().to_owned()));
            }
        }
        headers.push(("x-forwarded-for".into(), remote.to_owned()));
        headers.push(("x-forwarded-proto".into(), "http".into()));
        headers.push(("x-forwarded-prefix".into(), mount.to_owned()));
        headers.push(("x-request-id".into(), self.front.request_id()));
        headers
    }
}

/// The API's threads.
fn attend(api: &Api, queue: &Receiver<TinyClient>) {
    for mut client in queue {
        let handled = catch_unwind(AssertUnwindSafe(|| {
            let Some(request) = client.request() else { return };
            let (method, url) = (request.method().as_str().to_owned(), request.url().to_owned());
            let authorization = header(request, "authorization").map(str::to_owned);
            let reply = api.handle(&method, origin_form(&url), authorization.as_deref(), &mut client);
            let headers: Vec<_> = [("cache-control", "no-store")].into_iter().chain(reply.header).collect();
            client.respond(reply.status, "application/json", reply.body.as_bytes(), &headers);
        }));
        if handled.is_err() {
            log::error!("a request made the API panic");
        }
    }
}

/// Reads away what comes of a body, for a while.
fn drain(request: &mut Request) {
    let deadline = Instant::now() + LINGER;
    let mut buffer = [0; 16 * 1024];
    let body = request.as_reader();
    while Instant::now() < deadline && body.read(&mut buffer).is_ok_and(|n| n > 0) {}
}

/// Whether dropping a request, or reading its body to an early end, would make tiny_http allocate more than the machine may survive:
/// as much as is left of the body. Such a request is forgotten instead, which costs two files and a thread.
fn is_undroppable(request: &Request) -> bool {
    let length = request.body_length().unwrap_or(0) as u64;
    let undroppable = length > rustix::system::sysinfo().totalram as u64 / 2;
    if undroppable {
        log::warn!("a request announced a body of {length} bytes: two files and a thread are lost to it");
    }
    undroppable
}

/// Answers a request with the host's own error.
fn refuse(request: Request, failed: Failed) {
    TinyClient::new(request, BodyLength::Unknown, 0).fail(failed);
}

/// Whether tiny_http has read the whole body already: it has a small one, unless the client waits to be asked for it.
fn is_preread(request: &Request) -> bool {
    let small = request.body_length().unwrap_or(0) as u64 <= PREREAD;
    small && header(request, "transfer-encoding").is_none() && header(request, "expect").is_none()
}

/// How much body a request has; refuses lengths that are over the limit or do not say one thing.
fn body_length(request: &Request, max_body: u64) -> Result<BodyLength, Failed> {
    let all = |name: &'static str| {
        request.headers().iter().filter(move |header| header.field.equiv(name)).map(|header| header.value.as_str())
    };
    let mut lengths = all("content-length");
    let mut encodings = all("transfer-encoding");
    match (lengths.next(), encodings.next()) {
        (None, None) => Ok(BodyLength::Known(0)),
        (Some(length), None) if lengths.next().is_none() && !length.is_empty() && length.bytes().all(|b| b.is_ascii_digit()) => {
            match length.parse() {
                Ok(length) if length <= max_body => Ok(BodyLength::Known(length)),
                _ => Err(Failed::TooLarge),
            }
        }
        (None, Some(encoding)) if encodings.next().is_none() && encoding.eq_ignore_ascii_case("chunked") => {
            Ok(BodyLength::Unknown)
        }
        _ => Err(Failed::BadBody),
    }
}

/// The target as a path: absolute-form is reduced (RFC 9112, section 3.2.2).
fn origin_form(target: &str) -> &str {
    match target.strip_prefix("http://").or_else(|| target.strip_prefix("https://")) {
        Some(rest) => rest.find('/').map_or("/", |at| &rest[at..]),
        None => target,
    }
}

/// The headers that `connection` names as belonging to this hop, in lower case.
fn connection_options<'a>(headers: impl Iterator<Item = (&'a str, &'a str)>) -> Vec<String> {
    let options = headers.filter(|(name, _)| name.eq_ignore_ascii_case("connection")).flat_map(|(_, value)| value.split(','));
    options.map(|name| name.trim().to_ascii_lowercase()).collect()
}

fn header<'a>(request: &'a Request, name: &'static str) -> Option<&'a str> {
    request.headers().iter().find(|header| header.field.equiv(name)).map(|header| header.value.as_str())
}

/// Status, a header that belongs to it, and JSON body of the host's own errors.
fn refusal(failed: Failed) -> (u16, Option<(&'static str, String)>, String) {
    let retry = |seconds: u64| Some(("retry-after", seconds.to_string()));
    let allow = Some(("allow", "GET, HEAD".to_owned()));
    let (status, header, code, message) = match failed {
        Failed::BadBody => (400, None, "bad_request", "the request's body did not come whole, or its length is not well given"),
        Failed::NotFound => (404, None, "not_found", "there is nothing at this path"),
        Failed::MethodNotAllowed => (405, allow, "method_not_allowed", "only GET and HEAD are answered here"),
        Failed::TooLarge => (413, None, "too_large", "the request's body is over the limit (serve --max-body)"),
        Failed::HeadTooLarge => (431, None, "head_too_large", "the request's headers are over the limit of 64 KiB"),
        Failed::BadGateway => (502, None, "bad_gateway", "the plugin gave no valid answer; its log has the reason"),
        Failed::Unavailable { retry_after } => (503, retry(retry_after), "unavailable", "the plugin is not available now"),
        Failed::Overloaded => (503, retry(OVERLOAD_RETRY_AFTER), "overloaded", "too many requests are waiting"),
        Failed::Timeout => (504, None, "timeout", "the plugin did not answer in time"),
    };
    (status, header, api::error_body(code, message))
}

/// A client of tiny_http's, with its request or, once it is being answered, its answer.
pub(crate) struct TinyClient {
    state: ClientState,
    head: bool,
    version: HTTPVersion,
    close: bool,
    /// Bytes of the body still allowed.
    allowance: u64,
    /// Whether nothing of the request's body is left on the connection.
    read: bool,
    /// How much of it that is, where it is known.
    left: Option<u64>,
    chunked: bool,
    address: Option<SocketAddr>,
}

enum ClientState {
    Asking(Box<Request>),
    Answering(Box<dyn Write + Send>),
    /// Answering past tiny_http, because part of the request's body is left: once tiny_http is rid of the request it takes what is
    /// left for the next one. So the connection is ended first.
    Ending(Box<Request>, ClientSocket),
    Answered,
}

impl TinyClient {
    fn new(request: Request, body: BodyLength, max_body: u64) -> Self {
        let close = header(&request, "connection").is_some_and(|value| value.to_ascii_lowercase().contains("close"));
        Self {
            head: request.method().as_str() == "HEAD",
            version: request.http_version().clone(),
            close,
            allowance: max_body,
            read: is_preread(&request),
            left: match body {
                BodyLength::Known(length) => Some(length),
                BodyLength::Unknown => None,
            },
            chunked: false,
            address: request.remote_addr().copied(),
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

    /// Takes the request out, to be answered elsewhere.
    fn take(&mut self) -> Self {
        Self {
            state: std::mem::replace(&mut self.state, ClientState::Answered),
            head: self.head,
            version: self.version.clone(),
            close: self.close,
            allowance: self.allowance,
            read: self.read,
            left: self.left,
            chunked: self.chunked,
            address: self.address,
        }
    }

    /// Answers with the host's own error, here and now.
    fn refuse(&mut self, failed: Failed) {
        let (status, header, body) = refusal(failed);
        let headers: Vec<_> = header.iter().map(|(name, value)| (*name, value.as_str())).collect();
        self.respond(status, "application/json", body.as_bytes(), &headers);
    }

    /// Sends a whole answer of the host's own.
    fn respond(&mut self, status: u16, content_type: &str, body: &[u8], headers: &[(&str, &str)]) {
        let mut answer = self.head_start(status);
        for (name, value) in [("content-type", content_type)].iter().chain(headers) {
            put_header(&mut answer, name, value);
        }
        put_header(&mut answer, "content-length", &body.len().to_string());
        answer.extend_from_slice(b"\r\n");
        if !self.head {
            answer.extend_from_slice(body);
        }
        // A client that has gone needs no answer.
        drop(self.begin().and_then(|out| send(out, &answer)));
        self.finish();
    }

    fn head_start(&self, status: u16) -> Vec<u8> {
        let mut head = Vec::with_capacity(512);
        let reason = tiny_http::StatusCode(status).default_reason_phrase();
        head.extend_from_slice(format!("HTTP/1.1 {status} {reason}\r\n").as_bytes());
        // What is not read of a body cannot be told from a next request, so then this answer is the last.
        if self.close || !self.read {
            put_header(&mut head, "connection", "close");
        }
        head
    }

    fn socket(&self) -> io::Result<ClientSocket> {
        ClientSocket::find(self.address.ok_or(io::ErrorKind::NotFound)?)
    }

    /// Turns to answering.
    fn begin(&mut self) -> io::Result<&mut (dyn Write + Send)> {
        self.state = match std::mem::replace(&mut self.state, ClientState::Answered) {
            ClientState::Asking(request) if self.read => ClientState::Answering(request.into_writer()),
            ClientState::Asking(mut request) => match self.socket() {
                Ok(socket) => ClientState::Ending(request, socket),
                Err(error) => {
                    log::debug!("a client's connection cannot be found: {error}");
                    if is_undroppable(&request) {
                        std::mem::forget(request);
                        ClientState::Answered
                    } else {
                        drain(&mut request);
                        ClientState::Answering(request.into_writer())
                    }
                }
            },
            other => other,
        };
        match &mut self.state {
            ClientState::Answering(out) => Ok(out.as_mut()),
            ClientState::Ending(_, socket) => Ok(socket),
            _ => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// The answer has come to its end, or is broken off.
    fn finish(&mut self) {
        if let ClientState::Ending(mut request, socket) = std::mem::replace(&mut self.state, ClientState::Answered) {
            let undroppable = is_undroppable(&request);
            // A connection that is ended while its client still sends may take the answer from it, so it has a moment to see it.
            if !undroppable && socket.end_sending(LINGER_READ).is_ok() {
                drain(&mut request);
            }
            if let Err(error) = socket.end() {
                log::debug!("a client's connection is ended already: {error}");
            }
            if undroppable {
                return std::mem::forget(request);
            }
            drain(&mut request);
        }
    }
}

impl Client for TinyClient {
    fn read_body(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let ClientState::Asking(request) = &mut self.state else { return Ok(0) };
        let n = request.as_reader().read(buffer)?;
        self.left = self.left.map(|left| left.saturating_sub(n as u64));
        self.read |= n == 0 || self.left == Some(0);
        match self.allowance.checked_sub(n as u64) {
            Some(left) => self.allowance = left,
            None => return Err(io::ErrorKind::FileTooLarge.into()),
        }
        Ok(n)
    }

    fn answer(&mut self, response: &Response, first: &[u8]) -> io::Result<()> {
        let mut head = self.head_start(response.status);
        let (mut has_length, mut has_date) = (false, false);
        let named = connection_options(response.headers.iter().map(|(name, value)| (name.as_str(), value.as_str())));
        for (name, value) in &response.headers {
            has_length |= name.eq_ignore_ascii_case("content-length");
            has_date |= name.eq_ignore_ascii_case("date");
            let name = name.to_ascii_lowercase();
            if !HOP_BY_HOP.contains(&&*name) && !named.contains(&name) {
                put_header(&mut head, &name, value);
            }
        }
        if !has_date {
            put_header(&mut head, "date", &httpdate::fmt_http_date(SystemTime::now()));
        }
        let bodiless = self.head || response.is_bodiless();
        let whole = !response.more && (!bodiless || !first.is_empty());
        if !has_length && (whole || !bodiless) {
            if whole {
                put_header(&mut head, "content-length", &first.len().to_string());
            } else if self.version >= HTTPVersion(1, 1) {
                put_header(&mut head, "transfer-encoding", "chunked");
                self.chunked = true;
            }
        }
        head.extend_from_slice(b"\r\n");
        if !bodiless {
            self.put_piece(&mut head, first, !response.more);
        }
        let sent = self.begin().and_then(|out| send(out, &head));
        if !response.more {
            self.finish();
        }
        sent
    }

    fn piece(&mut self, bytes: &[u8], last: bool) -> io::Result<()> {
        let mut piece = Vec::new();
        let sent = match (self.head, self.chunked) {
            (true, _) => Ok(()),
            (false, false) if !bytes.is_empty() => self.begin().and_then(|out| send(out, bytes)),
            (false, false) => Ok(()),
            (false, true) => {
                self.put_piece(&mut piece, bytes, last);
                self.begin().and_then(|out| send(out, &piece))
            }
        };
        if last {
            self.finish();
        }
        sent
    }

    fn cut(&mut self) {
        if self.chunked {
            // Not the beginning of a chunk: where the connection cannot be ended, the client sees all the same that this is no end.
            drop(self.begin().and_then(|out| send(out, b"!\r\n")));
        }
        if let Err(error) = self.socket().and_then(|socket| socket.end()) {
            log::debug!("a client's connection cannot be ended: {error}");
        }
        self.finish();
    }

    /// Whoever refuses a request does not wait for what is left of its body: an usher does.
    fn fail(&mut self, failed: Failed) {
        if self.read {
            return self.refuse(failed);
        }
        if USHERS.fetch_add(1, Ordering::Relaxed) >= MAX_USHERS {
            USHERS.fetch_sub(1, Ordering::Relaxed);
            return self.refuse(failed);
        }
        let mut client = self.take();
        let refusing = move || {
            client.refuse(failed);
            USHERS.fetch_sub(1, Ordering::Relaxed);
        };
        if let Err(error) = small_thread("usher").spawn(refusing) {
            USHERS.fetch_sub(1, Ordering::Relaxed);
            log::warn!("a request was refused without a thread to wait for its body: {error}");
        }
    }
}

impl TinyClient {
    /// Appends a piece of the body as it goes on the wire.
    fn put_piece(&self, out: &mut Vec<u8>, bytes: &[u8], last: bool) {
        if !self.chunked {
            return out.extend_from_slice(bytes);
        }
        if !bytes.is_empty() {
            out.extend_from_slice(format!("{:x}\r\n", bytes.len()).as_bytes());
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
            self.refuse(Failed::BadGateway);
        }
    }
}

/// One write, for head and body together, and nothing held back.
fn send(out: &mut (dyn Write + Send), bytes: &[u8]) -> io::Result<()> {
    out.write_all(bytes)?;
    out.flush()
}

/// Appends a header line. Each character of a value is one byte (see `Response::check`).
fn put_header(head: &mut Vec<u8>, name: &str, value: &str) {
    head.extend_from_slice(name.as_bytes());
    head.extend_from_slice(b": ");
    if value.is_ascii() {
        head.extend_from_slice(value.as_bytes());
    } else {
        head.extend(value.chars().map(|c| u8::try_from(u32::from(c)).unwrap_or(b'?')));
    }
    head.extend_from_slice(b"\r\n");
}
