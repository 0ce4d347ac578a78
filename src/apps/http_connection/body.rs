//! The body of a response as it arrives.

use super::{Fault, Framing, HttpConnection, PIECE, Stopped, TICK};
use crate::http::parse::chunked;
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::RecvFlags;
use std::time::Instant;

impl HttpConnection {
    /// The beginning of the body, as far as it was received, the number of bytes left for [`HttpConnection::read_rest`], and whether more
    /// follows in pieces.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn begin_body(&mut self) -> Result<(&[u8], usize, bool), Fault> {
        match &mut self.framing {
            Framing::None => Ok((&[], 0, false)),
            Framing::Length(length) => {
                let total = usize::try_from(*length).map_err(|_| format!("its content-length of {length} is too large"))?;
                let first = total.min(self.input.len() - self.start);
                self.start += first;
                *length -= first as u64;
                Ok((&self.input[self.start - first..self.start], total - first, false))
            }
            Framing::Chunked(_) | Framing::Close => {
                self.piece.clear();
                let ended = self.decode()?;
                Ok((&self.piece, 0, !ended))
            }
        }
    }

    /// Waits for more of a body with a length, and returns the number of bytes read.
    pub(crate) fn read_rest(
        &mut self,
        buffer: &mut [u8],
        deadline: Instant,
        interrupted: impl Fn() -> bool,
    ) -> Result<Option<usize>, Stopped> {
        let Framing::Length(left) = self.framing else { return Ok(None) };
        let most = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
        let mut is_slow = false;
        let n = loop {
            if self.holds_bytes() {
                let n = most.min(self.input.len() - self.start);
                buffer[..n].copy_from_slice(&self.input[self.start..][..n]);
                self.start += n;
                break n;
            }
            // Straight into the buffer, which spares a copy.
            if self.send_some().is_ok_and(|sent| sent) {
                if is_slow {
                    self.poll(PollFlags::IN, TICK);
                }
                let stream = self.stream().map_err(Stopped::Lost)?;
                match rustix::net::recv(stream, &mut buffer[..most], RecvFlags::empty()) {
                    Ok((_, 0)) => {
                        self.ended = true;
                        return Ok(None);
                    }
                    Ok((n, _)) => break n,
                    Err(Errno::AGAIN | Errno::INTR) if interrupted() => return Err(Stopped::Interrupted),
                    Err(Errno::AGAIN | Errno::INTR) if Instant::now() >= deadline => return Err(Stopped::Deadline),
                    Err(Errno::AGAIN | Errno::INTR) => is_slow = true,
                    Err(error) => return Err(Stopped::Lost(error.into())),
                }
            } else if self.wait(deadline, &interrupted, |this| this.holds_bytes().then_some(()))?.is_none() {
                return Ok(None);
            }
        };
        self.framing = Framing::Length(left - n as u64);
        Ok(Some(n))
    }

    /// Waits for more of a body without a length. [`HttpConnection::take_piece`] returns it.
    pub(crate) fn wait_piece(&mut self, deadline: Instant, interrupted: impl Fn() -> bool) -> Result<(), Stopped> {
        self.piece.clear();
        self.wait(deadline, interrupted, |this| this.holds_bytes().then_some(())).map(drop)
    }

    /// The next piece of such a body, and whether more follow.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn take_piece(&mut self) -> Result<(&[u8], bool), Fault> {
        let is_over = self.ended && !self.holds_bytes();
        let ended = match self.framing {
            Framing::Close if is_over => true,
            Framing::Chunked(_) if is_over => return Err("it closed the connection before the end of its response".into()),
            _ => self.decode()?,
        };
        Ok((&self.piece, !ended))
    }

    /// Appends the data of what was received to the piece. True if the body is complete.
    fn decode(&mut self) -> Result<bool, Fault> {
        let Framing::Chunked(decoder) = &mut self.framing else {
            let n = (self.input.len() - self.start).min(PIECE);
            self.piece.extend_from_slice(&self.input[self.start..][..n]);
            self.start += n;
            return Ok(false);
        };
        while self.start < self.input.len() && self.piece.len() < PIECE {
            let step = decoder.step(&self.input[self.start..]).map_err(|broken| match broken {
                chunked::Broken::Malformed => "the chunked framing of its response is malformed".to_owned(),
                chunked::Broken::TooLarge => "the extensions or trailers of its chunked response are too large".to_owned(),
            })?;
            self.piece.extend_from_slice(step.data);
            self.start += step.used;
            if step.ended {
                self.framing = Framing::None;
                return Ok(true);
            }
        }
        Ok(false)
    }
}
