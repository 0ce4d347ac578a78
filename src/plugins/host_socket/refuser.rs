//! Answers refused callers that speak HTTP. One that speaks frames gets no reply: its connection is closed.

use super::http::discard;
use super::{Language, wait_for};
use crate::http::{HttpError, errors};
use crate::util::threads;
use crossbeam_channel::{Receiver, Sender, bounded};
use rustix::event::PollFlags;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Refused connections that wait for their answer. Beyond them a connection is closed without one: strangers may be many.
const MAX_WAITING: usize = 16;

/// Time for a refused caller to send its request and to read the answer. One that is silent holds up the refused behind it only.
const ANSWER_TIME: Duration = Duration::from_secs(2);

/// The answer to a process that is no plugin's.
pub(super) const FORBIDDEN: HttpError = HttpError::new(
    403,
    "forbidden",
    "the calling process is not in the session of a running plugin, or does not run as its user",
);

/// The answer to a connection over the plugin's limit.
pub(super) const FULL: HttpError =
    HttpError::new(503, "overloaded", "the plugin has as many connections to the host socket as it may have").retry_after(1);

/// Gives refused connections to a thread of its own, so that nobody waits for them.
pub(super) struct Refuser(Sender<(UnixStream, HttpError)>);

impl Refuser {
    pub(super) fn start() -> io::Result<Self> {
        let (sender, refused) = bounded(MAX_WAITING);
        threads::restarting(threads::small_thread("host-socket-refused"), move || answer_all(&refused))?;
        Ok(Self(sender))
    }

    pub(super) fn refuse(&self, stream: UnixStream, error: HttpError) {
        // A connection that finds no place is closed when it is dropped here.
        self.0.try_send((stream, error)).ok();
    }
}

fn answer_all(refused: &Receiver<(UnixStream, HttpError)>) {
    for (stream, error) in refused {
        if let Err(broken) = answer(&stream, error) {
            log::debug!("a refused caller of the host socket was not answered: {broken}");
        }
    }
}

fn answer(stream: &UnixStream, error: HttpError) -> io::Result<()> {
    let deadline = Instant::now() + ANSWER_TIME;
    // An answer is smaller than any send buffer, so this never waits.
    stream.set_nonblocking(true)?;
    if wait_for(stream, PollFlags::IN, Some(deadline))? && Language::detect(stream)? == Some(Language::Http) {
        let mut writer = stream;
        writer.write_all(&errors::last_answer(error, false, None))?;
        discard(stream, deadline)?;
    }
    Ok(())
}
