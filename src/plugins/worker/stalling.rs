//! What a worker does while it waits for its plugin or a client: it asks for another connection, and expires queued requests.

use crate::http::{Request, errors};
use crate::plugins::job::{Job, KvFailure};
use crate::plugins::plugin::Plugin;
use crate::plugins::process_state::ProcessState;
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Interval at which the worker expires queued requests while it waits for a slow client.
pub(super) const CLIENT_TICK: Duration = Duration::from_millis(100);

/// Time that a request waits while streams occupy every connection. Clients decide when streams end, so a longer wait would seldom help.
const STREAMS_TIME: Duration = Duration::from_secs(1);

/// What a worker does while it waits for its plugin or a client.
pub(super) struct Stalling {
    plugin: Arc<Plugin>,
    process: Arc<ProcessState>,
    /// Whether the worker's connection counts as stalled.
    stalled: Cell<bool>,
}

impl Stalling {
    /// Of a worker whose connection is not stalled.
    pub(super) fn new(plugin: &Arc<Plugin>, process: &Arc<ProcessState>) -> Self {
        Self { plugin: Arc::clone(plugin), process: Arc::clone(process), stalled: Cell::new(false) }
    }

    /// Marks the connection as stalled by the current request, asks for another one, and expires queued requests. True if the process has
    /// ended, so that the caller stops waiting.
    pub(super) fn stall(&self) -> bool {
        let Self { plugin, process, stalled } = self;
        if !stalled.replace(true) {
            plugin.scaling.stalled.fetch_add(1, Ordering::Relaxed);
        }
        plugin.ask_to_grow();
        let streams_only = plugin.is_full_of_streams();
        let limit = |job: &Job| {
            let limit = job.time_limit(process.request_timeout);
            if streams_only { limit.min(STREAMS_TIME) } else { limit }
        };
        plugin.queue.expire(|job| job.arrived().elapsed() >= limit(job), |job| expire(plugin, process, job));
        process.ended.load(Ordering::Relaxed)
    }

    /// Waits until the client takes more of its answer; meanwhile expires queued requests.
    pub(super) fn wait_for_client(&self, request: &Request) {
        while !request.responder.has_room_within(CLIENT_TICK) && !self.stall() {}
    }

    /// Ends the mark of the current request.
    pub(super) fn clear(&self) {
        if self.stalled.take() {
            self.plugin.scaling.stalled.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Fails a request that has waited too long in the queue.
pub(super) fn expire(plugin: &Plugin, process: &ProcessState, job: Job) {
    let waited = job.arrived().elapsed();
    let limit = job.time_limit(process.request_timeout);
    let (error, why) = match plugin.congestion().filter(|_| waited < limit) {
        Some(why) => {
            plugin.warn_of_streams(&why);
            (errors::STREAMS_FULL, why)
        }
        None => {
            let [open, most] = [plugin.scaling.connections.load(Ordering::Relaxed), plugin.metadata.concurrency as usize];
            let limit = limit.as_secs_f32();
            (errors::TIMEOUT, format!("it waited {limit} s for its turn on {open} connections of at most {most}"))
        }
    };
    match job {
        Job::Http(waiting) => {
            if let Some(request) = waiting.take(Instant::now()) {
                let lost = request.loss.as_ref().map(|loss| format!("{}; ", loss.why)).unwrap_or_default();
                plugin.note_failed(&format!("{}: {lost}{why}", request.name()));
                request.fail(error);
            }
        }
        Job::Kv(job) => {
            plugin.note_failed(&format!("{}: {why}", job.name()));
            job.reply(Err(KvFailure::Failed(error)));
        }
    }
}
