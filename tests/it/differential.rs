//! The gate beside nginx: the same requests, well and ill formed, and what each of the two makes of them. Where they differ, the page
//! `docs/front-door.md` says why.

use crate::support::{PATIENCE, Server, Site, command, root, wait_for};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use tempfile::TempDir;

/// Requests that are compared, or `PLUGRACK_REQUESTS`.
const REQUESTS: usize = 4000;

/// As many have every kind of difference among them.
const ALL_KINDS: usize = 20_000;

/// Requests under way at once.
const AT_ONCE: usize = 8;

/// What stands behind each request: whoever sees where that one ends sees this.
const NEXT: &[u8] = b"GET /p/upload?next HTTP/1.1\r\nhost: next\r\nconnection: close\r\n\r\n";

// --- Requests -------------------------------------------------------------------------------------------

/// A request line's parts, most of them as they should be.
fn line() -> impl Strategy<Value = Vec<u8>> {
    let method = prop_oneof![
        20 => select(vec!["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"]),
        1 => select(vec!["PURGE", "M-SEARCH", "get", "G<T", "", "TRACE", "CONNECT", "A-METHOD-THAT-IS-LONGER-THAN-ANY-OTHER"]),
    ];
    let target = prop_oneof![
        20 => select(vec!["/p/upload", "/p/upload?a=b&c", "/p/upload?%20%ff", "/p/x", "/p/x/é?ü=\u{3057}"]),
        2 => select(vec!["http://test/p/upload", "HTTP://test:80/p/upload", "https://test/p/upload", "http://a@test/p/upload"]),
        2 => select(vec![
            "*", "p/upload", "", "/p/upload#x", "/p/up load", "/p/\u{7f}", "/p/é", "/p/%", "/p/../p/upload", "/p/%00", "//test/p", "http:///p",
            "test:80", "/p/\t", "/p/\u{1}", "ftp://test/p",
        ]),
    ];
    let version = prop_oneof![
        20 => Just("HTTP/1.1"),
        2 => Just("HTTP/1.0"),
        1 => select(vec!["HTTP/2.0", "HTTP/1.2", "HTTP/0.9", "http/1.1", "HTTP/1.10", "HTTP/1", "HTTP/01.1", "ICY/1.1", "HTTP/1.1 ", ""]),
    ];
    let before = prop_oneof![20 => Just(""), 1 => select(vec!["\r\n", "\r\n\r\n", "\n", " "])];
    (before, method, target, version).prop_map(|(before, m, t, v)| format!("{before}{m} {t} {v}\r\n").into_bytes())
}

/// The line or lines that name the host.
fn host() -> impl Strategy<Value = Vec<u8>> {
    let text = prop_oneof![
        20 => select(vec!["Host: test\r\n", "host:test:80\r\n", "HOST: [::1]:80\r\n"]),
        2 => select(vec![
            "", "Host:\r\n", "Host: a b\r\n", "Host: a,b\r\n", "Host: a@b\r\n", "Host: a/b\r\n", "Host: a\r\nHost: a\r\n", "Host: a:b\r\n",
            "Host: [::1\r\n", "Host: é\r\n", "Host : a\r\n", "Host: ..\r\n", "Host: a..b\r\n", "Host: a_b\r\n",
        ]),
    ];
    text.prop_map(|text| text.as_bytes().to_vec())
}

/// A header that is not about the framing.
fn field() -> impl Strategy<Value = Vec<u8>> {
    let free =
        ("[A-Za-z][A-Za-z0-9-]{0,12}", "[ -~]{0,24}").prop_map(|(name, value)| format!("x-{name}: {value}\r\n").into_bytes());
    let known = select(vec![
        "Connection: close\r\n",
        "Connection: keep-alive, x-a\r\n",
        "Accept: */*\r\n",
        "x_y: 1\r\n",
        "X-Forwarded-For: 192.0.2.1\r\n",
        "TE: trailers\r\n",
        "Expect: 100-continue\r\n",
    ]);
    let odd = select(vec![
        &b"x-obs: \xe9\xff\r\n"[..],
        b"x-tab: a\tb\r\n",
        b"x-nul: a\0b\r\n",
        b"x-cr: a\rb\r\n",
        b"x-del: a\x7fb\r\n",
        b"x-ctl: a\x01b\r\n",
        b"x-fold: a\r\n b\r\n",
        b" x-first: a\r\n",
        b"x-space : a\r\n",
        b": a\r\n",
        b"no-colon\r\n",
        b"x[y]: a\r\n",
        b"x-\xe9: a\r\n",
        b"x-lf: a\n",
        b"Expect: 200-ok\r\n",
        b"Upgrade: h2c\r\n",
        b"x-plugrack: key http 1.2.3.4 -\r\n",
        b"Trailer: x-a\r\n",
    ])
    .prop_map(<[u8]>::to_vec);
    prop_oneof![8 => free, 4 => known.prop_map(|text| text.as_bytes().to_vec()), 1 => odd]
}

/// Headers about the framing, and what then comes as a body.
fn body() -> impl Strategy<Value = (Vec<u8>, Vec<u8>)> {
    let none = Just((Vec::new(), Vec::new()));
    let right = vec(any::<u8>(), 0..200).prop_map(|data| (format!("Content-Length: {}\r\n", data.len()).into_bytes(), data));
    let wrong = select(vec![
        "Content-Length: 4\r\n",
        "Content-Length: 6\r\n",
        "Content-Length: +5\r\n",
        "Content-Length: -5\r\n",
        "Content-Length: 0x5\r\n",
        "Content-Length: 5,5\r\n",
        "Content-Length: 5, 5\r\n",
        "Content-Length: 5\r\nContent-Length: 5\r\n",
        "Content-Length: 5\r\nContent-Length: 6\r\n",
        "Content-Length: 5 \r\n",
        "Content-Length:\t5\r\n",
        "Content-Length: 0000000005\r\n",
        "Content-Length: 00000000000000000000000000005\r\n",
        "Content-Length: 5.0\r\n",
        "Content-Length: \r\n",
        "Content-Length : 5\r\n",
        "Content-Length: 99999999999999999999\r\n",
        "Content-Length: 18446744073709551621\r\n",
        "Content-Length: 5 5\r\n",
        "Content_Length: 5\r\n",
        "Content-Length: 68719476736\r\n",
        "Content-Length: five\r\n",
        "Transfer-Encoding: identity\r\nContent-Length: 5\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
        "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
    ])
    .prop_map(|text| (text.as_bytes().to_vec(), b"ABCDE".to_vec()));
    let coding = prop_oneof![
        20 => select(vec!["chunked", "Chunked", "CHUNKED"]),
        3 => select(vec![
            "xchunked", "chunked, chunked", "gzip, chunked", "identity", "chunked, identity", "\tchunked", "chunked ", "\"chunked\"", "chunked;q=1",
            ",chunked", "chunked,", "", "gzip", "chunked\r\nTransfer-Encoding: chunked", "chunked\r\nTransfer-Encoding: identity",
            "\x0bchunked", "chun ked",
        ]),
    ];
    let chunked = (coding, vec(chunk(), 0..4), end()).prop_map(|(coding, chunks, end)| {
        (format!("Transfer-Encoding: {coding}\r\n").into_bytes(), [chunks.concat(), end].concat())
    });
    prop_oneof![6 => none, 6 => right, 3 => wrong, 8 => chunked]
}

/// A chunk, nearly always as it should be.
fn chunk() -> impl Strategy<Value = Vec<u8>> {
    let good =
        (vec(any::<u8>(), 1..40), any::<bool>(), prop_oneof![4 => Just(""), 1 => select(vec![";a", ";a=b", ";a=\"b\"", " ;a"])]);
    let good = good.prop_map(|(data, upper, extension)| {
        let size = if upper { format!("{:X}", data.len()) } else { format!("0{:x}", data.len()) };
        [format!("{size}{extension}\r\n").as_bytes(), &data, b"\r\n"].concat()
    });
    let bad = select(vec![
        &b"5\nABCDE\r\n"[..],
        b"5\r\nABCDE\n",
        b"5\r\nABCDEX\r\n",
        b"-5\r\nABCDE\r\n",
        b"0x5\r\nABCDE\r\n",
        b" 5\r\nABCDE\r\n",
        b"5 \r\nABCDE\r\n",
        b"+5\r\nABCDE\r\n",
        b"\r\n",
        b"fffffffffffffffff\r\nABCDE\r\n",
        b"5\r\nABCDE",
        b"5;\r\nABCDE\r\n",
        b"5;a\nb\r\nABCDE\r\n",
        b"5\r\r\nABCDE\r\n",
        b"10000000000000005\r\nABCDE\r\n",
        b"5;\0\r\nABCDE\r\n",
    ]);
    prop_oneof![12 => good, 1 => bad.prop_map(<[u8]>::to_vec)]
}

/// The end of a body in chunks.
fn end() -> impl Strategy<Value = Vec<u8>> {
    let good = select(vec![&b"0\r\n\r\n"[..], b"000\r\n\r\n", b"0\r\nx-a: b\r\n\r\n", b"0;a=b\r\n\r\n"]);
    let bad = select(vec![
        &b"0\n\n"[..],
        b"0\r\n\n",
        b"0\r\nx-a\r\n\r\n",
        b"0\r\n x: y\r\n\r\n",
        b"",
        b"0\r\n",
        b"0\r\nContent-Length: 5\r\n\r\n",
        b"0\r\nx-a: b\n\r\n",
        b"0\r\nx-a: \0\r\n\r\n",
    ]);
    prop_oneof![10 => good, 1 => bad].prop_map(<[u8]>::to_vec)
}

/// What is done to a request's head afterwards.
#[derive(Debug, Clone)]
enum Change {
    Insert(Index, &'static [u8]),
    Replace(Index, &'static [u8]),
    Remove(Index, usize),
    Double(Index, usize),
}

impl Change {
    fn make(&self, bytes: &mut Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        let range = |at: &Index, n: usize| at.index(bytes.len())..(at.index(bytes.len()) + n).min(bytes.len());
        let (range, with) = match self {
            Self::Insert(at, with) => (range(at, 0), with.to_vec()),
            Self::Replace(at, with) => (range(at, with.len()), with.to_vec()),
            Self::Remove(at, n) => (range(at, *n), Vec::new()),
            Self::Double(at, n) => (range(at, 0), bytes[range(at, *n)].to_vec()),
        };
        bytes.splice(range, with);
    }
}

fn change() -> impl Strategy<Value = Change> {
    let bytes = || {
        select(vec![&b"\r"[..], b"\n", b"\r\n", b" ", b"\t", b"\0", b":", b"\x80", b",", b"a", b"\r\n\r\n", b"/", b"%", b"\x0b"])
    };
    prop_oneof![
        (any::<Index>(), bytes()).prop_map(|(at, with)| Change::Insert(at, with)),
        (any::<Index>(), bytes()).prop_map(|(at, with)| Change::Replace(at, with)),
        (any::<Index>(), 1..6_usize).prop_map(|(at, n)| Change::Remove(at, n)),
        (any::<Index>(), 1..20_usize).prop_map(|(at, n)| Change::Double(at, n)),
    ]
}

/// A request: its head, and what comes after it.
fn request() -> impl Strategy<Value = Vec<u8>> {
    let changes = prop_oneof![3 => Just(Vec::new()), 2 => vec(change(), 1..3)];
    (line(), host(), vec(field(), 0..4), body(), changes, any::<bool>()).prop_map(
        |(line, host, fields, (framing, body), changes, first)| {
            let headers = if first { [framing, fields.concat()].concat() } else { [fields.concat(), framing].concat() };
            let mut head = [line, host, headers, b"\r\n".to_vec()].concat();
            changes.iter().for_each(|change| change.make(&mut head));
            [head, body].concat()
        },
    )
}

// --- The two --------------------------------------------------------------------------------------------

/// nginx before a small server that says how long each body was.
struct Nginx {
    child: Child,
    dir: TempDir,
}

impl Nginx {
    fn start() -> Self {
        let dir = tempfile::Builder::new().prefix("nginx").tempdir().unwrap();
        let at = dir.path().display();
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .iter()
            .map(|kind| format!("{kind}_temp_path {at}/{kind};"))
            .collect();
        // A client that sends nothing more is waited for, as the gate does; the limits are the gate's.
        let config = format!(
            "daemon off; master_process off; pid {at}/pid; error_log {at}/error.log; events {{}}
            http {{ access_log off; {temporary} client_max_body_size 10m; large_client_header_buffers 4 16k; underscores_in_headers on;
            proxy_ignore_client_abort on;
            server {{ listen unix:{at}/nginx.sock; location / {{ proxy_pass http://unix:{at}/backend.sock; }} }} }}"
        );
        fs::write(dir.path().join("nginx.conf"), config).unwrap();
        let backend = UnixListener::bind(dir.path().join("backend.sock")).unwrap();
        std::thread::Builder::new().spawn(move || serve_lengths(&backend)).unwrap();
        let program =
            ["/usr/sbin/nginx", "nginx"].into_iter().find(|program| !program.starts_with('/') || Path::new(program).exists());
        let mut nginx = command(program.unwrap());
        nginx.arg("-c").arg(dir.path().join("nginx.conf")).arg("-e").arg(dir.path().join("error.log")).arg("-p").arg(dir.path());
        let child = nginx.spawn().expect("nginx is there: make test-tools");
        let nginx = Self { child, dir };
        wait_for("nginx to listen", || UnixStream::connect(nginx.socket()).ok());
        nginx
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("nginx.sock")
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        // The thread behind it ends with this.
        let mut last = UnixStream::connect(self.dir.path().join("backend.sock")).unwrap();
        last.write_all(b"END").unwrap();
    }
}

/// Answers what nginx passes on, in HTTP/1.0, with how long the body was.
fn serve_lengths(listener: &UnixListener) {
    for stream in listener.incoming() {
        let mut stream = BufReader::new(stream.unwrap());
        let mut length = 0;
        loop {
            let mut bytes = Vec::new();
            stream.read_until(b'\n', &mut bytes).unwrap();
            if bytes == b"END" {
                return;
            }
            let line = String::from_utf8_lossy(&bytes).to_ascii_lowercase();
            if let Some(value) = line.strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
            if line.trim_end().is_empty() {
                break;
            }
        }
        let got = std::io::copy(&mut stream.by_ref().take(length), &mut std::io::sink()).unwrap();
        let answer = format!("{got} bytes");
        let head = format!("HTTP/1.0 200 OK\r\ncontent-length: {}\r\n\r\n", answer.len());
        // nginx may have lost its interest.
        drop(stream.get_mut().write_all(format!("{head}{answer}").as_bytes()));
    }
}

/// What came of one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// It was passed on, with so many bytes of body, where the answer tells.
    Accepted(Option<u64>),
    /// It was refused, with the first digit of the status.
    Refused(u8),
}

/// Sends bytes and reads all that comes.
fn exchange(mut stream: impl Read + Write, end: impl Fn(), request: &[u8]) -> Vec<u8> {
    // Whoever has refused already may have closed, and a reset is an end too.
    drop(stream.write_all(request));
    end();
    let mut answers = Vec::new();
    drop(stream.read_to_end(&mut answers));
    answers
}

fn ask_gate(server: &Server, request: &[u8]) -> Vec<Outcome> {
    let stream = TcpStream::connect(server.address()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    outcomes(&exchange(&stream, || stream.shutdown(Shutdown::Write).unwrap_or_default(), request))
}

fn ask_nginx(nginx: &Nginx, request: &[u8]) -> Vec<Outcome> {
    let stream = UnixStream::connect(nginx.socket()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    outcomes(&exchange(&stream, || stream.shutdown(Shutdown::Write).unwrap_or_default(), request))
}

/// The outcomes that answers tell of.
fn outcomes(mut answers: &[u8]) -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    while !answers.is_empty() {
        let end = answers.windows(4).position(|four| four == b"\r\n\r\n");
        let Some(end) = end.filter(|_| answers.starts_with(b"HTTP/1.")) else {
            // An answer of HTTP/0.9, which has no head.
            outcomes.push(Outcome::Accepted(None));
            break;
        };
        let head = String::from_utf8_lossy(&answers[..end]).to_ascii_lowercase();
        answers = &answers[end + 4..];
        let status: u16 = head[9..12].parse().unwrap();
        if status < 200 {
            continue;
        }
        let header = |name: &str| head.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let length = header("content-length:").map_or(answers.len(), |length| length.parse().unwrap());
        let (body, rest) = answers.split_at(length.min(answers.len()));
        answers = rest;
        let body = String::from_utf8_lossy(body);
        outcomes.push(match status {
            200 => Outcome::Accepted(body.split(' ').next().and_then(|bytes| bytes.parse().ok())),
            // The host's own answers to what has passed the gate: no plugin is meant by the path.
            204 | 404 => Outcome::Accepted(None),
            // The plugin has paths at which it breaks off.
            502 if body.contains("the plugin gave no valid answer") => Outcome::Accepted(None),
            405 if header("allow:") == Some("get, head") => Outcome::Accepted(None),
            _ => Outcome::Refused(u8::try_from(status / 100).unwrap()),
        });
    }
    outcomes
}

// --- Differences ----------------------------------------------------------------------------------------

/// How two outcomes differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// The gate refuses what nginx passes on.
    Stricter,
    /// It passes on what nginx refuses.
    Laxer,
    /// Both pass it on, and see its end elsewhere.
    Other,
    /// Both refuse it, one as a mistake of the client and the other as what the server cannot do.
    Status,
}

fn difference(gate: &[Outcome], nginx: &[Outcome]) -> Option<Kind> {
    for number in 0..gate.len().max(nginx.len()) {
        let kind = match (gate.get(number), nginx.get(number)) {
            (Some(Outcome::Accepted(a)), Some(Outcome::Accepted(b))) if a == b || a.is_none() || b.is_none() => continue,
            (Some(Outcome::Accepted(_)), Some(Outcome::Accepted(_))) => Kind::Other,
            (Some(Outcome::Accepted(_)), _) => Kind::Laxer,
            (_, Some(Outcome::Accepted(_))) => Kind::Stricter,
            (Some(Outcome::Refused(a)), Some(Outcome::Refused(b))) if a != b => Kind::Status,
            // nginx refuses some by closing the connection.
            _ => return None,
        };
        return Some(kind);
    }
    None
}

/// A difference that is meant.
struct Allowed {
    kind: Kind,
    /// As the page says it.
    what: &'static str,
    /// Whether a request is of that sort.
    is: fn(&Parts<'_>) -> bool,
}

/// A request's bytes, taken apart as far as is needed to tell what is odd about it.
struct Parts<'a> {
    all: &'a [u8],
    line: &'a [u8],
    /// The lines behind it, up to the empty one, without their ends.
    fields: Vec<&'a [u8]>,
    /// What follows.
    rest: &'a [u8],
}

impl<'a> Parts<'a> {
    fn of(all: &'a [u8]) -> Self {
        let mut lines = all.split_inclusive(|&byte| byte == b'\n').peekable();
        let mut used = 0;
        while lines.peek().is_some_and(|line| line.trim_ascii().is_empty()) {
            used += lines.next().map_or(0, <[u8]>::len);
        }
        let line = lines.next().unwrap_or_default();
        used += line.len();
        let mut fields = Vec::new();
        for field in lines {
            used += field.len();
            let field = field.strip_suffix(b"\n").unwrap_or(field);
            let field = field.strip_suffix(b"\r").unwrap_or(field);
            if field.is_empty() {
                break;
            }
            fields.push(field);
        }
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        Self { all, line: line.strip_suffix(b"\r").unwrap_or(line), fields, rest: &all[used..] }
    }

    fn head(&self) -> &'a [u8] {
        &self.all[..self.all.len() - self.rest.len()]
    }

    /// The values of the headers whose name begins so.
    fn values(&self, name: &str) -> Vec<&'a [u8]> {
        let named = |field: &&[u8]| field.len() >= name.len() && field[..name.len()].eq_ignore_ascii_case(name.as_bytes());
        self.fields.iter().copied().filter(named).map(|field| &field[name.len()..]).collect()
    }

    fn has(&self, name: &str) -> bool {
        !self.values(name).is_empty()
    }

    fn target(&self) -> &'a [u8] {
        let mut words = self.line.split(|&byte| byte == b' ');
        words.nth(1).unwrap_or_default()
    }
}

/// Where chunks, or what follows them, are not as they should be.
#[derive(PartialEq, Eq)]
enum Odd {
    Chunk,
    Trailer,
}

impl Parts<'_> {
    fn method(&self) -> &[u8] {
        self.line.split(|&byte| byte == b' ').next().unwrap_or_default()
    }

    fn version(&self) -> &[u8] {
        self.line.rsplit(|&byte| byte == b' ').next().unwrap_or_default()
    }

    /// What is odd first in a body that comes in chunks.
    fn odd_chunks(&self) -> Option<Odd> {
        let with_next = [self.rest, NEXT].concat();
        let mut rest = &with_next[..];
        if !self.has("transfer-encoding:") {
            return None;
        }
        loop {
            let Some((line, behind)) = line_of(rest) else { return Some(Odd::Chunk) };
            let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
            let extension = &line[digits..];
            let plain = extension.is_empty() || extension.starts_with(b";") && extension.iter().all(|&byte| is_value(byte));
            let size = std::str::from_utf8(&line[..digits]).ok().and_then(|digits| usize::from_str_radix(digits, 16).ok());
            let Some(size) = size.filter(|_| plain && digits <= 16) else { return Some(Odd::Chunk) };
            rest = behind;
            if size == 0 {
                break;
            }
            let Some(behind) = rest.get(size..).and_then(|rest| rest.strip_prefix(b"\r\n")) else { return Some(Odd::Chunk) };
            rest = behind;
        }
        while let Some((line, behind)) = line_of(rest) {
            if line.is_empty() {
                return None;
            }
            if !is_field(line) {
                return Some(Odd::Trailer);
            }
            rest = behind;
        }
        Some(Odd::Trailer)
    }
}

/// The first line, which must end as it should, and what is behind it.
fn line_of(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = bytes.iter().position(|&byte| byte == b'\n')?;
    Some((bytes[..end].strip_suffix(b"\r")?, &bytes[end + 1..]))
}

fn is_value(byte: u8) -> bool {
    matches!(byte, b'\t' | b' '..=0x7e | 0x80..)
}

fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// Whether a line is a name, a colon and a value.
fn is_field(line: &[u8]) -> bool {
    has_name(line) && line.iter().all(|&byte| is_value(byte))
}

fn has_name(line: &[u8]) -> bool {
    line.iter().position(|&byte| byte == b':').is_some_and(|colon| colon > 0 && line[..colon].iter().all(|&byte| is_token(byte)))
}

/// Whether a request has a line that ends without a carriage return.
fn has_bare_lf(parts: &Parts<'_>) -> bool {
    let head = parts.head();
    // An empty line behind it stands before the next.
    (0..head.len()).any(|at| head[at] == b'\n' && (at == 0 || head[at - 1] != b'\r')) || parts.rest.starts_with(b"\n")
}

/// The differences that are meant, in the words of the page. The first that fits counts.
const ALLOWED: [Allowed; 24] = [
    Allowed { kind: Kind::Stricter, what: "a line that ends in LF alone", is: has_bare_lf },
    Allowed {
        kind: Kind::Stricter,
        what: "more than one empty line before a request, or a CR alone",
        is: |parts| parts.line.starts_with(b"\r") || parts.all.starts_with(b"\r\n\r\n") || parts.rest.starts_with(b"\r\n\r\n"),
    },
    Allowed {
        kind: Kind::Stricter,
        what: "a request line without a version (HTTP/0.9)",
        is: |parts| !parts.version().starts_with(b"HTTP/") && !parts.line.ends_with(b" "),
    },
    Allowed {
        kind: Kind::Stricter,
        what: "more spaces in the request line than two, or other white space",
        is: |parts| parts.line.iter().filter(|byte| matches!(byte, b' ' | b'\t')).count() > 2 || parts.line.ends_with(b" "),
    },
    Allowed {
        kind: Kind::Stricter,
        what: "a version other than HTTP/1.0 and HTTP/1.1",
        is: |parts| !matches!(parts.version(), b"HTTP/1.0" | b"HTTP/1.1"),
    },
    Allowed { kind: Kind::Stricter, what: "a method longer than 32 bytes", is: |parts| parts.method().len() > 32 },
    Allowed {
        kind: Kind::Stricter,
        what: "a target with control characters, or with `#`",
        is: |parts| parts.target().iter().any(|byte| byte.is_ascii_control() || *byte == b'#'),
    },
    Allowed {
        kind: Kind::Stricter,
        what: "a target that is neither a path nor an `http` URL, or names a user",
        is: |parts| !parts.target().starts_with(b"/"),
    },
    Allowed {
        kind: Kind::Stricter,
        what: "a header whose name is not a word before a colon, or that is folded",
        is: |parts| parts.fields.iter().any(|field| !has_name(field)),
    },
    Allowed {
        kind: Kind::Stricter,
        what: "a control character in a header's value",
        is: |parts| parts.fields.iter().any(|field| !field.iter().all(|&byte| is_value(byte))),
    },
    Allowed {
        kind: Kind::Stricter,
        what: "a host with characters that are of no host",
        is: |parts| {
            parts.values("host:").iter().any(|host| {
                host.trim_ascii().iter().any(|byte| !byte.is_ascii_alphanumeric() && !b".-_:[]%~!$&'()*+;=".contains(byte))
            })
        },
    },
    Allowed {
        kind: Kind::Stricter,
        what: "a content-length of more than 19 digits",
        is: |parts| parts.values("content-length:").iter().any(|value| value.trim_ascii().len() > 19),
    },
    Allowed {
        kind: Kind::Stricter,
        what: "an expectation other than 100-continue",
        is: |parts| parts.values("expect:").iter().any(|value| !value.trim_ascii().eq_ignore_ascii_case(b"100-continue")),
    },
    Allowed {
        kind: Kind::Stricter,
        what: "chunks with lines that end in LF alone, space around their size, or control characters",
        is: |parts| parts.odd_chunks() == Some(Odd::Chunk),
    },
    Allowed {
        kind: Kind::Stricter,
        what: "trailers that are not well formed",
        is: |parts| parts.odd_chunks() == Some(Odd::Trailer),
    },
    Allowed {
        kind: Kind::Stricter,
        what: "`connection: close` beside `keep-alive`",
        is: |parts| parts.values("connection:").len() > 1,
    },
    Allowed { kind: Kind::Laxer, what: "`OPTIONS *`", is: |parts| parts.line.starts_with(b"OPTIONS * ") },
    Allowed {
        kind: Kind::Laxer,
        what: "`close` as a part of another word in `connection`",
        is: |parts| {
            let has_close = |value: &&[u8]| value.to_ascii_lowercase().windows(5).any(|part| part == b"close");
            parts.values("connection:").iter().any(has_close)
        },
    },
    Allowed {
        kind: Kind::Laxer,
        what: "an empty host, and one with empty labels",
        is: |parts| {
            parts.values("host:").iter().any(|host| {
                host.trim_ascii().first().is_none_or(|&byte| byte == b':') || host.windows(2).any(|pair| pair == b"..")
            })
        },
    },
    Allowed {
        kind: Kind::Laxer,
        what: "a `%` in the target that is not followed by two digits, or by 00",
        is: |parts| {
            let target = parts.target();
            (0..target.len()).filter(|&at| target[at] == b'%').any(|at| {
                let digits = target.get(at + 1..at + 3).unwrap_or_default();
                digits.len() < 2 || digits == b"00" || !digits.iter().all(u8::is_ascii_hexdigit)
            })
        },
    },
    Allowed {
        kind: Kind::Laxer,
        what: "a method with other characters than capitals, `-` and `_`",
        is: |parts| parts.method().iter().any(|byte| !matches!(byte, b'A'..=b'Z' | b'-' | b'_')),
    },
    Allowed { kind: Kind::Laxer, what: "more than one `expect`", is: |parts| parts.values("expect:").len() > 1 },
    Allowed {
        kind: Kind::Laxer,
        what: "a tab before or behind a value",
        is: |parts| {
            ["content-length:", "transfer-encoding:", "connection:", "host:"]
                .iter()
                .any(|name| parts.values(name).iter().any(|value| value.contains(&b'\t')))
        },
    },
    Allowed {
        kind: Kind::Status,
        what: "400 and 501, or 505 and 400: which fault is named",
        is: |parts| {
            parts.has("transfer-encoding")
                || parts.line.iter().filter(|&&byte| byte == b' ').count() > 2
                || !matches!(parts.version(), b"HTTP/1.0" | b"HTTP/1.1")
                || parts.method().len() > 32
        },
    },
];

#[test]
fn the_gate_takes_and_refuses_what_nginx_does_but_for_what_the_page_says() {
    let page = fs::read_to_string(root().join("docs/front-door.md")).unwrap();
    for allowed in &ALLOWED {
        assert!(
            page.contains(&format!("\n| {} | {} |", format!("{:?}", allowed.kind).to_lowercase(), allowed.what)),
            "not in the page: {}",
            allowed.what
        );
    }
    assert_eq!(
        page.matches("\n| stricter |").count() + page.matches("\n| laxer |").count() + page.matches("\n| status |").count(),
        ALLOWED.len()
    );
    let requests = std::env::var("PLUGRACK_REQUESTS").map_or(REQUESTS, |requests| requests.parse().unwrap());
    let server = Site::new().args(&["--max-connections-per-address", "500"]).fake("p").start();
    server.wait_state("p", "ready");
    let nginx = Nginx::start();
    let mut runner = TestRunner::deterministic();
    let strategy = request();
    let cases: Vec<Vec<u8>> = (0..requests).map(|_| strategy.new_tree(&mut runner).unwrap().current()).collect();
    let next = AtomicUsize::new(0);
    let (met, unexplained, agreed) = (Mutex::new(BTreeMap::new()), Mutex::new(Vec::new()), Mutex::new([0; 2]));
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let bytes = [case, NEXT].concat();
                    let (gate, nginx) = (ask_gate(&server, &bytes), ask_nginx(&nginx, &bytes));
                    let Some(kind) = difference(&gate, &nginx) else {
                        let accepted = matches!(gate.first(), Some(Outcome::Accepted(_)));
                        agreed.lock().unwrap()[usize::from(accepted)] += 1;
                        continue;
                    };
                    let parts = Parts::of(case);
                    match ALLOWED.iter().find(|allowed| allowed.kind == kind && (allowed.is)(&parts)) {
                        Some(allowed) => *met.lock().unwrap().entry((kind, allowed.what)).or_insert(0) += 1,
                        None => {
                            unexplained.lock().unwrap().push(format!("{kind:?}: {gate:?} and {nginx:?}: {}", case.escape_ascii()))
                        }
                    }
                }
            });
        }
    });
    let (met, mut unexplained, agreed) =
        (met.into_inner().unwrap(), unexplained.into_inner().unwrap(), agreed.into_inner().unwrap());
    eprintln!("of {requests} requests both took {}, both refused {}", agreed[1], agreed[0]);
    met.iter().for_each(|((kind, what), count)| eprintln!("{count:5} {kind:?}: {what}"));
    unexplained.sort();
    assert!(unexplained.is_empty(), "{} differences that nothing explains:\n{}", unexplained.len(), unexplained.join("\n"));
    assert!(agreed.iter().all(|agreed| agreed * 10 > requests), "both sorts are there: {agreed:?}");
    if requests >= ALL_KINDS {
        let met: BTreeSet<_> = met.keys().copied().collect();
        let unmet: Vec<_> =
            ALLOWED.iter().filter(|allowed| !met.contains(&(allowed.kind, allowed.what))).map(|allowed| allowed.what).collect();
        assert!(unmet.is_empty(), "the page names differences that are none: {unmet:?}");
    }
    assert_eq!(server.get("/p/x").text(), "GET /x of p");
    assert!(!server.log().contains("panicked"), "{}", server.log());
}
