//! What the host has from the system: its data directory, its limits and its sockets.

pub(crate) mod data_dir;
pub(crate) mod rlimits;
pub(crate) mod temporary;
pub(crate) mod unix_socket;
