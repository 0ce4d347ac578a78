//! One connection from the host: messages in, replies out, as few system calls as can be.

use super::outbox::{Flusher, Outbox};
use crate::protocol::frame::{EncodeError, FrameReader, ReadError, encode_before};
use crate::protocol::message::{Failure, Malformed, Message};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;
use std::collections::VecDeque;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Replies are written once they have come to so many bytes, even while more requests are at hand.
const BATCH: usize = 64 * 1024;

/// How many messages are taken in ahead of their time, while a response streams: there to find a `shutdown` among them.
const MAX_AHEAD: usize = 16;

/// Why a connection is over.
#[derive(Debug)]
pub(super) enum End {
    /// Closed, or the host told to. A stream that fails is the host's way to cancel, and nothing to report.
    Closed,
    /// One side did not keep to the protocol, or a response could not be finished.
    Fault(String),
}

impl From<io::Error> for End {
    fn from(_: io::Error) -> Self {
        Self::Closed
    }
}

impl From<ReadError> for End {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Length { .. } => Self::Fault(error.to_string()),
            ReadError::Closed | ReadError::Cut | ReadError::Io(_) => Self::Closed,
        }
    }
}

impl From<Malformed> for End {
    fn from(error: Malformed) -> Self {
        Self::Fault(error.to_string())
    }
}

impl From<EncodeError> for End {
    fn from(error: EncodeError) -> Self {
        Self::Fault(error.to_string())
    }
}

/// A stream that is read here and written by the [`Outbox`]: one open file a connection, not two.
struct Shared {
    stream: Arc<UnixStream>,
    /// Whether a read waits for bytes. The stream itself always blocks, for another thread may be writing to it.
    waits: bool,
}

impl Read for Shared {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        if !self.waits && poll(&mut [PollFd::new(&*self.stream, PollFlags::IN)], Some(&now))? == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        (&*self.stream).read(buffer)
    }
}

impl AsFd for Shared {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// A connection with its buffers.
pub(super) struct Connection {
    reader: FrameReader<Shared>,
    /// The heads of messages that [`Connection::look`] has found, with their bodies.
    ahead: VecDeque<(Vec<u8>, Vec<u8>)>,
    /// Whether the host was found there to want the connection to end.
    is_ending: bool,
    /// The body of the message received last.
    body: Vec<u8>,
    /// Replies not yet written.
    out: Arc<Outbox>,
    flusher: Arc<Flusher>,
    /// Whether the host has closed the connection, as the server's watcher sees it.
    ended: Arc<AtomicBool>,
}

impl Connection {
    pub(super) fn new(stream: Arc<UnixStream>, flusher: Arc<Flusher>, ended: Arc<AtomicBool>) -> Self {
        let out = Arc::new(Outbox::new(Arc::clone(&stream)));
        let reader = FrameReader::new(Shared { stream, waits: true });
        Self { reader, ahead: VecDeque::new(), is_ending: false, body: Vec::new(), out, flusher, ended }
    }

    /// The next message, whose head is put in place of what is in `head`; its body is then [`Connection::body`]. Replies are written
    /// first, or, if the message is at hand, within a moment.
    pub(super) fn receive<'a>(&mut self, head: &'a mut Vec<u8>) -> Result<Message<'a>, End> {
        if let Some(ahead) = self.ahead.pop_front() {
            (*head, self.body) = ahead;
            return Ok(Message::of_frame(head, self.body.len())?);
        }
        if !self.reader.is_ready() {
            self.flush()?;
        } else if !self.out.frames().is_empty() {
            self.flusher.watch(&self.out);
        }
        if !self.reader.is_ready() {
            // Who sleeps in a read is also woken when the host takes the reply, and has to fall asleep again; who polls is not. The
            // read tells of what is wrong.
            let mut fds = [PollFd::new(self.reader.stream(), PollFlags::IN)];
            poll(&mut fds, None).ok();
        }
        loop {
            match self.reader.read() {
                Ok(frame) => {
                    self.body.clear();
                    self.body.extend_from_slice(frame.body);
                    head.clear();
                    head.extend_from_slice(frame.head);
                    return Ok(Message::of_frame(head, self.body.len())?);
                }
                Err(ReadError::Io(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The stream below, for a thread that writes to it by itself.
    pub(super) fn stream(&mut self) -> Arc<UnixStream> {
        Arc::clone(&self.reader.stream().stream)
    }

    pub(super) fn ended(&self) -> &Arc<AtomicBool> {
        &self.ended
    }

    /// The body of the message received last.
    pub(super) fn body(&self) -> &[u8] {
        &self.body
    }

    /// The same to keep: it is empty from now on.
    pub(super) fn take_body(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.body)
    }

    /// Takes in what has arrived, without waiting, and tells whether the host wants the connection to end.
    pub(super) fn look(&mut self) -> Result<bool, End> {
        self.reader.stream().waits = false;
        let looked = self.take_ahead();
        self.reader.stream().waits = true;
        looked?;
        Ok(self.is_ending)
    }

    fn take_ahead(&mut self) -> Result<(), End> {
        while self.ahead.len() < MAX_AHEAD {
            match self.reader.read() {
                Ok(frame) => {
                    self.is_ending |= matches!(frame.message()?, Message::Shutdown(_));
                    self.ahead.push_back((frame.head.to_vec(), frame.body.to_vec()));
                }
                Err(ReadError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Appends a frame to what is to be written.
    pub(super) fn send(&mut self, head: &impl Serialize, body: &[u8]) -> Result<(), End> {
        encode_before(&mut self.out.frames(), head, body.len())?;
        self.put(body)
    }

    /// As [`Connection::send`], for a reply of the plugin's making: one that fits no frame is an `error` instead.
    /// Gives the reason where that is so.
    pub(super) fn reply(&mut self, id: u64, head: &impl Serialize, body: &[u8]) -> Result<Option<EncodeError>, End> {
        let encoded = encode_before(&mut self.out.frames(), head, body.len());
        let Err(error) = encoded else { return self.put(body).map(|()| None) };
        self.send(&Failure::new(id, "internal", &error.to_string()), &[])?;
        Ok(Some(error))
    }

    /// Writes the replies.
    pub(super) fn flush(&mut self) -> Result<(), End> {
        Ok(self.out.flush()?)
    }

    /// Puts a body behind its head; a large one is written at once and not copied.
    fn put(&mut self, body: &[u8]) -> Result<(), End> {
        let mut frames = self.out.frames();
        if frames.len() + body.len() < BATCH {
            frames.extend_from_slice(body);
            return Ok(());
        }
        drop(frames);
        Ok(self.out.flush_with(body)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::time::{Duration, Instant};

    #[test]
    fn a_read_that_does_not_wait_leaves_writes_of_another_thread_alone() {
        let (stream, _host) = UnixStream::pair().unwrap();
        let mut shared = Shared { stream: Arc::new(stream), waits: false };
        assert_eq!(shared.read(&mut [0; 8]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        // Nobody reads, so a write that must not block fails in the end, and one that may goes on until its time is over.
        let mut writer = &*shared.stream;
        writer.set_write_timeout(Some(Duration::from_millis(50))).unwrap();
        let begin = Instant::now();
        while writer.write(&[0; 65536]).is_ok() {}
        assert!(begin.elapsed() >= Duration::from_millis(50));
    }
}
