//! An application that plays what its paths name, and the two in front of it: the host and nginx.

use super::wire::{Content, Head, Wire};
use crate::support::{Guarded, Server, Site, command, wait_for};
use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use tempfile::TempDir;

/// A request as the application has received it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) head: Head,
    pub(super) content: Content,
    /// The number of its connection.
    pub(super) connection: usize,
}

/// What the application does with a request of which it has read the head. True if the connection is kept.
pub(super) type Play = dyn Fn(&mut Wire, &Head) -> bool + Send + Sync;

/// The application: a thread for each connection.
pub(super) struct App {
    pub(super) socket: PathBuf,
    pub(super) port: u16,
    seen: Arc<Mutex<Vec<Seen>>>,
    ends: Arc<AtomicBool>,
    _dir: TempDir,
}

struct Shared {
    play: Box<Play>,
    seen: Arc<Mutex<Vec<Seen>>>,
    ends: Arc<AtomicBool>,
    connections: AtomicUsize,
}

impl App {
    /// Starts it. `play` gets each request, but for those whose path begins with `/ok`: these are read and answered with `ok` and the path.
    pub(super) fn start(play: impl Fn(&mut Wire, &Head) -> bool + Send + Sync + 'static) -> Self {
        let dir = tempfile::Builder::new().prefix("app").tempdir().unwrap();
        let socket = dir.path().join("app.sock");
        let (unix, tcp) = (UnixListener::bind(&socket).unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
        let (seen, ends) = (Arc::<Mutex<Vec<Seen>>>::default(), Arc::<AtomicBool>::default());
        let port = tcp.local_addr().unwrap().port();
        let (play, connections) = (Box::new(play), AtomicUsize::new(0));
        let shared = Arc::new(Shared { play, seen: Arc::clone(&seen), ends: Arc::clone(&ends), connections });
        let of_tcp = Arc::clone(&shared);
        std::thread::Builder::new()
            .spawn(move || unix.incoming().map_while(Result::ok).all(|stream| shared.take(Wire::new(stream))))
            .unwrap();
        std::thread::Builder::new()
            .spawn(move || tcp.incoming().map_while(Result::ok).all(|stream| of_tcp.take(Wire::new(stream))))
            .unwrap();
        Self { socket, port, seen, ends, _dir: dir }
    }

    /// The requests since the last call.
    pub(super) fn seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }
}

impl Drop for App {
    /// Ends its two threads; those of its connections end with the connections.
    fn drop(&mut self) {
        self.ends.store(true, Ordering::SeqCst);
        drop(UnixStream::connect(&self.socket));
        drop(TcpStream::connect(("127.0.0.1", self.port)));
    }
}

impl Shared {
    /// Serves a connection. False if it is the last.
    fn take(self: &Arc<Self>, mut wire: Wire) -> bool {
        let shared = Arc::clone(self);
        let connection = self.connections.fetch_add(1, Ordering::SeqCst);
        let serve = move || {
            while let Some(head) = wire.head() {
                // First, so that whoever has an answer finds its request.
                let at = {
                    let mut seen = shared.seen.lock().unwrap();
                    seen.push(Seen { head: head.clone(), content: Content::default(), connection });
                    seen.len() - 1
                };
                let note = |content: Content| {
                    if let Some(seen) = shared.seen.lock().unwrap().get_mut(at) {
                        seen.content = content;
                    }
                };
                if head.target().starts_with("/ok") {
                    note(wire.content(&head, true));
                    let text = format!("ok {}", head.target());
                    wire.send(format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{text}", text.len()).as_bytes());
                } else if head.target().starts_with("/read/") {
                    note(wire.content(&head, true));
                    if !(shared.play)(&mut wire, &head) {
                        return;
                    }
                } else if !(shared.play)(&mut wire, &head) {
                    return;
                }
            }
        };
        std::thread::Builder::new().spawn(serve).unwrap();
        !self.ends.load(Ordering::SeqCst)
    }
}

/// The host before an application that it is attached to, as `app.test` by its socket, and below `/port` by its port.
pub(super) fn host_before(app: &App, arguments: &[&str]) -> Server {
    let site = attach(attach(Site::new().args(arguments), "app", "host = [\"app.test\"]", &unix(app)), "port", "", &tcp(app));
    let server = site.start();
    server.wait_state("app", "ready");
    server.wait_state("port", "ready");
    server
}

fn unix(app: &App) -> String {
    format!("unix:{}", app.socket.display())
}

fn tcp(app: &App) -> String {
    format!("127.0.0.1:{}", app.port)
}

/// Writes the manifest of a plugin.
pub(super) fn manifest(site: Site, id: &str, top: &str, run: &str) -> Site {
    let directory = site.plugins().join(id);
    fs::create_dir_all(&directory).unwrap();
    let route = if top.contains("host") { String::new() } else { format!("route = \"/{id}\"\n") };
    fs::write(directory.join("plugrack.toml"), format!("id = \"{id}\"\n{route}{top}\n[run]\nkind = \"http\"\n{run}\n")).unwrap();
    site
}

/// A plugin that is attached to an address.
pub(super) fn attach(site: Site, id: &str, top: &str, address: &str) -> Site {
    manifest(site, id, top, &format!("listen = \"{address}\""))
}

/// nginx before an application.
pub(super) struct Nginx {
    dir: TempDir,
    _process: Guarded,
}

impl Nginx {
    /// Starts it. `buffering` is `on` or `off`, for requests and answers.
    pub(super) fn before(app: &App, buffering: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("nginx").tempdir().unwrap();
        let at = dir.path().display();
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .iter()
            .map(|kind| format!("{kind}_temp_path {at}/{kind};"))
            .collect();
        let config = format!(
            "daemon off; master_process off; pid {at}/pid; error_log {at}/error.log; events {{}}
            http {{ access_log off; {temporary} client_max_body_size 0; underscores_in_headers on;
            upstream app {{ server unix:{}; keepalive 8; }}
            proxy_http_version 1.1; proxy_set_header Connection ''; proxy_set_header Host $http_host;
            proxy_buffer_size 128k; proxy_buffers 8 128k; proxy_busy_buffers_size 256k;
            proxy_buffering {buffering}; proxy_request_buffering {buffering};
            server {{ listen unix:{at}/nginx.sock; location / {{ proxy_pass http://app; }} }} }}",
            app.socket.display()
        );
        fs::write(dir.path().join("nginx.conf"), config).unwrap();
        let program = ["/usr/sbin/nginx", "nginx"].into_iter().find(|name| !name.starts_with('/') || Path::new(name).exists());
        let mut nginx = command(program.unwrap());
        nginx.arg("-c").arg(dir.path().join("nginx.conf")).arg("-e").arg(dir.path().join("error.log")).arg("-p").arg(dir.path());
        let process = Guarded(nginx.spawn().expect("nginx is there: make test-tools"));
        wait_for("nginx to listen", || UnixStream::connect(dir.path().join("nginx.sock")).ok());
        Self { dir, _process: process }
    }

    pub(super) fn client(&self) -> Wire {
        Wire::new(UnixStream::connect(self.dir.path().join("nginx.sock")).unwrap())
    }
}

/// A client of the host.
pub(super) fn client(server: &Server) -> Wire {
    Wire::new(TcpStream::connect(server.address()).unwrap())
}

/// What a client has heard: interim answers, and the answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Heard {
    pub(super) interim: Vec<Head>,
    pub(super) head: Head,
    pub(super) content: Content,
}

impl Heard {
    pub(super) fn status(&self) -> u16 {
        self.head.status()
    }

    pub(super) fn text(&self) -> String {
        String::from_utf8_lossy(&self.content.bytes).into_owned()
    }
}

/// Reads an answer. None if the connection ends before.
#[track_caller]
pub(super) fn hear(wire: &mut Wire, method: &str) -> Option<Heard> {
    let mut interim = Vec::new();
    loop {
        let head = wire.head()?;
        if (100..200).contains(&head.status()) {
            interim.push(head);
            continue;
        }
        let bodiless = method == "HEAD" || matches!(head.status(), 204 | 304);
        let content = if bodiless { Content { complete: true, ..Content::default() } } else { wire.content(&head, false) };
        return Some(Heard { interim, head, content });
    }
}

/// Sends a request and reads its answer.
#[track_caller]
pub(super) fn ask(wire: &mut Wire, request: &[u8]) -> Heard {
    // A peer that has answered already may read no more.
    wire.send(request);
    let method = String::from_utf8_lossy(request).split(' ').next().unwrap().to_owned();
    hear(wire, &method)
        .unwrap_or_else(|| panic!("no answer to {:?}", String::from_utf8_lossy(&request[..request.len().min(100)])))
}

/// A request without a body.
pub(super) fn get(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nhost: app.test\r\n\r\n").into_bytes()
}
