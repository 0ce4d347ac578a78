//! What a plugin can reach, as the host's user and as a user of its own.

use crate::support::{
    Server, Site, binary, command, copy_program, is_alive, metadata, python, range, root, script, uids, wait_for, write_file,
};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;

/// Whether the tests run as root, without which nobody has a uid to give. Says what is not tested otherwise.
fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: only root can give plugins uids of their own");
    }
    root
}

/// Installs `tests/fixtures/nosy_plugin.py`.
fn install_nosy(plugins: &Path, id: &str) {
    let dir = plugins.join(id);
    fs::create_dir_all(&dir).unwrap();
    fs::copy(root().join("sdk/python/plugrack.py"), dir.join("plugrack.py")).unwrap();
    let text = fs::read_to_string(root().join("tests/fixtures/nosy_plugin.py")).unwrap();
    let text = format!("#!{}\n{text}", python());
    write_file(&dir.join("plugin"), text.as_bytes(), 0o755);
}

fn nosy(ids: &[&str]) -> Site {
    let site = Site::new();
    ids.iter().for_each(|id| install_nosy(&site.plugins(), id));
    site
}

#[track_caller]
fn pid(server: &Server, id: &str) -> i64 {
    server.wait_state(id, "ready")["process"]["pid"].as_i64().unwrap()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

/// Owner and group.
fn owner(path: &Path) -> (u32, u32) {
    let metadata = fs::symlink_metadata(path).unwrap();
    (metadata.uid(), metadata.gid())
}

/// What the plugin `nosy` could do beside the plugin `victim`.
fn report(site: Site) -> BTreeMap<String, bool> {
    // Shows that a setuid program would work, if the plugin could gain by it.
    let setuid = site.data().join("setuid-id");
    copy_program("/usr/bin/id", &setuid);
    if rustix::process::geteuid().is_root() {
        chown(&setuid, Some(65533), Some(65533)).unwrap();
        fs::set_permissions(&setuid, fs::Permissions::from_mode(0o4755)).unwrap();
        let euid = command(&setuid).arg("-u").output().unwrap().stdout;
        assert_eq!(euid, b"65533\n", "the file system of the tests allows no setuid programs");
    }
    let server = site.start();
    let (victim, data) = (pid(&server, "victim"), server.site().data());
    pid(&server, "nosy");
    server.cli(&["kv", "set", "victim", "secret", "its own"]);
    server.cli(&["config", "set", "victim", "license", "licensed"]);
    write_file(&data.join("plugin-data/victim/diary"), b"dear diary", 0o600);
    let diary = data.join("plugin-data/victim/diary");
    chown(&diary, Some(owner(diary.parent().unwrap()).0), None).unwrap();
    let around = json!({"host": server.pid(), "victim": victim, "address": server.address().to_string(), "setuid": setuid});
    let reply = server.request("POST", "/nosy/probe", &[], around.to_string().as_bytes());
    assert_eq!(reply.status, 200, "{}", fs::read_to_string(data.join("logs/nosy.log")).unwrap());
    assert_eq!(pid(&server, "victim"), victim);
    serde_json::from_value(reply.json()).unwrap()
}

/// The table of `docs/operations.md`: what a plugin can do as the host's user, and as a user of its own.
fn documented(own: bool) -> BTreeMap<String, bool> {
    let page = fs::read_to_string(root().join("docs/operations.md")).unwrap();
    let (_, section) = page.split_once("## What a plugin can do").unwrap();
    let rows = section.lines().filter_map(|line| {
        let cells: Vec<_> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [what, shared, separate] = cells[..] else { return None };
        let cell = if own { separate } else { shared };
        Some((what.to_owned(), ["no", "yes"].iter().position(|word| *word == cell)? == 1))
    });
    rows.collect()
}

#[test]
fn as_the_hosts_user_a_plugin_can_do_what_the_operations_page_says() {
    let (mut found, mut said) = (report(nosy(&["nosy", "victim"])), documented(false));
    // Whether a user may look into a process of its own is the system's to decide (Yama), but for root.
    if !rustix::process::geteuid().is_root() {
        let memory = "read the memory of another plugin or of the host";
        assert!(found.remove(memory).is_some() && said.remove(memory).is_some());
    }
    assert_eq!(found, said);
}

#[test]
fn as_a_user_of_its_own_a_plugin_can_do_what_the_operations_page_says_and_no_more() {
    if is_root() {
        assert_eq!(report(nosy(&["nosy", "victim"]).args(&["--plugin-uids", &range(&uids())])), documented(true));
    }
}

#[test]
fn each_plugin_keeps_a_uid_of_its_own_and_no_privileges() {
    if !is_root() {
        return;
    }
    let uids = uids();
    let site = nosy(&["b", "c"]).args(&["--plugin-uids", &range(&uids)]);
    // Groups of root's that the plugins are not to have.
    let mut serve = command("setpriv");
    serve.args(["--groups", "4,24"]).arg(binary()).args(site.serve().get_args());
    let server = site.start_as(serve);
    let uid = |server: &Server, id: &str| {
        let pid = pid(server, id);
        let myself = server.get(&format!("/{id}/self")).json();
        let status = &myself["status"];
        let uid = fs::metadata(format!("/proc/{pid}")).unwrap().uid();
        let four = format!("{uid}\t{uid}\t{uid}\t{uid}");
        assert_eq!((&status["Uid"], &status["Gid"]), (&json!(four), &json!(four)));
        assert_eq!(status["Groups"].as_str().map(str::trim), Some(""));
        for capabilities in ["CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(status[capabilities], "0".repeat(16), "{capabilities}");
        }
        assert_eq!(status["NoNewPrivs"], "1");
        assert_eq!(myself["limits"]["CORE"], json!([0, 0]));
        assert_eq!(myself["limits"]["NPROC"], json!([512, 512]));
        let fds = myself["fds"].as_array().unwrap().iter().map(|fd| fd.as_str().unwrap());
        // The SDK has opened the epoll instance itself.
        let known = |fd: &str| {
            ["/dev/null", "anon_inode:[eventpoll]"].contains(&fd) || fd.starts_with("pipe:") || fd.starts_with("socket:")
        };
        assert!(fds.clone().all(known), "{myself:#}");
        uid
    };
    let before = [uid(&server, "b"), uid(&server, "c")];
    assert!(before[0] != before[1] && before.iter().all(|uid| uids.contains(uid) && uid != uids.start()), "{before:?}");
    // Code that nobody knows yet does not run as root either, nor as a plugin's user or another file's.
    let asked = ["b", "c"].map(|id| server.plugin(id)["metadata"]["description"].as_str().unwrap().to_owned());
    let mut all = asked.map(|asked| asked.strip_prefix("asked as uid ").unwrap().parse::<u32>().unwrap()).to_vec();
    all.extend(before);
    assert!(all.iter().all(|uid| uids.contains(uid)), "{all:?}");
    assert_eq!(all.iter().collect::<std::collections::BTreeSet<_>>().len(), 4, "{all:?}");
    // A crash, a new neighbour and another life of the host change nothing.
    install_nosy(&server.site().plugins(), "a");
    server.cli(&["rescan"]);
    assert_eq!(uid(&server, "a"), uids.start() + 3);
    let (pid_b, site) = (pid(&server, "b"), server.kill());
    wait_for("a plugin to end with its host", || (!is_alive(pid_b)).then_some(()));
    let server = site.start();
    assert_eq!([uid(&server, "b"), uid(&server, "c")], before);
}

#[test]
fn with_uids_there_is_a_way_to_what_is_a_plugins_own_and_without_there_is_none() {
    if !is_root() {
        return;
    }
    let shared =
        [("", 0o711), ("run", 0o711), ("logs", 0o711), ("plugin-data", 0o711), ("run/host.sock", 0o666), ("logs/p.log", 0o640)];
    let private =
        [("", 0o700), ("run", 0o700), ("logs", 0o700), ("plugin-data", 0o700), ("run/host.sock", 0o600), ("logs/p.log", 0o600)];
    let always = [
        ("run/p.d", 0o700),
        ("plugin-data/p", 0o700),
        ("plugrack.db", 0o600),
        ("admin-token", 0o600),
        ("lock", 0o600),
        ("run/listen", 0o600),
    ];
    let (uids, mut site) = (uids(), nosy(&["p"]));
    fs::set_permissions(site.data(), fs::Permissions::from_mode(0o700)).unwrap();
    for own in [false, true, false, true] {
        let mut serve = site.serve();
        let user = if own { uids.start() + 1 } else { 0 };
        if own {
            serve.args(["--plugin-uids", &range(&uids)]);
        }
        let server = site.start_as(serve);
        let pid = pid(&server, "p");
        assert_eq!(owner(format!("/proc/{pid}").as_ref()).0, user);
        let data = server.site().data();
        for (path, expected) in always.iter().chain(if own { &shared } else { &private }) {
            assert_eq!(mode(&data.join(path)), *expected, "{path:?}, uids: {own}");
        }
        for path in ["run/p.d", "plugin-data/p"] {
            assert_eq!(owner(&data.join(path)), (user, user), "{path}");
        }
        // What it makes in one life it finds in the next.
        let kept = data.join("plugin-data/p/kept");
        if kept.exists() {
            assert_eq!(owner(&kept), (user, user));
        } else {
            fs::write(&kept, "").unwrap();
        }
        site = server.stop().1;
    }
    // An operator who lets a group in is left in peace.
    fs::set_permissions(site.data(), fs::Permissions::from_mode(0o750)).unwrap();
    let server = site.start();
    assert_eq!(mode(server.site().data()), 0o750);
}

#[test]
fn a_changed_range_hands_a_plugins_files_over_and_nothing_else() {
    if !is_root() {
        return;
    }
    let site = nosy(&["p"]);
    let outside = site.data().join("outside");
    fs::write(&outside, "").unwrap();
    let start = |site: Site, uids: &str| {
        let mut serve = site.serve();
        serve.args(["--plugin-uids", uids]);
        site.start_as(serve)
    };
    let (first, second) = (uids(), uids());
    let [before, after] = [&first, &second].map(|uids| uids.start() + 1);
    let server = start(site, &range(&first));
    pid(&server, "p");
    let site = server.stop().1;
    let home = site.data().join("plugin-data/p");
    fs::create_dir_all(home.join("deep/er")).unwrap();
    fs::write(home.join("deep/er/file"), "").unwrap();
    symlink(&outside, home.join("deep/link")).unwrap();
    for path in ["deep", "deep/er", "deep/er/file", "deep/link"] {
        std::os::unix::fs::lchown(home.join(path), Some(before), Some(before)).unwrap();
    }
    fs::write(home.join("the-operators"), "").unwrap();
    fs::hard_link(&outside, home.join("the-hosts")).unwrap();

    let server = start(site, &range(&second));
    pid(&server, "p");
    for path in ["", "deep", "deep/er", "deep/er/file", "deep/link"] {
        assert_eq!(owner(&home.join(path)), (after, after), "{path}");
    }
    for path in [&home.join("the-operators"), &home.join("the-hosts"), &outside] {
        assert_eq!(owner(path), (0, 0), "{}", path.display());
    }
    let site = server.stop().1;

    // A file of its own that has another name elsewhere is not given away, nor a tree without an end.
    let linked = home.join("linked");
    fs::write(&linked, "").unwrap();
    chown(&linked, Some(after), None).unwrap();
    fs::hard_link(&linked, site.data().join("elsewhere")).unwrap();
    let server = start(site, &range(&first));
    let reason = server.wait_state("p", "refused")["reason"].as_str().unwrap().to_owned();
    assert!(
        reason.contains("linked has another hard link") && reason.contains(&before.to_string()) && reason.contains("copy"),
        "{reason}"
    );
    assert_eq!((owner(&linked).0, owner(&home), mode(&home)), (after, (0, after), 0));
    fs::remove_file(server.site().data().join("elsewhere")).unwrap();
    let endless = home.join("d/".repeat(150));
    fs::create_dir_all(&endless).unwrap();
    assert!(command("chown").args(["-R", &after.to_string()]).arg(home.join("d")).status().unwrap().success());
    server.site().cli(&["start", "p"]);
    let reason = server.wait_state("p", "refused")["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("100 directories deep") && reason.contains("move it away"), "{reason}");
    fs::remove_dir_all(home.join("d")).unwrap();
    server.cli(&["start", "p"]);
    assert_eq!((owner(&linked).0, owner(&home).0), (before, before));
}

#[test]
fn a_plugin_that_its_uid_cannot_run_is_refused_with_what_bars_the_way() {
    if !is_root() {
        return;
    }
    let uids = uids();
    let site = Site::new().args(&["--plugin-uids", &range(&uids)]);
    let deep = site.plugins().join("deep");
    fs::create_dir(&deep).unwrap();
    let closed = |name: &str| {
        let path = site.data().join(name);
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
        path
    };
    let [elsewhere, tools] = ["elsewhere", "tools"].map(closed);
    let plain = |id: &str| script(&metadata(id), "exit 1");
    write_file(&elsewhere.join("link"), plain("link").as_bytes(), 0o755);
    symlink(elsewhere.join("link"), site.plugins().join("link")).unwrap();
    copy_program("/bin/sh", tools.join("sh"));
    write_file(&deep.join("plugin"), plain("deep").as_bytes(), 0o755);
    fs::set_permissions(&deep, fs::Permissions::from_mode(0o750)).unwrap();
    let shell = plain("shell").replace("/bin/sh", tools.join("sh").to_str().unwrap());
    let site = site.file("file", plain("file").as_bytes(), 0o700).file("shell", shell.as_bytes(), 0o755);
    let server = site.start();
    let reason = |name: &str| {
        let entries = server.api("GET", "/plugins", b"").1;
        let entry = entries["plugins"].as_array().unwrap().iter().find(|entry| entry["file"] == name).unwrap().clone();
        assert_eq!(entry["state"], "backing_off", "{entry}");
        entry["reason"].as_str().unwrap().to_owned()
    };
    let data = fs::canonicalize(server.site().data()).unwrap();
    for (name, path, way) in [
        ("deep", "plugins/deep/plugin", "may not enter PATH/plugins/deep: chmod o+x PATH/plugins/deep"),
        ("link", "elsewhere/link", "may not enter PATH/elsewhere: chmod o+x PATH/elsewhere"),
        ("shell", "tools/sh", "may not enter PATH/tools: chmod o+x PATH/tools"),
        ("file", "plugins/file", "chmod o+rx PATH/plugins/file"),
    ] {
        let (reason, way) = (reason(name), way.replace("PATH", data.to_str().unwrap()));
        let named = uids.clone().any(|uid| reason.contains(&format!("uid {uid} cannot")));
        assert!(named && reason.ends_with(&way), "{name}: {reason}");
        assert!(reason.contains(data.join(path).to_str().unwrap()), "{name}: {reason}");
    }
}

#[test]
fn when_the_uids_are_used_up_a_plugin_is_refused_until_there_are_more() {
    if !is_root() {
        return;
    }
    let site = nosy(&["a", "b"]);
    let mut serve = site.serve();
    let first = *uids().start();
    let [short, longer] = [1, 2].map(|more| format!("{first}-{}", first + more));
    serve.args(["--plugin-uids", &short]);
    let server = site.start_as(serve);
    let states = wait_for("both plugins", || {
        let states = ["a", "b"].map(|id| server.plugin(id));
        states.iter().all(|plugin| plugin["state"] != "starting").then_some(states)
    });
    let refused = states.iter().filter(|plugin| plugin["state"] == "refused").collect::<Vec<_>>();
    assert_eq!(refused.len(), 1, "{states:#?}");
    let reason = refused[0]["reason"].as_str().unwrap();
    assert!(reason.contains(&format!("--plugin-uids {short}")) && reason.contains("longer"), "{reason}");
    let site = server.stop().1;
    let server = site.args(&["--plugin-uids", &longer]).start();
    assert_ne!(pid(&server, "a"), pid(&server, "b"));
}

#[test]
fn a_host_that_is_not_root_has_no_uids_to_give() {
    let site = Site::new();
    let copy = site.data().join("copy");
    let mut serve = if is_root() {
        // Where the repository is, other users may not come.
        copy_program(binary(), &copy);
        let mut serve = command(&copy);
        serve.uid(65533);
        serve
    } else {
        command(binary())
    };
    let output = serve.args(["serve", "--plugin-uids", "200000-200009", "--data", "/nowhere"]).output().unwrap();
    let complaint = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), complaint.lines().count()), (Some(1), 1), "{complaint}");
    assert!(
        complaint.contains("--plugin-uids") && complaint.contains("root") && complaint.contains("leave the setting out"),
        "{complaint}"
    );
}

#[test]
fn uids_that_others_have_are_not_given_to_plugins() {
    if !is_root() {
        return;
    }
    let complaint = |site: &Site, uids: &str| {
        let output = site.serve().args(["--plugin-uids", uids]).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    let passwd = fs::read_to_string("/etc/passwd").unwrap();
    if let Some(nobody) = passwd.lines().find(|line| line.starts_with("nobody:")) {
        let uid: u32 = nobody.split(':').nth(2).unwrap().parse().unwrap();
        let said = complaint(&Site::new(), &format!("{}-{}", uid - 1, uid));
        assert!(said.contains(&format!("the uid {uid} of the account nobody: choose a range without accounts")), "{said}");
    }
    let uids = uids();
    let server = nosy(&["p"]).args(&["--plugin-uids", &range(&uids)]).start();
    let first = pid(&server, "p");
    let said = complaint(&Site::new(), &range(&uids));
    let used = format!("in use by the plugin of another plugrack (process {}): choose another range", server.pid());
    assert!(said.contains(&used), "{said}");
    assert_eq!(pid(&server, "p"), first);
}

/// Without uids of the plugins' own, all calls come from the host's user.
#[test]
fn a_caller_of_another_uid_is_not_the_plugin_whose_session_it_is_in() {
    if !is_root() {
        return;
    }
    let server = Site::new().fake("p").start();
    pid(&server, "p");
    let (data, call) = (server.site().data(), br#"{"type":"kv","id":5,"op":"incr","key":"n"}"#);
    for (path, mode) in [("", 0o755), ("run", 0o711), ("run/host.sock", 0o666)] {
        fs::set_permissions(data.join(path), fs::Permissions::from_mode(mode)).unwrap();
    }
    let called = |how: &str| server.request("POST", &format!("/p/descendant?{how}"), &[], call).text().to_owned();
    let answer: Value = serde_json::from_str(&called("uid=0")).unwrap();
    assert_eq!(answer["value"], 1);
    assert_eq!(called("uid=65533").trim(), "closed");
    wait_for("the host to say so", || {
        server.log().contains("in the session of the plugin p has uid 65533 instead of 0").then_some(())
    });
}

/// What is at the path of its socket is the plugin's to say, the host's credentials are not.
#[test]
fn a_plugin_cannot_make_the_host_talk_to_another_through_a_link() {
    if !is_root() {
        return;
    }
    let site = nosy(&["victim"]).args(&["--plugin-uids", &range(&uids()), "--start-timeout", "2s"]);
    let link = "ln -s ../victim.d/sock \"$PLUGRACK_SOCKET\"; exec sleep 60";
    let server = site.file("liar", script(&metadata("liar"), link).as_bytes(), 0o755).start();
    pid(&server, "victim");
    let reason = server.wait_state("liar", "backing_off")["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("does not listen"), "{reason}");
    assert_eq!(server.get("/victim/hello").text(), "hello of victim\n");
}

#[test]
fn what_a_plugin_leaves_beside_its_socket_is_removed_and_no_link_followed() {
    let litter =
        "cd \"${PLUGRACK_SOCKET%/*}\"; mkdir -p a/b/c; touch a/b/file; ln -s \"$HOME\" a/link; ln -s \"$HOME\" link; exit 1";
    let server = Site::new().file("p", script(&metadata("p"), litter).as_bytes(), 0o755).start();
    let run = server.site().data().join("run");
    wait_for("an end", || (server.plugin("p")["state"] != "starting").then_some(()));
    fs::write(server.site().data().join("plugin-data/p/kept"), "").unwrap();
    wait_for("all to be removed", || (!run.join("p.d").exists()).then_some(()));
    let site = server.kill();
    // As a host that was killed leaves it.
    fs::create_dir_all(run.join("p.d").join("x/".repeat(300))).unwrap();
    symlink(site.data().join("plugin-data"), run.join("p.d/x/link")).unwrap();
    symlink(site.data().join("plugin-data"), run.join("link")).unwrap();
    let site = site.start().stop().1;
    assert_eq!(fs::read_dir(&run).unwrap().count(), 0);
    assert!(site.data().join("plugin-data/p/kept").exists());
}

#[test]
fn a_plugin_that_takes_more_memory_than_it_may_ends_alone() {
    let server = nosy(&["eater", "other"]).args(&["--plugin-memory", "300MiB"]).start();
    let (eater, other) = (pid(&server, "eater"), pid(&server, "other"));
    assert_eq!(server.get("/eater/self").json()["limits"]["DATA"], json!([300 << 20, 300 << 20]));
    assert_eq!(server.request("POST", "/eater/eat", &[], b"").status, 502);
    let plugin: Value = server.wait_restarted("eater", eater);
    assert!(plugin["events"].to_string().contains("MemoryError after "), "{plugin:#}");
    assert_eq!((pid(&server, "other"), server.get("/other/hello").status), (other, 200));
}
