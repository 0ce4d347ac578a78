//! One request to a script: its body goes there while the answer comes back, in any order.

use super::response::{self, Head};
use super::{Arrived, Wire};
use crate::http::Request;
use crate::http::prefix::Mount;
use crate::http::request::RequestBody;
use crate::util::threads::timespec;
use rustix::event::{PollFd, PollFlags, poll};
use std::io;
use std::time::{Duration, Instant};

/// Bytes of an answer that are held until the client takes them. The script waits then.
const MAX_HELD: usize = 128 * 1024;

/// Bytes of a body that are read at once.
const BODY_PIECE: usize = 64 * 1024;

/// Time to wait for more of a body before the script gets its turn.
const BODY_TICK: Duration = Duration::from_millis(10);

/// Interval at which the wire of a silent script is asked whether it has ended.
const END_CHECK: Duration = Duration::from_millis(100);

/// Most reads for the last output of a script: more than a pipe holds.
const LAST_READS: u32 = 16;

/// A request that a script answers.
pub(crate) struct Exchange {
    wire: Box<dyn Wire>,
    /// What was received of the answer and not taken.
    output: Vec<u8>,
    /// The answer has ended.
    ended: bool,
    /// Nothing more can be read, for this reason.
    fault: Option<String>,
    /// Since when the whole body is in the send buffer; none if more of it is due.
    body_ended: Option<Instant>,
    /// When bytes were last moved, in either direction.
    moved: Instant,
    /// The client has not sent its body to the end.
    body_broken: bool,
    buffer: Vec<u8>,
}

impl Exchange {
    /// The exchange of a request on a wire that has the request's variables.
    pub(crate) fn new(wire: Box<dyn Wire>) -> Self {
        Self {
            wire,
            output: Vec::new(),
            ended: false,
            fault: None,
            body_ended: None,
            moved: Instant::now(),
            body_broken: false,
            buffer: Vec::new(),
        }
    }

    /// Since when the script has the whole body, as far as the host can tell.
    pub(crate) fn body_ended(&self) -> Option<Instant> {
        self.body_ended.filter(|_| self.wire.unsent() == 0)
    }

    /// When bytes were last moved, in either direction.
    pub(crate) fn moved(&self) -> Instant {
        self.moved
    }

    /// Whether the client has broken off its body.
    pub(crate) fn is_body_broken(&self) -> bool {
        self.body_broken
    }

    /// Whether an answer would come too early: the gate discards what is left of a body that streams once its answer has begun.
    pub(crate) fn awaits_body(&self, request: &Request) -> bool {
        let is_streaming = matches!(request.body, RequestBody::Stream(_)) && self.body_ended.is_none();
        is_streaming && !self.is_settled() && self.output.len() < MAX_HELD
    }

    /// Sends no more of a body that streams, because its answer begins.
    pub(crate) fn abort_body(&mut self, request: &Request) {
        // Without its end, so that the script cannot take it for complete.
        if matches!(request.body, RequestBody::Stream(_)) {
            self.body_ended.get_or_insert_with(Instant::now);
        }
    }

    /// Moves what can be moved; waits up to `time` if that is nothing.
    pub(crate) fn step(&mut self, request: &mut Request, time: Duration) {
        let sent = self.send(request);
        let received = self.receive();
        if sent || received {
            self.moved = Instant::now();
            return;
        }
        if self.is_settled() || self.output.len() >= MAX_HELD {
            return;
        }
        let mut fds = vec![PollFd::from_borrowed_fd(self.wire.source(), PollFlags::IN)];
        fds.extend(self.wire.sink().map(|sink| PollFd::from_borrowed_fd(sink, PollFlags::OUT)));
        // While the client is slow with its body, `send` does the waiting.
        let waits_for_client = self.body_ended.is_none() && self.wire.unsent() == 0;
        let time = if waits_for_client { Duration::ZERO } else { time.min(END_CHECK) };
        let ready = poll(&mut fds, Some(&timespec(time))).unwrap_or(0);
        if ready == 0 && self.wire.has_ended() {
            // What it sent last was there before it ended. Something else may still send more.
            for _ in 0..LAST_READS {
                if !self.receive_some() {
                    break;
                }
            }
            self.ended = true;
        }
    }

    /// Sends more of the body. True if something was moved.
    fn send(&mut self, request: &mut Request) -> bool {
        let before = self.wire.unsent();
        if before == 0 && self.body_ended.is_none() && !self.is_settled() {
            self.buffer.resize(BODY_PIECE, 0);
            match request.read_body(&mut self.buffer, BODY_TICK) {
                Ok(0) => {
                    self.wire.queue_body_end();
                    self.body_ended = Some(Instant::now());
                    self.buffer = Vec::new();
                }
                Ok(n) => self.wire.queue_body(&self.buffer[..n]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => {
                    // The end of its connection tells the script that the rest will not come.
                    self.body_broken = true;
                    self.body_ended = Some(Instant::now());
                }
            }
        }
        let queued = self.wire.unsent();
        if queued > 0 && self.wire.send_some().is_err() {
            // It may have answered before it stopped reading.
            self.wire.forget_unsent();
            self.body_ended.get_or_insert_with(Instant::now);
        }
        self.wire.unsent() < queued
    }

    /// Receives more of the answer. True if something came.
    fn receive(&mut self) -> bool {
        !self.is_settled() && self.output.len() < MAX_HELD && self.receive_some()
    }

    fn receive_some(&mut self) -> bool {
        match self.wire.receive(&mut self.output) {
            Ok(Arrived::Nothing) => false,
            Ok(Arrived::Something) => true,
            Ok(Arrived::End) => {
                self.ended = true;
                true
            }
            Err(why) => {
                self.fault = Some(why);
                true
            }
        }
    }

    /// Whether nothing more comes.
    pub(crate) fn is_settled(&self) -> bool {
        self.ended || self.fault.is_some()
    }

    /// Takes the head of the answer, if it is there.
    ///
    /// # Errors
    /// There will be none, or what is wrong with it, as a sentence about the script.
    pub(crate) fn take_head(&mut self, mount: Option<Mount<'_>>) -> Result<Option<Head>, String> {
        if response::is_due(&self.output) {
            let head = response::read(&self.output, mount)?;
            self.output.drain(..head.size);
            return Ok(Some(head));
        }
        match (&self.fault, self.ended) {
            (Some(why), _) => Err(why.clone()),
            (None, false) => Ok(None),
            (None, true) if self.output.is_empty() => Err(self.wire.explain_silence()),
            (None, true) => {
                // What there is has no empty line, so this says what is wrong with it.
                self.output.extend_from_slice(b"\n\n");
                Err(response::read(&self.output, mount)
                    .map_or_else(|why| why, |_| "its answer ended before the empty line behind the header lines".to_owned()))
            }
        }
    }

    /// Takes what is there of the body, and whether more follows.
    ///
    /// # Errors
    /// Why nothing more can follow, although the answer has not ended.
    pub(crate) fn take_body(&mut self) -> Result<(Vec<u8>, bool), String> {
        match &self.fault {
            Some(why) if self.output.is_empty() => Err(why.clone()),
            _ => Ok((std::mem::take(&mut self.output), !self.ended)),
        }
    }
}
