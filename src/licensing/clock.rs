//! The high-water mark of time: a moment that has certainly passed. Plugins get it, so that setting the clock back does not revive an
//! expired licence. Pure: time is passed in.
//!
//! The wall clock sets only the first mark. After that the host adds the time that it has run, measured by the monotonic clock. So a
//! clock that is wrong for a while, in either direction, changes nothing.

use crate::util::utc;
use serde::Serialize;
use std::time::{Duration, Instant};

/// Interval at which the mark advances, which is what a kill can lose. Each advance is a write to the disk.
const STEP: Duration = Duration::from_secs(300);

/// 2026-01-01 in milliseconds since 1970-01-01 UTC. An earlier clock was never set: many small machines start in 1970.
const CLOCK_IS_SET: i64 = 1_767_225_600_000;

/// Why the mark cannot be reset.
pub(crate) const CLOCK_NOT_SET: &str = "the system clock shows a time before 2026, so it was never set: set it first";

/// The readings of the clocks by which licences are judged, in milliseconds since 1970-01-01 UTC; in JSON, RFC 3339.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct ClockReadings {
    /// The system clock.
    #[serde(serialize_with = "utc::serialize")]
    system: i64,
    /// The high-water mark; none while the clock was never set.
    #[serde(serialize_with = "utc::serialize_some")]
    pub(crate) mark: Option<i64>,
    /// The later of the two, by which licences are judged.
    #[serde(serialize_with = "utc::serialize")]
    now: i64,
}

impl ClockReadings {
    /// Combines the system clock and the mark.
    pub(crate) fn new(system: i64, mark: Option<i64>) -> Self {
        Self { system, mark, now: system.max(mark.unwrap_or(system)) }
    }
}

/// The licence clock: the high-water mark, and the instant up to which elapsed time was added to it. It never goes backwards.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LicenseClock {
    mark: Option<i64>,
    since: Instant,
}

impl LicenseClock {
    /// Continues from the stored mark, if there is one, in milliseconds since 1970-01-01 UTC.
    pub(crate) fn new(stored: Option<i64>, now: Instant) -> Self {
        Self { mark: stored, since: now }
    }

    /// The mark in milliseconds since 1970-01-01 UTC; none while the clock was never seen set.
    pub(crate) fn get(&self) -> Option<i64> {
        self.mark
    }

    /// Advances the mark if that is due. Returns the new mark, to be stored.
    pub(crate) fn advance(&mut self, now: Instant, wall_ms: i64) -> Option<i64> {
        let due = self.mark.is_none() || now.saturating_duration_since(self.since) >= STEP;
        if due { self.advance_now(now, wall_ms) } else { None }
    }

    /// Sets the mark to the wall clock. Returns the new mark, to be stored; none, without a change, if the clock was never set.
    pub(crate) fn reset(&mut self, now: Instant, wall_ms: i64) -> Option<i64> {
        let mark = (wall_ms >= CLOCK_IS_SET).then_some(wall_ms)?;
        (self.mark, self.since) = (Some(mark), now);
        self.mark
    }

    /// Advances the mark by the elapsed time, however short: for the host's exit. Returns the new mark, to be stored.
    pub(crate) fn advance_now(&mut self, now: Instant, wall_ms: i64) -> Option<i64> {
        let passed = now.saturating_duration_since(self.since);
        let mark = match self.mark {
            None if wall_ms < CLOCK_IS_SET => return None,
            None => wall_ms,
            Some(mark) => mark.saturating_add(i64::try_from(passed.as_millis()).unwrap_or(i64::MAX)),
        };
        (self.mark, self.since) = (Some(mark), now);
        self.mark
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: i64 = 300_000;
    const T: i64 = CLOCK_IS_SET + 1000 * STEP;

    /// Steps are: milliseconds of running since the start, what the clock shows, the mark that is to be kept then.
    #[test]
    fn only_time_that_passed_moves_the_mark_whatever_the_clock_shows() {
        type Step = (i64, i64, Option<i64>);
        let cases: [(&str, Option<i64>, &[Step]); 7] = [
            ("the clock is right", None, &[(0, T, Some(T)), (STEP, T + STEP, Some(T + STEP))]),
            (
                "at most every few minutes",
                None,
                &[(0, T, Some(T)), (STEP - 1, T, None), (STEP, T, Some(T + STEP)), (STEP + 1, T, None)],
            ),
            ("the clock jumps forward", None, &[(0, T, Some(T)), (STEP, T + 9000 * STEP, Some(T + STEP))]),
            ("and back again", Some(T), &[(STEP, T + 9000 * STEP, Some(T + STEP)), (2 * STEP, T, Some(T + 2 * STEP))]),
            ("the clock is set back", Some(T), &[(0, T - 500 * STEP, None), (3 * STEP, T - 500 * STEP, Some(T + 3 * STEP))]),
            (
                "a clock that was never set makes no mark",
                None,
                &[(0, 0, None), (5 * STEP, T, Some(T)), (6 * STEP, 0, Some(T + STEP))],
            ),
            ("the end of all time", Some(i64::MAX), &[(STEP, T, Some(i64::MAX))]),
        ];
        for (name, stored, steps) in cases {
            let start = Instant::now();
            let mut clock = LicenseClock::new(stored, start);
            for (passed, wall, kept) in steps {
                let now = start + Duration::from_millis(passed.unsigned_abs());
                assert_eq!(clock.advance(now, *wall), *kept, "{name}, after {passed} ms");
                if kept.is_some() {
                    assert_eq!(clock.get(), *kept, "{name}");
                }
            }
        }
    }

    #[test]
    fn at_the_end_what_has_passed_is_added_however_little() {
        let start = Instant::now();
        let mut clock = LicenseClock::new(Some(T), start);
        assert_eq!(clock.advance_now(start + Duration::from_secs(7), T - STEP), Some(T + 7000));
        assert_eq!(clock.advance_now(start + Duration::from_secs(8), T + STEP), Some(T + 8000));
        assert_eq!(LicenseClock::new(None, start).advance_now(start, 0), None);
    }

    #[test]
    fn a_reset_believes_the_clock_once_more_if_it_is_set() {
        let start = Instant::now();
        let mut clock = LicenseClock::new(Some(T + 9000 * STEP), start);
        assert_eq!((clock.reset(start, CLOCK_IS_SET - 1), clock.get()), (None, Some(T + 9000 * STEP)));
        let now = start + Duration::from_secs(60);
        assert_eq!((clock.reset(now, T), clock.get()), (Some(T), Some(T)));
        assert_eq!(clock.advance_now(now + Duration::from_secs(1), 0), Some(T + 1000), "it goes on from there");
    }
}
