//! The operator's reads and writes of a plugin's keys.

use super::kv::{Kv, KvError};
use crate::protocol::message::{KvOp, KvResult};

/// What the operator asks of the plugin's keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation<'a> {
    /// Read a value.
    Get {
        /// Which.
        key: &'a str,
    },
    /// Write a value.
    Set {
        /// Which.
        key: &'a str,
        /// The value.
        value: &'a [u8],
    },
    /// Remove a value.
    Delete {
        /// Which.
        key: &'a str,
    },
}

impl<'a> Operation<'a> {
    /// The operation of a request, if it is one that the host may ask of a plugin.
    pub(super) fn new(op: &'a KvOp, value: &'a [u8]) -> Option<Self> {
        match op {
            KvOp::Get { key } => Some(Self::Get { key }),
            KvOp::Set(set) => Some(Self::Set { key: &set.key, value }),
            KvOp::Delete(delete) => Some(Self::Delete { key: &delete.key }),
            KvOp::Incr(_) | KvOp::List(_) | KvOp::Txn => None,
        }
    }

    /// The key it is about.
    #[must_use]
    pub fn key(&self) -> &'a str {
        match self {
            Self::Get { key } | Self::Set { key, .. } | Self::Delete { key } => key,
        }
    }

    /// Performs the operation in the plugin's own namespace: what is done without an
    /// [`on_kv`](super::Plugin::on_kv).
    ///
    /// # Errors
    /// When the host refuses it, or cannot be reached.
    pub fn perform(self, kv: &Kv) -> Result<Outcome, KvError> {
        Ok(match self {
            Self::Get { key } => match kv.get_entry(key)? {
                Some(entry) => Outcome { found: Some(true), rev: Some(entry.rev), value: entry.value },
                None => Outcome::missing(),
            },
            Self::Set { key, value } => Outcome { rev: Some(kv.set(key, value)?), ..Outcome::default() },
            Self::Delete { key } => Outcome { found: Some(kv.delete(key)?), ..Outcome::default() },
        })
    }
}

/// What an [`Operation`] came to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outcome {
    /// For a get and a delete: whether the key was there. Where a get does not say, a value or a revision does.
    pub found: Option<bool>,
    /// The value's revision, where there is one.
    pub rev: Option<u64>,
    /// For a get: the value.
    pub value: Vec<u8>,
}

impl Outcome {
    /// Of a get: a value the plugin has computed.
    pub fn computed(value: impl Into<Vec<u8>>) -> Self {
        Self { found: Some(true), rev: None, value: value.into() }
    }

    /// Of a get or a delete: there is no such key.
    #[must_use]
    pub fn missing() -> Self {
        Self { found: Some(false), ..Self::default() }
    }

    /// The reply to an operation of this name, with what the protocol wants of it: a get says whether it found something, and only then
    /// has a value; a delete says whether it found something.
    pub(super) fn into_result(self, id: u64, op: &str) -> (KvResult, Vec<u8>) {
        let found = match op {
            "get" => Some(self.found.unwrap_or(self.rev.is_some() || !self.value.is_empty())),
            "delete" => Some(self.found.unwrap_or(false)),
            _ => self.found,
        };
        let value = if op == "get" && found == Some(true) { self.value } else { Vec::new() };
        (KvResult { id, found, rev: self.rev, ..KvResult::default() }, value)
    }
}
