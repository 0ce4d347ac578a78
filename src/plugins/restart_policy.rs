//! The restart policy: exit reason and history in, decision out. Pure: time is passed in.
//!
//! A failed start and a crash while serving are different faults. The first means a broken build or a missing dependency: an immediate
//! retry changes nothing, so the backoff doubles up to a minute, and five failures in a row are a crash loop. The second may be caused by
//! one bad request among good ones: the plugin is back within a second, and the backoff grows to 5 s at most.

use crate::process::exit::Exit;
use std::time::Duration;

/// First backoff before a plugin is started again.
const FIRST_BACKOFF: Duration = Duration::from_millis(500);

/// Longest backoff after a failed start: a plugin should start soon after a service that it needs is back.
const MAX_START_BACKOFF: Duration = Duration::from_secs(60);

/// Longest backoff after the end of a process that had served. It limits the cost of restarts to one start in 5 s, and the outage that
/// requests which kill the process can cause.
const MAX_SERVED_BACKOFF: Duration = Duration::from_secs(5);

/// Jitter of each backoff, as a fraction in either direction, so that plugins that crashed together do not all restart together.
const JITTER: f64 = 0.2;

/// A ready process that ran this long counts as a good start, even without a request. Such ends are not in quick succession, so they
/// reset the backoff.
const STEADY: Duration = Duration::from_secs(10);

/// Number of ends within [`STEADY`] of the start that are each followed by [`FIRST_BACKOFF`], before the backoff doubles: a few bad
/// requests cost only the restarts.
const FREE_ENDS: u32 = 3;

/// This many failed starts without a good one between them are a crash loop.
const LOOP_STARTS: u32 = 5;

/// Interval at which a crash-looping plugin is started, without limit.
const LOOP_RETRY: Duration = Duration::from_secs(300);

/// What to do after an unexpected end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Start again after the backoff.
    Retry(Duration),
    /// Start again after the pause; the plugin is in a crash loop.
    CrashLoop(Duration),
    /// Do not start it again: that would change nothing.
    Refuse,
}

/// How far a process had come when it ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Run {
    /// Time from start to end.
    pub(crate) uptime: Duration,
    /// Whether the process had answered `init` with `ready`.
    pub(crate) ready: bool,
    /// What it served.
    pub(crate) work: Work,
}

/// What a process served until it ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Work {
    /// It never got a request.
    #[default]
    None,
    /// It got requests and answered none.
    Asked,
    /// It answered at least one request.
    Served,
}

impl Run {
    /// Whether this was a good start.
    fn is_good(self) -> bool {
        self.ready && (self.work == Work::Served || self.uptime >= STEADY)
    }

    /// Whether the process ended during its first request, which says nothing about its start.
    fn fell_when_asked(self) -> bool {
        self.ready && self.work == Work::Asked
    }
}

/// The recent history of one plugin.
#[derive(Debug, Default)]
pub(crate) struct History {
    /// Failed starts since the last good one, without temporary failures; [`LOOP_STARTS`] of them are a crash loop.
    failed_starts: u32,
    /// Failed starts since the last good one, temporary failures included.
    start_waits: u32,
    /// Consecutive ends of processes that served, each within [`STEADY`] of its start.
    quick_ends: u32,
}

impl History {
    /// Records the end of a process, or a failed start, and decides what to do. `random` is uniform in 0–1.
    pub(crate) fn ended(&mut self, exit: Exit, run: Run, random: f64) -> Decision {
        let (good, asked) = (run.is_good(), run.fell_when_asked());
        // A request may have caused the exit code of a process that served. If the code is meant, the next start ends with it too.
        if exit.is_permanent() && !good && !asked {
            return Decision::Refuse;
        }
        let vary = |wait: Duration| wait.mul_f64(1.0 - JITTER + 2.0 * JITTER * random);
        let doubled = |times: u32, most: Duration| vary((FIRST_BACKOFF * 2u32.pow(times.min(16))).min(most)).min(most);
        if good {
            (self.failed_starts, self.start_waits) = (0, 0);
        }
        if good || asked {
            self.quick_ends = if run.uptime >= STEADY { 1 } else { self.quick_ends.saturating_add(1) };
        } else {
            self.start_waits = self.start_waits.saturating_add(1);
            self.failed_starts = self.failed_starts.saturating_add(u32::from(!exit.is_temporary()));
        }
        if self.failed_starts >= LOOP_STARTS {
            return Decision::CrashLoop(vary(LOOP_RETRY));
        }
        Decision::Retry(match good || asked {
            true => doubled(self.quick_ends.saturating_sub(FREE_ENDS), MAX_SERVED_BACKOFF),
            false => doubled(self.start_waits - 1, MAX_START_BACKOFF),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::license::Code;

    const MIDDLE: f64 = 0.5;
    const SHORT: Duration = Duration::from_secs(1);
    const REFUSE: Decision = Decision::Refuse;
    const LOOP: Decision = Decision::CrashLoop(LOOP_RETRY);

    const FAILED: Run = Run { uptime: SHORT, ready: false, work: Work::None };
    const HUNG: Run = Run { uptime: Duration::from_secs(60), ready: false, work: Work::None };
    const IDLE_SHORT: Run = Run { uptime: SHORT, ready: true, work: Work::None };
    const IDLE_LONG: Run = Run { uptime: STEADY, ready: true, work: Work::None };
    const ASKED: Run = Run { uptime: SHORT, ready: true, work: Work::Asked };
    const ASKED_LONG: Run = Run { uptime: STEADY, ready: true, work: Work::Asked };
    const SERVED: Run = Run { uptime: SHORT, ready: true, work: Work::Served };
    const SERVED_LONG: Run = Run { uptime: STEADY, ready: true, work: Work::Served };

    fn retry(ms: u64) -> Decision {
        Decision::Retry(Duration::from_millis(ms))
    }

    /// What follows each of these ends, one after the other.
    fn decisions(ends: &[(Exit, Run)]) -> Vec<Decision> {
        let mut history = History::default();
        ends.iter().map(|(exit, run)| history.ended(*exit, *run, MIDDLE)).collect()
    }

    fn of_each(runs: &[Run]) -> Vec<Decision> {
        decisions(&runs.iter().map(|run| (Exit::Code(1), *run)).collect::<Vec<_>>())
    }

    /// What follows the first and the eighth of eight equal ends in a row.
    #[test]
    fn each_kind_of_end_has_its_answer() {
        let exits = [
            // exit, a failed start: first and eighth, a process that served: first and eighth
            (Exit::Code(64), REFUSE, REFUSE),
            (Exit::Code(77), REFUSE, REFUSE),
            (Exit::Code(78), REFUSE, REFUSE),
            (Exit::Code(126), REFUSE, REFUSE),
            (Exit::Code(127), REFUSE, REFUSE),
            (Exit::Unfit, REFUSE, REFUSE),
            (Exit::NoUser, REFUSE, REFUSE),
            (Exit::Incompatible, REFUSE, REFUSE),
            (Exit::Unlicensed(Code::Expired), REFUSE, REFUSE),
            (Exit::Unlicensed(Code::ClockNotSet), retry(500), retry(60_000)),
            (Exit::Code(75), retry(500), retry(60_000)),
            (Exit::Code(0), retry(500), LOOP),
            (Exit::Code(1), retry(500), LOOP),
            (Exit::Signal(9), retry(500), LOOP),
            (Exit::Signal(11), retry(500), LOOP),
            (Exit::OutOfMemory, retry(500), LOOP),
            (Exit::NotStarted, retry(500), LOOP),
            (Exit::Fault, retry(500), LOOP),
        ];
        for (exit, first, eighth) in exits {
            for run in [FAILED, HUNG, IDLE_SHORT] {
                let all = decisions(&[(exit, run); 8]);
                assert_eq!((all[0], all[7]), (first, eighth), "{exit}: {run:?}");
            }
            for run in [SERVED, ASKED] {
                let all = decisions(&[(exit, run); 8]);
                assert_eq!((all[0], all[7]), (retry(500), retry(5000)), "{exit}: {run:?}");
            }
            for run in [SERVED_LONG, ASKED_LONG, IDLE_LONG] {
                assert_eq!(decisions(&[(exit, run); 8]), [retry(500); 8], "{exit}: {run:?}");
            }
        }
    }

    #[test]
    fn the_wait_after_failed_starts_doubles_until_they_are_a_loop_that_lasts() {
        let mut expected = [500, 1000, 2000, 4000].map(retry).to_vec();
        expected.resize(40, LOOP);
        assert_eq!(of_each(&[FAILED; 40]), expected);
        assert_eq!(of_each(&[IDLE_SHORT; 40]), expected);
        assert_eq!(of_each(&[HUNG; 40]), expected, "a start that takes long to fail is one that fails");
    }

    #[test]
    fn the_wait_after_processes_that_served_grows_to_five_seconds_and_is_never_a_loop() {
        let mut expected = [500, 500, 500, 1000, 2000, 4000].map(retry).to_vec();
        expected.resize(1000, retry(5000));
        assert_eq!(of_each(&[SERVED; 1000]), expected);
        let around_a_long_run = of_each(&[SERVED, SERVED, SERVED, SERVED, SERVED_LONG, SERVED, SERVED, SERVED]);
        assert_eq!(around_a_long_run[3..], [1000, 500, 500, 500, 1000].map(retry));
    }

    #[test]
    fn a_good_start_ends_a_loop_and_nothing_else_does() {
        let looping = [FAILED; 5];
        for (run, then) in [
            (FAILED, [LOOP, LOOP]),
            (IDLE_SHORT, [LOOP, LOOP]),
            (ASKED, [LOOP, LOOP]),
            (SERVED, [retry(500), retry(500)]),
            (IDLE_LONG, [retry(500), retry(500)]),
        ] {
            let all = of_each(&[&looping[..], &[run, FAILED]].concat());
            assert_eq!(all[5..], then, "{run:?}");
        }
        let temporary = [&[(Exit::Code(1), FAILED); 5][..], &[(Exit::Code(75), FAILED)]].concat();
        assert_eq!(decisions(&temporary)[5], LOOP);
    }

    #[test]
    fn an_end_in_the_first_request_neither_makes_a_loop_nor_excuses_failed_starts() {
        let all = of_each(&[FAILED, ASKED, FAILED, ASKED, FAILED, ASKED, FAILED, ASKED, FAILED]);
        assert!(all[..8].iter().all(|decision| matches!(decision, Decision::Retry(_))), "{all:?}");
        assert_eq!(all[8], LOOP);
    }

    #[test]
    fn a_temporary_failure_neither_makes_a_loop_nor_excuses_failed_starts() {
        let ends = [1, 75, 1, 75, 1, 75, 1, 1].map(|code| (Exit::Code(code), FAILED));
        let all = decisions(&ends);
        assert!(all[..7].iter().all(|decision| matches!(decision, Decision::Retry(_))), "{all:?}");
        assert_eq!(all[7], LOOP);
    }

    #[test]
    fn jitter_stays_within_a_fifth_and_below_the_longest_wait() {
        for (random, ms) in [(0.0, 400), (1.0, 600)] {
            for run in [FAILED, SERVED] {
                assert_eq!(History::default().ended(Exit::Code(1), run, random), retry(ms));
            }
        }
        let mut history = History::default();
        let last = (0..9).map(|_| history.ended(Exit::Code(1), SERVED, 1.0)).last();
        assert_eq!(last, Some(retry(5000)));
    }
}
