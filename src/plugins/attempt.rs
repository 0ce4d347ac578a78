//! An attempt with one application: the host of `plugrack run` starts it once, and follows it to wherever it listens.

use crate::apps::endpoint::Endpoint;
use crate::process::listeners::{self, Listening};
use crate::process::output::Line;
use crossbeam_channel::Sender;
use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Interval at which the sockets of a starting application are listed: each time reads the descriptors of all its processes.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Time for which an application listens elsewhere, and on nothing new, before the host takes that for its choice. It may open the port
/// of a debugger before its own.
const SETTLE_TIME: Duration = Duration::from_secs(1);

/// What a host is started for.
#[derive(Debug)]
pub(crate) struct Attempt {
    /// The id of the only plugin.
    pub(crate) id: String,
    /// The application's working directory, in place of its manifest's.
    pub(crate) directory: PathBuf,
    /// Whether all names and paths of the host are the application's.
    pub(crate) has_origin: bool,
    /// Whether it may listen elsewhere than on the port that it is given.
    pub(crate) is_free: bool,
    /// Gets what it prints, and the host's notes about it.
    pub(crate) lines: Sender<Line>,
    /// Where it listens, once it is ready.
    pub(crate) place: OnceLock<Place>,
}

/// Where an application listens.
#[derive(Debug)]
pub(crate) struct Place {
    /// Where it was to listen.
    pub(crate) offered: Endpoint,
    /// Where it listens, as the host reaches it.
    pub(crate) used: Endpoint,
}

/// The search for where a starting application listens.
#[derive(Debug, Default)]
pub(crate) struct Search {
    look_at: Option<Instant>,
    /// What was seen last, and since when.
    seen: Option<(BTreeSet<Listening>, Instant)>,
}

impl Search {
    /// Looks where a session listens, unless it has just done so. Returns where that is, if it is not the `offered` port: its `socket` at
    /// once, and another address once that has settled.
    pub(crate) fn step(&mut self, session: i32, socket: &Path, offered: &Endpoint, now: Instant) -> Option<Endpoint> {
        if self.look_at.is_some_and(|at| now < at) {
            return None;
        }
        self.look_at = Some(now + LOOK_EVERY);
        self.settled(listeners::of_session(session), socket, offered, now)
    }

    fn settled(&mut self, found: BTreeSet<Listening>, socket: &Path, offered: &Endpoint, now: Instant) -> Option<Endpoint> {
        if found.iter().any(|found| matches!(found, Listening::Unix(path) if path == socket)) {
            return Some(Endpoint::Unix(socket.to_owned()));
        }
        let others: Vec<_> = found.iter().filter_map(reached).collect();
        if others.contains(offered) {
            return None;
        }
        // Debuggers and metrics have the higher ports.
        let tcp = |endpoint: &&Endpoint| matches!(endpoint, Endpoint::Tcp(_));
        let port = |endpoint: &&Endpoint| if let Endpoint::Tcp(address) = endpoint { address.port() } else { 0 };
        let choice = others.iter().filter(tcp).min_by_key(port).or(others.first()).cloned()?;
        match &self.seen {
            Some((seen, since)) if *seen == found => (now.duration_since(*since) >= SETTLE_TIME).then_some(choice),
            _ => {
                self.seen = Some((found, now));
                None
            }
        }
    }
}

/// Where a socket is reached from this machine; none of a socket without a path.
fn reached(listening: &Listening) -> Option<Endpoint> {
    match listening {
        Listening::Tcp(address) => Some(Endpoint::Tcp(match address {
            SocketAddr::V4(v4) if v4.ip().is_unspecified() => (Ipv4Addr::LOCALHOST, v4.port()).into(),
            // It takes IPv4 too, unless the application or the system has turned that off.
            SocketAddr::V6(v6) if v6.ip().is_unspecified() => (Ipv6Addr::LOCALHOST, v6.port()).into(),
            other => *other,
        })),
        Listening::Unix(path) => path.is_absolute().then(|| Endpoint::Unix(path.clone())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listening(places: &[&str]) -> BTreeSet<Listening> {
        let place = |place: &&str| place.parse().map_or_else(|_| Listening::Unix((*place).into()), Listening::Tcp);
        places.iter().map(place).collect()
    }

    /// What is found at once, and what once it has settled.
    fn found(places: &[&str]) -> (Option<String>, Option<String>) {
        let (mut search, now) = (Search::default(), Instant::now());
        let offered = "127.0.0.1:4000".parse().unwrap();
        let mut step = |after| {
            let found = search.settled(listening(places), Path::new("/run/own.sock"), &offered, now + after);
            found.map(|found| found.to_string())
        };
        (step(Duration::ZERO), step(SETTLE_TIME))
    }

    #[test]
    fn another_address_is_taken_once_it_has_settled() {
        let other = |address: &str| (None, Some(address.to_owned()));
        assert_eq!(found(&[]), (None, None));
        assert_eq!(found(&["127.0.0.1:5000"]), other("127.0.0.1:5000"));
        assert_eq!(found(&["0.0.0.0:5000"]), other("127.0.0.1:5000"));
        assert_eq!(found(&["[::]:5000"]), other("[::1]:5000"));
        assert_eq!(found(&["[::1]:4000"]), other("[::1]:4000"));
        assert_eq!(found(&["127.0.0.1:9229", "[::]:5000", "/tmp/x.sock"]), other("[::1]:5000"));
        assert_eq!(found(&["/tmp/x.sock", "@abstract"]), other("unix:/tmp/x.sock"));
    }

    #[test]
    fn what_was_offered_comes_first() {
        assert_eq!(found(&["127.0.0.1:4000", "127.0.0.1:80"]), (None, None));
        assert_eq!(found(&["0.0.0.0:4000", "127.0.0.1:80"]), (None, None));
        let own = Some("unix:/run/own.sock".to_owned());
        assert_eq!(found(&["/run/own.sock", "127.0.0.1:80"]), (own.clone(), own));
    }

    #[test]
    fn the_time_begins_again_with_every_change() {
        let (mut search, now) = (Search::default(), Instant::now());
        let offered = "127.0.0.1:4000".parse().unwrap();
        let mut step = |places: &[&str], ms| {
            let now = now + Duration::from_millis(ms);
            search.settled(listening(places), Path::new("/own"), &offered, now).is_some()
        };
        assert!(!step(&["127.0.0.1:9229"], 0));
        assert!(!step(&["127.0.0.1:9229", "127.0.0.1:80"], 900));
        assert!(!step(&["127.0.0.1:9229", "127.0.0.1:80"], 1800));
        assert!(step(&["127.0.0.1:9229", "127.0.0.1:80"], 1900));
    }
}
