//! The host against the frames of `tests/protocol/frames.json`, which the tests of the SDKs read too. A raw plugin sends them on the
//! connections that the host opens, and a raw client on the host's own socket.

use crate::failed_requests::notes;
use crate::support::{Server, Site, metadata, wait_for};
use serde_json::{Value, json};
use std::fs;

/// The vectors of a kind.
fn vectors(kind: &str) -> Vec<Value> {
    let all: Value = serde_json::from_str(include_str!("../protocol/frames.json")).unwrap();
    all[kind].as_array().unwrap().clone()
}

/// The valid vector of this name.
fn valid(name: &Value) -> Value {
    vectors("valid").into_iter().find(|vector| vector["name"] == *name).unwrap()
}

fn unhex(hex: &Value) -> Vec<u8> {
    let hex = hex.as_str().unwrap();
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

/// A vector as the fake plugin takes it: with its head as text where it has one, so that the id can be put right.
fn for_plugin(vector: &Value) -> Value {
    let bytes = unhex(&vector["hex"]);
    let length = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
    let (head, body) = (length(0), length(4));
    let text = bytes.get(8..8 + head).filter(|_| bytes.len() == 8 + head + body).and_then(|head| str::from_utf8(head).ok());
    match text {
        Some(text) => json!({"text": text, "body": vector["hex"].as_str().unwrap()[2 * (8 + head)..]}),
        None => json!({"hex": vector["hex"]}),
    }
}

/// Whether a line says what a vector wants said, whatever id stands in it for 7.
fn says(line: &str, vector: &Value) -> bool {
    let mut rest = Some(line);
    for part in vector["says"].as_str().unwrap().split("id 7") {
        rest = rest.and_then(|rest| rest.split_once(part)).map(|(_, rest)| rest);
    }
    rest.is_some()
}

fn server() -> Server {
    let server = Site::new().fake_of_one_connection("p").start();
    server.wait_state("p", "ready");
    server
}

/// How many connections the plugin has taken.
fn accepted(server: &Server) -> usize {
    server.get("/p/accepted").text().parse().unwrap()
}

/// What stands before a frame that is due in a stream.
fn beginning() -> Value {
    for_plugin(&valid(&json!("response, the beginning")))
}

#[test]
fn an_invalid_answer_has_the_reaction_that_is_due_and_costs_no_other_request() {
    let server = server();
    let due = |vector: &Value| {
        vector["to"] == "any" || vector["to"] == "host" && (vector["place"] == "http" || vector["place"] == "stream")
    };
    let cases: Vec<_> = vectors("invalid").into_iter().filter(due).collect();
    assert!(cases.len() > 40);
    let mut connections = accepted(&server);
    for (number, vector) in cases.iter().enumerate() {
        let name = &vector["name"];
        let streams = vector["place"] == "stream";
        let before = streams.then(beginning);
        let body = Value::Array(before.into_iter().chain([for_plugin(vector)]).collect()).to_string();
        let mut client = server.client();
        let head =
            format!("POST /p/frames HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
        client.send(&[head.as_bytes(), body.as_bytes()].concat());
        assert_eq!(client.reply_head().status, if streams { 200 } else { 502 }, "{name}");
        let rest = client.rest();
        assert!(!streams || !rest.ends_with(b"0\r\n\r\n"), "{name}: the answer is cut short");
        let line =
            wait_for(&format!("the line on {name}"), || notes(&server, "POST /p/frames (request ").into_iter().nth(number));
        assert!(says(&line, vector), "{name}: {line}");
        let now = accepted(&server);
        assert_eq!(now - connections, usize::from(vector["reaction"] == "close"), "{name}: whether the connection stays");
        connections = now;
    }
}

#[test]
fn a_valid_answer_is_passed_on_in_whatever_form_it_is_written() {
    let server = server();
    let connections = accepted(&server);
    let mut passed = 0;
    for vector in vectors("valid").into_iter().filter(|vector| vector["to"] == "host") {
        let name = &vector["name"];
        let means = vector.get("means").unwrap_or(&vector["head"]);
        let body = unhex(&vector["body_hex"]);
        let (frames, status, expected) = match vector["place"].as_str().unwrap() {
            "http" if means["more"] != true => (vec![for_plugin(&vector)], means["status"].as_u64().unwrap(), body),
            "stream" if means["more"] != true => (vec![beginning(), for_plugin(&vector)], 200, [b"one ", &*body].concat()),
            _ => continue,
        };
        let reply = server.request("POST", "/p/frames", &[], Value::Array(frames).to_string().as_bytes());
        assert_eq!((u64::from(reply.status), &*reply.body), (status, &*expected), "{name}");
        passed += 1;
    }
    assert!(passed > 6);
    assert_eq!(accepted(&server), connections);
}

#[test]
fn a_response_in_three_frames_reaches_its_client() {
    let server = server();
    let conversation = vectors("conversations").into_iter().find(|each| each["name"] == "a response in three frames").unwrap();
    let steps = conversation["steps"].as_array().unwrap().iter().filter(|step| step["from"] == "plugin");
    let frames = steps.map(|step| for_plugin(&valid(&step["frame"]))).collect();
    let reply = server.request("POST", "/p/frames", &[], Value::Array(frames).to_string().as_bytes());
    assert_eq!((reply.status, reply.text()), (200, "one two three"));
}

#[test]
fn the_operator_is_told_what_is_wrong_with_a_plugins_reply_on_a_key() {
    let server = server();
    let ask = |vector: &Value| {
        let op = vector["place"].as_str()?.strip_prefix("kv ")?.to_owned();
        let mut frame = for_plugin(vector);
        // Among the valid ones the requests have the id 9.
        frame["text"] = frame["text"].as_str().unwrap().replacen("\"id\":9", "\"id\":7", 1).into();
        fs::write(server.site().data().join("plugin-data/p/frames.json"), frame.to_string()).unwrap();
        Some(op)
    };
    let arguments = |op: &str| -> Vec<&str> {
        match op {
            "get" => vec!["kv", "get", "p", "frames"],
            "set" => vec!["kv", "set", "p", "frames", "red"],
            _ => vec!["kv", "delete", "p", "frames"],
        }
    };
    for vector in vectors("invalid").iter().filter(|vector| vector["to"] == "host") {
        let Some(op) = ask(vector) else { continue };
        let told = server.cli_fails(&arguments(&op));
        let due = format!("the plugin p gave no valid answer: kv {op} \"frames\": protocol error: ");
        assert!(told.contains(&due) && says(&told, vector), "{}: {told}", vector["name"]);
        let line = notes(&server, "the operator's kv ").pop().unwrap();
        assert!(says(&line, vector), "{}: {line}", vector["name"]);
    }
    for vector in vectors("valid").iter().filter(|vector| vector["to"] == "host") {
        let Some(op) = ask(vector) else { continue };
        if vector["head"]["found"] == false {
            assert!(server.cli_fails(&arguments(&op)).contains("has no key"), "{}", vector["name"]);
        } else {
            server.cli(&arguments(&op));
        }
    }
}

#[test]
fn an_invalid_answer_to_init_is_why_the_plugin_does_not_start() {
    let mut cases: Vec<_> = vectors("invalid").into_iter().filter(|vector| vector["place"] == "init").collect();
    assert!(cases.len() > 2);
    let unfinished = "it did not answer init: 1 of 43 bytes of a frame's head had come";
    cases.push(json!({"name": "unfinished", "hex": "0000002b000000007b", "says": unfinished}));
    let good: Vec<_> = vectors("valid").into_iter().filter(|vector| vector["place"] == "init").collect();
    let mut site = Site::new().args(&["--start-timeout", "3s"]);
    for (id, vectors) in [("bad", &cases), ("good", &good)] {
        for (number, vector) in vectors.iter().enumerate() {
            let id = format!("{id}{number}");
            site = site.fake_with(&id, &json!({"metadata": metadata(&id), "init_frame": for_plugin(vector)}));
        }
    }
    let server = site.start();
    for (number, vector) in cases.iter().enumerate() {
        let id = format!("bad{number}");
        wait_for(&format!("the reason of {}", vector["name"]), || says(&server.plugin(&id).to_string(), vector).then_some(()));
        assert_ne!(server.plugin(&id)["state"], "ready");
    }
    for number in 0..good.len() {
        server.wait_state(&format!("good{number}"), "ready");
    }
}

/// Sends bytes on the connection to the host's socket of this name: the head of the reply, or none where the host closes it.
fn call(server: &Server, on: &str, bytes: &[u8]) -> Option<Value> {
    let reply = server.request("POST", &format!("/p/wire?on={on}&replies=1"), &[], bytes);
    let head = |frame: &[u8]| {
        let length = u32::from_be_bytes(frame[..4].try_into().unwrap()) as usize;
        serde_json::from_slice(&frame[8..8 + length]).unwrap()
    };
    (reply.status == 200).then(|| head(&reply.body))
}

#[test]
fn the_hosts_own_socket_has_the_reaction_that_is_due() {
    let server = server();
    let ask = unhex(&valid(&json!("call: get"))["hex"]);
    // What begins with a letter is HTTP there: `store_http` has that.
    let is_text = |vector: &Value| unhex(&vector["hex"])[0].is_ascii_alphabetic();
    let cases = vectors("invalid")
        .into_iter()
        .filter(|vector| (vector["to"] == "any" || vector["to"] == "host_socket") && !is_text(vector));
    for (number, vector) in cases.enumerate() {
        let (name, on) = (&vector["name"], format!("c{number}"));
        let reply = call(&server, &on, &unhex(&vector["hex"]));
        if vector["reaction"] == "close" {
            assert_eq!(reply, None, "{name}");
            let closed =
                || notes(&server, "to the host socket was closed: ").iter().any(|line| says(line, &vector)).then_some(());
            wait_for(&format!("the line on {name}"), closed);
        } else {
            let reply = reply.unwrap_or_else(|| panic!("{name}: the connection was closed"));
            assert_eq!((&reply["type"], &reply["id"]), (&json!("error"), &json!(7)), "{name}: {reply}");
            assert_eq!(reply["code"], vector["reaction"], "{name}: {reply}");
            assert!(says(reply["message"].as_str().unwrap(), &vector), "{name}: {reply}");
            assert_eq!(call(&server, &on, &ask).unwrap()["type"], "result", "{name}: the connection stays");
        }
        server.request("POST", &format!("/p/unwire?on={on}"), &[], b"");
    }
}

#[test]
fn the_hosts_own_socket_takes_a_call_in_whatever_form_it_is_written() {
    let server = server();
    for vector in vectors("valid").iter().filter(|vector| vector["to"] == "host_socket") {
        let reply = call(&server, "all", &unhex(&vector["hex"])).unwrap();
        // The one refusal is of a value that is there already.
        let due = if vector["head"]["if_absent"] == true { "error" } else { "result" };
        assert_eq!(reply["type"], due, "{}: {reply}", vector["name"]);
        assert_eq!(reply["id"].as_f64(), vector["head"]["id"].as_f64());
        if vector["head"]["key"] == "large" {
            assert_eq!(reply["value"], i64::MAX);
        }
    }
}

#[test]
fn a_conflict_is_told_as_the_vectors_have_it() {
    let server = server();
    let conversation = vectors("conversations").into_iter().find(|each| each["name"] == "a conflict").unwrap();
    let mut last = Value::Null;
    for step in conversation["steps"].as_array().unwrap() {
        let vector = valid(&step["frame"]);
        if step["from"] == "plugin" {
            last = call(&server, "conflict", &unhex(&vector["hex"])).unwrap();
        } else {
            assert_eq!([&last["type"], &last["id"], &last["code"]], ["type", "id", "code"].map(|field| &vector["head"][field]));
        }
    }
    assert_eq!(last["code"], "conflict");
}

#[test]
fn an_error_may_stand_for_a_pong() {
    let server = Site::new().fake_mode("p", "ping-error").start();
    server.wait_state("p", "ready");
    let said = "the plugin answered a ping with the error unwell: one disk is gone";
    wait_for("the line", || (!notes(&server, said).is_empty()).then_some(()));
    assert_eq!(accepted(&server), 1, "the connection stays");
}

#[test]
fn message_types_that_a_plugin_speaks_are_shown() {
    let mut speaking = metadata("p");
    speaking["speaks"] = json!(["tunnel", "tunnel-2"]);
    let server = Site::new().fake_with("p", &json!({"metadata": speaking})).fake("q").start();
    server.wait_state("p", "ready");
    assert_eq!(server.plugin("p")["metadata"]["speaks"], json!(["tunnel", "tunnel-2"]));
    assert_eq!(server.plugin("q")["metadata"]["speaks"], Value::Null);
}

#[test]
fn any_exit_after_shutdown_is_a_stop_and_no_crash() {
    for exit in [0, 1, 5, 78] {
        let server = Site::new().fake_with("p", &json!({"metadata": metadata("p"), "exit": exit})).start();
        server.wait_state("p", "ready");
        server.cli(&["stop", "p"]);
        let plugin = server.wait_state("p", "stopped").to_string();
        assert!(plugin.contains(&format!("exit code {exit}")), "{plugin}");
        assert_eq!(notes(&server, "crashed"), [""; 0]);
        server.cli(&["start", "p"]);
        let plugin = server.wait_state("p", "ready");
        assert_eq!(plugin["process"]["restarts"], 0, "{plugin}");
    }
}
