//! A pause of this thread between two looks at something that tells nobody when it changes.

use std::time::Duration;

/// Waits for the whole of a short time. Whoever waits for another thread of this process uses a channel or a condition variable instead.
pub(crate) fn pause(time: Duration) {
    #[expect(
        clippy::disallowed_methods,
        reason = "files, processes and the system's limits change without an event to wait for"
    )]
    std::thread::sleep(time);
}
