//! Sends a file, or a part of it, with back-pressure.

use super::Caller;
use super::root::{BECAME_SHORTER, File};
use crate::http::response_channel::{MAX_AHEAD, MAX_WHOLE, PIECE};
use crate::http::{Request, errors};
use rustix::fd::AsFd;
use std::time::{Duration, Instant};

/// Interval at which the worker gets its turn during a long answer.
pub(super) const CLIENT_TICK: Duration = Duration::from_millis(100);

/// Bytes of a large file that are read and sent with the head: they show that the file can be read while an error can still be answered.
const FIRST_PIECE: usize = 4 * 1024;

/// Bytes of a file that one call sends at most, so that a quick client does not keep the worker from its turns.
const STRETCH: u64 = 1024 * 1024;

/// An answer whose body is a part of a file.
pub(super) struct Transfer {
    pub(super) status: u16,
    /// Status line and headers, without those of the framing.
    pub(super) head: Vec<u8>,
    /// Where the part begins, in bytes.
    pub(super) offset: u64,
    /// Its length in bytes.
    pub(super) length: u64,
}

impl Transfer {
    /// Sends the answer. The announced length is never exceeded: if the file has become shorter, the client gets an error, or an answer that
    /// is visibly cut once its head was sent.
    pub(super) fn send(self, mut request: Request, file: &File, buffer: &mut Vec<u8>, caller: &dyn Caller) {
        let Self { status, head, offset, length } = self;
        if request.is_head() {
            // A client that has left needs no answer, here and below.
            request.responder.begin(status, head, Some(length), b"", true).ok();
            return;
        }
        let first = first_piece(length);
        if buffer.len() < first {
            buffer.resize(first, 0);
        }
        let fault = match file.read_at(&mut buffer[..first], offset) {
            Ok(n) if n == first => None,
            Ok(_) => Some((errors::FILE_CHANGED, "the file became shorter while it was read".to_owned())),
            Err(error) => Some((errors::BAD_GATEWAY, format!("the file cannot be read ({error})"))),
        };
        if let Some((error, why)) = fault {
            caller.note_failed(&format!("{}: {why}", request.name()));
            return request.fail(error);
        }
        let sent = first as u64;
        let begun = if sent == length {
            request.responder.begin(status, head, Some(length), &buffer[..first], true)
        } else {
            request.responder.begin_file(status, head, length, &buffer[..first])
        };
        if begun.is_ok()
            && sent < length
            && let Err(why) = send_rest(&mut request, file, offset + sent, length - sent, caller)
        {
            request.responder.cut();
            caller.note_failed(&format!("{}: the answer was cut short: {why}", request.name()));
        }
    }
}

/// How much of an answer is sent with its head. The rest of a larger one follows as the client takes it, so that a slow one holds little
/// memory.
fn first_piece(length: u64) -> usize {
    match usize::try_from(length) {
        Ok(length) if length <= MAX_WHOLE => length,
        _ => FIRST_PIECE,
    }
}

/// Sends the `left` bytes from `offset` on. The gate ends the answer for a client that takes it too slowly.
///
/// # Errors
/// Why the answer is incomplete, other than by its client.
fn send_rest(request: &mut Request, file: &File, mut offset: u64, mut left: u64, caller: &dyn Caller) -> Result<(), String> {
    const INTERRUPTED: &str = "the plugin is to stop";
    let mut turn = Instant::now();
    while left > 0 {
        if request.responder.is_cancelled() {
            return Ok(());
        }
        if turn.elapsed() >= CLIENT_TICK {
            if caller.interrupts() {
                return Err(INTERRUPTED.to_owned());
            }
            turn = Instant::now();
        }
        if request.responder.takes_file() {
            let stretch = left.min(STRETCH);
            let is_last = stretch == left;
            if is_last && let Some(change) = file.change() {
                return Err(change.to_owned());
            }
            let length = usize::try_from(stretch).unwrap_or(usize::MAX);
            if let Some(sent) = request.responder.send_file(file.as_fd(), offset, length, is_last) {
                offset += sent as u64;
                left -= sent as u64;
                if sent == length {
                    continue;
                }
                // The event loop takes the end of an answer off the worker's hands.
                if left > MAX_AHEAD {
                    request.responder.wait_for_client(CLIENT_TICK);
                    continue;
                }
            }
        }
        while !request.responder.has_room_within(CLIENT_TICK) {
            if request.responder.is_cancelled() {
                return Ok(());
            }
            if caller.interrupts() {
                return Err(INTERRUPTED.to_owned());
            }
            turn = Instant::now();
        }
        let mut piece = request.responder.buffer();
        let n = usize::try_from(left).map_or(PIECE, |left| left.min(PIECE));
        match file.read_at(&mut piece[..n], offset) {
            Ok(read) if read == n => {}
            Ok(_) => return Err(BECAME_SHORTER.to_owned()),
            Err(error) => return Err(format!("the file cannot be read ({error})")),
        }
        offset += n as u64;
        left -= n as u64;
        // The last piece completes the answer, so a mixture of two versions must be found before it.
        if left == 0
            && let Some(change) = file.change()
        {
            return Err(change.to_owned());
        }
        if request.responder.filled(piece, n, left == 0).is_err() {
            return Ok(());
        }
    }
    Ok(())
}
