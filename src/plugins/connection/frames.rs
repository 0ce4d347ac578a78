//! A connection to a plugin that speaks the plugin protocol: frames over a Unix stream, with deadlines. It sends and receives at the same
//! time where needed.

use super::{Answer, Piece, PluginConnection, Received, Sent, TICK, WaitError};
use crate::http::Request;
use crate::http::framing::{ResponseHead, is_event_stream};
use crate::http::prefix::Mount;
use crate::plugins::job::KvJob;
use crate::plugins::process_state::ProcessState;
use crate::plugins::worker::{MAX_MISSED_PINGS, Outcome, Worker};
use crate::protocol::frame::{EncodeError, Frame, FrameReader, ReadError, encode, encode_head};
use crate::protocol::message::{Data, Failure, Message, Response};
use crate::util::send_buffer::{SendBuffer, poll_ready};
use rustix::event::PollFlags;
use serde::Serialize;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// The id of the first message on a connection; on the first connection that is `init`.
pub(crate) const FIRST_ID: u64 = 1;

/// Largest frame, in bytes, of an answer that is received as a whole. A larger one is passed on piece by piece, so that the client gets
/// its beginning before the plugin has written its end, and the host never holds all of it.
pub(crate) const WHOLE: usize = 128 * 1024;

/// Send buffer, in bytes, that an idle connection keeps.
const KEPT: usize = 16 * 1024;

/// Most late pongs on an idle connection. More are a flood.
const MAX_LATE_PONGS: u32 = MAX_MISSED_PINGS + 1;

/// A connection to a plugin that speaks the plugin protocol.
pub(crate) struct FrameConnection {
    frames: FrameReader<Duplex>,
    next_id: u64,
    /// The answer that streams.
    stream: Stream,
    /// Whether references in responses are mapped to the route.
    maps: bool,
}

/// The body of an answer that continues in `data` frames.
#[derive(Default)]
struct Stream {
    /// Its content length, if declared.
    declared: Option<u64>,
    /// Bytes received so far.
    received: u64,
}

impl FrameConnection {
    /// Appends a frame to the send buffer.
    pub(crate) fn queue(&mut self, head: &impl Serialize, body: &[u8]) -> Result<(), EncodeError> {
        encode(self.frames.stream().outgoing.bytes(), head, body)
    }

    /// Waits for a whole frame, which [`FrameConnection::take`] then returns. Sends the rest of the send buffer meanwhile.
    pub(crate) fn wait(&mut self, deadline: Instant, interrupted: impl Fn() -> bool) -> Result<(), WaitError> {
        self.receive(deadline, interrupted, FrameReader::wait)
    }

    /// Returns the frame that [`FrameConnection::wait`] has received.
    pub(crate) fn take(&mut self) -> Result<Frame<'_>, ReadError> {
        self.frames.read()
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
}

impl PluginConnection for FrameConnection {
    const PIPELINES: bool = true;
    const ON_DEMAND: bool = false;
    const HAS_IDS: bool = true;

    fn prepare(process: &ProcessState) -> io::Result<Self> {
        Self::connect(process)
    }

    fn connect(process: &ProcessState) -> io::Result<Self> {
        let stream = process.connect()?;
        stream.set_read_timeout(Some(TICK))?;
        Ok(Self {
            frames: FrameReader::new(Duplex { stream, outgoing: SendBuffer::default(), yield_at: Instant::now() }),
            next_id: FIRST_ID,
            stream: Stream::default(),
            maps: process.rewrites,
        })
    }

    fn is_open(&self) -> bool {
        true
    }

    fn close(&mut self) {}

    fn next_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    fn queue_request(&mut self, request: &Request, id: u64, more: bool, body: Vec<u8>) -> Result<(), EncodeError> {
        let duplex = self.frames.stream();
        encode_head(duplex.outgoing.bytes(), body.len(), |out| {
            request.encode(id, more, out);
            Ok(())
        })?;
        // Without a copy.
        duplex.outgoing.set_tail(body);
        Ok(())
    }

    fn queue_piece(&mut self, id: u64, piece: &[u8], more: bool) -> Result<(), EncodeError> {
        self.queue(&Data { id, more, aborted: false }, piece)
    }

    fn abort_body(&mut self, id: u64) -> Result<(), EncodeError> {
        self.queue(&Data { id, more: false, aborted: true }, &[])
    }

    fn queued(&mut self) -> usize {
        self.frames.stream().outgoing.unsent()
    }

    fn flush(&mut self, deadline: Instant, interrupted: impl Fn() -> bool) -> Result<Sent, WaitError> {
        let duplex = self.frames.stream();
        loop {
            if duplex.send_some().map_err(WaitError::Lost)? {
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

    fn is_unsent(&mut self) -> bool {
        self.frames.stream().outgoing.is_untouched()
    }

    fn has_answer(&mut self) -> bool {
        self.frames.is_ready() || self.frames.stream().poll(PollFlags::IN, Duration::ZERO).contains(PollFlags::IN)
    }

    fn is_followed(&self) -> bool {
        self.frames.is_followed()
    }

    fn holds_bytes(&self) -> bool {
        self.frames.holds_bytes()
    }

    fn check_quiet(&mut self, place: &str) -> Result<(), Option<String>> {
        if self.next_id == FIRST_ID {
            return Ok(());
        }
        for _ in 0..MAX_LATE_PONGS {
            if !self.holds_bytes() && !self.has_answer() {
                return Ok(());
            }
            let what = match self.wait(Instant::now(), || false) {
                Ok(()) => match self.take().map(|frame| frame.message()) {
                    Ok(Ok(Message::Pong(_))) => continue,
                    Ok(Ok(other)) => format!("{} came {place}, where nothing was due", other.named()),
                    Ok(Err(malformed)) => format!("a frame came {place}, where nothing was due: {malformed}"),
                    Err(error) => format!("bytes came {place}, where nothing was due: {error}"),
                },
                Err(WaitError::Closed { within: false }) => return Err(None),
                Err(WaitError::Invalid(what)) => format!("bytes came {place}, where nothing was due: {what}"),
                Err(WaitError::Deadline | WaitError::Interrupted) => {
                    format!("the beginning of a frame came {place}, where nothing was due")
                }
                Err(error) => format!("bytes came {place}, where nothing was due: {error}"),
            };
            return Err(Some(what));
        }
        Err(Some(format!("more than {MAX_LATE_PONGS} pongs came {place}, where nothing was due")))
    }

    fn unfinished(&self) -> Option<String> {
        self.frames.unfinished().map(|unfinished| unfinished.to_string())
    }

    fn may_resend(&self) -> bool {
        true
    }

    fn wait_answer(&mut self, deadline: Instant, interrupted: impl Fn() -> bool) -> Result<(), WaitError> {
        self.receive(deadline, interrupted, |frames| frames.wait_begin(WHOLE))
    }

    fn take_answer(&mut self, request: &Request, id: u64) -> Result<Received<'_>, WaitError> {
        let (frame, rest) = self.frames.begin(WHOLE)?;
        let (why, claimed) = match frame.message() {
            // A late pong.
            Ok(Message::Pong(pong)) if pong.id < id && rest == 0 => return Ok(Received::Nothing),
            Ok(Message::Response(response)) if response.id == id => {
                let (size, more) = (frame.body.len() + rest, response.more);
                let declared = match response.check(size, request.is_head()) {
                    Ok(declared) => declared.filter(|_| !request.is_head()),
                    Err(bad) => return Ok(Received::Refused { why: bad.to_string(), whole: !more && rest == 0 }),
                };
                self.stream = Stream { declared, received: size as u64 };
                let head = ResponseHead::of(&response, self.maps.then(|| Mount::of(request)));
                return Ok(Received::Answer(Answer { head, first: frame.body, rest, more, events: is_events(&response) }));
            }
            Ok(Message::Error(error)) if error.id == id && rest == 0 => {
                return Ok(Received::Error(answered_with(&error)));
            }
            // The frame is whole, so the expected answer can follow it.
            Ok(other) if other.id() < id && rest == 0 => return Ok(Received::Late(other.named())),
            Ok(other) => {
                let what = format!("protocol error: {} came where the response with id {id} was due", other.named());
                (what, Some(other.id()))
            }
            Err(malformed) => (format!("protocol error: {malformed}"), frame.id()),
        };
        Ok(Received::Unexpected { why, ours: claimed == Some(id) })
    }

    fn read_rest(&mut self, buffer: &mut [u8], deadline: Instant, interrupted: impl Fn() -> bool) -> Result<usize, WaitError> {
        self.receive(deadline, interrupted, |frames| frames.read_rest(buffer))
    }

    fn wait_piece(&mut self, deadline: Instant, interrupted: impl Fn() -> bool) -> Result<(), WaitError> {
        self.wait(deadline, interrupted)
    }

    fn take_piece(&mut self, id: u64) -> Result<Piece<'_>, WaitError> {
        let frame = self.frames.read()?;
        let data = match frame.message() {
            Ok(Message::Data(data)) if data.id == id => data,
            // The plugin has ended this answer itself, so the next frame belongs to the next request.
            Ok(Message::Error(error)) if error.id == id => {
                return Ok(Piece::Aborted(format!("the plugin sent the error {}: {}", error.code, error.message)));
            }
            Ok(other) => {
                let what = format!("protocol error: {} came where data with id {id} was due", other.named());
                return Ok(Piece::Broken(what));
            }
            Err(malformed) => return Ok(Piece::Broken(format!("protocol error: {malformed}"))),
        };
        let Stream { declared, received } = &mut self.stream;
        *received += frame.body.len() as u64;
        match *declared {
            Some(declared) if *received > declared || (!data.more && *received != declared) => {
                Ok(Piece::Broken(format!("its content-length is {declared}, its body has {received} bytes")))
            }
            _ => Ok(Piece::Data { bytes: frame.body, more: data.more }),
        }
    }

    fn finish(&mut self) -> bool {
        true
    }

    fn take_stream(&mut self) -> Option<(OwnedFd, Vec<u8>)> {
        None
    }

    fn release(&mut self) {
        self.frames.release();
        self.frames.stream().outgoing.shrink_to(KEPT);
    }

    fn operate(worker: &mut Worker<Self>, job: KvJob) -> Outcome {
        worker.operate(job)
    }

    fn ping(worker: &mut Worker<Self>) -> Outcome {
        worker.ping()
    }

    fn shut_down(worker: Worker<Self>) {
        worker.shut_down();
    }
}

/// Says which error the plugin has answered with.
pub(crate) fn answered_with(error: &Failure) -> String {
    format!("the plugin answered with the error {}: {}", error.code, error.message)
}

/// Whether an answer is a stream of server-sent events.
fn is_events(response: &Response<'_>) -> bool {
    let kind = response.headers.iter().find(|(name, _)| name.eq_ignore_ascii_case("content-type"));
    kind.is_some_and(|(_, value)| is_event_stream(value.as_bytes()))
}

/// The stream and its send buffer.
struct Duplex {
    stream: UnixStream,
    outgoing: SendBuffer,
    /// From this time on reads return `WouldBlock` even while data arrives, so a trickling plugin cannot starve the caller's housekeeping.
    yield_at: Instant,
}

impl Duplex {
    /// Sends what the plugin takes now. True if everything was sent.
    fn send_some(&mut self) -> io::Result<bool> {
        self.outgoing.send_to(&self.stream)
    }

    fn poll(&self, interest: PollFlags, time: Duration) -> PollFlags {
        poll_ready(&self.stream, interest, time)
    }
}

impl Read for Duplex {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let sends = self.outgoing.unsent() > 0;
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
