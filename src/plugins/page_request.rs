//! A request of the host's own for a page of a plugin. It takes the way of any request, by the plugin's queue and a worker.

use super::job::Job;
use super::plugin::Plugin;
use crate::http::direct_writer::DirectWriter;
use crate::http::framing::Terms;
use crate::http::request::{BodyLength, Method, Origin, RequestBody, RequestId};
use crate::http::responder::Responder;
use crate::http::response_channel::{Address, Next, Pieces, ResponsePart, Responses, response_channel};
use crate::http::{InFlight, Request, WaitingRequest};
use crate::util::threads::timespec;
use rustix::event::{PollFd, PollFlags, poll};
use std::io;
use std::sync::Arc;
use std::time::Instant;

/// Most bytes of a page that are read.
pub(crate) const MAX_PAGE: usize = 256 * 1024;

/// Most header lines of a response: the 256 that an application may send, and those of the host.
const MAX_HEADERS: usize = 272;

/// The address of the only request in its channel.
const ADDRESS: Address = Address { connection: 0, request: 0 };

/// The response is the last of its connection and HTTP/1.0, so that its body is not chunked.
const TERMS: Terms = Terms { head: false, old: true, last: true };

/// What is asked for.
pub(crate) struct PageRequest<'a> {
    /// Path and query.
    pub(crate) target: &'a str,
    /// The value of `host`.
    pub(crate) host: &'a str,
    pub(crate) https: bool,
    /// Bytes of the path that are the plugin's route.
    pub(crate) mount: usize,
    /// Its id, in the application's log and in the plugin's.
    pub(crate) id: RequestId,
}

/// A plugin's response.
pub(crate) struct Page {
    pub(crate) status: u16,
    /// The headers, with their names in lower case.
    headers: Vec<(String, String)>,
    /// The beginning of the body: [`MAX_PAGE`] bytes at most.
    pub(crate) body: Vec<u8>,
}

impl Page {
    /// The first header of a name in lower case.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(each, _)| each == name).map(|(_, value)| value.as_str())
    }

    /// Reads the head of a response. Returns the rest of the bytes too.
    fn parse(bytes: &[u8]) -> io::Result<(Self, &[u8])> {
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut response = httparse::Response::new(&mut headers);
        let end = match response.parse(bytes) {
            Ok(httparse::Status::Complete(end)) => end,
            Ok(httparse::Status::Partial) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
        };
        let pair = |header: &httparse::Header<'_>| {
            (header.name.to_ascii_lowercase(), String::from_utf8_lossy(header.value).into_owned())
        };
        let headers = response.headers.iter().map(pair).collect();
        Ok((Self { status: response.code.unwrap_or_default(), headers, body: Vec::new() }, &bytes[end..]))
    }
}

/// Requests a page, and reads its body if the head has one that is `wanted`. A request that is not over at the `deadline`, or has more
/// body, is cancelled, as if its client had gone.
///
/// # Errors
/// `TimedOut` at the deadline. Others if the response broke off, or has too many headers.
pub(crate) fn get(
    plugin: &Plugin,
    asked: PageRequest<'_>,
    deadline: Instant,
    wanted: impl Fn(&Page) -> bool,
) -> io::Result<Page> {
    let (channel, responses) = response_channel()?;
    let now = Instant::now();
    let in_flight = InFlight::new(DirectWriter::new(None, TERMS, false), now);
    let PageRequest { target, host, https, mount, id } = asked;
    let agent = concat!("plugrack/", env!("CARGO_PKG_VERSION"));
    let head = format!(
        "GET {target} HTTP/1.1\r\nhost: {host}\r\naccept: text/html\r\naccept-encoding: identity\r\nuser-agent: {agent}\r\n"
    );
    let request = Request {
        head: head.into_bytes(),
        mount,
        method: Method::Get,
        origin: Origin { address: None, https, proxied: false },
        id,
        upgrade: false,
        length: BodyLength::Known(0),
        declares_body: false,
        body: RequestBody::Whole(None),
        responder: Responder::new(Arc::clone(&in_flight), Arc::new(channel), ADDRESS),
        arrived: now,
        alone: false,
        loss: None,
    };
    let _cancel = CancelAtEnd(in_flight);
    if let Some(waiting) = WaitingRequest::new(request)
        && let Err((job, error)) = plugin.submit(Job::Http(waiting))
    {
        job.fail(error);
    }
    let mut response = Response { responses, deadline, is_whole: false, pieces: None };
    let first = response.next()?.unwrap_or_default();
    let (mut page, body) = Page::parse(&first)?;
    if !wanted(&page) {
        return Ok(page);
    }
    page.body = body.to_vec();
    while page.body.len() < MAX_PAGE
        && let Some(piece) = response.next()?
    {
        page.body.extend_from_slice(&piece);
    }
    page.body.truncate(MAX_PAGE);
    Ok(page)
}

/// Cancels a request when it is dropped, unless the request is over.
struct CancelAtEnd(Arc<InFlight>);

impl Drop for CancelAtEnd {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// A response as it comes from a worker.
struct Response {
    responses: Responses,
    deadline: Instant,
    /// Whether the first part was all of it.
    is_whole: bool,
    pieces: Option<Pieces>,
}

impl Response {
    /// The next bytes, of which the first have the whole head; none at the end.
    fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        if self.is_whole {
            return Ok(None);
        }
        loop {
            match self.pieces.as_ref().map_or(Next::Nothing, Pieces::next) {
                Next::Piece(piece) => return Ok(Some(piece)),
                Next::End => return Ok(None),
                Next::Broken => return Err(io::ErrorKind::UnexpectedEof.into()),
                Next::Nothing => {}
            }
            match self.responses.take() {
                Some((_, ResponsePart::Begun { bytes, rest, .. })) => {
                    (self.is_whole, self.pieces) = (rest.is_none(), rest);
                    return Ok(Some(bytes));
                }
                Some((_, ResponsePart::More)) => self.pieces.iter().for_each(Pieces::hear),
                // Interim responses. No other part comes without a client's socket and without a body.
                Some(_) => {}
                None => self.wait()?,
            }
        }
    }

    /// Waits for a part.
    fn wait(&self) -> io::Result<()> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let waker = &**self.responses.waker();
        waker.go_to_sleep();
        if self.responses.is_empty() {
            poll(&mut [PollFd::new(waker, PollFlags::IN)], Some(&timespec(left))).ok();
        }
        waker.wake_up();
        // Resets the counter; nothing is to be read if the deadline is over.
        rustix::io::read(waker, &mut [0; 8]).ok();
        Ok(())
    }
}
