//! Node: a `package.json` that says how to start a server, or a server's file.

use super::draft::Draft;
use super::files::Files;
use serde_json::{Value, json};

/// Packages that serve HTTP, with their names for people.
const SERVERS: [(&str, &str); 14] = [
    ("next", "Next.js"),
    ("nuxt", "Nuxt"),
    ("@nestjs/core", "Nest"),
    ("express", "Express"),
    ("fastify", "Fastify"),
    ("koa", "Koa"),
    ("@hapi/hapi", "hapi"),
    ("@hono/node-server", "Hono"),
    ("hono", "Hono"),
    ("restify", "restify"),
    ("polka", "polka"),
    ("node-red", "Node-RED"),
    ("socket.io", "Socket.IO"),
    ("ws", "ws"),
];

/// Packages that build pages, with the directory they build into.
const BUNDLERS: [(&str, &str); 6] = [
    ("react-scripts", "build"),
    ("vite", "dist"),
    ("@vue/cli-service", "dist"),
    ("parcel", "dist"),
    ("@angular/cli", "dist"),
    ("webpack", "dist"),
];

/// Programs that a script `start` runs for developers alone, while they write the pages.
const DEVELOPMENT_SERVERS: [&str; 8] =
    ["vite", "react-scripts", "vue-cli-service", "ng", "parcel", "webpack", "webpack-dev-server", "npm"];

/// What the text of a server mentions, besides a call of listen. Pages have such calls too, as in `history.listen()`.
const SERVER_WORDS: [&str; 6] = ["createServer", "express", "fastify", "koa", "hono", "process.env.PORT"];

/// The files that are a server's by their name.
const SERVER_FILES: [&str; 5] = ["server.js", "app.js", "index.js", "server.mjs", "index.mjs"];

/// Characters of a script that need npm's shell.
const SHELL: &[char] =
    &['|', '&', ';', '<', '>', '(', ')', '$', '`', '\\', '"', '\'', '*', '?', '[', ']', '#', '~', '{', '}', '='];

/// What is used of a `package.json`.
pub(super) struct Package {
    pub(super) version: Option<String>,
    start: Option<String>,
    main: Option<String>,
    dependencies: Vec<String>,
    development: Vec<String>,
}

impl Package {
    /// Reads the `package.json` of a directory. What is wrong with one is noted.
    pub(super) fn read(files: &Files) -> Option<Self> {
        let text = files.text("package.json")?;
        let package: Value = match serde_json::from_str(text.trim_start_matches('\u{feff}')) {
            Ok(package @ Value::Object(_)) => package,
            Ok(_) => {
                files.note("package.json is not a JSON object, and was ignored".to_owned());
                return None;
            }
            Err(error) => {
                files.note(format!("package.json is not valid JSON, and was ignored: {error}"));
                return None;
            }
        };
        let string = |value: &Value| value.as_str().filter(|text| !text.trim().is_empty()).map(|text| text.trim().to_owned());
        let names = |table: &Value| table.as_object().map(|table| table.keys().cloned().collect()).unwrap_or_default();
        Some(Self {
            version: string(&package["version"]),
            start: string(&package["scripts"]["start"]),
            main: string(&package["main"]),
            dependencies: names(&package["dependencies"]),
            development: names(&package["devDependencies"]),
        })
    }

    /// The server that the package depends on.
    fn server(&self) -> Option<&'static str> {
        SERVERS.iter().find(|(name, _)| self.dependencies.iter().any(|used| used == name)).map(|(_, shown)| *shown)
    }

    /// The tool that builds pages from the package, and its output directory, if the package is no server.
    pub(super) fn bundler(&self) -> Option<(&'static str, &'static str)> {
        let start = self.start.as_deref().and_then(|start| start.split_ascii_whitespace().next());
        if self.server().is_some() || start.is_some_and(|start| !DEVELOPMENT_SERVERS.contains(&start)) {
            return None;
        }
        let mut used = self.dependencies.iter().chain(&self.development);
        used.find_map(|used| BUNDLERS.into_iter().find(|(name, _)| used == name))
    }
}

/// The manifest for a server.
pub(super) fn detect(files: &Files, package: Option<&Package>) -> Option<Draft> {
    // The development server of a bundler is not for users.
    if package.is_some_and(|package| package.bundler().is_some()) {
        return None;
    }
    let (command, why, evidence, entry) = package.and_then(|package| started(files, package)).or_else(|| by_name(files))?;
    let application = package.and_then(Package::server).unwrap_or("Node");
    let text = entry.as_deref().and_then(|entry| files.text(entry));
    let mut draft = Draft::new(application, "http", evidence).run("command", json!(command), why).run(
        "listen",
        "port",
        "a Node server takes its port from the variable PORT",
    );
    draft = match application {
        "Next.js" => draft.run("prefix", "keep", "as basePath in next.config needs it; without basePath: \"strip\"").hint(
            "Next.js writes links from / unless next.config sets basePath to the route, which takes effect by next build; \
            without it use a host name (host)",
        ),
        _ => draft.run("prefix", "strip", "the application sees the path without the route").hint(format!(
            "{application} knows of no prefix: its pages must use relative links, or the header x-forwarded-prefix, or a host name \
            of its own (host)"
        )),
    };
    if let (Some(entry), Some(text)) = (entry, text) {
        if !text.contains("PORT") {
            draft = draft.hint(format!("{entry} does not mention PORT: it must listen on process.env.PORT"));
        } else if !["127.0.0.1", "localhost", "HOST"].iter().any(|host| text.contains(host)) {
            draft = draft.hint(format!(
                "{entry} seems to listen on all interfaces: add \"127.0.0.1\" behind the port in its call of listen"
            ));
        }
    }
    if package.is_some_and(|package| !package.dependencies.is_empty()) && !files.is_directory("node_modules") {
        draft = draft.hint("there is no node_modules: npm install --omit=dev");
    }
    Some(draft)
}

/// A command, why it is that, what shows it, and the file that is run, if it is known.
type Start = (Vec<String>, String, String, Option<String>);

/// How a package says that it is started.
fn started(files: &Files, package: &Package) -> Option<Start> {
    if let Some(start) = &package.start {
        let words: Vec<String> = start.split_ascii_whitespace().map(str::to_owned).collect();
        let evidence = format!("package.json has the script start: {start}");
        let tool = words.first().map(|word| format!("node_modules/.bin/{word}"))?;
        return Some(if start.contains(SHELL) {
            let why = "the script start needs npm's shell".to_owned();
            (vec!["npm".to_owned(), "start".to_owned()], why, evidence, None)
        } else if words[0] == "node" {
            let entry = words.get(1).and_then(|word| module(files, word));
            (words, "the script start, without npm in between".to_owned(), evidence, entry)
        } else if files.is_program(&tool) {
            let command = [tool].into_iter().chain(words.into_iter().skip(1)).collect();
            (command, "the script start, without npm in between".to_owned(), evidence, None)
        } else {
            (vec!["npm".to_owned(), "start".to_owned()], "the script start".to_owned(), evidence, None)
        });
    }
    let main = package.main.as_deref().unwrap_or("index.js");
    let entry = module(files, main)?;
    // A library has a main file too.
    let is_server = package.server().is_some() || listens(&files.text(&entry)?);
    is_server.then(|| {
        let evidence = match package.main {
            Some(_) => format!("package.json has the main file {main}"),
            None => format!("package.json, and {main}"),
        };
        (vec!["node".to_owned(), entry.clone()], "the main file of the package".to_owned(), evidence, Some(entry))
    })
}

/// A file with the name of a server, in which something listens.
fn by_name(files: &Files) -> Option<Start> {
    let name = SERVER_FILES.into_iter().find(|name| files.text(name).is_some_and(|text| listens(&text)))?;
    let evidence = format!("{name} calls listen");
    Some((vec!["node".to_owned(), name.to_owned()], format!("{name} listens"), evidence, Some(name.to_owned())))
}

fn listens(text: &str) -> bool {
    let has = |word: &&str| text.contains(*word);
    [".listen(", " serve(", "\nserve("].iter().any(has) && SERVER_WORDS.iter().any(has)
}

/// The file that Node loads for a path in the package.
fn module(files: &Files, path: &str) -> Option<String> {
    let path = path.trim_start_matches("./");
    let index = format!("{}/index.js", path.trim_end_matches('/'));
    [path.to_owned(), format!("{path}.js"), index].into_iter().find(|path| files.is_file(path))
}
