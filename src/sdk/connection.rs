//! One connection from the host: messages in, replies out, as few system calls as can be.

use crate::protocol::frame::{EncodeError, FrameReader, ReadError, encode};
use crate::protocol::message::{Failure, Malformed, Message};
use serde::Serialize;
use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;

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

/// A connection with its buffers.
pub(super) struct Connection {
    reader: FrameReader<UnixStream>,
    /// Messages that [`Connection::look`] has found, with their bodies.
    ahead: VecDeque<(Message, Vec<u8>)>,
    /// The body of the message received last.
    body: Vec<u8>,
    /// Replies not yet written.
    out: Vec<u8>,
}

impl Connection {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self { reader: FrameReader::new(stream), ahead: VecDeque::new(), body: Vec::new(), out: Vec::new() }
    }

    /// The next message; its body is then [`Connection::body`]. Replies are written first, unless the message is at hand.
    pub(super) fn receive(&mut self) -> Result<Message, End> {
        if let Some((message, body)) = self.ahead.pop_front() {
            self.body = body;
            return Ok(message);
        }
        if !self.reader.is_ready() {
            self.flush()?;
        }
        loop {
            match self.reader.read() {
                Ok(frame) => {
                    self.body.clear();
                    self.body.extend_from_slice(frame.body);
                    return Ok(frame.message()?);
                }
                Err(ReadError::Io(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The body of the message received last.
    pub(super) fn body(&self) -> &[u8] {
        &self.body
    }

    /// Takes in what has arrived, without waiting, and tells whether the host wants the connection to end.
    pub(super) fn look(&mut self) -> Result<bool, End> {
        self.reader.stream().set_nonblocking(true)?;
        let looked = self.take_ahead();
        self.reader.stream().set_nonblocking(false)?;
        looked?;
        Ok(self.ahead.iter().any(|(message, _)| matches!(message, Message::Shutdown(_))))
    }

    fn take_ahead(&mut self) -> Result<(), End> {
        while self.ahead.len() < MAX_AHEAD {
            match self.reader.read() {
                Ok(frame) => self.ahead.push_back((frame.message()?, frame.body.to_vec())),
                Err(ReadError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Appends a frame to what is to be written.
    pub(super) fn send(&mut self, head: &impl Serialize, body: &[u8]) -> Result<(), End> {
        encode(&mut self.out, head, body)?;
        self.flush_batch()
    }

    /// As [`Connection::send`], for a reply of the plugin's making: one that fits no frame is an `error` instead.
    /// Gives the reason where that is so.
    pub(super) fn reply(&mut self, id: u64, head: &impl Serialize, body: &[u8]) -> Result<Option<EncodeError>, End> {
        let Err(error) = encode(&mut self.out, head, body) else { return self.flush_batch().map(|()| None) };
        self.send(&Failure { id, code: "internal".to_owned(), message: error.to_string(), index: None }, &[])?;
        Ok(Some(error))
    }

    /// Writes the replies.
    pub(super) fn flush(&mut self) -> Result<(), End> {
        if !self.out.is_empty() {
            self.reader.stream().write_all(&self.out)?;
            self.out.clear();
        }
        Ok(())
    }

    fn flush_batch(&mut self) -> Result<(), End> {
        if self.out.len() >= BATCH { self.flush() } else { Ok(()) }
    }
}
