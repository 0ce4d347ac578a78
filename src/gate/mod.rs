//! The gate: the host's HTTP server for the network.
//!
//! One thread reads requests from all connections over epoll, limits size, time and number, routes each request, and puts it into the queue
//! of its plugin. It never waits for a client, a plugin or a disk, nor for a lock that is held for long. Answers come through the response
//! channel, or go from the worker directly to the client.

pub(crate) mod api_pool;
pub(crate) mod connection;
pub(crate) mod event_loop;
pub(crate) mod hosts;
pub(crate) mod limits;
pub(crate) mod listener;
pub(crate) mod log_topics;
pub(crate) mod min_rate;
pub(crate) mod pages;
pub(crate) mod per_address;
pub(crate) mod requests;
pub(crate) mod responses;
pub(crate) mod router;
pub(crate) mod sock_diag;
pub(crate) mod stream;
pub(crate) mod tls;
mod tunnel;
mod websocket;

pub(crate) use limits::ClientLimits;
pub(crate) use listener::Listener;
pub(crate) use router::Router;

use crate::http::proxies::Networks;
use crate::http::response_channel::{ResponseChannel, Responses, Waker};
use crate::plugins::plugin::AnswerTime;
use crate::util::threads;
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use event_loop::EventLoop;
use rustls::ServerConfig;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

/// Settings of a gate.
pub(crate) struct Settings {
    /// The limits of clients.
    pub(crate) limits: ClientLimits,
    /// Networks of trusted proxies.
    pub(crate) proxies: Networks,
    /// The directory for bodies that do not fit in memory.
    pub(crate) spool: PathBuf,
    /// Time for an answer to begin. After that the host has lost the request by a fault of its own.
    pub(crate) answer_time: AnswerTime,
}

/// Orders to the gate's thread.
pub(super) enum Order {
    /// Use these certificates for new connections.
    Certificates(Arc<ServerConfig>),
    /// Accept no new connections, and end existing ones with their next answer. The sender is told when each request has the beginning of
    /// its answer.
    Drain(Sender<()>),
    /// Send the remaining output until the deadline, and end. The channel closes at the end.
    End(Instant, Sender<()>),
}

/// A running gate.
pub(crate) struct Gate {
    orders: Sender<Order>,
    waker: Arc<Waker>,
    router: Arc<Router>,
}

impl Gate {
    /// Starts a gate with its listeners. The returned channel closes when the gate has ended, also by a fault.
    ///
    /// # Errors
    /// The thread cannot be created.
    pub(crate) fn start(
        listeners: Vec<Listener>,
        settings: Settings,
        router: Router,
        (channel, responses): (ResponseChannel, Responses),
    ) -> io::Result<(Self, Receiver<()>)> {
        let (orders, ordered) = unbounded();
        let (alive, ended) = bounded(0);
        let (router, waker) = (Arc::new(router), Arc::clone(responses.waker()));
        let own = Arc::clone(&router);
        let run = move || {
            let alive: Sender<()> = alive;
            if let Err(error) =
                EventLoop::new(listeners, settings, own, ordered, Arc::new(channel), responses).and_then(EventLoop::run)
            {
                log::error!("the gate has ended: {error}");
            }
            drop(alive);
        };
        threads::vital(std::thread::Builder::new().name("gate".into()), run)?;
        Ok((Self { orders, waker, router }, ended))
    }

    /// Sets the certificates of new connections.
    pub(crate) fn set_certificates(&self, config: Arc<ServerConfig>) {
        self.order(Order::Certificates(config));
    }

    /// Accepts no new connections, and waits until a deadline until the answer of every request has begun.
    pub(crate) fn drain(&self, deadline: Instant) {
        let (sender, drained) = bounded(1);
        self.order(Order::Drain(sender));
        drained.recv_deadline(deadline).ok();
    }

    /// Refuses all requests from now on.
    pub(crate) fn close(&self) {
        self.router.close();
    }

    /// Sends the remaining output until a deadline, and ends.
    pub(crate) fn end(&self, deadline: Instant) {
        let (sender, ended) = bounded(0);
        self.order(Order::End(deadline, sender));
        // Nothing is ever sent: the channel closes.
        ended.recv_deadline(deadline).ok();
    }

    fn order(&self, order: Order) {
        // If the gate has ended by a fault, the host ends as well.
        if self.orders.send(order).is_ok() {
            self.waker.wake();
        }
    }
}
