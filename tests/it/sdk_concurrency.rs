//! Plugins of each SDK with many requests at once, and without the files and threads that these need.

use crate::sdk::node;
use crate::support::{Server, Site, copy_program, meeting, pause, root, wait_for, write_file};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::json;
use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

/// Requests that an SDK answers at once unless told otherwise.
const AT_ONCE: usize = 16;

/// A host with the plugin `meeting` in one of the languages.
fn start(language: &str) -> Server {
    start_with(language, Site::new())
}

fn start_with(language: &str, site: Site) -> Server {
    install(&site, "meeting", language, meeting);
    let server = site.start();
    server.wait_state("meeting", "ready");
    server
}

/// Installs a fixture that there is in each language; `built` is the one in Rust.
pub(crate) fn install(site: &Site, fixture: &str, language: &str, built: impl Fn() -> PathBuf) {
    let dir = site.plugins().join(fixture);
    fs::create_dir(&dir).unwrap();
    match language {
        "rust" => copy_program(built(), dir.join("plugin")),
        extension => {
            let program = fs::read(root().join(format!("tests/fixtures/{fixture}.{extension}"))).unwrap();
            write_file(&dir.join("plugin"), &program, 0o755);
            // Node wants to be told that it is a module.
            let folder = root().join(if extension == "py" { "sdk/python" } else { "sdk/node" });
            let name = format!("plugrack.{extension}");
            fs::copy(folder.join(&name), dir.join(&name)).unwrap();
        }
    }
    if language == "mjs" {
        let name = format!("{fixture}.mjs");
        fs::rename(dir.join("plugin"), dir.join(&name)).unwrap();
        std::os::unix::fs::symlink(name, dir.join("plugin")).unwrap();
    }
}

/// So many requests that are answered only once all of them are being handled.
#[track_caller]
fn meet(server: &Server, number: usize) {
    meet_after(server, number, 0);
}

/// The same, where each request is sent again for so many connections that the host has and that the plugin has closed.
#[track_caller]
fn meet_after(server: &Server, number: usize, closed: usize) {
    let path = format!("/meeting/{number}");
    thread::scope(|scope| {
        let request = || {
            let mut replies = (0..=closed).map(|_| server.request("POST", &path, &[], b"x"));
            replies.find(|reply| reply.status != 502).unwrap()
        };
        let threads: Vec<_> = (0..number).map(|_| thread::Builder::new().spawn_scoped(scope, request).unwrap()).collect();
        for thread in threads {
            let reply = thread.join().unwrap();
            assert_eq!((reply.status, reply.text()), (200, "met"));
        }
    });
}

fn answers_beside_a_stream(language: &str) {
    let server = start(language);
    assert_eq!(server.plugin("meeting")["metadata"]["concurrency"], json!(AT_ONCE));
    let mut client = server.client();
    client.send(b"GET /meeting/stream HTTP/1.1\r\nhost: test\r\n\r\n");
    let head = client.reply_head();
    let mut tick = || assert!(client.body_piece(&head).unwrap().starts_with(b"tick"));
    tick();
    for _ in 0..2 {
        meet(&server, AT_ONCE - 1);
    }
    tick();
    assert_eq!(server.plugin("meeting")["process"]["restarts"], json!(0));
}

#[test]
fn the_rust_sdk_answers_fifteen_requests_beside_a_stream() {
    answers_beside_a_stream("rust");
}

#[test]
fn the_python_sdk_answers_fifteen_requests_beside_a_stream() {
    answers_beside_a_stream("py");
}

#[test]
fn the_node_sdk_answers_fifteen_requests_beside_a_stream() {
    if node() {
        answers_beside_a_stream("mjs");
    }
}

#[test]
fn where_memory_is_bounded_an_sdk_takes_no_more_requests_at_once_than_there_is_room_for() {
    for (language, memory) in [("rust", "32MiB"), ("py", "96MiB")] {
        let server = start_with(language, Site::new().args(&["--plugin-memory", memory]));
        let at_once = server.plugin("meeting")["metadata"]["concurrency"].as_u64().unwrap();
        assert!((1..AT_ONCE as u64).contains(&at_once), "{language}: {at_once}");
        meet(&server, usize::try_from(at_once).unwrap());
    }
}

/// A process that is short of something until this is dropped.
struct Short {
    process: Pid,
    resource: Resource,
    before: Rlimit,
}

impl Short {
    fn of(server: &Server, resource: Resource) -> Self {
        let process = Pid::from_raw(server.get("/meeting/pid").text().parse().unwrap()).unwrap();
        let proc = |file: &str| Path::new("/proc").join(process.as_raw_nonzero().to_string()).join(file);
        let number = |text: &str| text.split_whitespace().find_map(|word| word.parse::<u64>().ok());
        let (name, most) = match resource {
            Resource::Nofile => {
                let free = (0..).find(|fd| fs::symlink_metadata(proc("fd").join(fd.to_string())).is_err());
                ("Max open files", free.unwrap())
            }
            _ => {
                let status = fs::read_to_string(proc("status")).unwrap();
                let size = status.lines().find(|line| line.starts_with("VmSize")).and_then(number).unwrap();
                // Less than the stack of a thread, and enough for what a request takes.
                ("Max address space", (size + 1024) * 1024)
            }
        };
        let limits = fs::read_to_string(proc("limits")).unwrap();
        let limit = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        let mut words = limit.split_whitespace().map(|word| word.parse().ok());
        let before = Rlimit { current: words.next().unwrap(), maximum: words.next().unwrap() };
        let short = Self { process, resource, before };
        short.set(Rlimit { current: Some(most), ..before });
        short
    }

    fn set(&self, limit: Rlimit) {
        prlimit(Some(self.process), self.resource, limit).unwrap();
    }
}

impl Drop for Short {
    fn drop(&mut self) {
        self.set(self.before);
    }
}

/// How often a line is in the plugin's log.
fn logged(server: &Server, line: &str) -> usize {
    fs::read_to_string(server.site().data().join("logs/meeting.log")).unwrap().matches(line).count()
}

/// Neither restarted nor short of a connection, once the host knows of those that the plugin has closed.
#[track_caller]
fn assert_whole(server: &Server, closed: usize) {
    meet_after(server, AT_ONCE, closed);
    let plugin = server.plugin("meeting");
    assert_eq!((&plugin["state"], &plugin["process"]["restarts"]), (&json!("ready"), &json!(0)), "{plugin:#}");
}

fn outlives_a_want_of_files(language: &str) {
    let server = start(language);
    let short = Short::of(&server, Resource::Nofile);
    thread::scope(|scope| {
        let meeting = thread::Builder::new().spawn_scoped(scope, || meet(&server, 4)).unwrap();
        wait_for("a line in the log", || (logged(&server, "cannot accept a connection") > 0).then_some(()));
        // Several tries more.
        pause(Duration::from_millis(500));
        assert_eq!(logged(&server, "cannot accept a connection"), 1);
        drop(short);
        meeting.join().unwrap();
    });
    assert_whole(&server, 0);
}

#[test]
fn the_rust_sdk_outlives_a_want_of_files() {
    outlives_a_want_of_files("rust");
}

#[test]
fn the_python_sdk_outlives_a_want_of_files() {
    outlives_a_want_of_files("py");
}

/// Node closes connections that it has no file for, without telling the SDK, so some requests fail.
#[test]
fn the_node_sdk_outlives_a_want_of_files() {
    if !node() {
        return;
    }
    let server = start("mjs");
    let short = Short::of(&server, Resource::Nofile);
    thread::scope(|scope| {
        let request = || server.get("/meeting/pid").status;
        let threads: Vec<_> = (0..AT_ONCE).map(|_| thread::Builder::new().spawn_scoped(scope, request).unwrap()).collect();
        for thread in threads {
            let status = thread.join().unwrap();
            assert!([200, 502, 503].contains(&status), "{status}");
        }
    });
    drop(short);
    assert_whole(&server, AT_ONCE);
}

/// Requests that need more threads than the plugin can have. A connection without a thread is closed, and a POST that the host has sent
/// on it by then is answered 502: which of the requests this happens to is a matter of speed, so each of them is sent again.
fn outlives_a_want_of_threads(language: &str) {
    let server = start(language);
    let mut client = server.client();
    client.send(b"GET /meeting/stream HTTP/1.1\r\nhost: test\r\n\r\n");
    let head = client.reply_head();
    let mut tick = || assert!(client.body_piece(&head).unwrap().starts_with(b"tick"));
    tick();
    let short = Short::of(&server, Resource::As);
    let number = AT_ONCE - 1;
    let path = format!("/meeting/{number}");
    thread::scope(|scope| {
        let request = || {
            wait_for("an answer", || {
                let reply = server.request("POST", &path, &[], b"x");
                (reply.status != 502).then_some(reply)
            })
        };
        let threads: Vec<_> = (0..number).map(|_| thread::Builder::new().spawn_scoped(scope, request).unwrap()).collect();
        wait_for("a line in the log", || (logged(&server, "cannot start a thread") > 0).then_some(()));
        pause(Duration::from_millis(500));
        assert_eq!(logged(&server, "cannot start a thread"), 1);
        drop(short);
        for thread in threads {
            let reply = thread.join().unwrap();
            assert_eq!((reply.status, reply.text()), (200, "met"));
        }
    });
    tick();
    drop(client);
    assert_whole(&server, 0);
}

#[test]
fn the_rust_sdk_outlives_a_want_of_threads() {
    outlives_a_want_of_threads("rust");
}

#[test]
fn the_python_sdk_outlives_a_want_of_threads() {
    outlives_a_want_of_threads("py");
}
