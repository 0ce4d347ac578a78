//! WebSocket (RFC 6455) for plugins that speak the plugin protocol: the handshake, and the channel between the event loop, which speaks
//! with the client, and the plugin's connection for sockets.
//!
//! A socket has an end on each side: [`SocketEnd`] in the event loop, and [`SocketReturn`] at the plugin's connection.

use super::errors;
use super::http_error::HttpError;
use super::request::{Request, header_in};
use super::response_channel::{Address, ResponseChannel, ResponsePart};
use crate::lock::LockExt;
use crate::protocol::message::SOCKET_MESSAGE_COST;
use crate::protocol::metadata::ANY_ORIGIN;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use crossbeam_channel::{Receiver, Sender, unbounded};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use tungstenite::{Bytes, Message};

/// The version of the protocol (RFC 6455, section 4.1).
pub(crate) const VERSION: &str = "13";

/// What is appended to the client's key before its digest is taken (RFC 6455, section 1.3).
const KEY_SUFFIX: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// Bytes of a client's key.
const KEY_SIZE: usize = 16;

/// Bytes of messages that wait for a plugin, from which on the event loop reads no more from the clients of its sockets. One message of each
/// client that was being read may come on top.
const MOST_WAITING: usize = 4 << 20;

/// Bytes that wait for a plugin, from which on downwards the clients of its sockets are read again.
const FEW_WAITING: usize = MOST_WAITING / 2;

/// The code of a socket whose client has gone without a close frame.
pub(crate) const GONE: u16 = 1006;

/// Whether a request for another protocol asks for WebSocket.
pub(crate) fn is_asked_for(request: &Request) -> bool {
    request
        .header("upgrade")
        .is_some_and(|protocols| protocols.split(',').any(|protocol| protocol.trim().eq_ignore_ascii_case("websocket")))
}

/// Checks the client's part of the handshake, and returns the value of `sec-websocket-accept`.
///
/// # Errors
/// The answer that refuses it.
pub(crate) fn accept_key(request: &Request) -> Result<String, HttpError> {
    if request.header("sec-websocket-version") != Some(VERSION) {
        return Err(errors::WEBSOCKET_VERSION);
    }
    let key = request.header("sec-websocket-key").unwrap_or_default();
    if STANDARD.decode(key).map_or(0, |key| key.len()) != KEY_SIZE {
        return Err(errors::WEBSOCKET_KEY);
    }
    let digest = ring::digest::digest(&ring::digest::SHA1_FOR_LEGACY_USE_ONLY, format!("{key}{KEY_SUFFIX}").as_bytes());
    Ok(STANDARD.encode(digest))
}

/// Whether the page that asks may use a plugin: it is of the same site, or of one of these origins, or the client is no browser.
pub(crate) fn is_origin_allowed(request: &Request, origins: &[String]) -> bool {
    let Some(origin) = header_in(&request.head, "origin") else { return true };
    let origin = String::from_utf8_lossy(origin).to_ascii_lowercase();
    if origins.iter().any(|allowed| allowed == ANY_ORIGIN || *allowed == origin) {
        return true;
    }
    // Only a trusted proxy's is in the head.
    let forwarded = request.header("x-forwarded-host").map(|hosts| hosts.split(',').next().unwrap_or_default().trim());
    let host = forwarded.or(request.header("host")).unwrap_or_default().to_ascii_lowercase();
    origin.split_once("://").is_some_and(|(scheme, place)| {
        let port = if scheme == "https" { ":443" } else { ":80" };
        place.strip_suffix(port).unwrap_or(place) == host.strip_suffix(port).unwrap_or(&host)
    })
}

/// The protocols that a client offers.
pub(crate) fn offered_protocols(request: &Request) -> impl Iterator<Item = &str> {
    request.headers("sec-websocket-protocol").flat_map(|value| value.split(',')).map(str::trim)
}

/// What a message takes of the credit of a socket.
pub(crate) fn cost(length: usize) -> i64 {
    i64::try_from(length as u64 + SOCKET_MESSAGE_COST).unwrap_or(i64::MAX)
}

/// The end of a socket, for the other side.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Closing {
    /// None if the client gave none.
    pub(crate) code: Option<u16>,
    pub(crate) reason: String,
}

impl Closing {
    /// An end with a code and no reason.
    pub(crate) fn with(code: u16) -> Self {
        Self { code: Some(code), reason: String::new() }
    }
}

/// What goes to a plugin about a socket.
pub(crate) enum ToPlugin {
    /// This frame, which asks the plugin whether it takes the socket.
    Open(Vec<u8>),
    /// A message of the client.
    Message { text: bool, bytes: Bytes },
    /// The client has taken messages of this cost.
    Credit(u64),
    /// The last about this socket.
    Close(Closing),
}

impl ToPlugin {
    /// Bytes that count for the limit of the queue.
    pub(crate) fn size(&self) -> usize {
        match self {
            Self::Open(frame) => frame.len(),
            Self::Message { bytes, .. } => usize::try_from(cost(bytes.len())).unwrap_or(usize::MAX),
            Self::Credit(_) | Self::Close(_) => 0,
        }
    }
}

/// What goes to a client, through the event loop.
pub(crate) enum ToClient {
    /// A message of the plugin.
    Message(Message),
    /// The plugin has taken messages of this cost.
    Credit(u64),
    /// The plugin closes the socket, and is told of the client's reply.
    Close(Closing),
    /// The plugin is to restart or to stop, so that the host closes the socket.
    Restart,
    /// The host closes the socket with this code, because of a fault of the plugin's.
    Fail(u16),
    /// The plugin takes more messages.
    Room,
}

/// The queue of what goes to a plugin about all of its sockets. Its bytes are bounded, since the event loop reads no more from the clients
/// while they are too many.
pub(crate) struct SocketQueue {
    sender: Sender<(u64, ToPlugin)>,
    /// Bytes of what is in the queue.
    waiting: AtomicUsize,
    /// Those who are told when there is room.
    awaiting: Mutex<Vec<SocketReturn>>,
}

impl SocketQueue {
    /// A queue, and its end at the plugin's connection.
    pub(crate) fn new() -> (Arc<Self>, Receiver<(u64, ToPlugin)>) {
        let (sender, receiver) = unbounded();
        (Arc::new(Self { sender, waiting: AtomicUsize::new(0), awaiting: Mutex::default() }), receiver)
    }

    /// Puts something into the queue. If the plugin's connection has ended, it is not needed.
    pub(crate) fn put(&self, socket: u64, what: ToPlugin) {
        self.waiting.fetch_add(what.size(), Ordering::SeqCst);
        self.sender.send((socket, what)).ok();
    }

    /// What has this size was taken from the queue and sent.
    pub(crate) fn sent(&self, size: usize) {
        let before = self.waiting.fetch_sub(size, Ordering::SeqCst);
        if before - size <= FEW_WAITING {
            for socket in std::mem::take(&mut *self.awaiting.locked()) {
                socket.put(ToClient::Room);
            }
        }
    }

    /// Whether more messages may be put. If not, the socket is told when they may.
    fn has_room(&self, socket: &SocketReturn) -> bool {
        let has_room = || self.waiting.load(Ordering::SeqCst) < MOST_WAITING;
        if has_room() {
            return true;
        }
        self.awaiting.locked().push(socket.clone());
        // It may have been emptied meanwhile, without a look at this socket. Then it is told once too often at worst.
        has_room()
    }
}

/// The way to the event loop for what goes to the client of a socket.
#[derive(Clone)]
pub(crate) struct SocketReturn {
    channel: Arc<ResponseChannel>,
    address: Address,
}

impl SocketReturn {
    pub(super) fn new(channel: Arc<ResponseChannel>, address: Address) -> Self {
        Self { channel, address }
    }

    /// Puts something into the channel.
    pub(crate) fn put(&self, what: ToClient) {
        self.channel.put(self.address, ResponsePart::Socket(what));
    }
}

/// The event loop's end of a socket. The plugin is told of its end, whatever happens.
pub(crate) struct SocketEnd {
    id: u64,
    queue: Arc<SocketQueue>,
    back: SocketReturn,
    is_closed: bool,
    /// Whether it is told when there is room in the queue.
    awaits_room: bool,
}

impl SocketEnd {
    /// The end of the socket with this id.
    pub(crate) fn new(id: u64, queue: Arc<SocketQueue>, back: SocketReturn) -> Self {
        Self { id, queue, back, is_closed: false, awaits_room: false }
    }

    /// Passes a message on to the plugin.
    pub(crate) fn message(&self, text: bool, bytes: Bytes) {
        self.put(ToPlugin::Message { text, bytes });
    }

    /// Returns credit to the plugin.
    pub(crate) fn credit(&self, bytes: u64) {
        self.put(ToPlugin::Credit(bytes));
    }

    /// Tells the plugin that the socket has ended, unless it was told.
    pub(crate) fn close(&mut self, closing: Closing) {
        self.put(ToPlugin::Close(closing));
        self.is_closed = true;
    }

    /// Whether more may be read from the client. If not, the event loop is told when it may.
    pub(crate) fn has_room(&mut self) -> bool {
        if self.is_closed {
            return true;
        }
        self.awaits_room = self.awaits_room || !self.queue.has_room(&self.back);
        !self.awaits_room
    }

    /// There is room again.
    pub(crate) fn hear_of_room(&mut self) {
        self.awaits_room = false;
    }

    fn put(&self, what: ToPlugin) {
        if !self.is_closed {
            self.queue.put(self.id, what);
        }
    }
}

impl Drop for SocketEnd {
    fn drop(&mut self) {
        self.close(Closing::with(GONE));
    }
}
