//! How a plugin waits for its licence to begin. Pure: time is passed in.

use crate::license::Time;
use std::time::Duration;

/// Longest time to the next look at the clock: it may be set meanwhile.
const CHECK: Duration = Duration::from_secs(60);

/// Longest pause before a plugin is started again that still refuses a licence that has begun.
const MAX_PAUSE: Duration = Duration::from_secs(3600);

/// A plugin's wait for the licence that it has refused as not valid yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LicenseWait {
    begins: Time,
    /// How often the plugin has refused it since it has begun.
    refusals: u32,
}

impl LicenseWait {
    /// The wait after a refusal at a time of the licence that `begins` then. `before` is the wait until now, if there was one.
    pub(crate) fn refused(begins: Time, before: Option<Self>, now: Time) -> Self {
        let refusals = before.filter(|before| before.begins == begins).map_or(0, |before| before.refusals);
        Self { begins, refusals: if now < begins { 0 } else { refusals.saturating_add(1) } }
    }

    /// Whether it is too early to start the plugin.
    pub(crate) fn is_early(self, now: Time) -> bool {
        now < self.begins
    }

    /// Time to the next look at the clock, or to the next start where the licence has begun.
    pub(crate) fn pause(self, now: Time) -> Duration {
        if self.is_early(now) {
            return self.left(now).min(CHECK);
        }
        CHECK.saturating_mul(1 << self.refusals.saturating_sub(1).min(8)).min(MAX_PAUSE)
    }

    /// Time to the expected next start.
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
