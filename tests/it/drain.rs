//! SIGTERM under load: whoever was heard is answered, whoever was not is told by a connection that is refused.

use crate::support::http::Client;
use crate::support::{PATIENCE, Server, Site, command, pause, wait_for};
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Stdio;
use std::time::{Duration, Instant};

/// Rounds of each kind, or `PLUGRACK_ROUNDS`: a request is lost in a moment that one round may not meet.
const ROUNDS: usize = 3;

/// Time under load before the host is told to stop.
const LOAD: Duration = Duration::from_millis(400);

fn rounds() -> usize {
    std::env::var("PLUGRACK_ROUNDS").map_or(ROUNDS, |rounds| rounds.parse().unwrap())
}

fn server_of_hello() -> Server {
    let server = Site::new().args(&["--max-connections-per-address", "512"]).example("hello").start();
    server.wait_state("hello", "ready");
    server
}

#[track_caller]
fn assert_ended(server: Server) {
    let (status, site) = server.ended();
    assert_eq!(status.code(), Some(0));
    let log = fs::read_to_string(site.data().join("host.log")).unwrap();
    assert!(!log.contains("panicked") && !log.contains("ERROR"), "{log}");
}

/// What wrk has counted of a kind of error.
fn counted(report: &str, kind: &str) -> u64 {
    let errors = report.lines().find(|line| line.trim_start().starts_with("Socket errors:"));
    let number =
        errors.and_then(|line| line.split_once(&format!("{kind} "))).map(|(_, rest)| rest.split([',', ' ']).next().unwrap());
    number.map_or(0, |number| number.parse().unwrap())
}

#[test]
fn wrk_counts_no_answer_that_is_cut_or_an_error() {
    for connection in ["keep-alive", "close"] {
        for round in 0..rounds() {
            let server = server_of_hello();
            let mut wrk = command("wrk");
            wrk.args(["-t2", "-c32", "-d2s", "--timeout", "5s", "-H", &format!("Connection: {connection}")]);
            let wrk = wrk.arg(format!("http://{}/hello", server.address())).stdout(Stdio::piped()).spawn();
            let mut wrk = wrk.expect("wrk is there: make test-tools");
            wait_for("the load", || {
                (server.plugin("hello")["process"]["answered"].as_u64().unwrap_or(1000) >= 100).then_some(())
            });
            pause(LOAD);
            assert!(wrk.try_wait().unwrap().is_none(), "it is at work");
            server.signal("TERM");
            // Once nobody listens connections are refused, which it counts as errors of writing.
            let report = wrk.wait_with_output().unwrap();
            let report = String::from_utf8(report.stdout).unwrap();
            let lost = ["read", "timeout"].map(|kind| counted(&report, kind));
            assert_eq!(lost, [0; 2], "{connection}, round {round}: {report}");
            assert!(!report.contains("Non-2xx"), "{connection}, round {round}: {report}");
            assert_ended(server);
        }
    }
}

/// How a client's last connection has ended.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    answered: usize,
    /// Requests on a new connection, or one not idle for long, without a whole answer of 200.
    lost: Vec<String>,
}

/// Sends requests one after the other until the host takes no more.
fn ask_on(address: SocketAddr, keeps: bool) -> Tally {
    let mut tally = Tally::default();
    let request = format!("GET /hello HTTP/1.1\r\nhost: test\r\n{}\r\n", if keeps { "" } else { "connection: close\r\n" });
    loop {
        let mut stream = match TcpStream::connect(address) {
            Ok(stream) => stream,
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => return tally,
            Err(error) => {
                tally.lost.push(format!("connecting: {error}"));
                return tally;
            }
        };
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        for number in 0.. {
            match answer(&mut stream, request.as_bytes()) {
                Ok((200, last)) => {
                    tally.answered += 1;
                    if last {
                        break;
                    }
                }
                Ok((status, _)) => tally.lost.push(format!("request {number}: status {status}")),
                Err(error) => {
                    tally.lost.push(format!("request {number}: {error}"));
                    break;
                }
            }
        }
    }
}

/// Sends a request and reads its answer whole: the status, and whether it is the last of its connection.
fn answer(stream: &mut TcpStream, request: &[u8]) -> Result<(u16, bool), String> {
    stream.write_all(request).map_err(|error| format!("sending: {error}"))?;
    let mut got = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let n =
            stream.read(&mut buffer).map_err(|error| format!("reading: {error}, after {:?}", got.escape_ascii().to_string()))?;
        if n == 0 {
            return Err(format!("an end after {:?}", got.escape_ascii().to_string()));
        }
        got.extend_from_slice(&buffer[..n]);
        let text = String::from_utf8_lossy(&got);
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let head = head.to_ascii_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).ok_or("no length")?;
        if body.len() == length.parse::<usize>().unwrap() {
            return Ok((head[9..12].parse().unwrap(), head.contains("connection: close")));
        }
    }
}

#[test]
fn every_request_that_was_taken_is_answered() {
    let mut answered = 0;
    for round in 0..rounds() {
        let server = server_of_hello();
        let address = server.address();
        let tallies: Vec<Tally> = std::thread::scope(|scope| {
            let clients: Vec<_> = (0..24).map(|number| scope.spawn(move || ask_on(address, number % 2 == 0))).collect();
            pause(LOAD);
            server.signal("TERM");
            clients.into_iter().map(|client| client.join().unwrap()).collect()
        });
        let lost: Vec<_> = tallies.iter().flat_map(|tally| &tally.lost).collect();
        assert!(lost.is_empty(), "round {round}: {lost:?}");
        answered += tallies.iter().map(|tally| tally.answered).sum::<usize>();
        assert_ended(server);
    }
    assert!(answered > 100, "{answered}");
}

#[test]
fn streams_are_ended_idle_connections_closed_and_slow_requests_answered() {
    let server = Site::new().fake("p").start();
    server.wait_state("p", "ready");
    let mut events = server.client();
    events.begin_events();
    let mut idle: Vec<Client> = (0..8).map(|_| server.client()).collect();
    idle.iter_mut().skip(4).for_each(|client| assert_eq!(client.get("/healthz").status, 200));
    let mut slow = server.client();
    slow.send(b"GET /p/sleep?s=0.9 HTTP/1.1\r\nhost: test\r\n\r\n");
    wait_for("the plugin to be at it", || {
        fs::read_to_string(server.site().data().join("logs/p.log")).is_ok_and(|log| log.contains("sleeping")).then_some(())
    });
    let begun = Instant::now();
    server.signal("TERM");
    for client in &mut idle {
        assert!(client.rest().is_empty());
    }
    assert!(begun.elapsed() < Duration::from_millis(800), "the idle ones were not closed at once: {:?}", begun.elapsed());
    let reply = slow.reply(false);
    assert_eq!((reply.status, reply.text(), reply.header("connection")), (200, "slept", Some("close")));
    events.rest();
    assert_ended(server);
}

#[test]
fn a_request_behind_an_answer_begun_before_the_end_is_answered() {
    let server = Site::new().fake("p").start();
    server.wait_state("p", "ready");
    let mut client = server.client();
    let head = client.begin_events();
    assert_eq!((head.status, head.header("connection")), (200, None));
    // It was not told that this answer is its last.
    client.send(b"GET /p/1 HTTP/1.1\r\nhost: test\r\n\r\n");
    let mut ender = server.client();
    ender.send(b"GET /p/next?line=end HTTP/1.1\r\n");
    server.signal("TERM");
    let log = server.site().data().join("host.log");
    wait_for("the host to be told", || fs::read_to_string(&log).is_ok_and(|log| log.contains("] stopping")).then_some(()));
    ender.send(b"host: test\r\n\r\n");
    while client.body_piece(&head).is_some() {}
    let reply = client.reply(false);
    // By then the plugin may have been told to end.
    assert!(matches!(reply.status, 200 | 503), "{}", reply.status);
    assert_eq!(reply.header("connection"), Some("close"));
    assert_ended(server);
}
