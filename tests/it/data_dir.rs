//! What lies in the data directory: that the database, its log and the instance belong together, that the host notices when somebody
//! takes one of its files away while it runs, and that it touches nothing that it has not made.

use crate::support::{Server, Site, binary, command, wait_for};
use rusqlite::Connection;
use serde_json::json;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Output;

/// What a command complained of, in one line.
#[track_caller]
fn one_sentence(output: &Output) -> String {
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!((output.status.code(), text.lines().count()), (Some(1), 1), "{text}");
    text
}

fn file(site: &Site, end: &str) -> PathBuf {
    site.data().join(format!("plugrack.db{end}"))
}

#[track_caller]
fn set(server: &Server, key: &str) {
    assert_eq!(server.api("PUT", &format!("/plugins/p/kv/{key}"), b"value").0, 200);
}

#[track_caller]
fn keys(server: &Server) -> Vec<String> {
    server.wait_state("p", "ready");
    let (status, answer) = server.api("GET", "/plugins/p/kv?limit=1000", b"");
    assert_eq!(status, 200, "{answer}");
    answer["keys"].as_array().unwrap().iter().map(|key| key["key"].as_str().unwrap().to_owned()).collect()
}

fn instance(server: &Server) -> String {
    server.cli(&["instance"])
}

fn started() -> Server {
    let server = Site::new().fake("p").start();
    server.wait_state("p", "ready");
    server
}

/// A new installation with one file of another one in it: the database.
fn copied(site: &Site) -> Site {
    let copy = Site::new().fake("p");
    fs::copy(file(site, ""), file(&copy, "")).unwrap();
    copy
}

#[test]
fn the_database_alone_is_everything_after_a_stop_and_once_the_host_idles() {
    let server = started();
    let id = instance(&server);
    set(&server, "a");
    wait_for("the log to be written back", || (fs::metadata(file(server.site(), "-wal")).unwrap().len() == 0).then_some(()));
    let copy = copied(server.site()).start();
    assert_eq!((instance(&copy), keys(&copy)), (id.clone(), vec!["a".to_owned()]));
    set(&server, "b");
    let (status, site) = server.stop();
    assert!(status.success());
    let copy = copied(&site).start();
    assert_eq!((instance(&copy), keys(&copy)), (id, vec!["a".to_owned(), "b".to_owned()]));
}

#[test]
fn a_copy_of_a_running_database_without_its_log_keeps_the_identity_from_the_first_second_on() {
    let server = Site::new().fake("p").start();
    let copy = copied(server.site()).start();
    assert_eq!(instance(&copy), instance(&server));
}

/// A host that never idles writes its log back as well, and one that idles does not for ever.
#[test]
fn an_older_database_over_a_newer_log_and_an_older_log_over_a_newer_database_are_refused() {
    let site = started().stop().1;
    let old = fs::read(file(&site, "")).unwrap();
    let server = site.start();
    server.wait_state("p", "ready");
    set(&server, "first");
    let site = server.kill();
    let (new, log) = (fs::read(file(&site, "")).unwrap(), fs::read(file(&site, "-wal")).unwrap());
    assert!(!log.is_empty() && new != old);

    let refused = |site: &Site| {
        let files = ["", "-wal"].map(|end| fs::read(file(site, end)).unwrap());
        let complaint = one_sentence(&site.run_to_end());
        assert!(complaint.contains("do not belong together") && complaint.contains("move plugrack.db-wal away"), "{complaint}");
        assert!(files == ["", "-wal"].map(|end| fs::read(file(site, end)).unwrap()), "it was changed");
    };
    fs::write(file(&site, ""), &old).unwrap();
    refused(&site);
    fs::write(file(&site, ""), &new).unwrap();
    let server = site.start();
    assert_eq!(keys(&server), ["first"]);
    set(&server, "second");
    let site = server.stop().1;
    fs::write(file(&site, "-wal"), &log).unwrap();
    refused(&site);
    // The ways out that the sentence names.
    let newer = fs::read(file(&site, "")).unwrap();
    fs::remove_file(file(&site, "-wal")).unwrap();
    let server = site.start();
    assert_eq!(keys(&server), ["first", "second"]);
    let site = server.stop().1;
    for (database, expected) in [(&new, 0), (&old, 0), (&newer, 2)] {
        fs::write(file(&site, ""), database).unwrap();
        fs::write(file(&site, "-wal"), b"").unwrap();
        let copy = copied(&site).start();
        assert_eq!(keys(&copy).len(), expected);
    }
}

/// Whatever state a copy was made in, its log goes with it.
#[test]
fn a_database_and_its_own_log_are_taken_in_any_state() {
    let server = started();
    for number in 0..5 {
        set(&server, &format!("k{number}"));
        let copy = Site::new().fake("p");
        // As a snapshot of the file system has them, since nothing is written meanwhile.
        let other = Connection::open(file(server.site(), "")).unwrap();
        other.execute_batch("BEGIN IMMEDIATE").unwrap();
        for end in ["", "-wal"] {
            fs::copy(file(server.site(), end), file(&copy, end)).unwrap();
        }
        drop(other);
        let copy = copy.start();
        assert_eq!((instance(&copy), keys(&copy).len()), (instance(&server), number + 1));
        // Another program may write the log back itself.
        if number == 2 {
            let other = Connection::open(file(server.site(), "")).unwrap();
            other.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
        }
    }
    let server = server.kill().start();
    assert_eq!(keys(&server).len(), 5);
}

#[test]
fn a_database_that_lost_its_identity_or_itself_is_refused_and_the_sentence_names_the_way_out() {
    let server = started();
    let id = instance(&server);
    let site = server.stop().1;
    let side = site.data().join("instance-id");
    assert_eq!(fs::read_to_string(&side).unwrap(), id);
    let whole = fs::read(file(&site, "")).unwrap();
    for end in ["", "-wal", "-shm"] {
        fs::remove_file(file(&site, end)).unwrap();
    }
    let complaint = one_sentence(&site.run_to_end());
    assert!(
        complaint.contains(id.trim()) && complaint.contains("restore all files") && complaint.contains("remove instance-id"),
        "{complaint}"
    );
    assert!(!file(&site, "").exists());

    fs::write(file(&site, ""), &whole).unwrap();
    Connection::open(file(&site, "")).unwrap().execute("DELETE FROM settings WHERE key = 'instance_id'", []).unwrap();
    for _ in 0..2 {
        for output in [site.run_to_end(), site.cli(&["instance"])] {
            let complaint = one_sentence(&output);
            assert!(
                complaint.contains("has no instance id") && complaint.contains("without its log plugrack.db-wal"),
                "{complaint}"
            );
        }
        // Not even in a directory where nothing says that there was one.
        fs::remove_file(&side).unwrap_or_default();
    }
    // As of a version that had no such file.
    fs::write(file(&site, ""), &whole).unwrap();
    let server = site.start();
    assert_eq!((instance(&server), fs::read_to_string(&side).unwrap()), (id.clone(), id.clone()));

    let other = Site::new().start().stop().1;
    let site = server.stop().1;
    fs::copy(file(&other, ""), file(&site, "")).unwrap();
    let complaint = one_sentence(&site.run_to_end());
    assert!(complaint.contains("is the database of instance") && complaint.contains(id.trim()), "{complaint}");
    fs::remove_file(&side).unwrap();
    let server = site.start();
    assert_ne!(instance(&server), id);
}

fn logged(server: &Server, words: &str) -> usize {
    server.log().lines().filter(|line| line.contains(words)).count()
}

#[test]
fn while_a_file_of_the_database_is_gone_nothing_is_acknowledged_and_it_is_taken_again_once_it_is_back() {
    for end in ["", "-wal", "-shm"] {
        let server = started();
        set(&server, "before");
        let (here, away) = (file(server.site(), end), server.site().data().join("away"));
        fs::rename(&here, &away).unwrap();
        let says = format!("plugrack.db{end} was removed or replaced while the host runs");
        // Though nobody writes.
        wait_for("it to be noticed", || (logged(&server, &says) > 0).then_some(()));
        for _ in 0..5 {
            let (status, answer) = server.api("PUT", "/plugins/p/config/a", b"1");
            assert_eq!((status, &answer["error"]["code"]), (500, &json!("internal")), "{answer}");
            assert!(answer["error"]["message"].as_str().unwrap().contains(&says), "{answer}");
        }
        assert_eq!(keys(&server), ["before"], "reads go on");
        assert!(server.cli_fails(&["kv", "set", "p", "a", "1"]).contains(&says));
        // Another file does not do.
        fs::write(&here, b"").unwrap();
        assert_eq!(server.api("PUT", "/plugins/p/config/a", b"1").0, 500);
        assert_eq!(logged(&server, &says), 1, "{}", server.log());
        fs::rename(&away, &here).unwrap();
        set(&server, "after");
        let (status, site) = server.stop();
        assert!(status.success(), "{end}");
        assert_eq!(keys(&site.start()), ["after", "before"]);
    }
}

#[test]
fn what_was_acknowledged_before_the_log_was_removed_is_kept() {
    for killed in [false, true] {
        let server = started();
        (0..20).for_each(|number| set(&server, &format!("k{number}")));
        fs::remove_file(file(server.site(), "-wal")).unwrap();
        assert_eq!(server.api("PUT", "/plugins/p/kv/lost", b"value").0, 500);
        wait_for("it to be noticed", || (logged(&server, "has all acknowledged changes: restart the host") > 0).then_some(()));
        let site = if killed {
            server.kill()
        } else {
            let (status, site) = server.stop();
            assert_eq!(status.code(), Some(1));
            site
        };
        let server = site.start();
        assert_eq!(keys(&server).len(), 20);
        set(&server, "new");
    }
}

#[test]
fn a_lock_that_was_removed_is_taken_again_and_keeps_others_out_meanwhile() {
    let server = started();
    let lock = server.site().data().join("lock");
    fs::remove_file(&lock).unwrap();
    let complaint = one_sentence(&server.site().run_to_end());
    assert!(complaint.contains("another plugrack") && complaint.contains("stop it"), "{complaint}");
    wait_for("it to be taken again", || (logged(&server, "lock was removed or replaced while the host runs") > 0).then_some(()));
    assert!(File::open(&lock).unwrap().try_lock().is_err());
    wait_for("it to hold the process", || (fs::read_to_string(&lock).unwrap() == format!("{}\n", server.pid())).then_some(()));
    set(&server, "a");
    assert!(server.stop().0.success());
}

#[test]
fn a_host_whose_lock_another_one_holds_ends_and_leaves_the_directory_to_it() {
    let server = started();
    let lock = server.site().data().join("lock");
    fs::write(server.site().data().join("next"), "4711\n").unwrap();
    let next = File::open(server.site().data().join("next")).unwrap();
    next.lock().unwrap();
    fs::rename(server.site().data().join("next"), &lock).unwrap();
    let (status, site) = server.ended();
    assert_eq!(status.code(), Some(1));
    let log = fs::read_to_string(site.data().join("host.log")).unwrap();
    assert!(log.lines().last().unwrap().contains("another plugrack has locked it: this host ends"), "{log}");
    assert!(site.data().join("run/listen").exists(), "it was the other's to remove");
}

#[test]
fn a_run_directory_that_was_removed_is_told_and_a_restart_makes_it_again() {
    let server = started();
    let run = server.site().data().join("run");
    fs::rename(&run, server.site().data().join("away")).unwrap();
    wait_for("it to be noticed", || (logged(&server, "run was removed or replaced while the host runs") > 0).then_some(()));
    let said = server.cli_fails(&["list"]);
    assert!(said.contains("restart the host") && said.contains(&server.pid().to_string()), "{said}");
    fs::rename(server.site().data().join("away"), &run).unwrap();
    wait_for("it to be complete again", || (logged(&server, "run is complete again") > 0).then_some(()));
    server.cli(&["list"]);
    fs::remove_dir_all(&run).unwrap();
    assert_eq!(server.get("/p/x").status, 200);
    let (status, site) = server.stop();
    assert!(status.success());
    let server = site.start();
    server.wait_state("p", "ready");
    server.cli(&["list"]);
}

/// Runs a host that must refuse to start.
fn serve(data: &Path) -> Output {
    serve_at(data, "127.0.0.1:0")
}

fn serve_at(data: &Path, listen: &str) -> Output {
    let mut serve = command("timeout");
    serve.args(["--kill-after=5", "30"]).arg(binary()).args(["serve", "--listen", listen, "--data"]).arg(data);
    serve.output().unwrap()
}

#[test]
fn a_directory_of_somebody_else_is_left_as_it_is() {
    let with = |path: &str, content: &str| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        (dir, path)
    };
    for (path, reason) in [
        ("run/notes.txt", "did not make, such as notes.txt"),
        ("run/conf.d/site", "did not make, such as conf.d"),
        ("run/listen", "did not make, such as listen"),
        ("lock", "not plugrack's lock"),
    ] {
        let (dir, file) = with(path, "somebody's own");
        let complaint = one_sentence(&serve(dir.path()));
        assert!(complaint.contains(reason) && complaint.contains("--data"), "{complaint}");
        assert_eq!(fs::read_to_string(file).unwrap(), "somebody's own");
        assert!(!dir.path().join("plugrack.db").exists());
    }
    let (dir, kept) = with("reserve", "somebody's own");
    fs::create_dir(dir.path().join("plugins")).unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = taken.local_addr().unwrap().to_string();
    one_sentence(&serve_at(dir.path(), &listen));
    assert_eq!(fs::read_to_string(kept).unwrap(), "somebody's own");
}

#[test]
fn no_link_is_followed_where_modes_are_changed_and_files_removed() {
    for name in ["run", "logs", "plugin-data", "lock"] {
        let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let target = elsewhere.path().join("target");
        if name == "lock" {
            fs::write(&target, "").unwrap();
        } else {
            fs::create_dir_all(target.join("a.d")).unwrap();
            fs::write(target.join("a.d/file"), "kept").unwrap();
        }
        fs::set_permissions(&target, Permissions::from_mode(0o755)).unwrap();
        symlink(&target, dir.path().join(name)).unwrap();
        let complaint = one_sentence(&serve(dir.path()));
        assert!(complaint.contains("symbolic link") && complaint.contains(name), "{complaint}");
        assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o777, 0o755, "{name}");
        assert!(name == "lock" || target.join("a.d/file").exists());
    }
    // The reserve is given back and filled again: of a link neither.
    let (site, elsewhere) = (Site::new(), tempfile::tempdir().unwrap());
    let target = elsewhere.path().join("target");
    fs::write(&target, vec![0; 1000]).unwrap();
    symlink(&target, site.data().join("reserve")).unwrap();
    site.start().stop();
    assert_eq!(fs::read(&target).unwrap(), vec![0; 1000]);
}

#[test]
fn of_the_run_directory_what_hosts_have_made_is_removed_and_nothing_else() {
    let site = started().kill();
    let run = site.data().join("run");
    fs::write(run.join("notes.txt"), "kept").unwrap();
    fs::create_dir_all(run.join("own/dir")).unwrap();
    let server = site.start();
    assert_eq!(logged(&server, "was not made by plugrack, so it stays"), 2, "{}", server.log());
    let site = server.stop().1;
    assert!(run.join("own/dir").exists() && fs::read_to_string(run.join("notes.txt")).unwrap() == "kept");
    assert!(!run.join("host.sock").exists() && !run.join("p.d").exists());
    fs::remove_file(run.join("notes.txt")).unwrap();
    fs::remove_dir_all(run.join("own")).unwrap();
    // As a version that made no marker was killed.
    let site = site.start().kill();
    fs::remove_file(run.join(".plugrack")).unwrap();
    let site = site.start().stop().1;
    assert_eq!(fs::read_dir(site.data().join("run")).unwrap().count(), 0);
}

/// The sizes are checked where they are written, so no two can pass together where there is space for one.
#[test]
fn settings_that_are_set_side_by_side_stay_within_their_limit() {
    let server = started();
    // Keys that are longer in JSON than they are, and small ones, of which the marks around them are the most.
    let quotes = "\"".repeat(100);
    let tasks: Vec<(String, String)> = (0..8)
        .flat_map(|n| {
            [
                (format!("large{n}"), format!("{:?}", "x".repeat(15_000))),
                (format!("{quotes}{n}"), format!("{:?}", "\"".repeat(4000))),
            ]
        })
        .chain((0..600).map(|n| (format!("{n}"), "1".to_owned())))
        .collect();
    std::thread::scope(|scope| {
        for part in tasks.chunks(tasks.len() / 8) {
            let server = &server;
            scope.spawn(move || {
                for (key, value) in part.iter().rev() {
                    let key = key.replace('"', "%22");
                    let (status, answer) = server.api("PUT", &format!("/plugins/p/config/{key}"), value.as_bytes());
                    assert!(matches!(status, 200 | 413), "{answer}");
                }
            });
        }
    });
    let (_, answer) = server.api("GET", "/plugins/p/config", b"");
    let size = answer["config"].to_string().len();
    assert!((40 * 1024..=48 * 1024 + 2).contains(&size), "{size}");
    assert_eq!(server.api("POST", "/plugins/p/restart", b"").0, 200);
    server.wait_state("p", "ready");
    // What makes it smaller is taken, whatever there is.
    let large = answer["config"].as_object().unwrap().keys().find(|key| key.starts_with("large")).unwrap();
    assert_eq!(server.api("PUT", &format!("/plugins/p/config/{large}"), b"1").0, 200);
}
