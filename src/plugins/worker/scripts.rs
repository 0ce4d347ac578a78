//! A worker of a plugin whose scripts answer by FastCGI or CGI: it finds the script of a request, and passes the answer on. What lies
//! beside scripts of FastCGI is answered from its file.
//!
//! A request is sent once. Whatever becomes of it, no other script gets it.

use super::exchange::{LONG_STREAM, SETTLE_TIME};
use super::files::Surroundings;
use super::intake::serve_each;
use super::stalling::Stalling;
use super::{RECONNECT_PAUSE, RECONNECT_TIME, STREAM_IDLE};
use crate::apps::cgi::Wire;
use crate::apps::cgi::exchange::Exchange;
use crate::apps::cgi::process::CgiWire;
use crate::apps::cgi::response::Head;
use crate::apps::cgi::scripts::{Found, Rule, Script, Scripts};
use crate::apps::cgi::variables::{Variables, variables};
use crate::apps::fastcgi::FastCgiWire;
use crate::apps::manifest::{Kind, Run};
use crate::apps::static_files::{Site, SiteOptions};
use crate::http::prefix::Mount;
use crate::http::request::{BodyLength, split_target};
use crate::http::{HttpError, Request, errors};
use crate::plugins::context::Owner;
use crate::plugins::plugin::{CountedStream, Plugin};
use crate::plugins::process_state::{ProcessState, ScriptStarter};
use crate::process::{Launch, Pipes, Process, Reach};
use crate::system::rlimits;
use crate::util::pause::pause;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Interval at which a wait looks after the queue, the client and the process. Deadlines are kept to this precision.
const TICK: Duration = Duration::from_millis(100);

/// A worker of a plugin whose scripts answer.
pub(crate) struct ScriptWorker {
    plugin: Arc<Plugin>,
    process: Arc<ProcessState>,
    site: Site,
    scripts: Scripts,
    /// Whether it stays while it is idle.
    first: bool,
}

/// The beginning of an answer.
struct Beginning {
    head: Head,
    /// The beginning of its body.
    first: Vec<u8>,
    /// Whether more of it follows.
    more: bool,
}

/// Why a request gets no answer, or the rest of one.
enum Failure {
    /// The client has gone.
    Cancelled,
    /// The client has broken off its body.
    BadBody,
    /// No time is left.
    TooLate(String),
    /// The script fails it.
    Script(String),
}

impl ScriptWorker {
    /// Opens the directory of a plugin's scripts.
    ///
    /// # Errors
    /// The directory cannot be opened.
    pub(crate) fn open(plugin: Arc<Plugin>, process: Arc<ProcessState>, first: bool) -> io::Result<Self> {
        let run = process.run().ok_or(io::ErrorKind::NotFound)?;
        let mut scripts = scripts_of(run);
        if let Some((program, _)) = process.scripts.as_ref().and_then(|starter| starter.command.as_ref()) {
            // It stands for a script, at its own absolute path.
            scripts.script = Some(program.to_string_lossy().into_owned());
        }
        let site = Site::open(&files_beside(run))?;
        Ok(Self { plugin, process, site, scripts, first })
    }

    /// Serves requests until the plugin is to stop, or the worker is surplus.
    pub(crate) fn run(mut self) {
        let (plugin, process, first) = (Arc::clone(&self.plugin), Arc::clone(&self.process), self.first);
        serve_each((&plugin, &process), first, &mut self, |this| this.site.release(), Self::serve);
    }

    fn serve(&mut self, request: Request, stalling: &Stalling) {
        self.site.refresh();
        let below = split_target(request.target()).0.get(request.mount..).unwrap_or_default();
        match self.scripts.find(below, |path| self.site.place(path)) {
            Found::Files => {
                let surroundings = Surroundings { plugin: &self.plugin, process: &self.process, stalling };
                self.site.serve(request, &surroundings);
            }
            Found::Missing => request.fail(errors::NOT_FOUND),
            Found::Script(_) if request.length == BodyLength::Unknown && self.process.kind() == Kind::FastCgi => {
                request.fail(errors::LENGTH_REQUIRED);
            }
            Found::Script(script) => self.run_script(request, &script, stalling),
        }
    }

    /// Has a script answer.
    fn run_script(&self, mut request: Request, script: &Script, stalling: &Stalling) {
        ProcessState::set_flag(&self.process.asked);
        if !request.is_safe() {
            self.plugin.scaling.note_blocking();
        }
        let begun = self.open_wire(&request, script, stalling).and_then(|wire| {
            let mut exchange = Exchange::new(wire);
            let beginning = self.begin(&mut request, &mut exchange, stalling)?;
            Ok((exchange, beginning))
        });
        let (mut exchange, beginning) = match begun {
            Ok(begun) => begun,
            Err(failure) => return self.fail(request, failure),
        };
        ProcessState::set_flag(&self.process.served);
        match self.pass_on(&mut request, &mut exchange, beginning, stalling) {
            Ok(()) => {}
            Err(Failure::Cancelled) => request.responder.cut(),
            Err(Failure::BadBody) => self.cut(&mut request, "the client has broken off its body"),
            Err(Failure::TooLate(why) | Failure::Script(why)) => self.cut(&mut request, &why),
        }
    }

    /// Aborts an answer that has begun.
    fn cut(&self, request: &mut Request, why: &str) {
        // First the client, since the exit of a process may take a moment to be known.
        request.responder.cut();
        self.plugin.note_failed(&format!("{}: the answer was cut short: {}", request.name(), self.explained(why)));
    }

    /// Fails a request whose answer has not begun. The plugin's log has the reason first, so that it is there when the client has it.
    fn fail(&self, request: Request, failure: Failure) {
        let note = |why: &str| self.plugin.note_failed(&format!("{}: {why}", request.name()));
        let error: HttpError = match failure {
            Failure::Cancelled => return,
            Failure::BadBody => errors::BAD_BODY,
            Failure::TooLate(why) => {
                note(&why);
                errors::TIMEOUT
            }
            Failure::Script(why) => {
                note(&self.explained(&why));
                errors::BAD_GATEWAY
            }
        };
        request.fail(error);
    }

    /// Why a request failed; if the process has ended, its exit, which explains more.
    fn explained(&self, why: &str) -> String {
        if self.process.kind() == Kind::FastCgi
            && self.process.ends_within(SETTLE_TIME)
            && let Some(exit) = self.process.exit.get()
        {
            return format!("the process ended: {exit}");
        }
        why.to_owned()
    }

    /// Sends a request, and waits for the head of the answer, and for its end if it has no body.
    fn begin(&self, request: &mut Request, exchange: &mut Exchange, stalling: &Stalling) -> Result<Beginning, Failure> {
        let timeout = self.process.request_timeout;
        let mut head = None;
        loop {
            exchange.step(request, TICK);
            if head.is_none() {
                let mount = self.process.rewrites.then(|| Mount::of(request));
                head = exchange.take_head(mount).map_err(Failure::Script)?;
            }
            if let Some(found) = head.take_if(|_| !exchange.awaits_body(request)) {
                exchange.abort_body(request);
                let (first, more) = exchange.take_body().map_err(Failure::Script)?;
                if !request.is_head() && !matches!(found.response.status, 204 | 304) {
                    check_length(found.response.length, first.len() as u64, more)?;
                    return Ok(Beginning { head: found, first, more });
                }
                // Its script may have work left, so what it prints is read to the end.
                if !more {
                    return Ok(Beginning { head: found, first: Vec::new(), more });
                }
                head = Some(found);
            }
            self.look_around(request, stalling)?;
            // The client may be slow to send the body, so the time limit starts after it.
            match exchange.body_ended() {
                Some(ended) if ended.max(request.arrived).elapsed() < timeout => {}
                Some(_) => {
                    let what = if head.is_none() { "its answer began" } else { "it ended its answer without a body" };
                    return Err(Failure::TooLate(format!("{} s passed before {what}", timeout.as_secs_f32())));
                }
                None if exchange.moved().elapsed() < timeout.max(STREAM_IDLE) => {}
                None => {
                    let waited = timeout.max(STREAM_IDLE).as_secs_f32();
                    return Err(Failure::TooLate(format!("{waited} s passed before it had taken the body")));
                }
            }
            if exchange.is_body_broken() {
                return Err(Failure::BadBody);
            }
        }
    }

    /// Looks after the queue. Fails if nobody waits for the answer, or the process has ended.
    fn look_around(&self, request: &Request, stalling: &Stalling) -> Result<(), Failure> {
        if request.responder.is_cancelled() {
            return Err(Failure::Cancelled);
        }
        if request.arrived.elapsed() >= TICK && stalling.stall() {
            return Err(Failure::Script("the plugin was stopped".into()));
        }
        Ok(())
    }

    /// Opens the wire to a script. Tries until one is taken, as after a restart of the application, for a few seconds at most.
    fn open_wire(&self, request: &Request, script: &Script, stalling: &Stalling) -> Result<Box<dyn Wire>, Failure> {
        let length = if let BodyLength::Known(length) = request.length { Some(length) } else { None };
        let variables = variables(request, script, &self.scripts.root, length);
        if let Some(starter) = &self.process.scripts {
            let started = self.start(starter, script, variables, request.name());
            return started.map_err(|error| Failure::Script(rlimits::explain("cannot start its script", &error).0));
        }
        let deadline = Instant::now() + RECONNECT_TIME;
        loop {
            let (endpoint, uid) = (&self.process.endpoint, self.process.listener_uid());
            let error = match FastCgiWire::open(endpoint, uid, &variables, &self.plugin.log) {
                Ok(wire) => return Ok(Box::new(wire)),
                Err(error) => error,
            };
            self.look_around(request, stalling)?;
            if Instant::now() >= deadline {
                return Err(Failure::Script(format!("it takes no connection on {endpoint}: {error}")));
            }
            pause(RECONNECT_PAUSE);
        }
    }

    /// Starts a script of CGI.
    fn start(&self, starter: &ScriptStarter, script: &Script, variables: Variables, name: String) -> io::Result<Box<dyn Wire>> {
        let (plugin, log) = (self.plugin.id(), &self.plugin.log);
        let run = self.process.run().ok_or(io::ErrorKind::NotFound)?;
        let (program, arguments, directory) = match &starter.command {
            Some((program, arguments)) => (program.clone(), arguments.clone(), run.directory.clone()),
            None => {
                let program = self.scripts.root.join(OsStr::from_bytes(&script.file));
                let directory = program.parent().unwrap_or(&self.scripts.root).to_owned();
                (program, Vec::new(), directory)
            }
        };
        let launch = Launch { program, arguments, directory, env: starter.env.clone(), listener: None };
        let mut bounds = starter.bounds.clone();
        // Behind those of the operator, so that what the host says of the request counts.
        let variables = variables.into_iter().map(|(name, value)| (OsString::from_vec(name), OsString::from_vec(value)));
        bounds.variables.extend(variables);
        let ((stdin, sink), (source, stdout)) = (io::pipe()?, io::pipe()?);
        let pipes = Pipes { stdin: stdin.into(), stdout: stdout.into() };
        let start = || Process::start_script(&launch, &bounds, pipes, log, plugin);
        let process = starter.context.sessions.enter(Owner::new(plugin, bounds.uid, log), start, Process::pid)?;
        let context = Arc::clone(&starter.context);
        let reap = Box::new(move |process: Process| {
            context.sessions.leave(process.pid(), false, || process.reap(Reach::Marked));
        });
        Ok(Box::new(CgiWire::new(process, reap, (sink.into(), source.into()), log, name)?))
    }

    /// Passes an answer on to the client.
    fn pass_on(
        &self,
        request: &mut Request,
        exchange: &mut Exchange,
        beginning: Beginning,
        stalling: &Stalling,
    ) -> Result<(), Failure> {
        let Beginning { head: Head { response, events, .. }, first, mut more } = beginning;
        let (begun, declared, mut received) = (Instant::now(), response.length, first.len() as u64);
        let mut delivered = request.responder.answer(response, &first, 0, more);
        let mut counted: Option<CountedStream> = None;
        let mut looked = begun;
        while more {
            if counted.is_none() && (events || begun.elapsed() >= LONG_STREAM) {
                counted = Some(self.plugin.count_stream());
            }
            if request.responder.is_cancelled() || delivered.is_err() {
                return Err(Failure::Cancelled);
            }
            if events && self.process.stopping.load(Ordering::Relaxed) {
                // Event streams may end at any time, so this is not an error.
                request.responder.piece(&[], true).ok();
                return Ok(());
            }
            exchange.step(request, TICK);
            if looked.elapsed() >= TICK {
                looked = Instant::now();
                self.look_around(request, stalling)?;
            }
            let (bytes, follows) = exchange.take_body().map_err(Failure::Script)?;
            if bytes.is_empty() && follows {
                if exchange.moved().elapsed() >= STREAM_IDLE {
                    return Err(Failure::Script(format!("{} s passed without more of its answer", STREAM_IDLE.as_secs())));
                }
                continue;
            }
            more = follows;
            received += bytes.len() as u64;
            check_length(declared, received, more)?;
            stalling.wait_for_client(request);
            delivered = request.responder.piece(&bytes, !more);
        }
        Ok(())
    }
}

/// Checks that a body has the length that its head declares, as far as it was received.
fn check_length(declared: Option<u64>, received: u64, more: bool) -> Result<(), Failure> {
    match declared {
        Some(declared) if received > declared || (!more && received != declared) => {
            Err(Failure::Script(format!("its content-length is {declared}, its body has {received} bytes")))
        }
        _ => Ok(()),
    }
}

/// The scripts of a manifest.
fn scripts_of(run: &Run) -> Scripts {
    let rule = if run.kind == Kind::Cgi { Rule::Executable } else { Rule::Suffix };
    Scripts { root: run.root.clone(), script: run.script.clone(), index: run.index.clone(), rule }
}

/// The files beside the scripts of a manifest.
pub(crate) fn files_beside(run: &Run) -> SiteOptions {
    SiteOptions { root: run.root.clone(), index: scripts_of(run).plain_index(), spa: false, cache_control: None }
}
