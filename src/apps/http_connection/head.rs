//! The heads of requests to an application and of its responses.

use super::Fault;
use crate::http::framing::{is_event_stream, is_reserved, put_header};
use crate::http::prefix::Mount;
use crate::http::request::{header_in, split_head, split_target};
use crate::http::{Request, date};
use crate::protocol::message::HOP_BY_HOP;
use memchr::memmem;
use std::borrow::Cow;
use std::io::Write;

/// What the header lines of a response say about its framing.
pub(in crate::apps) struct Fields {
    pub(in crate::apps) length: Option<u64>,
    pub(in crate::apps) is_chunked: bool,
    /// `connection: close`, or `keep-alive` of HTTP/1.0.
    pub(super) close: bool,
    pub(super) keep_alive: bool,
    pub(in crate::apps) is_events: bool,
    /// The protocol to which the application switches.
    pub(super) upgrade: Option<Vec<u8>>,
}

impl Fields {
    /// Reads and checks them.
    ///
    /// # Errors
    /// What can be read in two ways, or not at all.
    pub(in crate::apps) fn read(headers: &[httparse::Header<'_>]) -> Result<Self, Fault> {
        let mut fields =
            Self { length: None, is_chunked: false, close: false, keep_alive: false, is_events: false, upgrade: None };
        for header in headers {
            let is = |name: &str| header.name.eq_ignore_ascii_case(name);
            let value = header.value.trim_ascii();
            if is("content-length") {
                let is_number = (1..=19).contains(&value.len()) && value.iter().all(u8::is_ascii_digit);
                let length = std::str::from_utf8(value).ok().filter(|_| is_number).and_then(|value| value.parse().ok());
                let length =
                    length.ok_or_else(|| format!("its content-length {:?} is no number", String::from_utf8_lossy(value)))?;
                if fields.length.is_some_and(|other| other != length) {
                    return Err("its response has two values of content-length".into());
                }
                fields.length = Some(length);
            } else if is("transfer-encoding") {
                if fields.is_chunked || !value.eq_ignore_ascii_case(b"chunked") {
                    let value = String::from_utf8_lossy(value);
                    return Err(format!("its transfer-encoding {value:?} is not \"chunked\", the only one that the host reads"));
                }
                fields.is_chunked = true;
            } else if is("connection") {
                for option in value.split(|&byte| byte == b',').map(<[u8]>::trim_ascii) {
                    fields.close |= option.eq_ignore_ascii_case(b"close");
                    fields.keep_alive |= option.eq_ignore_ascii_case(b"keep-alive");
                }
            } else if is("upgrade") {
                fields.upgrade = Some(value.to_vec());
            } else if is("content-type") {
                fields.is_events |= is_event_stream(value);
            }
        }
        Ok(fields)
    }
}

/// The status line and header lines for the client: without hop-by-hop headers and those of the framing, and `dated` if need be.
pub(in crate::apps) fn response_lines(
    status: u16,
    reason: Option<&str>,
    headers: &[httparse::Header<'_>],
    mount: Option<Mount<'_>>,
    dated: bool,
) -> Vec<u8> {
    let mut lines = Vec::with_capacity(512);
    let reason = reason.filter(|reason| reason.is_ascii()).unwrap_or_default();
    // Writing to memory does not fail.
    write!(lines, "HTTP/1.1 {status} {reason}\r\n").ok();
    let options = headers.iter().filter(|header| header.name.eq_ignore_ascii_case("connection"));
    let options: Vec<&[u8]> =
        options.flat_map(|header| header.value.split(|&byte| byte == b',')).map(<[u8]>::trim_ascii).collect();
    let mut has_date = false;
    for header in headers {
        let is = |other: &str| header.name.eq_ignore_ascii_case(other);
        let is_ours = is("content-length") || HOP_BY_HOP.into_iter().any(is) || is_reserved(header.name);
        if is_ours || options.iter().any(|option| option.eq_ignore_ascii_case(header.name.as_bytes())) {
            continue;
        }
        has_date |= is("date");
        let value = mount.map_or(Cow::Borrowed(header.value), |mount| mount.map(header.name, header.value));
        let start = lines.len();
        lines.extend_from_slice(header.name.as_bytes());
        lines[start..].make_ascii_lowercase();
        lines.extend_from_slice(b": ");
        lines.extend_from_slice(value.trim_ascii());
        lines.extend_from_slice(b"\r\n");
    }
    if dated && !has_date {
        date::put_line(&mut lines);
    }
    lines
}

/// Writes the head of a request for an application: the client's own, and what only the host knows. The body has this `length`, or is
/// `chunked`.
pub(super) fn write_head(request: &Request, length: Option<u64>, chunked: bool, keeps_route: bool, out: &mut Vec<u8>) {
    let (method, target, lines) = split_head(&request.head);
    let (path, _) = split_target(target);
    let mount = path.get(..request.mount).unwrap_or_default();
    let target = if keeps_route { target } else { &target[mount.len()..] };
    out.reserve(request.head.len() + 512);
    out.extend_from_slice(method.as_bytes());
    out.push(b' ');
    if !target.starts_with('/') && target != "*" {
        // The bare route.
        out.push(b'/');
    }
    out.extend_from_slice(target.as_bytes());
    out.extend_from_slice(b" HTTP/1.1\r\n");
    put_lines_without_id(lines, out);
    if request.upgrade {
        put_header(out, "connection", "upgrade");
    }
    let mut line = |name: &str, value: &str| put_header(out, name, value);
    match length {
        Some(length) => line("content-length", &length.to_string()),
        None if chunked => line("transfer-encoding", "chunked"),
        None => {}
    }
    if let Some(address) = request.origin.address {
        line("x-forwarded-for", &address.to_string());
    }
    line("x-forwarded-proto", if request.origin.https { "https" } else { "http" });
    if header_in(&request.head, "x-forwarded-host").is_none()
        && let Some(host) = request.header("host").filter(|host| !host.is_empty())
    {
        line("x-forwarded-host", host);
    }
    if !mount.is_empty() {
        line("x-forwarded-prefix", mount);
    }
    line("x-request-id", &request.id());
    out.extend_from_slice(b"\r\n");
}

/// Appends header lines, but for the request's id, which the host adds.
fn put_lines_without_id(lines: &[u8], out: &mut Vec<u8>) {
    const NAME: &[u8] = b"x-request-id: ";
    let at = if lines.starts_with(NAME) { Some(0) } else { memmem::find(lines, b"\nx-request-id: ").map(|at| at + 1) };
    let Some(at) = at else { return out.extend_from_slice(lines) };
    let end = memchr::memchr(b'\n', &lines[at..]).map_or(lines.len(), |end| at + end + 1);
    out.extend_from_slice(&lines[..at]);
    out.extend_from_slice(&lines[end..]);
}

/// Whether a head is complete.
pub(in crate::apps) fn is_whole_head(input: &[u8]) -> bool {
    memmem::find(input, b"\n\r\n").is_some() || memmem::find(input, b"\n\n").is_some()
}

/// Whether input may be the beginning of a response: it begins with `HTTP/1.`.
pub(super) fn could_be_response(input: &[u8]) -> bool {
    const BEGINNING: &[u8] = b"HTTP/1.";
    let n = input.len().min(BEGINNING.len());
    input[..n] == BEGINNING[..n]
}

/// Whether a head is that of an interim response, but for 101, after which no response follows.
pub(super) fn begins_interim(input: &[u8]) -> bool {
    input.get(8..12).is_some_and(|status| status.starts_with(b" 1") && status != b" 101")
}

/// Whether a head is that of a successful response or a redirection.
pub(super) fn begins_well(input: &[u8]) -> bool {
    input.get(8..10).is_some_and(|status| matches!(status, b" 2" | b" 3"))
}
