//! Sockets and locks outside the data directory (`--run`): commands find the host, and no two hosts ever run on one data directory.

use crate::support::http::Client;
use crate::support::{Server, Site, binary, command, wait_for};
use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tempfile::TempDir;

/// A place for run directories.
fn place() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn serve(site: &Site, run: Option<&Path>) -> Command {
    let mut serve = site.serve();
    if let Some(run) = run {
        serve.arg("--run").arg(run);
    }
    serve
}

#[track_caller]
fn start(site: Site, run: Option<&Path>) -> Server {
    let serve = serve(&site, run);
    let server = site.start_as(serve);
    server.wait_state("p", "ready");
    server
}

/// What a host that must refuse to start complains of, in one line.
#[track_caller]
fn refused(site: &Site, run: Option<&Path>) -> String {
    let serve = serve(site, run);
    let mut bounded = command("timeout");
    bounded.args(["--kill-after=5", "60"]).arg(binary()).args(serve.get_args());
    one_sentence(&bounded.output().unwrap())
}

#[track_caller]
fn one_sentence(output: &Output) -> String {
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!((output.status.code(), text.lines().count()), (Some(1), 1), "{text}");
    text
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

fn run_dir_file(site: &Site) -> PathBuf {
    site.data().join("run-dir")
}

#[track_caller]
fn is_found(server: &Server) {
    assert!(server.cli(&["list"]).contains("ready"));
    assert_eq!(server.get("/p/x").status, 200);
}

#[test]
fn a_data_directory_with_a_long_path_is_served_with_a_run_directory_and_refused_without_by_a_sentence_that_names_it() {
    let place = place();
    let run = place.path().join("a/b");
    let site = Site::with_path_of(150).fake("p");
    let complaint = refused(&site, None);
    assert!(complaint.contains("the system's limit of 107") && complaint.contains("--run"), "{complaint}");
    let server = start(site, Some(&run));
    is_found(&server);
    assert_eq!(mode(&run), 0o700);
    for name in ["host.sock", "api.sock", "listen", "lock", "p.d/sock"] {
        assert!(run.join(name).exists(), "{name}");
    }
    let file = run_dir_file(server.site());
    assert_eq!((fs::read_to_string(&file).unwrap(), mode(&file)), (format!("{}\n", run.display()), 0o600));
    // A change by the plugin needs the host's socket.
    assert_eq!(server.api("PUT", "/plugins/p/kv/k", b"value").0, 200);
    let (status, site) = server.stop();
    assert!(status.success());
    let left: Vec<_> = fs::read_dir(&run).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| name == "lock" || name == ".plugrack"), "{left:?}");
    let said = String::from_utf8(site.cli(&["list"]).stderr).unwrap();
    assert!(said.contains("no host runs on this data directory"), "{said}");
    // As after a boot, where the directory was in memory.
    fs::remove_dir_all(&run).unwrap();
    assert!(site.cli(&["instance"]).status.success());
    assert!(site.cli(&["instance", "rotate", "--yes"]).status.success());
    let complaint = refused(&Site::with_path_of(100), Some(&place.path().join("r".repeat(100))));
    assert!(complaint.contains("over the system's limit") && complaint.contains("--run"), "{complaint}");
}

#[test]
fn the_environment_names_the_run_directory_and_a_relative_path_is_found_from_everywhere() {
    let place = place();
    let site = Site::new().fake("p");
    let mut serve = serve(&site, None);
    serve.current_dir(place.path()).env("PLUGRACK_RUN_DIR", "here");
    let log = File::create(place.path().join("log")).unwrap();
    let mut child = serve.stderr(log).spawn().unwrap();
    wait_for("the commands to find the host", || site.cli(&["list"]).status.success().then_some(()));
    let named = fs::read_to_string(run_dir_file(&site)).unwrap();
    assert_eq!(Path::new(named.trim_end()), fs::canonicalize(place.path()).unwrap().join("here"));
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_killed_host_is_followed_by_one_with_the_same_another_and_no_run_directory() {
    let place = place();
    let (a, b) = (place.path().join("a"), place.path().join("b"));
    let mut site = Site::new().fake("p");
    for run in [None, Some(&a), Some(&a), Some(&b), None, Some(&b), Some(&a)] {
        let run = run.map(PathBuf::as_path);
        let server = start(site, run);
        is_found(&server);
        assert_eq!(fs::read_to_string(run_dir_file(server.site())).ok(), run.map(|run| format!("{}\n", run.display())));
        // What the killed one had left in the data directory is gone.
        assert_eq!(server.site().data().join("run/api.sock").exists(), run.is_none());
        site = server.kill();
    }
}

#[test]
fn a_second_host_on_the_same_data_is_refused_whatever_run_directories_both_have() {
    let place = place();
    let (a, b) = (place.path().join("a"), place.path().join("b"));
    for (first, seconds) in [(Some(&a), vec![Some(&a), Some(&b), None]), (None, vec![Some(&a), None])] {
        let server = start(Site::new().fake("p"), first.map(PathBuf::as_path));
        let named = fs::read(run_dir_file(server.site())).ok();
        for second in seconds {
            // The second time the file system of the data directory has no lock to show.
            for lock_is_lost in [false, true] {
                if lock_is_lost {
                    fs::remove_file(server.site().data().join("lock")).unwrap();
                }
                let complaint = refused(server.site(), second.map(PathBuf::as_path));
                assert!(complaint.contains("another plugrack") && complaint.contains("stop it"), "{complaint}");
                if first.is_some() || !lock_is_lost {
                    assert!(complaint.contains(&format!("(process {})", server.pid())), "{complaint}");
                }
                assert_eq!(fs::read(run_dir_file(server.site())).ok(), named);
                if lock_is_lost {
                    let lock = server.site().data().join("lock");
                    let ours = || fs::read_to_string(&lock).is_ok_and(|pid| pid == format!("{}\n", server.pid()));
                    wait_for("the lock to be taken again", || ours().then_some(()));
                }
            }
        }
        is_found(&server);
        assert!(server.stop().0.success());
    }
}

#[test]
fn a_second_host_with_other_data_and_the_same_run_directory_is_refused() {
    let place = place();
    let run = place.path().join("run");
    let server = start(Site::new().fake("p"), Some(&run));
    let other = Site::new();
    let complaint = refused(&other, Some(&run));
    assert!(complaint.contains(&format!("(process {})", server.pid())) && complaint.contains("--run"), "{complaint}");
    assert!(!run_dir_file(&other).exists() && !other.data().join("plugrack.db").exists());
    is_found(&server);
}

#[test]
fn a_directory_of_somebody_else_is_refused_and_left_as_it_is() {
    let place = place();
    let foreign = place.path().join("foreign");
    fs::create_dir(&foreign).unwrap();
    fs::set_permissions(&foreign, fs::Permissions::from_mode(0o755)).unwrap();
    for name in ["notes.txt", "lock", "listen"] {
        let file = foreign.join(name);
        fs::write(&file, "somebody's own").unwrap();
        let complaint = refused(&Site::new(), Some(&foreign));
        assert!(complaint.contains("did not make, such as") && complaint.contains("choose another --run"), "{complaint}");
        assert_eq!((fs::read_to_string(&file).unwrap(), mode(&foreign)), ("somebody's own".to_owned(), 0o755));
        assert_eq!(fs::read_dir(&foreign).unwrap().count(), 1);
        fs::remove_file(&file).unwrap();
    }
    let link = place.path().join("link");
    symlink(&foreign, &link).unwrap();
    for link in [link.clone(), link.join("")] {
        let complaint = refused(&Site::new(), Some(&link));
        assert!(complaint.contains("symbolic link"), "{complaint}");
    }
    assert_eq!(fs::read_dir(&foreign).unwrap().count(), 0);
    let site = Site::new();
    let complaint = refused(&site, Some(&site.data().join("logs")));
    assert!(complaint.contains("is inside the data directory"), "{complaint}");
    let site = Site::new();
    fs::write(run_dir_file(&site), "somebody's own").unwrap();
    for complaint in [refused(&site, None), refused(&site, Some(&place.path().join("run"))), one_sentence(&site.cli(&["list"]))] {
        assert!(complaint.contains("run-dir does not hold an absolute path: remove it"), "{complaint}");
    }
    assert_eq!(fs::read_to_string(run_dir_file(&site)).unwrap(), "somebody's own");
}

#[test]
fn a_socket_for_a_proxy_in_the_run_directory_is_refused() {
    let place = place();
    let run = fs::canonicalize(place.path()).unwrap().join("run");
    let listen = format!("unix:{}/web.sock", run.display());
    let complaint = refused(&Site::new().args(&["--listen", &listen]), Some(&run));
    assert!(complaint.contains("closed to the reverse proxy"), "{complaint}");
}

#[test]
fn bodies_that_are_too_large_for_memory_stay_on_the_disk_of_the_data_directory() {
    let place = place();
    let site = Site::new().args(&["--body-memory", "64KiB"]).fake("p");
    let server = start(site, Some(&place.path().join("run")));
    let mut client = Client::connect(server.address());
    client.send(b"POST /p/echo HTTP/1.1\r\nhost: x\r\ncontent-length: 200000\r\n\r\n");
    client.send(&[b'x'; 100_000]);
    wait_for("the body to be in a file", || (server.spooled() == 1).then_some(()));
}

#[test]
fn a_run_directory_or_its_name_that_was_removed_is_told_and_the_name_is_written_again() {
    let place = place();
    let run = place.path().join("run");
    let server = start(Site::new().fake("p"), Some(&run));
    let logged = |words: &str| server.log().contains(words).then_some(());
    fs::remove_file(run_dir_file(server.site())).unwrap();
    wait_for("the name to be written again", || run_dir_file(server.site()).exists().then_some(()));
    is_found(&server);
    fs::remove_file(run.join("lock")).unwrap();
    wait_for("the lock to be taken again", || {
        logged("run/lock was removed or replaced while the host runs; the new file is locked")
    });
    let away = place.path().join("away");
    fs::rename(&run, &away).unwrap();
    wait_for("it to be noticed", || logged("run was removed or replaced while the host runs, so commands"));
    let said = server.cli_fails(&["list"]);
    assert!(said.contains("restart the host") && said.contains(&server.pid().to_string()), "{said}");
    fs::rename(&away, &run).unwrap();
    wait_for("it to be complete again", || logged("run is complete again"));
    is_found(&server);
}

/// On a file system without locks two hosts that start at the same time may not see each other: the one whose name was replaced ends.
#[test]
fn a_host_whose_name_another_running_host_has_replaced_ends() {
    let place = place();
    let server = start(Site::new().fake("p"), Some(&place.path().join("a")));
    let other = place.path().join("b");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("lock"), "4711\n").unwrap();
    let lock = File::open(other.join("lock")).unwrap();
    lock.lock().unwrap();
    let name = format!("{}\n", other.display());
    fs::write(run_dir_file(server.site()), &name).unwrap();
    let (status, site) = server.ended();
    assert_eq!(status.code(), Some(1));
    let log = fs::read_to_string(site.data().join("host.log")).unwrap();
    assert!(log.lines().last().unwrap().contains("another plugrack (process 4711) runs on"), "{log}");
    assert_eq!(fs::read_to_string(run_dir_file(&site)).unwrap(), name);
}
