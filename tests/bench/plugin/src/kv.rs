//! The key-value store, used and timed by the plugin itself, so that what is measured is what a handler waits for.
//! Each task answers with its figures as JSON.

use plugrack_sdk::{Error, Kv, KvError, Write};
use std::thread;
use std::time::{Duration, Instant};

/// Writes in one transaction: the most there may be.
const BATCH: u64 = 128;

/// The longest task: the host gives an answer 30 s to begin.
const MAX_TIME: Duration = Duration::from_secs(20);

const VALUE: &[u8] = &[b'v'; 100];

/// Performs `fill`, `get` or `set`:
///
/// - `fill` makes the keys `from` … `to`, with `threads` side by side;
/// - `get` and `set` read or write keys all over 0 … `keys` for `ms` milliseconds, with `threads` side by side.
pub(crate) fn run(task: &str, query: &str, kv: &Kv) -> Result<String, Error> {
    let field = |name: &str| number(query, name);
    let threads = field("threads")?;
    match task {
        "fill" => fill(kv, field("from")?, field("to")?, threads),
        "get" => use_keys(kv, field("keys")?, field("ms")?, threads, |kv, key| match kv.get(key)? {
            Some(value) if value == VALUE => Ok(()),
            other => Err(format!("{key} holds {other:?}").into()),
        }),
        "set" => use_keys(kv, field("keys")?, field("ms")?, threads, |kv, key| Ok(kv.set(key, VALUE).map(drop)?)),
        other => Err(format!("no task {other}").into()),
    }
}

fn number(query: &str, name: &str) -> Result<u64, Error> {
    let value = query.split('&').filter_map(|pair| pair.split_once('=')).find(|(key, _)| *key == name);
    let (_, value) = value.ok_or_else(|| format!("{name} is missing"))?;
    Ok(value.parse()?)
}

fn key(number: u64) -> String {
    format!("key/{number:09}")
}

fn fill(kv: &Kv, from: u64, to: u64, threads: u64) -> Result<String, Error> {
    let begun = Instant::now();
    let write = |first: u64| -> Result<(), KvError> {
        let mut at = first;
        while at < to {
            let end = to.min(at + BATCH);
            kv.txn(&(at..end).map(|number| Write::set(key(number), VALUE)).collect::<Vec<_>>())?;
            at += BATCH * threads;
        }
        Ok(())
    };
    side_by_side(threads, |thread| Ok(write(from + thread * BATCH)?))?;
    Ok(format!("{{\"keys\":{},\"seconds\":{}}}", to.saturating_sub(from), begun.elapsed().as_secs_f64()))
}

fn use_keys(
    kv: &Kv,
    keys: u64,
    ms: u64,
    threads: u64,
    operation: impl Fn(&Kv, &str) -> Result<(), Error> + Sync,
) -> Result<String, Error> {
    let begun = Instant::now();
    let end = begun + Duration::from_millis(ms).min(MAX_TIME);
    let times = side_by_side(threads, |thread| {
        let mut times = Vec::new();
        // A step that is prime and no small part of the keys goes all over them.
        let mut at = thread.wrapping_mul(7_919) % keys;
        let mut before = Instant::now();
        while before < end {
            operation(kv, &key(at))?;
            let after = Instant::now();
            times.push(after - before);
            before = after;
            at = (at + 611_953) % keys;
        }
        Ok(times)
    })?;
    let elapsed = begun.elapsed().as_secs_f64();
    let mut times: Vec<Duration> = times.into_iter().flatten().collect();
    times.sort_unstable();
    let at = |percent: usize| times.get(times.len() * percent / 100).map_or(0.0, |time| time.as_secs_f64() * 1e6);
    let rate = f64::from(u32::try_from(times.len())?) / elapsed;
    Ok(format!("{{\"rate\":{rate},\"p50_us\":{},\"p99_us\":{}}}", at(50), at(99)))
}

/// What each thread has to show, or what the first that failed says.
fn side_by_side<T: Send>(threads: u64, work: impl Fn(u64) -> Result<T, Error> + Sync) -> Result<Vec<T>, Error> {
    thread::scope(|scope| {
        let work = &work;
        let mut running = Vec::new();
        for number in 0..threads {
            let name = format!("kv-{number}");
            running.push(thread::Builder::new().name(name).spawn_scoped(scope, move || work(number))?);
        }
        running.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err("a thread panicked".into()))).collect()
    })
}
