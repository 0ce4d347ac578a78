//! What the host tells a plugin, and what a plugin may tell the host in return: that it cannot start.

use super::cancel::Signal;
use super::kv::Kv;
use super::websocket::{self, Message, Registry, SendError, Socket};
#[cfg(feature = "license")]
use crate::license::{self, License};
use crate::protocol::message::{HostInfo, Init};
use serde_json::{Map, Value};
use std::fmt::Display;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// What the host has told this plugin, and the plugin's store. A clone is cheap and may go to any thread.
#[derive(Debug, Clone)]
pub struct Context(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    init: Init,
    kv: Kv,
    sockets: Registry,
    #[cfg(feature = "license")]
    granted: std::sync::OnceLock<License>,
    stopping: AtomicBool,
    /// Wakes the handlers that wait for a cancellation.
    signal: Arc<Signal>,
}

impl Context {
    pub(super) fn new(init: Init, signal: Arc<Signal>) -> Self {
        let kv = Kv::new((&init.host_socket).into());
        Self(Arc::new(Inner {
            init,
            kv,
            sockets: Registry::default(),
            #[cfg(feature = "license")]
            granted: std::sync::OnceLock::new(),
            stopping: AtomicBool::new(false),
            signal,
        }))
    }

    /// The identity of this installation: a UUID, the same for its whole life.
    #[must_use]
    pub fn instance_id(&self) -> &str {
        &self.0.init.instance_id
    }

    /// The plugin's own id.
    #[must_use]
    pub fn plugin_id(&self) -> &str {
        &self.0.init.plugin_id
    }

    /// The licence token the operator has set for this plugin.
    #[must_use]
    pub fn license(&self) -> Option<&str> {
        self.0.init.license.as_deref()
    }

    /// What the licence grants, of a plugin that was given its vendor's keys; `None` of any other.
    #[cfg(feature = "license")]
    #[must_use]
    pub fn granted(&self) -> Option<&License> {
        self.0.granted.get()
    }

    #[cfg(feature = "license")]
    pub(super) fn grant(&self, license: License) {
        self.0.granted.get_or_init(|| license);
    }

    /// A moment that has certainly come, whatever the clock shows, as the host writes it.
    #[cfg(feature = "license")]
    pub(super) fn not_before_time(&self) -> Option<&str> {
        self.0.init.not_before_time.as_deref()
    }

    /// The operator's settings for this plugin.
    #[must_use]
    pub fn config(&self) -> &Map<String, Value> {
        &self.0.init.config
    }

    /// The plugin's own directory, which is also its working directory.
    #[must_use]
    pub fn data_dir(&self) -> &Path {
        Path::new(&self.0.init.data_dir)
    }

    /// The file the plugin's output goes to. The host rotates it: read it at most.
    #[must_use]
    pub fn log_path(&self) -> &Path {
        Path::new(&self.0.init.log_path)
    }

    /// Name and version of the host.
    #[must_use]
    pub fn host(&self) -> &HostInfo {
        &self.0.init.host
    }

    /// The plugin's namespace of the host's key-value store.
    #[must_use]
    pub fn kv(&self) -> &Kv {
        &self.0.kv
    }

    /// The WebSockets that are open, in no order.
    #[must_use]
    pub fn sockets(&self) -> Vec<Socket> {
        self.0.sockets.all()
    }

    /// Sends a message to all open WebSockets, and gives the number of those that it was sent to. It waits for nobody: a socket that
    /// has no credit left is closed with the code 1013, so that its client connects again and does not miss a message silently.
    ///
    /// # Errors
    /// When the message is over 1 MiB.
    pub fn broadcast(&self, message: impl Into<Message>) -> Result<usize, SendError> {
        self.broadcast_to(&self.sockets(), message)
    }

    /// The same for these sockets. Those that are closed get nothing.
    ///
    /// # Errors
    /// When the message is over 1 MiB.
    pub fn broadcast_to<'a>(
        &self,
        sockets: impl IntoIterator<Item = &'a Socket>,
        message: impl Into<Message>,
    ) -> Result<usize, SendError> {
        websocket::broadcast(sockets, message.into())
    }

    pub(super) fn registry(&self) -> &Registry {
        &self.0.sockets
    }

    /// Whether the host has asked the plugin to stop. Work without an end should then come to one: 3 s after asking, the host
    /// ends the process. A busy connection is looked at between the pieces of a streaming response.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.0.stopping.load(Ordering::Acquire)
    }

    pub(super) fn stop(&self) {
        self.0.stopping.store(true, Ordering::Release);
        self.0.signal.notify();
    }

    pub(super) fn signal(&self) -> &Signal {
        &self.0.signal
    }
}

/// Why a plugin cannot start, for the operator to read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    message: String,
    code: &'static str,
    temporary: bool,
}

impl Refusal {
    /// Licence or configuration will not do. The host does not start the plugin again until one of them changes, or its file.
    pub fn new(reason: impl Display) -> Self {
        Self { message: reason.to_string(), code: "refused", temporary: false }
    }

    /// Something is missing that may come back, such as a database. The host tries again, at growing intervals.
    pub fn temporary(reason: impl Display) -> Self {
        Self { message: reason.to_string(), code: "unavailable", temporary: true }
    }

    pub(super) fn code(&self) -> &'static str {
        self.code
    }

    /// The exit codes of sysexits.h that the protocol names.
    pub(super) fn exit_code(&self) -> u8 {
        if self.temporary { 75 } else { 78 }
    }
}

#[cfg(feature = "license")]
impl From<license::Refusal> for Refusal {
    fn from(refusal: license::Refusal) -> Self {
        Self { message: refusal.to_string(), code: refusal.code.as_str(), temporary: refusal.code.is_temporary() }
    }
}
