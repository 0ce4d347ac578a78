//! The integration tests: the real binary, real sockets, real children.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr, reason = "a test says what is wrong by panicking")]

mod support;

mod docs;
mod lifecycle;
mod scenarios;
mod streaming;
mod web;
mod web_faults;
