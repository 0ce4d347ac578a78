//! A plain HTTP/1.1 client over a socket, which shows exactly what came.

use super::PATIENCE;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, socket_with, sockopt};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// What carries a connection's bytes.
pub(crate) trait Transport: Read + Write + Send {
    /// Ends the sending side alone.
    fn end_sending(&mut self);

    /// Sets how long a read may wait.
    fn set_read_time(&mut self, time: Duration);

    /// The connection itself where it is plain TCP.
    fn tcp(&self) -> Option<&TcpStream> {
        None
    }
}

impl Transport for TcpStream {
    fn end_sending(&mut self) {
        self.shutdown(Shutdown::Write).unwrap();
    }

    fn set_read_time(&mut self, time: Duration) {
        self.set_read_timeout(Some(time)).unwrap();
    }

    fn tcp(&self) -> Option<&TcpStream> {
        Some(self)
    }
}

impl Transport for UnixStream {
    fn end_sending(&mut self) {
        self.shutdown(Shutdown::Write).unwrap();
    }

    fn set_read_time(&mut self, time: Duration) {
        self.set_read_timeout(Some(time)).unwrap();
    }
}

/// A connection to a server.
pub(crate) struct Client {
    stream: BufReader<Box<dyn Transport>>,
}

/// An answer.
#[derive(Debug, Default)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    /// Names in lower case.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Reply {
    /// The first header of a name.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// All headers of a name.
    pub(crate) fn all(&self, name: &str) -> Vec<&str> {
        self.headers.iter().filter(|(n, _)| n == name).map(|(_, value)| value.as_str()).collect()
    }

    /// The body as text.
    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    /// The body as JSON.
    #[track_caller]
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

impl Client {
    pub(crate) fn connect(address: SocketAddr) -> Self {
        Self::over_tcp(TcpStream::connect(address).unwrap())
    }

    /// Connects from an address of this machine's own, such as the many of the loopback's network.
    pub(crate) fn connect_from(from: impl Into<IpAddr>, address: SocketAddr) -> Self {
        Self::connect_with(from.into(), address, None)
    }

    /// A client for which the kernel takes only some thousand bytes before they are read.
    pub(crate) fn connect_narrow(from: impl Into<IpAddr>, address: SocketAddr) -> Self {
        Self::connect_with(from.into(), address, Some(4096))
    }

    fn connect_with(from: IpAddr, address: SocketAddr, buffer: Option<usize>) -> Self {
        let socket = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        if let Some(buffer) = buffer {
            sockopt::set_socket_recv_buffer_size(&socket, buffer).unwrap();
        }
        bind(&socket, &SocketAddr::new(from, 0)).unwrap();
        connect(&socket, &address).unwrap();
        Self::over_tcp(socket.into())
    }

    fn over_tcp(stream: TcpStream) -> Self {
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self::over(stream)
    }

    /// Connects to a Unix socket.
    pub(crate) fn connect_unix(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self::over(stream)
    }

    /// A client over a connection that is there.
    pub(crate) fn over(stream: impl Transport + 'static) -> Self {
        Self { stream: BufReader::with_capacity(64 * 1024, Box::new(stream)) }
    }

    /// Sends bytes as they are. A server that has ended the connection by then may have answered before: what it said, or that it said nothing,
    /// is seen when that is read.
    #[track_caller]
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        match self.stream.get_mut().write_all(bytes) {
            Err(error) if !matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => {
                panic!("sending: {error}")
            }
            _ => {}
        }
    }

    /// Sends a request on a connection that the server may end while it is idle; says whether an answer has begun.
    pub(crate) fn begin_get(&mut self, path: &str) -> bool {
        self.send(format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n").as_bytes());
        self.stream.fill_buf().is_ok_and(|come| !come.is_empty())
    }

    /// Sends bytes, and says whether the server still takes them.
    pub(crate) fn try_send(&mut self, bytes: &[u8]) -> bool {
        self.stream.get_mut().write_all(bytes).is_ok()
    }

    /// The same connection, for another thread to write to.
    pub(crate) fn writer(&self) -> Self {
        Self::over_tcp(self.stream.get_ref().tcp().unwrap().try_clone().unwrap())
    }

    /// Ends the connection by a reset.
    pub(crate) fn reset(self) {
        sockopt::set_socket_linger(self.stream.get_ref().tcp().unwrap(), Some(Duration::ZERO)).unwrap();
    }

    /// Tells the server that nothing more is sent.
    pub(crate) fn end_sending(&mut self) {
        self.stream.get_mut().end_sending();
    }

    #[track_caller]
    pub(crate) fn get(&mut self, path: &str) -> Reply {
        self.request("GET", path, &[], b"")
    }

    /// Sends a request and reads its answer.
    #[track_caller]
    pub(crate) fn request(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
        let mut head = format!("{method} {path} HTTP/1.1\r\nhost: test\r\n");
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        if !body.is_empty() {
            head.push_str(&format!("content-length: {}\r\n", body.len()));
        }
        head.push_str("\r\n");
        self.send(&[head.as_bytes(), body].concat());
        self.reply(method == "HEAD")
    }

    /// Begins the fake plugin's stream of events: the head of the answer, once the first of them has come.
    #[track_caller]
    pub(crate) fn begin_events(&mut self) -> Reply {
        self.send(b"GET /p/events HTTP/1.1\r\nhost: test\r\n\r\n");
        let head = self.reply_head();
        assert_eq!(self.body_piece(&head).unwrap(), b"data: first\n\n");
        head
    }

    /// Sends a request with its body in chunks and reads its answer.
    #[track_caller]
    pub(crate) fn request_chunked(&mut self, method: &str, path: &str, chunks: &[&[u8]]) -> Reply {
        self.send(format!("{method} {path} HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n").as_bytes());
        for data in chunks {
            self.send(&chunk(data));
        }
        self.send(b"0\r\n\r\n");
        self.reply(false)
    }

    /// Reads an answer, its interim ones passed over.
    #[track_caller]
    pub(crate) fn reply(&mut self, head_request: bool) -> Reply {
        let mut reply = self.reply_head();
        while (100..200).contains(&reply.status) {
            reply = self.reply_head();
        }
        if !head_request && !matches!(reply.status, 204 | 304) {
            while let Some(piece) = self.body_piece(&reply) {
                reply.body.extend(piece);
            }
        }
        reply
    }

    /// Reads the head of an answer alone.
    #[track_caller]
    pub(crate) fn reply_head(&mut self) -> Reply {
        let line = self.line();
        let status = line.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)).and_then(|code| code.parse().ok());
        let status = status.unwrap_or_else(|| panic!("not a status line: {line:?}"));
        let mut headers = Vec::new();
        loop {
            let line = self.line();
            match line.split_once(": ") {
                Some((name, value)) => headers.push((name.to_ascii_lowercase(), value.to_owned())),
                None => break assert!(line.is_empty(), "not a header: {line:?}"),
            }
        }
        Reply { status, headers, body: Vec::new() }
    }

    /// Reads the next piece of a body: a chunk, or all that was declared. Nothing at its end.
    #[track_caller]
    pub(crate) fn body_piece(&mut self, reply: &Reply) -> Option<Vec<u8>> {
        let mut piece = Vec::new();
        if reply.header("transfer-encoding") == Some("chunked") {
            let line = self.line();
            let size = usize::from_str_radix(&line, 16).unwrap_or_else(|_| panic!("not a chunk size: {line:?}"));
            piece.resize(size, 0);
            self.stream.read_exact(&mut piece).unwrap();
            assert_eq!(self.line(), "");
        } else if let Some(length) = reply.header("content-length") {
            piece.resize(length.parse::<usize>().unwrap() - reply.body.len(), 0);
            self.stream.read_exact(&mut piece).unwrap();
        } else {
            self.stream.read_to_end(&mut piece).unwrap();
        }
        (!piece.is_empty()).then_some(piece)
    }

    /// Whether something comes within a time; it is still there to be read.
    pub(crate) fn wait_readable(&mut self, time: Duration) -> bool {
        self.stream.get_mut().set_read_time(time);
        let came = self.stream.fill_buf().is_ok();
        self.stream.get_mut().set_read_time(PATIENCE);
        came
    }

    /// Reads so many bytes.
    #[track_caller]
    pub(crate) fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Whether the server has closed the connection, or broken it.
    pub(crate) fn is_closed(&mut self) -> bool {
        !matches!(self.stream.read(&mut [0; 1]), Ok(1..))
    }

    /// Reads some of what has come, at most so many bytes, and says how many; nothing at the end, or when the server has broken off.
    pub(crate) fn some(&mut self, most: usize) -> Option<usize> {
        let mut bytes = vec![0; most];
        self.stream.get_mut().read(&mut bytes).ok().filter(|n| *n > 0)
    }

    /// Reads whatever comes until the end of the connection, or so many bytes.
    pub(crate) fn all(&mut self, most: usize) -> Vec<u8> {
        let mut all = Vec::new();
        // A reset is an end too.
        drop((&mut self.stream).take(most as u64).read_to_end(&mut all));
        all
    }

    /// Reads whatever comes until the end of the connection.
    pub(crate) fn rest(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        // A reset is an end too.
        drop(self.stream.read_to_end(&mut rest));
        rest
    }

    #[track_caller]
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        line.strip_suffix("\r\n").unwrap_or_else(|| panic!("a line cut short: {line:?}")).to_owned()
    }
}

/// A chunk of a body as it goes on the wire.
pub(crate) fn chunk(data: &[u8]) -> Vec<u8> {
    [format!("{:x}\r\n", data.len()).as_bytes(), data, b"\r\n"].concat()
}
