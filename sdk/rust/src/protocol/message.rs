//! The messages of the plugin protocol, its version and its limits. No I/O.
//!
//! A message is the JSON head of a frame; the frame's body travels beside it, see [`super::frame`].

use super::fields::{self, Field, Form};
use super::values::{integer, optional_integer, or_default};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};
use std::borrow::Cow;
use std::fmt;
use std::ops::Deref;

/// The code of a plugin's answer to `init` that says that it does not speak this version.
pub const WRONG_PROTOCOL: &str = "protocol";

/// The protocol version this crate speaks, as `init` and metadata name it.
pub const PROTOCOL_VERSION: u32 = 1;

/// Largest head of a frame in bytes: room for the headers of any sane request, small enough to hold one per connection.
pub const MAX_HEAD: usize = 64 * 1024;

/// Largest body of a frame in bytes. Longer bodies go on in [`Data`] frames, so this bounds what either side must hold.
pub const MAX_BODY: usize = 1024 * 1024;

/// Largest request body in bytes that comes whole in its `http` frame; a longer one streams.
pub const MAX_INLINE_BODY: usize = 64 * 1024;

/// Largest `id`: 2^53 − 1, the largest integer every JSON implementation holds exactly.
pub const MAX_ID: u64 = (1 << 53) - 1;

/// Largest key of the key-value store in bytes.
pub const MAX_KEY: usize = 512;

/// Largest value of the key-value store in bytes: what one frame holds.
pub const MAX_VALUE: usize = MAX_BODY;

/// Most writes in one `txn`.
pub const MAX_TXN_OPS: usize = 128;

/// Most entries of one page of `list`.
pub const MAX_LIST_LIMIT: u32 = 1000;

/// Entries of a page of `list` that names no limit.
pub const DEFAULT_LIST_LIMIT: u32 = 100;

/// Longest `ttl_ms`: ten years, so that an expiry never leaves the range of a signed 64-bit clock.
pub const MAX_TTL_MS: u64 = 315_360_000_000;

/// Longest code of an `error` in bytes.
pub const MAX_ERROR_CODE: usize = 64;

/// Longest message of an `error` in bytes: some sentences for people, far less than a head holds.
pub const MAX_ERROR_MESSAGE: usize = 4096;

/// Credit in bytes that each side of a WebSocket has at the beginning, if the other names none.
pub const SOCKET_CREDIT: u64 = 64 * 1024;

/// Credit in bytes that a message of a WebSocket takes in addition to its length, so that empty messages are bounded too.
pub const SOCKET_MESSAGE_COST: u64 = 64;

/// Largest body of a response that refuses a WebSocket, in bytes. The host sends it to the client in one part.
pub const MAX_REFUSAL: usize = 64 * 1024;

/// Longest reason of a `ws_close` in bytes (RFC 6455, section 5.5: what a close frame holds beside the code).
pub const MAX_CLOSE_REASON: usize = 123;

/// Header names that belong to one hop and are never passed through (RFC 9110, section 7.6.1).
pub const HOP_BY_HOP: [&str; 9] = [
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// Text of a message: in the frame that the message was read from, where it stands there as it is, or its own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl Text<'_> {
    fn is_empty(text: &Self) -> bool {
        text.0.is_empty()
    }
}

impl Deref for Text<'_> {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<'a, T: Into<Cow<'a, str>>> From<T> for Text<'a> {
    fn from(text: T) -> Self {
        Self(text.into())
    }
}

/// Header fields in order, repeats kept: name and value.
pub type Headers<'a> = Vec<(Text<'a>, Text<'a>)>;

/// Any message, as a receiver meets it.
#[derive(Debug, Clone, PartialEq)]
pub enum Message<'a> {
    /// Host to plugin: the first message on the first connection.
    Init(Box<Init>),
    /// Plugin to host: the answer to `init`.
    Ready(Ready),
    /// Host to plugin: a web request.
    Http(Box<Http<'a>>),
    /// Plugin to host: the answer to `http`.
    Response(Response<'a>),
    /// Either way: more of a body.
    Data(Data),
    /// Either way: an operation on the key-value store.
    Kv(Box<Kv>),
    /// Either way: the answer to `kv`.
    Result(KvResult),
    /// Either way: the answer to a request that failed.
    Error(Failure),
    /// Host to plugin: are you there?
    Ping(Ping),
    /// Plugin to host: the answer to `ping`.
    Pong(Pong),
    /// Host to plugin: the last message on a connection.
    Shutdown(Shutdown),
    /// Host to plugin: a client asks for a WebSocket.
    SocketOpen(Box<SocketOpen<'a>>),
    /// Plugin to host: the answer to `ws_open`.
    SocketAccept(SocketAccept<'a>),
    /// Either way: a message of a WebSocket.
    SocketMessage(SocketMessage),
    /// Either way: room for more messages.
    SocketCredit(SocketCredit),
    /// Either way: the end of a WebSocket.
    SocketClose(SocketClose<'a>),
}

/// Why a head is not a message.
#[derive(Debug, thiserror::Error)]
pub enum Malformed {
    /// Not text: the sentence says where.
    #[error("{0}")]
    Utf8(String),
    /// JSON of another kind than an object: the sentence says which.
    #[error("{0}")]
    NotAnObject(String),
    /// Not JSON, or an object whose fields are not as its type requires: the sentence names the field.
    #[error("{0}")]
    Json(String),
    /// A type this protocol version does not know.
    #[error("unknown message type \"{0}\"")]
    UnknownType(String),
    /// An id beyond [`MAX_ID`].
    #[error("id {0} is over the limit of {MAX_ID}")]
    Id(u64),
    /// A body beside a message that has none.
    #[error("{what} must have no body, got {bytes} bytes")]
    Body {
        /// The message's type, and a kv request's operation.
        what: String,
        /// The body's length.
        bytes: usize,
    },
}

/// The type of a message that begins with it, as all do that this library writes: it need not be looked for.
fn leading_type(head: &str) -> Option<&str> {
    let (kind, rest) = head.strip_prefix(r#"{"type":""#)?.split_once('"')?;
    (rest.starts_with([',', '}']) && kind.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')).then_some(kind)
}

/// Reads a head as a message, or a part of one.
fn read<'a, T: Deserialize<'a>>(head: &'a str) -> Result<T, Malformed> {
    serde_json::from_str(head).map_err(|error| malformed(head, Some(&error)))
}

/// Why a head that could not be read is no message. `error` is the parser's, which says so in words of its own.
#[cold]
fn malformed(head: &str, error: Option<&serde_json::Error>) -> Malformed {
    let object = match serde_json::from_str(head) {
        Ok(Value::Object(object)) => object,
        Ok(other) => return Malformed::NotAnObject(format!("the head must be a JSON object, got {}", fields::shown(&other))),
        Err(error) => return Malformed::Json(fields::not_json("the head", head, &error)),
    };
    let fault = fields::fault("head", &[Field::required("type", Form::Text)], &object).or_else(|| {
        let kind = object.get("type").and_then(Value::as_str).unwrap_or_default();
        let fault = fields::fault(kind, fields_of(kind), &object);
        let fault = fault.or_else(|| (kind == "kv").then(|| op_fault("kv", &object))?);
        fault.or_else(|| error.map(|error| fields::other_fault(kind, error)))
    });
    Malformed::Json(fault.unwrap_or_else(|| "the head is not a message of the protocol".to_owned()))
}

/// Why a head is not text.
#[cold]
fn not_utf8(head: &[u8], at: usize) -> Malformed {
    Malformed::Utf8(format!("the head is not UTF-8 at byte {at}: it begins with {}", fields::excerpt_of_bytes(head)))
}

/// An integer that fits 64 bits.
const COUNT: Form = Form::Integer(0, u64::MAX);

/// A signed integer of 64 bits.
const SIGNED: Form = Form::Integer(i64::MIN, i64::MAX.unsigned_abs());

/// The field that all messages have.
const ID: Field = Field::required("id", Form::Integer(0, MAX_ID));

/// The fields of a message by its type, in the order in which they are looked at; those of [`Init`] are the host's own to get right.
fn fields_of(kind: &str) -> &'static [Field] {
    const HTTP: [Field; 8] = [
        ID,
        Field::required("method", Form::Text),
        Field::required("path", Form::Text),
        Field::optional("query", Form::Text),
        Field::required("mount", Form::Text),
        Field::optional("headers", Form::Pairs),
        Field::optional("remote", Form::Text),
        Field::optional("more", Form::Bool),
    ];
    const RESPONSE: [Field; 4] = [
        ID,
        Field::required("status", Form::Integer(200, 599)),
        Field::optional("headers", Form::Pairs),
        Field::optional("more", Form::Bool),
    ];
    const DATA: [Field; 3] = [ID, Field::optional("more", Form::Bool), Field::optional("aborted", Form::Bool)];
    const KV: [Field; 2] = [ID, Field::required("op", Form::Word(&["get", "set", "delete", "incr", "list", "txn"]))];
    const RESULT: [Field; 6] = [
        ID,
        Field::optional("found", Form::Bool),
        Field::optional("rev", COUNT),
        Field::optional("value", SIGNED),
        Field::optional("expires_in_ms", COUNT),
        Field::optional("next", Form::Text),
    ];
    const CODE: Form = Form::TextOf(is_error_code, "a string of the form [a-z][a-z0-9_]{0,63}");
    const MESSAGE: Form = Form::TextOf(is_error_message, "a string of 1 to 4096 bytes");
    const ERROR: [Field; 4] =
        [ID, Field::required("code", CODE), Field::required("message", MESSAGE), Field::optional("index", COUNT)];
    const SOCKET_OPEN: [Field; 7] = [
        ID,
        Field::required("path", Form::Text),
        Field::optional("query", Form::Text),
        Field::required("mount", Form::Text),
        Field::optional("headers", Form::Pairs),
        Field::optional("remote", Form::Text),
        Field::optional("credit", Form::Integer(0, MAX_ID)),
    ];
    const SOCKET_ACCEPT: [Field; 4] = [
        ID,
        Field::optional("protocol", Form::Text),
        Field::optional("headers", Form::Pairs),
        Field::optional("credit", Form::Integer(0, MAX_ID)),
    ];
    const SOCKET_MESSAGE: [Field; 2] = [ID, Field::optional("text", Form::Bool)];
    const SOCKET_CREDIT: [Field; 2] = [ID, Field::required("bytes", Form::Integer(0, MAX_ID))];
    const CLOSE_REASON: Form = Form::TextOf(is_close_reason, "a string of at most 123 bytes");
    const SOCKET_CLOSE: [Field; 3] =
        [ID, Field::optional("code", Form::Integer(1000, 4999)), Field::optional("reason", CLOSE_REASON)];
    match kind {
        "ws_open" => &SOCKET_OPEN,
        "ws_accept" => &SOCKET_ACCEPT,
        "ws_message" => &SOCKET_MESSAGE,
        "ws_credit" => &SOCKET_CREDIT,
        "ws_close" => &SOCKET_CLOSE,
        "http" => &HTTP,
        "response" => &RESPONSE,
        "data" => &DATA,
        "kv" => &KV,
        "result" => &RESULT,
        "error" => &ERROR,
        _ => &[ID],
    }
}

/// Whether a string may be the code of an `error`: `[a-z][a-z0-9_]{0,63}`.
#[must_use]
pub fn is_error_code(code: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    code.len() <= MAX_ERROR_CODE && code.starts_with(|first: char| first.is_ascii_lowercase()) && code.bytes().all(allowed)
}

/// Whether a string may be the message of an `error`.
fn is_error_message(message: &str) -> bool {
    (1..=MAX_ERROR_MESSAGE).contains(&message.len())
}

/// Whether a string may be the reason of a `ws_close`.
fn is_close_reason(reason: &str) -> bool {
    reason.len() <= MAX_CLOSE_REASON
}

/// What is wrong with the fields that belong to an operation's `op`, if anything.
fn op_fault(of: &str, object: &Map<String, Value>) -> Option<String> {
    const KEY: Field = Field::required("key", Form::Text);
    const TTL: Field = Field::optional("ttl_ms", COUNT);
    const IF_REV: Field = Field::optional("if_rev", COUNT);
    let of_op: &[Field] = match object.get("op")?.as_str()? {
        "get" => &[KEY],
        "set" => &[KEY, TTL, IF_REV, Field::optional("if_absent", Form::Bool)],
        "delete" => &[KEY, IF_REV],
        "incr" => &[KEY, Field::optional("delta", SIGNED), TTL],
        "list" => &[
            Field::optional("prefix", Form::Text),
            Field::optional("after", Form::Text),
            Field::optional("limit", Form::Integer(1, MAX_LIST_LIMIT as u64)),
            Field::optional("values", Form::Bool),
        ],
        _ => return None,
    };
    fields::fault(of, of_op, object)
}

impl TxnOp {
    /// Reads an element of a `txn`'s body.
    ///
    /// # Errors
    /// A sentence that names the field which is not of its form.
    pub fn read(write: &Value) -> Result<Self, String> {
        const OP: Field = Field::required("op", Form::Word(&["set", "delete", "incr"]));
        const VALUES: [Field; 2] = [Field::optional("value", Form::Text), Field::optional("value_base64", Form::Text)];
        Self::deserialize(write).map_err(|error| {
            let Some(object) = write.as_object() else {
                return format!("a write must be a JSON object, got {}", fields::shown(write));
            };
            let fault = fields::fault("write", &[OP], object).or_else(|| op_fault("write", object));
            let fault = fault.or_else(|| fields::fault("write", &VALUES, object));
            fault.unwrap_or_else(|| fields::other_fault("write", &error))
        })
    }
}

impl<'a> Message<'a> {
    /// Reads a head.
    ///
    /// # Errors
    /// When it is not a JSON object, or not a message of this protocol.
    pub fn parse(head: &'a [u8]) -> Result<Self, Malformed> {
        /// The type alone, so that each message is then read straight into its own struct.
        #[derive(Deserialize)]
        struct Tag<'a> {
            #[serde(borrow, rename = "type")]
            kind: Cow<'a, str>,
        }
        let head = std::str::from_utf8(head).map_err(|error| not_utf8(head, error.valid_up_to()))?;
        // Serde would take an array for a struct.
        if !head.trim_ascii_start().starts_with('{') {
            return Err(malformed(head, None));
        }
        let tag = match leading_type(head) {
            Some(kind) => Tag { kind: kind.into() },
            None => read(head)?,
        };
        let message = match &*tag.kind {
            "response" => Self::Response(read(head)?),
            "data" => Self::Data(read(head)?),
            "http" => Self::Http(read(head)?),
            "kv" => Self::Kv(read(head)?),
            "result" => Self::Result(read(head)?),
            "error" => match read::<Failure>(head)? {
                error if is_error_code(&error.code) && is_error_message(&error.message) => Self::Error(error),
                _ => return Err(malformed(head, None)),
            },
            "ping" => Self::Ping(read(head)?),
            "pong" => Self::Pong(read(head)?),
            "init" => Self::Init(read(head)?),
            "ready" => Self::Ready(read(head)?),
            "shutdown" => Self::Shutdown(read(head)?),
            "ws_open" => Self::SocketOpen(read(head)?),
            "ws_accept" => Self::SocketAccept(read(head)?),
            "ws_message" => Self::SocketMessage(read(head)?),
            "ws_credit" => Self::SocketCredit(read(head)?),
            "ws_close" => match read::<SocketClose<'_>>(head)? {
                close if is_close_reason(&close.reason) && close.code.is_none_or(|code| (1000..=4999).contains(&code)) => {
                    Self::SocketClose(close)
                }
                _ => return Err(malformed(head, None)),
            },
            other => return Err(Malformed::UnknownType(other.chars().take(64).collect())),
        };
        match message.id() {
            id if id > MAX_ID => Err(Malformed::Id(id)),
            _ => Ok(message),
        }
    }

    /// As [`Message::parse`], of a frame whose body has so many bytes.
    ///
    /// # Errors
    /// As [`Message::parse`], and when there is a body beside a message that has none.
    pub fn of_frame(head: &'a [u8], body: usize) -> Result<Self, Malformed> {
        let message = Self::parse(head)?;
        match if body > 0 { message.bodiless() } else { None } {
            Some(what) => Err(Malformed::Body { what, bytes: body }),
            None => Ok(message),
        }
    }

    /// What the message is called, if there is never a body beside it. What a [`KvResult`] may have depends on the request.
    fn bodiless(&self) -> Option<String> {
        match self {
            Self::Http(_) | Self::Response(_) | Self::Data(_) | Self::Result(_) | Self::SocketMessage(_) => None,
            Self::Kv(kv) => (!matches!(kv.op, KvOp::Set(_) | KvOp::Txn)).then(|| format!("kv {}", kv.op.name())),
            _ => Some(self.kind().to_owned()),
        }
    }

    /// The message as it is named in a sentence, with its id.
    #[must_use]
    pub fn named(&self) -> String {
        let what = match self {
            Self::Init(_) => "an init message",
            Self::Ready(_) => "a ready message",
            Self::Http(_) => "an http request",
            Self::Response(_) => "a response",
            Self::Data(_) => "data",
            Self::Kv(_) => "a kv request",
            Self::Result(_) => "a result",
            Self::Error(_) => "an error",
            Self::Ping(_) => "a ping",
            Self::Pong(_) => "a pong",
            Self::Shutdown(_) => "a shutdown message",
            Self::SocketOpen(_) => "a ws_open message",
            Self::SocketAccept(_) => "a ws_accept message",
            Self::SocketMessage(_) => "a ws_message",
            Self::SocketCredit(_) => "a ws_credit message",
            Self::SocketClose(_) => "a ws_close message",
        };
        format!("{what} with id {}", self.id())
    }

    /// The id that ties a request to its reply.
    #[must_use]
    pub fn id(&self) -> u64 {
        match self {
            Self::Init(m) => m.id,
            Self::Ready(m) => m.id,
            Self::Http(m) => m.id,
            Self::Response(m) => m.id,
            Self::Data(m) => m.id,
            Self::Kv(m) => m.id,
            Self::Result(m) => m.id,
            Self::Error(m) => m.id,
            Self::Ping(m) => m.id,
            Self::Pong(m) => m.id,
            Self::Shutdown(m) => m.id,
            Self::SocketOpen(m) => m.id,
            Self::SocketAccept(m) => m.id,
            Self::SocketMessage(m) => m.id,
            Self::SocketCredit(m) => m.id,
            Self::SocketClose(m) => m.id,
        }
    }

    /// The message's `type`, as the protocol spells it.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Init(_) => "init",
            Self::Ready(_) => "ready",
            Self::Http(_) => "http",
            Self::Response(_) => "response",
            Self::Data(_) => "data",
            Self::Kv(_) => "kv",
            Self::Result(_) => "result",
            Self::Error(_) => "error",
            Self::Ping(_) => "ping",
            Self::Pong(_) => "pong",
            Self::Shutdown(_) => "shutdown",
            Self::SocketOpen(_) => "ws_open",
            Self::SocketAccept(_) => "ws_accept",
            Self::SocketMessage(_) => "ws_message",
            Self::SocketCredit(_) => "ws_credit",
            Self::SocketClose(_) => "ws_close",
        }
    }
}

/// What a plugin is told before anything else.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename = "init")]
pub struct Init {
    /// Repeated by the reply.
    #[serde(deserialize_with = "integer")]
    pub id: u64,
    /// The version the host speaks.
    #[serde(deserialize_with = "integer")]
    pub protocol: u32,
    /// The identity of the installation: a UUID version 4.
    pub instance_id: String,
    /// The plugin's own id.
    pub plugin_id: String,
    /// Where the plugin listens.
    pub socket_path: String,
    /// Where the host listens for the plugin's calls.
    pub host_socket: String,
    /// The file the plugin's output goes to.
    pub log_path: String,
    /// The plugin's own directory.
    pub data_dir: String,
    /// The licence token set for this plugin.
    pub license: Option<String>,
    /// A moment that has certainly come, as `YYYY-MM-DDTHH:MM:SSZ`: a licence that had expired by then has, whatever the clock shows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_before_time: Option<String>,
    /// The operator's settings for this plugin.
    pub config: Map<String, Value>,
    /// Who is hosting.
    pub host: HostInfo,
}

/// Name and version of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostInfo {
    /// The program's name.
    pub name: String,
    /// Its version.
    pub version: String,
}

/// A web request for the plugin's route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename = "http")]
pub struct Http<'a> {
    /// Repeated by the reply.
    #[serde(deserialize_with = "integer")]
    pub id: u64,
    /// As the client sent it.
    #[serde(borrow)]
    pub method: Text<'a>,
    /// What follows the mount, not decoded; begins with `/`.
    #[serde(borrow)]
    pub path: Text<'a>,
    /// What follows the first `?`, not decoded.
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    pub query: Option<Text<'a>>,
    /// The plugin's route; empty for a request by host name.
    #[serde(borrow)]
    pub mount: Text<'a>,
    /// In order, repeats kept, names in lower case.
    #[serde(borrow, default, deserialize_with = "or_default")]
    pub headers: Headers<'a>,
    /// The client's address, empty when it is not known.
    #[serde(borrow, default, deserialize_with = "or_default")]
    pub remote: Text<'a>,
    /// Whether the body goes on in `data` frames.
    #[serde(default, deserialize_with = "or_default")]
    pub more: bool,
}

/// The answer to [`Http`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename = "response")]
pub struct Response<'a> {
    /// The request's id.
    #[serde(deserialize_with = "integer")]
    pub id: u64,
    /// 200–599.
    #[serde(deserialize_with = "integer")]
    pub status: u16,
    /// In order, repeats kept.
    #[serde(borrow, default, deserialize_with = "or_default")]
    pub headers: Headers<'a>,
    /// Whether the body goes on in `data` frames.
    #[serde(default, deserialize_with = "or_default")]
    pub more: bool,
}

/// More of a body.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename = "data")]
pub struct Data {
    /// The request's id.
    #[serde(deserialize_with = "integer")]
    pub id: u64,
    /// Whether the body still goes on.
    #[serde(default, deserialize_with = "or_default")]
    pub more: bool,
    /// Whether the body ends here before its time, because the plugin has answered already.
    #[serde(default, deserialize_with = "or_default", skip_serializing_if = "std::ops::Not::not")]
    pub aborted: bool,
}

/// A client asks for a WebSocket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename = "ws_open")]
pub struct SocketOpen<'a> {
    /// Names the socket in all further messages.
    #[serde(deserialize_with = "integer")]
    pub id: u64,
    /// What follows the mount, not decoded; begins with `/`.
    #[serde(borrow)]
    pub path: Text<'a>,
    /// What follows the first `?`, not decoded.
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    pub query: Option<Text<'a>>,
    /// The plugin's route; empty for a request by host name.
    #[serde(borrow)]
    pub mount: Text<'a>,
    /// In order, repeats kept, names in lower case.
    #[serde(borrow, default, deserialize_with = "or_default")]
    pub headers: Headers<'a>,
    /// The client's address, empty when it is not known.
    #[serde(borrow, default, deserialize_with = "or_default")]
    pub remote: Text<'a>,
    /// Credit of the plugin at the beginning, in bytes; [`SOCKET_CREDIT`] if there is none.
    #[serde(default, deserialize_with = "optional_integer", skip_serializing_if = "Option::is_none")]
    pub credit: Option<u64>,
}

/// The answer to [`SocketOpen`]: the plugin takes the socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename = "ws_accept")]
pub struct SocketAccept<'a> {
    /// The socket's id.
    #[serde(deserialize_with = "integer")]
    pub id: u64,
    /// The one that was chosen of those that the client has offered.
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Text<'a>>,
    /// Headers of the response to the client.
    #[serde(borrow, default, deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub headers: Headers<'a>,
    /// Credit of the host at the beginning, in bytes; [`SOCKET_CREDIT`] if there is none.
    #[serde(default, deserialize_with = "optional_integer", skip_serializing_if = "Option::is_none")]
    pub credit: Option<u64>,
}

/// A whole message of a WebSocket, which is the frame's body.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename = "ws_message")]
pub struct SocketMessage {
    /// The socket's id.
    #[serde(deserialize_with = "integer")]
    pub id: u64,
    /// Whether it is text in UTF-8, and not binary.
    #[serde(default, deserialize_with = "or_default", skip_serializing_if = "std::ops::Not::not")]
    pub text: bool,
}

/// Room for more messages of a WebSocket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename = "ws_credit")]
pub struct SocketCredit {
    /// The socket's id.
    #[serde(deserialize_with = "integer")]
    pub id: u64,
    /// What is added to the credit of the receiver of this message.
    #[serde(deserialize_with = "integer")]
    pub bytes: u64,
}

/// The end of a WebSocket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename = "ws_close")]
pub struct SocketClose<'a> {
    /// The socket's id.
    #[serde(deserialize_with = "integer")]
    pub id: u64,
    /// The code (RFC 6455, section 7.4). From the host, none says that the client gave none; from the plugin, none is 1000.
    #[serde(default, deserialize_with = "optional_integer", skip_serializing_if = "Option::is_none")]
    pub code: Option<u16>,
    /// The reason, for people, of at most [`MAX_CLOSE_REASON`] bytes.
    #[serde(borrow, default, deserialize_with = "or_default", skip_serializing_if = "Text::is_empty")]
    pub reason: Text<'a>,
}

impl SocketClose<'_> {
    /// Whether a plugin may send this code: those of RFC 6455, section 7.4, that an endpoint sends, and those of applications.
    #[must_use]
    pub fn has_code_to_send(&self) -> bool {
        self.code.is_none_or(|code| matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999))
    }
}

/// An operation on the key-value store. The host asks `get`, `set` and `delete`; a plugin may ask any.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename = "kv")]
pub struct Kv {
    /// Repeated by the reply.
    #[serde(deserialize_with = "integer")]
    pub id: u64,
    /// What to do, and with which fields.
    #[serde(flatten)]
    pub op: KvOp,
}

/// The operations of the key-value store. A value to set is the frame's body.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase")]
pub enum KvOp {
    /// Reads a value.
    Get {
        /// Which.
        key: String,
    },
    /// Writes a value.
    Set(SetOp),
    /// Removes a value.
    Delete(DeleteOp),
    /// Adds to a decimal number.
    Incr(IncrOp),
    /// Lists a page of keys.
    List(ListOp),
    /// Several writes, all or nothing; they are the body.
    Txn,
}

impl KvOp {
    /// The operation's name, as the protocol spells it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Get { .. } => "get",
            Self::Set(_) => "set",
            Self::Delete(_) => "delete",
            Self::Incr(_) => "incr",
            Self::List(_) => "list",
            Self::Txn => "txn",
        }
    }

    /// Whether the operation only reads. All others write.
    #[must_use]
    pub fn is_read(&self) -> bool {
        match self {
            Self::Get { .. } | Self::List(_) => true,
            Self::Set(_) | Self::Delete(_) | Self::Incr(_) | Self::Txn => false,
        }
    }
}

/// `set`: writes a value.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetOp {
    /// Which.
    pub key: String,
    /// Milliseconds until it expires; never, when absent.
    #[serde(default, deserialize_with = "optional_integer", skip_serializing_if = "Option::is_none")]
    pub ttl_ms: Option<u64>,
    /// Only when the key is there with this revision.
    #[serde(default, deserialize_with = "optional_integer", skip_serializing_if = "Option::is_none")]
    pub if_rev: Option<u64>,
    /// Only when the key is not there.
    #[serde(default, deserialize_with = "or_default", skip_serializing_if = "std::ops::Not::not")]
    pub if_absent: bool,
}

/// `delete`: removes a value.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeleteOp {
    /// Which.
    pub key: String,
    /// Only when the key is there with this revision.
    #[serde(default, deserialize_with = "optional_integer", skip_serializing_if = "Option::is_none")]
    pub if_rev: Option<u64>,
}

/// `incr`: adds to a decimal number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IncrOp {
    /// Which.
    pub key: String,
    /// What to add.
    #[serde(default = "one", deserialize_with = "one_or_integer")]
    pub delta: i64,
    /// Milliseconds until it expires, when this `incr` makes the key.
    #[serde(default, deserialize_with = "optional_integer", skip_serializing_if = "Option::is_none")]
    pub ttl_ms: Option<u64>,
}

fn one() -> i64 {
    1
}

fn one_or_integer<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
    optional_integer(deserializer).map(|delta| delta.unwrap_or_else(one))
}

/// `list`: a page of keys in byte order.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListOp {
    /// Only keys that begin with this.
    #[serde(default, deserialize_with = "or_default")]
    pub prefix: String,
    /// Only keys that come after this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// At most this many entries, 1–[`MAX_LIST_LIMIT`].
    #[serde(default, deserialize_with = "optional_integer", skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
    /// Whether the entries carry their values.
    #[serde(default, deserialize_with = "or_default")]
    pub values: bool,
}

/// One write of a `txn`, an element of its body.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase")]
pub enum TxnOp {
    /// Writes a value: exactly one of `value` and `value_base64`.
    Set {
        /// Key and preconditions.
        #[serde(flatten)]
        set: SetOp,
        /// The value as text.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        value: Option<String>,
        /// The value as bytes.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        value_base64: Option<String>,
    },
    /// Removes a value.
    Delete(DeleteOp),
    /// Adds to a decimal number.
    Incr(IncrOp),
}

/// The outcome of one write, an element of a `txn`'s result.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriteOutcome {
    /// For `delete`: whether the key was there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub found: Option<bool>,
    /// For `set` and `incr`: the new revision.
    #[serde(default, deserialize_with = "optional_integer", skip_serializing_if = "Option::is_none")]
    pub rev: Option<u64>,
    /// For `incr`: the sum.
    #[serde(default, deserialize_with = "optional_integer", skip_serializing_if = "Option::is_none")]
    pub value: Option<i64>,
}

/// One entry of a page of `list`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListEntry {
    /// The key.
    pub key: String,
    /// Its revision.
    #[serde(deserialize_with = "integer")]
    pub rev: u64,
    /// The value's length in bytes.
    #[serde(deserialize_with = "integer")]
    pub size: u64,
    /// Milliseconds until it expires.
    #[serde(default, deserialize_with = "optional_integer", skip_serializing_if = "Option::is_none")]
    pub expires_in_ms: Option<u64>,
    /// The value, where it was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value_base64: Option<String>,
}

/// The answer to [`Kv`]. A value that was read is the frame's body.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename = "result")]
pub struct KvResult {
    /// The request's id.
    #[serde(deserialize_with = "integer")]
    pub id: u64,
    /// For `get` and `delete`: whether the key was there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub found: Option<bool>,
    /// The value's revision.
    #[serde(default, deserialize_with = "optional_integer", skip_serializing_if = "Option::is_none")]
    pub rev: Option<u64>,
    /// For `incr`: the sum.
    #[serde(default, deserialize_with = "optional_integer", skip_serializing_if = "Option::is_none")]
    pub value: Option<i64>,
    /// For `get`: milliseconds until the value expires.
    #[serde(default, deserialize_with = "optional_integer", skip_serializing_if = "Option::is_none")]
    pub expires_in_ms: Option<u64>,
    /// For `list`: what to pass as `after` for the next page, absent on the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

impl KvResult {
    /// What is wrong with the reply to an operation of this name, with a body of so many bytes, if anything.
    #[must_use]
    pub fn fault(&self, op: &str, body: usize) -> Option<String> {
        let missing = match op {
            "get" | "delete" if self.found.is_none() => Some(("found", Form::Bool)),
            "incr" if self.value.is_none() => Some(("value", SIGNED)),
            _ => None,
        };
        if let Some((name, form)) = missing {
            return fields::fault("result", &[Field::required(name, form)], &Map::new());
        }
        let bodiless = match op {
            "get" if self.found == Some(false) => "the result of a get that found nothing",
            "set" => "the result of a set",
            "delete" => "the result of a delete",
            "incr" => "the result of an incr",
            _ => return None,
        };
        (body > 0).then(|| format!("{bodiless} must have no body, got {body} bytes"))
    }
}

impl Failure {
    /// An `error` of a plugin's or a host's own making. What breaks the protocol's form is put right: another code is `internal`, a
    /// message that is too long is cut, and for none the code stands.
    #[must_use]
    pub fn new(id: u64, code: &str, message: &str) -> Self {
        let code = if is_error_code(code) { code } else { "internal" };
        let message = if message.is_empty() { code } else { &message[..message.floor_char_boundary(MAX_ERROR_MESSAGE)] };
        Self { id, code: code.to_owned(), message: message.to_owned(), index: None }
    }
}

/// The answer to a request that failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename = "error")]
pub struct Failure {
    /// The request's id.
    #[serde(deserialize_with = "integer")]
    pub id: u64,
    /// A word that a program can branch on: `[a-z][a-z0-9_]{0,63}`.
    pub code: String,
    /// One sentence for people, of 1–[`MAX_ERROR_MESSAGE`] bytes.
    pub message: String,
    /// For `txn`: the place of the write that failed, from 0.
    #[serde(default, deserialize_with = "optional_integer", skip_serializing_if = "Option::is_none")]
    pub index: Option<usize>,
}

/// Declares the messages that are an id and nothing else.
macro_rules! bare {
    ($($(#[$doc:meta])* $name:ident = $tag:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(tag = "type", rename = $tag)]
        pub struct $name {
            /// Ties request and reply.
            #[serde(deserialize_with = "integer")]
            pub id: u64,
        }
    )*};
}

bare! {
    /// The answer to [`Init`]: the plugin serves.
    Ready = "ready";
    /// Are you there?
    Ping = "ping";
    /// The answer to [`Ping`].
    Pong = "pong";
    /// The last message on a connection: finish what is under way on it, then end it.
    Shutdown = "shutdown";
}

/// Why a response's head may not reach a client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadResponse {
    /// Outside 200–599.
    #[error("status {0} is not within 200-599")]
    Status(u16),
    /// Not an HTTP token.
    #[error("header name {0:?} is not an HTTP token")]
    HeaderName(String),
    /// A character that has no place in a header.
    #[error("the value of header {0:?} holds a control character or one beyond U+00FF")]
    HeaderValue(String),
    /// Not one decimal number.
    #[error("content-length {0:?} is not one decimal number")]
    ContentLength(String),
    /// Two of them.
    #[error("content-length is set twice")]
    RepeatedContentLength,
    /// Agrees with nothing.
    #[error("content-length is {declared} but the body has {actual} bytes")]
    BodyLength {
        /// What the header says.
        declared: u64,
        /// What was sent.
        actual: u64,
    },
    /// A body where there can be none.
    #[error("a response of status {0} must have no body")]
    Bodiless(u16),
}

impl Response<'_> {
    /// Whether this status never has a body.
    #[must_use]
    pub fn is_bodiless(&self) -> bool {
        matches!(self.status, 204 | 304)
    }

    /// Checks the head against section 4 of the protocol, with the length in bytes of its frame's body, and gives the `content-length` it
    /// declares.
    ///
    /// # Errors
    /// The first rule it breaks.
    pub fn check(&self, body: usize, head_request: bool) -> Result<Option<u64>, BadResponse> {
        if !(200..=599).contains(&self.status) {
            return Err(BadResponse::Status(self.status));
        }
        if self.is_bodiless() && (self.more || body > 0) {
            return Err(BadResponse::Bodiless(self.status));
        }
        let mut declared = None;
        for (name, value) in &self.headers {
            if name.is_empty() || !name.bytes().all(is_token) {
                return Err(BadResponse::HeaderName(name.chars().take(64).collect()));
            }
            if !value.chars().all(is_field_char) {
                return Err(BadResponse::HeaderValue(name.to_string()));
            }
            if name.eq_ignore_ascii_case("content-length") {
                if declared.is_some() {
                    return Err(BadResponse::RepeatedContentLength);
                }
                let digits = value.bytes().all(|b| b.is_ascii_digit());
                let length = value.parse().ok().filter(|_| digits);
                declared = Some(length.ok_or_else(|| BadResponse::ContentLength(value.chars().take(64).collect()))?);
            }
        }
        let actual = body as u64;
        match declared {
            Some(declared)
                if !head_request && !self.is_bodiless() && (actual > declared || (!self.more && actual < declared)) =>
            {
                Err(BadResponse::BodyLength { declared, actual })
            }
            declared => Ok(declared),
        }
    }
}

/// A byte of an HTTP token (RFC 9110, section 5.6.2).
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// A character of a header value; each stands for one byte (RFC 9110, section 5.5: HTAB, SP, VCHAR, obs-text).
fn is_field_char(c: char) -> bool {
    matches!(c, '\t' | ' '..='~' | '\u{80}'..='\u{ff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response<'a>(status: u16, headers: &[(&'a str, &'a str)], more: bool) -> Response<'a> {
        let headers = headers.iter().map(|(n, v)| ((*n).into(), (*v).into())).collect();
        Response { id: 1, status, headers, more }
    }

    #[test]
    fn a_response_that_breaks_a_rule_is_named() {
        let cases: &[(Response, &[u8], &str)] = &[
            (response(199, &[], false), b"", "status 199 is not within 200-599"),
            (response(600, &[], false), b"", "status 600 is not within 200-599"),
            (response(200, &[("a b", "x")], false), b"", "header name \"a b\" is not an HTTP token"),
            (response(200, &[("", "x")], false), b"", "header name \"\" is not an HTTP token"),
            (
                response(200, &[("x", "a\r\nset-cookie: b=c")], false),
                b"",
                "the value of header \"x\" holds a control character or one beyond U+00FF",
            ),
            (
                response(200, &[("x", "☕")], false),
                b"",
                "the value of header \"x\" holds a control character or one beyond U+00FF",
            ),
            (response(200, &[("content-length", "+3")], false), b"abc", "content-length \"+3\" is not one decimal number"),
            (response(200, &[("content-length", "3"), ("Content-Length", "3")], false), b"abc", "content-length is set twice"),
            (response(200, &[("content-length", "4")], false), b"abc", "content-length is 4 but the body has 3 bytes"),
            (response(200, &[("content-length", "2")], true), b"abc", "content-length is 2 but the body has 3 bytes"),
            (response(204, &[], false), b"x", "a response of status 204 must have no body"),
            (response(304, &[], true), b"", "a response of status 304 must have no body"),
        ];
        for (response, body, reason) in cases {
            let error = response.check(body.len(), false).unwrap_err();
            assert_eq!(error.to_string(), *reason);
        }
    }

    #[test]
    fn a_response_that_keeps_the_rules_passes() {
        assert_eq!(response(200, &[("x-a", "é\t~")], false).check(3, false), Ok(None));
        assert_eq!(response(200, &[("content-length", "3")], false).check(3, false), Ok(Some(3)));
        assert_eq!(response(200, &[("content-length", "9")], true).check(3, false), Ok(Some(9)));
        assert_eq!(response(200, &[("content-length", "9")], false).check(0, true), Ok(Some(9)));
        assert_eq!(response(304, &[("content-length", "9")], false).check(0, false), Ok(Some(9)));
    }

    #[test]
    fn kv_requests_read_as_the_protocol_spells_them() {
        let read = |json: &str| match Message::parse(json.as_bytes()) {
            Ok(Message::Kv(kv)) => kv.op,
            other => panic!("{other:?}"),
        };
        assert_eq!(read(r#"{"type":"kv","id":1,"op":"get","key":"a"}"#), KvOp::Get { key: "a".into() });
        assert_eq!(
            read(r#"{"type":"kv","id":1,"op":"incr","key":"a"}"#),
            KvOp::Incr(IncrOp { key: "a".into(), delta: 1, ttl_ms: None })
        );
        assert_eq!(read(r#"{"type":"kv","id":1,"op":"list"}"#), KvOp::List(ListOp::default()));
        assert_eq!(read(r#"{"type":"kv","id":1,"op":"txn"}"#), KvOp::Txn);
        for (op, is_read) in [("get", true), ("set", false), ("delete", false), ("incr", false), ("list", true), ("txn", false)] {
            assert_eq!(read(&format!(r#"{{"type":"kv","id":1,"op":"{op}","key":"a"}}"#)).is_read(), is_read, "{op}");
        }
        assert!(Message::parse(br#"{"type":"kv","id":1,"op":"drop","key":"a"}"#).is_err());
        assert!(Message::parse(br#"{"type":"kv","id":1,"op":"get"}"#).is_err());
    }

    #[test]
    fn a_head_that_is_no_message_is_explained_by_the_field_and_not_in_a_parsers_words() {
        for (head, reason) in [
            (
                r#"{"type":"response","id":1,"status":200,"headers":{}}"#,
                "response.headers must be an array of [name, value] pairs, got an object",
            ),
            (r#"{"type":"response","id":1,"status":200,"headers":[["a",1]]}"#, "response.headers[0][1] must be a string, got 1"),
            (
                r#"{"type":"response","id":1,"status":200,"headers":[["a","b","c"]]}"#,
                "response.headers[0] must be a [name, value] pair, got an array of 3",
            ),
            (
                r#"{"type":"response","id":1,"status":"200"}"#,
                r#"response.status must be an integer from 200 to 599, got the string "200""#,
            ),
            (r#"{"type":"response","id":1,"status":200.5}"#, "response.status must be an integer from 200 to 599, got 200.5"),
            (
                r#"{"type":"response","id":1,"status":null}"#,
                "response.status is null, which is the same as missing: it must be an integer from 200 to 599",
            ),
            (r#"{"type":"response","id":1,"status":70000}"#, "response.status must be an integer from 200 to 599, got 70000"),
            (r#"{"type":"response","id":1}"#, "response.status is missing: it must be an integer from 200 to 599"),
            (r#"{"type":"response","id":1,"status":200,"status":201}"#, "response.status is given twice"),
            (r#"{"type":"response","status":200}"#, "response.id is missing: it must be an integer from 0 to 9007199254740991"),
            (r#"{"type":"ready","id":"1"}"#, r#"ready.id must be an integer from 0 to 9007199254740991, got the string "1""#),
            (r#"{"type":"pong","id":-1}"#, "pong.id must be an integer from 0 to 9007199254740991, got -1"),
            (r#"{"type":"data","id":1,"more":true,"aborted":1}"#, "data.aborted must be true or false, got 1"),
            (r#"{"type":"result","id":1,"found":"yes"}"#, r#"result.found must be true or false, got the string "yes""#),
            (r#"{"type":"result","id":1,"rev":-1}"#, "result.rev must be an integer from 0 to 18446744073709551615, got -1"),
            (
                r#"{"type":"error","id":1,"code":5,"message":""}"#,
                "error.code must be a string of the form [a-z][a-z0-9_]{0,63}, got 5",
            ),
            (r#"{"type":"error","id":1,"code":"x"}"#, "error.message is missing: it must be a string of 1 to 4096 bytes"),
            (
                r#"{"type":"kv","id":1,"op":"drop"}"#,
                r#"kv.op must be one of get, set, delete, incr, list, txn, got the string "drop""#,
            ),
            (r#"{"type":"kv","id":1,"op":"get"}"#, "kv.key is missing: it must be a string"),
            (
                r#"{"type":"kv","id":1,"op":"incr","key":"a","delta":"1"}"#,
                r#"kv.delta must be an integer from -9223372036854775808 to 9223372036854775807, got the string "1""#,
            ),
            (r#"{"type":"kv","id":1,"op":"set","key":"a","if_absent":1}"#, "kv.if_absent must be true or false, got 1"),
            (r#"{"type":"kv","id":1,"op":"list","limit":-1}"#, "kv.limit must be an integer from 1 to 1000, got -1"),
            (r#"{"id":1}"#, "head.type is missing: it must be a string"),
            (r#"{"type":7,"id":1}"#, "head.type must be a string, got 7"),
            (r#"{"type":"respnse","id":1}"#, r#"unknown message type "respnse""#),
            (r#"{"type":"pong","id":9007199254740992}"#, "id 9007199254740992 is over the limit of 9007199254740991"),
            (r#"[1, 2]"#, "the head must be a JSON object, got an array of 2"),
            (r#""pong""#, r#"the head must be a JSON object, got the string "pong""#),
            ("pong", r#"the head is not JSON at byte 1 of 4: it begins with "pong""#),
            (
                r#"{"type":"pong","id":"#,
                r#"the head ends inside its JSON after 20 bytes: it begins with "{\"type\":\"pong\",\"id\":""#,
            ),
            (
                r#"{"type":"pong","id":1}x"#,
                r#"the head is not JSON at byte 23 of 23: it begins with "{\"type\":\"pong\",\"id\":1}x""#,
            ),
        ] {
            assert_eq!(Message::parse(head.as_bytes()).unwrap_err().to_string(), reason, "{head}");
        }
        let not_text = Message::parse(b"{\"type\":\"\xff\"}").unwrap_err().to_string();
        assert_eq!(not_text, r#"the head is not UTF-8 at byte 9: it begins with "{\"type\":\"\xff\"}""#);
    }

    #[test]
    fn an_error_that_the_host_or_the_sdk_makes_is_of_the_protocols_form() {
        let long = "é".repeat(3000);
        for (code, message, sent) in [
            ("busy", "try again", ("busy", "try again")),
            ("busy", "", ("busy", "busy")),
            ("Bad Code!", "so", ("internal", "so")),
            ("", "", ("internal", "internal")),
            ("x", long.as_str(), ("x", &long[..MAX_ERROR_MESSAGE])),
        ] {
            let failure = Failure::new(1, code, message);
            assert_eq!((&*failure.code, &*failure.message), sent);
            assert!(Message::parse(&serde_json::to_vec(&failure).unwrap()).is_ok(), "{code}");
        }
    }

    #[test]
    fn integers_are_written_in_plain_digits() {
        let result = KvResult { id: MAX_ID, rev: Some(u64::MAX), value: Some(i64::MIN), ..KvResult::default() };
        let written = serde_json::to_string(&result).unwrap();
        let plain = r#"{"type":"result","id":9007199254740991,"rev":18446744073709551615,"value":-9223372036854775808}"#;
        assert_eq!(written, plain);
        assert_eq!(Message::parse(plain.as_bytes()).unwrap(), Message::Result(result));
    }

    #[test]
    fn a_write_that_is_none_is_explained_by_the_field() {
        for (write, reason) in [
            (r#"5"#, "a write must be a JSON object, got 5"),
            (r#"{"key":"a"}"#, "write.op is missing: it must be one of set, delete, incr"),
            (r#"{"op":"get","key":"a"}"#, r#"write.op must be one of set, delete, incr, got the string "get""#),
            (r#"{"op":"delete"}"#, "write.key is missing: it must be a string"),
            (r#"{"op":"set","key":"a","value":5}"#, "write.value must be a string, got 5"),
        ] {
            assert_eq!(TxnOp::read(&serde_json::from_str(write).unwrap()).unwrap_err(), reason, "{write}");
        }
        assert!(TxnOp::read(&serde_json::from_str(r#"{"op":"set","key":"a","value":"b"}"#).unwrap()).is_ok());
    }
}
