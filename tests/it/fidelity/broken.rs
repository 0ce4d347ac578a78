//! Applications that break the rules: each client gets one answer, the plugin's log has the reason, and the next request is answered right.

use super::sides::{App, client, get, hear, host_before};
use super::wire::Wire;
use crate::support::{Server, wait_for};
use std::collections::BTreeMap;
use std::fs;

/// What a client gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Gets {
    /// 502.
    BadGateway,
    /// The beginning of an answer that is visibly cut.
    Cut,
    /// The answer, of this status, and nothing of what follows it.
    First(u16),
}

use Gets::{BadGateway, Cut, First};

/// Name, bytes of the application, whether it then keeps the connection open, what the client gets, and what the log says of it.
type Case = (&'static str, &'static [u8], bool, Gets, &'static str);

const CASES: [Case; 60] = [
    ("nothing", b"", false, BadGateway, "the connection was closed before it answered"),
    ("garbage", b"hello, world\r\n\r\n", true, BadGateway, "not valid HTTP"),
    ("binary", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", true, BadGateway, "not valid HTTP"),
    ("http2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", true, BadGateway, "not valid HTTP"),
    ("http2-frames", b"\0\0\x12\x04\0\0\0\0\0", true, BadGateway, "not valid HTTP"),
    ("version-2", b"HTTP/2 200 OK\r\ncontent-length: 2\r\n\r\nok", true, BadGateway, "not valid HTTP"),
    ("version-1.2", b"HTTP/1.2 200 OK\r\ncontent-length: 2\r\n\r\nok", true, BadGateway, "not valid HTTP"),
    ("version-0.9", b"<html>ok</html>", false, BadGateway, "not valid HTTP"),
    ("lower-case-version", b"http/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", true, BadGateway, "not valid HTTP"),
    ("empty-lines-before", b"\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", true, BadGateway, "not valid HTTP"),
    ("half-version", b"HTT", false, BadGateway, "closed the connection after 3 bytes of the head"),
    ("half-head", b"HTTP/1.1 200 OK\r\ncontent-le", false, BadGateway, "closed the connection after 27 bytes of the head"),
    ("no-end-of-head", b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n", false, BadGateway, "of the head"),
    ("no-status", b"HTTP/1.1 \r\ncontent-length: 0\r\n\r\n", true, BadGateway, "not valid HTTP"),
    ("status-of-words", b"HTTP/1.1 OK 200\r\ncontent-length: 0\r\n\r\n", true, BadGateway, "not valid HTTP"),
    ("status-20", b"HTTP/1.1 20 OK\r\ncontent-length: 0\r\n\r\n", true, BadGateway, "not valid HTTP"),
    ("status-2000", b"HTTP/1.1 2000 OK\r\ncontent-length: 0\r\n\r\n", true, BadGateway, "not valid HTTP"),
    ("status-000", b"HTTP/1.1 000 OK\r\ncontent-length: 0\r\n\r\n", true, BadGateway, "the status of its response is 0"),
    ("status-099", b"HTTP/1.1 099 OK\r\ncontent-length: 0\r\n\r\n", true, BadGateway, "the status of its response is 99"),
    ("status-600", b"HTTP/1.1 600 OK\r\ncontent-length: 0\r\n\r\n", true, BadGateway, "the status of its response is 600"),
    ("status-999", b"HTTP/1.1 999 OK\r\ncontent-length: 0\r\n\r\n", true, BadGateway, "the status of its response is 999"),
    ("switched", b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", true, BadGateway, "switched to another protocol"),
    ("only-interim", b"HTTP/1.1 103 Early Hints\r\n\r\n", false, BadGateway, "the connection was closed before it answered"),
    ("short", b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhello", false, Cut, "the answer was cut short"),
    ("short-of-all", b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n", false, Cut, "the answer was cut short"),
    ("long", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok and more", true, First(200), "9 bytes came behind the answer"),
    ("two-lengths", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nokk", true, BadGateway, "two values of content-length"),
    ("length-list", b"HTTP/1.1 200 OK\r\ncontent-length: 2, 2\r\n\r\nok", true, BadGateway, "content-length \"2, 2\" is no number"),
    ("length-negative", b"HTTP/1.1 200 OK\r\ncontent-length: -2\r\n\r\nok", true, BadGateway, "is no number"),
    ("length-plus", b"HTTP/1.1 200 OK\r\ncontent-length: +2\r\n\r\nok", true, BadGateway, "is no number"),
    ("length-hex", b"HTTP/1.1 200 OK\r\ncontent-length: 0x2\r\n\r\nok", true, BadGateway, "is no number"),
    ("length-empty", b"HTTP/1.1 200 OK\r\ncontent-length:\r\n\r\nok", true, BadGateway, "is no number"),
    ("length-huge", b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999\r\n\r\nok", true, BadGateway, "is no number"),
    ("length-and-chunked", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", true, BadGateway, "both content-length and transfer-encoding"),
    ("chunked-twice", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", true, BadGateway, "the only one that the host reads"),
    ("gzip-chunked", b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n", true, BadGateway, "the only one that the host reads"),
    ("identity", b"HTTP/1.1 200 OK\r\ntransfer-encoding: identity\r\ncontent-length: 2\r\n\r\nok", true, BadGateway, "the only one that the host reads"),
    ("chunk-size-words", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\nok\r\n0\r\n\r\n", true, BadGateway, "framing of its response is malformed"),
    ("chunk-size-hex", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0x2\r\nok\r\n0\r\n\r\n", true, BadGateway, "framing of its response is malformed"),
    ("chunk-size-negative", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n-2\r\nok\r\n0\r\n\r\n", true, BadGateway, "framing of its response is malformed"),
    ("chunk-size-huge", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\nok\r\n", true, BadGateway, "framing of its response is malformed"),
    ("chunk-too-long", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nokay\r\n0\r\n\r\n", true, BadGateway, "framing of its response is malformed"),
    ("chunk-cut", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\na\r\nhello", false, Cut, "the answer was cut short"),
    ("chunked-without-end", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n", false, Cut, "the answer was cut short"),
    ("chunked-of-nothing", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", false, Cut, "the answer was cut short"),
    ("trailers-cut", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nx-a: 1", false, Cut, "the answer was cut short"),
    ("nul-in-value", b"HTTP/1.1 200 OK\r\nx-a: b\0c\r\ncontent-length: 0\r\n\r\n", true, BadGateway, "not valid HTTP"),
    ("nul-in-name", b"HTTP/1.1 200 OK\r\nx\0a: b\r\ncontent-length: 0\r\n\r\n", true, BadGateway, "not valid HTTP"),
    ("control-in-value", b"HTTP/1.1 200 OK\r\nx-a: b\x01c\r\ncontent-length: 0\r\n\r\n", true, BadGateway, "not valid HTTP"),
    ("folded", b"HTTP/1.1 200 OK\r\nx-a: b\r\n c\r\ncontent-length: 0\r\n\r\n", true, BadGateway, "not valid HTTP"),
    ("space-before-colon", b"HTTP/1.1 200 OK\r\ncontent-length : 2\r\n\r\nok", true, BadGateway, "not valid HTTP"),
    ("no-colon", b"HTTP/1.1 200 OK\r\nnothing here\r\ncontent-length: 0\r\n\r\n", true, BadGateway, "not valid HTTP"),
    ("no-name", b"HTTP/1.1 200 OK\r\n: a\r\ncontent-length: 0\r\n\r\n", true, BadGateway, "not valid HTTP"),
    ("cr-in-value", b"HTTP/1.1 200 OK\r\nx-a: b\rset-cookie: c=d\r\ncontent-length: 0\r\n\r\n", true, BadGateway, "not valid HTTP"),
    ("cr-in-reason", b"HTTP/1.1 200 O\rK\r\ncontent-length: 0\r\n\r\n", true, BadGateway, "not valid HTTP"),
    ("two-answers", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nsecond", true, First(200), "44 bytes came behind the answer"),
    ("body-of-204", b"HTTP/1.1 204 No Content\r\ncontent-length: 5\r\n\r\nhello", true, First(204), "5 bytes came behind the answer"),
    ("body-of-304", b"HTTP/1.1 304 Not Modified\r\n\r\nhello", true, First(304), "5 bytes came behind the answer"),
    ("split", b"HTTP/1.1 302 Found\r\nlocation: /a\r\ncontent-length: 0\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil\r\ncontent-length: 0\r\n\r\n", true, First(302), "bytes came behind the answer"),
    ("garbage-behind-chunks", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", true, First(200), "19 bytes came"),
];

fn logged(server: &Server, id: &str) -> Vec<String> {
    let log = fs::read_to_string(server.site().data().join(format!("logs/{id}.log"))).unwrap_or_default();
    log.lines().map(str::to_owned).collect()
}

/// Sends a request. Returns its outcome, and whether the connection can take another one.
fn outcome(wire: &mut Wire, method: &str, name: &str) -> (Gets, bool) {
    wire.send(format!("{method} /broken/{name} HTTP/1.1\r\nhost: app.test\r\n\r\n").as_bytes());
    let heard = hear(wire, method).unwrap_or_else(|| panic!("{name}: no answer"));
    let gets = match heard.status() {
        502 => BadGateway,
        _ if !heard.content.complete => Cut,
        status => First(status),
    };
    (gets, heard.content.complete && heard.head.header("connection") != Some("close"))
}

#[test]
fn a_broken_answer_is_one_answer_one_line_and_no_harm_to_the_next_request() {
    let cases: BTreeMap<_, _> = CASES.iter().map(|case| (case.0, case)).collect();
    let app = App::start(move |wire, head| {
        let (_, answer, keeps, ..) = cases[head.target().trim_start_matches("/broken/")];
        wire.send(answer) && *keeps
    });
    let server = host_before(&app, &[]);
    let mut faults = Vec::new();
    for (name, _, _, gets, says) in CASES {
        for method in ["GET", "POST"] {
            let before = logged(&server, "app").len();
            let mut wire = client(&server);
            // The application's connection is used already.
            assert_eq!(super::ask(&mut wire, &get("/ok/before")).text(), "ok /ok/before");
            let (got, is_kept) = outcome(&mut wire, method, name);
            if got != gets {
                faults.push(format!("{method} {name}: {got:?} and not {gets:?}"));
            }
            if !is_kept {
                assert!(wire.is_over(), "{method} {name}: nothing follows");
                wire = client(&server);
            }
            let next = super::ask(&mut wire, &get("/ok/next"));
            if next.text() != "ok /ok/next" {
                faults.push(format!("{method} {name}: the next answer is {next:?}"));
            }
            // Of an answer that is cut, the client learns first.
            wait_for("the line in the log", || (logged(&server, "app").len() > before).then_some(()));
            let lines = logged(&server, "app").split_off(before);
            if lines.len() != 1 || !lines[0].contains(says) || !lines[0].contains(&format!("/broken/{name}")) {
                faults.push(format!("{method} {name}: {lines:#?} and not {says:?}"));
            }
            app.seen();
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}
