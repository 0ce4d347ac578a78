//! The state of one process of a plugin, shared by the supervisor and the workers.

use crate::apps::endpoint::Endpoint;
use crate::apps::manifest::{Kind, Listen, Manifest, Run};
use crate::plugins::context::Context;
use crate::plugins::restart_policy::Work;
use crate::plugins::sockets::Sockets;
use crate::process::Bounds;
use crate::process::exit::Exit;
use crossbeam_channel::{Receiver, RecvTimeoutError};
use std::ffi::OsString;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// What workers need to start scripts of CGI.
pub(crate) struct ScriptStarter {
    pub(crate) context: Arc<Context>,
    /// The program that answers every path, and its arguments; none if the path decides.
    pub(crate) command: Option<(PathBuf, Vec<OsString>)>,
    /// Variables of each script's environment, in addition to those of all children.
    pub(crate) env: Vec<(String, OsString)>,
    pub(crate) bounds: Bounds,
}

/// The state of one process of a plugin, shared by the supervisor and the workers.
pub(crate) struct ProcessState {
    /// The number of the process, unique in this run of the host.
    pub(crate) number: u64,
    /// Where it is to listen.
    pub(crate) endpoint: Endpoint,
    /// Where it listens instead, if it was free to choose.
    pub(crate) found: OnceLock<Endpoint>,
    /// How its scripts are started, if each request has a process of its own.
    pub(crate) scripts: Option<ScriptStarter>,
    /// Its plugin's manifest, if it has one.
    pub(crate) manifest: Option<Arc<Manifest>>,
    /// Whether references in the headers of its responses are mapped to its route.
    pub(crate) rewrites: bool,
    /// Its uid, if the plugin has one of its own.
    pub(crate) uid: Option<u32>,
    /// Closes when the workers are to stop.
    pub(crate) stop: Receiver<()>,
    /// Closes once the process has ended and `exit` and `ended` are set.
    pub(crate) exited: Receiver<()>,
    /// The exit, if the kernel reported one.
    pub(crate) exit: OnceLock<Exit>,
    /// The process is to stop, or has ended.
    pub(crate) stopping: AtomicBool,
    /// The process has ended.
    pub(crate) ended: AtomicBool,
    /// The process was sent a request.
    pub(crate) asked: AtomicBool,
    /// The process has answered a request.
    pub(crate) served: AtomicBool,
    /// The WebSockets of its clients.
    pub(crate) sockets: Sockets,
    /// Number of connections that the plugin may not have accepted yet.
    pub(crate) unaccepted: AtomicUsize,
    /// Time for an answer to begin.
    pub(crate) request_timeout: Duration,
}

impl ProcessState {
    /// Where it listens.
    pub(crate) fn endpoint(&self) -> &Endpoint {
        self.found.get().unwrap_or(&self.endpoint)
    }

    /// Connects to a process that speaks the plugin protocol, by a blocking stream.
    ///
    /// # Errors
    /// Nobody listens there, or takes a connection now.
    pub(crate) fn connect(&self) -> io::Result<UnixStream> {
        let stream = UnixStream::from(self.endpoint.connect(self.uid)?);
        stream.set_nonblocking(false)?;
        Ok(stream)
    }

    /// How the manifest says that it runs, if the plugin has one.
    pub(crate) fn run(&self) -> Option<&Run> {
        self.manifest.as_ref().map(|manifest| &manifest.run)
    }

    /// How the host speaks to it.
    pub(crate) fn kind(&self) -> Kind {
        self.run().map_or(Kind::Native, |run| run.kind)
    }

    /// The uid that whoever listens must have, if the plugin has one of its own. The host itself listens on a socket that it hands over.
    pub(crate) fn listener_uid(&self) -> Option<u32> {
        self.uid.filter(|_| self.run().is_none_or(|run| matches!(run.listen, Listen::Socket | Listen::Port)))
    }

    /// Whether there is a process, which the host has started and whose end it learns.
    pub(crate) fn has_process(&self) -> bool {
        self.run().is_none_or(Run::has_process)
    }

    /// What the process has served so far.
    pub(crate) fn work(&self) -> Work {
        match (self.asked.load(Ordering::Relaxed), self.served.load(Ordering::Relaxed)) {
            (_, true) => Work::Served,
            (true, false) => Work::Asked,
            (false, false) => Work::None,
        }
    }

    /// Whether the process ends within `time`.
    pub(crate) fn ends_within(&self, time: Duration) -> bool {
        self.exited.recv_timeout(time) == Err(RecvTimeoutError::Disconnected)
    }

    /// Sets a flag that is nearly always set already.
    pub(crate) fn set_flag(flag: &AtomicBool) {
        if !flag.load(Ordering::Relaxed) {
            flag.store(true, Ordering::Relaxed);
        }
    }
}

/// Counts a connection without an answer so far, which the plugin may not have accepted yet. While there is one, the plugin gets no
/// `shutdown`: it could exit as soon as its accepted connections are closed, and the requests on this one would be lost.
pub(crate) struct UnacceptedConnection(Arc<ProcessState>);

impl UnacceptedConnection {
    /// Counts another connection.
    pub(crate) fn new(process: &Arc<ProcessState>) -> Self {
        process.unaccepted.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(process))
    }
}

impl Drop for UnacceptedConnection {
    fn drop(&mut self) {
        self.0.unaccepted.fetch_sub(1, Ordering::SeqCst);
    }
}
