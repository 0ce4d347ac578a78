//! What the operator can ask and say, by the API and by commands.

use crate::support::{Server, Site, binary, command, wait_for};
use serde_json::{Value, json};
use std::fs;
use std::io::Write;
use std::process::{Output, Stdio};

/// A host with a plugin `p` that is ready.
#[track_caller]
fn with_plugin() -> Server {
    let server = Site::new().fake("p").start();
    server.wait_state("p", "ready");
    server
}

/// Runs a command with bytes on its standard input.
fn cli_with_input(server: &Server, arguments: &[&str], input: &[u8]) -> Output {
    let mut child = command(binary())
        .arg("--data")
        .arg(server.site().data())
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    child.wait_with_output().unwrap()
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

/// Keys that must come through as they are, and how they are written in a path.
const KEYS: [(&str, &str); 9] = [
    ("color", "color"),
    ("a/b//c", "a%2Fb%2F%2Fc"),
    ("a b", "a%20b"),
    ("ключ ☕", "%D0%BA%D0%BB%D1%8E%D1%87%20%E2%98%95"),
    ("100%2F", "100%252F"),
    ("a+b&c=d", "a+b&c=d"),
    ("what?#", "what%3F%23"),
    ("..", ".."),
    ("line\nbreak\"'", "line%0Abreak%22'"),
];

#[test]
fn the_api_is_for_the_holder_of_the_token_alone() {
    let server = with_plugin();
    let token = fs::read_to_string(server.site().data().join("admin-token")).unwrap();
    let token = token.trim();
    let wrong = [
        None,
        Some(String::new()),
        Some("Bearer".into()),
        Some("Bearer ".into()),
        Some("Bearer wrong".into()),
        Some(token.to_owned()),
        Some(format!("Basic {token}")),
        Some(format!("Bearer {}", &token[1..])),
        Some(format!("Bearer {token}0")),
        Some(format!("Bearer {}", token.to_uppercase())),
    ];
    // What there is and what there is not is answered alike.
    let targets = [
        ("GET", "/api"),
        ("GET", "/api/instance"),
        ("GET", "/api/plugins/p"),
        ("GET", "/api/nothing"),
        ("POST", "/api/plugins/p/stop"),
    ];
    let mut bodies = Vec::new();
    for authorization in &wrong {
        for (method, path) in targets {
            let headers: Vec<_> = authorization.iter().map(|value| ("authorization", value.as_str())).collect();
            let reply = server.request(method, path, &headers, b"");
            assert_eq!(reply.status, 401, "{method} {path} {authorization:?}");
            assert_eq!(reply.json()["error"]["code"], "unauthorized");
            assert!(reply.header("www-authenticate").is_some_and(|scheme| scheme.starts_with("Bearer")), "{reply:?}");
            bodies.push(reply.text().to_owned());
        }
    }
    bodies.dedup();
    assert_eq!(bodies.len(), 1, "{bodies:?}");
    assert!(!bodies[0].contains(token) && !bodies[0].contains(server.site().data().to_str().unwrap()));
    assert_eq!(server.plugin("p")["state"], "ready");
    let lower_case = server.request("GET", "/api/instance", &[("authorization", &format!("bearer {token}"))], b"");
    assert_eq!(lower_case.status, 200);
}

#[test]
fn wrong_calls_have_their_status_code_and_sentence() {
    let server = Site::new().fake("p").file("broken", b"", 0o755).start();
    server.wait_state("p", "ready");
    let large = vec![b'x'; 1024 * 1024 + 1];
    let large_setting = json!("x".repeat(16 * 1024)).to_string();
    let long_key = format!("/plugins/p/kv/{}", "k".repeat(513));
    let long_setting = format!("/plugins/p/config/{}", "k".repeat(129));
    let cases: [(&str, &str, &[u8], u16, &str); 44] = [
        ("GET", "", b"", 404, "not_found"),
        ("GET", "/", b"", 404, "not_found"),
        ("GET", "/nothing", b"", 404, "not_found"),
        ("GET", "/plugins/", b"", 404, "not_found"),
        ("POST", "/plugins/p/explode", b"", 404, "not_found"),
        ("GET", "/plugins/p/kv/a/b", b"", 404, "not_found"),
        ("GET", "/plugins/none", b"", 404, "not_found"),
        ("POST", "/plugins/none/start", b"", 404, "not_found"),
        ("POST", "/plugins/none/disable", b"", 404, "not_found"),
        ("GET", "/plugins/none/logs", b"", 404, "not_found"),
        ("GET", "/plugins/none/config", b"", 404, "not_found"),
        ("PUT", "/plugins/none/config/k", b"1", 404, "not_found"),
        ("GET", "/plugins/none/kv", b"", 404, "not_found"),
        ("PUT", "/plugins/none/kv/k", b"1", 404, "not_found"),
        ("GET", "/plugins/p/kv/none", b"", 404, "not_found"),
        ("DELETE", "/plugins/p/config/none", b"", 404, "not_found"),
        ("POST", "/instance", b"", 405, "method_not_allowed"),
        ("DELETE", "/plugins", b"", 405, "method_not_allowed"),
        ("DELETE", "/plugins/p", b"", 405, "method_not_allowed"),
        ("GET", "/plugins/p/start", b"", 405, "method_not_allowed"),
        ("PUT", "/plugins/p/disable", b"", 405, "method_not_allowed"),
        ("POST", "/plugins/p/logs", b"", 405, "method_not_allowed"),
        ("PUT", "/plugins/p/config", b"{}", 405, "method_not_allowed"),
        ("POST", "/plugins/p/config/k", b"1", 405, "method_not_allowed"),
        ("POST", "/plugins/p/kv/k", b"1", 405, "method_not_allowed"),
        ("GET", "/rescan", b"", 405, "method_not_allowed"),
        ("PUT", "/plugins/p/config/k", b"", 400, "bad_request"),
        ("PUT", "/plugins/p/config/k", b"{nope", 400, "bad_request"),
        ("PUT", "/plugins/p/config/k", b"\xff", 400, "bad_request"),
        ("PUT", "/plugins/p/config/", b"1", 400, "bad_key"),
        ("PUT", "/plugins/p/config/a%00b", b"1", 400, "bad_key"),
        ("PUT", &long_setting, b"1", 400, "bad_key"),
        ("GET", "/plugins/p/logs?lines=0", b"", 400, "bad_request"),
        ("GET", "/plugins/p/logs?lines=10001", b"", 400, "bad_request"),
        ("GET", "/plugins/p/logs?lines=-1", b"", 400, "bad_request"),
        ("GET", "/plugins/p/logs?lines=many", b"", 400, "bad_request"),
        ("GET", "/plugins/p/kv?limit=1001", b"", 400, "bad_request"),
        ("GET", "/plugins/p/kv/", b"", 400, "bad_key"),
        ("GET", "/plugins/p/kv/%FF", b"", 400, "bad_request"),
        ("PUT", &long_key, b"1", 400, "bad_key"),
        ("PUT", "/plugins/p/kv/k", &large, 413, "too_large"),
        ("PUT", "/plugins/p/config/k", large_setting.as_bytes(), 413, "too_large"),
        ("POST", "/plugins/broken/start", b"", 409, "refused"),
        ("GET", "/plugins/broken/config", b"", 409, "refused"),
    ];
    for (method, path, body, status, code) in cases {
        let (got, answer) = server.api(method, path, body);
        assert_eq!((got, &answer["error"]["code"]), (status, &json!(code)), "{method} {path}: {answer}");
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(message.len() > 10, "{method} {path}: {message:?}");
        assert_eq!(answer.as_object().unwrap().len(), 1, "{answer}");
    }
    assert_eq!(server.api("GET", "/plugins/p/config", b"").1, json!({"config": {}}));
    assert_eq!(server.api("GET", "/plugins/p/kv", b"").1["keys"], json!([]));
}

#[test]
fn the_api_says_which_methods_there_are() {
    let server = with_plugin();
    let token = fs::read_to_string(server.site().data().join("admin-token")).unwrap();
    let authorization = format!("Bearer {}", token.trim());
    for (path, methods) in [("/api/instance", "GET"), ("/api/rescan", "POST"), ("/api/plugins/p/kv/k", "GET, PUT, DELETE")] {
        let reply = server.request("PATCH", path, &[("authorization", &authorization)], b"");
        assert_eq!((reply.status, reply.header("allow")), (405, Some(methods)), "{reply:?}");
    }
}

#[test]
fn the_api_shows_the_instance_and_its_plugins() {
    let server = Site::new().fake("p").file("broken", b"", 0o755).start();
    server.wait_state("p", "ready");
    let (status, instance) = server.api("GET", "/instance", b"");
    assert_eq!(status, 200);
    assert_eq!(
        instance,
        json!({
            "instance_id": server.cli(&["instance"]).trim(),
            "version": env!("CARGO_PKG_VERSION"),
            "plugins_dir": fs::canonicalize(server.site().plugins()).unwrap(),
        })
    );

    let mut list = server.api("GET", "/plugins", b"").1;
    for plugin in list["plugins"].as_array_mut().unwrap() {
        let plugin = plugin.as_object_mut().unwrap();
        assert!(is_time(&plugin.remove("since").unwrap()), "{plugin:?}");
        assert_eq!(plugin.remove("process").is_some(), plugin["state"] == "ready", "{plugin:?}");
        let retry_at = plugin.remove("retry_at").unwrap();
        assert!(if plugin["state"] == "ready" { retry_at.is_null() } else { is_time(&retry_at) }, "{retry_at}");
    }
    let summary = json!({
        "id": "p", "file": "p", "name": "p", "version": "1.0.0", "route": "/p", "state": "ready", "reason": "", "enabled": true,
        "license": {"state": "none", "code": null, "message": null, "expires_at": null},
    });
    let broken = json!({
        "id": null, "file": "broken", "state": "refused", "reason": "it is empty", "enabled": true, "license": null,
    });
    assert_eq!(list, json!({"plugins": [broken, summary]}));

    let plugin = server.plugin("p");
    for (field, value) in summary.as_object().unwrap() {
        assert_eq!(plugin[field], *value, "{field}");
    }
    assert_eq!(plugin["metadata"]["concurrency"], 4);
    let process = &plugin["process"];
    assert!(process["pid"].as_i64().unwrap() > 1 && process["memory"].as_i64().unwrap() > 1_000_000, "{process}");
    assert!(is_time(&plugin["since"]) && is_time(&plugin["events"][0]["at"]), "{plugin:#}");
    assert_eq!(plugin["url"], format!("http://{}/p", server.address()));
    assert_eq!((&process["restarts"], &process["answered"], &process["waiting"]), (&json!(0), &json!(0), &json!(0)));
    for _ in 0..3 {
        assert_eq!(server.get("/p/x").status, 200);
    }
    wait_for("the answers to be counted", || (server.plugin("p")["process"]["answered"] == 3).then_some(()));
}

/// Whether a value is a time in RFC 3339, in UTC with milliseconds.
fn is_time(value: &Value) -> bool {
    let form = |c: char| if c.is_ascii_digit() { '0' } else { c };
    value.as_str().is_some_and(|text| text.chars().map(form).eq("0000-00-00T00:00:00.000Z".chars()))
}

/// Makes a plugin print a line, and waits until it is in the log.
#[track_caller]
fn print(server: &Server, text: &str) {
    assert_eq!(server.get(&format!("/p/print?text={text}")).status, 200);
    let last = || server.api("GET", "/plugins/p/logs?lines=1", b"").1["lines"][0].as_str().unwrap_or_default().to_owned();
    wait_for("the line", || last().ends_with(&format!(" {text} on stderr")).then_some(()));
}

/// Lines of a log without their times.
fn texts<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    lines.map(|line| line.split_once(' ').unwrap().1).collect()
}

#[test]
fn the_last_lines_of_a_log_are_shown() {
    let server = with_plugin();
    // Until it prints something there are only notes of the host's.
    let notes = server.cli(&["logs", "p"]);
    assert!(texts(notes.lines()).iter().all(|text| text.starts_with("plugrack: ")), "{notes}");
    let lines: Vec<_> = notes.lines().collect();
    assert_eq!(server.api("GET", "/plugins/p/logs", b""), (200, json!({"lines": lines})));
    for text in ["one", "two", "three"] {
        print(&server, text);
    }
    let by_api = |query: &str| server.api("GET", &format!("/plugins/p/logs{query}"), b"").1;
    let last = by_api("?lines=3");
    let last = texts(last["lines"].as_array().unwrap().iter().map(|line| line.as_str().unwrap()));
    assert_eq!(last, ["two on stderr", "three", "three on stderr"]);
    for query in ["", "?lines=10000"] {
        assert_eq!(by_api(query)["lines"].as_array().unwrap().len(), lines.len() + 6);
    }

    let all = server.cli(&["logs", "p"]);
    assert_eq!(texts(all.lines())[lines.len()..], ["one", "one on stderr", "two", "two on stderr", "three", "three on stderr"]);
    assert_eq!(texts(server.cli(&["logs", "p", "-n", "2"]).lines()), ["three", "three on stderr"]);
    assert_eq!(server.cli(&["logs", "p", "-n", "0"]), "");
    // The log can be read when the host does not run, which is when it is needed most.
    let site = server.stop().1;
    let output = site.cli(&["logs", "p", "-n", "1"]);
    assert_eq!(texts(std::str::from_utf8(&output.stdout).unwrap().lines()), ["three on stderr"]);
}

#[test]
fn a_log_is_followed() {
    let server = with_plugin();
    print(&server, "before");
    let follow = server.follow_log(&["p", "-n", "1"]);
    let next = || follow.next();
    assert_eq!(next(), "before on stderr");
    for text in ["one", "two"] {
        print(&server, text);
        assert_eq!([next(), next()], [text.to_owned(), format!("{text} on stderr")]);
    }
    follow.end();
}

#[test]
fn settings_are_set_read_and_removed_by_the_api() {
    let server = with_plugin();
    for (key, path) in KEYS.iter().filter(|(key, _)| !key.contains('\n')) {
        for value in [json!("text"), json!(7), json!(null), json!({"a": [1, 2.5, "ü"]})] {
            let (status, answer) = server.api("PUT", &format!("/plugins/p/config/{path}"), value.to_string().as_bytes());
            assert_eq!((status, answer), (200, json!({"config": {*key: value}, "restart_needed": true})));
            assert_eq!(server.api("GET", "/plugins/p/config", b"").1, json!({"config": {*key: value}}));
        }
        let removed = server.api("DELETE", &format!("/plugins/p/config/{path}"), b"");
        assert_eq!(removed, (200, json!({"config": {}, "restart_needed": true})));
    }
    server.api("PUT", "/plugins/p/config/title", b"\"mine\"");
    assert_eq!(server.get("/p/init").json()["config"], json!({}));
    server.api("POST", "/plugins/p/restart", b"");
    assert_eq!(server.get("/p/init").json()["config"], json!({"title": "mine"}));
    server.api("POST", "/plugins/p/stop", b"");
    assert_eq!(server.api("PUT", "/plugins/p/config/title", b"1").1["restart_needed"], false);

    // All settings together must fit the message that starts the plugin.
    let setting = json!("x".repeat(16_000)).to_string();
    let statuses: Vec<_> =
        (0..4).map(|n| server.api("PUT", &format!("/plugins/p/config/large{n}"), setting.as_bytes()).0).collect();
    assert_eq!(statuses, [200, 200, 200, 413]);
    assert_eq!(server.api("POST", "/plugins/p/start", b"").1["state"], "ready");
}

#[test]
fn settings_are_set_read_and_removed_by_commands() {
    let server = with_plugin();
    let hint = "saved; to apply: plugrack restart p\n";
    let get = || server.cli(&["config", "get", "p", "key"]);
    for text in
        ["text", "7", "-5", "00123", "823475887319941131", "1e400", "1.10", "[1,2]", "true", "null", "\"a\"", "two words", ""]
    {
        assert_eq!(server.cli(&["config", "set", "p", "key", text]), hint, "{text}");
        assert_eq!(get(), format!("{}\n", json!(text)), "text is text");
        assert_eq!(server.cli(&["config", "get", "p", "key", "--raw"]), format!("{text}\n"));
    }
    for value in ["7", "-5", "[1,2]", "true", "null", "\"a\"", "{\"a\":1.5}"] {
        let answer: Value = serde_json::from_str(&server.cli(&["config", "set", "--json", "p", "key", value])).unwrap();
        assert_eq!((&answer["config"]["key"].to_string(), &answer["restart_needed"]), (&value.to_owned(), &json!(true)));
        assert_eq!(get(), format!("{value}\n"), "with --json it is JSON");
    }
    assert!(server.cli_fails(&["config", "set", "--json", "p", "key", "text"]).contains("the value is not JSON"));
    assert_eq!(get(), "{\"a\":1.5}\n", "what is refused changes nothing");
    let file = server.site().data().join("secret");
    fs::write(&file, "s3cret\n").unwrap();
    let output = server.site().cli(&["config", "set", "p", "key", "--file", file.to_str().unwrap()]);
    assert!(stderr(&output).contains("ends with a line break"), "what is likely a mistake is pointed out: {output:?}");
    assert_eq!(get(), "\"s3cret\\n\"\n", "a file is taken exactly as it is");
    let output = cli_with_input(&server, &["config", "set", "p", "key", "-"], b"s3cret");
    assert_eq!((String::from_utf8_lossy(&output.stdout), stderr(&output)), (hint.into(), ""));
    assert_eq!(get(), "\"s3cret\"\n");
    server.cli(&["config", "set", "p", "key", "two words"]);
    let all: Value = serde_json::from_str(&server.cli(&["config", "get", "p"])).unwrap();
    assert_eq!(all, json!({"key": "two words"}));
    server.cli(&["config", "unset", "p", "key"]);
    for arguments in [["config", "unset", "p", "key"], ["config", "get", "p", "key"]] {
        let complaint = server.cli_fails(&arguments);
        assert!(complaint.contains("the plugin p has no setting \"key\""), "{complaint}");
    }
    assert!(server.cli_fails(&["config", "set", "none", "key", "1"]).contains("there is no plugin none"));
}

#[test]
fn keys_of_every_kind_are_read_and_written_through_the_plugin() {
    let server = with_plugin();
    for (number, (key, path)) in KEYS.iter().enumerate() {
        let path = format!("/plugins/p/kv/{path}");
        let text = format!("value {number} ☕");
        let (status, answer) = server.api("PUT", &path, text.as_bytes());
        assert_eq!((status, &answer["key"]), (200, &json!(key)), "{answer}");
        let rev = answer["rev"].as_i64().unwrap();
        assert_eq!(server.api("GET", &path, b""), (200, json!({"key": key, "rev": rev, "value": text})));
        // The command writes the same key as the API, and the plugin reads it under that name.
        assert_eq!(server.cli(&["kv", "get", "p", key]), text);
        let read = server.request("POST", "/p/kv", &[], json!({"op": "get", "key": key}).to_string().as_bytes()).json();
        assert_eq!((&read["head"]["found"], &read["head"]["rev"]), (&json!(true), &json!(rev)));
    }
    let list = server.api("GET", "/plugins/p/kv", b"").1;
    let listed: Vec<_> = list["keys"].as_array().unwrap().iter().map(|entry| entry["key"].as_str().unwrap()).collect();
    let mut sorted = KEYS.map(|(key, _)| key);
    sorted.sort_unstable();
    assert_eq!(listed, sorted);
    for (key, path) in KEYS {
        let path = format!("/plugins/p/kv/{path}");
        assert_eq!(server.api("DELETE", &path, b"").1["found"], true, "{key}");
        assert_eq!(server.api("DELETE", &path, b"").1["found"], false, "{key}");
        assert_eq!(server.api("GET", &path, b"").1["error"]["code"], "not_found", "{key}");
    }
}

#[test]
fn values_are_bytes() {
    let server = with_plugin();
    let path = "/plugins/p/kv/k";
    let largest = vec![0x80; 1024 * 1024];
    let cases: [(&[u8], Value, Value); 4] = [
        (b"", json!(""), Value::Null),
        (b"text\0\n", json!("text\u{0}\n"), Value::Null),
        (b"\xff\x00\xfe", Value::Null, json!("/wD+")),
        (&largest, Value::Null, Value::Null),
    ];
    for (bytes, text, base64) in cases {
        assert_eq!(server.api("PUT", path, bytes).0, 200);
        let (status, answer) = server.api("GET", path, b"");
        assert_eq!((status, &answer["value"]), (200, &text));
        if bytes.len() < 10 {
            assert_eq!(answer["value_base64"], base64);
        }
        let got = server.site().cli(&["kv", "get", "p", "k"]);
        assert!(got.status.success() && got.stdout == bytes, "{} bytes for {}", got.stdout.len(), bytes.len());

        assert!(cli_with_input(&server, &["kv", "set", "p", "from-stdin", "-"], bytes).status.success());
        let got = server.site().cli(&["kv", "get", "p", "from-stdin"]);
        assert!(got.stdout == bytes);
    }
}

#[test]
fn a_plugin_refuses_and_computes_keys() {
    let server = with_plugin();
    for (method, body) in [("GET", &b""[..]), ("PUT", b"x"), ("DELETE", b"")] {
        let refused = server.api(method, "/plugins/p/kv/forbidden", body);
        assert_eq!(refused, (403, json!({"error": {"code": "forbidden", "message": "not this one"}})), "{method}");
    }
    assert_eq!(server.cli_fails(&["kv", "set", "p", "forbidden", "x"]), "plugrack: not this one (forbidden)\n");
    let computed = server.api("GET", "/plugins/p/kv/computed", b"").1;
    assert_eq!((&computed["value"], &computed["rev"]), (&json!("by the plugin"), &json!(7)));
    assert_eq!(server.cli(&["kv", "get", "p", "computed"]), "by the plugin");
    assert_eq!(server.api("GET", "/plugins/p/kv", b"").1["keys"], json!([]));
}

#[test]
fn keys_of_a_stopped_plugin_are_listed_and_not_touched() {
    let server = with_plugin();
    server.cli(&["kv", "set", "p", "k", "v"]);
    server.cli(&["stop", "p"]);
    for (method, body) in [("GET", &b""[..]), ("PUT", b"x"), ("DELETE", b"")] {
        let (status, answer) = server.api(method, "/plugins/p/kv/k", body);
        assert_eq!((status, &answer["error"]["code"]), (503, &json!("unavailable")), "{method}: {answer}");
    }
    assert_eq!(
        server.cli_fails(&["kv", "get", "p", "k"]),
        "plugrack: the plugin p does not run: start it, or read the store itself with plugrack kv get --direct p KEY\n"
    );
    let list = server.api("GET", "/plugins/p/kv", b"").1;
    assert_eq!((&list["keys"][0]["key"], &list["keys"][0]["size"], &list["next"]), (&json!("k"), &json!(1), &Value::Null));
}

#[test]
fn lists_of_keys_come_in_pages_and_whole_by_the_command() {
    let server = with_plugin();
    // More than one page of the API's largest.
    for batch in 0..11 {
        let writes: Vec<_> = (0..100).map(|n| json!({"op": "incr", "key": format!("k{:04}", batch * 100 + n)})).collect();
        let writes = json!(writes).to_string();
        let value: String = writes
            .bytes()
            .map(|byte| if byte.is_ascii_alphanumeric() { char::from(byte).to_string() } else { format!("%{byte:02X}") })
            .collect();
        let reply = server.request("POST", &format!("/p/kv?value={value}"), &[], br#"{"op":"txn"}"#);
        assert_eq!(reply.json()["head"]["type"], "result", "{}", reply.text());
    }
    let page = |query: &str| server.api("GET", &format!("/plugins/p/kv?{query}"), b"").1;
    let keys = |page: &Value| {
        page["keys"].as_array().unwrap().iter().map(|key| key["key"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let first = page("prefix=k00&limit=30");
    assert_eq!((keys(&first).len(), &first["next"]), (30, &json!("k0029")));
    let last = page("prefix=k00&limit=100&after=k0029");
    assert_eq!((keys(&last).first().unwrap().as_str(), keys(&last).len(), &last["next"]), ("k0030", 70, &Value::Null));
    assert_eq!(page("prefix=none")["keys"], json!([]));
    assert_eq!(keys(&page("")).len(), 100);

    let all: Value = serde_json::from_str(&server.cli(&["kv", "list", "p", "--json"])).unwrap();
    let all: Vec<_> = all["keys"].as_array().unwrap().iter().map(|key| key["key"].as_str().unwrap().to_owned()).collect();
    assert_eq!(all, (0..1100).map(|n| format!("k{n:04}")).collect::<Vec<_>>());
    let text = server.cli(&["kv", "list", "p", "--prefix", "k109"]);
    assert_eq!(text.lines().count(), 10);
    assert!(text.starts_with("k1090  1 bytes, revision 1091\n"), "{text}");
    assert_eq!(server.cli(&["kv", "list", "p", "--prefix", "none"]), "");
}

#[test]
fn keys_are_read_and_written_by_commands() {
    let server = with_plugin();
    for value in ["text", "", "two words", "-5", "--flag", "ü\n"] {
        assert_eq!(server.cli(&["kv", "set", "p", "k", value]), "", "{value}");
        assert_eq!(server.cli(&["kv", "get", "p", "k"]), value);
    }
    let json: Value = serde_json::from_str(&server.cli(&["kv", "get", "p", "k", "--json"])).unwrap();
    assert_eq!((&json["key"], &json["value"], &json["rev"]), (&json!("k"), &json!("ü\n"), &json!(6)));
    assert_eq!(server.cli(&["kv", "delete", "p", "k"]), "");
    for verb in ["delete", "get"] {
        assert_eq!(server.cli_fails(&["kv", verb, "p", "k"]), "plugrack: the plugin p has no key \"k\"\n");
    }
    assert_eq!(server.cli_fails(&["kv", "get", "none", "k"]), "plugrack: there is no plugin none\n");
}

#[test]
fn commands_show_text_for_people_and_json_for_programs() {
    let server = with_plugin();
    let list = server.cli(&["list"]);
    let lines: Vec<Vec<_>> = list.lines().map(|line| line.split_ascii_whitespace().collect()).collect();
    let heading = ["ID", "STATE", "SINCE", "RESTARTS", "MEM", "VERSION", "ROUTE", "LICENSE", "PID", "NAME", "REASON"];
    let pid = server.plugin("p")["process"]["pid"].to_string();
    assert_eq!((lines.len(), &*lines[0], lines[1].len()), (2, &heading[..], heading.len()), "{list}");
    assert_eq!(lines[1][..2], ["p", "ready"]);
    assert_eq!(lines[1][5..], ["1.0.0", "/p", "none", &pid, "p", "-"]);
    assert!(lines[1][2].ends_with(['s', 'm']) && lines[1][3] == "0" && lines[1][4].ends_with("MB"), "{list}");
    let show = server.cli(&["show", "p"]);
    for (name, value) in
        [("id", "p"), ("version", "1.0.0"), ("route", "/p"), ("state", "ready"), ("enabled", "yes"), ("pid", &pid), ("file", "p")]
    {
        let line = show
            .lines()
            .find(|line| line.split_ascii_whitespace().next() == Some(name))
            .unwrap_or_else(|| panic!("no {name}: {show}"));
        assert_eq!(line.split_ascii_whitespace().nth(1), Some(value), "{show}");
    }
    assert!(show.contains("events, newest first\n"), "{show}");
    for (verb, state) in
        [("stop", "stopped"), ("start", "ready"), ("restart", "ready"), ("disable", "stopped"), ("enable", "ready")]
    {
        let text = server.cli(&[verb, "p"]);
        assert!(text.starts_with(&format!("p: {state}")) && text.lines().count() == 1, "{text}");
        let json: Value = serde_json::from_str(&server.cli(&[verb, "p", "--json"])).unwrap();
        assert_eq!(json["state"], state);
    }
    let json = |arguments: &[&str]| serde_json::from_str::<Value>(&server.cli(arguments)).unwrap();
    assert_eq!(json(&["list", "--json"])["plugins"][0]["state"], "ready");
    assert_eq!(json(&["show", "p", "--json"])["id"], "p");
    assert_eq!(json(&["rescan", "--json"])["added"], json!([]));
}

#[test]
fn a_plugin_that_does_not_become_ready_fails_the_command_that_starts_it() {
    let server = Site::new().fake_mode("p", "exit-78").start();
    server.wait_state("p", "refused");
    for verb in ["start", "restart", "enable"] {
        let output = server.site().cli(&[verb, "p"]);
        assert_eq!(output.status.code(), Some(1), "{verb}");
        assert!(String::from_utf8_lossy(&output.stdout).contains("cannot go on"), "{verb}: {output:?}");
        assert!(stderr(&output).contains("plugrack logs p"), "{verb}: {output:?}");
    }
    assert!(server.cli(&["stop", "p"]).starts_with("p: stopped"));
}

/// Commands that ask the host, with arguments that would do.
const ASKING: [&[&str]; 15] = [
    &["list"],
    &["show", "p"],
    &["start", "p"],
    &["stop", "p"],
    &["restart", "p"],
    &["enable", "p"],
    &["disable", "p"],
    &["rescan"],
    &["kv", "get", "p", "k"],
    &["kv", "set", "p", "k", "v"],
    &["kv", "delete", "p", "k"],
    &["kv", "list", "p"],
    &["config", "get", "p"],
    &["config", "set", "p", "k", "v"],
    &["config", "unset", "p", "k"],
];

#[test]
fn commands_say_that_no_host_runs() {
    let site = Site::new();
    let fails = |site: &Site, says: &str| {
        for arguments in ASKING {
            let output = site.cli(arguments);
            assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "{arguments:?}");
            assert!(stderr(&output).contains(says) && stderr(&output).lines().count() == 1, "{arguments:?}: {}", stderr(&output));
        }
    };
    fails(&site, "no host runs");
    let server = site.start();
    let site = server.kill();
    // A host that was killed leaves its socket.
    fails(&site, "no host runs");
    let site = site.start().stop().1;
    fails(&site, "no host runs");
}

#[test]
fn commands_about_no_plugin_say_so() {
    let server = Site::new().start();
    for arguments in ASKING.iter().filter(|arguments| arguments.len() > 1) {
        assert_eq!(server.cli_fails(arguments), "plugrack: there is no plugin p\n", "{arguments:?}");
    }
    assert!(server.cli_fails(&["logs", "p"]).starts_with("plugrack: there is no plugin p"));
    assert!(server.cli_fails(&["logs", "P"]).starts_with("plugrack: there is no plugin P"));
    for id in ["../p", "", ".p", "a/b"] {
        assert!(server.cli_fails(&["logs", id]).contains("is neither a plugin's id"), "{id}");
        assert!(server.cli_fails(&["show", id]).starts_with("plugrack: there is no "), "{id}");
    }
}

#[test]
fn every_command_explains_itself() {
    let help = |arguments: &[&str]| {
        let output = command(binary()).args(arguments).arg("--help").output().unwrap();
        assert_eq!((output.status.code(), output.stderr.len()), (Some(0), 0), "{arguments:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let top = help(&[]);
    assert!(top.contains("plugrack serve --data"), "it begins with an example: {top}");
    let nested = ["get", "set", "delete", "list"].map(|action| ["kv", action]);
    let settings = ["get", "set", "unset"].map(|action| ["config", action]);
    let mut commands: Vec<Vec<&str>> =
        ["serve", "instance", "list", "show", "start", "stop", "restart", "enable", "disable", "logs", "kv", "config", "rescan"]
            .map(|name| vec![name])
            .into();
    for name in commands.iter().flatten() {
        assert!(top.lines().any(|line| line.split_ascii_whitespace().next() == Some(name)), "{name} is not in the list: {top}");
    }
    commands.extend(nested.iter().chain(&settings).map(|[name, action]| vec![*name, *action]));
    for arguments in commands {
        let text = help(&arguments);
        let about = text.lines().next().unwrap_or_default();
        assert!(about.len() > 10 && !about.starts_with("Usage"), "{arguments:?}: {text}");
        assert!(text.contains("Usage: plugrack"), "{arguments:?}: {text}");
    }
    assert!(!top.contains("__exec"));
    let version = command(binary()).arg("--version").output().unwrap();
    assert_eq!(String::from_utf8_lossy(&version.stdout), format!("plugrack {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn wrong_arguments_are_not_understood_and_that_is_said() {
    let cases: [(&[&str], &str); 22] = [
        (&[], "Usage: plugrack"),
        (&["explode"], "unrecognized subcommand 'explode'"),
        (&["list", "extra"], "unexpected argument 'extra'"),
        (&["show"], "<ID>"),
        (&["kv", "p"], "unrecognized subcommand 'p'"),
        (&["kv", "set", "p", "k"], "<VALUE>"),
        (&["config", "set", "p", "k"], "<VALUE>"),
        (&["logs", "p", "-n", "10001"], "10001 is not in 0..=10000"),
        (&["logs", "p", "-n", "many"], "invalid value 'many'"),
        (&["serve", "--listen", "nonsense"], "such as 127.0.0.1:8080, or unix:/PATH"),
        (&["serve", "--listen", "8080"], "such as 127.0.0.1:8080, or unix:/PATH"),
        (&["serve", "--listen", "127.0.0.1:99999"], "such as 127.0.0.1:8080, or unix:/PATH"),
        (&["serve", "--max-body", "lots"], "a size is a number of bytes"),
        (&["serve", "--max-body", "2TiB"], "at most 1TiB"),
        (&["serve", "--max-body=-1"], "a size is a number of bytes"),
        (&["serve", "--kv-max-bytes", "many"], "a size is a number of bytes"),
        (&["serve", "--kv-max-keys", "many"], "--kv-max-keys"),
        (&["serve", "--request-timeout", "soon"], "such as 30s"),
        (&["serve", "--request-timeout", "0s"], "from 1ms to 24h"),
        (&["serve", "--start-timeout", "61m"], "from 1ms to 1h"),
        (&["serve", "--start-timeout", "30"], "such as 30s"),
        (&["serve", "--no-such-option"], "unexpected argument '--no-such-option'"),
    ];
    let site = Site::new();
    for (arguments, says) in cases {
        let output = site.cli(arguments);
        assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0), "{arguments:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(says), "{arguments:?}: {}", stderr(&output));
    }
    for (name, value) in [("PLUGRACK_LISTEN", "nonsense"), ("PLUGRACK_MAX_BODY", "lots"), ("PLUGRACK_REQUEST_TIMEOUT", "soon")] {
        let output = command(binary()).arg("--data").arg(site.data()).arg("serve").env(name, value).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{name}");
        assert!(stderr(&output).contains(value), "{name}: {}", stderr(&output));
    }
    assert!(!site.data().join("run").exists(), "nothing was begun");
}

#[test]
fn the_way_plugins_are_started_does_nothing_by_hand() {
    let marker = tempfile::tempdir().unwrap();
    let file = marker.path().join("made").to_str().unwrap().to_owned();
    for arguments in [
        &["__exec"][..],
        &["__exec", "x", "/bin/sh"],
        &["__exec", "1", "/usr/bin/touch", &file],
        &["__exec", "999999999", "/usr/bin/touch", &file],
    ] {
        let output = command(binary()).args(arguments).output().unwrap();
        assert!(matches!(output.status.code(), Some(64 | 126)), "{arguments:?}: {output:?}");
        assert!(!stderr(&output).is_empty() && output.stdout.is_empty(), "{arguments:?}: {output:?}");
    }
    assert!(!fs::exists(file).unwrap());
}
