//! The media type of a file, by the suffix of its name. Pure.

use std::borrow::Cow;

/// The type of a file whose suffix is not known. With `nosniff`, a browser saves it and does not guess.
const UNKNOWN: &str = "application/octet-stream";

/// The type of a page.
pub(super) const HTML: &str = "text/html; charset=utf-8";

/// Types of text that do not begin with `text/`.
const TEXTS: [&str; 3] = ["application/javascript", "application/ecmascript", "application/x-javascript"];

/// Types whose files are compressed by themselves, so that no compressed file is looked for beside them. Beginnings, because the formats
/// of images, sound and video are compressed with few exceptions.
const COMPRESSED: [&str; 13] = [
    "image/",
    "audio/",
    "video/",
    "font/woff",
    "application/font-woff",
    "application/zip",
    "application/gzip",
    "application/x-7z",
    "application/x-bzip",
    "application/x-xz",
    "application/x-rar",
    "application/zstd",
    "application/java-archive",
];

/// The exceptions among [`COMPRESSED`].
const PLAIN_IMAGES: [&str; 4] = ["image/svg+xml", "image/x-icon", "image/bmp", "image/vnd.microsoft.icon"];

/// The type of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct MediaType {
    /// The value of `content-type`, with `charset` if it is text.
    pub(super) value: Cow<'static, str>,
    /// Whether a compressed file may stand for one of this type.
    pub(super) is_compressible: bool,
}

/// The type of the file at a path.
pub(super) fn of(path: &[u8]) -> MediaType {
    let kind = known(path);
    let value = match kind {
        "text/html" => HTML.into(),
        text if text.starts_with("text/") || TEXTS.contains(&text) => format!("{text}; charset=utf-8").into(),
        other => other.into(),
    };
    let is_compressed = !PLAIN_IMAGES.contains(&kind) && COMPRESSED.iter().any(|beginning| kind.starts_with(beginning));
    MediaType { value, is_compressible: !is_compressed }
}

fn known(path: &[u8]) -> &'static str {
    let name = path.rsplit(|&byte| byte == b'/').next().unwrap_or_default();
    let dot = memchr::memrchr(b'.', name);
    let suffix = dot.and_then(|dot| std::str::from_utf8(&name[dot + 1..]).ok());
    suffix.and_then(|suffix| mime_guess::from_ext(suffix).first_raw()).unwrap_or(UNKNOWN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_suffix_decides_and_text_is_utf_8() {
        for (path, expected) in [
            ("index.html", "text/html; charset=utf-8"),
            ("a/b/INDEX.HTM", "text/html; charset=utf-8"),
            ("a.css", "text/css; charset=utf-8"),
            ("a.js", "text/javascript; charset=utf-8"),
            ("a.mjs", "application/javascript; charset=utf-8"),
            ("a.txt", "text/plain; charset=utf-8"),
            ("a.min.js.map", "text/plain; charset=utf-8"),
            ("a.json", "application/json"),
            ("a.webmanifest", "application/manifest+json"),
            ("a.wasm", "application/wasm"),
            ("a.svg", "image/svg+xml"),
            ("a.png", "image/png"),
            ("a.avif", "image/avif"),
            ("a.woff2", "font/woff2"),
            ("a.pdf", "application/pdf"),
            ("a.tar.gz", "application/gzip"),
            ("a", UNKNOWN),
            ("a.", UNKNOWN),
            ("html", UNKNOWN),
            ("a.html/b", UNKNOWN),
            ("a.nothing-known", UNKNOWN),
            ("", UNKNOWN),
        ] {
            assert_eq!(of(path.as_bytes()).value, expected, "{path}");
        }
        assert_eq!(of(b"a.\xff").value, UNKNOWN);
    }

    #[test]
    fn compressed_formats_have_no_compressed_files_beside_them() {
        for path in ["a.html", "a.js", "a.json", "a.svg", "a.ico", "a.wasm", "a.ttf", "a.data", "LICENSE"] {
            assert!(of(path.as_bytes()).is_compressible, "{path}");
        }
        for path in ["a.png", "a.jpg", "a.webp", "a.mp4", "a.mp3", "a.woff", "a.woff2", "a.zip", "a.gz", "a.7z", "a.xz", "a.jar"]
        {
            assert!(!of(path.as_bytes()).is_compressible, "{path}");
        }
    }
}
