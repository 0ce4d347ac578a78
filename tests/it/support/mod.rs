//! A real host in a directory of its own, and what a test needs to talk to it.

pub(crate) mod browser;
pub(crate) mod http;
pub(crate) mod siege;
pub(crate) mod strain;
pub(crate) mod tls;
pub(crate) mod websocket;

use http::{Client, Reply};
use serde_json::{Value, json};
use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{OnceLock, mpsc};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long anything is waited for: far beyond what it takes, so that a slow machine fails no test.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Arguments for a crowd of clients that all come from one address.
pub(crate) const CROWD: [&str; 6] =
    ["--max-connections", "2048", "--max-connections-per-address", "512", "--max-connections-per-plugin", "100%"];

/// The binary under test.
pub(crate) fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_plugrack"))
}

/// The repository.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Waits until `check` gives something.
#[track_caller]
pub(crate) fn wait_for<T>(what: &str, check: impl FnMut() -> Option<T>) -> T {
    wait_within(PATIENCE, what, check)
}

/// Waits until `check` gives something, for what takes longer than most.
#[track_caller]
pub(crate) fn wait_within<T>(time: Duration, what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + time;
    loop {
        if let Some(value) = check() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited too long for {what}");
        pause(Duration::from_millis(10));
    }
}

/// Ten uids that no account has and no other test, in this run or in another: a host kills what runs under its plugins' uids.
pub(crate) fn uids() -> RangeInclusive<u32> {
    const FIRST: u32 = 0x1000_0000;
    const OF_A_RUN: u32 = 0x1000;
    static TAKEN: AtomicU32 = AtomicU32::new(0);
    let taken = TAKEN.fetch_add(10, Ordering::Relaxed);
    assert!(taken + 10 <= OF_A_RUN, "the uids of a run are used up");
    let first = FIRST + std::process::id() % 0x4000 * OF_A_RUN + taken;
    first..=first + 9
}

/// Such a range as an argument.
pub(crate) fn range(uids: &RangeInclusive<u32>) -> String {
    format!("{}-{}", uids.start(), uids.end())
}

/// Lets time pass, where time itself is what the test needs.
pub(crate) fn pause(time: Duration) {
    #[expect(clippy::disallowed_methods, reason = "the one place where tests wait")]
    std::thread::sleep(time);
}

/// A command with nothing of the tests' environment but the path, and the place for temporary files.
pub(crate) fn command(program: impl AsRef<std::ffi::OsStr>) -> Command {
    #[expect(clippy::disallowed_methods, reason = "the one place where tests start processes")]
    let mut command = Command::new(program);
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default()).stdin(Stdio::null());
    command.env("TMPDIR", std::env::temp_dir());
    command
}

/// Cargo, in the repository.
pub(crate) fn cargo() -> Command {
    builder(env!("CARGO"))
}

/// A command that builds, in the repository.
fn builder(program: &str) -> Command {
    let mut builder = command(program);
    for name in ["HOME", "CARGO_HOME", "RUSTUP_HOME", "RUSTUP_TOOLCHAIN"] {
        builder.envs(std::env::var_os(name).map(|value| (name, value)));
    }
    builder.current_dir(root());
    builder
}

/// The `hello` example, built.
pub(crate) fn hello() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| rust_example("hello")).clone()
}

/// The `licensed-rust` example, built.
pub(crate) fn licensed_rust() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| rust_example("licensed-rust")).clone()
}

fn rust_example(name: &str) -> PathBuf {
    built(&["--package", name], name)
}

/// The plugin in `tests/fixtures/meeting.rs`, built.
pub(crate) fn meeting() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| built(&["--example", "meeting"], "examples/meeting")).clone()
}

/// The plugin in `tests/fixtures/cancelled.rs`, built.
pub(crate) fn cancelled() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| built(&["--example", "cancelled"], "examples/cancelled")).clone()
}

/// The plugin in `tests/fixtures/echo_socket.rs`, built.
pub(crate) fn echo_socket() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| built(&["--example", "echo_socket"], "examples/echo_socket")).clone()
}

fn built(what: &[&str], file: &str) -> PathBuf {
    let target = binary().parent().and_then(Path::parent).unwrap();
    let build = cargo().args(["build", "--quiet"]).args(what).arg("--target-dir").arg(target).status();
    assert!(build.unwrap().success());
    target.join("debug").join(file)
}

/// The directory with what `make release` makes, built without optimizations and debug information, which is sooner done.
pub(crate) fn static_build() -> PathBuf {
    static BUILT: OnceLock<()> = OnceLock::new();
    let dist = Path::new(env!("CARGO_TARGET_TMPDIR")).join("static");
    BUILT.get_or_init(|| {
        let target = binary().parent().and_then(Path::parent).unwrap();
        let mut make = builder("make");
        make.args(["--silent", "release", "PROFILE=dev"]).arg(format!("DIST={}", dist.display()));
        make.env("CARGO", env!("CARGO")).env("CARGO_TARGET_DIR", target).env("CARGO_PROFILE_DEV_DEBUG", "0");
        let output = make.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    });
    dist
}

/// Copies a directory's files, with their modes and links, into a new directory.
pub(crate) fn copy_dir(from: &Path, to: &Path) {
    let status = command("cp").arg("-a").arg(from).arg(to).status().unwrap();
    assert!(status.success());
}

/// Copies a program with its mode, by another process: a child of this process that starts meanwhile would inherit the file as open for
/// writing, and until it has closed that the program cannot be executed (ETXTBSY).
pub(crate) fn copy_program(from: impl AsRef<OsStr>, to: impl AsRef<OsStr>) {
    assert!(command("cp").arg("--").arg(from).arg(to).status().unwrap().success());
}

/// A process of the test's own, ended with it.
pub(crate) struct Guarded(pub(crate) Child);

impl Drop for Guarded {
    fn drop(&mut self) {
        self.0.kill().unwrap_or_default();
        self.0.wait().unwrap();
    }
}

/// Metadata of a fake plugin.
pub(crate) fn metadata(id: &str) -> Value {
    json!({"id": id, "name": id, "version": "1.0.0", "icon": "🧪", "route": format!("/{id}"), "concurrency": 4})
}

/// A directory for a host, before it is started.
pub(crate) struct Site {
    dir: TempDir,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
}

impl Site {
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("rack").tempdir().unwrap();
        fs::create_dir(dir.path().join("plugins")).unwrap();
        Self { dir, arguments: Vec::new(), environment: Vec::new() }
    }

    /// A data directory whose path has so many bytes.
    pub(crate) fn with_path_of(length: usize) -> Self {
        let prefix = "r".repeat(length - std::env::temp_dir().as_os_str().len() - "/".len() - 6);
        let dir = tempfile::Builder::new().prefix(&prefix).rand_bytes(6).tempdir().unwrap();
        assert_eq!(dir.path().as_os_str().len(), length);
        fs::create_dir(dir.path().join("plugins")).unwrap();
        Self { dir, arguments: Vec::new(), environment: Vec::new() }
    }

    /// Further arguments of `plugrack serve`.
    pub(crate) fn args(mut self, arguments: &[&str]) -> Self {
        self.arguments.extend(arguments.iter().map(|&argument| argument.to_owned()));
        self
    }

    /// A variable in the host's environment.
    pub(crate) fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The host's data directory.
    pub(crate) fn data(&self) -> &Path {
        self.dir.path()
    }

    /// The plugins directory.
    pub(crate) fn plugins(&self) -> PathBuf {
        self.dir.path().join("plugins")
    }

    /// Installs a fake plugin that behaves, of which the path of a request decides what it does.
    pub(crate) fn fake(self, id: &str) -> Self {
        self.fake_with(id, &json!({"metadata": metadata(id)}))
    }

    /// Installs a fake plugin that starts in some mode.
    pub(crate) fn fake_mode(self, id: &str, mode: &str) -> Self {
        self.fake_with(id, &json!({"metadata": metadata(id), "mode": mode}))
    }

    /// Installs a fake plugin that the host has one connection to.
    pub(crate) fn fake_of_one_connection(self, id: &str) -> Self {
        let mut metadata = metadata(id);
        metadata["concurrency"] = json!(1);
        self.fake_with(id, &json!({"metadata": metadata}))
    }

    /// Installs a fake plugin with all its settings, see `tests/fixtures/fake_plugin.py`.
    pub(crate) fn fake_with(self, file: &str, settings: &Value) -> Self {
        install_fake(&self.plugins(), file, settings);
        self
    }

    /// Installs an example as `make run` does.
    pub(crate) fn example(self, name: &str) -> Self {
        let to = self.plugins().join(name);
        let built = match name {
            "hello" => Some(hello()),
            "licensed-rust" => Some(licensed_rust()),
            _ => None,
        };
        if let Some(program) = built {
            copy_program(program, to);
            return self;
        }
        copy_dir(&root().join("plugins-examples").join(name), &to);
        for (folder, sdk) in [("python", "plugrack.py"), ("node", "plugrack.mjs")] {
            fs::copy(root().join("sdk").join(folder).join(sdk), to.join(sdk)).unwrap();
        }
        self
    }

    /// Puts a file in the plugins directory.
    pub(crate) fn file(self, name: &str, content: &[u8], mode: u32) -> Self {
        write_file(&self.plugins().join(name), content, mode);
        self
    }

    /// The command that serves this directory, on a free port unless its arguments say otherwise.
    pub(crate) fn serve(&self) -> Command {
        let mut serve = command(binary());
        serve.arg("serve");
        if !self.arguments.iter().any(|argument| argument == "--listen") {
            serve.args(["--listen", "127.0.0.1:0"]);
        }
        serve.arg("--data").arg(self.data()).args(&self.arguments);
        serve.envs(self.environment.iter().map(|(name, value)| (name, value)));
        serve
    }

    /// Starts the host and waits until it listens and all its plugins are known.
    #[track_caller]
    pub(crate) fn start(self) -> Server {
        let serve = self.serve();
        self.start_as(serve)
    }

    /// Starts the host by a command of the test's own, which must serve this directory, and waits until all its plugins are known.
    #[track_caller]
    pub(crate) fn start_as(self, serve: Command) -> Server {
        let before = fs::read_to_string(self.data().join("host.log")).unwrap_or_default().len();
        let server = self.listen_as(serve);
        let known = || server.log()[before..].contains("scanned the plugins directory").then_some(());
        wait_for("the host to look for plugins", known);
        server
    }

    /// Starts the host by a command of the test's own, which must serve this directory, and waits until it listens.
    #[track_caller]
    pub(crate) fn listen_as(self, mut serve: Command) -> Server {
        let log = fs::File::options().create(true).append(true).open(self.data().join("host.log")).unwrap();
        let mut arguments = serve.get_args().skip_while(|argument| *argument != "--run").skip(1);
        let run = arguments.next().map_or_else(|| self.data().join("run"), PathBuf::from);
        let listen = run.join("listen");
        // A host that was killed has left its own.
        fs::remove_file(&listen).unwrap_or_default();
        let mut child = serve.stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let address = wait_for("the host to listen", || {
            if let Some(status) = child.try_wait().unwrap() {
                panic!("the host ended with {status}: {}", fs::read_to_string(self.data().join("host.log")).unwrap_or_default());
            }
            fs::read_to_string(&listen).ok().map(|address| address.trim().to_owned())
        });
        let listening = match address.strip_prefix("unix:") {
            Some(path) => ServerAddress::Unix(path.into()),
            None => ServerAddress::Tcp(address.parse().unwrap()),
        };
        Server { site: Some(self), child: Some(child), listening, run }
    }

    /// Runs the host to its end, which must come by itself: its exit status and log.
    pub(crate) fn run_to_end(&self) -> Output {
        self.serve().output().unwrap()
    }

    /// Runs an operator's command.
    pub(crate) fn cli(&self, arguments: &[&str]) -> Output {
        command(binary()).arg("--data").arg(self.data()).args(arguments).output().unwrap()
    }
}

/// A plugin that is a shell script: it answers `--metadata`, and runs `run` otherwise.
pub(crate) fn script(metadata: &Value, run: &str) -> String {
    format!("#!/bin/sh\nif [ \"$1\" = --metadata ]; then printf '%s' '{metadata}'; exit; fi\n{run}\n")
}

/// Installs a fake plugin, or replaces it.
pub(crate) fn install_fake(plugins: &Path, file: &str, settings: &Value) {
    let dir = plugins.join(file);
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("fake.json"), settings.to_string()).unwrap();
    let program = fs::read_to_string(root().join("tests/fixtures/fake_plugin.py")).unwrap();
    write_file(&dir.join("plugin"), program.replacen("/usr/bin/env python3", python(), 1).as_bytes(), 0o755);
}

/// A Python for plugins: one that every user can reach, unlike one in somebody's home, or else the one in the path itself, where there may
/// be a script that starts it slowly, with variables of its own.
pub(crate) fn python() -> &'static str {
    static FOUND: OnceLock<String> = OnceLock::new();
    FOUND.get_or_init(|| {
        if let Some(python) = ["/usr/bin/python3", "/usr/local/bin/python3"].into_iter().find(|path| Path::new(path).exists()) {
            return python.into();
        }
        let found = command("python3").args(["-c", "import sys; print(sys.executable, end='')"]).output().unwrap();
        String::from_utf8(found.stdout).unwrap()
    })
}

/// Data of so many bytes, as the fake plugin's `/download` makes it. A block begins with how much is left, so that none can be
/// lost, doubled or out of order without being noticed.
pub(crate) fn blocks(bytes: u64) -> impl Iterator<Item = Vec<u8>> {
    let pattern: Vec<u8> = (0..=255).cycle().take(256 << 10).collect();
    let mut left = bytes;
    std::iter::from_fn(move || {
        let mut block = pattern.clone();
        block[..8].copy_from_slice(&left.to_be_bytes());
        block.truncate(usize::try_from(left).unwrap_or(usize::MAX));
        left -= block.len() as u64;
        (!block.is_empty()).then_some(block)
    })
}

/// Writes a file by renaming, so that a replaced one is another file.
pub(crate) fn write_file(path: &Path, content: &[u8], mode: u32) {
    let fresh = path.with_extension("fresh");
    fs::write(&fresh, content).unwrap();
    fs::set_permissions(&fresh, fs::Permissions::from_mode(mode)).unwrap();
    fs::rename(fresh, path).unwrap();
}

/// Where a host listens.
pub(crate) enum ServerAddress {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// A running host. Dropping it kills it.
pub(crate) struct Server {
    site: Option<Site>,
    child: Option<Child>,
    listening: ServerAddress,
    /// Where its sockets are.
    run: PathBuf,
}

impl Server {
    /// Its directory.
    pub(crate) fn site(&self) -> &Site {
        self.site.as_ref().unwrap()
    }

    /// The TCP address it listens at.
    #[track_caller]
    pub(crate) fn address(&self) -> SocketAddr {
        match &self.listening {
            ServerAddress::Tcp(address) => *address,
            ServerAddress::Unix(path) => panic!("it listens at {}", path.display()),
        }
    }

    /// The host's process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// The host's open files and threads, but for the connections to the database: up to four of them are kept for reading.
    pub(crate) fn held(&self) -> [usize; 2] {
        ["fd", "task"].map(|what| {
            let entries = fs::read_dir(format!("/proc/{}/{what}", self.pid())).unwrap();
            let is_database = |path: &Path| fs::read_link(path).is_ok_and(|file| file.to_string_lossy().contains("/plugrack.db"));
            entries.filter(|entry| !is_database(&entry.as_ref().unwrap().path())).count()
        })
    }

    /// In how many files the host keeps bodies of requests: such have no name any more, and were in its run directory.
    pub(crate) fn spooled(&self) -> usize {
        let run = self.site().data().join("run");
        let files = fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap();
        // One that was closed meanwhile is none.
        let links = files.flatten().filter_map(|file| fs::read_link(file.path()).ok());
        links.filter(|link| link.starts_with(&run) && link.to_string_lossy().ends_with(" (deleted)")).count()
    }

    /// Bytes of memory the host has, by the name of the line in its `/proc/PID/status`: `VmRSS` is what it has now, `VmHWM` the most
    /// it has had.
    pub(crate) fn memory(&self, name: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim_matches(|c: char| !c.is_ascii_digit()).parse::<u64>().unwrap() << 10
    }

    /// What the host has logged.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.site().data().join("host.log")).unwrap()
    }

    /// A client with a connection of its own.
    pub(crate) fn client(&self) -> Client {
        match &self.listening {
            ServerAddress::Tcp(address) => Client::connect(*address),
            ServerAddress::Unix(path) => Client::connect_unix(path),
        }
    }

    /// One GET on a connection of its own.
    #[track_caller]
    pub(crate) fn get(&self, path: &str) -> Reply {
        self.client().get(path)
    }

    /// One request on a connection of its own.
    #[track_caller]
    pub(crate) fn request(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
        self.client().request(method, path, headers, body)
    }

    /// Waits until a plugin's log has all of `lines` in it.
    #[track_caller]
    pub(crate) fn wait_logged(&self, id: &str, lines: &[&str]) {
        let path = self.site().data().join(format!("logs/{id}.log"));
        for line in lines {
            let logged = || fs::read_to_string(&path).is_ok_and(|log| log.contains(line)).then_some(());
            wait_for(&format!("{line:?} in the log of {id}"), logged);
        }
    }

    /// A call of the operator's API, by the socket of the operator's commands: its status and JSON.
    #[track_caller]
    pub(crate) fn api(&self, method: &str, path: &str, body: &[u8]) -> (u16, Value) {
        let token = fs::read_to_string(self.site().data().join("admin-token")).unwrap();
        let mut client = Client::connect_unix(&self.run.join("api.sock"));
        let reply =
            client.request(method, &format!("/api{path}"), &[("authorization", &format!("Bearer {}", token.trim()))], body);
        (reply.status, serde_json::from_slice(&reply.body).unwrap())
    }

    /// An operator's command: its output, which must be that of success.
    #[track_caller]
    pub(crate) fn cli(&self, arguments: &[&str]) -> String {
        let output = self.site().cli(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// `plugrack logs -f`, with these arguments.
    pub(crate) fn follow_log(&self, arguments: &[&str]) -> Follow {
        let mut follow = command(binary());
        follow.arg("--data").arg(self.site().data()).args(["logs", "-f"]).args(arguments);
        let mut child = follow.stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (sender, received) = mpsc::channel();
        let reading = std::thread::Builder::new().spawn(move || {
            while let Some(Ok(line)) = lines.next() {
                sender.send(line).unwrap();
            }
        });
        Follow { child, received, reading: reading.unwrap() }
    }

    /// An operator's command that must fail: what it complains of.
    #[track_caller]
    pub(crate) fn cli_fails(&self, arguments: &[&str]) -> String {
        let output = self.site().cli(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    /// A plugin as the API shows it.
    #[track_caller]
    pub(crate) fn plugin(&self, id: &str) -> Value {
        self.api("GET", &format!("/plugins/{id}"), b"").1
    }

    /// Waits until a plugin is in a state.
    #[track_caller]
    pub(crate) fn wait_state(&self, id: &str, state: &str) -> Value {
        let mut last = Value::Null;
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            last = self.plugin(id);
            if last["state"] == state {
                return last;
            }
            pause(Duration::from_millis(10));
        }
        panic!("{id} is not {state}: {last:#}\n{}", self.log());
    }

    /// Waits until a plugin is ready in another process than that of `pid`.
    #[track_caller]
    pub(crate) fn wait_restarted(&self, id: &str, pid: i64) -> Value {
        wait_for("another process of the plugin", || {
            let plugin = self.plugin(id);
            (plugin["state"] == "ready" && plugin["process"]["pid"] != pid).then_some(plugin)
        })
    }

    /// Sends the host a signal, by name.
    pub(crate) fn signal(&self, name: &str) {
        let status = command("kill").args(["-s", name, &self.pid().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// Stops the host by SIGTERM and gives its exit status and its directory.
    #[track_caller]
    pub(crate) fn stop(self) -> (ExitStatus, Site) {
        self.signal("TERM");
        self.ended()
    }

    /// Waits until the host, which was told to, has ended, and gives its exit status and its directory.
    #[track_caller]
    pub(crate) fn ended(mut self) -> (ExitStatus, Site) {
        let mut child = self.child.take().unwrap();
        let status = wait_for("the host to stop", || child.try_wait().unwrap());
        (status, self.site.take().unwrap())
    }

    /// Kills the host and gives its directory.
    pub(crate) fn kill(mut self) -> Site {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        self.site.take().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        if let Some(site) = &self.site
            && std::thread::panicking()
        {
            let mut log = String::new();
            fs::File::open(site.data().join("host.log")).unwrap().read_to_string(&mut log).unwrap();
            eprintln!("the host's log:\n{log}");
        }
    }
}

/// A log that is followed.
pub(crate) struct Follow {
    child: Child,
    received: mpsc::Receiver<String>,
    reading: std::thread::JoinHandle<()>,
}

impl Follow {
    /// The text of the next line, without its time.
    #[track_caller]
    pub(crate) fn next(&self) -> String {
        self.received.recv_timeout(PATIENCE).unwrap().split_once(' ').unwrap().1.to_owned()
    }

    /// Ends the command.
    pub(crate) fn end(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.reading.join().unwrap();
    }
}

/// Whether a process is there and not a zombie.
pub(crate) fn is_alive(pid: i64) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with(['Z', 'X']))
}
