//! One healthy plugin among faulty ones of every kind: its answers stay the same, and what the others cost it is reported.

use crate::support::http::Reply;
use crate::support::{Server, Site, install_fake, is_alive, metadata, pause, wait_for};
use serde_json::json;
use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// A faulty plugin: its id, the mode it starts in, the path it is asked for, and what may be answered. The first status must be seen.
/// Beside these 503 is always sound: a plugin that fell needs a moment to stand up.
const FAULTS: [(&str, &str, &str, &[u16]); 24] = [
    ("does-not-listen", "no-listen", "/x", &[503]),
    ("hangs-in-init", "hang-init", "/x", &[503]),
    ("is-never-ready", "mute", "/x", &[503]),
    ("exits-early", "exit-1", "/x", &[503]),
    ("refuses", "refuse", "/x", &[503]),
    ("speaks-version-2", "other-version", "/x", &[503]),
    ("speaks-version-2-and-exits", "other-version-exits", "/x", &[503]),
    ("answers-init-wrong", "wrong-reply", "/x", &[503]),
    ("sends-a-huge-frame", "", "/huge-frame", &[502]),
    ("sends-garbage", "", "/garbage", &[502]),
    ("answers-with-a-wrong-id", "", "/wrong-id", &[502]),
    ("answers-twice", "", "/twice", &[200, 502]),
    ("answers-drop-by-drop", "", "/drip", &[504]),
    ("answers-late", "", "/sleep?s=30", &[504]),
    ("dies-in-mid-answer", "", "/half", &[502]),
    ("crashes", "", "/crash", &[502]),
    ("closes-its-socket", "", "/unlisten", &[200, 502, 504]),
    ("leaves-a-grandchild", "", "/fork", &[200, 504]),
    ("dies-and-leaves-a-grandchild", "", "/fork?setsid&die", &[502]),
    ("ignores-sigterm", "ignore-term", "/x", &[200]),
    ("floods-its-log", "flood", "/x", &[200, 504]),
    ("eats-the-processor", "burn", "/x", &[200, 504]),
    ("eats-memory", "gorge", "/x", &[200, 502, 504]),
    ("fills-its-directory", "fill", "/x", &[200, 504]),
];

/// What the healthy plugin is asked; its answers depend on nothing but the request.
const ASKED: [(&str, &str, &str); 3] = [
    ("GET", "/healthy/x", ""),
    ("POST", "/healthy/echo", "some text that comes back"),
    ("POST", "/healthy/kv", "{\"op\":\"get\",\"key\":\"kept\"}"),
];

/// What is measured, one after the other.
const PHASES: [&str; 3] = ["alone", "while they come", "among them"];

/// How long each phase lasts at least.
const PHASE: Duration = Duration::from_secs(2);

/// Clients of the healthy plugin, and the pause of each between an answer and its next request: a steady load that leaves the
/// machine room, so that what is measured is the plugin's answers and not the clients' rush.
const CLIENTS: usize = 3;
const PAUSE: Duration = Duration::from_millis(5);

/// Pause of the one client of each faulty plugin.
const FAULTY_PAUSE: Duration = Duration::from_millis(50);

/// Ends a phase that is over, also for threads whose test has failed.
struct Over<'a>(&'a AtomicUsize);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(PHASES.len(), Ordering::Relaxed);
    }
}

fn key(reply: &Reply) -> (u16, Vec<u8>) {
    (reply.status, reply.body.clone())
}

/// Asks the healthy plugin until all is over: how long each answer took, by phase.
fn load(server: &Server, phase: &AtomicUsize, expected: &[(u16, Vec<u8>)]) -> [Vec<Duration>; PHASES.len()] {
    let mut times = [const { Vec::new() }; PHASES.len()];
    let mut client = server.client();
    for (index, (method, path, body)) in ASKED.iter().enumerate().cycle() {
        let Some(times) = times.get_mut(phase.load(Ordering::Relaxed)) else { break };
        let begin = Instant::now();
        let reply = client.request(method, path, &[], body.as_bytes());
        times.push(begin.elapsed());
        assert_eq!(key(&reply), expected[index], "{method} {path}");
        pause(PAUSE);
    }
    times
}

/// Asks a faulty plugin until all is over; `seen` is told when its fault has shown.
fn disturb(server: &Server, phase: &AtomicUsize, (id, _, path, statuses): (&str, &str, &str, &[u16]), seen: &Mutex<Vec<String>>) {
    let mut missing = true;
    // What falls at the first request is asked once by a POST, and for its answer has not to stand up again first.
    for method in ["POST", "GET"].iter().cycle() {
        if phase.load(Ordering::Relaxed) == PHASES.len() {
            return assert!(!missing, "{id} was never answered {}", statuses[0]);
        }
        let reply = server.request(method, &format!("/{id}{path}"), &[], b"");
        // How long it takes to stand up again is the machine's affair, and so is whether a request outlasts that.
        assert!([503, 504].contains(&reply.status) || statuses.contains(&reply.status), "{method} {id}: {reply:?}");
        if reply.status != 200 {
            assert!(reply.json()["error"]["code"].is_string(), "{method} {id}: {reply:?}");
        }
        if reply.status == statuses[0] && std::mem::take(&mut missing) {
            seen.lock().unwrap().push(id.to_owned());
        }
        pause(FAULTY_PAUSE);
    }
}

/// The table of what was measured: a line for each phase, and how many times as long as alone it took.
fn report(times: &mut [Vec<Duration>; PHASES.len()]) -> String {
    let mut table =
        format!("{:<16}{:>9}{:>10}{:>10}{:>10}{:>10}\n", "healthy plugin", "requests", "p50 ms", "factor", "p99 ms", "factor");
    let mut alone = None;
    for (name, times) in PHASES.iter().zip(times) {
        times.sort();
        let at = |share: usize| times[(times.len() - 1) * share / 100].as_secs_f64() * 1000.0;
        let (p50, p99) = (at(50), at(99));
        let (first50, first99) = *alone.get_or_insert((p50, p99));
        writeln!(table, "{name:<16}{:>9}{p50:>10.2}{:>10.1}{p99:>10.2}{:>10.1}", times.len(), p50 / first50, p99 / first99)
            .unwrap();
    }
    table
}

/// The grandchildren that plugins have left, by the lists those keep.
fn grandchildren(data: &Path) -> Vec<i64> {
    let list = |id: &str| fs::read_to_string(data.join("plugin-data").join(id).join("grandchildren")).unwrap_or_default();
    FAULTS.iter().flat_map(|(id, ..)| list(id).lines().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>()).collect()
}

#[test]
fn a_healthy_plugin_answers_the_same_among_faulty_ones_of_every_kind() {
    let server = Site::new().args(&["--request-timeout", "4s", "--start-timeout", "5s"]).fake("healthy").start();
    let healthy = server.wait_state("healthy", "ready")["process"].clone();
    server.request("POST", "/healthy/kv?value=as+it+was", &[], br#"{"op":"set","key":"kept"}"#);
    let expected = ASKED.map(|(method, path, body)| key(&server.request(method, path, &[], body.as_bytes())));
    assert!(expected.iter().all(|(status, body)| *status == 200 && !body.is_empty()), "{expected:?}");

    let (phase, seen) = (AtomicUsize::new(0), Mutex::default());
    let mut times = std::thread::scope(|scope| {
        let over = Over(&phase);
        let loads: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(|| load(&server, &phase, &expected))).collect();
        pause(PHASE);

        phase.store(1, Ordering::Relaxed);
        for (id, mode, ..) in FAULTS {
            install_fake(&server.site().plugins(), id, &json!({"metadata": metadata(id), "mode": mode}));
        }
        let mut foreign = metadata("has-metadata-of-version-2");
        foreign["protocol"] = json!(2);
        install_fake(&server.site().plugins(), "has-metadata-of-version-2", &json!({"metadata": foreign}));
        assert_eq!(server.api("POST", "/rescan", b"").1["refused"], json!(["has-metadata-of-version-2"]));
        for (id, ..) in FAULTS.iter().filter(|(_, _, _, statuses)| statuses[0] != 503) {
            server.wait_state(id, "ready");
        }

        phase.store(2, Ordering::Relaxed);
        let begin = Instant::now();
        for fault in FAULTS {
            scope.spawn({
                let (server, phase, seen) = (&server, &phase, &seen);
                move || disturb(server, phase, fault, seen)
            });
        }
        server.api("POST", "/plugins/ignores-sigterm/restart", b"");
        server.wait_logged("eats-memory", &["no memory after"]);
        server.wait_logged("fills-its-directory", &["wrote 200 MiB"]);
        wait_for("every fault to show", || (seen.lock().unwrap().len() == FAULTS.len()).then_some(()));
        pause(PHASE.saturating_sub(begin.elapsed()));
        drop(over);
        let mut all = [const { Vec::new() }; PHASES.len()];
        for load in loads {
            all.iter_mut().zip(load.join().unwrap()).for_each(|(all, times)| all.extend(times));
        }
        all
    });
    let table = report(&mut times);
    eprintln!("{table}");
    fs::write(Path::new(env!("CARGO_TARGET_TMPDIR")).join("isolation.txt"), table).unwrap();

    let after = server.plugin("healthy")["process"].clone();
    assert_eq!((&after["pid"], &after["restarts"]), (&healthy["pid"], &healthy["restarts"]));
    let (status, site) = server.stop();
    assert_eq!(status.code(), Some(0));
    let left = grandchildren(site.data());
    assert!(left.len() > 1, "{left:?}");
    wait_for("the grandchildren to end", || (!left.iter().any(|pid| is_alive(*pid))).then_some(()));
}
