//! Turns to start a process. Interpreters and their imports take the processor for seconds, so on a small machine plugins that all
//! start together would all be late. As many start at once as there are processors; one that takes long lets the next begin.

use crate::lock::LockExt;
use crate::plugins::plugin::Command;
use crossbeam_channel::Sender;
use std::collections::VecDeque;
use std::num::NonZero;
use std::sync::{Arc, Mutex};
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

/// Time for which a start counts as busy. A longer one probably waits for something.
const BUSY_TIME: Duration = Duration::from_secs(2);

/// Interval at which supervisors that wait for a turn retry, because no event tells them that a start has become late.
pub(crate) const TURN_CHECK: Duration = Duration::from_millis(250);

/// The turns of all plugins.
pub(crate) struct Starts {
    turns: Arc<Mutex<Turns>>,
    at_once: usize,
}

#[derive(Default)]
struct Turns {
    /// Start time of each start under way, by number.
    under_way: Vec<(u64, Instant)>,
    next: u64,
    /// Supervisors that wait, first come first served.
    waiting: VecDeque<Sender<Command>>,
}

/// The right to start a process, released when dropped.
pub(crate) struct Turn {
    turns: Arc<Mutex<Turns>>,
    number: u64,
}

impl Starts {
    /// As many at once as there are processors.
    pub(crate) fn new() -> Self {
        Self { turns: Arc::default(), at_once: available_parallelism().map_or(1, NonZero::get) }
    }

    /// Takes a turn. If none is free, the supervisor with this channel later gets [`Command::Proceed`], upon which it retries.
    pub(crate) fn take(&self, supervisor: &Sender<Command>, now: Instant) -> Option<Turn> {
        let mut turns = self.turns.locked();
        let busy = turns.under_way.iter().filter(|(_, began)| now.saturating_duration_since(*began) < BUSY_TIME).count();
        if busy >= self.at_once {
            if !turns.waiting.iter().any(|waiting| waiting.same_channel(supervisor)) {
                turns.waiting.push_back(supervisor.clone());
            }
            return None;
        }
        let number = turns.next;
        turns.next += 1;
        turns.under_way.push((number, now));
        Some(Turn { turns: Arc::clone(&self.turns), number })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut turns = self.turns.locked();
        turns.under_way.retain(|(number, _)| *number != self.number);
        // One that is gone, or has much to do, leaves it to the next.
        while let Some(next) = turns.waiting.pop_front() {
            if next.try_send(Command::Proceed).is_ok() {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::{Receiver, bounded};

    #[test]
    fn as_many_start_as_there_are_processors_and_those_that_wait_follow_in_their_order() {
        let starts = Starts { turns: Arc::default(), at_once: 2 };
        let channels: Vec<(Sender<Command>, Receiver<Command>)> = (0..5).map(|_| bounded(1)).collect();
        let now = Instant::now();
        let take = |plugin: usize, at| starts.take(&channels[plugin].0, at);
        let is_told = |plugin: usize| matches!(channels[plugin].1.try_recv(), Ok(Command::Proceed));
        let (first, second) = (take(0, now).unwrap(), take(1, now).unwrap());
        // Whoever asks twice waits once.
        assert!([2, 3, 2].iter().all(|plugin| take(*plugin, now).is_none()));
        drop(first);
        assert!(is_told(2) && !is_told(3));
        let third = take(2, now).unwrap();
        drop((second, third));
        assert!(is_told(3) && !is_told(2));
        // Those that take long do not hold up the others.
        let (slow, slower) = (take(0, now).unwrap(), take(1, now).unwrap());
        assert!(take(4, now).is_none());
        let fast = take(4, now + BUSY_TIME).unwrap();
        drop((slow, slower, fast));
        assert!(starts.turns.locked().under_way.is_empty());
    }
}
