//! Applications that are plugins without speaking the plugin protocol: what their manifest says, and how the host talks to each kind.

pub(crate) mod detect;
pub(crate) mod endpoint;
pub(crate) mod http_connection;
pub(crate) mod manifest;
pub(crate) mod probe;
pub(crate) mod static_files;
