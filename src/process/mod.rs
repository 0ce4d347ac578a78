//! Children: started, confined, their output captured, stopped with all they started.
//!
//! The host starts itself again as a small shim, which sets up its own process by safe calls and then becomes the plugin. So
//! nothing of ours runs between fork and exec, where little is allowed, and no unsafe code is needed.

pub(crate) mod chown_tree;
pub(crate) mod exit;
pub(crate) mod failure_line;
pub(crate) mod log_file;
pub(crate) mod oom;
pub(crate) mod orphans;
pub(crate) mod output;
pub(crate) mod preflight;
pub(crate) mod watchdog;

use crate::lock::{LockExt, unpoisoned};
use crate::process::exit::Exit;
use crate::process::failure_line::failure_line;
use crate::process::output::PluginLog;
use crate::util::escape;
use crate::util::pause::pause;
use crate::util::threads;
use crate::util::threads::{small_thread, timespec};
use crossbeam_channel::{Receiver, Sender, bounded};
use nix::unistd::execve;
use orphans::Marks;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::Access;
use rustix::io::Errno;
use rustix::process::{Gid, Pid, PidfdFlags, Resource, Rlimit, Signal, Uid, WaitId, WaitIdOptions, pidfd_open};
use rustix::stdio::{dup2_stdin, stdin};
use signal_hook::consts::{SIGCHLD, SIGPIPE};
use signal_hook::iterator::Signals;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::str::FromStr;
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// The first argument that makes the program the shim. Not a subcommand: no operator types it.
pub(crate) const SHIM: &str = "__exec";

/// The first argument that makes the program the sweeper, see [`sweep`]. Not a subcommand either.
pub(crate) const SWEEPER: &str = "__sweep";

/// Time in which whatever runs under a uid is killed by sweepers.
const SWEEP_TIME: Duration = Duration::from_secs(1);

/// Stands in the shim's arguments for a bound that is not set.
const UNBOUND: &str = "-";

/// This program's own file, whatever lies at its path by now. Only where there is a `/proc`.
const OWN_FILE: &str = "/proc/self/exe";

/// Where [`OWN_FILE`] is missing: the path this program was executed by.
static EXECUTED_BY: OnceLock<PathBuf> = OnceLock::new();

/// Processes and threads at once of a plugin with a uid of its own: two for each of 256 connections, the most a plugin has.
const MAX_PROCESSES: u64 = 512;

/// What is kept of a child's standard error when its standard output is what matters, in bytes.
const MAX_ERROR_OUTPUT: usize = 16 * 1024;

/// How long the last output of a process that has ended is waited for.
const LAST_OUTPUT_TIME: Duration = Duration::from_millis(200);

/// How often a wait for output looks whether the child has ended while another process keeps its output open.
const EXIT_CHECK: Duration = Duration::from_millis(50);

/// How often a process is looked at where the kernel has no handle of its end.
const EXIT_LOOK: Duration = Duration::from_millis(1);

/// The variable that every child, and so all it starts, has from this run of the host: by it they are found again.
pub(crate) const RUN_VARIABLE: &str = "PLUGRACK_RUN";

/// The variable that tells a plugin where to listen, and by which what it has left is told from what others have.
pub(crate) const SOCKET_VARIABLE: &str = "PLUGRACK_SOCKET";

/// The variable that a program has while it is asked something, and by which what it has left is found.
const ASK_VARIABLE: &str = "PLUGRACK_ASK";

/// Longest report of the shim in bytes, which a pipe takes in one write whether it is read or not.
const MAX_REPORT: usize = 4096;

/// How long the shim's report is waited for once it has ended: it is there by then, and its reader needs a processor.
const REPORT_TIME: Duration = Duration::from_secs(2);

/// How long a question waits for its uid, under which another program is being asked: longer than a question takes.
const TURN_TIME: Duration = Duration::from_secs(60);

/// Errors of `execve` that pass: another try may succeed with the same file.
const PASSING: [Errno; 7] = [Errno::AGAIN, Errno::IO, Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::STALE, Errno::TXTBSY];

/// Time in which all that a plugin has left is ended.
const REMAINS_TIME: Duration = Duration::from_secs(1);

/// Variables a child has from the host's environment, which holds secrets otherwise.
const INHERITED: [&str; 3] = ["PATH", "LANG", "TZ"];

/// Variables a child has unless the operator sets them to something else. Python buffers what a plugin prints when its output is a pipe,
/// so that its log would have it late, and a crash would lose it.
const PRESET: [(&str, &str); 1] = [("PYTHONUNBUFFERED", "1")];

/// How the names of the host's own variables begin, which the operator can neither set nor pass on.
const OWN_PREFIX: &str = "PLUGRACK_";

/// How the operator's variables begin until the shim becomes the program. Under their own names, such as `LD_PRELOAD`, they would affect the
/// shim, which may run as root.
const SET_PREFIX: &str = "PLUGRACK_SET_";

/// Longest name of a variable of the operator's in bytes: far beyond those in use.
const MAX_VARIABLE_NAME: usize = 128;

/// Where programs are found when the host has no `PATH`.
const DEFAULT_PATH: &str = "/usr/local/bin:/usr/bin:/bin";

/// Children that somebody here waits for.
static OWN: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

fn own() -> MutexGuard<'static, BTreeSet<i32>> {
    OWN.locked()
}

/// Which run of the host this is: its value of [`RUN_VARIABLE`].
pub(crate) fn run_id() -> &'static str {
    static RUN: LazyLock<String> = LazyLock::new(|| Uuid::new_v4().simple().to_string());
    &RUN
}

/// As the first process of a container, reaps the processes that are left to it, on a thread of its own. Elsewhere the system does.
pub(crate) fn reap_orphans() -> io::Result<()> {
    if std::process::id() != 1 {
        return Ok(());
    }
    let mut signals = Signals::new([SIGCHLD])?;
    threads::restarting(small_thread("reaper"), move || {
        for _ in signals.forever() {
            // While the list is held no child is started, so that what is not in it is nobody's.
            let own = own();
            for pid in orphans::zombies_of_this_process().into_iter().filter(|pid| !own.contains(&pid.as_raw_nonzero().get())) {
                rustix::process::waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOHANG).ok();
            }
        }
    })
}

/// How a child is bound beyond what all children are.
#[derive(Clone, Default)]
pub(crate) struct Bounds {
    /// The user and group it runs as; without one, the host's.
    pub(crate) uid: Option<u32>,
    /// Most bytes of heap and private writable memory of each of its processes.
    pub(crate) memory: Option<u64>,
    /// Most open files of each of its processes; without it, as many as the host may have.
    pub(crate) open_files: Option<u64>,
    /// The operator's environment variables for it. Of two with one name the later applies. They may be secrets.
    pub(crate) variables: Vec<(OsString, OsString)>,
}

/// Checks the name of a variable that the operator sets for plugins.
///
/// # Errors
/// A sentence: no shell could set it, or it is the host's own.
pub(crate) fn check_variable(name: &str) -> Result<(), String> {
    let is_word = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    if !is_word || !(1..=MAX_VARIABLE_NAME).contains(&name.len()) || name.starts_with(|first: char| first.is_ascii_digit()) {
        return Err(format!(
            "{name:?} cannot be the name of a variable: it is 1-{MAX_VARIABLE_NAME} letters, digits and _, and does not begin with a digit"
        ));
    }
    match name {
        "HOME" => Err("the variable HOME is reserved: the host sets it to the plugin's own directory".into()),
        _ if name.starts_with(OWN_PREFIX) => {
            Err(format!("the variable {name} is reserved: the host sets those that begin with {OWN_PREFIX}"))
        }
        _ => Ok(()),
    }
}

/// Finds out how this program can start itself again. Called once, before the first child and while the working directory is
/// still the one that the program was executed in.
///
/// # Errors
/// One sentence: there is no `/proc`, and no file at the path either.
pub(crate) fn find_own_program() -> Result<(), String> {
    if Path::new(OWN_FILE).exists() {
        return Ok(());
    }
    // Without /proc a kernel before 6.4 cannot be asked, and then this panics.
    let executed_by = std::panic::catch_unwind(rustix::param::linux_execfn).unwrap_or_default();
    let path = std::path::absolute(OsStr::from_bytes(executed_by.to_bytes())).unwrap_or_default();
    if !path.is_file() {
        return Err(format!(
            "{OWN_FILE} is missing, by which plugins are started, and the program is not at {path:?}: mount /proc"
        ));
    }
    log::warn!(
        "there is no /proc: plugins are started by {}, which must stay there, no connection can be cut short, and what outlives \
         its plugin is not found",
        path.display()
    );
    EXECUTED_BY.get_or_init(|| path);
    Ok(())
}

/// This program's file, by which it starts itself again.
fn own_program() -> &'static Path {
    EXECUTED_BY.get().map_or(Path::new(OWN_FILE), PathBuf::as_path)
}

/// How far the search for what a process has started goes, when that process has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    /// Its process group.
    Group,
    /// Its session too, and whatever was born with its mark in the environment.
    Marked,
    /// Whatever runs under this uid. Only while nothing else may run under it, such as another process of the same plugin.
    Uid(u32),
    /// The same, without a look whether all of it is gone.
    UidUnseen(u32),
}

/// Why the shim could not become the program.
#[derive(Debug, PartialEq, Eq)]
enum ExecError {
    /// The file cannot be executed here: a sentence.
    Unfit(String),
    /// The system could not execute it for now.
    Passing(Errno),
}

/// A child. Dropping it kills and reaps it, with its process group.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    pid: Pid,
    /// How it has ended, once it was reaped. From then on its id may be another process's, and no signal is sent to it.
    exit: Option<Exit>,
    /// Why it is not the program that it was to become, if so; told once that is known.
    executed: Option<Receiver<Option<ExecError>>>,
    /// Closes when all it printed is written down.
    captured: Option<Receiver<()>>,
    /// A variable that only it, and all it starts, was started with, and its value.
    mark: Option<(&'static str, OsString)>,
}

impl Process {
    /// Starts a plugin; all it prints goes to `log`.
    pub(crate) fn start(
        program: &Path,
        home: &Path,
        env: &[(&str, &OsStr)],
        bounds: &Bounds,
        log: &PluginLog,
        name: &str,
    ) -> io::Result<Self> {
        let (reader, writer) = io::pipe()?;
        let (mut command, report) = shim(program, home, bounds)?;
        command.envs(env.iter().copied()).stdout(writer.try_clone()?).stderr(writer);
        let mut process = Self::spawn(&mut command)?;
        // The command holds the write ends, without which the report and the capture can come to their end.
        drop(command);
        let socket = env.iter().find(|(name, _)| *name == SOCKET_VARIABLE);
        process.mark = socket.map(|(_, socket)| (SOCKET_VARIABLE, (*socket).into()));
        let log = log.clone();
        let ((capturing, captured), (executing, executed)) = (bounded(0), bounded(1));
        (process.captured, process.executed) = (Some(captured), Some(executed));
        small_thread(format!("log-{name}")).spawn(move || {
            // It prints nothing before it is executed, but for what the shim says of that.
            executing.send(exec_error(report)).ok();
            if !threads::persist(|| log.capture(&reader)) {
                // The plugin goes on without a log. It would stop if nobody read what it prints.
                io::copy(&mut &reader, &mut io::sink()).ok();
            }
            drop::<Sender<()>>(capturing);
        })?;
        Ok(process)
    }

    /// Starts this program again as a helper of the host, `plugrack role argument…`. It outlives the host to see to what that leaves.
    /// `variable` is all it has in its environment, but for the level of the log.
    pub(crate) fn helper(role: &str, arguments: &[&str], variable: (&str, &OsStr), stdin: PipeReader) -> io::Result<Self> {
        let mut command = this_program();
        command.arg(role).args(arguments).stdin(stdin).stdout(Stdio::null()).env_clear().env(variable.0, variable.1);
        command.envs(std::env::var_os("RUST_LOG").map(|level| ("RUST_LOG", level)));
        Self::spawn(&mut command)
    }

    fn spawn(command: &mut Command) -> io::Result<Self> {
        let mut own = own();
        let child = command.spawn().map_err(|error| match own_program() {
            program if error.kind() == io::ErrorKind::NotFound && !program.exists() => {
                let missing = format!("{} is missing, by which the host starts its processes: put it back", program.display());
                io::Error::new(error.kind(), missing)
            }
            _ => error,
        })?;
        let pid = Pid::from_child(&child);
        own.insert(pid.as_raw_nonzero().get());
        Ok(Self { child, pid, exit: None, executed: None, captured: None, mark: None })
    }

    /// The process id, which is that of its session and of its process group too.
    pub(crate) fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Calls `then`, on a thread of its own, when the process has ended, with how it did. It stays to be reaped, so its id cannot pass to
    /// another.
    pub(crate) fn on_exit(&self, name: &str, then: impl FnOnce(Option<Exit>) + Send + 'static) -> io::Result<()> {
        let pid = self.pid;
        small_thread(format!("wait-{name}")).spawn(move || then(wait(pid)))?;
        Ok(())
    }

    /// Waits until the process ends by itself, and says what the end was.
    pub(crate) fn wait(mut self) -> Exit {
        wait(self.pid);
        self.end(Reach::Group).0
    }

    /// Asks the process and its group to end.
    pub(crate) fn terminate(&self) {
        self.signal(Signal::TERM);
    }

    /// Makes the process and its group end.
    pub(crate) fn kill(&self) {
        self.signal(Signal::KILL);
    }

    fn signal(&self, signal: Signal) {
        if self.exit.is_none() {
            // Until the shim has made its session there is no group. One that has ended needs no signal.
            rustix::process::kill_process(self.pid, signal).ok();
            rustix::process::kill_process_group(self.pid, signal).ok();
        }
    }

    /// Whether it has ended. It stays to be reaped, so its id is still its own.
    fn has_ended(&self) -> bool {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
        let waited = || rustix::process::waitid(WaitId::Pid(self.pid), options);
        // What cannot be waited for has been.
        self.exit.is_some() || waited().map_or_else(|error| error != Errno::INTR, |status| status.is_some())
    }

    /// Waits until it has ended, at most until a deadline. Says whether it has.
    fn ended_by(&self, deadline: Instant) -> bool {
        // Linux has such handles since 5.3. Before that it is looked at again and again.
        let handle = pidfd_open(self.pid, PidfdFlags::empty()).ok();
        while !self.has_ended() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            match &handle {
                Some(handle) => drop(poll(&mut [PollFd::new(handle, PollFlags::IN)], Some(&timespec(left)))),
                None => pause(EXIT_LOOK.min(left)),
            }
        }
        true
    }

    /// Kills what is left of the process and its group, waits for its end and its last output, and says what the end was.
    /// What has left the group is killed too, as far as the search is to go.
    pub(crate) fn reap(mut self, reach: Reach) -> Exit {
        self.end(reach).0
    }

    /// As [`Process::reap`]. Also says whether nothing is left.
    fn end(&mut self, reach: Reach) -> (Exit, bool) {
        if let Some(exit) = self.exit {
            return (exit, true);
        }
        self.kill();
        wait(self.pid);
        if let Reach::Uid(uid) | Reach::UidUnseen(uid) = reach {
            sweep(uid);
        }
        // Before it is reaped: until then its id can be no other session's.
        let complete = self.marks(reach).is_none_or(|marks| orphans::end(&marks, REMAINS_TIME).complete);
        let status = {
            // While the list is held no child is started that could have the same id.
            let mut own = own();
            let status = self.child.wait();
            own.remove(&self.pid());
            status
        };
        if let Some(captured) = &self.captured {
            // Another process may have taken the output along, and keep it open.
            captured.recv_timeout(LAST_OUTPUT_TIME).ok();
        }
        let exit = match self.executed.take().and_then(|executed| executed.recv_timeout(REPORT_TIME).ok().flatten()) {
            Some(ExecError::Unfit(_)) => Exit::Unfit,
            Some(ExecError::Passing(_)) => Exit::NotStarted,
            None => status.map_or(Exit::Fault, exit_of),
        };
        self.exit = Some(exit);
        (exit, complete)
    }

    /// By what that is known which it may have left.
    fn marks(&self, reach: Reach) -> Option<Marks> {
        match reach {
            Reach::Group | Reach::UidUnseen(_) => None,
            Reach::Marked => {
                let variable = self.mark.clone()?;
                Some(Marks { sessions: BTreeMap::from([(self.pid(), None)]), variable: Some(variable), uids: None })
            }
            // No process can leave its uid, so the other marks are of no use beside this one.
            Reach::Uid(uid) => Some(Marks { uids: Some(uid..=uid), ..Marks::default() }),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end(Reach::Marked);
    }
}

/// Waits until a child has ended, and says how it did. It stays to be reaped.
fn wait(pid: Pid) -> Option<Exit> {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
    let status = loop {
        match rustix::process::waitid(WaitId::Pid(pid), options) {
            Err(rustix::io::Errno::INTR) => {}
            status => break status.ok()??,
        }
    };
    status.exit_status().map(Exit::Code).or_else(|| status.terminating_signal().map(Exit::Signal))
}

fn exit_of(status: ExitStatus) -> Exit {
    // A process that was waited for has one of the two.
    status.signal().map_or_else(|| Exit::Code(status.code().unwrap_or_default()), Exit::Signal)
}

/// Runs `program argument` and gives what it printed, at most `limit` bytes, within `time`. All that it has started is killed before.
/// Nothing else may run under the uid of `bounds`: whatever does is killed too.
///
/// # Errors
/// The outer one says that it could not be started, the inner one that it cannot be executed, took too long, printed too much, failed, or
/// keeps starting processes.
pub(crate) fn output(
    program: &Path,
    argument: &str,
    bounds: &Bounds,
    time: Duration,
    limit: usize,
) -> io::Result<Result<Vec<u8>, FailedRun>> {
    // Another program that is asked under the same uid would be taken for what this one has left.
    let _turn = bounds.uid.map(Turn::wait).transpose()?;
    let (mut command, report) = shim(program, Path::new("/"), bounds)?;
    let mark = OsString::from(Uuid::new_v4().simple().to_string());
    command.arg(argument).env(ASK_VARIABLE, &mark).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = Process::spawn(&mut command)?;
    drop(command);
    process.mark = Some((ASK_VARIABLE, mark));
    let mut complained = Vec::new();
    let printed = process.collect(argument, time, limit, &mut complained);
    let (exit, complete) = process.end(bounds.uid.map_or(Reach::Marked, Reach::Uid));
    // Only the shim had its other end, so this does not wait.
    match exec_error(report) {
        Some(ExecError::Unfit(reason)) => return Ok(Err(FailedRun { reason, printed: Vec::new(), is_unfit: true })),
        Some(ExecError::Passing(error)) => return Err(error.into()),
        None => {}
    }
    let failed = |reason: String| FailedRun { reason, printed: lines(&complained), is_unfit: false };
    Ok(match (printed, exit) {
        (Err(reason), _) => Err(failed(reason)),
        (Ok(printed), Exit::Code(0)) if complete => Ok(printed),
        (Ok(_), Exit::Code(0)) => {
            Err(failed(format!("{argument} has started processes that start others faster than they can be killed")))
        }
        (Ok(_), exit) => Err(match preflight::explain_script(program) {
            Some(reason) => FailedRun { is_unfit: true, ..failed(reason) },
            None => {
                let complaint = String::from_utf8_lossy(&complained);
                let lines: Vec<&str> = complaint.lines().collect();
                let why = failure_line(&lines).unwrap_or("it printed nothing on standard error");
                let why: String = why.chars().filter(|c| !c.is_control()).take(300).collect();
                failed(format!("{argument} ended with {exit}: {why}"))
            }
        }),
    })
}

/// A run that gave no usable answer.
#[derive(Debug)]
pub(crate) struct FailedRun {
    /// Why, in a sentence.
    pub(crate) reason: String,
    /// What it had printed on standard error, fit to be shown.
    pub(crate) printed: Vec<String>,
    /// Whether the system cannot execute the file, so that nothing was run.
    pub(crate) is_unfit: bool,
}

/// Printed bytes as lines that are fit to be shown.
pub(crate) fn lines(printed: &[u8]) -> Vec<String> {
    let shown = |line: &[u8]| {
        let mut shown = String::new();
        escape::escape(&mut shown, line);
        shown
    };
    printed.strip_suffix(b"\n").unwrap_or(printed).split(|byte| *byte == b'\n').map(shown).collect()
}

/// Uids under which a program is being asked.
static TURNS: (Mutex<BTreeSet<u32>>, Condvar) = (Mutex::new(BTreeSet::new()), Condvar::new());

/// The right to ask a program under a uid, given back when dropped.
struct Turn(u32);

impl Turn {
    fn wait(uid: u32) -> io::Result<Self> {
        let (taken, freed) = &TURNS;
        let taken = taken.locked();
        let waited = freed.wait_timeout_while(taken, TURN_TIME, |taken| taken.contains(&uid));
        let (mut taken, waited) = unpoisoned(waited);
        if waited.timed_out() {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("another program is asked under uid {uid}, and does not end"),
            ));
        }
        taken.insert(uid);
        Ok(Self(uid))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let (taken, freed) = &TURNS;
        taken.locked().remove(&self.0);
        freed.notify_all();
    }
}

impl Process {
    /// Reads what it prints, until it ends, and gives its standard output. The end of its standard error goes to `complained`.
    fn collect(&mut self, argument: &str, time: Duration, limit: usize, complained: &mut Vec<u8>) -> Result<Vec<u8>, String> {
        let deadline = Instant::now() + time;
        let (Some(mut stdout), Some(mut stderr)) = (self.child.stdout.take(), self.child.stderr.take()) else {
            return Err("cannot read its output".into());
        };
        let too_late = || format!("{argument} did not end within {} s", time.as_secs_f32());
        let mut printed = Vec::new();
        let (mut stdout_open, mut stderr_open, mut ended) = (true, true, false);
        while stdout_open || stderr_open {
            let left = deadline.checked_duration_since(Instant::now()).ok_or_else(too_late)?;
            let open = [(stdout_open, stdout.as_fd()), (stderr_open, stderr.as_fd())].into_iter().filter(|(open, _)| *open);
            let mut fds: Vec<_> = open.map(|(_, fd)| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
            let wait = if ended { Duration::ZERO } else { left.min(EXIT_CHECK) };
            let ready = poll(&mut fds, Some(&timespec(wait))).unwrap_or(0);
            let mut readable = fds.iter().map(|fd| !fd.revents().is_empty());
            let (out, err) = (stdout_open && readable.next() == Some(true), stderr_open && readable.next() == Some(true));
            if ready == 0 {
                if ended {
                    break;
                }
                // What it has printed in its last moment is there by now, and read in the next rounds.
                ended = self.has_ended();
            }
            if out {
                stdout_open = read_some(&mut stdout, &mut printed);
            }
            if err {
                stderr_open = read_some(&mut stderr, complained);
                // The end says why; the beginning goes.
                complained.drain(..complained.len().saturating_sub(MAX_ERROR_OUTPUT));
            }
            if printed.len() > limit {
                return Err(format!("{argument} printed more than {limit} bytes"));
            }
        }
        if self.ended_by(deadline) { Ok(printed) } else { Err(too_late()) }
    }
}

/// Appends what can be read now, and says whether more may come.
fn read_some(source: &mut impl Read, into: &mut Vec<u8>) -> bool {
    let mut buffer = [0; 8192];
    match source.read(&mut buffer) {
        Ok(0) => false,
        Ok(n) => {
            into.extend_from_slice(&buffer[..n]);
            true
        }
        Err(error) => error.kind() == io::ErrorKind::Interrupted,
    }
}

/// The command that starts this program again.
fn this_program() -> Command {
    #[expect(clippy::disallowed_methods, reason = "the one place where children are started")]
    let mut command = Command::new(own_program());
    command.arg0("plugrack");
    command
}

/// The command that starts `program` through the shim, in `directory`, with an environment of the allowed variables only; and what the
/// shim reports by when it cannot, see [`exec_error`].
fn shim(program: &Path, directory: &Path, bounds: &Bounds) -> io::Result<(Command, PipeReader)> {
    let (report, reporting) = io::pipe()?;
    let mut command = this_program();
    command.arg(SHIM).arg(std::process::id().to_string());
    let number = |bound: Option<u64>| bound.map_or(UNBOUND.to_owned(), |number| number.to_string());
    command.arg(number(bounds.uid.map(u64::from))).arg(number(bounds.memory)).arg(number(bounds.open_files)).arg(program);
    command.current_dir(directory).stdin(reporting).env_clear().env("PATH", DEFAULT_PATH).env("HOME", directory);
    command.env(RUN_VARIABLE, run_id());
    command.envs(INHERITED.iter().filter_map(|name| Some((name, std::env::var_os(name)?)))).envs(PRESET);
    for (name, value) in &bounds.variables {
        let mut set = OsString::from(SET_PREFIX);
        set.push(name);
        command.env(set, value);
    }
    Ok((command, report))
}

/// Why the shim could not become the program; nothing when it could, or ended for another reason. Waits for the one or the other.
fn exec_error(report: PipeReader) -> Option<ExecError> {
    let mut reported = Vec::new();
    report.take(MAX_REPORT as u64).read_to_end(&mut reported).ok()?;
    let reported = String::from_utf8_lossy(&reported);
    let (number, reason) = reported.split_once(' ')?;
    let error = Errno::from_raw_os_error(number.parse().ok()?);
    Some(if PASSING.contains(&error) { ExecError::Passing(error) } else { ExecError::Unfit(reason.to_owned()) })
}

/// Takes the pipe for the report from standard input, the one way for it to come here, and leaves an input that is at its end. The
/// program does not get the pipe: its closing says that the program is executed.
fn take_report() -> io::Result<File> {
    let report = rustix::io::fcntl_dupfd_cloexec(stdin(), 3)?;
    dup2_stdin(no_input()?)?;
    Ok(report.into())
}

/// An input that is at its end: `/dev/null`, and in a root that has none a pipe.
fn no_input() -> io::Result<OwnedFd> {
    File::open("/dev/null").map(OwnedFd::from).or_else(|_| io::pipe().map(|(reader, _)| reader.into()))
}

/// The shim: `plugrack __exec HOST_PID UID MEMORY FILES PROGRAM [ARGUMENT]…` confines this process, then becomes the program.
pub(crate) fn shim_main(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let host = arguments.next().and_then(|pid| pid.to_str().and_then(|pid| pid.parse().ok()));
    let (uid, memory, files) = (bound(arguments.next()), bound(arguments.next()), bound(arguments.next()));
    let (Some(host), Some(uid), Some(memory), Some(open_files), Some(program)) = (host, uid, memory, files, arguments.next())
    else {
        return complain(format_args!("{SHIM} is how plugrack starts plugins, not a command"), 64);
    };
    let mut report = match take_report() {
        Ok(report) => report,
        Err(error) => return complain(format_args!("cannot prepare {}: {error}", program.display()), 126),
    };
    // Looked up while everything can be.
    let needed = uid.map_or(Vec::new(), |_| needed(Path::new(&program)));
    if let Err(error) = confine(host, &Bounds { uid, memory, open_files, variables: Vec::new() }) {
        if is_passing(&error) {
            tell(&mut report, &error, "");
        }
        return complain(format_args!("cannot confine {}: {error}", program.display()), 126);
    }
    if let (Some(uid), Some(barred)) = (uid, needed.iter().find_map(|(path, access)| barred(path, *access))) {
        return complain(format_args!("uid {uid} cannot {barred}"), 77);
    }
    let error = execute(&program, arguments);
    let explained = if is_passing(&error) { None } else { preflight::explain(Path::new(&program)) };
    let reason = explained.unwrap_or_else(|| error.to_string());
    tell(&mut report, &error, &reason);
    let code = if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 };
    complain(format_args!("cannot execute {}: {reason}", program.display()), code)
}

/// Whether what failed may succeed another time.
fn is_passing(error: &io::Error) -> bool {
    Errno::from_io_error(error).is_some_and(|errno| PASSING.contains(&errno))
}

/// Tells the host why the program is not executed, in the form that [`exec_error`] reads.
fn tell(report: &mut File, error: &io::Error, reason: &str) {
    let reported = format!("{} {reason}", error.raw_os_error().unwrap_or_default());
    // A host that has gone does not read it.
    drop(report.write_all(&reported.as_bytes()[..reported.len().min(MAX_REPORT)]));
}

/// Becomes the program; gives why it could not. Not by [`Command`], whose C library would make a shell read what the kernel does not
/// execute.
fn execute(program: &OsStr, arguments: impl Iterator<Item = OsString>) -> io::Error {
    // Rust's runtime ignores it, which the program would inherit. A signal that is caught is the default for it.
    if let Err(error) = signal_hook::flag::register(SIGPIPE, Arc::default()) {
        return error;
    }
    let text = |text: &[u8]| CString::new(text);
    let path = text(program.as_bytes());
    let arguments = std::iter::once(program.to_owned()).chain(arguments).map(|argument| text(argument.as_bytes()));
    let environment = environment().into_iter().map(|(name, value)| text(&[name.as_bytes(), b"=", value.as_bytes()].concat()));
    match (path, arguments.collect::<Result<Vec<_>, _>>(), environment.collect::<Result<Vec<_>, _>>()) {
        (Ok(path), Ok(arguments), Ok(environment)) => match execve(&path, &arguments, &environment) {
            Ok(never) => match never {},
            Err(error) => error.into(),
        },
        // Both have come by execve themselves.
        _ => Errno::INVAL.into(),
    }
}

/// The program's environment: this process's, with the operator's variables under their own names in place of others.
fn environment() -> BTreeMap<OsString, OsString> {
    let set = |name: &OsStr| name.as_bytes().strip_prefix(SET_PREFIX.as_bytes()).map(|name| OsStr::from_bytes(name).to_owned());
    let (operators, own): (Vec<_>, Vec<_>) = std::env::vars_os().partition(|(name, _)| set(name).is_some());
    let operators = operators.into_iter().filter_map(|(name, value)| Some((set(&name)?, value)));
    own.into_iter().chain(operators).collect()
}

/// A bound from its argument, which may say that there is none; nothing where it cannot be read.
fn bound<T: FromStr>(argument: Option<OsString>) -> Option<Option<T>> {
    match argument?.to_str()? {
        UNBOUND => Some(None),
        text => text.parse().ok().map(Some),
    }
}

/// What a program needs to run at all, and how: itself, its interpreter, and its home. Links are resolved.
fn needed(program: &Path) -> Vec<(PathBuf, Access)> {
    let interpreter = preflight::interpreter(program);
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let paths =
        [(Some(program.to_owned()), Access::READ_OK | Access::EXEC_OK), (interpreter, Access::EXEC_OK), (home, Access::EXEC_OK)];
    paths.into_iter().filter_map(|(path, access)| Some((std::fs::canonicalize(path?).ok()?, access))).collect()
}

/// What bars this process's user from `path`, and the way out, as the end of a sentence.
fn barred(path: &Path, access: Access) -> Option<String> {
    let mut above: Vec<&Path> = path.ancestors().skip(1).collect();
    above.reverse();
    if let Some(bar) = above.into_iter().find(|directory| rustix::fs::access(*directory, Access::EXEC_OK).is_err()) {
        return Some(format!("reach {}, because it may not enter {}: chmod o+x {1}", path.display(), bar.display()));
    }
    let refused = rustix::fs::access(path, access).is_err();
    refused.then(|| format!("use {}: chmod o+rx {0}", path.display()))
}

/// Kills whatever runs under a uid in one go, so that none of it can get away by forking. The sweeper becomes that user, and signals all
/// that it may signal. Where it could not, what is left is found as far as a look through `/proc` finds it.
fn sweep(uid: u32) {
    let deadline = Instant::now() + SWEEP_TIME;
    let sweeper = || {
        let mut command = this_program();
        command.arg(SWEEPER).arg(uid.to_string()).stdin(no_input()?).env_clear();
        Process::spawn(&mut command)
    };
    while let Ok(mut sweeper) = sweeper() {
        sweeper.ended_by(deadline);
        // What it is to kill may have killed it first, or stopped it.
        if !matches!(sweeper.end(Reach::Group).0, Exit::Signal(_)) || Instant::now() >= deadline {
            return;
        }
    }
}

/// The sweeper: `plugrack __sweep UID` kills whatever else runs under the uid, which is never root's.
pub(crate) fn sweeper_main(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let Some(uid) = arguments.next().and_then(|uid| uid.to_str()?.parse().ok()).filter(|uid| *uid > 0) else {
        return complain(format_args!("{SWEEPER} is how plugrack ends plugins, not a command"), 64);
    };
    let everybody = nix::unistd::Pid::from_raw(-1);
    let swept = become_user(uid).and_then(|()| {
        // Root's signal would reach every process there is.
        if [rustix::process::getuid(), rustix::process::geteuid()] != [Uid::from_raw(uid); 2] {
            return Err(io::Error::other(format!("it has not become uid {uid}")));
        }
        Ok(nix::sys::signal::kill(everybody, nix::sys::signal::SIGKILL)?)
    });
    match swept {
        Err(error) if error.raw_os_error() != Some(Errno::SRCH.raw_os_error()) => {
            complain(format_args!("cannot end what runs under uid {uid}: {error}"), 1)
        }
        _ => ExitCode::SUCCESS,
    }
}

fn complain(what: std::fmt::Arguments<'_>, code: u8) -> ExitCode {
    // Where standard error is gone there is nobody to tell.
    drop(writeln!(io::stderr(), "{what}"));
    ExitCode::from(code)
}

/// Puts this process in a session of its own that dies with the host and can gain no privileges, as the user it is meant for.
fn confine(host: u32, bounds: &Bounds) -> io::Result<()> {
    rustix::process::setsid()?;
    // First of all, for a change of user takes the parent-death signal away.
    if let Some(uid) = bounds.uid {
        become_user(uid)?;
    }
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    // The host may have died before the line above, and then this process has another parent already.
    let parent = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get());
    if parent.and_then(|pid| u32::try_from(pid).ok()) != Some(host) {
        return Err(io::Error::other("the host is gone"));
    }
    // The host's own files close by themselves; these are what it was started with.
    close_fds::set_fds_cloexec(3, &[]);
    rustix::thread::set_no_new_privs(true)?;
    limit(Resource::Core, 0)?;
    if let Some(files) = bounds.open_files {
        limit(Resource::Nofile, files)?;
    }
    if bounds.uid.is_some() {
        limit(Resource::Nproc, MAX_PROCESSES)?;
    }
    if let Some(memory) = bounds.memory {
        limit(Resource::Data, memory)?;
    }
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    Ok(())
}

/// Leaves root for good. The shim has one thread, so that what is the thread's is the process's.
fn become_user(id: u32) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
    rustix::thread::set_thread_groups(&[])?;
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)?;
    if rustix::thread::set_thread_uid(Uid::ROOT).is_ok() || rustix::thread::set_thread_gid(Gid::ROOT).is_ok() {
        return Err(io::Error::other(format!("uid {id} could become root again")));
    }
    Ok(())
}

/// Sets a limit for good, or keeps a lower one.
fn limit(resource: Resource, most: u64) -> io::Result<()> {
    let most = rustix::process::getrlimit(resource).maximum.unwrap_or(most).min(most);
    Ok(rustix::process::setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) })?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_reaped_once_and_its_end_kept() {
        #[expect(clippy::disallowed_methods, reason = "a process of the test's own")]
        let mut process = Process::spawn(Command::new("sh").args(["-c", "exit 3"])).unwrap();
        let state = |pid: i32| std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap().contains(") Z ");
        let pid = process.pid();
        wait(process.pid);
        assert!(process.ended_by(Instant::now()));
        // However often it is looked at, its id stays its own, so that its group can be killed.
        assert!(process.has_ended() && process.has_ended() && state(pid) && own().contains(&pid));
        assert_eq!((process.exit, process.end(Reach::Group)), (None, (Exit::Code(3), true)));
        assert!(!own().contains(&pid) && process.has_ended());
        // Both a second end and the drop go by what is kept: by its id another could be meant.
        assert_eq!((process.exit, process.end(Reach::Marked)), (Some(Exit::Code(3)), (Exit::Code(3), true)));
    }

    #[test]
    fn the_end_of_a_process_is_waited_for_until_a_deadline() {
        #[expect(clippy::disallowed_methods, reason = "a process of the test's own")]
        let mut process = Process::spawn(Command::new("cat").stdin(Stdio::piped())).unwrap();
        let deadline = Instant::now() + Duration::from_millis(50);
        assert!(!process.ended_by(deadline) && Instant::now() >= deadline);
        drop(process.child.stdin.take());
        assert!(process.ended_by(Instant::now() + Duration::from_secs(60)));
        assert_eq!(process.end(Reach::Group), (Exit::Code(0), true));
    }

    #[test]
    fn a_variable_has_a_name_that_a_shell_can_set_and_that_is_not_the_hosts() {
        for name in ["A", "_", "http_proxy", "A1", "PLUGRACK", "HOMES", "home", &"x".repeat(MAX_VARIABLE_NAME)] {
            assert_eq!(check_variable(name), Ok(()));
        }
        for name in ["", "1A", "A-B", "A=B", "Ä", "A B", "A\0", &"x".repeat(MAX_VARIABLE_NAME + 1)] {
            assert!(check_variable(name).is_err_and(|why| why.contains("cannot be the name of a variable")), "{name}");
        }
        for name in ["HOME", "PLUGRACK_", "PLUGRACK_SOCKET", "PLUGRACK_SET_PATH"] {
            assert!(check_variable(name).is_err_and(|why| why.contains("is reserved")), "{name}");
        }
    }

    #[test]
    fn what_the_shim_reports_is_told_apart() {
        let told = |report: &str| {
            let (reader, mut writer) = io::pipe().unwrap();
            writer.write_all(report.as_bytes()).unwrap();
            drop(writer);
            exec_error(reader)
        };
        assert_eq!(told(""), None);
        let unfit = |errno: Errno| told(&format!("{} it is empty", errno.raw_os_error()));
        assert_eq!(unfit(Errno::NOEXEC), Some(ExecError::Unfit("it is empty".into())));
        assert_eq!(unfit(Errno::TXTBSY), Some(ExecError::Passing(Errno::TXTBSY)));
    }
}
