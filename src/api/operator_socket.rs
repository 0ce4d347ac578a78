//! The operator's socket: tiny_http serves the API on it, for the commands of this program.
//!
//! The socket has the mode 0600, so that only the host's user and root reach it. It has threads of its own, so that the operator is
//! answered even when clients occupy all others.

use super::Api;
use crate::system::rlimits;
use crate::system::unix_socket;
use crate::util::pause::pause;
use crate::util::threads;
use anyhow::Result;
use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tiny_http::{Header, Request, Response, Server};

/// The mode of the socket.
const MODE: u32 = 0o600;

/// Number of threads. A command that waits for its plugin occupies one.
const THREADS: usize = 4;

/// Limit of requests that wait for a thread.
const QUEUE: usize = 64;

/// Interval at which an idle socket is checked: tiny_http ends without an error if it cannot create a thread.
const CHECK_EVERY: Duration = Duration::from_secs(5);

/// Threads that tiny_http creates at its start. It panics if it cannot.
const LIBRARY_THREADS: usize = 6;

/// Longest body that a request may announce, in bytes: far above the API's limit. When tiny_http drops a request, it allocates the
/// announced and unread rest of the body, and the process aborts if that fails.
const MAX_ANNOUNCED: usize = 64 * 1024 * 1024;

/// Pause before another attempt to start tiny_http.
const RESTART_PAUSE: Duration = Duration::from_millis(200);

/// Time limit for starting tiny_http again. Without the operator's socket the host exits, so that its supervisor starts it again.
const RESTART_TIME: Duration = Duration::from_secs(60);

/// Serves the API on a socket at `path`. The returned channel closes when the socket has failed for good.
///
/// # Errors
/// The socket or a thread cannot be created.
pub(crate) fn serve(api: &Arc<Api>, path: PathBuf) -> Result<Receiver<()>> {
    let mut server = Some(start(&path)?);
    let (queue, requests) = bounded::<Request>(QUEUE);
    for number in 1..=THREADS {
        let (api, requests) = (Arc::clone(api), requests.clone());
        let answer = move || requests.iter().for_each(|request| answer(&api, request));
        std::thread::Builder::new().name(format!("operator-{number}")).spawn(answer)?;
    }
    let (alive, failed) = bounded(0);
    let receive = move || {
        // tiny_http removes its socket's file when it is dropped, so the next one starts after that.
        while let Some(running) = server.take() {
            receive(&running, &path, &queue);
            log::warn!("the operator's socket takes no connections any more, and is opened again");
            drop(running);
            server = start_again(&path);
        }
        drop::<Sender<()>>(alive);
    };
    threads::vital(std::thread::Builder::new().name("operator".into()), receive)?;
    Ok(failed)
}

fn start(path: &Path) -> Result<Server> {
    rlimits::spare_threads(LIBRARY_THREADS)?;
    let listener = UnixListener::from(unix_socket::listen(path, MODE)?);
    listener.set_nonblocking(false)?;
    Server::from_listener(listener, None).map_err(|error| anyhow::Error::from(io::Error::other(error.to_string())))
}

/// Hands requests to the threads until tiny_http takes no more connections.
fn receive(server: &Server, path: &Path, queue: &Sender<Request>) {
    let mut is_dead = false;
    while !is_dead {
        is_dead = match server.recv_timeout(CHECK_EVERY) {
            Ok(Some(request)) if request.body_length().is_some_and(|length| length > MAX_ANNOUNCED) => {
                log::warn!(
                    "a request at the operator's socket gets no answer: it announces more than the limit of {MAX_ANNOUNCED} bytes"
                );
                // The request is never dropped. That costs a thread and an open file instead of the process.
                std::mem::forget(request);
                false
            }
            Ok(Some(request)) => {
                if let Err(TrySendError::Full(request) | TrySendError::Disconnected(request)) = queue.try_send(request) {
                    let busy = super::Refused::new(503, "overloaded", "the API answers too many commands: try again");
                    respond(request, busy.into());
                }
                false
            }
            // A removed socket is noticed by the watch of the data directory.
            Ok(None) => UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused),
            Err(_) => true,
        };
    }
}

fn start_again(path: &Path) -> Option<Server> {
    let deadline = Instant::now() + RESTART_TIME;
    loop {
        // tiny_http panics if it cannot create its threads.
        let error = match catch_unwind(AssertUnwindSafe(|| start(path))) {
            Ok(Ok(server)) => return Some(server),
            Ok(Err(error)) => format!("{error:#}"),
            Err(_) => "tiny_http has panicked".to_owned(),
        };
        if Instant::now() >= deadline {
            log::error!("the operator's socket cannot be opened: {error}");
            return None;
        }
        pause(RESTART_PAUSE);
    }
}

fn answer(api: &Api, mut request: Request) {
    let (method, url) = (request.method().as_str().to_owned(), request.url().to_owned());
    let authorization = request.headers().iter().find(|header| header.field.equiv("authorization"));
    let authorization = authorization.map(|header| header.value.as_str().to_owned());
    let handled = catch_unwind(AssertUnwindSafe(|| api.handle(&method, &url, authorization.as_deref(), request.as_reader())));
    let reply = handled.unwrap_or_else(|_| {
        super::Refused::internal(format!("the host has failed at {method} {url}, which is a fault of its own")).into()
    });
    respond(request, reply);
}

fn respond(request: Request, reply: super::Reply) {
    let headers: Vec<Header> = reply.headers().filter_map(|(name, value)| Header::from_bytes(name, value).ok()).collect();
    let (status, body) = (reply.status, reply.body);
    let response = headers.into_iter().fold(Response::from_string(body).with_status_code(status), Response::with_header);
    // A command that has ended needs no answer.
    request.respond(response).ok();
}
