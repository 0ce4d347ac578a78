//! slowhttptest in its three modes against a host each, side by side, and an honest client beside it.

use crate::support::strain::count;
use crate::support::{Server, Site, command, wait_for};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

/// How long each is attacked.
const SECONDS: &str = "10";

/// Connections that the attacker makes, as many a second: more than a host takes from one address.
const CONNECTIONS: &str = "300";

fn attack(server: &Server, mode: &[&str]) -> Child {
    let mut slowhttptest = command("slowhttptest");
    slowhttptest.args(mode).args(["-c", CONNECTIONS, "-r", CONNECTIONS, "-l", SECONDS, "-v", "1"]);
    slowhttptest.args(["-u", &format!("http://{}/p/upload", server.address())]);
    slowhttptest.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("slowhttptest is there: make test-tools")
}

#[test]
fn slow_heads_bodies_and_readers_disturb_nobody() {
    let modes: [(&str, &[&str]); 3] = [
        ("slow heads", &["-H", "-i", "1"]),
        ("slow bodies", &["-B", "-i", "1", "-s", "100000"]),
        ("slow readers", &["-X", "-k", "5", "-n", "1", "-w", "10", "-y", "20", "-z", "5"]),
    ];
    std::thread::scope(|scope| {
        for (what, mode) in modes {
            scope.spawn(move || {
                let server = Site::new().fake("p").start();
                server.wait_state("p", "ready");
                assert_eq!(server.get("/p/x").status, 200);
                let before = (count(&server, "fd"), count(&server, "task"));
                let mut attacker = attack(&server, mode);
                let (mut answered, mut slowest) = (0, Duration::ZERO);
                // From an address of its own, as the attacker has one, and on a new connection each time.
                while attacker.try_wait().unwrap().is_none() {
                    let begun = Instant::now();
                    let mut honest = crate::support::http::Client::connect_from([127, 0, 0, 9], server.address());
                    assert_eq!(honest.get("/p/x").text(), "GET /x of p", "{what}");
                    slowest = slowest.max(begun.elapsed());
                    answered += 1;
                }
                assert!(answered > 0, "{what}: the attack was over before it was tried");
                wait_for("files and threads to be given back", || {
                    let now = (count(&server, "fd"), count(&server, "task"));
                    (now.0 <= before.0 + 16 && now.1 <= before.1 + 6).then_some(())
                });
                assert!(server.memory("VmHWM") < 32 << 20, "{what}: {} KiB", server.memory("VmHWM") >> 10);
                eprintln!("{what}: {answered} honest requests answered, the slowest in {slowest:?}");
            });
        }
    });
}
