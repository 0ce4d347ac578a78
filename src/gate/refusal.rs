//! The gate's own answers: why a request is not passed on.

use super::head::Refusal;

/// The client's head did not come whole.
pub(super) const BAD_HEAD: Refusal =
    Refusal { status: 400, code: "bad_request", message: "the request's head did not come whole" };

/// The client's body did not come whole, or broke its framing.
pub(super) const BAD_BODY: Refusal = Refusal {
    status: 400,
    code: "bad_request",
    message: "the request's body did not come whole, or its chunks are not well formed",
};

/// The head took too long.
pub(super) const SLOW_HEAD: Refusal =
    Refusal { status: 408, code: "timeout", message: "the request's head did not come in time (serve --head-timeout)" };

/// The body took too long.
pub(super) const SLOW_BODY: Refusal =
    Refusal { status: 408, code: "timeout", message: "the request's body came too slowly (serve --body-timeout, --min-rate)" };

/// The body is too large.
pub(super) const TOO_LARGE: Refusal =
    Refusal { status: 413, code: "too_large", message: "the request's body is over the limit (serve --max-body)" };

/// The host's side broke off.
pub(super) const LOST: Refusal = Refusal { status: 502, code: "bad_gateway", message: "the host has lost the request" };

/// There is no place inside.
pub(super) const CROWDED: Refusal = Refusal { status: 503, code: "overloaded", message: "too many requests are waiting" };

/// There is no place for the connection.
pub(super) const FULL: Refusal = Refusal { status: 503, code: "overloaded", message: "there are too many connections" };

/// The client behind a proxy has as many requests as it may.
pub(super) const ADDRESS_FULL: Refusal = Refusal {
    status: 503,
    code: "overloaded",
    message: "the client's address has too many requests under way (serve --max-connections-per-address)",
};

/// There is no memory or file for the body.
pub(super) const NO_ROOM: Refusal =
    Refusal { status: 503, code: "overloaded", message: "there is no room for the request's body now" };

/// The host stops.
pub(super) const STOPPING: Refusal = Refusal { status: 503, code: "unavailable", message: "the host is stopping" };

/// No answer began.
pub(super) const NO_ANSWER: Refusal = Refusal { status: 504, code: "timeout", message: "no answer began in time" };

/// There is no space for the body.
pub(super) const NO_SPACE: Refusal =
    Refusal { status: 507, code: "no_space", message: "there is no space left on the disk for the request's body" };

/// `retry-after` in seconds of a refusal for want of room: what is full empties quickly, if at all.
const RETRY_AFTER: u64 = 1;

/// The whole answer as it goes on the wire; the connection ends after it.
pub(super) fn answer(refusal: Refusal, head_request: bool) -> Vec<u8> {
    let Refusal { status, code, message } = refusal;
    let reason = tiny_http::StatusCode(status).default_reason_phrase();
    let body = serde_json::json!({"error": {"code": code, "message": message}}).to_string();
    let more = match status {
        405 => "allow: GET, HEAD, POST, PUT, DELETE, PATCH, OPTIONS\r\n".to_owned(),
        503 => format!("retry-after: {RETRY_AFTER}\r\n"),
        _ => String::new(),
    };
    let date = httpdate::fmt_http_date(std::time::SystemTime::now());
    let length = body.len();
    let body = if head_request { "" } else { &body };
    format!(
        "HTTP/1.1 {status} {reason}\r\nconnection: close\r\ncontent-type: application/json\r\n{more}date: {date}\r\ncontent-length: {length}\r\n\r\n{body}"
    )
    .into_bytes()
}
