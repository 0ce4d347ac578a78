//! A job for a plugin: a client's request, or a key-value operation of the operator's.

use crate::http::request::named;
use crate::http::{HttpError, WaitingRequest};
use crate::protocol::message::{Failure, KvOp, KvResult};
use crossbeam_channel::Sender;
use std::time::{Duration, Instant};

/// Longest time for a key-value operation of the operator's, whatever the plugin's request timeout. It occupies one of the API's few
/// threads, and an operation that was reported as failed must not be carried out hours later.
pub(crate) const MAX_KV_TIME: Duration = Duration::from_mins(5);

/// A job in a plugin's queue. It is always answered, however it ends.
pub(crate) enum Job {
    /// A client's request.
    Http(WaitingRequest),
    /// A key-value operation of the operator's.
    Kv(Box<KvJob>),
}

/// A key-value operation of the operator's, carried out by the plugin.
pub(crate) struct KvJob {
    /// `get`, `set` or `delete`.
    pub(crate) op: KvOp,
    /// The value to set.
    pub(crate) value: Vec<u8>,
    /// Gets the answer.
    pub(crate) reply: Sender<KvReply>,
    /// Time of arrival.
    pub(crate) arrived: Instant,
}

/// The answer to an operation: the result and the value read.
pub(crate) type KvReply = Result<(KvResult, Vec<u8>), KvFailure>;

/// Why an operation failed.
#[derive(Debug)]
pub(crate) enum KvFailure {
    /// The plugin answered with this error.
    Refused(Failure),
    /// The plugin's answer is invalid: the operation, and what is wrong with the answer.
    Invalid(String),
    /// The host fails the operation.
    Failed(HttpError),
}

impl Job {
    /// Time limit for the answer to begin, given the plugin's `request_timeout`.
    pub(crate) fn time_limit(&self, request_timeout: Duration) -> Duration {
        match self {
            Self::Http(_) => request_timeout,
            Self::Kv(_) => request_timeout.min(MAX_KV_TIME),
        }
    }

    /// Time of arrival.
    pub(crate) fn arrived(&self) -> Instant {
        match self {
            Self::Http(request) => request.arrived(),
            Self::Kv(job) => job.arrived,
        }
    }

    /// Whether the client has gone.
    pub(crate) fn is_cancelled(&self) -> bool {
        matches!(self, Self::Http(request) if request.is_cancelled())
    }

    /// Answers with an error.
    pub(crate) fn fail(self, error: HttpError) {
        match self {
            Self::Http(request) => request.fail(error),
            Self::Kv(job) => job.reply(Err(KvFailure::Failed(error))),
        }
    }
}

impl KvJob {
    /// The operation, for the plugin's log.
    pub(crate) fn name(&self) -> String {
        format!("the operator's {}", self.short_name())
    }

    /// The operation, for the operator.
    pub(crate) fn short_name(&self) -> String {
        let key = match &self.op {
            KvOp::Get { key } => key.as_str(),
            KvOp::Set(set) => set.key.as_str(),
            KvOp::Delete(delete) => delete.key.as_str(),
            KvOp::Incr(_) | KvOp::List(_) | KvOp::Txn => "",
        };
        format!("kv {} {:?}", self.op.name(), named(key))
    }

    /// Answers for a plugin that does not speak the plugin protocol, which has the operation.
    pub(crate) fn refuse_unsupported(self) {
        let message = "it does not speak the plugin protocol, by which it could be asked for its keys".to_owned();
        self.reply(Err(KvFailure::Refused(Failure { id: 0, code: "unsupported".to_owned(), message, index: None })));
    }

    /// Answers. The receiver may be gone.
    pub(crate) fn reply(self, reply: KvReply) {
        self.reply.try_send(reply).ok();
    }
}
