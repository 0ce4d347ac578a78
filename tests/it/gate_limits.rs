//! The limits of clients, each below, at and above its edge, by raw sockets.

use crate::support::http::{Client, Reply, chunk};
use crate::support::{Server, Site, binary, command, pause, uids, wait_for};
use serde_json::Value;
use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Lets one plugin hold all connections.
const EVERY_CONNECTION: [&str; 2] = ["--max-connections-per-plugin", "100%"];

/// Far longer than anything here lasts, so that what ends sooner was ended by what is tested.
const LONG: &str = "60s";

/// How much too early the gate may be by its own clock, which it reads ten times a second.
const TICK: Duration = Duration::from_millis(150);

/// A host with the fake plugin `p`.
fn server(arguments: &[&str]) -> Server {
    let server = Site::new().args(arguments).fake("p").start();
    server.wait_state("p", "ready");
    server
}

/// An answer of the gate's own, after which the connection ends.
#[track_caller]
fn assert_refused(client: &mut Client, status: u16, code: &str) -> Reply {
    let reply = client.reply(false);
    assert_eq!((reply.status, reply.header("connection")), (status, Some("close")), "{reply:?}");
    assert_eq!(reply.json()["error"]["code"], code);
    assert_eq!(reply.header("retry-after").is_some(), status == 503, "{reply:?}");
    assert!(client.rest().is_empty());
    reply
}

/// Sends bytes and reads the answer, which must not be a refusal.
#[track_caller]
fn assert_answered(client: &mut Client, bytes: &[u8]) -> Reply {
    client.send(bytes);
    let reply = client.reply(false);
    assert_eq!(reply.status, 200, "{reply:?}");
    reply
}

/// Sends bytes on a connection of its own and reads the answer.
#[track_caller]
fn reply_to(server: &Server, bytes: &[u8]) -> Reply {
    let mut client = server.client();
    client.send(bytes);
    client.reply(false)
}

/// A request whose head is so large, by a header or by its target.
fn head_of(size: usize, by_header: bool) -> String {
    let write = |filling: &str| match by_header {
        true => format!("GET /p/x HTTP/1.1\r\nhost: test\r\nx: {filling}\r\n\r\n"),
        false => format!("GET /p/x?{filling} HTTP/1.1\r\nhost: test\r\n\r\n"),
    };
    write(&"a".repeat(size - write("").len()))
}

#[test]
fn a_head_may_be_as_large_as_max_head() {
    for (arguments, limit) in [(&[][..], 16 << 10), (&["--max-head", "1KiB"], 1 << 10)] {
        let server = server(arguments);
        for by_header in [true, false] {
            for size in [limit - 1, limit] {
                assert_answered(&mut server.client(), head_of(size, by_header).as_bytes());
            }
            let mut client = server.client();
            client.send(head_of(limit + 1, by_header).as_bytes());
            assert_refused(&mut client, 431, "head_too_large");
        }
        // A request line that has not ended by then is a target that is too long.
        let mut client = server.client();
        client.send(&head_of(2 * limit, false).as_bytes()[..limit]);
        assert_refused(&mut client, 414, "uri_too_long");
    }
}

#[test]
fn a_request_may_have_as_many_headers_as_max_headers() {
    for (arguments, limit) in [(&[][..], 64), (&["--max-headers", "4"], 4), (&["--max-headers", "256"], 256)] {
        let server = server(arguments);
        // The host is one of them.
        let request = |count: usize| format!("GET /p/x HTTP/1.1\r\nhost: test\r\n{}\r\n", "a: b\r\n".repeat(count - 1));
        assert_answered(&mut server.client(), request(limit).as_bytes());
        let mut client = server.client();
        client.send(request(limit + 1).as_bytes());
        assert_refused(&mut client, 431, "head_too_large");
    }
}

/// Drips bytes until the other side has ended the connection: how long that took.
#[track_caller]
fn drip(client: &mut Client) -> Duration {
    let begin = Instant::now();
    wait_for("the end of a connection on which something comes", || {
        pause(Duration::from_millis(50));
        (!client.try_send(b"a")).then_some(())
    });
    begin.elapsed()
}

#[test]
fn a_head_may_take_as_long_as_head_timeout_from_its_first_byte_on() {
    let server = server(&["--head-timeout", "4s"]);
    let mut client = server.client();
    // What passes before the first byte does not count.
    pause(Duration::from_millis(4200));
    for piece in [&b"GET /p/x HT"[..], b"TP/1.1\r\nho", b"st: test\r\n"] {
        client.send(piece);
        pause(Duration::from_millis(100));
    }
    assert_answered(&mut client, b"\r\n");

    let begin = Instant::now();
    client.send(b"GET /p/x HTTP/1.1\r\n");
    assert_refused(&mut client, 408, "timeout");
    assert!(begin.elapsed() + TICK > Duration::from_secs(4), "{:?}", begin.elapsed());

    // The time is that of the whole head, not of each of its bytes.
    let mut client = server.client();
    client.send(b"GET /p/x HTTP/1.1\r\nx: ");
    assert!(drip(&mut client) + TICK > Duration::from_secs(4));
    assert_refused(&mut client, 408, "timeout");
}

#[test]
fn a_connection_is_kept_without_a_request_for_idle_timeout() {
    let server = server(&["--idle-timeout", "4s"]);
    let mut client = server.client();
    let get = b"GET /p/x HTTP/1.1\r\nhost: test\r\n\r\n";
    for _ in 0..3 {
        pause(Duration::from_millis(1500));
        assert_answered(&mut client, get);
    }
    let mut begin = Instant::now();
    assert!(client.rest().is_empty(), "nothing is said, as nothing was asked");
    assert!(begin.elapsed() + TICK > Duration::from_secs(4));
    begin = Instant::now();
    assert!(server.client().rest().is_empty());
    assert!(begin.elapsed() + TICK > Duration::from_secs(4));
}

#[test]
fn above_three_quarters_of_the_connections_none_is_kept_for_long() {
    let server = server(&["--max-connections", "8", "--idle-timeout", LONG]);
    let get = b"GET /healthz HTTP/1.1\r\nhost: test\r\n\r\n";
    let mut clients: Vec<Client> = (0..6).map(|_| server.client()).collect();
    clients.iter_mut().for_each(|client| drop(assert_answered(client, get)));
    pause(Duration::from_millis(1500));
    clients.iter_mut().for_each(|client| drop(assert_answered(client, get)));
    let begin = Instant::now();
    clients.push(server.client());
    assert!(clients[0].rest().is_empty());
    assert!(begin.elapsed() + TICK > Duration::from_millis(500));
}

/// With half of the connections of an address taken an idle one is kept for 15 s, though there is room for others.
#[test]
fn an_address_with_half_of_its_connections_keeps_idle_ones_for_a_shorter_time() {
    let server = server(&["--max-connections-per-address", "4", "--idle-timeout", "5m"]);
    let mut clients: Vec<Client> = (0..2).map(|_| Client::connect_from(Ipv4Addr::new(127, 0, 4, 1), server.address())).collect();
    clients.iter_mut().for_each(|client| drop(assert_answered(client, b"GET /healthz HTTP/1.1\r\nhost: test\r\n\r\n")));
    let begin = Instant::now();
    assert!(clients[0].rest().is_empty());
    assert!(begin.elapsed() + TICK > Duration::from_secs(15), "{:?}", begin.elapsed());
}

/// Requests of one proxy for several clients, each on a connection of its own, are counted by these clients.
fn counts_clients_behind_a_proxy(server: &Server, connect: impl Fn() -> Client) {
    let ask = |path: &str, address: &str| {
        let mut client = connect();
        let forwarded = if address.is_empty() { String::new() } else { format!("x-forwarded-for: {address}\r\n") };
        client.send(format!("GET /p{path} HTTP/1.1\r\nhost: test\r\n{forwarded}\r\n").as_bytes());
        client
    };
    let waiting = || server.plugin("p")["process"]["waiting"].as_u64().unwrap_or(0) + 4;
    let mut held: Vec<Client> = Vec::new();
    // An IPv6 network is one client, and so are the two ways to write an IPv4 address. Whom the proxy does not name is not counted.
    for addresses in [["192.0.2.1"; 4], ["192.0.2.2", "::ffff:192.0.2.2", "192.0.2.2:99", "192.0.2.2"], [""; 4]] {
        held.extend(addresses.map(|address| ask("/wait?file=go", address)));
    }
    held.extend((1..=4).map(|host| ask("/wait?file=go", &format!("2001:db8::{host}"))));
    wait_for("all of them to be under way", || (waiting() == 16).then_some(()));
    for address in ["192.0.2.1", "192.0.2.2", "2001:db8::99", "6.6.6.6, 192.0.2.1"] {
        let refused = assert_refused(&mut ask("/x", address), 503, "overloaded");
        assert!(refused.text().contains("address has too many requests under way"), "{}", refused.text());
    }
    for address in ["192.0.2.3", "2001:db8:0:1::1", "", "192.0.2.1, 192.0.2.3"] {
        held.push(ask("/wait?file=go", address));
    }
    assert!(
        server.log().contains("192.0.2.1 has 4 requests under way through a proxy, and another was refused"),
        "{}",
        server.log()
    );
    go(server);
    held.iter_mut().for_each(|client| assert_eq!(client.reply(false).text(), "waited"));
    // The connections are there, and nothing is under way on them.
    for client in &mut held {
        client.send(b"GET /p/x HTTP/1.1\r\nhost: test\r\nx-forwarded-for: 192.0.2.1\r\n\r\n");
        assert_eq!(client.reply(false).status, 200);
    }
}

#[test]
fn the_limit_of_an_address_counts_the_clients_behind_a_proxy_by_tcp() {
    let server = server(&["--max-connections-per-address", "4", "--trust-proxy", "127.0.0.1"]);
    counts_clients_behind_a_proxy(&server, || Client::connect_from(Ipv4Addr::LOCALHOST, server.address()));
    // One that is not trusted is counted by its connections, whatever it says.
    let connect = || Client::connect_from(Ipv4Addr::new(127, 0, 4, 2), server.address());
    let mut clients: Vec<Client> = (0..4).map(|_| connect()).collect();
    for (number, client) in clients.iter_mut().enumerate() {
        let get = format!("GET /p/x HTTP/1.1\r\nhost: test\r\nx-forwarded-for: 192.0.2.{number}\r\n\r\n");
        assert_answered(client, get.as_bytes());
    }
    assert_refused(&mut connect(), 503, "overloaded");
}

#[test]
fn the_limit_of_an_address_counts_the_clients_behind_a_proxy_by_a_socket() {
    let site = Site::new().fake("p");
    let socket = site.data().join("http.sock");
    let listen = format!("unix:{}", socket.display());
    let server = site.args(&["--max-connections-per-address", "4", "--listen", &listen]).start();
    server.wait_state("p", "ready");
    counts_clients_behind_a_proxy(&server, || Client::connect_unix(&socket));
}

/// A request with a body of so many bytes, whole or in chunks.
fn post(path: &str, size: usize, chunks: Option<usize>) -> Vec<u8> {
    let head = format!("POST /p{path} HTTP/1.1\r\nhost: test\r\n");
    let body = vec![b'x'; size];
    match chunks {
        None => [format!("{head}content-length: {size}\r\n\r\n").as_bytes(), &body].concat(),
        Some(most) => {
            let chunks: Vec<u8> = body.chunks(most).flat_map(chunk).collect();
            [format!("{head}transfer-encoding: chunked\r\n\r\n").as_bytes(), &chunks, b"0\r\n\r\n"].concat()
        }
    }
}

#[test]
fn a_body_may_be_as_large_as_max_body() {
    let server = server(&["--max-body", "1000"]);
    for framing in [None, Some(1000), Some(1)] {
        for size in [999, 1000] {
            let reply = assert_answered(&mut server.client(), &post("/echo", size, framing));
            assert_eq!(reply.body.len(), size);
        }
        let mut client = server.client();
        client.send(&post("/echo", 1001, framing));
        assert_refused(&mut client, 413, "too_large");
    }
    // Who asks first whether to send it is told before it is sent.
    let mut client = server.client();
    client.send(b"POST /p/echo HTTP/1.1\r\nhost: test\r\ncontent-length: 1001\r\nexpect: 100-continue\r\n\r\n");
    assert_eq!(client.reply_head().status, 413);
}

/// What is announced, and what a length cannot be, is judged when it is read: the body timeout is a minute here.
#[test]
fn a_chunk_that_announces_too_much_is_refused_at_once() {
    let server = server(&["--max-body", "1000", "--body-timeout", LONG]);
    let refused = |chunks: &str, status: u16, code: &str| {
        let mut client = server.client();
        client.send(format!("POST /p/echo HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n{chunks}").as_bytes());
        assert_refused(&mut client, status, code);
    };
    for chunks in [
        "3e9",
        "3e9\r\n",
        "00000000000003E9;name=value\r\nx",
        "FFFFFFFFFFFFFFFF\r\n",
        "7fffffffffffffff\r\n",
        "8000000000000000",
        "5\r\nhello\r\n3e4\r\n",
        "5\r\nhello\r\nFFFFFFFFFFFFFFFF\r\nx",
        "5\r\nhello\r\n5\r\nhello\r\n3df\r\n",
        "5\r\nhello\r\n1;name=value\r\n-\r\n3e3",
        &format!("3e7\r\n{}\r\n2", "x".repeat(999)),
        &format!("1f4\r\n{0}\r\n1f4\r\n{0}\r\n1\r\n", "x".repeat(500)),
    ] {
        refused(chunks, 413, "too_large");
    }
    let [digits, extension] = ["0".repeat(17), format!("5;{}", "x".repeat(20_000))];
    for chunks in [&*digits, "10000000000000000", &"f".repeat(5_000), "-1\r\n", &extension] {
        refused(chunks, 400, "bad_request");
    }
    for (length, status, code) in [
        ("9999999999999999999", 413, "too_large"),
        ("18446744073709551615", 400, "bad_request"),
        ("18446744073709551616", 400, "bad_request"),
        ("99999999999999999999999999", 400, "bad_request"),
    ] {
        let mut client = server.client();
        client.send(format!("POST /p/echo HTTP/1.1\r\nhost: test\r\ncontent-length: {length}\r\n\r\n").as_bytes());
        assert_refused(&mut client, status, code);
    }
    // The most that may be announced.
    assert_answered(&mut server.client(), &post("/echo", 1000, Some(1000)));
}

/// Sends the head of a request, and then bytes of its body, one after the other.
fn send_body_slowly(server: &Server, bytes: usize, every: Duration) -> Client {
    let mut client = server.client();
    client.send(b"POST /p/echo HTTP/1.1\r\nhost: test\r\ncontent-length: 6\r\n\r\n");
    for _ in 0..bytes {
        pause(every);
        client.send(b"x");
    }
    client
}

#[test]
fn a_body_may_stand_still_for_body_timeout() {
    let server = server(&["--body-timeout", "4s", "--min-rate", "1"]);
    // Six seconds in all, with something each second.
    let mut client = send_body_slowly(&server, 6, Duration::from_secs(1));
    assert_eq!(client.reply(false).text(), "xxxxxx");
    for bytes in [0, 5] {
        let mut client = send_body_slowly(&server, bytes, Duration::from_millis(100));
        let begin = Instant::now();
        assert_refused(&mut client, 408, "timeout");
        assert!(begin.elapsed() + TICK > Duration::from_secs(4), "{:?}", begin.elapsed());
    }
}

#[test]
fn a_body_may_be_slower_than_min_rate_for_body_timeout_and_no_longer() {
    let server = server(&["--body-timeout", "4s", "--min-rate", "100"]);
    let mut client = send_body_slowly(&server, 6, Duration::from_millis(100));
    assert_eq!(client.reply(false).text(), "xxxxxx");
    let mut client = server.client();
    client.send(b"POST /p/echo HTTP/1.1\r\nhost: test\r\ncontent-length: 5000\r\n\r\n");
    assert!(drip(&mut client) + TICK > Duration::from_secs(4));
    assert_refused(&mut client, 408, "timeout");
}

/// Time in which nothing happened is nobody's: it was waited for no one.
#[test]
fn a_quiet_time_before_a_request_is_not_held_against_its_client() {
    let server = server(&["--body-timeout", "4s", "--write-timeout", "4s"]);
    pause(Duration::from_millis(4500));
    let mut client = send_body_slowly(&server, 6, Duration::from_millis(100));
    assert_eq!(client.reply(false).text(), "xxxxxx");
    pause(Duration::from_millis(4500));
    assert_eq!(read_late(&server, Duration::from_millis(300)), 20_000_000);
}

/// The plugin answers `/early` without the body, which shows when it is asked.
#[test]
fn a_body_up_to_body_buffer_is_collected_and_a_larger_one_is_passed_on() {
    let server = server(&["--body-buffer", "128KiB", "--body-timeout", "4s"]);
    let size = 128 << 10;
    for declared in [size - 1, size] {
        let mut client = server.client();
        let request = post("/early", declared, None);
        client.send(&request[..request.len() - 1]);
        assert_refused(&mut client, 408, "timeout");
        assert_eq!(reply_to(&server, &request).text(), "enough");
    }
    // Some of the rest has to come for the host to look for an answer, but not all of it.
    let mut client = server.client();
    let request = post("/early", 2 * size, None);
    client.send(&request[..request.len() - size + 1]);
    let answered = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let mut writer = client.writer();
        let answered = &answered;
        scope.spawn(move || {
            while !answered.load(Ordering::Relaxed) {
                pause(Duration::from_millis(20));
                assert!(writer.try_send(b"x") || answered.load(Ordering::Relaxed));
            }
        });
        let reply = client.reply(false);
        answered.store(true, Ordering::Relaxed);
        assert_eq!((reply.status, reply.text()), (413, "enough"));
    });
}

/// The names in the host's run directory.
fn names_in_run(server: &Server) -> usize {
    fs::read_dir(server.site().data().join("run")).unwrap().count()
}

/// Sends a body but for its last byte.
fn begin_body(server: &Server, size: usize) -> Client {
    let mut client = server.client();
    let request = post("/upload", size, None);
    client.send(&request[..request.len() - 1]);
    client
}

/// Sends the last byte, and reads how much the plugin got.
#[track_caller]
fn end_body(mut client: Client, size: usize) {
    let reply = assert_answered(&mut client, b"x");
    assert!(reply.text().starts_with(&format!("{size} ")), "{}", reply.text());
}

#[test]
fn bodies_beyond_body_memory_go_to_a_file_without_a_name() {
    let server = server(&["--body-memory", "64KiB", "--body-disk", "1MiB"]);
    let names = names_in_run(&server);
    let size = 64 << 10;
    // The last byte is missing, so that there is room for one more.
    let (first, second) = (begin_body(&server, size), begin_body(&server, 2));
    assert_eq!((server.get("/p/x").status, server.spooled()), (200, 0), "they fit in memory");
    end_body(second, 2);
    let third = begin_body(&server, size);
    wait_for("the file of one that does not", || (server.spooled() == 1).then_some(()));
    assert_eq!(names_in_run(&server), names, "it has no name");
    end_body(first, size);
    end_body(third, size);
    wait_for("the file to be gone", || (server.spooled() == 0).then_some(()));
    let fourth = begin_body(&server, size);
    assert_eq!((server.get("/p/x").status, server.spooled()), (200, 0), "memory is free again");
    end_body(fourth, size);
}

/// Also where its request waits for a plugin that is busy.
#[test]
fn a_body_whose_client_has_gone_makes_room_for_another() {
    let server = server(&["--body-memory", "64KiB", "--body-disk", "0", "--request-timeout", LONG]);
    let shown = || serde_json::from_str::<Value>(&server.cli(&["show", "p", "--json"])).unwrap();
    // The plugin has four requests at work, and the others wait for it.
    let mut busy: Vec<Client> = (0..5).map(|_| server.client()).collect();
    busy.iter_mut().for_each(|client| client.send(b"GET /p/wait?file=go HTTP/1.1\r\nhost: test\r\n\r\n"));
    wait_for("the plugin to be busy", || (shown()["process"]["waiting"] == 1).then_some(()));
    let upload = || {
        let mut client = server.client();
        client.send(&post("/upload", 60_000, None));
        client
    };
    let holder = upload();
    wait_for("the body to be taken", || (shown()["process"]["waiting"] == 2).then_some(()));
    assert_refused(&mut upload(), 503, "overloaded");
    // One that only ends might still read: that it has gone shows when it is answered.
    holder.reset();
    let mut next = wait_for("room", || {
        let mut client = upload();
        (!client.wait_readable(Duration::from_secs(1))).then_some(client)
    });
    go(&server);
    assert!(next.reply(false).text().starts_with("60000 "));
    busy.iter_mut().for_each(|client| assert_eq!(client.reply(false).text(), "waited"));
}

#[test]
fn bodies_beyond_body_disk_are_refused_until_there_is_room_again() {
    let server = server(&["--body-memory", "0", "--body-disk", "64KiB"]);
    let size = 64 << 10;
    for framing in [None, Some(1000)] {
        let reply = assert_answered(&mut server.client(), &post("/upload", size, framing));
        assert!(reply.text().starts_with("65536 "), "{}", reply.text());
        let mut client = server.client();
        client.send(&post("/upload", size + 1, framing));
        assert_refused(&mut client, 503, "overloaded");
    }
    // What one client has is not there for another.
    let first = begin_body(&server, size + 1);
    wait_for("the first body's file", || (server.spooled() == 1).then_some(()));
    wait_for("the disk to be used up", || {
        (!server.request("POST", "/p/upload", &[], b"xx").text().starts_with('2')).then_some(())
    });
    let refused = server.request("POST", "/p/upload", &[], b"x");
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("1")));
    assert_eq!(server.get("/p/x").status, 200, "who sends no body is not concerned");
    first.reset();
    wait_for("room", || (server.request("POST", "/p/upload", &[], b"x").status == 200).then_some(()));
    assert_eq!(server.spooled(), 0);
    let said = server.log().matches("bodies of requests are refused: --body-memory and --body-disk are used up").count();
    assert_eq!(said, 1, "once a minute, not once a request:\n{}", server.log());
}

/// A connection on which the plugin has answered, and is now at work until there is a file `go`.
fn busy(server: &Server) -> Client {
    let (mut client, reply) = wait_for("a place", || {
        let mut client = server.client();
        client.try_send(b"GET /p/x HTTP/1.1\r\nhost: test\r\n\r\n");
        let reply = client.reply(false);
        (reply.status == 200).then_some((client, reply))
    });
    assert_eq!(reply.text(), "GET /x of p");
    client.send(b"GET /p/wait?file=go HTTP/1.1\r\nhost: test\r\n\r\n");
    client
}

/// Has the plugin answer what waits for the file `go`.
fn go(server: &Server) {
    fs::write(server.site().data().join("plugin-data/p/go"), b"").unwrap();
}

#[test]
fn there_may_be_as_many_connections_as_max_connections() {
    let server = server(&["--max-connections", "4", "--max-connections-per-plugin", "100%"]);
    let mut clients: Vec<Client> = (0..4).map(|_| busy(&server)).collect();
    for _ in 0..3 {
        let reply = assert_refused(&mut server.client(), 503, "overloaded");
        assert!(reply.text().contains("too many connections"), "{}", reply.text());
    }
    assert!(server.cli(&["list"]).contains("ready"), "the operator has a place of their own");
    assert_eq!(server.log().matches("all 4 connections are taken").count(), 1, "{}", server.log());
    go(&server);
    clients.iter_mut().for_each(|client| assert_eq!(client.reply(false).text(), "waited"));
    drop(clients);
    wait_for("places", || {
        let mut client = server.client();
        client.try_send(b"GET /healthz HTTP/1.1\r\nhost: test\r\n\r\n");
        (client.reply(false).status == 200).then_some(())
    });
}

#[test]
fn one_address_may_have_as_many_connections_as_max_connections_per_address() {
    let server = server(&["--max-connections-per-address", "2"]);
    let connect = |last: u8| Client::connect_from(Ipv4Addr::new(127, 0, 0, last), server.address());
    let get = b"GET /healthz HTTP/1.1\r\nhost: test\r\n\r\n";
    let mut clients = [connect(5), connect(5)];
    clients.iter_mut().for_each(|client| drop(assert_answered(client, get)));
    assert_refused(&mut connect(5), 503, "overloaded");
    assert_answered(&mut connect(6), get);
    clients.iter_mut().for_each(|client| drop(assert_answered(client, get)));
    let [first, _second] = clients;
    drop(first);
    wait_for("a place", || {
        let mut client = connect(5);
        client.try_send(get);
        (client.reply(false).status == 200).then_some(())
    });
}

/// A host of 8 connections, and two plugins that may hold 4 of them each.
fn server_of_two(arguments: &[&str]) -> Server {
    let limits = ["--max-connections", "8", "--request-timeout", LONG];
    let server = Site::new().args(&limits).args(arguments).fake_of_one_connection("p").fake("q").start();
    for id in ["p", "q"] {
        server.wait_state(id, "ready");
    }
    server
}

/// A request for the plugin that is told that the plugin holds too many connections.
#[track_caller]
fn assert_plugin_is_full(server: &Server, request: &[u8]) {
    let mut client = server.client();
    client.send(request);
    let reply = client.reply(false);
    assert_eq!((reply.status, reply.header("retry-after")), (503, Some("1")), "{reply:?}");
    assert_eq!(reply.json()["error"]["code"], "overloaded");
    assert!(reply.text().contains("the plugin holds too many connections") && !reply.text().contains("--"), "{}", reply.text());
}

/// What does not concern the plugin is served, though the plugin holds all the connections it may.
#[track_caller]
fn assert_others_are_served(server: &Server) {
    assert_eq!(server.get("/q/x").text(), "GET /x of q");
    assert_eq!((server.get("/healthz").status, server.get("/").status), (200, 200));
    assert_eq!(server.api("GET", "/plugins", b"").0, 200);
}

/// Waits until the plugin answers again.
#[track_caller]
fn wait_served(server: &Server) {
    wait_for("the plugin to be let have connections", || {
        let mut client = server.client();
        client.try_send(GET_X);
        (client.reply(false).status == 200).then_some(())
    });
}

const GET_X: &[u8] = b"GET /p/x HTTP/1.1\r\nhost: test\r\n\r\n";

/// One of the listeners is served, and the others wait for their turn: all of them hold a connection.
#[test]
fn one_plugin_holds_half_of_the_connections_and_no_more() {
    let server = server_of_two(&[]);
    let mut listener = server.client();
    listener.begin_events();
    let waiting: Vec<Client> = (0..3)
        .map(|number| {
            let mut client = server.client();
            client.send(b"GET /p/events HTTP/1.1\r\nhost: test\r\n\r\n");
            wait_for("it to wait", || (server.plugin("p")["process"]["waiting"] == number + 1).then_some(()));
            client
        })
        .collect();
    let streamed = post("/upload", 100_000, Some(1_000));
    for _ in 0..10 {
        assert_plugin_is_full(&server, GET_X);
        assert_plugin_is_full(&server, &streamed);
        assert_others_are_served(&server);
    }
    let said = "p holds 4 connections, and another request for it was refused (serve --max-connections-per-plugin)";
    assert_eq!(server.log().matches(said).count(), 1, "{}", server.log());

    // They leave, which frees their places whether the plugin knows of it or not: it is still at the first.
    waiting.into_iter().for_each(Client::reset);
    listener.reset();
    let asked: Vec<Client> = (0..4)
        .map(|_| {
            wait_for("a place", || {
                let mut client = server.client();
                client.try_send(b"GET /p/wait?file=go HTTP/1.1\r\nhost: test\r\n\r\n");
                (!client.wait_readable(Duration::from_millis(300))).then_some(client)
            })
        })
        .collect();
    assert_plugin_is_full(&server, GET_X);
    fs::write(server.site().data().join("plugin-data/p/next"), b"end\n").unwrap();
    go(&server);
    asked.into_iter().for_each(|mut client| assert_eq!(client.reply(false).text(), "waited"));
}

/// Waits until one of two requests is under way at the plugin and the other waits for it.
#[track_caller]
fn wait_for_two(server: &Server) {
    wait_for("two requests to be there", || (server.plugin("p")["process"]["waiting"] == 1).then_some(()));
}

#[test]
fn uploads_that_are_passed_on_as_they_come_count_for_their_plugin() {
    let server = server_of_two(&["--body-buffer", "0", "--max-connections-per-plugin", "2"]);
    let mut uploads: Vec<Client> = (0..2).map(|_| begin_body(&server, 100_000)).collect();
    wait_for_two(&server);
    assert_plugin_is_full(&server, GET_X);
    assert_plugin_is_full(&server, &post("/upload", 100_000, None));
    assert_others_are_served(&server);
    // Whichever the plugin has taken first.
    uploads.iter_mut().for_each(|client| client.send(b"x"));
    uploads.iter_mut().for_each(|client| assert!(client.reply(false).text().starts_with("100000 ")));
    wait_served(&server);

    // One whose client leaves gives its place back while the plugin still waits for the body. The place of the request before may not be
    // free at once, and then one of the two is refused.
    let uploads = wait_for("two uploads to be there", || {
        let uploads: Vec<Client> = (0..2).map(|_| begin_body(&server, 100_000)).collect();
        (0..50).find_map(|_| {
            pause(Duration::from_millis(20));
            (server.plugin("p")["process"]["waiting"] == 1).then_some(())
        })?;
        Some(uploads)
    });
    drop(uploads);
    wait_served(&server);
}

/// Also those of which the plugin has answered all that there is.
#[test]
fn slow_readers_count_for_the_plugin_whose_answer_they_read() {
    let dir = tempfile::tempdir().unwrap();
    let listen = format!("unix:{}", dir.path().join("http.sock").display());
    let server = server_of_two(&["--listen", &listen, "--write-timeout", LONG, "--max-connections-per-plugin", "2"]);
    // More than the socket holds, by less than the host takes from the plugin at a time.
    let socket: usize = fs::read_to_string("/proc/sys/net/core/wmem_default").unwrap().trim().parse().unwrap();
    let request = format!("GET /p/download?bytes={} HTTP/1.1\r\nhost: test\r\n\r\n", socket + (64 << 10));
    let mut slow: Vec<Client> = (0..2).map(|_| server.client()).collect();
    slow.iter_mut().for_each(|client| client.send(request.as_bytes()));
    wait_for("both to be answered", || (server.plugin("p")["process"]["answered"] == 2).then_some(()));
    assert_plugin_is_full(&server, GET_X);
    assert_others_are_served(&server);
    assert_eq!(slow[0].reply(false).body.len(), socket + (64 << 10));
    wait_served(&server);
    assert_eq!(slow[1].reply(false).body.len(), socket + (64 << 10));
    // Who has read the answer may ask again.
    assert_answered(&mut slow[0], GET_X);
}

#[test]
fn a_plugin_may_be_let_hold_all_connections() {
    let server = server_of_two(&EVERY_CONNECTION);
    let mut clients: Vec<Client> = (0..8)
        .map(|_| {
            let mut client = server.client();
            client.send(b"GET /p/wait?file=go HTTP/1.1\r\nhost: test\r\n\r\n");
            client
        })
        .collect();
    wait_for("all of them to be there", || (server.plugin("p")["process"]["waiting"] == 7).then_some(()));
    go(&server);
    clients.iter_mut().for_each(|client| assert_eq!(client.reply(false).text(), "waited"));
}

/// Where threads are limited, only so many requests are in the host at once.
#[test]
fn a_request_waits_for_a_place_inside_for_place_timeout() {
    if fs::metadata("/proc/self").unwrap().uid() != 0 {
        // Only root can become another user, and root has no such limit.
        return;
    }
    let site = Site::new()
        .args(&["--body-buffer", "0", "--place-timeout", "5s", "--request-timeout", LONG])
        .args(&EVERY_CONNECTION)
        .fake("p");
    // A user of this test alone, since the limit counts all processes of a user.
    let user = uids().start().to_string();
    let own = site.data().join("plugrack");
    fs::copy(binary(), &own).unwrap();
    assert!(command("chown").args(["-R", &user]).arg(site.data()).status().unwrap().success());
    let mut serve = command("setpriv");
    serve.args(["--reuid", &user, "--regid", &user, "--clear-groups", "prlimit", "--nproc=2000:2000"]).arg(own);
    serve.args(site.serve().get_args());
    let server = site.start_as(serve);
    server.wait_state("p", "ready");
    // Room for 32 clients where threads are limited; the plugin has four at work, and the others wait for it. What has a body
    // that does not come in one piece takes a place.
    let connect = |number: usize| {
        let mut client = Client::connect_from(Ipv4Addr::new(127, 0, 3, 1), server.address());
        client.send(&post(&format!("/wait?file=go&{number}"), 80_000, None));
        client
    };
    let mut inside: Vec<Client> = (0..32).map(connect).collect();
    // The operator has places of their own.
    let shown = || serde_json::from_str::<Value>(&server.cli(&["show", "p", "--json"])).unwrap();
    wait_for("all of them to be inside", || (shown()["process"]["waiting"] == 28).then_some(()));
    assert_eq!(server.get("/healthz").status, 200, "what has none needs no place");
    for number in 0..3 {
        let begin = Instant::now();
        assert_refused(&mut connect(number), 503, "overloaded");
        assert!(begin.elapsed() + TICK > Duration::from_secs(5), "{:?}", begin.elapsed());
    }
    assert_eq!(server.log().matches("found no free place inside the host in time").count(), 1, "{}", server.log());
    // One that comes free in time is taken.
    let mut last = connect(0);
    go(&server);
    assert_eq!(last.reply(false).text(), "waited");
    inside.iter_mut().for_each(|client| assert_eq!(client.reply(false).text(), "waited"));
}

/// Reads a large answer, with a pause in it: how much came.
fn read_late(server: &Server, stop: Duration) -> usize {
    let mut client = Client::connect_narrow(Ipv4Addr::LOCALHOST, server.address());
    client.send(b"GET /p/download?bytes=20000000&declared=20000000 HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
    let head = client.reply_head();
    assert_eq!((head.status, head.header("content-length")), (200, Some("20000000")));
    pause(stop);
    client.rest().len()
}

#[test]
fn a_client_may_take_nothing_of_its_answer_for_write_timeout() {
    let server = server(&["--write-timeout", "4s"]);
    assert_eq!(read_late(&server, Duration::from_millis(500)), 20_000_000);
    let mut client = Client::connect_narrow(Ipv4Addr::LOCALHOST, server.address());
    let begin = Instant::now();
    client.send(b"GET /p/download?bytes=20000000&declared=20000000 HTTP/1.1\r\nhost: test\r\n\r\n");
    wait_for("the host to break the connection", || (!client.try_send(b" ")).then_some(()));
    assert!(begin.elapsed() + TICK > Duration::from_secs(4));
    assert!(client.rest().len() < 20_000_000);
    assert_eq!(server.get("/p/x").status, 200);
}

#[test]
fn an_answer_may_begin_as_late_as_request_timeout() {
    let server = server(&["--request-timeout", "4s"]);
    let mut client = server.client();
    assert_eq!(client.get("/p/sleep?s=0.3").text(), "slept");
    let begin = Instant::now();
    let late = client.get("/p/wait?file=never");
    assert_eq!((late.status, late.json()["error"]["code"].as_str()), (504, Some("timeout")));
    assert!(begin.elapsed() + TICK > Duration::from_secs(4));
    assert_eq!(client.get("/p/x").status, 200, "the connection goes on");
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    for (name, values) in [
        ("--max-connections", &["0", "65537", "-1", "many"][..]),
        ("--max-connections-per-address", &["0", "65537"]),
        ("--max-connections-per-plugin", &["0", "65537", "0%", "101%", "half"]),
        ("--max-head", &["1023", "65537"]),
        ("--max-headers", &["0", "257"]),
        ("--trust-proxy", &["10.0.0.0/33", "localhost", "10.0.0.1:80"]),
        ("--max-body", &["2TiB"]),
        ("--head-timeout", &["0s", "6m", "5"]),
        ("--idle-timeout", &["0s", "6m"]),
        ("--body-timeout", &["0s", "6m"]),
        ("--place-timeout", &["0s", "6m"]),
        ("--write-timeout", &["0s", "6m"]),
        ("--min-rate", &["fast"]),
        ("--body-buffer", &["-1"]),
        ("--body-memory", &["lots"]),
        ("--body-disk", &["lots"]),
    ] {
        for value in values {
            let refused =
                command(binary()).args(["serve", "--data", "/nonexistent"]).arg(format!("{name}={value}")).output().unwrap();
            let said = String::from_utf8(refused.stderr).unwrap();
            assert_eq!(refused.status.code(), Some(2), "{name} {value}: {said}");
            assert!(said.contains(name) && said.contains(value), "{said}");
        }
    }
}
