//! All sockets of the plugin that are open, for what goes to many.

use super::message::{Message, SendError};
use super::socket::Socket;
use crate::lock::LockExt;
use std::collections::HashSet;
use std::sync::{Arc, Mutex};

/// The open sockets of all connections.
#[derive(Debug, Default)]
pub(crate) struct Registry(Mutex<HashSet<Socket>>);

impl Registry {
    pub(super) fn insert(&self, socket: Socket) {
        self.0.locked().insert(socket);
    }

    pub(super) fn remove(&self, socket: &Socket) {
        let removed = self.0.locked().take(socket);
        // Outside of the lock: the last owner of a socket frees what has not been sent to it.
        drop(removed);
    }

    pub(crate) fn all(&self) -> Vec<Socket> {
        self.0.locked().iter().cloned().collect()
    }
}

/// Sends a message to each of the sockets that has credit for it, and closes those that have none. Gives how many it was sent to.
pub(crate) fn broadcast<'a>(sockets: impl IntoIterator<Item = &'a Socket>, message: Message) -> Result<usize, SendError> {
    message.check()?;
    let message = Arc::new(message);
    Ok(sockets.into_iter().filter(|socket| socket.offer(&message)).count())
}
