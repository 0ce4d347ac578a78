//! The check of a plugin's first page by `plugrack show`.

use crate::support::{Server, Site, metadata, wait_for, write_file};
use serde_json::{Value, json};
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// A page whose links stay below their route.
const GOOD: &str = "<!doctype html><link rel=stylesheet href=app.css><script src='./app.js'></script><a href='?page=2'>next</a>\
    <a href=/>Start</a><a href=/other/page>other</a><a href=https://example.org/x>elsewhere</a>\
    <script>const path = '<a href=\"/x\">';</script>";

/// A page of an application that does not know its prefix.
const BROKEN: &str = "<!doctype html><link rel=stylesheet href=app.css><script src=\"/static/app.js\"></script>\
    <form action=/login></form><img src=/static/logo.png><img src=/static/logo.png>";

/// An application that serves a page for each plugin, by the prefix that the host tells it.
struct Application {
    port: u16,
    /// The heads of its requests.
    seen: Arc<Mutex<Vec<String>>>,
    /// Connections that the host has closed under a response that does not end.
    cut: Arc<AtomicUsize>,
    ends: Arc<AtomicBool>,
}

impl Application {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (seen, cut, ends) =
            (Arc::<Mutex<Vec<String>>>::default(), Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
        let of_thread = (Arc::clone(&seen), Arc::clone(&cut), Arc::clone(&ends));
        std::thread::Builder::new()
            .spawn(move || {
                let (seen, cut, ends) = of_thread;
                for stream in listener.incoming().map_while(Result::ok).take_while(|_| !ends.load(Ordering::SeqCst)) {
                    let (seen, cut) = (Arc::clone(&seen), Arc::clone(&cut));
                    std::thread::Builder::new().spawn(move || serve(stream, &seen, &cut)).unwrap();
                }
            })
            .unwrap();
        Self { port, seen, cut, ends }
    }

    /// The request lines since the last call.
    fn asked(&self) -> Vec<String> {
        let seen = std::mem::take(&mut *self.seen.lock().unwrap());
        seen.iter().map(|head| head.lines().next().unwrap().to_owned()).collect()
    }

    /// A host with plugins of these ids, each attached to the application below the route that is its id.
    fn behind(&self, site: Site, ids: &[&str]) -> Server {
        for id in ids {
            let listen = format!("kind = \"http\"\nlisten = \"127.0.0.1:{}\"", self.port);
            manifest(&site, id, &format!("route = \"/{id}\"\nconcurrency = 1"), &listen);
        }
        let server = site.start();
        ids.iter().for_each(|id| drop(server.wait_state(id, "ready")));
        server
    }
}

impl Drop for Application {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::SeqCst);
        drop(TcpStream::connect(("127.0.0.1", self.port)));
    }
}

fn manifest(site: &Site, id: &str, top: &str, run: &str) {
    let dir = site.plugins().join(id);
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("plugrack.toml"), format!("id = \"{id}\"\n{top}\n\n[run]\n{run}\n")).unwrap();
}

/// Serves the requests of a connection.
fn serve(mut stream: TcpStream, seen: &Mutex<Vec<String>>, cut: &AtomicUsize) {
    while let Some(head) = head(&mut stream) {
        let path = head.split(' ').nth(1).unwrap().to_owned();
        let prefix = head.lines().find_map(|line| line.strip_prefix("x-forwarded-prefix: ")).unwrap_or_default().to_owned();
        let host = head.lines().find_map(|line| line.strip_prefix("host: ")).unwrap_or_default().to_owned();
        seen.lock().unwrap().push(head);
        let is_over = match (prefix.as_str(), path.as_str()) {
            ("/silent", _) => true,
            ("/trickle", _) => {
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 9000\r\n\r\n<p>").unwrap();
                true
            }
            ("/endless", _) => {
                let mut piece = b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\nconnection: close\r\n\r\n".to_vec();
                while stream.write_all(&piece).is_ok() {
                    piece = BROKEN.repeat(100).into_bytes();
                }
                cut.fetch_add(1, Ordering::SeqCst);
                return;
            }
            _ => false,
        };
        if is_over {
            // Until the host gives up.
            assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0);
            cut.fetch_add(1, Ordering::SeqCst);
            return;
        }
        let (status, kind, more, body) = match (prefix.as_str(), path.as_str()) {
            ("/good", _) => (200, "text/html; charset=utf-8", String::new(), GOOD.to_owned()),
            ("/absolute", _) => (200, "text/html", String::new(), format!("<a href=http://{host}/wiki/x>x</a>")),
            ("/late", _) => (200, "text/html", String::new(), format!("{GOOD}{}{BROKEN}", " ".repeat(256 << 10))),
            ("/json", _) => (200, "application/json", String::new(), format!("{{\"page\": {BROKEN:?}}}")),
            ("/compressed", _) => (200, "text/html", "content-encoding: br\r\n".to_owned(), BROKEN.to_owned()),
            ("/error", _) => (404, "text/html", String::new(), BROKEN.to_owned()),
            ("/login", "/") => (303, "text/html", "location: /start?next=%2F\r\n".to_owned(), String::new()),
            ("/login", "/start?next=%2F") => (302, "text/html", "location: form\r\n".to_owned(), String::new()),
            ("/loop", _) => (302, "text/html", format!("location: http://{host}/loop/\r\n"), String::new()),
            ("/away", _) => (302, "text/html", "location: https://login.example/\r\n".to_owned(), String::new()),
            _ => (200, "Text/HTML", String::new(), BROKEN.to_owned()),
        };
        let head = format!("HTTP/1.1 {status} S\r\ncontent-type: {kind}\r\n{more}content-length: {}\r\n\r\n", body.len());
        // The host may have had enough.
        if stream.write_all((head + &body).as_bytes()).is_err() {
            return;
        }
    }
}

/// The head of a request; none at the end of the connection.
fn head(stream: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    Some(String::from_utf8(head).unwrap())
}

/// What the check of a plugin finds.
#[track_caller]
fn checked(server: &Server, id: &str) -> Value {
    let shown: Value = serde_json::from_str(&server.cli(&["show", id, "--json"])).unwrap();
    shown["first_page"].clone()
}

/// What `show` prints for people of a plugin's first page.
#[track_caller]
fn line(server: &Server, id: &str) -> Option<String> {
    let shown = server.cli(&["show", id]);
    let mut lines = shown.lines().filter_map(|line| line.strip_prefix("first page")).map(|line| line.trim().to_owned());
    let line = lines.next();
    assert_eq!(lines.next(), None, "{shown}");
    line
}

#[test]
fn show_names_the_links_that_lead_out_of_the_route_and_the_cure() {
    let application = Application::start();
    let server = application.behind(Site::new(), &["wiki", "login", "other"]);
    application.asked();
    let found = checked(&server, "wiki");
    assert_eq!((&found["path"], &found["result"], &found["count"]), (&json!("/wiki/"), &json!("links_outside"), &json!(2)));
    let link = |element: &str, attribute: &str, path: &str| json!({"element": element, "attribute": attribute, "path": path});
    // The form leads to the plugin login.
    let links = [link("script", "src", "/static/app.js"), link("img", "src", "/static/logo.png")];
    assert_eq!(found["links"], json!(links), "{found:#}");
    let advice = line(&server, "wiki").unwrap();
    assert_eq!(found["advice"], advice.as_str());
    assert!(advice.starts_with("2 links of /wiki/ lead out of the route, such as <script src=\"/static/app.js\">: "), "{advice}");
    assert!(
        advice.contains("host = [\"") && advice.contains("docs/apps.md, \"Links that lead outside of the route\""),
        "{advice}"
    );
    assert_eq!(application.asked(), ["GET / HTTP/1.1"; 2]);
    // Redirects are followed to the page of the login.
    let found = checked(&server, "login");
    assert_eq!((&found["path"], &found["result"]), (&json!("/login/form"), &json!("links_outside")), "{found:#}");
    assert_eq!(application.asked(), ["GET / HTTP/1.1", "GET /start?next=%2F HTTP/1.1", "GET /form HTTP/1.1"]);
    assert_eq!(server.plugin("wiki")["process"]["failed"], 0);
}

#[test]
fn show_says_nothing_of_a_page_whose_links_are_fine() {
    let application = Application::start();
    let server = application.behind(Site::new(), &["good", "late", "other"]);
    assert_eq!(checked(&server, "good"), json!({"path": "/good/", "result": "fine"}));
    // Only the beginning of a page is read.
    assert_eq!(checked(&server, "late")["result"], "fine");
    for id in ["good", "late"] {
        assert_eq!(line(&server, id), None);
    }
}

#[test]
fn what_is_no_page_is_not_checked_and_show_says_nothing_of_it() {
    let application = Application::start();
    let server = application.behind(Site::new(), &["json", "compressed", "error", "loop", "away", "absolute"]);
    for (id, reason) in [
        ("json", "it is not HTML"),
        ("compressed", "it is not HTML"),
        ("error", "it answered with 404"),
        ("loop", "it redirects more than 4 times"),
        ("away", "it redirects to \"https://login.example/\""),
    ] {
        let found = checked(&server, id);
        assert_eq!((&found["result"], &found["reason"]), (&json!("not_checked"), &json!(reason)), "{id}");
        assert_eq!(line(&server, id), None, "{id}");
    }
    assert_eq!(checked(&server, "absolute")["links"][0]["path"], "/wiki/x");
}

#[test]
fn a_slow_application_does_not_hold_show_up_and_gets_rid_of_the_request() {
    let application = Application::start();
    let server = application.behind(Site::new(), &["silent", "trickle"]);
    for (number, id) in ["silent", "trickle"].into_iter().enumerate() {
        let found = checked(&server, id);
        assert_eq!((&found["result"], &found["reason"]), (&json!("not_checked"), &json!("it did not answer within 3 s")), "{id}");
        wait_for("the host to cancel the request", || (application.cut.load(Ordering::SeqCst) > number).then_some(()));
        let plugin = server.plugin(id);
        assert_eq!((&plugin["state"], &plugin["process"]["failed"]), (&json!("ready"), &json!(0)), "{plugin:#}");
    }
    // A request that waits is not made to wait longer.
    let mut waiting = [server.client(), server.client()];
    waiting.iter_mut().for_each(|client| client.send(b"GET /silent/ HTTP/1.1\r\nhost: h\r\n\r\n"));
    wait_for("a request to wait", || (server.plugin("silent")["process"]["waiting"] == 1).then_some(()));
    assert_eq!(checked(&server, "silent")["reason"], "other requests wait for it");
}

#[test]
fn a_page_without_end_is_read_in_part() {
    let application = Application::start();
    let server = application.behind(Site::new(), &["endless"]);
    let found = checked(&server, "endless");
    assert_eq!((&found["result"], &found["count"]), (&json!("links_outside"), &json!(3)), "{found:#}");
    wait_for("the host to cancel the request", || (application.cut.load(Ordering::SeqCst) == 1).then_some(()));
    assert_eq!(server.plugin("endless")["process"]["failed"], 0);
}

#[test]
fn only_show_requests_a_page_and_only_of_a_plugin_that_runs_and_has_a_route() {
    let application = Application::start();
    let site = Site::new().fake("native");
    manifest(&site, "own", "host = [\"own.example\"]", &format!("kind = \"http\"\nlisten = \"127.0.0.1:{}\"", application.port));
    let server = application.behind(site, &["wiki"]);
    server.wait_state("own", "ready");
    server.wait_state("native", "ready");
    application.asked();
    assert_eq!(server.plugin("wiki")["first_page"], Value::Null);
    server.cli(&["list", "--json"]);
    server.cli(&["restart", "wiki", "--json"]);
    server.wait_state("wiki", "ready");
    for id in ["own", "native"] {
        assert_eq!(checked(&server, id), Value::Null, "{id}");
    }
    assert_eq!(server.get("/api/plugins/wiki?first_page=true").status, 401);
    assert_eq!(server.api("GET", "/plugins/wiki?first_page=perhaps", b"").0, 400);
    server.cli(&["stop", "wiki"]);
    assert_eq!((checked(&server, "wiki"), line(&server, "wiki")), (Value::Null, None));
    assert_eq!(application.asked(), Vec::<String>::new());
}

#[test]
fn sites_scripts_and_plugins_that_leave_their_route_to_the_host_are_checked_as_well() {
    let mut rewritten = metadata("rewritten");
    rewritten["below_route"] = json!("rewrite");
    let site = Site::new().fake_with("rewritten", &json!({"metadata": rewritten}));
    for (id, run) in [("site", "kind = \"static\"\nroot = \".\""), ("script", "kind = \"cgi\"\nscript = \"page.sh\"")] {
        manifest(&site, id, &format!("route = \"/{id}\""), run);
    }
    fs::write(site.plugins().join("site/index.html"), BROKEN).unwrap();
    let script = format!("#!/bin/sh\nprintf 'Content-Type: text/html\\n\\n'\ncat <<'END'\n{BROKEN}\nEND\n");
    write_file(&site.plugins().join("script/page.sh"), script.as_bytes(), 0o755);
    let server = site.start();
    for (id, cure) in [("site", "vite build --base="), ("script", "set the base path in the application's configuration")] {
        server.wait_state(id, "ready");
        let advice = line(&server, id).unwrap();
        assert!(advice.starts_with(&format!("3 links of /{id}/ lead out")) && advice.contains(cure), "{advice}");
    }
    server.wait_state("rewritten", "ready");
    assert_eq!(checked(&server, "rewritten")["result"], "not_checked");
}
