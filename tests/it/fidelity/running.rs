//! Applications that the host runs: where they listen, how they stop and restart, and the messages about those that do not work.

use super::sides::{ask, client, hear, manifest};
use crate::support::{PATIENCE, Server, Site, is_alive, pause, python, range, root, uids, wait_for, wait_within};
use serde_json::Value;
use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

/// The values of `listen` for which the host starts the application, and what the application is told.
const WAYS: [(&str, &str); 3] = [("socket", "unix:{socket}"), ("fd", "fd"), ("port", "127.0.0.1:{port}")];

/// The fixture as a plugin.
fn app(site: Site, id: &str, mode: &str, place: &str, more: &str) -> Site {
    let program = root().join("tests/fixtures/http_app.py");
    let command = format!("command = [\"{}\", \"{}\", \"{mode}\", \"{place}\"]\n{more}", python(), program.display());
    manifest(site, id, "", &command)
}

fn get(server: &Server, path: &str) -> String {
    ask(&mut client(server), format!("GET {path} HTTP/1.1\r\nhost: h\r\n\r\n").as_bytes()).text()
}

fn pid(server: &Server, id: &str) -> i64 {
    server.plugin(id)["process"]["pid"].as_i64().unwrap()
}

#[test]
fn an_application_is_served_wherever_it_listens() {
    let mut site = Site::new();
    for (listen, place) in WAYS {
        let env = "env = { BASE = \"{route}\", WHERE = \"{url} {data} {id} {other-text}\" }";
        site = app(site, listen, "serve", place, &format!("listen = \"{listen}\"\n{env}"));
    }
    let server = site.start();
    for (listen, _) in WAYS {
        server.wait_state(listen, "ready");
        assert_eq!(get(&server, &format!("/{listen}/")), format!("pid {}", pid(&server, listen)));
        let facts: Value = serde_json::from_str(&get(&server, &format!("/{listen}/environment"))).unwrap();
        let variable = |name: &str| facts["env"][name].as_str().unwrap_or_default().to_owned();
        assert_eq!(variable("BASE"), format!("/{listen}"));
        let data = server.site().data().join("plugin-data").join(listen);
        assert_eq!(variable("WHERE"), format!("http://{}/{listen} {} {listen} {{other-text}}", server.address(), data.display()));
        let place = facts["argv"][2].as_str().unwrap();
        match listen {
            "port" => assert_eq!(place, format!("127.0.0.1:{}", variable("PORT"))),
            "socket" => {
                let directory = fs::metadata(std::path::Path::new(&place["unix:".len()..]).parent().unwrap()).unwrap();
                assert_eq!(directory.permissions().mode() & 0o7777, 0o700);
            }
            _ => assert_eq!((variable("LISTEN_FDS"), variable("LISTEN_PID")), ("1".into(), pid(&server, listen).to_string())),
        }
        // It runs where its manifest lies.
        assert_eq!(facts["cwd"], server.site().plugins().join(listen).display().to_string());
        let context = fs::metadata(variable("PLUGRACK_CONTEXT")).unwrap();
        assert_eq!(context.permissions().mode() & 0o7777, 0o600);
        let context: Value = serde_json::from_slice(&fs::read(variable("PLUGRACK_CONTEXT")).unwrap()).unwrap();
        assert_eq!(context["plugin_id"], listen);
        assert_eq!(context["data_dir"], data.display().to_string());
        assert_eq!(context["instance_id"].as_str().unwrap().len(), 36);
        assert!(context["host_socket"].is_string() && context.get("license").is_some(), "{context}");
    }
}

/// Clients that ask one after the other until told to stop; each must get its answer.
fn under_load(server: &Server, id: &str, act: impl FnOnce()) -> usize {
    let (stop, served) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for number in 0..6 {
            let (stop, served) = (&stop, &served);
            scope.spawn(move || {
                let mut wire = client(server);
                while !stop.load(Ordering::Relaxed) {
                    let line = if number % 2 == 0 { "GET" } else { "POST" };
                    let lines = if number % 2 == 0 { "" } else { "content-length: 0\r\n" };
                    let heard = ask(&mut wire, format!("{line} /{id}/slow/0.02 HTTP/1.1\r\nhost: h\r\n{lines}\r\n").as_bytes());
                    assert!(heard.text().starts_with("pid "), "{line} {id}: {heard:?}");
                    served.fetch_add(1, Ordering::Relaxed);
                    if heard.head.header("connection") == Some("close") {
                        wire = client(server);
                    }
                }
            });
        }
        act();
        stop.store(true, Ordering::Relaxed);
    });
    served.into_inner()
}

#[test]
fn a_restart_under_load_fails_no_request() {
    let mut site = Site::new();
    for (listen, place) in WAYS {
        site = app(site, listen, "serve", place, &format!("listen = \"{listen}\""));
    }
    let server = site.start();
    for (listen, _) in WAYS {
        server.wait_state(listen, "ready");
        let served = under_load(&server, listen, || {
            for _ in 0..3 {
                let before = pid(&server, listen);
                server.cli(&["restart", listen]);
                server.wait_restarted(listen, before);
                pause(Duration::from_millis(100));
            }
        });
        assert!(served > 10, "{listen}: {served}");
        assert_eq!(server.plugin(listen)["requests"]["failed"].as_u64().unwrap_or_default(), 0, "{listen}");
    }
}

#[test]
fn a_request_under_way_is_answered_before_the_signal_comes() {
    let site = app(Site::new(), "app", "serve", "unix:{socket}", "");
    let server = site.start();
    server.wait_state("app", "ready");
    let old = pid(&server, "app");
    let mut wire = client(&server);
    wire.send(b"POST /app/slow/1.5 HTTP/1.1\r\nhost: h\r\ncontent-length: 0\r\n\r\n");
    wait_for("the request to be under way", || (server.plugin("app")["requests"]["active"] != 0).then_some(()));
    pause(Duration::from_millis(200));
    server.cli(&["restart", "app"]);
    assert_eq!(hear(&mut wire, "POST").unwrap().text(), format!("pid {old}"));
    server.wait_restarted("app", old);
}

#[test]
fn an_application_that_ignores_the_signal_is_killed() {
    let server = app(Site::new(), "app", "deaf", "unix:{socket}", "").start();
    server.wait_state("app", "ready");
    let old = pid(&server, "app");
    server.cli(&["restart", "app"]);
    server.wait_restarted("app", old);
    assert!(!is_alive(old));
}

#[test]
fn the_backlog_of_a_descriptor_outlives_a_killed_process() {
    let server = app(Site::new(), "app", "slow-start", "fd", "listen = \"fd\"").start();
    server.wait_state("app", "ready");
    for _ in 0..2 {
        let old = pid(&server, "app");
        assert!(crate::support::command("kill").args(["-9", &old.to_string()]).status().unwrap().success());
        wait_for("its end to be seen", || (server.plugin("app")["process"]["pid"] != old).then_some(()));
        // It waits for the next process.
        let text = get(&server, "/app/");
        server.wait_state("app", "ready");
        assert_eq!(text, format!("pid {}", pid(&server, "app")));
    }
}

#[test]
fn a_killed_application_is_started_again_and_the_request_it_died_of_is_not_repeated() {
    let server = app(Site::new(), "app", "serve", "unix:{socket}", "").start();
    server.wait_state("app", "ready");
    let old = pid(&server, "app");
    let heard = ask(&mut client(&server), b"GET /app/exit HTTP/1.1\r\nhost: h\r\n\r\n");
    assert_eq!(heard.status(), 502);
    server.wait_logged("app", &["GET /app/exit", "the process ended before it answered: exit code 3"]);
    server.wait_restarted("app", old);
    assert!(get(&server, "/app/").starts_with("pid "));
    // One that answers garbage lives on.
    let old = pid(&server, "app");
    assert_eq!(ask(&mut client(&server), b"GET /app/garbage HTTP/1.1\r\nhost: h\r\n\r\n").status(), 502);
    assert_eq!(get(&server, "/app/"), format!("pid {old}"));
}

/// The reason that is shown of a plugin that does not start, once there is one.
fn reason(server: &Server, id: &str) -> String {
    wait_within(PATIENCE, &format!("the reason of {id}"), || {
        let plugin = server.plugin(id);
        let is_down = ["backing_off", "crash_looping", "refused", "unlicensed"].iter().any(|state| plugin["state"] == *state);
        is_down.then(|| plugin["reason"].as_str().unwrap().to_owned())
    })
}

#[test]
fn what_is_wrong_with_an_application_is_said() {
    let soon = "start-timeout = \"2s\"";
    let mut site = Site::new();
    site = manifest(site, "missing", "", "command = [\"gunicornn\", \"app:app\"]");
    site = manifest(site, "missing-file", "", "command = [\"./run.sh\"]");
    site = manifest(site, "not-executable", "", "command = [\"./plugrack.toml\"]");
    site = app(site, "exits", "exit", "3", "");
    site = app(site, "exits-well", "exit", "0", "");
    site = app(site, "unlicensed", "unlicensed", "78", "");
    site = app(site, "misconfigured", "exit", "78", "");
    site = app(site, "mute", "mute", "-", soon);
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    site = app(site, "elsewhere", "serve", &format!("127.0.0.1:{port}"), soon);
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    site = app(site, "other-port", "serve", &format!("127.0.0.1:{port}"), &format!("listen = \"port\"\n{soon}"));
    site = app(site, "forks", "fork", "unix:{socket}", soon);
    site = app(site, "garbage", "garbage", "unix:{socket}", &format!("ready = \"/\"\n{soon}"));
    site = app(site, "unhealthy", "unhealthy", "unix:{socket}", &format!("ready = \"/health\"\n{soon}"));
    site = app(site, "everywhere", "serve", "0.0.0.0:{port}", "listen = \"port\"");
    site = app(site, "healthy", "serve", "unix:{socket}", "ready = \"/health\"");
    let server = site.start();
    let mut faults = Vec::new();
    for (id, state, words) in [
        ("missing", "refused", &["there is no command gunicornn in PATH", "install it"][..]),
        ("missing-file", "refused", &["cannot run ./run.sh"]),
        ("not-executable", "refused", &["cannot run ./plugrack.toml"]),
        ("exits", "", &["exit code 3: no such table: users"]),
        ("exits-well", "", &["exit code 0: it ended, or went to the background", "in the foreground"]),
        ("unlicensed", "unlicensed", &["this instance has no licence"]),
        ("misconfigured", "refused", &["exit code 78", "no such table: users"]),
        ("mute", "", &["it was not ready within 2 s", "it does not listen on unix:"]),
        ("elsewhere", "", &["it was not ready within 2 s", "it listens on 127.0.0.1:", "give {socket} to its command"]),
        ("other-port", "", &["it was not ready within 2 s", "it listens on 127.0.0.1:", "give {port} or $PORT to its command"]),
        ("forks", "", &["exit code 0: it ended, or went to the background", "in the foreground"]),
        ("garbage", "", &["it was not ready within 2 s", "/ was not answered: its response is not valid HTTP", "garbage"]),
        ("unhealthy", "", &["it was not ready within 2 s", "/health was answered with 503"]),
    ] {
        let reason = reason(&server, id);
        let shown = server.cli(&["show", id]);
        let is_state = state.is_empty() || server.plugin(id)["state"] == state;
        if !is_state || !words.iter().all(|word| reason.contains(word)) || !shown.contains(words[0]) {
            faults.push(format!("{id} is {}: {reason}", server.plugin(id)["state"]));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    for id in ["everywhere", "healthy"] {
        server.wait_state(id, "ready");
        assert_eq!(get(&server, &format!("/{id}/")), format!("pid {}", pid(&server, id)));
    }
}

/// What another user puts at the port of a plugin gets none of its requests.
#[test]
fn a_port_of_a_plugin_with_its_own_user_is_its_own() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let site = Site::new().args(&["--plugin-uids", &range(&uids())]);
    let site = app(site, "port", "serve", "127.0.0.1:{port}", "listen = \"port\"");
    let site = app(site, "taken", "tell", "{port}", "listen = \"port\"\nstart-timeout = \"20s\"");
    fs::set_permissions(site.data(), fs::Permissions::from_mode(0o755)).unwrap();
    let server = site.start();
    server.wait_state("port", "ready");
    assert_eq!(get(&server, "/port/"), format!("pid {}", pid(&server, "port")));
    let told = server.site().data().join("plugin-data/taken/where");
    let port: u16 = wait_for("the port", || fs::read_to_string(&told).ok()).parse().unwrap();
    assert_ne!(fs::metadata(&told).unwrap().uid(), 0);
    let stranger = TcpListener::bind(("127.0.0.1", port)).unwrap();
    stranger.set_nonblocking(true).unwrap();
    let reason = reason(&server, "taken");
    assert!(reason.contains(&format!("no process of the plugin's user listens on 127.0.0.1:{port}")), "{reason}");
    assert!(stranger.accept().is_err(), "nothing was sent to it");
}
