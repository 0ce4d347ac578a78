//! The integration tests: the real binary, real sockets, real children.

mod support;

mod lifecycle;
mod scenarios;
