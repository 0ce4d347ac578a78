//! HTTP/1.1 as clients expect it, byte by byte: what one connection carries, in which order, and when it ends.

use crate::support::http::{Client, Reply, chunk};
use crate::support::{Server, Site, wait_for};
use crate::web::{assert_error, bytes, sent, server_of_p};
use std::fs;
use std::net::TcpListener;

/// Bodies up to this size are collected in [`server_that_streams`].
const BODY_BUFFER: usize = 64 * 1024;

/// A host with the fake plugin `p`, ready, to which nearly every body is passed on as it comes.
fn server_that_streams() -> Server {
    let server = Site::new().args(&["--body-buffer", "64KiB", "--max-body", "100MiB"]).fake("p").start();
    server.wait_state("p", "ready");
    server
}

/// A request with a body of a known length.
pub(crate) fn post(path: &str, more: &str, body: &[u8]) -> Vec<u8> {
    let head = format!("POST {path} HTTP/1.1\r\nhost: test\r\n{more}content-length: {}\r\n\r\n", body.len());
    [head.as_bytes(), body].concat()
}

/// A request with a body in chunks, which end with `end`.
fn post_chunked(path: &str, more: &str, chunks: &[&[u8]], end: &[u8]) -> Vec<u8> {
    let head = format!("POST {path} HTTP/1.1\r\nhost: test\r\n{more}transfer-encoding: chunked\r\n\r\n");
    [head.into_bytes(), chunks.iter().flat_map(|data| chunk(data)).collect(), end.to_vec()].concat()
}

/// Requests of every kind on one connection, and whether each is a HEAD, with what is answered.
pub(crate) fn conversation() -> Vec<(Vec<u8>, bool, u16, Vec<u8>)> {
    let (small, large) = (bytes(3000), bytes(200_000));
    let get = |method: &str, path: &str| format!("{method} {path} HTTP/1.1\r\nhost: test\r\n\r\n").into_bytes();
    vec![
        (get("GET", "/p/first"), false, 200, b"GET /first of p".to_vec()),
        (post("/p/echo", "", &small), false, 200, small.clone()),
        (get("HEAD", "/p/length?length=12345"), true, 200, Vec::new()),
        (post_chunked("/p/echo", "", &[&large[..70_000], &large[70_000..]], b"0\r\n\r\n"), false, 200, large.clone()),
        (get("GET", "/p/status?code=204"), false, 204, Vec::new()),
        (post("/p/echo", "", b""), false, 200, Vec::new()),
        (get("GET", "/p/status?code=304"), false, 304, Vec::new()),
        (get("GET", "/healthz"), false, 200, b"ok\n".to_vec()),
        (post("/p/echo", "expect: 100-continue\r\n", &small), false, 200, small.clone()),
        (get("OPTIONS", "*"), false, 204, Vec::new()),
        (post_chunked("/p/echo", "", &[&small], b"0\r\nx-sum: 1\r\n\r\n"), false, 200, small),
        (get("GET", "/p/last"), false, 200, b"GET /last of p".to_vec()),
    ]
}

#[test]
fn pipelined_requests_of_every_kind_are_answered_in_order() {
    let server = server_of_p();
    let mut client = server.client();
    for _ in 0..3 {
        let all: Vec<u8> = conversation().into_iter().flat_map(|(request, ..)| request).collect();
        client.send(&all);
        for (request, head, status, body) in conversation() {
            let reply = client.reply(head);
            assert_eq!(reply.status, status, "{}", request[..60.min(request.len())].escape_ascii());
            assert!(reply.body == body, "{}", request[..60.min(request.len())].escape_ascii());
        }
    }
}

/// Where a packet ends means nothing: every byte of the conversation comes in one of its own, or nearly so.
#[test]
fn requests_cut_at_any_byte_are_read_the_same() {
    let server = server_of_p();
    for piece in [1, 2, 7] {
        let mut client = server.client();
        for (request, head, status, body) in conversation() {
            let (slow, rest) = request.split_at(request.len().min(400));
            slow.chunks(piece).for_each(|bytes| client.send(bytes));
            client.send(rest);
            let reply = client.reply(head);
            assert_eq!(reply.status, status, "{}", slow.escape_ascii());
            assert!(reply.body == body, "{}", slow.escape_ascii());
        }
    }
}

#[test]
fn a_client_of_http_1_0_may_keep_its_connection() {
    let server = server_of_p();
    let mut client = server.client();
    for path in ["/p/a", "/p/status?code=404&body=nothing", "/healthz", "/p/status?code=204", "/p/b"] {
        client.send(format!("GET {path} HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n").as_bytes());
        let reply = client.reply(false);
        assert_eq!(reply.header("connection"), Some("keep-alive"), "{path}: {reply:?}");
        assert_eq!(reply.header("transfer-encoding"), None, "{path}: {reply:?}");
    }
    client.send(b"POST /p/echo HTTP/1.0\r\nconnection: keep-alive\r\ncontent-length: 5\r\n\r\nhello");
    assert_eq!(client.reply(false).text(), "hello");
    // The end of an answer of unknown length can only be that of the connection, whatever the client would like.
    client.send(b"GET /p/download?bytes=300000 HTTP/1.0\r\nconnection: keep-alive\r\n\r\n");
    let reply = client.reply(false);
    assert_eq!((reply.header("connection"), reply.header("transfer-encoding")), (Some("close"), None), "{reply:?}");
    assert_eq!(reply.body.len(), 300_000);
}

#[test]
fn a_client_of_http_1_0_is_never_told_to_go_on() {
    let server = server_of_p();
    let mut client = server.client();
    client.send(b"POST /p/echo HTTP/1.0\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n");
    client.send(b"hello");
    let reply = client.reply_head();
    assert_eq!(reply.status, 200);
}

#[test]
fn a_client_that_expects_to_be_told_to_go_on_need_not_wait_for_it() {
    let server = server_of_p();
    let mut client = server.client();
    let body = bytes(100_000);
    // The body comes right behind the head, in a moment, or once the client has been told, in chunks.
    client.send(&post("/p/echo", "expect: 100-continue\r\n", &body));
    assert!(client.reply(false).body == body);
    let whole = post("/p/echo", "Expect: 100-Continue\r\n", &body);
    let head = whole.len() - body.len();
    client.send(&whole[..head]);
    client.send(&whole[head..]);
    assert!(client.reply(false).body == body);
    let whole = post_chunked("/p/echo", "expect: 100-continue\r\n", &[&body], b"0\r\n\r\n");
    let head = whole.windows(4).position(|bytes| bytes == b"\r\n\r\n").unwrap() + 4;
    client.send(&whole[..head]);
    assert_eq!(client.reply_head().status, 100);
    client.send(&whole[head..]);
    assert!(client.reply(false).body == body);
    // Where there is no body there is nothing to wait for.
    for length in ["", "content-length: 0\r\n"] {
        client.send(format!("POST /p/echo HTTP/1.1\r\nhost: test\r\nexpect: 100-continue\r\n{length}\r\n").as_bytes());
        assert_eq!(client.reply_head().status, 200, "{length:?}");
    }
    client.send(b"POST /p/echo HTTP/1.1\r\nhost: test\r\nexpect: a-miracle\r\ncontent-length: 5\r\n\r\n");
    assert_error(&client.reply(false), 417, "expectation_failed");
}

#[test]
fn chunks_may_have_extensions_and_trailers_and_any_size() {
    let server = server_of_p();
    let mut client = server.client();
    let body = bytes(0x1234);
    let mut request = b"POST /p/request HTTP/1.1\r\nhost: test\r\nTransfer-Encoding: Chunked\r\n\r\n".to_vec();
    let mut echoed = b"POST /p/echo HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
    for out in [&mut request, &mut echoed] {
        for (size, range) in [
            ("1", 0..1),
            ("00000002", 1..3),
            ("a;name=value", 3..13),
            ("F; name", 13..28),
            ("1;q=\"a; b\"", 28..29),
            ("1217", 29..0x1234),
        ] {
            out.extend_from_slice(size.as_bytes());
            out.extend_from_slice(b"\r\n");
            out.extend_from_slice(&body[range]);
            out.extend_from_slice(b"\r\n");
        }
        out.extend_from_slice(b"000;last\r\nX-Forwarded-For: 6.6.6.6\r\nx-sum: 1234\r\ncontent-length: 7\r\n\r\n");
        client.send(out);
    }
    // Nothing of the trailers is taken for a header of the request, or of the next.
    let headers = client.reply(false).json();
    assert_eq!(sent(&headers, "x-sum"), [""; 0]);
    assert_eq!(sent(&headers, "x-forwarded-for"), ["127.0.0.1"]);
    assert!(client.reply(false).body == body);
    assert_eq!(client.get("/p/x").text(), "GET /x of p");
}

#[test]
fn an_answer_in_chunks_is_framed_as_the_rfc_says() {
    let server = server_of_p();
    let mut client = server.client();
    client.send(b"GET /p/download?bytes=600000 HTTP/1.1\r\nhost: test\r\nTE: trailers\r\nconnection: close\r\n\r\n");
    let wire = client.rest();
    let head = wire.windows(4).position(|bytes| bytes == b"\r\n\r\n").unwrap() + 4;
    let mut rest = &wire[head..];
    let mut length = 0;
    loop {
        let end = rest.windows(2).position(|bytes| bytes == b"\r\n").unwrap();
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..end]).unwrap(), 16).unwrap();
        assert_eq!(&rest[end + 2 + size..][..2], b"\r\n");
        rest = &rest[end + 2 + size + 2..];
        length += size;
        if size == 0 {
            break;
        }
    }
    assert_eq!((length, rest.len()), (600_000, 0));
}

#[test]
fn the_host_in_a_target_in_absolute_form_is_the_requests_host() {
    let server = server_of_p();
    let mut client = server.client();
    for (target, host, path) in [
        ("http://other.example/p/request", "other.example", "/request"),
        ("HTTP://other.example:81/p/request?a=b", "other.example:81", "/request"),
        ("https://[::1]:8443/p/request", "[::1]:8443", "/request"),
    ] {
        let request = client.request("GET", target, &[], b"").json();
        assert_eq!(sent(&request, "host"), [host], "{target}");
        assert_eq!(request["path"], path, "{target}");
        // The scheme is that of the connection, not what a client says.
        assert_eq!(sent(&request, "x-forwarded-proto"), ["http"], "{target}");
    }
    for (target, index) in
        [("http://other.example", true), ("http://other.example?q", true), ("http://other.example/nothing", false)]
    {
        assert_eq!(client.get(target).status == 200, index, "{target}");
    }
    // An empty host is one that a client of HTTP/1.1 may send, none is not.
    client.send(b"GET /p/x HTTP/1.1\r\nhost:\r\n\r\n");
    assert_eq!(client.reply(false).status, 200);
    client.send(b"GET /p/x HTTP/1.1\r\n\r\n");
    assert_error(&client.reply(false), 400, "bad_request");
}

#[test]
fn options_of_the_whole_server_are_answered_by_the_host() {
    let server = server_of_p();
    let mut client = server.client();
    let reply = client.request("OPTIONS", "*", &[], b"");
    assert_eq!((reply.status, reply.header("allow")), (204, Some("GET, HEAD, POST, PUT, DELETE, PATCH, OPTIONS")));
    assert_error(&client.request("GET", "*", &[], b""), 400, "bad_request");
}

#[test]
fn bytes_beyond_ascii_in_a_header_reach_the_plugin_as_characters_of_latin_1() {
    let server = server_of_p();
    let mut client = server.client();
    let value: Vec<u8> = (0x21..=0xff).filter(|&byte| byte != 0x7f).collect();
    let text: String = value.iter().map(|&byte| char::from(byte)).collect();
    client.send(
        &[b"GET /p/request HTTP/1.1\r\nhost: test\r\nx-every: ", &value[..], b"\r\nx-name: caf\xe9\tau lait\r\n\r\n"].concat(),
    );
    let request = client.reply(false).json();
    assert_eq!(sent(&request, "x-every"), [text]);
    assert_eq!(sent(&request, "x-name"), ["café\tau lait"]);
    for control in [b'\0', 0x01, 0x1f, 0x7f] {
        let mut client = server.client();
        client.send(&[b"GET /p/request HTTP/1.1\r\nhost: test\r\nx-every: a", &[control][..], b"\r\n\r\n"].concat());
        assert_error(&client.reply(false), 400, "bad_request");
    }
}

#[test]
fn a_head_that_is_too_large_is_431_and_a_target_414() {
    let server = Site::new().args(&["--max-head", "4KiB", "--max-headers", "20"]).fake("p").start();
    server.wait_state("p", "ready");
    let large = "x".repeat(5000);
    assert_error(&server.request("GET", "/p/x", &[("x-large", &large)], b""), 431, "head_too_large");
    assert_error(&server.get(&format!("/p/{large}")), 414, "uri_too_long");
    let many = [("x-one", "1"); 20];
    assert_error(&server.request("GET", "/p/x", &many, b""), 431, "head_too_large");
    // One less, with the host's name, is as many as there may be.
    assert_eq!(server.request("GET", "/p/x", &many[1..], b"").status, 200);
    assert_eq!(server.request("GET", "/p/x", &[("x-large", &large[..3900])], b"").status, 200);
}

#[test]
fn a_host_on_ipv6_serves_and_says_who_came() {
    if TcpListener::bind("[::1]:0").is_err() {
        return eprintln!("skipped, since this machine has no IPv6");
    }
    let server = Site::new().args(&["--listen", "[::1]:0"]).fake("p").start();
    server.wait_state("p", "ready");
    let request = server.get("/p/request").json();
    assert_eq!(request["remote"], "::1");
    assert_eq!(sent(&request, "x-forwarded-for"), ["::1"]);
    // Listening for all addresses takes clients of IPv4 too, by their own address.
    let server = Site::new().args(&["--listen", "[::]:0"]).fake("p").start();
    server.wait_state("p", "ready");
    let mut client = Client::connect(([127, 0, 0, 1], server.address().port()).into());
    assert_eq!(client.get("/p/request").json()["remote"], "127.0.0.1");
}

#[test]
fn what_comes_behind_a_request_that_closes_is_not_answered() {
    let server = server_of_p();
    let mut client = server.client();
    client.send(b"GET /p/x HTTP/1.1\r\nhost: test\r\nConnection: X-Thing , Close\r\n\r\nGET /p/print?text=more HTTP/1.1\r\nhost: test\r\n\r\n");
    assert_eq!(client.reply(false).text(), "GET /x of p");
    assert_eq!(client.rest(), b"");
    // An answer is counted after it has been sent.
    assert_eq!(server.get("/p/after").text(), "GET /after of p");
    wait_for("both answers to be counted", || (server.plugin("p")["process"]["answered"] == 2).then_some(()));
    let log = fs::read_to_string(server.site().data().join("logs/p.log")).unwrap_or_default();
    assert!(!log.contains("more"), "{log}");
}

/// A client that has said that a request is its last may end its sending; it still gets its answer, all of it.
#[test]
fn a_client_that_has_closed_its_side_gets_its_answers() {
    let server = server_of_p();
    for (request, check) in [
        (
            b"GET /p/x HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n".to_vec(),
            &(|reply: Reply| reply.text() == "GET /x of p") as &dyn Fn(Reply) -> bool,
        ),
        (b"GET /p/x HTTP/1.0\r\n\r\n".to_vec(), &|reply| reply.text() == "GET /x of p"),
        (b"GET /p/sleep?s=0.5 HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n".to_vec(), &|reply| reply.text() == "slept"),
        (b"GET /p/download?bytes=3000000 HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n".to_vec(), &|reply| {
            reply.body.len() == 3_000_000
        }),
        (post("/p/echo", "connection: close\r\n", &bytes(300_000)), &|reply| reply.body == bytes(300_000)),
        (post_chunked("/p/echo", "connection: close\r\n", &[&bytes(3000)], b"0\r\n\r\n"), &|reply| reply.body == bytes(3000)),
        (b"GET /nothing HTTP/1.1\r\nhost: test\r\n\r\n".to_vec(), &|reply| reply.status == 404),
    ] {
        let mut client = server.client();
        client.send(&request);
        client.end_sending();
        let reply = client.reply(false);
        assert!(check(reply), "{}", request[..60.min(request.len())].escape_ascii());
        assert!(client.is_closed());
    }
    // The same for several requests at once.
    let mut client = server.client();
    for (number, last) in [(0, ""), (1, ""), (2, ""), (3, ""), (4, "connection: close\r\n")] {
        client.send(format!("GET /p/{number} HTTP/1.1\r\nhost: test\r\n{last}\r\n").as_bytes());
    }
    client.end_sending();
    for number in 0..5 {
        assert_eq!(client.reply(false).text(), format!("GET /{number} of p"));
    }
    assert!(client.is_closed());
}

#[test]
fn a_client_that_has_closed_its_side_before_its_request_was_whole_is_told() {
    let server = server_of_p();
    let answered = server.plugin("p")["process"]["answered"].clone();
    for begun in [
        &b"GET /p/x HTTP/1.1\r\nhost: te"[..],
        b"POST /p/echo HTTP/1.1\r\nhost: test\r\ncontent-length: 10\r\n\r\nbegin",
        b"POST /p/echo HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n5\r\nbegin\r\n",
    ] {
        let mut client = server.client();
        client.send(begun);
        client.end_sending();
        assert_error(&client.reply(false), 400, "bad_request");
        assert!(client.is_closed());
    }
    assert_eq!(server.plugin("p")["process"]["answered"], answered, "the plugin was asked");
    // One that says nothing gets nothing.
    let mut client = server.client();
    client.end_sending();
    assert_eq!(client.rest(), b"");
}

#[test]
fn an_answer_before_the_end_of_the_body_reaches_a_client_that_still_sends() {
    let server = server_that_streams();
    let body = bytes(20_000_000);
    // One that keeps the last byte back until it has its answer.
    let mut client = server.client();
    let request = post("/p/early", "", &body);
    client.send(&request[..request.len() - 1]);
    let reply = client.reply(false);
    assert_eq!((reply.status, reply.text(), reply.header("connection")), (413, "enough", Some("close")), "{reply:?}");

    // One that first sends all of it, which is more than fits any buffer on the way, is not left in the lurch.
    let mut client = server.client();
    client.send(&request);
    let reply = client.reply(false);
    assert_eq!((reply.status, reply.text()), (413, "enough"));
    assert!(client.is_closed());
    assert_eq!(server.get("/p/x").text(), "GET /x of p");
}

#[test]
fn a_body_that_is_passed_on_as_it_comes_arrives_whole_and_the_connection_goes_on() {
    let server = server_that_streams();
    let mut client = server.client();
    for length in [BODY_BUFFER - 1, BODY_BUFFER, BODY_BUFFER + 1, 20_000_000] {
        let body = bytes(length);
        let expected = server.request("POST", "/p/upload", &[], &body).text().to_owned();
        assert!(expected.starts_with(&format!("{length} ")), "{expected}");
        client.send(&post("/p/upload", "", &body));
        assert_eq!(client.reply(false).text(), expected);
        let chunks: Vec<&[u8]> = body.chunks(100_003).collect();
        client.send(&post_chunked("/p/upload", "", &chunks, b"0\r\n\r\n"));
        assert_eq!(client.reply(false).text(), expected);
    }
}
