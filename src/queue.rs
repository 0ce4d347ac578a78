//! The requests that wait for one plugin: a bounded channel that outlives the plugin's processes.

use crate::exchange::{Failed, Job};
use crate::repeat::{Repeat, more};
use crossbeam_channel::{Receiver, Sender, bounded};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Places in the queue for each connection the plugin may have.
const PLACES_PER_CONNECTION: usize = 64;

/// Most places, so that no plugin holds more than its share of the host's memory and of its clients.
const MAX_PLACES: usize = 1024;

/// The queue of one plugin.
pub(crate) struct Queue {
    /// The plugin's id.
    id: String,
    sender: Sender<Job>,
    receiver: Receiver<Job>,
    expiring: Mutex<()>,
    /// That there was no place.
    full: Mutex<Repeat>,
}

impl Queue {
    /// A queue for a plugin of so many connections.
    pub(crate) fn new(id: &str, concurrency: usize) -> Self {
        let (sender, receiver) = bounded((concurrency * PLACES_PER_CONNECTION).min(MAX_PLACES));
        Self { id: id.to_owned(), sender, receiver, expiring: Mutex::new(()), full: Mutex::default() }
    }

    /// Puts a request in; one for which there is no place is answered so.
    pub(crate) fn push(&self, job: Job) {
        if let Err(refused) = self.sender.try_send(job) {
            refused.into_inner().fail(Failed::Overloaded);
            self.say_full();
        }
    }

    /// Says that it is full, where that is due.
    fn say_full(&self) {
        let came = self.full.lock().unwrap_or_else(PoisonError::into_inner).came(Instant::now());
        if let Some(unsaid) = came {
            log::warn!("the queue of {} is full with {} requests, and others are refused{}", self.id, self.len(), more(unsaid));
        }
    }

    /// Where workers take requests from.
    pub(crate) fn jobs(&self) -> &Receiver<Job> {
        &self.receiver
    }

    /// Hands what waits to another queue, in its order.
    pub(crate) fn move_to(&self, other: &Self) {
        self.receiver.try_iter().for_each(|job| other.push(job));
    }

    /// How many requests wait.
    pub(crate) fn len(&self) -> usize {
        self.receiver.len()
    }

    /// Fails the requests of which the time of arrival is `expired`; the others keep their order.
    pub(crate) fn expire(&self, expired: impl Fn(Instant) -> bool, failed: Failed) {
        // One at a time is enough, and two would mix the order.
        let Ok(_alone) = self.expiring.try_lock() else { return };
        let waiting: Vec<Job> = self.receiver.try_iter().take(self.receiver.len()).collect();
        for job in waiting {
            if expired(job.arrived()) {
                job.fail(failed);
            } else {
                self.push(job);
            }
        }
    }
}
