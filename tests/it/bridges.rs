//! Applications of Flask, FastAPI and Express that the SDKs make plugins of, through the real host.

use crate::docs::blocks_in;
use crate::sdk::node;
use crate::support::{Server, Site, root, write_file};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

/// Where `make test-tools` installs the packages from PyPI and npm that tests run.
#[track_caller]
pub(crate) fn packages() -> PathBuf {
    let packages = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap().join("test-packages");
    for language in ["python", "node"] {
        let mark = packages.join(format!("{language}.installed"));
        assert!(mark.exists(), "{} is not there: `make test-tools` installs the packages that tests run", mark.display());
    }
    packages
}

/// A host with one plugin, whose Python and Node have the packages.
fn start(id: &str, name: &str, program: &str) -> Server {
    start_with(id, name, program, &[])
}

/// The same with these fixtures beside the program.
pub(crate) fn start_with(id: &str, name: &str, program: &str, fixtures: &[&str]) -> Server {
    let site = Site::new();
    let dir = site.plugins().join(id);
    fs::create_dir(&dir).unwrap();
    write_file(&dir.join(name), program.as_bytes(), 0o755);
    if name != "plugin" {
        symlink(name, dir.join("plugin")).unwrap();
    }
    for sdk in ["python/plugrack.py", "node/plugrack.mjs"] {
        let sdk = root().join("sdk").join(sdk);
        fs::copy(&sdk, dir.join(sdk.file_name().unwrap())).unwrap();
    }
    for fixture in fixtures {
        fs::copy(root().join("tests/fixtures").join(fixture), dir.join(fixture)).unwrap();
    }
    symlink(packages().join("node/node_modules"), dir.join("node_modules")).unwrap();
    let path = format!("{}:{}", packages().join("python/bin").display(), std::env::var("PATH").unwrap());
    // Larger bodies reach the plugin as they arrive.
    let server = site.env("PATH", &path).args(&["--start-timeout", "60s", "--body-buffer", "64KiB"]).start();
    server.wait_state(id, "ready");
    server
}

/// The application in `tests/fixtures`.
fn start_fixture(name: &str) -> Server {
    let program = fs::read_to_string(root().join("tests/fixtures").join(name)).unwrap();
    start("bridge", if name.ends_with(".mjs") { "bridge.mjs" } else { "plugin" }, &program)
}

/// What every application answers, whatever it is written with.
fn answers_as_an_application(server: &Server) {
    let mut client = server.client();
    let look = client.get("/bridge/look/caf%C3%A9/a%20b?q=x%2By");
    let host = server.address();
    assert_eq!((look.status, look.text()), (200, format!("/bridge /look/café/a b x+y http://test/ {}", host.ip()).as_str()));
    for size in [0, 1, 100_000, 3 << 20] {
        let reply = client.request("POST", "/bridge/size", &[], &vec![b'x'; size]);
        assert_eq!((reply.status, reply.text()), (200, size.to_string().as_str()));
    }
    let chunked = client.request_chunked("POST", "/bridge/size", &[b"hello", &[b'x'; 100_000]]);
    assert_eq!(chunked.text(), "100005", "a body whose length is not announced");
    assert_eq!(client.request("HEAD", "/bridge/nowhere", &[], b"").status, 404);
    assert_eq!(client.get("/bridge/nowhere").status, 404);

    let failed = client.get("/bridge/fails");
    assert_eq!(failed.status, 500);
    server.wait_logged("bridge", &["Error: on purpose"]);

    client.send(b"GET /bridge/events HTTP/1.1\r\nhost: test\r\n\r\n");
    let head = client.reply_head();
    assert!(head.header("content-type").is_some_and(|kind| kind.starts_with("text/event-stream")));
    for _ in 0..3 {
        assert!(client.body_piece(&head).unwrap().starts_with(b"data: "), "events come one by one");
    }
    drop(client);
    server.wait_logged("bridge", &["events left"]);
    assert_eq!(server.get("/bridge/nowhere").status, 404);
    assert_eq!(server.plugin("bridge")["process"]["restarts"], 0);
}

#[test]
fn flask_answers_through_wsgi() {
    answers_as_an_application(&start_fixture("bridge_wsgi.py"));
}

#[test]
fn fastapi_answers_through_asgi() {
    answers_as_an_application(&start_fixture("bridge_asgi.py"));
}

#[test]
fn express_answers_through_from_node() {
    if node() {
        answers_as_an_application(&start_fixture("bridge_node.mjs"));
    }
}

#[test]
fn an_asgi_lifespan_begins_and_ends_with_the_plugin_and_can_refuse_the_start() {
    let server = start_fixture("bridge_asgi.py");
    server.wait_logged("bridge", &["started"]);
    server.cli(&["stop", "bridge"]);
    server.wait_logged("bridge", &["shut down"]);
    server.cli(&["config", "set", "bridge", "refuse", "1"]);
    server.cli_fails(&["start", "bridge"]);
    let plugin = server.plugin("bridge");
    assert!(plugin["reason"].as_str().is_some_and(|reason| reason.contains("the setting refuse is there")), "{plugin:#}");
    server.cli(&["config", "unset", "bridge", "refuse"]);
    server.cli(&["start", "bridge"]);
    server.wait_state("bridge", "ready");
}

#[test]
fn the_protocol_pages_applications_work_as_written() {
    let blocks = |language| blocks_in("docs/protocol.md", language);
    let python = blocks("python");
    for (id, block) in [("wsgi-app", &python[0]), ("asgi-app", &python[1])] {
        let server = start(id, "plugin", block);
        assert_eq!(server.get(&format!("/{id}/")).text(), "Visit 1\n");
        assert_eq!(server.get(&format!("/{id}")).text(), "Visit 2\n");
    }
    if node() {
        let server = start("node-app", "plugin.mjs", &blocks("js")[0]);
        assert_eq!(server.get("/node-app/").text(), "Visit 1\n");
    }
}
