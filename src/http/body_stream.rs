//! A request's body that is passed on while it arrives: a bounded channel of pieces from the event loop to the worker, with back-pressure.

use super::response_channel::{Address, ResponseChannel, ResponsePart};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Largest piece in bytes.
pub(crate) const PIECE: usize = 64 * 1024;

/// Capacity of the channel in pieces.
const PIECES: usize = 4;

/// State that both ends share.
#[derive(Default)]
struct Shared {
    /// Whether the event loop has a piece for which there was no room.
    wants_room: AtomicBool,
    /// Whether the body is complete.
    complete: AtomicBool,
}

/// The event loop's end. If it is dropped without [`BodySender::complete`], the worker sees an incomplete body.
pub(crate) struct BodySender {
    pieces: Sender<Vec<u8>>,
    shared: Arc<Shared>,
}

/// The worker's end. If it is dropped, the event loop sends no more.
pub(crate) struct BodyReceiver {
    pieces: Receiver<Vec<u8>>,
    shared: Arc<Shared>,
    channel: Arc<ResponseChannel>,
    address: Address,
    /// The current piece, of which the first `used` bytes were read.
    piece: Vec<u8>,
    used: usize,
}

/// The two ends of a body.
pub(crate) fn body_stream(channel: &Arc<ResponseChannel>, address: Address) -> (BodySender, BodyReceiver) {
    let (sender, pieces) = bounded(PIECES);
    let shared = Arc::<Shared>::default();
    let channel = Arc::clone(channel);
    let receiver = BodyReceiver { pieces, shared: Arc::clone(&shared), channel, address, piece: Vec::new(), used: 0 };
    (BodySender { pieces: sender, shared }, receiver)
}

impl BodySender {
    /// Whether there is room for another piece. If not, the event loop receives [`ResponsePart::BodyRoom`] once there is.
    pub(crate) fn has_room(&self) -> bool {
        if !self.pieces.is_full() {
            return true;
        }
        self.shared.wants_room.store(true, Ordering::SeqCst);
        // The worker may have taken a piece before the flag was set.
        !self.pieces.is_full()
    }

    /// Sends a piece. False if the worker needs no more.
    pub(crate) fn put(&self, piece: Vec<u8>) -> bool {
        !matches!(self.pieces.try_send(piece), Err(TrySendError::Disconnected(_)))
    }

    /// Marks the body as complete, after its last piece.
    pub(crate) fn complete(self) {
        self.shared.complete.store(true, Ordering::Release);
    }
}

impl BodyReceiver {
    /// Reads more of the body; 0 at its end.
    ///
    /// # Errors
    /// `WouldBlock` if nothing arrives for `time`, `UnexpectedEof` if the body is incomplete.
    pub(super) fn read(&mut self, buffer: &mut [u8], time: Duration) -> io::Result<usize> {
        while self.used == self.piece.len() {
            self.piece = match self.pieces.recv_timeout(time) {
                Ok(piece) => piece,
                Err(RecvTimeoutError::Timeout) => return Err(io::ErrorKind::WouldBlock.into()),
                Err(RecvTimeoutError::Disconnected) if self.shared.complete.load(Ordering::Acquire) => return Ok(0),
                Err(RecvTimeoutError::Disconnected) => return Err(io::ErrorKind::UnexpectedEof.into()),
            };
            self.used = 0;
            if self.shared.wants_room.swap(false, Ordering::SeqCst) {
                self.channel.put(self.address, ResponsePart::BodyRoom);
            }
        }
        let n = buffer.len().min(self.piece.len() - self.used);
        buffer[..n].copy_from_slice(&self.piece[self.used..self.used + n]);
        self.used += n;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::super::response_channel::response_channel;
    use super::*;

    const ADDRESS: Address = Address { connection: 1, request: 2 };
    const SOON: Duration = Duration::from_millis(1);

    #[test]
    fn pieces_come_in_order_and_room_is_told() {
        let (channel, responses) = response_channel().unwrap();
        let (sender, mut receiver) = body_stream(&Arc::new(channel), ADDRESS);
        let mut buffer = [0; 3];
        assert_eq!(receiver.read(&mut buffer, SOON).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        for piece in 0..PIECES {
            assert!(sender.has_room() && sender.put(vec![u8::try_from(piece).unwrap(); 4]));
        }
        assert!(!sender.has_room());
        assert_eq!((receiver.read(&mut buffer, SOON).unwrap(), buffer), (3, [0; 3]));
        assert!(matches!(responses.take(), Some((ADDRESS, ResponsePart::BodyRoom))));
        assert!(sender.has_room() && sender.put(Vec::new()) && !sender.has_room());
        assert_eq!((receiver.read(&mut buffer, SOON).unwrap(), buffer[0]), (1, 0));
        sender.complete();
        let mut rest = Vec::new();
        loop {
            match receiver.read(&mut buffer, SOON).unwrap() {
                0 => break,
                n => rest.extend_from_slice(&buffer[..n]),
            }
        }
        assert_eq!(rest, [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]);
    }

    #[test]
    fn each_end_tells_the_other_that_it_has_gone() {
        let (channel, _responses) = response_channel().unwrap();
        let channel = Arc::new(channel);
        let (sender, mut receiver) = body_stream(&channel, ADDRESS);
        sender.put(b"ab".to_vec());
        drop(sender);
        let mut buffer = [0; 8];
        assert_eq!(receiver.read(&mut buffer, SOON).unwrap(), 2);
        assert_eq!(receiver.read(&mut buffer, SOON).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        let (sender, receiver) = body_stream(&channel, ADDRESS);
        drop(receiver);
        assert!(!sender.put(b"c".to_vec()));
    }
}
