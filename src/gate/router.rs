//! Finds the destination of each request.

use super::connection::{Destination, Prepared};
use super::hosts::{Hosts, Owner};
use super::pages;
use crate::api::Api;
use crate::http::errors::{self, METHODS};
use crate::http::framing::host_head;
use crate::http::request::{audience, header_in, split_head, split_target};
use crate::http::slots::{NoSlot, Slot};
use crate::http::{HttpError, WaitingRequest};
use crate::plugins::plugin::Plugin;
use crate::plugins::registry::Registry;
use crate::plugins::routes::Target;
use crate::protocol::metadata::TrailingSlash;
use crate::util::log_throttle::suppressed_note;
use crossbeam_channel::Sender;
use memchr::memchr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Routes requests to plugins, the API and the host's own pages.
pub(crate) struct Router {
    registry: Arc<Registry>,
    api: Arc<Api>,
    api_queue: Sender<WaitingRequest>,
    /// Connections that one plugin may hold.
    per_plugin: u32,
    hosts: Hosts,
    /// Set when the host takes no new requests.
    closing: AtomicBool,
}

/// Where a request goes.
pub(super) enum Routed {
    /// To this destination; its connection holds this slot of the plugin.
    To(Destination, Option<Slot>),
    /// Nowhere: clients of its plugin hold as many connections as one plugin may have. The connection ends, so that other plugins' clients
    /// can use it.
    Full(HttpError),
}

impl Router {
    /// A router for the plugins of a registry and the API. Clients of one plugin may hold `per_plugin` connections.
    pub(crate) fn new(
        registry: Arc<Registry>,
        api: Arc<Api>,
        api_queue: Sender<WaitingRequest>,
        per_plugin: u32,
        hosts: Hosts,
    ) -> Self {
        Self { registry, api, api_queue, per_plugin, hosts, closing: AtomicBool::new(false) }
    }

    /// Refuses all requests from now on, because the host stops.
    pub(super) fn close(&self) {
        self.closing.store(true, Ordering::Release);
    }

    /// Whether the first scan of the plugins directory has ended.
    pub(super) fn is_scanned(&self) -> bool {
        self.registry.is_scanned(Duration::ZERO)
    }

    /// Hands a request to the API's threads.
    ///
    /// # Errors
    /// Their queue is full: the request.
    pub(super) fn submit_to_api(&self, request: WaitingRequest) -> Result<(), WaitingRequest> {
        self.api_queue.try_send(request).map_err(|full| full.into_inner())
    }

    /// Finds the destination of the request with this canonical head, which is `complete` if it has no body. `id` returns its id.
    pub(super) fn route(&self, head: &[u8], complete: bool, id: impl Fn() -> String) -> Routed {
        let (method, target, headers) = split_head(head);
        let (path, _) = split_target(target);
        let is_reading = matches!(method, "GET" | "HEAD");
        let error = |error: HttpError| {
            let id = id();
            let (head, body) = errors::render(error, Some(audience(head, Some(&id))));
            here(error.status, head, body)
        };
        if self.closing.load(Ordering::Acquire) {
            return error(errors::STOPPING);
        }
        // Read before the routes: if it is set, they are complete.
        let known = self.is_scanned();
        let routes = self.registry.routes();
        match self.hosts.owner(host_in(headers), &routes, known) {
            // `*` is the host itself, whatever its name is.
            Owner::Plugin(_) if path == "*" => {}
            Owner::Plugin(plugin) => return self.to_plugin(plugin, 0).unwrap_or_else(error),
            Owner::Routes => {}
            Owner::Unsettled => return Routed::To(Destination::Unknown, None),
            Owner::Nobody => return error(errors::MISDIRECTED),
        }
        match routes.resolve(path) {
            Target::Plugin { plugin, mount, .. }
                if path == mount && plugin.metadata.trailing_slash == TrailingSlash::Redirect =>
            {
                here_with(308, &[("location", &with_slash(target, path))], "")
            }
            Target::Plugin { plugin, mount, .. } => self.to_plugin(plugin, mount.len()).unwrap_or_else(error),
            Target::Api(_) => {
                let authorization = header_in(head, "authorization").and_then(|value| std::str::from_utf8(value).ok());
                match self.api.check(method, target, authorization) {
                    None => Routed::To(Destination::Api, None),
                    Some(reply) => {
                        let status = reply.status;
                        let (head, body) = reply.render();
                        here(status, head, body)
                    }
                }
            }
            Target::Server => here_with(204, &[("content-type", "text/plain"), ("allow", METHODS)], ""),
            Target::Nothing if !known => Routed::To(Destination::Unknown, None),
            Target::Index | Target::Health if !complete => error(errors::NOT_FOUND),
            Target::Index | Target::Health if !is_reading => error(errors::METHOD_NOT_ALLOWED),
            Target::Health => here_with(200, &[("content-type", "text/plain; charset=utf-8")], "ok\n"),
            Target::Index => Routed::To(Destination::Api, None),
            Target::Nothing if path == pages::ICON_PATH && complete && is_reading => {
                here_with(200, &pages::ICON_HEADERS, pages::ICON)
            }
            Target::Nothing if path == pages::ICON_PATH && complete => error(errors::METHOD_NOT_ALLOWED),
            Target::Nothing => error(errors::NOT_FOUND),
        }
    }

    /// Takes a request to a plugin whose route in the request's path has so many bytes.
    ///
    /// # Errors
    /// Why the plugin takes no requests now.
    fn to_plugin(&self, plugin: &Arc<Plugin>, mount: usize) -> Result<Routed, HttpError> {
        plugin.admit()?;
        match plugin.slots.take(self.per_plugin as usize) {
            Ok(slot) => Ok(Routed::To(Destination::Plugin(Arc::clone(plugin), mount), Some(slot))),
            Err(NoSlot(suppressed)) => {
                if let Some(suppressed) = suppressed {
                    log::warn!(
                        "{} holds {} connections, and another request for it was refused (serve --max-connections-per-plugin){}",
                        plugin.id(),
                        self.per_plugin,
                        suppressed_note(suppressed)
                    );
                }
                Ok(Routed::Full(errors::PLUGIN_FULL))
            }
        }
    }
}

/// The host among the headers of a canonical head, which is the first of them.
fn host_in(headers: &[u8]) -> &[u8] {
    let value = headers.strip_prefix(b"host: ").unwrap_or_default();
    &value[..memchr(b'\r', value).unwrap_or_default()]
}

/// A target with a slash behind its path.
fn with_slash(target: &str, path: &str) -> String {
    let query = target.strip_prefix(path).unwrap_or_default();
    format!("{path}/{query}")
}

fn here(status: u16, head: Vec<u8>, body: impl Into<Vec<u8>>) -> Routed {
    Routed::To(Destination::Here(Prepared { status, head, body: body.into() }), None)
}

fn here_with(status: u16, headers: &[(&str, &str)], body: &str) -> Routed {
    here(status, host_head(status, headers.iter().copied()), body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_is_the_first_header() {
        assert_eq!(host_in(b"host: a.example:80\r\naccept: */*\r\n"), b"a.example:80");
        assert_eq!(host_in(b"host: \r\nx: host: b\r\n"), b"");
        assert_eq!(host_in(b""), b"");
    }

    #[test]
    fn the_query_stays_behind_the_slash() {
        for (target, path, expected) in
            [("/wiki", "/wiki", "/wiki/"), ("/wiki?a=b?c/d", "/wiki", "/wiki/?a=b?c/d"), ("/a/b?", "/a/b", "/a/b/?")]
        {
            assert_eq!(with_slash(target, path), expected);
        }
    }
}
