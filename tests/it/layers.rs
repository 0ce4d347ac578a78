//! The shape of the repository: which source file may use which, what it depends on, and what lies at its top.

use crate::support::{cargo, command, root};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// The rooms of the host, which are the folders of its source files, from the bottom up. A file uses its own room and those below it.
const ROOMS: [&str; 12] =
    ["util", "system", "process", "licensing", "http", "store", "apps", "plugins", "api", "gate", "server", "cli"];

/// The files that stand in no room: the crate's roots, and what is counted of several rooms.
const LOOSE: [&str; 3] = ["lib", "main", "hot_paths"];

/// The same of the Rust SDK's crate: the protocol and the licences, which the host uses too, know nothing of the SDK.
const SDK_ROOMS: [&str; 3] = ["lock", "protocol", "license"];

/// Most lines of a source file.
const MOST_LINES: usize = 600;

/// Files with more, and why they are not divided.
const LONG: [(&str, &str); 10] = [
    ("src/api/mod.rs", "the routes and the handlers of plugins and keys, which share their lookups"),
    ("src/gate/event_loop.rs", "one thread's loop: events, listeners, deadlines"),
    ("src/gate/requests.rs", "one state machine: a request from its first byte to its end"),
    ("src/http/parse/request_head.rs", "one parser, of which more than half are its tests"),
    ("src/plugins/registry/rescan.rs", "one scan of the plugins directory, from its files to what becomes of the plugins"),
    ("src/process/mod.rs", "the start of a process, in parent and child, and its end"),
    ("src/store/kv.rs", "the operations on keys, which share their accounts, and their tests"),
    ("src/store/mod.rs", "the writer with its groups, the readers, and their tests"),
    ("src/system/data_dir.rs", "all paths of an installation, and who may have them"),
    ("sdk/rust/src/tests.rs", "the tests of the SDK by a host that they play"),
];

/// Long files of the protocol's crate, whose texts are part of the documentation.
const LONG_PROTOCOL: [&str; 3] =
    ["sdk/rust/src/protocol/message.rs", "sdk/rust/src/protocol/metadata.rs", "sdk/rust/src/license.rs"];

/// The room of a file, by the order of the rooms: the loose files stand above all.
fn room(rooms: &[&str], file: &str) -> usize {
    rooms.iter().position(|room| folder(file) == *room).unwrap_or(rooms.len())
}

/// Async runtimes and what they are made of: every wait here is a thread's.
const ASYNC: [&str; 11] = [
    "tokio",
    "async-std",
    "async-executor",
    "async-io",
    "smol",
    "futures-executor",
    "mio",
    "polling",
    "hyper",
    "actix-rt",
    "monoio",
];

/// All that may lie at the top of the repository.
const TOP: [&str; 18] = [
    "Cargo.toml",
    "Cargo.lock",
    "Makefile",
    "README.md",
    "CHANGELOG.md",
    "LICENSE-MIT",
    "LICENSE-APACHE",
    "schema.sql",
    "src",
    "sdk",
    "tests",
    "plugins-examples",
    "docs",
    "clippy.toml",
    "rustfmt.toml",
    ".cargo",
    ".gitignore",
    ".ci",
];

/// Source files by their path below a folder, without the suffix, and their code without comments.
fn sources(folder: &str) -> BTreeMap<String, String> {
    let src = root().join(folder);
    let mut sources = BTreeMap::new();
    let mut folders = vec![src.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.with_extension("");
                let code = fs::read_to_string(&path).unwrap();
                let code: Vec<_> = code.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
                sources.insert(name.strip_prefix(&src).unwrap().to_str().unwrap().to_owned(), code.join("\n"));
            }
        }
    }
    sources
}

/// The folder of a file: that of its module's files, or the file itself where it stands alone.
fn folder(file: &str) -> &str {
    file.split_once('/').map_or(file, |(folder, _)| folder)
}

/// The files that a file's code names by paths that begin with `crate::` or `super::`.
fn uses(file: &str, code: &str, files: &BTreeSet<&str>) -> BTreeSet<String> {
    let parent = match file.rsplit_once('/') {
        Some((folder, "mod")) => folder.rsplit_once('/').map_or("", |(outer, _)| outer),
        Some((folder, _)) => folder,
        None => "",
    };
    let mut used = BTreeSet::new();
    for (root, base) in [("crate::", ""), ("super::", parent)] {
        for (at, _) in code.match_indices(root) {
            if !code[..at].ends_with(|before: char| before.is_alphanumeric() || before == '_') {
                for path in expand(&code[at + root.len()..]) {
                    used.extend(resolve(base, &path, files));
                }
            }
        }
    }
    used.remove(file);
    used
}

/// The paths at the beginning of some code, groups in braces taken apart.
fn expand(code: &str) -> Vec<String> {
    let name = code.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default();
    if let Some(group) = code.strip_prefix('{') {
        let mut depth = 0;
        let mut paths = Vec::new();
        let mut start = 0;
        for (at, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth > 0 => depth -= 1,
                ',' | '}' if depth == 0 => {
                    paths.extend(expand(group[start..at].trim()));
                    start = at + 1;
                    if c == '}' {
                        break;
                    }
                }
                _ => {}
            }
        }
        return paths;
    }
    match code[name.len()..].strip_prefix("::") {
        Some(rest) => expand(rest).into_iter().map(|rest| format!("{name}/{rest}")).collect(),
        None => vec![name.to_owned()],
    }
}

/// The file a path leads to: that of its innermost module.
fn resolve(base: &str, path: &str, files: &BTreeSet<&str>) -> Option<String> {
    let mut found = None;
    let mut module = base.to_owned();
    for segment in path.split('/') {
        module = format!("{module}/{segment}").trim_start_matches('/').to_owned();
        found = [module.clone(), format!("{module}/mod")].into_iter().find(|file| files.contains(file.as_str())).or(found);
    }
    found
}

#[test]
fn paths_are_read_as_the_compiler_reads_them() {
    let files = BTreeSet::from(["lib", "a", "b/mod", "b/c", "d"]);
    let used = |file: &str, code: &str| uses(file, code, &files).into_iter().collect::<Vec<_>>();
    for (file, code, expected) in [
        ("d", "use crate::a::Thing;", &["a"][..]),
        ("d", "use crate::{a::{self, X}, b::{Y, c::{Z}}};", &["a", "b/c", "b/mod"]),
        ("d", "use crate::b::c;\nuse crate::b::{\n    c::A,\n    B,\n};", &["b/c", "b/mod"]),
        ("d", "fn f() { crate::b::c::g(); crate::a::h() }", &["a", "b/c"]),
        ("d", "use other_crate::a; use super::*; use std::a;", &[]),
        ("d", "use super::a;", &["a"]),
        ("b/c", "use super::Y;\nmod tests { use super::*; }", &[]),
        ("b/mod", "use c::X;\nuse super::a;", &["a"]),
    ] {
        assert_eq!(used(file, code), expected, "{file}: {code}");
    }
}

#[test]
fn every_source_file_stands_in_a_room() {
    let sources = sources("src");
    let found: BTreeSet<_> = sources.keys().map(|file| folder(file)).collect();
    let known: BTreeSet<_> = ROOMS.into_iter().chain(LOOSE).collect();
    assert_eq!(found, known, "the folders of src, and its files that stand in none");
}

#[test]
fn a_source_file_uses_its_own_room_and_those_below_it() {
    let mut faults = Vec::new();
    for (folder, rooms) in [("src", &ROOMS[..]), ("sdk/rust/src", &SDK_ROOMS)] {
        let sources = sources(folder);
        let files: BTreeSet<_> = sources.keys().map(String::as_str).collect();
        for (file, code) in &sources {
            let above = |used: &String| room(rooms, used) > room(rooms, file);
            faults.extend(uses(file, code, &files).into_iter().filter(above).map(|used| format!("{folder}: {file} uses {used}")));
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
}

#[test]
fn a_source_file_is_long_only_for_a_reason() {
    let mut long = BTreeSet::new();
    for folder in ["src", "sdk/rust/src"] {
        for file in sources(folder).into_keys() {
            let path = format!("{folder}/{file}.rs");
            if fs::read_to_string(root().join(&path)).unwrap().lines().count() > MOST_LINES {
                long.insert(path);
            }
        }
    }
    let known = LONG.into_iter().map(|(file, _)| file).chain(LONG_PROTOCOL).map(str::to_owned).collect();
    assert_eq!(long, known, "the files with more than {MOST_LINES} lines, and those for which there is a reason");
}

/// A folder counts as one here: its files belong together.
#[test]
fn no_source_files_use_each_other_in_a_circle() {
    let sources = sources("src");
    let files: BTreeSet<_> = sources.keys().map(String::as_str).collect();
    let mut edges: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for (file, code) in &sources {
        let used = uses(file, code, &files).into_iter().map(|used| folder(&used).to_owned());
        let used = used.filter(|used| used != folder(file));
        edges.entry(folder(file)).or_default().extend(used);
    }
    // What uses nothing that is left, or is used by nothing, is in no circle; what cannot be taken away is.
    loop {
        let left: BTreeSet<_> = edges.keys().map(|&file| file.to_owned()).collect();
        let used = edges.values().flatten().cloned().collect::<BTreeSet<_>>();
        edges.retain(|file, _| used.contains(*file));
        edges.values_mut().for_each(|used| used.retain(|used| left.contains(used)));
        edges.retain(|_, used| !used.is_empty());
        if edges.len() == left.len() {
            break;
        }
    }
    assert!(edges.is_empty(), "among these there is a circle: {edges:#?}");
}

#[test]
fn there_is_no_async_runtime() {
    let lock = fs::read_to_string(root().join("Cargo.lock")).unwrap();
    let locked: BTreeSet<_> = lock.lines().filter_map(|line| line.strip_prefix("name = \"")?.strip_suffix('"')).collect();
    assert!(locked.contains("tiny_http") && locked.contains("rusqlite"), "{locked:?}");
    let found: Vec<_> = ASYNC.iter().filter(|name| locked.contains(*name)).collect();
    assert!(found.is_empty(), "{found:?}");
}

#[test]
fn the_sdk_for_plugin_authors_needs_nothing_of_the_host() {
    let tree = |package: &str| {
        let tree = cargo()
            .args(["tree", "--locked", "--offline", "-p", package, "-e", "normal", "--prefix", "none", "--all-features"])
            .output()
            .unwrap();
        assert!(tree.status.success(), "{}", String::from_utf8_lossy(&tree.stderr));
        let tree = String::from_utf8(tree.stdout).unwrap();
        tree.lines().filter_map(|line| line.split(' ').next().map(str::to_owned)).collect::<BTreeSet<_>>()
    };
    let (host, sdk) = (tree("plugrack"), tree("plugrack-sdk"));
    for name in ["plugrack", "tiny_http", "rusqlite", "clap", "nix", "ureq", "crossbeam-channel"] {
        assert!(host.contains(name) && !sdk.contains(name), "{name}: {sdk:?}");
    }
    assert!(host.contains("plugrack-sdk") && sdk.contains("serde_json"));
}

#[test]
fn the_top_of_the_repository_holds_what_belongs_there_only() {
    let listed = command("git").args(["-c", "safe.directory=*", "ls-files", "-z"]).current_dir(root()).output().unwrap();
    assert!(listed.status.success(), "the tests run in a checkout: {}", String::from_utf8_lossy(&listed.stderr));
    let listed = String::from_utf8(listed.stdout).unwrap();
    let top: BTreeSet<_> = listed.split_terminator('\0').filter_map(|path| Path::new(path).iter().next()?.to_str()).collect();
    assert!(top.contains("src"), "{top:?}");
    let strange: Vec<_> = top.iter().filter(|name| !TOP.contains(name)).collect();
    assert!(strange.is_empty(), "{strange:?}");
}
