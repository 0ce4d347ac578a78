//! The functions that every request passes. `make instructions` runs each a hundred times under callgrind, and compares the number of
//! instructions with `tests/bench/instructions.json`. As tests they only show that the function accepts its input, so that no refusal
//! is counted.
//!
//! callgrind counts within the functions that the tests call, so none of them may be inlined.

use crate::http::parse::fuzzing::LIMITS;
use crate::http::parse::request_head;
use crate::http::request::{self, BodyLength, Origin, Request};
use crate::plugins::routes::{Routes, Target};
use crate::protocol::frame::{FrameReader, encode};
use crate::protocol::message::{Http, KvOp, Message};
use crate::store::Store;
use crate::store::kv::Quota;
use std::hint::black_box;

/// Calls of each function.
const CALLS: usize = 100;

/// A request as a browser sends it.
const REQUEST: &[u8] = b"GET /bench/hello?a=1&b=2 HTTP/1.1\r\nHost: rack.example:8080\r\nConnection: keep-alive\r\n\
    User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 Safari/537.36\r\n\
    Accept: text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8\r\n\
    Accept-Encoding: gzip, deflate, br\r\nAccept-Language: en-US,en;q=0.9,de;q=0.8\r\nCookie: session=0123456789abcdef\r\n\r\n";

/// The message of such a request.
fn message() -> Http<'static> {
    let headers = [
        ("host", "rack.example:8080"),
        ("user-agent", "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko)"),
        ("accept", "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"),
        ("accept-encoding", "gzip, deflate, br"),
        ("cookie", "session=\"0123456789abcdef\""),
        ("x-forwarded-for", "192.0.2.1"),
        ("x-forwarded-proto", "https"),
        ("x-forwarded-prefix", "/bench"),
        ("x-request-id", "0123456789ab-1f"),
    ];
    Http {
        id: 7,
        method: "GET".into(),
        path: "/hello".into(),
        query: Some("a=1&b=2".into()),
        mount: "/bench".into(),
        headers: headers.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect(),
        remote: "192.0.2.1".into(),
        more: false,
    }
}

#[inline(never)]
fn encode_request(out: &mut Vec<u8>, request: &Request) {
    black_box(request).encode(7, false, out);
}

#[inline(never)]
fn decode_frame<'a>(frames: &'a mut FrameReader<&[u8]>) -> Message<'a> {
    frames.read().unwrap().message().unwrap()
}

#[inline(never)]
fn read_request(out: &mut Vec<u8>) -> usize {
    request_head::read(black_box(REQUEST), LIMITS, None, &mut 0, out).unwrap().unwrap().1
}

#[inline(never)]
fn find_route<'a>(routes: &'a Routes<usize>, path: &'a str) -> Target<'a, usize> {
    routes.resolve(black_box(path))
}

#[inline(never)]
fn get_key(store: &Store) -> Vec<u8> {
    store.kv("p", KvOp::Get { key: "key-50".into() }, b"").wait().unwrap().body
}

#[test]
fn encoding_a_request() {
    let mut head = Vec::new();
    read_request(&mut head);
    let origin = Origin { address: Some([192, 0, 2, 1].into()), https: true, proxied: false };
    let request = request::tests::request(head, "/bench".len(), BodyLength::Known(0), origin);
    for _ in 0..CALLS {
        let mut out = Vec::with_capacity(4096);
        encode_request(&mut out, &request);
        assert!(out.ends_with(b"}"));
    }
}

#[test]
fn decoding_a_frame() {
    let mut bytes = Vec::new();
    (0..CALLS).for_each(|_| encode(&mut bytes, &message(), b"").unwrap());
    let mut frames = FrameReader::new(&*bytes);
    for _ in 0..CALLS {
        assert_eq!(decode_frame(&mut frames), Message::Http(Box::new(message())));
    }
}

#[test]
fn reading_the_head_of_a_request() {
    for _ in 0..CALLS {
        let mut out = Vec::with_capacity(4096);
        assert_eq!(read_request(&mut out), REQUEST.len());
    }
}

#[test]
fn finding_the_route_among_300() {
    let routes = Routes::new((0..300).map(|number| (format!("/plugin-{number}"), number)).collect());
    for number in 0..CALLS {
        let path = format!("/plugin-{}/a", number * 3);
        assert!(matches!(find_route(&routes, &path), Target::Plugin { plugin, .. } if *plugin == number * 3));
    }
}

#[test]
fn getting_a_key() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(&directory.path().join("plugrack.db"), Quota { keys: 1000, bytes: 1 << 20 }).unwrap();
    for number in 0..100 {
        let set = format!(r#"{{"op":"set","key":"key-{number}"}}"#);
        store.kv("p", serde_json::from_str(&set).unwrap(), &[b'v'; 100]).wait().unwrap();
    }
    for _ in 0..CALLS {
        assert_eq!(get_key(&store), [b'v'; 100]);
    }
}
