//! The channel for answers from workers to the event loop.
//!
//! Each part of an answer carries the address of its request. The event loop uses each number once, so a part for a request that has ended
//! matches nothing and is dropped.

use super::framing::Framed;
use super::websocket::{SocketEnd, ToClient};
use crate::lock::LockExt;
use crossbeam_channel::{Receiver, Select, Sender, TryRecvError, bounded, unbounded};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Largest answer, head and body in bytes, that is sent as one part: twice the body of one frame to a plugin. A larger one is sent in
/// pieces, so that a slow client slows the plugin down and does not fill the host's memory.
pub(crate) const MAX_WHOLE: usize = 128 * 1024;

/// Largest piece of an answer in bytes.
pub(crate) const PIECE: usize = 64 * 1024;

/// Capacity of an answer's channel in pieces.
const PIECES: usize = 4;

/// Bytes of an answer in pieces that the event loop takes without waiting for the client: a full channel, and the piece that is being sent.
pub(crate) const MAX_AHEAD: u64 = ((PIECES + 1) * PIECE) as u64;

/// Buffers kept for further large answers: new memory from the system costs more than filling it.
const SPARES: usize = 32;

/// The request to which a part belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Address {
    /// The connection's key in the event loop, as a number.
    pub(crate) connection: u64,
    /// The request's number.
    pub(crate) request: u64,
}

/// The beginning of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Begun {
    pub(crate) status: u16,
    pub(crate) at: Instant,
    pub(crate) framed: Framed,
}

/// A part of an answer. All bytes are as on the wire.
pub(crate) enum ResponsePart {
    /// The plugin has switched to another protocol. `bytes` is the response for the client, and what followed it.
    Upgraded { begun: Begun, bytes: Vec<u8>, other: OtherProtocol },
    /// Something for the client of a socket, which has no request any more.
    Socket(ToClient),
    /// The head of an interim response (1xx).
    Interim(Vec<u8>),
    /// Its beginning, and the channel for the rest, if there is more.
    Begun { begun: Begun, bytes: Vec<u8>, rest: Option<Pieces> },
    /// The channel has more pieces, or their end.
    More,
    /// The worker has sent it directly; `unsent` is what the client did not take.
    Direct { begun: Begun, unsent: Vec<u8>, then: Then },
    /// There is room for another piece of the request's body.
    BodyRoom,
}

/// What a client is connected with after a switch to another protocol.
pub(crate) enum OtherProtocol {
    /// An application, on this connection to it.
    Tunnel(OwnedFd),
    /// A plugin, by messages. `credit` is what the plugin takes of them at first.
    WebSocket { end: SocketEnd, credit: u64 },
}

/// How an answer continues that was begun directly.
pub(crate) enum Then {
    /// Directly.
    Direct,
    /// In pieces.
    Pieces(Pieces),
    /// It is complete.
    Ended,
    /// It was aborted.
    Broken,
}

/// The workers' end. The channel has no limit of its own: each request has few parts in it, and there are no more requests than
/// connections.
pub(crate) struct ResponseChannel {
    parts: Sender<(Address, ResponsePart)>,
    spares: Arc<Spares>,
    waker: Arc<Waker>,
}

/// The event loop's end.
pub(crate) struct Responses {
    parts: Receiver<(Address, ResponsePart)>,
    spares: Arc<Spares>,
    waker: Arc<Waker>,
}

/// Buffers for large answers. The one returned last is taken first, since it is still in the processor's cache.
#[derive(Default)]
struct Spares(Mutex<Vec<Vec<u8>>>);

impl Spares {
    fn lock(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.0.locked()
    }

    /// A used buffer with its old content, or a new one.
    fn take(&self) -> Vec<u8> {
        self.lock().pop().unwrap_or_default()
    }

    /// Keeps a large buffer for reuse, unless there are enough.
    fn keep(&self, buffer: Vec<u8>) {
        if buffer.capacity() >= PIECE {
            let mut spares = self.lock();
            if spares.len() < SPARES {
                spares.push(buffer);
            }
        }
    }
}

/// The worker's end of an answer in pieces.
pub(super) struct PieceWriter {
    pieces: Option<Sender<Vec<u8>>>,
    told: Arc<AtomicBool>,
    ended: Arc<AtomicBool>,
    piece: Vec<u8>,
    address: Address,
    channel: Arc<ResponseChannel>,
}

/// The event loop's end of an answer in pieces.
pub(crate) struct Pieces {
    pieces: Receiver<Vec<u8>>,
    /// Whether a [`ResponsePart::More`] is on its way.
    told: Arc<AtomicBool>,
    /// Whether the answer is complete with these pieces.
    ended: Arc<AtomicBool>,
}

/// The next of an answer's pieces.
pub(crate) enum Next {
    Piece(Vec<u8>),
    /// There is none yet.
    Nothing,
    /// It is complete.
    End,
    /// The answer was aborted.
    Broken,
}

/// Wakes the event loop if it sleeps. Usually it is awake, which saves the system call.
pub(crate) struct Waker {
    file: OwnedFd,
    asleep: AtomicBool,
}

/// Creates the channel: the workers' end and the event loop's.
///
/// # Errors
/// There is no file descriptor for the waker.
pub(crate) fn response_channel() -> io::Result<(ResponseChannel, Responses)> {
    let (sender, parts) = unbounded();
    let spares = Arc::<Spares>::default();
    let file = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
    let waker = Arc::new(Waker { file, asleep: AtomicBool::new(false) });
    let channel = ResponseChannel { parts: sender, spares: Arc::clone(&spares), waker: Arc::clone(&waker) };
    Ok((channel, Responses { parts, spares, waker }))
}

impl ResponseChannel {
    /// Sends a part of an answer, and wakes the event loop.
    pub(super) fn put(&self, address: Address, part: ResponsePart) {
        // If the event loop has ended, the part is not needed.
        if self.parts.send((address, part)).is_ok() {
            self.waker.wake();
        }
    }

    /// Sends a part without waking the event loop.
    pub(super) fn put_quietly(&self, address: Address, part: ResponsePart) {
        self.parts.send((address, part)).ok();
    }

    /// Wakes the event loop if it sleeps.
    pub(super) fn wake(&self) {
        self.waker.wake();
    }

    /// Whether the event loop sleeps now.
    pub(super) fn is_asleep(&self) -> bool {
        self.waker.asleep.load(Ordering::Relaxed)
    }

    /// The two ends of an answer in pieces.
    pub(super) fn pieces(self: &Arc<Self>, address: Address) -> (PieceWriter, Pieces) {
        let (sender, pieces) = bounded(PIECES);
        let (told, ended) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let taken = Pieces { pieces, told: Arc::clone(&told), ended: Arc::clone(&ended) };
        let channel = Arc::clone(self);
        (PieceWriter { pieces: Some(sender), told, ended, piece: Vec::new(), address, channel }, taken)
    }

    /// An empty buffer for a large answer.
    pub(super) fn buffer(&self) -> Vec<u8> {
        let mut buffer = self.used_buffer();
        buffer.clear();
        buffer
    }

    /// A buffer with its old content, so that it can be read into without being zeroed.
    pub(super) fn used_buffer(&self) -> Vec<u8> {
        self.spares.take()
    }

    /// Takes a buffer back.
    pub(super) fn give_back(&self, buffer: Vec<u8>) {
        self.spares.keep(buffer);
    }
}

impl PieceWriter {
    /// Marks the answer as complete.
    pub(super) fn end(self) {
        self.ended.store(true, Ordering::Release);
    }

    /// Appends a whole piece.
    pub(super) fn put(&mut self, piece: Vec<u8>) -> io::Result<()> {
        self.flush()?;
        self.send(piece)
    }

    /// Waits until the next piece can be sent without a wait, or the event loop needs no more; false if that takes longer than `time`.
    pub(super) fn has_room_within(&self, time: Duration) -> bool {
        let Some(pieces) = self.pieces.as_ref().filter(|pieces| pieces.is_full()) else { return true };
        let mut room = Select::new();
        room.send(pieces);
        room.ready_timeout(time).is_ok()
    }

    fn send(&self, piece: Vec<u8>) -> io::Result<()> {
        let Some(pieces) = &self.pieces else { return Ok(()) };
        // Blocks while the client takes no more. The event loop bounds this: it drops its end for a client that is too slow or has left.
        pieces.send(piece).map_err(|_| io::ErrorKind::BrokenPipe)?;
        self.tell();
        Ok(())
    }

    /// Notifies the event loop.
    fn tell(&self) {
        if !self.told.swap(true, Ordering::AcqRel) {
            self.channel.put(self.address, ResponsePart::More);
        }
    }
}

impl Write for PieceWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.piece.capacity() == 0 {
            self.piece = self.channel.buffer();
        }
        let n = bytes.len().min(PIECE - self.piece.len());
        self.piece.extend_from_slice(&bytes[..n]);
        if self.piece.len() == PIECE {
            self.flush()?;
        }
        Ok(n)
    }

    /// Sends what was written.
    fn flush(&mut self) -> io::Result<()> {
        let piece = std::mem::take(&mut self.piece);
        if piece.is_empty() { Ok(()) } else { self.send(piece) }
    }
}

impl Drop for PieceWriter {
    /// The event loop then sees the end, and whether the answer is complete.
    fn drop(&mut self) {
        self.pieces = None;
        self.tell();
    }
}

impl Pieces {
    /// Notes that [`ResponsePart::More`] was received. Call this before reading the pieces.
    pub(crate) fn hear(&self) {
        self.told.swap(false, Ordering::AcqRel);
    }

    /// Takes the next piece, or tells why there is none.
    pub(crate) fn next(&self) -> Next {
        match self.pieces.try_recv() {
            Ok(piece) => Next::Piece(piece),
            Err(TryRecvError::Empty) => Next::Nothing,
            Err(TryRecvError::Disconnected) if self.ended.load(Ordering::Acquire) => Next::End,
            Err(TryRecvError::Disconnected) => Next::Broken,
        }
    }
}

impl Responses {
    /// The waker of the event loop.
    pub(crate) fn waker(&self) -> &Arc<Waker> {
        &self.waker
    }

    /// The next part.
    pub(crate) fn take(&self) -> Option<(Address, ResponsePart)> {
        self.parts.try_recv().ok()
    }

    /// Takes back the buffer of a part.
    pub(crate) fn give_back(&self, buffer: Vec<u8>) {
        self.spares.keep(buffer);
    }

    /// Whether there is no part.
    pub(crate) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }
}

impl Waker {
    /// Wakes the event loop if it sleeps. Call this after something was put into a channel that it checks before it sleeps.
    pub(crate) fn wake(&self) {
        // Either this thread sees the flag and wakes the event loop, or the event loop, which checks the channels after it has set the
        // flag, sees what was put.
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::Relaxed) {
            // It fails only if the counter is full, and then the event loop is awake.
            rustix::io::write(&self.file, &1_u64.to_ne_bytes()).ok();
        }
    }

    /// Sets the flag that the event loop is about to sleep, before its last check of the channels.
    pub(crate) fn go_to_sleep(&self) {
        self.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Clears the flag.
    pub(crate) fn wake_up(&self) {
        self.asleep.store(false, Ordering::Relaxed);
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
