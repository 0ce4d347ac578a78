//! The running plugin: accepts connections, a thread each, and knows when it is over.

use super::connection::{Connection, End};
use super::context::{Context, Refusal};
use super::kv::KvError;
use super::operation::{Operation, Outcome};
use super::outbox::Flusher;
use super::request::Request;
use super::response::Response;
use super::{Error, dispatch, log};
use crate::lock::{LockExt, unpoisoned};
use crate::protocol::message::{Failure, Init, Ready};
use rustix::io::Errno;
use std::io;
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
}

/// What the connections of a plugin share.
pub(super) struct Server {
    pub(super) handlers: Handlers,
    concurrency: usize,
    /// Whether `init` has come, which it does once.
    initialized: AtomicBool,
    flusher: Arc<Flusher>,
    /// There once the plugin is ready.
    context: OnceLock<Context>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Connections being served.
    open: usize,
    /// How to exit, where that does not wait for the connections to end.
    failed: Option<ExitCode>,
}

impl Server {
    pub(super) fn new(concurrency: u32, handlers: Handlers) -> Self {
        Self {
            handlers,
            concurrency: usize::try_from(concurrency).unwrap_or(usize::MAX),
            initialized: AtomicBool::new(false),
            flusher: Arc::default(),
            context: OnceLock::new(),
            state: Mutex::default(),
            changed: Condvar::new(),
        }
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
        if let Err(error) = flushing.and(accepting) {
            log(format_args!("cannot start a thread: {error}"));
            return ExitCode::FAILURE;
        }
        let stopped = |state: &State| state.open == 0 && server.context().is_some_and(Context::is_stopping);
        let waited = server.changed.wait_while(server.lock(), |state| state.failed.is_none() && !stopped(state));
        let state = unpoisoned(waited);
        state.failed.unwrap_or(ExitCode::SUCCESS)
    }

    /// Accepts connections for ever, never more at once than the plugin's concurrency: where the host has given up on one that is
    /// still busy, the next has to wait for it. A want of files, memory or threads is waited out.
    fn accept(self: &Arc<Self>, listener: &UnixListener) -> io::Error {
        let mut shortage = Throttle::default();
        loop {
            let full = |state: &mut State| state.open >= self.concurrency;
            drop(self.changed.wait_while(self.lock(), full));
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
        let context = Context::new(init);
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
struct Vital(Arc<Server>);

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
struct Throttle {
    next: Option<Instant>,
    suppressed: u64,
}

impl Throttle {
    fn log(&mut self, line: std::fmt::Arguments<'_>) {
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

/// A connection's place among those being served. It is given back when this is dropped, so also when a stream panics.
struct Slot(Arc<Server>);

impl Slot {
    fn take(server: &Arc<Server>) -> Self {
        server.lock().open += 1;
        Self(Arc::clone(server))
    }

    fn serve(self, stream: UnixStream) {
        // The stream is closed before the place is given back: locals go first.
        let mut connection = Connection::new(stream, Arc::clone(&self.0.flusher));
        if let Err(End::Fault(reason)) = dispatch::serve(&self.0, &mut connection) {
            log(format_args!("a connection is closed: {reason}"));
            // What was answered before the fault may still be wanted.
            drop(connection.flush());
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.lock().open -= 1;
        self.0.changed.notify_all();
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
        };
        let server = Arc::new(Server::new(1, handlers));
        for panics in [false, true] {
            let held = Vital(Arc::clone(&server));
            let body = move || assert!(!panics, "while {} connections are open", held.0.lock().open);
            assert_eq!(thread::Builder::new().spawn(body).unwrap().join().is_err(), panics);
            assert_eq!(server.lock().failed.is_some(), panics);
        }
    }
}
