//! Number of bytes that a client has not read yet, by the kernel's socket diagnostics (sock_diag(7), which `ss` uses).
//!
//! The send buffer alone does not tell a slow reader from one that has stopped: the kernel reports room only when a third of a TCP buffer
//! is free, or three quarters of a Unix socket's. On the loopback device even acknowledgements come in steps of up to 64 KiB. The receive
//! queue of a client on the same machine is exact, so it counts as well if the kernel shows it.

use rustix::fd::OwnedFd;
use rustix::fs::fstat;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrAny, SocketFlags, SocketType, getpeername, getsockname, netlink, recv, send,
    socket_with,
};
use std::net::{IpAddr, SocketAddr};

/// Largest reply in bytes: a header, a message and a few attributes.
const REPLY: usize = 1024;

/// Replies read before a query is given up: one of an earlier, failed query may be left.
const MAX_REPLIES: usize = 4;

// From the kernel's headers linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h and linux/unix_diag.h.
const NLMSG_HEADER: usize = 16;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const IPPROTO_TCP: u8 = 6;
/// Sockets in any state.
const ALL_STATES: u32 = u32::MAX;
/// Any cookie: the query names its socket otherwise.
const NO_COOKIE: [u32; 2] = [u32::MAX; 2];
const UDIAG_SHOW_PEER: u32 = 0x04;
const UDIAG_SHOW_RQLEN: u32 = 0x10;
const UNIX_DIAG_PEER: u16 = 2;
const UNIX_DIAG_RQLEN: u16 = 4;
/// Offset of `idiag_rqueue` in `inet_diag_msg`; `idiag_wqueue` follows.
const INET_QUEUES: usize = 56;
/// Offset of the attributes after `unix_diag_msg`.
const UNIX_ATTRIBUTES: usize = 16;

/// A netlink socket for socket diagnostics.
pub(super) struct SockDiag {
    netlink: Option<OwnedFd>,
    sequence: u32,
}

/// Bytes in the queues of a socket.
#[derive(Debug, Clone, Copy)]
struct Queues {
    /// Received and not read.
    receive: u32,
    /// Sent and not acknowledged, or unsent. For a Unix socket, the memory that they occupy.
    send: u32,
}

impl SockDiag {
    /// Opens the netlink socket. If that fails, all queries return `None`.
    pub(super) fn open() -> Self {
        let netlink = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, SocketFlags::CLOEXEC, Some(netlink::SOCK_DIAG)).ok();
        Self { netlink, sequence: 0 }
    }

    /// Bytes that were written to a connected TCP or Unix socket and that its peer has not read, as far as the kernel shows them:
    /// the receive queue of a peer on another machine, or in another network namespace, is not seen. `None` where the kernel tells
    /// nothing, as in a sandbox that forbids netlink sockets.
    pub(super) fn unread(&mut self, socket: &OwnedFd) -> Option<u64> {
        let own = getsockname(socket).ok()?;
        match own.address_family() {
            AddressFamily::UNIX => self.unread_unix(socket),
            AddressFamily::INET | AddressFamily::INET6 => self.unread_tcp(own, getpeername(socket).ok()??),
            _ => None,
        }
    }

    fn unread_tcp(&mut self, own: SocketAddrAny, peer: SocketAddrAny) -> Option<u64> {
        let (own, peer) = (canonical(own)?, canonical(peer)?);
        let unacknowledged = self.inet(own, peer)?.send;
        let unread = self.inet(peer, own).map_or(0, |queues| queues.receive);
        Some(u64::from(unacknowledged) + u64::from(unread))
    }

    fn unread_unix(&mut self, socket: &OwnedFd) -> Option<u64> {
        let (queues, peer) = self.unix(u32::try_from(fstat(socket).ok()?.st_ino).ok()?)?;
        let received = peer.and_then(|peer| self.unix(peer));
        Some(received.map_or(queues.send, |(peer, _)| peer.receive).into())
    }

    /// The queues of the TCP socket that is bound to one address and connected to the other.
    fn inet(&mut self, own: SocketAddr, peer: SocketAddr) -> Option<Queues> {
        let family = if own.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let mut request = vec![u8::try_from(family.as_raw()).ok()?, IPPROTO_TCP, 0, 0];
        request.extend(ALL_STATES.to_ne_bytes());
        request.extend([own, peer].iter().flat_map(|address| address.port().to_be_bytes()));
        for address in [own, peer] {
            let mut octets = [0; 16];
            match address.ip() {
                IpAddr::V4(address) => octets[..4].copy_from_slice(&address.octets()),
                IpAddr::V6(address) => octets = address.octets(),
            }
            request.extend(octets);
        }
        // A link-local address is one of an interface.
        let interface = if let SocketAddr::V6(own) = own { own.scope_id() } else { 0 };
        request.extend([interface, NO_COOKIE[0], NO_COOKIE[1]].iter().flat_map(|word| word.to_ne_bytes()));
        let reply = self.ask(&request)?;
        Some(Queues { receive: word(&reply, INET_QUEUES)?, send: word(&reply, INET_QUEUES + 4)? })
    }

    /// The queues of the Unix socket with this inode, and the inode of its peer.
    fn unix(&mut self, inode: u32) -> Option<(Queues, Option<u32>)> {
        let mut request = vec![u8::try_from(AddressFamily::UNIX.as_raw()).ok()?, 0, 0, 0];
        let words = [ALL_STATES, inode, UDIAG_SHOW_PEER | UDIAG_SHOW_RQLEN, NO_COOKIE[0], NO_COOKIE[1]];
        request.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
        let reply = self.ask(&request)?;
        let (mut queues, mut peer) = (None, None);
        let mut rest = reply.get(UNIX_ATTRIBUTES..)?;
        while let (Some(length), Some(kind)) = (half(rest, 0), half(rest, 2)) {
            let attribute = rest.get(4..length.into())?;
            match kind {
                UNIX_DIAG_PEER => peer = word(attribute, 0),
                UNIX_DIAG_RQLEN => queues = Some(Queues { receive: word(attribute, 0)?, send: word(attribute, 4)? }),
                _ => {}
            }
            rest = rest.get(usize::from(length).next_multiple_of(4)..).unwrap_or_default();
        }
        Some((queues?, peer))
    }

    /// Queries one socket. Returns what follows the header of the reply. The kernel replies before `send` returns, so this does not wait.
    fn ask(&mut self, request: &[u8]) -> Option<Vec<u8>> {
        self.sequence = self.sequence.wrapping_add(1);
        let netlink = self.netlink.as_ref()?;
        let mut message = Vec::with_capacity(NLMSG_HEADER + request.len());
        message.extend(u32::try_from(NLMSG_HEADER + request.len()).ok()?.to_ne_bytes());
        message.extend([SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST].iter().flat_map(|half| half.to_ne_bytes()));
        message.extend([self.sequence, 0].iter().flat_map(|word| word.to_ne_bytes()));
        message.extend(request);
        send(netlink, &message, SendFlags::DONTWAIT).ok()?;
        let mut reply = [0; REPLY];
        for _ in 0..MAX_REPLIES {
            let (_, came) = recv(netlink, &mut reply[..], RecvFlags::DONTWAIT).ok()?;
            if word(&reply, 8)? == self.sequence {
                // Any other kind is an error, such as that there is no such socket.
                let is_answer = half(&reply, 4)? == SOCK_DIAG_BY_FAMILY;
                let length = usize::try_from(word(&reply, 0)?).ok()?.min(came);
                return if is_answer { reply.get(NLMSG_HEADER..length).map(<[u8]>::to_vec) } else { None };
            }
        }
        None
    }
}

/// An address as the kernel stores it: IPv4 for an IPv4 address of an IPv6 socket.
fn canonical(address: SocketAddrAny) -> Option<SocketAddr> {
    let address = SocketAddr::try_from(address).ok()?;
    match address.ip().to_canonical() {
        ip @ IpAddr::V4(_) => Some(SocketAddr::new(ip, address.port())),
        IpAddr::V6(_) => Some(address),
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;

    /// Writes to one end, reads some of it at the other, and checks what is told in between.
    fn assert_counts(sender: impl Write + Into<OwnedFd>, mut reader: impl Read) {
        let mut sender = sender;
        sender.write_all(&[7; 10_000]).unwrap();
        let mut taken = [0; 3_000];
        reader.read_exact(&mut taken).unwrap();
        let socket = sender.into();
        let mut kernel = SockDiag::open();
        assert_eq!(kernel.unread(&socket), Some(7_000));
        reader.read_exact(&mut taken[..1]).unwrap();
        assert_eq!(kernel.unread(&socket), Some(6_999));
    }

    #[test]
    fn the_unread_bytes_of_a_peer_on_this_machine_are_exact() {
        let (sender, reader) = UnixStream::pair().unwrap();
        assert_counts(sender, reader);
        for listen in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(listen) else { continue };
            let reader = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            assert_counts(listener.accept().unwrap().0, reader);
        }
    }

    #[test]
    fn a_client_of_ipv4_at_a_socket_of_ipv6_is_found() {
        let Ok(listener) = TcpListener::bind("[::]:0") else { return };
        let reader = TcpStream::connect(("127.0.0.1", listener.local_addr().unwrap().port())).unwrap();
        assert_counts(listener.accept().unwrap().0, reader);
    }

    #[test]
    fn of_a_socket_that_is_not_connected_nothing_is_told() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(SockDiag::open().unread(&listener.into()), None);
    }
}
