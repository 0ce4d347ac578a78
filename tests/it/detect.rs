//! `plugrack detect`: a manifest is proposed from what a directory holds, and nothing in it is run.

use crate::support::{binary, command, root};
use serde_json::Value;
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const FLASK: &str = "from flask import Flask\napp = Flask(__name__)\n";

/// A directory `My Shop` in another one, with files by name and text.
fn directory(files: &[(&str, &str)]) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let shop = dir.path().join("My Shop");
    fs::create_dir(&shop).unwrap();
    for (name, text) in files {
        fs::write(shop.join(name), text).unwrap();
    }
    (dir, shop)
}

/// The exit code, standard output and standard error of `plugrack detect` with these words, run in a directory.
fn detect(dir: &Path, words: &[&str]) -> (Option<i32>, String, String) {
    let output = command(binary()).arg("detect").args(words).current_dir(dir).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn a_manifest_is_printed_and_hints_go_to_standard_error() {
    let (_dir, shop) = directory(&[("app.py", FLASK), ("index.html", "x")]);
    let (code, manifest, hints) = detect(&shop, &["."]);
    assert_eq!(code, Some(0), "{hints}");
    let parsed: toml::Table = toml::from_str(&manifest).unwrap();
    assert_eq!((parsed["id"].as_str(), parsed["run"]["kind"].as_str()), (Some("my-shop"), Some("http")));
    assert!(manifest.contains("# from the name of the directory"), "{manifest}");
    assert!(hints.lines().all(|line| line.starts_with("plugrack: ")), "{hints}");
    assert!(hints.contains("also found: static files (index.html)"), "{hints}");
    // Nothing was written unasked.
    assert_eq!(fs::read_dir(&shop).unwrap().count(), 2);
}

#[test]
fn json_has_every_proposal_and_nothing_on_standard_error() {
    let (dir, _) = directory(&[("app.py", FLASK), ("index.html", "x")]);
    let (code, printed, errors) = detect(dir.path(), &["--json", "My Shop"]);
    assert_eq!((code, &*errors), (Some(0), ""));
    let json: Value = serde_json::from_str(&printed).unwrap();
    assert_eq!((&json["found"][0]["application"], &json["found"][1]["application"]), (&"Flask".into(), &"static files".into()));
    assert_eq!((&json["already"], &json["saved"]), (&Value::Null, &Value::Null));
    let manifest = &json["found"][0]["manifest"];
    let toml: toml::Table = toml::from_str(json["found"][0]["toml"].as_str().unwrap()).unwrap();
    assert_eq!(serde_json::to_value(toml).unwrap(), *manifest);
    assert_eq!(manifest["run"]["command"][3], "app:app");
}

#[test]
fn save_writes_the_manifest_once_and_never_over_another() {
    let (dir, shop) = directory(&[("app.py", FLASK)]);
    let path = shop.join("plugrack.toml");
    // The mode does not depend on the umask.
    let mut save = command("sh");
    save.args(["-c", "umask 077 && exec \"$0\" detect --save 'My Shop'"]).arg(binary()).current_dir(dir.path());
    let output = save.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(fs::read(&path).unwrap(), output.stdout);
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o644);
    assert!(String::from_utf8(output.stderr).unwrap().contains("wrote My Shop/plugrack.toml"));
    assert_eq!(fs::read_dir(&shop).unwrap().count(), 2);

    fs::write(&path, "mine").unwrap();
    let (code, printed, error) = detect(dir.path(), &["--save", "My Shop"]);
    assert_eq!((code, &*printed, error.lines().count()), (Some(1), "", 1));
    assert!(error.contains("is a plugin already") && error.contains("nothing was written"), "{error}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
    let (code, printed, said) = detect(dir.path(), &["My Shop"]);
    assert_eq!((code, &*printed), (Some(0), ""));
    assert!(said.contains("it has the file plugrack.toml"), "{said}");
}

#[test]
fn a_link_of_the_manifests_name_is_not_written_through() {
    let (dir, shop) = directory(&[("app.py", FLASK)]);
    symlink(dir.path().join("elsewhere"), shop.join("plugrack.toml")).unwrap();
    let (code, _, error) = detect(dir.path(), &["--save", "My Shop"]);
    assert_eq!(code, Some(1), "{error}");
    assert!(!dir.path().join("elsewhere").exists());
}

#[test]
fn a_directory_without_an_application_is_one_sentence() {
    let (dir, shop) = directory(&[("package.json", "{")]);
    let (code, printed, error) = detect(dir.path(), &["My Shop"]);
    assert_eq!((code, &*printed, error.lines().count()), (Some(1), "", 1));
    for looked_for in ["Procfile", "manage.py", "config.ru", "go.mod", "index.html", "package.json is not valid JSON"] {
        assert!(error.contains(looked_for), "{looked_for}: {error}");
    }
    let (code, _, error) = detect(dir.path(), &["--json", "My Shop"]);
    let error: Value = serde_json::from_str(&error).unwrap();
    assert_eq!((code, &error["error"]["code"]), (Some(1), &"not_found".into()));
    let (code, _, error) = detect(&shop, &["package.json"]);
    assert_eq!(code, Some(1));
    assert!(error.contains("cannot read the directory package.json"), "{error}");
}

#[test]
fn nothing_in_the_directory_is_run() {
    let (dir, shop) = directory(&[]);
    let trap = format!("#!/bin/sh\ntouch '{}'\n", dir.path().join("ran").display());
    fs::create_dir_all(shop.join(".venv/bin")).unwrap();
    for name in ["a.cgi", ".venv/bin/gunicorn", ".venv/bin/python3", "shop", "gunicorn", "go", "npm"] {
        fs::write(shop.join(name), &trap).unwrap();
        fs::set_permissions(shop.join(name), Permissions::from_mode(0o755)).unwrap();
    }
    let python = format!("open('{}', 'w')\n{FLASK}", dir.path().join("ran").display());
    for (name, text) in [("app.py", &*python), ("go.mod", "module shop\n"), ("Procfile", "web: touch ../ran\n")] {
        fs::write(shop.join(name), text).unwrap();
    }
    let path = format!("{}:{}", shop.display(), std::env::var("PATH").unwrap());
    let output = command(binary()).args(["detect", "--json", "."]).current_dir(&shop).env("PATH", path).output().unwrap();
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["found"].as_array().unwrap().len(), 4, "{json:#}");
    assert!(!dir.path().join("ran").exists());
}

/// The examples of this repository are plugins already, and the page has the text of the program.
#[test]
fn the_page_shows_what_is_printed() {
    let (_, printed, said) = detect(root(), &["plugins-examples/counter"]);
    assert!(printed.is_empty() && said.contains("it has the file plugin"), "{said}");
    let (dir, _) = directory(&[("app.py", FLASK)]);
    fs::rename(dir.path().join("My Shop"), dir.path().join("wiki")).unwrap();
    let (_, manifest, _) = detect(dir.path(), &["wiki"]);
    let page = fs::read_to_string(root().join("docs/apps.md")).unwrap();
    assert!(page.contains(&format!("```toml\n{manifest}```\n")), "{manifest}");
}
