//! Tunnels between a client and an application, after a switch to another protocol.

use crate::support::{Server, Site, copy_program, pause, root, wait_for, write_file};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

/// Time for what is due soon, on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A host with the application at `/t`.
fn host(arguments: &[&str]) -> Server {
    let site = Site::new().args(arguments);
    install(&site, "t");
    let server = site.start();
    server.wait_state("t", "ready");
    server
}

/// Installs the application at the route of this name.
fn install(site: &Site, id: &str) {
    let directory = site.plugins().join(id);
    fs::create_dir_all(&directory).unwrap();
    copy_program(root().join("tests/fixtures/tunnel_app.py"), directory.join("app.py"));
    install_version(site, id, "1.0.0");
}

/// Writes the manifest of an application that is installed.
fn install_version(site: &Site, id: &str, version: &str) {
    let manifest = format!(
        "id = \"{id}\"\nroute = \"/{id}\"\nversion = \"{version}\"\n\n\
         [run]\nkind = \"http\"\ncommand = [\"./app.py\"]\nopen-files = 2048\n"
    );
    write_file(&site.plugins().join(id).join("plugrack.toml"), manifest.as_bytes(), 0o644);
}

/// Lets the tests have so many open files, which is more than many systems let a process have at first.
fn allow_open_files(number: u64) {
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|current| current < number) {
        setrlimit(Resource::Nofile, Rlimit { current: Some(number), ..limit }).unwrap();
    }
}

/// A client that has asked for the protocol `raw` at a path of the application.
fn ask(server: &Server, path: &str) -> TcpStream {
    let mut client = TcpStream::connect(server.address()).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let request = format!("GET /t{path} HTTP/1.1\r\nhost: test\r\nconnection: keep-alive, Upgrade\r\nupgrade: raw\r\n\r\n");
    client.write_all(request.as_bytes()).unwrap();
    client
}

/// The head of the response.
fn head(client: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        assert_eq!(client.read(&mut byte).unwrap(), 1, "{}", String::from_utf8_lossy(&head));
        head.push(byte[0]);
    }
    String::from_utf8(head).unwrap()
}

/// An open tunnel.
fn tunnel(server: &Server, path: &str) -> TcpStream {
    let mut client = ask(server, path);
    let head = head(&mut client);
    assert!(head.starts_with("HTTP/1.1 101 ") && head.contains("\r\nupgrade: raw\r\n"), "{head}");
    assert!(head.contains("\r\nconnection: upgrade\r\n") && head.contains("\r\nx-kept: 1\r\n"), "{head}");
    client
}

fn assert_echoes(client: &mut TcpStream, text: &[u8]) {
    client.write_all(text).unwrap();
    let mut got = vec![0; text.len()];
    client.read_exact(&mut got).unwrap();
    assert_eq!(got, text);
}

fn threads(server: &Server) -> usize {
    fs::read_dir(format!("/proc/{}/task", server.pid())).unwrap().count()
}

#[test]
fn bytes_pass_in_both_directions_and_each_end_is_passed_on_by_itself() {
    let server = host(&[]);
    let mut client = tunnel(&server, "/echo");
    assert_echoes(&mut client, b"ping");
    let large: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[n as usize % 3]).collect();
    let mut writer = client.try_clone().unwrap();
    let sent = large.clone();
    let sender = std::thread::Builder::new().name("sender".into()).spawn(move || {
        writer.write_all(&sent).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let sender = sender.unwrap();
    let mut got = Vec::new();
    client.read_to_end(&mut got).unwrap();
    sender.join().unwrap();
    assert_eq!(got.len(), large.len() + 4);
    assert!(got.starts_with(&large) && got.ends_with(b"END\n"));

    // The application ends first.
    let mut client = tunnel(&server, "/farewell");
    let mut got = Vec::new();
    client.read_to_end(&mut got).unwrap();
    assert_eq!(got, b"bye\n");
    client.write_all(b"the rest").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let rest = server.site().data().join("plugins-data/t/rest");
    wait_for("the rest", || {
        find(server.site().data(), "rest").filter(|rest| rest == b"the rest").or_else(|| fs::read(&rest).ok())
    });
}

/// The content of the file with this name anywhere below a directory.
fn find(directory: &std::path::Path, name: &str) -> Option<Vec<u8>> {
    fs::read_dir(directory).ok()?.flatten().find_map(|entry| match entry.file_type().ok()?.is_dir() {
        true => find(&entry.path(), name),
        false if entry.file_name() == name => fs::read(entry.path()).ok().filter(|content| !content.is_empty()),
        false => None,
    })
}

#[test]
fn what_comes_with_the_request_or_the_response_is_not_lost() {
    let server = host(&[]);
    let mut client = TcpStream::connect(server.address()).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.write_all(b"GET /t/early HTTP/1.1\r\nhost: test\r\nconnection: upgrade\r\nupgrade: raw\r\n\r\nat once").unwrap();
    head(&mut client);
    let mut got = [0; 13];
    client.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"hello\nat once");
}

#[test]
fn an_upgrade_that_is_refused_or_not_asked_for_is_none() {
    let server = host(&[]);
    let mut client = ask(&server, "/refuse");
    assert!(head(&mut client).starts_with("HTTP/1.1 403 "));
    let reply = server.get("/t/unasked");
    assert_eq!(reply.status, 502);
    assert!(head(&mut ask(&server, "/unnamed")).starts_with("HTTP/1.1 502 "));
    server.wait_logged("t", &["it switched to another protocol, which the request did not ask for", "without naming it"]);
    // Another HTTP would hide requests from the host.
    let reply = server.request("GET", "/t/", &[("connection", "upgrade"), ("upgrade", "h2c")], b"");
    assert_eq!(reply.status, 200);
    assert!(!reply.text().contains("upgrade"), "{}", reply.text());
}

#[test]
fn tunnels_cost_no_thread_and_hold_up_no_request() {
    allow_open_files(4096);
    let server = host(&["--max-connections", "1200", "--max-connections-per-address", "1200", "--max-tunnels", "1100"]);
    tunnel(&server, "/echo");
    let before = threads(&server);
    let mut clients: Vec<_> = (0..1000).map(|_| tunnel(&server, "/echo")).collect();
    for client in &mut clients {
        assert_echoes(client, b"one of many");
    }
    assert!(threads(&server) <= before + 70, "{} threads, and {before} before", threads(&server));
    assert_eq!(server.get("/t/").status, 200);
}

#[test]
fn whoever_reads_nothing_holds_up_one_tunnel_and_no_memory() {
    let server = host(&[]);
    let mut other = tunnel(&server, "/echo");
    let before = server.memory("VmRSS");
    let _silent: Vec<_> = (0..20).map(|_| tunnel(&server, "/flood")).collect();
    let mut deaf = tunnel(&server, "/deaf");
    deaf.set_write_timeout(Some(Duration::from_secs(2))).unwrap();
    let block = vec![0; 1 << 20];
    let mut taken = 0_usize;
    while let Ok(n) = deaf.write(&block) {
        taken += n;
        assert!(taken < 64 << 20, "an application that reads nothing is sent more and more");
    }
    for _ in 0..20 {
        assert_echoes(&mut other, b"still here");
        pause(Duration::from_millis(100));
    }
    let grown = server.memory("VmRSS").saturating_sub(before);
    assert!(grown < 16 << 20, "{grown} bytes for 20 tunnels whose clients read nothing");
}

#[test]
fn tunnels_have_a_limit_and_an_idle_time() {
    let server = host(&["--max-tunnels", "2", "--tunnel-idle", "2s"]);
    let (mut first, second) = (tunnel(&server, "/echo"), tunnel(&server, "/echo"));
    assert!(head(&mut ask(&server, "/echo")).starts_with("HTTP/1.1 503 "));
    assert_eq!(server.get("/t/").status, 200);
    let began = Instant::now();
    let mut second = second;
    let mut rest = Vec::new();
    // Bytes in either direction keep the first one open.
    while second.set_read_timeout(Some(Duration::from_millis(500))).is_ok() && second.read_to_end(&mut rest).is_err() {
        assert_echoes(&mut first, b"busy");
        assert!(began.elapsed() < PATIENCE);
    }
    assert!(began.elapsed() >= Duration::from_secs(1));
    assert_echoes(&mut first, b"busy");
    tunnel(&server, "/echo");
}

#[test]
fn a_restart_of_the_plugin_and_the_stop_of_the_host_end_tunnels() {
    let server = host(&[]);
    let mut client = tunnel(&server, "/echo");
    assert_echoes(&mut client, b"ping");
    server.cli(&["restart", "t"]);
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).ok();
    let mut client = tunnel(&server, "/echo");
    assert_echoes(&mut client, b"ping");
    server.stop();
    client.read_to_end(&mut rest).ok();
}

#[test]
fn ten_thousand_messages_stay_in_order_beside_a_client_that_reads_nothing_and_changes_of_another_plugin() {
    let site = Site::new();
    install(&site, "t");
    install(&site, "u");
    let server = site.start();
    server.wait_state("t", "ready");
    server.wait_state("u", "ready");
    let _silent = tunnel(&server, "/flood");
    let mut client = tunnel(&server, "/echo");
    std::thread::scope(|scope| {
        let changes = scope.spawn(|| {
            server.cli(&["restart", "u"]);
            install_version(server.site(), "u", "2.0.0");
            assert_eq!(server.cli(&["rescan"]), "changed: u\n");
        });
        let mut batch = 0;
        while batch < 100 || !changes.is_finished() {
            let messages: String = (0..100).map(|number| format!("message {number} of {batch}\n")).collect();
            assert_echoes(&mut client, messages.as_bytes());
            batch += 1;
        }
        changes.join().unwrap();
    });
    assert_eq!(server.plugin("u")["version"], "2.0.0");
}

#[test]
fn a_restart_and_an_update_end_tunnels_under_load_and_those_whose_clients_read_nothing() {
    let server = host(&[]);
    let update = || {
        install_version(server.site(), "t", "2.0.0");
        server.cli(&["rescan"]);
    };
    let restart = || {
        server.cli(&["restart", "t"]);
    };
    for change in [&restart as &(dyn Fn() + Sync), &update] {
        let mut silent = tunnel(&server, "/flood");
        let mut client = tunnel(&server, "/echo");
        assert_echoes(&mut client, b"before the change");
        std::thread::scope(|scope| {
            let change = scope.spawn(change);
            let (sent, got) = talk_to_the_end(&mut client);
            assert!(sent.starts_with(&got), "{} bytes were sent, and {} other bytes came back", sent.len(), got.len());
            change.join().unwrap();
        });
        let mut rest = Vec::new();
        read_to_the_end(&mut silent, &mut rest);
        assert!(rest.iter().all(|&byte| byte == b'x'));
        assert_echoes(&mut tunnel(&server, "/echo"), b"a new one");
    }
}

/// Sends messages through a tunnel until it ends: what was sent and what came back.
fn talk_to_the_end(client: &mut TcpStream) -> (Vec<u8>, Vec<u8>) {
    let (mut sent, mut got, mut buffer) = (Vec::new(), Vec::new(), [0; 4096]);
    for number in 0.. {
        let message = format!("message {number}\n");
        sent.extend_from_slice(message.as_bytes());
        if client.write_all(message.as_bytes()).is_err() {
            break;
        }
        match client.read(&mut buffer) {
            Ok(0) => return (sent, got),
            Ok(n) => got.extend_from_slice(&buffer[..n]),
            Err(error) => {
                assert_ne!(error.kind(), ErrorKind::WouldBlock, "the tunnel neither passes bytes nor ends");
                return (sent, got);
            }
        }
    }
    read_to_the_end(client, &mut got);
    (sent, got)
}

/// Reads until a tunnel has ended or was reset.
fn read_to_the_end(client: &mut TcpStream, got: &mut Vec<u8>) {
    if let Err(error) = client.read_to_end(got) {
        assert_ne!(error.kind(), ErrorKind::WouldBlock, "the tunnel does not end");
    }
}

#[test]
fn a_plugin_that_speaks_the_plugin_protocol_gets_the_request_without_upgrade_and_its_log_says_so_once() {
    let server = Site::new().fake("p").start();
    server.wait_state("p", "ready");
    for _ in 0..2 {
        let reply = server.request("GET", "/p/x", &[("connection", "upgrade"), ("upgrade", "websocket")], b"");
        assert_eq!(reply.status, 200);
        assert!(!reply.text().contains("websocket"), "{}", reply.text());
    }
    server.wait_logged("p", &["a client asked for WebSocket"]);
    assert_eq!(server.cli(&["logs", "p"]).matches("asked for WebSocket").count(), 1);
}
