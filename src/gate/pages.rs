//! The pages the host serves itself: the list of plugins at `/`, and the icon that browsers ask for.

use crate::plugins::plugin::{Plugin, State};
use crate::plugins::registry::{Entry, Registry};
use crate::protocol::metadata::Metadata;
use crate::util::escape::{html, shown};
use std::fmt::Write;
use std::sync::Arc;

/// Headers of a page: it needs nothing but its own style, and images where an icon is one.
pub(crate) const HEADERS: [(&str, &str); 5] = [
    ("content-security-policy", "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"),
    ("x-content-type-options", "nosniff"),
    ("cache-control", "no-store"),
    ("vary", "accept"),
    ("referrer-policy", "same-origin"),
];

/// Where browsers look for an icon of the site that no page names.
pub(crate) const ICON_PATH: &str = "/favicon.ico";

/// The icon: three shelves of a rack.
pub(crate) const ICON: &str = "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 16 16\"><rect width=\"16\" height=\"16\" rx=\"3\" fill=\"#357\"/>\
    <path d=\"M3 4h10M3 8h10M3 12h10\" stroke=\"#fff\" stroke-width=\"2\"/></svg>\n";

/// Headers of the icon. It is kept for a day, as it changes with the host's version only.
pub(crate) const ICON_HEADERS: [(&str, &str); 4] = [
    ("content-type", "image/svg+xml"),
    ("cache-control", "public, max-age=86400"),
    ("content-security-policy", "default-src 'none'"),
    ("x-content-type-options", "nosniff"),
];

const TOP: &str = "<!doctype html>
<html lang=\"en\">
<meta charset=\"utf-8\">
<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">
<title>plugrack</title>
<style>
:root { color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif }
body { max-width: 40rem; margin: 2rem auto; padding: 0 1rem }
ul { list-style: none; padding: 0 }
li a, li div { display: flex; gap: 1rem; align-items: center; padding: .6rem; border-radius: .5rem; text-decoration: none; color: inherit }
li a:hover, li a:focus { background: color-mix(in srgb, currentColor 10%, transparent) }
.icon { font-size: 1.8rem; width: 2.4rem; text-align: center; overflow: hidden; flex: none }
.icon img { width: 2rem; height: 2rem }
small { opacity: .7; display: block }
small.down { opacity: 1; color: #d33 }
</style>
<h1>plugrack</h1>
";

/// The list of plugins, as a page or as plain text: its content type and its text. Links to other names have the port of the `host` that
/// the client has asked for.
pub(crate) fn index(registry: &Registry, html: bool, host: &str) -> (&'static str, String) {
    let plugins: Vec<Arc<Plugin>> = registry
        .entries()
        .into_values()
        .filter_map(|entry| match entry {
            Entry::Accepted { plugin, .. } => Some(plugin),
            Entry::Refused { .. } => None,
        })
        .collect();
    if html {
        ("text/html; charset=utf-8", page(&plugins, port(host)))
    } else {
        ("text/plain; charset=utf-8", text(&plugins, port(host)))
    }
}

/// The port of a host, with its colon; empty if there is none.
fn port(host: &str) -> &str {
    let port = host.rfind(':').map_or("", |colon| &host[colon..]);
    if port.len() > 1 && port[1..].bytes().all(|byte| byte.is_ascii_digit()) { port } else { "" }
}

/// Where a plugin is on the web, from this page: its route, or else its first exact host name.
fn link(metadata: &Metadata, port: &str) -> Option<String> {
    metadata.route.clone().or_else(|| Some(format!("//{}{port}/", metadata.exact_host()?)))
}

fn text(plugins: &[Arc<Plugin>], port: &str) -> String {
    let mut out = String::new();
    for plugin in plugins {
        let m = &plugin.metadata;
        let place = link(m, port).or_else(|| m.host.first().cloned()).unwrap_or_default();
        put(&mut out, format_args!("{place:<24} {} {} ({})\n", shown(&m.name), m.version, words(plugin.status().state)));
    }
    if plugins.is_empty() { "no plugins yet\n".into() } else { out }
}

fn page(plugins: &[Arc<Plugin>], port: &str) -> String {
    let mut out = TOP.to_owned();
    if plugins.is_empty() {
        out.push_str("<p>No plugins yet: put one in the plugins directory, and run <code>plugrack rescan</code>.\n");
        return out;
    }
    out.push_str("<ul>\n");
    for plugin in plugins {
        let m = &plugin.metadata;
        let icon = match m.icon.starts_with("data:") {
            true => format!("<img src=\"{}\" alt=\"\">", escape(&m.icon)),
            false => escape(&m.icon),
        };
        let state = plugin.status().state;
        let up = state == State::Ready;
        let class =
            if matches!(state, State::CrashLooping | State::Refused | State::Unlicensed) { " class=\"down\"" } else { "" };
        let about = if up { m.description.clone().unwrap_or_default() } else { words(state) };
        let (open, close) = match link(m, port).filter(|_| up) {
            Some(link) => (format!("<a href=\"{}\">", escape(&link)), "</a>"),
            None => ("<div>".into(), "</div>"),
        };
        let name = escape(&m.name);
        let about = escape(&about);
        put(
            &mut out,
            format_args!("<li>{open}<span class=\"icon\">{icon}</span><span>{name}<small{class}>{about}</small></span>{close}\n"),
        );
    }
    out.push_str("</ul>\n");
    out
}

/// A state in words; why it is so is not for everybody.
fn words(state: State) -> String {
    match state {
        State::Unlicensed => "unavailable".into(),
        state => state.name().replace('_', " "),
    }
}

fn put(out: &mut String, what: std::fmt::Arguments<'_>) {
    // Writing to a string does not fail.
    out.write_fmt(what).unwrap_or_default();
}

/// Text of others as HTML.
fn escape(text: &str) -> String {
    html(&shown(text))
}
