//! The store over HTTP on the host socket: `docs/protocol.md`, "The store over HTTP". Real clients run in the plugin's session, and a relay
//! of the plugin's carries the bytes of those that no client sends.

use crate::docs::blocks_in;
use crate::kv::Wire;
use crate::support::http::{Client, Reply, chunk};
use crate::support::strain::Disk;
use crate::support::{Server, Site, command, pause, range, uids, wait_for, wait_within};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Largest value.
const MIB: usize = 1024 * 1024;

/// Connections a plugin may have to the host.
const CONNECTIONS: usize = 64;

/// A host with one plugin, `p`, and the socket by which the test is this plugin.
struct Store {
    server: Server,
    relay: PathBuf,
}

impl Store {
    fn new() -> Self {
        Self::of(Site::new().fake("p"))
    }

    fn of(site: Site) -> Self {
        let server = site.start();
        let relay = relay(&server, "p");
        Self { server, relay }
    }

    fn client(&self) -> Client {
        Client::connect_unix(&self.relay)
    }

    /// One request on a connection of its own.
    #[track_caller]
    fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
        self.client().request(method, path, headers, body)
    }

    /// What a script of the plugin's prints.
    #[track_caller]
    fn run(&self, program: &str, script: &str) -> String {
        let ran = self.server.request("POST", &format!("/p/run?with={program}"), &[], script.as_bytes());
        assert_eq!(ran.status, 200, "{script}: {}", String::from_utf8_lossy(&ran.body));
        String::from_utf8(ran.body).unwrap()
    }

    /// Sends bytes on a connection of their own, which the host closes: what it said.
    fn end(&self, bytes: &[u8]) -> Vec<u8> {
        let mut client = self.client();
        client.send(bytes);
        client.rest()
    }

    /// The same of bytes that are answered by one error: its status and code.
    #[track_caller]
    fn refused(&self, bytes: &[u8]) -> (u16, String) {
        let mut client = self.client();
        client.send(bytes);
        let reply = client.reply(false);
        assert_eq!(reply.header("connection"), Some("close"), "{reply:?}");
        assert!(client.is_closed(), "{reply:?}");
        (reply.status, error(&reply).0)
    }

    fn keys(&self) -> Vec<String> {
        let keys = self.ask("GET", "/kv?limit=1000", &[], b"").json()["keys"].take();
        keys.as_array().unwrap().iter().map(|entry| entry["key"].as_str().unwrap().to_owned()).collect()
    }
}

fn relay(server: &Server, plugin: &str) -> PathBuf {
    server.get(&format!("/{plugin}/relay")).text().into()
}

/// Code and message of an error.
#[track_caller]
fn error(reply: &Reply) -> (String, String) {
    assert_eq!(reply.header("content-type"), Some("application/json"), "{reply:?}");
    let error = &reply.json()["error"];
    let text = |name: &str| error[name].as_str().unwrap_or_else(|| panic!("{reply:?}")).to_owned();
    let message = text("message");
    assert!(!message.is_empty() && !message.contains('\n') && !message.ends_with('.'), "one sentence: {message}");
    (text("code"), message)
}

fn encoded(key: &str) -> String {
    key.bytes().map(|byte| format!("%{byte:02x}")).collect()
}

/// Appends the next byte, unless the connection has ended.
fn read_one(client: &mut Client, bytes: &mut Vec<u8>) -> bool {
    let byte = client.all(1);
    bytes.extend_from_slice(&byte);
    !byte.is_empty()
}

/// Each line follows the one before, in a namespace that is empty at first; so revisions are as written.
#[test]
fn every_operation_answers_over_http() {
    const NO_BODY: &[u8] = b"";
    let store = Store::new();
    let mut client = store.client();
    let txn = br#"[{"op":"set","key":"t","value":"\u00e9"},{"op":"incr","key":"c","delta":2},
        {"op":"set","key":"u","value_base64":"AP8=","if_absent":true},{"op":"delete","key":"b"},{"op":"delete","key":"x"}]"#;
    for (method, path, headers, body, status, tag, answer) in [
        ("GET", "/kv/a", &[][..], NO_BODY, 404, None, "not_found"),
        ("HEAD", "/kv/a", &[], b"", 404, None, ""),
        ("DELETE", "/kv/a", &[], b"", 404, None, "not_found"),
        ("PUT", "/kv/a", &[], b"one", 204, Some("\"1\""), ""),
        ("GET", "/kv/a", &[], b"", 200, Some("\"1\""), "one"),
        ("HEAD", "/kv/a", &[], b"", 200, Some("\"1\""), ""),
        ("GET", "/kv/a", &[("if-none-match", "\"1\"")], b"", 304, Some("\"1\""), ""),
        ("HEAD", "/kv/a", &[("If-None-Match", "W/\"0\", W/\"1\"")], b"", 304, Some("\"1\""), ""),
        ("GET", "/kv/a", &[("if-none-match", "*")], b"", 304, Some("\"1\""), ""),
        ("GET", "/kv/a", &[("if-none-match", "\"2\"")], b"", 200, Some("\"1\""), "one"),
        ("PUT", "/kv/a?if_rev=1", &[], b"two", 204, Some("\"2\""), ""),
        ("PUT", "/kv/a?if_rev=1", &[], b"no", 412, None, "conflict"),
        ("PUT", "/kv/a", &[("if-match", "\"2\"")], b"three", 204, Some("\"3\""), ""),
        ("PUT", "/kv/a", &[("if-match", "\"2\"")], b"no", 412, None, "conflict"),
        ("PUT", "/kv/b?if_absent=true", &[], b"", 204, Some("\"4\""), ""),
        ("PUT", "/kv/b?if_absent=true", &[], b"no", 412, None, "conflict"),
        ("PUT", "/kv/b", &[("if-none-match", "*")], b"no", 412, None, "conflict"),
        ("GET", "/kv/b", &[], b"", 200, Some("\"4\""), ""),
        ("POST", "/kv/n?op=incr", &[], b"", 200, Some("\"5\""), "1"),
        ("POST", "/kv/n?op=incr&delta=-5", &[], b"", 200, Some("\"6\""), "-4"),
        ("GET", "/kv/n", &[], b"", 200, Some("\"6\""), "-4"),
        ("DELETE", "/kv/n?if_rev=5", &[], b"", 412, None, "conflict"),
        ("DELETE", "/kv/n?if_rev=6", &[], b"", 204, None, ""),
        ("DELETE", "/kv/a", &[("if-match", "\"2\"")], b"", 412, None, "conflict"),
        ("DELETE", "/kv/a", &[("if-match", "\"3\"")], b"", 204, None, ""),
        ("DELETE", "/kv/a?if_rev=3", &[], b"", 412, None, "conflict"),
        (
            "POST",
            "/kv?op=txn",
            &[],
            txn,
            200,
            None,
            "[{\"rev\":7},{\"rev\":8,\"value\":2},{\"rev\":9},{\"found\":true},{\"found\":false}]\n",
        ),
        ("GET", "/kv/t", &[], b"", 200, Some("\"7\""), "é"),
        (
            "GET",
            "/kv?after=c&limit=1&values=true",
            &[],
            b"",
            200,
            None,
            "{\"keys\":[{\"key\":\"t\",\"rev\":7,\"size\":2,\"value_base64\":\"w6k=\"}],\"next\":\"t\"}\n",
        ),
        ("GET", "/kv?prefix=u", &[], b"", 200, None, "{\"keys\":[{\"key\":\"u\",\"rev\":9,\"size\":2}]}\n"),
        ("HEAD", "/kv?prefix=u", &[], b"", 200, None, ""),
        ("GET", "/kv?prefix=none", &[], b"", 200, None, "{\"keys\":[]}\n"),
        ("GET", "/kv?after=u&values=false&limit=1000", &[], b"", 200, None, "{\"keys\":[]}\n"),
    ] {
        let reply = client.request(method, path, headers, body);
        assert_eq!((reply.status, reply.header("etag")), (status, tag), "{method} {path}: {reply:?}");
        assert!(reply.header("date").is_some() && reply.header("connection").is_none(), "{reply:?}");
        if status >= 400 && method != "HEAD" {
            assert_eq!(error(&reply).0, answer, "{method} {path}");
        } else {
            assert_eq!(reply.text(), answer, "{method} {path}");
        }
        let length = reply.header("content-length");
        match (status, method) {
            (204, _) => assert_eq!(length, None),
            (404, "HEAD") => assert_ne!(length, Some("0")),
            (200 | 304, "HEAD") => assert_eq!(length, Some(if path == "/kv/a" { "3" } else { "40" }), "{path}"),
            (200, _) => assert_eq!(length, Some(answer.len().to_string().as_str())),
            _ => {}
        }
    }
}

#[test]
fn values_expire_over_http() {
    let store = Store::new();
    let left = |path: &str| {
        let reply = store.ask("HEAD", path, &[], b"");
        reply.header("x-kv-expires-in-ms").map(|left| left.parse::<u64>().unwrap())
    };
    assert_eq!(store.ask("PUT", "/kv/a?ttl_ms=600000", &[], b"x").status, 204);
    assert!((1..=600_000).contains(&left("/kv/a").unwrap()));
    assert_eq!(store.ask("PUT", "/kv/a", &[], b"x").status, 204);
    assert_eq!(left("/kv/a"), None);
    assert_eq!(store.ask("POST", "/kv/n?op=incr&ttl_ms=600000", &[], b"").text(), "1");
    assert!((1..=600_000).contains(&left("/kv/n").unwrap()));
    assert_eq!(store.ask("PUT", "/kv/a?ttl_ms=30", &[], b"x").status, 204);
    wait_for("the value to expire", || (store.ask("GET", "/kv/a", &[], b"").status == 404).then_some(()));
    assert_eq!(store.keys(), ["n"]);
}

#[test]
fn a_list_goes_on_page_by_page() {
    let store = Store::new();
    let keys: Vec<String> = (0..25).map(|n| format!("page/{n:02} ä&=+")).collect();
    for key in &keys {
        assert_eq!(store.ask("PUT", &format!("/kv/{}", encoded(key)), &[], b"x").status, 204);
    }
    let (mut after, mut found) = (String::new(), Vec::new());
    for size in [10, 10, 5] {
        let page = store.ask("GET", &format!("/kv?prefix=page%2F&limit=10&after={}", encoded(&after)), &[], b"").json();
        let entries = page["keys"].as_array().unwrap();
        assert_eq!(entries.len(), size);
        found.extend(entries.iter().map(|entry| entry["key"].as_str().unwrap().to_owned()));
        after = page["next"].as_str().unwrap_or_default().to_owned();
    }
    assert_eq!((found, after.as_str()), (keys, ""), "no next after the last");
}

#[test]
fn a_key_is_what_follows_the_path_of_the_store() {
    let store = Store::new();
    let ascii: String = (0..=127u8).map(char::from).collect();
    let longest = "é".repeat(256);
    for key in ["a", "a/b", "/", "//", "a?b#c%d", "%", "%41", " ", "+", "é/🔑", "..", "../x", &ascii, &longest] {
        let path = format!("/kv/{}", encoded(key));
        assert_eq!(store.ask("PUT", &path, &[], key.as_bytes()).status, 204, "{key:?}");
        let (value, found) = Wire::new(&store.server, "p", "keys").get(key).value();
        assert_eq!((found, value), (true, key.as_bytes().to_vec()), "the frames know it as {key:?}");
        assert_eq!(store.ask("GET", &path.to_uppercase().replace("/KV", "/kv"), &[], b"").text(), key);
    }
    // What need not be encoded, and bytes beyond ASCII as they are.
    for (path, key) in [("/kv/a/b", "a/b"), ("/kv//", "/"), ("/kv/é/🔑", "é/🔑"), ("/kv/+", "+"), ("http://any.host/kv/a", "a")]
    {
        assert_eq!(store.ask("GET", path, &[], b"").text(), key, "{path}");
    }
    for path in ["/kv/", &format!("/kv/{}", encoded(&format!("{longest}x"))), "/kv/%ff", "/kv/%", "/kv/%4", "/kv/%g0"] {
        for (method, query) in [("GET", ""), ("PUT", ""), ("DELETE", ""), ("POST", "?op=incr")] {
            let reply = store.ask(method, &format!("{path}{query}"), &[], b"");
            assert_eq!((reply.status, error(&reply).0.as_str()), (400, "bad_key"), "{method} {path}");
        }
    }
    for name in ["prefix", "after"] {
        let reply = store.ask("GET", &format!("/kv?{name}={}", "k".repeat(513)), &[], b"");
        assert_eq!((reply.status, error(&reply).0.as_str()), (400, "bad_key"));
    }
}

#[test]
fn values_are_any_bytes_up_to_1_mib_and_not_one_more() {
    let store = Store::new();
    let binary: Vec<u8> = (0..MIB).map(|n| (n ^ (n >> 8)).to_le_bytes()[0]).collect();
    let mut client = store.client();
    for value in [&b""[..], b"\0", b"\xff\xfe\r\n\r\n0\r\n\r\n", &binary] {
        assert_eq!(client.request("PUT", "/kv/v", &[], value).status, 204);
        assert!(client.get("/kv/v").body == value, "{} bytes", value.len());
        let chunks: Vec<&[u8]> = value.chunks(77_777).collect();
        assert_eq!(client.request_chunked("PUT", "/kv/chunked", &chunks).status, 204);
        let reply = client.get("/kv/chunked");
        assert!(reply.body == value && reply.header("content-type") == Some("application/octet-stream"), "{}", value.len());
    }
    let listed = client.get("/kv?values=true").json();
    assert_eq!((&listed["keys"][1]["size"], &listed["keys"][1]["value_base64"]), (&json!(MIB), &Value::Null));

    let over = vec![b'x'; MIB + 1];
    let length = format!("PUT /kv/v HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n", MIB + 1);
    let in_chunks = b"PUT /kv/v HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n";
    for bytes in [
        [length.as_bytes(), &over].concat(),
        [in_chunks, &chunk(&over)[..], b"0\r\n\r\n"].concat(),
        [in_chunks, &chunk(&over[..MIB])[..], &chunk(b"x"), b"0\r\n\r\n"].concat(),
        [in_chunks, &b"ffffffffffffffff\r\n"[..]].concat(),
        b"POST /kv?op=txn HTTP/1.1\r\nhost: a\r\ncontent-length: 9999999999999999999\r\n\r\n".to_vec(),
    ] {
        assert_eq!(store.refused(&bytes), (413, "too_large".to_owned()));
    }
    assert!(store.ask("GET", "/kv/v", &[], b"").body == binary, "nothing was written");
    let many = Value::from(vec![json!({"op": "incr", "key": "many"}); 129]).to_string();
    assert_eq!(error(&store.ask("POST", "/kv?op=txn", &[], many.as_bytes())).0, "bad_request");
}

#[test]
fn what_is_no_operation_is_refused_and_the_connection_stays() {
    let store = Store::new();
    let mut client = store.client();
    assert_eq!(client.request("PUT", "/kv/text", &[], b"twelve").status, 204);
    let before = store.ask("GET", "/kv?values=true", &[], b"").text().to_owned();
    for (method, path, body, status, code) in [
        ("GET", "/", &b""[..], 404, "not_found"),
        ("GET", "/kvv", b"", 404, "not_found"),
        ("PUT", "/KV/a", b"1", 404, "not_found"),
        ("PATCH", "/kv/text", b"1", 405, "method_not_allowed"),
        ("OPTIONS", "/kv/text", b"", 405, "method_not_allowed"),
        ("put", "/kv/text", b"1", 405, "method_not_allowed"),
        ("PUT", "/kv", b"1", 405, "method_not_allowed"),
        ("DELETE", "/kv?prefix=", b"", 405, "method_not_allowed"),
        ("POST", "/kv/text", b"", 400, "bad_request"),
        ("POST", "/kv/text?op=set", b"1", 400, "bad_request"),
        ("POST", "/kv/text?op=incr", b"", 400, "bad_request"),
        ("POST", "/kv/n?op=incr&delta=1.5", b"", 400, "bad_request"),
        ("POST", "/kv/n?op=incr&ttl_ms=0", b"", 400, "bad_request"),
        ("POST", "/kv/n?op=incr", b"1", 400, "bad_request"),
        ("GET", "/kv/text", b"1", 400, "bad_request"),
        ("DELETE", "/kv/text", b"1", 400, "bad_request"),
        ("GET", "/kv", b"1", 400, "bad_request"),
        ("PUT", "/kv/text?ttl=1", b"1", 400, "bad_request"),
        ("PUT", "/kv/text?ttl_ms=315360000001", b"1", 400, "bad_request"),
        ("PUT", "/kv/text?if_absent=true&if_rev=1", b"1", 400, "bad_request"),
        ("GET", "/kv?limit=1001", b"", 400, "bad_request"),
        ("POST", "/kv?op=txn", b"{}", 400, "bad_request"),
        ("POST", "/kv?op=txn", b"", 400, "bad_request"),
    ] {
        let reply = client.request(method, path, &[], body);
        assert_eq!((reply.status, error(&reply).0.as_str()), (status, code), "{method} {path}");
        let allow = match path.starts_with("/kv/") {
            true => "GET, HEAD, PUT, POST, DELETE",
            false => "GET, HEAD, POST",
        };
        assert_eq!(reply.header("allow"), (status == 405).then_some(allow), "{method} {path}");
        assert!(status != 405 || error(&reply).1.contains(allow), "{reply:?}");
    }
    let reply = client.request(
        "POST",
        "/kv?op=txn",
        &[],
        br#"[{"op":"incr","key":"n"},{"op":"set","key":"text","value":"x","if_absent":true}]"#,
    );
    assert_eq!((reply.status, error(&reply).0.as_str(), &reply.json()["error"]["index"]), (412, "conflict", &json!(1)));
    assert_eq!(store.ask("GET", "/kv?values=true", &[], b"").text(), before, "nothing was written");
    for method in ["CONNECT", "TRACE"] {
        let mut client = store.client();
        let reply = client.request(method, "/kv/a", &[], b"");
        assert_eq!((reply.status, error(&reply).0.as_str()), (405, "method_not_allowed"));
        assert!(reply.header("allow").is_some() && client.is_closed());
    }
}

#[test]
fn what_is_no_http_is_refused_by_one_sentence_in_the_plugin_s_log_too() {
    let store = Store::new();
    let mut good = store.client();
    assert_eq!(good.request("PUT", "/kv/a", &[], b"1").status, 204);
    let long = format!("GET /kv/{} HTTP/1.1\r\nhost: a\r\n\r\n", "k".repeat(17_000));
    let wide = format!("GET /kv/a HTTP/1.1\r\nhost: a\r\nx: {}\r\n\r\n", "x".repeat(17_000));
    let many = format!("GET /kv/a HTTP/1.1\r\nhost: a\r\n{}\r\n", "x: y\r\n".repeat(64));
    let head = |lines: &str| format!("PUT /kv/a HTTP/1.1\r\nhost: a\r\n{lines}\r\n\r\n");
    for (bytes, status, code) in [
        ("GET / HTTP/1.1\r\n\r\n", 400, "bad_request"),
        ("GET /kv/a HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", 400, "bad_request"),
        ("GET /kv/a HTTP/1.1\nhost: a\n\n", 400, "bad_request"),
        ("GET  /kv/a HTTP/1.1\r\nhost: a\r\n\r\n", 400, "bad_request"),
        ("GET kv/a HTTP/1.1\r\nhost: a\r\n\r\n", 400, "bad_request"),
        ("GET /kv/a#b HTTP/1.1\r\nhost: a\r\n\r\n", 400, "bad_request"),
        ("GET /kv/a HTTP/1.1\r\nhost: a\r\nx : y\r\n\r\n", 400, "bad_request"),
        ("GET /kv/a HTTP/2.0\r\nhost: a\r\n\r\n", 505, "version_not_supported"),
        ("SELECT\t1\r\n", 400, "bad_request"),
        (&long, 414, "uri_too_long"),
        (&wide, 431, "head_too_large"),
        (&many, 431, "head_too_large"),
        (&"M".repeat(33), 501, "not_implemented"),
        (&head("expect: 200-ok\r\ncontent-length: 1"), 417, "expectation_failed"),
        (&head("transfer-encoding: gzip"), 501, "not_implemented"),
        (&head("content-length: 1\r\ntransfer-encoding: chunked"), 400, "bad_request"),
        (&head("content-length: 1\r\ncontent-length: 1"), 400, "bad_request"),
        (&head("content-length: +1"), 400, "bad_request"),
        (&(head("transfer-encoding: chunked") + "x\r\n"), 400, "bad_request"),
        (&(head("transfer-encoding: chunked") + "1\r\nab"), 400, "bad_request"),
        (&(head("transfer-encoding: chunked") + "1;" + &"x".repeat(20_000)), 413, "too_large"),
    ] {
        assert_eq!(store.refused(bytes.as_bytes()), (status, code.to_owned()), "{bytes:.80}");
        assert_eq!(good.get("/kv/a").text(), "1");
    }
    let line = "to the host socket was closed: its HTTP request is refused: the request has no host";
    store.server.wait_logged("p", &[line]);
    // What does not even look like HTTP is told what a frame is.
    for bytes in
        [&b"\r\nGET / HTTP/1.1\r\n"[..], b"{\"type\":\"kv\",\"id\":1}", b"\x16\x03\x01\x02\x00\x01\x00\x01", b"!\0\0\0\0\0\0\0"]
    {
        assert_eq!(store.end(bytes), b"", "{bytes:?}");
    }
    store.server.wait_logged(
        "p",
        &["is 33 in little-endian; lengths are big-endian", "a frame begins with two 4-byte big-endian lengths"],
    );
    assert_eq!(store.server.plugin("p")["process"]["restarts"], 0);
}

#[test]
fn a_connection_keeps_the_language_that_it_began_with() {
    let store = Store::new();
    let frame = crate::kv::request(1, &json!({"op": "set", "key": "a"}), b"by a frame");
    let mut client = store.client();
    assert_eq!(client.request("PUT", "/kv/a", &[], b"1").status, 204);
    client.send(&frame);
    let reply = client.reply(false);
    let (code, message) = error(&reply);
    assert_eq!((reply.status, code.as_str()), (400, "bad_request"));
    assert_eq!(message, "the connection began with HTTP: frames need a connection of their own");
    assert!(client.is_closed());
    let request = b"PUT /kv/a HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\n2";
    let mut wire = Wire::new(&store.server, "p", "frames");
    assert_eq!(wire.get("a").value(), (b"1".to_vec(), true));
    assert!(wire.send(request, 1).is_empty(), "a frame's connection takes no HTTP");
    assert_eq!(store.ask("GET", "/kv/a", &[], b"").text(), "1");
}

#[test]
fn frames_and_http_are_one_store() {
    let store = Store::new();
    let (mut wire, mut client) = (Wire::new(&store.server, "p", "a"), store.client());
    for n in 0..50u64 {
        assert_eq!(client.request("POST", "/kv/n?op=incr", &[], b"").text(), (2 * n + 1).to_string());
        assert_eq!(wire.ask(&json!({"op": "incr", "key": "n"}), b"").head["value"], 2 * n + 2);
        assert_eq!(client.get("/kv/n").header("etag"), Some(format!("\"{}\"", 2 * n + 2).as_str()));
    }
    // Both at once, several of each.
    std::thread::scope(|scope| {
        for name in 0..4 {
            let store = &store;
            scope.spawn(move || {
                let mut wire = Wire::new(&store.server, "p", &format!("w{name}"));
                (0..25).for_each(|_| assert_eq!(wire.ask(&json!({"op": "incr", "key": "both"}), b"").head["type"], "result"));
            });
            scope.spawn(move || {
                let mut client = store.client();
                (0..25).for_each(|_| assert_eq!(client.request("POST", "/kv/both?op=incr", &[], b"").status, 200));
            });
        }
    });
    assert_eq!(store.ask("GET", "/kv/both", &[], b"").text(), "200");
}

/// Writes of one go share a commit; the reads among them must not overtake them, and refusals keep their place.
#[test]
fn pipelined_requests_are_answered_in_order_however_they_arrive() {
    let store = Store::new();
    let (mut sent, mut expected) = (Vec::new(), Vec::new());
    for n in 0..300 {
        let key = n % 3;
        let (request, status, body) = match n % 6 {
            0 | 1 => (format!("PUT /kv/k{key} HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\n{n:04}"), 204, String::new()),
            2 => {
                let chunked =
                    format!("host: a\r\ntransfer-encoding: chunked\r\n\r\n1;x=y\r\n0\r\n3\r\n{n:03}\r\n0\r\nt: u\r\n\r\n");
                (format!("PUT /kv/k{key} HTTP/1.1\r\n{chunked}"), 204, String::new())
            }
            3 => (format!("\r\nGET /kv/k{key} HTTP/1.1\r\nhost: a\r\n\r\n"), 200, format!("{:04}", n - 3)),
            4 => ("GET /kv/ HTTP/1.1\r\nhost: a\r\n\r\n".to_owned(), 400, "bad_key".to_owned()),
            _ => (format!("POST /kv/k{key}?op=incr HTTP/1.1\r\nhost: a\r\n\r\n"), 200, (n - 2).to_string()),
        };
        sent.extend_from_slice(request.as_bytes());
        expected.push((status, body));
    }
    // The counts make numbers of the third key: the next value is set again before it is read.
    for size in [sent.len(), 1000, 7] {
        let mut client = store.client();
        let mut answered = 0;
        for part in sent.chunks(size) {
            client.send(part);
        }
        for (number, (status, body)) in expected.iter().enumerate() {
            let reply = client.reply(false);
            let said = if *status == 400 { error(&reply).0 } else { reply.text().to_owned() };
            assert_eq!((reply.status, &said), (*status, body), "number {number} in parts of {size}");
            answered += 1;
        }
        assert_eq!(answered, 300);
        client.send(b"GET /kv/k0 HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\nGET /kv/k0 HTTP/1.1\r\nhost: a\r\n\r\n");
        assert_eq!(client.reply(false).header("connection"), Some("close"));
        assert!(client.is_closed(), "nothing after the last answer");
    }
    // More than the host holds for one connection: it goes on as the answers are taken.
    let large: Vec<u8> = (0..5u8)
        .flat_map(|n| {
            [format!("PUT /kv/l{n} HTTP/1.1\r\nhost: a\r\ncontent-length: {MIB}\r\n\r\n").into_bytes(), vec![n; MIB]].concat()
        })
        .collect();
    let mut client = store.client();
    client.send(&large);
    (0..5).for_each(|_| assert_eq!(client.reply(false).status, 204));
    client.send("GET /kv/l3 HTTP/1.1\r\nhost: a\r\n\r\n".repeat(5).as_bytes());
    (0..5).for_each(|_| assert!(client.reply(false).body == vec![3; MIB]));
}

#[test]
fn http_1_0_and_100_continue_are_understood() {
    let store = Store::new();
    let mut client = store.client();
    client.send(b"PUT /kv/a HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 3\r\n\r\n");
    assert_eq!(client.reply_head().status, 100);
    client.send(b"one");
    assert_eq!(client.reply_head().status, 204);
    client.send(b"GET /kv/a HTTP/1.1\r\nhost: a\r\n\r\nPUT /kv/a HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ntransfer-encoding: chunked\r\n\r\n");
    assert_eq!(client.reply(false).text(), "one", "what was asked before is answered first");
    assert_eq!(client.reply_head().status, 100);
    client.send(b"3\r\ntwo\r\n0\r\n\r\n");
    assert_eq!(client.reply(false).status, 204);
    // A body that is refused is not asked for.
    for (head, status) in
        [("PUT /kv/a?ttl=1 HTTP/1.1\r\ncontent-length: 3", 400), ("PUT /kv/a HTTP/1.1\r\ncontent-length: 1048577", 413)]
    {
        let mut client = store.client();
        client.send(format!("{head}\r\nhost: a\r\nexpect: 100-continue\r\n\r\n").as_bytes());
        assert_eq!(client.reply_head().status, status);
    }
    let mut client = store.client();
    client.send(b"GET /kv/a HTTP/1.0\r\nconnection: keep-alive\r\n\r\n");
    let reply = client.reply(false);
    assert_eq!((reply.text(), reply.header("connection")), ("two", Some("keep-alive")));
    client.send(b"GET /kv/a HTTP/1.0\r\n\r\n");
    assert_eq!(client.reply(false).header("connection"), Some("close"));
    assert!(client.is_closed());
}

#[test]
fn half_a_request_is_refused_at_its_end_and_does_nothing() {
    let store = Store::new();
    for half in [
        "G",
        "PUT /kv/a HTTP/1.1\r\nhost: a",
        "PUT /kv/a HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\n",
        "PUT /kv/a HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\n12",
        "PUT /kv/a HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3\r\n123\r\n",
        "PUT /kv/a HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3\r\n123\r\n0\r\n",
    ] {
        let mut client = store.client();
        client.send(b"POST /kv/n?op=incr HTTP/1.1\r\nhost: a\r\n\r\n");
        client.send(half.as_bytes());
        client.end_sending();
        assert_eq!(client.reply(false).status, 200, "what was whole before it is done");
        let reply = client.reply(false);
        assert_eq!((reply.status, error(&reply).0.as_str()), (400, "bad_request"), "{half}");
        assert!(client.is_closed());
    }
    let mut client = store.client();
    client.send(b"POST /kv/n?op=incr HTTP/1.1\r\nhost: a\r\n\r\n");
    client.end_sending();
    assert_eq!(client.reply(false).text(), "7", "a whole request is answered to who has ended its sending");
    assert!(client.is_closed());
    assert_eq!(store.keys(), ["n"]);
}

/// Bytes that keep coming do not prolong the time.
#[test]
fn a_slow_request_is_timed_out_and_an_idle_connection_is_not() {
    let store = Store::new();
    let mut idle = store.client();
    assert_eq!(idle.request("PUT", "/kv/a", &[], b"1").status, 204);
    std::thread::scope(|scope| {
        let head = &b"GET /kv/a HTTP/1.1\r\nhost: a\r\nx: "[..];
        let body = &b"PUT /kv/a HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\n"[..];
        for (begin, least) in [(head, 9), (body, 29)] {
            let store = &store;
            scope.spawn(move || {
                let mut client = store.client();
                let begun = Instant::now();
                client.send(begin);
                wait_within(Duration::from_secs(120), "the refusal", || {
                    client.try_send(b"x");
                    client.wait_readable(Duration::from_millis(200)).then_some(())
                });
                let reply = client.reply(false);
                assert_eq!((reply.status, error(&reply).0.as_str()), (408, "timeout"));
                assert!(begun.elapsed() >= Duration::from_secs(least), "{:?}", begun.elapsed());
                assert!(client.is_closed());
            });
        }
    });
    assert_eq!(idle.get("/kv/a").text(), "1");
}

#[test]
fn a_caller_that_reads_no_answers_is_cut_off_and_keeps_nobody_waiting() {
    let store = Store::new();
    assert_eq!(store.ask("PUT", "/kv/large", &[], &vec![1; MIB]).status, 204);
    let mut client = store.client();
    client.send("GET /kv/large HTTP/1.1\r\nhost: a\r\n\r\n".repeat(16).as_bytes());
    assert_eq!(store.ask("PUT", "/kv/a", &[], b"1").status, 204);
    let log = store.server.site().data().join("logs/p.log");
    let line = "to the host socket was closed: the replies to its requests were not read within 30 s";
    let cut_off = || std::fs::read_to_string(&log).unwrap().contains(line).then_some(());
    wait_within(Duration::from_secs(180), "the host to close the connection", cut_off);
    assert!(client.rest().len() < 16 * MIB);
    assert_eq!(store.ask("GET", "/kv/a", &[], b"").text(), "1");
}

#[test]
fn a_request_with_any_byte_changed_is_answered_or_refused() {
    let store = Store::new();
    let good = b"PUT /kv/a%20b?ttl_ms=60000 HTTP/1.1\r\nhost: a\r\nif-none-match: *\r\ncontent-length: 5\r\n\r\nvalue";
    for at in 0..good.len() {
        for byte in [0, b'\n', b'\r', b' ', b'%', b':', b'9', 0xff] {
            let mut bytes = good.to_vec();
            bytes[at] = byte;
            let mut client = store.client();
            client.send(&bytes);
            client.end_sending();
            let said = String::from_utf8(client.rest()).unwrap();
            // What does not begin as HTTP is read as frames, which have no answer.
            let is_http = bytes[0].is_ascii_alphanumeric() || bytes[0] == b'%';
            let is_http = is_http && !bytes[..4].contains(&0);
            assert_eq!(said.starts_with("HTTP/1.1 "), is_http, "{:?}: {said}", bytes.escape_ascii().to_string());
            assert!(!said.contains("HTTP/1.1 500"), "{:?}: {said}", bytes.escape_ascii().to_string());
        }
    }
    assert_eq!(store.ask("PUT", "/kv/last", &[], b"x").status, 204);
}

#[test]
fn two_callers_with_if_rev_lose_no_change() {
    const EACH: usize = 40;
    let store = Store::new();
    std::thread::scope(|scope| {
        for conditional in ["header", "parameter"] {
            let store = &store;
            scope.spawn(move || {
                let mut client = store.client();
                let mut done = 0;
                while done < EACH {
                    let reply = client.get("/kv/sum");
                    let sum: u64 = if reply.status == 404 { 0 } else { reply.text().parse().unwrap() };
                    let next = (sum + 1).to_string();
                    let rev = reply.header("etag").map(|tag| tag.trim_matches('"').to_owned());
                    let reply = match (rev, conditional) {
                        (None, "header") => client.request("PUT", "/kv/sum", &[("if-none-match", "*")], next.as_bytes()),
                        (None, _) => client.request("PUT", "/kv/sum?if_absent=true", &[], next.as_bytes()),
                        (Some(rev), "header") => {
                            client.request("PUT", "/kv/sum", &[("if-match", &format!("\"{rev}\""))], next.as_bytes())
                        }
                        (Some(rev), _) => client.request("PUT", &format!("/kv/sum?if_rev={rev}"), &[], next.as_bytes()),
                    };
                    match reply.status {
                        204 => done += 1,
                        status => assert_eq!((status, error(&reply).0.as_str()), (412, "conflict")),
                    }
                }
            });
        }
    });
    assert_eq!(store.ask("GET", "/kv/sum", &[], b"").text(), (2 * EACH).to_string());
}

#[test]
fn acknowledged_writes_outlive_the_kill_of_the_host() {
    let mut store = Store::new();
    let mut acknowledged: BTreeMap<String, usize> = BTreeMap::new();
    for round in 1..=3 {
        let written = std::thread::scope(|scope| {
            let writers: Vec<_> = (0..4)
                .map(|writer| {
                    let mut client = store.client();
                    scope.spawn(move || {
                        let mut last = None;
                        for n in 0.. {
                            let value = (round * 1_000_000 + n).to_string();
                            let length = value.len();
                            let head = format!("PUT /kv/w{writer} HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n");
                            if !client.try_send((head + &value).as_bytes()) || !client.wait_readable(Duration::from_secs(30)) {
                                break;
                            }
                            // The end of the stream is readable too, and says nothing.
                            let mut head = client.all("HTTP/1.1 204".len());
                            if head != b"HTTP/1.1 204" {
                                break;
                            }
                            while !head.ends_with(b"\r\n\r\n") && read_one(&mut client, &mut head) {}
                            last = Some((format!("w{writer}"), round * 1_000_000 + n));
                        }
                        last
                    })
                })
                .collect();
            pause(Duration::from_millis(300));
            let pid = store.server.pid().to_string();
            assert!(command("kill").args(["-s", "KILL", &pid]).status().unwrap().success());
            writers.into_iter().filter_map(|writer| writer.join().unwrap()).collect::<Vec<_>>()
        });
        assert_eq!(written.len(), 4, "each had an answer");
        acknowledged.extend(written);
        store = Store::of(store.server.kill());
        for (key, last) in &acknowledged {
            let found: usize = store.ask("GET", &format!("/kv/{key}"), &[], b"").text().parse().unwrap();
            assert!((*last..=last + 1).contains(&found), "{key} is {found}, {last} was acknowledged");
        }
    }
}

#[test]
fn a_caller_that_is_no_plugin_is_refused() {
    let store = Store::of(Site::new().fake("p").fake("q"));
    assert_eq!(store.ask("PUT", "/kv/a", &[], b"of p").status, 204);
    let other = relay(&store.server, "q");
    assert_eq!(Client::connect_unix(&other).get("/kv/a").status, 404, "each plugin has its own keys");
    let socket = store.server.site().data().join("run/host.sock");
    let stranger = |socket: &Path| {
        let url = ["-sS", "-w", "\n%{http_code}", "--max-time", "60", "http://plugrack/kv/a", "--unix-socket"];
        String::from_utf8(command("curl").args(url).arg(socket).output().unwrap().stdout).unwrap()
    };
    // A busy machine may take longer than the host waits for the request.
    let said = wait_for("an answer", || Some(stranger(&socket)).filter(|said| said.ends_with("403")));
    let (body, _) = said.rsplit_once('\n').unwrap();
    let body: Value = serde_json::from_str(body).unwrap();
    assert_eq!(body["error"]["code"], "forbidden");
    assert!(body["error"]["message"].as_str().unwrap().contains("not in the session of a running plugin"));
    assert!(store.server.log().contains("is not in a plugin's session"), "{}", store.server.log());
    // Strangers that say nothing keep no plugin waiting.
    let silent: Vec<_> = (0..40).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    assert_eq!(store.ask("GET", "/kv/a", &[], b"").text(), "of p");
    drop(silent);
    // A descendant belongs to the plugin by its session alone.
    let curl = "curl -s -o /dev/null -w '%{http_code} ' --unix-socket $PLUGRACK_HOST_SOCKET http://plugrack/kv/a";
    let both = || store.run("sh", &format!("{curl}; setsid -w {curl} || true"));
    wait_for("both answers", || (both().trim() == "200 403").then_some(()));
}

#[test]
fn with_a_uid_of_its_own_a_plugin_has_its_own_keys() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let server = Site::new().args(&["--plugin-uids", &range(&uids())]).fake("p").fake("q").start();
    let count = |plugin: &str| {
        let script = "id -u >&2; curl -sS -X POST --unix-socket $PLUGRACK_HOST_SOCKET 'http://plugrack/kv/n?op=incr'";
        let ran = server.request("POST", &format!("/{plugin}/run?with=sh"), &[], script.as_bytes());
        let (uid, sum) = ran.text().split_once('\n').unwrap();
        (uid.parse::<u32>().unwrap(), sum.to_owned())
    };
    let (first, again, other) = (count("p"), count("p"), count("q"));
    assert_eq!([&*first.1, &again.1, &other.1], ["1", "2", "1"]);
    assert!(first.0 == again.0 && first.0 != other.0 && first.0 > 0, "{first:?} {other:?}");
}

#[test]
fn a_sixty_fifth_connection_is_refused_whatever_it_speaks() {
    let store = Store::new();
    let mut clients: Vec<_> = (0..CONNECTIONS / 2).map(|_| store.client()).collect();
    assert!(clients.iter_mut().all(|client| client.get("/kv").status == 200));
    let mut wires: Vec<_> = (0..CONNECTIONS / 2).map(|n| Wire::new(&store.server, "p", &n)).collect();
    assert!(wires.iter_mut().all(|wire| !wire.get("a").value().1));
    let reply = wait_for("an answer", || {
        let mut client = store.client();
        client.send(b"GET /kv HTTP/1.1\r\nhost: a\r\n\r\n");
        client.wait_readable(Duration::from_secs(30)).then_some(())?;
        (client.all(9) == b"HTTP/1.1 ").then(|| String::from_utf8(client.rest()).unwrap())
    });
    assert!(reply.starts_with("503 ") && reply.contains("\"overloaded\"") && reply.contains("retry-after: 1"), "{reply}");
    assert!(clients.iter_mut().all(|client| client.get("/kv").status == 200));
    drop(clients);
    wait_for("a place", || {
        let mut client = store.client();
        client.send(b"GET /kv HTTP/1.1\r\nhost: a\r\n\r\n");
        client.wait_readable(Duration::from_secs(30)).then_some(())?;
        (client.all(12) == b"HTTP/1.1 200").then_some(())
    });
}

#[test]
fn a_full_namespace_and_a_failing_store_have_the_codes_of_the_frames() {
    let store = Store::of(Site::new().args(&["--kv-max-keys", "2", "--kv-max-bytes", "1000"]).fake("p"));
    let check = |method: &str, path: &str, body: &[u8], status: u16, code: &str| {
        let reply = store.ask(method, path, &[], body);
        assert_eq!((reply.status, error(&reply).0.as_str()), (status, code), "{method} {path}");
        reply
    };
    check("PUT", "/kv/a", &[1; 1000], 507, "quota");
    assert_eq!(store.ask("PUT", "/kv/a", &[], b"1").status, 204);
    assert_eq!(store.ask("PUT", "/kv/b", &[], b"1").status, 204);
    check("POST", "/kv/c?op=incr", b"", 507, "quota");
    let reply = check("POST", "/kv?op=txn", br#"[{"op":"delete","key":"x"},{"op":"incr","key":"c"}]"#, 507, "quota");
    assert_eq!(reply.json()["error"]["index"], 1);

    let database = rusqlite::Connection::open(store.server.site().data().join("plugrack.db")).unwrap();
    database.execute_batch("BEGIN EXCLUSIVE").unwrap();
    let reply = check("PUT", "/kv/a", b"2", 503, "busy");
    assert_eq!(reply.header("retry-after"), Some("1"));
    assert_eq!(store.ask("GET", "/kv/a", &[], b"").text(), "1", "reads go on");
    database.execute_batch("ROLLBACK; ALTER TABLE kv RENAME TO elsewhere").unwrap();
    for (method, path) in [("GET", "/kv/a"), ("PUT", "/kv/a"), ("DELETE", "/kv/a"), ("POST", "/kv/a?op=incr"), ("GET", "/kv")] {
        let reply = check(method, path, b"", 500, "internal");
        assert!(!reply.text().contains("kv"), "{reply:?}");
    }
    database.execute_batch("ALTER TABLE elsewhere RENAME TO kv").unwrap();
    assert_eq!(store.ask("GET", "/kv/a", &[], b"").text(), "1", "nothing was written");
}

#[test]
fn a_full_disk_is_told_over_http() {
    let site = Site::new();
    let Some(disk) = Disk::in_memory(&site, "12m") else { return };
    let store = Store::of(site.fake("p"));
    let mut client = store.client();
    disk.fill(0);
    let full = (0..5000).find_map(|n| {
        let reply = client.request("PUT", &format!("/kv/{n}"), &[], &[b'x'; 5000]);
        (reply.status != 204).then_some(reply)
    });
    let full = full.expect("the disk is not full");
    assert_eq!((full.status, error(&full).0.as_str()), (507, "no_space"));
    disk.free();
    assert_eq!(client.request("PUT", "/kv/again", &[], b"x").status, 204);
}

#[test]
fn curl_in_a_shell_script_has_all_of_it() {
    let store = Store::new();
    let said = store.run(
        "sh",
        r#"set -eu
        store() { curl -sS --unix-socket "$PLUGRACK_HOST_SOCKET" "$@"; }
        at=http://plugrack/kv
        store "$at/visits?op=incr" -X POST; echo
        store "$at/visits?op=incr&delta=41" -d ''; echo
        head -c 1048576 /dev/urandom > large
        store -T large "$at/large" -w '%{http_code}\n'
        store -T large -H 'expect: 100-continue' "$at/large" -w '%{http_code}\n'
        store -T - "$at/chunked" -w '%{http_code}\n' < large
        store "$at/large" | cmp - large; store "$at/chunked" | cmp - large
        printf x >> large
        store -T large "$at/large" -o over -w '%{http_code}\n'; cat over
        store -T - "$at/chunked" -o over -w '%{http_code}\n' < large; cat over
        store -X PUT --data-binary @- "$at/a%2Fb%20c" < /etc/hostname
        store "$at/a%2Fb%20c" | cmp - /etc/hostname
        store -I "$at/visits" | tr -d '\r' | grep -e ^HTTP -e ^etag -e ^content-length
        store --etag-save tag "$at/visits" > /dev/null
        store --etag-compare tag "$at/visits" -w '%{http_code}\n'
        store -X PUT -d new -H "if-match: $(cat tag)" "$at/visits" -w '%{http_code}\n'
        store -X PUT -d new -H "if-match: $(cat tag)" "$at/visits" -w '%{http_code}\n'
        store -G "$at" --data-urlencode 'prefix=a/b c' -d limit=1; store "$at?op=txn" -d '[{"op":"delete","key":"visits"}]'
        store -X DELETE "$at/visits" -w '%{http_code}\n'
        store "$at/large" -o one "$at/large" -o two "$at?limit=1" -o three -w '%{num_connects} '; cmp one two; echo
        "#,
    );
    let over = r#"{"error":{"code":"too_large","message":"the body is over the limit of 1048576 bytes"}}"#;
    let size = std::fs::metadata("/etc/hostname").unwrap().len();
    let lines: Vec<&str> = said.lines().collect();
    let conflict = r#"{"error":{"code":"conflict","message":"the key \"visits\" has revision 7, not 2"}}"#;
    let gone = r#"{"error":{"code":"not_found","message":"there is no such key"}}"#;
    let listed = format!(r#"{{"keys":[{{"key":"a/b c","rev":6,"size":{size}}}]}}"#);
    let expected = [
        "1",
        "42",
        "204",
        "204",
        "204",
        "413",
        over,
        "413",
        over,
        "HTTP/1.1 200 OK",
        "etag: \"2\"",
        "content-length: 2",
        "304",
        "204",
        conflict,
        "412",
        &listed,
        r#"[{"found":true}]"#,
        gone,
        "404",
        "1 0 0 ",
    ];
    assert_eq!(lines, expected, "{said}");
}

#[test]
fn php_has_the_store_with_curl_and_with_streams() {
    let store = Store::new();
    let said = store.run(
        "php",
        r#"<?php
        $curl = curl_init();
        function ask($method, $path, $body = null, $headers = []) {
            global $curl;
            curl_reset($curl);
            curl_setopt_array($curl, [CURLOPT_UNIX_SOCKET_PATH => getenv('PLUGRACK_HOST_SOCKET'), CURLOPT_RETURNTRANSFER => true,
                CURLOPT_URL => "http://plugrack$path", CURLOPT_CUSTOMREQUEST => $method, CURLOPT_HTTPHEADER => $headers]);
            if ($body !== null) curl_setopt($curl, CURLOPT_POSTFIELDS, $body);
            $answer = curl_exec($curl);
            return curl_getinfo($curl, CURLINFO_RESPONSE_CODE) . " $answer";
        }
        $key = rawurlencode("ключ/% ?#\0");
        $value = random_bytes(1048576);
        echo ask('PUT', "/kv/$key", $value), "\n";
        echo ask('GET', "/kv/$key") === "200 $value" ? 'same' : 'different', "\n";
        echo ask('PUT', "/kv/$key", $value . 'x'), "\n";
        echo ask('POST', '/kv/n?' . http_build_query(['op' => 'incr', 'delta' => PHP_INT_MAX])), "\n";
        echo ask('GET', '/kv?' . http_build_query(['prefix' => 'ключ/% ?#', 'limit' => 5])), "\n";
        $writes = [['op' => 'set', 'key' => 'b', 'value_base64' => base64_encode("\xff")], ['op' => 'delete', 'key' => 'n']];
        echo ask('POST', '/kv?op=txn', json_encode($writes)), "\n";
        echo ask('DELETE', '/kv/n'), "\n";

        $stream = stream_socket_client('unix://' . getenv('PLUGRACK_HOST_SOCKET'));
        fwrite($stream, "PUT /kv/b HTTP/1.0\r\nif-match: \"3\"\r\nconnection: keep-alive\r\ncontent-length: 5\r\n\r\nhello");
        fwrite($stream, "GET /kv/b HTTP/1.0\r\n\r\n");
        echo preg_replace('/date: .*\r\n/', '', stream_get_contents($stream)), "\n";
        "#,
    );
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines[..2], ["204 ", "same"], "{said}");
    assert!(lines[2].starts_with("413 {"), "{said}");
    assert_eq!(lines[4], "200 9223372036854775807", "{said}");
    assert!(lines[5].starts_with(r#"200 {"keys":[{"key":"ключ/% ?#\u0000","rev":1,"size":1048576}]}"#), "{said}");
    assert_eq!(lines[7], r#"200 [{"rev":3},{"found":true}]"#, "{said}");
    assert!(lines[9].starts_with("404 {"), "{said}");
    let rest = lines[11..].join("\n");
    assert!(rest.starts_with("HTTP/1.1 204 No Content\netag: \"4\"\nconnection: keep-alive\n\nHTTP/1.1 200 OK\n"), "{said}");
    assert!(rest.ends_with("\n\nhello"), "{said}");
}

#[test]
fn the_page_s_examples_work_as_they_stand_there() {
    let store = Store::new();
    let [shell] = &blocks_in("docs/protocol.md", "sh")[..] else { panic!("the page has one script") };
    for visits in 1..=2 {
        let said = store.run("sh", &format!("set -eu\n{shell}"));
        let expected = format!("You are visitor number {visits}.\nThe store has the file.\nThis script does the work.\n");
        assert_eq!(said, expected);
    }
    assert_eq!(store.ask("PUT", "/kv/lock?ttl_ms=60000", &[], b"").status, 204);
    assert!(!store.run("sh", shell).contains("does the work"), "another one has the lock");

    let [php] = &blocks_in("docs/protocol.md", "php")[..] else { panic!("the page has one program") };
    assert_eq!(store.run("php", php), "guest 1\n");
    assert_eq!(store.run("php", php), "guest 1, guest 2\n");
    let reply = store.ask("GET", &format!("/kv/{}", encoded("guests/café 100%")), &[], b"");
    assert_eq!(reply.json(), json!(["guest 1", "guest 2"]));
}
