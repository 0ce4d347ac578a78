//! Calls that go to the host together.
//!
//! Each call waits for its reply, so a connection for each of many threads costs the host and the plugin a wake for every one of
//! them. Instead only a few connections are in use at once, and who comes meanwhile goes with others in one write: the first of
//! such a group leads it, which is to send it, to read the replies, and to hand them on.

use super::kv::KvError;
use crate::lock::{LockExt, unpoisoned};
use crate::protocol::frame::{EncodeError, encode};
use crate::protocol::message::{Kv, KvOp, KvResult};
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;

/// Most requests of a group: as many as the host has under way of one connection.
const MAX_REQUESTS: usize = 64;

/// Bytes of a group after which no further request joins it. A socket takes them at once, so that the host never waits for its
/// replies to be read while the group is still being sent.
const MAX_BYTES: usize = 64 * 1024;

/// A reply: what its head says, and its body.
pub(super) type Reply = (KvResult, Vec<u8>);

/// Calls on their way to the host.
#[derive(Debug)]
pub(super) struct Groups {
    /// Most groups that are under way at once.
    most: usize,
    queue: Mutex<Queue>,
}

#[derive(Debug, Default)]
struct Queue {
    /// Those that gather. None does without a leader while fewer than the most are under way.
    gathering: VecDeque<Group>,
    under_way: usize,
}

/// Requests that are sent together, in order.
#[derive(Debug, Default)]
pub(super) struct Group {
    /// Their frames.
    pub(super) requests: Vec<u8>,
    /// Whether the first of its calls has been told to lead it. Others join it until that thread runs: it may take a while.
    is_led: bool,
    /// Who waits for the replies.
    pub(super) calls: Vec<Arc<Call>>,
}

/// A call, as its thread waits for it.
#[derive(Debug)]
pub(super) struct Call {
    /// The request's id.
    pub(super) id: u64,
    /// The name of its operation.
    pub(super) op: &'static str,
    turn: Mutex<Turn>,
    came: Condvar,
}

/// What a thread is to do next.
#[derive(Debug)]
enum Turn {
    Wait,
    /// Lead the group of which its call is the first.
    Lead,
    Take(Result<Reply, KvError>),
}

impl Groups {
    pub(super) fn new(most: usize) -> Self {
        Self { most, queue: Mutex::default() }
    }

    /// Sends a request with those that come at the same time, and waits for its reply. `carry` takes a group to the host, and gives
    /// each of its calls a reply.
    pub(super) fn call(&self, id: u64, op: KvOp, body: &[u8], carry: impl Fn(&Group)) -> Result<Reply, KvError> {
        let mut request = Vec::new();
        let name = op.name();
        encode(&mut request, &Kv { id, op }, body).map_err(|error| match error {
            EncodeError::Body(_) => KvError::refused("too_large", error),
            EncodeError::Head(_) | EncodeError::Json(_) => KvError::refused("bad_request", error),
        })?;
        let call = self.join(id, name, &request);
        loop {
            match call.wait() {
                Turn::Take(reply) => return reply,
                Turn::Lead => {
                    let led = Led { groups: self, group: self.depart(&call) };
                    carry(&led.group);
                }
                Turn::Wait => {}
            }
        }
    }

    /// Puts a request into a group: one of its own, to be led at once, or the last that gathers.
    fn join(&self, id: u64, op: &'static str, request: &[u8]) -> Arc<Call> {
        let mut queue = self.lock();
        let leads = queue.under_way < self.most;
        queue.under_way += usize::from(leads);
        let full = |group: &Group| group.calls.len() >= MAX_REQUESTS || group.requests.len() >= MAX_BYTES;
        if leads || queue.gathering.back().is_none_or(full) {
            queue.gathering.push_back(Group { is_led: leads, ..Group::default() });
        }
        let call = Arc::new(Call { id, op, turn: Mutex::new(if leads { Turn::Lead } else { Turn::Wait }), came: Condvar::new() });
        if let Some(group) = queue.gathering.back_mut() {
            group.requests.extend_from_slice(request);
            group.calls.push(Arc::clone(&call));
        }
        call
    }

    /// The group that a call leads, which nobody joins from now on.
    fn depart(&self, leader: &Arc<Call>) -> Group {
        let mut queue = self.lock();
        let leads = |group: &Group| group.calls.first().is_some_and(|first| Arc::ptr_eq(first, leader));
        let place = queue.gathering.iter().position(leads);
        place.and_then(|place| queue.gathering.remove(place)).unwrap_or_default()
    }

    /// Has the next group led, if there is one.
    fn pass_on(&self) {
        let mut queue = self.lock();
        match queue.gathering.iter_mut().find(|group| !group.is_led) {
            Some(group) => {
                group.is_led = true;
                group.calls[0].give(Turn::Lead);
            }
            None => queue.under_way -= 1,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.locked()
    }
}

/// A group on its way to the host. The next group is led when this is dropped. After a panic of its leader the other calls fail, which
/// would wait for ever otherwise.
struct Led<'a> {
    groups: &'a Groups,
    group: Group,
}

impl Drop for Led<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            for call in &self.group.calls {
                if matches!(*call.lock(), Turn::Wait) {
                    call.reply(Err(io::Error::other("the thread that was to send it panicked").into()));
                }
            }
        }
        self.groups.pass_on();
    }
}

impl Call {
    fn wait(&self) -> Turn {
        let turn = self.came.wait_while(self.lock(), |turn| matches!(turn, Turn::Wait));
        std::mem::replace(&mut *unpoisoned(turn), Turn::Wait)
    }

    /// Ends the wait for the reply.
    pub(super) fn reply(&self, reply: Result<Reply, KvError>) {
        self.give(Turn::Take(reply));
    }

    fn give(&self, turn: Turn) {
        *self.lock() = turn;
        self.came.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Turn> {
        self.turn.locked()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::message::MAX_BODY;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::{Duration, Instant};

    impl Groups {
        /// Returns once so many calls wait for groups to be led.
        pub(crate) fn wait_for(&self, calls: usize) {
            wait_until(&format!("{calls} calls wait"), || self.waiting() >= calls);
        }

        fn waiting(&self) -> usize {
            self.lock().gathering.iter().map(|group| group.calls.len()).sum()
        }
    }

    #[track_caller]
    fn wait_until(what: &str, is_so: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !is_so() {
            assert!(Instant::now() < deadline, "not in time: {what}");
            thread::yield_now();
        }
    }

    /// The sizes of the groups that calls with bodies of these lengths make, when as many as may are under way until all others wait.
    fn sizes(most: usize, bodies: &[usize]) -> Vec<usize> {
        let (groups, sizes) = (Groups::new(most), Mutex::new(Vec::new()));
        let all_wait = AtomicBool::new(false);
        let carry = |group: &Group| {
            let first = {
                let mut sizes = sizes.lock().unwrap();
                sizes.push(group.calls.len());
                sizes.len() <= most
            };
            if first {
                let others = bodies.len() - most;
                wait_until("the others wait", || all_wait.load(Ordering::SeqCst) || groups.waiting() >= others);
                all_wait.store(true, Ordering::SeqCst);
            }
            for call in &group.calls {
                call.reply(Ok((KvResult { id: call.id, ..KvResult::default() }, Vec::new())));
            }
        };
        let answered: Mutex<Vec<u64>> = Mutex::default();
        thread::scope(|scope| {
            for (id, length) in (1..).zip(bodies) {
                let (groups, answered) = (&groups, &answered);
                let call = move || {
                    let (result, _) = groups.call(id, KvOp::Txn, &vec![0; *length], carry).unwrap();
                    assert_eq!(result.id, id);
                    answered.lock().unwrap().push(result.id);
                };
                thread::Builder::new().spawn_scoped(scope, call).unwrap();
                // Nobody joins a group that is under way.
                let led = most.min(usize::try_from(id).unwrap());
                wait_until("the first are under way", || sizes.lock().unwrap().len() >= led);
            }
        });
        let mut answered = answered.into_inner().unwrap();
        answered.sort_unstable();
        assert!(answered.into_iter().eq(1..=bodies.len() as u64), "each has its own reply");
        let queue = groups.lock();
        assert!(queue.gathering.is_empty() && queue.under_way == 0);
        drop(queue);
        sizes.into_inner().unwrap()
    }

    #[test]
    fn those_that_come_while_others_are_under_way_go_together() {
        assert_eq!(sizes(1, &[10; 1]), [1]);
        assert_eq!(sizes(1, &[10; 1 + MAX_REQUESTS + 5]), [1, MAX_REQUESTS, 5]);
        assert_eq!(sizes(3, &[10; 3 + 4]), [1, 1, 1, 4]);
    }

    #[test]
    fn a_group_is_bounded_in_bytes() {
        assert_eq!(sizes(1, &[MAX_BYTES; 4]), [1; 4]);
        assert_eq!(sizes(1, &[MAX_BYTES / 2; 5]), [1, 2, 2]);
    }

    #[test]
    fn the_panic_of_a_leader_fails_its_group_and_no_other() {
        let groups = Groups::new(1);
        let carry = |group: &Group| {
            if group.calls[0].id == 1 {
                groups.wait_for(2);
                panic!("the leader");
            }
            assert!(group.calls[0].id == 4, "the second leader");
            group.calls.iter().for_each(|call| call.reply(Ok(Reply::default())));
        };
        let call = |id: u64, carry: &(dyn Fn(&Group) + Sync)| groups.call(id, KvOp::Txn, b"", carry);
        thread::scope(|scope| {
            let spawn = |id: u64| thread::Builder::new().spawn_scoped(scope, move || call(id, &carry)).unwrap();
            let leader = spawn(1);
            wait_until("the leader is under way", || groups.lock().under_way == 1 && groups.waiting() == 0);
            let followers = [spawn(2), spawn(3)];
            assert!(leader.join().is_err());
            // The second group is led by one of the others, whose panic fails the other one.
            let outcomes = followers.map(|follower| follower.join());
            assert_eq!(outcomes.iter().filter(|outcome| outcome.is_err()).count(), 1);
            assert!(outcomes.into_iter().flatten().all(|reply| reply.is_err_and(|error| error.to_string().contains("panicked"))));
            assert!(spawn(4).join().unwrap().is_ok());
        });
    }

    #[test]
    fn a_request_over_the_limit_is_refused_and_keeps_nobody_waiting() {
        let groups = Groups::new(1);
        let refused = groups.call(1, KvOp::Txn, &vec![0; MAX_BODY + 1], |_| panic!("it was sent"));
        assert_eq!(refused.unwrap_err().code(), Some("too_large"));
        let carry = |group: &Group| group.calls.iter().for_each(|call| call.reply(Ok(Reply::default())));
        groups.call(2, KvOp::Txn, b"", carry).unwrap();
    }
}
