//! What a client of the web sees of a plugin that misbehaves, dies, is slow, or is not there.

use crate::support::http::{Client, Reply};
use crate::support::{Server, Site, command, is_alive, metadata, wait_for};
use serde_json::{Value, json};
use std::fs;
use std::io::{Read, Write};

/// A host with the fake plugin `p`, ready.
fn server_of_p(site: Site) -> Server {
    let server = site.fake("p").start();
    server.wait_state("p", "ready");
    server
}

fn pid(server: &Server) -> Value {
    server.plugin("p")["process"]["pid"].clone()
}

/// How many requests wait for the plugin.
fn waiting(server: &Server) -> u64 {
    server.plugin("p")["process"]["waiting"].as_u64().unwrap()
}

/// Makes a file in the plugin's directory, for which something there waits.
fn touch(server: &Server, name: &str) {
    fs::write(server.site().data().join("plugin-data/p").join(name), b"").unwrap();
}

/// How often the plugin has printed a line.
fn printed(server: &Server, text: &str) -> usize {
    fs::read_to_string(server.site().data().join("logs/p.log"))
        .unwrap_or_default()
        .lines()
        .filter(|line| line.ends_with(text))
        .count()
}

/// Sends a GET on a connection of its own, the answer to be read later.
fn ask(server: &Server, path: &str) -> Client {
    let mut client = server.client();
    client.send(format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n").as_bytes());
    client
}

#[track_caller]
fn assert_error(reply: &Reply, status: u16, code: &str) {
    assert_eq!((reply.status, reply.header("content-type")), (status, Some("application/json")), "{reply:?}");
    assert_eq!(reply.json()["error"]["code"], code);
    let retry: Option<u32> = reply.header("retry-after").map(|seconds| seconds.parse().unwrap());
    assert_eq!(retry.is_some_and(|seconds| seconds > 0), status == 503, "{reply:?}");
}

#[test]
fn a_malformed_answer_is_502_and_the_plugin_goes_on() {
    let server = server_of_p(Site::new());
    let before = pid(&server);
    for (path, reason) in [
        ("/status?code=199", "status 199"),
        ("/status?code=101", "status 101"),
        ("/status?code=600", "status 600"),
        ("/status?code=70000", "protocol error"),
        ("/status?code=204&body=x", "204"),
        ("/status?code=304&body=x", "304"),
        ("/header?name=a%20b&value=x", "header name \"a b\""),
        ("/header?name=a:b&value=x", "header name \"a:b\""),
        ("/header?name=a%0D%0Ab&value=x", "header name"),
        ("/header?name=x-split&value=a%0D%0Aset-cookie:%20b", "x-split"),
        ("/header?name=x-nul&value=a%00b", "x-nul"),
        ("/header?name=x-wide&value=%E2%82%AC", "x-wide"),
        ("/header?name=content-length&value=-1", "content-length"),
        ("/length?length=4", "content-length is 4"),
        ("/length?length=6", "content-length is 6"),
        ("/length?length=five", "five"),
        ("/wrong-id", "where the answer to request"),
        ("/garbage", "head"),
        ("/not-json", "not a valid message"),
        ("/huge-frame", "2097152"),
        ("/error", "teapot"),
    ] {
        for method in ["GET", "POST"] {
            let reply = server.request(method, &format!("/p{path}"), &[], b"");
            assert_eq!(reply.status, 502, "{method} {path}: {reply:?}");
            assert_error(&reply, 502, "bad_gateway");
            assert!(reply.header("set-cookie").is_none() && !reply.text().contains("teapot"), "{path}: {reply:?}");
        }
        let log = fs::read_to_string(server.site().data().join("logs/p.log")).unwrap();
        let last = log.lines().last().unwrap();
        assert!(last.contains(reason), "{path}: the log says {last:?}, not {reason:?}");
        assert_eq!(server.get("/p/x").text(), "GET /x of p", "after {path}");
    }
    assert_eq!(pid(&server), before);
}

/// Half an answer must not look like a whole one, nor may the next answer on the connection pass for its other half.
#[test]
fn an_answer_that_breaks_off_is_seen_to_be_broken() {
    for path in ["/break", "/break?length", "/download?bytes=300000&declared=300001", "/download?bytes=300000&declared=299999"] {
        let server = server_of_p(Site::new());
        let mut client = server.client();
        let close = "connection: close\r\n";
        client.send(
            format!("GET /p{path} HTTP/1.1\r\nhost: test\r\n\r\nGET /healthz HTTP/1.1\r\nhost: test\r\n{close}\r\n").as_bytes(),
        );
        let head = client.reply_head();
        assert_eq!(head.status, 200, "{path}");
        let rest = client.rest();
        match head.header("content-length") {
            Some(length) => assert!(rest.len() < length.parse().unwrap(), "{path}: {} bytes of {length} came", rest.len()),
            None => assert!(!String::from_utf8_lossy(&rest).contains("\r\n0\r\n"), "{path}: {}", rest.escape_ascii()),
        }
        let next = wait_for("the plugin to answer", || Some(server.get("/p/x")).filter(|reply| reply.status == 200));
        assert_eq!(next.text(), "GET /x of p");
    }
}

#[test]
fn a_request_that_may_have_had_an_effect_is_not_repeated() {
    let server = server_of_p(Site::new());
    let before = pid(&server);
    for (method, body) in [("POST", &b""[..]), ("POST", b"body"), ("PUT", b""), ("DELETE", b""), ("GET", b"body")] {
        let asked = printed(&server, "about to hang up");
        assert_error(&server.request(method, "/p/hang-up", &[], body), 502, "bad_gateway");
        server.request("GET", "/p/print?text=behind", &[], b"");
        wait_for("the line behind", || (printed(&server, "behind") > 0).then_some(()));
        assert_eq!(printed(&server, "about to hang up"), asked + 1, "{method}");
    }
    assert_eq!(pid(&server), before);
    assert_error(&server.request("POST", "/p/crash", &[], b""), 502, "bad_gateway");
    wait_for("another process", || (pid(&server) != before).then_some(()));
    assert_eq!(printed(&server, "about to crash"), 1);
}

#[test]
fn a_get_that_was_lost_is_tried_once_more() {
    let server = server_of_p(Site::new());
    assert_error(&server.get("/p/hang-up"), 502, "bad_gateway");
    wait_for("two attempts", || (printed(&server, "about to hang up") >= 2).then_some(()));
    assert_eq!(server.get("/p/hang-up?once").text(), "the second time");
    assert_eq!(printed(&server, "about to hang up"), 3);
}

#[test]
fn a_get_survives_the_plugins_crash() {
    let server = server_of_p(Site::new());
    let before = pid(&server).as_i64().unwrap();
    assert_eq!(server.get("/p/crash?once").text(), "the second time");
    assert!(!is_alive(before));
    assert_eq!(server.plugin("p")["process"]["restarts"], 1);
}

#[test]
fn a_request_without_an_answer_in_time_is_504_and_the_plugin_lives() {
    let mut settings = metadata("p");
    settings["concurrency"] = json!(1);
    let server = Site::new().args(&["--request-timeout", "1s"]).fake_with("p", &json!({"metadata": settings})).start();
    server.wait_state("p", "ready");
    let before = pid(&server);
    for method in ["GET", "POST"] {
        assert_error(&server.request(method, "/p/wait?file=never", &[], b""), 504, "timeout");
        server.wait_logged("p", &[&format!("no answer to {method} /wait in time")]);
        assert_eq!(server.get("/p/x").text(), "GET /x of p");
    }
    assert_error(&server.request("POST", "/p/wait?file=never", &[], &[7; 100_000]), 504, "timeout");
    assert_eq!(server.get("/p/x").text(), "GET /x of p");
    assert_eq!(pid(&server), before);
    assert_eq!(server.plugin("p")["process"]["restarts"], 0);
}

/// Those that wait behind a request that takes long have their own time.
#[test]
fn a_request_that_waits_too_long_for_its_turn_is_504() {
    let mut settings = metadata("p");
    settings["concurrency"] = json!(1);
    let server = Site::new().args(&["--request-timeout", "1s"]).fake_with("p", &json!({"metadata": settings})).start();
    server.wait_state("p", "ready");
    let mut events = ask(&server, "/p/events");
    let head = events.reply_head();
    assert_eq!(events.body_piece(&head).unwrap(), b"data: first\n\n");
    assert_error(&server.get("/p/x"), 504, "timeout");
    fs::write(server.site().data().join("plugin-data/p/next"), "end\n").unwrap();
    assert_eq!(events.body_piece(&head), None, "the stream itself is not disturbed");
    assert_eq!(server.get("/p/x").text(), "GET /x of p");
}

#[test]
fn a_full_queue_is_503_and_what_waits_in_it_is_answered() {
    let mut settings = metadata("p");
    settings["concurrency"] = json!(1);
    let server = Site::new().fake_with("p", &json!({"metadata": settings})).start();
    server.wait_state("p", "ready");
    let mut first = ask(&server, "/p/wait?file=go");
    wait_for("the plugin to be at work", || (server.site().data().join("plugin-data/p/waiting").exists()).then_some(()));
    let mut queued: Vec<Client> = (0..64).map(|number| ask(&server, &format!("/p/{number}"))).collect();
    wait_for("the queue to be full", || (waiting(&server) == 64).then_some(()));
    for _ in 0..5 {
        assert_error(&server.get("/p/x"), 503, "overloaded");
        assert_error(&server.request("POST", "/p/x", &[], &[7; 100_000]), 503, "overloaded");
    }
    assert_eq!(server.get("/healthz").status, 200, "the rest of the host is not concerned");
    touch(&server, "go");
    assert_eq!(first.reply(false).text(), "waited");
    for (number, client) in queued.iter_mut().enumerate() {
        assert_eq!(client.reply(false).text(), format!("GET /{number} of p"));
    }
    assert_eq!(server.get("/p/x").status, 200);
}

#[test]
fn a_request_for_a_starting_plugin_is_held_until_it_is_ready() {
    let server = Site::new().fake_mode("p", "wait-init").start();
    server.wait_state("p", "starting");
    let mut clients = [ask(&server, "/p/a"), ask(&server, "/p/b")];
    wait_for("the requests to be held", || (waiting(&server) == 2).then_some(()));
    assert_eq!(server.plugin("p")["state"], "starting");
    touch(&server, "go");
    let replies = clients.each_mut().map(|client| client.reply(false));
    assert_eq!(replies.each_ref().map(Reply::text), ["GET /a of p", "GET /b of p"]);
}

#[test]
fn a_request_for_a_plugin_that_does_not_become_ready_is_503() {
    let server = Site::new().fake_mode("p", "wait-init").start();
    server.wait_state("p", "starting");
    assert_error(&server.get("/p/x"), 503, "unavailable");
    assert_error(&server.request("POST", "/p/x", &[], &[7; 100_000]), 503, "unavailable");
    assert_eq!(server.plugin("p")["state"], "starting", "that does not concern the plugin");
    touch(&server, "go");
    server.wait_state("p", "ready");
    assert_eq!(server.get("/p/x").status, 200);
}

#[test]
fn a_plugin_that_does_not_run_is_503_and_not_404() {
    let server = server_of_p(Site::new());
    for (off, on) in [("stop", "start"), ("disable", "enable")] {
        server.cli(&[off, "p"]);
        for method in ["GET", "POST"] {
            assert_error(&server.request(method, "/p/x", &[], b""), 503, "unavailable");
        }
        assert_error(&server.request("POST", "/p/x", &[], &[7; 100_000]), 503, "unavailable");
        assert_error(&server.get("/px"), 404, "not_found");
        server.cli(&[on, "p"]);
        assert_eq!(server.get("/p/x").text(), "GET /x of p", "after {on}");
    }
}

/// tiny_http's accepting thread dies when it is out of files. Then another takes the port, or, when that fails three times in a
/// minute, the host ends for its supervisor to start it; never is there a host that runs and does not answer.
#[test]
fn a_host_that_was_out_of_files_answers_again_or_ends() {
    let site = Site::new().fake("p");
    let serve = site.serve();
    let mut limited = command("sh");
    limited.args(["-c", "ulimit -n 120; exec \"$0\" \"$@\""]).arg(serve.get_program()).args(serve.get_args());
    let server = site.start_as(limited);
    server.wait_state("p", "ready");
    let crowd: Vec<_> = (0..60).map(|_| std::net::TcpStream::connect(server.address).unwrap()).collect();
    wait_for("the host to be out of files", || {
        let files = std::fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap().count();
        (files > 115 || server.log().contains("Too many open files")).then_some(())
    });
    drop(crowd);
    let answers = || {
        let mut stream = std::net::TcpStream::connect(server.address).ok()?;
        stream.set_read_timeout(Some(std::time::Duration::from_secs(2))).ok()?;
        stream.write_all(b"GET /p/x HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        answer.starts_with("HTTP/1.1 200 ").then_some(true)
    };
    let answered = wait_for("an answer, or the end", || answers().or_else(|| (!is_alive(server.pid().into())).then_some(false)));
    if !answered {
        assert_eq!(server.ended().0.code(), Some(1));
    }
}
