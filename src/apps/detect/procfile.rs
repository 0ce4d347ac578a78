//! A Procfile, as Heroku and its like have it: a line for each type of process, of which `web` listens on `$PORT`.

use super::draft::Draft;
use super::files::Files;
use super::python;
use serde_json::json;

/// Characters that a shell gives a meaning. Braces are among them since they mark placeholders in a manifest.
const SHELL: &[char] = &['|', '&', ';', '<', '>', '(', ')', '$', '`', '\\', '"', '\'', '*', '?', '[', ']', '#', '~', '{', '}'];

/// Longest command that is taken from a Procfile, in bytes: more is no command that a person wrote.
const MAX_COMMAND: usize = 4096;

/// The manifest for the `web` line.
pub(super) fn detect(files: &Files) -> Option<Draft> {
    let text = files.text("Procfile")?;
    let types: Vec<(&str, &str)> = text.lines().filter_map(process).collect();
    let Some((_, web)) = types.iter().find(|(name, command)| *name == "web" && (1..=MAX_COMMAND).contains(&command.len())) else {
        files.note("Procfile has no line with web: and a command".to_owned());
        return None;
    };
    let evidence = format!("Procfile has the line web: {web}");
    let mut draft = command(files, web, evidence);
    let others: Vec<&str> = types.iter().map(|(name, _)| *name).filter(|name| *name != "web").collect();
    if !others.is_empty() {
        draft = draft.hint(format!("the other lines of Procfile are not run: {}", others.join(", ")));
    }
    Some(draft)
}

/// The type and the command of a line.
fn process(line: &str) -> Option<(&str, &str)> {
    let (name, command) = line.split_once(':')?;
    let is_name = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
    is_name.then_some((name, command.trim()))
}

/// A command with `$PORT` for `${PORT}` and `${PORT:-8000}`: the port is always set.
fn simple_port(command: &str) -> String {
    let mut parts = command.split("${PORT");
    let mut simple = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part.split_once('}') {
            Some((default, rest)) if default.is_empty() || default.starts_with(":-") => {
                simple.push_str("$PORT");
                simple.push_str(rest);
            }
            _ => {
                simple.push_str("${PORT");
                simple.push_str(part);
            }
        }
    }
    simple
}

/// The manifest for a command that listens on `$PORT`.
fn command(files: &Files, web: &str, evidence: String) -> Draft {
    let local = web.replace("0.0.0.0", "127.0.0.1");
    let because = if local == web { "" } else { "; on 127.0.0.1 alone, not on all interfaces" };
    let plain = simple_port(&local);
    let draft = Draft::new("the web process of a Procfile", "http", evidence);
    let mut words: Vec<String> = plain.replace("$PORT", "{port}").split_ascii_whitespace().map(str::to_owned).collect();
    let is_assignment = words.first().is_some_and(|word| word.contains('='));
    if is_assignment || plain.replace("$PORT", "").contains(SHELL) {
        let draft = draft
            .run("command", json!(["/bin/sh", "-c", plain]), format!("the line needs a shell{because}"))
            .run("listen", "port", "a Procfile's web process listens on $PORT")
            .run("prefix", "strip", "the application sees the path without the route");
        return if plain.contains(['{', '}']) {
            draft.hint("the command has braces, which mark placeholders in a manifest: put it into a script, and name that as the command")
        } else {
            draft
        };
    }
    let Some(program) = words.first().cloned() else { return draft };
    let (found, from) = if program.contains('/') { (program.clone(), String::new()) } else { python::tool(files, &program) };
    let from = if found == program { String::new() } else { format!("; {from}") };
    words[0] = found;
    let is_gunicorn = program == "gunicorn" && !plain.contains("uvicorn");
    let binds = words.iter().any(|word| word == "-b" || word.starts_with("-b=") || word.starts_with("--bind"));
    let listen = if is_gunicorn && !binds {
        // gunicorn would listen on all interfaces at PORT.
        words.splice(1..1, ["--bind".to_owned(), "unix:{socket}".to_owned()]);
        ("socket", "gunicorn makes the socket")
    } else {
        ("port", "a Procfile's web process listens on $PORT")
    };
    let roots = program == "uvicorn" && !words.iter().any(|word| word == "--root-path");
    if roots {
        words.extend(["--root-path".to_owned(), "{route}".to_owned()]);
    }
    let draft = draft.run("command", json!(words), format!("the web line{because}{from}")).run("listen", listen.0, listen.1);
    if is_gunicorn {
        python::with_script_name(draft)
    } else {
        let why =
            if roots { "uvicorn takes the prefix from --root-path" } else { "the application sees the path without the route" };
        draft.run("prefix", "strip", why)
    }
}
