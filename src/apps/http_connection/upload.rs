//! The rest of a request's body while its answer, which has begun already, is received: an application may answer as it reads. A thread of
//! its own sends it, so that neither of the two waits for the other.

use super::put_chunk;
use crate::http::body::Body;
use crate::util::threads::timespec;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::SendFlags;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

/// Interval at which the thread looks whether it is to stop.
const TICK: Duration = Duration::from_millis(100);

/// Time without progress after which it stops: that of every streaming body.
const IDLE: Duration = Duration::from_secs(60);

/// Bytes to read and send at once.
const PIECE: usize = 64 * 1024;

/// Stack size of the thread in bytes: its buffers are on the heap.
const STACK: usize = 128 * 1024;

/// The states of the thread.
const RUNS: u8 = 0;
const IS_DONE: u8 = 1;
const IS_TO_STOP: u8 = 2;

/// Such a thread. If this is dropped, it stops.
pub(super) struct Upload(Arc<AtomicU8>);

impl Upload {
    /// Sends bytes that are queued already, and then the body.
    ///
    /// # Errors
    /// There is no file descriptor or thread for it.
    pub(super) fn start(stream: &OwnedFd, queued: Vec<u8>, body: Body, chunked: bool) -> io::Result<Self> {
        let stream = stream.try_clone()?;
        let state = Arc::new(AtomicU8::new(RUNS));
        let upload = Self(Arc::clone(&state));
        let send = move || {
            // If it fails, the connection is not used again, and the answer tells why.
            if send(&stream, queued, body, chunked, &state).is_ok() {
                state.compare_exchange(RUNS, IS_DONE, Ordering::AcqRel, Ordering::Relaxed).ok();
            }
        };
        std::thread::Builder::new().name("upload".into()).stack_size(STACK).spawn(send)?;
        Ok(upload)
    }

    /// Whether everything was sent.
    pub(super) fn is_done(&self) -> bool {
        self.0.load(Ordering::Acquire) == IS_DONE
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        self.0.compare_exchange(RUNS, IS_TO_STOP, Ordering::AcqRel, Ordering::Relaxed).ok();
    }
}

fn send(stream: &OwnedFd, mut out: Vec<u8>, mut body: Body, chunked: bool, state: &AtomicU8) -> io::Result<()> {
    let mut piece = vec![0; PIECE];
    loop {
        send_all(stream, &out, state)?;
        let length = body.read(&mut piece)?;
        out.clear();
        match (chunked, length) {
            (true, 0) => return send_all(stream, b"0\r\n\r\n", state),
            (false, 0) => return Ok(()),
            (true, _) => put_chunk(&mut out, &piece[..length]),
            (false, _) => out.extend_from_slice(&piece[..length]),
        }
    }
}

fn send_all(stream: &OwnedFd, mut rest: &[u8], state: &AtomicU8) -> io::Result<()> {
    let mut deadline = Instant::now() + IDLE;
    while !rest.is_empty() {
        match rustix::net::send(stream, rest, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(sent) => {
                rest = &rest[sent..];
                deadline = Instant::now() + IDLE;
            }
            Err(Errno::AGAIN) if state.load(Ordering::Acquire) == RUNS && Instant::now() < deadline => {
                // Whatever comes of it, the next attempt to send shows it.
                poll(&mut [PollFd::new(stream, PollFlags::OUT)], Some(&timespec(TICK))).ok();
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
