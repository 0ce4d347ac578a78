//! The answer to a web request.

use super::Error;
use crate::protocol::message::Headers;
use serde::Serialize;
use std::borrow::Cow;
use std::io::Read;

/// The answer to a web request: status, headers and body. A body that is larger than a frame, or a stream, goes in several.
///
/// The host answers 502 for one that breaks HTTP's rules, such as a body with status 204, and the plugin's log has the reason.
#[derive(Debug)]
pub struct Response {
    pub(super) status: u16,
    pub(super) headers: Headers<'static>,
    pub(super) body: Body,
}

/// Where a response's body comes from.
pub(super) enum Body {
    Bytes(Cow<'static, [u8]>),
    Stream(Box<dyn Read + Send>),
    Events(Box<dyn Iterator<Item = Vec<u8>> + Send>),
}

impl Response {
    /// A response of this status, 200–599, with no headers and no body.
    #[must_use]
    pub fn new(status: u16) -> Self {
        Self { status, headers: Headers::new(), body: Body::Bytes(Cow::Borrowed(&[])) }
    }

    /// Plain text, status 200.
    #[must_use]
    pub fn text(text: impl Into<Cow<'static, str>>) -> Self {
        Self::bytes("text/plain; charset=utf-8", into_bytes(text.into()))
    }

    /// A page, status 200.
    #[must_use]
    pub fn html(page: impl Into<Cow<'static, str>>) -> Self {
        Self::bytes("text/html; charset=utf-8", into_bytes(page.into()))
    }

    /// A value as JSON, status 200.
    ///
    /// # Errors
    /// When the value has no form in JSON, such as a map whose keys are not text.
    pub fn json(value: &impl Serialize) -> Result<Self, serde_json::Error> {
        Ok(Self::bytes("application/json", serde_json::to_vec(value)?))
    }

    /// Bytes of any type, status 200.
    #[must_use]
    pub fn bytes(content_type: &str, bytes: impl Into<Cow<'static, [u8]>>) -> Self {
        Self::of(content_type, Body::Bytes(bytes.into()))
    }

    /// What the reader gives, such as a file, sent as it is read; status 200. A failing first read is answered with status 500. After a
    /// later one the client's response is cut short, and the connection serves the next request.
    ///
    /// A read that waits should do so with [`Cancellation::cancelled_within`](super::Cancellation::cancelled_within), and end when
    /// that returns true.
    #[must_use]
    pub fn stream(content_type: &str, reader: impl Read + Send + 'static) -> Self {
        Self::of(content_type, Body::Stream(Box::new(reader)))
    }

    /// Server-sent events, status 200. Each piece is sent as it is produced and should be one event, or several: `data: hello\n\n`.
    ///
    /// The host cuts a stream that sends nothing for 60 s; a comment, `:\n\n`, keeps it alive. The iterator is dropped between two
    /// pieces once the client has gone or the plugin is to stop. An iterator that waits for its next event should do so with
    /// [`Cancellation::cancelled_within`](super::Cancellation::cancelled_within):
    ///
    /// ```no_run
    /// # use plugrack_sdk::{Plugin, Response};
    /// # use std::time::Duration;
    /// # let plugin = Plugin::new("a", "A", "1", "a", "/a");
    /// plugin.serve(|request| {
    ///     let cancellation = request.cancellation();
    ///     let tick = move || (!cancellation.cancelled_within(Duration::from_secs(10))).then(|| b"data: tick\n\n".to_vec());
    ///     Response::events(std::iter::from_fn(tick))
    /// });
    /// ```
    #[must_use]
    pub fn events<I>(pieces: I) -> Self
    where
        I: IntoIterator<Item = Vec<u8>, IntoIter: Send + 'static>,
    {
        Self::of("text/event-stream", Body::Events(Box::new(pieces.into_iter()))).header("cache-control", "no-cache")
    }

    /// The same with another status, 200–599.
    #[must_use]
    pub fn status(mut self, status: u16) -> Self {
        self.status = status;
        self
    }

    /// The same with one more header. One of the same name that is there stays, as `set-cookie` needs it.
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.push((name.into().into(), value.into().into()));
        self
    }

    pub(super) fn internal_error() -> Self {
        Self::text("internal error").status(500)
    }

    pub(super) fn has_header(&self, name: &str) -> bool {
        self.headers.iter().any(|(each, _)| each.eq_ignore_ascii_case(name))
    }

    fn of(content_type: &str, body: Body) -> Self {
        Self { status: 200, headers: vec![("content-type".into(), content_type.to_owned().into())], body }
    }
}

fn into_bytes(text: Cow<'static, str>) -> Cow<'static, [u8]> {
    match text {
        Cow::Borrowed(text) => Cow::Borrowed(text.as_bytes()),
        Cow::Owned(text) => Cow::Owned(text.into_bytes()),
    }
}

impl std::fmt::Debug for Body {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Bytes(bytes) => write!(f, "{} bytes", bytes.len()),
            Self::Stream(_) => f.write_str("a stream"),
            Self::Events(_) => f.write_str("events"),
        }
    }
}

/// What a handler may return.
///
/// Text is `text/plain; charset=utf-8`, bytes are `application/octet-stream`, both of status 200; a pair gives another status.
/// An `Err` is answered with status 500, and its message goes to the plugin's log.
pub trait IntoResponse {
    /// The response, or why there is none.
    ///
    /// # Errors
    /// When the handler failed.
    fn into_response(self) -> Result<Response, Error>;
}

impl IntoResponse for Response {
    fn into_response(self) -> Result<Response, Error> {
        Ok(self)
    }
}

impl IntoResponse for &'static str {
    fn into_response(self) -> Result<Response, Error> {
        Ok(Response::text(self))
    }
}

impl IntoResponse for String {
    fn into_response(self) -> Result<Response, Error> {
        Ok(Response::text(self))
    }
}

impl IntoResponse for Vec<u8> {
    fn into_response(self) -> Result<Response, Error> {
        Ok(Response::bytes("application/octet-stream", self))
    }
}

impl<T: IntoResponse> IntoResponse for (u16, T) {
    fn into_response(self) -> Result<Response, Error> {
        let (status, content) = self;
        Ok(content.into_response()?.status(status))
    }
}

impl<T: IntoResponse, E: Into<Error>> IntoResponse for Result<T, E> {
    fn into_response(self) -> Result<Response, Error> {
        self.map_err(Into::into)?.into_response()
    }
}
