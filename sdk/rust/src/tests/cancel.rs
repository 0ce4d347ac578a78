//! Requests that the host gives up while the plugin neither reads nor writes.

use super::{PATIENCE, Peer, Running, http, plugin};
use crate::{Request, Response};
use serde_json::json;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Longer than any test waits.
const FOR_EVER: Duration = PATIENCE.saturating_mul(10);

/// Sends a line when it is dropped.
struct Dropped(Sender<&'static str>);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.send("dropped").ok();
    }
}

/// A plugin whose handlers wait until they are cancelled, and what they say then.
fn waiting() -> (Running, Receiver<&'static str>) {
    let (say, said) = mpsc::channel();
    let running = Running::start(plugin(), move |request| {
        let say = say.clone();
        match request.path() {
            "/handler" => {
                say.send("begun").unwrap();
                let cancelled = request.cancelled_within(FOR_EVER) && request.is_cancelled();
                say.send(if cancelled { "cancelled" } else { "not cancelled" }).unwrap();
                Response::text("late")
            }
            "/events" => {
                let (cancellation, dropped) = (request.cancellation(), Dropped(say));
                let mut first = true;
                Response::events(std::iter::from_fn(move || {
                    if !std::mem::replace(&mut first, false) {
                        dropped.0.send("begun").unwrap();
                        let cancelled = cancellation.cancelled_within(FOR_EVER);
                        dropped.0.send(if cancelled { "cancelled" } else { "not cancelled" }).unwrap();
                    }
                    // One that does not heed the cancellation is dropped all the same.
                    Some(b"data: x\n\n".to_vec())
                }))
            }
            _ => Response::text(if request.cancelled_within(Duration::ZERO) { "cancelled" } else { "wanted" }),
        }
    });
    (running, said)
}

fn next(said: &Receiver<&'static str>) -> &'static str {
    said.recv_timeout(PATIENCE).unwrap()
}

#[test]
fn a_handler_that_writes_nothing_learns_that_the_host_has_gone() {
    let (running, said) = waiting();
    let first = running.ready();
    let mut peer = running.connect();
    peer.send(&http(1, "GET", "/handler"), b"");
    assert_eq!(next(&said), "begun");
    drop(peer);
    assert_eq!(next(&said), "cancelled");
    running.shut_down([first]);
}

#[test]
fn a_silent_stream_learns_it_and_is_dropped() {
    let (running, said) = waiting();
    let first = running.ready();
    let mut peer = running.connect();
    peer.send(&http(1, "GET", "/events"), b"");
    assert_eq!(peer.receive().0["type"], "response");
    assert_eq!(next(&said), "begun");
    // The event is left unread, which makes the end a reset.
    drop(peer);
    assert_eq!((next(&said), next(&said)), ("cancelled", "dropped"));
    running.shut_down([first]);
}

#[test]
fn a_request_whose_host_is_there_is_not_cancelled_and_a_shutdown_cancels_all() {
    let (running, said) = waiting();
    let mut first = running.ready();
    let mut peer = running.connect();
    peer.send(&http(1, "GET", "/handler"), b"");
    assert_eq!(next(&said), "begun");
    assert_eq!(first.get("/").1, b"wanted");
    first.send(&json!({"type": "shutdown", "id": 2}), b"");
    assert_eq!(next(&said), "cancelled");
    assert_eq!(peer.response().1, b"late");
    drop(first);
    running.shut_down([peer]);
}

/// A host that has closed its side of the connection for writing alone still reads.
#[test]
fn a_half_closed_connection_is_not_cancelled() {
    let (running, _said) = waiting();
    let first = running.ready();
    let mut peer = running.connect();
    peer.send(&http(1, "GET", "/"), b"");
    peer.0.stream().shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(peer.response().1, b"wanted");
    running.shut_down([first]);
}

/// A plugin whose streams are blocked after their first event, whatever becomes of their requests.
struct Blocked {
    running: Running,
    /// To be dropped to let them end.
    release: Sender<()>,
    /// Told when a stream is about to block.
    blocking: Receiver<()>,
}

impl Blocked {
    fn start(concurrency: u32) -> Self {
        let (release, released) = mpsc::channel::<()>();
        let (block, blocking) = mpsc::channel();
        let released = Arc::new(Mutex::new(released));
        let handler = move |request: &mut Request<'_>| {
            if request.path() == "/" {
                return Response::text("hello");
            }
            let (released, block) = (Arc::clone(&released), block.clone());
            let mut first = true;
            Response::events(std::iter::from_fn(move || {
                if !std::mem::replace(&mut first, false) {
                    block.send(()).unwrap();
                    // Fails once released.
                    released.lock().unwrap().recv().ok()?;
                }
                Some(b"data: x\n\n".to_vec())
            }))
        };
        Self { running: Running::start(plugin().concurrency(concurrency), handler), release, blocking }
    }

    /// Reads the beginning of a stream, and closes the connection once the stream is blocked.
    fn abandon(&self, mut peer: Peer) {
        peer.send(&http(1, "GET", "/events"), b"");
        assert_eq!(peer.receive().0["more"], true);
        assert_eq!(peer.receive().0["type"], "data");
        self.blocking.recv_timeout(PATIENCE).unwrap();
    }
}

#[test]
fn abandoned_streams_leave_room_for_others_until_there_are_twice_as_many_as_the_concurrency() {
    for concurrency in [1, 2] {
        let blocked = Blocked::start(concurrency);
        blocked.abandon(blocked.running.ready());
        for _ in 1..2 * concurrency {
            let mut peer = blocked.running.connect();
            assert_eq!(peer.get("/").1, b"hello");
            blocked.abandon(peer);
        }
        let mut peer = blocked.running.connect();
        peer.send(&http(1, "GET", "/"), b"");
        peer.0.stream().set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        assert!(peer.0.read().is_err(), "a handler has to end first");
        drop(blocked.release);
        peer.0.stream().set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(peer.response().1, b"hello");
        blocked.running.shut_down([peer]);
    }
}

#[test]
fn an_abandoned_stream_does_not_keep_the_plugin_from_its_exit() {
    let blocked = Blocked::start(1);
    blocked.abandon(blocked.running.ready());
    let peer = blocked.running.connect();
    blocked.running.shut_down([peer]);
}
