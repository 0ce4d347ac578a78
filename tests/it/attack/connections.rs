//! Connections that come in crowds, end before their time, or ask more than they read.

use crate::support::http::Client;
use crate::support::siege::{ATTACKER, Siege, Tally};
use std::net::Ipv4Addr;

/// What the host may grow by under an attack that sends much.
const GROWTH: u64 = 24 << 20;

/// Most connections from one address, unless another number is set.
const PER_ADDRESS: usize = 128;

#[test]
fn connections_that_are_reset_take_nothing_with_them() {
    let siege = Siege::new(&[]);
    let get = &b"GET /fake/sleep?s=0.05 HTTP/1.1\r\nhost: test\r\n\r\n"[..];
    let half = &b"POST /fake/echo HTTP/1.1\r\nhost: test\r\ncontent-length: 100\r\n\r\nhalf"[..];
    siege.withstand("reset before they are accepted, a third with a request", || {
        siege.server.signal("STOP");
        for number in 0..300 {
            let mut client = siege.attacker();
            client.send([&b""[..], get, half][number % 3]);
            client.reset();
        }
        siege.server.signal("CONT");
        "closed ×300"
    });
    for (name, bytes, times) in [
        ("reset right after connecting", &b""[..], 500),
        ("reset in the head", &get[..20], 200),
        ("reset in the body", half, 200),
        ("reset while the plugin is at work", get, 60),
    ] {
        siege.withstand(name, || {
            for _ in 0..times {
                let mut client = siege.attacker();
                client.try_send(bytes);
                client.reset();
            }
            format!("closed ×{times}")
        });
    }
}

#[test]
fn a_client_that_resets_in_the_middle_of_its_answer_takes_nothing_with_it() {
    let siege = Siege::new(&[]);
    siege.withstand("reset in the middle of a large answer", || {
        for _ in 0..40 {
            let mut client = siege.attacker();
            client.send(b"GET /fake/download?bytes=50000000 HTTP/1.1\r\nhost: test\r\n\r\n");
            assert_eq!(client.reply_head().status, 200);
            client.reset();
        }
        "closed ×40"
    });
}

/// Connections from several addresses, as many from each, all of them open before the first asks.
fn crowd(siege: &Siege, addresses: u8, each: usize) -> Vec<Client> {
    let from = |number: u8| Ipv4Addr::new(127, 0, 1, number);
    let sources = (1..=addresses).flat_map(|number| std::iter::repeat_n(from(number), each));
    sources.map(|source| Client::connect_from(source, siege.server.address())).collect()
}

/// Has every client ask, then reads every answer.
fn ask_all(clients: &mut [Client], tally: &mut Tally) {
    for client in clients.iter_mut() {
        client.send(b"GET /healthz HTTP/1.1\r\nhost: test\r\n\r\n");
    }
    for client in clients {
        let reply = client.reply(false);
        assert_eq!((reply.status, reply.text()), (200, "ok\n"));
        tally.add(reply.status);
    }
}

#[test]
fn a_burst_of_connections_is_served_and_those_behind_it_too() {
    let siege = Siege::new(&[]);
    siege.withstand("300 connections at once, kept idle, and 12 honest ones behind them", || {
        let mut tally = Tally::default();
        let mut idle = crowd(&siege, 5, 60);
        ask_all(&mut idle, &mut tally);
        let mut honest: Vec<Client> = (0..12).map(|_| siege.server.client()).collect();
        ask_all(&mut honest, &mut tally);
        // The idle ones are still served.
        ask_all(&mut idle, &mut tally);
        tally
    });
}

#[test]
fn an_address_that_takes_all_it_can_gets_its_share_and_no_more() {
    let siege = Siege::new(&[]);
    siege.withstand("200 connections at once from one address", || {
        let mut tally = Tally::default();
        let mut clients: Vec<Client> = (0..200).map(|_| siege.attacker()).collect();
        let mut refused = clients.split_off(PER_ADDRESS);
        ask_all(&mut clients, &mut tally);
        for client in &mut refused {
            let reply = client.reply(false);
            assert_eq!((reply.status, reply.header("retry-after"), reply.header("connection")), (503, Some("1"), Some("close")));
            assert!(client.is_closed());
            tally.add(reply.status);
        }
        tally
    });
    let log = siege.server.log();
    assert_eq!(log.matches("127.0.0.2 has 128 connections, and another was refused").count(), 1, "it is said once:\n{log}");
}

#[test]
fn those_who_ask_nothing_make_place_when_places_are_few() {
    let siege = Siege::new(&["--max-connections", "100"]);
    siege.withstand("nearly all places taken, by clients of 10 addresses that ask nothing", || {
        let mut clients = crowd(&siege, 10, 9);
        let mut tally = Tally::default();
        // Above three quarters an idle connection is kept for half a second.
        for client in &mut clients {
            assert!(client.rest().is_empty());
            tally.add("closed");
        }
        tally
    });
}

/// One of many requests, which can be told from the others by its answer.
fn numbered(number: usize) -> String {
    format!("GET /fake/{number} HTTP/1.1\r\nhost: test\r\n\r\n")
}

#[test]
fn pipelined_requests_are_answered_in_order_and_do_not_pile_up() {
    const ALL: usize = 200_000;
    const READ: usize = 1_500;
    let siege = Siege::new(&[]);
    let before = siege.server.memory("VmHWM");
    siege.withstand("200 000 pipelined requests", || {
        let mut client = siege.attacker();
        let mut writer = client.writer();
        std::thread::scope(|scope| {
            // Ends with the connection.
            scope.spawn(move || {
                (0..ALL).step_by(500).all(|from| {
                    let requests: String = (from..from + 500).map(numbered).collect();
                    writer.try_send(requests.as_bytes())
                })
            });
            for number in 0..READ {
                let reply = client.reply(false);
                assert_eq!((reply.status, reply.text()), (200, format!("GET /{number} of fake").as_str()));
            }
            client.end_sending();
        });
        client.reset();
        format!("{READ} answered in order until the client left")
    });
    let grown = siege.server.memory("VmHWM") - before;
    assert!(grown < GROWTH, "the host grew by {grown} bytes");
}

#[test]
fn pipelined_requests_whose_answers_nobody_reads_are_not_taken() {
    let siege = Siege::new(&["--write-timeout", "1s"]);
    let before = siege.server.memory("VmHWM");
    siege.withstand("200 000 pipelined requests, no answer read", || {
        let mut clients: Vec<Client> = (0..2).map(|_| Client::connect_narrow(ATTACKER, siege.server.address())).collect();
        std::thread::scope(|scope| {
            for client in &mut clients {
                scope.spawn(|| {
                    let requests = "GET /healthz HTTP/1.1\r\nhost: test\r\n\r\n".repeat(1000);
                    let sent = (0..200).take_while(|_| client.try_send(requests.as_bytes())).count();
                    assert!(sent < 200, "all were taken");
                });
            }
        });
        "cut ×2"
    });
    let grown = siege.server.memory("VmHWM") - before;
    assert!(grown < GROWTH, "the host grew by {grown} bytes");
}
