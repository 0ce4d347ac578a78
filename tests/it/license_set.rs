//! Setting a licence never costs a good one: what is judged before anything is written, and what a refusal gives back.

use crate::license::{in_days, proprietary, sql, token};
use crate::support::{Server, Site, binary, command, install_fake, metadata, pause, root, wait_for};
use rusqlite::Connection;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

/// Pairs of a table in the database.
type Rows = Vec<(String, String)>;

/// The licences in the database, and what is kept of those before them.
fn stored(data: &Path) -> (Rows, Rows) {
    let connection = Connection::open(data.join("plugrack.db")).unwrap();
    let rows = |sql: &str| {
        let mut statement = connection.prepare(sql).unwrap();
        let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
        rows.collect::<Result<Rows, _>>().unwrap()
    };
    (
        rows("SELECT plugin, token FROM licenses ORDER BY plugin"),
        rows("SELECT key, value FROM settings WHERE key LIKE 'license_before:%'"),
    )
}

/// Asserts that `p` has this licence, and that none is on trial.
#[track_caller]
fn assert_settled(data: &Path, token: Option<&str>) {
    let expected = token.map(|token| ("p".to_owned(), token.to_owned()));
    assert_eq!(stored(data), (Vec::from_iter(expected), Vec::new()));
}

fn pid(server: &Server) -> i64 {
    server.plugin("p")["process"]["pid"].as_i64().unwrap()
}

fn put(server: &Server, token: &str) -> (u16, Value) {
    server.api("PUT", "/plugins/p/license", token.as_bytes())
}

/// A host whose plugin `p` runs with a good licence and takes no other.
fn licensed(refusal: &Value) -> (Server, String) {
    let good = token(&json!({"jti": "good"}));
    let mut license = refusal.clone();
    license["token"] = json!(good);
    let settings = json!({"metadata": metadata("p"), "license": license});
    let server = Site::new().args(&["--start-timeout", "3s"]).fake_with("p", &settings).start();
    assert_eq!(server.cli(&["license", "set", "p", &good, "--force"]), "p: valid; ready\n");
    (server, good)
}

fn refusal(code: &str) -> Value {
    json!({"code": code, "text": format!("licence: {code}: do this")})
}

#[test]
fn what_needs_no_key_is_judged_before_anything_is_written() {
    let (server, good) = licensed(&refusal("unknown_key"));
    let here = server.cli(&["instance"]).trim().to_owned();
    let other = "5f0c3f0e-8a52-4c1e-9d55-0c6a4f0b7a11";
    let cut = &good[..good.len() - 8];
    let wrong = [
        ("hello".to_owned(), 400, "bad_license", vec!["v4.public"]),
        (cut.to_owned(), 400, "bad_license", vec!["footer"]),
        (good.replace("v4.public.", "v4.public.A"), 400, "bad_license", vec!["not a licence"]),
        (token(&json!({"inst": "all"})), 400, "bad_license", vec!["claims"]),
        (token(&json!({"exp": "2099-02-30T00:00:00Z"})), 400, "bad_license", vec!["2099-02-30"]),
        (token(&json!({"aud": "other"})), 422, "wrong_plugin", vec!["\"other\"", "\"p\""]),
        (token(&json!({"inst": [other]})), 422, "wrong_instance", vec![other, &here]),
        (token(&json!({"inst": []})), 422, "wrong_instance", vec![&here]),
        (token(&json!({"exp": "2026-02-01T00:00:00Z"})), 422, "expired", vec!["2026-02-01T00:00:00Z", "and it is 2"]),
        (token(&json!({"exp": in_days(-8), "grace_days": 7})), 422, "expired", vec!["grace"]),
        (token(&json!({"nbf": "2999-01-01T00:00:00Z"})), 422, "not_yet_valid", vec!["2999-01-01T00:00:00Z", "it is 2"]),
        (token(&json!({"iat": "2999-01-01T00:00:00Z"})), 422, "clock_not_set", vec!["2999-01-01T00:00:00Z", "the clock shows 2"]),
    ];
    let running = pid(&server);
    for (token, status, code, words) in &wrong {
        let (answered, answer) = put(&server, token);
        let message = answer["error"]["message"].as_str().unwrap();
        assert_eq!((answered, &answer["error"]["code"]), (*status, &json!(code)), "{answer}");
        assert!(words.iter().all(|word| message.contains(word)), "{words:?} in {message}");
        let output = server.site().cli(&["license", "set", "p", token]);
        assert_eq!((output.status.code(), &*output.stdout), (Some(1), &b""[..]), "{output:?}");
        // The same but for the time.
        let complaint = String::from_utf8(output.stderr).unwrap();
        assert!(complaint.starts_with("plugrack: ") && complaint.lines().count() == 1, "{complaint}");
        assert!(words.iter().all(|word| complaint.matches(word).count() == message.matches(word).count()), "{complaint}");
        assert_eq!((pid(&server), server.get("/p/init").json()["license"].as_str()), (running, Some(&*good)), "{message}");
        assert_settled(server.site().data(), Some(&good));
    }
    // Whether it runs or not.
    for verb in ["stop", "disable"] {
        server.cli(&[verb, "p"]);
        for (token, status, code, _) in &wrong {
            let (answered, answer) = put(&server, token);
            assert_eq!((answered, &answer["error"]["code"]), (*status, &json!(code)), "{answer}");
        }
        assert_settled(server.site().data(), Some(&good));
    }
    let events = server.plugin("p")["events"].to_string();
    assert_eq!(events.matches("license_set").count(), 1, "{events}");
}

#[test]
fn a_newer_plugin_may_know_a_version_that_the_host_does_not() {
    let newer = [token(&json!({"v": 2, "inst": {"of": "another form"}})), token(&json!({"crit": ["seats"], "seats": 3}))];
    let server = Site::new().fake("p").start();
    server.wait_state("p", "ready");
    for token in newer {
        assert_eq!(server.cli(&["license", "set", "p", &token]), "p: valid; ready\n");
        assert_eq!(server.get("/p/init").json()["license"], token);
    }
}

#[test]
fn a_plugin_that_refuses_a_licence_gets_the_previous_one_back_and_runs() {
    let outcome = |why: &str| {
        let again = "the licence and runs with its previous one again";
        match why.strip_prefix("licence: ").and_then(|rest| rest.split_once(": ")) {
            Some((code, what)) => format!("p rejected {again}: {what} ({code})"),
            None => format!("p did not start with {again}: {why}"),
        }
    };
    for (refusal, why) in [
        (refusal("unknown_key"), "licence: unknown_key: do this"),
        (json!({"code": "bad_signature", "text": "no", "exit": 1}), "licence: bad_signature: no"),
        (json!({"code": "clock_not_set", "text": "soon", "exit": 75}), "licence: clock_not_set: soon"),
        (json!({"text": "not with this"}), "exit code 78 (licence or configuration refused): not with this"),
        (json!({"text": "out of my depth", "exit": 1}), "exit code 1: out of my depth"),
        (json!({"code": "config", "text": "set it"}), "exit code 78 (licence or configuration refused): set it (config)"),
        (json!({"hang": true}), "it was not ready within 3 s: it did not answer init"),
    ] {
        let (server, good) = licensed(&refusal);
        let before = pid(&server);
        let (status, answer) = put(&server, &token(&json!({"jti": "refused"})));
        let message = answer["error"]["message"].as_str().unwrap();
        assert_eq!((status, &answer["error"]["code"]), (409, &json!("license_refused")), "{answer}");
        assert_eq!(message, outcome(why));
        let plugin = server.plugin("p");
        assert_eq!((&plugin["state"], &plugin["license"]["state"]), (&json!("ready"), &json!("valid")), "{plugin:#}");
        assert_ne!(pid(&server), before);
        assert_eq!(server.get("/p/init").json()["license"], good);
        assert_settled(server.site().data(), Some(&good));
        wait_for("the event", || server.plugin("p")["events"].to_string().contains("license_restored").then_some(()));
        assert_eq!(server.plugin("p")["last_end"]["reason"], why);
        // It stays so.
        let server = server.stop().1.start();
        server.wait_state("p", "ready");
        assert_eq!(server.get("/p/init").json()["license"], good);
        if why.starts_with("licence: unknown_key") {
            let output = server.site().cli(&["license", "set", "p", &token(&json!({"jti": "refused"}))]);
            assert_eq!((output.status.code(), &*output.stdout), (Some(1), &b""[..]));
            assert_eq!(String::from_utf8(output.stderr).unwrap(), format!("plugrack: {}\n", outcome(why)));
        }
    }
}

#[test]
fn a_plugin_that_ran_without_a_licence_runs_without_one_again() {
    // It takes none, too.
    let settings = json!({"metadata": metadata("p"), "license": {"token": null, "code": "expired", "text": "renew it"}});
    let server = Site::new().fake_with("p", &settings).start();
    server.wait_state("p", "ready");
    let complaint = server.cli_fails(&["license", "set", "p", &token(&json!({}))]);
    assert_eq!(complaint, "plugrack: p rejected the licence and runs without one again: renew it (expired)\n");
    assert_eq!(server.plugin("p")["license"]["state"], "none");
    assert_settled(server.site().data(), None);
}

#[test]
fn a_first_licence_that_is_refused_stays_to_be_seen() {
    let server = Site::new().fake_with("p", &proprietary("p", "x", "unknown_key")).start();
    server.wait_state("p", "unlicensed");
    let first = token(&json!({}));
    let complaint = server.cli_fails(&["license", "set", "p", &first]);
    let expected = "plugrack: p rejected the licence, which stays set: do this (unknown_key); see: plugrack show p\n";
    assert_eq!(complaint, expected);
    assert_eq!(server.plugin("p")["license"]["code"], "unknown_key");
    assert_settled(server.site().data(), Some(&first));
}

#[test]
fn a_licence_that_its_plugin_has_refused_is_not_lost_to_another_that_it_refuses() {
    let server = Site::new().fake_with("p", &proprietary("p", "x", "expired")).start();
    server.wait_state("p", "unlicensed");
    let (old, new) = (token(&json!({"jti": "old"})), token(&json!({"jti": "new"})));
    server.cli_fails(&["license", "set", "p", &old]);
    let complaint = server.cli_fails(&["license", "set", "p", &new]);
    assert_eq!(complaint, "plugrack: p rejected the licence and is started with its previous one again: do this (expired)\n");
    server.wait_state("p", "unlicensed");
    assert_settled(server.site().data(), Some(&old));
}

#[test]
fn by_force_a_licence_is_set_whatever_is_judged_and_stays() {
    let (server, good) = licensed(&refusal("unknown_key"));
    let later = token(&json!({"nbf": "2999-01-01T00:00:00Z"}));
    let foreign = token(&json!({"aud": "other"}));
    for given in ["hello", &*later, &*foreign] {
        let complaint = server.cli_fails(&["license", "set", "p", given, "--force"]);
        assert_eq!(complaint.matches("unknown_key").count(), 1, "{complaint}");
        assert_eq!(server.plugin("p")["state"], "unlicensed");
        assert_settled(server.site().data(), Some(given));
    }
    let json = server.site().cli(&["license", "set", "p", &later, "--force", "--json"]);
    assert_eq!(json.status.code(), Some(1));
    assert_eq!(serde_json::from_slice::<Value>(&json.stdout).unwrap()["license"]["code"], "unknown_key");
    assert!(!String::from_utf8(json.stderr).unwrap().contains("unknown_key"));
    for (query, body, status) in
        [("force=true", "", 400), ("force=true", "a\nb", 400), ("force=perhaps", &*good, 400), ("force=false", &*foreign, 422)]
    {
        let (answered, answer) = server.api("PUT", &format!("/plugins/p/license?{query}"), body.as_bytes());
        assert_eq!(answered, status, "{answer}");
    }
    assert_settled(server.site().data(), Some(&later));
    assert_eq!(server.cli(&["license", "set", "p", &good]), "p: valid; ready\n");
    assert_settled(server.site().data(), Some(&good));
}

#[test]
fn a_licence_set_while_its_plugin_is_stopped_is_on_trial_until_it_starts() {
    let (server, good) = licensed(&refusal("unknown_key"));
    let new = token(&json!({"jti": "new"}));
    for (down, up) in [("stop", "start"), ("disable", "enable")] {
        server.cli(&[down, "p"]);
        let said = server.cli(&["license", "set", "p", &new]);
        assert!(said.starts_with("p: not checked, because the plugin is stopped"), "{said}");
        let shown = server.cli(&["license", "show", "p"]);
        assert!(shown.contains(&format!("previous     {}…, kept until p accepts the new one\n", &good[..18])), "{shown}");
        assert_eq!(stored(server.site().data()).0, [("p".to_owned(), new.clone())]);
        server.cli(&[up, "p"]);
        server.wait_state("p", "ready");
        assert_settled(server.site().data(), Some(&good));
    }
    // One that it accepts ends the trial.
    server.cli(&["stop", "p"]);
    server.cli(&["license", "set", "p", &new]);
    install_fake(&server.site().plugins(), "p", &proprietary("p", &new, "unknown_key"));
    server.cli(&["rescan"]);
    server.cli(&["start", "p"]);
    server.wait_state("p", "ready");
    assert_settled(server.site().data(), Some(&new));
    // One that is removed takes the one before it along.
    server.cli(&["stop", "p"]);
    server.cli(&["license", "set", "p", &good]);
    server.cli(&["license", "remove", "p"]);
    assert_settled(server.site().data(), None);
}

/// The host is killed while a plugin looks at its new licence.
fn killed_in_a_trial(accepts: bool) {
    let (old, new) = (token(&json!({"jti": "old"})), token(&json!({"jti": "new"})));
    let mut settings = proprietary("p", &old, "bad_signature");
    settings["mode"] = json!("wait-init");
    let server = Site::new().fake_with("p", &settings).start();
    let go = server.site().data().join("plugin-data/p/go");
    wait_for("its directory", || go.parent().unwrap().exists().then_some(()));
    fs::write(&go, "").unwrap();
    server.wait_state("p", "unlicensed");
    assert_eq!(put(&server, &old).1["state"], "ready");
    fs::remove_file(&go).unwrap();
    let before = pid(&server);

    let mut set = command(binary());
    set.arg("--data").arg(server.site().data()).args(["license", "set", "p", &new]).stderr(Stdio::null());
    let mut set = set.spawn().unwrap();
    wait_for("the plugin to be started with it", || {
        let plugin = server.plugin("p");
        (plugin["state"] == "starting" && plugin["process"]["pid"] != before).then_some(())
    });
    let site = server.kill();
    set.wait().unwrap();
    let (tokens, previous) = stored(site.data());
    assert_eq!((&*tokens, previous.len()), (&[("p".to_owned(), new.clone())][..], 1));
    assert_eq!(serde_json::from_str::<Value>(&previous[0].1).unwrap(), json!({"token": old, "ran": true}));

    if accepts {
        settings["license"]["token"] = json!(new);
        install_fake(&site.plugins(), "p", &settings);
    }
    // A second time, before there is a verdict.
    let server = site.start();
    server.wait_state("p", "starting");
    pause(Duration::from_millis(200));
    let site = server.kill();
    assert_eq!(stored(site.data()), (tokens, previous));
    fs::write(&go, "").unwrap();
    let server = site.start();
    server.wait_state("p", "ready");
    let expected = if accepts { new } else { old };
    assert_eq!(server.get("/p/init").json()["license"], expected);
    assert_settled(server.site().data(), Some(&expected));
}

#[test]
fn a_host_killed_in_the_middle_has_not_lost_the_previous_licence() {
    killed_in_a_trial(false);
}

#[test]
fn a_host_killed_in_the_middle_keeps_a_licence_that_is_accepted_later() {
    killed_in_a_trial(true);
}

#[test]
fn a_previous_licence_that_somebody_has_broken_by_hand_is_none() {
    let (server, good) = licensed(&refusal("unknown_key"));
    sql(server.site(), "INSERT INTO settings (key, value) VALUES ('license_before:p', 'no JSON')");
    server.cli(&["restart", "p"]);
    server.wait_state("p", "ready");
    assert_eq!(server.cli(&["license", "set", "p", &good]), "p: valid; ready\n");
    assert_settled(server.site().data(), Some(&good));
}

/// The examples, which verify signatures: a licence of another vendor's key costs them nothing.
#[test]
fn the_proprietary_examples_run_on_when_a_licence_of_another_key_is_set() {
    let ids = ["licensed-rust", "licensed-python"];
    let server = Site::new().example(ids[0]).example(ids[1]).start();
    let instance = server.cli(&["instance"]).trim().to_owned();
    let dir = tempfile::tempdir().unwrap();
    let key = dir.path().join("other.key");
    // Of the same name, so that the signature alone tells.
    let keygen = server.site().cli(&["license", "keygen", "--kid", "demo-for-trying-only", "--out", key.to_str().unwrap()]);
    assert!(keygen.status.success(), "{keygen:?}");
    let demo = root().join("plugins-examples/licensed-rust/demo.key");
    for id in ids {
        let issue = |key: &Path| {
            let arguments = ["license", "issue", "--plugin", id, "--instance", &instance, "--key", key.to_str().unwrap()];
            String::from_utf8(server.site().cli(&arguments).stdout).unwrap().trim().to_owned()
        };
        server.wait_state(id, "unlicensed");
        server.cli(&["license", "set", id, &issue(&demo)]);
        let complaint = server.cli_fails(&["license", "set", id, &issue(&key)]);
        let expected = format!("plugrack: {id} rejected the licence and runs with its previous one again: ");
        assert!(complaint.starts_with(&expected) && complaint.ends_with(" (bad_signature)\n"), "{complaint}");
        assert_eq!((&server.plugin(id)["state"], &server.plugin(id)["license"]["state"]), (&json!("ready"), &json!("valid")));
        assert_eq!(server.get(&format!("/{id}")).status, 200);
    }
}
