//! The host's own socket, where plugins call: requests on the key-value store, each served in the caller's namespace.
//!
//! Who calls is never asked: the kernel says which process is at the other end, and its session says whose it is.

use crate::host::Host;
use crate::link::RELEASE_AFTER;
use crate::pause::pause;
use crate::process::SMALL_STACK;
use crate::protocol::frame::{EncodeError, FrameReader, ReadError, encode};
use crate::protocol::message::{Failure, KvOp, MAX_ID, Malformed, Message};
use crate::store::kv::Call;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::{Pid, getsid};
use serde::Deserialize;
use std::collections::HashMap;
use std::fs::{self, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Most connections of one plugin: each is a thread of the host's.
const MAX_CONNECTIONS: usize = 64;

/// Most requests of one connection that are under way at once.
const MAX_PENDING: usize = 64;

/// Bytes of values that one connection may have under way: with one more frame, what it can make the host hold.
const MAX_PENDING_BYTES: usize = 1024 * 1024;

/// Bytes of replies after which they are sent, even when more requests are at hand.
const MAX_REPLIES: usize = 256 * 1024;

/// Time a plugin has to take its replies before its connection is closed.
const WRITE_TIME: Duration = Duration::from_secs(30);

/// Pause after a failed accept: the process is out of something that comes back.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How many connections each plugin has.
type Counts = Arc<Mutex<HashMap<Arc<str>, usize>>>;

/// Listens on the host socket, on threads of its own, for as long as the host runs.
pub(crate) fn listen(host: Arc<Host>) -> io::Result<()> {
    let path = host.data.host_socket();
    let listener = UnixListener::bind(&path)?;
    // Whoever may connect, who calls is found out. Where plugins have no users of their own nobody else gets this far.
    let mode = if host.plugin_uids.is_some() { 0o666 } else { 0o600 };
    fs::set_permissions(&path, Permissions::from_mode(mode))?;
    std::thread::Builder::new().name("callback".into()).spawn(move || accept_all(&listener, &host))?;
    Ok(())
}

fn accept_all(listener: &UnixListener, host: &Arc<Host>) {
    let counts = Counts::default();
    loop {
        let accepted = listener.accept().and_then(|(stream, _)| admit(stream, host, &counts));
        if let Err(error) = accepted {
            log::warn!("a plugin's call was not taken: {error}");
            pause(ACCEPT_PAUSE);
        }
    }
}

/// Finds out whose a connection is, and serves it on a thread of its own. One that is nobody's is closed.
fn admit(stream: UnixStream, host: &Arc<Host>, counts: &Counts) -> io::Result<()> {
    // 0 is a process, or a session's leader, that is outside of this container (PID namespace), and nobody's. By nix because
    // rustix takes both ids for what is never 0.
    let peer = getsockopt(&stream, PeerCredentials)?.pid();
    let session = if peer == 0 { Ok(Pid::from_raw(0)) } else { getsid(Some(Pid::from_raw(peer))) };
    let Some(plugin) = session.ok().and_then(|session| host.sessions.plugin(session.as_raw())) else {
        log::warn!("process {peer} is in no plugin's session: its connection to the host socket is closed");
        return Ok(());
    };
    let Some(place) = Place::take(counts, &plugin) else {
        log::warn!("{plugin}: it has {MAX_CONNECTIONS} connections to the host, a further one is closed");
        return Ok(());
    };
    stream.set_write_timeout(Some(WRITE_TIME))?;
    let host = Arc::clone(host);
    let thread = std::thread::Builder::new().name(format!("calls-{plugin}")).stack_size(SMALL_STACK * 4);
    thread.spawn(move || {
        if let Err(error) = serve(&stream, &host, &plugin) {
            log::debug!("{plugin}: its connection to the host ended: {error}");
        }
        drop(place);
    })?;
    Ok(())
}

/// One of a plugin's connections, given back when dropped.
struct Place {
    counts: Counts,
    plugin: Arc<str>,
}

impl Place {
    fn take(counts: &Counts, plugin: &Arc<str>) -> Option<Self> {
        let mut held = counts.lock().unwrap_or_else(PoisonError::into_inner);
        let count = held.entry(Arc::clone(plugin)).or_default();
        if *count >= MAX_CONNECTIONS {
            return None;
        }
        *count += 1;
        Some(Self { counts: Arc::clone(counts), plugin: Arc::clone(plugin) })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut held = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = held.get_mut(&self.plugin) {
            *count -= 1;
            if *count == 0 {
                held.remove(&self.plugin);
            }
        }
    }
}

/// Why a connection is closed.
#[derive(Debug, thiserror::Error)]
enum Closed {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("{0}")]
    Protocol(String),
    #[error(transparent)]
    Encode(#[from] EncodeError),
    #[error(transparent)]
    Write(#[from] io::Error),
}

/// Serves one connection to its end. Writes that follow one another are under way together and so share a sync; a read waits
/// for those before it.
fn serve(stream: &UnixStream, host: &Host, plugin: &str) -> Result<(), Closed> {
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
                if matches!(kv.op, KvOp::Get { .. } | KvOp::List(_)) {
                    pending.settle()?;
                }
                pending.bytes += frame.body.len();
                pending.calls.push((kv.id, host.store.kv(plugin, kv.op, frame.body)));
            }
            Ok(other) => return Err(Closed::Protocol(format!("a plugin does not send {}", other.kind()))),
            Err(malformed) => {
                let id = match &malformed {
                    Malformed::Json(_) => kv_id(frame.head),
                    _ => None,
                };
                let Some(id) = id else { return Err(Closed::Protocol(malformed.to_string())) };
                pending.settle()?;
                pending.fail(id, "bad_request", &malformed.to_string(), None)?;
            }
        }
        if !frames.is_ready() || pending.is_much() {
            pending.settle()?;
            (&mut &*stream).write_all(&pending.replies)?;
            pending.replies.clear();
            pending.replies.shrink_to(SMALL_STACK);
        }
    }
}

/// The id of a `kv` request whose other fields cannot be read.
fn kv_id(head: &[u8]) -> Option<u64> {
    #[derive(Deserialize)]
    struct Request {
        #[serde(rename = "type")]
        kind: String,
        id: u64,
    }
    let request: Request = serde_json::from_slice(head).ok()?;
    (request.kind == "kv" && request.id <= MAX_ID).then_some(request.id)
}

/// Requests under way, in order, and the replies that are ready to be sent.
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

    /// Waits for all that is under way, the last of it first: it is committed together with those before it or after them, so
    /// that this thread is woken once for all.
    fn settle(&mut self) -> Result<(), EncodeError> {
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
        let failure = Failure { id, code: code.into(), message: message.into(), index };
        encode(&mut self.replies, &failure, &[])
    }
}
