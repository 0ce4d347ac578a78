//! What is asked of a plugin: a client's request, or an operation on a key by the operator.

use crate::http::request::named;
use crate::http::{HttpError, WaitingRequest};
use crate::protocol::message::{Failure, KvOp, KvResult};
use crossbeam_channel::Sender;
use std::time::{Duration, Instant};

/// Longest time for an operator's operation on a plugin's key, however long its requests may take: it holds one of the API's few threads,
/// and an operation that was reported as failed must not be done hours later.
pub(crate) const MAX_KV_TIME: Duration = Duration::from_mins(5);

/// What waits in a plugin's queue. However it ends, whoever asks is answered.
pub(crate) enum Job {
    /// A request from the web.
    Http(WaitingRequest),
    /// An operation on one of the plugin's keys.
    Kv(Box<KvJob>),
}

/// An operation on a plugin's keys, asked by the operator.
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
    /// The plugin answered with this error.
    Refused(Failure),
    /// The plugin gave no valid answer: the operation, and what is wrong with the answer.
    Invalid(String),
    /// The host answers for the plugin.
    Failed(HttpError),
}

impl Job {
    /// Time for its answer to begin, where the plugin has `request_timeout` for its requests.
    pub(crate) fn time_limit(&self, request_timeout: Duration) -> Duration {
        match self {
            Self::Http(_) => request_timeout,
            Self::Kv(_) => request_timeout.min(MAX_KV_TIME),
        }
    }

    /// When it came in.
    pub(crate) fn arrived(&self) -> Instant {
        match self {
            Self::Http(request) => request.arrived(),
            Self::Kv(job) => job.arrived,
        }
    }

    /// Whether nobody waits for the answer any more.
    pub(crate) fn is_cancelled(&self) -> bool {
        matches!(self, Self::Http(request) if request.is_cancelled())
    }

    /// Answers with an error of the host's.
    pub(crate) fn fail(self, error: HttpError) {
        match self {
            Self::Http(request) => request.fail(error),
            Self::Kv(job) => job.reply(Err(KvFailure::Failed(error))),
        }
    }
}

impl KvJob {
    /// What is asked, for the plugin's log.
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
        self.reply.try_send(reply).ok();
    }
}
