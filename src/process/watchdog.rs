//! The watchdog: a small process beside the host that kills the plugins' orphans, however the host ends.
//!
//! The kernel kills a plugin with its host, but not the plugin's children. The watchdog reads the plugins' sessions as lines from a pipe,
//! which closes when the host ends. Then it kills what is left of them, and exits. If plugins have uids of their own, it kills everything
//! under those uids. If the host's data directory is temporary, and the host could not remove it, the watchdog does.

use crate::lock::LockExt;
use crate::process::orphans::{self, Selector};
use crate::process::{Process, RUN_VARIABLE, run_id};
use crate::system::temporary;
use crate::util::log_throttle::{LogThrottle, suppressed_note};
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
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// First argument of the watchdog. Not a subcommand, because operators do not use it.
pub(crate) const ARGUMENT: &str = "__watchdog";

/// Time limit for the watchdog to kill orphans.
const KILL_TIME: Duration = Duration::from_secs(2);

/// Time the host waits for the watchdog to exit: a little more than the watchdog's own limit.
const FINISH_TIME: Duration = Duration::from_millis(2500);

/// Interval at which a starting host checks whether an earlier host's watchdog has exited.
const EARLIER_CHECK_PAUSE: Duration = Duration::from_millis(20);

/// Variable that identifies a watchdog by its host's socket.
const HOST_VARIABLE: &str = "PLUGRACK_GUARD_OF";

/// Pause before a watchdog that exited is replaced.
const REPLACE_PAUSE: Duration = Duration::from_secs(1);

/// The host's handle to the watchdog.
pub(crate) struct Watchdog {
    shared: Arc<Shared>,
    /// Closes when the last watchdog has exited.
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
    /// Each with the start time of its leader, see [`orphans::started`].
    sessions: BTreeMap<i32, Option<u64>>,
    /// The pipe to the watchdog, while there is one.
    pipe: Option<PipeWriter>,
    finishing: bool,
}

impl Watchdog {
    /// Starts the watchdog on a thread that replaces it if it exits. All processes under `uids` belong to plugins. First waits for the
    /// watchdog of an earlier host on the same `host_socket`, which would mistake this host's plugins for orphans. If the host ends without
    /// [`Watchdog::finish`], the directory `temporary` is removed.
    pub(crate) fn start(host_socket: &Path, uids: Option<RangeInclusive<u32>>, temporary: Option<PathBuf>) -> io::Result<Self> {
        let host_socket = host_socket.as_os_str().to_owned();
        let selector = Selector { variable: Some((HOST_VARIABLE, host_socket.clone())), ..Selector::default() };
        let deadline = Instant::now() + FINISH_TIME;
        while orphans::any(&selector) && Instant::now() < deadline {
            pause(EARLIER_CHECK_PAUSE);
        }
        orphans::kill_all(&selector, KILL_TIME);

        let shared = Arc::<Shared>::default();
        let (alive, ended) = bounded(0);
        let (kept, known) = (Arc::clone(&shared), uids.clone());
        let keep = move || {
            let _alive: &Sender<()> = &alive;
            keep(&kept, &host_socket, known.as_ref(), temporary.as_deref());
        };
        threads::restarting(small_thread("watchdog"), keep)?;
        Ok(Self { shared, ended, uids })
    }

    /// Adds the session of a plugin's process, which was just started and not reaped yet.
    pub(crate) fn add(&self, session: i32) {
        let started = orphans::started(session);
        let mut state = self.shared.state.locked();
        state.sessions.insert(session, started);
        state.tell(&Line::Started(session, started));
    }

    /// Removes a session that has no process left.
    pub(crate) fn remove(&self, session: i32) {
        let mut state = self.shared.state.locked();
        state.sessions.remove(&session);
        state.tell(&Line::Ended(session));
    }

    /// Tells the watchdog to kill orphans, and waits for it. Without a watchdog the host does that itself.
    pub(crate) fn finish(&self) {
        let mut state = self.shared.state.locked();
        state.finishing = true;
        self.shared.finishing.notify_all();
        state.tell(&Line::Finishing);
        let (watched, sessions) = (state.pipe.take().is_some(), std::mem::take(&mut state.sessions));
        drop(state);
        if !watched {
            end_all(run_id().into(), sessions, self.uids.clone());
        }
        self.ended.recv_timeout(FINISH_TIME).ok();
    }
}

/// Keeps a watchdog running until the host finishes.
fn keep(Shared { state, finishing }: &Shared, host_socket: &OsStr, uids: Option<&RangeInclusive<u32>>, temporary: Option<&Path>) {
    let (mut missing, mut ended) = (LogThrottle::default(), LogThrottle::default());
    loop {
        // Bound to a variable, or else the lock would be held for the lifetime of the watchdog.
        let mut locked = state.locked();
        if locked.finishing {
            return;
        }
        let replaced = replace(&mut locked, host_socket, uids, temporary);
        drop(locked);
        match replaced {
            Ok(process) => {
                if missing.clear().is_some() {
                    log::info!("the watchdog process is running again");
                }
                let exit = process.wait();
                let mut state = state.locked();
                state.pipe = None;
                if !state.finishing
                    && let Some(suppressed) = ended.hit(Instant::now())
                {
                    log::warn!("the watchdog process ended ({exit}) and is replaced{}", suppressed_note(suppressed));
                }
            }
            Err(error) => {
                if let Some(suppressed) = missing.hit(Instant::now()) {
                    log::warn!(
                        "the watchdog process cannot be started, so processes that plugins started may survive if the host is \
                         killed: {error}{}",
                        suppressed_note(suppressed)
                    );
                }
            }
        }
        drop(finishing.wait_timeout_while(state.locked(), REPLACE_PAUSE, |state| !state.finishing));
    }
}

fn replace(
    state: &mut State,
    host_socket: &OsStr,
    uids: Option<&RangeInclusive<u32>>,
    temporary: Option<&Path>,
) -> io::Result<Process> {
    let (reader, writer) = io::pipe()?;
    // A watchdog that does not read must not block the host.
    ioctl_fionbio(&writer, true)?;
    state.pipe = Some(writer);
    // Written before the watchdog starts, so that it knows all sessions even if the host ends at this moment.
    for (session, started) in state.sessions.clone() {
        state.tell(&Line::Started(session, started));
    }
    let uids = uids.map_or_else(String::new, |uids| format!("{}-{}", uids.start(), uids.end()));
    // The path is one that this program has made.
    let temporary = temporary.map(Path::to_string_lossy).unwrap_or_default();
    Process::helper(ARGUMENT, &[run_id(), &uids, &temporary], (HOST_VARIABLE, host_socket), reader)
        .inspect_err(|_| state.pipe = None)
}

/// A line to the watchdog about a session: `SESSION STARTED`, `SESSION ?` if the start time is unknown, or `-SESSION`; or `.` if the host
/// ends in order.
#[derive(Debug, PartialEq, Eq)]
enum Line {
    /// The session exists, with the start time of its leader.
    Started(i32, Option<u64>),
    /// The session has no process left.
    Ended(i32),
    /// The host ends in order.
    Finishing,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Started(session, Some(started)) => write!(f, "{session} {started}"),
            Self::Started(session, None) => write!(f, "{session} ?"),
            Self::Ended(session) => write!(f, "-{session}"),
            Self::Finishing => f.write_str("."),
        }
    }
}

impl Line {
    /// None for a malformed line: a killed host may have written half of it.
    fn parse(line: &str) -> Option<Self> {
        match (line.strip_prefix('-'), line.split_once(' ')) {
            _ if line == "." => Some(Self::Finishing),
            (Some(session), _) => session.parse().ok().map(Self::Ended),
            (None, Some((session, "?"))) => Some(Self::Started(session.parse().ok()?, None)),
            (None, Some((session, started))) => Some(Self::Started(session.parse().ok()?, Some(started.parse().ok()?))),
            (None, None) => None,
        }
    }
}

impl State {
    /// Tells the watchdog about a session. If this fails, the watchdog has exited, and its replacement is told about all sessions.
    fn tell(&mut self, line: &Line) {
        if let Some(pipe) = &mut self.pipe {
            // In one write, so that a full pipe does not take half a line.
            drop(pipe.write_all(format!("{line}\n").as_bytes()));
        }
    }
}

/// The watchdog: `plugrack __watchdog RUN UIDS TEMPORARY` reads sessions from standard input until it closes, then kills the orphans of
/// that run, and removes the temporary directory, if there is one and the host does not.
pub(crate) fn main(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let (Some(run), Some(uids), Some(temporary)) = (arguments.next(), arguments.next(), arguments.next()) else {
        return ExitCode::from(64);
    };
    let mut temporary = Some(PathBuf::from(temporary)).filter(|path| path.is_absolute());
    let uids = uids.to_str().and_then(|uids| uids.split_once('-'));
    let uids = uids.and_then(|(first, last)| Some(first.parse().ok()?..=last.parse().ok()?));
    // Signals that end the host, from a terminal or by process name, must not end its watchdog first.
    let ignored = Arc::<AtomicBool>::default();
    let set_up = rustix::process::setsid().map_err(io::Error::from).and_then(|_| {
        std::env::set_current_dir("/")?;
        [SIGTERM, SIGINT, SIGHUP]
            .into_iter()
            .try_for_each(|signal| signal_hook::flag::register(signal, ignored.clone()).map(drop))
    });
    if let Err(error) = set_up {
        log::error!("the watchdog cannot start: {error}");
        return ExitCode::FAILURE;
    }
    let mut sessions = BTreeMap::new();
    for line in io::stdin().lines().map_while(Result::ok).filter_map(|line| Line::parse(&line)) {
        match line {
            Line::Started(session, started) => drop(sessions.insert(session, started)),
            Line::Ended(session) => drop(sessions.remove(&session)),
            Line::Finishing => temporary = None,
        }
    }
    end_all(run, sessions, uids);
    if let Some(path) = temporary
        && let Err(error) = temporary::remove(&path)
    {
        log::error!("cannot remove {}, the temporary data directory: {error}", path.display());
    }
    ExitCode::SUCCESS
}

/// Kills the orphans of a run's plugins.
fn end_all(run: OsString, sessions: BTreeMap<i32, Option<u64>>, uids: Option<RangeInclusive<u32>>) {
    let killed = orphans::kill_all(&Selector { sessions, variable: Some((RUN_VARIABLE, run)), uids }, KILL_TIME).killed;
    if killed > 0 {
        log::info!("killed {killed} processes that plugins had started and that outlived them");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_to_the_watchdog_parses_to_what_was_written() {
        for line in [Line::Started(7, Some(u64::MAX)), Line::Started(i32::MAX, None), Line::Ended(7), Line::Finishing] {
            assert_eq!(Line::parse(&line.to_string()), Some(line));
        }
        for line in ["", "7", "-", "- 7", "7 ", "7 x", "x 7", "7 1 2", "-7 1"] {
            assert_eq!(Line::parse(line), None, "{line:?}");
        }
    }
}
