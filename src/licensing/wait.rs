//! The wait of a plugin until its licence becomes valid. Pure: time is passed in.

use crate::license::Time;
use std::time::Duration;

/// Longest time until the next check of the clock, which may be set meanwhile.
const CHECK: Duration = Duration::from_secs(60);

/// Longest pause between starts of a plugin that refuses a licence although it is valid by now.
const MAX_PAUSE: Duration = Duration::from_secs(3600);

/// The wait for a licence that the plugin refused as not valid yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LicenseWait {
    begins: Time,
    /// Number of refusals since the licence became valid.
    refusals: u32,
}

impl LicenseWait {
    /// The wait after a refusal at `now` of a licence that `begins` later. `before` is the previous wait, if there was one.
    pub(crate) fn refused(begins: Time, before: Option<Self>, now: Time) -> Self {
        let refusals = before.filter(|before| before.begins == begins).map_or(0, |before| before.refusals);
        Self { begins, refusals: if now < begins { 0 } else { refusals.saturating_add(1) } }
    }

    /// Whether the licence is not valid yet, so that a start is pointless.
    pub(crate) fn is_early(self, now: Time) -> bool {
        now < self.begins
    }

    /// Time until the next check of the clock, or until the next start if the licence is valid by now.
    pub(crate) fn pause(self, now: Time) -> Duration {
        if self.is_early(now) {
            return self.left(now).min(CHECK);
        }
        CHECK.saturating_mul(1 << self.refusals.saturating_sub(1).min(8)).min(MAX_PAUSE)
    }

    /// Time until the expected next start.
    pub(crate) fn left(self, now: Time) -> Duration {
        match u64::try_from(now.seconds_until(self.begins)) {
            Ok(seconds) if seconds > 0 => Duration::from_secs(seconds),
            _ => self.pause(now),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plugin_waits_until_its_licence_begins_and_then_tries_less_and_less_often() {
        let begins: Time = "2027-03-01T00:00:00Z".parse().unwrap();
        let seconds = Duration::from_secs;
        // Seconds from the beginning on, whether that is early, the pause, and the time to the expected start.
        for (at, is_early, pause, left) in [
            (-86_400, true, 60, 86_400),
            (-61, true, 60, 61),
            (-20, true, 20, 20),
            (-1, true, 1, 1),
            (0, false, 60, 60),
            (1, false, 60, 60),
        ] {
            let now = begins.plus_seconds(at);
            let wait = LicenseWait::refused(begins, None, now);
            assert_eq!((wait.is_early(now), wait.pause(now), wait.left(now)), (is_early, seconds(pause), seconds(left)), "{at}");
        }
        let mut wait = None;
        let pauses = [(); 9].map(|()| {
            let refused = LicenseWait::refused(begins, wait, begins);
            wait = Some(refused);
            refused.pause(begins).as_secs()
        });
        assert_eq!(pauses, [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]);
        // Another licence, or a clock that was set back, resets the count.
        let other = LicenseWait::refused(begins.plus_seconds(1), wait, begins.plus_seconds(1));
        assert_eq!(other.pause(begins.plus_seconds(1)), seconds(60));
        assert_eq!(LicenseWait::refused(begins, wait, begins.plus_seconds(-5)).pause(begins.plus_seconds(-5)), seconds(5));
    }
}
