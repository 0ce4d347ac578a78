//! The host socket, on which plugins make key-value requests, each served in the caller's namespace.
//!
//! The caller does not identify itself: the kernel names the peer process and its uid. Its session determines the plugin, and its uid must
//! be that plugin's.

use crate::plugins::connection::RELEASE_AFTER;
use crate::plugins::context::{Context, Owner, Sessions};
use crate::protocol::frame::{EncodeError, FrameReader, ReadError, encode};
use crate::protocol::message::{Failure, MAX_ID, Malformed, Message};
use crate::protocol::values::integer;
use crate::store::kv::Call;
use crate::util::key_counts::KeyCounts;
use crate::util::log_throttle::{LogThrottle, suppressed_note};
use crate::util::pause::pause;
use crate::util::threads;
use crate::util::threads::{SMALL_STACK, timespec};
use nix::errno::Errno;
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::{PeerCredentials, PeerPidfd};
use nix::unistd::{Pid, getsid};
use rustix::event::{PollFd, PollFlags, poll};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Most connections of one plugin: each takes a thread of the host.
const MAX_CONNECTIONS: u32 = 64;

/// Most requests under way on one connection.
const MAX_PENDING: usize = 64;

/// Most bytes of values under way on one connection. Together with one more frame, this bounds the memory of a connection.
const MAX_PENDING_BYTES: usize = 1024 * 1024;

/// Bytes of replies that trigger a write, even while more requests are waiting.
const MAX_REPLIES: usize = 256 * 1024;

/// Time for a plugin to read its replies before its connection is closed.
const WRITE_TIME: Duration = Duration::from_secs(30);

/// Backlog of the socket. Strangers that flood the socket put at most this many connections, milliseconds of work, in front of a plugin's.
/// All plugins that start at once need fewer.
const BACKLOG: i32 = 512;

/// Pause after a failed accept: the process lacks a resource for now.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Number of connections of each plugin.
type Counts = KeyCounts<Arc<str>>;

/// Listens on the host socket, on its own threads, as long as the host runs.
pub(crate) fn listen(context: Arc<Context>) -> io::Result<()> {
    let path = context.data.host_socket();
    let listener = UnixListener::bind(&path)?;
    rustix::net::listen(&listener, BACKLOG)?;
    // Anybody may connect, because each caller is identified. Without uids for plugins the directory keeps other users out.
    let mode = if context.plugin_uids.is_some() { 0o666 } else { 0o600 };
    fs::set_permissions(&path, Permissions::from_mode(mode))?;
    let counts = Counts::default();
    threads::restarting(std::thread::Builder::new().name("host-socket".into()), move || accept_all(&listener, &context, &counts))
}

fn accept_all(listener: &UnixListener, context: &Arc<Context>, counts: &Counts) {
    let mut refused = Refused::default();
    loop {
        match listener.accept() {
            // A refused connection is closed at once, so it hardly delays those behind it.
            Ok((stream, _)) => {
                if let Err(refusal) = admit(stream, context, counts) {
                    refused.warn(refusal.kind(), || format!("{refusal}: its connection to the host socket is closed"));
                }
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted) => {}
            Err(error) => {
                refused.warn("accept", || format!("cannot accept calls of plugins: {error}"));
                pause(ACCEPT_PAUSE);
            }
        }
    }
}

/// Throttles log lines about refusals by kind; otherwise anybody who can connect could flood the host's log.
#[derive(Default)]
struct Refused(BTreeMap<&'static str, LogThrottle>);

impl Refused {
    fn warn(&mut self, kind: &'static str, what: impl FnOnce() -> String) {
        if let Some(suppressed) = self.0.entry(kind).or_default().hit(Instant::now()) {
            log::warn!("{}{}", what(), suppressed_note(suppressed));
        }
    }
}

/// Why a connection is refused.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("process {0} is not in a plugin's session")]
    Session(i32),
    #[error("process {pid} in the session of the plugin {plugin} has uid {uid} instead of {expected}")]
    Uid { pid: i32, uid: u32, plugin: Arc<str>, expected: u32 },
    #[error("process {0} has ended")]
    Ended(i32),
    #[error("the kernel does not identify the calling process ({0})")]
    Unknown(#[from] Errno),
    #[error("process {pid} of the plugin {plugin} cannot be served ({error})")]
    Failed { pid: i32, plugin: Arc<str>, error: io::Error },
}

impl Refusal {
    fn kind(&self) -> &'static str {
        match self {
            Self::Session(_) => "session",
            Self::Uid { .. } => "uid",
            Self::Ended(_) => "ended",
            Self::Unknown(_) => "unknown",
            Self::Failed { .. } => "failed",
        }
    }
}

/// Identifies the plugin of a connection, and serves it on a thread of its own.
fn admit(stream: UnixStream, context: &Arc<Context>, counts: &Counts) -> Result<(), Refusal> {
    let (pid, owner) = identify(&stream, &context.sessions)?;
    let plugin = Arc::clone(&owner.plugin);
    let Some(counted) = counts.count(Arc::clone(&plugin), MAX_CONNECTIONS) else {
        owner.warn(&format!("it has {MAX_CONNECTIONS} connections to the host, which is the limit; another one is closed"));
        return Ok(());
    };
    confirm(&stream, pid)?;
    let context = Arc::clone(context);
    let thread = std::thread::Builder::new().name(format!("calls-{plugin}")).stack_size(SMALL_STACK * 4);
    let serve = move || {
        if let Err(closed) = serve(&stream, &context, &owner.plugin) {
            log::debug!("{}: its connection to the host ended: {closed}", owner.plugin);
            if closed.is_error() {
                owner.note(&format!("a connection of process {pid} to the host socket was closed: {closed}"));
            }
        }
        drop(counted);
    };
    thread.spawn(serve).map(drop).map_err(|error| Refusal::Failed { pid, plugin, error })
}

/// The id of the connected process, and the plugin of its session.
fn identify(stream: &UnixStream, sessions: &Sessions) -> Result<(i32, Arc<Owner>), Refusal> {
    let peer = getsockopt(stream, PeerCredentials)?;
    let pid = peer.pid();
    // 0 is a process or session leader outside this PID namespace, so not a plugin's. Uses nix because rustix assumes that these ids are
    // never 0.
    if pid == 0 {
        return Err(Refusal::Session(pid));
    }
    let session = getsid(Some(Pid::from_raw(pid))).map_err(|_| Refusal::Ended(pid))?;
    let owner = sessions.owner(session.as_raw()).ok_or(Refusal::Session(pid))?;
    if peer.uid() != owner.uid {
        return Err(Refusal::Uid { pid, uid: peer.uid(), plugin: Arc::clone(&owner.plugin), expected: owner.uid });
    }
    Ok((pid, owner))
}

/// Verifies that the identified process is the one that connected, and not a later one with the same id.
///
/// The kernel provides a pidfd of the peer (`SO_PEERPIDFD`, Linux 6.5). Earlier kernels only record the uid at the time of the connect:
/// without uids for plugins, a process that reused the id between the connect and this check is mistaken for the one that connected.
fn confirm(stream: &UnixStream, pid: i32) -> Result<(), Refusal> {
    match getsockopt(stream, PeerPidfd) {
        // It still has its id, so it had it when its session was looked up.
        Ok(handle) if has_id(&handle, pid) => Ok(()),
        Err(Errno::ENOPROTOOPT) => Ok(()),
        Ok(_) | Err(Errno::ESRCH | Errno::EINVAL | Errno::ENODATA) => Err(Refusal::Ended(pid)),
        Err(error) => Err(error.into()),
    }
}

/// Whether the process of a pidfd still has its id: it runs, or was not reaped yet.
fn has_id(handle: &OwnedFd, pid: i32) -> bool {
    // A pidfd becomes readable when its process has ended.
    let mut ended = [PollFd::new(handle, PollFlags::IN)];
    if poll(&mut ended, Some(&timespec(Duration::ZERO))) == Ok(0) {
        return true;
    }
    let described = fs::read_to_string(format!("/proc/self/fdinfo/{}", handle.as_fd().as_raw_fd()));
    described.is_ok_and(|described| described.lines().any(|line| line == format!("Pid:\t{pid}")))
}

/// Why a connection is closed.
#[derive(Debug, thiserror::Error)]
enum Closed {
    #[error(transparent)]
    Read(ReadError),
    #[error("received a message of type {0}, expected kv")]
    Type(&'static str),
    #[error("{0}")]
    Malformed(String),
    #[error("a reply cannot be sent: {0}")]
    Encode(#[from] EncodeError),
    #[error("the replies to its requests were not read within {} s", WRITE_TIME.as_secs())]
    Unread,
    #[error(transparent)]
    Broken(#[from] io::Error),
}

impl From<ReadError> for Closed {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Io(error) => Self::Broken(error),
            error => Self::Read(error),
        }
    }
}

impl Closed {
    /// Whether the plugin violated the protocol. A broken connection is how every process ends.
    fn is_error(&self) -> bool {
        !matches!(self, Self::Broken(_))
    }
}

/// Serves one connection until it closes. Consecutive writes are in flight together, so they share a commit; a read waits for those before
/// it.
fn serve(stream: &UnixStream, context: &Context, plugin: &str) -> Result<(), Closed> {
    stream.set_write_timeout(Some(WRITE_TIME))?;
    let mut frames = FrameReader::new(stream);
    let mut pending = Pending::default();
    let mut idle = true;
    loop {
        let frame = match frames.read() {
            Ok(frame) => frame,
            Err(ReadError::Closed) => return Ok(()),
            Err(ReadError::Io(error)) => match error.kind() {
                io::ErrorKind::Interrupted => continue,
                io::ErrorKind::WouldBlock => {
                    frames.release();
                    pending.replies = Vec::new();
                    stream.set_read_timeout(None)?;
                    idle = true;
                    continue;
                }
                _ => return Err(error.into()),
            },
            Err(error) => return Err(error.into()),
        };
        if std::mem::take(&mut idle) {
            stream.set_read_timeout(Some(RELEASE_AFTER))?;
        }
        match frame.message() {
            Ok(Message::Kv(kv)) => {
                if kv.op.is_read() {
                    pending.answer_calls()?;
                }
                pending.bytes += frame.body.len();
                pending.calls.push((kv.id, context.store.kv(plugin, kv.op, frame.body)));
            }
            Ok(other) => return Err(Closed::Type(other.kind())),
            Err(malformed) => {
                let id = match &malformed {
                    Malformed::Json(_) | Malformed::Body { .. } => kv_id(frame.head),
                    _ => None,
                };
                let Some(id) = id else { return Err(Closed::Malformed(malformed.to_string())) };
                pending.answer_calls()?;
                pending.fail(id, "bad_request", &malformed.to_string(), None)?;
            }
        }
        if !frames.is_ready() || pending.is_much() {
            pending.answer_calls()?;
            (&mut &*stream).write_all(&pending.replies).map_err(|error| match error.kind() {
                io::ErrorKind::WouldBlock => Closed::Unread,
                _ => Closed::Broken(error),
            })?;
            pending.replies.clear();
            pending.replies.shrink_to(SMALL_STACK);
        }
    }
}

/// The id of a `kv` request whose other fields are malformed.
fn kv_id(head: &[u8]) -> Option<u64> {
    #[derive(Deserialize)]
    struct Request {
        #[serde(rename = "type")]
        kind: String,
        #[serde(deserialize_with = "integer")]
        id: u64,
    }
    let request: Request = serde_json::from_slice(head).ok()?;
    (request.kind == "kv" && request.id <= MAX_ID).then_some(request.id)
}

/// Requests under way, in order, and replies ready to send.
#[derive(Default)]
struct Pending {
    calls: Vec<(u64, Call)>,
    bytes: usize,
    replies: Vec<u8>,
}

impl Pending {
    fn is_much(&self) -> bool {
        self.calls.len() >= MAX_PENDING || self.bytes >= MAX_PENDING_BYTES || self.replies.len() >= MAX_REPLIES
    }

    /// Waits for all requests under way, starting with the last one: it commits with or after the others, so this thread wakes only once.
    fn answer_calls(&mut self) -> Result<(), EncodeError> {
        self.bytes = 0;
        let answers: Vec<_> = self.calls.drain(..).rev().map(|(id, call)| (id, call.wait())).collect();
        for (id, answer) in answers.into_iter().rev() {
            match answer {
                Ok(mut answer) => {
                    answer.result.id = id;
                    encode(&mut self.replies, &answer.result, &answer.body)?;
                }
                Err(error) => {
                    self.fail(id, error.code(), &error.message(), error.index())?;
                }
            }
        }
        Ok(())
    }

    fn fail(&mut self, id: u64, code: &str, message: &str, index: Option<usize>) -> Result<(), EncodeError> {
        encode(&mut self.replies, &Failure { index, ..Failure::new(id, code, message) }, &[])
    }
}
