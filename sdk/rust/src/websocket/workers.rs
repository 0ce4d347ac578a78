//! The threads that call the handlers of sockets: few for all of them, started as they are needed.

use super::handlers;
use super::socket::Socket;
use crate::lock::{LockExt, unpoisoned};
use crate::server::{Server, Throttle, Vital};
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

/// How long a thread waits for work before it ends. One stays for ever.
const IDLE_TIME: Duration = Duration::from_secs(10);

/// Which threads there are, and which sockets wait for one.
#[derive(Default)]
struct State {
    /// Sockets with something to handle, each at most once.
    ready: VecDeque<Socket>,
    threads: usize,
    /// Threads that wait for work.
    idle: usize,
    shortage: Throttle,
}

/// The threads that call the handlers of sockets.
pub(crate) struct Workers {
    most: usize,
    state: Mutex<State>,
    /// Told of a socket that is ready.
    came: Condvar,
    /// Told when a thread has nothing to do.
    rested: Condvar,
}

impl Workers {
    /// At most so many threads, and no fewer than one.
    pub(crate) fn new(most: usize) -> Self {
        Self { most: most.max(1), state: Mutex::default(), came: Condvar::new(), rested: Condvar::new() }
    }

    /// Starts the thread that stays. Only with it may a socket be [ready](Self::push).
    pub(crate) fn start(&self, server: &Arc<Server>) -> io::Result<()> {
        self.state.locked().threads += 1;
        self.spawn(server, None)
    }

    /// Has a thread handle what waits in a socket.
    pub(super) fn push(&self, server: &Arc<Server>, socket: Socket) {
        let mut state = self.state.locked();
        state.ready.push_back(socket);
        let is_short = state.ready.len() > state.idle && state.threads < self.most;
        state.threads += usize::from(is_short);
        drop(state);
        self.came.notify_one();
        if is_short && let Err(error) = self.spawn(server, Some(IDLE_TIME)) {
            let why = "cannot start another thread for the handlers of WebSockets, which wait for the others";
            self.state.locked().shortage.log(format_args!("{why}: {error}"));
        }
    }

    /// Waits until nothing is left to handle, at most for some time.
    pub(crate) fn wait_until_idle(&self, time: Duration) {
        let busy = |state: &mut State| !state.ready.is_empty() || state.idle < state.threads;
        drop(self.rested.wait_timeout_while(self.state.locked(), time, busy));
    }

    /// Starts a thread that has been counted already.
    fn spawn(&self, server: &Arc<Server>, idle_time: Option<Duration>) -> io::Result<()> {
        let worker = Vital(Arc::clone(server));
        let run = move || worker.0.workers.run(&worker.0, idle_time);
        thread::Builder::new().name("websocket".to_owned()).spawn(run).map(drop).inspect_err(|_| self.state.locked().threads -= 1)
    }

    /// Handles what is ready, one message of a socket at a time, so that a busy socket does not keep the others waiting.
    fn run(&self, server: &Arc<Server>, idle_time: Option<Duration>) {
        while let Some(socket) = self.next(idle_time) {
            handlers::handle(server, &socket);
            if socket.is_ready_again() {
                // This thread goes on with what is ready, so none has to be found.
                self.state.locked().ready.push_back(socket);
            }
        }
    }

    /// The next socket. None once there has been none for the idle time: the thread is then not counted any more.
    fn next(&self, idle_time: Option<Duration>) -> Option<Socket> {
        let mut state = self.state.locked();
        state.idle += 1;
        self.rested.notify_all();
        let nothing = |state: &mut State| state.ready.is_empty();
        state = match idle_time {
            Some(time) => unpoisoned(self.came.wait_timeout_while(state, time, nothing)).0,
            None => unpoisoned(self.came.wait_while(state, nothing)),
        };
        state.idle -= 1;
        let next = state.ready.pop_front();
        state.threads -= usize::from(next.is_none());
        next
    }
}
