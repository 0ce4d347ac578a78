//! The watchdog (guard): a small process beside the host that kills the plugins' orphans, however the host ends.
//!
//! The kernel kills a plugin with its host, but not the plugin's children. The guard reads the plugins' sessions as lines from a pipe,
//! which closes when the host ends. Then it kills what is left of them, and exits. If plugins have uids of their own, it kills everything
//! under those uids.

use crate::lock::LockExt;
use crate::process::orphans::{self, Marks};
use crate::process::{Process, RUN_VARIABLE, run_id};
use crate::util::log_throttle::{Repeat, more};
use crate::util::pause::pause;
use crate::util::threads;
use crate::util::threads::small_thread;
use crossbeam_channel::{Receiver, Sender, bounded};
use rustix::io::ioctl_fionbio;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::{self, PipeWriter, Write};
use std::ops::RangeInclusive;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// First argument of the guard. Not a subcommand, because operators do not use it.
pub(crate) const GUARD: &str = "__guard";

/// Time limit for the guard to kill orphans.
const END_TIME: Duration = Duration::from_secs(2);

/// Time the host waits for the guard to exit: a little more than the guard's own limit.
const FINISH_TIME: Duration = Duration::from_millis(2500);

/// Interval at which a starting host checks whether an earlier host's guard has exited.
const EARLIER_LOOK: Duration = Duration::from_millis(20);

/// Variable that identifies a guard by its host's socket.
const GUARD_VARIABLE: &str = "PLUGRACK_GUARD_OF";

/// Pause before a guard that exited is replaced.
const REPLACE_PAUSE: Duration = Duration::from_secs(1);

/// The host's handle of the guard.
pub(crate) struct Guard {
    shared: Arc<Shared>,
    /// Closes when the last guard has exited.
    ended: Receiver<()>,
    /// The plugins' uids.
    uids: Option<RangeInclusive<u32>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Notified when the host finishes.
    finishing: Condvar,
}

#[derive(Default)]
struct State {
    /// Each with the time its leader was started, see [`orphans::started`].
    sessions: BTreeMap<i32, Option<u64>>,
    /// The pipe to the guard, while there is one.
    pipe: Option<PipeWriter>,
    finishing: bool,
}

impl Guard {
    /// Starts the guard on a thread that replaces it if it exits. All processes under `uids` belong to plugins. First waits for the guard of
    /// an earlier host on the same `host_socket`, which would mistake this host's plugins for orphans.
    pub(crate) fn start(host_socket: &Path, uids: Option<RangeInclusive<u32>>) -> io::Result<Self> {
        let host_socket = host_socket.as_os_str().to_owned();
        let marks = Marks { variable: Some((GUARD_VARIABLE, host_socket.clone())), ..Marks::default() };
        let deadline = Instant::now() + FINISH_TIME;
        while orphans::any(&marks) && Instant::now() < deadline {
            pause(EARLIER_LOOK);
        }
        orphans::end(&marks, END_TIME);

        let shared = Arc::<Shared>::default();
        let (alive, ended) = bounded(0);
        let (kept, known) = (Arc::clone(&shared), uids.clone());
        let keep = move || {
            let _alive: &Sender<()> = &alive;
            keep(&kept, &host_socket, known.as_ref());
        };
        threads::restarting(small_thread("guard"), keep)?;
        Ok(Self { shared, ended, uids })
    }

    /// Adds the session of a plugin's process, which was just started and not reaped yet.
    pub(crate) fn add(&self, session: i32) {
        let started = orphans::started(session);
        let mut state = self.shared.state.locked();
        state.sessions.insert(session, started);
        state.tell(&Told::Begun(session, started));
    }

    /// Removes a session that has no process left.
    pub(crate) fn remove(&self, session: i32) {
        let mut state = self.shared.state.locked();
        state.sessions.remove(&session);
        state.tell(&Told::Over(session));
    }

    /// Tells the guard to kill orphans, and waits for it. Without a guard the host does that itself.
    pub(crate) fn finish(&self) {
        let mut state = self.shared.state.locked();
        state.finishing = true;
        self.shared.finishing.notify_all();
        let (guarded, sessions) = (state.pipe.take().is_some(), std::mem::take(&mut state.sessions));
        drop(state);
        if !guarded {
            end_all(run_id().into(), sessions, self.uids.clone());
        }
        self.ended.recv_timeout(FINISH_TIME).ok();
    }
}

/// Keeps a guard running until the host finishes.
fn keep(Shared { state, finishing }: &Shared, host_socket: &OsStr, uids: Option<&RangeInclusive<u32>>) {
    let (mut missing, mut ended) = (Repeat::default(), Repeat::default());
    loop {
        // Bound to a variable, or else the lock would be held for the lifetime of the guard.
        let mut locked = state.locked();
        if locked.finishing {
            return;
        }
        let replaced = replace(&mut locked, host_socket, uids);
        drop(locked);
        match replaced {
            Ok(process) => {
                if missing.over().is_some() {
                    log::info!("the guard process is running again");
                }
                let exit = process.wait();
                let mut state = state.locked();
                state.pipe = None;
                if !state.finishing
                    && let Some(unsaid) = ended.came(Instant::now())
                {
                    log::warn!("the guard process ended ({exit}) and is replaced{}", more(unsaid));
                }
            }
            Err(error) => {
                if let Some(unsaid) = missing.came(Instant::now()) {
                    log::warn!(
                        "the guard process cannot be started, so processes that plugins started may survive if the host is \
                         killed: {error}{}",
                        more(unsaid)
                    );
                }
            }
        }
        drop(finishing.wait_timeout_while(state.locked(), REPLACE_PAUSE, |state| !state.finishing));
    }
}

fn replace(state: &mut State, host_socket: &OsStr, uids: Option<&RangeInclusive<u32>>) -> io::Result<Process> {
    let (reader, writer) = io::pipe()?;
    // A guard that does not read must not block the host.
    ioctl_fionbio(&writer, true)?;
    state.pipe = Some(writer);
    // Written before the guard starts, so that it knows all sessions even if the host ends at this moment.
    for (session, started) in state.sessions.clone() {
        state.tell(&Told::Begun(session, started));
    }
    let uids = uids.map_or_else(String::new, |uids| format!("{}-{}", uids.start(), uids.end()));
    Process::helper(GUARD, &[run_id(), &uids], (GUARD_VARIABLE, host_socket), reader).inspect_err(|_| state.pipe = None)
}

/// A line to the guard about a session: `SESSION STARTED`, `SESSION ?` if the start time is unknown, or `-SESSION`.
#[derive(Debug, PartialEq, Eq)]
enum Told {
    /// The session exists, with the start time of its leader.
    Begun(i32, Option<u64>),
    /// The session has no process left.
    Over(i32),
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Begun(session, Some(started)) => write!(f, "{session} {started}"),
            Self::Begun(session, None) => write!(f, "{session} ?"),
            Self::Over(session) => write!(f, "-{session}"),
        }
    }
}

impl Told {
    /// None for a malformed line: a killed host may have written half of it.
    fn parse(line: &str) -> Option<Self> {
        match (line.strip_prefix('-'), line.split_once(' ')) {
            (Some(session), _) => session.parse().ok().map(Self::Over),
            (None, Some((session, "?"))) => Some(Self::Begun(session.parse().ok()?, None)),
            (None, Some((session, started))) => Some(Self::Begun(session.parse().ok()?, Some(started.parse().ok()?))),
            (None, None) => None,
        }
    }
}

impl State {
    /// Tells the guard about a session. If this fails, the guard has exited, and its replacement is told about all sessions.
    fn tell(&mut self, told: &Told) {
        if let Some(pipe) = &mut self.pipe {
            // In one write, so that a full pipe does not take half a line.
            drop(pipe.write_all(format!("{told}\n").as_bytes()));
        }
    }
}

/// The guard: `plugrack __guard RUN UIDS` reads sessions from standard input until it closes, then kills the orphans of that run.
pub(crate) fn guard_main(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let (Some(run), Some(uids)) = (arguments.next(), arguments.next()) else { return ExitCode::from(64) };
    let uids = uids.to_str().and_then(|uids| uids.split_once('-'));
    let uids = uids.and_then(|(first, last)| Some(first.parse().ok()?..=last.parse().ok()?));
    // Signals that end the host, from a terminal or by process name, must not end its guard first.
    let ignored = Arc::<AtomicBool>::default();
    let set_up = rustix::process::setsid().map_err(io::Error::from).and_then(|_| {
        std::env::set_current_dir("/")?;
        [SIGTERM, SIGINT, SIGHUP]
            .into_iter()
            .try_for_each(|signal| signal_hook::flag::register(signal, ignored.clone()).map(drop))
    });
    if let Err(error) = set_up {
        log::error!("the guard cannot start: {error}");
        return ExitCode::FAILURE;
    }
    let mut sessions = BTreeMap::new();
    for told in io::stdin().lines().map_while(Result::ok).filter_map(|line| Told::parse(&line)) {
        match told {
            Told::Begun(session, started) => drop(sessions.insert(session, started)),
            Told::Over(session) => drop(sessions.remove(&session)),
        }
    }
    end_all(run, sessions, uids);
    ExitCode::SUCCESS
}

/// Kills the orphans of a run's plugins.
fn end_all(run: OsString, sessions: BTreeMap<i32, Option<u64>>, uids: Option<RangeInclusive<u32>>) {
    let killed = orphans::end(&Marks { sessions, variable: Some((RUN_VARIABLE, run)), uids }, END_TIME).killed;
    if killed > 0 {
        log::info!("killed {killed} processes that plugins had started and that outlived them");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_guard_is_told_is_read_as_it_was_meant() {
        for told in [Told::Begun(7, Some(u64::MAX)), Told::Begun(i32::MAX, None), Told::Over(7)] {
            assert_eq!(Told::parse(&told.to_string()), Some(told));
        }
        for line in ["", "7", "-", "- 7", "7 ", "7 x", "x 7", "7 1 2", "-7 1"] {
            assert_eq!(Told::parse(line), None, "{line:?}");
        }
    }
}
