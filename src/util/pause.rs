//! A short sleep between two polls of something that sends no event, such as a file, another process or a limit of the system.

use std::time::Duration;

/// Sleeps for the whole time. To wait for another thread of this process, use a channel or a condition variable.
pub(crate) fn pause(time: Duration) {
    #[expect(clippy::disallowed_methods, reason = "what is polled sends no event to wait for")]
    std::thread::sleep(time);
}
