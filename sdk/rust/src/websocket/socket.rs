//! One socket: what a plugin does with it, and what waits for its handlers.

use super::connection::Line;
use super::message::{Close, CloseError, Message, SendError};
use super::opening::Acceptance;
use super::outgoing::Part;
use crate::context::Context;
use crate::kv::Kv;
use crate::lock::{LockExt, unpoisoned};
use crate::protocol::frame::EncodeError;
use crate::protocol::message::{
    Headers, MAX_CLOSE_REASON, Response, SOCKET_CREDIT, SocketAccept, SocketClose, SocketCredit, SocketMessage, SocketOpen,
};
use std::collections::VecDeque;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};

/// The code of a socket whose client reads too slowly for a broadcast (IANA's registry of WebSocket close codes: try again later).
const TRY_AGAIN_LATER: u16 = 1013;

/// The header in which a client offers protocols (RFC 6455, section 11.3.4).
const PROTOCOLS: &str = "sec-websocket-protocol";

/// A WebSocket of a client. A clone is cheap, may go to any thread, and is the same socket: equal to it, with the same hash.
///
/// It ends with the client, with [`Socket::close`], or when a handler fails. Its close handler is then called, once. A clone that is
/// kept beyond that does no harm.
#[derive(Clone)]
pub struct Socket(Arc<Inner>);

struct Inner {
    id: u64,
    path: String,
    query: Option<String>,
    mount: String,
    headers: Vec<(String, String)>,
    remote: String,
    /// There once the socket is accepted with a protocol.
    protocol: OnceLock<String>,
    context: Context,
    line: Arc<Line>,
    state: Mutex<State>,
    /// Told when there is credit, and when the socket is closed.
    changed: Condvar,
}

/// What waits for a handler.
pub(super) enum Event {
    Open,
    Message(Message),
    Close(Close),
}

#[derive(Default)]
struct State {
    /// Whether a client has the socket: it was accepted.
    is_accepted: bool,
    /// Whether the plugin sends nothing more: it has closed or refused the socket.
    is_closed: bool,
    /// Whether the host sends nothing more.
    is_ended: bool,
    /// What the plugin may still send, in bytes. The last message may take more than there is.
    credit: i64,
    /// The same of the host.
    host_credit: i64,
    /// What is sent behind the acceptance.
    held: Vec<Part>,
    events: VecDeque<Event>,
    /// Whether a thread handles the events, or is going to.
    is_scheduled: bool,
}

impl State {
    fn is_open(&self) -> bool {
        !self.is_closed && !self.is_ended
    }
}

impl Socket {
    /// What follows the mount, not decoded. It begins with `/`.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.0.path
    }

    /// What follows the first `?`, not decoded.
    #[must_use]
    pub fn query(&self) -> Option<&str> {
        self.0.query.as_deref()
    }

    /// The plugin's route. Empty for a request by host name.
    #[must_use]
    pub fn mount(&self) -> &str {
        &self.0.mount
    }

    /// The client's address, empty where it is not known.
    #[must_use]
    pub fn remote(&self) -> &str {
        &self.0.remote
    }

    /// The first header of this name, in any case, of the request that has asked for the socket.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers().find_map(|(each, value)| each.eq_ignore_ascii_case(name).then_some(value))
    }

    /// The headers of that request in order, repeats kept, names in lower case.
    pub fn headers(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.headers.iter().map(|(name, value)| (&**name, &**value))
    }

    /// The protocols that the client offers, those it prefers first. An open handler may [choose](Acceptance::protocol) one.
    pub fn protocols(&self) -> impl Iterator<Item = &str> {
        let offers = self.headers().filter(|(name, _)| name.eq_ignore_ascii_case(PROTOCOLS));
        offers.flat_map(|(_, offered)| offered.split(',').map(str::trim)).filter(|protocol| !protocol.is_empty())
    }

    /// The protocol that was chosen.
    #[must_use]
    pub fn protocol(&self) -> Option<&str> {
        self.0.protocol.get().map(String::as_str)
    }

    /// What the host has told the plugin.
    #[must_use]
    pub fn context(&self) -> &Context {
        &self.0.context
    }

    /// The plugin's key-value store.
    #[must_use]
    pub fn kv(&self) -> &Kv {
        self.0.context.kv()
    }

    /// Whether neither the client nor the plugin has closed the socket.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.lock().is_open()
    }

    /// Sends a message of at most 1 MiB. It waits while the client reads too slowly, until there is credit or the socket is closed.
    /// What an open handler sends goes out behind the acceptance.
    ///
    /// That it is sent does not say that the client gets it: nothing does, in WebSocket.
    ///
    /// # Errors
    /// When the socket is closed, the message is too large, or the open handler sends more than it has credit for.
    pub fn send(&self, message: impl Into<Message>) -> Result<(), SendError> {
        let message = Arc::new(message.into());
        message.check()?;
        let waits = |state: &mut State| state.is_open() && state.credit <= 0 && state.is_accepted;
        let mut state = unpoisoned(self.0.changed.wait_while(self.lock(), waits));
        match &*state {
            state if !state.is_open() => return Err(SendError::Closed),
            state if state.credit <= 0 => return Err(SendError::NotAccepted),
            _ => {}
        }
        self.put_message(&mut state, &message);
        Ok(())
    }

    /// Closes the socket. What was sent before reaches the client first. Messages of the client that wait for the message handler are
    /// dropped; the close handler is called once the client has gone. A socket that is closed already stays as it is.
    ///
    /// Usual codes are 1000, 1008 for a client that breaks the rules, and the plugin's own from 4000 on. The reason has at most 123
    /// bytes.
    ///
    /// # Errors
    /// When the code cannot be sent, or the reason is too long.
    pub fn close(&self, code: u16, reason: &str) -> Result<(), CloseError> {
        let close = SocketClose { id: self.0.id, code: Some(code), reason: reason.into() };
        if !close.has_code_to_send() {
            return Err(CloseError::Code(code));
        }
        if reason.len() > MAX_CLOSE_REASON {
            return Err(CloseError::Reason(reason.len()));
        }
        self.put_close(self.lock(), &close);
        Ok(())
    }

    pub(super) fn new(open: SocketOpen<'_>, context: &Context, line: &Arc<Line>) -> Self {
        Self(Arc::new(Inner {
            id: open.id,
            path: open.path.to_string(),
            query: open.query.map(|query| query.to_string()),
            mount: open.mount.to_string(),
            headers: open.headers.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect(),
            remote: open.remote.to_string(),
            protocol: OnceLock::new(),
            context: context.clone(),
            line: Arc::clone(line),
            state: Mutex::new(State {
                credit: signed(open.credit.unwrap_or(SOCKET_CREDIT)),
                host_credit: signed(SOCKET_CREDIT),
                ..State::default()
            }),
            changed: Condvar::new(),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.locked()
    }

    /// Accepts the socket, and sends what was sent to it before.
    ///
    /// # Errors
    /// When the acceptance fits no frame.
    pub(super) fn accept(&self, acceptance: Acceptance) -> Result<(), EncodeError> {
        let Acceptance { protocol, headers } = acceptance;
        let headers: Headers<'_> = headers.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
        let id = self.0.id;
        let answer = Part::head(&SocketAccept { id, protocol: protocol.as_deref().map(Into::into), headers, credit: None })?;
        if let Some(protocol) = protocol {
            self.0.protocol.get_or_init(|| protocol);
        }
        let sockets = self.0.context.registry();
        sockets.insert(self.clone());
        let mut state = self.lock();
        // The handler has taken it, whether or not its client is still there: the close handler is called in any case.
        state.is_accepted = true;
        let held = std::mem::take(&mut state.held);
        let is_open = state.is_open();
        if !state.is_ended {
            self.0.line.outgoing.push(answer);
            held.into_iter().for_each(|part| self.0.line.outgoing.push(part));
        }
        drop(state);
        if !is_open {
            sockets.remove(self);
        }
        Ok(())
    }

    /// Refuses the socket with a response.
    ///
    /// # Errors
    /// When the response fits no frame.
    pub(super) fn refuse(&self, status: u16, headers: Headers<'_>, body: &[u8]) -> Result<(), EncodeError> {
        let answer = Part::bytes(&Response { id: self.0.id, status, headers, more: false }, body)?;
        let mut state = self.lock();
        state.held = Vec::new();
        state.events = VecDeque::new();
        state.is_closed = true;
        if !std::mem::replace(&mut state.is_ended, true) {
            self.0.line.forget(self.0.id);
            self.0.line.outgoing.push(answer);
        }
        drop(state);
        self.0.changed.notify_all();
        Ok(())
    }

    /// Takes a message of the client in. Tells whether a thread has to be found for the socket.
    ///
    /// # Errors
    /// When the host was not to send it: the rest of a sentence.
    pub(super) fn receive(&self, message: Message) -> Result<bool, &'static str> {
        let mut state = self.lock();
        if state.host_credit <= 0 {
            return Err("came without credit");
        }
        if !state.is_accepted {
            return Err("came before its socket was accepted");
        }
        state.host_credit -= signed(message.cost());
        if state.is_closed {
            return Ok(false);
        }
        Ok(Self::add(&mut state, Event::Message(message)))
    }

    /// Takes in what a thread has to handle. Tells whether one has to be found.
    pub(super) fn push(&self, event: Event) -> bool {
        Self::add(&mut self.lock(), event)
    }

    fn add(state: &mut State, event: Event) -> bool {
        state.events.push_back(event);
        !std::mem::replace(&mut state.is_scheduled, true)
    }

    /// Takes in that the host sends nothing more, and ends all waits. Tells whether a thread has to be found for the socket.
    pub(super) fn end(&self, close: Close) -> bool {
        let mut state = self.lock();
        if std::mem::replace(&mut state.is_ended, true) {
            return false;
        }
        let is_ready = Self::add(&mut state, Event::Close(close));
        drop(state);
        self.0.changed.notify_all();
        self.0.context.registry().remove(self);
        is_ready
    }

    /// What is to be handled next. An open handler is not called for a client that has gone, and then no close handler is either.
    pub(super) fn next(&self) -> Option<Event> {
        let mut state = self.lock();
        match state.events.pop_front()? {
            Event::Open if state.is_ended => None,
            Event::Close(_) if !state.is_accepted => None,
            event => Some(event),
        }
    }

    /// Whether there is more to handle. If not, the next event is given to any free thread.
    pub(super) fn is_ready_again(&self) -> bool {
        let mut state = self.lock();
        state.is_scheduled = !state.events.is_empty();
        state.is_scheduled
    }

    pub(super) fn add_credit(&self, bytes: u64) {
        let mut state = self.lock();
        state.credit = state.credit.saturating_add(signed(bytes));
        drop(state);
        self.0.changed.notify_all();
    }

    /// Returns credit to the host, whose message is handled.
    pub(super) fn give_credit(&self, bytes: u64) {
        let mut state = self.lock();
        if state.is_open() {
            state.host_credit = state.host_credit.saturating_add(signed(bytes));
            self.put(&mut state, Part::head(&SocketCredit { id: self.0.id, bytes }));
        }
    }

    /// Closes the socket with a code and a reason that the library has chosen.
    pub(super) fn give_up(&self, code: u16, reason: &str) {
        self.put_close(self.lock(), &SocketClose { id: self.0.id, code: Some(code), reason: reason.into() });
    }

    /// Sends a message if there is credit for it, and closes the socket otherwise. Tells whether it was sent.
    pub(super) fn offer(&self, message: &Arc<Message>) -> bool {
        let mut state = self.lock();
        if !state.is_open() {
            return false;
        }
        if state.credit <= 0 {
            let reason = "the client reads too slowly".into();
            self.put_close(state, &SocketClose { id: self.0.id, code: Some(TRY_AGAIN_LATER), reason });
            return false;
        }
        self.put_message(&mut state, message);
        true
    }

    fn put_message(&self, state: &mut State, message: &Arc<Message>) {
        state.credit -= signed(message.cost());
        let head = SocketMessage { id: self.0.id, text: message.text().is_some() };
        self.put(state, Part::message(&head, message));
    }

    /// Sends the close, drops what waits for the message handler, and ends all waits.
    fn put_close(&self, mut state: MutexGuard<'_, State>, close: &SocketClose<'_>) {
        if !state.is_open() {
            return;
        }
        self.put(&mut state, Part::head(close));
        state.is_closed = true;
        state.events.retain(|event| !matches!(event, Event::Message(_)));
        drop(state);
        self.0.changed.notify_all();
        self.0.context.registry().remove(self);
    }

    /// Sends a frame, or holds it until the socket is accepted. The lock on the state keeps the order.
    fn put(&self, state: &mut State, part: Result<Part, EncodeError>) {
        // Heads of a few fields and checked messages fit a frame.
        let Ok(part) = part else { return };
        match state.is_accepted {
            true => self.0.line.outgoing.push(part),
            false => state.held.push(part),
        }
    }
}

/// Credit, of which there may be less than none. The protocol's largest, 2^53 − 1, fits.
fn signed(credit: u64) -> i64 {
    i64::try_from(credit).unwrap_or(i64::MAX)
}

impl PartialEq for Socket {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Socket {}

impl Hash for Socket {
    fn hash<H: Hasher>(&self, state: &mut H) {
        Arc::as_ptr(&self.0).hash(state);
    }
}

impl std::fmt::Debug for Socket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Socket").field("id", &self.0.id).field("path", &self.0.path).finish_non_exhaustive()
    }
}
