//! Licences as the host carries them: set, handed over, shown, warned of, and what follows when a plugin refuses one.

use crate::support::http::Reply;
use crate::support::{Server, Site, binary, command, install_fake, metadata, pause, root, wait_for, wait_within};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use jiff::{SignedDuration, Timestamp};
use rusqlite::Connection;
use serde_json::{Value, json};
use std::fs;
use std::io::Write;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

/// A token for the plugin `p` of these claims beside those that must be there. Nobody here verifies its signature.
pub(crate) fn token(claims: &Value) -> String {
    let mut all = json!({"v": 1, "jti": "L", "iss": "V", "aud": "p", "inst": ["*"], "iat": "2026-01-01T00:00:00Z"});
    all.as_object_mut().unwrap().extend(claims.as_object().unwrap().clone());
    let payload = [all.to_string().as_bytes(), &[7; 64]].concat();
    format!("v4.public.{}.{}", BASE64URL.encode(payload), BASE64URL.encode(r#"{"kid":"k"}"#))
}

/// So many days from now, and an hour, so that it stays that many while the test runs.
pub(crate) fn in_days(days: i64) -> String {
    let time = Timestamp::now() + SignedDuration::from_hours(24 * days - 1);
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// A plugin that takes this token alone, and refuses others by a code.
pub(crate) fn proprietary(id: &str, token: &str, code: &str) -> Value {
    json!({"metadata": metadata(id), "license": {"token": token, "code": code, "text": format!("licence: {code}: do this")}})
}

pub(crate) fn sql(site: &Site, sql: &str) {
    Connection::open(site.data().join("plugrack.db")).unwrap().execute_batch(sql).unwrap();
}

/// An operator's command with something to read.
fn cli_reading(site: &Site, arguments: &[&str], input: &str) -> Output {
    let mut cli = command(binary());
    cli.arg("--data").arg(site.data()).args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = cli.spawn().unwrap();
    // One that does not want it has ended by then.
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap_or_default();
    child.wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The status of a licence that its plugin has refused.
fn refused(code: &str, message: &str) -> Value {
    let state = if code == "expired" { "expired" } else { "refused" };
    json!({"state": state, "code": code, "message": message, "expires_at": null})
}

#[test]
fn a_plugin_that_refuses_its_licence_is_unlicensed_and_not_tried_again() {
    let codes = [
        "missing",
        "malformed",
        "unknown_key",
        "bad_signature",
        "unsupported",
        "wrong_plugin",
        "wrong_instance",
        "update_not_covered",
        "not_yet_valid",
        "expired",
    ];
    let id = |code: &str| code.replace('_', "-");
    let mut site = Site::new();
    for code in codes {
        site = site.fake_with(code, &proprietary(&id(code), "", code));
    }
    // It says neither the code nor the word, and does not leave by the code that it should.
    let brief = json!({"metadata": metadata("brief"), "license": {"code": "expired", "text": "renew it", "exit": 1}});
    let server = site.fake_with("brief", &brief).start();
    let said = |code: &str| (id(code), code.to_owned(), format!("licence: {code}: do this"));
    let brief = ("brief".to_owned(), "expired".to_owned(), "licence: expired: renew it".to_owned());
    for (id, code, reason) in codes.map(said).into_iter().chain([brief]) {
        let plugin = server.wait_state(&id, "unlicensed");
        let what = reason.rsplit(": ").next().unwrap();
        assert_eq!((&plugin["reason"], &plugin["license"]), (&json!(reason), &refused(&code, what)));
        let (process, end) = (&plugin["process"], &plugin["last_end"]);
        assert_eq!((&process["pid"], &plugin["retry_at"], &process["restarts"]), (&Value::Null, &Value::Null, &json!(0)));
        assert_eq!(end["exit"], format!("licence refused ({code})"));
        assert!(plugin["advice"].as_str().unwrap().contains(&format!("plugrack license set {id} TOKEN")), "{plugin:#}");
        assert!(server.log().contains(&format!("{id}: unlicensed: {reason}\n")), "{}", server.log());
        // Events are written a moment later.
        wait_for("its event", || (server.plugin(&id)["events"][0]["kind"] == "unlicensed").then_some(()));
    }
    let others_are_told = |reply: &Reply, status: u16| {
        assert_eq!(reply.status, status);
        assert!(!reply.text().contains("licen") && !reply.text().contains("renew"), "{}", reply.text());
    };
    others_are_told(&server.get("/brief/x"), 503);
    let index = server.get("/");
    others_are_told(&index, 200);
    assert!(index.text().contains("unavailable"), "{}", index.text());
    // What starts others again does not start these.
    server.cli(&["rescan"]);
    assert_eq!(server.plugin("expired")["state"], "unlicensed");
    let list = server.cli(&["list"]);
    let line = list.lines().find(|line| line.starts_with("brief ")).unwrap();
    assert!(line.contains("  unlicensed  ") && line.contains("  expired  ") && line.ends_with("  renew it (expired)"), "{list}");
}

#[test]
fn a_clock_that_is_not_set_passes_by_itself() {
    let clock = json!({"code": "clock_not_set", "text": "licence: clock_not_set: set it", "exit": 75});
    let server = Site::new().fake_with("p", &json!({"metadata": metadata("p"), "license": clock})).start();
    let plugin = server.wait_state("p", "backing_off");
    assert_eq!((&plugin["reason"], &plugin["license"]), (&clock["text"], &refused("clock_not_set", "set it")));
    assert!(plugin["retry_at"].is_string(), "{plugin:#}");
    assert!(plugin["advice"].as_str().unwrap().contains("set the clock"), "{plugin:#}");
    wait_for("another try", || server.plugin("p")["process"]["restarts"].as_i64().filter(|restarts| *restarts > 1));
}

#[test]
fn a_licence_that_is_set_starts_its_plugin_and_one_that_is_removed_ends_it() {
    let good = token(
        &json!({"jti": "L-1", "sub": "Acme \u{1b}[31m", "inst": ["here", "*"], "exp": "2999-01-01T00:00:00Z", "grace_days": 3}),
    );
    let other = token(&json!({"jti": "L-2"}));
    let server = Site::new().fake_with("p", &proprietary("p", &good, "missing")).start();
    server.wait_state("p", "unlicensed");
    assert_eq!(server.cli(&["license", "set", "p", &good]), "p: valid; ready\n");
    assert_eq!(server.get("/p/init").json()["license"], good);
    let shown = server.cli(&["license", "show", "p"]);
    let expected = format!(
        "p: valid; ready\ntoken        {}…\nlicense id   L-1\ncustomer     Acme \\x1b[31m\ninstances    here, *\nexpires      2999-01-01T00:00:00Z\ngrace        3 days\n",
        &good[..18]
    );
    assert_eq!(shown, expected);

    let complaint = server.cli_fails(&["license", "set", "p", &other]);
    assert_eq!(complaint, "plugrack: p rejected the licence and runs with its previous one again: do this (missing)\n");
    assert_eq!(server.plugin("p")["state"], "ready");
    let set = cli_reading(server.site(), &["license", "set", "p", "-", "--json"], &format!("  {good}\n"));
    assert!(set.status.success(), "{set:?}");
    assert_eq!(serde_json::from_slice::<Value>(&set.stdout).unwrap()["license"]["state"], "valid");

    let pid = server.plugin("p")["process"]["pid"].as_i64().unwrap();
    assert_eq!(server.cli(&["license", "remove", "p"]), "p: unlicensed: do this (missing)\n");
    assert!(!crate::support::is_alive(pid));
    let complaint = server.cli_fails(&["license", "remove", "p"]);
    assert_eq!(complaint, "plugrack: no licence is set for the plugin p\n");
    let kinds: Vec<Value> = server.plugin("p")["events"].as_array().unwrap().iter().map(|event| event["kind"].clone()).collect();
    assert!(kinds.contains(&json!("license_set")) && kinds.contains(&json!("license_removed")), "{kinds:?}");
}

#[test]
fn a_licence_outlives_the_host_and_its_plugin_s_file() {
    let good = token(&json!({}));
    let server = Site::new().fake_with("p", &proprietary("p", &good, "missing")).start();
    server.wait_state("p", "unlicensed");
    assert_eq!(server.api("PUT", "/plugins/p/license", good.as_bytes()).1["state"], "ready");
    let server = server.kill().start();
    server.wait_state("p", "ready");
    fs::remove_dir_all(server.site().plugins().join("p")).unwrap();
    server.cli(&["rescan"]);
    install_fake(&server.site().plugins(), "p", &proprietary("p", &good, "missing"));
    server.cli(&["rescan"]);
    server.wait_state("p", "ready");
}

#[test]
fn an_unlicensed_plugin_is_tried_when_its_file_or_its_settings_change() {
    let server =
        Site::new().fake_with("p", &proprietary("p", "x", "expired")).fake_with("q", &proprietary("q", "x", "expired")).start();
    for id in ["p", "q"] {
        server.wait_state(id, "unlicensed");
    }
    let tries = |id: &str| {
        let log = fs::read_to_string(server.site().data().join(format!("logs/{id}.log"))).unwrap();
        log.lines().filter(|line| line.ends_with("licence: expired: do this") && !line.contains("plugrack: ")).count()
    };
    assert_eq!((tries("p"), tries("q")), (1, 1));
    server.cli(&["config", "set", "p", "key", "value"]);
    wait_for("it to be tried", || (tries("p") == 2).then_some(()));
    // Nobody says that the file has changed.
    install_fake(&server.site().plugins(), "q", &json!({"metadata": metadata("q")}));
    server.wait_state("q", "ready");
}

#[test]
fn a_plugin_that_knows_nothing_of_licences_is_told_what_is_set_and_runs() {
    let server = Site::new().fake("p").fake("stopped").fake("off").start();
    let before = server.wait_state("p", "ready");
    assert_eq!(before["license"]["state"], "none");
    let token_for = |id: &str| token(&json!({"aud": id, "exp": "2999-01-01T00:00:00Z"}));
    for (verb, id) in [("stop", "stopped"), ("disable", "off")] {
        let given = token_for(id);
        server.wait_state(id, "ready");
        server.cli(&[verb, id]);
        assert_eq!(server.plugin(id)["license"]["state"], "none");
        let (status, answer) = server.api("PUT", &format!("/plugins/{id}/license"), given.as_bytes());
        assert_eq!((status, &answer["state"], &answer["license"]["state"]), (200, &json!("stopped"), &json!("unchecked")));
        assert!(
            server.cli(&["license", "set", id, &given]).starts_with(&format!("{id}: not checked, because the plugin is stopped"))
        );
    }
    server.cli(&["start", "stopped"]);
    assert_eq!(server.get("/stopped/init").json()["license"], token_for("stopped"));

    let given = token_for("p");
    assert_eq!(server.cli(&["license", "set", "p", &given]), "p: valid; ready\n");
    let running = server.plugin("p");
    assert_ne!(running["process"]["pid"], before["process"]["pid"]);
    assert_eq!(server.get("/p/init").json()["license"], given);
    assert_eq!(server.cli(&["license", "remove", "p"]), "p: none; ready\n");
    assert_eq!(server.get("/p/init").json()["license"], Value::Null);
}

#[test]
fn what_is_no_licence_is_refused_in_a_sentence_and_changes_nothing() {
    let server = Site::new().fake("p").file("data", b"", 0o644).start();
    let pid = server.wait_state("p", "ready")["process"]["pid"].clone();
    let long = format!("v4.public.{}.e30", "A".repeat(8192));
    for (body, why) in
        [("hello", "this is not a licence"), ("", "this is not a licence"), (&*long, "at most 8192 bytes, and this has 8206")]
    {
        let (status, answer) = server.api("PUT", "/plugins/p/license", body.as_bytes());
        assert_eq!((status, &answer["error"]["code"]), (400, &json!("bad_license")));
        assert!(answer["error"]["message"].as_str().unwrap().contains(why), "{answer}");
    }
    for (method, path, status) in [
        ("PUT", "/plugins/nobody/license", 404),
        ("PUT", "/plugins/data/license", 409),
        ("DELETE", "/plugins/p/license", 404),
        ("POST", "/plugins/p/license", 405),
        ("GET", "/plugins/p/license", 200),
    ] {
        assert_eq!(server.api(method, path, b"v4.public.AAAA.e30").0, status, "{method} {path}");
    }
    assert_eq!((&server.plugin("p")["license"]["state"], &server.plugin("p")["process"]["pid"]), (&json!("none"), &pid));
    assert_eq!(server.cli(&["license", "show", "p"]), "p: none; ready\n");
}

#[test]
fn a_token_is_shown_nowhere() {
    let tokens_for = |id: &str| [1, 2].map(|n| token(&json!({"aud": id, "jti": n.to_string(), "sub": "x".repeat(50)})));
    let tokens = tokens_for("p");
    let server = Site::new().env("RUST_LOG", "trace").fake_with("p", &proprietary("p", &tokens[0], "expired")).fake("q").start();
    let mut shown = String::new();
    for (id, state) in [("p", "unlicensed"), ("q", "ready")] {
        server.wait_state(id, state);
        for token in &tokens_for(id) {
            let set = server.site().cli(&["license", "set", id, token]);
            let get = |path: &str| server.api("GET", &format!("/plugins{path}"), b"").1.to_string();
            shown +=
                &(text(&set.stdout) + &text(&set.stderr) + &get("") + &get(&format!("/{id}")) + &get(&format!("/{id}/license")));
            shown += &(server.cli(&["license", "show", id]) + &server.cli(&["show", id]) + &server.cli(&["list"]));
        }
        server.cli(&["license", "remove", id]);
        shown += &fs::read_to_string(server.site().data().join(format!("logs/{id}.log"))).unwrap_or_default();
    }
    shown += &server.log();
    // Its beginning is, by which it is known.
    assert!(shown.contains(&format!("{}…", &tokens[1][..18])), "{shown}");
    for token in tokens.into_iter().chain(tokens_for("q")) {
        assert!(!shown.contains(&token[..40]) && !shown.contains(&token[40..80]), "{shown}");
    }
}

#[test]
fn the_list_says_how_each_plugin_stands() {
    let cases = [
        ("forever", json!({}), "valid"),
        ("far", json!({"exp": in_days(40)}), "valid"),
        ("near", json!({"exp": in_days(7)}), "expires in 7 days"),
        ("late", json!({"exp": in_days(-3), "grace_days": 14}), "grace"),
    ];
    let server = cases.iter().fold(Site::new(), |site, (id, ..)| site.fake(id)).start();
    for (id, claims, expected) in &cases {
        server.wait_state(id, "ready");
        let mut claims = claims.clone();
        claims["aud"] = json!(id);
        let set = server.cli(&["license", "set", id, &token(&claims)]);
        assert_eq!(set, format!("{id}: {expected}; ready\n"));
    }
    let (list, api) = (server.cli(&["list"]), server.api("GET", "/plugins", b"").1);
    for (id, _, expected) in cases {
        let state = if id == "near" { "expiring" } else { expected };
        let line = list.lines().find(|line| line.starts_with(id)).unwrap();
        assert!(line.contains("  ready  ") && line.contains(&format!("  {state}  ")), "{list}");
        let why = match id {
            "near" => "the licence expires in 7 days",
            "late" => "the licence expired, and its grace period ends in 11 days",
            _ => "-",
        };
        assert!(line.ends_with(&format!("  {why}")), "{list}");
        let plugin = api["plugins"].as_array().unwrap().iter().find(|plugin| plugin["id"] == id).unwrap();
        assert_eq!((&plugin["license"]["state"], &plugin["license"]), (&json!(state), &server.plugin(id)["license"]));
        assert_eq!(plugin["license"]["expires_at"].is_string(), id != "forever", "{plugin:#}");
        let show = server.cli(&["show", id]);
        assert!(show.contains(&format!("\n  license      {expected}\n")), "{show}");
    }
}

#[test]
fn the_end_of_a_licence_is_warned_of_once_a_day() {
    let warned = |site: &Site| {
        let log = fs::read_to_string(site.data().join("host.log")).unwrap();
        ["near: its licence expires in 7 days, at", "late: its licence expired at", "far: its licence"]
            .map(|warning| log.matches(warning).count())
    };
    let mut server = Site::new().fake("near").fake("late").fake("far").start();
    for (id, days) in [("near", 7), ("late", -3), ("far", 40)] {
        server.wait_state(id, "ready");
        server.cli(&["license", "set", id, &token(&json!({"aud": id, "exp": in_days(days), "grace_days": 14}))]);
        server.cli(&["restart", id]);
    }
    // What is in the log when the host has ended is all there is.
    let mut site = server.stop().1;
    assert_eq!(warned(&site), [1, 1, 0]);
    for (days_ago, expected) in [(0, [1, 1, 0]), (1, [2, 2, 0]), (0, [2, 2, 0])] {
        sql(&site, &format!("UPDATE licenses SET warned = warned - {days_ago}"));
        server = site.start();
        for id in ["near", "late", "far"] {
            server.wait_state(id, "ready");
        }
        site = server.stop().1;
        assert_eq!(warned(&site), expected, "{days_ago} days ago");
    }
}

#[test]
fn the_mark_of_time_is_told_to_plugins_and_outlives_the_host() {
    let mark = |server: &Server| {
        server.wait_state("p", "ready");
        let mark = server.get("/p/init").json()["not_before_time"].as_str().unwrap().to_owned();
        assert_eq!(mark.len(), "2026-01-01T00:00:00Z".len(), "{mark}");
        mark
    };
    let before = Timestamp::now().as_second();
    let server = Site::new().fake("p").start();
    let first = mark(&server);
    let time = first.parse::<Timestamp>().unwrap().as_second();
    assert!((before..=Timestamp::now().as_second()).contains(&time), "{first}");
    let kept = |site: &Site| -> i64 {
        let database = Connection::open(site.data().join("plugrack.db")).unwrap();
        let sql = "SELECT CAST(value AS INTEGER) FROM settings WHERE key = 'time_mark'";
        database.query_row(sql, [], |row| row.get(0)).unwrap()
    };
    // What the host has run is added at the stop, to the millisecond.
    let at_first = kept(server.site());
    let site = server.stop().1;
    let at_stop = kept(&site);
    assert!(at_first < at_stop && at_stop <= Timestamp::now().as_millisecond(), "{at_first} {at_stop}");
    let server = site.start();
    assert_eq!(mark(&server).parse::<Timestamp>().unwrap().as_second(), at_stop / 1000);

    // Such as the clock was set back by a year since.
    let site = server.kill();
    let later = Timestamp::now() + SignedDuration::from_hours(24 * 365);
    sql(&site, &format!("UPDATE settings SET value = '{}' WHERE key = 'time_mark'", later.as_millisecond()));
    let server = site.start();
    assert_eq!(mark(&server), later.strftime("%Y-%m-%dT%H:%M:%SZ").to_string());
    // The host judges by it too.
    let ended = token(&json!({"exp": in_days(40)}));
    let complaint = server.cli_fails(&["license", "set", "p", &ended]);
    assert!(
        complaint.contains("it expired at") && complaint.contains(&later.strftime("%Y-%m-%dT%H:").to_string()),
        "{complaint}"
    );
    assert_eq!(server.cli(&["license", "set", "p", &ended, "--force"]), "p: grace; ready\n");
}

#[test]
fn a_new_instance_id_is_made_when_no_host_runs_and_the_word_is_typed() {
    let server = Site::new().fake("named").fake("site").start();
    let old = server.cli(&["instance"]).trim().to_owned();
    for (id, instance) in [("named", &*old), ("site", "*")] {
        server.wait_state(id, "ready");
        server.cli(&["license", "set", id, &token(&json!({"aud": id, "inst": [instance, "another"]}))]);
    }
    let complaint = server.cli_fails(&["instance", "rotate", "--yes"]);
    assert!(complaint.contains(&server.pid().to_string()) && complaint.contains("stop it"), "{complaint}");
    let site = server.stop().1;
    let instance = || text(&site.cli(&["instance"]).stdout).trim().to_owned();
    let says = format!("the licence of named is for instance {old} and will no longer match\ntype rotate to create");
    for typed in ["", "yes\n"] {
        let output = cli_reading(&site, &["instance", "rotate"], typed);
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output.stdout).starts_with(&says), "{output:?}");
        assert!(text(&output.stderr).contains("nothing has changed"), "{output:?}");
    }
    assert_eq!(instance(), old);

    let output = cli_reading(&site, &["instance", "rotate"], "rotate\n");
    let new = instance();
    assert!(output.status.success() && text(&output.stdout).ends_with(&format!(": {new}\n")), "{output:?}");
    assert_ne!(new, old);
    let output = site.cli(&["instance", "rotate", "--yes"]);
    let newer = instance();
    assert_eq!(text(&output.stdout), format!("{newer}\n"), "no licence names this one");
    assert_ne!(newer, new);

    let server = site.start();
    server.wait_state("named", "ready");
    assert_eq!(server.get("/named/init").json()["instance_id"], newer);
    assert_eq!(server.api("GET", "/instance", b"").1["instance_id"], newer);
}

#[test]
fn where_there_is_no_instance_there_is_none_to_rotate() {
    let site = Site::new();
    let output = site.cli(&["instance", "rotate", "--yes"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("there is no instance"), "{output:?}");
    assert!(!site.data().join("plugrack.db").exists());
}

/// A token for the example `licensed-rust`, which verifies it: signed with its demo key, for the server's instance.
fn demo_token(server: &Server, more: &[&str]) -> String {
    let key = root().join("plugins-examples/licensed-rust/demo.key");
    let instance = server.cli(&["instance"]).trim().to_owned();
    let issue = ["license", "issue", "--plugin", "licensed-rust", "--instance", &instance, "--key", key.to_str().unwrap()];
    server.cli(&[&issue[..], more].concat()).trim().to_owned()
}

#[test]
fn a_licence_that_begins_later_starts_its_plugin_when_it_is_valid() {
    const ID: &str = "licensed-rust";
    let server = Site::new().example(ID).start();
    server.wait_state(ID, "unlicensed");
    // What is wrong beside the date is refused at once.
    let other = token(&json!({"nbf": "2999-01-01T00:00:00Z"}));
    assert!(server.cli_fails(&["license", "set", ID, &other]).ends_with("(wrong_plugin)\n"));

    let far = demo_token(&server, &["--not-before", "2999-01-01"]);
    let said = server.cli(&["license", "set", ID, &far]);
    assert_eq!(said, format!("{ID}: the licence is set and becomes valid at 2999-01-01T00:00:00Z; {ID} then starts by itself\n"));
    let plugin = server.plugin(ID);
    assert_eq!((&plugin["state"], &plugin["license"]["state"]), (&json!("unlicensed"), &json!("pending")), "{plugin:#}");
    assert!(plugin["retry_at"].as_str().unwrap().starts_with("2999-01-01T00:00:0"), "{plugin:#}");
    assert!(plugin["advice"].as_str().unwrap().contains("starts by itself when its licence is valid"), "{plugin:#}");
    let refused = server.get("/licensed-rust");
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("3600")));

    // One that begins soon, over a restart of the host.
    let begins = Timestamp::now() + SignedDuration::from_secs(40);
    let soon = demo_token(&server, &["--not-before", &begins.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()]);
    assert!(server.cli(&["license", "set", ID, &soon]).contains("then starts by itself"));
    let server = server.kill().start();
    let plugin = server.wait_state(ID, "unlicensed");
    assert_eq!(plugin["license"]["state"], "pending", "{plugin:#}");
    wait_within(Duration::from_secs(180), "the licence to be valid", || (server.plugin(ID)["state"] == "ready").then_some(()));
    assert!(Timestamp::now() >= begins - SignedDuration::from_secs(1), "it is not valid before");
    let plugin = server.plugin(ID);
    assert_eq!((&plugin["license"]["state"], &plugin["process"]["restarts"]), (&json!("valid"), &json!(0)), "{plugin:#}");
    // To a plugin that runs with a good licence, one that begins later would be a loss.
    assert!(server.cli_fails(&["license", "set", ID, &far]).ends_with("(not_yet_valid)\n"));
    assert_eq!(server.plugin(ID)["state"], "ready");
}

#[test]
fn a_mark_of_time_that_is_ahead_is_reset_by_a_command() {
    const ID: &str = "licensed-rust";
    let ahead = Timestamp::now() + SignedDuration::from_hours(24 * 365);
    let set_ahead = |site: &Site| {
        sql(site, &format!("UPDATE settings SET value = '{}' WHERE key = 'time_mark'", ahead.as_millisecond()));
    };
    let clock = |site: &Site| -> Value {
        let output = site.cli(&["license", "clock", "--json"]);
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"))
    };
    let is_ahead = |clock: &Value| clock["now"] == clock["mark"] && clock["now"] != clock["system"];

    let server = Site::new().example(ID).start();
    server.wait_state(ID, "unlicensed");
    server.cli(&["license", "set", ID, &demo_token(&server, &["--expires", &in_days(40)])]);
    assert_eq!(server.plugin(ID)["state"], "ready");
    assert!(!is_ahead(&clock(server.site())));
    let site = server.stop().1;
    set_ahead(&site);
    assert!(is_ahead(&clock(&site)), "without a host it is in the database");

    let server = site.start();
    assert_eq!(server.wait_state(ID, "unlicensed")["license"]["code"], "expired");
    assert!(is_ahead(&clock(server.site())));
    let shown = server.cli(&["license", "clock"]);
    assert!(shown.contains("it is ahead of the system clock") && shown.contains("plugrack license clock reset"), "{shown}");
    let unsure = cli_reading(server.site(), &["license", "clock", "reset"], "no\n");
    assert!(!unsure.status.success() && text(&unsure.stderr).contains("nothing has changed"), "{unsure:?}");
    assert!(is_ahead(&clock(server.site())));
    let sure = cli_reading(server.site(), &["license", "clock", "reset"], "reset\n");
    assert!(sure.status.success(), "{sure:?}");
    assert!(!is_ahead(&clock(server.site())));
    server.wait_state(ID, "ready");
    assert!(server.log().contains("the operator has reset the high-water mark of time"), "{}", server.log());

    // It stays so, and can be done without a host as well.
    let site = server.kill();
    assert!(!is_ahead(&clock(&site)));
    set_ahead(&site);
    assert!(site.cli(&["license", "clock", "reset", "--yes"]).status.success());
    assert!(!is_ahead(&clock(&site)));
    site.start().wait_state(ID, "ready");
}

#[test]
fn restarts_lose_nothing_of_the_mark_of_time() {
    let kept = |site: &Site| -> i64 {
        let database = Connection::open(site.data().join("plugrack.db")).unwrap();
        let sql = "SELECT CAST(value AS INTEGER) FROM settings WHERE key = 'time_mark'";
        database.query_row(sql, [], |row| row.get(0)).unwrap()
    };
    let mut server = Site::new().start();
    let first = kept(server.site());
    let mut ran = Duration::ZERO;
    for _ in 0..3 {
        let begun = Instant::now();
        pause(Duration::from_millis(300));
        ran += begun.elapsed();
        server = server.stop().1.start();
    }
    let passed = kept(server.site()) - first;
    assert!(passed >= i64::try_from(ran.as_millis()).unwrap(), "{passed} ms of {ran:?} were kept");
}
