//! The parsers of the gate, and what must be true of them, without the host around them.

// The files below name it as they do where they belong.
use plugrack_sdk::protocol;

#[path = "../../src/http"]
mod http {
    #[allow(dead_code, reason = "the host alone adds a time to wait")]
    pub(crate) mod http_error;
    #[allow(dead_code, reason = "the host alone reads the setting")]
    pub(crate) mod proxies;
    pub(crate) mod parse {
        pub(crate) mod chunked;
        pub(crate) mod fuzzing;
        pub(crate) mod request_head;
    }
}

/// Any bytes as a request's head.
pub fn head(input: &[u8]) {
    http::parse::fuzzing::head(input);
}

/// Any bytes as a chunked body.
pub fn chunked(input: &[u8]) {
    http::parse::fuzzing::chunked(input);
}
