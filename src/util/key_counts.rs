//! Counts by key, such as connections by the address of their client.

use crate::lock::LockExt;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex};

/// A count for each key. A key whose count is 0 has no entry.
#[derive(Debug)]
pub(crate) struct KeyCounts<K>(Arc<Mutex<HashMap<K, u32>>>);

/// One of a key's count, until this is dropped.
#[derive(Debug)]
pub(crate) struct Counted<K: Eq + Hash> {
    counts: KeyCounts<K>,
    key: K,
}

impl<K> Default for KeyCounts<K> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<K> Clone for KeyCounts<K> {
    /// The same counts.
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<K: Eq + Hash + Clone> KeyCounts<K> {
    /// The count of a key.
    pub(crate) fn of(&self, key: &K) -> u32 {
        self.0.locked().get(key).copied().unwrap_or(0)
    }

    /// Adds one to the count of a key, unless that has reached `limit`.
    pub(crate) fn count(&self, key: K, limit: u32) -> Option<Counted<K>> {
        let mut counts = self.0.locked();
        let count = counts.get(&key).copied().unwrap_or(0);
        if count >= limit {
            return None;
        }
        counts.insert(key.clone(), count + 1);
        Some(Counted { counts: self.clone(), key })
    }
}

impl<K: Eq + Hash> Drop for Counted<K> {
    fn drop(&mut self) {
        let mut counts = self.counts.0.locked();
        if let Some(count) = counts.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_counts_until_it_is_dropped() {
        let counts = KeyCounts::default();
        let (first, second) = (counts.count("a", 2), counts.count("a", 2));
        assert_eq!((counts.of(&"a"), counts.of(&"b")), (2, 0));
        assert!(second.is_some() && counts.count("a", 2).is_none());
        drop(first);
        assert_eq!(counts.of(&"a"), 1);
        drop(second);
        assert!(counts.0.locked().is_empty());
    }
}
