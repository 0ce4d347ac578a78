//! What the documentation says to do is done here, as it stands there.

use crate::support::{Server, Site, binary, command, root};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

/// The fenced blocks of a page: language and text.
fn blocks(page: &str) -> Vec<(String, String)> {
    let text = fs::read_to_string(root().join(page)).unwrap();
    let mut blocks = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if let Some(language) = line.strip_prefix("```") {
            let block: Vec<&str> = lines.by_ref().take_while(|line| *line != "```").collect();
            blocks.push((language.to_owned(), block.join("\n") + "\n"));
        }
    }
    blocks
}

/// The blocks of a page in one language.
pub(crate) fn blocks_in(page: &str, language: &str) -> Vec<String> {
    blocks(page).into_iter().filter(|(l, _)| l == language).map(|(_, text)| text).collect()
}

/// A directory that looks like the repository after `make run`, with a running host's data directory as its `var`.
fn checkout(server: &Server) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for part in ["sdk", "plugins-examples"] {
        symlink(root().join(part), dir.path().join(part)).unwrap();
    }
    symlink(server.site().data(), dir.path().join("var")).unwrap();
    fs::create_dir_all(dir.path().join("target/release")).unwrap();
    symlink(binary(), dir.path().join("target/release/plugrack")).unwrap();
    dir
}

/// Runs a block of shell commands; only the host's address is put in place of the default one.
#[track_caller]
fn run_block(server: &Server, dir: &Path, block: &str) -> String {
    let block = block.replace("127.0.0.1:8080", &server.address().to_string());
    let mut sh = command("sh");
    sh.args(["-euc", &block]).current_dir(dir);
    for name in ["HOME", "CARGO_HOME", "RUSTUP_HOME", "RUSTUP_TOOLCHAIN", "CARGO_NET_OFFLINE"] {
        sh.envs(std::env::var_os(name).map(|value| (name, value)));
    }
    let output = sh.output().unwrap();
    assert!(output.status.success(), "{block}\n{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Waits until a plugin that was just found answers, as a person would wait a moment.
fn until_ready(server: &Server, id: &str) {
    server.wait_state(id, "ready");
}

#[test]
fn the_readmes_first_plugin_in_python_works_as_written() {
    let server = Site::new().start();
    let dir = checkout(&server);
    let sh = blocks_in("README.md", "sh");
    let python = blocks_in("README.md", "python").remove(0);
    run_block(&server, dir.path(), &sh[0]);
    fs::write(dir.path().join("var/plugins/greet/plugin"), python).unwrap();
    let said = run_block(&server, dir.path(), &sh[1]);
    assert!(said.starts_with("added: greet\n"), "{said}");
    assert!(said.ends_with("Hello from Python! You are visitor 1.\n"), "{said}");
}

#[test]
fn the_readmes_first_plugin_in_rust_works_as_written() {
    let server = Site::new().start();
    let dir = checkout(&server);
    let krate = tempfile::tempdir().unwrap();
    fs::create_dir(krate.path().join("src")).unwrap();
    let manifest = blocks_in("README.md", "toml").remove(0);
    fs::write(krate.path().join("Cargo.toml"), manifest.replace("/path/to/plugrack", root().to_str().unwrap())).unwrap();
    fs::write(krate.path().join("src/main.rs"), blocks_in("README.md", "rust").remove(0)).unwrap();
    // The versions this repository is locked to, so that nothing has to be fetched.
    fs::copy(root().join("Cargo.lock"), krate.path().join("Cargo.lock")).unwrap();
    let block = blocks_in("README.md", "sh").remove(2).replace("/path/to/plugrack", dir.path().to_str().unwrap());
    let said = run_block(&server, krate.path(), &block.replace("cargo build", "cargo build --quiet --offline"));
    assert!(said.starts_with("added: greet-rs\n"), "{said}");
    assert!(said.ends_with("Hello from Rust! You are visitor 1.\n"), "{said}");
}

/// The walk of a vendor and a customer: the key is new, so what runs is what the six commands have made.
#[test]
fn the_readmes_way_from_a_vendors_key_to_a_running_plugin_works_as_written() {
    // As `make run` leaves it.
    let server = Site::new().example("licensed-python").start();
    let dir = checkout(&server);
    let block = blocks_in("README.md", "sh").remove(3);
    let commands: Vec<&str> = block.lines().filter(|line| !line.starts_with('#')).collect();
    assert_eq!(commands.len(), 6);
    for (number, command) in commands.iter().enumerate() {
        if number == 5 {
            let plugin = server.wait_state("licensed-python", "unlicensed");
            assert!(plugin["reason"].as_str().unwrap().contains("licence: missing: "), "{plugin:#}");
        }
        run_block(&server, dir.path(), command);
    }
    assert_eq!(server.plugin("licensed-python")["license"]["state"], "valid");
    let said = server.get("/licensed-python").text().to_owned();
    assert!(said.starts_with("Licensed to you until 2100-01-01T00:00:00Z: 0 of 10 members."), "{said}");
}

/// `make run` prints what to try; each of those lines is tried.
#[test]
fn what_make_run_says_to_try_works() {
    let server = Site::new().example("hello").example("notes").example("counter").example("clock").start();
    for id in ["hello", "notes", "counter", "clock"] {
        until_ready(&server, id);
    }
    let dir = checkout(&server);
    let printed = command("make").args(["--no-print-directory", "--dry-run", "run"]).current_dir(root()).output().unwrap();
    let printed = String::from_utf8(printed.stdout).unwrap();
    let lines = printed.lines().filter_map(|line| line.strip_prefix("echo \"    ").and_then(|line| line.strip_suffix('"')));
    let mut tried = 0;
    for line in lines {
        // A stream of events has no end: the first seconds of it do.
        let line = line.replace("./var", "var").replace("curl -N", "! timeout 3 curl -sSN");
        let said =
            run_block(&server, dir.path(), &line.replace("curl http", "curl -sSf http").replace("curl -d", "curl -sSf -d"));
        assert!(!said.is_empty() || line.contains("-d text"), "{line} said nothing");
        tried += 1;
    }
    assert!(tried >= 7, "{printed}");
    assert!(server.get("/notes").text().contains("my first note"));
}

#[test]
fn the_commands_of_the_operations_page_work() {
    let site = Site::new().example("notes").example("counter");
    let server = site.start();
    for id in ["notes", "counter"] {
        until_ready(&server, id);
    }
    server.get("/counter");
    let dir = checkout(&server);
    let page = fs::read_to_string(root().join("docs/operations.md")).unwrap();
    let commands = page.lines().filter_map(|line| line.strip_prefix("    ")).filter(|line| {
        line.starts_with("plugrack config")
            || line.starts_with("plugrack kv")
            || line.starts_with("plugrack restart")
            || line.contains("| plugrack")
            || line.starts_with("curl")
    });
    let mut ran = 0;
    for line in commands {
        let line = line.replace("plugrack ", "./target/release/plugrack --data var ");
        run_block(&server, dir.path(), &line);
        ran += 1;
    }
    assert!(ran >= 8, "{ran}");
    assert!(server.get("/notes").text().starts_with("My notes"));
    assert_eq!(server.cli(&["kv", "get", "counter", "visits"]), "41");
}

#[test]
fn the_operations_page_names_every_setting_with_its_default() {
    let page = fs::read_to_string(root().join("docs/operations.md")).unwrap();
    let help = Site::new().cli(&["serve", "--help"]).stdout;
    let help = String::from_utf8(help).unwrap();
    let words: Vec<&str> = help.split_whitespace().collect();
    let mut settings = 0;
    for pair in words.windows(2) {
        let value = pair[1].trim_end_matches([']', '=']);
        match pair[0] {
            "[env:" => {
                assert!(page.contains(&format!("`{value}`")), "{value} is not on the page");
                settings += 1;
            }
            "[default:" => assert!(page.contains(&format!("`{value}`")), "the default {value} is not on the page"),
            _ => {}
        }
    }
    assert!(settings >= 8, "{help}");
}

#[test]
fn the_protocol_pages_plugin_is_the_example() {
    let example = fs::read_to_string(root().join("plugins-examples/counter/plugin")).unwrap();
    assert_eq!(blocks_in("docs/protocol.md", "python").pop(), Some(example));
}

/// A stranger has only the page: its plugin is copied from there and answers.
#[test]
fn the_protocol_pages_plugin_works_when_copied() {
    let page = blocks_in("docs/protocol.md", "python").pop().unwrap();
    let server = Site::new().file("visits", page.as_bytes(), 0o755).start();
    until_ready(&server, "counter");
    assert_eq!(server.get("/counter").text(), "You are visitor number 1.\n");
}

#[test]
fn every_link_between_pages_leads_somewhere() {
    let mut links = 0;
    let mut pages = vec![root().join("README.md"), root().join("CHANGELOG.md")];
    pages.extend(
        fs::read_dir(root().join("docs"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|e| e == "md")),
    );
    for page in pages {
        let text = fs::read_to_string(&page).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.starts_with("http") {
                continue;
            }
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { page.clone() } else { page.parent().unwrap().join(file) };
            assert!(target.exists(), "{}: {link} leads nowhere", page.display());
            let headings = fs::read_to_string(&target).unwrap_or_default().to_lowercase().replace(' ', "-");
            assert!(
                anchor.is_empty() || headings.contains(&format!("-{anchor}\n")),
                "{}: {link} has no such heading",
                page.display()
            );
            links += 1;
        }
    }
    assert!(links > 10);
}

#[test]
fn make_run_installs_every_example() {
    let printed = command("make").args(["--no-print-directory", "--dry-run", "examples"]).current_dir(root()).output().unwrap();
    let printed = String::from_utf8(printed.stdout).unwrap();
    for entry in fs::read_dir(root().join("plugins-examples")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let installed = printed.contains(&format!("plugins/{name}"))
            || printed.lines().any(|line| line.starts_with("for example in") && line.contains(&name));
        assert!(installed, "make run does not install {name}");
    }
}
