//! Plugins that would have the host write what it must not: to the client that asked, or to the next one on the connection.

use crate::support::http::Client;
use crate::support::siege::{Siege, Tally};
use crate::support::wait_for;

/// Asks for a path, and for another behind it on the same connection.
fn ask_two(siege: &Siege, path: &str) -> Client {
    let mut client = siege.attacker();
    let next = "GET /healthz HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n";
    client.send(format!("GET /fake{path} HTTP/1.1\r\nhost: test\r\n\r\n{next}").as_bytes());
    client
}

/// Asks for an answer that must not leave the host, and for what comes next on the connection.
#[track_caller]
fn assert_refused(siege: &Siege, path: &str, tally: &mut Tally) {
    let mut client = ask_two(siege, path);
    let reply = client.reply(false);
    assert_eq!(reply.status, 502, "{path}: {reply:?}");
    tally.add(reply.status);
    assert_eq!(client.reply(false).text(), "ok\n", "{path}");
    assert!(client.rest().is_empty(), "{path}");
}

#[test]
fn what_would_split_an_answer_never_leaves() {
    let siege = Siege::new(&[]);
    siege.withstand("CR, LF, NUL or no plain word in a plugin's header, statuses that are none", || {
        let mut tally = Tally::default();
        for path in [
            "/header?name=x-a&value=b%0d%0aset-cookie:+evil=1",
            "/header?name=x-a&value=b%0d%0a%0d%0aHTTP/1.1+200+OK%0d%0acontent-length:+4%0d%0a%0d%0aevil",
            "/header?name=x-a&value=b%0aset-cookie:+evil=1",
            "/header?name=x-a&value=b%0devil",
            "/header?name=x-a&value=b%00evil",
            "/header?name=x-a%0d%0aevil&value=1",
            "/header?name=x-a:evil&value=1",
            "/header?name=x-a%20evil&value=1",
            "/header?name=&value=evil",
            "/status?code=99",
            "/status?code=100",
            "/status?code=101",
            "/status?code=199",
            "/status?code=600",
            "/status?code=1000",
            "/status?code=-200",
        ] {
            assert_refused(&siege, path, &mut tally);
        }
        tally
    });
}

#[test]
fn a_plugin_that_lies_about_an_answer_s_length_disturbs_nobody_else() {
    let siege = Siege::new(&[]);
    siege.withstand("a length that is not the body's, known before the answer is begun", || {
        let mut tally = Tally::default();
        for path in [
            "/length?length=4",
            "/length?length=6",
            "/length?length=99999999999999999999",
            "/length?length=-5",
            "/length?length=5,5",
            "/length?length=0x5",
        ] {
            assert_refused(&siege, path, &mut tally);
        }
        tally
    });
    for (name, path) in [
        ("a body longer than its length", "/download?bytes=300000&declared=299999"),
        ("a body shorter than its length", "/download?bytes=300000&declared=300001"),
    ] {
        siege.withstand(name, || {
            let mut tally = Tally::default();
            for _ in 0..10 {
                assert_cut(&mut ask_two(&siege, path), 300_000);
                tally.add("cut");
            }
            tally
        });
    }
}

/// What comes is the beginning of one answer, which can be seen not to be whole, and nothing else.
#[track_caller]
fn assert_cut(client: &mut Client, most: usize) {
    let head = client.reply_head();
    assert_eq!(head.status, 200, "{head:?}");
    let rest = client.rest();
    let seen = String::from_utf8_lossy(&rest);
    match head.header("content-length") {
        Some(length) => assert!(rest.len() < length.parse().unwrap() && rest.len() <= most, "{} bytes of {length}", rest.len()),
        None => assert!(!seen.ends_with("0\r\n\r\n"), "{seen:?}"),
    }
    assert!(!seen.contains("HTTP/1.1") && !seen.contains("ok\n"), "another answer is in it");
}

#[test]
fn an_answer_that_breaks_off_is_seen_to_be_broken_and_nothing_follows_it() {
    let siege = Siege::new(&[]);
    for (name, path) in [
        ("a plugin dies in the middle of an answer without a length", "/break"),
        ("a plugin dies in the middle of an answer with a length", "/break?length"),
    ] {
        siege.withstand(name, || {
            let ready = || (siege.server.get("/fake/x").status == 200).then_some(());
            wait_for("the plugin to answer", ready);
            assert_cut(&mut ask_two(&siege, path), 8);
            // It stands up again.
            wait_for("the plugin to answer again", ready);
            "cut ×1"
        });
    }
}
