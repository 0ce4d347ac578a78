//! The server behind nginx in the benchmark where Go is not installed: keep-alive HTTP/1.1 on a Unix socket, a thread a connection.
//! It does as little as a correct server can, so that what is measured beside the host is nginx.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

const MIB: usize = 1 << 20;
const BUFFER: usize = 64 * 1024;
const HELLO: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: 13\r\n\r\nHello, world!";
const NOT_FOUND: &[u8] = b"HTTP/1.1 404 Not Found\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";

fn serve(mut stream: UnixStream, mib: &[u8]) -> io::Result<()> {
    // The whole of an answer goes in one write; what is received, one read may hold several requests of, or a part of one.
    let mut buffer = Vec::with_capacity(2 * BUFFER);
    loop {
        let Some(end) = head_end(&buffer) else {
            if buffer.len() > BUFFER {
                return stream.write_all(NOT_FOUND);
            }
            if receive(&mut stream, &mut buffer)? == 0 {
                return Ok(());
            }
            continue;
        };
        let head = &buffer[..end];
        if head.starts_with(b"GET /bench/hello ") {
            stream.write_all(HELLO)?;
            buffer.drain(..end);
        } else if head.starts_with(b"GET /bench/mib ") {
            stream.write_all(mib)?;
            buffer.drain(..end);
        } else if let (true, Some(length)) = (head.starts_with(b"POST /bench/echo "), content_length(head)) {
            while buffer.len() < end + length {
                if receive(&mut stream, &mut buffer)? == 0 {
                    return Ok(());
                }
            }
            stream.write_all(&binary(&buffer[end..end + length]))?;
            buffer.drain(..end + length);
        } else {
            // The request may have a body, which is not understood here: answer and close.
            return stream.write_all(NOT_FOUND);
        }
    }
}

fn receive(stream: &mut UnixStream, buffer: &mut Vec<u8>) -> io::Result<usize> {
    let filled = buffer.len();
    buffer.resize(filled + BUFFER, 0);
    let received = stream.read(&mut buffer[filled..])?;
    buffer.truncate(filled + received);
    Ok(received)
}

/// Where the first request's head ends, just behind its empty line.
fn head_end(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|w| w == b"\r\n\r\n").map(|at| at + 4)
}

/// The length of a request's body, if there is one that is not too large.
fn content_length(head: &[u8]) -> Option<usize> {
    let head = std::str::from_utf8(head).ok()?.to_ascii_lowercase();
    let value = head.lines().find_map(|line| line.strip_prefix("content-length:"))?;
    value.trim().parse().ok().filter(|length| *length <= MIB)
}

/// An answer of bytes.
fn binary(body: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ncontent-length: {}\r\n\r\n", body.len());
    [head.as_bytes(), body].concat()
}

fn main() -> io::Result<()> {
    let path = std::env::args_os().nth(1).ok_or_else(|| io::Error::other("usage: bench-peer SOCKET"))?;
    let mib: &[u8] = binary(&vec![b'm'; MIB]).leak();
    for stream in UnixListener::bind(path)?.incoming() {
        let stream = stream?;
        // An error ends its connection only: the other side is gone.
        thread::Builder::new().name("connection".into()).spawn(move || serve(stream, mib))?;
    }
    Ok(())
}
