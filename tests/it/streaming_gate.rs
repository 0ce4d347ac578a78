//! Bodies through the gate, with a plugin or a client that is slow, or both: every byte, and in bounded memory.

use crate::support::http::{Client, chunk};
use crate::support::strain::count;
use crate::support::{Server, Site, blocks, command, pause, wait_for};
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Stdio;
use std::time::Duration;

const MIB: u64 = 1 << 20;

/// Most memory of the host: what it takes at rest, and some of the bodies here several times over, but not one of them.
const MEMORY: u64 = 32 * MIB;

/// Bytes a second of who is slow: so that a body takes two seconds.
const SLOW: u64 = 12 * MIB;

/// Body that is larger than all that may be kept of it.
const BODY: u64 = 24 * MIB;

/// A host that keeps little of bodies in memory, and little on disk.
fn server() -> Server {
    let limits = ["--max-body", "1GiB", "--body-buffer", "1MiB", "--body-memory", "512KiB", "--body-disk", "8MiB"];
    let server = Site::new().args(&limits).fake("p").start();
    server.wait_state("p", "ready");
    server
}

/// What the plugin answers to the data of [`blocks`].
fn answer_to(bytes: u64) -> String {
    let mut sha256sum = command("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut input = sha256sum.stdin.take().unwrap();
    blocks(bytes).for_each(|block| input.write_all(&block).unwrap());
    drop(input);
    let sum = String::from_utf8(sha256sum.wait_with_output().unwrap().stdout).unwrap();
    format!("{bytes} {}", &sum[..64])
}

/// The plugin's rate, as a query, and the client's.
fn pairs() -> [(&'static str, String, Option<u64>); 4] {
    let slow = || format!("rate={SLOW}");
    [
        ("both quick", String::new(), None),
        ("a slow plugin", slow(), None),
        ("a slow client", String::new(), Some(SLOW)),
        ("both slow", slow(), Some(SLOW)),
    ]
}

/// Waits as long as these bytes take at a rate.
fn keep_to(rate: Option<u64>, bytes: usize) {
    if let Some(rate) = rate {
        pause(Duration::from_secs_f64(bytes as f64 / rate as f64));
    }
}

#[track_caller]
fn assert_small(server: &Server, what: &str) {
    let peak = server.memory("VmHWM");
    assert!(peak < MEMORY, "{what}: the host took {} KiB", peak >> 10);
}

fn upload(server: &Server, query: &str, rate: Option<u64>, chunked: bool) -> String {
    let mut client = server.client();
    let framing = if chunked { "transfer-encoding: chunked".to_owned() } else { format!("content-length: {BODY}") };
    client.send(format!("POST /p/upload?{query} HTTP/1.1\r\nhost: test\r\n{framing}\r\n\r\n").as_bytes());
    for block in blocks(BODY) {
        client.send(&if chunked { chunk(&block) } else { block.clone() });
        keep_to(rate, block.len());
    }
    if chunked {
        client.send(&chunk(b""));
    }
    client.reply(false).text().to_owned()
}

#[test]
fn uploads_come_whole_whoever_is_slow() {
    let server = server();
    let expected = answer_to(BODY);
    for chunked in [false, true] {
        std::thread::scope(|scope| {
            for (what, query, rate) in pairs() {
                let (server, expected) = (&server, &expected);
                scope.spawn(move || assert_eq!(&upload(server, &query, rate, chunked), expected, "{what}, chunked: {chunked}"));
            }
        });
        assert_small(&server, "uploads");
    }
    assert_eq!(server.log().matches("bodies of requests are refused").count(), 0, "{}", server.log());
}

/// What was kept on disk on its way is given back while the body goes on: an upload may be larger than all the disk there is for bodies.
#[test]
fn an_upload_larger_than_the_disk_for_bodies_comes_whole() {
    let limits = ["--max-body", "1GiB", "--body-buffer", "1MiB", "--body-memory", "0", "--body-disk", "4MiB"];
    let server = Site::new().args(&limits).fake("p").start();
    server.wait_state("p", "ready");
    assert_eq!(upload(&server, &format!("rate={SLOW}"), None, false), answer_to(BODY));
}

#[test]
fn downloads_come_whole_whoever_is_slow() {
    let server = server();
    std::thread::scope(|scope| {
        for (what, query, rate) in pairs() {
            for declared in ["".to_owned(), format!("&declared={BODY}")] {
                let (server, query) = (&server, query.clone());
                scope.spawn(move || download(server, &format!("{query}{declared}"), rate, what));
            }
        }
    });
    assert_small(&server, "downloads");
}

#[track_caller]
fn download(server: &Server, query: &str, rate: Option<u64>, what: &str) {
    let mut client = server.client();
    client.send(format!("GET /p/download?bytes={BODY}&{query} HTTP/1.1\r\nhost: test\r\n\r\n").as_bytes());
    let head = client.reply_head();
    assert_eq!(head.status, 200, "{what}");
    let mut expected = blocks(BODY);
    let mut ahead = Vec::new();
    let mut take = |piece: &[u8]| {
        while ahead.len() < piece.len() {
            ahead.extend(expected.next().expect("no more than was asked for"));
        }
        assert!(ahead[..piece.len()] == *piece, "{what}: other bytes came");
        ahead.drain(..piece.len());
        keep_to(rate, piece.len());
    };
    if head.header("transfer-encoding").is_some() {
        while let Some(piece) = client.body_piece(&head) {
            take(&piece);
        }
    } else {
        for _ in 0..BODY / (64 << 10) {
            take(&client.bytes(64 << 10));
        }
    }
    assert!(ahead.is_empty() && expected.next().is_none(), "{what}: not all has come");
}

/// Requests of clients that send slowly take none of the plugin's time as long as their bodies are collected.
#[test]
fn slow_uploads_that_are_collected_do_not_hold_up_the_plugin() {
    let server = Site::new().args(&["--max-connections-per-address", "100"]).fake("p").start();
    server.wait_state("p", "ready");
    let mut slow: Vec<Client> = (0..60)
        .map(|_| {
            let mut client = server.client();
            client.send(b"POST /p/upload HTTP/1.1\r\nhost: test\r\ncontent-length: 100000\r\n\r\n");
            client.send(&[7; 50_000]);
            client
        })
        .collect();
    for _ in 0..20 {
        assert_eq!(server.get("/p/x").text(), "GET /x of p");
    }
    assert_eq!(server.plugin("p")["process"]["waiting"], 0);
    slow.iter_mut().for_each(|client| client.send(&[7; 50_000]));
    assert!(slow.iter_mut().all(|client| client.reply(false).text().starts_with("100000 ")));
}

/// Each event is there when it is sent: many times in a row, none waits for the next.
#[test]
fn events_come_without_delay_beside_bodies() {
    let server = server();
    let mut client = server.client();
    let head = client.begin_events();
    let next = server.site().data().join("plugin-data/p/next");
    let mut file = fs::File::options().create(true).append(true).open(next).unwrap();
    std::thread::scope(|scope| {
        let uploads: Vec<_> = (0..2).map(|_| scope.spawn(|| upload(&server, &format!("rate={SLOW}"), None, false))).collect();
        let mut events = 0;
        while !uploads.iter().all(|upload| upload.is_finished()) {
            file.write_all(format!("{events}\n").as_bytes()).unwrap();
            assert_eq!(client.body_piece(&head).unwrap(), format!("data: {events}\n\n").as_bytes());
            events += 1;
        }
        assert!(events > 0, "the uploads were over at once");
    });
    file.write_all(b"end\n").unwrap();
    assert_eq!(client.body_piece(&head), None);
}

/// A client that takes nothing of its answer is let go of, and what was held for it.
#[test]
fn a_client_that_takes_nothing_of_its_answer_is_let_go() {
    let server = Site::new().args(&["--write-timeout", "1s"]).fake("p").start();
    server.wait_state("p", "ready");
    assert_eq!(server.get("/p/x").status, 200);
    let before = count(&server, "fd");
    // All four connections of the plugin are taken.
    let clients: Vec<_> = (0..4).map(|_| begin_download(&server)).collect();
    for client in &clients {
        wait_for("the connection to be broken off", || client.take_error().unwrap().map(drop));
    }
    assert_eq!(server.get("/p/x").text(), "GET /x of p");
    wait_for("the files to be given back", || (count(&server, "fd") <= before + 4).then_some(()));
    assert_small(&server, "answers that nobody took");
}

/// Asks for more than anybody holds for a client, and takes no more than the beginning of the answer.
fn begin_download(server: &Server) -> TcpStream {
    let mut stream = TcpStream::connect(server.address()).unwrap();
    stream.write_all(b"GET /p/download?bytes=500000000 HTTP/1.1\r\nhost: test\r\n\r\n").unwrap();
    let mut begin = [0; 15];
    stream.read_exact(&mut begin).unwrap();
    assert_eq!(&begin, b"HTTP/1.1 200 OK");
    stream
}
