//! What a worker says to a plugin that speaks the plugin protocol, besides requests: key-value operations, `ping` and `shutdown`.

use super::{Broken, Outcome, STREAM_IDLE, Worker};
use crate::http::{HttpError, errors};
use crate::plugins::connection::frames::FrameConnection;
use crate::plugins::connection::{PluginConnection, WaitError};
use crate::plugins::job::{KvFailure, KvJob, MAX_KV_TIME};
use crate::plugins::process_state::ProcessState;
use crate::protocol::message::{Kv, Message, Ping, Shutdown};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Time limit for the pong.
const PING_TIME: Duration = Duration::from_secs(5);

/// Number of consecutive pings without a pong after which the plugin is restarted.
pub(crate) const MAX_MISSED_PINGS: u32 = 3;

/// Time that the shutdown of a connection waits until the plugin has accepted new ones.
const ACCEPT_TIME: Duration = Duration::from_secs(1);

impl Worker<FrameConnection> {
    /// Executes a key-value operation of the operator's.
    pub(crate) fn operate(&mut self, mut job: KvJob) -> Outcome {
        let id = self.connection.next_id();
        let kv = Kv { id, op: job.op.clone() };
        if self.connection.queue(&kv, &std::mem::take(&mut job.value)).is_err() {
            job.reply(Err(KvFailure::Failed(errors::TOO_LARGE)));
            return Ok(());
        }
        ProcessState::set_flag(&self.process.asked);
        let timeout = self.process.request_timeout.min(MAX_KV_TIME);
        let deadline = job.arrived + timeout;
        loop {
            if let Err(wait_error) = self.wait(deadline) {
                let error = if matches!(wait_error, WaitError::Deadline) { errors::TIMEOUT } else { errors::BAD_GATEWAY };
                let why = self.describe_loss(&wait_error, timeout, "it answered");
                return self.fail_kv(job, error, &why);
            }
            let answer = self.connection.take().map(|frame| (frame.message(), frame.body));
            let what = match answer {
                Ok((Ok(Message::Pong(pong)), _)) if pong.id < id => continue,
                Ok((Ok(Message::Result(result)), body)) if result.id == id => match result.fault(job.op.name(), body.len()) {
                    Some(fault) => fault,
                    None => {
                        ProcessState::set_flag(&self.process.served);
                        job.reply(Ok((result, body.to_vec())));
                        return Ok(());
                    }
                },
                Ok((Ok(Message::Error(error)), _)) if error.id == id => {
                    ProcessState::set_flag(&self.process.served);
                    job.reply(Err(KvFailure::Refused(error)));
                    return Ok(());
                }
                Ok((Ok(other), _)) if other.id() == id => format!("expected result, got {}", other.kind()),
                Ok((Ok(other), _)) => format!("expected result with id {id}, got {} with id {}", other.kind(), other.id()),
                Ok((Err(malformed), _)) => malformed.to_string(),
                Err(error) => error.to_string(),
            };
            return self.fail_kv(job, errors::BAD_GATEWAY, &format!("protocol error: {what}"));
        }
    }

    /// Fails an operation.
    fn fail_kv(&self, job: KvJob, error: HttpError, why: &str) -> Outcome {
        self.plugin.note_failed(&format!("{}: {why}", job.name()));
        let failure = match error {
            errors::BAD_GATEWAY => KvFailure::Invalid(format!("{}: {why}", job.short_name())),
            error => KvFailure::Failed(error),
        };
        job.reply(Err(failure));
        Err(Broken)
    }

    /// Sends `ping`, and has the plugin restarted if it keeps silent.
    pub(crate) fn ping(&mut self) -> Outcome {
        let id = self.connection.next_id();
        self.connection.queue(&Ping { id }, &[]).map_err(|_| Broken)?;
        let deadline = Instant::now() + PING_TIME;
        loop {
            match self.wait(deadline) {
                Ok(()) => {}
                Err(WaitError::Deadline) => {
                    self.missed_pings += 1;
                    if self.missed_pings >= MAX_MISSED_PINGS {
                        self.plugin
                            .unresponsive(self.process.number, format!("it did not answer {MAX_MISSED_PINGS} pings in a row"));
                    }
                    return Ok(());
                }
                Err(WaitError::Interrupted | WaitError::Closed { within: false }) => return Err(Broken),
                Err(wait_error) => {
                    self.plugin.log.note(&self.describe_loss(&wait_error, PING_TIME, "it answered a ping"));
                    return Err(Broken);
                }
            }
            let what = match self.connection.take().map(|frame| frame.message()) {
                Ok(Ok(Message::Pong(pong))) if pong.id == id => {
                    self.missed_pings = 0;
                    return Ok(());
                }
                Ok(Ok(Message::Pong(pong))) if pong.id < id => continue,
                // The plugin responds, even if with an error.
                Ok(Ok(Message::Error(error))) if error.id == id => {
                    self.missed_pings = 0;
                    self.plugin.log.note(&format!("the plugin answered a ping with the error {}: {}", error.code, error.message));
                    return Ok(());
                }
                Ok(Ok(other)) => format!("{} came where a pong with id {id} was due", other.named()),
                Ok(Err(malformed)) => format!("{malformed}, where a pong with id {id} was due"),
                Err(error) => error.to_string(),
            };
            self.plugin.log.note(&format!("protocol error: {what}"));
            return Err(Broken);
        }
    }

    /// Sends `shutdown` on this connection, and keeps it open until the plugin closes it.
    pub(crate) fn shut_down(mut self) {
        self.unaccepted = None;
        let (process, accepted) = (&self.process, Instant::now() + ACCEPT_TIME);
        let all_accepted = || process.unaccepted.load(Ordering::SeqCst) == 0 || process.ended.load(Ordering::Relaxed);
        if !all_accepted() {
            // A frame here is a late pong; the end of the connection shows again below.
            drop(self.connection.wait(accepted, all_accepted));
        }
        let id = self.connection.next_id();
        if self.process.ended.load(Ordering::Relaxed) || self.connection.queue(&Shutdown { id }, &[]).is_err() {
            return;
        }
        // The supervisor kills the process in time, which ends this wait.
        let deadline = Instant::now() + STREAM_IDLE;
        let ended = || self.process.ended.load(Ordering::Relaxed);
        while self.connection.wait(deadline, ended).is_ok() && self.connection.take().is_ok() {}
    }

    /// Waits for a frame; meanwhile expires queued requests.
    fn wait(&mut self, deadline: Instant) -> Result<(), WaitError> {
        self.connection.wait(deadline, || self.stalling.stall())
    }
}
