//! The head of a script's answer (RFC 3875, section 6). Pure.

use crate::apps::http_connection::MAX_HEAD;
use crate::apps::http_connection::head::{Fields, is_whole_head, response_lines};
use crate::http::framing::ResponseHead;
use crate::http::prefix::Mount;
use crate::util::escape;

/// Most header lines of an answer, as of an application's response.
const MAX_HEADERS: usize = 256;

/// Longest excerpt of an answer in messages, in bytes.
const EXCERPT: usize = 60;

/// The head of an answer.
#[derive(Debug)]
pub(crate) struct Head {
    pub(crate) response: ResponseHead,
    /// Whether it is a stream of server-sent events.
    pub(crate) events: bool,
    /// Its size in the output, in bytes.
    pub(crate) size: usize,
}

/// Whether [`read`] has something to say about this output.
pub(crate) fn is_due(output: &[u8]) -> bool {
    output.len() > MAX_HEAD || is_whole_head(output) || output.starts_with(b"\n") || output.starts_with(b"\r\n")
}

/// Reads the head at the beginning of a script's output, which must be [due](is_due). `mount` maps its references.
///
/// # Errors
/// What is wrong with it, as a sentence about the script.
pub(crate) fn read(output: &[u8], mount: Option<Mount<'_>>) -> Result<Head, String> {
    let excerpt = || {
        let mut text = String::new();
        escape::escape(&mut text, &output[..output.len().min(EXCERPT)]);
        text
    };
    if output.starts_with(b"HTTP/") {
        return Err(format!(
            "its answer begins with the status line \"{}\", which is the server's to write: say Status: CODE",
            excerpt().split("\\x0").next().unwrap_or_default()
        ));
    }
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let (size, headers) = match httparse::parse_headers(&output[..output.len().min(MAX_HEAD)], &mut headers) {
        Ok(httparse::Status::Complete(parsed)) => parsed,
        Ok(httparse::Status::Partial) => return Err(format!("the head of its answer has more than {MAX_HEAD} bytes")),
        Err(httparse::Error::TooManyHeaders) => return Err(format!("its answer has more than {MAX_HEADERS} header lines")),
        Err(error) => {
            let what = "its answer must begin with header lines, such as Content-Type, and an empty line";
            return Err(format!("{what} ({error}), and begins with \"{}\"", excerpt()));
        }
    };
    if headers.is_empty() {
        return Err("its answer has no header line, such as Content-Type, before the empty line".into());
    }
    let fields = Fields::read(headers)?;
    if fields.is_chunked {
        return Err("its answer has transfer-encoding, which is the server's to choose".into());
    }
    let (mut status, mut reason, mut redirects) = (None, None, false);
    for header in headers {
        redirects |= header.name.eq_ignore_ascii_case("location");
        if header.name.eq_ignore_ascii_case("status") {
            let value = std::str::from_utf8(header.value).unwrap_or_default().trim();
            let (code, words) = value.split_once(' ').unwrap_or((value, ""));
            let code = code.parse().ok().filter(|code| (200..=599).contains(code) && status.is_none());
            let why = || format!("its status is \"{}\", and must be one number from 200 to 599", value.escape_debug());
            status = Some(code.ok_or_else(why)?);
            reason = Some(words).filter(|words| !words.is_empty());
        }
    }
    // A redirect needs no status (section 6.2.3).
    let status = status.unwrap_or(if redirects { 302 } else { 200 });
    let canonical = ::http::StatusCode::from_u16(status).ok().and_then(|status| status.canonical_reason());
    let passed: Vec<_> = headers.iter().copied().filter(|header| !header.name.eq_ignore_ascii_case("status")).collect();
    let lines = response_lines(status, reason.or(canonical), &passed, mount, true);
    let length = if status == 204 { None } else { fields.length };
    Ok(Head { response: ResponseHead { status, lines, length }, events: fields.is_events, size })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(output: &str) -> Result<(u16, String, Option<u64>, String), String> {
        assert!(is_due(output.as_bytes()), "{output:?}");
        let head = read(output.as_bytes(), Some(Mount { route: "/wiki", host: "h" }))?;
        let lines = String::from_utf8(head.response.lines).unwrap();
        let (lines, date) = lines.rsplit_once("date: ").unwrap();
        assert!(date.ends_with(" GMT\r\n"));
        Ok((head.response.status, lines.to_owned(), head.response.length, output[head.size..].to_owned()))
    }

    #[test]
    fn an_answer_has_a_status_line_and_the_headers_of_the_script() {
        for (output, status, lines, length, rest) in [
            ("Content-Type: text/plain\n\nbody", 200, "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n", None, "body"),
            (
                "Status: 404 Not here\r\nContent-Length: 4\r\nX-A: b\r\n\r\nbody",
                404,
                "HTTP/1.1 404 Not here\r\nx-a: b\r\n",
                Some(4),
                "body",
            ),
            ("status:503\nx:y\n\n", 503, "HTTP/1.1 503 Service Unavailable\r\nx: y\r\n", None, ""),
            ("Location: /page\n\n", 302, "HTTP/1.1 302 Found\r\nlocation: /wiki/page\r\n", None, ""),
            ("Location: /wiki/page\n\n", 302, "HTTP/1.1 302 Found\r\nlocation: /wiki/page\r\n", None, ""),
            ("Location: http://a/\n\n", 302, "HTTP/1.1 302 Found\r\nlocation: http://a/\r\n", None, ""),
            ("Location: /x\nStatus: 201 Made\n\n", 201, "HTTP/1.1 201 Made\r\nlocation: /wiki/x\r\n", None, ""),
            ("Status: 204\nContent-Length: 0\n\n", 204, "HTTP/1.1 204 No Content\r\n", None, ""),
            ("A: b\nConnection: x-hop\nX-Hop: 1\nKeep-Alive: 5\n\n", 200, "HTTP/1.1 200 OK\r\na: b\r\n", None, ""),
        ] {
            assert_eq!(read_text(output), Ok((status, lines.into(), length, rest.into())), "{output}");
        }
        assert!(read(b"Content-Type: text/event-stream\n\n", None).unwrap().events);
        assert!(!is_due(b"Content-Type: text/plain\n") && !is_due(b""));
    }

    #[test]
    fn an_answer_that_is_none_has_a_reason() {
        let many = "a: b\n".repeat(MAX_HEADERS + 1) + "\n";
        let large = format!("a: {}", "x".repeat(MAX_HEAD));
        for (output, why) in [
            ("HTTP/1.1 200 OK\nA: b\n\n", "say Status"),
            ("Hello, world\n\n", "must begin with header lines"),
            ("<html>\n\n", "and begins with \"<html>"),
            ("\nbody", "no header line"),
            ("\r\nbody", "no header line"),
            ("Status: 99\n\n", "must be one number from 200 to 599"),
            ("Status: 100 Continue\n\n", "must be one number"),
            ("Status: ok\n\n", "must be one number"),
            ("Status: 200\nStatus: 404\n\n", "must be one number"),
            ("Content-Length: 5x\n\n", "content-length"),
            ("Content-Length: 5\nContent-Length: 6\n\n", "two values"),
            ("Transfer-Encoding: chunked\n\n", "transfer-encoding"),
            ("a b: c\n\n", "must begin with header lines"),
            (&many, "more than 256 header lines"),
            (&large, "more than 65536 bytes"),
        ] {
            let read = read_text(output);
            assert!(read.as_ref().is_err_and(|error| error.contains(why)), "{why}: {read:?}");
        }
    }
}
