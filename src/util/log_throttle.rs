//! Throttles for log lines about errors that repeat. Time is passed in.

use std::time::{Duration, Instant};

/// Least time between two lines about the same error: enough lines to show how long it lasted, and too few to flood the log.
const INTERVAL: Duration = Duration::from_secs(60);

/// Throttles lines about an error that may repeat: one when it begins, at most one per [`INTERVAL`], and one when it has cleared.
#[derive(Debug, Default)]
pub(crate) struct LogThrottle {
    logged_at: Option<Instant>,
    /// Whether the last line still has to be followed by the one that the error has cleared.
    open: bool,
    suppressed: u64,
}

impl LogThrottle {
    /// Records an occurrence at `now`. If it is to be logged, returns the number of suppressed ones since the last line.
    pub(crate) fn hit(&mut self, now: Instant) -> Option<u64> {
        if self.logged_at.is_some_and(|logged| now.saturating_duration_since(logged) < INTERVAL) {
            self.suppressed += 1;
            return None;
        }
        self.logged_at = Some(now);
        self.open = true;
        Some(std::mem::take(&mut self.suppressed))
    }

    /// Records that the error has cleared. If that is to be logged, returns the number of suppressed occurrences since the last line.
    pub(crate) fn clear(&mut self) -> Option<u64> {
        std::mem::take(&mut self.open).then(|| std::mem::take(&mut self.suppressed))
    }
}

/// Most lines of a [`BurstThrottle`] per [`INTERVAL`]: as many mistakes as a person makes by hand while trying things out.
const BURST: u32 = 60;

/// Throttles lines about errors of one kind that differ, so that each is worth a line: up to [`BURST`] per [`INTERVAL`].
#[derive(Debug, Default)]
pub(crate) struct BurstThrottle {
    began: Option<Instant>,
    logged: u32,
    suppressed: u64,
}

impl BurstThrottle {
    /// Records an error at `now`. If it is to be logged, returns the number of suppressed ones since the last line.
    pub(crate) fn hit(&mut self, now: Instant) -> Option<u64> {
        if self.began.is_none_or(|began| now.saturating_duration_since(began) >= INTERVAL) {
            (self.began, self.logged) = (Some(now), 0);
        }
        if self.logged == BURST {
            self.suppressed += 1;
            return None;
        }
        self.logged += 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

/// Renders the number of suppressed lines, to be appended to a line; empty for 0.
pub(crate) fn suppressed_note(suppressed: u64) -> String {
    if suppressed == 0 { String::new() } else { format!(" ({suppressed} more since the last such line)") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_logged_when_it_begins_once_a_minute_and_when_it_has_cleared() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut throttle = LogThrottle::default();
        assert_eq!(throttle.clear(), None);
        assert_eq!([0, 1, 59, 60, 61].map(|second| throttle.hit(at(second))), [Some(0), None, None, Some(2), None]);
        assert_eq!([throttle.clear(), throttle.clear()], [Some(1), None]);
        // One that comes and goes all the time is still two lines a minute.
        assert_eq!(
            [throttle.hit(at(62)), throttle.clear(), throttle.hit(at(119)), throttle.hit(at(120))],
            [None, None, None, Some(2)]
        );
        assert_eq!(throttle.clear(), Some(0));
    }

    #[test]
    fn the_first_lines_of_a_burst_are_logged_and_the_rest_counted_until_a_minute_has_passed() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut throttle = BurstThrottle::default();
        assert!((0..BURST).all(|_| throttle.hit(at(0)) == Some(0)));
        assert_eq!([1, 59, 60, 61].map(|second| throttle.hit(at(second))), [None, None, Some(2), Some(0)]);
    }
}
