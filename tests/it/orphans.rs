//! What a plugin has started ends with it, and with the host, however either ends.

use crate::support::{
    Server, Site, binary, command, copy_program, hello, install_fake, is_alive, metadata, pause, python, range, script, uids,
    wait_for, write_file,
};
use serde_json::json;
use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

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

/// The watchdog of a host.
fn watchdog(server: &Server) -> Option<i64> {
    children(server.pid().into()).into_iter().find(|pid| {
        fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.starts_with("plugrack\0__watchdog\0"))
    })
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
    let watchdog = watchdog(&server).unwrap();
    let (status, _site) = server.stop();
    assert!(status.success());
    assert!(descendants.values().chain([&watchdog]).all(|pid| !is_alive(*pid)), "{descendants:?}");
}

#[test]
fn what_plugins_have_started_ends_with_a_host_that_is_killed() {
    let server = site().start();
    let (descendants, _escaped) = descendants(&server);
    let watchdog = watchdog(&server).unwrap();
    for signal in ["TERM", "INT", "HUP"] {
        assert!(command("kill").args(["-s", signal, &watchdog.to_string()]).status().unwrap().success());
    }
    let _site = server.kill();
    wait_gone(&descendants);
    wait_for("the watchdog to end", || (!is_alive(watchdog)).then_some(()));
}

#[test]
fn a_watchdog_that_was_killed_is_replaced_by_one_that_knows_all() {
    let server = site().start();
    let (descendants, _escaped) = descendants(&server);
    let first = watchdog(&server).unwrap();
    kill(first);
    wait_for("another watchdog", || watchdog(&server).filter(|pid| *pid != first));
    assert!(server.log().contains("the watchdog process ended (killed by signal 9 (SIGKILL)) and is replaced"));
    let _site = server.kill();
    wait_gone(&descendants);
}

/// A watchdog that has just ended is replaced a second later.
#[test]
fn a_host_that_is_stopped_while_it_has_no_watchdog_ends_what_is_left_itself() {
    let server = site().start();
    let (descendants, _escaped) = descendants(&server);
    kill(watchdog(&server).unwrap());
    wait_for("the host to notice", || server.log().contains("the watchdog process ended").then_some(()));
    let (status, _site) = server.stop();
    assert!(status.success());
    assert!(descendants.values().all(|pid| !is_alive(*pid)), "{descendants:?}");
}

/// A host and its watchdog killed in one go leave what the next host finds by the environment.
#[test]
fn the_next_host_ends_what_an_earlier_one_has_left() {
    let server = site().start();
    let (mut descendants, _escaped) = descendants(&server);
    let _bare = Escaped(descendants.remove("no environment").unwrap());
    let watchdog = watchdog(&server).unwrap();
    command("kill").args(["-s", "STOP", &watchdog.to_string()]).status().unwrap();
    let site = server.kill();
    kill(watchdog);
    assert!(descendants.values().all(|pid| is_alive(*pid)), "{descendants:?}");
    let server = site.start();
    assert!(descendants.values().all(|pid| !is_alive(*pid)), "{descendants:?}");
    assert!(server.log().contains("killed 4 processes that an earlier run of the host had left behind"), "{}", server.log());
}

/// Denies system calls to the program that it then becomes, as the profiles of older container engines do.
const DENY: &str = r#"
import ctypes, os, struct, sys
LOAD, JUMP_EQUAL, RETURN = 0x20, 0x15, 0x06
denied, program = [int(number) for number in sys.argv[1].split(",")], sys.argv[2:]
rules = [(LOAD, 0, 0, 0)]
for number in denied:
    rules += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, 0x00050000 | 1)]  # EPERM
rules.append((RETURN, 0, 0, 0x7FFF0000))
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
filters = struct.pack("HxxxxxxP", len(rules), ctypes.addressof(code))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, filters, 0, 0) == 0, os.strerror(ctypes.get_errno())
os.execv(program[0], program)
"#;

/// `pidfd_open` and `pidfd_send_signal`, which have the same numbers on all machines.
const PIDFD_CALLS: [&str; 2] = ["434", "424"];

#[test]
fn what_a_plugin_has_started_ends_with_it_where_the_kernel_gives_no_handles_of_processes() {
    for denied in PIDFD_CALLS {
        let site = site();
        let serve = site.serve();
        let mut denying = command(python());
        denying.args(["-c", DENY, denied]).arg(serve.get_program()).args(serve.get_args());
        let server = site.start_as(denying);
        let (first, _escaped) = descendants(&server);
        let plugin = server.plugin("p")["process"]["pid"].as_i64().unwrap();
        kill(plugin);
        server.wait_restarted("p", plugin);
        assert!(first.values().all(|pid| !is_alive(*pid)), "without {denied}: {first:?}");
        let (second, _escaped) = descendants(&server);
        server.cli(&["stop", "p"]);
        assert!(second.values().all(|pid| !is_alive(*pid)), "without {denied}: {second:?}");
        server.cli(&["start", "p"]);
        let (third, _escaped) = descendants(&server);
        let _site = server.kill();
        wait_gone(&third);
    }
}

/// A plugin that runs `before`, in Python, and is then a fake one.
fn install_fake_after(plugins: &Path, id: &str, before: &str) {
    install_fake(plugins, id, &json!({"metadata": metadata(id)}));
    let dir = plugins.join(id);
    fs::rename(dir.join("plugin"), dir.join("fake.py")).unwrap();
    let program = format!(
        "#!{python}\nimport json, os, subprocess, sys\nif '--metadata' not in sys.argv:\n    {before}\n\
         fake = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'fake.py')\nos.execv(fake, [fake, *sys.argv[1:]])\n",
        python = python(),
        before = before.trim().replace('\n', "\n    "),
    );
    write_file(&dir.join("plugin"), program.as_bytes(), 0o755);
}

/// Starts descendants that neither a session nor a variable tells of, one of which may not even be looked into.
const HIDE: &str = r#"
def start(*arguments):
    return subprocess.Popen(arguments, env={}, start_new_session=True).pid
descendants = {
    "no environment": start("/bin/sleep", "600"),
    "not dumpable": start(sys.executable, "-c", "import ctypes, time; ctypes.CDLL(None).prctl(4, 0, 0, 0, 0); time.sleep(600)"),
    "no parent": int(subprocess.check_output(["setsid", "env", "-i", "sh", "-c", "/bin/sleep 600 >/dev/null & echo $!"])),
}
RUNNER
with open("descendants.new", "w") as file:
    json.dump(descendants, file)
os.rename("descendants.new", "descendants")
"#;

#[test]
fn nothing_outlives_a_plugin_that_has_a_uid_of_its_own() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("skipped: only root can give plugins uids of their own");
    }
    let site = Site::new().args(&["--plugin-uids", &range(&uids())]);
    for id in ["p", "q"] {
        install_fake_after(&site.plugins(), id, &HIDE.replace("RUNNER", ""));
    }
    let left = |server: &Server, id: &str| {
        server.wait_state(id, "ready");
        let written = fs::read(server.site().data().join(format!("plugin-data/{id}/descendants"))).unwrap();
        let left: BTreeMap<String, i64> = serde_json::from_slice(&written).unwrap();
        assert!(left.len() == 3 && left.values().all(|pid| is_alive(*pid)), "{left:?}");
        left
    };
    let server = site.start();
    let (first, beside) = (left(&server, "p"), left(&server, "q"));
    let plugin = server.plugin("p")["process"]["pid"].as_i64().unwrap();
    kill(plugin);
    server.wait_restarted("p", plugin);
    assert!(first.values().all(|pid| !is_alive(*pid)), "{first:?}");
    let second = left(&server, "p");
    server.cli(&["stop", "p"]);
    assert!(second.values().all(|pid| !is_alive(*pid)), "{second:?}");
    assert!(beside.values().all(|pid| is_alive(*pid)), "those of another plugin stay: {beside:?}");

    let (status, site) = server.stop();
    assert!(status.success() && beside.values().all(|pid| !is_alive(*pid)), "after a stop: {beside:?}");
    let server = site.start();
    let third = left(&server, "p");
    let site = server.kill();
    wait_gone(&third);

    let server = site.start();
    let fourth = left(&server, "p");
    let watchdog = watchdog(&server).unwrap();
    command("kill").args(["-s", "STOP", &watchdog.to_string()]).status().unwrap();
    let site = server.kill();
    assert!(fourth.values().all(|pid| is_alive(*pid)), "{fourth:?}");
    let server = site.start();
    assert!(fourth.values().all(|pid| !is_alive(*pid)), "left by an earlier run: {fourth:?}");
    assert!(server.log().contains("processes that an earlier run of the host had left behind"), "{}", server.log());
    // It would take what runs under these uids for what its own host has left.
    assert!(!is_alive(watchdog), "the watchdog of the earlier host");
    let fifth = left(&server, "p");
    assert!(fifth.values().all(|pid| is_alive(*pid)), "{fifth:?}");
}

/// One of them forks and ends, again and again, so that a process that was found has always ended.
const RUN: &str = r#"
if os.fork() == 0:
    os.setsid()
    os.closerange(0, 64)
    while True:
        if os.fork():
            os._exit(0)
"#;

#[test]
fn a_process_that_forks_all_the_time_does_not_outlive_a_plugin_that_has_a_uid_of_its_own() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("skipped: only root can give plugins uids of their own");
    }
    let uids = uids();
    let site = Site::new().args(&["--plugin-uids", &range(&uids)]);
    install_fake_after(&site.plugins(), "p", &HIDE.replace("RUNNER", RUN));
    let uid = uids.start() + 1;
    let plugin_uid = |pid: &i64| fs::metadata(format!("/proc/{pid}")).is_ok_and(|process| process.uid() == uid);
    // Those that have ended are the system's to reap, however long that takes.
    let left = || {
        let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
        pids.filter(|pid| is_alive(*pid) && plugin_uid(pid)).count()
    };
    let is_quiet = || (0..20).all(|_| left() == 0);
    let server = site.start();
    server.wait_state("p", "ready");
    server.cli(&["stop", "p"]);
    assert!(is_quiet(), "after the end of the plugin");
    server.cli(&["start", "p"]);
    server.wait_state("p", "ready");
    let (status, _site) = server.stop();
    assert!(status.success() && is_quiet(), "after the end of the host");
}

/// The processes with this text in their command line.
fn with_argument(text: &str) -> Vec<i64> {
    let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    let has = |pid: &i64| {
        fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| line.split(|byte| *byte == 0).any(|word| word == text.as_bytes()))
    };
    pids.filter(|pid| is_alive(*pid) && has(pid)).collect()
}

#[test]
fn what_a_program_starts_while_it_is_asked_who_it_is_is_gone_with_the_answer() {
    let root = rustix::process::geteuid().is_root();
    for own in [false, true].into_iter().filter(|own| root || !own) {
        let uids = uids();
        // Nobody else sleeps for so long.
        let time = uids.start().to_string();
        let mut start = format!("sleep {time} & setsid sleep {time} >/dev/null 2>&1 & sleep {time} >/dev/null 2>&1 &");
        if own {
            start += &format!("(env -i setsid sleep {time} &) & env -i sleep {time} >/dev/null 2>&1 &");
        }
        // They must be there before the answer is.
        let wait = format!(
            "until [ $(grep -lzxs {time} /proc/[0-9]*/cmdline | wc -l) -ge {} ]; do sleep 0.01; done",
            if own { 5 } else { 3 }
        );
        let started = format!("#!/bin/sh\n[ \"$1\" = --metadata ] && {{ {start} {wait}; }}\n");
        let answers = script(&metadata("answers"), "exec sleep 60").replacen("#!/bin/sh\n", &started, 1);
        let mut site = Site::new().file("answers", answers.as_bytes(), 0o755);
        for (file, end) in [("fails", "exit 3"), ("hangs", "exec sleep 60"), ("prints", "exec yes"), ("killed", "kill -9 $$")] {
            site = site.file(file, format!("{started}{end}\n").as_bytes(), 0o755);
        }
        if own {
            site = site.args(&["--plugin-uids", &range(&uids)]);
        }
        let server = site.start();
        let left = with_argument(&time);
        left.iter().for_each(|pid| kill(*pid));
        assert!(left.is_empty(), "with uids: {own}, left: {left:?}\n{}", server.log());
        for (file, reason) in
            [("fails", "exit code 3"), ("hangs", "did not end"), ("prints", "printed more"), ("killed", "signal 9")]
        {
            let why = server.plugin(file)["reason"].as_str().unwrap().to_owned();
            assert!(why.contains(reason), "{file}: {why}");
        }
        assert_ne!(server.plugin("answers")["state"], "refused");
    }
}

/// Where there is no `/proc` the program is started again from its path.
#[test]
fn a_watchdog_that_cannot_be_started_is_told_of_once_with_the_file_that_is_missing() {
    let site = Site::new();
    let program = site.data().join("copy");
    copy_program(binary(), &program);
    let serve = site.serve();
    let mut hidden = command("unshare");
    hidden.args(if rustix::process::geteuid().is_root() { "-m" } else { "-rm" }.split(' '));
    hidden.args(["sh", "-c", r#"mount -t tmpfs none /proc && exec "$@""#, "sh"]).arg(&program).args(serve.get_args());
    let server = site.start_as(hidden);
    let first = wait_for("the watchdog", || watchdog(&server));
    let away = program.with_extension("away");
    fs::rename(&program, &away).unwrap();
    kill(first);
    let missing = format!(
        "the watchdog process cannot be started, so processes that plugins started may survive if the host is killed: the host starts its processes by {}, which is missing",
        program.display()
    );
    wait_for("the host to say so", || server.log().contains(&missing).then_some(()));
    // It is tried once a second.
    pause(Duration::from_millis(2500));
    fs::rename(&away, &program).unwrap();
    wait_for("another watchdog", || watchdog(&server).filter(|pid| *pid != first));
    wait_for("the host to say so", || server.log().contains("the watchdog process is running again").then_some(()));
    assert_eq!(server.log().matches("the watchdog process cannot be started").count(), 1, "{}", server.log());
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
    wait_for("the host to say so", || server.log().contains("process 0 is not in a plugin's session").then_some(()));
    server.wait_state("p", "ready");
    let stored = server.request("POST", "/p/kv", &[], br#"{"op":"get","key":"a"}"#);
    assert_eq!(stored.json()["head"]["found"], false, "its own plugins are");
}

/// What the processes of a plugin that has taken another's id do: one connects to the host and ends, and what it has connected is used by
/// another.
const TAKER: &str = r#"
import socket, struct, time
if os.fork() == 0:
    while not os.path.exists("stopped"):
        time.sleep(0.01)
    connection = socket.socket(socket.AF_UNIX)
    caller = os.fork()
    if caller == 0:
        connection.connect(os.environ["PLUGRACK_HOST_SOCKET"])
        os._exit(0)
    os.waitpid(caller, 0)
    with open("connected.new", "w") as file:
        file.write(str(caller))
    os.rename("connected.new", "connected")
    head = json.dumps({"type": "kv", "id": 1, "op": "get", "key": "secret"}).encode()
    try:
        connection.sendall(struct.pack(">II", len(head), 0) + head)
        reply = connection.recv(4096)
    except ConnectionError:
        reply = b""
    with open("reply.new", "wb") as file:
        file.write(reply)
    os.rename("reply.new", "reply")
    os._exit(0)
"#;

/// What the other's do: one of them comes by the id of the process that has ended.
const HEIR: &str = r#"
import signal, time
if os.fork() == 0:
    while not os.path.exists("wanted"):
        time.sleep(0.01)
    wanted, outcome = int(open("wanted").read()), "other"
    for _ in range(200):
        try:
            with open("/proc/sys/kernel/ns_last_pid", "w") as file:
                file.write(str(wanted - 1))
        except OSError:
            outcome = "cannot"
            break
        heir = os.fork()
        if heir == 0:
            time.sleep(600)
        if heir == wanted:
            outcome = "has"
            break
        os.kill(heir, signal.SIGKILL)
        os.waitpid(heir, 0)
    with open("outcome.new", "w") as file:
        file.write(outcome)
    os.rename("outcome.new", "outcome")
    time.sleep(600)
"#;

/// Whether the kernel gives a handle of the process at the other end of a connection, which Linux does from 6.5 on.
fn has_peer_handles() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split('.').map(|number| number.parse::<u32>().unwrap_or_default());
    (numbers.next(), numbers.next()) >= (Some(6), Some(5))
}

#[test]
fn who_comes_by_the_id_of_a_caller_that_has_ended_is_not_taken_for_it() {
    if !has_peer_handles() {
        return eprintln!("skipped: this kernel has no SO_PEERPIDFD");
    }
    let site = Site::new();
    install_fake_after(&site.plugins(), "taker", TAKER);
    install_fake_after(&site.plugins(), "heir", HEIR);
    let server = start_as_first_process(site);
    let of = |id: &str, file: &str| server.site().data().join(format!("plugin-data/{id}/{file}"));
    let written = |id: &str, file: &str| wait_for(file, || fs::read_to_string(of(id, file)).ok());
    for id in ["taker", "heir"] {
        server.wait_state(id, "ready");
    }
    server.cli(&["kv", "set", "heir", "secret", "s3cret"]);
    let is_host =
        |pid: &i64| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == fs::canonicalize(binary()).unwrap());
    let host = children(server.pid().into()).into_iter().find(is_host).unwrap().to_string();
    let signal = |name: &str| assert!(command("kill").args(["-s", name, &host]).status().unwrap().success());
    signal("STOP");
    fs::write(of("taker", "stopped"), "").unwrap();
    write_file(&of("heir", "wanted"), written("taker", "connected").as_bytes(), 0o600);
    let outcome = written("heir", "outcome");
    signal("CONT");
    // Where the heir did not come by the id, the caller may still be there and is answered in its own namespace, which has no such key.
    let reply = written("taker", "reply");
    assert!(!reply.contains("s3cret") && (outcome != "has" || reply.is_empty()), "{outcome}: {reply:?}");
    if outcome == "has" {
        wait_for("the host to say so", || {
            server.log().contains("has ended: its connection to the host socket is closed").then_some(())
        });
    } else {
        eprintln!("only the end of the caller was tried, since the id could not be had again here: {outcome}");
    }
}
