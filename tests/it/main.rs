//! The integration tests: the real binary, real sockets, real children.

mod support;

mod kv;
mod layers;
mod lifecycle;
