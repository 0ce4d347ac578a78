//! Heads that ask for too much, or for another protocol.

use crate::support::http::Client;
use crate::support::siege::{FEW, ROUNDS, Siege, Tally};

/// How often each attack is tried: more than the files that come and go at rest could hide.
const TIMES: usize = 30;

/// More memory than any host has, as the length of a body: 64 GiB.
const GIGANTIC: u64 = 64 << 30;

/// What the host may grow by under an attack that sends much: nothing of it is to be kept.
const GROWTH: u64 = 16 << 20;

/// Sends the same again and again, on a connection each, and reads the answers, which must each be the only one on it.
fn send_each(siege: &Siege, request: &[u8], tally: &mut Tally) {
    let mut clients: Vec<Client> = (0..TIMES).map(|_| siege.attacker()).collect();
    for client in &mut clients {
        client.send(request);
    }
    for client in &mut clients {
        let reply = client.reply(false);
        tally.add(reply.status);
        let rest = client.rest();
        assert!(rest.is_empty(), "{} is followed by {}", reply.status, rest.escape_ascii());
    }
}

/// Attacks with one request, which must be answered with one status, and its connection end.
fn refused(siege: &Siege, name: &str, request: &[u8], status: u16) {
    siege.withstand(name, || {
        let mut tally = Tally::default();
        send_each(siege, request, &mut tally);
        assert_eq!(tally.to_string(), format!("{status} ×{TIMES}"), "{name}");
        tally
    });
}

#[test]
fn a_length_that_no_memory_holds_is_refused_and_nothing_is_set_aside() {
    let siege = Siege::new(&[]);
    let before = siege.server.memory("VmHWM");
    let head = format!("POST /fake/echo HTTP/1.1\r\nhost: test\r\ncontent-length: {GIGANTIC}\r\n");
    refused(&siege, "content-length of 64 GiB and no body", format!("{head}\r\n").as_bytes(), 413);
    refused(&siege, "the same, expecting to be told to go on", format!("{head}expect: 100-continue\r\n\r\n").as_bytes(), 413);
    let grown = siege.server.memory("VmHWM") - before;
    assert!(grown < GROWTH, "the host grew by {grown} bytes");
}

/// Where the operator allows it, a large body is passed on as it comes; the library behind the gate would set aside what is left of it.
#[test]
fn a_length_that_no_memory_holds_is_not_believed_where_it_is_allowed() {
    let siege = Siege::new(&["--max-body", "1TiB", "--body-buffer", "64KiB", "--body-timeout", "1s"]);
    let before = siege.server.memory("VmHWM");
    // An answer before the end of the body is looked for as more of the body comes, so it may be too late here.
    for (name, path, statuses) in [
        ("64 GiB announced and allowed, answered early, nothing more sent", "early", &[408, 413][..]),
        ("64 GiB announced and allowed, nothing more sent", "upload", &[408]),
    ] {
        siege.withstand(name, || {
            let mut tally = Tally::default();
            for _ in 0..ROUNDS {
                let mut clients: Vec<Client> = (0..FEW).map(|_| siege.attacker()).collect();
                for client in &mut clients {
                    let head = format!("POST /fake/{path} HTTP/1.1\r\nhost: test\r\ncontent-length: {GIGANTIC}\r\n\r\n");
                    client.send(head.as_bytes());
                    client.send(&[b'x'; 70_000]);
                }
                for client in &mut clients {
                    let reply = client.reply(false);
                    assert!(statuses.contains(&reply.status), "{reply:?}");
                    tally.add(reply.status);
                    assert!(client.is_closed());
                }
            }
            tally
        });
    }
    let grown = siege.server.memory("VmHWM") - before;
    assert!(grown < GROWTH, "the host grew by {grown} bytes");
}

#[test]
fn http_2_is_told_that_it_is_not_spoken_here() {
    let siege = Siege::new(&[]);
    refused(&siege, "GET / HTTP/2.0", b"GET / HTTP/2.0\r\nhost: test\r\n\r\n", 505);
    refused(&siege, "GET / HTTP/2.0, no more of it", b"GET / HTTP/2.0\r\n", 505);
    refused(&siege, "the preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0", 505);
}

/// A list of what the client would take, with weights that are no numbers.
#[test]
fn a_te_with_many_elements_and_no_numbers_is_passed_over() {
    let siege = Siege::new(&[]);
    let elements: Vec<String> =
        (0..40).map(|number| format!("x{number};q={}", ["NaN", "nan", "-1", "inf", "1e999"][number % 5])).collect();
    let request = format!("GET /fake/request HTTP/1.1\r\nhost: test\r\nte: {}\r\nconnection: close\r\n\r\n", elements.join(", "));
    siege.withstand("te with 40 elements, of which q is NaN", || {
        let mut tally = Tally::default();
        for _ in 0..TIMES {
            let mut client = siege.attacker();
            client.send(request.as_bytes());
            let reply = client.reply(false);
            assert!(reply.status == 200 && !reply.text().contains("NaN"), "{reply:?}");
            tally.add(reply.status);
        }
        tally
    });
}

/// Sends without end what begins so, as far as it is taken, and reads the answer.
fn pour(siege: &Siege, begin: &[u8], piece: &[u8], total: usize) -> String {
    let mut client = siege.attacker();
    client.send(begin);
    let piece = piece.repeat((64 << 10) / piece.len());
    let mut sent = 0;
    while sent < total && client.try_send(&piece) {
        sent += piece.len();
    }
    let reply = client.reply(false);
    assert!(client.rest().is_empty());
    reply.status.to_string()
}

#[test]
fn a_head_without_end_is_refused_and_not_kept() {
    let siege = Siege::new(&[]);
    let before = siege.server.memory("VmHWM");
    for (name, begin, piece, total, status) in [
        ("a request line of 64 MiB", &b"GET /"[..], &b"a"[..], 64 << 20, "414"),
        ("a header of 64 MiB", b"GET / HTTP/1.1\r\nx: ", b"a", 64 << 20, "431"),
        ("a million headers", b"GET / HTTP/1.1\r\nhost: test\r\n", b"a: b\r\n", 6_000_000, "431"),
        ("a method of 64 MiB", b"A", b"A", 64 << 20, "501"),
        ("64 MiB of empty lines", b"\r\n", b"\r\n", 64 << 20, "400"),
    ] {
        siege.withstand(name, || {
            let answered = pour(&siege, begin, piece, total);
            assert_eq!(answered, status, "{name}");
            answered
        });
    }
    let grown = siege.server.memory("VmHWM") - before;
    assert!(grown < GROWTH, "the host grew by {grown} bytes");
}
