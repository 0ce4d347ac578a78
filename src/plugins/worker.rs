//! A worker: a thread that owns one connection to a plugin. It takes requests from the plugin's queue, sends them, and passes the answers
//! on to the clients as they arrive.
//!
//! While the plugin is quick, the worker pipelines requests that are safe to repeat, so that one write and one read serve many. It sends
//! all others one at a time. If the connection is lost, the worker opens another. It ends when the plugin's process ends or is to stop.
//!
//! **A lost request.** The request that was due when its process ended is answered 502 and never sent to another process, because it may
//! have killed the process. The worker re-queues the requests pipelined behind it, which are not pipelined again, so that a second death
//! shows which one is fatal. If only the connection was lost, a safe request is sent once more, to the same process.
//!
//! **The plugin's log** gets one line for each request that the plugin failed: the request, what the plugin sent, and what the protocol
//! expects.

use crate::http::request::{BodyLength, Loss, RequestBody};
use crate::http::response_channel::PIECE;
use crate::http::{HttpError, Request, WaitingRequest, errors};
use crate::plugins::connection::{Connection, RELEASE_AFTER, Sent, WaitError};
use crate::plugins::job::{Job, KvFailure, KvJob, MAX_KV_TIME};
use crate::plugins::plugin::Plugin;
use crate::plugins::restart_policy::Work;
use crate::plugins::scaling::QUICK;
use crate::process::exit::Exit;
use crate::protocol::frame::ReadError;
use crate::protocol::message::{Data, Kv, MAX_INLINE_BODY, Message, Ping, Response, Shutdown};
use crossbeam_channel::{Receiver, RecvTimeoutError, Select};
use std::cell::{Cell, OnceCell};
use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Idle time after which the worker pings the plugin.
const PING_AFTER: Duration = Duration::from_secs(15);

/// Time limit for the pong.
const PING_TIME: Duration = Duration::from_secs(5);

/// Number of consecutive pings without a pong after which the plugin is restarted.
const MAX_MISSED_PINGS: u32 = 3;

/// Number of pings without a request between them after which a connection beyond the first is closed.
const IDLE_PINGS: u32 = 4;

/// Most requests that are pipelined.
const MAX_DEPTH: usize = 32;

/// Number of recent requests that dominate the moving average of the time for one.
const MEMORY: u32 = 16;

/// Bytes of pipelined requests after which no more are added: less than a socket's buffer holds, so that the write never waits for a
/// plugin that itself waits to be read.
const MAX_BATCH: usize = 64 * 1024;

/// Time for a batch from which it counts as blocking: far more than a quick plugin needs, wake-ups included.
const LONG: Duration = Duration::from_millis(20);

/// Time without progress after which a streaming body is aborted, in either direction.
const STREAM_IDLE: Duration = Duration::from_secs(60);

/// Interval at which the worker expires queued requests while it waits for a slow client.
const CLIENT_TICK: Duration = Duration::from_millis(100);

/// Time that a request waits while streams occupy every connection. Clients decide when streams end, so a longer wait would seldom help.
const STREAMS_TIME: Duration = Duration::from_secs(1);

/// Time after which a long answer counts as a stream even if it is no event stream, so that requests do not wait for its end.
const LONG_STREAM: Duration = Duration::from_secs(15);

/// Time limit to open another connection.
const RECONNECT_TIME: Duration = Duration::from_secs(5);

/// Time for the exit of the process to become known after its connection was lost. If it takes longer, as under load, only the message is
/// less exact: the request is marked with its process, and no other process gets it.
const SETTLE_TIME: Duration = Duration::from_millis(250);

/// The same for a request that was not sent, which only needs another connection.
const UNSENT_SETTLE_TIME: Duration = Duration::from_millis(100);

/// Idle time after which a connection is checked for unexpected input before a safe request too: a second answer to the previous request,
/// or the end of the connection, has arrived by then. A busier connection is spared the system call, since ids reveal a second answer.
const LOOK_AFTER: Duration = Duration::from_millis(10);

/// Most late pongs on an idle connection. More are a flood.
const MAX_LATE_PONGS: u32 = MAX_MISSED_PINGS + 1;

/// Time that the shutdown of a connection waits until the plugin has accepted new ones.
const ACCEPT_TIME: Duration = Duration::from_secs(1);

/// Pause between attempts to connect.
const RECONNECT_PAUSE: Duration = Duration::from_millis(20);

/// The media type of server-sent events.
const EVENTS: &str = "text/event-stream";

/// The state of one process of a plugin, shared by the supervisor and the workers.
pub(crate) struct ProcessState {
    /// The number of the process, unique in this run of the host.
    pub(crate) number: u64,
    /// The path of the socket on which it listens.
    pub(crate) socket: PathBuf,
    /// Its uid, if the plugin has one of its own.
    pub(crate) uid: Option<u32>,
    /// Closes when the workers are to stop.
    pub(crate) stop: Receiver<()>,
    /// Closes once the process has ended and `exit` and `ended` are set.
    pub(crate) exited: Receiver<()>,
    /// The exit, if the kernel reported one.
    pub(crate) exit: OnceLock<Exit>,
    /// The process is to stop, or has ended.
    pub(crate) stopping: AtomicBool,
    /// The process has ended.
    pub(crate) ended: AtomicBool,
    /// The process was sent a request.
    pub(crate) asked: AtomicBool,
    /// The process has answered a request.
    pub(crate) served: AtomicBool,
    /// Number of connections that the plugin may not have accepted yet.
    pub(crate) unaccepted: AtomicUsize,
    /// Time for an answer to begin.
    pub(crate) request_timeout: Duration,
}

impl ProcessState {
    /// What the process has served so far.
    pub(crate) fn work(&self) -> Work {
        match (self.asked.load(Ordering::Relaxed), self.served.load(Ordering::Relaxed)) {
            (_, true) => Work::Served,
            (true, false) => Work::Asked,
            (false, false) => Work::None,
        }
    }

    /// Sets a flag that is nearly always set already.
    fn set_flag(flag: &AtomicBool) {
        if !flag.load(Ordering::Relaxed) {
            flag.store(true, Ordering::Relaxed);
        }
    }
}

/// Counts a connection without an answer so far, which the plugin may not have accepted yet. While there is one, the plugin gets no
/// `shutdown`: it could exit as soon as its accepted connections are closed, and the requests on this one would be lost.
struct UnacceptedConnection(Arc<ProcessState>);

impl UnacceptedConnection {
    fn new(process: &Arc<ProcessState>) -> Self {
        process.unaccepted.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(process))
    }
}

impl Drop for UnacceptedConnection {
    fn drop(&mut self) {
        self.0.unaccepted.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What a worker does next.
enum Next {
    Job(Job),
    Ping,
    Stop,
}

/// An answer that continues in `data` frames.
struct Stream {
    id: u64,
    /// Its content length, if declared.
    declared: Option<u64>,
    /// Whether it is a stream of server-sent events. Clients reconnect by themselves, so it need not delay a stop.
    events: bool,
}

/// Whether the connection is still usable.
type Outcome = Result<(), Broken>;

/// The connection is not usable any more.
struct Broken;

/// What a worker does while it waits for its plugin or a client.
struct Stalling {
    plugin: Arc<Plugin>,
    process: Arc<ProcessState>,
    /// Whether the worker's connection counts as stalled.
    stalled: Cell<bool>,
}

impl Stalling {
    /// Marks the connection as stalled by the current request, asks for another one, and expires queued requests. True if the process has
    /// ended, so that the caller stops waiting.
    fn stall(&self) -> bool {
        let Self { plugin, process, stalled } = self;
        if !stalled.replace(true) {
            plugin.scaling.stalled.fetch_add(1, Ordering::Relaxed);
        }
        plugin.ask_to_grow();
        let streams_only = plugin.is_full_of_streams();
        let limit = |job: &Job| {
            let limit = job.time_limit(process.request_timeout);
            if streams_only { limit.min(STREAMS_TIME) } else { limit }
        };
        plugin.queue.expire(|job| job.arrived().elapsed() >= limit(job), |job| expire(plugin, process, job));
        process.ended.load(Ordering::Relaxed)
    }

    /// Waits until the client takes more of its answer; meanwhile expires queued requests.
    fn wait_for_client(&self, request: &Request) {
        while !request.responder.has_room_within(CLIENT_TICK) && !self.stall() {}
    }

    /// Ends the mark of the current request.
    fn clear(&self) {
        if self.stalled.take() {
            self.plugin.scaling.stalled.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// A worker and its connection.
pub(crate) struct Worker {
    plugin: Arc<Plugin>,
    process: Arc<ProcessState>,
    connection: Connection,
    unaccepted: Option<UnacceptedConnection>,
    /// Average time for a request; none before the first measurement.
    pace: Option<Duration>,
    /// A request taken from the queue that is sent alone, after the current batch.
    next_job: Option<Job>,
    /// Buffer for request bodies.
    buffer: Vec<u8>,
    stalling: Stalling,
    missed_pings: u32,
    idle_pings: u32,
    /// Time of the last answer.
    last_answer: Instant,
    /// Whether this is the first worker of the process, which stays until the process ends.
    first: bool,
}

impl Worker {
    /// The first worker of a process, on the connection that was used for `init`.
    pub(crate) fn new(plugin: Arc<Plugin>, process: Arc<ProcessState>, connection: Connection) -> Self {
        let stalling = Stalling { plugin: Arc::clone(&plugin), process: Arc::clone(&process), stalled: Cell::new(false) };
        Self {
            plugin,
            process,
            connection,
            unaccepted: None,
            pace: None,
            next_job: None,
            buffer: Vec::new(),
            stalling,
            missed_pings: 0,
            idle_pings: 0,
            last_answer: Instant::now(),
            first: true,
        }
    }

    /// A further worker, which opens its own connection.
    pub(crate) fn connect(plugin: Arc<Plugin>, process: Arc<ProcessState>) -> Option<Self> {
        let unaccepted = Some(UnacceptedConnection::new(&process));
        let connection = connect(&plugin, &process)?;
        Some(Self { first: false, unaccepted, ..Self::new(plugin, process, connection) })
    }

    /// Serves requests until the process ends or is to stop, or the connection is surplus.
    pub(crate) fn run(mut self) {
        // Many plugins may start or be pinged at once; none should keep a buffer that only a request needs.
        self.release();
        loop {
            let outcome = match self.next() {
                Next::Job(job) => self.serve(job),
                Next::Ping if !self.first && self.idle_pings >= IDLE_PINGS => return,
                Next::Ping => {
                    let outcome = self.ping();
                    self.release();
                    outcome
                }
                Next::Stop => return self.shut_down(),
            };
            self.stalling.clear();
            self.unaccepted = None;
            if outcome.is_ok() && !self.first && self.next_job.is_none() && self.plugin.is_to_shrink() {
                return;
            }
            if outcome.is_err() {
                self.unaccepted = Some(UnacceptedConnection::new(&self.process));
                match connect(&self.plugin, &self.process) {
                    Some(connection) => self.connection = connection,
                    None => {
                        if let Some(job) = self.next_job.take() {
                            self.plugin.requeue(job);
                        }
                        return;
                    }
                }
            }
        }
    }

    fn next(&mut self) -> Next {
        if let Some(job) = self.next_job.take() {
            return Next::Job(job);
        }
        // Leaves queued requests to the next process, or a constant stream of them would keep this one from stopping.
        if self.process.stopping.load(Ordering::Relaxed) {
            return Next::Stop;
        }
        if let Some(job) = self.plugin.queue.try_take() {
            return Next::Job(job);
        }
        self.plugin.scaling.idle.fetch_add(1, Ordering::Relaxed);
        let next = self.next_within(RELEASE_AFTER).or_else(|| {
            self.release();
            self.next_within(PING_AFTER - RELEASE_AFTER)
        });
        self.plugin.scaling.idle.fetch_sub(1, Ordering::Relaxed);
        next.unwrap_or(Next::Ping)
    }

    /// Frees memory that an idle connection does not need.
    fn release(&mut self) {
        self.connection.release();
        self.buffer = Vec::new();
    }

    /// Waits up to `time` for a request or the order to stop.
    fn next_within(&self, time: Duration) -> Option<Next> {
        let (queue, deadline) = (&self.plugin.queue, Instant::now() + time);
        let mut select = Select::new();
        select.recv(queue.channel());
        let woken = select.recv(queue.wake());
        let stop = select.recv(&self.process.stop);
        loop {
            let ready = select.select_deadline(deadline).ok()?;
            match ready.index() {
                index if index == stop => {
                    ready.recv(&self.process.stop).ok();
                    return Some(Next::Stop);
                }
                index if index == woken => {
                    ready.recv(queue.wake()).ok();
                    if let Some(job) = queue.try_take() {
                        return Some(Next::Job(job));
                    }
                }
                _ => return Some(ready.recv(queue.channel()).map_or(Next::Stop, |job| Next::Job(queue.received(job)))),
            }
        }
    }

    /// Serves a request or operation, or fails it if it has waited too long.
    fn serve(&mut self, job: Job) -> Outcome {
        self.idle_pings = 0;
        let now = Instant::now();
        if now.duration_since(job.arrived()) >= job.time_limit(self.process.request_timeout) {
            expire(&self.plugin, &self.process, job);
            return Ok(());
        }
        if self.process.ended.load(Ordering::Relaxed) {
            self.next_job = Some(job);
            return Err(Broken);
        }
        match job {
            Job::Http(waiting) => {
                // None if the client has gone.
                let Some(mut request) = waiting.take(now) else { return Ok(()) };
                if !self.can_send(request.is_safe(), now) {
                    self.next_job = WaitingRequest::new(request).map(Job::Http);
                    return Err(Broken);
                }
                match request.loss.take_if(|loss| loss.process != self.process.number) {
                    Some(loss) => {
                        let why = format!("{}, and then the process ended", loss.why);
                        self.fail(request, errors::BAD_GATEWAY, &why, Ok(()))
                    }
                    None => self.serve_requests(request),
                }
            }
            Job::Kv(job) => {
                if !self.can_send(false, now) {
                    self.next_job = Some(Job::Kv(job));
                    return Err(Broken);
                }
                self.operate(*job)
            }
        }
    }

    /// Whether the connection is fit for a request, which may be `repeatable`. If not, the request may go to another connection, or to the
    /// next process.
    fn can_send(&mut self, repeatable: bool, now: Instant) -> bool {
        let rested = self.connection.holds_bytes() || now.duration_since(self.last_answer) >= LOOK_AFTER;
        if (repeatable && !rested) || self.is_clean("on an idle connection") {
            return true;
        }
        if !repeatable {
            self.has_ended(UNSENT_SETTLE_TIME);
        }
        false
    }

    /// Whether the connection has no unexpected input and is open. A new connection always counts as clean, so that a request that keeps
    /// finding closed connections fails on the second.
    fn is_clean(&mut self, place: &str) -> bool {
        if !self.connection.is_used() {
            return true;
        }
        for _ in 0..MAX_LATE_PONGS {
            if !self.connection.holds_bytes() && !self.connection.has_answer() {
                return true;
            }
            let what = match self.connection.wait(Instant::now(), || false) {
                Ok(()) => match self.connection.take().map(|frame| frame.message()) {
                    Ok(Ok(Message::Pong(_))) => continue,
                    Ok(Ok(other)) => format!("{} came {place}, where nothing was due", other.named()),
                    Ok(Err(malformed)) => format!("a frame came {place}, where nothing was due: {malformed}"),
                    Err(error) => format!("bytes came {place}, where nothing was due: {error}"),
                },
                Err(WaitError::Broken(ReadError::Closed)) => return false,
                Err(WaitError::Broken(error)) => format!("bytes came {place}, where nothing was due: {error}"),
                Err(WaitError::Deadline | WaitError::Interrupted) => {
                    format!("the beginning of a frame came {place}, where nothing was due")
                }
            };
            self.plugin.log.note(&format!("protocol error: {what}"));
            return false;
        }
        self.plugin.log.note(&format!("protocol error: more than {MAX_LATE_PONGS} pongs came {place}, where nothing was due"));
        false
    }

    /// Sends a request, with other queued ones if they can be pipelined, and passes the answers on to their clients.
    fn serve_requests(&mut self, mut first: Request) -> Outcome {
        let begun = Instant::now();
        let timeout = self.process.request_timeout;
        let mut outstanding = VecDeque::with_capacity(1);
        let mut given = None;
        ProcessState::set_flag(&self.process.asked);
        if !first.is_safe() {
            self.plugin.scaling.note_blocking();
        }
        if first.length == BodyLength::Known(0) {
            let depth = if first.is_safe() && !first.alone { self.depth() } else { 1 };
            self.send(first, Vec::new(), &mut outstanding);
            while outstanding.len() < depth && self.connection.queued() < MAX_BATCH {
                match self.plugin.queue.try_take() {
                    Some(Job::Http(waiting)) => {
                        let Some(request) = waiting.take(begun) else { continue };
                        if request.is_safe() && !request.alone {
                            self.send(request, Vec::new(), &mut outstanding);
                        } else {
                            self.next_job = WaitingRequest::new(request).map(Job::Http);
                            break;
                        }
                    }
                    Some(job) => {
                        self.next_job = Some(job);
                        break;
                    }
                    None => break,
                }
            }
        } else {
            match first.take_whole_body(MAX_INLINE_BODY) {
                Some(body) => self.send(first, body, &mut outstanding),
                None => outstanding.extend(self.upload(first)?),
            }
            // The client may be slow to send the body, so the plugin's time limit starts after it.
            given = Some(Instant::now() + timeout);
        }
        let sent = outstanding.len();
        while let Some((id, request)) = outstanding.pop_front() {
            let deadline = given.unwrap_or(request.arrived + timeout);
            if self.answer(id, request, deadline, &mut outstanding).is_err() {
                self.requeue(outstanding);
                return Err(Broken);
            }
        }
        self.last_answer = Instant::now();
        self.measure(self.last_answer.duration_since(begun), sent);
        Ok(())
    }

    /// The number of requests to pipeline.
    fn depth(&self) -> usize {
        match self.pace {
            Some(pace) if pace < QUICK => {
                let connections = self.plugin.scaling.connections.load(Ordering::Relaxed).max(1);
                (1 + self.plugin.queue.len() / connections).min(MAX_DEPTH)
            }
            _ => 1,
        }
    }

    fn measure(&mut self, elapsed: Duration, requests: usize) {
        let count = u32::try_from(requests).unwrap_or(u32::MAX);
        if elapsed >= LONG {
            self.plugin.scaling.note_blocking();
        }
        if let Some(each) = elapsed.checked_div(count) {
            let weight = count.min(MEMORY / 2);
            let pace = self.pace.map_or(each, |pace| (pace * (MEMORY - weight) + each * weight) / MEMORY);
            self.pace = Some(pace);
            self.plugin.scaling.set_pace(pace);
        }
        self.plugin.answered.fetch_add(requests as u64, Ordering::Relaxed);
    }

    /// Appends a request with its whole body to the send buffer.
    fn send(&mut self, request: Request, body: Vec<u8>, outstanding: &mut VecDeque<(u64, Request)>) {
        let id = self.connection.next_id();
        match self.connection.queue_request(&request, id, false, body) {
            Ok(()) => outstanding.push_back((id, request)),
            // The only possible cause is a head that does not fit into a frame.
            Err(_) => request.fail(errors::HEAD_TOO_LARGE),
        }
    }

    /// Sends a request with its body, until the plugin answers. None if the client was answered already, or has gone.
    fn upload(&mut self, mut request: Request) -> Result<Option<(u64, Request)>, Broken> {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(MAX_INLINE_BODY, 0);
        let is_streamed = matches!(request.body, RequestBody::Stream(_));
        let mut length = 0;
        let mut ended = false;
        // A complete body fills the first frame; of a streamed one, the plugin gets the first bytes at once.
        while length < buffer.len() && !ended && !(is_streamed && length > 0) {
            match request.read_body(&mut buffer[length..], CLIENT_TICK) {
                Ok(n) => {
                    length += n;
                    ended = n == 0 || request.length == BodyLength::Known(length as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.stalling.stall();
                    if request.responder.is_cancelled() {
                        return Ok(None);
                    }
                    if self.process.ended.load(Ordering::Relaxed) {
                        self.requeue_one(request);
                        return Err(Broken);
                    }
                }
                Err(_) => {
                    request.fail(errors::BAD_BODY);
                    return Ok(None);
                }
            }
        }
        let id = self.connection.next_id();
        if self.connection.queue_request(&request, id, !ended, buffer[..length].to_vec()).is_err() {
            request.fail(errors::HEAD_TOO_LARGE);
            return Ok(None);
        }
        let mut total = length as u64;
        if !ended {
            // Both the client and the plugin may be slow.
            self.stalling.stall();
        }
        while !ended {
            let interrupted = || self.process.ended.load(Ordering::Relaxed) || request.responder.is_cancelled();
            let sent = match self.connection.flush(Instant::now() + STREAM_IDLE, interrupted) {
                Ok(sent) => sent,
                Err(_) if request.responder.is_cancelled() => return Err(Broken),
                Err(wait_error) => {
                    let why = self.describe_loss(&wait_error, STREAM_IDLE, "it had taken the body");
                    return self.fail(request, errors::BAD_GATEWAY, &why, Err(Broken));
                }
            };
            if sent == Sent::Answered || self.connection.has_answer() {
                // The plugin answers early and gets no more of the body. The rest of the send buffer is sent while the answer arrives.
                self.queue_data(&Data { id, more: false, aborted: true }, &[])?;
                break;
            }
            match request.read_body(&mut buffer, CLIENT_TICK) {
                Ok(n) => {
                    total += n as u64;
                    ended = n == 0 || request.length == BodyLength::Known(total);
                    self.queue_data(&Data { id, more: !ended, aborted: false }, &buffer[..n])?;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.stalling.stall();
                }
                Err(_) => {
                    // The end of its connection tells the plugin that the rest of the body will not come.
                    request.fail(errors::BAD_BODY);
                    return Err(Broken);
                }
            }
        }
        self.buffer = buffer;
        Ok(Some((id, request)))
    }

    fn queue_data(&mut self, data: &Data, body: &[u8]) -> Outcome {
        self.connection.queue(data, body).map_err(|_| Broken)
    }

    /// Waits for the answer to a request and passes it on to its client. The requests `behind` it are outstanding too; if they would have
    /// to wait for long, they are re-queued.
    fn answer(&mut self, id: u64, mut request: Request, deadline: Instant, behind: &mut VecDeque<(u64, Request)>) -> Outcome {
        let mut alone = true;
        let (stream, streamed) = loop {
            match self.wait_begin(&request, deadline, !behind.is_empty()) {
                Ok(()) => {}
                // The end of its connection tells the plugin that nobody waits for the answer.
                Err(_) if behind.is_empty() && request.responder.is_cancelled() => return Err(Broken),
                Err(WaitError::Interrupted) if !behind.is_empty() && !self.process.ended.load(Ordering::Relaxed) => {
                    // Another connection may serve them long before. This one is closed afterwards, because their first answers may
                    // still arrive on it.
                    alone = false;
                    self.requeue(std::mem::take(behind));
                    self.plugin.ask_to_grow();
                    continue;
                }
                Err(WaitError::Deadline) => {
                    let why = self.describe_loss(&WaitError::Deadline, self.process.request_timeout, "its answer began");
                    return self.fail(request, errors::TIMEOUT, &why, Err(Broken));
                }
                Err(wait_error) => return self.connection_lost(request, &wait_error),
            }
            let followed = behind.is_empty() && self.connection.is_followed();
            let (frame, rest) = match self.connection.begin() {
                Ok(begun) => begun,
                Err(error) => return self.connection_lost(request, &error.into()),
            };
            let unexpected = match frame.message() {
                // A late pong.
                Ok(Message::Pong(pong)) if pong.id < id && rest == 0 => continue,
                Ok(Message::Response(response)) if response.id == id => {
                    ProcessState::set_flag(&self.process.served);
                    let (size, more) = (frame.body.len() + rest, response.more);
                    let declared = match response.check(size, request.is_head()) {
                        Ok(declared) => declared.filter(|_| !request.is_head()),
                        Err(bad) => return self.bad_response(request, &bad.to_string(), !more && rest == 0),
                    };
                    if let Some(loss) = request.loss.take() {
                        let name = request.name();
                        self.plugin.log.note(&format!("{name}: {}; it was sent once more, and answered", loss.why));
                    }
                    let begun = request.responder.answer(&response, frame.body, rest);
                    let stream = more.then(|| Stream { id, declared, events: is_events(&response) });
                    let delivered = self.pass_rest(&mut request, rest, !more, begun)?;
                    let Some(stream) = stream else {
                        // If the client has gone, the connection is still usable.
                        delivered.ok();
                        let clean = !followed || self.is_clean(&format!("behind the answer to {}", request.name()));
                        return if alone && clean { Ok(()) } else { Err(Broken) };
                    };
                    delivered.map_err(|_| Broken)?;
                    break (stream, size as u64);
                }
                Ok(Message::Error(error)) if error.id == id && rest == 0 => {
                    ProcessState::set_flag(&self.process.served);
                    let reason = format!("the plugin answered with the error {}: {}", error.code, error.message);
                    return self.fail(request, errors::BAD_GATEWAY, &reason, Ok(()));
                }
                // A second answer to an earlier request. The frame is whole, so the expected answer can follow it.
                Ok(other) if other.id() < id && rest == 0 && Instant::now() < deadline => {
                    let what = format!("{} came", other.named());
                    if std::mem::take(&mut alone) {
                        let name = request.name();
                        let why = "an earlier request was answered twice";
                        self.plugin.log.note(&format!("protocol error: before the answer to {name} (id {id}) {what}: {why}"));
                    }
                    continue;
                }
                Ok(other) => {
                    let what = format!("protocol error: {} came where the response with id {id} was due", other.named());
                    (Some(other.id()), what)
                }
                Err(malformed) => (frame.id(), format!("protocol error: {malformed}")),
            };
            let (claimed, why) = unexpected;
            if claimed == Some(id) {
                return self.fail(request, errors::BAD_GATEWAY, &why, Err(Broken));
            }
            // The frame may belong to an earlier request, so this one is not to blame.
            return self.lose(request, why);
        };
        let relayed = self.relay(&mut request, &stream, streamed);
        // After a stream with requests behind it, late answers to them may arrive, so the connection is replaced.
        if alone && behind.is_empty() { relayed } else { Err(Broken) }
    }

    /// The connection was lost before the answer to a request began.
    fn connection_lost(&mut self, request: Request, wait_error: &WaitError) -> Outcome {
        if request.is_safe() && self.unaccepted.is_none() && self.connection.is_unsent() {
            // The plugin had already closed the connection, so it has not read the request.
            self.requeue_one(request);
            return Err(Broken);
        }
        let why = self.describe_loss(wait_error, self.process.request_timeout, "it answered");
        if self.process.ended.load(Ordering::Relaxed) {
            return self.fail(request, errors::BAD_GATEWAY, &why, Err(Broken));
        }
        self.lose(request, why)
    }

    /// Re-queues a safe request whose connection is lost, once, for the same process; fails any other.
    fn lose(&self, mut request: Request, why: String) -> Outcome {
        if !request.is_safe() {
            return self.fail(request, errors::BAD_GATEWAY, &why, Err(Broken));
        }
        if request.loss.is_some() {
            return self.fail(request, errors::BAD_GATEWAY, &format!("{why}; it was sent twice"), Err(Broken));
        }
        request.alone = true;
        request.loss = Some(Box::new(Loss { process: self.process.number, why }));
        self.requeue_one(request);
        Err(Broken)
    }

    /// Describes how a connection was lost before the plugin did something within `time`. If the process may have ended, waits a moment
    /// for its exit.
    fn describe_loss(&self, wait_error: &WaitError, time: Duration, before: &str) -> String {
        let what = match wait_error {
            WaitError::Deadline => {
                let waited = format!("{} s passed before {before}", time.as_secs_f32());
                return match self.connection.unfinished() {
                    Some(unfinished) => format!("{waited}: {unfinished}"),
                    None => waited,
                };
            }
            WaitError::Broken(error @ ReadError::Length { .. }) => return format!("protocol error: {error}"),
            wait_error if self.has_ended(SETTLE_TIME) => match self.process.exit.get() {
                Some(exit) => return format!("the process ended before {before}: {exit}"),
                None => format!("the process ended ({wait_error})"),
            },
            WaitError::Broken(ReadError::Io(error)) => format!("the connection was lost ({error})"),
            wait_error => wait_error.to_string(),
        };
        format!("{what} before {before}")
    }

    /// Passes on the rest of a large frame; the `last` frame ends the answer. Reads all of it even if the client has gone, so that the
    /// connection stays usable. Returns whether everything was `delivered`.
    fn pass_rest(
        &mut self,
        request: &mut Request,
        rest: usize,
        last: bool,
        delivered: io::Result<()>,
    ) -> Result<io::Result<()>, Broken> {
        if rest > 0 {
            self.plugin.scaling.note_blocking();
        }
        let (mut left, mut delivered) = (rest, delivered);
        while left > 0 {
            let mut buffer = request.responder.buffer();
            let interrupted = || self.stalling.stall() || request.responder.is_cancelled();
            let n = match self.connection.read_rest(&mut buffer, Instant::now() + STREAM_IDLE, interrupted) {
                Ok(n) => n,
                Err(_) if request.responder.is_cancelled() => return Err(Broken),
                Err(wait_error) => return self.cut_lost(request, &wait_error).map(Ok),
            };
            left -= n;
            self.stalling.wait_for_client(request);
            delivered = delivered.and_then(|()| request.responder.filled(buffer, n, last && left == 0));
        }
        Ok(delivered)
    }

    /// Passes on an answer that continues in `data` frames.
    fn relay(&mut self, request: &mut Request, stream: &Stream, mut streamed: u64) -> Outcome {
        self.pace = None;
        let Stream { id, declared, events } = *stream;
        let begun = Instant::now();
        // An event stream does not end. Other streams usually do, so requests wait for them at first.
        let counted = OnceCell::new();
        let count = || {
            if events || begun.elapsed() >= LONG_STREAM {
                counted.get_or_init(|| self.plugin.count_stream());
            }
        };
        count();
        self.stalling.stall();
        let ending = || events && self.process.stopping.load(Ordering::Relaxed);
        loop {
            let interrupted = || {
                count();
                self.stalling.stall() || ending() || request.responder.is_cancelled()
            };
            let waited = self.connection.wait(Instant::now() + STREAM_IDLE, interrupted);
            if request.responder.is_cancelled() {
                // The end of its connection tells the plugin that the client has gone.
                return Err(Broken);
            }
            if ending() {
                // Event streams may end at any time, so this is not an error.
                request.responder.piece(&[], true).ok();
                return Err(Broken);
            }
            match waited {
                Ok(()) => {}
                Err(wait_error) => return self.cut_lost(request, &wait_error),
            }
            let frame = match self.connection.take() {
                Ok(frame) => frame,
                Err(error) => return self.cut_lost(request, &error.into()),
            };
            let data = match frame.message() {
                Ok(Message::Data(data)) if data.id == id => data,
                Ok(Message::Error(error)) if error.id == id => {
                    // The plugin has ended this answer itself, so the next frame belongs to the next request.
                    self.cut_off(request, &format!("the plugin sent the error {}: {}", error.code, error.message));
                    return Ok(());
                }
                Ok(other) => {
                    let what = format!("protocol error: {} came where data with id {id} was due", other.named());
                    return self.cut(request, &what);
                }
                Err(malformed) => return self.cut(request, &format!("protocol error: {malformed}")),
            };
            streamed += frame.body.len() as u64;
            let short = !data.more && declared.is_some_and(|declared| streamed != declared);
            if short || declared.is_some_and(|declared| streamed > declared) {
                let declared = declared.unwrap_or_default();
                return self.cut(request, &format!("its content-length is {declared}, its body has {streamed} bytes"));
            }
            let mut rest = frame.body;
            loop {
                let (piece, behind) = rest.split_at(rest.len().min(PIECE));
                self.stalling.wait_for_client(request);
                if request.responder.piece(piece, !data.more && behind.is_empty()).is_err() {
                    return if data.more { Err(Broken) } else { Ok(()) };
                }
                rest = behind;
                if rest.is_empty() {
                    break;
                }
            }
            if !data.more {
                return Ok(());
            }
        }
    }

    /// Aborts an answer that has begun, so that its client does not take it for complete.
    fn cut_off(&self, request: &mut Request, why: &str) {
        request.responder.cut();
        self.plugin.note_failed(&format!("{}: the answer was cut short: {why}", request.name()));
    }

    /// Aborts an answer after which the connection is not usable.
    fn cut(&self, request: &mut Request, why: &str) -> Outcome {
        self.cut_off(request, why);
        Err(Broken)
    }

    /// Aborts an answer whose connection was lost. Tells the client first, because the exit of the process may take a moment to be known.
    fn cut_lost(&self, request: &mut Request, wait_error: &WaitError) -> Outcome {
        request.responder.cut();
        self.cut(request, &self.describe_loss(wait_error, STREAM_IDLE, "its end"))
    }

    /// Answers 502 in place of an invalid answer.
    fn bad_response(&self, request: Request, why: &str, whole: bool) -> Outcome {
        let outcome = if whole { Ok(()) } else { Err(Broken) };
        self.fail(request, errors::BAD_GATEWAY, &format!("the answer was refused: {why}"), outcome)
    }

    /// Fails a request. Writes the line in the plugin's log first, so that it is there when the client has the answer.
    fn fail<T>(&self, request: Request, error: HttpError, why: &str, outcome: Result<T, Broken>) -> Result<T, Broken> {
        self.plugin.note_failed(&format!("{}: {why}", request.name()));
        request.fail(error);
        outcome
    }

    /// Waits for a frame; meanwhile expires queued requests.
    fn wait(&mut self, deadline: Instant) -> Result<(), WaitError> {
        self.connection.wait(deadline, || self.stalling.stall())
    }

    /// Waits for the beginning of the answer to a request. Is interrupted if its client goes, and after one tick if other requests
    /// `followed` it.
    fn wait_begin(&mut self, request: &Request, deadline: Instant, followed: bool) -> Result<(), WaitError> {
        let interrupted = || self.stalling.stall() || followed || request.responder.is_cancelled();
        self.connection.wait_begin(deadline, interrupted)
    }

    /// Whether the process ends within `time`.
    fn has_ended(&self, time: Duration) -> bool {
        self.process.exited.recv_timeout(time) == Err(RecvTimeoutError::Disconnected)
    }

    /// Re-queues requests that get no answer on this connection; they are not pipelined again. If the process may have ended,
    /// [`Worker::describe_loss`] has waited for its exit before.
    fn requeue(&self, waited: VecDeque<(u64, Request)>) {
        for (_, mut request) in waited {
            request.alone = true;
            self.requeue_one(request);
        }
    }

    fn requeue_one(&self, request: Request) {
        if let Some(waiting) = WaitingRequest::new(request) {
            self.plugin.requeue(Job::Http(waiting));
        }
    }

    /// Executes a key-value operation of the operator's.
    fn operate(&mut self, mut job: KvJob) -> Outcome {
        let id = self.connection.next_id();
        let kv = Kv { id, op: job.op.clone() };
        if self.connection.queue(&kv, &std::mem::take(&mut job.value)).is_err() {
            job.reply(Err(KvFailure::Failed(errors::TOO_LARGE)));
            return Ok(());
        }
        ProcessState::set_flag(&self.process.asked);
        let timeout = self.process.request_timeout.min(MAX_KV_TIME);
        let deadline = job.arrived + timeout;
        loop {
            if let Err(wait_error) = self.wait(deadline) {
                let error = if matches!(wait_error, WaitError::Deadline) { errors::TIMEOUT } else { errors::BAD_GATEWAY };
                let why = self.describe_loss(&wait_error, timeout, "it answered");
                return self.fail_kv(job, error, &why);
            }
            let answer = self.connection.take().map(|frame| (frame.message(), frame.body));
            let what = match answer {
                Ok((Ok(Message::Pong(pong)), _)) if pong.id < id => continue,
                Ok((Ok(Message::Result(result)), body)) if result.id == id => match result.fault(job.op.name(), body.len()) {
                    Some(fault) => fault,
                    None => {
                        ProcessState::set_flag(&self.process.served);
                        job.reply(Ok((result, body.to_vec())));
                        return Ok(());
                    }
                },
                Ok((Ok(Message::Error(error)), _)) if error.id == id => {
                    ProcessState::set_flag(&self.process.served);
                    job.reply(Err(KvFailure::Refused(error)));
                    return Ok(());
                }
                Ok((Ok(other), _)) if other.id() == id => format!("expected result, got {}", other.kind()),
                Ok((Ok(other), _)) => format!("expected result with id {id}, got {} with id {}", other.kind(), other.id()),
                Ok((Err(malformed), _)) => malformed.to_string(),
                Err(error) => error.to_string(),
            };
            return self.fail_kv(job, errors::BAD_GATEWAY, &format!("protocol error: {what}"));
        }
    }

    /// Fails an operation.
    fn fail_kv(&self, job: KvJob, error: HttpError, why: &str) -> Outcome {
        self.plugin.note_failed(&format!("{}: {why}", job.name()));
        let failure = match error {
            errors::BAD_GATEWAY => KvFailure::Invalid(format!("{}: {why}", job.short_name())),
            error => KvFailure::Failed(error),
        };
        job.reply(Err(failure));
        Err(Broken)
    }

    fn ping(&mut self) -> Outcome {
        self.idle_pings += 1;
        let id = self.connection.next_id();
        self.connection.queue(&Ping { id }, &[]).map_err(|_| Broken)?;
        let deadline = Instant::now() + PING_TIME;
        loop {
            match self.wait(deadline) {
                Ok(()) => {}
                Err(WaitError::Deadline) => {
                    self.missed_pings += 1;
                    if self.missed_pings >= MAX_MISSED_PINGS {
                        self.plugin
                            .unresponsive(self.process.number, format!("it did not answer {MAX_MISSED_PINGS} pings in a row"));
                    }
                    return Ok(());
                }
                Err(WaitError::Interrupted | WaitError::Broken(ReadError::Closed)) => return Err(Broken),
                Err(wait_error) => {
                    self.plugin.log.note(&self.describe_loss(&wait_error, PING_TIME, "it answered a ping"));
                    return Err(Broken);
                }
            }
            let what = match self.connection.take().map(|frame| frame.message()) {
                Ok(Ok(Message::Pong(pong))) if pong.id == id => {
                    self.missed_pings = 0;
                    return Ok(());
                }
                Ok(Ok(Message::Pong(pong))) if pong.id < id => continue,
                // The plugin responds, even if with an error.
                Ok(Ok(Message::Error(error))) if error.id == id => {
                    self.missed_pings = 0;
                    self.plugin.log.note(&format!("the plugin answered a ping with the error {}: {}", error.code, error.message));
                    return Ok(());
                }
                Ok(Ok(other)) => format!("{} came where a pong with id {id} was due", other.named()),
                Ok(Err(malformed)) => format!("{malformed}, where a pong with id {id} was due"),
                Err(error) => error.to_string(),
            };
            self.plugin.log.note(&format!("protocol error: {what}"));
            return Err(Broken);
        }
    }

    /// Sends `shutdown` on this connection, and keeps it open until the plugin closes it.
    fn shut_down(mut self) {
        self.unaccepted = None;
        let (process, accepted) = (&self.process, Instant::now() + ACCEPT_TIME);
        let all_accepted = || process.unaccepted.load(Ordering::SeqCst) == 0 || process.ended.load(Ordering::Relaxed);
        if !all_accepted() {
            // A frame here is a late pong; the end of the connection shows again below.
            drop(self.connection.wait(accepted, all_accepted));
        }
        let id = self.connection.next_id();
        if self.process.ended.load(Ordering::Relaxed) || self.connection.queue(&Shutdown { id }, &[]).is_err() {
            return;
        }
        // The supervisor kills the process in time, which ends this wait.
        let deadline = Instant::now() + STREAM_IDLE;
        let ended = || self.process.ended.load(Ordering::Relaxed);
        while self.connection.wait(deadline, ended).is_ok() && self.connection.take().is_ok() {}
    }
}

/// Fails a request that has waited too long in the queue.
fn expire(plugin: &Plugin, process: &ProcessState, job: Job) {
    let waited = job.arrived().elapsed();
    let limit = job.time_limit(process.request_timeout);
    let (error, why) = match plugin.congestion().filter(|_| waited < limit) {
        Some(why) => {
            plugin.warn_of_streams(&why);
            (errors::STREAMS_FULL, why)
        }
        None => {
            let [open, most] = [plugin.scaling.connections.load(Ordering::Relaxed), plugin.metadata.concurrency as usize];
            let limit = limit.as_secs_f32();
            (errors::TIMEOUT, format!("it waited {limit} s for its turn on {open} connections of at most {most}"))
        }
    };
    match job {
        Job::Http(waiting) => {
            if let Some(request) = waiting.take(Instant::now()) {
                let lost = request.loss.as_ref().map(|loss| format!("{}; ", loss.why)).unwrap_or_default();
                plugin.note_failed(&format!("{}: {lost}{why}", request.name()));
                request.fail(error);
            }
        }
        Job::Kv(job) => {
            plugin.note_failed(&format!("{}: {why}", job.name()));
            job.reply(Err(KvFailure::Failed(error)));
        }
    }
}

/// Opens a connection. None if the process has ended, is to stop, or does not accept it in time.
fn connect(plugin: &Plugin, process: &ProcessState) -> Option<Connection> {
    let deadline = Instant::now() + RECONNECT_TIME;
    while !process.ended.load(Ordering::Relaxed) {
        match Connection::connect(&process.socket, process.uid) {
            Ok(connection) => return Some(connection),
            Err(_) if process.stopping.load(Ordering::Relaxed) => return None,
            Err(error) if Instant::now() >= deadline => {
                plugin.unresponsive(process.number, format!("it takes no connection: {error}"));
                return None;
            }
            Err(_) => match process.stop.recv_timeout(RECONNECT_PAUSE) {
                Err(RecvTimeoutError::Timeout) => {}
                _ => return None,
            },
        }
    }
    None
}

/// Whether an answer is a stream of server-sent events.
fn is_events(response: &Response<'_>) -> bool {
    let kind = response.headers.iter().find(|(name, _)| name.eq_ignore_ascii_case("content-type"));
    let is_events = |value: &str| value.get(..EVENTS.len()).is_some_and(|kind| kind.eq_ignore_ascii_case(EVENTS));
    kind.is_some_and(|(_, value)| is_events(value))
}
