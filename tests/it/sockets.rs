//! WebSocket for plugins that speak the plugin protocol: the host speaks with the clients, and a raw plugin gets messages.

use crate::bridges::{self, packages};
use crate::sdk_concurrency::install;
use crate::support::browser::Browser;
use crate::support::tls::Authority;
use crate::support::websocket::{BINARY, CLOSE, CONTINUATION, FIN, PING, PONG, Socket, TEXT, closing, frame, head};
use crate::support::{Server, Site, command, copy_program, echo_socket, pause, root, wait_for};
use std::fs;
use std::io::Write;
use std::net::Shutdown;
use std::time::{Duration, Instant};

/// The largest message: 1 MiB.
const LARGEST: usize = 1 << 20;

fn site(arguments: &[&str]) -> Site {
    let site = Site::new().args(arguments);
    copy_program(root().join("tests/fixtures/socket_plugin.py"), site.plugins().join("s"));
    site
}

/// A host with the plugin at `/s`.
fn host(arguments: &[&str]) -> Server {
    let server = site(arguments).start();
    server.wait_state("s", "ready");
    server
}

/// An open socket that echoes, after its greeting.
fn echo(server: &Server) -> Socket {
    let mut socket = server.socket("/s/echo");
    assert_eq!(socket.hear(), "/echo test");
    socket
}

fn threads(server: &Server) -> usize {
    fs::read_dir(format!("/proc/{}/task", server.pid())).unwrap().count()
}

#[track_caller]
fn assert_talks(server: &Server, program: &str, client: &str, base: &str, host: &str) {
    let output = command(program)
        .arg(root().join("tests/fixtures").join(client))
        .args([base, host, &server.address().to_string(), "--refused", "--largest", &LARGEST.to_string()])
        .env("NODE_PATH", packages().join("node/node_modules"))
        .output()
        .unwrap();
    let [out, err] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned());
    assert!(output.status.success() && out == "all is well\n", "{out}{err}\n{}\n{}", server.cli(&["logs", "s"]), server.log());
}

#[test]
fn an_independent_client_talks_to_a_plugin() {
    let server = host(&[]);
    let address = server.address();
    let python = packages().join("python/bin/python3").display().to_string();
    assert_talks(&server, &python, "websocket_client.py", &format!("ws://{address}/s"), &address.to_string());
    let local = format!("s.localhost:{}", address.port());
    assert_talks(&server, &python, "websocket_client.py", &format!("ws://{local}"), &local);
    server.wait_logged("s", &["closed with 3001 bye", "closed with 4001 as you like"]);
    assert_talks(&server, "node", "websocket_client.cjs", &format!("ws://{address}/s"), &address.to_string());
}

#[test]
fn a_plugin_of_each_sdk_talks_to_an_independent_client() {
    for language in ["rust", "py", "mjs"] {
        let site = Site::new();
        install(&site, "echo_socket", language, echo_socket);
        let server = site.start();
        server.wait_state("s", "ready");
        let address = server.address();
        let python = packages().join("python/bin/python3").display().to_string();
        for (program, client) in [(&*python, "websocket_client.py"), ("node", "websocket_client.cjs")] {
            assert_talks(&server, program, client, &format!("ws://{address}/s"), &address.to_string());
        }
        let mut open = echo(&server);
        let pid = server.plugin("s")["process"]["pid"].as_i64().unwrap();
        server.cli(&["restart", "s"]);
        assert_eq!(open.closed().0, 1012, "{language}");
        server.wait_restarted("s", pid);
        echo(&server).assert_echoes("again");
        assert!(!server.cli(&["logs", "s"]).contains("protocol error"), "{}", server.cli(&["logs", "s"]));
        let log = server.cli(&["show", "s"]);
        assert!(!log.contains("signal"), "{language}: {log}");
    }
}

#[test]
fn an_application_of_starlette_has_sockets_through_the_asgi_bridge() {
    let program = fs::read_to_string(root().join("tests/fixtures/bridge_asgi_websocket.py")).unwrap();
    let server = bridges::start_with("s", "plugin", &program, &["websocket_app.py"]);
    let address = server.address();
    let python = packages().join("python/bin/python3").display().to_string();
    for (program, client) in [(&*python, "websocket_client.py"), ("node", "websocket_client.cjs")] {
        assert_talks(&server, program, client, &format!("ws://{address}/s"), &address.to_string());
    }
    server.wait_logged("s", &["closed with 3001"]);
    assert_eq!(server.get("/s/").text(), "a page");
}

/// Waits until a page shows a text.
#[track_caller]
fn wait_shown(browser: &mut Browser, text: &str) {
    wait_for(text, || browser.text().contains(text).then_some(()));
}

#[test]
fn the_chat_example_connects_browsers_and_keeps_what_was_said() {
    const SAY: &str = "document.querySelector('#text').value = 'good ☕ morning'; document.querySelector('form').requestSubmit()";
    let server = Site::new().example("chat").start();
    server.wait_state("chat", "ready");
    let page = |name: &str| format!("http://{}/chat?name={name}", server.address());
    let [mut ada, mut bob] = [(); 2].map(|()| Browser::start(&[]));
    for (browser, name) in [(&mut ada, "ada"), (&mut bob, "bob")] {
        browser.open(&page(name));
        wait_for("a socket", || (browser.evaluate("document.querySelector('[role=status]').textContent") == "").then_some(()));
    }
    ada.evaluate(SAY);
    for browser in [&mut ada, &mut bob] {
        wait_shown(browser, "good ☕ morning");
    }
    // The browser connects again by itself, and sees what was said before.
    let pid = server.plugin("chat")["process"]["pid"].as_i64().unwrap();
    server.cli(&["restart", "chat"]);
    server.wait_restarted("chat", pid);
    let ready = "document.querySelector('[role=status]').textContent == '' && document.querySelectorAll('li').length";
    wait_for("the history", || (bob.evaluate(ready) == 1).then_some(()));
    bob.evaluate(&SAY.replace("morning", "evening"));
    wait_shown(&mut ada, "good ☕ evening");
    // What RFC 6455 asks of a server, as a browser sees it: no name without a name, and the right code at the end.
    let code =
        "new Promise((tell) => { const socket = new WebSocket(new URL('socket', location.href).href.replace('http', 'ws'));
        socket.addEventListener('close', ({ code }) => tell(code)) })";
    assert_eq!(ada.evaluate(code), 1006);
    assert!(!server.cli(&["logs", "chat"]).contains("Traceback"));
}

#[test]
fn a_request_that_is_no_handshake_is_refused_and_the_plugin_does_not_see_it() {
    let server = host(&[]);
    let upgrade = [("connection", "upgrade"), ("upgrade", "websocket")];
    let ask = |more: &[(&str, &str)]| server.request("GET", "/s/echo", &[&upgrade[..], more].concat(), b"");
    let key = ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==");
    for version in ["8", "", "13, 8"] {
        let reply = ask(&[key, ("sec-websocket-version", version)]);
        assert_eq!(
            (reply.status, reply.header("sec-websocket-version"), reply.header("upgrade")),
            (426, Some("13"), Some("websocket"))
        );
    }
    for key in ["", "short", "dGhlIHNhbXBsZSBub25jZQ", "dGhlIHNhbXBsZSBub25jZQ==AAAA", "dGhlIHNhbXBsZSBub25jZSE="] {
        let reply = ask(&[("sec-websocket-key", key), ("sec-websocket-version", "13")]);
        assert_eq!(reply.status, 400, "{key}");
        assert!(reply.text().contains("sec-websocket-key must be 16 bytes in base64"), "{}", reply.text());
    }
    // Without an upgrade, or with another one, it is an ordinary request.
    assert_eq!(server.get("/s/echo").text(), "a page");
    assert_eq!(server.request("GET", "/s/", &[("connection", "upgrade"), ("upgrade", "other")], b"").text(), "a page");
}

#[test]
fn a_page_of_another_site_gets_no_socket_unless_the_plugin_lists_its_origin() {
    let server = host(&["--trust-proxy", "127.0.0.2/32"]);
    let status = |headers: &str| server.socket_with("/s/echo", headers).status();
    for origin in ["http://test", "https://test", "http://test:80", "https://test:443", "HTTP://TEST", "https://friend.example"] {
        assert_eq!(status(&format!("origin: {origin}\r\n")), 101, "{origin}");
    }
    for origin in ["http://evil.example", "http://test:8080", "https://test:80", "null", "", "test", "http://test.evil.example"] {
        assert_eq!(status(&format!("origin: {origin}\r\n")), 403, "{origin}");
    }
    // A client that is no trusted proxy cannot name another host.
    assert_eq!(status("origin: http://evil.example\r\nx-forwarded-host: evil.example\r\n"), 403);
}

#[test]
fn the_plugin_sees_the_request_and_gives_the_response_its_headers() {
    let server = host(&[]);
    let headers = "cookie: a=b\r\nsec-websocket-protocol: v2, v1\r\nsec-websocket-extensions: permessage-deflate\r\n";
    let mut socket = server.socket_with("/s/head?q=1", headers).assert_open();
    let seen: serde_json::Value = serde_json::from_str(&socket.hear()).unwrap();
    assert_eq!(
        (&seen["path"], &seen["query"], &seen["mount"], &seen["remote"]),
        (&"/head".into(), &"q=1".into(), &"/s".into(), &"127.0.0.1".into())
    );
    let names: Vec<_> = seen["headers"].as_array().unwrap().iter().map(|pair| pair[0].as_str().unwrap()).collect();
    let expected = [
        "host",
        "cookie",
        "sec-websocket-protocol",
        "x-forwarded-for",
        "x-forwarded-proto",
        "x-forwarded-prefix",
        "x-request-id",
    ];
    assert_eq!(names, expected);
    let accept = |fields: &str| {
        let fields: String = fields.bytes().map(|byte| format!("%{byte:02x}")).collect();
        server.socket_with(&format!("/s/accept?fields={fields}"), "sec-websocket-protocol: v2, v1\r\n")
    };
    let socket =
        accept(r#"{"protocol":"v1","headers":[["Set-Cookie","c=d"],["Content-Length","5"],["Sec-WebSocket-Accept","x"]]}"#);
    let socket = socket.assert_open();
    assert!(socket.head.contains("\r\nsec-websocket-protocol: v1\r\n") && socket.head.contains("\r\nset-cookie: c=d\r\n"));
    assert!(!socket.head.contains("content-length") && !socket.head.contains("extensions"), "{}", socket.head);
    assert!(!accept("{}").assert_open().head.contains("sec-websocket-protocol"));
    for (fields, why) in [
        (r#"{"protocol":"v3"}"#, "ws_accept.protocol \"v3\" is not one that the client offers"),
        (r#"{"headers":[["x","a\r\nb: c"]]}"#, "the value of header \"x\" holds a control character"),
    ] {
        assert_eq!(accept(fields).status(), 502);
        server.wait_logged("s", &[why]);
    }
    // The plugin is told that the socket which it has accepted is none.
    server.wait_logged("s", &["closed with 1011"]);
}

#[test]
fn a_plugin_refuses_a_socket_by_a_response() {
    let server = host(&["--request-timeout", "1s"]);
    let mut socket = server.socket_with("/s/refuse", "");
    assert_eq!(socket.status(), 403);
    let mut body = [0; 13];
    std::io::Read::read_exact(&mut socket.stream, &mut body).unwrap();
    assert_eq!(&body, b"members only\n");
    // The connection is kept for further requests.
    socket.send_raw(b"GET /s/ HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut socket.stream, &mut rest).unwrap();
    assert!(rest.ends_with("a page"), "{rest}");
    for (query, why) in [
        ("status=200", "a response that refuses a socket has a status of 300-599, got 200"),
        ("status=600", "status 600 is not within 200-599"),
        ("status=403&more=1", "the body of a response that refuses a socket comes with it, and does not go on"),
    ] {
        assert_eq!(server.socket_with(&format!("/s/refuse-badly?{query}"), "").status(), 502);
        server.wait_logged("s", &[why]);
    }
    assert_eq!(server.socket_with("/s/error", "").status(), 502);
    server.wait_logged("s", &["the plugin answered with the error broken: it is broken"]);
    let late = server.socket_with("/s/never", "");
    assert_eq!(late.status(), 504);
    drop(late.stream.shutdown(Shutdown::Both));
    server.wait_logged("s", &["passed before it answered ws_open", "closed with 1006"]);
    echo(&server).assert_echoes("still here");
}

#[test]
fn a_client_that_goes_before_the_answer_is_told_of() {
    let server = host(&[]);
    let mut stream = std::net::TcpStream::connect(server.address()).unwrap();
    stream.write_all(crate::support::websocket::request("/s/never", "").as_bytes()).unwrap();
    pause(Duration::from_millis(300));
    drop(stream);
    server.wait_logged("s", &["closed with 1006"]);
}

#[test]
fn messages_of_every_form_arrive_whole() {
    let server = host(&[]);
    let mut socket = echo(&server);
    let text = "é☕𝄞".repeat(50_000);
    for size in [0, 1, 125, 126, 65_535, 65_536, LARGEST] {
        let payload: Vec<u8> = (0..size).map(|n| u8::try_from(n % 251).unwrap()).collect();
        socket.send(FIN | BINARY, &payload);
        assert!(socket.receive().unwrap() == (FIN | BINARY, payload), "{size}");
    }
    socket.assert_echoes(&text);
    // In fragments that cut characters, with pings between them, byte by byte.
    let text = "grüß dich ☕";
    for (at, byte) in text.bytes().enumerate() {
        let first = if at == 0 { TEXT } else { CONTINUATION };
        for byte in frame(first, &[byte]) {
            socket.send_raw(&[byte]);
        }
        socket.send(FIN | PING, &[at.try_into().unwrap()]);
        assert_eq!(socket.receive().unwrap(), (FIN | PONG, vec![at.try_into().unwrap()]));
    }
    socket.send(FIN | CONTINUATION, b"");
    assert_eq!(socket.hear(), text);
    // A pong that nobody has asked for is ignored.
    socket.send(FIN | PONG, b"unasked");
    // Many at once, in order.
    let all: Vec<u8> = (0..5000).flat_map(|n: u32| frame(FIN | TEXT, n.to_string().as_bytes())).collect();
    let mut writer = socket.stream.try_clone().unwrap();
    let sender = std::thread::Builder::new().name("sender".into()).spawn(move || writer.write_all(&all).unwrap()).unwrap();
    for n in 0..5000 {
        assert_eq!(socket.hear(), n.to_string());
    }
    sender.join().unwrap();
    // A message that is sent behind the request is not lost.
    let stream = std::net::TcpStream::connect(server.address()).unwrap();
    let mut early = crate::support::websocket::request("/s/echo", "").into_bytes();
    early.extend(frame(FIN | TEXT, b"at once"));
    let mut socket = Socket::ask_by(stream, &early);
    assert_eq!([socket.hear(), socket.hear()], ["/echo test", "at once"]);
}

#[test]
fn what_breaks_the_protocol_closes_the_socket_with_the_code_that_is_due() {
    let server = host(&[]);
    let mut other = echo(&server);
    let text = FIN | TEXT;
    let cases: Vec<(&str, Vec<u8>, u16)> = vec![
        ("text that is not UTF-8", frame(text, b"\xff"), 1007),
        ("text that ends inside a character", frame(text, b"\xe2\x98"), 1007),
        ("a surrogate", frame(text, b"\xed\xa0\x80"), 1007),
        ("a fragment that is not UTF-8", frame(TEXT, b"good\xc0\xaf"), 1007),
        ("fragments that end inside a character", [frame(TEXT, b"\xe2"), frame(FIN, b"\x98")].concat(), 1007),
        ("a message over the limit", [head(FIN | BINARY, 0x80, LARGEST + 1), vec![0; 4]].concat(), 1009),
        ("a length of 2^63", [&[FIN | BINARY, 0xff][..], &[0x80, 0, 0, 0, 0, 0, 0, 0], &[0; 4]].concat(), 1009),
        ("fragments over the limit", [frame(BINARY, &vec![0; LARGEST]), frame(FIN, b"1")].concat(), 1009),
        ("no mask", [&head(text, 0, 2)[..], b"hi"].concat(), 1002),
        ("a reserved bit", frame(text | 0x40, b"x"), 1002),
        ("the reserved opcode 3", frame(FIN | 3, b"x"), 1002),
        ("the reserved opcode 11", frame(FIN | 11, b"x"), 1002),
        ("a continuation of nothing", frame(FIN, b"x"), 1002),
        ("a message within a message", [frame(TEXT, b"a"), frame(text, b"b")].concat(), 1002),
        ("a ping in fragments", frame(PING, b"x"), 1002),
        ("a ping of 126 bytes", frame(FIN | PING, &[0; 126]), 1002),
        ("a close frame of one byte", frame(FIN | CLOSE, b"x"), 1002),
        ("a close frame with text that is not UTF-8", frame(FIN | CLOSE, b"\x03\xe8\xff"), 1007),
        ("a close frame with the code 1005", frame(FIN | CLOSE, &closing(1005, "")), 1002),
        ("a close frame with the code 999", frame(FIN | CLOSE, &closing(999, "")), 1002),
        ("a close frame with the code 2000", frame(FIN | CLOSE, &closing(2000, "")), 1002),
    ];
    for (what, bytes, code) in cases {
        let mut socket = echo(&server);
        socket.send_raw(&bytes);
        assert_eq!(socket.closed().0, code, "{what}");
        socket.assert_ended();
        server.wait_logged("s", &[&format!("closed with {code}")]);
    }
    other.assert_echoes("unharmed");
    assert_eq!(server.plugin("s")["process"]["failed"], 0, "the clients are to blame");
}

#[test]
fn the_end_of_a_socket_is_told_to_both_sides_whoever_begins() {
    let server = host(&[]);
    let logged = |line: &str| server.wait_logged("s", &[line]);
    let mut socket = echo(&server);
    socket.send(FIN | CLOSE, &closing(3000, "enough"));
    assert_eq!(socket.closed(), (3000, "enough".into()));
    socket.assert_ended();
    logged("closed with 3000 enough");
    // Without a code.
    let mut socket = echo(&server);
    socket.send(FIN | CLOSE, b"");
    assert_eq!(socket.receive().unwrap(), (FIN | CLOSE, Vec::new()));
    socket.assert_ended();
    logged("closed with None");
    // The plugin begins: what it has sent before comes first, and what the client still sends reaches it.
    let mut socket = server.socket("/s/close?code=4000&reason=late");
    socket.say("close it");
    assert_eq!(socket.closed(), (4000, "late".into()));
    socket.send(FIN | CLOSE, &closing(3999, "so be it"));
    socket.assert_ended();
    logged("closed with 3999 so be it");
    let mut socket = server.socket("/s/early");
    assert_eq!((socket.hear(), socket.closed().0), ("first".into(), 1000));
    // The client goes without a word, in order and by a reset.
    drop(socket);
    logged("closed with 1006  after 1");
    // Both at once.
    let mut socket = server.socket("/s/close?code=4002");
    socket.send_raw(&[frame(FIN | TEXT, b"close it"), frame(FIN | CLOSE, &closing(3002, "me too"))].concat());
    let code = socket.closed().0;
    assert!(code == 3002 || code == 4002, "{code}");
    socket.assert_ended();
    logged("closed with 3002 me too");
    // A client that does not answer the close frame.
    let mut socket = server.socket("/s/close?code=4003");
    socket.say("close it");
    assert_eq!(socket.closed().0, 4003);
    socket.assert_ended();
    // A code that no plugin may send.
    let mut socket = server.socket("/s/close?code=1005");
    socket.say("close it");
    assert_eq!(socket.closed().0, 1011);
    logged("ws_close.code 1005 is not one that a plugin may send");
    echo(&server).assert_echoes("still here");
}

#[test]
fn a_plugin_that_breaks_the_protocol_on_a_socket_loses_that_one_alone() {
    let server = host(&[]);
    let mut other = echo(&server);
    let mut socket = server.socket("/s/bad-text");
    socket.say("go");
    assert_eq!(socket.closed().0, 1011);
    let mut socket = server.socket("/s/greedy");
    let mut got = 0;
    let code = loop {
        match socket.receive().unwrap() {
            (first, payload) if first == FIN | CLOSE => break u16::from_be_bytes(*payload.first_chunk().unwrap()),
            _ => got += 1,
        }
    };
    assert!(code == 1011 && got >= 61, "{code} after {got}");
    server.wait_logged("s", &["a text message is not UTF-8", "a message came without credit"]);
    other.assert_echoes("unharmed");
}

#[test]
fn the_end_of_the_plugins_connection_ends_its_sockets_and_others_are_opened() {
    let server = host(&[]);
    let frame_of = |head: &str| {
        let mut frame = u32::try_from(head.len()).unwrap().to_be_bytes().to_vec();
        frame.extend_from_slice(&[0; 4]);
        frame.extend_from_slice(head.as_bytes());
        frame.iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    };
    for (bytes, why) in [
        ("ffffffff00000000".to_owned(), "a frame's head length of 4294967295 is not within 1-65536"),
        (frame_of(r#"{"type":"ws_close","id":1,"code":99}"#), "ws_close.code must be an integer from 1000 to 4999, got 99"),
        (frame_of(r#"{"type":"pong","id":1}"#), "a pong with id 1 is out of place"),
        (frame_of(r#"{"type":"ws_credit","id":99999,"bytes":1}"#), "the host has opened no such socket"),
    ] {
        let mut other = echo(&server);
        let mut socket = server.socket(&format!("/s/raw?hex={bytes}"));
        assert_eq!((socket.closed().0, other.closed().0), (1011, 1011), "{why}");
        server.wait_logged("s", &[why]);
        assert_eq!(server.get("/s/").text(), "a page");
    }
    echo(&server).assert_echoes("again");
    // The end of the process.
    let pid = server.plugin("s")["process"]["pid"].as_i64().unwrap();
    let mut other = echo(&server);
    let mut socket = server.socket("/s/exit-later");
    socket.say("go");
    assert_eq!((socket.closed().0, other.closed().0), (1011, 1011));
    server.wait_restarted("s", pid);
    assert_eq!(server.socket_with("/s/exit", "").status(), 502);
}

#[test]
fn a_restart_and_a_stop_close_sockets_with_a_code_that_says_so() {
    let server = host(&[]);
    let mut socket = echo(&server);
    let pid = server.plugin("s")["process"]["pid"].as_i64().unwrap();
    server.cli(&["restart", "s"]);
    assert_eq!(socket.closed().0, 1012);
    server.wait_restarted("s", pid);
    server.wait_logged("s", &["closed with 1012", "shutdown with 0 open"]);
    let mut socket = echo(&server);
    socket.assert_echoes("of the new process");
    let (status, site) = server.stop();
    assert!(status.success());
    assert_eq!(socket.closed().0, 1001);
    let log = fs::read_to_string(site.data().join("logs/s.log")).unwrap();
    assert!(log.contains("closed with 1001") && !log.contains("killed"), "{log}");
}

#[test]
fn a_client_that_answers_no_ping_has_gone() {
    let server = host(&["--websocket-ping", "300ms"]);
    let mut silent = echo(&server);
    let mut alive = echo(&server);
    let began = Instant::now();
    let mut pings = 0;
    while pings < 5 {
        let (first, payload) = alive.receive().unwrap();
        assert_eq!(first, FIN | PING);
        alive.send(FIN | PONG, &payload);
        pings += 1;
        assert!(began.elapsed() < Duration::from_secs(60));
    }
    while let Some((first, _)) = silent.receive() {
        assert_eq!(first, FIN | PING);
    }
    server.wait_logged("s", &["closed with 1006"]);
    alive.assert_echoes("hello");
}

#[test]
fn a_client_that_reads_nothing_holds_up_its_own_socket_and_gets_all_in_the_end() {
    // On a loaded machine the clients may read nothing for longer than a ping waits for its pong.
    let server = host(&["--websocket-ping", "5m"]);
    let mut other = echo(&server);
    let before = server.memory("VmRSS");
    let mut slow: Vec<_> = (0..10).map(|_| server.socket("/s/flood?most=20000&size=2000")).collect();
    for _ in 0..20 {
        other.assert_echoes("quick");
        pause(Duration::from_millis(50));
    }
    let grown = server.memory("VmRSS").saturating_sub(before);
    assert!(grown < 16 << 20, "{grown} bytes for 10 clients that read nothing");
    for socket in &mut slow {
        for n in 0..20_000 {
            let text = socket.hear();
            assert!(text.starts_with(&format!("{n}:")), "{n}: {}", &text[..20]);
        }
    }
}

#[test]
fn a_plugin_that_gives_no_credit_holds_up_its_own_client() {
    let server = host(&[]);
    let mut other = echo(&server);
    let mut held = server.socket("/s/count?credit=0");
    held.say("never");
    let mut deaf = server.socket("/s/deaf");
    deaf.stream.set_write_timeout(Some(Duration::from_secs(2))).unwrap();
    let message = frame(FIN | BINARY, &[0; 8000]);
    let mut taken = 0_usize;
    while deaf.stream.write_all(&message).is_ok() {
        taken += message.len();
        assert!(taken < 64 << 20, "a plugin without credit to give is sent more and more");
    }
    for _ in 0..10 {
        other.assert_echoes("quick");
    }
    assert!(!server.cli(&["logs", "s"]).contains("message of 5"));
    drop(held);
    server.wait_logged("s", &["closed with 1006"]);
}

#[test]
fn a_flood_of_pings_fills_no_memory_and_harms_nobody() {
    let server = host(&[]);
    let mut other = echo(&server);
    let mut flood = echo(&server);
    flood.stream.set_write_timeout(Some(Duration::from_secs(2))).unwrap();
    let before = server.memory("VmRSS");
    let pings = frame(FIN | PING, &[7; 125]).repeat(1000);
    let mut sent = 0_usize;
    // It reads no pong, so that it is not read in the end either.
    while sent < 256 << 20 && flood.stream.write_all(&pings).is_ok() {
        sent += pings.len();
        if sent % (8 << 20) < pings.len() {
            other.assert_echoes("quick");
        }
    }
    let grown = server.memory("VmRSS").saturating_sub(before);
    assert!(sent < 256 << 20 && grown < 8 << 20, "{grown} bytes for {sent} of pings");
    other.assert_echoes("still quick");
}

#[test]
fn messages_that_never_become_whole_have_bounded_memory() {
    let server = host(&["--websocket-memory", "2MiB"]);
    let mut other = echo(&server);
    let mut sockets: Vec<_> = (0..6).map(|_| server.socket("/s/echo")).collect();
    let half = vec![0; LARGEST / 2 + 1];
    let mut refused = 0;
    for socket in &mut sockets {
        assert_eq!(socket.hear(), "/echo test");
        socket.send(BINARY, &half);
        // The first pong may go out with what was read of the message, before its size is looked at.
        for _ in 0..2 {
            socket.stream.write_all(&frame(FIN | PING, b"there?")).unwrap_or_default();
            let (first, payload) = socket.receive().unwrap();
            if first != FIN | PONG {
                assert_eq!((first, u16::from_be_bytes(*payload.first_chunk().unwrap())), (FIN | CLOSE, 1013));
                refused += 1;
                break;
            }
        }
    }
    assert!((2..=4).contains(&refused), "{refused} of 6");
    other.assert_echoes("small ones pass");
    assert!(server.log().contains("--websocket-memory"), "{}", server.log());
    drop(sockets);
    // Their memory is free again.
    let mut socket = echo(&server);
    socket.send(BINARY, &half);
    socket.send(FIN, &half[2..]);
    assert_eq!(socket.receive().unwrap().1.len(), LARGEST);
}

#[test]
fn a_thousand_sockets_cost_no_thread_each() {
    let most = ["--max-connections", "1200", "--max-connections-per-address", "1200", "--max-tunnels", "1001"];
    let server = host(&most);
    echo(&server);
    let before = threads(&server);
    let mut sockets: Vec<_> = (0..1000).map(|_| echo(&server)).collect();
    for (n, socket) in sockets.iter_mut().enumerate() {
        socket.say(&n.to_string());
    }
    for (n, socket) in sockets.iter_mut().enumerate() {
        assert_eq!(socket.hear(), n.to_string());
    }
    assert!(threads(&server) <= before + 8, "{} threads, and {before} before", threads(&server));
    assert_eq!(server.get("/s/").text(), "a page");
    let _last = echo(&server);
    assert_eq!(server.socket_with("/s/echo", "").status(), 503);
    drop(sockets);
    wait_for("room", || (server.socket_with("/s/echo", "").status() == 101).then_some(()));
}

#[test]
fn sockets_work_over_tls() {
    let authority = Authority::new();
    let certificate = authority.issue("localhost");
    let server = host(&certificate.arguments());
    let mut socket = Socket::ask(authority.connect(server.address()), "/s/echo", "origin: https://test\r\n").assert_open();
    assert_eq!(socket.hear(), "/echo test");
    let text = "x".repeat(300_000);
    for _ in 0..10 {
        socket.assert_echoes(&text);
        socket.assert_echoes("");
    }
    socket.send(FIN | CLOSE, &closing(1000, ""));
    assert_eq!(socket.closed().0, 1000);
}
