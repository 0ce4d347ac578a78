//! What a client of the web sees, and what a plugin sees of it.

use crate::support::http::{Client, Reply, chunk};
use crate::support::{CROWD, Server, Site, pause, wait_for};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::fs;
use std::time::Duration;

/// A host with the fake plugin `p`, ready.
pub(crate) fn server_of_p() -> Server {
    let server = Site::new().fake("p").start();
    server.wait_state("p", "ready");
    server
}

/// The values of a header in a request as the plugin was sent it.
pub(crate) fn sent<'a>(request: &'a Value, name: &str) -> Vec<&'a str> {
    let pairs = request["headers"].as_array().unwrap().iter();
    pairs.filter(|pair| pair[0] == name).map(|pair| pair[1].as_str().unwrap()).collect()
}

/// Bytes of every value, in an order that is not the same twice within a frame.
pub(crate) fn bytes(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at ^ (at >> 8) ^ (at >> 16)).to_le_bytes()[0]).collect()
}

#[track_caller]
pub(crate) fn assert_error(reply: &Reply, status: u16, code: &str) {
    assert_eq!(reply.status, status, "{reply:?}");
    assert_eq!(reply.header("content-type"), Some("application/json"), "{reply:?}");
    assert_eq!(reply.json()["error"]["code"], code);
    assert!(!reply.json()["error"]["message"].as_str().unwrap().is_empty());
}

#[test]
fn a_mount_answers_with_and_without_a_trailing_slash() {
    let server = server_of_p();
    assert_eq!(server.get("/p").text(), "GET / of p");
    assert_eq!(server.get("/p/").text(), "GET / of p");
    assert_eq!(server.get("/p?q").text(), "GET / of p");
    for other in ["/px", "/P", "//p", "/%70"] {
        assert_error(&server.get(other), 404, "not_found");
    }
}

#[test]
fn the_plugin_gets_method_path_and_query_as_they_were_sent() {
    let server = server_of_p();
    let mut client = server.client();
    for path in ["/a%2Fb//c/../d", "/.", "/a;b=c", "/%C3%A9%00", "/request/"] {
        assert_eq!(client.get(&format!("/p{path}")).text(), format!("GET {path} of p"));
    }
    for method in ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PURGE"] {
        assert_eq!(client.request(method, "/p/x", &[], b"").text(), format!("{method} /x of p"));
    }
    for (target, query) in [
        ("/p/request", Value::Null),
        ("/p/request?", json!("")),
        ("/p/request?a=b%20c&d=+&a", json!("a=b%20c&d=+&a")),
        ("/p/request?a?b/c", json!("a?b/c")),
        ("http://elsewhere.example/p/request?whole=1", json!("whole=1")),
    ] {
        let request = client.get(target).json();
        assert_eq!((&request["path"], &request["query"]), (&json!("/request"), &query), "{target}");
        assert_eq!((&request["mount"], &request["remote"]), (&json!("/p"), &json!("127.0.0.1")), "{target}");
    }
}

#[test]
fn headers_of_a_request_keep_their_order_and_repeats() {
    let server = server_of_p();
    let headers = [("Cookie", "a=b"), ("X-One", "1"), ("x-two", "  2 "), ("cookie", "c=d"), ("X-Empty", "")];
    let request = server.request("GET", "/p/request", &headers, b"").json();
    assert_eq!(
        request["headers"].as_array().unwrap()[..6],
        [["host", "test"], ["cookie", "a=b"], ["x-one", "1"], ["x-two", "2"], ["cookie", "c=d"], ["x-empty", ""]]
            .map(|pair| json!(pair))
    );
}

#[test]
fn forwarded_headers_are_the_hosts_own() {
    let server = server_of_p();
    let forged = [
        ("X-Forwarded-For", "6.6.6.6"),
        ("x-forwarded-for", "7.7.7.7"),
        ("X-Forwarded-Proto", "gopher"),
        ("X-Forwarded-Prefix", "/admin"),
        ("X-Request-Id", "mine"),
    ];
    let mut ids = HashSet::new();
    for headers in [&[][..], &forged] {
        let request = server.request("GET", "/p/request", headers, b"").json();
        assert_eq!(sent(&request, "x-forwarded-for"), ["127.0.0.1"]);
        assert_eq!(sent(&request, "x-forwarded-proto"), ["http"]);
        assert_eq!(sent(&request, "x-forwarded-prefix"), ["/p"]);
        let [id] = sent(&request, "x-request-id")[..] else { panic!("not one id: {request}") };
        assert_ne!(id, "mine");
        assert!(ids.insert(id.to_owned()), "{id} came twice");
    }
}

#[test]
fn headers_of_one_hop_do_not_reach_the_plugin() {
    let server = server_of_p();
    let headers = [
        ("Connection", "keep-alive, X-Private"),
        ("connection", "x-other"),
        ("x-private", "1"),
        ("X-Other", "2"),
        ("Keep-Alive", "timeout=5"),
        ("Proxy-Authenticate", "Basic"),
        ("Proxy-Authorization", "Basic eA=="),
        ("TE", "trailers"),
        ("Trailer", "x-sum"),
        ("Upgrade", "h2c"),
        ("Expect", "100-continue"),
        ("Authorization", "Bearer kept"),
    ];
    let request = server.request("GET", "/p/request", &headers, b"").json();
    let names: Vec<&str> = request["headers"].as_array().unwrap().iter().map(|pair| pair[0].as_str().unwrap()).collect();
    assert_eq!(names, ["host", "authorization", "x-forwarded-for", "x-forwarded-proto", "x-forwarded-prefix", "x-request-id"]);
    let request = server.client().request_chunked("POST", "/p/request", &[b"abc"]).json();
    assert_eq!(sent(&request, "transfer-encoding"), [""; 0]);
}

#[test]
fn headers_of_one_hop_do_not_reach_the_client() {
    let reply = server_of_p().get("/p/cookies");
    assert_eq!(reply.status, 200);
    assert_eq!(reply.header("x-kept"), Some("yes"));
    for name in ["connection", "x-private", "keep-alive", "transfer-encoding"] {
        assert_eq!(reply.header(name), None, "{name} is of one hop");
    }
}

#[test]
fn every_cookie_of_an_answer_reaches_the_client() {
    assert_eq!(server_of_p().get("/p/cookies").all("set-cookie"), ["a=b", "c=d"]);
}

/// A header value's characters up to U+00FF are one byte each on the wire.
#[test]
fn a_header_value_may_hold_any_byte_of_latin_1() {
    let server = server_of_p();
    let mut client = server.client();
    client.send(b"GET /p/header?name=X-Name&value=%C3%A9%09%C3%BF HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
    let answer = client.rest().to_ascii_lowercase();
    assert!(answer.starts_with(b"http/1.1 200 "));
    let line = b"\r\nx-name: \xe9\t\xff\r\n";
    assert!(answer.windows(line.len()).any(|bytes| bytes == line), "{}", answer.escape_ascii());
}

#[test]
fn bodies_of_every_size_come_back_byte_for_byte() {
    let server = server_of_p();
    // On one connection, so that a byte too many or too few shows in the answer after.
    let mut client = server.client();
    for size in [0, 1, 1023, 1024, 1025, 65_535, 65_536, 65_537, 131_072, 1_048_576] {
        let body = bytes(size);
        let declared = client.request("POST", "/p/echo", &[], &body);
        let chunks: Vec<&[u8]> = body.chunks(40_000).collect();
        let chunked = client.request_chunked("PUT", "/p/echo", &chunks);
        for reply in [declared, chunked] {
            assert_eq!((reply.status, reply.header("content-length")), (200, Some(&*size.to_string())));
            assert!(reply.body == body, "{size} bytes came back as {} others", reply.body.len());
        }
    }
}

#[test]
fn a_large_answer_comes_while_the_plugin_writes_it() {
    let server = Site::new().args(&["--body-buffer", "64KiB"]).fake("p").start();
    server.wait_state("p", "ready");
    let expected: Vec<u8> = (0..=255).cycle().take(1 << 20).collect();
    let come = |path: &str, body: usize| {
        let mut client = server.client();
        client.send(format!("GET {path} HTTP/1.1\r\nhost: test\r\ncontent-length: {body}\r\n\r\n").as_bytes());
        client.send(&vec![b'x'; body]);
        let head = client.reply_head();
        assert_eq!((head.status, head.header("content-length")), (200, Some("1048576")));
        let first = client.bytes(expected.len() - 1000);
        let go = path.rsplit('=').next().unwrap();
        fs::write(server.site().data().join("plugin-data/p").join(go), b"").unwrap();
        let last = client.bytes(1000);
        assert!([first, last].concat() == expected, "{path}");
        // It is at its end, and so is what was asked of the plugin.
        assert_eq!(client.get("/p/x").text(), "GET /x of p");
    };
    come("/p/large?last=1000&file=go", 0);
    // Over a connection of its own inside.
    come("/p/large?last=1000&file=on", 100_000);
    let head = server.request("HEAD", "/p/large?last=1000&file=go", &[], b"");
    assert_eq!((head.status, head.header("content-length"), head.body.len()), (200, Some("1048576"), 0));
    assert_eq!(server.get("/p/x").text(), "GET /x of p");
}

#[test]
fn an_answer_without_a_length_is_given_one_or_sent_in_chunks() {
    let server = server_of_p();
    let mut client = server.client();
    let whole = client.get("/p/status?code=200&body=whole");
    assert_eq!((whole.header("content-length"), whole.header("transfer-encoding")), (Some("5"), None));
    let streamed = client.get("/p/download?bytes=300000");
    assert_eq!((streamed.header("content-length"), streamed.header("transfer-encoding")), (None, Some("chunked")));
    assert_eq!(streamed.body.len(), 300_000);
    let declared = client.get("/p/download?bytes=300000&declared=300000");
    assert_eq!((declared.header("content-length"), declared.header("transfer-encoding")), (Some("300000"), None));
    assert!(declared.body == streamed.body);
    let empty = client.get("/p/download?bytes=0");
    assert_eq!((empty.status, empty.body.len()), (200, 0));
    assert_eq!(client.get("/p/x").text(), "GET /x of p");
}

#[test]
fn an_answer_to_head_has_no_body_and_keeps_its_length() {
    let server = server_of_p();
    let mut client = server.client();
    let reply = client.request("HEAD", "/p/length?length=12345", &[], b"");
    assert_eq!((reply.status, reply.header("content-length")), (200, Some("12345")));
    for path in ["/p/x", "/p/download?bytes=300000", "/p/download?bytes=10&declared=10", "/p/status?code=404&body=nothing"] {
        client.request("HEAD", path, &[], b"");
        // What follows on the connection is the next answer, not a body.
        assert_eq!(client.get("/p/x").text(), "GET /x of p", "after HEAD {path}");
    }
    for path in ["/healthz", "/", "/nothing"] {
        let get = client.get(path);
        let head = client.request("HEAD", path, &[], b"");
        assert_eq!((head.status, head.header("content-length")), (get.status, get.header("content-length")), "{path}");
    }
}

#[test]
fn statuses_without_a_body_have_none() {
    let server = server_of_p();
    let mut client = server.client();
    let asked = client.request("OPTIONS", "*", &[], b"");
    assert_eq!((asked.status, asked.header("content-length")), (204, None));
    for status in [204, 304] {
        let reply = client.get(&format!("/p/status?code={status}"));
        assert_eq!(reply.status, status);
        assert_eq!((reply.header("content-length"), reply.header("transfer-encoding")), (None, None), "{status}");
        assert_eq!(client.get("/p/x").text(), "GET /x of p");
    }
}

#[test]
fn every_status_of_a_plugin_reaches_the_client() {
    let server = server_of_p();
    let mut client = server.client();
    for status in [200, 201, 202, 206, 301, 302, 400, 401, 404, 418, 429, 500, 503, 599] {
        let reply = client.get(&format!("/p/status?code={status}&body=text"));
        assert_eq!((reply.status, reply.text()), (status, "text"));
    }
}

#[test]
fn an_unknown_path_is_404_in_json() {
    let server = server_of_p();
    let mut client = server.client();
    for method in ["GET", "POST", "DELETE"] {
        assert_error(&client.request(method, "/nothing/here", &[], b""), 404, "not_found");
    }
    // A body nobody reads does not get into the way of the next request.
    for size in [10, 5_000, 100_000] {
        let body = bytes(size);
        for chunked in [false, true] {
            let reply = if chunked {
                client.request_chunked("POST", "/nothing", &[&body])
            } else {
                client.request("POST", "/nothing", &[], &body)
            };
            assert_error(&reply, 404, "not_found");
            if reply.header("connection") == Some("close") {
                assert!(client.is_closed());
                client = server.client();
            }
            assert_eq!(client.get("/p/x").text(), "GET /x of p");
        }
    }
}

#[test]
fn the_hosts_own_pages_take_get_and_head_alone() {
    let server = server_of_p();
    let mut client = server.client();
    for path in ["/", "/healthz"] {
        for method in ["POST", "PUT", "DELETE", "OPTIONS"] {
            assert_error(&client.request(method, path, &[], b""), 405, "method_not_allowed");
        }
        assert_eq!(client.get(path).status, 200);
    }
}

#[test]
fn the_index_lists_the_plugins_for_people_and_for_programs() {
    let server = server_of_p();
    let text = server.get("/");
    assert!(text.header("content-type").unwrap().starts_with("text/plain"));
    assert!(text.text().contains("/p") && text.text().contains("ready"), "{}", text.text());
    let page = server.request("GET", "/", &[("accept", "text/html,*/*;q=0.8")], b"");
    assert!(page.header("content-type").unwrap().starts_with("text/html"));
    assert!(page.text().contains("<a href=\"/p\">"), "{}", page.text());
    assert_eq!(server.get("/healthz").text(), "ok\n");
}

#[test]
fn a_body_over_the_limit_is_refused_with_413() {
    let server = Site::new().args(&["--max-body", "100000"]).fake("p").start();
    server.wait_state("p", "ready");
    let (fits, over) = (bytes(100_000), bytes(100_001));
    assert!(server.request("POST", "/p/echo", &[], &fits).body == fits);
    assert_error(&server.request("POST", "/p/echo", &[], &over), 413, "too_large");
    assert_error(&server.request("POST", "/nothing", &[], &over), 413, "too_large");
    assert!(server.client().request_chunked("POST", "/p/echo", &[&fits]).body == fits);
    assert_error(&server.client().request_chunked("POST", "/p/echo", &[&over]), 413, "too_large");
    let in_pieces: Vec<&[u8]> = over.chunks(1000).collect();
    assert_error(&server.client().request_chunked("POST", "/p/echo", &in_pieces), 413, "too_large");
    assert_eq!(server.get("/p/x").text(), "GET /x of p");
}

/// Chunks that nobody reads must not become requests: behind a proxy they could be another client's.
#[test]
fn what_is_left_of_a_refused_body_is_no_request() {
    // 64 bytes, so that one begins wherever the host may have read to.
    let hidden = b"GET /p/print?text=smuggled HTTP/1.1\r\nhost: test\r\nx-padding: \r\n\r\n";
    assert_eq!(hidden.len(), 64);
    let body = hidden.repeat(10_000);
    let refused_by_the_gate = [("/nothing", 413), ("/healthz", 413), ("/p/echo", 413), ("/p/early", 413), ("/api/plugins", 413)];
    let refused_inside = [("/nothing", 404), ("/healthz", 404), ("/p/early", 413), ("/api/plugins", 401)];
    for (argument, size, paths) in
        [("--max-body", "100000", &refused_by_the_gate[..]), ("--body-buffer", "100000", &refused_inside[..])]
    {
        let server = Site::new().args(&[argument, size]).fake("p").start();
        server.wait_state("p", "ready");
        for (path, status) in paths {
            let mut client = server.client();
            client.send(format!("POST {path} HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n").as_bytes());
            // The host may end the connection before it has taken all.
            let _taken = client.try_send(&chunk(&body))
                && client.try_send(b"0\r\n\r\nGET /p/after HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
            let refused = client.reply(false);
            assert_eq!(refused.status, *status, "{path}: {refused:?}");
            // The connection goes on with the next request, or ends.
            let after = client.rest();
            let text = String::from_utf8_lossy(&after);
            assert!(
                text.is_empty() || (text.starts_with("HTTP/1.1 200 ") && text.ends_with("GET /after of p")),
                "{path}: {text}"
            );
        }
        let log = fs::read_to_string(server.site().data().join("logs/p.log")).unwrap_or_default();
        assert!(!log.contains("smuggled"), "{log}");
    }
}

/// As a client does that asks before it sends. There are more of them than anything the host may have set aside for them.
#[test]
fn clients_whose_refused_body_does_not_come_hold_up_nobody() {
    let server = Site::new().args(&CROWD).fake("p").start();
    server.wait_state("p", "ready");
    let begin = || {
        let mut client = server.client();
        client.send(b"POST /p/echo HTTP/1.1\r\nhost: test\r\ncontent-length: 20000000\r\n\r\n");
        client
    };
    let mut clients: Vec<Client> = (0..300).map(|_| begin()).collect();
    assert_eq!(server.get("/p/x").text(), "GET /x of p");
    for client in &mut clients {
        assert_error(&client.reply(false), 413, "too_large");
    }
}

/// The same for a plugin that does not run: it is known when the body is there.
#[test]
fn bodies_that_do_not_come_for_a_stopped_plugin_hold_up_nobody() {
    let server = Site::new().args(&CROWD).args(&["--body-timeout", "5m"]).fake("p").fake("q").start();
    for id in ["p", "q"] {
        server.wait_state(id, "ready");
    }
    server.cli(&["stop", "q"]);
    let begin = || {
        let mut client = server.client();
        client.send(b"POST /q/echo HTTP/1.1\r\nhost: test\r\ncontent-length: 5000\r\n\r\n");
        client
    };
    let mut clients: Vec<Client> = (0..400).map(|_| begin()).collect();
    assert_eq!(server.get("/p/x").text(), "GET /x of p");
    for client in &mut clients {
        client.send(&bytes(5000));
        assert_error(&client.reply(false), 503, "unavailable");
    }
}

/// Announces a body, sends its beginning, takes the answer, and goes away.
#[track_caller]
fn announce(server: &Server, path: &str, length: u64) {
    let (status, code) = if length > 9_999_999_999_999_999_999 { (400, "bad_request") } else { (413, "too_large") };
    let mut client = server.client();
    client.send(format!("POST {path} HTTP/1.1\r\nhost: test\r\ncontent-length: {length}\r\n\r\nbeginning").as_bytes());
    assert_error(&client.reply(false), status, code);
}

/// A terabyte is more than there is memory for: whoever believes it is dead.
#[test]
fn an_announced_gigantic_body_does_no_harm() {
    let server = server_of_p();
    for length in [1 << 31, 1 << 33, 1 << 40, 1 << 62, u64::MAX] {
        for path in ["/p/echo", "/nothing", "/api/plugins"] {
            announce(&server, path, length);
            assert_eq!(server.get("/p/x").text(), "GET /x of p", "after {length} bytes were announced for {path}");
        }
    }
    let peak = server.memory("VmHWM");
    assert!(peak < 40 << 20, "{peak} bytes");
}

#[test]
fn a_body_whose_length_is_not_clear_is_refused() {
    let server = server_of_p();
    for framing in [
        "content-length: 3\r\ntransfer-encoding: chunked",
        "content-length: 3\r\ncontent-length: 3",
        "content-length: 3\r\ncontent-length: 4",
        "content-length: +3",
        "content-length: 3, 3",
        "content-length: -1",
        "content-length: three",
        "content-length:",
        "transfer-encoding: gzip",
        "transfer-encoding: gzip, chunked",
        "transfer-encoding: chunked\r\ntransfer-encoding: chunked",
    ] {
        let mut client = server.client();
        client.send(format!("POST /p/echo HTTP/1.1\r\nhost: test\r\n{framing}\r\n\r\n").as_bytes());
        client.send(b"0\r\n\r\n");
        let (status, code) = if framing.contains("gzip") { (501, "not_implemented") } else { (400, "bad_request") };
        assert_error(&client.reply(false), status, code);
    }
    assert_eq!(server.get("/p/x").text(), "GET /x of p");
}

#[test]
fn a_broken_chunk_is_refused_and_the_plugin_goes_on() {
    let server = server_of_p();
    let pid = server.plugin("p")["process"]["pid"].clone();
    for before in [0, 200_000] {
        let mut client = server.client();
        client.send(b"POST /p/upload HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n");
        if before > 0 {
            client.send(&chunk(&bytes(before)));
        }
        client.send(b"no number\r\nabc\r\n0\r\n\r\n");
        assert_error(&client.reply(false), 400, "bad_request");
        assert_eq!(server.get("/p/x").text(), "GET /x of p");
    }
    assert_eq!(server.plugin("p")["process"]["pid"], pid);
}

#[test]
fn a_head_too_large_for_the_protocol_is_refused() {
    let server = Site::new().args(&["--max-head", "64KiB"]).fake("p").start();
    server.wait_state("p", "ready");
    let large = "x".repeat(70_000);
    for body in [&b""[..], b"body"] {
        assert_error(&server.request("POST", "/p/echo", &[("x-large", &large)], body), 431, "head_too_large");
        let fits = server.request("POST", "/p/echo", &[("x-large", &large[..50_000])], body);
        assert_eq!((fits.status, &*fits.body), (200, body));
    }
}

#[test]
fn a_connection_serves_one_request_after_another() {
    let server = server_of_p();
    let mut client = server.client();
    for number in 0..50 {
        assert_eq!(client.get(&format!("/p/{number}")).text(), format!("GET /{number} of p"));
    }
    // And those that are sent before the answers came, whoever answers.
    let paths = ["/p/a", "/healthz", "/p/b", "/nothing", "/p/download?bytes=70000", "/p/c"];
    for path in paths {
        client.send(format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n").as_bytes());
    }
    let lengths = paths.map(|_| client.reply(false)).map(|reply| (reply.status, reply.body.len()));
    assert_eq!(lengths, [(200, 11), (200, 3), (200, 11), (404, lengths[3].1), (200, 70_000), (200, 11)]);
}

/// Some old clients send one that nobody asked for.
#[test]
fn an_empty_line_behind_a_body_is_not_the_beginning_of_a_request() {
    let server = Site::new().args(&["--head-timeout", "200ms"]).fake("p").start();
    server.wait_state("p", "ready");
    let mut client = server.client();
    client.send(b"POST /p/echo HTTP/1.1\r\nhost: test\r\ncontent-length: 5\r\n\r\nhello\r\n");
    assert_eq!(client.reply(false).text(), "hello");
    pause(Duration::from_millis(500));
    assert_eq!(client.get("/p/x").text(), "GET /x of p");
}

#[test]
fn a_client_that_asks_for_it_has_its_connection_closed() {
    let server = server_of_p();
    for path in ["/p/x", "/healthz", "/nothing", "/p/error", "/p/download?bytes=70000"] {
        let mut client = server.client();
        let reply = client.request("GET", path, &[("Connection", "Close")], b"");
        assert!(reply.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close")), "{path}: {reply:?}");
        assert!(client.is_closed(), "{path}");
    }
}

#[test]
fn a_client_of_http_1_0_gets_no_chunks_and_the_end_of_its_connection() {
    let server = server_of_p();
    for (path, length) in [("/p/x", 11), ("/p/download?bytes=300000", 300_000), ("/p/download?bytes=0", 0)] {
        let mut client = server.client();
        client.send(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes());
        let reply = client.reply(false);
        assert_eq!((reply.status, reply.header("transfer-encoding"), reply.body.len()), (200, None, length), "{path}");
        assert!(client.is_closed());
    }
    let mut client = server.client();
    client.send(b"POST /p/echo HTTP/1.0\r\ncontent-length: 5\r\n\r\nhello");
    assert_eq!(client.reply(false).text(), "hello");
}

#[test]
fn a_client_that_expects_to_be_told_to_go_on_is_told() {
    let server = Site::new().args(&["--max-body", "100000"]).fake("p").start();
    server.wait_state("p", "ready");
    let mut client = server.client();
    for size in [5, 2000, 100_000] {
        let body = bytes(size);
        client.send(
            format!("POST /p/echo HTTP/1.1\r\nhost: test\r\nexpect: 100-continue\r\ncontent-length: {size}\r\n\r\n").as_bytes(),
        );
        assert_eq!(client.reply_head().status, 100);
        client.send(&body);
        let reply = client.reply_head();
        assert_eq!(reply.status, 200);
        assert!(client.body_piece(&reply).is_some_and(|echoed| echoed == body));
    }
    // And one whose body is not wanted is told that, not to go on.
    client.send(b"POST /p/echo HTTP/1.1\r\nhost: test\r\nexpect: 100-continue\r\ncontent-length: 100001\r\n\r\n");
    assert_eq!(client.reply_head().status, 413);
}

#[test]
fn a_crowd_of_clients_is_answered_right() {
    let server = Site::new().args(&CROWD).example("hello").start();
    server.wait_state("hello", "ready");
    let mut clients: Vec<Client> = (0..200).map(|_| server.client()).collect();
    std::thread::scope(|scope| {
        // All connections are in use at once; a thread looks after its share of them.
        for (thread, clients) in clients.chunks_mut(25).enumerate() {
            std::thread::Builder::new()
                .spawn_scoped(scope, move || {
                    for round in 0..20 {
                        for (number, client) in clients.iter_mut().enumerate() {
                            client
                                .send(format!("GET /hello/{thread}-{number}-{round} HTTP/1.1\r\nhost: test\r\n\r\n").as_bytes());
                        }
                        for (number, client) in clients.iter_mut().enumerate() {
                            assert_eq!(client.reply(false).text(), format!("Hello, {thread}-{number}-{round}!"));
                        }
                    }
                })
                .unwrap();
        }
    });
    assert_eq!(server.plugin("hello")["process"]["answered"], 4000);
}

#[test]
fn requests_that_go_alone_get_a_plugin_another_connection() {
    let server = Site::new().example("hello").start();
    server.wait_state("hello", "ready");
    let mut clients: Vec<Client> = (0..8).map(|_| server.client()).collect();
    // How many there are in the end depends on how quick the plugin is, and whether quick ones are closed again on the processors.
    wait_for("another connection", || {
        for _ in 0..20 {
            let request = b"POST /hello/you HTTP/1.1\r\nhost: test\r\ncontent-length: 0\r\n\r\n";
            clients.iter_mut().for_each(|client| client.send(request));
            clients.iter_mut().for_each(|client| assert_eq!(client.reply(false).status, 405));
        }
        (server.plugin("hello")["process"]["connections"].as_i64() >= Some(2)).then_some(())
    });
}
