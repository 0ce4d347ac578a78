//! Decoder for the chunked body of a request (RFC 9112, section 7.1). Pure.
//!
//! Only the data is returned. Extensions and trailers are checked and discarded. The decoder refuses sizes with anything but hexadecimal
//! digits, line ends other than CRLF, characters that a header may not have, and extensions and trailers above a limit.

use super::request_head::{is_token, is_value};

/// Limit of digits of a chunk's size: 16 always fit into 64 bits.
const MAX_SIZE_DIGITS: u8 = 16;

/// Limit of all extensions in one body, in bytes. They are not part of `--max-body`, so they need a limit of their own.
const MAX_EXTENSIONS: usize = 16 * 1024;

/// Limit of trailers in bytes, with line ends: that of a head.
const MAX_TRAILERS: usize = 16 * 1024;

/// Limit of trailer lines: that of headers.
const MAX_TRAILER_LINES: usize = 64;

/// Decodes a chunked body as it arrives.
#[derive(Debug)]
pub(crate) struct Decoder {
    state: State,
    /// Bytes of extensions so far.
    extensions: usize,
    /// Bytes of trailers so far.
    trailers: usize,
    /// Trailers so far.
    trailer_lines: usize,
}

/// What is expected next.
#[derive(Debug, Clone, Copy)]
enum State {
    /// A digit of a chunk's size, or what ends it.
    Size {
        size: u64,
        digits: u8,
    },
    /// More of an extension, or its end.
    Extension {
        size: u64,
    },
    /// The end of the line of a chunk's size.
    SizeEnd {
        size: u64,
    },
    /// This number of bytes of data, at least one.
    Data {
        left: u64,
    },
    /// The line end after a chunk's data.
    DataCr,
    DataLf,
    /// A trailer, or the end of all.
    Trailer,
    TrailerName,
    TrailerValue,
    TrailerEnd,
    /// The last line end.
    LastLf,
    Ended,
}

/// The result of decoding a piece.
pub(crate) struct Step<'a> {
    /// Number of bytes consumed.
    pub(crate) used: usize,
    /// The data among them.
    pub(crate) data: &'a [u8],
    /// Whether the body has ended.
    pub(crate) ended: bool,
}

/// Why a body cannot be decoded. Then nothing after it can be read either.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Broken {
    /// Its chunked framing is malformed.
    Malformed,
    /// Its extensions or trailers exceed a limit.
    TooLarge,
}

impl Decoder {
    /// Before the first chunk.
    pub(crate) fn new() -> Self {
        let state = State::Size { size: 0, digits: 0 };
        Self { state, extensions: 0, trailers: 0, trailer_lines: 0 }
    }

    /// Decodes the next piece, up to the end of one run of data. Consumes at least one byte, unless the piece is empty or the body has
    /// ended. Must not be used after an error.
    pub(crate) fn step<'a>(&mut self, input: &'a [u8]) -> Result<Step<'a>, Broken> {
        let mut used = 0;
        while let Some(&byte) = input.get(used) {
            match self.state {
                State::Data { left } => {
                    let rest = &input[used..];
                    let length = usize::try_from(left).map_or(rest.len(), |left| left.min(rest.len()));
                    let left = left - length as u64;
                    self.state = if left == 0 { State::DataCr } else { State::Data { left } };
                    return Ok(Step { used: used + length, data: &rest[..length], ended: false });
                }
                State::Ended => break,
                _ => self.state = self.next(byte)?,
            }
            used += 1;
        }
        Ok(Step { used, data: &[], ended: matches!(self.state, State::Ended) })
    }

    /// Bytes of the current chunk that are still to be received, as far as its size was read.
    pub(crate) fn announced(&self) -> u64 {
        match self.state {
            State::Size { size, .. } | State::Extension { size } | State::SizeEnd { size } => size,
            State::Data { left } => left,
            _ => 0,
        }
    }

    /// The state after a byte that is not data.
    fn next(&mut self, byte: u8) -> Result<State, Broken> {
        match (self.state, byte) {
            (State::Size { size, digits: 1.. }, b'\r') => Ok(State::SizeEnd { size }),
            (State::Size { size, digits: 1.. }, b';') => self.extension(size),
            (State::Size { size, digits: digits @ 0..MAX_SIZE_DIGITS }, _) => {
                let digit = char::from(byte).to_digit(16).ok_or(Broken::Malformed)?;
                Ok(State::Size { size: size << 4 | u64::from(digit), digits: digits + 1 })
            }
            (State::Extension { size }, b'\r') => Ok(State::SizeEnd { size }),
            (State::Extension { size }, _) if is_value(byte) => self.extension(size),
            (State::SizeEnd { size: 0 }, b'\n') => Ok(State::Trailer),
            (State::SizeEnd { size }, b'\n') => Ok(State::Data { left: size }),
            (State::DataCr, b'\r') => Ok(State::DataLf),
            (State::DataLf, b'\n') => Ok(State::Size { size: 0, digits: 0 }),
            (State::Trailer, b'\r') => Ok(State::LastLf),
            (State::Trailer, _) if is_token(byte) => {
                self.trailer_lines += 1;
                if self.trailer_lines > MAX_TRAILER_LINES {
                    return Err(Broken::TooLarge);
                }
                self.trailer(State::TrailerName)
            }
            (State::TrailerName, b':') => self.trailer(State::TrailerValue),
            (State::TrailerName, _) if is_token(byte) => self.trailer(State::TrailerName),
            (State::TrailerValue, b'\r') => self.trailer(State::TrailerEnd),
            (State::TrailerValue, _) if is_value(byte) => self.trailer(State::TrailerValue),
            (State::TrailerEnd, b'\n') => self.trailer(State::Trailer),
            (State::LastLf, b'\n') => Ok(State::Ended),
            _ => Err(Broken::Malformed),
        }
    }

    /// Counts a byte of an extension of the chunk of this size.
    fn extension(&mut self, size: u64) -> Result<State, Broken> {
        self.extensions += 1;
        if self.extensions > MAX_EXTENSIONS { Err(Broken::TooLarge) } else { Ok(State::Extension { size }) }
    }

    /// Counts a byte of a trailer.
    fn trailer(&mut self, next: State) -> Result<State, Broken> {
        self.trailers += 1;
        if self.trailers > MAX_TRAILERS { Err(Broken::TooLarge) } else { Ok(next) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::fuzzing;
    use super::*;
    use proptest::prelude::*;

    /// What comes of bytes that arrive in pieces: the data, the bytes used, whether the body has ended.
    fn decode<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Result<(Vec<u8>, usize, bool), Broken> {
        let (mut decoder, mut data, mut total, mut ended) = (Decoder::new(), Vec::new(), 0, false);
        for mut piece in pieces {
            while !piece.is_empty() && !ended {
                let step = decoder.step(piece)?;
                assert!(step.used > 0 && step.data.len() <= step.used && step.used <= piece.len());
                data.extend_from_slice(step.data);
                total += step.used;
                ended = step.ended;
                piece = &piece[step.used..];
            }
        }
        Ok((data, total, ended))
    }

    /// The outcome of the whole, which is that of any two pieces and of single bytes, or this fails.
    fn decode_all(input: impl AsRef<[u8]>) -> Result<(Vec<u8>, usize, bool), Broken> {
        let input = input.as_ref();
        let whole = decode([input]);
        assert_eq!(decode(input.chunks(1)), whole, "byte by byte, {:?}", input.escape_ascii().to_string());
        for cut in 0..input.len().min(200) {
            assert_eq!(decode([&input[..cut], &input[cut..]]), whole, "cut at {cut}, {:?}", input.escape_ascii().to_string());
        }
        whole
    }

    #[track_caller]
    fn assert_body(input: impl AsRef<[u8]>, data: &str) {
        let input = input.as_ref();
        let expected = Ok((data.into(), input.len(), true));
        assert_eq!(decode_all(input), expected, "{:?}", input.escape_ascii().to_string());
        assert_eq!(decode_all([input, b"0\r\n\r\nGET / "].concat()), expected, "with more behind it");
    }

    #[track_caller]
    fn assert_malformed(input: impl AsRef<[u8]>) {
        let input = input.as_ref();
        assert_eq!(decode_all(input), Err(Broken::Malformed), "{:?}", input.escape_ascii().to_string());
    }

    #[test]
    fn chunks_make_a_body() {
        assert_body("0\r\n\r\n", "");
        assert_body("000\r\n\r\n", "");
        assert_body("5\r\nhello\r\n0\r\n\r\n", "hello");
        assert_body("5\r\nhello\r\n0001\r\n,\r\n00000000000000C\r\n wide\r\nworld\r\n0\r\n\r\n", "hello, wide\r\nworld");
        assert_body("a\r\n0123456789\r\nA\r\n0123456789\r\n0\r\n\r\n", "01234567890123456789");
        assert_body("5\r\n\r\n0\r\n\r\n0\r\n\r\n", "\r\n0\r\n");
    }

    #[test]
    fn a_body_that_is_not_complete_waits() {
        let whole = "5;a=b\r\nhello\r\n0\r\nA: b\r\n\r\n";
        for end in 0..whole.len() {
            let (data, used, ended) = decode_all(&whole[..end]).unwrap();
            assert!("hello".as_bytes().starts_with(&data) && used == end && !ended, "{end}");
        }
        let mut decoder = Decoder::new();
        let step = decoder.step(b"").unwrap();
        assert_eq!((step.used, step.data, step.ended), (0, &b""[..], false));
        assert!(decoder.step(b"0\r\n\r\n").unwrap().ended);
        let step = decoder.step(b"more").unwrap();
        assert_eq!((step.used, step.data, step.ended), (0, &b""[..], true));
    }

    #[test]
    fn a_run_of_data_is_given_as_it_lies_there() {
        let mut decoder = Decoder::new();
        let input = b"fffffffffffffff0\r\nabc";
        let step = decoder.step(input).unwrap();
        assert_eq!((step.used, step.data, step.ended), (input.len(), &b"abc"[..], false));
        let step = decoder.step(&[0; 70_000]).unwrap();
        assert_eq!((step.used, step.data.len()), (70_000, 70_000));
    }

    #[test]
    fn a_size_is_hexadecimal_digits() {
        for size in [
            "", " ", " 5", "5 ", "+5", "-5", "0x5", "x5", "g", "5g", "5 ;a", "5\t", "_5", "5_0", "\"5\"", "5,5", "5.0",
            "\u{665}", "5\0", "5:",
        ] {
            assert_malformed(format!("{size}\r\nhello\r\n0\r\n\r\n"));
        }
        for byte in (0..=255u8).filter(|byte| !byte.is_ascii_hexdigit()) {
            assert_malformed([&[byte], &b"5\r\nhello\r\n0\r\n\r\n"[..]].concat());
            if !matches!(byte, b';' | b'\r') {
                assert_malformed([b"5", &[byte][..], b"\r\nhello\r\n0\r\n\r\n"].concat());
            }
        }
    }

    #[test]
    fn a_size_has_up_to_16_digits() {
        assert_body(format!("{:0>16}\r\nhello\r\n{:0>16}\r\n\r\n", 5, 0), "hello");
        assert_malformed(format!("{:0>17}\r\nhello\r\n0\r\n\r\n", 5));
        assert_malformed(format!("5\r\nhello\r\n{:0>17}\r\n\r\n", 0));
        assert_malformed("10000000000000000\r\n");
        assert_eq!(decode_all("ffffffffffffffff\r\nabc"), Ok((b"abc".to_vec(), 21, false)));
        assert_eq!(decode_all("FFFFFFFFFFFFFFFF\r\nabc"), Ok((b"abc".to_vec(), 21, false)));
    }

    #[test]
    fn a_chunk_is_announced_as_soon_as_its_size_is_read() {
        let mut decoder = Decoder::new();
        let mut announced = |input: &str| {
            decoder.step(input.as_bytes()).unwrap();
            decoder.announced()
        };
        assert_eq!([announced("0"), announced("1"), announced("f"), announced(";x")], [0, 1, 0x1f, 0x1f]);
        assert_eq!([announced("y\r"), announced("\n"), announced("abc")], [0x1f, 0x1f, 0x1c]);
        assert_eq!([announced(&"d".repeat(0x1c)), announced("\r\n")], [0, 0]);
        assert_eq!([announced("FFFFFFFFFFFFFFFF"), announced("\r\n"), announced("a")], [u64::MAX, u64::MAX, u64::MAX - 1]);
    }

    #[test]
    fn every_line_ends_with_crlf() {
        let whole = "5;a\r\nhello\r\n0;b\r\nA: b\r\nC: d\r\n\r\n";
        assert_body(whole, "hello");
        for (at, _) in whole.match_indices("\r\n") {
            for other in ["\n", "\r", "\r\r\n", "\n\r", "\r \n", "\0"] {
                let broken = [&whole[..at], other, &whole[at + 2..]].concat();
                if (at, other) == (whole.len() - 2, "\r") {
                    assert!(!decode_all(&broken).unwrap().2);
                } else {
                    assert_malformed(&broken);
                }
            }
        }
        assert_malformed("5\r\nhello0\r\n\r\n");
        assert_malformed("5\r\nhello!\r\n0\r\n\r\n");
        assert_malformed("5\r\nhell\r\n0\r\n\r\n");
        assert_malformed("5\r\nhello\r\n\r\n");
        assert_malformed("\r\n5\r\nhello\r\n");
    }

    #[test]
    fn extensions_are_checked_and_thrown_away() {
        for extension in [";a", ";a=b", ";a=\"b c\"", ";a=\"b\\\"c;d\"", ";", ";;", "; a = b", ";\ta", ";a=\u{e9}", ";0"] {
            assert_body(format!("5{extension}\r\nhello\r\n0{extension}\r\n\r\n"), "hello");
        }
        for byte in 0..=255u8 {
            let input = [b"5;a", &[byte][..], b"b\r\nhello\r\n0\r\n\r\n"].concat();
            if is_value(byte) { assert_body(input, "hello") } else { assert_malformed(input) }
        }
        assert_malformed("5;a=\"b\r\nc\"\r\nhello\r\n0\r\n\r\n".replace("\r\n", "\n"));
    }

    #[test]
    fn extensions_have_a_limit_over_the_whole_body() {
        let chunk = |length: usize| format!("1;{}\r\nx\r\n", "a".repeat(length - 1));
        assert_body([&chunk(MAX_EXTENSIONS), "0\r\n\r\n"].concat(), "x");
        assert_body([&chunk(MAX_EXTENSIONS - 1), "0;\r\n\r\n"].concat(), "x");
        assert_body([&*chunk(MAX_EXTENSIONS / 4).repeat(4), "0\r\n\r\n"].concat(), "xxxx");
        for body in [chunk(MAX_EXTENSIONS + 1), chunk(MAX_EXTENSIONS) + "0;", chunk(MAX_EXTENSIONS / 4).repeat(4) + "1;"] {
            assert_eq!(decode_all(&body), Err(Broken::TooLarge));
            assert!(decode([&body.as_bytes()[..body.len() - 1]]).is_ok() || body.ends_with("\r\n"));
        }
    }

    #[test]
    fn trailers_are_checked_and_thrown_away() {
        for trailers in [
            "A: b\r\n",
            "A:\r\n",
            "a:b\r\nc: \td \r\n",
            "Content-Length: 5\r\n",
            "A: \u{e9}:\r\n",
            "A::\r\n",
            "!#$%&'*+-.^_`|~9:x\r\n",
        ] {
            assert_body(format!("0\r\n{trailers}\r\n"), "");
            assert_body(format!("1\r\nx\r\n0;a\r\n{trailers}\r\n"), "x");
        }
        for trailers in [
            "A\r\n",
            "A : b\r\n",
            " A: b\r\n",
            ": b\r\n",
            "A: b\r\n c\r\n",
            "A: b\r\n\tc\r\n",
            "\0",
            "A B: c\r\n",
            "\u{e9}: a\r\n",
            "\n",
            "A: b\n",
        ] {
            assert_malformed(format!("0\r\n{trailers}\r\n"));
        }
        for byte in 0..=255u8 {
            let name = [b"0\r\nA", &[byte][..], b"B: c\r\n\r\n"].concat();
            if is_token(byte) || byte == b':' {
                assert_body(name, "")
            } else {
                assert_malformed(name)
            }
            let value = [b"0\r\nA: b", &[byte][..], b"c\r\n\r\n"].concat();
            if is_value(byte) { assert_body(value, "") } else { assert_malformed(value) }
        }
    }

    #[test]
    fn trailers_have_limits() {
        let lines = |count: usize| format!("0\r\n{}\r\n", "A:b\r\n".repeat(count));
        assert_body(lines(MAX_TRAILER_LINES), "");
        assert_eq!(decode_all(lines(MAX_TRAILER_LINES + 1)), Err(Broken::TooLarge));
        let bytes = |count: usize| format!("0\r\nA:{}\r\nB:\r\n\r\n", "x".repeat(count - "A:\r\nB:\r\n".len()));
        assert_body(bytes(MAX_TRAILERS), "");
        assert_eq!(decode_all(bytes(MAX_TRAILERS + 1)), Err(Broken::TooLarge));
        assert_eq!(decode_all(format!("0\r\n{}", "A".repeat(MAX_TRAILERS + 1))), Err(Broken::TooLarge));
    }

    /// Chunks with their data, each with its size as written and its extension, and trailers.
    fn bodies() -> impl Strategy<Value = (Vec<u8>, Vec<u8>)> {
        let extension = prop_oneof![3 => Just(String::new()), 1 => ";[ -~\t\u{80}-\u{ff}]{0,20}"];
        let chunk = (prop::collection::vec(any::<u8>(), 1..300), extension.clone(), 0usize..10, any::<bool>());
        let trailer = "[A-Za-z!#$%&'*+.^_`|~-]{1,9}:[ -~\t\u{80}-\u{ff}]{0,20}\r\n";
        (prop::collection::vec(chunk, 0..8), extension, prop::collection::vec(trailer, 0..4)).prop_map(
            |(chunks, last, trailers)| {
                let (mut body, mut data) = (Vec::new(), Vec::new());
                for (piece, extension, zeros, upper) in chunks {
                    let size = if upper { format!("{:X}", piece.len()) } else { format!("{:x}", piece.len()) };
                    body.extend_from_slice(format!("{}{size}{extension}\r\n", "0".repeat(zeros)).as_bytes());
                    body.extend_from_slice(&piece);
                    body.extend_from_slice(b"\r\n");
                    data.extend_from_slice(&piece);
                }
                body.extend_from_slice(format!("0{last}\r\n{}\r\n", trailers.concat()).as_bytes());
                (body, data)
            },
        )
    }

    proptest! {
        #[test]
        fn the_data_survives_any_cutting(
            (body, data) in bodies(),
            rest in prop::collection::vec(any::<u8>(), 0..20),
            sizes in prop::collection::vec(1usize..100, 1..10),
        ) {
            let input = [&body[..], &rest].concat();
            let (mut pieces, mut left) = (Vec::new(), &input[..]);
            for size in sizes.into_iter().cycle() {
                let (piece, after) = left.split_at(size.min(left.len()));
                pieces.push(piece);
                left = after;
                if left.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(decode(pieces), Ok((data, body.len(), true)));
        }

        #[test]
        fn no_bytes_are_too_strange(
            bytes in prop::collection::vec(prop_oneof![any::<u8>(), prop::sample::select(&b"012af;:\r\n"[..])], 0..200),
        ) {
            fuzzing::chunked(&bytes);
        }

        #[test]
        fn a_broken_body_is_read_alike_however_it_arrives(
            (mut body, _) in bodies(),
            at in any::<prop::sample::Index>(),
            byte in prop_oneof![any::<u8>(), Just(b'\r'), Just(b'\n'), Just(b';'), Just(b'0')],
        ) {
            let at = at.index(body.len());
            body[at] = byte;
            fuzzing::chunked(&body);
        }
    }
}
