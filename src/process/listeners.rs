//! The sockets on which the processes of a session listen, as `/proc` shows them.

use procfs::net::{TcpState, UnixState};
use procfs::process::{FDTarget, all_processes};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;

/// A socket on which a process listens.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Listening {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// The sockets on which the processes of a session listen, sorted.
pub(crate) fn of_session(session: i32) -> BTreeSet<Listening> {
    // Processes come and go meanwhile, and those of other users do not show their files.
    let processes = all_processes().into_iter().flatten().filter_map(Result::ok);
    let of_session = processes.filter(|process| process.stat().is_ok_and(|stat| stat.session == session));
    let files = of_session.filter_map(|process| process.fd().ok()).flatten().filter_map(Result::ok);
    let inodes: BTreeSet<u64> =
        files.filter_map(|file| if let FDTarget::Socket(inode) = file.target { Some(inode) } else { None }).collect();
    let tcp = procfs::net::tcp().into_iter().chain(procfs::net::tcp6()).flatten();
    let tcp = tcp.filter(|entry| entry.state == TcpState::Listen && inodes.contains(&entry.inode));
    // A socket that listens has no peer, and has been given a name; the kernel marks it by its flags (`__SO_ACCEPTCON`).
    let unix = procfs::net::unix().into_iter().flatten();
    let unix = unix.filter(|entry| entry.state == UnixState::UNCONNECTED && inodes.contains(&entry.inode));
    let unix = unix.filter_map(|entry| entry.path.map(Listening::Unix));
    tcp.map(|entry| Listening::Tcp(entry.local_address)).chain(unix).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::os::unix::net::UnixListener;

    #[test]
    fn the_sockets_of_this_session_are_found() {
        // As `/proc` has it: 0 where the session was begun outside of this PID namespace, which `getsid` of rustix refuses.
        let session = procfs::process::Process::myself().unwrap().stat().unwrap().session;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let (tcp, _unix) = (TcpListener::bind("127.0.0.1:0").unwrap(), UnixListener::bind(&path).unwrap());
        let found = of_session(session);
        assert!(
            found.contains(&Listening::Tcp(tcp.local_addr().unwrap())) && found.contains(&Listening::Unix(path)),
            "{found:?}"
        );
    }
}
