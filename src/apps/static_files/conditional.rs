//! Validators of a file, and the conditions of a request (RFC 9110, sections 8.8 and 13). Pure.

use super::coding::Accepted;
use crate::http::request::split_head;
use memchr::memchr;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Age from which the `etag` of a file is strong. The kernel's times of a file have ticks of up to 10 ms, so a younger file could change
/// once more without a trace in them; RFC 9110, section 8.8.2.2, asks for a second for the same reason.
const SETTLED: Duration = Duration::from_secs(1);

/// The first second of the year 10000, which an HTTP date cannot express.
const END: u64 = 253_402_300_800;

/// What tells a version of a file from another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Version {
    /// Length in bytes.
    pub(super) size: u64,
    /// Inode, so that a replacement of the same size and time is another version.
    pub(super) inode: u64,
    /// Time of the last change of the content: seconds and nanoseconds since 1970.
    pub(super) modified: (i64, u64),
    /// Time of the last change of the content or the inode, which nobody can set.
    pub(super) changed: (i64, u64),
}

/// The validators of a file in one content coding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Validators {
    /// The opaque part of the `etag`, in its quotes.
    tag: String,
    is_weak: bool,
    /// `last-modified` in seconds since 1970. None before that year.
    modified: Option<u64>,
}

/// What the conditions of a request make of its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The file is sent, or the `range` of it that the request has.
    Send { range: bool },
    /// 304.
    NotModified,
    /// 412.
    Failed,
}

/// The headers of a request that decide how a file is sent.
#[derive(Debug, Default)]
pub(super) struct Conditions<'a> {
    if_match: Vec<&'a [u8]>,
    if_none_match: Vec<&'a [u8]>,
    if_modified_since: Single<'a>,
    if_unmodified_since: Single<'a>,
    if_range: Single<'a>,
    range: Single<'a>,
    /// The content codings that the client accepts.
    pub(super) accepted: Accepted,
}

/// A header that may come once.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Single<'a> {
    #[default]
    Missing,
    Given(&'a str),
    /// It came twice, or is not text.
    Malformed,
}

impl<'a> Single<'a> {
    fn read(&mut self, value: &'a [u8]) {
        *self = match (*self, std::str::from_utf8(value)) {
            (Self::Missing, Ok(text)) => Self::Given(text),
            _ => Self::Malformed,
        };
    }

    /// The value, if there is one.
    fn text(self) -> Option<&'a str> {
        if let Self::Given(text) = self { Some(text) } else { None }
    }

    /// The value as seconds since 1970. A malformed date counts as missing (sections 13.1.3 and 13.1.4).
    fn date(self) -> Option<u64> {
        let date = httpdate::parse_http_date(self.text()?).ok()?;
        date.duration_since(UNIX_EPOCH).ok().map(|since| since.as_secs())
    }
}

impl<'a> Conditions<'a> {
    /// Gathers the headers from a canonical head, in one pass.
    pub(super) fn of(head: &'a [u8]) -> Self {
        let mut found = Self::default();
        let mut rest = split_head(head).2;
        while let Some(end) = memchr(b'\n', rest) {
            let line = rest[..end].strip_suffix(b"\r").unwrap_or(&rest[..end]);
            rest = &rest[end + 1..];
            let Some(colon) = memchr(b':', line) else { continue };
            let value = line[colon + 1..].trim_ascii();
            match &line[..colon] {
                b"accept-encoding" => found.accepted.read(std::str::from_utf8(value).unwrap_or_default()),
                b"if-match" => found.if_match.push(value),
                b"if-none-match" => found.if_none_match.push(value),
                b"if-modified-since" => found.if_modified_since.read(value),
                b"if-unmodified-since" => found.if_unmodified_since.read(value),
                b"if-range" => found.if_range.read(value),
                b"range" => found.range.read(value),
                _ => {}
            }
        }
        found
    }

    /// The `range`, if it came once.
    pub(super) fn range(&self) -> Option<&'a str> {
        self.range.text()
    }

    /// Evaluates the conditions in the order of section 13.2.2, for `GET` and `HEAD`.
    pub(super) fn evaluate(&self, file: &Validators) -> Verdict {
        let holds = if !self.if_match.is_empty() {
            self.if_match.iter().any(|line| names(line, |tag, is_weak| !is_weak && !file.is_weak && tag == file.tag.as_bytes()))
        } else {
            match (self.if_unmodified_since.date(), file.modified) {
                (Some(date), Some(modified)) => modified <= date,
                _ => true,
            }
        };
        if !holds {
            return Verdict::Failed;
        }
        let is_known = if !self.if_none_match.is_empty() {
            self.if_none_match.iter().any(|line| names(line, |tag, _| tag == file.tag.as_bytes()))
        } else {
            matches!((self.if_modified_since.date(), file.modified), (Some(date), Some(modified)) if modified <= date)
        };
        if is_known { Verdict::NotModified } else { Verdict::Send { range: self.is_range_current(file) } }
    }

    /// Whether `if-range`, if it is there, names this version of the file (section 13.1.5).
    fn is_range_current(&self, file: &Validators) -> bool {
        match self.if_range {
            Single::Missing => true,
            Single::Malformed => false,
            Single::Given(value) if value.ends_with('"') => !file.is_weak && value == file.tag,
            // A date says as much as a weak tag until it is a second old.
            Single::Given(_) => !file.is_weak && file.modified.is_some() && self.if_range.date() == file.modified,
        }
    }
}

/// Whether a list of entity tags is `*`, or has a tag that `matches`, which gets its opaque part with the quotes, and whether it is weak. What
/// stands behind a malformed tag is ignored.
fn names(list: &[u8], matches: impl Fn(&[u8], bool) -> bool) -> bool {
    if list == b"*" {
        return true;
    }
    let mut rest = list;
    loop {
        while let [b',' | b' ' | b'\t', behind @ ..] = rest {
            rest = behind;
        }
        let (opaque, is_weak) = rest.strip_prefix(b"W/").map_or((rest, false), |opaque| (opaque, true));
        let Some(end) = opaque.strip_prefix(b"\"").and_then(|inner| memchr(b'"', inner)) else { return false };
        let (tag, behind) = opaque.split_at(end + 2);
        if matches(tag, is_weak) {
            return true;
        }
        rest = behind;
    }
}

impl Validators {
    /// The validators of a version of a file in a content coding, at this time.
    pub(super) fn new(version: Version, coding: &str, now: SystemTime) -> Self {
        let mut hasher = DefaultHasher::new();
        (version, coding).hash(&mut hasher);
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let (seconds, nanoseconds) = version.modified;
        let modified = u64::try_from(seconds).ok();
        let age = modified.and_then(|seconds| now.checked_sub(Duration::from_secs(seconds) + Duration::from_nanos(nanoseconds)));
        Self {
            tag: format!("\"{:x}-{:016x}\"", version.size, hasher.finish()),
            is_weak: modified.is_some() && age.is_none_or(|age| age < SETTLED),
            // Section 8.8.2.1: never later than the answer.
            modified: modified.map(|seconds| seconds.min(now.as_secs()).min(END - 1)),
        }
    }

    /// The value of `etag`.
    pub(super) fn etag(&self) -> String {
        if self.is_weak { format!("W/{}", self.tag) } else { self.tag.clone() }
    }

    /// The value of `last-modified`.
    pub(super) fn last_modified(&self) -> Option<String> {
        self.modified.map(|seconds| httpdate::fmt_http_date(UNIX_EPOCH + Duration::from_secs(seconds)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const VERSION: Version = Version { size: 4096, inode: 7, modified: (784_111_777, 5), changed: (784_111_778, 6) };
    const DATE: &str = "Sun, 06 Nov 1994 08:49:37 GMT";
    const BEFORE: &str = "Sun, 06 Nov 1994 08:49:36 GMT";
    const AFTER: &str = "Sunday, 06-Nov-94 08:49:38 GMT";

    fn at(second: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(second)
    }

    fn old() -> Validators {
        Validators::new(VERSION, "", at(900_000_000))
    }

    fn young() -> Validators {
        Validators::new(VERSION, "", at(784_111_778))
    }

    /// The verdict on these lines, in which `TAG` stands for the opaque part of the file's tag.
    fn verdict(file: &Validators, lines: &[&str]) -> Verdict {
        let mut head = b"GET / HTTP/1.1\r\nhost: h\r\n".to_vec();
        for line in lines {
            head.extend_from_slice(line.replace("TAG", &file.tag).as_bytes());
            head.extend_from_slice(b"\r\n");
        }
        Conditions::of(&head).evaluate(file)
    }

    const SEND: Verdict = Verdict::Send { range: true };
    const SEND_WHOLE: Verdict = Verdict::Send { range: false };

    #[test]
    fn every_difference_makes_another_tag() {
        let versions = [
            VERSION,
            Version { size: 4097, ..VERSION },
            Version { inode: 8, ..VERSION },
            Version { modified: (784_111_777, 6), ..VERSION },
            Version { changed: (784_111_778, 7), ..VERSION },
        ];
        let mut tags: Vec<_> = versions
            .iter()
            .flat_map(|version| ["", "gzip"].map(|coding| Validators::new(*version, coding, at(900_000_000)).etag()))
            .collect();
        tags.sort();
        tags.dedup();
        assert_eq!(tags.len(), 10, "{tags:?}");
        assert!(tags.iter().all(|tag| tag.starts_with('"') && tag.ends_with('"')), "{tags:?}");
        assert_eq!(old(), old());
    }

    #[test]
    fn a_young_file_has_a_weak_tag_and_no_date_is_in_the_future() {
        assert_eq!(young().etag(), format!("W/{}", old().etag()));
        assert_eq!(old().last_modified().as_deref(), Some(DATE));
        let early = Validators::new(VERSION, "", at(784_111_776));
        assert!(early.is_weak);
        assert_eq!(early.last_modified().as_deref(), Some(BEFORE));
        let ancient = Validators::new(Version { modified: (-1, 0), ..VERSION }, "", at(900_000_000));
        assert_eq!((ancient.last_modified(), ancient.is_weak), (None, false));
        let late = Validators::new(Version { modified: (i64::MAX, 999_999_999), ..VERSION }, "", at(END + 5));
        assert_eq!(late.last_modified().as_deref(), Some("Fri, 31 Dec 9999 23:59:59 GMT"));
    }

    #[test]
    fn if_none_match_and_if_modified_since_spare_the_body() {
        for (lines, expected) in [
            (&[][..], SEND),
            (&["if-none-match: TAG"], Verdict::NotModified),
            (&["if-none-match: W/TAG"], Verdict::NotModified),
            (&["if-none-match: *"], Verdict::NotModified),
            (&["if-none-match: \"a\" ,, W/\"b,c\",TAG"], Verdict::NotModified),
            (&["if-none-match: \"a\"", "if-none-match: TAG"], Verdict::NotModified),
            (&["if-none-match: \"a\""], SEND),
            (&["if-none-match: "], SEND),
            (&["if-none-match: unquoted, TAG"], SEND),
            (&["if-none-match: \"open"], SEND),
            (&["if-none-match: w/TAG"], SEND),
            (&[&format!("if-modified-since: {DATE}")], Verdict::NotModified),
            (&[&format!("if-modified-since: {AFTER}")], Verdict::NotModified),
            (&[&format!("if-modified-since: {BEFORE}")], SEND),
            (&["if-modified-since: yesterday"], SEND),
            (&["if-modified-since: Thu, 01 Jan 1970 00:00:00 GMT"], SEND),
            (&[&format!("if-modified-since: {DATE}"), &format!("if-modified-since: {DATE}")], SEND),
            // The tag says more than the date.
            (&["if-none-match: \"a\"", &format!("if-modified-since: {DATE}")], SEND),
        ] {
            assert_eq!(verdict(&old(), lines), expected, "{lines:?}");
        }
        assert_eq!(verdict(&young(), &["if-none-match: TAG"]), Verdict::NotModified);
    }

    #[test]
    fn if_match_and_if_unmodified_since_refuse_another_version() {
        for (lines, expected) in [
            (&["if-match: TAG"][..], SEND),
            (&["if-match: *"], SEND),
            (&["if-match: \"a\", TAG"], SEND),
            (&["if-match: \"a\"", "if-match: TAG"], SEND),
            (&["if-match: W/TAG"], Verdict::Failed),
            (&["if-match: \"a\""], Verdict::Failed),
            (&["if-match: "], Verdict::Failed),
            (&[&format!("if-unmodified-since: {DATE}")], SEND),
            (&[&format!("if-unmodified-since: {AFTER}")], SEND),
            (&[&format!("if-unmodified-since: {BEFORE}")], Verdict::Failed),
            (&["if-unmodified-since: yesterday"], SEND),
            (&["if-match: TAG", &format!("if-unmodified-since: {BEFORE}")], SEND),
            (&["if-match: TAG", "if-none-match: TAG"], Verdict::NotModified),
            (&["if-match: \"a\"", "if-none-match: TAG"], Verdict::Failed),
        ] {
            assert_eq!(verdict(&old(), lines), expected, "{lines:?}");
        }
        assert_eq!(verdict(&young(), &["if-match: TAG"]), Verdict::Failed);
        let mut head = b"GET / HTTP/1.1\r\nif-match: \"\xff\"\r\n".to_vec();
        assert_eq!(Conditions::of(&head).evaluate(&old()), Verdict::Failed);
        head.truncate(16);
        assert_eq!(Conditions::of(&head).evaluate(&old()), SEND);
    }

    #[test]
    fn if_range_keeps_parts_of_two_versions_apart() {
        for (line, expected) in [
            ("if-range: TAG".to_owned(), SEND),
            (format!("if-range: {DATE}"), SEND),
            ("if-range: W/TAG".to_owned(), SEND_WHOLE),
            ("if-range: \"a\"".to_owned(), SEND_WHOLE),
            (format!("if-range: {BEFORE}"), SEND_WHOLE),
            (format!("if-range: {AFTER}"), SEND_WHOLE),
            ("if-range: ".to_owned(), SEND_WHOLE),
            ("if-range: TAG\r\nif-range: TAG".to_owned(), SEND_WHOLE),
        ] {
            assert_eq!(verdict(&old(), &[&line]), expected, "{line}");
        }
        assert_eq!(verdict(&young(), &["if-range: TAG"]), SEND_WHOLE);
        assert_eq!(verdict(&young(), &[&format!("if-range: {DATE}")]), SEND_WHOLE);
    }

    proptest! {
        #[test]
        fn no_date_and_no_list_is_too_strange(date in "[A-Z][a-z]{2}(day)?,? [0-9]{2}[ -]([A-Z][a-z]{2})[ -][0-9]{2,4} [0-9:]{8} GMT", list in "[W/\", *a-]{0,20}") {
            let lines = ["if-modified-since", "if-unmodified-since", "if-range"].map(|name| format!("{name}: {date}"));
            let lists = ["if-match", "if-none-match", "if-range"].map(|name| format!("{name}: {list}"));
            for line in lines.iter().chain(&lists) {
                verdict(&old(), &[line]);
            }
        }
    }

    #[test]
    fn a_range_that_comes_twice_is_none() {
        let range = |head: &'static [u8]| Conditions::of(head).range();
        assert_eq!(range(b"GET / HTTP/1.1\r\nrange: bytes=0-1\r\n"), Some("bytes=0-1"));
        assert_eq!(range(b"GET / HTTP/1.1\r\nrange: bytes=0-1\r\nrange: bytes=0-1\r\n"), None);
        assert_eq!(range(b"GET / HTTP/1.1\r\nhost: h\r\n"), None);
    }
}
