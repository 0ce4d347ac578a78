//! The head of a request: read strictly, written canonically. Pure.
//!
//! The HTTP library behind the gate believes what it is told, so nothing reaches it that two readers could understand in two
//! ways. What is written is one request line in origin-form, one `host`, and the headers that are meant for the end of the way;
//! how long the body is, the gate says itself, in words of its own. What is refused: line ends other than CRLF, folded lines, any
//! doubt about the length of the body, any doubt about the host, characters that do not belong where they stand, and whatever
//! is over a limit. Headers by which a proxy tells of the client are read, and never passed on: a client can write them too.
//!
//! That library takes ASCII only, and RFC 9110 (section 5.5) lets a value hold bytes from 0x80 up, called obs-text. Each of
//! these is written as [`OBS_TEXT`] and two lower-case hexadecimal digits, and [`obs_text`] undoes it. No client can send what
//! looks like it, since a control character in a value is refused.

use crate::protocol::message::HOP_BY_HOP;
use memchr::{memchr, memchr_iter};
use std::borrow::Cow;
use std::net::{IpAddr, SocketAddr};

/// Most headers that can be read: as many have their place on the stack. A higher [`Limits::headers`] counts as this.
pub(super) const MAX_HEADERS: usize = 256;

/// Longest method in bytes. The longest that is registered has 17 (`UPDATEREDIRECTREF`), so this has room for one's own.
const MAX_METHOD: usize = 32;

/// Most options in all `Connection` headers. Each is looked for among all headers, so many would cost time; clients send two or three.
const MAX_OPTIONS: usize = 32;

/// Most digits of a length: with 19 a number always fits 64 bits.
const MAX_LENGTH_DIGITS: usize = 19;

/// What stands before the number of a byte of obs-text: a control character, which no value that is accepted can hold.
const OBS_TEXT: u8 = 0x01;

/// How large a head may be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Bytes up to its end, the blank line and what stands before the request line included.
    pub(crate) bytes: usize,
    /// Headers, repeats counted.
    pub(crate) headers: usize,
}

/// Where the body of a request ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Framing {
    /// There is none.
    None,
    /// After so many bytes.
    Length(u64),
    /// It says so itself.
    Chunked,
}

/// What the gate must know of a request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Head {
    /// The method is `HEAD`, so that the answer has no body.
    pub(crate) head: bool,
    /// The client speaks HTTP/1.0.
    pub(crate) old: bool,
    /// The client would use the connection again.
    pub(crate) keep_alive: bool,
    /// The client waits for `100 Continue` before it sends the body.
    pub(crate) expects_continue: bool,
    /// Where the body ends.
    pub(crate) framing: Framing,
    /// Whom a proxy names as its client: the last element of the last `X-Forwarded-For`, if that is an address. Anyone can
    /// write this, so it means something from a trusted proxy alone.
    pub(crate) forwarded_for: Option<IpAddr>,
    /// Whether that client came by HTTPS: the last `X-Forwarded-Proto`. As little to be trusted.
    pub(crate) forwarded_https: Option<bool>,
}

/// Why a request is refused. Where the next one would begin is not known, so the connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// The status to answer with.
    pub(crate) status: u16,
    /// Its name for programs.
    pub(crate) code: &'static str,
    /// What is wrong, for people.
    pub(crate) message: &'static str,
}

/// A refusal of what is not HTTP, or not plainly so.
const fn bad(message: &'static str) -> Refusal {
    Refusal { status: 400, code: "bad_request", message }
}

const BAD_LINE: Refusal = bad("the request line is not a method, a target and a version with one space between them");
const BAD_TARGET: Refusal = bad("the target of the request is neither a path nor an http URL");
const BAD_HOST: Refusal = bad("the host holds characters that do not belong there");
const BARE_LF: Refusal = bad("a line of the head ends without a carriage return");
const VERSION: Refusal =
    Refusal { status: 505, code: "version_not_supported", message: "the version is neither HTTP/1.0 nor HTTP/1.1" };
const TOO_LARGE: Refusal = Refusal { status: 431, code: "head_too_large", message: "the head of the request is too large" };
const TOO_MANY: Refusal = Refusal { status: 431, code: "head_too_large", message: "the request has too many headers" };

/// Reads one request's head from the beginning of `input`, and appends its canonical form to `out`: request line and headers, each
/// with its line end, but no blank line after them, since the caller has headers to add. Also says how many bytes the head took.
///
/// `None` when it is not complete. `searched` is how far `input` was searched for its end before; the caller keeps it from call
/// to call, and begins each request with 0. What can be refused early is, such as another protocol's first bytes, so that
/// nobody waits for the end of what has none. `out` only changes when a head was read.
pub(crate) fn read(
    input: &[u8],
    limits: Limits,
    searched: &mut usize,
    out: &mut Vec<u8>,
) -> Result<Option<(Head, usize)>, Refusal> {
    let window = &input[..input.len().min(limits.bytes)];
    // RFC 9112, section 2.2: one empty line before the request is forgiven, as some old clients send one after a body.
    let start = if window.starts_with(b"\r\n") { 2 } else { 0 };
    if window != b"\r" {
        check_method(&window[start..])?;
    }
    let from = start.max(*searched).min(window.len());
    let mut line_known = memchr(b'\n', &window[start.min(from)..from]).is_some();
    let mut line = None;
    for at in memchr_iter(b'\n', &window[from..]).map(|at| from + at) {
        let before = &window[start..at];
        if !before.ends_with(b"\r") {
            return Err(BARE_LF);
        }
        if !line_known {
            line = Some(RequestLine::parse(&before[..before.len() - 1])?);
            line_known = true;
        } else if before.ends_with(b"\r\n\r") {
            let line_end = start + memchr(b'\n', before).unwrap_or_default();
            let line = line.map_or_else(|| RequestLine::parse(&window[start..line_end - 1]), Ok)?;
            return parse(&line, &window[line_end + 1..=at], limits, out).map(|head| Some((head, at + 1)));
        }
    }
    *searched = window.len();
    match (input.len() < limits.bytes, line_known) {
        (true, _) => Ok(None),
        (false, true) => Err(TOO_LARGE),
        (false, false) => Err(Refusal { status: 414, code: "uri_too_long", message: "the target of the request is too long" }),
    }
}

/// Checks the beginning of a request line as far as it is there: another protocol is known by its first bytes.
fn check_method(line: &[u8]) -> Result<(), Refusal> {
    match line.iter().take(MAX_METHOD + 1).position(|&byte| !is_token(byte)) {
        Some(length) if length > 0 && line[length] == b' ' => Ok(()),
        Some(_) => Err(bad("the request does not begin with a method")),
        None if line.len() <= MAX_METHOD => Ok(()),
        None => Err(Refusal { status: 501, code: "not_implemented", message: "the method is too long" }),
    }
}

/// The first line of a request.
#[derive(Debug, Clone, Copy)]
struct RequestLine<'a> {
    method: &'a [u8],
    /// The host of a target in absolute-form.
    authority: Option<&'a [u8]>,
    /// The target in origin-form, or `*`; without the `/` that an absolute-form may leave out.
    target: &'a [u8],
    /// HTTP/1.0.
    old: bool,
}

impl<'a> RequestLine<'a> {
    /// Reads the line without its end, whose beginning [`check_method`] has accepted.
    fn parse(line: &'a [u8]) -> Result<Self, Refusal> {
        let mut parts = line.split(|&byte| byte == b' ');
        let (Some(method), Some(target), Some(version), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
            return Err(BAD_LINE);
        };
        let old = match version.strip_prefix(b"HTTP/") {
            Some(b"1.1") => false,
            Some(b"1.0") => true,
            Some(other) if !other.is_empty() && other.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'.')) => {
                return Err(VERSION);
            }
            _ => return Err(BAD_LINE),
        };
        // Whoever reads the method behind the gate may not mind its case.
        if method.eq_ignore_ascii_case(b"CONNECT") || method.eq_ignore_ascii_case(b"TRACE") {
            let message = "the methods CONNECT and TRACE are not served here";
            return Err(Refusal { status: 405, code: "method_not_allowed", message });
        }
        if !target.iter().all(|byte| matches!(byte, 0x21..=0x7e) && *byte != b'#') {
            return Err(BAD_TARGET);
        }
        let (authority, target) = match target {
            [b'/', ..] => (None, target),
            b"*" if method == b"OPTIONS" => (None, target),
            _ => absolute(target).ok_or(BAD_TARGET)?,
        };
        if authority.is_some_and(|authority| authority.contains(&b'@')) {
            return Err(bad("the target of the request holds the name of a user"));
        }
        if authority.is_some_and(|authority| !is_host(authority)) {
            return Err(BAD_HOST);
        }
        Ok(Self { method, authority, target, old })
    }
}

/// Takes a target in absolute-form apart: its authority, and the rest.
fn absolute(target: &[u8]) -> Option<(Option<&[u8]>, &[u8])> {
    let scheme = ["http://", "https://"]
        .into_iter()
        .find(|scheme| target.get(..scheme.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(scheme.as_bytes())))?;
    let rest = &target[scheme.len()..];
    let end = rest.iter().position(|byte| matches!(byte, b'/' | b'?')).unwrap_or(rest.len());
    (end > 0).then(|| (Some(&rest[..end]), &rest[end..]))
}

/// Reads the headers, which end with the blank line, and writes the canonical head.
fn parse(line: &RequestLine<'_>, lines: &[u8], limits: Limits, out: &mut Vec<u8>) -> Result<Head, Refusal> {
    let mut fields = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let fields = match httparse::parse_headers(lines, &mut fields[..limits.headers.min(MAX_HEADERS)]) {
        Ok(httparse::Status::Complete((length, fields))) if length == lines.len() => fields,
        Err(httparse::Error::TooManyHeaders) => return Err(TOO_MANY),
        Err(httparse::Error::HeaderName) => return Err(bad("the name of a header is not a plain word before a colon")),
        Ok(_) | Err(_) => return Err(bad("the value of a header holds a control character")),
    };
    let known = Known::gather(fields)?;
    let host = match (line.authority, known.host) {
        (_, None) if !line.old => return Err(bad("the request has no host")),
        // RFC 9112, section 3.2.2: the target's own counts.
        (Some(authority), _) => authority,
        (None, host) => host.unwrap_or_default(),
    };
    let framing = known.framing(line.old)?;
    write(line, host, fields, &known, out);
    let has_body = !matches!(framing, Framing::None | Framing::Length(0));
    Ok(Head {
        head: line.method == b"HEAD",
        old: line.old,
        keep_alive: !known.has_option("close") && (!line.old || known.has_option("keep-alive")),
        expects_continue: known.expects_continue && has_body && !line.old,
        framing,
        forwarded_for: known.forwarded_for.and_then(address),
        forwarded_https: known.forwarded_proto.and_then(|scheme| match last(scheme) {
            scheme if scheme.eq_ignore_ascii_case(b"https") => Some(true),
            scheme if scheme.eq_ignore_ascii_case(b"http") => Some(false),
            _ => None,
        }),
    })
}

/// The headers that mean something to the gate.
struct Known<'a> {
    host: Option<&'a [u8]>,
    length: Option<&'a [u8]>,
    coding: Option<&'a [u8]>,
    expects_continue: bool,
    /// What the `Connection` headers name: the first so many of `options`.
    named: usize,
    options: [&'a [u8]; MAX_OPTIONS],
    forwarded_for: Option<&'a [u8]>,
    forwarded_proto: Option<&'a [u8]>,
}

impl<'a> Known<'a> {
    fn gather(fields: &[httparse::Header<'a>]) -> Result<Self, Refusal> {
        let mut known = Known {
            host: None,
            length: None,
            coding: None,
            expects_continue: false,
            named: 0,
            options: [b"".as_slice(); MAX_OPTIONS],
            forwarded_for: None,
            forwarded_proto: None,
        };
        for field in fields {
            let (name, value) = (field.name, field.value);
            if name.eq_ignore_ascii_case("host") {
                if known.host.replace(value).is_some() {
                    return Err(bad("the request has more than one host"));
                }
                if !is_host(value) {
                    return Err(BAD_HOST);
                }
            } else if name.eq_ignore_ascii_case("content-length") {
                if known.length.replace(value).is_some() {
                    return Err(bad("the request has more than one content-length"));
                }
            } else if name.eq_ignore_ascii_case("transfer-encoding") {
                if known.coding.replace(value).is_some() {
                    return Err(bad("the request has more than one transfer-encoding"));
                }
            } else if name.eq_ignore_ascii_case("expect") {
                if !value.eq_ignore_ascii_case(b"100-continue") {
                    let message = "the request expects something other than 100-continue";
                    return Err(Refusal { status: 417, code: "expectation_failed", message });
                }
                known.expects_continue = true;
            } else if name.eq_ignore_ascii_case("connection") {
                for option in elements(value).filter(|option| !option.is_empty()) {
                    let place = known.options.get_mut(known.named);
                    *place.ok_or(bad("the header connection has too many options"))? = option;
                    known.named += 1;
                }
            } else if name.eq_ignore_ascii_case("x-forwarded-for") {
                known.forwarded_for = Some(value);
            } else if name.eq_ignore_ascii_case("x-forwarded-proto") {
                known.forwarded_proto = Some(value);
            }
        }
        Ok(known)
    }

    /// Where the body ends. Any doubt is refused: here requests are smuggled.
    fn framing(&self, old: bool) -> Result<Framing, Refusal> {
        match (self.coding, self.length) {
            (Some(_), Some(_)) => Err(bad("the request has both a transfer-encoding and a content-length")),
            (Some(_), None) if old => Err(bad("a request of HTTP/1.0 has no transfer-encoding")),
            (Some(coding), None) if coding.eq_ignore_ascii_case(b"chunked") => Ok(Framing::Chunked),
            (Some(coding), None) if is_other_coding(coding) => {
                let message = "the only transfer-encoding that is understood is chunked";
                Err(Refusal { status: 501, code: "not_implemented", message })
            }
            (Some(_), None) => Err(bad("the transfer-encoding is malformed")),
            (None, Some(length)) => {
                let length = number(length).ok_or(bad("the content-length is not a number of up to 19 digits"))?;
                Ok(Framing::Length(length))
            }
            (None, None) => Ok(Framing::None),
        }
    }

    fn has_option(&self, name: &str) -> bool {
        self.options[..self.named].iter().any(|option| option.eq_ignore_ascii_case(name.as_bytes()))
    }

    /// Whether a header goes on to the other side. What is left out is for this hop, said by the gate in its own words, or such as
    /// only the gate may say.
    fn passes(&self, name: &str) -> bool {
        let is = |other: &str| name.eq_ignore_ascii_case(other);
        !(["host", "content-length", "expect"].into_iter().any(is)
            || HOP_BY_HOP.into_iter().any(is)
            || is_reserved(name)
            || self.has_option(name))
    }
}

/// Appends the canonical head.
fn write(line: &RequestLine<'_>, host: &[u8], fields: &[httparse::Header<'_>], known: &Known<'_>, out: &mut Vec<u8>) {
    out.extend_from_slice(line.method);
    out.push(b' ');
    if !matches!(line.target, [b'/' | b'*', ..]) {
        out.push(b'/');
    }
    out.extend_from_slice(line.target);
    out.extend_from_slice(b" HTTP/1.1\r\nhost: ");
    out.extend_from_slice(host);
    out.extend_from_slice(b"\r\n");
    for field in fields.iter().filter(|field| known.passes(field.name)) {
        out.extend(field.name.bytes().map(|byte| byte.to_ascii_lowercase()));
        out.extend_from_slice(b": ");
        if field.value.is_ascii() {
            out.extend_from_slice(field.value);
        } else {
            field.value.iter().for_each(|&byte| write_value_byte(byte, out));
        }
        out.extend_from_slice(b"\r\n");
    }
}

/// Appends a byte of a value in ASCII.
fn write_value_byte(byte: u8, out: &mut Vec<u8>) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    if byte.is_ascii() {
        out.push(byte);
    } else {
        out.extend_from_slice(&[OBS_TEXT, DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 0xf)]]);
    }
}

/// A value from a canonical head as the client sent it: each byte of obs-text as the character of its number, which is Latin-1.
pub(crate) fn obs_text(value: &str) -> Cow<'_, str> {
    let mark = char::from(OBS_TEXT);
    let mut parts = value.split(mark);
    let Some(first) = parts.next().filter(|first| first.len() < value.len()) else { return value.into() };
    let mut text = String::from(first);
    for part in parts {
        match part.split_at_checked(2).map(|(digits, rest)| (u8::from_str_radix(digits, 16), rest)) {
            Some((Ok(byte), rest)) => {
                text.push(byte.into());
                text.push_str(rest);
            }
            // Not from a canonical head, so it means itself.
            _ => {
                text.push(mark);
                text.push_str(part);
            }
        }
    }
    text.into()
}

/// Whether a byte may stand in a method or a header's name (RFC 9110, section 5.6.2).
pub(super) fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric()
        || matches!(byte, b'!' | b'#' | b'$' | b'%' | b'&' | b'\'' | b'*' | b'+' | b'-' | b'.' | b'^' | b'_' | b'`' | b'|' | b'~')
}

/// Whether a byte may stand in a header's value (RFC 9110, section 5.5).
pub(super) fn is_value(byte: u8) -> bool {
    matches!(byte, b'\t' | b' '..=0x7e | 0x80..)
}

/// The number a length says, if it is one: digits alone, which rules out signs, lists and numbers to another base.
pub(super) fn number(value: &[u8]) -> Option<u64> {
    let digits = (1..=MAX_LENGTH_DIGITS).contains(&value.len()) && value.iter().all(u8::is_ascii_digit);
    digits.then(|| value.iter().fold(0, |number, digit| number * 10 + u64::from(digit - b'0')))
}

/// The elements of a list, without the space around them.
fn elements(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|&byte| byte == b',').map(<[u8]>::trim_ascii)
}

/// The last element of a list.
fn last(value: &[u8]) -> &[u8] {
    elements(value).last().unwrap_or_default()
}

/// Whether this is a host with or without a port, as far as its characters go: those of RFC 3986, section 3.2.2, except `,`, which
/// joins two hosts into one value where a proxy merges headers. Empty is allowed, as it is for a target that has no host.
fn is_host(value: &[u8]) -> bool {
    value.iter().all(|&byte| {
        byte.is_ascii_alphanumeric()
            || matches!(
                byte,
                b'.' | b'-'
                    | b'_'
                    | b':'
                    | b'['
                    | b']'
                    | b'%'
                    | b'~'
                    | b'!'
                    | b'$'
                    | b'&'
                    | b'\''
                    | b'('
                    | b')'
                    | b'*'
                    | b'+'
                    | b';'
                    | b'='
            )
    })
}

/// Whether a transfer-encoding that is not `chunked` is one in earnest, though none that is understood here: words, of which the
/// last may be `chunked`, and no other has it in it. Everything else is meant to be read in two ways.
fn is_other_coding(value: &[u8]) -> bool {
    let has_chunked = |coding: &[u8]| coding.windows(7).any(|part| part.eq_ignore_ascii_case(b"chunked"));
    let codings = match value.iter().rposition(|&byte| byte == b',') {
        Some(comma) if value[comma + 1..].trim_ascii().eq_ignore_ascii_case(b"chunked") => &value[..comma],
        _ => value,
    };
    elements(codings).all(|coding| !coding.is_empty() && coding.iter().all(|&byte| is_token(byte)) && !has_chunked(coding))
}

/// Whether a header is one by which the gate or a proxy tells of the client. `_` counts as `-`: a program that gets headers in its
/// environment, as with CGI, cannot tell them apart.
fn is_reserved(name: &str) -> bool {
    let begins = |prefix: &str| {
        let same = |(byte, other): (u8, u8)| byte.eq_ignore_ascii_case(&other) || (byte == b'_' && other == b'-');
        name.len() >= prefix.len() && name.bytes().zip(prefix.bytes()).all(same)
    };
    let is = |other: &str| name.len() == other.len() && begins(other);
    begins("x-plugrack") || begins("x-forwarded-") || is("forwarded") || is("x-real-ip")
}

/// The address in the last element of an `X-Forwarded-For`, with or without a port and brackets.
fn address(value: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(last(value)).ok()?;
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    bare.parse().ok().or_else(|| Some(text.parse::<SocketAddr>().ok()?.ip()))
}
