//! A plugin's own calls: `docs/protocol.md`, section 5, over the host's socket.

use crate::support::{Server, Site, wait_for};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

/// Largest body of a frame, and largest value.
const MIB: usize = 1024 * 1024;

/// Connections a plugin may have to the host.
const CONNECTIONS: usize = 64;

/// A frame of any head.
fn frame(head: &[u8], body: &[u8]) -> Vec<u8> {
    let length = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap().to_be_bytes();
    [&length(head)[..], &length(body)[..], head, body].concat()
}

/// The frame of a request.
pub(super) fn request(id: u64, op: &Value, body: &[u8]) -> Vec<u8> {
    let mut head = json!({"type": "kv", "id": id});
    head.as_object_mut().unwrap().extend(op.as_object().unwrap().clone());
    frame(head.to_string().as_bytes(), body)
}

/// What the host has sent.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) head: Value,
    pub(super) body: Vec<u8>,
}

impl Answer {
    /// The whole frames in some bytes.
    fn all(mut bytes: &[u8]) -> Vec<Self> {
        let mut answers = Vec::new();
        while let [a, b, c, d, e, f, g, h, rest @ ..] = bytes {
            let (head, rest) = rest.split_at(u32::from_be_bytes([*a, *b, *c, *d]) as usize);
            let (body, rest) = rest.split_at(u32::from_be_bytes([*e, *f, *g, *h]) as usize);
            answers.push(Self { head: serde_json::from_slice(head).unwrap(), body: body.to_vec() });
            bytes = rest;
        }
        answers
    }

    /// The code of an error, which has a message too.
    #[track_caller]
    pub(super) fn code(&self) -> &str {
        assert_eq!(self.head["type"], "error", "{self:?}");
        assert!(!self.head["message"].as_str().unwrap().is_empty());
        self.head["code"].as_str().unwrap()
    }

    /// What a result says beyond its type and id.
    #[track_caller]
    fn fields(&self) -> Value {
        assert_eq!(self.head["type"], "result", "{self:?}");
        let mut fields = self.head.clone();
        fields.as_object_mut().unwrap().retain(|name, _| name != "type" && name != "id");
        fields
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    /// The value that a `get` has read, and whether there is one.
    #[track_caller]
    pub(super) fn value(self) -> (Vec<u8>, bool) {
        let found = self.fields()["found"] == true;
        (self.body, found)
    }
}

/// A connection of a plugin to the host, which lives in the plugin under a name.
pub(super) struct Wire<'a> {
    server: &'a Server,
    plugin: &'a str,
    name: String,
    id: u64,
}

impl<'a> Wire<'a> {
    pub(super) fn new(server: &'a Server, plugin: &'a str, name: &(impl ToString + ?Sized)) -> Self {
        Self { server, plugin, name: name.to_string(), id: 0 }
    }

    /// Sends bytes as they are and gives that many answers, fewer when the host closes the connection before.
    #[track_caller]
    pub(super) fn send(&self, bytes: &[u8], answers: usize) -> Vec<Answer> {
        let path = format!("/{}/wire?on={}&replies={answers}", self.plugin, self.name);
        let reply = self.server.request("POST", &path, &[], bytes);
        assert!(matches!(reply.status, 200 | 410), "{reply:?}");
        Answer::all(&reply.body)
    }

    /// A request and its answer.
    #[track_caller]
    pub(super) fn ask(&mut self, op: &Value, body: &[u8]) -> Answer {
        self.id += 1;
        let answer = self.send(&request(self.id, op, body), 1).pop().expect("the host has closed the connection");
        assert_eq!(answer.head["id"], self.id);
        answer
    }

    /// The same with a value, if the request is a `set`: no other operation on a key has one.
    #[track_caller]
    fn ask_with(&mut self, op: &Value, value: &[u8]) -> Answer {
        self.ask(op, if op["op"] == "set" { value } else { b"" })
    }

    #[track_caller]
    pub(super) fn get(&mut self, key: &str) -> Answer {
        self.ask(&json!({"op": "get", "key": key}), b"")
    }

    /// Sets a value and gives its revision.
    #[track_caller]
    fn set(&mut self, key: &str, value: &[u8]) -> u64 {
        self.ask(&json!({"op": "set", "key": key}), value).fields()["rev"].as_u64().unwrap()
    }

    #[track_caller]
    fn txn(&mut self, writes: &Value) -> Answer {
        self.ask(&json!({"op": "txn"}), writes.to_string().as_bytes())
    }

    /// All the keys that begin with a prefix, by pages of `limit`, and how many entries each page had.
    #[track_caller]
    fn list(&mut self, mut op: Value) -> (Vec<Value>, Vec<usize>) {
        let (mut entries, mut pages) = (Vec::new(), Vec::new());
        op["op"] = "list".into();
        loop {
            let page = self.ask(&op, b"");
            let Value::Array(some) = page.json() else { panic!("{page:?}") };
            pages.push(some.len());
            entries.extend(some);
            match page.fields().get("next") {
                Some(next) => op["after"] = next.clone(),
                None => return (entries, pages),
            }
        }
    }

    /// The names of all keys.
    #[track_caller]
    fn keys(&mut self) -> Vec<String> {
        self.list(json!({"limit": 1000})).0.iter().map(|entry| entry["key"].as_str().unwrap().to_owned()).collect()
    }

    /// Whether the host answers no more here.
    #[track_caller]
    fn is_closed(&mut self) -> bool {
        self.send(&request(0, &json!({"op": "list", "limit": 1}), b""), 1).is_empty()
    }

    fn close(self) {
        let path = format!("/{}/unwire?on={}", self.plugin, self.name);
        assert_eq!(self.server.request("POST", &path, &[], b"").status, 200);
    }
}

/// A host with one plugin, `p`.
fn server() -> Server {
    Site::new().fake("p").start()
}

/// Each line follows the one before, in a namespace that is empty at first; so revisions are as written.
#[test]
fn every_operation_answers_as_the_protocol_says() {
    let server = server();
    let mut wire = Wire::new(&server, "p", "a");
    let none: &[u8] = b"";
    for (op, body, fields, value) in [
        (json!({"op": "get", "key": "a"}), none, json!({"found": false}), none),
        (json!({"op": "delete", "key": "a"}), b"", json!({"found": false}), b""),
        (json!({"op": "set", "key": "a"}), b"one", json!({"rev": 1}), b""),
        (json!({"op": "get", "key": "a"}), b"", json!({"found": true, "rev": 1}), b"one"),
        (json!({"op": "get", "key": "a", "color": "red", "more": true}), b"", json!({"found": true, "rev": 1}), b"one"),
        (json!({"op": "set", "key": "a", "if_rev": 1}), b"two", json!({"rev": 2}), b""),
        (json!({"op": "set", "key": "b", "if_absent": true}), b"", json!({"rev": 3}), b""),
        (json!({"op": "set", "key": "a", "if_absent": false}), b"three", json!({"rev": 4}), b""),
        (json!({"op": "incr", "key": "n"}), b"", json!({"value": 1, "rev": 5}), b""),
        (json!({"op": "incr", "key": "n", "delta": -5}), b"", json!({"value": -4, "rev": 6}), b""),
        (json!({"op": "incr", "key": "n", "delta": 0}), b"", json!({"value": -4, "rev": 7}), b""),
        (json!({"op": "get", "key": "n"}), b"", json!({"found": true, "rev": 7}), b"-4"),
        (json!({"op": "delete", "key": "a", "if_rev": 4}), b"", json!({"found": true}), b""),
        (json!({"op": "delete", "key": "n"}), b"", json!({"found": true}), b""),
        (json!({"op": "incr", "key": "n", "delta": i64::MIN}), b"", json!({"value": i64::MIN, "rev": 8}), b""),
        (json!({"op": "set", "key": "a"}), b"four", json!({"rev": 9}), b""),
        (
            json!({"op": "txn"}),
            br#"[{"op":"set","key":"t","value":"\u00e9"},{"op":"incr","key":"c","delta":2},{"op":"incr","key":"c"},
                 {"op":"set","key":"u","value_base64":"AP8=","if_absent":true},{"op":"delete","key":"b"},{"op":"delete","key":"x"}]"#,
            json!({}),
            br#"[{"rev":10},{"rev":11,"value":2},{"rev":12,"value":3},{"rev":13},{"found":true},{"found":false}]"#,
        ),
        (json!({"op": "get", "key": "t"}), b"", json!({"found": true, "rev": 10}), "é".as_bytes()),
        (json!({"op": "get", "key": "u"}), b"", json!({"found": true, "rev": 13}), b"\x00\xff"),
        (
            json!({"op": "list", "prefix": "", "after": "c", "limit": 2, "values": true}),
            b"",
            json!({"next": "t"}),
            br#"[{"key":"n","rev":8,"size":20,"value_base64":"LTkyMjMzNzIwMzY4NTQ3NzU4MDg="},{"key":"t","rev":10,"size":2,"value_base64":"w6k="}]"#,
        ),
        (json!({"op": "list", "after": "t"}), b"", json!({}), br#"[{"key":"u","rev":13,"size":2}]"#),
    ] {
        let answer = wire.ask(&op, body);
        assert_eq!(answer.fields(), fields, "{op}");
        if matches!(op["op"].as_str(), Some("txn" | "list")) {
            assert_eq!(answer.json(), serde_json::from_slice::<Value>(value).unwrap(), "{op}");
        } else {
            assert_eq!(answer.body, value, "{op}");
        }
    }
}

#[test]
fn values_are_any_bytes_from_none_to_1_mib() {
    let server = server();
    let mut wire = Wire::new(&server, "p", "a");
    let binary: Vec<u8> = (0..MIB).map(|n| (n ^ (n >> 8)).to_le_bytes()[0]).collect();
    for value in [&b""[..], b"\0", b"\xff\xfe\r\n\r\n", &binary] {
        wire.set("v", value);
        let answer = wire.get("v");
        assert_eq!(answer.fields()["found"], true);
        assert!(answer.body == value, "a value of {} bytes came back as one of {}", value.len(), answer.body.len());
    }
    let huge = wire.list(json!({})).0;
    assert_eq!((&huge[0]["size"], huge.len()), (&json!(MIB), 1));
}

#[test]
fn a_list_is_in_byte_order_and_pages_hold_what_was_asked() {
    let server = server();
    let mut wire = Wire::new(&server, "p", "a");
    for key in ["b/é", "c", "b0", "b/1", "a", "b/2", "B", "b/\u{10ffff}", "b"] {
        wire.set(key, b"v");
    }
    for (op, expected) in [
        (json!({}), &["B", "a", "b", "b/1", "b/2", "b/é", "b/\u{10ffff}", "b0", "c"][..]),
        (json!({"prefix": "b/"}), &["b/1", "b/2", "b/é", "b/\u{10ffff}"]),
        (json!({"prefix": "b/", "after": "b/1"}), &["b/2", "b/é", "b/\u{10ffff}"]),
        (json!({"prefix": "b/", "after": "b/11"}), &["b/2", "b/é", "b/\u{10ffff}"]),
        (json!({"prefix": "b/", "after": "a"}), &["b/1", "b/2", "b/é", "b/\u{10ffff}"]),
        (json!({"prefix": "b/", "after": "c"}), &[]),
        (json!({"prefix": "none"}), &[]),
        (json!({"after": "b0"}), &["c"]),
    ] {
        for limit in [1, 2, 1000] {
            let mut op = op.clone();
            op["limit"] = limit.into();
            let (entries, pages) = wire.list(op.clone());
            assert_eq!(entries.iter().map(|entry| entry["key"].as_str().unwrap()).collect::<Vec<_>>(), expected, "{op}");
            let (last, full) = pages.split_last().unwrap();
            assert!(full.iter().all(|&entries| entries == limit) && *last <= limit, "{op}: {pages:?}");
        }
    }
    let many: Vec<Value> = (0..101).map(|n| json!({"op": "set", "key": format!("m{n:03}"), "value": ""})).collect();
    wire.txn(&many.into()).fields();
    assert_eq!(wire.list(json!({"prefix": "m"})).1, [100, 1], "100 entries unless told otherwise");
    assert_eq!(wire.list(json!({"prefix": "m", "limit": 101})).1, [101], "no next after the last");
}

/// A page of values would not fit one frame.
#[test]
fn a_list_of_large_values_comes_in_pages_that_fit_a_frame() {
    let server = server();
    let mut wire = Wire::new(&server, "p", "a");
    for n in 0..5u8 {
        wire.set(&n.to_string(), &vec![n; 300_000]);
    }
    let (entries, pages) = wire.list(json!({"values": true, "limit": 1000}));
    assert_eq!(pages, [2, 2, 1]);
    for (n, entry) in (0..5).zip(&entries) {
        assert_eq!((&entry["key"], &entry["size"]), (&json!(n.to_string()), &json!(300_000)));
        assert_eq!(BASE64.decode(entry["value_base64"].as_str().unwrap()).unwrap(), vec![n; 300_000]);
    }
}

#[test]
fn what_has_a_time_to_live_is_gone_after_it() {
    let server = server();
    let mut wire = Wire::new(&server, "p", "a");
    let left = |answer: &Answer| answer.fields()["expires_in_ms"].as_u64();
    wire.ask(&json!({"op": "set", "key": "a", "ttl_ms": 600_000}), b"x").fields();
    assert!((1..=600_000).contains(&left(&wire.get("a")).unwrap()));
    let listed = wire.list(json!({})).0[0]["expires_in_ms"].as_u64().unwrap();
    assert!((1..=600_000).contains(&listed));
    wire.set("a", b"y");
    assert_eq!(left(&wire.get("a")), None, "a set without a ttl makes a value that stays");
    wire.ask(&json!({"op": "set", "key": "a", "ttl_ms": 315_360_000_000u64}), b"x").fields();
    assert!(left(&wire.get("a")).unwrap() > 315_000_000_000);

    wire.ask(&json!({"op": "incr", "key": "n", "ttl_ms": 600_000}), b"").fields();
    wire.ask(&json!({"op": "incr", "key": "n", "ttl_ms": 1}), b"").fields();
    assert!(left(&wire.get("n")).unwrap() > 60_000, "a key that is there keeps its own");
    wire.set("m", b"1");
    wire.ask(&json!({"op": "incr", "key": "m", "ttl_ms": 1}), b"").fields();
    assert_eq!(left(&wire.get("m")), None);

    for (name, write) in
        [("set", json!({"op": "set", "key": "gone", "ttl_ms": 30})), ("incr", json!({"op": "incr", "key": "gone", "ttl_ms": 30}))]
    {
        let rev = wire.ask_with(&write, b"1").fields()["rev"].as_u64().unwrap();
        wait_for("the value to expire", || (wire.get("gone").fields() == json!({"found": false})).then_some(()));
        assert!(!wire.keys().contains(&"gone".to_owned()), "{name}");
        assert_eq!(wire.ask(&json!({"op": "delete", "key": "gone"}), b"").fields(), json!({"found": false}), "{name}");
        let sum = wire.ask(&json!({"op": "incr", "key": "gone", "ttl_ms": 30}), b"").fields();
        assert_eq!(
            (&sum["value"], sum["rev"].as_u64().unwrap() > rev),
            (&json!(1), true),
            "{name}: it counts from the beginning"
        );
        wait_for("the count to expire", || (wire.get("gone").fields() == json!({"found": false})).then_some(()));
        let again = wire.ask(&json!({"op": "set", "key": "gone", "if_absent": true}), b"").fields();
        assert!(again["rev"].as_u64().unwrap() > rev + 1, "{name}");
        wire.ask(&json!({"op": "delete", "key": "gone"}), b"").fields();
    }
}

#[test]
fn what_is_not_of_the_protocol_s_form_is_a_bad_request_and_the_connection_stays() {
    let server = server();
    let mut wire = Wire::new(&server, "p", "a");
    wire.set("text", b"twelve");
    wire.set("most", i64::MAX.to_string().as_bytes());
    wire.set("least", i64::MIN.to_string().as_bytes());
    wire.set("beyond", b"9223372036854775808");
    let before = wire.list(json!({"values": true}));
    for op in [
        json!({}),
        json!({"op": null}),
        json!({"op": 1}),
        json!({"op": "rename", "key": "text"}),
        json!({"op": "GET", "key": "text"}),
        json!({"op": "get"}),
        json!({"op": "get", "key": null}),
        json!({"op": "get", "key": 1}),
        json!({"op": "get", "key": ["text"]}),
        json!({"op": "set"}),
        json!({"op": "set", "key": "text", "ttl_ms": 0}),
        json!({"op": "set", "key": "text", "ttl_ms": -1}),
        json!({"op": "set", "key": "text", "ttl_ms": 1.5}),
        json!({"op": "set", "key": "text", "ttl_ms": "1"}),
        json!({"op": "set", "key": "text", "ttl_ms": 315_360_000_001u64}),
        json!({"op": "set", "key": "text", "if_rev": "1"}),
        json!({"op": "set", "key": "text", "if_rev": -1}),
        json!({"op": "set", "key": "text", "if_absent": "yes"}),
        json!({"op": "delete"}),
        json!({"op": "delete", "key": "text", "if_rev": 1.5}),
        json!({"op": "incr"}),
        json!({"op": "incr", "key": "n", "delta": "1"}),
        json!({"op": "incr", "key": "n", "delta": 1.5}),
        json!({"op": "incr", "key": "n", "delta": 1u64 << 63}),
        json!({"op": "incr", "key": "n", "ttl_ms": 0}),
        json!({"op": "incr", "key": "n", "ttl_ms": 315_360_000_001u64}),
        json!({"op": "incr", "key": "text"}),
        json!({"op": "incr", "key": "beyond"}),
        json!({"op": "incr", "key": "most"}),
        json!({"op": "incr", "key": "least", "delta": -1}),
        json!({"op": "list", "limit": 0}),
        json!({"op": "list", "limit": -1}),
        json!({"op": "list", "limit": 1001}),
        json!({"op": "list", "limit": "10"}),
        json!({"op": "list", "prefix": 1}),
        json!({"op": "list", "after": {}}),
        json!({"op": "list", "values": "all"}),
    ] {
        assert_eq!(wire.ask(&op, b"1").code(), "bad_request", "{op}");
    }
    assert_eq!(wire.list(json!({"values": true})), before, "nothing was written");
}

#[test]
fn a_txn_is_all_or_nothing_and_its_error_names_the_write_that_failed() {
    let server = server();
    let mut wire = Wire::new(&server, "p", "a");
    wire.set("other", b"");
    let rev = wire.set("there", b"text");
    let before = wire.list(json!({"values": true}));
    let good = json!({"op": "set", "key": "new", "value": "x"});
    for (write, code) in [
        (json!({"op": "set", "key": "there", "value": "x", "if_rev": rev + 1}), "conflict"),
        (json!({"op": "set", "key": "there", "value": "x", "if_absent": true}), "conflict"),
        (json!({"op": "delete", "key": "not-there", "if_rev": 1}), "conflict"),
        (json!({"op": "incr", "key": "there"}), "bad_request"),
        (json!({"op": "incr", "key": ""}), "bad_key"),
        (json!({"op": "set", "key": "", "value": "x"}), "bad_key"),
        (json!({"op": "delete", "key": "k".repeat(513)}), "bad_key"),
        (json!({"op": "set", "key": "a", "value": "x", "ttl_ms": 0}), "bad_request"),
        (json!({"op": "set", "key": "a"}), "bad_request"),
        (json!({"op": "set", "key": "a", "value": "x", "value_base64": "eA=="}), "bad_request"),
        (json!({"op": "set", "key": "a", "value_base64": "no base64"}), "bad_request"),
        (json!({"op": "set", "key": "a", "value": 1}), "bad_request"),
        (json!({"op": "set", "value": "x"}), "bad_request"),
        (json!({"op": "incr", "key": "n", "delta": "1"}), "bad_request"),
        (json!({"op": "get", "key": "other"}), "bad_request"),
        (json!({"op": "txn"}), "bad_request"),
        (json!({"key": "a", "value": "x"}), "bad_request"),
        (json!([]), "bad_request"),
        (json!(1), "bad_request"),
    ] {
        for (writes, index) in [(json!([write, good]), 0), (json!([good, {"op": "delete", "key": "other"}, write]), 2)] {
            let answer = wire.txn(&writes);
            assert_eq!((answer.code(), &answer.head["index"]), (code, &json!(index)), "{writes}: {answer:?}");
        }
    }
    let twice = wire.txn(&json!([good, {"op": "set", "key": "new", "value": "x", "if_absent": true}]));
    assert_eq!((twice.code(), &twice.head["index"]), ("conflict", &json!(1)), "each write meets what those before it did");
    for body in ["", "[]", "{}", "null", "[{", r#"{"op":"set","key":"a","value":"x"}"#] {
        assert_eq!(wire.ask(&json!({"op": "txn"}), body.as_bytes()).code(), "bad_request", "{body}");
    }
    let many = |count: usize| Value::from(vec![json!({"op": "incr", "key": "many"}); count]);
    assert_eq!(wire.txn(&many(129)).code(), "bad_request");
    assert_eq!(wire.list(json!({"values": true})), before, "nothing was written");
    let sums = wire.txn(&many(128)).json();
    assert_eq!((sums.as_array().unwrap().len(), &sums[127]["value"]), (128, &json!(128)));
}

#[test]
fn a_key_is_1_to_512_bytes_of_utf_8_and_what_is_none_is_refused() {
    let server = server();
    let mut wire = Wire::new(&server, "p", "a");
    let longest = "é".repeat(256);
    for key in ["k", "\0", " ", "a/b\\c\"d\n", "🔑", &longest] {
        wire.set(key, key.as_bytes());
        assert_eq!(wire.get(key).body, key.as_bytes(), "{key:?}");
    }
    assert_eq!(wire.list(json!({"limit": 1})).0.len(), 6);
    let long = format!("{longest}x");
    for key in ["", &long, &"k".repeat(60_000)] {
        for op in ["get", "set", "delete", "incr"] {
            assert_eq!(wire.ask_with(&json!({"op": op, "key": key}), b"1").code(), "bad_key", "{op} of {} bytes", key.len());
        }
    }
    // JSON can spell half a character, which no UTF-8 holds.
    let half = wire.send(&frame(br#"{"type":"kv","id":7,"op":"set","key":"\ud800"}"#, b"1"), 1);
    assert_eq!((half[0].code(), &half[0].head["id"]), ("bad_request", &json!(7)));
}

#[test]
fn a_precondition_that_does_not_hold_is_a_conflict_and_nothing_is_written() {
    let server = server();
    let mut wire = Wire::new(&server, "p", "a");
    let old = wire.set("a", b"old");
    let rev = wire.set("a", b"value");
    let before = wire.list(json!({"values": true}));
    for op in [
        json!({"op": "set", "key": "a", "if_rev": old}),
        json!({"op": "set", "key": "a", "if_rev": rev + 1}),
        json!({"op": "set", "key": "a", "if_rev": 0}),
        json!({"op": "set", "key": "a", "if_absent": true}),
        json!({"op": "set", "key": "b", "if_rev": rev}),
        json!({"op": "set", "key": "b", "if_rev": 0}),
        json!({"op": "delete", "key": "a", "if_rev": old}),
        json!({"op": "delete", "key": "b", "if_rev": rev}),
    ] {
        assert_eq!(wire.ask_with(&op, b"new").code(), "conflict", "{op}");
    }
    assert_eq!(wire.list(json!({"values": true})), before);
    assert_eq!(wire.set("a", b"next"), rev + 1, "a write that failed takes no revision");
}

#[test]
fn a_write_beyond_the_plugin_s_keys_or_bytes_is_refused_and_the_connection_stays() {
    let server = Site::new().args(&["--kv-max-keys", "3", "--kv-max-bytes", "1000"]).fake("p").fake("q").start();
    let mut wire = Wire::new(&server, "p", "a");
    wire.set("a", &[1; 400]);
    wire.set("b", &[1; 400]);
    for (op, body) in [
        (json!({"op": "set", "key": "c"}), vec![1; 198]),
        (json!({"op": "set", "key": "k".repeat(199)}), vec![]),
        (json!({"op": "set", "key": "a"}), vec![1; 599]),
        (json!({"op": "incr", "key": "n".repeat(198)}), vec![]),
    ] {
        assert_eq!(wire.ask(&op, &body).code(), "quota", "{op}");
    }
    wire.set("c", &[1; 197]);
    assert_eq!(wire.ask(&json!({"op": "incr", "key": "d"}), b"").code(), "quota", "a fourth key");
    wire.set("c", b"9");
    assert_eq!(wire.ask(&json!({"op": "incr", "key": "c"}), b"").fields()["value"], 10);
    let answer = wire.txn(
        &json!([{"op": "delete", "key": "a"}, {"op": "set", "key": "d", "value": "x"}, {"op": "set", "key": "e", "value": "x"}]),
    );
    assert_eq!((answer.code(), &answer.head["index"]), ("quota", &json!(2)));
    assert_eq!(wire.keys(), ["a", "b", "c"]);

    wire.ask(&json!({"op": "set", "key": "c", "ttl_ms": 30}), b"x").fields();
    wait_for("room again", || (wire.ask(&json!({"op": "set", "key": "d"}), b"x").head["type"] == "result").then_some(()));
    assert_eq!(wire.keys(), ["a", "b", "d"]);
    wire.ask(&json!({"op": "delete", "key": "a"}), b"").fields();
    wire.set("e", &[1; 400]);

    Wire::new(&server, "q", "a").set("a", &[1; 900]);
}

/// An operator may lower the limits of a plugin that holds more.
#[test]
fn over_lowered_limits_a_plugin_can_still_read_delete_and_shrink() {
    let server = Site::new().fake("p").start();
    let mut wire = Wire::new(&server, "p", "a");
    for key in ["a", "b", "c"] {
        wire.set(key, &[1; 400]);
    }
    let server = server.stop().1.args(&["--kv-max-keys", "2", "--kv-max-bytes", "500"]).start();
    let mut wire = Wire::new(&server, "p", "a");
    assert_eq!(wire.get("a").body, [1; 400]);
    wire.set("a", &[1; 399]);
    assert_eq!(wire.ask(&json!({"op": "set", "key": "a"}), &[1; 400]).code(), "quota");
    assert_eq!(wire.ask(&json!({"op": "delete", "key": "b"}), b"").fields(), json!({"found": true}));
    assert_eq!(wire.ask(&json!({"op": "set", "key": "d"}), b"").code(), "quota");
}

#[test]
fn the_namespaces_of_plugins_are_apart() {
    let server = Site::new().fake("p").fake("q").start();
    let (mut p, mut q) = (Wire::new(&server, "p", "a"), Wire::new(&server, "q", "a"));
    p.set("k", b"of p");
    assert_eq!(q.get("k").fields(), json!({"found": false}));
    assert_eq!(q.set("k", b"of q"), 1, "each has revisions of its own");
    // Fields that name a plugin are fields like any that is not known.
    let foreign = q.ask(&json!({"op": "get", "key": "k", "plugin": "p", "plugin_id": "p", "namespace": "p"}), b"");
    assert_eq!(foreign.body, b"of q");
    q.ask(&json!({"op": "delete", "key": "k"}), b"").fields();
    assert_eq!((p.get("k").body, p.keys(), q.keys()), (b"of p".to_vec(), vec!["k".to_owned()], vec![]));
}

#[test]
fn values_and_revisions_outlive_the_host_however_it_ends() {
    let server = server();
    let mut wire = Wire::new(&server, "p", "a");
    wire.set("kept", b"\x00\xff");
    wire.set("empty", b"");
    wire.ask(&json!({"op": "set", "key": "timed", "ttl_ms": 600_000}), b"").fields();
    wire.ask(&json!({"op": "incr", "key": "n", "delta": 41}), b"").fields();
    wire.set("gone", b"x");
    wire.ask(&json!({"op": "delete", "key": "gone"}), b"").fields();
    let before = wire.list(json!({"values": true, "prefix": "kept"}));
    let (status, site) = server.stop();
    assert!(status.success());

    let server = site.start();
    let mut wire = Wire::new(&server, "p", "a");
    assert_eq!(wire.list(json!({"values": true, "prefix": "kept"})), before);
    assert_eq!(wire.keys(), ["empty", "kept", "n", "timed"]);
    assert_eq!(wire.get("empty").fields(), json!({"found": true, "rev": 2}));
    assert!((1..=600_000).contains(&wire.get("timed").fields()["expires_in_ms"].as_u64().unwrap()));
    assert_eq!(wire.set("gone", b"again"), 6, "revisions go on, also past one that was deleted");
    assert_eq!(wire.ask(&json!({"op": "incr", "key": "n"}), b"").fields(), json!({"value": 42, "rev": 7}));

    let server = server.kill().start();
    let mut wire = Wire::new(&server, "p", "a");
    assert_eq!((wire.get("gone").body, wire.get("n").body), (b"again".to_vec(), b"42".to_vec()));
    assert_eq!(wire.set("kept", b""), 8);
}

/// Writes of one go share a commit; the reads among them must not overtake them.
#[test]
fn pipelined_requests_are_answered_in_order_and_a_read_sees_the_write_before_it() {
    let server = server();
    let wire = Wire::new(&server, "p", "a");
    let (mut sent, mut expected) = (Vec::new(), Vec::new());
    for n in 0..300u64 {
        let id = (1 << 53) - 1 - n; // ids need not rise
        let key = format!("k{}", n % 3);
        let (op, body, fields, value) = match n % 6 {
            0..=2 => (json!({"op": "set", "key": key}), n.to_string(), json!(null), String::new()),
            3 => (json!({"op": "get", "key": key}), String::new(), json!(true), (n - 3).to_string()),
            4 => (json!({"op": "get", "key": ""}), String::new(), json!("bad_key"), String::new()),
            _ => (json!({"op": "nothing"}), String::new(), json!("bad_request"), String::new()),
        };
        sent.extend(request(id, &op, body.as_bytes()));
        expected.push((json!(id), fields, value));
    }
    let answers = wire.send(&sent, 300);
    let got = answers.into_iter().map(|mut answer| {
        let id = answer.head["id"].take();
        let what = if answer.head["type"] == "error" { answer.head["code"].take() } else { answer.head["found"].take() };
        (id, what, String::from_utf8(answer.body).unwrap())
    });
    assert_eq!(got.collect::<Vec<_>>(), expected);
}

/// More than the host will hold for one connection at a time: it goes on as the answers are taken.
#[test]
fn large_values_can_be_pipelined() {
    let server = server();
    let mut wire = Wire::new(&server, "p", "a");
    let value = |n: u64| vec![n.to_le_bytes()[0]; MIB - 1];
    let sent: Vec<u8> = (0..5).flat_map(|n| request(n, &json!({"op": "set", "key": n.to_string()}), &value(n))).collect();
    let answers = wire.send(&sent, 5);
    assert_eq!(answers.iter().map(|answer| answer.fields()["rev"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
    let asked: Vec<u8> = (0..5).flat_map(|n| request(n, &json!({"op": "get", "key": n.to_string()}), b"")).collect();
    let answers = wire.send(&asked, 5);
    assert!((0..).zip(&answers).all(|(n, answer)| answer.body == value(n)) && answers.len() == 5);
    assert_eq!(wire.keys().len(), 5);
}

#[test]
fn threads_that_count_together_lose_no_count() {
    let server = server();
    let sums: Vec<Vec<u64>> = serde_json::from_value(server.get("/p/count?threads=16&each=25").json()).unwrap();
    assert!(sums.iter().all(|of_thread| of_thread.is_sorted()), "the counts of one connection rise");
    assert_eq!(sums.concat().into_iter().collect::<BTreeSet<_>>(), (1..=400).collect());
    assert_eq!(Wire::new(&server, "p", "a").get("counted").body, b"400");
}

#[test]
fn a_protocol_error_closes_that_connection_only() {
    let server = server();
    let mut good = Wire::new(&server, "p", "good");
    good.set("a", b"1");
    let lengths = |head: u32, body: u32| [head.to_be_bytes(), body.to_be_bytes()].concat();
    let head = |text: &str| frame(text.as_bytes(), b"");
    for (name, bytes) in [
        ("http", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
        ("no-head", lengths(0, 0)),
        ("long-head", lengths(65_537, 0)),
        ("long-body", lengths(22, 1_048_577)),
        ("not-json", head("nonsense")),
        ("not-utf-8", frame(b"{\"type\":\"kv\",\"id\":1,\"op\":\"get\",\"key\":\"\xff\"}", b"")),
        ("half-json", head(r#"{"type":"kv","id":1,"#)),
        ("two-objects", head(r#"{"type":"kv","id":1,"op":"get","key":"a"}{}"#)),
        ("array", head("[]")),
        ("array-of-fields", head(r#"["kv",1]"#)),
        ("text", head(r#""kv""#)),
        ("null", head("null")),
        ("no-type", head(r#"{"id":1,"op":"get","key":"a"}"#)),
        ("number-as-type", head(r#"{"type":1,"id":1,"op":"get","key":"a"}"#)),
        ("unknown-type", head(r#"{"type":"sql","id":1}"#)),
        ("no-id", head(r#"{"type":"kv","op":"get","key":"a"}"#)),
        ("negative-id", head(r#"{"type":"kv","id":-1,"op":"get","key":"a"}"#)),
        ("text-as-id", head(r#"{"type":"kv","id":"1","op":"get","key":"a"}"#)),
        ("part-as-id", head(r#"{"type":"kv","id":1.5,"op":"get","key":"a"}"#)),
        ("large-id", head(r#"{"type":"kv","id":9007199254740992,"op":"get","key":"a"}"#)),
        ("ping", head(r#"{"type":"ping","id":1}"#)),
        ("ready", head(r#"{"type":"ready","id":1}"#)),
        ("shutdown", head(r#"{"type":"shutdown","id":1}"#)),
        ("result", head(r#"{"type":"result","id":1}"#)),
        ("response", head(r#"{"type":"response","id":1,"status":200}"#)),
        ("http-request", head(r#"{"type":"http","id":1,"method":"GET","path":"/","mount":"/p"}"#)),
    ] {
        let mut wire = Wire::new(&server, "p", name);
        assert_eq!(wire.get("a").body, b"1", "{name}");
        let answers = wire.send(&bytes, 1);
        assert!(answers.is_empty(), "{name}: {answers:?}");
        assert_eq!(good.get("a").body, b"1", "{name}");
    }
    assert_eq!(server.plugin("p")["process"]["restarts"], 0);
    let log = server.site().data().join("logs/p.log");
    let noted = || fs::read_to_string(&log).unwrap().matches(" to the host socket was closed: ").count();
    wait_for("a line for each in the plugin's log", || (noted() == 26).then_some(()));
    let expected = |kind: &str| format!("to the host socket was closed: received a message of type {kind}, expected kv");
    server.wait_logged(
        "p",
        &["ping", "ready", "shutdown", "result", "response", "http"].map(expected).each_ref().map(String::as_str),
    );
}

/// A plugin can break the rules faster than anybody can read.
#[test]
fn protocol_errors_without_end_are_counted_and_leave_no_trace_in_the_host_s_log() {
    let server = server();
    for n in 0..80 {
        assert!(Wire::new(&server, "p", &n).send(&frame(br#"{"type":"ping","id":1}"#, b""), 1).is_empty());
    }
    let log = fs::read_to_string(server.site().data().join("logs/p.log")).unwrap();
    let noted = log.matches(" to the host socket was closed: ").count();
    assert!((1..=60).contains(&noted), "{log}");
    assert!(!server.log().contains("expected kv"), "{}", server.log());
}

#[test]
fn strangers_without_end_are_one_line_a_minute_and_no_plugin_is_kept_waiting() {
    let server = server();
    let mut wire = Wire::new(&server, "p", "a");
    let socket = server.site().data().join("run/host.sock");
    for _ in 0..500 {
        // Some are gone before they are seen.
        drop(UnixStream::connect(&socket).unwrap());
    }
    wire.set("a", b"1");
    wait_for("the host to say so", || server.log().contains("its connection to the host socket is closed").then_some(()));
    assert_eq!(server.log().matches("to the host socket is closed").count(), 1, "{}", server.log());
    let crowd: Vec<_> = (0..CONNECTIONS + 20).map(|n| Wire::new(&server, "p", &format!("c{n}")).is_closed()).collect();
    assert!(crowd.iter().filter(|closed| **closed).count() >= 20);
    assert_eq!(server.log().matches("another one is closed").count(), 1, "{}", server.log());
    server.wait_logged("p", &["it has 64 connections to the host, which is the limit; another one is closed"]);
}

#[test]
fn a_sixty_fifth_connection_is_closed_and_places_come_back() {
    let server = Site::new().fake("p").fake("q").start();
    let mut wires: Vec<_> = (0..CONNECTIONS).map(|n| Wire::new(&server, "p", &n)).collect();
    for wire in &mut wires {
        assert!(!wire.is_closed(), "{}", wire.name);
    }
    let names = CONNECTIONS..;
    for name in names.clone().take(3) {
        assert!(Wire::new(&server, "p", &name).is_closed());
    }
    assert!(server.log().contains("p: it has 64 connections to the host, which is the limit; another one is closed"));
    assert!(!Wire::new(&server, "q", &0).is_closed(), "each plugin has its own places");
    assert!(wires.iter_mut().all(|wire| !wire.is_closed()));

    wires.drain(..2).for_each(Wire::close);
    let mut names = names.skip(3);
    for _ in 0..2 {
        let mut again = wait_for("a place", || {
            let mut wire = Wire::new(&server, "p", &names.next()?);
            (!wire.is_closed()).then_some(wire)
        });
        again.set("a", b"");
        wires.push(again);
    }
    assert!(Wire::new(&server, "p", &names.next().unwrap()).is_closed());
}

/// The end of a process gives all its places back.
#[test]
fn a_plugin_that_starts_again_has_all_its_places() {
    let server = server();
    let pid = server.wait_state("p", "ready")["process"]["pid"].as_i64().unwrap();
    assert!((0..CONNECTIONS).all(|n| !Wire::new(&server, "p", &n).is_closed()));
    server.request("POST", "/p/crash", &[], b"");
    server.wait_restarted("p", pid);
    let mut names = 0..;
    let mut open = 0;
    wait_for("all places", || {
        open += usize::from(!Wire::new(&server, "p", &names.next().unwrap()).is_closed());
        (open == CONNECTIONS).then_some(())
    });
}

#[test]
fn a_process_that_is_no_plugin_is_not_answered() {
    let server = server();
    let mut stranger = UnixStream::connect(server.site().data().join("run/host.sock")).unwrap();
    // The host may have closed the connection already.
    drop(stranger.write_all(&request(1, &json!({"op": "get", "key": "a"}), b"")));
    let mut answer = Vec::new();
    drop(stranger.read_to_end(&mut answer));
    assert!(answer.is_empty());
    let line =
        format!("process {} is not in a plugin's session: its connection to the host socket is closed", std::process::id());
    wait_for("the host to say so", || server.log().contains(&line).then_some(()));
}

#[test]
fn a_descendant_may_call_from_the_plugin_s_session_only() {
    let server = server();
    let call = |how: &str| {
        let head = br#"{"type":"kv","id":5,"op":"incr","key":"n"}"#;
        server.request("POST", &format!("/p/descendant?{how}=1"), &[], head).text().trim().to_owned()
    };
    assert_eq!(serde_json::from_str::<Value>(&call("same")).unwrap(), json!({"type": "result", "id": 5, "value": 1, "rev": 1}));
    assert_eq!(call("setsid"), "closed");
    // A caller may have ended by the time that it is looked at.
    let said = ["is not in a plugin's session", "has ended: its connection to the host socket is closed"];
    assert!(said.iter().any(|line| server.log().contains(line)), "{}", server.log());
    assert_eq!(Wire::new(&server, "p", "a").get("n").body, b"1");
}

#[test]
fn a_store_that_fails_is_internal_and_its_reason_is_the_operator_s() {
    let server = server();
    let mut wire = Wire::new(&server, "p", "a");
    wire.set("a", b"1");
    let database = rusqlite::Connection::open(server.site().data().join("plugrack.db")).unwrap();
    database.execute_batch("ALTER TABLE kv RENAME TO elsewhere").unwrap();
    for op in [
        json!({"op": "get", "key": "a"}),
        json!({"op": "set", "key": "a"}),
        json!({"op": "delete", "key": "a"}),
        json!({"op": "incr", "key": "a"}),
        json!({"op": "list"}),
    ] {
        let answer = wire.ask_with(&op, b"2");
        assert_eq!(answer.code(), "internal", "{op}");
        assert!(!answer.head.to_string().contains("kv"), "{answer:?}");
    }
    let answer = wire.txn(&json!([{"op": "set", "key": "a", "value": "2"}]));
    assert_eq!(answer.code(), "internal");
    assert!(server.log().contains("no such table: kv"));
    database.execute_batch("ALTER TABLE elsewhere RENAME TO kv").unwrap();
    assert_eq!(wire.get("a").fields(), json!({"found": true, "rev": 1}), "nothing was written");
    assert_eq!(wire.set("a", b"2"), 2);
}

/// Another process holds the database while many connections write, until the queue of the store is full.
#[test]
fn a_store_with_too_much_to_do_is_busy_and_writes_what_it_has_acknowledged() {
    const EACH: usize = 64;
    let server = server();
    let database = rusqlite::Connection::open(server.site().data().join("plugrack.db")).unwrap();
    let mut probe = Wire::new(&server, "p", "probe");
    probe.set("probe", b"");
    let wires: Vec<_> = (0..24).map(|n| Wire::new(&server, "p", &n)).collect();
    database.execute_batch("BEGIN IMMEDIATE").unwrap();
    for wire in &wires {
        let key = |n: usize| json!({"op": "set", "key": format!("{}/{n}", wire.name)});
        wire.send(&(0..EACH).flat_map(|n| request(n as u64, &key(n), b"")).collect::<Vec<_>>(), 0);
    }
    wait_for("the store to be busy", || {
        let answer = probe.ask(&json!({"op": "set", "key": "probe"}), b"");
        (answer.head["type"] == "error" && answer.code() == "busy").then_some(())
    });
    database.execute_batch("ROLLBACK").unwrap();
    let (mut written, mut refused) = (BTreeSet::from(["probe".to_owned()]), 0);
    for wire in &wires {
        for (n, answer) in wire.send(b"", EACH).iter().enumerate() {
            assert_eq!(answer.head["id"], n);
            if answer.head["type"] == "result" {
                written.insert(format!("{}/{n}", wire.name));
            } else {
                assert!(matches!(answer.code(), "busy" | "internal"), "{answer:?}");
                refused += 1;
            }
        }
    }
    assert_eq!(written.len() - 1 + refused, wires.len() * EACH, "every request has its answer");
    assert!(refused > 0);
    assert_eq!(probe.keys().into_iter().collect::<BTreeSet<_>>(), written);
}
