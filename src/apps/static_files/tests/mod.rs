//! Requests to a site, through a real responder and its channel.

mod answers;
mod paths;
mod sending;

use super::*;
use crate::http::InFlight;
use crate::http::direct_writer::DirectWriter;
use crate::http::framing::Terms;
use crate::http::parse::fuzzing::LIMITS;
use crate::http::parse::request_head;
use crate::http::request::{BodyLength, Method, Origin, RequestBody, RequestId};
use crate::http::responder::Responder;
use crate::http::response_channel::{Address, Next, Pieces, ResponsePart, Responses, Then, response_channel};
use proptest::prelude::*;
use rustix::fd::OwnedFd;
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use std::fs;
use std::io::Read;
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Time for what another thread does.
const PATIENCE: Duration = Duration::from_secs(60);

/// The length of the route in each request's path: that of `/site`.
const MOUNT: usize = 5;

/// A root beside files that must not be served.
struct Fixture {
    directory: tempfile::TempDir,
    log: Log,
}

#[derive(Default)]
struct Log {
    lines: Mutex<Vec<String>>,
    turns: AtomicUsize,
    interrupts: AtomicBool,
}

impl Caller for Log {
    fn interrupts(&self) -> bool {
        self.turns.fetch_add(1, Ordering::SeqCst);
        self.interrupts.load(Ordering::SeqCst)
    }

    fn note_failed(&self, line: &str) {
        self.lines.lock().unwrap().push(line.to_owned());
    }
}

/// The client's side of a request.
struct Exchange {
    responses: Responses,
    in_flight: Arc<InFlight>,
}

struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
    /// Whether it came whole.
    complete: bool,
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }
}

/// A request with these lines after its first, for a client whose socket is lent if there is one.
fn request(method: &str, path: &str, lines: &[&str], socket: Option<UnixStream>) -> (Request, Exchange) {
    let lines: String = lines.iter().map(|line| format!("{line}\r\n")).collect();
    let text = format!("{method} {path} HTTP/1.1\r\nhost: h\r\n{lines}\r\n");
    let mut head = Vec::new();
    request_head::read(text.as_bytes(), LIMITS, None, &mut 0, &mut head).unwrap().unwrap();
    let terms = Terms { head: method == "HEAD", old: false, last: false };
    let socket = socket.map(|socket| {
        socket.set_nonblocking(true).unwrap();
        Arc::new(OwnedFd::from(socket))
    });
    let arrived = Instant::now();
    let in_flight = InFlight::new(DirectWriter::new(socket, terms, true), arrived);
    let (channel, responses) = response_channel().unwrap();
    let responder = Responder::new(Arc::clone(&in_flight), Arc::new(channel), Address { connection: 1, request: 1 });
    let request = Request {
        head,
        mount: MOUNT,
        method: Method::named(method),
        origin: Origin { address: None, https: false, proxied: false },
        id: RequestId { prefix: "0123456789ab".into(), number: 31 },
        length: BodyLength::Known(0),
        upgrade: false,
        declares_body: false,
        body: RequestBody::Whole(None),
        responder,
        arrived,
        alone: false,
        loss: None,
    };
    (request, Exchange { responses, in_flight })
}

impl Exchange {
    /// The first part of the answer, and its pieces.
    fn begun(&self) -> (u16, Vec<u8>, Option<Pieces>) {
        let start = Instant::now();
        loop {
            match self.responses.take() {
                Some((_, ResponsePart::Begun { begun, bytes, rest })) => return (begun.status, bytes, rest),
                Some((_, ResponsePart::Direct { begun, unsent, then: Then::Pieces(rest) })) => {
                    return (begun.status, unsent, Some(rest));
                }
                Some((_, ResponsePart::Direct { begun, unsent, then: Then::Ended })) => return (begun.status, unsent, None),
                Some((_, ResponsePart::Direct { then: Then::Direct, .. })) => {}
                Some(_) => panic!("not the beginning of an answer"),
                None => {
                    assert!(start.elapsed() < PATIENCE);
                    std::thread::yield_now();
                }
            }
        }
    }

    /// The first part of an answer that goes straight to the client, but for its beginning.
    fn taken(&self) -> Option<ResponsePart> {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            match self.responses.take() {
                Some((_, ResponsePart::Direct { then: Then::Direct, .. })) => {}
                Some((_, part)) => return Some(part),
                None => std::thread::yield_now(),
            }
        }
        None
    }

    /// Appends the pieces. Whether they are complete.
    fn rest(pieces: &Pieces, bytes: &mut Vec<u8>) -> bool {
        let start = Instant::now();
        loop {
            match pieces.next() {
                Next::Piece(piece) => bytes.extend_from_slice(&piece),
                Next::End => return true,
                Next::Broken => return false,
                Next::Nothing => {
                    assert!(start.elapsed() < PATIENCE);
                    std::thread::yield_now();
                }
            }
        }
    }

    /// The whole answer.
    fn answer(&self) -> Answer {
        let (status, mut bytes, rest) = self.begun();
        let complete = rest.is_none_or(|rest| Self::rest(&rest, &mut bytes));
        let end = bytes.windows(4).position(|end| end == b"\r\n\r\n").unwrap();
        let head = String::from_utf8(bytes[..end + 2].to_vec()).unwrap();
        Answer { status, head, body: bytes.split_off(end + 4), complete }
    }
}

impl Fixture {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("root")).unwrap();
        let fixture = Self { directory, log: Log::default() };
        fs::write(fixture.outside("secret.txt"), "SECRET").unwrap();
        fixture
    }

    fn outside(&self, path: &str) -> PathBuf {
        self.directory.path().join(path)
    }

    fn path(&self, path: &str) -> PathBuf {
        self.outside("root").join(path)
    }

    /// Writes a file that is long since unchanged, with its directories.
    fn write(&self, path: &str, content: impl AsRef<[u8]>) -> &Self {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        set_age(&path, 1000);
        self
    }

    fn link(&self, target: impl AsRef<Path>, path: &str) {
        symlink(target, self.path(path)).unwrap();
    }

    fn options(&self) -> SiteOptions {
        SiteOptions { root: self.outside("root"), index: vec![DEFAULT_INDEX.into()], spa: false, cache_control: None }
    }

    fn site(&self) -> Site {
        Site::open(&self.options()).unwrap()
    }

    fn ask(&self, site: &mut Site, method: &str, path: &str, lines: &[&str]) -> Answer {
        let (request, exchange) = request(method, &format!("/site{path}"), lines, None);
        site.serve(request, &self.log);
        exchange.answer()
    }

    /// The answer of a site with the usual options to a `GET`.
    fn get(&self, path: &str, lines: &[&str]) -> Answer {
        self.ask(&mut self.site(), "GET", path, lines)
    }

    /// Serves a request on another thread while `client` has its other side.
    fn exchange<T>(&self, path: &str, socket: Option<UnixStream>, client: impl FnOnce(&Exchange) -> T) -> T {
        let (request, exchange) = request("GET", &format!("/site{path}"), &[], socket);
        let mut site = self.site();
        std::thread::scope(|scope| {
            let serve = || site.serve(request, &self.log);
            let server = std::thread::Builder::new().name("site".into()).spawn_scoped(scope, serve).unwrap();
            let result = client(&exchange);
            server.join().unwrap();
            result
        })
    }

    fn lines(&self) -> Vec<String> {
        std::mem::take(&mut *self.log.lines.lock().unwrap())
    }
}

fn set_age(path: &Path, seconds: u64) {
    let file = fs::File::options().write(true).open(path).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_secs(seconds)).unwrap();
}

/// Bytes that differ from piece to piece.
fn content(length: usize) -> Vec<u8> {
    (0..length).map(|at| b'a' + u8::try_from((at / 7 + at / 65_536) % 26).unwrap()).collect()
}
