//! What was acknowledged is there, whoever is killed when.
//!
//! Plugins write without end: each thread increments a counter of its own, sets keys of its own to a rising number, and sets two keys
//! to the same number in a transaction, now one after another, now all in one go. Each acknowledgement goes to a file outside of the host's
//! directory before the next write is sent. So for every key there are at most two values it may have after a kill: that of the
//! last write that was acknowledged, and that of the one write after it that may have been under way.

use crate::support::{Server, Site, command, pause, wait_for};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Writing threads of each plugin.
const THREADS: u64 = 3;

const PLUGINS: [&str; 2] = ["p", "q"];

/// Rounds unless `PLUGRACK_ROUNDS` says otherwise.
const ROUNDS: u64 = 5;

/// More writes than a thread makes in a round: each round numbers its own from here.
const NUMBERS: u64 = 1_000_000;

/// Numbers that look random and follow from the seed (splitmix64).
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }
}

/// The keys of a plugin, and their values.
type Values = BTreeMap<String, String>;

/// What a write does to which keys, by its thread, number and kind; `from` is the counter before it.
fn outcome(thread: u64, number: u64, kind: &str, from: u64) -> Vec<(String, String)> {
    let key = |name: String| format!("w{thread}/{name}");
    match kind {
        "incr" => vec![(key("n".into()), (from + 1).to_string())],
        "set" => vec![(key(format!("s{}", number % 8)), format!("{number} {}", "x".repeat(3000)))],
        "txn" => ["a", "b"].map(|side| (key(format!("{side}{}", number % 4)), number.to_string())).into(),
        other => panic!("a write failed: {other}"),
    }
}

/// What is known of a plugin's keys: those that must be there, and those that a write under way may have set besides.
struct Known {
    values: Values,
    /// What each write sets that may have been made after the last acknowledged one of its thread and kind: all of it, or nothing.
    under_way: Vec<Vec<(String, String)>>,
}

impl Known {
    /// Of what was there at the beginning of a round, and what was acknowledged in it.
    fn new(before: &Values, acknowledged: &str, first: u64) -> Self {
        let mut values = before.clone();
        let counter = |values: &Values, thread| values.get(&format!("w{thread}/n")).map_or(0, |count| count.parse().unwrap());
        let mut last = BTreeMap::new();
        for line in acknowledged.lines() {
            let [thread, number, rest] = line.splitn(3, ' ').collect::<Vec<_>>()[..] else { panic!("{line:?}") };
            let (kind, sum) = rest.rsplit_once(' ').unwrap();
            let (thread, number) = (thread.parse().unwrap(), number.parse().unwrap());
            let writes = outcome(thread, number, kind, counter(&values, thread));
            if kind == "incr" {
                assert_eq!(writes[0].1, sum, "a thread's own counter went astray");
            }
            values.extend(writes);
            let due = last.insert((thread, kind.to_owned()), number).map_or(first, |last| last + 1);
            assert_eq!(number, due, "a {kind} of thread {thread} was passed over");
        }
        let kinds = (0..THREADS).flat_map(|thread| ["incr", "set", "txn"].map(|kind| (thread, kind.to_owned())));
        let under_way = kinds.map(|(thread, kind)| {
            let number = last.get(&(thread, kind.clone())).map_or(first, |last| last + 1);
            outcome(thread, number, &kind, counter(&values, thread))
        });
        let under_way = under_way.collect();
        Self { values, under_way }
    }

    /// Checks what is there. What was under way may be there, whole.
    #[track_caller]
    fn check(mut self, there: &Values, context: &str) {
        for write in self.under_way {
            let made = write.iter().filter(|(key, value)| there.get(key) == Some(value)).count();
            assert!(made == 0 || made == write.len(), "{context}: half of a transaction: {write:?}");
            if made > 0 {
                self.values.extend(write);
            }
        }
        for (key, value) in &self.values {
            let found = there.get(key);
            assert!(found == Some(value), "{context}: {key} is {found:.40?} and was acknowledged as {value:.40}");
        }
        assert_eq!(there.len(), self.values.len(), "{context}: there are keys that nobody has written");
    }
}

/// All that a plugin has stored, as it sees it itself.
#[track_caller]
fn stored(server: &Server, plugin: &str) -> Values {
    let head = json!({"op": "list", "values": true, "limit": 1000}).to_string();
    let reply = server.request("POST", &format!("/{plugin}/kv"), &[], head.as_bytes()).json();
    assert_eq!(reply["head"]["next"], Value::Null);
    let entries: Vec<Value> = serde_json::from_str(reply["body"].as_str().unwrap()).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let value = |entry: &Value| String::from_utf8(BASE64.decode(text(&entry["value_base64"])).unwrap()).unwrap();
    entries.iter().map(|entry| (text(&entry["key"]), value(entry))).collect()
}

fn integrity(data: &Path) -> String {
    let database = rusqlite::Connection::open(data.join("plugrack.db")).unwrap();
    database.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap()
}

/// The number a variable gives.
fn setting(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|value| value.parse().unwrap_or_else(|_| panic!("{variable} is a number")))
}

#[test]
fn what_was_acknowledged_is_there_whoever_is_killed_when() {
    let clock = || u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros()).unwrap();
    let seed = setting("PLUGRACK_SEED").unwrap_or_else(clock);
    let rounds = setting("PLUGRACK_ROUNDS").unwrap_or(ROUNDS);
    eprintln!("PLUGRACK_SEED={seed}");
    let mut dice = Dice(seed);
    let acks = tempfile::tempdir().unwrap();
    let mut server = PLUGINS.iter().fold(Site::new(), |site, id| site.fake(id)).start();
    let mut before = PLUGINS.map(|_| Values::new());
    let mut acknowledged = 0;
    for round in 0..rounds {
        let first = (round + 1) * NUMBERS;
        let ack = |plugin: &str| acks.path().join(format!("{plugin}{round}"));
        for plugin in PLUGINS {
            let path = format!("/{plugin}/load?threads={THREADS}&from={first}&log={}", ack(plugin).display());
            assert_eq!(server.get(&path).text(), "loading");
        }
        wait_for("both to write", || {
            PLUGINS.iter().all(|plugin| fs::metadata(ack(plugin)).is_ok_and(|log| log.len() > 0)).then_some(())
        });
        pause(Duration::from_millis(dice.below(600)));
        // In every other round one of the plugins goes first, and the host goes on.
        if round % 2 == 1 {
            let (victim, before) = if dice.below(2) == 0 { (PLUGINS[0], &before[0]) } else { (PLUGINS[1], &before[1]) };
            kill_plugin(&server, victim);
            let there = stored(&server, victim);
            Known::new(before, &read(&ack(victim)), first).check(&there, &format!("seed {seed}, round {round}, {victim} killed"));
            pause(Duration::from_millis(dice.below(200)));
        }
        server = server.kill().start();
        let context = format!("seed {seed}, round {round}, host killed");
        assert_eq!(integrity(server.site().data()), "ok", "{context}");
        for (plugin, before) in PLUGINS.iter().zip(&mut before) {
            let log = read(&ack(plugin));
            acknowledged += log.lines().count();
            let there = stored(&server, plugin);
            Known::new(before, &log, first).check(&there, &context);
            *before = there;
        }
    }
    eprintln!("{acknowledged} writes were acknowledged in {rounds} rounds");
}

fn read(log: &PathBuf) -> String {
    fs::read_to_string(log).unwrap()
}

/// Kills a plugin's process alone, and waits until the next one is ready.
fn kill_plugin(server: &Server, plugin: &str) {
    let pid = server.wait_state(plugin, "ready")["process"]["pid"].as_i64().unwrap();
    assert!(command("kill").args(["-s", "KILL", &pid.to_string()]).status().unwrap().success());
    server.wait_restarted(plugin, pid);
}
