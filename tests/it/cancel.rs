//! Each SDK when the host gives up a request whose handler is silent. Most tests are the host themselves: they speak to a plugin's
//! process over its socket, and close a connection in the middle of a stream, as the host does when a client goes.

use crate::sdk::node;
use crate::support::{Guarded, Server, Site, cancelled, command, copy_program, pause, root, wait_for, write_file};
use plugrack_sdk::protocol::frame::{FrameReader, encode};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

/// A plugin that takes longer to answer than this has failed.
const PATIENCE: Duration = Duration::from_secs(30);

/// Puts the fixture `cancelled` in one of the languages into a directory, as the file `plugin`.
fn install(language: &str, dir: &Path) {
    if language == "rust" {
        copy_program(cancelled(), dir.join("plugin"));
        return;
    }
    // Node wants to be told that it is a module.
    let name = format!("cancelled.{language}");
    write_file(&dir.join(&name), &fs::read(root().join("tests/fixtures").join(&name)).unwrap(), 0o755);
    symlink(&name, dir.join("plugin")).unwrap();
    let sdk = root().join("sdk").join(if language == "py" { "python/plugrack.py" } else { "node/plugrack.mjs" });
    fs::copy(&sdk, dir.join(sdk.file_name().unwrap())).unwrap();
}

/// A host with the fixture, ready.
fn serve(site: Site, language: &str) -> Server {
    let dir = site.plugins().join("cancelled");
    fs::create_dir(&dir).unwrap();
    install(language, &dir);
    let server = site.start();
    server.wait_state("cancelled", "ready");
    server
}

/// The fixture, ready.
struct Plugin {
    dir: TempDir,
    _process: Guarded,
    first: Option<Connection>,
}

impl Plugin {
    fn start(language: &str, concurrency: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        install(language, dir.path());
        let log = File::create(dir.path().join("log")).unwrap();
        let process = command(dir.path().join("plugin"))
            .current_dir(dir.path())
            .env("PLUGRACK_SOCKET", dir.path().join("socket"))
            .env("CONCURRENCY", concurrency.to_string())
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut plugin = Self { dir, _process: Guarded(process), first: None };
        let mut first = plugin.connect();
        let init = json!({
            "type": "init", "id": 1, "protocol": 1, "instance_id": "5f0c3f0e", "plugin_id": "cancelled",
            "socket_path": plugin.socket(), "host_socket": "/nowhere", "log_path": plugin.dir.path().join("log"),
            "data_dir": plugin.dir.path(), "config": {}, "host": {"name": "test", "version": "0"},
        });
        first.send(&init);
        assert_eq!(first.receive().0["type"], "ready", "{}", plugin.log());
        plugin.first = Some(first);
        plugin
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    /// How often the plugin has logged a line.
    fn count(&self, line: &str) -> usize {
        self.log().lines().filter(|logged| *logged == line).count()
    }

    fn connect(&self) -> Connection {
        let stream = wait_for("the plugin to listen", || UnixStream::connect(self.socket()).ok());
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Connection(FrameReader::new(stream))
    }

    /// Asks for a stream on as many connections as there may be, and closes them all once the streams are silent.
    fn abandon(&mut self, path: &str, number: usize) {
        let before = self.count("silent");
        let mut connections: Vec<_> = self.first.take().into_iter().collect();
        while connections.len() < number {
            connections.push(self.connect());
        }
        for connection in &mut connections {
            connection.ask(path);
            assert_eq!(connection.receive().0["more"], true);
        }
        wait_for("the streams to fall silent", || (self.count("silent") == before + number).then_some(()));
    }

    /// As many new connections as there may be are answered on.
    #[track_caller]
    fn assert_answers(&self, number: usize) {
        let mut connections: Vec<_> = (0..number).map(|_| self.connect()).collect();
        connections.iter_mut().for_each(|connection| connection.ask("/"));
        for connection in &mut connections {
            assert_eq!(connection.receive().1, b"hello", "{}", self.log());
        }
    }
}

/// The host's end of a connection.
struct Connection(FrameReader<UnixStream>);

impl Connection {
    fn send(&mut self, head: &Value) {
        let mut frame = Vec::new();
        encode(&mut frame, head, b"").unwrap();
        self.0.stream().write_all(&frame).unwrap();
    }

    fn ask(&mut self, path: &str) {
        self.send(&json!({"type": "http", "id": 7, "method": "GET", "path": path, "mount": "/cancelled"}));
    }

    #[track_caller]
    fn receive(&mut self) -> (Value, Vec<u8>) {
        let frame = self.0.read().unwrap();
        (serde_json::from_slice(frame.head).unwrap(), frame.body.to_vec())
    }
}

fn notices_a_host_that_has_gone(language: &str) {
    for concurrency in [1, 2] {
        let mut plugin = Plugin::start(language, concurrency);
        plugin.abandon("/heeds", concurrency);
        wait_for("the streams to be cancelled", || (plugin.count("cancelled") == concurrency).then_some(()));
        plugin.assert_answers(concurrency);
        assert_eq!(plugin.count("not cancelled"), 0);
    }
}

#[test]
fn a_silent_stream_of_the_rust_sdk_learns_that_the_host_has_gone() {
    notices_a_host_that_has_gone("rust");
}

#[test]
fn a_silent_stream_of_the_python_sdk_learns_that_the_host_has_gone() {
    notices_a_host_that_has_gone("py");
}

#[test]
fn a_silent_stream_of_the_node_sdk_learns_that_the_host_has_gone() {
    if node() {
        notices_a_host_that_has_gone("mjs");
    }
}

/// The streams go on being blocked for the whole test.
fn serves_others_beside_blocked_streams(language: &str) {
    for concurrency in [1, 2] {
        let mut plugin = Plugin::start(language, concurrency);
        plugin.abandon("/blocked", concurrency);
        plugin.assert_answers(concurrency);
        // Now as many handlers run as the SDK allows. The log says so once.
        plugin.abandon("/blocked", concurrency);
        let mut waiting = plugin.connect();
        waiting.ask("/");
        let expected = format!(": {} handlers still run for requests that the host has given up, ", 2 * concurrency);
        wait_for("a line in the log", || plugin.log().contains(&expected).then_some(()));
        assert_eq!(plugin.log().matches(" handlers still run").count(), 1, "{}", plugin.log());
    }
}

#[test]
fn the_rust_sdk_serves_others_beside_blocked_streams_whose_host_has_gone() {
    serves_others_beside_blocked_streams("rust");
}

#[test]
fn the_python_sdk_serves_others_beside_blocked_streams_whose_host_has_gone() {
    serves_others_beside_blocked_streams("py");
}

#[test]
fn the_node_sdk_serves_others_beside_blocked_streams_whose_host_has_gone() {
    if node() {
        serves_others_beside_blocked_streams("mjs");
    }
}

/// The host gives a request up when its time has passed, and has only this one connection for the next.
fn heeds_the_end_of_a_requests_time(language: &str) {
    let server = serve(Site::new().args(&["--request-timeout", "1s"]), language);
    assert_eq!(server.get("/cancelled/late").status, 504);
    server.wait_logged("cancelled", &["cancelled\n"]);
    wait_for("an answer", || (server.get("/cancelled/").text() == "hello").then_some(()));
    assert_eq!(server.plugin("cancelled")["process"]["restarts"], json!(0));
}

#[test]
fn a_handler_of_the_rust_sdk_heeds_the_end_of_its_requests_time() {
    heeds_the_end_of_a_requests_time("rust");
}

#[test]
fn a_handler_of_the_python_sdk_heeds_the_end_of_its_requests_time() {
    heeds_the_end_of_a_requests_time("py");
}

#[test]
fn a_handler_of_the_node_sdk_heeds_the_end_of_its_requests_time() {
    if node() {
        heeds_the_end_of_a_requests_time("mjs");
    }
}

/// Handlers of a plugin with one connection need not be safe to run side by side, not even beside one that was given up.
fn calls_handlers_one_by_one(language: &str) {
    let mut plugin = Plugin::start(language, 1);
    let mut given_up = plugin.first.take().unwrap();
    given_up.ask("/deaf");
    wait_for("the handler to run", || (plugin.count("deaf") == 1).then_some(()));
    drop(given_up);
    let mut next = plugin.connect();
    next.ask("/next");
    pause(Duration::from_millis(500));
    assert_eq!(plugin.count("answered /next"), 0);
    fs::write(plugin.dir.path().join("go"), "").unwrap();
    assert_eq!(next.receive().1, b"hello", "{}", plugin.log());
    let answered: Vec<_> = plugin.log().lines().filter(|line| line.starts_with("answered")).map(str::to_owned).collect();
    assert_eq!(answered, ["answered /deaf", "answered /next"]);
}

#[test]
fn the_rust_sdk_calls_handlers_one_by_one_where_there_is_one_connection() {
    calls_handlers_one_by_one("rust");
}

#[test]
fn the_python_sdk_calls_handlers_one_by_one_where_there_is_one_connection() {
    calls_handlers_one_by_one("py");
}

#[test]
fn the_node_sdk_calls_handlers_one_by_one_where_there_is_one_connection() {
    if node() {
        calls_handlers_one_by_one("mjs");
    }
}

/// By a real client, which closes its connection while the stream is silent.
fn ends_the_stream_of_a_client_that_has_gone(language: &str) {
    let server = serve(Site::new(), language);
    for round in 1..=2 {
        let mut client = server.client();
        client.send(b"GET /cancelled/heeds HTTP/1.1\r\nhost: test\r\n\r\n");
        assert_eq!(client.reply_head().status, 200);
        drop(client);
        assert_eq!(server.get("/cancelled/").text(), "hello");
        let log = || fs::read_to_string(server.site().data().join("logs/cancelled.log")).unwrap_or_default();
        wait_for("the stream to be cancelled", || {
            (log().lines().filter(|line| line.ends_with(" cancelled")).count() == round).then_some(())
        });
    }
    assert_eq!(server.plugin("cancelled")["process"]["restarts"], 0);
}

#[test]
fn a_client_that_closes_ends_its_silent_stream_in_the_rust_sdk() {
    ends_the_stream_of_a_client_that_has_gone("rust");
}

#[test]
fn a_client_that_closes_ends_its_silent_stream_in_the_python_sdk() {
    ends_the_stream_of_a_client_that_has_gone("py");
}

#[test]
fn a_client_that_closes_ends_its_silent_stream_in_the_node_sdk() {
    if node() {
        ends_the_stream_of_a_client_that_has_gone("mjs");
    }
}
