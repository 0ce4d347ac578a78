//! A worker of a static site: it answers requests from the files of a directory.

use super::intake::{Next, next};
use super::pace::Pace;
use super::stalling::{Stalling, expire};
use crate::apps::manifest::Run;
use crate::apps::static_files::{Caller, Site, SiteOptions};
use crate::plugins::job::Job;
use crate::plugins::plugin::Plugin;
use crate::plugins::process_state::ProcessState;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// A worker of a static site.
pub(crate) struct FileWorker {
    plugin: Arc<Plugin>,
    process: Arc<ProcessState>,
    site: Site,
    pace: Pace,
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
        Ok(Self { plugin, process, site, pace: Pace::default(), first })
    }

    /// Serves requests until the plugin is to stop, or the worker is surplus.
    pub(crate) fn run(mut self) {
        loop {
            match next(&self.plugin, &self.process, || self.site.release()) {
                Next::Job(job) => self.serve(job),
                Next::Ping if self.first => {}
                Next::Ping | Next::Stop => return,
            }
            if !self.first && self.plugin.is_to_shrink() {
                return;
            }
        }
    }

    fn serve(&mut self, job: Job) {
        let now = Instant::now();
        if now.duration_since(job.arrived()) >= job.time_limit(self.process.request_timeout) {
            return expire(&self.plugin, &self.process, job);
        }
        match job {
            Job::Http(waiting) => {
                // None if the client has gone.
                let Some(request) = waiting.take(now) else { return };
                let stalling = Stalling::new(&self.plugin, &self.process);
                let surroundings = Surroundings { plugin: &self.plugin, process: &self.process, stalling: &stalling };
                self.site.serve(request, &surroundings);
                stalling.clear();
                self.pace.measure(&self.plugin, now.elapsed(), 1);
            }
            Job::Kv(job) => job.refuse_unsupported(),
        }
    }
}
