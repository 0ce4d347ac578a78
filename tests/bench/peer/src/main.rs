//! The server behind nginx in the benchmark: `GET /hello` over keep-alive HTTP/1.1 on a Unix socket.
//! It does as little as a correct server can, so that what is measured beside the host is nginx.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

const HELLO: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: 13\r\n\r\nHello, world!";
const NOT_FOUND: &[u8] = b"HTTP/1.1 404 Not Found\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";

fn serve(mut stream: UnixStream) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    let mut filled = 0;
    loop {
        let mut start = 0;
        // One read may hold several requests, or a part of one.
        while let Some(end) = head_end(&buffer[start..filled]) {
            if !buffer[start..].starts_with(b"GET /hello ") {
                // The request may have a body, which is not understood here: answer and close.
                return stream.write_all(NOT_FOUND);
            }
            stream.write_all(HELLO)?;
            start += end;
        }
        buffer.copy_within(start..filled, 0);
        filled -= start;
        // Reading into a full buffer reads nothing, so a head that does not fit ends the connection as well.
        match stream.read(&mut buffer[filled..])? {
            0 => return Ok(()),
            n => filled += n,
        }
    }
}

/// Where the first request's head ends, just behind its empty line.
fn head_end(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|w| w == b"\r\n\r\n").map(|at| at + 4)
}

fn main() -> io::Result<()> {
    let path = std::env::args_os().nth(1).ok_or_else(|| io::Error::other("usage: bench-peer SOCKET"))?;
    for stream in UnixListener::bind(path)?.incoming() {
        let stream = stream?;
        // An error ends its connection only: the other side is gone.
        thread::Builder::new().name("connection".into()).spawn(move || serve(stream))?;
    }
    Ok(())
}
