//! The vendor's commands: keys are made, licences issued and looked at, without a host.

use crate::support::{binary, command, root};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Output, Stdio};
use tempfile::TempDir;

const INSTANCE: &str = "5f0c3f0e-8a52-4c1e-9d55-0c6a4f0b7a11";

/// A directory with the vendor's key `acme.key`, and the key's public half as it was printed.
fn vendor() -> (TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    let public = ok(dir.path(), "keygen --kid acme");
    (dir, public.trim().to_owned())
}

fn license(dir: &Path, words: &[&str]) -> Output {
    command(binary()).arg("license").args(words).current_dir(dir).output().unwrap()
}

/// What a command that succeeds prints; its arguments are the words of `line`.
#[track_caller]
fn ok(dir: &Path, line: &str) -> String {
    let output = license(dir, &line.split_whitespace().collect::<Vec<_>>());
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && errors.is_empty(), "{line}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// What a command that fails complains of, in one line.
#[track_caller]
fn fails(dir: &Path, line: &str) -> String {
    let output = license(dir, &line.split_whitespace().collect::<Vec<_>>());
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{line}: {errors}");
    assert_eq!(errors.lines().count(), 1, "{errors}");
    errors
}

#[test]
fn a_private_key_is_its_owners_alone_and_is_not_written_over_unless_forced() {
    let (dir, public) = vendor();
    let path = dir.path().join("acme.key");
    let mode = || fs::metadata(&path).unwrap().mode() & 0o7777;
    let first = fs::read_to_string(&path).unwrap();
    let key: Value = serde_json::from_str(&first).unwrap();
    assert_eq!((mode(), key["kid"].as_str()), (0o600, Some("acme")));
    assert!(public.starts_with("acme k4.public.") && !public.contains(key["secret"].as_str().unwrap()), "{public}");

    let said = fails(dir.path(), "keygen --kid acme");
    assert!(said.contains("acme.key already exists") && said.contains("--force"), "{said}");
    assert_eq!(fs::read_to_string(&path).unwrap(), first);

    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    assert_ne!(ok(dir.path(), "keygen --kid acme --force").trim(), public);
    assert!(mode() == 0o600 && fs::read_to_string(&path).unwrap() != first);

    ok(dir.path(), "keygen --kid acme-2 --out other");
    let mut files: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|file| file.unwrap().file_name()).collect();
    files.sort();
    assert_eq!(files, ["acme.key", "other"], "and nothing is left beside them");
    for kid in ["acm\u{e9}", "a/b", &"k".repeat(65)] {
        assert!(fails(dir.path(), &format!("keygen --kid {kid}")).contains("is not a valid key name"), "{kid}");
    }
    assert!(fails(dir.path(), "keygen --kid acme --out nowhere/key").contains("cannot write the key to nowhere/key"));
}

#[test]
fn what_is_issued_is_inspected_in_plain_words() {
    let (dir, public) = vendor();
    let options = "--issuer Acme --customer Ada --expires 2099-09-26 --not-before 2026-01-02 --grace-days 14 \
                   --updates-until 2027-09-26 --feature export --feature sso --limit users=25 --limit seats=0";
    let token = ok(
        dir.path(),
        &format!("issue --key acme.key --plugin report --instance {} --instance * {options}", INSTANCE.to_uppercase()),
    );
    assert!(token.starts_with("v4.public.") && token.lines().count() == 1, "the token alone: {token}");
    let token = token.trim();

    let key = public.replacen(' ', "=", 1);
    let known =
        format!("--public-key {key} --plugin report --instance {INSTANCE} --release-date 2027-09-26 --now 2099-09-26T23:59:59Z");
    let report = ok(dir.path(), &format!("inspect {token} {known}"));
    for line in [
        "issued      by Acme at 20",
        "customer    Ada\n",
        "plugin      report\n",
        &format!("instances   {INSTANCE}, every one\n"),
        "begins      2026-01-02T00:00:00Z\n",
        "expires     2099-09-27T00:00:00Z, and the plugin still runs for 14 days after that\n",
        "releases    up to 2027-09-26\n",
        "features    export, sso\n",
        "limits      seats 0, users 25\n",
        "  signature   ok: it is signed with the key acme\n",
        "  plugin      ok: it is for report\n",
        &format!("  instance    ok: it is for {INSTANCE}\n"),
        "  release     ok: it covers the release of 2027-09-26\n",
        "  end         ok: it expires in 1 day\n",
    ] {
        assert!(report.contains(line), "no {line:?}: {report}");
    }
    assert!(!report.contains("refused") && !report.contains("not checked"), "{report}");

    let bare = ok(dir.path(), &format!("issue --key acme.key --plugin report --instance {INSTANCE}"));
    let report = ok(dir.path(), &format!("inspect {bare}"));
    for line in [
        "issued      by acme at",
        "customer    not named\n",
        "begins      at once\n",
        "expires     never\n",
        "releases    every one\n",
        "features    none\n",
        "limits      none\n",
        "  signature   not checked: give",
        "  end         ok: it never expires\n",
    ] {
        assert!(report.contains(line), "no {line:?}: {report}");
    }
}

/// One look shows all that is wrong, and the exit code that something is.
#[test]
fn every_check_has_a_verdict_also_after_one_that_failed() {
    let (dir, public) = vendor();
    let key = public.replacen(' ', "=", 1);
    let another = ok(dir.path(), "keygen --kid acme --out another.key").trim().replacen(' ', "=", 1);
    let token = ok(
        dir.path(),
        &format!(
            "issue --key acme.key --plugin report --instance {INSTANCE} --expires 2027-09-26 --grace-days 2 --updates-until 2027-01-01"
        ),
    );
    let token = token.trim();
    for (options, codes) in [
        (format!("--public-key {key} --now 2027-09-28T12:00:00Z"), &[][..]),
        (format!("--public-key {another}"), &["bad_signature"]),
        (format!("--public-key {}", key.replacen("acme", "other", 1)), &["unknown_key"]),
        (
            "--plugin other --instance x --release-date 2027-01-02 --now 2030-01-01T00:00:00Z".to_owned(),
            &["wrong_plugin", "wrong_instance", "update_not_covered", "expired"],
        ),
        (
            format!("--public-key {another} --plugin other --now 2020-01-01T00:00:00Z"),
            &["bad_signature", "wrong_plugin", "clock_not_set"],
        ),
    ] {
        let output = license(dir.path(), &format!("inspect {token} {options}").split_whitespace().collect::<Vec<_>>());
        let report = String::from_utf8(output.stdout).unwrap();
        let found: Vec<_> =
            report.lines().filter_map(|line| line.split_once("refused: ")?.1.split_once(':')).map(|(code, _)| code).collect();
        assert_eq!(found, codes, "{report}");
        let errors = String::from_utf8(output.stderr).unwrap();
        match codes.first() {
            None => assert!(output.status.success() && report.contains("its grace period ends in 1 day\n"), "{report}{errors}"),
            Some(code) => {
                assert!(errors.starts_with(&format!("plugrack: licence: {code}: ")) && errors.lines().count() == 1, "{errors}")
            }
        }
    }
    assert!(fails(dir.path(), "inspect hello").starts_with("plugrack: licence: malformed: "));

    let mut child =
        command(binary()).args(["license", "inspect", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), format!(" {token}\n\n").as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && String::from_utf8_lossy(&output.stdout).contains("plugin      report\n"));
}

#[test]
fn what_cannot_be_issued_is_one_sentence() {
    let (dir, _) = vendor();
    fs::write(dir.path().join("broken"), r#"{"kid":"acme","secret":"k4.secret.c2VjcmV0"}"#).unwrap();
    fs::write(dir.path().join("text"), "k4.secret.c2VjcmV0").unwrap();
    for (line, expected) in [
        ("--key nowhere --plugin p --instance *", "cannot read the key nowhere"),
        ("--key text --plugin p --instance *", "text is not a private key"),
        ("--key broken --plugin p --instance *", "the key acme is not a private key"),
        ("--key acme.key --plugin P --instance *", "\"P\" is not a valid plugin id"),
        ("--key acme.key --plugin p --instance here", "\"here\" is not an instance id"),
        ("--key acme.key --plugin p --instance * --limit a=1 --limit a=2", "the limit \"a\" is given twice"),
        ("--key acme.key --plugin p --instance * --grace-days 1", "has no grace period"),
        (
            "--key acme.key --plugin p --instance * --expires 2027-01-01 --not-before 2027-01-02",
            "would expire at 2027-01-02T00:00:00Z, before it becomes valid",
        ),
        (&format!("--key acme.key --plugin p --instance * --customer {}", "x".repeat(8000)), "over the limit of 8192"),
    ] {
        let said = fails(dir.path(), &format!("issue {line}"));
        assert!(said.contains(expected) && !said.contains("c2VjcmV0"), "{line}: {said}");
    }
    for option in [
        "--expires 2027-02-29",
        "--expires soon",
        "--updates-until 2027-01-01T00:00:00Z",
        "--grace-days 3651",
        "--limit a",
        "--limit =1",
        "--limit a=-1",
        "--limit a=9007199254740992",
    ] {
        let line = format!("issue --key acme.key --plugin p --instance * {option}");
        assert_eq!(license(dir.path(), &line.split(' ').collect::<Vec<_>>()).status.code(), Some(2), "{option}");
    }
}

/// Everybody has the private half of this key, and the program that is compiled with it says so.
#[test]
fn the_example_s_key_is_marked_as_for_trying_only() {
    let example = root().join("plugins-examples/licensed-rust");
    let key = fs::read_to_string(example.join("demo.key")).unwrap();
    assert!(key.contains("for trying the examples only") && key.contains("\"kid\":\"demo-for-trying-only\""), "{key}");
    let token = ok(&example, &format!("issue --key demo.key --plugin licensed-rust --instance {INSTANCE}"));
    let source = fs::read_to_string(example.join("src/main.rs")).unwrap();
    let public = source.split('"').find(|text| text.starts_with("k4.public.")).unwrap();
    let report = ok(&example, &format!("inspect {} --public-key demo-for-trying-only={public}", token.trim()));
    assert!(report.contains("signature   ok"), "{report}");
}
