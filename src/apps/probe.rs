//! Finds out whether an application that was started is ready: a connection is accepted, or the path of its manifest is answered.

use crate::apps::endpoint::Endpoint;
use crate::apps::http_connection::{Head, HttpConnection};
use std::time::{Duration, Instant};

/// Time for an answer before the path is asked again.
const ANSWER_TIME: Duration = Duration::from_secs(5);

/// Pause after an answer that is none, or an error.
const PAUSE: Duration = Duration::from_millis(100);

/// The probe of one start.
#[derive(Default)]
pub(crate) struct Probe {
    asked: Option<(HttpConnection, Instant)>,
    /// When to ask again.
    again: Option<Instant>,
    /// What the last attempt came to.
    last: Option<String>,
    /// Whether a connection was accepted.
    accepted: bool,
}

impl Probe {
    /// Takes the next step, which does not wait. True if the application is ready.
    pub(crate) fn step(&mut self, endpoint: &Endpoint, uid: Option<u32>, path: Option<&str>) -> bool {
        let now = Instant::now();
        if self.again.is_some_and(|again| now < again) {
            return false;
        }
        let Some((mut connection, since)) = self.asked.take() else {
            match HttpConnection::open(endpoint, uid, true) {
                Ok(mut connection) => match path {
                    None => return true,
                    Some(path) => {
                        self.accepted = true;
                        connection.queue_get(path);
                        self.asked = Some((connection, now));
                    }
                },
                Err(error) => self.last = Some(error.to_string()),
            }
            return false;
        };
        let path = path.unwrap_or("/");
        let received = connection.send_some().and_then(|_| connection.read_now());
        if received.is_ok() && !connection.has_ended() && !connection.has_head() {
            if now.duration_since(since) < ANSWER_TIME {
                self.asked = Some((connection, since));
            } else {
                self.fail(now, format!("{path} was not answered within {} s", ANSWER_TIME.as_secs()));
            }
            return false;
        }
        match connection.take_head(None, true) {
            Ok(Head::Response(response)) if response.head.status < 500 => return true,
            Ok(Head::Response(response)) => self.fail(now, format!("{path} was answered with {}", response.head.status)),
            // The answer follows.
            Ok(Head::Interim(_) | Head::Ignored | Head::Upgraded(_)) => self.asked = Some((connection, since)),
            Err(why) => self.fail(now, format!("{path} was not answered: {why}")),
        }
        false
    }

    fn fail(&mut self, now: Instant, what: String) {
        (self.last, self.again) = (Some(what), Some(now + PAUSE));
    }

    /// Whether a connection was accepted.
    pub(crate) fn was_accepted(&self) -> bool {
        self.accepted
    }

    /// What the last attempt came to.
    pub(crate) fn last(&self) -> Option<&str> {
        self.last.as_deref()
    }
}
