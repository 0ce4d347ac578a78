//! The gate's parsers, and what must be true of them, without the host around them.

// The files below name it as they do where they belong.
use plugrack_sdk::protocol;

#[path = "../../src/gate"]
mod gate {
    pub(crate) mod chunked;
    pub(crate) mod fuzzing;
    pub(crate) mod head;
    #[allow(dead_code, reason = "the setting is read by the host alone")]
    pub(crate) mod proxies;
    pub(crate) mod response;
}

/// Any bytes as a request's head.
pub fn head(input: &[u8]) {
    gate::fuzzing::head(input);
}

/// Any bytes as a chunked body.
pub fn chunked(input: &[u8]) {
    gate::fuzzing::chunked(input);
}

/// Any bytes as an answer's head.
pub fn response(input: &[u8]) {
    gate::fuzzing::response(input);
}
