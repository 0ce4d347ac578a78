//! The host's own errors towards clients: each with its status, its code and its sentence, as JSON for programs and as a page for
//! browsers. Those of a request's head stand in [`super::head`], which finds them.

use super::error_page;
use super::head::Refusal;
use crate::http_date;

/// The client's head did not come whole.
pub(crate) const BAD_HEAD: Refusal =
    Refusal { status: 400, code: "bad_request", message: "the request's head did not come whole" };

/// The client's body did not come whole, or broke its framing.
pub(crate) const BAD_BODY: Refusal = Refusal {
    status: 400,
    code: "bad_request",
    message: "the request's body did not come whole, or its length or its chunks are not well formed",
};

/// A client speaks plain HTTP to a port that speaks TLS.
pub(crate) const PLAIN_HTTP: Refusal =
    Refusal { status: 400, code: "https_required", message: "this port speaks HTTPS: use an address that begins with https://" };

/// There is nothing at the path.
pub(crate) const NOT_FOUND: Refusal = Refusal { status: 404, code: "not_found", message: "there is nothing at this path" };

/// The host's own pages are only read.
pub(crate) const METHOD_NOT_ALLOWED: Refusal =
    Refusal { status: 405, code: "method_not_allowed", message: "only GET and HEAD are answered here" };

/// The head took too long.
pub(crate) const SLOW_HEAD: Refusal =
    Refusal { status: 408, code: "timeout", message: "the request's head did not come in time" };

/// The body took too long.
pub(crate) const SLOW_BODY: Refusal = Refusal { status: 408, code: "timeout", message: "the request's body came too slowly" };

/// The body is too large.
pub(crate) const TOO_LARGE: Refusal =
    Refusal { status: 413, code: "too_large", message: "the request's body is over the limit of this site" };

/// The head does not fit in a message to a plugin.
pub(crate) const HEAD_TOO_LARGE: Refusal = Refusal {
    status: 431,
    code: "head_too_large",
    message: "the request's target and headers are over the limit of 64 KiB that a plugin is sent",
};

/// The plugin broke the protocol, answered with an error, or its connection was lost.
pub(crate) const BAD_GATEWAY: Refusal =
    Refusal { status: 502, code: "bad_gateway", message: "the plugin gave no valid answer; its log has the reason" };

/// The host's side broke off.
pub(crate) const LOST: Refusal = Refusal { status: 502, code: "bad_gateway", message: "the host has lost the request" };

/// There is no place inside.
pub(crate) const CROWDED: Refusal = Refusal { status: 503, code: "overloaded", message: "too many requests are waiting" };

/// There is no place for the connection.
pub(crate) const FULL: Refusal = Refusal { status: 503, code: "overloaded", message: "there are too many connections" };

/// The plugin's clients hold as many connections as they may.
pub(crate) const PLUGIN_FULL: Refusal =
    Refusal { status: 503, code: "overloaded", message: "the plugin holds too many connections" };

/// The client behind a proxy has as many requests as it may.
pub(super) const ADDRESS_FULL: Refusal =
    Refusal { status: 503, code: "overloaded", message: "the client's address has too many requests under way" };

/// There is no memory or file for the body.
pub(crate) const NO_ROOM: Refusal =
    Refusal { status: 503, code: "overloaded", message: "there is no room for the request's body now" };

/// The plugin is not there now.
pub(crate) const UNAVAILABLE: Refusal = Refusal { status: 503, code: "unavailable", message: "the plugin is not available now" };

/// The host stops.
pub(crate) const STOPPING: Refusal = Refusal { status: 503, code: "unavailable", message: "the host is stopping" };

/// The plugin did not begin an answer in its time.
pub(crate) const TIMEOUT: Refusal = Refusal { status: 504, code: "timeout", message: "the plugin did not answer in time" };

/// No answer began.
pub(crate) const NO_ANSWER: Refusal = Refusal { status: 504, code: "timeout", message: "no answer began in time" };

/// There is no space for the body.
pub(crate) const NO_SPACE: Refusal =
    Refusal { status: 507, code: "no_space", message: "there is no space left on the disk for the request's body" };

/// `retry-after` in seconds of a refusal for want of room: what is full empties quickly, if at all.
pub(crate) const RETRY_AFTER: u64 = 1;

/// What the host takes, for those who ask about none of its paths, or with a method that it never takes.
pub(crate) const METHODS: &str = "GET, HEAD, POST, PUT, DELETE, PATCH, OPTIONS";

/// What is known of the request that is refused.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asker<'a> {
    /// The client prefers HTML to JSON, as browsers do.
    pub(crate) html: bool,
    /// The method is `GET` or `HEAD`, so that a browser may ask again by itself.
    pub(crate) is_safe: bool,
    /// The request's id, where it has one.
    pub(crate) id: Option<&'a str>,
}

/// A refusal in the form for its client.
pub(crate) struct Rendered {
    /// All headers but those that frame the answer, and `date`.
    pub(crate) headers: Vec<(&'static str, String)>,
    /// JSON or HTML.
    pub(crate) body: String,
}

/// The JSON of an error, with a line end behind it.
pub(crate) fn json(code: &str, message: &str) -> String {
    let mut body = serde_json::json!({"error": {"code": code, "message": message}}).to_string();
    body.push('\n');
    body
}

/// Puts a refusal in the form that the client prefers; JSON where nothing is known of the client. `retry_after` is in seconds.
pub(crate) fn render(refusal: Refusal, retry_after: Option<u64>, asker: Option<Asker<'_>>) -> Rendered {
    let mut headers = Vec::new();
    let body = match asker {
        Some(asker) if asker.html => {
            headers.push(("content-type", "text/html; charset=utf-8".to_owned()));
            headers.extend(error_page::HEADERS.map(|(name, value)| (name, value.to_owned())));
            error_page::render(refusal, retry_after, asker)
        }
        _ => {
            headers.push(("content-type", "application/json".to_owned()));
            json(refusal.code, refusal.message)
        }
    };
    headers.push(("cache-control", "no-store".to_owned()));
    if asker.is_some() {
        headers.push(("vary", "accept".to_owned()));
    }
    headers.extend(retry_after.map(|seconds| ("retry-after", seconds.to_string())));
    Rendered { headers, body }
}

/// The whole answer as it goes on the wire; the connection ends after it.
pub(super) fn answer(refusal: Refusal, head_request: bool, asker: Option<Asker<'_>>) -> Vec<u8> {
    let retry_after = (refusal.status == 503).then_some(RETRY_AFTER);
    let Rendered { mut headers, body } = render(refusal, retry_after, asker);
    if refusal.status == 405 {
        headers.push(("allow", METHODS.to_owned()));
    }
    let reason = tiny_http::StatusCode(refusal.status).default_reason_phrase();
    let mut out = format!("HTTP/1.1 {} {reason}\r\nconnection: close\r\n", refusal.status).into_bytes();
    http_date::put_line(&mut out);
    headers.push(("content-length", body.len().to_string()));
    for (name, value) in headers {
        out.extend_from_slice(format!("{name}: {value}\r\n").as_bytes());
    }
    out.extend_from_slice(b"\r\n");
    if !head_request {
        out.extend_from_slice(body.as_bytes());
    }
    out
}

/// Most media ranges of an `accept` that are read. Browsers send up to eight.
const MAX_RANGES: usize = 32;

/// Whether a client with these `accept` values, in their order, prefers HTML to JSON. One that names neither of them does not.
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
    // Among equals, what was named counts before what a pattern includes, and what was named first before the rest.
    let before = match (html.place, json.place) {
        (Some(html), Some(json)) => html < json,
        _ => true,
    };
    html.weight > 0 && (html.weight > json.weight || html.weight == json.weight && before)
}

/// How much a client wants a type.
#[derive(Default)]
struct Wish {
    /// In thousandths.
    weight: u16,
    /// Where it is named, unless only a pattern includes it.
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

/// The weight among a media range's parameters (RFC 9110, section 12.4.2), in thousandths. One that is malformed is none.
fn weight(parameters: &str) -> u16 {
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
        for refusal in [
            BAD_HEAD,
            BAD_BODY,
            PLAIN_HTTP,
            NOT_FOUND,
            METHOD_NOT_ALLOWED,
            SLOW_HEAD,
            SLOW_BODY,
            TOO_LARGE,
            HEAD_TOO_LARGE,
            BAD_GATEWAY,
            LOST,
            CROWDED,
            FULL,
            PLUGIN_FULL,
            ADDRESS_FULL,
            NO_ROOM,
            UNAVAILABLE,
            STOPPING,
            TIMEOUT,
            NO_ANSWER,
            NO_SPACE,
        ] {
            for html in [false, true] {
                let asker = Asker { html, is_safe: true, id: Some("1-2") };
                let Rendered { headers, body } = render(refusal, Some(7), Some(asker));
                assert!(body.ends_with('\n') && !body.contains("serve") && !body.contains(" --"), "{body}");
                assert_eq!(body.starts_with("<!doctype html>"), html, "{body}");
                let has = |name: &str, value: &str| headers.contains(&(name, value.to_owned()));
                assert!(has("vary", "accept") && has("retry-after", "7") && has("cache-control", "no-store"), "{headers:?}");
            }
            let whole = String::from_utf8(answer(refusal, false, None)).unwrap();
            let (head, body) = whole.split_once("\r\n\r\n").unwrap();
            assert!(head.contains("\r\ndate: ") && head.contains(&format!("\r\ncontent-length: {}", body.len())), "{head}");
            assert!(!head.contains("vary") && head.contains("\r\nretry-after: ") == (refusal.status == 503), "{head}");
            let bodiless = String::from_utf8(answer(refusal, true, None)).unwrap();
            assert!(bodiless.ends_with("\r\n\r\n") && bodiless.lines().count() == head.lines().count() + 1);
        }
    }
}
