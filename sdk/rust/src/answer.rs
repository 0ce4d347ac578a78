//! A response on its way: cut into frames, each as large as it may be or as soon as it is there.

use super::connection::End;
use super::log;
use super::request::Request;
use super::response::{Body, Response};
use crate::protocol::message::{self, MAX_BODY};
use std::io::{self, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// How much is read at a time of a body that streams.
const PIECE: usize = 64 * 1024;

/// Sends the response to a request.
pub(super) fn answer(mut request: Request<'_>, mut response: Response) -> Result<(), End> {
    if let Body::Bytes(bytes) = &response.body
        && bytes.len() > MAX_BODY
        && !response.has_header("content-length")
    {
        // The host cannot tell the length from the first of several frames.
        let length = bytes.len().to_string();
        response = response.header("content-length", length);
    }
    let Response { status, headers, body } = response;
    let mut head = message::Response { id: request.id(), status, headers, more: false };
    match body {
        Body::Bytes(bytes) => {
            let (first, rest) = bytes.split_at(bytes.len().min(MAX_BODY));
            head.more = !rest.is_empty();
            if request.begin(&head, first)? {
                send_bytes(&mut request, rest)?;
            }
            Ok(())
        }
        // The client of a HEAD wants no body, and a stream may have no end. Two frames tell the host that its length is not known.
        Body::Stream(_) | Body::Events(_) if request.method() == "HEAD" => {
            head.more = true;
            if request.begin(&head, &[])? { request.go_on(&[], false) } else { Ok(()) }
        }
        Body::Stream(reader) => send_stream(request, head, reader),
        Body::Events(pieces) => send_events(request, head, pieces),
    }
}

/// What comes behind the first frame of a large body.
fn send_bytes(request: &mut Request<'_>, bytes: &[u8]) -> Result<(), End> {
    let mut pieces = bytes.chunks(MAX_BODY).peekable();
    while let Some(piece) = pieces.next() {
        request.go_on(piece, pieces.peek().is_some())?;
    }
    Ok(())
}

fn send_stream(mut request: Request<'_>, mut head: message::Response, mut reader: impl Read) -> Result<(), End> {
    let mut piece = vec![0; PIECE];
    let mut length = match caught(|| read(&mut reader, &mut piece)) {
        Ok(length) => length,
        Err(error) => {
            log(format_args!("{} {}: {error}", request.method(), request.path()));
            return answer(request, Response::internal_error());
        }
    };
    head.more = length > 0;
    if !request.begin(&head, &piece[..length])? {
        return Ok(());
    }
    while length > 0 {
        request.check()?;
        length = match caught(|| read(&mut reader, &mut piece)) {
            Ok(length) => length,
            Err(error) => return request.give_up(&error.to_string()),
        };
        request.go_on(&piece[..length], length > 0)?;
    }
    Ok(())
}

/// What the author's code gives for a stream. A panic, whose message its hook has written, is an error like any other.
fn caught<T>(produce: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    catch_unwind(AssertUnwindSafe(produce)).unwrap_or_else(|_| Err(io::Error::other("the plugin panicked")))
}

fn read(reader: &mut impl Read, piece: &mut [u8]) -> io::Result<usize> {
    loop {
        match reader.read(piece) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            read => return read,
        }
    }
}

fn send_events(
    mut request: Request<'_>,
    mut head: message::Response,
    mut pieces: impl Iterator<Item = Vec<u8>>,
) -> Result<(), End> {
    head.more = true;
    if !request.begin(&head, &[])? {
        return Ok(());
    }
    loop {
        request.check()?;
        if request.stopping() {
            break;
        }
        let event = match caught(|| Ok(pieces.next())) {
            Ok(Some(event)) => event,
            Ok(None) => break,
            Err(error) => return request.give_up(&error.to_string()),
        };
        for piece in event.chunks(MAX_BODY) {
            request.go_on(piece, true)?;
        }
    }
    request.go_on(&[], false)
}
