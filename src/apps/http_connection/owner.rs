//! Whose the listener at a port is.

use std::io;
use std::net::SocketAddr;

/// Checks that the listener at a local address belongs to a user.
pub(super) fn check(address: SocketAddr, uid: u32) -> io::Result<()> {
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
