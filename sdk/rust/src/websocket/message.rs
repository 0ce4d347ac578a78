//! What goes over a WebSocket, and why something does not.

use crate::protocol::message::{MAX_BODY, MAX_CLOSE_REASON, SOCKET_MESSAGE_COST};

/// A whole message, of at most 1 MiB.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Message {
    /// Text, as a string of the browser.
    Text(String),
    /// Bytes, as a `Blob` or an `ArrayBuffer` of the browser.
    Binary(Vec<u8>),
}

impl Message {
    /// The text of a text message.
    #[must_use]
    pub fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            Self::Binary(_) => None,
        }
    }

    /// The bytes of the message, whether it is text or not.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Text(text) => text.as_bytes(),
            Self::Binary(bytes) => bytes,
        }
    }

    /// Checks that the message fits a frame.
    pub(super) fn check(&self) -> Result<(), SendError> {
        match self.as_bytes().len() {
            length if length > MAX_BODY => Err(SendError::TooLarge(length)),
            _ => Ok(()),
        }
    }

    /// The credit that the message takes, in bytes.
    pub(super) fn cost(&self) -> u64 {
        // Lengths fit 64 bits.
        SOCKET_MESSAGE_COST + self.as_bytes().len() as u64
    }
}

impl From<&str> for Message {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Message {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<&[u8]> for Message {
    fn from(bytes: &[u8]) -> Self {
        Self::Binary(bytes.to_vec())
    }
}

impl<const N: usize> From<&[u8; N]> for Message {
    fn from(bytes: &[u8; N]) -> Self {
        Self::Binary(bytes.to_vec())
    }
}

impl From<Vec<u8>> for Message {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Binary(bytes)
    }
}

/// How a socket ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Close {
    /// The code (RFC 6455, section 7.4); none if the client gave none. 1006 says that the client went away without closing, or that
    /// the connection to the host ended.
    pub code: Option<u16>,
    /// The reason that the client or the host gave, often empty.
    pub reason: String,
}

impl Close {
    /// The end of a socket about whose client nothing is known any more.
    pub(super) fn lost() -> Self {
        /// The code of RFC 6455, section 7.4.1, that no close frame carries.
        const ABNORMAL: u16 = 1006;
        Self { code: Some(ABNORMAL), reason: String::new() }
    }
}

/// Why a message is not sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The client or the plugin has closed the socket. A handler that fails with this is not logged: the close handler is called.
    #[error("the socket is closed")]
    Closed,
    /// It has more bytes than a message may have.
    #[error("the message of {0} bytes is over the limit of {MAX_BODY}")]
    TooLarge(usize),
    /// The credit is used up, and the host gives more only once the open handler has returned.
    #[error("the socket is not accepted yet, and the credit for messages is used up until then")]
    NotAccepted,
}

/// Why a socket cannot be closed in this way: a mistake of the plugin.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CloseError {
    /// No code that may be sent.
    #[error("the code {0} cannot be sent: it must be 1000-1003, 1007-1014 or 3000-4999")]
    Code(u16),
    /// The reason has too many bytes.
    #[error("the reason of {0} bytes is over the limit of {MAX_CLOSE_REASON}")]
    Reason(usize),
}
