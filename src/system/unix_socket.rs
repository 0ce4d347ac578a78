//! Unix sockets to listen on.

use crate::system::data_dir::MAX_SOCKET_PATH;
use anyhow::{Context, Result, anyhow, bail};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, socket_with};
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Connections that may wait to be accepted: more than the event loop takes at once, since the kernel lets those beyond try again only
/// after a second. The kernel's own limit (`net.core.somaxconn`) is usually 4096.
pub(crate) const BACKLOG: i32 = 1024;

/// A socket that does not block.
pub(crate) fn stream_socket(family: AddressFamily) -> io::Result<OwnedFd> {
    Ok(socket_with(family, SocketType::STREAM, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, None)?)
}

/// Listens at a path, with a mode, by a socket that does not block. A socket that a host before this has left is replaced; one where
/// somebody listens, or that cannot be told, is not.
///
/// # Errors
/// What is in the way, or why the host cannot listen there.
pub(crate) fn listen(path: &Path, mode: u32) -> Result<OwnedFd> {
    let shown = path.display();
    let cannot = || format!("cannot listen on {shown}");
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            bail!("{shown} is there already and is no socket: remove it, or choose another path")
        }
        Ok(_) => match UnixStream::connect(path) {
            Ok(_) => bail!("another program listens on {shown}: stop that program, or choose another path"),
            // Only this shows that nobody listens.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                fs::remove_file(path).with_context(|| format!("cannot replace {shown}"))?;
            }
            Err(error) => bail!(
                "{shown} is there already, and whether another program listens on it cannot be told ({error}): remove it, or choose another path"
            ),
        },
        Err(_) => {}
    }
    let socket = stream_socket(AddressFamily::UNIX)?;
    let address = SocketAddrUnix::new(path).map_err(|_| {
        let length = path.as_os_str().len();
        anyhow!("{}: its path has {length} bytes, and a socket's path at most {MAX_SOCKET_PATH}: choose a shorter one", cannot())
    })?;
    bind(&socket, &address).map_err(|errno| match (errno, path.parent()) {
        (Errno::NOENT, Some(directory)) => anyhow!("{}: make the directory {} first", cannot(), directory.display()),
        _ => anyhow::Error::from(io::Error::from(errno)).context(cannot()),
    })?;
    // Nobody can connect before it listens, so the mode is set in time.
    fs::set_permissions(path, Permissions::from_mode(mode)).with_context(cannot)?;
    rustix::net::listen(&socket, BACKLOG).with_context(cannot)?;
    Ok(socket)
}
