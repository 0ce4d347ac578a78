//! Frames on a stream: two lengths, a JSON head, a raw body. See `docs/protocol.md`, section 2.
//!
//! Reading is resumable: a read that ends early with an error such as `WouldBlock` loses nothing, and the next call goes on
//! where it stopped. So a caller may set short timeouts on the stream and look after other things in between.

use super::fields::{excerpt_of_bytes, integer};
use super::message::{MAX_BODY, MAX_HEAD, MAX_INLINE_BODY, Malformed, Message};
use serde::Serialize;
use serde_json::Value;
use std::io::{self, Read};

/// The two lengths before head and body, in bytes.
const LENGTHS: usize = 8;

/// The buffer of a reader in bytes: a batch of small frames in one read, or one with a body of [`MAX_INLINE_BODY`] and all but the
/// longest heads.
const BUFFER: usize = MAX_INLINE_BODY + 8 * 1024;

/// One frame, borrowed from its reader's buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// The head as it came: JSON.
    pub head: &'a [u8],
    /// The body, or of a large frame the first of it.
    pub body: &'a [u8],
    /// Length of the whole body in bytes.
    pub size: usize,
}

impl<'a> Frame<'a> {
    /// Reads the head.
    ///
    /// # Errors
    /// When it is not a message of the protocol, or there is a body beside a message that has none.
    pub fn message(&self) -> Result<Message<'a>, Malformed> {
        Message::of_frame(self.head, self.size)
    }

    /// The id in a head that is no valid message, where one can be read.
    #[must_use]
    pub fn id(&self) -> Option<u64> {
        match serde_json::from_slice::<Value>(self.head).ok()?.get("id")? {
            Value::Number(id) => integer(id).and_then(|id| u64::try_from(id).ok()),
            _ => None,
        }
    }
}

/// Why no frame could be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The stream ended between two frames.
    #[error("the connection was closed")]
    Closed,
    /// The stream ended inside a frame.
    #[error("the connection was closed inside a frame")]
    Cut,
    /// A length out of bounds.
    #[error("a frame's {part} length of {length} is not within {least}-{most}{hint}")]
    Length {
        /// Head or body.
        part: &'static str,
        /// As received.
        length: u32,
        /// The least allowed.
        least: usize,
        /// The most allowed.
        most: usize,
        /// What the bytes seem to be instead, as the rest of the sentence; empty when that cannot be told.
        hint: String,
    },
    /// The stream failed, or has nothing for now.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The beginning of a frame whose rest has not come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} of {of} bytes of a frame's {part} had come")]
pub struct Unfinished {
    /// The part that is not whole: the lengths, the head or the body.
    pub part: &'static str,
    /// Bytes of it that have come.
    pub bytes: usize,
    /// Bytes it has.
    pub of: usize,
}

/// Why a message does not fit a frame.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// Over [`MAX_HEAD`].
    #[error("the head of {0} bytes is over the limit of {MAX_HEAD}")]
    Head(usize),
    /// Over [`MAX_BODY`].
    #[error("the body of {0} bytes is over the limit of {MAX_BODY}")]
    Body(usize),
    /// Not expressible in JSON.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
}

/// Appends a frame to `out`, which stays as it was on an error.
///
/// # Errors
/// When head or body are over their limits.
pub fn encode(out: &mut Vec<u8>, head: &impl Serialize, body: &[u8]) -> Result<(), EncodeError> {
    encode_before(out, head, body.len())?;
    out.extend_from_slice(body);
    Ok(())
}

/// Appends what stands before a frame's body, whose length is given: for a body that is better not copied.
///
/// # Errors
/// As [`encode`].
pub fn encode_before(out: &mut Vec<u8>, head: &impl Serialize, body: usize) -> Result<(), EncodeError> {
    encode_head(out, body, |out| Ok(serde_json::to_writer(out, head)?))
}

/// The same with a head that the caller writes as JSON.
///
/// # Errors
/// As [`encode`], and those of the caller.
pub fn encode_head(
    out: &mut Vec<u8>,
    body: usize,
    write: impl FnOnce(&mut Vec<u8>) -> Result<(), EncodeError>,
) -> Result<(), EncodeError> {
    if body > MAX_BODY {
        return Err(EncodeError::Body(body));
    }
    let start = out.len();
    out.extend_from_slice(&[0; LENGTHS]);
    if let Err(error) = write(out) {
        out.truncate(start);
        return Err(error);
    }
    let length = out.len() - start - LENGTHS;
    match (u32::try_from(length), u32::try_from(body)) {
        (Ok(head_length), Ok(body_length)) if length <= MAX_HEAD => {
            out[start..start + 4].copy_from_slice(&head_length.to_be_bytes());
            out[start + 4..start + LENGTHS].copy_from_slice(&body_length.to_be_bytes());
            Ok(())
        }
        _ => {
            out.truncate(start);
            Err(EncodeError::Head(length))
        }
    }
}

/// Reads frames from a stream through a buffer of its own.
#[derive(Debug)]
pub struct FrameReader<R> {
    stream: R,
    buffer: Vec<u8>,
    /// What has been received and not yet given out: `buffer[start..end]`.
    start: usize,
    end: usize,
    /// Bytes of a body that belong to a frame of which the first has been given out.
    rest: usize,
}

impl<R: Read> FrameReader<R> {
    /// A reader that has read nothing yet.
    pub fn new(stream: R) -> Self {
        Self { stream, buffer: Vec::new(), start: 0, end: 0, rest: 0 }
    }

    /// The stream below.
    pub fn stream(&mut self) -> &mut R {
        &mut self.stream
    }

    /// The next frame.
    ///
    /// # Errors
    /// As [`FrameReader::wait`].
    pub fn read(&mut self) -> Result<Frame<'_>, ReadError> {
        self.begin(usize::MAX).map(|(frame, _)| frame)
    }

    /// Reads until a whole frame is at hand, which [`FrameReader::read`] then gives without touching the stream.
    ///
    /// # Errors
    /// At the end of the stream, on a length out of bounds, and as the stream fails. After an [`io::ErrorKind::WouldBlock`],
    /// `TimedOut` or `Interrupted` a further call goes on where this one stopped; after any other the stream is of no more use.
    pub fn wait(&mut self) -> Result<(), ReadError> {
        self.wait_begin(usize::MAX)
    }

    /// As [`FrameReader::wait`], but of a frame over `most` bytes for no more than the head, which [`FrameReader::begin`] then gives.
    ///
    /// # Errors
    /// As [`FrameReader::wait`].
    pub fn wait_begin(&mut self, most: usize) -> Result<(), ReadError> {
        self.receive(most).map(drop)
    }

    /// The next frame, or the first of one over `most` bytes. Also gives how many bytes of its body are still to come, which have to be
    /// taken by [`FrameReader::read_rest`] before the next frame is.
    ///
    /// # Errors
    /// As [`FrameReader::wait`].
    pub fn begin(&mut self, most: usize) -> Result<(Frame<'_>, usize), ReadError> {
        let (head, body) = self.receive(most)?;
        let at = self.start + LENGTHS;
        let end = self.end.min(at + head + body);
        self.start = end;
        self.rest = at + head + body - end;
        let frame = Frame { head: &self.buffer[at..at + head], body: &self.buffer[at + head..end], size: body };
        Ok((frame, self.rest))
    }

    /// Takes more of a body of which the first has been given out, in one read from the stream. Gives 0 when all of it is taken.
    ///
    /// # Errors
    /// As [`FrameReader::wait`].
    pub fn read_rest(&mut self, buffer: &mut [u8]) -> Result<usize, ReadError> {
        let most = self.rest.min(buffer.len());
        if most == 0 {
            return Ok(0);
        }
        // What had been received of it has been given out with the first.
        match self.stream.read(&mut buffer[..most])? {
            0 => Err(ReadError::Cut),
            n => {
                self.rest -= n;
                Ok(n)
            }
        }
    }

    /// Whether a whole frame is at hand, so that [`FrameReader::read`] gives it without touching the stream.
    pub fn is_ready(&self) -> bool {
        matches!(self.lengths(), Ok(Some((head, body))) if self.end - self.start >= LENGTHS + head + body)
    }

    /// Whether more has been received than the next frame, which is at hand.
    pub fn is_followed(&self) -> bool {
        matches!(self.lengths(), Ok(Some((head, body))) if self.end - self.start > LENGTHS + head + body)
    }

    /// Whether something has been received that was not given out.
    pub fn holds_bytes(&self) -> bool {
        self.start < self.end
    }

    /// What has been received of a frame that is not whole.
    pub fn unfinished(&self) -> Option<Unfinished> {
        let held = self.end - self.start;
        if held == 0 {
            return None;
        }
        Some(match self.lengths().ok()? {
            None => Unfinished { part: "lengths", bytes: held, of: LENGTHS },
            Some((head, _)) if held < LENGTHS + head => Unfinished { part: "head", bytes: held - LENGTHS, of: head },
            Some((head, body)) => Unfinished { part: "body", bytes: held - LENGTHS - head, of: body },
        })
    }

    /// Gives back the memory of a buffer that holds nothing: for a connection that falls idle.
    pub fn release(&mut self) {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            self.buffer = Vec::new();
        }
    }

    /// Receives the rest of a frame, or of the head of one over `most` bytes, and gives the lengths of its head and body.
    fn receive(&mut self, most: usize) -> Result<(usize, usize), ReadError> {
        loop {
            let Some((head, body)) = self.lengths()? else {
                self.fill(LENGTHS)?;
                continue;
            };
            let whole = LENGTHS + head + body;
            let needed = if whole > most { LENGTHS + head } else { whole };
            if self.end - self.start >= needed {
                return Ok((head, body));
            }
            self.fill(needed)?;
        }
    }

    /// The lengths of the next frame, checked, once they are here.
    fn lengths(&self) -> Result<Option<(usize, usize)>, ReadError> {
        let Some(bytes) = self.buffer[self.start..self.end].first_chunk::<LENGTHS>() else { return Ok(None) };
        let [a, b, c, d, e, f, g, h] = *bytes;
        let check = |part, length: u32, least, most| match usize::try_from(length) {
            Ok(fits) if (least..=most).contains(&fits) => Ok(fits),
            _ => Err(self.bad_length(part, length, least, most)),
        };
        let head = check("head", u32::from_be_bytes([a, b, c, d]), 1, MAX_HEAD)?;
        let body = check("body", u32::from_be_bytes([e, f, g, h]), 0, MAX_BODY)?;
        Ok(Some((head, body)))
    }

    /// What to say of a length out of bounds: what is sent instead of it is as a rule text, or a length in the other byte order.
    #[cold]
    fn bad_length(&self, part: &'static str, length: u32, least: usize, most: usize) -> ReadError {
        let text = |byte: u8| matches!(byte, b' '..=b'~' | b'\t' | b'\r' | b'\n');
        let swapped = length.swap_bytes();
        let begin = self.start + if part == "head" { 0 } else { LENGTHS / 2 };
        let hint = if length.to_be_bytes().into_iter().all(text) {
            let shown = excerpt_of_bytes(&self.buffer[begin..self.end]);
            format!(": the text {shown} stands where it is due; a frame begins with two 4-byte big-endian lengths")
        } else if usize::try_from(swapped).is_ok_and(|swapped| (least.max(1)..=most).contains(&swapped)) {
            format!(": {length:#010x} is {swapped} in little-endian; lengths are big-endian")
        } else {
            String::new()
        };
        ReadError::Length { part, length, least, most, hint }
    }

    /// One read from the stream, with room in the buffer for a frame of `frame` bytes.
    fn fill(&mut self, frame: usize) -> Result<(), ReadError> {
        let held = self.end - self.start;
        if self.start > 0 && (held == 0 || self.start + frame > self.buffer.len()) {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, held);
        }
        let room = frame.max(BUFFER);
        if self.buffer.len() < room {
            self.buffer.resize(room, 0);
        }
        match self.stream.read(&mut self.buffer[self.end..])? {
            0 if held == 0 => Err(ReadError::Closed),
            0 => Err(ReadError::Cut),
            n => {
                self.end += n;
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::message::{Data, Ping};
    use proptest::prelude::*;
    use serde_json::Value;

    /// Gives its bytes in pieces of the given sizes, with a `WouldBlock` before each.
    struct Drip<'a> {
        bytes: &'a [u8],
        sizes: std::iter::Cycle<std::vec::IntoIter<usize>>,
        blocked: bool,
    }

    impl Read for Drip<'_> {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            self.blocked = !self.blocked;
            if self.blocked {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let n = self.sizes.next().unwrap().min(buf.len()).min(self.bytes.len());
            buf[..n].copy_from_slice(&self.bytes[..n]);
            self.bytes = &self.bytes[n..];
            Ok(n)
        }
    }

    /// Frames with these bodies, one behind the other.
    fn frames(bodies: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (id, body) in bodies.iter().enumerate() {
            encode(&mut bytes, &Data { id: id as u64, more: true, aborted: false }, body).unwrap();
        }
        bytes
    }

    fn unhex(hex: &Value) -> Vec<u8> {
        let hex = hex.as_str().unwrap();
        (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
    }

    fn vectors() -> Value {
        serde_json::from_str(include_str!("../../../../tests/protocol/frames.json")).unwrap()
    }

    #[test]
    fn valid_frames_are_read_as_what_they_mean() {
        for case in vectors()["valid"].as_array().unwrap() {
            let (name, bytes) = (&case["name"], unhex(&case["hex"]));
            let mut reader = FrameReader::new(&bytes[..]);
            let frame = reader.read().unwrap();
            assert_eq!(serde_json::from_slice::<Value>(frame.head).unwrap(), case["head"], "{name}");
            assert_eq!((frame.body, frame.size), (&*unhex(&case["body_hex"]), frame.body.len()), "{name}");
            let message = frame.message().unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(message.kind(), case["head"]["type"]);
            let means = case.get("means").unwrap_or(&case["head"]).to_string();
            assert_eq!(message, Message::parse(means.as_bytes()).unwrap(), "{name}");
            if let (Message::Result(result), Some(op)) = (&message, case["place"].as_str().and_then(|p| p.strip_prefix("kv "))) {
                assert_eq!(result.fault(op, frame.size), None, "{name}");
            }
            assert!(matches!(reader.read(), Err(ReadError::Closed)));
        }
    }

    #[test]
    fn invalid_frames_are_refused_for_the_reason_that_is_due() {
        let mut refused = 0;
        for case in vectors()["invalid"].as_array().unwrap() {
            let (name, bytes) = (&case["name"], unhex(&case["hex"]));
            let mut reader = FrameReader::new(&bytes[..]);
            let why = match reader.read() {
                Err(error) => error.to_string(),
                Ok(frame) => {
                    if let Some(text) = case["head_text"].as_str() {
                        assert_eq!(frame.head, text.as_bytes(), "{name}");
                    }
                    let op = case["place"].as_str().and_then(|place| place.strip_prefix("kv "));
                    match (frame.message(), op) {
                        (Err(error), _) => error.to_string(),
                        (Ok(Message::Result(result)), Some(op)) if result.fault(op, frame.size).is_some() => {
                            result.fault(op, frame.size).unwrap()
                        }
                        // What is wrong with it only its place in the conversation tells, or the store.
                        _ => continue,
                    }
                }
            };
            assert!(why.contains(case["says"].as_str().unwrap()), "{name}: {why}");
            refused += 1;
        }
        assert!(refused > 60, "{refused} vectors are invalid by themselves");
        for case in vectors()["cut"].as_array().unwrap() {
            let bytes = unhex(&case["hex"]);
            assert!(matches!(FrameReader::new(&bytes[..]).read(), Err(ReadError::Cut)), "{}", case["name"]);
        }
    }

    #[test]
    fn what_has_come_of_an_unfinished_frame_is_told() {
        for (bytes, expected) in [
            (&b""[..], None),
            (b"\0\0\0", Some("3 of 8 bytes of a frame's lengths had come")),
            (b"\0\0\0\x2b\0\0\0\0{\"type\"", Some("7 of 43 bytes of a frame's head had come")),
            (b"\0\0\0\x02\0\0\0\x05{}", Some("0 of 5 bytes of a frame's body had come")),
            (b"\0\0\0\x02\0\0\0\x05{}12", Some("2 of 5 bytes of a frame's body had come")),
        ] {
            let mut reader = FrameReader::new(bytes);
            reader.read().unwrap_err();
            assert_eq!(reader.unfinished().map(|unfinished| unfinished.to_string()).as_deref(), expected);
        }
    }

    #[test]
    fn a_length_that_is_text_or_little_endian_is_recognised() {
        let head = "a frame's head length of";
        for (bytes, reason) in [
            (
                &b"{\"type\":\"ready\",\"id\":1}\n"[..],
                format!(
                    "{head} 2065855609 is not within 1-65536: the text \"{{\\\"type\\\":\\\"ready\\\",\\\"id\\\":1}}\\n\" \
                     stands where it is due; a frame begins with two 4-byte big-endian lengths"
                ),
            ),
            (
                b"HTTP/1.1 200 OK\r\n",
                format!(
                    "{head} 1213486160 is not within 1-65536: the text \"HTTP/1.1 200 OK\\r\\n\" stands where it is due; \
                     a frame begins with two 4-byte big-endian lengths"
                ),
            ),
            (
                b"\x00\x00\x00\x16{\"type\":",
                "a frame's body length of 2065855609 is not within 0-1048576: the text \"{\\\"type\\\":\" stands where it is due; \
                 a frame begins with two 4-byte big-endian lengths"
                    .into(),
            ),
            (
                b"\x2a\0\0\0\0\0\0\0{}",
                format!("{head} 704643072 is not within 1-65536: 0x2a000000 is 42 in little-endian; lengths are big-endian"),
            ),
            (
                b"\0\0\0\x2a\0\0\x01\0",
                String::new(),
            ),
            (
                b"\0\0\0\x2a\x05\0\0\0",
                "a frame's body length of 83886080 is not within 0-1048576: 0x05000000 is 5 in little-endian; lengths are big-endian"
                    .into(),
            ),
            (b"\xff\xff\xff\xff\0\0\0\0", format!("{head} 4294967295 is not within 1-65536")),
            (b"\0\0\0\0\0\0\0\0", format!("{head} 0 is not within 1-65536")),
        ] {
            let mut reader = FrameReader::new(bytes);
            match reader.read() {
                Err(ReadError::Cut) => assert_eq!(reason, "", "a length that is in bounds"),
                Err(error) => assert_eq!(error.to_string(), reason),
                Ok(frame) => panic!("{frame:?}"),
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_not_sent() {
        let mut out = b"before".to_vec();
        assert!(matches!(encode(&mut out, &Ping { id: 1 }, &vec![0; MAX_BODY + 1]), Err(EncodeError::Body(_))));
        assert!(matches!(encode(&mut out, &"x".repeat(MAX_HEAD), &[]), Err(EncodeError::Head(_))));
        assert_eq!(out, b"before");
        encode(&mut out, &Ping { id: 1 }, &vec![0; MAX_BODY]).unwrap();
    }

    proptest! {
        #[test]
        fn frames_survive_any_cutting(
            bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..3000), 1..20),
            sizes in prop::collection::vec(1usize..5000, 1..10),
        ) {
            let bytes = frames(&bodies);
            let mut reader = FrameReader::new(Drip { bytes: &bytes, sizes: sizes.into_iter().cycle(), blocked: false });
            for (id, body) in bodies.iter().enumerate() {
                let frame = loop {
                    match reader.read() {
                        Ok(frame) => break (frame.message().unwrap().id(), frame.body.to_vec()),
                        Err(ReadError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {}
                        Err(error) => panic!("{error}"),
                    }
                };
                prop_assert_eq!(&frame, &(id as u64, body.clone()));
            }
        }

        #[test]
        fn large_frames_come_in_parts(
            bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..3000), 1..20),
            sizes in prop::collection::vec(1usize..5000, 1..10),
            most in 0usize..4000,
            room in 1usize..2000,
        ) {
            let bytes = frames(&bodies);
            let mut reader = FrameReader::new(Drip { bytes: &bytes, sizes: sizes.into_iter().cycle(), blocked: false });
            let blocks = |error: &ReadError| matches!(error, ReadError::Io(error) if error.kind() == io::ErrorKind::WouldBlock);
            for (id, body) in bodies.iter().enumerate() {
                while let Err(error) = reader.wait_begin(most) {
                    prop_assert!(blocks(&error), "{}", error);
                }
                let (frame, rest) = reader.begin(most).unwrap();
                prop_assert_eq!(frame.message().unwrap().id(), id as u64);
                prop_assert!(rest == 0 || LENGTHS + frame.head.len() + body.len() > most);
                let mut got = frame.body.to_vec();
                prop_assert_eq!(got.len() + rest, body.len());
                let mut buffer = vec![0; room];
                while got.len() < body.len() {
                    match reader.read_rest(&mut buffer) {
                        Ok(n) => got.extend_from_slice(&buffer[..n]),
                        Err(error) => prop_assert!(blocks(&error), "{}", error),
                    }
                }
                prop_assert_eq!(reader.read_rest(&mut buffer).unwrap(), 0);
                prop_assert!(&got == body);
            }
            let last = loop {
                match reader.wait_begin(most) {
                    Err(error) if blocks(&error) => {}
                    last => break last,
                }
            };
            prop_assert!(matches!(last, Err(ReadError::Closed)));
        }

        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut reader = FrameReader::new(&bytes[..]);
            while let Ok(frame) = reader.read() {
                drop(frame.message());
            }
        }
    }
}
