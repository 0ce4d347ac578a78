//! What is deployed, in places as bare and as harsh as those it is deployed to.

use crate::docs::blocks_in;
use crate::support::http::Client;
use crate::support::{Guarded, Site, command, is_alive, static_build, wait_for, write_file};
use serde_json::Value;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;

/// The page with the scripts that are run here.
const PAGE: &str = "docs/operations.md";

/// The directory of the host's data in the image of [`PAGE`].
const DATA: &str = "data";

/// Whether the tests run as root.
fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Where a host says it listens.
fn address(data: &Path) -> Option<SocketAddr> {
    fs::read_to_string(data.join("run/listen")).ok()?.trim().parse().ok()
}

/// An operator's command that gives JSON.
#[track_caller]
fn operate(data: &Path, arguments: &[&str]) -> Value {
    let output = command(static_build().join("plugrack")).arg("--data").arg(data).args(arguments).arg("--json").output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The process of a plugin that is ready.
#[track_caller]
fn pid(data: &Path, id: &str) -> i64 {
    wait_for(&format!("{id} to be ready"), || {
        let plugin = operate(data, &["show", id]);
        (plugin["state"] == "ready").then(|| plugin["process"]["pid"].as_i64().unwrap())
    })
}

/// The image of the page's Dockerfile, as a directory, and what runs in it.
struct Image {
    root: TempDir,
    command: Vec<String>,
}

impl Image {
    fn build() -> Self {
        let root = tempfile::tempdir().unwrap();
        let mut program = Vec::new();
        for line in blocks_in(PAGE, "dockerfile").remove(0).lines() {
            match line.split_once(' ').unwrap() {
                ("COPY", paths) => {
                    let (from, to) = paths.split_once(' ').unwrap();
                    let to = root.path().join(&to[1..]);
                    fs::create_dir_all(to.parent().unwrap()).unwrap();
                    fs::copy(static_build().join(from.strip_prefix("dist/").unwrap()), to).unwrap();
                }
                ("VOLUME", path) => fs::create_dir(root.path().join(&path[1..])).unwrap(),
                ("ENTRYPOINT" | "CMD", words) => program.extend(serde_json::from_str::<Vec<String>>(words).unwrap()),
                ("FROM", "scratch") | ("EXPOSE", _) => {}
                _ => panic!("what does this do: {line}"),
            }
        }
        let command = program.into_iter().map(|word| word.replace("0.0.0.0:8080", "127.0.0.1:0")).collect();
        Self { root, command }
    }

    /// The command that runs it.
    fn run(&self, place: &Place) -> Command {
        let mut run = place.shell(self.root.path(), r#"exec chroot "$@""#);
        run.args(&self.command);
        run
    }
}

/// How a root is made for a process: with which rights, and what is done before it is entered.
struct Place {
    unshare: &'static [&'static str],
    setup: &'static str,
}

impl Place {
    fn bare() -> Self {
        Self { unshare: if is_root() { &[] } else { &["-r"] }, setup: "" }
    }

    fn with_proc() -> Self {
        let unshare = if is_root() { &["-m"] } else { &["-rm"] };
        Self { unshare, setup: r#"mkdir "$1/proc"; mount --rbind /proc "$1/proc";"# }
    }

    /// Whether this system allows it; where not, the reason is printed.
    fn is_allowed(&self) -> bool {
        let output = self.shell(tempfile::tempdir().unwrap().path(), "chroot / true").output().unwrap();
        if !output.status.success() {
            eprintln!("skipped, since this system allows no such root: {}", String::from_utf8_lossy(&output.stderr));
        }
        output.status.success()
    }

    /// A shell that makes the root and runs `then`, with the root as its first argument.
    fn shell(&self, root: &Path, then: &str) -> Command {
        let mut shell = command(if self.unshare.is_empty() { "sh" } else { "unshare" });
        if !self.unshare.is_empty() {
            shell.args(self.unshare).arg("sh");
        }
        shell.args(["-euc", &format!("{} {then}", self.setup), "sh"]).arg(root);
        shell
    }
}

#[test]
fn the_static_binary_alone_serves_from_an_empty_root_with_and_without_proc() {
    for (place, has_proc) in [(Place::bare(), false), (Place::with_proc(), true)] {
        if !place.is_allowed() {
            continue;
        }
        let image = Image::build();
        let (root, data) = (image.root.path(), image.root.path().join(DATA));
        let log = fs::File::create(root.join("log")).unwrap();
        let mut host = Guarded(image.run(&place).stdout(Stdio::null()).stderr(log).spawn().unwrap());
        let log = || fs::read_to_string(root.join("log")).unwrap();
        let at = wait_for("the host to listen", || {
            assert!(host.0.try_wait().unwrap().is_none(), "{}", log());
            address(&data)
        });
        let first = pid(&data, "hello");
        assert_eq!(Client::connect(at).get("/hello").text(), "Hello, world!");
        assert_eq!(log().contains("there is no /proc: plugins are started by /plugrack"), !has_proc, "{}", log());
        assert!(!log().contains("panicked"), "{}", log());

        // With /proc the program is found again even when there is nothing left at its path.
        if has_proc {
            fs::remove_file(root.join("plugrack")).unwrap();
        }
        operate(&data, &["restart", "hello"]);
        let second = pid(&data, "hello");
        assert!(first != second && !is_alive(first) && is_alive(second));
        assert_eq!(Client::connect(at).get("/hello/again").text(), "Hello, again!");

        let host_pid = host.0.id().to_string();
        assert!(command("kill").args(["-s", "TERM", &host_pid]).status().unwrap().success());
        let status = wait_for("the host to stop", || host.0.try_wait().unwrap());
        assert_eq!(status.code(), Some(0), "{}", log());
        assert!(!is_alive(second));
        assert_eq!(fs::read_dir(data.join("run")).unwrap().count(), 0);
    }
}

#[test]
fn a_host_that_cannot_find_its_own_program_says_so() {
    // Executed by its file descriptor, a program has no path.
    const BY_DESCRIPTOR: &str = r#"exec python3 -c '
import os, sys
program = os.open(sys.argv[1] + sys.argv[2], os.O_RDONLY)
os.chroot(sys.argv[1])
os.execve(program, sys.argv[2:], {})' "$@""#;
    let place = Place::bare();
    if place.is_allowed() {
        let image = Image::build();
        let output = place.shell(image.root.path(), BY_DESCRIPTOR).args(&image.command).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.starts_with("plugrack: /proc/self/exe is missing") && said.ends_with(": mount /proc\n"), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}

/// A service directory under a supervisor of its own, both gone at the end.
struct Service {
    dir: PathBuf,
    supervisor: Child,
}

impl Service {
    fn start(dir: PathBuf) -> Self {
        let supervisor = command("runsv").arg(&dir).spawn();
        let supervisor = supervisor.unwrap_or_else(|error| panic!("runit is not to be had ({error}): `make test` installs it"));
        let service = Self { dir, supervisor };
        wait_for("the supervisor to begin", || service.dir.join("log/supervise/ok").exists().then_some(()));
        service
    }

    #[track_caller]
    fn sv(&self, what: &str) {
        let output = command("sv").arg(what).arg(&self.dir).output().unwrap();
        assert!(output.status.success(), "sv {what}: {}", String::from_utf8_lossy(&output.stdout));
    }

    /// The host's process id, once it listens.
    fn host(&self, data: &Path, other_than: i64) -> i64 {
        wait_for("the supervised host to listen", || {
            let pid = fs::read_to_string(self.dir.join("supervise/pid")).ok()?.trim().parse().ok()?;
            (pid != other_than && address(data).is_some_and(|at| std::net::TcpStream::connect(at).is_ok())).then_some(pid)
        })
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // Kills what has not ended after its time.
        command("sv").arg("force-shutdown").arg(&self.dir).output().unwrap();
        self.supervisor.kill().unwrap_or_default();
        self.supervisor.wait().unwrap();
    }
}

#[test]
fn a_real_runit_supervises_it_by_the_scripts_of_the_operations_page() {
    let site = Site::new().example("hello");
    let data = site.data();
    let (dir, logs) = (data.join("sv"), data.join("sv-log"));
    fs::create_dir_all(dir.join("log")).unwrap();
    fs::create_dir(&logs).unwrap();
    let user = if is_root() { "chpst -u root " } else { "" };
    let scripts = blocks_in(PAGE, "sh").into_iter().filter(|block| block.starts_with("#!"));
    for (script, path) in scripts.zip(["run", "log/run"]) {
        let mut here = script.clone();
        for (there, to) in [
            ("chpst -u plugrack ", user),
            ("/usr/local/bin/plugrack", crate::support::binary().to_str().unwrap()),
            ("/var/lib/plugrack", data.to_str().unwrap()),
            ("/var/log/plugrack", logs.to_str().unwrap()),
            ("127.0.0.1:8080", "127.0.0.1:0"),
        ] {
            here = here.replace(there, to);
        }
        write_file(&dir.join(path), here.as_bytes(), 0o755);
    }
    let logged = |what: &str| fs::read_to_string(logs.join("current")).is_ok_and(|log| log.contains(what)).then_some(());
    let greets = || assert_eq!(Client::connect(address(data).unwrap()).get("/hello").text(), "Hello, world!");

    let service = Service::start(dir);
    let first = service.host(data, 0);
    let plugin = pid(data, "hello");
    greets();
    wait_for("the host's log", || logged("listening on http://"));

    service.sv("restart");
    let second = service.host(data, first);
    assert!(!is_alive(first) && !is_alive(plugin));
    wait_for("the end of the first in the log", || logged("stopped"));
    let plugin = pid(data, "hello");
    greets();

    // The next host says where it listens; what the killed one has said is not to be taken for that.
    fs::remove_file(data.join("run/listen")).unwrap();
    assert!(command("kill").args(["-s", "KILL", &second.to_string()]).status().unwrap().success());
    let third = service.host(data, second);
    wait_for("the killed host's plugin to end", || (!is_alive(plugin)).then_some(()));
    let plugin = pid(data, "hello");
    greets();

    service.sv("down");
    wait_for("the host and its plugin to end", || (!is_alive(third) && !is_alive(plugin)).then_some(()));
    assert!(address(data).is_none());
    service.sv("up");
    service.host(data, third);
    pid(data, "hello");
    greets();
}
