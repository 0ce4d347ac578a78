//! Go: a module, and the program that was built from it.

use super::draft::Draft;
use super::files::Files;
use serde_json::json;

/// Where the main package of a module usually is.
const MAIN_FILES: [&str; 3] = ["main.go", "server.go", "cmd/server/main.go"];

/// Flags that take an address to listen on, as programs commonly name them.
const ADDRESS_FLAGS: [&str; 5] = ["addr", "listen", "http", "address", "bind"];

/// The manifest for a module, in a directory of this name.
pub(super) fn detect(files: &Files, directory: &str) -> Option<Draft> {
    let module = files.text("go.mod")?;
    let path = module.lines().find_map(|line| line.strip_prefix("module ")).unwrap_or_default().trim().trim_matches('"');
    // `example.org/wiki/v2` is the second version of `wiki`.
    let is_version = |part: &&str| part.strip_prefix('v').is_some_and(|digits| digits.parse::<u32>().is_ok());
    let last = path.rsplit('/').find(|part| !part.is_empty() && !is_version(part)).unwrap_or_default();
    let name = if last.is_empty() { "server" } else { last };
    let names = [name, directory, "server", "main", "app"].map(str::to_owned);
    let candidates = names.iter().cloned().chain(names.iter().map(|name| format!("bin/{name}")));
    let built = candidates.filter(|path| !path.contains("..")).find(|path| files.is_program(path));
    let (program, why) = match &built {
        Some(program) => (program.as_str(), "the program that was built".to_owned()),
        None => (name, format!("the program that go build -o {name} makes")),
    };
    let source = MAIN_FILES.iter().find_map(|path| Some((*path, files.text(path)?)));
    let mut command = vec![format!("./{program}")];
    let flag = source.as_ref().and_then(|(_, text)| flag(text));
    let listen = match (&source, flag) {
        (Some((path, text)), _) if text.contains("\"PORT\"") => format!("{path} takes its port from the variable PORT"),
        (Some((path, _)), Some(flag)) => {
            command.extend([format!("-{flag}"), "127.0.0.1:{port}".to_owned()]);
            format!("{path} has the flag -{flag}")
        }
        _ => "a free port, which is in the variable PORT too".to_owned(),
    };
    let is_told = flag.is_some() || source.as_ref().is_some_and(|(_, text)| text.contains("\"PORT\""));
    let mut draft = Draft::new("Go", "http", format!("go.mod of the module {path}"))
        .run("command", json!(command), why)
        .run("listen", "port", listen)
        .run("prefix", "strip", "the application sees the path without the route");
    if built.is_none() {
        draft = draft.hint(format!("no program is built yet: go build -o {name} ."));
    }
    if !is_told {
        draft = draft.hint(
            "how the program is told its address was not found: it must listen on 127.0.0.1 at the port in PORT, or with \
            listen = \"socket\" on the socket {socket}",
        );
    }
    Some(draft.hint("net/http knows of no prefix: its pages must use relative links, or the header x-forwarded-prefix"))
}

/// The flag for an address in a program's text.
fn flag(text: &str) -> Option<&'static str> {
    ADDRESS_FLAGS.into_iter().find(|name| text.contains(&format!("flag.String(\"{name}\"")))
}
