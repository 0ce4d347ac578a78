//! Which part of the host a request is for: a plugin, the operator's API, or a page. Pure.

use super::host_names::{NameMap, local_id};
use std::collections::HashMap;

/// Where a request goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target<'a, T> {
    /// A plugin, with what follows its mount; begins with `/`.
    Plugin {
        /// Whose route it is.
        plugin: &'a T,
        /// The route.
        mount: &'a str,
        /// What follows it.
        path: &'a str,
    },
    /// The operator's API, with what follows `/api`; begins with `/`.
    Api(&'a str),
    /// `/healthz`.
    Health,
    /// `/`.
    Index,
    /// `*`: the host itself, whatever its paths are.
    Server,
    /// Nobody's.
    Nothing,
}

/// What a host name leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Named<'a, T> {
    /// A plugin that lists it, or whose id it has.
    Plugin(&'a T),
    /// A plugin that has listed it before the host started, and is not known yet.
    Expected,
    /// No plugin.
    Nobody,
}

/// The routes and the host names of all plugins.
#[derive(Debug, Clone)]
pub(crate) struct Routes<T> {
    /// Sorted by length, longest first, so that the first match is the closest.
    plugins: Vec<(String, T)>,
    /// The host names that plugins list.
    names: NameMap<T>,
    ids: HashMap<Box<str>, T>,
    /// Host names of plugins that may come.
    expected: NameMap<()>,
}

impl<T> Routes<T> {
    /// Routes to what they lead to; each route is taken once at most.
    pub(crate) fn new(mut plugins: Vec<(String, T)>) -> Self {
        plugins.sort_by(|(a, _), (b, _)| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
        Self { plugins, names: NameMap::default(), ids: HashMap::new(), expected: NameMap::default() }
    }

    /// Adds a plugin's id and the host names that it lists. What another plugin has already stays with it.
    pub(crate) fn add_plugin(&mut self, id: &str, names: &[String], plugin: &T)
    where
        T: Clone,
    {
        self.ids.entry(id.into()).or_insert_with(|| plugin.clone());
        names.iter().for_each(|name| self.names.add(name, plugin.clone()));
    }

    /// Adds a host name of a plugin that may come.
    pub(crate) fn expect(&mut self, name: &str) {
        self.expected.add(name, ());
    }

    /// Whether a plugin lists or may list a host name.
    pub(crate) fn has_names(&self) -> bool {
        !(self.names.is_empty() && self.expected.is_empty())
    }

    /// Finds the plugin with an id.
    pub(crate) fn by_id(&self, id: &str) -> Option<&T> {
        self.ids.get(id)
    }

    /// Resolves a host name, which is in lower case. `local` lets `ID.localhost` stand for a plugin that does not list it.
    pub(crate) fn by_name(&self, name: &str, local: bool) -> Named<'_, T> {
        let by_id = || local_id(name).filter(|_| local).and_then(|id| self.ids.get(id));
        match self.names.get(name).or_else(by_id) {
            Some(plugin) => Named::Plugin(plugin),
            None if self.expected.get(name).is_some() => Named::Expected,
            None => Named::Nobody,
        }
    }

    /// Finds who answers for a path, which is taken as the client sent it, not decoded.
    pub(crate) fn resolve<'a>(&'a self, path: &'a str) -> Target<'a, T> {
        if path == "/" {
            return Target::Index;
        }
        if path == "*" {
            return Target::Server;
        }
        if path == "/healthz" {
            return Target::Health;
        }
        if let Some(rest) = below("/api", path) {
            return Target::Api(rest);
        }
        let owner = self.plugins.iter().find_map(|(mount, plugin)| Some((mount, plugin, below(mount, path)?)));
        match owner {
            Some((mount, plugin, path)) => Target::Plugin { plugin, mount, path },
            None => Target::Nothing,
        }
    }
}

/// What follows a mount in a path at or below it.
fn below<'a>(mount: &str, path: &'a str) -> Option<&'a str> {
    match path.strip_prefix(mount)? {
        "" => Some("/"),
        rest if rest.starts_with('/') => Some(rest),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn routes() -> Routes<u8> {
        Routes::new(vec![("/notes".into(), 1), ("/notes/archive".into(), 2), ("/n".into(), 3)])
    }

    #[test]
    fn the_closest_route_answers() {
        let routes = routes();
        let plugin = |path| match routes.resolve(path) {
            Target::Plugin { plugin, path, .. } => Some((*plugin, path)),
            _ => None,
        };
        assert_eq!(plugin("/notes"), Some((1, "/")));
        assert_eq!(plugin("/notes/"), Some((1, "/")));
        assert_eq!(plugin("/notes/a%2Fb//c"), Some((1, "/a%2Fb//c")));
        assert_eq!(plugin("/notes/archive"), Some((2, "/")));
        assert_eq!(plugin("/notes/archived"), Some((1, "/archived")));
        assert_eq!(plugin("/n/x"), Some((3, "/x")));
        assert_eq!(plugin("/notesx"), None);
        assert_eq!(plugin("/Notes"), None);
        assert_eq!(routes.resolve("/"), Target::Index);
        assert_eq!(routes.resolve("/healthz"), Target::Health);
        assert_eq!(routes.resolve("/api"), Target::Api("/"));
        assert_eq!(routes.resolve("/api/plugins"), Target::Api("/plugins"));
        assert_eq!(routes.resolve("/apix"), Target::Nothing);
        assert_eq!(routes.resolve(""), Target::Nothing);
        assert_eq!(routes.resolve("*"), Target::Server);
    }

    proptest! {
        #[test]
        fn mount_and_rest_make_the_path_again(path in "/[a-z/.%0-9-]{0,30}") {
            if let Target::Plugin { mount, path: rest, .. } = routes().resolve(&path) {
                let again = format!("{mount}{rest}");
                prop_assert!(again == path || again == path.clone() + "/");
            }
        }
    }
}
