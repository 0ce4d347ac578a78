//! A plugin: who it is and what it does.

use super::context::{Context, Refusal};
use super::kv::KvError;
use super::operation::{Operation, Outcome};
use super::request::Request;
use super::response::IntoResponse;
use super::server::{Handlers, InitHandler, KvHandler, Server};
use super::websocket::{self, Close, HandlerResult, IntoOpening, Message, Socket};
use super::{Error, log};
use crate::protocol::message::PROTOCOL_VERSION;
use crate::protocol::metadata::{BelowRoute, Metadata, TrailingSlash, WEBSOCKET};
use rustix::process::{Resource, getrlimit};
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::process::ExitCode;

/// The exit code for a call that makes no sense, from sysexits.h.
const USAGE: u8 = 64;

/// Requests handled at once unless the plugin says otherwise: a few streams leave room for others, and the threads cost little.
const DEFAULT_CONCURRENCY: u32 = 16;

/// What one of them may take of a bounded memory, in bytes: a thread's stack, which counts whole, and buffers.
const MEMORY_FOR_ONE: u64 = 5 << 19;

/// What they leave of a bounded memory for everything else, in bytes.
const MEMORY_KEPT: u64 = 24 << 20;

/// A plugin under construction: its metadata and its handlers. [`Plugin::serve`] runs it.
pub struct Plugin {
    metadata: Metadata,
    init: Box<InitHandler>,
    kv: Box<KvHandler>,
    websocket: websocket::Handlers,
    #[cfg(feature = "license")]
    licensed: Option<super::licensed::Licensed>,
}

impl Plugin {
    /// A plugin with the metadata it must have; the protocol's table gives their form.
    ///
    /// `id` names it everywhere, `name` is for people, `icon` an emoji or a `data:image/…` URI, and `route` where on the web it is put.
    /// A plugin with [host names](Self::hosts) alone has an empty route.
    #[must_use]
    pub fn new(id: &str, name: &str, version: &str, icon: &str, route: &str) -> Self {
        Metadata {
            id: id.to_owned(),
            name: name.to_owned(),
            version: version.to_owned(),
            icon: icon.to_owned(),
            route: Some(route.to_owned()).filter(|route| !route.is_empty()),
            host: Vec::new(),
            below_route: BelowRoute::AsIs,
            trailing_slash: TrailingSlash::AsIs,
            protocol: PROTOCOL_VERSION,
            concurrency: default_concurrency(getrlimit(Resource::Data).current),
            description: None,
            author: None,
            homepage: None,
            speaks: Vec::new(),
            origins: Vec::new(),
        }
        .into()
    }

    /// How many requests are handled at once, each on a thread of its own: 1–256. Unless set it is 16, or as many as the operator's
    /// `--plugin-memory` has room for. An open stream counts as one; with 1 it keeps every other request waiting.
    ///
    /// A request that the host has given up makes room for another, also while its handler still runs. So at most twice this number
    /// of handlers run. With 1 the next handler is called once the one before has returned; only a stream that was given up may still
    /// run beside it, until it notices its [`Cancellation`](super::Cancellation).
    ///
    /// The handlers of [WebSockets](websocket) run on as many threads more, which are started as they are needed. With 1 they take
    /// turns with all others; only a stream of a response runs beside them.
    #[must_use]
    pub fn concurrency(mut self, connections: u32) -> Self {
        self.metadata.concurrency = connections;
        self
    }

    /// Host names that are the plugin's as a whole, such as `wiki.example.org` or `*.example.org`.
    #[must_use]
    pub fn hosts(mut self, names: &[&str]) -> Self {
        self.metadata.host = names.iter().map(|&name| name.to_owned()).collect();
        self
    }

    /// Origins of other sites whose pages may open a WebSocket of the plugin: `https://app.example.org`, or `*` for all. Without
    /// them only the plugin's own pages may.
    #[must_use]
    pub fn origins(mut self, origins: &[&str]) -> Self {
        self.metadata.origins = origins.iter().map(|&origin| origin.to_owned()).collect();
        self
    }

    /// Has the host put the route before paths in the headers of responses: the plugin need not know its route.
    #[must_use]
    pub fn rewrite_below_route(mut self) -> Self {
        self.metadata.below_route = BelowRoute::Rewrite;
        self
    }

    /// Has the host redirect a request for the bare route to the route with a slash, so that relative links work.
    #[must_use]
    pub fn redirect_to_slash(mut self) -> Self {
        self.metadata.trailing_slash = TrailingSlash::Redirect;
        self
    }

    /// What it does, in at most 512 characters.
    #[must_use]
    pub fn description(mut self, text: &str) -> Self {
        self.metadata.description = Some(text.to_owned());
        self
    }

    /// Who wrote it.
    #[must_use]
    pub fn author(mut self, text: &str) -> Self {
        self.metadata.author = Some(text.to_owned());
        self
    }

    /// Where to read more.
    #[must_use]
    pub fn homepage(mut self, url: &str) -> Self {
        self.metadata.homepage = Some(url.to_owned());
        self
    }

    /// Called once before any request, within 10 s of the start: to look at the settings, open files, start threads.
    /// A [`Refusal`] ends the plugin, and the operator is shown its reason.
    ///
    /// ```no_run
    /// # use plugrack_sdk::{Plugin, Refusal};
    /// # let plugin = Plugin::new("a", "A", "1", "a", "/a");
    /// plugin.on_init(|context| match context.config().get("title") {
    ///     Some(_) => Ok(()),
    ///     None => Err(Refusal::new("set a title")),
    /// });
    /// ```
    #[must_use]
    pub fn on_init(mut self, handler: impl Fn(&Context) -> Result<(), Refusal> + Send + Sync + 'static) -> Self {
        self.init = Box::new(handler);
        self
    }

    /// Makes it a proprietary plugin: it starts only with a licence that one of these keys has signed, for this plugin and this
    /// instance, and that covers its release date (`YYYY-MM-DD`). Any other is refused before the init handler is called: the
    /// operator is told what to do, and the plugin exits 78, or 75 while the clock is not set. [`Context::granted`] has what the
    /// licence grants.
    ///
    /// Each key is its name and its text, as `plugrack license keygen` prints them. Keep those whose licences are still good.
    ///
    /// ```should_panic
    /// # use plugrack_sdk::Plugin;
    /// # let plugin = Plugin::new("a", "A", "1", "a", "/a");
    /// plugin.licensed(&[("acme-2026a", "k4.public.…")], "2026-11-02");
    /// ```
    ///
    /// # Panics
    /// When a key or the date is not of its form: the plugin's author has to mend it.
    #[cfg(feature = "license")]
    #[must_use]
    #[expect(clippy::panic, reason = "a mistake in the program, which every start meets")]
    pub fn licensed(mut self, keys: &[(&str, &str)], release_date: &str) -> Self {
        self.licensed = match super::licensed::Licensed::new(keys, release_date) {
            Ok(licensed) => Some(licensed),
            Err(error) => panic!("{} is not licensed rightly: {error}", self.metadata.id),
        };
        self
    }

    /// Called for the operator's reads and writes of the plugin's keys, to check, refuse or compute them. Without it each
    /// operation is performed as it is. A [`KvError::Refused`] reaches the operator with its code and message.
    ///
    /// ```no_run
    /// # use plugrack_sdk::{KvError, Operation, Plugin};
    /// # let plugin = Plugin::new("a", "A", "1", "a", "/a");
    /// plugin.on_kv(|context, operation| match operation {
    ///     Operation::Set { key: "color", value } if value != b"red" => Err(KvError::refused("bad_color", "only red will do")),
    ///     _ => operation.perform(context.kv()),
    /// });
    /// ```
    #[must_use]
    pub fn on_kv(
        mut self,
        handler: impl Fn(&Context, Operation<'_>) -> Result<Outcome, KvError> + Send + Sync + 'static,
    ) -> Self {
        self.kv = Box::new(handler);
        self
    }

    /// Called for each message of a WebSocket, text or binary. The host passes [WebSockets](websocket) to a plugin that has this
    /// handler or one of the two below.
    ///
    /// If the handler fails or panics, its socket is closed with the code 1011, and the reason goes to the plugin's log.
    ///
    /// ```no_run
    /// # use plugrack_sdk::Plugin;
    /// # let plugin = Plugin::new("a", "A", "1", "a", "/a");
    /// plugin.on_websocket(|socket, message| socket.send(message));
    /// ```
    #[must_use]
    pub fn on_websocket<R: HandlerResult>(mut self, handler: impl Fn(&Socket, Message) -> R + Send + Sync + 'static) -> Self {
        self.websocket.message = Some(Box::new(move |socket, message| handler(socket, message).into_result()));
        self.speaks_websocket()
    }

    /// Called when a client asks for a WebSocket, to accept or refuse it; [`IntoOpening`] has what it may return. Without this
    /// handler every socket is accepted.
    ///
    /// ```no_run
    /// # use plugrack_sdk::{Plugin, Response};
    /// # let plugin = Plugin::new("a", "A", "1", "a", "/a");
    /// plugin.on_websocket_open(|socket| match socket.header("cookie") {
    ///     Some(_) => None,
    ///     None => Some(Response::text("log in first\n").status(403)),
    /// });
    /// ```
    #[must_use]
    pub fn on_websocket_open<R: IntoOpening>(mut self, handler: impl Fn(&Socket) -> R + Send + Sync + 'static) -> Self {
        self.websocket.open = Some(Box::new(move |socket| handler(socket).into_opening()));
        self.speaks_websocket()
    }

    /// Called once for each WebSocket that was accepted, after its last message: the client or the plugin has closed it, or the
    /// client has gone.
    ///
    /// ```no_run
    /// # use plugrack_sdk::Plugin;
    /// # let plugin = Plugin::new("a", "A", "1", "a", "/a");
    /// plugin.on_websocket_close(|socket, close| eprintln!("{socket:?} is closed: {close:?}"));
    /// ```
    #[must_use]
    pub fn on_websocket_close<R: HandlerResult>(mut self, handler: impl Fn(&Socket, Close) -> R + Send + Sync + 'static) -> Self {
        self.websocket.close = Some(Box::new(move |socket, close| handler(socket, close).into_result()));
        self.speaks_websocket()
    }

    fn speaks_websocket(mut self) -> Self {
        if !self.metadata.speaks.iter().any(|kind| kind == WEBSOCKET) {
            self.metadata.speaks.push(WEBSOCKET.to_owned());
        }
        self
    }

    /// Runs the plugin as the host has called it, and gives what `main` returns: with `--metadata` it prints its metadata;
    /// otherwise it answers requests with `handler` until the host tells it to stop.
    ///
    /// A handler that fails or panics is answered with status 500, and the reason goes to the plugin's log.
    pub fn serve<R: IntoResponse>(self, handler: impl Fn(&mut Request<'_>) -> R + Send + Sync + 'static) -> ExitCode {
        if std::env::args_os().nth(1).is_some_and(|argument| argument == "--metadata") {
            return self.print_metadata();
        }
        let Some(socket) = std::env::var_os("PLUGRACK_SOCKET") else {
            log(format_args!("{} is a plugin: plugrack starts it, and PLUGRACK_SOCKET is not set", self.metadata.id));
            return ExitCode::from(USAGE);
        };
        match UnixListener::bind(&socket) {
            Ok(listener) => self.serve_on(listener, handler),
            Err(error) => {
                log(format_args!("cannot listen on {}: {error}", socket.display()));
                ExitCode::FAILURE
            }
        }
    }

    /// Serves the connections of a socket until the host tells the plugin to stop.
    pub(super) fn serve_on<R: IntoResponse>(
        mut self,
        listener: UnixListener,
        handler: impl Fn(&mut Request<'_>) -> R + Send + Sync + 'static,
    ) -> ExitCode {
        let http = Box::new(move |request: &mut Request<'_>| handler(request).into_response());
        let concurrency = self.metadata.concurrency;
        let workers = websocket::Workers::new(worker_threads(getrlimit(Resource::Data).current, concurrency));
        let websocket = std::mem::take(&mut self.websocket);
        let (init, kv) = self.start();
        match Server::new(concurrency, Handlers { init, kv, http, websocket }, workers) {
            Ok(server) => server.run(listener),
            Err(error) => {
                log(format_args!("cannot watch connections: {error}"));
                ExitCode::FAILURE
            }
        }
    }

    /// What is done at the start, and for the operator's requests.
    fn start(self) -> (Box<InitHandler>, Box<KvHandler>) {
        #[cfg(feature = "license")]
        if let Some(licensed) = self.licensed {
            let init = self.init;
            let checked = move |context: &Context| licensed.check(context).and_then(|()| init(context));
            return (Box::new(checked), self.kv);
        }
        (self.init, self.kv)
    }

    fn print_metadata(&self) -> ExitCode {
        match self.checked_metadata().and_then(|json| Ok(writeln!(std::io::stdout(), "{json}")?)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                log(format_args!("{error}"));
                ExitCode::FAILURE
            }
        }
    }

    /// The metadata as JSON, if the host will take it.
    fn checked_metadata(&self) -> Result<String, Error> {
        self.metadata.check()?;
        Ok(serde_json::to_string(&self.metadata)?)
    }
}

/// How many requests are handled at once unless the plugin says otherwise, in a process of at most so many bytes of data.
fn default_concurrency(memory: Option<u64>) -> u32 {
    let room = memory.map(|memory| memory.saturating_sub(MEMORY_KEPT) / MEMORY_FOR_ONE);
    room.and_then(|room| u32::try_from(room).ok()).map_or(DEFAULT_CONCURRENCY, |room| room.clamp(1, DEFAULT_CONCURRENCY))
}

/// How many threads call handlers of WebSockets at most: as many as the concurrency, where memory has room for them beside those of
/// requests.
fn worker_threads(memory: Option<u64>, concurrency: u32) -> usize {
    let kept = MEMORY_KEPT + u64::from(concurrency) * MEMORY_FOR_ONE;
    let room = memory.map(|memory| memory.saturating_sub(kept) / MEMORY_FOR_ONE);
    let threads = room.map_or(u64::from(concurrency), |room| room.min(u64::from(concurrency)));
    usize::try_from(threads).unwrap_or(usize::MAX).max(1)
}

impl From<Metadata> for Plugin {
    fn from(metadata: Metadata) -> Self {
        Self {
            metadata,
            init: Box::new(|_| Ok(())),
            kv: Box::new(|context, operation| operation.perform(context.kv())),
            websocket: websocket::Handlers::default(),
            #[cfg(feature = "license")]
            licensed: None,
        }
    }
}

impl std::fmt::Debug for Plugin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plugin").field("metadata", &self.metadata).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sixteen_requests_are_handled_at_once_where_memory_has_room_for_their_threads() {
        const MIB: u64 = 1 << 20;
        for (memory, expected) in
            [(None, 16), (Some(u64::MAX), 16), (Some(64 * MIB), 16), (Some(32 * MIB), 3), (Some(24 * MIB), 1), (Some(0), 1)]
        {
            assert_eq!(default_concurrency(memory), expected, "{memory:?}");
        }
    }

    #[test]
    fn handlers_of_websockets_have_as_many_threads_as_the_concurrency_where_memory_has_room_for_them() {
        const MIB: u64 = 1 << 20;
        for (memory, concurrency, expected) in [
            (None, 16, 16),
            (None, 256, 256),
            (None, 0, 1),
            (Some(u64::MAX), 4, 4),
            (Some(64 * MIB), 8, 8),
            (Some(64 * MIB), 12, 4),
        ] {
            assert_eq!(worker_threads(memory, concurrency), expected, "{memory:?} {concurrency}");
        }
        assert_eq!(worker_threads(Some(32 * MIB), default_concurrency(Some(32 * MIB))), 1);
    }

    #[test]
    fn metadata_is_what_the_host_takes() {
        let plugin = Plugin::new("probe", "Probe", "1.0.0", "🔬", "/probe");
        let plugin = plugin.concurrency(4);
        let plugin = plugin.description("what").author("who").homepage("where");
        let metadata = Metadata::parse(plugin.checked_metadata().unwrap().as_bytes()).unwrap();
        assert_eq!(metadata, plugin.metadata);
        assert_eq!((&*metadata.id, metadata.concurrency, metadata.homepage.as_deref()), ("probe", 4, Some("where")));
        let named = Plugin::new("probe", "Probe", "1.0.0", "🔬", "").hosts(&["probe.example", "*.probe.example"]);
        let named = named.rewrite_below_route().redirect_to_slash();
        let metadata = Metadata::parse(named.checked_metadata().unwrap().as_bytes()).unwrap();
        assert_eq!((metadata.route, &*metadata.host), (None, &["probe.example".to_owned(), "*.probe.example".to_owned()][..]));
        assert_eq!((metadata.below_route, metadata.trailing_slash), (BelowRoute::Rewrite, TrailingSlash::Redirect));
        assert!(metadata.speaks.is_empty() && metadata.origins.is_empty());
        let speaking = Plugin::new("probe", "Probe", "1.0.0", "🔬", "/probe").origins(&["https://app.example", "*"]);
        let speaking = speaking.on_websocket_open(|_| ()).on_websocket(|_, _| ()).on_websocket_close(|_, _| ());
        let metadata = Metadata::parse(speaking.checked_metadata().unwrap().as_bytes()).unwrap();
        assert_eq!((metadata.speaks, metadata.origins), (vec![WEBSOCKET.into()], vec!["https://app.example".into(), "*".into()]));
        for one in [
            Plugin::new("probe", "Probe", "1", "🔬", "/probe").on_websocket(|_, _| ()),
            Plugin::new("probe", "Probe", "1", "🔬", "/probe").on_websocket_open(|_| ()),
            Plugin::new("probe", "Probe", "1", "🔬", "/probe").on_websocket_close(|_, _| ()),
        ] {
            assert_eq!(one.metadata.speaks, [WEBSOCKET]);
        }
        let refused = Plugin::new("Probe", "Probe", "1.0.0", "🔬", "/probe").checked_metadata().unwrap_err();
        assert!(refused.to_string().contains("id"), "{refused}");
    }
}
