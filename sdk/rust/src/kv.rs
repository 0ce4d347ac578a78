//! The key-value store the host keeps for the plugin.

use super::pool::Pool;
use crate::protocol::message::{DeleteOp, IncrOp, KvOp, KvResult, ListEntry, ListOp, SetOp, TxnOp, WriteOutcome};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::de::DeserializeOwned;
use std::fmt::Display;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// The plugin's own namespace of the host's key-value store. A clone is cheap, and any thread may use it.
///
/// Keys are 1–512 bytes, values 0–1 MiB. A write that has returned is on disk. Every call waits for the host. Calls of several
/// threads at once go there together, up to 64 over one connection, and share a sync: many threads make many writes cheap.
///
/// Where a call fails with [`KvError::Io`], its connection is gone, and whether a write was carried out is unknown: it is never
/// sent a second time on its own account.
#[derive(Debug, Clone)]
pub struct Kv(Arc<Pool>);

/// Why the store did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum KvError {
    /// The host refused; nothing was written.
    #[error("{message} ({code})")]
    Refused {
        /// A word of the protocol's table, such as `conflict` or `quota`.
        code: String,
        /// One sentence.
        message: String,
        /// For [`Kv::txn`]: the place of the write that failed, from 0.
        index: Option<usize>,
    },
    /// The host cannot be reached, or its reply makes no sense.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl KvError {
    /// A refusal of the plugin's own, for [`Plugin::on_kv`](super::Plugin::on_kv): a code of the form
    /// `[a-z][a-z0-9_]{0,63}`, and one sentence of at most 4096 bytes. Another code reaches the operator as `internal`.
    pub fn refused(code: impl Into<String>, message: impl Display) -> Self {
        Self::Refused { code: code.into(), message: message.to_string(), index: None }
    }

    /// The host's code, where it has refused.
    #[must_use]
    pub fn code(&self) -> Option<&str> {
        match self {
            Self::Refused { code, .. } => Some(code),
            Self::Io(_) => None,
        }
    }

    /// A reply that is not of the protocol's form.
    pub(super) fn invalid(reason: impl Into<super::Error>) -> Self {
        Self::Io(io::Error::new(io::ErrorKind::InvalidData, reason))
    }
}

/// A value with what belongs to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The value.
    pub value: Vec<u8>,
    /// Its revision: another after every write.
    pub rev: u64,
    /// How long until it expires; `None` when it does not.
    pub expires_in: Option<Duration>,
}

/// Conditions of a write.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SetOptions {
    /// The value expires after this time, rounded up to a millisecond; at most ten years.
    pub ttl: Option<Duration>,
    /// Only when the key is there with this revision; otherwise the call fails with code `conflict`.
    pub if_rev: Option<u64>,
    /// Only when the key is not there; otherwise the call fails with code `conflict`.
    pub if_absent: bool,
}

/// A page of keys, in byte order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// The keys.
    pub entries: Vec<Listed>,
    /// What to pass as [`ListOp::after`] for the next page; `None` on the last.
    pub next: Option<String>,
}

/// One key of a [`Page`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The key.
    pub key: String,
    /// Its revision.
    pub rev: u64,
    /// The value's length in bytes.
    pub size: u64,
    /// How long until it expires; `None` when it does not.
    pub expires_in: Option<Duration>,
    /// The value, where [`ListOp::values`] asks for it.
    pub value: Option<Vec<u8>>,
}

/// One write of a [`Kv::txn`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// Writes a value.
    Set {
        /// Which.
        key: String,
        /// The value.
        value: Vec<u8>,
        /// Its conditions.
        options: SetOptions,
    },
    /// Removes a value.
    Delete {
        /// Which.
        key: String,
        /// Only when the key is there with this revision.
        if_rev: Option<u64>,
    },
    /// Adds to a decimal number.
    Incr {
        /// Which.
        key: String,
        /// What to add.
        delta: i64,
        /// The key expires after this time, where this write makes it.
        ttl: Option<Duration>,
    },
}

impl Write {
    /// Writes a value, under no conditions.
    pub fn set(key: impl Into<String>, value: impl Into<Vec<u8>>) -> Self {
        Self::Set { key: key.into(), value: value.into(), options: SetOptions::default() }
    }

    /// Removes a value, under no conditions.
    pub fn delete(key: impl Into<String>) -> Self {
        Self::Delete { key: key.into(), if_rev: None }
    }

    /// Adds to a decimal number.
    pub fn incr(key: impl Into<String>, delta: i64) -> Self {
        Self::Incr { key: key.into(), delta, ttl: None }
    }

    fn to_op(&self) -> TxnOp {
        match self {
            Self::Set { key, value, options } => {
                let set = options.to_op(key);
                match std::str::from_utf8(value) {
                    Ok(text) => TxnOp::Set { set, value: Some(text.to_owned()), value_base64: None },
                    Err(_) => TxnOp::Set { set, value: None, value_base64: Some(STANDARD.encode(value)) },
                }
            }
            Self::Delete { key, if_rev } => TxnOp::Delete(DeleteOp { key: key.clone(), if_rev: *if_rev }),
            Self::Incr { key, delta, ttl } => TxnOp::Incr(IncrOp { key: key.clone(), delta: *delta, ttl_ms: ttl.map(millis) }),
        }
    }
}

impl SetOptions {
    fn to_op(self, key: &str) -> SetOp {
        SetOp { key: key.to_owned(), ttl_ms: self.ttl.map(millis), if_rev: self.if_rev, if_absent: self.if_absent }
    }
}

impl Kv {
    pub(super) fn new(host_socket: PathBuf) -> Self {
        Self(Arc::new(Pool::new(host_socket)))
    }

    /// The value of a key, if there is one.
    ///
    /// # Errors
    /// When the host refuses or cannot be reached.
    pub fn get(&self, key: &str) -> Result<Option<Vec<u8>>, KvError> {
        Ok(self.get_entry(key)?.map(|entry| entry.value))
    }

    /// The value of a key with its revision and expiry, if there is one.
    ///
    /// # Errors
    /// When the host refuses or cannot be reached.
    pub fn get_entry(&self, key: &str) -> Result<Option<Entry>, KvError> {
        let (result, value) = self.0.call(KvOp::Get { key: key.to_owned() }, &[])?;
        if !there(result.found, "found")? {
            return Ok(None);
        }
        let expires_in = result.expires_in_ms.map(Duration::from_millis);
        Ok(Some(Entry { value, rev: there(result.rev, "rev")?, expires_in }))
    }

    /// Writes a value that does not expire, and gives its revision.
    ///
    /// # Errors
    /// When the host refuses or cannot be reached.
    pub fn set(&self, key: &str, value: impl AsRef<[u8]>) -> Result<u64, KvError> {
        self.set_with(key, value, SetOptions::default())
    }

    /// Writes a value under conditions, and gives its revision.
    ///
    /// ```no_run
    /// # use plugrack_sdk::{Kv, KvError, SetOptions};
    /// # fn example(kv: &Kv) -> Result<(), KvError> {
    /// // Read, change, and write only if nobody has written meanwhile.
    /// if let Some(entry) = kv.get_entry("title")? {
    ///     let louder = entry.value.to_ascii_uppercase();
    ///     kv.set_with("title", louder, SetOptions { if_rev: Some(entry.rev), ..SetOptions::default() })?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// When a condition does not hold (code `conflict`), or the host refuses or cannot be reached.
    pub fn set_with(&self, key: &str, value: impl AsRef<[u8]>, options: SetOptions) -> Result<u64, KvError> {
        let (result, _) = self.0.call(KvOp::Set(options.to_op(key)), value.as_ref())?;
        there(result.rev, "rev")
    }

    /// Removes a value, and tells whether there was one.
    ///
    /// # Errors
    /// When the host refuses or cannot be reached.
    pub fn delete(&self, key: &str) -> Result<bool, KvError> {
        let (result, _) = self.0.call(KvOp::Delete(DeleteOp { key: key.to_owned(), if_rev: None }), &[])?;
        there(result.found, "found")
    }

    /// Adds to a decimal number, 0 where there is none, and gives the sum.
    ///
    /// # Errors
    /// When the value is no number or the sum out of range (code `bad_request`), or the host refuses or cannot be reached.
    pub fn incr(&self, key: &str, delta: i64) -> Result<i64, KvError> {
        let (result, _) = self.0.call(KvOp::Incr(IncrOp { key: key.to_owned(), delta, ttl_ms: None }), &[])?;
        there(result.value, "value")
    }

    /// A page of keys in byte order, 100 unless the limit says otherwise. It may hold fewer though there are more.
    ///
    /// ```no_run
    /// # use plugrack_sdk::{Kv, KvError, ListOp};
    /// # fn example(kv: &Kv) -> Result<(), KvError> {
    /// let mut after = None;
    /// loop {
    ///     let page = kv.list(ListOp { prefix: "note/".to_owned(), after, ..ListOp::default() })?;
    ///     for entry in page.entries {
    ///         println!("{} has {} bytes", entry.key, entry.size);
    ///     }
    ///     match page.next {
    ///         Some(next) => after = Some(next),
    ///         None => break Ok(()),
    ///     }
    /// }
    /// # }
    /// ```
    ///
    /// # Errors
    /// When the host refuses or cannot be reached.
    pub fn list(&self, list: ListOp) -> Result<Page, KvError> {
        let (KvResult { next, .. }, body) = self.0.call(KvOp::List(list), &[])?;
        let entries: Vec<ListEntry> = json(&body)?;
        let entries = entries.into_iter().map(Listed::try_from).collect::<Result<_, _>>().map_err(KvError::invalid)?;
        Ok(Page { entries, next })
    }

    /// Performs 1–128 writes, all or none, in order, and gives their outcomes. This is also the way to a [`Write::Delete`] or
    /// [`Write::Incr`] under conditions.
    ///
    /// # Errors
    /// When one of them is refused: [`KvError::Refused`] tells which, and none is carried out. When the host refuses all, or
    /// cannot be reached.
    pub fn txn(&self, writes: &[Write]) -> Result<Vec<WriteOutcome>, KvError> {
        let ops: Vec<TxnOp> = writes.iter().map(Write::to_op).collect();
        let body = serde_json::to_vec(&ops).map_err(io::Error::from)?;
        let (_, outcomes) = self.0.call(KvOp::Txn, &body)?;
        json(&outcomes)
    }
}

impl TryFrom<ListEntry> for Listed {
    type Error = base64::DecodeError;

    fn try_from(entry: ListEntry) -> Result<Self, Self::Error> {
        let ListEntry { key, rev, size, expires_in_ms, value_base64 } = entry;
        let value = value_base64.map(|value| STANDARD.decode(value)).transpose()?;
        Ok(Self { key, rev, size, expires_in: expires_in_ms.map(Duration::from_millis), value })
    }
}

/// A field that this reply must have.
fn there<T>(field: Option<T>, name: &str) -> Result<T, KvError> {
    field.ok_or_else(|| KvError::invalid(format!("a result without \"{name}\"")))
}

fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T, KvError> {
    serde_json::from_slice(body).map_err(KvError::invalid)
}

/// Whole milliseconds, rounded up so that no time becomes none; the host bounds them.
fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}
