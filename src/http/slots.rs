//! Limits the client connections that one plugin occupies: those with a request that waits or is under way, or with an answer that the
//! client still reads.

use crate::lock::LockExt;
use crate::util::log_throttle::LogThrottle;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// The slots of one plugin, one for each client connection.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    taken: Arc<AtomicUsize>,
    refused: Mutex<LogThrottle>,
}

/// An occupied slot, freed when this is dropped.
#[derive(Debug)]
pub(crate) struct Slot(Arc<AtomicUsize>);

/// All slots are taken. Holds the number of refusals since the last log line, if another line is due.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NoSlot(pub(crate) Option<u64>);

impl Slots {
    /// Occupies one of `most` slots.
    ///
    /// # Errors
    /// No slot is free.
    pub(crate) fn take(&self, most: usize) -> Result<Slot, NoSlot> {
        let one_more = |taken: usize| (taken < most).then_some(taken + 1);
        match self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more) {
            Ok(_) => Ok(Slot(Arc::clone(&self.taken))),
            Err(_) => Err(NoSlot(self.refused.locked().hit(Instant::now()))),
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_slots_are_taken_than_there_are() {
        let slots = Slots::default();
        let first = slots.take(2).unwrap();
        let second = slots.take(2).unwrap();
        assert_eq!(slots.take(2).unwrap_err(), NoSlot(Some(0)));
        assert_eq!(slots.take(2).unwrap_err(), NoSlot(None));
        drop(first);
        let third = slots.take(2).unwrap();
        assert!(slots.take(2).is_err());
        drop((second, third));
        assert!(slots.take(1).is_ok());
    }
}
