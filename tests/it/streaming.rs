//! Bodies that are long, slow, or not wanted to their end.

use crate::support::http::{Client, Reply, chunk};
use crate::support::{Server, Site, blocks, command, is_alive, wait_for};
use std::fs;
use std::io::Write;
use std::process::Stdio;

const MIB: u64 = 1 << 20;

fn server_of_p(arguments: &[&str]) -> Server {
    let server = Site::new().args(arguments).fake("p").start();
    server.wait_state("p", "ready");
    server
}

/// A host that passes bodies on as they come, once 64 KiB of them are there.
const AS_THEY_COME: [&str; 2] = ["--body-buffer", "64KiB"];

/// The same with a plugin of one connection, so that a request that hangs there holds up all others.
fn server_of_one_connection() -> Server {
    let server = Site::new().args(&AS_THEY_COME).fake_of_one_connection("p").start();
    server.wait_state("p", "ready");
    server
}

fn pid(server: &Server) -> i64 {
    server.plugin("p")["process"]["pid"].as_i64().unwrap()
}

/// Begins a request with a body.
fn begin(client: &mut Client, path: &str, framing: &str) {
    client.send(format!("POST {path} HTTP/1.1\r\nhost: test\r\n{framing}\r\n\r\n").as_bytes());
}

/// Sends data as far as the server takes it.
fn offer(client: &mut Client, blocks: impl Iterator<Item = Vec<u8>>) {
    for block in blocks {
        if !client.try_send(&block) {
            return;
        }
    }
}

/// Appends a line to what the plugin's `/events` sends.
fn tell(server: &Server, line: &str) {
    let path = server.site().data().join("plugin-data/p/next");
    let mut file = fs::File::options().create(true).append(true).open(path).unwrap();
    file.write_all(format!("{line}\n").as_bytes()).unwrap();
}

/// Opens an event stream and reads its first event.
#[track_caller]
fn listen(server: &Server) -> (Client, Reply) {
    let mut client = server.client();
    client.send(b"GET /p/events HTTP/1.1\r\nhost: test\r\naccept: text/event-stream\r\n\r\n");
    let head = client.reply_head();
    assert_eq!((head.status, head.header("content-type")), (200, Some("text/event-stream")));
    assert_eq!(client.body_piece(&head).unwrap(), b"data: first\n\n");
    (client, head)
}

#[test]
fn two_hundred_mebibytes_go_up_whole_in_little_memory() {
    let server = server_of_p(&["--max-body", "1GiB"]);
    let mut sha256sum = command("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut hashed = sha256sum.stdin.take().unwrap();
    let mut client = server.client();
    begin(&mut client, "/p/upload", &format!("content-length: {}", 200 * MIB));
    for block in blocks(200 * MIB) {
        hashed.write_all(&block).unwrap();
        client.send(&block);
    }
    drop(hashed);
    let reply = client.reply(false);
    let sum = String::from_utf8(sha256sum.wait_with_output().unwrap().stdout).unwrap();
    assert_eq!(reply.text(), format!("{} {}", 200 * MIB, &sum[..64]));
    assert!(server.memory("VmHWM") < 40 * MIB, "the host took {} bytes", server.memory("VmHWM"));
}

#[test]
fn two_hundred_mebibytes_come_down_whole_in_little_memory() {
    let server = server_of_p(&[]);
    let mut client = server.client();
    client.send(format!("GET /p/download?bytes={} HTTP/1.1\r\nhost: test\r\n\r\n", 200 * MIB).as_bytes());
    let head = client.reply_head();
    // A client that takes its time holds up nobody, and its answer is not gathered meanwhile.
    for _ in 0..20 {
        assert_eq!(server.get("/p/x").text(), "GET /x of p");
    }
    let mut expected = blocks(200 * MIB);
    let mut ahead = Vec::new();
    while let Some(piece) = client.body_piece(&head) {
        while ahead.len() < piece.len() {
            ahead.extend(expected.next().expect("no more than was asked for"));
        }
        assert!(ahead[..piece.len()] == piece, "other bytes came");
        ahead.drain(..piece.len());
    }
    assert!(ahead.is_empty() && expected.next().is_none(), "not all has come");
    assert!(server.memory("VmHWM") < 40 * MIB, "the host took {} bytes", server.memory("VmHWM"));
}

#[test]
fn an_upload_in_chunks_comes_whole() {
    let server = server_of_p(&[]);
    let mut client = server.client();
    let by_length = {
        begin(&mut client, "/p/upload", &format!("content-length: {}", 5 * MIB));
        blocks(5 * MIB).for_each(|block| client.send(&block));
        client.reply(false)
    };
    begin(&mut client, "/p/upload", "transfer-encoding: chunked");
    for block in blocks(5 * MIB) {
        let (a, b) = block.split_at(100_001);
        client.send(&[chunk(&a[..1]), chunk(&a[1..]), chunk(b)].concat());
    }
    client.send(&chunk(b""));
    let in_chunks = client.reply(false);
    assert!(in_chunks.text().starts_with(&format!("{} ", 5 * MIB)), "{in_chunks:?}");
    assert_eq!(in_chunks.text(), by_length.text());
}

#[test]
fn events_arrive_one_by_one_beside_other_requests() {
    let server = server_of_p(&[]);
    let mut listeners = [listen(&server), listen(&server)];
    for line in ["one", "two", "three"] {
        tell(&server, line);
        for (client, head) in &mut listeners {
            assert_eq!(client.body_piece(head).unwrap(), format!("data: {line}\n\n").as_bytes());
        }
        assert_eq!(server.get("/p/x").text(), "GET /x of p", "the plugin has connections left");
        assert_eq!(server.request("POST", "/p/echo", &[], b"body").text(), "body");
    }
    tell(&server, "end");
    for (client, head) in &mut listeners {
        assert_eq!(client.body_piece(head), None);
        assert_eq!(client.get("/p/x").text(), "GET /x of p", "its connection goes on");
    }
}

#[test]
fn a_listener_that_has_gone_gives_its_place_to_others() {
    let server = server_of_one_connection();
    let before = pid(&server);
    for _ in 0..2 {
        drop(listen(&server));
        let mut next = server.client();
        let asking = std::thread::Builder::new().spawn(move || next.get("/p/x")).unwrap();
        // That nobody listens is seen when something is sent.
        wait_for("the plugin to be free", || {
            tell(&server, "more");
            asking.is_finished().then_some(())
        });
        assert_eq!(asking.join().unwrap().text(), "GET /x of p");
    }
    assert_eq!(pid(&server), before);
}

#[test]
fn an_answer_before_the_end_of_the_body_reaches_the_client() {
    let server = server_of_one_connection();
    let before = pid(&server);
    for _ in 0..3 {
        let mut client = server.client();
        begin(&mut client, "/p/early", &format!("content-length: {}", 5 * MIB));
        // Not all of it need be taken, but the answer has to come.
        offer(&mut client, blocks(5 * MIB));
        let reply = client.reply(false);
        assert_eq!((reply.status, reply.text()), (413, "enough"));
        assert_eq!(server.get("/p/x").text(), "GET /x of p");
    }
    assert_eq!(server.plugin("p")["process"]["connections"], 1);
    assert_eq!(pid(&server), before);
}

/// As with a client that looks for the answer before it sends the rest. The host gives up on one that sends nothing after minutes, which
/// is not what is meant, and is later than the client gives up.
#[test]
fn an_early_answer_does_not_wait_for_the_rest_of_the_body() {
    let site = Site::new().args(&AS_THEY_COME).args(&["--body-timeout", "5m"]).fake_of_one_connection("p");
    let server = site.start();
    server.wait_state("p", "ready");
    let mut client = server.client();
    begin(&mut client, "/p/early", &format!("content-length: {}", 5 * MIB));
    offer(&mut client, blocks(MIB));
    let reply = client.reply(false);
    assert_eq!((reply.status, reply.text()), (413, "enough"));
    assert_eq!(server.get("/p/x").text(), "GET /x of p", "nor does anybody else");
}

#[test]
fn a_client_that_goes_away_while_it_sends_does_the_plugin_no_harm() {
    let server = server_of_one_connection();
    let before = pid(&server);
    for (framing, sent) in
        [("content-length: 5000000", 1), ("content-length: 5000000", 1 << 20), ("transfer-encoding: chunked", 1 << 20)]
    {
        let mut client = server.client();
        begin(&mut client, "/p/upload", framing);
        let data = vec![7; sent];
        client.send(&if framing.contains("chunked") { chunk(&data) } else { data });
        drop(client);
        assert_eq!(server.get("/p/x").text(), "GET /x of p", "{framing}, after {sent} bytes");
    }
    assert_eq!(pid(&server), before);
}

#[test]
fn a_client_that_goes_away_while_it_receives_does_the_plugin_no_harm() {
    let server = server_of_one_connection();
    let before = pid(&server);
    for declared in ["", "&declared=100000000"] {
        let mut client = server.client();
        client.send(format!("GET /p/download?bytes=100000000{declared} HTTP/1.1\r\nhost: test\r\n\r\n").as_bytes());
        assert_eq!(client.reply_head().status, 200);
        drop(client);
        assert_eq!(server.get("/p/x").text(), "GET /x of p");
    }
    assert_eq!(pid(&server), before);
}

#[test]
fn a_plugin_that_dies_while_it_receives_is_502() {
    let server = server_of_p(&AS_THEY_COME);
    let before = pid(&server);
    let mut client = server.client();
    begin(&mut client, "/p/upload", &format!("content-length: {}", 5 * MIB));
    let mut blocks = blocks(5 * MIB);
    blocks.by_ref().take(8).for_each(|block| client.send(&block));
    // Before the plugin has the request, the next process would get it.
    wait_for("the upload to begin", || server.site().data().join("plugin-data/p/uploading").exists().then_some(()));
    assert!(command("kill").args(["-9", &before.to_string()]).status().unwrap().success());
    wait_for("the plugin's end", || (!is_alive(before)).then_some(()));
    offer(&mut client, blocks);
    assert_eq!(client.reply(false).status, 502);
    wait_for("the plugin to answer", || Some(server.get("/p/x")).filter(|reply| reply.status == 200));
}
