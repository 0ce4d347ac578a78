//! A client of WebSocket for tests: raw frames (RFC 6455), also those that no client should send.

use super::Server;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// Opcodes (RFC 6455, section 11.8).
pub(crate) const CONTINUATION: u8 = 0;
pub(crate) const TEXT: u8 = 1;
pub(crate) const BINARY: u8 = 2;
pub(crate) const CLOSE: u8 = 8;
pub(crate) const PING: u8 = 9;
pub(crate) const PONG: u8 = 10;

/// Marks the last frame of a message.
pub(crate) const FIN: u8 = 0x80;

/// Marks a payload that is masked.
const MASKED: u8 = 0x80;

/// The key of each client, and what a server makes of it (RFC 6455, section 1.3).
const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
const ACCEPT: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

/// Time for what is due soon, on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A client, which may be wrapped in TLS.
pub(crate) struct Socket<S = TcpStream> {
    pub(crate) stream: S,
    /// The head of the response.
    pub(crate) head: String,
}

/// The request for a socket, with more header lines.
pub(crate) fn request(path: &str, headers: &str) -> String {
    format!(
        "GET {path} HTTP/1.1\r\nhost: test\r\nconnection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-key: {KEY}\r\n\
         sec-websocket-version: 13\r\n{headers}\r\n"
    )
}

/// A frame of a client with these first two bits fields in front, masked.
pub(crate) fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mask = [0x37, 0xfa, 0x21, 0x3d];
    let mut frame = head(first, MASKED, payload.len());
    frame.extend_from_slice(&mask);
    frame.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    frame
}

/// The head of a frame, up to its length.
pub(crate) fn head(first: u8, masked: u8, length: usize) -> Vec<u8> {
    let mut head = vec![first];
    match length {
        0..=125 => head.push(masked | u8::try_from(length).unwrap()),
        126..=0xffff => {
            head.push(masked | 126);
            head.extend_from_slice(&u16::try_from(length).unwrap().to_be_bytes());
        }
        _ => {
            head.push(masked | 127);
            head.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
    head
}

/// The payload of a close frame.
pub(crate) fn closing(code: u16, reason: &str) -> Vec<u8> {
    [&code.to_be_bytes(), reason.as_bytes()].concat()
}

impl Server {
    /// An open socket of a plugin.
    pub(crate) fn socket(&self, path: &str) -> Socket {
        self.socket_with(path, "").assert_open()
    }

    /// A client that has asked for a socket, and has got an answer.
    pub(crate) fn socket_with(&self, path: &str, headers: &str) -> Socket {
        let stream = TcpStream::connect(self.address()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Socket::ask(stream, path, headers)
    }
}

impl Socket {
    /// The answer to a request for a socket.
    pub(crate) fn status(&self) -> u16 {
        self.head.split(' ').nth(1).unwrap().parse().unwrap()
    }
}

impl<S: Read + Write> Socket<S> {
    /// Asks for a socket on a connection, and reads the head of the answer.
    pub(crate) fn ask(stream: S, path: &str, headers: &str) -> Self {
        Self::ask_by(stream, request(path, headers).as_bytes())
    }

    /// The same by these bytes.
    pub(crate) fn ask_by(mut stream: S, request: &[u8]) -> Self {
        stream.write_all(request).unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            assert_eq!(stream.read(&mut byte).unwrap(), 1, "{}", String::from_utf8_lossy(&head));
            head.push(byte[0]);
        }
        Self { stream, head: String::from_utf8(head).unwrap() }
    }

    #[track_caller]
    pub(crate) fn assert_open(self) -> Self {
        let accepted = format!("\r\nsec-websocket-accept: {ACCEPT}\r\n");
        assert!(self.head.starts_with("HTTP/1.1 101 ") && self.head.contains(&accepted), "{}", self.head);
        self
    }

    /// Sends bytes as they are.
    pub(crate) fn send_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// Sends a frame.
    pub(crate) fn send(&mut self, first: u8, payload: &[u8]) {
        self.send_raw(&frame(first, payload));
    }

    /// Sends a whole text message.
    pub(crate) fn say(&mut self, text: &str) {
        self.send(FIN | TEXT, text.as_bytes());
    }

    /// The next frame of the server: its first byte and its payload. None at the end of the connection.
    pub(crate) fn receive(&mut self) -> Option<(u8, Vec<u8>)> {
        let mut start = [0; 2];
        self.stream.read_exact(&mut start).ok()?;
        assert_eq!(start[1] & MASKED, 0, "a server does not mask");
        let mut more = [0; 8];
        let length = match start[1] {
            126 => {
                self.stream.read_exact(&mut more[6..]).ok()?;
                u64::from_be_bytes(more)
            }
            127 => {
                self.stream.read_exact(&mut more).ok()?;
                u64::from_be_bytes(more)
            }
            length => length.into(),
        };
        let mut payload = vec![0; usize::try_from(length).unwrap()];
        self.stream.read_exact(&mut payload).ok()?;
        Some((start[0], payload))
    }

    /// The next text message. Answers pings before it.
    #[track_caller]
    pub(crate) fn hear(&mut self) -> String {
        let (mut first, mut payload) = self.receive().unwrap();
        while first == FIN | PING {
            self.send(FIN | PONG, &payload);
            (first, payload) = self.receive().unwrap();
        }
        assert_eq!(first, FIN | TEXT, "{payload:?}");
        String::from_utf8(payload).unwrap()
    }

    /// Whether what is sent comes back.
    #[track_caller]
    pub(crate) fn assert_echoes(&mut self, text: &str) {
        self.say(text);
        assert_eq!(self.hear(), text);
    }

    /// The code and reason of the close frame that is next but for pongs, after which the connection ends once it was answered.
    #[track_caller]
    pub(crate) fn closed(&mut self) -> (u16, String) {
        let mut frame = self.receive().unwrap();
        while frame.0 == FIN | PONG || frame.0 == FIN | PING {
            frame = self.receive().unwrap();
        }
        let (first, payload) = frame;
        assert_eq!(first, FIN | CLOSE, "{payload:?}");
        let (code, reason) = payload.split_first_chunk().unwrap();
        (u16::from_be_bytes(*code), String::from_utf8(reason.to_vec()).unwrap())
    }

    /// Whether the connection has ended, in order or by a reset.
    #[track_caller]
    pub(crate) fn assert_ended(&mut self) {
        let mut rest = Vec::new();
        self.stream.read_to_end(&mut rest).ok();
        assert!(rest.is_empty(), "{rest:?}");
    }
}
