//! How a plugin's end is answered: exit reason and history in, decision out. Pure: time is passed in.

use crate::license::Code;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// First wait before a crashed plugin is started again.
const FIRST_BACKOFF: Duration = Duration::from_millis(500);

/// Longest such wait: a plugin that needs a service which comes back should not lag far behind it.
const MAX_BACKOFF: Duration = Duration::from_secs(60);

/// Share by which each wait is varied either way, so that plugins which fell together do not all rise together.
const JITTER: f64 = 0.2;

/// A plugin that ran this long has recovered, and its next crash is its first again.
const STEADY: Duration = Duration::from_secs(60);

/// This many ends within [`LOOP_WINDOW`] are a crash loop.
const LOOP_EXITS: usize = 5;

/// The time in which [`LOOP_EXITS`] ends are a crash loop.
const LOOP_WINDOW: Duration = Duration::from_secs(300);

/// How often a crash-looping plugin is tried, for ever.
const LOOP_RETRY: Duration = Duration::from_secs(300);

/// How a plugin's process, or its start, came to an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Exit code.
    Code(i32),
    /// Killed by this signal.
    Signal(i32),
    /// Killed by SIGKILL while the kernel killed for want of memory.
    OutOfMemory,
    /// Its file cannot be executed here.
    Unfit,
    /// The file in its program's place is another one than the one that said who it is.
    Changed,
    /// It cannot have its user, or its directories as that user.
    NoUser,
    /// It does not speak this version of the protocol.
    Incompatible,
    /// It has refused its licence, by this code.
    Unlicensed(Code),
    /// There are not enough files, threads or memory for it: no end of its own, so none that counts.
    NoRoom,
    /// It could not be started for want of something that may come back.
    NotStarted,
    /// It was ended by the host because it did not do its part.
    Fault,
}

/// What to do about an end that nobody asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Start again after the wait.
    Retry(Duration),
    /// Start again after the wait; it keeps ending.
    CrashLoop(Duration),
    /// Starting it again would change nothing.
    Refuse,
}

impl Exit {
    /// Whether starting again would change nothing. The codes are those of sysexits.h (64 usage, 77 permission, 78 configuration)
    /// and of a shell (126 not executable, 127 not found).
    fn is_permanent(self) -> bool {
        match self {
            Self::Code(64 | 77 | 78 | 126 | 127) | Self::Unfit | Self::NoUser | Self::Incompatible => true,
            Self::Unlicensed(code) => !code.is_temporary(),
            _ => false,
        }
    }

    /// Whether the plugin says that this passes by itself (75 of sysexits.h): however often it does, it is no crash loop.
    fn is_temporary(self) -> bool {
        match self {
            Self::Code(code) => code == 75,
            Self::Unlicensed(code) => code.is_temporary(),
            _ => false,
        }
    }

    /// What the operator of the plugin `id` can do about it, in a sentence.
    pub(crate) fn advice(self, id: &str) -> String {
        match self {
            Self::Code(64) => "install a build of the plugin that fits this plugrack".into(),
            Self::Code(75) => "nothing, unless it stays so: it waits for something that it needs".into(),
            Self::Code(77) => format!("give it the permission that it misses, then: plugrack start {id}"),
            Self::Code(78) => {
                format!("give it the setting that it misses, plugrack config {id} set KEY VALUE: it is then tried again")
            }
            Self::Code(126 | 127) | Self::Unfit => "put a file there that can be executed: it is then tried again".into(),
            Self::Changed => "wait: the new file is asked who it is, and started".into(),
            Self::NoUser => format!("do what the reason says, then: plugrack start {id}"),
            Self::Incompatible => "install a build of the plugin that speaks the protocol of this plugrack".into(),
            Self::Unlicensed(Code::ClockNotSet) => "set the clock of this machine: it is then tried again by itself".into(),
            Self::Unlicensed(_) => {
                format!(
                    "ask its vendor for a licence for this instance (plugrack instance), then: plugrack license set {id} TOKEN"
                )
            }
            Self::OutOfMemory => "give the machine or the container more memory, or the plugin less to do".into(),
            Self::NoRoom => "raise that limit, or stop another plugin: it is tried again by itself".into(),
            Self::NotStarted => "free or raise what there is too little of: it is tried again by itself".into(),
            Self::Code(_) | Self::Signal(_) | Self::Fault => {
                format!("mend what its last lines (plugrack logs {id}) complain of; plugrack start {id} tries it at once")
            }
        }
    }
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let meaning = |code| match code {
            64 => " (usage)",
            75 => " (temporary failure)",
            77 => " (permission denied)",
            78 => " (licence or configuration refused)",
            126 => " (not executable)",
            127 => " (not found)",
            _ => "",
        };
        match *self {
            Self::Code(code) => write!(f, "exit code {code}{}", meaning(code)),
            Self::Signal(signal) => match signal_hook::low_level::signal_name(signal) {
                Some(name) => write!(f, "killed by signal {signal} ({name})"),
                None => write!(f, "killed by signal {signal}"),
            },
            Self::OutOfMemory => {
                f.write_str("killed for memory: signal 9 (SIGKILL) while the kernel was killing for want of memory")
            }
            Self::Unfit => f.write_str("cannot be executed"),
            Self::Changed => f.write_str("its file was replaced: the new one is asked who it is before it is started"),
            Self::NoUser => f.write_str("cannot have its user"),
            Self::Incompatible => f.write_str("speaks another protocol"),
            Self::Unlicensed(code) => write!(f, "licence refused ({code})"),
            Self::NotStarted => f.write_str("did not start"),
            Self::NoRoom => f.write_str("no room"),
            Self::Fault => f.write_str("ended by the host"),
        }
    }
}

/// The recent ends of one plugin.
#[derive(Debug, Default)]
pub(crate) struct History {
    ends: VecDeque<Instant>,
    failures: u32,
}

impl History {
    /// Notes an end at `now` of a process that ran for `uptime`, and decides. `random` is uniform in 0–1.
    pub(crate) fn ended(&mut self, exit: Exit, uptime: Duration, now: Instant, random: f64) -> Decision {
        if exit.is_permanent() {
            return Decision::Refuse;
        }
        if uptime >= STEADY {
            *self = Self::default();
        }
        self.failures = self.failures.saturating_add(1);
        if !exit.is_temporary() {
            self.ends.push_back(now);
        }
        while self.ends.len() > LOOP_EXITS || self.ends.front().is_some_and(|end| now.duration_since(*end) > LOOP_WINDOW) {
            self.ends.pop_front();
        }
        let vary = |wait: Duration| wait.mul_f64(1.0 - JITTER + 2.0 * JITTER * random);
        if self.ends.len() == LOOP_EXITS {
            return Decision::CrashLoop(vary(LOOP_RETRY));
        }
        let doublings = self.failures.saturating_sub(1).min(16);
        Decision::Retry(vary((FIRST_BACKOFF * 2u32.pow(doublings)).min(MAX_BACKOFF)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIDDLE: f64 = 0.5;
    const SECOND: Duration = Duration::from_secs(1);

    /// What follows the sixth end of each kind, one a second.
    #[test]
    fn each_kind_of_end_has_its_answer() {
        let (refused, looping, retried) = (Decision::Refuse, Decision::CrashLoop(LOOP_RETRY), Decision::Retry(SECOND * 16));
        for (exit, decision) in [
            (Exit::Code(64), refused),
            (Exit::Code(77), refused),
            (Exit::Code(78), refused),
            (Exit::Code(126), refused),
            (Exit::Code(127), refused),
            (Exit::Unfit, refused),
            (Exit::Incompatible, refused),
            (Exit::Unlicensed(Code::Expired), refused),
            (Exit::Unlicensed(Code::ClockNotSet), retried),
            (Exit::Code(75), retried),
            (Exit::Code(0), looping),
            (Exit::Code(1), looping),
            (Exit::Signal(9), looping),
            (Exit::OutOfMemory, looping),
            (Exit::NotStarted, looping),
            (Exit::Fault, looping),
        ] {
            let (mut history, start) = (History::default(), Instant::now());
            let last = (0..6).map(|i| history.ended(exit, SECOND, start + SECOND * i, MIDDLE)).last();
            assert_eq!(last, Some(decision), "{exit}");
        }
    }

    #[test]
    fn what_passes_by_itself_does_not_excuse_crashes() {
        let (mut history, start) = (History::default(), Instant::now());
        let ends = [1, 75, 1, 75, 1, 75, 1, 1].map(Exit::Code);
        let decisions: Vec<_> = ends.map(|exit| history.ended(exit, SECOND, start, MIDDLE)).into();
        assert!(decisions[..7].iter().all(|decision| matches!(decision, Decision::Retry(_))), "{decisions:?}");
        assert_eq!(decisions[7], Decision::CrashLoop(LOOP_RETRY));
    }

    #[test]
    fn waits_double_then_a_loop_is_called_one_and_a_steady_run_forgives() {
        let mut history = History::default();
        let start = Instant::now();
        let waits: Vec<_> = (0..4).map(|i| history.ended(Exit::Code(1), SECOND, start + SECOND * i, MIDDLE)).collect();
        let expected: Vec<_> = [500, 1000, 2000, 4000].map(|ms| Decision::Retry(Duration::from_millis(ms))).into();
        assert_eq!(waits, expected);
        let fifth = history.ended(Exit::Code(1), SECOND, start + SECOND * 4, MIDDLE);
        assert_eq!(fifth, Decision::CrashLoop(LOOP_RETRY));
        let after_a_steady_run = history.ended(Exit::Code(1), STEADY, start + SECOND * 100, MIDDLE);
        assert_eq!(after_a_steady_run, Decision::Retry(FIRST_BACKOFF));
    }

    #[test]
    fn ends_far_apart_are_no_loop_and_the_wait_is_capped() {
        let mut history = History::default();
        let start = Instant::now();
        let mut last = Decision::Refuse;
        for i in 0..40 {
            last = history.ended(Exit::Signal(11), SECOND, start + LOOP_WINDOW * i, MIDDLE);
        }
        assert_eq!(last, Decision::Retry(MAX_BACKOFF));
    }

    #[test]
    fn jitter_stays_within_a_fifth() {
        for (random, ms) in [(0.0, 400), (1.0, 600)] {
            let decision = History::default().ended(Exit::Code(1), SECOND, Instant::now(), random);
            assert_eq!(decision, Decision::Retry(Duration::from_millis(ms)));
        }
    }
}
