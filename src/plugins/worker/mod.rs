//! A worker: a thread that owns one connection to a plugin. It takes requests from the plugin's queue, sends them, and passes the answers
//! on to the clients as they arrive.
//!
//! What the connection speaks is the business of [`PluginConnection`]: frames of the plugin protocol, or HTTP to an application.
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

mod exchange;
mod files;
mod intake;
mod native;
mod pace;
mod scripts;
mod stalling;

pub(crate) use files::{FileWorker, site_options};
pub(crate) use native::MAX_MISSED_PINGS;
pub(crate) use scripts::{ScriptWorker, files_beside};

use crate::http::{WaitingRequest, errors, websocket};
use crate::plugins::connection::PluginConnection;
use crate::plugins::connection::application::ApplicationConnection;
use crate::plugins::job::Job;
use crate::plugins::plugin::Plugin;
use crate::plugins::process_state::{ProcessState, UnacceptedConnection};
use crate::plugins::sockets::Sockets;
use crossbeam_channel::RecvTimeoutError;
use intake::{Next, next};
use pace::Pace;
use stalling::{Stalling, expire};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Number of pings without a request between them after which a connection beyond the first is closed.
const IDLE_PINGS: u32 = 4;

/// Time without progress after which a streaming body is aborted, in either direction.
const STREAM_IDLE: Duration = Duration::from_secs(60);

/// Time limit to open another connection.
const RECONNECT_TIME: Duration = Duration::from_secs(5);

/// The same for a request that was not sent, which only needs another connection.
const UNSENT_SETTLE_TIME: Duration = Duration::from_millis(100);

/// Idle time after which a connection is checked for unexpected input before a safe request too: a second answer to the previous request,
/// or the end of the connection, has arrived by then. A busier connection is spared the system call, since ids reveal a second answer.
const LOOK_AFTER: Duration = Duration::from_millis(10);

/// Pause between attempts to connect.
const RECONNECT_PAUSE: Duration = Duration::from_millis(20);

/// Whether the connection is still usable.
pub(crate) type Outcome = Result<(), Broken>;

/// The connection is not usable any more.
pub(crate) struct Broken;

/// A worker and its connection.
pub(crate) struct Worker<C> {
    plugin: Arc<Plugin>,
    process: Arc<ProcessState>,
    connection: C,
    unaccepted: Option<UnacceptedConnection>,
    pace: Pace,
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

impl<C: PluginConnection> Worker<C> {
    /// The first worker of a process, on a connection of its own.
    pub(crate) fn new(plugin: Arc<Plugin>, process: Arc<ProcessState>, connection: C) -> Self {
        let stalling = Stalling::new(&plugin, &process);
        Self {
            plugin,
            process,
            connection,
            unaccepted: None,
            pace: Pace::default(),
            next_job: None,
            buffer: Vec::new(),
            stalling,
            missed_pings: 0,
            idle_pings: 0,
            last_answer: Instant::now(),
            first: true,
        }
    }

    /// A further worker, which opens its own connection. None if the process takes none.
    pub(crate) fn connect(plugin: Arc<Plugin>, process: Arc<ProcessState>) -> Option<Self> {
        let unaccepted = Some(UnacceptedConnection::new(&process));
        let connection = retry(&plugin, &process, C::prepare)?;
        Some(Self { first: false, unaccepted, ..Self::new(plugin, process, connection) })
    }

    /// Serves requests until the process ends or is to stop, or the connection is surplus.
    pub(crate) fn run(mut self) {
        // Many plugins may start or be pinged at once; none should keep a buffer that only a request needs.
        self.release();
        loop {
            let outcome = match self.next() {
                Next::Job(job) if !self.connection.is_open() => match self.open_for(&job) {
                    Opening::Open => self.serve(job),
                    Opening::TooLate => {
                        expire(&self.plugin, &self.process, job);
                        Ok(())
                    }
                    Opening::Gone => return self.plugin.requeue(job),
                },
                Next::Job(job) => self.serve(job),
                Next::Ping if !self.first && self.idle_pings >= IDLE_PINGS => return,
                Next::Ping => {
                    self.idle_pings += 1;
                    let outcome = C::ping(&mut self);
                    self.release();
                    outcome
                }
                Next::Stop => return C::shut_down(self),
            };
            self.stalling.clear();
            self.unaccepted = None;
            if outcome.is_ok() && !self.first && self.next_job.is_none() && self.plugin.is_to_shrink() {
                return;
            }
            if outcome.is_err() {
                self.connection.close();
                if !C::ON_DEMAND && !self.reconnect() {
                    return self.next_job.take().into_iter().for_each(|job| self.plugin.requeue(job));
                }
            }
        }
    }

    /// Replaces the connection. False if the process takes no other.
    fn reconnect(&mut self) -> bool {
        self.unaccepted = Some(UnacceptedConnection::new(&self.process));
        let connection = retry(&self.plugin, &self.process, C::connect);
        connection.map(|connection| self.connection = connection).is_some()
    }

    /// Opens a connection on demand. A process that listens and accepts nothing is busy, so the job waits for it as long as it may.
    fn open_for(&mut self, job: &Job) -> Opening {
        self.unaccepted = Some(UnacceptedConnection::new(&self.process));
        let refused = Instant::now() + RECONNECT_TIME;
        while !self.process.ended.load(Ordering::Relaxed) && !self.process.stopping.load(Ordering::Relaxed) {
            match C::connect(&self.process) {
                Ok(connection) => {
                    self.connection = connection;
                    return Opening::Open;
                }
                Err(error) if !is_busy(&error) && Instant::now() >= refused => {
                    self.plugin.unresponsive(self.process.number, format!("it takes no connection: {error}"));
                    return Opening::Gone;
                }
                Err(_) => {}
            }
            if job.is_cancelled() || job.arrived().elapsed() >= job.time_limit(self.process.request_timeout) {
                return Opening::TooLate;
            }
            self.stalling.stall();
            if self.process.stop.recv_timeout(RECONNECT_PAUSE) != Err(RecvTimeoutError::Timeout) {
                break;
            }
        }
        Opening::Gone
    }

    fn next(&mut self) -> Next {
        if let Some(job) = self.next_job.take() {
            return Next::Job(job);
        }
        let Self { plugin, process, connection, buffer, .. } = self;
        next(plugin, process, || release(connection, buffer))
    }

    fn release(&mut self) {
        release(&mut self.connection, &mut self.buffer);
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
                if request.upgrade && self.plugin.speaks_websocket() && websocket::is_asked_for(&request) {
                    Sockets::open(&self.plugin, &self.process, request);
                    return Ok(());
                }
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
                C::operate(self, *job)
            }
        }
    }

    /// Whether the connection is fit for a request, which may be `repeatable`. If not, the request may go to another connection, or to the
    /// next process.
    fn can_send(&mut self, repeatable: bool, now: Instant) -> bool {
        let rested = !C::HAS_IDS || self.connection.holds_bytes() || now.duration_since(self.last_answer) >= LOOK_AFTER;
        if (repeatable && !rested) || self.is_quiet("on an idle connection") {
            return true;
        }
        // Where a connection is opened for the request, the end of the process shows by that.
        if !repeatable && !C::ON_DEMAND {
            self.process.ends_within(UNSENT_SETTLE_TIME);
        }
        false
    }

    /// Whether the connection has no unexpected input and is open. A new connection always counts as quiet, so that a request that keeps
    /// finding closed connections fails on the second.
    fn is_quiet(&mut self, place: &str) -> bool {
        match self.connection.check_quiet(place) {
            Ok(()) => true,
            Err(what) => {
                what.into_iter().for_each(|what| self.plugin.log.note(&format!("protocol error: {what}")));
                false
            }
        }
    }
}

impl Worker<ApplicationConnection> {
    /// Closes an idle connection that the application has closed.
    pub(crate) fn close_if_ended(&mut self) {
        if self.connection.is_open() && self.connection.has_answer() {
            self.connection.close();
        }
    }
}

/// What became of a connection that is opened on demand.
enum Opening {
    Open,
    /// The job has waited too long, or its client has gone.
    TooLate,
    /// The process has ended, is to stop, or does not listen.
    Gone,
}

/// Whether a listener is there, but its backlog is full.
fn is_busy(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// Frees memory that an idle connection does not need.
fn release(connection: &mut impl PluginConnection, buffer: &mut Vec<u8>) {
    connection.release();
    *buffer = Vec::new();
}

/// Tries to connect until it succeeds. None if the process has ended, is to stop, or does not accept it in time.
fn retry<C>(plugin: &Plugin, process: &ProcessState, connect: impl Fn(&ProcessState) -> io::Result<C>) -> Option<C> {
    let deadline = Instant::now() + RECONNECT_TIME;
    while !process.ended.load(Ordering::Relaxed) {
        match connect(process) {
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
