//! What the gate and the host's other threads hand each other, which are the same process: no connection lies between them.
//!
//! A request that goes over the shared connection has an address: its body is left here under it, and its answer put here. The gate gives
//! each address out once, so what comes for a request that is over, as when its client has gone, is nobody's and dropped.

use super::body::Body;
use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded, unbounded};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::collections::HashMap;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Largest answer in bytes, head and body, that is handed over whole: twice a body that goes in one frame to a plugin. A larger one comes
/// in pieces, so that a slow client holds up the plugin and not the host's memory.
pub(crate) const MAX_WHOLE: usize = 128 * 1024;

/// Largest piece of one that comes in pieces, in bytes, and how many of them wait for the gate.
pub(crate) const PIECE: usize = 64 * 1024;
const PIECES: usize = 4;

/// Buffers that are kept for the next large answer: to have new memory from the system costs more than to fill it.
const SPARES: usize = 32;

/// An answer, as it goes on the wire.
pub(crate) enum Parcel {
    /// All of it.
    Whole(Vec<u8>),
    /// Where it comes from, piece by piece.
    Stream(Pieces),
    /// More of it has come there, or its end.
    More,
}

/// Where the host's threads put answers, and find bodies. Of each request one parcel waits at most, or with [`Parcel::More`] two, and
/// there are no more requests than clients.
pub(crate) struct Mailbox {
    parcels: Sender<(u64, Parcel)>,
    spares: Receiver<Vec<u8>>,
    bodies: Arc<Bodies>,
    bell: Arc<Bell>,
}

/// The gate's side of it.
pub(crate) struct Inbox {
    parcels: Receiver<(u64, Parcel)>,
    spares: Sender<Vec<u8>>,
    bodies: Arc<Bodies>,
    bell: Arc<Bell>,
}

/// The bodies of requests that are on their way. Locked for no longer than it takes to put one there or take it.
#[derive(Default)]
struct Bodies(Mutex<HashMap<u64, Body>>);

impl Bodies {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Body>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An answer that goes on, as it is put there.
pub(crate) struct PieceWriter {
    pieces: Option<Sender<Vec<u8>>>,
    told: Arc<AtomicBool>,
    piece: Vec<u8>,
    address: u64,
    mailbox: Arc<Mailbox>,
}

/// An answer that goes on, as the gate takes it.
pub(crate) struct Pieces {
    pieces: Receiver<Vec<u8>>,
    /// Whether it was told of more that it has not looked for yet.
    told: Arc<AtomicBool>,
}

/// Wakes the gate, where it sleeps: most of the time it is awake, and nothing need be said.
pub(super) struct Bell {
    file: OwnedFd,
    asleep: AtomicBool,
}

/// A mailbox and its other side.
///
/// # Errors
/// There is no file for the bell.
pub(crate) fn mailbox() -> io::Result<(Mailbox, Inbox)> {
    let (sender, parcels) = unbounded();
    let (spare, spares) = bounded(SPARES);
    let file = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
    let bell = Arc::new(Bell { file, asleep: AtomicBool::new(false) });
    let bodies = Arc::<Bodies>::default();
    let mailbox = Mailbox { parcels: sender, spares, bodies: Arc::clone(&bodies), bell: Arc::clone(&bell) };
    Ok((mailbox, Inbox { parcels, spares: spare, bodies, bell }))
}

impl Mailbox {
    /// Hands an answer over. Without a gate nobody waits for it.
    pub(crate) fn put(&self, address: u64, parcel: Parcel) {
        if self.parcels.send((address, parcel)).is_ok() {
            self.bell.ring();
        }
    }

    /// Begins an answer that goes on.
    pub(crate) fn stream(self: &Arc<Self>, address: u64) -> PieceWriter {
        let (sender, pieces) = bounded(PIECES);
        let told = Arc::<AtomicBool>::default();
        self.put(address, Parcel::Stream(Pieces { pieces, told: Arc::clone(&told) }));
        PieceWriter { pieces: Some(sender), told, piece: Vec::new(), address, mailbox: Arc::clone(self) }
    }

    /// A buffer for much of an answer.
    pub(crate) fn buffer(&self) -> Vec<u8> {
        let mut buffer = self.used_buffer();
        buffer.clear();
        buffer
    }

    /// The same with what it holds from its last use: to be read to, without being filled with zeros before.
    pub(crate) fn used_buffer(&self) -> Vec<u8> {
        self.spares.try_recv().unwrap_or_default()
    }

    /// The body of a request, unless nobody waits for the answer any more.
    pub(crate) fn take_body(&self, address: u64) -> Option<Body> {
        self.bodies.lock().remove(&address)
    }
}

impl PieceWriter {
    /// Puts a piece behind what has been written, as it is.
    pub(crate) fn put(&mut self, piece: Vec<u8>) -> io::Result<()> {
        self.hand_over()?;
        self.send(piece)
    }

    /// Hands over what has been written.
    fn hand_over(&mut self) -> io::Result<()> {
        let piece = std::mem::take(&mut self.piece);
        if piece.is_empty() { Ok(()) } else { self.send(piece) }
    }

    fn send(&self, piece: Vec<u8>) -> io::Result<()> {
        let Some(pieces) = &self.pieces else { return Ok(()) };
        // Waits while the client does not take more, which the gate bounds: of one that is gone it drops the other side.
        pieces.send(piece).map_err(|_| io::ErrorKind::BrokenPipe)?;
        self.tell();
        Ok(())
    }

    /// Has the gate look.
    fn tell(&self) {
        if !self.told.swap(true, Ordering::AcqRel) {
            self.mailbox.put(self.address, Parcel::More);
        }
    }
}

impl Write for PieceWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.piece.capacity() == 0 {
            self.piece = self.mailbox.buffer();
        }
        let n = bytes.len().min(PIECE - self.piece.len());
        self.piece.extend_from_slice(&bytes[..n]);
        if self.piece.len() == PIECE {
            self.hand_over()?;
        }
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.hand_over()
    }
}

impl Drop for PieceWriter {
    /// The gate sees the end, whether the answer came to its own or not.
    fn drop(&mut self) {
        self.pieces = None;
        self.tell();
    }
}

impl Pieces {
    /// Says that [`Parcel::More`] has come, before what it tells of is looked for.
    pub(super) fn hear(&self) {
        self.told.swap(false, Ordering::AcqRel);
    }

    /// The next piece; an error where there is none yet, or no more.
    pub(super) fn next(&self) -> Result<Vec<u8>, TryRecvError> {
        self.pieces.try_recv()
    }
}

impl Inbox {
    /// What wakes the gate.
    pub(super) fn bell(&self) -> &Arc<Bell> {
        &self.bell
    }

    /// The next answer.
    pub(super) fn take(&self) -> Option<(u64, Parcel)> {
        self.parcels.try_recv().ok()
    }

    /// Gives back what an answer came in.
    pub(super) fn give_back(&self, buffer: Vec<u8>) {
        if buffer.capacity() >= PIECE {
            // Where enough of them are kept it is one too many.
            drop(self.spares.try_send(buffer));
        }
    }

    /// Leaves the body of a request for whom it goes to.
    pub(super) fn leave_body(&self, address: u64, body: Body) {
        self.bodies.lock().insert(address, body);
    }

    /// Takes back a body that nobody has taken.
    pub(super) fn withdraw_body(&self, address: u64) {
        let unwanted = self.bodies.lock().remove(&address);
        drop(unwanted);
    }

    /// Whether there is no answer.
    pub(super) fn is_empty(&self) -> bool {
        self.parcels.is_empty()
    }
}

impl Bell {
    /// To be called after something was put where the gate looks before it sleeps.
    pub(super) fn ring(&self) {
        // Either this thread sees the gate asleep, or the gate, which looks after it has said so, sees what was put.
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::Relaxed) {
            // It can only fail once it has been rung 2^64 times.
            rustix::io::write(&self.file, &1_u64.to_ne_bytes()).unwrap_or_default();
        }
    }

    /// Says that the gate is about to sleep, before it looks for the last time.
    pub(super) fn go_to_sleep(&self) {
        self.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Says that it is awake.
    pub(super) fn wake_up(&self) {
        self.asleep.store(false, Ordering::Relaxed);
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
