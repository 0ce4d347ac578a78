//! Host names of plugins: whose a request is, what is refused, and what a name of its own keeps apart.

use crate::clients::{curl, run};
use crate::support::http::Reply;
use crate::support::{Server, Site, command, install_fake, metadata, wait_for};
use crate::web::{assert_error, sent};
use serde_json::{Value, json};
use std::fs;

/// The metadata of a fake plugin with other fields; `null` takes a field away.
fn metadata_with(id: &str, fields: Value) -> Value {
    let mut metadata = metadata(id);
    let Value::Object(fields) = fields else { panic!("{fields}") };
    metadata.as_object_mut().unwrap().extend(fields);
    json!({"metadata": metadata})
}

/// A host with `wiki`, which has a route and a name, and `shop`, which has names alone.
fn rack(arguments: &[&str]) -> Server {
    let shop = json!({"route": null, "host": ["shop.example.org", "*.shops.example", "*.a.shops.example"]});
    let server = Site::new()
        .args(arguments)
        .fake_with("wiki", &metadata_with("wiki", json!({"host": ["wiki.example.org", "b.shops.example"]})))
        .fake_with("shop", &metadata_with("shop", shop))
        .fake("plain")
        .start();
    ["wiki", "shop", "plain"].into_iter().for_each(|id| drop(server.wait_state(id, "ready")));
    server
}

/// A GET for a host.
#[track_caller]
fn get(server: &Server, host: &str, target: &str) -> Reply {
    let mut client = server.client();
    client.send(format!("GET {target} HTTP/1.1\r\nhost: {host}\r\n\r\n").as_bytes());
    client.reply(false)
}

#[test]
fn plugins_are_reached_by_name_and_by_route_at_once() {
    let server = rack(&[]);
    let port = server.address().port();
    for (host, target, answer) in [
        ("wiki.example.org", "/", "GET / of wiki"),
        ("wiki.example.org", "/wiki/a?b", "GET /wiki/a of wiki"),
        ("Wiki.EXAMPLE.org", "/a", "GET /a of wiki"),
        (&format!("wiki.example.org:{port}"), "/a", "GET /a of wiki"),
        ("wiki.example.org.", "/a", "GET /a of wiki"),
        ("wiki.example.org.:81", "/a", "GET /a of wiki"),
        ("shop.example.org", "/plain/x", "GET /plain/x of shop"),
        ("x.shops.example", "/", "GET / of shop"),
        ("y.x.shops.example", "/", "GET / of shop"),
        ("b.shops.example", "/", "GET / of wiki"),
        ("c.b.shops.example", "/", "GET / of shop"),
        ("rack.example.org", "/wiki/a", "GET /a of wiki"),
        ("test", "/plain/a", "GET /a of plain"),
        // The target's own host counts.
        ("rack.example.org", "http://shop.example.org/a", "GET /a of shop"),
        ("rack.example.org", "http://SHOP.example.org:99?q", "GET / of shop"),
        ("wiki.example.org", "http://rack.example.org/plain/a", "GET /a of plain"),
    ] {
        assert_eq!(get(&server, host, target).text(), answer, "{host} {target}");
    }
    // Neither the bare domain of a wildcard, nor a name that only contains one.
    for host in ["shops.example", "example.org", "xwiki.example.org", "wiki.example.org.evil.example", "shop", "", "127.0.0.1"] {
        assert!(get(&server, host, "/").text().contains("plain 1.0.0"), "{host}");
        assert_error(&get(&server, host, "/a"), 404, "not_found");
    }
    // All kinds of requests go the same way.
    let mut client = server.client();
    client.send(b"POST /echo HTTP/1.1\r\nhost: shop.example.org\r\ncontent-length: 5\r\n\r\nhello");
    assert_eq!(client.reply(false).text(), "hello");
    client.send(b"HEAD /a HTTP/1.1\r\nhost: shop.example.org\r\n\r\n");
    assert_eq!(client.reply(true).header("content-length"), Some("15"));
    client.send(b"GET /wiki/a HTTP/1.1\r\nhost: test\r\n\r\n");
    assert_eq!(client.reply(false).text(), "GET /a of wiki");
    // HTTP/1.0 needs no host, and goes to the routes.
    let mut old = server.client();
    old.send(b"GET /wiki/old HTTP/1.0\r\n\r\n");
    assert_eq!(old.reply(false).text(), "GET /old of wiki");
    let mut old = server.client();
    old.send(b"GET /wiki/old HTTP/1.0\r\nhost: wiki.example.org\r\n\r\n");
    assert_eq!(old.reply(false).text(), "GET /wiki/old of wiki");
}

#[test]
fn a_plugin_has_its_whole_origin_and_the_host_keeps_its_own() {
    let server = rack(&[]);
    let token = fs::read_to_string(server.site().data().join("admin-token")).unwrap();
    let api = |host: &str| {
        let mut client = server.client();
        let head = format!("GET /api/plugins HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {}\r\n\r\n", token.trim());
        client.send(head.as_bytes());
        client.reply(false)
    };
    assert_eq!(api("shop.example.org").text(), "GET /api/plugins of shop");
    assert_eq!(api("rack.example.org").json()["plugins"].as_array().unwrap().len(), 3);
    for path in ["/", "/api", "/healthz", "/metrics", "/favicon.ico", "/wiki"] {
        assert_eq!(get(&server, "shop.example.org", path).text(), format!("GET {path} of shop"));
    }
    assert_eq!(get(&server, "rack.example.org", "/healthz").text(), "ok\n");
    // The mount is empty, and the plugin is told so.
    let request = get(&server, "wiki.example.org", "/request").json();
    assert_eq!((&request["path"], &request["mount"]), (&json!("/request"), &json!("")));
    assert_eq!(sent(&request, "host"), ["wiki.example.org"]);
    assert_eq!(sent(&request, "x-forwarded-prefix"), [""]);
    let request = get(&server, "rack.example.org", "/wiki/request").json();
    assert_eq!((&request["path"], &request["mount"]), (&json!("/request"), &json!("/wiki")));
    // A plugin that does not run is not replaced by the host's own pages.
    server.cli(&["stop", "shop"]);
    assert_error(&get(&server, "shop.example.org", "/healthz"), 503, "unavailable");
}

#[test]
fn the_cookies_of_two_names_stay_apart() {
    let server = rack(&[]);
    let port = server.address().port();
    let jar = server.site().data().join("cookies");
    let url = |host: &str, path: &str| format!("http://{host}:{port}{path}");
    let fetch = |url: &str| {
        let mut curl = curl();
        for host in ["wiki.example.org", "shop.example.org"] {
            curl.args(["--resolve", &format!("{host}:{port}:127.0.0.1")]);
        }
        String::from_utf8(run(curl.arg("-c").arg(&jar).arg("-b").arg(&jar).arg(url)).stdout).unwrap()
    };
    for (host, value) in [("wiki.example.org", "of-wiki"), ("shop.example.org", "of-shop")] {
        fetch(&url(host, &format!("/header?name=set-cookie&value=session%3D{value}")));
    }
    for (host, value) in [("wiki.example.org", "session=of-wiki"), ("shop.example.org", "session=of-shop")] {
        let request: Value = serde_json::from_str(&fetch(&url(host, "/request"))).unwrap();
        assert_eq!(sent(&request, "cookie"), [value], "{host}");
    }
}

#[test]
fn an_id_at_localhost_is_its_plugin_on_loopback_alone() {
    let server = rack(&[]);
    let port = server.address().port();
    for id in ["wiki", "shop", "plain"] {
        let said = run(curl().arg(format!("http://{id}.localhost:{port}/a"))).stdout;
        assert_eq!(String::from_utf8(said).unwrap(), format!("GET /a of {id}"));
    }
    assert_error(&get(&server, "none.localhost", "/a"), 404, "not_found");
    assert_eq!(get(&server, "localhost", "/healthz").text(), "ok\n");
    // Not where others come in as well, and not where a proxy of this machine passes on what others ask for.
    for arguments in [["--listen", "0.0.0.0:0"], ["--trust-proxy", "127.0.0.0/8"]] {
        let listed = metadata_with("listed", json!({"host": ["listed.localhost"]}));
        let server = Site::new().args(&arguments).fake("p").fake_with("listed", &listed).start();
        ["p", "listed"].into_iter().for_each(|id| drop(server.wait_state(id, "ready")));
        assert_error(&get(&server, "p.localhost", "/a"), 404, "not_found");
        assert_eq!(get(&server, "listed.localhost", "/a").text(), "GET /a of listed", "{arguments:?}");
    }
}

#[test]
fn a_name_belongs_to_one_plugin() {
    let first = metadata_with("first", json!({"host": ["a.example", "b.example"]}));
    let second = metadata_with("second", json!({"host": ["c.example", "b.example"]}));
    let server = Site::new()
        .fake_with("a-first", &first)
        .fake_with("b-second", &second)
        .fake_with("c-thief", &metadata_with("thief", json!({"route": null, "host": ["first.localhost"]})))
        .fake_with("d-wildcard", &metadata_with("wildcard", json!({"route": null, "host": ["*.example"]})))
        .fake_with("e-nowhere", &metadata_with("nowhere", json!({"route": null})))
        .fake_with("f-address", &metadata_with("address", json!({"host": ["192.0.2.1"]})))
        .start();
    let reason = |file: &str| {
        let (_, list) = server.api("GET", "/plugins", b"");
        let plugins = list["plugins"].as_array().unwrap().clone();
        plugins.iter().find(|plugin| plugin["file"] == file).map(|plugin| plugin["reason"].as_str().unwrap().to_owned()).unwrap()
    };
    for (file, says) in [
        ("b-second", "the host name b.example is taken by a-first"),
        ("c-thief", "the host name first.localhost is taken by a-first"),
        ("e-nowhere", "metadata.route is missing, and so is metadata.host: a plugin needs a route, host names, or both"),
        (
            "f-address",
            "the metadata's host \"192.0.2.1\" is not valid: a host name does not end with a number, as an address does",
        ),
    ] {
        assert_eq!(reason(file), says);
    }
    server.wait_state("first", "ready");
    server.wait_state("wildcard", "ready");
    assert_eq!(get(&server, "b.example", "/").text(), "GET / of first");
    assert_eq!(get(&server, "c.example", "/").text(), "GET / of wildcard");
    // The name is free once its plugin is gone.
    fs::rename(server.site().plugins().join("a-first"), server.site().data().join("away")).unwrap();
    server.cli(&["rescan"]);
    server.wait_state("second", "ready");
    assert_eq!(get(&server, "b.example", "/").text(), "GET / of second");
    assert_eq!(get(&server, "c.example", "/").text(), "GET / of second");
    assert_eq!(get(&server, "a.example", "/").text(), "GET / of wildcard");
    // An update takes its names over, and gives up those that it no longer has.
    install_fake(&server.site().plugins(), "b-second", &metadata_with("second", json!({"version": "2", "host": ["d.example"]})));
    server.cli(&["rescan"]);
    wait_for("the new name", || (get(&server, "d.example", "/").text() == "GET / of second").then_some(()));
    assert_eq!(get(&server, "b.example", "/").text(), "GET / of wildcard");
}

#[test]
fn an_unknown_name_gets_421_where_only_known_ones_are_served() {
    let own = "rack.example.org, 192.0.2.1,*.racks.example";
    let server = Site::new()
        .env("PLUGRACK_ONLY_KNOWN_HOSTS", "true")
        .env("PLUGRACK_HOST_NAME", own)
        .fake("p")
        .fake_with("wiki", &metadata_with("wiki", json!({"host": ["wiki.example.org", "rack.example.org"]})))
        .start();
    ["p", "wiki"].into_iter().for_each(|id| drop(server.wait_state(id, "ready")));
    let port = server.address().port();
    // A name of the host itself is not a plugin's.
    for host in ["rack.example.org", "RACK.example.org.:80", "192.0.2.1", "a.b.racks.example", "localhost"] {
        assert_eq!(get(&server, host, "/healthz").text(), "ok\n", "{host}");
        assert_eq!(get(&server, host, "/p/a").text(), "GET /a of p", "{host}");
    }
    for host in [format!("127.0.0.1:{port}"), "[::1]".into(), format!("localhost:{port}"), String::new()] {
        assert_eq!(get(&server, &host, "/healthz").text(), "ok\n", "{host}");
    }
    assert_eq!(get(&server, "wiki.example.org", "/healthz").text(), "GET /healthz of wiki");
    assert_eq!(get(&server, "p.localhost", "/healthz").text(), "GET /healthz of p");
    for host in ["evil.example", "racks.example", "192.0.2.2", "[2001:db8::1]", "none.localhost", "evil.example:80", "p"] {
        for path in ["/", "/p/a", "/healthz", "/api/plugins"] {
            assert_error(&get(&server, host, path), 421, "misdirected_request");
        }
    }
    let mut client = server.client();
    client.send(b"POST /p/echo HTTP/1.1\r\nhost: evil.example\r\naccept: text/html\r\ncontent-length: 3\r\n\r\nabc");
    let page = client.reply(false);
    assert_eq!((page.status, page.header("content-type")), (421, Some("text/html; charset=utf-8")));
    assert!(page.text().contains("This site does not answer for the host of the request."), "{}", page.text());
    client.send(b"GET /p/a HTTP/1.0\r\n\r\n");
    assert_eq!(client.reply(false).text(), "GET /a of p");

    // Loopback counts as known only where nobody else comes in.
    let arguments = ["--only-known-hosts", "--listen", "0.0.0.0:0", "--host-name", "rack.example", "--host-name", "10.0.0.7"];
    let server = Site::new().args(&arguments).start();
    for (host, status) in [("127.0.0.1", 421), ("10.0.0.7", 200), ("rack.example", 200), ("localhost", 200), ("p.localhost", 421)]
    {
        assert_eq!(get(&server, host, "/healthz").status, status, "{host}");
    }
    let output = Site::new().args(&["--host-name", "Rack.example"]).run_to_end();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(said.contains("\"Rack.example\" is neither a host name nor an IP address: a host name is in lower case"), "{said}");
}

#[test]
fn the_bare_route_is_redirected_where_the_plugin_asks_for_it() {
    let server = Site::new()
        .fake_with("wiki", &metadata_with("wiki", json!({"trailing_slash": "redirect", "host": ["wiki.example.org"]})))
        .fake_with("deep", &metadata_with("deep", json!({"trailing_slash": "redirect", "route": "/wiki/deep"})))
        .fake_with("apart", &metadata_with("apart", json!({"below_route": "rewrite"})))
        .start();
    ["wiki", "deep", "apart"].into_iter().for_each(|id| drop(server.wait_state(id, "ready")));
    let mut client = server.client();
    for method in ["GET", "HEAD", "PUT", "DELETE"] {
        for (target, location) in [
            ("/wiki", "/wiki/"),
            ("/wiki?", "/wiki/?"),
            ("/wiki?a=%2F&b=/wiki?c", "/wiki/?a=%2F&b=/wiki?c"),
            ("/wiki/deep?x", "/wiki/deep/?x"),
            ("http://rack.example/wiki?x", "/wiki/?x"),
        ] {
            let reply = client.request(method, target, &[], b"");
            assert_eq!((reply.status, reply.header("location")), (308, Some(location)), "{method} {target}");
        }
    }
    let reply = client.request("POST", "/wiki?a", &[], b"a body that nobody needs");
    assert_eq!((reply.status, reply.header("location"), reply.text()), (308, Some("/wiki/?a"), ""));
    for (target, answer) in [
        ("/wiki/", "GET / of wiki"),
        ("/wiki//", "GET // of wiki"),
        ("/wiki/deep/", "GET / of deep"),
        ("/wiki/x", "GET /x of wiki"),
        ("/apart", "GET / of apart"),
    ] {
        assert_eq!(client.get(target).text(), answer);
    }
    // By its name the plugin has no route.
    assert_eq!(get(&server, "wiki.example.org", "/wiki").text(), "GET /wiki of wiki");
    let base = format!("http://{}/wiki?q=1", server.address());
    let said = run(curl().args(["-L", "-X", "POST", "-d", "x=y", "-w", "%{url_effective}"]).arg(base)).stdout;
    let said = String::from_utf8(said).unwrap();
    assert!(said.ends_with("/wiki/?q=1") && said.starts_with("POST / of wiki"), "{said}");
    let metadata = &server.plugin("apart")["metadata"];
    assert_eq!((&metadata["below_route"], &metadata["trailing_slash"]), (&json!("rewrite"), &Value::Null));
    assert_eq!(server.plugin("wiki")["metadata"]["trailing_slash"], "redirect");
}

#[test]
fn the_operator_and_visitors_see_where_a_plugin_is() {
    let server = rack(&[]);
    let port = server.address().port();
    let shop = server.plugin("shop");
    assert_eq!(shop["host"], json!(["shop.example.org", "*.shops.example", "*.a.shops.example"]));
    assert_eq!((&shop["route"], &shop["url"]), (&Value::Null, &json!(format!("http://shop.example.org:{port}/"))));
    let wiki = server.plugin("wiki");
    assert_eq!(wiki["url"], json!(format!("http://127.0.0.1:{port}/wiki")));
    assert_eq!(server.plugin("plain")["host"], Value::Null);
    let list = server.cli(&["list"]);
    let row = |id: &str| list.lines().find(|line| line.starts_with(id)).unwrap().split_whitespace().nth(6).unwrap().to_owned();
    assert_eq!((row("shop"), row("wiki")), ("shop.example.org".to_owned(), "/wiki".to_owned()));
    let shown = server.cli(&["show", "shop"]);
    assert!(shown.contains("shop.example.org, *.shops.example, *.a.shops.example"), "{shown}");
    let page = get(&server, &format!("rack.example:{port}"), "/");
    assert!(page.text().contains(&format!("//shop.example.org:{port}/")) && page.text().contains("/wiki "), "{}", page.text());
    let mut client = server.client();
    client.send(b"GET / HTTP/1.1\r\nhost: rack.example\r\naccept: text/html\r\n\r\n");
    let page = client.reply(false);
    for link in ["<a href=\"//shop.example.org/\">", "<a href=\"/wiki\">", "<a href=\"/plain\">"] {
        assert!(page.text().contains(link), "{link}: {}", page.text());
    }
}

/// A name that a plugin had before is not the host's for the time that a scan takes.
#[test]
fn a_request_for_a_plugins_name_waits_for_the_first_scan() {
    let server = Site::new().fake_with("wiki", &metadata_with("wiki", json!({"host": ["wiki.example.org"]}))).start();
    server.wait_state("wiki", "ready");
    let (_, site) = server.stop();
    let mut slow = metadata_with("wiki", json!({"host": ["wiki.example.org"], "version": "2"}));
    slow["metadata_sleep"] = json!(1);
    install_fake(&site.plugins(), "wiki", &slow);
    let serve = site.serve();
    let server = site.listen_as(serve);
    // On a slow machine the scan may take longer than a request is held.
    for path in ["/", "/healthz", "/api/plugins"] {
        let reply = get(&server, "wiki.example.org", path);
        assert!(
            reply.status == 503 && reply.header("retry-after").is_some() || reply.text() == format!("GET {path} of wiki"),
            "{reply:?}"
        );
    }
    assert_eq!(get(&server, "rack.example.org", "/healthz").text(), "ok\n");
    wait_for("the plugin by its name", || (get(&server, "wiki.example.org", "/a").text() == "GET /a of wiki").then_some(()));
}

#[test]
fn the_name_of_a_plugin_that_is_refused_answers_503() {
    let wiki = metadata_with("wiki", json!({"route": null, "host": ["wiki.example.org", "*.wiki.example.org"]}));
    let server = Site::new().fake_with("wiki", &wiki).start();
    server.wait_state("wiki", "ready");
    let (_, site) = server.stop();
    let mut broken = wiki;
    broken["metadata_exit"] = json!(1);
    install_fake(&site.plugins(), "wiki", &broken);
    let server = site.fake_with("other", &metadata_with("other", json!({"route": null, "host": ["a.wiki.example.org"]}))).start();
    server.wait_state("other", "ready");
    for host in ["wiki.example.org", "b.wiki.example.org"] {
        assert_error(&get(&server, host, "/healthz"), 503, "unavailable");
    }
    assert_eq!(get(&server, "a.wiki.example.org", "/healthz").text(), "GET /healthz of other");
}

#[test]
fn names_work_over_the_socket_of_a_proxy_and_local_ones_do_not() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("http.sock");
    let listen = format!("unix:{}", socket.display());
    let server = rack(&["--listen", &listen, "--only-known-hosts"]);
    assert_eq!(get(&server, "shop.example.org", "/healthz").text(), "GET /healthz of shop");
    for host in ["wiki.localhost", "127.0.0.1", "evil.example"] {
        assert_error(&get(&server, host, "/wiki/a"), 421, "misdirected_request");
    }
    let curl = command("curl").arg("--unix-socket").arg(&socket).args(["-s", "http://wiki.example.org/a"]).output().unwrap();
    assert_eq!(String::from_utf8(curl.stdout).unwrap(), "GET /a of wiki");
}
