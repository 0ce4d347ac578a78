//! Parsers of client input. Pure.

pub(crate) mod chunked;
#[cfg(test)]
pub(crate) mod fuzzing;
pub(crate) mod request_head;
