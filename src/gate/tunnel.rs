//! Tunnels: after a switch to another protocol, such as WebSocket, the event loop passes bytes between a client and an application.
//!
//! A tunnel has no thread. It holds at most one read in each direction: while one side takes nothing, the other is not read. The end of one
//! direction is passed on, and the other goes on until its own end.

use super::connection::{ConnectionKey, Phase};
use super::event_loop::{EventLoop, INCOMING, SCRATCH, application_event};
use super::log_topics::LogTopic;
use super::requests::Step;
use crate::http::errors;
use crate::http::request_end::Outcome;
use crate::http::response_channel::{Begun, OtherProtocol};
use crate::system::rlimits;
use rustix::event::epoll::{self, EventFlags};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown, send, shutdown};
use std::io;

/// The application's side of a tunnel. The client's is the connection itself.
pub(super) struct Tunnel {
    application: OwnedFd,
    /// Whether a read may find more.
    readable: bool,
    /// Whether the application has ended its sending, and whether the client was told.
    ended: bool,
    told_client: bool,
    /// Bytes for the application; the first `sent` were sent.
    out: Vec<u8>,
    sent: usize,
    /// Whether the application was told that the client has ended its sending.
    told_application: bool,
}

impl Tunnel {
    /// Sends what waits for the application, and then these bytes. Keeps what it does not take.
    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        loop {
            let waiting = &self.out[self.sent..];
            let next = if waiting.is_empty() { rest } else { waiting };
            if next.is_empty() {
                break;
            }
            match send(&self.application, next, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(n) if waiting.is_empty() => rest = &rest[n..],
                Ok(n) => self.sent += n,
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if self.sent == self.out.len() {
            self.out.clear();
            self.sent = 0;
        }
        self.out.extend_from_slice(rest);
        Ok(())
    }

    /// Reads what the application has sent. None if there is nothing now; 0 at its end.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        match rustix::io::read(&self.application, buffer) {
            Ok(0) => {
                self.ended = true;
                Ok(Some(0))
            }
            Ok(n) => Ok(Some(n)),
            Err(Errno::AGAIN) => {
                self.readable = false;
                Ok(None)
            }
            Err(Errno::INTR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl EventLoop {
    /// Whether another tunnel may be opened.
    pub(super) fn has_room_for_tunnel(&mut self) -> bool {
        let most = self.limits.max_tunnels.of(self.limits.max_connections);
        let has_room = self.tunnels < most as usize;
        if !has_room {
            self.log_topics.hit(LogTopic::Tunnels, self.now, || {
                format!("all {most} tunnels are open, and another was refused (serve --max-tunnels)")
            });
        }
        has_room
    }

    /// Sends a plugin's response, and what followed it, and connects the client with the plugin by the other protocol.
    pub(super) fn switch_protocol(&mut self, key: ConnectionKey, begun: Begun, bytes: &[u8], other: OtherProtocol) {
        if !self.has_room_for_tunnel() {
            return self.refuse(key, errors::TUNNELS_FULL);
        }
        if let OtherProtocol::Tunnel(application) = &other
            && !self.watch_application(key, application)
        {
            return;
        }
        self.begin_answer(key, begun);
        self.send(key, bytes);
        self.end_exchange(key, Outcome::Complete);
        let Some(connection) = self.connections.get_mut(key) else { return };
        // It counts as a tunnel, and not among the requests of its plugin.
        connection.slot = None;
        self.tunnels += 1;
        match other {
            OtherProtocol::Tunnel(application) => self.open_tunnel(key, application),
            OtherProtocol::WebSocket { end, credit } => self.open_socket(key, end, credit),
        }
        self.drive(key);
    }

    /// Has events of an application's connection announced. False if the request was refused.
    fn watch_application(&mut self, key: ConnectionKey, application: &OwnedFd) -> bool {
        let watched = rustix::io::ioctl_fionbio(application, true)
            .and_then(|()| epoll::add(&self.epoll, application, application_event(key), INCOMING | EventFlags::OUT));
        if let Err(error) = watched {
            let explained = rlimits::explain("a tunnel was not opened", &error.into()).0;
            self.log_topics.hit(LogTopic::Resources, self.now, || explained);
            self.refuse(key, errors::NO_ROOM);
            return false;
        }
        true
    }

    /// Makes a connection a tunnel.
    fn open_tunnel(&mut self, key: ConnectionKey, application: OwnedFd) {
        let deadline = self.limits.tunnel_idle.map(|idle| self.now + idle);
        let Some(connection) = self.connections.get_mut(key) else { return };
        connection.phase = Phase::Tunnel;
        connection.deadline = deadline;
        connection.tunnel = Some(Box::new(Tunnel {
            application,
            readable: true,
            ended: false,
            told_client: false,
            out: Vec::new(),
            sent: 0,
            told_application: false,
        }));
    }

    /// Handles an event of the application's side of a tunnel.
    pub(super) fn application_ready(&mut self, key: ConnectionKey, flags: EventFlags) {
        let Some(tunnel) = self.connections.get_mut(key).and_then(|connection| connection.tunnel.as_mut()) else { return };
        if flags.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR) {
            tunnel.readable = true;
        }
        self.drive(key);
    }

    /// Passes bytes on in both directions.
    pub(super) fn pump(&mut self, key: ConnectionKey) -> Step {
        let passed = match (self.pump_up(key), self.pump_down(key)) {
            (Ok(up), Ok(down)) => up || down,
            // A side that is reset takes the other with it, so that it does not look like an end.
            _ => {
                if let Some(connection) = self.connections.get(key) {
                    connection.stream.break_off().ok();
                }
                self.close(key);
                return Step::Wait;
            }
        };
        let now = self.now;
        let Some(connection) = self.connections.get_mut(key) else { return Step::Wait };
        if passed {
            connection.deadline = self.limits.tunnel_idle.map(|idle| now + idle);
            return Step::Again;
        }
        if connection.tunnel.as_ref().is_some_and(|tunnel| tunnel.told_client && tunnel.told_application) {
            self.close(key);
        }
        Step::Wait
    }

    /// From the client to the application. True if bytes or an end were passed on.
    fn pump_up(&mut self, key: ConnectionKey) -> io::Result<bool> {
        let Self { connections, scratch, .. } = self;
        let Some(connection) = connections.get_mut(key) else { return Ok(false) };
        let Some(mut tunnel) = connection.tunnel.take() else { return Ok(false) };
        let mut pass = || {
            tunnel.send(&[])?;
            if !tunnel.out.is_empty() || tunnel.told_application {
                return Ok(false);
            }
            // What the client has sent behind its request.
            let early = std::mem::take(&mut connection.input);
            if !early.is_empty() {
                tunnel.send(&early)?;
                return Ok(true);
            }
            if connection.readable {
                let n = connection.read(&mut scratch[..SCRATCH])?;
                if n > 0 {
                    tunnel.send(&scratch[..n])?;
                    return Ok(true);
                }
            }
            if connection.ended {
                tunnel.told_application = true;
                // If the application has closed its end already, this fails.
                shutdown(&tunnel.application, Shutdown::Write).ok();
                return Ok(true);
            }
            Ok(false)
        };
        let passed = pass();
        connection.tunnel = Some(tunnel);
        passed
    }

    /// From the application to the client. True if bytes or an end were passed on.
    fn pump_down(&mut self, key: ConnectionKey) -> io::Result<bool> {
        let Self { connections, scratch, .. } = self;
        let Some(connection) = connections.get_mut(key) else { return Ok(false) };
        let Some(mut tunnel) = connection.tunnel.take() else { return Ok(false) };
        let mut pass = || {
            connection.flush()?;
            if !connection.is_flushed() || tunnel.told_client {
                return Ok(false);
            }
            if tunnel.readable
                && !tunnel.ended
                && let Some(n) = tunnel.read(&mut scratch[..SCRATCH])?
                && n > 0
            {
                connection.send(&scratch[..n])?;
                return Ok(true);
            }
            if tunnel.ended {
                tunnel.told_client = true;
                // The client may have closed its end already.
                connection.stream.end_sending().ok();
                return Ok(true);
            }
            Ok(false)
        };
        let passed = pass();
        connection.tunnel = Some(tunnel);
        passed
    }
}
