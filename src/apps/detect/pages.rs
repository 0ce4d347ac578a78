//! What needs no server of its own: PHP, CGI programs and static files.

use super::draft::Draft;
use super::files::Files;
use super::node::Package;
use serde_json::json;

/// PHP processes, and so requests at once: each takes tens of MiB.
const PHP_CHILDREN: u16 = 4;

/// Where generators of pages put them.
const OUTPUTS: [&str; 4] = ["public", "dist", "build", "_site"];

/// Where bundlers take their page from.
const SOURCES: [&str; 3] = [".", "public", "src"];

/// PHP, by FastCGI.
pub(super) fn php(files: &Files) -> Option<Draft> {
    // Laravel, Symfony and others keep all else out of the root.
    let root = ["public", "."].into_iter().find(|root| files.is_file(&format!("{root}/index.php")))?;
    let shown = if root == "." { "index.php" } else { "public/index.php" };
    let mut draft = Draft::new("PHP", "fastcgi", shown)
        .plugin("concurrency", PHP_CHILDREN, "as many as PHP has processes")
        .run("command", json!(["php-cgi", "-b", "{socket}"]), "php-cgi from the PATH; php-fpm needs a configuration file")
        .run("listen", "socket", "php-cgi makes the socket")
        .run("env", json!({"PHP_FCGI_CHILDREN": PHP_CHILDREN.to_string()}), "as many requests at once as concurrency")
        .run("root", root, format!("the directory of {shown}"))
        .run("index", "index.php", "the script of a directory");
    if root == "." && !files.is_file("composer.json") {
        draft = draft.hint(
            "every .php file below the directory can be asked for: keep libraries and configuration out of it, with the pages in public",
        );
    }
    if files.is_file("composer.json") && !files.is_directory("vendor") {
        draft = draft.hint("there is no vendor: composer install --no-dev");
    }
    Some(draft.hint(
        "php-cgi is the package php-cgi of Debian and Ubuntu; php-fpm needs a configuration FILE with a pool on a socket: \
        command = [\"php-fpm\", \"-F\", \"-y\", \"FILE\"], listen = \"unix:/PATH/OF/THE/SOCKET\"",
    ))
}

/// CGI programs.
pub(super) fn cgi(files: &Files) -> Option<Draft> {
    if files.is_directory("cgi-bin") {
        let draft = Draft::new("CGI", "cgi", "the directory cgi-bin").run("root", "cgi-bin", "the programs are in it");
        return Some(draft.hint(CGI_PROCESS));
    }
    let is_script = |name: &String| name.ends_with(".cgi") && files.is_program(name);
    let scripts: Vec<String> = files.names(".").into_iter().filter(is_script).collect();
    let draft = match scripts.as_slice() {
        [] => return None,
        [script] => {
            Draft::new("CGI", "cgi", format!("the program {script}")).run("script", script.as_str(), "the only program *.cgi")
        }
        [first, second, ..] => {
            let evidence = format!("the programs {first} and {second}");
            Draft::new("CGI", "cgi", evidence).run("root", ".", "there are several programs *.cgi")
        }
    };
    Some(draft.hint(CGI_PROCESS))
}

const CGI_PROCESS: &str = "each request starts a process, at most concurrency of them at once";

/// A directory of pages.
pub(super) fn static_files(files: &Files, package: Option<&Package>) -> Option<Draft> {
    let has_index = |root: &str| files.is_file(&format!("{root}/index.html"));
    let built = OUTPUTS.into_iter().find(|root| has_index(root) && *root != "public");
    // Without a page to build from, the bundler is for a part of another application.
    let has_source = built.is_some() || SOURCES.into_iter().any(has_index);
    if let Some((bundler, output)) = package.and_then(Package::bundler).filter(|_| has_source) {
        let evidence = format!("package.json names {bundler}, which builds pages");
        let why = match built {
            Some(root) => format!("{root}/index.html was built"),
            None => format!("where {bundler} builds into; it is not built yet"),
        };
        let draft = Draft::new("a single-page application", "static", evidence)
            .run("root", built.unwrap_or(output), why)
            .run("index", "index.html", "the page of a directory")
            .run("spa", true, "paths without a file are the application's own; false for separate pages");
        let draft = draft.hint(format!(
            "{bundler} writes links from / unless it is told the prefix, as by vite build --base=./ or PUBLIC_URL=."
        ));
        return Some(if built.is_some() { draft } else { draft.hint("to build it: npm install && npm run build") });
    }
    let root = ["."].into_iter().chain(OUTPUTS).find(|root| has_index(root))?;
    let shown = if root == "." { "index.html".to_owned() } else { format!("{root}/index.html") };
    let draft = Draft::new("static files", "static", shown.as_str())
        .run("root", root, format!("the directory of {shown}"))
        .run("index", "index.html", "the page of a directory")
        .run("spa", false, "true if paths without a file are for index.html");
    Some(if root == "." {
        draft.hint("every file in the directory is served, but for names that begin with a dot")
    } else {
        draft
    })
}
