//! A file that is replaced while its plugin runs, files that are asked again, and whose an id is.

use crate::support::{Server, Site, command, install_fake, is_alive, metadata, pause, script, wait_for, write_file};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

fn version(id: &str, version: &str) -> Value {
    let mut metadata = metadata(id);
    metadata["version"] = json!(version);
    metadata
}

fn pid(server: &Server, id: &str) -> i64 {
    server.wait_state(id, "ready")["process"]["pid"].as_i64().unwrap()
}

/// A shell script that answers `--metadata` only while a file is there.
fn wants(file: &Path, metadata: &Value, run: &str) -> String {
    format!(
        "#!/bin/sh\nif [ \"$1\" = --metadata ]; then [ -e {0} ] || {{ echo \"no {0} yet\" >&2; exit 1; }}; printf '%s' '{metadata}'; exit; fi\n{run}\n",
        file.display()
    )
}

#[test]
fn an_update_is_started_beside_the_plugin_and_fails_no_request() {
    let server = Site::new().fake("p").start();
    let mut before = pid(&server, "p");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let asking: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let mut asked = 0;
                    while !done.load(Ordering::Relaxed) {
                        let reply = server.client().request("POST", "/p/echo", &[], b"x");
                        assert_eq!((reply.status, reply.text()), (200, "x"));
                        asked += 1;
                    }
                    asked
                })
            })
            .collect();
        for number in 2..6 {
            let fresh = format!("{number}.0.0");
            install_fake(&server.site().plugins(), "p", &json!({"metadata": version("p", &fresh)}));
            assert_eq!(server.api("POST", "/rescan", b"").1["changed"], json!(["p"]));
            let plugin = server.plugin("p");
            assert_eq!((&plugin["state"], &plugin["version"]), (&json!("ready"), &json!(fresh)));
            let now = plugin["process"]["pid"].as_i64().unwrap();
            assert!(now != before && !is_alive(before) && is_alive(now));
            before = now;
        }
        done.store(true, Ordering::Relaxed);
        assert!(asking.into_iter().map(|asking| asking.join().unwrap()).sum::<u32>() > 10);
    });
    let kinds: Vec<_> = server.plugin("p")["events"].as_array().unwrap().iter().map(|event| event["kind"].clone()).collect();
    assert_eq!(kinds[..2], [json!("updated"), json!("ready")], "{kinds:?}");
    assert_eq!(server.plugin("p")["events"][0]["detail"], "from version 4.0.0 to 5.0.0");
    // It is a plugin as any: it ends and comes back, and its run directory is in order.
    assert!(command("kill").args(["-9", &before.to_string()]).status().unwrap().success());
    server.wait_restarted("p", before);
    assert_eq!(server.get("/p/x").status, 200);
}

#[test]
fn a_request_under_way_is_answered_by_the_process_before_and_those_that_wait_by_the_update() {
    let server = Site::new().fake_of_one_connection("p").start();
    let before = pid(&server, "p");
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| server.get("/p/wait?file=go").text().to_owned());
        let data = server.site().data().join("plugin-data/p");
        wait_for("the slow request", || data.join("waiting").exists().then_some(()));
        let waiting = scope.spawn(|| server.client().request("POST", "/p/echo", &[], b"waited for the update").text().to_owned());
        wait_for("the other request", || (server.plugin("p")["process"]["waiting"] == 1).then_some(()));
        let mut fresh = version("p", "2.0.0");
        fresh["concurrency"] = json!(1);
        install_fake(&server.site().plugins(), "p", &json!({"metadata": fresh}));
        let rescan = scope.spawn(|| server.api("POST", "/rescan", b"").1["changed"].clone());
        assert_eq!(waiting.join().unwrap(), "waited for the update");
        // Longer than a process has that is told to stop otherwise.
        pause(Duration::from_secs(7));
        assert!(is_alive(before), "it has a request to answer");
        fs::write(data.join("go"), "").unwrap();
        assert_eq!((slow.join().unwrap(), rescan.join().unwrap()), ("waited".into(), json!(["p"])));
    });
    wait_for("the process before to end", || (!is_alive(before)).then_some(()));
}

#[test]
fn an_update_that_is_refused_or_does_not_start_leaves_the_plugin_as_it_is() {
    let server = Site::new().fake("p").args(&["--start-timeout", "5s"]).start();
    let before = pid(&server, "p");
    let plugins = server.site().plugins();
    let broken = |settings: Value| install_fake(&plugins, "p", &settings);
    let cases: [(Value, &str); 5] = [
        (json!({"metadata": version("p", "2"), "metadata_exit": 3}), "--metadata ended with exit code 3: metadata went wrong"),
        (json!({"metadata": "no metadata"}), "the metadata is not a JSON object: it begins with \"no metadata\""),
        (json!({"metadata": version("p", "2"), "mode": "exit-1"}), "did not become ready: exit code 1: cannot go on"),
        (json!({"metadata": version("p", "2"), "mode": "exit-78"}), "did not become ready: exit code 78"),
        (json!({"metadata": version("p", "2"), "mode": "no-listen"}), "it was not ready within 5 s"),
    ];
    for (settings, reason) in cases {
        broken(settings);
        let complaint = server.cli_fails(&["rescan"]);
        assert!(complaint.contains("p: update refused") && complaint.contains(reason), "{complaint}");
        let plugin = server.plugin("p");
        assert_eq!((&plugin["state"], &plugin["version"]), (&json!("ready"), &json!("1.0.0")), "{plugin:#}");
        assert!(plugin["update_refused"].as_str().unwrap().contains(reason), "{plugin:#}");
        assert_eq!(plugin["process"]["pid"], before);
        assert_eq!(plugin["events"][0]["kind"], "update_refused");
        let list = server.cli(&["list"]);
        assert!(list.lines().any(|line| line.starts_with("p  ") && line.contains("  update refused: ")), "{list}");
        assert_eq!(server.get("/p/x").text(), "GET /x of p");
    }
    // One that works is taken.
    broken(json!({"metadata": version("p", "3.0.0")}));
    assert_eq!(server.cli(&["rescan"]), "changed: p\n");
    let plugin = server.plugin("p");
    assert_eq!((&plugin["version"], &plugin["update_refused"]), (&json!("3.0.0"), &Value::Null));
}

#[test]
fn the_operator_can_start_an_update_that_cannot_run_beside_the_process_before() {
    // As one that has its directory for itself.
    let alone = "mkdir lock 2>/dev/null || { echo 'another one runs' >&2; exit 1; }; trap 'rmdir lock' EXIT";
    let fake = |site: &Site, number: &str| {
        let metadata = version("p", number);
        install_fake(site.data(), "real", &json!({"metadata": metadata}));
        let real = site.data().join("real/plugin");
        script(
            &metadata,
            &format!("{alone}\n{} & child=$!\ntrap 'kill $child; wait $child; rmdir lock; exit' TERM\nwait", real.display()),
        )
    };
    let site = Site::new();
    let file = site.plugins().join("p");
    write_file(&file, fake(&site, "1").as_bytes(), 0o755);
    let server = site.start();
    let before = pid(&server, "p");
    write_file(&file, fake(server.site(), "2").as_bytes(), 0o755);
    assert!(server.cli_fails(&["rescan"]).contains("another one runs"));
    assert_eq!((server.plugin("p")["version"].as_str(), is_alive(before)), (Some("1"), true));
    server.cli(&["restart", "p"]);
    let plugin = server.wait_state("p", "ready");
    assert_eq!((&plugin["version"], &plugin["update_refused"]), (&json!("2"), &Value::Null));
}

#[test]
fn what_is_executed_is_what_was_asked_also_when_a_plugin_starts_again_by_itself() {
    let server = Site::new().fake("p").start();
    let before = pid(&server, "p");
    // Nobody says that the file was replaced: the plugin's next start finds out.
    install_fake(&server.site().plugins(), "p", &json!({"metadata": version("p", "2.0.0")}));
    assert!(command("kill").args(["-9", &before.to_string()]).status().unwrap().success());
    assert_eq!(server.wait_restarted("p", before)["version"], "2.0.0");
    // So does a restart, and what is another plugin does not run under the id of this one.
    install_fake(&server.site().plugins(), "p", &json!({"metadata": metadata("q")}));
    server.api("POST", "/plugins/p/restart", b"");
    assert_eq!(server.wait_state("q", "ready")["file"], "p");
    assert_eq!(server.api("GET", "/plugins/p", b"").0, 404);
}

#[test]
fn a_file_that_fails_when_it_is_asked_is_asked_again_and_a_plugin_known_before_is_never_not_found() {
    let site = Site::new();
    let mounted = site.data().join("mounted");
    let run = |site: &Site| {
        install_fake(site.data(), "real", &json!({"metadata": metadata("p")}));
        format!("exec {}", site.data().join("real/plugin").display())
    };
    fs::write(&mounted, "").unwrap();
    let text = wants(&mounted, &metadata("p"), &run(&site));
    write_file(&site.plugins().join("p"), text.as_bytes(), 0o755);
    let server = site.start();
    server.wait_state("p", "ready");
    let site = server.stop().1;

    // What it has said is known, so it is not asked: the disk need not be there.
    fs::remove_file(&mounted).unwrap();
    let server = site.start();
    server.wait_state("p", "ready");
    let site = server.stop().1;

    // Another file is asked, fails, and is asked again by itself.
    write_file(&site.plugins().join("p"), text.as_bytes(), 0o755);
    let server = site.start();
    let waiting = server.wait_state("p", "backing_off");
    assert!(waiting["retry_at"].is_string(), "{waiting:#}");
    let reason = format!("--metadata ended with exit code 1: no {} yet", mounted.display());
    assert_eq!(waiting["reason"], reason);
    let refused = server.get("/p/x");
    assert!(refused.status == 503 && refused.header("retry-after").is_some(), "{refused:?}");
    let (shown, logged) = (server.cli(&["show", "p"]), server.cli(&["logs", "p"]));
    let line = format!("no {} yet", mounted.display());
    assert!(shown.contains("next try") && shown.contains(&line) && logged.contains(&line), "{shown}{logged}");
    fs::write(&mounted, "").unwrap();
    server.wait_state("p", "ready");
    assert_eq!(server.get("/p/x").text(), "GET /x of p");
}

#[test]
fn a_start_asks_only_what_is_new_or_changed() {
    let site = Site::new();
    let asked = site.data().join("asked");
    let text = |id: &str| {
        let metadata = metadata(id);
        format!(
            "#!/bin/sh\n[ \"$1\" != --metadata ] || {{ echo {id} >>{}; printf '%s' '{metadata}'; exit; }}\nexit 78\n",
            asked.display()
        )
    };
    let site = ["a", "b"].into_iter().fold(site, |site, id| site.file(id, text(id).as_bytes(), 0o755));
    let lines = || {
        let text = fs::read_to_string(&asked).unwrap();
        let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    let site = site.start().stop().1;
    assert_eq!(lines(), ["a", "b"]);
    let site = site.start().kill();
    assert_eq!(lines(), ["a", "b"]);
    write_file(&site.plugins().join("b"), text("b").as_bytes(), 0o755);
    let server = site.file("c", text("c").as_bytes(), 0o755).start();
    assert_eq!(lines(), ["a", "b", "b", "c"]);
    for id in ["a", "b", "c"] {
        server.wait_state(id, "refused");
    }
}

#[test]
fn an_id_with_data_belongs_to_the_file_that_first_had_it() {
    let thief = |id: &str| json!({"metadata": metadata(id)});
    let server = Site::new().fake("victim").fake_with("0evil", &thief("evil")).start();
    for id in ["victim", "evil"] {
        server.wait_state(id, "ready");
        server.api("PUT", &format!("/plugins/{id}/kv/secret"), id.as_bytes());
        server.api("PUT", &format!("/plugins/{id}/config/token"), b"\"t\"");
    }
    let site = server.stop().1;
    // It comes first by name, and says now that it is another.
    install_fake(&site.plugins(), "0evil", &thief("victim"));
    let server = site.start();
    server.wait_state("victim", "ready");
    assert_eq!(server.plugin("victim")["file"], "victim");
    let reason = |server: &Server, file: &str| {
        let list = server.api("GET", "/plugins", b"").1;
        let entry = list["plugins"].as_array().unwrap().iter().find(|entry| entry["file"] == file).unwrap().clone();
        (entry["state"].as_str().unwrap().to_owned(), entry["reason"].as_str().unwrap().to_owned())
    };
    let (state, why) = reason(&server, "0evil");
    assert_eq!(state, "refused");
    assert!(
        why.starts_with("the id victim belongs to the file victim; ") && why.ends_with("plugrack adopt victim 0evil"),
        "{why}"
    );

    // Also when the file that had it is gone.
    fs::remove_dir_all(server.site().plugins().join("victim")).unwrap();
    server.api("POST", "/rescan", b"");
    let (state, why) = reason(&server, "0evil");
    assert!(state == "refused" && why.contains("the file victim, which is gone"), "{why}");
    assert_eq!(server.get("/victim/x").status, 404);

    // The operator decides.
    let said = server.cli_fails(&["adopt", "victim", "nothing"]);
    assert!(said.contains("there is no nothing in the plugins directory"), "{said}");
    server.cli(&["adopt", "victim", "0evil"]);
    server.wait_state("victim", "ready");
    assert_eq!(server.cli(&["kv", "get", "victim", "secret"]), "victim");
    assert_eq!(server.plugin("victim")["file"], "0evil");
}

#[test]
fn what_plugins_that_are_gone_have_left_is_listed_and_deleted_when_the_operator_says_so() {
    let server = Site::new().fake("keeps").fake("leaves").fake("empty").start();
    for id in ["keeps", "leaves", "empty"] {
        server.wait_state(id, "ready");
    }
    let data = server.site().data().to_owned();
    server.api("PUT", "/plugins/leaves/kv/a", b"value");
    server.api("PUT", "/plugins/leaves/config/token", b"\"t\"");
    fs::write(data.join("plugin-data/leaves/file"), "x").unwrap();
    assert_eq!(server.cli(&["gone"]), "removed plugins have left no data\n");
    assert!(server.cli_fails(&["forget", "leaves", "--yes"]).contains("nothing is left of a plugin leaves"));
    for id in ["leaves", "empty"] {
        fs::remove_dir_all(server.site().plugins().join(id)).unwrap();
    }
    server.cli(&["rescan"]);
    assert_eq!(server.cli(&["gone"]), "leaves: 1 keys, 6 bytes, 1 settings, files  (was the file leaves)\n");
    let gone = server.api("GET", "/gone", b"").1;
    let kept: Vec<_> = gone["gone"].as_array().unwrap().iter().map(|left| (left["id"].clone(), left["kept"].clone())).collect();
    assert_eq!(kept, [(json!("empty"), json!(false)), (json!("leaves"), json!(true))]);
    let said = server.cli_fails(&["forget", "leaves"]);
    assert!(said.contains("was not typed"), "{said}");
    server.cli(&["forget", "leaves", "--yes"]);
    assert_eq!(server.cli(&["gone"]), "removed plugins have left no data\n");
    assert!(!data.join("plugin-data/leaves").exists() && !data.join("logs/leaves.log").exists());
    // One that comes with this id begins with nothing.
    install_fake(&server.site().plugins(), "leaves", &json!({"metadata": metadata("leaves")}));
    server.cli(&["rescan"]);
    server.wait_state("leaves", "ready");
    assert_eq!(server.api("GET", "/plugins/leaves/kv/a", b"").0, 404);
    assert_eq!(server.cli(&["config", "get", "leaves"]), "{}\n");
}

#[test]
fn traces_of_plugins_that_are_gone_are_bounded() {
    let site = Site::new();
    let once = |number: usize| script(&metadata(&format!("id-{number}")), "exit 78");
    write_file(&site.plugins().join("changing"), once(0).as_bytes(), 0o755);
    let server = site.start();
    for number in 1..130 {
        write_file(&server.site().plugins().join("changing"), once(number).as_bytes(), 0o755);
        server.api("POST", "/rescan", b"");
    }
    let left = || server.api("GET", "/gone", b"").1["gone"].as_array().unwrap().len();
    wait_for("the oldest to be deleted", || (left() <= 100).then_some(()));
    let logs = || fs::read_dir(server.site().data().join("logs")).unwrap().count();
    let homes = || fs::read_dir(server.site().data().join("plugin-data")).unwrap().count();
    wait_for("their logs and directories to be deleted", || (logs() <= 102 && homes() <= 102).then_some(()));
}
