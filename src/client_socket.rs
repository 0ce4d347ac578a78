//! The socket of a client of tiny_http's, which tiny_http does not give out: found among this process's own files by the client's
//! address, so that a connection can be ended where the HTTP library has no way to.
//!
//! Looking through all files is slow, and done only for requests that go wrong. Where the system forbids it (a container whose
//! seccomp profile has no `pidfd_getfd`) the caller goes on without.

use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown, sockopt};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use std::fs;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

/// The socket of a connection, beside tiny_http's own use of it.
pub(crate) struct ClientSocket {
    socket: OwnedFd,
}

impl ClientSocket {
    /// Finds the connection from a client's address.
    pub(crate) fn find(client: SocketAddr) -> io::Result<Self> {
        let this_process = pidfd_open(getpid(), PidfdFlags::empty())?;
        for entry in fs::read_dir("/proc/self/fd")? {
            let Some(number) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let socket = match pidfd_getfd(&this_process, number, PidfdGetfdFlags::empty()) {
                Ok(socket) => socket,
                // Closed since the directory was read.
                Err(Errno::BADF) => continue,
                Err(error) => return Err(error.into()),
            };
            let peer = rustix::net::getpeername(&socket).ok().flatten().and_then(|peer| SocketAddr::try_from(peer).ok());
            if peer == Some(client) {
                return Ok(Self { socket });
            }
        }
        Err(io::ErrorKind::NotFound.into())
    }

    /// Tells the client that nothing more is sent, and makes every further read end within a time.
    pub(crate) fn end_sending(&self, read_time: Duration) -> io::Result<()> {
        sockopt::set_socket_timeout(&self.socket, sockopt::Timeout::Recv, Some(read_time))?;
        Ok(rustix::net::shutdown(&self.socket, Shutdown::Write)?)
    }

    /// Ends the connection, after what was sent: what has come can still be read, and nothing comes any more.
    pub(crate) fn end(&self) -> io::Result<()> {
        Ok(rustix::net::shutdown(&self.socket, Shutdown::Both)?)
    }
}

impl Write for ClientSocket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::net::send(&self.socket, bytes, SendFlags::NOSIGNAL)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
