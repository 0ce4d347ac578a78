//! Children: started, confined, their output captured, stopped with all they started.
//!
//! The host starts itself again as a small shim, which sets up its own process by safe calls and then becomes the plugin. So
//! nothing of ours runs between fork and exec, where little is allowed, and no unsafe code is needed.

use crate::output::PluginLog;
use crate::restart::Exit;
use crossbeam_channel::{Receiver, Sender, bounded};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Resource, Rlimit, Signal, WaitId, WaitIdOptions};
use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// The first argument that makes the program the shim. Not a subcommand: no operator types it.
pub(crate) const SHIM: &str = "__exec";

/// Open files a plugin may have: plenty for a small server, and the default of most systems.
const MAX_OPEN_FILES: u64 = 1024;

/// Stack of the threads that only wait or copy, in bytes.
pub(crate) const SMALL_STACK: usize = 128 * 1024;

/// What is kept of a child's standard error when its standard output is what matters, in bytes.
const MAX_ERROR_OUTPUT: usize = 4096;

/// How long the last output of a process that has ended is waited for.
const LAST_OUTPUT_TIME: Duration = Duration::from_millis(200);

/// How often a wait for output looks whether the child has ended while another process keeps its output open.
const EXIT_CHECK: Duration = Duration::from_millis(50);

/// Variables a child has from the host's environment, which holds secrets otherwise.
const INHERITED: [&str; 3] = ["PATH", "LANG", "TZ"];

/// Where programs are found when the host has no `PATH`.
const DEFAULT_PATH: &str = "/usr/local/bin:/usr/bin:/bin";

/// A running plugin. Dropping it kills and reaps it, with its process group.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    pid: Pid,
    reaped: bool,
    /// Closes when all it printed is written down.
    captured: Option<Receiver<()>>,
}

impl Process {
    /// Starts a plugin; all it prints goes to `log`.
    pub(crate) fn start(program: &Path, home: &Path, env: &[(&str, &OsStr)], log: &PluginLog, name: &str) -> io::Result<Self> {
        let (reader, writer) = io::pipe()?;
        let mut command = shim(program, home);
        command.envs(env.iter().copied()).stdout(writer.try_clone()?).stderr(writer);
        let mut process = Self::spawn(&mut command)?;
        // The command holds the write end, without which the capture can come to its end.
        drop(command);
        let log = log.clone();
        let thread = std::thread::Builder::new().name(format!("log-{name}")).stack_size(SMALL_STACK);
        let (capturing, captured) = bounded(0);
        process.captured = Some(captured);
        thread.spawn(move || {
            log.capture(reader);
            drop::<Sender<()>>(capturing);
        })?;
        Ok(process)
    }

    fn spawn(command: &mut Command) -> io::Result<Self> {
        let child = command.spawn()?;
        let pid = Pid::from_child(&child);
        Ok(Self { child, pid, reaped: false, captured: None })
    }

    /// The process id, which is that of its session and of its process group too.
    pub(crate) fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Calls `then`, on a thread of its own, when the process has ended. It stays to be reaped, so its id cannot pass to another.
    pub(crate) fn on_exit(&self, name: &str, then: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let pid = self.pid;
        let thread = std::thread::Builder::new().name(format!("wait-{name}")).stack_size(SMALL_STACK);
        thread.spawn(move || {
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            while rustix::process::waitid(WaitId::Pid(pid), options).is_err_and(|error| error == rustix::io::Errno::INTR) {}
            then();
        })?;
        Ok(())
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
    pub(crate) fn reap(mut self) -> Exit {
        self.end()
    }

    fn end(&mut self) -> Exit {
        self.kill();
        let status = self.child.wait();
        self.reaped = true;
        if let Some(captured) = &self.captured {
            // Another process may have taken the output along, and keep it open.
            captured.recv_timeout(LAST_OUTPUT_TIME).unwrap_or_default();
        }
        status.map_or(Exit::Failed, exit_of)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.reaped {
            self.end();
        }
    }
}

fn exit_of(status: ExitStatus) -> Exit {
    match (status.code(), status.signal()) {
        (Some(code), _) => Exit::Code(code),
        (None, Some(signal)) => Exit::Signal(signal),
        (None, None) => Exit::Failed,
    }
}

/// Runs `program argument` and gives what it printed, at most `limit` bytes, within `time`.
///
/// # Errors
/// The outer one says that it could not be started, the inner one in a sentence that it took too long, printed too much, or failed.
pub(crate) fn output(program: &Path, argument: &str, time: Duration, limit: usize) -> io::Result<Result<Vec<u8>, String>> {
    let mut command = shim(program, Path::new("/"));
    command.arg(argument).stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(collect(Process::spawn(&mut command)?, argument, time, limit))
}

fn collect(mut process: Process, argument: &str, time: Duration, limit: usize) -> Result<Vec<u8>, String> {
    let deadline = Instant::now() + time;
    let (Some(mut stdout), Some(mut stderr)) = (process.child.stdout.take(), process.child.stderr.take()) else {
        return Err("cannot read its output".into());
    };
    let (mut printed, mut complained) = (Vec::new(), Vec::new());
    let (mut stdout_open, mut stderr_open) = (true, true);
    while stdout_open || stderr_open {
        let Some(left) = deadline.checked_duration_since(Instant::now()) else {
            return Err(format!("{argument} did not end within {} s", time.as_secs_f32()));
        };
        let interest = |open| if open { PollFlags::IN } else { PollFlags::empty() };
        let mut fds = [
            PollFd::from_borrowed_fd(stdout.as_fd(), interest(stdout_open)),
            PollFd::from_borrowed_fd(stderr.as_fd(), interest(stderr_open)),
        ];
        let ready = poll(&mut fds, Some(&timespec(left.min(EXIT_CHECK)))).unwrap_or(0);
        let (out, err) = (!fds[0].revents().is_empty(), !fds[1].revents().is_empty());
        if ready == 0 && process.child.try_wait().is_ok_and(|status| status.is_some()) {
            break;
        }
        if stdout_open && out {
            stdout_open = read_some(&mut stdout, &mut printed);
        }
        if stderr_open && err {
            stderr_open = read_some(&mut stderr, &mut complained);
            complained.truncate(MAX_ERROR_OUTPUT);
        }
        if printed.len() > limit {
            return Err(format!("{argument} printed more than {limit} bytes"));
        }
    }
    let exit = loop {
        match process.child.try_wait() {
            Ok(Some(status)) => break exit_of(status),
            Ok(None) if Instant::now() < deadline => {
                crossbeam_channel::never::<()>().recv_timeout(Duration::from_millis(1)).unwrap_or_default()
            }
            _ => return Err(format!("{argument} did not end within {} s", time.as_secs_f32())),
        }
    };
    match exit {
        Exit::Code(0) => Ok(printed),
        exit => {
            let complaint = String::from_utf8_lossy(&complained);
            let last = complaint.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it printed nothing on standard error");
            let last: String = last.chars().filter(|c| !c.is_control()).take(300).collect();
            Err(format!("{argument} ended with {exit}: {last}"))
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

/// The command that starts `program` through the shim, in `directory`, with an environment of the allowed variables only.
fn shim(program: &Path, directory: &Path) -> Command {
    #[expect(clippy::disallowed_methods, reason = "the one place where children are started")]
    let mut command = Command::new("/proc/self/exe");
    command.arg0("plugrack").arg(SHIM).arg(std::process::id().to_string()).arg(program);
    command.current_dir(directory).stdin(Stdio::null()).env_clear().env("PATH", DEFAULT_PATH).env("HOME", directory);
    command.envs(INHERITED.iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
    command
}

/// The shim: `plugrack __exec HOST_PID PROGRAM [ARGUMENT]…` confines this process, then becomes the program.
pub(crate) fn shim_main(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let host = arguments.next().and_then(|pid| pid.to_str().and_then(|pid| pid.parse().ok()));
    let (Some(host), Some(program)) = (host, arguments.next()) else {
        return complain(format_args!("{SHIM} is how plugrack starts plugins, not a command"), 64);
    };
    if let Err(error) = confine(host) {
        return complain(format_args!("cannot confine {}: {error}", program.display()), 126);
    }
    #[expect(clippy::disallowed_methods, reason = "the one place where children are started")]
    let error = Command::new(&program).args(arguments).exec();
    let code = if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 };
    complain(format_args!("cannot execute {}: {error}", program.display()), code)
}

fn complain(what: std::fmt::Arguments<'_>, code: u8) -> ExitCode {
    use io::Write;
    // Where standard error is gone there is nobody to tell.
    drop(writeln!(io::stderr(), "{what}"));
    ExitCode::from(code)
}

/// Puts this process in a session of its own that dies with the host and can gain no privileges.
fn confine(host: u32) -> io::Result<()> {
    rustix::process::setsid()?;
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    // The host may have died before the line above, and then this process has another parent already.
    let parent = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get());
    if parent.and_then(|pid| u32::try_from(pid).ok()) != Some(host) {
        return Err(io::Error::other("the host is gone"));
    }
    // The host's own files close by themselves; these are what it was started with.
    close_fds::set_fds_cloexec(3, &[]);
    rustix::thread::set_no_new_privs(true)?;
    rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    let allowed = rustix::process::getrlimit(Resource::Nofile).maximum.unwrap_or(MAX_OPEN_FILES).min(MAX_OPEN_FILES);
    rustix::process::setrlimit(Resource::Nofile, Rlimit { current: Some(allowed), maximum: Some(allowed) })?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    Ok(())
}
