//! A connection on which HTTP/1.1 is read byte by byte, by a client or by an application.

use crate::support::PATIENCE;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

/// What carries the bytes.
pub(super) trait Carrier: Read + Write + Send {
    fn set_times(&self);
}

impl Carrier for TcpStream {
    fn set_times(&self) {
        self.set_nodelay(true).unwrap();
        self.set_read_timeout(Some(PATIENCE)).unwrap();
        self.set_write_timeout(Some(PATIENCE)).unwrap();
    }
}

impl Carrier for UnixStream {
    fn set_times(&self) {
        self.set_read_timeout(Some(PATIENCE)).unwrap();
        self.set_write_timeout(Some(PATIENCE)).unwrap();
    }
}

/// A connection and what was received on it.
pub(super) struct Wire {
    stream: Box<dyn Carrier>,
    input: Vec<u8>,
}

/// The first line and the headers of a message, with names in lower case and each byte of a value as one character.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) line: String,
    pub(super) headers: Vec<(String, String)>,
}

/// A body and the trailers behind it, and whether it is complete.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Content {
    pub(super) bytes: Vec<u8>,
    pub(super) trailers: Vec<(String, String)>,
    pub(super) complete: bool,
}

fn latin(bytes: &[u8]) -> String {
    bytes.iter().map(|&byte| char::from(byte)).collect()
}

fn fields(text: &str) -> Vec<(String, String)> {
    let pair = |line: &str| {
        let (name, value) = line.split_once(':').unwrap_or((line, "\u{0}no colon"));
        (name.to_ascii_lowercase(), value.trim().to_owned())
    };
    text.split("\r\n").filter(|line| !line.is_empty()).map(pair).collect()
}

impl Head {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(each, _)| each == name).map(|(_, value)| value.as_str())
    }

    pub(super) fn all(&self, name: &str) -> Vec<&str> {
        self.headers.iter().filter(|(each, _)| each == name).map(|(_, value)| value.as_str()).collect()
    }

    /// The target of a request.
    pub(super) fn target(&self) -> &str {
        self.line.split(' ').nth(1).unwrap()
    }

    /// The status of a response.
    pub(super) fn status(&self) -> u16 {
        self.line.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or_else(|| panic!("no status: {:?}", self.line))
    }
}

impl Wire {
    pub(super) fn new(stream: impl Carrier + 'static) -> Self {
        stream.set_times();
        Self { stream: Box::new(stream), input: Vec::new() }
    }

    /// Sends bytes. False if the other end takes none any more.
    pub(super) fn send(&mut self, bytes: &[u8]) -> bool {
        self.stream.write_all(bytes).is_ok()
    }

    /// Receives more. False at the end, be it a reset.
    #[track_caller]
    fn receive(&mut self) -> bool {
        let mut buffer = [0; 64 * 1024];
        match self.stream.read(&mut buffer) {
            Ok(n) => {
                self.input.extend_from_slice(&buffer[..n]);
                n > 0
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                panic!("nothing came in time after {:?}", latin(&self.input[..self.input.len().min(300)]))
            }
            Err(_) => false,
        }
    }

    /// Whether the other end has closed the connection, and nothing is left to read.
    #[track_caller]
    pub(super) fn is_over(&mut self) -> bool {
        self.input.is_empty() && !self.receive()
    }

    /// All that comes until the end.
    #[track_caller]
    pub(super) fn rest(&mut self) -> Vec<u8> {
        while self.receive() {}
        std::mem::take(&mut self.input)
    }

    /// Bytes until and with a separator. None at the end.
    #[track_caller]
    fn until(&mut self, separator: &[u8]) -> Option<Vec<u8>> {
        let mut from = 0;
        loop {
            if let Some(at) = self.input[from..].windows(separator.len()).position(|window| window == separator) {
                return Some(self.input.drain(..from + at + separator.len()).collect());
            }
            from = self.input.len().saturating_sub(separator.len() - 1);
            if !self.receive() {
                return None;
            }
        }
    }

    /// The head of a message. None if the connection ends before.
    #[track_caller]
    pub(super) fn head(&mut self) -> Option<Head> {
        let bytes = self.until(b"\r\n\r\n")?;
        let text = latin(&bytes);
        let (line, headers) = text.split_once("\r\n").unwrap();
        Some(Head { line: line.to_owned(), headers: fields(headers) })
    }

    /// So many bytes of a body, or fewer at the end.
    #[track_caller]
    pub(super) fn exactly(&mut self, count: usize) -> Vec<u8> {
        while self.input.len() < count && self.receive() {}
        self.input.drain(..count.min(self.input.len())).collect()
    }

    /// The next chunk; empty at the last. None if the connection ends before.
    #[track_caller]
    pub(super) fn chunk(&mut self) -> Option<Vec<u8>> {
        let line = latin(&self.until(b"\r\n")?);
        let size = usize::from_str_radix(line.split([';', '\r']).next().unwrap().trim(), 16).ok()?;
        if size == 0 {
            return Some(Vec::new());
        }
        let bytes = self.exactly(size);
        (bytes.len() == size && self.exactly(2) == b"\r\n").then_some(bytes)
    }

    /// The body of a message whose head was read. One without a length is empty if it is of a request, and ends with the connection
    /// otherwise.
    #[track_caller]
    pub(super) fn content(&mut self, head: &Head, of_request: bool) -> Content {
        let mut content = Content::default();
        if head.header("transfer-encoding") == Some("chunked") {
            while let Some(chunk) = self.chunk() {
                if !chunk.is_empty() {
                    content.bytes.extend(chunk);
                    continue;
                }
                let mut trailers = Vec::new();
                while let Some(line) = self.until(b"\r\n") {
                    if line == b"\r\n" {
                        content.complete = true;
                        break;
                    }
                    trailers.extend(line);
                }
                content.trailers = fields(&latin(&trailers));
                break;
            }
        } else if let Some(length) = head.header("content-length") {
            let length: usize = length.parse().unwrap();
            content.bytes = self.exactly(length);
            content.complete = content.bytes.len() == length;
        } else if of_request {
            content.complete = true;
        } else {
            content.bytes = self.rest();
            content.complete = true;
        }
        content
    }
}
