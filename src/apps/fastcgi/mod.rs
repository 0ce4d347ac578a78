//! FastCGI: a request to an application that answers on a socket, such as php-fpm.
//!
//! Each request has a connection of its own. An application such as php-fpm serves one connection with one process, and waits on it for
//! the next request if it is kept, so idle connections of the host would occupy processes that others wait for.

mod records;

use crate::apps::cgi::variables::Variables;
use crate::apps::cgi::{Arrived, Wire};
use crate::apps::endpoint::Endpoint;
use crate::process::output::PluginLog;
use crate::util::send_buffer::SendBuffer;
use records::{Decoder, Found};
use rustix::buffer::spare_capacity;
use rustix::io::Errno;
use rustix::net::RecvFlags;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Bytes to read at once.
const READ: usize = 32 * 1024;

/// Longest line of complaints in bytes that is kept until its end arrives, as in the log.
const MAX_LINE: usize = 16 * 1024;

/// A request on a connection of its own.
pub(crate) struct FastCgiWire {
    stream: OwnedFd,
    outgoing: SendBuffer,
    input: Vec<u8>,
    decoder: Decoder,
    log: PluginLog,
    /// The line of its complaints that has no end yet.
    line: Vec<u8>,
    /// The application's status of the request, once it has ended.
    status: Option<u32>,
}

impl FastCgiWire {
    /// Connects to an application, and queues a request with these variables. If the application has a `uid` of its own, the listener
    /// must have it too. Its complaints go to `log`.
    ///
    /// # Errors
    /// Nobody listens there, or takes a connection now.
    pub(crate) fn open(endpoint: &Endpoint, uid: Option<u32>, variables: &Variables, log: &PluginLog) -> io::Result<Self> {
        let stream = endpoint.connect(uid)?;
        rustix::io::ioctl_fionbio(&stream, true)?;
        let mut outgoing = SendBuffer::default();
        records::put_request(outgoing.bytes(), variables.iter().map(|(name, value)| (&name[..], &value[..])));
        let (input, line, log) = (Vec::new(), Vec::new(), log.clone());
        Ok(Self { stream, outgoing, input, decoder: Decoder::default(), log, line, status: None })
    }

    /// Passes whole lines of complaints on to the log.
    fn complain(&mut self) {
        let whole = memchr::memrchr(b'\n', &self.line).map_or(0, |end| end + 1);
        let whole = if self.line.len() >= MAX_LINE { self.line.len() } else { whole };
        self.log.print(&self.line[..whole]);
        self.line.drain(..whole);
    }
}

impl Wire for FastCgiWire {
    fn queue_body(&mut self, bytes: &[u8]) {
        records::put_body(self.outgoing.bytes(), bytes);
    }

    fn queue_body_end(&mut self) {
        records::put_body_end(self.outgoing.bytes());
    }

    fn unsent(&self) -> usize {
        self.outgoing.unsent()
    }

    fn send_some(&mut self) -> io::Result<()> {
        self.outgoing.send_to(&self.stream).map(drop)
    }

    fn forget_unsent(&mut self) {
        self.outgoing.clear();
    }

    fn sink(&self) -> Option<BorrowedFd<'_>> {
        (self.unsent() > 0).then(|| self.stream.as_fd())
    }

    fn source(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    fn receive(&mut self, output: &mut Vec<u8>) -> Result<Arrived, String> {
        self.input.clear();
        self.input.reserve(READ);
        match rustix::net::recv(&self.stream, spare_capacity(&mut self.input), RecvFlags::DONTWAIT) {
            Ok((_, 0)) => return Err("it closed the connection before the end of its answer".into()),
            Ok(_) => {}
            Err(Errno::AGAIN | Errno::INTR) => return Ok(Arrived::Nothing),
            Err(error) => return Err(format!("the connection was lost ({error})")),
        }
        let mut rest = &self.input[..];
        let mut arrived = Arrived::Something;
        while !rest.is_empty() && arrived != Arrived::End {
            let (used, found) = self.decoder.step(rest)?;
            match found {
                Found::Output(part) => output.extend_from_slice(&rest[part]),
                Found::Complaint(part) => self.line.extend_from_slice(&rest[part]),
                Found::End(status) => {
                    self.status = Some(status);
                    arrived = Arrived::End;
                }
                Found::Nothing => {}
            }
            rest = &rest[used..];
        }
        if !self.line.is_empty() {
            self.complain();
        }
        Ok(arrived)
    }

    fn has_ended(&mut self) -> bool {
        false
    }

    fn explain_silence(&mut self) -> String {
        format!("it ended the request with status {} and without an answer", self.status.unwrap_or_default())
    }
}

impl Drop for FastCgiWire {
    fn drop(&mut self) {
        if !self.line.is_empty() {
            self.log.print(&self.line);
        }
    }
}
