//! The threads that answer requests from the network for the API and for the start page.

use super::pages;
use crate::api::Api;
use crate::http::framing::host_head;
use crate::http::request::audience;
use crate::http::{Request, WaitingRequest};
use crate::plugins::registry::Registry;
use crossbeam_channel::{Receiver, Sender, bounded};
use std::io::{self, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Number of threads. A request that waits for its plugin occupies one.
const THREADS: usize = 4;

/// Limit of requests that wait for a thread.
const QUEUE: usize = 64;

/// Time in which a streamed body must make progress. The gate ends slow ones sooner.
const BODY_TIME: Duration = Duration::from_mins(1);

/// Starts the threads. Returns the queue from which they take requests.
///
/// # Errors
/// A thread cannot be created.
pub(crate) fn start(api: &Arc<Api>, registry: &Arc<Registry>) -> io::Result<Sender<WaitingRequest>> {
    let (sender, queue) = bounded(QUEUE);
    for number in 1..=THREADS {
        let (api, registry, queue) = (Arc::clone(api), Arc::clone(registry), queue.clone());
        std::thread::Builder::new().name(format!("api-{number}")).spawn(move || work(&api, &registry, &queue))?;
    }
    Ok(sender)
}

fn work(api: &Api, registry: &Registry, queue: &Receiver<WaitingRequest>) {
    for waiting in queue {
        let Some(request) = waiting.take(Instant::now()) else { continue };
        // A request that a panic drops is answered with 502.
        if catch_unwind(AssertUnwindSafe(|| answer(api, registry, request))).is_err() {
            log::error!("a request made the API panic");
        }
    }
}

fn answer(api: &Api, registry: &Registry, mut request: Request) {
    let (status, head, body) = if request.target().starts_with("/api") {
        let (method, url) = (request.method_name().to_owned(), request.target().to_owned());
        let authorization = request.header("authorization").map(str::to_owned);
        let reply = api.handle(&method, &url, authorization.as_deref(), &mut Body(&mut request));
        let status = reply.status;
        let (head, body) = reply.render();
        (status, head, body)
    } else {
        let (kind, page) = pages::index(registry, audience(&request.head, None).html, request.header("host").unwrap_or_default());
        (200, host_head(200, [("content-type", kind)].into_iter().chain(pages::HEADERS)), page)
    };
    request.responder.answer_whole(status, head, body.as_bytes());
}

/// The body of a request.
struct Body<'a>(&'a mut Request);

impl Read for Body<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read_body(buffer, BODY_TIME)
    }
}
