//! What a plugin is asked, and who asks, as the rack sees them: nothing here knows which HTTP library is in front.

use crate::protocol::message::{Failure, Http, KvOp, KvResult, Response};
use crossbeam_channel::Sender;
use std::io;
use std::time::{Duration, Instant};

/// Characters of a path or key by which a request is named to people, so that the reason behind it has its place in the line.
const MAX_NAMED: usize = 200;

/// Longest time for an operation of the operator's on a plugin's key, however long its requests may take: it holds one of the API's few
/// threads, and one that the operator was told has failed must not be done hours later.
pub(crate) const MAX_KV_TIME: Duration = Duration::from_mins(5);

/// A request on its way to a plugin. However it ends, whoever asks is answered.
pub(crate) enum Job {
    /// From the web.
    Web(WebJob),
    /// From the operator, for one of the plugin's keys.
    Kv(Box<KvJob>),
}

/// A web request.
pub(crate) struct WebJob {
    /// What its method says of it.
    pub(crate) method: Method,
    /// How much of a body there is to read.
    pub(crate) body: BodyLength,
    /// Who asks.
    pub(crate) client: Box<dyn Client>,
    /// When it came in: its deadlines count from here.
    pub(crate) arrived: Instant,
    /// It was given back once, and is not sent behind others any more: were it lost again, it would be clear with which request.
    pub(crate) alone: bool,
    /// How it was lost with its connection, if it was.
    pub(crate) loss: Option<Box<Loss>>,
}

/// How a request was lost with a connection while its process lived, so that it may be sent once more.
pub(crate) struct Loss {
    /// To which process it may be sent again: where that has ended meanwhile, the request may be the reason.
    pub(crate) process: u64,
    /// What happened, for the plugin's log.
    pub(crate) why: String,
}

/// What a method says of how its request may be treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Method {
    /// It changes nothing (RFC 9110, section 9.2.1).
    Get,
    /// Nor does this, and its answer has no body.
    Head,
    /// Nothing is known.
    Other,
}

/// An operation on a plugin's keys.
pub(crate) struct KvJob {
    /// `get`, `set` or `delete`.
    pub(crate) op: KvOp,
    /// The value to set.
    pub(crate) value: Vec<u8>,
    /// Where the answer goes.
    pub(crate) reply: Sender<KvReply>,
    /// When it came in.
    pub(crate) arrived: Instant,
}

/// The answer to an operation: the result and the value read.
pub(crate) type KvReply = Result<(KvResult, Vec<u8>), KvFailure>;

/// Why an operation was not done.
#[derive(Debug)]
pub(crate) enum KvFailure {
    /// The plugin's own word.
    Refused(Failure),
    /// There was no valid answer: what was asked, and why that is so.
    Invalid(String),
    /// The host's.
    Failed(Failed),
}

/// How long a request's body is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BodyLength {
    /// As declared; 0 where there is none.
    Known(u64),
    /// It comes in chunks.
    Unknown,
}

/// Why a request gets no answer but the host's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failed {
    /// The client's body did not come whole, or broke its framing.
    BadBody,
    /// There is nothing at the path.
    NotFound,
    /// Not with this method.
    MethodNotAllowed,
    /// The client's body is over the limit.
    TooLarge,
    /// The request's head does not fit the protocol.
    HeadTooLarge,
    /// The plugin broke the protocol, answered with an error, or its connection was lost.
    BadGateway,
    /// The plugin is not there now; try again after so many seconds.
    Unavailable {
        /// For `retry-after`.
        retry_after: u64,
    },
    /// The plugin has too many requests waiting.
    Overloaded,
    /// No answer began in time.
    Timeout,
}

/// The client's end of a request. Dropped unanswered, it answers that the host failed.
pub(crate) trait Client: Send {
    /// The message to send; its id and `more` are for whoever sends it to set. None where nobody waits for the answer any more.
    fn message(&mut self) -> Option<Http<'_>>;

    /// Reads more of the request's body; 0 at its end. An error of kind `FileTooLarge` means that it is over the limit.
    fn read_body(&mut self, buffer: &mut [u8]) -> io::Result<usize>;

    /// The request's whole body, of `most` bytes at most, where nothing of it was read and all of it is in one piece of memory.
    fn whole_body(&mut self, most: usize) -> Option<Vec<u8>>;

    /// Sends the head of an answer that was checked, and the first piece of its body. What is left of a body that is known to the end,
    /// `rest` bytes, follows in pieces; with neither that nor `more` this is all.
    fn answer(&mut self, response: &Response<'_>, first: &[u8], rest: usize) -> io::Result<()>;

    /// Waits until another piece of at most 64 KiB can be sent without a wait for the client; false where that takes longer than `time`.
    fn has_room_within(&self, time: Duration) -> bool;

    /// Sends another piece of the body; `last` ends the answer.
    fn piece(&mut self, bytes: &[u8], last: bool) -> io::Result<()>;

    /// A buffer to read a piece to.
    fn buffer(&mut self) -> Vec<u8>;

    /// As [`Client::piece`], with the first `length` bytes of such a buffer.
    fn filled(&mut self, buffer: Vec<u8>, length: usize, last: bool) -> io::Result<()>;

    /// Breaks off an answer that has begun, so that the client can see that it is not whole.
    fn cut(&mut self);

    /// Answers with the host's own error.
    fn fail(&mut self, failed: Failed);

    /// What is asked, for people, until the answer has begun: method, path without the query, which may hold secrets, and request id.
    fn name(&self) -> String;
}

/// A path or a key as part of a request's name.
pub(crate) fn named(text: &str) -> String {
    let mut named: String = text.chars().take(MAX_NAMED).collect();
    if named.len() < text.len() {
        named.push('…');
    }
    named
}

impl Job {
    /// Time for its answer to begin, where the plugin has `request_timeout` for its requests.
    pub(crate) fn patience(&self, request_timeout: Duration) -> Duration {
        match self {
            Self::Web(_) => request_timeout,
            Self::Kv(_) => request_timeout.min(MAX_KV_TIME),
        }
    }

    /// When it came in.
    pub(crate) fn arrived(&self) -> Instant {
        match self {
            Self::Web(job) => job.arrived,
            Self::Kv(job) => job.arrived,
        }
    }

    /// What is asked, for people.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Web(job) => job.client.name(),
            Self::Kv(job) => job.name(),
        }
    }

    /// Answers with the host's own error.
    pub(crate) fn fail(self, failed: Failed) {
        match self {
            Self::Web(job) => job.fail(failed),
            Self::Kv(job) => job.reply(Err(KvFailure::Failed(failed))),
        }
    }
}

impl Method {
    /// The one of this name.
    pub(crate) fn named(name: &str) -> Self {
        match name {
            "GET" => Self::Get,
            "HEAD" => Self::Head,
            _ => Self::Other,
        }
    }
}

impl WebJob {
    /// Whether the request has no body and changes nothing, so that it may be sent behind others and sent again (RFC 9110, 9.2).
    pub(crate) fn is_safe(&self) -> bool {
        self.method != Method::Other && self.body == BodyLength::Known(0)
    }

    /// Whether the answer's body is not sent.
    pub(crate) fn is_head(&self) -> bool {
        self.method == Method::Head
    }

    /// Answers with the host's own error.
    pub(crate) fn fail(mut self, failed: Failed) {
        self.client.fail(failed);
    }
}

impl KvJob {
    /// What is asked, for people.
    pub(crate) fn name(&self) -> String {
        format!("the operator's {}", self.short_name())
    }

    /// The same for the operator.
    pub(crate) fn short_name(&self) -> String {
        let key = match &self.op {
            KvOp::Get { key } => key.as_str(),
            KvOp::Set(set) => set.key.as_str(),
            KvOp::Delete(delete) => delete.key.as_str(),
            KvOp::Incr(_) | KvOp::List(_) | KvOp::Txn => "",
        };
        format!("kv {} {:?}", self.op.name(), named(key))
    }

    /// Answers; whoever asked may have gone.
    pub(crate) fn reply(self, reply: KvReply) {
        drop(self.reply.try_send(reply));
    }
}
