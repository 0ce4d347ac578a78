//! A worker: a thread that owns one connection to a plugin. It takes requests from the plugin's queue, sends them, and hands
//! the answers to the clients as they come.
//!
//! Requests that are safe to repeat are sent several at a time while the plugin is quick, so that one write and one read serve
//! many. Everything else goes alone. When a connection is lost the worker opens another; when the plugin's process ends or is to
//! stop, so does the worker.
//!
//! **A lost request.** A request that was being answered when its process ended is answered 502 and never given to another process: it
//! may be what the process died of. Those that waited behind it are given back and go alone from then on, so that a second end shows
//! which one it was. Where only the connection was lost, a safe request is sent once more, to the same process.
//!
//! **The plugin's log** has one line for each request that the plugin failed: the request, what the plugin sent, and what the protocol expects.

use crate::exchange::{BodyLength, Failed, Job, KvFailure, KvJob, Loss, MAX_KV_TIME, WebJob};
use crate::gate::mailbox::PIECE;
use crate::link::{Link, Lost, RELEASE_AFTER, Sent};
use crate::plugin::{Plugin, QUICK};
use crate::protocol::frame::ReadError;
use crate::protocol::message::{Data, Http, Kv, MAX_INLINE_BODY, Message, Ping, Response, Shutdown};
use crate::restart::{Exit, Work};
use crossbeam_channel::{Receiver, RecvTimeoutError, select};
use std::cell::Cell;
use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Idle time after which the plugin is asked whether it is there.
const PING_AFTER: Duration = Duration::from_secs(15);

/// Time it has to say so.
const PING_TIME: Duration = Duration::from_secs(5);

/// Pings in a row without an answer after which the plugin is restarted.
const MAX_MISSES: u32 = 3;

/// Idle pings after which a connection beyond the first is closed.
const IDLE_PINGS: u32 = 4;

/// Most requests sent before their answers came.
const MAX_DEPTH: usize = 32;

/// How many of the last requests the average time of one is mostly made of.
const MEMORY: u32 = 16;

/// Bytes of requests after which no more are sent before answers came: less than a socket's buffer holds, so that the write
/// never waits for a plugin that is itself waiting to be read.
const MAX_BATCH: usize = 64 * 1024;

/// Time for a batch from which on it has kept others waiting: far more than a quick plugin takes, and than waking up does.
const LONG: Duration = Duration::from_millis(20);

/// Time without progress after which a streaming body, up or down, is given up.
const STREAM_IDLE: Duration = Duration::from_secs(60);

/// How often the plugin's other requests are looked after while a slow client is waited for.
const CLIENT_TICK: Duration = Duration::from_millis(100);

/// Time to open another connection after one was lost.
const RECONNECT_TIME: Duration = Duration::from_secs(5);

/// How long a connection that was lost may be the first sign of a process's end. A verdict that takes longer, as under load, costs only
/// words: the request is marked with its process, and no other gets it.
const SETTLE_TIME: Duration = Duration::from_millis(250);

/// The same for a request that was not sent: it only has to go to another connection.
const UNSENT_SETTLE_TIME: Duration = Duration::from_millis(100);

/// Idle time of a connection after which it is looked at before it is used, also for a safe request: a second answer to the request
/// before, or its end, has come by then. A busier connection is spared the system call, since ids tell such an answer apart.
const LOOK_AFTER: Duration = Duration::from_millis(10);

/// Late answers to pings that an idle connection may hold: more is a flood.
const MAX_LATE_PONGS: u32 = MAX_MISSES + 1;

/// How long the end of a connection is put off for the sake of new ones: time for a quick plugin to accept them.
const ACCEPT_TIME: Duration = Duration::from_secs(1);

/// Pause between attempts to connect.
const RECONNECT_PAUSE: Duration = Duration::from_millis(20);

/// The media type of a stream of events.
const EVENTS: &str = "text/event-stream";

/// The life of one process of a plugin, as its workers see it.
pub(crate) struct Life {
    /// Which process of the plugin, counted from 1.
    pub(crate) number: u64,
    /// Where it listens.
    pub(crate) socket: PathBuf,
    /// The user it runs as, where it has one of its own.
    pub(crate) uid: Option<u32>,
    /// Closes when the workers are to stop.
    pub(crate) stop: Receiver<()>,
    /// Closes as soon as the process has ended, by which time `exit` and `ended` are set.
    pub(crate) over: Receiver<()>,
    /// How the process ended, where the kernel said so.
    pub(crate) exit: OnceLock<Exit>,
    /// The process is to stop, or has ended.
    pub(crate) stopping: AtomicBool,
    /// The process has ended.
    pub(crate) ended: AtomicBool,
    /// The process was sent a request.
    pub(crate) asked: AtomicBool,
    /// The process has answered a request.
    pub(crate) served: AtomicBool,
    /// Connections the plugin may not have accepted yet.
    pub(crate) unproven: AtomicUsize,
    /// Time for an answer to begin.
    pub(crate) request_timeout: Duration,
}

impl Life {
    /// What the process has had to do so far.
    pub(crate) fn work(&self) -> Work {
        match (self.asked.load(Ordering::Relaxed), self.served.load(Ordering::Relaxed)) {
            (_, true) => Work::Served,
            (true, false) => Work::Asked,
            (false, false) => Work::None,
        }
    }

    /// Sets a flag that is nearly always set already.
    fn mark(flag: &AtomicBool) {
        if !flag.load(Ordering::Relaxed) {
            flag.store(true, Ordering::Relaxed);
        }
    }
}

/// A connection on which nothing has been answered yet. While there is one, the plugin is not told to end: it would, by what it
/// knows, have no connection left, and what was sent on this one would be lost.
struct Unproven(Arc<Life>);

impl Unproven {
    fn new(life: &Arc<Life>) -> Self {
        life.unproven.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(life))
    }
}

impl Drop for Unproven {
    fn drop(&mut self) {
        self.0.unproven.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What a worker's connection does next.
enum Next {
    Job(Job),
    Ping,
    Stop,
}

/// What there is to know of an answer that goes on in `data` frames.
struct Stream {
    id: u64,
    /// Bytes of its body, where it says so.
    declared: Option<u64>,
    /// Whether these are events. Their clients connect again by themselves, so it need not hold up a stop.
    events: bool,
}

/// Whether the connection may be used further.
type Outcome = Result<(), Broken>;

/// The connection may not be used further.
struct Broken;

/// A worker and its connection.
pub(crate) struct Worker {
    plugin: Arc<Plugin>,
    life: Arc<Life>,
    link: Link,
    unproven: Option<Unproven>,
    /// Average time the plugin needs for a request, none of which has been measured at first.
    pace: Option<Duration>,
    /// A request taken from the queue that has to go alone, after those before it.
    held: Option<Job>,
    /// Where bodies of requests are read to.
    buffer: Vec<u8>,
    /// Whether this connection is counted among the plugin's stalled ones.
    stalled: Cell<bool>,
    misses: u32,
    idle_pings: u32,
    /// When the last answer came.
    used: Instant,
    /// The first worker of a process stays for its whole life.
    first: bool,
}

impl Worker {
    /// A worker with a connection that is ready for requests.
    pub(crate) fn new(plugin: Arc<Plugin>, life: Arc<Life>, link: Link) -> Self {
        let stalled = Cell::new(false);
        Self {
            plugin,
            life,
            link,
            unproven: None,
            pace: None,
            held: None,
            buffer: Vec::new(),
            stalled,
            misses: 0,
            idle_pings: 0,
            used: Instant::now(),
            first: true,
        }
    }

    /// A further worker, which opens its connection itself.
    pub(crate) fn connect(plugin: Arc<Plugin>, life: Arc<Life>) -> Option<Self> {
        let unproven = Some(Unproven::new(&life));
        let link = connect(&plugin, &life)?;
        Some(Self { first: false, unproven, ..Self::new(plugin, life, link) })
    }

    /// Works until the process ends or is to stop, or the connection is not needed any more.
    pub(crate) fn run(mut self) {
        // Of many plugins that start or are pinged at once none is to keep a buffer that only its first request may need.
        self.release();
        loop {
            let outcome = match self.next() {
                Next::Job(job) => self.serve(job),
                Next::Ping if !self.first && self.idle_pings >= IDLE_PINGS => return,
                Next::Ping => {
                    let outcome = self.ping();
                    self.release();
                    outcome
                }
                Next::Stop => return self.shut_down(),
            };
            if self.stalled.take() {
                self.plugin.stalled.fetch_sub(1, Ordering::Relaxed);
            }
            self.unproven = None;
            if outcome.is_ok() && !self.first && self.held.is_none() && self.plugin.lets_go() {
                return;
            }
            if outcome.is_err() {
                self.unproven = Some(Unproven::new(&self.life));
                match connect(&self.plugin, &self.life) {
                    Some(link) => self.link = link,
                    None => {
                        if let Some(job) = self.held.take() {
                            self.plugin.give_back(job);
                        }
                        return;
                    }
                }
            }
        }
    }

    fn next(&mut self) -> Next {
        let jobs = self.plugin.queue.jobs();
        if let Some(job) = self.held.take() {
            return Next::Job(job);
        }
        // What waits is for the next process: clients that keep coming must not keep this one from its end.
        if self.life.stopping.load(Ordering::Relaxed) {
            return Next::Stop;
        }
        if let Ok(job) = jobs.try_recv() {
            return Next::Job(job);
        }
        self.plugin.idle.fetch_add(1, Ordering::Relaxed);
        let next = self.next_within(RELEASE_AFTER).or_else(|| {
            self.release();
            self.next_within(PING_AFTER - RELEASE_AFTER)
        });
        self.plugin.idle.fetch_sub(1, Ordering::Relaxed);
        next.unwrap_or(Next::Ping)
    }

    /// Gives back memory that an idle connection does not need.
    fn release(&mut self) {
        self.link.release();
        self.buffer = Vec::new();
    }

    /// Waits for something to do.
    fn next_within(&self, time: Duration) -> Option<Next> {
        select! {
            recv(self.plugin.queue.jobs()) -> job => Some(job.map_or(Next::Stop, Next::Job)),
            recv(self.life.stop) -> _ => Some(Next::Stop),
            default(time) => None,
        }
    }

    /// Does what is asked, unless it has waited too long.
    fn serve(&mut self, job: Job) -> Outcome {
        self.idle_pings = 0;
        let now = Instant::now();
        if now.duration_since(job.arrived()) >= job.patience(self.life.request_timeout) {
            expire(&self.plugin, &self.life, job);
            return Ok(());
        }
        if self.life.ended.load(Ordering::Relaxed) {
            self.held = Some(job);
            return Err(Broken);
        }
        let repeatable = matches!(&job, Job::Web(job) if job.is_safe());
        let rested = self.link.holds_bytes() || now.duration_since(self.used) >= LOOK_AFTER;
        if (!repeatable || rested) && !self.is_clean("on an idle connection") {
            // It was not sent, so it may go to another connection, or to the next process.
            if !repeatable {
                self.has_ended(UNSENT_SETTLE_TIME);
            }
            self.held = Some(job);
            return Err(Broken);
        }
        match job {
            Job::Web(mut job) => match job.loss.take_if(|loss| loss.process != self.life.number) {
                Some(loss) => self.fail(job, Failed::BadGateway, &format!("{}, and then the process ended", loss.why), Ok(())),
                None => self.serve_web(job),
            },
            Job::Kv(job) => self.operate(*job),
        }
    }

    /// Whether nothing came on the connection that was not asked for, and it has not ended. Of a new one this is not asked, so that a
    /// request finds its end on the second connection at the latest.
    fn is_clean(&mut self, place: &str) -> bool {
        if !self.link.is_used() {
            return true;
        }
        for _ in 0..MAX_LATE_PONGS {
            if !self.link.holds_bytes() && !self.link.has_answer() {
                return true;
            }
            let what = match self.link.wait(Instant::now(), || false) {
                Ok(()) => match self.link.take().map(|frame| frame.message()) {
                    Ok(Ok(Message::Pong(_))) => continue,
                    Ok(Ok(other)) => format!("{} came {place}, where nothing was due", other.named()),
                    Ok(Err(malformed)) => format!("a frame came {place}, where nothing was due: {malformed}"),
                    Err(error) => format!("bytes came {place}, where nothing was due: {error}"),
                },
                Err(Lost::Broken(ReadError::Closed)) => return false,
                Err(Lost::Broken(error)) => format!("bytes came {place}, where nothing was due: {error}"),
                Err(Lost::Deadline | Lost::Interrupted) => {
                    format!("the beginning of a frame came {place}, where nothing was due")
                }
            };
            self.plugin.log.note(&format!("protocol error: {what}"));
            return false;
        }
        self.plugin.log.note(&format!("protocol error: more than {MAX_LATE_PONGS} pongs came {place}, where nothing was due"));
        false
    }

    /// Notes that the request at hand takes this connection for long, and looks after those that wait for it in vain. Says whether the
    /// process has ended, and the wait with it.
    fn stall(plugin: &Plugin, life: &Life, stalled: &Cell<bool>) -> bool {
        if !stalled.replace(true) {
            plugin.stalled.fetch_add(1, Ordering::Relaxed);
        }
        plugin.ask_to_grow();
        plugin.queue.expire(|arrived| arrived.elapsed() >= life.request_timeout, |job| expire(plugin, life, job));
        life.ended.load(Ordering::Relaxed)
    }

    /// Sends a request, with others that wait where that is sound, and gives the answers to their clients.
    fn serve_web(&mut self, mut first: WebJob) -> Outcome {
        let begun = Instant::now();
        let timeout = self.life.request_timeout;
        let mut outstanding = VecDeque::with_capacity(1);
        let mut given = None;
        Life::mark(&self.life.asked);
        if !first.is_safe() {
            self.plugin.note_uneven();
        }
        if first.body == BodyLength::Known(0) {
            let depth = if first.is_safe() && !first.alone { self.depth() } else { 1 };
            self.send(first, Vec::new(), &mut outstanding);
            while outstanding.len() < depth && self.link.queued() < MAX_BATCH {
                match self.plugin.queue.jobs().try_recv() {
                    Ok(Job::Web(job)) if job.is_safe() && !job.alone => self.send(job, Vec::new(), &mut outstanding),
                    Ok(job) => {
                        self.held = Some(job);
                        break;
                    }
                    Err(_) => break,
                }
            }
        } else {
            match first.client.whole_body(MAX_INLINE_BODY) {
                Some(body) => self.send(first, body, &mut outstanding),
                None => outstanding.extend(self.upload(first)?),
            }
            // A client may take its time for the body; the plugin's begins when it has it.
            given = Some(Instant::now() + timeout);
        }
        let sent = outstanding.len();
        while let Some((id, job)) = outstanding.pop_front() {
            let deadline = given.unwrap_or(job.arrived + timeout);
            if self.answer(id, job, deadline, &mut outstanding).is_err() {
                self.give_back(outstanding);
                return Err(Broken);
            }
        }
        self.used = Instant::now();
        self.measure(self.used.duration_since(begun), sent);
        Ok(())
    }

    /// How many requests to send before their answers come.
    fn depth(&self) -> usize {
        match self.pace {
            Some(pace) if pace < QUICK => {
                let connections = self.plugin.connections.load(Ordering::Relaxed).max(1);
                (1 + self.plugin.queue.len() / connections).min(MAX_DEPTH)
            }
            _ => 1,
        }
    }

    fn measure(&mut self, elapsed: Duration, requests: usize) {
        let count = u32::try_from(requests).unwrap_or(u32::MAX);
        if elapsed >= LONG {
            self.plugin.note_uneven();
        }
        if let Some(each) = elapsed.checked_div(count) {
            let weight = count.min(MEMORY / 2);
            let pace = self.pace.map_or(each, |pace| (pace * (MEMORY - weight) + each * weight) / MEMORY);
            self.pace = Some(pace);
            self.plugin.pace.store(u64::try_from(pace.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
        }
        self.plugin.answered.fetch_add(requests as u64, Ordering::Relaxed);
    }

    /// Queues a request with all of its body.
    fn send(&mut self, mut job: WebJob, body: Vec<u8>, outstanding: &mut VecDeque<(u64, WebJob)>) {
        let id = self.link.next_id();
        // Of a client that has gone the plugin need not hear.
        let Some(message) = job.client.message() else { return };
        match self.link.queue_owned(&Http { id, ..message }, body) {
            Ok(()) => outstanding.push_back((id, job)),
            // Only a head beyond what a frame holds gets here.
            Err(_) => job.fail(Failed::HeadTooLarge),
        }
    }

    /// Sends a request with its body, as far as the plugin wants it. Gives nothing when the client was answered already.
    fn upload(&mut self, mut job: WebJob) -> Result<Option<(u64, WebJob)>, Broken> {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(MAX_INLINE_BODY, 0);
        let mut length = 0;
        let mut ended = false;
        while length < buffer.len() && !ended {
            match job.client.read_body(&mut buffer[length..]) {
                Ok(n) => {
                    length += n;
                    ended = n == 0 || job.body == BodyLength::Known(length as u64);
                }
                Err(error) => {
                    job.fail(body_failure(&error));
                    return Ok(None);
                }
            }
        }
        let id = self.link.next_id();
        let Some(message) = job.client.message() else { return Ok(None) };
        if self.link.queue(&Http { id, more: !ended, ..message }, &buffer[..length]).is_err() {
            job.fail(Failed::HeadTooLarge);
            return Ok(None);
        }
        let mut total = length as u64;
        if !ended {
            // A client may take its time to send the rest, and the plugin to take it.
            Self::stall(&self.plugin, &self.life, &self.stalled);
        }
        while !ended {
            let flushed = self.link.flush(Instant::now() + STREAM_IDLE, || self.life.ended.load(Ordering::Relaxed));
            let sent = match flushed {
                Ok(sent) => sent,
                Err(lost) => {
                    let why = self.loss(&lost, STREAM_IDLE, "it had taken the body");
                    return self.fail(job, Failed::BadGateway, &why, Err(Broken));
                }
            };
            if sent == Sent::Answered || self.link.has_answer() {
                // The plugin wants no more of the body. What is queued goes out while its answer comes in.
                self.queue_data(&Data { id, more: false, aborted: true }, &[])?;
                break;
            }
            match job.client.read_body(&mut buffer) {
                Ok(n) => {
                    total += n as u64;
                    ended = n == 0 || job.body == BodyLength::Known(total);
                    self.queue_data(&Data { id, more: !ended, aborted: false }, &buffer[..n])?;
                }
                Err(error) => {
                    // Closing the connection is how the plugin learns that the rest will not come.
                    job.fail(body_failure(&error));
                    return Err(Broken);
                }
            }
        }
        self.buffer = buffer;
        Ok(Some((id, job)))
    }

    fn queue_data(&mut self, data: &Data, body: &[u8]) -> Outcome {
        self.link.queue(data, body).map_err(|_| Broken)
    }

    /// Waits for the answer to a request and hands it to its client. An error means that the connection is of no more use. Those
    /// `behind` it are outstanding too; where they would have to wait for long, they are given back.
    fn answer(&mut self, id: u64, mut job: WebJob, deadline: Instant, behind: &mut VecDeque<(u64, WebJob)>) -> Outcome {
        let mut alone = true;
        let (stream, streamed, name) = loop {
            match self.wait_begin(deadline, !behind.is_empty()) {
                Ok(()) => {}
                Err(Lost::Interrupted) if !behind.is_empty() && !self.life.ended.load(Ordering::Relaxed) => {
                    // What they ask for may be had on another connection long before. This one is closed afterwards, since their
                    // answers may come on it as well.
                    alone = false;
                    self.give_back(std::mem::take(behind));
                    self.plugin.ask_to_grow();
                    continue;
                }
                Err(Lost::Deadline) => {
                    let why = self.loss(&Lost::Deadline, self.life.request_timeout, "its answer began");
                    return self.fail(job, Failed::Timeout, &why, Err(Broken));
                }
                Err(lost) => return self.lost(job, &lost),
            }
            // By its length alone, so that a request whose answer is followed by something is known while it has a name.
            let followed = behind.is_empty() && self.link.is_followed();
            let (frame, rest) = match self.link.begin() {
                Ok(begun) => begun,
                Err(error) => return self.lost(job, &error.into()),
            };
            let unexpected = match frame.message() {
                // The late answer to a ping.
                Ok(Message::Pong(pong)) if pong.id < id && rest == 0 => continue,
                Ok(Message::Response(response)) if response.id == id => {
                    Life::mark(&self.life.served);
                    let (size, more) = (frame.body.len() + rest, response.more);
                    let declared = match response.check(size, job.is_head()) {
                        Ok(declared) => declared.filter(|_| !job.is_head()),
                        Err(bad) => return self.bad_response(job, &bad.to_string(), !more && rest == 0),
                    };
                    if let Some(loss) = job.loss.take() {
                        let name = job.client.name();
                        self.plugin.log.note(&format!("{name}: {}; it was sent once more, and answered", loss.why));
                    }
                    // Once the answer has begun there is no name to be had.
                    let name = if more || rest > 0 || followed { job.client.name() } else { String::new() };
                    let begun = job.client.answer(&response, frame.body, rest);
                    let stream = more.then(|| Stream { id, declared, events: is_events(&response) });
                    let delivered = self.pass_rest(&mut job, &name, rest, !more, begun)?;
                    let Some(stream) = stream else {
                        // A client that has gone has no use for its answer, and the connection none the worse for it.
                        drop(delivered);
                        let clean = !followed || self.is_clean(&format!("behind the answer to {name}"));
                        return if alone && clean { Ok(()) } else { Err(Broken) };
                    };
                    delivered.map_err(|_| Broken)?;
                    break (stream, size as u64, name);
                }
                Ok(Message::Error(error)) if error.id == id && rest == 0 => {
                    Life::mark(&self.life.served);
                    let reason = format!("the plugin answered with the error {}: {}", error.code, error.message);
                    return self.fail(job, Failed::BadGateway, &reason, Ok(()));
                }
                // An earlier request is answered a second time. The frame is whole, so the answer that is due is found behind it.
                Ok(other) if other.id() < id && rest == 0 && Instant::now() < deadline => {
                    let what = format!("{} came", other.named());
                    if std::mem::take(&mut alone) {
                        let name = job.client.name();
                        let why = "an earlier request was answered twice";
                        self.plugin.log.note(&format!("protocol error: before the answer to {name} (id {id}) {what}: {why}"));
                    }
                    continue;
                }
                Ok(other) => {
                    let what = format!("protocol error: {} came where the response with id {id} was due", other.named());
                    (Some(other.id()), what)
                }
                Err(malformed) => (frame.id(), format!("protocol error: {malformed}")),
            };
            let (claimed, why) = unexpected;
            if claimed == Some(id) {
                return self.fail(job, Failed::BadGateway, &why, Err(Broken));
            }
            // It may be left of an earlier request, and none of this one's doing.
            return self.lose(job, why);
        };
        let relayed = self.relay(&mut job, &name, &stream, streamed);
        // Requests behind a stream have waited for it long enough; a new connection begins with a clean slate.
        if alone && behind.is_empty() { relayed } else { Err(Broken) }
    }

    /// The connection was lost before the answer to a request began.
    fn lost(&mut self, job: WebJob, lost: &Lost) -> Outcome {
        if job.is_safe() && self.unproven.is_none() && self.link.is_unsent() {
            // The plugin had closed the connection before: nobody has read it.
            self.plugin.give_back(Job::Web(job));
            return Err(Broken);
        }
        let why = self.loss(lost, self.life.request_timeout, "it answered");
        if self.life.ended.load(Ordering::Relaxed) {
            return self.fail(job, Failed::BadGateway, &why, Err(Broken));
        }
        self.lose(job, why)
    }

    /// Sends a safe request once more, to the process that has it, since its connection is of no more use; fails any other.
    fn lose(&self, mut job: WebJob, why: String) -> Outcome {
        if !job.is_safe() {
            return self.fail(job, Failed::BadGateway, &why, Err(Broken));
        }
        if job.loss.is_some() {
            return self.fail(job, Failed::BadGateway, &format!("{why}; it was sent twice"), Err(Broken));
        }
        job.alone = true;
        job.loss = Some(Box::new(Loss { process: self.life.number, why }));
        self.plugin.give_back(Job::Web(job));
        Err(Broken)
    }

    /// What happened to a connection before the plugin did something, which it had so much `time` for. Where the process may have ended
    /// its end is waited for a moment.
    fn loss(&self, lost: &Lost, time: Duration, before: &str) -> String {
        let lost = match lost {
            Lost::Deadline => {
                let waited = format!("{} s passed before {before}", time.as_secs_f32());
                return match self.link.unfinished() {
                    Some(unfinished) => format!("{waited}: {unfinished}"),
                    None => waited,
                };
            }
            Lost::Broken(error @ ReadError::Length { .. }) => return format!("protocol error: {error}"),
            lost if self.has_ended(SETTLE_TIME) => match self.life.exit.get() {
                Some(exit) => return format!("the process ended before {before}: {exit}"),
                None => format!("the process ended ({lost})"),
            },
            Lost::Broken(ReadError::Io(error)) => format!("the connection was lost ({error})"),
            lost => lost.to_string(),
        };
        format!("{lost} before {before}")
    }

    /// Waits until the client takes more of its answer, and looks after the plugin's other requests meanwhile.
    fn wait_for_client(job: &WebJob, plugin: &Plugin, life: &Life, stalled: &Cell<bool>) {
        while !job.client.has_room_within(CLIENT_TICK) && !Self::stall(plugin, life, stalled) {}
    }

    /// Passes on what is left of a large frame, which ends the answer where it is the `last`. Says how it was `delivered`: also when the
    /// client has gone all of it is taken, and the connection can go on.
    fn pass_rest(
        &mut self,
        job: &mut WebJob,
        name: &str,
        rest: usize,
        last: bool,
        delivered: io::Result<()>,
    ) -> Result<io::Result<()>, Broken> {
        let (life, plugin, stalled) = (&self.life, &self.plugin, &self.stalled);
        if rest > 0 {
            plugin.note_uneven();
        }
        let (mut left, mut delivered) = (rest, delivered);
        while left > 0 {
            let mut buffer = job.client.buffer();
            let interrupted = || Self::stall(plugin, life, stalled);
            let n = match self.link.read_rest(&mut buffer, Instant::now() + STREAM_IDLE, interrupted) {
                Ok(n) => n,
                Err(lost) => return self.cut_lost(job, name, &lost).map(Ok),
            };
            left -= n;
            Self::wait_for_client(job, plugin, life, stalled);
            delivered = delivered.and_then(|()| job.client.filled(buffer, n, last && left == 0));
        }
        Ok(delivered)
    }

    /// Passes on an answer that goes on in `data` frames.
    fn relay(&mut self, job: &mut WebJob, name: &str, stream: &Stream, mut streamed: u64) -> Outcome {
        self.pace = None;
        let Stream { id, declared, events } = *stream;
        let (life, plugin, stalled) = (&self.life, &self.plugin, &self.stalled);
        Self::stall(plugin, life, stalled);
        let ending = || events && life.stopping.load(Ordering::Relaxed);
        loop {
            let interrupted = || Self::stall(plugin, life, stalled) || ending();
            let waited = self.link.wait(Instant::now() + STREAM_IDLE, interrupted);
            if ending() {
                // The end of an event stream is not an error.
                drop(job.client.piece(&[], true));
                return Err(Broken);
            }
            match waited {
                Ok(()) => {}
                Err(lost) => return self.cut_lost(job, name, &lost),
            }
            let frame = match self.link.take() {
                Ok(frame) => frame,
                Err(error) => return self.cut_lost(job, name, &error.into()),
            };
            let data = match frame.message() {
                Ok(Message::Data(data)) if data.id == id => data,
                Ok(Message::Error(error)) if error.id == id => {
                    // The plugin has ended this answer itself, so the next frame belongs to the next request.
                    self.cut_off(job, name, &format!("the plugin sent the error {}: {}", error.code, error.message));
                    return Ok(());
                }
                Ok(other) => {
                    let what = format!("protocol error: {} came where data with id {id} was due", other.named());
                    return self.cut(job, name, &what);
                }
                Err(malformed) => return self.cut(job, name, &format!("protocol error: {malformed}")),
            };
            streamed += frame.body.len() as u64;
            let short = !data.more && declared.is_some_and(|declared| streamed != declared);
            if short || declared.is_some_and(|declared| streamed > declared) {
                let declared = declared.unwrap_or_default();
                return self.cut(job, name, &format!("its content-length is {declared}, its body has {streamed} bytes"));
            }
            let mut rest = frame.body;
            loop {
                let (piece, behind) = rest.split_at(rest.len().min(PIECE));
                Self::wait_for_client(job, plugin, life, stalled);
                if job.client.piece(piece, !data.more && behind.is_empty()).is_err() {
                    return if data.more { Err(Broken) } else { Ok(()) };
                }
                rest = behind;
                if rest.is_empty() {
                    break;
                }
            }
            if !data.more {
                return Ok(());
            }
        }
    }

    /// Cuts short an answer that has begun, so that its client does not take it for whole.
    fn cut_off(&self, job: &mut WebJob, name: &str, why: &str) {
        job.client.cut();
        self.plugin.note_failed(&format!("{name}: the answer was cut short: {why}"));
    }

    /// The same where the connection is of no more use.
    fn cut(&self, job: &mut WebJob, name: &str, why: &str) -> Outcome {
        self.cut_off(job, name, why);
        Err(Broken)
    }

    /// The same where the connection was lost. The client hears of it first, since the end of the process may take a moment to be seen.
    fn cut_lost(&self, job: &mut WebJob, name: &str, lost: &Lost) -> Outcome {
        job.client.cut();
        self.cut(job, name, &self.loss(lost, STREAM_IDLE, "its end"))
    }

    /// The plugin's answer breaks a rule: the client gets none of it.
    fn bad_response(&self, job: WebJob, why: &str, whole: bool) -> Outcome {
        let outcome = if whole { Ok(()) } else { Err(Broken) };
        self.fail(job, Failed::BadGateway, &format!("the answer was refused: {why}"), outcome)
    }

    /// Answers a request that the plugin has failed. The line in its log comes first, so that a client that has the answer finds it.
    fn fail<T>(&self, job: WebJob, failed: Failed, why: &str, outcome: Result<T, Broken>) -> Result<T, Broken> {
        self.plugin.note_failed(&format!("{}: {why}", job.client.name()));
        job.fail(failed);
        outcome
    }

    /// Waits for a frame, and on the way answers requests that have waited in the queue for too long.
    fn wait(&mut self, deadline: Instant) -> Result<(), Lost> {
        let (life, plugin, stalled) = (&self.life, &self.plugin, &self.stalled);
        self.link.wait(deadline, || Self::stall(plugin, life, stalled))
    }

    /// The same for a frame's beginning. Where the request is `followed` by others, the wait is interrupted as soon as it is long.
    fn wait_begin(&mut self, deadline: Instant, followed: bool) -> Result<(), Lost> {
        let (life, plugin, stalled) = (&self.life, &self.plugin, &self.stalled);
        self.link.wait_begin(deadline, || Self::stall(plugin, life, stalled) || followed)
    }

    /// Whether the process has ended; one that may be ending has so much time to be seen as ended.
    fn has_ended(&self, time: Duration) -> bool {
        self.life.over.recv_timeout(time) == Err(RecvTimeoutError::Disconnected)
    }

    /// Puts requests that get no answer on this connection back into the queue. Where the process may have ended, [`Worker::loss`] has
    /// let that settle. They go alone from now on.
    fn give_back(&self, waited: VecDeque<(u64, WebJob)>) {
        for (_, mut job) in waited {
            job.alone = true;
            self.plugin.give_back(Job::Web(job));
        }
    }

    /// Passes on an operation of the operator's.
    fn operate(&mut self, mut job: KvJob) -> Outcome {
        let id = self.link.next_id();
        let kv = Kv { id, op: job.op.clone() };
        if self.link.queue(&kv, &std::mem::take(&mut job.value)).is_err() {
            job.reply(Err(KvFailure::Failed(Failed::TooLarge)));
            return Ok(());
        }
        Life::mark(&self.life.asked);
        let timeout = self.life.request_timeout.min(MAX_KV_TIME);
        let deadline = job.arrived + timeout;
        loop {
            if let Err(lost) = self.wait(deadline) {
                let failed = if matches!(lost, Lost::Deadline) { Failed::Timeout } else { Failed::BadGateway };
                let why = self.loss(&lost, timeout, "it answered");
                return self.fail_kv(job, failed, &why);
            }
            let answer = self.link.take().map(|frame| (frame.message(), frame.body));
            let what = match answer {
                Ok((Ok(Message::Pong(pong)), _)) if pong.id < id => continue,
                Ok((Ok(Message::Result(result)), body)) if result.id == id => match result.fault(job.op.name(), body.len()) {
                    Some(fault) => fault,
                    None => {
                        Life::mark(&self.life.served);
                        job.reply(Ok((result, body.to_vec())));
                        return Ok(());
                    }
                },
                Ok((Ok(Message::Error(error)), _)) if error.id == id => {
                    Life::mark(&self.life.served);
                    job.reply(Err(KvFailure::Refused(error)));
                    return Ok(());
                }
                Ok((Ok(other), _)) if other.id() == id => format!("expected result, got {}", other.kind()),
                Ok((Ok(other), _)) => format!("expected result with id {id}, got {} with id {}", other.kind(), other.id()),
                Ok((Err(malformed), _)) => malformed.to_string(),
                Err(error) => error.to_string(),
            };
            return self.fail_kv(job, Failed::BadGateway, &format!("protocol error: {what}"));
        }
    }

    /// Answers an operation that the plugin has failed.
    fn fail_kv(&self, job: KvJob, failed: Failed, why: &str) -> Outcome {
        self.plugin.note_failed(&format!("{}: {why}", job.name()));
        let failure = match failed {
            Failed::BadGateway => KvFailure::Invalid(format!("{}: {why}", job.short_name())),
            failed => KvFailure::Failed(failed),
        };
        job.reply(Err(failure));
        Err(Broken)
    }

    fn ping(&mut self) -> Outcome {
        self.idle_pings += 1;
        let id = self.link.next_id();
        self.link.queue(&Ping { id }, &[]).map_err(|_| Broken)?;
        let deadline = Instant::now() + PING_TIME;
        loop {
            match self.wait(deadline) {
                Ok(()) => {}
                Err(Lost::Deadline) => {
                    self.misses += 1;
                    if self.misses >= MAX_MISSES {
                        self.plugin.unresponsive(self.life.number, format!("it did not answer {MAX_MISSES} pings in a row"));
                    }
                    return Ok(());
                }
                Err(Lost::Interrupted | Lost::Broken(ReadError::Closed)) => return Err(Broken),
                Err(lost) => {
                    self.plugin.log.note(&self.loss(&lost, PING_TIME, "it answered a ping"));
                    return Err(Broken);
                }
            }
            let what = match self.link.take().map(|frame| frame.message()) {
                Ok(Ok(Message::Pong(pong))) if pong.id == id => {
                    self.misses = 0;
                    return Ok(());
                }
                Ok(Ok(Message::Pong(pong))) if pong.id < id => continue,
                // It is there, and says what is wrong with it.
                Ok(Ok(Message::Error(error))) if error.id == id => {
                    self.misses = 0;
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

    /// Tells the plugin that no more comes on this connection, and keeps it open until the plugin has ended it.
    fn shut_down(mut self) {
        self.unproven = None;
        let (life, accepted) = (&self.life, Instant::now() + ACCEPT_TIME);
        let all_proven = || life.unproven.load(Ordering::SeqCst) == 0 || life.ended.load(Ordering::Relaxed);
        if !all_proven() {
            // A frame that comes here is the late answer to a ping, and an end shows again below.
            drop(self.link.wait(accepted, all_proven));
        }
        let id = self.link.next_id();
        if self.life.ended.load(Ordering::Relaxed) || self.link.queue(&Shutdown { id }, &[]).is_err() {
            return;
        }
        // The supervisor ends the process in time, and with it this wait.
        let deadline = Instant::now() + STREAM_IDLE;
        let ended = || self.life.ended.load(Ordering::Relaxed);
        while self.link.wait(deadline, ended).is_ok() && self.link.take().is_ok() {}
    }
}

/// Answers a request that has waited too long for a connection of the plugin's.
fn expire(plugin: &Plugin, life: &Life, job: Job) {
    let [open, most] = [plugin.connections.load(Ordering::Relaxed), plugin.metadata.concurrency as usize];
    let waited = job.patience(life.request_timeout).as_secs_f32();
    let lost = match &job {
        Job::Web(WebJob { loss: Some(loss), .. }) => format!("{}; ", loss.why),
        _ => String::new(),
    };
    plugin
        .note_failed(&format!("{}: {lost}it waited {waited} s for its turn on {open} connections of at most {most}", job.name()));
    job.fail(Failed::Timeout);
}

/// Opens a connection; gives none when the process has ended, is to stop, or does not take it in time.
fn connect(plugin: &Plugin, life: &Life) -> Option<Link> {
    let deadline = Instant::now() + RECONNECT_TIME;
    while !life.ended.load(Ordering::Relaxed) {
        match Link::connect(&life.socket, life.uid) {
            Ok(link) => return Some(link),
            Err(_) if life.stopping.load(Ordering::Relaxed) => return None,
            Err(error) if Instant::now() >= deadline => {
                plugin.unresponsive(life.number, format!("it takes no connection: {error}"));
                return None;
            }
            Err(_) => match life.stop.recv_timeout(RECONNECT_PAUSE) {
                Err(RecvTimeoutError::Timeout) => {}
                _ => return None,
            },
        }
    }
    None
}

/// Whether an answer is a stream of events.
fn is_events(response: &Response<'_>) -> bool {
    let kind = response.headers.iter().find(|(name, _)| name.eq_ignore_ascii_case("content-type"));
    let is_events = |value: &str| value.get(..EVENTS.len()).is_some_and(|kind| kind.eq_ignore_ascii_case(EVENTS));
    kind.is_some_and(|(_, value)| is_events(value))
}

fn body_failure(error: &io::Error) -> Failed {
    match error.kind() {
        io::ErrorKind::FileTooLarge => Failed::TooLarge,
        _ => Failed::BadBody,
    }
}
