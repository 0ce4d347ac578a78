//! Where a plugin listens.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

/// The prefix of a Unix socket's path in text.
const UNIX: &str = "unix:";

/// The address on which a plugin listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Endpoint {
    /// A Unix socket.
    Unix(PathBuf),
    /// An address and port of TCP.
    Tcp(SocketAddr),
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
