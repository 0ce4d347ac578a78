//! The running plugin: accepts connections, a thread each, and knows when it is over.

use super::connection::{Connection, End};
use super::context::{Context, Refusal};
use super::kv::KvError;
use super::operation::{Operation, Outcome};
use super::outbox::Flusher;
use super::request::Request;
use super::response::Response;
use super::{Error, dispatch, log};
use crate::protocol::message::{Failure, Init, Ready};
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

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
        let flusher = Arc::clone(&server.flusher);
        let flushing = thread::Builder::new().name("flush".to_owned()).spawn(move || flusher.run());
        let acceptor = Arc::clone(&server);
        let accepting = thread::Builder::new().name("accept".to_owned()).spawn(move || {
            let error = acceptor.accept(&listener);
            log(format_args!("cannot accept connections: {error}"));
            acceptor.fail(ExitCode::FAILURE);
        });
        if let Err(error) = flushing.and(accepting) {
            log(format_args!("cannot start a thread: {error}"));
            return ExitCode::FAILURE;
        }
        let stopped = |state: &State| state.open == 0 && server.context().is_some_and(Context::is_stopping);
        let state = server
            .changed
            .wait_while(server.lock(), |state| state.failed.is_none() && !stopped(state))
            .unwrap_or_else(PoisonError::into_inner);
        state.failed.unwrap_or(ExitCode::SUCCESS)
    }

    /// Accepts connections for ever, never more at once than the plugin's concurrency: where the host has given up on one that is
    /// still busy, the next has to wait for it.
    fn accept(self: &Arc<Self>, listener: &UnixListener) -> io::Error {
        loop {
            let full = |state: &mut State| state.open >= self.concurrency;
            drop(self.changed.wait_while(self.lock(), full));
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted) => continue,
                Err(error) => return error,
            };
            let slot = Slot::take(self);
            let serving = thread::Builder::new().name("connection".to_owned()).spawn(move || slot.serve(stream));
            if let Err(error) = serving {
                log(format_args!("cannot start a thread for a connection: {error}"));
            }
        }
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
        let sent = connection.send(&Failure { id, code: code.to_owned(), message, index: None }, &[]);
        let told = sent.and_then(|()| connection.flush());
        self.fail(exit);
        told
    }

    fn fail(&self, exit: ExitCode) {
        self.lock().failed = Some(exit);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
        let mut connection = match Connection::new(stream, Arc::clone(&self.0.flusher)) {
            Ok(connection) => connection,
            Err(error) => return log(format_args!("cannot serve a connection: {error}")),
        };
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
