//! The host's connection to a plugin: frames over a Unix stream, with deadlines. It sends and receives at the same time where needed.

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

/// Interval at which a wait on the stream calls `interrupted`. Deadlines are kept to this precision.
const TICK: Duration = Duration::from_millis(100);

/// The id of the first message on a connection; on the first connection that is `init`.
pub(crate) const FIRST_ID: u64 = 1;

/// Largest frame, in bytes, of an answer that is received as a whole. A larger one is passed on piece by piece, so that the client gets
/// its beginning before the plugin has written its end, and the host never holds all of it.
pub(crate) const WHOLE: usize = 128 * 1024;

/// Idle time after which a connection frees its buffers. Between frequent requests they are worth keeping.
pub(crate) const RELEASE_AFTER: Duration = Duration::from_secs(1);

/// Send buffer, in bytes, that an idle connection keeps.
const KEPT: usize = 16 * 1024;

/// A connection to a plugin.
pub(crate) struct Connection {
    frames: FrameReader<Duplex>,
    next_id: u64,
}

/// Why a wait ended without a frame.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WaitError {
    /// The deadline passed.
    #[error("no answer in time")]
    Deadline,
    /// The caller stopped waiting.
    #[error("interrupted")]
    Interrupted,
    /// The connection cannot be used any more.
    #[error(transparent)]
    Broken(#[from] ReadError),
}

/// The result of an attempt to send.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    /// Everything was sent.
    All,
    /// The plugin takes no more now, and has sent something itself.
    Answered,
}

impl Connection {
    /// Connects to the plugin that listens at `path`. If the plugin has a `uid` of its own, the peer must have it too, since the path may
    /// be a link to another plugin's socket. Fails at once if nobody listens or accepts.
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
            frames: FrameReader::new(Duplex {
                stream,
                outgoing: Vec::new(),
                body: Vec::new(),
                sent: 0,
                yield_at: Instant::now(),
            }),
            next_id: FIRST_ID,
        })
    }

    /// Returns an id for the next message, unique on this connection.
    pub(crate) fn next_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    /// Appends a frame to the send buffer.
    pub(crate) fn queue(&mut self, head: &impl Serialize, body: &[u8]) -> Result<(), EncodeError> {
        encode(self.frames.stream().frames(), head, body)
    }

    /// Appends a request to the send buffer, without a copy of its body.
    pub(crate) fn queue_request(&mut self, request: &Request, id: u64, more: bool, body: Vec<u8>) -> Result<(), EncodeError> {
        let duplex = self.frames.stream();
        encode_head(duplex.frames(), body.len(), |out| {
            request.encode(id, more, out);
            Ok(())
        })?;
        duplex.body = body;
        Ok(())
    }

    /// Number of bytes in the send buffer.
    pub(crate) fn queued(&mut self) -> usize {
        self.frames.stream().unsent()
    }

    /// Sends the send buffer. Stops at the deadline, or when the plugin takes no more and has sent something itself.
    pub(crate) fn flush(&mut self, deadline: Instant, interrupted: impl Fn() -> bool) -> Result<Sent, WaitError> {
        let duplex = self.frames.stream();
        loop {
            if duplex.send_some().map_err(ReadError::Io)? {
                return Ok(Sent::All);
            }
            if interrupted() {
                return Err(WaitError::Interrupted);
            }
            let left = deadline.checked_duration_since(Instant::now()).ok_or(WaitError::Deadline)?;
            if duplex.poll(PollFlags::IN | PollFlags::OUT, left.min(TICK)).contains(PollFlags::IN) {
                return Ok(Sent::Answered);
            }
        }
    }

    /// Whether no byte of the send buffer was sent, as on a connection that the plugin had already closed.
    pub(crate) fn is_unsent(&mut self) -> bool {
        let duplex = self.frames.stream();
        duplex.sent == 0 && duplex.unsent() > 0
    }

    /// Whether bytes were received behind the current frame. Costs no system call.
    pub(crate) fn is_followed(&self) -> bool {
        self.frames.is_followed()
    }

    /// Whether bytes were received that belong to no frame returned so far. Costs no system call.
    pub(crate) fn holds_bytes(&self) -> bool {
        self.frames.holds_bytes()
    }

    /// The part of an incomplete frame that was received.
    pub(crate) fn unfinished(&self) -> Option<Unfinished> {
        self.frames.unfinished()
    }

    /// Whether the plugin has sent something that was not read yet, or has closed the connection.
    pub(crate) fn has_answer(&mut self) -> bool {
        self.frames.is_ready() || self.frames.stream().poll(PollFlags::IN, Duration::ZERO).contains(PollFlags::IN)
    }

    /// Whether a message was ever sent on the connection.
    pub(crate) fn is_used(&self) -> bool {
        self.next_id != FIRST_ID
    }

    /// Waits for a whole frame, which [`Connection::take`] then returns. Sends the rest of the send buffer meanwhile.
    pub(crate) fn wait(&mut self, deadline: Instant, interrupted: impl Fn() -> bool) -> Result<(), WaitError> {
        self.receive(deadline, interrupted, FrameReader::wait)
    }

    /// Returns the frame that [`Connection::wait`] has received.
    pub(crate) fn take(&mut self) -> Result<Frame<'_>, ReadError> {
        self.frames.read()
    }

    /// Like [`Connection::wait`], but of a frame over [`WHOLE`] only its beginning, which [`Connection::begin`] then returns.
    pub(crate) fn wait_begin(&mut self, deadline: Instant, interrupted: impl Fn() -> bool) -> Result<(), WaitError> {
        self.receive(deadline, interrupted, |frames| frames.wait_begin(WHOLE))
    }

    /// Returns the frame or, over [`WHOLE`], its beginning, and the number of bytes of its body that are left for
    /// [`Connection::read_rest`].
    pub(crate) fn begin(&mut self) -> Result<(Frame<'_>, usize), ReadError> {
        self.frames.begin(WHOLE)
    }

    /// Waits for more of a frame's body, and returns the number of bytes read.
    pub(crate) fn read_rest(
        &mut self,
        buffer: &mut [u8],
        deadline: Instant,
        interrupted: impl Fn() -> bool,
    ) -> Result<usize, WaitError> {
        self.receive(deadline, interrupted, |frames| frames.read_rest(buffer))
    }

    /// Retries `received` until it returns a value, the caller interrupts, or the deadline passes.
    fn receive<T>(
        &mut self,
        deadline: Instant,
        interrupted: impl Fn() -> bool,
        mut received: impl FnMut(&mut FrameReader<Duplex>) -> Result<T, ReadError>,
    ) -> Result<T, WaitError> {
        loop {
            self.frames.stream().yield_at = Instant::now() + TICK;
            match received(&mut self.frames) {
                Ok(received) => return Ok(received),
                Err(ReadError::Io(error)) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                    if interrupted() {
                        return Err(WaitError::Interrupted);
                    }
                    if Instant::now() >= deadline {
                        return Err(WaitError::Deadline);
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Frees memory that an idle connection does not need.
    pub(crate) fn release(&mut self) {
        self.frames.release();
        let duplex = self.frames.stream();
        if duplex.outgoing.is_empty() {
            duplex.outgoing.shrink_to(KEPT);
        }
    }
}

/// The stream and its send buffer.
struct Duplex {
    stream: UnixStream,
    outgoing: Vec<u8>,
    /// The body of the last frame, kept apart so that a large one is not copied.
    body: Vec<u8>,
    /// Number of bytes of both that were sent.
    sent: usize,
    /// From this time on reads return `WouldBlock` even while data arrives, so a trickling plugin cannot starve the caller's housekeeping.
    yield_at: Instant,
}

impl Duplex {
    /// The send buffer as one vector, to append a frame to it.
    fn frames(&mut self) -> &mut Vec<u8> {
        self.outgoing.append(&mut self.body);
        &mut self.outgoing
    }

    fn unsent(&self) -> usize {
        self.outgoing.len() + self.body.len() - self.sent
    }

    /// Sends what the plugin takes now. True if everything was sent.
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

    /// Waits up to `time` until the stream is ready. A hang-up or an error counts as readable, so that the next read reports it.
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
        if Instant::now() >= self.yield_at {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        // A blocking read is also woken when the plugin takes the request, only to sleep again. A poll for input is not.
        if sends && !self.poll(PollFlags::IN, TICK).contains(PollFlags::IN) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.stream.read(buffer)
    }
}
