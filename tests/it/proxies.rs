//! The host on a Unix socket, and real reverse proxies in front of it, set up as the operations page says.

use crate::clients::{converse, curl, fixture, load, python, run, told, told_of_download};
use crate::docs::blocks_in;
use crate::support::http::Client;
use crate::support::tls::{Authority, Certificate};
use crate::support::{Guarded, Server, Site, binary, command, copy_program, metadata, pause, uids, wait_for};
use crate::web::{bytes, sent};
use serde_json::Value;
use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The page with the proxies' configurations.
const PAGE: &str = "docs/operations.md";

/// The default of `--max-body`.
const MAX_BODY: usize = 10 << 20;

/// A directory for a host that listens on a socket in it, with the plugins `p` and `hello`.
fn site() -> (Site, PathBuf) {
    let site = Site::new().fake("p").example("hello");
    let socket = site.data().join("http.sock");
    // On a machine with much else to do a crowd takes its time.
    (site.args(&["--listen", &format!("unix:{}", socket.display())]), socket)
}

/// Starts it, and waits for the plugins.
fn start(site: Site) -> Server {
    let server = site.start();
    server.wait_state("p", "ready");
    server.wait_state("hello", "ready");
    server
}

// --- The socket -------------------------------------------------------------------------------------------

#[test]
fn the_socket_is_for_the_hosts_user_and_group_and_goes_with_the_host() {
    let (site, socket) = site();
    let server = start(site);
    let metadata = fs::metadata(&socket).unwrap();
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o777, 0o660);
    assert_eq!(fs::read_to_string(server.site().data().join("run/listen")).unwrap(), format!("unix:{}\n", socket.display()));
    assert!(server.log().contains(&format!("listening on unix:{}", socket.display())), "{}", server.log());
    assert_eq!(server.get("/p/x").text(), "GET /x of p");
    assert!(server.cli(&["list"]).contains("ready"));
    let (status, _site) = server.stop();
    assert_eq!(status.code(), Some(0));
    assert!(!socket.exists());
}

#[test]
fn a_socket_that_a_killed_host_has_left_is_replaced() {
    let (site, socket) = site();
    let site = start(site).kill();
    assert!(socket.exists());
    let server = start(site);
    assert_eq!(server.get("/p/x").text(), "GET /x of p");
}

/// What a host says that cannot listen: one sentence.
#[track_caller]
fn refused(socket: &Path) -> String {
    let output = Site::new().args(&["--listen", &format!("unix:{}", socket.display())]).run_to_end();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    let sentences: Vec<&str> = said.lines().filter(|line| !line.starts_with('[')).collect();
    assert!(sentences.len() == 1 && sentences[0].starts_with("plugrack: "), "{said}");
    assert!(sentences[0].contains(socket.to_str().unwrap()), "{said}");
    sentences[0].to_owned()
}

#[test]
fn what_is_in_the_way_of_the_socket_is_left_alone_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);

    fs::write(at("file"), "precious").unwrap();
    symlink(at("file"), at("link")).unwrap();
    fs::create_dir(at("directory")).unwrap();
    for name in ["file", "link", "directory"] {
        assert!(refused(&at(name)).contains("is no socket"), "{name}");
        assert!(fs::symlink_metadata(at(name)).is_ok());
    }
    assert_eq!(fs::read_to_string(at("file")).unwrap(), "precious");

    let listener = UnixListener::bind(at("used")).unwrap();
    assert!(refused(&at("used")).contains("another program listens on"));
    drop(listener);
    // Where nobody listens any more it is replaced, whoever has left it.
    let server = Site::new().args(&["--listen", &format!("unix:{}", at("used").display())]).start();
    assert_eq!(server.get("/healthz").text(), "ok\n");
    // As it is while a host serves there, which goes on.
    assert!(refused(&at("used")).contains("another program listens on"));
    assert_eq!(server.get("/healthz").text(), "ok\n");

    assert!(refused(&at("missing/socket")).contains("make the directory"));
    assert!(refused(&at(&"long".repeat(30))).contains("a socket's path at most 107: choose a shorter one"));
    assert_eq!(Site::new().args(&["--listen", "unix:relative"]).run_to_end().status.code(), Some(2));
}

/// Whether somebody listens on a socket shows only where one may connect to it.
#[test]
fn a_socket_of_another_user_is_left_alone() {
    if fs::metadata("/proc/self").unwrap().uid() != 0 {
        // Only root can become another user.
        return;
    }
    let shared = tempfile::tempdir().unwrap();
    fs::set_permissions(shared.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let socket = shared.path().join("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o600)).unwrap();
    let site = Site::new().args(&["--listen", &format!("unix:{}", socket.display())]);
    let (own, uid) = (site.data().join("plugrack"), uids().start().to_string());
    copy_program(binary(), &own);
    assert!(command("chown").args(["-R", &uid]).arg(site.data()).status().unwrap().success());
    let mut serve = command("setpriv");
    serve.args(["--reuid", &uid, "--regid", &uid, "--clear-groups"]).arg(own).args(site.serve().get_args());
    let output = serve.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("whether another program listens on it cannot be told (Permission denied"), "{said}");
    let _client = UnixStream::connect(&socket).unwrap();
    listener.accept().unwrap();
}

#[test]
fn tls_is_refused_on_a_socket() {
    let issued = Authority::new().issue("host");
    let (site, socket) = site();
    let output = site.args(&issued.arguments()).run_to_end();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.lines().last().unwrap().contains("leave --tls-cert out"), "{said}");
    assert!(!socket.exists());
}

#[test]
fn a_proxy_is_believed_in_its_last_word_and_nothing_else() {
    let (site, _) = site();
    let server = start(site);
    for (headers, remote, scheme) in [
        (&[][..], "", "http"),
        (&[("X-Forwarded-For", "192.0.2.7"), ("X-Forwarded-Proto", "https")], "192.0.2.7", "https"),
        (&[("x-forwarded-for", "6.6.6.6, 192.0.2.7"), ("x-forwarded-proto", "http, HTTPS")], "192.0.2.7", "https"),
        (
            &[("x-forwarded-for", "6.6.6.6"), ("x-forwarded-for", "2001:db8::7"), ("x-forwarded-proto", "http")],
            "2001:db8::7",
            "http",
        ),
        (&[("x-forwarded-for", "192.0.2.7:4711")], "192.0.2.7", "http"),
        (&[("x-forwarded-for", "[2001:db8::7]:4711")], "2001:db8::7", "http"),
        (&[("x-forwarded-for", "192.0.2.7, unknown"), ("x-forwarded-proto", "gopher")], "", "http"),
        (
            &[("forwarded", "for=6.6.6.6;proto=https"), ("x-real-ip", "6.6.6.6"), ("x-plugrack", "key https 6.6.6.6 -")],
            "",
            "http",
        ),
    ] {
        let request = server.request("GET", "/p/request", headers, b"").json();
        assert_eq!(request["remote"], remote, "{headers:?}");
        let known: Vec<&str> = [remote].into_iter().filter(|remote| !remote.is_empty()).collect();
        assert_eq!(sent(&request, "x-forwarded-for"), known, "{headers:?}");
        assert_eq!(sent(&request, "x-forwarded-proto"), [scheme], "{headers:?}");
        assert!(!request.to_string().contains("6.6.6.6"), "{request}");
    }
}

/// One request, from an address of this machine, and what the plugin was sent.
fn sent_from(server: &Server, from: [u8; 4], headers: &[(&str, &str)], body: &[u8]) -> Value {
    Client::connect_from(from, server.address()).request("POST", "/p/request", headers, body).json()
}

#[test]
fn a_proxy_by_tcp_is_believed_where_it_is_trusted() {
    let site = Site::new().fake("p").args(&["--trust-proxy", "127.0.0.1, 127.0.7.0/24", "--trust-proxy", "10.0.0.0/8,::1"]);
    let server = site.args(&["--body-buffer", "0"]).start();
    server.wait_state("p", "ready");
    let said = [
        ("x-forwarded-for", "6.6.6.6, 192.0.2.7, 127.0.7.3"),
        ("x-forwarded-for", "10.1.2.3"),
        ("x-forwarded-proto", "https"),
        ("x-forwarded-host", "rack.example:8443"),
        ("x-request-id", "0b9f7e52-6d3b"),
    ];
    // A body of this size comes in pieces, by a connection of its own inside of the host.
    let large = vec![b'x'; 300_000];
    for (from, body) in [([127, 0, 0, 1], &b""[..]), ([127, 0, 7, 9], b""), ([127, 0, 0, 1], &large)] {
        let request = sent_from(&server, from, &said, body);
        assert_eq!(request["remote"], "192.0.2.7", "{request}");
        for (name, value) in [
            ("x-forwarded-for", "192.0.2.7"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-host", "rack.example:8443"),
            ("x-request-id", "0b9f7e52-6d3b"),
        ] {
            assert_eq!(sent(&request, name), [value], "{name}: {request}");
        }
    }
    for (from, body) in [([127, 0, 0, 2], &b""[..]), ([127, 0, 8, 1], b""), ([127, 0, 0, 2], &large)] {
        let address = from.map(|byte: u8| byte.to_string()).join(".");
        let request = sent_from(&server, from, &said, body);
        assert_eq!(request["remote"], address, "{request}");
        assert_eq!((sent(&request, "x-forwarded-for"), sent(&request, "x-forwarded-proto")), (vec![&*address], vec!["http"]));
        assert!(sent(&request, "x-forwarded-host").is_empty(), "{request}");
        assert!(sent(&request, "x-request-id").len() == 1 && sent(&request, "x-request-id") != ["0b9f7e52-6d3b"], "{request}");
    }
}

#[test]
fn what_a_trusted_proxy_says_in_a_form_that_is_not_known_counts_as_not_said() {
    let server = Site::new().fake("p").args(&["--trust-proxy", "127.0.0.0/8"]).start();
    server.wait_state("p", "ready");
    let many = "127.0.0.1,".repeat(1000) + "192.0.2.7";
    let (hops, id) = (format!("192.0.2.7{}", ",127.0.0.1".repeat(1000)), "a".repeat(129));
    for (headers, remote) in [
        (&[][..], "127.0.0.3"),
        (&[("x-forwarded-for", "")], "127.0.0.3"),
        (&[("x-forwarded-for", "192.0.2.7, unknown")], "127.0.0.3"),
        (&[("x-forwarded-for", "192.0.2.7, unknown, 127.0.0.9")], "127.0.0.3"),
        (&[("x-forwarded-for", &*hops)], "127.0.0.3"),
        (&[("x-forwarded-for", &*many)], "192.0.2.7"),
        // All of the way is inside.
        (&[("x-forwarded-for", "127.0.0.8, 127.0.0.9")], "127.0.0.8"),
        (&[("x-forwarded-proto", "gopher"), ("x-forwarded-host", "a b"), ("x-request-id", "a,b")], "127.0.0.3"),
        (&[("x-request-id", "a\"b"), ("x-forwarded-host", "")], "127.0.0.3"),
        (&[("x-request-id", &*id)], "127.0.0.3"),
    ] {
        let request = sent_from(&server, [127, 0, 0, 3], headers, b"");
        assert_eq!((request["remote"].as_str(), sent(&request, "x-forwarded-for")), (Some(remote), vec![remote]), "{headers:?}");
        assert_eq!(sent(&request, "x-forwarded-proto"), ["http"], "{headers:?}");
        assert!(sent(&request, "x-forwarded-host").is_empty(), "{request}");
        let ids = sent(&request, "x-request-id");
        assert!(ids.len() == 1 && !["a,b", "a\"b", &id].contains(&ids[0]), "{request}");
    }
}

/// Whom the proxy does not name is counted for no address.
#[test]
fn a_socket_has_no_limit_of_connections_per_address() {
    let (site, socket) = site();
    let server = start(site.args(&["--max-connections-per-address", "2"]));
    let mut clients: Vec<Client> = (0..50).map(|_| Client::connect_unix(&socket)).collect();
    for client in &mut clients {
        assert_eq!(client.get("/p/x").text(), "GET /x of p");
    }
    drop(server);
}

// --- Proxies ----------------------------------------------------------------------------------------------

/// A proxy that runs, ended with the test.
struct Proxy {
    url: String,
    authority: Authority,
    dir: TempDir,
    _process: Guarded,
}

/// Which of the page's configurations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The simple one, with HTTP/1.0 to the host and plain HTTP to clients.
    Nginx,
    /// The one that keeps connections.
    NginxKeeping,
    Caddy,
    /// The one that comes by TCP.
    NginxByTcp,
}

impl Kind {
    fn has_tls(self) -> bool {
        !matches!(self, Self::Nginx | Self::NginxByTcp)
    }

    /// Writes the page's configuration, with the places of a test put in place of its own, and gives the command that runs it.
    fn set_up(self, dir: &Path, socket: &Path, address: SocketAddr, issued: &Certificate) -> Command {
        let (language, number) = match self {
            Self::Nginx => ("nginx", 0),
            Self::NginxKeeping => ("nginx", 1),
            Self::Caddy => ("caddyfile", 0),
            Self::NginxByTcp => ("nginx", 2),
        };
        let mut block = blocks_in(PAGE, language).remove(number);
        let (certificate, key) = (issued.certificate.display(), issued.key.display());
        let mut replace = |there: &str, here: &str| {
            assert!(block.contains(there), "{there} is not in {block}");
            block = block.replace(there, here);
        };
        let host = if self == Self::NginxByTcp { "plugrack:8080" } else { "/run/plugrack/http.sock" };
        replace(host, socket.to_str().unwrap());
        match self {
            Self::Nginx | Self::NginxByTcp => replace("listen 80;", &format!("listen {address};")),
            Self::NginxKeeping => {
                replace("listen 443 ssl;", &format!("listen {address} ssl;"));
                replace("/etc/letsencrypt/live/rack.example/fullchain.pem", &certificate.to_string());
                replace("/etc/letsencrypt/live/rack.example/privkey.pem", &key.to_string());
            }
            // The certificate is the test's: Caddy's own would come from the network.
            Self::Caddy => replace("rack.example {", &format!("https://{address} {{\n    tls {certificate} {key}")),
        }
        let config = dir.join("config");
        if self == Self::Caddy {
            fs::write(&config, format!("{{\n    admin off\n    auto_https off\n}}\n{block}")).unwrap();
            let mut caddy = command("caddy");
            caddy.args(["run", "--adapter", "caddyfile", "--config"]).arg(&config).env("HOME", dir);
            return caddy;
        }
        let places: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|what| format!("{what}_temp_path {}/{what};\n", dir.display()))
            .concat();
        // One process, so that ending it ends all of it.
        let main = "daemon off; master_process off; worker_rlimit_nofile 4096; events { worker_connections 1024; }";
        fs::write(&config, format!("{main} pid {}/pid;\nhttp {{\naccess_log off;\n{places}{block}}}\n", dir.display())).unwrap();
        let mut nginx = command("nginx");
        nginx.arg("-p").arg(dir).arg("-e").arg(dir.join("log")).arg("-c").arg(&config);
        nginx
    }
}

impl Proxy {
    /// Starts a proxy on a free port, before the host's socket, or the address where it listens.
    #[track_caller]
    fn start(kind: Kind, socket: &Path) -> Self {
        let (dir, authority) = (tempfile::tempdir().unwrap(), Authority::new());
        let issued = authority.issue("proxy");
        // Another test may take the port before the proxy does; it then ends at once.
        for _ in 0..5 {
            let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
            let log = fs::File::options().create(true).append(true).open(dir.path().join("log")).unwrap();
            let mut proxy = kind.set_up(dir.path(), socket, address, &issued);
            let child = proxy.stdout(log.try_clone().unwrap()).stderr(log).spawn();
            let child = child.unwrap_or_else(|error| panic!("{proxy:?}: {error}: `make test-tools` installs it"));
            let mut process = Guarded(child);
            let listens = wait_for("the proxy to listen", || match process.0.try_wait().unwrap() {
                Some(_) => Some(false),
                None => TcpStream::connect(address).is_ok().then_some(true),
            });
            if listens {
                let scheme = if kind.has_tls() { "https" } else { "http" };
                return Self { url: format!("{scheme}://{address}"), authority, dir, _process: process };
            }
        }
        panic!("{kind:?} does not start: {}", fs::read_to_string(dir.path().join("log")).unwrap());
    }

    /// curl, which trusts the proxy's authority.
    fn curl(&self, arguments: &[&str], path: &str) -> Output {
        let mut curl = curl();
        curl.arg("--cacert").arg(self.authority.file()).args(arguments).arg(format!("{}{path}", self.url));
        run(&mut curl)
    }

    /// The status of an answer as far as it came, whole or not.
    fn status(&self, arguments: &[&str], path: &str) -> String {
        let mut curl = curl();
        curl.arg("--cacert").arg(self.authority.file()).args(["-o", "/dev/null", "-w", "%{http_code}"]).args(arguments);
        String::from_utf8(curl.arg(format!("{}{path}", self.url)).output().unwrap().stdout).unwrap()
    }
}

/// What every proxy must do: all that clients can ask for, whatever the body, and the truth about who they are.
fn serves_through(kind: Kind) {
    let (site, socket) = site();
    let server = start(site);
    let proxy = Proxy::start(kind, &socket);
    let mut client = python();
    client.arg(fixture("conversation.py")).args(["http.client", &format!("{}/p", proxy.url), told_of_download()]);
    if kind.has_tls() {
        client.arg(proxy.authority.file());
    }
    converse(&mut client);

    let body = bytes(8_000_000);
    let told = told(&body);
    let file = proxy.dir.path().join("body");
    fs::write(&file, &body).unwrap();
    let data = format!("@{}", file.display());
    for more in [&[][..], &["-H", "transfer-encoding: chunked"], &["-H", "expect: 100-continue", "--expect100-timeout", "50"]] {
        let output = proxy.curl(&[more, &["--data-binary", &data]].concat(), "/p/upload");
        assert_eq!(String::from_utf8(output.stdout).unwrap(), told, "{kind:?} {more:?}");
    }
    // What is left of the body when it is over the limit is little, and the proxy reads it.
    fs::write(&file, [&body[..], &body[..MAX_BODY - body.len() + 50_000]].concat()).unwrap();
    assert_eq!(proxy.status(&["--data-binary", &data, "-H", "transfer-encoding: chunked"], "/p/upload"), "413", "{kind:?}");
    let declared = proxy.status(&["--data-binary", &data], "/p/upload");
    // Caddy may end the connection of a client that still sends much, in which case curl sees no answer, or only its head.
    let broken_off = kind == Kind::Caddy && ["000", "100"].contains(&&*declared);
    assert!(declared == "413" || broken_off, "{kind:?}: {declared}");

    // Every address of 127.0.0.0/8 is this machine's.
    for address in ["127.0.0.1", "127.0.0.2"] {
        let forged =
            ["X-Forwarded-For: 6.6.6.6", "X-Forwarded-Proto: gopher", "X-Real-IP: 6.6.6.6", "X-Plugrack: key https 6.6.6.6 -"];
        let forged: Vec<&str> = forged.iter().flat_map(|header| ["-H", header]).collect();
        let output = proxy.curl(&[&["--interface", address][..], &forged].concat(), "/p/request");
        let request: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(request["remote"], address, "{kind:?}");
        assert_eq!(sent(&request, "x-forwarded-for"), [address], "{kind:?}");
        assert_eq!(sent(&request, "x-forwarded-proto"), [if kind.has_tls() { "https" } else { "http" }], "{kind:?}");
    }

    // The host goes and comes back.
    let (status, site) = server.stop();
    assert_eq!(status.code(), Some(0));
    assert_eq!(proxy.status(&[], "/p/x"), "502", "{kind:?}");
    let site = start(site).kill();
    assert_eq!(proxy.status(&[], "/p/x"), "502", "{kind:?}");
    let server = start(site);
    for _ in 0..10 {
        assert_eq!(proxy.curl(&[], "/p/x").stdout, b"GET /x of p", "{kind:?}");
    }
    assert!(!server.log().contains("panicked"), "{}", server.log());
}

/// Two hundred clients at once are all answered, again and again. All of them are of one address.
fn serves_a_crowd_through(kind: Kind) {
    let (site, socket) = site();
    let server = start(site.args(&["--max-connections-per-address", "256"]));
    let proxy = Proxy::start(kind, &socket);
    let body = proxy.dir.path().join("body");
    fs::write(&body, bytes(20_000)).unwrap();
    for (requests, more, path) in [("3000", &[][..], "/hello/crowd"), ("1000", &["-d", body.to_str().unwrap()], "/p/echo")] {
        let url = format!("{}{path}", proxy.url);
        let said = load("h2load", &[&["--h1", "-c", "200", "-n", requests], more, &[&url]].concat());
        assert!(said.contains(&format!("{requests} succeeded, 0 failed, 0 errored, 0 timeout")), "{kind:?}: {said}");
        assert!(said.contains(&format!("status codes: {requests} 2xx")), "{kind:?}: {said}\n{}", server.log());
    }
    assert_eq!(proxy.curl(&[], "/hello/again").stdout, b"Hello, again!");
}

/// Through a proxy by TCP each of its clients has connections of its own, and its own word is not believed.
#[test]
fn nginx_by_tcp_serves_many_listeners_of_several_clients() {
    // As many connections to the plugin as there are listeners, and more.
    let mut metadata = metadata("p");
    metadata["concurrency"] = 64.into();
    let site = Site::new().fake_with("p", &serde_json::json!({"metadata": metadata}));
    let site = site.args(&["--trust-proxy", "127.0.0.1", "--max-connections-per-address", "12"]);
    let server = site.start();
    server.wait_state("p", "ready");
    let proxy = Proxy::start(Kind::NginxByTcp, Path::new(&server.address().to_string()));
    let address: SocketAddr = proxy.url.strip_prefix("http://").unwrap().parse().unwrap();
    let port = address.port();
    let listen = |from: [u8; 4]| {
        let mut client = Client::connect_from(from, address);
        client.send(b"GET /p/events HTTP/1.1\r\nhost: test\r\n\r\n");
        let reply = client.reply_head();
        (client, reply.status)
    };
    let of = |last: u8| (0..12).map(|_| listen([127, 0, 0, last])).collect::<Vec<_>>();
    let held: Vec<_> = [2, 3].into_iter().flat_map(of).collect();
    assert!(held.iter().all(|(_, status)| *status == 200), "{}", server.log());
    assert_eq!(listen([127, 0, 0, 2]).1, 503);
    for client in ["127.0.0.1", "127.0.0.4"] {
        let output = proxy.curl(&["--interface", client, "-H", "X-Forwarded-For: 6.6.6.6"], "/p/request");
        let request: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((request["remote"].as_str(), sent(&request, "x-forwarded-for")), (Some(client), vec![client]), "{request}");
        // With its port, which $host would leave out.
        assert_eq!(sent(&request, "host"), [format!("127.0.0.1:{port}")]);
        assert_eq!(sent(&request, "x-request-id")[0].len(), 32, "nginx's own: {request}");
    }
    drop(held);
    // That a client has gone shows when it is sent something.
    assert_eq!(server.get("/p/next?line=x").status, 200);
    wait_for("the listeners' places to come free", || (listen([127, 0, 0, 2]).1 == 200).then_some(()));
}

#[test]
fn nginx_as_simple_as_it_gets_serves() {
    serves_through(Kind::Nginx);
}

#[test]
fn nginx_that_keeps_its_connections_serves() {
    serves_through(Kind::NginxKeeping);
}

#[test]
fn caddy_serves() {
    serves_through(Kind::Caddy);
}

/// Through nginx, which fills the buffer of its client's connection and then reads nothing from the host until there is much room in it.
#[test]
fn a_steady_reader_behind_nginx_gets_its_whole_answer_however_slow_it_is() {
    let (site, socket) = site();
    let server = start(site.args(&["--write-timeout", "1s"]));
    let proxy = Proxy::start(Kind::Nginx, &socket);
    let address = proxy.url.strip_prefix("http://").unwrap().parse().unwrap();
    let bytes = 12_000_000;
    std::thread::scope(|scope| {
        for declared in [String::new(), format!("&declared={bytes}")] {
            scope.spawn(move || {
                let mut client = Client::connect(address);
                client.send(format!("GET /p/download?bytes={bytes}{declared} HTTP/1.0\r\nhost: test\r\n\r\n").as_bytes());
                assert_eq!(client.reply_head().status, 200);
                // About 4 KB a second, for many times as long as a client may read nothing.
                let (begin, mut taken) = (Instant::now(), 0);
                while begin.elapsed() < Duration::from_secs(10) {
                    taken += client.some(400).unwrap();
                    pause(Duration::from_millis(100));
                }
                assert_eq!(taken + client.all(bytes).len(), bytes, "{declared}");
            });
        }
    });
    assert_eq!(server.get("/p/x").text(), "GET /x of p");
}

#[test]
fn a_crowd_is_served_through_nginx_as_simple_as_it_gets() {
    serves_a_crowd_through(Kind::Nginx);
}

#[test]
fn a_crowd_is_served_through_nginx_that_keeps_its_connections() {
    serves_a_crowd_through(Kind::NginxKeeping);
}

#[test]
fn a_crowd_is_served_through_caddy() {
    serves_a_crowd_through(Kind::Caddy);
}
