//! What the operator's commands show: on a terminal, in a pipe, as JSON, and when something is wrong.

use crate::support::{Guarded, Server, Site, binary, command, metadata, python, script, wait_for};
use serde_json::{Value, json};
use std::fs;
use std::process::{Output, Stdio};

/// Runs its arguments on a terminal with so many columns, prints what they wrote, and ends with the command's exit code.
const TERMINAL: &str = "
import fcntl, os, pty, struct, sys, termios
pid, fd = pty.fork()
if pid == 0:
    fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack('HHHH', 24, int(sys.argv[1]), 0, 0))
    os.execvp(sys.argv[2], sys.argv[2:])
while True:
    try:
        piece = os.read(fd, 65536)
    except OSError:
        break
    if not piece:
        break
    sys.stdout.buffer.write(piece)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
";

/// What a command shows on a terminal, without colours.
#[track_caller]
fn on_terminal(server: &Server, columns: usize, arguments: &[&str]) -> String {
    let mut driver = command(python());
    driver.args(["-c", TERMINAL, &columns.to_string()]).arg(binary()).arg("--data").arg(server.site().data()).args(arguments);
    let output = driver.env("NO_COLOR", "1").output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap().replace('\r', "")
}

/// Columns that a terminal shows: two for each character of the wide ones that these tests use.
fn columns(line: &str) -> usize {
    line.chars().map(|c| if matches!(c, '日' | '本' | '語' | '🚂') { 2 } else { 1 }).sum()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

fn json_of(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Whether a value is a time in RFC 3339, in UTC with milliseconds.
fn is_time(value: &Value) -> bool {
    let form = |c: char| if c.is_ascii_digit() { '0' } else { c };
    value.as_str().is_some_and(|text| text.chars().map(form).eq("0000-00-00T00:00:00.000Z".chars()))
}

/// Asserts that every time in JSON is written in RFC 3339, and counts them.
fn assert_times(json: &Value, where_found: &str) -> usize {
    match json {
        Value::Object(fields) => fields
            .iter()
            .map(|(name, value)| {
                let is_named = matches!(name.as_str(), "at" | "since" | "retry_at" | "seen" | "time" | "expires_at");
                assert!(
                    !name.ends_with("_in") && (!is_named || value.is_null() || is_time(value)),
                    "{where_found}.{name}: {value}"
                );
                usize::from(is_named && !value.is_null()) + assert_times(value, &format!("{where_found}.{name}"))
            })
            .sum(),
        Value::Array(items) => items.iter().map(|item| assert_times(item, where_found)).sum(),
        _ => 0,
    }
}

#[test]
fn a_list_fits_80_columns_with_long_names_and_plugins_in_every_state() {
    let long_id = "i".repeat(63);
    let long = json!({
        "id": long_id, "name": "日本語".repeat(20), "version": format!("1.0.0-{}", "v".repeat(58)), "icon": "🧪",
        "route": format!("/{}", "r".repeat(127)), "concurrency": 4,
    });
    let unlicensed =
        json!({"metadata": metadata("unlicensed"), "license": {"code": "unknown_key", "text": "日本語🚂".repeat(40)}});
    let server = Site::new()
        .fake_with("long", &json!({"metadata": long}))
        .fake_with("unlicensed", &unlicensed)
        .fake("stopped")
        .fake_mode("stopping", "ignore-term")
        .fake_mode("starting", "no-listen")
        .fake_mode("looping", "exit-1")
        .fake_mode("cannot", "exit-78")
        .file("waits", script(&metadata("waits"), &format!("echo '{}' >&2; exit 75", "日本語 why ".repeat(30))).as_bytes(), 0o755)
        .file(&"f".repeat(200), b"", 0o755)
        .args(&["--start-timeout", "2m"])
        .start();
    server.wait_state("looping", "crash_looping");
    for (id, state) in
        [(&*long_id, "ready"), ("unlicensed", "unlicensed"), ("stopping", "ready"), ("stopped", "ready"), ("cannot", "refused")]
    {
        server.wait_state(id, state);
    }
    server.cli(&["stop", "stopped"]);
    server.wait_state("waits", "backing_off");
    let mut stop = command(binary());
    stop.arg("--data").arg(server.site().data()).args(["stop", "stopping"]).stdout(Stdio::null()).stderr(Stdio::null());
    let _stopping = Guarded(stop.spawn().unwrap());
    server.wait_state("stopping", "stopping");

    for width in [80, 100, 60, 20] {
        let list = on_terminal(&server, width, &["list"]);
        for line in list.lines() {
            assert!(columns(line) <= width, "{} columns of {width}: {line}\n{list}", columns(line));
        }
        assert_eq!(list.lines().filter(|line| !line.starts_with("  ")).count(), 10, "a heading and a row for each:\n{list}");
    }
    let list = on_terminal(&server, 80, &["list"]);
    let heading: Vec<_> = list.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(heading, ["ID", "STATE", "SINCE", "RESTARTS", "MEM", "VERSION", "ROUTE"]);
    // Those that pass by themselves may have passed by now.
    for state in ["ready", "unlicensed", "stopped", "starting", "crash_looping", "refused"] {
        let row = |line: &str| !line.starts_with("  ") && line.split_whitespace().nth(1) == Some(state);
        assert!(list.lines().any(row), "no {state}:\n{list}");
    }
    let below = |id: &str| {
        let row = list.lines().position(|line| line.split_whitespace().next() == Some(id)).unwrap();
        list.lines().nth(row + 1).unwrap_or_default().to_owned()
    };
    assert!(below("looping").starts_with("  exit code 1: cannot go on; next try in "), "{list}");
    assert!(below("unlicensed").starts_with("  日本語🚂") && below("unlicensed").ends_with('…'), "{list}");
    assert!(list.lines().any(|line| line.contains(" MB  ")), "{list}");

    // Whole where it is asked for, and in a pipe: a line for each plugin, with all there is of it.
    let whole = on_terminal(&server, 80, &["list", "--long"]);
    for list in [whole, on_terminal(&server, 80, &["list", "-l"]), server.cli(&["list"])] {
        assert_eq!(list.lines().count(), 10, "{list}");
        let row = list.lines().find(|line| line.starts_with(&long_id)).unwrap();
        let cells: Vec<_> = row.split_whitespace().collect();
        assert_eq!(cells[1], "ready");
        for (column, field) in [(5, "version"), (6, "route"), (9, "name")] {
            assert_eq!(cells[column], long[field].as_str().unwrap());
        }
        let row = list.lines().find(|line| line.starts_with("unlicensed ")).unwrap();
        assert!(
            row.contains("  refused:unknown_key  ") && row.ends_with(&format!("{} (unknown_key)", "日本語🚂".repeat(40))),
            "{row}"
        );
        assert!(list.lines().all(|line| line.split_whitespace().count() >= 11), "no cell is empty:\n{list}");
    }
}

#[test]
fn a_list_of_nothing_says_where_to_put_a_plugin() {
    let server = Site::new().start();
    let dir = fs::canonicalize(server.site().plugins()).unwrap();
    for said in [server.cli(&["list"]), on_terminal(&server, 80, &["list"])] {
        assert!(
            said.starts_with("no plugins: put ") && said.contains(dir.to_str().unwrap()) && said.lines().count() == 1,
            "{said}"
        );
    }
    assert_eq!(json_of(&server.cli(&["list", "--json"])), json!({"plugins": []}));
}

#[test]
fn commands_have_the_names_that_people_try() {
    let server = Site::new().fake("p").start();
    server.wait_state("p", "ready");
    for name in ["ls", "ps", "status"] {
        assert_eq!(json_of(&server.cli(&[name, "--json"]))["plugins"][0]["id"], "p");
    }
    assert_eq!(server.cli(&["reload"]), "no changes\n");
    let help = command(binary()).arg("--help").output().unwrap();
    let help = text(&help.stdout);
    assert!(
        help.starts_with("Run many small web applications")
            && help.contains("List plugins and their status")
            && !help.contains("reload"),
        "{help}"
    );
}

#[test]
fn a_plugin_is_shown_by_its_state_first_and_each_reason_once() {
    let licence = json!({"metadata": metadata("l"), "license": {"code": "missing", "text": "there is no licence"}});
    let server = Site::new().fake_mode("p", "exit-1").fake_with("l", &licence).fake("q").file("f", b"", 0o755).start();
    server.wait_state("p", "crash_looping");
    server.wait_state("l", "unlicensed");
    let running = server.wait_state("q", "ready");
    for (id, state, reason) in [
        ("p", "crash_looping", "exit code 1: cannot go on"),
        ("l", "unlicensed", "there is no licence (missing)"),
        ("f", "refused", "it is empty"),
    ] {
        // Events are written a moment later, and a plugin in a crash loop is tried again meanwhile.
        let (plugin, shown) = wait_for("its event", || {
            let plugin = server.plugin(id);
            let shown = server.cli(&["show", id]);
            let is_settled = plugin["events"][0]["kind"] == *state && server.plugin(id)["since"] == plugin["since"];
            is_settled.then_some((plugin, shown))
        });
        let lines: Vec<&str> = shown.lines().collect();
        assert_eq!(lines[0], format!("state        {state}"));
        let since = plugin["since"].as_str().unwrap();
        assert!(lines[1].starts_with(&format!("since        {since} (")) && lines[1].ends_with(" ago)"), "{shown}");
        let head = shown.split("\n\n").next().unwrap();
        let advice = format!("\nwhat to do   {}\n", plugin["advice"].as_str().unwrap());
        assert!(head.contains(&advice) && head.ends_with(&format!("\nreason       {reason}")), "{shown}");
        // The file is tried again at times as well.
        assert!(id == "f" || head.contains("\nnext try     in ") == (id == "p"), "{shown}");
        assert_eq!(shown.matches(reason).count(), 1, "{shown}");
        let words = reason.strip_prefix("exit code 1: ").unwrap_or(reason).trim_end_matches(" (missing)");
        assert_eq!(shown.matches(words).count(), 1, "{shown}");
        let events = shown.split_once("events, newest first\n").unwrap().1;
        assert!(events.lines().all(|event| event.contains(" ago)  ")), "{shown}");
    }
    let list = on_terminal(&server, 80, &["list"]);
    assert!(list.contains("\n  no licence: plugrack license set l TOKEN\n"), "{list}");
    let shown = server.cli(&["show", "q"]);
    let (pid, url) = (running["process"]["pid"].to_string(), format!("http://{}/q", server.address()));
    for (name, value) in [("url", &*url), ("pid", &pid), ("failed", "0"), ("license", "none"), ("file", "q"), ("restarts", "0")] {
        let line = format!("\n  {name:<13}{value}\n");
        assert!(shown.contains(&line), "{name}: {shown}");
    }
    for heading in ["identity", "licence", "process", "events, newest first"] {
        assert!(shown.contains(&format!("\n\n{heading}\n")), "{heading}: {shown}");
    }
}

#[test]
fn requests_that_failed_are_counted() {
    let server = Site::new().args(&["--request-timeout", "2s"]).fake("p").start();
    server.wait_state("p", "ready");
    let failed = || server.plugin("p")["process"]["failed"].as_u64().unwrap();
    assert_eq!(failed(), 0);
    assert_eq!(server.get("/p/hang-up").status, 502);
    assert_eq!(server.get("/p/sleep?s=5").status, 504);
    assert_eq!(failed(), 2);
    assert_eq!(server.get("/p/x").status, 200);
    let mut client = server.client();
    client.send(b"GET /p/break HTTP/1.1\r\nhost: test\r\n\r\n");
    wait_for("an answer that was cut short to be counted", || (failed() == 3).then_some(()));
    assert!(server.cli(&["show", "p"]).contains("\n  failed       3\n"));
}

#[test]
fn times_in_json_are_rfc_3339_and_a_licence_is_an_object() {
    let server = Site::new().fake("p").fake_mode("q", "exit-1").fake("left").start();
    server.wait_state("p", "ready");
    server.wait_state("q", "backing_off");
    server.wait_state("left", "ready");
    server.cli(&["kv", "set", "left", "k", "v"]);
    fs::remove_dir_all(server.site().plugins().join("left")).unwrap();
    server.cli(&["rescan"]);
    for (arguments, least) in [
        (&["list", "--json"][..], 2),
        (&["show", "p", "--json"], 3),
        (&["show", "q", "--json"], 4),
        (&["gone", "--json"], 1),
        (&["license", "show", "p", "--json"], 0),
        (&["stop", "p", "--json"], 3),
    ] {
        let json = json_of(&server.cli(arguments));
        assert!(assert_times(&json, &arguments.join(" ")) >= least, "{arguments:?}: {json:#}");
        let plugins = json["plugins"].as_array().cloned().unwrap_or_else(|| vec![json.clone()]);
        for license in plugins.iter().map(|plugin| &plugin["license"]).filter(|license| !license.is_null()) {
            let names: Vec<_> = license.as_object().unwrap().keys().collect();
            assert_eq!(names, ["code", "expires_at", "message", "state"], "{arguments:?}");
        }
    }
    assert_eq!(json_of(&server.cli(&["gone", "--json"]))["gone"][0]["id"], "left");
    // It goes on while it is looked at, and waits for a time that is to come.
    let waiting = server.wait_state("q", "backing_off");
    assert!(waiting["retry_at"].as_str().unwrap() >= waiting["since"].as_str().unwrap(), "{waiting:#}");
    for line in server.cli(&["logs", "q", "--json"]).lines() {
        let line = json_of(line);
        assert!(line["line"].is_string() && is_time(&line["time"]), "{line}");
    }
    server.cli(&["start", "p"]);
    server.cli(&["kv", "set", "p", "k", "text"]);
    let value = json_of(&server.cli(&["kv", "get", "p", "k", "--json"]));
    assert_eq!(value, json!({"key": "k", "rev": value["rev"], "value": "text"}));
    server.api("PUT", "/plugins/p/kv/k", b"\xff");
    let value = json_of(&server.cli(&["kv", "get", "p", "k", "--json"]));
    assert_eq!(value, json!({"key": "k", "rev": value["rev"], "value_base64": "/w=="}));
    assert_eq!(json_of(&server.cli(&["kv", "list", "p", "--json"]))["keys"][0]["key"], "k");
    let expiring = json!({"op": "incr", "key": "a", "ttl_ms": 600_000}).to_string();
    assert_eq!(server.request("POST", "/p/kv", &[], expiring.as_bytes()).status, 200);
    let keys = json_of(&server.cli(&["kv", "list", "p", "--json"]));
    assert!(is_time(&keys["keys"][0]["expires_at"]) && keys["keys"][1]["expires_at"].is_null(), "{keys:#}");
    assert_times(&keys, "kv list");
    let text = server.cli(&["kv", "list", "p"]);
    assert!(text.starts_with(&format!("a  1 bytes, revision {}, expires 2", keys["keys"][0]["rev"])), "{text}");
}

/// The error that a command with `--json` prints, which must be one line.
#[track_caller]
fn error_of(output: &Output, status: i32) -> Value {
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(status), ""), "{output:?}");
    let errors = text(&output.stderr);
    assert_eq!(errors.lines().count(), 1, "{errors}");
    let error = json_of(errors);
    assert!(error["error"]["message"].as_str().unwrap().len() > 5, "{errors}");
    error["error"].clone()
}

#[test]
fn errors_are_json_where_json_is_wanted() {
    let server = Site::new().fake("p").start();
    server.wait_state("p", "ready");
    let cases: [(&[&str], i32, &str); 14] = [
        (&["show", "none"], 1, "not_found"),
        (&["start", "none"], 1, "not_found"),
        (&["license", "show", "none"], 1, "not_found"),
        (&["license", "set", "p", "hello"], 1, "bad_license"),
        (&["license", "remove", "p"], 1, "not_found"),
        (&["license", "inspect", "hello"], 1, "malformed"),
        (&["kv", "set", "p", "forbidden", "x"], 1, "forbidden"),
        (&["kv", "delete", "p", "none"], 1, "not_found"),
        (&["config", "get", "p", "none"], 1, "not_found"),
        (&["forget", "none", "--yes"], 1, "not_found"),
        (&["adopt", "none", "none"], 1, "refused"),
        (&["logs", "none"], 1, "not_found"),
        (&["show"], 2, "usage"),
        (&["explode"], 2, "usage"),
    ];
    for (arguments, status, code) in cases {
        let mut arguments = arguments.to_vec();
        arguments.push("--json");
        let mut output = server.site().cli(&arguments);
        if code == "malformed" {
            // The result of each check is still printed.
            assert_eq!(json_of(text(&output.stdout))["checks"][0]["result"], "refused");
            output.stdout.clear();
        }
        let error = error_of(&output, status);
        assert_eq!(error["code"], code, "{arguments:?}: {error}");
    }
    let forbidden = error_of(&server.site().cli(&["kv", "get", "p", "forbidden", "--json"]), 1);
    assert_eq!(forbidden, json!({"code": "forbidden", "message": "not this one"}));
    assert_eq!(server.cli_fails(&["kv", "get", "p", "forbidden"]), "plugrack: not this one (forbidden)\n");
    let site = server.stop().1;
    assert_eq!(error_of(&site.cli(&["list", "--json"]), 1)["code"], "no_host");
    assert_eq!(error_of(&Site::new().cli(&["instance", "--json"]), 1)["code"], "not_found");
}

#[test]
fn each_of_several_plugins_is_tried_whatever_comes_of_the_others() {
    let server = Site::new().fake("a").fake("b").fake_mode("c", "exit-78").start();
    for (id, state) in [("a", "ready"), ("b", "ready"), ("c", "refused")] {
        server.wait_state(id, state);
    }
    let ids = |output: &Output| -> Vec<Value> {
        json_of(text(&output.stdout)).as_array().unwrap().iter().map(|plugin| plugin["id"].clone()).collect()
    };
    let shown = server.site().cli(&["show", "a", "b", "--json"]);
    assert_eq!((shown.status.code(), ids(&shown)), (Some(0), vec![json!("a"), json!("b")]));
    assert_eq!(json_of(&server.cli(&["show", "a", "--json"]))["id"], "a", "one is no array");
    let shown = server.cli(&["show", "a", "b"]);
    assert!(shown.starts_with("a\nstate ") && shown.contains("\n\nb\nstate "), "{shown}");

    let output = server.site().cli(&["restart", "none", "c", "a", "nobody"]);
    assert_eq!((output.status.code(), text(&output.stdout).lines().last()), (Some(1), Some("a: ready")), "{output:?}");
    let errors: Vec<&str> = text(&output.stderr).lines().collect();
    let expected = ["there is no plugin none", "c is not ready; see: plugrack logs c", "there is no plugin nobody"];
    assert_eq!(errors, expected.map(|error| format!("plugrack: {error}")));

    let output = server.site().cli(&["stop", "none", "a", "b", "--json"]);
    assert_eq!((output.status.code(), ids(&output)), (Some(1), vec![json!("a"), json!("b")]));
    let error = json!({"error": {"id": "none", "code": "not_found", "message": "there is no plugin none"}});
    assert_eq!(json_of(text(&output.stderr)), error);
    for id in ["a", "b"] {
        assert_eq!(server.plugin(id)["state"], "stopped");
    }
}

#[test]
fn usage_says_what_is_required_and_which_order_words_have() {
    for arguments in [&["logs"][..], &["show", "--json=1"], &["kv", "get"], &["stop"]] {
        let output = command(binary()).args(arguments).env("PLUGRACK_DATA", "/nowhere").output().unwrap();
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(
            said.contains(&format!(
                "Usage: plugrack {} [OPTIONS] <ID>",
                arguments[..arguments.len().min(2)].join(" ").replace(" --json=1", "")
            )),
            "{said}"
        );
        assert!(!said.contains("--data"), "{said}");
    }
    let site = Site::new();
    for (arguments, tip) in [
        (&["kv", "notes", "get", "k"][..], "the verb comes before the ID: plugrack kv get notes"),
        (&["config", "notes", "set", "token", "s3cret"], "the verb comes before the ID: plugrack config set notes"),
        (&["config", "notes", "list"], "one of get, set, unset"),
        (&["license", "notes", "set", "s3cret"], "the verb comes before the ID: plugrack license set notes"),
    ] {
        let output = site.cli(arguments);
        let said = text(&output.stderr);
        assert!(output.status.code() == Some(2) && said.contains(tip) && !said.contains("s3cret"), "{said}");
    }
}

#[test]
fn the_log_of_a_file_that_was_refused_leads_to_what_it_printed() {
    let server = Site::new()
        .file("broken", b"#!/bin/sh\necho 'SyntaxError: no' >&2\nexit 1\n", 0o755)
        .file("data", b"text", 0o644)
        .start();
    server.wait_state("broken", "backing_off");
    let output = server.site().cli(&["logs", "broken"]);
    assert!(output.status.success() && text(&output.stdout).contains("SyntaxError: no"), "{output:?}");
    assert_eq!(text(&output.stderr), "plugrack: broken is backing_off; see: plugrack show broken\n");
    // Without a log, for example after it was removed, the command still prints what is known of the file.
    fs::remove_file(server.site().data().join("logs/broken.log")).unwrap();
    let gone = server.site().cli(&["logs", "broken"]);
    assert!(text(&gone.stdout).contains("SyntaxError: no"), "{gone:?}");
    let said = server.cli_fails(&["logs", "data"]);
    assert!(
        said.contains("data has no log, because it is refused: it is not executable")
            && said.ends_with("; see: plugrack show data\n"),
        "{said}"
    );
}

#[test]
fn what_a_vendor_does_is_json_where_json_is_wanted() {
    let dir = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| {
        let output = command(binary()).arg("license").args(arguments).arg("--json").current_dir(dir.path()).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        json_of(text(&output.stdout))
    };
    let key = run(&["keygen", "--kid", "acme"]);
    assert_eq!((&key["kid"], &key["file"]), (&json!("acme"), &json!("acme.key")));
    let public = format!("acme={}", key["public_key"].as_str().unwrap());
    let issued = run(&["issue", "--key", "acme.key", "--plugin", "notes", "--instance", "*", "--customer", "you"]);
    assert_eq!((&issued["claims"]["aud"], &issued["claims"]["sub"]), (&json!("notes"), &json!("you")));
    let inspected = run(&["inspect", issued["token"].as_str().unwrap(), "--public-key", &public]);
    assert_eq!((&inspected["kid"], &inspected["claims"]), (&json!("acme"), &issued["claims"]));
    let checks = inspected["checks"].as_array().unwrap();
    assert!(checks.iter().any(|check| check["check"] == "signature" && check["result"] == "ok"), "{inspected:#}");
    assert!(checks.iter().any(|check| check["result"] == "unchecked"), "{inspected:#}");
}
