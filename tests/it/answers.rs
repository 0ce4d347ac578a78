//! What the host itself answers: errors as pages and as JSON, dates, targets beyond ASCII, plain HTTP to a port that speaks TLS.

use crate::support::http::{Client, Reply};
use crate::support::tls::Authority;
use crate::support::{Server, Site};
use crate::web::{assert_error, sent, server_of_p};
use std::time::{Duration, SystemTime};

/// What Firefox and Chromium send for a page.
const BROWSER: (&str, &str) = ("accept", "text/html,application/xhtml+xml,application/xml;q=0.9,image/webp,*/*;q=0.8");

/// Largest page in bytes.
const MAX_PAGE: usize = 4096;

/// How far a date may be from the tests' clock, and then from the time at which it is checked.
const DATE_TOLERANCE: Duration = Duration::from_secs(60);

/// Checks that an answer has one date, which is the present one.
#[track_caller]
fn assert_dated(reply: &Reply) {
    let dates = reply.all("date");
    assert_eq!(dates.len(), 1, "{reply:?}");
    let date = httpdate::parse_http_date(dates[0]).unwrap();
    let now = SystemTime::now();
    let apart = now.duration_since(date).or_else(|_| date.duration_since(now)).unwrap();
    assert!(apart < DATE_TOLERANCE && httpdate::fmt_http_date(date) == dates[0], "{reply:?}");
}

/// Checks an error as a program gets it.
#[track_caller]
fn assert_json(reply: &Reply, status: u16, code: &str) {
    assert_error(reply, status, code);
    assert_dated(reply);
    assert!(reply.body.ends_with(b"}\n"), "{reply:?}");
    assert!(!reply.text().contains("--") && !reply.text().contains("serve"), "{reply:?}");
}

/// Checks an error as a browser gets it.
#[track_caller]
fn assert_page(reply: &Reply, status: u16) {
    assert_eq!((reply.status, reply.header("content-type")), (status, Some("text/html; charset=utf-8")), "{reply:?}");
    assert_dated(reply);
    assert_eq!((reply.header("vary"), reply.header("cache-control")), (Some("accept"), Some("no-store")), "{reply:?}");
    let policy = reply.header("content-security-policy").unwrap();
    assert!(policy.contains("default-src 'none'") && !policy.contains("script"), "{policy}");
    let page = reply.text();
    assert!(page.len() <= MAX_PAGE && page.ends_with("</html>\n"), "{page}");
    for part in ["<!doctype html>", "<html lang=\"en\">", "<title>", "<a href=\"/\">", "color-scheme", "<p>"] {
        assert!(page.contains(part), "{part}: {page}");
    }
    for part in ["<script", "plugrack serve", "serve --", "(--", "src=", "{\"error\""] {
        assert!(!page.contains(part), "{part}: {page}");
    }
}

/// Asks the same as a browser, as a program and by `HEAD`; gives the page.
#[track_caller]
fn assert_both(server: &Server, path: &str, status: u16, code: &str) -> Reply {
    for accept in [&[][..], &[("accept", "*/*")], &[("accept", "application/json, text/html;q=0.9")]] {
        let json = server.request("GET", path, accept, b"");
        assert_json(&json, status, code);
        assert_eq!(json.header("vary"), Some("accept"));
    }
    let page = server.request("GET", path, &[BROWSER], b"");
    assert_page(&page, status);
    assert_eq!(page.header("retry-after").is_some(), status == 503, "{page:?}");
    page
}

#[test]
fn a_browser_gets_a_page_and_a_program_gets_json() {
    let server = Site::new().args(&["--request-timeout", "1s"]).fake("p").fake("q").start();
    ["p", "q"].into_iter().for_each(|id| drop(server.wait_state(id, "ready")));
    let page = assert_both(&server, "/nothing", 404, "not_found");
    assert!(page.text().contains("<title>Page not found</title>") && !page.text().contains("http-equiv"), "{page:?}");
    let page = assert_both(&server, "/p/error", 502, "bad_gateway");
    assert!(page.text().contains("<small>Error 502; request "), "{page:?}");
    let page = assert_both(&server, "/p/wait?file=never", 504, "timeout");
    assert!(page.text().contains("too long") && !page.text().contains("http-equiv"), "{page:?}");
    server.cli(&["stop", "q"]);
    let page = assert_both(&server, "/q/x", 503, "unavailable");
    let refresh = format!("<meta http-equiv=\"refresh\" content=\"{}\">", page.header("retry-after").unwrap());
    assert!(page.text().contains(&refresh), "{page:?}");
    // What was sent by a form would be lost.
    let form = server.request("POST", "/q/x", &[BROWSER], b"a=b");
    assert_page(&form, 503);
    assert!(!form.text().contains("http-equiv"), "{form:?}");
    let page = server.request("POST", "/", &[BROWSER], b"");
    assert_page(&page, 405);
    assert_eq!(page.header("allow"), Some("GET, HEAD"));
}

#[test]
fn head_gets_the_headers_of_a_refusal_and_no_body() {
    let server = Site::new().args(&["--max-body", "1000"]).fake("p").start();
    server.wait_state("p", "ready");
    server.cli(&["stop", "p"]);
    for (path, status, body) in [("/nothing", 404, 0), ("/p/x", 503, 0), ("/p/x", 413, 1001)] {
        for accept in [BROWSER, ("accept", "application/json")] {
            let length = body.to_string();
            let headers = if body > 0 { &[accept, ("content-length", &length)][..] } else { &[accept] };
            let ask = |method: &str| server.client().request(method, path, headers, b"");
            let (head, mut get) = (ask("HEAD"), ask("GET"));
            assert_eq!((head.status, head.body.len()), (status, 0), "{head:?}");
            let length: usize = head.header("content-length").unwrap().parse().unwrap();
            // A page has the request's id, whose number may have a digit more than that of the request before.
            assert!(length.abs_diff(get.body.len()) <= usize::from(accept == BROWSER), "{length} {}", get.body.len());
            let mut headers = head.headers.clone();
            // Between the two a second may have passed.
            headers.retain(|(name, _)| !["date", "content-length"].contains(&name.as_str()));
            get.headers.retain(|(name, _)| !["date", "content-length"].contains(&name.as_str()));
            assert_eq!(headers, get.headers);
        }
    }
}

/// The gate refuses these itself, before anybody else hears of the request.
#[test]
fn the_gates_own_refusals_are_pages_for_browsers() {
    let server = Site::new().args(&["--max-body", "1000", "--body-timeout", "1s"]).fake("p").start();
    server.wait_state("p", "ready");
    let large = |accept| server.client().request("POST", "/p/echo", &[accept, ("content-length", "1001")], b"");
    assert_page(&large(BROWSER), 413);
    assert_json(&large(("accept", "*/*")), 413, "too_large");
    let slow = |accept| server.client().request("POST", "/p/echo", &[accept, ("content-length", "10")], b"");
    assert_page(&slow(BROWSER), 408);
    assert_json(&slow(("accept", "*/*")), 408, "timeout");
    // Of one without a head nothing is known.
    let mut client = server.client();
    client.send(b"nonsense\r\n\r\n");
    let reply = client.reply(false);
    assert_json(&reply, 400, "bad_request");
    assert_eq!(reply.header("vary"), None);
}

#[test]
fn every_answer_has_a_date_and_a_plugins_own_is_kept() {
    let server = server_of_p();
    for (path, accept) in [
        ("/", "*/*"),
        ("/", BROWSER.1),
        ("/healthz", "*/*"),
        ("/favicon.ico", "*/*"),
        ("/api/plugins", "*/*"),
        ("/nothing", "*/*"),
        ("/p/x", "*/*"),
        ("/p/status?code=204", "*/*"),
        ("/p/status?code=304", "*/*"),
        ("/p/download?bytes=300000", "*/*"),
    ] {
        for method in ["GET", "HEAD"] {
            assert_dated(&server.request(method, path, &[("accept", accept)], b""));
        }
    }
    let mut client = server.client();
    client.send(b"OPTIONS * HTTP/1.1\r\nhost: test\r\n\r\n");
    assert_dated(&client.reply(false));
    let own = server.get("/p/header?name=Date&value=Sun,%2006%20Nov%201994%2008:49:37%20GMT");
    assert_eq!(own.all("date"), ["Sun, 06 Nov 1994 08:49:37 GMT"]);
}

#[test]
fn all_json_of_the_host_ends_with_a_line_end() {
    let server = server_of_p();
    let token = std::fs::read_to_string(server.site().data().join("admin-token")).unwrap_or_default();
    let token = format!("Bearer {}", token.trim());
    for path in ["/api/plugins", "/api/plugins/p", "/api/plugins/none", "/api/nothing"] {
        for headers in [&[("authorization", token.as_str())][..], &[]] {
            let reply = server.request("GET", path, headers, b"");
            reply.json();
            assert!(reply.body.ends_with(b"\n") && !reply.body.ends_with(b"\n\n"), "{reply:?}");
        }
    }
}

#[test]
fn an_icon_is_there_for_browsers_and_may_be_kept() {
    let server = server_of_p();
    let icon = server.get("/favicon.ico");
    assert_eq!((icon.status, icon.header("content-type")), (200, Some("image/svg+xml")));
    assert!(icon.header("cache-control").unwrap().contains("max-age=86400") && icon.text().starts_with("<svg "), "{icon:?}");
    assert_eq!(server.request("POST", "/favicon.ico", &[], b"").status, 405);
    // The pages let a browser fetch it.
    let page = server.request("GET", "/", &[BROWSER], b"");
    assert!(page.header("content-security-policy").unwrap().contains("img-src 'self'"));
    assert_eq!(page.header("vary"), Some("accept"));
}

// --- Targets ----------------------------------------------------------------------------------------------

/// Sends a target as it is and reads the answer.
#[track_caller]
fn ask_raw(server: &Server, target: &[u8]) -> Reply {
    let mut client = server.client();
    client.send(&[b"GET ", target, b" HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n"].concat());
    client.reply(false)
}

#[test]
fn bytes_beyond_ascii_in_a_target_reach_the_plugin_percent_encoded() {
    let server = server_of_p();
    for (target, query) in [
        ("/p/request?nick=しまりん".as_bytes(), "nick=%E3%81%97%E3%81%BE%E3%82%8A%E3%82%93"),
        (b"/p/request?\xff\x80%c3%b6", "%FF%80%c3%b6"),
    ] {
        assert_eq!(ask_raw(&server, target).json()["query"], query);
    }
    assert_eq!(ask_raw(&server, "/p/tö".as_bytes()).text(), "GET /t%C3%B6 of p");
    assert_eq!(ask_raw(&server, "http://test/p/tö".as_bytes()).text(), "GET /t%C3%B6 of p");
    // No route contains such a byte.
    assert_json(&ask_raw(&server, "/pö".as_bytes()), 404, "not_found");
    for byte in (0..=0x1f_u8).chain([0x7f, b' ', b'#']) {
        let reply = ask_raw(&server, &[b"/p/a", &[byte][..], b"b"].concat());
        assert_eq!(reply.status, 400, "{byte}: {reply:?}");
    }
}

/// A frame has room for 64 KiB of a request, so what fits the gate's limit may be too much once it is encoded.
#[test]
fn a_target_counts_as_it_is_encoded() {
    let server = Site::new().args(&["--max-head", "64KiB"]).fake("p").start();
    server.wait_state("p", "ready");
    let target = |letters: usize| [b"/p/".to_vec(), vec![0xf6; letters]].concat();
    let fits = ask_raw(&server, &target(15_000));
    assert!(fits.status == 200 && fits.text().len() > 45_000, "{}", fits.status);
    assert_json(&ask_raw(&server, &target(30_000)), 431, "head_too_large");
    assert_eq!(server.get("/p/x").text(), "GET /x of p");
}

// --- Plain HTTP where TLS is spoken -----------------------------------------------------------------------

#[test]
fn plain_http_to_a_port_that_speaks_tls_is_told_so() {
    let authority = Authority::new();
    let server = Site::new().args(&authority.issue("host").arguments()).fake("p").start();
    server.wait_state("p", "ready");
    let ask = |method: &str, headers: &[(&str, &str)], body: &[u8]| {
        let mut client = Client::connect(server.address());
        let reply = client.request(method, "/p/x", headers, body);
        assert_eq!(client.rest(), b"");
        assert_eq!((reply.status, reply.header("connection")), (400, Some("close")), "{reply:?}");
        reply
    };
    for (method, body) in [("GET", &b""[..]), ("POST", b"a body"), ("PURGE", b"")] {
        let reply = ask(method, &[], body);
        assert_json(&reply, 400, "https_required");
        assert!(reply.text().contains("https://"), "{reply:?}");
    }
    let page = ask("GET", &[BROWSER], b"");
    assert_page(&page, 400);
    assert!(page.text().contains("https://"), "{page:?}");
    assert_eq!(ask("HEAD", &[], b"").body, b"");
    // One that comes byte by byte is known all the same.
    let mut client = Client::connect(server.address());
    for byte in b"GET / HTTP/1.1\r\nhost: test\r\n\r\n" {
        client.send(&[*byte]);
    }
    assert_json(&client.reply(false), 400, "https_required");
    // Any other protocol gets no answer.
    for said in [&b"SSH-2.0-OpenSSH\r\n"[..], b"\r\n", b"\x80\x2e\x01\x03\x01", &[b'A'; 100], b"\0"] {
        let mut client = Client::connect(server.address());
        client.try_send(said);
        assert_eq!(client.rest(), b"", "{}", said.escape_ascii());
    }
    let request = authority.client(server.address()).request("GET", "/p/request", &[], b"").json();
    assert_eq!(sent(&request, "x-forwarded-proto"), ["https"]);
}
