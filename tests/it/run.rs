//! `plugrack run`: one application, tried at once, of which nothing is left.

use crate::support::http::{Client, Reply};
use crate::support::{Site, binary, command, is_alive, pause, python, wait_for};
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;
use tempfile::TempDir;

/// An application whose first argument says what it does. It writes its process id to `pid`, in its working directory.
const APP: &str = r#"
import http.server, os, socket, socketserver, sys, time

open("pid", "w").write(str(os.getpid()))
mode, *rest = sys.argv[1:]

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path == "/exit":
            os._exit(7)
        if self.path == "/kill":
            os.kill(os.getpid(), 9)
        text = f"{self.path} {self.headers.get('x-forwarded-prefix')} {os.environ.get('GIVEN')} {os.environ.get('SECRET')}"
        body = text.encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *rest):
        print("asked for", self.path)

class Unix(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    pass

def serve(address, port):
    http.server.ThreadingHTTPServer((address, int(port)), Handler).serve_forever()

if mode == "port":
    print("begins")
    serve(*rest)
elif mode == "env":
    serve("127.0.0.1", os.environ["PORT"])
elif mode == "debugged":
    debugger = socket.create_server(("127.0.0.1", 0))
    time.sleep(0.3)
    serve("127.0.0.1", os.environ["PORT"])
elif mode == "unix":
    Unix(rest[0] if rest else os.environ["PLUGRACK_SOCKET"], Handler).serve_forever()
elif mode == "fd":
    assert os.environ["LISTEN_FDS"] == "1"
    server = Unix("unused", Handler, bind_and_activate=False)
    server.socket = socket.socket(fileno=3)
    server.serve_forever()
elif mode == "never":
    print("waits for something")
    time.sleep(1000)
elif mode == "fork":
    if os.fork() == 0:
        os.setsid()
        open("daemon", "w").write(str(os.getpid()))
        time.sleep(1000)
    while not os.path.exists("daemon"):
        time.sleep(0.01)
    print("is a daemon now")
elif mode == "garbage":
    sys.stdout.buffer.write(b"\x1b[2J\xff\x00\r no line end")
    sys.stdout.flush()
    server = socket.create_server(("127.0.0.1", int(os.environ["PORT"])))
    while True:
        peer, _ = server.accept()
        peer.sendall(b"\x00\xff garbage\r\n\r\n")
        peer.close()
"#;

/// A directory with the application, another one for temporary files, and what `plugrack run` has printed.
struct Place {
    dir: TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("run").tempdir().unwrap();
        for name in ["app", "tmp"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        fs::write(dir.path().join("app/app.py"), APP).unwrap();
        Self { dir }
    }

    fn app(&self) -> PathBuf {
        self.dir.path().join("app")
    }

    /// Runs a command in the application's directory.
    fn run(self, options: &[&str], words: &[&str]) -> Running {
        let file = |name: &str| fs::File::create(self.dir.path().join(name)).unwrap();
        let mut run = command(binary());
        run.arg("run").args(options).arg("--").args(words).current_dir(self.app());
        run.env("TMPDIR", self.dir.path().join("tmp")).env("SECRET", "of this environment").env("PASSED", "on");
        let child = run.stdout(file("out")).stderr(file("err")).spawn().unwrap();
        Running { child: Some(child), place: self }
    }

    /// Runs the application of this page.
    fn run_app(self, options: &[&str], words: &[&str]) -> Running {
        self.run(options, &[&[python(), "app.py"], words].concat())
    }

    fn printed(&self, name: &str) -> String {
        fs::read_to_string(self.dir.path().join(name)).unwrap()
    }

    fn pid(&self, name: &str) -> Option<i64> {
        fs::read_to_string(self.app().join(name)).ok()?.parse().ok()
    }

    #[track_caller]
    fn assert_nothing_left(&self) {
        for pid in ["pid", "daemon"].into_iter().filter_map(|name| self.pid(name)) {
            assert!(!is_alive(pid), "{pid} is alive");
        }
        let left: Vec<_> = fs::read_dir(self.dir.path().join("tmp")).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

/// A `plugrack run` under way. Dropping it kills it.
struct Running {
    child: Option<Child>,
    place: Place,
}

impl Running {
    /// The URL that was printed.
    #[track_caller]
    fn url(&mut self) -> String {
        let (place, child) = (&self.place, self.child.as_mut().unwrap());
        wait_for("the URL", || {
            let (out, ended) = (place.printed("out"), child.try_wait().unwrap());
            assert!(!out.is_empty() || ended.is_none(), "{ended:?}: {}", place.printed("err"));
            out.strip_suffix('\n').map(str::to_owned)
        })
    }

    #[track_caller]
    fn address(&mut self) -> SocketAddr {
        let url = self.url();
        url.strip_prefix("http://").unwrap().split('/').next().unwrap().parse().unwrap()
    }

    #[track_caller]
    fn get(&mut self, target: &str) -> Reply {
        Client::connect(self.address()).get(target)
    }

    /// Waits until something is on standard error.
    #[track_caller]
    fn wait_said(&self, what: &str) -> String {
        wait_for(what, || Some(self.place.printed("err")).filter(|err| err.contains(what)))
    }

    fn signal(&self, name: &str) {
        let pid = self.child.as_ref().unwrap().id().to_string();
        assert!(command("kill").args(["-s", name, &pid]).status().unwrap().success());
    }

    /// Waits for its end.
    #[track_caller]
    fn ended(mut self) -> (ExitStatus, Place) {
        let mut child = self.child.take().unwrap();
        let status = wait_for("the end", || child.try_wait().unwrap());
        (status, Place { dir: std::mem::replace(&mut self.place.dir, tempfile::tempdir().unwrap()) })
    }

    /// Waits for its end, after which nothing must be left: its exit code, and what it has said.
    #[track_caller]
    fn ends(self) -> (i32, String) {
        let (status, place) = self.ended();
        place.assert_nothing_left();
        (status.code().unwrap(), place.printed("err"))
    }

    #[track_caller]
    fn interrupt(self) -> String {
        self.signal("INT");
        let (code, err) = self.ends();
        assert_eq!(code, 0, "{err}");
        err
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap_or_default();
            child.wait().unwrap();
        }
    }
}

/// A port that nobody has, below those that the kernel gives to whoever asks for any.
fn free_port() -> String {
    static TRIED: AtomicU16 = AtomicU16::new(0);
    let first = u16::try_from(std::process::id() % 10_000).unwrap() + 20_000;
    let mut ports = std::iter::repeat_with(|| first + TRIED.fetch_add(1, Ordering::Relaxed));
    ports.find(|port| TcpListener::bind(("0.0.0.0", *port)).is_ok()).unwrap().to_string()
}

#[test]
fn an_application_has_the_whole_host_and_ctrl_c_leaves_nothing() {
    let mut run = Place::new().run_app(&[], &["port", "127.0.0.1", "{port}"]);
    for target in ["/", "/healthz", "/api/plugins", "/a/b?c=d"] {
        assert_eq!(run.get(target).text(), format!("{target} None None None"));
    }
    assert!(run.url().starts_with("http://127.0.0.1:") && run.url().ends_with('/'));
    // By any name.
    let mut client = Client::connect(run.address());
    client.send(b"GET /x HTTP/1.1\r\nhost: other.example\r\n\r\n");
    assert_eq!(client.reply(false).text(), "/x None None None");
    run.wait_said("asked for /a/b?c=d\n");
    let err = run.interrupt();
    assert!(err.starts_with("begins\n") && !err.contains("plugrack"), "{err}");
}

#[test]
fn the_file_server_of_python_is_tried_as_it_is() {
    let place = Place::new();
    fs::write(place.app().join("page.txt"), "of the working directory").unwrap();
    let mut run = place.run(&[], &[python(), "-m", "http.server", "--bind", "127.0.0.1", "{port}"]);
    assert_eq!(run.get("/page.txt").text(), "of the working directory");
    run.interrupt();
}

#[test]
fn an_application_that_takes_the_offered_port_or_socket_needs_no_option() {
    for words in [&["env"][..], &["unix"], &["debugged"]] {
        let mut run = Place::new().run_app(&[], words);
        assert_eq!(run.get("/x").text(), "/x None None None");
        let err = run.interrupt();
        assert!(!err.contains("plugrack"), "{words:?}: {err}");
    }
}

#[test]
fn an_application_may_be_told_where_to_listen() {
    let mut tried = vec![(&["--port"][..], &["env"][..]), (&["--socket"], &["unix"]), (&["--fd"], &["fd"])];
    tried.push((&["--listen", "127.0.0.1:0"], &["unix", "{socket}"]));
    for (options, words) in tried {
        let mut run = Place::new().run_app(options, words);
        assert_eq!(run.get("/x").text(), "/x None None None");
        run.interrupt();
    }
    // It is told so, and does not listen there.
    let (code, err) = Place::new().run_app(&["--socket", "--start-timeout", "3s"], &["env", "PORT"]).ends();
    assert!(code == 1 && err.contains("KeyError: 'PORT'"), "{err}");
    let port = free_port();
    let (code, err) = Place::new().run_app(&["--port", "--start-timeout", "3s"], &["port", "127.0.0.1", &port]).ends();
    assert!(code == 1 && err.contains(&format!("it listens on 127.0.0.1:{port}: give {{port}} or $PORT")), "{err}");
}

#[test]
fn an_application_on_an_address_of_its_own_is_followed_there() {
    let port = free_port();
    let mut run = Place::new().run_app(&[], &["port", "127.0.0.1", &port]);
    assert_eq!(run.get("/x").text(), "/x None None None");
    let err = run.wait_said("requests go there");
    assert!(err.contains(&format!("plugrack: it listens on 127.0.0.1:{port}, which is not $PORT (127.0.0.1:")), "{err}");
    assert!(err.contains("put {port} into its command") && !err.contains("interfaces"), "{err}");
    run.interrupt();

    let port = free_port();
    let mut run = Place::new().run(&[], &[python(), "-m", "http.server", &port]);
    assert_eq!(run.get("/app.py").status, 200);
    let err = run.wait_said("interfaces");
    assert!(err.contains(&format!("(0.0.0.0:{port}), so others on the network reach it directly")), "{err}");
    assert!(err.contains("give http.server the arguments {port} --bind 127.0.0.1"), "{err}");
    run.interrupt();

    let mut run = Place::new().run_app(&[], &["unix", "own.sock"]);
    // A relative path means nothing to the host, so this one is not followed.
    pause(Duration::from_secs(2));
    assert!(run.child.as_mut().unwrap().try_wait().unwrap().is_none());
    run.signal("TERM");
    assert_eq!(run.ends().0, 0);
    let place = Place::new();
    let own = place.app().join("own.sock");
    let mut run = place.run_app(&[], &["unix", own.to_str().unwrap()]);
    assert_eq!(run.get("/x").text(), "/x None None None");
    run.wait_said("own.sock, which is not $PORT");
    run.interrupt();
}

#[test]
fn an_application_below_a_route_does_not_see_it() {
    let mut run = Place::new().run_app(&["--route", "/wiki"], &["env"]);
    assert!(run.url().ends_with("/wiki/"), "{}", run.url());
    assert_eq!(run.get("/wiki/a").text(), "/a /wiki None None");
    assert_eq!(run.get("/wiki").status, 308);
    assert_eq!(run.get("/healthz").text(), "ok\n");
    run.interrupt();
}

#[test]
fn an_application_gets_the_variables_that_are_given() {
    let mut run = Place::new().run_app(&["--env", "GIVEN=at {port}", "--env", "SECRET=none"], &["env"]);
    let port = run.get("/").text().to_owned();
    assert!(port.starts_with("/ None at ") && port.ends_with(" none") && !port.contains('{'), "{port}");
    run.interrupt();
    let mut run = Place::new().run_app(&["--pass-env", "SECRET,PASSED", "--json"], &["env"]);
    let printed: serde_json::Value = serde_json::from_str(&run.url()).unwrap();
    let address = printed["url"].as_str().unwrap().trim_start_matches("http://").trim_end_matches('/').parse().unwrap();
    assert_eq!(Client::connect(address).get("/").text(), "/ None None of this environment");
    assert!(printed["listens"].as_str().unwrap().starts_with("127.0.0.1:"));
    run.interrupt();
}

#[test]
fn an_application_that_listens_on_nothing_is_ended_with_its_last_lines() {
    let (code, err) = Place::new().run_app(&["--start-timeout", "2s"], &["never"]).ends();
    let said = "was ended: it was not ready within 2 s: it listens neither on $PORT (127.0.0.1:";
    let last = "nor on $PLUGRACK_SOCKET, nor on any other address; its last lines:\n    waits for something\n";
    assert!(code == 1 && err.contains(said) && err.ends_with(last), "{code}: {err}");
}

#[test]
fn the_exit_code_is_the_applications() {
    let sh = |script: &str| Place::new().run(&[], &["sh", "-c", script]).ends();
    let (code, err) = sh("echo all is well; echo 'error: no database' >&2; exit 3");
    assert_eq!(code, 3);
    assert!(err.ends_with("plugrack: sh has ended before it listened: exit code 3: error: no database\n"), "{err}");
    let (code, err) = sh("exit 0");
    assert!(code == 1 && err.contains("exit code 0, and it has printed nothing; if it went into the background"), "{err}");
    let (code, err) = sh("kill -9 $$");
    assert!(code == 137 && err.contains("before it listened: killed by signal 9 (SIGKILL)"), "{code} {err}");

    for (target, expected) in [("/exit", 7), ("/kill", 137)] {
        let mut run = Place::new().run_app(&[], &["env"]);
        assert_eq!(run.get(target).status, 502);
        let (code, err) = run.ends();
        assert!(code == expected && err.contains("has ended: "), "{code}: {err}");
    }
}

#[test]
fn an_application_that_forks_away_is_ended_with_its_daemon() {
    let (code, err) = Place::new().run_app(&[], &["fork"]).ends();
    assert_eq!(code, 1);
    let said = "has ended before it listened: exit code 0: is a daemon now; if it went into the background, let it stay";
    assert!(err.contains(said), "{err}");
}

#[test]
fn garbage_harms_neither_the_terminal_nor_a_client() {
    let mut run = Place::new().run_app(&[], &["garbage"]);
    assert_eq!(run.get("/x").status, 502);
    // An unfinished line is printed after a while, and a broken answer is a note.
    let err = run.wait_said("no line end");
    assert!(err.contains("\\x1b[2J\\xff\\x00\\x0d no line end\n"), "{err:?}");
    run.wait_said("plugrack: GET /x");
    run.interrupt();
}

#[test]
fn output_beyond_the_rate_of_a_log_is_shown() {
    let script = "i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done; exit 1";
    let (code, err) = Place::new().run(&[], &["sh", "-c", script]).ends();
    assert_eq!((code, err.lines().count()), (1, 2001), "{err}");
}

#[test]
fn nothing_is_left_however_it_ends() {
    // Twice in a row ends it at once.
    let mut run = Place::new().run_app(&[], &["env"]);
    run.get("/");
    run.signal("INT");
    run.signal("INT");
    gone(&run.ended().1);

    let mut run = Place::new().run_app(&[], &["env"]);
    run.get("/");
    run.signal("KILL");
    let (status, place) = run.ended();
    assert_eq!(status.signal(), Some(9));
    gone(&place);

    // Its terminal is closed.
    let mut run = Place::new().run_app(&[], &["env"]);
    run.get("/");
    run.signal("HUP");
    assert_eq!(run.ends().0, 0);

    // Before it listens; and a home with directories that are read-only.
    let place = Place::new();
    let script = "mkdir -p $HOME/a/b && touch $HOME/a/b/c && chmod -R a-w $HOME/a && echo made && exec sleep 1000";
    let run = place.run(&[], &["sh", "-c", script]);
    run.wait_said("made");
    run.interrupt();
}

/// Waits until nothing is left.
#[track_caller]
fn gone(place: &Place) {
    let tmp = place.dir.path().join("tmp");
    wait_for("the directory to be removed", || (fs::read_dir(&tmp).unwrap().count() == 0).then_some(()));
    wait_for("the application to end", || place.pid("pid").is_none_or(|pid| !is_alive(pid)).then_some(()));
}

#[test]
fn two_at_once_do_not_meet() {
    let mut runs = [Place::new().run_app(&[], &["env"]), Place::new().run_app(&["--route", "/x"], &["unix"])];
    let addresses = [runs[0].address(), runs[1].address()];
    assert_ne!(addresses[0], addresses[1]);
    assert_eq!(runs[0].get("/x/a").text(), "/x/a None None None");
    assert_eq!(runs[1].get("/x/a").text(), "/a /x None None");
    let [one, other] = runs;
    one.interrupt();
    let mut other = other;
    assert_eq!(other.get("/x/a").text(), "/a /x None None");
    other.interrupt();
}

/// Tries the application with `--save`, and then starts a host with its manifest: what that answers on the path `/a`.
#[track_caller]
fn saved(options: &[&str], words: &[&str]) -> (String, String) {
    let site = Site::new();
    let plugins = site.plugins();
    let mut run = Place::new().run_app(&[&["--save", "wiki", "--plugins", plugins.to_str().unwrap()], options].concat(), words);
    run.url();
    let err = run.wait_said("then: plugrack rescan");
    let manifest = fs::read_to_string(plugins.join("wiki/plugrack.toml")).unwrap();
    assert!(err.contains(&format!("wrote {}", plugins.canonicalize().unwrap().join("wiki/plugrack.toml").display())), "{err}");
    manifest.lines().for_each(|line| assert!(err.contains(line), "{line}: {err}"));
    run.signal("INT");
    let (status, place) = run.ended();
    assert!(status.success());
    let server = site.start();
    server.wait_state("wiki", "ready");
    let mut client = server.client();
    let path = if options.contains(&"--route") { "/docs/a" } else { "/a" };
    client.send(format!("GET {path} HTTP/1.1\r\nhost: wiki.localhost\r\n\r\n").as_bytes());
    let reply = if options.contains(&"--route") { server.get(path) } else { client.reply(false) };
    drop(server);
    drop(place);
    (reply.text().to_owned(), manifest)
}

#[test]
fn a_saved_manifest_does_the_same() {
    assert_eq!(saved(&[], &["env"]).0, "/a None None None");
    assert_eq!(saved(&["--env", "GIVEN=it's \"{id}\""], &["unix"]).0, "/a None it's \"wiki\" None");
    assert_eq!(saved(&["--route", "/docs", "--fd"], &["fd"]).0, "/a /docs None None");
    assert_eq!(saved(&["--start-timeout", "30s"], &["port", "127.0.0.1", "{port}"]).0, "/a None None None");
    let port = free_port();
    let (answer, manifest) = saved(&[], &["port", "0.0.0.0", &port]);
    assert_eq!(answer, "/a None None None");
    assert!(manifest.contains("\"0.0.0.0\", \"{port}\"]") && !manifest.contains(&port), "{manifest}");
}

#[test]
fn a_manifest_is_saved_where_it_belongs_and_overwrites_nothing() {
    // Without a plugins directory, beside the application.
    let mut run = Place::new().run_app(&["--save", "wiki"], &["env"]);
    run.url();
    run.wait_said("this directory is a plugin now");
    let manifest = fs::read_to_string(run.place.app().join("plugrack.toml")).unwrap();
    assert!(manifest.contains(&format!("command = [\"{}\", \"app.py\", \"env\"]", python())), "{manifest}");
    run.signal("INT");
    let (_, place) = run.ended();
    let site = Site::new();
    let to = site.plugins().join("wiki");
    fs::rename(place.app(), &to).unwrap();
    let server = site.start();
    server.wait_state("wiki", "ready");
    let data = server.site().data().to_str().unwrap().to_owned();

    // Neither beside the application, nor in the plugins directory of the data directory.
    let refused = |options: &[&str], directory: &Path| {
        let mut run = command(binary());
        run.arg("run").args(options).args(["--", python(), "app.py", "env"]).current_dir(directory);
        let output = run.output().unwrap();
        assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0));
        String::from_utf8(output.stderr).unwrap()
    };
    let other = Place::new();
    let manifest = to.join("plugrack.toml").canonicalize().unwrap();
    for (options, directory) in [(&["--save", "wiki"][..], &to), (&["--data", &data, "--save", "wiki"], &to)] {
        let err = refused(options, directory);
        assert!(err.contains(&format!("{} exists already, and is not overwritten", manifest.display())), "{err}");
    }
    let err = refused(&["--data", &data, "--save", "wiki"], &other.app());
    assert!(err.contains("wiki exists already, and is not overwritten"), "{err}");
    let err = refused(&["--plugins", "/nowhere", "--save", "wiki"], &other.app());
    assert!(err.contains("there is no plugins directory /nowhere"), "{err}");
    let err = refused(&["--save", "Wiki"], &other.app());
    assert!(err.contains("id \"Wiki\" is not valid"), "{err}");
}

#[test]
fn what_cannot_be_saved_is_said() {
    let port = free_port();
    let place = Place::new();
    fs::write(place.app().join("start.sh"), format!("exec {} app.py port 127.0.0.1 {port}", python())).unwrap();
    let mut run = place.run(&["--save", "wiki"], &["sh", "start.sh"]);
    assert_eq!(run.get("/x").text(), "/x None None None");
    run.wait_said(&format!("wiki was not saved: it listens on 127.0.0.1:{port} whatever $PORT is"));
    assert!(!run.place.app().join("plugrack.toml").exists());
    run.interrupt();
}

#[test]
fn mistakes_are_one_sentence() {
    for (options, words, said) in [
        (&[][..], &["nosuch-command"][..], "nosuch-command was not started: there is no command nosuch-command in PATH"),
        (&[], &["./app.py"], "./app.py was not started: cannot run ./app.py"),
        (&[], &["sh", "{port}", "{socket}"], "told to listen in two places, port and socket"),
        (&["--fd"], &["sh", "{port}"], "told to listen in two places, port and fd"),
        (&[], &["sh", "{name}"], "{name} is no placeholder: these are {socket}"),
        (&["--route", "/api"], &["sh"], "the route /api belongs to the host"),
        (&["--route", "wiki"], &["sh"], "route \"wiki\" is not valid"),
    ] {
        let (code, err) = Place::new().run(options, words).ends();
        assert!(code == 1 && err.contains(said) && err.lines().count() == 1, "{code}: {err}");
    }
    for arguments in
        [&["run"][..], &["run", "--port", "--fd", "x"], &["run", "--env", "A", "x"], &["run", "--env", "HOME=/", "x"]]
    {
        let output = command(binary()).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// The words of a command need no `--` before them.
#[test]
fn options_of_the_command_are_its_own() {
    let place = Place::new();
    let mut run = command(binary());
    run.args(["run", "sh", "-c", "echo $0; exit 5", "--json"]).current_dir(place.app());
    let output = run.output().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(5) && err.starts_with("--json\n"), "{err}");
}
