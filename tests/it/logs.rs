//! Plugins that print without measure, junk, and to a log that others meddle with: none of it hurts anybody.

use crate::support::{Server, Site, install_fake, metadata, script, wait_for};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::symlink;

/// Text that no terminal and no page should be given as it is: controls, escape sequences, what turns the direction of text, what
/// is not seen, and what is no character.
const JUNK: &str = "<junk>\x1b[2J\x1b]0;t\x07\r\x08\x7f\u{85}\u{9b}31m\u{ad}\u{61c}\u{200b}\u{200e}\u{200f}\u{2028}\u{2029}\u{202a}\u{202b}\u{202c}\u{202d}\u{202e}\u{2060}\u{2066}\u{2067}\u{2068}\u{2069}\u{feff}\u{fff9}\u{e000}\u{fffe}\u{fdd0}\u{e0041}\u{10ffff}";

/// Checks that nothing of [`JUNK`] but its first word is in what people are shown.
#[track_caller]
fn assert_clean(what: &str, shown: &[u8]) {
    let shown = std::str::from_utf8(shown).unwrap_or_else(|error| panic!("{what}: {error}"));
    let bad = |c: &char| (c.is_control() && !"\n\t".contains(*c)) || (!c.is_ascii() && JUNK.contains(*c));
    assert_eq!(shown.chars().find(bad), None, "{what}: {shown:?}");
}

/// A fake plugin behind a shell script, which runs `before` first and may leave something in the background.
fn behind(site: Site, id: &str, before: &str) -> Site {
    let hidden = format!(".{id}");
    install_fake(&site.plugins(), &hidden, &json!({"metadata": metadata(id)}));
    let program = site.plugins().join(hidden).join("plugin");
    let run = format!("{before}\nexec {}", program.display());
    site.file(id, script(&metadata(id), &run).as_bytes(), 0o755)
}

/// All there is in a plugin's log, without times.
fn texts(server: &Server, id: &str) -> Vec<String> {
    let lines = server.cli(&["logs", id, "-n", "10000"]);
    lines.lines().map(|line| line.split_once(' ').unwrap().1.to_owned()).collect()
}

/// How many lines a text says were left out.
fn left_out(text: &str) -> Option<u64> {
    text.strip_prefix("plugrack: ")?.split_once(" lines were left out")?.0.parse().ok()
}

/// Lines in a log that are `line`, and those it says were left out.
fn accounted(server: &Server, id: &str, line: &str) -> (u64, u64) {
    let texts = texts(server, id);
    (texts.iter().filter(|text| *text == line).count() as u64, texts.iter().filter_map(|text| left_out(text)).sum())
}

#[test]
fn plugins_that_print_without_measure_are_read_counted_and_served_and_the_host_does_not_grow() {
    let (line, size) = ("a line that a plugin prints again and again and again and again", 40 << 20);
    let count = size / (line.len() as u64 + 1);
    let flood = format!("(until [ -e go ]; do sleep 0.05; done; yes '{line}' | head -n {count}; : > done) &");
    let ids = ["a", "b", "c"];
    let server = ids.into_iter().fold(Site::new(), |site, id| behind(site, id, &flood)).start();
    ids.iter().for_each(|id| drop(server.wait_state(id, "ready")));
    let before = server.memory("VmRSS");
    let home = |id: &str, file: &str| server.site().data().join("plugin-data").join(id).join(file);
    ids.iter().for_each(|id| fs::write(home(id, "go"), "").unwrap());
    for id in ids {
        assert_eq!(server.get(&format!("/{id}/x")).status, 200, "it is served meanwhile");
    }
    for id in ids {
        wait_for("the flood to be read", || home(id, "done").exists().then_some(()));
        assert_eq!(server.get(&format!("/{id}/x")).status, 200);
        // The plugin is silent now, so its log tells of the rest by itself.
        let all = || {
            let (written, left_out) = accounted(&server, id, line);
            assert!(written + left_out <= count, "{written} and {left_out} of {count}");
            (written + left_out == count).then_some(left_out)
        };
        assert!(wait_for("every line to be accounted for", all) > count / 2, "there was no flood");
    }
    let grown = server.memory("VmHWM").saturating_sub(before);
    assert!(grown < 8 << 20, "the host grew by {grown} bytes over {} MiB", (ids.len() as u64 * size) >> 20);
}

#[test]
fn the_last_words_before_a_crash_are_told_however_much_was_printed_before_them() {
    let run = "yes flood | head -n 30000; printf 'the last words' >&2; exit 3";
    let server = Site::new().file("p", script(&metadata("p"), run).as_bytes(), 0o755).start();
    let reason = |plugin: &Value| plugin["reason"].as_str().unwrap().to_owned();
    let crashed = wait_for("it to crash", || Some(reason(&server.plugin("p"))).filter(|reason| !reason.is_empty()));
    assert_eq!(crashed, "exit code 3: the last words");
    server.cli(&["disable", "p"]);
    // The log is accounted for at the end of each process, whatever second it was.
    let texts = texts(&server, "p");
    let starts = texts.iter().filter(|text| *text == "plugrack: starting").count() as u64;
    let (written, left_out) = accounted(&server, "p", "flood");
    let last = texts.iter().filter(|text| *text == "the last words").count() as u64;
    assert_eq!(written + left_out + last, starts * 30_001, "{texts:?}");
}

#[test]
fn a_log_is_followed_through_its_rotation_without_loss_or_repetition() {
    // Escaped, a line is 16 KB: each of the four batches fills a file, and is as much as is written in a second.
    let flood = "python3 -c '
import sys, time
for number in range(240):
    if number % 60 == 0: time.sleep(1.1)
    print(number, chr(1) * 4000, flush=True)
' &";
    let server = behind(Site::new(), "p", flood).start();
    server.wait_state("p", "ready");
    let follow = server.follow_log(&["p"]);
    let (mut numbers, mut missing) = (Vec::<u64>::new(), 0);
    while numbers.len() as u64 + missing < 240 {
        let text = follow.next();
        numbers.extend(text.split(' ').next().unwrap().parse::<u64>().ok());
        // On a slow machine two batches may come in one second.
        missing += left_out(&text).unwrap_or_default();
    }
    follow.end();
    assert!(numbers.is_sorted_by(|a, b| a < b), "{numbers:?}");
    assert!(numbers.len() > 100, "{numbers:?}");
    assert!(server.site().data().join("logs/p.log.1").exists());
}

#[test]
fn nothing_a_plugin_says_anywhere_can_harm_a_terminal_or_a_page() {
    let seen: String = JUNK.chars().filter(|c| !c.is_control()).collect();
    let mut about = metadata("p");
    for field in ["name", "description", "author", "homepage"] {
        about[field] = json!(seen);
    }
    let words = format!("printf '{JUNK}\\377\\n' >&2; exit 3");
    let refuse = format!("#!/bin/sh\nprintf '{JUNK}\\377\\n' >&2; exit 1\n");
    let server = Site::new()
        .fake_with("p", &json!({"metadata": about}))
        .file("q", script(&metadata("q"), &words).as_bytes(), 0o755)
        .file("r", refuse.as_bytes(), 0o755)
        .file(&format!("s{}", JUNK.replace('/', "")), b"no plugin", 0o755)
        .start();
    server.wait_state("p", "ready");
    server.wait_state("q", "backing_off");
    server.cli(&["disable", "q"]);
    let encoded: String = JUNK.bytes().map(|byte| format!("%{byte:02x}")).collect();
    assert_eq!(server.get(&format!("/p/print?text={encoded}")).status, 200);
    server.wait_logged("p", &["<junk>", "on stderr"]);
    for path in ["kv", "config"] {
        let key = if path == "kv" { encoded.as_str() } else { "key" };
        let value = json!(JUNK).to_string();
        let (status, answer) = server.api("PUT", &format!("/plugins/p/{path}/{key}"), value.as_bytes());
        assert_eq!(status, 200, "{answer}");
    }
    for arguments in [
        &["list"][..],
        &["list", "--json"],
        &["show", "p"],
        &["show", "p", "--json"],
        &["show", "q"],
        &["show", "q", "--json"],
        &["show", "r"],
        &["logs", "p"],
        &["logs", "q"],
        &["kv", "list", "p"],
        &["kv", "list", "p", "--json"],
        &["kv", "get", "p", JUNK, "--json"],
        &["config", "get", "p"],
        &["config", "get", "p", "key"],
        &["config", "get", "p", JUNK],
        &["config", "get", "r"],
        &["enable", "q"],
        &["rescan"],
    ] {
        let output = server.site().cli(arguments);
        let shown = [output.stdout, output.stderr].concat();
        assert_clean(&format!("{arguments:?}"), &shown);
        assert!(String::from_utf8_lossy(&shown).contains("<junk>"), "{arguments:?}: {}", String::from_utf8_lossy(&shown));
        if arguments.contains(&"--json") {
            serde_json::from_slice::<Value>(&shown).unwrap();
        }
    }
    for accept in ["text/plain", "text/html"] {
        let page = server.request("GET", "/", &[("accept", accept)], b"");
        assert!(page.text().contains("junk"));
        assert_clean(accept, &page.body);
    }
    let log = server.log();
    assert!(["q: ", "r: ", "s<junk>"].iter().all(|name| log.contains(name)) && log.matches("<junk>").count() >= 3, "{log}");
    assert_clean("the host's log", log.as_bytes());
    let value: Value = serde_json::from_str(&server.cli(&["config", "get", "p"])).unwrap();
    assert_eq!(value, json!({"key": JUNK}), "what is escaped is the same value");
}

#[test]
fn an_operator_may_rename_remove_and_replace_a_log_while_the_plugin_prints() {
    let server = Site::new().fake("p").start();
    server.wait_state("p", "ready");
    let path = server.site().data().join("logs/p.log");
    let other = server.site().data().join("other");
    fs::write(&other, "another's\n").unwrap();
    let print = |text: &str| assert_eq!(server.get(&format!("/p/print?text={text}")).status, 200);
    let steps: [(&str, &dyn Fn()); 3] = [
        ("renamed", &|| fs::rename(&path, path.with_extension("kept")).unwrap()),
        ("removed", &|| fs::remove_file(&path).unwrap()),
        ("gone", &|| fs::remove_dir_all(path.parent().unwrap()).unwrap()),
    ];
    for (text, step) in steps {
        step();
        print(text);
        server.wait_logged("p", &[&format!(" {text} on stderr\n")]);
        assert_eq!(texts(&server, "p"), [text.to_owned(), format!("{text} on stderr")]);
    }
    fs::remove_file(&path).unwrap();
    symlink(&other, &path).unwrap();
    print("lost");
    let complaints = || server.log().matches("p.log: it is a symbolic link; its lines are lost until that is fixed").count();
    wait_for("the host to complain", || (complaints() > 0).then_some(()));
    assert!(server.cli_fails(&["logs", "p"]).contains("p.log: it is a symbolic link"));
    for number in 0..3 {
        print(&format!("lost-{number}"));
    }
    fs::remove_file(&path).unwrap();
    print("after");
    server.wait_logged("p", &[" after on stderr\n"]);
    let written = texts(&server, "p");
    assert!(written[0].starts_with("plugrack: ") && written[0].contains("lines were lost"), "{written:?}");
    assert_eq!((fs::read_to_string(&other).unwrap().as_str(), complaints()), ("another's\n", 1));
}
