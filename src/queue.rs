//! The requests that wait for one plugin: a channel of so many places that outlives the plugin's processes.
//!
//! The channel is crossbeam's unbounded one, and the places are counted here: its bounded one holds memory for all of them from the
//! beginning, 24 KiB for every plugin that is idle. Threads that come at the very same moment may each find the last place free, so
//! there may be as many requests more as there are threads that put some in: the dispatcher and now and then another.

use crate::exchange::{Failed, Job};
use crate::repeat::{Repeat, more};
use crossbeam_channel::{Receiver, Sender, unbounded};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

/// Places in the queue for each connection the plugin may have.
const PLACES_PER_CONNECTION: usize = 64;

/// Most places, so that no plugin holds more than its share of the host's memory and of its clients.
const MAX_PLACES: usize = 1024;

/// The queue of one plugin.
pub(crate) struct Queue {
    /// The plugin's id.
    id: String,
    places: usize,
    sender: Sender<Job>,
    receiver: Receiver<Job>,
    expiring: Mutex<()>,
    /// The queue of the plugin's update, once that serves in its place.
    successor: OnceLock<Arc<Queue>>,
    /// That there was no place.
    full: Mutex<Repeat>,
}

impl Queue {
    /// A queue for a plugin of so many connections.
    pub(crate) fn new(id: &str, concurrency: usize) -> Self {
        let places = (concurrency * PLACES_PER_CONNECTION).min(MAX_PLACES);
        let (sender, receiver) = unbounded();
        Self {
            id: id.to_owned(),
            places,
            sender,
            receiver,
            expiring: Mutex::new(()),
            successor: OnceLock::new(),
            full: Mutex::default(),
        }
    }

    /// Puts a request in; one for which there is no place is answered so.
    pub(crate) fn push(&self, job: Job) {
        if let Some(successor) = self.successor.get() {
            return successor.push(job);
        }
        if self.len() >= self.places {
            job.fail(Failed::Overloaded);
            return self.say_full();
        }
        self.put_back(job);
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

    /// Hands what waits, and all that comes from now on, to the queue of an update.
    pub(crate) fn succeed(&self, successor: Arc<Self>) {
        drop(self.successor.set(successor));
        self.hand_over();
    }

    /// Hands what waits to the successor, if there is one: what a thread put in that had not yet seen it.
    pub(crate) fn hand_over(&self) {
        if let Some(successor) = self.successor.get() {
            self.move_to(successor);
        }
    }

    /// Hands what waits to another queue, in its order.
    pub(crate) fn move_to(&self, other: &Self) {
        self.receiver.try_iter().for_each(|job| other.put_back(job));
    }

    /// How many requests wait.
    pub(crate) fn len(&self) -> usize {
        self.receiver.len()
    }

    /// Puts a request in that had been taken out: it has its place already.
    pub(crate) fn put_back(&self, job: Job) {
        // Both ends are held here, so it is taken.
        if let Err(refused) = self.sender.send(job) {
            refused.into_inner().fail(Failed::Overloaded);
        }
    }

    /// Takes out the requests whose time of arrival is `expired`, and gives each to `fail`; the others keep their order.
    pub(crate) fn expire(&self, expired: impl Fn(Instant) -> bool, mut fail: impl FnMut(Job)) {
        // One thread at a time is enough, and two would mix the order.
        let Ok(_alone) = self.expiring.try_lock() else { return };
        let waiting: Vec<Job> = self.receiver.try_iter().take(self.receiver.len()).collect();
        for job in waiting {
            if expired(job.arrived()) { fail(job) } else { self.put_back(job) }
        }
    }

    /// Fails all requests that wait, those included that a thread in [`Queue::expire`] is looking at.
    pub(crate) fn fail_all(&self, failed: Failed) {
        let _alone = self.expiring.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting: Vec<Job> = self.receiver.try_iter().take(self.receiver.len()).collect();
        waiting.into_iter().for_each(|job| job.fail(failed));
    }
}
