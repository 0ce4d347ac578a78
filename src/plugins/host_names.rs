//! Host names, exact or with a wildcard, and what they lead to. Pure.

use crate::protocol::metadata::{LOCALHOST, WILDCARD};
use std::collections::HashMap;

/// Host names in lower case, and what they lead to.
///
/// A wildcard stands for one label or more, as in DNS (RFC 4592): `*.example.org` matches `a.example.org` and `b.a.example.org`, but not
/// `example.org`.
#[derive(Debug, Clone)]
pub(crate) struct NameMap<T> {
    exact: HashMap<Box<str>, T>,
    /// By what follows `*.`.
    wildcards: HashMap<Box<str>, T>,
}

impl<T> Default for NameMap<T> {
    fn default() -> Self {
        Self { exact: HashMap::new(), wildcards: HashMap::new() }
    }
}

impl<T> NameMap<T> {
    /// Adds a name. The first of two that are the same stays.
    pub(crate) fn add(&mut self, name: &str, leads_to: T) {
        match name.strip_prefix(WILDCARD) {
            Some(below) => self.wildcards.entry(below.into()).or_insert(leads_to),
            None => self.exact.entry(name.into()).or_insert(leads_to),
        };
    }

    /// Whether it has no names.
    pub(crate) fn is_empty(&self) -> bool {
        self.exact.is_empty() && self.wildcards.is_empty()
    }

    /// What a name in lower case leads to: by the exact name, or else by the longest wildcard.
    pub(crate) fn get(&self, name: &str) -> Option<&T> {
        self.exact.get(name).or_else(|| {
            if self.wildcards.is_empty() {
                return None;
            }
            name.match_indices('.').find_map(|(dot, _)| self.wildcards.get(&name[dot + 1..]))
        })
    }
}

/// The id of the plugin that a name at `localhost` stands for: `notes` for `notes.localhost`.
pub(crate) fn local_id(name: &str) -> Option<&str> {
    let id = name.strip_suffix(LOCALHOST)?.strip_suffix('.')?;
    (!id.is_empty() && !id.contains('.')).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exact_name_comes_before_the_longest_wildcard() {
        let mut names = NameMap::default();
        assert!(names.is_empty());
        let listed =
            ["example.org", "wiki.example.org", "*.example.org", "*.a.example.org", "*.org", "x.net", "wiki.example.org"];
        listed.into_iter().enumerate().for_each(|(number, name)| names.add(name, number));
        assert!(!names.is_empty());
        for (name, expected) in [
            ("example.org", Some(0)),
            ("wiki.example.org", Some(1)),
            ("other.example.org", Some(2)),
            ("a.example.org", Some(2)),
            ("b.a.example.org", Some(3)),
            ("c.b.a.example.org", Some(3)),
            ("d.wiki.example.org", Some(2)),
            ("example.com.org", Some(4)),
            ("org", None),
            ("x.net", Some(5)),
            ("y.x.net", None),
            ("wwiki.example.net", None),
            ("", None),
        ] {
            assert_eq!(names.get(name).copied(), expected, "{name}");
        }
    }

    #[test]
    fn a_name_at_localhost_stands_for_one_id() {
        assert_eq!(local_id("notes.localhost"), Some("notes"));
        for other in ["localhost", ".localhost", "a.notes.localhost", "notes.localhost.example", "noteslocalhost", ""] {
            assert_eq!(local_id(other), None, "{other}");
        }
    }
}
