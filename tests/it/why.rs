//! What the operator is told of a plugin that does not run: how it ended, what it had said, what comes next, what to do.

use crate::support::{Server, Site, command, hello, metadata, script, wait_for};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

/// A site with a shell script for a plugin.
fn with_script(site: Site, id: &str, run: &str) -> Site {
    site.file(id, script(&metadata(id), run).as_bytes(), 0o755)
}

#[test]
fn how_a_process_ended_and_what_it_had_printed_is_kept_and_shown() {
    let run = format!(
        "i=0; while [ $i -lt 60 ]; do i=$((i+1)); echo line $i; done\n[ -e again ] || {{ touch again; exit 3; }}\nexec {}",
        hello().display()
    );
    let server = with_script(Site::new(), "p", &run).start();
    let plugin = server.wait_state("p", "ready");
    let end = &plugin["last_end"];
    assert_eq!((&end["exit"], &end["reason"]), (&json!("exit code 3"), &json!("exit code 3: line 60")));
    assert_eq!(plugin["advice"], "", "it runs");
    let lines: Vec<&str> = end["lines"].as_array().unwrap().iter().map(|line| line.as_str().unwrap()).collect();
    assert_eq!(lines.len(), 50);
    assert!(lines[0].ends_with(" line 11") && lines[49].ends_with(" line 60"), "{lines:?}");
    let at = end["at"].as_str().unwrap();
    assert!(at > "2026" && at <= plugin["since"].as_str().unwrap());
    let shown = server.cli(&["show", "p"]);
    let (_, kept) = shown.split_once("\nlast end\n").unwrap();
    let kept: Vec<&str> = kept.lines().collect();
    assert!(kept[0].starts_with(&format!("  {at} (")) && kept[0].ends_with(" ago): exit code 3: line 60"), "{shown}");
    assert!(kept[1] == "  last output" && kept[2].ends_with(" line 11") && kept[51].ends_with(" line 60"), "{shown}");
    assert_eq!(shown.matches("exit code 3").count(), 1, "{shown}");
}

#[test]
fn for_each_end_there_is_something_to_do() {
    let mut site = Site::new();
    let cases = [
        ("code-1", "exit 1", "plugrack logs code-1"),
        ("code-64", "exit 64", "install a build of the plugin that fits"),
        ("code-75", "exit 75", "nothing, unless it persists"),
        ("code-77", "exit 77", "plugrack start code-77"),
        ("code-78", "exit 78", "plugrack config set code-78 KEY VALUE"),
        ("code-127", "exec /no/such/program", "replace it by a file that can be executed"),
        ("signal", "kill -9 $$", "plugrack logs signal"),
        ("silent", "sleep 60", "plugrack logs silent"),
    ];
    for (id, run, _) in cases {
        site = with_script(site, id, run);
    }
    let server = site.file("data", b"no program", 0o644).args(&["--start-timeout", "1s"]).start();
    for (id, _, advice) in cases {
        let plugin = wait_for("it to be down", || {
            Some(server.plugin(id)).filter(|plugin| plugin["advice"].as_str().is_some_and(|advice| !advice.is_empty()))
        });
        assert!(plugin["advice"].as_str().unwrap().contains(advice), "{id}: {plugin:#}");
        let comes_back = plugin["state"] != "refused";
        assert_eq!(plugin["retry_at"].is_string(), comes_back, "{id}: {plugin:#}");
        let shown = server.cli(&["show", id]);
        assert!(shown.contains("\nwhat to do   ") || server.plugin(id)["state"] == "starting", "{shown}");
    }
    assert!(server.cli(&["show", "data"]).contains("what to do   fix or remove its file, then: plugrack rescan"));
    server.cli(&["stop", "code-1"]);
    assert_eq!(server.plugin("code-1")["advice"], "plugrack start code-1 starts it");
    server.cli(&["disable", "code-1"]);
    assert_eq!(server.plugin("code-1")["advice"], "plugrack enable code-1 lets it run");
}

#[test]
fn a_plugin_that_speaks_another_protocol_is_refused_by_what_it_says() {
    let site = Site::new().fake_mode("leaves", "other-version-exits").fake_mode("stays", "other-version");
    let server = site.start();
    for (id, exit) in
        [("leaves", "speaks another protocol: I speak version 2 (protocol)"), ("stays", "I speak version 2 (protocol)")]
    {
        let plugin = server.wait_state(id, "refused");
        assert_eq!((&plugin["reason"], &plugin["last_end"]["exit"]), (&json!(exit), &json!("speaks another protocol")));
        assert!(plugin["advice"].as_str().unwrap().contains("speaks the protocol of this plugrack"), "{plugin:#}");
    }
}

/// A memory cgroup that is removed when the test ends.
struct Cgroup(PathBuf);

impl Cgroup {
    /// One in which there are only so many bytes; nothing where this machine does not let us make one.
    fn limited(name: &str, bytes: u64) -> Option<Self> {
        [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")].into_iter().find_map(
            |(root, limit)| {
                let group = Self(Path::new(root).join(name));
                fs::create_dir(&group.0).ok()?;
                fs::write(group.0.join(limit), bytes.to_string()).ok()?;
                Some(group)
            },
        )
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // It can go once its last process has.
        wait_for("the cgroup to be removed", || fs::remove_dir(&self.0).ok());
    }
}

#[test]
fn a_plugin_killed_for_memory_is_said_to_be() {
    let Some(group) = Cgroup::limited(&format!("plugrack-{}", std::process::id()), 32 << 20) else {
        return eprintln!("skipped: no memory cgroup can be made here");
    };
    let gorge =
        "while [ ! -e go ]; do sleep 0.02; done; exec python3 -c 'hoard = [b\"x\" * 1048576 * n for n in range(1, 1000)]'";
    let server = with_script(Site::new(), "p", gorge).args(&["--start-timeout", "60s"]).start();
    let pid = wait_for("its process", || server.plugin("p")["process"]["pid"].as_i64());
    fs::write(group.0.join("cgroup.procs"), pid.to_string()).unwrap();
    fs::write(server.site().data().join("plugin-data/p/go"), "").unwrap();
    let plugin = server.wait_state("p", "backing_off");
    let exit = "killed for memory: signal 9 (SIGKILL) while the kernel's out-of-memory killer was active";
    assert_eq!((&plugin["reason"], &plugin["last_end"]["exit"]), (&json!(exit), &json!(exit)));
    assert_eq!(plugin["advice"], "give the machine or the container more memory, or reduce the plugin's memory use");
}

/// A host in a mount namespace of its own, whose plugins directory is mounted with these options.
fn start_with_mounted_plugins(site: Site, options: &str, plugin: &Path) -> Server {
    let (serve, plugins) = (site.serve(), site.plugins());
    let mut contained = command("unshare");
    contained.arg("--mount");
    if !rustix::process::getuid().is_root() {
        contained.arg("--map-root-user");
    }
    let steps = format!("mount -t tmpfs -o mode=755,{options} none \"$1\" && cp \"$2\" \"$1/p\" && shift 2 && exec \"$@\"");
    contained.args(["sh", "-c", &steps, "sh"]).arg(plugins).arg(plugin).arg(serve.get_program()).args(serve.get_args());
    site.start_as(contained)
}

#[test]
fn a_file_that_cannot_be_executed_where_it_lies_says_so() {
    let server = start_with_mounted_plugins(Site::new(), "noexec", &hello());
    let plugin = server.plugin("p");
    assert_eq!(plugin["state"], "refused");
    let reason = "it lies on a file system that is mounted noexec: mount -o remount,exec it, or choose another --plugins";
    assert_eq!(plugin["reason"], reason);
}

#[test]
fn a_program_whose_loader_is_missing_says_which() {
    let mut program = fs::read("/bin/sh").unwrap();
    let at = program.windows(7).position(|window| window == b"/lib64/").expect("the shell is linked dynamically");
    program[at..at + 7].copy_from_slice(b"/nolib/");
    let server = Site::new().file("p", &program, 0o755).start();
    let plugin: Value = server.plugin("p");
    let reason = plugin["reason"].as_str().unwrap();
    assert!(reason.starts_with("its loader /nolib/ld-") && reason.ends_with("or a static build of the plugin"), "{reason}");
}
