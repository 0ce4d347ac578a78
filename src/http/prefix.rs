//! Maps the headers of a response whose author does not know the route that it is mounted on: `Location`, `Content-Location`, `Refresh` and
//! the `Path` of cookies. Pure.
//!
//! A path that already begins with the route stays as it is: its author knows the route after all. Bodies are never changed.

use super::Request;
use super::request::split_target;
use std::borrow::Cow;

/// Where a plugin is mounted, as its client sees it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mount<'a> {
    /// The route; empty if the plugin has the whole origin.
    pub(crate) route: &'a str,
    /// The value of the request's `host`.
    pub(crate) host: &'a str,
}

impl<'a> Mount<'a> {
    /// Where the plugin of a request is mounted.
    pub(crate) fn of(request: &'a Request) -> Self {
        let route = split_target(request.target()).0.get(..request.mount).unwrap_or_default();
        Self { route, host: request.header("host").unwrap_or_default() }
    }

    /// The value that the client gets for a header of this name, in any case.
    pub(crate) fn map<'v>(&self, name: &str, value: &'v [u8]) -> Cow<'v, [u8]> {
        let is = |other: &str| name.eq_ignore_ascii_case(other);
        let mapped = if self.route.is_empty() {
            None
        } else if is("location") || is("content-location") {
            self.reference(value)
        } else if is("refresh") {
            self.refresh(value)
        } else if is("set-cookie") {
            self.cookie(value)
        } else {
            None
        };
        mapped.map_or(Cow::Borrowed(value), Cow::Owned)
    }

    /// A reference (RFC 9110, section 10.2.2) to this host, by its path or with scheme and host. None if it stays as it is.
    fn reference(&self, value: &[u8]) -> Option<Vec<u8>> {
        let path = self.path_in(value)?;
        let mapped = self.path(&value[path..])?;
        Some([&value[..path], &mapped].concat())
    }

    /// Where the path begins in a reference to this host.
    fn path_in(&self, value: &[u8]) -> Option<usize> {
        let authority = match value {
            [b'/', b'/', ..] => 2,
            [b'/', ..] => return Some(0),
            _ => ["http://", "https://"].into_iter().find(|scheme| begins(value, scheme))?.len(),
        };
        let path = authority + self.host.len();
        let is_host = !self.host.is_empty() && begins(&value[authority..], self.host);
        (is_host && value.get(path) == Some(&b'/')).then_some(path)
    }

    /// An absolute path below the route; none if it is there already.
    fn path(&self, path: &[u8]) -> Option<Vec<u8>> {
        let is_below =
            path.strip_prefix(self.route.as_bytes()).is_some_and(|rest| matches!(rest.first(), None | Some(b'/' | b'?' | b'#')));
        if is_below { None } else { Some([self.route.as_bytes(), path].concat()) }
    }

    /// `5; url=/next`, with or without quotes.
    fn refresh(&self, value: &[u8]) -> Option<Vec<u8>> {
        let at = value.windows(4).position(|window| window.eq_ignore_ascii_case(b"url="))? + 4;
        let at = at + usize::from(matches!(value.get(at), Some(b'"' | b'\'')));
        Some([&value[..at], &self.reference(&value[at..])?].concat())
    }

    /// A cookie with a `Path` (RFC 6265, section 4.1.2.4). Without one, its path is that of the request, which is below the route.
    fn cookie(&self, value: &[u8]) -> Option<Vec<u8>> {
        let mut at = 0;
        for (index, attribute) in value.split(|&byte| byte == b';').enumerate() {
            let name = attribute.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
            if index > 0 && begins(&attribute[name..], "path") {
                let rest = attribute[name + 4..].trim_ascii_start();
                let path = rest.strip_prefix(b"=").map(<[u8]>::trim_ascii);
                let Some(path) = path.filter(|path| path.starts_with(b"/")) else {
                    at += attribute.len() + 1;
                    continue;
                };
                // A cookie for everything of the application is one for everything below the route, the bare route included.
                let mapped = if path == b"/" { self.route.as_bytes().to_vec() } else { self.path(path)? };
                let before = &value[..at + name];
                return Some([before, b"Path=", &mapped, &value[at + attribute.len()..]].concat());
            }
            at += attribute.len() + 1;
        }
        None
    }
}

/// Whether some bytes begin with a text, in any case.
fn begins(bytes: &[u8], text: &str) -> bool {
    bytes.get(..text.len()).is_some_and(|beginning| beginning.eq_ignore_ascii_case(text.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNT: Mount<'_> = Mount { route: "/wiki", host: "h.example:8080" };

    #[track_caller]
    fn assert_maps(name: &str, value: &str, expected: &str) {
        assert_eq!(String::from_utf8_lossy(&MOUNT.map(name, value.as_bytes())), expected, "{name}: {value}");
    }

    #[test]
    fn references_to_the_application_are_mapped_to_its_route_and_others_are_not() {
        for (value, expected) in [
            ("/", "/wiki/"),
            ("/page?a=/b", "/wiki/page?a=/b"),
            ("/wikis", "/wiki/wikis"),
            ("/wiki", "/wiki"),
            ("/wiki/page", "/wiki/page"),
            ("/wiki?x", "/wiki?x"),
            ("page", "page"),
            ("../up", "../up"),
            ("?q", "?q"),
            ("http://h.example:8080/page", "http://h.example:8080/wiki/page"),
            ("HTTPS://H.example:8080/page", "HTTPS://H.example:8080/wiki/page"),
            ("//h.example:8080/page", "//h.example:8080/wiki/page"),
            ("http://h.example/page", "http://h.example/page"),
            ("http://h.example:80801/page", "http://h.example:80801/page"),
            ("http://other/page", "http://other/page"),
            ("mailto:a@b", "mailto:a@b"),
            ("", ""),
        ] {
            assert_maps("Location", value, expected);
            assert_maps("content-location", value, expected);
        }
        assert_maps("x-location", "/", "/");
        let whole = Mount { route: "", host: "h" };
        assert_eq!(&*whole.map("location", b"/page"), b"/page");
    }

    #[test]
    fn the_target_of_a_refresh_is_mapped() {
        for (value, expected) in [
            ("5", "5"),
            ("5; url=/next", "5; url=/wiki/next"),
            ("0;URL='/next'", "0;URL='/wiki/next'"),
            ("0;url=https://other/", "0;url=https://other/"),
            ("0;url=", "0;url="),
        ] {
            assert_maps("refresh", value, expected);
        }
    }

    #[test]
    fn the_path_of_a_cookie_is_mapped_whatever_its_value_holds() {
        for (value, expected) in [
            ("session=1; Path=/; HttpOnly", "session=1; Path=/wiki; HttpOnly"),
            ("session=1;path=/admin", "session=1;Path=/wiki/admin"),
            ("session=1; Path=/wiki", "session=1; Path=/wiki"),
            ("session=1; Path = /a ; Secure", "session=1; Path=/wiki/a; Secure"),
            ("session=1", "session=1"),
            ("path=/", "path=/"),
            ("a=\"; Path=x\"; Secure", "a=\"; Path=x\"; Secure"),
            ("a=1; Path=; Secure", "a=1; Path=; Secure"),
            ("a=1; Pathology=/", "a=1; Pathology=/"),
        ] {
            assert_maps("Set-Cookie", value, expected);
        }
    }
}
