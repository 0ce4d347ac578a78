//! Clients that are slow: to send, or to read.

use crate::support::http::{Client, Reply};
use crate::support::siege::{ATTACKER, FEW, ROUNDS, Siege, Tally};
use crate::support::{pause, wait_for};
use std::time::Duration;

/// Short times, and a rate that no attacker here has.
const SETTINGS: [&str; 8] = ["--head-timeout", "1s", "--body-timeout", "1s", "--write-timeout", "1s", "--min-rate", "10MiB"];

/// Slow clients at a time, fewer than one address may have.
const CROWD: usize = 60;

/// Pause between the bytes of a client that drips.
const DRIP: Duration = Duration::from_millis(50);

/// What the host may grow by for clients that do not read: some of each answer waits, at every station of it.
const GROWTH: u64 = 64 << 20;

const GET: &[u8] = b"GET /fake/x HTTP/1.1\r\nhost: test\r\nx: ";
const POST: &[u8] = b"POST /fake/echo HTTP/1.1\r\nhost: test\r\ncontent-length: 5000\r\n\r\n";
const CHUNKED: &[u8] = b"POST /fake/echo HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n1388\r\n";

/// Reads the one answer that each client is to get, after which its connection ends.
fn read_refusals(clients: &mut [Client]) -> Tally {
    let mut tally = Tally::default();
    for client in clients {
        let reply: Reply = client.reply(false);
        assert_eq!((reply.status, reply.header("connection")), (408, Some("close")), "{reply:?}");
        assert!(client.rest().is_empty());
        tally.add(reply.status);
    }
    tally
}

#[test]
fn who_stops_sending_is_told_and_ended() {
    let siege = Siege::new(&SETTINGS);
    for (name, begin) in
        [("heads that do not come to their end", GET), ("bodies that do not come", POST), ("chunks that do not come", CHUNKED)]
    {
        siege.withstand(name, || {
            let mut clients: Vec<Client> = (0..CROWD).map(|_| siege.attacker()).collect();
            clients.iter_mut().for_each(|client| client.send(begin));
            read_refusals(&mut clients)
        });
    }
}

/// A byte comes again and again, so that whoever counts anew with each never ends.
#[test]
fn who_drips_is_told_and_ended() {
    let siege = Siege::new(&SETTINGS);
    for (name, begin) in [("dripped heads", GET), ("dripped bodies", POST), ("dripped chunks", CHUNKED)] {
        siege.withstand(name, || {
            let mut clients: Vec<Client> = (0..CROWD).map(|_| siege.attacker()).collect();
            clients.iter_mut().for_each(|client| client.send(begin));
            wait_for("the host to end connections on which something still comes", || {
                pause(DRIP);
                // Each gets its byte, whether the others still do or not.
                let taken = clients.iter_mut().filter_map(|client| client.try_send(b"a").then_some(())).count();
                (taken == 0).then_some(())
            });
            read_refusals(&mut clients)
        });
    }
}

/// Has clients that take little at a time ask for much, and gives them once the answers have begun.
fn askers(siege: &Siege, count: usize) -> Vec<Client> {
    let mut clients: Vec<Client> = (0..count).map(|_| Client::connect_narrow(ATTACKER, siege.server.address())).collect();
    for client in &mut clients {
        client.send(b"GET /fake/download?bytes=100000000 HTTP/1.1\r\nhost: test\r\n\r\n");
    }
    clients
}

#[test]
fn who_does_not_read_is_cut_off_and_the_answer_is_not_kept_for_them() {
    let siege = Siege::new(&SETTINGS);
    let before = siege.server.memory("VmHWM");
    siege.withstand("answers of 100 MB that nobody reads", || {
        let mut tally = Tally::default();
        for mut client in (0..ROUNDS).flat_map(|_| askers(&siege, FEW)) {
            assert_eq!(client.reply_head().status, 200);
            wait_for("the host to cut the connection", || (!client.try_send(b" ")).then_some(()));
            assert!(client.rest().len() < 100_000_000);
            tally.add("cut");
        }
        tally
    });
    let grown = siege.server.memory("VmHWM") - before;
    assert!(grown < GROWTH, "the host grew by {grown} bytes");
}

#[test]
fn who_reads_by_drips_is_cut_off() {
    let siege = Siege::new(&SETTINGS);
    siege.withstand("answers of 100 MB read by drips", || {
        let mut tally = Tally::default();
        std::thread::scope(|scope| {
            let clients = askers(&siege, FEW).into_iter();
            let drips: Vec<_> = clients
                .map(|mut client| {
                    scope.spawn(move || {
                        let mut taken = 0;
                        while let Some(bytes) = client.some(4096) {
                            taken += bytes;
                            pause(DRIP);
                        }
                        taken
                    })
                })
                .collect();
            for drip in drips {
                assert!(drip.join().unwrap() < 100_000_000);
                tally.add("cut");
            }
        });
        tally
    });
}
