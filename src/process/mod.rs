//! Child processes: starts and confines them, captures their output, and stops them with all their descendants.
//!
//! The host executes itself as a small shim, which confines its own process by safe calls and then executes the plugin. So no code runs
//! between fork and exec, where few calls are safe, and no unsafe code is needed.

pub(crate) mod chown_tree;
pub(crate) mod exit;
pub(crate) mod failure_line;
pub(crate) mod listeners;
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
use orphans::Selector;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::Access;
use rustix::io::{Errno, FdFlags};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use rustix::process::{Gid, Pid, PidfdFlags, Resource, Rlimit, Signal, Uid, WaitId, WaitIdOptions, pidfd_open};
use rustix::stdio::{dup2_stdin, stdin};
use signal_hook::consts::{SIGCHLD, SIGPIPE};
use signal_hook::iterator::Signals;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, PipeReader, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::str::FromStr;
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// First argument of the shim. Not a subcommand, because operators do not use it.
pub(crate) const SHIM: &str = "__exec";

/// First argument of the sweeper, see [`sweep`]. Not a subcommand either.
pub(crate) const SWEEPER: &str = "__sweep";

/// Time limit for sweepers to kill everything under a uid.
const SWEEP_TIME: Duration = Duration::from_secs(1);

/// Means an unset bound in the shim's arguments.
const UNBOUND: &str = "-";

/// This program's own file, even if its path was replaced. Requires `/proc`.
const OWN_FILE: &str = "/proc/self/exe";

/// The path of this program's executable, used if [`OWN_FILE`] is missing.
static EXECUTED_BY: OnceLock<PathBuf> = OnceLock::new();

/// Most processes and threads of a plugin with a uid of its own: two for each of at most 256 connections.
const MAX_PROCESSES: u64 = 512;

/// Bytes to keep of the standard error of a `--metadata` call.
const MAX_ERROR_OUTPUT: usize = 16 * 1024;

/// Time to wait for the last output of a process that has ended.
const LAST_OUTPUT_TIME: Duration = Duration::from_millis(200);

/// Interval at which a wait for output checks whether the child has ended, in case another process holds its output open.
const EXIT_CHECK: Duration = Duration::from_millis(50);

/// Interval at which the exit of a process is polled if the kernel has no pidfds.
const EXIT_CHECK_PAUSE: Duration = Duration::from_millis(1);

/// Variable that all children of this run of the host inherit, by which orphans are found.
pub(crate) const RUN_VARIABLE: &str = "PLUGRACK_RUN";

/// Variable that tells a plugin where to listen, and that identifies its orphans.
pub(crate) const SOCKET_VARIABLE: &str = "PLUGRACK_SOCKET";

/// Variable that a script of CGI gets, and that identifies its orphans.
const SCRIPT_VARIABLE: &str = "PLUGRACK_SCRIPT";

/// Variable that a `--metadata` call gets, and that identifies its orphans.
const ASK_VARIABLE: &str = "PLUGRACK_ASK";

/// The standard input as a descriptor.
const INPUT: i32 = 0;

/// The descriptor of a listener that the host hands over: the first of sd_listen_fds(3).
const LISTENER: i32 = 3;

/// Longest report of the shim in bytes. A socket takes that much in one write without blocking.
const MAX_REPORT: usize = 4096;

/// Time to wait for the report after the shim has ended. It is complete by then; only its reader may need time.
const REPORT_TIME: Duration = Duration::from_secs(2);

/// Time that a `--metadata` call waits for its uid while another call uses it: longer than a call takes.
const TURN_TIME: Duration = Duration::from_secs(60);

/// Temporary errors of `execve`: another try with the same file may succeed.
const PASSING: [Errno; 7] = [Errno::AGAIN, Errno::IO, Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::STALE, Errno::TXTBSY];

/// Time limit for killing a plugin's orphans.
const ORPHANS_TIME: Duration = Duration::from_secs(1);

/// Variables that a child inherits from the host. No others, because the host's environment may hold secrets.
const INHERITED: [&str; 3] = ["PATH", "LANG", "TZ"];

/// Variables that a child gets unless the operator sets them. Python buffers output to a pipe, so without this the log would be late,
/// and a crash would lose output.
const PRESET: [(&str, &str); 1] = [("PYTHONUNBUFFERED", "1")];

/// Prefix of the host's own variables, which the operator can neither set nor pass on.
const OWN_PREFIX: &str = "PLUGRACK_";

/// Prefix of the operator's variables until the shim executes the program. Without it, one such as `LD_PRELOAD` would affect the shim,
/// which may run as root.
const SET_PREFIX: &str = "PLUGRACK_SET_";

/// Longest name of an operator's variable in bytes: far longer than names in use.
const MAX_VARIABLE_NAME: usize = 128;

/// `PATH` of children if the host has none.
pub(crate) const DEFAULT_PATH: &str = "/usr/local/bin:/usr/bin:/bin";

/// Children that this program waits for.
static OWN: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

fn own() -> MutexGuard<'static, BTreeSet<i32>> {
    OWN.locked()
}

/// Identifies this run of the host: the value of [`RUN_VARIABLE`].
pub(crate) fn run_id() -> &'static str {
    static RUN: LazyLock<String> = LazyLock::new(|| Uuid::new_v4().simple().to_string());
    &RUN
}

/// As PID 1 of a container, reaps orphans on a thread of its own. Elsewhere the system's init does that.
pub(crate) fn reap_orphans() -> io::Result<()> {
    if std::process::id() != 1 {
        return Ok(());
    }
    let mut signals = Signals::new([SIGCHLD])?;
    threads::restarting(small_thread("reaper"), move || {
        for _ in signals.forever() {
            // Holding the list prevents new children, so a process that is not in it is an orphan.
            let own = own();
            for pid in orphans::zombies_of_this_process().into_iter().filter(|pid| !own.contains(&pid.as_raw_nonzero().get())) {
                rustix::process::waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOHANG).ok();
            }
        }
    })
}

/// Individual bounds of a child, in addition to those of all children.
#[derive(Clone, Default)]
pub(crate) struct Bounds {
    /// Its uid and gid; by default the host's.
    pub(crate) uid: Option<u32>,
    /// Limit of heap and private writable memory of each of its processes, in bytes.
    pub(crate) memory: Option<u64>,
    /// Limit of open files of each of its processes; by default the host's limit.
    pub(crate) open_files: Option<u64>,
    /// The operator's environment variables for it, which may be secrets. The later of two with one name applies.
    pub(crate) variables: Vec<(OsString, OsString)>,
}

/// Checks the name of an operator's variable for plugins.
///
/// # Errors
/// One sentence: the name is invalid, or reserved for the host.
pub(crate) fn check_variable(name: &str) -> Result<(), String> {
    let is_word = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    if !is_word || !(1..=MAX_VARIABLE_NAME).contains(&name.len()) || name.starts_with(|first: char| first.is_ascii_digit()) {
        return Err(format!(
            "{name:?} cannot be the name of a variable: use 1-{MAX_VARIABLE_NAME} letters, digits and _, not starting with a digit"
        ));
    }
    match name {
        "HOME" => Err("the variable HOME is reserved: the host sets it to the plugin's data directory".into()),
        _ if name.starts_with(OWN_PREFIX) => {
            Err(format!("the variable {name} is reserved: names that start with {OWN_PREFIX} belong to the host"))
        }
        _ => Ok(()),
    }
}

/// Finds the executable by which this program starts itself. Call it once, before the first child, and before the working directory
/// changes.
///
/// # Errors
/// One sentence: there is neither `/proc` nor a file at the path.
pub(crate) fn find_own_program() -> Result<(), String> {
    if Path::new(OWN_FILE).exists() {
        return Ok(());
    }
    // Panics without /proc on a kernel before 6.4.
    let executed_by = std::panic::catch_unwind(rustix::param::linux_execfn).unwrap_or_default();
    let path = std::path::absolute(OsStr::from_bytes(executed_by.to_bytes())).unwrap_or_default();
    if !path.is_file() {
        return Err(format!(
            "{OWN_FILE} is missing, by which the host starts plugins, and its program is not at {path:?} either: mount /proc"
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

/// This program's executable, by which it starts itself.
fn own_program() -> &'static Path {
    EXECUTED_BY.get().map_or(Path::new(OWN_FILE), PathBuf::as_path)
}

/// The scope of the search for orphans of a process that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    /// The process group.
    Group,
    /// Also its session, and every process started with its mark in the environment.
    Marked,
    /// Every process under this uid. Only if nothing else may run under it, such as another process of the same plugin.
    Uid(u32),
    /// The same, without checking that all of them are gone.
    UidUnseen(u32),
}

/// Why the shim could not execute the program.
#[derive(Debug, PartialEq, Eq)]
enum ExecError {
    /// The file cannot be executed here; one sentence.
    Unfit(String),
    /// A temporary error; one sentence.
    Passing(Errno),
}

/// A child process. Dropping it kills its process group and reaps it.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    pid: Pid,
    /// How it ended, once it was reaped. After that its id may belong to another process, so no signal is sent.
    exit: Option<Exit>,
    /// Gets the reason if the shim could not execute the program.
    executed: Option<Receiver<Option<ExecError>>>,
    /// Closes when all its output is in the log.
    captured: Option<Receiver<()>>,
    /// A variable, with its value, that only this process and its descendants were started with.
    mark: Option<(&'static str, OsString)>,
}

/// How a plugin's process is started.
#[derive(Debug)]
pub(crate) struct Launch {
    pub(crate) program: PathBuf,
    pub(crate) arguments: Vec<OsString>,
    /// Its working directory.
    pub(crate) directory: PathBuf,
    /// Variables of its environment, in addition to those of all children.
    pub(crate) env: Vec<(String, OsString)>,
    /// A listening socket that it gets as descriptor 3, in the way of sd_listen_fds(3).
    pub(crate) listener: Option<OwnedFd>,
}

/// Standard input and output of a script.
#[derive(Debug)]
pub(crate) struct Pipes {
    pub(crate) stdin: OwnedFd,
    pub(crate) stdout: OwnedFd,
}

/// A descriptor that the host hands over to a program.
#[derive(Clone, Copy)]
enum Passed<'a> {
    Listener(&'a OwnedFd),
    Input(&'a OwnedFd),
}

impl Passed<'_> {
    /// The number that it has in the program.
    fn target(self) -> i32 {
        match self {
            Self::Listener(_) => LISTENER,
            Self::Input(_) => INPUT,
        }
    }
}

impl Process {
    /// Starts a plugin; its output goes to `log`.
    pub(crate) fn start(launch: &Launch, bounds: &Bounds, log: &PluginLog, name: &str) -> io::Result<Self> {
        let (reader, writer) = io::pipe()?;
        let (mut command, report) =
            shim(&launch.program, &launch.directory, launch.listener.as_ref().map(Passed::Listener), bounds)?;
        command.stdout(writer.try_clone()?).stderr(writer);
        let socket = launch.env.iter().find(|(name, _)| *name == SOCKET_VARIABLE);
        let mark = socket.map(|(_, socket)| (SOCKET_VARIABLE, socket.clone()));
        Self::start_by(command, report, reader, launch, mark, log, name)
    }

    /// Starts a script, which has `pipes`; its standard error goes to `log`.
    pub(crate) fn start_script(launch: &Launch, bounds: &Bounds, pipes: Pipes, log: &PluginLog, name: &str) -> io::Result<Self> {
        let (reader, writer) = io::pipe()?;
        let (mut command, report) = shim(&launch.program, &launch.directory, Some(Passed::Input(&pipes.stdin)), bounds)?;
        let mark = OsString::from(Uuid::new_v4().simple().to_string());
        command.stdout(pipes.stdout).stderr(writer).env(SCRIPT_VARIABLE, &mark);
        Self::start_by(command, report, reader, launch, Some((SCRIPT_VARIABLE, mark)), log, name)
    }

    /// Starts a program by the shim's command. What can be read from `reader` goes to `log`.
    fn start_by(
        mut command: Command,
        report: UnixStream,
        reader: PipeReader,
        launch: &Launch,
        mark: Option<(&'static str, OsString)>,
        log: &PluginLog,
        name: &str,
    ) -> io::Result<Self> {
        command.args(&launch.arguments).envs(launch.env.iter().map(|(name, value)| (name, value)));
        let mut process = Self::spawn(&mut command)?;
        // The command holds write ends of the pipes; they must close for the report and the capture to see an end of file.
        drop(command);
        process.mark = mark;
        let log = log.clone();
        let ((capturing, captured), (executing, executed)) = (bounded(0), bounded(1));
        (process.captured, process.executed) = (Some(captured), Some(executed));
        small_thread(format!("log-{name}")).spawn(move || {
            // Before the plugin is executed only the shim may print, about a failure.
            executing.send(exec_error(report)).ok();
            if !threads::persist(|| log.capture(&reader)) {
                // The plugin goes on without a log. It would stop if nobody read what it prints.
                io::copy(&mut &reader, &mut io::sink()).ok();
            }
            drop::<Sender<()>>(capturing);
        })?;
        Ok(process)
    }

    /// Starts this program as a helper of the host, `plugrack ROLE ARGUMENT…`. It outlives the host, to clean up after it. Its
    /// environment is `variable` and `RUST_LOG`.
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
                let missing = format!("the host starts its processes by {}, which is missing: put it back", program.display());
                io::Error::new(error.kind(), missing)
            }
            _ => error,
        })?;
        let pid = Pid::from_child(&child);
        own.insert(pid.as_raw_nonzero().get());
        Ok(Self { child, pid, exit: None, executed: None, captured: None, mark: None })
    }

    /// The process id, which is also the id of its session and process group.
    pub(crate) fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Calls `then` on a thread of its own with the exit of the process. Does not reap it, so its id cannot be reused yet.
    pub(crate) fn on_exit(&self, name: &str, then: impl FnOnce(Option<Exit>) + Send + 'static) -> io::Result<()> {
        let pid = self.pid;
        small_thread(format!("wait-{name}")).spawn(move || then(wait(pid)))?;
        Ok(())
    }

    /// Waits until the process ends by itself, and returns its exit.
    pub(crate) fn wait(mut self) -> Exit {
        wait(self.pid);
        self.end(Reach::Group).0
    }

    /// Sends SIGTERM to the process and its group.
    pub(crate) fn terminate(&self) {
        self.signal(Signal::TERM);
    }

    /// Sends SIGKILL to the process and its group.
    pub(crate) fn kill(&self) {
        self.signal(Signal::KILL);
    }

    fn signal(&self, signal: Signal) {
        if self.exit.is_none() {
            // Before the shim has called setsid there is no group. A group that has ended needs no signal.
            rustix::process::kill_process(self.pid, signal).ok();
            rustix::process::kill_process_group(self.pid, signal).ok();
        }
    }

    /// How the process has ended, if it does so within `time`. Does not reap it.
    pub(crate) fn exit_within(&self, time: Duration) -> Option<Exit> {
        if self.ended_by(Instant::now() + time) { wait(self.pid) } else { None }
    }

    /// Whether the process has ended. Does not reap it, so its id is still its own.
    pub(crate) fn has_ended(&self) -> bool {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
        let waited = || rustix::process::waitid(WaitId::Pid(self.pid), options);
        // An error means that it was reaped already.
        self.exit.is_some() || waited().map_or_else(|error| error != Errno::INTR, |status| status.is_some())
    }

    /// Waits until it has ended, at most until a deadline. Says whether it has.
    fn ended_by(&self, deadline: Instant) -> bool {
        // Linux has pidfds since 5.3. Before that the exit is polled.
        let handle = pidfd_open(self.pid, PidfdFlags::empty()).ok();
        while !self.has_ended() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            match &handle {
                Some(handle) => drop(poll(&mut [PollFd::new(handle, PollFlags::IN)], Some(&timespec(left)))),
                None => pause(EXIT_CHECK_PAUSE.min(left)),
            }
        }
        true
    }

    /// Kills the process and its group, waits for its end and its last output, and returns its exit. Also kills orphans outside the
    /// group within the scope of the search.
    pub(crate) fn reap(mut self, reach: Reach) -> Exit {
        self.end(reach).0
    }

    /// Like [`Process::reap`]; also returns whether no orphan is left.
    fn end(&mut self, reach: Reach) -> (Exit, bool) {
        if let Some(exit) = self.exit {
            return (exit, true);
        }
        self.kill();
        wait(self.pid);
        if let Reach::Uid(uid) | Reach::UidUnseen(uid) = reach {
            sweep(uid);
        }
        // Before reaping, because until then its id cannot become another session's.
        let complete = self.orphan_selector(reach).is_none_or(|selector| orphans::kill_all(&selector, ORPHANS_TIME).complete);
        let status = {
            // Holding the list prevents the start of a child that could get the same id.
            let mut own = own();
            let status = self.child.wait();
            own.remove(&self.pid());
            status
        };
        if let Some(captured) = &self.captured {
            // Another process may have inherited the output and hold it open.
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

    /// The selector of this process's orphans.
    fn orphan_selector(&self, reach: Reach) -> Option<Selector> {
        match reach {
            Reach::Group | Reach::UidUnseen(_) => None,
            Reach::Marked => {
                let variable = self.mark.clone()?;
                Some(Selector { sessions: BTreeMap::from([(self.pid(), None)]), variable: Some(variable), uids: None })
            }
            // No process can leave its uid, so this mark suffices.
            Reach::Uid(uid) => Some(Selector { uids: Some(uid..=uid), ..Selector::default() }),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end(Reach::Marked);
    }
}

/// Waits until a child has ended, and returns its exit without reaping it.
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
    // A process that has ended has one of the two.
    status.signal().map_or_else(|| Exit::Code(status.code().unwrap_or_default()), Exit::Signal)
}

/// Runs `program argument` and returns its output, at most `limit` bytes, within `time`, after killing all processes that it started.
/// Nothing else may run under the uid of `bounds`: it is killed too.
///
/// # Errors
/// Outer: it could not be started. Inner: it cannot be executed, took too long, printed too much, failed, or keeps starting processes.
pub(crate) fn output(
    program: &Path,
    argument: &str,
    bounds: &Bounds,
    time: Duration,
    limit: usize,
) -> io::Result<Result<Vec<u8>, FailedRun>> {
    // A parallel call under the same uid would be mistaken for an orphan of this one.
    let _turn = bounds.uid.map(Turn::wait).transpose()?;
    let (mut command, report) = shim(program, Path::new("/"), None, bounds)?;
    let mark = OsString::from(Uuid::new_v4().simple().to_string());
    command.arg(argument).env(ASK_VARIABLE, &mark).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = Process::spawn(&mut command)?;
    drop(command);
    process.mark = Some((ASK_VARIABLE, mark));
    let mut complained = Vec::new();
    let printed = process.collect(argument, time, limit, &mut complained);
    let (exit, complete) = process.end(bounds.uid.map_or(Reach::Marked, Reach::Uid));
    // Only the shim had the other end, so this does not block.
    match exec_error(report) {
        Some(ExecError::Unfit(reason)) => return Ok(Err(FailedRun { reason, printed: Vec::new(), is_unfit: true })),
        Some(ExecError::Passing(error)) => return Err(error.into()),
        None => {}
    }
    let failed = |reason: String| FailedRun { reason, printed: lines(&complained), is_unfit: false };
    Ok(match (printed, exit) {
        (Err(reason), _) => Err(failed(reason)),
        (Ok(printed), Exit::Code(0)) if complete => Ok(printed),
        (Ok(_), Exit::Code(0)) => Err(failed(format!("{argument} starts processes faster than the host can kill them"))),
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

/// A `--metadata` call without a usable answer.
#[derive(Debug)]
pub(crate) struct FailedRun {
    /// The reason, one sentence.
    pub(crate) reason: String,
    /// Its standard error, escaped for display.
    pub(crate) printed: Vec<String>,
    /// Whether the system could not execute the file, so that nothing ran.
    pub(crate) is_unfit: bool,
}

/// Splits output into lines that are escaped for display.
pub(crate) fn lines(printed: &[u8]) -> Vec<String> {
    let shown = |line: &[u8]| {
        let mut shown = String::new();
        escape::escape(&mut shown, line);
        shown
    };
    printed.strip_suffix(b"\n").unwrap_or(printed).split(|byte| *byte == b'\n').map(shown).collect()
}

/// Uids in use by `--metadata` calls.
static TURNS: (Mutex<BTreeSet<u32>>, Condvar) = (Mutex::new(BTreeSet::new()), Condvar::new());

/// Exclusive use of a uid for a `--metadata` call, released when dropped.
struct Turn(u32);

impl Turn {
    fn wait(uid: u32) -> io::Result<Self> {
        let (taken, freed) = &TURNS;
        let taken = taken.locked();
        let waited = freed.wait_timeout_while(taken, TURN_TIME, |taken| taken.contains(&uid));
        let (mut taken, waited) = unpoisoned(waited);
        if waited.timed_out() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, format!("another --metadata call under uid {uid} does not end")));
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
    /// Reads its output until it ends, and returns its standard output. The last part of its standard error goes to `complained`.
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
                // Its last output is in the pipe by now; the next rounds read it.
                ended = self.has_ended();
            }
            if out {
                stdout_open = read_some(&mut stdout, &mut printed);
            }
            if err {
                stderr_open = read_some(&mut stderr, complained);
                // The end explains a failure, so drop the beginning.
                complained.drain(..complained.len().saturating_sub(MAX_ERROR_OUTPUT));
            }
            if printed.len() > limit {
                return Err(format!("{argument} printed more than {limit} bytes"));
            }
        }
        if self.ended_by(deadline) { Ok(printed) } else { Err(too_late()) }
    }
}

/// Appends what can be read now. True if more may come.
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

/// A command that starts this program.
fn this_program() -> Command {
    #[expect(clippy::disallowed_methods, reason = "the one place where children are started")]
    let mut command = Command::new(own_program());
    command.arg0("plugrack");
    command
}

/// A command that starts `program` through the shim, in `directory`, with only the allowed environment variables; and the socket on which
/// the shim gets what is `passed` to the program, and reports a failure, see [`exec_error`].
fn shim(program: &Path, directory: &Path, passed: Option<Passed<'_>>, bounds: &Bounds) -> io::Result<(Command, UnixStream)> {
    let (report, reporting) = UnixStream::pair()?;
    if let Some(Passed::Listener(descriptor) | Passed::Input(descriptor)) = passed {
        let descriptors = [descriptor.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
        sendmsg(&report, &[IoSlice::new(b"3")], &mut ancillary, SendFlags::NOSIGNAL)?;
    }
    let mut command = this_program();
    command.arg(SHIM).arg(std::process::id().to_string());
    let number = |bound: Option<u64>| bound.map_or(UNBOUND.to_owned(), |number| number.to_string());
    command.arg(number(bounds.uid.map(u64::from))).arg(number(bounds.memory)).arg(number(bounds.open_files));
    command.arg(passed.map_or(UNBOUND.to_owned(), |passed| passed.target().to_string())).arg(program);
    command.current_dir(directory).stdin(OwnedFd::from(reporting)).env_clear().env("PATH", DEFAULT_PATH).env("HOME", directory);
    command.env(RUN_VARIABLE, run_id());
    command.envs(INHERITED.iter().filter_map(|name| Some((name, std::env::var_os(name)?)))).envs(PRESET);
    if let Some(Passed::Listener(_)) = passed {
        command.env("LISTEN_FDS", "1");
    }
    for (name, value) in &bounds.variables {
        let mut set = OsString::from(SET_PREFIX);
        set.push(name);
        command.env(set, value);
    }
    Ok((command, report))
}

/// Waits until the shim has executed the program or failed, and returns why it could not; none if it could, or ended for another reason.
fn exec_error(report: UnixStream) -> Option<ExecError> {
    let mut reported = Vec::new();
    report.take(MAX_REPORT as u64).read_to_end(&mut reported).ok()?;
    let reported = String::from_utf8_lossy(&reported);
    let (number, reason) = reported.split_once(' ')?;
    let error = Errno::from_raw_os_error(number.parse().ok()?);
    Some(if PASSING.contains(&error) { ExecError::Passing(error) } else { ExecError::Unfit(reason.to_owned()) })
}

/// Takes the host's socket from standard input, the only way to pass it here, and leaves an empty input in its place. The socket closes on
/// exec, which tells the host that the program was executed.
fn take_report() -> io::Result<UnixStream> {
    let report = rustix::io::fcntl_dupfd_cloexec(stdin(), LISTENER + 1)?;
    dup2_stdin(no_input()?)?;
    Ok(report.into())
}

/// Takes what is for the program from the host's socket, and gives it the descriptor `target` that the program expects. Returns a listener,
/// which is still to be closed on exec.
fn take_passed(host: &UnixStream, target: i32) -> io::Result<Option<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    recvmsg(host, &mut [IoSliceMut::new(&mut [0])], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let received = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    let mut listener = received.ok_or(io::ErrorKind::UnexpectedEof)?;
    if target == INPUT {
        dup2_stdin(listener)?;
        return Ok(None);
    }
    if listener.as_raw_fd() != LISTENER {
        listener = rustix::io::fcntl_dupfd_cloexec(&listener, LISTENER)?;
    }
    if listener.as_raw_fd() != LISTENER {
        return Err(io::Error::other(format!(
            "the host was started with an open file as descriptor {LISTENER}, which must be free"
        )));
    }
    Ok(Some(listener))
}

/// An empty input: `/dev/null`, or a closed pipe in a root without it.
fn no_input() -> io::Result<OwnedFd> {
    File::open("/dev/null").map(OwnedFd::from).or_else(|_| io::pipe().map(|(reader, _)| reader.into()))
}

/// The shim: `plugrack __exec HOST_PID UID MEMORY FILES DESCRIPTOR PROGRAM [ARGUMENT]…` confines this process, then becomes the program.
pub(crate) fn shim_main(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let host = arguments.next().and_then(|pid| pid.to_str().and_then(|pid| pid.parse().ok()));
    let (uid, memory, files) = (bound(arguments.next()), bound(arguments.next()), bound(arguments.next()));
    let passed = bound::<i32>(arguments.next());
    let (Some(host), Some(uid), Some(memory), Some(open_files), Some(passed), Some(program)) =
        (host, uid, memory, files, passed, arguments.next())
    else {
        return complain(format_args!("{SHIM} is how plugrack starts plugins, not a command"), 64);
    };
    let mut report = match take_report() {
        Ok(report) => report,
        Err(error) => return complain(format_args!("cannot prepare {}: {error}", program.display()), 126),
    };
    let listener = match passed.map(|target| take_passed(&report, target)).transpose() {
        Ok(listener) => listener.flatten(),
        Err(error) => return complain(format_args!("cannot give {} its socket: {error}", program.display()), 126),
    };
    // Resolved before the privileges are dropped.
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
    // Confinement has made every file close-on-exec.
    if let Some(Err(error)) = listener.as_ref().map(|listener| rustix::io::fcntl_setfd(listener, FdFlags::empty())) {
        return complain(format_args!("cannot give {} its socket: {error}", program.display()), 126);
    }
    let error = execute(&program, arguments, listener.is_some());
    let explained = if is_passing(&error) { None } else { preflight::explain(Path::new(&program)) };
    let reason = explained.unwrap_or_else(|| error.to_string());
    tell(&mut report, &error, &reason);
    let code = if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 };
    complain(format_args!("cannot execute {}: {reason}", program.display()), code)
}

/// Whether a failure may be temporary.
fn is_passing(error: &io::Error) -> bool {
    Errno::from_io_error(error).is_some_and(|errno| PASSING.contains(&errno))
}

/// Reports to the host why the program is not executed, in the format of [`exec_error`].
fn tell(report: &mut UnixStream, error: &io::Error, reason: &str) {
    let reported = format!("{} {reason}", error.raw_os_error().unwrap_or_default());
    // The host may be gone.
    drop(report.write_all(&reported.as_bytes()[..reported.len().min(MAX_REPORT)]));
}

/// Executes the program; returns only on failure. Not by [`Command`], because its C library runs a shell on files that the kernel does
/// not execute.
fn execute(program: &OsStr, arguments: impl Iterator<Item = OsString>, listens: bool) -> io::Error {
    // Rust's runtime ignores SIGPIPE, and the program would inherit that. A caught signal becomes the default on exec.
    if let Err(error) = signal_hook::flag::register(SIGPIPE, Arc::default()) {
        return error;
    }
    let text = |text: &[u8]| CString::new(text);
    let path = text(program.as_bytes());
    let arguments = std::iter::once(program.to_owned()).chain(arguments).map(|argument| text(argument.as_bytes()));
    let mut environment = environment();
    if listens {
        environment.insert("LISTEN_PID".into(), std::process::id().to_string().into());
    }
    let environment = environment.into_iter().map(|(name, value)| text(&[name.as_bytes(), b"=", value.as_bytes()].concat()));
    match (path, arguments.collect::<Result<Vec<_>, _>>(), environment.collect::<Result<Vec<_>, _>>()) {
        (Ok(path), Ok(arguments), Ok(environment)) => match execve(&path, &arguments, &environment) {
            Ok(never) => match never {},
            Err(error) => error.into(),
        },
        // No NUL bytes: these came through execve themselves.
        _ => Errno::INVAL.into(),
    }
}

/// The program's environment: this process's, overridden by the operator's variables without their prefix.
fn environment() -> BTreeMap<OsString, OsString> {
    let set = |name: &OsStr| name.as_bytes().strip_prefix(SET_PREFIX.as_bytes()).map(|name| OsStr::from_bytes(name).to_owned());
    let (operators, own): (Vec<_>, Vec<_>) = std::env::vars_os().partition(|(name, _)| set(name).is_some());
    let operators = operators.into_iter().filter_map(|(name, value)| Some((set(&name)?, value)));
    own.into_iter().chain(operators).collect()
}

/// Parses a bound from its argument; the outer `None` means malformed, the inner one no bound.
fn bound<T: FromStr>(argument: Option<OsString>) -> Option<Option<T>> {
    match argument?.to_str()? {
        UNBOUND => Some(None),
        text => text.parse().ok().map(Some),
    }
}

/// The paths that a program needs, with the required access: itself, its interpreter, its home and working directory. Links are resolved.
fn needed(program: &Path) -> Vec<(PathBuf, Access)> {
    let interpreter = preflight::interpreter(program);
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let paths = [
        (Some(program.to_owned()), Access::READ_OK | Access::EXEC_OK),
        (interpreter, Access::EXEC_OK),
        (home, Access::EXEC_OK),
        (Some(".".into()), Access::EXEC_OK),
    ];
    paths.into_iter().filter_map(|(path, access)| Some((std::fs::canonicalize(path?).ok()?, access))).collect()
}

/// Why this process's user cannot use `path`, and the fix, as the end of a sentence.
fn barred(path: &Path, access: Access) -> Option<String> {
    let mut above: Vec<&Path> = path.ancestors().skip(1).collect();
    above.reverse();
    if let Some(bar) = above.into_iter().find(|directory| rustix::fs::access(*directory, Access::EXEC_OK).is_err()) {
        return Some(format!("reach {}, because it may not enter {}: chmod o+x {1}", path.display(), bar.display()));
    }
    let refused = rustix::fs::access(path, access).is_err();
    refused.then(|| format!("use {}: chmod o+rx {0}", path.display()))
}

/// Kills all processes under a uid at once, so that none escapes by forking: the sweeper becomes that user and signals everything it may.
/// If that fails, a scan of `/proc` finds the rest.
fn sweep(uid: u32) {
    let deadline = Instant::now() + SWEEP_TIME;
    let sweeper = || {
        let mut command = this_program();
        command.arg(SWEEPER).arg(uid.to_string()).stdin(no_input()?).env_clear();
        Process::spawn(&mut command)
    };
    while let Ok(mut sweeper) = sweeper() {
        sweeper.ended_by(deadline);
        // Its targets may have killed or stopped the sweeper first.
        if !matches!(sweeper.end(Reach::Group).0, Exit::Signal(_)) || Instant::now() >= deadline {
            return;
        }
    }
}

/// The sweeper: `plugrack __sweep UID` kills all other processes under the uid, which is never root's.
pub(crate) fn sweeper_main(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let Some(uid) = arguments.next().and_then(|uid| uid.to_str()?.parse().ok()).filter(|uid| *uid > 0) else {
        return complain(format_args!("{SWEEPER} is how plugrack ends plugins, not a command"), 64);
    };
    let everybody = nix::unistd::Pid::from_raw(-1);
    let swept = become_user(uid).and_then(|()| {
        // As root, the signal would reach every process.
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
    // Nobody can read a message if standard error is closed.
    drop(writeln!(io::stderr(), "{what}"));
    ExitCode::from(code)
}

/// Confines this process: a session of its own, the intended user, killed with the host, no new privileges.
fn confine(host: u32, bounds: &Bounds) -> io::Result<()> {
    rustix::process::setsid()?;
    // Must come before PR_SET_PDEATHSIG: a change of uid clears it.
    if let Some(uid) = bounds.uid {
        become_user(uid)?;
    }
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    // If the host died before PR_SET_PDEATHSIG, this process already has another parent.
    let parent = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get());
    if parent.and_then(|pid| u32::try_from(pid).ok()) != Some(host) {
        return Err(io::Error::other("the host is gone"));
    }
    // The host's own files are close-on-exec; these are files that the host inherited.
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

/// Drops root permanently. The shim has one thread, so per-thread credentials are those of the process.
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

/// Sets the soft and hard limit, capped by the current hard limit.
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
        // However often it is polled, it keeps its id, so that its group can be killed.
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
            let (reader, mut writer) = UnixStream::pair().unwrap();
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
