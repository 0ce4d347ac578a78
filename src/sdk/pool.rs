//! The plugin's connections to the host.

use super::kv::KvError;
use crate::protocol::frame::{EncodeError, FrameReader, ReadError, encode};
use crate::protocol::message::{Kv, KvOp, KvResult, Message};
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// The most connections the host takes of one plugin.
pub(super) const MAX_LINKS: usize = 64;

/// Connections to the host, each in use by one call at a time and kept for the next.
#[derive(Debug)]
pub(super) struct Pool {
    host_socket: PathBuf,
    links: Mutex<Links>,
    freed: Condvar,
}

#[derive(Debug, Default)]
struct Links {
    idle: Vec<Link>,
    /// All there are, idle or in use.
    open: usize,
}

/// One connection to the host.
#[derive(Debug)]
struct Link {
    reader: FrameReader<UnixStream>,
    request: Vec<u8>,
    last_id: u64,
}

impl Pool {
    /// A pool without connections: they are made as calls need them.
    pub(super) fn new(host_socket: PathBuf) -> Self {
        Self { host_socket, links: Mutex::default(), freed: Condvar::new() }
    }

    /// Sends a request and waits for the reply. It is sent once: where the connection fails, whether it was carried out is unknown.
    pub(super) fn call(&self, op: KvOp, body: &[u8]) -> Result<(KvResult, Vec<u8>), KvError> {
        let mut link = self.take()?;
        let reply = link.call(op, body);
        let mut links = self.lock();
        if let Err(KvError::Io(_)) = reply {
            // What is behind the failure has most likely met the idle ones too.
            links.open -= 1 + links.idle.len();
            links.idle.clear();
        } else {
            links.idle.push(link);
        }
        drop(links);
        self.freed.notify_one();
        reply
    }

    /// An idle connection, or a new one; with too many in use, the next that is free.
    fn take(&self) -> io::Result<Link> {
        let none = |links: &mut Links| links.idle.is_empty() && links.open >= MAX_LINKS;
        let mut links = self.freed.wait_while(self.lock(), none).unwrap_or_else(PoisonError::into_inner);
        if let Some(link) = links.idle.pop() {
            return Ok(link);
        }
        links.open += 1;
        drop(links);
        let connected = UnixStream::connect(&self.host_socket);
        if connected.is_err() {
            self.lock().open -= 1;
            self.freed.notify_one();
        }
        Ok(Link { reader: FrameReader::new(connected?), request: Vec::new(), last_id: 0 })
    }

    fn lock(&self) -> MutexGuard<'_, Links> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Link {
    fn call(&mut self, op: KvOp, body: &[u8]) -> Result<(KvResult, Vec<u8>), KvError> {
        self.last_id += 1;
        let id = self.last_id;
        self.request.clear();
        encode(&mut self.request, &Kv { id, op }, body).map_err(|error| match error {
            EncodeError::Body(_) => KvError::refused("too_large", error),
            EncodeError::Head(_) | EncodeError::Json(_) => KvError::refused("bad_request", error),
        })?;
        self.reader.stream().write_all(&self.request)?;
        loop {
            let frame = match self.reader.read() {
                Ok(frame) => frame,
                Err(ReadError::Io(error)) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(ReadError::Io(error)) => return Err(error.into()),
                Err(error @ ReadError::Length { .. }) => return Err(io::Error::new(io::ErrorKind::InvalidData, error).into()),
                Err(error) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, error).into()),
            };
            return match frame.message() {
                Ok(Message::Result(result)) if result.id == id => Ok((result, frame.body.to_vec())),
                Ok(Message::Error(failure)) if failure.id == id => {
                    Err(KvError::Refused { code: failure.code, message: failure.message, index: failure.index })
                }
                Ok(message) => Err(KvError::invalid(format!("{} {} is no reply to request {id}", message.kind(), message.id()))),
                Err(error) => Err(KvError::invalid(error)),
            };
        }
    }
}
