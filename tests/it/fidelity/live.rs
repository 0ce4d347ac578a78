//! Conversations in which it counts who says something when.

use super::sides::{App, Nginx, ask, attach, client, get, hear, host_before};
use super::wire::{Head, Wire};
use crate::support::{PATIENCE, Server, Site, command, pause, wait_for};
use std::fs;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// An application that waits for a sign at each step, and the end that gives it.
fn on_signs(play: impl Fn(&mut Wire, &Head, &dyn Fn()) -> bool + Send + Sync + 'static) -> (App, Sender<()>) {
    let (give, signs) = channel();
    let signs = Arc::new(Mutex::new(signs));
    let app = App::start(move |wire, head| {
        let wait = || signs.lock().unwrap().recv_timeout(PATIENCE).unwrap();
        play(wire, head, &wait)
    });
    (app, give)
}

#[test]
fn each_event_comes_while_the_next_is_withheld() {
    let events = |wire: &mut Wire, head: &Head, wait: &dyn Fn()| {
        let chunked = head.target().contains("chunked");
        let framing = if chunked { "transfer-encoding: chunked\r\n" } else { "" };
        wire.send(format!("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n{framing}\r\n").as_bytes());
        for number in 0..3 {
            wait();
            let event = format!("data: {number}\n\n");
            wire.send(if chunked { format!("{:x}\r\n{event}\r\n", event.len()) } else { event }.as_bytes());
        }
        wait();
        if chunked {
            wire.send(b"0\r\n\r\n");
        }
        chunked
    };
    for path in ["/chunked", "/to-the-end"] {
        for through_nginx in [false, true] {
            let (app, sign) = on_signs(events);
            let server = host_before(&app, &[]);
            let nginx = Nginx::before(&app, "off");
            let mut wire = if through_nginx { nginx.client() } else { client(&server) };
            wire.send(&get(path));
            // The head comes before the first event.
            let head = wire.head().unwrap();
            assert_eq!((head.status(), head.header("transfer-encoding")), (200, Some("chunked")), "{path}");
            for number in 0..3 {
                sign.send(()).unwrap();
                assert_eq!(wire.chunk().unwrap(), format!("data: {number}\n\n").as_bytes(), "{path}");
            }
            sign.send(()).unwrap();
            assert_eq!(wire.chunk().unwrap(), b"", "{path}");
        }
    }
}

#[test]
fn an_upload_reaches_the_application_while_it_is_sent() {
    for (framing, first, second) in [
        ("content-length: 600000", vec![b'a'; 300_000], vec![b'b'; 300_000]),
        (
            "transfer-encoding: chunked",
            [b"493e0\r\n", &vec![b'a'; 300_000][..], b"\r\n"].concat(),
            [b"493e0\r\n", &vec![b'b'; 300_000][..], b"\r\n0\r\n\r\n"].concat(),
        ),
    ] {
        let (told, half) = channel();
        let told = Mutex::new(told);
        let app = App::start(move |wire, head| {
            let mut come = 0;
            if head.header("transfer-encoding").is_some() {
                while come < 300_000 {
                    come += wire.chunk().unwrap().len();
                }
                told.lock().unwrap().send(()).unwrap();
                while let Some(chunk) = wire.chunk().filter(|chunk| !chunk.is_empty()) {
                    come += chunk.len();
                }
                wire.exactly(2);
            } else {
                come += wire.exactly(300_000).len();
                told.lock().unwrap().send(()).unwrap();
                come += wire.exactly(300_000).len();
            }
            let text = come.to_string();
            wire.send(format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{text}", text.len()).as_bytes())
        });
        let server = host_before(&app, &["--body-buffer", "64KiB"]);
        let mut wire = client(&server);
        wire.send(format!("POST /up HTTP/1.1\r\nhost: app.test\r\n{framing}\r\n\r\n").as_bytes());
        wire.send(&first);
        half.recv_timeout(PATIENCE).unwrap();
        wire.send(&second);
        assert_eq!(hear(&mut wire, "POST").unwrap().text(), "600000", "{framing}");
        assert_eq!(ask(&mut wire, &get("/ok")).text(), "ok /ok");
    }
}

/// An interim response is not the answer, so the rest of the body still goes to the application.
#[test]
fn an_interim_response_does_not_end_the_upload() {
    for interim in
        ["HTTP/1.1 103 Early Hints\r\nlink: </a.css>\r\n\r\n", "HTTP/1.1 100 Continue\r\n\r\n", "HTTP/1.1 102 Processing\r\n\r\n"]
    {
        let (told, half) = channel();
        let told = Mutex::new(told);
        let app = App::start(move |wire, _| {
            wire.exactly(300_000);
            // In two parts, so that the first is no answer either.
            wire.send(&interim.as_bytes()[..10]);
            pause(Duration::from_millis(50));
            wire.send(&interim.as_bytes()[10..]);
            told.lock().unwrap().send(()).unwrap();
            let rest = wire.exactly(300_000).len();
            wire.send(format!("HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n{rest}").as_bytes())
        });
        let server = host_before(&app, &["--body-buffer", "64KiB"]);
        let mut wire = client(&server);
        wire.send(b"POST /up HTTP/1.1\r\nhost: app.test\r\ncontent-length: 600000\r\n\r\n");
        wire.send(&[b'a'; 300_000]);
        half.recv_timeout(PATIENCE).unwrap();
        wire.send(&[b'b'; 100_000]);
        let expected = if interim.contains("100") { 0 } else { 1 };
        if expected == 1 {
            assert_eq!(wire.head().unwrap().line, interim.split("\r\n").next().unwrap());
        }
        wire.send(&[b'b'; 200_000]);
        let heard = hear(&mut wire, "POST").unwrap();
        assert_eq!((heard.status(), heard.text().as_str(), heard.interim.len()), (200, "300000", 0), "{interim}");
        assert_eq!(ask(&mut wire, &get("/ok")).text(), "ok /ok");
    }
}

/// More than the sockets' buffers hold, so that an application that is not read stops reading.
#[test]
fn an_application_may_answer_while_it_reads() {
    let app = App::start(|wire, head| {
        let length = head.header("content-length").map(|length| length.parse::<usize>().unwrap());
        wire.send(
            match length {
                Some(length) => format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n"),
                None => "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n".to_owned(),
            }
            .as_bytes(),
        );
        match length {
            Some(length) => (0..length / 1000).all(|_| {
                let bytes = wire.exactly(1000);
                bytes.len() == 1000 && wire.send(&bytes)
            }),
            None => {
                while let Some(chunk) = wire.chunk() {
                    if chunk.is_empty() {
                        wire.exactly(2);
                        return wire.send(b"0\r\n\r\n");
                    }
                    wire.send(format!("{:x}\r\n", chunk.len()).as_bytes());
                    wire.send(&chunk);
                    wire.send(b"\r\n");
                }
                false
            }
        }
    });
    let server = host_before(&app, &[]);
    let body = super::bytes(5_000_000);
    let declared =
        [format!("POST /echo HTTP/1.1\r\nhost: app.test\r\ncontent-length: {}\r\n\r\n", body.len()).as_bytes(), &body].concat();
    let head = b"POST /echo HTTP/1.1\r\nhost: app.test\r\ntransfer-encoding: chunked\r\n\r\n";
    let chunked = [&head[..], &super::chunks(&body, 70_000), b"0\r\n\r\n"].concat();
    let mut wire = client(&server);
    for request in [&declared, &chunked, &declared] {
        let heard = ask(&mut wire, request);
        assert!(heard.status() == 200 && heard.content.bytes == body, "{} bytes", heard.content.bytes.len());
        assert_eq!(ask(&mut wire, &get("/ok")).text(), "ok /ok");
    }
}

#[test]
fn an_early_answer_reaches_a_client_that_still_sends() {
    for closes in [false, true] {
        let app = App::start(move |wire, _| {
            let lines = if closes { "connection: close\r\n" } else { "" };
            wire.send(format!("HTTP/1.1 413 Content Too Large\r\n{lines}content-length: 9\r\n\r\ntoo large").as_bytes());
            // It reads no byte of the body before it has answered.
            while !closes && wire.exactly(60_000).len() == 60_000 {}
            false
        });
        let server = host_before(&app, &["--body-buffer", "64KiB", "--max-body", "64MiB"]);
        let mut wire = client(&server);
        wire.send(b"POST /up HTTP/1.1\r\nhost: app.test\r\ncontent-length: 50000000\r\n\r\n");
        wire.send(&[b'a'; 200_000]);
        let heard = hear(&mut wire, "POST").unwrap();
        assert_eq!((heard.status(), heard.text().as_str()), (413, "too large"), "{closes}");
        assert_eq!(ask(&mut client(&server), &get("/ok")).text(), "ok /ok");
    }
}

/// An application that closes a connection at a request which is not the first on it, as if it had closed it just before.
fn closes_at_the_second() -> App {
    App::start(|wire, head| {
        wire.content(head, true);
        if head.target() == "/close-now" {
            wire.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok");
            return false;
        }
        wire.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok");
        // The next is read and not answered.
        if wire.head().is_some() {
            return false;
        }
        false
    })
}

fn post(path: &str) -> Vec<u8> {
    format!("POST {path} HTTP/1.1\r\nhost: app.test\r\ncontent-length: 4\r\n\r\nbody").into_bytes()
}

#[test]
fn a_request_on_a_connection_that_was_closed_meanwhile_is_sent_again_only_if_it_is_safe() {
    let app = closes_at_the_second();
    let server = host_before(&app, &[]);
    let mut wire = client(&server);
    // Closed while it was idle: both go to another connection.
    for request in [get("/close-now"), get("/close-now"), post("/close-now"), post("/close-now")] {
        assert_eq!(ask(&mut wire, &request).status(), 200);
        pause(Duration::from_millis(100));
    }
    assert_eq!(app.seen().len(), 4, "none was sent twice");
    // Closed at the very request, unless that came to a new connection.
    for number in 0..50 {
        assert_eq!(ask(&mut wire, &get(&format!("/first-{number}"))).status(), 200);
        assert_eq!(ask(&mut wire, &get(&format!("/again-{number}"))).status(), 200);
        let path = format!("/never-twice-{number}");
        let status = ask(&mut wire, &post(&path)).status();
        let answered = app.seen().iter().filter(|seen| seen.head.target() == path).count();
        assert!(matches!((status, answered), (502, 0) | (200, 1)), "{status} {answered}");
        let log = fs::read_to_string(server.site().data().join("logs/app.log")).unwrap_or_default();
        if log.contains("it was sent once more, and answered") && log.contains("POST /never-twice") {
            return;
        }
    }
    panic!("no request came to a connection that was closed");
}

/// Applications close idle connections after some seconds, so what cannot be sent again does not go there.
#[test]
fn a_request_does_not_go_to_a_connection_that_was_idle_for_long() {
    let app = closes_at_the_second();
    let server = host_before(&app, &[]);
    let mut wire = client(&server);
    for request in [get("/first"), post("/second"), post("/third")] {
        assert_eq!(ask(&mut wire, &request).status(), 200);
        pause(Duration::from_millis(1500));
    }
}

#[test]
fn heads_that_are_too_large_are_refused_and_said() {
    let app = App::start(|wire, head| {
        let mut lines = String::new();
        match head.target() {
            "/one" => lines = format!("x-a: {}\r\n", "v".repeat(70_000)),
            "/many" => (0..300).for_each(|number| lines.push_str(&format!("x-{number}: v\r\n"))),
            "/endless" => {
                wire.send(b"HTTP/1.1 200 OK\r\n");
                while wire.send(b"x-a: b\r\n") {}
                return false;
            }
            _ => (0..20).for_each(|_| {
                wire.send(b"HTTP/1.1 103 Early Hints\r\n\r\n");
            }),
        }
        wire.send(format!("HTTP/1.1 200 OK\r\n{lines}content-length: 2\r\n\r\nok").as_bytes())
    });
    let server = host_before(&app, &[]);
    let mut wire = client(&server);
    for (path, says) in [
        ("/one", "the head of its response has more than 65536 bytes"),
        ("/many", "its response has more than 256 header lines"),
        ("/endless", "the head of its response has more than 65536 bytes"),
        ("/hints", "it sent more than 16 interim responses"),
    ] {
        assert_eq!(ask(&mut wire, &get(path)).status(), 502, "{path}");
        server.wait_logged("app", &[says]);
        assert_eq!(ask(&mut wire, &get("/ok")).text(), "ok /ok");
    }
}

/// An answer that was there before its request may be followed by the true one.
#[test]
fn an_answer_before_the_request_is_taken_for_no_other() {
    let app = App::start(|wire, head| {
        let text = head.target().to_owned();
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{text}", text.len());
        wire.send(answer.as_bytes());
        if text == "/twice" {
            // Late, so that the host has no chance to see it behind the first.
            pause(Duration::from_millis(30));
            wire.send(answer.as_bytes());
        }
        true
    });
    let server = host_before(&app, &[]);
    let mut wire = client(&server);
    for _ in 0..5 {
        assert_eq!(ask(&mut wire, &get("/twice")).text(), "/twice");
        pause(Duration::from_millis(200));
        assert_eq!(ask(&mut wire, &get("/other")).text(), "/other");
    }
}

/// Two applications below routes that both know nothing of the other.
fn two_applications() -> (App, Server) {
    let app = App::start(|wire, head| {
        let cookie = head.header("cookie").unwrap_or_default().to_owned();
        let mut lines = String::new();
        match head.target() {
            "/login" => {
                lines.push_str(&format!("set-cookie: session={}; Path=/; HttpOnly\r\n", head.header("user-agent").unwrap()))
            }
            "/logout" => lines.push_str("set-cookie: session=; Path=/; Max-Age=0\r\n"),
            "/moved" => lines.push_str("location: /there?a=/b\r\ncontent-location: /here\r\nrefresh: 5; url=/next\r\n"),
            "/whole" => lines.push_str(&format!("location: http://{}/there\r\n", head.header("host").unwrap())),
            "/elsewhere" => lines.push_str("location: https://example.org/there\r\n"),
            _ => {}
        }
        let text = format!("{} {cookie}", head.target());
        wire.send(format!("HTTP/1.1 200 OK\r\n{lines}content-length: {}\r\n\r\n{text}", text.len()).as_bytes())
    });
    let address = format!("unix:{}", app.socket.display());
    let site = attach(attach(Site::new(), "one", "", &address), "two", "", &address);
    let keep = format!("listen = \"{address}\"\nprefix = \"keep\"");
    let server = super::sides::manifest(site, "kept", "", &keep).start();
    ["one", "two", "kept"].iter().for_each(|id| drop(server.wait_state(id, "ready")));
    (app, server)
}

#[test]
fn two_applications_with_the_same_cookie_do_not_log_each_other_out() {
    let (_app, server) = two_applications();
    let jar = server.site().data().join("jar");
    let curl = |path: &str, name: &str| {
        let mut curl = command("curl");
        curl.args(["-sS", "-A", name, "-b"]).arg(&jar).arg("-c").arg(&jar).arg(format!("http://{}{path}", server.address()));
        let output = curl.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    curl("/one/login", "first");
    curl("/two/login", "second");
    assert_eq!(curl("/one/page", "x"), "/page session=first");
    assert_eq!(curl("/two/page", "x"), "/page session=second");
    curl("/one/logout", "x");
    assert_eq!(curl("/one/page", "x"), "/page ");
    assert_eq!(curl("/two/page", "x"), "/page session=second");
}

#[test]
fn references_are_mapped_to_the_route_and_the_application_learns_it() {
    let (app, server) = two_applications();
    let mut wire = client(&server);
    let at = |path: &str| format!("GET {path} HTTP/1.1\r\nhost: web.example:81\r\n\r\n").into_bytes();
    for (path, location) in [
        ("/one/moved", "/one/there?a=/b"),
        ("/one/whole", "http://web.example:81/one/there"),
        ("/one/elsewhere", "https://example.org/there"),
        ("/kept/moved", ""),
    ] {
        let heard = ask(&mut wire, &at(path));
        assert_eq!(heard.head.header("location").unwrap_or_default(), location, "{path}");
    }
    let moved = ask(&mut wire, &at("/one/moved")).head;
    assert_eq!((moved.header("content-location"), moved.header("refresh")), (Some("/one/here"), Some("5; url=/one/next")));
    // The bare route.
    let bare = ask(&mut wire, &at("/one?a=b"));
    assert_eq!((bare.status(), bare.head.header("location")), (308, Some("/one/?a=b")));
    assert_eq!(ask(&mut wire, &at("/kept")).text(), "/kept ");
    assert_eq!(ask(&mut wire, &at("/one/")).text(), "/ ");
    app.seen();
    for (path, target) in [("/one/a%20b/?c=d", "/a%20b/?c=d"), ("/kept/a?b", "/kept/a?b")] {
        let forged = "x-forwarded-for: 9.9.9.9\r\nx-forwarded-prefix: /x\r\nx-forwarded-host: evil\r\nx-request-id: mine\r\nforwarded: for=9.9.9.9";
        let request = format!("GET {path} HTTP/1.1\r\nhost: web.example:81\r\n{forged}\r\n\r\n");
        ask(&mut wire, request.as_bytes());
        let head = app.seen().pop().unwrap().head;
        assert_eq!(head.target(), target);
        let prefix = path.split('/').nth(1).unwrap();
        for (name, value) in [
            ("host", "web.example:81"),
            ("x-forwarded-for", "127.0.0.1"),
            ("x-forwarded-proto", "http"),
            ("x-forwarded-host", "web.example:81"),
            ("x-forwarded-prefix", &format!("/{prefix}")),
        ] {
            assert_eq!(head.all(name), [value], "{path}");
        }
        assert_eq!(head.all("x-request-id").len(), 1);
        assert_ne!(head.all("x-request-id"), ["mine"]);
        assert_eq!(head.header("forwarded"), None);
    }
}

#[test]
fn headers_that_only_the_host_may_send_do_not_pass() {
    let app =
        App::start(|wire, _| wire.send(b"HTTP/1.1 200 OK\r\nx-plugrack-state: ready\r\nx-own: 1\r\ncontent-length: 0\r\n\r\n"));
    let server = host_before(&app, &[]);
    let head = ask(&mut client(&server), &get("/any")).head;
    assert_eq!((head.header("x-plugrack-state"), head.header("x-own")), (None, Some("1")));
}

/// A host that is attached only looks on: the application goes and comes back by itself.
#[test]
fn an_attached_application_goes_and_comes_back_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("app.sock");
    let site = attach(Site::new(), "away", "", &format!("unix:{}", path.display()));
    let server = site.start();
    let shown = wait_for("a state that says so", || {
        let shown = server.plugin("away");
        shown["reason"].as_str().filter(|reason| reason.contains("does not listen") || reason.contains("nobody listens"))?;
        Some(shown)
    });
    assert!(shown["reason"].as_str().unwrap().contains(&path.display().to_string()), "{shown}");
    let app = App::start(|_, _| true);
    fs::hard_link(&app.socket, &path).unwrap();
    server.wait_state("away", "ready");
    assert_eq!(ask(&mut client(&server), b"GET /away/ok HTTP/1.1\r\nhost: h\r\n\r\n").text(), "ok /ok");
    drop(app);
    wait_for("it to be down", || (server.plugin("away")["state"] != "ready").then_some(()));
    let app = App::start(|_, _| true);
    fs::remove_file(&path).unwrap();
    fs::hard_link(&app.socket, &path).unwrap();
    server.wait_state("away", "ready");
    assert_eq!(server.plugin("away")["process"]["pid"], serde_json::Value::Null);
}

/// nginx takes interim responses for the answer, or drops them, by its version.
#[test]
fn interim_responses_reach_clients_that_know_them() {
    let app = App::start(|wire, head| {
        if head.target() != "/only" {
            wire.send(b"HTTP/1.1 100 Continue\r\n\r\n");
        }
        wire.send(
            b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\nlink: </b.js>\r\nconnection: x-hop\r\nx-hop: 1\r\n\r\n",
        );
        wire.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
    });
    let server = host_before(&app, &[]);
    let mut wire = client(&server);
    for path in ["/only", "/both"] {
        let heard = ask(&mut wire, &get(path));
        assert_eq!((heard.status(), heard.text().as_str(), heard.interim.len()), (200, "ok", 1), "{path}");
        assert_eq!(heard.interim[0].line, "HTTP/1.1 103 Early Hints");
        assert_eq!(heard.interim[0].all("link"), ["</a.css>; rel=preload", "</b.js>"]);
        assert_eq!(heard.interim[0].headers.len(), 2);
    }
    wire.send(b"GET /both HTTP/1.0\r\nhost: app.test\r\n\r\n");
    let heard = hear(&mut wire, "GET").unwrap();
    assert_eq!((heard.status(), heard.interim.len()), (200, 0));
}

/// Who forwards HTTP/1.0 may have read chunks as something else, so nothing follows on the connection.
#[test]
fn a_chunked_answer_of_http_1_0_is_the_last_on_its_connection() {
    let app = App::start(|wire, _| {
        wire.send(b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n")
    });
    let server = host_before(&app, &[]);
    let mut wire = client(&server);
    for _ in 0..2 {
        assert_eq!(ask(&mut wire, &get("/any")).text(), "ok");
    }
    let seen = app.seen();
    assert_eq!(seen.len(), 2);
    assert_ne!(seen[0].connection, seen[1].connection);
}

/// The application learns by the end of its connection that nobody waits for its answer.
#[test]
fn a_client_that_goes_ends_the_connection_to_the_application() {
    let (tell, told) = channel();
    let tell = Mutex::new(tell);
    let app = App::start(move |wire, head| {
        if head.target() == "/stream" {
            wire.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n");
        }
        tell.lock().unwrap().send(wire.is_over()).unwrap();
        false
    });
    let server = host_before(&app, &[]);
    for path in ["/silent", "/stream"] {
        let mut wire = client(&server);
        wire.send(&get(path));
        if path == "/stream" {
            assert_eq!(wire.head().unwrap().status(), 200);
        }
        wait_for("the request to arrive", || (!app.seen().is_empty()).then_some(()));
        drop(wire);
        assert!(told.recv_timeout(PATIENCE).unwrap(), "{path}");
        assert_eq!(ask(&mut client(&server), &get("/ok")).text(), "ok /ok");
        app.seen();
    }
}

/// A quick application is sent several requests at once, each on a connection of its own.
#[test]
fn requests_that_are_sent_together_are_sent_once_and_answered_without_the_slow_ones() {
    let (app, sign) = on_signs(|wire, _, wait| {
        wait();
        wire.send(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nslow")
    });
    let server = host_before(&app, &[]);
    let mut wires: Vec<Wire> = (0..30).map(|_| client(&server)).collect();
    for round in 0..6 {
        for wire in &mut wires {
            assert_eq!(ask(wire, &get("/ok")).status(), 200);
        }
        app.seen();
        let (slow, quick) = wires.split_at_mut(2);
        assert!(slow.iter_mut().all(|wire| wire.send(&get("/slow"))));
        assert!(quick.iter_mut().all(|wire| wire.send(&get("/ok"))));
        quick.iter_mut().for_each(|wire| assert_eq!(hear(wire, "GET").unwrap().status(), 200, "{round}"));
        if round % 2 == 1 {
            // Its client goes, and the other still gets its answer.
            slow[0] = client(&server);
            pause(Duration::from_millis(300));
        }
        (0..2).for_each(|_| sign.send(()).unwrap());
        let left = if round % 2 == 1 { &mut slow[1..] } else { slow };
        left.iter_mut().for_each(|wire| assert_eq!(hear(wire, "GET").unwrap().text(), "slow", "{round}"));
        assert_eq!(app.seen().len(), wires.len(), "{round}");
    }
}
