//! The gate: what stands between clients and the HTTP library inside of the host.
//!
//! Bytes of clients on one side, canonical requests to a Unix socket on the other. What passes is HTTP/1.1 that can be read in one way
//! only, complete or with its own framing, from clients that are held to sizes, times and numbers. One thread does it all, over epoll,
//! and waits for nothing else: no client, no plugin, no lock but those of what it leaves and lends, which nobody holds for long.
//!
//! Each request the gate passes carries the key that only the gate and the host know, so that nobody else is taken for the gate. One that
//! has come whole has it behind its target, with a `#`, the address at which the mailbox has the rest of it and takes the answer, in
//! hexadecimal, and, where it has a body, a dot and the body's length: no target that passes has a `#`, and whatever is a header costs the
//! HTTP library much more. One whose body is passed on as it comes has it in the header `x-plugrack`, with `http` or `https`, the client's
//! address, or `-`, the length of the body where the head does not say it otherwise, or `-`, and the address at which the mailbox counts it.
//!
//! Requests that have come whole all go over one connection, one behind the other without waiting for answers, and many of them in one
//! write: only their first lines go over it. Headers and bodies go by the mailbox, and answers by it or straight to their clients, in any
//! order. Requests whose bodies are passed on as they come have connections of their own, one request at a time.

pub(crate) mod backend;
pub(crate) mod backends;
pub(crate) mod body;
pub(crate) mod chunked;
pub(crate) mod client;
pub(crate) mod clients;
pub(crate) mod crowd;
pub(crate) mod door;
pub(crate) mod error_page;
pub(crate) mod event_loop;
#[cfg(test)]
pub(crate) mod fuzzing;
pub(crate) mod head;
pub(crate) mod limits;
pub(crate) mod mailbox;
pub(crate) mod outlet;
pub(crate) mod pace;
pub(crate) mod proxies;
pub(crate) mod refusal;
pub(crate) mod reply;
pub(crate) mod response;
pub(crate) mod slots;
pub(crate) mod sock_diag;
pub(crate) mod stream;
pub(crate) mod tls;
pub(crate) mod trouble;

pub(crate) use door::Door;
pub(crate) use limits::Limits;
pub(crate) use proxies::Networks;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use event_loop::EventLoop;
use mailbox::{Bell, Inbox};
use rustls::ServerConfig;
use std::io;
use std::net::IpAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The header by which the gate's requests are known. None of this name or one that begins so passes the gate.
pub(crate) const GATE_HEADER: &str = "x-plugrack";

/// What stands between a target and the key, see above.
pub(crate) const MARK: char = '#';

/// Letters of the key, 64 random bits: enough for a socket that only the host's own user can connect to.
pub(crate) const KEY: usize = 16;

/// Where a request is from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Origin {
    /// The client's address, where it is known.
    pub(crate) address: Option<IpAddr>,
    /// Whether the client has come by TLS.
    pub(crate) https: bool,
}

/// The header by which the host tells the gate the declared length of an answer that it sends in chunks, so that one that breaks off
/// can be told from one that ends.
pub(crate) const LENGTH_HEADER: &str = "x-plugrack-length";

/// The way in to the host.
#[derive(Debug, Clone)]
pub(crate) struct Backing {
    /// Where the host listens for the gate.
    pub(crate) socket: PathBuf,
    /// What the host knows the gate by.
    pub(crate) key: String,
    /// Most connections there may be.
    pub(crate) most: usize,
    /// Time for an answer to begin, after which the host itself is taken to have lost the request: it answers in less by itself.
    pub(crate) answer_time: AnswerTime,
    /// Where bodies are kept that do not fit in memory.
    pub(crate) spool: PathBuf,
}

/// Time beyond that of the host's own timeouts after which the gate takes a request for lost.
const ANSWER_MARGIN: Duration = Duration::from_secs(30);

/// How long the gate waits for an answer, shared with what gives plugins their times.
#[derive(Debug, Clone, Default)]
pub(crate) struct AnswerTime {
    /// The longest time of the host and its plugins, in milliseconds. It only grows.
    longest: Arc<AtomicU64>,
}

impl AnswerTime {
    /// Makes the gate wait for longer than `time`, which a plugin has from now on.
    pub(crate) fn outlast(&self, time: Duration) {
        self.longest.fetch_max(time.as_millis().try_into().unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// The time that the gate waits.
    pub(super) fn get(&self) -> Duration {
        Duration::from_millis(self.longest.load(Ordering::Relaxed)) + ANSWER_MARGIN
    }
}

/// What the gate is told.
pub(super) enum Order {
    /// Connections to the host are opened here from now on.
    Moved(PathBuf),
    /// New connections get this certificate.
    Certificate(Arc<ServerConfig>),
    /// No new connections; those there are end with their next answer. Told when no request waits for the beginning of its answer.
    Drain(Sender<()>),
    /// What is left to send is sent until then, and the gate ends. Told the end by the channel's.
    End(Instant, Sender<()>),
}

/// What becomes of the host's side, as the gate finds.
#[derive(Debug)]
pub(crate) enum Loss {
    /// Nobody takes connections at this socket, where the host should, or nobody answers there.
    Backing(PathBuf, String),
}

/// A running gate.
pub(crate) struct Gate {
    orders: Sender<Order>,
    bell: Arc<Bell>,
}

impl Gate {
    /// Starts a gate over doors that listen. Clients in `proxies` are trusted to say for whom they come. The first channel tells of losses and closes when the gate has ended for good.
    ///
    /// # Errors
    /// The thread, or what it waits by, cannot be had.
    pub(crate) fn start(
        doors: Vec<Door>,
        backing: Backing,
        limits: Limits,
        proxies: Networks,
        inbox: Inbox,
    ) -> io::Result<(Self, Receiver<Loss>)> {
        let (orders, ordered) = unbounded();
        let (lost, losses) = bounded(1);
        let bell = Arc::clone(inbox.bell());
        let run = move || {
            let ended =
                catch_unwind(AssertUnwindSafe(|| EventLoop::new(doors, backing, limits, proxies, lost, ordered, inbox)?.run()));
            match ended {
                Ok(Ok(())) => {}
                Ok(Err(error)) => log::error!("the gate has ended: {error}"),
                Err(_) => log::error!("the gate has panicked"),
            }
        };
        std::thread::Builder::new().name("gate".into()).spawn(run)?;
        Ok((Self { orders, bell }, losses))
    }

    /// Has connections to the host opened elsewhere.
    pub(crate) fn moved(&self, socket: PathBuf) {
        self.order(Order::Moved(socket));
    }

    /// Has new connections get a certificate.
    pub(crate) fn set_certificate(&self, config: Arc<ServerConfig>) {
        self.order(Order::Certificate(config));
    }

    /// Takes no new connections, and waits, until a deadline, for every request that came to be answered, or being answered.
    pub(crate) fn drain(&self, deadline: Instant) {
        let (sender, drained) = bounded(1);
        self.order(Order::Drain(sender));
        drained.recv_deadline(deadline).unwrap_or_default();
    }

    /// Sends what is left to send, until a deadline, and ends.
    pub(crate) fn end(&self, deadline: Instant) {
        let (sender, ended) = bounded(0);
        self.order(Order::End(deadline, sender));
        // Nothing is ever sent: the end is the channel's.
        ended.recv_deadline(deadline).unwrap_or_default();
    }

    fn order(&self, order: Order) {
        // A gate that is gone has said so, and its end is the host's.
        if self.orders.send(order).is_ok() {
            self.bell.ring();
        }
    }
}
