//! The integration tests: the real binary, real sockets, real children.

mod support;

mod lifecycle;
mod scenarios;
mod streaming;
mod web;
mod web_faults;
