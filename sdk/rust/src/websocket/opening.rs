//! What becomes of a socket that a client asks for: it is accepted or refused.

use super::socket::Socket;
use crate::Error;
use crate::protocol::message::MAX_REFUSAL;
use crate::response::{Body, Response};
use std::io::Read;
use std::ops::RangeInclusive;

/// Statuses of a response that refuses a socket.
const REFUSALS: RangeInclusive<u16> = 300..=599;

/// The decision about a socket that a client asks for.
#[derive(Debug)]
pub enum Opening {
    /// The client gets its socket.
    Accept(Acceptance),
    /// The client gets this response, whose status is 300–599, and no socket.
    Refuse(Response),
}

/// How a socket is accepted: the response to the client.
#[derive(Debug, Clone, Default)]
pub struct Acceptance {
    pub(super) protocol: Option<String>,
    pub(super) headers: Vec<(String, String)>,
}

impl Acceptance {
    /// One without a protocol and without headers.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Chooses a protocol, which has to be one of [`Socket::protocols`].
    #[must_use]
    pub fn protocol(mut self, protocol: impl Into<String>) -> Self {
        self.protocol = Some(protocol.into());
        self
    }

    /// Adds a header to the response, such as `set-cookie`. The host drops those of the handshake, `content-length` and hop-by-hop
    /// headers.
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }
}

impl From<Acceptance> for Opening {
    fn from(acceptance: Acceptance) -> Self {
        Self::Accept(acceptance)
    }
}

impl From<Response> for Opening {
    fn from(response: Response) -> Self {
        Self::Refuse(response)
    }
}

/// What an open handler may return.
///
/// `()` and an [`Acceptance`] accept the socket, a [`Response`] refuses it, an `Option<Response>` refuses it if there is one. After an
/// `Err` the client gets status 500, and its message goes to the plugin's log.
pub trait IntoOpening {
    /// The decision, or why there is none.
    ///
    /// # Errors
    /// When the handler failed.
    fn into_opening(self) -> Result<Opening, Error>;
}

impl IntoOpening for Opening {
    fn into_opening(self) -> Result<Opening, Error> {
        Ok(self)
    }
}

impl IntoOpening for () {
    fn into_opening(self) -> Result<Opening, Error> {
        Ok(Acceptance::new().into())
    }
}

impl IntoOpening for Acceptance {
    fn into_opening(self) -> Result<Opening, Error> {
        Ok(self.into())
    }
}

impl IntoOpening for Response {
    fn into_opening(self) -> Result<Opening, Error> {
        Ok(self.into())
    }
}

impl IntoOpening for Option<Response> {
    fn into_opening(self) -> Result<Opening, Error> {
        self.map_or_else(|| ().into_opening(), Response::into_opening)
    }
}

impl<T: IntoOpening, E: Into<Error>> IntoOpening for Result<T, E> {
    fn into_opening(self) -> Result<Opening, Error> {
        self.map_err(Into::into)?.into_opening()
    }
}

impl Opening {
    /// Checks the decision about a socket, and reads the body of a refusal, which has to be whole.
    pub(super) fn checked(self, socket: &Socket) -> Result<Self, Error> {
        match self {
            Self::Accept(Acceptance { protocol: Some(protocol), .. }) if !socket.protocols().any(|each| each == protocol) => {
                Err(format!("the open handler chooses the protocol {protocol:?}, which the client does not offer").into())
            }
            Self::Accept(acceptance) => Ok(Self::Accept(acceptance)),
            Self::Refuse(response) if !REFUSALS.contains(&response.status) => {
                let (least, most, status) = (REFUSALS.start(), REFUSALS.end(), response.status);
                Err(format!("a response that refuses a socket must have a status of {least}-{most}, got {status}").into())
            }
            Self::Refuse(Response { status, headers, body }) => {
                let body = match body {
                    Body::Bytes(bytes) => bytes,
                    Body::Stream(reader) => {
                        let mut bytes = Vec::new();
                        // One byte more tells a body that is too large.
                        reader.take(MAX_REFUSAL as u64 + 1).read_to_end(&mut bytes)?;
                        bytes.into()
                    }
                    Body::Events(_) => return Err("a response that refuses a socket cannot be a stream of events".into()),
                };
                if body.len() > MAX_REFUSAL {
                    return Err(
                        format!("the body of a response that refuses a socket is over the limit of {MAX_REFUSAL} bytes").into()
                    );
                }
                Ok(Self::Refuse(Response { status, headers, body: Body::Bytes(body) }))
            }
        }
    }
}
