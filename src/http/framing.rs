//! The head of an answer and the framing of its body on the wire (RFC 9112). Pure.

use super::date;
use super::prefix::Mount;
use crate::protocol::message::{HOP_BY_HOP, Response};
use std::borrow::Cow;
use std::io::Write;

/// Status of an answer that has no body and no length (RFC 9110, section 8.6).
const NO_CONTENT: u16 = 204;

/// Initial capacity for the head of an answer; few are longer.
const HEAD_SIZE: usize = 512;

/// Headers that only the host may send.
const RESERVED: &str = "x-plugrack";

/// The media type of server-sent events.
const EVENTS: &[u8] = b"text/event-stream";

/// What the request says about the framing of its answer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Terms {
    /// The method was `HEAD`.
    pub(crate) head: bool,
    /// The client speaks HTTP/1.0.
    pub(crate) old: bool,
    /// The connection ends after the answer.
    pub(crate) last: bool,
}

/// How an answer is framed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Framed {
    /// Whether the body is chunked.
    pub(crate) chunked: bool,
    /// Whether no body is sent: the method was `HEAD`, or the status has none.
    pub(crate) bodiless: bool,
    /// The connection ends after the answer.
    pub(crate) last: bool,
}

/// The status line, in a new buffer for a head.
pub(crate) fn status_line(status: u16) -> Vec<u8> {
    let mut head = Vec::with_capacity(HEAD_SIZE);
    let reason = ::http::StatusCode::from_u16(status).ok().and_then(|status| status.canonical_reason()).unwrap_or("Unknown");
    put(&mut head, format_args!("HTTP/1.1 {status} {reason}\r\n"));
    head
}

/// The status line, these headers and a `date`: the head of an answer of the host's own, without the framing.
pub(crate) fn host_head<'a>(status: u16, headers: impl IntoIterator<Item = (&'a str, &'a str)>) -> Vec<u8> {
    let mut head = status_line(status);
    headers.into_iter().for_each(|(name, value)| put_header(&mut head, name, value));
    date::put_line(&mut head);
    head
}

/// The head of a response on its way to a client.
#[derive(Debug)]
pub(crate) struct ResponseHead {
    pub(crate) status: u16,
    /// The status line and the header lines, without those of the framing.
    pub(crate) lines: Vec<u8>,
    /// The declared length of the body.
    pub(crate) length: Option<u64>,
}

impl ResponseHead {
    /// The head of a checked answer of the plugin protocol. Leaves out hop-by-hop headers and those that `connection` names, and adds a
    /// missing `date`. Maps references to a `mount`.
    pub(crate) fn of(response: &Response<'_>, mount: Option<Mount<'_>>) -> Self {
        let mut head = status_line(response.status);
        let (mut length, mut has_date) = (None, false);
        let options = response.headers.iter().filter(|(name, _)| name.eq_ignore_ascii_case("connection"));
        let options: Vec<&str> = options.flat_map(|(_, value)| value.split(',')).map(str::trim).collect();
        for (name, value) in &response.headers {
            let is = |other: &str| name.eq_ignore_ascii_case(other);
            if is("content-length") {
                length = value.parse().ok();
            } else if !HOP_BY_HOP.into_iter().any(is) && !is_reserved(name) && !options.iter().any(|option| is(option)) {
                has_date |= is("date");
                match mount.map(|mount| mount.map(name, value.as_bytes())) {
                    Some(Cow::Owned(mapped)) => put_header(&mut head, name, &String::from_utf8_lossy(&mapped)),
                    _ => put_header(&mut head, name, value),
                }
            }
        }
        if !has_date {
            date::put_line(&mut head);
        }
        Self { status: response.status, lines: head, length }
    }
}

/// Whether a `content-type` is that of server-sent events.
pub(crate) fn is_event_stream(content_type: &[u8]) -> bool {
    content_type.get(..EVENTS.len()).is_some_and(|kind| kind.eq_ignore_ascii_case(EVENTS))
}

/// Whether a header is one that only the host may send.
pub(crate) fn is_reserved(name: &str) -> bool {
    name.get(..RESERVED.len()).is_some_and(|beginning| beginning.eq_ignore_ascii_case(RESERVED))
}

/// Appends a header line, its name in lower case. Each character of a value is one byte (see `Response::check`).
pub(crate) fn put_header(head: &mut Vec<u8>, name: &str, value: &str) {
    let start = head.len();
    head.extend_from_slice(name.as_bytes());
    head[start..].make_ascii_lowercase();
    head.extend_from_slice(b": ");
    let value = value.trim_matches([' ', '\t']);
    if value.is_ascii() {
        head.extend_from_slice(value.as_bytes());
    } else {
        head.extend(value.chars().map(|c| u8::try_from(u32::from(c)).unwrap_or(b'?')));
    }
    head.extend_from_slice(b"\r\n");
}

/// Whether an answer of this status to a request of this kind has a body (RFC 9112, section 6.3).
fn has_body(status: u16, terms: Terms) -> bool {
    !terms.head && !matches!(status, 100..=199 | NO_CONTENT | 304)
}

/// Ends the head with the headers that frame a body of `length` bytes, if that is known, and an empty line.
pub(crate) fn frame(head: &mut Vec<u8>, status: u16, length: Option<u64>, terms: Terms) -> Framed {
    let has_body = has_body(status, terms);
    let mut framed = Framed { chunked: false, bodiless: !has_body, last: terms.last };
    if status == NO_CONTENT {
        // It has no `content-length`, not even 0.
    } else if let Some(length) = length {
        put(head, format_args!("content-length: {length}\r\n"));
    } else if has_body && !terms.old {
        framed.chunked = true;
        head.extend_from_slice(b"transfer-encoding: chunked\r\n");
    } else if has_body {
        // HTTP/1.0 has no chunks: the end of the connection is the end of the body.
        framed.last = true;
    }
    if framed.last {
        head.extend_from_slice(b"connection: close\r\n");
    } else if terms.old {
        head.extend_from_slice(b"connection: keep-alive\r\n");
    }
    head.extend_from_slice(b"\r\n");
    framed
}

/// Appends the line before a chunk of this many bytes.
pub(crate) fn put_chunk_size(out: &mut Vec<u8>, bytes: usize) {
    put(out, format_args!("{bytes:x}\r\n"));
}

/// The bytes that follow a chunk, or the last chunk.
pub(crate) fn after_piece(framed: Framed, is_empty: bool, last: bool) -> &'static [u8] {
    match (framed.chunked, is_empty, last) {
        (true, false, false) => b"\r\n",
        (true, false, true) => b"\r\n0\r\n\r\n",
        (true, true, true) => b"0\r\n\r\n",
        _ => b"",
    }
}

fn put(out: &mut Vec<u8>, text: std::fmt::Arguments<'_>) {
    // Writing to memory does not fail.
    out.write_fmt(text).ok();
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERMS: Terms = Terms { head: false, old: false, last: false };

    fn framed(status: u16, length: Option<u64>, terms: Terms) -> (String, Framed) {
        let mut head = Vec::new();
        let framed = frame(&mut head, status, length, terms);
        (String::from_utf8(head).unwrap(), framed)
    }

    #[test]
    fn a_body_ends_by_one_length_by_chunks_or_by_the_connection() {
        for (status, length, terms, lines, chunked, last) in [
            (200, Some(5), TERMS, "content-length: 5\r\n\r\n", false, false),
            (200, None, TERMS, "transfer-encoding: chunked\r\n\r\n", true, false),
            (200, None, Terms { old: true, ..TERMS }, "connection: close\r\n\r\n", false, true),
            (200, Some(0), Terms { old: true, ..TERMS }, "content-length: 0\r\nconnection: keep-alive\r\n\r\n", false, false),
            (200, Some(7), Terms { head: true, ..TERMS }, "content-length: 7\r\n\r\n", false, false),
            (200, None, Terms { head: true, ..TERMS }, "\r\n", false, false),
            (204, Some(0), TERMS, "\r\n", false, false),
            (304, Some(9), TERMS, "content-length: 9\r\n\r\n", false, false),
            (404, None, Terms { last: true, ..TERMS }, "transfer-encoding: chunked\r\nconnection: close\r\n\r\n", true, true),
        ] {
            let (text, framed) = framed(status, length, terms);
            assert_eq!((text.as_str(), framed.chunked, framed.last), (lines, chunked, last), "{status} {length:?} {terms:?}");
        }
        let bodiless = |status, terms| framed(status, Some(1), terms).1.bodiless;
        assert!(bodiless(204, TERMS) && bodiless(304, TERMS) && bodiless(200, Terms { head: true, ..TERMS }));
        assert!(!bodiless(200, TERMS) && !bodiless(404, TERMS));
    }

    #[test]
    fn the_head_has_what_is_for_the_client_alone() {
        let headers = [
            ("Content-Type", " text/plain\t"),
            ("Connection", "x-hop, close"),
            ("X-Hop", "1"),
            ("Keep-Alive", "timeout=5"),
            ("Transfer-Encoding", "chunked"),
            ("X-Plugrack-Anything", "1"),
            ("Content-Length", "5"),
            ("Set-Cookie", "a"),
            ("set-cookie", "\u{e9}"),
        ];
        let headers = headers.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
        let response = Response { id: 1, status: 200, headers, more: false };
        let ResponseHead { lines: head, length, .. } = ResponseHead::of(&response, None);
        assert_eq!(length, Some(5));
        let text: String = head.iter().map(|&byte| char::from(byte)).collect();
        let (text, date) = text.rsplit_once("date: ").unwrap();
        assert_eq!(text, "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\nset-cookie: a\r\nset-cookie: \u{e9}\r\n");
        assert!(date.ends_with(" GMT\r\n"));
        let dated = Response { headers: vec![("Date".into(), "now".into())], ..response };
        assert_eq!(ResponseHead::of(&dated, None).lines, b"HTTP/1.1 200 OK\r\ndate: now\r\n");
    }
}
