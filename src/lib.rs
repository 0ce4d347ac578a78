//! A self-hosted plugin host, and what a plugin author needs to write for it.
//!
//! Without default features this crate is the plugin [`protocol`] and the Rust [`sdk`]. The feature `host` adds the server
//! and the operator's commands, which the `plugrack` binary runs.
//!
//! The rooms, from the bottom up; a file uses only the layers below its own:
//!
//! * words: [`protocol`]'s messages and metadata, `restart`, `route`
//! * one resource each: frames, `process`, `output`, `store`, `data_dir`
//! * the rack: `queue`, `worker`, `supervisor`, `rack`, `callback`
//! * edges: `http`, `api`, `pages`, `cli`, `client`, `config`
//! * wiring: `server`

pub mod protocol;
pub mod sdk;

#[cfg(feature = "host")]
mod restart;
#[cfg(feature = "host")]
mod route;
#[cfg(feature = "host")]
mod store;
