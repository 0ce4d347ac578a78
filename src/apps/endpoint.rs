//! Where a plugin listens.

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// The prefix of a Unix socket's path in text.
const UNIX: &str = "unix:";

/// Time to connect by TCP: an application is on this machine or near it.
const CONNECT_TIME: Duration = Duration::from_secs(5);

/// The address on which a plugin listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Endpoint {
    /// A Unix socket.
    Unix(PathBuf),
    /// An address and port of TCP.
    Tcp(SocketAddr),
}

impl Endpoint {
    /// Connects. If the plugin has a `uid` of its own, the listener must have it too: the path may be a link to another plugin's socket, and
    /// the port another program's. Fails at once if nobody listens on this machine.
    pub(crate) fn connect(&self, uid: Option<u32>) -> io::Result<OwnedFd> {
        match self {
            Self::Unix(path) => {
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
                rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
                if uid.is_some_and(|uid| !getsockopt(&socket, PeerCredentials).is_ok_and(|peer| peer.uid() == uid)) {
                    return Err(io::Error::other("another user listens on its socket"));
                }
                Ok(socket)
            }
            Self::Tcp(address) => {
                if let Some(uid) = uid {
                    check_owner(*address, uid)?;
                }
                let socket = TcpStream::connect_timeout(address, CONNECT_TIME)?;
                socket.set_nodelay(true)?;
                Ok(socket.into())
            }
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{UNIX}{}", path.display()),
            Self::Tcp(address) => address.fmt(f),
        }
    }
}

impl FromStr for Endpoint {
    type Err = ();

    /// Reads `unix:/PATH` or `ADDRESS:PORT`.
    fn from_str(text: &str) -> Result<Self, ()> {
        if let Some(path) = text.strip_prefix(UNIX) {
            return if path.starts_with('/') { Ok(Self::Unix(path.into())) } else { Err(()) };
        }
        let address: SocketAddr = text.parse().map_err(drop)?;
        if address.port() == 0 { Err(()) } else { Ok(Self::Tcp(address)) }
    }
}

/// Checks that the listener at a local address belongs to a user.
fn check_owner(address: SocketAddr, uid: u32) -> io::Result<()> {
    let entries = procfs::net::tcp().into_iter().chain(procfs::net::tcp6()).flatten();
    let is_listener = |entry: &procfs::net::TcpNetEntry| {
        let local = entry.local_address;
        entry.state == procfs::net::TcpState::Listen
            && local.port() == address.port()
            && (local.ip() == address.ip() || local.ip().is_unspecified())
    };
    let mut owners = entries.filter(is_listener).map(|entry| entry.uid).peekable();
    if owners.peek().is_some() && owners.all(|owner| owner == uid) {
        return Ok(());
    }
    Err(io::Error::other(format!("no process of the plugin's user listens on {address}")))
}
