//! From start to end of a plugin and of the host.

use crate::support::{Site, is_alive};

#[test]
fn a_crashed_plugin_is_started_again() {
    let server = Site::new().fake("p").start();
    let before = server.wait_state("p", "ready")["process"]["pid"].as_i64().unwrap();
    assert_eq!(server.request("POST", "/p/crash", &[], b"").status, 502);
    let after = crate::support::wait_for("another process", || {
        let plugin = server.plugin("p");
        (plugin["state"] == "ready" && plugin["process"]["pid"] != before).then_some(plugin)
    });
    assert!(!is_alive(before));
    assert_eq!(after["process"]["restarts"], 1);
    assert_eq!(server.get("/p/x").text(), "GET /x of p");
}
