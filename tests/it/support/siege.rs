//! A host under attack: an honest client beside it, what the host holds before and after, and a table of it all.

use super::http::Client;
use super::{Server, Site, pause, wait_within};
use std::collections::BTreeMap;
use std::fmt::{self, Display, Write};
use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Pause of the honest client between an answer and its next request.
const PAUSE: Duration = Duration::from_millis(10);

/// Time in which the host is back to what it held. On a busy machine a plugin gets further connections, and an idle one is closed only
/// after four pings, 15 s and up to 5 s each.
const BACK_TIME: Duration = Duration::from_secs(180);

/// Requests at a time before the attack, as many as the host keeps connections for at rest, and one more: what it holds afterwards
/// cannot be more.
const WARM_UP: usize = 5;

/// Attackers at a time that take a place inside of the host each, and how often they come: with the honest client no more than what it
/// keeps places for, as those beyond are given back only after ten seconds.
pub(crate) const FEW: usize = 3;
pub(crate) const ROUNDS: usize = 4;

/// Where the attack comes from, so that what one address may have is not taken from the honest client.
pub(crate) const ATTACKER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

/// The lines of the table, as they come.
static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// A host with two plugins: `fake`, which is attacked, and `honest`, whose client must not notice.
pub(crate) struct Siege {
    pub(crate) server: Server,
}

/// How often what has happened.
#[derive(Default)]
pub(crate) struct Tally(BTreeMap<String, usize>);

impl Tally {
    /// Notes what has happened once.
    pub(crate) fn add(&mut self, what: impl Display) {
        *self.0.entry(what.to_string()).or_default() += 1;
    }
}

impl Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let each: Vec<String> = self.0.iter().map(|(what, count)| format!("{what} ×{count}")).collect();
        f.write_str(&each.join(", "))
    }
}

/// Ends the honest client, also when the attack has panicked.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Siege {
    /// A host with these settings, which has been asked by several clients at a time.
    #[track_caller]
    pub(crate) fn new(arguments: &[&str]) -> Self {
        let server = Site::new().args(arguments).fake("fake").fake("honest").start();
        for id in ["fake", "honest"] {
            server.wait_state(id, "ready");
            let mut clients: Vec<Client> = (0..WARM_UP).map(|_| server.client()).collect();
            for client in &mut clients {
                client.send(format!("GET /{id}/sleep?s=0.2 HTTP/1.1\r\nhost: test\r\n\r\n").as_bytes());
            }
            for client in &mut clients {
                assert_eq!(client.reply(false).text(), "slept");
            }
        }
        Self { server }
    }

    /// A connection of the attacker's.
    pub(crate) fn attacker(&self) -> Client {
        Client::connect_from(ATTACKER, self.server.address())
    }

    /// Attacks the host. The honest client must be answered all the while, and the host hold no more files and threads afterwards than
    /// before. What the attack gives is what the host did, for the table.
    #[track_caller]
    pub(crate) fn withstand<T: Display>(&self, name: &str, attack: impl FnOnce() -> T) {
        let before = self.server.held();
        let over = AtomicBool::new(false);
        let (did, worst) = std::thread::scope(|scope| {
            let honest = scope.spawn(|| be_honest(&self.server, &over));
            let end = Over(&over);
            let did = attack();
            drop(end);
            (did, honest.join().unwrap())
        });
        let mut after = before;
        let is_back = || {
            after = self.server.held();
            (after[0] <= before[0] && after[1] <= before[1]).then_some(())
        };
        wait_within(BACK_TIME, &format!("files and threads to be {before:?} again or fewer, after {name}"), is_back);
        let log = self.server.log();
        assert!(!log.contains("panic"), "{name}");
        note(name, &did.to_string(), worst, before, after);
    }
}

/// Asks `honest` until all is over, now on a connection that is kept and now on a fresh one: the longest time an answer took.
fn be_honest(server: &Server, over: &AtomicBool) -> Duration {
    let mut kept = server.client();
    let mut worst = Duration::ZERO;
    for number in 0.. {
        let last = over.load(Ordering::Relaxed);
        let begin = Instant::now();
        let (mut fresh, path) = (None, format!("/honest/{number}"));
        // One that is kept may be ended while it is idle and connections are few, as any client knows.
        let is_kept = number % 2 == 0 && kept.begin_get(&path);
        let client = if is_kept { &mut kept } else { fresh.insert(server.client()) };
        let reply = if is_kept { client.reply(false) } else { client.get(&path) };
        worst = worst.max(begin.elapsed());
        assert_eq!((reply.status, reply.text()), (200, format!("GET /{number} of honest").as_str()));
        if number % 2 == 0 && !is_kept {
            kept = server.client();
        }
        if last {
            break;
        }
        pause(PAUSE);
    }
    worst
}

/// Puts a line in the table, which is kept in a file for `make attack`.
fn note(name: &str, did: &str, worst: Duration, before: [usize; 2], after: [usize; 2]) {
    let change = |index: usize| format!("{} → {}", before[index], after[index]);
    let worst = worst.as_secs_f64() * 1000.0;
    let line = format!("| {name} | {did} | {worst:.0} ms | {} | {} |\n", change(0), change(1));
    let mut lines = LINES.lock().unwrap();
    lines.push(line);
    lines.sort();
    let mut table =
        String::from("| attack | what the host did | honest client's longest wait | files | threads |\n|---|---|---|---|---|\n");
    lines.iter().for_each(|line| table.write_str(line).unwrap());
    fs::write(Path::new(env!("CARGO_TARGET_TMPDIR")).join("attack.txt"), table).unwrap();
}
