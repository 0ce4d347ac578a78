//! The guard: a small process beside the host that ends what plugins have started, however the host ends.
//!
//! The kernel kills a plugin with its host, but not the plugin's own children. The guard is told the plugins' sessions by lines on a
//! pipe, which closes when the host ends; then it kills what is left of them, and ends too.

use crate::pause::pause;
use crate::process::{Process, RUN_VARIABLE, run_id, small_thread};
use crate::remains::{self, Marks};
use crossbeam_channel::{Receiver, Sender, bounded};
use rustix::io::ioctl_fionbio;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io::{self, PipeWriter, Write};
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The first argument that makes the program the guard. Not a subcommand: no operator types it.
pub(crate) const GUARD: &str = "__guard";

/// Time in which the guard ends what was left.
const END_TIME: Duration = Duration::from_secs(2);

/// Time the host waits for the guard's end: some more than the guard takes.
const FINISH_TIME: Duration = Duration::from_millis(2500);

/// Pause before a guard that has ended is replaced.
const REPLACE_PAUSE: Duration = Duration::from_secs(1);

/// The host's end of the guard.
pub(crate) struct Guard {
    state: Arc<Mutex<State>>,
    /// Closes when the last guard has ended.
    ended: Receiver<()>,
}

#[derive(Default)]
struct State {
    sessions: BTreeSet<i32>,
    /// Open while there is a guard.
    pipe: Option<PipeWriter>,
    finishing: bool,
}

impl Guard {
    /// Starts the guard, on a thread that starts another should it end.
    pub(crate) fn start() -> io::Result<Self> {
        let state = Arc::<Mutex<State>>::default();
        let (alive, ended) = bounded(0);
        let kept = Arc::clone(&state);
        small_thread("guard").spawn(move || {
            keep(&kept);
            drop::<Sender<()>>(alive);
        })?;
        Ok(Self { state, ended })
    }

    /// Notes a plugin's session.
    pub(crate) fn add(&self, session: i32) {
        let mut state = lock(&self.state);
        state.sessions.insert(session);
        state.tell(session);
    }

    /// Forgets a session of which nothing is left.
    pub(crate) fn remove(&self, session: i32) {
        let mut state = lock(&self.state);
        state.sessions.remove(&session);
        state.tell(-session);
    }

    /// Has the guard end what is left, and waits for that.
    pub(crate) fn finish(&self) {
        let mut state = lock(&self.state);
        state.finishing = true;
        state.pipe = None;
        drop(state);
        self.ended.recv_timeout(FINISH_TIME).unwrap_or_default();
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps a guard at work until the host finishes.
fn keep(state: &Mutex<State>) {
    loop {
        // A lock that is not bound would be held as long as the guard lives.
        let mut locked = lock(state);
        if locked.finishing {
            return;
        }
        let replaced = replace(&mut locked);
        drop(locked);
        match replaced {
            Ok(process) => {
                let exit = process.wait();
                let mut state = lock(state);
                state.pipe = None;
                if !state.finishing {
                    log::warn!("the guard process ended ({exit}); another takes its place");
                }
            }
            Err(error) => log::warn!("without its guard process, a killed host may leave behind what plugins start: {error}"),
        }
        if !lock(state).finishing {
            pause(REPLACE_PAUSE);
        }
    }
}

fn replace(state: &mut State) -> io::Result<Process> {
    let (reader, writer) = io::pipe()?;
    // A guard that does not read must not stop the host.
    ioctl_fionbio(&writer, true)?;
    state.pipe = Some(writer);
    // Before there is a guard: one that is there knows them all, should the host end in this moment.
    for session in state.sessions.clone() {
        state.tell(session);
    }
    Process::helper(GUARD, run_id(), reader).inspect_err(|_| state.pipe = None)
}

impl State {
    /// Tells the guard of a session: of its end by the negative number. One that is gone will be told everything anew.
    fn tell(&mut self, session: i32) {
        if let Some(pipe) = &mut self.pipe {
            drop(writeln!(pipe, "{session}"));
        }
    }
}

/// The guard: `plugrack __guard RUN` reads from standard input, and at its end kills what the plugins of that run have left.
pub(crate) fn guard_main(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let Some(run) = arguments.next() else { return ExitCode::from(64) };
    // What ends the host, from a terminal or by name, must not end its guard first.
    let ignored = Arc::<AtomicBool>::default();
    let set_up = rustix::process::setsid().map_err(io::Error::from).and_then(|_| {
        std::env::set_current_dir("/")?;
        [SIGTERM, SIGINT, SIGHUP]
            .into_iter()
            .try_for_each(|signal| signal_hook::flag::register(signal, ignored.clone()).map(drop))
    });
    if let Err(error) = set_up {
        log::error!("the guard cannot set itself up: {error}");
        return ExitCode::FAILURE;
    }
    let mut sessions = BTreeSet::new();
    for session in io::stdin().lines().map_while(Result::ok).filter_map(|line| line.parse::<i32>().ok()) {
        match session {
            0.. => drop(sessions.insert(session)),
            _ => drop(sessions.remove(&-session)),
        }
    }
    let killed = remains::end(&Marks { sessions, variable: (RUN_VARIABLE, run) }, END_TIME);
    if killed > 0 {
        log::info!("ended {killed} processes that plugins had started and that outlived them");
    }
    ExitCode::SUCCESS
}
