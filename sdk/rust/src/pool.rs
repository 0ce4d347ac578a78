//! The plugin's connections to the host.

use super::group::{Call, Group, Groups, Reply};
use super::kv::KvError;
use crate::lock::LockExt;
use crate::protocol::frame::{FrameReader, ReadError};
use crate::protocol::message::{KvOp, Message};
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

/// Groups of writes under way at once. The host has a sync for each; all that come meanwhile share the next.
const WRITE_GROUPS: usize = 1;

/// Groups of reads under way at once: as many as the host reads at the same time.
const READ_GROUPS: usize = 4;

/// Connections to the host, each in use by one group of calls at a time and kept for the next. A read does not go with writes: it
/// would have to wait for them.
#[derive(Debug)]
pub(super) struct Pool {
    host_socket: PathBuf,
    idle: Mutex<Vec<HostConnection>>,
    /// Of requests: each has its own, so that a reply that comes twice is seen to be nobody's.
    last_id: AtomicU64,
    writes: Groups,
    reads: Groups,
}

/// One connection to the host.
type HostConnection = FrameReader<UnixStream>;

impl Pool {
    /// A pool without connections: they are made as calls need them.
    pub(super) fn new(host_socket: PathBuf) -> Self {
        Self {
            host_socket,
            idle: Mutex::default(),
            last_id: AtomicU64::new(0),
            writes: Groups::new(WRITE_GROUPS),
            reads: Groups::new(READ_GROUPS),
        }
    }

    /// Sends a request and waits for the reply. It is sent once: where the connection fails, whether it was carried out is unknown.
    pub(super) fn call(&self, op: KvOp, body: &[u8]) -> Result<Reply, KvError> {
        let groups = if op.is_read() { &self.reads } else { &self.writes };
        let id = self.last_id.fetch_add(1, Ordering::Relaxed) + 1;
        groups.call(id, op, body, |group| self.carry(group))
    }

    /// Takes a group to the host, and brings each of its calls a reply.
    fn carry(&self, group: &Group) {
        let mut connection = self.send(&group.requests);
        for call in &group.calls {
            let reply = match &mut connection {
                Ok(connection) => receive(connection, call),
                Err(error) => Err(same(error).into()),
            };
            if let Err(KvError::Io(error)) = &reply
                && connection.is_ok()
            {
                connection = Err(same(error));
            }
            call.reply(reply);
        }
        match connection {
            Ok(connection) => self.lock().push(connection),
            // What is behind the failure has most likely met the idle ones too.
            Err(_) => self.lock().clear(),
        }
    }

    fn send(&self, requests: &[u8]) -> io::Result<HostConnection> {
        let idle = self.lock().pop();
        let mut connection = idle.map_or_else(|| UnixStream::connect(&self.host_socket).map(FrameReader::new), Ok)?;
        connection.stream().write_all(requests)?;
        Ok(connection)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<HostConnection>> {
        self.idle.locked()
    }
}

/// Waits for the reply to a request.
fn receive(connection: &mut HostConnection, call: &Call) -> Result<Reply, KvError> {
    let id = call.id;
    loop {
        let frame = match connection.read() {
            Ok(frame) => frame,
            Err(ReadError::Io(error)) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(ReadError::Io(error)) => return Err(error.into()),
            Err(error @ ReadError::Length { .. }) => return Err(io::Error::new(io::ErrorKind::InvalidData, error).into()),
            Err(error) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, error).into()),
        };
        return match frame.message() {
            Ok(Message::Result(result)) if result.id == id => match result.fault(call.op, frame.size) {
                Some(fault) => Err(KvError::invalid(fault)),
                None => Ok((result, frame.body.to_vec())),
            },
            Ok(Message::Error(failure)) if failure.id == id => {
                Err(KvError::Refused { code: failure.code, message: failure.message, index: failure.index })
            }
            Ok(message) => Err(KvError::invalid(format!("{} came where the reply to request {id} was due", message.named()))),
            Err(error) => Err(KvError::invalid(error)),
        };
    }
}

/// An error told once more: each call of a group has it.
fn same(error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::frame::encode;
    use crate::protocol::message::{Failure, KvResult, SetOp};
    use serde::Serialize;
    use std::os::unix::net::UnixListener;
    use std::thread;
    use std::time::Duration;

    fn pool() -> (tempfile::TempDir, Pool, UnixListener) {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("host.sock");
        let host = UnixListener::bind(&socket).unwrap();
        (dir, Pool::new(socket), host)
    }

    fn set(pool: &Pool, key: &str) -> Result<Reply, KvError> {
        pool.call(KvOp::Set(SetOp { key: key.into(), ..SetOp::default() }), b"v")
    }

    fn accept(host: &UnixListener) -> HostConnection {
        let (stream, _) = host.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        FrameReader::new(stream)
    }

    /// The id of the next request, which is on this key.
    fn asked(connection: &mut HostConnection, key: &str) -> u64 {
        let message = connection.read().unwrap().message().unwrap();
        match &message {
            Message::Kv(kv) => match &kv.op {
                KvOp::Set(SetOp { key: asked, .. }) | KvOp::Get { key: asked } if asked == key => kv.id,
                _ => panic!("{message:?} is not on {key}"),
            },
            _ => panic!("{message:?} is no call"),
        }
    }

    fn send(connection: &mut HostConnection, message: &impl Serialize) {
        let mut frame = Vec::new();
        encode(&mut frame, message, b"").unwrap();
        connection.stream().write_all(&frame).unwrap();
    }

    fn done(id: u64) -> KvResult {
        KvResult { id, found: Some(false), rev: Some(id), ..KvResult::default() }
    }

    #[test]
    fn each_of_a_group_has_its_own_outcome() {
        let (_dir, pool, host) = pool();
        thread::scope(|scope| {
            let pool = &pool;
            let start = |key| thread::Builder::new().spawn_scoped(scope, move || set(pool, key)).unwrap();
            let first = start("first");
            let mut connection = accept(&host);
            let id = asked(&mut connection, "first");
            let threads = ["a", "b", "c", "d"].map(|key| {
                let thread = start(key);
                pool.writes.wait_for(1 + (key.as_bytes()[0] - b'a') as usize);
                thread
            });
            send(&mut connection, &done(id));
            let ids = ["a", "b", "c", "d"].map(|key| asked(&mut connection, key));
            send(&mut connection, &done(ids[0]));
            send(&mut connection, &Failure { id: ids[1], code: "conflict".into(), message: "so".into(), index: None });
            drop(connection);
            assert_eq!(first.join().unwrap().unwrap().0.rev, Some(id));
            let [a, b, c, d] = threads.map(|thread| thread.join().unwrap());
            assert_eq!(a.unwrap().0.rev, Some(ids[0]));
            assert_eq!(b.unwrap_err().code(), Some("conflict"));
            for lost in [c, d] {
                assert!(matches!(&lost, Err(KvError::Io(error)) if error.kind() == io::ErrorKind::UnexpectedEof), "{lost:?}");
            }
            // The next begins anew.
            let next = start("next");
            let mut connection = accept(&host);
            let id = asked(&mut connection, "next");
            send(&mut connection, &done(id));
            next.join().unwrap().unwrap();
        });
    }

    #[test]
    fn a_read_does_not_wait_for_a_write() {
        let (_dir, pool, host) = pool();
        thread::scope(|scope| {
            let write = thread::Builder::new().spawn_scoped(scope, || set(&pool, "w")).unwrap();
            let mut writes = accept(&host);
            let id = asked(&mut writes, "w");
            let read = thread::Builder::new().spawn_scoped(scope, || pool.call(KvOp::Get { key: "r".into() }, b"")).unwrap();
            let mut reads = accept(&host);
            let asked = asked(&mut reads, "r");
            send(&mut reads, &done(asked));
            read.join().unwrap().unwrap();
            send(&mut writes, &done(id));
            write.join().unwrap().unwrap();
        });
    }
}
