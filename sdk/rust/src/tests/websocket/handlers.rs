//! What handlers decide: acceptance, refusal, closing and failure.

use super::*;
use std::thread;
use std::time::Duration;

/// What the host is answered when it asks for a socket of this path.
fn asked(peer: &mut Peer, id: u64, path: &str) -> (Value, Vec<u8>) {
    peer.send(&open(id, path, 65536), b"");
    peer.receive()
}

#[test]
fn an_open_handler_accepts_or_refuses() {
    let plugin = plugin().on_websocket(echo).on_websocket_open(|socket| -> Result<Opening, Error> {
        Ok(match socket.path() {
            "/plain" => Acceptance::new().into(),
            "/chosen" => Acceptance::new().protocol("v1").header("set-cookie", "a=b").into(),
            "/foreign" => Acceptance::new().protocol("v3").into(),
            "/huge" => Acceptance::new().header("x-a", "a".repeat(70_000)).into(),
            "/members" => Response::text("members only\n").status(403).into(),
            "/moved" => Response::new(302).header("location", "/").into(),
            "/file" => Response::stream("a/b", std::io::Cursor::new(bytes(MAX_REFUSAL))).status(404).into(),
            "/long" => Response::stream("a/b", std::io::repeat(0)).status(404).into(),
            "/events" => Response::events([vec![0]]).status(404).into(),
            "/fine" => Response::text("fine").into(),
            "/panics" => panic!("expected by the test"),
            path => return Err(path.to_owned().into()),
        })
    });
    let (running, first, mut peer) = start(plugin);
    let response = |id: u64, status: u16, kind: &str| json!({"type": "response", "id": id, "status": status, "headers": [["content-type", kind]], "more": false});
    assert_eq!(asked(&mut peer, 1, "/plain").0, json!({"type": "ws_accept", "id": 1}));
    let chosen = json!({"type": "ws_accept", "id": 2, "protocol": "v1", "headers": [["set-cookie", "a=b"]]});
    assert_eq!(asked(&mut peer, 2, "/chosen").0, chosen);
    let members = (response(3, 403, "text/plain; charset=utf-8"), b"members only\n".to_vec());
    assert_eq!(asked(&mut peer, 3, "/members"), members);
    let moved = json!({"type": "response", "id": 4, "status": 302, "headers": [["location", "/"]], "more": false});
    assert_eq!(asked(&mut peer, 4, "/moved"), (moved, vec![]));
    assert!(asked(&mut peer, 5, "/file") == (response(5, 404, "a/b"), bytes(MAX_REFUSAL)));
    for (id, path) in (6..).zip(["/foreign", "/huge", "/long", "/events", "/fine", "/panics", "/fails"]) {
        let error = (response(id, 500, "text/plain; charset=utf-8"), b"internal error".to_vec());
        assert_eq!(asked(&mut peer, id, path), error, "{path}");
    }
    // The sockets that were accepted work.
    for id in [1, 2] {
        peer.send(&text(id), b"hi");
        peer.receive_text(id, "hi");
    }
    stop(running, [first, peer]);
}

#[test]
fn the_short_forms_of_a_decision_mean_the_same() {
    let (running, first, mut peer) = start(plugin().on_websocket_open(|_| ()));
    peer.open(1, "/");
    stop(running, [first, peer]);
    let (running, first, mut peer) = start(plugin().on_websocket_open(|_| Acceptance::new().protocol("v0")));
    assert_eq!(asked(&mut peer, 1, "/").0["protocol"], "v0");
    stop(running, [first, peer]);
    let (running, first, mut peer) = start(plugin().on_websocket_open(|_| Response::new(410)));
    assert_eq!(asked(&mut peer, 1, "/").0["status"], 410);
    stop(running, [first, peer]);
    let choose = |socket: &Socket| (socket.path() == "/no").then(|| Response::new(410));
    let (running, first, mut peer) = start(plugin().on_websocket_open(choose));
    assert_eq!(asked(&mut peer, 1, "/no").0["status"], 410);
    peer.open(2, "/yes");
    stop(running, [first, peer]);
}

#[test]
fn what_an_open_handler_sends_goes_out_behind_the_acceptance() {
    let plugin = plugin().on_websocket_open(|socket| {
        socket.send("hello").unwrap();
        match socket.path() {
            "/full" => {
                socket.send(vec![0; 65536]).unwrap();
                assert_eq!(socket.send("beyond the credit"), Err(SendError::NotAccepted));
            }
            "/closed" => {
                socket.close(4000, "bye").unwrap();
                assert_eq!(socket.send("late"), Err(SendError::Closed));
            }
            "/refused" => return Some(Response::new(403)),
            _ => assert!(socket.is_open() && socket.context().broadcast("not to this one").unwrap() == 0),
        }
        None
    });
    let (running, first, mut peer) = start(plugin);
    peer.open(1, "/");
    peer.receive_text(1, "hello");
    peer.send(&closed(1, 1000), b"");
    peer.open(2, "/full");
    peer.receive_text(2, "hello");
    assert_eq!(peer.receive().1.len(), 65536);
    peer.open(3, "/closed");
    peer.receive_text(3, "hello");
    assert_eq!(peer.receive().0, json!({"type": "ws_close", "id": 3, "code": 4000, "reason": "bye"}));
    assert_eq!(asked(&mut peer, 4, "/refused").0["status"], 403);
    peer.open(5, "/full");
    peer.receive_text(5, "hello");
    stop(running, [first, peer]);
}

#[test]
fn a_client_that_goes_before_the_answer_gets_none() {
    let (plugin, told) = telling(plugin());
    let (call, called) = mpsc::channel();
    let plugin = plugin.concurrency(1).on_websocket_open(move |socket| {
        call.send(socket.path().to_owned()).unwrap();
        while socket.path() != "/quick" && socket.is_open() {
            thread::yield_now();
        }
        (socket.path() == "/refused").then(|| Response::new(403))
    });
    let (running, first, mut peer) = start(plugin);
    for (id, path) in [(1, "/accepted"), (2, "/refused")] {
        peer.send(&open(id, path, 0), b"");
        assert_eq!(called.recv_timeout(PATIENCE).unwrap(), path);
        // Asked for while the only thread is busy, and given up before it is free.
        peer.send(&open(id + 10, "/never", 0), b"");
        peer.send(&closed(id + 10, 1006), b"");
        peer.send(&open(id + 20, "/quick", 0), b"");
        peer.send(&closed(id, 1006), b"");
        assert_eq!(peer.receive().0, json!({"type": "ws_accept", "id": id + 20}), "{path}");
        assert_eq!(called.recv_timeout(PATIENCE).unwrap(), "/quick");
    }
    stop(running, [first, peer]);
    let ends: Vec<_> = told.try_iter().map(|(path, close)| (path, close.code)).collect();
    assert_eq!(
        ends,
        ["/accepted", "/quick", "/quick"].map(|path| (path.to_owned(), Some(1006))),
        "the handler had accepted the first"
    );
}

#[test]
fn a_socket_that_the_plugin_closes_sends_and_handles_nothing_more() {
    let (plugin, told) = telling(plugin());
    let (gate, pass) = Gate::new();
    let plugin = plugin.on_websocket(move |socket: &Socket, message: Message| {
        assert_eq!(message.text(), Some("close"), "no message is handled behind the close");
        pass();
        for code in [0, 999, 1004, 1005, 1006, 1015, 2999, 5000] {
            assert_eq!(socket.close(code, ""), Err(CloseError::Code(code)));
        }
        assert_eq!(socket.close(1000, &"é".repeat(62)), Err(CloseError::Reason(124)));
        socket.send("last").unwrap();
        assert!(socket.is_open() && socket.close(4999, "enough").is_ok() && !socket.is_open());
        assert_eq!(socket.close(1000, "again"), Ok(()));
        assert_eq!(socket.context().broadcast_to([socket], "none").unwrap(), 0);
        socket.send("late")
    });
    let (running, first, mut peer) = start(plugin);
    peer.open(5, "/");
    peer.send(&text(5), b"close");
    gate.begun();
    peer.send(&text(5), b"queued");
    gate.go();
    assert_eq!(peer.receive().0, text(5));
    assert_eq!(peer.receive().0, json!({"type": "ws_close", "id": 5, "code": 4999, "reason": "enough"}));
    // The client may send until it has heard of it, and the host gets neither messages nor credit.
    peer.send(&text(5), b"crossing");
    peer.send(&credit(5, 1000), b"");
    peer.open(6, "/");
    assert!(told.try_recv().is_err(), "the socket ends with the host's word");
    peer.send(&json!({"type": "ws_close", "id": 5, "code": 4999, "reason": "ok"}), b"");
    let end = Close { code: Some(4999), reason: "ok".to_owned() };
    assert_eq!(told.recv_timeout(PATIENCE).unwrap(), ("/".to_owned(), end));
    stop(running, [first, peer]);
    assert_eq!(told.try_iter().count(), 1, "of the other socket");
}

#[test]
fn what_came_before_the_end_is_handled_before_it() {
    let (tell, told) = mpsc::channel();
    let say = tell.clone();
    let (gate, pass) = Gate::new();
    let plugin = plugin().on_websocket(move |socket: &Socket, message: Message| {
        if message.text() == Some("first") {
            pass();
        }
        say.send(message.text().unwrap().to_owned()).unwrap();
        // The client has gone, which is no failure of the handler.
        socket.send("answer")
    });
    let plugin = plugin.on_websocket_close(move |socket, close| {
        assert!(!socket.is_open() && socket.context().sockets().is_empty());
        tell.send(format!("{:?} {}", close.code, close.reason)).unwrap();
    });
    let (running, first, mut peer) = start(plugin);
    peer.open(5, "/");
    peer.send(&text(5), b"first");
    peer.send(&text(5), b"second");
    gate.begun();
    peer.send(&json!({"type": "ws_close", "id": 5}), b"");
    gate.go();
    let next = || told.recv_timeout(PATIENCE).unwrap();
    assert_eq!([next(), next(), next()], ["first", "second", "None "]);
    stop(running, [first, peer]);
}

#[test]
fn a_handler_that_fails_closes_its_socket_alone() {
    let (tell, told) = mpsc::channel();
    let plugin = plugin().on_websocket(|socket: &Socket, message: Message| match message.text() {
        Some("fail") => Err(Error::from("expected by the test")),
        Some("panic") => panic!("expected by the test"),
        _ => Ok(socket.send(message)?),
    });
    let plugin = plugin.on_websocket_close(move |_, close| {
        tell.send(close.code).unwrap();
        Err::<(), _>("expected by the test")
    });
    let (running, mut first, mut peer) = start(plugin);
    peer.open(1, "/");
    for (id, message) in [(2, "fail"), (3, "panic")] {
        peer.open(id, "/");
        peer.send(&text(id), message.as_bytes());
        assert_eq!(peer.receive_other().0, json!({"type": "ws_close", "id": id, "code": 1011, "reason": "internal error"}));
        peer.send(&closed(id, 1011), b"");
        assert_eq!(told.recv_timeout(PATIENCE).unwrap(), Some(1011));
        peer.send(&text(1), b"well");
        peer.receive_text(1, "well");
        assert_eq!(first.get("/").1, b"hello");
    }
    stop(running, [first, peer]);
}

#[test]
fn with_a_concurrency_of_one_no_two_handlers_run_at_the_same_time() {
    let running = Arc::new(AtomicUsize::new(0));
    let enter = move || {
        assert_eq!(running.fetch_add(1, Ordering::SeqCst), 0, "another handler runs");
        // Room for others to run, if they do.
        (0..100).for_each(|_| thread::yield_now());
        running.fetch_sub(1, Ordering::SeqCst);
    };
    let [on_open, on_message, on_close, on_http] = [(); 4].map(|()| enter.clone());
    let plugin = plugin().concurrency(1).on_websocket_open(move |_| on_open());
    let plugin = plugin.on_websocket(move |socket, message| {
        on_message();
        socket.send(message)
    });
    let plugin = plugin.on_websocket_close(move |_, _| on_close());
    let running = Running::start(plugin, move |_: &mut Request<'_>| {
        on_http();
        "hello"
    });
    let mut first = running.ready();
    let mut connections = [running.connect(), running.connect()];
    for round in 0..20 {
        first.send(&http(7, "GET", "/"), b"");
        for peer in &mut connections {
            (0..3).for_each(|id| peer.send(&open(10 * round + id, "/", 65536), b""));
        }
        for peer in &mut connections {
            (0..3).for_each(|_| assert_eq!(peer.receive_other().0["type"], "ws_accept"));
            (0..3).for_each(|id| peer.send(&text(10 * round + id), b"hi"));
        }
        for peer in &mut connections {
            (0..3).for_each(|_| assert_eq!(peer.receive_other().1, b"hi"));
            (0..3).for_each(|id| peer.send(&closed(10 * round + id, 1000), b""));
        }
        assert_eq!(first.response().1, b"hello");
    }
    stop(running, [first].into_iter().chain(connections));
}

#[test]
fn a_handler_that_waits_for_credit_with_a_concurrency_of_one_ends_before_another_begins() {
    let (running, mut first, mut peer, told) = sending_twice(1);
    first.send(&http(7, "GET", "/"), b"");
    first.0.stream().set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    assert!(first.0.read().is_err(), "the handler that waits has to end first");
    first.0.stream().set_read_timeout(Some(PATIENCE)).unwrap();
    peer.send(&credit(5, 1000), b"");
    peer.receive_text(5, "second");
    assert_eq!(told.recv_timeout(PATIENCE).unwrap(), Ok(()));
    assert_eq!(first.response().1, b"hello");
    stop(running, [first, peer]);
}

#[test]
fn every_socket_ends_with_its_connection_and_the_host_may_connect_again() {
    let (plugin, told) = telling(plugin().concurrency(1).on_websocket(echo));
    let (running, first, mut peer) = start(plugin);
    for _ in 0..3 {
        (0..5).for_each(|id| peer.open(id, &format!("/{id}")));
        drop(peer);
        let mut ends: Vec<_> = (0..5).map(|_| told.recv_timeout(PATIENCE).unwrap()).collect();
        ends.sort_by(|(one, _), (other, _)| one.cmp(other));
        assert_eq!(ends, (0..5).map(|id| (format!("/{id}"), lost())).collect::<Vec<_>>());
        peer = running.connect();
    }
    peer.open(0, "/");
    peer.send(&text(0), b"hi");
    peer.receive_text(0, "hi");
    stop(running, [first, peer]);
}

#[test]
fn the_end_of_the_plugin_waits_for_handlers_under_way() {
    let (plugin, told) = telling(plugin());
    let (gate, pass) = Gate::new();
    let (running, first, mut peer) = start(plugin.on_websocket(move |_, _| pass()));
    peer.open(5, "/");
    peer.send(&text(5), b"work");
    gate.begun();
    peer.send(&json!({"type": "shutdown", "id": 9}), b"");
    let let_go = spawn(move || {
        (0..100).for_each(|_| thread::yield_now());
        gate.go();
    });
    assert!(peer.is_closed());
    assert_eq!(told.try_recv().unwrap().1, lost(), "both handlers have returned by now");
    let_go.join().unwrap();
    stop(running, [first]);
}
