//! The gate: the host's front on the network.
//!
//! One thread reads requests from all connections over epoll, holds clients to limits of size, time and number, routes each request, and
//! puts it into the queue of its plugin. It never waits for a client, a plugin or a disk, and for no lock that is held for long. Answers
//! come back by the response channel, or go from the worker straight to the client.

pub(crate) mod api_pool;
pub(crate) mod connection;
pub(crate) mod event_loop;
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

pub(crate) use limits::Limits;
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

/// What a gate needs beside its listeners.
pub(crate) struct Settings {
    /// The limits of clients.
    pub(crate) limits: Limits,
    /// Networks whose hosts are trusted to say for whom they come.
    pub(crate) proxies: Networks,
    /// The directory for bodies that do not fit in memory.
    pub(crate) spool: PathBuf,
    /// Time for an answer to begin, after which the host itself has lost the request.
    pub(crate) answer_time: AnswerTime,
}

/// What the gate is told.
pub(super) enum Order {
    /// New connections get this certificate.
    Certificate(Arc<ServerConfig>),
    /// No new connections; those there are end with their next answer. Told when no request waits for the beginning of its answer.
    Drain(Sender<()>),
    /// What is left to send is sent until then, and the gate ends. Told the end by the channel's.
    End(Instant, Sender<()>),
}

/// A running gate.
pub(crate) struct Gate {
    orders: Sender<Order>,
    waker: Arc<Waker>,
    router: Arc<Router>,
}

impl Gate {
    /// Starts a gate over sockets that listen. The channel that is returned closes when the gate has ended, be it by a fault.
    ///
    /// # Errors
    /// The thread cannot be had.
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

    /// Has new connections get a certificate.
    pub(crate) fn set_certificate(&self, config: Arc<ServerConfig>) {
        self.order(Order::Certificate(config));
    }

    /// Takes no new connections, and waits, until a deadline, for every request that came to be answered, or being answered.
    pub(crate) fn drain(&self, deadline: Instant) {
        let (sender, drained) = bounded(1);
        self.order(Order::Drain(sender));
        drained.recv_deadline(deadline).ok();
    }

    /// Refuses all requests from now on.
    pub(crate) fn close(&self) {
        self.router.close();
    }

    /// Sends what is left to send, until a deadline, and ends.
    pub(crate) fn end(&self, deadline: Instant) {
        let (sender, ended) = bounded(0);
        self.order(Order::End(deadline, sender));
        // Nothing is ever sent: the end is the channel's.
        ended.recv_deadline(deadline).ok();
    }

    fn order(&self, order: Order) {
        // A gate that is gone has said so, and its end is the host's.
        if self.orders.send(order).is_ok() {
            self.waker.wake();
        }
    }
}
