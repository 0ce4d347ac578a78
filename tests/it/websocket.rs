//! WebSocket of applications that people run, by a client that is not ours: through tunnels, below a route and at a host name.

use crate::bridges::packages;
use crate::support::{Server, Site, command, root};
use std::fs;
use std::os::unix::fs::symlink;

/// A host with the application `w`, at `/w` and at `w.localhost`, of this fixture and manifest.
fn start(fixture: &str, run: &str) -> Server {
    let site = Site::new();
    let dir = site.plugins().join("w");
    fs::create_dir(&dir).unwrap();
    fs::copy(root().join("tests/fixtures").join(fixture), dir.join(fixture)).unwrap();
    symlink(packages().join("node/node_modules"), dir.join("node_modules")).unwrap();
    fs::write(dir.join("plugrack.toml"), format!("id = \"w\"\nroute = \"/w\"\n\n[run]\nkind = \"http\"\n{run}\n")).unwrap();
    let server = site.args(&["--start-timeout", "60s"]).start();
    server.wait_state("w", "ready");
    server
}

/// Runs the client, which checks every reply.
#[track_caller]
fn assert_talks(server: &Server, base: &str, host: &str, more: &[&str]) {
    let mut client = command(packages().join("python/bin/python3"));
    client.arg(root().join("tests/fixtures/websocket_client.py")).args([base, host, &server.address().to_string()]).args(more);
    let output = client.output().unwrap();
    let [out, err] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned());
    assert!(output.status.success() && out == "all is well\n", "{out}{err}\n{}\n{}", server.cli(&["logs", "w"]), server.log());
}

#[test]
fn starlette_under_uvicorn_speaks_websocket_with_an_independent_client() {
    let uvicorn = packages().join("python/bin/uvicorn").display().to_string();
    let server =
        start("websocket_app.py", &format!("command = [\"{uvicorn}\", \"--uds\", \"{{socket}}\", \"websocket_app:app\"]"));
    let address = server.address();
    assert_talks(&server, &format!("ws://{address}/w"), &address.to_string(), &["--refused"]);
    let local = format!("w.localhost:{}", address.port());
    assert_talks(&server, &format!("ws://{local}"), &local, &[]);
    server.wait_logged("w", &["closed with 3001"]);
    assert_eq!(server.get("/w/").text(), "a page");
}

#[test]
fn ws_under_node_speaks_websocket_with_an_independent_client() {
    let server = start("websocket_app.mjs", "command = [\"node\", \"websocket_app.mjs\"]\nlisten = \"port\"");
    let address = server.address();
    assert_talks(&server, &format!("ws://{address}/w"), &address.to_string(), &[]);
    server.wait_logged("w", &["closed with 3001", "closed with 4001"]);
}
