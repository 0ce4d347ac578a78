//! What the operator sets for one plugin: keys and settings without the plugin, environment variables, limits.

use crate::support::{Server, Site, binary, command, install_fake, metadata, python, script, wait_for};
use serde_json::{Value, json};
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Runs a command with text on its standard input.
fn cli_with_input(server: &Server, arguments: &[&str], input: &str) -> Output {
    let mut cli = command(binary());
    cli.arg("--data").arg(server.site().data()).args(arguments);
    let mut child = cli.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn environment(server: &Server, id: &str) -> Value {
    server.get(&format!("/{id}/env")).json()["env"].clone()
}

fn message(answer: &(u16, Value)) -> &str {
    answer.1["error"]["message"].as_str().unwrap()
}

/// Replaces a plugin's file by one that does not say who it is.
fn break_metadata(plugins: &Path, id: &str) {
    install_fake(plugins, id, &json!({"metadata": metadata(id), "metadata_exit": 3}));
}

/// Every way in which a plugin may not be there: each leaves its keys to the operator.
#[test]
fn keys_are_read_and_written_without_the_plugin() {
    let running = Site::new().fake("stopped").fake("looping").fake("refused").fake("gone").start();
    let ids = ["stopped", "looping", "refused", "gone"];
    for id in ids {
        running.wait_state(id, "ready");
        running.cli(&["kv", "set", id, "state", "{"]);
    }
    let site = running.stop().1;
    install_fake(&site.plugins(), "looping", &json!({"metadata": metadata("looping"), "mode": "exit-1"}));
    break_metadata(&site.plugins(), "refused");
    fs::remove_dir_all(site.plugins().join("gone")).unwrap();
    let server = site.start();
    server.cli(&["stop", "stopped"]);
    server.wait_state("looping", "crash_looping");
    for (id, why) in [
        ("stopped", "the plugin stopped does not run: start it, or "),
        ("looping", "the plugin looping does not run: start it, or "),
        ("refused", "refused is refused: --metadata ended with exit code 3"),
        ("gone", "there is no plugin gone; "),
    ] {
        for (verb, what, value) in [("get", "read", &[][..]), ("set", "write to", &["new"]), ("delete", "delete from", &[])] {
            let said = server.cli_fails(&[&["kv", verb, id, "state"], value].concat());
            let itself = format!("{what} the store itself with plugrack kv {verb} --direct {id} KEY\n");
            assert!(said.starts_with(&format!("plugrack: {why}")) && said.ends_with(&itself), "{said}");
        }
        assert!(server.cli(&["kv", "list", id]).starts_with("state  1 bytes"), "{id}");
        assert_eq!(server.cli(&["kv", "get", "--direct", id, "state"]), "{");
        server.cli(&["kv", "set", "--direct", id, "state", "{}"]);
        assert_eq!(server.cli(&["kv", "get", id, "state", "--direct"]), "{}");
        server.cli(&["kv", "delete", "--direct", id, "state"]);
        assert_eq!(
            server.cli_fails(&["kv", "get", "--direct", id, "state"]),
            format!("plugrack: the plugin {id} has no key \"state\"\n")
        );
        assert!(server.cli_fails(&["kv", "delete", "--direct", id, "state"]).contains("has no key"));
        assert_eq!(server.cli(&["kv", "list", id]), "");
    }
    assert_eq!(server.cli_fails(&["kv", "get", "--direct", "nobody", "x"]), "plugrack: there is no plugin nobody\n");
}

/// The store's own rules hold, and a plugin that runs sees what was written past it.
#[test]
fn the_store_itself_has_its_rules() {
    let server = Site::new().args(&["--kv-max-keys", "1"]).fake("p").start();
    server.wait_state("p", "ready");
    let (status, set) = server.api("PUT", "/plugins/p/kv/a%2Fb?direct=true", b"\xff\x00");
    assert_eq!((status, &set["key"]), (200, &json!("a/b")));
    let (_, got) = server.api("GET", "/plugins/p/kv/a%2Fb", b"");
    assert_eq!((&got["value_base64"], &got["rev"]), (&json!("/wA="), &set["rev"]));
    // The plugin refuses or computes these; the store does neither.
    assert_eq!(server.api("GET", "/plugins/p/kv/computed", b"").1["value"], "by the plugin");
    assert_eq!(server.api("GET", "/plugins/p/kv/computed?direct=true", b"").0, 404);
    assert_eq!(server.api("PUT", "/plugins/p/kv/other?direct=true", b"x").0, 507);
    let largest = vec![b'x'; 1024 * 1024 + 1];
    assert_eq!(server.api("PUT", "/plugins/p/kv/a%2Fb?direct=true", &largest).0, 413);
    let long = "k".repeat(1025);
    assert_eq!(server.api("GET", &format!("/plugins/p/kv/{long}?direct=true"), b"").0, 400);
    assert_eq!(server.api("GET", "/plugins/p/kv/a?direct=maybe", b"").0, 400);
    let (status, deleted) = server.api("DELETE", "/plugins/p/kv/a%2Fb?direct=true", b"");
    assert_eq!((status, &deleted["found"]), (200, &json!(true)));
}

#[test]
fn a_key_that_its_plugin_dies_of_names_the_way_past_it() {
    let server = Site::new().fake("p").start();
    server.wait_state("p", "ready");
    let said = server.cli_fails(&["kv", "get", "p", "die"]);
    assert!(said.contains("gave no valid answer") && said.ends_with("plugrack kv get --direct p KEY\n"), "{said}");
}

#[test]
fn the_settings_of_a_plugin_that_is_refused_can_be_corrected() {
    let server = Site::new().fake("p").start();
    server.wait_state("p", "ready");
    server.cli(&["config", "set", "p", "title", "old"]);
    let site = server.stop().1;
    break_metadata(&site.plugins(), "p");
    let server = site.start();
    assert_eq!(server.cli(&["config", "get", "p"]), "{\n  \"title\": \"old\"\n}\n");
    server.cli(&["config", "set", "p", "title", "new"]);
    server.cli(&["config", "unset", "p", "title"]);
    assert_eq!(server.cli(&["env", "set", "p", "TOKEN", "t"]), "");
    assert_eq!((server.cli(&["env", "get", "p", "TOKEN"]), server.cli(&["env", "list", "p"])), ("t".into(), "TOKEN\n".into()));
    server.cli(&["limits", "set", "p", "request-timeout", "1h"]);
    assert_eq!(server.cli(&["limits", "get", "p", "request-timeout"]), "1h       set for this plugin\n");
    // A file that never was a plugin has no id that anything could be kept under.
    install_fake(&server.site().plugins(), "never", &json!({"metadata": "no JSON"}));
    server.cli(&["rescan"]);
    for arguments in [&["config", "get", "never"][..], &["env", "set", "never", "A", "b"], &["limits", "get", "never"]] {
        assert!(server.cli_fails(arguments).starts_with("plugrack: never is refused: "), "{arguments:?}");
    }
    install_fake(&server.site().plugins(), "p", &json!({"metadata": metadata("p")}));
    server.cli(&["rescan"]);
    server.wait_state("p", "ready");
    assert_eq!(environment(&server, "p")["TOKEN"], "t");
}

/// A number that some parser would change is refused by its name, whoever sends it; as text it is kept.
#[test]
fn a_setting_is_not_changed_on_its_way() {
    let server = Site::new().fake("p").start();
    server.wait_state("p", "ready");
    let values = ["823475887319941131", "12345678901234567890123", "0042", "1e5", "1.10", "true", "null", "1e400", "-", "--x"];
    for (number, value) in values.into_iter().enumerate() {
        let key = format!("k{number}");
        let set = cli_with_input(&server, &["config", "set", "p", &key, value], "-");
        assert!(set.status.success(), "{set:?}");
    }
    server.cli(&["restart", "p"]);
    let config = server.get("/p/init").json()["config"].clone();
    for (number, value) in values.into_iter().enumerate() {
        assert_eq!(config[format!("k{number}")], value);
    }
    for number in ["823475887319941131", "-9007199254740992", "1e400", "0.12345678901234567890"] {
        for json in [number.to_owned(), format!("{{\"a\\\"\": [1, {number}]}}")] {
            let sentence = format!("not every JSON parser keeps the number {number}: leave out --json to keep it as text");
            let said = server.cli_fails(&["config", "set", "--json", "p", "k0", &json]);
            let error: Value = serde_json::from_str(&said).unwrap();
            assert!(error["error"]["message"].as_str().unwrap().starts_with(&sentence), "{said}");
            let answer = server.api("PUT", "/plugins/p/config/k0", json.as_bytes());
            assert!(answer.0 == 400 && message(&answer).starts_with(&sentence), "{answer:?}");
        }
    }
    assert_eq!(server.cli(&["config", "get", "p", "k0", "--raw"]), "823475887319941131\n");
    server.cli(&["config", "set", "--json", "p", "k0", "[9007199254740991, 0.1, 1e22, \"1e400\"]"]);
    assert!(server.cli_fails(&["config", "set", "--json", "p", "k0", "{"]).contains("the value is not JSON"));
}

#[test]
fn a_plugin_gets_its_variables_at_its_next_start_and_nobody_else_sees_them() {
    let server = Site::new().env("LANG", "C").fake("p").fake("q").start();
    let pid = server.wait_state("p", "ready")["process"]["pid"].as_i64().unwrap();
    server.wait_state("q", "ready");
    let saved = "saved; to apply: plugrack restart p\n";
    assert_eq!(server.cli(&["env", "set", "p", "PLAIN", "two words"]), saved);
    // By standard input, with - and without.
    for (arguments, name) in
        [(&["env", "set", "p", "SECRET_1", "-"][..], "SECRET_1"), (&["env", "set", "p", "SECRET_2"], "SECRET_2")]
    {
        let set = cli_with_input(&server, arguments, "s3cret-☕\n");
        assert!(set.status.success() && String::from_utf8_lossy(&set.stderr).contains("ends with a line break"), "{set:?}");
        assert_eq!(server.cli(&["env", "get", "p", name]), "s3cret-☕\n");
    }
    let file = server.site().data().join("value");
    fs::write(&file, "-----BEGIN-----\nx").unwrap();
    server.cli(&["env", "set", "p", "KEY_FILE", "--file", file.to_str().unwrap()]);
    // Set for good by the host otherwise, and what only a shim would suffer from.
    for (name, value) in [
        ("PATH", "/opt/venv/bin:/usr/bin:/bin"),
        ("LANG", "C.UTF-8"),
        ("TZ", "UTC"),
        ("PYTHONUNBUFFERED", ""),
        ("LD_PRELOAD", "/no/such.so"),
    ] {
        server.cli(&["env", "set", "p", name, value]);
    }
    assert!(environment(&server, "p")["PLAIN"].is_null());
    assert_eq!(server.plugin("p")["process"]["pid"], pid);
    server.cli(&["restart", "p"]);
    let env = environment(&server, "p");
    for (name, value) in [
        ("PLAIN", "two words"),
        ("SECRET_1", "s3cret-☕\n"),
        ("KEY_FILE", "-----BEGIN-----\nx"),
        ("PATH", "/opt/venv/bin:/usr/bin:/bin"),
        ("LANG", "C.UTF-8"),
        ("PYTHONUNBUFFERED", ""),
        ("LD_PRELOAD", "/no/such.so"),
        ("PLUGRACK_PLUGIN_ID", "p"),
    ] {
        assert_eq!(env[name], value, "{name}");
    }
    assert!(!env.to_string().contains("PLUGRACK_SET_"), "{env:#}");
    // The plugin's loader complains, and not that of the shim, which may run as root.
    let complaints = fs::read_to_string(server.site().data().join("logs/p.log")).unwrap().matches("/no/such.so").count();
    assert!(complaints <= 1, "{complaints}");
    let other = environment(&server, "q");
    assert_eq!((other["PLAIN"].is_null(), &other["LANG"], &other["PYTHONUNBUFFERED"]), (true, &json!("C"), &json!("1")));

    let names = ["KEY_FILE", "LANG", "LD_PRELOAD", "PATH", "PLAIN", "PYTHONUNBUFFERED", "SECRET_1", "SECRET_2", "TZ"];
    assert_eq!(server.cli(&["env", "list", "p"]), names.map(|name| format!("{name}\n")).concat());
    assert_eq!(server.api("GET", "/plugins/p/env", b""), (200, json!({"env": names})));
    let (status, one) = server.api("GET", "/plugins/p/env/PLAIN", b"");
    assert_eq!((status, one), (200, json!({"name": "PLAIN", "value": "two words"})));
    // No value where it is not asked for.
    let shown = [server.cli(&["show", "p"]), server.plugin("p").to_string(), server.cli(&["list", "--json"]), server.log()];
    let logged = server.cli(&["logs", "p"]);
    assert!(shown.iter().chain([&logged]).all(|text| !text.contains("s3cret") && !text.contains("two words")));

    assert_eq!(server.cli(&["env", "unset", "p", "PLAIN", "PATH"]), saved);
    assert_eq!(server.cli_fails(&["env", "unset", "p", "PLAIN"]), "plugrack: no variable PLAIN is set for the plugin p\n");
    assert_eq!(server.cli_fails(&["env", "get", "p", "PLAIN"]), "plugrack: no variable PLAIN is set for the plugin p\n");
    let site = server.stop().1;
    let server = site.start();
    server.wait_state("p", "ready");
    let env = environment(&server, "p");
    assert_eq!((env["PLAIN"].is_null(), &env["SECRET_1"]), (true, &json!("s3cret-☕\n")));
    assert_eq!(env["PATH"], std::env::var("PATH").unwrap());
}

#[test]
fn variables_have_their_names_and_sizes() {
    let server = Site::new().fake("p").start();
    server.wait_state("p", "ready");
    for name in ["HOME", "PLUGRACK_SOCKET", "PLUGRACK_X"] {
        let said = server.cli_fails(&["env", "set", "p", name, "x"]);
        assert!(said.starts_with(&format!("plugrack: the variable {name} is reserved: ")), "{said}");
    }
    for name in ["1A", "A-B", "A=B", "Ä", &"x".repeat(129)] {
        assert!(server.cli_fails(&["env", "set", "p", name, "x"]).contains("cannot be the name of a variable"), "{name}");
    }
    let put = |name: &str, value: &[u8]| server.api("PUT", &format!("/plugins/p/env/{name}"), value);
    assert_eq!((put("A", b"\0").0, put("A", b"\xff").0, put("A", &[b'x'; 32 * 1024 + 1]).0), (400, 400, 413));
    // Counted as a process gets them: NAME=VALUE and a NUL.
    for name in ["A", "B", "C"] {
        assert_eq!(put(name, &[b'x'; 32 * 1024]).0, 200);
    }
    let left = 128 * 1024 - 3 * (32 * 1024 + 3) - 3;
    assert_eq!((put("D", &vec![b'x'; left + 1]).0, put("D", &vec![b'x'; left]).0), (413, 200));
    assert_eq!((put("E", b"").0, put("D", b"").0, put("E", b"").0), (413, 200, 200));
    assert_eq!(server.api("GET", "/plugins/p/env/PATH", b"").0, 404);
    assert_eq!((server.api("POST", "/plugins/p/env/A", b"").0, server.api("PUT", "/plugins/p/env", b"").0), (405, 405));
    server.cli(&["restart", "p"]);
    assert_eq!(environment(&server, "p")["A"].as_str().unwrap().len(), 32 * 1024);
}

#[test]
fn a_variable_wakes_a_plugin_that_was_refused_for_want_of_it() {
    let run = format!(
        "if [ -z \"$TOKEN\" ]; then echo 'set TOKEN, please' >&2; exit 78; fi\nexec {} -c 'import time; time.sleep(600)'",
        python()
    );
    let server = Site::new().file("p", script(&metadata("p"), &run).as_bytes(), 0o755).start();
    server.wait_state("p", "refused");
    assert_eq!(server.cli(&["env", "set", "p", "TOKEN", "t"]), "");
    server.wait_state("p", "starting");
}

/// What a plugin that is gone has left is listed and deleted with all else.
#[test]
fn variables_and_limits_of_a_plugin_that_is_gone_are_counted_and_forgotten() {
    let server = Site::new().fake("p").start();
    server.wait_state("p", "ready");
    server.cli(&["env", "set", "p", "A", "s3cret"]);
    server.cli(&["env", "set", "p", "B", "b"]);
    server.cli(&["limits", "set", "p", "open-files", "64"]);
    fs::remove_dir_all(server.site().plugins().join("p")).unwrap();
    server.cli(&["rescan"]);
    let gone = server.cli(&["gone"]);
    assert!(gone.contains("2 environment variables, 1 limit"), "{gone}");
    let (_, left) = server.api("GET", "/gone", b"");
    assert_eq!(
        (&left["gone"][0]["env"], &left["gone"][0]["limits"], &left["gone"][0]["kept"]),
        (&json!(2), &json!(1), &json!(true))
    );
    // Another file does not come by them.
    install_fake(&server.site().plugins(), "other", &json!({"metadata": metadata("p")}));
    server.cli(&["rescan"]);
    assert!(server.plugin("other")["reason"].as_str().unwrap().contains("belongs to the file p"));
    fs::remove_dir_all(server.site().plugins().join("other")).unwrap();
    server.cli(&["rescan"]);
    server.cli(&["forget", "--yes", "p"]);
    assert_eq!(server.cli(&["gone"]), "removed plugins have left no data\n");
    let site = server.stop().1;
    let connection = rusqlite::Connection::open(site.data().join("plugrack.db")).unwrap();
    for table in ["env", "limits"] {
        let rows: i64 = connection.query_row(&format!("SELECT count(*) FROM {table}"), [], |row| row.get(0)).unwrap();
        assert_eq!(rows, 0, "{table}");
    }
}

/// The limit of open files of a process, soft and hard.
fn open_files(pid: &Value) -> [String; 2] {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
    let mut words = line.split_whitespace().map(str::to_owned);
    [words.next().unwrap(), words.next().unwrap()]
}

/// A host with these limits of open files.
fn with_files(site: &Site, soft: u32, hard: u32) -> Command {
    let serve = site.serve();
    let mut sh = command("/bin/sh");
    sh.args(["-c", &format!("ulimit -Sn {soft}; ulimit -Hn {hard}; exec \"$@\""), "sh"]);
    sh.arg(serve.get_program()).args(serve.get_args());
    sh.arg0("sh");
    sh
}

#[test]
fn a_plugin_has_the_open_files_that_the_host_was_started_with_unless_it_is_set_others() {
    let site = Site::new().fake("p").fake("q");
    let asked = site.data().join("asked");
    let site = site.file("r", format!("#!/bin/sh\nulimit -n >{}\n", asked.display()).as_bytes(), 0o755);
    let serve = with_files(&site, 777, 3000);
    let server = site.start_as(serve);
    let pid = |id: &str| server.wait_state(id, "ready")["process"]["pid"].clone();
    assert_eq!(
        (open_files(&json!(server.pid())), open_files(&pid("p"))),
        (["3000", "3000"].map(str::to_owned), ["777", "777"].map(str::to_owned))
    );
    assert_eq!(fs::read_to_string(&asked).unwrap(), "777\n");
    assert_eq!(server.cli(&["limits", "get", "p", "open-files"]), "777      the host's default\n");
    assert_eq!(server.cli(&["limits", "set", "p", "open-files", "2000"]), "saved; to apply: plugrack restart p\n");
    assert_eq!(server.cli(&["limits", "get", "p", "open-files"]), "2000     set for this plugin; 777 until plugrack restart p\n");
    server.cli(&["restart", "p"]);
    assert_eq!((open_files(&pid("p"))[0].as_str(), open_files(&pid("q"))[0].as_str()), ("2000", "777"));
    assert_eq!(server.cli(&["limits", "get", "p", "open-files"]), "2000     set for this plugin\n");
    let said = server.cli_fails(&["limits", "set", "p", "open-files", "3001"]);
    assert!(said.contains("at most 3000 open files") && said.contains("ulimit -Hn"), "{said}");
    for wrong in ["15", "-1", "many", "1e3", ""] {
        assert!(
            server.cli_fails(&["limits", "set", "p", "open-files", wrong]).contains("a whole number, at least 16"),
            "{wrong}"
        );
    }
    // On a host that may have fewer, the plugin has what there is.
    let site = server.stop().1;
    let serve = with_files(&site, 500, 1500);
    let server = site.start_as(serve);
    server.wait_state("p", "ready");
    assert_eq!(open_files(&server.plugin("p")["process"]["pid"])[0], "1500");
    server.cli(&["limits", "unset", "p", "open-files"]);
    server.cli(&["restart", "p"]);
    assert_eq!(open_files(&server.plugin("p")["process"]["pid"])[0], "500");
    assert!(server.cli_fails(&["limits", "unset", "p", "open-files"]).contains("has no open-files of its own"));
}

#[test]
fn a_plugin_has_its_own_times() {
    let args = ["--request-timeout", "700ms", "--start-timeout", "8s"];
    let server = Site::new().args(&args).fake("p").fake_mode("late", "wait-init").start();
    server.wait_state("p", "ready");
    assert_eq!(server.get("/p/sleep?s=2").status, 504);
    let rows = "open-files       ";
    let shown = server.cli(&["limits", "get", "p"]);
    assert!(
        shown.starts_with(rows)
            && shown.ends_with("start-timeout    8s       the host's default\nrequest-timeout  700ms    the host's default\n"),
        "{shown}"
    );
    assert_eq!(server.cli(&["limits", "set", "p", "request-timeout", "2h"]), "saved; to apply: plugrack restart p\n");
    let (_, limits) = server.api("GET", "/plugins/p/limits", b"");
    assert_eq!(limits["limits"]["request-timeout"], json!({"value": "2h", "default": false, "running": "700ms"}));
    server.cli(&["restart", "p"]);
    assert_eq!(server.get("/p/sleep?s=2").text(), "slept");
    // Set to what it is, or back to it, it needs no restart.
    let set = |value: &str| server.api("PUT", "/plugins/p/limits/request-timeout", value.as_bytes());
    assert_eq!((set("120m").1["restart_needed"].clone(), set(" 1d\n").1["restart_needed"].clone()), (json!(false), json!(true)));
    assert_eq!(server.api("DELETE", "/plugins/p/limits/request-timeout", b"").1["limits"]["request-timeout"]["value"], "700ms");
    for wrong in ["25h", "0s", "soon", "30"] {
        let answer = set(wrong);
        assert!(answer.0 == 400 && message(&answer).starts_with("request-timeout: a time is "), "{wrong}: {answer:?}");
    }
    assert_eq!(server.api("PUT", "/plugins/p/limits/start-timeout", b"61m").0, 400);
    assert_eq!(
        (server.api("GET", "/plugins/p/limits/memory", b"").0, server.api("POST", "/plugins/p/limits", b"").0),
        (404, 405)
    );

    // It is not ready within the host's time, and is within its own.
    let failed = || {
        server.plugin("late")["last_end"]["reason"]
            .as_str()
            .is_some_and(|why| why.contains("it was not ready within 8 s"))
            .then_some(())
    };
    wait_for("a start that takes too long", failed);
    server.cli(&["limits", "set", "late", "start-timeout", "1h"]);
    let command = command(binary()).arg("--data").arg(server.site().data()).args(["restart", "late"]).output().unwrap();
    assert_eq!(command.status.code(), Some(1), "{command:?}");
    fs::write(server.site().data().join("plugin-data/late/go"), "").unwrap();
    server.wait_state("late", "ready");
}

/// Longer than the gate and the commands wait for a plugin that has the host's times, and than the times of the gate's connections.
#[test]
fn an_answer_that_takes_a_minute_comes_through_where_the_plugin_may_take_an_hour() {
    let server = Site::new().args(&["--request-timeout", "2s"]).fake("p").start();
    server.wait_state("p", "ready");
    server.cli(&["kv", "set", "--direct", "p", "sleep-64", "x"]);
    server.cli(&["limits", "set", "p", "request-timeout", "1h"]);
    server.cli(&["restart", "p"]);
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let key = scope.spawn(|| server.cli(&["kv", "get", "p", "sleep-64"]));
        let mut client = TcpStream::connect(server.address()).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(150))).unwrap();
        client.write_all(b"GET /p/sleep?s=64 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("slept"), "{answer}");
        assert_eq!(key.join().unwrap(), "x");
    });
    assert!(begun.elapsed() >= Duration::from_secs(64));
}

/// The process before an update finishes what it has begun, within its own time for requests.
#[test]
fn an_update_leaves_the_process_before_it_the_plugins_own_time() {
    let server = Site::new().args(&["--request-timeout", "1s"]).fake("p").start();
    server.wait_state("p", "ready");
    server.cli(&["limits", "set", "p", "request-timeout", "1h"]);
    server.cli(&["restart", "p"]);
    let mut client = TcpStream::connect(server.address()).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    client.write_all(b"GET /p/sleep?s=12 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
    server.wait_logged("p", &["sleeping"]);
    let mut newer = metadata("p");
    newer["version"] = json!("2.0.0");
    install_fake(&server.site().plugins(), "p", &json!({"metadata": newer}));
    assert_eq!(server.cli(&["rescan"]), "changed: p\n");
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("slept"), "{answer}");
}

#[test]
fn plugins_get_the_variables_of_the_host_that_are_passed_on() {
    let site =
        Site::new().env("http_proxy", "http://proxy:3128").env("SSL_CERT_FILE", "/certs.pem").env("SECRET", "s").env("TZ", "UTC");
    let asked = site.data().join("asked");
    let curious = format!("#!/bin/sh\necho \"$http_proxy $PYTHONUNBUFFERED $SECRET\" >{}\n", asked.display());
    let site = site.fake("p").file("curious", curious.as_bytes(), 0o755).args(&[
        "--pass-env",
        "http_proxy,NOT_SET",
        "--pass-env",
        "SSL_CERT_FILE",
    ]);
    let server = site.start();
    server.wait_state("p", "ready");
    let env = environment(&server, "p");
    assert_eq!((&env["http_proxy"], &env["SSL_CERT_FILE"]), (&json!("http://proxy:3128"), &json!("/certs.pem")));
    assert!(env["NOT_SET"].is_null() && env["SECRET"].is_null(), "{env}");
    assert_eq!(fs::read_to_string(&asked).unwrap(), "http://proxy:3128 1 \n");
    // A plugin's own goes first.
    server.cli(&["env", "set", "p", "http_proxy", ""]);
    server.cli(&["restart", "p"]);
    assert_eq!(environment(&server, "p")["http_proxy"], "");
    drop(server);

    let by_environment = Site::new().env("A", "1").env("B", "2").env("PLUGRACK_PASS_ENV", "A, B").fake("p").start();
    by_environment.wait_state("p", "ready");
    let env = environment(&by_environment, "p");
    assert_eq!((&env["A"], &env["B"]), (&json!("1"), &json!("2")));
    for name in ["HOME", "A,PLUGRACK_DATA", "not-a-name"] {
        let output = Site::new().args(&["--pass-env", name]).run_to_end();
        assert_eq!(output.status.code(), Some(2), "{name}");
    }
    let nothing = Site::new().env("PLUGRACK_PASS_ENV", "").fake("p").start();
    nothing.wait_state("p", "ready");
}

/// What a plain program prints is in its log while it runs, and not only when it ends.
#[test]
fn what_python_prints_is_in_the_log_at_once() {
    let text = metadata("p").to_string();
    let program = format!(
        "#!{}\nimport sys, time\nif sys.argv[1:] == ['--metadata']:\n    print('''{text}''')\n    sys.exit()\nprint('a plain print')\ntime.sleep(600)\n",
        python()
    );
    let server = Site::new().args(&["--start-timeout", "5m"]).file("p", program.as_bytes(), 0o755).start();
    server.wait_logged("p", &["a plain print"]);
    assert_eq!(server.plugin("p")["state"], "starting");
}
