//! Finds the links of a page that lead out of the route below which the page is served. Pure.

use crate::http::request::{named, split_target};
use html5gum::{DefaultEmitter, StartTag, Token, Tokenizer};
use serde::Serialize;
use std::collections::HashSet;

/// Attributes that lead to other resources.
const ATTRIBUTES: [&str; 3] = ["href", "src", "action"];

/// Most links that are kept as examples.
const MAX_EXAMPLES: usize = 5;

/// Where a page is, as its client sees it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place<'a> {
    /// The route.
    pub(crate) route: &'a str,
    /// The value of the request's `host`.
    pub(crate) host: &'a str,
}

/// A link of a page.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Link {
    /// The name of its element, such as `script`.
    pub(crate) element: String,
    /// `href`, `src` or `action`.
    pub(crate) attribute: &'static str,
    /// The path to which it leads, shortened.
    pub(crate) path: String,
}

/// The links of a page that lead out of its route.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct OutsideLinks {
    /// Number of paths to which they lead.
    pub(crate) count: usize,
    /// The first of them.
    pub(crate) examples: Vec<Link>,
}

impl Place<'_> {
    /// Whether a path is the route or below it.
    pub(crate) fn holds(&self, path: &str) -> bool {
        path.strip_prefix(self.route).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }

    /// The path and query of a reference to this host by an absolute path, with or without scheme and host; none for any other.
    pub(crate) fn absolute<'r>(&self, reference: &'r str) -> Option<&'r str> {
        let (reference, _) = reference.split_once('#').unwrap_or((reference, ""));
        let authority = ["http://", "https://", "//"].into_iter().find_map(|start| strip_start(reference, start));
        let target = match authority {
            Some(authority) => strip_start(authority, self.host)?,
            None => reference,
        };
        target.starts_with('/').then_some(target)
    }

    /// Finds the links of a page that lead to an absolute path outside of the route, but for those to which `is_meant` applies, by
    /// element and path. The page may be cut anywhere.
    pub(crate) fn outside(&self, page: &[u8], is_meant: impl Fn(&str, &str) -> bool) -> OutsideLinks {
        let mut emitter = DefaultEmitter::default();
        // What looks like a tag in a script or a style sheet is none.
        emitter.naively_switch_states(true);
        let (mut outside, mut seen) = (OutsideLinks::default(), HashSet::new());
        for token in Tokenizer::new_with_emitter(page, emitter) {
            let Ok(Token::StartTag(tag)) = token else { continue };
            let element = String::from_utf8_lossy(&tag.name);
            for attribute in ATTRIBUTES {
                let Some(value) = value_of(&tag, attribute) else { continue };
                let Some(path) = self.absolute(&value).map(|target| split_target(target).0) else { continue };
                if self.holds(path) || is_meant(&element, path) || !seen.insert(path.to_owned()) {
                    continue;
                }
                outside.count += 1;
                if outside.examples.len() < MAX_EXAMPLES {
                    outside.examples.push(Link { element: named(&element), attribute, path: named(path) });
                }
            }
        }
        outside
    }
}

/// The value of an attribute, as a browser reads a reference: without the white space around it.
fn value_of(tag: &StartTag<()>, attribute: &str) -> Option<String> {
    let value = tag.attributes.get(attribute.as_bytes())?;
    Some(String::from_utf8_lossy(value.trim_ascii()).into_owned())
}

/// What follows a beginning, in any case.
fn strip_start<'t>(text: &'t str, start: &str) -> Option<&'t str> {
    let (beginning, rest) = text.split_at_checked(start.len())?;
    beginning.eq_ignore_ascii_case(start).then_some(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;

    const PLACE: Place<'_> = Place { route: "/wiki", host: "h.example:8080" };

    /// The links that are found: element, attribute and path.
    fn found(page: &str) -> Vec<String> {
        let OutsideLinks { count, examples } = PLACE.outside(page.as_bytes(), |element, path| element == "a" && path == "/");
        assert!(count >= examples.len());
        examples.iter().map(|Link { element, attribute, path }| format!("{element} {attribute} {path}")).collect()
    }

    #[test]
    fn absolute_paths_outside_of_the_route_are_found_wherever_they_stand() {
        for (page, expected) in [
            ("<script src=/static/app.js></script>", "script src /static/app.js"),
            ("<!doctype html><LINK REL=stylesheet HREF='/a.css?v=1#x'>", "link href /a.css"),
            ("<form method=post action=\" /login \">", "form action /login"),
            ("<img src='&#x2F;static&#x2f;a&amp;b.png'>", "img src /static/a&b.png"),
            ("<a href=http://h.example:8080/other>", "a href /other"),
            ("<a href=HTTPS://H.example:8080/other>", "a href /other"),
            ("<a href=//h.example:8080/other>", "a href /other"),
            ("<a href=/wikipedia>", "a href /wikipedia"),
            ("<base href=\"/\">", "base href /"),
            ("<p>a < b</p><a\nhref = '/x'", ""),
            ("<p>a < b</p><a\nhref = '/x'>", "a href /x"),
            ("<title><a href=/x></title><a href=/y>", "a href /y"),
        ] {
            assert_eq!(found(page).join(", "), expected, "{page}");
        }
    }

    #[test]
    fn other_links_are_not() {
        for page in [
            "",
            "plain text",
            "<a href=/wiki><a href=/wiki/><a href='/wiki?a=/b'><a href=/wiki#top><script src=/wiki/app.js>",
            "<a href=page><a href=./page><a href=?a=b><a href='#top'><a href=''><a href>",
            "<a href=https://other.example/x><script src=//cdn.example/x.js><a href=//h.example/x><a href=http://h.example:80801/x>",
            "<a href=mailto:a@b><a href=javascript:x()><img src=data:image/png;base64,/x>",
            "<script>const page = '<a href=\"/x\">'</script><style>/*<a href=/x>*/</style><!-- <a href=/x> -->",
            "<textarea><a href=/x></textarea><p data-href=/x>/x</p>",
            "<a href=/>Start</a>",
        ] {
            assert_eq!(found(page), Vec::<String>::new(), "{page}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_page(page in prop::collection::vec(prop_oneof![
            3 => prop::sample::select(&b"<>/=\"'!-&#;x? \n"[..]),
            1 => any::<u8>(),
        ], 0..300)) {
            // Cut anywhere, as the limit of a page does it.
            for end in [page.len(), page.len() / 2] {
                let outside = PLACE.outside(&page[..end], |_, _| false);
                prop_assert!(outside.examples.len() <= outside.count.min(MAX_EXAMPLES));
            }
        }
    }

    #[test]
    fn each_path_counts_once_and_few_are_kept() {
        let page: String = (0..1000).map(|number| format!("<img src=/{}.png>", number % 100)).collect();
        let outside = PLACE.outside(page.as_bytes(), |_, _| false);
        assert_eq!((outside.count, outside.examples.len()), (100, MAX_EXAMPLES));
        let long = format!("<img src=/{}>\u{202e}", "x".repeat(10_000));
        assert!(PLACE.outside(long.as_bytes(), |_, _| false).examples[0].path.len() < 300);
    }
}
