//! Applications of the frameworks that people use, and whole applications by others, by the manifests of docs/apps.md.

use crate::bridges::packages;
use crate::docs::{blocks_in, section_block};
use crate::support::http::{Client, Reply};
use crate::support::{Server, Site, command, copy_dir, python, root, wait_for};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

/// Bytes of an upload.
const UPLOAD: usize = 3 << 20;

/// Most lines of a manifest.
const MOST_LINES: usize = 15;

/// A value that a test gives to `key = "VALUE"` of a manifest.
fn value_of<'a>(manifest: &'a str, key: &str) -> &'a str {
    let line = manifest.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(" = \"")).unwrap();
    line.strip_suffix('"').unwrap()
}

/// An application by a manifest of the page, once at its route and once at a host name.
struct Rack {
    server: Server,
    id: String,
    route: String,
    keeps_route: bool,
}

/// One of the two.
struct App<'a> {
    server: &'a Server,
    id: String,
    host: String,
    /// The route, or nothing.
    base: String,
    keeps_route: bool,
}

impl Rack {
    /// Starts the application of a section of the page. `install` puts its files into a directory.
    fn start(section: &str, install: impl Fn(&Path)) -> Self {
        let manifest = section_block("docs/apps.md", section, "toml");
        assert!(manifest.lines().count() <= MOST_LINES, "{manifest}");
        let [id, route] = ["id", "route"].map(|key| value_of(&manifest, key).to_owned());
        let site = Site::new();
        let own = format!("{id}-own");
        let own_manifest = manifest
            .replace(&format!("id = \"{id}\""), &format!("id = \"{own}\""))
            .replace(&format!("route = \"{route}\""), &format!("host = [\"{own}.localhost.example\"]"));
        for (id, manifest) in [(&id, &manifest), (&own, &own_manifest)] {
            let dir = site.plugins().join(id);
            fs::create_dir(&dir).unwrap();
            install(&dir);
            fs::write(dir.join("plugrack.toml"), manifest).unwrap();
        }
        let server = site.env("PATH", &path()).args(&["--start-timeout", "60s"]).start();
        server.wait_state(&id, "ready");
        server.wait_state(&own, "ready");
        let keeps_route = manifest.contains("prefix = \"keep\"");
        Self { server, id, route, keeps_route }
    }

    /// Below its route, and with an origin of its own.
    fn both(&self) -> [App<'_>; 2] {
        let app = |id: &str, host: &str, base: &str| App {
            server: &self.server,
            id: id.to_owned(),
            host: host.to_owned(),
            base: base.to_owned(),
            keeps_route: self.keeps_route,
        };
        let own = format!("{}-own", self.id);
        [app(&self.id, "localhost", &self.route), app(&own, &format!("{own}.localhost.example"), "")]
    }

    /// What every application must go through: `path` is answered with 200 all the time while it is updated and restarted, its log has a
    /// line, and when it is stopped nothing is left of it.
    fn lives(&self, path: &str, logged: Option<&str>) {
        let [app, own] = self.both();
        if let Some(line) = logged {
            self.server.wait_logged(&app.id, &[line]);
            assert!(self.server.cli(&["logs", &app.id]).contains(line));
        }
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let ask = || {
                let mut client = self.server.client();
                let mut replies = 0;
                while !done.load(Ordering::SeqCst) {
                    let reply = app.send(&mut client, "GET", path, &[], b"");
                    // A start that takes longer than a request is held is the machine's doing.
                    let held = reply.status == 503 && reply.header("retry-after").is_some();
                    assert!(reply.status == 200 || held, "{reply:?}");
                    replies += u32::from(!held);
                }
                replies
            };
            let asking = [scope.spawn(ask), scope.spawn(ask)];
            let end = SetAtEnd(&done);
            self.update(&app);
            if logged.is_some() {
                let pid = self.server.plugin(&app.id)["process"]["pid"].as_i64().unwrap();
                self.server.cli(&["restart", &app.id]);
                self.server.wait_restarted(&app.id, pid);
            }
            assert_eq!(app.get(path).status, 200);
            drop(end);
            for asking in asking {
                assert!(asking.join().unwrap() > 0);
            }
        });
        assert_eq!(self.server.plugin(&app.id)["process"]["failed"], 0);
        self.has_fine_links(&app.id);
        let local = App {
            host: format!("{}.localhost", self.id),
            base: String::new(),
            id: self.id.clone(),
            server: &self.server,
            keeps_route: false,
        };
        assert!(self.keeps_route || local.get(path).status == 200, "{}", local.host);
        for app in [app, own] {
            assert_eq!(processes(self.server.site(), &app.id).is_empty(), logged.is_none());
            self.server.cli(&["stop", &app.id]);
            assert_eq!(processes(self.server.site(), &app.id), Vec::<String>::new());
            assert_eq!(app.get(path).status, 503);
        }
    }

    /// The check of its first page finds nothing.
    #[track_caller]
    fn has_fine_links(&self, id: &str) {
        let shown: Value = serde_json::from_str(&self.server.cli(&["show", id, "--json"])).unwrap();
        assert_eq!(shown["first_page"]["result"], "fine", "{:#}", shown["first_page"]);
    }

    /// Another version takes the place of the first while requests arrive, and none of them is held.
    fn update(&self, app: &App<'_>) {
        let file = self.server.site().plugins().join(&app.id).join("plugrack.toml");
        let manifest = fs::read_to_string(&file).unwrap();
        fs::write(&file, format!("version = \"2.0\"\n{manifest}")).unwrap();
        self.server.cli(&["rescan"]);
        wait_for("the new version", || (self.server.plugin(&app.id)["version"] == "2.0").then_some(()));
        self.server.wait_state(&app.id, "ready");
    }
}

impl App<'_> {
    /// One request to a path below the application's base.
    #[track_caller]
    fn send(&self, client: &mut Client, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
        let mut head = format!("{method} {}{path} HTTP/1.1\r\nhost: {}\r\n", self.base, self.host);
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        if !body.is_empty() {
            head.push_str(&format!("content-length: {}\r\n", body.len()));
        }
        client.send(&[head.as_bytes(), b"\r\n", body].concat());
        client.reply(method == "HEAD")
    }

    #[track_caller]
    fn request(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
        self.send(&mut self.server.client(), method, path, headers, body)
    }

    #[track_caller]
    fn get(&self, path: &str) -> Reply {
        self.request("GET", path, &[], b"")
    }

    #[track_caller]
    fn post_form(&self, path: &str, cookies: &str, form: &str) -> Reply {
        let headers = [("content-type", "application/x-www-form-urlencoded"), ("cookie", cookies)];
        self.request("POST", path, &headers, form.as_bytes())
    }

    /// The path behind the base of a reference that the application or the host has made.
    #[track_caller]
    fn path_of<'r>(&self, reference: &'r str) -> &'r str {
        let origin = format!("http://{}", self.host);
        let path = reference.strip_prefix(&origin).unwrap_or(reference);
        path.strip_prefix(&self.base).filter(|path| path.starts_with('/')).unwrap_or_else(|| panic!("{reference} leads out"))
    }

    /// The cookie of a name that an answer sets, as the browser sends it back; its path is the base.
    #[track_caller]
    fn cookie(&self, reply: &Reply, name: &str) -> String {
        let cookies = reply.all("set-cookie");
        let cookie = cookies.iter().find(|cookie| cookie.starts_with(&format!("{name}=")));
        let cookie = cookie.unwrap_or_else(|| panic!("no {name}: {reply:?}"));
        let path = cookie.split("; ").find_map(|part| part.to_ascii_lowercase().strip_prefix("path=").map(str::to_owned));
        let path = path.unwrap();
        assert_eq!(path.trim_end_matches('/'), self.base, "{cookie}");
        cookie.split(';').next().unwrap().to_owned()
    }

    /// What the small applications of the fixtures do: a page with a form, which leads to another page by a redirect and a cookie; an upload.
    fn converses(&self) {
        if !self.base.is_empty() {
            let bare = self.get("");
            // Where the application sees the whole path, the bare route is its own.
            if !(self.keeps_route && bare.status == 200) {
                assert_eq!((bare.status, self.path_of(bare.header("location").unwrap())), (308, "/"));
            }
        }
        let first = self.get("/");
        assert_eq!(first.status, 200, "{first:?}");
        let action = text_between(first.text(), "action=\"", "\"");
        // A browser takes a relative reference by the page's own path, which ends with a slash.
        let action = if action.starts_with('/') { self.path_of(action).to_owned() } else { format!("/{action}") };
        let sent = self.post_form(&action, "other=1", "name=Ada");
        assert_eq!(sent.status, 303, "{sent:?}");
        let cookie = self.cookie(&sent, "name");
        let thanks = self.request("GET", self.path_of(sent.header("location").unwrap()), &[("cookie", &cookie)], b"");
        assert_eq!((thanks.status, thanks.text()), (200, "Thanks, Ada"), "{thanks:?}");
        let uploaded = self.request("POST", "/upload", &[("content-type", "application/octet-stream")], &vec![b'x'; UPLOAD]);
        assert_eq!((uploaded.status, uploaded.text()), (200, UPLOAD.to_string().as_str()));
        let missing = self.request("HEAD", "/nowhere", &[], b"");
        assert!([200, 404].contains(&missing.status), "{missing:?}");
    }
}

/// Sets a flag when it is dropped, also by a failure.
struct SetAtEnd<'a>(&'a AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// The text between two others.
#[track_caller]
fn text_between<'t>(text: &'t str, before: &str, after: &str) -> &'t str {
    let rest = text.split_once(before).unwrap_or_else(|| panic!("no {before} in {text}")).1;
    rest.split_once(after).unwrap().0
}

/// The `PATH` of plugins, with the packages from PyPI and npm.
fn path() -> String {
    let [python, node] = ["python/bin", "node/node_modules/.bin"].map(|dir| packages().join(dir).display().to_string());
    format!("{python}:{node}:{}", std::env::var("PATH").unwrap())
}

/// Fails with what to do if a program that comes from Debian is missing.
#[track_caller]
fn needs(program: &str) {
    let found = std::env::split_paths(&path()).any(|dir| dir.join(program).is_file());
    assert!(found, "there is no {program}: `make test-tools` installs what tests run");
}

/// Runs a command that prepares an application, in its directory.
#[track_caller]
fn prepare(dir: &Path, program: &str, arguments: &[&str], env: &[(&str, &str)]) {
    let mut prepare = command(program);
    prepare.args(arguments).current_dir(dir).env("PATH", path()).envs(env.iter().copied());
    let output = prepare.output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Copies an application of the fixtures.
fn fixture(name: &str) -> impl Fn(&Path) {
    let from = root().join("tests/fixtures/apps").join(name);
    move |dir| copy_dir(&from.join("."), dir)
}

/// The command lines of a plugin's processes.
fn processes(site: &Site, id: &str) -> Vec<String> {
    let of_plugin = format!("\0PLUGRACK_PLUGIN_ID={id}\0");
    let of_site = site.data().to_str().unwrap();
    let is_one = |dir: &PathBuf| {
        fs::read(dir.join("environ")).is_ok_and(|environment| {
            let environment = format!("\0{}", String::from_utf8_lossy(&environment));
            environment.contains(&of_plugin) && environment.contains(of_site)
        })
    };
    let dirs = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path()).filter(is_one);
    dirs.map(|dir| fs::read_to_string(dir.join("cmdline")).unwrap_or_default()).collect()
}

#[test]
fn flask_runs_under_gunicorn_by_its_socket_and_by_a_descriptor() {
    for section in ["Flask under gunicorn", "Flask under gunicorn, with a socket of the host"] {
        let rack = Rack::start(section, fixture("flask"));
        rack.both().iter().for_each(App::converses);
        rack.lives("/", Some("the application is loaded"));
    }
}

#[test]
fn fastapi_runs_under_uvicorn_and_its_documentation_finds_its_description() {
    let rack = Rack::start("FastAPI under uvicorn", fixture("fastapi"));
    for app in rack.both() {
        app.converses();
        let docs = app.get("/docs");
        let description = app.get(app.path_of(text_between(docs.text(), "url: '", "'"))).json();
        assert!(description["paths"]["/upload"]["post"].is_object(), "{description:#}");
        let server = description["servers"][0]["url"].as_str().unwrap_or_default();
        assert_eq!(server, app.base);
    }
    rack.lives("/", Some("the application is loaded"));
}

#[test]
fn starlette_sends_events_one_by_one() {
    let rack = Rack::start("Starlette with server-sent events", fixture("starlette"));
    for app in rack.both() {
        app.converses();
        let mut client = rack.server.client();
        client.send(format!("GET {}/events HTTP/1.1\r\nhost: {}\r\n\r\n", app.base, app.host).as_bytes());
        let head = client.reply_head();
        assert!(head.header("content-type").is_some_and(|kind| kind.starts_with("text/event-stream")), "{head:?}");
        for number in 0..3 {
            assert_eq!(client.body_piece(&head).unwrap(), format!("data: {number}\n\n").as_bytes());
        }
        drop(client);
        rack.server.wait_logged(&app.id, &["the listener has left"]);
    }
    rack.lives("/", Some("the application is loaded"));
}

#[test]
fn express_runs_on_a_port() {
    needs("node");
    let install = fixture("express");
    let rack = Rack::start("Express", |dir| {
        install(dir);
        symlink(packages().join("node/node_modules"), dir.join("node_modules")).unwrap();
    });
    rack.both().iter().for_each(App::converses);
    rack.lives("/", Some("the application is loaded"));
}

#[test]
fn a_program_in_go_runs_on_a_port() {
    needs("go");
    let install = fixture("go");
    // The standard library is compiled once.
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("go-cache");
    let env = [("GOCACHE", cache.to_str().unwrap()), ("CGO_ENABLED", "0"), ("GO111MODULE", "off"), ("GOPATH", "/nonexistent")];
    let rack = Rack::start("Go's net/http", |dir| {
        install(dir);
        prepare(dir, "go", &["build", "-o", "server", "main.go"], &env);
    });
    rack.both().iter().for_each(App::converses);
    rack.lives("/", Some("the application is loaded"));
}

#[test]
fn sinatra_runs_under_puma() {
    needs("puma");
    let rack = Rack::start("Sinatra under puma", fixture("sinatra"));
    rack.both().iter().for_each(App::converses);
    rack.lives("/", Some("the application is loaded"));
}

#[test]
fn a_site_of_mkdocs_is_served_without_a_process() {
    let install = fixture("mkdocs");
    let rack = Rack::start("MkDocs", |dir| {
        install(dir);
        prepare(dir, "mkdocs", &["build", "--quiet"], &[]);
    });
    for app in rack.both() {
        let first = app.get("/");
        assert!(first.text().contains("<h1 id=\"welcome\">Welcome</h1>"), "{first:?}");
        assert!(first.text().contains("href=\"second/\""));
        let style = app.get(&format!("/css{}", text_between(first.text(), "<link href=\"css", "\"")));
        assert!(style.header("content-type").is_some_and(|kind| kind.starts_with("text/css")), "{style:?}");
        let redirect = app.get("/second");
        assert_eq!((redirect.status, app.path_of(redirect.header("location").unwrap())), (308, "/second/"));
        assert!(app.get("/second/").text().contains("The second page"));
        let missing = app.get("/nowhere");
        assert_eq!(missing.status, 404);
        assert!(missing.text().contains("Page not found"), "the generator's own page");
        assert_eq!(app.request("POST", "/", &[], b"x").status, 405);
    }
    rack.lives("/", None);
}

#[test]
fn djangos_admin_has_its_styles_and_lets_people_log_in() {
    let account = [
        ("DJANGO_SUPERUSER_USERNAME", "ada"),
        ("DJANGO_SUPERUSER_PASSWORD", "enchantress"),
        ("DJANGO_SUPERUSER_EMAIL", "ada@example.org"),
    ];
    let rack = Rack::start("Django under gunicorn", |dir| {
        prepare(dir, "django-admin", &["startproject", "mysite", "."], &[]);
        let settings = dir.join("mysite/settings.py");
        let text = fs::read_to_string(&settings).unwrap();
        let security = "    'django.middleware.security.SecurityMiddleware',\n";
        let with_static = format!("{security}    'whitenoise.middleware.WhiteNoiseMiddleware',\n");
        let text = text.replacen(security, &with_static, 1);
        let text = text.replacen("ALLOWED_HOSTS = []", "ALLOWED_HOSTS = ['localhost', '127.0.0.1', '.localhost.example']", 1);
        let prefix =
            "import os\nFORCE_SCRIPT_NAME = os.environ.get('SCRIPT_NAME', '')\nSTATIC_URL = FORCE_SCRIPT_NAME + '/static/'\n";
        fs::write(settings, format!("{text}\n{prefix}")).unwrap();
        prepare(dir, "python", &["manage.py", "migrate", "--verbosity", "0"], &[]);
        prepare(dir, "python", &["manage.py", "createsuperuser", "--noinput"], &account);
    });
    for app in rack.both() {
        assert!(app.get("/").text().contains("The install worked successfully!"));
        let to_login = app.get("/admin/");
        assert_eq!(to_login.status, 302);
        let login = app.path_of(to_login.header("location").unwrap());
        let page = app.get(login);
        let style = app.get(app.path_of(text_between(page.text(), "rel=\"stylesheet\" href=\"", "\"")));
        assert_eq!(style.status, 200);
        assert!(style.header("content-type").is_some_and(|kind| kind.starts_with("text/css")), "{style:?}");
        let csrf = app.cookie(&page, "csrftoken");
        let token = text_between(page.text(), "name=\"csrfmiddlewaretoken\" value=\"", "\"");
        let fields = [
            ("csrfmiddlewaretoken", token),
            ("username", "ada"),
            ("password", "enchantress"),
            ("file\"; filename=\"large", &"x".repeat(UPLOAD)),
        ];
        let mut form = String::new();
        for (name, value) in fields {
            form.push_str(&format!("--line\r\ncontent-disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n"));
        }
        form.push_str("--line--\r\n");
        let headers = |cookie| [("content-type", "multipart/form-data; boundary=line"), ("cookie", cookie)];
        assert_eq!(app.request("POST", login, &headers("none=1"), form.as_bytes()).status, 403, "without the cookie");
        let logged_in = app.request("POST", login, &headers(&csrf), form.as_bytes());
        assert_eq!(logged_in.status, 302, "{logged_in:?}");
        assert_eq!(app.path_of(logged_in.header("location").unwrap()), "/admin/");
        let session = app.cookie(&logged_in, "sessionid");
        let admin = app.request("GET", "/admin/", &[("cookie", &session)], b"");
        assert!(admin.text().contains("Site administration"), "{admin:?}");
    }
    rack.lives("/", Some("Listening at: unix:"));
}

#[test]
fn datasette_shows_a_database() {
    let rack = Rack::start("Datasette", |dir| {
        let create = "import sqlite3\n\
            with sqlite3.connect('books.db') as db:\n\
            \tdb.execute('create table books (title text, pages integer)')\n\
            \tdb.executemany('insert into books values (?, ?)', [('x' * 1000, n) for n in range(3000)])\n";
        prepare(dir, python(), &["-c", create], &[]);
    });
    for app in rack.both() {
        let first = app.get("/");
        let heading = text_between(first.text(), "<h2", "</h2>");
        let database = app.path_of(text_between(heading, "href=\"", "\""));
        assert_eq!(database, "/books");
        let page = app.get("/books/books");
        let style = app.get(app.path_of(text_between(page.text(), "rel=\"stylesheet\" href=\"", "\"")));
        assert_eq!(style.status, 200);
        let csv = app.get("/books/books.csv?_stream=on&_size=max");
        assert_eq!(csv.text().lines().count(), 3001);
        assert!(csv.body.len() > UPLOAD - (1 << 20));
        assert_eq!(app.get("/books/books.json?pages=7&_shape=array").json()[0]["pages"], 7);
    }
    rack.lives("/books/books", Some("Uvicorn running on"));
}

#[test]
fn radicale_keeps_calendars() {
    let rack = Rack::start("Radicale", |_| {});
    for app in rack.both() {
        let first = app.get("/");
        assert_eq!(first.status, 302);
        let web = app.path_of(first.header("location").unwrap());
        assert_eq!(web, "/.web");
        let auth = ("authorization", "Basic YWRhOng=");
        assert_eq!(app.request("MKCALENDAR", "/ada/work/", &[auth], b"").status, 201);
        let description = "x".repeat(UPLOAD);
        let event = format!(
            "BEGIN:VCALENDAR\r\nVERSION:2.0\r\nPRODID:-//test//EN\r\nBEGIN:VEVENT\r\nUID:one\r\nDTSTAMP:20260101T000000Z\r\n\
            DTSTART:20260102T000000Z\r\nSUMMARY:Meeting\r\nDESCRIPTION:{description}\r\nEND:VEVENT\r\nEND:VCALENDAR\r\n"
        );
        let put = app.request("PUT", "/ada/work/one.ics", &[auth, ("content-type", "text/calendar")], event.as_bytes());
        assert_eq!(put.status, 201, "{put:?}");
        let got = app.request("GET", "/ada/work/one.ics", &[auth], b"");
        assert!(got.text().contains("SUMMARY:Meeting") && got.body.len() > UPLOAD);
        let listed = app.request("PROPFIND", "/ada/work/", &[auth, ("depth", "1")], b"");
        assert_eq!(listed.status, 207);
        assert!(listed.text().contains(&format!("<href>{}/ada/work/one.ics</href>", app.base)), "{}", listed.text());
    }
    rack.lives("/.web/", Some("Listening on"));
}

/// A flow that answers `/hello`, tells the editor of it, redirects from `/go` with a cookie, and counts the bytes of `/upload`.
fn flow() -> Value {
    // Without a place in the editor, a node is one of settings.
    let node = |id: &str, kind: &str, more: Value, to: &[&str]| {
        let mut node = json!({"id": id, "type": kind, "z": "tab", "x": 100, "y": 100, "wires": [to]});
        let Value::Object(more) = more else { panic!("{more}") };
        node.as_object_mut().unwrap().extend(more);
        node
    };
    let http_in = |id: &str, method: &str, to: &str| {
        node(id, "http in", json!({"url": format!("/{id}"), "method": method, "upload": false}), &[to])
    };
    let function = |id: &str, code: &str, to: &[&str]| {
        node(id, "function", json!({"func": format!("{code}; return msg"), "outputs": 1}), to)
    };
    json!([
        {"id": "tab", "type": "tab", "label": "Flow"},
        http_in("hello", "get", "greet"),
        function("greet", "msg.payload = 'Hello from the flow'", &["answer", "tell"]),
        http_in("go", "get", "redirect"),
        function("redirect", "msg.statusCode = 303; msg.headers = {location: '/hello'}; msg.cookies = {name: 'Ada'}", &["answer"]),
        http_in("upload", "post", "count"),
        function("count", "msg.payload = String(msg.payload.length)", &["answer"]),
        node("answer", "http response", json!({}), &[]),
        node("tell", "debug", json!({"active": true, "tosidebar": true, "complete": "payload"}), &[]),
    ])
}

#[test]
fn node_red_deploys_a_flow_and_its_editor_hears_of_it() {
    needs("node");
    let rack = Rack::start("Node-RED", |_| {});
    for app in rack.both() {
        let editor = app.get("/");
        let style = text_between(editor.text(), "href=\"red/style", "\"");
        assert_eq!(app.get(&format!("/red/style{style}")).status, 200);
        let flow = flow().to_string();
        let deployed = app.request("POST", "/flows", &[("content-type", "application/json")], flow.as_bytes());
        assert_eq!(deployed.status, 204, "{deployed:?}");
        // The answer to a deployment comes before its nodes have started.
        wait_for("the flow", || (app.get("/hello").text() == "Hello from the flow").then_some(()));
        let go = app.get("/go");
        assert_eq!((go.status, app.path_of(go.header("location").unwrap())), (303, "/hello"));
        assert_eq!(app.cookie(&go, "name"), "name=Ada");
        let uploaded = app.request("POST", "/upload", &[("content-type", "application/octet-stream")], &vec![b'x'; UPLOAD]);
        assert_eq!(uploaded.text(), UPLOAD.to_string());
        // The socket of the editor, by a client that is not ours.
        let mut client = command(packages().join("python/bin/python3"));
        let address = rack.server.address().to_string();
        client.arg(root().join("tests/fixtures/node_red_client.py")).args([&app.host, &app.base, &address]);
        let output = client.output().unwrap();
        let [out, err] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned());
        assert!(output.status.success() && out == "all is well\n", "{out}{err}");
    }
    rack.lives("/settings", Some("Server now running at"));
}

#[test]
fn dokuwiki_lets_people_log_in_edit_a_page_and_upload_a_file() {
    needs("php-cgi");
    let from = Path::new("/usr/share/dokuwiki");
    assert!(from.is_dir(), "there is no {}: `make test-tools` installs what tests run", from.display());
    let rack = Rack::start("DokuWiki", |dir| {
        // As its own archive has it: the package keeps parts of it elsewhere, one of which only root can read.
        let program = dir.join("dokuwiki");
        fs::create_dir(&program).unwrap();
        let copy =
            "tar -C /usr/share/dokuwiki -ch --exclude=./lib/plugins/testing --exclude=./bin --exclude=./install.php . | tar -x";
        prepare(&program, "sh", &["-c", copy], &[]);
        let blocks: Vec<String> = blocks_in("docs/apps.md", "php");
        let block = |part: &str| blocks.iter().find(|block| block.contains(part)).unwrap();
        fs::write(program.join("inc/preload.php"), block("DOKU_CONF")).unwrap();
        let (plugins, id) = (dir.parent().unwrap(), dir.file_name().unwrap());
        let own = plugins.parent().unwrap().join("plugin-data").join(id);
        for parts in ["attic", "cache", "index", "locks", "log", "media", "media_attic", "media_meta", "meta", "pages", "tmp"] {
            fs::create_dir_all(own.join("data").join(parts)).unwrap();
        }
        let conf = own.join("conf");
        fs::create_dir(&conf).unwrap();
        for file in fs::read_dir("/etc/dokuwiki").unwrap().map(|entry| entry.unwrap().path()) {
            let name = file.file_name().unwrap();
            // The others are what the administrator of the machine has set.
            if file.extension().is_some_and(|extension| extension == "conf" || extension == "php") && !is_local(&file) {
                fs::copy(&file, conf.join(name)).unwrap();
            }
        }
        let account = format!("{}\n$conf['useacl'] = 1;\n", block("savedir"));
        fs::write(conf.join("local.protected.php"), account).unwrap();
        fs::write(conf.join("acl.auth.php"), "* @ALL 1\n* @user 8\n").unwrap();
        // The MD5 of the password.
        fs::write(conf.join("users.auth.php"), "ada:cf17fb8e2ae2ab9eea4b85d2dd490361:Ada:ada@example.org:user\n").unwrap();
    });
    for app in rack.both() {
        let start = app.get("/");
        assert_eq!((start.status, app.path_of(start.header("location").unwrap())), (302, "/doku.php?id=start"));
        let page = app.get("/doku.php?id=start");
        let style = text_between(page.text(), "rel=\"stylesheet\" href=\"", "\"").replace("&amp;", "&");
        let style = app.get(app.path_of(&style));
        assert!(style.header("content-type").is_some_and(|kind| kind.starts_with("text/css")), "{style:?}");
        let edit = "/doku.php?id=start&do=edit";
        assert!(!app.get(edit).text().contains("name=\"wikitext\" class=\"edit\" cols"), "only for those who have logged in");
        let session = app.cookie(&app.get("/doku.php?id=start"), "DokuWiki");
        let form = "do=login&id=start&u=ada&p=enchantress&sectok=";
        let logged_in = app.post_form("/doku.php?id=start", &session, form);
        assert_eq!(logged_in.status, 302, "{logged_in:?}");
        let name =
            logged_in.all("set-cookie").iter().find_map(|cookie| cookie.split('=').next().filter(|name| name.starts_with("DW")));
        let cookies = format!("{session}; {}", app.cookie(&logged_in, name.unwrap()));
        let editor = app.request("GET", edit, &[("cookie", &cookies)], b"");
        let token = text_between(editor.text(), "name=\"sectok\" value=\"", "\"");
        let form = format!("wikitext=Written by Ada&sectok={token}&id=start&rev=0&prefix=.&suffix=&do[save]=1&summary=first");
        let saved = app.post_form("/doku.php?id=start", &cookies, &form.replace(' ', "+"));
        assert_eq!((saved.status, app.path_of(saved.header("location").unwrap())), (302, "/doku.php?id=start"));
        assert!(app.get("/doku.php?id=start").text().contains("Written by Ada"));
        let upload = format!("/lib/exe/ajax.php?call=mediaupload&qqfile=large.zip&mediaid=large.zip&ns=&sectok={token}");
        let headers = [("cookie", cookies.as_str()), ("content-type", "application/octet-stream")];
        let uploaded = app.request("POST", &upload, &headers, &vec![b'x'; UPLOAD]);
        assert_eq!(uploaded.json()["success"], true, "{uploaded:?}");
        assert_eq!(app.get("/lib/exe/fetch.php?media=large.zip").body.len(), UPLOAD);
        // Pages and accounts are no files of the site.
        for path in ["/data/pages/start.txt", "/conf/users.auth.php"] {
            assert_eq!(app.get(path).status, 302, "{path}");
        }
    }
    rack.lives("/doku.php?id=start", Some("plugrack: starting"));
}

/// Whether a file of DokuWiki's settings is one that an installation makes.
fn is_local(file: &Path) -> bool {
    let name = file.file_name().unwrap().to_str().unwrap();
    ["local", "acl.auth", "users.auth", "apache", "lighttpd", "preload"].iter().any(|start| name.starts_with(start))
}

#[test]
fn cgit_shows_a_repository_and_lets_people_clone_it() {
    needs("git");
    assert!(Path::new("/usr/lib/cgit/cgit.cgi").is_file(), "there is no cgit: `make test-tools` installs what tests run");
    let rack = Rack::start("cgit", |dir| {
        fs::write(dir.join("cgitrc"), section_block("docs/apps.md", "cgit", "ini")).unwrap();
        let (plugins, id) = (dir.parent().unwrap(), dir.file_name().unwrap());
        let files = blocks_in("docs/apps.md", "toml").into_iter().find(|block| block.contains("id = \"cgit-files\"")).unwrap();
        fs::create_dir_all(plugins.join("cgit-files")).unwrap();
        fs::write(plugins.join("cgit-files/plugrack.toml"), files).unwrap();
        let repositories = plugins.parent().unwrap().join("plugin-data").join(id).join("repositories");
        fs::create_dir_all(&repositories).unwrap();
        let make = "git init -q -b main work && cd work && echo 'all the notes' > README && git add README &&\
            git -c user.name=Ada -c user.email=ada@example.org commit -q -m 'The first notes' && git clone -q --bare . ../notes.git";
        prepare(&repositories, "sh", &["-c", make], &[]);
        fs::remove_dir_all(repositories.join("work")).unwrap();
    });
    rack.server.wait_state("cgit-files", "ready");
    for app in rack.both() {
        let list = app.get("/");
        let repository = app.path_of(text_between(list.text(), "toplevel-repo'><a href='", "'"));
        assert_eq!(repository, "/notes.git/");
        let commit = app.get("/notes.git/commit/");
        assert!(commit.text().contains("The first notes"), "{commit:?}");
        let file = app.get(app.path_of(text_between(commit.text(), "<td class='add'><a href='", "'")));
        assert!(file.status == 200, "{file:?}");
        assert!(app.get("/notes.git/plain/README").text().contains("all the notes"));
        if !app.base.is_empty() {
            let style = rack.server.get(text_between(list.text(), "rel='stylesheet' type='text/css' href='", "'"));
            assert!(style.header("content-type").is_some_and(|kind| kind.starts_with("text/css")), "{style:?}");
        }
        let copy = rack.server.site().data().join(format!("copy-of-{}", app.id));
        let url = format!("http://{}{}/notes.git", rack.server.address(), app.base);
        let host = format!("http.extraHeader=Host: {}", app.host);
        prepare(rack.server.site().data(), "git", &["-c", &host, "clone", "-q", &url, copy.to_str().unwrap()], &[]);
        assert_eq!(fs::read_to_string(copy.join("README")).unwrap(), "all the notes\n");
    }
    rack.lives("/notes.git/log/", None);
}
