//! Clients that read their answers slowly: one that goes on gets all of it, one that stops, or is too slow, is cut off.

use crate::support::http::Client;
use crate::support::tls::Authority;
use crate::support::{Server, Site, pause, wait_for};
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

/// Time that a client may read nothing. Far below that in which [`read_steadily`] reads slowly, and far above any pause of a test's own.
const WRITE_TIMEOUT: Duration = Duration::from_secs(4);
const LIMITS: [&str; 2] = ["--write-timeout", "4s"];

/// Time for which a client reads slowly.
const SLOW_TIME: Duration = Duration::from_secs(13);

/// More than the host and the kernel's buffers hold of an answer by TCP, and by a Unix socket.
const TCP_BYTES: usize = 8_000_000;
const UNIX_BYTES: usize = 1_500_000;

/// What a test client reads at a time, and how often: about 4 KB a second, which is no more than a third of what the kernel's buffers take
/// within [`WRITE_TIMEOUT`] before they report room.
const BITE: usize = 400;
const EVERY: Duration = Duration::from_millis(100);

fn serve(arguments: &[&str]) -> Server {
    let server = Site::new().args(arguments).fake("p").start();
    server.wait_state("p", "ready");
    server
}

/// A host that listens on a Unix socket.
fn serve_unix(arguments: &[&str]) -> (Server, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let listen = format!("unix:{}", dir.path().join("http.sock").display());
    (serve(&[arguments, &["--listen", &listen]].concat()), dir)
}

/// Asks for an answer of so many bytes, with its length or in chunks, and reads its head.
fn ask(client: &mut Client, bytes: usize, declared: bool) {
    let declared = if declared { format!("&declared={bytes}") } else { String::new() };
    let request = format!("GET /p/download?bytes={bytes}{declared} HTTP/1.0\r\nhost: test\r\n\r\n");
    client.send(request.as_bytes());
    assert_eq!(client.reply_head().status, 200);
}

/// Reads slowly for a while.
fn read_steadily(client: &mut Client, time: Duration, what: &str) -> usize {
    let (begin, mut taken) = (Instant::now(), 0);
    while begin.elapsed() < time {
        taken += client.some(BITE).unwrap_or_else(|| panic!("{what}: cut after {:?} and {taken} bytes", begin.elapsed()));
        pause(EVERY);
    }
    taken
}

/// Reads slowly for much longer than a client may read nothing, and then the rest.
fn assert_comes_whole(mut client: Client, bytes: usize, declared: bool, what: &str) {
    ask(&mut client, bytes, declared);
    let taken = read_steadily(&mut client, SLOW_TIME, what);
    let rest = client.all(bytes).len();
    assert_eq!(taken + rest, bytes, "{what}: cut");
}

#[test]
fn a_steady_reader_gets_its_whole_answer_however_slow_it_is() {
    let authority = Authority::new();
    let issued = authority.issue("host");
    let [tcp, tls] = [&[][..], &issued.arguments()].map(|more| serve(&[&LIMITS, more].concat()));
    let (unix, _dir) = serve_unix(&LIMITS);
    std::thread::scope(|scope| {
        for declared in [true, false] {
            let (tcp, tls, unix, authority) = (&tcp, &tls, &unix, &authority);
            scope.spawn(move || assert_comes_whole(tcp.client(), TCP_BYTES, declared, "by TCP"));
            scope.spawn(move || {
                let narrow = Client::connect_narrow(Ipv4Addr::LOCALHOST, tcp.address());
                assert_comes_whole(narrow, TCP_BYTES, declared, "by TCP with a small buffer");
            });
            scope.spawn(move || assert_comes_whole(authority.client(tls.address()), TCP_BYTES, declared, "by TLS"));
            scope.spawn(move || assert_comes_whole(unix.client(), UNIX_BYTES, declared, "by a Unix socket"));
        }
    });
}

/// How long it took until the host has cut off a client, by an answer that is not whole.
fn time_to_cut(server: &Server, mut client: Client, bytes: usize, first: usize) -> Duration {
    ask(&mut client, bytes, true);
    client.bytes(first);
    let begin = Instant::now();
    wait_for("the connection to be ended by the host", || (!client.try_send(b" ")).then_some(()));
    let took = begin.elapsed();
    assert!(first + client.rest().len() < bytes);
    assert_eq!(server.get("/p/x").text(), "GET /x of p");
    took
}

#[test]
fn a_client_that_stops_reading_is_cut_off() {
    let tcp = serve(&["--write-timeout", "1s"]);
    let (unix, _dir) = serve_unix(&["--write-timeout", "1s"]);
    let least = Duration::from_millis(850);
    for first in [0, 1_000_000] {
        assert!(time_to_cut(&tcp, tcp.client(), 10 * TCP_BYTES, first) >= least, "after {first}");
    }
    assert!(time_to_cut(&unix, unix.client(), UNIX_BYTES, 0) >= least);
}

/// What the kernel's buffers take is not what the client reads.
#[test]
fn a_client_below_min_rate_is_cut_off_while_much_of_its_answer_is_in_the_kernel() {
    let tcp = serve(&[&LIMITS[..], &["--min-rate", "100KB"]].concat());
    let (unix, _dir) = serve_unix(&[&LIMITS[..], &["--min-rate", "100KB"]].concat());
    std::thread::scope(|scope| {
        for (server, bytes) in [(&tcp, TCP_BYTES), (&unix, UNIX_BYTES)] {
            scope.spawn(move || {
                let mut client = server.client();
                ask(&mut client, bytes, true);
                let begin = Instant::now();
                let mut taken = 0;
                // 40 KB a second at most.
                while let Some(n) = client.some(4_000) {
                    taken += n;
                    assert!(taken < bytes, "it came whole in {:?}", begin.elapsed());
                    pause(EVERY);
                }
                assert!(begin.elapsed() + EVERY >= WRITE_TIMEOUT, "{:?}", begin.elapsed());
            });
        }
    });
}

/// Also where each of them takes a connection to the plugin.
#[test]
fn slow_readers_hold_up_no_others_while_the_plugin_has_connections_left() {
    let (server, _dir) = serve_unix(&["--write-timeout", "1m", "--request-timeout", "3s"]);
    // Answers in frames of 1 MiB, of which the last byte is there at once.
    let ask_large = || {
        let mut client = server.client();
        client.send(b"GET /p/large?last=1&file=go HTTP/1.1\r\nhost: test\r\n\r\n");
        client
    };
    std::fs::write(server.site().data().join("plugin-data/p/go"), b"").unwrap();
    let mut slow: Vec<Client> = (0..3).map(|_| ask_large()).collect();
    wait_for("a connection for each of them and another", || {
        assert_eq!(server.get("/p/x").text(), "GET /x of p");
        (server.plugin("p")["process"]["connections"] == 4).then_some(())
    });
    // Once all of them are taken, who waits is told in time.
    slow.push(ask_large());
    wait_for("a request that waits in vain", || (server.get("/p/x").status == 504).then_some(()));
    slow.iter_mut().for_each(|client| assert_eq!(client.reply(false).body.len(), 1 << 20));
    assert_eq!(server.get("/p/x").text(), "GET /x of p");
}

/// A proxy reads as its client's connection takes it, which is in bursts.
#[test]
fn a_proxy_that_has_read_much_may_pause() {
    let (server, _dir) = serve_unix(&["--write-timeout", "1s", "--min-rate", "10KB"]);
    let mut client = server.client();
    ask(&mut client, UNIX_BYTES, true);
    let mut taken = 0;
    for _ in 0..3 {
        taken += client.bytes(200_000).len();
        pause(Duration::from_secs(4));
    }
    assert_eq!(taken + client.all(UNIX_BYTES).len(), UNIX_BYTES);
}

/// What the plugin has answered is sent while there is time to stop, though its client is slow.
#[test]
fn an_answer_that_a_slow_client_is_taking_goes_on_while_the_host_stops() {
    let (server, _dir) = serve_unix(&["--write-timeout", "1s"]);
    let mut client = server.client();
    // Little enough for the plugin to have answered, and more than the socket holds.
    let bytes = 450_000;
    ask(&mut client, bytes, true);
    server.signal("TERM");
    let mut taken = read_steadily(&mut client, Duration::from_secs(2), "while the host stops");
    taken += client.all(bytes).len();
    assert_eq!(taken, bytes);
    assert_eq!(server.ended().0.code(), Some(0));
}
