//! Whose a request is by its host: a plugin's, or the host's own. Pure.

use crate::plugins::host_names::NameMap;
use crate::plugins::routes::{Named, Routes};
use crate::protocol::metadata::{LOCALHOST, MAX_HOST_NAME, host_name_fault};
use std::collections::HashSet;
use std::net::IpAddr;

/// Names and addresses of the host itself, as the operator has given them.
#[derive(Debug, Clone, Default)]
pub(crate) struct OwnNames {
    names: NameMap<()>,
    addresses: HashSet<IpAddr>,
}

/// A name or an address of the host itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum OwnName {
    /// A name, exact or with a wildcard.
    Name(String),
    /// An address.
    Address(IpAddr),
}

impl OwnName {
    /// Reads a name or an address, an IPv6 address with brackets or without.
    ///
    /// # Errors
    /// The rule that it breaks.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        if let Some(address) = address(text) {
            return Ok(Self::Address(address));
        }
        match host_name_fault(text) {
            None => Ok(Self::Name(text.to_owned())),
            Some(fault) => Err(format!("{text:?} is neither a host name nor an IP address: {fault}")),
        }
    }
}

impl OwnNames {
    /// The names of several settings.
    pub(crate) fn new<'a>(names: impl IntoIterator<Item = &'a OwnName>) -> Self {
        let mut own = Self::default();
        for name in names {
            match name {
                OwnName::Name(name) => own.names.add(name, ()),
                OwnName::Address(address) => {
                    own.addresses.insert(*address);
                }
            }
        }
        own
    }
}

/// How hosts are told apart.
#[derive(Debug, Clone, Default)]
pub(crate) struct Hosts {
    /// Names of the host itself. They come before those of plugins.
    pub(crate) own: OwnNames,
    /// Whether only loopback reaches the host, and no trusted proxy comes that way. `ID.localhost` is then the plugin with that id.
    pub(crate) local: bool,
    /// Whether other names than those of the host and of plugins are refused.
    pub(crate) only_known: bool,
    /// The id of the plugin that answers for all names and paths, if one does.
    pub(crate) sole: Option<String>,
}

/// Who answers for the host of a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Owner<'a, T> {
    /// A plugin, with the whole path.
    Plugin(&'a T),
    /// The host, and the plugins by their routes.
    Routes,
    /// Unknown until the first scan of the plugins directory has ended.
    Unsettled,
    /// Nobody: the request is refused.
    Nobody,
}

impl Hosts {
    /// Who answers for a host, which is the value of a `host` header. `is_scanned` tells whether the routes are complete. It allocates
    /// nothing.
    pub(super) fn owner<'a, T>(&self, host: &[u8], routes: &'a Routes<T>, is_scanned: bool) -> Owner<'a, T> {
        if let Some(sole) = &self.sole {
            return match routes.by_id(sole) {
                Some(plugin) => Owner::Plugin(plugin),
                None if is_scanned => Owner::Nobody,
                None => Owner::Unsettled,
            };
        }
        let bare = without_port(host);
        let is_local = self.local && is_below_localhost(bare);
        if host.is_empty() || !(is_local || self.only_known || routes.has_names()) {
            return Owner::Routes;
        }
        let mut buffer = [0; MAX_HOST_NAME];
        let Some(name) = in_lower_case(bare, &mut buffer) else { return self.unnamed(is_scanned) };
        if name == LOCALHOST || self.own.names.get(name).is_some() {
            return Owner::Routes;
        }
        match routes.by_name(name, self.local) {
            Named::Plugin(plugin) => Owner::Plugin(plugin),
            Named::Expected if !is_scanned => Owner::Unsettled,
            _ if self.only_known && address(name).is_some_and(|address| self.is_own(address)) => Owner::Routes,
            _ => self.unnamed(is_scanned),
        }
    }

    /// What becomes of a request for a name that nobody has.
    fn unnamed<'a, T>(&self, is_scanned: bool) -> Owner<'a, T> {
        match (self.only_known, is_scanned) {
            (false, _) => Owner::Routes,
            (true, false) => Owner::Unsettled,
            (true, true) => Owner::Nobody,
        }
    }

    fn is_own(&self, address: IpAddr) -> bool {
        (self.local && address.is_loopback()) || self.own.addresses.contains(&address)
    }
}

/// The address that a text is, with the brackets that an IPv6 address has in a URL or without them.
fn address(text: &str) -> Option<IpAddr> {
    match text.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']')?.parse().ok().map(IpAddr::V6),
        None => text.parse().ok(),
    }
}

/// A host without its port.
fn without_port(host: &[u8]) -> &[u8] {
    match memchr::memrchr(b':', host) {
        // Within brackets it belongs to an IPv6 address.
        Some(colon) if !host.ends_with(b"]") => &host[..colon],
        _ => host,
    }
}

fn is_below_localhost(name: &[u8]) -> bool {
    let name = name.strip_suffix(b".").unwrap_or(name);
    let label = name.len().checked_sub(LOCALHOST.len()).filter(|&at| at > 0 && name[at - 1] == b'.');
    label.is_some_and(|at| name[at..].eq_ignore_ascii_case(LOCALHOST.as_bytes()))
}

/// A name in lower case and without the dot at its end, in a buffer; none if it is too long for a name.
fn in_lower_case<'a>(name: &[u8], buffer: &'a mut [u8; MAX_HOST_NAME]) -> Option<&'a str> {
    let name = name.strip_suffix(b".").unwrap_or(name);
    let place = buffer.get_mut(..name.len())?;
    place.copy_from_slice(name);
    place.make_ascii_lowercase();
    std::str::from_utf8(place).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routes() -> Routes<u8> {
        let mut routes = Routes::new(vec![("/wiki".into(), 1)]);
        routes.add_plugin("wiki", &["wiki.example.org".into(), "other.localhost".into()], &1);
        routes.add_plugin("all", &["*.example.org".into()], &2);
        routes.add_plugin("other", &[], &3);
        routes.expect("soon.example.net");
        routes
    }

    fn hosts(own: &[&str], local: bool, only_known: bool) -> Hosts {
        let own: Vec<_> = own.iter().map(|name| OwnName::parse(name).unwrap()).collect();
        Hosts { own: OwnNames::new(&own), local, only_known, sole: None }
    }

    #[test]
    fn a_name_has_one_owner_however_it_is_written() {
        let routes = routes();
        let (open, local) = (hosts(&[], false, false), hosts(&[], true, false));
        for (host, plugin) in [
            ("wiki.example.org", 1),
            ("WIKI.Example.ORG", 1),
            ("wiki.example.org:8080", 1),
            ("wiki.example.org.", 1),
            ("wiki.example.org.:8080", 1),
            ("wiki.example.org:", 1),
            ("x.example.org", 2),
            ("y.x.example.org", 2),
            ("y.wiki.example.org", 2),
            ("other.localhost", 1),
        ] {
            for hosts in [&open, &local] {
                assert_eq!(hosts.owner(host.as_bytes(), &routes, true), Owner::Plugin(&plugin), "{host}");
            }
        }
        let long = format!("{}.example.org", "a.".repeat(130));
        let others = [
            "",
            "example.org",
            "example.org.",
            "wiki.example.org..",
            "wiki.example.org:80:80",
            ".",
            ":80",
            "[::1]:8080",
            "[::1]",
            "127.0.0.1:80",
            "localhost",
            "a.b.localhost",
            "none.localhost",
            "wiki_example.net",
            &long,
        ];
        for host in others {
            for hosts in [&open, &local] {
                assert_eq!(hosts.owner(host.as_bytes(), &routes, true), Owner::Routes, "{host}");
            }
        }
    }

    #[test]
    fn an_id_at_localhost_is_a_plugin_for_loopback_alone() {
        let routes = routes();
        for host in ["wiki.localhost", "WIKI.LocalHost.:8080", "all.localhost:80"] {
            let owner = hosts(&[], true, false).owner(host.as_bytes(), &routes, true);
            assert_eq!(owner, Owner::Plugin(if host.starts_with("all") { &2 } else { &1 }), "{host}");
            assert_eq!(hosts(&[], false, false).owner(host.as_bytes(), &routes, true), Owner::Routes, "{host}");
            assert_eq!(hosts(&[], false, true).owner(host.as_bytes(), &routes, true), Owner::Nobody, "{host}");
        }
        // Nothing lists a name.
        let mut plain = Routes::new(vec![]);
        plain.add_plugin("notes", &[], &9);
        assert!(!plain.has_names());
        assert_eq!(hosts(&[], true, false).owner(b"notes.localhost:1", &plain, true), Owner::Plugin(&9));
    }

    #[test]
    fn names_of_the_host_come_first_and_others_may_be_refused() {
        let routes = routes();
        let own = ["rack.example.org", "*.rack.example.org", "192.0.2.1", "[2001:db8::1]"];
        let (open, strict) = (hosts(&own, false, false), hosts(&own, false, true));
        for host in ["rack.example.org", "Rack.Example.org.:443", "a.rack.example.org", "localhost:8080", ""] {
            assert_eq!(open.owner(host.as_bytes(), &routes, true), Owner::Routes, "{host}");
            assert_eq!(strict.owner(host.as_bytes(), &routes, true), Owner::Routes, "{host}");
        }
        assert_eq!(strict.owner(b"wiki.example.org", &routes, true), Owner::Plugin(&1));
        assert_eq!(strict.owner(b"y.wiki.example.org", &routes, true), Owner::Plugin(&2));
        for host in ["192.0.2.1", "192.0.2.1:80", "[2001:db8::1]:80", "[2001:DB8::1]"] {
            assert_eq!(strict.owner(host.as_bytes(), &routes, true), Owner::Routes, "{host}");
        }
        let long = "a".repeat(300);
        for host in ["evil.example", "127.0.0.1", "192.0.2.2", "[::1]", "2001:db8::1", ".", ":80", &long, "example.org"] {
            assert_eq!(strict.owner(host.as_bytes(), &routes, true), Owner::Nobody, "{host}");
            assert_eq!(open.owner(host.as_bytes(), &routes, true), Owner::Routes, "{host}");
        }
        let local = hosts(&[], true, true);
        for host in ["127.0.0.1:8080", "127.9.9.9", "[::1]:8080", "localhost"] {
            assert_eq!(local.owner(host.as_bytes(), &routes, true), Owner::Routes, "{host}");
        }
        assert_eq!(local.owner(b"192.0.2.1", &routes, true), Owner::Nobody);
    }

    #[test]
    fn a_sole_plugin_answers_for_every_name() {
        let sole = |id: &str| Hosts { sole: Some(id.into()), ..hosts(&["rack.example.org"], true, true) };
        for host in ["", "localhost:80", "127.0.0.1", "rack.example.org", "wiki.localhost", "evil.example", ":"] {
            assert_eq!(sole("other").owner(host.as_bytes(), &routes(), true), Owner::Plugin(&3), "{host}");
            assert_eq!(sole("none").owner(host.as_bytes(), &routes(), false), Owner::Unsettled, "{host}");
            assert_eq!(sole("none").owner(host.as_bytes(), &routes(), true), Owner::Nobody, "{host}");
        }
    }

    #[test]
    fn names_are_held_until_the_plugins_are_known() {
        let routes = routes();
        let (open, strict) = (hosts(&[], false, false), hosts(&[], false, true));
        assert_eq!(open.owner(b"soon.example.net", &routes, false), Owner::Unsettled);
        assert_eq!(open.owner(b"soon.example.net", &routes, true), Owner::Routes);
        assert_eq!(open.owner(b"evil.example", &routes, false), Owner::Routes);
        assert_eq!(strict.owner(b"evil.example", &routes, false), Owner::Unsettled);
        assert_eq!(strict.owner(b"soon.example.net", &routes, true), Owner::Nobody);
    }

    #[test]
    fn an_own_name_is_a_name_or_an_address() {
        assert_eq!(OwnName::parse("::1"), Ok(OwnName::Address("::1".parse().unwrap())));
        assert_eq!(OwnName::parse("*.example.org"), Ok(OwnName::Name("*.example.org".into())));
        for wrong in ["", "A.example", "a.example:80", "http://a.example", "[::1", "[127.0.0.1]", "1.2.3", "*"] {
            assert!(OwnName::parse(wrong).unwrap_err().contains("neither a host name nor an IP address"), "{wrong}");
        }
    }
}
