//! A worker of a static site: it answers requests from the files of a directory.

use super::intake::serve_each;
use super::stalling::Stalling;
use crate::apps::manifest::Run;
use crate::apps::static_files::{Caller, Site, SiteOptions};
use crate::plugins::plugin::Plugin;
use crate::plugins::process_state::ProcessState;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A worker of a static site.
pub(crate) struct FileWorker {
    plugin: Arc<Plugin>,
    process: Arc<ProcessState>,
    site: Site,
    /// Whether it stays while it is idle.
    first: bool,
}

/// What a site needs to know of its worker.
pub(super) struct Surroundings<'a> {
    pub(super) plugin: &'a Plugin,
    pub(super) process: &'a ProcessState,
    pub(super) stalling: &'a Stalling,
}

impl Caller for Surroundings<'_> {
    fn interrupts(&self) -> bool {
        self.stalling.stall() || self.process.stopping.load(Ordering::Relaxed)
    }

    fn note_failed(&self, line: &str) {
        self.plugin.note_failed(line);
    }
}

/// The site of a manifest.
pub(crate) fn site_options(run: &Run) -> SiteOptions {
    let (root, index, cache_control) = (run.root.clone(), run.index.clone(), run.cache_control.clone());
    SiteOptions { root, index, spa: run.spa, cache_control }
}

impl FileWorker {
    /// Opens the site of a plugin.
    ///
    /// # Errors
    /// The directory cannot be opened.
    pub(crate) fn open(plugin: Arc<Plugin>, process: Arc<ProcessState>, first: bool) -> io::Result<Self> {
        let run = process.run().ok_or(io::ErrorKind::NotFound)?;
        let site = Site::open(&site_options(run))?;
        Ok(Self { plugin, process, site, first })
    }

    /// Serves requests until the plugin is to stop, or the worker is surplus.
    pub(crate) fn run(self) {
        let Self { plugin, process, mut site, first } = self;
        serve_each((&plugin, &process), first, &mut site, Site::release, |site, request, stalling| {
            site.serve(request, &Surroundings { plugin: &plugin, process: &process, stalling });
        });
    }
}
