//! Rates of slow clients, and how long idle connections are kept. Pure: the caller passes the time in.

use std::time::Duration;

/// Time an idle connection is kept once half of all connections, or half of those of its address, are taken: longer than the pause between
/// two requests of one visitor, and short enough to free connections.
const PRESSED_IDLE: Duration = Duration::from_secs(15);

/// Time an idle connection is kept once more than three quarters of all connections are taken: one round trip of a client that sends its
/// next request at once.
const CROWDED_IDLE: Duration = Duration::from_millis(500);

/// The number of connections and its limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Filling {
    pub(crate) taken: u64,
    pub(crate) most: u64,
}

impl Filling {
    fn is_half(self) -> bool {
        self.taken * 2 >= self.most
    }

    fn is_above_three_quarters(self) -> bool {
        self.taken * 4 > self.most * 3
    }
}

/// How long an idle connection is kept, at most `longest`, by the load of all connections and of those of its address, if they are counted.
pub(crate) fn idle_time(longest: Duration, all: Filling, address: Option<Filling>) -> Duration {
    if all.is_above_three_quarters() {
        longest.min(CROWDED_IDLE)
    } else if all.is_half() || address.is_some_and(Filling::is_half) {
        longest.min(PRESSED_IDLE)
    } else {
        longest
    }
}

/// The rate of bytes received or sent. Only time in which the host waits for the peer counts.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Rate {
    bytes: u64,
    /// Time waited since the last byte.
    stalled: Duration,
    /// Total time waited.
    waited: Duration,
}

impl Rate {
    /// Counts bytes.
    pub(crate) fn progress(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
        self.stalled = Duration::ZERO;
    }

    /// Adds time in which the host waited for the peer.
    pub(crate) fn wait(&mut self, time: Duration) {
        self.stalled += time;
        self.waited += time;
    }

    /// Whether nothing has moved for `patience`, or the average is below `rate` bytes per second, not counting the first `patience`.
    pub(crate) fn is_too_slow(&self, patience: Duration, rate: u64) -> bool {
        self.has_stalled(patience) || self.is_below(rate, patience)
    }

    fn has_stalled(&self, patience: Duration) -> bool {
        self.stalled >= patience
    }

    fn is_below(&self, rate: u64, patience: Duration) -> bool {
        let due = self.waited.saturating_sub(patience).as_millis() * u128::from(rate) / 1000;
        u128::from(self.bytes) < due
    }
}

/// How a client reads its answer, judged by what it has read and not by what the kernel's buffers have taken.
///
/// Finding the number of unread bytes takes system calls. The caller samples it at intervals, and only while it waits for the client.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct ReadRate {
    rate: Rate,
    /// Time waited since the last sample.
    since_sample: Duration,
    /// Bytes passed to the kernel before this answer.
    before: u64,
    /// Bytes that the client had not read at the last sample. Some may belong to an earlier answer.
    unread: u64,
    /// Largest number of bytes of this answer that a sample found read; negative while bytes of an earlier one are unread.
    read: Option<i64>,
    /// Time for which the client may still pause.
    pause: Duration,
}

/// Limits for a client that reads an answer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ReadLimits {
    /// Time in which it must read something.
    pub(crate) patience: Duration,
    /// Least bytes a second on average, beyond that time.
    pub(crate) rate: u64,
    /// Longest pause that a client earns by reading faster; zero for none.
    pub(crate) longest_pause: Duration,
}

impl ReadRate {
    /// A new answer on a connection for which the kernel has been passed `before` bytes.
    pub(crate) fn new(before: u64) -> Self {
        Self { before, ..Self::default() }
    }

    /// Adds time in which the host waited for the client.
    pub(crate) fn wait(&mut self, time: Duration) {
        self.rate.wait(time);
        self.since_sample += time;
        self.pause = self.pause.saturating_sub(time);
    }

    /// Whether the host has waited for `interval` since the last sample.
    pub(crate) fn is_due(&self, interval: Duration) -> bool {
        self.since_sample >= interval
    }

    /// Adds a sample: the bytes passed to the kernel on this connection, and how many of them are unread, if that is known. If it never is,
    /// what the kernel takes counts as read.
    pub(crate) fn sample(&mut self, given: u64, unread: Option<u64>, terms: &ReadLimits) {
        self.since_sample = Duration::ZERO;
        self.unread = unread.unwrap_or(self.unread);
        let given = given.saturating_sub(self.before);
        let read = given.cast_signed().saturating_sub(self.unread.cast_signed());
        let earlier = self.read.unwrap_or(0);
        // A client may first have to read bytes of an earlier answer. Then only what it reads after the first sample counts.
        self.read = Some(if self.read.is_none() { read } else { read.max(earlier) });
        if let Ok(bytes @ 1..) = usize::try_from(read - earlier) {
            self.rate.progress(bytes);
            let earned = match terms.rate {
                0 => terms.longest_pause,
                rate => Duration::from_secs(bytes as u64 / rate),
            };
            self.pause = self.pause.saturating_add(earned).min(terms.longest_pause);
        }
    }

    /// Whether the client has read nothing for too long, or too little.
    pub(crate) fn is_too_slow(&self, terms: &ReadLimits) -> bool {
        let has_stalled = self.rate.has_stalled(terms.patience) && self.pause.is_zero();
        has_stalled || self.rate.is_below(terms.rate, terms.patience)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_connection_is_kept_for_as_long_as_there_is_room() {
        const LONGEST: Duration = Duration::from_secs(75);
        let filling = |(taken, most)| Filling { taken, most };
        for (all, address, expected) in [
            ((1, 512), Some((1, 128)), LONGEST),
            ((255, 512), Some((63, 128)), LONGEST),
            ((255, 512), Some((64, 128)), PRESSED_IDLE),
            ((255, 512), Some((128, 128)), PRESSED_IDLE),
            ((255, 512), None, LONGEST),
            ((256, 512), Some((1, 128)), PRESSED_IDLE),
            ((256, 512), None, PRESSED_IDLE),
            ((384, 512), None, PRESSED_IDLE),
            ((385, 512), None, CROWDED_IDLE),
            ((385, 512), Some((1, 128)), CROWDED_IDLE),
            ((512, 512), Some((128, 128)), CROWDED_IDLE),
            ((1, 1), None, CROWDED_IDLE),
            ((1, 65_536), Some((1, 1)), PRESSED_IDLE),
        ] {
            assert_eq!(idle_time(LONGEST, filling(all), address.map(filling)), expected, "{all:?} {address:?}");
        }
        // A shorter --idle-timeout counts everywhere.
        for (taken, longest) in [(1, 1_000), (256, 1_000), (385, 100)] {
            let longest = Duration::from_millis(longest);
            assert_eq!(idle_time(longest, filling((taken, 512)), Some(filling((128, 128)))), longest, "{taken}");
        }
    }

    const PATIENCE: Duration = Duration::from_secs(20);

    fn after(steps: &[(u64, usize)]) -> Rate {
        let mut rate = Rate::default();
        for (seconds, bytes) in steps {
            rate.wait(Duration::from_secs(*seconds));
            if *bytes > 0 {
                rate.progress(*bytes);
            }
        }
        rate
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

    const TERMS: ReadLimits = ReadLimits { patience: PATIENCE, rate: 10, longest_pause: Duration::ZERO };
    const PROXY: ReadLimits = ReadLimits { longest_pause: Duration::from_secs(100), ..TERMS };

    /// Each step is seconds waited, and what is then given and unread. Says after how many seconds the client was too slow.
    fn cut_at(terms: &ReadLimits, steps: impl IntoIterator<Item = (u64, u64, Option<u64>)>) -> Option<u64> {
        let (mut uptake, mut now) = (ReadRate::new(5_000), 0);
        for (seconds, given, unread) in steps {
            for _ in 0..seconds {
                uptake.wait(Duration::from_secs(1));
                now += 1;
                if uptake.is_too_slow(terms) {
                    return Some(now);
                }
            }
            uptake.sample(5_000 + given, unread, terms);
        }
        None
    }

    #[test]
    fn a_client_is_judged_by_what_it_reads_and_not_by_what_the_kernel_takes() {
        // The kernel takes nothing more for minutes, while the client reads 20 bytes a second.
        assert_eq!(cut_at(&TERMS, (0..300).map(|second| (1, 100_000, Some(90_000 - 20 * second)))), None);
        // It took much at once and is unread: neither progress nor a rate.
        assert_eq!(cut_at(&TERMS, (0..300).map(|_| (1, 100_000, Some(100_000)))), Some(20));
        // The client reads 5 bytes a second.
        assert_eq!(cut_at(&TERMS, (1..300).map(|second| (1, 100_000, Some(100_000 - 5 * second)))), Some(40));
        // It stops after a minute.
        assert_eq!(cut_at(&TERMS, (0..300).map(|second| (1, 100_000, Some(90_000 - 200 * second.min(60))))), Some(81));
    }

    #[test]
    fn bytes_of_an_earlier_answer_are_read_first() {
        // 3,000 bytes of it are unread when this one begins.
        assert_eq!(cut_at(&TERMS, (0..200).map(|second| (1, 1_000, Some(4_000 - 20 * second)))), None);
        assert_eq!(cut_at(&TERMS, (0..200).map(|_| (1, 1_000, Some(4_000)))), Some(20));
    }

    #[test]
    fn where_the_kernel_tells_nothing_what_it_takes_counts() {
        assert_eq!(cut_at(&TERMS, (0..300).map(|second| (1, 20 * second, None))), None);
        assert_eq!(cut_at(&TERMS, (0..300).map(|second| (1, 1_000 * second.min(60), None))), Some(81));
        // It told once: what was unread then counts until it tells again.
        let steps = [(1, 1_000, Some(900)), (10, 1_000, None), (10, 1_000, Some(900))];
        assert_eq!(cut_at(&TERMS, steps), Some(21));
    }

    #[test]
    fn a_proxy_may_pause_for_as_long_as_what_it_read_lasts() {
        let burst = |bytes: u64| (0..300).map(move |second| (1, 2_000, Some(if second == 0 { 2_000 } else { 2_000 - bytes })));
        assert_eq!(cut_at(&PROXY, burst(0)), Some(20));
        assert_eq!(cut_at(&PROXY, burst(100)), Some(22));
        assert_eq!(cut_at(&PROXY, burst(500)), Some(52));
        assert_eq!(cut_at(&PROXY, burst(2_000)), Some(102));
        assert_eq!(cut_at(&TERMS, burst(2_000)), Some(22));
        // A client behind it that takes 11 bytes a second, in steps of a minute and a half.
        let steps = (0..50).map(|step| (if step == 0 { 1 } else { 90 }, 60_000, Some(59_000 - 990 * step)));
        assert_eq!(cut_at(&PROXY, steps), None);
    }
}
