//! The WebSockets of a plugin that speaks the plugin protocol. All of them share one connection to its process, beside those of the
//! workers, so that a thousand clients cost two threads.
//!
//! A worker takes the client's request from the queue, as any other, and leaves it here. Once the plugin has accepted the socket, the event
//! loop speaks WebSocket with the client, and exchanges whole messages with the connection here.

mod connection;

use crate::http::{Request, errors, websocket};
use crate::lock::LockExt;
use crate::plugins::plugin::Plugin;
use crate::plugins::process_state::ProcessState;
use connection::{Opening, SocketConnection};
use std::sync::{Arc, Mutex};

/// The connection for the sockets of a process, once there was one.
#[derive(Default)]
pub(crate) struct Sockets(Mutex<Option<Arc<SocketConnection>>>);

impl Sockets {
    /// Asks the plugin whether it takes the socket for which a client asks, or refuses the client.
    pub(crate) fn open(plugin: &Arc<Plugin>, process: &Arc<ProcessState>, request: Request) {
        let accept_key = match websocket::accept_key(&request) {
            Ok(key) if websocket::is_origin_allowed(&request, &plugin.metadata.origins) => key,
            Ok(_) => return request.fail(errors::FOREIGN_ORIGIN),
            Err(error) => return request.fail(error),
        };
        ProcessState::set_flag(&process.asked);
        let opening = Box::new(Opening { deadline: request.arrived + process.request_timeout, request, accept_key });
        let mut current = process.sockets.0.locked();
        let opening = match &*current {
            Some(connection) => match connection.open(opening) {
                Ok(()) => return,
                // It has ended since.
                Err(opening) => opening,
            },
            None => opening,
        };
        match SocketConnection::start(plugin, process) {
            Ok(connection) => {
                if let Err(opening) = current.insert(connection).open(opening) {
                    opening.request.fail(errors::BAD_GATEWAY);
                }
            }
            Err(error) => {
                plugin.note_failed(&format!("{}: there is no connection for WebSocket: {error}", opening.request.name()));
                opening.request.fail(errors::BAD_GATEWAY);
            }
        }
    }
}
