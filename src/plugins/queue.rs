//! The queue of one plugin: a channel with a limit, which outlives the plugin's processes.
//!
//! The limit is the queue's own: a bounded channel of crossbeam reserves memory for all its places, 24 KiB for each idle plugin.
//!
//! Requests that were taken and re-queued, because a connection was lost or they have not expired yet, are kept in front of the channel by
//! time of arrival. So the oldest request is always taken first.
//!
//! Workers wait on a list of the queue's own. The last to begin waiting is woken first: its memory and its connection are the freshest, and
//! surplus workers stay idle. The channel would wake them in turn, and under its lock, for which the woken worker would wait at once.

use crate::http::HttpError;
use crate::lock::LockExt;
use crate::plugins::job::Job;
use crate::util::log_throttle::{LogThrottle, suppressed_note};
use crossbeam_channel::{Receiver, SendError, Sender, unbounded};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::thread::{self, Thread};
use std::time::Instant;

/// Capacity of the queue for each connection that the plugin may have.
const CAPACITY_PER_CONNECTION: usize = 64;

/// Largest capacity, so that no plugin holds more than its share of the host's memory and connections.
const MAX_CAPACITY: usize = 1024;

/// The queue of one plugin.
pub(crate) struct Queue {
    /// The plugin's id.
    id: String,
    capacity: usize,
    sender: Sender<Job>,
    receiver: Receiver<Job>,
    /// Re-queued requests, which are older than those in the channel.
    front: Mutex<VecDeque<Job>>,
    /// Their number, readable without the lock.
    in_front: AtomicUsize,
    /// Workers that wait.
    sleepers: Mutex<Vec<Thread>>,
    /// Their number, readable without the lock.
    asleep: AtomicUsize,
    /// The queue of the plugin that has replaced this one.
    successor: OnceLock<Arc<Queue>>,
    /// Throttles the warning that the queue is full.
    full: Mutex<LogThrottle>,
}

impl Queue {
    /// A queue for a plugin with this concurrency.
    pub(crate) fn new(id: &str, concurrency: usize) -> Self {
        let capacity = (concurrency * CAPACITY_PER_CONNECTION).min(MAX_CAPACITY);
        let (sender, receiver) = unbounded();
        let (front, in_front, sleepers, asleep, successor, full) = Default::default();
        Self { id: id.to_owned(), capacity, sender, receiver, front, in_front, sleepers, asleep, successor, full }
    }

    /// Appends a request. Threads that do so at the same moment may exceed the capacity by their number.
    ///
    /// # Errors
    /// The queue is full: the request, for the caller to answer.
    pub(crate) fn push(&self, job: Job) -> Result<(), Job> {
        if let Some(successor) = self.successor.get() {
            return successor.push(job);
        }
        if self.len() >= self.capacity {
            // Cancelled requests count until they are dropped.
            self.drop_cancelled();
        }
        if self.len() >= self.capacity {
            self.warn_full();
            return Err(job);
        }
        self.sender.send(job).map_err(|SendError(job)| job)?;
        self.wake_one();
        Ok(())
    }

    /// Warns that the queue is full, at most once a minute.
    fn warn_full(&self) {
        let hit = self.full.locked().hit(Instant::now());
        if let Some(suppressed) = hit {
            log::warn!(
                "the queue of {} is full with {} requests, and others are refused{}",
                self.id,
                self.len(),
                suppressed_note(suppressed)
            );
        }
    }

    /// Takes the next request, and waits for it until the deadline. None then, or when it `is_over`, of which [`Queue::wake_all`] tells those
    /// that wait.
    pub(crate) fn take_by(&self, deadline: Instant, is_over: impl Fn() -> bool) -> Option<Job> {
        let this = thread::current();
        loop {
            let late = Instant::now() >= deadline;
            let job = if is_over() { None } else { self.try_take() };
            if job.is_some() || late || is_over() {
                return job;
            }
            {
                let mut sleepers = self.sleepers.locked();
                sleepers.push(this.clone());
                self.asleep.store(sleepers.len(), Ordering::Relaxed);
            }
            // Either whoever puts a request into the queue sees this worker on the list, or this worker sees the request.
            fence(Ordering::SeqCst);
            if self.len() == 0 && !is_over() {
                thread::park_timeout(deadline.saturating_duration_since(Instant::now()));
            }
            let mut sleepers = self.sleepers.locked();
            let at = sleepers.iter().rposition(|sleeper| sleeper.id() == this.id());
            at.map(|at| sleepers.remove(at));
            self.asleep.store(sleepers.len(), Ordering::Relaxed);
            drop(sleepers);
            if at.is_none() && is_over() {
                // It was woken for a request, which is left to another.
                self.wake_one();
            }
        }
    }

    /// Wakes a worker that waits, if there is one.
    fn wake_one(&self) {
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) > 0 {
            let mut sleepers = self.sleepers.locked();
            let sleeper = sleepers.pop();
            self.asleep.store(sleepers.len(), Ordering::Relaxed);
            // The woken worker takes the lock.
            drop(sleepers);
            sleeper.inspect(Thread::unpark);
        }
    }

    /// Wakes all workers that wait.
    pub(crate) fn wake_all(&self) {
        fence(Ordering::SeqCst);
        while self.asleep.load(Ordering::Relaxed) > 0 {
            self.wake_one();
        }
    }

    /// Takes the next request, if one waits.
    pub(crate) fn try_take(&self) -> Option<Job> {
        if self.in_front.load(Ordering::SeqCst) > 0 {
            let mut front = self.lock();
            let job = front.pop_front();
            self.note_front(&front);
            if job.is_some() {
                return job;
            }
        }
        self.receiver.try_recv().ok()
    }

    /// Re-queues a request, by its time of arrival.
    pub(crate) fn put_back(&self, job: Job) {
        if let Some(successor) = self.successor.get() {
            return successor.put_back(job);
        }
        let mut front = self.lock();
        let at = front.partition_point(|other| other.arrived() <= job.arrived());
        front.insert(at, job);
        self.note_front(&front);
    }

    /// Forwards waiting and future requests to the queue of the plugin that replaces this one.
    pub(crate) fn succeed(&self, successor: Arc<Self>) {
        self.successor.set(successor).ok();
        self.forward_waiting();
    }

    /// Whether another plugin has replaced this one.
    pub(crate) fn is_succeeded(&self) -> bool {
        self.successor.get().is_some()
    }

    /// Forwards waiting requests to the successor, if there is one, including those of threads that have not seen it yet.
    pub(crate) fn forward_waiting(&self) {
        if let Some(successor) = self.successor.get() {
            while let Some(job) = self.try_take() {
                successor.put_back(job);
            }
        }
    }

    /// Number of waiting requests.
    pub(crate) fn len(&self) -> usize {
        self.receiver.len() + self.in_front.load(Ordering::Relaxed)
    }

    /// Passes the oldest requests to `fail`, as long as they are `expired`. Drops cancelled ones on the way.
    pub(crate) fn expire(&self, expired: impl Fn(&Job) -> bool, mut fail: impl FnMut(Job)) {
        loop {
            let mut front = self.lock();
            if front.is_empty()
                && let Ok(job) = self.receiver.try_recv()
            {
                front.push_back(job);
            }
            let is_taken = front.front().is_some_and(|job| job.is_cancelled() || expired(job));
            let job = if is_taken { front.pop_front() } else { None };
            self.note_front(&front);
            drop(front);
            match job {
                Some(job) if job.is_cancelled() => drop(job),
                Some(job) => fail(job),
                None => return,
            }
        }
    }

    /// Fails all waiting requests.
    pub(crate) fn fail_all(&self, error: HttpError) {
        while let Some(job) = self.try_take() {
            job.fail(error);
        }
    }

    /// Drops cancelled requests; the others keep their order.
    fn drop_cancelled(&self) {
        let mut front = self.lock();
        front.extend(self.receiver.try_iter().take(self.capacity));
        front.retain(|job| !job.is_cancelled());
        self.note_front(&front);
    }

    /// Records the number of re-queued requests, and wakes a worker if there are any.
    fn note_front(&self, front: &VecDeque<Job>) {
        self.in_front.store(front.len(), Ordering::SeqCst);
        if !front.is_empty() {
            self.wake_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Job>> {
        self.front.locked()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::errors;
    use crate::plugins::job::{KvFailure, KvJob, KvReply};
    use crate::protocol::message::KvOp;
    use crossbeam_channel::bounded;
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

    /// Longer than a test may take.
    const LONG: Duration = Duration::from_secs(60);

    /// A request for a key, and where its answer goes.
    fn job(key: &str) -> (Job, Receiver<KvReply>) {
        let (reply, replies) = bounded(1);
        let op = KvOp::Get { key: key.to_owned() };
        (Job::Kv(Box::new(KvJob { op, value: Vec::new(), reply, arrived: Instant::now() })), replies)
    }

    fn key(job: &Job) -> &str {
        match job {
            Job::Kv(job) => match &job.op {
                KvOp::Get { key } => key,
                _ => panic!("not a request of these tests"),
            },
            Job::Http(_) => panic!("not a request of these tests"),
        }
    }

    fn error(replies: &Receiver<KvReply>) -> Option<HttpError> {
        match replies.try_recv() {
            Ok(Err(KvFailure::Failed(error))) => Some(error),
            _ => None,
        }
    }

    /// A queue that is full with requests of the keys `0` and up, and where their answers go.
    fn full() -> (Queue, Vec<Receiver<KvReply>>) {
        let queue = Queue::new("p", 1);
        let replies = (0..CAPACITY_PER_CONNECTION).map(|number| {
            let (job, replies) = job(&number.to_string());
            assert!(queue.push(job).is_ok());
            replies
        });
        let replies = replies.collect();
        (queue, replies)
    }

    fn taken(queue: &Queue) -> Vec<String> {
        std::iter::from_fn(|| queue.try_take()).map(|job| key(&job).to_owned()).collect()
    }

    #[test]
    fn expiry_takes_the_oldest_and_evicts_none_for_a_later_one() {
        let (queue, replies) = full();
        let expired = |job: &Job| matches!(key(job), "0" | "1" | "5");
        // A request that arrives meanwhile does not evict another.
        queue.expire(expired, |job| {
            assert!(queue.push(self::job("late").0).is_ok());
            job.fail(errors::TIMEOUT);
        });
        assert_eq!(replies.iter().map(error).filter(|error| *error == Some(errors::TIMEOUT)).count(), 2, "5 is behind others");
        let kept: Vec<_> = (2..CAPACITY_PER_CONNECTION).map(|number| number.to_string()).collect();
        assert_eq!(taken(&queue)[..kept.len()], kept);
    }

    #[test]
    fn a_requeued_request_is_taken_before_later_ones_even_if_the_queue_is_full() {
        let (queue, _replies) = full();
        let (first, second) = (queue.try_take().unwrap(), queue.try_take().unwrap());
        assert!(queue.push(job("a").0).is_ok() && queue.push(job("b").0).is_ok());
        queue.put_back(second);
        queue.put_back(first);
        assert_eq!(queue.len(), CAPACITY_PER_CONNECTION + 2);
        assert_eq!(queue.take_by(Instant::now(), || false).as_ref().map(key), Some("0"));
        assert!(queue.push(job("c").0).is_err());
        assert_eq!(taken(&queue)[..3], ["1", "2", "3"]);
    }

    /// Workers that wait on a queue until it is over, and what they have taken.
    fn workers(queue: &Arc<Queue>, count: usize, over: &Arc<AtomicBool>) -> (Vec<thread::JoinHandle<()>>, Receiver<String>) {
        let (tell, taken) = unbounded();
        let worker = || {
            let (queue, over, tell) = (Arc::clone(queue), Arc::clone(over), tell.clone());
            let work = move || {
                while let Some(job) = queue.take_by(Instant::now() + LONG, || over.load(Ordering::SeqCst)) {
                    tell.send(key(&job).to_owned()).unwrap();
                }
            };
            thread::Builder::new().name("worker".into()).spawn(work).unwrap()
        };
        ((0..count).map(|_| worker()).collect(), taken)
    }

    #[test]
    fn every_request_wakes_a_worker_that_waits_and_all_are_told_when_it_is_over() {
        let (queue, over) = (Arc::new(Queue::new("p", 16)), Arc::default());
        let (workers, taken) = workers(&queue, 3, &over);
        for number in 0..1000 {
            let job = job(&number.to_string()).0;
            if number % 3 == 0 {
                queue.put_back(job);
            } else {
                assert!(queue.push(job).is_ok());
            }
            assert_eq!(taken.recv_timeout(LONG), Ok(number.to_string()));
        }
        over.store(true, Ordering::SeqCst);
        queue.wake_all();
        workers.into_iter().for_each(|worker| worker.join().unwrap());
        assert_eq!(queue.asleep.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn who_waits_until_a_deadline_is_not_left_on_the_list() {
        let queue = Queue::new("p", 1);
        assert!(queue.take_by(Instant::now() + Duration::from_millis(10), || false).is_none());
        assert!(queue.take_by(Instant::now() + LONG, || true).is_none());
        assert!(queue.sleepers.locked().is_empty());
    }

    #[test]
    fn all_waiting_requests_are_failed_requeued_or_not() {
        let (queue, replies) = full();
        queue.expire(|_| false, drop);
        queue.put_back(queue.try_take().unwrap());
        queue.fail_all(errors::CROWDED);
        assert!(replies.iter().all(|replies| error(replies) == Some(errors::CROWDED)));
        assert_eq!(queue.len(), 0);
    }

    #[test]
    fn a_successor_gets_waiting_and_future_requests() {
        let (queue, _replies) = full();
        let successor = Arc::new(Queue::new("p", 1));
        queue.succeed(Arc::clone(&successor));
        queue.put_back(job("back").0);
        assert_eq!((queue.len(), successor.len()), (0, CAPACITY_PER_CONNECTION + 1));
        assert!(queue.push(job("more").0).is_err());
    }
}
