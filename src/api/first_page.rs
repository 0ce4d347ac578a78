//! Checks the first page of a plugin for links that lead out of its route: those of an application that does not know its prefix.

use crate::apps::manifest::Kind;
use crate::apps::page_links::{Link, OutsideLinks, Place};
use crate::apps::prefix_settings::cure;
use crate::http::request::{RequestId, named, split_target};
use crate::plugins::page_request::{self, Page, PageRequest};
use crate::plugins::plugin::{Plugin, State};
use crate::plugins::registry::Registry;
use crate::plugins::routes::Target;
use crate::protocol::metadata::BelowRoute;
use serde::Serialize;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Time for the page, redirects included. The operator waits for it, and it occupies one of the API's few threads.
const CHECK_TIME: Duration = Duration::from_secs(3);

/// Most redirects that are followed: to a default page, to a language, to a login.
const MAX_REDIRECTS: usize = 4;

/// The start of the ids of these requests.
const ID_PREFIX: &str = "first-page";

/// What the check of a plugin's first page has found.
#[derive(Debug, Serialize)]
pub(crate) struct FirstPage {
    /// The path of the page, behind redirects.
    path: String,
    #[serde(flatten)]
    result: Verdict,
}

#[derive(Debug, Serialize)]
#[serde(tag = "result", rename_all = "snake_case")]
enum Verdict {
    /// No link leads out of the route.
    Fine,
    /// Some do.
    LinksOutside {
        /// Number of paths to which they lead.
        count: usize,
        /// The first of them.
        links: Vec<Link>,
        /// What was found, and what the operator can do about it.
        advice: String,
    },
    /// There was no page to check.
    NotChecked {
        /// Why.
        reason: String,
    },
}

/// A check under way.
struct Check<'a> {
    registry: &'a Registry,
    plugin: &'a Plugin,
    place: Place<'a>,
    https: bool,
    deadline: Instant,
}

/// Requests and checks the first page of a plugin below its route. None if it has no route, does not run, or answers for the paths of its
/// links itself. `base` is the URL of the host, `number` counts these requests.
pub(crate) fn check(registry: &Registry, plugin: &Plugin, base: Option<&str>, number: &AtomicU64) -> Option<FirstPage> {
    let route = plugin.metadata.route.as_deref()?;
    let is_unaware = plugin.kind() != Kind::Native || plugin.metadata.below_route == BelowRoute::Rewrite;
    if !is_unaware || plugin.status().state != State::Ready {
        return None;
    }
    let (scheme, host) = base.and_then(|base| base.split_once("://")).unwrap_or(("http", "localhost"));
    let deadline = Instant::now() + CHECK_TIME;
    let check = Check { registry, plugin, place: Place { route, host }, https: scheme == "https", deadline };
    let mut path = format!("{route}/");
    let result = check.run(&mut path, number).unwrap_or_else(|reason| Verdict::NotChecked { reason });
    Some(FirstPage { path: named(split_target(&path).0), result })
}

impl Check<'_> {
    /// Follows redirects from `path`, which becomes that of the page.
    fn run(&self, path: &mut String, number: &AtomicU64) -> Result<Verdict, String> {
        if self.plugin.queue.len() > 0 {
            return Err("other requests wait for it".to_owned());
        }
        for _ in 0..=MAX_REDIRECTS {
            let id = RequestId { prefix: Arc::from(ID_PREFIX), number: number.fetch_add(1, Ordering::Relaxed) };
            let asked = PageRequest { target: path, host: self.place.host, https: self.https, mount: self.place.route.len(), id };
            let page = page_request::get(self.plugin, asked, self.deadline, is_html).map_err(|error| why(&error))?;
            if !matches!(page.status, 301 | 302 | 303 | 307 | 308) {
                return self.judge(&page, path);
            }
            let location = page.header("location").unwrap_or_default();
            *path = self.follow(path, location).ok_or_else(|| format!("it redirects to {:?}", named(location)))?;
        }
        Err(format!("it redirects more than {MAX_REDIRECTS} times"))
    }

    /// The target below the route to which a reference leads from `path`.
    fn follow(&self, path: &str, reference: &str) -> Option<String> {
        let target = match self.place.absolute(reference) {
            Some(target) => target.to_owned(),
            // Another host, or a path by steps that only a resolver for URLs understands.
            None if reference.is_empty() || reference.contains("//") || reference.starts_with(['.', '#']) => return None,
            None if reference.starts_with('?') => format!("{}{reference}", split_target(path).0),
            None => format!("{}/{reference}", split_target(path).0.rsplit_once('/')?.0),
        };
        // The request line has no room for other bytes.
        let is_sound = target.bytes().all(|byte| byte.is_ascii_graphic());
        (is_sound && self.place.holds(split_target(&target).0)).then_some(target)
    }

    fn judge(&self, page: &Page, path: &str) -> Result<Verdict, String> {
        if page.status != 200 {
            return Err(format!("it answered with {}", page.status));
        }
        if !is_html(page) {
            return Err("it is not HTML".to_owned());
        }
        let routes = self.registry.routes();
        // A link to the host's start page or to another plugin is there for a purpose.
        let is_meant = |element: &str, path: &str| match routes.resolve(path) {
            Target::Plugin { plugin, .. } => plugin.id() != self.plugin.id(),
            Target::Index => matches!(element, "a" | "area"),
            _ => false,
        };
        let OutsideLinks { count, examples } = self.place.outside(&page.body, is_meant);
        let Some(Link { element, attribute, path: example }) = examples.first() else { return Ok(Verdict::Fine) };
        let links = if count == 1 { "1 link of" } else { &format!("{count} links of") };
        let lead = if count == 1 { "leads" } else { "lead" };
        let page = named(split_target(path).0);
        let (file, cure) = (if self.plugin.run().is_some() { "plugrack.toml" } else { "its metadata" }, cure(self.plugin.run()));
        let advice = format!(
            "{links} {page} {lead} out of the route, such as <{element} {attribute}=\"{example}\">: give the application an origin \
            of its own by host = [\"NAME.example.org\"] in {file}, or {cure} (docs/apps.md, \"Links that lead outside of the route\")"
        );
        Ok(Verdict::LinksOutside { count, links: examples, advice })
    }
}

/// Whether a response is a page of HTML that can be read as it is.
fn is_html(page: &Page) -> bool {
    let kind = page.header("content-type").unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    let is_html = ["text/html", "application/xhtml+xml"].iter().any(|html| kind.eq_ignore_ascii_case(html));
    is_html && page.header("content-encoding").is_none_or(|coding| coding.eq_ignore_ascii_case("identity"))
}

/// Why there is no page.
fn why(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::TimedOut => format!("it did not answer within {} s", CHECK_TIME.as_secs()),
        io::ErrorKind::UnexpectedEof => "its response broke off".to_owned(),
        _ => format!("its response cannot be read: {error}"),
    }
}
