//! HTTP/1.1, independent of connections and plugins: parsers, framing, errors, bodies, and a request with its responder. Nothing here waits
//! for a client.

pub(crate) mod body;
pub(crate) mod body_stream;
pub(crate) mod date;
pub(crate) mod direct_writer;
pub(crate) mod error_page;
pub(crate) mod errors;
pub(crate) mod framing;
pub(crate) mod http_error;
pub(crate) mod in_flight;
pub(crate) mod parse;
pub(crate) mod prefix;
pub(crate) mod proxies;
pub(crate) mod request;
pub(crate) mod request_end;
pub(crate) mod responder;
pub(crate) mod response_channel;
pub(crate) mod slots;
pub(crate) mod websocket;

pub(crate) use http_error::HttpError;
pub(crate) use in_flight::{InFlight, WaitingRequest};
pub(crate) use request::Request;
