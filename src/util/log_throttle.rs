//! An error that repeats: what of it is worth a line in the log. Time is passed in.

use std::time::{Duration, Instant};

/// Time between two lines about the same trouble: a log that is read later shows how long it lasted, and is not flooded.
const SAY_EVERY: Duration = Duration::from_secs(60);

/// A trouble that may come many times: said when it begins, at most once in [`SAY_EVERY`], and when it is over.
#[derive(Debug, Default)]
pub(crate) struct Repeat {
    said_at: Option<Instant>,
    /// Whether the last line about it was not yet followed by that of its end.
    open: bool,
    unsaid: u64,
}

impl Repeat {
    /// Notes that it came at `now`. Gives, when this is to be said, how often it came unsaid since the last line.
    pub(crate) fn came(&mut self, now: Instant) -> Option<u64> {
        if self.said_at.is_some_and(|said| now.saturating_duration_since(said) < SAY_EVERY) {
            self.unsaid += 1;
            return None;
        }
        self.said_at = Some(now);
        self.open = true;
        Some(std::mem::take(&mut self.unsaid))
    }

    /// Notes that it is over. Gives, when this is to be said, how often it came unsaid since the last line.
    pub(crate) fn over(&mut self) -> Option<u64> {
        std::mem::take(&mut self.open).then(|| std::mem::take(&mut self.unsaid))
    }
}

/// How many lines of a [`Burst`] are said in [`SAY_EVERY`]: as many mistakes as somebody makes by hand who tries things out.
const BURST: u32 = 60;

/// Troubles of one kind that differ, so that each is worth a line: said up to [`BURST`] times in [`SAY_EVERY`], and then counted.
#[derive(Debug, Default)]
pub(crate) struct Burst {
    began: Option<Instant>,
    said: u32,
    unsaid: u64,
}

impl Burst {
    /// Notes one that came at `now`. Gives, when this is to be said, how many came unsaid since the last line.
    pub(crate) fn came(&mut self, now: Instant) -> Option<u64> {
        if self.began.is_none_or(|began| now.saturating_duration_since(began) >= SAY_EVERY) {
            (self.began, self.said) = (Some(now), 0);
        }
        if self.said == BURST {
            self.unsaid += 1;
            return None;
        }
        self.said += 1;
        Some(std::mem::take(&mut self.unsaid))
    }
}

/// What is put behind a line about a trouble for those that came unsaid.
pub(crate) fn more(unsaid: u64) -> String {
    if unsaid == 0 { String::new() } else { format!(" ({unsaid} more since this was last said)") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trouble_is_said_when_it_begins_once_a_minute_and_when_it_is_over() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut repeat = Repeat::default();
        assert_eq!(repeat.over(), None);
        assert_eq!([0, 1, 59, 60, 61].map(|second| repeat.came(at(second))), [Some(0), None, None, Some(2), None]);
        assert_eq!([repeat.over(), repeat.over()], [Some(1), None]);
        // One that comes and goes all the time is two lines a minute all the same.
        assert_eq!([repeat.came(at(62)), repeat.over(), repeat.came(at(119)), repeat.came(at(120))], [None, None, None, Some(2)]);
        assert_eq!(repeat.over(), Some(0));
    }

    #[test]
    fn of_a_burst_the_first_are_said_and_the_rest_counted_until_a_minute_is_over() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut burst = Burst::default();
        assert!((0..BURST).all(|_| burst.came(at(0)) == Some(0)));
        assert_eq!([1, 59, 60, 61].map(|second| burst.came(at(second))), [None, None, Some(2), Some(0)]);
    }
}
