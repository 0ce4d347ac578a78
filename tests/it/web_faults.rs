//! What a client of the web sees of a plugin that misbehaves, dies, is slow, or is not there.

use crate::support::http::{Client, Reply};
use crate::support::{CROWD, Server, Site, command, hello, is_alive, metadata, pause, script, wait_for, write_file};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::collections::hash_map::RandomState;
use std::fs;
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

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
    // A plugin is starting a moment before its directory is made.
    let path = server.site().data().join("plugin-data/p").join(name);
    wait_for("the plugin's directory", || fs::write(&path, b"").ok());
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
        ("/status?code=70000", "protocol error: response.status must be an integer from 200 to 599, got 70000"),
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
        ("/wrong-id", "where the response with id"),
        ("/garbage", "the text \"HTTP/1.1 200 OK\\r\\n\\r\\n\" stands where it is due"),
        ("/not-json", "the head is not JSON at byte 2 of 6: it begins with \"{nope}\""),
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
    // The request of a body beyond what is collected goes over a connection of its own inside, and so does the answer.
    let (collected, passed_on) = (1000, 100_000);
    for (path, body) in [
        ("/break", 0),
        ("/break?length", 0),
        ("/download?bytes=300000&declared=300001", 0),
        ("/download?bytes=300000&declared=299999", 0),
        ("/large?last=1", 0),
        ("/large?last=3", 0),
        ("/large?last=600000", 0),
        ("/large?last=3", collected),
        ("/large?last=3", passed_on),
        ("/break", passed_on),
    ] {
        let server = server_of_p(Site::new().args(&["--body-buffer", "64KiB"]));
        let mut client = server.client();
        let (close, body) = ("connection: close\r\n", "x".repeat(body));
        client.send(
            format!(
                "GET /p{path} HTTP/1.1\r\nhost: test\r\ncontent-length: {}\r\n\r\n{body}\
                 GET /healthz HTTP/1.1\r\nhost: test\r\n{close}\r\n",
                body.len()
            )
            .as_bytes(),
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
    let requests = [("POST", &b""[..]), ("POST", b"body"), ("PUT", b""), ("DELETE", b""), ("GET", b"body")];
    for (number, (method, body)) in requests.into_iter().enumerate() {
        let asked = printed(&server, "about to hang up");
        assert_error(&server.request(method, "/p/hang-up", &[], body), 502, "bad_gateway");
        server.request("GET", "/p/print?text=behind", &[], b"");
        wait_for("the line behind", || (printed(&server, "behind") > number).then_some(()));
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
    for (attempts, method) in [(2, "GET"), (4, "HEAD")] {
        assert_eq!(server.request(method, "/p/hang-up", &[], b"").status, 502);
        wait_for("two attempts", || (printed(&server, "about to hang up") >= attempts).then_some(()));
    }
    assert_eq!(server.get("/p/hang-up?once").text(), "the second time");
    assert_eq!(printed(&server, "about to hang up"), 5);
}

/// A quick plugin is sent requests ahead, and one of them may be slow all the same.
#[test]
fn what_was_sent_behind_a_slow_request_is_answered_without_it() {
    let server = server_of_p(Site::new());
    let mut clients: Vec<_> = (0..30).map(|_| server.client()).collect();
    for round in 0..5 {
        clients.iter_mut().for_each(|client| assert_eq!(client.get("/p/x").status, 200));
        let mut slow = ask(&server, &format!("/p/wait?file=go-{round}"));
        clients.iter_mut().for_each(|client| client.send(b"GET /p/x HTTP/1.1\r\nhost: test\r\n\r\n"));
        clients.iter_mut().for_each(|client| assert_eq!(client.reply(false).text(), "GET /x of p"));
        touch(&server, &format!("go-{round}"));
        assert_eq!(slow.reply(false).text(), "waited");
    }
}

#[test]
fn a_get_that_the_plugin_died_of_is_not_given_to_its_next_process() {
    let server = server_of_p(Site::new());
    let before = pid(&server).as_i64().unwrap();
    assert_error(&server.get("/p/crash"), 502, "bad_gateway");
    assert_eq!(server.get("/p/x").text(), "GET /x of p", "it is held until the plugin is back");
    assert!(!is_alive(before));
    assert_eq!(server.plugin("p")["process"]["restarts"], 1);
    assert_eq!(printed(&server, "about to crash"), 1);
}

#[test]
fn a_request_without_an_answer_in_time_is_504_and_the_plugin_lives() {
    let server = Site::new().args(&["--request-timeout", "3s"]).fake_of_one_connection("p").start();
    server.wait_state("p", "ready");
    let before = pid(&server);
    for method in ["GET", "POST"] {
        assert_error(&server.request(method, "/p/wait?file=never", &[], b""), 504, "timeout");
        let line = format!("plugrack: {method} /p/wait (request ");
        server.wait_logged("p", &[&line, "): 3 s passed before its answer began"]);
        assert_eq!(server.get("/p/x").text(), "GET /x of p");
    }
    assert_error(&server.request("POST", "/p/wait?file=never", &[], &[7; 100_000]), 504, "timeout");
    assert_error(&server.get("/p/drip"), 504, "timeout");
    assert_eq!(server.get("/p/x").text(), "GET /x of p");
    assert_eq!(pid(&server), before);
    assert_eq!(server.plugin("p")["process"]["restarts"], 0);
}

/// Those that wait behind a request that takes long have their own time.
#[test]
fn a_request_that_waits_too_long_for_its_turn_is_504() {
    let server = Site::new().args(&["--request-timeout", "3s", "--body-buffer", "0"]).fake_of_one_connection("p").start();
    server.wait_state("p", "ready");
    let mut slow = server.client();
    slow.send(b"POST /p/upload HTTP/1.1\r\nhost: test\r\ncontent-length: 70000\r\n\r\nbegin");
    wait_for("the plugin to be at work", || (server.plugin("p")["process"]["waiting"] == 0).then_some(()));
    assert_error(&server.get("/p/x"), 504, "timeout");
    server.wait_logged("p", &["plugrack: GET /p/x (request ", "): it waited 3 s for its turn on 1 connections of at most 1"]);
    slow.send(&[7; 69_995]);
    assert!(slow.reply(false).text().starts_with("70000 "), "the upload itself is not disturbed");
    assert_eq!(server.get("/p/x").text(), "GET /x of p");
}

#[test]
fn where_streams_take_every_connection_a_request_is_503_soon_and_the_reason_is_told() {
    let server = Site::new().fake_of_one_connection("p").start();
    server.wait_state("p", "ready");
    let mut events = ask(&server, "/p/events");
    let head = events.reply_head();
    assert_eq!(events.body_piece(&head).unwrap(), b"data: first\n\n");
    let refused = server.get("/p/x");
    assert_error(&refused, 503, "overloaded");
    assert_eq!(refused.json()["error"]["message"], "all of the plugin's connections are taken by streams");
    let reason = "1 of 1 connections busy, 1 by streams: raise concurrency";
    server.wait_logged("p", &["plugrack: GET /p/x (request ", reason]);
    assert!(server.log().contains(reason), "{}", server.log());
    assert_eq!(server.plugin("p")["process"]["congestion"], reason);
    assert!(server.cli(&["show", "p"]).contains(reason));
    fs::write(server.site().data().join("plugin-data/p/next"), "end\n").unwrap();
    assert_eq!(events.body_piece(&head), None, "the stream itself is not disturbed");
    assert_eq!(server.get("/p/x").text(), "GET /x of p");
    assert_eq!(server.plugin("p")["process"]["congestion"], Value::Null);
}

#[test]
fn a_full_queue_is_503_and_what_waits_in_it_is_answered() {
    let server = Site::new().args(&CROWD).fake_of_one_connection("p").start();
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

/// Kills the plugin, and has another process of it at once.
fn kill_and_start(server: &Server) {
    let before = pid(server).as_i64().unwrap();
    assert!(command("kill").args(["-s", "KILL", &before.to_string()]).status().unwrap().success());
    wait_for("another process", || {
        server.api("POST", "/plugins/p/start", b"");
        let now = server.plugin("p");
        (now["state"] == "ready" && now["process"]["pid"] != before).then_some(())
    });
}

/// What was sent to the process that died is not sent to another; what was not goes to the next.
#[test]
fn requests_behind_a_slow_one_go_to_the_next_process() {
    let server = Site::new().fake_of_one_connection("p").start();
    server.wait_state("p", "ready");
    for method in ["GET", "POST"] {
        let waits = server.site().data().join("plugin-data/p/waiting");
        let mut slow = server.client();
        slow.send(format!("{method} /p/wait?file=never-{method} HTTP/1.1\r\nhost: test\r\n\r\n").as_bytes());
        wait_for("the plugin to be at work", || waits.exists().then_some(()));
        let mut queued: Vec<_> = (0..30).map(|number| (["GET", "HEAD", "POST"][number % 3], number, server.client())).collect();
        for (method, number, client) in &mut queued {
            let body = if *number % 2 == 0 { "content-length: 4\r\n\r\nbody" } else { "\r\n" };
            let body = if *method == "POST" { body } else { "\r\n" };
            client.send(format!("{method} /p/{number} HTTP/1.1\r\nhost: test\r\n{body}").as_bytes());
        }
        wait_for("the others to wait", || (waiting(&server) == 30).then_some(()));
        kill_and_start(&server);
        let reply = slow.reply(false);
        assert_eq!(reply.status, 502, "{method}: {reply:?}");
        for (method, number, client) in &mut queued {
            let reply = client.reply(*method == "HEAD");
            let text = if *method == "HEAD" { String::new() } else { format!("{method} /{number} of p") };
            assert_eq!((reply.status, reply.text()), (200, text.as_str()), "{method} {number}");
        }
        fs::remove_file(waits).unwrap();
    }
}

/// A connection the plugin has ended is no place for what may be sent once only.
#[test]
fn a_post_is_not_sent_on_a_connection_that_is_known_to_be_over() {
    let server = Site::new().fake_of_one_connection("p").start();
    for (round, body) in [&b""[..], b"body", &[7; 100_000]].into_iter().enumerate() {
        assert_eq!(server.get("/p/hang-up-later").status, 200);
        touch(&server, "hang-up");
        wait_for("the end of the connection", || (printed(&server, "hung up") > round).then_some(()));
        let reply = server.request("POST", "/p/x", &[], body);
        assert_eq!((reply.status, reply.text()), (200, "POST /x of p"), "{} bytes", body.len());
    }
}

/// Asks until `done`, one request after the other that may be sent once only: which statuses were answered.
fn ask_until(server: &Server, done: &AtomicBool) -> BTreeSet<u16> {
    let mut statuses = BTreeSet::new();
    let mut client = server.client();
    while !done.load(Ordering::Relaxed) {
        let reply = client.request("POST", "/p/x", &[], b"");
        if reply.status == 503 {
            assert_error(&reply, 503, "unavailable");
        }
        statuses.insert(reply.status);
    }
    statuses
}

/// Does something to the host while clients ask the plugin: which statuses they got.
fn among_clients(server: &Server, doing: impl FnOnce()) -> BTreeSet<u16> {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..16).map(|_| scope.spawn(|| ask_until(server, &done))).collect();
        // Also when this panics.
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(doing));
        done.store(true, Ordering::Relaxed);
        let statuses = clients.into_iter().flat_map(|client| client.join().unwrap()).collect();
        result.unwrap();
        statuses
    })
}

#[test]
fn a_restart_fails_no_request() {
    for concurrency in [1, 4] {
        let mut settings = metadata("p");
        settings["concurrency"] = json!(concurrency);
        let server = Site::new().file("p", quick_starter(&settings).as_bytes(), 0o755).start();
        server.wait_state("p", "ready");
        let statuses = among_clients(&server, || {
            for _ in 0..3 {
                assert_eq!(server.api("POST", "/plugins/p/restart", b"").1["state"], "ready");
                assert_eq!(server.get("/p/x").status, 200, "it comes behind those that were held");
            }
        });
        assert_eq!(statuses, BTreeSet::from([405]), "all from the plugin, with {concurrency} connections");
        let events = server.plugin("p")["events"].to_string();
        assert!(!events.contains("signal"), "it ended as it was told: {events}");
    }
}

#[test]
fn a_plugin_whose_file_is_replaced_fails_no_request() {
    let server = Site::new().file("p", quick_starter(&metadata("p")).as_bytes(), 0o755).start();
    server.wait_state("p", "ready");
    let statuses = among_clients(&server, || {
        for version in ["2.0.0", "3.0.0"] {
            let mut settings = metadata("p");
            settings["version"] = json!(version);
            write_file(&server.site().plugins().join("p"), quick_starter(&settings).as_bytes(), 0o755);
            assert_eq!(server.api("POST", "/rescan", b"").1["changed"], json!(["p"]));
            assert_eq!(server.wait_state("p", "ready")["version"], version);
        }
    });
    assert_eq!(statuses, BTreeSet::from([405]), "all from the plugin");
    assert_eq!(server.get("/p/x").status, 200);
}

/// A plugin that starts in a moment: requests are held for two seconds and no longer. It answers POST with 405.
fn quick_starter(settings: &Value) -> String {
    script(settings, &format!("exec {}", hello().display()))
}

#[test]
fn a_plugin_that_backs_off_loops_or_is_refused_is_503_and_shown_as_it_is() {
    let server = Site::new().fake_mode("p", "exit-1").fake_mode("q", "refuse").start();
    server.wait_state("q", "refused");
    let mut states = BTreeSet::new();
    wait_for("the crash loop", || {
        let state = server.plugin("p")["state"].as_str().unwrap().to_owned();
        for (method, path) in [("GET", "/p/x"), ("POST", "/p"), ("HEAD", "/p/x/y"), ("GET", "/q"), ("POST", "/q/x")] {
            let reply = server.request(method, path, &[], b"");
            assert_eq!((reply.status, reply.header("retry-after").is_some()), (503, true), "{state}: {method} {path}: {reply:?}");
        }
        states.insert(state.clone());
        (state == "crash_looping").then_some(())
    });
    assert!(states.contains("backing_off"), "{states:?}");
    assert_error(&server.get("/p/x"), 503, "unavailable");
    for (id, state, words) in [("p", "crash_looping", "crash looping"), ("q", "refused", "refused")] {
        assert_eq!(server.plugin(id)["state"], state);
        let list = server.cli(&["list"]);
        assert!(list.lines().any(|line| line.starts_with(id) && line.contains(state)), "{list}");
        for accept in ["text/html", "text/plain"] {
            let page = server.request("GET", "/", &[("accept", accept)], b"");
            assert!(page.text().contains(words), "{accept}: {}", page.text());
        }
    }
}

/// A connection of each kind is asked while the process is killed again and again: each request is answered whole, and has its
/// effect once at most when it may not be repeated, twice at most when it may.
#[test]
fn whenever_a_plugin_is_killed_every_request_is_answered_and_none_has_too_much_effect() {
    let server = server_of_p(Site::new());
    let rest = |server: &Server| {
        kill_and_start(server);
        assert_eq!(server.get("/p/incr?key=warm").status, 200);
    };
    rest(&server);
    let before = wait_for("the gate to have its connections inside", || {
        let held = server.held();
        pause(Duration::from_millis(300));
        (server.held() == held).then_some(held)
    });
    let done = AtomicBool::new(false);
    let asked: Vec<(&str, String, u16)> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..6)
            .map(|client| {
                let (server, done) = (&server, &done);
                scope.spawn(move || {
                    let mut connection = server.client();
                    let mut asked = Vec::new();
                    for (number, method) in ["GET", "POST", "HEAD", "POST"].iter().cycle().enumerate() {
                        let key = format!("{client}-{number}");
                        let body = if number % 4 == 1 { &b"body"[..] } else { b"" };
                        let reply = connection.request(method, &format!("/p/incr?key={key}"), &[], body);
                        assert!([200, 502, 503].contains(&reply.status), "{method}: {reply:?}");
                        if reply.status != 200 && *method != "HEAD" {
                            reply.json();
                        }
                        asked.push((*method, key, reply.status));
                        if done.load(Ordering::Relaxed) {
                            return asked;
                        }
                    }
                    asked
                })
            })
            .collect();
        for _ in 0..12 {
            // A moment of the plugin's life, another each time.
            pause(Duration::from_millis(RandomState::new().hash_one(0) % 150));
            kill_and_start(&server);
        }
        done.store(true, Ordering::Relaxed);
        clients.into_iter().flat_map(|client| client.join().unwrap()).collect()
    });
    for (method, key, status) in &asked {
        let effects: u32 = server.get(&format!("/p/incr?key={key}&delta=0")).text().parse().unwrap();
        let allowed = if *method == "POST" { 0..=1 } else { 0..=2 };
        assert!(allowed.contains(&effects) && (*status != 200 || effects > 0), "{method} {key}: {status}, {effects} times");
    }
    let answered = asked.iter().filter(|(_, _, status)| *status == 200).count();
    assert!(answered > 12, "{answered} of {}", asked.len());
    rest(&server);
    wait_for("all that was opened to be closed", || {
        let now = server.held();
        (now[0] <= before[0] && now[1] <= before[1]).then_some(())
    });
}

/// As many clients come as would take all files, were they let in.
#[test]
fn a_host_with_few_files_turns_clients_away_and_answers_again_when_they_have_gone() {
    let site = Site::new().args(&["--max-connections-per-plugin", "100%"]).fake("p");
    let serve = site.serve();
    let mut limited = command("sh");
    limited.args(["-c", "ulimit -n 120; exec \"$0\" \"$@\""]).arg(serve.get_program()).args(serve.get_args());
    let server = site.start_as(limited);
    server.wait_state("p", "ready");
    // One that asks nothing would not be kept for long.
    let mut crowd: Vec<_> = (0..60).map(|_| ask(&server, "/p/wait?file=go")).collect();
    let turned_away = crowd.iter_mut().skip(20).map(|client| client.reply(false)).collect::<Vec<_>>();
    for reply in turned_away {
        assert_error(&reply, 503, "overloaded");
        assert_eq!(reply.header("retry-after"), Some("1"));
    }
    assert_eq!(server.log().matches("connections are taken, and another was refused").count(), 1, "it is said once");
    touch(&server, "go");
    drop(crowd);
    wait_for("an answer", || (server.get("/p/x").status == 200).then_some(()));
    assert!(!server.log().contains("Too many open files"), "{}", server.log());
}
