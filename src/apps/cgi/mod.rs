//! CGI/1.1 (RFC 3875): which script answers a path, what it is told of the request, and how its answer is read. FastCGI shares all of it,
//! and differs only in the [`Wire`] between host and script.

pub(crate) mod exchange;
pub(crate) mod process;
pub(crate) mod response;
pub(crate) mod scripts;
pub(crate) mod variables;

use std::io;
use std::os::fd::BorrowedFd;

/// What carries one request to a script, and its answer back. None of its calls waits.
pub(crate) trait Wire {
    /// Appends a part of the request's body to the send buffer.
    fn queue_body(&mut self, bytes: &[u8]);

    /// Appends the end of the body to it.
    fn queue_body_end(&mut self);

    /// Number of bytes in the send buffer.
    fn unsent(&self) -> usize;

    /// Sends what the script takes now.
    ///
    /// # Errors
    /// The script takes no more. It may answer all the same.
    fn send_some(&mut self) -> io::Result<()>;

    /// Drops what the script does not take.
    fn forget_unsent(&mut self);

    /// What to wait on until the script takes more, if anything is left to send.
    fn sink(&self) -> Option<BorrowedFd<'_>>;

    /// What to wait on until the script has sent more.
    fn source(&self) -> BorrowedFd<'_>;

    /// Appends what has arrived of the answer to `output`.
    ///
    /// # Errors
    /// What is wrong with it, as a sentence about the script. Nothing more can be read.
    fn receive(&mut self, output: &mut Vec<u8>) -> Result<Arrived, String>;

    /// Whether the answer has ended although its source is still open. Asked now and then while nothing arrives.
    fn has_ended(&mut self) -> bool;

    /// Why an answer that has ended has no beginning, as a sentence about the script.
    fn explain_silence(&mut self) -> String;
}

/// What has arrived of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Arrived {
    /// Nothing.
    Nothing,
    /// Something, though perhaps nothing of the answer.
    Something,
    /// The end of the answer, perhaps behind other bytes.
    End,
}
