//! Scripts of CGI: one process for each request.

use crate::docs::blocks_in;
use crate::support::{PATIENCE, Server, Site, command, is_alive, range, uids, wait_for, write_file};
use rustix::process::geteuid;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// A script whose path decides what it does.
const SCRIPT: &str = r#"#!/bin/sh
case "$PATH_INFO" in
/show) printf 'Content-Type: text/plain\n\n'; env | sort; echo "directory=$PWD"; id -u; cat ;;
/sum) sum=$(sha256sum); printf 'Content-Type: text/plain\r\n\r\n%s' "${sum%% *}" ;;
/echo) printf 'Content-Type: application/octet-stream\n\n'; exec cat ;;
/unread) printf 'Status: 413 Too much\n\nno' ;;
/status) printf 'Status: 418 Teapot\nX-A: b\n\nshort' ;;
/redirect) printf 'Location: /other\n\n' ;;
/fail) echo 'a complaint' >&2; exit 3 ;;
/late-fail) printf 'Content-Type: text/plain\n\nok'; exit 4 ;;
/garbage) echo 'no header' ;;
/nph) printf 'HTTP/1.1 200 OK\n\n' ;;
/killed) kill -9 $$ ;;
/stream)
    printf 'Content-Type: text/plain\n\n'
    for number in 0 1 2; do
        echo $number
        until [ -e "$HOME/seen-$number" ]; do sleep 0.02; done
    done ;;
/hang)
    sleep 1000 &
    setsid sleep 1001 &
    echo "$$ $!" > "$HOME/hanging.new"; mv "$HOME/hanging.new" "$HOME/hanging"
    wait ;;
/behind)
    # The process behind it holds its output open.
    sleep 1000 &
    echo "$$ $!" > "$HOME/hanging.new"; mv "$HOME/hanging.new" "$HOME/hanging"
    printf 'Content-Type: text/plain\n\nanswered' ;;
/together)
    touch "$HOME/together-$$"
    until [ "$(ls "$HOME" | grep -c together)" -ge 4 ]; do sleep 0.02; done
    printf 'Content-Type: text/plain\n\n%s' "$QUERY_STRING" ;;
/quick) printf 'Content-Type: text/plain\n\n%s' "$QUERY_STRING" ;;
*) printf 'Content-Type: text/plain\n\n%s|%s' "$SCRIPT_NAME" "$PATH_INFO" ;;
esac
"#;

/// A host with the plugin `p`, whose manifest has these lines, and whose directory these files that may be executed.
fn server(site: Site, lines: &str, files: &[(&str, &str)]) -> Server {
    let dir = site.plugins().join("p");
    for (file, content) in files {
        let path = dir.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        write_file(&path, content.as_bytes(), 0o755);
    }
    write_file(&dir.join("plugrack.toml"), format!("id = \"p\"\nroute = \"/p\"\n{lines}\n").as_bytes(), 0o644);
    let server = site.start();
    server.wait_state("p", "ready");
    server
}

/// A host whose plugin `p` is the script, which answers every path.
fn script(site: Site, more: &str) -> Server {
    server(site, &format!("[run]\nkind = \"cgi\"\nscript = \"bin/script\"\n{more}"), &[("bin/script", SCRIPT)])
}

/// The path of a file of the scripts' own.
fn touched(server: &Server, name: &str) -> PathBuf {
    server.site().data().join("plugin-data/p").join(name)
}

/// The processes of a script that hangs.
fn hanging(server: &Server) -> Vec<i64> {
    let path = touched(server, "hanging");
    let text = wait_for("the script to hang", || fs::read_to_string(&path).ok());
    fs::remove_file(path).unwrap();
    text.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

fn assert_all_end(processes: &[i64]) {
    wait_for("the processes of the script to end", || (!processes.iter().any(|pid| is_alive(*pid))).then_some(()));
}

#[test]
fn a_script_is_told_of_its_request_and_answers() {
    let server = script(Site::new(), "env = { GREETING = \"from the manifest\", QUERY_STRING = \"not this\" }");
    let reply =
        server.request("POST", "/p/show?a=b%20c", &[("content-type", "text/x"), ("x-a", "1"), ("proxy", "evil")], b"the body");
    let shown: Vec<&str> = reply.text().lines().collect();
    let directory = format!("directory={}", fs::canonicalize(server.site().plugins().join("p/bin")).unwrap().display());
    let uid = geteuid().as_raw().to_string();
    for line in [
        "GATEWAY_INTERFACE=CGI/1.1",
        "REQUEST_METHOD=POST",
        "REQUEST_URI=/p/show?a=b%20c",
        "QUERY_STRING=a=b%20c",
        "SCRIPT_NAME=/p",
        "PATH_INFO=/show",
        "CONTENT_LENGTH=8",
        "CONTENT_TYPE=text/x",
        "REMOTE_ADDR=127.0.0.1",
        "SERVER_NAME=test",
        "HTTP_X_A=1",
        "GREETING=from the manifest",
        &directory,
        &uid,
        "the body",
    ] {
        assert!(shown.contains(&line), "{line}: {shown:?}");
    }
    assert!(!shown.iter().any(|line| line.starts_with("HTTP_PROXY")), "{shown:?}");
    let status = server.get("/p/status");
    assert_eq!((status.status, status.header("x-a"), status.text()), (418, Some("b"), "short"));
    assert_eq!((server.get("/p/redirect").status, server.get("/p/redirect").header("location")), (302, Some("/p/other")));
    assert_eq!(server.get("/p/a%20b/").text(), "/p|/a b/");
    assert_eq!(server.request("HEAD", "/p/status", &[], b"").status, 418);
    assert_eq!(server.get("/p/unread").status, 413);
}

#[test]
fn a_script_that_fails_is_502_and_its_words_are_in_the_log() {
    let server = script(Site::new(), "");
    for (path, reasons) in [
        ("/fail", &["a complaint", "the script ended with exit code 3 and without an answer"][..]),
        ("/garbage", &["must begin with header lines"]),
        ("/nph", &["say Status: CODE"]),
        ("/killed", &["and without an answer"]),
    ] {
        let reply = server.get(&format!("/p{path}"));
        assert_eq!((reply.status, &reply.json()["error"]["code"]), (502, &"bad_gateway".into()), "{path}");
        server.wait_logged("p", reasons);
    }
    assert_eq!(server.get("/p/late-fail").text(), "ok");
    server.wait_logged("p", &["the script ended with exit code 4"]);
    assert!(server.cli(&["logs", "p"]).contains("a complaint"));
    assert_eq!(server.plugin("p")["state"], "ready");
}

#[test]
fn large_bodies_pass_in_both_directions() {
    let server = script(Site::new().args(&["--body-buffer", "64K", "--max-body", "64M"]), "");
    let body: Vec<u8> = (0..10 << 20).map(|n: u32| n.to_le_bytes()[n as usize % 3]).collect();
    let path = server.site().data().join("body");
    fs::write(&path, &body).unwrap();
    let expected = command("sha256sum").arg(&path).output().unwrap();
    let expected = String::from_utf8(expected.stdout).unwrap().split(' ').next().unwrap().to_owned();
    assert_eq!(server.request("POST", "/p/sum", &[], &body).text(), expected);
    // A length that is not known is the script's to find out, as by its end of file.
    let pieces: Vec<&[u8]> = body.chunks(1 << 20).collect();
    assert_eq!(server.client().request_chunked("POST", "/p/sum", &pieces).text(), expected);
    let server = script(Site::new(), "");
    let mut client = server.client();
    client.send(format!("POST /p/echo HTTP/1.1\r\nhost: test\r\ncontent-length: {}\r\n\r\n", body.len()).as_bytes());
    let mut writer = client.writer();
    let reply = std::thread::scope(|scope| {
        std::thread::Builder::new().spawn_scoped(scope, || writer.send(&body)).unwrap();
        client.reply(false)
    });
    assert!(reply.status == 200 && reply.body == body, "{} bytes of {}", reply.body.len(), body.len());
    assert_eq!(server.request("POST", "/p/unread", &[], &body[1..]).status, 413);
}

#[test]
fn output_arrives_as_it_is_printed() {
    let server = script(Site::new(), "");
    let mut client = server.client();
    client.send(b"GET /p/stream HTTP/1.1\r\nhost: test\r\n\r\n");
    let head = client.reply_head();
    for number in 0..3 {
        assert_eq!(client.body_piece(&head).unwrap(), format!("{number}\n").into_bytes());
        fs::write(touched(&server, &format!("seen-{number}")), b"").unwrap();
    }
    assert_eq!(client.body_piece(&head), None);
}

#[test]
fn a_script_ends_with_its_children_when_its_time_is_over_or_its_client_goes() {
    let server = script(Site::new(), "request-timeout = \"1s\"");
    let begun = Instant::now();
    let reply = server.get("/p/hang");
    assert_eq!((reply.status, &reply.json()["error"]["code"]), (504, &"timeout".into()));
    assert!(begun.elapsed() < PATIENCE);
    assert_all_end(&hanging(&server));
    server.wait_logged("p", &["1 s passed before its answer began"]);
    // A process that it leaves behind does not hold up the answer, nor does it stay.
    assert_eq!(server.get("/p/behind").text(), "answered");
    assert_all_end(&hanging(&server));
    server.cli(&["limits", "set", "p", "request-timeout", "10m"]);
    server.cli(&["restart", "p"]);
    server.wait_state("p", "ready");
    let mut client = server.client();
    client.send(b"GET /p/hang HTTP/1.1\r\nhost: test\r\n\r\n");
    let processes = hanging(&server);
    assert!(processes.iter().all(|pid| is_alive(*pid)));
    drop(client);
    assert_all_end(&processes);
    // Nor does one outlive the host.
    let mut client = server.client();
    client.send(b"GET /p/hang HTTP/1.1\r\nhost: test\r\n\r\n");
    let processes = hanging(&server);
    let (status, _site) = server.stop();
    assert!(status.success());
    assert_all_end(&processes);
}

#[test]
fn as_many_scripts_run_at_once_as_the_manifest_allows() {
    let lines = "concurrency = 4\n[run]\nkind = \"cgi\"\nscript = \"bin/script\"";
    let server = server(Site::new(), lines, &[("bin/script", SCRIPT)]);
    let crowd = |path: &str, count: usize| {
        let clients: Vec<_> = (0..count)
            .map(|number| {
                let mut client = server.client();
                client.send(format!("GET /p{path}?{number} HTTP/1.1\r\nhost: test\r\n\r\n").as_bytes());
                client
            })
            .collect();
        for (number, mut client) in clients.into_iter().enumerate() {
            let reply = client.reply(false);
            assert_eq!((reply.status, reply.text()), (200, &*number.to_string()));
        }
    };
    // Each waits until four run.
    crowd("/together", 4);
    crowd("/quick", 50);
}

#[test]
fn a_path_finds_its_script_below_the_root_and_nothing_else() {
    let lines = "[run]\nkind = \"cgi\"\nroot = \"cgi-bin\"";
    let files = [("cgi-bin/one", SCRIPT), ("cgi-bin/sub/two.sh", SCRIPT), ("outside", SCRIPT)];
    let site = Site::new();
    fs::create_dir_all(site.plugins().join("p/cgi-bin")).unwrap();
    write_file(&site.plugins().join("p/cgi-bin/data.txt"), b"data", 0o644);
    std::os::unix::fs::symlink("../outside", site.plugins().join("p/cgi-bin/link")).unwrap();
    let server = server(site, lines, &files);
    assert_eq!(server.get("/p/one").text(), "/p/one|");
    assert_eq!(server.get("/p/sub/two.sh/in/fo").text(), "/p/sub/two.sh|/in/fo");
    for path in ["/", "/sub/", "/data.txt", "/missing", "/link", "/../outside", "/%2e%2e/outside", "/sub/../one", "//one"] {
        assert_eq!(server.get(&format!("/p{path}")).status, 404, "{path}");
    }
}

#[test]
fn a_plugin_without_its_script_or_program_is_refused() {
    let site = Site::new();
    let dir = site.plugins().join("p");
    fs::create_dir_all(&dir).unwrap();
    let manifest = "id = \"p\"\nroute = \"/p\"\n[run]\nkind = \"cgi\"\ncommand = [\"no-such-program-anywhere\"]\n";
    write_file(&dir.join("plugrack.toml"), manifest.as_bytes(), 0o644);
    let server = site.start();
    wait_for("the reason", || {
        server.plugin("p").to_string().contains("there is no command no-such-program-anywhere").then_some(())
    });
}

#[test]
fn scripts_run_under_the_uid_of_their_plugin() {
    if !geteuid().is_root() {
        eprintln!("skipped: only root can give plugins uids of their own");
        return;
    }
    let uids = uids();
    let server = script(Site::new().args(&["--plugin-uids", &range(&uids)]), "");
    let reply = server.get("/p/show");
    let uid: u32 = reply.text().lines().last().unwrap().parse().unwrap();
    assert!(uids.contains(&uid), "{uid}");
}

/// Git, as a user without settings.
fn git(home: &Path, arguments: &[&str]) -> Command {
    let mut git = command("git");
    git.env("HOME", home).env("GIT_CONFIG_NOSYSTEM", "1").env("GIT_TERMINAL_PROMPT", "0");
    git.args(["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "init.defaultBranch=main"]).args(arguments);
    git
}

#[track_caller]
fn assert_git(home: &Path, arguments: &[&str]) {
    let output = git(home, arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn git_clones_and_pushes_as_the_documentation_has_it() {
    let site = Site::new();
    let manifest = blocks_in("docs/apps.md", "toml").into_iter().find(|manifest| manifest.starts_with("id = \"git\"\n")).unwrap();
    let dir = site.plugins().join("git");
    fs::create_dir_all(&dir).unwrap();
    write_file(&dir.join("plugrack.toml"), manifest.as_bytes(), 0o644);
    let server = site.start();
    server.wait_state("git", "ready");
    let (home, data) = (tempfile::tempdir().unwrap(), server.site().data().join("plugin-data/git"));
    let (home, repository) = (home.path(), data.join("repositories/notes.git"));
    let path = |name: &str| home.join(name).to_str().unwrap().to_owned();
    assert_git(home, &["init", "--quiet", "--bare", repository.to_str().unwrap()]);
    let url = format!("http://{}/git/notes.git", server.address());
    assert_git(home, &["clone", "--quiet", &url, &path("first")]);
    // Larger than what git sends with a length.
    let content: Vec<u8> = (0..3 << 20).map(|n: u32| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    fs::write(home.join("first/large"), &content).unwrap();
    assert_git(home, &["-C", &path("first"), "add", "large"]);
    assert_git(home, &["-C", &path("first"), "commit", "--quiet", "--message", "a large file"]);
    assert_git(home, &["-C", &path("first"), "push", "--quiet", "origin", "HEAD:main"]);
    assert_git(home, &["clone", "--quiet", "--branch", "main", &url, &path("second")]);
    assert!(fs::read(home.join("second/large")).unwrap() == content);
    let missing = git(home, &["clone", "--quiet", &format!("{url}x"), &path("third")]).output().unwrap();
    assert!(!missing.status.success());
}
