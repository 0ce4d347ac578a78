//! Applications that are plugins without speaking the plugin protocol: what their manifest says, and how the host talks to each kind.

pub(crate) mod detect;
