//! A web request.

use super::cancel::Cancellation;
use super::connection::{Connection, End};
use super::context::Context;
use super::kv::Kv;
use super::log;
use crate::protocol::message::{Data, Failure, Http, Message, Response};
use std::io::{self, Read};
use std::sync::Arc;
use std::time::Duration;

/// A web request for the plugin's route. Its body is what it [`Read`]s, or [`Request::read_body`] as a whole.
///
/// The body is read before answering: what a handler has left of it when it returns is dropped.
pub struct Request<'a> {
    head: Http<'a>,
    connection: &'a mut Connection,
    context: &'a Context,
    /// How much of the connection's present body has been read.
    at: usize,
    rest: Rest,
}

/// What is to come of a body, behind the piece that is here.
#[derive(Debug)]
enum Rest {
    More,
    Nothing,
    /// The host has ended it before its time.
    Aborted,
    /// The connection is over.
    Lost(End),
}

/// Why a body could not be read as a whole.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// It has more bytes than the limit. A handler that fails with this is answered with status 413.
    #[error("the body is over {0} bytes")]
    TooLarge(usize),
    /// It ended before its time.
    #[error("the body was cut short")]
    Io(#[from] io::Error),
}

impl<'a> Request<'a> {
    /// A request whose head the connection has just received.
    pub(super) fn new(head: Http<'a>, connection: &'a mut Connection, context: &'a Context) -> Self {
        let rest = if head.more { Rest::More } else { Rest::Nothing };
        Self { head, connection, context, at: 0, rest }
    }

    /// The method as the client sent it, such as `GET`.
    #[must_use]
    pub fn method(&self) -> &str {
        &self.head.method
    }

    /// What follows the mount, not decoded. It begins with `/`, which is the mount itself.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.head.path
    }

    /// What follows the first `?`, not decoded.
    #[must_use]
    pub fn query(&self) -> Option<&str> {
        self.head.query.as_deref()
    }

    /// The plugin's route: what links to its own pages begin with. Empty for a request by host name.
    #[must_use]
    pub fn mount(&self) -> &str {
        &self.head.mount
    }

    /// The client's address, empty where it is not known.
    #[must_use]
    pub fn remote(&self) -> &str {
        &self.head.remote
    }

    /// The first header of this name, in any case.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers().find_map(|(each, value)| each.eq_ignore_ascii_case(name).then_some(value))
    }

    /// The headers in order, repeats kept, names in lower case.
    pub fn headers(&self) -> impl Iterator<Item = (&str, &str)> {
        self.head.headers.iter().map(|(name, value)| (&**name, &**value))
    }

    /// What the host has told the plugin.
    #[must_use]
    pub fn context(&self) -> &Context {
        self.context
    }

    /// The plugin's key-value store.
    #[must_use]
    pub fn kv(&self) -> &Kv {
        self.context.kv()
    }

    /// Whether the plugin is to stop; see [`Context::is_stopping`].
    #[must_use]
    pub fn stopping(&self) -> bool {
        self.context.is_stopping()
    }

    /// Whether nobody waits for the answer any more, or the plugin is to stop: long work should end then. See [`Cancellation`].
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.cancellation().is_cancelled()
    }

    /// Waits until the request is cancelled, at most for `time`, and returns whether it is. Use it in place of a sleep.
    #[must_use]
    pub fn cancelled_within(&self, time: Duration) -> bool {
        self.cancellation().cancelled_within(time)
    }

    /// The same for a response that streams, whose reader or iterator outlives the handler.
    #[must_use]
    pub fn cancellation(&self) -> Cancellation {
        Cancellation::new(Arc::clone(self.connection.ended()), self.context.clone())
    }

    /// The body, or what is left of it, of at most `limit` bytes.
    ///
    /// # Errors
    /// When it has more bytes than that, or is cut short.
    pub fn read_body(&mut self, limit: usize) -> Result<Vec<u8>, BodyError> {
        let mut body = Vec::new();
        while self.fetch()? {
            let piece = &self.connection.body()[self.at..];
            if piece.len() > limit - body.len() {
                return Err(BodyError::TooLarge(limit));
            }
            if body.is_empty() && self.at == 0 {
                body = self.connection.take_body();
            } else {
                body.extend_from_slice(piece);
                self.at += piece.len();
            }
        }
        Ok(body)
    }

    /// Makes sure that there are bytes to read, and tells whether there are: at the end of the body there are none.
    fn fetch(&mut self) -> io::Result<bool> {
        let cut = io::Error::new::<&str>;
        loop {
            match self.rest {
                Rest::Aborted => return Err(cut(io::ErrorKind::ConnectionAborted, "the host has ended the body early")),
                Rest::Lost(_) => return Err(cut(io::ErrorKind::UnexpectedEof, "the connection ended in the body")),
                Rest::More | Rest::Nothing if self.at < self.connection.body().len() => return Ok(true),
                Rest::Nothing => return Ok(false),
                Rest::More => self.advance(),
            }
        }
    }

    /// Goes on to the next piece of the body.
    fn advance(&mut self) {
        self.at = 0;
        self.rest = match self.connection.receive(&mut Vec::new()) {
            Ok(Message::Data(data)) if data.id == self.head.id => match data {
                data if data.aborted => Rest::Aborted,
                data if data.more => Rest::More,
                _ => Rest::Nothing,
            },
            Ok(message) => {
                let due = format!("data with id {} was due", self.head.id);
                Rest::Lost(End::Fault(format!("{} came where {due}", message.named())))
            }
            Err(end) => Rest::Lost(end),
        };
    }

    /// Sends the beginning of the response, and then drops what is left of the body: the host takes no more of the response before
    /// it has sent that. Tells whether the beginning went as it is.
    pub(super) fn begin(&mut self, head: &Response<'_>, first: &[u8]) -> Result<bool, End> {
        let refused = self.connection.reply(self.head.id, head, first)?;
        if let Some(error) = &refused {
            log(format_args!("{} {}: {error}", self.head.method, self.head.path));
        }
        if matches!(self.rest, Rest::More) {
            self.connection.flush()?;
        }
        loop {
            match std::mem::replace(&mut self.rest, Rest::Nothing) {
                Rest::More => self.advance(),
                Rest::Lost(end) => return Err(end),
                Rest::Nothing | Rest::Aborted => return Ok(refused.is_none()),
            }
        }
    }

    /// Sends more of the response, or its end.
    pub(super) fn go_on(&mut self, piece: &[u8], more: bool) -> Result<(), End> {
        self.connection.send(&Data { id: self.head.id, more, aborted: false }, piece)
    }

    /// Gives the response up, of which some has been sent: an `error` stands in the place of the rest.
    pub(super) fn give_up(&mut self, reason: &str) -> Result<(), End> {
        log(format_args!("{} {}: the response stops midway: {reason}", self.head.method, self.head.path));
        self.connection.send(&Failure::new(self.head.id, "internal", reason), &[])
    }

    /// Writes what has been sent, and takes in what has arrived: whether the host still wants the response, and the plugin.
    pub(super) fn check(&mut self) -> Result<(), End> {
        self.connection.flush()?;
        if self.connection.look()? {
            self.context.stop();
        }
        Ok(())
    }

    pub(super) fn id(&self) -> u64 {
        self.head.id
    }
}

/// Reads the body as it arrives. A body that is cut short is an error, never an early end.
impl Read for Request<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() || !self.fetch()? {
            return Ok(0);
        }
        let n = (&self.connection.body()[self.at..]).read(buffer)?;
        self.at += n;
        Ok(n)
    }
}

impl std::fmt::Debug for Request<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Request").field("head", &self.head).field("rest", &self.rest).finish_non_exhaustive()
    }
}
