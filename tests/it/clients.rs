//! A zoo of real clients: each has the same conversation with a plugin through the gate, and every byte of it is compared.

use crate::support::browser::{Browser, dump_dom};
use crate::support::{PATIENCE, Server, Site, command, root};
use crate::web::{bytes, server_of_p};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use tempfile::TempDir;

/// Sizes of bodies that are sent and come back.
const SIZES: [usize; 5] = [0, 1, 1024, 65_536, 1_048_576];

/// Bytes of the large download, which the fixtures know too.
pub(crate) const DOWNLOAD: usize = 5_000_000;

/// Bytes of a block of what the fake plugin's `/download` sends.
const BLOCK: usize = 256 * 1024;

/// A fixture by which a client is driven.
pub(crate) fn fixture(name: &str) -> PathBuf {
    root().join("tests/fixtures/clients").join(name)
}

/// What the fake plugin's `/download` sends.
pub(crate) fn download(length: usize) -> Vec<u8> {
    let block: Vec<u8> = (0..=u8::MAX).cycle().take(BLOCK).collect();
    let mut bytes = Vec::with_capacity(length + BLOCK);
    while bytes.len() < length {
        let left = (length - bytes.len()) as u64;
        bytes.extend_from_slice(&left.to_be_bytes());
        bytes.extend_from_slice(&block[8..]);
    }
    bytes.truncate(length);
    bytes
}

/// What the fake plugin's `/upload` says of a body: its length and hash.
pub(crate) fn told(body: &[u8]) -> String {
    let mut child = command("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(body).unwrap();
    let said = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
    format!("{} {}", body.len(), said.split_whitespace().next().unwrap())
}

/// What it says of the large download.
pub(crate) fn told_of_download() -> &'static str {
    static TOLD: OnceLock<String> = OnceLock::new();
    TOLD.get_or_init(|| told(&download(DOWNLOAD)))
}

/// Has a page of a browser hold the conversation.
#[track_caller]
pub(crate) fn browser_converses(browser: &mut Browser, base: &str) {
    let module = BASE64_STANDARD.encode(fs::read(fixture("conversation.mjs")).unwrap());
    // No browser streams a body over HTTP/1.1, and none shows cookies to scripts.
    let said = browser.evaluate(&format!(
        "import('data:text/javascript;base64,{module}').then(({{ converse, FetchClient }}) => \
         converse(new FetchClient('{base}', {{ stream: false, cookies: false }}), '{}'))",
        told_of_download()
    ));
    assert_eq!(said, "done");
}

/// Runs a command, which must succeed.
#[track_caller]
pub(crate) fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}: `make test-tools` installs it"));
    // The end of what it printed, which may be a large body.
    let last = |bytes: &[u8]| bytes[bytes.len().saturating_sub(2000)..].escape_ascii().to_string().replace("\\n", "\n");
    let said = [last(&output.stderr), last(&output.stdout)].concat();
    assert!(output.status.success(), "{command:?} ended with {}: {said}", output.status);
    output
}

/// Runs a client that has the conversation of the fixtures.
#[track_caller]
pub(crate) fn converse(client: &mut Command) {
    assert_eq!(String::from_utf8(run(client).stdout).unwrap(), "done\n");
}

/// A Python that has the clients: the one in the path, or the system's own.
pub(crate) fn python() -> Command {
    let has_clients = |python: &&str| {
        command(python).args(["-c", "import requests, httpx"]).output().is_ok_and(|output| output.status.success())
    };
    let found = ["python3", "/usr/bin/python3"].into_iter().find(has_clients);
    command(found.expect("no Python has requests and httpx: `make test-tools` installs them"))
}

/// The URL of the plugin `p`.
fn url_of_p(server: &Server) -> String {
    format!("http://{}/p", server.address())
}

/// Files with bodies to send, and those that came.
struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A file of so many bytes.
    fn of(&self, size: usize) -> PathBuf {
        let path = self.path(&size.to_string());
        fs::write(&path, bytes(size)).unwrap();
        path
    }
}

/// The host has nothing to complain of.
#[track_caller]
fn assert_quiet(server: &Server) {
    let log = server.log();
    let mut complaints = log.lines().filter(|line| line.contains(" WARN ") || line.contains(" ERROR "));
    assert!(complaints.all(|line| line.contains("plugins run as root")), "{log}");
}

// --- Languages' clients -----------------------------------------------------------------------------------

#[test]
fn pythons_http_client_requests_and_httpx_have_their_conversations() {
    for client in ["http.client", "requests", "httpx"] {
        let server = server_of_p();
        converse(python().arg(fixture("conversation.py")).args([client, &url_of_p(&server), told_of_download()]));
        assert_quiet(&server);
    }
}

#[test]
fn nodes_fetch_and_http_have_their_conversations() {
    for client in ["fetch", "http"] {
        let server = server_of_p();
        converse(command("node").arg(fixture("conversation_node.mjs")).args([client, &url_of_p(&server), told_of_download()]));
        assert_quiet(&server);
    }
}

/// Go is large, so it is not asked of a machine that has none.
#[test]
fn gos_client_has_its_conversation() {
    if command("go").arg("version").output().is_err() {
        return eprintln!("skipped, since this machine has no Go");
    }
    let server = server_of_p();
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("go");
    let mut go = command("go");
    go.arg("run").arg(fixture("conversation.go")).args([&url_of_p(&server), told_of_download()]);
    converse(go.env("GOCACHE", cache).env("GO111MODULE", "off").env("GOFLAGS", "").env("GOTOOLCHAIN", "local"));
    assert_quiet(&server);
}

#[test]
fn ureq_has_its_conversation() {
    let server = server_of_p();
    let base = url_of_p(&server);
    let config =
        ureq::Agent::config_builder().http_status_as_error(false).allow_non_standard_methods(true).timeout_global(Some(PATIENCE));
    let agent = config.proxy(None).build().new_agent();
    let get = |path: &str| {
        let mut answer = agent.get(format!("{base}{path}")).call().unwrap();
        (answer.status().as_u16(), answer.body_mut().with_config().limit(u64::MAX).read_to_vec().unwrap())
    };
    for number in 0..3 {
        assert_eq!(get(&format!("/{number}")), (200, format!("GET /{number} of p").into_bytes()));
    }
    for size in SIZES {
        let body = bytes(size);
        let mut answer = agent.post(format!("{base}/echo")).send(&body[..]).unwrap();
        assert!(answer.body_mut().read_to_vec().unwrap() == body, "{size}");
        // A reader of unknown length goes in chunks.
        let mut reader = &body[..];
        let mut answer = agent.put(format!("{base}/echo")).send(ureq::SendBody::from_reader(&mut reader)).unwrap();
        assert!(answer.body_mut().read_to_vec().unwrap() == body, "{size} in chunks");
    }
    let head = agent.head(format!("{base}/length?length=12345")).call().unwrap();
    assert_eq!((head.status().as_u16(), &head.headers()["content-length"]), (200, &"12345".parse().unwrap()));
    for (status, text) in [(204, ""), (304, ""), (404, "text"), (500, "text"), (503, "text")] {
        assert_eq!(get(&format!("/status?code={status}&body={text}")), (status, text.as_bytes().to_vec()));
    }
    for declared in ["", "&declared=5000000"] {
        assert!(get(&format!("/download?bytes={DOWNLOAD}{declared}")).1 == download(DOWNLOAD));
    }
    let answer = agent.get(format!("{base}/events")).call().unwrap();
    let mut events = BufReader::new(answer.into_body().into_reader()).lines().map(Result::unwrap);
    for wanted in ["first", "second"] {
        assert_eq!(events.next().unwrap(), format!("data: {wanted}"));
        assert_eq!(events.next().unwrap(), "");
        get(if wanted == "first" { "/next?line=second" } else { "/next?line=end" });
    }
    assert_eq!(events.next(), None);
    assert_quiet(&server);
}

// --- Programs ---------------------------------------------------------------------------------------------

/// curl, with which nobody waits for ever.
pub(crate) fn curl() -> Command {
    let mut curl = command("curl");
    curl.args(["--silent", "--show-error", "--no-buffer", "--max-time", "60"]);
    curl
}

#[test]
fn curl_sends_and_gets_bodies_of_every_size_in_every_way() {
    let server = server_of_p();
    let (base, files) = (url_of_p(&server), Files::new());
    let echo = format!("{base}/echo");
    for size in SIZES {
        let data = format!("@{}", files.of(size).display());
        for more in [
            &["--data-binary", &data][..],
            &["--data-binary", &data, "-H", "transfer-encoding: chunked"],
            &["--data-binary", &data, "--http1.0"],
            &["--data-binary", &data, "-H", "connection: close"],
            // What a client that would rather have HTTP/2 sends along.
            &["--data-binary", &data, "--http2"],
        ] {
            let output = run(curl().args(more).arg(&echo));
            assert!(output.stdout == bytes(size), "{size} bytes by {more:?} came back as {}", output.stdout.len());
        }
        // As long as curl would wait, it is not the time that makes it go on.
        let asks = ["-v", "-H", "expect: 100-continue", "--expect100-timeout", "50", "--max-time", "40", "-T"];
        let output = run(curl().args(asks).arg(files.of(size)).arg(&echo));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.stdout == bytes(size), "{size} bytes came back as {}", output.stdout.len());
        assert_eq!(said.contains("< HTTP/1.1 100 Continue"), size > 0, "{size}: {said}");
    }
    assert_quiet(&server);
}

#[test]
fn curl_keeps_one_connection_through_answers_of_every_kind() {
    let server = server_of_p();
    let base = url_of_p(&server);
    let paths =
        ["/a", "/status?code=204", "/status?code=304", "/status?code=404&body=b", "/download?bytes=300000", "/cookies", "/c"];
    let mut get = curl();
    get.args(["-w", "%{stderr}%{http_code} %{num_connects} %{size_download}\n"]);
    for path in paths {
        get.args(["-o", "/dev/null"]).arg(format!("{base}{path}"));
    }
    let wrote = String::from_utf8(run(&mut get).stderr).unwrap();
    let wanted = ["200 1 11", "204 0 0", "304 0 0", "404 0 1", "200 0 300000", "200 0 0", "200 0 11"];
    assert_eq!(wrote.lines().collect::<Vec<_>>(), wanted);
    // HEAD, twice, so that a body too many would show.
    let mut head = curl();
    head.args(["--head", "-w", "%{num_connects}\n"]).args([format!("{base}/length?length=12345"), format!("{base}/x")]);
    let said = String::from_utf8(run(&mut head).stdout).unwrap().to_ascii_lowercase();
    assert!(said.contains("content-length: 12345\r\n") && said.ends_with("\r\n\r\n0\n"), "{said}");
    assert_eq!(said.matches("http/1.1 200 ok\r\n").count(), 2, "{said}");
    assert_quiet(&server);
}

#[test]
fn curl_gets_a_large_download_and_events_as_they_come() {
    let server = server_of_p();
    let base = url_of_p(&server);
    for more in [&["--http1.1"][..], &["--http1.0"], &["--limit-rate", "20M"]] {
        for declared in ["", "&declared=5000000"] {
            let output = run(curl().args(more).arg(format!("{base}/download?bytes={DOWNLOAD}{declared}")));
            assert!(output.stdout == download(DOWNLOAD), "{more:?} {declared}");
        }
    }
    let mut child = curl().arg(format!("{base}/events")).stdout(Stdio::piped()).spawn().unwrap();
    let mut events = child.stdout.take().unwrap();
    for (wanted, next) in [("data: first\n\n", "second"), ("data: second\n\n", "end")] {
        let mut came = vec![0; wanted.len()];
        events.read_exact(&mut came).unwrap();
        assert_eq!(String::from_utf8(came).unwrap(), wanted);
        server.get(&format!("/p/next?line={next}"));
    }
    assert_eq!(events.read(&mut [0; 1]).unwrap(), 0);
    assert!(child.wait().unwrap().success());
    assert_quiet(&server);
}

#[test]
fn curl_is_told_that_http_2_is_not_spoken() {
    let server = server_of_p();
    let output = curl().args(["--http2-prior-knowledge"]).arg(url_of_p(&server)).output().unwrap();
    assert!(!output.status.success() && output.stdout.is_empty(), "{output:?}");
    assert_eq!(server.get("/p/x").text(), "GET /x of p");
}

#[test]
fn wget_posts_gets_and_keeps_its_connection() {
    let server = server_of_p();
    let (base, files) = (url_of_p(&server), Files::new());
    let wget = || {
        let mut wget = command("wget");
        wget.args(["--no-config", "--no-verbose", "--no-hsts", "--tries=1", "--timeout=30"]).env("HOME", files.path(""));
        wget
    };
    for size in SIZES {
        for how in ["--post-file", "--method=PUT --body-file"] {
            let mut send = wget();
            send.args(how.split(' ')).arg(files.of(size)).args(["-O", "-"]).arg(format!("{base}/echo"));
            assert!(run(&mut send).stdout == bytes(size), "{how} {size}");
        }
    }
    for declared in ["", "&declared=5000000"] {
        let output = run(wget().args(["-O", "-"]).arg(format!("{base}/download?bytes={DOWNLOAD}{declared}")));
        assert!(output.stdout == download(DOWNLOAD), "{declared}");
    }
    let output = run(wget().args(["--verbose", "-O", "-"]).args([format!("{base}/a"), format!("{base}/b"), format!("{base}/c")]));
    assert_eq!(output.stdout, b"GET /a of pGET /b of pGET /c of p");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(said.matches("Reusing existing connection").count(), 2, "{said}");
    run(wget().args(["--spider"]).arg(format!("{base}/length?length=12345")));
    let output = wget().args(["-O", "-"]).arg(format!("{base}/status?code=404&body=no")).output().unwrap();
    // What wget has for an answer that is an error.
    assert_eq!(output.status.code(), Some(8));
    assert_quiet(&server);
}

/// Runs a load generator, and gives what it says.
#[track_caller]
pub(crate) fn load(program: &str, arguments: &[&str]) -> String {
    let output = run(command(program).args(arguments));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn apache_bench_is_served_over_kept_connections_of_http_1_0() {
    let server = server_of_p();
    let (base, files) = (url_of_p(&server), Files::new());
    let body = files.of(65_536);
    for (more, url) in [
        (&["-k"][..], format!("{base}/x")),
        (&[], format!("{base}/x")),
        (&["-k", "-T", "application/octet-stream", "-p", body.to_str().unwrap()], format!("{base}/echo")),
    ] {
        let said = load("ab", &[&["-q", "-n", "400", "-c", "20", "-s", "30"], more, &[&url]].concat());
        let says =
            |what: &str, number: &str| said.lines().any(|line| line.starts_with(what) && line.ends_with(&format!(" {number}")));
        assert!(says("Complete requests:", "400") && says("Failed requests:", "0") && !said.contains("Non-2xx"), "{said}");
        assert_eq!(says("Keep-Alive requests:", "400"), more.contains(&"-k"), "{said}");
    }
    assert_quiet(&server);
}

#[test]
fn wrk_sees_no_error() {
    let server = server_of_p();
    let files = Files::new();
    let script = files.path("post.lua");
    fs::write(&script, r#"wrk.method = "POST"; wrk.body = string.rep("0123456789abcdef", 4096)"#).unwrap();
    let (base, script) = (url_of_p(&server), script.display().to_string());
    for (more, path) in [(&[][..], "/x"), (&["-s", &script], "/echo"), (&[], "/download?bytes=300000")] {
        let said =
            load("wrk", &[&["-d", "1", "-t", "2", "-c", "20", "--timeout", "30"], more, &[&format!("{base}{path}")]].concat());
        assert!(said.contains(" requests in ") && !said.contains("Non-2xx") && !said.contains("Socket errors"), "{said}");
        assert!(!said.contains("\n  0 requests in "), "{said}");
    }
    assert_quiet(&server);
}

#[test]
fn h2load_in_its_http_1_1_mode_pipelines_and_is_answered() {
    let server = server_of_p();
    let (base, files) = (url_of_p(&server), Files::new());
    let body = files.of(65_536);
    for (more, path) in [
        (&["-m", "1"][..], "/x"),
        (&["-m", "8"], "/x"),
        (&["-m", "1", "-d", body.to_str().unwrap()], "/echo"),
        (&["-m", "4"], "/download?bytes=300000"),
    ] {
        let said = load("h2load", &[&["--h1", "-n", "400", "-c", "10"], more, &[&format!("{base}{path}")]].concat());
        assert!(said.contains("400 succeeded, 0 failed, 0 errored, 0 timeout"), "{more:?} {path}: {said}");
        assert!(said.contains("status codes: 400 2xx"), "{more:?} {path}: {said}");
    }
    assert_quiet(&server);
}

// --- A browser --------------------------------------------------------------------------------------------

#[test]
fn chromium_has_its_conversation_and_sees_events_as_they_come() {
    let server = server_of_p();
    let base = url_of_p(&server);
    let mut browser = Browser::start(&[]);
    browser.open(&format!("{base}/x"));
    assert_eq!(browser.text(), "GET /x of p");
    browser_converses(&mut browser, &base);
    let events = |browser: &mut Browser| {
        browser.evaluate(
            "new Promise((done, failed) => { \
           const [came, source] = [[], new EventSource('/q/events')]; \
           source.onerror = () => failed(Error(`broken off after ${came}`)); \
           source.onmessage = ({ data }) => { \
             came.push(data); \
             if (came.length === 3) { source.close(); done(came.join()) } else fetch(`/q/next?line=line${came.length}`) \
           } \
         })",
        )
    };
    crate::support::install_fake(&server.site().plugins(), "q", &serde_json::json!({"metadata": crate::support::metadata("q")}));
    server.cli(&["rescan"]);
    server.wait_state("q", "ready");
    assert_eq!(events(&mut browser), "first,line1,line2");
    assert_quiet(&server);
}

#[test]
fn chromium_shows_the_index_and_a_note_that_is_added_by_its_form() {
    let server = Site::new().example("notes").start();
    server.wait_state("notes", "ready");
    let base = format!("http://{}", server.address());
    let page = dump_dom(&format!("{base}/"));
    assert!(page.contains(r#"<a href="/notes">"#), "{page}");

    let mut browser = Browser::start(&[]);
    browser.open(&format!("{base}/"));
    browser.leave_by("document.querySelector('a[href=\"/notes\"]').click()");
    assert!(browser.text().contains("No notes yet."), "{}", browser.text());
    browser.leave_by(
        "document.querySelector('textarea').value = 'Grüße & <b>more</b>\\nin two lines'; document.querySelector('form button').click()",
    );
    assert!(browser.text().contains("Grüße & <b>more</b>\nin two lines"), "{}", browser.text());
    assert_eq!(browser.evaluate("location.pathname"), "/notes");
    assert_eq!(browser.evaluate("document.querySelectorAll('article').length"), 1);
    assert!(server.get("/notes/notes.json").text().contains("in two lines"));
    browser.leave_by("document.querySelector('form[action*=delete] button').click()");
    assert!(browser.text().contains("No notes yet."), "{}", browser.text());
    assert_quiet(&server);
}
