//! More than the host can take: each is told so at once, the log is told once, and what the pressure was is over with it.

use crate::support::http::{Client, Reply};
use crate::support::strain::{Disk, count, leave_files, set_limit};
use crate::support::{Server, Site, binary, command, copy_program, uids, wait_for};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use serde_json::json;
use std::fs;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

const MIB: usize = 1 << 20;

fn server_of_p(arguments: &[&str]) -> Server {
    let server = Site::new().args(arguments).fake("p").start();
    server.wait_state("p", "ready");
    server
}

/// Makes a file in the plugin's directory, for which something there waits.
fn touch(server: &Server, name: &str) {
    fs::write(server.site().data().join("plugin-data/p").join(name), b"").unwrap();
}

/// Sends a request of which the answer comes once [`touch`] has made the file `go`, and waits until the plugin is at it.
fn ask_and_wait(mut client: Client) -> Client {
    client.send(b"GET /p/wait?file=go HTTP/1.1\r\nhost: test\r\n\r\n");
    client
}

/// An answer that says that there is too much now: that it names a time to come again, and ends its connection when it is the gate's.
#[track_caller]
fn assert_overloaded(reply: &Reply, message: &str) {
    assert_eq!((reply.status, reply.header("retry-after")), (503, Some("1")), "{reply:?}");
    let error = &reply.json()["error"];
    assert_eq!(error["code"], "overloaded");
    assert!(error["message"].as_str().unwrap().contains(message), "{reply:?}");
}

/// Checks that an event that repeats is logged once.
#[track_caller]
fn assert_said_once(server: &Server, begin: &str) {
    let log = server.log();
    assert_eq!(log.matches(begin).count(), 1, "{log}");
}

#[test]
fn a_full_queue_is_said_once() {
    let limits = ["--max-connections-per-address", "200"];
    let server = Site::new().args(&limits).fake_of_one_connection("p").start();
    server.wait_state("p", "ready");
    let mut waiting = vec![ask_and_wait(server.client())];
    wait_for("the plugin to be at work", || server.site().data().join("plugin-data/p/waiting").exists().then_some(()));
    waiting.extend((0..64).map(|_| ask_and_wait(server.client())));
    wait_for("the queue to be full", || (server.plugin("p")["process"]["waiting"] == 64).then_some(()));
    let mut crowd = server.client();
    (0..100).for_each(|_| assert_overloaded(&crowd.get("/p/x"), "too many requests are waiting"));
    touch(&server, "go");
    assert!(waiting.iter_mut().all(|client| client.reply(false).text() == "waited"));
    assert_eq!(crowd.get("/p/x").text(), "GET /x of p");
    assert_said_once(&server, "the queue of p is full");
}

#[test]
fn of_a_client_that_has_gone_before_its_turn_the_plugin_is_not_told() {
    let server = Site::new().fake_of_one_connection("p").start();
    server.wait_state("p", "ready");
    let directory = server.site().data().join("plugin-data/p");
    let mut busy = ask_and_wait(server.client());
    wait_for("the plugin to be at work", || directory.join("waiting").exists().then_some(()));
    let mut waiting = 0;
    let mut ask = |method: &str, line: &str| {
        let mut client = server.client();
        client.send(format!("{method} /p/next?line={line} HTTP/1.1\r\nhost: test\r\ncontent-length: 0\r\n\r\n").as_bytes());
        waiting += 1;
        wait_for("the request to wait", || (server.plugin("p")["process"]["waiting"] == waiting).then_some(()));
        client
    };
    for method in ["GET", "POST"] {
        ask(method, "gone").reset();
    }
    let mut stays = ask("GET", "stays");
    touch(&server, "go");
    assert_eq!((busy.reply(false).text(), stays.reply(false).status), ("waited", 200));
    assert_eq!(fs::read_to_string(directory.join("next")).unwrap(), "stays\n");
}

#[test]
fn more_connections_than_there_may_be_are_503_until_there_are_fewer() {
    let server = server_of_p(&["--max-connections", "16", "--max-connections-per-plugin", "100%"]);
    let mut taken: Vec<_> = (0..16).map(|_| ask_and_wait(server.client())).collect();
    let mut sent = taken.len();
    // Those that were accepted are known to be by a refusal.
    let mut refused = 0;
    for number in 0..200 {
        // From many addresses, since it is not about one.
        let mut client = Client::connect_from([127, 0, 1, number], server.address());
        if number % 2 == 0 {
            client.try_send(b"GET /p/x HTTP/1.1\r\nhost: test\r\n\r\n");
        }
        let reply = client.reply(false);
        assert_overloaded(&reply, "there are too many connections");
        assert_eq!(reply.header("connection"), Some("close"));
        assert!(client.is_closed());
        refused += 1;
        sent += 1;
    }
    assert_eq!((sent, refused), (216, 200));
    assert!(server.site().cli(&["list"]).status.success(), "there is always a place for the operator");
    touch(&server, "go");
    assert!(taken.iter_mut().all(|client| client.reply(false).text() == "waited"));
    drop(taken);
    wait_for("a place", || (server.get("/p/x").status == 200).then_some(()));
    assert_said_once(&server, "all 16 connections are taken");
    // The log agrees with itself: a client that comes just as others leave may be refused too.
    let over = "too many connections: over, ";
    let more: usize =
        wait_for("the end of the overload to be logged", || server.log().split_once(over)?.1.split(' ').next()?.parse().ok());
    assert!((199..=240).contains(&more), "{more} more of 200");
}

#[test]
fn one_address_with_too_many_connections_leaves_the_others_theirs() {
    let server = server_of_p(&["--max-connections-per-address", "4"]);
    let greedy = || Client::connect_from([127, 0, 0, 2], server.address());
    let mut taken: Vec<_> = (0..4).map(|_| ask_and_wait(greedy())).collect();
    for _ in 0..50 {
        assert_overloaded(&greedy().reply(false), "there are too many connections");
        assert_eq!(server.get("/healthz").status, 200, "another address is not concerned");
    }
    touch(&server, "go");
    assert!(taken.iter_mut().all(|client| client.reply(false).text() == "waited"));
    drop(taken);
    wait_for("a place", || (greedy().get("/p/x").status == 200).then_some(()));
    assert_said_once(&server, "127.0.0.2 has 4 connections, and another was refused");
    assert!(!server.log().contains("all 512 connections"));
}

#[test]
fn without_files_each_client_is_told_and_those_that_are_there_are_served() {
    let server = server_of_p(&[]);
    let mut honest = server.client();
    assert_eq!(honest.get("/p/x").status, 200);
    let hard = hard_limit(&server);
    leave_files(&server, 0);
    // The gaps between the host's files are taken first.
    let mut gaps = Vec::new();
    wait_for("all files to be taken", || {
        let mut client = server.client();
        let got = client.wait_readable(Duration::from_millis(200));
        gaps.push(client);
        got.then_some(())
    });
    for number in 0..40 {
        let mut client = server.client();
        if number % 2 == 0 {
            client.try_send(b"GET /p/x HTTP/1.1\r\nhost: test\r\n\r\n");
        }
        assert_overloaded(&client.reply(false), "there are too many connections");
        assert_eq!(honest.get("/p/x").text(), "GET /x of p");
    }
    set_limit(&server, &format!("--nofile={hard}:"));
    drop(gaps);
    assert_eq!(server.get("/p/x").text(), "GET /x of p");
    assert_said_once(
        &server,
        "a connection was not taken, the limit of open files of the host is reached: raise it with ulimit -n",
    );
    assert!(!server.log().contains("panicked"), "{}", server.log());
}

/// The limit of open files that a host may be given back.
fn hard_limit(server: &Server) -> u64 {
    let limits = fs::read_to_string(format!("/proc/{}/limits", server.pid())).unwrap();
    let files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    files.split_whitespace().nth(4).unwrap().parse().unwrap()
}

/// Has bodies passed on as they come, unless they come in one piece.
const AS_THEY_COME: [&str; 2] = ["--body-buffer", "0"];

/// A request that takes so many seconds, with a body that does not come in one piece.
fn sleep_with_body(seconds: f32) -> Vec<u8> {
    let body = "x".repeat(80_000);
    format!("POST /p/sleep?s={seconds} HTTP/1.1\r\nhost: test\r\ncontent-length: 80000\r\n\r\n{body}").into_bytes()
}

/// A request takes no file beside that of its connection.
#[test]
fn with_a_few_files_left_the_clients_that_are_there_are_served() {
    let server = server_of_p(&AS_THEY_COME);
    let hard = hard_limit(&server);
    for few in 1..6 {
        // Connections of clients that take no file more than they have.
        let mut clients: Vec<_> = (0..12).map(|_| server.client()).collect();
        assert!(clients.iter_mut().all(|client| client.get("/healthz").status == 200));
        leave_files(&server, few);
        clients.iter_mut().for_each(|client| client.send(&sleep_with_body(0.5)));
        let statuses: Vec<u16> = clients.iter_mut().map(|client| client.reply(false).status).collect();
        assert!(statuses.iter().all(|status| *status == 200), "{few}: {statuses:?}");
        set_limit(&server, &format!("--nofile={hard}:"));
        assert_eq!(server.get("/p/x").text(), "GET /x of p", "after {few}");
    }
}

/// A request takes no thread, and a plugin has at least one.
#[test]
fn without_threads_all_clients_are_answered() {
    if fs::metadata("/proc/self").unwrap().uid() != 0 {
        // Only root can become another user, and this user's own threads would count.
        return;
    }
    let site = Site::new().args(&AS_THEY_COME).fake("p");
    // The limit counts all threads of a user, on the whole machine.
    let user = uids().start().to_string();
    let own = site.data().join("plugrack");
    copy_program(binary(), &own);
    assert!(command("chown").args(["-R", &user]).arg(site.data()).status().unwrap().success());
    let mut serve = command("setpriv");
    serve.args(["--reuid", &user, "--regid", &user, "--clear-groups", "prlimit", "--nproc=500:500"]).arg(own);
    serve.args(site.serve().get_args());
    let server = site.start_as(serve);
    server.wait_state("p", "ready");
    let mut clients: Vec<_> = (0..24).map(|_| server.client()).collect();
    for round in 0..4 {
        set_limit(&server, "--nproc=1:");
        clients.iter_mut().for_each(|client| client.send(&sleep_with_body(0.05)));
        let statuses: Vec<u16> = clients.iter_mut().map(|client| client.reply(false).status).collect();
        assert!(statuses.iter().all(|status| *status == 200), "round {round}: {statuses:?}");
        set_limit(&server, "--nproc=500:");
    }
    assert!(!server.log().contains("panicked"), "{}", server.log());
}

#[test]
fn bodies_for_which_there_is_no_room_are_503_until_there_is() {
    let server = server_of_p(&["--body-memory", "256KiB", "--body-disk", "512KiB"]);
    let begin = |server: &Server, bytes: usize| {
        let mut client = server.client();
        client.send(format!("POST /p/upload HTTP/1.1\r\nhost: test\r\ncontent-length: {MIB}\r\n\r\n").as_bytes());
        client.try_send(&vec![7; bytes]);
        client
    };
    // More than half of all there is, held by one that does not go on.
    let holder = begin(&server, 700 * 1024);
    wait_for("the first to be on disk", || (server.spooled() > 0).then_some(()));
    for _ in 0..20 {
        assert_overloaded(&begin(&server, 300 * 1024).reply(false), "there is no room for the request's body now");
        assert_eq!(server.get("/p/x").status, 200);
    }
    drop(holder);
    wait_for("room", || (server.spooled() == 0).then_some(()));
    let reply = server.request("POST", "/p/upload", &[], &vec![7; 700 * 1024]);
    assert!(reply.text().starts_with("716800 "), "{reply:?}");
    assert_said_once(&server, "bodies of requests are refused: --body-memory and --body-disk are used up");
}

#[test]
fn a_body_for_which_the_disk_has_no_space_is_507_until_it_has() {
    let site = Site::new().args(&["--body-memory", "64KiB"]);
    let Some(disk) = Disk::in_memory(&site, "16m") else { return };
    let server = site.fake("p").start();
    server.wait_state("p", "ready");
    let upload = || {
        let mut client = server.client();
        client.send(format!("POST /p/upload HTTP/1.1\r\nhost: test\r\ncontent-length: {}\r\n\r\n", 4 * MIB).as_bytes());
        client.try_send(&vec![7; 4 * MIB]);
        client.reply(false)
    };
    disk.fill(16);
    for _ in 0..10 {
        let reply = upload();
        assert_eq!((reply.status, &reply.json()["error"]["code"]), (507, &json!("no_space")), "{reply:?}");
        assert_eq!(server.get("/p/x").status, 200, "what needs no space is served");
        assert_eq!(server.request("POST", "/p/echo", &[], b"small").text(), "small");
    }
    disk.free();
    assert!(upload().text().starts_with(&format!("{} ", 4 * MIB)));
    assert_said_once(&server, "bodies of requests are refused: there is no space left on the disk for them");
    drop(server.kill());
    drop(disk);
}

/// The operator's socket as the host has it, where tiny_http accepts connections.
fn operators_listener(server: &Server) -> Option<OwnedFd> {
    let sockets = fs::read_to_string(format!("/proc/{}/net/unix", server.pid())).unwrap();
    let path = server.site().data().join("run/api.sock").to_str().unwrap().to_owned();
    // A line is: address, counts, flags (00010000 for one that listens), type, state, number, path.
    let wanted = |line: &&str| line.ends_with(&path) && line.contains(" 00010000 ");
    let inode = sockets.lines().find(wanted)?.split_whitespace().nth(6)?;
    let link = format!("socket:[{inode}]");
    let pid = pidfd_open(Pid::from_raw(server.pid().cast_signed()).unwrap(), PidfdFlags::empty()).unwrap();
    let mut files = fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap().flatten();
    let file = files.find(|file| fs::read_link(file.path()).is_ok_and(|other| other.to_str() == Some(&link)))?;
    pidfd_getfd(&pid, file.file_name().to_str()?.parse().ok()?, PidfdGetfdFlags::empty()).ok()
}

/// tiny_http stops accepting at any error, as it does without files.
#[test]
fn the_operators_socket_is_opened_again_when_tiny_http_stops_accepting_and_no_client_notices() {
    let server = server_of_p(&[]);
    let mut waiting = ask_and_wait(server.client());
    for round in 1..=2 {
        let socket = wait_for("tiny_http to listen", || operators_listener(&server));
        rustix::net::shutdown(socket, rustix::net::Shutdown::Both).unwrap();
        assert_eq!(server.get("/p/x").text(), "GET /x of p");
        let said = "the operator's socket takes no connections any more, and is opened again";
        wait_for(said, || (server.log().matches(said).count() == round).then_some(()));
        wait_for("the operator to be answered", || server.site().cli(&["list"]).status.success().then_some(()));
    }
    touch(&server, "go");
    assert_eq!(waiting.reply(false).text(), "waited");
}

/// tiny_http allocates what a dropped request has announced and not sent.
#[test]
fn a_request_that_announces_a_huge_body_does_not_end_the_host() {
    let server = server_of_p(&[]);
    let socket = server.site().data().join("run/api.sock");
    for (count, length) in (1..).zip(["67108865", "99999999999999", "18446744073709551615"]) {
        let mut client = UnixStream::connect(&socket).unwrap();
        write!(client, "GET /api/plugins HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n").unwrap();
        let said = "a request at the operator's socket gets no answer: it announces more than the limit of 67108864 bytes";
        wait_for(said, || (server.log().matches(said).count() == count).then_some(()));
    }
    assert!(server.site().cli(&["list"]).status.success());
    assert_eq!(server.get("/p/x").text(), "GET /x of p");
}

/// What was opened for a crowd is closed behind it.
#[test]
fn after_a_crowd_the_host_has_no_more_files_and_threads_than_before() {
    let server = server_of_p(&["--max-connections-per-address", "300"]);
    assert_eq!(server.get("/p/x").status, 200);
    let before = (count(&server, "fd"), count(&server, "task"));
    let mut clients: Vec<_> = (0..250).map(|_| server.client()).collect();
    clients.iter_mut().for_each(|client| client.send(b"GET /p/wait?file=go HTTP/1.1\r\nhost: test\r\n\r\n"));
    // The plugin has four at work, and the others wait for it.
    wait_for("all of them to be there", || (server.plugin("p")["process"]["waiting"] == 246).then_some(()));
    assert!(count(&server, "task") <= before.1 + 4, "a client takes no thread");
    touch(&server, "go");
    assert!(clients.iter_mut().all(|client| client.reply(false).text() == "waited"));
    drop(clients);
    wait_for("files and threads to be given back", || {
        let now = (count(&server, "fd"), count(&server, "task"));
        // The plugin may keep its four connections for a while, and a thread for each.
        (now.0 <= before.0 + 4 && now.1 <= before.1 + 4).then_some(())
    });
}
