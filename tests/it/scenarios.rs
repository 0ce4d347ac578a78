//! The scenarios of the `plugins` capability, one test each under its own title.

use crate::support::{Server, Site, binary, command, pause, root, wait_for};
use rusqlite::{Connection, OpenFlags};
use serde_json::{Value, json};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The instance ids in the settings table of the database.
fn stored_instance_ids(data: &Path) -> Vec<String> {
    let database = Connection::open_with_flags(data.join("plugrack.db"), OpenFlags::SQLITE_OPEN_READ_ONLY).unwrap();
    let mut statement = database.prepare("SELECT value FROM settings WHERE key = 'instance_id'").unwrap();
    statement.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect()
}

/// The instance id a running host says it has.
fn instance_id(server: &Server) -> String {
    server.api("GET", "/instance", b"").1["instance_id"].as_str().unwrap().to_owned()
}

/// Whether a text is a UUID of version 4, in its usual form.
fn is_uuid_v4(text: &str) -> bool {
    let groups: Vec<&str> = text.split('-').collect();
    let hex = |c: char| matches!(c, '0'..='9' | 'a'..='f');
    groups.iter().map(|group| group.len()).eq([8, 4, 4, 4, 12])
        && groups.iter().all(|group| group.chars().all(hex))
        && groups[2].starts_with('4')
        && groups[3].starts_with(['8', '9', 'a', 'b'])
}

/// The `init` message a fake plugin was sent.
fn init_of(server: &Server, id: &str) -> Value {
    server.wait_state(id, "ready");
    server.get(&format!("/{id}/init")).json()
}

/// Says something to a plugin as the host does, and gives its reply.
#[track_caller]
fn say(stream: &mut UnixStream, head: &Value, body: &[u8]) -> (Value, Vec<u8>) {
    let head = head.to_string();
    for length in [head.len(), body.len()] {
        stream.write_all(&u32::try_from(length).unwrap().to_be_bytes()).unwrap();
    }
    stream.write_all(&[head.as_bytes(), body].concat()).unwrap();
    let [head, body] = [(); 2].map(|()| {
        let mut length = [0; 4];
        stream.read_exact(&mut length).unwrap();
        vec![0; u32::from_be_bytes(length) as usize]
    });
    let [head, body] = [head, body].map(|mut part| {
        stream.read_exact(&mut part).unwrap();
        part
    });
    (serde_json::from_slice(&head).unwrap(), body)
}

/// A host with the two kinds of plugins there are to check: one of raw frames (`fake`) and one made with an SDK (`hello`), both ready.
fn both_kinds() -> (Server, [&'static str; 2]) {
    let server = Site::new().fake("fake").example("hello").start();
    let ids = ["fake", "hello"];
    for id in ids {
        server.wait_state(id, "ready");
    }
    (server, ids)
}

/// Where the host tells a plugin to listen.
fn socket(server: &Server, id: &str) -> PathBuf {
    server.site().data().join(format!("run/{id}.d/sock"))
}

/// A connection to a running plugin, beside those of the host.
fn connect(server: &Server, id: &str) -> UnixStream {
    UnixStream::connect(socket(server, id)).unwrap()
}

/// Scenario: Generate instance ID
#[test]
fn generate_instance_id() {
    let site = Site::new();
    assert!(!site.data().join("plugrack.db").exists());
    let server = site.start();
    let stored = stored_instance_ids(server.site().data());
    assert_eq!(stored.len(), 1);
    assert!(is_uuid_v4(&stored[0]), "{stored:?}");
    assert_eq!(instance_id(&server), stored[0]);
    assert_ne!(instance_id(&Site::new().start()), stored[0], "another installation is another instance");
}

/// Scenario: Retrieve instance ID
#[test]
fn retrieve_instance_id() {
    let server = Site::new().start();
    let first = instance_id(&server);
    let server = server.stop().1.start();
    assert_eq!(instance_id(&server), first);
    // A host that had no time to stop has its identity as well.
    let server = server.kill().start();
    assert_eq!(instance_id(&server), first);
    assert_eq!(server.cli(&["instance"]).trim(), first);
    assert_eq!(stored_instance_ids(server.site().data()), [first]);
}

/// Scenario: Expose instance ID to plugin
#[test]
fn expose_instance_id_to_plugin() {
    let server = Site::new().fake("p").start();
    let told = init_of(&server, "p")["instance_id"].clone();
    assert_eq!(stored_instance_ids(server.site().data()), [told.as_str().unwrap()]);
    let server = server.stop().1.start();
    assert_eq!(init_of(&server, "p")["instance_id"], told, "a plugin can rely on it");
}

/// A token for the examples' demo key, issued as their vendor would: for the given instance, with further options.
fn issue(plugin: &str, instance: &str, options: &[&str]) -> String {
    let key = root().join("plugins-examples/licensed-rust/demo.key");
    let mut issue = command(binary());
    issue.args(["license", "issue", "--plugin", plugin, "--instance", instance, "--key"]).arg(key).args(options);
    let output = issue.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// A host with the two proprietary examples, without a licence.
fn proprietary() -> (Server, [&'static str; 2]) {
    let ids = ["licensed-rust", "licensed-python"];
    let server = Site::new().example(ids[0]).example(ids[1]).start();
    ids.iter().for_each(|id| drop(server.wait_state(id, "unlicensed")));
    (server, ids)
}

/// Scenario: License validation
#[test]
fn license_validation() {
    let (server, ids) = proprietary();
    for id in ids {
        // Its own id is what a plugin holds against the licence: the same token is good here and not elsewhere.
        let elsewhere = issue(id, "5f0c3f0e-8a52-4c1e-9d55-0c6a4f0b7a11", &[]);
        let here = issue(id, &instance_id(&server), &[]);
        for (token, query, status, license) in
            [(&elsewhere, "", 422, "missing"), (&elsewhere, "?force=true", 200, "wrong_instance"), (&here, "", 200, "valid")]
        {
            let (answered, plugin) = server.api("PUT", &format!("/plugins/{id}/license{query}"), token.as_bytes());
            assert_eq!(answered, status, "{plugin:#}");
            let status = server.plugin(id)["license"].clone();
            let told = if status["code"].is_null() { &status["state"] } else { &status["code"] };
            assert_eq!(told, license, "{id}");
        }
    }
}

/// Scenario: License failure
#[test]
fn license_failure() {
    let (server, ids) = proprietary();
    for id in ids {
        let instance = instance_id(&server);
        let good = issue(id, &instance, &[]);
        // The signature is the end of what stands before the footer.
        let in_signature = good.rfind('.').unwrap() - 10;
        let other = if good[in_signature..].starts_with('A') { "B" } else { "A" };
        let forged = format!("{}{other}{}", &good[..in_signature], &good[in_signature + 1..]);
        let expired = issue(id, &instance, &["--not-before", "2020-01-01", "--expires", "2020-12-31"]);
        let foreign = issue("another", &instance, &[]);
        let starts = |server: &Server| {
            let events = server.plugin(id)["events"].as_array().unwrap().clone();
            events.iter().filter(|event| event["kind"] == "starting").count()
        };
        for (token, code) in [(&forged, "bad_signature"), (&expired, "expired"), (&foreign, "wrong_plugin")] {
            server.api("PUT", &format!("/plugins/{id}/license?force=true"), token.as_bytes());
            let plugin = server.wait_state(id, "unlicensed");
            let reason = plugin["reason"].as_str().unwrap();
            assert!(reason.contains(&format!("licence: {code}: ")), "{id}: {reason}");
            assert_eq!(plugin["license"]["code"], code);
            assert!(plugin["last_end"]["exit"].as_str().unwrap().len() > 1, "{plugin:#}");
            server.wait_logged(id, &[&format!("licence: {code}: ")]);
            assert_eq!(server.get(&format!("/{id}")).status, 503);
        }
        // Nothing is tried again by itself.
        let before = starts(&server);
        pause(Duration::from_millis(1500));
        assert_eq!((starts(&server), &server.plugin(id)["state"]), (before, &json!("unlicensed")));
    }
}

/// Scenario: Proprietary plugin with valid license
#[test]
fn proprietary_plugin_with_valid_license() {
    let (server, ids) = proprietary();
    for id in ids {
        let token = issue(id, &instance_id(&server), &["--expires", "2099-12-31", "--customer", "Ada"]);
        let said = server.cli(&["license", "set", id, &token]);
        assert!(!said.contains(&token), "a token is not shown whole");
        assert_eq!((&server.plugin(id)["state"], &server.plugin(id)["license"]["state"]), (&json!("ready"), &json!("valid")));
        assert!(server.get(&format!("/{id}")).text().starts_with("Licensed to Ada "));
    }
    let server = server.stop().1.start();
    for id in ids {
        server.wait_state(id, "ready");
        server.cli(&["license", "remove", id]);
        assert_eq!(server.wait_state(id, "unlicensed")["license"]["code"], "missing");
    }
}

/// Scenario: No license required
#[test]
fn no_license_required() {
    let (server, ids) = both_kinds();
    assert_eq!(init_of(&server, "fake")["license"], Value::Null, "no licence was set, and none is asked for");
    for id in ids {
        assert_eq!(server.plugin(id)["state"], "ready");
        assert_eq!(server.get(&format!("/{id}/x")).status, 200);
    }
}

/// Scenario: Plugin metadata
#[test]
fn plugin_metadata() {
    let names = ["clock", "counter", "hello", "notes"];
    let server = names.into_iter().fold(Site::new(), Site::example).start();
    for name in names {
        let program = server.site().plugins().join(name);
        let program = if program.is_dir() { program.join("plugin") } else { program };
        let output = command(program).arg("--metadata").output().unwrap();
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        let printed: Value = serde_json::from_slice(&output.stdout).unwrap();
        let known = server.plugin(name);
        for field in ["id", "name", "version", "icon", "route"] {
            assert!(!printed[field].as_str().unwrap().is_empty(), "{name} has no {field}");
            assert_eq!(known["metadata"][field], printed[field], "{name}'s {field} as the host has it");
        }
    }
}

/// Scenario: Plugin listens on socket
#[test]
fn plugin_listens_on_socket() {
    let (server, ids) = both_kinds();
    for id in ids {
        assert!(fs::metadata(socket(&server, id)).unwrap().file_type().is_socket());
        let mut stream = connect(&server, id);
        for number in [3, 4] {
            assert_eq!(
                say(&mut stream, &json!({"type": "ping", "id": number}), b"").0,
                json!({"type": "pong", "id": number}),
                "{id}"
            );
        }
    }
    let told = server.get("/fake/env").json()["env"]["PLUGRACK_SOCKET"].clone();
    assert_eq!(told, socket(&server, "fake").to_str().unwrap(), "the path was the host's to choose");
}

/// Scenario: Plugin handles HTTP request
#[test]
fn plugin_handles_http_request() {
    let (server, ids) = both_kinds();
    for id in ids {
        let mut stream = connect(&server, id);
        let request = json!({"type": "http", "id": 7, "method": "GET", "path": "/x", "mount": format!("/{id}"), "headers": [], "remote": ""});
        let (head, body) = say(&mut stream, &request, b"");
        assert_eq!((&head["type"], &head["id"], &head["status"]), (&json!("response"), &json!(7), &json!(200)), "{id}");
        assert!(head["headers"].as_array().unwrap().iter().any(|pair| pair[0] == "content-type"), "{id}");
        assert!(!body.is_empty(), "{id}");
    }
    // What the plugin returns is what the client of the host sees.
    let reply = server.request("PUT", "/fake/status?code=201&body=made", &[], b"");
    assert_eq!((reply.status, reply.header("content-type"), reply.text()), (201, Some("text/plain"), "made"));
    assert_eq!(server.get("/hello/Ada").text(), "Hello, Ada!");
}

/// Scenario: Plugin handles KV operation
#[test]
fn plugin_handles_kv_operation() {
    let (server, ids) = both_kinds();
    for id in ids {
        let mut stream = connect(&server, id);
        let mut kv = |number: u64, op: &str, value: &[u8]| {
            let (head, value) = say(&mut stream, &json!({"type": "kv", "id": number, "op": op, "key": "color"}), value);
            assert_eq!((&head["type"], &head["id"]), (&json!("result"), &json!(number)), "{id}: {op}: {head}");
            (head, value)
        };
        assert_eq!(kv(1, "get", b"").0["found"], false);
        let rev = kv(2, "set", b"bl\x00\xffue").0["rev"].clone();
        let (head, value) = kv(3, "get", b"");
        assert_eq!((&head["found"], &head["rev"], &*value), (&json!(true), &rev, &b"bl\x00\xffue"[..]), "{id}");
        let listed = server.api("GET", &format!("/plugins/{id}/kv"), b"").1;
        assert_eq!(listed["keys"][0]["key"], "color", "{id} has it in its own namespace of the store");
        assert_eq!(kv(4, "delete", b"").0["found"], true);
        assert_eq!(kv(5, "delete", b"").0["found"], false);
        assert_eq!(kv(6, "get", b"").0["found"], false);
        // And so does the operator's word reach it.
        server.cli(&["kv", "set", id, "shape", "round"]);
        assert_eq!(server.cli(&["kv", "get", id, "shape"]).trim_end(), "round");
        server.cli(&["kv", "delete", id, "shape"]);
        assert!(server.cli_fails(&["kv", "get", id, "shape"]).contains("shape"));
    }
    assert_eq!(server.cli(&["kv", "get", "fake", "computed"]).trim_end(), "by the plugin", "it is the plugin that answers");
}

/// Scenario: Plugin receives init message
#[test]
fn plugin_receives_init_message() {
    let server = Site::new().fake("p").start();
    let init = init_of(&server, "p");
    let data = server.site().data();
    let path = |name: &str| json!(data.join(name).to_str().unwrap());
    assert_eq!(init["type"], "init");
    assert_eq!(init["instance_id"], instance_id(&server));
    assert_eq!(init["socket_path"], socket(&server, "p").to_str().unwrap());
    assert_eq!(init["log_path"], path("logs/p.log"));
    assert_eq!(init["data_dir"], path("plugin-data/p"));
    assert_eq!(init["host_socket"], path("run/host.sock"));
    assert_eq!(init["protocol"], 1);
    assert_eq!(init["config"], json!({}));

    // The context is true: it listens there, its output goes there, it is at home there.
    let mut stream = UnixStream::connect(init["socket_path"].as_str().unwrap()).unwrap();
    assert_eq!(say(&mut stream, &json!({"type": "ping", "id": 1}), b"").0["type"], "pong");
    assert_eq!(server.get("/p/env").json()["cwd"], init["data_dir"]);
    assert_eq!(server.get("/p/print?text=here+I+am").status, 200);
    let log = init["log_path"].as_str().unwrap();
    wait_for("the plugin's line in its log", || fs::read_to_string(log).ok().filter(|text| text.contains("here I am on stderr")));
}
