//! Python: Django, and modules with a WSGI or ASGI application. Modules are read as text, never imported.

use super::draft::Draft;
use super::files::Files;
use serde_json::json;

/// The virtualenvs that are looked for, by the name of their directory.
const VIRTUALENVS: [&str; 3] = [".venv", "venv", "env"];

/// Where an application is looked for, the most specific first.
const MODULES: [&str; 7] = ["wsgi.py", "asgi.py", "app.py", "main.py", "application.py", "app/__init__.py", "app/main.py"];

/// Names of functions that make an application.
const FACTORIES: [&str; 2] = ["create_app", "make_app"];

/// Why gunicorn's variable for a prefix is set.
const SCRIPT_NAME_WHY: &str = "gunicorn takes the prefix from SCRIPT_NAME and expects it in the path";

const ONE_AT_A_TIME: &str =
    "gunicorn answers one request at a time: for more add --threads N to the command, and set concurrency = N";

/// How a server calls an application.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Interface {
    Wsgi,
    Asgi,
}

/// An application that a module has.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Application {
    pub(super) framework: &'static str,
    pub(super) interface: Interface,
    /// The name of the variable or of the function that makes it.
    pub(super) name: String,
    pub(super) is_factory: bool,
    /// The line that shows it.
    pub(super) line: String,
}

/// The framework whose class or function this is.
fn framework(callee: &str) -> Option<(&'static str, Interface)> {
    use Interface::{Asgi, Wsgi};
    let last = callee.rsplit('.').next().unwrap_or_default();
    Some(match (callee, last) {
        ("falcon.App" | "falcon.API", _) => ("Falcon", Wsgi),
        ("falcon.asgi.App", _) => ("Falcon", Asgi),
        (_, "Flask") => ("Flask", Wsgi),
        (_, "Bottle" | "default_app") => ("Bottle", Wsgi),
        (_, "make_wsgi_app") => ("Pyramid", Wsgi),
        (_, "get_wsgi_application") => ("Django", Wsgi),
        (_, "get_asgi_application") => ("Django", Asgi),
        (_, "FastAPI") => ("FastAPI", Asgi),
        (_, "Starlette") => ("Starlette", Asgi),
        (_, "Quart") => ("Quart", Asgi),
        (_, "Litestar") => ("Litestar", Asgi),
        (_, "Sanic") => ("Sanic", Asgi),
        _ => return None,
    })
}

/// The called function of an expression that is a call.
fn callee(expression: &str) -> Option<&str> {
    expression.trim_start().split_once('(').map(|(callee, _)| callee.trim_end())
}

/// The application of a module's text; a module of the name `asgi` is one of that interface where nothing else tells.
pub(super) fn find_application(text: &str, module: &str) -> Option<Application> {
    let generic = match text {
        _ if module.ends_with("asgi") || ["fastapi", "starlette", "quart", "litestar"].iter().any(|name| text.contains(name)) => {
            ("an ASGI application", Interface::Asgi)
        }
        _ => ("a WSGI application", Interface::Wsgi),
    };
    let is_entry = module.ends_with("wsgi") || module.ends_with("asgi");
    let application = |(framework, interface), name: &str, is_factory, line: &str| Application {
        framework,
        interface,
        name: name.to_owned(),
        is_factory,
        line: line.trim().to_owned(),
    };
    let (mut factory, mut inner) = (None, None);
    for line in text.lines() {
        if line.starts_with(char::is_whitespace) {
            let assigned = line.split_once('=').and_then(|(_, value)| framework(callee(value)?));
            let returned = || framework(callee(line.trim_start().strip_prefix("return ")?)?);
            inner = inner.or(assigned).or_else(returned);
        } else if let Some((name, value)) = assignment(line) {
            let called = callee(value);
            if let Some(found) = called.and_then(framework) {
                return Some(application(found, name, false, line));
            }
            if is_entry && called.is_some_and(|called| FACTORIES.iter().any(|name| called.ends_with(name))) {
                return Some(application(generic, name, false, line));
            }
        } else if let Some(name) = imported(line).filter(|_| is_entry) {
            return Some(application(generic, name, false, line));
        } else if let Some((name, parameters)) = line.strip_prefix("def ").and_then(|rest| rest.split_once('(')) {
            if parameters.starts_with("environ") {
                return Some(application(("a WSGI application", Interface::Wsgi), name, false, line));
            }
            factory = factory.or(FACTORIES.contains(&name).then_some((name, line)));
        } else if let Some((name, parameters)) = line.strip_prefix("async def ").and_then(|rest| rest.split_once('('))
            && parameters.starts_with("scope")
        {
            return Some(application(("an ASGI application", Interface::Asgi), name, false, line));
        }
    }
    let (name, line) = factory?;
    Some(application(inner?, name, true, line))
}

/// The variable and the value of an assignment at the top of a module.
fn assignment(line: &str) -> Option<(&str, &str)> {
    let (left, value) = line.split_once('=')?;
    // A variable may have a type: `app: FastAPI = FastAPI()`.
    let name = left.split(':').next()?.trim();
    is_identifier(name).then_some((name, value))
}

/// The application that a line imports under one of the names that servers look for.
fn imported(line: &str) -> Option<&str> {
    let names = line.strip_prefix("from ")?.split_once(" import ")?.1;
    let names = names.split('#').next()?.split(',').filter_map(|name| name.trim().rsplit(' ').next());
    names.map(|name| name.trim_matches(['(', ')'])).find(|name| ["app", "application"].contains(name))
}

fn is_identifier(name: &str) -> bool {
    !name.is_empty() && !name.starts_with(|c: char| c.is_ascii_digit()) && name.chars().all(|c| c.is_alphanumeric() || c == '_')
}

/// A program of a virtualenv beside the application, or by its name alone; and where it is.
pub(super) fn tool(files: &Files, name: &str) -> (String, String) {
    let found = VIRTUALENVS.iter().map(|venv| format!("{venv}/bin/{name}")).find(|path| files.is_program_or_link(path));
    match found {
        Some(path) => (path, "from the virtualenv".to_owned()),
        None => (name.to_owned(), format!("{name} from the PATH")),
    }
}

/// Says how to install a program that is in no virtualenv.
fn hint_of_tool(files: &Files, name: &str, draft: Draft) -> Draft {
    if tool(files, name).0 != name {
        return draft;
    }
    let requirements = if files.is_file("requirements.txt") { " -r requirements.txt" } else { "" };
    let venv = VIRTUALENVS.iter().find(|venv| files.is_directory(venv));
    let install = format!("{}/bin/pip install{requirements} {name}", venv.unwrap_or(&VIRTUALENVS[0]));
    draft.hint(match venv {
        Some(venv) => format!("the virtualenv {venv} has no {name}; to install it: {install}"),
        None => format!(
            "there is no virtualenv, so {name} must be in the PATH of plugins; to make one: python3 -m venv .venv && {install}"
        ),
    })
}

/// The manifest of a WSGI application under gunicorn, or of an ASGI application under uvicorn.
fn served(
    files: &Files,
    framework: &'static str,
    evidence: String,
    interface: Interface,
    target: &str,
    is_factory: bool,
) -> Draft {
    let draft = Draft::new(framework, "http", evidence);
    match interface {
        Interface::Wsgi => {
            let (program, from) = tool(files, "gunicorn");
            let target = if is_factory { format!("{target}()") } else { target.to_owned() };
            let draft = draft
                .run(
                    "command",
                    json!([program, "--bind", "unix:{socket}", target]),
                    format!("{target} is the application; {from}"),
                )
                .run("listen", "socket", "gunicorn makes the socket");
            hint_of_tool(files, "gunicorn", with_script_name(draft)).hint(ONE_AT_A_TIME)
        }
        Interface::Asgi => {
            let (program, from) = tool(files, "uvicorn");
            let mut command = vec![program.as_str(), "--uds", "{socket}", "--root-path", "{route}", target];
            if is_factory {
                command.insert(1, "--factory");
            }
            let draft = draft
                .run("command", json!(command), format!("{target} is the application; {from}"))
                .run("listen", "socket", "uvicorn makes the socket")
                .run("prefix", "strip", "uvicorn takes the prefix from --root-path and puts it before the path");
            hint_of_tool(files, "uvicorn", draft)
        }
    }
}

/// Tells an application under gunicorn its prefix.
pub(super) fn with_script_name(draft: Draft) -> Draft {
    draft.run("env", json!({"SCRIPT_NAME": "{route}"}), SCRIPT_NAME_WHY).run(
        "prefix",
        "keep",
        "as SCRIPT_NAME needs it; with another server than gunicorn: \"strip\", without SCRIPT_NAME",
    )
}

/// A module with an application.
pub(super) fn module(files: &Files) -> Option<Draft> {
    if is_django(files) {
        return None;
    }
    MODULES.iter().find_map(|path| {
        let module = path.trim_end_matches(".py").trim_end_matches("/__init__").replace('/', ".");
        let application = find_application(&files.text(path)?, &module)?;
        let target = format!("{module}:{}", application.name);
        let evidence = format!("{path} has the line {}", application.line);
        let draft = served(files, application.framework, evidence, application.interface, &target, application.is_factory);
        Some(match application.framework {
            "Flask" => {
                draft.hint("Flask makes links with url_for, which knows the prefix; a link that is written as /page does not")
            }
            "Django" => draft.hint(STATIC_FILES),
            _ => draft,
        })
    })
}

const STATIC_FILES: &str = "Django serves no static files without its debug mode: add WhiteNoise, or a plugin of kind \"static\"; \
    FORCE_SCRIPT_NAME in the settings is not needed, and STATIC_URL must be relative (\"static/\") to follow the prefix";

fn is_django(files: &Files) -> bool {
    files.text("manage.py").is_some_and(|text| text.contains("DJANGO_SETTINGS_MODULE"))
}

/// A Django project.
pub(super) fn django(files: &Files) -> Option<Draft> {
    let manage = files.text("manage.py").filter(|text| text.contains("DJANGO_SETTINGS_MODULE"))?;
    // The second string of `os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")`.
    let settings = manage.split("DJANGO_SETTINGS_MODULE").nth(1).and_then(|rest| rest.split(['"', '\'']).nth(2));
    let named = settings.and_then(|settings| settings.split_once(".settings")).map(|(project, _)| project.replace('.', "/"));
    let is_path = |path: &String| path.split('/').all(is_identifier);
    let packages: Vec<String> = named.into_iter().filter(is_path).chain(files.packages()).collect();
    for (file, interface, variable) in [("wsgi", Interface::Wsgi, "application"), ("asgi", Interface::Asgi, "application")] {
        for package in &packages {
            let path = format!("{package}/{file}.py");
            if let Some(text) = files.text(&path) {
                let module = format!("{package}.{file}").replace('/', ".");
                let variable = find_application(&text, &module).map_or(variable.to_owned(), |found| found.name);
                let target = if variable == "application" && file == "wsgi" { module } else { format!("{module}:{variable}") };
                let evidence = format!("manage.py, and {path}");
                return Some(served(files, "Django", evidence, interface, &target, false).hint(STATIC_FILES));
            }
        }
    }
    let (python, from) = tool(files, "python3");
    let command = json!([python, "manage.py", "runserver", "--noreload", "127.0.0.1:{port}"]);
    let draft = Draft::new("Django", "http", "manage.py")
        .run("command", command, format!("the development server, since no wsgi.py was found; {from}"))
        .run("listen", "port", "the development server knows no sockets")
        .run("prefix", "strip", "the application sees the path without the route");
    Some(draft.hint("set FORCE_SCRIPT_NAME in the settings to the route, so that Django's links begin with it"))
}
