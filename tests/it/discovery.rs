//! What is found in the plugins directory, what is refused and why, and what a further look changes.

use crate::support::{Server, Site, command, install_fake, is_alive, metadata, script, wait_for, write_file};
use rustix::fs::OFlags;
use serde_json::{Value, json};
use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::time::Instant;

/// Metadata with one field changed, or removed by null.
fn metadata_but(id: &str, field: &str, value: Value) -> Value {
    let mut metadata = metadata(id);
    match value {
        Value::Null => drop(metadata.as_object_mut().unwrap().remove(field)),
        value => metadata[field] = value,
    }
    metadata
}

/// An ELF header for some machine, and nothing behind it.
fn elf(machine: u16) -> Vec<u8> {
    let mut elf = vec![0; 64];
    elf[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    elf[16] = 2;
    elf[18..20].copy_from_slice(&machine.to_le_bytes());
    elf
}

/// This machine's number in an ELF header, by the test's own.
fn own_machine() -> u16 {
    let own = fs::read("/proc/self/exe").unwrap();
    u16::from_le_bytes([own[18], own[19]])
}

/// The entry of a file in the list of plugins.
#[track_caller]
fn listed(server: &Server, file: &str) -> Value {
    let list = server.api("GET", "/plugins", b"").1;
    let entry = list["plugins"].as_array().unwrap().iter().find(|entry| entry["file"] == file);
    entry.unwrap_or_else(|| panic!("{file} is not listed: {list:#}")).clone()
}

/// Starts a host with files that cannot be plugins, and looks for the reason of each in all places an operator looks.
/// A plugin beside them must run all the same.
#[track_caller]
fn refused(site: Site, cases: &[(&str, &str)]) {
    not_accepted(site, "refused", cases);
}

/// The same for files whose state is another one, since they are asked again.
#[track_caller]
fn not_accepted(site: Site, state: &str, cases: &[(&str, &str)]) {
    let server = site.fake("good").start();
    server.wait_state("good", "ready");
    assert_eq!(server.get("/good/x").status, 200);
    let (text, log) = (server.cli(&["list"]), server.log());
    for (file, reason) in cases {
        let entry = listed(&server, file);
        assert_eq!(entry["state"], state, "{entry:#}");
        let why = entry["reason"].as_str().unwrap();
        assert!(why.contains(reason), "{file}: {why:?} does not say {reason:?}");
        assert!(!why.chars().any(char::is_control), "{file}: {why:?}");
        assert!(text.lines().any(|line| line.contains(why)), "{file}: not in the list\n{text}");
        assert!(log.lines().any(|line| line.contains(&format!("{file}: refused: {why}"))), "{file}: not in the log\n{log}");
        assert!(server.cli(&["show", file]).contains(why));
        assert_eq!(server.plugin(file)["events"][0]["detail"], why, "{file}");
        let (status, answer) = server.api("POST", &format!("/plugins/{file}/start"), b"");
        assert_eq!((status, &answer["error"]["code"]), (409, &json!("refused")), "{answer}");
    }
    let found = server.api("GET", "/plugins", b"").1["plugins"].as_array().unwrap().len();
    assert_eq!(found, cases.len() + 1);
}

#[test]
fn files_and_directories_are_found_and_dotfiles_are_not() {
    // The file runs what is in a directory that is hidden.
    let file = b"#!/bin/sh\nexec \"$(dirname \"$0\")/.hidden/plugin\" \"$@\"\n";
    let site = Site::new().fake("dir").file("file", file, 0o755).file(".dotfile", b"", 0o755);
    install_fake(&site.plugins(), ".hidden", &json!({"metadata": metadata("of-a-file")}));
    symlink("dir", site.plugins().join(".link")).unwrap();
    let server = site.start();
    for id in ["dir", "of-a-file"] {
        server.wait_state(id, "ready");
        assert_eq!(server.get(&format!("/{id}/x")).text(), format!("GET /x of {id}"));
    }
    let list = server.api("GET", "/plugins", b"").1;
    let files: Vec<_> = list["plugins"].as_array().unwrap().iter().map(|plugin| &plugin["file"]).collect();
    assert_eq!(files, ["dir", "file"]);
    assert!(!server.log().contains("refused"), "{}", server.log());
}

#[test]
fn links_lead_to_plugins() {
    let site = Site::new();
    install_fake(site.data(), "elsewhere", &json!({"metadata": metadata("linked")}));
    symlink("../elsewhere", site.plugins().join("linked")).unwrap();
    let server = site.start();
    server.wait_state("linked", "ready");
    assert_eq!(server.get("/linked/x").status, 200);
}

#[test]
fn a_missing_plugins_directory_is_made() {
    let site = Site::new();
    fs::remove_dir(site.plugins()).unwrap();
    let server = site.start();
    assert!(server.site().plugins().is_dir());
    assert_eq!(server.api("GET", "/plugins", b"").1, json!({"plugins": []}));
    assert_eq!(server.get("/").text(), "no plugins yet\n");
}

#[test]
fn what_cannot_be_executed_is_refused() {
    let site = Site::new()
        .file("not-executable", b"#!/bin/sh\n", 0o644)
        .file("empty", b"", 0o755)
        .file("text", b"just text", 0o755)
        .file("foreign", &elf(22), 0o755)
        .file("truncated", &elf(own_machine()), 0o755)
        .file("no-interpreter", b"#!/no/such/interpreter -x\n", 0o755)
        .file("no-env", b"#!/usr/bin/env nosuch\n", 0o755)
        .file("from-windows", b"#!/bin/sh\r\n", 0o755);
    for dir in ["dir-empty", "dir-dir", "dir-not-executable"] {
        fs::create_dir(site.plugins().join(dir)).unwrap();
    }
    fs::create_dir(site.plugins().join("dir-dir/plugin")).unwrap();
    write_file(&site.plugins().join("dir-not-executable/plugin"), b"#!/bin/sh\n", 0o600);
    symlink("/no/such/file", site.plugins().join("dangling")).unwrap();
    let cases = [
        ("not-executable", "not executable: chmod +x"),
        ("empty", "empty"),
        ("text", "neither a program"),
        ("foreign", "built for s390x, this machine is"),
        ("truncated", "truncated ELF"),
        ("no-interpreter", "interpreter /no/such/interpreter is not installed"),
        ("no-env", "interpreter nosuch is not installed"),
        ("from-windows", "CR LF"),
        ("dir-empty", "neither an executable file named plugin nor a plugrack.toml"),
        ("dir-dir", "not a regular file"),
        ("dir-not-executable", "not executable: chmod +x"),
        ("dangling", "No such file"),
    ];
    refused(site, &cases);
}

/// In a mount namespace of its own with a binfmt_misc of its own, which Linux has from 6.7 on.
#[test]
fn what_the_kernel_has_an_interpreter_for_is_a_plugin() {
    const SETUP: &str = r#"mkdir "$1/formats" && mount -t binfmt_misc none "$1/formats" &&
        echo ":it-foreign:M:18:\\x16\\x00::$1/emulator:" >"$1/formats/register" &&
        echo ":it-archive:M::PK\\x03\\x04::$1/emulator:" >"$1/formats/register" && shift && exec "$@""#;
    let contained = |site: &Site, then: &[&OsStr]| {
        let mut contained = command("unshare");
        contained.args(["--user", "--map-root-user", "--mount", "sh", "-c", SETUP, "sh"]).arg(site.data()).args(then);
        contained
    };
    let tried = contained(&Site::new(), &["true".as_ref()]).output().unwrap();
    if !tried.status.success() {
        return eprintln!("skipped, since this system allows no such namespace: {}", String::from_utf8_lossy(&tried.stderr));
    }
    let names = ["foreign", "archive"];
    let site = Site::new().file("foreign", &elf(22), 0o755).file("archive", b"PK\x03\x04", 0o755);
    for name in names {
        install_fake(site.data(), name, &json!({"metadata": metadata(name)}));
    }
    let emulator = format!("#!/bin/sh\nprogram={}/${{1##*/}}/plugin; shift; exec \"$program\" \"$@\"\n", site.data().display());
    write_file(&site.data().join("emulator"), emulator.as_bytes(), 0o755);
    let serve = site.serve();
    let serve: Vec<_> = std::iter::once(serve.get_program()).chain(serve.get_args()).collect();
    let serve = contained(&site, &serve);
    let server = site.start_as(serve);
    for name in names {
        server.wait_state(name, "ready");
        assert_eq!(server.get(&format!("/{name}/x")).text(), format!("GET /x of {name}"));
    }
}

#[test]
fn what_does_not_say_who_it_is_is_refused() {
    let cases = [
        ("failing", "echo first >&2; echo 'no database' >&2; exit 3", "exit code 3: no database"),
        ("mute", "exit 1", "exit code 1: it printed nothing on standard error"),
        ("not-found", "exit 127", "exit code 127 (not found): it printed nothing on standard error"),
        ("no-input", "cat && readlink /proc/$$/fd/0 >&2; exit 3", "exit code 3: /dev/null"),
        // A program that writes to a closed pipe ends, as it would where somebody starts it by hand.
        ("pipes", "grep -q 'SigIgn.*[02468ace]...$' /proc/$$/status && echo default >&2; exit 3", "exit code 3: default"),
        ("killed", "kill -9 $$", "killed by signal 9 (SIGKILL)"),
        ("chatty", "head -c 70000 /dev/zero", "printed more than 65536 bytes"),
        ("endless", "exec yes", "printed more than 65536 bytes"),
        ("loud", "head -c 70000 /dev/zero >&2; exit 4", "exit code 4"),
        ("coloured", "printf '\\033[31mred\\007\\n' >&2; exit 5", "[31mred"),
        ("hanging", "exec sleep 60", "did not end within 10 s"),
        // A child that keeps the output open must not hold the host up beyond the time it has.
        ("forking", "sleep 60 & exit 6", "exit code 6"),
    ];
    let shell = |cases: &[(&str, &str, &str)]| {
        let file =
            |site: Site, (file, run, _): &(&str, &str, &str)| site.file(file, format!("#!/bin/sh\n{run}\n").as_bytes(), 0o755);
        cases.iter().fold(Site::new(), file)
    };
    not_accepted(shell(&cases), "backing_off", &cases.map(|(file, _, reason)| (file, reason)));
    let cases = [
        ("silent", "exit 0", "not a JSON object: --metadata printed nothing"),
        ("not-json", "echo hello", "not a JSON object: it begins with \"hello\""),
        ("array", "echo '[]'", "not a JSON object: it is an array"),
    ];
    refused(shell(&cases), &cases.map(|(file, _, reason)| (file, reason)));
}

#[test]
fn metadata_that_breaks_the_rules_is_refused() {
    let long = |length: usize| json!("x".repeat(length));
    let cases: Vec<(&str, &str, Value, &str)> = vec![
        ("no-id", "id", Value::Null, "metadata.id is missing"),
        ("no-name", "name", Value::Null, "metadata.name is missing"),
        ("no-version", "version", Value::Null, "metadata.version is missing"),
        ("no-icon", "icon", Value::Null, "metadata.icon is missing"),
        ("no-route", "route", Value::Null, "metadata.route is missing"),
        ("id-upper", "id", json!("Upper"), "id \"Upper\" is not valid"),
        ("id-path", "id", json!("../x"), "id \"../x\" is not valid"),
        ("id-dash", "id", json!("-x"), "id \"-x\" is not valid"),
        ("id-empty", "id", json!(""), "id \"\" is not valid"),
        ("id-long", "id", long(64), "id \"xxx"),
        ("id-number", "id", json!(7), "metadata.id must be a string, got 7"),
        ("name-empty", "name", json!(""), "name \"\" is not valid"),
        ("name-long", "name", long(65), "name \"xxx"),
        ("name-control", "name", json!("a\nb"), "name \"a\\nb\" is not valid"),
        ("version-empty", "version", json!(""), "version \"\" is not valid"),
        ("version-unicode", "version", json!("1.0-ü"), "version \"1.0-ü\" is not valid"),
        ("icon-empty", "icon", json!(""), "icon \"\" is not valid"),
        ("icon-long", "icon", json!("a long text for an icon"), "icon \"a long"),
        ("icon-uri", "icon", json!("data:text/html,x"), "icon \"data:text"),
        ("route-root", "route", json!("/"), "route \"/\" is not valid"),
        ("route-bare", "route", json!("x"), "route \"x\" is not valid"),
        ("route-slash", "route", json!("/x/"), "route \"/x/\" is not valid"),
        ("route-dots", "route", json!("/x/../y"), "route \"/x/../y\" is not valid"),
        ("route-upper", "route", json!("/X"), "route \"/X\" is not valid"),
        ("route-long", "route", json!(format!("/{}", "x".repeat(128))), "route \"/xxx"),
        ("route-api", "route", json!("/api"), "route /api belongs to the host"),
        ("route-below-api", "route", json!("/api/x"), "route /api/x belongs to the host"),
        ("route-healthz", "route", json!("/healthz"), "route /healthz belongs to the host"),
        ("route-admin", "route", json!("/admin"), "route /admin belongs to the host"),
        ("route-metrics", "route", json!("/metrics"), "route /metrics belongs to the host"),
        ("protocol-2", "protocol", json!(2), "speaks protocol 2, this host speaks 1"),
        ("protocol-0", "protocol", json!(0), "speaks protocol 0, this host speaks 1"),
        ("concurrency-0", "concurrency", json!(0), "concurrency \"0\" is not valid"),
        ("concurrency-257", "concurrency", json!(257), "concurrency \"257\" is not valid"),
        ("description-long", "description", long(513), "description \"xxx"),
    ];
    let mut site = Site::new();
    for (file, field, value, _) in &cases {
        site = site.file(file, script(&metadata_but(file, field, value.clone()), "exit 1").as_bytes(), 0o755);
    }
    let cases: Vec<_> = cases.iter().map(|(file, _, _, reason)| (*file, *reason)).collect();
    refused(site, &cases);
}

#[test]
fn of_two_with_the_same_id_or_route_the_first_by_name_is_taken() {
    let site = Site::new()
        .fake("a-first")
        .file("b-same-id", script(&metadata_but("a-first", "route", json!("/other")), "exit 1").as_bytes(), 0o755)
        .file("c-same-route", script(&metadata_but("c-same-route", "route", json!("/a-first")), "exit 1").as_bytes(), 0o755);
    let server = site.start();
    server.wait_state("a-first", "ready");
    assert_eq!(server.get("/a-first/x").text(), "GET /x of a-first");
    for (file, reason) in
        [("b-same-id", "the id a-first is taken by a-first"), ("c-same-route", "the route /a-first is taken by a-first")]
    {
        let entry = listed(&server, file);
        assert_eq!((&entry["state"], &entry["reason"]), (&json!("refused"), &json!(reason)));
        assert!(server.log().contains(reason) && server.cli(&["list"]).contains(reason));
    }
}

#[test]
fn of_two_that_ask_for_one_route_the_first_by_name_has_it_though_it_answers_last() {
    let slow = json!({"metadata": metadata_but("slow", "route", json!("/r")), "metadata_sleep": 1});
    let quick = json!({"metadata": metadata_but("quick", "route", json!("/r"))});
    let server = Site::new().fake_with("a-slow", &slow).fake_with("b-quick", &quick).start();
    server.wait_state("slow", "ready");
    assert_eq!(server.get("/r/x").text(), "GET /x of slow");
    assert_eq!(listed(&server, "b-quick")["reason"], "the route /r is taken by a-slow");
}

#[test]
fn a_plugin_under_another_name_takes_over_from_itself() {
    let server = Site::new().fake("old").start();
    let pid = server.wait_state("old", "ready")["process"]["pid"].as_i64().unwrap();
    let plugins = server.site().plugins();
    // The id has data, which goes with the file.
    assert_eq!(server.api("PUT", "/plugins/old/kv/key", b"value").0, 200);
    // The new name comes before the old one, and says the same id.
    fs::rename(plugins.join("old"), plugins.join("moved")).unwrap();
    let changes = server.api("POST", "/rescan", b"").1;
    assert_eq!((&changes["added"], &changes["removed"]), (&json!(["moved"]), &json!(["old"])));
    assert!(!is_alive(pid));
    server.wait_restarted("old", pid);
    assert_eq!(server.get("/old/x").text(), "GET /x of old");
    assert_eq!(server.cli(&["kv", "get", "old", "key"]), "value");
}

#[test]
fn a_route_below_anothers_is_its_own() {
    let inner = json!({"metadata": metadata_but("inner", "route", json!("/outer/inner"))});
    let server = Site::new().fake("outer").fake_with("inner", &inner).start();
    for id in ["outer", "inner"] {
        server.wait_state(id, "ready");
    }
    assert_eq!(server.get("/outer/inner/x").text(), "GET /x of inner");
    assert_eq!(server.get("/outer/innermost").text(), "GET /innermost of outer");
}

#[test]
fn metadata_is_asked_for_with_the_documented_environment_alone() {
    let site = Site::new().env("SECRET", "x").env("LANG", "C.UTF-8").env("TZ", "UTC").env("HOME", "/root");
    let seen = site.data().join("seen");
    let run = format!("#!/bin/sh\ntr '\\0' '\\n' </proc/$$/environ | sort >{}\npwd >>{0}\n", seen.display());
    let server = site.file("curious", run.as_bytes(), 0o755).start();
    let seen = fs::read_to_string(seen).unwrap();
    let path = std::env::var("PATH").unwrap();
    let (marks, rest): (Vec<&str>, Vec<&str>) = seen.lines().partition(|line| line.starts_with("PLUGRACK_"));
    assert_eq!(rest, ["HOME=/", "LANG=C.UTF-8", &format!("PATH={path}"), "PYTHONUNBUFFERED=1", "TZ=UTC", "/"]);
    let marks: Vec<_> = marks.iter().filter_map(|mark| Some(mark.split_once('=')?.0)).collect();
    assert_eq!(marks, ["PLUGRACK_ASK", "PLUGRACK_RUN"]);
    assert_eq!(listed(&server, "curious")["state"], "refused");
}

#[test]
fn a_rescan_finds_what_was_added_changed_and_removed_and_leaves_the_rest_alone() {
    let server = Site::new().fake("keep").fake("change").fake("gone").start();
    let pids = ["keep", "change", "gone"].map(|id| server.wait_state(id, "ready")["process"]["pid"].as_i64().unwrap());
    assert_eq!(server.cli(&["rescan"]), "no changes\n");

    let plugins = server.site().plugins();
    install_fake(&plugins, "added", &json!({"metadata": metadata("added")}));
    install_fake(&plugins, "change", &json!({"metadata": metadata_but("change", "version", json!("2.0.0"))}));
    fs::remove_dir_all(plugins.join("gone")).unwrap();
    write_file(&plugins.join("refused"), b"", 0o755);
    let changes: Value = serde_json::from_str(&server.cli(&["rescan", "--json"])).unwrap();
    assert_eq!(changes, json!({"added": ["added"], "changed": ["change"], "removed": ["gone"], "refused": ["refused"]}));

    server.wait_state("added", "ready");
    assert_eq!(server.get("/added/x").text(), "GET /x of added");
    let changed = server.wait_state("change", "ready");
    assert_eq!(changed["version"], "2.0.0");
    assert!(changed["process"]["pid"] != pids[1] && !is_alive(pids[1]));
    assert_eq!(server.get("/change/x").status, 200);
    assert_eq!(server.get("/gone/x").status, 404);
    assert_eq!(server.api("GET", "/plugins/gone", b"").0, 404);
    assert!(!is_alive(pids[2]));
    let kept = server.plugin("keep");
    assert_eq!((&kept["state"], &kept["process"]["pid"]), (&json!("ready"), &json!(pids[0])));
    assert!(is_alive(pids[0]) && server.get("/keep/x").status == 200);
    // A second look finds nothing new.
    assert_eq!(server.cli(&["rescan"]), "refused: refused (plugrack list says why)\n");
}

#[test]
fn a_rescan_that_the_plugins_live_through_fails_no_request() {
    let server = Site::new().fake("p").start();
    server.wait_state("p", "ready");
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let mut client = server.client();
            let mut asked = 0;
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                assert_eq!(client.get("/p/x").status, 200);
                asked += 1;
            }
            asked
        });
        for name in ["q", "r", "s"] {
            install_fake(&server.site().plugins(), name, &json!({"metadata": metadata(name)}));
            let (status, changes) = server.api("POST", "/rescan", b"");
            assert_eq!((status, &changes["added"]), (200, &json!([name])));
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(asking.join().unwrap() > 10);
    });
}

#[test]
fn sighup_rescans() {
    let server = Site::new().fake("gone").start();
    server.wait_state("gone", "ready");
    let plugins = server.site().plugins();
    install_fake(&plugins, "added", &json!({"metadata": metadata("added")}));
    fs::remove_dir_all(plugins.join("gone")).unwrap();
    server.signal("HUP");
    wait_for("the new plugin", || (server.get("/added/x").status == 200).then_some(()));
    wait_for("the other to be gone", || (server.get("/gone/x").status == 404).then_some(()));
    let said = || server.log().contains("plugins directory: 1 added, 0 changed, 1 removed").then_some(());
    wait_for("the host to say what it found", said);
}

/// What comes with the last of them is seen, too.
#[test]
fn a_storm_of_sighup_is_a_look_a_second() {
    let server = Site::new().start();
    let scans = |server: &Server| server.log().matches("scanned the plugins directory").count() as u64;
    let before = scans(&server);
    let begin = Instant::now();
    // A shell sends many more than one command each could.
    let storm = format!("for i in $(seq 2000); do kill -HUP {}; done", server.pid());
    assert!(command("sh").args(["-c", &storm]).status().unwrap().success());
    install_fake(&server.site().plugins(), "added", &json!({"metadata": metadata("added")}));
    server.signal("HUP");
    wait_for("the new plugin", || (server.get("/added/x").status == 200).then_some(()));
    let (seconds, scans) = (begin.elapsed().as_secs(), scans(&server) - before);
    assert!((1..=seconds + 2).contains(&scans), "{scans} scans in {seconds} s");
}

#[test]
fn what_was_corrected_is_accepted_and_a_plugin_whose_file_was_broken_goes_on() {
    let same_id = json!({"metadata": metadata_but("first", "route", json!("/second"))});
    let same_route = json!({"metadata": metadata_but("third", "route", json!("/first"))});
    let site =
        Site::new().fake("first").fake_with("second", &same_id).fake_with("third", &same_route).fake("mode").fake("breaks");
    let plugins = site.plugins();
    let chmod =
        |file: &str, mode| fs::set_permissions(plugins.join(file).join("plugin"), fs::Permissions::from_mode(mode)).unwrap();
    chmod("mode", 0o644);
    let server = site.start();
    let pid = server.wait_state("breaks", "ready")["process"]["pid"].as_i64().unwrap();
    for file in ["second", "third", "mode"] {
        assert_eq!(listed(&server, file)["state"], "refused");
    }

    chmod("mode", 0o755);
    chmod("breaks", 0o644);
    install_fake(&plugins, "second", &json!({"metadata": metadata("second")}));
    let changes = server.api("POST", "/rescan", b"").1;
    assert_eq!(
        changes,
        json!({
            "added": ["mode", "second"], "changed": [], "removed": [], "refused": ["third"],
            "updates_refused": [{"id": "breaks", "file": "breaks", "reason": changes["updates_refused"][0]["reason"]}],
        })
    );
    for id in ["mode", "second"] {
        server.wait_state(id, "ready");
        assert_eq!(server.get(&format!("/{id}/x")).text(), format!("GET /x of {id}"));
    }
    assert!(is_alive(pid));
    assert_eq!(server.get("/breaks/x").text(), "GET /x of breaks");
    // When its process ends there is nothing left to run, and the route still leads there.
    assert!(command("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
    server.wait_state("breaks", "refused");
    assert_eq!(server.get("/breaks/x").status, 503);

    // When the first is gone its route is free for the third, which was not touched.
    fs::remove_dir_all(plugins.join("first")).unwrap();
    let changes = server.api("POST", "/rescan", b"").1;
    assert_eq!(changes, json!({"added": ["third"], "changed": [], "removed": ["first"], "refused": ["breaks"]}));
    fs::remove_dir_all(plugins.join("breaks")).unwrap();
    server.cli(&["rescan"]);
    assert_eq!(server.get("/breaks/x").status, 404, "until its file is gone");
    server.wait_state("third", "ready");
    assert_eq!(server.get("/first/x").text(), "GET /x of third");
}

#[test]
fn names_that_are_not_utf_8_are_refused_one_by_one() {
    let site = Site::new();
    let name = |bytes: &[u8]| OsStr::from_bytes(bytes).to_owned();
    let program = |id: &str| script(&metadata(id), "exit 1");
    for (file, id) in [(name(b"p\xff"), "first"), (name(b"p\xfe"), "second")] {
        write_file(&site.plugins().join(file), program(id).as_bytes(), 0o755);
    }
    // It has the name by which one of the others would be shown.
    write_file(&site.plugins().join("p\\xff"), b"", 0o644);
    install_fake(&site.plugins(), "third", &json!({"metadata": metadata("third")}));
    fs::rename(site.plugins().join("third"), site.plugins().join(name(b"\xff"))).unwrap();
    let reason = "its name in the plugins directory is not UTF-8: rename it (mv), then run plugrack rescan";
    let plugins = site.plugins();
    let server = site.fake("good").start();
    server.wait_state("good", "ready");
    for file in ["p\\xfe", "p\\xff?", "\\xff"] {
        let entry = listed(&server, file);
        assert_eq!((&entry["state"], &entry["reason"]), (&json!("refused"), &json!(reason)));
        assert!(server.log().contains(&format!("{file}: refused: {reason}")), "{}", server.log());
        assert!(server.cli(&["show", file]).contains(reason));
    }
    let other = listed(&server, "p\\xff");
    assert!(other["reason"].as_str().unwrap().contains("not executable"), "{other}");
    let count = || server.api("GET", "/plugins", b"").1["plugins"].as_array().unwrap().len();
    assert_eq!(count(), 5);
    let (status, answer) = server.api("POST", "/plugins/p%5Cxfe/start", b"");
    assert!((status, &answer["error"]["code"]) == (409, &json!("refused")) && answer.to_string().contains(reason), "{answer}");
    // A second look changes nothing, and a rename is all that is missing.
    let changes = server.api("POST", "/rescan", b"").1;
    assert_eq!((&changes["added"], &changes["removed"]), (&json!([]), &json!([])));
    assert_eq!(count(), 5);
    fs::rename(plugins.join(name(b"\xff")), plugins.join("third")).unwrap();
    server.api("POST", "/rescan", b"");
    server.wait_state("third", "ready");
}

#[test]
fn a_name_means_the_plugin_that_has_it_before_a_refused_file() {
    let server = Site::new().fake_with("z-original", &json!({"metadata": metadata("p")})).start();
    server.wait_state("p", "ready");
    // One that came later, with a file of an earlier name; and a file that has the id for its name.
    install_fake(&server.site().plugins(), "a-copy", &json!({"metadata": metadata("p")}));
    write_file(&server.site().plugins().join("p"), b"", 0o755);
    assert_eq!(server.api("POST", "/rescan", b"").1["refused"], json!(["a-copy", "p"]));
    assert_eq!(server.get("/p/x").status, 200);
    let plugin = server.plugin("p");
    assert_eq!((&plugin["state"], &plugin["file"]), (&json!("ready"), &json!("z-original")), "{plugin:#}");
    assert_eq!(server.api("POST", "/plugins/p/restart", b"").1["state"], "ready");
    let copy = server.plugin("a-copy");
    assert_eq!((&copy["state"], &copy["reason"]), (&json!("refused"), &json!("the id p is taken by z-original")));
    // Each has its own history.
    let event = &copy["events"][0];
    assert_eq!((&event["kind"], &event["detail"]), (&json!("refused"), &copy["reason"]), "{copy:#}");
    let events = server.plugin("p")["events"].take();
    assert!(events.as_array().unwrap().iter().all(|event| event["kind"] != "refused"), "{events:#}");
}

#[test]
fn two_plugins_can_swap_their_routes() {
    let at = |id: &str, route: &str| json!({"metadata": metadata_but(id, "route", json!(route))});
    let server = Site::new().fake_with("a", &at("a", "/x")).fake_with("b", &at("b", "/y")).start();
    for id in ["a", "b"] {
        server.wait_state(id, "ready");
    }
    let plugins = server.site().plugins();
    install_fake(&plugins, "a", &at("a", "/y"));
    install_fake(&plugins, "b", &at("b", "/x"));
    assert_eq!(server.api("POST", "/rescan", b"").1["changed"], json!(["a", "b"]));
    for id in ["a", "b"] {
        server.wait_state(id, "ready");
    }
    assert_eq!((server.get("/x/p").text(), server.get("/y/p").text()), ("GET /p of b", "GET /p of a"));
}

/// If the host's log is a pipe that nobody reads, the list of plugins and the start page must still be answered.
#[test]
fn a_log_that_takes_nothing_does_not_keep_the_list_of_plugins() {
    let site = Site::new().fake("p");
    let path = site.data().join("fifo");
    assert!(command("mkfifo").arg(&path).status().unwrap().success());
    let nonblocking = i32::try_from(OFlags::NONBLOCK.bits()).unwrap();
    let mut fifo = fs::File::options().read(true).write(true).custom_flags(nonblocking).open(&path).unwrap();
    let serve = site.serve();
    let mut logged = command("sh");
    logged.args(["-c", "log=$1; shift; exec \"$@\" 2>\"$log\"", "sh"]).arg(&path).arg(serve.get_program()).args(serve.get_args());
    let server = site.listen_as(logged);
    server.wait_state("p", "ready");
    while fifo.write(b".").is_ok() {}
    write_file(&server.site().plugins().join("p/plugin"), b"#!/bin/sh\nexit 1\n", 0o755);
    server.signal("HUP");
    wait_for("the update to be refused", || server.plugin("p")["update_refused"].as_str().map(drop));
    assert_eq!(server.get("/").status, 200);
    assert_eq!(server.get("/p/x").status, 200);
    let mut log = Vec::new();
    wait_for("the log to go on", || {
        let mut buffer = [0; 4096];
        while let Ok(size @ 1..) = fifo.read(&mut buffer) {
            log.extend_from_slice(&buffer[..size]);
        }
        String::from_utf8_lossy(&log).contains("update refused, the old process keeps running").then_some(())
    });
}

#[test]
fn a_plugins_directory_that_cannot_be_read_changes_nothing() {
    let server = Site::new().fake("p").start();
    server.wait_state("p", "ready");
    let plugins = server.site().plugins();
    let away = server.site().data().join("away");
    fs::rename(&plugins, &away).unwrap();
    let complaint = server.cli_fails(&["rescan"]);
    assert!(complaint.contains("the plugins directory cannot be read"), "{complaint}");
    assert_eq!(server.get("/p/x").status, 200);
    fs::rename(&away, &plugins).unwrap();
    assert_eq!(server.cli(&["rescan"]), "no changes\n");
}

/// Nobody has to tell the host that a file was mended.
#[test]
fn a_refused_file_that_is_mended_is_taken_in_by_itself() {
    let site = Site::new().fake_mode("loads", "exit-78").file("broken", b"", 0o755).fake("noexec");
    let plugins = site.plugins();
    let chmod = |mode| fs::set_permissions(plugins.join("noexec/plugin"), fs::Permissions::from_mode(mode)).unwrap();
    chmod(0o644);
    let server = site.start();
    server.wait_state("loads", "refused");
    install_fake(&plugins, "loads", &json!({"metadata": metadata("loads")}));
    fs::remove_file(plugins.join("broken")).unwrap();
    install_fake(&plugins, "broken", &json!({"metadata": metadata("broken")}));
    chmod(0o755);
    for id in ["loads", "broken", "noexec"] {
        server.wait_state(id, "ready");
        assert_eq!(server.get(&format!("/{id}/x")).text(), format!("GET /x of {id}"));
    }
}
