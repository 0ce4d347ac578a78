//! The channel by which answers come back to the event loop.
//!
//! Each part of an answer carries the address of its request. The event loop gives each number out once, so a part for a request that is
//! over, as when its client has gone, matches nothing and is dropped.

use super::framing::Framed;
use crate::lock::LockExt;
use crossbeam_channel::{Receiver, Select, Sender, TryRecvError, bounded, unbounded};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Largest answer in bytes, head and body, that is handed over whole: twice the body of one frame to a plugin. A larger one comes in
/// pieces, so that a slow client holds up the plugin and does not fill the host's memory.
pub(crate) const MAX_WHOLE: usize = 128 * 1024;

/// Largest piece of an answer in bytes.
pub(crate) const PIECE: usize = 64 * 1024;

/// Pieces of one answer that wait for the event loop.
const PIECES: usize = 4;

/// Buffers that are kept for the next large answer: new memory from the system costs more than filling it.
const SPARES: usize = 32;

/// Which request a part is for.
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

/// A part of an answer. All bytes are as they go on the wire.
pub(crate) enum ResponsePart {
    /// It begins with `bytes`, and goes on with `rest`, if there is more.
    Begun { begun: Begun, bytes: Vec<u8>, rest: Option<Pieces> },
    /// There is more in its pieces, or their end.
    More,
    /// The worker has begun it on the direct way, or gone on there; `unsent` is what the client did not take.
    Direct { begun: Begun, unsent: Vec<u8>, then: Then },
    /// The worker has taken a piece of the request's body, and there is room for another.
    BodyRoom,
}

/// How an answer goes on that was begun on the direct way.
pub(crate) enum Then {
    /// On the same way.
    Direct,
    /// In pieces.
    Pieces(Pieces),
    /// It is complete.
    Ended,
    /// It has broken off.
    Broken,
}

/// The side of the threads that answer. Each request has few parts in the channel, and there are no more requests than connections.
pub(crate) struct ResponseChannel {
    parts: Sender<(Address, ResponsePart)>,
    spares: Arc<Spares>,
    waker: Arc<Waker>,
}

/// The event loop's side.
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

    /// A buffer with what it holds from its last use, or a new one.
    fn take(&self) -> Vec<u8> {
        self.lock().pop().unwrap_or_default()
    }

    /// Keeps a buffer if it is large and there are few.
    fn keep(&self, buffer: Vec<u8>) {
        if buffer.capacity() >= PIECE {
            let mut spares = self.lock();
            if spares.len() < SPARES {
                spares.push(buffer);
            }
        }
    }
}

/// The pieces of an answer, as the worker puts them.
pub(super) struct PieceWriter {
    pieces: Option<Sender<Vec<u8>>>,
    told: Arc<AtomicBool>,
    ended: Arc<AtomicBool>,
    piece: Vec<u8>,
    address: Address,
    channel: Arc<ResponseChannel>,
}

/// The pieces of an answer, as the event loop takes them.
pub(crate) struct Pieces {
    pieces: Receiver<Vec<u8>>,
    /// Whether a [`ResponsePart::More`] is on its way.
    told: Arc<AtomicBool>,
    /// Whether the pieces are all of the answer.
    ended: Arc<AtomicBool>,
}

/// What comes next of an answer.
pub(crate) enum Next {
    Piece(Vec<u8>),
    /// Nothing has come yet.
    Nothing,
    /// It is complete.
    End,
    /// The rest will not come.
    Broken,
}

/// Wakes the event loop where it sleeps: most of the time it is awake, and the system call is spared.
pub(crate) struct Waker {
    file: OwnedFd,
    asleep: AtomicBool,
}

/// A channel: the side of the threads that answer, and the event loop's.
///
/// # Errors
/// There is no file for the waker.
pub(crate) fn response_channel() -> io::Result<(ResponseChannel, Responses)> {
    let (sender, parts) = unbounded();
    let spares = Arc::<Spares>::default();
    let file = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
    let waker = Arc::new(Waker { file, asleep: AtomicBool::new(false) });
    let channel = ResponseChannel { parts: sender, spares: Arc::clone(&spares), waker: Arc::clone(&waker) };
    Ok((channel, Responses { parts, spares, waker }))
}

impl ResponseChannel {
    /// Hands over a part of an answer.
    pub(super) fn put(&self, address: Address, part: ResponsePart) {
        // Without an event loop nobody waits for it.
        if self.parts.send((address, part)).is_ok() {
            self.waker.wake();
        }
    }

    /// The same for what the event loop need not know before it wakes anyway.
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

    /// The two ends of an answer that goes on in pieces.
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

    /// The same with what it holds from its last use, so that it can be read into without being filled with zeros.
    pub(super) fn used_buffer(&self) -> Vec<u8> {
        self.spares.take()
    }

    /// Takes a buffer back.
    pub(super) fn give_back(&self, buffer: Vec<u8>) {
        self.spares.keep(buffer);
    }
}

impl PieceWriter {
    /// Says that what was written is all.
    pub(super) fn end(self) {
        self.ended.store(true, Ordering::Release);
    }

    /// Puts a whole piece behind what has been written.
    pub(super) fn put(&mut self, piece: Vec<u8>) -> io::Result<()> {
        self.flush()?;
        self.send(piece)
    }

    /// Waits until the next piece can be put without a wait, or the event loop wants no more; false where that takes longer than `time`.
    pub(super) fn has_room_within(&self, time: Duration) -> bool {
        let Some(pieces) = self.pieces.as_ref().filter(|pieces| pieces.is_full()) else { return true };
        let mut room = Select::new();
        room.send(pieces);
        room.ready_timeout(time).is_ok()
    }

    fn send(&self, piece: Vec<u8>) -> io::Result<()> {
        let Some(pieces) = &self.pieces else { return Ok(()) };
        // Waits while the client takes no more, which the event loop bounds: it drops the other end for a client that is gone.
        pieces.send(piece).map_err(|_| io::ErrorKind::BrokenPipe)?;
        self.tell();
        Ok(())
    }

    /// Has the event loop look.
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

    /// Hands over what has been written.
    fn flush(&mut self) -> io::Result<()> {
        let piece = std::mem::take(&mut self.piece);
        if piece.is_empty() { Ok(()) } else { self.send(piece) }
    }
}

impl Drop for PieceWriter {
    /// The event loop sees the end, and whether the answer is complete.
    fn drop(&mut self) {
        self.pieces = None;
        self.tell();
    }
}

impl Pieces {
    /// Says that [`ResponsePart::More`] has come. To be called before the pieces are looked at.
    pub(crate) fn hear(&self) {
        self.told.swap(false, Ordering::AcqRel);
    }

    /// What comes next.
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
    /// What wakes the event loop.
    pub(crate) fn waker(&self) -> &Arc<Waker> {
        &self.waker
    }

    /// The next part.
    pub(crate) fn take(&self) -> Option<(Address, ResponsePart)> {
        self.parts.try_recv().ok()
    }

    /// Takes back the buffer that a part came in.
    pub(crate) fn give_back(&self, buffer: Vec<u8>) {
        self.spares.keep(buffer);
    }

    /// Whether there is no part.
    pub(crate) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }
}

impl Waker {
    /// To be called after something was put where the event loop looks before it sleeps.
    pub(crate) fn wake(&self) {
        // Either this thread sees the event loop asleep, or the event loop, which looks after it has said so, sees what was put.
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::Relaxed) {
            // It fails only when the counter is full, and then the event loop is awake.
            rustix::io::write(&self.file, &1_u64.to_ne_bytes()).ok();
        }
    }

    /// Says that the event loop is about to sleep, before it looks for the last time.
    pub(crate) fn go_to_sleep(&self) {
        self.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Says that the event loop is awake.
    pub(crate) fn wake_up(&self) {
        self.asleep.store(false, Ordering::Relaxed);
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
