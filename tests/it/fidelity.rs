//! Applications of the kind `http`: what they and their clients say to each other passes as it does through nginx, and nothing that an
//! application does wrong reaches another request.

mod broken;
mod live;
mod running;
mod sides;
mod wire;

use sides::{App, Heard, Nginx, Seen, ask, client, get, hear, host_before};
use std::collections::BTreeMap;
use std::fmt::Write;
use wire::{Head, Wire};

/// A request and the bytes of its answer, after which the application keeps the connection or not.
struct Talk {
    request: Vec<u8>,
    answer: Vec<u8>,
    keeps: bool,
}

fn request(method: &str, name: &str, lines: &str, body: &[u8]) -> Vec<u8> {
    [format!("{method} /read/{name} HTTP/1.1\r\nhost: app.test\r\n{lines}\r\n").as_bytes(), body].concat()
}

fn with_length(method: &str, name: &str, body: &[u8]) -> Vec<u8> {
    request(method, name, &format!("content-length: {}\r\n", body.len()), body)
}

/// Bytes in an order that is not the same twice within a piece.
fn bytes(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at ^ (at >> 8) ^ (at >> 16)).to_le_bytes()[0]).collect()
}

fn chunks(body: &[u8], size: usize) -> Vec<u8> {
    let mut out = Vec::new();
    for chunk in body.chunks(size) {
        out.extend_from_slice(&[format!("{:x}\r\n", chunk.len()).as_bytes(), chunk, b"\r\n"].concat());
    }
    out
}

/// The conversations, by name.
fn talks() -> BTreeMap<String, Talk> {
    let mut talks = BTreeMap::new();
    let mut put = |name: &str, request: Vec<u8>, answer: &[u8], keeps: bool| {
        assert!(talks.insert(name.to_owned(), Talk { request, answer: answer.to_vec(), keeps }).is_none(), "{name}");
    };
    let ok = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
    for method in [
        "GET",
        "POST",
        "PUT",
        "PATCH",
        "DELETE",
        "OPTIONS",
        "PROPFIND",
        "REPORT",
        "MKCOL",
        "M-SEARCH",
        "PURGE",
        "QUERY",
        "UNKNOWN-METHOD",
    ] {
        let name = format!("method-{method}");
        put(&name, request(method, &name, "", b""), ok, true);
    }
    for size in [0, 1, 64 << 10, (64 << 10) + 1, 10 << 20] {
        let name = format!("up-{size}");
        put(&name, with_length("POST", &name, &bytes(size)), ok, true);
        let name = format!("chunked-up-{size}");
        let body = [chunks(&bytes(size), 50_000), b"0\r\n\r\n".to_vec()].concat();
        put(&name, request("PUT", &name, "transfer-encoding: chunked\r\n", &body), ok, true);
        let name = format!("down-{size}");
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {size}\r\ncontent-type: a/b\r\n\r\n");
        put(&name, request("GET", &name, "", b""), &[head.as_bytes(), &bytes(size)].concat(), true);
        let name = format!("chunked-down-{size}");
        let head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
        let answer = [&head[..], &chunks(&bytes(size), 3_001), b"0\r\n\r\n"].concat();
        put(&name, request("GET", &name, "", b""), &answer, true);
        let name = format!("down-to-the-end-{size}");
        put(&name, request("GET", &name, "", b""), &[b"HTTP/1.1 200 OK\r\n\r\n", &bytes(size)[..]].concat(), false);
    }
    let extended = b"5;a=b\r\nhello\r\n6;c=\"d;e\"\r\n world\r\n0;last\r\nx-sum: 1\r\n\r\n";
    put(
        "extensions-up",
        request("POST", "extensions-up", "transfer-encoding: chunked\r\ntrailer: x-sum\r\n", extended),
        ok,
        true,
    );
    let head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n";
    put("extensions-down", request("GET", "extensions-down", "", b""), &[&head[..], extended].concat(), true);
    put("trailers", request("GET", "trailers", "te: trailers\r\nconnection: te\r\n", b""), &[&head[..], extended].concat(), true);
    put("continue", request("POST", "continue", "expect: 100-continue\r\ncontent-length: 3\r\n", b"abc"), ok, true);
    for (name, head) in [
        ("head-with-length", "HTTP/1.1 200 OK\r\ncontent-length: 1234\r\n\r\n"),
        ("head-without-length", "HTTP/1.1 200 OK\r\ncontent-type: a/b\r\n\r\n"),
        ("head-chunked", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"),
        ("head-404", "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"),
        ("head-304", "HTTP/1.1 304 Not Modified\r\netag: \"a\"\r\n\r\n"),
    ] {
        put(name, request("HEAD", name, "", b""), head.as_bytes(), true);
    }
    for (name, lines, answer) in [
        ("204", "", &b"HTTP/1.1 204 No Content\r\n\r\n"[..]),
        ("304", "if-none-match: \"a\"\r\n", b"HTTP/1.1 304 Not Modified\r\netag: \"a\"\r\nvary: accept\r\n\r\n"),
        ("304-with-length", "if-none-match: \"a\"\r\n", b"HTTP/1.1 304 Not Modified\r\netag: \"a\"\r\ncontent-length: 9\r\n\r\n"),
        ("205", "", b"HTTP/1.1 205 Reset Content\r\ncontent-length: 0\r\n\r\n"),
        (
            "range",
            "range: bytes=1-2\r\nif-range: \"a\"\r\n",
            b"HTTP/1.1 206 Partial Content\r\ncontent-range: bytes 1-2/4\r\naccept-ranges: bytes\r\ncontent-length: 2\r\n\r\nbc",
        ),
        ("416", "range: bytes=9-\r\n", b"HTTP/1.1 416 Range Not Satisfiable\r\ncontent-range: bytes */4\r\ncontent-length: 0\r\n\r\n"),
        ("redirect", "", b"HTTP/1.1 302 Found\r\nlocation: /elsewhere?a=%20b\r\ncontent-length: 0\r\n\r\n"),
        (
            "cookies",
            "cookie: a=b; c=\"d e\"\r\n",
            b"HTTP/1.1 200 OK\r\nset-cookie: b=1; Path=/\r\nx-a: 1\r\nset-cookie: a=2\r\nSet-Cookie: c=3\r\ncontent-length: 0\r\n\r\n",
        ),
        (
            "repeated",
            "x-a: 1\r\nx-b: 2\r\nX-A: 3\r\naccept: a/b\r\naccept: c/d\r\n",
            b"HTTP/1.1 200 OK\r\nvary: a\r\nwww-authenticate: A\r\nvary: b\r\nwww-authenticate: B\r\nlink: <a>\r\nlink: <b>\r\ncontent-length: 0\r\n\r\n",
        ),
        (
            "not-ascii",
            "x-name: caf\u{e9}\r\n",
            b"HTTP/1.1 200 OK\r\nx-latin: caf\xe9\r\nx-utf: caf\xc3\xa9 \xf0\x9f\x8d\xb0\r\ncontent-length: 0\r\n\r\n",
        ),
        ("empty-values", "x-empty:\r\nx-space:   \r\n", b"HTTP/1.1 200 OK\r\nx-empty:\r\nx-space:  \t \r\ncontent-length: 0\r\n\r\n"),
        ("spaces", "x-a: \t a \t b \t\r\n", b"HTTP/1.1 200 OK\r\nx-a:\t a \t b \t\r\nx-b:b\r\ncontent-length: 0\r\n\r\n"),
        ("close", "", b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok"),
        ("hop-by-hop", "", b"HTTP/1.1 200 OK\r\nconnection: keep-alive, x-hop\r\nkeep-alive: timeout=5\r\nx-end: 1\r\ncontent-length: 2\r\n\r\nok"),
        ("http10-close", "", b"HTTP/1.0 200 OK\r\nserver: old\r\ncontent-length: 2\r\n\r\nok"),
        ("http10-keep-alive", "", b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\nok"),
        ("http10-to-the-end", "", b"HTTP/1.0 200 OK\r\n\r\nto the end"),
        ("http10-404", "", b"HTTP/1.0 404 Nix da\r\ncontent-type: text/plain\r\n\r\nnot here"),
        ("reason", "", b"HTTP/1.1 200 All is Well\r\ncontent-length: 0\r\n\r\n"),
        ("no-reason", "", b"HTTP/1.1 200 \r\ncontent-length: 0\r\n\r\n"),
        ("no-reason-no-space", "", b"HTTP/1.1 200\r\ncontent-length: 0\r\n\r\n"),
        ("unknown-status", "", b"HTTP/1.1 299 Whatever\r\ncontent-length: 0\r\n\r\n"),
        ("499", "", b"HTTP/1.1 499 Own\r\ncontent-length: 3\r\n\r\nown"),
        ("500", "", b"HTTP/1.1 500 Internal Server Error\r\ncontent-type: text/html\r\ncontent-length: 3\r\n\r\n<p>"),
        ("503", "", b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 7\r\ncontent-length: 0\r\n\r\n"),
        ("bare-line-feeds", "", b"HTTP/1.1 200 OK\nx-a: 1\ncontent-length: 2\n\nok"),
        ("upper-case", "", b"HTTP/1.1 200 OK\r\nCONTENT-LENGTH: 2\r\nX-Upper: A\r\n\r\nok"),
        ("coding", "accept-encoding: gzip, br\r\n", b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 3\r\n\r\n\x1f\x8b\x08"),
        ("authorization", "authorization: Basic YTpi\r\n", b"HTTP/1.1 401 Unauthorized\r\nwww-authenticate: Basic realm=\"a\"\r\ncontent-length: 0\r\n\r\n"),
        ("own-server", "", b"HTTP/1.1 200 OK\r\ndate: Thu, 01 Jan 1970 00:00:00 GMT\r\ncontent-length: 0\r\n\r\n"),
    ] {
        let keeps = !matches!(name, "close" | "http10-close" | "http10-to-the-end" | "http10-404");
        put(name, request("GET", name, lines, b""), answer, keeps);
    }
    // Characters of a path and a query.
    for (number, target) in
        ["a%2Fb%20c", "a;b=c", "a//b", "a?x=%00&y=%zz", "a??b", "%E2%82%AC", "a:b@c!$&'()*+,=", "a?{}|"].iter().enumerate()
    {
        put(&format!("target-{number}"), get(&format!("/read/target-{number}/{target}")), ok, true);
    }
    // Heads of 60 KiB, in one line and in many, and of more lines than most have.
    let mut lines = String::new();
    for number in 0..200 {
        write!(lines, "x-{number}: {}\r\n", "v".repeat(280)).unwrap();
    }
    for (name, lines) in [("large-head-of-many", lines), ("large-head-of-one", format!("x-large: {}\r\n", "v".repeat(60_000)))] {
        let answer = format!("HTTP/1.1 200 OK\r\n{lines}content-length: 2\r\n\r\nok");
        put(name, request("GET", name, "", b""), answer.as_bytes(), true);
    }
    talks
}

/// Starts an application that plays the talks.
fn talking() -> App {
    let talks = talks();
    App::start(move |wire, head| {
        let name = head.target().trim_start_matches("/read/").split(['/', '?']).next().unwrap();
        let talk = &talks[name];
        wire.send(&talk.answer) && talk.keeps
    })
}

/// What the application has seen of a request, without what a proxy says and how the body was framed.
fn seen_by(name: &str, app: &App) -> String {
    let seen = app.seen();
    assert_eq!(seen.len(), 1, "{name} was sent once: {seen:?}");
    let Seen { head, content, .. } = &seen[0];
    assert!(content.complete);
    let ours = |name: &str| {
        name.starts_with("x-forwarded-")
            || ["x-request-id", "connection", "transfer-encoding", "content-length", "te", "trailer"].contains(&name)
    };
    summary(&head.line, &head.headers, ours, &content.bytes)
}

/// What a client has heard, without what is of the connection.
fn heard_by(heard: &Heard) -> String {
    let ours = |name: &str| {
        ["date", "server", "connection", "keep-alive", "transfer-encoding", "content-length", "trailer"].contains(&name)
    };
    let interim: Vec<_> = heard.interim.iter().map(|head| (head.status(), &head.headers)).collect();
    let end = if heard.content.complete { "whole" } else { "cut" };
    let trailers = &heard.content.trailers;
    let said = summary(&heard.head.line, &heard.head.headers, ours, &heard.content.bytes);
    format!("{interim:?} {said}, {end}, {trailers:?}")
}

fn summary(line: &str, headers: &[(String, String)], ours: impl Fn(&str) -> bool, body: &[u8]) -> String {
    let mut headers: Vec<_> = headers.iter().filter(|(name, _)| !ours(name)).collect();
    // Those of one name keep their order.
    headers.sort_by_key(|(name, _)| name.clone());
    let sum = body.iter().fold(body.len() as u64, |sum, &byte| sum.wrapping_mul(31).wrapping_add(u64::from(byte)));
    let mut headers = format!("{headers:?}");
    if headers.len() > 3000 {
        let sum = headers.bytes().fold(0_u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(byte)));
        headers = format!("headers of {} bytes, {sum:x}", headers.len());
    }
    let begins = String::from_utf8_lossy(&body[..body.len().min(60)]).into_owned();
    format!("{line} {headers} {} bytes, {sum:x}, {begins:?}", body.len())
}

/// Says one thing, and then something else on the same connection, or on another if it was ended.
fn say(name: &str, talk: &Talk, open: impl Fn() -> Wire, app: &App) -> (String, String) {
    let mut wire = open();
    wire.send(&talk.request);
    let method = String::from_utf8_lossy(&talk.request[..20]).split(' ').next().unwrap().to_owned();
    let heard = hear(&mut wire, &method);
    let seen = seen_by(name, app);
    let Some(heard) = heard else { return (seen, "nothing".into()) };
    let ends = heard.head.header("connection") == Some("close");
    if ends {
        assert!(wire.is_over(), "{name}: nothing follows an answer that says so");
        wire = open();
    }
    assert_eq!(ask(&mut wire, &get("/ok/next")).text(), "ok /ok/next", "after {name}");
    app.seen();
    (seen, heard_by(&heard))
}

/// Where the host and nginx differ, and why.
const DIFFERENT: [(&str, &str); 2] = [
    ("continue", "it answers 100 although the body is there already"),
    ("no-reason-no-space", "it leaves out the space behind the status, which RFC 9112 demands"),
];

#[test]
fn what_is_said_passes_as_it_does_through_nginx() {
    let (ours, theirs) = (talking(), talking());
    let server = host_before(&ours, &["--max-body", "64MiB"]);
    let nginx = Nginx::before(&theirs, "on");
    let mut different = BTreeMap::new();
    for (name, talk) in talks() {
        let host = say(&name, &talk, || client(&server), &ours);
        let proxy = say(&name, &talk, || nginx.client(), &theirs);
        if host != proxy {
            different.insert(
                name,
                format!("\n  host sees  {}\n  nginx sees {}\n  host says  {}\n  nginx says {}", host.0, proxy.0, host.1, proxy.1),
            );
        }
    }
    for (name, why) in DIFFERENT {
        assert!(different.remove(name).is_some(), "{name} passes as through nginx, though {why}");
    }
    let list: String = different.iter().map(|(name, what)| format!("{name}: {what}\n")).collect();
    assert!(different.is_empty(), "{list}");
}

#[test]
fn what_is_said_to_a_port_passes_as_it_does_by_a_socket() {
    let app = talking();
    let server = host_before(&app, &["--max-body", "64MiB"]);
    for (name, talk) in talks() {
        let by_socket = say(&name, &talk, || client(&server), &app);
        let request = String::from_utf8_lossy(&talk.request[..talk.request.len().min(100)]).into_owned();
        let (method, _) = request.split_once(' ').unwrap();
        let rest = &talk.request[method.len() + 1..];
        let below = [method.as_bytes(), b" /port", rest].concat();
        let below = Talk { request: replace(&below, b"host: app.test", b"host: 127.0.0.1"), answer: Vec::new(), keeps: true };
        let (seen, said) = say(&name, &below, || client(&server), &app);
        assert_eq!(seen, by_socket.0.replace("app.test", "127.0.0.1"), "{name}");
        if !["redirect", "cookies"].contains(&name.as_str()) {
            assert_eq!(said, by_socket.1, "{name}");
        }
    }
}

fn replace(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let at = bytes.windows(from.len()).position(|window| window == from).unwrap();
    [&bytes[..at], to, &bytes[at + from.len()..]].concat()
}

/// A client of HTTP/1.0, which knows no chunks and no interim answers.
#[test]
fn a_client_of_http_1_0_gets_what_it_understands() {
    let app = talking();
    let server = host_before(&app, &[]);
    for name in ["chunked-down-65537", "trailers", "down-to-the-end-1", "method-GET"] {
        let mut wire = client(&server);
        wire.send(format!("GET /read/{name} HTTP/1.0\r\nhost: app.test\r\n\r\n").as_bytes());
        let heard = hear(&mut wire, "GET").unwrap();
        assert_eq!((heard.status(), heard.head.header("transfer-encoding"), heard.interim.len()), (200, None, 0), "{name}");
        assert!(heard.content.complete && wire.is_over(), "{name}");
        let seen: Vec<Head> = app.seen().into_iter().map(|seen| seen.head).collect();
        assert!(seen[0].line.ends_with(" HTTP/1.1") && seen[0].header("host") == Some("app.test"), "{seen:?}");
    }
    let mut wire = client(&server);
    wire.send(b"GET /port/ok HTTP/1.0\r\n\r\n");
    assert_eq!(hear(&mut wire, "GET").unwrap().text(), "ok /ok");
    assert!(app.seen()[0].head.header("host").is_some(), "HTTP/1.1 has one always");
}
