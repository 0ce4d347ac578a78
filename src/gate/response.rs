//! The head of an answer as it comes from the HTTP library behind the gate. Pure.
//!
//! A plugin has a word in what that library writes, so this is checked like what comes from outside: what a client would read in two
//! ways never leaves. What is for one hop is taken away, since the gate frames the body in words of its own. What is refused:
//! control characters, statuses that end no request, and any doubt about the length of the body.

use super::head::{MAX_HEADERS, is_value, number};
use memchr::{memchr, memchr_iter};

/// Most bytes of a head up to its end, the blank line included: more than a frame's head can hold of headers, so only garbage is
/// over it.
const MAX_HEAD: usize = 256 * 1024;

/// The headers of this hop, and those the gate writes itself.
const LEFT_OUT: [&str; 6] = ["connection", "keep-alive", "transfer-encoding", "content-length", "upgrade", "trailer"];

/// By this header the host tells the gate the length of a body that comes chunked on this hop.
const DECLARED_LENGTH: &str = "x-plugrack-length";

/// How the headers begin that host and gate have for each other.
const OURS: &str = "x-plugrack";

/// What the library calls itself where the answer names no server. Nobody need know.
const LIBRARY: &[u8] = b"tiny-http (Rust)";

/// What the gate must know of an answer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    /// From 200 to 599, or from 100 to 199 for one that only precedes the answer.
    pub(crate) status: u16,
    /// Bytes of the body, where that is said.
    pub(crate) length: Option<u64>,
    /// The body comes chunked.
    pub(crate) chunked: bool,
    /// The other side ends the connection after it.
    pub(crate) close: bool,
}

impl Answer {
    /// Whether a body follows (RFC 9112, section 6.3), where the request's method was `HEAD` or was not.
    pub(crate) fn has_body(&self, head_request: bool) -> bool {
        !head_request && !matches!(self.status, 100..=199 | 204 | 304)
    }
}

/// Why an answer must not leave.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Malformed(pub(crate) &'static str);

/// Reads one answer's head from the beginning of `input`, and appends to `out` what is passed on of it: status line and headers, each
/// with its line end, but no blank line. Also says how many bytes it took.
///
/// `None` when it is not complete; `searched` is how far `input` was searched before, as with a request. Of an answer that only
/// precedes another (1xx) nothing is passed on. `out` only changes when a head was read.
pub(crate) fn read(input: &[u8], searched: &mut usize, out: &mut Vec<u8>) -> Result<Option<(Answer, usize)>, Malformed> {
    let window = &input[..input.len().min(MAX_HEAD)];
    let from = (*searched).min(window.len());
    for at in memchr_iter(b'\n', &window[from..]).map(|at| from + at) {
        let before = &window[..at];
        if !before.ends_with(b"\r") {
            return Err(Malformed("a line of the head ends without a carriage return"));
        }
        if before.ends_with(b"\r\n\r") {
            return parse(&window[..=at], out).map(|answer| Some((answer, at + 1)));
        }
    }
    *searched = window.len();
    if input.len() < MAX_HEAD { Ok(None) } else { Err(Malformed("the head is too large")) }
}

/// Reads a head that is complete.
fn parse(head: &[u8], out: &mut Vec<u8>) -> Result<Answer, Malformed> {
    let line_end = memchr(b'\n', head).unwrap_or_default();
    let (status, reason) = status_line(&head[..line_end.saturating_sub(1)])?;
    let lines = &head[line_end + 1..];
    let mut fields = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let fields = match httparse::parse_headers(lines, &mut fields) {
        Ok(httparse::Status::Complete((length, fields))) if length == lines.len() => fields,
        Err(httparse::Error::TooManyHeaders) => return Err(Malformed("the head has too many headers")),
        Err(httparse::Error::HeaderName) => return Err(Malformed("the name of a header is not a plain word")),
        Ok(_) | Err(_) => return Err(Malformed("the value of a header holds a control character")),
    };
    let mut answer = Answer { status, length: None, chunked: false, close: false };
    for field in fields {
        let is = |name: &str| field.name.eq_ignore_ascii_case(name);
        if is("content-length") || is(DECLARED_LENGTH) {
            let length = number(field.value).ok_or(Malformed("the length is not a number of up to 19 digits"))?;
            if answer.length.replace(length).is_some() {
                return Err(Malformed("the head has more than one length"));
            }
        } else if is("transfer-encoding") {
            if answer.chunked || !field.value.eq_ignore_ascii_case(b"chunked") {
                return Err(Malformed("the transfer-encoding is not chunked"));
            }
            answer.chunked = true;
        } else if is("connection") {
            let mut options = field.value.split(|&byte| byte == b',').map(<[u8]>::trim_ascii);
            answer.close |= options.any(|option| option.eq_ignore_ascii_case(b"close"));
        }
    }
    if answer.chunked && fields.iter().any(|field| field.name.eq_ignore_ascii_case("content-length")) {
        return Err(Malformed("the head has both a transfer-encoding and a content-length"));
    }
    if status >= 200 {
        write(status, reason, fields, out);
    }
    Ok(answer)
}

/// Status and reason of a status line without its end.
fn status_line(line: &[u8]) -> Result<(u16, &[u8]), Malformed> {
    let rest = line.strip_prefix(b"HTTP/1.1 ").or_else(|| line.strip_prefix(b"HTTP/1.0 "));
    let rest = rest.ok_or(Malformed("the answer does not begin with HTTP/1.1"))?;
    let (digits, reason) = rest.split_at_checked(3).ok_or(Malformed("the status is not a number of three digits"))?;
    let status = number(digits).and_then(|status| u16::try_from(status).ok());
    let status = status.filter(|status| (100..600).contains(status)).ok_or(Malformed("the status is not within 100-599"))?;
    match reason {
        [] => Ok((status, reason)),
        [b' ', reason @ ..] if reason.iter().all(|&byte| is_value(byte)) => Ok((status, reason)),
        _ => Err(Malformed("the reason after the status is malformed")),
    }
}

/// Appends what is passed on.
fn write(status: u16, reason: &[u8], fields: &[httparse::Header<'_>], out: &mut Vec<u8>) {
    out.extend_from_slice(b"HTTP/1.1 ");
    out.extend([status / 100, status / 10 % 10, status % 10].map(|digit| u8::try_from(digit).unwrap_or_default() + b'0'));
    out.push(b' ');
    out.extend_from_slice(reason);
    out.extend_from_slice(b"\r\n");
    let passes = |field: &&httparse::Header<'_>| {
        let is = |name: &str| field.name.eq_ignore_ascii_case(name);
        let ours = field.name.get(..OURS.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(OURS));
        !(ours || LEFT_OUT.into_iter().any(is) || (is("server") && field.value == LIBRARY))
    };
    for field in fields.iter().filter(passes) {
        out.extend_from_slice(field.name.as_bytes());
        out.extend_from_slice(b": ");
        out.extend_from_slice(field.value);
        out.extend_from_slice(b"\r\n");
    }
}
