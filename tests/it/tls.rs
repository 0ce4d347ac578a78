//! TLS in the gate: real clients over it, certificates that come and go, and those who speak something else.

use crate::clients::{DOWNLOAD, browser_converses, converse, curl, download, fixture, python, run, told_of_download};
use crate::http11::{conversation, post};
use crate::support::browser::Browser;
use crate::support::http::Client;
use crate::support::tls::{Authority, Certificate};
use crate::support::{Server, Site, command, pause, wait_for, write_file};
use crate::web::{bytes, sent};
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// A host with the fake plugin `p`, ready, behind a certificate of an authority.
fn server_of_p(authority: &Authority, more: &[&str]) -> Server {
    let server = Site::new().args(&authority.issue("host").arguments()).args(more).fake("p").start();
    server.wait_state("p", "ready");
    server
}

fn url_of_p(server: &Server) -> String {
    format!("https://{}/p", server.address())
}

#[test]
fn curl_speaks_tls_1_2_and_1_3_over_kept_connections() {
    let authority = Authority::new();
    let server = server_of_p(&authority, &[]);
    let base = url_of_p(&server);
    let body = server.site().data().join("body");
    fs::write(&body, bytes(1 << 20)).unwrap();
    let data = format!("@{}", body.display());
    for version in [["--tlsv1.2", "--tls-max", "1.2"], ["--tlsv1.3", "--tls-max", "1.3"]] {
        let curl = || {
            let mut curl = curl();
            curl.args(version).arg("--cacert").arg(authority.file());
            curl
        };
        for more in [&[][..], &["-H", "transfer-encoding: chunked"], &["-H", "expect: 100-continue", "--expect100-timeout", "50"]]
        {
            let output = run(curl().args(["--data-binary", &data]).args(more).arg(format!("{base}/echo")));
            assert!(output.stdout == bytes(1 << 20), "{version:?} {more:?}");
        }
        let paths = ["/a", "/status?code=204", "/download?bytes=300000", "/status?code=304", "/cookies", "/c"];
        let mut get = curl();
        get.args(["-w", "%{stderr}%{http_code} %{num_connects} %{http_version} %{size_download}\n"]);
        for path in paths {
            get.args(["-o", "/dev/null"]).arg(format!("{base}{path}"));
        }
        let wrote = String::from_utf8(run(&mut get).stderr).unwrap();
        let wanted = ["200 1 1.1 11", "204 0 1.1 0", "200 0 1.1 300000", "304 0 1.1 0", "200 0 1.1 0", "200 0 1.1 11"];
        assert_eq!(wrote.lines().collect::<Vec<_>>(), wanted, "{version:?}");
    }
}

/// What is sent waits in more places than without TLS, and none of it may be forgotten there.
#[test]
fn a_large_download_reaches_quick_and_slow_readers_whole() {
    let authority = Authority::new();
    let server = server_of_p(&authority, &[]);
    for declared in ["", "&declared=5000000"] {
        for rate in ["100M", "3M"] {
            let mut get = curl();
            get.args(["--limit-rate", rate, "--cacert"]).arg(authority.file());
            let output = run(get.arg(format!("{}/download?bytes={DOWNLOAD}{declared}", url_of_p(&server))));
            assert!(output.stdout == download(DOWNLOAD), "{} bytes came at {rate}{declared}", output.stdout.len());
        }
        // The end of an answer to an old client is that of TLS; a reader in small steps finds it.
        let mut stream = authority.connect(server.address());
        stream.write_all(format!("GET /p/download?bytes={DOWNLOAD}{declared} HTTP/1.0\r\n\r\n").as_bytes()).unwrap();
        pause(Duration::from_millis(500));
        let mut came = Vec::new();
        let mut piece = [0; 1000];
        loop {
            match stream.read(&mut piece).unwrap() {
                0 => break,
                n => came.extend_from_slice(&piece[..n]),
            }
        }
        assert!(came.ends_with(&download(DOWNLOAD)), "{} bytes came{declared}", came.len());
    }
}

#[test]
fn pipelined_requests_of_every_kind_are_answered_in_order_over_tls() {
    let authority = Authority::new();
    let server = server_of_p(&authority, &[]);
    let mut client = authority.client(server.address());
    for piece in [usize::MAX, 1000, 16_000] {
        let all: Vec<u8> = conversation().into_iter().flat_map(|(request, ..)| request).collect();
        all.chunks(piece).for_each(|bytes| client.send(bytes));
        for (request, head, status, body) in conversation() {
            let reply = client.reply(head);
            assert_eq!(reply.status, status, "{}", request[..60.min(request.len())].escape_ascii());
            assert!(reply.body == body, "{}", request[..60.min(request.len())].escape_ascii());
        }
    }
    // A client that has said that a request is its last may end its sending.
    client.send(&post("/p/echo", "connection: close\r\n", &bytes(300_000)));
    client.end_sending();
    assert!(client.reply(false).body == bytes(300_000));
    assert_eq!(client.rest(), b"");
}

#[test]
fn pythons_clients_have_their_conversations_over_tls() {
    let authority = Authority::new();
    for client in ["http.client", "requests", "httpx"] {
        let server = server_of_p(&authority, &[]);
        let mut python = python();
        python.arg(fixture("conversation.py")).args([client, &url_of_p(&server), told_of_download()]).arg(authority.file());
        converse(&mut python);
    }
}

#[test]
fn chromium_has_its_conversation_over_tls() {
    let authority = Authority::new();
    let server = server_of_p(&authority, &[]);
    let base = url_of_p(&server);
    let mut browser = Browser::start(&["--ignore-certificate-errors"]);
    browser.open(&format!("https://{}/", server.address()));
    assert!(browser.text().contains("plugrack"), "{}", browser.text());
    browser.open(&format!("{base}/x"));
    browser_converses(&mut browser, &base);
}

#[test]
fn the_plugin_is_told_that_the_client_came_by_https() {
    let authority = Authority::new();
    let server = server_of_p(&authority, &[]);
    let forged = [("x-forwarded-proto", "http"), ("x-forwarded-for", "6.6.6.6")];
    let request = authority.client(server.address()).request("GET", "/p/request", &forged, b"").json();
    assert_eq!(sent(&request, "x-forwarded-proto"), ["https"]);
    assert_eq!(sent(&request, "x-forwarded-for"), ["127.0.0.1"]);
    assert_eq!(request["remote"], "127.0.0.1");
}

#[test]
fn an_answer_that_is_cut_short_has_no_proper_end() {
    let authority = Authority::new();
    let server = server_of_p(&authority, &[]);
    let mut stream = authority.connect(server.address());
    stream.write_all(b"GET /p/break HTTP/1.0\r\n\r\n").unwrap();
    let mut came = Vec::new();
    let error = stream.read_to_end(&mut came).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset), "{error}");
}

#[test]
fn the_operators_commands_work_beside_tls() {
    let authority = Authority::new();
    let server = server_of_p(&authority, &[]);
    assert!(server.cli(&["list"]).contains("ready"));
    server.cli(&["restart", "p"]);
    server.wait_state("p", "ready");
    assert!(server.cli(&["show", "p"]).contains("ready"));
}

// --- Those who do not speak it ----------------------------------------------------------------------------

#[test]
fn whoever_speaks_something_else_is_hung_up_on() {
    let authority = Authority::new();
    let server = server_of_p(&authority, &[]);
    // A record that claims to hold the most there is, and begins as no handshake does.
    let record = [&[0x16, 3, 1, 0x40, 0], &bytes(16_384)[..]].concat();
    for said in [&b"SSH-2.0-OpenSSH\r\n"[..], &record, &bytes(70_000)] {
        let mut client = Client::connect(server.address());
        client.try_send(said);
        let heard = client.rest();
        assert!(!heard.starts_with(b"HTTP"), "{}", heard.escape_ascii());
    }
    // And who says nothing, and goes.
    drop(TcpStream::connect(server.address()).unwrap());
    let old = curl().args(["--tls-max", "1.1", "--cacert"]).arg(authority.file()).arg(url_of_p(&server)).output().unwrap();
    assert!(!old.status.success() && old.stdout.is_empty(), "{old:?}");
    // A client that does not trust the authority breaks off itself.
    assert_eq!(curl().arg(url_of_p(&server)).output().unwrap().status.code(), Some(60));
    assert_eq!(authority.client(server.address()).get("/p/x").text(), "GET /x of p");
    let log = server.log();
    assert!(!log.contains("panicked") && !log.contains(" ERROR "), "{log}");
}

#[test]
fn http_2_inside_of_tls_is_refused() {
    let authority = Authority::new();
    let server = server_of_p(&authority, &[]);
    let mut client = authority.client(server.address());
    client.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
    assert_eq!(client.reply(false).status, 505);
    assert_eq!(client.rest(), b"");
}

#[test]
fn a_slow_handshake_is_cut_off_and_holds_up_nobody() {
    let authority = Authority::new();
    let server = server_of_p(&authority, &["--head-timeout", "4s"]);
    let began = Instant::now();
    // The beginning of a hello of 200 bytes, of which the rest comes byte by byte, or not at all.
    let mut drips: Vec<TcpStream> = (0..20).map(|_| TcpStream::connect(server.address()).unwrap()).collect();
    for drip in &mut drips {
        drip.write_all(&[0x16, 3, 1, 0, 200, 1, 0, 0, 196]).unwrap();
        drip.set_nonblocking(true).unwrap();
    }
    assert_eq!(authority.client(server.address()).get("/p/x").text(), "GET /x of p");
    let (silent, dripping) = drips.split_at_mut(10);
    wait_for("all of them to be cut off", || {
        for drip in &mut *dripping {
            // One that is cut off takes no more.
            drip.write_all(&[0]).unwrap_or_default();
        }
        let is_cut =
            |stream: &mut TcpStream| !matches!(stream.read(&mut [0; 64]), Err(error) if error.kind() == ErrorKind::WouldBlock);
        pause(Duration::from_millis(20));
        (silent.iter_mut().all(is_cut) && dripping.iter_mut().all(is_cut)).then_some(())
    });
    assert!(began.elapsed() >= Duration::from_millis(3900), "{:?}", began.elapsed());
}

// --- Certificates -----------------------------------------------------------------------------------------

/// Puts another certificate where a host has its own.
fn replace(place: &Certificate, by: &Certificate) {
    for (from, to) in [(&by.key, &place.key), (&by.certificate, &place.certificate)] {
        write_file(to, &fs::read(from).unwrap(), 0o600);
    }
}

#[test]
fn sighup_reads_the_certificate_again_and_keeps_the_old_one_if_it_is_wrong() {
    let authority = Authority::new();
    let (place, first, second) = (authority.issue("place"), authority.issue("first"), authority.issue_with("second", "rsa"));
    replace(&place, &first);
    let server = Site::new().args(&place.arguments()).fake("p").start();
    server.wait_state("p", "ready");
    let shown = |stream: &crate::support::tls::TlsStream| stream.conn.peer_certificates().unwrap()[0].clone().into_owned();
    let reads = |what: &str, times: usize| {
        server.signal("HUP");
        wait_for("the certificate to be read", || (server.log().matches(what).count() == times).then_some(()));
    };

    let stream = authority.connect(server.address());
    assert_eq!(shown(&stream), first.der());
    let mut kept = Client::over(stream);
    assert_eq!(kept.get("/p/1").text(), "GET /1 of p");
    // One whose answer is under way.
    let mut events = authority.client(server.address());
    let head = events.begin_events();

    replace(&place, &second);
    reads("the certificate was read again", 1);
    // The order reaches the gate before or after the line is in the log.
    wait_for("the new certificate", || (shown(&authority.connect(server.address())) == second.der()).then_some(()));
    assert_eq!(kept.get("/p/2").text(), "GET /2 of p");

    fs::write(&place.certificate, "-----BEGIN CERTIFICATE-----\nnonsense\n").unwrap();
    reads("the certificate stays as it was", 1);
    write_file(&place.certificate, &fs::read(&first.certificate).unwrap(), 0o600);
    reads("the certificate stays as it was", 2);
    fs::remove_file(&place.key).unwrap();
    reads("the certificate stays as it was", 3);
    let log = server.log();
    let said = log.lines().filter(|line| line.contains("the certificate stays as it was"));
    for (line, named) in said.zip([&place.certificate, &place.certificate, &place.key]) {
        assert!(line.contains(named.to_str().unwrap()), "{line}");
    }
    assert_eq!(shown(&authority.connect(server.address())), second.der());
    replace(&place, &first);
    reads("the certificate was read again", 2);
    wait_for("the first certificate", || (shown(&authority.connect(server.address())) == first.der()).then_some(()));

    assert_eq!(kept.get("/p/3").text(), "GET /3 of p");
    kept.get("/p/next?line=second");
    kept.get("/p/next?line=end");
    assert_eq!(events.body_piece(&head).unwrap(), b"data: second\n\n");
    assert_eq!(events.body_piece(&head), None);
}

#[test]
fn keys_of_every_kind_and_form_are_read() {
    let authority = Authority::new();
    for (kind, form) in [("ec", "pkcs8"), ("rsa", "pkcs8"), ("ec", "ec"), ("rsa", "rsa")] {
        let issued = authority.issue_with(kind, kind);
        if form != "pkcs8" {
            let key = run(command("openssl")
                .args([form, "-traditional"].iter().take(if form == "rsa" { 2 } else { 1 }))
                .arg("-in")
                .arg(&issued.key));
            assert!(String::from_utf8_lossy(&key.stdout).starts_with(&format!("-----BEGIN {} PRIVATE KEY", form.to_uppercase())));
            fs::write(&issued.key, key.stdout).unwrap();
        }
        let server = Site::new().args(&issued.arguments()).start();
        assert_eq!(authority.client(server.address()).get("/healthz").text(), "ok\n");
    }
}

#[test]
fn a_certificate_that_cannot_be_used_is_refused_at_the_start_in_one_sentence() {
    let authority = Authority::new();
    let (one, other) = (authority.issue("one"), authority.issue("other"));
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, content).unwrap();
        path
    };
    let (empty, nonsense) = (file("empty", b""), file("nonsense", &bytes(500)));
    let large = file("large", &vec![b'\n'; 2 << 20]);
    let made = |name: &str, arguments: &[&str], of: &Path| {
        let path = dir.path().join(name);
        run(command("openssl").args(arguments).arg("-in").arg(of).arg("-out").arg(&path));
        path
    };
    let locked = made("locked", &["pkcs8", "-topk8", "-passout", "pass:secret"], &one.key);
    let old_form = made("old-form", &["ec", "-aes128", "-passout", "pass:secret"], &one.key);
    let der_certificate = made("certificate.der", &["x509", "-outform", "der"], &one.certificate);
    let der_key = made("key.der", &["pkey", "-outform", "der"], &one.key);
    let missing = dir.path().join("missing");
    let directory = dir.path().to_owned();
    for (certificate, key, named, says) in [
        (&missing, &one.key, &missing, "cannot read the certificate"),
        (&directory, &one.key, &directory, "Is a directory"),
        (&empty, &one.key, &empty, "is empty"),
        (&large, &one.key, &large, "is larger than 1 MiB"),
        (&nonsense, &one.key, &nonsense, "is not PEM"),
        (&one.key, &one.key, &one.key, "holds a private key and no certificate: check --tls-cert and --tls-key"),
        (&der_certificate, &one.key, &der_certificate, "openssl x509 -inform der -in"),
        (&one.certificate, &missing, &missing, "cannot read the private key"),
        (&one.certificate, &empty, &empty, "is empty"),
        (&one.certificate, &nonsense, &nonsense, "is not PEM"),
        (&one.certificate, &one.certificate, &one.certificate, "holds a certificate and no private key"),
        (&one.certificate, &der_key, &der_key, "openssl pkey -inform der -in"),
        (&one.certificate, &locked, &locked, "is encrypted: decrypt it with openssl pkey -in"),
        (&one.certificate, &old_form, &old_form, "is encrypted: decrypt it with openssl pkey -in"),
        (&one.certificate, &other.key, &other.key, "does not belong to the certificate"),
    ] {
        let pair = Certificate { certificate: certificate.clone(), key: key.clone() };
        let output = Site::new().args(&pair.arguments()).run_to_end();
        let said = String::from_utf8(output.stderr).unwrap();
        let last = said.lines().last().unwrap_or_default();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(last.starts_with("plugrack: ") && last.contains(named.to_str().unwrap()), "{said}");
        assert!(last.contains(says) && !last.contains("cannot listen"), "{said}");
        assert_eq!(said.lines().filter(|line| !line.starts_with('[')).count(), 1, "{said}");
    }
    let pair = one.arguments();
    for half in [&pair[..2], &pair[2..]] {
        assert_eq!(Site::new().args(half).run_to_end().status.code(), Some(2), "{half:?}");
    }
}

#[test]
fn the_private_key_is_in_no_log() {
    let authority = Authority::new();
    let issued = authority.issue("host");
    let server = Site::new().args(&issued.arguments()).env("RUST_LOG", "trace").fake("p").start();
    server.wait_state("p", "ready");
    assert_eq!(authority.client(server.address()).get("/p/x").text(), "GET /x of p");
    replace(&issued, &authority.issue("next"));
    server.signal("HUP");
    wait_for("the certificate to be read", || server.log().contains("the certificate was read again").then_some(()));
    let pem = fs::read_to_string(&issued.key).unwrap();
    let log = server.log();
    for line in pem.lines().filter(|line| line.len() > 20 && !line.starts_with('-')) {
        assert!(!log.contains(line), "{line}");
    }
    let env = fs::read(format!("/proc/{}/environ", server.pid())).unwrap();
    assert!(!String::from_utf8_lossy(&env).contains("PRIVATE"));
    // Nor does a plugin see where it is.
    let plugin = authority.client(server.address()).get("/p/env").text().to_owned();
    assert!(!plugin.contains(issued.key.to_str().unwrap()), "{plugin}");
}

/// A stop does not cut anybody off: who asked is answered, and who waits is told.
#[test]
fn a_host_that_stops_ends_its_connections_properly() {
    let authority = Authority::new();
    let server = server_of_p(&authority, &[]);
    let address = server.address();
    let mut idle = authority.connect(address);
    let mut asking = authority.client(address);
    asking.send(b"GET /p/wait?file=go HTTP/1.1\r\nhost: test\r\n\r\n");
    let home = server.site().data().join("plugin-data/p");
    wait_for("the plugin to be asked", || home.join("waiting").exists().then_some(()));
    server.signal("TERM");
    wait_for("the port to be closed", || TcpStream::connect(address).is_err().then_some(()));
    fs::write(home.join("go"), "").unwrap();
    let reply = asking.reply(false);
    assert_eq!((reply.text(), reply.header("connection")), ("waited", Some("close")));
    let mut rest = Vec::new();
    idle.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty());
    assert_eq!(server.ended().0.code(), Some(0));
}

// --- Several certificates ---------------------------------------------------------------------------------

/// The common name of the certificate that `openssl s_client` is shown for a name; none sends no SNI.
fn shown_for(server: &Server, name: Option<&str>) -> String {
    let mut openssl = command("openssl");
    openssl.args(["s_client", "-connect", &server.address().to_string()]).stdin(std::process::Stdio::null());
    match name {
        Some(name) => openssl.args(["-servername", name]),
        None => openssl.arg("-noservername"),
    };
    let output = openssl.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let subject = said.lines().find_map(|line| line.strip_prefix("subject=")).unwrap_or_else(|| panic!("{name:?}: {said}"));
    subject.rsplit("CN = ").next().unwrap().to_owned()
}

#[test]
fn the_certificate_is_chosen_by_the_name_that_the_client_asks_for() {
    let authority = Authority::new();
    let (files, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let first = authority.issue_for(files.path(), "first", &["rack.example.org", "localhost"]);
    let wild = authority.issue_for(files.path(), "wild", &["*.example.org", "example.org"]);
    authority.issue_for(dir.path(), "exact", &["wiki.example.org", "Other.Example.net"]);
    let pem = authority.issue_for(dir.path(), "pem", &["pem.example.net"]);
    fs::rename(&pem.certificate, dir.path().join("pem.pem")).unwrap();
    for other in ["README", ".hidden.key", "options.conf"] {
        fs::write(dir.path().join(other), "no pair").unwrap();
    }
    let pairs = [first.arguments(), wild.arguments()].concat();
    let mut metadata = crate::support::metadata("wiki");
    metadata["host"] = serde_json::json!(["wiki.example.org"]);
    let server = Site::new()
        .args(&pairs)
        .args(&["--tls-dir", dir.path().to_str().unwrap()])
        .fake_with("wiki", &serde_json::json!({"metadata": metadata}))
        .start();
    server.wait_state("wiki", "ready");
    for (name, certificate) in [
        (Some("rack.example.org"), "first"),
        (Some("wiki.example.org"), "exact"),
        (Some("WIKI.example.ORG"), "exact"),
        (Some("other.example.net"), "exact"),
        (Some("pem.example.net"), "pem"),
        (Some("example.org"), "wild"),
        (Some("any.example.org"), "wild"),
        // A wildcard of a certificate stands for one label.
        (Some("b.any.example.org"), "first"),
        (Some("unknown.example.com"), "first"),
        (None, "first"),
    ] {
        assert_eq!(shown_for(&server, name), certificate, "{name:?}");
    }
    // A real client checks the name, and asks the plugin of that name.
    let port = server.address().port();
    for (host, path, answer) in [
        ("wiki.example.org", "/a", "GET /a of wiki"),
        ("any.example.org", "/wiki/a", "GET /a of wiki"),
        ("rack.example.org", "/healthz", "ok\n"),
    ] {
        let mut get = curl();
        get.args(["--resolve", &format!("{host}:{port}:127.0.0.1"), "--cacert"]).arg(authority.file());
        assert_eq!(String::from_utf8(run(get.arg(format!("https://{host}:{port}{path}"))).stdout).unwrap(), answer, "{host}");
    }
    let mut get = curl();
    get.args(["--resolve", &format!("b.any.example.org:{port}:127.0.0.1"), "--cacert"]).arg(authority.file());
    assert_eq!(get.arg(format!("https://b.any.example.org:{port}/")).output().unwrap().status.code(), Some(60));
}

#[test]
fn sighup_reads_all_certificates_again_or_none() {
    let authority = Authority::new();
    let dir = tempfile::tempdir().unwrap();
    let one = authority.issue_for(dir.path(), "one", &["one.example"]);
    let two = authority.issue_for(dir.path(), "two", &["two.example"]);
    let server = Site::new().args(&["--tls-dir", dir.path().to_str().unwrap()]).start();
    let shown = |name: &str| shown_for(&server, Some(name));
    let hang_up = |what: &str, times: usize| {
        server.signal("HUP");
        wait_for("the certificates to be read", || (server.log().matches(what).count() == times).then_some(()));
    };
    assert_eq!((shown("one.example"), shown("two.example"), shown("three.example")), ("one".into(), "two".into(), "one".into()));
    let other = tempfile::tempdir().unwrap();
    let renewed = authority.issue_for(other.path(), "renewed", &["one.example"]);
    replace(&one, &renewed);
    authority.issue_for(dir.path(), "three", &["three.example"]);
    hang_up("the 3 certificates were read again", 1);
    wait_for("the new certificate", || (shown("three.example") == "three").then_some(()));
    assert_eq!(shown("one.example"), "renewed");
    // Of the next change one half is wrong, so nothing of it counts.
    replace(&one, &authority.issue_for(other.path(), "again", &["one.example"]));
    fs::rename(&two.key, other.path().join("key")).unwrap();
    hang_up("all certificates stay as they were", 1);
    let said = server.log();
    let said = said.lines().find(|line| line.contains("stay as they were")).unwrap();
    assert!(said.contains(two.certificate.to_str().unwrap()) && said.contains("has no private key beside it: add"), "{said}");
    assert_eq!((shown("one.example"), shown("two.example")), ("renewed".to_owned(), "two".to_owned()));
    fs::rename(other.path().join("key"), &two.key).unwrap();
    hang_up("the 3 certificates were read again", 2);
    wait_for("the latest certificate", || (shown("one.example") == "again").then_some(()));
}

#[test]
fn a_mistake_among_several_certificates_is_one_sentence() {
    let authority = Authority::new();
    let dir = || tempfile::tempdir().unwrap();
    let files = dir();
    let one = authority.issue_for(files.path(), "one", &["one.example"]);
    let two = authority.issue_for(files.path(), "two", &["two.example"]);
    let (one, two) = (one.arguments(), two.arguments());
    let (empty, lonely_key, lonely_certificate, double, mixed) = (dir(), dir(), dir(), dir(), dir());
    authority.issue_for(lonely_key.path(), "a", &["a.example"]);
    fs::remove_file(lonely_key.path().join("a.crt")).unwrap();
    authority.issue_for(lonely_certificate.path(), "a", &["a.example"]);
    fs::remove_file(lonely_certificate.path().join("a.key")).unwrap();
    authority.issue_for(double.path(), "a", &["a.example"]);
    fs::copy(double.path().join("a.crt"), double.path().join("a.pem")).unwrap();
    authority.issue_for(mixed.path(), "a", &["a.example"]);
    authority.issue_for(mixed.path(), "b", &["b.example"]);
    fs::copy(mixed.path().join("a.key"), mixed.path().join("b.key")).unwrap();
    let missing = empty.path().join("missing");
    let in_dir = |dir: &Path| vec!["--tls-dir".to_owned(), dir.to_str().unwrap().to_owned()];
    let listed = |arguments: &[&str]| arguments.iter().map(|argument| (*argument).to_owned()).collect::<Vec<_>>();
    for (arguments, says) in [
        (listed(&[&one[..2], &two[..]].concat()), "--tls-cert has 2 files and --tls-key has 1: set --tls-key once for each"),
        (listed(&[&one[..2], &two[2..]].concat()), "does not belong to the certificate"),
        (in_dir(empty.path()), "has no pair: put NAME.crt (or NAME.pem) and NAME.key into it"),
        (in_dir(&missing), "cannot read the directory of certificates"),
        (in_dir(lonely_key.path()), "a.key has no certificate beside it: add"),
        (in_dir(lonely_certificate.path()), "a.crt has no private key beside it: add"),
        (in_dir(double.path()), "are both the certificate of one name: remove one of them"),
        (in_dir(mixed.path()), "b.key does not belong to the certificate"),
    ] {
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        let output = Site::new().args(&arguments).run_to_end();
        let said = String::from_utf8(output.stderr).unwrap();
        let last = said.lines().last().unwrap_or_default();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {said}");
        assert!(last.starts_with("plugrack: ") && last.contains(says), "{arguments:?}: {said}");
    }
    // As the variables have it: with commas.
    let server = Site::new()
        .env("PLUGRACK_TLS_CERT", &format!("{},{}", one[1], two[1]))
        .env("PLUGRACK_TLS_KEY", &format!("{},{}", one[3], two[3]))
        .start();
    assert_eq!((shown_for(&server, Some("two.example")), shown_for(&server, None)), ("two".to_owned(), "one".to_owned()));
}

/// The host serves: the clock may be wrong, and other names have other certificates.
#[test]
fn a_certificate_that_clients_refuse_is_named_in_the_log() {
    let authority = Authority::new();
    let old = authority.issue_between("old.example", "20200101000000Z", "20200201000000Z");
    let early = authority.issue_between("early.example", "20450101000000Z", "20450201000000Z");
    let nameless = authority.issue("nameless");
    let pairs = [old.arguments(), early.arguments(), nameless.arguments()].concat();
    let server = Site::new().args(&pairs).start();
    let log = server.log();
    for (file, says) in [
        (&old, "has expired at 2020-02-01T00:00:00.000Z: renew it, then send SIGHUP"),
        (&early, "is not valid before 2045-01-01T00:00:00.000Z: set the clock of this machine"),
        (&nameless, "names no host, so no client gets it: issue it with subject alternative names"),
    ] {
        let file = file.certificate.to_str().unwrap();
        assert!(log.lines().any(|line| line.contains(file) && line.contains(says)), "{says}: {log}");
    }
    assert_eq!(shown_for(&server, Some("early.example")), "early.example");
    assert_eq!(shown_for(&server, Some("other.example")), "old.example");
}
