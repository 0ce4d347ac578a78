//! A client's connection as a non-blocking stream of bytes: a socket, with or without TLS.

use crate::http::parse::request_head::{MAX_METHOD, is_token};
use rustix::buffer::spare_capacity;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, recv, send, sendmsg, shutdown, sockopt};
use rustls::{ServerConfig, ServerConnection};
use std::io::{self, IoSlice, Read, Write};
use std::sync::Arc;

/// Unsent plain bytes that TLS buffers: the content of two of its largest records.
const TLS_BUFFER: usize = 32 * 1024;

/// First byte of each connection that speaks TLS: the type of the record that holds a hello (RFC 8446, section 5.1).
const HANDSHAKE: u8 = 22;

/// Bytes examined to recognise plain HTTP if TLS is expected: the longest method and the space after it.
const MAX_OPENING: usize = MAX_METHOD + 1;

/// A connection.
pub(crate) struct Stream {
    socket: Socket,
    tls: Option<Box<ServerConnection>>,
    /// Whether the first bytes are still to show that the client speaks TLS.
    is_new: bool,
    /// Whether the client speaks plain HTTP though TLS is expected.
    is_plain: bool,
}

/// What the first bytes show of the client's protocol, if TLS is expected.
#[derive(Debug, PartialEq, Eq)]
enum Opening {
    Tls,
    Http,
    Other,
    /// More bytes are needed.
    Unclear,
}

impl Opening {
    fn of(bytes: &[u8]) -> Self {
        let length = bytes.iter().position(|&byte| !is_token(byte));
        match (bytes.first(), length.map(|length| bytes[length])) {
            (Some(&HANDSHAKE), _) => Self::Tls,
            (_, Some(b' ')) if length > Some(0) => Self::Http,
            (_, None) if bytes.len() < MAX_OPENING => Self::Unclear,
            _ => Self::Other,
        }
    }
}

struct Socket {
    file: Arc<OwnedFd>,
    /// Bytes passed to the kernel.
    written: u64,
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(&self.file, buffer)?)
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let sent = send(&self.file, bytes, SendFlags::NOSIGNAL)?;
        self.written += sent as u64;
        Ok(sent)
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let sent = sendmsg(&self.file, parts, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL)?;
        self.written += sent as u64;
        Ok(sent)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream {
    /// A stream over a non-blocking socket.
    pub(crate) fn new(socket: OwnedFd, tls: Option<&Arc<ServerConfig>>) -> io::Result<Self> {
        let tls = match tls {
            None => None,
            Some(config) => {
                let mut tls = ServerConnection::new(Arc::clone(config)).map_err(io::Error::other)?;
                tls.set_buffer_limit(Some(TLS_BUFFER));
                Some(Box::new(tls))
            }
        };
        let is_new = tls.is_some();
        Ok(Self { socket: Socket { file: Arc::new(socket), written: 0 }, tls, is_new, is_plain: false })
    }

    /// Whether the stream is encrypted.
    pub(crate) fn is_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// Whether the client speaks plain HTTP though TLS is expected. It gets a plain error, and no request of it is submitted.
    pub(crate) fn is_plain_http(&self) -> bool {
        self.is_plain
    }

    /// Peeks at the first bytes where TLS is expected, to recognise plain HTTP.
    fn peek(&mut self) -> io::Result<()> {
        let mut bytes = [0; MAX_OPENING];
        let (_, length) = recv(&self.socket.file, &mut bytes, RecvFlags::PEEK)?;
        if length > 0 {
            match Opening::of(&bytes[..length]) {
                Opening::Tls => {}
                Opening::Http => {
                    self.tls = None;
                    self.is_plain = true;
                }
                Opening::Unclear => return Err(io::ErrorKind::WouldBlock.into()),
                Opening::Other => {
                    // Its end is not one of TLS.
                    self.tls = None;
                    return Err(io::ErrorKind::InvalidData.into());
                }
            }
            self.is_new = false;
        }
        Ok(())
    }

    /// Whether the TLS handshake is still under way.
    pub(crate) fn is_handshaking(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.is_handshaking())
    }

    /// The socket, for plain bytes; none with TLS.
    pub(crate) fn share(&self) -> Option<Arc<OwnedFd>> {
        self.tls.is_none().then(|| Arc::clone(&self.socket.file))
    }

    /// Bytes that this stream has passed to the kernel, as on the wire.
    pub(crate) fn written(&self) -> u64 {
        self.socket.written
    }

    /// The socket itself.
    pub(crate) fn file(&self) -> &OwnedFd {
        &self.socket.file
    }

    /// Reads available input; 0 at the end. Without TLS, a short read has taken all of it.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.is_new {
            self.peek()?;
        }
        let Some(tls) = &mut self.tls else { return self.socket.read(buffer) };
        loop {
            match tls.reader().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // If a connection ends without `close_notify`, HTTP's framing tells whether something is missing, as without TLS.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                read => return read,
            }
            if tls.read_tls(&mut self.socket)? == 0 {
                return Ok(0);
            }
            let processed = tls.process_new_packets();
            // The handshake's messages, or an alert about an error.
            let flushed = flush(tls, &mut self.socket);
            processed.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            flushed?;
        }
    }

    /// Whether the end of the client's sending is the next thing to read. With TLS it cannot be told from the last records, and counts as
    /// such.
    pub(crate) fn is_at_end(&self) -> bool {
        self.tls.is_some() || recv(&self.socket.file, &mut [0; 1], RecvFlags::PEEK).is_ok_and(|(_, length)| length == 0)
    }

    /// Reads available input into the spare capacity of a buffer, without TLS; 0 at the end.
    pub(crate) fn read_to(&mut self, buffer: &mut Vec<u8>) -> io::Result<usize> {
        Ok(rustix::io::read(&self.socket.file, spare_capacity(buffer))?)
    }

    /// Sends bytes, then others, as many as the socket takes.
    pub(crate) fn write(&mut self, first: &[u8], second: &[u8]) -> io::Result<usize> {
        let Some(tls) = &mut self.tls else {
            return match (first, second) {
                (bytes, []) | ([], bytes) => self.socket.write(bytes),
                _ => self.socket.write_vectored(&[IoSlice::new(first), IoSlice::new(second)]),
            };
        };
        flush(tls, &mut self.socket)?;
        let taken = tls.writer().write_vectored(&[IoSlice::new(first), IoSlice::new(second)])?;
        flush(tls, &mut self.socket)?;
        if taken == 0 { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(taken) }
    }

    /// Whether TLS holds unsent bytes.
    pub(crate) fn is_unsent(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.wants_write())
    }

    /// Sends bytes that TLS holds, as far as the socket takes them.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.tls.as_mut().map_or(Ok(()), |tls| flush(tls, &mut self.socket))
    }

    /// With TLS, sends `close_notify`: the end, with nothing missing (RFC 8446, section 6.1).
    pub(crate) fn say_end(&mut self) -> io::Result<()> {
        let Some(tls) = &mut self.tls else { return Ok(()) };
        tls.send_close_notify();
        flush(tls, &mut self.socket)
    }

    /// Shuts down sending. Input can still be read.
    pub(crate) fn end_sending(&mut self) -> io::Result<()> {
        self.say_end()?;
        Ok(shutdown(&self.socket.file, Shutdown::Write)?)
    }

    /// Makes the connection end with a reset when it is dropped, which no client takes for the end of an answer.
    pub(crate) fn break_off(&self) -> io::Result<()> {
        Ok(sockopt::set_socket_linger(&self.socket.file, Some(std::time::Duration::ZERO))?)
    }
}

fn flush(tls: &mut ServerConnection, socket: &mut Socket) -> io::Result<()> {
    while tls.wants_write() {
        match tls.write_tls(socket) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_spoken_is_known_by_the_first_bytes() {
        let longest = "M".repeat(MAX_METHOD);
        for (bytes, expected) in [
            (&b"\x16"[..], Opening::Tls),
            (b"\x16\x03\x01\x02\x00", Opening::Tls),
            (b"", Opening::Unclear),
            (b"G", Opening::Unclear),
            (b"GET", Opening::Unclear),
            (b"GET ", Opening::Http),
            (b"GET / HTTP/1.1\r\n", Opening::Http),
            (b"M-SEARCH * HTTP/1.1\r\n", Opening::Http),
            (longest.as_bytes(), Opening::Unclear),
            (format!("{longest} ").as_bytes(), Opening::Http),
            (format!("{longest}M").as_bytes(), Opening::Other),
            (b" ", Opening::Other),
            (b"\r\nGET / HTTP/1.1", Opening::Other),
            (b"SSH-2.0-OpenSSH\r\n", Opening::Other),
            (b"\x80\x2e\x01\x03\x01", Opening::Other),
            (b"\x15\x03\x01", Opening::Other),
            (b"GET\t/", Opening::Other),
            (b"\0", Opening::Other),
        ] {
            assert_eq!(Opening::of(bytes), expected, "{}", bytes.escape_ascii());
        }
    }
}
