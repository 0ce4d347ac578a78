//! What must be true of the parsers whatever they are given: the targets in `tests/fuzz` try it with what the fuzzer thinks
//! of, and the tests with what it once found.
//!
//! Each function takes any bytes, and panics when something does not hold. The bytes are all there is to know of a failure: how
//! they are cut, and what limits hold, follow from them. Where it can be said in few words what a parser should have made of its
//! input, that is said here a second time, in the plainest way, so that a mistake would have to be made twice.
//!
//! The fuzzer's package builds this file and the parsers without the rest of the host, so they use nothing else of it.

use super::super::http_error::HttpError;
use super::super::proxies::Networks;
use super::chunked::{Broken, Decoder};
use super::request_head::{self, Framing, Head, HeadLimits};
use crate::protocol::message::HOP_BY_HOP;

/// The limits that are usual.
pub(crate) const LIMITS: HeadLimits = HeadLimits { bytes: 16 * 1024, headers: 64 };

/// Longest input that is also given byte by byte, so that the fuzzer is not slowed down.
const DRIP: usize = 4 * 1024;

/// A number that looks drawn by lot, and is always the same for the same bytes: FNV-1a.
fn lot(bytes: &[u8]) -> usize {
    let hash =
        bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    usize::try_from(hash >> 33).unwrap_or_default()
}

/// Gives an input to a reader whole and in two pieces, or also byte by byte, which must come to the same.
fn in_pieces<T: PartialEq + std::fmt::Debug, E: PartialEq + std::fmt::Debug>(
    input: &[u8],
    byte_by_byte: bool,
    read: impl Fn(&[u8], &mut usize) -> Result<Option<T>, E>,
) -> Result<Option<T>, E> {
    let whole = read(input, &mut 0);
    let mut ways = vec![vec![lot(input) % (input.len() + 1), input.len()]];
    if byte_by_byte && input.len() <= DRIP {
        ways.push((0..=input.len()).collect());
    }
    for ends in ways {
        let mut searched = 0;
        let outcome = ends.into_iter().find_map(|end| read(&input[..end], &mut searched).transpose()).transpose();
        assert_eq!(outcome, whole, "cut into pieces, it is read in another way");
    }
    whole
}

/// Runs a reader with something in its output already, which it must leave there, and alone when it reads nothing.
fn appended<T, E>(run: impl FnOnce(&mut Vec<u8>) -> Result<Option<T>, E>) -> Result<Option<(T, Vec<u8>)>, E> {
    let mut out = b"before".to_vec();
    let outcome = run(&mut out);
    assert!(out.starts_with(b"before"), "what was there before is gone");
    let written = out.split_off(b"before".len());
    match outcome {
        Ok(Some(read)) => Ok(Some((read, written))),
        other => {
            assert!(written.is_empty(), "something is written, though nothing was read");
            other.map(|_| None)
        }
    }
}

/// The lines of a head that end with CRLF, without it: there is nothing else, and no other control character but those named.
fn lines<'a>(head: &'a [u8], controls: &[u8]) -> Vec<&'a [u8]> {
    let mut lines = Vec::new();
    let mut left = head;
    while !left.is_empty() {
        let end = left.windows(2).position(|pair| pair == b"\r\n");
        assert!(end.is_some(), "the last line has no end");
        let (line, rest) = left.split_at(end.unwrap_or_default());
        assert!(line.iter().all(|byte| !byte.is_ascii_control() || controls.contains(byte)), "a control character passes");
        lines.push(line);
        left = &rest[2..];
    }
    lines
}

/// Name, in lower case, and value of a header's line.
fn field(line: &[u8]) -> (String, &[u8]) {
    let colon = line.iter().position(|&byte| byte == b':');
    assert!(colon.is_some(), "a header has no colon");
    let (name, value) = line.split_at(colon.unwrap_or_default());
    assert!(
        !name.is_empty() && name.iter().all(|byte| byte.is_ascii_graphic() && !b"\"(),/:;<=>?@[\\]{}".contains(byte)),
        "a name is no word"
    );
    (String::from_utf8_lossy(name).to_ascii_lowercase(), value[1..].trim_ascii())
}

/// Any bytes as a request's head.
pub(crate) fn head(input: &[u8]) {
    let lot = lot(input);
    let small = HeadLimits { bytes: lot % (input.len() + 2), headers: lot / 7 % 9 };
    let none = HeadLimits { bytes: usize::MAX, headers: usize::MAX };
    for (number, limits) in [LIMITS, small, none].into_iter().enumerate() {
        head_within(input, limits, lot % 3 == number);
    }
}

fn head_within(input: &[u8], limits: HeadLimits, byte_by_byte: bool) {
    let read = |input: &[u8], limits: HeadLimits, searched: &mut usize| {
        appended(|out| request_head::read(input, limits, None, searched, out))
    };
    match in_pieces(input, byte_by_byte, |input, searched| read(input, limits, searched)) {
        Ok(None) => assert!(input.len() < limits.bytes, "more is waited for than may come"),
        Err(HttpError { status, code, message, .. }) => {
            assert!(matches!(status, 400 | 405 | 414 | 417 | 431 | 501 | 505) && !code.is_empty() && !message.is_empty());
        }
        Ok(Some(((head, used), out))) => {
            assert!(used <= input.len() && used <= limits.bytes && input[..used].ends_with(b"\r\n\r\n"));
            let named = check_fields(&head, &input[..used], limits);
            // A trusted proxy is believed about its client and nothing else.
            let trusted = request_head::read(input, limits, Some(&Networks::default()), &mut 0, &mut Vec::new());
            let unforwarded = |(of, used)| (Head { forwarded_for: None, forwarded_https: None, ..of }, used);
            assert_eq!(trusted.map(|read| read.map(unforwarded).as_ref() == Some(&(head.clone(), used))), Ok(true));
            check_canonical(&head, &out, &named);
            check_target(&input[..used], &out);
            assert!(out.len() <= 3 * used + 16, "it has grown by more than what is encoded of it");
            let option = if head.upgrade { "connection: upgrade\r\n" } else { "" };
            let again = [&out[..], option.as_bytes(), b"\r\n"].concat();
            let wide = HeadLimits { bytes: again.len(), headers: limits.headers.saturating_add(2) };
            let keep_alive = true;
            let expected = Head {
                old: false,
                keep_alive,
                expects_continue: false,
                framing: Framing::None,
                forwarded_for: None,
                forwarded_https: None,
                ..head
            };
            assert_eq!(
                read(&again, wide, &mut 0),
                Ok(Some(((expected, again.len()), out))),
                "its canonical form is read in another way"
            );
        }
    }
}

/// What is said of the request is what the lines of its head say, read plainly. Gives what `Connection` names.
fn check_fields(head: &Head, input: &[u8], limits: HeadLimits) -> Vec<String> {
    let input = input.strip_prefix(b"\r\n").unwrap_or(input);
    let lines = lines(&input[..input.len() - 2], b"\t");
    let fields: Vec<_> = lines[1..].iter().map(|line| field(line)).collect();
    assert!(fields.len() <= limits.headers, "there are more headers than allowed");
    let values = |name: &str| fields.iter().filter(|(other, _)| other == name).map(|(_, value)| *value).collect::<Vec<_>>();
    let framing = match (&values("transfer-encoding")[..], &values("content-length")[..]) {
        ([], []) => Some(Framing::None),
        ([coding], []) if coding.eq_ignore_ascii_case(b"chunked") => Some(Framing::Chunked),
        ([], [length]) if length.iter().all(u8::is_ascii_digit) => {
            std::str::from_utf8(length).ok().and_then(|length| length.parse().ok()).map(Framing::Length)
        }
        _ => None,
    };
    assert_eq!(Some(head.framing), framing, "the body may end elsewhere");
    assert!(values("host").len() <= 1 && (head.old || values("host").len() == 1), "there is not one host");
    assert_eq!(head.old, lines[0].ends_with(b" HTTP/1.0"));
    assert_eq!(head.head, lines[0].starts_with(b"HEAD "));
    assert!(!head.old || head.framing != Framing::Chunked, "HTTP/1.0 has no chunks");
    let has_body = !matches!(head.framing, Framing::None | Framing::Length(0));
    assert_eq!(head.expects_continue, !head.old && has_body && !values("expect").is_empty());
    let named = String::from_utf8_lossy(&values("connection").join(&b","[..])).to_ascii_lowercase();
    let named: Vec<_> = named.split(',').map(|option| option.trim().to_owned()).collect();
    let names = |option: &str| named.iter().any(|named| named == option);
    assert!(
        !head.upgrade || (names("upgrade") && values("upgrade").len() == 1 && !has_body && !head.old),
        "no upgrade was asked for"
    );
    assert_eq!(head.keep_alive, !names("close") && (!head.old || names("keep-alive")));
    named
}

/// The target ends as it was sent, each byte beyond ASCII percent-encoded.
fn check_target(input: &[u8], out: &[u8]) {
    let word = |head: &[u8]| {
        let line = head.split(|&byte| byte == b'\n').find(|line| line.contains(&b' ')).unwrap_or_default();
        line.split(|&byte| byte == b' ').nth(1).unwrap_or_default().to_vec()
    };
    let (sent, passed) = (word(input), word(out));
    let encoded: Vec<u8> =
        sent.iter().flat_map(|&byte| if byte.is_ascii() { vec![byte] } else { format!("%{byte:02X}").into_bytes() }).collect();
    let path = passed.strip_prefix(b"/").unwrap_or(&passed);
    assert!(encoded.ends_with(path), "the target is another");
}

/// A canonical head is read by its lines, and those at spaces or at the first colon, as it is meant.
fn check_canonical(head: &Head, out: &[u8], named: &[String]) {
    let lines = lines(out, b"\t");
    let line = String::from_utf8_lossy(lines[0]).into_owned();
    let words: Vec<_> = line.trim().split(' ').collect();
    assert!(words.len() == 3 && words[2] == "HTTP/1.1" && line.trim() == line, "the request line has other words");
    assert!(words[1].bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#'), "the target has strange characters");
    assert!(words[1].starts_with('/') || line == "OPTIONS * HTTP/1.1", "the target is not in origin-form");
    assert_eq!(head.head, words[0] == "HEAD");
    assert!(lines[1].starts_with(b"host: "), "there is no host");
    for (number, line) in lines[1..].iter().enumerate() {
        let (name, _) = field(line);
        assert!(line.starts_with(name.as_bytes()), "a name is not in lower case");
        assert_eq!(name == "host", number == 0, "there is not one host");
        let left_out = (HOP_BY_HOP.contains(&&*name) && !(name == "upgrade" && head.upgrade))
            || ["content-length", "expect", "forwarded", "x-real-ip", "x_real_ip", "x-request-id", "x_request_id"]
                .contains(&&*name)
            || ["x-plugrack", "x_plugrack", "x-forwarded-", "x_forwarded_"].iter().any(|begin| name.starts_with(begin));
        assert!(!left_out, "{name} passes");
        assert!(number == 0 || name == "upgrade" || !named.contains(&name), "{name} passes, though it is for one hop");
    }
}

/// What a decoder makes of pieces: the data, the bytes used, and whether the body has ended.
fn decode<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Result<(Vec<u8>, usize, bool), Broken> {
    let (mut decoder, mut data, mut used, mut ended) = (Decoder::new(), Vec::new(), 0, false);
    for mut piece in pieces {
        while !piece.is_empty() && !ended {
            let step = decoder.step(piece)?;
            assert!(step.used > 0 && step.used <= piece.len(), "nothing is used, or more than there is");
            assert!(step.data.len() <= step.used, "there is more data than input");
            data.extend_from_slice(step.data);
            used += step.used;
            ended = step.ended;
            piece = &piece[step.used..];
        }
    }
    if ended {
        let step = decoder.step(b"0\r\n\r\n")?;
        assert!(step.used == 0 && step.data.is_empty() && step.ended, "it goes on after its end");
    }
    Ok((data, used, ended))
}

/// Any bytes as a chunked body.
pub(crate) fn chunked(input: &[u8]) {
    let whole = decode([input]);
    let lot = lot(input);
    let (first, second) = input.split_at(lot % (input.len() + 1));
    assert_eq!(decode([first, second]), whole, "cut in two, it is read in another way");
    assert_eq!(decode(input.chunks(lot / 7 % 40 + 1)), whole, "in small pieces, it is read in another way");
    assert_eq!(decode(input.chunks(1)), whole, "byte by byte, it is read in another way");
    match whole {
        Ok((data, used, true)) => {
            assert_eq!(plain_chunks(&input[..used]), Some(data), "the data is other than what the chunks hold")
        }
        Ok((_, used, false)) => assert_eq!(used, input.len(), "some is left, though there is no end"),
        Err(Broken::TooLarge) => assert!(input.len() > 64, "nothing can be too large here"),
        Err(Broken::Malformed) => {}
    }
    // As data, it survives.
    let mut body = Vec::new();
    for piece in input.chunks(lot % 3000 + 1) {
        body.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
        body.extend_from_slice(piece);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(b"0\r\n\r\n");
    assert_eq!(decode([&body[..]]), Ok((input.to_vec(), body.len(), true)), "data does not survive");
}

/// The data of a complete chunked body, read plainly.
fn plain_chunks(mut body: &[u8]) -> Option<Vec<u8>> {
    let line = |from: &[u8]| from.windows(2).position(|pair| pair == b"\r\n");
    let mut data = Vec::new();
    loop {
        let (size, rest) = body.split_at(line(body)?);
        let size = size.split(|&byte| byte == b';').next()?;
        let size = usize::from_str_radix(std::str::from_utf8(size).ok()?, 16).ok()?;
        body = &rest[2..];
        if size == 0 {
            break;
        }
        data.extend_from_slice(body.get(..size)?);
        body = body[size..].strip_prefix(b"\r\n")?;
    }
    while line(body)? > 0 {
        body = &body[line(body)? + 2..];
    }
    (body == b"\r\n").then_some(data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::Path;

    /// What takes the place of a byte, in turn.
    const BYTES: &[u8] = b"\r\n :,;\0\x01\x7f\x80\xff0aZ/#\t\"";

    /// Gives a check each file of a corpus: whole, and at each byte in turn cut, with the byte replaced, left out, or doubled.
    fn replay(corpus: &str, check: fn(&[u8])) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(corpus);
        let mut count = 0;
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let input = fs::read(&path).unwrap();
            let run = |input: &[u8]| {
                let caught = std::panic::catch_unwind(|| check(input));
                assert!(caught.is_ok(), "{}: {:?}", path.display(), input.escape_ascii().to_string());
            };
            run(&input);
            for at in 0..input.len().min(300) {
                let (before, after) = (&input[..at], &input[at + 1..]);
                match at % 4 {
                    0 => run(before),
                    1 => run(&[before, after].concat()),
                    2 => run(&[&input[..=at], &input[at..]].concat()),
                    _ => run(&[before, &[BYTES[at % BYTES.len()]], after].concat()),
                }
            }
            count += 1;
        }
        assert!(count > 5, "{} holds little", folder.display());
    }

    #[test]
    fn heads_that_were_found() {
        replay("head", head);
    }

    #[test]
    fn chunked_bodies_that_were_found() {
        replay("chunked", chunked);
    }
}
