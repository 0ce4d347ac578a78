//! What kind of application a directory holds, and a manifest for it. Nothing is run: all that is known comes from names and text.

mod draft;
mod files;
mod go;
mod node;
mod pages;
mod procfile;
mod python;
mod ruby;
#[cfg(test)]
mod tests;

use crate::apps::manifest;
use crate::protocol::metadata::{MAX_ID_LENGTH, MAX_NAME, RESERVED_ROUTES};
pub(crate) use draft::Draft;
use files::Files;
use std::io;
use std::path::Path;

/// The manifest of a plugin.
pub(crate) const MANIFEST: &str = manifest::FILE;

/// The program of a plugin that speaks the plugin protocol.
const PLUGIN: &str = "plugin";

/// What a directory is searched for, for people.
pub(crate) const LOOKED_FOR: &str = "Procfile, manage.py, an application in wsgi.py, asgi.py, app.py, main.py or application.py, \
    config.ru, a Gemfile with app.rb, package.json, server.js, go.mod, index.php, cgi-bin, *.cgi, and index.html there or in public, \
    dist, build or _site";

/// The version of an application that names none.
const VERSION: &str = "0.1.0";

/// The icon of every proposal.
const ICON: &str = "📦";

/// What a directory holds.
pub(crate) struct Detection {
    /// The file that makes it a plugin already.
    pub(crate) already: Option<&'static str>,
    /// A manifest for each kind of application that was recognised; the most specific first.
    pub(crate) found: Vec<Draft>,
    /// What could not be read, and why.
    pub(crate) notes: Vec<String>,
}

/// Looks at a directory, whose name becomes the plugin's id.
///
/// # Errors
/// It is no directory, or cannot be opened.
pub(crate) fn detect(directory: &Path, name: &str) -> io::Result<Detection> {
    let files = Files::open(directory)?;
    let manifest = files.holds(MANIFEST).then_some(MANIFEST);
    if let Some(already) = manifest.or_else(|| files.is_program(PLUGIN).then_some(PLUGIN)) {
        return Ok(Detection { already: Some(already), found: Vec::new(), notes: files.notes() });
    }
    let package = node::Package::read(&files);
    let mut found: Vec<Draft> = [
        procfile::detect(&files),
        python::django(&files),
        python::module(&files),
        ruby::detect(&files),
        node::detect(&files, package.as_ref()),
        go::detect(&files, name),
        pages::php(&files),
        pages::cgi(&files),
        pages::static_files(&files, package.as_ref()),
    ]
    .into_iter()
    .flatten()
    .collect();
    let version = package.and_then(|package| package.version);
    for draft in &mut found {
        name_draft(draft, name, version.as_deref());
    }
    Ok(Detection { already: None, found, notes: files.notes() })
}

/// Completes a manifest with what it says of the plugin.
fn name_draft(draft: &mut Draft, name: &str, version: Option<&str>) {
    let id = plugin_id(name);
    draft.identify("id", id.as_str(), "from the name of the directory");
    let is_name = !name.trim().is_empty() && name.chars().count() <= MAX_NAME && !name.chars().any(char::is_control);
    draft.identify("name", if is_name { name } else { &id }, "the name of the directory");
    let is_version =
        |version: &&str| (1..=MAX_NAME).contains(&version.len()) && version.bytes().all(|b| (0x20..0x7f).contains(&b));
    match version.filter(is_version) {
        Some(version) => draft.identify("version", version, "from package.json"),
        None => draft.identify("version", VERSION, "no file names a version"),
    }
    draft.identify("icon", ICON, "any emoji");
    match format!("/{id}") {
        route if RESERVED_ROUTES.contains(&route.as_str()) => {
            draft.identify("route", format!("{route}-app"), format!("{route} belongs to the host"));
        }
        route => draft.identify("route", route, "from the id; or, for an origin of its own: host = [\"NAME.example.org\"]"),
    }
}

/// A valid plugin id that resembles a name.
fn plugin_id(name: &str) -> String {
    let mut id = String::new();
    for c in name.chars().map(|c| c.to_ascii_lowercase()) {
        if c.is_ascii_alphanumeric() {
            id.push(c);
        } else if !id.is_empty() && !id.ends_with('-') {
            id.push('-');
        }
    }
    id.truncate(MAX_ID_LENGTH);
    match id.trim_end_matches('-') {
        "" => "app".to_owned(),
        id => id.to_owned(),
    }
}
