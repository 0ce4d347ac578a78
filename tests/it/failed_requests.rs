//! Requests that a plugin fails: what its log says of each, and that no other request pays.

use crate::support::{Server, Site, wait_for};
use std::fs;

/// Requests beside the one that kills the process.
const BYSTANDERS: usize = 24;

fn server_of_one_connection() -> Server {
    let server = Site::new().args(&["--request-timeout", "3s"]).fake_of_one_connection("p").start();
    server.wait_state("p", "ready");
    server
}

/// The host's lines in the plugin's log that hold a text, without time and mark.
pub(super) fn notes(server: &Server, text: &str) -> Vec<String> {
    let log = fs::read_to_string(server.site().data().join("logs/p.log")).unwrap_or_default();
    let notes = log.lines().filter_map(|line| line.split_once(" plugrack: ")).map(|(_, note)| note.to_owned());
    notes.filter(|note| note.contains(text)).collect()
}

/// Percent-encodes a head for the query of `/send`.
fn encoded(head: &str) -> String {
    head.bytes().map(|byte| format!("%{byte:02x}")).collect()
}

/// Makes a file in the plugin's directory, for which something there waits.
fn touch(server: &Server, name: &str) {
    fs::write(server.site().data().join("plugin-data/p").join(name), b"").unwrap();
}

#[test]
fn each_request_that_the_plugin_fails_has_one_line_that_names_it_what_came_and_what_was_due() {
    let server = server_of_one_connection();
    let send = |head: &str| format!("/send?head={}", encoded(head));
    let stream = |head: &str| format!("/stream-and?head={}", encoded(head));
    let response = |rest: &str| send(&format!(r#"{{"type":"response","id":ID,{rest}}}"#));
    let pairs = "protocol error: response.headers must be an array of [name, value] pairs, got";
    let status = "protocol error: response.status must be an integer from 200 to 599, got";
    // What comes; the status; the line behind the request's name, or its beginning. Of a safe one it says whether it was sent twice.
    let cases = [
        (response(r#""status":200,"headers":{}"#), 502, format!("{pairs} an object")),
        (response(r#""status":"200""#), 502, format!("{status} the string \"200\"")),
        (response(r#""status":200.5"#), 502, format!("{status} 200.5")),
        (response(r#""status":200,"more":0"#), 502, "protocol error: response.more must be true or false, got 0".into()),
        (response(r#""status":99"#), 502, "the answer was refused: status 99 is not within 200-599".into()),
        (send(r#"{"type":"respnse","id":ID}"#), 502, "protocol error: unknown message type \"respnse\"".into()),
        (send(r#"{"type":"data","id":ID,"more":false}"#), 502, "protocol error: data with id ".into()),
        (
            send(r#"{"type":"error","id":ID,"code":"oops","message":"no"}"#),
            502,
            "the plugin answered with the error oops: no".into(),
        ),
        (
            send(r#"{"type":"error","id":ID,"code":5,"message":""}"#),
            502,
            "protocol error: error.code must be a string of the form [a-z][a-z0-9_]{0,63}, got 5".into(),
        ),
        (send(r#"{"type":"response","id":"ID","status":200}"#), 502, "protocol error: response.id must be an integer".into()),
        (send("nope"), 502, "protocol error: the head is not JSON at byte 2 of 4: it begins with \"nope\"".into()),
        (send("{\"type\":\"\u{ff}\"}"), 502, "protocol error: the head is not UTF-8 at byte 9".into()),
        (
            "/bytes?hex=2a00000000000000".into(),
            502,
            "protocol error: a frame's head length of 704643072 is not within 1-65536: 0x2a000000 is 42 in little-endian".into(),
        ),
        (
            "/garbage".into(),
            502,
            "protocol error: a frame's head length of 1213486160 is not within 1-65536: the text \"HTTP/1.1 200 OK".into(),
        ),
        (
            "/bytes?hex=0000002b000000007b".into(),
            504,
            "3 s passed before its answer began: 1 of 43 bytes of a frame's head had come".into(),
        ),
        ("/sleep?s=6".into(), 504, "3 s passed before its answer began".into()),
        ("/hang-up".into(), 502, "the connection was closed before it answered".into()),
        (
            stream(r#"{"type":"error","id":ID,"code":"oops","message":"no"}"#),
            200,
            "the answer was cut short: the plugin sent the error oops: no".into(),
        ),
        (
            stream(r#"{"type":"data","id":ID,"more":0}"#),
            200,
            "the answer was cut short: protocol error: data.more must be true or false, got 0".into(),
        ),
        (stream(r#"{"type":"pong","id":ID}"#), 200, "the answer was cut short: protocol error: a pong with id ".into()),
        (
            "/download?bytes=3000&declared=4000".into(),
            200,
            "the answer was cut short: its content-length is 4000, its body has 3000 bytes".into(),
        ),
    ];
    for (number, (path, status, line)) in cases.into_iter().enumerate() {
        for method in ["GET", "POST"] {
            let mut client = server.client();
            let close = "connection: close\r\ncontent-length: 0\r\n";
            client.send(
                format!(
                    "{method} /p{path}{}secret={number} HTTP/1.1\r\nhost: test\r\n{close}\r\n",
                    if path.contains('?') { "&" } else { "?" }
                )
                .as_bytes(),
            );
            let head = client.reply_head();
            assert_eq!(head.status, status, "{method} {path}");
            client.rest();
            let name = format!("{method} /p{} (request ", path.split('?').next().unwrap());
            let said = wait_for(&format!("a line on {method} {path}"), || {
                notes(&server, &name).pop().filter(|note| note.contains(&line))
            });
            let (id, rest) = said.strip_prefix(&name).unwrap().split_once("): ").unwrap();
            assert!(rest.starts_with(&line), "{method} {path}: {said}");
            assert!(id.contains('-') && id.len() > 13 && !said.contains("secret"), "{said}");
            assert_eq!(notes(&server, id).len(), 1, "{method} {path}");
            assert!(!said.contains("at line"), "{said}");
            assert!(method == "GET" || !rest.contains("twice"), "{said}");
        }
        assert_eq!(server.get("/p/x").text(), "GET /x of p", "after {path}");
    }
}

#[test]
fn an_end_in_a_request_has_one_line_that_names_it_and_the_exit() {
    for (method, path, status) in [("GET", "/crash?code=5", 502), ("POST", "/crash?code=5", 502), ("GET", "/break", 200)] {
        let server = server_of_one_connection();
        let mut client = server.client();
        client.send(format!("{method} /p{path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n").as_bytes());
        assert_eq!(client.reply_head().status, status);
        client.rest();
        let name = format!("{method} /p{} (request ", path.split('?').next().unwrap());
        let said = wait_for("the line", || notes(&server, &name).pop());
        assert!(said.contains("the process ended before ") && said.contains(": exit code "), "{said}");
        assert_eq!(notes(&server, &name).len(), 1);
        wait_for("the line of the end itself", || notes(&server, "crashed: exit code ").pop());
        assert_eq!(server.get("/p/x").text(), "GET /x of p");
    }
}

#[test]
fn an_operators_request_that_the_plugin_fails_has_a_line() {
    let server = server_of_one_connection();
    for (key, line) in [
        ("close", "the connection was closed before it answered"),
        ("send", "protocol error: expected result, got response"),
        ("bad-field", "protocol error: result.found must be true or false, got the string \"yes\""),
        ("never", "3 s passed before it answered"),
        ("die", "the process ended before it answered: exit code 4"),
    ] {
        let told = server.cli_fails(&["kv", "get", "p", key]);
        assert!(key == "never" || told.contains(line), "{told}");
        let said = wait_for("the line", || notes(&server, &format!("the operator's kv get {key:?}: ")).pop());
        assert!(said.contains(line), "{said}");
        wait_for("an answer", || (server.get("/p/x").status == 200).then_some(()));
    }
}

/// Requests before and behind the one that kills the process, some of them sent ahead on its connection.
#[test]
fn a_request_that_kills_the_process_is_502_once_and_all_beside_it_are_answered_by_the_next() {
    let server = server_of_one_connection();
    let mut clients: Vec<_> = (0..BYSTANDERS).map(|_| server.client()).collect();
    for round in 1..=3 {
        // A quick plugin is sent requests ahead.
        for _ in 0..10 {
            clients.iter_mut().for_each(|client| assert_eq!(client.get("/p/x").status, 200));
        }
        let mut killer = server.client();
        let ask = b"GET /p/x HTTP/1.1\r\nhost: test\r\n\r\n";
        let (before, behind) = clients.split_at_mut(BYSTANDERS / 2);
        before.iter_mut().for_each(|client| client.send(ask));
        killer.send(b"GET /p/crash HTTP/1.1\r\nhost: test\r\n\r\n");
        behind.iter_mut().for_each(|client| client.send(ask));
        assert_eq!(killer.reply(false).status, 502);
        for client in &mut clients {
            assert_eq!(client.reply(false).text(), "GET /x of p");
        }
        wait_for("the next process", || {
            let plugin = server.plugin("p");
            (plugin["state"] == "ready" && plugin["process"]["restarts"].as_u64() >= Some(round)).then_some(())
        });
        assert_eq!(server.plugin("p")["process"]["restarts"], round, "one end a request");
        assert_eq!(notes(&server, "GET /p/crash (request ").len() as u64, round);
        assert_eq!(notes(&server, "GET /p/x "), [""; 0], "nothing is said of who was not at fault");
    }
}

#[test]
fn a_lost_connection_of_a_request_that_is_answered_at_last_has_a_line_too() {
    let server = server_of_one_connection();
    assert_eq!(server.get("/p/hang-up?once").text(), "the second time");
    let said = notes(&server, "GET /p/hang-up (request ");
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(
        said[0].ends_with("): the connection was closed before it answered; it was sent once more, and answered"),
        "{said:?}"
    );
}

#[test]
fn a_second_answer_costs_no_other_request() {
    let server = server_of_one_connection();
    for method in ["GET", "POST", "HEAD"] {
        for path in [
            "/twice",
            "/send?after&head=junk",
            "/bytes?after&hex=000000",
            "/bytes?after&hex=0000000200000000",
            "/send?after&head=%7b%22type%22%3a%22pong%22%2c%22id%22%3a9999%7d",
        ] {
            let sent = printed(&server, " and more sent");
            assert_eq!(server.get(&format!("/p{path}")).status, 200);
            if !path.starts_with("/twice") {
                // What names no request can be told from an answer only before the next request is sent.
                wait_for("what follows the answer", || (printed(&server, " and more sent") > sent).then_some(()));
            }
            let reply = server.request(method, "/p/x", &[], b"");
            assert_eq!(reply.status, 200, "{method} after {path}: {reply:?}");
        }
        // One that comes later, on an idle connection.
        let idle = "came on an idle connection, where nothing was due";
        let (said, answered) = (notes(&server, idle).len(), answered_again(&server));
        assert_eq!(server.get("/p/twice?later").text(), "once");
        touch(&server, "again");
        wait_for("the second answer", || (answered_again(&server) > answered).then_some(()));
        let reply = server.request(method, "/p/x", &[], b"");
        assert_eq!(reply.status, 200, "{method}: {reply:?}");
        assert!(notes(&server, idle).len() > said, "{method}: {:?}", notes(&server, ""));
    }
    // One that is asked in the same moment may meet it: it is sent once more, or its answer is told from that of the one before.
    let harmless = ["it was sent once more, and answered", "an earlier request was answered twice"];
    let failed = notes(&server, "/p/x (request ").into_iter().filter(|note| !harmless.iter().any(|end| note.ends_with(end)));
    assert_eq!(failed.collect::<Vec<_>>(), [""; 0]);
    let said = notes(&server, "protocol error: ");
    assert!(said.iter().any(|note| note.contains("came behind the answer to GET /p/twice (request ")), "{said:?}");
}

/// How often the plugin has answered a request again.
fn answered_again(server: &Server) -> usize {
    printed(server, " answered again")
}

/// How often the plugin has printed a line that ends so.
fn printed(server: &Server, end: &str) -> usize {
    let log = fs::read_to_string(server.site().data().join("logs/p.log")).unwrap_or_default();
    log.lines().filter(|line| line.ends_with(end)).count()
}

/// Many requests on one connection, of which some are answered twice: each client gets the answer to its own request.
#[test]
fn a_second_answer_between_others_is_taken_for_nobodys() {
    let server = server_of_one_connection();
    std::thread::scope(|scope| {
        for client in 0..8 {
            let server = &server;
            scope.spawn(move || {
                let mut connection = server.client();
                for number in 0..60 {
                    if client == 0 && number % 3 == 0 {
                        assert_eq!(connection.get("/p/twice").text(), "once");
                    }
                    let method = if client == 1 { "POST" } else { "GET" };
                    let reply = connection.request(method, &format!("/p/{client}-{number}"), &[], b"");
                    assert_eq!(reply.text(), format!("{method} /{client}-{number} of p"));
                }
            });
        }
    });
}
