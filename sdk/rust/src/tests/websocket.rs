//! WebSockets, by a host that speaks raw frames.

mod handlers;

use super::{PATIENCE, Peer, Running, bytes, http, invalid_frames, plugin, spawn};
use crate::protocol::frame::encode;
use crate::protocol::message::{MAX_BODY, MAX_REFUSAL};
use crate::websocket::{Acceptance, Close, CloseError, Message, Opening, SendError, Socket};
use crate::{Error, Plugin, Request, Response};
use serde_json::{Value, json};
use std::io::Write as _;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};

/// What a message of a WebSocket takes of the credit besides its length.
const COST: usize = 64;

fn open(id: u64, path: &str, credit: u64) -> Value {
    json!({
        "type": "ws_open", "id": id, "path": path, "query": "a=b", "mount": "/probe", "remote": "203.0.113.9", "credit": credit,
        "headers": [["host", "example.org"], ["sec-websocket-protocol", "v2, v1"], ["sec-websocket-protocol", "v0"]],
    })
}

fn text(id: u64) -> Value {
    json!({"type": "ws_message", "id": id, "text": true})
}

fn closed(id: u64, code: u16) -> Value {
    json!({"type": "ws_close", "id": id, "code": code})
}

fn credit(id: u64, bytes: usize) -> Value {
    json!({"type": "ws_credit", "id": id, "bytes": bytes})
}

impl Peer {
    /// Opens a socket that the plugin accepts.
    fn open(&mut self, id: u64, path: &str) {
        self.send(&open(id, path, 65536), b"");
        assert_eq!(self.receive_other(), (json!({"type": "ws_accept", "id": id}), vec![]));
    }

    /// The next frame that returns no credit.
    fn receive_other(&mut self) -> (Value, Vec<u8>) {
        loop {
            match self.receive() {
                (head, _) if head["type"] == "ws_credit" => {}
                other => return other,
            }
        }
    }

    fn receive_text(&mut self, id: u64, expected: &str) {
        let (head, body) = self.receive_other();
        assert_eq!((head, String::from_utf8(body).unwrap()), (text(id), expected.to_owned()));
    }
}

fn echo(socket: &Socket, message: Message) -> Result<(), SendError> {
    socket.send(message)
}

/// Runs a plugin, whose web requests are answered with `hello`.
fn start(plugin: Plugin) -> (Running, Peer, Peer) {
    let running = Running::start(plugin, |_: &mut Request<'_>| "hello");
    let first = running.ready();
    let sockets = running.connect();
    (running, first, sockets)
}

/// A plugin whose close handler tells how each socket ended, by its path.
fn telling(plugin: Plugin) -> (Plugin, Receiver<(String, Close)>) {
    let (tell, told) = mpsc::channel();
    (plugin.on_websocket_close(move |socket, close| tell.send((socket.path().to_owned(), close)).unwrap()), told)
}

/// Ends the plugin, whose open connections these are. What it has sent before is of no interest.
fn stop(running: Running, peers: impl IntoIterator<Item = Peer>) {
    for mut peer in peers {
        peer.send(&json!({"type": "shutdown", "id": 99}), b"");
        while peer.0.read().is_ok() {}
        assert!(peer.is_closed());
    }
    assert_eq!(running.thread.join().unwrap(), ExitCode::SUCCESS);
}

fn lost() -> Close {
    Close { code: Some(1006), reason: String::new() }
}

/// A handler that waits until it is let go, and says when it has begun.
struct Gate {
    begun: Receiver<()>,
    go: Sender<()>,
}

impl Gate {
    fn new() -> (Self, impl Fn() + Send + Sync + 'static) {
        let ((begin, begun), (go, wait)) = (mpsc::channel(), mpsc::channel());
        let inner = Mutex::new((begin, wait));
        let pass = move || {
            let inner = inner.lock().unwrap();
            inner.0.send(()).unwrap();
            inner.1.recv_timeout(PATIENCE).unwrap();
        };
        (Self { begun, go }, pass)
    }

    fn begun(&self) {
        self.begun.recv_timeout(PATIENCE).unwrap();
    }

    fn go(&self) {
        self.go.send(()).unwrap();
    }
}

#[test]
fn the_vectors_of_a_socket_are_understood() {
    let vectors: Value = serde_json::from_str(include_str!("../../../../tests/protocol/frames.json")).unwrap();
    let unhex = |hex: &Value| -> Vec<u8> {
        let hex = hex.as_str().unwrap();
        (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
    };
    let valid = vectors["valid"].as_array().unwrap();
    let frame = |name: &Value| valid.iter().find(|frame| frame["name"] == *name).unwrap();
    let (running, first, _) = start(plugin().on_websocket(echo));
    let valid_here: Vec<_> = valid.iter().filter(|frame| frame["to"] == "plugin_sockets").collect();
    assert!(valid_here.len() > 8);
    for vector in valid_here {
        let mut peer = running.connect();
        if vector["place"] == "open" {
            peer.open(5, "/");
        }
        peer.0.stream().write_all(&unhex(&vector["hex"])).unwrap();
        match vector["head"]["type"].as_str().unwrap() {
            "ws_open" => assert_eq!(peer.receive().0, json!({"type": "ws_accept", "id": vector["head"]["id"]})),
            "ws_message" => assert_eq!(peer.receive_other().1, unhex(&vector["body_hex"])),
            _ => {}
        }
        peer.send(&open(1000, "/", 0), b"");
        assert_eq!(peer.receive_other().0, json!({"type": "ws_accept", "id": 1000}), "{vector}");
    }
    let conversations = vectors["conversations"].as_array().unwrap().iter().filter(|case| case["on"] == "plugin_sockets");
    let steps: Vec<_> = conversations.flat_map(|case| case["steps"].as_array().unwrap()).collect();
    assert_eq!(steps.len(), 5);
    let mut peer = running.connect();
    for step in steps {
        let vector = frame(&step["frame"]);
        if step["from"] == "host" {
            peer.0.stream().write_all(&unhex(&vector["hex"])).unwrap();
        } else {
            assert_eq!(peer.receive_other(), (vector["head"].clone(), unhex(&vector["body_hex"])));
        }
    }
    stop(running, [first, peer]);
}

#[test]
fn an_invalid_frame_closes_the_connection_of_the_sockets_alone() {
    let (plugin, told) = telling(plugin().on_websocket(echo));
    let (running, mut first, mut other) = start(plugin);
    other.open(1, "/other");
    let cases = invalid_frames("plugin_sockets", &["start", "open"]);
    assert!(cases.len() > 15);
    for (name, place, bytes) in cases {
        let mut peer = running.connect();
        if place.as_deref() != Some("start") {
            peer.open(7, "/lost");
        }
        peer.0.stream().write_all(&bytes).unwrap();
        assert!(peer.is_closed(), "{name}");
        if place.as_deref() != Some("start") {
            assert_eq!(told.recv_timeout(PATIENCE).unwrap(), ("/lost".to_owned(), lost()), "{name}");
        }
    }
    other.send(&text(1), b"still there");
    other.receive_text(1, "still there");
    assert_eq!(first.get("/").1, b"hello");
    stop(running, [first, other]);
    assert_eq!(told.recv_timeout(PATIENCE).unwrap(), ("/other".to_owned(), lost()));
}

#[test]
fn what_the_host_must_not_send_closes_the_connection_of_the_sockets() {
    let (gate, pass) = Gate::new();
    let plugin = plugin().on_websocket_open(move |socket| {
        if socket.path() == "/wait" {
            pass()
        }
    });
    let (running, mut first, _) = start(plugin.on_websocket(|_, _| ()));
    for wrong in [
        json!({"type": "ping", "id": 1}),
        http(2, "GET", "/"),
        json!({"type": "response", "id": 5, "status": 403}),
        json!({"type": "ws_accept", "id": 5}),
        open(5, "/again", 0),
        text(6),
        credit(6, 1),
    ] {
        let mut peer = running.connect();
        peer.open(5, "/");
        // Refused sockets may be closed by the host, which has not heard of it.
        peer.send(&closed(4, 1006), b"");
        peer.send(&wrong, b"");
        assert!(peer.is_closed(), "{wrong}");
    }
    let mut early = running.connect();
    early.send(&open(5, "/wait", 0), b"");
    gate.begun();
    early.send(&text(5), b"before the acceptance");
    assert!(early.is_closed());
    gate.go();
    let mut not_text = running.connect();
    not_text.open(5, "/");
    not_text.send(&text(5), b"\xff");
    assert!(not_text.is_closed());
    // A connection for requests is none for sockets, and a plugin without handlers has none at all.
    assert_eq!(first.get("/").1, b"hello");
    first.send(&open(5, "/", 0), b"");
    assert!(first.is_closed());
    let last = running.connect();
    stop(running, [last]);
    let (running, first, mut peer) = start(super::plugin());
    peer.send(&open(5, "/", 0), b"");
    assert!(peer.is_closed());
    stop(running, [first]);
}

#[test]
fn a_socket_knows_the_request_that_has_asked_for_it() {
    let plugin = plugin().on_websocket(|socket: &Socket, _: Message| {
        let known = json!({
            "path": socket.path(), "query": socket.query(), "mount": socket.mount(), "remote": socket.remote(),
            "host": socket.header("HOST"), "none": socket.header("none"), "headers": socket.headers().count(),
            "offered": socket.protocols().collect::<Vec<_>>(), "protocol": socket.protocol(), "open": socket.is_open(),
            "title": socket.context().config()["title"],
        });
        socket.send(known.to_string())
    });
    let (running, first, mut peer) = start(plugin);
    peer.open(5, "/x%20y");
    peer.send(&text(5), b"");
    let (_, known) = peer.receive_other();
    assert_eq!(
        serde_json::from_slice::<Value>(&known).unwrap(),
        json!({
            "path": "/x%20y", "query": "a=b", "mount": "/probe", "remote": "203.0.113.9", "host": "example.org", "none": null,
            "headers": 3, "offered": ["v2", "v1", "v0"], "protocol": null, "open": true, "title": "T",
        })
    );
    stop(running, [first, peer]);
}

#[test]
fn the_messages_of_each_socket_are_handled_in_their_order() {
    let (running, first, mut peer) = start(plugin().on_websocket(echo));
    let ids = 0..10;
    let mut frames = Vec::new();
    ids.clone().for_each(|id| encode(&mut frames, &open(id, "/", 1 << 30), b"").unwrap());
    for number in 0..100 {
        ids.clone().for_each(|id| encode(&mut frames, &text(id), number.to_string().as_bytes()).unwrap());
    }
    peer.0.stream().write_all(&frames).unwrap();
    let mut next = [0; 10];
    while next.iter().sum::<usize>() < 1000 {
        let (head, body) = peer.receive_other();
        if head["type"] == "ws_message" {
            let socket = usize::try_from(head["id"].as_u64().unwrap()).unwrap();
            assert_eq!(body, next[socket].to_string().as_bytes(), "of socket {socket}");
            next[socket] += 1;
        }
    }
    stop(running, [first, peer]);
}

#[test]
fn messages_of_any_length_up_to_a_mebibyte_go_both_ways() {
    let (refuse, refused) = mpsc::channel();
    let (running, first, mut peer) = start(plugin().on_websocket(move |socket: &Socket, message| {
        refuse.send(socket.send(vec![0; MAX_BODY + 1])).unwrap();
        refuse.send(socket.context().broadcast(vec![0; MAX_BODY + 1]).map(drop)).unwrap();
        socket.send(message)
    }));
    peer.open(5, "/");
    for length in [0, 1, 4096, 4097, 65536, MAX_BODY] {
        for head in [json!({"type": "ws_message", "id": 5}), text(5)] {
            let is_text = head["text"] == true;
            let body = if is_text { vec![b'x'; length] } else { bytes(length) };
            peer.send(&head, &body);
            let got = peer.receive();
            assert!(got == (head, body), "{length} {is_text}");
            assert_eq!(peer.receive(), (credit(5, length + COST), vec![]), "the handler has returned");
            peer.send(&credit(5, length + COST), b"");
        }
    }
    assert_eq!(refused.try_iter().filter(|sent| *sent == Err(SendError::TooLarge(MAX_BODY + 1))).count(), 24);
    stop(running, [first, peer]);
}

#[test]
fn credit_for_a_message_is_returned_once_its_handler_has_returned_and_a_slow_handler_holds_up_its_own_socket_alone() {
    let (gate, pass) = Gate::new();
    let (running, first, mut peer) = start(plugin().on_websocket(move |socket: &Socket, message: Message| {
        if socket.path() == "/slow" {
            pass();
        }
        socket.send(message)
    }));
    peer.open(1, "/slow");
    peer.open(2, "/quick");
    peer.send(&text(1), b"slow");
    gate.begun();
    peer.send(&text(2), b"quick");
    assert_eq!(peer.receive(), (text(2), b"quick".to_vec()));
    assert_eq!(peer.receive(), (credit(2, 5 + COST), vec![]));
    gate.go();
    assert_eq!(peer.receive(), (text(1), b"slow".to_vec()));
    assert_eq!(peer.receive(), (credit(1, 4 + COST), vec![]));
    stop(running, [first, peer]);
}

#[test]
fn a_host_that_sends_without_credit_loses_its_connection() {
    let (gate, pass) = Gate::new();
    let (running, first, mut peer) = start(plugin().on_websocket(move |_, _| pass()));
    peer.open(1, "/");
    // The first takes all but one byte; the second is the last, and may take more than there is.
    peer.send(&text(1), &vec![b'x'; 65536 - COST - 1]);
    peer.send(&text(1), &vec![b'x'; MAX_BODY]);
    gate.begun();
    gate.go();
    assert_eq!(peer.receive(), (credit(1, 65535), vec![]));
    gate.begun();
    peer.send(&text(1), b"one too many");
    assert!(peer.is_closed());
    gate.go();
    stop(running, [first]);
}

/// A plugin that sends two messages for one, and says how the second, for which it has no credit, has fared.
fn sending_twice(concurrency: u32) -> (Running, Peer, Peer, Receiver<Result<(), SendError>>) {
    let (tell, told) = mpsc::channel();
    let plugin = plugin().concurrency(concurrency).on_websocket(move |socket: &Socket, _: Message| {
        socket.send("first").unwrap();
        let sent = socket.send("second");
        tell.send(sent.clone()).unwrap();
        sent
    });
    let (running, first, mut peer) = start(plugin);
    peer.send(&open(5, "/", 1), b"");
    assert_eq!(peer.receive().0["type"], "ws_accept");
    peer.send(&text(5), b"send");
    peer.receive_text(5, "first");
    assert!(told.try_recv().is_err(), "the second waits");
    (running, first, peer, told)
}

#[test]
fn send_waits_for_credit_and_no_longer_than_its_socket_is_open() {
    for concurrency in [1, 4] {
        let (running, first, mut peer, told) = sending_twice(concurrency);
        // The first has taken 69 bytes of one.
        peer.send(&credit(5, 68), b"");
        peer.open(6, "/");
        assert!(told.try_recv().is_err(), "what is not above 0 is no credit");
        peer.send(&credit(5, 1), b"");
        peer.receive_text(5, "second");
        assert_eq!(told.recv_timeout(PATIENCE).unwrap(), Ok(()));
        stop(running, [first, peer]);

        let (running, first, mut peer, told) = sending_twice(concurrency);
        peer.send(&closed(5, 1001), b"");
        assert_eq!(told.recv_timeout(PATIENCE).unwrap(), Err(SendError::Closed));
        stop(running, [first, peer]);

        let (running, first, peer, told) = sending_twice(concurrency);
        drop(peer);
        assert_eq!(told.recv_timeout(PATIENCE).unwrap(), Err(SendError::Closed));
        stop(running, [first]);

        let (running, first, peer, told) = sending_twice(concurrency);
        stop(running, [peer, first]);
        assert_eq!(told.recv_timeout(PATIENCE).unwrap(), Err(SendError::Closed));
    }
}

#[test]
fn a_broadcast_waits_for_nobody_and_closes_the_sockets_that_have_no_credit() {
    let (tell, told) = mpsc::channel();
    let kept = Mutex::new(Vec::<Socket>::new());
    let plugin = plugin().on_websocket(move |socket: &Socket, message: Message| {
        let context = socket.context();
        kept.lock().unwrap().push(socket.clone());
        let sent = match message.text() {
            Some("these") => context.broadcast_to(&*kept.lock().unwrap(), "to some"),
            _ => context.broadcast(message),
        };
        tell.send((sent.unwrap(), context.sockets().len())).unwrap();
    });
    let (running, first, mut peer) = start(plugin);
    let mut second = running.connect();
    for (id, credit) in [(1, 65536), (2, 1)] {
        peer.send(&open(id, "/", credit), b"");
        assert_eq!(peer.receive().0["type"], "ws_accept");
    }
    second.open(1, "/");
    peer.send(&text(1), b"all");
    second.receive_text(1, "all");
    assert_eq!(told.recv_timeout(PATIENCE).unwrap(), (3, 3));
    let mut got = [peer.receive_other(), peer.receive_other()];
    got.sort_by_key(|(head, _)| head["id"].as_u64());
    assert_eq!(got, [(text(1), b"all".to_vec()), (text(2), b"all".to_vec())]);

    // A long message is not copied for each socket.
    let long = "é".repeat(5000);
    peer.send(&text(1), long.as_bytes());
    second.receive_text(1, &long);
    let mut got = [peer.receive_other(), peer.receive_other()];
    got.sort_by_key(|(head, _)| head["id"].as_u64());
    assert_eq!(got[0], (text(1), long.clone().into_bytes()));
    let reason = json!({"type": "ws_close", "id": 2, "code": 1013, "reason": "the client reads too slowly"});
    assert_eq!(got[1], (reason, vec![]));
    assert_eq!(told.recv_timeout(PATIENCE).unwrap(), (2, 2));

    peer.send(&closed(2, 1013), b"");
    second.send(&text(1), b"these");
    second.receive_text(1, "to some");
    // The first socket was kept three times by now.
    assert_eq!((peer.receive_other(), peer.receive_other()).0, (text(1), b"to some".to_vec()));
    assert_eq!(told.recv_timeout(PATIENCE).unwrap(), (3, 2));
    stop(running, [first, peer, second]);
}
