//! Finds the script that answers a path. Pure, but for what is at a path.

use crate::apps::static_files::path::resolve;
use std::path::PathBuf;

/// The end of the names of scripts of FastCGI.
const SUFFIX: &[u8] = b".php";

/// Ends of the names of files with source code that are no scripts. They are not served either.
const SOURCES: [&[u8]; 3] = [b".phtml", b".phar", b".inc"];

/// What is at a path below the root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// A file, and whether it may be executed.
    File {
        executable: bool,
    },
    Directory,
    Missing,
    /// Something that is not served.
    Refused,
}

/// What makes a file a script.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rule {
    /// The end of its name. Other files are served as they are, and the index answers paths where nothing is.
    Suffix,
    /// That it may be executed. Nothing else is served.
    Executable,
}

/// Which scripts there are.
#[derive(Debug, Clone)]
pub(crate) struct Scripts {
    /// The directory of scripts, as an absolute path.
    pub(crate) root: PathBuf,
    /// The one script that answers every path, below the root.
    pub(crate) script: Option<String>,
    /// The files that stand for their directory.
    pub(crate) index: Vec<String>,
    pub(crate) rule: Rule,
}

/// A script that answers a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Script {
    /// Its path below the root.
    pub(crate) file: Vec<u8>,
    /// Its path as clients see it below the route, decoded. Empty if it is the route itself.
    pub(crate) name: Vec<u8>,
    /// The path behind that, decoded. Empty if there is none.
    pub(crate) info: Vec<u8>,
}

/// What answers a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Found {
    Script(Script),
    /// The host, from its files.
    Files,
    /// Nothing.
    Missing,
}

impl Scripts {
    /// Finds what answers a path below the route, which is as the client sent it.
    pub(crate) fn find(&self, below: &str, place: impl Fn(&[u8]) -> Place) -> Found {
        if let Some(script) = &self.script {
            // It gets every path that cannot lead it astray.
            let Some(info) = decode(below) else { return Found::Missing };
            let name = if self.rule == Rule::Suffix { [b"/", script.as_bytes()].concat() } else { Vec::new() };
            return Found::Script(Script { file: script.clone().into_bytes(), name, info });
        }
        if below.is_empty() {
            return if self.rule == Rule::Suffix { Found::Files } else { Found::Missing };
        }
        let Some(path) = resolve(below) else { return Found::Missing };
        let (bytes, slash) = (&path.bytes, if path.is_directory && !path.bytes.is_empty() { &b"/"[..] } else { b"" });
        if let Some(end) = self.script_in(bytes, &place) {
            let name = [b"/", &bytes[..end]].concat();
            let info = [&bytes[end..], slash].concat();
            return Found::Script(Script { file: bytes[..end].to_vec(), name, info });
        }
        if self.rule == Rule::Executable {
            return Found::Missing;
        }
        match if bytes.is_empty() { Place::Directory } else { place(bytes) } {
            Place::Directory if path.is_directory => self.index_of(bytes, &place).unwrap_or(Found::Files),
            Place::File { .. } if path.is_directory => self.front(&place),
            Place::File { .. } if holds_source(bytes) => Found::Missing,
            Place::Missing => self.front(&place),
            Place::File { .. } | Place::Directory | Place::Refused => Found::Files,
        }
    }

    /// The length of the beginning of a path that is a script's.
    fn script_in(&self, path: &[u8], place: &impl Fn(&[u8]) -> Place) -> Option<usize> {
        let ends = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
        for end in ends.chain([path.len()]).filter(|end| *end > 0) {
            if self.rule == Rule::Suffix && !is_named_script(&path[..end]) {
                continue;
            }
            match place(&path[..end]) {
                Place::File { executable } if executable || self.rule == Rule::Suffix => return Some(end),
                Place::Directory => {}
                // Nothing is below it either.
                Place::File { .. } | Place::Missing | Place::Refused => return None,
            }
        }
        None
    }

    /// The first index that a directory has.
    fn index_of(&self, directory: &[u8], place: &impl Fn(&[u8]) -> Place) -> Option<Found> {
        let slash = if directory.is_empty() { &b""[..] } else { b"/" };
        let paths = self.index.iter().map(|name| [directory, slash, name.as_bytes()].concat());
        let path = paths.into_iter().find(|path| matches!(place(path), Place::File { .. }))?;
        if !is_named_script(&path) {
            return Some(Found::Files);
        }
        Some(Found::Script(Script { name: [b"/", &path[..]].concat(), file: path, info: Vec::new() }))
    }

    /// The index of the root, if it is a script: the front controller, which answers where nothing is.
    fn front(&self, place: &impl Fn(&[u8]) -> Place) -> Found {
        let index = self.index_of(b"", place).filter(|found| matches!(found, Found::Script(_)));
        index.unwrap_or(Found::Files)
    }

    /// The index names of directories without a script, for which the host sends a file.
    pub(crate) fn plain_index(&self) -> Vec<String> {
        self.index.iter().filter(|name| !holds_source(name.as_bytes())).cloned().collect()
    }
}

/// Whether the last segment of a path is the name of a script.
fn is_named_script(path: &[u8]) -> bool {
    let name = path.rsplit(|&byte| byte == b'/').next().unwrap_or_default();
    name.len() > SUFFIX.len() && name.ends_with(SUFFIX)
}

/// Whether the name of a file says that it holds source code, such as a copy that an editor has made of a script.
fn holds_source(path: &[u8]) -> bool {
    let name = path.rsplit(|&byte| byte == b'/').next().unwrap_or_default().to_ascii_lowercase();
    name.windows(SUFFIX.len()).any(|part| part == SUFFIX) || SOURCES.into_iter().any(|suffix| name.ends_with(suffix))
}

/// Decodes the escapes of a path, once. None if one is malformed or NUL, or if a segment leads elsewhere.
fn decode(path: &str) -> Option<Vec<u8>> {
    let mut decoded = Vec::with_capacity(path.len());
    let mut rest = path.bytes();
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    while let Some(byte) = rest.next() {
        let byte = if byte == b'%' { digit(rest.next()?)? << 4 | digit(rest.next()?)? } else { byte };
        if byte == 0 {
            return None;
        }
        decoded.push(byte);
    }
    let leads_elsewhere = decoded.split(|&byte| byte == b'/').any(|segment| matches!(segment, b"." | b".."));
    if leads_elsewhere { None } else { Some(decoded) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is in the root; a name that ends with `*` may be executed.
    fn found(rule: Rule, script: Option<&str>, files: &[&str], path: &str) -> Found {
        let index = vec!["index.php".to_owned(), "index.html".to_owned()];
        let scripts = Scripts { root: "/srv".into(), script: script.map(str::to_owned), index, rule };
        scripts.find(path, |path| {
            let path = std::str::from_utf8(path).unwrap();
            assert!(!path.starts_with('/') && !path.split('/').any(|segment| segment.starts_with('.')), "{path}");
            if files.contains(&path) {
                return Place::File { executable: false };
            }
            if files.contains(&&*format!("{path}*")) {
                return Place::File { executable: true };
            }
            let below = format!("{path}/");
            if files.iter().any(|file| file.starts_with(&below)) { Place::Directory } else { Place::Missing }
        })
    }

    fn script(name: &str, info: &str) -> Found {
        let file = name.trim_start_matches('/').into();
        Found::Script(Script { file, name: name.into(), info: info.into() })
    }

    #[test]
    fn the_script_is_the_beginning_of_the_path_that_is_one() {
        let files =
            ["index.php", "a/b.php", "a/style.css", "c/index.html", "d/index.php", "e.php/f.php", "g/none", "Up.PHP", "x.php~"];
        for (path, expected) in [
            ("/", script("/index.php", "")),
            ("", Found::Files),
            ("/index.php", script("/index.php", "")),
            ("/index.php/", script("/index.php", "/")),
            ("/index.php/a%20b/c.php", script("/index.php", "/a b/c.php")),
            ("/a/b.php/x/", script("/a/b.php", "/x/")),
            ("/a/b%2ephp", script("/a/b.php", "")),
            ("/a/style.css", Found::Files),
            ("/a/style.css/", script("/index.php", "")),
            ("/a/style.css/b.php", script("/index.php", "")),
            ("/c/", Found::Files),
            ("/c", Found::Files),
            ("/d/", script("/d/index.php", "")),
            ("/d", Found::Files),
            ("/g/", Found::Files),
            ("/e.php/f.php/info", script("/e.php/f.php", "/info")),
            ("/no/such/page", script("/index.php", "")),
            ("/missing.php", script("/index.php", "")),
            ("/.php", Found::Missing),
            ("/Up.PHP", Found::Missing),
            ("/x.php~", Found::Missing),
        ] {
            assert_eq!(found(Rule::Suffix, None, &files, path), expected, "{path}");
        }
        assert_eq!(found(Rule::Suffix, None, &["a.html"], "/missing"), Found::Files);
        assert_eq!(found(Rule::Suffix, None, &["index.html"], "/missing"), Found::Files);
        for source in ["a.phtml", "a.inc", "index.php.bak", "a.PHP5"] {
            assert_eq!(found(Rule::Suffix, None, &[source], &format!("/{source}")), Found::Missing);
        }
    }

    #[test]
    fn hostile_paths_lead_to_no_script() {
        let files = ["index.php", "a/b.php"];
        for path in [
            "/../index.php",
            "/a/../index.php",
            "/a/%2e%2e/index.php",
            "/a/..%2findex.php",
            "/a%2fb.php",
            "//index.php",
            "/a//b.php",
            "/./index.php",
            "/index.php%00",
            "/index.php%00.css",
            "/index.php/../../etc/passwd",
            "/index.php/%2e%2e/x",
            "/index.php%",
            "/.git/config",
            "/plugrack.toml",
            "*",
        ] {
            assert_eq!(found(Rule::Suffix, None, &files, path), Found::Missing, "{path}");
            assert_eq!(found(Rule::Executable, None, &files, path), Found::Missing, "{path}");
        }
    }

    #[test]
    fn an_executable_file_is_a_script_of_cgi_and_nothing_else_is_served() {
        let files = ["run*", "a/tool.sh*", "data.txt", "index.html"];
        for (path, expected) in [
            ("/run", script("/run", "")),
            ("/run/", script("/run", "/")),
            ("/run/x/y", script("/run", "/x/y")),
            ("/a/tool.sh/z", script("/a/tool.sh", "/z")),
            ("/data.txt", Found::Missing),
            ("/data.txt/run", Found::Missing),
            ("/a/", Found::Missing),
            ("/", Found::Missing),
            ("", Found::Missing),
        ] {
            assert_eq!(found(Rule::Executable, None, &files, path), expected, "{path}");
        }
    }

    #[test]
    fn one_script_answers_every_path() {
        let all =
            |name: &str, info: &str| Found::Script(Script { file: b"app.php".to_vec(), name: name.into(), info: info.into() });
        for (path, info) in [("", ""), ("/", "/"), ("/a%2fb//c", "/a/b//c"), ("/.x", "/.x")] {
            assert_eq!(found(Rule::Suffix, Some("app.php"), &[], path), all("/app.php", info), "{path}");
            assert_eq!(found(Rule::Executable, Some("app.php"), &[], path), all("", info), "{path}");
        }
        for path in ["/%00", "/%", "/%4", "/%zz", "/a/../b", "/..", "/a/%2e%2E/b", "/a/..%2fb", "/./a"] {
            assert_eq!(found(Rule::Suffix, Some("app.php"), &[], path), Found::Missing, "{path}");
        }
    }
}
