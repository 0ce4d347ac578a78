//! The SDKs of the other languages by their own tests, and each example through the real host.

use crate::bridges::packages;
use crate::support::{Server, Site, command, root};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

/// What a browser asks for.
const BROWSER: (&str, &str) = ("accept", "text/html,application/xhtml+xml,*/*;q=0.8");

/// What a form is sent as.
const FORM: (&str, &str) = ("content-type", "application/x-www-form-urlencoded");

/// Whether to run what needs node. Where it is missing that is a failure, so that nobody takes a pass for more than it is.
#[track_caller]
pub(crate) fn node() -> bool {
    if std::env::var("PLUGRACK_SKIP_NODE").is_ok_and(|skip| skip == "1") {
        return false;
    }
    let found = command("node").arg("--version").output().is_ok_and(|version| version.status.success());
    assert!(found, "node is not installed: `make test` installs it, and PLUGRACK_SKIP_NODE=1 leaves out what needs it");
    true
}

/// Runs a suite in the repository, and gives all it has printed.
#[track_caller]
fn suite(runner: &mut Command) -> String {
    runner.current_dir(root()).env("PYTHONDONTWRITEBYTECODE", "1").env("PLUGRACK_TEST_PACKAGES", packages());
    let output = runner.output().unwrap();
    let printed = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success(), "{printed}");
    printed
}

/// The number behind a word.
#[track_caller]
fn number_after(text: &str, word: &str) -> u64 {
    let number = text.split_once(word).and_then(|(_, rest)| rest.split_whitespace().next()?.parse().ok());
    number.unwrap_or_else(|| panic!("no number after {word:?}: {text}"))
}

#[test]
fn the_python_sdk_passes_its_tests() {
    let printed = suite(command("python3").args(["-m", "unittest", "discover", "-s", "tests/sdk"]));
    assert!(number_after(&printed, "\nRan ") > 0, "{printed}");
}

#[test]
fn the_node_sdk_passes_its_tests() {
    if !node() {
        return;
    }
    let files = fs::read_dir(root().join("tests/sdk")).unwrap().map(|entry| entry.unwrap().path());
    let files = files.filter(|path| path.to_string_lossy().ends_with(".test.mjs"));
    let printed = suite(command("node").args(["--test", "--test-reporter=tap"]).args(files));
    assert!(number_after(&printed, "\n# pass ") > 0, "{printed}");
}

#[test]
fn hello_greets_the_world_and_by_name() {
    let server = Site::new().example("hello").start();
    let mut client = server.client();
    for (path, greeting) in [("/hello", "Hello, world!"), ("/hello/", "Hello, world!"), ("/hello/Ada", "Hello, Ada!")] {
        let reply = client.get(path);
        assert_eq!((reply.status, reply.text()), (200, greeting), "{path}");
    }
    let head = client.request("HEAD", "/hello", &[], b"");
    assert_eq!((head.status, head.header("content-length")), (200, Some("13")));
    let post = client.request("POST", "/hello", &[], b"x");
    assert_eq!((post.status, post.header("allow")), (405, Some("GET, HEAD")));
}

#[test]
fn notes_are_kept_as_text_for_programs_and_html_for_browsers() {
    let server = Site::new().example("notes").start();
    assert!(server.get("/notes").text().starts_with("Notes: nothing yet\n"));
    for (text, path) in [("text=first+line%0D%0Asecond", "/notes"), ("text=%3Cb%3E+%26+%C3%A9%21", "/notes/")] {
        let added = server.request("POST", path, &[FORM, BROWSER], text.as_bytes());
        assert_eq!((added.status, added.header("location")), (303, Some("/notes")), "{path}: as a browser goes on");
    }
    for (headers, form, status) in [
        (&[FORM][..], "text=+", 400),
        (&[FORM], "other=x", 400),
        (&[FORM], &format!("text={}", "x".repeat(10_001)), 413),
        (&[FORM, ("origin", "https://elsewhere.example")], "text=x", 403),
    ] {
        assert_eq!(server.request("POST", "/notes/", headers, form.as_bytes()).status, status, "{form:.20}");
    }

    let server = server.stop().1.start();
    let plain = server.get("/notes");
    assert_eq!(plain.header("content-type"), Some("text/plain; charset=utf-8"));
    assert!(plain.text().starts_with("Notes: 2\n"), "{}", plain.text());
    assert!(plain.text().contains("    first line\n    second\n") && plain.text().contains("    <b> & é!\n"), "{}", plain.text());
    let page = server.request("GET", "/notes", &[BROWSER], b"");
    assert_eq!(page.header("content-type"), Some("text/html; charset=utf-8"));
    assert!(page.text().contains("&lt;b&gt; &amp; é!") && !page.text().contains("<b>"), "{}", page.text());
    assert!(page.text().contains(r#"action="/notes/""#), "forms lead back through the mount");

    let listed = || server.get("/notes/notes.json").json();
    let Value::Array(notes) = listed() else { panic!("{}", listed()) };
    assert_eq!(notes.iter().map(|note| note["text"].as_str().unwrap()).collect::<Vec<_>>(), ["<b> & é!", "first line\nsecond"]);
    let (id, rev) = (notes[0]["id"].as_str().unwrap(), &notes[0]["rev"]);
    let edit = |text: &str| {
        let form = format!("text={text}&rev={rev}");
        server.request("POST", &format!("/notes/edit/{id}"), &[FORM], form.as_bytes()).status
    };
    assert_eq!((edit("changed"), edit("late")), (303, 409), "an edit of what has changed meanwhile is refused");
    assert_eq!(
        server.cli(&["kv", "get", "notes", &format!("note/{id}")]),
        "changed",
        "the operator sees what the plugin has stored"
    );
    assert_eq!(server.request("POST", &format!("/notes/delete/{id}"), &[FORM], b"").status, 303);
    assert_eq!(listed().as_array().unwrap().len(), 1);
}

#[test]
fn the_clock_tells_the_time_as_a_line_a_page_and_events_that_come_one_by_one() {
    if !node() {
        return;
    }
    let server = Site::new().example("clock").start();
    let is_time = |text: &str| text.len() == 24 && text.as_bytes()[10] == b'T' && text.ends_with('Z');
    let line = server.get("/clock");
    assert!(line.text().strip_suffix('\n').is_some_and(is_time), "{}", line.text());
    let page = server.request("GET", "/clock", &[BROWSER], b"");
    assert_eq!(page.header("content-type"), Some("text/html; charset=utf-8"));
    assert!(page.text().contains("new EventSource('/clock/events')"));

    let mut client = server.client();
    client.send(b"GET /clock/events HTTP/1.1\r\nhost: test\r\n\r\n");
    let head = client.reply_head();
    assert_eq!((head.status, head.header("content-type")), (200, Some("text/event-stream; charset=utf-8")));
    let mut tick = || {
        let event = String::from_utf8(client.body_piece(&head).unwrap()).unwrap();
        let time = event.strip_prefix("event: tick\ndata: ").and_then(|rest| rest.strip_suffix("\n\n"));
        time.filter(|time| is_time(time)).unwrap_or_else(|| panic!("not one event: {event:?}")).to_owned()
    };
    // Times as text are in order as they are in time.
    let ticks = [tick(), tick(), tick()];
    assert!(ticks.is_sorted() && ticks[0] < ticks[2], "{ticks:?}");
    // The stream has no end of its own: the host ends it when it stops, as one that is whole.
    assert!(server.stop().0.success());
    while client.body_piece(&head).is_some() {}
}

#[test]
fn the_counter_counts_every_visitor_once() {
    const CLIENTS: u64 = 4;
    const EACH: u64 = 25;
    let visit = |reply: crate::support::http::Reply| {
        assert_eq!(reply.status, 200, "{reply:?}");
        let number = reply.text().strip_prefix("You are visitor number ").and_then(|rest| rest.strip_suffix(".\n"));
        number.unwrap().parse::<u64>().unwrap()
    };
    let visit_often = |server: &Server| {
        let mut client = server.client();
        (0..EACH).map(|_| visit(client.get("/counter"))).collect::<Vec<_>>()
    };
    let server = Site::new().example("counter").start();
    assert_eq!(server.get("/counter/elsewhere").status, 404, "which is no visit");
    let seen = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(|| visit_often(&server))).collect();
        clients.into_iter().flat_map(|client| client.join().unwrap()).collect::<Vec<_>>()
    });
    assert_eq!(seen.len() as u64, CLIENTS * EACH);
    assert_eq!(seen.into_iter().collect::<BTreeSet<_>>(), (1..=CLIENTS * EACH).collect());
    let server = server.stop().1.start();
    assert_eq!(visit(server.get("/counter")), CLIENTS * EACH + 1);
    let server = server.kill().start();
    assert_eq!(visit(server.get("/counter")), CLIENTS * EACH + 2);
}
