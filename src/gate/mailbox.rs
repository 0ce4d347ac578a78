//! What the gate and the host's other threads hand each other, which are the same process: no connection lies between them.
//!
//! A request that goes over the shared connection has an address: its headers and body are left here under it, and its answer put here.
//! The gate gives each address out once, so what comes for a request that is over, as when its client has gone, is nobody's and dropped.

use super::Origin;
use super::body::Body;
use super::outlet::Outlet;
use super::response::{Answer, Framed};
use super::slots::Slot;
use crossbeam_channel::{Receiver, Select, Sender, TryRecvError, bounded, unbounded};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::collections::HashMap;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Largest answer in bytes, head and body, that is handed over whole: twice a body that goes in one frame to a plugin. A larger one comes
/// in pieces, so that a slow client holds up the plugin and not the host's memory.
pub(super) const MAX_WHOLE: usize = 128 * 1024;

/// Largest piece of one that comes in pieces, in bytes, and how many of them wait for the gate.
pub(crate) const PIECE: usize = 64 * 1024;
const PIECES: usize = 4;

/// Buffers that are kept for the next large answer: to have new memory from the system costs more than to fill it.
const SPARES: usize = 32;

/// Parts that what is left with requests is kept in.
const PARTS: usize = 32;

/// An answer, or something of it.
pub(super) enum Parcel {
    /// Its head, with all lines but those that frame it, and from `body_at` on the first of the body; the rest comes there, if that is not
    /// all.
    Answer { answer: Answer, bytes: Vec<u8>, body_at: usize, rest: Option<Pieces> },
    /// More of it has come there, or its end.
    More,
    /// It was begun, or gone on with, straight to the client, framed like this; `left` is what was not taken of it.
    Straight { framed: Framed, left: Vec<u8>, then: Then },
}

/// How an answer goes on that went straight to the client.
pub(super) enum Then {
    /// On the same way.
    Straight,
    /// Its body goes on here.
    Pieces(Pieces),
    /// That was all.
    Ended,
    /// It has broken off.
    Broken,
}

/// What the gate leaves for whom a request goes to.
pub(crate) struct Left {
    /// The lines of the request's canonical head, but for the first.
    pub(crate) headers: Vec<u8>,
    /// Where the request is from.
    pub(crate) origin: Origin,
    /// The request's body, where it has one.
    pub(crate) body: Option<Body>,
    /// The way straight to its client, where there is one.
    pub(crate) outlet: Option<Arc<Outlet>>,
}

/// Where the host's threads put answers, and find bodies. Of each request few parcels wait, and there are no more requests than clients.
pub(crate) struct Mailbox {
    parcels: Sender<(u64, Parcel)>,
    spares: Arc<Spares>,
    left: Arc<LeftHere>,
    bell: Arc<Bell>,
}

/// The gate's side of it.
pub(crate) struct Inbox {
    parcels: Receiver<(u64, Parcel)>,
    spares: Arc<Spares>,
    left: Arc<LeftHere>,
    bell: Arc<Bell>,
}

/// Buffers for large answers. The one given back last is taken first, since it is still in the processor's cache.
#[derive(Default)]
struct Spares(Mutex<Vec<Vec<u8>>>);

impl Spares {
    fn lock(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One with what it holds from its last use, or a new one.
    fn take(&self) -> Vec<u8> {
        self.lock().pop().unwrap_or_default()
    }

    /// Keeps one for the next large answer, if it is large, and there are not enough of them.
    fn keep(&self, buffer: Vec<u8>) {
        if buffer.capacity() >= PIECE {
            let mut spares = self.lock();
            if spares.len() < SPARES {
                spares.push(buffer);
            }
        }
    }
}

/// What there is of each request that is under way, by its address. Locked for no longer than it takes to put something there or
/// take it, and in parts, so that the gate and the others seldom meet.
#[derive(Default)]
struct LeftHere([Mutex<HashMap<u64, Entry>>; PARTS]);

/// A request that is under way.
struct Entry {
    /// What the gate leaves for the worker, until it is taken.
    left: Option<Left>,
    /// The plugin's slot that its connection holds, once the request has been routed.
    slot: Option<Slot>,
}

impl LeftHere {
    fn part(&self, address: u64) -> MutexGuard<'_, HashMap<u64, Entry>> {
        self.0[usize::try_from(address % PARTS as u64).unwrap_or(0)].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The body of an answer that goes on, as it is put there.
pub(super) struct PieceWriter {
    pieces: Option<Sender<Vec<u8>>>,
    told: Arc<AtomicBool>,
    ended: Arc<AtomicBool>,
    piece: Vec<u8>,
    address: u64,
    mailbox: Arc<Mailbox>,
}

/// The body of an answer that goes on, as the gate takes it.
pub(super) struct Pieces {
    pieces: Receiver<Vec<u8>>,
    /// Whether it was told of more that it has not looked for yet.
    told: Arc<AtomicBool>,
    /// Whether what was put there is all.
    ended: Arc<AtomicBool>,
}

/// What comes next of a body.
pub(super) enum Next {
    Piece(Vec<u8>),
    /// Nothing has come yet.
    Nothing,
    /// It is whole.
    End,
    /// The rest will not come.
    Broken,
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
    let spares = Arc::<Spares>::default();
    let file = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
    let bell = Arc::new(Bell { file, asleep: AtomicBool::new(false) });
    let left = Arc::<LeftHere>::default();
    let mailbox = Mailbox { parcels: sender, spares: Arc::clone(&spares), left: Arc::clone(&left), bell: Arc::clone(&bell) };
    Ok((mailbox, Inbox { parcels, spares, left, bell }))
}

impl Mailbox {
    /// Hands over an answer, or something of it. Without a gate nobody waits for it.
    pub(super) fn put(&self, address: u64, parcel: Parcel) {
        if self.parcels.send((address, parcel)).is_ok() {
            self.bell.ring();
        }
    }

    /// The same for what the gate need not know before it wakes anyway.
    pub(super) fn put_quietly(&self, address: u64, parcel: Parcel) {
        drop(self.parcels.send((address, parcel)));
    }

    /// Wakes the gate, if it sleeps.
    pub(super) fn wake_gate(&self) {
        self.bell.ring();
    }

    /// Whether the gate sleeps now.
    pub(super) fn gate_sleeps(&self) -> bool {
        self.bell.asleep.load(Ordering::Relaxed)
    }

    /// The two ends of a body that goes on.
    pub(super) fn pieces(self: &Arc<Self>, address: u64) -> (PieceWriter, Pieces) {
        let (sender, pieces) = bounded(PIECES);
        let (told, ended) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let taken = Pieces { pieces, told: Arc::clone(&told), ended: Arc::clone(&ended) };
        let mailbox = Arc::clone(self);
        (PieceWriter { pieces: Some(sender), told, ended, piece: Vec::new(), address, mailbox }, taken)
    }

    /// A buffer for much of an answer.
    pub(super) fn buffer(&self) -> Vec<u8> {
        let mut buffer = self.used_buffer();
        buffer.clear();
        buffer
    }

    /// The same with what it holds from its last use: to be read to, without being filled with zeros before.
    pub(crate) fn used_buffer(&self) -> Vec<u8> {
        self.spares.take()
    }

    /// Gives a buffer back.
    pub(super) fn give_back(&self, buffer: Vec<u8>) {
        self.spares.keep(buffer);
    }

    /// What the gate has left with a request; nothing where nobody waits for the answer any more.
    pub(crate) fn take_left(&self, address: u64) -> Option<Left> {
        self.left.part(address).get_mut(&address)?.left.take()
    }

    /// Has a request's connection hold a slot until the request is over. Where it is over already, the slot is free again.
    pub(crate) fn occupy(&self, address: u64, slot: Slot) {
        if let Some(entry) = self.left.part(address).get_mut(&address) {
            entry.slot = Some(slot);
        }
    }
}

impl PieceWriter {
    /// Says that what was put is all.
    pub(super) fn end(self) {
        self.ended.store(true, Ordering::Release);
    }

    /// Puts a piece behind what has been written, as it is.
    pub(super) fn put(&mut self, piece: Vec<u8>) -> io::Result<()> {
        self.hand_over()?;
        self.send(piece)
    }

    /// Waits until the next piece can be put without a wait, or the gate wants no more; false where that takes longer than `time`.
    pub(super) fn has_room_within(&self, time: Duration) -> bool {
        let Some(pieces) = self.pieces.as_ref().filter(|pieces| pieces.is_full()) else { return true };
        let mut room = Select::new();
        room.send(pieces);
        room.ready_timeout(time).is_ok()
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
    /// The gate sees the end, and whether it was the body's own.
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

    /// What comes next.
    pub(super) fn next(&self) -> Next {
        match self.pieces.try_recv() {
            Ok(piece) => Next::Piece(piece),
            Err(TryRecvError::Empty) => Next::Nothing,
            Err(TryRecvError::Disconnected) if self.ended.load(Ordering::Acquire) => Next::End,
            Err(TryRecvError::Disconnected) => Next::Broken,
        }
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
        self.spares.keep(buffer);
    }

    /// Makes the entry of a request that is passed on, with what is left for the worker where the request goes by the mailbox.
    pub(super) fn leave(&self, address: u64, left: Option<Left>) {
        self.left.part(address).insert(address, Entry { left, slot: None });
    }

    /// Removes the entry of a request that is over, with what nobody has taken; gives the slot that its connection held.
    pub(super) fn withdraw(&self, address: u64) -> Option<Slot> {
        let entry = self.left.part(address).remove(&address);
        entry.and_then(|entry| entry.slot)
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
