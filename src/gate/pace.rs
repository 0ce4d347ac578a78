//! How fast the other side of a connection goes on while it is waited for. Time is passed in.

use std::time::Duration;

/// The pace of bytes that come, or are taken. Only time in which the other side was waited for counts.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Pace {
    bytes: u64,
    /// Time waited since the last byte.
    stalled: Duration,
    /// Time waited in all.
    waited: Duration,
}

impl Pace {
    /// Notes bytes.
    pub(crate) fn progress(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
        self.stalled = Duration::ZERO;
    }

    /// Notes time in which the other side was waited for.
    pub(crate) fn wait(&mut self, time: Duration) {
        self.stalled += time;
        self.waited += time;
    }

    /// Whether it has stood still for as long as `patience`, or was below `rate` bytes a second on average beyond that time.
    pub(crate) fn is_too_slow(&self, patience: Duration, rate: u64) -> bool {
        let due = self.waited.saturating_sub(patience).as_millis() * u128::from(rate) / 1000;
        self.stalled >= patience || u128::from(self.bytes) < due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn after(steps: &[(u64, usize)]) -> Pace {
        let mut pace = Pace::default();
        for (seconds, bytes) in steps {
            pace.wait(Duration::from_secs(*seconds));
            if *bytes > 0 {
                pace.progress(*bytes);
            }
        }
        pace
    }

    #[test]
    fn who_stands_still_is_too_slow() {
        assert!(!after(&[(19, 0)]).is_too_slow(PATIENCE, 0));
        assert!(after(&[(20, 0)]).is_too_slow(PATIENCE, 0));
        assert!(!after(&[(19, 1), (19, 0)]).is_too_slow(PATIENCE, 0));
        assert!(after(&[(19, 1), (20, 0)]).is_too_slow(PATIENCE, 0));
    }

    #[test]
    fn who_drips_is_too_slow() {
        // A byte a second against ten: what is due is counted from the end of the patience on.
        let drip = |seconds: usize| after(&vec![(1, 1); seconds]);
        assert!(!drip(22).is_too_slow(PATIENCE, 10));
        assert!(drip(23).is_too_slow(PATIENCE, 10));
        assert!(!after(&[(1, 10); 1000]).is_too_slow(PATIENCE, 10));
        // A burst at the beginning counts for later.
        assert!(!after(&[(1, 300), (19, 1), (19, 1), (11, 1)]).is_too_slow(PATIENCE, 10));
        assert!(after(&[(1, 300), (19, 1), (19, 1), (12, 1)]).is_too_slow(PATIENCE, 10));
    }
}
