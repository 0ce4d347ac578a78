//! Threads that the host needs for as long as it runs. A panic in such a thread either restarts it or ends the process: a host that
//! went on without it would only seem to work, and nothing would restart it.

use crate::util::pause::pause;
use rustix::event::Timespec;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::{self, Builder, JoinHandle};
use std::time::{Duration, Instant};

/// Pause before a thread that panicked is restarted, so that a fault that stays does not keep a processor busy.
const RESTART_PAUSE: Duration = Duration::from_millis(500);

/// Panics of one thread within [`PANIC_WINDOW`] after which the process ends: the fault does not pass by restarts of the thread.
const MAX_PANICS: usize = 5;

/// See [`MAX_PANICS`].
const PANIC_WINDOW: Duration = Duration::from_secs(60);

/// Stack size in bytes of threads that only wait or copy.
pub(crate) const SMALL_STACK: usize = 128 * 1024;

/// A builder for a thread that only waits or copies.
pub(crate) fn small_thread(name: impl Into<String>) -> thread::Builder {
    thread::Builder::new().name(name.into()).stack_size(SMALL_STACK)
}

/// A duration as a timeout for poll.
pub(crate) fn timespec(duration: Duration) -> Timespec {
    Timespec::try_from(duration).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 })
}

/// Starts a thread whose body is run again after each panic, until it returns. [`MAX_PANICS`] panics within [`PANIC_WINDOW`] end the
/// process with exit code 1. The body must not keep state that a panic could leave half changed.
///
/// # Errors
/// The thread cannot be started.
pub(crate) fn restarting(builder: Builder, body: impl FnMut() + Send + 'static) -> io::Result<()> {
    builder.spawn(move || {
        if !persist(body) {
            let window = PANIC_WINDOW.as_secs();
            end_process(&format!("the thread {} panicked {MAX_PANICS} times within {window} s", name()));
        }
    })?;
    Ok(())
}

/// Starts a thread whose state cannot be rebuilt: a panic ends the process with exit code 1.
///
/// # Errors
/// The thread cannot be started.
pub(crate) fn vital<T: Send + 'static>(builder: Builder, body: impl FnOnce() -> T + Send + 'static) -> io::Result<JoinHandle<T>> {
    builder.spawn(move || {
        catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|_| {
            end_process(&format!("the thread {} panicked, and nothing can replace it", name()));
        })
    })
}

/// Runs a body on this thread until it returns, again after each panic. Returns false after [`MAX_PANICS`] panics within
/// [`PANIC_WINDOW`].
pub(crate) fn persist(body: impl FnMut()) -> bool {
    run_again(body, RESTART_PAUSE)
}

fn run_again(mut body: impl FnMut(), between: Duration) -> bool {
    let mut panics: Vec<Instant> = Vec::new();
    while catch_unwind(AssertUnwindSafe(&mut body)).is_err() {
        let now = Instant::now();
        panics.retain(|at| now.duration_since(*at) < PANIC_WINDOW);
        panics.push(now);
        if panics.len() >= MAX_PANICS {
            return false;
        }
        log::error!("the thread {} panicked, which is a fault of plugrack's: it is restarted", name());
        pause(between);
    }
    true
}

fn name() -> String {
    thread::current().name().unwrap_or("without a name").to_owned()
}

/// Ends the process at once. Nothing is stopped in order: what the panic left behind could keep that from its end. Plugins are killed
/// with the process.
fn end_process(why: &str) -> ! {
    log::error!(
        "{why}: this is a fault of plugrack's, and the host ends with exit code 1, for its service manager to restart it"
    );
    #[expect(clippy::exit, reason = "no other thread can be relied on to return from main")]
    std::process::exit(1);
}

/// For tests of what ends the process.
#[cfg(test)]
pub(crate) mod testing {
    use std::process::{Command, Output};

    /// The variable that a test finds in its environment when it is run by [`alone`].
    const ALONE: &str = "PLUGRACK_TEST_ALONE";

    /// Runs a test of this binary, by its full name, as a process of its own. There [`is_alone`] says so.
    pub(crate) fn alone(test: &str) -> Output {
        #[expect(clippy::disallowed_methods, reason = "the tests themselves, once more")]
        let mut command = Command::new(std::env::current_exe().unwrap());
        // A process that ends at once removes no files.
        let dir = tempfile::tempdir().unwrap();
        command.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(ALONE, "1").env("TMPDIR", dir.path());
        command.output().unwrap()
    }

    /// Whether this process is one that [`alone`] has started. Its log goes to standard error.
    pub(crate) fn is_alone() -> bool {
        let alone = std::env::var_os(ALONE).is_some();
        if alone {
            env_logger::Builder::new().filter_level(log::LevelFilter::Info).init();
        }
        alone
    }

    /// Asserts that a test that ran [`alone`] has ended the process, as `thread` panicked.
    #[track_caller]
    pub(crate) fn assert_ended(output: &Output, thread: &str) {
        let log = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{log}");
        let lines: Vec<_> = log.lines().filter(|line| line.contains("the host ends with exit code 1")).collect();
        assert!(matches!(lines[..], [line] if line.contains(&format!("the thread {thread} panicked"))), "{log}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::{bounded, never};

    /// Longer than a test may take.
    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_thread_that_panics_is_restarted_until_it_returns() {
        let (tell, told) = bounded(10);
        let mut runs = 0;
        let body = move || {
            runs += 1;
            tell.send(runs).unwrap();
            assert!(runs == 3, "run {runs}");
        };
        restarting(Builder::new().name("restarted".into()), body).unwrap();
        let runs: Vec<i32> = told.iter().collect();
        assert_eq!(runs, [1, 2, 3]);
    }

    #[test]
    fn a_thread_that_keeps_panicking_is_given_up() {
        let mut runs = 0;
        let body = || {
            runs += 1;
            panic!("run {runs}");
        };
        assert!(!run_again(body, Duration::ZERO));
        assert_eq!(runs, MAX_PANICS);
    }

    #[test]
    fn a_thread_that_keeps_panicking_ends_the_process() {
        if testing::is_alone() {
            restarting(Builder::new().name("heart".into()), || assert!(LONG.is_zero(), "it stops")).unwrap();
            never::<()>().recv_timeout(LONG).ok();
            return;
        }
        testing::assert_ended(&testing::alone("util::threads::tests::a_thread_that_keeps_panicking_ends_the_process"), "heart");
    }

    #[test]
    fn a_vital_thread_gives_what_it_returns() {
        assert_eq!(vital(Builder::new(), || 7).unwrap().join().unwrap(), 7);
    }

    #[test]
    fn the_panic_of_a_vital_thread_ends_the_process() {
        if testing::is_alone() {
            let thread = vital(Builder::new().name("heart".into()), || assert!(LONG.is_zero(), "it stops")).unwrap();
            // The process ends although this one would go on.
            never::<()>().recv_timeout(LONG).ok();
            return drop(thread);
        }
        testing::assert_ended(&testing::alone("util::threads::tests::the_panic_of_a_vital_thread_ends_the_process"), "heart");
    }
}
