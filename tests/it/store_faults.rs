//! The store on a disk that is full, read-only, failing or damaged, and behind another program's lock: each write is answered in time
//! and either done or not, the operator is told what it is and what to do, and when it is over the next write just works.

use crate::kv::{Answer, Wire, request};
use crate::support::strain::{Disk, PAGE};
use crate::support::{Server, Site, pause, wait_for};
use rusqlite::Connection;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

const FULL: &str = "the disk that plugrack.db is on is full: free space there, then try again";
const LOCKED: &str =
    "another program has locked plugrack.db for more than 5 s: end that program (fuser plugrack.db names it), then try again";
const DAMAGED: &str =
    "stop the host, then restore a backup, or save what can be read with: sqlite3 plugrack.db .recover | sqlite3 saved.db";

/// What a plugin's keys must hold: that of its last acknowledged writes.
type Values = BTreeMap<String, Vec<u8>>;

/// Sets one of eight keys of a wire's own, and notes it once it is acknowledged.
#[track_caller]
fn set(wire: &mut Wire<'_>, name: &str, number: usize, values: &mut Values) -> Answer {
    let (key, value) = (format!("{name}{}", number % 8), format!("{number} {}", "x".repeat(5000)).into_bytes());
    let answer = wire.ask(&json!({"op": "set", "key": key}), &value);
    if answer.head["type"] == "result" {
        values.insert(key, value);
    }
    answer
}

/// Sets a key that was not there yet, so that the database has to grow, and notes it once it is acknowledged.
#[track_caller]
fn add(wire: &mut Wire<'_>, number: usize, values: &mut Values) -> Answer {
    set(wire, &format!("{number}/"), number, values)
}

/// Small writes and a large one that come to one transaction, because a lock lets them gather: what each is answered. All of them let the
/// database grow.
#[track_caller]
fn together(server: &Server) -> Vec<Answer> {
    let sized = |n: u64, size| request(n, &json!({"op": "set", "key": format!("shared{n}")}), &vec![b'x'; size]);
    let other = Connection::open(server.site().data().join("plugrack.db")).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    // A connection each: the host reads a frame behind a write only when that is done.
    let sent: Vec<_> =
        [5000, 5000, 1024 * 1024].into_iter().zip(0..).map(|(size, n)| (Wire::new(server, "p", &n), sized(n, size))).collect();
    sent.iter().for_each(|(wire, bytes)| assert!(wire.send(bytes, 0).is_empty()));
    pause(Duration::from_millis(300));
    other.execute_batch("ROLLBACK").unwrap();
    let answers: Vec<_> = sent.iter().flat_map(|(wire, _)| wire.send(b"", 1)).collect();
    assert_eq!(answers.len(), sent.len());
    answers
}

/// Checks that a plugin has what it must have, and nothing else.
#[track_caller]
fn check_values(server: &Server, plugin: &str, values: &Values) {
    let mut wire = Wire::new(server, plugin, "check");
    let listed = wire.ask(&json!({"op": "list", "limit": 1000}), b"");
    let keys: Vec<Value> = serde_json::from_slice(&listed.body).unwrap();
    let found: Values =
        keys.iter().map(|entry| entry["key"].as_str().unwrap()).map(|key| (key.into(), wire.get(key).body)).collect();
    assert!(found == *values, "{plugin} has {:?}, and {:?} was acknowledged", found.keys(), values.keys());
}

/// Checks the database as a whole, and that the accounts of the namespaces are those of their keys.
#[track_caller]
fn check_database(data: &Path) {
    let database = Connection::open(data.join("plugrack.db")).unwrap();
    let one = |sql: &str| database.query_row(sql, [], |row| row.get::<_, rusqlite::types::Value>(0)).unwrap();
    assert_eq!(one("PRAGMA integrity_check"), "ok".to_owned().into());
    let wrong = one("SELECT count(*) FROM plugins WHERE
        (kv_keys, kv_bytes) != (SELECT count(*), coalesce(sum(octet_length(key) + octet_length(value)), 0) FROM kv WHERE plugin = id)
        OR kv_rev < (SELECT coalesce(max(rev), 0) FROM kv WHERE plugin = id)");
    assert_eq!(wrong, 0.into());
}

/// Starts a host, and waits until it listens or has ended: its exit code in that case, and what it said. Then it is gone.
#[track_caller]
fn try_start(site: &Site) -> (Option<i32>, String) {
    let listens = site.data().join("run/listen");
    let errors = tempfile::NamedTempFile::new().unwrap();
    let mut host = site.serve().stderr(errors.reopen().unwrap()).spawn().unwrap();
    let code = wait_for("the host to end or to listen", || match host.try_wait().unwrap() {
        Some(status) => Some(status.code()),
        None => fs::metadata(&listens).is_ok_and(|file| file.len() > 0).then_some(None),
    });
    host.kill().unwrap();
    host.wait().unwrap();
    (code, fs::read_to_string(errors.path()).unwrap())
}

/// A host that cannot start says so in one sentence.
#[track_caller]
fn check_refused(site: &Site, sentence: &str) {
    let (code, said) = try_start(site);
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.lines().count() == 1 && said.starts_with("plugrack: ") && said.contains(sentence),
        "{sentence:?} is not: {said}"
    );
    assert!(said.contains(site.data().to_str().unwrap()), "it names no file: {said}");
}

/// What the operator is told, by the API and by the commands that change something.
#[track_caller]
fn check_operator(server: &Server, status: u16, code: &str, sentence: &str) {
    let value = "1".repeat(5000);
    let mut commands = vec![vec!["kv", "set", "p", "operator", &value], vec!["config", "set", "p", "a", &value]];
    // What fits in the space that is held is done on a full disk as well.
    if code != "no_space" {
        commands.push(vec!["disable", "p"]);
    }
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (got, answer) = server.api("PUT", "/plugins/p/config/a", format!("{:?}", "1".repeat(5000)).as_bytes());
            assert_eq!((got, &answer["error"]["code"]), (status, &json!(code)), "{answer}");
            assert!(answer["error"]["message"].as_str().unwrap().contains(sentence), "{answer}");
        });
        for arguments in &commands {
            scope.spawn(move || {
                let said = server.cli_fails(arguments);
                assert!(said.contains(sentence), "{arguments:?}: {said}");
            });
        }
    });
}

/// How many lines of the host's log hold some words.
fn logged(server: &Server, words: &str) -> usize {
    server.log().lines().filter(|line| line.contains(words)).count()
}

#[test]
fn a_full_disk_refuses_writes_loses_none_and_takes_them_again_once_there_is_space() {
    let site = Site::new();
    let Some(disk) = Disk::in_memory(&site, "12m") else { return };
    let server = site.fake("p").fake("q").start();
    let mut values = [Values::new(), Values::new()];
    for round in 0..2 {
        disk.fill(0);
        std::thread::scope(|scope| {
            for (plugin, values) in ["p", "q"].into_iter().zip(&mut values) {
                let server = &server;
                scope.spawn(move || {
                    let mut wire = Wire::new(server, plugin, "w");
                    let (mut number, mut refused) = (round * 5000, 0);
                    while refused < 20 {
                        let answer = add(&mut wire, number, values);
                        if answer.head["type"] == "error" {
                            assert_eq!((answer.code(), &answer.head["message"]), ("no_space", &json!(FULL)));
                            refused += 1;
                        }
                        number += 1;
                        assert!(number < (round + 1) * 5000, "the disk is not full");
                    }
                });
            }
        });
        for answer in together(&server) {
            assert_eq!((answer.code(), &answer.head["message"]), ("no_space", &json!(FULL)));
        }
        check_operator(&server, 507, "no_space", FULL);
        assert_eq!(server.plugin("p")["state"], "ready");
        for (plugin, values) in ["p", "q"].iter().zip(&values) {
            check_values(&server, plugin, values);
        }
        disk.free();
        for (plugin, values) in ["p", "q"].into_iter().zip(&mut values) {
            let answer = set(&mut Wire::new(&server, plugin, "w"), "w", 3, values);
            assert_eq!(answer.head["type"], "result", "{answer:?}");
        }
    }
    assert_eq!([logged(&server, FULL), logged(&server, "plugrack.db: writes work again")], [1, 1], "{}", server.log());
    let (status, site) = server.stop();
    assert!(status.success());
    check_database(site.data());
    let server = site.start();
    for (plugin, values) in ["p", "q"].iter().zip(&values) {
        check_values(&server, plugin, values);
    }
}

/// What only frees space is done at any fill, whoever has filled the disk, by the operator and by plugins, before and after a restart.
/// Then what the other plugins write fits again, as long as the database need not grow beyond what it had.
#[test]
fn on_a_full_disk_deletes_work_and_make_space() {
    for (size, outside) in [("3m", false), ("3m", true), ("6m", false), ("6m", true)] {
        let site = Site::new();
        let Some(disk) = Disk::in_memory(&site, size) else { return };
        let mut server = site.fake("p").fake("q").start();
        let mut values = [Values::new(), Values::new()];
        let other = Connection::open(server.site().data().join("plugrack.db")).unwrap();
        other.execute("INSERT INTO licenses (plugin, token) VALUES ('p', 'some')", []).unwrap();
        drop(other);
        assert_eq!(server.api("PUT", "/plugins/p/config/a", b"1").0, 200);
        set(&mut Wire::new(&server, "q", "w"), "w", 0, &mut values[1]);
        let mut wire = Wire::new(&server, "p", "w");
        let written = (0..3000).take_while(|number| {
            if outside && *number == 200 {
                disk.fill(0);
            }
            add(&mut wire, *number, &mut values[0]).head["type"] == "result"
        });
        let written = written.count();
        assert!((200..3000).contains(&written), "{written} of {size}, {outside}");
        for number in 0..100 {
            // Neither a clean end nor a kill makes it worse.
            if number == 30 {
                server = server.stop().1.start();
                server.wait_state("p", "ready");
            } else if number == 60 {
                server = server.kill().start();
                server.wait_state("p", "ready");
            }
            let key = format!("{number}/{}", number % 8);
            assert!(values[0].remove(&key).is_some());
            if number % 2 == 0 {
                let path = format!("/plugins/p/kv/{}", key.replace('/', "%2F"));
                assert_eq!(server.api("DELETE", &path, b"").0, 200, "{key} of {written}, {size}, {outside}");
            } else {
                let answer = Wire::new(&server, "p", "w").ask(&json!({"op": "delete", "key": key}), b"");
                assert_eq!(answer.head["found"], true, "{answer:?}, {size}, {outside}");
            }
        }
        let many: Vec<_> = (100..200).map(|number| format!("{number}/{}", number % 8)).collect();
        let deletes: Vec<_> = many.iter().map(|key| json!({"op": "delete", "key": key})).collect();
        let answer = Wire::new(&server, "p", "w").ask(&json!({"op": "txn"}), json!(deletes).to_string().as_bytes());
        assert_eq!(answer.head["type"], "result", "{answer:?}, {size}, {outside}");
        many.iter().for_each(|key| drop(values[0].remove(key)));
        for path in ["/plugins/p/config/a", "/plugins/p/license"] {
            assert_eq!(server.api("DELETE", path, b"").0, 200, "{path}, {size}, {outside}");
        }
        server.wait_state("q", "ready");
        for number in 1..100 {
            let answer = add(&mut Wire::new(&server, "q", "w"), number, &mut values[1]);
            assert_eq!(answer.head["type"], "result", "{answer:?}, {number}, {size}, {outside}");
        }
        let server = server.kill().start();
        for (plugin, values) in ["p", "q"].iter().zip(&values) {
            server.wait_state(plugin, "ready");
            check_values(&server, plugin, values);
        }
        check_database(server.stop().1.data());
    }
}

/// However far the first start comes, the next one is not hindered by what it left.
#[test]
fn a_first_start_on_a_full_disk_leaves_nothing_that_breaks_the_next() {
    for left in [0, 1, 2, 4, 8, 16, 20, 24, 28, 32] {
        let site = Site::new();
        let Some(disk) = Disk::in_memory(&site, "1m") else { return };
        disk.fill(left);
        let (code, said) = try_start(&site);
        assert!(left > 0 || code.is_some(), "there was space");
        if code.is_some() {
            let last = said.lines().last().unwrap_or_default();
            assert_eq!(code, Some(1), "{said}");
            assert!(last.starts_with("plugrack: ") && (last.contains(FULL) || last.contains("No space left")), "{left}: {said}");
        }
        disk.free();
        let server = site.fake("p").start();
        assert_eq!(Wire::new(&server, "p", "w").ask(&json!({"op": "set", "key": "a"}), b"1").head["rev"], 1);
        assert_eq!(server.api("GET", "/instance", b"").1["instance_id"].as_str().unwrap().len(), 36);
    }
}

#[test]
fn a_host_starts_on_a_full_disk_and_serves_what_it_has() {
    let site = Site::new();
    let Some(disk) = Disk::in_memory(&site, "2m") else { return };
    let server = site.fake("p").start();
    let mut values = Values::new();
    set(&mut Wire::new(&server, "p", "w"), "w", 1, &mut values);
    let (_, mut site) = server.stop();
    // Twice: the space that was set aside is set aside again.
    for round in 0..2 {
        disk.fill(0);
        let server = site.start();
        server.wait_state("p", "ready");
        check_values(&server, "p", &values);
        let mut wire = Wire::new(&server, "p", "w");
        let full = (2..1000).find(|number| add(&mut wire, round * 1000 + number, &mut values).head["type"] == "error");
        assert!(full.is_some());
        check_operator(&server, 507, "no_space", FULL);
        // What the plugin prints, and what happens to it, is lost; it itself goes on.
        let line = "x".repeat(5000);
        for _ in 0..50 {
            assert_eq!(server.get(&format!("/p/print?text={line}")).text(), "printed");
        }
        assert_eq!(server.api("POST", "/plugins/p/restart", b"").0, 200);
        server.wait_state("p", "ready");
        check_values(&server, "p", &values);
        disk.free();
        // More than is written in a second was printed just before.
        wait_for("lines to be written again", || {
            assert_eq!(server.get("/p/print?text=again").text(), "printed");
            fs::read_to_string(server.site().data().join("logs/p.log")).unwrap().contains("again on stderr").then_some(())
        });
        let lost = [logged(&server, "p.log: No space left"), logged(&server, "p.log is written again")];
        assert!(lost[0] == lost[1] && lost[0] >= 1 && lost[0] <= 2, "{}", server.log());
        assert_eq!(server.api("POST", "/plugins/p/restart", b"").0, 200);
        wait_for("an event to be recorded again", || (server.plugin("p")["events"][0]["kind"] == "ready").then_some(()));
        assert_eq!(set(&mut Wire::new(&server, "p", "w"), "w", 1, &mut values).head["type"], "result");
        let log = fs::read_to_string(server.site().data().join("logs/p.log")).unwrap();
        assert!(log.lines().all(|line| line.matches("Z ").count() == 1), "half of a line was left");
        site = server.stop().1;
        check_database(site.data());
    }
}

#[test]
fn a_host_does_not_start_on_a_read_only_disk_and_starts_once_it_is_writable() {
    let site = Site::new();
    let Some(disk) = Disk::in_memory(&site, "4m") else { return };
    let mut site = site.fake("p");
    let mut values = Values::new();
    for number in 0..2 {
        disk.remount("ro");
        check_refused(&site, "Read-only file system");
        disk.remount("rw");
        let server = site.start();
        assert_eq!(set(&mut Wire::new(&server, "p", "w"), "w", number, &mut values).head["rev"], number + 1);
        site = server.stop().1;
    }
    check_database(site.data());
}

/// The file system stops taking writes, as ext4 does on an error of the disk.
#[test]
fn a_disk_that_fails_while_the_host_runs_is_told_and_what_was_acknowledged_is_still_read() {
    let site = Site::new();
    let Some(disk) = Disk::in_a_file(&site) else { return };
    let server = site.fake("p").start();
    let mut values = Values::new();
    let mut wire = Wire::new(&server, "p", "w");
    for number in 0..20 {
        set(&mut wire, "w", number, &mut values);
    }
    disk.remount("abort");
    for answer in together(&server) {
        assert_eq!(answer.code(), "internal");
        assert!(answer.head["message"].as_str().unwrap().contains("is on fails"), "{answer:?}");
    }
    check_operator(&server, 500, "internal", "see the kernel log (dmesg), and check whether the file system is now read-only");
    check_values(&server, "p", &values);
    assert_eq!(logged(&server, "plugrack.db is on fails"), 1, "{}", server.log());
}

#[test]
fn while_another_program_has_the_lock_all_that_wait_are_refused_together_and_reads_go_on() {
    const EACH: usize = 40;
    let names = ["a", "b", "c", "d", "e", "f", "g", "h"];
    let mut metadata = crate::support::metadata("p");
    metadata["concurrency"] = json!(names.len() + 2);
    let server = Site::new().fake_with("p", &json!({"metadata": metadata})).start();
    let mut values = Values::new();
    set(&mut Wire::new(&server, "p", "w"), "w", 1, &mut values);
    let other = Connection::open(server.site().data().join("plugrack.db")).unwrap();
    other.execute_batch("BEGIN EXCLUSIVE").unwrap();
    std::thread::scope(|scope| {
        for name in names {
            let server = &server;
            scope.spawn(move || {
                let set = |n: usize| request(n as u64, &json!({"op": "set", "key": format!("{name}{n}")}), b"");
                let answers = Wire::new(server, "p", name).send(&(0..EACH).flat_map(set).collect::<Vec<_>>(), EACH);
                assert_eq!(answers.len(), EACH, "some had no answer in time");
                for answer in answers {
                    assert_eq!((answer.code(), &answer.head["message"]), ("busy", &json!(LOCKED)));
                }
            });
        }
        scope.spawn(|| check_values(&server, "p", &values));
    });
    check_operator(&server, 503, "busy", LOCKED);
    other.execute_batch("ROLLBACK").unwrap();
    assert_eq!(set(&mut Wire::new(&server, "p", "w"), "w", 1, &mut values).head["type"], "result");
    check_values(&server, "p", &values);
    assert_eq!([logged(&server, LOCKED), logged(&server, "plugrack.db: writes work again")], [1, 1], "{}", server.log());
    let (_, site) = server.stop();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    check_refused(&site, LOCKED);
    drop(other);
    check_database(site.data());
    check_values(&site.start(), "p", &values);
}

/// The log cannot be written back while a read that began before is open. It is made long without waiting for 256 MiB of writes.
#[test]
fn a_log_that_a_read_without_end_keeps_from_shrinking_refuses_writes_until_the_read_has_ended() {
    let server = Site::new().fake("p").start();
    let mut values = Values::new();
    let mut wire = Wire::new(&server, "p", "w");
    set(&mut wire, "w", 0, &mut values);
    let log = server.site().data().join("plugrack.db-wal");
    let lengthen = || File::options().write(true).open(&log).unwrap().set_len(256 * 1024 * 1024 + 1).unwrap();
    lengthen();
    assert_eq!(set(&mut wire, "w", 1, &mut values).head["type"], "result");
    assert!(fs::metadata(&log).unwrap().len() < 1024 * 1024, "it was not cut back");
    let other = Connection::open(server.site().data().join("plugrack.db")).unwrap();
    other.execute_batch("BEGIN; SELECT count(*) FROM kv").unwrap();
    set(&mut wire, "w", 2, &mut values);
    lengthen();
    let answer = set(&mut wire, "w", 3, &mut values);
    assert_eq!(answer.code(), "busy");
    assert!(
        answer.head["message"]
            .as_str()
            .unwrap()
            .starts_with("plugrack.db-wal has grown to 256 MiB because another program's read")
    );
    check_values(&server, "p", &values);
    other.execute_batch("ROLLBACK").unwrap();
    assert_eq!(set(&mut wire, "w", 4, &mut values).head["type"], "result");
    assert!(fs::metadata(&log).unwrap().len() < 1024 * 1024, "it was not cut back");
    check_values(&server, "p", &values);
    check_database(server.site().data());
}

/// Writes over a part of a file, in place.
fn scribble(path: &Path, from: u64, length: usize) {
    let mut file = File::options().write(true).open(path).unwrap();
    file.seek(SeekFrom::Start(from)).unwrap();
    file.write_all(&vec![0xa5; length]).unwrap();
}

/// A site that was stopped with the keys `k0` … `k299` of 1500 bytes in its database, a page each, all of it in one file.
fn written() -> (Site, PathBuf) {
    let server = Site::new().fake("p").fake("q").start();
    let set = |n: u64| request(n, &json!({"op": "set", "key": format!("k{n}")}), &[b'v'; 1500]);
    assert_eq!(Wire::new(&server, "p", "w").send(&(0..300).flat_map(set).collect::<Vec<_>>(), 300).len(), 300);
    let (_, site) = server.stop();
    let database = site.data().join("plugrack.db");
    let connection = Connection::open(&database).unwrap();
    connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
    drop(connection);
    (site, database)
}

#[test]
fn a_host_does_not_start_with_a_damaged_database_says_what_to_do_and_changes_nothing() {
    let (site, database) = written();
    let log = site.data().join("plugrack.db-wal");
    let whole = fs::read(&database).unwrap();
    for (what, sentence) in [
        ("header", DAMAGED),
        ("schema", DAMAGED),
        ("half", DAMAGED),
        ("empty", "move plugrack.db-wal away"),
        ("missing", "move plugrack.db-wal away"),
    ] {
        fs::write(&database, &whole).unwrap();
        match what {
            "header" => scribble(&database, 0, 100),
            "schema" => scribble(&database, 100, 3000),
            "half" => fs::write(&database, &whole[..whole.len() / 2]).unwrap(),
            "empty" => fs::write(&database, b"").unwrap(),
            _ => fs::remove_file(&database).unwrap(),
        }
        fs::write(&log, if sentence == DAMAGED { &[][..] } else { &[1; 10_000] }).unwrap();
        let before = fs::read(&database).ok();
        check_refused(&site, sentence);
        assert_eq!(fs::read(&database).ok(), before, "{what}: it was changed");
        if sentence == DAMAGED {
            let said = String::from_utf8(site.cli(&["instance"]).stderr).unwrap();
            assert!(said.contains(DAMAGED), "{what}: {said}");
        } else {
            assert_eq!(fs::read(&log).unwrap(), [1; 10_000], "{what}: the log is gone");
        }
    }
    // A log that is nothing of ours is passed over.
    fs::write(&database, &whole).unwrap();
    fs::write(&log, [1; 10_000]).unwrap();
    let server = site.start();
    assert_eq!(Wire::new(&server, "p", "w").get("k299").body, [b'v'; 1500]);
    check_database(server.site().data());
}

/// What can be read is right, what cannot is told, and the host goes on, whether the damage is there before it starts or is done
/// while it runs.
#[test]
fn damage_in_the_middle_costs_what_was_there_and_nothing_else() {
    for running in [false, true] {
        let (site, database) = written();
        let pages = fs::metadata(&database).unwrap().len() / PAGE;
        // Where there are values alone: the index has its own pages at the beginning, and further ones behind the middle.
        let damage = || scribble(&database, pages / 6 * PAGE, usize::try_from(pages / 4 * PAGE).unwrap());
        if !running {
            damage();
        }
        let server = site.start();
        let mut wire = Wire::new(&server, "p", "w");
        assert_eq!(
            [server.wait_state("q", "ready")["state"].as_str(), wire.get("k0").head["type"].as_str()],
            [Some("ready"), Some("result")]
        );
        if running {
            damage();
            scribble(&database, 0, 100);
        }
        let (mut right, mut damaged) = (0, 0);
        for n in 0..300 {
            let answer = wire.get(&format!("k{n}"));
            if answer.head["type"] == "result" {
                assert_eq!(
                    (answer.head["found"].as_bool(), &answer.body[..]),
                    (Some(true), &[b'v'; 1500][..]),
                    "k{n}, {running}"
                );
                right += 1;
            } else {
                assert_eq!(answer.code(), "internal");
                assert!(answer.head["message"].as_str().unwrap().contains(DAMAGED), "{answer:?}");
                damaged += 1;
            }
        }
        assert!(damaged > 0 && (running || right > 0), "{right} right, {damaged} damaged, {running}");
        for n in 0..50 {
            let answer = wire.ask(&json!({"op": "set", "key": format!("k{n}")}), b"new");
            assert!(answer.head["type"] == "result" || answer.code() == "internal", "{answer:?}");
        }
        assert_eq!(server.get("/q").status, 200);
        let (status, answer) = server.api("GET", "/plugins/p/kv?limit=1000", b"");
        assert!(status == 200 || status == 500 && answer["error"]["message"].as_str().unwrap().contains(DAMAGED), "{answer}");
        assert_eq!(logged(&server, DAMAGED), 1, "{}", server.log());
        assert_eq!(logged(&server, "panicked"), 0, "{}", server.log());
        server.stop();
    }
}
