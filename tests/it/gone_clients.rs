//! Clients that go, or end their sending, before they have their answers.

use crate::support::http::Client;
use crate::support::{Server, Site, pause, wait_for, wait_within};
use serde_json::{Value, json};
use std::fs;
use std::time::Duration;

/// Time in which the host is to notice that a client has gone, beside other work on the machine.
const NOTICED: Duration = Duration::from_secs(20);

/// Far longer than anything here lasts.
const LONG: [&str; 2] = ["--request-timeout", "10m"];

fn server_of_one_connection() -> Server {
    let server = Site::new().args(&LONG).fake_of_one_connection("p").start();
    server.wait_state("p", "ready");
    server
}

fn ask(server: &Server, path: &str) -> Client {
    let mut client = server.client();
    client.send(format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n").as_bytes());
    client
}

fn lines(server: &Server, file: &str) -> Vec<String> {
    let text = fs::read_to_string(server.site().data().join("plugin-data/p").join(file)).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

fn process(server: &Server, field: &str) -> Value {
    server.plugin("p")["process"][field].clone()
}

/// Waits until the plugin handles a request that waits for a file.
fn wait_at_work(server: &Server) {
    let waiting = server.site().data().join("plugin-data/p/waiting");
    wait_for("the plugin to be at work", || fs::remove_file(&waiting).is_ok().then_some(()));
}

#[test]
fn a_request_whose_client_has_closed_is_dropped_from_the_queue_and_the_plugin_never_sees_it() {
    let server = server_of_one_connection();
    let first = ask(&server, "/p/wait?file=go");
    wait_at_work(&server);
    let gone: Vec<Client> = (0..20).map(|number| ask(&server, &format!("/p/next?line=gone-{number}"))).collect();
    let mut honest = ask(&server, "/p/next?line=honest");
    wait_for("all to wait", || (process(&server, "waiting") == 21).then_some(()));
    drop(gone);
    wait_for("the cancelled to be counted", || (process(&server, "requests")["cancelled"] == 20).then_some(()));
    fs::write(server.site().data().join("plugin-data/p/go"), "").unwrap();
    assert_eq!(honest.reply(false).status, 200);
    assert_eq!(lines(&server, "next"), ["honest"]);
    drop(first);
}

#[test]
fn clients_that_have_gone_leave_their_places_in_a_full_queue_to_others() {
    let args = ["--max-connections-per-address", "200", "--max-connections-per-plugin", "100%"];
    let server = Site::new().args(&LONG).args(&args).fake_of_one_connection("p").start();
    server.wait_state("p", "ready");
    let _first = ask(&server, "/p/wait?file=go");
    wait_at_work(&server);
    let gone: Vec<Client> = (0..64).map(|number| ask(&server, &format!("/p/{number}"))).collect();
    wait_for("the queue to be full", || (process(&server, "waiting") == 64).then_some(()));
    assert_eq!(server.get("/p/x").status, 503);
    drop(gone);
    wait_for("the cancelled to be counted", || (process(&server, "requests")["cancelled"] == 64).then_some(()));
    let mut honest = ask(&server, "/p/x");
    fs::write(server.site().data().join("plugin-data/p/go"), "").unwrap();
    assert_eq!(honest.reply(false).text(), "GET /x of p");
}

#[test]
fn a_request_under_way_whose_client_has_closed_gives_its_connection_back_at_once() {
    for ends in [Client::reset as fn(Client), drop] {
        let server = server_of_one_connection();
        for _ in 0..2 {
            let client = ask(&server, "/p/wait?file=never");
            wait_at_work(&server);
            ends(client);
            assert_eq!(server.get("/p/x").text(), "GET /x of p");
        }
        assert_eq!((process(&server, "restarts"), process(&server, "failed")), (json!(0), json!(0)));
        assert_eq!(process(&server, "requests")["cancelled"], 2);
    }
}

#[test]
fn a_silent_stream_ends_when_its_listener_closes_and_holds_no_place() {
    let server = server_of_one_connection();
    for _ in 0..3 {
        let mut events = server.client();
        let head = events.begin_events();
        assert_eq!(head.status, 200);
        drop(events);
        // The stream is as quiet as before.
        assert_eq!(server.get("/p/x").text(), "GET /x of p");
    }
    assert_eq!((process(&server, "restarts"), process(&server, "failed")), (json!(0), json!(0)));
}

#[test]
fn an_upload_whose_client_has_closed_gives_the_connection_back() {
    let server = Site::new().args(&LONG).args(&["--body-buffer", "0"]).fake_of_one_connection("p").start();
    server.wait_state("p", "ready");
    for _ in 0..2 {
        let mut client = server.client();
        client.send(b"POST /p/upload HTTP/1.1\r\nhost: test\r\ncontent-length: 100000\r\n\r\nbegin");
        wait_for("the plugin to have it", || (process(&server, "waiting") == 0).then_some(()));
        drop(client);
        assert_eq!(server.get("/p/x").text(), "GET /x of p");
    }
}

/// Of a client that has said that this is its last request, the end of its sending is no news.
#[test]
fn who_has_said_that_a_request_is_the_last_may_end_its_sending() {
    let server = server_of_one_connection();
    for request in [
        "GET /p/sleep?s=0.3 HTTP/1.0\r\n\r\n",
        "GET /p/sleep?s=0.3 HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n",
        "POST /p/sleep?s=0.3 HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-length: 5\r\n\r\nhello",
    ] {
        let mut client = server.client();
        client.send(request.as_bytes());
        client.end_sending();
        let reply = client.reply(false);
        assert_eq!((reply.text(), reply.header("connection")), ("slept", Some("close")), "{request}");
        assert!(client.is_closed());
    }
    assert_eq!(process(&server, "requests")["cancelled"], 0);
}

#[test]
fn for_all_others_the_end_of_sending_is_the_end() {
    let server = server_of_one_connection();
    for request in [
        "GET /p/wait?file=never HTTP/1.1\r\nhost: test\r\n\r\n",
        "GET /p/wait?file=never HTTP/1.0\r\nconnection: keep-alive\r\n\r\n",
    ] {
        let mut client = server.client();
        client.send(request.as_bytes());
        wait_at_work(&server);
        client.end_sending();
        assert_eq!(client.rest(), b"", "{request}");
        assert_eq!(server.get("/p/x").text(), "GET /x of p");
    }
}

/// A proxy speaks HTTP/1.0 as a rule, and never ends its sending alone.
#[test]
fn of_a_proxy_the_end_of_sending_is_the_end_whatever_it_has_said() {
    let site = Site::new().args(&LONG).args(&["--trust-proxy", "127.0.0.2"]).fake_of_one_connection("p");
    let server = site.start();
    server.wait_state("p", "ready");
    let mut proxy = Client::connect_from([127, 0, 0, 2], server.address());
    proxy.send(b"GET /p/events HTTP/1.0\r\nconnection: close\r\n\r\n");
    assert_eq!(proxy.reply_head().status, 200);
    drop(proxy);
    wait_within(NOTICED, "the stream to end", || (server.get("/p/x").status == 200).then_some(()));
}

#[test]
fn a_client_that_only_pauses_is_not_taken_for_gone() {
    let server = server_of_one_connection();
    let mut events = server.client();
    let head = events.begin_events();
    pause(Duration::from_secs(2));
    fs::write(server.site().data().join("plugin-data/p/next"), "one\nend\n").unwrap();
    assert_eq!(events.body_piece(&head).unwrap(), b"data: one\n\n");
    assert_eq!(events.body_piece(&head), None);
    assert_eq!(process(&server, "requests")["cancelled"], 0);
}

/// What can be told by the head alone is told before the client sends its body.
#[test]
fn a_client_that_expects_100_continue_is_asked_for_its_body_only_where_that_is_wanted() {
    let server = Site::new().fake("p").fake("q").start();
    server.wait_state("p", "ready");
    server.cli(&["stop", "q"]);
    let token = fs::read_to_string(server.site().data().join("admin-token")).unwrap();
    let authorization = format!("authorization: Bearer {}\r\n", token.trim());
    let begin = |path: &str, headers: &str| {
        let mut client = server.client();
        let request = format!("POST {path} HTTP/1.1\r\nhost: test\r\n{headers}expect: 100-continue\r\ncontent-length: 5\r\n\r\n");
        client.send(request.as_bytes());
        client
    };
    for (path, headers, status) in [
        ("/nothing", "", 404),
        ("/", "", 404),
        ("/api/rescan", "", 401),
        ("/api/nothing", authorization.as_str(), 404),
        ("/api/instance", &authorization, 405),
        ("/q/echo", "", 503),
    ] {
        let mut client = begin(path, headers);
        let reply = client.reply(false);
        assert_eq!((reply.status, reply.header("connection")), (status, Some("close")), "{path}: {reply:?}");
        assert!(client.is_closed(), "{path}");
    }
    let mut wanted = begin("/p/echo", "");
    assert_eq!(wanted.bytes(25), b"HTTP/1.1 100 Continue\r\n\r\n");
    wanted.send(b"hello");
    assert_eq!(wanted.reply(false).text(), "hello");
}
