//! The host's own error responses, rendered as JSON for programs or as a page for browsers.
//!
//! This is the only table of them. Errors in a request's head are in [`super::parse::request_head`].

use super::date;
use super::error_page;
use super::framing::{put_header, status_line};
use super::http_error::HttpError;
use super::websocket;

/// `retry-after` in seconds if something is full. It usually empties quickly.
const FULL_RETRY_AFTER: u64 = 1;

const fn overloaded(message: &'static str) -> HttpError {
    HttpError::new(503, "overloaded", message).retry_after(FULL_RETRY_AFTER)
}

/// The head of the request ended early.
pub(crate) const BAD_HEAD: HttpError = HttpError::new(400, "bad_request", "the request's head did not come whole");

/// The body of the request ended early, or broke its framing.
pub(crate) const BAD_BODY: HttpError =
    HttpError::new(400, "bad_request", "the request's body did not come whole, or its length or its chunks are not well formed");

/// A client speaks plain HTTP to a port that speaks TLS.
pub(crate) const PLAIN_HTTP: HttpError =
    HttpError::new(400, "https_required", "this port speaks HTTPS: use an address that begins with https://");

/// A client asks for WebSocket without a proper key.
pub(crate) const WEBSOCKET_KEY: HttpError = HttpError::new(400, "bad_request", "sec-websocket-key must be 16 bytes in base64");

/// A page of another site asks for WebSocket.
pub(crate) const FOREIGN_ORIGIN: HttpError =
    HttpError::new(403, "forbidden", "pages of the origin that the request names may not use this plugin by WebSocket");

/// A file of a static site cannot be opened by the host.
pub(crate) const UNREADABLE: HttpError = HttpError::new(403, "forbidden", "this file cannot be read");

/// No route matches the path, or the plugin has nothing there.
pub(crate) const NOT_FOUND: HttpError = HttpError::new(404, "not_found", "there is nothing at this path");

/// The host's own pages are read-only.
pub(crate) const METHOD_NOT_ALLOWED: HttpError = HttpError::new(405, "method_not_allowed", "only GET and HEAD are answered here");

/// A static site has only files to read.
pub(crate) const FILES_ARE_READ_ONLY: HttpError =
    HttpError::new(405, "method_not_allowed", "only GET, HEAD and OPTIONS are answered here");

/// The head took longer than `--head-timeout`.
pub(crate) const SLOW_HEAD: HttpError = HttpError::new(408, "timeout", "the request's head did not come in time");

/// The body was slower than `--min-rate`, or nothing arrived for `--body-timeout`.
pub(crate) const SLOW_BODY: HttpError = HttpError::new(408, "timeout", "the request's body came too slowly");

/// The body is chunked and large, and the plugin must know its length beforehand, as by FastCGI.
pub(crate) const LENGTH_REQUIRED: HttpError =
    HttpError::new(411, "length_required", "this plugin takes a large body only with content-length");

/// `if-match` or `if-unmodified-since` does not hold for a file of a static site.
pub(crate) const PRECONDITION_FAILED: HttpError =
    HttpError::new(412, "precondition_failed", "the file is not the one that the request's condition names");

/// The body is larger than `--max-body`.
pub(crate) const TOO_LARGE: HttpError = HttpError::new(413, "too_large", "the request's body is over the limit of this site");

/// The range of the request is behind the end of a file of a static site.
pub(crate) const RANGE_NOT_SATISFIABLE: HttpError =
    HttpError::new(416, "range_not_satisfiable", "the file does not have the range that the request asks for");

/// The host of the request is neither a plugin's nor one of the host's own (`--only-known-hosts`).
pub(crate) const MISDIRECTED: HttpError =
    HttpError::new(421, "misdirected_request", "this site does not answer for the host of the request");

/// A client asks for another version of WebSocket.
pub(crate) const WEBSOCKET_VERSION: HttpError = HttpError::new(426, "upgrade_required", "sec-websocket-version must be 13");

/// The head does not fit in a message to a plugin.
pub(crate) const HEAD_TOO_LARGE: HttpError =
    HttpError::new(431, "head_too_large", "the request's target and headers are over the limit of 64 KiB that a plugin is sent");

/// The plugin broke the protocol, answered with an error, or its connection was lost.
pub(crate) const BAD_GATEWAY: HttpError =
    HttpError::new(502, "bad_gateway", "the plugin gave no valid answer; its log has the reason");

/// The queue of the plugin or of the API is full.
pub(crate) const CROWDED: HttpError = overloaded("too many requests are waiting");

/// There are `--max-connections` connections.
pub(crate) const FULL: HttpError = overloaded("there are too many connections");

/// The plugin holds `--max-connections-per-plugin` connections.
pub(crate) const PLUGIN_FULL: HttpError = overloaded("the plugin holds too many connections");

/// Streams occupy every connection of the plugin.
pub(crate) const STREAMS_FULL: HttpError = overloaded("all of the plugin's connections are taken by streams");

/// `--max-tunnels` are open.
pub(crate) const TUNNELS_FULL: HttpError = overloaded("the host has too many tunnels open");

/// The client behind a proxy has `--max-connections-per-address` requests under way.
pub(crate) const ADDRESS_FULL: HttpError = overloaded("the client's address has too many requests under way");

/// There is no memory and no disk space for the body.
pub(crate) const NO_ROOM: HttpError = overloaded("there is no room for the request's body now");

/// The system has no more open files, or no memory to open one.
pub(crate) const NO_FILES: HttpError = overloaded("too many files are open now");

/// A file of a static site became shorter, or was replaced, before the first byte was sent.
pub(crate) const FILE_CHANGED: HttpError =
    HttpError::new(503, "file_changed", "the file changed while it was read").retry_after(FULL_RETRY_AFTER);

/// The plugin is not running. Callers add the `retry-after` of its state.
pub(crate) const UNAVAILABLE: HttpError = HttpError::new(503, "unavailable", "the plugin is not available now");

/// The host is stopping.
pub(crate) const STOPPING: HttpError = HttpError::new(503, "unavailable", "the host is stopping").retry_after(FULL_RETRY_AFTER);

/// The plugin did not begin an answer within its `request_timeout`.
pub(crate) const TIMEOUT: HttpError = HttpError::new(504, "timeout", "the plugin did not answer in time");

/// No answer began, although every timeout has passed: a fault of the host.
pub(crate) const NO_ANSWER: HttpError = HttpError::new(504, "timeout", "no answer began in time");

/// The disk is full.
pub(crate) const NO_SPACE: HttpError =
    HttpError::new(507, "no_space", "there is no space left on the disk for the request's body");

/// The value of `allow` for the files of a static site.
pub(crate) const FILE_METHODS: &str = "GET, HEAD, OPTIONS";

/// The value of `allow` for `OPTIONS *` and for methods that the host never accepts.
pub(crate) const METHODS: &str = "GET, HEAD, POST, PUT, DELETE, PATCH, OPTIONS";

/// What decides how an error is rendered for a client.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Audience<'a> {
    /// The client prefers HTML to JSON, as browsers do.
    pub(crate) html: bool,
    /// The method is `GET` or `HEAD`, so that a browser may repeat the request by itself.
    pub(crate) is_safe: bool,
    /// The request's id, if it has one.
    pub(crate) id: Option<&'a str>,
}

/// The JSON of an error, with a line end.
pub(crate) fn json(code: &str, message: &str) -> String {
    let mut body = serde_json::json!({"error": {"code": code, "message": message}}).to_string();
    body.push('\n');
    body
}

/// Renders an error as the client prefers it, as JSON if nothing is known of the client. Returns the status line and headers without those
/// of the framing, and the body.
pub(crate) fn render(error: HttpError, audience: Option<Audience<'_>>) -> (Vec<u8>, String) {
    let mut head = status_line(error.status);
    date::put_line(&mut head);
    let mut put = |name: &str, value: &str| put_header(&mut head, name, value);
    let body = match audience {
        Some(audience) if audience.html => {
            put("content-type", "text/html; charset=utf-8");
            error_page::HEADERS.into_iter().for_each(|(name, value)| put(name, value));
            error_page::render(error, audience)
        }
        _ => {
            put("content-type", "application/json");
            json(error.code, error.message)
        }
    };
    put("cache-control", "no-store");
    if audience.is_some() {
        put("vary", "accept");
    }
    if let Some(seconds) = error.retry_after {
        put("retry-after", &seconds.to_string());
    }
    if error == WEBSOCKET_VERSION {
        put("upgrade", "websocket");
        put("sec-websocket-version", websocket::VERSION);
    }
    if error.status == 405 {
        let methods = match error {
            METHOD_NOT_ALLOWED => "GET, HEAD",
            FILES_ARE_READ_ONLY => FILE_METHODS,
            _ => METHODS,
        };
        put("allow", methods);
    }
    (head, body)
}

/// The complete answer as on the wire, with `connection: close`.
pub(crate) fn last_answer(error: HttpError, head_request: bool, audience: Option<Audience<'_>>) -> Vec<u8> {
    let (mut out, body) = render(error, audience);
    out.extend_from_slice(format!("connection: close\r\ncontent-length: {}\r\n\r\n", body.len()).as_bytes());
    if !head_request {
        out.extend_from_slice(body.as_bytes());
    }
    out
}

/// Limit of media ranges read from an `accept`. Browsers send up to eight.
const MAX_RANGES: usize = 32;

/// Whether a client with these `accept` values, in order, prefers HTML to JSON. A client that names neither does not.
pub(crate) fn prefers_html<'a>(accept: impl IntoIterator<Item = &'a str>) -> bool {
    let (mut html, mut json) = (Wish::default(), Wish::default());
    let ranges = accept.into_iter().flat_map(|value| value.split(',')).take(MAX_RANGES);
    for (place, range) in ranges.enumerate() {
        let (kind, parameters) = range.split_once(';').unwrap_or((range, ""));
        let weight = weight(parameters);
        let is = |other: &str| kind.trim().eq_ignore_ascii_case(other);
        if is("text/html") || is("application/xhtml+xml") {
            html.name(weight, place);
        } else if is("application/json") {
            json.name(weight, place);
        } else if is("application/*") || is("*/*") {
            json.include(weight);
        }
    }
    // With equal weights a named type wins over a pattern, and the first named type over the others.
    let before = match (html.place, json.place) {
        (Some(html), Some(json)) => html < json,
        _ => true,
    };
    html.weight > 0 && (html.weight > json.weight || html.weight == json.weight && before)
}

/// A client's preference for a type.
#[derive(Default)]
struct Wish {
    /// The weight in thousandths.
    weight: u16,
    /// Its position, if it is named and not only included in a pattern.
    place: Option<usize>,
}

impl Wish {
    fn name(&mut self, weight: u16, place: usize) {
        self.weight = if self.place.is_some() { self.weight.max(weight) } else { weight };
        self.place = self.place.or(Some(place));
    }

    fn include(&mut self, weight: u16) {
        if self.place.is_none() {
            self.weight = self.weight.max(weight);
        }
    }
}

/// The weight among the parameters of a media range or a content coding (RFC 9110, section 12.4.2), in thousandths. A malformed weight counts as 0.
pub(crate) fn weight(parameters: &str) -> u16 {
    let given = parameters.split(';').find_map(|parameter| {
        let (name, value) = parameter.split_once('=')?;
        name.trim().eq_ignore_ascii_case("q").then_some(value.trim())
    });
    let Some(given) = given else { return 1000 };
    let (whole, fraction) = given.split_once('.').unwrap_or((given, ""));
    let is_fraction = fraction.len() <= 3 && fraction.bytes().all(|byte| byte.is_ascii_digit());
    match whole {
        "0" if is_fraction => format!("{fraction:0<3}").parse().unwrap_or(0),
        "1" if is_fraction => 1000,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn browsers_prefer_html_and_programs_do_not() {
        for accept in [
            "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
            "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8",
            "text/html, */*",
            "TEXT/HTML",
            "text/html;level=1;q=0.9, application/json;q=0.8",
            "text/html, application/json",
            "*/*;q=0.1, text/html;q=0.2",
            "application/xhtml+xml",
            "text/html ; Q=1.000",
        ] {
            assert!(prefers_html([accept]), "{accept}");
        }
        for accept in [
            "",
            "*/*",
            "text/*",
            "text/plain, */*",
            "application/json",
            "application/json, text/html",
            "application/json;q=0.5, text/html;q=0.50",
            "application/json, text/plain, */*",
            "text/html;q=0",
            "text/html;q=0.000, */*",
            "text/html;q=0.1, */*",
            "text/html;q=0.1, application/*;q=0.2",
            "text/html;q=x",
            "text/html;q=2",
            "text/html;q=0.9999",
            "text/htmlx",
            ",,,",
        ] {
            assert!(!prefers_html([accept]), "{accept}");
        }
        assert!(prefers_html(["image/png", "text/html"]));
        assert!(!prefers_html(std::iter::repeat_n("a/b", MAX_RANGES).chain(["text/html"])));
    }

    #[test]
    fn json_ends_with_a_line_end_and_no_setting_is_named() {
        for error in [
            BAD_HEAD,
            BAD_BODY,
            PLAIN_HTTP,
            UNREADABLE,
            NOT_FOUND,
            METHOD_NOT_ALLOWED,
            FILES_ARE_READ_ONLY,
            SLOW_HEAD,
            SLOW_BODY,
            PRECONDITION_FAILED,
            TOO_LARGE,
            RANGE_NOT_SATISFIABLE,
            MISDIRECTED,
            HEAD_TOO_LARGE,
            BAD_GATEWAY,
            CROWDED,
            FULL,
            PLUGIN_FULL,
            STREAMS_FULL,
            ADDRESS_FULL,
            NO_ROOM,
            NO_FILES,
            FILE_CHANGED,
            UNAVAILABLE,
            STOPPING,
            TIMEOUT,
            NO_ANSWER,
            NO_SPACE,
        ] {
            for html in [false, true] {
                let audience = Audience { html, is_safe: true, id: Some("1-2") };
                let (head, body) = render(error.retry_after(7), Some(audience));
                assert!(body.ends_with('\n') && !body.contains("serve") && !body.contains(" --"), "{body}");
                assert_eq!(body.starts_with("<!doctype html>"), html, "{body}");
                let head = String::from_utf8(head).unwrap();
                for line in ["vary: accept", "retry-after: 7", "cache-control: no-store"] {
                    assert!(head.contains(&format!("\r\n{line}\r\n")), "{head}");
                }
            }
            let whole = String::from_utf8(last_answer(error, false, None)).unwrap();
            let (head, body) = whole.split_once("\r\n\r\n").unwrap();
            assert!(head.contains("\r\ndate: ") && head.contains(&format!("\r\ncontent-length: {}", body.len())), "{head}");
            assert!(!head.contains("vary") && head.contains("\r\nretry-after: ") == error.retry_after.is_some(), "{head}");
            let bodiless = String::from_utf8(last_answer(error, true, None)).unwrap();
            assert!(bodiless.ends_with("\r\n\r\n") && bodiless.lines().count() == head.lines().count() + 1);
        }
    }
}
