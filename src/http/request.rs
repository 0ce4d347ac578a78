//! A client's request on its way to a plugin or to the API.

use super::HttpError;
use super::body::Body;
use super::body_stream::BodyReceiver;
use super::errors::{Audience, prefers_html};
use super::responder::Responder;
use memchr::{memchr, memchr_iter, memmem};
use std::fmt;
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes reserved for a message in addition to the request's head.
const MESSAGE_SIZE: usize = 512;

/// Most digits of a 64-bit number in decimal.
const MAX_DIGITS: usize = 20;

/// Most bytes of an address as text: IPv6 with an embedded IPv4 address.
const MAX_ADDRESS: usize = 45;

/// Limit for a path or a key in messages, in characters, so that the reason after it fits into the line.
const MAX_NAMED: usize = 200;

/// The origin of a request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Origin {
    /// The client's address, if it is known.
    pub(crate) address: Option<IpAddr>,
    /// Whether the client uses HTTPS.
    pub(crate) https: bool,
    /// Whether a trusted proxy has passed the request on, so that its request id is used.
    pub(crate) proxied: bool,
}

/// Properties of a request's method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Method {
    /// Safe (RFC 9110, section 9.2.1).
    Get,
    /// Safe, and its answer has no body.
    Head,
    /// Any other method.
    Other,
}

/// The length of a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BodyLength {
    /// In bytes; 0 if there is none.
    Known(u64),
    /// Unknown: the body is chunked.
    Unknown,
}

/// A request's body.
pub(crate) enum RequestBody {
    /// Received completely; none if the request has no body.
    Whole(Option<Body>),
    /// Passed on while it arrives.
    Stream(BodyReceiver),
}

/// How a request was lost with a plugin's connection while the process lived on, so that it may be sent once more.
pub(crate) struct Loss {
    /// The process to which it may be sent again. If that process has ended, the request may be the reason.
    pub(crate) process: u64,
    /// What happened, for the plugin's log.
    pub(crate) why: String,
}

/// A request's id: that of a trusted proxy, or the host's own.
#[derive(Clone)]
pub(crate) struct RequestId {
    /// The common prefix of all ids of this run of the host.
    pub(crate) prefix: Arc<str>,
    /// The request's number in this run.
    pub(crate) number: u64,
}

/// A request. Its [`Responder`] makes sure that the client gets an answer, however it ends.
pub(crate) struct Request {
    /// The canonical head, as [`super::parse::request_head::read`] has written it.
    pub(crate) head: Vec<u8>,
    /// Bytes of the path that are the plugin's route.
    pub(crate) mount: usize,
    pub(crate) method: Method,
    pub(crate) origin: Origin,
    pub(crate) id: RequestId,
    /// Whether the client asks for another protocol on its connection.
    pub(crate) upgrade: bool,
    /// The length of the body.
    pub(crate) length: BodyLength,
    /// Whether the head announced a body, even an empty one: the plugin then sees its `content-length`.
    pub(crate) declares_body: bool,
    pub(crate) body: RequestBody,
    pub(crate) responder: Responder,
    /// When the request was submitted. Its deadlines count from here.
    pub(crate) arrived: Instant,
    /// Whether it was re-queued. It is then not pipelined any more, so that a second loss shows which request it was.
    pub(crate) alone: bool,
    /// How it was lost with its connection, if that happened.
    pub(crate) loss: Option<Box<Loss>>,
}

/// The method and the target in a canonical head, and the header lines behind them.
pub(crate) fn split_head(head: &[u8]) -> (&str, &str, &[u8]) {
    let end = memchr(b'\n', head).map_or(head.len(), |end| end + 1);
    let (line, headers) = head.split_at(end);
    // The request line of a canonical head is ASCII.
    let line = std::str::from_utf8(line).unwrap_or_default();
    let mut words = line.split(' ');
    (words.next().unwrap_or_default(), words.next().unwrap_or_default(), headers)
}

/// The path of a target, and its query without the `?`.
pub(crate) fn split_target(target: &str) -> (&str, Option<&str>) {
    target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)))
}

/// The value of the first header of a name, in lower case, among the lines of a canonical head.
pub(crate) fn header_in<'a>(head: &'a [u8], name: &str) -> Option<&'a [u8]> {
    header_lines(split_head(head).2).find(|(each, _)| *each == name.as_bytes()).map(|(_, value)| value)
}

/// The name and value of each header line.
pub(crate) fn header_lines(lines: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    let mut start = 0;
    memchr_iter(b'\n', lines).filter_map(move |end| {
        let line = lines[start..end].strip_suffix(b"\r");
        start = end + 1;
        let line = line?;
        let (name, value) = line.split_at(memchr(b':', line)?);
        Some((name, value.strip_prefix(b": ").unwrap_or_default()))
    })
}

/// Appends a number in decimal.
fn put_number(out: &mut Vec<u8>, mut number: u64) {
    let mut digits = [0; MAX_DIGITS];
    let mut start = digits.len();
    loop {
        start -= 1;
        digits[start] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[start..]);
}

/// Appends an address as text.
fn put_address(out: &mut Vec<u8>, address: IpAddr) {
    match address {
        IpAddr::V4(address) => {
            for octet in address.octets() {
                put_number(out, octet.into());
                out.push(b'.');
            }
            // The dot after the last octet.
            out.pop();
        }
        IpAddr::V6(address) => {
            // Writing to memory does not fail.
            write!(out, "{address}").ok();
        }
    }
}

/// Appends a text field to a JSON object, after another field.
fn put_field(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    out.extend_from_slice(b",\"");
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b"\":");
    put_text(out, value);
}

/// Appends a pair of name and value, and a comma.
fn put_header(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    out.push(b'[');
    put_text(out, name);
    out.push(b',');
    put_text(out, value);
    out.extend_from_slice(b"],");
}

/// Appends a JSON string with each byte as the character of its number (Latin-1), which is how the protocol represents values that are not
/// ASCII.
fn put_text(out: &mut Vec<u8>, bytes: &[u8]) {
    out.push(b'"');
    if is_plain(bytes) {
        out.extend_from_slice(bytes);
    } else {
        bytes.iter().for_each(|&byte| put_character(out, byte));
    }
    out.push(b'"');
}

/// Appends a character of a JSON string.
fn put_character(out: &mut Vec<u8>, byte: u8) {
    match byte {
        b'"' | b'\\' => out.extend_from_slice(&[b'\\', byte]),
        0x80.. => out.extend_from_slice(char::from(byte).encode_utf8(&mut [0; 2]).as_bytes()),
        ..0x20 => {
            // Writing to memory does not fail.
            write!(out, "\\u{byte:04x}").ok();
        }
        _ => out.push(byte),
    }
}

/// Whether a JSON string represents each of these bytes as itself: printable ASCII, no quote and no backslash. It looks at eight bytes
/// at a time, because almost every text of a request is plain.
fn is_plain(bytes: &[u8]) -> bool {
    let special = if let Some(last) = bytes.last_chunk() {
        // The last eight bytes may overlap with the others.
        let words = bytes.as_chunks().0.iter();
        words.fold(special_bytes(*last), |special, word| special | special_bytes(*word))
    } else if let (Some([a, b, c, d]), Some([e, f, g, h])) = (bytes.first_chunk(), bytes.last_chunk()) {
        special_bytes([*a, *b, *c, *d, *e, *f, *g, *h])
    } else {
        bytes.iter().fold(0, |special, byte| special | special_bytes([*byte; 8]))
    };
    special == 0
}

/// A word that is 0 if none of these bytes needs an escape or two bytes in a JSON string.
///
/// A subtraction sets the high bit of a byte that is smaller than what is taken from it, and borrows from the next byte only then. So
/// the word is never 0 by mistake, nor other than 0 without a special byte.
fn special_bytes(bytes: [u8; 8]) -> u64 {
    const EACH: u64 = u64::from_ne_bytes([1; 8]);
    let word = u64::from_le_bytes(bytes);
    let controls = word.wrapping_sub(EACH * 0x20);
    // A byte becomes 0 where it is the one that is looked for.
    let quotes = (word ^ (EACH * b'"' as u64)).wrapping_sub(EACH);
    let backslashes = (word ^ (EACH * b'\\' as u64)).wrapping_sub(EACH);
    (word | controls | quotes | backslashes) & (EACH << 7)
}

/// A path or a key in a message, shortened.
pub(crate) fn named(text: &str) -> String {
    let mut named: String = text.chars().take(MAX_NAMED).collect();
    if named.len() < text.len() {
        named.push('…');
    }
    named
}

/// How an error is to be rendered for the client whose request has this head.
pub(crate) fn audience<'a>(head: &[u8], id: Option<&'a str>) -> Audience<'a> {
    let (method, _, headers) = split_head(head);
    let accept = header_lines(headers).filter(|(name, _)| *name == b"accept");
    let accept = accept.map(|(_, value)| std::str::from_utf8(value).unwrap_or_default());
    Audience { html: prefers_html(accept), is_safe: matches!(method, "GET" | "HEAD"), id }
}

impl Method {
    /// The properties of the method with this name.
    pub(crate) fn named(name: &str) -> Self {
        match name {
            "GET" => Self::Get,
            "HEAD" => Self::Head,
            _ => Self::Other,
        }
    }
}

impl RequestId {
    /// The id of the request with this head.
    pub(crate) fn of(&self, head: &[u8], origin: Origin) -> String {
        const LINE: &[u8] = b"\nx-request-id: ";
        let given = origin.proxied.then(|| {
            let value = &head[memmem::find(head, LINE)? + LINE.len()..];
            String::from_utf8(value[..memchr(b'\r', value)?].to_vec()).ok()
        });
        given.flatten().unwrap_or_else(|| {
            let mut id = String::with_capacity(self.prefix.len() + 1 + MAX_DIGITS);
            id.push_str(&self.prefix);
            // Writing to memory does not fail.
            fmt::Write::write_fmt(&mut id, format_args!("-{:x}", self.number)).ok();
            id
        })
    }
}

impl Request {
    /// The request's id.
    pub(crate) fn id(&self) -> String {
        self.id.of(&self.head, self.origin)
    }

    /// The request line's method.
    pub(crate) fn method_name(&self) -> &str {
        split_head(&self.head).0
    }

    /// The target: path and query.
    pub(crate) fn target(&self) -> &str {
        split_head(&self.head).1
    }

    /// The first header with a name in lower case, if its value is UTF-8.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        std::str::from_utf8(header_in(&self.head, name)?).ok()
    }

    /// The values of all headers with a name in lower case, if they are UTF-8.
    pub(crate) fn headers(&self, name: &str) -> impl Iterator<Item = &str> {
        let lines = header_lines(split_head(&self.head).2).filter(move |(each, _)| *each == name.as_bytes());
        lines.filter_map(|(_, value)| std::str::from_utf8(value).ok())
    }

    /// Whether the request has no body and changes nothing, so that it may be pipelined and sent again (RFC 9110, section 9.2).
    pub(crate) fn is_safe(&self) -> bool {
        self.method != Method::Other && self.length == BodyLength::Known(0)
    }

    /// Whether the answer's body is not sent.
    pub(crate) fn is_head(&self) -> bool {
        self.method == Method::Head
    }

    /// Method, path and id, for messages. The query is left out, since it may hold secrets.
    pub(crate) fn name(&self) -> String {
        let (method, target, _) = split_head(&self.head);
        format!("{method} {} (request {})", named(split_target(target).0), self.id())
    }

    /// Appends the protocol's `http` message for the plugin as JSON. It is written directly from the head, because every request passes
    /// here.
    pub(crate) fn encode(&self, id: u64, more: bool, out: &mut Vec<u8>) {
        out.reserve(self.head.len() + MESSAGE_SIZE);
        out.extend_from_slice(br#"{"type":"http","id":"#);
        put_number(out, id);
        let (method, target, lines) = split_head(&self.head);
        put_field(out, "method", method.as_bytes());
        self.encode_fields(target, lines, |name| matches!(name, b"x-request-id" | b"upgrade"), out);
        out.extend_from_slice(if more { br#","more":true}"# } else { br#","more":false}"# });
    }

    /// Appends the protocol's `ws_open` message.
    pub(crate) fn encode_open(&self, id: u64, credit: u64, out: &mut Vec<u8>) {
        let is_for_host = |name: &[u8]| {
            matches!(
                name,
                b"x-request-id" | b"upgrade" | b"sec-websocket-key" | b"sec-websocket-version" | b"sec-websocket-extensions"
            )
        };
        out.reserve(self.head.len() + MESSAGE_SIZE);
        out.extend_from_slice(br#"{"type":"ws_open","id":"#);
        put_number(out, id);
        let (_, target, lines) = split_head(&self.head);
        self.encode_fields(target, lines, is_for_host, out);
        out.extend_from_slice(br#","credit":"#);
        put_number(out, credit);
        out.push(b'}');
    }

    /// Appends the fields of a message that come from the target and the header lines, without the headers that `is_left_out` names.
    fn encode_fields(&self, target: &str, lines: &[u8], is_left_out: impl Fn(&[u8]) -> bool, out: &mut Vec<u8>) {
        let (path, query) = split_target(target);
        let (mount, path) = path.split_at_checked(self.mount).unwrap_or(("", path));
        let path = if path.is_empty() { "/" } else { path };
        let mut remote = Vec::with_capacity(MAX_ADDRESS);
        if let Some(address) = self.origin.address {
            put_address(&mut remote, address);
        }
        put_field(out, "path", path.as_bytes());
        if let Some(query) = query {
            put_field(out, "query", query.as_bytes());
        }
        put_field(out, "mount", mount.as_bytes());
        out.extend_from_slice(br#","headers":["#);
        for (name, value) in header_lines(lines).filter(|(name, _)| !is_left_out(name)) {
            put_header(out, name, value);
        }
        if let (BodyLength::Known(length), true) = (self.length, self.declares_body) {
            out.extend_from_slice(br#"["content-length",""#);
            put_number(out, length);
            out.extend_from_slice(br#""],"#);
        }
        if !remote.is_empty() {
            put_header(out, b"x-forwarded-for", &remote);
        }
        put_header(out, b"x-forwarded-proto", if self.origin.https { b"https" } else { b"http" });
        put_header(out, b"x-forwarded-prefix", mount.as_bytes());
        put_header(out, b"x-request-id", self.id().as_bytes());
        // The comma after the last pair.
        out.pop();
        out.push(b']');
        put_field(out, "remote", &remote);
    }

    /// The whole body, if it has at most `most` bytes, is one block of memory, and none of it was read.
    pub(crate) fn take_whole_body(&mut self, most: usize) -> Option<Vec<u8>> {
        let RequestBody::Whole(Some(body)) = &mut self.body else { return None };
        if body.len() > most as u64 { None } else { body.take_whole() }
    }

    /// Reads more of the body; 0 at its end.
    ///
    /// # Errors
    /// `WouldBlock` if nothing arrives for `time`, `UnexpectedEof` if the body is incomplete, and those of a temporary file.
    pub(crate) fn read_body(&mut self, buffer: &mut [u8], time: Duration) -> io::Result<usize> {
        match &mut self.body {
            RequestBody::Whole(None) => Ok(0),
            RequestBody::Whole(Some(body)) => body.read(buffer),
            RequestBody::Stream(body) => body.read(buffer, time),
        }
    }

    /// Answers with an error, rendered for the client.
    pub(crate) fn fail(mut self, error: HttpError) {
        if !self.responder.is_cancelled() {
            let id = self.id();
            self.responder.fail(error, Some(audience(&self.head, Some(&id))));
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::direct_writer::DirectWriter;
    use super::super::framing::Terms;
    use super::super::in_flight::InFlight;
    use super::super::parse::fuzzing::LIMITS;
    use super::super::parse::request_head;
    use super::super::response_channel::{Address, response_channel};
    use super::*;
    use crate::protocol::message::{Http, Message, Text};
    use proptest::prelude::*;

    /// A request with this head, whose responder leads nowhere.
    pub(crate) fn request(head: Vec<u8>, mount: usize, length: BodyLength, origin: Origin) -> Request {
        let terms = Terms { head: false, old: false, last: false };
        let now = Instant::now();
        let in_flight = InFlight::new(DirectWriter::new(None, terms, false), now);
        let (channel, _responses) = response_channel().unwrap();
        Request {
            head,
            mount,
            method: Method::Other,
            origin,
            id: RequestId { prefix: "0123456789ab".into(), number: 31 },
            upgrade: false,
            length,
            declares_body: length != BodyLength::Known(0),
            body: RequestBody::Whole(None),
            responder: Responder::new(in_flight, Arc::new(channel), Address { connection: 1, request: 1 }),
            arrived: now,
            alone: false,
            loss: None,
        }
    }

    fn encoded(request: &Request, more: bool) -> Vec<u8> {
        let mut out = Vec::new();
        request.encode(7, more, &mut out);
        out
    }

    const DIRECT: Origin = Origin { address: None, https: false, proxied: false };

    #[test]
    fn a_request_is_the_message_that_the_protocol_has() {
        let head = b"POST /notes/a%20b?c=\"d\" HTTP/1.1\r\nhost: h\r\na: \xe9\t\"\\\r\nb: \r\nx-request-id: given\r\n".to_vec();
        let origin = Origin { address: Some([192, 0, 2, 1].into()), https: true, proxied: false };
        let bytes = encoded(&request(head.clone(), 6, BodyLength::Known(5), origin), true);
        let headers = |id| {
            [
                ("host", "h"),
                ("a", "\u{e9}\t\"\\"),
                ("b", ""),
                ("content-length", "5"),
                ("x-forwarded-for", "192.0.2.1"),
                ("x-forwarded-proto", "https"),
                ("x-forwarded-prefix", "/notes"),
                ("x-request-id", id),
            ]
        };
        let expected = |id| Http {
            id: 7,
            method: "POST".into(),
            path: "/a%20b".into(),
            query: Some("c=\"d\"".into()),
            mount: "/notes".into(),
            headers: headers(id).into_iter().map(|(name, value)| (name.into(), value.into())).collect(),
            remote: "192.0.2.1".into(),
            more: true,
        };
        assert_eq!(Message::parse(&bytes).unwrap(), Message::Http(Box::new(expected("0123456789ab-1f"))));
        // As the protocol's own way has it, but for the space that a character takes.
        let generic: serde_json::Value =
            serde_json::from_slice(&serde_json::to_vec(&expected("0123456789ab-1f")).unwrap()).unwrap();
        assert_eq!(serde_json::from_slice::<serde_json::Value>(&bytes).unwrap(), generic);
        let proxied = encoded(&request(head, 6, BodyLength::Known(5), Origin { proxied: true, ..origin }), true);
        assert_eq!(Message::parse(&proxied).unwrap(), Message::Http(Box::new(expected("given"))));
    }

    #[test]
    fn the_path_of_a_plugin_is_never_empty_and_errors_are_rendered_as_asked() {
        let request =
            request(b"GET /notes HTTP/1.1\r\nhost: h\r\naccept: text/html\r\n".to_vec(), 6, BodyLength::Known(0), DIRECT);
        let bytes = encoded(&request, false);
        let Message::Http(http) = Message::parse(&bytes).unwrap() else { panic!() };
        assert_eq!((&*http.path, &*http.mount, &*http.remote, http.query), ("/", "/notes", "", None::<Text<'_>>));
        assert!(audience(&request.head, None).html && audience(&request.head, None).is_safe);
        assert_eq!(request.name(), "GET /notes (request 0123456789ab-1f)");
    }

    /// The string as serde_json writes it; it has short escapes for five of the controls.
    fn generic(bytes: &[u8]) -> Vec<u8> {
        let text: String = bytes.iter().map(|&byte| char::from(byte)).collect();
        let mut json = serde_json::to_string(&text).unwrap();
        for (short, long) in [("\\b", "\\u0008"), ("\\t", "\\u0009"), ("\\n", "\\u000a"), ("\\f", "\\u000c"), ("\\r", "\\u000d")]
        {
            // A doubled backslash is one that stands for itself.
            json = json.split("\\\\").map(|part| part.replace(short, long)).collect::<Vec<_>>().join("\\\\");
        }
        json.into_bytes()
    }

    #[track_caller]
    fn assert_generic(bytes: &[u8]) {
        let mut out = Vec::new();
        put_text(&mut out, bytes);
        assert_eq!(String::from_utf8(out).unwrap().into_bytes(), generic(bytes), "{bytes:?}");
    }

    /// The check for plain text looks at words that overlap, so each place in each of them counts.
    #[test]
    fn every_byte_is_encoded_alike_wherever_it_stands() {
        for length in 1..=12 {
            for at in 0..length {
                for byte in 0..=255 {
                    for around in [b'a', 0x7f] {
                        let mut bytes = vec![around; length];
                        bytes[at] = byte;
                        assert_generic(&bytes);
                    }
                }
            }
        }
        assert_generic(b"");
    }

    #[test]
    fn numbers_and_addresses_are_those_of_the_standard_library() {
        for number in [0, 9, 10, 255, 1_234_567_890, u64::MAX] {
            let mut out = Vec::new();
            put_number(&mut out, number);
            assert_eq!(out, number.to_string().into_bytes());
        }
        for text in ["0.0.0.0", "192.0.2.1", "255.255.255.255", "::", "2001:db8::1", "::ffff:192.0.2.1"] {
            let mut out = Vec::new();
            put_address(&mut out, text.parse().unwrap());
            assert_eq!(out, text.as_bytes());
        }
    }

    proptest! {
        #[test]
        fn a_text_is_the_string_that_serde_json_writes(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            assert_generic(&bytes);
        }

        #[test]
        fn a_plain_text_is_the_string_that_serde_json_writes(text in "[ -~]{0,80}") {
            assert_generic(text.as_bytes());
        }

        #[test]
        fn whatever_the_parser_accepts_is_a_message(input in prop::collection::vec(any::<u8>(), 0..60), name in "[a-z]{1,8}") {
            let value: Vec<u8> = input.into_iter().filter(|byte| !byte.is_ascii_control()).collect();
            let text = [b"GET /a/b HTTP/1.1\r\nHost: h\r\n", name.as_bytes(), b": ", &value, b"\r\n\r\n"].concat();
            let mut head = Vec::new();
            if let Ok(Some(_)) = request_head::read(&text, LIMITS, None, &mut 0, &mut head) {
                let bytes = encoded(&request(head.clone(), 2, BodyLength::Known(0), DIRECT), false);
                let Message::Http(http) = Message::parse(&bytes).unwrap() else { panic!() };
                let expected: String = value.trim_ascii().iter().map(|&byte| char::from(byte)).collect();
                let passed = header_in(&head, &name).is_some();
                prop_assert_eq!(http.headers.iter().any(|(each, value)| **each == *name && **value == *expected), passed);
            }
        }
    }
}
