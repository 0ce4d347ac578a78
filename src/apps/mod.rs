//! Applications that are plugins without speaking the plugin protocol: what their manifest says, and how the host talks to each kind.

#[cfg_attr(not(test), expect(dead_code, reason = "the worker of the kind `static` is the caller"))]
pub(crate) mod static_files;
