//! Locks that are taken whether or not a thread panicked while it held them.
//!
//! Poison is ignored. A panic is contained where it happens: its thread is restarted, its request fails, or the process ends. Every
//! other thread that needs the lock must go on meanwhile, and none of the values behind our locks is left unusable halfway through a
//! change.

use std::sync::{LockResult, Mutex, MutexGuard, PoisonError};

/// Taking a lock that may be poisoned.
pub trait LockExt<T: ?Sized> {
    /// Waits for the lock, and takes it even if it is poisoned.
    fn locked(&self) -> MutexGuard<'_, T>;
}

impl<T: ?Sized> LockExt<T> for Mutex<T> {
    fn locked(&self) -> MutexGuard<'_, T> {
        unpoisoned(self.lock())
    }
}

/// The guard that a wait on a condition variable, or a read-write lock, gives, even if its lock is poisoned.
pub fn unpoisoned<G>(result: LockResult<G>) -> G {
    result.unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn a_poisoned_lock_is_taken_with_the_value_it_has() {
        let number = Mutex::new(1);
        let panicked = thread::scope(|scope| {
            let hold = || {
                let mut held = number.locked();
                *held = 2;
                panic!("while the lock is held");
            };
            thread::Builder::new().spawn_scoped(scope, hold).unwrap().join()
        });
        assert!(panicked.is_err() && number.is_poisoned());
        assert_eq!(*number.locked(), 2);
    }
}
