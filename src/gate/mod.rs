//! The gate: a small, strict HTTP/1.1 front between the open network and the HTTP library behind it.
//!
//! What passes it is canonical, and what is not plain HTTP/1.1 is refused here.

pub(crate) mod chunked;
#[cfg(test)]
mod fuzzing;
pub(crate) mod head;
pub(crate) mod response;
