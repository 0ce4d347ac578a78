//! Requests and their answers on a worker's connection.

use super::pace::Pace;
use super::stalling::CLIENT_TICK;
use super::{Broken, Outcome, STREAM_IDLE, Worker};
use crate::apps::manifest::Kind;
use crate::http::request::{BodyLength, Loss, RequestBody};
use crate::http::response_channel::{OtherProtocol, PIECE};
use crate::http::{HttpError, Request, WaitingRequest, errors};
use crate::plugins::connection::{Answer, Piece, PluginConnection, Received, Sent, WaitError};
use crate::plugins::job::Job;
use crate::plugins::process_state::ProcessState;
use crate::plugins::scaling::QUICK;
use crate::protocol::message::MAX_INLINE_BODY;
use std::cell::OnceCell;
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Most requests that are pipelined.
const MAX_DEPTH: usize = 32;

/// Requests that are sent as connections become free, before the worker looks up for whatever else it has to do.
const MAX_SENT: usize = 256;

/// Time after which requests without an answer hold up others, for which another worker is then asked.
const SLOW: Duration = Duration::from_millis(10);

/// Bytes of pipelined requests after which no more are added: less than a socket's buffer holds, so that the write never waits for a
/// plugin that itself waits to be read.
const MAX_BATCH: usize = 64 * 1024;

/// Time after which a long answer counts as a stream even if it is no event stream, so that requests do not wait for its end.
pub(super) const LONG_STREAM: Duration = Duration::from_secs(15);

/// Time for the exit of the process to become known after its connection was lost. If it takes longer, as under load, only the message is
/// less exact: the request is marked with its process, and no other process gets it.
pub(super) const SETTLE_TIME: Duration = Duration::from_millis(250);

impl<C: PluginConnection> Worker<C> {
    /// Sends a request, with other queued ones if they can be pipelined, and passes the answers on to their clients.
    pub(super) fn serve_requests(&mut self, mut first: Request) -> Outcome {
        let begun = Instant::now();
        let timeout = self.process.request_timeout;
        let mut outstanding = VecDeque::with_capacity(1);
        let (mut given, mut is_batch) = (None, false);
        ProcessState::set_flag(&self.process.asked);
        self.connection.keep_idle(self.share() - 1);
        if !first.is_safe() {
            self.plugin.scaling.note_blocking();
        }
        if first.upgrade && self.process.kind() != Kind::Http {
            self.plugin.note_upgrade();
        }
        if first.length == BodyLength::Known(0) {
            is_batch = C::PIPELINES && first.is_safe() && !first.alone && !first.upgrade;
            self.send(first, Vec::new(), &mut outstanding);
            if is_batch {
                self.send_more(begun, &mut outstanding);
            }
        } else {
            match first.take_whole_body(MAX_INLINE_BODY) {
                Some(body) => self.send(first, body, &mut outstanding),
                None => outstanding.extend(self.upload(first)?),
            }
            // The client may be slow to send the body, so the plugin's time limit starts after it.
            given = Some(Instant::now() + timeout);
        }
        let mut sent = outstanding.len();
        while let Some((id, request)) = self.take_due(&mut outstanding) {
            let deadline = given.unwrap_or(request.arrived + timeout);
            let taken = Instant::now();
            if self.answer(id, request, deadline, &mut outstanding).is_err()
                && (self.process.ended.load(Ordering::Relaxed)
                    // Others may be lost too, and each would take as long.
                    || taken.elapsed() >= CLIENT_TICK
                    || !self.connection.drop_current())
            {
                self.requeue(outstanding);
                if C::ON_DEMAND {
                    // An application may close its connection after each response.
                    self.pace.measure(&self.plugin, begun.elapsed(), sent);
                }
                return Err(Broken);
            }
            // Once the worker would have to wait.
            let is_free = self.next_job.is_none() && !outstanding.is_empty() && !self.connection.has_another();
            if !C::HAS_IDS && is_batch && is_free && sent < MAX_SENT {
                sent += self.send_more(Instant::now(), &mut outstanding);
            }
        }
        self.last_answer = Instant::now();
        self.pace.measure(&self.plugin, self.last_answer.duration_since(begun), sent);
        Ok(())
    }

    /// Sends further requests of the queue, if they can be pipelined, and returns their number.
    fn send_more(&mut self, now: Instant, outstanding: &mut VecDeque<(u64, Request)>) -> usize {
        let (before, depth) = (outstanding.len(), self.depth(outstanding.len()));
        while outstanding.len() < depth && self.connection.queued() < MAX_BATCH && self.connection.make_room() {
            match self.plugin.queue.try_take() {
                Some(Job::Http(waiting)) => {
                    let Some(request) = waiting.take(now) else { continue };
                    if request.is_safe() && !request.alone && !request.upgrade {
                        self.send(request, Vec::new(), outstanding);
                    } else {
                        self.next_job = WaitingRequest::new(request).map(Job::Http);
                        break;
                    }
                }
                Some(job) => {
                    self.next_job = Some(job);
                    break;
                }
                None => break,
            }
        }
        outstanding.len() - before
    }

    /// The number of requests to have under way, given those that are.
    fn depth(&self, under_way: usize) -> usize {
        match self.pace.get() {
            Some(pace) if pace < QUICK => {
                let each = self.plugin.queue.len() / self.workers();
                (under_way + each).min(if C::HAS_IDS { MAX_DEPTH } else { MAX_DEPTH.min(self.share()) })
            }
            _ => 1,
        }
    }

    fn workers(&self) -> usize {
        self.plugin.scaling.connections.load(Ordering::Relaxed).max(1)
    }

    /// Most connections of this worker, where each request takes one of its own: those of all workers are no more than the plugin may have.
    fn share(&self) -> usize {
        (self.plugin.metadata.concurrency as usize / self.workers()).max(1)
    }

    /// Takes the request whose answer is dealt with next: the first to which one has come, where each has a connection of its own. Meanwhile
    /// drops those whose client has gone, and fails those whose time is over.
    fn take_due(&mut self, outstanding: &mut VecDeque<(u64, Request)>) -> Option<(u64, Request)> {
        let timeout = self.process.request_timeout;
        let mut time = SLOW;
        while outstanding.len() > 1 {
            if let Some(at) = self.connection.bring_forward(time) {
                return outstanding.remove(at);
            }
            time = CLIENT_TICK;
            if self.stalling.stall() {
                break;
            }
            let is_over =
                |(_, request): &(u64, Request)| request.responder.is_cancelled() || request.arrived.elapsed() >= timeout;
            while outstanding.len() > 1
                && let Some(at) = outstanding.iter().position(is_over)
            {
                self.connection.bring(at);
                if let Some((_, request)) = outstanding.remove(at)
                    && !request.responder.is_cancelled()
                {
                    let why = self.describe_loss(&WaitError::Deadline, timeout, "its answer began");
                    self.fail(request, errors::TIMEOUT, &why, Ok(())).ok();
                }
                // The end of its connection tells the application that nobody waits for the answer.
                self.connection.drop_current();
            }
        }
        outstanding.pop_front()
    }

    /// Re-queues the requests behind one whose answer takes long, where each has a connection of its own.
    fn let_go(&mut self, behind: &mut VecDeque<(u64, Request)>) {
        if !C::HAS_IDS && !behind.is_empty() {
            self.connection.drop_behind();
            self.requeue(std::mem::take(behind));
            self.plugin.ask_to_grow();
        }
    }

    /// Appends a request with its whole body to the send buffer.
    fn send(&mut self, request: Request, body: Vec<u8>, outstanding: &mut VecDeque<(u64, Request)>) {
        let id = self.connection.next_id();
        match self.connection.queue_request(&request, id, false, body) {
            Ok(()) => outstanding.push_back((id, request)),
            // The only possible cause is a head that does not fit into a frame.
            Err(_) => request.fail(errors::HEAD_TOO_LARGE),
        }
    }

    /// Sends a request with its body, until the plugin answers. None if the client was answered already, or has gone.
    fn upload(&mut self, mut request: Request) -> Result<Option<(u64, Request)>, Broken> {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(MAX_INLINE_BODY, 0);
        let is_streamed = matches!(request.body, RequestBody::Stream(_));
        let mut length = 0;
        let mut ended = false;
        // A complete body fills the first frame; of a streamed one, the plugin gets the first bytes at once.
        while length < buffer.len() && !ended && !(is_streamed && length > 0) {
            match request.read_body(&mut buffer[length..], CLIENT_TICK) {
                Ok(n) => {
                    length += n;
                    ended = n == 0 || request.length == BodyLength::Known(length as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.stalling.stall();
                    if request.responder.is_cancelled() {
                        return Ok(None);
                    }
                    if self.process.ended.load(Ordering::Relaxed) {
                        self.requeue_one(request);
                        return Err(Broken);
                    }
                }
                Err(_) => {
                    request.fail(errors::BAD_BODY);
                    return Ok(None);
                }
            }
        }
        let id = self.connection.next_id();
        if self.connection.queue_request(&request, id, !ended, buffer[..length].to_vec()).is_err() {
            request.fail(errors::HEAD_TOO_LARGE);
            return Ok(None);
        }
        let mut total = length as u64;
        if !ended {
            // Both the client and the plugin may be slow.
            self.stalling.stall();
        }
        while !ended {
            let interrupted = || self.process.ended.load(Ordering::Relaxed) || request.responder.is_cancelled();
            let sent = match self.connection.flush(Instant::now() + STREAM_IDLE, interrupted) {
                Ok(sent) => sent,
                Err(_) if request.responder.is_cancelled() => return Err(Broken),
                Err(wait_error) => {
                    let why = self.describe_loss(&wait_error, STREAM_IDLE, "it had taken the body");
                    return self.fail(request, errors::BAD_GATEWAY, &why, Err(Broken));
                }
            };
            if sent == Sent::Answered || self.connection.has_answer() {
                if let Some(head) = self.connection.take_interim() {
                    if !head.is_empty() {
                        request.responder.interim(head);
                    }
                    continue;
                }
                let rest = if let RequestBody::Whole(body) = &mut request.body { body.take() } else { None };
                if !rest.is_some_and(|rest| self.connection.send_aside(rest)) {
                    // The plugin answers early and gets no more of the body. The rest of the send buffer is sent while the answer arrives.
                    self.connection.abort_body(id).map_err(|_| Broken)?;
                }
                break;
            }
            match request.read_body(&mut buffer, CLIENT_TICK) {
                Ok(n) => {
                    total += n as u64;
                    ended = n == 0 || request.length == BodyLength::Known(total);
                    self.connection.queue_piece(id, &buffer[..n], !ended).map_err(|_| Broken)?;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.stalling.stall();
                }
                Err(_) => {
                    // The end of its connection tells the plugin that the rest of the body will not come.
                    request.fail(errors::BAD_BODY);
                    return Err(Broken);
                }
            }
        }
        self.buffer = buffer;
        Ok(Some((id, request)))
    }

    /// Waits for the answer to a request and passes it on to its client. The requests `behind` it are outstanding too; if they would have
    /// to wait for long, they are re-queued.
    fn answer(&mut self, id: u64, mut request: Request, deadline: Instant, behind: &mut VecDeque<(u64, Request)>) -> Outcome {
        let mut alone = true;
        let events = loop {
            match self.wait_answer(&request, deadline, !behind.is_empty()) {
                Ok(()) => {}
                // The end of its connection tells the plugin that nobody waits for the answer.
                Err(_) if (behind.is_empty() || !C::HAS_IDS) && request.responder.is_cancelled() => return Err(Broken),
                Err(WaitError::Interrupted) if !behind.is_empty() && !self.process.ended.load(Ordering::Relaxed) => {
                    // Another connection may serve them long before. This one is closed afterwards, if their first answers may still
                    // arrive on it.
                    alone &= self.connection.drop_behind();
                    self.requeue(std::mem::take(behind));
                    self.plugin.ask_to_grow();
                    continue;
                }
                Err(WaitError::Deadline) => {
                    let why = self.describe_loss(&WaitError::Deadline, self.process.request_timeout, "its answer began");
                    return self.fail(request, errors::TIMEOUT, &why, Err(Broken));
                }
                Err(wait_error) => return self.connection_lost(request, &wait_error),
            }
            let followed = behind.is_empty() && self.connection.is_followed();
            match self.connection.take_answer(&request, id) {
                Ok(Received::Answer(Answer { head, first, rest, more, events })) => {
                    ProcessState::set_flag(&self.process.served);
                    if let Some(loss) = request.loss.take() {
                        let name = request.name();
                        self.plugin.log.note(&format!("{name}: {}; it was sent once more, and answered", loss.why));
                    }
                    let begun = request.responder.answer(head, first, rest, more);
                    let delivered = self.pass_rest(&mut request, rest, !more, begun, behind)?;
                    if more {
                        delivered.map_err(|_| Broken)?;
                        break events;
                    }
                    // If the client has gone, the connection is still usable.
                    delivered.ok();
                    let followed = followed || (!C::HAS_IDS && self.connection.holds_bytes());
                    let quiet = !followed || self.is_quiet(&format!("behind the answer to {}", request.name()));
                    return if alone && quiet && self.connection.finish() { Ok(()) } else { Err(Broken) };
                }
                Ok(Received::Interim(head)) => request.responder.interim(head),
                Ok(Received::Upgraded(mut bytes)) => {
                    ProcessState::set_flag(&self.process.served);
                    if let Some((stream, early)) = self.connection.take_stream() {
                        bytes.extend_from_slice(&early);
                        request.responder.upgrade(bytes, OtherProtocol::Tunnel(stream));
                    }
                    return Err(Broken);
                }
                Ok(Received::Nothing) => {}
                Ok(Received::Refused { why, whole }) => {
                    ProcessState::set_flag(&self.process.served);
                    return self.bad_response(request, &why, whole);
                }
                Ok(Received::Error(reason)) => {
                    ProcessState::set_flag(&self.process.served);
                    return self.fail(request, errors::BAD_GATEWAY, &reason, Ok(()));
                }
                Ok(Received::Late(what)) if Instant::now() < deadline => {
                    if std::mem::take(&mut alone) {
                        let name = request.name();
                        let why = "an earlier request was answered twice";
                        self.plugin
                            .log
                            .note(&format!("protocol error: before the answer to {name} (id {id}) {what} came: {why}"));
                    }
                }
                Ok(Received::Late(what)) => {
                    let why = format!("protocol error: {what} came where the response with id {id} was due");
                    return self.lose(request, why);
                }
                Ok(Received::Unexpected { why, ours: true }) => {
                    return self.fail(request, errors::BAD_GATEWAY, &why, Err(Broken));
                }
                // It may belong to an earlier request, so this one is not to blame.
                Ok(Received::Unexpected { why, ours: false }) => return self.lose(request, why),
                Err(error) => return self.connection_lost(request, &error),
            }
        };
        let relayed = self.relay(&mut request, id, events, behind);
        // After a stream with requests behind it, late answers to them may arrive, so the connection is replaced.
        if alone && (behind.is_empty() || !C::HAS_IDS) && self.connection.finish() { relayed } else { Err(Broken) }
    }

    /// The connection was lost before the answer to a request began.
    fn connection_lost(&mut self, request: Request, wait_error: &WaitError) -> Outcome {
        if request.is_safe() && self.unaccepted.is_none() && self.connection.is_unsent() {
            // The plugin had already closed the connection, so it has not read the request.
            self.requeue_one(request);
            return Err(Broken);
        }
        let why = self.describe_loss(wait_error, self.process.request_timeout, "it answered");
        if self.process.ended.load(Ordering::Relaxed) {
            return self.fail(request, errors::BAD_GATEWAY, &why, Err(Broken));
        }
        self.lose(request, why)
    }

    /// Re-queues a safe request whose connection is lost, once, for the same process; fails any other.
    fn lose(&self, mut request: Request, why: String) -> Outcome {
        if !request.is_safe() || !self.connection.may_resend() {
            return self.fail(request, errors::BAD_GATEWAY, &why, Err(Broken));
        }
        if request.loss.is_some() {
            return self.fail(request, errors::BAD_GATEWAY, &format!("{why}; it was sent twice"), Err(Broken));
        }
        request.alone = true;
        request.loss = Some(Box::new(Loss { process: self.process.number, why }));
        self.requeue_one(request);
        Err(Broken)
    }

    /// Describes how a connection was lost before the plugin did something within `time`. If the process may have ended, waits a moment
    /// for its exit.
    pub(super) fn describe_loss(&self, wait_error: &WaitError, time: Duration, before: &str) -> String {
        let what = match wait_error {
            WaitError::Deadline => {
                let waited = format!("{} s passed before {before}", time.as_secs_f32());
                return match self.connection.unfinished() {
                    Some(unfinished) => format!("{waited}: {unfinished}"),
                    None => waited,
                };
            }
            WaitError::Invalid(_) => return wait_error.to_string(),
            wait_error if self.process.has_process() && self.process.ends_within(SETTLE_TIME) => match self.process.exit.get() {
                Some(exit) => return format!("the process ended before {before}: {exit}"),
                None => format!("the process ended ({wait_error})"),
            },
            wait_error => wait_error.to_string(),
        };
        format!("{what} before {before}")
    }

    /// Passes on the rest of a large frame; the `last` frame ends the answer. Reads all of it even if the client has gone, so that the
    /// connection stays usable. Returns whether everything was `delivered`.
    fn pass_rest(
        &mut self,
        request: &mut Request,
        rest: usize,
        last: bool,
        delivered: io::Result<()>,
        behind: &mut VecDeque<(u64, Request)>,
    ) -> Result<io::Result<()>, Broken> {
        if rest > 0 {
            self.plugin.scaling.note_blocking();
        }
        let (mut left, mut delivered, until) = (rest, delivered, Instant::now() + CLIENT_TICK);
        while left > 0 {
            if !C::HAS_IDS && !behind.is_empty() && (Instant::now() >= until || !request.responder.has_room_within(CLIENT_TICK)) {
                self.let_go(behind);
            }
            let mut buffer = request.responder.buffer();
            let waits = !C::HAS_IDS && !behind.is_empty();
            let is_long = || waits && Instant::now() >= until;
            let interrupted = || self.stalling.stall() || is_long() || request.responder.is_cancelled();
            let n = match self.connection.read_rest(&mut buffer, Instant::now() + STREAM_IDLE, interrupted) {
                Ok(n) => n,
                Err(_) if request.responder.is_cancelled() => return Err(Broken),
                Err(WaitError::Interrupted) if is_long() && !self.process.ended.load(Ordering::Relaxed) => {
                    self.let_go(behind);
                    continue;
                }
                Err(wait_error) => return self.cut_lost(request, &wait_error).map(Ok),
            };
            left -= n;
            self.stalling.wait_for_client(request);
            delivered = delivered.and_then(|()| request.responder.filled(buffer, n, last && left == 0));
        }
        Ok(delivered)
    }

    /// Passes on the rest of an answer that streams.
    fn relay(&mut self, request: &mut Request, id: u64, events: bool, behind: &mut VecDeque<(u64, Request)>) -> Outcome {
        self.pace = Pace::default();
        let begun = Instant::now();
        // An event stream does not end. Other streams usually do, so requests wait for them at first.
        let (plugin, counted) = (Arc::clone(&self.plugin), OnceCell::new());
        let count = || {
            if events || begun.elapsed() >= LONG_STREAM {
                counted.get_or_init(|| plugin.count_stream());
            }
        };
        count();
        self.stalling.stall();
        let process = Arc::clone(&self.process);
        let ending = || events && process.stopping.load(Ordering::Relaxed);
        loop {
            if !C::HAS_IDS
                && !behind.is_empty()
                && (events || begun.elapsed() >= CLIENT_TICK || !request.responder.has_room_within(CLIENT_TICK))
            {
                self.let_go(behind);
            }
            let waits = !C::HAS_IDS && !behind.is_empty();
            let is_long = || waits && begun.elapsed() >= CLIENT_TICK;
            let interrupted = || {
                count();
                self.stalling.stall() || ending() || is_long() || request.responder.is_cancelled()
            };
            let waited = self.connection.wait_piece(Instant::now() + STREAM_IDLE, interrupted);
            if request.responder.is_cancelled() {
                // The end of its connection tells the plugin that the client has gone.
                return Err(Broken);
            }
            if ending() {
                // Event streams may end at any time, so this is not an error.
                request.responder.piece(&[], true).ok();
                return Err(Broken);
            }
            match waited {
                Ok(()) => {}
                Err(WaitError::Interrupted) if is_long() && !self.process.ended.load(Ordering::Relaxed) => {
                    self.let_go(behind);
                    continue;
                }
                Err(wait_error) => return self.cut_lost(request, &wait_error),
            }
            let (mut rest, more) = match self.connection.take_piece(id) {
                Ok(Piece::Data { bytes, more }) => (bytes, more),
                Ok(Piece::Aborted(why)) => {
                    self.cut_off(request, &why);
                    return Ok(());
                }
                Ok(Piece::Broken(why)) => return self.cut(request, &why),
                Err(error) => return self.cut_lost(request, &error),
            };
            loop {
                let (piece, behind) = rest.split_at(rest.len().min(PIECE));
                self.stalling.wait_for_client(request);
                if request.responder.piece(piece, !more && behind.is_empty()).is_err() {
                    return if more { Err(Broken) } else { Ok(()) };
                }
                rest = behind;
                if rest.is_empty() {
                    break;
                }
            }
            if !more {
                return Ok(());
            }
        }
    }

    /// Aborts an answer that has begun, so that its client does not take it for complete.
    fn cut_off(&self, request: &mut Request, why: &str) {
        request.responder.cut();
        self.plugin.note_failed(&format!("{}: the answer was cut short: {why}", request.name()));
    }

    /// Aborts an answer after which the connection is not usable.
    fn cut(&self, request: &mut Request, why: &str) -> Outcome {
        self.cut_off(request, why);
        Err(Broken)
    }

    /// Aborts an answer whose connection was lost. Tells the client first, because the exit of the process may take a moment to be known.
    fn cut_lost(&self, request: &mut Request, wait_error: &WaitError) -> Outcome {
        request.responder.cut();
        self.cut(request, &self.describe_loss(wait_error, STREAM_IDLE, "its end"))
    }

    /// Answers 502 in place of an invalid answer.
    fn bad_response(&self, request: Request, why: &str, whole: bool) -> Outcome {
        let outcome = if whole { Ok(()) } else { Err(Broken) };
        self.fail(request, errors::BAD_GATEWAY, &format!("the answer was refused: {why}"), outcome)
    }

    /// Fails a request. Writes the line in the plugin's log first, so that it is there when the client has the answer.
    pub(super) fn fail<T>(&self, request: Request, error: HttpError, why: &str, outcome: Result<T, Broken>) -> Result<T, Broken> {
        self.plugin.note_failed(&format!("{}: {why}", request.name()));
        request.fail(error);
        outcome
    }

    /// Waits for the beginning of the answer to a request. Is interrupted if its client goes, and after one tick if other requests
    /// `followed` it.
    fn wait_answer(&mut self, request: &Request, deadline: Instant, followed: bool) -> Result<(), WaitError> {
        let interrupted = || self.stalling.stall() || followed || request.responder.is_cancelled();
        self.connection.wait_answer(deadline, interrupted)
    }

    /// Re-queues requests that get no answer on this connection; they are not pipelined again. If the process may have ended,
    /// [`Worker::describe_loss`] has waited for its exit before.
    fn requeue(&self, waited: VecDeque<(u64, Request)>) {
        for (_, mut request) in waited {
            request.alone = true;
            self.requeue_one(request);
        }
    }

    fn requeue_one(&self, request: Request) {
        if let Some(waiting) = WaitingRequest::new(request) {
            self.plugin.requeue(Job::Http(waiting));
        }
    }
}
