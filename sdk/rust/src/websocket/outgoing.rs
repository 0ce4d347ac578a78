//! Frames on their way to the host: any thread puts them here without waiting, and one thread writes them.
//!
//! Credit bounds what lies here: of each socket no more than the host has given, and one message. So neither a handler nor the
//! reading thread ever waits for the host to read.

use super::message::Message;
use crate::lock::{LockExt, unpoisoned};
use crate::outbox::write_both;
use crate::protocol::frame::{EncodeError, encode_before};
use serde::Serialize;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// Longest message in bytes that is copied behind its head, so that one write takes many. The sockets of a broadcast share a longer one.
const COPIED: usize = 4 * 1024;

/// Most bytes that are put together for one write.
const BATCH: usize = 64 * 1024;

/// Frames behind one another. Behind them may stand a body that is not copied.
pub(super) struct Part {
    bytes: Vec<u8>,
    body: Option<Arc<Message>>,
}

impl Part {
    /// A frame of a head alone.
    pub(super) fn head(head: &impl Serialize) -> Result<Self, EncodeError> {
        Self::bytes(head, &[])
    }

    /// A frame whose body is copied.
    pub(super) fn bytes(head: &impl Serialize, body: &[u8]) -> Result<Self, EncodeError> {
        let mut bytes = Vec::new();
        encode_before(&mut bytes, head, body.len())?;
        bytes.extend_from_slice(body);
        Ok(Self { bytes, body: None })
    }

    /// A frame with a message.
    pub(super) fn message(head: &impl Serialize, message: &Arc<Message>) -> Result<Self, EncodeError> {
        let body = message.as_bytes();
        if body.len() <= COPIED {
            return Self::bytes(head, body);
        }
        let mut bytes = Vec::new();
        encode_before(&mut bytes, head, body.len())?;
        Ok(Self { bytes, body: Some(Arc::clone(message)) })
    }
}

#[derive(Default)]
struct Queue {
    parts: Vec<Part>,
    /// Whether the writer ends once all is written.
    is_closing: bool,
    /// Whether the writer has ended. Further messages are dropped.
    is_over: bool,
}

/// The frames of one connection that are not written yet.
#[derive(Default)]
pub(super) struct Outgoing {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Outgoing {
    /// Puts frames behind the others. Of a connection that is over they are dropped.
    pub(super) fn push(&self, part: Part) {
        let mut queue = self.queue.locked();
        if queue.is_over {
            return;
        }
        match queue.parts.last_mut() {
            Some(last) if last.body.is_none() && last.bytes.len() + part.bytes.len() <= BATCH => {
                last.bytes.extend_from_slice(&part.bytes);
                last.body = part.body;
            }
            _ => queue.parts.push(part),
        }
        drop(queue);
        self.changed.notify_all();
    }

    /// Writes frames as they come, until [`Outgoing::finish`] or until the host takes no more. The reading thread then learns it too.
    pub(super) fn write(&self, stream: &UnixStream) {
        loop {
            let idle = |queue: &mut Queue| queue.parts.is_empty() && !queue.is_closing;
            let mut queue = unpoisoned(self.changed.wait_while(self.queue.locked(), idle));
            let parts = std::mem::take(&mut queue.parts);
            drop(queue);
            let write = |part: Part| write_both(stream, &part.bytes, part.body.as_ref().map_or(&[], |body| body.as_bytes()));
            if parts.is_empty() || parts.into_iter().try_for_each(write).is_err() {
                break;
            }
        }
        let mut queue = self.queue.locked();
        queue.is_over = true;
        queue.parts = Vec::new();
        drop(queue);
        self.changed.notify_all();
        // Fails where the host has closed its end.
        stream.shutdown(Shutdown::Both).ok();
    }

    /// Has the writer end once all is written, or after some time.
    pub(super) fn finish(&self, stream: &UnixStream, time: Duration) {
        let mut queue = self.queue.locked();
        queue.is_closing = true;
        self.changed.notify_all();
        drop(unpoisoned(self.changed.wait_timeout_while(queue, time, |queue| !queue.is_over)));
        // Ends a write that the host does not take.
        stream.shutdown(Shutdown::Both).ok();
    }
}
