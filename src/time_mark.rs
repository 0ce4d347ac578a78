//! The high-water mark of time: a moment that has certainly come, handed to plugins so that a clock set back does not make an
//! expired licence good again. Pure: time is passed in.
//!
//! The wall clock is believed once, for the first mark. From then on only time that has passed while the host ran is added,
//! so a clock that is wrong for a while, in either direction, changes nothing.

use std::time::{Duration, Instant};

/// How often the mark goes on: licences are counted in days, and each time is a write to the disk.
const STEP: Duration = Duration::from_secs(3600);

/// 2026-01-01 in milliseconds since 1970-01-01 UTC. A clock that says less was never set: many small machines begin at 1970.
const CLOCK_IS_SET: i64 = 1_767_225_600_000;

/// The mark, and since when the time that passes is to be added to it.
#[derive(Debug)]
pub(crate) struct TimeMark {
    mark: Option<i64>,
    since: Instant,
}

impl TimeMark {
    /// Goes on from the mark of an earlier run, if there is one, in milliseconds since 1970-01-01 UTC.
    pub(crate) fn new(stored: Option<i64>, now: Instant) -> Self {
        Self { mark: stored, since: now }
    }

    /// The mark in milliseconds since 1970-01-01 UTC; none while the clock was never seen set.
    pub(crate) fn get(&self) -> Option<i64> {
        self.mark
    }

    /// Lets the mark go on if that is due. Gives it when it has, to be kept.
    pub(crate) fn advance(&mut self, now: Instant, wall_ms: i64) -> Option<i64> {
        let passed = now.saturating_duration_since(self.since);
        let mark = match self.mark {
            None if wall_ms < CLOCK_IS_SET => return None,
            None => wall_ms,
            Some(_) if passed < STEP => return None,
            Some(mark) => mark.saturating_add(i64::try_from(passed.as_millis()).unwrap_or(i64::MAX)),
        };
        (self.mark, self.since) = (Some(mark), now);
        self.mark
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: i64 = 3_600_000;
    const T: i64 = CLOCK_IS_SET + 1000 * HOUR;

    /// Steps are: milliseconds of running since the start, what the clock shows, the mark that is to be kept then.
    #[test]
    fn only_time_that_passed_moves_the_mark_whatever_the_clock_shows() {
        type Step = (i64, i64, Option<i64>);
        let cases: [(&str, Option<i64>, &[Step]); 7] = [
            ("the clock is right", None, &[(0, T, Some(T)), (HOUR, T + HOUR, Some(T + HOUR))]),
            ("at most hourly", None, &[(0, T, Some(T)), (HOUR - 1, T, None), (HOUR, T, Some(T + HOUR)), (HOUR + 1, T, None)]),
            ("the clock jumps forward", None, &[(0, T, Some(T)), (HOUR, T + 9000 * HOUR, Some(T + HOUR))]),
            ("and back again", Some(T), &[(HOUR, T + 9000 * HOUR, Some(T + HOUR)), (2 * HOUR, T, Some(T + 2 * HOUR))]),
            ("the clock is set back", Some(T), &[(0, T - 500 * HOUR, None), (3 * HOUR, T - 500 * HOUR, Some(T + 3 * HOUR))]),
            (
                "a clock that was never set makes no mark",
                None,
                &[(0, 0, None), (5 * HOUR, T, Some(T)), (6 * HOUR, 0, Some(T + HOUR))],
            ),
            ("the end of all time", Some(i64::MAX), &[(HOUR, T, Some(i64::MAX))]),
        ];
        for (name, stored, steps) in cases {
            let start = Instant::now();
            let mut mark = TimeMark::new(stored, start);
            for (passed, wall, kept) in steps {
                let now = start + Duration::from_millis(passed.unsigned_abs());
                assert_eq!(mark.advance(now, *wall), *kept, "{name}, after {passed} ms");
                if kept.is_some() {
                    assert_eq!(mark.get(), *kept, "{name}");
                }
            }
        }
    }
}
