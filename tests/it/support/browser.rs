//! A real browser, headless Chromium, told what to do by its DevTools protocol over a pipe.

use super::{PATIENCE, command, pause};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// What makes it quiet, and keeps it from talking to anybody but the host.
const QUIET: [&str; 11] = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--disable-breakpad",
    "--disable-dev-shm-usage",
];

/// Time it has to end by itself.
const END_TIME: Duration = Duration::from_secs(5);

/// Chromium with a profile of its own; a script puts its input and output where the protocol has them, in 3 and 4.
fn chromium(profile: &TempDir, arguments: &[&str]) -> Command {
    let mut chromium = command("sh");
    chromium.args(["-c", r#"exec chromium "$@" 3<&0 4>&1 0</dev/null"#, "sh"]).args(QUIET).args(arguments);
    chromium.arg(format!("--user-data-dir={}", profile.path().display())).env("HOME", profile.path()).stderr(Stdio::null());
    chromium.process_group(0);
    chromium
}

/// The document of a page as the browser has it once it is loaded.
#[track_caller]
pub(crate) fn dump_dom(url: &str) -> String {
    let profile = tempfile::tempdir().unwrap();
    let output = chromium(&profile, &["--dump-dom", url]).output().unwrap();
    assert!(output.status.success(), "chromium ended with {}: `make test-tools` installs it", output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// A running browser with one page, ended with it.
pub(crate) struct Browser {
    child: Child,
    input: ChildStdin,
    messages: mpsc::Receiver<Value>,
    reading: Option<JoinHandle<()>>,
    session: Option<String>,
    last_id: u64,
    /// How often the page has been loaded.
    loads: u64,
    _profile: TempDir,
}

impl Browser {
    #[track_caller]
    pub(crate) fn start(arguments: &[&str]) -> Self {
        let profile = tempfile::tempdir().unwrap();
        let mut child = chromium(&profile, arguments)
            .arg("--remote-debugging-pipe")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (sender, messages) = mpsc::channel();
        let read = move || {
            for message in output.split(0).map_while(Result::ok) {
                if sender.send(serde_json::from_slice(&message).unwrap()).is_err() {
                    return;
                }
            }
        };
        let reading = Some(std::thread::Builder::new().spawn(read).unwrap());
        let mut browser = Self { child, input, messages, reading, session: None, last_id: 0, loads: 0, _profile: profile };
        let target = browser.call("Target.createTarget", &json!({"url": "about:blank"}))["targetId"].clone();
        let session = browser.call("Target.attachToTarget", &json!({"targetId": target, "flatten": true}))["sessionId"].clone();
        browser.session = session.as_str().map(str::to_owned);
        browser.call("Page.enable", &json!({}));
        browser
    }

    /// Calls a method of the protocol: its result.
    #[track_caller]
    fn call(&mut self, method: &str, params: &Value) -> Value {
        self.last_id += 1;
        let mut message = json!({"id": self.last_id, "method": method, "params": params});
        if let Some(session) = &self.session {
            message["sessionId"] = json!(session);
        }
        self.input.write_all(format!("{message}\0").as_bytes()).unwrap();
        loop {
            let answer = self.receive();
            if answer["id"] == self.last_id {
                assert!(answer["error"].is_null(), "{method}: {answer}");
                return answer["result"].clone();
            }
        }
    }

    #[track_caller]
    fn receive(&mut self) -> Value {
        let message = self.messages.recv_timeout(PATIENCE);
        let message = message.unwrap_or_else(|error| panic!("chromium says nothing ({error}): `make test-tools` installs it"));
        self.loads += u64::from(message["method"] == "Page.loadEventFired");
        message
    }

    /// Does what loads another page, and waits for it.
    #[track_caller]
    fn load(&mut self, by: impl FnOnce(&mut Self)) {
        let before = self.loads;
        by(self);
        while self.loads == before {
            self.receive();
        }
    }

    /// Opens a page.
    #[track_caller]
    pub(crate) fn open(&mut self, url: &str) {
        self.load(|browser| {
            let opened = browser.call("Page.navigate", &json!({"url": url}));
            assert!(opened["errorText"].is_null(), "{url}: {opened}");
        });
    }

    /// Does in the page what makes it another one.
    #[track_caller]
    pub(crate) fn leave_by(&mut self, script: &str) {
        self.load(|browser| drop(browser.evaluate(script)));
    }

    /// Runs a script in the page: what it gives, or what its promise does.
    #[track_caller]
    pub(crate) fn evaluate(&mut self, script: &str) -> Value {
        let params = json!({"expression": script, "awaitPromise": true, "returnByValue": true});
        let result = self.call("Runtime.evaluate", &params);
        assert!(result["exceptionDetails"].is_null(), "{result:#}");
        result["result"]["value"].clone()
    }

    /// The page's text as a person sees it.
    #[track_caller]
    pub(crate) fn text(&mut self) -> String {
        self.evaluate("document.body.innerText").as_str().unwrap().to_owned()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Told to, it takes its own processes with it; what is left of them is killed.
        let close = format!("{}\0", json!({"id": 0, "method": "Browser.close"}));
        self.input.write_all(close.as_bytes()).unwrap_or_default();
        let deadline = Instant::now() + END_TIME;
        while self.child.try_wait().unwrap().is_none() && Instant::now() < deadline {
            pause(Duration::from_millis(20));
        }
        command("kill").args(["-s", "KILL", "--", &format!("-{}", self.child.id())]).stderr(Stdio::null()).status().unwrap();
        self.child.wait().unwrap();
        if let Some(reading) = self.reading.take() {
            reading.join().unwrap_or_default();
        }
    }
}
