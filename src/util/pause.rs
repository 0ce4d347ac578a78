//! A pause of this thread between two polls of something that raises no event when it changes.

use std::time::Duration;

/// Sleeps for a short time. To wait for another thread of this process, use a channel or a condition variable.
pub(crate) fn pause(time: Duration) {
    #[expect(
        clippy::disallowed_methods,
        reason = "files, processes and the system's limits change without an event to wait for"
    )]
    std::thread::sleep(time);
}
