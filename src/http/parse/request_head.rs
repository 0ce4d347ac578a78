//! The head of a request: read strictly, written canonically. Pure.
//!
//! The canonical head is one request line in origin-form, one `host`, and the end-to-end headers with their names in lower case. Framing
//! headers are left out: the gate keeps the length of the body itself. The parser refuses whatever two readers could understand in two
//! ways: line ends other than CRLF, folded lines, doubt about the length of the body or about the host, bytes outside of the grammar,
//! and everything over a limit.
//!
//! Headers by which a proxy describes its client are read from trusted proxies only, since a client can write them too. Of these,
//! `x-forwarded-host` and `x-request-id` are kept, once each, where they are well formed.
//!
//! A value may hold bytes from 0x80 up (`obs-text`, RFC 9110, section 5.5); the canonical head has them as they came. In a target such
//! bytes are percent-encoded (RFC 3986, section 2.1), so that every reader understands the same path.

use super::super::http_error::HttpError;
use super::super::proxies::{Networks, is_request_id};
use crate::protocol::message::HOP_BY_HOP;
use memchr::{memchr, memchr_iter};
use std::net::IpAddr;

/// Most headers that can be read: as many have their place on the stack. A higher [`Limits::headers`] counts as this.
pub(super) const MAX_HEADERS: usize = 256;

/// Headers for which a smaller place is enough, as it is with the limit that is usual: to clear the larger one takes longer than
/// to read a small head.
const FEW_HEADERS: usize = 64;

/// Longest method in bytes. The longest that is registered has 17 (`UPDATEREDIRECTREF`), so this has room for one's own.
pub(crate) const MAX_METHOD: usize = 32;

/// Most options in all `Connection` headers. Each is looked for among all headers, so many would cost time; clients send two
/// or three.
const MAX_OPTIONS: usize = 32;

/// Most digits of a length: with 19 a number always fits 64 bits.
const MAX_LENGTH_DIGITS: usize = 19;

/// How large a head may be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HeadLimits {
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
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Head {
    /// The method is `HEAD`, so that the answer has no body.
    pub(crate) head: bool,
    /// The client speaks HTTP/1.0.
    pub(crate) old: bool,
    /// The client would use the connection again.
    pub(crate) keep_alive: bool,
    /// The client waits for `100 Continue` before it sends the body.
    pub(crate) expects_continue: bool,
    /// The client asks for another protocol, which the canonical head names in `upgrade`. Its body is empty.
    pub(crate) upgrade: bool,
    /// Where the body ends.
    pub(crate) framing: Framing,
    /// Whom a trusted proxy names as its client, see [`Networks::client`].
    pub(crate) forwarded_for: Option<IpAddr>,
    /// Whether that client came by HTTPS: the last element of the last `X-Forwarded-Proto` of a trusted proxy.
    pub(crate) forwarded_https: Option<bool>,
}

/// A refusal of what is not HTTP, or not plainly so.
const fn bad(message: &'static str) -> HttpError {
    HttpError::new(400, "bad_request", message)
}

const BAD_LINE: HttpError = bad("the request line is not a method, a target and a version with one space between them");
const BAD_TARGET: HttpError = bad("the target of the request is neither a path nor an http URL");
const BAD_TARGET_BYTE: HttpError = bad("the target of the request holds a control character or #, which must be percent-encoded");
const BAD_HOST: HttpError = bad("the host holds characters that do not belong there");
const BARE_LF: HttpError = bad("a line of the head ends without a carriage return");
const VERSION: HttpError = HttpError::new(505, "version_not_supported", "the version is neither HTTP/1.0 nor HTTP/1.1");
const TOO_LARGE: HttpError = HttpError::new(431, "head_too_large", "the head of the request is too large");
const TOO_MANY: HttpError = HttpError::new(431, "head_too_large", "the request has too many headers");

/// Reads one request's head from the beginning of `input`, and appends its canonical form to `out`: request line and headers, each
/// with its line end, but no blank line after them, since the caller has headers to add. Also says how many bytes the head took.
///
/// `None` when it is not complete. `searched` is how far `input` was searched for its end before; the caller keeps it from call
/// to call, and begins each request with 0. What can be refused early is, such as another protocol's first bytes, so that
/// nobody waits for the end of what has none. `out` only changes when a head was read.
///
/// `proxies` is given where a trusted proxy has sent the request: those that its `X-Forwarded-For` may name as further ones.
pub(crate) fn read(
    input: &[u8],
    limits: HeadLimits,
    proxies: Option<&Networks>,
    searched: &mut usize,
    out: &mut Vec<u8>,
) -> Result<Option<(Head, usize)>, HttpError> {
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
            return parse(&line, &window[line_end + 1..=at], limits, proxies, out).map(|head| Some((head, at + 1)));
        }
    }
    *searched = window.len();
    match (input.len() < limits.bytes, line_known) {
        (true, _) => Ok(None),
        (false, true) => Err(TOO_LARGE),
        (false, false) => Err(HttpError::new(414, "uri_too_long", "the target of the request is too long")),
    }
}

/// Checks the beginning of a request line as far as it is there: another protocol is known by its first bytes.
fn check_method(line: &[u8]) -> Result<(), HttpError> {
    match line.iter().take(MAX_METHOD + 1).position(|&byte| !is_token(byte)) {
        Some(length) if length > 0 && line[length] == b' ' => Ok(()),
        Some(_) => Err(bad("the request does not begin with a method")),
        None if line.len() <= MAX_METHOD => Ok(()),
        None => Err(HttpError::new(501, "not_implemented", "the method is too long")),
    }
}

/// The first line of a request.
#[derive(Debug, Clone, Copy)]
struct RequestLine<'a> {
    method: &'a [u8],
    /// The host of a target in absolute-form.
    authority: Option<&'a [u8]>,
    /// The target in origin-form, or `*`, as it was sent; without the `/` that an absolute-form may leave out.
    target: &'a [u8],
    /// HTTP/1.0.
    old: bool,
}

impl<'a> RequestLine<'a> {
    /// Reads the line without its end, whose beginning [`check_method`] has accepted.
    fn parse(line: &'a [u8]) -> Result<Self, HttpError> {
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
            return Err(HttpError::new(405, "method_not_allowed", message));
        }
        if !target.iter().all(|&byte| is_target(byte)) {
            return Err(BAD_TARGET_BYTE);
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
fn parse(
    line: &RequestLine<'_>,
    lines: &[u8],
    limits: HeadLimits,
    proxies: Option<&Networks>,
    out: &mut Vec<u8>,
) -> Result<Head, HttpError> {
    let (mut few, mut many);
    let fields: &mut [httparse::Header<'_>] = if limits.headers <= FEW_HEADERS {
        few = [httparse::EMPTY_HEADER; FEW_HEADERS];
        &mut few[..limits.headers]
    } else {
        many = [httparse::EMPTY_HEADER; MAX_HEADERS];
        &mut many[..limits.headers.min(MAX_HEADERS)]
    };
    let fields = match httparse::parse_headers(lines, fields) {
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
    let has_body = !matches!(framing, Framing::None | Framing::Length(0));
    let upgrade = known.upgrade().filter(|_| line.method == b"GET" && !line.old && !has_body);
    write(line, host, fields, &known, out);
    if let Some(protocol) = upgrade {
        [b"upgrade: ", protocol, b"\r\n"].into_iter().for_each(|part| out.extend_from_slice(part));
    }
    let forwarded = proxies.map_or_else(Forwarded::default, |proxies| Forwarded::gather(fields, proxies));
    forwarded.write(out);
    Ok(Head {
        head: line.method == b"HEAD",
        old: line.old,
        keep_alive: !known.has_option("close") && (!line.old || known.has_option("keep-alive")),
        expects_continue: known.expects_continue && has_body && !line.old,
        upgrade: upgrade.is_some(),
        framing,
        forwarded_for: forwarded.client,
        forwarded_https: forwarded.https,
    })
}

/// What a trusted proxy says of its client.
#[derive(Debug, Default)]
struct Forwarded<'a> {
    client: Option<IpAddr>,
    https: Option<bool>,
    host: Option<&'a [u8]>,
    request_id: Option<&'a [u8]>,
}

impl<'a> Forwarded<'a> {
    /// Gathers it from the headers. What is malformed counts as not said.
    fn gather(fields: &[httparse::Header<'a>], proxies: &Networks) -> Self {
        let values = |name: &'static str| {
            fields.iter().filter(move |field| field.name.eq_ignore_ascii_case(name)).map(|field| field.value)
        };
        let https = values("x-forwarded-proto").next_back().and_then(|scheme| match last(scheme) {
            scheme if scheme.eq_ignore_ascii_case(b"https") => Some(true),
            scheme if scheme.eq_ignore_ascii_case(b"http") => Some(false),
            _ => None,
        });
        let host = values("x-forwarded-host").next_back().map(last);
        let mut ids = values("x-request-id");
        // Of two neither is the request's for sure.
        let request_id = ids.next().filter(|id| ids.next().is_none() && is_request_id(id));
        Self {
            client: proxies.client(values("x-forwarded-for")),
            https,
            host: host.filter(|host| !host.is_empty() && is_host(host)),
            request_id,
        }
    }

    /// Appends the headers that are passed on.
    fn write(&self, out: &mut Vec<u8>) {
        for (name, value) in [("x-forwarded-host", self.host), ("x-request-id", self.request_id)] {
            if let Some(value) = value {
                [name.as_bytes(), b": ", value, b"\r\n"].into_iter().for_each(|part| out.extend_from_slice(part));
            }
        }
    }
}

/// The headers that mean something to the gate.
struct Known<'a> {
    host: Option<&'a [u8]>,
    length: Option<&'a [u8]>,
    coding: Option<&'a [u8]>,
    expects_continue: bool,
    /// The value of the only `Upgrade` header.
    upgrade: Option<&'a [u8]>,
    upgrades: u32,
    /// What the `Connection` headers name: the first so many of `options`.
    named: usize,
    options: [&'a [u8]; MAX_OPTIONS],
}

impl<'a> Known<'a> {
    fn gather(fields: &[httparse::Header<'a>]) -> Result<Self, HttpError> {
        let mut known = Known {
            host: None,
            length: None,
            coding: None,
            expects_continue: false,
            upgrade: None,
            upgrades: 0,
            named: 0,
            options: [b"".as_slice(); MAX_OPTIONS],
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
                    return Err(HttpError::new(417, "expectation_failed", message));
                }
                known.expects_continue = true;
            } else if name.eq_ignore_ascii_case("upgrade") {
                known.upgrade = Some(value);
                known.upgrades += 1;
            } else if name.eq_ignore_ascii_case("connection") {
                for option in elements(value).filter(|option| !option.is_empty()) {
                    let place = known.options.get_mut(known.named);
                    *place.ok_or(bad("the header connection has too many options"))? = option;
                    known.named += 1;
                }
            }
        }
        Ok(known)
    }

    /// Where the body ends. Any doubt is refused: here requests are smuggled.
    fn framing(&self, old: bool) -> Result<Framing, HttpError> {
        match (self.coding, self.length) {
            (Some(_), Some(_)) => Err(bad("the request has both a transfer-encoding and a content-length")),
            (Some(_), None) if old => Err(bad("a request of HTTP/1.0 has no transfer-encoding")),
            (Some(coding), None) if coding.eq_ignore_ascii_case(b"chunked") => Ok(Framing::Chunked),
            (Some(coding), None) if is_other_coding(coding) => {
                let message = "the only transfer-encoding that is understood is chunked";
                Err(HttpError::new(501, "not_implemented", message))
            }
            (Some(_), None) => Err(bad("the transfer-encoding is malformed")),
            (None, Some(length)) => {
                let length = number(length).ok_or(bad("the content-length is not a number of up to 19 digits"))?;
                Ok(Framing::Length(length))
            }
            (None, None) => Ok(Framing::None),
        }
    }

    /// The protocols that the client asks for, unless they are others for HTTP itself (RFC 9110, section 7.8): after a switch to one of
    /// these the host would not see the client's requests.
    fn upgrade(&self) -> Option<&'a [u8]> {
        let is_other_http = |protocol: &[u8]| {
            let begins = |name: &[u8]| protocol.get(..name.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(name));
            begins(b"h2c") || begins(b"http") || begins(b"tls")
        };
        let is_protocol = |protocol: &[u8]| {
            let mut parts = protocol.splitn(2, |&byte| byte == b'/');
            parts.all(|part| !part.is_empty() && part.iter().all(|&byte| is_token(byte)))
        };
        let value = self.upgrade.filter(|_| self.upgrades == 1 && self.has_option("upgrade"))?;
        elements(value).all(|protocol| is_protocol(protocol) && !is_other_http(protocol)).then_some(value)
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
    if line.target.is_ascii() {
        out.extend_from_slice(line.target);
    } else {
        line.target.iter().for_each(|&byte| write_target_byte(byte, out));
    }
    out.extend_from_slice(b" HTTP/1.1\r\nhost: ");
    out.extend_from_slice(host);
    out.extend_from_slice(b"\r\n");
    for field in fields.iter().filter(|field| known.passes(field.name)) {
        let start = out.len();
        out.extend_from_slice(field.name.as_bytes());
        out[start..].make_ascii_lowercase();
        out.extend_from_slice(b": ");
        out.extend_from_slice(field.value);
        out.extend_from_slice(b"\r\n");
    }
}

/// Appends a byte of a target in ASCII.
fn write_target_byte(byte: u8, out: &mut Vec<u8>) {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    if byte.is_ascii() {
        out.push(byte);
    } else {
        out.extend_from_slice(&[b'%', DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 0xf)]]);
    }
}

/// Whether a byte may stand in a target, be it that it is encoded before it is passed on.
fn is_target(byte: u8) -> bool {
    matches!(byte, 0x21..=0x7e | 0x80..) && byte != b'#'
}

/// Whether a byte may stand in a method or a header's name (RFC 9110, section 5.6.2).
pub(crate) fn is_token(byte: u8) -> bool {
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
    begins("x-plugrack") || begins("x-forwarded-") || is("forwarded") || is("x-real-ip") || is("x-request-id")
}

#[cfg(test)]
mod tests {
    use super::super::fuzzing;
    use super::*;
    use proptest::prelude::*;

    const LIMITS: HeadLimits = HeadLimits { bytes: 16 * 1024, headers: 64 };

    type Outcome = Result<Option<(Head, usize, String)>, HttpError>;

    fn read_once(input: &[u8], limits: HeadLimits, searched: &mut usize) -> Outcome {
        let mut out = b"before".to_vec();
        let outcome = read(input, limits, Some(&Networks::default()), searched, &mut out);
        let written = out.strip_prefix(b"before").unwrap();
        match outcome {
            Ok(Some((head, used))) => Ok(Some((head, used, written.iter().map(|&byte| char::from(byte)).collect()))),
            other => {
                assert_eq!(written, b"", "written, though no head was read");
                other.map(|_| None)
            }
        }
    }

    /// What comes of the input when it arrives whole, in two pieces cut anywhere, and byte by byte: the same, or this fails.
    fn read_under(input: &[u8], limits: HeadLimits) -> Outcome {
        let whole = read_once(input, limits, &mut 0);
        for cut in 0..input.len() {
            let mut searched = 0;
            let first = read_once(&input[..cut], limits, &mut searched);
            let outcome = if first == Ok(None) { read_once(input, limits, &mut searched) } else { first };
            assert_eq!(outcome, whole, "cut after {cut} bytes of {:?}", input.escape_ascii().to_string());
        }
        let mut searched = 0;
        let outcomes = (0..=input.len()).map(|end| read_once(&input[..end], limits, &mut searched));
        let dripped = outcomes.into_iter().find(|outcome| *outcome != Ok(None)).unwrap_or(Ok(None));
        assert_eq!(dripped, whole, "byte by byte, {:?}", input.escape_ascii().to_string());
        whole
    }

    fn read_all(input: impl AsRef<[u8]>) -> Outcome {
        read_under(input.as_ref(), LIMITS)
    }

    /// The head of a request that is accepted, with its canonical form.
    fn accepted(input: impl AsRef<[u8]>) -> (Head, String) {
        let input = input.as_ref();
        match read_all([input, b"rest"].concat()) {
            Ok(Some((head, used, out))) => {
                assert_eq!(used, input.len(), "{:?}", input.escape_ascii().to_string());
                (head, out)
            }
            other => panic!("{:?}: {other:?}", input.escape_ascii().to_string()),
        }
    }

    #[track_caller]
    fn assert_refused(status: u16, code: &str, input: impl AsRef<[u8]>) {
        let shown = input.as_ref().escape_ascii().to_string();
        let refusal = read_all(input).expect_err(&shown);
        assert_eq!((refusal.status, refusal.code), (status, code), "{shown}");
        assert!(!refusal.message.ends_with('.') && !refusal.message.is_empty(), "{}", refusal.message);
    }

    #[track_caller]
    fn assert_bad(input: impl AsRef<[u8]>) {
        assert_refused(400, "bad_request", input);
    }

    fn get(headers: &str) -> String {
        format!("GET / HTTP/1.1\r\nHost: h\r\n{headers}\r\n")
    }

    fn post(headers: &str) -> String {
        format!("POST / HTTP/1.1\r\nHost: h\r\n{headers}\r\n")
    }

    fn with_target(target: &str) -> String {
        format!("GET {target} HTTP/1.1\r\nHost: h\r\n\r\n")
    }

    #[test]
    fn an_ordinary_request() {
        let input = "GET /a/b?c=d&e=%2F HTTP/1.1\r\nHost: Example.com:8080\r\nAccept: a\r\nUser-Agent:\t b \t\r\nACCEPT: c\r\n\
            X-Empty:\r\n\r\n";
        let (head, out) = accepted(input);
        assert_eq!(
            head,
            Head {
                head: false,
                old: false,
                keep_alive: true,
                expects_continue: false,
                upgrade: false,
                framing: Framing::None,
                forwarded_for: None,
                forwarded_https: None,
            }
        );
        assert_eq!(
            out,
            "GET /a/b?c=d&e=%2F HTTP/1.1\r\nhost: Example.com:8080\r\naccept: a\r\nuser-agent: b\r\naccept: c\r\nx-empty: \r\n"
        );
        assert!(accepted("HEAD / HTTP/1.1\r\nHost: h\r\n\r\n").0.head);
        assert!(!accepted("head / HTTP/1.1\r\nHost: h\r\n\r\n").0.head);
    }

    #[test]
    fn a_request_that_is_not_complete_waits() {
        let whole = get("A: b\r\n");
        for end in 0..whole.len() {
            assert_eq!(read_all(&whole[..end]), Ok(None), "{end}");
        }
    }

    #[test]
    fn one_empty_line_may_stand_before_it() {
        assert_eq!(accepted(["\r\n", &get("")].concat()), accepted(get("")));
        assert_bad(["\r\n\r\n", &get("")].concat());
        assert_bad(["\n", &get("")].concat());
        assert_bad(["\r", &get("")].concat());
        assert_bad([" ", &get("")].concat());
        assert_eq!(read_all("\r"), Ok(None));
        assert_eq!(read_all("\r\n"), Ok(None));
        assert_bad("\r\n\r");
    }

    #[test]
    fn lines_end_with_crlf_alone() {
        let whole = get("A: b\r\nC: d\r\n");
        for (at, _) in whole.match_indices("\r\n") {
            assert_bad([&whole[..at], "\n", &whole[at + 2..]].concat());
            assert_bad([&whole[..at], "\r", &whole[at + 2..], "\r\n\r\n"].concat());
            assert_bad([&whole[..at], "\r\r\n", &whole[at + 2..], "\r\n\r\n"].concat());
            assert_bad([&whole[..at], "\n\r", &whole[at + 2..]].concat());
        }
        // Not before the very last byte: there a line feed would only end the head, and the one that follows be no part of it.
        for at in 0..whole.len() - 1 {
            assert_bad([&whole[..at], "\n", &whole[at..]].concat());
            // A carriage return where one stands already makes two.
            assert_bad([&whole[..at], "\r", &whole[at..], "\r\n\r\n"].concat());
        }
        // Refused at once, though the end of the head never comes.
        assert_bad("GET / HTTP/1.1\nHost: h\n\n");
        assert_bad("GET / HTTP/1.1\r\nHost: h\n\n");
    }

    #[test]
    fn a_head_of_the_limit_is_accepted_and_one_byte_more_is_not() {
        let whole = ["\r\n", &get("A: b\r\n")].concat();
        let limit = |bytes| read_under(whole.as_bytes(), HeadLimits { bytes, headers: 2 });
        for over in [0, 1, 1000] {
            assert_eq!(limit(whole.len() + over).unwrap().unwrap().1, whole.len());
        }
        for bytes in 0..whole.len() {
            let refusal = limit(bytes).unwrap_err();
            let line = bytes >= "\r\nGET / HTTP/1.1\r\n".len();
            assert_eq!(
                (refusal.status, refusal.code),
                if line { (431, "head_too_large") } else { (414, "uri_too_long") },
                "{bytes}"
            );
        }
        // As large as can be without an end.
        let long = format!("GET /{} HTTP/1.1\r\n", "x".repeat(LIMITS.bytes));
        let mut searched = 0;
        assert_eq!(read(&long.as_bytes()[..LIMITS.bytes - 1], LIMITS, None, &mut searched, &mut Vec::new()), Ok(None));
        assert_eq!(read(&long.as_bytes()[..LIMITS.bytes], LIMITS, None, &mut searched, &mut Vec::new()).unwrap_err().status, 414);
        let long = get(&format!("A: {}\r\n", "x".repeat(LIMITS.bytes)));
        assert_eq!(read(long.as_bytes(), LIMITS, None, &mut 0, &mut Vec::new()).unwrap_err(), TOO_LARGE);
    }

    #[test]
    fn headers_up_to_the_limit_are_accepted_and_one_more_is_not() {
        let count = |headers: usize, limit| {
            let input = get(&"A: b\r\n".repeat(headers - 1));
            read_once(input.as_bytes(), HeadLimits { bytes: usize::MAX, headers: limit }, &mut 0)
        };
        for limit in [1, 2, FEW_HEADERS, FEW_HEADERS + 1, MAX_HEADERS] {
            assert!(count(limit, limit).unwrap().is_some());
            assert_eq!(count(limit + 1, limit), Err(TOO_MANY), "{limit}");
        }
        assert_eq!(count(1, 0), Err(TOO_MANY));
        assert!(count(MAX_HEADERS, MAX_HEADERS + 1).unwrap().is_some());
        assert_eq!(count(MAX_HEADERS + 1, MAX_HEADERS + 1), Err(TOO_MANY));
        // What is left out counts too.
        let input = get(&"Connection: close\r\n".repeat(2));
        assert_eq!(read_under(input.as_bytes(), HeadLimits { bytes: 1000, headers: 2 }), Err(TOO_MANY));
    }

    #[test]
    fn the_request_line_has_three_words_and_single_spaces() {
        for line in [
            "GET  / HTTP/1.1",
            "GET /  HTTP/1.1",
            "GET / HTTP/1.1 ",
            " GET / HTTP/1.1",
            "GET\t/ HTTP/1.1",
            "GET /\tHTTP/1.1",
            "GET / a HTTP/1.1",
            "GET /",
            "GET / ",
            "GET",
            "GET ",
            "GET HTTP/1.1",
            "GET  HTTP/1.1",
            "GET / http/1.1",
            "GET / HTTP/1.1x",
            "GET / HTTP/",
            "GET / HTTP",
            "GET / HTTP /1.1",
            "GET / HTTP/1,1",
            "GET / HTTP/-1",
            "GET / XHTTP/1.1",
            "GET / ICY/1.1",
        ] {
            assert_bad(format!("{line}\r\nHost: h\r\n\r\n"));
            // Without waiting for the rest.
            assert_bad(format!("{line}\r\n"));
        }
    }

    #[test]
    fn methods_are_words_of_up_to_32_bytes() {
        for method in ["G", "PROPFIND", "M-SEARCH", "a", "!#$%&'*+-.^_`|~09", &"X".repeat(MAX_METHOD)] {
            let (_, out) = accepted(format!("{method} / HTTP/1.1\r\nHost: h\r\n\r\n"));
            assert!(out.starts_with(&format!("{method} / ")), "{out}");
        }
        for length in [MAX_METHOD + 1, 1000] {
            assert_refused(501, "not_implemented", format!("{} / HTTP/1.1\r\nHost: h\r\n\r\n", "X".repeat(length)));
        }
        assert_refused(501, "not_implemented", "X".repeat(MAX_METHOD + 1));
        assert_eq!(read_all("X".repeat(MAX_METHOD)), Ok(None));
        for byte in (0..=255).filter(|&byte| byte != b' ' && !is_token(byte)) {
            assert_bad([b"GE", &[byte][..], b"T / HTTP/1.1\r\nHost: h\r\n\r\n"].concat());
        }
    }

    #[test]
    fn other_protocols_are_known_by_their_first_bytes() {
        for bytes in [
            &b"\x16\x03\x01\x02\x00\x01"[..],
            b"\x16",
            b"\x05\x01\x00",
            b"\0",
            b"\x80\x2e",
            b"{\"a\":1}",
            b"<a>",
            b"SSH-2.0-x\r\n",
        ] {
            assert_bad(bytes);
        }
    }

    #[test]
    fn connect_and_trace_are_refused_in_any_case() {
        for line in ["CONNECT h:443", "TRACE /", "connect h:443", "Trace /", "CONNECT /"] {
            assert_refused(405, "method_not_allowed", format!("{line} HTTP/1.1\r\n"));
            assert_refused(405, "method_not_allowed", format!("{line} HTTP/1.1\r\nHost: h\r\n\r\n"));
        }
    }

    #[test]
    fn other_versions_are_refused_as_soon_as_the_request_line_is_there() {
        for version in
            ["HTTP/2.0", "HTTP/2", "HTTP/3", "HTTP/0.9", "HTTP/1.2", "HTTP/1.10", "HTTP/11", "HTTP/1", "HTTP/1.", "HTTP/1.1.1"]
        {
            assert_refused(505, "version_not_supported", format!("GET / {version}\r\n"));
            assert_refused(505, "version_not_supported", format!("GET / {version}\r\nHost: h\r\n\r\n"));
        }
        assert_refused(505, "version_not_supported", "PRI * HTTP/2.0\r\n");
        assert_refused(505, "version_not_supported", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
    }

    #[test]
    fn targets_are_paths() {
        for target in ["/", "/a", "//a", "/a?b", "/?", "/a//../b/.", "/%00%zz", "/\"<>\\^`{|}~!", "/:@", "/http://a/"] {
            let (_, out) = accepted(with_target(target));
            assert!(out.starts_with(&format!("GET {target} HTTP/1.1\r\nhost: h\r\n")), "{out}");
        }
        for target in [
            "a",
            "?a",
            "h:80",
            "*",
            "/*#",
            "/#",
            "/a#b",
            "http:",
            "http:/a",
            "ftp://h/",
            "httpx://h/",
            "http//h/",
            "*a",
            "mailto:a@b",
        ] {
            assert_bad(with_target(target));
        }
        for byte in (0..=0x20).chain([0x7f]) {
            assert_bad([b"GET /a", &[byte][..], b"b HTTP/1.1\r\nHost: h\r\n\r\n"].concat());
        }
        assert!(accepted("OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n").1.starts_with("OPTIONS * HTTP/1.1\r\n"));
        for method in ["GET", "POST", "options"] {
            assert_bad(format!("{method} * HTTP/1.1\r\nHost: h\r\n\r\n"));
        }
    }

    #[test]
    fn bytes_beyond_ascii_in_a_target_are_percent_encoded() {
        for byte in 0x80..=0xff_u8 {
            for (before, after) in [("/a", "b?c"), ("/?c=", "&d"), ("/", ""), ("http://h/", "?"), ("http://h?", "/")] {
                let target = [before.as_bytes(), &[byte], after.as_bytes()].concat();
                let (_, out) = accepted([b"GET ", &target[..], b" HTTP/1.1\r\nHost: h\r\n\r\n"].concat());
                let slash = if before == "http://h?" { "/" } else { "" };
                let before = before.trim_start_matches("http://h");
                assert_eq!(out, format!("GET {slash}{before}%{byte:02X}{after} HTTP/1.1\r\nhost: h\r\n"));
            }
            // It neither begins a path nor belongs to a host.
            for before in ["", "http://h", "http://", "a", "*"] {
                let target = [before.as_bytes(), &[byte], b"/"].concat();
                assert_bad([b"GET ", &target[..], b" HTTP/1.1\r\nHost: h\r\n\r\n"].concat());
            }
        }
        let (_, out) = accepted("GET /tö/%c3%b6?しまりん HTTP/1.1\r\nHost: h\r\n\r\n");
        assert!(out.starts_with("GET /t%C3%B6/%c3%b6?%E3%81%97%E3%81%BE%E3%82%8A%E3%82%93 HTTP/1.1\r\n"), "{out}");
    }

    #[test]
    fn a_url_is_reduced_to_its_path_and_its_host_counts() {
        for (target, host, path) in [
            ("http://a", "a", "/"),
            ("http://a/", "a", "/"),
            ("HTTP://A:80/b?c", "A:80", "/b?c"),
            ("HttpS://a?b/c", "a", "/?b/c"),
            ("https://[::1]:8/x", "[::1]:8", "/x"),
            ("http://a//b", "a", "//b"),
            ("http://a?", "a", "/?"),
            ("http://a/@", "a", "/@"),
            ("http://a/b@c?d@e", "a", "/b@c?d@e"),
        ] {
            let (_, out) = accepted(with_target(target));
            assert_eq!(out, format!("GET {path} HTTP/1.1\r\nhost: {host}\r\n"));
        }
        for target in [
            "http://",
            "http:///a",
            "https://?a",
            "http://u@a/",
            "http://u:p@a/",
            "http://@a",
            "http://a/#",
            "http://a,b/",
            "http://a\\b/",
        ] {
            assert_bad(with_target(target));
        }
        // It has a host of its own, but must have the header all the same, and a good one.
        assert_bad("GET http://a/ HTTP/1.1\r\n\r\n");
        assert_bad("GET http://a/ HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n");
        assert_bad("GET http://a/ HTTP/1.1\r\nHost: a/b\r\n\r\n");
        assert_eq!(accepted("GET http://a HTTP/1.0\r\n\r\n").1, "GET / HTTP/1.1\r\nhost: a\r\n");
        assert_eq!(accepted("OPTIONS http://a HTTP/1.1\r\nHost: h\r\n\r\n").1, "OPTIONS / HTTP/1.1\r\nhost: a\r\n");
    }

    #[test]
    fn there_is_one_host() {
        for host in ["", "a", "A.b-c_d~e", "1.2.3.4:80", "[2001:db8::1]:80", "[::1]", "%41", "!$&'()*+;="] {
            assert_eq!(
                accepted(format!("GET / HTTP/1.1\r\nHOST:{host}\r\n\r\n")).1,
                format!("GET / HTTP/1.1\r\nhost: {host}\r\n")
            );
        }
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b".-_:[]%~!$&'()*+;=".contains(&byte);
        for byte in (0..=255).filter(|&byte| !allowed(byte)) {
            assert_bad([b"GET / HTTP/1.1\r\nHost: a", &[byte][..], b"b\r\n\r\n"].concat());
        }
        assert_bad("GET / HTTP/1.1\r\n\r\n");
        assert_bad("GET / HTTP/1.1\r\nA: b\r\n\r\n");
        assert_bad(get("Host: h\r\n"));
        assert_bad(get("host:\r\n"));
        assert_bad("GET / HTTP/1.0\r\nHost: a\r\nHost: a\r\n\r\n");
        // It stays when it is named as if it were for one hop.
        assert_eq!(accepted(get("Connection: host, Host\r\n")).1, "GET / HTTP/1.1\r\nhost: h\r\n");
    }

    #[test]
    fn http_1_0_needs_no_host_and_ends_the_connection() {
        let (head, out) = accepted("GET /a HTTP/1.0\r\n\r\n");
        assert!(head.old && !head.keep_alive);
        assert_eq!(out, "GET /a HTTP/1.1\r\nhost: \r\n");
        let (head, out) = accepted("GET /a HTTP/1.0\r\nHost: h\r\nConnection: Keep-Alive\r\n\r\n");
        assert!(head.old && head.keep_alive);
        assert_eq!(out, "GET /a HTTP/1.1\r\nhost: h\r\n");
    }

    #[test]
    fn the_connection_goes_on_as_the_client_says() {
        for (version, headers, expected) in [
            ("1.1", "", true),
            ("1.1", "Connection: keep-alive\r\n", true),
            ("1.1", "Connection: close\r\n", false),
            ("1.1", "Connection: a, CLOSE ,b\r\n", false),
            ("1.1", "Connection: keep-alive\r\nConnection: close\r\n", false),
            ("1.1", "Connection: closed, xclose, clos\r\n", true),
            ("1.1", "Connection: \"close\"\r\n", true),
            ("1.1", "Connection:\r\nConnection: ,, ,\r\n", true),
            ("1.0", "", false),
            ("1.0", "Connection: keep-alive\r\n", true),
            ("1.0", "Connection: a,\tkeep-alive\r\n", true),
            ("1.0", "Connection: keep-alive, close\r\n", false),
            ("1.0", "Connection: close\r\nConnection: keep-alive\r\n", false),
            ("1.0", "Keep-Alive: 5\r\n", false),
            ("1.0", "Proxy-Connection: keep-alive\r\n", false),
        ] {
            let (head, _) = accepted(format!("GET / HTTP/{version}\r\nHost: h\r\n{headers}\r\n"));
            assert_eq!(head.keep_alive, expected, "{version} {headers}");
        }
        let options = |count: usize| get(&format!("Connection: a,,{}\r\nConnection: z\r\n", "b,".repeat(count - 2)));
        accepted(options(MAX_OPTIONS));
        assert_bad(options(MAX_OPTIONS + 1));
    }

    #[test]
    fn an_upgrade_is_passed_on_where_it_is_one_and_not_to_another_http() {
        let upgrade = |headers: &str| accepted(get(headers)).0.upgrade;
        let (head, out) = accepted(get("Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n"));
        assert!(head.upgrade && out.ends_with("\r\nupgrade: websocket\r\n"), "{out}");
        assert!(upgrade("Upgrade: a/1.0, b\r\nConnection: upgrade\r\n"));
        for headers in [
            "Upgrade: websocket\r\n",
            "Connection: upgrade\r\n",
            "Connection: upgrade\r\nUpgrade: websocket\r\nUpgrade: websocket\r\n",
            "Connection: upgrade\r\nUpgrade: h2c\r\n",
            "Connection: upgrade\r\nUpgrade: websocket, H2C\r\n",
            "Connection: upgrade\r\nUpgrade: HTTP/2.0\r\n",
            "Connection: upgrade\r\nUpgrade: TLS/1.0\r\n",
            "Connection: upgrade\r\nUpgrade: web socket\r\n",
            "Connection: upgrade\r\nUpgrade:\r\n",
            "Connection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 1\r\n",
        ] {
            let (head, out) = accepted(get(headers));
            assert!(!head.upgrade && !out.contains("upgrade"), "{headers} {out}");
        }
        let old = accepted("GET / HTTP/1.0\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n");
        assert!(
            !old.0.upgrade
                && !accepted("POST / HTTP/1.1\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n").0.upgrade
        );
    }

    #[test]
    fn what_is_for_one_hop_or_told_by_a_proxy_goes_no_further() {
        for name in HOP_BY_HOP.into_iter().filter(|name| *name != "transfer-encoding") {
            assert_eq!(
                accepted(get(&format!("A: b\r\n{}: x\r\nC: d\r\n", name.to_uppercase()))),
                accepted(get("A: b\r\nC: d\r\n")),
                "{name}"
            );
        }
        for name in [
            "X-PlugRack",
            "x-plugrack-client",
            "X_Plugrack_Client",
            "X-Plugrackx",
            "Forwarded",
            "X-Forwarded-For",
            "X-Forwarded-",
            "x-forwarded_host",
            "X_FORWARDED_FOR",
            "x-forwarded-prefix",
            "X-Real-IP",
            "x_real_ip",
        ] {
            assert_eq!(accepted(get(&format!("A: b\r\n{name}: x\r\nC: d\r\n"))), accepted(get("A: b\r\nC: d\r\n")), "{name}");
        }
        for name in [
            "x-plugrac",
            "x-forwarded",
            "forwarded-for",
            "forwardedx",
            "x-real-ips",
            "x-real",
            "content-lengths",
            "te-x",
            "expects",
            "hosts",
            "connections",
        ] {
            assert!(accepted(get(&format!("{name}: x\r\n"))).1.ends_with(&format!("{name}: x\r\n")), "{name}");
        }
    }

    #[test]
    fn what_connection_names_goes_no_further() {
        let (_, out) = accepted(get("A: 1\r\nConnection: b , C\r\nB: 2\r\nb: 3\r\nbb: 4\r\nCONNECTION:D\r\nc: 5\r\nd: 6\r\n"));
        assert_eq!(out, "GET / HTTP/1.1\r\nhost: h\r\na: 1\r\nbb: 4\r\n");
        // What the gate reads means the same when it is named.
        let named = "Connection: content-length, expect, x-forwarded-for, x-forwarded-proto\r\n";
        let told = "Content-Length: 5\r\nExpect: 100-continue\r\nX-Forwarded-For: 1.2.3.4\r\nX-Forwarded-Proto: https\r\n";
        let (head, out) = accepted(post(&[named, told].concat()));
        assert_eq!((&head, &*out), (&accepted(post(told)).0, "POST / HTTP/1.1\r\nhost: h\r\n"));
        assert_eq!((head.framing, head.expects_continue), (Framing::Length(5), true));
        assert_eq!((head.forwarded_for, head.forwarded_https), (Some([1, 2, 3, 4].into()), Some(true)));
        let (head, _) = accepted(post("Connection: transfer-encoding\r\nTransfer-Encoding: chunked\r\n"));
        assert_eq!(head.framing, Framing::Chunked);
    }

    #[test]
    fn names_are_words_directly_before_the_colon() {
        for line in [
            "A : b",
            "A\t: b",
            " A: b",
            "\tA: b",
            ": b",
            "A",
            "A b: c",
            "",
            "A\0: b",
            "(A): b",
            "A\u{e9}: b",
            "A,B: c",
            "\"A\": b",
            "A/B: c",
        ] {
            if !line.is_empty() {
                assert_bad(get(&format!("{line}\r\n")));
                assert_bad(format!("GET / HTTP/1.1\r\n{line}\r\nHost: h\r\n\r\n"));
            }
        }
        for byte in 0..=255u8 {
            let input = [b"GET / HTTP/1.1\r\nHost: h\r\nA", &[byte][..], b"B: c\r\n\r\n"].concat();
            match byte {
                b':' => assert!(accepted(input).1.ends_with("\r\na: B: c\r\n")),
                _ if is_token(byte) => assert!(accepted(input).1.ends_with("b: c\r\n")),
                _ => assert_bad(input),
            }
        }
    }

    #[test]
    fn lines_are_not_folded() {
        for fold in [" b", "\tb", " ", "\t", " : c"] {
            assert_bad(get(&format!("A: a\r\n{fold}\r\n")));
            assert_bad(get(&format!("A:\r\n{fold}\r\n")));
            assert_bad(format!("GET / HTTP/1.1\r\n{fold}\r\nHost: h\r\n\r\n"));
        }
    }

    #[test]
    fn values_hold_no_control_characters() {
        for byte in 0..=255u8 {
            for (before, after) in [("a", "b"), ("", "b"), ("a", ""), ("", ""), ("a long value before ", " and one after")] {
                let input =
                    [b"GET / HTTP/1.1\r\nHost: h\r\nA: ", before.as_bytes(), &[byte], after.as_bytes(), b"\r\n\r\n"].concat();
                match byte {
                    b'\t' | b' ' => {
                        let value = format!("{before}{}{after}", char::from(byte));
                        assert!(accepted(input).1.ends_with(&format!("a: {}\r\n", value.trim())));
                    }
                    0x21..=0x7e => assert!(accepted(input).1.ends_with(&format!("a: {before}{}{after}\r\n", char::from(byte)))),
                    0x80.. => assert!(accepted(input).1.ends_with(&format!("a: {before}{}{after}\r\n", char::from(byte)))),
                    _ => assert_bad(input),
                }
            }
        }
    }

    #[test]
    fn a_content_length_is_one_number() {
        for (value, length) in [
            ("0", 0),
            ("5", 5),
            ("007", 7),
            ("0000000000000000001", 1),
            ("9999999999999999999", 9_999_999_999_999_999_999),
            (" \t5\t ", 5),
        ] {
            assert_eq!(accepted(post(&format!("content-LENGTH:{value}\r\n"))).0.framing, Framing::Length(length), "{value}");
        }
        for value in [
            "",
            " ",
            "+1",
            "-1",
            "1,1",
            "1, 1",
            "1 1",
            "0x1",
            "a",
            "1a",
            "1.0",
            "1;",
            "\"1\"",
            "1e3",
            "00000000000000000001",
            "18446744073709551616",
            "99999999999999999999",
            "\u{661}",
            ",1",
            "1,",
        ] {
            assert_bad(post(&format!("Content-Length: {value}\r\n")));
        }
        for (one, other) in [("1", "1"), ("1", "2"), ("0", "0"), ("", "1"), ("1", "")] {
            assert_bad(post(&format!("Content-Length: {one}\r\nA: b\r\nContent-length: {other}\r\n")));
        }
        assert_bad("POST / HTTP/1.0\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n");
        assert_eq!(accepted("POST / HTTP/1.0\r\nContent-Length: 1\r\n\r\n").0.framing, Framing::Length(1));
        // A name that is another one.
        assert_eq!(accepted(post("Content_Length: 5\r\n")).0.framing, Framing::None);
    }

    #[test]
    fn the_only_transfer_encoding_is_chunked() {
        for value in ["chunked", "Chunked", "CHUNKED", " \tchunked\t "] {
            let (head, out) = accepted(post(&format!("Transfer-Encoding:{value}\r\n")));
            assert_eq!((head.framing, &*out), (Framing::Chunked, "POST / HTTP/1.1\r\nhost: h\r\n"), "{value}");
        }
        for value in
            ["gzip", "identity", "gzip, chunked", "deflate,CHUNKED", "gzip, x-b , chunked", "unknown", "chunk", "trailers"]
        {
            assert_refused(501, "not_implemented", post(&format!("Transfer-Encoding: {value}\r\n")));
        }
        for value in [
            "",
            "chunked, chunked",
            "chunked,",
            ",chunked",
            "chunked, gzip",
            "xchunked",
            "chunkedx",
            "x-chunked",
            "chunked;q=1",
            "chunked ;q=1",
            "chunked;",
            "gzip;q=1",
            "\"chunked\"",
            "chunked chunked",
            "chunked identity",
            "chunked\tx",
            "gzip,, chunked",
            "xchunked, chunked",
            "gzip, xchunked",
            "chunked, identity",
            "[chunked]",
            "{chunked}",
            ";chunked",
            "=chunked",
            "gzip chunked",
            "chunked\u{a0}",
            "\u{130}chunked",
        ] {
            assert_bad(post(&format!("Transfer-Encoding: {value}\r\n")));
        }
        for byte in [0, 0x0b, 0x0c, 0x7f, b'\r', b'\n', 1, 8] {
            let byte = char::from(byte);
            assert_bad(post(&format!("Transfer-Encoding: {byte}chunked\r\n")));
            assert_bad(post(&format!("Transfer-Encoding: chunked{byte}\r\n")));
        }
        assert_bad(post("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n"));
        assert_bad(post("Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n"));
        assert_bad(post("Transfer-Encoding:\r\nTransfer-Encoding: chunked\r\n"));
        assert_bad(post("Transfer-Encoding : chunked\r\n"));
        assert_bad("POST / HTTP/1.0\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n");
        assert_bad("POST / HTTP/1.0\r\nHost: h\r\nTransfer-Encoding: gzip\r\n\r\n");
    }

    #[test]
    fn a_body_does_not_end_in_two_ways() {
        for (one, other) in [("5", "chunked"), ("0", "chunked"), ("", "chunked"), ("5", ""), ("5", "identity"), ("x", "gzip")] {
            assert_bad(post(&format!("Content-Length: {one}\r\nTransfer-Encoding: {other}\r\n")));
            assert_bad(post(&format!("Transfer-Encoding: {other}\r\nContent-Length: {one}\r\n")));
            assert_bad(post(&format!("Connection: content-length\r\nTransfer-Encoding: {other}\r\nContent-Length: {one}\r\n")));
        }
    }

    #[test]
    fn an_expectation_is_for_100_continue() {
        for (request, expected) in [
            ("POST / HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n", true),
            ("POST / HTTP/1.1\r\nHost: h\r\nExpect: 100-Continue\r\nTransfer-Encoding: chunked\r\n\r\n", true),
            ("POST / HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n", true),
            ("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\n", false),
            ("POST / HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 0\r\n\r\n", false),
            ("GET / HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\n\r\n", false),
            ("POST / HTTP/1.0\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n", false),
        ] {
            let (head, out) = accepted(request);
            assert_eq!(head.expects_continue, expected, "{request}");
            assert!(!out.contains("expect"), "{out}");
        }
        for value in ["", "100", "100-continue, 100-continue", "100-continue;a", "200-ok", "xyz", "x100-continue"] {
            for version in ["1.1", "1.0"] {
                let request = format!("POST / HTTP/{version}\r\nHost: h\r\nExpect: {value}\r\nContent-Length: 1\r\n\r\n");
                assert_refused(417, "expectation_failed", request);
            }
        }
    }

    #[test]
    fn the_last_proxy_says_who_its_client_is() {
        let four = Some([1, 2, 3, 4].into());
        let six: Option<IpAddr> = Some("2001:db8::1".parse().unwrap());
        for (values, expected) in [
            (&["1.2.3.4"][..], four),
            (&["9.9.9.9, 1.2.3.4"], four),
            (&["unknown,1.2.3.4 "], four),
            (&["9.9.9.9", "8.8.8.8,\t1.2.3.4"], four),
            (&["1.2.3.4:56"], four),
            (&["2001:db8::1"], six),
            (&["[2001:db8::1]"], six),
            (&["[2001:db8::1]:80"], six),
            (&["2001:DB8:0::1"], six),
            (&[""], None),
            (&["1.2.3.4,"], None),
            (&["1.2.3.4", ""], None),
            (&["1.2.3.4", "unknown"], None),
            (&["1.2.3"], None),
            (&["1.2.3.4.5"], None),
            (&["01.2.3.4"], None),
            (&["1.2.3.4:"], None),
            (&["1.2.3.4:99999"], None),
            (&["[1.2.3.4]x"], None),
            (&["[2001:db8::1"], None),
            (&["2001:db8::1]"], None),
            (&["[[2001:db8::1]]"], None),
            (&["fe80::1%eth0"], None),
            (&["\"1.2.3.4\""], None),
            (&["1.2.3.4 5.6.7.8"], None),
            (&["\u{e9}"], None),
        ] {
            let headers: String = values.iter().map(|value| format!("X-Forwarded-For: {value}\r\n")).collect();
            let (head, out) = accepted(get(&headers));
            assert_eq!((head.forwarded_for, &*out), (expected, "GET / HTTP/1.1\r\nhost: h\r\n"), "{values:?}");
        }
        for (values, expected) in [
            (&["https"][..], Some(true)),
            (&["HTTPS"], Some(true)),
            (&["http"], Some(false)),
            (&["http, https"], Some(true)),
            (&["https", "http"], Some(false)),
            (&["https", "x"], None),
            (&["https,"], None),
            (&[""], None),
            (&["wss"], None),
        ] {
            let headers: String = values.iter().map(|value| format!("X-Forwarded-Proto: {value}\r\n")).collect();
            let (head, out) = accepted(get(&headers));
            assert_eq!((head.forwarded_https, &*out), (expected, "GET / HTTP/1.1\r\nhost: h\r\n"), "{values:?}");
        }
    }

    #[test]
    fn what_a_proxy_says_is_taken_from_a_trusted_one_alone() {
        let of_client = "GET / HTTP/1.1\r\nhost: h\r\n";
        for (said, passed) in [
            ("X-Forwarded-Host: Rack.example:8443\r\n", "x-forwarded-host: Rack.example:8443\r\n"),
            (
                "X-Forwarded-Host: evil, a.example\r\nX-Request-ID: a-1\r\n",
                "x-forwarded-host: a.example\r\nx-request-id: a-1\r\n",
            ),
            ("X-Forwarded-Host: a\r\nX-Forwarded-Host: b\r\n", "x-forwarded-host: b\r\n"),
            ("X-Forwarded-Host: a b\r\nX-Request-ID: a b\r\n", ""),
            ("X-Forwarded-Host:\r\nX-Request-ID:\r\n", ""),
            ("X-Request-ID: a\r\nX-Request-ID: a\r\n", ""),
            ("x_request_id: a\r\nx_forwarded_host: a\r\n", ""),
            ("Connection: x-request-id\r\nX-Request-ID: a\r\n", "x-request-id: a\r\n"),
        ] {
            let more = "X-Forwarded-For: 192.0.2.7\r\nX-Forwarded-Proto: https\r\n";
            let (head, out) = accepted(get(&[said, more].concat()));
            assert_eq!(out, [of_client, passed].concat(), "{said}");
            assert_eq!((head.forwarded_for, head.forwarded_https), (Some([192, 0, 2, 7].into()), Some(true)));
            let mut out = Vec::new();
            let (head, _) = read(get(&[said, more].concat()).as_bytes(), LIMITS, None, &mut 0, &mut out).unwrap().unwrap();
            assert_eq!((head.forwarded_for, head.forwarded_https, &*out), (None, None, of_client.as_bytes()), "{said}");
        }
    }

    #[test]
    fn what_follows_a_head_is_left_alone() {
        let input = [post("Content-Length: 3\r\n"), "\n\0\r".into(), get("")].concat();
        let (_, used, _) = read_once(input.as_bytes(), LIMITS, &mut 0).unwrap().unwrap();
        assert_eq!(&input[used..used + 3], "\n\0\r");
    }

    /// Requests that are mostly good, of the parts that matter.
    fn requests() -> impl Strategy<Value = Vec<u8>> {
        let line = prop_oneof![
            8 => "(GET|POST|HEAD|X-[a-z]{1,5}) /[!-\"$-~]{0,20} HTTP/1\\.[01]\r\n",
            1 => "GET https?://[a-zA-Z0-9.:-]{1,9}[/?][!-\"$-~]{0,20} HTTP/1\\.1\r\n",
            1 => "[A-Z]{1,4} ?[ -~]{0,9} HTTP/[0-9.]{1,3}\r\n",
        ]
        .prop_map(String::into_bytes);
        let value = prop::collection::vec(prop_oneof![9 => 0x20..=0x7eu8, 1 => 0x80..=0xffu8, 1 => Just(b'\t')], 0..20);
        let free = ("[A-Za-z!#$%&'*+.^_`|~-]{1,12}", "[ \t]{0,2}", value).prop_map(|(name, space, value)| {
            [name.as_bytes(), b":", space.as_bytes(), &value, space.as_bytes(), b"\r\n"].concat()
        });
        let known = "(Connection: (close|keep-alive|A, [a-c]|[A-C],,)|[A-C]: [a-c]|Content-Length: [0-9]{1,3}\
            |Transfer-Encoding: chunked|Expect: 100-continue|X-Forwarded-For: [0-9.:, ]{0,9}|X[-_]Plugrack[-a-z]{0,4}: [a-z]\
            |TE: trailers|Upgrade: h2c|Forwarded: a)\r\n";
        let headers = prop::collection::vec(prop_oneof![free, known.prop_map(String::into_bytes)], 0..8);
        (line, headers, any::<prop::sample::Index>()).prop_map(|(line, mut headers, place)| {
            headers.insert(place.index(headers.len() + 1), b"Host: example.com\r\n".to_vec());
            [line, headers.concat(), b"\r\n".to_vec()].concat()
        })
    }

    proptest! {
        #[test]
        fn what_is_accepted_is_canonical(input in requests()) {
            fuzzing::head(&input);
        }

        #[test]
        fn no_bytes_are_too_strange(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            fuzzing::head(&bytes);
        }

        #[test]
        fn a_broken_request_is_read_alike_however_it_arrives(
            mut input in requests(),
            at in any::<prop::sample::Index>(),
            byte in prop_oneof![any::<u8>(), Just(b'\r'), Just(b'\n'), Just(b' '), Just(b':')],
        ) {
            let at = at.index(input.len());
            input[at] = byte;
            fuzzing::head(&input);
        }
    }
}
