//! A connection to an application, by HTTP/1.1.
//!
//! It is opened for a request and not in advance: an application that serves one connection at a time would wait on an idle one.

use super::{Answer, Piece, PluginConnection, Received, Sent, TICK, WaitError};
use crate::apps::endpoint::Endpoint;
use crate::apps::http_connection::{Head, HttpConnection, Stopped, poll_all};
use crate::apps::manifest::Prefix;
use crate::http::Request;
use crate::http::body::Body;
use crate::http::prefix::Mount;
use crate::plugins::job::KvJob;
use crate::plugins::process_state::ProcessState;
use crate::plugins::worker::{Outcome, Worker};
use crate::protocol::frame::EncodeError;
use rustix::event::PollFlags;
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// Age of the last request from which on a kept connection is replaced. Applications close idle ones, the most hasty after two seconds
/// (gunicorn), and a request that cannot be repeated would be lost if it came at that moment.
const REPLACE_AFTER: Duration = Duration::from_secs(1);

/// Connections to an application. Each carries one request at a time, so that no application has to understand pipelining, and a worker
/// that sends several requests at once uses one for each. Their answers are taken in the order in which they come.
pub(crate) struct ApplicationConnection {
    /// The one whose answer is taken next, or on which the next request is sent.
    current: Lane,
    /// The others with a request, in the order of their requests.
    behind: VecDeque<Lane>,
    /// Those without a request. The last is used first.
    idle: Vec<Lane>,
    /// Those of them that were found quiet and open a moment ago.
    quiet: Vec<Lane>,
    /// Number of requests under way.
    under_way: usize,
    /// Where further ones are opened.
    endpoint: Endpoint,
    uid: Option<u32>,
    keeps_route: bool,
    next_id: u64,
    /// Whether references in responses are mapped to the route.
    maps: bool,
}

/// One of the connections.
struct Lane {
    http: HttpConnection,
    /// When its last request was sent.
    asked: Instant,
    /// Whether something has arrived on it.
    ready: bool,
}

impl Lane {
    fn of(http: HttpConnection) -> Self {
        Self { http, asked: Instant::now(), ready: false }
    }
}

impl ApplicationConnection {
    fn keeps_route(process: &ProcessState) -> bool {
        process.run().is_some_and(|run| run.prefix == Prefix::Keep)
    }

    fn over(http: HttpConnection, process: &ProcessState) -> Self {
        Self {
            current: Lane::of(http),
            behind: VecDeque::new(),
            idle: Vec::new(),
            quiet: Vec::new(),
            under_way: 0,
            endpoint: process.endpoint().clone(),
            uid: process.listener_uid(),
            keeps_route: Self::keeps_route(process),
            next_id: 0,
            maps: process.rewrites,
        }
    }

    /// Takes an idle connection that is quiet and open. All of them are looked at in one system call.
    fn take_idle(&mut self) -> Option<Lane> {
        if self.quiet.is_empty() && !self.idle.is_empty() {
            self.doubt_idle();
            self.idle.retain(|lane| !lane.http.holds_bytes());
            let idle: Vec<_> = self.idle.iter().map(|lane| &lane.http).collect();
            let mut ready = poll_all(&idle, Duration::ZERO).into_iter();
            self.idle.retain(|_| ready.next() == Some(false));
            self.quiet.append(&mut self.idle);
        }
        self.quiet.pop()
    }

    /// Has idle connections looked at once more before they are used, and closes those that are too old to be used.
    fn doubt_idle(&mut self) {
        self.idle.append(&mut self.quiet);
        if !self.idle.is_empty() {
            let now = Instant::now();
            self.idle.retain(|lane| now.duration_since(lane.asked) < REPLACE_AFTER);
        }
    }

    /// The connections with requests under way.
    fn lanes(&mut self) -> impl Iterator<Item = &mut Lane> {
        std::iter::once(&mut self.current).chain(&mut self.behind)
    }
}

impl From<Stopped> for WaitError {
    fn from(stopped: Stopped) -> Self {
        match stopped {
            Stopped::Deadline => Self::Deadline,
            Stopped::Interrupted => Self::Interrupted,
            Stopped::Lost(error) => Self::Lost(error),
        }
    }
}

impl PluginConnection for ApplicationConnection {
    const PIPELINES: bool = true;
    const ON_DEMAND: bool = true;
    const HAS_IDS: bool = false;

    fn prepare(process: &ProcessState) -> io::Result<Self> {
        Ok(Self::over(HttpConnection::closed(Self::keeps_route(process)), process))
    }

    fn connect(process: &ProcessState) -> io::Result<Self> {
        let http = HttpConnection::open(process.endpoint(), process.listener_uid(), Self::keeps_route(process))?;
        Ok(Self::over(http, process))
    }

    fn is_open(&self) -> bool {
        self.current.http.is_open()
    }

    fn close(&mut self) {
        self.current.http.close();
        self.behind.clear();
        self.idle.clear();
        self.quiet.clear();
        self.under_way = 0;
    }

    fn make_room(&mut self) -> bool {
        if self.under_way == 0 {
            return true;
        }
        let next = self.take_idle().or_else(|| {
            let opened = HttpConnection::open(&self.endpoint, self.uid, self.keeps_route);
            opened.ok().map(Lane::of)
        });
        next.map(|next| self.quiet.push(next)).is_some()
    }

    fn keep_idle(&mut self, most: usize) {
        let surplus = self.idle.len().saturating_sub(most);
        self.idle.drain(..surplus);
    }

    fn bring_forward(&mut self, time: Duration) -> Option<usize> {
        if self.behind.is_empty() {
            return Some(0);
        }
        if !self.lanes().any(|lane| lane.ready) {
            let lanes: Vec<_> = std::iter::once(&self.current).chain(&self.behind).map(|lane| &lane.http).collect();
            let ready = poll_all(&lanes, time);
            self.lanes().zip(ready).for_each(|(lane, ready)| lane.ready = ready);
        }
        let at = self.lanes().position(|lane| lane.ready)?;
        self.bring(at);
        Some(at)
    }

    fn has_another(&self) -> bool {
        self.current.ready || self.behind.iter().any(|lane| lane.ready)
    }

    fn bring(&mut self, at: usize) {
        if let Some(chosen) = at.checked_sub(1).and_then(|at| self.behind.remove(at)) {
            let first = std::mem::replace(&mut self.current, chosen);
            self.behind.push_front(first);
        }
    }

    fn drop_behind(&mut self) -> bool {
        self.under_way -= self.behind.len();
        self.behind.clear();
        true
    }

    fn drop_current(&mut self) -> bool {
        let Some(next) = self.behind.pop_front() else { return false };
        self.current = next;
        self.under_way -= 1;
        self.doubt_idle();
        true
    }

    fn next_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn queue_request(&mut self, request: &Request, _id: u64, more: bool, body: Vec<u8>) -> Result<(), EncodeError> {
        let is_whole = !more && body.is_empty();
        self.under_way += 1;
        if self.under_way > 1 {
            self.behind.extend(self.quiet.pop());
        }
        let lane = self.behind.back_mut().unwrap_or(&mut self.current);
        (lane.asked, lane.ready) = (Instant::now(), false);
        lane.http.queue_request(request, more, body);
        if is_whole {
            // If this fails, so does the wait for the answer.
            lane.http.send_some().ok();
        }
        Ok(())
    }

    fn queue_piece(&mut self, _id: u64, piece: &[u8], more: bool) -> Result<(), EncodeError> {
        self.current.http.queue_piece(piece, more);
        Ok(())
    }

    fn abort_body(&mut self, _id: u64) -> Result<(), EncodeError> {
        self.current.http.abort_body();
        Ok(())
    }

    fn queued(&mut self) -> usize {
        self.current.http.unsent()
    }

    fn flush(&mut self, deadline: Instant, interrupted: impl Fn() -> bool) -> Result<Sent, WaitError> {
        loop {
            match self.current.http.send_some() {
                Ok(true) => return Ok(Sent::All),
                Ok(false) => {}
                // The application may have answered before it stopped reading.
                Err(_) if self.current.http.has_input() => return Ok(Sent::Answered),
                Err(error) => return Err(WaitError::Lost(error)),
            }
            if interrupted() {
                return Err(WaitError::Interrupted);
            }
            let left = deadline.checked_duration_since(Instant::now()).ok_or(WaitError::Deadline)?;
            let ready = self.current.http.poll(PollFlags::IN | PollFlags::OUT, left.min(TICK));
            if ready.contains(PollFlags::IN) && self.has_answer() {
                return Ok(Sent::Answered);
            }
        }
    }

    fn is_unsent(&mut self) -> bool {
        self.current.http.is_unsent()
    }

    /// A part of a head is no answer yet, so that the rest of the request's body is sent until it is complete.
    fn has_answer(&mut self) -> bool {
        let is_lost = self.current.http.has_input() && !self.current.http.has_head() && self.current.http.read_now().is_err();
        is_lost || self.current.http.has_ended() || self.current.http.has_head() && self.current.http.has_input()
    }

    fn send_aside(&mut self, body: Body) -> bool {
        self.current.http.send_aside(body)
    }

    fn take_interim(&mut self) -> Option<Vec<u8>> {
        self.current.http.take_interim()
    }

    fn is_followed(&self) -> bool {
        false
    }

    fn holds_bytes(&self) -> bool {
        self.current.http.holds_bytes()
    }

    fn check_quiet(&mut self, place: &str) -> Result<(), Option<String>> {
        if self.next_id == 0 {
            return Ok(());
        }
        if self.current.asked.elapsed() >= REPLACE_AFTER && !self.current.http.holds_bytes() {
            return Err(None);
        }
        if !self.current.http.holds_bytes() {
            match self.current.http.read_now() {
                Ok(false) => return Ok(()),
                Ok(true) if self.current.http.holds_bytes() => {}
                Ok(true) | Err(_) => return Err(None),
            }
        }
        let (bytes, excerpt) = self.current.http.excerpt();
        Err(Some(format!("{bytes} bytes came {place}, where nothing was due, and begin with \"{excerpt}\"")))
    }

    fn unfinished(&self) -> Option<String> {
        let (bytes, excerpt) = self.current.http.excerpt();
        (bytes > 0).then(|| format!("the head of its response has no end after {bytes} bytes, and begins with \"{excerpt}\""))
    }

    fn may_resend(&self) -> bool {
        self.current.http.was_kept()
    }

    fn wait_answer(&mut self, deadline: Instant, interrupted: impl Fn() -> bool) -> Result<(), WaitError> {
        Ok(self.current.http.wait_head(deadline, interrupted)?)
    }

    fn take_answer(&mut self, request: &Request, _id: u64) -> Result<Received<'_>, WaitError> {
        if self.current.http.has_ended() && !self.current.http.holds_bytes() {
            return Err(WaitError::Closed { within: false });
        }
        let mount = self.maps.then(|| Mount::of(request));
        let refused = |why: String| Ok(Received::Unexpected { why: format!("protocol error: {why}"), ours: true });
        let response = match self.current.http.take_head(mount, request.is_head()) {
            Ok(Head::Response(response)) => response,
            Ok(Head::Interim(head)) => return Ok(Received::Interim(head)),
            Ok(Head::Ignored) => return Ok(Received::Nothing),
            Ok(Head::Upgraded(head)) => return Ok(Received::Upgraded(head)),
            Err(why) => return refused(why),
        };
        match self.current.http.begin_body() {
            Ok((first, rest, more)) => {
                Ok(Received::Answer(Answer { head: response.head, first, rest, more, events: response.events }))
            }
            Err(why) => refused(why),
        }
    }

    fn read_rest(&mut self, buffer: &mut [u8], deadline: Instant, interrupted: impl Fn() -> bool) -> Result<usize, WaitError> {
        self.current.http.read_rest(buffer, deadline, interrupted)?.ok_or(WaitError::Closed { within: true })
    }

    fn wait_piece(&mut self, deadline: Instant, interrupted: impl Fn() -> bool) -> Result<(), WaitError> {
        Ok(self.current.http.wait_piece(deadline, interrupted)?)
    }

    fn take_piece(&mut self, _id: u64) -> Result<Piece<'_>, WaitError> {
        Ok(match self.current.http.take_piece() {
            Ok((bytes, more)) => Piece::Data { bytes, more },
            Err(why) => Piece::Broken(format!("protocol error: {why}")),
        })
    }

    fn finish(&mut self) -> bool {
        self.under_way = self.under_way.saturating_sub(1);
        let is_kept = self.current.http.is_kept();
        let next = match self.behind.pop_front() {
            None if is_kept => None,
            None => self.take_idle(),
            behind => behind,
        };
        self.doubt_idle();
        if let Some(next) = next {
            let ended = std::mem::replace(&mut self.current, next);
            self.idle.extend(is_kept.then_some(ended));
            return true;
        }
        is_kept
    }

    fn take_stream(&mut self) -> Option<(OwnedFd, Vec<u8>)> {
        self.current.http.take_stream()
    }

    fn release(&mut self) {
        self.idle.clear();
        self.quiet.clear();
        self.current.http.release();
    }

    fn operate(_worker: &mut Worker<Self>, job: KvJob) -> Outcome {
        job.refuse_unsupported();
        Ok(())
    }

    fn ping(worker: &mut Worker<Self>) -> Outcome {
        worker.close_if_ended();
        Ok(())
    }

    fn shut_down(_worker: Worker<Self>) {}
}
