//! Tests of manifests: what a person may get wrong in one, and the sentence that says so.

use super::*;

fn read_text(text: &str) -> Result<Manifest, String> {
    parse(text, Path::new("/plugins/wiki"))
}

/// A manifest of an application, with lines in place of its command.
fn with(run: &str) -> String {
    format!("id = \"wiki\"\nroute = \"/wiki\"\n\n[run]\nkind = \"http\"\n{run}\n")
}

#[track_caller]
fn assert_says(text: &str, line: Option<usize>, words: &[&str]) {
    let said = read_text(text).map(|manifest| format!("nothing: {:?}", manifest.run)).unwrap_or_else(|why| why);
    let place = line.map_or_else(|| "plugrack.toml".to_owned(), |line| format!("plugrack.toml, line {line}: "));
    let is_sentence = !said.contains('\n') && said.len() < 500;
    assert!(said.starts_with(&place) && is_sentence && words.iter().all(|word| said.contains(word)), "{text}\n{said}");
}

#[test]
fn a_small_manifest_has_good_defaults() {
    let manifest = read_text(&with("command = [\"./app\", \"{socket}\", \"{\\\"a\\\":1}\"]\nstart-timeout = \"60s\"")).unwrap();
    let Manifest { metadata, run } = manifest;
    assert_eq!((&*metadata.id, &*metadata.name, metadata.concurrency), ("wiki", "wiki", CONCURRENCY));
    assert_eq!((run.kind, run.listen, run.prefix), (Kind::Http, Listen::Socket, Prefix::Strip));
    assert_eq!(run.start_timeout, Some(Duration::from_secs(60)));
    assert_eq!(run.directory, Path::new("/plugins/wiki"));
}

#[test]
fn what_is_no_toml_is_said_with_its_line() {
    for (text, line, words) in [
        ("id = \"wiki\nroute = \"/wiki\"", 1, &["string"][..]),
        ("id = \"wiki\"\nroute = /wiki", 2, &[]),
        ("id = \"wiki\"\nroute: \"/wiki\"", 2, &[]),
        ("id = wiki", 1, &[]),
        ("id = \"wiki\"\nid = \"other\"", 2, &["duplicate key"]),
        ("id = \"wiki\"\n[run\nkind = \"http\"", 2, &[]),
        ("id = \"wiki\"\n[run]\nkind = \"http\"\n[run]\ncommand = [\"a\"]", 4, &["duplicate key"]),
        ("id = \"wiki\"\n[run]\ncommand = [\"a\" \"b\"]", 3, &[]),
        ("id = \"wiki\"\n[run]\ncommand = [\"a\", \"b\"", 3, &[]),
        ("{\"id\": \"wiki\"}", 1, &[]),
        ("id = \u{201c}wiki\u{201d}", 1, &[]),
    ] {
        assert_says(text, Some(line), words);
    }
}

#[test]
fn a_key_in_the_wrong_place_or_spelling_is_said_with_where_it_belongs() {
    for (text, line, words) in [
        ("id = \"wiki\"\nkind = \"http\"\ncommand = [\"a\"]", 2, &["kind belongs below [run]"][..]),
        ("id = \"wiki\"\nlisten = \"port\"\n[run]\nkind = \"http\"\ncommand = [\"a\"]", 2, &["listen belongs below [run]"]),
        ("idd = \"wiki\"\n[run]\nkind = \"http\"", 1, &["idd is not a key here", "id, name, version"]),
        ("id = \"wiki\"\n[Run]\nkind = \"http\"", 2, &["Run is not a key here", "run"]),
        (&with("command = [\"a\"]\nhost = [\"a.example\"]"), 7, &["host belongs above [run]"]),
        (&with("command = [\"a\"]\nstart_timeout = \"60s\""), 7, &["run.start_timeout is not a key", "start-timeout"]),
        (&with("command = [\"a\"]\nroot = \"public\""), 7, &["run.root is not a key", "kind, command, listen"]),
        (&with("cmd = [\"a\"]"), 6, &["run.cmd is not a key", "command"]),
    ] {
        assert_says(text, Some(line), words);
    }
}

#[test]
fn what_is_missing_is_said_with_an_example() {
    for (text, words) in [
        ("", &["no table [run]"][..]),
        ("id = \"wiki\"", &["no table [run]"]),
        ("[run]\nkind = \"http\"\ncommand = [\"a\"]", &["has no id", "id = \"NAME\""]),
        ("id = \"wiki\"\n[run]\ncommand = [\"a\"]", &["no run.kind", "native, http, fastcgi, cgi, static"]),
        (&with(""), &["no run.command", "gunicorn"]),
        (&with("command = []"), &["no run.command", "gunicorn"]),
        ("id = \"wiki\"\n[run]\nkind = \"native\"", &["no run.command"]),
        ("id = \"wiki\"\n[run]\nkind = \"cgi\"", &["run.command, run.script or run.root"]),
    ] {
        assert_says(text, None, words);
    }
}

#[test]
fn a_value_of_the_wrong_type_is_said_with_the_right_one() {
    for (run, words) in [
        ("command = \"gunicorn app:app\"", &["run.command must be an array of strings", "not a string"][..]),
        ("command = [\"a\", 1]", &["run.command must be an array of strings", "not an integer"]),
        ("command = [\"\"]", &["run.command begins with an empty string"]),
        ("command = [\"a\", \"b\\u0000\"]", &["run.command has a NUL character"]),
        ("listen = 3000", &["run.listen must be a string, not an integer"]),
        ("listen = \"3000\"", &["run.listen \"3000\" is none of", "\"port\", \"ADDRESS:PORT\" and \"unix:/PATH\""]),
        ("listen = \"localhost:3000\"", &["is none of", "ADDRESS:PORT"]),
        ("listen = \"127.0.0.1:0\"", &["is none of"]),
        ("listen = \"unix:app.sock\"", &["is none of", "unix:/PATH"]),
        ("listen = \"http://127.0.0.1:3000\"", &["is none of"]),
        ("env = [\"A=b\"]", &["run.env must be a table, not an array"]),
        ("env = { A = 1 }", &["run.env.A must be a string, not an integer"]),
        ("env = { \"A-B\" = \"1\" }", &["\"A-B\" cannot be the name of a variable"]),
        ("env = { HOME = \"/\" }", &["HOME is reserved"]),
        ("env = { PLUGRACK_X = \"1\" }", &["PLUGRACK_X is reserved"]),
        ("ready = \"health\"", &["run.ready \"health\" must be a path, such as \"/health\""]),
        ("ready = \"/a b\"", &["must be a path"]),
        ("ready = \"/a\\r\\nx: y\"", &["must be a path"]),
        ("ready = true", &["run.ready must be a string, not a boolean"]),
        ("start-timeout = 60", &["run.start-timeout must be a string, not an integer"]),
        ("start-timeout = \"60\"", &["run.start-timeout \"60\"", "such as 30s"]),
        ("start-timeout = \"2 days\"", &["a time is from"]),
        ("request-timeout = \"-1s\"", &["a time is"]),
        ("prefix = \"none\"", &["run.prefix \"none\" is neither \"strip\" nor \"keep\""]),
        ("prefix = false", &["run.prefix must be a string, not a boolean"]),
        ("open-files = \"4096\"", &["run.open-files must be a whole number of at least 1"]),
        ("open-files = 0", &["run.open-files must be a whole number of at least 1"]),
        ("open-files = -1", &["run.open-files must be a whole number of at least 1"]),
        ("open-files = 99999999999999999999", &["run.open-files must be a whole number"]),
    ] {
        let text = if run.starts_with("command") { with(run) } else { with(&format!("{run}\ncommand = [\"a\"]")) };
        assert_says(&text, Some(6), words);
    }
    assert_says("id = \"wiki\"\nrun = \"http\"", Some(2), &["run must be a table ([run]), not a string"]);
    assert_says("id = 7\n[run]\nkind = \"http\"\ncommand = [\"a\"]", Some(1), &["id must be a string, not an integer"]);
    assert_says("id = \"wiki\"\n[run]\nkind = \"htttp\"", Some(3), &["run.kind \"htttp\" is none of native, http"]);
    assert_says(
        "id = \"wiki\"\n[run]\nkind = \"static\"\nroot = \".\"\nspa = \"yes\"",
        Some(5),
        &["run.spa must be true or false"],
    );
}

#[test]
fn what_the_metadata_refuses_is_said_with_its_line_and_as_a_key_of_the_manifest() {
    for (line, words) in [
        ("host = \"a.example\"", &["host must be an array"][..]),
        ("host = [\"a b\"]", &["host"]),
        ("route = \"wiki\"", &["route"]),
        ("route = \"/api\"", &["route"]),
        ("concurrency = 0", &["concurrency"]),
        ("concurrency = \"8\"", &["concurrency"]),
        ("version = 3.1", &["version must be a string"]),
        ("icon = \"\"", &["icon"]),
        ("homepage = 7", &["homepage must be a string"]),
        ("below_route = \"map\"", &["below_route"]),
    ] {
        let route = if line.starts_with("route") { "" } else { "route = \"/wiki\"\n" };
        let text = format!("id = \"wiki\"\n{line}\n{route}[run]\nkind = \"http\"\ncommand = [\"a\"]");
        assert_says(&text, Some(2), words);
        assert!(!read_text(&text).unwrap_err().contains("metadata."), "{:?}", read_text(&text));
    }
    for id in ["Wiki", "my wiki", "-wiki", ""] {
        assert_says(&format!("id = \"{id}\"\nroute = \"/wiki\"\n[run]\nkind = \"http\"\ncommand = [\"a\"]"), Some(1), &["id"]);
    }
}

/// There is no shell, and each place for a value has one only with the `listen` that gives it.
#[test]
fn a_placeholder_that_nothing_replaces_is_said() {
    for (run, words) in [
        ("command = [\"a\", \"{sockets}\"]", &["{sockets} is no placeholder", "{socket} {port} {route}"][..]),
        ("command = [\"a\", \"{PORT}\"]\nlisten = \"port\"", &["{PORT} is no placeholder", "{port}"]),
        ("command = [\"a\", \"--port\", \"{port}\"]", &["{port} has a value only with run.listen = \"port\""]),
        ("command = [\"a\", \"{port}\"]\nlisten = \"fd\"", &["{port} has a value only with run.listen = \"port\""]),
        ("command = [\"a\", \"{socket}\"]\nlisten = \"port\"", &["{socket} has a value only with run.listen = \"socket\""]),
        ("command = [\"a\", \"--port=$PORT\"]\nlisten = \"port\"", &["no shell", "{port}"]),
        ("command = [\"a\", \"${PORT}\"]\nlisten = \"port\"", &["{PORT} is no placeholder", "{port}"]),
        ("env = { A = \"{port}\" }\ncommand = [\"a\"]", &["{port} has a value only with"]),
        ("env = { A = \"{adress}\" }\ncommand = [\"a\"]", &["{adress} is no placeholder"]),
    ] {
        assert_says(&with(run), Some(6), words);
    }
    for run in [
        "command = [\"sh\", \"-c\", \"exec app --port $PORT\"]\nlisten = \"port\"",
        "command = [\"a\", \"{socket}\"]\nlisten = \"fd\"",
        "command = [\"a\", \"{}\", \"{\", \"}\", \"{a b}\", \"{A}\"]",
    ] {
        read_text(&with(run)).unwrap();
    }
}

#[test]
fn what_is_attached_is_not_started() {
    assert_says(
        &with("listen = \"127.0.0.1:3000\"\ncommand = [\"a\"]"),
        Some(7),
        &["run.command and a run.listen that is an address exclude each other"],
    );
    let attached = read_text(&with("listen = \"[::1]:3000\"")).unwrap();
    assert!(!attached.run.has_process());
}

#[test]
fn a_file_that_is_no_manifest_is_said() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(FILE);
    assert!(super::read(&path).unwrap_err().starts_with("cannot read plugrack.toml: "));
    std::fs::write(&path, b"id = \"caf\xe9\"").unwrap();
    assert_eq!(super::read(&path).unwrap_err(), "plugrack.toml is not UTF-8");
    std::fs::write(&path, vec![b'#'; 70_000]).unwrap();
    assert_eq!(super::read(&path).unwrap_err(), "plugrack.toml has more than 65536 bytes");
    // As some editors on Windows write it.
    std::fs::write(&path, format!("\u{feff}{}", with("command = [\"a\"]").replace('\n', "\r\n"))).unwrap();
    super::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    assert_eq!(super::read(&path).unwrap_err(), "plugrack.toml is not a regular file");
}
