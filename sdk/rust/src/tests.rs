//! The SDK against a host that speaks raw frames.

mod cancel;
mod websocket;

use super::{BodyError, Error, Kv, KvError, ListOp, Operation, Outcome, Plugin, Refusal, Request, Response, SetOptions, Write};
use crate::protocol::frame::{FrameReader, ReadError, encode};
use crate::protocol::message::{MAX_BODY, WriteOutcome};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::io::{self, Read, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use tempfile::TempDir;

/// A test that waits longer than this has failed.
const PATIENCE: Duration = Duration::from_secs(20);

fn plugin() -> Plugin {
    Plugin::new("probe", "Probe", "1.0.0", "🔬", "/probe").concurrency(4)
}

fn spawn<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    thread::Builder::new().spawn(work).unwrap()
}

/// A plugin that runs on a thread of the test.
struct Running {
    dir: TempDir,
    thread: JoinHandle<ExitCode>,
}

impl Running {
    fn start<R: super::IntoResponse>(plugin: Plugin, handler: impl Fn(&mut Request<'_>) -> R + Send + Sync + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("plugin.sock")).unwrap();
        Self { dir, thread: spawn(move || plugin.serve_on(listener, handler)) }
    }

    fn host_socket(&self) -> PathBuf {
        self.dir.path().join("host.sock")
    }

    fn connect(&self) -> Peer {
        Peer::connect(&self.dir.path().join("plugin.sock"))
    }

    /// A first connection that has sent `init`.
    fn initialize(&self) -> Peer {
        let mut peer = self.connect();
        peer.send(&self.init(), b"");
        peer
    }

    fn init(&self) -> Value {
        json!({
            "type": "init", "id": 1, "protocol": 1, "instance_id": "5f0c3f0e", "plugin_id": "probe",
            "socket_path": "/run/probe.sock", "host_socket": self.host_socket(), "log_path": "/logs/probe.log",
            "data_dir": "/data/probe", "license": null, "config": {"title": "T"},
            "host": {"name": "plugrack", "version": "0.1.0"}, "later": true,
        })
    }

    /// A first connection to a plugin that is ready.
    fn ready(&self) -> Peer {
        let mut peer = self.initialize();
        assert_eq!(peer.receive(), (json!({"type": "ready", "id": 1}), vec![]));
        peer
    }

    /// Ends the plugin, whose open connections these are.
    fn shut_down(self, peers: impl IntoIterator<Item = Peer>) {
        for mut peer in peers {
            peer.send(&json!({"type": "shutdown", "id": 99}), b"");
            assert!(peer.is_closed());
        }
        assert_eq!(self.thread.join().unwrap(), ExitCode::SUCCESS);
    }
}

/// The host's end of a connection.
struct Peer(FrameReader<UnixStream>);

impl Peer {
    fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self(FrameReader::new(stream))
    }

    fn send(&mut self, head: &Value, body: &[u8]) {
        let mut frame = Vec::new();
        encode(&mut frame, head, body).unwrap();
        self.0.stream().write_all(&frame).unwrap();
    }

    fn receive(&mut self) -> (Value, Vec<u8>) {
        let frame = self.0.read().unwrap();
        (serde_json::from_slice(frame.head).unwrap(), frame.body.to_vec())
    }

    fn is_closed(&mut self) -> bool {
        match self.0.read() {
            Err(ReadError::Closed) => true,
            // What had been sent to a closed connection was not read.
            Err(ReadError::Io(error)) => error.kind() == io::ErrorKind::ConnectionReset,
            _ => false,
        }
    }

    /// Sends a request without a body and receives the head and the whole body of its response.
    fn get(&mut self, path: &str) -> (Value, Vec<u8>) {
        self.send(&http(7, "GET", path), b"");
        self.response()
    }

    fn response(&mut self) -> (Value, Vec<u8>) {
        let (head, mut body) = self.receive();
        assert_eq!(head["type"], "response", "{head}");
        let mut more = head["more"] == true;
        while more {
            let (data, piece) = self.receive();
            assert_eq!((&data["type"], &data["id"]), (&json!("data"), &head["id"]));
            body.extend(piece);
            more = data["more"] == true;
        }
        (head, body)
    }
}

fn http(id: u64, method: &str, path: &str) -> Value {
    json!({
        "type": "http", "id": id, "method": method, "path": path, "query": "a=b", "mount": "/probe",
        "headers": [["host", "example.org"], ["cookie", "a=b"], ["cookie", "c=d"]], "remote": "203.0.113.9", "later": 1,
    })
}

fn upload(id: u64, path: &str) -> Value {
    let mut head = http(id, "POST", path);
    head["more"] = json!(true);
    head
}

fn data(id: u64, more: bool) -> Value {
    json!({"type": "data", "id": id, "more": more})
}

fn echo(request: &mut Request<'_>) -> Result<Vec<u8>, BodyError> {
    request.read_body(16 * MAX_BODY)
}

fn bytes(length: usize) -> Vec<u8> {
    (0..length).map(|i| u8::try_from(i % 251).unwrap()).collect()
}

/// A host's socket. Each request it gets is answered by `reply`, which gives the reply's head without type and id, and its body.
fn host(socket: &Path, reply: impl Fn(&Value, &[u8]) -> (Value, Vec<u8>) + Send + Sync + 'static) {
    let listener = UnixListener::bind(socket).unwrap();
    let reply = Arc::new(reply);
    spawn(move || {
        for stream in listener.incoming() {
            let reply = reply.clone();
            spawn(move || {
                let mut peer = Peer(FrameReader::new(stream.unwrap()));
                while let Ok(frame) = peer.0.read() {
                    let request: Value = serde_json::from_slice(frame.head).unwrap();
                    let (mut head, body) = reply(&request, frame.body);
                    head["id"] = request["id"].clone();
                    head["type"] = json!(if head["code"].is_null() { "result" } else { "error" });
                    peer.send(&head, &body);
                }
            });
        }
    });
}

#[test]
fn handlers_see_what_init_said() {
    let plugin = plugin().on_init(|context| {
        assert_eq!((context.plugin_id(), context.instance_id(), context.license()), ("probe", "5f0c3f0e", None));
        assert_eq!(context.log_path(), Path::new("/logs/probe.log"));
        assert_eq!((&*context.host().name, &*context.host().version), ("plugrack", "0.1.0"));
        Ok(())
    });
    let running = Running::start(plugin, |request: &mut Request<'_>| {
        let context = request.context();
        Response::json(&json!({
            "title": context.config()["title"], "data_dir": context.data_dir(), "method": request.method(), "path": request.path(),
            "query": request.query(), "mount": request.mount(), "remote": request.remote(), "stopping": request.stopping(),
            "host": request.header("HOST"), "none": request.header("none"), "headers": request.headers().collect::<Vec<_>>(),
        }))
    });
    let mut peer = running.ready();
    let (head, body) = peer.get("/x%20y");
    assert_eq!(
        head,
        json!({"type": "response", "id": 7, "status": 200, "headers": [["content-type", "application/json"]], "more": false})
    );
    assert_eq!(
        serde_json::from_slice::<Value>(&body).unwrap(),
        json!({
            "title": "T", "data_dir": "/data/probe", "method": "GET", "path": "/x%20y", "query": "a=b", "mount": "/probe",
            "remote": "203.0.113.9", "stopping": false, "host": "example.org", "none": null,
            "headers": [["host", "example.org"], ["cookie", "a=b"], ["cookie", "c=d"]],
        })
    );
    running.shut_down([peer]);
}

#[test]
fn a_plugin_that_cannot_start_says_why() {
    let start = |init: fn() -> Result<(), Refusal>| {
        let running = Running::start(plugin().on_init(move |_| init()), |_: &mut Request<'_>| "");
        let (head, _) = running.initialize().receive();
        (head, running.thread.join().unwrap())
    };
    let (head, exit) = start(|| Err(Refusal::new("no licence")));
    assert_eq!(head, json!({"type": "error", "id": 1, "code": "refused", "message": "no licence"}));
    assert_eq!(exit, ExitCode::from(78));
    let (head, exit) = start(|| Err(Refusal::temporary("no database")));
    assert_eq!(head["code"], "unavailable");
    assert_eq!(exit, ExitCode::from(75));
    let (head, exit) = start(|| panic!("expected by the test"));
    assert_eq!(head["code"], "internal");
    assert_eq!(exit, ExitCode::FAILURE);
}

/// The vectors of frames for which this receiver closes its connection, at one of these places, and those of any receiver.
fn invalid_frames(receiver: &str, places: &[&str]) -> Vec<(String, Option<String>, Vec<u8>)> {
    let vectors: Value = serde_json::from_str(include_str!("../../../tests/protocol/frames.json")).unwrap();
    let due = |case: &&Value| case["to"] == "any" || case["to"] == receiver && places.iter().any(|place| case["place"] == *place);
    let cases = vectors["invalid"].as_array().unwrap().iter().filter(due);
    let bytes = |hex: &str| (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect();
    let case = |case: &Value| {
        (case["name"].to_string(), case["place"].as_str().map(str::to_owned), bytes(case["hex"].as_str().unwrap()))
    };
    cases.map(case).collect()
}

#[test]
fn an_invalid_frame_of_the_host_closes_its_connection_alone() {
    let running = Running::start(plugin(), echo);
    for (name, _, bytes) in invalid_frames("plugin", &["start"]) {
        let mut early = running.connect();
        early.0.stream().write_all(&bytes).unwrap();
        assert!(early.is_closed(), "{name}");
    }
    let mut peer = running.ready();
    let cases = invalid_frames("plugin", &["ready", "body"]);
    assert!(cases.len() > 25);
    for (name, place, bytes) in cases {
        let mut second = running.connect();
        if place.as_deref() == Some("body") {
            second.send(&upload(7, "/"), b"begin");
        }
        second.0.stream().write_all(&bytes).unwrap();
        // What was read of the body is an error to the handler, whose answer goes out before the connection ends.
        let mut ended = second.is_closed();
        if place.as_deref() == Some("body") && !ended {
            ended = second.is_closed();
        }
        assert!(ended, "{name}");
    }
    peer.send(&http(7, "GET", "/"), b"x");
    assert_eq!(peer.response().1, b"x");
    running.shut_down([peer]);
}

#[test]
fn an_invalid_reply_of_the_host_fails_its_call_and_closes_the_connection() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("host.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let kv = Kv::new(socket);
    let cases = invalid_frames("caller", &["kv get", "kv set", "kv incr"]);
    assert!(cases.len() > 20);
    for (name, place, bytes) in cases {
        thread::scope(|scope| {
            let call = || match place.as_deref() {
                Some("kv set") => kv.set("a", "b").map(drop),
                Some("kv incr") => kv.incr("a", 1).map(drop),
                _ => kv.get("a").map(drop),
            };
            let call = thread::Builder::new().spawn_scoped(scope, call).unwrap();
            let (stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut peer = Peer(FrameReader::new(stream));
            let id = peer.receive().0["id"].as_u64().unwrap();
            peer.0.stream().write_all(&with_id(&bytes, id)).unwrap();
            assert!(matches!(call.join().unwrap(), Err(KvError::Io(_))), "{name}");
            assert!(peer.is_closed(), "{name}");
        });
    }
}

/// A frame with another id in the place of 7, where its head can be told.
fn with_id(frame: &[u8], id: u64) -> Vec<u8> {
    let length = |at: usize| u32::from_be_bytes(frame[at..at + 4].try_into().unwrap()) as usize;
    let (head, body) = (length(0), length(4));
    let text = frame.get(8..8 + head).filter(|_| frame.len() == 8 + head + body).and_then(|head| str::from_utf8(head).ok());
    let Some(text) = text else { return frame.to_vec() };
    let text = text.replacen("\"id\":7", &format!("\"id\":{id}"), 1);
    let lengths = [u32::try_from(text.len()).unwrap(), u32::try_from(body).unwrap()].map(u32::to_be_bytes).concat();
    [&lengths, text.as_bytes(), &frame[8 + head..]].concat()
}

#[test]
fn what_is_out_of_place_closes_the_connection_and_no_more() {
    let running = Running::start(plugin(), |_: &mut Request<'_>| "hi");
    let mut early = running.connect();
    early.send(&http(1, "GET", "/"), b"");
    assert!(early.is_closed());
    let mut peer = running.ready();
    for wrong in [json!({"type": "what", "id": 1}), json!({"type": "pong", "id": 1}), data(1, false), json!([])] {
        let mut second = running.connect();
        let mut frames = Vec::new();
        encode(&mut frames, &json!({"type": "ping", "id": 5}), b"").unwrap();
        encode(&mut frames, &wrong, b"").unwrap();
        second.0.stream().write_all(&frames).unwrap();
        assert_eq!(second.receive().0, json!({"type": "pong", "id": 5}), "what came before the fault is answered");
        assert!(second.is_closed(), "{wrong}");
    }
    assert!(running.initialize().is_closed(), "init comes once");
    let mut second = running.connect();
    second.send(&upload(2, "/"), b"");
    assert_eq!(second.response().1, b"hi");
    second.send(&data(3, false), b"of another request");
    assert!(second.is_closed());
    assert_eq!(peer.get("/").1, b"hi");
    running.shut_down([peer]);
}

#[test]
fn an_answer_does_not_wait_for_a_slow_request_behind_it() {
    let (go, wait) = mpsc::channel::<()>();
    let wait = Mutex::new(wait);
    let running = Running::start(plugin(), move |request: &mut Request<'_>| {
        if request.path() == "/slow" {
            wait.lock().unwrap().recv_timeout(PATIENCE).unwrap();
        }
        Response::text(request.path().to_owned())
    });
    let mut peer = running.ready();
    for round in 0..3 {
        let mut batch = Vec::new();
        for (id, path) in [(2, "/quick"), (3, "/slow"), (4, "/quick")] {
            encode(&mut batch, &http(10 * round + id, "GET", path), b"").unwrap();
        }
        peer.0.stream().write_all(&batch).unwrap();
        assert_eq!(peer.response().1, b"/quick");
        go.send(()).unwrap();
        assert_eq!((peer.response().1, peer.response().1), (b"/slow".to_vec(), b"/quick".to_vec()));
    }
    running.shut_down([peer]);
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let running = Running::start(plugin(), |request: &mut Request<'_>| {
        let body = request.read_body(100)?;
        Ok::<_, BodyError>([request.path().as_bytes(), &body].concat())
    });
    let mut peer = running.ready();
    let mut batch = Vec::new();
    for id in 0..50 {
        encode(&mut batch, &http(id, "POST", &format!("/{id}")), format!(" {id}").as_bytes()).unwrap();
    }
    peer.0.stream().write_all(&batch).unwrap();
    for id in 0..50 {
        let (head, body) = peer.response();
        assert_eq!(head["id"], id);
        assert_eq!(body, format!("/{id} {id}").as_bytes());
    }
    running.shut_down([peer]);
}

#[test]
fn a_reply_does_not_wait_for_input() {
    let running = Running::start(plugin(), echo);
    let mut peer = running.ready();
    // The reply to the first must come although the second request's body is still awaited.
    let mut batch = Vec::new();
    encode(&mut batch, &json!({"type": "ping", "id": 11}), b"").unwrap();
    encode(&mut batch, &upload(12, "/"), b"a").unwrap();
    peer.0.stream().write_all(&batch).unwrap();
    assert_eq!(peer.receive(), (json!({"type": "pong", "id": 11}), vec![]));
    peer.send(&data(12, false), b"b");
    assert_eq!(peer.response().1, b"ab");
    running.shut_down([peer]);
}

#[test]
fn bodies_stream_both_ways() {
    let running = Running::start(plugin(), |request: &mut Request<'_>| match request.path() {
        "/count" => Ok(Response::text(io::copy(request, &mut io::sink())?.to_string())),
        "/bytes" => Ok(Response::bytes("a/b", bytes(3 * MAX_BODY + 5))),
        "/stream" => Ok(Response::stream("a/b", io::Cursor::new(bytes(3 * MAX_BODY + 5)))),
        "/empty" => Ok(Response::stream("a/b", io::empty())),
        _ => Err(Error::from("no such path")),
    });
    let mut peer = running.ready();
    peer.send(&upload(7, "/count"), b"12345");
    for _ in 0..5 {
        peer.send(&data(7, true), &vec![0; MAX_BODY]);
    }
    peer.send(&data(7, true), b"");
    peer.send(&data(7, false), b"67");
    assert_eq!(peer.response().1, (5 * MAX_BODY + 7).to_string().as_bytes());

    let (head, body) = peer.get("/bytes");
    assert_eq!(head["headers"], json!([["content-type", "a/b"], ["content-length", (3 * MAX_BODY + 5).to_string()]]));
    assert!(body == bytes(3 * MAX_BODY + 5));
    let (head, body) = peer.get("/stream");
    assert_eq!(head["headers"], json!([["content-type", "a/b"]]));
    assert!(body == bytes(3 * MAX_BODY + 5));
    let (head, body) = peer.get("/empty");
    assert_eq!((&head["more"], &*body), (&json!(false), &b""[..]));
    running.shut_down([peer]);
}

#[test]
fn each_event_is_one_frame_as_it_happens() {
    let (events, source) = mpsc::channel::<Vec<u8>>();
    let source = Mutex::new(Some(source));
    let running = Running::start(plugin(), move |_: &mut Request<'_>| match source.lock().unwrap().take() {
        Some(source) => Response::events(source),
        None => Response::events(std::iter::repeat_with(|| b":\n\n".to_vec())),
    });
    let mut peer = running.ready();
    peer.send(&http(7, "GET", "/"), b"");
    let (head, body) = peer.receive();
    assert_eq!(head["headers"], json!([["content-type", "text/event-stream"], ["cache-control", "no-cache"]]));
    assert_eq!((&head["more"], &*body), (&json!(true), &b""[..]));
    for event in ["data: 1\n\n", "", "data: 2\n\n"] {
        events.send(event.into()).unwrap();
        if !event.is_empty() {
            assert_eq!(peer.receive(), (data(7, true), event.into()));
        }
    }
    // Another request may be waiting; it is answered in its turn.
    peer.send(&json!({"type": "ping", "id": 8}), b"");
    events.send(b"data: 3\n\n".to_vec()).unwrap();
    assert_eq!(peer.receive(), (data(7, true), b"data: 3\n\n".into()));
    drop(events);
    assert_eq!(peer.receive(), (data(7, false), vec![]));
    assert_eq!(peer.receive().0, json!({"type": "pong", "id": 8}));
    // The answer to HEAD is a stream without its body, which here would have no end.
    peer.send(&http(9, "HEAD", "/"), b"");
    assert_eq!(peer.receive().0["more"], true);
    assert_eq!(peer.receive(), (data(9, false), vec![]));
    running.shut_down([peer]);
}

#[test]
fn an_early_answer_drops_the_rest_of_the_body() {
    let running = Running::start(plugin(), |request: &mut Request<'_>| match request.path() {
        "/large" => Response::bytes("a/b", bytes(2 * MAX_BODY)),
        _ => Response::text("enough").status(202),
    });
    let mut peer = running.ready();
    peer.send(&upload(7, "/"), &bytes(1000));
    assert_eq!(peer.response().1, b"enough");
    peer.send(&data(7, true), &bytes(MAX_BODY));
    peer.send(&json!({"type": "data", "id": 7, "more": false, "aborted": true}), b"");
    peer.send(&upload(8, "/large"), b"");
    let (head, first) = peer.receive();
    assert_eq!((&head["more"], first.len()), (&json!(true), MAX_BODY));
    peer.send(&data(8, true), &bytes(MAX_BODY));
    peer.send(&json!({"type": "data", "id": 8, "more": false, "aborted": true}), b"");
    assert_eq!(peer.receive().1.len(), MAX_BODY);
    assert_eq!(peer.get("/").1, b"enough");
    running.shut_down([peer]);
}

#[test]
fn a_body_cut_short_is_an_error() {
    let (saw, errors) = mpsc::channel();
    let running = Running::start(plugin(), move |request: &mut Request<'_>| {
        let read = request.read_to_end(&mut Vec::new());
        saw.send(read.as_ref().map_err(io::Error::kind).copied()).unwrap();
        assert!(read.is_ok() || request.read(&mut [0]).is_err(), "an error stays one");
        "done"
    });
    let mut peer = running.ready();
    let mut cancelled = running.connect();
    cancelled.send(&upload(7, "/"), b"some");
    drop(cancelled);
    assert_eq!(errors.recv_timeout(PATIENCE).unwrap(), Err(io::ErrorKind::UnexpectedEof));
    peer.send(&upload(8, "/"), b"some");
    peer.send(&json!({"type": "data", "id": 8, "more": false, "aborted": true}), b"more");
    assert_eq!(errors.recv_timeout(PATIENCE).unwrap(), Err(io::ErrorKind::ConnectionAborted));
    assert_eq!(peer.response().1, b"done");
    let mut wrong = running.connect();
    wrong.send(&upload(9, "/"), b"some");
    wrong.send(&json!({"type": "ping", "id": 10}), b"not data");
    assert_eq!(errors.recv_timeout(PATIENCE).unwrap(), Err(io::ErrorKind::UnexpectedEof));
    wrong.response();
    assert!(wrong.is_closed());
    running.shut_down([peer]);
}

#[test]
fn a_body_over_the_limit_is_413() {
    let running = Running::start(plugin(), |request: &mut Request<'_>| Ok::<_, Error>(request.read_body(4)?));
    let mut peer = running.ready();
    peer.send(&upload(7, "/"), b"123");
    peer.send(&data(7, false), b"4");
    assert_eq!(peer.response().1, b"1234");
    peer.send(&upload(8, "/"), b"123");
    peer.send(&data(8, false), b"45");
    let (head, body) = peer.response();
    assert_eq!((&head["status"], &*body), (&json!(413), &b"the body is over 4 bytes"[..]));
    running.shut_down([peer]);
}

#[test]
fn every_byte_and_every_header_goes_through() {
    let all: Vec<u8> = (0..=255).collect();
    let answer = all.clone();
    let running = Running::start(plugin(), move |request: &mut Request<'_>| {
        assert_eq!(request.read_body(1000).unwrap(), answer);
        Response::bytes("a/b", answer.clone()).header("Set-Cookie", "a=b").header("Set-Cookie", "c=d").status(299)
    });
    let mut peer = running.ready();
    peer.send(&http(7, "POST", "/"), &all);
    let (head, body) = peer.response();
    assert_eq!(body, all);
    assert_eq!(head["status"], 299);
    assert_eq!(head["headers"], json!([["content-type", "a/b"], ["Set-Cookie", "a=b"], ["Set-Cookie", "c=d"]]));
    running.shut_down([peer]);
}

#[test]
fn what_a_handler_returns_becomes_a_response() {
    fn response(value: impl super::IntoResponse) -> (u16, String) {
        let response = value.into_response().unwrap();
        (response.status, response.headers.into_iter().map(|(_, value)| value.to_string()).collect())
    }
    assert_eq!(response("a"), (200, "text/plain; charset=utf-8".into()));
    assert_eq!(response((201, String::from("a"))), (201, "text/plain; charset=utf-8".into()));
    assert_eq!(response(b"a".to_vec()), (200, "application/octet-stream".into()));
    assert_eq!(response(Ok::<_, Error>(Response::html("a"))), (200, "text/html; charset=utf-8".into()));
    assert_eq!(response(Response::new(204)), (204, String::new()));
    assert_eq!(super::IntoResponse::into_response(Err::<&str, _>("why")).unwrap_err().to_string(), "why");
}

#[test]
fn a_handler_that_fails_is_a_500_and_the_plugin_goes_on() {
    let running = Running::start(plugin(), |request: &mut Request<'_>| match request.path() {
        "/panic" => panic!("expected by the test"),
        "/error" => Err(Error::from("expected by the test")),
        "/unread" => Ok(Response::stream("a/b", Failing { good: 0 })),
        "/head" => Ok(Response::text("a").header("x", "y".repeat(70_000))),
        _ => Ok(Response::text("fine")),
    });
    let mut peer = running.ready();
    for path in ["/panic", "/error", "/unread"] {
        let (head, body) = peer.get(path);
        assert_eq!((&head["status"], &*body), (&json!(500), &b"internal error"[..]), "{path}");
    }
    peer.send(&http(7, "GET", "/head"), b"");
    let (head, _) = peer.receive();
    assert_eq!((&head["type"], &head["id"], &head["code"]), (&json!("error"), &json!(7), &json!("internal")));
    assert_eq!(peer.get("/").1, b"fine");
    running.shut_down([peer]);
}

/// A file that cannot be read beyond so many pieces.
struct Failing {
    good: usize,
}

impl Read for Failing {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.good = self.good.checked_sub(1).ok_or_else(|| io::Error::other("expected by the test"))?;
        buffer.fill(b'x');
        Ok(buffer.len())
    }
}

#[test]
fn a_response_that_stops_midway_is_cut() {
    let running = Running::start(plugin(), |request: &mut Request<'_>| match request.path() {
        "/stream" => Response::stream("a/b", Failing { good: 2 }),
        "/events" => Response::events(std::iter::once_with(|| panic!("expected by the test"))),
        _ => Response::text("fine"),
    });
    let mut peer = running.ready();
    let mut other = running.connect();
    other.send(&http(7, "GET", "/stream"), b"");
    let error = |message: &str| (json!({"type": "error", "id": 7, "code": "internal", "message": message}), vec![]);
    assert_eq!(other.receive().0["more"], true);
    assert_eq!(other.receive().0["more"], true);
    assert_eq!(other.receive(), error("expected by the test"));
    other.send(&http(7, "GET", "/events"), b"");
    assert_eq!(other.receive().0["more"], true);
    assert_eq!(other.receive(), error("the plugin panicked"));
    assert_eq!(other.get("/").1, b"fine", "the connection serves on");
    assert_eq!(peer.get("/").1, b"fine");
    running.shut_down([peer, other]);
}

#[test]
fn a_client_that_goes_away_ends_its_response_alone() {
    /// Tells when it is dropped.
    struct Endless(mpsc::Sender<()>);
    impl Iterator for Endless {
        type Item = Vec<u8>;
        fn next(&mut self) -> Option<Vec<u8>> {
            Some(Vec::new())
        }
    }
    impl Drop for Endless {
        fn drop(&mut self) {
            self.0.send(()).unwrap();
        }
    }
    let (dropped, ended) = mpsc::channel();
    // One connection at a time, so the second is served only once the first is over.
    let running = Running::start(plugin().concurrency(1), move |request: &mut Request<'_>| match request.path() {
        "/idle" => Response::events(Endless(dropped.clone())),
        "/busy" => Response::stream("a/b", io::repeat(b'x')),
        _ => Response::text("fine"),
    });
    let mut peer = running.ready();
    peer.send(&http(7, "GET", "/idle"), b"");
    assert_eq!(peer.receive().0["more"], true);
    drop(peer);
    ended.recv_timeout(PATIENCE).unwrap();
    let mut peer = running.connect();
    peer.send(&http(7, "GET", "/busy"), b"");
    assert_eq!(peer.receive().0["more"], true);
    drop(peer);
    let mut peer = running.connect();
    assert_eq!(peer.get("/").1, b"fine");
    running.shut_down([peer]);
}

#[test]
fn shutdown_waits_for_every_connection() {
    let (events, source) = mpsc::channel::<Vec<u8>>();
    let (waiting, waits) = mpsc::channel();
    let source = Mutex::new(Some(std::iter::from_fn(move || {
        waiting.send(()).unwrap();
        source.recv().ok()
    })));
    let running = Running::start(plugin(), move |request: &mut Request<'_>| match request.path() {
        "/events" => Response::events(source.lock().unwrap().take().unwrap()),
        _ => Response::text("fine"),
    });
    let mut idle = running.ready();
    let mut busy = running.connect();
    busy.send(&http(7, "GET", "/events"), b"");
    assert_eq!(busy.receive().0["more"], true);
    waits.recv_timeout(PATIENCE).unwrap();
    // What is outstanding when the shutdown comes is answered: the stream, and the request behind it.
    busy.send(&http(8, "GET", "/"), b"");
    busy.send(&json!({"type": "shutdown", "id": 9}), b"");
    events.send(b"data: last\n\n".to_vec()).unwrap();
    assert_eq!(busy.receive(), (data(7, true), b"data: last\n\n".into()));
    assert_eq!(busy.receive(), (data(7, false), vec![]));
    assert_eq!(busy.response().1, b"fine");
    assert!(busy.is_closed());
    assert_eq!(idle.get("/").1, b"fine");
    assert!(!running.thread.is_finished());
    running.shut_down([idle]);
}

#[test]
fn the_operators_keys_are_the_stores() {
    let running = Running::start(plugin(), |_: &mut Request<'_>| "");
    host(&running.host_socket(), |request, body| match (request["op"].as_str().unwrap(), request["key"].as_str().unwrap()) {
        ("get", "color") => (json!({"found": true, "rev": 12}), b"red\0".to_vec()),
        ("get", _) => (json!({"found": false}), vec![]),
        ("set", "color") => {
            assert_eq!(body, b"blue");
            (json!({"rev": 13}), vec![])
        }
        ("delete", "color") => (json!({"found": true}), vec![]),
        _ => (json!({"code": "quota", "message": "full"}), vec![]),
    });
    let mut peer = running.ready();
    let mut ask = |op: &str, key: &str, value: &[u8]| {
        peer.send(&json!({"type": "kv", "id": 9, "op": op, "key": key}), value);
        peer.receive()
    };
    assert_eq!(ask("get", "color", b""), (json!({"type": "result", "id": 9, "found": true, "rev": 12}), b"red\0".to_vec()));
    assert_eq!(ask("get", "none", b""), (json!({"type": "result", "id": 9, "found": false}), vec![]));
    assert_eq!(ask("set", "color", b"blue"), (json!({"type": "result", "id": 9, "rev": 13}), vec![]));
    assert_eq!(ask("delete", "color", b""), (json!({"type": "result", "id": 9, "found": true}), vec![]));
    assert_eq!(ask("set", "none", b"").0, json!({"type": "error", "id": 9, "code": "quota", "message": "full"}));
    assert_eq!(ask("incr", "color", b"").0["code"], "bad_request");
    running.shut_down([peer]);
}

#[test]
fn a_plugin_may_check_and_compute_its_keys() {
    let plugin = plugin().on_kv(|context, operation| match operation {
        Operation::Get { key: "now" } => Ok(Outcome::computed("noon")),
        Operation::Get { key: "huge" } => Ok(Outcome::computed(vec![0; MAX_BODY + 1])),
        Operation::Get { key: "panic" } => panic!("expected by the test"),
        Operation::Get { .. } => operation.perform(context.kv()),
        _ => Err(KvError::refused("read_only", format_args!("{} cannot be changed", operation.key()))),
    });
    let running = Running::start(plugin, |_: &mut Request<'_>| "");
    let mut peer = running.ready();
    let mut ask = |op: &str, key: &str| {
        peer.send(&json!({"type": "kv", "id": 9, "op": op, "key": key}), b"");
        peer.receive()
    };
    assert_eq!(ask("get", "now"), (json!({"type": "result", "id": 9, "found": true}), b"noon".to_vec()));
    let refused = json!({"type": "error", "id": 9, "code": "read_only", "message": "now cannot be changed"});
    assert_eq!(ask("delete", "now").0, refused);
    // The last of them finds no host to ask.
    for key in ["huge", "panic", "other"] {
        assert_eq!(ask("get", key).0["code"], "internal", "{key}");
    }
    running.shut_down([peer]);
}

#[test]
fn the_store_speaks_the_protocol() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("host.sock");
    let (tell, asked) = mpsc::channel();
    host(&socket, move |request, body| {
        let mut fields = request.clone();
        fields.as_object_mut().unwrap().remove("id");
        tell.send((fields, body.to_vec())).unwrap();
        match request["op"].as_str().unwrap() {
            "get" if request["key"] == "none" => (json!({"found": false}), vec![]),
            "get" => (json!({"found": true, "rev": 3, "expires_in_ms": 1500}), vec![0, 255]),
            "set" if request["if_absent"] == true => (json!({"code": "conflict", "message": "it is there"}), vec![]),
            "set" => (json!({"rev": 4}), vec![]),
            "delete" => (json!({"found": false}), vec![]),
            "incr" => (json!({"value": -5, "rev": 5}), vec![]),
            "list" => {
                let entries = json!([{"key": "a", "rev": 1, "size": 2, "value_base64": "AP8="}, {"key": "b", "rev": 2, "size": 0, "expires_in_ms": 9}]);
                (json!({"next": "b"}), entries.to_string().into())
            }
            _ => (json!({}), br#"[{"rev":6},{"found":true},{"value":1,"rev":7}]"#.to_vec()),
        }
    });
    let kv = Kv::new(socket);
    let last = || asked.recv_timeout(PATIENCE).unwrap();

    assert_eq!(kv.get("none").unwrap(), None);
    assert_eq!(last(), (json!({"type": "kv", "op": "get", "key": "none"}), vec![]));
    let entry = kv.get_entry("a").unwrap().unwrap();
    assert_eq!((&*entry.value, entry.rev, entry.expires_in), (&[0, 255][..], 3, Some(Duration::from_millis(1500))));
    last();
    assert_eq!(kv.set("a", "é").unwrap(), 4);
    assert_eq!(last(), (json!({"type": "kv", "op": "set", "key": "a"}), "é".into()));
    let options = SetOptions { ttl: Some(Duration::from_nanos(1)), if_rev: Some(3), if_absent: false };
    assert_eq!(kv.set_with("a", [1, 2], options).unwrap(), 4);
    assert_eq!(last(), (json!({"type": "kv", "op": "set", "key": "a", "ttl_ms": 1, "if_rev": 3}), vec![1, 2]));
    let conflict = kv.set_with("a", "x", SetOptions { if_absent: true, ..SetOptions::default() }).unwrap_err();
    assert_eq!((conflict.code(), &*conflict.to_string()), (Some("conflict"), "it is there (conflict)"));
    last();
    assert!(!kv.delete("a").unwrap());
    last();
    assert_eq!(kv.incr("n", -7).unwrap(), -5);
    assert_eq!(last().0, json!({"type": "kv", "op": "incr", "key": "n", "delta": -7}));
    let page = kv.list(ListOp { prefix: "p".into(), limit: Some(2), values: true, ..ListOp::default() }).unwrap();
    assert_eq!(last().0, json!({"type": "kv", "op": "list", "prefix": "p", "limit": 2, "values": true}));
    assert_eq!((page.entries[0].value.as_deref(), page.next.as_deref()), (Some(&[0, 255][..]), Some("b")));
    assert_eq!((page.entries[1].expires_in, &page.entries[1].value), (Some(Duration::from_millis(9)), &None));
    let outcomes = kv.txn(&[Write::set("a", "t"), Write::set("b", [255]), Write::delete("c"), Write::incr("d", 1)]).unwrap();
    assert_eq!(outcomes[2], WriteOutcome { value: Some(1), rev: Some(7), found: None });
    let (head, body) = last();
    assert_eq!(head, json!({"type": "kv", "op": "txn"}));
    assert_eq!(
        serde_json::from_slice::<Value>(&body).unwrap(),
        json!([
            {"op": "set", "key": "a", "value": "t"}, {"op": "set", "key": "b", "value_base64": "/w=="},
            {"op": "delete", "key": "c"}, {"op": "incr", "key": "d", "delta": 1},
        ])
    );
    assert_eq!(kv.set("a", vec![0; MAX_BODY + 1]).unwrap_err().code(), Some("too_large"));
    assert!(asked.try_recv().is_err(), "what fits no frame is not sent");
}

#[test]
fn a_call_that_fails_is_not_sent_again() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("host.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let host = spawn(move || {
        let replies: [&[u8]; 3] = [b"", b"\0\0\0\0\0\0\0\0", b"\0\0\0\x14\0\0\0\0{\"type\":\"x\",\"id\":1 }"];
        for reply in replies {
            let (stream, _) = listener.accept().unwrap();
            let mut peer = Peer(FrameReader::new(stream));
            assert_eq!(peer.receive().0["op"], "incr");
            peer.0.stream().write_all(reply).unwrap();
        }
        let (stream, _) = listener.accept().unwrap();
        let mut peer = Peer(FrameReader::new(stream));
        for _ in 1..=2 {
            let id = peer.receive().0["id"].clone();
            peer.send(&json!({"type": "result", "id": id, "value": 1, "rev": 1}), b"");
        }
    });
    let kv = Kv::new(socket);
    for kind in [io::ErrorKind::UnexpectedEof, io::ErrorKind::InvalidData, io::ErrorKind::InvalidData] {
        match kv.incr("n", 1) {
            Err(KvError::Io(error)) => assert_eq!(error.kind(), kind, "{error}"),
            other => panic!("{other:?}"),
        }
    }
    // A connection that works is used again.
    assert_eq!((kv.incr("n", 1).unwrap(), kv.incr("n", 1).unwrap()), (1, 1));
    host.join().unwrap();
}

#[test]
#[cfg(feature = "license")]
fn a_licensed_plugin_starts_with_a_licence_alone_and_says_what_is_wrong_with_any_other() {
    use crate::license::{self, Claims, SigningKey, Time};
    use std::time::SystemTime;

    let (key, other) = (SigningKey::generate("k1").unwrap().unwrap(), SigningKey::generate("k1").unwrap().unwrap());
    let now = Time::from(SystemTime::now());
    let hours = |hours: i64| now.plus_seconds(hours * 3600);
    let claims = |changes: Value| {
        let mut claims = json!({
            "v": 1, "jti": "1", "iss": "acme", "aud": "probe", "inst": ["5f0c3f0e"], "iat": now, "exp": hours(48), "upd": "2026-11-02",
            "feat": ["export"], "lim": {"users": 25},
        });
        claims.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        serde_json::from_value::<Claims>(claims).unwrap()
    };
    let signed = |changes: Value| Some(license::issue(&claims(changes), &key).unwrap());
    let forged = Some(license::issue(&claims(json!({})), &other).unwrap());
    for (token, mark, expected, exit) in [
        (signed(json!({})), None, None, 0),
        (signed(json!({})), Some(hours(47).to_string()), None, 0),
        (signed(json!({})), Some("no time".to_owned()), None, 0),
        (None, None, Some("missing"), 78),
        (Some("hello".to_owned()), None, Some("malformed"), 78),
        (forged, None, Some("bad_signature"), 78),
        (signed(json!({"aud": "other"})), None, Some("wrong_plugin"), 78),
        (signed(json!({"inst": ["other"]})), None, Some("wrong_instance"), 78),
        (signed(json!({"upd": "2026-11-01"})), None, Some("update_not_covered"), 78),
        (signed(json!({"iat": hours(25)})), None, Some("clock_not_set"), 75),
        (signed(json!({"nbf": hours(1)})), None, Some("not_yet_valid"), 78),
        (signed(json!({"exp": hours(-1)})), None, Some("expired"), 78),
        (signed(json!({})), Some(hours(49).to_string()), Some("expired"), 78),
    ] {
        let started = Arc::new(Mutex::new(0));
        let (keys, starts) = (key.public(), started.clone());
        let plugin = plugin().licensed(&[("k1", &keys)], "2026-11-02").on_init(move |context| {
            *starts.lock().unwrap() += usize::from(context.granted().unwrap().limit("users") == Some(25));
            Ok(())
        });
        let running =
            Running::start(plugin, |request: &mut Request<'_>| request.context().granted().unwrap().has("export").to_string());
        let mut peer = running.connect();
        let mut init = running.init();
        (init["license"], init["not_before_time"]) = (json!(token), json!(mark));
        peer.send(&init, b"");
        let (reply, _) = peer.receive();
        match expected {
            None => {
                assert_eq!((reply["type"].as_str(), *started.lock().unwrap()), (Some("ready"), 1), "{reply}");
                assert_eq!(peer.get("/").1, b"true");
                running.shut_down([peer]);
            }
            Some(code) => {
                assert_eq!((reply["type"].as_str(), reply["code"].as_str()), (Some("error"), Some(code)), "{reply}");
                assert!(reply["message"].as_str().unwrap().starts_with(&format!("licence: {code}: ")), "{reply}");
                assert_eq!(running.thread.join().unwrap(), ExitCode::from(exit), "{code}");
                assert_eq!(*started.lock().unwrap(), 0, "{code}: the init handler is not called");
            }
        }
    }
    for (keys, date) in
        [([("k 1", &*key.public())], "2026-11-02"), ([("k1", "k4.public.x")], "2026-11-02"), ([("k1", &*key.public())], "soon")]
    {
        let built = std::panic::catch_unwind(|| drop(plugin().licensed(&keys, date)));
        assert!(built.is_err(), "{keys:?} {date}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn bodies_survive_any_cutting(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..3000), 1..10)) {
        let running = Running::start(plugin(), echo);
        let mut peer = running.ready();
        for (i, piece) in pieces.iter().enumerate() {
            let mut head = if i == 0 { upload(7, "/") } else { data(7, true) };
            head["more"] = json!(i + 1 < pieces.len());
            peer.send(&head, piece);
        }
        prop_assert_eq!(peer.response().1, pieces.concat());
        running.shut_down([peer]);
    }
}

#[test]
fn a_listener_that_accepts_no_more_ends_the_plugin() {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("plugin.sock")).unwrap();
    // A listener that is shut down fails for good.
    rustix::net::shutdown(&listener, rustix::net::Shutdown::Both).unwrap();
    assert_eq!(plugin().serve_on(listener, |_: &mut Request<'_>| "never"), ExitCode::FAILURE);
}
