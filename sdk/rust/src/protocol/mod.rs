//! The plugin protocol, version 1, as `docs/protocol.md` publishes it.
//!
//! [`message`] and [`metadata`] are words: types and checks without I/O. [`frame`] puts them on a stream.

pub(crate) mod fields;
pub mod frame;
pub mod message;
pub mod metadata;
pub mod values;
