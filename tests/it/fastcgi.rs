//! Applications that speak FastCGI: php-cgi and php-fpm as the documentation has them, and one that breaks the rules.

use crate::docs::blocks_in;
use crate::support::{Guarded, Server, Site, command, is_alive, pause, python, root, wait_for, write_file};
use rustix::process::geteuid;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

/// What the scripts of PHP in these tests can do.
const INDEX: &str = r#"<?php
switch ($_GET['do'] ?? '') {
case 'upload':
    echo strlen(file_get_contents('php://input')), ' ', hash('sha256', file_get_contents('php://input'));
    break;
case 'form':
    ksort($_POST);
    echo json_encode([$_POST, array_map(fn ($file) => [$file['name'], $file['size']], $_FILES)]);
    break;
case 'redirect':
    header('Location: /elsewhere');
    break;
case 'own':
    header('Location: ' . dirname($_SERVER['SCRIPT_NAME']) . '/page');
    setcookie('session', '1', ['path' => '/']);
    break;
case 'fail':
    error_log('a complaint of the script');
    http_response_code(503);
    echo 'failed';
    break;
case 'die':
    this_function_is_missing();
case 'large':
    for ($i = 0; $i < 160; $i++) { echo str_repeat('x', 65536); }
    break;
case 'empty':
    http_response_code(204);
    break;
default:
    $shown = ['SCRIPT_NAME', 'PATH_INFO', 'REQUEST_URI', 'QUERY_STRING', 'SERVER_NAME', 'REMOTE_ADDR', 'HTTP_PROXY', 'HTTP_X_A'];
    header('Content-Type: application/json');
    echo json_encode(array_map(fn ($name) => $_SERVER[$name] ?? null, array_combine($shown, $shown)) + ['file' => basename(__FILE__)]);
}
"#;

/// A manifest of the documentation, by its id.
fn documented(id: &str) -> String {
    let line = format!("id = \"{id}\"\n");
    blocks_in("docs/apps.md", "toml").into_iter().find(|manifest| manifest.starts_with(&line)).unwrap()
}

/// Installs a plugin of PHP with this manifest.
fn install(site: &Site, id: &str, manifest: &str) {
    let dir = site.plugins().join(id);
    fs::create_dir_all(dir.join("public/sub")).unwrap();
    for (file, content) in [
        ("public/index.php", INDEX),
        ("public/other.php", INDEX),
        ("public/sub/index.php", INDEX),
        ("public/style.css", "a {}\n"),
        ("public/secret.inc", "secret"),
        ("public/old.php.bak", "secret"),
        ("fpm.conf", &*blocks_in("docs/apps.md", "ini")[0]),
    ] {
        write_file(&dir.join(file), content.as_bytes(), 0o644);
    }
    write_file(&dir.join("plugrack.toml"), manifest.as_bytes(), 0o644);
}

/// Everything that PHP must do, whatever runs it.
fn assert_runs_php(server: &Server, route: &str) {
    let get = |path: &str| server.get(&format!("{route}{path}"));
    for (path, name, info, file) in [
        ("/", "/index.php", None, "index.php"),
        ("/index.php?a=%20b", "/index.php", None, "index.php"),
        ("/other.php/in%20fo/x", "/other.php", Some("/in fo/x"), "other.php"),
        ("/sub/", "/sub/index.php", None, "index.php"),
        ("/no/such/page?q=1", "/index.php", None, "index.php"),
    ] {
        let reply = get(path);
        assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/json")), "{path}: {reply:?}");
        let shown = reply.json();
        assert_eq!(shown["SCRIPT_NAME"], format!("{route}{name}"), "{path}");
        assert_eq!(shown["PATH_INFO"].as_str(), info, "{path}: {shown}");
        assert_eq!((&shown["file"], &shown["REQUEST_URI"]), (&file.into(), &format!("{route}{path}").into()));
        assert_eq!((&shown["REMOTE_ADDR"], &shown["SERVER_NAME"]), (&"127.0.0.1".into(), &"test".into()));
    }
    let shown = server.request("GET", &format!("{route}/"), &[("proxy", "http://evil"), ("x-a", "1"), ("x_a", "2")], b"").json();
    assert_eq!((&shown["HTTP_PROXY"], &shown["HTTP_X_A"]), (&serde_json::Value::Null, &"1".into()));
    // Files beside the scripts come from the host, and what may be source code does not come at all.
    let style = get("/style.css");
    assert_eq!((style.status, style.text(), style.header("content-type")), (200, "a {}\n", Some("text/css; charset=utf-8")));
    assert!(style.header("etag").is_some());
    for path in ["/secret.inc", "/old.php.bak", "/../fpm.conf", "/%2e%2e/fpm.conf", "/plugrack.toml", "/.x.php"] {
        assert_eq!(get(path).status, 404, "{path}");
    }
    assert_eq!((get("/sub").status, get("/sub").header("location").unwrap()), (308, &*format!("{route}/sub/")));
    let location = |what: &str| {
        let reply = get(&format!("/?do={what}"));
        assert_eq!(reply.status, 302, "{reply:?}");
        reply
    };
    assert_eq!(location("redirect").header("location").unwrap(), format!("{route}/elsewhere"));
    let own = location("own");
    assert_eq!(own.header("location").unwrap(), format!("{route}/page"));
    assert!(own.header("set-cookie").unwrap().contains(&format!("Path={route}")), "{own:?}");
    let head = server.request("HEAD", &format!("{route}/"), &[], b"");
    assert_eq!((head.status, head.body.len()), (200, 0));
    assert_eq!((get("/?do=empty").status, get("/?do=empty").body.len()), (204, 0));
    assert_eq!(get("/?do=large").body.len(), 160 << 16);
    let failed = get("/?do=fail");
    assert_eq!((failed.status, failed.text()), (503, "failed"));
    assert_eq!(get("/?do=die").status, 500);
    for size in [0, 1, 70_000, 10 << 20] {
        let reply = server.request("POST", &format!("{route}/?do=upload"), &[("content-type", "x/y")], &vec![b'u'; size]);
        let text = reply.text();
        assert_eq!((reply.status, text.split_once(' ').unwrap().0), (200, &*size.to_string()));
    }
    let form = server.request(
        "POST",
        &format!("{route}/?do=form"),
        &[("content-type", "multipart/form-data; boundary=X")],
        b"--X\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\n1\r\n--X\r\nContent-Disposition: form-data; name=\"f\"; \
          filename=\"f.txt\"\r\n\r\nfile\r\n--X--\r\n",
    );
    assert_eq!(form.text(), r#"[{"a":"1"},{"f":["f.txt",4]}]"#);
    let chunked = server.client().request_chunked("POST", &format!("{route}/?do=upload"), &[b"ab", b"c"]);
    assert!(chunked.text().starts_with("3 "), "{chunked:?}");
}

#[test]
fn php_cgi_runs_as_the_documentation_has_it() {
    let site = Site::new();
    install(&site, "shop", &documented("shop"));
    let server = site.start();
    server.wait_state("shop", "ready");
    assert_runs_php(&server, "/shop");
    server.wait_logged("shop", &["a complaint of the script", "this_function_is_missing"]);
}

#[test]
fn php_fpm_runs_as_the_documentation_has_it_and_serves_a_crowd() {
    let site = Site::new();
    let manifest = documented("blog");
    // It refuses to run as root, as which tests may run.
    let manifest = if geteuid().is_root() {
        manifest.replace("--nodaemonize\"", "--nodaemonize\", \"--allow-to-run-as-root\"")
    } else {
        manifest
    };
    let fpm = fs::read_dir("/usr/sbin").unwrap().map(|entry| entry.unwrap().path().display().to_string());
    let fpm = fpm.into_iter().find(|path| path.starts_with("/usr/sbin/php-fpm")).unwrap();
    install(&site, "blog", &manifest.replace("/usr/sbin/php-fpm8.2", &fpm));
    let server = site.start();
    server.wait_state("blog", "ready");
    assert_runs_php(&server, "/blog");
    server.wait_logged("blog", &["a complaint of the script", "this_function_is_missing"]);
    // More at once than there are processes, and each is answered.
    let clients: Vec<_> = (0..50)
        .map(|number| {
            let mut client = server.client();
            client.send(format!("GET /blog/page?n={number} HTTP/1.1\r\nhost: test\r\n\r\n").as_bytes());
            client
        })
        .collect();
    for (number, mut client) in clients.into_iter().enumerate() {
        let reply = client.reply(false);
        assert_eq!((reply.status, &reply.json()["QUERY_STRING"]), (200, &format!("n={number}").into()));
    }
}

/// A host with the application of `tests/fixtures/fastcgi_app.py`, and more in its manifest.
fn app(site: Site, more: &str) -> Server {
    let dir = site.plugins().join("app");
    fs::create_dir_all(&dir).unwrap();
    fs::copy(root().join("tests/fixtures/fastcgi_app.py"), dir.join("app.py")).unwrap();
    let manifest = format!(
        "id = \"app\"\nroute = \"/app\"\n[run]\nkind = \"fastcgi\"\ncommand = [\"{}\", \"app.py\", \"{{socket}}\"]\nscript = \"app\"\n{more}\n",
        python()
    );
    write_file(&dir.join("plugrack.toml"), manifest.as_bytes(), 0o644);
    let server = site.start();
    server.wait_state("app", "ready");
    server
}

/// The path of a file of the application's own.
fn touched(server: &Server, name: &str) -> PathBuf {
    server.site().data().join("plugin-data/app").join(name)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn a_broken_answer_is_502_and_the_reason_is_in_the_log() {
    let server = app(Site::new(), "");
    let raw = |output: &str| format!("/raw?{}", hex(output.as_bytes()));
    let records = |bytes: &[u8]| format!("/records?{}", hex(bytes));
    for (path, reason) in [
        ("/silent".to_owned(), "it ended the request with status 7 and without an answer"),
        ("/overloaded".to_owned(), "it is overloaded"),
        (raw("HTTP/1.1 200 OK\nA: b\n\n"), "say Status: CODE"),
        (raw("no headers\n\n"), "must begin with header lines"),
        (raw("\n\nbody"), "no header line"),
        (raw("A: b\n"), "ended before the empty line"),
        (raw("Status: 700\n\n"), "must be one number from 200 to 599"),
        (raw("Content-Length: 9\n\nshort"), "its content-length is 9, its body has 5 bytes"),
        (raw("Content-Length: 1\n\nlong"), "its content-length is 1, its body has 4 bytes"),
        (records(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "does not speak FastCGI"),
        (records(b"\x01\x06\x00\x02\x00\x01\x00\x00x"), "a record is for request 2"),
        (records(b"\x01\x09\x00\x01\x00\x00\x00\x00"), "a record has the type 9"),
        (records(b""), "it closed the connection before the end of its answer"),
        (records(b"\x01\x06\x00"), "it closed the connection before the end of its answer"),
    ] {
        let reply = server.get(&format!("/app{path}"));
        assert_eq!((reply.status, &reply.json()["error"]["code"]), (502, &"bad_gateway".into()), "{path}");
        server.wait_logged("app", &[reason]);
    }
    assert_eq!(server.get("/app/show").status, 200);
    assert_eq!(server.plugin("app")["state"], "ready");
}

#[test]
fn an_answer_that_breaks_off_is_visibly_cut_and_none_has_two() {
    let server = app(Site::new(), "");
    let mut client = server.client();
    client.send(b"GET /app/cut HTTP/1.1\r\nhost: test\r\n\r\n");
    let received = String::from_utf8(client.rest()).unwrap();
    assert!(received.contains("half") && !received.ends_with("0\r\n\r\n"), "{received}");
    server.wait_logged("app", &["the answer was cut short: it closed the connection before the end of its answer"]);
    let mut client = server.client();
    assert_eq!(client.get("/app/twice").text(), "one");
    assert!(client.get("/app/show").text().contains("REQUEST_METHOD=GET"));
}

#[test]
fn the_variables_and_the_body_reach_the_application() {
    let server = app(Site::new(), "");
    let reply = server.request("POST", "/app/show?a=b", &[("content-type", "text/x"), ("cookie", "c=d")], &vec![0; 100_000]);
    let shown: Vec<&str> = reply.text().lines().collect();
    for line in [
        "SCRIPT_NAME=/app/app",
        "PATH_INFO=/show",
        "CONTENT_LENGTH=100000",
        "CONTENT_TYPE=text/x",
        "QUERY_STRING=a=b",
        "HTTP_COOKIE=c=d",
        "GATEWAY_INTERFACE=CGI/1.1",
        "flags=0",
        "body=100000",
    ] {
        assert!(shown.contains(&line), "{line}: {shown:?}");
    }
}

#[test]
fn bodies_are_streamed_in_both_directions_at_once() {
    let server = app(Site::new(), "");
    // The application sends each part back before it has read the next.
    let body: Vec<u8> = (0..10 << 20).map(|n: u32| n.to_le_bytes()[n as usize % 3]).collect();
    let mut client = server.client();
    client.send(format!("POST /app/echo HTTP/1.1\r\nhost: test\r\ncontent-length: {}\r\n\r\n", body.len()).as_bytes());
    let mut writer = client.writer();
    let reply = std::thread::scope(|scope| {
        std::thread::Builder::new().spawn_scoped(scope, || writer.send(&body)).unwrap();
        client.reply(false)
    });
    assert!(reply.status == 200 && reply.body == body, "{} bytes of {}", reply.body.len(), body.len());
    assert_eq!(server.get("/app/large").body.len(), 160 * 65535);
}

#[test]
fn a_body_larger_than_the_hosts_buffer_is_passed_on_as_it_arrives() {
    let server = app(Site::new().args(&["--body-buffer", "64K", "--max-body", "64M"]), "");
    let shown = server.request("POST", "/app/show", &[], &vec![0; 10 << 20]);
    assert!(shown.text().contains("CONTENT_LENGTH=10485760\n") && shown.text().ends_with("body=10485760\n"), "{shown:?}");
    // The application prints as it reads, but less than the host holds back until it has the whole body.
    let body = vec![b'e'; 100_000];
    assert!(server.request("POST", "/app/echo", &[], &body).body == body);
    let chunked = server.client().request_chunked("POST", "/app/show", &[&vec![b'x'; 1 << 20]]);
    assert_eq!((chunked.status, &chunked.json()["error"]["code"]), (411, &"length_required".into()));
    let early = server.request("POST", "/app/early", &[], &vec![0; 1 << 20]);
    assert_eq!((early.status, early.text()), (403, "early"));
}

#[test]
fn output_arrives_as_it_is_written() {
    let server = app(Site::new(), "");
    let mut client = server.client();
    client.send(b"GET /app/stream HTTP/1.1\r\nhost: test\r\n\r\n");
    let head = client.reply_head();
    assert_eq!(head.status, 200);
    for number in 0..4 {
        assert_eq!(client.body_piece(&head).unwrap(), format!("{number}\n").into_bytes());
        fs::write(touched(&server, &format!("seen-{number}")), b"").unwrap();
    }
    assert_eq!(client.body_piece(&head), None);
}

#[test]
fn complaints_are_lines_of_the_plugins_log_and_a_flood_is_bounded() {
    let server = app(Site::new(), "");
    assert_eq!(server.get("/app/complain").text(), "ok");
    server.wait_logged("app", &[" a complaint in two records\n", " and one without an end\n"]);
    assert_eq!(server.get("/app/flood").text(), "ok");
    pause(Duration::from_secs(2));
    assert_eq!(server.get("/app/complain").text(), "ok");
    server.wait_logged("app", &["lines were left out"]);
    let log = server.cli(&["logs", "app", "-n", "10000"]);
    assert!(log.matches("a flood of complaints").count() < 2000);
}

#[test]
fn a_client_that_goes_and_a_time_limit_end_the_connection() {
    let server = app(Site::new(), "request-timeout = \"1s\"");
    let reply = server.get("/app/hang");
    assert_eq!((reply.status, &reply.json()["error"]["code"]), (504, &"timeout".into()));
    wait_for("the connection to end", || touched(&server, "gone").exists().then_some(()));
    server.wait_logged("app", &["1 s passed before its answer began"]);
    for name in ["gone", "hanging"] {
        fs::remove_file(touched(&server, name)).unwrap();
    }
    server.cli(&["limits", "set", "app", "request-timeout", "10m"]);
    server.cli(&["restart", "app"]);
    server.wait_state("app", "ready");
    let mut client = server.client();
    client.send(b"GET /app/hang HTTP/1.1\r\nhost: test\r\n\r\n");
    wait_for("the request to arrive", || touched(&server, "hanging").exists().then_some(()));
    drop(client);
    wait_for("the connection to end", || touched(&server, "gone").exists().then_some(()));
}

#[test]
fn an_application_that_dies_fails_its_request_with_the_exit() {
    let server = app(Site::new(), "");
    assert_eq!(server.get("/app/exit").status, 502);
    server.wait_logged("app", &["the process ended: exit code 3"]);
    server.wait_state("app", "ready");
    assert_eq!(server.get("/app/show").status, 200);
}

#[test]
fn an_application_that_runs_already_is_attached_to() {
    let site = Site::new();
    let (dir, scripts) = (site.plugins().join("app"), site.data().join("scripts"));
    fs::create_dir_all(&dir).unwrap();
    fs::create_dir_all(&scripts).unwrap();
    write_file(&scripts.join("index.php"), INDEX.as_bytes(), 0o644);
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let php = command("php-cgi").arg("-b").arg(free.to_string()).spawn().unwrap();
    let php = Guarded(php);
    wait_for("php-cgi to listen", || std::net::TcpStream::connect(free).ok());
    let manifest = format!(
        "id = \"app\"\nroute = \"/app\"\nconcurrency = 1\n[run]\nkind = \"fastcgi\"\nlisten = \"{free}\"\nroot = \"{}\"\n",
        scripts.display()
    );
    write_file(&dir.join("plugrack.toml"), manifest.as_bytes(), 0o644);
    let server = site.start();
    server.wait_state("app", "ready");
    for _ in 0..5 {
        assert_eq!(server.get("/app/x").json()["SCRIPT_NAME"], "/app/index.php");
    }
    let (status, _) = server.stop();
    assert!(status.success() && is_alive(php.0.id().into()));
}
