use super::files::{MAX_FILES, MAX_NAMES};
use super::python::{Interface, find_application};
use super::*;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::{Value, json};
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use tempfile::TempDir;

/// A directory with files by path and text. Those whose text begins with `#!` or that lie in a `bin` are programs.
fn directory(files: &[(&str, &str)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let path = dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        let is_program = text.starts_with("#!") || path.parent().unwrap().ends_with("bin");
        fs::set_permissions(&path, Permissions::from_mode(if is_program { 0o755 } else { 0o644 })).unwrap();
    }
    dir
}

fn detection(files: &[(&str, &str)]) -> Detection {
    detect(directory(files).path(), "My Wiki").unwrap()
}

/// The first proposal: the kind of application, the table `run`, and the hints in one text.
#[track_caller]
fn first(files: &[(&str, &str)]) -> (&'static str, Value, String) {
    let detection = detection(files);
    let draft = detection.found.first().unwrap();
    assert_toml(draft);
    (draft.application, draft.json()["manifest"]["run"].clone(), draft.hints.join("\n"))
}

/// The TOML is what the JSON is.
#[track_caller]
fn assert_toml(draft: &Draft) {
    let text = draft.toml();
    let parsed: toml::Table = toml::from_str(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    assert_eq!(serde_json::to_value(parsed).unwrap(), draft.json()["manifest"], "{text}");
    // A hint says that braces in a command are none of the manifest's.
    if !draft.hints.iter().any(|hint| hint.contains("braces")) {
        let read = manifest::parse(&text, Path::new("/srv/plugins/x"));
        assert!(read.is_ok(), "{}\n{text}", read.unwrap_err());
    }
}

fn applications(detection: &Detection) -> Vec<&'static str> {
    detection.found.iter().map(|draft| draft.application).collect()
}

const FLASK: &str = "from flask import Flask\n\n# app = FastAPI()\napp = Flask(__name__)\n";

#[test]
fn a_flask_application_is_served_by_gunicorn_with_a_comment_for_each_guess() {
    let detection = detection(&[("app.py", FLASK)]);
    assert_eq!(
        detection.found[0].toml(),
        r#"# Proposed by plugrack detect for Flask: app.py has the line app = Flask(__name__)
id = "my-wiki"      # from the name of the directory
name = "My Wiki"    # the name of the directory
version = "0.1.0"   # no file names a version
icon = "📦"          # any emoji
route = "/my-wiki"  # from the id; or, for an origin of its own: host = ["NAME.example.org"]

[run]
kind = "http"
command = ["gunicorn", "--bind", "unix:{socket}", "app:app"]  # app:app is the application; gunicorn from the PATH
listen = "socket"                  # gunicorn makes the socket
env = { SCRIPT_NAME = "{route}" }  # gunicorn takes the prefix from SCRIPT_NAME and expects it in the path
prefix = "keep"                    # as SCRIPT_NAME needs it; with another server than gunicorn: "strip", without SCRIPT_NAME
"#
    );
    assert_eq!((detection.already, detection.found.len(), detection.notes.len()), (None, 1, 0));
    let hints = &detection.found[0].hints;
    assert!(hints[0].contains("python3 -m venv .venv && .venv/bin/pip install gunicorn"), "{hints:?}");
    assert!(hints[1].contains("--threads N"), "{hints:?}");
}

#[test]
fn a_server_of_a_virtualenv_is_preferred_and_one_that_it_lacks_is_a_hint() {
    let (_, run, hints) = first(&[("app.py", FLASK), (".venv/bin/gunicorn", "#!python3")]);
    assert_eq!(run["command"], json!([".venv/bin/gunicorn", "--bind", "unix:{socket}", "app:app"]));
    assert!(!hints.contains("pip install"), "{hints}");
    let (_, run, hints) = first(&[("app.py", FLASK), ("venv/bin/python", ""), ("requirements.txt", "flask\n")]);
    assert_eq!(run["command"][0], "gunicorn");
    assert!(hints.contains("venv/bin/pip install -r requirements.txt gunicorn"), "{hints}");
}

#[test]
fn asgi_applications_are_served_by_uvicorn() {
    let (application, run, _) = first(&[("main.py", "from fastapi import FastAPI\napp: FastAPI = FastAPI(title='x')\n")]);
    assert_eq!(application, "FastAPI");
    assert_eq!(run["command"], json!(["uvicorn", "--uds", "{socket}", "--root-path", "{route}", "main:app"]));
    assert_eq!((&run["listen"], &run["prefix"]), (&json!("socket"), &json!("strip")));
    let (application, run, _) = first(&[("app/main.py", "import starlette.applications as s\nweb = s.Starlette()\n")]);
    assert_eq!((application, &run["command"][5]), ("Starlette", &json!("app.main:web")));
}

#[test]
fn an_application_is_found_in_the_text_of_a_module() {
    use Interface::{Asgi, Wsgi};
    for (module, text, expected) in [
        ("app", "app = flask.Flask(__name__)", Some(("Flask", Wsgi, "app", false))),
        ("app", "import falcon\nthing = falcon.App()", Some(("Falcon", Wsgi, "thing", false))),
        ("app", "thing = falcon.asgi.App()", Some(("Falcon", Asgi, "thing", false))),
        (
            "app",
            "def create_app(config=None):\n    app = Flask(__name__)\n    return app",
            Some(("Flask", Wsgi, "create_app", true)),
        ),
        ("app", "def make_app():\n    return FastAPI()", Some(("FastAPI", Asgi, "make_app", true))),
        ("app", "def application(environ, start_response):", Some(("a WSGI application", Wsgi, "application", false))),
        ("app", "async def app(scope, receive, send):", Some(("an ASGI application", Asgi, "app", false))),
        ("wsgi", "from shop import create_app\napp = create_app()", Some(("a WSGI application", Wsgi, "app", false))),
        ("asgi", "from shop import thing as application  # x", Some(("an ASGI application", Asgi, "application", false))),
        ("app", "from shop import app", None),
        ("app", "x == Flask(1)\nif app = Flask(1):\n# app = Flask(1)\n    app = Flask(1)\n", None),
        ("app", "app = Flask\nname = Flask.name(1)\n", None),
        ("app", "", None),
    ] {
        let found = find_application(text, module);
        let found = found.as_ref().map(|found| (found.framework, found.interface, &*found.name, found.is_factory));
        assert_eq!(found, expected, "{module}: {text}");
    }
}

#[test]
fn factories_are_called_by_the_server() {
    let text = "def create_app():\n    return Flask(__name__)\n";
    assert_eq!(first(&[("app/__init__.py", text)]).1["command"][3], "app:create_app()");
    let text = "def create_app():\n    return FastAPI()\n";
    let command = json!(["uvicorn", "--factory", "--uds", "{socket}", "--root-path", "{route}", "main:create_app"]);
    assert_eq!(first(&[("main.py", text)]).1["command"], command);
}

const MANAGE: &str = "import os\nos.environ.setdefault('DJANGO_SETTINGS_MODULE', 'shop.settings.local')\n";

#[test]
fn a_django_project_is_found_by_its_settings() {
    let wsgi = "from django.core.wsgi import get_wsgi_application\napplication = get_wsgi_application()\n";
    let (application, run, hints) = first(&[("manage.py", MANAGE), ("a/wsgi.py", wsgi), ("shop/wsgi.py", wsgi)]);
    assert_eq!((application, &run["command"][3], &run["prefix"]), ("Django", &json!("shop.wsgi"), &json!("keep")));
    assert!(hints.contains("FORCE_SCRIPT_NAME"), "{hints}");
    // The settings name a package that is not there, and a virtualenv has one that is not the project's.
    let (_, run, _) = first(&[("manage.py", MANAGE), ("env/wsgi.py", wsgi), ("b/wsgi.py", wsgi)]);
    assert_eq!(run["command"][3], "b.wsgi");
    let (_, run, _) = first(&[("manage.py", MANAGE), ("shop/asgi.py", "")]);
    assert_eq!(run["command"][5], "shop.asgi:application");
    let (_, run, _) = first(&[("manage.py", MANAGE)]);
    assert_eq!(run["command"], json!(["python3", "manage.py", "runserver", "--noreload", "127.0.0.1:{port}"]));
    assert!(detection(&[("manage.py", "from flask_script import Manager\n")]).found.is_empty());
}

#[test]
fn the_web_line_of_a_procfile_becomes_the_command() {
    let run = |web: &str| {
        let (_, run, _) = first(&[("Procfile", &format!("release: x\nweb: {web}\n"))]);
        (run["command"].clone(), run["listen"].clone())
    };
    let port = json!("port");
    assert_eq!(run("node index.js --port $PORT"), (json!(["node", "index.js", "--port", "{port}"]), port.clone()));
    assert_eq!(run("./server -a 0.0.0.0:${PORT}"), (json!(["./server", "-a", "127.0.0.1:{port}"]), port.clone()));
    assert_eq!(run("serve -p ${PORT:-3000}").0, json!(["serve", "-p", "{port}"]));
    assert_eq!(run("cd web && ./serve $PORT"), (json!(["/bin/sh", "-c", "cd web && ./serve $PORT"]), port.clone()));
    assert_eq!(run("ENV=x ./serve").0, json!(["/bin/sh", "-c", "ENV=x ./serve"]));
    assert_eq!(run("gunicorn a:b"), (json!(["gunicorn", "--bind", "unix:{socket}", "a:b"]), json!("socket")));
    assert_eq!(run("gunicorn -b :$PORT a:b"), (json!(["gunicorn", "-b", ":{port}", "a:b"]), port));
    assert_eq!(run("uvicorn a:b --port $PORT").0, json!(["uvicorn", "a:b", "--port", "{port}", "--root-path", "{route}"]));
    let (_, _, hints) = first(&[("Procfile", "web: a {x}\nworker: b\n")]);
    assert!(hints.contains("braces") && hints.contains("not run: worker"), "{hints}");
    assert!(detection(&[("Procfile", "worker: b\nweb:\n")]).notes[0].contains("no line with web:"));
}

#[test]
fn node_is_started_as_its_package_says() {
    let package = |json: Value| json.to_string();
    let express = json!({"express": "5"});
    let server = "require('express')().listen(process.env.PORT)";
    let json = package(json!({"version": "3.1.0", "scripts": {"start": "node server.js"}, "dependencies": express}));
    let (application, run, hints) = first(&[("package.json", &json), ("server.js", server)]);
    assert_eq!((application, &run["listen"], &run["prefix"]), ("Express", &json!("port"), &json!("strip")));
    assert_eq!(run["command"], json!(["node", "server.js"]));
    assert!(hints.contains("listen on all interfaces") && hints.contains("npm install"), "{hints}");
    let found = detection(&[("package.json", &json), ("server.js", server)]).found;
    assert!(found[0].toml().contains("version = \"3.1.0\"  ") && found[0].toml().contains("# from package.json"));

    let json = package(json!({"scripts": {"start": "NODE_ENV=x node ."}}));
    assert_eq!(first(&[("package.json", &json)]).1["command"], json!(["npm", "start"]));
    let json = package(json!({"scripts": {"start": "next start"}, "dependencies": {"next": "1"}}));
    let (application, run, _) = first(&[("package.json", &json), ("node_modules/.bin/next", "#!node")]);
    assert_eq!((application, &run["prefix"]), ("Next.js", &json!("keep")));
    assert_eq!(run["command"], json!(["node_modules/.bin/next", "start"]));
    let json = package(json!({"main": "./lib/main", "dependencies": express}));
    let (_, run, hints) = first(&[("package.json", &json), ("lib/main.js", "app.listen(3000)")]);
    assert_eq!(run["command"], json!(["node", "lib/main.js"]));
    assert!(hints.contains("does not mention PORT"), "{hints}");
    // No server: a library, and the development server of a bundler.
    assert!(detection(&[("package.json", &package(json!({"main": "a.js"}))), ("a.js", "exports.x = 1")]).found.is_empty());
    let json = package(json!({"scripts": {"start": "vite"}, "devDependencies": {"vite": "7"}}));
    assert_eq!(applications(&detection(&[("package.json", &json), ("index.html", "x")])), ["a single-page application"]);
    assert!(detection(&[("package.json", &json)]).found.is_empty());
    assert!(detection(&[("app.js", "history.listen(x)")]).found.is_empty());
    let json = package(json!({"scripts": {"start": "node build"}, "devDependencies": {"vite": "7"}}));
    assert_eq!(first(&[("package.json", &json)]).1["command"], json!(["node", "build"]));
    assert_eq!(first(&[("server.js", server)]).1["command"], json!(["node", "server.js"]));
}

#[test]
fn ruby_is_served_by_puma_or_what_the_gemfile_has() {
    let (application, run, _) = first(&[("config.ru", "run App\n")]);
    assert_eq!((application, &run["command"]), ("Rack", &json!(["puma", "-b", "unix://{socket}"])));
    let (_, run, hints) = first(&[("config.ru", "run App\n"), ("Gemfile", "gem 'puma', '~> 6'\n")]);
    assert_eq!(run["command"], json!(["bundle", "exec", "puma", "-b", "unix://{socket}"]));
    assert!(hints.contains("bundle install"), "{hints}");
    let (_, run, _) = first(&[("config.ru", "run App\n"), ("Gemfile", "gem \"thin\"\n")]);
    assert_eq!((&run["command"][2], &run["listen"]), (&json!("rackup"), &json!("port")));
    let rails = [("config.ru", "run Rails.application\n"), ("Gemfile", "gem 'rails'\n"), ("Gemfile.lock", "    puma (6.4)\n")];
    let (application, run, _) = first(&rails);
    assert_eq!((application, &run["env"]), ("Rails", &json!({"RAILS_RELATIVE_URL_ROOT": "{route}"})));
    assert_eq!(run["listen"], "socket");
    let (application, run, _) = first(&[("Gemfile", "gem('sinatra')\n"), ("app.rb", "get '/' do end\n")]);
    assert_eq!((application, &run["command"][3]), ("Sinatra", &json!("app.rb")));
    assert!(detection(&[("Gemfile", "gem 'rake'\n")]).notes[0].contains("neither config.ru nor app.rb"));
}

#[test]
fn a_go_module_runs_the_program_that_was_built() {
    let module = ("go.mod", "module example.org/wiki/v2\n\ngo 1.24\n");
    let (application, run, hints) = first(&[module, ("main.go", "os.Getenv(\"PORT\")"), ("bin/wiki", "")]);
    assert_eq!((application, &run["command"], &run["listen"]), ("Go", &json!(["./bin/wiki"]), &json!("port")));
    assert!(!hints.contains("go build") && !hints.contains("not found"), "{hints}");
    let (_, run, hints) = first(&[module, ("main.go", "addr := flag.String(\"addr\", \":80\", \"\")")]);
    assert_eq!(run["command"], json!(["./wiki", "-addr", "127.0.0.1:{port}"]));
    assert!(hints.contains("go build -o wiki ."), "{hints}");
    assert!(first(&[module]).2.contains("how the program is told its address was not found"));
}

#[test]
fn php_cgi_and_pages_need_no_server() {
    let (application, run, _) = first(&[("index.php", "<?php"), ("index.html", "x")]);
    assert_eq!((application, &run["kind"], &run["root"]), ("PHP", &json!("fastcgi"), &json!(".")));
    assert_eq!(run["command"], json!(["php-cgi", "-b", "{socket}"]));
    assert_eq!(run["env"], json!({"PHP_FCGI_CHILDREN": "4"}));
    let (_, run, hints) = first(&[("public/index.php", "<?php"), ("composer.json", "{}")]);
    assert_eq!(run["root"], "public");
    assert!(hints.contains("composer install"), "{hints}");

    assert_eq!(first(&[("cgi-bin/a", "#!sh")]).1, json!({"kind": "cgi", "root": "cgi-bin"}));
    assert_eq!(first(&[("a.cgi", "#!sh"), ("b.cgi", "no program")]).1, json!({"kind": "cgi", "script": "a.cgi"}));
    assert_eq!(first(&[("a.cgi", "#!sh"), ("b.cgi", "#!sh")]).1, json!({"kind": "cgi", "root": "."}));

    for root in [".", "public", "dist", "build", "_site"] {
        let (application, run, hints) = first(&[(&format!("{root}/index.html"), "x")]);
        assert_eq!((application, &run["kind"], &run["root"]), ("static files", &json!("static"), &json!(root)));
        assert_eq!(hints.contains("every file in the directory is served"), root == ".", "{hints}");
    }
    let vite = json!({"devDependencies": {"vite": "7"}}).to_string();
    let (_, run, hints) = first(&[("package.json", &vite), ("index.html", "source"), ("dist/index.html", "built")]);
    assert_eq!((&run["root"], &run["spa"]), (&json!("dist"), &json!(true)));
    assert!(!hints.contains("npm run build"), "{hints}");
    assert!(first(&[("package.json", &vite), ("index.html", "source")]).2.contains("npm run build"));
}

#[test]
fn of_several_applications_the_most_specific_is_first() {
    let start = json!({"scripts": {"start": "node x.js"}}).to_string();
    let all = [
        ("index.html", "x"),
        ("index.php", "x"),
        ("a.cgi", "#!sh"),
        ("go.mod", "module a\n"),
        ("package.json", &*start),
        ("config.ru", "run A\n"),
        ("app.py", FLASK),
        ("Procfile", "web: gunicorn app:app\n"),
    ];
    let order = ["the web process of a Procfile", "Flask", "Rack", "Node", "Go", "PHP", "CGI", "static files"];
    assert_eq!(applications(&detection(&all)), order);
}

#[test]
fn nothing_is_proposed_for_a_plugin_or_for_nothing() {
    let found = detection(&[("plugrack.toml", "nonsense"), ("app.py", FLASK)]);
    assert_eq!((found.already, found.found.len()), (Some("plugrack.toml"), 0));
    assert_eq!(detection(&[("plugin", "#!sh"), ("app.py", FLASK)]).already, Some("plugin"));
    // A file of that name that is no program makes no plugin.
    assert_eq!(detection(&[("plugin", "x"), ("app.py", FLASK)]).already, None);
    let found = detection(&[("README.md", "app = Flask(__name__)"), ("node_modules/a/server.js", "x.listen()")]);
    assert!(found.already.is_none() && found.found.is_empty() && found.notes.is_empty());
    assert!(detect(Path::new("/nowhere/at/all"), "a").is_err());
    assert!(detect(Path::new("/dev/null"), "a").is_err());
}

#[test]
fn the_id_and_the_route_are_valid_for_every_name() {
    let long = "x".repeat(80);
    for (name, id) in [
        ("wiki", "wiki"),
        ("My Wiki 2.0", "my-wiki-2-0"),
        ("--a--b--", "a-b"),
        ("écran", "cran"),
        ("…", "app"),
        ("", "app"),
        (&*long, &long[..63]),
    ] {
        assert_eq!(plugin_id(name), id, "{name}");
        assert!(crate::protocol::metadata::is_plugin_id(id));
    }
    let dir = directory(&[("index.html", "x")]);
    let manifest = detect(dir.path(), "api").unwrap().found[0].json()["manifest"].clone();
    assert_eq!((&manifest["id"], &manifest["route"]), (&json!("api"), &json!("/api-app")));
    // A name that could forge a line of the manifest.
    let draft = detect(dir.path(), "a\"\nkind = 1\u{202e}").unwrap().found.remove(0);
    assert_toml(&draft);
    assert_eq!(draft.json()["manifest"]["name"], "a-kind-1");
}

#[test]
fn text_of_others_cannot_leave_its_string_or_comment() {
    let web = "a\u{1b}[2J\u{202e}\r\u{85}b\u{7f} \u{e0001}c\u{2028}d";
    let draft = detection(&[("Procfile", &format!("web: {web}\n"))]).found.remove(0);
    assert_toml(&draft);
    let toml = draft.toml();
    assert!(!toml.contains(|c: char| c != '\n' && c.is_control()), "{toml:?}");
    assert!(!toml.contains(['\u{202e}', '\u{e0001}', '\u{2028}']), "{toml:?}");
    let start = json!({"version": "1\n2", "scripts": {"start": "node \u{0} \n[run] é"}}).to_string();
    assert_toml(&detection(&[("package.json", &start)]).found[0]);
}

/// A directory to which every file that is looked for is added in a form that cannot be used.
fn notes_of(spoil: impl Fn(&Path)) -> (Vec<String>, usize) {
    let dir = tempfile::tempdir().unwrap();
    for name in ["Procfile", "package.json", "manage.py", "app.py", "config.ru", "Gemfile", "go.mod", "index.php", "index.html"] {
        spoil(&dir.path().join(name));
    }
    let detection = detect(dir.path(), "a").unwrap();
    (detection.notes, detection.found.len())
}

#[test]
fn what_is_no_file_is_not_opened_and_links_out_are_not_followed() {
    let outside = directory(&[("secret", FLASK)]);
    let (notes, found) = notes_of(|path| mknodat(CWD, path, FileType::Fifo, Mode::from_raw_mode(0o644), 0).unwrap());
    assert!(found == 0 && notes.contains(&"package.json is not a regular file, and was not read".to_owned()), "{notes:?}");
    let (notes, found) = notes_of(|path| symlink(outside.path().join("secret"), path).unwrap());
    assert!(found == 0 && notes.iter().any(|note| note.starts_with("app.py is a link that leads out")), "{notes:?}");
    let (notes, found) = notes_of(|path| symlink("../../../../../../etc/passwd", path).unwrap());
    assert!(found == 0 && notes.iter().all(|note| note.contains("leads out")), "{notes:?}");
    let (notes, found) = notes_of(|path| symlink(path.file_name().unwrap(), path).unwrap());
    assert!(found == 0 && notes.iter().all(|note| note.contains("cannot be opened")), "{notes:?}");
    let (_, found) = notes_of(|path| fs::create_dir(path).unwrap());
    assert_eq!(found, 0);
    // A link inside is what its target is.
    let dir = directory(&[("src/app.py", FLASK)]);
    symlink("src/app.py", dir.path().join("app.py")).unwrap();
    assert_eq!(applications(&detect(dir.path(), "a").unwrap()), ["Flask"]);
}

#[test]
fn broken_and_huge_files_are_noted_or_cut() {
    for (text, note) in [
        ("{\"scripts\": ", "package.json is not valid JSON"),
        ("[1]", "package.json is not a JSON object"),
        ("\u{0}\u{1}", "package.json is not valid JSON"),
        (&*"[".repeat(100_000), "package.json is not valid JSON"),
    ] {
        let found = detection(&[("package.json", text)]);
        assert!(found.found.is_empty() && found.notes[0].starts_with(note), "{:?}", found.notes);
    }
    for json in
        [json!({}), json!({"scripts": 1, "main": [], "dependencies": "x", "version": {}}), json!({"scripts": {"start": " "}})]
    {
        assert!(detection(&[("package.json", &json.to_string())]).found.is_empty(), "{json}");
    }
    let dir = directory(&[("app.py", FLASK)]);
    fs::write(dir.path().join("wsgi.py"), [0xff, 0xfe, 0, b'\n', 0x80]).unwrap();
    fs::write(dir.path().join("Procfile"), [0xff; 1000]).unwrap();
    assert_eq!(applications(&detect(dir.path(), "a").unwrap()), ["Flask"]);
    // What matters stands behind the limit.
    let padded = format!("{}\n{FLASK}", "#".repeat(256 * 1024));
    let found = detection(&[("app.py", &padded)]);
    assert!(found.found.is_empty() && found.notes == ["app.py is larger than 256 KiB, and only its beginning was read"]);
    let sparse = directory(&[("package.json", "{}")]);
    fs::File::options().write(true).open(sparse.path().join("package.json")).unwrap().set_len(1 << 40).unwrap();
    assert!(detect(sparse.path(), "a").unwrap().notes[0].contains("larger than"));
}

#[test]
fn a_directory_of_any_size_is_searched_within_limits() {
    let dir = directory(&[("manage.py", MANAGE)]);
    for number in 0..MAX_NAMES {
        fs::write(dir.path().join(format!("{number}.cgi")), "x").unwrap();
    }
    let found = detect(dir.path(), "a").unwrap();
    assert!(found.notes.iter().any(|note| note.contains("has more than 2000 names")), "{:?}", found.notes);
    assert_eq!(applications(&found), ["Django"]);

    let files = directory(&[("a", "x")]);
    let files = Files::open(files.path()).unwrap();
    assert_eq!((0..2 * MAX_FILES).filter(|_| files.text("a").is_some()).count(), MAX_FILES as usize);
    (0..100).for_each(|number| files.note(number.to_string()));
    assert!(files.notes().len() < 20);
}
