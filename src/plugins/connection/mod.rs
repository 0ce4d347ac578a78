//! A worker's connection to a plugin, whatever it speaks: frames of the plugin protocol, or HTTP to an application.

pub(crate) mod application;
pub(crate) mod frames;

use crate::http::Request;
use crate::http::body::Body;
use crate::http::framing::ResponseHead;
use crate::plugins::job::KvJob;
use crate::plugins::process_state::ProcessState;
use crate::plugins::worker::{Outcome, Worker};
use crate::protocol::frame::{EncodeError, ReadError};
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// Interval at which a wait calls `interrupted`. Deadlines are kept to this precision.
const TICK: Duration = Duration::from_millis(100);

/// Idle time after which a connection frees its buffers. Between frequent requests they are worth keeping.
pub(crate) const RELEASE_AFTER: Duration = Duration::from_secs(1);

/// Why a wait ended without its result.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WaitError {
    /// The deadline passed.
    #[error("no answer in time")]
    Deadline,
    /// The caller stopped waiting.
    #[error("interrupted")]
    Interrupted,
    /// The plugin has closed the connection, inside a message or between two.
    #[error("the connection was closed{}", if *within { " inside a message" } else { "" })]
    Closed {
        /// Whether part of a message was received.
        within: bool,
    },
    /// The connection failed.
    #[error("the connection was lost ({0})")]
    Lost(io::Error),
    /// The plugin sent something invalid, after which nothing can be read.
    #[error("protocol error: {0}")]
    Invalid(String),
}

impl From<ReadError> for WaitError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Closed => Self::Closed { within: false },
            ReadError::Cut => Self::Closed { within: true },
            ReadError::Io(error) => Self::Lost(error),
            error => Self::Invalid(error.to_string()),
        }
    }
}

/// The result of an attempt to send.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    /// Everything was sent.
    All,
    /// The plugin takes no more now, and has sent something itself.
    Answered,
}

/// What was received where an answer was due.
pub(crate) enum Received<'a> {
    /// The beginning of the answer.
    Answer(Answer<'a>),
    /// An interim response (1xx) before the answer, to be passed on.
    Interim(Vec<u8>),
    /// The plugin has switched to another protocol: its response for the client. [`PluginConnection::take_stream`] gives the rest.
    Upgraded(Vec<u8>),
    /// Something harmless that has nothing to do with the answer.
    Nothing,
    /// The plugin failed the request: its reason. The connection stays usable.
    Error(String),
    /// An answer that breaks the rules, and whether it was received `whole`, so that the connection stays usable.
    Refused { why: String, whole: bool },
    /// A second answer to an earlier request: what it is. The expected answer can follow it.
    Late(String),
    /// Something after which nothing can be read. `ours` if it names the request, so that the request is to blame.
    Unexpected { why: String, ours: bool },
}

/// The beginning of an answer.
pub(crate) struct Answer<'a> {
    pub(crate) head: ResponseHead,
    /// The beginning of its body.
    pub(crate) first: &'a [u8],
    /// Bytes of the body that [`PluginConnection::read_rest`] returns.
    pub(crate) rest: usize,
    /// Whether more of the body follows those, by [`PluginConnection::take_piece`].
    pub(crate) more: bool,
    /// Whether it is a stream of server-sent events. Clients reconnect by themselves, so it need not delay a stop.
    pub(crate) events: bool,
}

/// The next part of a body.
pub(crate) enum Piece<'a> {
    /// Bytes of it, and whether `more` follow.
    Data { bytes: &'a [u8], more: bool },
    /// The plugin has aborted the body: its reason. The connection stays usable.
    Aborted(String),
    /// It is broken: the reason. Nothing more can be read.
    Broken(String),
}

/// A connection to a plugin. A worker owns it, and uses it as a blocking one.
pub(crate) trait PluginConnection: Sized + Send + 'static {
    /// Whether safe requests may be sent before the answer to the previous one.
    const PIPELINES: bool;

    /// Whether a connection is only opened for a request. Otherwise it is opened in advance.
    const ON_DEMAND: bool;

    /// Whether answers name their requests, so that a second answer is found without a look before each request.
    const HAS_IDS: bool;

    /// The connection of a new worker: open, or not yet open if that happens [on demand](Self::ON_DEMAND).
    fn prepare(process: &ProcessState) -> io::Result<Self>;

    /// Opens a connection to a process. Fails at once if nobody listens or accepts.
    fn connect(process: &ProcessState) -> io::Result<Self>;

    /// Whether it was opened, and not closed since.
    fn is_open(&self) -> bool;

    /// Closes it.
    fn close(&mut self);

    /// Returns an id for the next request, unique on this connection.
    fn next_id(&mut self) -> u64;

    /// Appends a request to the send buffer, with its body or, if there is `more` of it, the beginning.
    fn queue_request(&mut self, request: &Request, id: u64, more: bool, body: Vec<u8>) -> Result<(), EncodeError>;

    /// Appends a piece of the body of a request to the send buffer.
    fn queue_piece(&mut self, id: u64, piece: &[u8], more: bool) -> Result<(), EncodeError>;

    /// Sends the rest of a body, which is all there, while the answer that has begun is received. False if the plugin gets no more of it.
    fn send_aside(&mut self, _body: Body) -> bool {
        false
    }

    /// Tells the plugin that it gets no more of the body, because it has answered already.
    fn abort_body(&mut self, id: u64) -> Result<(), EncodeError>;

    /// Number of bytes in the send buffer.
    fn queued(&mut self) -> usize;

    /// Sends the send buffer. Stops at the deadline, or when the plugin takes no more and has sent something itself.
    fn flush(&mut self, deadline: Instant, interrupted: impl Fn() -> bool) -> Result<Sent, WaitError>;

    /// Whether no byte of the send buffer was sent, as on a connection that the plugin had already closed.
    fn is_unsent(&mut self) -> bool;

    /// Whether the plugin has sent something that was not read yet, or has closed the connection.
    fn has_answer(&mut self) -> bool;

    /// Takes an interim response (1xx) that came while the request's body is being sent, which goes on after it: bytes for the client, or
    /// none of them. None if the answer has come.
    fn take_interim(&mut self) -> Option<Vec<u8>> {
        None
    }

    /// Whether bytes were received behind the current answer. Costs no system call.
    fn is_followed(&self) -> bool;

    /// Whether bytes were received that belong to no answer so far. Costs no system call.
    fn holds_bytes(&self) -> bool;

    /// Checks that nothing came `place`, where nothing was due, and that the connection is open.
    ///
    /// # Errors
    /// The unexpected input, described for the log; `None` if the plugin has closed the connection.
    fn check_quiet(&mut self, place: &str) -> Result<(), Option<String>>;

    /// The part of an incomplete message that was received, for messages.
    fn unfinished(&self) -> Option<String>;

    /// Whether a safe request may be sent once more after this connection was lost.
    fn may_resend(&self) -> bool;

    /// Waits until the answer to a request begins. Sends the rest of the send buffer meanwhile.
    fn wait_answer(&mut self, deadline: Instant, interrupted: impl Fn() -> bool) -> Result<(), WaitError>;

    /// Returns what [`PluginConnection::wait_answer`] has received, where the answer to the request with this id is due.
    fn take_answer(&mut self, request: &Request, id: u64) -> Result<Received<'_>, WaitError>;

    /// Waits for more of the [`Answer::rest`], and returns the number of bytes read.
    fn read_rest(&mut self, buffer: &mut [u8], deadline: Instant, interrupted: impl Fn() -> bool) -> Result<usize, WaitError>;

    /// Waits for the next part of a body that streams.
    fn wait_piece(&mut self, deadline: Instant, interrupted: impl Fn() -> bool) -> Result<(), WaitError>;

    /// Returns the part of the body of the answer with this id that [`PluginConnection::wait_piece`] has received.
    fn take_piece(&mut self, id: u64) -> Result<Piece<'_>, WaitError>;

    /// Prepares for a request behind those under way. False if there is no room for one.
    fn make_room(&mut self) -> bool {
        true
    }

    /// Closes connections without a request, but for so many.
    fn keep_idle(&mut self, _most: usize) {}

    /// Waits up to `time` for the answer to any request under way, unless there is one alone. Makes it the next to be taken, and returns the
    /// place of its request among them. None if none has come.
    fn bring_forward(&mut self, _time: Duration) -> Option<usize> {
        Some(0)
    }

    /// Whether another answer is known to have come, which [`PluginConnection::bring_forward`] finds without a system call.
    fn has_another(&self) -> bool {
        false
    }

    /// Makes the answer to the request at this place the next to be taken.
    fn bring(&mut self, _at: usize) {}

    /// Gives up the requests behind the current one. False if answers to them may still arrive on this connection.
    fn drop_behind(&mut self) -> bool {
        false
    }

    /// Gives up the current request, whose connection is not usable. False if the others under way are lost with it, or there are none.
    fn drop_current(&mut self) -> bool {
        false
    }

    /// Ends a complete answer. Whether the connection can be used for the answers behind it, or else for another request.
    fn finish(&mut self) -> bool;

    /// Gives up the socket after a switch to another protocol, with what was received behind the response.
    fn take_stream(&mut self) -> Option<(OwnedFd, Vec<u8>)>;

    /// Frees memory that an idle connection does not need.
    fn release(&mut self);

    /// Executes a key-value operation of the operator's.
    fn operate(worker: &mut Worker<Self>, job: KvJob) -> Outcome;

    /// Checks that an idle plugin still responds.
    fn ping(worker: &mut Worker<Self>) -> Outcome;

    /// Ends the connection, because the process is to stop.
    fn shut_down(worker: Worker<Self>);
}
