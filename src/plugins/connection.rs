//! The host's connection to a plugin: frames over a Unix stream, with deadlines, sending and receiving at once where it must.

use crate::http::Request;
use crate::protocol::frame::{EncodeError, Frame, FrameReader, ReadError, Unfinished, encode, encode_head};
use crate::util::threads::timespec;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendAncillaryBuffer, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use serde::Serialize;
use std::io::{self, IoSlice, Read};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a wait on the stream goes on before the caller may look after other things. Deadlines are kept to this precision.
const TICK: Duration = Duration::from_millis(100);

/// The id of the first request on a connection; `init` on the first one.
pub(crate) const FIRST_ID: u64 = 1;

/// Largest frame in bytes of an answer that is waited for as a whole. One that is larger is passed on while it comes, so that the client
/// has the first of it before the plugin has written the last, and nobody holds all of it.
pub(crate) const WHOLE: usize = 128 * 1024;

/// Idle time after which the buffers of a connection with a plugin are given back: while requests come now and then they are worth keeping.
pub(crate) const RELEASE_AFTER: Duration = Duration::from_secs(1);

/// Memory in bytes that a connection keeps for sending when it falls idle.
const KEPT: usize = 16 * 1024;

/// A connection to a plugin.
pub(crate) struct Link {
    frames: FrameReader<Duplex>,
    next_id: u64,
}

/// How a wait for a frame ended without one.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Lost {
    /// The deadline passed.
    #[error("no answer in time")]
    Deadline,
    /// The caller's own reason to stop waiting.
    #[error("interrupted")]
    Interrupted,
    /// The connection is of no more use.
    #[error(transparent)]
    Broken(#[from] ReadError),
}

/// What became of an attempt to send.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    /// All is on its way.
    All,
    /// The plugin does not take more, and has sent something itself.
    Answered,
}

impl Link {
    /// Connects to a plugin that listens at `path`, as the user `uid` where it has one of its own: what is at the path may be a link
    /// to another's socket. Does not wait for one that is not there, or is not accepting.
    pub(crate) fn connect(path: &Path, uid: Option<u32>) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        if uid.is_some_and(|uid| !getsockopt(&socket, PeerCredentials).is_ok_and(|peer| peer.uid() == uid)) {
            return Err(io::Error::other("another user listens on its socket"));
        }
        let stream = UnixStream::from(socket);
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(TICK))?;
        Ok(Self {
            frames: FrameReader::new(Duplex { stream, outgoing: Vec::new(), body: Vec::new(), sent: 0, look_up: Instant::now() }),
            next_id: FIRST_ID,
        })
    }

    /// An id for the next request, unique on this connection.
    pub(crate) fn next_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    /// Puts a frame behind what is to be sent.
    pub(crate) fn queue(&mut self, head: &impl Serialize, body: &[u8]) -> Result<(), EncodeError> {
        encode(self.frames.stream().frames(), head, body)
    }

    /// Queues a request with a body that is sent from where it is.
    pub(crate) fn queue_request(&mut self, request: &Request, id: u64, more: bool, body: Vec<u8>) -> Result<(), EncodeError> {
        let duplex = self.frames.stream();
        encode_head(duplex.frames(), body.len(), |out| {
            request.encode(id, more, out);
            Ok(())
        })?;
        duplex.body = body;
        Ok(())
    }

    /// Bytes waiting to be sent.
    pub(crate) fn queued(&mut self) -> usize {
        self.frames.stream().unsent()
    }

    /// Sends what is queued. Stops when the plugin does not take it and has sent something, or at the deadline.
    pub(crate) fn flush(&mut self, deadline: Instant, interrupted: impl Fn() -> bool) -> Result<Sent, Lost> {
        let duplex = self.frames.stream();
        loop {
            if duplex.send_some().map_err(ReadError::Io)? {
                return Ok(Sent::All);
            }
            if interrupted() {
                return Err(Lost::Interrupted);
            }
            let left = deadline.checked_duration_since(Instant::now()).ok_or(Lost::Deadline)?;
            if duplex.poll(PollFlags::IN | PollFlags::OUT, left.min(TICK)).contains(PollFlags::IN) {
                return Ok(Sent::Answered);
            }
        }
    }

    /// Whether nothing of what is queued was sent, as on a connection that the plugin had closed before.
    pub(crate) fn is_unsent(&mut self) -> bool {
        let duplex = self.frames.stream();
        duplex.sent == 0 && duplex.unsent() > 0
    }

    /// Whether bytes stand behind the frame at hand. Costs no system call.
    pub(crate) fn is_followed(&self) -> bool {
        self.frames.is_followed()
    }

    /// Whether bytes were received that belong to no frame that was given out. Costs no system call.
    pub(crate) fn holds_bytes(&self) -> bool {
        self.frames.holds_bytes()
    }

    /// What is here of a frame that is not whole.
    pub(crate) fn unfinished(&self) -> Option<Unfinished> {
        self.frames.unfinished()
    }

    /// Whether the plugin has sent something that was not received yet, or has ended the connection.
    pub(crate) fn has_answer(&mut self) -> bool {
        self.frames.is_ready() || self.frames.stream().poll(PollFlags::IN, Duration::ZERO).contains(PollFlags::IN)
    }

    /// Whether a message was sent on the connection.
    pub(crate) fn is_used(&self) -> bool {
        self.next_id != FIRST_ID
    }

    /// Waits until a whole frame is here, which [`Link::take`] then gives. What is still to be sent is sent meanwhile.
    pub(crate) fn wait(&mut self, deadline: Instant, interrupted: impl Fn() -> bool) -> Result<(), Lost> {
        self.keep_on(deadline, interrupted, FrameReader::wait)
    }

    /// The frame that was waited for.
    pub(crate) fn take(&mut self) -> Result<Frame<'_>, ReadError> {
        self.frames.read()
    }

    /// As [`Link::wait`], but of a frame over [`WHOLE`] for no more than its beginning, which [`Link::begin`] then gives.
    pub(crate) fn wait_begin(&mut self, deadline: Instant, interrupted: impl Fn() -> bool) -> Result<(), Lost> {
        self.keep_on(deadline, interrupted, |frames| frames.wait_begin(WHOLE))
    }

    /// The frame that was waited for or, over [`WHOLE`], the first of it, and how many bytes of its body [`Link::read_rest`] has to take.
    pub(crate) fn begin(&mut self) -> Result<(Frame<'_>, usize), ReadError> {
        self.frames.begin(WHOLE)
    }

    /// Waits for more of a frame's body, and takes it.
    pub(crate) fn read_rest(
        &mut self,
        buffer: &mut [u8],
        deadline: Instant,
        interrupted: impl Fn() -> bool,
    ) -> Result<usize, Lost> {
        self.keep_on(deadline, interrupted, |frames| frames.read_rest(buffer))
    }

    /// Receives until it is `received`.
    fn keep_on<T>(
        &mut self,
        deadline: Instant,
        interrupted: impl Fn() -> bool,
        mut received: impl FnMut(&mut FrameReader<Duplex>) -> Result<T, ReadError>,
    ) -> Result<T, Lost> {
        loop {
            self.frames.stream().look_up = Instant::now() + TICK;
            match received(&mut self.frames) {
                Ok(received) => return Ok(received),
                Err(ReadError::Io(error)) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                    if interrupted() {
                        return Err(Lost::Interrupted);
                    }
                    if Instant::now() >= deadline {
                        return Err(Lost::Deadline);
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Gives back memory that an idle connection does not need.
    pub(crate) fn release(&mut self) {
        self.frames.release();
        let duplex = self.frames.stream();
        if duplex.outgoing.is_empty() {
            duplex.outgoing.shrink_to(KEPT);
        }
    }
}

/// The stream, and what is still to be sent on it.
struct Duplex {
    stream: UnixStream,
    outgoing: Vec<u8>,
    /// The body of the last frame, where it stands behind the others by itself: a large one is better not copied.
    body: Vec<u8>,
    /// Bytes of both that are gone already.
    sent: usize,
    /// When the caller is to look after other things, also while bytes keep coming: a plugin may send a frame drop by drop.
    look_up: Instant,
}

impl Duplex {
    /// All that is to be sent, to put another frame behind it.
    fn frames(&mut self) -> &mut Vec<u8> {
        self.outgoing.append(&mut self.body);
        &mut self.outgoing
    }

    fn unsent(&self) -> usize {
        self.outgoing.len() + self.body.len() - self.sent
    }

    /// Sends what the plugin takes now, and says whether that was all.
    fn send_some(&mut self) -> io::Result<bool> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        while self.unsent() > 0 {
            let frames = self.outgoing.get(self.sent..).unwrap_or_default();
            let body = &self.body[self.sent.saturating_sub(self.outgoing.len())..];
            let sent = if body.is_empty() {
                rustix::net::send(&self.stream, frames, flags)
            } else {
                let parts = [IoSlice::new(frames), IoSlice::new(body)];
                rustix::net::sendmsg(&self.stream, &parts, &mut SendAncillaryBuffer::default(), flags)
            };
            match sent {
                Ok(n) => self.sent += n,
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.outgoing.clear();
        self.body = Vec::new();
        self.sent = 0;
        Ok(true)
    }

    /// What the stream is ready for, within a time. An end or an error reads as ready to receive, where it then shows.
    fn poll(&self, interest: PollFlags, time: Duration) -> PollFlags {
        let mut fds = [PollFd::new(&self.stream, interest)];
        match poll(&mut fds, Some(&timespec(time))) {
            Ok(_) if fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR) => PollFlags::IN,
            Ok(_) => fds[0].revents(),
            Err(_) => PollFlags::empty(),
        }
    }
}

impl Read for Duplex {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let sends = self.unsent() > 0;
        if sends && !self.send_some()? && !self.poll(PollFlags::IN | PollFlags::OUT, TICK).contains(PollFlags::IN) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if Instant::now() >= self.look_up {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        // Who sleeps in a read is also woken when the plugin takes the request, and has to fall asleep again; who polls is not.
        if sends && !self.poll(PollFlags::IN, TICK).contains(PollFlags::IN) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.stream.read(buffer)
    }
}
