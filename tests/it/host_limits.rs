//! The host at its limits: many plugins, many files that are none, few open files, few threads, little memory.

use crate::support::{Server, Site, binary, command, copy_program, hello, metadata, script, uids, wait_for};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

/// A site with many small plugins: `p0`, `p1`, …
fn many(count: usize) -> Site {
    let run = format!("exec {}", hello().display());
    (0..count).fold(Site::new(), |site, number| {
        let id = format!("p{number}");
        site.file(&id, script(&metadata(&id), &run).as_bytes(), 0o755)
    })
}

/// The command to serve a site under limits, as `prlimit` takes them.
fn limited(site: &Site, limits: &[&str]) -> Command {
    let serve = site.serve();
    let mut limited = command("prlimit");
    limited.args(limits).arg(serve.get_program()).args(serve.get_args());
    limited
}

/// The plugins in a state, as they are listed.
fn in_state(server: &Server, state: &str) -> Vec<Value> {
    let list = server.api("GET", "/plugins", b"").1;
    list["plugins"].as_array().unwrap().iter().filter(|plugin| plugin["state"] == state).cloned().collect()
}

#[track_caller]
fn wait_count(server: &Server, state: &str, count: usize) -> Vec<Value> {
    wait_for(&format!("{count} plugins to be {state}"), || {
        let plugins = in_state(server, state);
        (plugins.len() == count).then_some(plugins)
    })
}

#[test]
fn three_hundred_plugins_run_side_by_side_on_four_threads_and_three_files_each() {
    let site = many(300);
    let serve = site.serve();
    let server = site.listen_as(serve);
    // So many take their time on a machine that has other things to do.
    for count in [50, 100, 150, 200, 250, 300] {
        let ready = || (in_state(&server, "ready").len() >= count).then_some(());
        wait_for(&format!("{count} plugins to be ready"), ready);
    }
    for id in ["p0", "p150", "p299"] {
        assert_eq!(server.get(&format!("/{id}")).text(), "Hello, world!");
    }
    assert_eq!(server.get("/").text().lines().count(), 300);
    let count = |what: &str| fs::read_dir(format!("/proc/{}/{what}", server.pid())).unwrap().count();
    let (threads, files) = (count("task"), count("fd"));
    assert!((1200..1240).contains(&threads) && (900..960).contains(&files), "{threads} threads, {files} files");
    assert_eq!(server.stop().0.code(), Some(0));
}

#[test]
fn a_thousand_that_are_refused_are_said_once_each_and_disturb_nobody() {
    let site = (0..1000).fold(Site::new().fake("good"), |site, number| site.file(&format!("n{number}"), b"", 0o644));
    let server = site.start();
    server.wait_state("good", "ready");
    let refusals = || server.log().matches("refused: it is not executable").count();
    assert_eq!((in_state(&server, "refused").len(), refusals()), (1000, 1000));
    assert_eq!(server.api("POST", "/rescan", b"").1["refused"].as_array().unwrap().len(), 1000);
    assert_eq!(refusals(), 1000, "a second look says nothing twice");
    assert_eq!(server.get("/good/x").status, 200);
}

#[test]
fn ten_thousand_names_in_the_plugins_directory_are_served_and_one_more_is_a_clear_error() {
    let site = (0..9999).fold(Site::new().fake("good"), |site, number| site.file(&format!("n{number}"), b"", 0o644));
    let server = site.start();
    server.wait_state("good", "ready");
    assert_eq!(in_state(&server, "refused").len(), 9999);
    assert!(server.log().contains("8999 more files are refused; plugrack list has the reasons"));
    fs::write(server.site().plugins().join("one-more"), b"").unwrap();
    let said =
        "it has more than 10000 names: move files that are not plugins elsewhere, or choose another directory with --plugins";
    assert!(server.cli_fails(&["rescan"]).contains(said));
    assert_eq!(server.get("/good/x").status, 200);
    let (_, site) = server.stop();
    let ended = site.run_to_end();
    assert_eq!(ended.status.code(), Some(1));
    assert!(String::from_utf8(ended.stderr).unwrap().contains(said));
}

#[test]
fn with_few_open_files_as_many_plugins_run_as_fit_and_the_next_when_one_ends() {
    let site = many(30);
    let serve = limited(&site, &["--nofile=256:256"]);
    let server = site.start_as(serve);
    wait_count(&server, "ready", 26);
    let advice = "open files are limited to 256: raise it with ulimit -n, or LimitNOFILE= of a systemd unit";
    for waiting in wait_count(&server, "backing_off", 4) {
        assert_eq!(waiting["reason"], format!("no capacity: 26 plugins run, which is the most, since {advice}"));
        let refused = server.get(waiting["route"].as_str().unwrap());
        assert!(refused.status == 503 && refused.header("retry-after").is_some(), "{refused:?}");
    }
    assert!(server.log().contains("limited to 256, which allows 26 plugins and about 52 clients: raise it with ulimit -n"));
    let running = in_state(&server, "ready")[0]["id"].as_str().unwrap().to_owned();
    server.cli(&["stop", &running]);
    wait_count(&server, "backing_off", 3);
    wait_count(&server, "ready", 26);
    assert_eq!(server.log().matches("no capacity: 26 plugins run").count(), 4, "it is said once each");
}

#[test]
fn with_few_threads_as_many_plugins_run_as_fit_and_the_host_goes_on_answering() {
    if fs::metadata("/proc/self").unwrap().uid() != 0 {
        // Only root can become another user, and this user's own threads would count.
        return;
    }
    let site = many(60);
    let (own, small) = (site.data().join("plugrack"), site.data().join("hello"));
    copy_program(binary(), &own);
    copy_program(hello(), &small);
    for number in 0..60 {
        let id = format!("p{number}");
        let text = script(&metadata(&id), &format!("exec {}", small.display()));
        crate::support::write_file(&site.plugins().join(&id), text.as_bytes(), 0o755);
    }
    // The limit counts whatever runs under the uid, on the whole machine.
    let uid = uids().start().to_string();
    assert!(command("chown").args(["-R", &uid]).arg(site.data()).status().unwrap().success());
    let mut serve = command("setpriv");
    serve.args(["--reuid", &uid, "--regid", &uid, "--clear-groups", "prlimit", "--nproc=200:200"]).arg(own);
    serve.args(site.serve().get_args());
    let server = site.start_as(serve);
    wait_count(&server, "ready", 12);
    for waiting in wait_count(&server, "backing_off", 34) {
        let reason = waiting["reason"].as_str().unwrap();
        assert!(reason.contains("threads and processes are limited to 200: raise it with ulimit -u, TasksMax="), "{reason}");
    }
    for refused in wait_count(&server, "refused", 14) {
        let reason = refused["reason"].as_str().unwrap();
        assert!(reason.starts_with("no capacity: at most 46 plugins can be supervised, since threads"), "{reason}");
    }
    let mut clients: Vec<_> = (0..16).map(|_| server.client()).collect();
    assert!(clients.iter_mut().all(|client| client.get("/healthz").status == 200));
    assert!(!server.log().contains("panicked"));
}

#[test]
fn with_too_little_memory_the_host_says_so_and_ends() {
    let ended = limited(&Site::new(), &["--as=67108864"]).output().unwrap();
    assert_eq!(ended.status.code(), Some(1));
    let said = String::from_utf8(ended.stderr).unwrap();
    assert!(said.starts_with("plugrack: the address space is limited to 64 MiB, and the host needs "), "{said}");
    assert!(said.contains("raise it with ulimit -v") && said.lines().count() == 1, "{said}");
}

#[test]
fn the_host_answers_while_it_looks_for_plugins_and_tells_of_none_that_it_is_not_there() {
    let slow = |id: &str, seconds: f32| json!({"metadata": metadata(id), "metadata_sleep": seconds});
    let site =
        Site::new().fake("a-quick").fake_with("b-slow", &slow("b-slow", 1.0)).fake_with("c-slower", &slow("c-slower", 4.0));
    let serve = site.serve();
    let server = site.listen_as(serve);
    assert_eq!(server.get("/healthz").status, 200);
    std::thread::scope(|scope| {
        for id in ["a-quick", "b-slow"] {
            let server = &server;
            scope.spawn(move || assert_eq!(server.get(&format!("/{id}/x")).status, 200, "{id}"));
        }
    });
    // One that is not known after two seconds is told to come again.
    let early = server.get("/c-slower/x");
    assert_eq!((early.status, early.header("retry-after")), (503, Some("2")));
    let unknown = server.api("GET", "/plugins/c-slower", b"");
    assert!(unknown.0 == 200 || (unknown.0 == 503 && unknown.1["error"]["code"] == "unavailable"), "{unknown:?}");
    wait_for("the last plugin", || (server.get("/c-slower/x").status == 200).then_some(()));
    assert_eq!((server.get("/nothing").status, server.api("GET", "/plugins/nothing", b"").0), (404, 404));
}

#[test]
fn those_that_hang_when_they_are_asked_hold_up_no_other_and_the_host_ends_in_time() {
    let hang = |id: &str| json!({"metadata": metadata(id), "metadata_sleep": 600});
    let hanging = ["b", "c", "d", "e"];
    let site = hanging.into_iter().fold(Site::new().fake("a").fake("z"), |site, id| site.fake_with(id, &hang(id)));
    let mut serve = site.serve();
    serve.args(["--metadata-timeout", "5m"]);
    let server = site.listen_as(serve);
    for id in ["a", "z"] {
        wait_for("the other plugins", || (server.get(&format!("/{id}/x")).status == 200).then_some(()));
    }
    let (status, site) = server.stop();
    assert_eq!(status.code(), Some(0));
    let log = fs::read_to_string(site.data().join("host.log")).unwrap();
    assert!(!log.contains("did not end within") && !log.contains("refused"), "{log}");
}
