//! CGI: a process that answers one request. Its standard input is the request's body, its standard output the answer.

use super::{Arrived, Wire};
use crate::process::Process;
use crate::process::exit::Exit;
use crate::process::output::PluginLog;
use crate::util::send_buffer::SendBuffer;
use rustix::buffer::spare_capacity;
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// Bytes to read at once.
const READ: usize = 32 * 1024;

/// Time for a script that has closed its standard output to end. After that it is killed.
const END_TIME: Duration = Duration::from_secs(1);

/// Kills what is left of a script, and reaps it.
pub(crate) type Reap = Box<dyn FnOnce(Process)>;

/// A script that runs. Dropping it kills it with its children.
pub(crate) struct CgiWire {
    /// None once it is dropped.
    script: Option<(Process, Reap)>,
    /// None once the body has ended, or the script takes no more of it.
    stdin: Option<OwnedFd>,
    stdout: OwnedFd,
    outgoing: SendBuffer,
    /// The whole body is in the send buffer.
    complete: bool,
    /// Whether anything was printed.
    printed: bool,
    /// How it ended, if it has ended by itself.
    exit: Option<Exit>,
    log: PluginLog,
    /// The request, for messages.
    name: String,
}

impl CgiWire {
    /// The wire of a script that was started with the other ends of these pipes, for the request of this name.
    pub(crate) fn new(
        process: Process,
        reap: Reap,
        pipes: (OwnedFd, OwnedFd),
        log: &PluginLog,
        name: String,
    ) -> io::Result<Self> {
        let (stdin, stdout) = pipes;
        rustix::io::ioctl_fionbio(&stdin, true)?;
        rustix::io::ioctl_fionbio(&stdout, true)?;
        Ok(Self {
            script: Some((process, reap)),
            stdin: Some(stdin),
            stdout,
            outgoing: SendBuffer::default(),
            complete: false,
            printed: false,
            exit: None,
            log: log.clone(),
            name,
        })
    }

    /// Waits a moment for the exit of a script that prints no more, and notes it in the log if it is a failure behind an answer.
    fn await_exit(&mut self) {
        if self.exit.is_none()
            && let Some((process, _)) = &self.script
        {
            self.exit = process.exit_within(END_TIME);
            if let Some(exit) = self.exit.filter(|exit| *exit != Exit::Code(0) && self.printed) {
                self.log.note(&format!("{}: the script ended with {exit}", self.name));
            }
        }
    }
}

impl Wire for CgiWire {
    fn queue_body(&mut self, bytes: &[u8]) {
        self.outgoing.bytes().extend_from_slice(bytes);
    }

    fn queue_body_end(&mut self) {
        self.complete = true;
        if self.unsent() == 0 {
            self.stdin = None;
        }
    }

    fn unsent(&self) -> usize {
        self.outgoing.unsent()
    }

    fn send_some(&mut self) -> io::Result<()> {
        let Some(stdin) = &self.stdin else { return Err(io::ErrorKind::BrokenPipe.into()) };
        if !self.outgoing.send_by(|bytes, _| rustix::io::write(stdin, bytes))? {
            return Ok(());
        }
        if self.complete {
            self.stdin = None;
        }
        Ok(())
    }

    fn forget_unsent(&mut self) {
        self.outgoing.clear();
        self.stdin = None;
    }

    fn sink(&self) -> Option<BorrowedFd<'_>> {
        self.stdin.as_ref().filter(|_| self.unsent() > 0).map(AsFd::as_fd)
    }

    fn source(&self) -> BorrowedFd<'_> {
        self.stdout.as_fd()
    }

    fn receive(&mut self, output: &mut Vec<u8>) -> Result<Arrived, String> {
        output.reserve(READ);
        match rustix::io::read(&self.stdout, spare_capacity(output)) {
            Ok(0) => {
                self.await_exit();
                Ok(Arrived::End)
            }
            Ok(_) => {
                self.printed = true;
                Ok(Arrived::Something)
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(Arrived::Nothing),
            Err(error) => Err(format!("its output cannot be read ({error})")),
        }
    }

    fn has_ended(&mut self) -> bool {
        // A process that it has left behind may hold its output open.
        let ended = self.script.as_ref().is_some_and(|(process, _)| process.has_ended());
        if ended {
            self.await_exit();
        }
        ended
    }

    fn explain_silence(&mut self) -> String {
        match self.exit {
            Some(exit) => format!("the script ended with {exit} and without an answer"),
            None => "the script closed its output without an answer".into(),
        }
    }
}

impl Drop for CgiWire {
    fn drop(&mut self) {
        if let Some((process, reap)) = self.script.take() {
            reap(process);
        }
    }
}
