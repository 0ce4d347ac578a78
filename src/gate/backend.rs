//! A request's way through the host: a connection to the HTTP library inside of it, one request at a time, never sent ahead, and
//! replaced when it is not left clean; or a place among those that go over the one that is shared, with body and answer by the mailbox.

use super::chunked::Decoder;
use super::client::ClientKey;
use super::mailbox::Pieces;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use rustix::fd::OwnedFd;
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, send, socket_with};
use std::io;
use std::path::Path;
use std::time::Instant;

slotmap::new_key_type! {
    /// Names a connection among those there are; never one that came later.
    pub(super) struct BackendKey;
}

/// What a connection is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    /// It was opened, and has to show by an answer that somebody is there; until then.
    Opening(Instant),
    /// It is free, since then.
    Free(Instant),
    /// It has a client's request.
    Busy(ClientKey),
    /// Many requests go over it, and nothing comes back on it.
    Shared,
}

/// What comes next from the host.
#[derive(Debug)]
pub(super) enum Reading {
    /// The head of an answer.
    Head,
    /// So many bytes of its body.
    Length(u64),
    /// A body in chunks, with how much is left of the length it was declared with.
    Chunks(Decoder, Option<u64>),
}

/// A way through the host.
pub(super) struct Backend {
    /// None where the request has gone over the shared connection.
    pub(super) socket: Option<OwnedFd>,
    /// Where the body of its answer comes from, if that is in pieces by the mailbox.
    pub(super) pieces: Option<Pieces>,
    pub(super) user: Use,
    /// Whether the request has gone over the shared connection.
    pub(super) aboard: bool,
    /// Whether the mailbox has an entry for it.
    pub(super) entered: bool,
    /// More may be there to read.
    pub(super) readable: bool,
    /// More may be sent.
    pub(super) writable: bool,
    /// Whether it is told when that is so again.
    pub(super) told_writable: bool,
    /// The beginning of a head that has not come whole.
    pub(super) input: Vec<u8>,
    pub(super) searched: usize,
    pub(super) reading: Reading,
    /// Bytes to send, of which the first `sent` are gone.
    pub(super) out: Vec<u8>,
    pub(super) sent: usize,
    /// Whether the whole request is in `out`, or sent.
    pub(super) whole: bool,
    /// Whether the body goes out in chunks.
    pub(super) chunked: bool,
    /// Whether it is of no use after this answer.
    pub(super) spent: bool,
}

impl Backend {
    /// Opens a connection to this very process.
    pub(super) fn open(path: &Path, until: Instant) -> io::Result<Self> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, None)?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        // A plugin of the host's own user could have put a socket of its own there.
        let listener = getsockopt(&socket, PeerCredentials)?.pid();
        if listener.cast_unsigned() != std::process::id() {
            return Err(io::Error::other(format!("process {listener} listens at {}, where the host should", path.display())));
        }
        Ok(Self { socket: Some(socket), ..Self::new(Use::Opening(until)) })
    }

    /// The way of a request over the shared connection.
    pub(super) fn aboard(client: ClientKey) -> Self {
        Self { aboard: true, entered: true, spent: true, ..Self::new(Use::Busy(client)) }
    }

    fn new(user: Use) -> Self {
        Self {
            socket: None,
            pieces: None,
            user,
            aboard: false,
            entered: false,
            readable: true,
            writable: true,
            told_writable: false,
            input: Vec::new(),
            searched: 0,
            reading: Reading::Head,
            out: Vec::new(),
            sent: 0,
            whole: true,
            chunked: false,
            spent: false,
        }
    }

    /// Bytes that wait to be sent.
    pub(super) fn unsent(&self) -> usize {
        self.out.len() - self.sent
    }

    /// Sends what waits, as far as it goes.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while let Some(socket) = &self.socket
            && self.writable
            && self.sent < self.out.len()
        {
            match send(socket, &self.out[self.sent..], SendFlags::NOSIGNAL) {
                Ok(n) => self.sent += n,
                Err(rustix::io::Errno::AGAIN) => self.writable = false,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if self.sent == self.out.len() {
            self.out.clear();
            self.sent = 0;
        }
        Ok(())
    }

    /// Whether the request has gone out whole.
    pub(super) fn is_sent(&self) -> bool {
        self.whole && self.unsent() == 0
    }
}
