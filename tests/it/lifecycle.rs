//! From start to end of a plugin and of the host.

use crate::support::{Server, Site, install_fake, is_alive, metadata, pause, script, wait_for, write_file};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

fn pid_of(plugin: &Value) -> i64 {
    plugin["process"]["pid"].as_i64().unwrap_or_else(|| panic!("no process: {plugin:#}"))
}

/// Waits until a plugin is ready, and gives its process.
#[track_caller]
fn ready(server: &Server, id: &str) -> i64 {
    pid_of(&server.wait_state(id, "ready"))
}

/// The details of a plugin's events of one kind, newest first.
fn events(server: &Server, id: &str, kind: &str) -> Vec<String> {
    let plugin = server.plugin(id);
    let events = plugin["events"].as_array().unwrap().iter().filter(|event| event["kind"] == kind);
    events.map(|event| event["detail"].as_str().unwrap().to_owned()).collect()
}

/// Waits for an event of a kind, and gives its detail.
#[track_caller]
fn event(server: &Server, id: &str, kind: &str) -> String {
    wait_for(kind, || events(server, id, kind).pop())
}

/// What a plugin has printed, each line without its time. Lines of the host's are left out.
fn printed(site: &Site, id: &str) -> Vec<String> {
    let log = fs::read_to_string(site.data().join(format!("logs/{id}.log"))).unwrap_or_default();
    let texts = log.lines().map(|line| line.split_once(' ').unwrap().1.to_owned());
    texts.filter(|text| !text.starts_with("plugrack: ")).collect()
}

#[track_caller]
fn wait_gone(pid: i64) {
    wait_for("a process to end", || (!is_alive(pid)).then_some(()));
}

#[test]
fn a_crashed_plugin_is_started_again() {
    let server = Site::new().fake("p").start();
    let before = ready(&server, "p");
    assert_eq!(server.request("POST", "/p/crash", &[], b"").status, 502);
    let after = wait_for("another process", || {
        let plugin = server.plugin("p");
        (plugin["state"] == "ready" && plugin["process"]["pid"] != before).then_some(plugin)
    });
    assert!(!is_alive(before));
    assert_eq!(after["process"]["restarts"], 1);
    assert_eq!(server.get("/p/x").text(), "GET /x of p");
    assert_eq!(events(&server, "p", "crashed"), ["exit code 1: about to crash"]);
}

#[test]
fn init_tells_a_plugin_all_it_needs() {
    let server = Site::new().fake("p").start();
    ready(&server, "p");
    let data = fs::canonicalize(server.site().data()).unwrap();
    let mut init = server.get("/p/init").json();
    let log = init["log_path"].as_str().unwrap().to_owned();
    let about = server.get("/p/env").json();
    assert_eq!(init["socket_path"], about["env"]["PLUGRACK_SOCKET"]);
    assert_eq!(init["host_socket"], about["env"]["PLUGRACK_HOST_SOCKET"]);
    for path in ["socket_path", "host_socket"] {
        assert!(fs::exists(init[path].as_str().unwrap()).unwrap(), "{path}");
        init.as_object_mut().unwrap().remove(path);
    }
    let mark = init.as_object_mut().unwrap().remove("not_before_time");
    assert!(mark.is_some_and(|mark| mark.is_string()));
    let expected = json!({
        "type": "init", "id": 1, "protocol": 1, "instance_id": server.cli(&["instance"]).trim(), "plugin_id": "p",
        "log_path": data.join("logs/p.log"), "data_dir": data.join("plugin-data/p"), "license": null, "config": {},
        "host": {"name": "plugrack", "version": env!("CARGO_PKG_VERSION")},
    });
    assert_eq!(init, expected);

    assert_eq!(server.get("/p/print?text=hello").status, 200);
    wait_for("both outputs", || {
        let text = fs::read_to_string(&log).unwrap();
        (text.contains(" hello\n") && text.contains(" hello on stderr\n")).then_some(())
    });
}

#[test]
fn a_plugin_has_the_documented_environment_and_nothing_else_of_the_hosts() {
    let site = Site::new().fake("p").env("SECRET", "x").env("HOME", "/root").env("LANG", "C.UTF-8").env("TZ", "UTC");
    let server = site.start();
    let pid = ready(&server, "p");
    let data = fs::canonicalize(server.site().data()).unwrap();
    let about = server.get("/p/env").json();
    let env: BTreeMap<String, String> = serde_json::from_value(about["env"].clone()).unwrap();
    let path = |name: &str| data.join(name).to_str().unwrap().to_owned();
    let expected = BTreeMap::from([
        ("HOME".to_owned(), path("plugin-data/p")),
        ("LANG".to_owned(), "C.UTF-8".to_owned()),
        ("PATH".to_owned(), std::env::var("PATH").unwrap()),
        ("PLUGRACK_HOST_SOCKET".to_owned(), path("run/host.sock")),
        ("PLUGRACK_PLUGIN_ID".to_owned(), "p".to_owned()),
        ("PLUGRACK_PROTOCOL".to_owned(), "1".to_owned()),
        ("PLUGRACK_RUN".to_owned(), env["PLUGRACK_RUN"].clone()),
        ("PLUGRACK_SOCKET".to_owned(), env["PLUGRACK_SOCKET"].clone()),
        ("PYTHONUNBUFFERED".to_owned(), "1".to_owned()),
        ("TZ".to_owned(), "UTC".to_owned()),
    ]);
    assert_eq!(env, expected);
    assert_eq!(about["cwd"], env["HOME"]);
    assert_eq!((&about["pid"], &about["sid"]), (&json!(pid), &json!(pid)));
    assert_eq!(about["umask"], 0o077);
}

#[test]
fn a_plugin_has_no_open_files_but_its_own() {
    let site = Site::new().fake("p");
    // What the host was started with open is not the plugin's either.
    let mut serve = crate::support::command("/bin/sh");
    serve.args(["-c", "exec 9</dev/null; exec \"$@\"", "sh"]).arg(site.serve().get_program()).args(site.serve().get_args());
    let server = site.start_as(serve);
    ready(&server, "p");
    let about = server.get("/p/env").json();
    let fds: BTreeMap<u32, String> = serde_json::from_value(about["fds"].clone()).unwrap();
    assert_eq!(fds[&0], "/dev/null");
    assert!(fds[&1].starts_with("pipe:") && fds[&1] == fds[&2], "{fds:?}");
    assert!(fds.iter().all(|(fd, target)| *fd < 3 || target.starts_with("socket:")), "{fds:?}");
}

#[test]
fn everything_is_captured_from_the_first_moment_on() {
    let run = "echo to stdout\necho to stderr >&2\nprintf 'no end of line'\nexit 78";
    let server = Site::new().file("p", script(&metadata("p"), run).as_bytes(), 0o755).start();
    let plugin = server.wait_state("p", "refused");
    let lines = wait_for("all lines", || Some(printed(server.site(), "p")).filter(|lines| lines.len() >= 3));
    assert_eq!(lines, ["to stdout", "to stderr", "no end of line"]);
    assert_eq!(plugin["reason"], "exit code 78 (licence or configuration refused): no end of line");
}

#[test]
fn a_program_that_cannot_be_executed_any_more_is_refused_with_the_reason() {
    let run = "exit 1";
    let server = Site::new().file("p", script(&metadata("p"), run).as_bytes(), 0o755).start();
    event(&server, "p", "crashed");
    let program = server.site().plugins().join("p");
    for (content, mode, reason) in [
        ("#!/no/such/shell\n", 0o755, "its interpreter /no/such/shell is not installed"),
        ("#!/bin/sh\n", 0o644, "it is not executable"),
    ] {
        write_file(&program, content.as_bytes(), mode);
        let (status, answer) = server.api("POST", "/plugins/p/restart", b"");
        assert_eq!(status, 409, "{answer}");
        let plugin = server.plugin("p");
        for said in [&answer["error"]["message"], &plugin["reason"]] {
            assert!(said.as_str().unwrap().contains(reason), "{said}");
        }
        assert_eq!((&plugin["state"], &plugin["process"]["pid"]), (&json!("refused"), &Value::Null), "{plugin:#}");
    }
    // A kernel that refuses it in the end: a script whose interpreter is no program.
    let interpreter = server.site().data().join("interpreter");
    write_file(&interpreter, b"", 0o644);
    write_file(&program, format!("#!{}\n", interpreter.display()).as_bytes(), 0o755);
    assert_eq!(server.api("POST", "/plugins/p/restart", b"").0, 409);
    let plugin = server.plugin("p");
    assert!(plugin["reason"].as_str().unwrap().contains("Permission denied"), "{plugin:#}");
}

#[test]
fn a_plugin_that_says_it_cannot_run_is_not_started_again() {
    let codes = [
        (64, "usage"),
        (77, "permission denied"),
        (78, "licence or configuration refused"),
        (126, "not executable"),
        (127, "not found"),
    ];
    let mut site = Site::new();
    for (code, _) in codes {
        site = site.fake_mode(&format!("p{code}"), &format!("exit-{code}"));
    }
    let server = site.start();
    for (code, meaning) in codes {
        let id = format!("p{code}");
        let plugin = server.wait_state(&id, "refused");
        assert_eq!(plugin["reason"], format!("exit code {code} ({meaning}): cannot go on"));
        assert_eq!((&plugin["process"]["pid"], &plugin["retry_at"]), (&Value::Null, &Value::Null));
        let reply = server.get(&format!("/{id}/x"));
        assert_eq!(reply.status, 503);
        assert!(
            !String::from_utf8_lossy(&reply.body).contains("cannot go on"),
            "why it is so is not for everybody: {}",
            reply.text()
        );
        assert!(server.cli(&["list"]).contains("cannot go on"));
    }
    // Longer than the first waits of a plugin that is tried again.
    pause(Duration::from_millis(1500));
    for (code, _) in codes {
        let plugin = server.plugin(&format!("p{code}"));
        assert_eq!((&plugin["state"], &plugin["process"]["restarts"]), (&json!("refused"), &json!(0)));
        assert_eq!(events(&server, &format!("p{code}"), "starting").len(), 1);
    }
}

/// Seconds from the time at which a plugin went down to its next try.
fn seconds_to_retry(plugin: &Value) -> f64 {
    let ms = |value: &Value| {
        let sql = "SELECT CAST(round(unixepoch(?1, 'subsec') * 1000) AS INTEGER)";
        let database = rusqlite::Connection::open_in_memory().unwrap();
        database.query_row(sql, [value.as_str().unwrap()], |row| row.get::<_, i64>(0)).unwrap()
    };
    (ms(&plugin["retry_at"]) - ms(&plugin["since"])) as f64 / 1000.0
}

#[test]
fn a_plugin_that_fails_for_now_is_tried_again() {
    let codes = [
        (75, "exit code 75 (temporary failure): cannot go on"),
        (1, "exit code 1: cannot go on"),
        (0, "exit code 0: cannot go on"),
    ];
    let mut site = Site::new().fake_mode("once", "crash-once");
    for (code, _) in codes {
        site = site.fake_mode(&format!("p{code}"), &format!("exit-{code}"));
    }
    let server = site.start();
    for (code, reason) in codes {
        let id = format!("p{code}");
        let plugin = server.wait_state(&id, "backing_off");
        assert_eq!((&plugin["reason"], &plugin["process"]["pid"]), (&json!(reason), &Value::Null));
        assert!(seconds_to_retry(&plugin) <= 5.0, "{plugin:#}");
        wait_for("another start", || (server.plugin(&id)["process"]["restarts"].as_i64().unwrap() >= 1).then_some(()));
    }
    // A stop ends the tries.
    assert_eq!(server.api("POST", "/plugins/p1/stop", b"").1["state"], "stopped");
    let tries = events(&server, "p1", "starting").len();
    pause(Duration::from_millis(1500));
    assert_eq!((&server.plugin("p1")["state"], events(&server, "p1", "starting").len()), (&json!("stopped"), tries));

    let recovered = server.wait_state("once", "ready");
    assert_eq!(recovered["process"]["restarts"], 1);
    assert_eq!(server.get("/once/x").status, 200);
}

#[test]
fn a_plugin_that_keeps_ending_is_in_a_crash_loop_until_the_operator_starts_it() {
    let server = Site::new().fake_mode("p", "exit-1").start();
    let plugin = server.wait_state("p", "crash_looping");
    assert_eq!(plugin["reason"], "exit code 1: cannot go on");
    assert_eq!(plugin["process"]["restarts"], 4);
    assert!(seconds_to_retry(&plugin) > 200.0, "{plugin:#}");
    assert_eq!(events(&server, "p", "starting").len(), 5);
    let reply = server.get("/p/x");
    assert_eq!(reply.status, 503);
    assert!(reply.header("retry-after").unwrap().parse::<u32>().unwrap() > 200);

    install_fake(&server.site().plugins(), "p", &json!({"metadata": metadata("p")}));
    let started = server.api("POST", "/plugins/p/start", b"").1;
    assert_eq!(started["state"], "ready");
    assert_eq!(server.get("/p/x").status, 200);
}

#[test]
fn a_plugin_that_does_not_start_as_it_must_is_ended_and_tried_again() {
    let cases = [
        ("hang-init", "it was not ready within 2 s: it did not answer init"),
        ("no-listen", "it was not ready within 2 s: it does not listen on its socket"),
        (
            "bad-ready",
            "its answer to init is not valid: ready.id must be an integer from 0 to 9007199254740991, got the string \"1\"",
        ),
        ("wrong-reply", "it answered init with pong (id 1), not with ready (id 1)"),
    ];
    let mut site = Site::new().args(&["--start-timeout", "2s"]);
    for (mode, _) in cases {
        site = site.fake_mode(mode, mode);
    }
    let server = site.start();
    for (mode, reason) in cases {
        let pid = wait_for("its process", || server.plugin(mode)["process"]["pid"].as_i64());
        let told = event(&server, mode, "crashed");
        assert!(
            told == reason || mode == "no-listen" && told.starts_with(reason) && told.contains("/no-listen.d/sock"),
            "{told}"
        );
        wait_gone(pid);
        wait_for("another start", || (events(&server, mode, "starting").len() >= 2).then_some(()));
    }
}

#[test]
fn a_start_whose_first_connection_ends_fails_at_once() {
    let server = Site::new().args(&["--start-timeout", "5m"]).fake_mode("p", "hang-up-init").start();
    let pid = wait_for("its process", || server.plugin("p")["process"]["pid"].as_i64());
    assert_eq!(event(&server, "p", "crashed"), "its first connection ended before it was ready: the connection was closed");
    wait_gone(pid);
    wait_for("another start", || (events(&server, "p", "starting").len() >= 2).then_some(()));
}

#[test]
fn a_plugin_that_ends_when_it_is_ready_is_in_a_crash_loop_and_one_that_is_killed_by_requests_is_not() {
    let server = Site::new().fake_mode("idle", "exit-when-ready").fake("p").start();
    for _ in 0..7 {
        wait_for("an end by a request", || (server.get("/p/crash").status == 502).then_some(()));
    }
    wait_for("an answer", || (server.get("/p/x").status == 200).then_some(()));
    assert_eq!(server.plugin("p")["process"]["restarts"], 7);
    let plugin = server.wait_state("idle", "crash_looping");
    assert_eq!(events(&server, "idle", "ready").len(), 5, "{plugin:#}");
    assert_eq!(events(&server, "p", "crash_looping"), [""; 0]);
}

/// The process takes seconds to end, for which requests are held if another is to follow, and refused if none is.
#[test]
fn a_stop_while_a_restart_is_under_way_leaves_no_request_waiting() {
    let server = Site::new().fake_mode("p", "ignore-term").start();
    ready(&server, "p");
    std::thread::scope(|scope| {
        scope.spawn(|| server.api("POST", "/plugins/p/restart", b""));
        server.wait_state("p", "stopping");
        let mut held = server.client();
        held.send(b"GET /p/x HTTP/1.1\r\nhost: test\r\n\r\n");
        wait_for("the request to be held", || (server.plugin("p")["process"]["waiting"] == 1).then_some(()));
        scope.spawn(|| server.api("POST", "/plugins/p/stop", b""));
        assert_eq!(held.reply(false).status, 503);
        // More than would be answered if each were held until it is looked after.
        for _ in 0..60 {
            assert_eq!(server.get("/p/x").status, 503);
        }
        assert_eq!(server.plugin("p")["state"], "stopping");
        assert_eq!(server.plugin("p")["process"]["waiting"], 0);
    });
    let stopped = server.wait_state("p", "stopped");
    assert_eq!(stopped["process"]["pid"], Value::Null);
    assert_eq!(server.get("/p/x").status, 503);
}

#[test]
fn a_start_while_the_plugin_stops_brings_it_back_and_holds_requests() {
    let server = Site::new().fake_mode("p", "ignore-shutdown").start();
    let first = ready(&server, "p");
    std::thread::scope(|scope| {
        scope.spawn(|| server.api("POST", "/plugins/p/stop", b""));
        server.wait_state("p", "stopping");
        scope.spawn(|| server.api("POST", "/plugins/p/start", b""));
        wait_for("another process", || {
            let plugin = server.plugin("p");
            (plugin["state"] == "ready" && pid_of(&plugin) != first).then_some(())
        });
    });
    assert_eq!(server.get("/p/x").status, 200);
}

#[test]
fn a_plugin_that_refuses_init_is_quoted_to_the_operator() {
    let server = Site::new().fake_mode("p", "refuse").start();
    let plugin = server.wait_state("p", "refused");
    let reason = plugin["reason"].as_str().unwrap();
    assert!(reason.contains("exit code 78") && reason.contains("the setting token is missing"), "{reason}");
    assert!(server.cli(&["show", "p"]).contains("the setting token is missing"));
}

#[test]
fn a_refused_plugin_tries_again_by_itself_when_its_settings_change() {
    let server = Site::new().fake_mode("p", "needs-config").start();
    let reason = server.wait_state("p", "refused")["reason"].clone();
    assert!(reason.as_str().unwrap().contains("set token, please"), "{reason}");
    server.cli(&["config", "set", "p", "other", "x"]);
    wait_for("a second try", || (events(&server, "p", "refused").len() == 2).then_some(()));
    server.cli(&["config", "set", "p", "token", "secret"]);
    ready(&server, "p");
    assert_eq!(server.get("/p/init").json()["config"], json!({"other": "x", "token": "secret"}));
}

/// Does what the operator asks, in one of the two ways there are, and gives the plugin as it is then.
type Ask = fn(&Server, &str) -> Value;

fn by_command(server: &Server, verb: &str) -> Value {
    serde_json::from_str(&server.cli(&[verb, "p", "--json"])).unwrap()
}

fn by_api(server: &Server, verb: &str) -> Value {
    let (status, plugin) = server.api("POST", &format!("/plugins/p/{verb}"), b"");
    assert_eq!(status, 200, "{plugin}");
    plugin
}

#[test]
fn the_operator_stops_and_starts_a_plugin() {
    let server = Site::new().fake("p").start();
    for ask in [by_command as Ask, by_api] {
        let first = ready(&server, "p");
        let stopped = ask(&server, "stop");
        assert_eq!(
            (&stopped["state"], &stopped["process"]["pid"], &stopped["enabled"]),
            (&json!("stopped"), &Value::Null, &json!(true))
        );
        assert!(!is_alive(first));
        assert_eq!(server.get("/p/x").status, 503);
        assert_eq!(ask(&server, "stop")["state"], "stopped");

        let started = ask(&server, "start");
        assert_eq!(started["state"], "ready");
        let second = pid_of(&started);
        assert_eq!(server.get("/p/x").status, 200);
        assert_eq!(pid_of(&ask(&server, "start")), second);

        let restarted = ask(&server, "restart");
        assert_eq!(restarted["state"], "ready");
        let third = pid_of(&restarted);
        assert!(third != second && !is_alive(second) && is_alive(third));
        assert_eq!(server.get("/p/x").status, 200);

        ask(&server, "stop");
        assert_eq!(ask(&server, "restart")["state"], "ready");
        assert_eq!(server.plugin("p")["process"]["restarts"], 0);
    }
}

#[test]
fn commands_given_at_once_leave_one_process() {
    let server = &Site::new().fake("p").start();
    let first = ready(server, "p");
    let verbs = ["restart", "stop", "restart", "start", "restart", "stop", "start", "restart"];
    let answers: Vec<Value> = std::thread::scope(|scope| {
        let asked = verbs.map(|verb| scope.spawn(move || by_api(server, verb)));
        asked.into_iter().map(|answer| answer.join().unwrap()).collect()
    });
    server.api("POST", "/plugins/p/start", b"");
    let last = ready(server, "p");
    let seen = answers.iter().filter_map(|answer| answer["process"]["pid"].as_i64()).chain([first]);
    for pid in seen.filter(|pid| *pid != last) {
        assert!(!is_alive(pid), "{pid} is left");
    }
    assert_eq!(server.plugin("p")["process"]["restarts"], 0);
    assert_eq!(server.get("/p/x").status, 200);
}

#[test]
fn a_stop_lasts_until_the_next_start_of_the_host_and_disabling_lasts_longer() {
    let mut server = Site::new().fake("p").start();
    for ask in [by_command as Ask, by_api] {
        ready(&server, "p");
        ask(&server, "stop");
        server = server.stop().1.start();
        let pid = ready(&server, "p");

        let disabled = ask(&server, "disable");
        assert_eq!((&disabled["state"], &disabled["enabled"]), (&json!("stopped"), &json!(false)));
        assert!(!is_alive(pid));
        for verb in ["start", "restart"] {
            let (status, answer) = server.api("POST", &format!("/plugins/p/{verb}"), b"");
            assert_eq!((status, &answer["error"]["code"]), (409, &json!("disabled")));
            let complaint = server.cli_fails(&[verb, "p"]);
            assert!(complaint.contains("disabled"), "{complaint}");
        }

        server = server.kill().start();
        let plugin = server.wait_state("p", "stopped");
        assert_eq!((&plugin["enabled"], &plugin["reason"]), (&json!(false), &json!("disabled by the operator")));
        assert_eq!(server.get("/p/x").status, 503);
        let enabled = ask(&server, "enable");
        assert_eq!((&enabled["state"], &enabled["enabled"]), (&json!("ready"), &json!(true)));
        server = server.stop().1.start();
    }
    ready(&server, "p");
}

#[test]
fn a_plugin_is_told_then_terminated_then_killed() {
    let cases = [
        ("", 0.0, 2.9, "exit code 0"),
        ("ignore-shutdown", 3.0, 4.9, "exit code 0"),
        ("ignore-term", 5.0, 8.0, "killed by signal 9 (SIGKILL)"),
    ];
    let mut site = Site::new();
    for (mode, ..) in cases {
        site = site.fake_mode(&format!("p{mode}"), mode);
    }
    let server = &site.start();
    std::thread::scope(|scope| {
        for (mode, least, most, how) in cases {
            scope.spawn(move || {
                let id = format!("p{mode}");
                let pid = ready(server, &id);
                let begin = Instant::now();
                let stopped = server.api("POST", &format!("/plugins/{id}/stop"), b"").1;
                let took = begin.elapsed().as_secs_f64();
                assert!((least..most).contains(&took), "{id} took {took} s");
                assert_eq!((&stopped["state"], &stopped["reason"]), (&json!("stopped"), &json!(how)), "{id}");
                assert!(!is_alive(pid));
                // Events are recorded a moment after what they tell of.
                wait_for("the event", || (events(server, &id, "stopping") == ["stopped by the operator"]).then_some(()));
            });
        }
    });
}

#[test]
fn what_a_plugin_has_started_ends_with_it() {
    let server = Site::new().fake("p").start();
    ready(&server, "p");
    let fork = || server.get("/p/fork").text().parse::<i64>().unwrap();
    let child = fork();
    assert!(is_alive(child));
    server.cli(&["stop", "p"]);
    wait_gone(child);

    server.cli(&["start", "p"]);
    let child = fork();
    assert_eq!(server.request("POST", "/p/crash", &[], b"").status, 502);
    wait_gone(child);
    ready(&server, "p");
    assert_eq!(server.get("/p/x").status, 200);
}

/// Tells a host that has work under way to end by a signal, and looks at what it has done and left. Gives the time it took.
#[track_caller]
fn ends_in_good_order(site: Site, signal: &str, others: &[&str]) -> Duration {
    let server = site.fake("p").start();
    let pids: Vec<i64> = others.iter().chain(&["p"]).map(|id| ready(&server, id)).collect();
    let mut client = server.client();
    let asking = std::thread::Builder::new().spawn(move || client.get("/p/sleep?s=1")).unwrap();
    wait_for("the request to be under way", || printed(server.site(), "p").contains(&"sleeping".to_owned()).then_some(()));
    let begin = Instant::now();
    server.signal(signal);
    let reply = asking.join().unwrap();
    assert_eq!((reply.status, reply.text()), (200, "slept"));
    let (status, site) = server.ended();
    let took = begin.elapsed();
    assert_eq!(status.code(), Some(0), "{status}");
    for pid in pids {
        assert!(!is_alive(pid));
    }
    let left: Vec<_> = fs::read_dir(site.data().join("run")).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(left.is_empty(), "{left:?}");
    took
}

#[test]
fn on_sigint_what_is_under_way_is_finished_and_all_ends() {
    let took = ends_in_good_order(Site::new(), "INT", &[]);
    assert!(took < Duration::from_millis(2900), "{took:?}");
}

/// Three that have to be killed take no longer than one: the host must be gone within 6 s, and the machine has 2 s more.
#[test]
fn on_sigterm_stubborn_plugins_are_stopped_side_by_side() {
    let others = ["a", "b", "c"];
    let site = others.iter().fold(Site::new(), |site, id| site.fake_mode(id, "ignore-term"));
    let took = ends_in_good_order(site, "TERM", &others);
    assert!(took < Duration::from_secs(8), "{took:?}");
}

#[test]
fn a_second_sigterm_ends_the_host_at_once_with_its_plugins() {
    let server = Site::new().fake_mode("p", "ignore-term").start();
    let pid = ready(&server, "p");
    server.signal("TERM");
    wait_for("the first to be noticed", || server.log().contains("stopping").then_some(()));
    let begin = Instant::now();
    server.signal("TERM");
    let (status, site) = server.ended();
    assert!(begin.elapsed() < Duration::from_secs(2));
    assert_eq!(status.code(), Some(1), "{status}");
    wait_gone(pid);
    drop(site);
}

#[test]
fn a_host_that_is_told_to_stop_while_it_still_starts_does() {
    let site = Site::new().fake("p");
    let marker = site.data().join("asked");
    let ask = format!("#!/bin/sh\necho $$ >{0}.new; mv {0}.new {0}; exec sleep 60\n", marker.display());
    let site = site.file("slow", ask.as_bytes(), 0o755);
    let mut child = site.serve().stderr(Stdio::null()).spawn().unwrap();
    let asked = wait_for("the question", || fs::read_to_string(&marker).ok()).trim().parse().unwrap();
    let status = crate::support::command("kill").args(["-s", "TERM", &child.id().to_string()]).status().unwrap();
    assert!(status.success());
    let begin = Instant::now();
    let status = wait_for("the host to stop", || child.try_wait().unwrap());
    assert!(begin.elapsed() < Duration::from_secs(8));
    assert_eq!(status.code(), Some(0), "{status}");
    assert!(!is_alive(asked));
    assert_eq!(fs::read_dir(site.data().join("run")).unwrap().count(), 0);
}

#[test]
fn plugins_die_with_a_host_that_is_killed_and_the_next_one_starts() {
    let server = Site::new().fake("p").fake_mode("q", "ignore-term").start();
    let pids = ["p", "q"].map(|id| ready(&server, id));
    let site = server.kill();
    assert!(site.data().join("run/host.sock").exists(), "what is swept by the next host");
    for pid in pids {
        wait_gone(pid);
    }
    let server = site.start();
    for id in ["p", "q"] {
        assert!(!pids.contains(&ready(&server, id)));
        assert_eq!(server.get(&format!("/{id}/x")).status, 200);
    }
}

#[test]
fn a_plugin_killed_from_outside_is_started_again() {
    let server = Site::new().fake("p").start();
    let pid = ready(&server, "p");
    let status = crate::support::command("kill").args(["-s", "SEGV", &pid.to_string()]).status().unwrap();
    assert!(status.success());
    assert_eq!(event(&server, "p", "crashed"), "killed by signal 11 (SIGSEGV)");
    server.wait_state("p", "ready");
    assert_eq!(server.get("/p/x").status, 200);
}

#[test]
fn events_are_in_the_database_and_shown_newest_first() {
    let server = Site::new().fake("p").start();
    ready(&server, "p");
    server.cli(&["stop", "p"]);
    server.cli(&["disable", "p"]);
    let server = server.stop().1.start();
    server.wait_state("p", "stopped");
    server.cli(&["enable", "p"]);
    ready(&server, "p");
    // An event is recorded a moment after it happened.
    let plugin = wait_for("the last event", || Some(server.plugin("p")).filter(|plugin| plugin["events"][0]["kind"] == "ready"));
    let shown: Vec<(&str, &str, &str)> = plugin["events"]
        .as_array()
        .unwrap()
        .iter()
        .map(|event| (event["at"].as_str().unwrap(), event["kind"].as_str().unwrap(), event["detail"].as_str().unwrap()))
        .collect();
    let kinds: Vec<_> = shown.iter().map(|(_, kind, _)| *kind).collect();
    let second_life = ["ready", "starting", "enabled", "stopped"];
    let first_life = ["stopped", "disabled", "stopped", "stopping", "ready", "starting"];
    assert!(kinds.starts_with(&second_life) && kinds.ends_with(&first_life), "{kinds:?}");
    assert!(shown.is_sorted_by(|newer, older| newer.0 >= older.0), "{shown:?}");

    let database = rusqlite::Connection::open(server.site().data().join("plugrack.db")).unwrap();
    let mut statement = database.prepare(
            "SELECT strftime('%Y-%m-%dT%H:%M:%fZ', at / 1000.0, 'unixepoch'), kind, detail FROM events WHERE plugin = 'p' ORDER BY seq DESC",
        ).unwrap();
    let stored = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?))).unwrap();
    let stored: Vec<(String, String, String)> = stored.collect::<Result<_, _>>().unwrap();
    let stored: Vec<_> = stored.iter().map(|(at, kind, detail)| (at.as_str(), kind.as_str(), detail.as_str())).collect();
    assert_eq!(stored, shown);
    let text = server.cli(&["show", "p"]);
    let (newest, oldest) =
        (text.find("  enabled: by the operator\n").unwrap(), text.find("  disabled: by the operator\n").unwrap());
    assert!(newest < oldest, "{text}");
}
