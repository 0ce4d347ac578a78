//! What a plugin has started ends with it, and with the host, however either ends.

use crate::support::{Server, Site, binary, command, hello, is_alive, metadata, wait_for};
use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

/// A plugin that starts descendants of all kinds before it is one, and writes down their process ids.
const PARENT: &str = r#"#!/usr/bin/env python3
import json, os, subprocess, sys
if "--metadata" in sys.argv:
    sys.exit(print('METADATA'))
def start(**options):
    return subprocess.Popen(["/bin/sleep", "600"], **options).pid
daemon = ["setsid", "sh", "-c", "sleep 600 >/dev/null & echo $!"]
descendants = {
    "child": start(),
    "own group": start(preexec_fn=os.setpgrp),
    "own session": start(start_new_session=True),
    "no parent": int(subprocess.run(daemon, stdout=subprocess.PIPE).stdout),
    "no environment": start(env={}),
    "own session, no environment": start(env={}, start_new_session=True),
}
with open("descendants.new", "w") as file:
    json.dump(descendants, file)
os.rename("descendants.new", "descendants")
os.execv("HELLO", ["HELLO"])
"#;

/// The only one that the kernel gives no way to find, see docs/operations.md.
const ESCAPES: &str = "own session, no environment";

fn site() -> Site {
    let program = PARENT.replace("METADATA", &metadata("p").to_string()).replace("HELLO", hello().to_str().unwrap());
    Site::new().file("p", program.as_bytes(), 0o755)
}

/// Kills what has escaped when the test ends, however it does.
struct Escaped(i64);

impl Drop for Escaped {
    fn drop(&mut self) {
        drop(command("kill").args(["-9", &self.0.to_string()]).status());
    }
}

/// The descendants of a plugin that has just become ready: those that must end with it, and the other.
fn descendants(server: &Server) -> (BTreeMap<String, i64>, Escaped) {
    server.wait_state("p", "ready");
    let written = fs::read(server.site().data().join("plugin-data/p/descendants")).unwrap();
    let mut descendants: BTreeMap<String, i64> = serde_json::from_slice(&written).unwrap();
    let escaped = Escaped(descendants.remove(ESCAPES).unwrap());
    assert_eq!(descendants.len(), 5);
    assert!(descendants.values().all(|pid| is_alive(*pid)), "{descendants:?}");
    (descendants, escaped)
}

#[track_caller]
fn wait_gone(descendants: &BTreeMap<String, i64>) {
    let left = || descendants.iter().filter(|(_, pid)| is_alive(**pid)).map(|(kind, _)| kind.as_str()).collect::<Vec<_>>();
    wait_for("all to end", || left().is_empty().then_some(()));
}

/// The guard of a host.
fn guard(server: &Server) -> Option<i64> {
    children(server.pid().into())
        .into_iter()
        .find(|pid| fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.starts_with("plugrack\0__guard\0")))
}

/// The children of a process.
fn children(of: i64) -> Vec<i64> {
    let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    pids.filter(|pid| stat(*pid).is_some_and(|(_, parent)| parent == of)).collect()
}

/// The state and the parent of a process.
fn stat(pid: i64) -> Option<(char, i64)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

fn kill(pid: i64) {
    assert!(command("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
}

#[test]
fn what_a_plugin_has_started_ends_before_it_is_started_again() {
    let server = site().start();
    let (first, escaped) = descendants(&server);
    let plugin = server.plugin("p")["process"]["pid"].as_i64().unwrap();
    kill(plugin);
    server.wait_restarted("p", plugin);
    assert!(first.values().all(|pid| !is_alive(*pid)), "{first:?}");
    assert!(is_alive(escaped.0), "docs/operations.md says that this one escapes");
    let (second, _escaped) = descendants(&server);
    server.cli(&["stop", "p"]);
    assert!(second.values().all(|pid| !is_alive(*pid)), "{second:?}");
}

#[test]
fn what_plugins_have_started_ends_with_a_host_that_is_stopped() {
    let server = site().start();
    let (descendants, _escaped) = descendants(&server);
    let guard = guard(&server).unwrap();
    let (status, _site) = server.stop();
    assert!(status.success());
    assert!(descendants.values().chain([&guard]).all(|pid| !is_alive(*pid)), "{descendants:?}");
}

#[test]
fn what_plugins_have_started_ends_with_a_host_that_is_killed() {
    let server = site().start();
    let (descendants, _escaped) = descendants(&server);
    let guard = guard(&server).unwrap();
    for signal in ["TERM", "INT", "HUP"] {
        assert!(command("kill").args(["-s", signal, &guard.to_string()]).status().unwrap().success());
    }
    let _site = server.kill();
    wait_gone(&descendants);
    wait_for("the guard to end", || (!is_alive(guard)).then_some(()));
}

#[test]
fn a_guard_that_was_killed_is_replaced_by_one_that_knows_all() {
    let server = site().start();
    let (descendants, _escaped) = descendants(&server);
    let first = guard(&server).unwrap();
    kill(first);
    wait_for("another guard", || guard(&server).filter(|pid| *pid != first));
    assert!(server.log().contains("the guard process ended (killed by signal 9 (SIGKILL)); another takes its place"));
    let _site = server.kill();
    wait_gone(&descendants);
}

/// A host and its guard killed in one go leave what the next host finds by the environment.
#[test]
fn the_next_host_ends_what_an_earlier_one_has_left() {
    let server = site().start();
    let (mut descendants, _escaped) = descendants(&server);
    let _bare = Escaped(descendants.remove("no environment").unwrap());
    let guard = guard(&server).unwrap();
    command("kill").args(["-s", "STOP", &guard.to_string()]).status().unwrap();
    let site = server.kill();
    kill(guard);
    assert!(descendants.values().all(|pid| is_alive(*pid)), "{descendants:?}");
    let server = site.start();
    assert!(descendants.values().all(|pid| !is_alive(*pid)), "{descendants:?}");
    assert!(server.log().contains("ended 4 processes that an earlier run of the host had left behind"), "{}", server.log());
}

/// In a container of its own, as its first process.
fn start_as_first_process(site: Site) -> Server {
    let serve = site.serve();
    let mut contained = command("unshare");
    contained.args(["--pid", "--fork", "--mount-proc", "--kill-child"]);
    if !rustix::process::getuid().is_root() {
        contained.arg("--map-root-user");
    }
    contained.arg(serve.get_program()).args(serve.get_args());
    site.start_as(contained)
}

#[test]
fn as_the_first_process_of_a_container_the_host_reaps_what_is_left_to_it() {
    let server = start_as_first_process(site());
    server.wait_state("p", "ready");
    let host = children(server.pid().into())[0];
    assert_eq!(fs::read_link(format!("/proc/{host}/exe")).unwrap(), fs::canonicalize(binary()).unwrap());
    let is_sleep = |pid: &i64| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "sleep\n");
    let orphan = children(host).into_iter().find(is_sleep).expect("what has no parent is left to the first process");
    kill(orphan);
    wait_for("the orphan to be reaped", || stat(orphan).is_none().then_some(()));
    let plugin = children(host).into_iter().find(|pid| fs::read_link(format!("/proc/{pid}/exe")).unwrap() == hello()).unwrap();
    kill(plugin);
    // The exit of what the host itself waits for is still its to see.
    wait_for("the crash to be noted", || {
        let events = server.plugin("p")["events"].as_array().unwrap().clone();
        events.iter().any(|event| event["detail"] == "killed by signal 9 (SIGKILL)").then_some(())
    });
    server.wait_state("p", "ready");
    wait_for("no zombie to be left", || {
        let zombies = children(host).into_iter().filter(|pid| stat(*pid).is_some_and(|(state, _)| state == 'Z')).count();
        (zombies == 0).then_some(())
    });
}

#[test]
fn a_process_from_outside_of_the_container_is_not_answered() {
    let server = start_as_first_process(Site::new().fake("p"));
    server.wait_state("p", "ready");
    let mut stranger = UnixStream::connect(server.site().data().join("run/host.sock")).unwrap();
    drop(stranger.write_all(b"\0\0\0\x02\0\0\0\0{}"));
    assert_eq!(stranger.read_to_end(&mut Vec::new()).unwrap_or_default(), 0);
    wait_for("the host to say so", || server.log().contains("process 0 is in no plugin's session").then_some(()));
    server.wait_state("p", "ready");
    let stored = server.request("POST", "/p/kv", &[], br#"{"op":"get","key":"a"}"#);
    assert_eq!(stored.json()["head"]["found"], false, "its own plugins are");
}
