//! The host socket, on which plugins make key-value requests, each served in the caller's namespace: as frames of the plugin protocol, or
//! as HTTP/1.1.
//!
//! The caller does not identify itself: the kernel names the peer process and its uid. Its session determines the plugin, and its uid must
//! be that plugin's.

mod frames;
mod http;
mod http_operation;
mod refuser;

use crate::http::parse::request_head::is_token;
use crate::plugins::context::{Context, Owner, Sessions};
use crate::plugins::host_socket::refuser::{FORBIDDEN, FULL, Refuser};
use crate::protocol::frame::{EncodeError, ReadError};
use crate::protocol::message::KvOp;
use crate::store::Store;
use crate::store::kv::{Answer, Call, KvError};
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
use rustix::net::{RecvFlags, SendFlags, recv};
use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Most connections of one plugin: each takes a thread of the host.
const MAX_CONNECTIONS: u32 = 64;

/// Most requests under way on one connection.
const MAX_PENDING: usize = 64;

/// Most bytes of values under way on one connection. Together with one more request, this bounds the memory of a connection.
const MAX_PENDING_BYTES: usize = 1024 * 1024;

/// Bytes of values that were read, or of replies, that trigger a write, even while more requests are waiting.
const MAX_REPLIES: usize = 256 * 1024;

/// Time for a plugin to go on reading its replies before its connection is closed.
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
    let refuser = Refuser::start()?;
    let accept = move || accept_all(&listener, &context, &counts, &refuser);
    threads::restarting(std::thread::Builder::new().name("host-socket".into()), accept)
}

fn accept_all(listener: &UnixListener, context: &Arc<Context>, counts: &Counts, refuser: &Refuser) {
    let mut refused = Refused::default();
    loop {
        match listener.accept() {
            // A refused connection is handed over at once, so it hardly delays those behind it.
            Ok((stream, _)) => {
                if let Err(refusal) = admit(stream, context, counts, refuser) {
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
fn admit(stream: UnixStream, context: &Arc<Context>, counts: &Counts, refuser: &Refuser) -> Result<(), Refusal> {
    let identified = identify(&stream, &context.sessions).and_then(|(pid, owner)| confirm(&stream, pid).map(|()| (pid, owner)));
    let (pid, owner) = match identified {
        Ok(identified) => identified,
        Err(refusal) => {
            refuser.refuse(stream, FORBIDDEN);
            return Err(refusal);
        }
    };
    let plugin = Arc::clone(&owner.plugin);
    let Some(counted) = counts.count(Arc::clone(&plugin), MAX_CONNECTIONS) else {
        owner.warn(&format!("it has {MAX_CONNECTIONS} connections to the host, which is the limit; another one is closed"));
        refuser.refuse(stream, FULL);
        return Ok(());
    };
    let context = Arc::clone(context);
    let thread = std::thread::Builder::new().name(format!("calls-{plugin}")).stack_size(SMALL_STACK * 4);
    let serve = move || {
        if let Err(closed) = serve(&stream, &context.store, &owner.plugin) {
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
    #[error("its HTTP request is refused: {0}")]
    Http(String),
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

/// How a caller speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Language {
    Frames,
    Http,
}

/// The first bytes of a connection that are looked at: the first length of a frame.
const FIRST_BYTES: usize = 4;

impl Language {
    /// Waits for the first bytes, and leaves them there to be read. None at the end of the stream.
    fn detect(stream: &UnixStream) -> io::Result<Option<Self>> {
        loop {
            let mut first = [0; FIRST_BYTES];
            match recv(stream, &mut first[..], RecvFlags::PEEK) {
                Ok((0, _)) => return Ok(None),
                Ok((received, _)) => return Ok(Some(Self::of(&first[..received]))),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// A frame begins with a zero byte, since no head is longer than 64 KiB, and a request with a method. A length in little-endian may begin
    /// with a letter, but has zero bytes too: the reader of frames says what is wrong with it.
    fn of(first: &[u8]) -> Self {
        if first.first().is_some_and(|&byte| is_token(byte)) && !first.contains(&0) { Self::Http } else { Self::Frames }
    }
}

/// Serves one connection until it closes.
fn serve(stream: &UnixStream, store: &Store, plugin: &str) -> Result<(), Closed> {
    match Language::detect(stream)? {
        None => Ok(()),
        Some(Language::Frames) => frames::serve(stream, store, plugin),
        Some(Language::Http) => http::serve(stream, store, plugin),
    }
}

/// Sends replies, which the plugin must read in time.
fn send(stream: &UnixStream, mut replies: &[u8]) -> Result<(), Closed> {
    while !replies.is_empty() {
        match rustix::net::send(stream, replies, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(sent) => replies = &replies[sent..],
            Err(rustix::io::Errno::INTR) => {}
            // A blocking write would return what it has sent after this time, and the next one would wait for as long again.
            Err(rustix::io::Errno::AGAIN) => {
                if !wait_for(stream, PollFlags::OUT, Some(Instant::now() + WRITE_TIME))? {
                    return Err(Closed::Unread);
                }
            }
            Err(error) => return Err(Closed::Broken(error.into())),
        }
    }
    Ok(())
}

/// Waits until the stream can be read or written, or has ended. False at the deadline.
fn wait_for(stream: &UnixStream, event: PollFlags, deadline: Option<Instant>) -> io::Result<bool> {
    loop {
        let time = deadline.map(|deadline| timespec(deadline.saturating_duration_since(Instant::now())));
        match poll(&mut [PollFd::new(stream, event)], time.as_ref()) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Operations of a connection that are under way, in order, each with what its reply needs. Every operation of a plugin reaches the store
/// through here.
struct Pending<'a, T> {
    store: &'a Store,
    plugin: &'a str,
    calls: Vec<(T, Call)>,
    /// Whether some of them may wait for a commit.
    has_writes: bool,
    /// Bytes of values to be written.
    written: usize,
    /// Bytes of values that were read.
    read: usize,
}

impl<'a, T> Pending<'a, T> {
    fn new(store: &'a Store, plugin: &'a str) -> Self {
        Self { store, plugin, calls: Vec::new(), has_writes: false, written: 0, read: 0 }
    }

    /// Starts an operation. Consecutive writes are in flight together, so they share a commit; a read waits for those before it.
    fn begin(&mut self, reply: T, op: KvOp, body: &[u8]) {
        if op.is_read() {
            self.settle();
        } else {
            self.has_writes = true;
            self.written += body.len();
        }
        let call = self.store.kv(self.plugin, op, body);
        if let Call::Done(Ok(answer)) = &call {
            self.read += answer.body.len();
        }
        self.calls.push((reply, call));
    }

    fn is_much(&self) -> bool {
        self.calls.len() >= MAX_PENDING || self.written >= MAX_PENDING_BYTES || self.read >= MAX_REPLIES
    }

    /// Waits for all writes under way.
    fn settle(&mut self) {
        if std::mem::take(&mut self.has_writes) {
            self.written = 0;
            self.calls = wait(&mut self.calls).map(|(reply, answer)| (reply, Call::Done(answer))).collect();
        }
    }

    /// Waits for all operations under way, and gives their answers in order.
    fn answers(&mut self) -> impl Iterator<Item = (T, Result<Answer, KvError>)> + use<T> {
        (self.has_writes, self.written, self.read) = (false, 0, 0);
        wait(&mut self.calls)
    }
}

/// Waits for operations, starting with the last one: it commits with or after the others, so this thread wakes only once.
fn wait<T>(calls: &mut Vec<(T, Call)>) -> impl Iterator<Item = (T, Result<Answer, KvError>)> + use<T> {
    let answers: Vec<_> = calls.drain(..).rev().map(|(reply, call)| (reply, call.wait())).collect();
    answers.into_iter().rev()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_bytes_tell_frames_from_http() {
        for first in [&b"GET "[..], b"G", b"PUT ", b"get ", b"!", b"GET\xff"] {
            assert_eq!(Language::of(first), Language::Http, "{first:?}");
        }
        for first in
            [&[0, 0, 0, 22][..], &[0], &[0, 1, 0, 0], &[22, 0, 0, 0], b"A\0\0\0", &[0x16, 3, 1, 2], b"\r\n", b" GET", b"{\"a"]
        {
            assert_eq!(Language::of(first), Language::Frames, "{first:?}");
        }
    }
}
