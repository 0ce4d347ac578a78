//! The key-value store: the operations of `docs/protocol.md`, section 5, on a plugin's own namespace.

use super::{MaybeFault, Store, StoreError, Ticket, Transaction, now_ms};
use crate::protocol::message::{
    DEFAULT_LIST_LIMIT, DeleteOp, IncrOp, KvOp, KvResult, ListEntry, ListOp, MAX_BODY, MAX_KEY, MAX_LIST_LIMIT, MAX_TTL_MS,
    MAX_TXN_OPS, SetOp, TxnOp, WriteOutcome,
};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use rusqlite::{Connection, OptionalExtension, params};
use serde_json::Value;
use std::collections::HashMap;
use std::collections::hash_map::Entry as MapEntry;

/// Quota of each plugin's namespace.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Quota {
    /// Keys.
    pub(crate) keys: u64,
    /// Bytes of keys and values.
    pub(crate) bytes: u64,
}

/// Why an operation failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KvError {
    /// The request is malformed.
    #[error("{0}")]
    BadRequest(String),
    /// The key is malformed.
    #[error("{0}")]
    BadKey(String),
    /// A precondition does not hold.
    #[error("{0}")]
    Conflict(String),
    /// The namespace is full.
    #[error("{0}")]
    Quota(String),
    /// One write of a `txn` failed.
    #[error("write {index}: {error}")]
    Txn {
        /// Index of the write, from 0.
        index: usize,
        /// The error of that write.
        error: Box<KvError>,
    },
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<rusqlite::Error> for KvError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Store(error.into())
    }
}

impl KvError {
    /// The code of the plugin protocol.
    pub(crate) fn code(&self) -> &'static str {
        match self {
            Self::BadRequest(_) => "bad_request",
            Self::BadKey(_) => "bad_key",
            Self::Conflict(_) => "conflict",
            Self::Quota(_) => "quota",
            Self::Txn { error, .. } => error.code(),
            Self::Store(error) => error.code(),
        }
    }

    /// The message that a plugin gets.
    pub(crate) fn message(&self) -> String {
        match self.fault() {
            Some(error) if !error.is_public() => "the host's store failed; the host's log has the reason".into(),
            _ => self.to_string(),
        }
    }

    /// Index of the write of a `txn` that failed.
    pub(crate) fn index(&self) -> Option<usize> {
        match self {
            Self::Txn { index, .. } => Some(*index),
            _ => None,
        }
    }
}

impl MaybeFault for KvError {
    fn fault(&self) -> Option<&StoreError> {
        match self {
            Self::Txn { error, .. } => error.fault(),
            Self::Store(error) => Some(error),
            _ => None,
        }
    }
}

/// The answer to an operation: the head of the reply, without its id, and the body.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    pub(crate) result: KvResult,
    pub(crate) body: Vec<u8>,
}

/// A pending operation.
pub(crate) enum Call {
    /// Answered without a commit.
    Done(Result<Answer, KvError>),
    /// Waiting for its commit.
    Pending(Ticket<Answer, KvError>),
}

impl Call {
    /// Waits for the answer, which comes after the write is synced.
    pub(crate) fn wait(self) -> Result<Answer, KvError> {
        match self {
            Self::Done(answer) => answer,
            Self::Pending(ticket) => ticket.wait(),
        }
    }
}

/// A validated write.
enum Write {
    Set { set: SetOp, value: Vec<u8> },
    Delete(DeleteOp),
    Incr(IncrOp),
}

impl Store {
    /// Starts an operation in a plugin's namespace. A read sees every write that was answered before it.
    pub(crate) fn kv(&self, plugin: &str, op: KvOp, body: &[u8]) -> Call {
        let begun = match op {
            KvOp::Get { key } => return Call::Done(self.kv_get(plugin, &key)),
            KvOp::List(list) => return Call::Done(self.kv_list(plugin, &list)),
            KvOp::Set(set) => Write::set(set, body.to_vec()).and_then(|write| self.kv_write(plugin, write)),
            KvOp::Delete(delete) => Write::delete(delete).and_then(|write| self.kv_write(plugin, write)),
            KvOp::Incr(incr) => Write::incr(incr).and_then(|write| self.kv_write(plugin, write)),
            KvOp::Txn => parse_txn(body).and_then(|writes| self.kv_txn(plugin, writes)),
        };
        begun.map_or_else(|error| Call::Done(Err(error)), Call::Pending)
    }

    fn kv_get(&self, plugin: &str, key: &str) -> Result<Answer, KvError> {
        check_key(key)?;
        let now = now_ms();
        let found = self.read(|connection| {
            let sql = "SELECT rev, expires_at, value FROM kv WHERE plugin = ?1 AND key = ?2 AND (expires_at IS NULL OR expires_at > ?3)";
            let row = |row: &rusqlite::Row<'_>| Ok((row.get::<_, u64>(0)?, row.get::<_, Option<i64>>(1)?, row.get::<_, Vec<u8>>(2)?));
            Ok(connection.prepare_cached(sql)?.query_row(params![plugin, key, now], row).optional()?)
        })?;
        Ok(match found {
            None => Answer { result: KvResult { found: Some(false), ..KvResult::default() }, body: Vec::new() },
            Some((rev, expires_at, body)) => {
                let expires_in_ms = remaining(expires_at, now);
                Answer { result: KvResult { found: Some(true), rev: Some(rev), expires_in_ms, ..KvResult::default() }, body }
            }
        })
    }

    fn kv_list(&self, plugin: &str, list: &ListOp) -> Result<Answer, KvError> {
        let limit = list.limit.unwrap_or(DEFAULT_LIST_LIMIT);
        if !(1..=MAX_LIST_LIMIT).contains(&limit) {
            return Err(KvError::BadRequest(format!("the limit {limit} is not within 1-{MAX_LIST_LIMIT}")));
        }
        if list.prefix.len() > MAX_KEY {
            return Err(KvError::BadKey(format!("the prefix of {} bytes is over the limit of {MAX_KEY}", list.prefix.len())));
        }
        if let Some(length) = list.after.as_ref().map(String::len).filter(|length| *length > MAX_KEY) {
            return Err(KvError::BadKey(format!("the after of {length} bytes is over the limit of {MAX_KEY}")));
        }
        let now = now_ms();
        let after = list.after.as_deref().filter(|after| *after >= list.prefix.as_str());
        let mut page = Page::default();
        self.read(|connection| {
            let bound = if after.is_some() { ">" } else { ">=" };
            let value = if list.values { "value" } else { "NULL" };
            let sql = format!(
                "SELECT key, rev, octet_length(value), expires_at, {value} FROM kv \
                 WHERE plugin = ?1 AND key {bound} ?2 AND (expires_at IS NULL OR expires_at > ?3) ORDER BY key"
            );
            let mut statement = connection.prepare_cached(&sql)?;
            let mut rows = statement.query(params![plugin, after.unwrap_or(&list.prefix), now])?;
            while let Some(row) = rows.next()? {
                let value: Option<Vec<u8>> = row.get(4)?;
                let entry = ListEntry {
                    key: row.get(0)?,
                    rev: row.get(1)?,
                    size: row.get(2)?,
                    expires_in_ms: remaining(row.get(3)?, now),
                    value_base64: value.map(|value| BASE64.encode(value)),
                };
                if !entry.key.starts_with(&list.prefix) {
                    break;
                }
                if page.entries == limit || !page.add(entry) {
                    page.next = page.last.clone();
                    break;
                }
            }
            Ok(())
        })?;
        Ok(Answer { result: KvResult { next: page.next.take(), ..KvResult::default() }, body: page.finish() })
    }

    fn kv_write(&self, plugin: &str, write: Write) -> Result<Ticket<Answer, KvError>, KvError> {
        let (plugin, quota) = (plugin.to_owned(), self.inner.quota);
        // A single write changes the database in its last step only; removing expired keys is right in any case.
        Ok(self.begin_change(false, write.frees(), move |transaction| {
            let WriteOutcome { found, rev, value } = transaction.namespace(&plugin, quota)?.apply(&write)?;
            Ok(Answer { result: KvResult { found, rev, value, ..KvResult::default() }, body: Vec::new() })
        })?)
    }

    fn kv_txn(&self, plugin: &str, writes: Vec<Write>) -> Result<Ticket<Answer, KvError>, KvError> {
        let (plugin, quota) = (plugin.to_owned(), self.inner.quota);
        Ok(self.begin_change(true, writes.iter().all(Write::frees), move |transaction| {
            let mut namespace = transaction.namespace(&plugin, quota)?;
            let apply = |(index, write)| namespace.apply(write).map_err(|error| KvError::Txn { index, error: Box::new(error) });
            let outcomes = writes.iter().enumerate().map(apply).collect::<Result<Vec<_>, _>>()?;
            let body = serde_json::to_vec(&outcomes).map_err(|error| KvError::BadRequest(error.to_string()))?;
            Ok(Answer { result: KvResult::default(), body })
        })?)
    }
}

/// A page of `list`, limited to one frame.
struct Page {
    json: String,
    entries: u32,
    last: Option<String>,
    next: Option<String>,
}

impl Default for Page {
    fn default() -> Self {
        Self { json: "[".into(), entries: 0, last: None, next: None }
    }
}

impl Page {
    fn finish(mut self) -> Vec<u8> {
        self.json.push(']');
        self.json.into_bytes()
    }

    /// Adds an entry, or reports that the page is full. Leaves out a value that no page could hold.
    fn add(&mut self, mut entry: ListEntry) -> bool {
        let encode = |entry: &ListEntry| serde_json::to_string(entry).unwrap_or_default();
        let mut json = encode(&entry);
        if json.len() + 2 > MAX_BODY {
            entry.value_base64 = None;
            json = encode(&entry);
        }
        if self.json.len() + json.len() + 2 > MAX_BODY {
            return false;
        }
        if self.entries > 0 {
            self.json.push(',');
        }
        self.json.push_str(&json);
        self.entries += 1;
        self.last = Some(entry.key);
        true
    }
}

impl Write {
    /// Whether it only frees space.
    fn frees(&self) -> bool {
        matches!(self, Self::Delete(_))
    }

    /// The value is within its limit, since neither a frame nor an API request holds a larger one.
    fn set(set: SetOp, value: Vec<u8>) -> Result<Self, KvError> {
        check_key(&set.key)?;
        check_ttl(set.ttl_ms)?;
        if set.if_absent && set.if_rev.is_some() {
            return Err(KvError::BadRequest("if_absent and if_rev exclude each other".into()));
        }
        Ok(Self::Set { set, value })
    }

    fn delete(delete: DeleteOp) -> Result<Self, KvError> {
        check_key(&delete.key)?;
        Ok(Self::Delete(delete))
    }

    fn incr(incr: IncrOp) -> Result<Self, KvError> {
        check_key(&incr.key)?;
        check_ttl(incr.ttl_ms)?;
        Ok(Self::Incr(incr))
    }
}

fn parse_txn(body: &[u8]) -> Result<Vec<Write>, KvError> {
    let ops: Vec<Value> = serde_json::from_slice(body)
        .map_err(|error| KvError::BadRequest(format!("the body is not an array of writes: {error}")))?;
    if !(1..=MAX_TXN_OPS).contains(&ops.len()) {
        return Err(KvError::BadRequest(format!("{} writes are not within 1-{MAX_TXN_OPS}", ops.len())));
    }
    let parse = |(index, op): (usize, Value)| {
        let write = match TxnOp::read(&op) {
            Err(fault) => Err(KvError::BadRequest(fault)),
            Ok(TxnOp::Delete(delete)) => Write::delete(delete),
            Ok(TxnOp::Incr(incr)) => Write::incr(incr),
            Ok(TxnOp::Set { set, value: Some(text), value_base64: None }) => Write::set(set, text.into_bytes()),
            Ok(TxnOp::Set { set, value: None, value_base64: Some(base64) }) => match BASE64.decode(base64) {
                Ok(value) => Write::set(set, value),
                Err(error) => Err(KvError::BadRequest(format!("value_base64: {error}"))),
            },
            Ok(TxnOp::Set { .. }) => Err(KvError::BadRequest("a set has exactly one of value and value_base64".into())),
        };
        write.map_err(|error| KvError::Txn { index, error: Box::new(error) })
    };
    ops.into_iter().enumerate().map(parse).collect()
}

fn check_key(key: &str) -> Result<(), KvError> {
    match key.len() {
        1..=MAX_KEY => Ok(()),
        0 => Err(KvError::BadKey("the key is empty".into())),
        length => Err(KvError::BadKey(format!("the key of {length} bytes is over the limit of {MAX_KEY}"))),
    }
}

fn check_ttl(ttl_ms: Option<u64>) -> Result<(), KvError> {
    match ttl_ms {
        Some(ttl) if !(1..=MAX_TTL_MS).contains(&ttl) => {
            Err(KvError::BadRequest(format!("ttl_ms {ttl} is not within 1-{MAX_TTL_MS}")))
        }
        _ => Ok(()),
    }
}

/// Milliseconds until a key expires.
fn remaining(expires_at: Option<i64>, now: i64) -> Option<u64> {
    expires_at.map(|at| u64::try_from(at.saturating_sub(now)).unwrap_or(0))
}

/// Usage of a plugin's namespace, and its last revision.
#[derive(Clone, Default)]
pub(super) struct Account {
    rev: u64,
    keys: u64,
    bytes: u64,
    /// Whether the transaction has changed it.
    changed: bool,
}

impl Account {
    fn load(connection: &Connection, plugin: &str) -> Result<Self, StoreError> {
        let mut statement = connection.prepare_cached("SELECT kv_rev, kv_keys, kv_bytes FROM plugins WHERE id = ?1")?;
        let account =
            |row: &rusqlite::Row<'_>| Ok(Self { rev: row.get(0)?, keys: row.get(1)?, bytes: row.get(2)?, changed: false });
        Ok(statement.query_row([plugin], account).optional()?.unwrap_or_default())
    }

    fn added(&mut self, keys: u64, bytes: u64) {
        self.keys += keys;
        self.bytes += bytes;
        self.changed = true;
    }

    fn removed(&mut self, keys: u64, bytes: u64) {
        self.keys = self.keys.saturating_sub(keys);
        self.bytes = self.bytes.saturating_sub(bytes);
        self.changed = true;
    }
}

/// The accounts of the plugins that a transaction changes.
pub(super) type Accounts = HashMap<String, Account>;

/// A plugin's namespace inside the writer's transaction.
struct Namespace<'a> {
    connection: &'a Connection,
    plugin: &'a str,
    quota: Quota,
    now: i64,
    account: &'a mut Account,
}

/// An existing key.
struct Entry {
    row: i64,
    rev: u64,
    expires_at: Option<i64>,
    size: u64,
}

impl Transaction<'_> {
    fn namespace<'a>(&'a mut self, plugin: &'a str, quota: Quota) -> Result<Namespace<'a>, StoreError> {
        let connection = self.connection;
        let account = match self.accounts.entry(plugin.to_owned()) {
            MapEntry::Occupied(account) => account.into_mut(),
            MapEntry::Vacant(place) => place.insert(Account::load(connection, plugin)?),
        };
        Ok(Namespace { connection, plugin, quota, now: now_ms(), account })
    }

    /// Writes the changed accounts; call it once, before the commit.
    pub(super) fn save_accounts(&self) -> Result<(), StoreError> {
        for (plugin, account) in self.accounts.iter().filter(|(_, account)| account.changed) {
            let sql = "INSERT INTO plugins (id, kv_rev, kv_keys, kv_bytes) VALUES (?1, ?2, ?3, ?4) ON CONFLICT (id) \
                       DO UPDATE SET kv_rev = excluded.kv_rev, kv_keys = excluded.kv_keys, kv_bytes = excluded.kv_bytes";
            let values = params![plugin, account.rev, account.keys, account.bytes];
            self.connection.prepare_cached(sql)?.execute(values)?;
        }
        Ok(())
    }
}

impl Namespace<'_> {
    fn apply(&mut self, write: &Write) -> Result<WriteOutcome, KvError> {
        match write {
            Write::Set { set, value } => {
                let present = self.find(&set.key)?;
                check_rev(&set.key, set.if_rev, present.as_ref())?;
                if set.if_absent && present.is_some() {
                    return Err(KvError::Conflict(format!("the key {:?} already exists", set.key)));
                }
                let expires_at = self.expiry(set.ttl_ms);
                let rev = self.put(&set.key, value, expires_at, present.as_ref())?;
                Ok(WriteOutcome { rev: Some(rev), ..WriteOutcome::default() })
            }
            Write::Delete(delete) => {
                let present = self.find(&delete.key)?;
                check_rev(&delete.key, delete.if_rev, present.as_ref())?;
                if let Some(entry) = &present {
                    self.connection.prepare_cached("DELETE FROM kv WHERE rowid = ?1")?.execute([entry.row])?;
                    self.account.removed(1, entry.size);
                }
                Ok(WriteOutcome { found: Some(present.is_some()), ..WriteOutcome::default() })
            }
            Write::Incr(incr) => {
                let present = self.find(&incr.key)?;
                let (old, expires_at) = match &present {
                    Some(entry) => (self.number(&incr.key)?, entry.expires_at),
                    None => (0, self.expiry(incr.ttl_ms)),
                };
                let out_of_range =
                    || KvError::BadRequest(format!("{old} plus {} is out of the range of a 64-bit signed integer", incr.delta));
                let sum = old.checked_add(incr.delta).ok_or_else(out_of_range)?;
                let rev = self.put(&incr.key, sum.to_string().as_bytes(), expires_at, present.as_ref())?;
                Ok(WriteOutcome { found: None, rev: Some(rev), value: Some(sum) })
            }
        }
    }

    /// Finds a key. Removes it if it has expired.
    fn find(&mut self, key: &str) -> Result<Option<Entry>, KvError> {
        let sql = "SELECT rowid, rev, expires_at, octet_length(key) + octet_length(value) FROM kv WHERE plugin = ?1 AND key = ?2";
        let entry = |row: &rusqlite::Row<'_>| {
            Ok(Entry { row: row.get(0)?, rev: row.get(1)?, expires_at: row.get(2)?, size: row.get(3)? })
        };
        let found = self.connection.prepare_cached(sql)?.query_row(params![self.plugin, key], entry).optional()?;
        match found {
            Some(entry) if entry.expires_at.is_some_and(|at| at <= self.now) => {
                self.sweep()?;
                Ok(None)
            }
            found => Ok(found),
        }
    }

    fn number(&self, key: &str) -> Result<i64, KvError> {
        let sql = "SELECT value FROM kv WHERE plugin = ?1 AND key = ?2";
        let value: Vec<u8> = self.connection.prepare_cached(sql)?.query_row(params![self.plugin, key], |row| row.get(0))?;
        let number = std::str::from_utf8(&value).ok().and_then(|text| text.parse().ok());
        number.ok_or_else(|| KvError::BadRequest(format!("the value of {key:?} is not a decimal 64-bit signed integer")))
    }

    fn expiry(&self, ttl_ms: Option<u64>) -> Option<i64> {
        ttl_ms.map(|ttl| self.now.saturating_add_unsigned(ttl))
    }

    /// Writes a value under the next revision, within the quota.
    fn put(&mut self, key: &str, value: &[u8], expires_at: Option<i64>, present: Option<&Entry>) -> Result<u64, KvError> {
        let size = (key.len() + value.len()) as u64;
        let old = present.map_or(0, |entry| entry.size);
        let new_key = u64::from(present.is_none());
        let fits = |space: &Self| {
            let Account { keys, bytes, .. } = *space.account;
            keys + new_key <= space.quota.keys && bytes.saturating_sub(old) + size <= space.quota.bytes
        };
        // A change that shrinks the namespace is allowed even if the quota was lowered below its usage.
        if !fits(self) && (size > old || new_key > 0) {
            self.sweep()?;
            if !fits(self) {
                let Quota { keys, bytes } = self.quota;
                return Err(KvError::Quota(format!(
                    "the plugin holds {} of {keys} keys and {} of {bytes} bytes",
                    self.account.keys, self.account.bytes
                )));
            }
        }
        let rev = self.account.rev + 1;
        match present {
            Some(entry) => {
                let sql = "UPDATE kv SET rev = ?2, expires_at = ?3, value = ?4 WHERE rowid = ?1";
                self.connection.prepare_cached(sql)?.execute(params![entry.row, rev, expires_at, value])?;
            }
            None => {
                let sql = "INSERT INTO kv (plugin, key, rev, expires_at, value) VALUES (?1, ?2, ?3, ?4, ?5)";
                self.connection.prepare_cached(sql)?.execute(params![self.plugin, key, rev, expires_at, value])?;
            }
        }
        self.account.removed(0, old);
        self.account.added(new_key, size);
        self.account.rev = rev;
        Ok(rev)
    }

    /// Removes expired keys.
    fn sweep(&mut self) -> Result<(), StoreError> {
        let sql = "SELECT count(*), coalesce(sum(octet_length(key) + octet_length(value)), 0) FROM kv WHERE plugin = ?1 AND expires_at <= ?2";
        let mut statement = self.connection.prepare_cached(sql)?;
        let (keys, bytes): (u64, u64) =
            statement.query_row(params![self.plugin, self.now], |row| Ok((row.get(0)?, row.get(1)?)))?;
        self.connection
            .prepare_cached("DELETE FROM kv WHERE plugin = ?1 AND expires_at <= ?2")?
            .execute(params![self.plugin, self.now])?;
        self.account.removed(keys, bytes);
        Ok(())
    }
}

/// Removes expired keys of all namespaces. Runs in the writer's transaction.
pub(super) fn sweep_all(transaction: &mut Transaction<'_>, quota: Quota) -> Result<(), StoreError> {
    let connection = transaction.connection;
    let mut statement = connection.prepare_cached("SELECT DISTINCT plugin FROM kv WHERE expires_at <= ?1")?;
    let plugins = statement.query_map([now_ms()], |row| row.get::<_, String>(0))?.collect::<Result<Vec<_>, _>>()?;
    for plugin in plugins {
        transaction.namespace(&plugin, quota)?.sweep()?;
    }
    Ok(())
}

fn check_rev(key: &str, if_rev: Option<u64>, present: Option<&Entry>) -> Result<(), KvError> {
    match (if_rev, present) {
        (Some(wanted), Some(entry)) if entry.rev != wanted => {
            Err(KvError::Conflict(format!("the key {key:?} has revision {}, not {wanted}", entry.rev)))
        }
        (Some(wanted), None) => {
            Err(KvError::Conflict(format!("the key {key:?} does not exist, so it does not have revision {wanted}")))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::message::MAX_VALUE;

    fn store(keys: u64, bytes: u64) -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("plugrack.db"), Quota { keys, bytes }).unwrap();
        (dir, store)
    }

    fn call(store: &Store, json: &str, body: &[u8]) -> Result<Answer, KvError> {
        let op: KvOp = serde_json::from_str(json).unwrap();
        store.kv("p", op, body).wait()
    }

    fn code(result: Result<Answer, KvError>) -> &'static str {
        result.unwrap_err().code()
    }

    /// Waits for the clock to pass a time to live, by asking the store.
    fn until_gone(store: &Store, key: &str) {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while call(store, &format!(r#"{{"op":"get","key":"{key}"}}"#), b"").unwrap().result.found == Some(true) {
            assert!(std::time::Instant::now() < deadline);
            std::thread::yield_now();
        }
    }

    #[test]
    fn values_revisions_and_preconditions() {
        let (_dir, store) = store(10, 10_000);
        assert_eq!(call(&store, r#"{"op":"get","key":"a"}"#, b"").unwrap().result.found, Some(false));
        assert_eq!(call(&store, r#"{"op":"set","key":"a"}"#, b"\x00\xff").unwrap().result.rev, Some(1));
        let got = call(&store, r#"{"op":"get","key":"a"}"#, b"").unwrap();
        assert_eq!((got.result.found, got.result.rev, got.body.as_slice()), (Some(true), Some(1), &b"\x00\xff"[..]));
        assert_eq!(code(call(&store, r#"{"op":"set","key":"a","if_absent":true}"#, b"")), "conflict");
        assert_eq!(code(call(&store, r#"{"op":"set","key":"a","if_rev":2}"#, b"")), "conflict");
        assert_eq!(code(call(&store, r#"{"op":"set","key":"b","if_rev":1}"#, b"")), "conflict");
        assert_eq!(call(&store, r#"{"op":"set","key":"a","if_rev":1}"#, b"").unwrap().result.rev, Some(2));
        assert_eq!(code(call(&store, r#"{"op":"delete","key":"a","if_rev":1}"#, b"")), "conflict");
        assert_eq!(call(&store, r#"{"op":"delete","key":"a"}"#, b"").unwrap().result.found, Some(true));
        assert_eq!(call(&store, r#"{"op":"delete","key":"a"}"#, b"").unwrap().result.found, Some(false));
        assert_eq!(call(&store, r#"{"op":"set","key":"a"}"#, b"").unwrap().result.rev, Some(3));
        for bad in [r#"{"op":"get","key":""}"#.to_owned(), format!(r#"{{"op":"set","key":"{}"}}"#, "k".repeat(513))] {
            assert_eq!(code(call(&store, &bad, b"")), "bad_key");
        }
        assert_eq!(code(call(&store, r#"{"op":"set","key":"a","if_rev":1,"if_absent":true}"#, b"")), "bad_request");
        assert_eq!(code(call(&store, r#"{"op":"set","key":"a","ttl_ms":0}"#, b"")), "bad_request");
    }

    #[test]
    fn incr_counts_in_decimal() {
        let (_dir, store) = store(10, 10_000);
        assert_eq!(call(&store, r#"{"op":"incr","key":"n"}"#, b"").unwrap().result.value, Some(1));
        assert_eq!(call(&store, r#"{"op":"incr","key":"n","delta":-5}"#, b"").unwrap().result.value, Some(-4));
        assert_eq!(call(&store, r#"{"op":"get","key":"n"}"#, b"").unwrap().body, b"-4");
        call(&store, r#"{"op":"set","key":"n"}"#, i64::MAX.to_string().as_bytes()).unwrap();
        assert_eq!(code(call(&store, r#"{"op":"incr","key":"n"}"#, b"")), "bad_request");
        call(&store, r#"{"op":"set","key":"n"}"#, b"one").unwrap();
        assert_eq!(code(call(&store, r#"{"op":"incr","key":"n"}"#, b"")), "bad_request");
    }

    #[test]
    fn what_has_expired_is_gone_and_frees_its_room() {
        let (_dir, store) = store(1, 100);
        call(&store, r#"{"op":"set","key":"a","ttl_ms":1}"#, b"x").unwrap();
        until_gone(&store, "a");
        assert_eq!(call(&store, r#"{"op":"incr","key":"a","ttl_ms":60000}"#, b"").unwrap().result.value, Some(1));
        call(&store, r#"{"op":"incr","key":"a"}"#, b"").unwrap();
        let left = call(&store, r#"{"op":"get","key":"a"}"#, b"").unwrap().result.expires_in_ms.unwrap();
        assert!((1..=60000).contains(&left));
        call(&store, r#"{"op":"set","key":"a","ttl_ms":1}"#, b"x").unwrap();
        until_gone(&store, "a");
        call(&store, r#"{"op":"set","key":"b"}"#, b"x").unwrap();
        assert_eq!(code(call(&store, r#"{"op":"set","key":"c"}"#, b"x")), "quota");
    }

    #[test]
    fn the_quota_counts_keys_and_bytes() {
        let (_dir, store) = store(2, 10);
        call(&store, r#"{"op":"set","key":"a"}"#, b"123456789").unwrap();
        assert_eq!(code(call(&store, r#"{"op":"set","key":"b"}"#, b"")), "quota");
        call(&store, r#"{"op":"set","key":"a"}"#, b"1").unwrap();
        call(&store, r#"{"op":"set","key":"b"}"#, b"1").unwrap();
        assert_eq!(code(call(&store, r#"{"op":"set","key":"c"}"#, b"")), "quota");
        call(&store, r#"{"op":"delete","key":"a"}"#, b"").unwrap();
        call(&store, r#"{"op":"set","key":"c"}"#, b"").unwrap();
    }

    #[test]
    fn a_txn_is_all_or_nothing() {
        let (_dir, store) = store(10, 10_000);
        let good = br#"[{"op":"set","key":"a","value":"1"},{"op":"incr","key":"a","delta":2},{"op":"set","key":"b","value_base64":"AP8="},{"op":"delete","key":"x"}]"#;
        let answer = call(&store, r#"{"op":"txn"}"#, good).unwrap();
        assert_eq!(answer.body, br#"[{"rev":1},{"rev":2,"value":3},{"rev":3},{"found":false}]"#);
        assert_eq!(call(&store, r#"{"op":"get","key":"b"}"#, b"").unwrap().body, b"\x00\xff");
        let bad = br#"[{"op":"set","key":"a","value":"9"},{"op":"delete","key":"b","if_rev":99}]"#;
        let error = call(&store, r#"{"op":"txn"}"#, bad).unwrap_err();
        assert_eq!((error.code(), error.index()), ("conflict", Some(1)));
        assert_eq!(call(&store, r#"{"op":"get","key":"a"}"#, b"").unwrap().body, b"3");
        for form in [&b"[]"[..], b"{}", br#"[{"op":"get","key":"a"}]"#, br#"[{"op":"set","key":"a"}]"#] {
            assert_eq!(code(call(&store, r#"{"op":"txn"}"#, form)), "bad_request");
        }
    }

    #[test]
    fn of_one_transaction_only_what_failed_is_undone_and_the_account_is_right() {
        let (dir, store) = store(4, 10_000);
        let other = Connection::open(dir.path().join("plugrack.db")).unwrap();
        // Behind this all that is begun gathers.
        other.execute_batch("BEGIN IMMEDIATE").unwrap();
        let begin = |json: &str, body: &[u8]| store.kv("p", serde_json::from_str(json).unwrap(), body);
        let txn = |body: &[u8]| begin(r#"{"op":"txn"}"#, body);
        let calls = [
            begin(r#"{"op":"set","key":"a"}"#, b"1"),
            txn(br#"[{"op":"set","key":"b","value":"22"},{"op":"delete","key":"a"},{"op":"incr","key":"b","delta":9223372036854775807}]"#),
            begin(r#"{"op":"set","key":"a","if_absent":true}"#, b"2"),
            txn(br#"[{"op":"set","key":"b","value":"333"},{"op":"delete","key":"a"}]"#),
            begin(r#"{"op":"set","key":"c"}"#, b"4444"),
            txn(br#"[{"op":"set","key":"d","value":"5"},{"op":"set","key":"e","value":"6"},{"op":"set","key":"f","value":"7"}]"#),
            begin(r#"{"op":"set","key":"d"}"#, b"55555"),
        ];
        other.execute_batch("ROLLBACK").unwrap();
        let outcomes = calls.map(|call| call.wait().map(|answer| answer.result.rev).map_err(|error| error.code()));
        assert_eq!(
            outcomes,
            [Ok(Some(1)), Err("bad_request"), Err("conflict"), Ok(None), Ok(Some(3)), Err("quota"), Ok(Some(4))],
            "revisions go on as if what failed had not been"
        );
        let account = "SELECT kv_rev, kv_keys, kv_bytes FROM plugins WHERE id = 'p'";
        let account = other.query_row(account, [], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?))).unwrap();
        assert_eq!(account, (4, 3, "b333c4444d55555".len() as u64));
        let keys = "SELECT group_concat(key || value, '') FROM (SELECT key, value FROM kv ORDER BY key)";
        assert_eq!(other.query_row(keys, [], |row| row.get::<_, String>(0)).unwrap(), "b333c4444d55555");
    }

    #[test]
    fn list_pages_through_a_prefix_in_byte_order() {
        let (_dir, store) = store(1000, 10_000_000);
        for key in ["a", "b/1", "b/2", "b/é", "b0", "c"] {
            call(&store, &format!(r#"{{"op":"set","key":"{key}"}}"#), b"v").unwrap();
        }
        let page = |json: &str| {
            let answer = call(&store, json, b"").unwrap();
            let entries: Vec<ListEntry> = serde_json::from_slice(&answer.body).unwrap();
            (entries.into_iter().map(|entry| entry.key).collect::<Vec<_>>(), answer.result.next)
        };
        assert_eq!(page(r#"{"op":"list","prefix":"b/"}"#), (vec!["b/1".into(), "b/2".into(), "b/é".into()], None));
        assert_eq!(page(r#"{"op":"list","prefix":"b/","limit":2}"#), (vec!["b/1".into(), "b/2".into()], Some("b/2".into())));
        assert_eq!(page(r#"{"op":"list","prefix":"b/","limit":2,"after":"b/2"}"#), (vec!["b/é".into()], None));
        assert_eq!(page(r#"{"op":"list","after":"b0"}"#), (vec!["c".into()], None));
        assert_eq!(page(r#"{"op":"list","prefix":"b/","after":"a"}"#).0.len(), 3);
        assert_eq!(code(call(&store, r#"{"op":"list","limit":1001}"#, b"")), "bad_request");
    }

    #[test]
    fn a_page_of_list_fits_a_frame_whatever_it_holds() {
        let (_dir, store) = store(1000, 10_000_000);
        for key in ["a", "b", "c"] {
            call(&store, &format!(r#"{{"op":"set","key":"{key}"}}"#), &vec![7; 400_000]).unwrap();
        }
        call(&store, r#"{"op":"set","key":"d"}"#, &vec![7; MAX_VALUE]).unwrap();
        let (mut after, mut seen) = (String::new(), Vec::new());
        loop {
            let answer = call(&store, &format!(r#"{{"op":"list","values":true,"after":"{after}"}}"#), b"").unwrap();
            assert!(answer.body.len() <= MAX_BODY);
            let entries: Vec<ListEntry> = serde_json::from_slice(&answer.body).unwrap();
            seen.extend(entries.into_iter().map(|entry| (entry.key, entry.value_base64.is_some())));
            match answer.result.next {
                Some(next) => after = next,
                None => break,
            }
        }
        let expected = [("a", true), ("b", true), ("c", true), ("d", false)].map(|(key, value)| (key.to_owned(), value));
        assert_eq!(seen, expected);
    }

    #[test]
    fn namespaces_are_apart_and_survive_reopening() {
        let (dir, store) = store(10, 10_000);
        call(&store, r#"{"op":"set","key":"a"}"#, b"mine").unwrap();
        let other = store.kv("q", KvOp::Get { key: "a".into() }, b"").wait().unwrap();
        assert_eq!(other.result.found, Some(false));
        let id = store.instance_id().unwrap();
        drop(store);
        let again = Store::open(&dir.path().join("plugrack.db"), Quota { keys: 10, bytes: 10_000 }).unwrap();
        assert_eq!(call(&again, r#"{"op":"get","key":"a"}"#, b"").unwrap().body, b"mine");
        assert_eq!(again.instance_id().unwrap(), id);
        assert_eq!(id.get_version_num(), 4);
    }

    #[test]
    fn many_writers_share_a_commit_and_lose_nothing() {
        let (_dir, store) = store(10, 10_000);
        std::thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| (0..50).for_each(|_| drop(call(&store, r#"{"op":"incr","key":"n"}"#, b"").unwrap())));
            }
        });
        assert_eq!(call(&store, r#"{"op":"get","key":"n"}"#, b"").unwrap().body, b"800");
    }

    #[test]
    fn a_newer_or_foreign_database_is_refused() {
        let (dir, store) = store(1, 1);
        drop(store);
        let path = dir.path().join("plugrack.db");
        Connection::open(&path).unwrap().pragma_update(None, "user_version", 99).unwrap();
        let refused = |path: &std::path::Path| match Store::open(path, Quota { keys: 1, bytes: 1 }) {
            Ok(_) => panic!("it was opened"),
            Err(error) => error.to_string(),
        };
        assert!(refused(&path).contains("schema version 99"));
        let foreign = dir.path().join("foreign.db");
        Connection::open(&foreign).unwrap().execute_batch("CREATE TABLE t (a)").unwrap();
        assert_eq!(refused(&foreign), "the file is not a plugrack database");
    }
}
