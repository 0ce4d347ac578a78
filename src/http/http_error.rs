//! An error response of the host.

/// Status, code and sentence of an error. The JSON body and the page for browsers are made from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HttpError {
    /// HTTP status.
    pub(crate) status: u16,
    /// Error code, for programs.
    pub(crate) code: &'static str,
    /// What is wrong, for people: one sentence without a capital and a full stop. It names no setting, since anyone may read it.
    pub(crate) message: &'static str,
    /// `retry-after` in seconds, if waiting helps.
    pub(crate) retry_after: Option<u64>,
}

impl HttpError {
    /// An error for which waiting does not help.
    pub(crate) const fn new(status: u16, code: &'static str, message: &'static str) -> Self {
        Self { status, code, message, retry_after: None }
    }

    /// The same error with a `retry-after` in seconds.
    pub(crate) const fn retry_after(self, seconds: u64) -> Self {
        Self { retry_after: Some(seconds), ..self }
    }
}
