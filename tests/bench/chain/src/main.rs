//! What a request costs by its way alone: the host's threads, sockets, channels and wakes, with nothing done in between.
//!
//! `bench-chain PORT CONNECTIONS` answers `/hello`, `/echo` and `/mib` as the benchmark's plugin does, by the way that a request takes
//! through the host: the gate, which waits for all clients by epoll and collects bodies, the plugin's queue, a worker for each of so many
//! connections, the plugin's process, and back: large responses in pieces straight to the client, small ones by the gate, or straight
//! where the request is alone. Messages are as long as the host's, but nobody reads more of them than which of the three is asked for.

use crossbeam_channel::{Receiver, Sender, bounded, select, unbounded};
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
use std::collections::HashMap;
use std::io::{self, IoSlice, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// Bytes of the messages: the head of the frame to the plugin, and that of its answer's.
const FRAME: usize = 284;
const REPLY: usize = 133;

/// Bytes of the three bodies.
const HELLO: &[u8] = b"Hello, world!";
const ECHO: usize = 64 * 1024;
const MIB: usize = 1 << 20;

/// Bytes of a large answer that are passed on at a time.
const PIECE: usize = 64 * 1024;

/// Requests pipelined on a connection, and the wait of an idle worker, as the host has them.
const DEPTH: usize = 32;
const IDLE: Duration = Duration::from_secs(1);

/// Requests that find room in the plugin's queue.
const QUEUE: usize = 1024;

/// What an event is about that is not a client.
const LISTENER: u64 = u64::MAX;
const WAKER: u64 = u64::MAX - 1;

/// What is asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Load {
    Hello = b'h',
    Echo = b'e',
    Mib = b'm',
}

impl Load {
    /// By the path of a request, and by the first byte of a frame.
    fn of(byte: u8) -> Self {
        match byte {
            b'e' => Self::Echo,
            b'm' => Self::Mib,
            _ => Self::Hello,
        }
    }

    fn answer(self) -> usize {
        match self {
            Self::Hello => HELLO.len(),
            Self::Echo => ECHO,
            Self::Mib => MIB,
        }
    }

    /// The head of the answer to a client, with as many bytes as the host's has.
    fn head(self) -> Vec<u8> {
        let length = self.answer();
        let date = "Thu, 01 Jan 1970 00:00:00 GMT";
        format!("HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ndate: {date}\r\ncontent-length: {length}\r\n\r\n").into_bytes()
    }
}

/// Whose request, and for what.
type Job = (usize, Load);

/// What all threads see.
struct Chain {
    clients: Mutex<Vec<Arc<TcpStream>>>,
    bodies: Mutex<HashMap<usize, Vec<u8>>>,
    under_way: AtomicUsize,
    waker: OwnedFd,
    asleep: AtomicBool,
    /// Connections to the plugin.
    connections: usize,
}

fn main() -> io::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["plugin", path, connections] => plugin(Path::new(path), number(connections)?),
        [port, connections] => serve(port, number(connections)?),
        _ => Err(io::Error::other("usage: bench-chain PORT CONNECTIONS")),
    }
}

/// The plugin's process. It ends with its connections.
fn plugin(path: &Path, connections: usize) -> io::Result<()> {
    let listener = UnixListener::bind(path)?;
    let threads: Vec<_> = (0..connections)
        .map(|_| {
            let (stream, _) = listener.accept()?;
            named("plugin", move || answer_frames(stream))
        })
        .collect::<io::Result<_>>()?;
    threads.into_iter().for_each(|thread: thread::JoinHandle<io::Result<()>>| drop(thread.join()));
    Ok(())
}

/// Answers what comes together together.
fn answer_frames(mut stream: UnixStream) -> io::Result<()> {
    let (mut buffer, mut held) = (vec![0; DEPTH * FRAME + ECHO], 0);
    let mib = vec![b'm'; MIB];
    loop {
        poll(&mut [PollFd::new(&stream, PollFlags::IN)], None)?;
        let read = stream.read(&mut buffer[held..])?;
        if read == 0 {
            return Ok(());
        }
        held += read;
        let (mut at, mut replies) = (0, Vec::new());
        while held - at >= FRAME {
            let load = Load::of(buffer[at]);
            let end = at + FRAME + if load == Load::Echo { ECHO } else { 0 };
            if end > held {
                break;
            }
            replies.resize(replies.len() + REPLY, 0);
            match load {
                Load::Hello => {}
                Load::Echo => send_both(&stream, &std::mem::take(&mut replies), &buffer[at + FRAME..end])?,
                Load::Mib => send_both(&stream, &std::mem::take(&mut replies), &mib)?,
            }
            at = end;
        }
        stream.write_all(&replies)?;
        buffer.copy_within(at..held, 0);
        held -= at;
    }
}

#[expect(clippy::disallowed_methods, reason = "there is no process.rs here, and nobody to confine")]
fn serve(port: &str, connections: usize) -> io::Result<()> {
    let port = port.parse().map_err(io::Error::other)?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
    let socket = std::env::temp_dir().join(format!("bench-chain-{}", std::process::id()));
    let mut command = std::process::Command::new(std::env::current_exe()?);
    let mut child = command.arg("plugin").arg(&socket).arg(connections.to_string()).spawn()?;
    let chain = Arc::new(Chain {
        clients: Mutex::default(),
        bodies: Mutex::default(),
        under_way: AtomicUsize::new(0),
        waker: eventfd(0, EventfdFlags::NONBLOCK)?,
        asleep: AtomicBool::new(false),
        connections,
    });
    let (queue, jobs) = bounded(QUEUE);
    let (parcels, answers) = unbounded();
    let (_running, stop) = bounded(0);
    for _ in 0..connections {
        let stream = connect(&socket)?;
        let (chain, jobs, stop, parcels) = (Arc::clone(&chain), jobs.clone(), stop.clone(), parcels.clone());
        named("worker", move || chain.work(&stream, &jobs, &stop, &parcels))?;
    }
    std::fs::remove_file(&socket)?;
    let outcome = chain.pass(&listener, &queue, &answers);
    child.kill()?;
    child.wait()?;
    outcome
}

/// A client as the gate sees it.
struct Client {
    stream: Arc<TcpStream>,
    /// The body that is coming.
    body: Option<Vec<u8>>,
    /// What the client has not taken yet.
    unsent: Vec<u8>,
}

impl Client {
    /// Sends what can be sent now.
    fn send(&mut self, head: &[u8], body: &[u8]) {
        let sent = send_some(&self.stream, head, body).unwrap_or(head.len() + body.len());
        if sent < head.len() + body.len() {
            self.unsent = [head, body].concat().split_off(sent);
        }
    }

    /// Takes what has come; whether that was a request, and for what.
    fn receive(&mut self, scratch: &mut [u8]) -> Option<Load> {
        if !self.unsent.is_empty() {
            let unsent = std::mem::take(&mut self.unsent);
            self.send(&unsent, &[]);
        }
        if self.body.is_none() {
            let read = (&*self.stream).read(scratch).unwrap_or(0);
            let end = scratch[..read].windows(4).position(|end| end == b"\r\n\r\n")? + 4;
            let path = scratch[..read].iter().position(|&byte| byte == b' ')? + 1;
            let name = path + 1 + scratch[path + 1..read].iter().position(|&byte| byte == b'/')? + 1;
            let load = Load::of(scratch[name]);
            if load != Load::Echo {
                return Some(load);
            }
            let mut body = Vec::with_capacity(ECHO);
            body.extend_from_slice(&scratch[end..read]);
            self.body = Some(body);
        }
        let body = self.body.as_mut()?;
        while body.len() < ECHO && rustix::io::read(&*self.stream, spare_capacity(body)).is_ok_and(|read| read > 0) {}
        (body.len() == ECHO).then_some(Load::Echo)
    }
}

impl Chain {
    /// The gate.
    fn pass(&self, listener: &TcpListener, queue: &Sender<Job>, answers: &Receiver<(Job, Vec<u8>)>) -> io::Result<()> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, listener, EventData::new_u64(LISTENER), EventFlags::IN)?;
        epoll::add(&epoll, &self.waker, EventData::new_u64(WAKER), EventFlags::IN | EventFlags::ET)?;
        let (mut events, mut scratch) = (Vec::with_capacity(256), [0; 4096]);
        let mut clients: Vec<Client> = Vec::new();
        loop {
            self.asleep.store(true, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            let timeout = (!answers.is_empty()).then_some(Timespec { tv_sec: 0, tv_nsec: 0 });
            events.clear();
            epoll::wait(&epoll, spare_capacity(&mut events), timeout.as_ref())?;
            self.asleep.store(false, Ordering::Relaxed);
            for event in &events {
                match event.data.u64() {
                    LISTENER => {
                        let (stream, _) = listener.accept()?;
                        stream.set_nonblocking(true)?;
                        stream.set_nodelay(true)?;
                        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
                        epoll::add(&epoll, &stream, EventData::new_u64(clients.len() as u64), flags)?;
                        let stream = Arc::new(stream);
                        lock(&self.clients).push(Arc::clone(&stream));
                        clients.push(Client { stream, body: None, unsent: Vec::new() });
                    }
                    WAKER => {}
                    number => {
                        let number = usize::try_from(number).map_err(io::Error::other)?;
                        let client = &mut clients[number];
                        if let Some(load) = client.receive(&mut scratch) {
                            if let Some(body) = client.body.take() {
                                lock(&self.bodies).insert(number, body);
                            }
                            self.under_way.fetch_add(1, Ordering::Relaxed);
                            queue.send((number, load)).map_err(io::Error::other)?;
                        }
                    }
                }
            }
            for ((number, load), body) in answers.try_iter().take(256) {
                clients[number].send(&load.head(), &body);
            }
        }
    }

    /// A worker. Requests for the smallest answer are sent several at a time.
    fn work(
        &self,
        stream: &UnixStream,
        jobs: &Receiver<Job>,
        stop: &Receiver<()>,
        parcels: &Sender<(Job, Vec<u8>)>,
    ) -> io::Result<()> {
        let (mut batch, mut next) = (Vec::new(), None);
        let mut buffer = vec![0; REPLY + ECHO + DEPTH * FRAME];
        loop {
            let first: Option<Job> = next.take().or_else(|| jobs.try_recv().ok()).or_else(|| {
                select! {
                    recv(jobs) -> job => job.ok(),
                    recv(stop) -> _ => None,
                    default(IDLE) => None,
                }
            });
            let Some((number, load)) = first else { continue };
            batch.push((number, load));
            let depth = if load == Load::Echo { 1 } else { (1 + jobs.len() / self.connections).min(DEPTH) };
            while batch.len() < depth && next.is_none() {
                match jobs.try_recv() {
                    Ok(job) if job.1 == load => batch.push(job),
                    other => next = other.ok(),
                }
                if next.is_none() && jobs.is_empty() {
                    break;
                }
            }
            let body = if load == Load::Echo { lock(&self.bodies).remove(&number).unwrap_or_default() } else { Vec::new() };
            let mut frames = vec![0; batch.len() * FRAME];
            frames.chunks_mut(FRAME).for_each(|frame| frame[0] = load as u8);
            send_both(stream, &frames, &body)?;
            self.reply(stream, &batch, &mut buffer, parcels)?;
            batch.clear();
        }
    }

    /// Receives the answers, and sends them on.
    fn reply(
        &self,
        mut stream: &UnixStream,
        batch: &[Job],
        buffer: &mut [u8],
        parcels: &Sender<(Job, Vec<u8>)>,
    ) -> io::Result<()> {
        let mut held = 0;
        for &(number, load) in batch {
            let (frame, is_large) = (REPLY + if load == Load::Hello { 0 } else { load.answer() }, load == Load::Mib);
            let wanted = if is_large { REPLY } else { frame };
            while held < wanted {
                poll(&mut [PollFd::new(&stream, PollFlags::IN)], None)?;
                // Of a large answer no more than is its own.
                let most = buffer.len().min(if is_large { PIECE } else { usize::MAX });
                held += stream.read(&mut buffer[held..most])?;
            }
            let alone = self.under_way.fetch_sub(1, Ordering::Relaxed) == 1 && self.asleep.load(Ordering::Relaxed);
            let body = if load == Load::Hello { HELLO } else { &buffer[REPLY..frame.min(held)] };
            if is_large {
                let client = Arc::clone(&lock(&self.clients)[number]);
                send_all(&client, &load.head(), body);
                let mut left = frame - held;
                while left > 0 {
                    let most = left.min(PIECE);
                    let read = stream.read(&mut buffer[..most])?;
                    send_all(&client, &[], &buffer[..read]);
                    left -= read;
                }
                held = 0;
                continue;
            } else if alone {
                let client = Arc::clone(&lock(&self.clients)[number]);
                send_all(&client, &load.head(), body);
            } else {
                parcels.send(((number, load), body.to_vec())).map_err(io::Error::other)?;
                fence(Ordering::SeqCst);
                if self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::Relaxed) {
                    rustix::io::write(&self.waker, &1_u64.to_ne_bytes())?;
                }
            }
            buffer.copy_within(frame..held, 0);
            held -= frame;
        }
        Ok(())
    }
}

/// Sends as much of both as is taken in one call.
fn send_some(socket: &impl rustix::fd::AsFd, first: &[u8], second: &[u8]) -> io::Result<usize> {
    match sendmsg(socket, &[IoSlice::new(first), IoSlice::new(second)], &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL)
    {
        Err(Errno::AGAIN) => Ok(0),
        sent => Ok(sent?),
    }
}

/// Sends both to the other side of a blocking socket.
fn send_both(mut stream: &UnixStream, first: &[u8], second: &[u8]) -> io::Result<()> {
    let sent = send_some(stream, first, second)?;
    stream.write_all(first.get(sent..).unwrap_or_default())?;
    stream.write_all(&second[sent.saturating_sub(first.len())..])
}

/// Sends both to a client, waiting for room; one that has gone needs nothing.
fn send_all(client: &TcpStream, first: &[u8], second: &[u8]) {
    let (mut first, mut second) = (first, second);
    while !(first.is_empty() && second.is_empty()) {
        let Ok(sent) = send_some(client, first, second) else { return };
        let of_first = sent.min(first.len());
        (first, second) = (&first[of_first..], &second[sent - of_first..]);
        if sent == 0 && poll(&mut [PollFd::new(client, PollFlags::OUT)], None).is_err() {
            return;
        }
    }
}

/// Connects once the plugin listens.
#[expect(clippy::disallowed_methods, reason = "it is there in a moment, or the benchmark gives up on this program")]
fn connect(path: &Path) -> io::Result<UnixStream> {
    loop {
        match UnixStream::connect(path) {
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                thread::sleep(Duration::from_millis(5));
            }
            connected => return connected,
        }
    }
}

fn number(word: &str) -> io::Result<usize> {
    word.parse().map_err(io::Error::other)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn named(name: &str, run: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<thread::JoinHandle<io::Result<()>>> {
    thread::Builder::new().name(name.into()).spawn(run)
}
