//! What a request costs by its way alone: the host's threads, sockets, channels and wakes, with nothing done in between.
//!
//! `bench-chain whole PORT` answers each request with 13 bytes, by the way that it takes through the host: the gate, which waits for all
//! clients by epoll, a connection to the HTTP library's thread, that library's queue, the dispatcher, the plugin's queue, one of two
//! workers, the plugin's process, and back, straight to the client where it is alone and by the gate otherwise. Messages are as long as the
//! host's, but nobody reads what is in them. `bench-chain short PORT` leaves out the library's thread and the dispatcher: the gate puts
//! requests into the plugin's queue itself.

use crossbeam_channel::{Receiver, Sender, bounded, select, unbounded};
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::net::{SendFlags, send};
use std::collections::VecDeque;
use std::io::{self, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// Bytes of the messages for a `GET` of 13 bytes: the head that the gate passes on, the frame to the plugin, and its answer's.
const HEAD: usize = 128;
const FRAME: usize = 284;
const REPLY: usize = 133;

/// The answer, with as many bytes as the host's has.
const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ndate: Thu, 01 Jan 1970 00:00:00 GMT\r\ncontent-length: 13\r\n\r\nHello, world!";

/// Connections to the plugin, requests sent ahead on one, bytes read from the gate at a time, and the wait of an idle worker, as the host
/// has them.
const WORKERS: usize = 2;
const DEPTH: usize = 32;
const LIBRARY_READ: usize = 1024;
const IDLE: Duration = Duration::from_secs(1);

/// Requests that find room in the plugin's queue.
const QUEUE: usize = 1024;

/// What an event is about that is not a client.
const LISTENER: u64 = u64::MAX;
const BELL: u64 = u64::MAX - 1;

/// What all threads see.
struct Chain {
    clients: Mutex<Vec<Arc<TcpStream>>>,
    under_way: AtomicUsize,
    bell: OwnedFd,
    asleep: AtomicBool,
    /// The library's queue.
    taken: Mutex<VecDeque<usize>>,
    came: Condvar,
}

fn main() -> io::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["plugin", path] => plugin(Path::new(path)),
        ["whole", port] => serve(port, true),
        ["short", port] => serve(port, false),
        _ => Err(io::Error::other("usage: bench-chain whole|short PORT")),
    }
}

/// The plugin's process: as many replies as came frames, in one write. It ends with its connections.
fn plugin(path: &Path) -> io::Result<()> {
    let listener = UnixListener::bind(path)?;
    let threads: Vec<_> = (0..WORKERS)
        .map(|_| {
            let (mut stream, _) = listener.accept()?;
            named("plugin", move || {
                let (mut buffer, mut held) = (vec![0; DEPTH * FRAME], 0);
                loop {
                    poll(&mut [PollFd::new(&stream, PollFlags::IN)], None)?;
                    let read = stream.read(&mut buffer)?;
                    if read == 0 {
                        return Ok(());
                    }
                    held += read;
                    stream.write_all(&vec![0; held / FRAME * REPLY])?;
                    held %= FRAME;
                }
            })
        })
        .collect::<io::Result<_>>()?;
    threads.into_iter().for_each(|thread: thread::JoinHandle<io::Result<()>>| drop(thread.join()));
    Ok(())
}

#[expect(clippy::disallowed_methods, reason = "there is no process.rs here, and nobody to confine")]
fn serve(port: &str, whole: bool) -> io::Result<()> {
    let port = port.parse().map_err(io::Error::other)?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
    let socket = std::env::temp_dir().join(format!("bench-chain-{}", std::process::id()));
    let mut child = std::process::Command::new(std::env::current_exe()?).arg("plugin").arg(&socket).spawn()?;
    let chain = Arc::new(Chain {
        clients: Mutex::default(),
        under_way: AtomicUsize::new(0),
        bell: eventfd(0, EventfdFlags::NONBLOCK)?,
        asleep: AtomicBool::new(false),
        taken: Mutex::default(),
        came: Condvar::new(),
    });
    let (queue, jobs) = bounded(QUEUE);
    let (parcels, answers) = unbounded();
    let (_running, stop) = bounded(0);
    for _ in 0..WORKERS {
        let stream = connect(&socket)?;
        let (chain, jobs, stop, parcels) = (Arc::clone(&chain), jobs.clone(), stop.clone(), parcels.clone());
        named("worker", move || chain.work(stream, &jobs, &stop, &parcels))?;
    }
    std::fs::remove_file(&socket)?;
    let out = if whole {
        let (out, library) = UnixStream::pair()?;
        let (taker, dispatcher) = (Arc::clone(&chain), Arc::clone(&chain));
        named("library", move || taker.take(library))?;
        named("dispatcher", move || dispatcher.dispatch(&queue))?;
        Out::Library(out, Vec::new())
    } else {
        Out::Queue(queue)
    };
    let outcome = chain.pass(&listener, out, &answers);
    child.kill()?;
    child.wait()?;
    outcome
}

/// Where the gate puts requests.
enum Out {
    Library(UnixStream, Vec<u8>),
    Queue(Sender<usize>),
}

impl Out {
    fn put(&mut self, client: usize) -> io::Result<()> {
        match self {
            Self::Library(_, waiting) => {
                waiting.extend_from_slice(&client.to_ne_bytes());
                waiting.resize(waiting.len().next_multiple_of(HEAD), 0);
                Ok(())
            }
            Self::Queue(queue) => queue.send(client).map_err(io::Error::other),
        }
    }

    /// All of a turn go out together.
    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Library(stream, waiting) if !waiting.is_empty() => {
                stream.write_all(waiting)?;
                waiting.clear();
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

impl Chain {
    /// The gate.
    fn pass(&self, listener: &TcpListener, mut out: Out, answers: &Receiver<usize>) -> io::Result<()> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, listener, EventData::new_u64(LISTENER), EventFlags::IN)?;
        epoll::add(&epoll, &self.bell, EventData::new_u64(BELL), EventFlags::IN | EventFlags::ET)?;
        let (mut events, mut buffer) = (Vec::with_capacity(256), [0; 4096]);
        loop {
            out.flush()?;
            self.asleep.store(true, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            let timeout = if answers.is_empty() { None } else { Some(rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 }) };
            events.clear();
            epoll::wait(&epoll, spare_capacity(&mut events), timeout.as_ref())?;
            self.asleep.store(false, Ordering::Relaxed);
            for event in &events {
                match event.data.u64() {
                    LISTENER => {
                        let (stream, _) = listener.accept()?;
                        stream.set_nonblocking(true)?;
                        stream.set_nodelay(true)?;
                        let mut clients = lock(&self.clients);
                        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
                        epoll::add(&epoll, &stream, EventData::new_u64(clients.len() as u64), flags)?;
                        clients.push(Arc::new(stream));
                    }
                    BELL => {}
                    number => {
                        let number = usize::try_from(number).map_err(io::Error::other)?;
                        let client = Arc::clone(&lock(&self.clients)[number]);
                        if (&*client).read(&mut buffer).is_ok_and(|read| buffer[..read].ends_with(b"\r\n\r\n")) {
                            self.under_way.fetch_add(1, Ordering::Relaxed);
                            out.put(number)?;
                        }
                    }
                }
            }
            for number in answers.try_iter().take(256) {
                let client = Arc::clone(&lock(&self.clients)[number]);
                answer(&client);
            }
        }
    }

    /// The HTTP library's thread.
    fn take(&self, stream: UnixStream) -> io::Result<()> {
        let mut reader = BufReader::with_capacity(LIBRARY_READ, stream);
        let mut head = [0; HEAD];
        loop {
            reader.read_exact(&mut head)?;
            let (number, _) = head.split_at(size_of::<usize>());
            lock(&self.taken).push_back(usize::from_ne_bytes(number.try_into().map_err(io::Error::other)?));
            self.came.notify_one();
        }
    }

    fn dispatch(&self, queue: &Sender<usize>) -> io::Result<()> {
        loop {
            let mut taken =
                self.came.wait_while(lock(&self.taken), |taken| taken.is_empty()).unwrap_or_else(PoisonError::into_inner);
            let number = taken.pop_front();
            drop(taken);
            if let Some(number) = number {
                queue.send(number).map_err(io::Error::other)?;
            }
        }
    }

    /// A worker.
    fn work(
        &self,
        mut stream: UnixStream,
        jobs: &Receiver<usize>,
        stop: &Receiver<()>,
        parcels: &Sender<usize>,
    ) -> io::Result<()> {
        let (mut batch, mut buffer) = (Vec::new(), vec![0; DEPTH * FRAME]);
        loop {
            let first = jobs.try_recv().ok().or_else(|| {
                select! {
                    recv(jobs) -> job => job.ok(),
                    recv(stop) -> _ => None,
                    default(IDLE) => None,
                }
            });
            batch.extend(first);
            if batch.is_empty() {
                continue;
            }
            let depth = (1 + jobs.len() / WORKERS).min(DEPTH);
            batch.extend(jobs.try_iter().take(depth - 1));
            send(&stream, &buffer[..batch.len() * FRAME], SendFlags::NOSIGNAL)?;
            let (mut answered, mut held) = (0, 0);
            while answered < batch.len() {
                poll(&mut [PollFd::new(&stream, PollFlags::IN)], None)?;
                held += stream.read(&mut buffer)?;
                for number in &batch[answered..answered + held / REPLY] {
                    self.reply(*number, parcels)?;
                }
                answered += held / REPLY;
                held %= REPLY;
            }
            batch.clear();
        }
    }

    /// Straight to a client that is alone, and else by the gate.
    fn reply(&self, number: usize, parcels: &Sender<usize>) -> io::Result<()> {
        let alone = self.under_way.fetch_sub(1, Ordering::Relaxed) == 1;
        if alone && self.asleep.load(Ordering::Relaxed) {
            let client = Arc::clone(&lock(&self.clients)[number]);
            answer(&client);
            return Ok(());
        }
        parcels.send(number).map_err(io::Error::other)?;
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::Relaxed) {
            rustix::io::write(&self.bell, &1_u64.to_ne_bytes())?;
        }
        Ok(())
    }
}

/// A client that has gone needs no answer.
fn answer(client: &TcpStream) {
    send(client.as_fd(), ANSWER, SendFlags::NOSIGNAL).unwrap_or_default();
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

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn named(name: &str, run: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<thread::JoinHandle<io::Result<()>>> {
    thread::Builder::new().name(name.into()).spawn(run)
}
