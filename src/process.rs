//! Children: started, confined, their output captured, stopped with all they started.
//!
//! The host starts itself again as a small shim, which sets up its own process by safe calls and then becomes the plugin. So
//! nothing of ours runs between fork and exec, where little is allowed, and no unsafe code is needed.

use crate::failure_line::failure_line;
use crate::output::PluginLog;
use crate::pause::pause;
use crate::remains::{self, Marks};
use crate::restart::Exit;
use crate::text;
use crossbeam_channel::{Receiver, Sender, bounded};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::Access;
use rustix::process::{Gid, Pid, Resource, Rlimit, Signal, Uid, WaitId, WaitIdOptions};
use signal_hook::consts::SIGCHLD;
use signal_hook::iterator::Signals;
use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, PipeReader, Read};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::str::FromStr;
use std::sync::{LazyLock, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// The first argument that makes the program the shim. Not a subcommand: no operator types it.
pub(crate) const SHIM: &str = "__exec";

/// Stands in the shim's arguments for a bound that is not set.
const UNBOUND: &str = "-";

/// This program's own file, whatever lies at its path by now. Only where there is a `/proc`.
const OWN_FILE: &str = "/proc/self/exe";

/// Where [`OWN_FILE`] is missing: the path this program was executed by.
static EXECUTED_BY: OnceLock<PathBuf> = OnceLock::new();

/// Open files a plugin may have: plenty for a small server, and the default of most systems.
const MAX_OPEN_FILES: u64 = 1024;

/// Processes and threads at once of a plugin with a uid of its own: two for each of 256 connections, the most a plugin has.
const MAX_PROCESSES: u64 = 512;

/// Stack of the threads that only wait or copy, in bytes.
pub(crate) const SMALL_STACK: usize = 128 * 1024;

/// What is kept of a child's standard error when its standard output is what matters, in bytes.
const MAX_ERROR_OUTPUT: usize = 16 * 1024;

/// How long the last output of a process that has ended is waited for.
const LAST_OUTPUT_TIME: Duration = Duration::from_millis(200);

/// How often a wait for output looks whether the child has ended while another process keeps its output open.
const EXIT_CHECK: Duration = Duration::from_millis(50);

/// The variable that every child, and so all it starts, has from this run of the host: by it they are found again.
pub(crate) const RUN_VARIABLE: &str = "PLUGRACK_RUN";

/// The variable that tells a plugin where to listen, and by which what it has left is told from what others have.
pub(crate) const SOCKET_VARIABLE: &str = "PLUGRACK_SOCKET";

/// Time in which all that a plugin has left is ended.
const REMAINS_TIME: Duration = Duration::from_secs(1);

/// Variables a child has from the host's environment, which holds secrets otherwise.
const INHERITED: [&str; 3] = ["PATH", "LANG", "TZ"];

/// Where programs are found when the host has no `PATH`.
const DEFAULT_PATH: &str = "/usr/local/bin:/usr/bin:/bin";

/// Children that somebody here waits for.
static OWN: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

fn own() -> MutexGuard<'static, BTreeSet<i32>> {
    OWN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Which run of the host this is: its value of [`RUN_VARIABLE`].
pub(crate) fn run_id() -> &'static str {
    static RUN: LazyLock<String> = LazyLock::new(|| Uuid::new_v4().simple().to_string());
    &RUN
}

/// A thread that only waits or copies.
pub(crate) fn small_thread(name: impl Into<String>) -> thread::Builder {
    thread::Builder::new().name(name.into()).stack_size(SMALL_STACK)
}

/// As the first process of a container, reaps the processes that are left to it, on a thread of its own. Elsewhere the system does.
pub(crate) fn reap_orphans() -> io::Result<()> {
    if std::process::id() != 1 {
        return Ok(());
    }
    let mut signals = Signals::new([SIGCHLD])?;
    small_thread("reaper").spawn(move || {
        for _ in signals.forever() {
            // While the list is held no child is started, so that what is not in it is nobody's.
            let own = own();
            for pid in remains::zombies_of_this_process().into_iter().filter(|pid| !own.contains(&pid.as_raw_nonzero().get())) {
                rustix::process::waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOHANG).unwrap_or_default();
            }
        }
    })?;
    Ok(())
}

/// How a child is bound beyond what all children are.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Bounds {
    /// The user and group it runs as; without one, the host's.
    pub(crate) uid: Option<u32>,
    /// Most bytes of heap and private writable memory of each of its processes.
    pub(crate) memory: Option<u64>,
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

/// A running plugin. Dropping it kills and reaps it, with its process group.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    pid: Pid,
    reaped: bool,
    /// Closes when all it printed is written down.
    captured: Option<Receiver<()>>,
    /// Where it listens, when it is a plugin at work.
    socket: Option<OsString>,
}

impl Process {
    /// Starts a plugin; all it prints goes to `log`.
    pub(crate) fn start(
        program: &Path,
        home: &Path,
        env: &[(&str, &OsStr)],
        bounds: Bounds,
        log: &PluginLog,
        name: &str,
    ) -> io::Result<Self> {
        let (reader, writer) = io::pipe()?;
        let mut command = shim(program, home, bounds);
        command.envs(env.iter().copied()).stdout(writer.try_clone()?).stderr(writer);
        let mut process = Self::spawn(&mut command)?;
        // The command holds the write end, without which the capture can come to its end.
        drop(command);
        process.socket = env.iter().find(|(name, _)| *name == SOCKET_VARIABLE).map(|(_, socket)| socket.into());
        let log = log.clone();
        let (capturing, captured) = bounded(0);
        process.captured = Some(captured);
        small_thread(format!("log-{name}")).spawn(move || {
            log.capture(reader);
            drop::<Sender<()>>(capturing);
        })?;
        Ok(process)
    }

    /// Starts this program again as a helper of the host, `plugrack role argument`. It outlives the host to see to what that leaves.
    pub(crate) fn helper(role: &str, argument: &str, stdin: PipeReader) -> io::Result<Self> {
        let mut command = this_program();
        command.arg(role).arg(argument).stdin(stdin).stdout(Stdio::null()).env_clear();
        command.envs(std::env::var_os("RUST_LOG").map(|level| ("RUST_LOG", level)));
        Self::spawn(&mut command)
    }

    fn spawn(command: &mut Command) -> io::Result<Self> {
        let mut own = own();
        let child = command.spawn()?;
        let pid = Pid::from_child(&child);
        own.insert(pid.as_raw_nonzero().get());
        Ok(Self { child, pid, reaped: false, captured: None, socket: None })
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
        self.end(false)
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
        if !self.reaped {
            // Until the shim has made its session there is no group. One that has ended needs no signal.
            rustix::process::kill_process(self.pid, signal).unwrap_or_default();
            rustix::process::kill_process_group(self.pid, signal).unwrap_or_default();
        }
    }

    /// Kills what is left of the process and its group, waits for its end and its last output, and says what the end was.
    /// A `thorough` look finds what has left the group, too.
    pub(crate) fn reap(mut self, thorough: bool) -> Exit {
        self.end(thorough)
    }

    fn end(&mut self, thorough: bool) -> Exit {
        self.kill();
        wait(self.pid);
        if let Some(socket) = self.socket.take().filter(|_| thorough) {
            // Before it is reaped: until then its id can be no other session's.
            let marks = Marks { sessions: [self.pid()].into(), variable: (SOCKET_VARIABLE, socket) };
            remains::end(&marks, REMAINS_TIME);
        }
        let status = self.child.wait();
        self.reaped = true;
        own().remove(&self.pid());
        if let Some(captured) = &self.captured {
            // Another process may have taken the output along, and keep it open.
            captured.recv_timeout(LAST_OUTPUT_TIME).unwrap_or_default();
        }
        status.map_or(Exit::Fault, exit_of)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.reaped {
            self.end(true);
        }
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

/// Runs `program argument` and gives what it printed, at most `limit` bytes, within `time`.
///
/// # Errors
/// The outer one says that it could not be started, the inner one that it took too long, printed too much, or failed.
pub(crate) fn output(
    program: &Path,
    argument: &str,
    bounds: Bounds,
    time: Duration,
    limit: usize,
) -> io::Result<Result<Vec<u8>, FailedRun>> {
    let mut command = shim(program, Path::new("/"), bounds);
    command.arg(argument).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut complained = Vec::new();
    let collected = collect(Process::spawn(&mut command)?, argument, time, limit, &mut complained);
    Ok(collected.map_err(|reason| FailedRun { reason, printed: lines(&complained) }))
}

/// What came of a program that did not do what it was run for.
#[derive(Debug)]
pub(crate) struct FailedRun {
    /// Why, in a sentence.
    pub(crate) reason: String,
    /// What it had printed on standard error, fit to be shown.
    pub(crate) printed: Vec<String>,
}

/// Printed bytes as lines that are fit to be shown.
pub(crate) fn lines(printed: &[u8]) -> Vec<String> {
    let shown = |line: &[u8]| {
        let mut shown = String::new();
        text::escape(&mut shown, line);
        shown
    };
    printed.strip_suffix(b"\n").unwrap_or(printed).split(|byte| *byte == b'\n').map(shown).collect()
}

fn collect(
    mut process: Process,
    argument: &str,
    time: Duration,
    limit: usize,
    complained: &mut Vec<u8>,
) -> Result<Vec<u8>, String> {
    let deadline = Instant::now() + time;
    let (Some(mut stdout), Some(mut stderr)) = (process.child.stdout.take(), process.child.stderr.take()) else {
        return Err("cannot read its output".into());
    };
    let mut printed = Vec::new();
    let (mut stdout_open, mut stderr_open, mut ended) = (true, true, false);
    while stdout_open || stderr_open {
        let Some(left) = deadline.checked_duration_since(Instant::now()) else {
            return Err(format!("{argument} did not end within {} s", time.as_secs_f32()));
        };
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
            ended = process.child.try_wait().is_ok_and(|status| status.is_some());
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
    let exit = loop {
        match process.child.try_wait() {
            Ok(Some(status)) => break exit_of(status),
            Ok(None) if Instant::now() < deadline => pause(Duration::from_millis(1)),
            _ => return Err(format!("{argument} did not end within {} s", time.as_secs_f32())),
        }
    };
    match exit {
        Exit::Code(0) => Ok(printed),
        exit => {
            let complaint = String::from_utf8_lossy(complained);
            let lines: Vec<&str> = complaint.lines().collect();
            let why = failure_line(&lines).unwrap_or("it printed nothing on standard error");
            let why: String = why.chars().filter(|c| !c.is_control()).take(300).collect();
            Err(format!("{argument} ended with {exit}: {why}"))
        }
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

/// A duration as poll takes it.
pub(crate) fn timespec(duration: Duration) -> Timespec {
    Timespec::try_from(duration).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 })
}

/// The command that starts this program again.
fn this_program() -> Command {
    #[expect(clippy::disallowed_methods, reason = "the one place where children are started")]
    let mut command = Command::new(EXECUTED_BY.get().map_or(Path::new(OWN_FILE), PathBuf::as_path));
    command.arg0("plugrack");
    command
}

/// The command that starts `program` through the shim, in `directory`, with an environment of the allowed variables only.
fn shim(program: &Path, directory: &Path, bounds: Bounds) -> Command {
    let mut command = this_program();
    command.arg(SHIM).arg(std::process::id().to_string());
    let number = |bound: Option<u64>| bound.map_or(UNBOUND.to_owned(), |number| number.to_string());
    command.arg(number(bounds.uid.map(u64::from))).arg(number(bounds.memory)).arg(program);
    command.current_dir(directory).stdin(no_input()).env_clear().env("PATH", DEFAULT_PATH).env("HOME", directory);
    command.env(RUN_VARIABLE, run_id());
    command.envs(INHERITED.iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
    command
}

/// An input that is at its end: `/dev/null`, and in a root that has none a pipe.
fn no_input() -> Stdio {
    let pipe = |_| io::pipe().map(|(reader, _)| Stdio::from(reader));
    File::open("/dev/null").map(Stdio::from).or_else(pipe).unwrap_or_else(|_| Stdio::null())
}

/// The shim: `plugrack __exec HOST_PID UID MEMORY PROGRAM [ARGUMENT]…` confines this process, then becomes the program.
pub(crate) fn shim_main(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let host = arguments.next().and_then(|pid| pid.to_str().and_then(|pid| pid.parse().ok()));
    let (uid, memory) = (bound(arguments.next()), bound(arguments.next()));
    let (Some(host), Some(uid), Some(memory), Some(program)) = (host, uid, memory, arguments.next()) else {
        return complain(format_args!("{SHIM} is how plugrack starts plugins, not a command"), 64);
    };
    // Looked up while everything can be.
    let needed = uid.map_or(Vec::new(), |_| needed(Path::new(&program)));
    if let Err(error) = confine(host, Bounds { uid, memory }) {
        return complain(format_args!("cannot confine {}: {error}", program.display()), 126);
    }
    if let (Some(uid), Some(barred)) = (uid, needed.iter().find_map(|(path, access)| barred(path, *access))) {
        return complain(format_args!("uid {uid} cannot {barred}"), 77);
    }
    #[expect(clippy::disallowed_methods, reason = "the one place where children are started")]
    let error = Command::new(&program).args(arguments).exec();
    let code = if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 };
    complain(format_args!("cannot execute {}: {error}", program.display()), code)
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
    let interpreter = crate::preflight::interpreter(program);
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

fn complain(what: std::fmt::Arguments<'_>, code: u8) -> ExitCode {
    use io::Write;
    // Where standard error is gone there is nobody to tell.
    drop(writeln!(io::stderr(), "{what}"));
    ExitCode::from(code)
}

/// Puts this process in a session of its own that dies with the host and can gain no privileges, as the user it is meant for.
fn confine(host: u32, bounds: Bounds) -> io::Result<()> {
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
    limit(Resource::Nofile, MAX_OPEN_FILES)?;
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
