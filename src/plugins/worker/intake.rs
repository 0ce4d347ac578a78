//! What a worker does next: it takes a job from its plugin's queue, or is told to stop.

use super::pace::Pace;
use super::stalling::{Stalling, expire};
use crate::http::Request;
use crate::plugins::connection::RELEASE_AFTER;
use crate::plugins::job::Job;
use crate::plugins::plugin::Plugin;
use crate::plugins::process_state::ProcessState;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Idle time after which the worker pings the plugin.
pub(super) const PING_AFTER: Duration = Duration::from_secs(15);

/// What a worker does next.
pub(super) enum Next {
    Job(Job),
    Ping,
    Stop,
}

/// Waits for the next job. Calls `release` once the worker is idle for a while, so that it frees memory.
pub(super) fn next(plugin: &Plugin, process: &ProcessState, release: impl FnOnce()) -> Next {
    // Leaves queued requests to the next process, or a constant stream of them would keep this one from stopping.
    if process.stopping.load(Ordering::Relaxed) {
        return Next::Stop;
    }
    if let Some(job) = plugin.queue.try_take() {
        return Next::Job(job);
    }
    plugin.scaling.idle.fetch_add(1, Ordering::Relaxed);
    let (now, is_over) = (Instant::now(), || process.stopping.load(Ordering::SeqCst));
    let job = plugin.queue.take_by(now + RELEASE_AFTER, is_over).or_else(|| {
        release();
        plugin.queue.take_by(now + PING_AFTER, is_over)
    });
    plugin.scaling.idle.fetch_sub(1, Ordering::Relaxed);
    match job {
        Some(job) => Next::Job(job),
        None if is_over() => Next::Stop,
        None => Next::Ping,
    }
}

/// Has `serve` answer one request after another, until the plugin is to stop or the worker, unless it is the `first`, is surplus. For plugins
/// to which a worker keeps no connection. `release` frees the memory of `server` while it is idle.
pub(super) fn serve_each<S>(
    (plugin, process): (&Arc<Plugin>, &Arc<ProcessState>),
    first: bool,
    server: &mut S,
    release: impl Fn(&mut S),
    serve: impl Fn(&mut S, Request, &Stalling),
) {
    let mut pace = Pace::default();
    loop {
        let job = match next(plugin, process, || release(server)) {
            Next::Job(job) => job,
            Next::Ping if first => continue,
            Next::Ping | Next::Stop => return,
        };
        let now = Instant::now();
        match job {
            job if now.duration_since(job.arrived()) >= job.time_limit(process.request_timeout) => expire(plugin, process, job),
            Job::Kv(job) => job.refuse_unsupported(),
            Job::Http(waiting) => {
                // None if the client has gone.
                if let Some(request) = waiting.take(now) {
                    let stalling = Stalling::new(plugin, process);
                    serve(server, request, &stalling);
                    stalling.clear();
                    pace.measure(plugin, now.elapsed(), 1);
                }
            }
        }
        if !first && plugin.is_to_shrink() {
            return;
        }
    }
}
