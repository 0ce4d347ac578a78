//! The store as frames of the plugin protocol: `docs/protocol.md`, section 5.

use super::{Closed, MAX_REPLIES, Pending, send};
use crate::plugins::connection::RELEASE_AFTER;
use crate::protocol::frame::{EncodeError, FrameReader, ReadError, encode};
use crate::protocol::message::{Failure, MAX_ID, Malformed, Message};
use crate::protocol::values::integer;
use crate::store::Store;
use crate::util::threads::SMALL_STACK;
use serde::Deserialize;
use std::io;
use std::os::unix::net::UnixStream;

/// Serves one connection until it closes.
pub(super) fn serve(stream: &UnixStream, store: &Store, plugin: &str) -> Result<(), Closed> {
    let mut frames = FrameReader::new(stream);
    let mut pending = Pending::new(store, plugin);
    let mut replies = Vec::new();
    let mut idle = true;
    loop {
        let frame = match frames.read() {
            Ok(frame) => frame,
            Err(ReadError::Closed) => return Ok(()),
            Err(ReadError::Io(error)) => match error.kind() {
                io::ErrorKind::Interrupted => continue,
                io::ErrorKind::WouldBlock => {
                    frames.release();
                    replies = Vec::new();
                    stream.set_read_timeout(None)?;
                    idle = true;
                    continue;
                }
                _ => return Err(error.into()),
            },
            Err(error) => return Err(error.into()),
        };
        if std::mem::take(&mut idle) {
            stream.set_read_timeout(Some(RELEASE_AFTER))?;
        }
        match frame.message() {
            Ok(Message::Kv(kv)) => pending.begin(kv.id, kv.op, frame.body),
            Ok(other) => return Err(Closed::Type(other.kind())),
            Err(malformed) => {
                let id = match &malformed {
                    Malformed::Json(_) | Malformed::Body { .. } => kv_id(frame.head),
                    _ => None,
                };
                let Some(id) = id else { return Err(Closed::Malformed(malformed.to_string())) };
                put_answers(&mut pending, &mut replies)?;
                encode(&mut replies, &Failure::new(id, "bad_request", &malformed.to_string()), &[])?;
            }
        }
        if !frames.is_ready() || pending.is_much() || replies.len() >= MAX_REPLIES {
            put_answers(&mut pending, &mut replies)?;
            send(stream, &replies)?;
            replies.clear();
            replies.shrink_to(SMALL_STACK);
        }
    }
}

/// Waits for the requests under way, whose ids these are, and appends their replies.
fn put_answers(pending: &mut Pending<'_, u64>, replies: &mut Vec<u8>) -> Result<(), EncodeError> {
    for (id, answer) in pending.answers() {
        match answer {
            Ok(mut answer) => {
                answer.result.id = id;
                encode(replies, &answer.result, &answer.body)?;
            }
            Err(error) => {
                let failure = Failure { index: error.index(), ..Failure::new(id, error.code(), &error.message()) };
                encode(replies, &failure, &[])?;
            }
        }
    }
    Ok(())
}

/// The id of a `kv` request whose other fields are malformed.
fn kv_id(head: &[u8]) -> Option<u64> {
    #[derive(Deserialize)]
    struct Request {
        #[serde(rename = "type")]
        kind: String,
        #[serde(deserialize_with = "integer")]
        id: u64,
    }
    let request: Request = serde_json::from_slice(head).ok()?;
    (request.kind == "kv" && request.id <= MAX_ID).then_some(request.id)
}
