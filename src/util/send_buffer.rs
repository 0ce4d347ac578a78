//! Bytes on their way to a socket or a pipe that takes only some of them at a time.

use crate::util::threads::timespec;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags};
use std::io::{self, IoSlice};
use std::os::fd::AsFd;
use std::time::Duration;

/// Bytes to send, with a last part that is kept apart so that a large one is not copied.
#[derive(Debug, Default)]
pub(crate) struct SendBuffer {
    bytes: Vec<u8>,
    tail: Vec<u8>,
    /// Number of bytes of both that were sent.
    sent: usize,
}

impl SendBuffer {
    /// The buffer as one vector, to append to it.
    pub(crate) fn bytes(&mut self) -> &mut Vec<u8> {
        self.bytes.append(&mut self.tail);
        &mut self.bytes
    }

    /// Appends the last part, without a copy. There must be none yet: call [`SendBuffer::bytes`] before.
    pub(crate) fn set_tail(&mut self, tail: Vec<u8>) {
        self.tail = tail;
    }

    /// Number of bytes that were not sent.
    pub(crate) fn unsent(&self) -> usize {
        self.bytes.len() + self.tail.len() - self.sent
    }

    /// Whether no byte was sent of those that are there.
    pub(crate) fn is_untouched(&self) -> bool {
        self.sent == 0 && self.unsent() > 0
    }

    /// Sends what a socket takes now, blocking or not. True if everything was sent.
    pub(crate) fn send_to(&mut self, socket: impl AsFd) -> io::Result<bool> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        self.send_by(|bytes, tail| match tail {
            [] => rustix::net::send(&socket, bytes, flags),
            _ => {
                let parts = [IoSlice::new(bytes), IoSlice::new(tail)];
                rustix::net::sendmsg(&socket, &parts, &mut SendAncillaryBuffer::default(), flags)
            }
        })
    }

    /// Has `write`, which does not block, send the two parts of what is left, until it takes no more. True if everything was sent.
    pub(crate) fn send_by(&mut self, mut write: impl FnMut(&[u8], &[u8]) -> rustix::io::Result<usize>) -> io::Result<bool> {
        while self.unsent() > 0 {
            let bytes = self.bytes.get(self.sent..).unwrap_or_default();
            let tail = &self.tail[self.sent.saturating_sub(self.bytes.len())..];
            match write(bytes, tail) {
                Ok(n) => self.sent += n,
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.clear();
        Ok(true)
    }

    /// Takes out what was not sent.
    pub(crate) fn take_unsent(&mut self) -> Vec<u8> {
        let sent = self.sent;
        let unsent = self.bytes().split_off(sent);
        self.clear();
        unsent
    }

    /// Drops everything.
    pub(crate) fn clear(&mut self) {
        self.bytes.clear();
        self.tail = Vec::new();
        self.sent = 0;
    }

    /// Frees memory beyond this many bytes, if the buffer is empty.
    pub(crate) fn shrink_to(&mut self, kept: usize) {
        if self.bytes.is_empty() {
            self.bytes.shrink_to(kept);
        }
    }
}

/// Waits up to `time` until a socket is ready. A hang-up or an error counts as readable, so that the next read reports it.
pub(crate) fn poll_ready(socket: impl AsFd, interest: PollFlags, time: Duration) -> PollFlags {
    let mut fds = [PollFd::new(&socket, interest)];
    match poll(&mut fds, Some(&timespec(time))) {
        Ok(_) if fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR) => PollFlags::IN,
        Ok(_) => fds[0].revents(),
        Err(_) => PollFlags::empty(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    #[test]
    fn what_a_socket_does_not_take_at_once_is_sent_later_and_in_order() {
        let (socket, mut peer) = UnixStream::pair().unwrap();
        let mut buffer = SendBuffer::default();
        buffer.bytes().extend_from_slice(b"head ");
        buffer.set_tail(vec![7; 1 << 20]);
        assert!(buffer.is_untouched() && buffer.unsent() == (1 << 20) + 5);
        assert!(!buffer.send_to(&socket).unwrap() && !buffer.is_untouched());
        buffer.bytes().extend_from_slice(b" end");
        let reader = std::thread::Builder::new().name("reader".into()).spawn(move || {
            let mut got = Vec::new();
            peer.read_to_end(&mut got).unwrap();
            got
        });
        while !buffer.send_to(&socket).unwrap() {
            poll_ready(&socket, PollFlags::OUT, Duration::from_secs(60));
        }
        assert_eq!(buffer.unsent(), 0);
        drop(socket);
        let got = reader.unwrap().join().unwrap();
        assert_eq!(got, [&b"head "[..], &[7; 1 << 20], b" end"].concat());
    }

    #[test]
    fn what_was_not_sent_can_be_taken_out() {
        let mut buffer = SendBuffer::default();
        buffer.bytes().extend_from_slice(b"abc");
        buffer.set_tail(b"def".to_vec());
        let mut once = Some(4);
        assert!(!buffer.send_by(|_, _| once.take().ok_or(Errno::AGAIN)).unwrap());
        assert_eq!((buffer.unsent(), buffer.take_unsent(), buffer.unsent()), (2, b"ef".to_vec(), 0));
    }
}
