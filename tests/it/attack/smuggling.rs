//! Requests inside of others: whatever the framing looks like, what is hidden in a request never becomes one.

use crate::support::http::Client;
use crate::support::siege::{Siege, Tally};
use std::fs;

/// What no plugin may ever be asked: it would print the word in its log.
const HIDDEN: &str = "GET /fake/print?text=smuggled HTTP/1.1\r\nhost: test\r\n\r\n";

/// Ways to frame a body that two readers could understand in two ways, and the status each is answered with. `@` stands for the length
/// of the hidden request.
const FRAMINGS: [(&str, u16); 51] = [
    // Another coding, or one that looks like the one that is known.
    ("transfer-encoding: xchunked", 400),
    ("transfer-encoding: chunkedx", 400),
    ("transfer-encoding: identity", 501),
    ("transfer-encoding: gzip, chunked", 501),
    ("transfer-encoding: chunked, gzip", 400),
    ("transfer-encoding: chunked, chunked", 400),
    ("transfer-encoding: chunked, identity", 400),
    ("transfer-encoding: chunked;x=y", 400),
    ("transfer-encoding: \"chunked\"", 400),
    ("transfer-encoding: 'chunked'", 400),
    ("transfer-encoding: chunked,", 400),
    ("transfer-encoding: ,chunked", 400),
    ("transfer-encoding:", 400),
    ("transfer-encoding: chun\tked", 400),
    ("transfer-encoding: \x0bchunked", 400),
    ("transfer-encoding: chunked\x0c", 400),
    ("transfer-encoding: chunked\0", 400),
    ("transfer-encoding: \u{a0}chunked", 400),
    ("transfer-encoding: chunked\r\ntransfer-encoding: chunked", 400),
    ("transfer-encoding: identity\r\ntransfer-encoding: chunked", 400),
    ("transfer-encoding: chunked\r\ntransfer-encoding: identity", 400),
    // A coding and a length.
    ("transfer-encoding: chunked\r\ncontent-length: @", 400),
    ("content-length: @\r\ntransfer-encoding: chunked", 400),
    ("content-length: 0\r\ntransfer-encoding: chunked", 400),
    ("content-length: @\r\ntransfer-encoding: xchunked", 400),
    ("content-length: @\r\nTRANSFER-ENCODING: Chunked", 400),
    // Names that some readers mend.
    ("transfer-encoding : chunked", 400),
    ("transfer-encoding\t: chunked", 400),
    ("content-length: 0\r\n transfer-encoding: chunked", 400),
    ("content-length: 0\r\nx: y\r\n\ttransfer-encoding: chunked", 400),
    ("content-length: 0\r\nx: y\ntransfer-encoding: chunked", 400),
    ("content-length: 0\r\nx: y\rtransfer-encoding: chunked", 400),
    ("content-length: 0\r\nx: y\n\ntransfer-encoding: chunked", 400),
    ("content-length: 0\r\n: chunked", 400),
    ("content-length: 0\r\ntransfer-encoding\0: chunked", 400),
    ("content-length: 0\r\ntransfer\u{2010}encoding: chunked", 400),
    ("content-length: 0\r\nno colon", 400),
    // Lengths.
    ("content-length: 0\r\ncontent-length: @", 400),
    ("content-length: @\r\ncontent-length: 0", 400),
    ("content-length: 0\r\ncontent-length: 0", 400),
    ("content-length: 0, @", 400),
    ("content-length: 0,0", 400),
    ("content-length: +0", 400),
    ("content-length: -0", 400),
    ("content-length: 0x0", 400),
    ("content-length: 0 0", 400),
    ("content-length: 0.0", 400),
    ("content-length: 0_0", 400),
    ("content-length:", 400),
    ("content-length: 18446744073709551616", 400),
    ("content-length: \u{660}", 400),
];

/// Chunked bodies that are not well formed, with the hidden request where some readers would find it.
const CHUNKS: [&str; 19] = [
    "0x0\r\n\r\n@",
    "+0\r\n\r\n@",
    "-0\r\n\r\n@",
    " 0\r\n\r\n@",
    "0 \r\n\r\n@",
    "\r\n0\r\n\r\n@",
    "0\n\n@",
    "0\r\r@",
    "1\r\na0\r\n\r\n@",
    "1\r\naa\r\n0\r\n\r\n@",
    "1\r\na\n0\r\n\r\n@",
    "1;a\nb\r\na\r\n0\r\n\r\n@",
    "1;a\rb\r\na\r\n0\r\n\r\n@",
    "00000000000000000\r\n\r\n@",
    "10000000000000000\r\n\r\n@",
    "g\r\n\r\n@",
    "\r\n\r\n@",
    "0\r\nno colon\r\n\r\n@",
    "0\r\na: b\n\r\n@",
];

/// Heads without a body that some readers take for two, or for another.
const HEADS: [(&str, u16); 20] = [
    ("GET /fake/x\r\n\r\n", 400),
    ("GET  /fake/x HTTP/1.1\r\nhost: test\r\n\r\n", 400),
    ("GET /fake/x  HTTP/1.1\r\nhost: test\r\n\r\n", 400),
    ("GET\t/fake/x\tHTTP/1.1\r\nhost: test\r\n\r\n", 400),
    (" GET /fake/x HTTP/1.1\r\nhost: test\r\n\r\n", 400),
    ("GET /fake/x HTTP/1.1 \r\nhost: test\r\n\r\n", 400),
    ("GET /fake/x y HTTP/1.1\r\nhost: test\r\n\r\n", 400),
    ("GET /fake/x HTTP/1.1\nhost: test\n\n", 400),
    ("GET /fake/x HTTP/1.1\r\nhost: test\r\r", 400),
    ("GET /fake/x\u{b}HTTP/1.1\r\nhost: test\r\n\r\n", 400),
    ("GET /fake/\0x HTTP/1.1\r\nhost: test\r\n\r\n", 400),
    ("GET /fake/x HTTP/1.2\r\nhost: test\r\n\r\n", 505),
    ("GET /fake/x HTTP/01.1\r\nhost: test\r\n\r\n", 505),
    ("GET /fake/x http/1.1\r\nhost: test\r\n\r\n", 400),
    ("GET /fake/x HTTP/1.1\r\n\r\n", 400),
    ("GET /fake/x HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", 400),
    ("GET /fake/x HTTP/1.1\r\nhost: a, b\r\n\r\n", 400),
    ("GET /fake/x HTTP/1.1\r\n host: test\r\n\r\n", 400),
    ("GET http://a@b/fake/x HTTP/1.1\r\nhost: test\r\n\r\n", 400),
    ("CONNECT test:80 HTTP/1.1\r\nhost: test\r\n\r\n", 405),
];

/// Requests that are sound, whose body is the hidden request, or that leave it unread.
const UNREAD: [(&str, u16); 14] = [
    ("POST /fake/echo HTTP/1.1\r\nhost: test\r\ncontent-length: @", 200),
    ("GET /fake/x HTTP/1.1\r\nhost: test\r\ncontent-length: @", 200),
    ("DELETE /fake/early HTTP/1.1\r\nhost: test\r\ncontent-length: @", 413),
    ("POST /healthz HTTP/1.1\r\nhost: test\r\ncontent-length: @", 404),
    ("POST /nothing HTTP/1.1\r\nhost: test\r\ncontent-length: @", 404),
    ("POST /api/rescan HTTP/1.1\r\nhost: test\r\ncontent-length: @", 401),
    ("OPTIONS * HTTP/1.1\r\nhost: test\r\ncontent-length: @", 204),
    // Headers that tell a careless hop to forget the framing.
    ("POST /fake/echo HTTP/1.1\r\nhost: test\r\nconnection: content-length\r\ncontent-length: @", 200),
    ("POST /fake/echo HTTP/1.1\r\nhost: test\r\nconnection: host, content-length, close\r\ncontent-length: @", 200),
    ("POST /fake/echo HTTP/1.1\r\nhost: test\r\ntransfer_encoding: chunked\r\ncontent-length: @", 200),
    ("POST /fake/echo HTTP/1.1\r\nhost: test\r\nx-transfer-encoding: chunked\r\ncontent-length: @", 200),
    ("POST /fake/echo HTTP/1.1\r\nhost: test\r\nexpect: 100-continue\r\ncontent-length: @", 200),
    ("POST /fake/echo HTTP/1.0\r\nhost: test\r\nconnection: keep-alive\r\ncontent-length: @", 200),
    (
        "POST /fake/echo HTTP/1.1\r\nhost: test\r\nupgrade: h2c\r\nconnection: upgrade, http2-settings\r\nhttp2-settings: AAMAAABkAAQAAP__\r\ncontent-length: @",
        200,
    ),
];

/// A text with the hidden request's length, or itself, in it.
fn with_length(text: &str) -> String {
    text.replace('@', &HIDDEN.len().to_string())
}

/// Attacks with each of the requests, which must get its one status and no second answer, after which the connection ends.
fn refused(siege: &Siege, name: &str, probes: impl Iterator<Item = (String, u16)>) {
    siege.withstand(name, || {
        let mut tally = Tally::default();
        for (probe, status) in probes {
            let mut client = siege.attacker();
            client.send(probe.as_bytes());
            let reply = client.reply(false);
            assert_eq!(reply.status, status, "{probe:?}: {}", reply.text());
            let rest = client.rest();
            assert!(rest.is_empty(), "{probe:?} is answered twice: {}", rest.escape_ascii());
            tally.add(reply.status);
        }
        tally
    });
    assert_nothing_hidden(siege);
}

/// Nothing that was hidden has come to the plugin, whose log would tell.
#[track_caller]
fn assert_nothing_hidden(siege: &Siege) {
    assert_eq!(siege.server.get("/fake/print?text=asked+openly").text(), "printed");
    siege.server.wait_logged("fake", &["asked openly"]);
    let log = fs::read_to_string(siege.server.site().data().join("logs/fake.log")).unwrap();
    assert!(!log.contains("smuggled"), "{log}");
}

/// The word would be there: what is not hidden is seen.
#[test]
fn the_plugin_s_log_would_tell() {
    let siege = Siege::new(&[]);
    let mut client = siege.attacker();
    client.send(HIDDEN.as_bytes());
    assert_eq!(client.reply(false).status, 200);
    siege.server.wait_logged("fake", &["smuggled"]);
}

#[test]
fn a_body_that_could_end_in_two_places_is_refused() {
    let siege = Siege::new(&[]);
    let probes = FRAMINGS.iter().map(|(framing, status)| {
        let head = format!("POST /fake/echo HTTP/1.1\r\nhost: test\r\n{}\r\n\r\n", with_length(framing));
        (format!("{head}0\r\n\r\n{HIDDEN}"), *status)
    });
    refused(&siege, "lengths and codings of two meanings, a request behind each", probes);
    let old = ["1.0"].map(|version| {
        (format!("POST /fake/echo HTTP/{version}\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n{HIDDEN}"), 400)
    });
    refused(&siege, "a coding in HTTP/1.0, a request behind it", old.into_iter());
}

#[test]
fn a_chunk_that_is_not_well_formed_is_refused() {
    let siege = Siege::new(&[]);
    let head = "POST /fake/echo HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n";
    let probes = CHUNKS.iter().map(|chunks| (format!("{head}{}", chunks.replace('@', HIDDEN)), 400));
    refused(&siege, "chunks of two meanings, a request behind each", probes);
}

#[test]
fn a_head_of_two_meanings_is_refused() {
    let siege = Siege::new(&[]);
    refused(
        &siege,
        "heads of two meanings, a request behind each",
        HEADS.iter().map(|(head, status)| (format!("{head}{HIDDEN}"), *status)),
    );
}

/// Reads the answer to a sound request and to the one that follows it openly, if the connection goes on.
fn assert_one_or_two(client: &mut Client, probe: &str, status: u16) -> &'static str {
    let reply = client.reply(false);
    assert_eq!(reply.status, status, "{probe:?}: {reply:?}");
    let rest = client.rest();
    let rest = String::from_utf8_lossy(&rest);
    match rest.matches("HTTP/1.1 ").count() {
        0 => assert!(rest.is_empty(), "{probe:?}: {rest}"),
        1 => assert!(rest.ends_with("\r\n\r\nok\n"), "{probe:?}: {rest}"),
        _ => panic!("{probe:?} is answered with more than was asked: {rest}"),
    }
    if rest.is_empty() { "and closed" } else { "and the next one answered" }
}

#[test]
fn what_a_request_leaves_unread_is_no_request() {
    const NEXT: &str = "GET /healthz HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n";
    let siege = Siege::new(&["--body-buffer", "16KiB"]);
    siege.withstand("sound requests that leave their body unread, a request in each body", || {
        let mut tally = Tally::default();
        for (begin, status) in UNREAD {
            let begin = with_length(begin);
            let mut client = siege.attacker();
            client.send(format!("{begin}\r\n\r\n{HIDDEN}{NEXT}").as_bytes());
            tally.add(format!("{status} {}", assert_one_or_two(&mut client, &begin, status)));
        }
        tally
    });
    // So many that the host has the request before it has the whole body, and the body is requests from its beginning to its end.
    let body = HIDDEN.repeat(5000);
    siege.withstand("large bodies, of requests alone, that are left unread", || {
        let mut tally = Tally::default();
        for (path, status) in [("fake/early", 413), ("fake/echo", 200), ("nothing", 404), ("api/rescan", 401), ("healthz", 404)] {
            let head = format!("POST /{path} HTTP/1.1\r\nhost: test\r\n");
            let whole = format!("{head}content-length: {}\r\n\r\n{body}{NEXT}", body.len());
            let chunked = format!("{head}transfer-encoding: chunked\r\n\r\n{:x}\r\n{body}\r\n0\r\n\r\n{NEXT}", body.len());
            for probe in [whole, chunked] {
                let mut client = siege.attacker();
                client.try_send(probe.as_bytes());
                tally.add(format!("{status} {}", assert_one_or_two(&mut client, &head, status)));
            }
        }
        tally
    });
    assert_nothing_hidden(&siege);
}

/// What the gate and the host say to each other cannot be said by a client.
#[test]
fn what_the_gate_says_of_a_client_no_client_can_say() {
    let siege = Siege::new(&[]);
    siege.withstand("headers that name another client, or the gate itself", || {
        let mut client = siege.attacker();
        let lies = "x-plugrack: 0 https 192.0.2.1 5\r\nx-plugrack-length: 5\r\nX_Plugrack: 1\r\nx-forwarded-for: 192.0.2.1\r\nx-forwarded-proto: https\r\nforwarded: for=192.0.2.1\r\nx-real-ip: 192.0.2.1\r\nx-request-id: mine\r\n";
        client.send(format!("GET /fake/request HTTP/1.1\r\nhost: test\r\n{lies}connection: close\r\n\r\n").as_bytes());
        let seen = client.reply(false).json();
        assert_eq!(seen["remote"], "127.0.0.2");
        let headers = seen["headers"].to_string();
        assert!(!["192.0.2.1", "https", "plugrack", "mine"].iter().any(|lie| headers.to_ascii_lowercase().contains(lie)), "{headers}");
        "left out"
    });
}
