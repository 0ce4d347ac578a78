//! The path of a request as a path below the root. Pure.

use crate::apps::manifest;

/// The one segment with a leading dot that is served, as the first of a path (RFC 8615).
const WELL_KNOWN: &[u8] = b".well-known";

/// The manifest, which lies in the root if that is the plugin's own directory. It may hold secrets.
const MANIFEST: &[u8] = manifest::FILE.as_bytes();

/// Bytes reserved for what is appended to a path: the name of an index, or the suffix of a content coding.
const RESERVE: usize = 32;

/// A decoded path below the root. None of its segments is empty or leads upwards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SitePath {
    /// The segments, with a slash between each two. Empty for the root.
    pub(super) bytes: Vec<u8>,
    /// Whether the path ends with a slash, which is how a directory is asked for.
    pub(super) is_directory: bool,
}

/// Decodes a path that begins with a slash, once. None if nothing is ever served there: a malformed escape, NUL, an escaped slash, an
/// empty segment, and a segment that begins with a dot, which includes `.` and `..`.
pub(super) fn resolve(path: &str) -> Option<SitePath> {
    let path = path.strip_prefix('/')?.as_bytes();
    let mut bytes = Vec::with_capacity(path.len() + RESERVE);
    let mut start = 0;
    let mut rest = path.iter();
    while let Some(&byte) = rest.next() {
        match byte {
            b'/' => {
                check_segment(&bytes, start)?;
                bytes.push(b'/');
                start = bytes.len();
            }
            b'%' => {
                let decoded = hex(*rest.next()?)? << 4 | hex(*rest.next()?)?;
                // An escaped slash would be read as a separator by the file system alone.
                if matches!(decoded, 0 | b'/') {
                    return None;
                }
                bytes.push(decoded);
            }
            0 => return None,
            byte => bytes.push(byte),
        }
    }
    let is_directory = start == bytes.len();
    if is_directory {
        bytes.pop();
    } else {
        check_segment(&bytes, start)?;
    }
    Some(SitePath { bytes, is_directory })
}

/// Whether `name` can be a file's name in a path: one segment that is served.
pub(super) fn is_file_name(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\0'])
}

/// None if the last segment, which begins at `start`, is not served.
fn check_segment(bytes: &[u8], start: usize) -> Option<()> {
    let segment = bytes.get(start..)?;
    let is_served = match segment.first()? {
        b'.' => start == 0 && segment == WELL_KNOWN,
        _ => segment != MANIFEST,
    };
    is_served.then_some(())
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn paths_are_decoded_once() {
        for (path, bytes, is_directory) in [
            ("/", &b""[..], true),
            ("/a", b"a", false),
            ("/a/", b"a", true),
            ("/a/b.html", b"a/b.html", false),
            ("/a%20b", b"a b", false),
            ("/t%C3%b6", "tö".as_bytes(), false),
            ("/%ff", b"\xff", false),
            ("/%2541", b"%41", false),
            ("/%252e%252e/a", b"%2e%2e/a", false),
            ("/a.", b"a.", false),
            ("/a..b", b"a..b", false),
            ("/a\\..\\b", b"a\\..\\b", false),
            ("/.well-known/", b".well-known", true),
            ("/.well-known/acme/a", b".well-known/acme/a", false),
            ("/%2ewell-known/a", b".well-known/a", false),
        ] {
            assert_eq!(resolve(path), Some(SitePath { bytes: bytes.to_vec(), is_directory }), "{path}");
        }
    }

    #[test]
    fn what_is_never_served_is_no_path() {
        for path in [
            "",
            "a",
            "*",
            "//",
            "//a",
            "/a//",
            "/a//b",
            "/.",
            "/..",
            "/../a",
            "/a/..",
            "/a/../b",
            "/a/./b",
            "/%2e%2e/a",
            "/%2E%2e",
            "/.%2e/a",
            "/a/%2e./b",
            "/a%2fb",
            "/a%2Fb",
            "/..%2fa",
            "/%2fa",
            "/a%00",
            "/%00",
            "/a\0b",
            "/.git",
            "/.git/config",
            "/%2egit",
            "/a/.b",
            "/...",
            "/.well-known/.a",
            "/a/.well-known",
            "/a/.well-known/b",
            "/plugrack.toml",
            "/plugrack%2etoml",
            "/a/plugrack.toml",
            "/.well-knowns",
            "/.well-know",
            "/%",
            "/%4",
            "/%zz",
            "/a%",
            "/%+1",
        ] {
            assert_eq!(resolve(path), None, "{path}");
        }
    }

    #[test]
    fn a_file_name_is_one_segment() {
        assert!(["index.html", "a", "a b", "ä"].into_iter().all(is_file_name));
        assert!(!["", ".", "..", ".a", "a/b", "/a", "a\0"].into_iter().any(is_file_name));
    }

    proptest! {
        #[test]
        fn no_path_has_a_segment_that_leads_elsewhere(path in "(/|\\.|%2e|%2E|%2f|%5c|%00|\\\\|a|%25|b){0,12}") {
            if let Some(resolved) = resolve(&path) {
                let mut segments = resolved.bytes.split(|&byte| byte == b'/');
                prop_assert!(resolved.bytes.is_empty() || segments.all(|segment| !segment.is_empty() && segment[0] != b'.'));
                prop_assert!(!resolved.bytes.contains(&0));
                prop_assert_eq!(resolved.is_directory, path.ends_with('/'));
            }
        }
    }
}
