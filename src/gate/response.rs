//! The head of an answer as it comes from the HTTP library behind the gate. Pure.
//!
//! A plugin has a word in what that library writes, so this is checked like what comes from outside: what a client could read
//! in two ways never leaves. What is for one hop is taken away, since the gate frames the body in words of its own. What is
//! refused: control characters, statuses that end no request, and any doubt about the length of the body.

use super::head::{MAX_HEADERS, is_value, number};
use memchr::{memchr, memchr_iter};
use std::io::Write;

/// Most bytes of a head up to its end, the blank line included: more than a frame's head can hold of headers, so only garbage is
/// over it.
const MAX_HEAD: usize = 256 * 1024;

/// The headers of this hop, and those the gate writes itself.
const LEFT_OUT: [&str; 6] = ["connection", "keep-alive", "transfer-encoding", "content-length", "upgrade", "trailer"];

/// By this header the host tells the gate the length of a body that comes chunked on this hop.
const DECLARED_LENGTH: &str = "x-plugrack-length";

/// How the headers begin that host and gate have for each other.
const OURS: &str = "x-plugrack";

/// Status of an answer that has no body and says nothing of one.
const NO_CONTENT: u16 = 204;

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

/// What the request says of how its answer is framed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Terms {
    /// Its method was `HEAD`.
    pub(crate) head: bool,
    /// It came with HTTP/1.0.
    pub(crate) old: bool,
    /// The connection ends after the answer.
    pub(crate) last: bool,
}

/// How an answer goes to its client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Framed {
    /// Its body goes in chunks.
    pub(crate) chunked: bool,
    /// The connection ends after it.
    pub(crate) last: bool,
}

/// Ends the head of an answer with the lines that frame it, and an empty one.
pub(crate) fn frame(head: &mut Vec<u8>, answer: &Answer, terms: Terms) -> Framed {
    let has_body = answer.has_body(terms.head);
    let mut framed = Framed { chunked: false, last: terms.last };
    if answer.status == NO_CONTENT {
        // It has no length, not even none (RFC 9110, section 8.6).
    } else if let Some(length) = answer.length {
        put(head, format_args!("content-length: {length}\r\n"));
    } else if has_body && !terms.old {
        framed.chunked = true;
        head.extend_from_slice(b"transfer-encoding: chunked\r\n");
    } else if has_body {
        // An old client sees the end of the body by that of the connection.
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

/// Appends the line that stands before a chunk of so many bytes.
pub(crate) fn put_size(out: &mut Vec<u8>, bytes: usize) {
    put(out, format_args!("{bytes:x}\r\n"));
}

/// Appends text.
pub(super) fn put(out: &mut Vec<u8>, text: std::fmt::Arguments<'_>) {
    // Nothing fails in memory.
    out.write_fmt(text).unwrap_or_default();
}

/// Why an answer must not leave.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Malformed(pub(crate) &'static str);

/// Reads one answer's head from the beginning of `input`, and appends to `out` what is passed on of it: status line and headers,
/// each with its line end, but no blank line. Also says how many bytes it took.
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

#[cfg(test)]
mod tests {
    use super::super::fuzzing;
    use super::*;
    use proptest::prelude::*;

    type Outcome = Result<Option<(Answer, usize, Vec<u8>)>, Malformed>;

    fn read_once(input: &[u8], searched: &mut usize) -> Outcome {
        let mut out = b"before".to_vec();
        let outcome = read(input, searched, &mut out);
        let written = out.strip_prefix(b"before").unwrap();
        match outcome {
            Ok(Some((answer, used))) => Ok(Some((answer, used, written.to_vec()))),
            other => {
                assert_eq!(written, b"", "written, though no head was read");
                other.map(|_| None)
            }
        }
    }

    /// What comes of the input when it arrives whole, in two pieces, and byte by byte: the same, or this fails.
    fn read_all(input: impl AsRef<[u8]>) -> Outcome {
        let input = input.as_ref();
        let whole = read_once(input, &mut 0);
        for cut in 0..input.len() {
            let mut searched = 0;
            let first = read_once(&input[..cut], &mut searched);
            let outcome = if first == Ok(None) { read_once(input, &mut searched) } else { first };
            assert_eq!(outcome, whole, "cut after {cut} bytes of {:?}", input.escape_ascii().to_string());
        }
        let mut searched = 0;
        let outcomes = (0..=input.len()).map(|end| read_once(&input[..end], &mut searched));
        let dripped = outcomes.into_iter().find(|outcome| *outcome != Ok(None)).unwrap_or(Ok(None));
        assert_eq!(dripped, whole, "byte by byte, {:?}", input.escape_ascii().to_string());
        whole
    }

    #[track_caller]
    fn accepted(input: impl AsRef<[u8]>) -> (Answer, String) {
        let input = input.as_ref();
        let (answer, used, out) = read_all([input, b"rest"].concat()).unwrap().unwrap();
        assert_eq!(used, input.len());
        (answer, out.iter().map(|&byte| char::from(byte)).collect())
    }

    #[track_caller]
    fn assert_malformed(input: impl AsRef<[u8]>) {
        let shown = input.as_ref().escape_ascii().to_string();
        let Malformed(message) = read_all(input).expect_err(&shown);
        assert!(!message.is_empty() && !message.ends_with('.'), "{message}");
    }

    fn ok(headers: &str) -> String {
        format!("HTTP/1.1 200 OK\r\n{headers}\r\n")
    }

    #[test]
    fn an_ordinary_answer() {
        let input = "HTTP/1.1 404 Not Found\r\nServer: tiny-http (Rust)\r\nDate: now\r\nContent-Type: text/plain \r\nX-A:\r\n\
            Set-Cookie: a\r\nSet-Cookie: b\r\nContent-Length: 12\r\n\r\n";
        let (answer, out) = accepted(input);
        assert_eq!(answer, Answer { status: 404, length: Some(12), chunked: false, close: false });
        assert_eq!(
            out,
            "HTTP/1.1 404 Not Found\r\nDate: now\r\nContent-Type: text/plain\r\nX-A: \r\nSet-Cookie: a\r\nSet-Cookie: b\r\n"
        );
    }

    #[test]
    fn an_answer_that_is_not_complete_waits() {
        let whole = ok("A: b\r\n");
        for end in 0..whole.len() {
            assert_eq!(read_all(&whole[..end]), Ok(None), "{end}");
        }
    }

    #[test]
    fn what_is_for_one_hop_stays_here() {
        for header in [
            "CONNECTION: a",
            "Keep-Alive: timeout=5",
            "Transfer-Encoding: chunked",
            "content-length: 5",
            "Upgrade: h2c",
            "Trailer: a",
            "server: tiny-http (Rust)",
            "X-Plugrack-Length: 5",
            "x-plugrack: a",
            "X-PlugrackX: a",
        ] {
            assert_eq!(
                accepted(ok(&format!("A: b\r\n{header}\r\nC: d\r\n"))).1,
                "HTTP/1.1 200 OK\r\nA: b\r\nC: d\r\n",
                "{header}"
            );
        }
        for header in ["Server: nginx", "Server: tiny-http (Rust) ", "X-Plugrac: a", "Trailers: a", "A: tiny-http (Rust)"] {
            let out = accepted(ok(&format!("{header}\r\n"))).1;
            assert_eq!(out.contains(header), !header.ends_with(' '), "{out}");
        }
    }

    #[test]
    fn the_body_is_framed_by_one_length_or_chunks() {
        let answer = |headers: &str| accepted(ok(headers)).0;
        let expected = |length, chunked| Answer { status: 200, length, chunked, close: false };
        assert_eq!(answer(""), expected(None, false));
        assert_eq!(answer("content-LENGTH: 0\r\n"), expected(Some(0), false));
        assert_eq!(answer("Content-Length: 9999999999999999999\r\n"), expected(Some(9_999_999_999_999_999_999), false));
        assert_eq!(answer("Transfer-Encoding: Chunked\r\n"), expected(None, true));
        assert_eq!(answer("Transfer-Encoding: chunked\r\nX-Plugrack-Length: 70000\r\n"), expected(Some(70_000), true));
        assert_eq!(answer("x-plugrack-length: 7\r\n"), expected(Some(7), false));
        for name in ["Content-Length", "x-plugrack-length"] {
            for value in ["", "+1", "-1", "1,1", "0x1", "1 1", "a", "00000000000000000001", "18446744073709551616"] {
                assert_malformed(ok(&format!("{name}: {value}\r\n")));
            }
            assert_malformed(ok(&format!("{name}: 1\r\nContent-Length: 1\r\n")));
            assert_malformed(ok(&format!("{name}: 1\r\nX-PLUGRACK-LENGTH: 2\r\n")));
        }
        assert_malformed(ok("Content-Length: 1\r\nTransfer-Encoding: chunked\r\n"));
        assert_malformed(ok("Transfer-Encoding: chunked\r\nContent-Length: 1\r\n"));
        assert_malformed(ok("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n"));
        for value in ["", "identity", "gzip, chunked", "chunked, chunked", "xchunked", "chunked;a"] {
            assert_malformed(ok(&format!("Transfer-Encoding: {value}\r\n")));
        }
    }

    #[test]
    fn the_other_side_may_end_the_connection() {
        for (value, close) in
            [("close", true), ("Close", true), ("a, close", true), ("keep-alive", false), ("", false), ("closed", false)]
        {
            assert_eq!(accepted(ok(&format!("Connection: {value}\r\n"))).0.close, close, "{value}");
        }
        assert!(accepted(ok("Connection: close\r\nConnection: a\r\n")).0.close);
    }

    #[test]
    fn statuses_are_those_that_end_a_request_or_precede_an_answer() {
        for status in 0..1200u16 {
            let input = format!("HTTP/1.1 {status:03} Reason\r\nA: b\r\n\r\n");
            match status {
                100..=199 => assert_eq!((accepted(&input).0.status, &*accepted(&input).1), (status, "")),
                200..=599 => {
                    let (answer, out) = accepted(&input);
                    assert_eq!((answer.status, out), (status, format!("HTTP/1.1 {status} Reason\r\nA: b\r\n")));
                }
                _ => assert_malformed(&input),
            }
        }
        for head_request in [false, true] {
            for status in 100..600 {
                let answer = Answer { status, length: Some(5), chunked: false, close: false };
                assert_eq!(answer.has_body(head_request), !head_request && status >= 200 && status != 204 && status != 304);
            }
        }
    }

    #[test]
    fn the_status_line_is_that_of_http_1() {
        for (line, expected) in [
            ("HTTP/1.1 200 OK", "HTTP/1.1 200 OK"),
            ("HTTP/1.0 200 OK", "HTTP/1.1 200 OK"),
            ("HTTP/1.1 200 ", "HTTP/1.1 200 "),
            ("HTTP/1.1 200", "HTTP/1.1 200 "),
            ("HTTP/1.1 200  a\tb", "HTTP/1.1 200  a\tb"),
        ] {
            assert_eq!(accepted(format!("{line}\r\n\r\n")).1, format!("{expected}\r\n"));
        }
        for line in [
            "",
            "HTTP/1.1",
            "HTTP/1.1 ",
            "HTTP/1.1 20",
            "HTTP/1.1 2000 OK",
            "HTTP/1.1 200OK",
            "HTTP/1.1  200 OK",
            "HTTP/1.1 +20 OK",
            "HTTP/1.1 2a0 OK",
            "HTTP/2 200",
            "HTTP/2.0 200 OK",
            "HTTP/1.2 200 OK",
            "http/1.1 200 OK",
            " HTTP/1.1 200 OK",
            "ICY 200 OK",
            "HTTP/1.1\t200 OK",
            "HTTP/1.1 200 a\0b",
            "HTTP/1.1 200 a\x7f",
            "HTTP/1.1 200 a\rb",
            "HTTP/1.1 200 \x1b[2J",
        ] {
            assert_malformed(format!("{line}\r\nA: b\r\n\r\n"));
        }
    }

    #[test]
    fn lines_end_with_crlf_and_hold_no_control_characters() {
        let whole = ok("A: b\r\nC: d\r\n");
        for at in 0..whole.len() - 1 {
            assert_malformed([&whole[..at], "\n", &whole[at..]].concat());
            assert_malformed([&whole[..at], "\r", &whole[at..], "\r\n\r\n"].concat());
            assert_malformed([&whole[..at], "\0", &whole[at..], "\r\n\r\n"].concat());
        }
        for byte in 0..=255u8 {
            let value = [b"HTTP/1.1 200 OK\r\nA: b", &[byte][..], b"c\r\n\r\n"].concat();
            if is_value(byte) {
                assert_eq!(accepted(&value).1, format!("HTTP/1.1 200 OK\r\nA: b{}c\r\n", char::from(byte)));
            } else {
                assert_malformed(&value);
            }
            let name = [b"HTTP/1.1 200 OK\r\nA", &[byte][..], b"B: c\r\n\r\n"].concat();
            if super::super::head::is_token(byte) || byte == b':' { drop(accepted(&name)) } else { assert_malformed(&name) }
        }
        for line in [" A: b", "A : b", ": b", "A", "A: b\r\n c"] {
            assert_malformed(ok(&format!("{line}\r\n")));
        }
    }

    #[test]
    fn a_head_has_limits() {
        let sized = |length: usize| ok(&format!("A: {}\r\n", "x".repeat(length - ok("A: \r\n").len())));
        assert!(read_once(sized(MAX_HEAD).as_bytes(), &mut 0).unwrap().is_some());
        assert!(read_once(sized(MAX_HEAD + 1).as_bytes(), &mut 0).is_err());
        assert_eq!(read_once(&sized(MAX_HEAD + 1).as_bytes()[..MAX_HEAD - 1], &mut 0), Ok(None));
        assert!(read_once(&sized(MAX_HEAD + 1).as_bytes()[..MAX_HEAD], &mut 0).is_err());
        let counted = |count: usize| read_once(ok(&"A: b\r\n".repeat(count)).as_bytes(), &mut 0);
        assert!(counted(MAX_HEADERS).unwrap().is_some());
        assert!(counted(MAX_HEADERS + 1).is_err());
    }

    proptest! {
        #[test]
        fn what_is_passed_on_is_read_as_itself(
            status in 200u16..600,
            reason in "[ -~\t]{0,12}",
            headers in prop::collection::vec(prop_oneof![
                "[A-Za-z!#$%&'*+.^_`|~-]{1,9}:[ -~\t]{0,20}",
                "(Connection: close|Server: tiny-http \\(Rust\\)|X-Plugrack-[a-z]: [a-z]|Trailer: a|Content-Length: [0-9])",
            ], 0..6),
        ) {
            let headers: String = headers.iter().map(|line| format!("{line}\r\n")).collect();
            fuzzing::response(format!("HTTP/1.1 {status} {reason}\r\n{headers}\r\n").as_bytes());
        }

        #[test]
        fn no_bytes_are_too_strange(bytes in prop::collection::vec(any::<u8>(), 0..200), known in any::<bool>()) {
            let input = if known { [b"HTTP/1.1 200 OK\r\nA: ", &bytes[..]].concat() } else { bytes };
            fuzzing::response(&input);
        }
    }
}
