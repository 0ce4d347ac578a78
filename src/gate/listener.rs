//! The sockets on which clients connect.

use crate::system::unix_socket::{self, BACKLOG};
use anyhow::{Result, anyhow};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrAny, SocketAddrUnix, SocketFlags, acceptfrom_with, bind, listen, sockopt};
use rustls::ServerConfig;
use socket2::{SockFilter, SockRef};
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What kind of client a connection has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PeerKind {
    /// Any client.
    Public,
    /// A trusted reverse proxy, whose headers name the client.
    Proxy,
}

/// A socket that listens.
pub(crate) struct Listener {
    socket: OwnedFd,
    pub(super) peer: PeerKind,
    pub(super) tls: Option<Arc<ServerConfig>>,
}

impl Listener {
    /// A TCP port, with TLS or without.
    ///
    /// # Errors
    /// One sentence: why the host cannot listen there, and the way out.
    pub(crate) fn tcp(address: SocketAddr, tls: Option<Arc<ServerConfig>>) -> Result<Self> {
        let socket = Self::listen_on(address).map_err(|error| refused(address, error))?;
        Ok(Self { socket, peer: PeerKind::Public, tls })
    }

    fn listen_on(address: SocketAddr) -> io::Result<OwnedFd> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = unix_socket::stream_socket(family)?;
        // What an earlier host has left on its way need not be waited for.
        sockopt::set_socket_reuseaddr(&socket, true)?;
        // Connections inherit it: answers are sent when they are written.
        sockopt::set_tcp_nodelay(&socket, true)?;
        bind(&socket, &address)?;
        listen(&socket, BACKLOG)?;
        Ok(socket)
    }

    /// A Unix socket for a reverse proxy, with a mode.
    ///
    /// # Errors
    /// Why the host cannot listen there, and the way out.
    pub(crate) fn unix(path: &Path, mode: u32) -> Result<Self> {
        Ok(Self { socket: unix_socket::listen(path, mode)?, peer: PeerKind::Proxy, tls: None })
    }

    /// The address, for TCP.
    pub(crate) fn address(&self) -> Option<SocketAddr> {
        SocketAddr::try_from(rustix::net::getsockname(&self.socket).ok()?).ok()
    }

    /// The address, if it is one of this machine alone.
    pub(crate) fn loopback(&self) -> Option<IpAddr> {
        self.address().map(|address| address.ip().to_canonical()).filter(IpAddr::is_loopback)
    }

    /// Stops new connections, and still accepts those that are being established. Closing the socket at once would reset those.
    pub(super) fn stop(&self) {
        // If this fails, new connections are refused a little sooner.
        match rustix::net::getsockname(&self.socket).map(SocketAddrUnix::try_from) {
            Ok(Ok(address)) => {
                let path = address.path().map(|path| PathBuf::from(OsStr::from_bytes(path.to_bytes())));
                // A proxy that finds no socket says so at once.
                path.and_then(|path| fs::remove_file(path).ok())
            }
            _ => SockRef::from(&self.socket).attach_filter(&no_more_connections()).ok(),
        };
    }

    /// Accepts the next waiting connection, with its address if it has one.
    pub(super) fn accept(&self) -> Result<Option<(OwnedFd, Option<IpAddr>)>, Errno> {
        loop {
            return match acceptfrom_with(&self.socket, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Ok((socket, address)) => Ok(Some((socket, address.and_then(ip)))),
                Err(Errno::AGAIN) => Ok(None),
                // The connection ended before it was accepted, or had another error of its own, see accept(2).
                Err(Errno::CONNABORTED | Errno::INTR | Errno::PROTO | Errno::PERM) => continue,
                Err(error) => Err(error),
            };
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A socket filter (bpf(4) of BSD) that drops the segments that open a connection: those with SYN and without ACK. The client repeats them
/// after a second.
fn no_more_connections() -> [SockFilter; 5] {
    /// Offset of the flags in the header of a segment (RFC 9293, section 3.1).
    const FLAGS: u32 = 13;
    const SYN: u32 = 0x02;
    const ACK: u32 = 0x10;
    // Operations, as the kernel's linux/filter.h makes them up.
    const LOAD_BYTE: u16 = 0x30;
    const AND: u16 = 0x54;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    [
        SockFilter::new(LOAD_BYTE, 0, 0, FLAGS),
        SockFilter::new(AND, 0, 0, SYN | ACK),
        SockFilter::new(JUMP_IF_EQUAL, 0, 1, SYN),
        SockFilter::new(RETURN, 0, 0, 0),
        SockFilter::new(RETURN, 0, 0, u32::MAX),
    ]
}

/// Why the host cannot listen on a TCP address, and the way out.
fn refused(address: SocketAddr, error: io::Error) -> anyhow::Error {
    let port = address.port();
    let why = match Errno::from_io_error(&error) {
        Some(Errno::ADDRINUSE) => {
            format!("another program listens there: end it (ss -ltnp sport = :{port} names it), or choose another --listen")
        }
        Some(Errno::ADDRNOTAVAIL) => "this machine does not have that address: choose another --listen".to_owned(),
        Some(Errno::ACCESS) => format!(
            "only root may listen on port {port}: choose another --listen, or allow it with setcap cap_net_bind_service=+ep and the program's file"
        ),
        Some(Errno::AFNOSUPPORT) => "this machine has no IPv6: choose an IPv4 address for --listen".to_owned(),
        _ => return anyhow::Error::from(error).context(format!("cannot listen on {address} (choose another with --listen)")),
    };
    anyhow!("cannot listen on {address}: {why}")
}

fn ip(address: SocketAddrAny) -> Option<IpAddr> {
    Some(SocketAddr::try_from(address).ok()?.ip().to_canonical())
}
