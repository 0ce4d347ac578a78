//! The running plugin: accepts connections, a thread each, watches for their ends, and knows when to exit.

use super::cancel::Signal;
use super::connection::{Connection, End};
use super::context::{Context, Refusal};
use super::kv::KvError;
use super::operation::{Operation, Outcome};
use super::outbox::Flusher;
use super::request::Request;
use super::response::Response;
use super::{Error, dispatch, log, websocket};
use crate::lock::{LockExt, unpoisoned};
use crate::protocol::message::{Failure, Init, Ready};
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;
use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

/// Pause until the next try where files, memory or threads have run out. The end of a connection, which frees some, ends it too.
const SHORTAGE_PAUSE: Duration = Duration::from_millis(100);

/// How long a connection waits for a thread. Then it is closed, and the host takes another.
const THREAD_TIME: Duration = Duration::from_secs(1);

/// Time between two lines in the log about a shortage.
const SAY_EVERY: Duration = Duration::from_secs(60);

/// How long new connections wait for abandoned handlers before the log says so. A handler that heeds its cancellation ends sooner.
const ABANDONED_PATIENCE: Duration = Duration::from_millis(500);

/// How long the exit waits for abandoned handlers: a third of the time that the host gives a plugin to stop.
const ABANDONED_TIME: Duration = Duration::from_secs(1);

/// Stack of the thread that watches connections, in bytes. It runs no code of the plugin, and stacks count against the plugin's
/// memory limit.
const WATCHER_STACK: usize = 64 * 1024;

/// Ends of connections that one call of `epoll_wait` reports. More are reported by the next call.
const ENDS_AT_ONCE: usize = 64;

/// What accepting fails with while the machine or the process is short of something, or for a peer that has gone.
const SHORTAGES: [Errno; 8] =
    [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::NOBUFS, Errno::CONNABORTED, Errno::PROTO, Errno::AGAIN, Errno::INTR];

pub(super) type InitHandler = dyn Fn(&Context) -> Result<(), Refusal> + Send + Sync;
pub(super) type KvHandler = dyn Fn(&Context, Operation<'_>) -> Result<Outcome, KvError> + Send + Sync;
pub(super) type HttpHandler = dyn Fn(&mut Request<'_>) -> Result<Response, Error> + Send + Sync;

/// What the plugin does.
pub(super) struct Handlers {
    pub(super) init: Box<InitHandler>,
    pub(super) kv: Box<KvHandler>,
    pub(super) http: Box<HttpHandler>,
    pub(super) websocket: websocket::Handlers,
}

/// What the connections of a plugin share.
pub(super) struct Server {
    pub(super) handlers: Handlers,
    /// The threads that call the handlers of WebSockets.
    pub(super) workers: websocket::Workers,
    concurrency: usize,
    /// Connections that are accepted beyond the concurrency: one, if it may be the one for WebSockets, which shows in its first message.
    spare: usize,
    /// Held while a handler runs, where handlers need not be safe to run side by side.
    turn: Mutex<()>,
    /// Whether `init` has come, which it does once.
    initialized: AtomicBool,
    flusher: Arc<Flusher>,
    /// Every open connection, by its number.
    epoll: OwnedFd,
    signal: Arc<Signal>,
    /// There once the plugin is ready.
    context: OnceLock<Context>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// The connections that threads serve, by number, and whether the host has closed each. Numbers are never reused, unlike file
    /// descriptors.
    connections: HashMap<u64, Arc<AtomicBool>>,
    /// How many of them the host has closed. Their threads still run, busy in a handler.
    abandoned: usize,
    /// The connections that carry WebSockets. They are none of the others, and take no place from them.
    socket_connections: HashSet<u64>,
    next_number: u64,
    /// How to exit, where that does not wait for the connections to end.
    failed: Option<ExitCode>,
}

impl State {
    /// Connections that the host has not closed.
    fn live(&self) -> usize {
        self.connections.len() - self.abandoned
    }
}

impl Server {
    pub(super) fn new(concurrency: u32, handlers: Handlers, workers: websocket::Workers) -> io::Result<Self> {
        Ok(Self {
            spare: usize::from(handlers.websocket.any()),
            handlers,
            workers,
            concurrency: usize::try_from(concurrency).unwrap_or(usize::MAX),
            turn: Mutex::default(),
            initialized: AtomicBool::new(false),
            flusher: Arc::default(),
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
            signal: Arc::default(),
            context: OnceLock::new(),
            state: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    /// Serves until the plugin has to exit. The accepting thread is then left behind, for the process to end with.
    pub(super) fn run(self, listener: UnixListener) -> ExitCode {
        let server = Arc::new(self);
        let flusher = Vital(Arc::clone(&server));
        let flushing = thread::Builder::new().name("flush".to_owned()).spawn(move || flusher.0.flusher.run());
        let acceptor = Vital(Arc::clone(&server));
        let accepting = thread::Builder::new().name("accept".to_owned()).spawn(move || {
            let error = acceptor.0.accept(&listener);
            log(format_args!("cannot accept connections: {error}"));
            acceptor.0.fail(ExitCode::FAILURE);
        });
        let watcher = Arc::clone(&server);
        let watching = thread::Builder::new().name("watch".to_owned()).stack_size(WATCHER_STACK).spawn(move || {
            let error = watcher.watch();
            log(format_args!("cannot watch connections: {error}"));
            watcher.fail(ExitCode::FAILURE);
        });
        let working = if server.handlers.websocket.any() { server.workers.start(&server) } else { Ok(()) };
        if let Err(error) = flushing.and(accepting).and(watching).and(working) {
            log(format_args!("cannot start a thread: {error}"));
            return ExitCode::FAILURE;
        }
        let served = |state: &State| state.live() == 0 && state.socket_connections.is_empty();
        let stopped = |state: &State| served(state) && server.context().is_some_and(Context::is_stopping);
        let waited = server.changed.wait_while(server.lock(), |state| state.failed.is_none() && !stopped(state));
        let ending = |state: &mut State| state.failed.is_none() && state.abandoned > 0;
        let deadline = Instant::now() + ABANDONED_TIME;
        let (state, _) = unpoisoned(server.changed.wait_timeout_while(unpoisoned(waited), ABANDONED_TIME, ending));
        let failed = state.failed;
        drop(state);
        if failed.is_none() {
            server.workers.wait_until_idle(deadline.saturating_duration_since(Instant::now()));
        }
        failed.unwrap_or(ExitCode::SUCCESS)
    }

    /// Accepts connections for ever, each once [`Server::wait_for_capacity`] allows it. A want of files, memory or threads is waited out.
    fn accept(self: &Arc<Self>, listener: &UnixListener) -> io::Error {
        let mut shortage = Throttle::default();
        let mut overload = Throttle::default();
        loop {
            self.wait_for_capacity(&mut overload);
            match listener.accept() {
                Ok((stream, _)) => self.serve_on_thread(stream, &mut shortage),
                Err(error) if is_shortage(&error) => {
                    // The connection waits in the listener's queue meanwhile, unless its peer has gone.
                    shortage.log(format_args!("cannot accept a connection, and tries again: {error}"));
                    self.pause();
                }
                Err(error) => return error,
            }
        }
    }

    /// Calls a handler. With one connection its author may rely on it that no other runs, not even one whose request was given up.
    pub(super) fn in_turn<T>(&self, handler: impl FnOnce() -> T) -> T {
        let _turn = (self.concurrency == 1).then(|| self.turn.locked());
        handler()
    }

    /// Waits until fewer connections are open than the plugin's concurrency allows. A connection that the host has closed does not
    /// count, even while its handler still runs. All handlers of requests together are at most twice the concurrency, and one more on
    /// the connection that was accepted in case it is the one for WebSockets.
    fn wait_for_capacity(&self, overload: &mut Throttle) {
        let (places, most) = (self.concurrency + self.spare, 2 * self.concurrency + self.spare);
        let at_limit = |state: &mut State| state.live() < places && state.connections.len() >= most;
        loop {
            let full = |state: &mut State| state.live() >= places;
            let state = unpoisoned(self.changed.wait_while(self.lock(), full));
            let (mut state, _) = unpoisoned(self.changed.wait_timeout_while(state, ABANDONED_PATIENCE, at_limit));
            if !at_limit(&mut state) {
                return;
            }
            let abandoned = state.abandoned;
            overload.log(format_args!(
                "no connection is accepted until a handler ends: {abandoned} handlers still run for requests that the host has given \
                 up, and at most {most} handlers run at once; handlers that wait should use Request::cancelled_within"
            ));
            drop(self.changed.wait_while(state, at_limit));
        }
    }

    /// Records, for ever, which connections the host has closed. Handlers that neither read nor write depend on it.
    fn watch(&self) -> io::Error {
        let mut events: Vec<Event> = Vec::with_capacity(ENDS_AT_ONCE);
        loop {
            events.clear();
            match epoll::wait(&self.epoll, spare_capacity(&mut events), None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return error.into(),
            }
            let mut state = self.lock();
            for event in &events {
                let number = event.data.u64();
                if state.connections.get(&number).is_some_and(|ended| !ended.swap(true, Ordering::AcqRel)) {
                    state.abandoned += 1;
                }
            }
            drop(state);
            self.signal.notify();
            self.changed.notify_all();
        }
    }

    /// Serves a connection on a thread of its own, or closes it where none can be started for [`THREAD_TIME`].
    fn serve_on_thread(self: &Arc<Self>, stream: UnixStream, shortage: &mut Throttle) {
        let deadline = Instant::now() + THREAD_TIME;
        loop {
            // The stream goes to a thread that runs: one that cannot be started would take it along.
            let (hand_over, taken) = mpsc::sync_channel::<UnixStream>(1);
            let slot = Slot::take(self);
            let serve = move || {
                if let Ok(stream) = taken.recv() {
                    slot.serve(stream);
                }
            };
            match thread::Builder::new().name("connection".to_owned()).spawn(serve) {
                Ok(_) => {
                    // The thread waits for it.
                    hand_over.send(stream).ok();
                    return;
                }
                Err(error) => shortage.log(format_args!(
                    "cannot start a thread for a connection, and tries again (a smaller concurrency needs fewer): {error}"
                )),
            }
            if Instant::now() >= deadline {
                return;
            }
            self.pause();
        }
    }

    /// Waits for [`SHORTAGE_PAUSE`], or until a connection ends.
    fn pause(&self) {
        drop(self.changed.wait_timeout(self.lock(), SHORTAGE_PAUSE));
    }

    /// What the host has told the plugin, once it is ready.
    pub(super) fn context(&self) -> Option<&Context> {
        self.context.get()
    }

    /// Answers `init`.
    pub(super) fn init(&self, init: Init, connection: &mut Connection) -> Result<(), End> {
        if self.initialized.swap(true, Ordering::AcqRel) {
            return Err(End::Fault("init came twice".to_owned()));
        }
        let id = init.id;
        let context = Context::new(init, Arc::clone(&self.signal));
        let (code, message, exit) = match catch_unwind(AssertUnwindSafe(|| (self.handlers.init)(&context))) {
            Ok(Ok(())) => {
                self.context.get_or_init(|| context);
                return connection.send(&Ready { id }, &[]);
            }
            Ok(Err(refusal)) => (refusal.code(), refusal.to_string(), ExitCode::from(refusal.exit_code())),
            Err(_) => ("internal", "the plugin failed while it started".to_owned(), ExitCode::FAILURE),
        };
        log(format_args!("{message}"));
        let sent = connection.send(&Failure::new(id, code, &message), &[]);
        let told = sent.and_then(|()| connection.flush());
        self.fail(exit);
        told
    }

    fn fail(&self, exit: ExitCode) {
        self.lock().failed = Some(exit);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.locked()
    }
}

/// Held by a thread that the plugin needs. A panic of it ends the plugin, which would only seem to run without it.
pub(super) struct Vital(pub(super) Arc<Server>);

impl Drop for Vital {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.fail(ExitCode::FAILURE);
        }
    }
}

fn is_shortage(error: &io::Error) -> bool {
    error.raw_os_error().is_some_and(|code| SHORTAGES.iter().any(|shortage| shortage.raw_os_error() == code))
}

/// Logs an error that repeats at most once in [`SAY_EVERY`], with how often it came meanwhile.
#[derive(Default)]
pub(super) struct Throttle {
    next: Option<Instant>,
    suppressed: u64,
}

impl Throttle {
    pub(super) fn log(&mut self, line: std::fmt::Arguments<'_>) {
        let now = Instant::now();
        if self.next.is_some_and(|next| now < next) {
            self.suppressed += 1;
            return;
        }
        match std::mem::take(&mut self.suppressed) {
            0 => log(line),
            more => log(format_args!("{line} ({more} times more since the last such line)")),
        }
        self.next = now.checked_add(SAY_EVERY);
    }
}

/// A connection's record among those being served. It is removed when this is dropped, so also when a stream panics.
pub(super) struct Slot {
    pub(super) server: Arc<Server>,
    number: u64,
    ended: Arc<AtomicBool>,
}

impl Slot {
    fn take(server: &Arc<Server>) -> Self {
        let ended = Arc::<AtomicBool>::default();
        let mut state = server.lock();
        let number = state.next_number;
        state.next_number += 1;
        state.connections.insert(number, Arc::clone(&ended));
        drop(state);
        Self { server: Arc::clone(server), number, ended }
    }

    /// Records that the connection is the one for WebSockets: it takes no place from the connections for requests.
    pub(super) fn carries_sockets(&self) {
        let mut state = self.server.lock();
        state.connections.remove(&self.number);
        if self.ended.load(Ordering::Acquire) {
            state.abandoned -= 1;
        }
        state.socket_connections.insert(self.number);
        drop(state);
        self.server.changed.notify_all();
    }

    fn serve(self, stream: UnixStream) {
        // The stream is closed before the record is removed: locals go first.
        let stream = Arc::new(stream);
        // Even with no event requested, epoll reports EPOLLHUP once the host has closed its end. If the registration fails for want
        // of memory, the handler notices the end when it reads or writes.
        let events = EventFlags::ONESHOT;
        let watched = epoll::add(&self.server.epoll, &*stream, EventData::new_u64(self.number), events).is_ok();
        let mut connection = Connection::new(Arc::clone(&stream), Arc::clone(&self.server.flusher), Arc::clone(&self.ended));
        if let Err(End::Fault(reason)) = dispatch::serve(&self, &mut connection) {
            log(format_args!("a connection is closed: {reason}"));
            // What was answered before the fault may still be wanted.
            drop(connection.flush());
        }
        if watched {
            // The flusher may still hold the stream, and epoll watches it until the last owner has closed it.
            epoll::delete(&self.server.epoll, &*stream).ok();
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut state = self.server.lock();
        if !state.socket_connections.remove(&self.number) {
            state.connections.remove(&self.number);
            if self.ended.load(Ordering::Acquire) {
                state.abandoned -= 1;
            }
        }
        drop(state);
        self.server.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_of_a_thread_that_the_plugin_needs_ends_the_plugin() {
        let handlers = Handlers {
            init: Box::new(|_| Ok(())),
            kv: Box::new(|_, _| Err(KvError::refused("denied", "no keys"))),
            http: Box::new(|_| Ok(Response::text(""))),
            websocket: websocket::Handlers::default(),
        };
        let server = Arc::new(Server::new(1, handlers, websocket::Workers::new(1)).unwrap());
        for panics in [false, true] {
            let held = Vital(Arc::clone(&server));
            let body = move || assert!(!panics, "while {} connections are open", held.0.lock().live());
            assert_eq!(thread::Builder::new().spawn(body).unwrap().join().is_err(), panics);
            assert_eq!(server.lock().failed.is_some(), panics);
        }
    }
}
